"""Products with a low-rank R: `lowrank_transform` and `lowrank_fold` against their specification."""

import contextlib
import sys
import threading

import pytest
import torch
from checks import peak
from torch.utils.flop_counter import FlopCounterMode

from dbpkern import reference
from dbpkern.ops import _dispatch
from dbpkern.ops.lowrank_fold import ieee_products, lowrank_fold
from dbpkern.ops.lowrank_transform import lowrank_transform

pytestmark = [
    # The exception is opcheck's own.
    pytest.mark.filterwarnings("error", "default:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.usefixtures("poisoned"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = [torch.bfloat16, torch.float16]
# (L, n, d, r): more, fewer and as many rows as ranks, one and none of each, primes, r = d.
SHAPES = [
    (1, 1, 1, 1),
    (1, 5, 1, 1),
    (2, 0, 3, 2),
    (1, 1, 7, 1),
    (1, 1, 7, 3),
    (3, 5, 13, 5),
    (2, 13, 5, 5),
    (3, 8, 8, 2),
    (5, 2, 17, 11),
    (7, 17, 11, 3),
    (1, 40, 37, 19),
    (0, 4, 3, 2),
]


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def rand_factors(*lead, d, r, dtype=torch.float64, size=0.3):
    """Orthonormal Q and an S that is not symmetric."""
    Q = torch.linalg.qr(randn(*lead, d, r)).Q
    return Q.to(dtype), (size * randn(*lead, r, r)).to(dtype)


def exact(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def holds_precision(actual, expected, plain):
    """The error is at most twice that of PyTorch with the same dtypes, and 4 units in the last place."""
    assert actual.dtype == plain.dtype
    error, other = ((t.double() - expected).abs().max() for t in (actual, plain))
    assert error <= 2 * other + 4 * torch.finfo(actual.dtype).eps * expected.abs().max()  # false for NaN


def identical(one, other):
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    assert torch.equal(one, other)


# The ops in fp64.


@pytest.mark.parametrize(("L", "n", "d", "r"), SHAPES)
def test_transform_and_fold(L, n, d, r):
    x, (Q, S) = randn(L, n, d), rand_factors(L, d=d, r=r)
    exact(lowrank_transform(x, Q, S), reference.lowrank_transform(x, Q, S))
    exact(lowrank_fold(x, Q, S), reference.lowrank_fold(x, Q, S))
    for i in range(L):
        R = torch.eye(d) + torch.einsum("ia,ab,jb->ij", Q[i], S[i], Q[i])
        exact(lowrank_transform(x[i], Q[i], S[i]), torch.einsum("nj,ij->ni", x[i], R))
        exact(lowrank_fold(x[i], Q[i], S[i]), torch.einsum("oi,ij->oj", x[i], R))


@pytest.mark.parametrize("shape", [(7,), (5, 7), (0, 7), (2, 3, 7), (2, 0, 7), (2, 3, 4, 7), (3, 1)])
def test_transform_of_any_number_of_dimensions(shape):
    x, (Q, S) = randn(*shape), rand_factors(d=shape[-1], r=1)
    exact(lowrank_transform(x, Q, S), torch.einsum("...j,ij->...i", x, reference.lowrank_matrix(Q, S)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_without_S_the_input_comes_back_bit_for_bit(dtype):
    x, (Q, S) = randn(3, 5, 7).to(dtype), rand_factors(3, d=7, r=2, dtype=torch.float32)
    S.zero_()
    identical(lowrank_transform(x, Q, S), x)
    for out in (torch.float32, *HALVES):
        identical(lowrank_fold(x, Q, S, out), x.to(out))


# Precision of the eager implementation: plain PyTorch in fp32, rounded once.


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("L", "n", "d", "r"), [(1, 5, 1, 1), (3, 33, 17, 5), (2, 129, 64, 16)])
def test_precision(L, n, d, r, dtype):
    x, (Q, S) = randn(L, n, d).to(dtype), rand_factors(L, d=d, r=r, dtype=torch.float32)
    R, wide = reference.lowrank_matrix(Q.double(), S.double()), x.float()
    holds_precision(lowrank_transform(x, Q, S), x.double() @ R.mT, (wide + wide @ Q @ S.mT @ Q.mT).to(dtype))
    for out in (torch.float32, *HALVES):
        plain = (wide + wide @ Q @ S @ Q.mT).to(out)
        holds_precision(lowrank_fold(x, Q, S, out), x.double() @ R, plain)


def test_bfloat16_operands_of_a_gpu(monkeypatch):
    """What a GPU multiplies, where one of operands and result is bfloat16."""
    module = sys.modules["dbpkern.ops.lowrank_fold"]
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda _, *dtypes: torch.bfloat16 in dtypes)

    def product(a, b):
        assert {a.dtype, b.dtype} == {torch.bfloat16}
        return torch.bmm(a.float(), b.float())

    monkeypatch.setattr(module, "product", product)
    x, (Q, S) = randn(2, 33, 64), rand_factors(2, d=64, r=8, dtype=torch.float32)
    R, V = reference.lowrank_matrix(Q.double(), S.double()), Q @ S.mT
    for dtype, out in (
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16,) * 2,
    ):
        W = x.to(dtype)
        T = (W.bfloat16().float() @ Q.bfloat16().float()).bfloat16().float()
        peer = (W.float() + T @ V.bfloat16().float().mT).to(out)
        holds_precision(lowrank_fold(W, Q, S, out), W.double() @ R, peer)
    with torch.no_grad():
        identical(lowrank_fold(W, Q, torch.zeros_like(S), torch.float32), W.float())


def test_where_operands_are_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    serves, gpu = sys.modules["dbpkern.ops.lowrank_fold"].multiplies_bfloat16, torch.device("cuda")
    bf16, fp32 = torch.bfloat16, torch.float32
    with _dispatch.assume((8, 0)):
        assert serves(gpu, bf16, fp32, fp32)
        assert serves(gpu, fp32, fp32, bf16)
        assert not serves(torch.device("cpu"), bf16, fp32)
        assert not any(
            serves(gpu, *dtypes) for dtypes in ((fp32,), (bf16, torch.float64), (bf16, torch.half))
        )
    with _dispatch.assume((7, 5)):
        assert not serves(gpu, bf16, fp32)


# fp32 products keep their digits where PyTorch may use TF32 or bf16 for its own.

MATMUL = {"cuda": torch.backends.cuda.matmul, "cpu": torch.backends.mkldnn.matmul}
PERMISSIONS = {
    "none": lambda: None,
    "highest": lambda: torch.set_float32_matmul_precision("highest"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(MATMUL["cuda"], "allow_tf32", True),
    "these products": lambda: [setattr(setting, "fp32_precision", "tf32") for setting in MATMUL.values()],
    "everything": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


@pytest.fixture
def permit():
    """Lets a test give a permission, and takes it back."""
    settings = (torch.backends, *MATMUL.values())
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "none"  # another test may have left a word of its own
    yield lambda name: PERMISSIONS[name]()
    torch.set_float32_matmul_precision("highest")  # the older interface remembers its own word
    for setting, precision in zip(settings, before, strict=True):
        setting.fp32_precision = precision


@pytest.mark.parametrize("device", MATMUL)
@pytest.mark.parametrize("permission", PERMISSIONS)
def test_a_permission_is_suspended_and_comes_back(permission, device, permit):
    permit(permission)
    setting, other = MATMUL[device], MATMUL["cuda" if device == "cpu" else "cpu"]
    before = setting.fp32_precision, other.fp32_precision
    for error in (None, KeyError):
        with contextlib.suppress(KeyError), ieee_products(torch.device(device)):
            assert setting.fp32_precision in ("ieee", "none")
            assert other.fp32_precision == before[1]
            if error:
                raise error
        assert (setting.fp32_precision, other.fp32_precision) == before
    if permission not in ("these products", "everything"):
        # These raise where the two interfaces contradict each other.
        torch.get_float32_matmul_precision()
        assert MATMUL["cuda"].allow_tf32 == (permission in ("high", "medium", "allow_tf32"))


@pytest.mark.parametrize("device", MATMUL)
def test_a_permission_for_everything_can_still_be_taken_back(device, permit):
    permit("everything")
    with ieee_products(torch.device(device)):
        pass
    assert MATMUL[device].fp32_precision == "tf32"
    torch.backends.fp32_precision = "ieee"
    assert MATMUL[device].fp32_precision == "ieee"


def test_threads_do_not_take_the_suspended_permission_for_the_users(permit):
    permit("high")
    setting, entered = MATMUL["cuda"], threading.Event()

    def backward():
        with ieee_products(torch.device("cuda")):
            entered.set()

    thread = threading.Thread(target=backward)
    with ieee_products(torch.device("cuda")):
        thread.start()
        assert not entered.wait(0.05)
    thread.join()
    assert entered.is_set()
    assert setting.fp32_precision == "tf32"


LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "strided": lambda t: torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0],
    "layers last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
}


@pytest.mark.parametrize(("L", "n", "d", "r"), [(3, 15, 13, 5), (1, 6, 2, 2), (9, 10, 7, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, L, n, d, r):
    x, (Q, S) = randn(L, n, d), rand_factors(L, d=d, r=r)
    x_, Q_, S_ = map(LAYOUTS[layout], (x, Q, S))
    for op in (lowrank_transform, lowrank_fold):
        for i in (slice(None), 0):
            found = op(x_[i], Q_[i], S_[i])
            exact(found, getattr(reference, op.__name__)(x[i], Q[i], S[i]))
            assert found.is_contiguous()


# Autograd.


@pytest.mark.parametrize(
    ("shape", "stack"), [((6,), ()), ((5, 6), ()), ((2, 3, 6), ()), ((3, 4, 6), (3,)), ((0, 6), ())]
)
def test_gradients_of_transform(shape, stack):
    x, (Q, S) = randn(*shape).requires_grad_(), rand_factors(*stack, d=6, r=2)
    assert torch.autograd.gradcheck(lambda x: lowrank_transform(x, Q, S), x)
    assert torch.autograd.gradgradcheck(lambda x: lowrank_transform(x, Q, S), x)


@pytest.mark.parametrize("stack", [(), (3,)])
def test_gradients_of_fold(stack):
    W, (Q, S) = randn(*stack, 5, 4).requires_grad_(), rand_factors(*stack, d=4, r=3)
    assert torch.autograd.gradcheck(lambda W: lowrank_fold(W, Q, S), W)
    assert torch.autograd.gradgradcheck(lambda W: lowrank_fold(W, Q, S), W)


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_come_in_the_dtype_of_the_input(dtype):
    Q, S = rand_factors(d=4, r=2, dtype=torch.float32)
    x, W = randn(5, 4).to(dtype).requires_grad_(), randn(5, 4).float().requires_grad_()
    g, R = randn(5, 4).to(dtype), reference.lowrank_matrix(Q, S)
    (dx,) = torch.autograd.grad(lowrank_transform(x, Q, S), x, g)
    (dW,) = torch.autograd.grad(lowrank_fold(W, Q, S, dtype), W, g)
    holds_precision(dx, g.double() @ R.double(), (g.float() @ R).to(dtype))
    holds_precision(dW, g.double() @ R.double().mT, g.float() @ R.mT)


# Registration, autocast, compilation, costs.


OPCHECKS = {
    "lowrank_transform": lambda g: (randn(3, 5).requires_grad_(g), *rand_factors(d=5, r=2), ""),
    "lowrank_transform stacked": lambda g: (
        randn(2, 5, 3).mT.requires_grad_(g),
        *rand_factors(2, d=5, r=2),
        "eager",
    ),
    "lowrank_transform bfloat16": lambda g: (
        randn(2, 3, 5).bfloat16().requires_grad_(g),
        *rand_factors(d=5, r=2, dtype=torch.float32),
        "",
    ),
    "lowrank_fold": lambda g: (
        randn(3, 5).requires_grad_(g),
        *rand_factors(d=5, r=2),
        torch.float32,
        "",
    ),
    "lowrank_fold stacked": lambda g: (
        randn(2, 3, 5).requires_grad_(g),
        *rand_factors(2, d=5, r=5),
        torch.float64,
        "eager",
    ),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("case", OPCHECKS)
def test_opcheck(case, requires_grad):
    op = getattr(torch.ops.dbpkern, case.split()[0]).default
    torch.library.opcheck(op, OPCHECKS[case](requires_grad))


CALLS = {
    "transform": lambda Q, S, x: lowrank_transform(x[0], Q[0], S[0]),
    "transform stacked": lambda Q, S, x: lowrank_transform(x, Q, S),
    "fold": lambda Q, S, x: lowrank_fold(x[0], Q[0], S[0]),
    "fold to bfloat16": lambda Q, S, x: lowrank_fold(x, Q, S, torch.bfloat16),
}


def call_arguments():
    torch.manual_seed(1)
    Q, S = rand_factors(3, d=6, r=2, dtype=torch.float32)
    return Q, S, torch.randn(3, 7, 6)


@pytest.mark.parametrize("case", CALLS)
def test_autocast_changes_nothing(case):
    plain = CALLS[case](*call_arguments())
    with torch.autocast("cpu", torch.bfloat16):
        identical(CALLS[case](*call_arguments()), plain)


@pytest.mark.parametrize("case", CALLS)
def test_compiles_to_one_graph(case):
    compiled = torch.compile(CALLS[case], fullgraph=True, backend="aot_eager")
    identical(compiled(*call_arguments()), CALLS[case](*call_arguments()))


FLOPS = {
    "transform": (lambda Q, S, x: lowrank_transform(x, Q[0], S[0]), 2 * 9 * (2 * 5 * 2 + 4) * 2),
    "transform stacked": (lambda Q, S, x: lowrank_transform(x, Q, S), 2 * 9 * (2 * 5 * 2 + 4) * 2),
    "fold": (lambda Q, S, x: lowrank_fold(x[0], Q[0], S[0]), 9 * (2 * 5 * 2 + 4) * 2),
}


@pytest.mark.parametrize("case", FLOPS)
def test_flops_are_counted(case):
    call, expected = FLOPS[case]
    Q, S = rand_factors(2, d=5, r=2)
    with FlopCounterMode(display=False) as counter:
        call(Q, S, randn(2, 9, 5))
    assert counter.get_total_flops() == expected


def test_flops_of_the_backward_are_counted():
    x, W, (Q, S) = randn(7, 5).requires_grad_(), randn(3, 5).requires_grad_(), rand_factors(d=5, r=2)
    with FlopCounterMode(display=False) as counter:
        (lowrank_transform(x, Q, S).sum() + lowrank_fold(W, Q, S).sum()).backward()
    assert counter.get_total_flops() == 2 * (7 + 3) * (2 * 5 * 2 + 4) * 2


def test_no_square_matrix_is_formed():
    L, n, d, r = 2, 16, 512, 4
    (Q, S), x = rand_factors(L, d=d, r=r, dtype=torch.float32), torch.randn(L, n, d)
    assert peak(lambda: reference.lowrank_fold(x, Q, S)) > L * d * d * 4
    for call in (
        lambda: lowrank_transform(x, Q, S),
        lambda: lowrank_fold(x, Q, S),
    ):
        call()
        assert 0 < peak(call) < d * d * 4 / 2


# Refusals of the ops.

REFUSALS = [
    (lambda Q, S, x: lowrank_transform([1.0], Q, S), TypeError, "x: expected a tensor .* got list"),
    (lambda Q, S, x: lowrank_transform(x.int(), Q, S), TypeError, "x: expected .* torch.int32"),
    (lambda Q, S, x: lowrank_transform(x[0], Q, S), ValueError, r"x: expected shape \[L, n, d\], got \[9, 5"),
    (lambda Q, S, x: lowrank_transform(x[..., :4], Q, S), ValueError, r"Q: .* with d = 4, got \[2, 5, 3\]"),
    (lambda Q, S, x: lowrank_transform(x, Q, S[:, :2]), ValueError, r"S: .* with r = 3, got \[2, 2, 3\]"),
    (lambda Q, S, x: lowrank_transform(x, Q, S[0]), ValueError, r"S: expected shape \[L, r, r\], got \[3, 3"),
    (lambda Q, S, x: lowrank_transform(x, Q[:1], S), ValueError, "Q: expected 2 layers, got 1"),
    (lambda Q, S, x: lowrank_transform(x, Q, S[:1]), ValueError, "S: expected 2 layers, got 1"),
    (lambda Q, S, x: lowrank_transform(x, Q, S.double()), TypeError, "equal dtypes, got Q torch.float32, S"),
    (lambda Q, S, x: lowrank_transform(x.to("meta"), Q, S), ValueError, "one device, got x on meta"),
    (lambda Q, S, x: lowrank_transform(x, Q, S, backend="cublas"), ValueError, "backend: expected None or"),
    (
        lambda Q, S, x: lowrank_transform(x, Q, S, backend="cuda"),
        ValueError,
        "no backend 'cuda'; there are eager",
    ),
    (
        lambda Q, S, x: lowrank_fold(x, Q, S, backend="triton"),
        ValueError,
        "lowrank_fold: no backend 'triton'",
    ),
    (lambda Q, S, x: lowrank_fold(None, Q, S), TypeError, "W: expected a tensor .* got NoneType"),
    (lambda Q, S, x: lowrank_fold(x[0, 0], Q, S), ValueError, r"W: expected shape .* got \[5\]"),
    (lambda Q, S, x: lowrank_fold(x[0], Q, S[0]), ValueError, r"Q: expected shape \[d, r\], got \[2, 5, 3\]"),
    (lambda Q, S, x: lowrank_fold(x, Q, S, torch.int8), TypeError, "out_dtype: .* got torch.int8"),
    (lambda Q, S, x: lowrank_fold(x, Q, S.to("meta")), ValueError, "one device, got .* S on meta"),
    (lambda Q, S, x: lowrank_fold(x, Q, S, backend="fast"), ValueError, "backend: .* got 'fast'"),
]


@pytest.mark.parametrize(("call", "error", "match"), REFUSALS, ids=[f"{m[:40]}" for _, _, m in REFUSALS])
def test_refusals_say_why_and_touch_nothing(call, error, match):
    Q, S = rand_factors(2, d=5, r=3, dtype=torch.float32)
    before, versions = (Q.clone(), S.clone()), (Q._version, S._version)
    with pytest.raises(error, match=match):
        call(Q, S, torch.randn(2, 9, 5))
    identical(Q, before[0])
    identical(S, before[1])
    assert (Q._version, S._version) == versions
