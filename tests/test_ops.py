"""The ops against their specification: values, precision, layouts, autograd, compilation and refusals."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dbpkern import ops, reference, sampling

pytestmark = [
    # The exception is opcheck's own.
    pytest.mark.filterwarnings("error", "default:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.usefixtures("poisoned"),
]

KAPPAS = [0.0, 0.3, 1.0]
# (L, n, d): more and fewer rows than features, one and none of each, primes, more layers than pieces of
# apply_, widths that 8 does not divide.
SHAPES = [
    (1, 1, 1),
    (1, 5, 1),
    (2, 0, 3),
    (1, 1, 7),
    (3, 5, 13),
    (2, 13, 5),
    (3, 8, 8),
    (4, 7, 8),
    (5, 2, 17),
    (7, 17, 11),
    (8, 3, 16),
    (9, 31, 19),
    (11, 10, 12),
    (17, 6, 10),
    (1, 40, 37),
    (0, 4, 3),
    (2, 3, 0),
]
FLAT = [(n, d) for L, n, d in SHAPES if L]
HALVES = [torch.bfloat16, torch.float16]


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def randR(*shape, dtype=torch.float64):
    """Matrices near the identity but not symmetric."""
    return torch.eye(shape[-1], dtype=dtype) + 0.3 * randn(*shape, dtype=dtype)


def exact(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def holds_precision(actual, expected, plain):
    """Error at most twice that of plain PyTorch with these dtypes, plus 4 eps of the largest value."""
    assert actual.dtype == plain.dtype
    assert actual.shape == expected.shape
    error, allowed = ((t.double() - expected).abs().max() for t in (actual, plain))
    assert error <= 2 * allowed + 4 * torch.finfo(actual.dtype).eps * expected.abs().max()


# Values in fp64.


@pytest.mark.parametrize(("L", "n", "d"), SHAPES)
def test_transform_of_stacks(L, n, d):
    x, R = randn(L, n, d), randR(L, d, d)
    exact(ops.transform(x, R), reference.transform(x, R))


@pytest.mark.parametrize("shape", [(7,), (5, 7), (0, 7), (2, 3, 7), (2, 0, 7), (2, 3, 4, 7), (3, 1), (4, 0)])
def test_transform_of_any_number_of_dimensions(shape):
    x, R = randn(*shape), randR(shape[-1], shape[-1])
    exact(ops.transform(x, R), torch.einsum("...j,ij->...i", x, R))


@pytest.mark.parametrize(("L", "o", "d"), SHAPES)
def test_fold(L, o, d):
    W, R = randn(L, o, d), randR(L, d, d)
    exact(ops.fold(W, R), reference.fold(W, R))
    for i in range(L):
        exact(ops.fold(W[i], R[i]), torch.einsum("oi,ij->oj", W[i], R[i]))


@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize(("L", "n", "d"), SHAPES)
def test_correlation(L, n, d, kappa):
    z = randn(L, n, d)
    for actual, expected in zip(ops.correlation(z, kappa), reference.correlation(z, kappa), strict=True):
        exact(actual, expected)


@pytest.mark.parametrize("kappa", KAPPAS)
def test_correlation_by_its_definition(kappa):
    z = randn(1, 6, 4)
    M, a = ops.correlation(z, kappa)
    for i in range(4):
        for j in range(4):
            G = sum(z[0, k, i] * z[0, k, j] for k in range(6)) / 6
            exact(M[0, i, j], kappa * (G - 1) if i == j else (1 - kappa) * G)
        exact(a[0, i], z[0, :, i].square().mean())


@pytest.mark.parametrize(("L", "n", "d"), SHAPES)
def test_apply(L, n, d):
    R, M = randR(L, d, d), randn(L, d, d)
    expected = reference.apply(R, M, 0.1)
    assert ops.apply_(R, M, 0.1) is R
    exact(R, expected)


@pytest.mark.parametrize("L", range(1, 20))
@pytest.mark.parametrize("d", [1, 7, 8, 13, 24])
def test_apply_to_any_number_of_layers(L, d):
    R, M = randR(L, d, d), randn(L, d, d)
    expected = torch.stack([r - 0.1 * m @ r for r, m in zip(R, M, strict=True)])
    exact(ops.apply_(R, M, 0.1), expected)


@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize(("L", "n", "d"), SHAPES)
def test_update(L, n, d, kappa):
    R, z = randR(L, d, d), randn(L, n, d)
    expected = reference.update(R, z, 0.1, kappa)
    assert ops.update_(R, z, 0.1, kappa) is R
    exact(R, expected)


@pytest.mark.parametrize("d", [1, 6, 9])
def test_both_associations_of_update_agree(d, monkeypatch):
    z, start = randn(3, 7, d), randR(3, d, d)
    results = []
    for forms in (True, False):
        monkeypatch.setattr("dbpkern.ops.update.forms_correlation", lambda *_, forms=forms, **__: forms)
        results.append(ops.update_(start.clone(), z, 0.1, 0.3))
    exact(*results)
    assert not torch.equal(results[0], start)


@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize(("n", "d"), FLAT)
def test_fused_step(n, d, kappa):
    x, R = randn(n, d), randR(d, d)
    for index in (torch.randperm(n)[: n // 2], torch.arange(n), torch.zeros(min(n, 3), dtype=torch.int64)):
        before = R.clone()
        expected = reference.fused_step(x, R, index, 0.1, kappa)
        for actual, wanted in zip(ops.fused_step(x, R, index, 0.1, kappa), expected, strict=True):
            exact(actual, wanted)
        assert torch.equal(R, before)


@pytest.mark.parametrize("kappa", KAPPAS)
def test_no_samples_change_nothing(kappa):
    R = randR(2, 5, 5)
    before = R.clone()
    ops.update_(R, randn(2, 0, 5), 0.1, kappa)
    assert torch.equal(R, before)
    _, R_new, a = ops.fused_step(randn(4, 5), R[0], torch.empty(0, dtype=torch.int64), 0.1, kappa)
    assert torch.equal(R_new, before[0])
    assert torch.equal(a, torch.zeros(5, dtype=a.dtype))


RATES = {
    "float": lambda L: (0.1, [0.1] * L),
    "integer": lambda L: (1, [1.0] * L),
    "zero": lambda L: (0.0, [0.0] * L),
    "0-d float64": lambda L: (torch.tensor(0.1, dtype=torch.float64), [0.1] * L),
    "0-d float32": lambda L: (torch.tensor(0.125), [0.125] * L),
    "[L] float64": lambda L: ((rate := 0.1 * torch.arange(1, L + 1).double()), rate.tolist()),
    "[L] float32": lambda L: ((rate := 0.125 * torch.arange(1, L + 1)), rate.tolist()),
    "[L] strided": lambda L: ((rate := torch.arange(2 * L).double()[::2] / 10), rate.tolist()),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("L", [1, 3, 8, 9])
@pytest.mark.parametrize("rate", RATES)
def test_rates_of_every_kind(rate, L, dtype):
    lr, rates = RATES[rate](L)
    R, z = randR(L, 6, 6, dtype=dtype), randn(L, 9, 6, dtype=dtype)
    M = ops.correlation(z)[0]
    expected = torch.stack([r - rate * m @ r for r, m, rate in zip(R, M, rates, strict=True)])
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}
    torch.testing.assert_close(ops.apply_(R.clone(), M, lr), expected, **close)
    torch.testing.assert_close(ops.update_(R.clone(), z, lr), expected, **close)
    few = torch.stack(
        [reference.update(r[None], s[None], e)[0] for r, s, e in zip(R, z[:, :4], rates, strict=True)]
    )
    torch.testing.assert_close(ops.update_(R.clone(), z[:, :4], lr), few, **close)
    if L == 1:
        _, R_new, _ = ops.fused_step(z[0], R[0], torch.arange(9), lr)
        again = reference.fused_step(z[0], R[0], torch.arange(9), rates[0])[1]
        torch.testing.assert_close(R_new, again, **close)


# Precision: the plain counterparts use the same dtypes of operands, accumulation and result.


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("L", "n", "d"), [(1, 5, 1), (3, 33, 17), (2, 129, 64)])
def test_precision_of_transform_and_fold(L, n, d, dtype):
    x, R = randn(L, n, d).to(dtype), randR(L, d, d).float()
    holds_precision(ops.transform(x, R), x.double() @ R.double().mT, (x.float() @ R.mT).to(dtype))
    holds_precision(ops.fold(x, R), x.double() @ R.double(), (x.float() @ R).to(dtype))
    for out in (torch.float32, *HALVES):
        holds_precision(ops.fold(x, R, out), x.double() @ R.double(), (x.float() @ R).to(out))


@pytest.mark.parametrize("dtype", HALVES)
def test_results_are_rounded_once(dtype):
    """Beyond the criterion: each element of a half result is the exact one's nearest neighbour, or nearly."""
    x, W, R = randn(40, 24).to(dtype), randn(40, 24).float(), randR(24, 24).float()
    half_ulp = {"rtol": 0.51 * torch.finfo(dtype).eps, "atol": 1e-5}
    for actual, expected in (
        (ops.transform(x, R), x.double() @ R.double().mT),
        (ops.fold(x, R), x.double() @ R.double()),
        (ops.fold(W, R, dtype), W.double() @ R.double()),
        (ops.fused_step(x, R, torch.arange(3), 0.1)[0], x.double() @ R.double().mT),
    ):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, **half_ulp)


