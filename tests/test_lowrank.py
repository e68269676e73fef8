"""Low-rank R: the ops against their specification and the full rule, the Triton kernel, layers, optimizer."""

import contextlib
import copy
import itertools
import math
import pickle
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from test_ops import LAYOUTS, arguments, holds_precision, peak
from test_optim import SYNCHRONISING, operators
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from vits import MODELS, captured, decorrelated, everything, images, make, mlp, shake

import dbpkern
from dbpkern import (
    DecorConv2d,
    DecorLinear,
    DecorMultiheadAttention,
    DecorSGD,
    diagnostics,
    reference,
)
from dbpkern.ops import _dispatch, _triton
from dbpkern.ops.lowrank_fold import ieee_products, lowrank_fold
from dbpkern.ops.lowrank_statistics import lowrank_statistics
from dbpkern.ops.lowrank_step import lowrank_step_
from dbpkern.ops.lowrank_transform import lowrank_transform
from rules import convert, decor_sgd

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
    caution, rates = torch.ones(L), torch.zeros(L)
    assert peak(lambda: reference.lowrank_statistics(x, Q)) > L * d * d * 4
    for call in (
        lambda: lowrank_step_(Q, S, caution, rates, *lowrank_statistics(x, Q), 0.1),
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


# Layers.

RANK = 2


def linear(form="auto", d=5, o=3, rank=RANK, dtype=torch.float64):
    return shake(DecorLinear.from_linear(nn.Linear(d, o, dtype=dtype), form, rank), 0.4)


def conv(form="auto", rank=RANK, dtype=torch.float64):
    return shake(DecorConv2d.from_conv(nn.Conv2d(2, 3, 3, 2, 1, dtype=dtype), form, rank), 0.4)


def attention(form="auto", rank=RANK, dtype=torch.float64):
    stock = nn.MultiheadAttention(6, 2, batch_first=True, dtype=dtype)
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.5)
    return shake(DecorMultiheadAttention.from_attention(stock, form, rank), 0.4)


LAYERS = [linear, conv, attention]
FORMS = ["fold", "apply"]


def input_of(layer, dtype=torch.float64):
    return torch.randn((2, 2, 5, 6) if layer.stock is nn.Conv2d else (2, 3, layer._matrix().shape[1])).to(
        dtype
    )


def call(layer, x):
    return layer(x, x, x)[0] if isinstance(layer, nn.MultiheadAttention) else layer(x)


def full_twin(layer):
    """The layer with the same R, held as a matrix."""
    twin = layer.stock.__new__(layer.stock)
    twin.__dict__.update(copy.deepcopy(layer).fused().__dict__)
    twin = type(layer)._from_stock(twin, layer.form, None)
    with torch.no_grad():
        twin._weight.copy_(layer._weight)
        twin.R.copy_(layer.dense_R())
    return twin


@pytest.mark.parametrize("form", [*FORMS, "auto"])
@pytest.mark.parametrize("make_layer", LAYERS)
def test_layers_compute_what_full_ones_with_the_same_R_do(make_layer, form):
    layer = make_layer(form)
    Q, S = layer.factors
    exact(layer.dense_R(), torch.eye(len(Q)) + Q @ S @ Q.mT)
    twin = full_twin(layer)
    x = input_of(layer).requires_grad_()
    y, expected = call(layer, x), call(twin, x)
    exact(y, expected)
    g = torch.randn_like(y)
    grads, wanted = (
        torch.autograd.grad(out, (x, *m.parameters()), g) for out, m in ((y, layer), (expected, twin))
    )
    for actual, other in zip(grads, wanted, strict=True):
        exact(actual, other)
    assert not any(f.requires_grad for f in layer.factors)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make_layer", LAYERS)
