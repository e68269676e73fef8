"""What every op of `dbpkern.ops` keeps: registration, autocast, compilation, costs, backends and refusals."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from checks import DEVICE, HALVES, computes_on_fakes, launches, matrix, tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dbpkern import ops
from dbpkern.ops import _dispatch, _triton
from dbpkern.ops._common import IMPLEMENTATIONS
from dbpkern.ops._dispatch import Operands, Tiles

pytestmark = [
    # The exception is opcheck's own.
    pytest.mark.filterwarnings("error", "default:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.usefixtures("poisoned", "small_tiles"),
]


def eta():
    return torch.tensor(0.1, dtype=torch.float64)


def index(*numbers):
    return torch.tensor(numbers, device=DEVICE)


# Arguments of the registered operators, but for the backend, which comes last. `g` asks for a gradient.
OPERATORS = {
    "transform": lambda g: (tensor(6, 5).requires_grad_(g), matrix(5, 5)),
    "transform stacked": lambda g: (tensor(2, 3, 5).mT.contiguous().mT.requires_grad_(g), matrix(2, 5, 5).mT),
    "transform bfloat16": lambda g: (tensor(2, 3, 5, dtype=torch.bfloat16).requires_grad_(g), matrix(5, 5)),
    "fold": lambda g: (tensor(3, 5).requires_grad_(g), matrix(5, 5), torch.bfloat16),
    "fold stacked": lambda g: (tensor(2, 3, 5).requires_grad_(g), matrix(2, 5, 5).mT, torch.float32),
    "correlation": lambda g: (tensor(2, 6, 5), 0.3, True, torch.float32),
    "correlation 16 bits": lambda g: (
        tensor(2, 6, 5, dtype=torch.bfloat16), 0.0, False, torch.bfloat16
    ),
    "correlation no rows": lambda g: (tensor(2, 0, 5, dtype=torch.bfloat16), 0.0, False, torch.float32),
    "choose_rates_": lambda g: (
        tensor(3).square(), tensor(3), tensor(3, 5).square(), tensor(3).square(), eta(), 0.5
    ),
    "choose_rates_ no limit": lambda g: (tensor(3), tensor(3), tensor(3, 5), None, eta(), 0.0),
    "apply_": lambda g: (matrix(2, 5, 5), tensor(2, 5, 5), eta()),
    "apply_ many layers": lambda g: (matrix(9, 2, 2).mT, tensor(9, 2, 2), torch.rand(9, device=DEVICE)),
    "update_ few rows": lambda g: (matrix(2, 5, 5), tensor(2, 3, 5), eta(), 0.3),
    "update_ many rows": lambda g: (matrix(2, 5, 5), tensor(2, 7, 5), eta(), 0.3),
    "fused_step": lambda g: (tensor(6, 5).requires_grad_(g), matrix(5, 5), index(4, 0), eta(), 0.3),
    "fused_step bfloat16": lambda g: (
        tensor(6, 5, dtype=torch.bfloat16), matrix(5, 5), index(4), eta(), 0.0
    ),
    "orthogonalize": lambda g: (tensor(2, 4, 6), 2, [3.4445, -4.7750, 2.0315], 1e-7),
    "orthogonalize tall": lambda g: (tensor(2, 6, 4), 2, [3.4445, -4.7750, 2.0315], 1e-7),
    "sample_rows_": lambda g: (tensor(3, 5, dtype=torch.bfloat16), tensor(2, 4, 5), index(7, 0, 3)),
    "sample_rows_ all": lambda g: (tensor(8, 5), tensor(2, 4, 5), None),
    "sample_patches_": lambda g: (
        tensor(3, 8), tensor(2, 2, 4, 4), index(7, 0, 3), [2, 2], [2, 2], [0, 0, 0, 0], [1, 1]
    ),
}  # fmt: skip
# Ops on many matrices of any shapes, and those of low rank: their own files test the same.
ELSEWHERE = {
    "adamw_",
    "map_",
    "remember",
    "lowrank_fold",
    "lowrank_statistics",
    "lowrank_step_",
    "lowrank_transform",
}


def operator(case):
    return getattr(torch.ops.dbpkern, case.split()[0]).default


# Those of them that a kernel of Triton serves: they are told the backend.
SERVED = [case for case in OPERATORS if "backend" in (a.name for a in operator(case)._schema.arguments)]
CASES = [
    *(
        (case, backend, True)
        for case in OPERATORS
        for backend in ["", *(["triton"] if case in SERVED else [])]
    ),
    *((case, "", False) for case in OPERATORS),
]


def arguments(case, backend, grad=False):
    return (*OPERATORS[case](grad), *((backend,) if case in SERVED else ()))


def test_every_op_is_in_every_table():
    """A new op that is left out of one would not be tested by it."""
    assert {case.split()[0] for case in OPERATORS} | ELSEWHERE == IMPLEMENTATIONS.keys()
    for table in (CALLS, BY_NAME | EAGER, OPERATORS):
        assert {case.split()[0] for case in table} == IMPLEMENTATIONS.keys() - ELSEWHERE
    assert {case.split()[0] for case in SERVED} == BY_NAME.keys()


@pytest.mark.parametrize(("case", "backend", "grad"), CASES)
def test_opcheck(case, backend, grad):
    torch.library.opcheck(operator(case), arguments(case, backend, grad))


@computes_on_fakes
@pytest.mark.parametrize("case", OPERATORS)
def test_every_op_runs_on_fake_tensors_of_a_gpu(case, monkeypatch):
    """For counting launches: no value is read, no memory asked for."""
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    given = [a.bfloat16() if torch.is_tensor(a) and a.dim() > 1 else a for a in arguments(case, "")]
    name = case.split()[0]
    if name in ("apply_", "update_"):
        given[0] = given[0].float()
    if name == "choose_rates_":
        given[2] = given[2].float()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _dispatch.assume((9, 0)):
        with torch.device("cuda"):
            fake = [
                torch.empty_strided(a.shape, a.stride(), dtype=a.dtype)
                if torch.is_tensor(a) and a.dim()
                else a
                for a in given
            ]
        assert mode is not None
        with _triton.recording() as recorded:
            IMPLEMENTATIONS[name](*fake)
    wanted = case in SERVED and "no rows" not in case
    assert bool(recorded) == wanted, "an op with a kernel stands in AUTOMATIC of dbpkern/ops/_dispatch.py"


CALLS = {
    "transform": lambda x, R, M, z: ops.transform(x, R[0]),
    "transform stacked": lambda x, R, M, z: ops.transform(z, R),
    "fold": lambda x, R, M, z: ops.fold(x, R[0]),
    "fold to bfloat16": lambda x, R, M, z: ops.fold(x, R[0], torch.bfloat16),
    "correlation": lambda x, R, M, z: ops.correlation(z, 0.3, True, torch.bfloat16),
    "choose_rates_": lambda x, R, M, z: ops.choose_rates_(M[0, 0], M[0, 1], x[:6], M[0, 2] ** 2, 0.1, 0.5),
    "apply_": lambda x, R, M, z: ops.apply_(R, M, 0.1),
    "apply_ tensor eta": lambda x, R, M, z: ops.apply_(R, M, M.new_full((len(M),), 0.1)),
    "update_ many rows": lambda x, R, M, z: ops.update_(R, z, 0.1, 0.3),
    "update_ few rows": lambda x, R, M, z: ops.update_(R, z[:, :3], 0.1),
    "fused_step": lambda x, R, M, z: ops.fused_step(x, R[0], torch.arange(4, device=DEVICE), 0.1, 0.3),
    "orthogonalize": lambda x, R, M, z: ops.orthogonalize(z),
    "sample_rows_": lambda x, R, M, z: ops.sample_rows_(x, z, torch.arange(10, device=DEVICE)),
    "sample_patches_": lambda x, R, M, z: ops.sample_patches_(x, z, torch.arange(10, device=DEVICE), (2, 1)),
}


def inputs():
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (10, 6), "R": (3, 6, 6), "M": (3, 6, 6), "z": (3, 8, 6)}
    return {name: torch.randn(shape, generator=generator).to(DEVICE) for name, shape in shapes.items()}


def equal(one, other):
    pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", CALLS)
def test_autocast_changes_nothing(case, dtype):
    plain = CALLS[case](**inputs())
    with torch.autocast(DEVICE.type, dtype):
        assert equal(CALLS[case](**inputs()), plain)


@pytest.mark.parametrize("op", [ops.transform, ops.fold])
def test_autocast_changes_no_gradient(op):
    x, R = tensor(5, 4).requires_grad_(), matrix(4, 4)
    (plain,) = torch.autograd.grad(op(x, R).square().sum(), x)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = op(x, R)
        assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], plain)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("case", CALLS)
def test_compiles_to_one_graph(case, backend, monkeypatch):
    monkeypatch.setenv("DBPKERN_BACKEND", backend)
    compiled = torch.compile(CALLS[case], fullgraph=True, backend="aot_eager")
    given, again = inputs(), inputs()
    assert equal(compiled(**given), CALLS[case](**again))
    for name in given:
        assert torch.equal(given[name], again[name])


def test_eta_may_change_from_call_to_call_of_a_compiled_step():
    compiled = torch.compile(ops.apply_, fullgraph=True, backend="aot_eager")
    for eta in (0.1, 0.2, 0.3, torch.tensor(0.4)):
        R, M = matrix(2, 5, 5), tensor(2, 5, 5)
        torch.testing.assert_close(compiled(R.clone(), M, eta), R - eta * M @ R)


def test_gradients_through_compiled_ops():
    def loss(x, W, R):
        z, _, _ = ops.fused_step(x, R, torch.arange(3, device=DEVICE), 0.1)
        return (ops.transform(z, R) @ ops.fold(W, R).mT).square().sum()

    x, W, R = tensor(7, 4).requires_grad_(), tensor(3, 4).requires_grad_(), matrix(4, 4)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        torch.autograd.grad(compiled(x, W, R), (x, W)),
        torch.autograd.grad(loss(x, W, R), (x, W)),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


def test_R_gets_no_gradient():
    x, R = tensor(5, 4).requires_grad_(), matrix(4, 4).requires_grad_()
    for op in (ops.transform, ops.fold, lambda x, R: ops.fused_step(x, R, index(0, 1), 0.1)[0]):
        assert torch.autograd.grad(op(x, R).sum(), (x, R), allow_unused=True)[1] is None


FLOPS = {
    "transform": (lambda: ops.transform(tensor(2, 3, 5), matrix(5, 5)), 2 * 6 * 25),
    "transform one row": (lambda: ops.transform(tensor(5), matrix(5, 5)), 2 * 25),
    "transform stacked": (lambda: ops.transform(tensor(2, 3, 5), matrix(2, 5, 5)), 2 * 6 * 25),
    "fold": (lambda: ops.fold(tensor(3, 5), matrix(5, 5)), 2 * 3 * 25),
    "fold stacked": (lambda: ops.fold(tensor(2, 3, 5), matrix(2, 5, 5)), 2 * 6 * 25),
    "correlation": (lambda: ops.correlation(tensor(2, 3, 5)), 2 * 6 * 25),
    "apply_": (lambda: ops.apply_(matrix(2, 5, 5), tensor(2, 5, 5), 0.1), 2 * 2 * 125),
    "update_ few rows": (lambda: ops.update_(matrix(2, 5, 5), tensor(2, 3, 5), 0.1), 2 * 4 * 3 * 25),
    "update_ many rows": (
        lambda: ops.update_(matrix(2, 5, 5), tensor(2, 9, 5), 0.1),
        2 * (2 * 9 * 25 + 2 * 125),
    ),
    "fused_step few rows": (
        lambda: ops.fused_step(tensor(7, 5), matrix(5, 5), index(0, 1, 2), 0.1),
        2 * 7 * 25 + 4 * 3 * 25,
    ),
    "fused_step many rows": (
        lambda: ops.fused_step(tensor(7, 5), matrix(5, 5), index(0, 1, 2, 3, 4, 5), 0.1),
        2 * 7 * 25 + 2 * 6 * 25 + 2 * 125,
    ),
    "orthogonalize": (lambda: ops.orthogonalize(tensor(2, 5, 3), 4), 4 * 2 * (4 * 9 * 5 + 2 * 27)),
    "orthogonalize in words": (
        lambda: ops.orthogonalize(tensor(2, 3, 5), steps=4), 4 * 2 * (4 * 9 * 5 + 2 * 27)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FLOPS)
def test_flops_are_counted(case):
    call, expected = FLOPS[case]
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == expected


def test_flops_of_the_backward_are_counted():
    x, W, R = tensor(7, 5).requires_grad_(), tensor(3, 5).requires_grad_(), matrix(5, 5)
    with FlopCounterMode(display=False) as counter:
        (ops.transform(x, R).sum() + ops.fold(W, R).sum()).backward()
    assert counter.get_total_flops() == 2 * (2 * 7 * 25 + 2 * 3 * 25)


# ---- the choice of backend

BY_NAME = {
    "transform": lambda **k: ops.transform(tensor(6, 4), matrix(4, 4), **k),
    "fold": lambda **k: ops.fold(tensor(6, 4), matrix(4, 4), **k),
    "correlation": lambda **k: ops.correlation(tensor(1, 6, 4), **k),
    "choose_rates_": lambda **k: ops.choose_rates_(tensor(2), tensor(2), tensor(2, 4), None, 0.1, **k),
    "fused_step": lambda **k: ops.fused_step(tensor(6, 4), matrix(4, 4), index(0, 1), 0.1, **k),
    "orthogonalize": lambda **k: ops.orthogonalize(tensor(1, 6, 4), **k),
    "sample_rows_": lambda **k: ops.sample_rows_(tensor(2, 4), tensor(6, 4), index(0, 1), **k),
    "sample_patches_": lambda **k: ops.sample_patches_(tensor(9, 4), tensor(1, 4, 4), None, (2, 2), **k),
}
EAGER = {
    "apply_": lambda **k: ops.apply_(matrix(1, 4, 4), tensor(1, 4, 4), 0.1, **k),
    "update_": lambda **k: ops.update_(matrix(1, 4, 4), tensor(1, 6, 4), 0.1, **k),
}


@pytest.mark.parametrize("op", BY_NAME)
def test_backends_by_name(op, monkeypatch):
    call = BY_NAME[op]
    assert launches(lambda: call(backend="triton"))
    assert not launches(lambda: call(backend="eager"))
    assert not launches(call) or op not in ("transform", "fold", "correlation", "fused_step", "orthogonalize")
    monkeypatch.setenv("DBPKERN_BACKEND", "triton")
    assert launches(call)
    monkeypatch.setenv("DBPKERN_BACKEND", "cuda")  # no such backend for these ops: eager serves
    assert not launches(call)
    monkeypatch.setenv("DBPKERN_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"expected None or one of .*'eager'.* got 'fast'"):
        call()


@pytest.mark.parametrize("op", [*BY_NAME, *EAGER])
def test_backends_that_do_not_exist(op):
    call = (BY_NAME | EAGER)[op]
    with pytest.raises(ValueError, match=r"backend: expected None or one of .* got 'fast'"):
        call(backend="fast")
    there = "eager" if op in EAGER else "eager, triton"
    with pytest.raises(ValueError, match=f"{op}: no backend 'cuda'; there are {there}"):
        call(backend="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("op", [*BY_NAME, *EAGER])
def test_no_op_waits_for_the_device(op):
    call = (BY_NAME | EAGER)[op]
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.transform(tensor(2, 3, dtype=torch.float64), matrix(3, 3), backend="triton"),
        lambda: ops.correlation(tensor(1, 2, 3, dtype=torch.float64), backend="triton"),
        lambda: ops.orthogonalize(tensor(1, 2, 3, dtype=torch.float64), backend="triton"),
    ],
)
def test_what_triton_cannot_serve(call):
    with pytest.raises(ValueError, match=r"cannot serve this call: .*float64"):
        call()


def test_refusals_name_the_reason(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    assert "needs a CUDA device" in _dispatch.triton_refusal(cpu, torch.float32)
    monkeypatch.setattr(_triton, "INTERPRETED", True)
    assert _dispatch.triton_refusal(cpu, torch.float32) is None
    assert "CPU tensors alone" in _dispatch.triton_refusal(torch.device("cuda"), torch.float32)
    monkeypatch.setattr(_triton, "triton", None)
    assert "not installed" in _dispatch.triton_refusal(cpu, torch.float32)


def test_without_triton_the_eager_ops_serve():
    code = """