@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("L", "n", "d"), [(1, 5, 1), (3, 33, 17), (2, 9, 64), (9, 65, 24)])
def test_precision_of_statistics_and_updates(L, n, d, dtype, kappa):
    z, R = randn(L, n, d).to(dtype), randR(L, d, d).float()
    M, a = reference.correlation(z.double(), kappa)
    plain = reference.correlation(z.float(), kappa)
    for actual, expected, other in zip(ops.correlation(z, kappa), (M, a), plain, strict=True):
        holds_precision(actual, expected, other)
    updated = R.double() - 0.1 * M @ R.double()
    holds_precision(ops.update_(R.clone(), z, 0.1, kappa), updated, R - 0.1 * plain[0] @ R)
    given = R.double() - 0.1 * plain[0].double() @ R.double()
    holds_precision(ops.apply_(R.clone(), plain[0], 0.1), given, R - 0.1 * plain[0] @ R)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("n", "d"), [(5, 1), (33, 17), (40, 64)])
def test_precision_of_fused_step(n, d, dtype):
    x, R, index = randn(n, d).to(dtype), randR(d, d).float(), torch.randperm(n)[: n // 2 + 1]
    expected = reference.fused_step(x.double(), R.double(), index, 0.1, 0.3)
    z = x.float() @ R.mT
    M, a = reference.correlation(z[index][None], 0.3)
    plain = (z.to(dtype), R - 0.1 * M[0] @ R, a[0])
    for parts in zip(ops.fused_step(x, R, index, 0.1, 0.3), expected, plain, strict=True):
        holds_precision(*parts)


def test_wider_samples_than_R_keep_their_precision():
    x, R, index = randn(20, 6), randR(6, 6).float(), torch.arange(5)
    z, R_new, a = ops.fused_step(x, R, index, 0.1)
    exact(z, x @ R.double().mT)
    exact(z, ops.transform(x, R))
    assert R_new.dtype == a.dtype == torch.float32
    updated = ops.update_(R.clone()[None], z[None, :5], 0.1)[0]
    torch.testing.assert_close(R_new, updated)


@pytest.mark.parametrize("n", [4, 20])
def test_half_samples_that_overflow_their_own_dtype(n):
    """Squares of 300 are beyond fp16's 65504: statistics accumulate in fp32."""
    z = torch.full((1, n, 6), 300.0, dtype=torch.float16)
    M, a = ops.correlation(z)
    assert torch.equal(a, torch.full((1, 6), 9e4))
    assert M.isfinite().all()
    R = ops.update_(torch.eye(6)[None].clone(), z, 1e-6)
    torch.testing.assert_close(R, torch.eye(6)[None] - 1e-6 * M, rtol=1e-6, atol=1e-6)


# Layouts. The storage around a view is NaN: reading it poisons the result, writing it is noticed.


def transposed(t):
    base = t.mT.clone(memory_format=torch.contiguous_format)
    return base.mT, base


def sliced(t):
    base = t.new_full([s + 3 for s in t.shape], float("nan"))
    view = base[tuple(slice(2, 2 + s) for s in t.shape)]
    return view.copy_(t), base


def strided(t):
    base = t.new_full([2 * s for s in t.shape], float("nan"))
    view = base[tuple(slice(None, None, 2) for _ in t.shape)]
    return view.copy_(t), base


def layers_last(t):
    base = t.movedim(0, -1).clone(memory_format=torch.contiguous_format)
    return base.movedim(-1, 0), base


LAYOUTS = [transposed, sliced, strided, layers_last]


@pytest.mark.parametrize(("L", "n", "d"), [(3, 5, 13), (2, 13, 5), (9, 10, 8), (1, 3, 2), (9, 4, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, L, n, d):
    def check(actual, expected):
        torch.testing.assert_close(actual, expected, **tolerance)
        assert actual.is_contiguous()

    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    R, z, M = randR(L, d, d, dtype=dtype), randn(L, n, d, dtype=dtype), randn(L, d, d, dtype=dtype)
    (R_, _), (z_, _), (M_, _) = layout(R), layout(z), layout(M)
    assert L == 1 or not R_.is_contiguous()
    check(ops.transform(z_, R_), reference.transform(z, R))
    check(ops.transform(z_[0], R_[0]), reference.transform(z[0], R[0]))
    check(ops.fold(z_, R_), reference.fold(z, R))
    check(ops.fold(z_[0], R_[0]), reference.fold(z[0], R[0]))
    for actual, expected in zip(ops.correlation(z_, 0.3), reference.correlation(z, 0.3), strict=True):
        check(actual, expected)
    index = torch.randperm(2 * n)[::2] % n
    fused = ops.fused_step(z_[0], R_[0], index, 0.1, 0.3)
    for actual, expected in zip(fused, reference.fused_step(z[0], R[0], index, 0.1, 0.3), strict=True):
        check(actual, expected)
    for step, expected in (
        (lambda R: ops.apply_(R, M_, 0.1), reference.apply(R, M, 0.1)),
        (lambda R: ops.update_(R, z_, 0.1, 0.3), reference.update(R, z, 0.1, 0.3)),
    ):
        target, base = layout(R)
        padding = base.isnan()
        torch.testing.assert_close(step(target), expected, **tolerance)
        assert torch.equal(base.isnan(), padding)


@pytest.mark.parametrize("op", [ops.transform, ops.fold])
def test_expanded_inputs(op):
    x, R = randn(1, 1, 6).expand(3, 5, 6), randR(1, 6, 6).expand(3, 6, 6)
    exact(op(x, R), op(x.clone(), R.clone()))


# Autograd.


@pytest.mark.parametrize(
    ("shape", "stack"), [((6,), ()), ((5, 6), ()), ((2, 3, 6), ()), ((3, 4, 6), (3,)), ((0, 6), ())]
)
def test_gradients_of_transform(shape, stack):
    x, R = randn(*shape).requires_grad_(), randR(*stack, 6, 6)
    assert torch.autograd.gradcheck(lambda x: ops.transform(x, R), x)
    assert torch.autograd.gradgradcheck(lambda x: ops.transform(x, R), x)


@pytest.mark.parametrize("stack", [(), (3,)])
def test_gradients_of_fold(stack):
    W, R = randn(*stack, 5, 4).requires_grad_(), randR(*stack, 4, 4)
    assert torch.autograd.gradcheck(lambda W: ops.fold(W, R), W)
    assert torch.autograd.gradgradcheck(lambda W: ops.fold(W, R), W)
    assert torch.autograd.gradcheck(lambda W: ops.fold(W, R.mT), W)


def test_gradients_of_fused_step():
    x, R, index = randn(7, 4).requires_grad_(), randR(4, 4), torch.tensor([5, 1, 2])
    assert torch.autograd.gradcheck(lambda x: ops.fused_step(x, R, index, 0.1, 0.3)[0], x)
    z, R_new, a = ops.fused_step(x, R, index, 0.1)
    assert z.requires_grad
    assert not R_new.requires_grad
    assert not a.requires_grad


def test_R_gets_no_gradient():
    x, R = randn(5, 4).requires_grad_(), randR(4, 4).requires_grad_()
    for op in (ops.transform, ops.fold, lambda x, R: ops.fused_step(x, R, torch.arange(2), 0.1)[0]):
        assert torch.autograd.grad(op(x, R).sum(), (x, R), allow_unused=True)[1] is None


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_come_in_the_dtype_of_the_input(dtype):
    R = randR(4, 4).float()
    x, W = randn(5, 4).to(dtype).requires_grad_(), randn(5, 4).float().requires_grad_()
    g = randn(5, 4).to(dtype)
    (dx,) = torch.autograd.grad(ops.transform(x, R), x, g)
    (dW,) = torch.autograd.grad(ops.fold(W, R, dtype), W, g)
    holds_precision(dx, g.double() @ R.double(), (g.float() @ R).to(dtype))
    holds_precision(dW, g.double() @ R.double().mT, g.float() @ R.mT)


IN_PLACE = {
    "apply_ few layers": (3, lambda R: ops.apply_(R, torch.zeros_like(R), 0.1)),
    "apply_ many layers": (9, lambda R: ops.apply_(R, torch.zeros_like(R), 0.1)),
    "update_ no rows": (2, lambda R: ops.update_(R, R.new_zeros(2, 0, 4), 0.1)),
    "update_ few rows": (2, lambda R: ops.update_(R, R.new_zeros(2, 3, 4), 0.1)),
    "update_ many rows": (2, lambda R: ops.update_(R, R.new_zeros(2, 9, 4), 0.1)),
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_in_place_ops_raise_the_version_and_keep_the_address(case):
    L, step = IN_PLACE[case]
    R = randR(L, 4, 4)
    version, address, part = R._version, R.data_ptr(), R[0]
    step(R)
    assert R._version > version
    assert part._version == R._version
    assert R.data_ptr() == address


@pytest.mark.parametrize("case", IN_PLACE)
def test_autograd_notices_that_a_saved_R_changed(case):
    L, step = IN_PLACE[case]
    R, x = randR(L, 4, 4), randn(L, 2, 4).requires_grad_()
    z = ops.transform(x, R)
    step(R)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


# Registration with torch.library, autocast and compilation.


class Everything:
    """A layer whose rows are its input's."""

    def count_rows(self, x):
        return len(x)

    def take_rows(self, x, index):
        return x.clone() if index is None else x[index]


def lr_(value=0.1):
    return torch.tensor(value, dtype=torch.float64)


OPCHECKS = {
    "transform": lambda g: (randn(3, 5).requires_grad_(g), randR(5, 5)),
    "transform stacked": lambda g: (randn(2, 3, 5).mT.contiguous().mT.requires_grad_(g), randR(2, 5, 5).mT),
    "transform bfloat16": lambda g: (randn(2, 3, 5).bfloat16().requires_grad_(g), randR(5, 5).float()),
    "fold": lambda g: (randn(3, 5).requires_grad_(g), randR(5, 5), torch.float32),
    "fold stacked": lambda g: (randn(2, 3, 5).requires_grad_(g), randR(2, 5, 5).mT, torch.float64),
    "correlation": lambda g: (randn(2, 3, 5).float(), 0.3, True),
    "correlation no rows": lambda g: (randn(2, 0, 5).bfloat16(), 0.0, False),
    "apply_": lambda g: (randR(2, 5, 5), randn(2, 5, 5), lr_()),
    "apply_ many layers": lambda g: (randR(9, 2, 2).mT, randn(9, 2, 2), torch.rand(9).double()),
    "update_ few rows": lambda g: (randR(2, 5, 5), randn(2, 3, 5), lr_(), 0.3),
    "update_ many rows": lambda g: (randR(2, 5, 5), randn(2, 7, 5), lr_(), 0.3),
    "fused_step": lambda g: (randn(6, 5).requires_grad_(g), randR(5, 5), torch.tensor([4, 0]), lr_(), 0.3),
    "fused_step bfloat16": lambda g: (
        randn(6, 5).bfloat16(),
        randR(5, 5).float(),
        torch.tensor([4]),
        lr_(),
        0.0,
    ),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("case", OPCHECKS)
def test_opcheck(case, requires_grad):
    op = getattr(torch.ops.dbpkern, case.split()[0]).default
    automatic = ""
    torch.library.opcheck(op, (*OPCHECKS[case](requires_grad), automatic))


def test_opcheck_of_capture():
    slot = sampling.Slot(Everything(), sampling.Sampler(1.0, 0), lambda: sampling.Rule.of(0.1, 0.0))
    torch.library.opcheck(torch.ops.dbpkern.capture.default, (randn(4, 5), randn(3, 5), slot.key))
    slot.clear()
    grad, x = randn(4, 5), randn(3, 5)
    before = grad.clone()
    torch.ops.dbpkern.capture(grad, x, slot.key)
    assert torch.equal(slot.gather(), x)
    assert torch.equal(grad, before)


def test_capture_for_a_slot_that_is_gone_does_nothing():
    key = sampling.Slot(Everything(), sampling.Sampler(1.0, 0), lambda: sampling.Rule.of(0.1, 0.0)).key
    assert key.item() not in sampling._slots
    torch.ops.dbpkern.capture(randn(4, 5), randn(3, 5), key)


CALLS = {
    "transform": lambda x, R, M, z: ops.transform(x, R[0]),
    "transform stacked": lambda x, R, M, z: ops.transform(z, R),
    "fold": lambda x, R, M, z: ops.fold(x, R[0]),
    "fold to bfloat16": lambda x, R, M, z: ops.fold(x, R[0], torch.bfloat16),
    "correlation": lambda x, R, M, z: ops.correlation(z, 0.3),
    "apply_": lambda x, R, M, z: ops.apply_(R, M, 0.1),
    "apply_ tensor rate": lambda x, R, M, z: ops.apply_(R, M, M.new_full((len(M),), 0.1)),
    "update_ many rows": lambda x, R, M, z: ops.update_(R, z, 0.1, 0.3),
    "update_ few rows": lambda x, R, M, z: ops.update_(R, z[:, :3], 0.1),
    "fused_step": lambda x, R, M, z: ops.fused_step(x, R[0], torch.arange(4), 0.1, 0.3),
}


def arguments(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (9, 6), "R": (3, 6, 6), "M": (3, 6, 6), "z": (3, 8, 6)}
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def equal(one, other):
    pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", CALLS)
def test_autocast_changes_nothing(case, dtype):
    plain = CALLS[case](**arguments())
    with torch.autocast("cpu", dtype):
        assert equal(CALLS[case](**arguments()), plain)


@pytest.mark.parametrize("op", [ops.transform, ops.fold])
def test_autocast_changes_no_gradient(op):
    x, R = randn(5, 4).float().requires_grad_(), randR(4, 4).float()
    (plain,) = torch.autograd.grad(op(x, R).square().sum(), x)
    with torch.autocast("cpu", torch.bfloat16):
        y = op(x, R)
        assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], plain)


@pytest.mark.parametrize("case", CALLS)
def test_compiles_to_one_graph(case):
    compiled = torch.compile(CALLS[case], fullgraph=True, backend="aot_eager")
    inputs, again = arguments(), arguments()
    assert equal(compiled(**inputs), CALLS[case](**again))
    assert torch.equal(inputs["R"], again["R"])


def test_rates_may_change_from_call_to_call_of_a_compiled_step():
    compiled = torch.compile(ops.apply_, fullgraph=True, backend="aot_eager")
    for lr in (0.1, 0.2, 0.3, torch.tensor(0.4)):
        R, M = randR(2, 5, 5), randn(2, 5, 5)
        exact(compiled(R.clone(), M, lr), reference.apply(R, M, lr))


def test_gradients_through_compiled_ops():
    def loss(x, W, R):
        z, _, _ = ops.fused_step(x, R, torch.arange(3), 0.1)
        return (ops.transform(z, R) @ ops.fold(W, R).mT).square().sum()

    x, W, R = randn(7, 4).requires_grad_(), randn(3, 4).requires_grad_(), randR(4, 4)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        torch.autograd.grad(compiled(x, W, R), (x, W)),
        torch.autograd.grad(loss(x, W, R), (x, W)),
        strict=True,
    ):
        exact(actual, expected)


# Costs.


def peak(function) -> int:
    """Most bytes that were allocated at a time while `function` ran, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    held = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_the_measure_of_scratch_sees_what_is_allocated():
    assert peak(lambda: torch.zeros(1000).add(1).sum()) >= 8000


@pytest.mark.parametrize(
    ("L", "d"), [(1, 64), (1, 71), (3, 64), (7, 24), (8, 16), (9, 16), (15, 16), (17, 16), (24, 16)]
)
def test_scratch_of_apply_is_an_eighth_of_R(L, d):
    R, M, lr = randR(L, d, d).float(), randn(L, d, d).float(), torch.tensor(0.1)
    ops.apply_(R, M, lr)
    assert 0 < peak(lambda: ops.apply_(R, M, lr)) <= R.nbytes / 8 + 16  # 16: the rate itself


def test_updates_from_few_rows_form_no_square_matrix():
    R, z, lr = randR(2, 128, 128).float(), randn(2, 4, 128).float(), torch.tensor(0.1)
    ops.update_(R, z, lr)
    assert 0 < peak(lambda: ops.update_(R, z, lr)) < R[0].nbytes / 2


FLOPS = {
    "transform": (lambda: ops.transform(randn(2, 3, 5), randR(5, 5)), 2 * 6 * 25),
    "transform one row": (lambda: ops.transform(randn(5), randR(5, 5)), 2 * 25),
    "transform stacked": (lambda: ops.transform(randn(2, 3, 5), randR(2, 5, 5)), 2 * 6 * 25),
    "fold": (lambda: ops.fold(randn(3, 5), randR(5, 5)), 2 * 3 * 25),
    "fold stacked": (lambda: ops.fold(randn(2, 3, 5), randR(2, 5, 5)), 2 * 6 * 25),
    "correlation": (lambda: ops.correlation(randn(2, 3, 5)), 2 * 6 * 25),
    "apply_": (lambda: ops.apply_(randR(2, 5, 5), randn(2, 5, 5), 0.1), 2 * 2 * 125),
    "update_ few rows": (lambda: ops.update_(randR(2, 5, 5), randn(2, 3, 5), 0.1), 2 * 4 * 3 * 25),
    "update_ many rows": (
        lambda: ops.update_(randR(2, 5, 5), randn(2, 9, 5), 0.1),
        2 * (2 * 9 * 25 + 2 * 125),
    ),
    "fused_step few rows": (
        lambda: ops.fused_step(randn(7, 5), randR(5, 5), torch.arange(3), 0.1),
        2 * 7 * 25 + 4 * 3 * 25,
    ),
    "fused_step many rows": (
        lambda: ops.fused_step(randn(7, 5), randR(5, 5), torch.arange(6), 0.1),
        2 * 7 * 25 + 2 * 6 * 25 + 2 * 125,
    ),
}


@pytest.mark.parametrize("case", FLOPS)
def test_flops_are_counted(case):
    call, expected = FLOPS[case]
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == expected


def test_flops_of_the_backward_are_counted():
    x, W, R = randn(7, 5).requires_grad_(), randn(3, 5).requires_grad_(), randR(5, 5)
    with FlopCounterMode(display=False) as counter:
        (ops.transform(x, R).sum() + ops.fold(W, R).sum()).backward()
    assert counter.get_total_flops() == 2 * (2 * 7 * 25 + 2 * 3 * 25)


# Refusals.

NAN, INF = float("nan"), float("inf")
INDEX = torch.arange(2)
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
    (lambda R: ops.apply_(R[0], R[0], 0.1), ValueError, r"R: expected shape \[L, d, d\], got \[4, 4\]"),
    (lambda R: ops.apply_(R[:, :3], R[:, :3], 0.1), ValueError, "R: expected shape .* with d = 4"),
    (
        lambda R: ops.apply_(R, R[:1], 0.1),
        ValueError,
        r"M: expected the shape of R \[2, 4, 4\], got \[1, 4, 4\]",
    ),
    (
        lambda R: ops.apply_(R, R.double(), 0.1),
        TypeError,
        "equal dtypes, got R torch.float32, M torch.float64",
    ),
    (lambda R: ops.apply_(R.half(), R.half(), 0.1), TypeError, "R: expected float32 or float64"),
    (lambda R: ops.apply_(R, R.to("meta"), 0.1), ValueError, "one device, got R on cpu, M on meta"),
    *(
        (lambda R, e=e: ops.apply_(R, R.clone(), e), ValueError, "lr: expected a finite number >= 0, got")
        for e in (-1e-9, NAN, INF, -INF)
    ),
    (lambda R: ops.apply_(R, R.clone(), torch.ones(3)), ValueError, r"lr: .* L = 2, got \[3\]"),
    (lambda R: ops.apply_(R, R.clone(), torch.ones(2, 1)), ValueError, r"lr: .* got \[2, 1\]"),
    (lambda R: ops.apply_(R, R.clone(), torch.tensor(1)), TypeError, "lr: .* got torch.int64"),
    (
        lambda R: ops.apply_(R, R.clone(), torch.ones(2, device="meta")),
        ValueError,
        "lr: .* on cpu, .* got meta",
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
        (lambda R, e=e: ops.update_(R, R.clone(), e), ValueError, "lr: expected a finite")
        for e in (-1, NAN, INF)
    ),
    *(
        (lambda R, k=k: ops.update_(R, R.clone(), 0.1, k), ValueError, "kappa: expected")
        for k in (-1, 2, NAN)
    ),
    (lambda R: ops.update_(R, R.clone(), torch.ones(1)), ValueError, r"lr: .* got \[1\]"),
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
    (lambda R: ops.fused_step(R[0], R[0], INDEX, NAN), ValueError, "lr: expected a finite number"),
    (lambda R: ops.fused_step(R[0], R[0], INDEX, torch.ones(2)), ValueError, r"lr: .* got \[2\]"),
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