def test_gradients_of_layers(make_layer, form):
    layer = make_layer(form)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def function(x, *parameters):
        args = (x, x, x) if make_layer is attention else (x,)
        y = functional_call(layer, dict(zip(names, parameters, strict=True)), args)
        return y[0] if make_layer is attention else y

    inputs = [p.detach().clone().requires_grad_() for p in (input_of(layer), *parameters)]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make_layer", LAYERS)
def test_layers_start_as_the_stock_layer_bit_for_bit(make_layer, form, dtype):
    layer = make_layer(form, dtype=dtype)
    layer.reset_R()
    x = input_of(layer, dtype)
    same = torch.testing.assert_close if (make_layer, form) == (conv, "apply") else identical  # unfolds
    same(call(layer, x), call(copy.deepcopy(layer).fused(), x))
    stock = layer.stock.__new__(layer.stock)
    stock.__dict__.update(layer.fused().__dict__)
    again = type(layer)._from_stock(stock, form, RANK)
    assert all(one is other for one, other in zip(again.parameters(), stock.parameters(), strict=True))
    assert {f.dtype for f in again.factors} == {torch.float32}
    same(call(again, x), call(stock, x))


def test_Q_starts_orthonormal_and_the_same_everywhere():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = linear(d=9, rank=4, dtype=torch.float32)
    torch.manual_seed(6)
    other = linear(d=9, rank=4, dtype=torch.float32)
    identical(one.Q, other.Q)
    exact(one.Q.double().mT @ one.Q.double(), torch.eye(4, **DOUBLE), 1e-6)
    assert one.Q.is_contiguous()
    wide = linear(d=9, rank=4)
    identical(wide.Q.float(), one.Q)
    assert not torch.allclose(linear(d=9, rank=5).Q[:, :4], wide.Q)
    torch.manual_seed(5)
    DecorLinear.from_linear(nn.Linear(9, 1, device="meta"), rank=4)
    identical(torch.get_rng_state(), state)  # the global generator is left alone


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make_layer", LAYERS)
def test_fused_is_bit_identical_to_the_folded_form(make_layer, form):
    layer = make_layer(form)
    x = input_of(layer)
    expected, R, matrix = call(layer, x), layer.dense_R(), layer._matrix().detach().clone()
    stock = layer.fused()
    assert type(stock) is layer.stock
    assert not {"Q", "S", "R", "structure"} & (stock.state_dict().keys() | vars(stock).keys())
    exact(stock.in_proj_weight if make_layer is attention else stock.weight.flatten(1), matrix @ R)
    if form == "fold":
        identical(call(stock, x), expected)
    else:
        exact(call(stock, x), expected)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("make_layer", LAYERS)
def test_Q_and_S_keep_their_values_under_casts_of_the_model(make_layer, dtype):
    layer = make_layer(dtype=torch.float32)
    before = [f.clone() for f in layer.factors]
    for cast in (lambda: layer.to(dtype), layer.half, layer.bfloat16):
        cast()
        assert next(layer.parameters()).dtype != torch.float32
        assert equal(layer.factors, tuple(before))
    x = input_of(layer, next(layer.parameters()).dtype)
    torch.testing.assert_close(
        call(layer, x).double(), call(copy.deepcopy(layer).double(), x.double()), rtol=0.05, atol=0.05
    )
    layer.float()
    assert equal(layer.factors, tuple(before))
    layer.double()
    assert equal(layer.factors, tuple(f.double() for f in before))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make_layer", LAYERS)