import sys
sys.modules["triton"] = None
import torch
from dbpkern import ops
R, z = torch.eye(3)[None].clone(), torch.randn(1, 9, 3)
ops.apply_(R, ops.correlation(z)[0], 0.1)
assert (R != torch.eye(3)).any()
try:
    ops.correlation(z, backend="triton")
except ValueError as error:
    assert "Triton is not installed" in str(error)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_operands():
    half, single = torch.bfloat16, torch.float32
    assert _dispatch.operands(half, single) == Operands(half, "ieee")
    assert _dispatch.operands(single, half).kind == "16bit"
    assert _dispatch.operands(single, out=half) == Operands(half, "ieee")
    assert _dispatch.operands(single, out=single).kind == "ieee"
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert _dispatch.operands(single).kind == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_the_automatic_choice():
    gpu = torch.device("cuda")
    assert _dispatch.preferred("correlation", gpu) == "triton"
    assert _dispatch.preferred("correlation", gpu, "tf32") == "eager"
    assert _dispatch.preferred("apply_", gpu) == "eager"
    assert _dispatch.preferred("correlation", torch.device("cpu")) == "eager"
    assert _dispatch.AUTOMATIC.keys() <= {*ops.__all__, "map_"}  # of both map_gradients_ and map_changes_


