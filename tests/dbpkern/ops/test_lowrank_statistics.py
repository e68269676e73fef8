"""`lowrank_statistics` against fp64: PyTorch's products, the Triton kernels, the extension's conditions."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dbpkern import extension, ops, reference
from dbpkern.ops import _dispatch, _triton
from dbpkern.ops._common import IMPLEMENTATIONS
from dbpkern.ops._dispatch import Tiles

module = sys.modules["dbpkern.ops.lowrank_statistics"]

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("poisoned")]

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALVES = [torch.bfloat16, torch.float16]
# (L, n, d, r): more, fewer and as many rows as ranks, one and none of each, primes, r = d.
SHAPES = [
    (1, 1, 1, 1),
    (2, 0, 3, 2),
    (1, 1, 7, 3),
    (3, 5, 13, 5),
    (2, 13, 5, 5),
    (5, 2, 17, 11),
    (1, 40, 37, 19),
    (0, 4, 3, 2),
]


def inputs(L, n, d, r, dtype=torch.float64):
    """Rows whose features are correlated, and orthonormal Q."""
    x = torch.randn(L, n, d) @ (torch.eye(d) + 0.3 * torch.randn(L, d, d))
    Q = torch.linalg.qr(torch.randn(L, d, r, dtype=torch.float64)).Q.contiguous()
    return x.to(DEVICE, dtype), Q.to(DEVICE, torch.promote_types(dtype, torch.float32))


def as_good(actual, exact, peer):
    """The error is at most twice that of PyTorch with the same dtypes, and 4 units in the last place."""
    assert actual.shape == exact.shape
    if exact.numel():
        error, other = ((t.double() - exact).abs().max() for t in (actual, peer))
        allowed = 2 * other + 4 * torch.finfo(actual.dtype).eps * exact.abs().max()
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"  # false for NaN


def rounded_statistics(x, Q):
    """B, Y and c with the roundings of 16-bit rows, and no other: those of Q and of P."""
    dtype, x = x.dtype, x.double()
    P = x @ Q.to(dtype).double()
    # fp16 has no range for P, which TF32 then holds: about as many digits.
    P = P.bfloat16().double() if dtype == torch.bfloat16 else P.half().double()
    n = max(x.shape[1], 1)
    return P.mT @ P / n, x.mT @ P / n, x.square().sum(1) / n


@pytest.mark.parametrize(("L", "n", "d", "r"), SHAPES)
def test_values(L, n, d, r):
    x, Q = inputs(L, n, d, r)
    found = ops.lowrank_statistics(x, Q)
    for actual, expected in zip(found, reference.lowrank_statistics(x, Q), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parts", [(3, 4), (1, 0, 8), (5,)])
def test_statistics_of_parts_combine_by_their_rows(parts):
    x, Q = inputs(2, sum(parts), 6, 3)
    found = [ops.lowrank_statistics(part, Q) for part in x.split(list(parts), 1)]
    for i, expected in enumerate(ops.lowrank_statistics(x, Q)):
        combined = sum(n * part[i] for n, part in zip(parts, found, strict=True)) / sum(parts)
        torch.testing.assert_close(combined, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("L", "n", "d", "r"), SHAPES)
def test_eager_keeps_what_the_rows_hold(L, n, d, r, dtype):
    x, Q = inputs(L, n, d, r, dtype)
    exact = reference.lowrank_statistics(x.double(), Q.double())
    peer = reference.lowrank_statistics(x.float(), Q)
    if GPU and dtype == torch.bfloat16:
        peer = rounded_statistics(x, Q)
    for parts in zip(ops.lowrank_statistics(x, Q, backend="eager"), exact, peer, strict=True):
        as_good(*parts)


def test_the_wider_dtype_of_rows_and_Q_is_that_of_the_statistics():
    x, Q = inputs(1, 9, 6, 2)
    for one, other in ((x.float(), Q), (x, Q.float()), (x, Q)):
        assert all(part.dtype == torch.float64 for part in ops.lowrank_statistics(one, other))
    assert all(part.dtype == torch.float32 for part in ops.lowrank_statistics(x.half(), Q.float()))


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_half_rows_that_overflow_their_own_dtype(backend):
    x = torch.full((1, 20, 16), 3e4, dtype=torch.float16, device=DEVICE)
    Q = torch.full((1, 16, 8), 0.25, device=DEVICE)
    B, Y, c = ops.lowrank_statistics(x, Q, backend=backend)
    torch.testing.assert_close(B, torch.full_like(B, 16 * 9e8), rtol=1e-2, atol=0)
    torch.testing.assert_close(Y, torch.full_like(Y, 4 * 9e8), rtol=1e-2, atol=0)
    torch.testing.assert_close(c, torch.full_like(c, 9e8), rtol=1e-3, atol=0)


# The Triton kernels serve widths that are multiples of 16, and ranks of 8. (L, n, d, r):
TRITON_SHAPES = [(2, 0, 16, 8), (1, 1, 16, 16), (3, 5, 32, 8), (1, 40, 48, 24), (0, 4, 16, 8)]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that small matrices have several."""
    monkeypatch.setattr(_dispatch, "tiles", lambda *_: Tiles(16, 16, 16, 4, 2))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("L", "n", "d", "r"), TRITON_SHAPES)