def test_autocast_computes_in_its_dtype(make_layer, form):
    layer = make_layer(form, dtype=torch.float32)
    x = input_of(layer, torch.float32).requires_grad_()
    expected = call(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(layer, x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_repr_shows_the_rank():
    text = "DecorLinear(in_features=5, out_features=3, bias=True, R=[5, 5], rank=2)"
    assert repr(linear()) == text
    assert "R=[18, 18], rank=2, form=apply)" in repr(conv("apply"))


@pytest.mark.parametrize("make_layer", LAYERS)
def test_checkpoints_of_a_layer(make_layer):
    layer, other = make_layer(), make_layer()
    start = layer.Q.clone()
    layer.Q.copy_(start.flip(0))
    state = copy.deepcopy(layer.state_dict())
    assert {"Q", "S"} <= state.keys()
    other.load_state_dict(state)
    assert equal(other.factors, layer.factors)
    stock = {k: v for k, v in state.items() if k not in ("Q", "S")}
    places = [f.data_ptr() for f in other.factors]
    other.load_state_dict(stock)
    identical(other.S, torch.zeros_like(layer.S))
    identical(other.Q, start)
    assert [f.data_ptr() for f in other.factors] == places
    with pytest.raises(RuntimeError, match=r'Missing key.*"S"'):
        other.load_state_dict({k: v for k, v in state.items() if k != "S"})


def test_checkpoints_of_another_structure_are_refused_and_change_no_R():
    low, full = linear(), linear(rank=None)
    before = [t.clone() for t in (*low.factors, *full.factors)]
    with pytest.raises(RuntimeError, match=r'Missing key.*"Q", "S".*\n.*Unexpected key.*"R"'):
        low.load_state_dict(full.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key.*"R".*\n.*Unexpected key.*"Q", "S"'):
        full.load_state_dict(low.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for Q"):
        low.load_state_dict(linear(rank=3).state_dict())
    assert equal((*low.factors, *full.factors), tuple(before))


def test_a_stock_checkpoint_fills_a_layer_on_the_meta_device():
    stock = nn.Linear(5, 3)
    with torch.device("meta"):
        layer = DecorLinear.from_linear(nn.Linear(5, 3), rank=2)
    assert all(f.is_meta for f in layer.factors)
    layer.load_state_dict(stock.state_dict(), assign=True)
    x = torch.randn(7, 5)
    identical(layer(x), stock(x))
    start = DecorLinear.from_linear(stock, rank=2).Q
    identical(layer.Q, start)
    with torch.device("meta"):
        layer = DecorLinear.from_linear(nn.Linear(5, 3), rank=2)
    layer.to_empty(device="cpu").load_state_dict(stock.state_dict())
    identical(layer.Q, start)
    identical(layer(x), stock(x))


@pytest.mark.parametrize(
    ("rank", "error", "match"),
    [
        (0, ValueError, r"rank: expected an integer in \[1, 5\], the layer's width, got 0"),
        (6, ValueError, "rank: .* got 6"),
        (-1, ValueError, "rank: .* got -1"),
        (2.0, TypeError, "rank: expected an integer or None, got float"),
        (True, TypeError, "rank: .* got bool"),
        ("2", TypeError, "rank: .* got str"),
    ],
)
def test_ranks_that_are_none(rank, error, match):
    stock = nn.Linear(5, 3)
    with pytest.raises(error, match=match):
        DecorLinear.from_linear(stock, rank=rank)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(duplicate):
    model = shake(mlp(5, 4, 3, rank=2))
    twin, x = duplicate(model), torch.randn(6, 5)
    identical(twin(x), model(x))
    for one, other in zip(decorrelated(twin).values(), decorrelated(model).values(), strict=True):
        assert one.structure == other.structure
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(one.factors, other.factors, strict=True))


# Conversion.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", MODELS)
def test_conversion_changes_no_output_and_fusing_gives_the_stock_model_back(kind, form):
    stock, x = make(kind), images()
    # The applied convolution becomes a product of patches: another order of sums.
    sites = ("patch_embed", "qkv", "fc1") if form == "fold" else ("qkv", "fc1")
    model = dbpkern.decorrelate(copy.deepcopy(stock), sites, form=form, rank=3)
    assert {layer.structure.rank for layer in decorrelated(model).values()} == {3}
    identical(model(x), stock(x))
    shake(model)
    expected = model(x)
    assert not torch.allclose(expected, stock(x), rtol=1e-2)
    dbpkern.fuse(model)
    if form == "fold":
        identical(model(x), expected)
    else:
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == list(stock.state_dict())


def structures(model):
    return {name: getattr(layer.structure, "rank", None) for name, layer in decorrelated(model).items()}


def test_ranks_by_site():
    model = dbpkern.decorrelate(make("timm"), "all", rank={"fc2": 5, "qkv": 2})
    for name, rank in structures(model).items():
        assert rank == (5 if name.endswith("fc2") else 2 if name.endswith("qkv") else None)
    model = dbpkern.decorrelate(
        make("timm"), None, lambda name, _: name.startswith("blocks"), rank={"fc1": 24}
    )
    assert {rank for name, rank in structures(model).items() if name.endswith("fc1")} == {24}
    assert {rank for name, rank in structures(model).items() if not name.endswith("fc1")} == {None}


def test_ranks_as_parts_of_the_width_are_multiples_of_eight():
    model = dbpkern.decorrelate(make("timm"), "all", rank=0.125)
    for name, layer in decorrelated(model).items():
        d = layer.weight[0].numel()
        rank = structures(model)[name]
        assert rank % 8 == 0
        assert rank - 8 < d / 8 <= rank
    model = dbpkern.decorrelate(make("timm"), "all", rank={"fc2": 0.99, "blocks.0.attn.qkv": 0.2, "qkv": 3})
    for name, rank in structures(model).items():
        if name.endswith("fc2"):
            assert rank is None  # the whole width
        elif name.endswith("qkv"):
            assert rank == (8 if name.startswith("blocks.0") else 3)
        else:
            assert rank is None


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"rank": 25}, ValueError, r"blocks.0.attn.qkv: rank: expected an integer in \[1, 24\].* got 25"),
        ({"rank": 0}, ValueError, r"patch_embed.proj: rank: .*\[1, 192\].* got 0"),
        ({"rank": {"fc1": 25}}, ValueError, "blocks.0.mlp.fc1: rank: .* got 25"),
        (
            {"rank": {"fc2": 3}},
            ValueError,
            r"rank: expected some of the chosen sites \('patch_embed', 'qkv', 'fc1'\) as keys, got 'fc2'",
        ),
        ({"rank": {"blocks": 3}}, ValueError, "chosen sites .* got 'blocks'"),
        (
            {"rank": 3.0},
            ValueError,
            r"rank: expected an integer, or a part of the width in \(0, 1\), got 3.0",
        ),
        ({"rank": {"fc1": 0.0}}, ValueError, r"rank: .* in \(0, 1\), got 0.0"),
        ({"rank": math.nan}, ValueError, r"rank: .* in \(0, 1\), got nan"),
        ({"rank": {"fc1": "3"}}, TypeError, "rank: .* got str"),
    ],
)
def test_refusals_of_conversion_leave_the_model_alone(arguments, error, match):
    model = make("timm")
    modules = list(model.modules())
    with pytest.raises(error, match=match):
        dbpkern.decorrelate(model, **arguments)
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))