@pytest.mark.parametrize(("kernel", "kind"), _dispatch.TILES)
def test_the_table_of_tiles(kernel, kind):
    rows = _dispatch.TILES[kernel, kind]
    # Every width has a row; the low-rank statistics serve ranks that are multiples of 8.
    assert (0, 8 if kernel == "lowrank" else 1) in rows
    for tiles, size in itertools.product(rows.values(), "mnk"):
        assert getattr(tiles, size) in (16, 32, 64, 128)
    if kernel == "correlation":
        assert all(tiles.m == tiles.n for tiles in rows.values())


def test_tiles_are_those_of_the_most_demanding_row(monkeypatch):
    monkeypatch.undo()  # the tiles of the table
    one, two = Tiles(16, 16, 16, 4, 2), Tiles(32, 32, 16, 4, 2)
    rows = {(0, 1): one, (128, 1): one, (128, 16): two}
    monkeypatch.setitem(_dispatch.TILES, ("matmul", "ieee"), rows)
    for d, expected in ((1, one), (127, one), (128, two), (129, one), (4096, two)):
        assert _dispatch.tiles("matmul", "ieee", d) is expected


# ---- refusals

NAN, INF = float("nan"), float("inf")
INDEX = torch.arange(2)


def rates(caution=None, rates=None, a=None, bound=None):
    return (
        torch.ones(2) if caution is None else caution,
        torch.ones(2) if rates is None else rates,
        torch.ones(2, 3) if a is None else a,
        bound,
    )