def test_triton(small_tiles, L, n, d, r, dtype):
    x, Q = inputs(L, n, d, r, dtype)
    exact = reference.lowrank_statistics(x.double(), Q.double())
    peer = reference.lowrank_statistics(x, Q) if dtype == torch.float32 else rounded_statistics(x, Q)
    found, again = (ops.lowrank_statistics(x, Q, backend="triton") for _ in range(2))
    for actual, *others, repeated in zip(found, exact, peer, again, strict=True):
        assert actual.dtype == torch.float32
        assert actual.is_contiguous()
        assert torch.equal(actual, repeated)
        as_good(actual, *others)


def test_triton_with_views(small_tiles):
    """Rows without a copy where layers and rows are apart; otherwise with one."""
    x, Q = inputs(4, 21, 2 * 16, 8, torch.bfloat16)
    Q = Q[1::2, ::2].mT.contiguous().mT
    for view in (x.transpose(0, 1)[::2].transpose(0, 1)[1::2, :, :16], x[1::2, :, ::2]):
        exact = reference.lowrank_statistics(view.double(), Q.double())
        found = ops.lowrank_statistics(view, Q, backend="triton")
        for parts in zip(found, exact, rounded_statistics(view, Q), strict=True):
            as_good(*parts)


def test_broken_rows_of_a_layer_harm_no_other(small_tiles):
    x, Q = inputs(3, 20, 16, 8, torch.bfloat16)
    expected = ops.lowrank_statistics(x, Q, backend="triton")
    x[1, 3, 5] = float("nan")
    for actual, wanted in zip(ops.lowrank_statistics(x, Q, backend="triton"), expected, strict=True):
        assert torch.equal(actual[0::2], wanted[0::2])
        assert actual[1].isnan().any()


def test_two_launches():
    d, r = 768, 64
    x, Q = torch.empty(3, 40, d, dtype=torch.bfloat16, device="meta"), torch.empty(3, d, r, device="meta")
    with _triton.recording() as launches:
        module.triton_statistics(x, Q)
    assert [launch.kernel.__name__ for launch in launches] == ["project_kernel", "moments_kernel"]