def shares(model):
    """Whether the q, k, v projections of each block hold the same Q and S, and no two blocks do."""
    groups = [
        [decorrelated(model)[f"encoder.layer.{i}.attention.attention.{n}"] for n in ("query", "key", "value")]
        for i in (0, 1)
    ]
    same = [layer.Q is group[0].Q and layer.S is group[0].S for group in groups for layer in group]
    return all(same) and groups[0][0].S is not groups[1][0].S


@pytest.mark.parametrize("how", ["trained", "deepcopy", "pickle", "bfloat16"])
def test_projections_of_one_input_share_Q_and_S(how):
    model = dbpkern.decorrelate(make("huggingface"), "all", rank=3)
    assert shares(model)
    decor = DecorSGD(model, lr=0.05, sample=1.0)
    assert len(decor.names) == 1 + 2 * 4
    model(images()).square().mean().backward()
    decor.step()
    if how == "deepcopy":
        model = copy.deepcopy(model)
    elif how == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif how == "bfloat16":
        model.bfloat16()
    assert shares(model)


# The optimizer.


def factors_of(model):
    return {name: [f.clone() for f in layer.factors] for name, layer in decorrelated(model).items()}


def stepped(factors, rows, lr, kappa=0.0):
    """What a step makes of the factors, for full and low-rank R."""
    if len(factors) == 1:
        return [reference.published_step(factors[0], rows, lr, kappa)]
    Q, S = (f[None] for f in factors)
    found = reference.lowrank_apply(Q, S, *reference.lowrank_statistics(rows[None], Q), lr, kappa)
    return [f[0] for f in found]


