"""Low-rank R: the ops against their specification and the full rule, the Triton kernel, layers, optimizer."""

import contextlib
import sys
import threading

import pytest
import torch
from test_ops import LAYOUTS, arguments, holds_precision, peak
from torch.utils.flop_counter import FlopCounterMode

from dbpkern import (
    ops,
    reference,
)
from dbpkern.ops import _dispatch, _triton
from dbpkern.ops.lowrank_fold import ieee_products, lowrank_fold
from dbpkern.ops.lowrank_statistics import (
    lowrank_statistics,
)
from dbpkern.ops.lowrank_transform import lowrank_transform

pytestmark = [
    # The exception is opcheck's own.
    pytest.mark.filterwarnings("error", "default:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.usefixtures("poisoned"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KAPPAS = [0.0, 0.3, 1.0]
HALVES = [torch.bfloat16, torch.float16]
DOUBLE = {"dtype": torch.float64}
NAN, INF = float("nan"), float("inf")
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


def correlated(L, n, d, dtype=torch.float64):
    """Rows whose features are correlated, differently in each layer."""
    return (randn(L, n, d) @ (torch.eye(d) + 0.3 * randn(L, d, d))).to(dtype)


def exact(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def identical(one, other):
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


BROKEN = {
    "indefinite B": lambda B, Y, c: B[1].neg_(),
    "NaN in B": lambda B, Y, c: B[1].fill_(NAN),
    "NaN in Y": lambda B, Y, c: Y[1, 2].fill_(NAN),
    "infinite Y": lambda B, Y, c: Y[1].fill_(INF),
    "NaN in c": lambda B, Y, c: c[1].fill_(NAN),
}


RATES = {
    "float": lambda L: 0.125,
    "0-d float64": lambda L: torch.tensor(0.125, dtype=torch.float64),
    "0-d float32": lambda L: torch.tensor(0.125),
    "[L] float64": lambda L: 0.125 * torch.arange(1, L + 1).double(),
    "[L] float32": lambda L: 0.125 * torch.arange(1, L + 1),
}


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
    expected = reference.lowrank_statistics(x.double(), Q.double())
    plain = reference.lowrank_statistics(wide, Q)
    for parts in zip(lowrank_statistics(x, Q), expected, plain, strict=True):
        holds_precision(*parts)


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


def watched(monkeypatch, *names):
    """The precision in force at each call of these functions of torch."""
    seen = []

    def watch(function):
        def call(*args, **kwargs):
            seen.append(MATMUL[DEVICE].fp32_precision)
            return function(*args, **kwargs)

        return call

    for name in names:
        monkeypatch.setattr(torch, name, watch(getattr(torch, name)))
    return seen


# Layouts. The storage around a view is NaN: reading it poisons the result, writing it is noticed.


@pytest.mark.parametrize(("L", "n", "d", "r"), [(3, 15, 13, 5), (1, 6, 2, 2), (9, 10, 7, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, L, n, d, r):
    x, (Q, S) = correlated(L, n, d), rand_factors(L, d=d, r=r)
    x_, Q_, S_ = (layout(t)[0] for t in (x, Q, S))
    for op in (lowrank_transform, lowrank_fold):
        for i in (slice(None), 0):
            found = op(x_[i], Q_[i], S_[i])
            exact(found, getattr(reference, op.__name__)(x[i], Q[i], S[i]))
            assert found.is_contiguous()
    statistics = reference.lowrank_statistics(x, Q)
    for actual, expected in zip(lowrank_statistics(x_, Q_), statistics, strict=True):
        exact(actual, expected)
        assert actual.is_contiguous()
    expected = reference.lowrank_apply(Q, S, *statistics, 0.1)
    (Q_, Q_base), (S_, S_base) = layout(Q), layout(S)
    padding = Q_base.isnan(), S_base.isnan()
    lowrank_apply_(Q_, S_, *(layout(t)[0] for t in statistics), 0.1)
    for actual, wanted in zip((Q_, S_), expected, strict=True):
        exact(actual, wanted, 1e-9)
    assert all(torch.equal(base.isnan(), old) for base, old in zip((Q_base, S_base), padding, strict=True))


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
    "lowrank_statistics": lambda g: (
        randn(2, 3, 5).bfloat16(),
        rand_factors(2, d=5, r=2, dtype=torch.float32)[0],
        "",
    ),
    "lowrank_statistics no rows": lambda g: (randn(2, 0, 5), rand_factors(2, d=5, r=2)[0], ""),
    "lowrank_apply_": lambda g: (*statistics_of(2, 5, 2), torch.tensor(0.1, **DOUBLE), 0.3, 0.2),
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
    "statistics": lambda Q, S, x: lowrank_statistics(x, Q),
    "step": lambda Q, S, x: lowrank_apply_(Q, S, *lowrank_statistics(x, Q), 0.1, 0.3),
}


def call_arguments():
    torch.manual_seed(1)
    Q, S = rand_factors(3, d=6, r=2, dtype=torch.float32)
    return Q, S, arguments()["z"]


def equal(one, other):
    pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("case", CALLS)
def test_autocast_changes_nothing(case):
    plain = CALLS[case](*call_arguments())
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(CALLS[case](*call_arguments()), plain)


@pytest.mark.parametrize("case", CALLS)
def test_compiles_to_one_graph(case):
    compiled = torch.compile(CALLS[case], fullgraph=True, backend="aot_eager")
    assert equal(compiled(*call_arguments()), CALLS[case](*call_arguments()))


FLOPS = {
    "transform": (lambda Q, S, x: lowrank_transform(x, Q[0], S[0]), 2 * 9 * (2 * 5 * 2 + 4) * 2),
    "transform stacked": (lambda Q, S, x: lowrank_transform(x, Q, S), 2 * 9 * (2 * 5 * 2 + 4) * 2),
    "fold": (lambda Q, S, x: lowrank_fold(x[0], Q[0], S[0]), 9 * (2 * 5 * 2 + 4) * 2),
    "statistics": (lambda Q, S, x: lowrank_statistics(x, Q), 2 * 9 * (2 * 5 * 2 + 4) * 2),
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
    lr = torch.tensor(0.1)
    assert peak(lambda: reference.lowrank_statistics(x, Q)) > L * d * d * 4
    for call in (
        lambda: lowrank_apply_(Q, S, *lowrank_statistics(x, Q), lr),
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
    (lambda Q, S, x: lowrank_transform(x, Q, S, backend="cuda"), ValueError, "no backend 'cuda'; .* triton"),
    (
        lambda Q, S, x: lowrank_transform(x.double(), Q, S, backend="triton"),
        ValueError,
        "lowrank_transform: backend 'triton' cannot serve this call: ",
    ),
    (lambda Q, S, x: lowrank_fold(None, Q, S), TypeError, "W: expected a tensor .* got NoneType"),
    (lambda Q, S, x: lowrank_fold(x[0, 0], Q, S), ValueError, r"W: expected shape .* got \[5\]"),
    (lambda Q, S, x: lowrank_fold(x[0], Q, S[0]), ValueError, r"Q: expected shape \[d, r\], got \[2, 5, 3\]"),
    (lambda Q, S, x: lowrank_fold(x, Q, S, torch.int8), TypeError, "out_dtype: .* got torch.int8"),
    (lambda Q, S, x: lowrank_fold(x, Q, S.to("meta")), ValueError, "one device, got .* S on meta"),
    (lambda Q, S, x: lowrank_fold(x, Q, S, backend="fast"), ValueError, "backend: .* got 'fast'"),
    (lambda Q, S, x: lowrank_statistics(x[0], Q), ValueError, r"x: expected shape \[L, n, d\], got \[9, 5\]"),
    (lambda Q, S, x: lowrank_statistics(x, Q[0]), ValueError, r"Q: expected shape \[L, d, r\], got \[5, 3\]"),
    (lambda Q, S, x: lowrank_statistics(x, Q[:1]), ValueError, r"L = 2 and d = 5, got \[1, 5, 3\]"),
    (lambda Q, S, x: lowrank_statistics(x, Q[:, :4]), ValueError, r"L = 2 and d = 5, got \[2, 4, 3\]"),
    (lambda Q, S, x: lowrank_statistics(x, Q.half()), TypeError, "Q: expected float32 or float64"),
    (lambda Q, S, x: lowrank_statistics(x, Q.to("meta")), ValueError, "one device, got x on cpu, Q on meta"),
    (lambda Q, S, x: lowrank_statistics(x, Q, backend="triton"), ValueError, "no backend 'triton'; .* cuda"),
    (
        lambda Q, S, x: lowrank_statistics(x, Q, backend="cuda"),
        ValueError,
        "'cuda' cannot serve this call: it needs a CUDA device, got cpu",
    ),
    (lambda Q, S, x: step(Q.half(), S.half(), x), TypeError, "Q: expected float32 or float64"),
    (lambda Q, S, x: step(Q.mT, S, x), ValueError, r"Q: expected .* r <= d, got \[2, 3, 5\]"),
    (lambda Q, S, x: step(Q, S[:, :2, :2], x), ValueError, r"S: .* r = 3, got \[2, 2, 2\]"),
    (lambda Q, S, x: step(Q, S.double(), x), TypeError, "equal dtypes"),
    (lambda Q, S, x: step(Q, S, x, B=S[:1]), ValueError, r"B: expected .* \[2, 3, 3\], got \[1, 3, 3\]"),
    (lambda Q, S, x: step(Q, S, x, Y=Q.mT), ValueError, r"Y: expected .* \[2, 5, 3\], got \[2, 3, 5\]"),
    (lambda Q, S, x: step(Q, S, x, c=Q[..., 0].double()), TypeError, "equal dtypes, got .* c torch.float64"),
    (lambda Q, S, x: step(Q, S, x, c=Q[..., :1]), ValueError, r"c: expected shape \[L, d\], got \[2, 5, 1\]"),
    (lambda Q, S, x: step(Q, S, x, B=S.to("meta")), ValueError, "one device, got .* B on meta"),
    *(
        (lambda Q, S, x, e=e: step(Q, S, x, lr=e), ValueError, "lr: expected a finite")
        for e in (-1, NAN, INF)
    ),
    (lambda Q, S, x: step(Q, S, x, lr=torch.ones(3)), ValueError, r"lr: .* L = 2, got \[3\]"),
    *((lambda Q, S, x, k=k: step(Q, S, x, kappa=k), ValueError, "kappa: expected") for k in (-1, 2, NAN)),
    *((lambda Q, S, x, q=q: step(Q, S, x, q_lr=q), ValueError, "q_lr: expected") for q in (-0.1, 1.1, NAN)),
    (lambda Q, S, x: step(Q, S, x, backend="triton"), ValueError, "lowrank_apply_: no backend 'triton'"),
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


# The Triton kernel, on a GPU or in the interpreter.

needs_triton = pytest.mark.skipif(
    _triton.triton is None or (DEVICE == "cpu" and not _triton.INTERPRETED),
    reason="needs Triton, and a CUDA GPU or TRITON_INTERPRET=1",
)
# (L, M, d, r): one of each, primes, the edges of blocks and one beyond, every size of block of ranks.
TRITON_SHAPES = [
    (1, 1, 1, 1),
    (1, 3, 7, 2),
    (2, 13, 17, 5),
    (3, 64, 64, 16),
    (2, 65, 33, 17),
    (1, 63, 129, 64),
    (1, 37, 131, 65),
    (1, 33, 140, 129),
    (1, 20, 261, 256),
    (2, 0, 7, 3),
    (0, 5, 7, 3),
]
KINDS = {
    "fp32": (torch.float32, torch.float32),
    "fp32 to bf16": (torch.float32, torch.bfloat16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16 to fp32": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
}


def as_operand(x, dtype):
    """x rounded to what a product in this dtype multiplies, in fp32."""
    if dtype != "tf32":
        return x.to(dtype).float()
    bits = x.float().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def plain_lowrank(a, Q, S, out):
    """The same products in PyTorch, with the kernel's operands, fp32 sums and one rounding."""
    kinds = sys.modules["dbpkern.ops.lowrank_fold"]._operands(a, Q, out)
    # The interpreter does not round to TF32.
    first, second = ("tf32" if k.kind == "tf32" and DEVICE == "cuda" else k.dtype for k in kinds)
    T = as_operand(a, first) @ as_operand(Q, first)
    V = Q @ S.mT
    return (a.float() + as_operand(T, second) @ as_operand(V, second).mT).to(out)


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("L", "M", "d", "r"), TRITON_SHAPES)
def test_triton_against_fp64(L, M, d, r, kind):
    dtype, out = KINDS[kind]
    W, factors = randn(L, M, d).to(DEVICE, dtype), rand_factors(L, d=d, r=r, dtype=torch.float32)
    Q, S = (factor.to(DEVICE) for factor in factors)
    expected = reference.lowrank_fold(W.double(), Q.double(), S.double())
    holds_precision_or_empty(
        lowrank_fold(W, Q, S, out, backend="triton"), expected, plain_lowrank(W, Q, S, out)
    )
    if dtype == out:
        expected = reference.lowrank_transform(W.double(), Q.double(), S.double())
        holds_precision_or_empty(
            lowrank_transform(W, Q, S, backend="triton"), expected, plain_lowrank(W, Q, S.mT, out)
        )


def holds_precision_or_empty(actual, expected, plain):
    if actual.numel():
        holds_precision(actual, expected, plain)
    else:
        assert actual.shape == expected.shape
        assert actual.dtype == plain.dtype


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_with_any_strides(layout):
    W, (Q, S) = randn(2, 37, 43).float(), rand_factors(2, d=43, r=9, dtype=torch.float32)
    W_, Q_, S_ = (layout(t.to(DEVICE))[0] for t in (W, Q, S))
    found = lowrank_fold(W_, Q_, S_, backend="triton")
    assert found.is_contiguous()
    torch.testing.assert_close(found.cpu(), reference.lowrank_fold(W, Q, S))
    x = W_[0].unflatten(0, (37, 1))
    found = lowrank_transform(x, Q_[0], S_[0], backend="triton").cpu()
    torch.testing.assert_close(found, reference.lowrank_transform(W[0], Q[0], S[0])[:, None])


def far_apart(values, *strides):
    """A tensor of these values in a storage so wide that most of it is never touched, and takes no memory."""
    torch.use_deterministic_algorithms(False)  # or all of it would be filled
    size = 1 + sum((n - 1) * stride for n, stride in zip(values.shape, strides, strict=True))
    room = torch.empty(size, dtype=values.dtype, device=DEVICE)
    return room.as_strided(values.shape, strides).copy_(values)


@needs_triton
def test_triton_with_strides_beyond_the_reach_of_a_tile():
    """The last of 64 rows, or of 256 ranks, lies more than 2^31 elements from the first."""
    Q, S = (t.to(DEVICE) for t in rand_factors(d=16, r=16, dtype=torch.float32))
    W = far_apart(torch.randn(64, 16).bfloat16(), 34_200_016, 1)
    expected = reference.lowrank_fold(W.double(), Q.double(), S.double())
    plain = plain_lowrank(W[None], Q[None], S[None].mT, W.dtype)[0]
    holds_precision(lowrank_fold(W, Q, S, backend="triton"), expected, plain)
    del W
    S = (0.01 * torch.randn(256, 256)).to(DEVICE)
    W, Q = torch.randn(3, 16, device=DEVICE), far_apart(torch.randn(16, 256) / 16, 1, 8_500_016)
    expected = reference.lowrank_fold(W.double(), Q.double(), S.double())
    plain = plain_lowrank(W[None], Q[None], S[None].mT, W.dtype)[0]
    holds_precision(lowrank_fold(W, Q, S, backend="triton"), expected, plain)


@needs_triton
def test_triton_with_offsets_beyond_32_bits():
    x = far_apart(torch.randn(2, 20, 24).bfloat16(), 2**31 + 16, 24, 1)
    Q, S = (t.to(DEVICE) for t in rand_factors(2, d=24, r=5, dtype=torch.float32))
    expected = reference.lowrank_transform(x.double(), Q.double(), S.double())
    found = lowrank_transform(x, Q, S, backend="triton")
    holds_precision(found, expected, plain_lowrank(x, Q, S, x.dtype))


@needs_triton
def test_the_right_factor_is_not_shortened(permit, monkeypatch):
    permit("medium")
    Q, S = (t.to(DEVICE) for t in rand_factors(d=19, r=5, dtype=torch.float32))
    seen = watched(monkeypatch, "bmm")
    lowrank_fold(torch.randn(7, 19, device=DEVICE), Q, S, backend="triton")
    assert seen == ["ieee"]


BACKENDS = {
    "transform": lambda m, x: lambda **k: ops.transform(x, m, **k),
    "fold": lambda m, x: lambda **k: ops.fold(x, m, **k),
    "correlation": lambda m, x: lambda **k: ops.correlation(x[None], **k),
    "apply_": lambda m, x: lambda **k: ops.apply_(m[None], m[None], 0.1, **k),
    "update_": lambda m, x: lambda **k: ops.update_(m[None], x[None], 0.1, **k),
    "fused_step": lambda m, x: lambda **k: ops.fused_step(x, m, torch.arange(2, device=DEVICE), 0.1, **k),
    "lowrank_transform": lambda m, x: lambda **k: lowrank_transform(x, m, m, **k),
    "lowrank_fold": lambda m, x: lambda **k: lowrank_fold(x, m, m, **k),
    "lowrank_statistics": lambda m, x: lambda **k: lowrank_statistics(x[None], m[None], **k),
    "lowrank_apply_": lambda m, x: lambda **k: step(m[None], m[None], x[None], c=m[:1], **k),
}


@pytest.mark.parametrize("kind", ["16bit", "tf32"])
@pytest.mark.parametrize("op", ["lowrank_transform", "lowrank_fold"])
def test_triton_serves_low_rank_once_its_rows_fill_the_device(op, kind, monkeypatch):
    monkeypatch.setattr(_dispatch, "architecture", lambda _: "default")
    full = 64 * 132  # rows of a program, multiprocessors of an H100
    for rows, width, pays in ((full, 128, True), (full - 1, 128, False), (full, 127, False)):
        assert _dispatch.pays(op, kind, torch.device("cuda"), d=16, rows=rows, width=width) == pays


@needs_triton
def test_triton_gives_the_gradients_of_eager():
    Q, S = (t.to(DEVICE) for t in rand_factors(d=19, r=5, dtype=torch.float32))
    x, W, g = (torch.randn(23, 19, device=DEVICE) for _ in range(3))
    grads = {}
    for backend in ("eager", "triton"):
        x_, W_ = x.clone().requires_grad_(), W.clone().requires_grad_()
        with FlopCounterMode(display=False):
            y = lowrank_transform(x_, Q, S, backend=backend) + lowrank_fold(W_, Q, S, backend=backend)
        grads[backend] = torch.autograd.grad(y, (x_, W_), g)
    torch.testing.assert_close(grads["triton"], grads["eager"])


@needs_triton
def test_triton_sums_beyond_the_range_of_fp16():
    """Rows within fp16 whose products with Q are not: 30,000 in 64 features of one direction."""
    d = 64
    Q, S = torch.full((d, 1), d**-0.5, device=DEVICE), torch.full((1, 1), -1.0, device=DEVICE)
    x = torch.full((4, d), 3e4, dtype=torch.float16, device=DEVICE)
    z = lowrank_transform(x, Q, S, backend="triton")  # the direction is removed
    assert z.isfinite().all()
    assert z.abs().max() <= 3e4 * 2e-3


@needs_triton
def test_triton_without_S_gives_the_input_bit_for_bit():
    Q, S = (t.to(DEVICE) for t in rand_factors(d=33, r=4, dtype=torch.float32, size=0.0))
    for dtype, out in KINDS.values():
        W = randn(17, 33).to(DEVICE, dtype)
        identical(lowrank_fold(W, Q, S, out, backend="triton"), W.to(out))


@needs_triton
@pytest.mark.parametrize(
    ("d", "r", "dtype", "match"),
    [(300, 257, torch.float32, "ranks from 1 to 256, got 257"), (5, 2, torch.float64, "not serve float64")],
)
def test_triton_says_what_it_cannot_serve(d, r, dtype, match):
    Q, S = (t.to(DEVICE) for t in rand_factors(d=d, r=r, dtype=dtype))
    with pytest.raises(ValueError, match=f"lowrank_fold: backend 'triton' cannot serve this call: .*{match}"):
        lowrank_fold(torch.ones(3, d, dtype=dtype, device=DEVICE), Q, S, backend="triton")