@pytest.mark.parametrize(("dtype", "launched"), [(torch.bfloat16, 2), (torch.float16, 2), (torch.float32, 0)])
def test_triton_serves_16_bit_rows_on_a_gpu(dtype, launched, monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    monkeypatch.setattr(extension, "load", lambda: pytest.fail("nobody asked for the extension"))
    with FakeTensorMode(), _dispatch.assume((9, 0)), _triton.recording() as launches:
        x, Q = torch.empty(3, 40, 32, dtype=dtype, device="cuda"), torch.empty(3, 32, 8, device="cuda")
        found = IMPLEMENTATIONS["lowrank_statistics"](x, Q, "")
    assert len(launches) == launched
    assert [tuple(part.shape) for part in found] == [(3, 8, 8), (3, 32, 8), (3, 32)]


# The extension, which lives on a GPU.


def on_a_gpu(x, Q):
    """Rows and Q as far as the choice of a backend looks at them, with the device that is asked for."""
    return tuple(SimpleNamespace(device=torch.device("cuda"), dtype=t.dtype, shape=t.shape) for t in (x, Q))


FITS = [
    (64, 8, torch.float32, None),
    (300, 256, torch.bfloat16, None),
    (64, 7, torch.float32, "ranks from 8 to 256 and at most d = 64, got 7"),
    (300, 257, torch.float32, "got 257"),
    (8, 9, torch.float32, "at most d = 8, got 9"),
    (64, 8, torch.float16, "float32 and bfloat16 rows with float32 Q, got torch.float16 and torch.float32"),
]


@pytest.mark.parametrize(("d", "r", "rows", "match"), FITS)
def test_what_the_extension_is_asked_for(d, r, rows, match, monkeypatch):
    monkeypatch.setattr(extension, "load", lambda: object())
    with _dispatch.assume((8, 0)):
        refusal = module._cuda_refusal(*on_a_gpu(torch.empty(1, 3, d, dtype=rows), torch.empty(1, d, r)))
    assert refusal is None if match is None else match in refusal


def test_without_the_extension_its_reason_is_given(monkeypatch):
    monkeypatch.setattr(extension, "load", lambda: None)
    monkeypatch.setattr(extension, "why", lambda: "nvcc is missing")
    rows = on_a_gpu(torch.empty(1, 3, 64), torch.empty(1, 64, 8))
    with _dispatch.assume((9, 0)):
        assert module._cuda_refusal(*rows) == "nvcc is missing"
    with _dispatch.assume((7, 5)):
        assert "8.0 or newer" in module._cuda_refusal(*rows)


@pytest.mark.gpu
def test_precision_of_the_extension():
    for dtype in (torch.float32, torch.bfloat16):
        x, Q = inputs(3, 300, 65, 17, dtype)
        exact = reference.lowrank_statistics(x.double(), Q.double())
        peer = rounded_statistics(x, Q) if dtype == torch.bfloat16 else reference.lowrank_statistics(x, Q)
        for parts in zip(ops.lowrank_statistics(x, Q, backend="cuda"), exact, peer, strict=True):
            as_good(*parts)


def test_bfloat16_rows_multiplied_as_they_are(monkeypatch):
    def product(a, b):
        assert {a.dtype, b.dtype} == {torch.bfloat16}
        return torch.bmm(a.float(), b.float())

    monkeypatch.setattr(module, "multiplies_bfloat16", lambda *_: True)
    monkeypatch.setattr(module, "product", product)
    x, Q = (t.cpu() for t in inputs(2, 40, 37, 19, torch.bfloat16))
    exact = reference.lowrank_statistics(x.double(), Q.double())
    found = ops.lowrank_statistics(x, Q, backend="eager")
    for parts in zip(found, exact, rounded_statistics(x, Q), strict=True):
        as_good(*parts)


# Registration, costs, refusals.


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("n", [0, 3])
def test_opcheck(n):
    x, Q = inputs(2, n, 16, 8, torch.bfloat16)
    for backend in ("", "triton"):
        torch.library.opcheck(torch.ops.dbpkern.lowrank_statistics.default, (x, Q, backend))


def test_flops_are_counted():
    x, Q = inputs(2, 9, 5, 2)
    with FlopCounterMode(display=False) as counter:
        ops.lowrank_statistics(x, Q)
    assert counter.get_total_flops() == 2 * 9 * (2 * 5 * 2 + 4) * 2


REFUSALS = [
    (lambda x, Q: (x[0], Q), {}, ValueError, r"x: expected shape \[L, n, d\], got \[9, 5\]"),
    (lambda x, Q: (x, Q[0]), {}, ValueError, r"Q: expected shape \[L, d, r\], got \[5, 3\]"),
    (lambda x, Q: (x, Q[:1]), {}, ValueError, r"L = 2 and d = 5, got \[1, 5, 3\]"),
    (lambda x, Q: (x, Q[:, :4]), {}, ValueError, r"L = 2 and d = 5, got \[2, 4, 3\]"),
    (lambda x, Q: (x, Q.half()), {}, TypeError, "Q: expected float32 or float64"),
    (lambda x, Q: (x, Q.to("meta")), {}, ValueError, "one device, got x on .*, Q on meta"),
    (lambda x, Q: (x, Q), {"backend": "cublas"}, ValueError, "backend: expected None or one of"),
    (
        lambda x, Q: inputs(1, 2, 16, 8),
        {"backend": "triton"},
        ValueError,
        "it does not serve float64",
    ),
    (lambda x, Q: (x, Q), {"backend": "triton"}, ValueError, "widths that are multiples of 16, got 5"),
    *(
        (
            lambda x, Q, r=r: (torch.empty(1, 2, 160, device=DEVICE), torch.empty(1, 160, r, device=DEVICE)),
            {"backend": "triton"},
            ValueError,
            f"ranks that are multiples of 8 up to 128, got {r}",
        )
        for r in (0, 12, 136)
    ),
    (lambda x, Q: (x.cpu(), Q.cpu()), {"backend": "cuda"}, ValueError, "it needs a CUDA device, got cpu"),
]


@pytest.mark.parametrize(("change", "options", "error", "match"), REFUSALS)
def test_refusals_say_why(change, options, error, match):
    with pytest.raises(error, match=match):
        ops.lowrank_statistics(*change(*inputs(2, 9, 5, 3, torch.float32)), **options)