def check_step(model, before, rows, lr, kappa=0.0, tolerance=1e-9):
    for name, layer in decorrelated(model).items():
        wanted = stepped(before[name], rows[name], lr, kappa) if name in rows else before[name]
        for actual, expected in zip(layer.factors, wanted, strict=True):
            exact(actual, expected, tolerance)
        assert name not in rows or not torch.equal(layer.factors[-1], before[name][-1])


def mixed(*widths, ranks, dtype=torch.float64):
    """Linear layers in a row with tanh in between, each of its own structure."""
    model = mlp(*widths, dtype=dtype)
    for i, rank in enumerate(ranks):
        model[2 * i] = DecorLinear.from_linear(model[2 * i].fused(), rank=rank)
    return model


@pytest.mark.parametrize("kappa", [0.0, 0.2])
@pytest.mark.parametrize("sizes", [(30,), (16, 14), (8, 3, 19), (1, 0, 29)])
def test_steps_of_mixed_models_with_accumulation(sizes, kappa):
    model = mixed(5, 5, 5, 5, 5, 7, ranks=(2, None, 2, 3, 2))
    decor = DecorSGD(model, lr=0.05, kappa=kappa, sample=1.0)
    assert decor.names == ["0", "2", "4", "6", "8"]
    assert sorted(len(stack.sites) for stack in decor._stacks) == [1, 1, 3]
    assert len(decor.param_groups[0]["params"]) == 9
    for _ in range(3):
        for n in sizes:
            model(torch.randn(n, 5, **DOUBLE)).square().sum().backward()
        before, rows = factors_of(model), captured(decor)
        assert all(len(part) == sum(sizes) for part in rows.values())
        decor.step()
        check_step(model, before, rows, 0.05, kappa)


