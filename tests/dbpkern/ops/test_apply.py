"""`ops.apply_` and `ops.update_`: the step of R."""

import pytest
import torch
from checks import (
    DEVICE,
    ETAS,
    FLOATS,
    HALVES,
    KAPPAS,
    LAYOUTS,
    SHAPES,
    accumulator,
    as_good,
    close,
    computes_on_fakes,
    matrix,
    peak,
    tensor,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dbpkern import ops, reference
from dbpkern.ops._common import IMPLEMENTATIONS

pytestmark = pytest.mark.usefixtures("poisoned")
WIDE = [torch.float64, torch.float32]


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("L", [0, 1, 2, 7, 8, 9, 17])
@pytest.mark.parametrize("d", [0, 1, 7, 8, 13, 24])
def test_apply(L, d, dtype):
    R, M = matrix(L, d, d, dtype=dtype), tensor(L, d, d, dtype=dtype)
    old = R.clone()
    assert ops.apply_(R, M, 0.1) is R
    as_good(R, reference.apply(old.double(), M.double(), 0.1), reference.apply(old, M, 0.1))


@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS])
@pytest.mark.parametrize(("L", "n", "d"), SHAPES)
def test_update(L, n, d, dtype, kappa):
    R, z = matrix(L, d, d, dtype=accumulator(dtype)), tensor(L, n, d, dtype=dtype)
    old = R.clone()
    assert ops.update_(R, z, 0.1, kappa) is R
    exact = reference.update(old.double(), z.double(), 0.1, kappa)
    as_good(R, exact, reference.update(old, z.to(R.dtype), 0.1, kappa))
    if not n:
        assert torch.equal(R, old)


@pytest.mark.parametrize("d", [1, 6, 9])
def test_both_associations_of_update_agree(d, monkeypatch):
    z, start = tensor(3, 7, d, dtype=torch.float64), matrix(3, d, d, dtype=torch.float64)
    results = []
    for forms in (True, False):
        monkeypatch.setattr("dbpkern.ops.update.forms_correlation", lambda *_, forms=forms: forms)
        results.append(ops.update_(start.clone(), z, 0.1, 0.3))
    close(*results)
    assert not torch.equal(results[0], start)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("L", [1, 3, 9])
@pytest.mark.parametrize("kind", ETAS)
def test_etas_of_every_kind(kind, L, dtype):
    eta, each = ETAS[kind](L)
    R, z = matrix(L, 6, 6, dtype=dtype), tensor(L, 9, 6, dtype=dtype)
    for n in (9, 4):
        M, _, _ = ops.correlation(z[:, :n])
        expected = torch.stack([r - rate * m @ r for r, m, rate in zip(R, M, each, strict=True)])
        close(ops.apply_(R.clone(), M, eta), expected)
        close(ops.update_(R.clone(), z[:, :n], eta), expected)


@pytest.mark.parametrize("eta", [0.05, 1e-9])
def test_a_16_bit_M(eta):
    R, M = matrix(2, 33, 33), tensor(2, 33, 33, dtype=torch.bfloat16)
    old = R.clone()
    ops.apply_(R, M, eta)
    peer = old - M.float() @ ((eta * old).to(M.dtype) if R.is_cuda else eta * old).float()
    as_good(R, reference.apply(old.double(), M.double(), eta), peer)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("L", [1, 3, 9])
def test_layouts(layout, L):
    R, z, M = matrix(L, 7, 7), tensor(L, 10, 7), tensor(L, 7, 7)
    (z_, _), (M_, _) = layout(z), layout(M)
    for step, expected in (
        (lambda R: ops.apply_(R, M_, 0.1), reference.apply(R, M, 0.1)),
        (lambda R: ops.update_(R, z_, 0.1, 0.3), reference.update(R, z, 0.1, 0.3)),
        (lambda R: ops.update_(R, z_[:, :4], 0.1, 0.3), reference.update(R, z[:, :4], 0.1, 0.3)),
    ):
        target, base = layout(R)
        padding = base.isnan()
        close(step(target), expected)
        assert torch.equal(base.isnan(), padding)