REFUSALS = [
    (lambda R: ops.transform([1.0], R), TypeError, "x: expected a tensor .* got list"),
    (
        lambda R: ops.transform(torch.ones(3, 4, dtype=torch.int64), R),
        TypeError,
        "x: expected .* torch.int64",
    ),
    (
        lambda R: ops.transform(torch.ones(3, 5), R[0]),
        ValueError,
        r"R: expected shape .* d = 5, got \[4, 4\]",
    ),
    (lambda R: ops.transform(torch.ones(3, 4), R), ValueError, r"x: expected shape \[\*, d\], got \[3, 4\]"),
    (lambda R: ops.transform(torch.ones(3, 3, 4), R), ValueError, "equal numbers of layers, got 3 and 2"),
    (lambda R: ops.transform(torch.ones(()), R[0]), ValueError, r"x: expected shape .* got \[\]"),
    (lambda R: ops.transform(torch.ones(3, 4), R[0, 0]), ValueError, r"R: expected shape .* got \[4\]"),
    (lambda R: ops.transform(torch.ones(3, 4), R[0, :3]), ValueError, r"R: expected shape .* got \[3, 4\]"),
    (lambda R: ops.transform(torch.ones(3, 4, device="meta"), R[0]), ValueError, "one device, got x on meta"),
    (lambda R: ops.fold(None, R), TypeError, "W: expected a tensor .* got NoneType"),
    (lambda R: ops.fold(torch.ones(3, 4), R), ValueError, r"R: expected shape .* got \[2, 4, 4\]"),
    (lambda R: ops.fold(torch.ones(2, 3, 4), R[0]), ValueError, r"R: expected shape .* got \[4, 4\]"),
    (lambda R: ops.fold(torch.ones(2, 3, 5), R), ValueError, "R: expected shape .* with d = 5"),
    (lambda R: ops.fold(torch.ones(1, 3, 4), R), ValueError, "equal numbers of layers, got 1 and 2"),
    (lambda R: ops.fold(torch.ones(4), R[0]), ValueError, r"W: expected shape .* got \[4\]"),
    (lambda R: ops.fold(torch.ones(3, 4), R[0], torch.int32), TypeError, "out_dtype: .* got torch.int32"),
    (lambda R: ops.fold(torch.ones(3, 4, dtype=torch.complex64), R[0]), TypeError, "W: .*complex64"),
    (lambda R: ops.fold(torch.ones(3, 4, device="meta"), R[0]), ValueError, "one device, got W on meta"),
    (lambda R: ops.correlation("z"), TypeError, "z: expected a tensor .* got str"),
    (lambda R: ops.correlation(R[0]), ValueError, r"z: expected shape \[L, n, d\], got \[4, 4\]"),
    (lambda R: ops.correlation(R.long()), TypeError, "z: expected float16, .* got torch.int64"),
    *(
        (lambda R, k=k: ops.correlation(R, k), ValueError, r"kappa: .* \[0, 1\], got")
        for k in (-0.1, 1.1, NAN)
    ),
    (lambda R: ops.correlation(R, dtype=torch.float16), TypeError, "dtype: .* got torch.float16"),
    (lambda R: ops.correlation(R, dtype=torch.float64), TypeError, "dtype: .* torch.float32 or .*bfloat16"),
    (lambda R: ops.choose_rates_(*rates(a=R), 0.1), ValueError, r"a: expected shape \[L, d\]"),
    (lambda R: ops.choose_rates_(*rates(caution=R[0, 0]), 0.1), ValueError, "caution: .* L = 2, got shape"),
    (lambda R: ops.choose_rates_(*rates(caution=R[:, 0, 0]), 0.1), ValueError, r"strides \[16\]"),
    (lambda R: ops.choose_rates_(*rates(rates=torch.ones(2, 1)), 0.1), ValueError, r"rates: .*\[2, 1\]"),
    (lambda R: ops.choose_rates_(*rates(bound=torch.ones(3)), 0.1, 0.5), ValueError, "bound: .* L = 2"),
    (lambda R: ops.choose_rates_(*rates(bound=torch.ones(2)), 0.1), ValueError, "both or neither"),
    (lambda R: ops.choose_rates_(*rates(), 0.1, 0.5), ValueError, "both or neither, got limit 0.5"),
    (
        lambda R: ops.choose_rates_(*rates(bound=torch.ones(2)), 0.1, NAN),
        ValueError,
        "limit: .* > 0, got nan",
    ),
    (lambda R: ops.choose_rates_(*rates(), -1.0), ValueError, "eta: expected a finite"),
    (lambda R: ops.choose_rates_(*rates(), torch.ones(2)), ValueError, r"eta: .* 0-d tensor, got \[2\]"),
    (lambda R: ops.choose_rates_(*rates(a=torch.ones(2, 3).double()), 0.1), TypeError, "equal dtypes"),
    (lambda R: ops.orthogonalize(R[0]), ValueError, r"X: expected shape \[L, o, d\], got \[4, 4\]"),
    (lambda R: ops.orthogonalize(R, -1), ValueError, "steps: expected at least 0, got -1"),
    (lambda R: ops.orthogonalize(R, 1, (1.0, 2.0)), ValueError, "coefficients: expected three"),
    (lambda R: ops.sample_rows_(R, R[0], None), ValueError, r"out: expected shape \[n_s, d\]"),
    (lambda R: ops.sample_rows_(R[0], R, None), ValueError, r"out: expected shape \[8, 4\], got \[4, 4\]"),
    (lambda R: ops.sample_rows_(R[0, :2], R, INDEX.int()), TypeError, "index: .* got torch.int32"),
    (lambda R: ops.sample_rows_(R[0, :2], R, INDEX[None]), ValueError, r"index: .* got shape \[1, 2\]"),
    (lambda R: ops.sample_rows_(R[0].mT[:2], R, INDEX), ValueError, r"features side by side, .* \[1, 4\]"),
    (lambda R: ops.sample_rows_(R[0], R.to("meta"), None), ValueError, "out: expected shape"),
    (lambda R: ops.sample_rows_(R[0, :2], R, INDEX.to("meta")), ValueError, "one device, .* index on meta"),
    (lambda R: ops.sample_patches_(R[0], R[0], None, (2, 2)), ValueError, r"x: .* got \[4, 4\]"),
    (lambda R: ops.sample_patches_(R[0], R, None, (5, 2)), ValueError, "kernel: .* fits .* got \\(5, 2"),
    (lambda R: ops.sample_patches_(R[0], R, None, (2,)), ValueError, "kernel: expected 2 numbers"),
    (lambda R: ops.sample_patches_(R[0], R, None, (2, 2), padding=(1, 1)), ValueError, "padding: expected 4"),
    (lambda R: ops.sample_patches_(R[0], R, None, (2, 2)), ValueError, r"out: expected shape \[9, 8\]"),
    (lambda R: ops.apply_(R[0], R[0], 0.1), ValueError, r"R: expected shape \[L, d, d\], got \[4, 4\]"),
    (lambda R: ops.apply_(R[:, :3], R[:, :3], 0.1), ValueError, "R: expected shape .* with d = 4"),
    (
        lambda R: ops.apply_(R, R[:1], 0.1),
        ValueError,
        r"M: expected the shape of R \[2, 4, 4\], got \[1, 4, 4\]",
    ),
    (lambda R: ops.apply_(R, R.half(), 0.1), TypeError, "equal dtypes, got R torch.float32, M torch.float16"),
    (
        lambda R: ops.apply_(R, R.double(), 0.1),
        TypeError,
        "equal dtypes, got R torch.float32, M torch.float64",
    ),
    (lambda R: ops.apply_(R.half(), R.half(), 0.1), TypeError, "R: expected float32 or float64"),
    (lambda R: ops.apply_(R, R.to("meta"), 0.1), ValueError, "one device, got R on cpu, M on meta"),
    *(
        (lambda R, e=e: ops.apply_(R, R.clone(), e), ValueError, "eta: expected a finite number >= 0, got")
        for e in (-1e-9, NAN, INF, -INF)
    ),
    (lambda R: ops.apply_(R, R.clone(), torch.ones(3)), ValueError, r"eta: .* L = 2, got \[3\]"),
    (lambda R: ops.apply_(R, R.clone(), torch.ones(2, 1)), ValueError, r"eta: .* got \[2, 1\]"),
    (lambda R: ops.apply_(R, R.clone(), torch.tensor(1)), TypeError, "eta: .* got torch.int64"),
    (
        lambda R: ops.apply_(R, R.clone(), torch.ones(2, device="meta")),
        ValueError,
        "eta: .* on cpu, .* got meta",
    ),
    (
        lambda R: ops.apply_(R, R.clone(), torch.ones((), device="meta")),
        ValueError,
        "0-d one on the CPU, got meta",
    ),
    (lambda R: ops.update_(R, R[:, :, :3], 0.1), ValueError, "R: expected shape .* with d = 3"),
    (lambda R: ops.update_(R, R[:1], 0.1), ValueError, "equal numbers of layers, got 2 and 1"),
    (lambda R: ops.update_(R, R[0], 0.1), ValueError, r"z: expected shape .* got \[4, 4\]"),
    (lambda R: ops.update_(R, R.int(), 0.1), TypeError, "z: expected float16, .* got torch.int32"),
    (lambda R: ops.update_(R.bfloat16(), R, 0.1), TypeError, "R: expected float32 or float64"),
    (lambda R: ops.update_(R, R.to("meta"), 0.1), ValueError, "one device, got R on cpu, z on meta"),
    *(
        (lambda R, e=e: ops.update_(R, R.clone(), e), ValueError, "eta: expected a finite")
        for e in (-1, NAN, INF)
    ),
    *(
        (lambda R, k=k: ops.update_(R, R.clone(), 0.1, k), ValueError, "kappa: expected")
        for k in (-1, 2, NAN)
    ),
    (lambda R: ops.update_(R, R.clone(), torch.ones(1)), ValueError, r"eta: .* got \[1\]"),
    (
        lambda R: ops.fused_step(R, R[0], INDEX, 0.1),
        ValueError,
        r"x: expected shape \[n, d\], got \[2, 4, 4\]",
    ),
    (
        lambda R: ops.fused_step(R[0], R, INDEX, 0.1),
        ValueError,
        r"R: expected shape \[d, d\], got \[2, 4, 4\]",
    ),
    (lambda R: ops.fused_step(R[0, :, :3], R[0], INDEX, 0.1), ValueError, "R: expected shape .* d = 3"),
    (lambda R: ops.fused_step(R[0], R[0].half(), INDEX, 0.1), TypeError, "R: expected float32 or float64"),
    (lambda R: ops.fused_step(R[0], R[0], [0], 0.1), TypeError, "index: expected an int64 .* got list"),
    (lambda R: ops.fused_step(R[0], R[0], INDEX.int(), 0.1), TypeError, "index: .* got torch.int32"),
    (lambda R: ops.fused_step(R[0], R[0], INDEX[None], 0.1), ValueError, r"index: .* got \[1, 2\]"),
    (
        lambda R: ops.fused_step(R[0], R[0], INDEX.to("meta"), 0.1),
        ValueError,
        "one device, got .* index on meta",
    ),
    (
        lambda R: ops.fused_step(R[0], R[0], torch.tensor([4]), 0.1),
        (IndexError, RuntimeError),
        "out of range",
    ),
    (
        lambda R: ops.fused_step(R[0], R[0], torch.tensor([-5]), 0.1),
        (IndexError, RuntimeError),
        "out of range",
    ),
    (lambda R: ops.fused_step(R[0], R[0], INDEX, NAN), ValueError, "eta: expected a finite number"),
    (lambda R: ops.fused_step(R[0], R[0], INDEX, torch.ones(2)), ValueError, r"eta: .* got \[2\]"),
    (lambda R: ops.fused_step(R[0], R[0], INDEX, 0.1, 1.5), ValueError, r"kappa: .* got 1.5"),
]


@pytest.mark.parametrize(("call", "error", "match"), REFUSALS, ids=[f"{m[:40]}" for _, _, m in REFUSALS])
def test_refusals_say_why_and_touch_nothing(call, error, match):
    R = torch.randn(2, 4, 4)
    before, version = R.clone(), R._version
    with pytest.raises(error, match=match):
        call(R)
    assert torch.equal(R, before)
    assert R._version == version