@pytest.mark.parametrize("n", [4, 40])
@pytest.mark.parametrize("kappa", KAPPAS)
def test_loss_is_that_of_the_reference_before_and_after_the_step(kappa, n):
    model = shake(mixed(5, 9, 5, 9, ranks=(2, None, 3)))
    decor = DecorSGD(model, lr=0.05, kappa=kappa, sample=1.0)
    assert decor.loss() == {}
    for rows_of in (n, n // 2):
        model(torch.randn(rows_of, 5, **DOUBLE)).square().mean().backward()
        rows = captured(decor)

        def expected(rows=rows):
            return {
                name: reference.loss((r @ decorrelated(model)[name].dense_R().mT)[None], kappa)[0]
                for name, r in rows.items()
            }

        exact(decor.loss(), expected())
        decor.step()
        exact(decor.loss(), expected())


def test_decorrelation_loss_falls():
    model = mlp(16, 4, rank=3, dtype=torch.float64)
    U = torch.linalg.qr(randn(16, 3)).Q
    C = torch.eye(16, **DOUBLE) + 20 * U @ U.mT  # the identity and some directions of greater variance
    x = randn(400, 16) @ torch.linalg.cholesky(C).mT
    decor = DecorSGD(model, lr=0.01, sample=1.0)
    losses = []
    for _ in range(150):
        model(x).square().mean().backward()
        losses.append(decor.loss()["0"].item())
        decor.step()
    assert losses[-1] < 0.02 * losses[0]


NEW_STORAGE = {
    "double": lambda model: model.double(),
    "assigned checkpoint": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
    "stock checkpoint": lambda m: m.load_state_dict(
        {k: v for k, v in m.state_dict().items() if k.endswith(("weight", "bias"))}
    ),
}


@pytest.mark.parametrize("when", ["between steps", "between backward and step"])
@pytest.mark.parametrize("change", NEW_STORAGE)
def test_factors_may_get_new_storage_at_any_time(change, when):
    model = shake(mlp(6, 6, 6, rank=2))
    decor = DecorSGD(model, lr=0.05, sample=1.0)
    for i in range(3):
        if i == 1 and when == "between steps":
            NEW_STORAGE[change](model)
        model(torch.randn(20, 6, dtype=model[0].weight.dtype)).square().sum().backward()
        if i == 1 and when != "between steps":
            NEW_STORAGE[change](model)
        before, rows = factors_of(model), captured(decor)
        decor.step()
        rows = {name: r.to(model[0].Q.dtype) for name, r in rows.items()}
        check_step(model, before, rows, 0.05, tolerance=2e-4)
    (Q, S), (stack,) = model[2].factors, decor._stacks
    assert [p is f for p, f in zip(decor.param_groups[0]["params"][2:], (Q, S), strict=True)] == [True, True]
    assert Q.data_ptr() == stack.factors[0][1].data_ptr()
    assert S.data_ptr() == stack.factors[1][1].data_ptr()


def test_in_the_steady_state_nothing_moves():
    model = mlp(6, 6, 6, rank=2)
    decor = DecorSGD(model, lr=0.01, sample=0.5)
    places = [f.data_ptr() for f in decor.param_groups[0]["params"]]
    rooms = []
    for n in (20, 20, 7, 20):
        model(torch.randn(n, 6)).square().mean().backward()
        decor.step()
        rooms.append([site.slot.room.data_ptr() for site in decor._sites])
    assert rooms[1:] == rooms[:-1]
    assert [f.data_ptr() for layer in decorrelated(model).values() for f in layer.factors] == places


@pytest.mark.parametrize("rows", [torch.float64, torch.bfloat16])
def test_rows_of_other_dtypes_than_Q(rows):
    """Rows sampled before `.float()`, or under autocast."""
    model = mlp(6, 6, rank=2, dtype=torch.float64 if rows == torch.float64 else torch.float32)
    decor, x = DecorSGD(model, lr=0.05, sample=1.0), torch.randn(30, 6)
    with torch.autocast("cpu", torch.bfloat16, enabled=rows == torch.bfloat16):
        y = model(x.double() if rows == torch.float64 else x)
    y.float().square().mean().backward()
    assert captured(decor)["0"].dtype == rows
    model.float()
    before = factors_of(model)
    decor.step()
    check_step(model, before, {"0": x.to(rows).float()}, 0.05, tolerance=1e-5)


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)])
def test_a_step_never_reads_a_value_and_its_work_does_not_grow_with_the_layers(rate):
    counts = []
    for layers in (2, 5):
        model = mlp(*[8] * (layers + 1), rank=3)
        decor = DecorSGD(model, lr=rate, kappa=0.1, sample=1.0)
        for _ in range(2):
            model(torch.randn(20, 8)).square().mean().backward()
            names = operators(decor.step)
        assert not SYNCHRONISING & set(names)
        # Of the layers of a stack, only the parts of the sample buffer and of the factors are looked at.
        work = [
            n for n in names if n.startswith("dbpkern::") or n in ("aten::bmm", "aten::linalg_cholesky_ex")
        ]
        counts.append(sorted(work))
    assert counts[0] == counts[1]
    assert counts[0].count("dbpkern::lowrank_statistics") == 1
    assert counts[0].count("dbpkern::lowrank_step_") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_waits_for_nothing_and_runs_in_a_cuda_graph(dtype, permit):
    permit("high")  # so that the step has a precision to suspend
    model = shake(mlp(64, 64, 64, 96, 32, rank=16)).cuda()
    decor = DecorSGD(model, lr=torch.tensor(0.01, device="cuda"), sample=0.5)

    def backward():
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(torch.randn(600, 64, device="cuda")).square().mean()
        loss.backward()

    backward()
    decor.step()  # makes the handles of the libraries, and finds the samples their place
    backward()
    factors = [factor for layer in decorrelated(model).values() for factor in layer.factors]
    start = [factor.clone() for factor in factors]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decor.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = [factor.clone() for factor in factors]
    for factor, before in zip(factors, start, strict=True):
        factor.copy_(before)
    for site in decor._sites:
        site.slot.pending = True
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decor.step()
    graph.replay()
    for factor, wanted, before in zip(factors, expected, start, strict=True):
        torch.testing.assert_close(factor, wanted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(wanted, before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copied_run_goes_on_like_the_original(duplicate):
    def steps(model, decor, start, stop):
        for i in range(start, stop):
            x = torch.randn(30, 5, generator=torch.Generator().manual_seed(i))
            model(x).square().mean().backward()
            decor.step()

    model = mlp(5, 5, 4, rank=2)
    decor = DecorSGD(model, lr=0.05, kappa=0.1, sample=0.3, seed=5)
    steps(model, decor, 0, 2)
    twin, other = duplicate((model, decor))
    state = copy.deepcopy((model.state_dict(), decor.state_dict()))
    for pair in ((model, decor), (twin, other)):
        steps(*pair, 2, 5)
    resumed = mlp(5, 5, 4, rank=2)
    third = DecorSGD(resumed, sample=0.3)
    resumed.load_state_dict(state[0])
    third.load_state_dict(state[1])
    steps(resumed, third, 2, 5)
    for name, layer in decorrelated(model).items():
        assert equal(decorrelated(twin)[name].factors, layer.factors)
        assert equal(decorrelated(resumed)[name].factors, layer.factors)


@pytest.mark.parametrize("form", FORMS)
def test_compiled_training_never_recompiles_and_equals_eager(form):
    batches = [torch.randn(12, 5) for _ in range(4)]
    models = [mlp(5, 4, 3, form=form, rank=2)]
    models.append(copy.deepcopy(models[0]))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for model, backend in zip(models, ("eager", "aot_eager"), strict=True):
            run = torch.compile(model, fullgraph=True, backend=backend) if backend != "eager" else model
            decor = DecorSGD(model, lr=0.05, sample=0.5)
            main = torch.optim.SGD(model.parameters(), lr=0.01)
            for x in batches:
                main.zero_grad()
                run(x).square().mean().backward()
                main.step()
                decor.step()
    for one, other in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert all(layer.S.abs().max() > 1e-3 for layer in decorrelated(models[1]).values())


def test_diagnostics_see_the_R_that_the_factors_make():
    model, x = shake(mlp(5, 4, rank=2, dtype=torch.float64), 0.5), torch.randn(40, 5, **DOUBLE)
    with diagnostics.observe(model) as layers:
        model(x)
    R = model[0].dense_R()
    exact(layers["0"].after, R @ (x.mT @ x / 40) @ R.mT)
    assert math.isclose(layers["0"].loss_after, reference.loss((x @ R.mT)[None])[0].item(), rel_tol=1e-9)


def test_layers_work_in_a_filtered_model_of_any_kind():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    dbpkern.decorrelate(model, sites=None, filter=everything, rank=6)
    x = torch.randn(9, 6)
    with FlopCounterMode(display=False) as counter:
        y = model(x)
    identical(y, F.linear(torch.tanh(F.linear(x, *model[0].parameters())), *model[2].parameters()))
    assert torch.ops.dbpkern.lowrank_fold in counter.get_flop_counts()["Global"]
    assert all(
        a is b for a, b in itertools.pairwise(layer.structure.names for layer in decorrelated(model).values())
    )