IN_PLACE = {
    "apply_ few layers": (3, lambda R: ops.apply_(R, torch.zeros_like(R), 0.1)),
    "apply_ many layers": (9, lambda R: ops.apply_(R, torch.zeros_like(R), 0.1)),
    "update_ no rows": (2, lambda R: ops.update_(R, R.new_zeros(2, 0, 4), 0.1)),
    "update_ few rows": (2, lambda R: ops.update_(R, R.new_zeros(2, 3, 4), 0.1)),
    "update_ many rows": (2, lambda R: ops.update_(R, R.new_zeros(2, 9, 4), 0.1)),
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_R_keeps_its_address_and_its_version_rises(case):
    L, step = IN_PLACE[case]
    R = matrix(L, 4, 4)
    version, address, part = R._version, R.data_ptr(), R[0]
    step(R)
    assert R._version > version
    assert part._version == R._version
    assert R.data_ptr() == address


class Recorder(TorchDispatchMode):
    """The operators that run within, with the dtypes of their tensors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        dtypes = [arg.dtype for arg in args if isinstance(arg, torch.Tensor)]
        if func.namespace == "aten" and not func.is_view:
            self.seen.append((func.overloadpacket.__name__, dtypes))
        return func(*args, **(kwargs or {}))


@computes_on_fakes
@pytest.mark.parametrize("eta", ["number", "[L]"])
def test_on_a_gpu_a_16_bit_M_is_multiplied_in_16_bits(eta):
    with FakeTensorMode():
        R = torch.empty(3, 64, 64, device="cuda")
        M = torch.empty(3, 64, 64, device="cuda", dtype=torch.bfloat16)
        rate = torch.tensor(0.1) if eta == "number" else torch.empty(3, device="cuda")
        with Recorder() as recorder:
            IMPLEMENTATIONS["apply_"](R, M, rate)
    work = [(name, dtypes) for name, dtypes in recorder.seen if not name.startswith("empty")]
    assert [name for name, _ in work] == ["mul", "bmm", "sub_"]
    assert work[1][1] == [torch.bfloat16] * 2


def test_the_measure_of_scratch_sees_what_is_allocated():
    assert peak(lambda: torch.zeros(1000).add(1).sum()) >= 8000


@pytest.mark.parametrize(
    ("L", "d"), [(1, 64), (1, 71), (3, 64), (7, 24), (8, 16), (9, 16), (15, 16), (17, 16), (24, 16)]
)
def test_scratch_of_apply_is_an_eighth_of_R_on_a_cpu(L, d):
    R, M, eta = torch.randn(L, d, d), torch.randn(L, d, d), torch.tensor(0.1)
    ops.apply_(R, M, eta)
    assert 0 < peak(lambda: ops.apply_(R, M, eta)) <= R.nbytes / 8 + 16  # 16: the rate itself


def test_updates_from_few_rows_form_no_square_matrix():
    R, z, eta = torch.randn(2, 128, 128), torch.randn(2, 4, 128), torch.tensor(0.1)
    ops.update_(R, z, eta)
    assert 0 < peak(lambda: ops.update_(R, z, eta)) < R[0].nbytes / 2


@pytest.mark.gpu
@pytest.mark.parametrize("M_dtype", [torch.float32, torch.bfloat16])
def test_apply_in_a_cuda_graph(M_dtype):
    R, M = matrix(24, 256, 256), tensor(24, 256, 256).to(M_dtype)
    eta = torch.tensor(0.01, device=DEVICE)
    expected = ops.apply_(R.clone(), M, eta)
    work = R.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.apply_(work, M, eta)
    work.copy_(R)
    graph.replay()
    close(work, expected)
    eta.fill_(0.02)
    work.copy_(R)
    graph.replay()
    close(work, ops.apply_(R.clone(), M, 0.02))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("n", [4, 20])
def test_half_samples_are_summed_in_fp32(n, dtype):
    z = torch.full((1, n, 6), 300.0, dtype=dtype, device=DEVICE)
    M, _, _ = ops.correlation(z)
    R = ops.update_(torch.eye(6, device=DEVICE)[None].clone(), z, 1e-6)
    close(R, torch.eye(6, device=DEVICE)[None] - 1e-6 * M)
