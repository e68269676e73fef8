"""The Triton kernels against fp64: on a GPU where there is one, otherwise in Triton's interpreter."""

import itertools
import os
import random
import subprocess
import sys

import pytest
import torch
from torch import nn

from dbpkern import DecorSGD, decorrelate, ops, reference
from dbpkern.ops import _dispatch, _pipeline, _triton
from dbpkern.ops._dispatch import Operands, Tiles
from dbpkern.ops._matmul import matmul
from dbpkern.ops._triton import tl

apply = sys.modules["dbpkern.ops.apply"]
correlation_triangle_position = sys.modules["dbpkern.ops.correlation"].triangle_position
fused = sys.modules["dbpkern.ops.fused_step"]
update = sys.modules["dbpkern.ops.update"]

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# (L, n, d): one and none of each, primes, fewer and more samples than features, widths beside the tiles'.
SHAPES = [
    (1, 1, 1),
    (2, 0, 5),
    (1, 5, 7),
    (2, 35, 33),
    (1, 20, 50),
    (0, 4, 3),
    (2, 3, 0),
]
# Few, because the interpreter takes its time.
RULES = [(torch.float32, 0.0), (torch.float32, 1.0), (torch.bfloat16, 0.3), (torch.float16, 0.0)]

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that small matrices have several, of every kind of operands."""
    monkeypatch.setattr(_dispatch, "tiles", lambda *_: Tiles(16, 16, 16, 4, 2))


def tensor(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)


def matrix(*shape):
    """Matrices near the identity, not symmetric."""
    return torch.eye(shape[-1], device=DEVICE) + 0.1 * tensor(*shape)


def operand(x, kind: Operands):
    """x as it enters a product, in fp32."""
    return x.to(kind.dtype).float()


def held(kind: Operands):
    """The operands of the product with M, for whose squares fp16 has no range."""
    return Operands(torch.bfloat16, "ieee") if kind.dtype == torch.float16 else kind


def as_good(actual, exact, peer):
    """The error is at most twice that of PyTorch with the same dtypes, and 4 units in the last place."""
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return
    error = (actual.double() - exact).abs().max()
    allowed = 2 * (peer.double() - exact).abs().max()
    allowed += 4 * torch.finfo(actual.dtype).eps * exact.abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"  # false for NaN


# ---- products


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("L", "n", "d"), SHAPES)
def test_transform(small_tiles, L, n, d, dtype):
    x, R = tensor(L, n, d, dtype=dtype), matrix(L, d, d)
    kind = _dispatch.operands(dtype, R.dtype)
    z = ops.transform(x, R, backend="triton")
    assert z.dtype == dtype
    as_good(z, x.double() @ R.mT.double(), (operand(x, kind) @ operand(R, kind).mT).to(dtype))


def test_transform_of_rows_of_any_shape(small_tiles):
    x, R = tensor(3, 5, 2, 19, dtype=torch.bfloat16), matrix(19, 19)
    kind = _dispatch.operands(x.dtype)
    as_good(
        ops.transform(x, R, backend="triton"),
        reference.transform(x.double(), R.double()),
        (operand(x, kind) @ operand(R, kind).mT).to(x.dtype),
    )


@pytest.mark.parametrize("out", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("o", "d"), [(1, 1), (5, 7), (0, 3), (33, 65), (48, 32)])
def test_fold(small_tiles, o, d, dtype, out):
    if {dtype, out} == {torch.float16, torch.bfloat16}:
        with pytest.raises(ValueError, match="does not mix float16 and bfloat16"):
            ops.fold(tensor(o, d, dtype=dtype), matrix(d, d), out, backend="triton")
        return
    W, R = tensor(o, d, dtype=dtype), matrix(d, d)
    kind = _dispatch.operands(dtype, R.dtype, out=out)
    folded = ops.fold(W, R, out, backend="triton")
    assert folded.dtype == out
    as_good(folded, W.double() @ R.double(), (operand(W, kind) @ operand(R, kind)).to(out))


def test_fold_of_stacks_and_views(small_tiles):
    W, R = tensor(3, 40, 2 * 21)[..., ::2], matrix(3, 21, 21).mT
    exact = W.double() @ R.double()
    as_good(ops.fold(W, R, backend="triton"), exact, W @ R)
    W = tensor(21, 40).T
    as_good(ops.fold(W, R[0], backend="triton"), W.double() @ R[0].double(), W @ R[0])


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
def test_gradients_go_through_the_kernel(small_tiles, out):
    W, R = tensor(24, 19).requires_grad_(), matrix(19, 19)
    grad = tensor(24, 19, dtype=out)
    kind = _dispatch.operands(out, R.dtype)
    with _triton.recording() as launches:
        ops.fold(W, R, out, backend="triton").backward(grad)
    assert [launch.kernel.__name__ for launch in launches] == ["matmul_kernel"] * 2
    (dW,) = torch.autograd.grad(ops.fold(W, R, out, backend="triton"), W, grad)
    as_good(dW, grad.double() @ R.mT.double(), operand(grad, kind) @ operand(R, kind).mT)
    x = tensor(30, 19, dtype=out).requires_grad_()
    dz = tensor(30, 19, dtype=out)
    (dx,) = torch.autograd.grad(ops.transform(x, R, backend="triton"), x, dz)
    as_good(dx, dz.double() @ R.double(), (operand(dz, kind) @ operand(R, kind)).to(out))


def test_offsets_beyond_32_bits():
    # Pages that nobody touches take no memory.
    far = 2**31 + 16
    torch.use_deterministic_algorithms(False)  # or torch.empty would fill them all
    room = torch.empty(far + 2**12, dtype=torch.bfloat16, device=DEVICE)
    a = room.as_strided((2, 20, 24), (far, 24, 1))
    a.copy_(torch.randn(2, 20, 24))
    kind = _dispatch.operands(a.dtype)
    R = matrix(2, 24, 24)
    z = matmul(a, R, torch.float32, kind, Tiles(16, 16, 16, 4, 2))
    as_good(z, a.double() @ R.double(), (a.float() @ operand(R, kind)))
    M, _ = ops.correlation(a, backend="triton")
    as_good(M, reference.correlation(a.double())[0], reference.correlation(a.float())[0])


def test_strides_beyond_the_reach_of_a_tile():
    torch.use_deterministic_algorithms(False)
    room = torch.empty(2**28 * 16 + 5, dtype=torch.bfloat16, device=DEVICE)
    x = room.as_strided((17, 5), (2**28, 1))
    x.copy_(torch.randn(17, 5))
    R = matrix(5, 5)
    kind = _dispatch.operands(x.dtype)
    z = ops.transform(x, R, backend="triton")
    as_good(z, x.double() @ R.mT.double(), (operand(x, kind) @ operand(R, kind).mT).to(x.dtype))
    M, _ = ops.correlation(x[None], backend="triton")
    as_good(M, reference.correlation(x[None].double())[0], reference.correlation(x[None].float())[0])


# ---- statistics


@pytest.mark.parametrize(("dtype", "kappa"), RULES)
@pytest.mark.parametrize(("L", "n", "d"), SHAPES)
def test_correlation(small_tiles, L, n, d, dtype, kappa):
    z = tensor(L, n, d, dtype=dtype)
    M, a, loss = ops.correlation(z, kappa, loss=True, backend="triton")
    exact, exact_a = reference.correlation(z.double(), kappa)
    peer, peer_a = reference.correlation(z.float(), kappa)
    as_good(M, exact, peer)
    as_good(a, exact_a, peer_a)
    if d:
        as_good(loss, reference.loss(z.double(), kappa), reference.loss(z.float(), kappa))
    assert torch.equal(M, M.mT)
    again, _ = ops.correlation(z, kappa, backend="triton")
    assert torch.equal(M, again)


@pytest.mark.parametrize("loss", [False, True])
def test_correlation_of_views(small_tiles, loss):
    z = tensor(21, 50, 4, dtype=torch.bfloat16).permute(2, 1, 0)[::2]
    found = ops.correlation(z, 0.3, loss, backend="triton")
    assert len(found) == 2 + loss
    as_good(found[0], reference.correlation(z.double(), 0.3)[0], reference.correlation(z.float(), 0.3)[0])


@_triton.jit
def triangle_kernel(places, found, COUNT: tl.constexpr):
    p = tl.load(places + tl.arange(0, COUNT))
    row, column = correlation_triangle_position(p)
    tl.store(found + tl.arange(0, COUNT) * 2, row)
    tl.store(found + tl.arange(0, COUNT) * 2 + 1, column)


def test_tiles_of_the_triangle_are_counted_without_gaps():
    # The index is a rounded square root: first and last of each row, up to 1,024 tiles a side.
    rows = torch.arange(1024, dtype=torch.int32, device=DEVICE)
    first = rows * (rows + 1) // 2
    for places, columns in ((first, rows * 0), (first + rows, rows)):
        found = torch.empty(1024, 2, dtype=torch.int32, device=DEVICE)
        _triton.launch(triangle_kernel, (1,), {"places": places, "found": found}, {"COUNT": 1024}, 4, 1)
        assert torch.equal(found, torch.stack([rows, columns], 1))


# ---- the update of R


def rates(L):
    return [0.01, torch.tensor(0.02), torch.rand(2 * L, device=DEVICE)[::2] / 50]


@pytest.mark.parametrize("rate", range(3))
@pytest.mark.parametrize(("L", "d"), [(1, 1), (1, 5), (2, 33), (9, 20), (0, 3), (2, 0)])
def test_apply(small_tiles, L, d, rate):
    R, M, lr = matrix(L, d, d), tensor(L, d, d).mT, rates(L)[rate]
    old, address, version = R.clone(), R.data_ptr(), R._version
    assert ops.apply_(R, M, lr, backend="triton") is R
    eta = torch.as_tensor(lr, dtype=torch.float64, device=DEVICE).expand(L)[:, None, None]
    exact = old.double() - eta * (M.double() @ old.double())
    as_good(R, exact, old - eta.float() * (M @ old))
    assert R.data_ptr() == address
    assert R._version > version


@pytest.mark.parametrize(("dtype", "kappa"), RULES)
@pytest.mark.parametrize(("L", "n", "d"), SHAPES)
@pytest.mark.parametrize("forms", [False, True])
def test_update(small_tiles, monkeypatch, forms, L, n, d, dtype, kappa):
    monkeypatch.setattr(update, "forms_correlation", lambda *_, **__: forms)
    monkeypatch.setattr(update, "layers_in_ring", lambda *_: 1)
    R, z = matrix(L, d, d), tensor(L, n, d, dtype=dtype)
    old, version = R.clone(), R._version
    ops.update_(R, z, 0.05, kappa, backend="triton")
    kind = _dispatch.operands(dtype)
    exact = reference.update(old.double(), z.double(), 0.05, kappa)
    if dtype == torch.float32:
        peer = reference.update(old, z, 0.05, kappa)
    elif forms:
        M = reference.correlation(z.float(), kappa)[0]
        peer = old - 0.05 * (operand(M, held(kind)) @ operand(old, held(kind)))
    elif n:
        zR = operand(operand(z, kind) @ operand(old, kind), kind)
        a = z.float().square().mean(1)[..., None]
        diagonal = (kappa * (a - 1) - (1 - kappa) * a) * old
        peer = old - 0.05 * ((1 - kappa) / n * (z.float().mT @ zR) + diagonal)
    else:
        peer = old
    as_good(R, exact, peer)
    if R.numel() and n:
        assert R._version > version


@pytest.mark.parametrize("rate", range(3))
@pytest.mark.parametrize("n", [9, 30])
def test_update_with_any_rate_and_strides(small_tiles, n, rate):
    L, d = 5, 20
    R, z, lr = matrix(L, d, d), tensor(d, n, L).permute(2, 1, 0), rates(L)[rate]
    expected = ops.update_(R.clone(), z, lr, 0.3, backend="eager")
    torch.testing.assert_close(ops.update_(R, z, lr, 0.3, backend="triton"), expected)


def test_update_takes_either_way(small_tiles):
    for n, kernel in ((9, "associate_kernel"), (90, "form_kernel")):
        with _triton.recording() as launches:
            ops.update_(matrix(16, 35, 35), tensor(16, n, 35), 0.1, backend="triton")
        assert [launch.kernel.__name__ for launch in launches] == [kernel]


# The stacks of ViT-B, L and H: layers, width, samples, dtype.
STACKS = [
    (37, 768, 1280, torch.bfloat16),
    (12, 3072, 1280, torch.bfloat16),
    (12, 3072, 5120, torch.bfloat16),
    (24, 4096, 1280, torch.bfloat16),
    (97, 1280, 320, torch.float32),
    (12, 3072, 1280, torch.float32),
]


@pytest.mark.parametrize(("L", "d", "n", "dtype"), STACKS)
@pytest.mark.parametrize("architecture", _dispatch.architectures())
def test_scratch_is_an_eighth_of_R(L, d, n, dtype, architecture):
    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    R = meta(L, d, d)
    with _dispatch.assume(architecture), _triton.recording() as launches:
        apply.triton_apply(R, meta(L, d, d), meta())
        update.triton_update(R, meta(L, n, d, dtype=dtype), meta(), 0.0)
    assert len(launches) == 2
    for launch in launches:
        scratch = sum(launch.args[name].nbytes for name in ("ring", "Ms") if name in launch.args)
        assert scratch <= R.nbytes / 8


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("forms", [False, True])
def test_nothing_draws_R_when_the_samples_are_white(small_tiles, monkeypatch, forms, dtype):
    """G = I and M = 0: R stays, though 16-bit operands know it by its rounded value alone."""
    monkeypatch.setattr(update, "forms_M", lambda *_: forms)
    monkeypatch.setattr(update, "layers_in_ring", lambda *_: 1)
    R = (1.003 * torch.eye(16, device=DEVICE) + 0.0017).repeat(2, 1, 1)
    z = (16 * torch.linalg.qr(tensor(2, 256, 16)).Q).to(dtype)
    expected = ops.update_(R.clone(), z, 1.0, backend="eager")
    for _ in range(5):  # as many as one long one
        ops.update_(R, z, 0.2, backend="triton")
    # Rounding scatters, but draws to no side: 1.0047 would be drawn to 1.0039, halfway between two bf16.
    torch.testing.assert_close(R, expected, rtol=0, atol=6e-4)
    assert (R - expected).diagonal(dim1=1, dim2=2).mean().abs() < 1e-4


@pytest.mark.parametrize("size", [400.0, 1e-4])
@pytest.mark.parametrize("forms", [False, True])
def test_squares_beyond_the_range_of_fp16(small_tiles, monkeypatch, forms, size):
    monkeypatch.setattr(update, "forms_M", lambda *_: forms)
    monkeypatch.setattr(update, "layers_in_ring", lambda *_: 1)
    z = (size * tensor(2, 40, 20)).half()
    lr = 0.05 / size**2
    start = matrix(2, 20, 20)
    expected = ops.update_(start.clone(), z, lr, backend="eager")
    found = ops.update_(start.clone(), z, lr, backend="triton")
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    assert (found - start).abs().max() > 1e-2
    on_chip = ops.fused_step(z[0], start[0], torch.arange(40, device=DEVICE), lr, backend="triton")[1]
    assert on_chip.isfinite().all()
    assert (on_chip - start[0]).abs().max() > 1e-2


def test_the_fold_of_an_identity_is_the_rounded_weight(small_tiles):
    W, R = tensor(40, 24), torch.eye(24, device=DEVICE)
    for out in FLOATS:
        assert torch.equal(ops.fold(W, R, out, backend="triton"), W.to(out))
    x = tensor(9, 24, dtype=torch.bfloat16)
    assert torch.equal(ops.transform(x, R, backend="triton"), x)


def test_a_16_bit_M_is_the_operand(small_tiles):
    R, M = matrix(2, 33, 33), tensor(2, 33, 33, dtype=torch.bfloat16)
    old, kind = R.clone(), _dispatch.operands(torch.bfloat16)
    ops.apply_(R, M, 0.05, backend="triton")
    exact = old.double() - 0.05 * (M.double() @ old.double())
    as_good(R, exact, old - 0.05 * (M.float() @ operand(old, kind)))
    torch.testing.assert_close(ops.apply_(old.clone(), M, 0.05), exact.float())


# ---- one step in one launch


FUSED = [(5, 2, 7), (40, 13, 20), (35, 10, 33), (3, 3, 1)]


@pytest.mark.parametrize(("dtype", "kappa"), RULES[1:])
@pytest.mark.parametrize("on_chip", [True, False])
@pytest.mark.parametrize(("n", "samples", "d"), FUSED)
def test_fused_step(small_tiles, monkeypatch, n, samples, d, on_chip, dtype, kappa):
    monkeypatch.setattr(fused, "ON_CHIP", dict.fromkeys(fused.ON_CHIP, 128 if on_chip else 0))
    x, R = tensor(n, 2 * d, dtype=dtype)[:, ::2], matrix(d, d).mT
    index = torch.randperm(n, device=DEVICE)[:samples]
    found = ops.fused_step(x, R, index, 0.05, kappa, backend="triton")
    kind = _dispatch.operands(dtype)
    z = (operand(x, kind) @ operand(R, kind).mT).to(dtype)
    sample = z[index].float()
    M, a = reference.correlation(sample[None], kappa)
    if on_chip:
        MR = operand(M[0], held(kind)) @ operand(R, held(kind))
    else:
        zR = operand(sample @ operand(R, kind), kind)
        diagonal = kappa * (a[0] - 1) - (1 - kappa) * a[0]
        MR = (1 - kappa) / samples * (sample.T @ zR) + diagonal[:, None] * R
    peers = (z, R - 0.05 * MR, a[0])
    exact = reference.fused_step(x.double(), R.double(), index, 0.05, kappa)
    for actual, expected, peer in zip(found, exact, peers, strict=True):
        as_good(actual, expected, peer)
    assert found[0].dtype == dtype


@pytest.mark.parametrize(
    ("n", "samples", "d", "kernels"),
    [
        (40, 4, 64, ["on_chip_kernel"]),
        (40, 4, 200, ["pipeline_kernel"]),
        (400, 140, 200, ["matmul_kernel", "correlation_kernel", "apply_kernel"]),
    ],
)
def test_launches_of_fused_step(n, samples, d, kernels):
    x, index = tensor(n, d, dtype=torch.bfloat16), torch.arange(samples, device=DEVICE)
    with _triton.recording() as launches:
        ops.fused_step(x, matrix(d, d), index, 0.1, backend="triton")
    assert [launch.kernel.__name__ for launch in launches] == kernels


@pytest.mark.parametrize("on_chip", [True, False])
@pytest.mark.parametrize("wrong", [-1, 40])
def test_fused_step_with_an_index_out_of_range(small_tiles, monkeypatch, on_chip, wrong):
    monkeypatch.setattr(fused, "ON_CHIP", dict.fromkeys(fused.ON_CHIP, 128 if on_chip else 0))
    x, R = tensor(40, 20), matrix(20, 20)
    index = torch.tensor([3, wrong, 5], device=DEVICE)
    z, new, a = ops.fused_step(x, R, index, 0.1, backend="triton")
    torch.testing.assert_close(z, x @ R.T)
    assert new.isnan().all()
    assert a.isnan().all()


def test_fused_step_without_samples_and_its_gradient(small_tiles):
    x, R = tensor(9, 20).requires_grad_(), matrix(20, 20)
    none = torch.arange(0, device=DEVICE)
    z, new, a = ops.fused_step(x, R, none, 0.1, backend="triton")
    assert torch.equal(new, R)
    assert not a.any()
    z, *_ = ops.fused_step(x, R, torch.arange(3, device=DEVICE), 0.1, backend="triton")
    dz = tensor(9, 20)
    (dx,) = torch.autograd.grad(z, x, dz)
    torch.testing.assert_close(dx, dz @ R)


# ---- registration


def lr_():
    return torch.tensor(0.1)


OPCHECKS = {
    "transform": lambda: (tensor(6, 5, dtype=torch.bfloat16).requires_grad_(), matrix(5, 5).mT),
    "fold": lambda: (tensor(2, 6, 5).requires_grad_(), matrix(2, 5, 5), torch.bfloat16),
    "correlation": lambda: (tensor(2, 6, 5), 0.3, True),
    "apply_": lambda: (matrix(2, 5, 5), tensor(2, 5, 5), torch.rand(2, device=DEVICE)),
    "update_": lambda: (matrix(2, 5, 5), tensor(2, 6, 5), lr_(), 0.3),
    "fused_step": lambda: (
        tensor(6, 5).requires_grad_(), matrix(5, 5), torch.tensor([4, 0], device=DEVICE), lr_(), 0.3
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("default:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("op", OPCHECKS)
def test_opcheck(small_tiles, op):
    torch.library.opcheck(getattr(torch.ops.dbpkern, op).default, (*OPCHECKS[op](), "triton"))


def test_a_compiled_graph_calls_the_kernels(small_tiles):
    W, R, z = tensor(24, 20).requires_grad_(), matrix(20, 20), tensor(2, 9, 20)
    stack = matrix(2, 20, 20)

    def work(W, R, stack, z):
        folded = ops.fold(W, R, backend="triton")
        ops.update_(stack, z, 0.05, backend="triton")
        return folded.square().sum() + ops.correlation(z, loss=True, backend="triton")[2].sum()

    loss = work(W, R, expected := stack.clone(), z)
    (expected_grad,) = torch.autograd.grad(loss, W)
    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    again = compiled(W, R, stack, z)
    (grad,) = torch.autograd.grad(again, W)
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(grad, expected_grad)
    torch.testing.assert_close(stack, expected)


# ---- the order of work in one launch


SCHEDULES = {
    "apply_": lambda: _pipeline.strip_schedule(3, 4, 4, 2, 4),
    "apply_, one slot": lambda: _pipeline.strip_schedule(2, 3, 3, 3, 1),
    "apply_, odd": lambda: _pipeline.strip_schedule(1, 7, 7, 7, 3),
    "update_, M formed": lambda: update.form_schedule(9, 4, 4, 6),
    "update_, M formed in one place": lambda: update.form_schedule(3, 3, 1, 2),
    "update_, M formed in two places": lambda: update.form_schedule(5, 3, 2, 2),
    "update_, associated": lambda: _pipeline.strip_schedule(4, 2, 4, 2, 5),
    "update_, associated in one slot": lambda: _pipeline.strip_schedule(2, 5, 2, 2, 1),
    "fused_step": lambda: fused.fused_schedule(5, 2, 4, 2),
}


def parse(items):
    for kind, layer, row, column, slot, a, n_a, b, n_b, *raised in items:
        waits = [(counter, count) for counter, count in ((a, n_a), (b, n_b)) if count]
        yield (kind, layer, row, column, slot), waits, [counter for counter in raised if counter]


@pytest.mark.parametrize("case", SCHEDULES)
def test_items_wait_for_earlier_items_alone(case):
    schedule = SCHEDULES[case]()
    raised = [0] * schedule.counters
    total = [0] * schedule.counters
    work = list(parse(schedule.items))
    for _, _, counters in work:
        for counter in counters:
            total[counter] += 1
    for _, waits, counters in work:
        for counter, count in waits:
            # All who raise it come before, so that it is reached, and not by some of them alone.
            assert raised[counter] == count == total[counter]
        for counter in counters:
            raised[counter] += 1
    assert len({item for item, _, _ in work}) == len(work)


@pytest.mark.parametrize("workers", [1, 3, 16])
@pytest.mark.parametrize("case", [case for case in SCHEDULES if case != "fused_step"])
def test_slots_are_overwritten_only_when_they_were_read(case, workers):
    """Run the items on workers of random speed, and watch what lies in the slots."""
    schedule = SCHEDULES[case]()
    chance = random.Random(workers)
    pending = iter(parse(schedule.items))
    counters = [0] * schedule.counters
    first, last = (1, 2) if "M formed" in case else (0, 1)  # who fills a strip's slot, who reads it
    content: dict[int, tuple] = {}
    readers: dict[int, int] = {}
    running = []
    done = 0
    while True:
        while len(running) < workers and (work := next(pending, None)) is not None:
            running.append([*work, False])
        if not running:
            break
        chance.shuffle(running)
        for entry in running:
            (kind, layer, _, column, slot), waits, raised, started = entry
            if not started:
                if any(counters[counter] < count for counter, count in waits):
                    continue
                entry[3] = True
                if kind == first:
                    assert not readers.get(slot)
                    content[slot] = (layer, column)
                elif kind == last:
                    assert content[slot] == (layer, column)
                    readers[slot] = readers.get(slot, 0) + 1
            else:
                if kind == last:
                    assert content[slot] == (layer, column)
                    readers[slot] -= 1
                for counter in raised:
                    counters[counter] += 1
                running.remove(entry)
                done += 1
            break
        else:
            pytest.fail("every worker waits")
    assert done == len(schedule.items)


@pytest.mark.parametrize(("L", "rows", "columns"), [(3, 4, 2), (1, 2, 2)])
def test_every_tile_of_R_is_updated_once(L, rows, columns):
    everywhere = set(itertools.product(range(L), range(rows), range(columns)))
    schedule = _pipeline.strip_schedule(L, 3, rows, columns, 3)
    assert {item[1:4] for item in schedule.items if item[0] == _pipeline.FINISH} == everywhere
    schedule = update.form_schedule(L, rows, 1, 3)
    tiles = {item[1:3] for item in schedule.items if item[0] == update.GRAM}
    assert tiles == set(itertools.product(range(L), range(rows * (rows + 1) // 2)))


def test_schedule_tables():
    schedule = _pipeline.Schedule()
    counter = schedule.counter()
    schedule.add(1, 2, 3, 4, 5, ((counter, 6),), (counter,))
    table, length = schedule.tables(torch.device("cpu"))
    assert table.tolist() == [[1, 2, 3, 4, 5, counter, 6, 0, 0, counter, 0]]
    assert length == schedule.counters + 1
    assert _pipeline.Schedule().tables(torch.device("cpu"))[0].shape == (0, _pipeline.FIELDS)


# ---- the choice of backend


CALLS = {
    "transform": (ops.transform, lambda: (tensor(6, 4), matrix(4, 4))),
    "fold": (ops.fold, lambda: (tensor(6, 4), matrix(4, 4))),
    "correlation": (ops.correlation, lambda: (tensor(1, 6, 4),)),
    "apply_": (ops.apply_, lambda: (matrix(1, 4, 4), tensor(1, 4, 4), 0.1)),
    "update_": (ops.update_, lambda: (matrix(1, 4, 4), tensor(1, 6, 4), 0.1)),
    "fused_step": (
        ops.fused_step,
        lambda: (tensor(6, 4), matrix(4, 4), torch.arange(2, device=DEVICE), 0.1),
    ),
}


def call(op, **kwargs):
    function, arguments = CALLS[op]
    return function(*arguments(), **kwargs)


def launched(op, **kwargs):
    with _triton.recording() as launches:
        call(op, **kwargs)
    return bool(launches)


@pytest.mark.parametrize("op", CALLS)
def test_backends_by_name(op, monkeypatch):
    assert launched(op, backend="triton")
    assert not launched(op, backend="eager")
    assert not launched(op)  # so small that the table does not ask for it
    monkeypatch.setenv("DBPKERN_BACKEND", "triton")
    assert launched(op)
    monkeypatch.setenv("DBPKERN_BACKEND", "cuda")  # no such backend for these ops: eager serves
    assert not launched(op)
    monkeypatch.setenv("DBPKERN_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"expected None or one of .*'eager'.* got 'fast'"):
        call(op)


@pytest.mark.parametrize("op", CALLS)
def test_backends_that_do_not_exist(op):
    with pytest.raises(ValueError, match=r"backend: expected None or one of .* got 'fast'"):
        call(op, backend="fast")
    with pytest.raises(ValueError, match=f"{op}: no backend 'cuda'; there are eager, triton"):
        call(op, backend="cuda")


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: ops.transform(tensor(2, 3).double(), matrix(3, 3), backend="triton"), "float64"),
        (lambda: ops.correlation(tensor(1, 2, 3).double(), backend="triton"), "float64"),
        (
            lambda: ops.apply_(matrix(2, 3, 3).mT, tensor(2, 3, 3), 0.1, backend="triton"),
            "contiguous stacks of R alone",
        ),
    ],
)
def test_what_a_backend_cannot_serve(call, reason):
    with pytest.raises(ValueError, match=f"cannot serve this call: .*{reason}"):
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
from rules import convert, decor_sgd
R, z = torch.eye(3)[None].clone(), torch.randn(1, 9, 3)
ops.update_(R, z, 0.1)
assert (R != torch.eye(3)).any()
try:
    ops.update_(R, z, 0.1, backend="triton")
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


# ---- a whole step


def trained(widths, rows, **autocast):
    """A model after a backward, with the optimizer of its R."""
    layers = [nn.Linear(d, o, device=DEVICE) for d, o in itertools.pairwise(widths)]
    model = convert(nn.Sequential(*layers), sites=None, filter=lambda *_: True, form="fold")
    decor = decor_sgd(model, eta=torch.tensor(0.01, device=DEVICE), sample=0.5)

    def backward():
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = model(tensor(rows, widths[0])).square().mean()
        loss.backward()

    backward()
    return model, decor, backward


@pytest.mark.parametrize("depth", [1, 4])
def test_launches_of_a_step(monkeypatch, depth):
    _, decor, _ = trained([20] * (depth + 1) + [33] * (depth + 1), 16)
    monkeypatch.setenv("DBPKERN_BACKEND", "triton")
    with _triton.recording() as launches:
        decor.step()
    # z and the update, for each of two widths and any number of layers.
    kernels = [launch.kernel.__name__ for launch in launches]
    assert kernels == ["matmul_kernel", "associate_kernel"] * 2


def test_a_step_by_the_kernels_is_that_of_eager(monkeypatch):
    found = {}
    for backend in ("eager", "triton"):
        monkeypatch.setenv("DBPKERN_BACKEND", backend)
        torch.manual_seed(0)
        model, decor, _ = trained([20, 20, 33, 20], 60)
        decor.step()
        found[backend] = [layer.R for layer in model]
    for one, other in zip(*found.values(), strict=True):
        assert (one - torch.eye(len(one), device=DEVICE)).abs().max() > 1e-4
        torch.testing.assert_close(one, other, atol=2e-4, rtol=0)


# ---- the tables


TABLES = ("matmul", "correlation", "apply_", "update_form", "update_associate", "fused_pipeline")


@pytest.mark.parametrize("name", _dispatch.architectures())
def test_tables_are_whole(name):
    found = _dispatch.table(name)
    assert set(found) == {"measured", "tiles", "triton"}
    for op in TABLES:
        for kind in ("16bit", "tf32", "ieee"):
            with _dispatch.assume(name):
                for d in (1, 51, 64, 127, 128, 384, 771, 4096):
                    tiles = _dispatch.tiles(op, kind, d, torch.device("meta"))
                    assert all(size & (size - 1) == 0 and size >= 16 for size in (tiles.m, tiles.n, tiles.k))
                    if op in ("correlation", "update_form"):
                        assert tiles.m == tiles.n
                    if d % 16:
                        assert tiles.m <= 64


def test_tables_of_unknown_architectures(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    assert _dispatch.architecture(gpu) == "default"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert _dispatch.architecture(gpu) == "sm_90"
    assert _dispatch.architecture(torch.device("cpu")) == "default"


def test_thresholds(monkeypatch):
    gpu = torch.device("cuda", 0)
    table = {"measured": None, "tiles": {}, "triton": {"fold": {"16bit": {"min_d": 128, "min_rows": 10}}}}
    monkeypatch.setattr(_dispatch, "table", lambda name: table)
    monkeypatch.setattr(_dispatch, "architecture", lambda device: "sm_90")
    assert _dispatch.pays("fold", "16bit", gpu, d=128, rows=10)
    assert not _dispatch.pays("fold", "16bit", gpu, d=127, rows=10)
    assert not _dispatch.pays("fold", "16bit", gpu, d=128, rows=9)
    assert not _dispatch.pays("fold", "ieee", gpu, d=128, rows=10)
    assert not _dispatch.pays("update_", "16bit", gpu, d=128, n=10, flight=1000)
    assert not _dispatch.pays("fold", "16bit", torch.device("cpu"), d=128, rows=10)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("n", [100, 900])
def test_update_in_a_cuda_graph(n):
    R, z = matrix(24, 256, 256), tensor(24, n, 256, dtype=torch.bfloat16)
    lr = torch.tensor(0.01, device="cuda")
    expected = ops.update_(R.clone(), z, lr, backend="triton")  # writes the schedule's table, too
    work = R.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.update_(work, z, lr, backend="triton")
    work.copy_(R)
    graph.replay()
    assert torch.equal(work, expected)
    lr.fill_(0.02)
    work.copy_(R)
    graph.replay()
    assert torch.equal(work, ops.update_(R.clone(), z, 0.02, backend="triton"))


@pytest.mark.gpu
@pytest.mark.parametrize("op", CALLS)
def test_no_op_waits_for_the_device(op):
    function, arguments = CALLS[op][0], CALLS[op][1]()
    function(*arguments, backend="triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*arguments, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(("L", "n", "d"), [(37, 1280, 768), (12, 1280, 3072), (3, 700, 771), (1, 2000, 768)])
def test_shipped_tiles(L, n, d):
    """Shapes that fill the device, with the tiles of its table, twice: races would show as differences."""
    R, z = matrix(L, d, d), tensor(L, n, d, dtype=torch.bfloat16)
    M, a = ops.correlation(z, backend="triton")
    exact, exact_a = reference.correlation(z.double())
    peer = torch.bmm(z.mT, z, out_dtype=torch.float32) / n
    peer_a = peer.diagonal(dim1=1, dim2=2)
    as_good(M, exact, peer - torch.diag_embed(peer_a))
    as_good(a, exact_a, peer_a)
    first = ops.update_(R.clone(), z, 0.01, backend="triton")
    for _ in range(5):
        assert torch.equal(first, ops.update_(R.clone(), z, 0.01, backend="triton"))
    torch.testing.assert_close(first, ops.update_(R.clone(), z, 0.01, backend="eager"), atol=1e-4, rtol=0)
    applied = ops.apply_(R.clone(), M, 0.01, backend="triton")
    torch.testing.assert_close(applied, ops.apply_(R.clone(), M, 0.01, backend="eager"))


@pytest.mark.gpu
def test_a_step_in_a_cuda_graph(monkeypatch):
    monkeypatch.setenv("DBPKERN_BACKEND", "triton")
    model, decor, backward = trained([256, 256, 256, 512, 256], 600)
    decor.step()  # writes the lists of items, and finds the samples their place
    backward()
    start = [layer.R.clone() for layer in model]
    torch.cuda.set_sync_debug_mode("error")
    try:
        decor.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = [layer.R.clone() for layer in model]
    for layer, R in zip(model, start, strict=True):
        layer.R.copy_(R)
    for site in decor.engine.sites:
        site.slot.pending = True
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decor.step()
    graph.replay()
    for layer, R, before in zip(model, expected, start, strict=True):
        assert torch.equal(layer.R, R)
        assert not torch.equal(R, before)
