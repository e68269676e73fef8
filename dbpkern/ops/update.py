"""`R <- R - lr M R` straight from the samples, by the cheaper association."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dbpkern.ops import _dispatch, _triton, _tuning
from dbpkern.ops._common import (
    autocast_off,
    check_accumulator,
    check_kappa,
    check_matrix,
    check_same_device,
    check_tensor,
    per_layer,
    rate_tensor,
)
from dbpkern.ops._dispatch import Operands, Tiles
from dbpkern.ops._matmul import (
    cdiv,
    dot,
    dtype_name,
    less_identity,
    operand_constants,
    product_tile,
    rounded,
    within_reach,
)
from dbpkern.ops._pipeline import (
    FIELDS,
    Schedule,
    new_counters,
    raise_counters,
    strip_schedule,
    tables,
    take_item,
    wait_for_inputs,
)
from dbpkern.ops._triton import jit, tl
from dbpkern.ops.apply import (
    PIECES,
    apply_in_place,
    apply_tile,
    copy_tile,
    load_rate,
    rate_arguments,
    ring_slots,
    stack_refusal,
)
from dbpkern.ops.correlation import gram_tile, store_symmetric, triangle_position

GRAM, COPY, APPLY = 0, 1, 2


@jit
def form_kernel(
    R, z, lr, Ms, ring, items, counters, TICKETS, N, D, z_l, z_n, z_d, scale, kappa,
    LR_TENSOR: tl.constexpr, LR_STRIDE: tl.constexpr, FIELDS: tl.constexpr, LAYERS_IN_RING: tl.constexpr,
    OPERAND: tl.constexpr, HELD: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`R [L, D, D] -= lr M R` with M formed from `z [L, N, D]`, layer after layer, in a ring of scratch."""
    item = take_item(items, counters, TICKETS, FIELDS)
    kind = tl.load(item)
    layer = tl.load(item + 1).to(tl.int64)
    row, column = tl.load(item + 2), tl.load(item + 3)
    slot = ring + tl.load(item + 4).to(tl.int64) * D * BLOCK
    M = Ms + (layer % LAYERS_IN_RING) * D * D
    R += layer * D * D
    wait_for_inputs(item, counters)
    if kind == 0:
        i, j = triangle_position(row)
        z += layer * z_l
        G = gram_tile(z, i, j, N, D, z_n, z_d, OPERAND, PRECISION, EMULATE, BLOCK, BLOCK_K)
        store_symmetric(G * scale, M, i, j, D, D, kappa, EMULATE, BLOCK)
    elif kind == 1:
        copy_tile(R, slot, row * BLOCK, column * BLOCK, D, EMULATE, BLOCK, BLOCK)
    else:
        rate = load_rate(lr, layer, LR_TENSOR, LR_STRIDE)
        apply_tile(
            R, M, slot, row * BLOCK, column * BLOCK, D, D, 1, rate,
            HELD, PRECISION, EMULATE, EVEN_K, BLOCK, BLOCK, BLOCK_K,
        )  # fmt: skip
    raise_counters(item, counters)


@jit
def moment_tile(
    z, slot, index, row, N, ROWS, D, z_n, z_d,
    GATHER: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`z^T U [BLOCK_M, BLOCK_N]` from feature `row` on, `U [N, BLOCK_N]` in slot, and z's sums of squares.

    The rows of `z [ROWS, D]` are `index [N]` with GATHER, the first N in order without.
    """
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    m_in = (row + m < D)[None, :]
    features = z + row.to(tl.int64) * z_d + m[None, :] * z_d
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, N, BLOCK_K):
        k_in = (k < N - start)[:, None]
        rows = (start + k).to(tl.int64)
        U = tl.load(slot + rows[:, None] * BLOCK_N + n[None, :], mask=k_in, other=0.0)
        if GATHER:
            rows = tl.load(index + rows, mask=k < N - start, other=0)
            known = ((rows >= 0) & (rows < ROWS))[:, None]
            left = tl.load(features + rows[:, None] * z_n, mask=k_in & m_in & known, other=0.0)
            values = tl.where(known, left.to(tl.float32), float("nan"))  # U has NaN in such rows already
        else:
            left = tl.load(features + rows[:, None] * z_n, mask=k_in & m_in, other=0.0)  # [BLOCK_K, BLOCK_M]
            values = left.to(tl.float32)
        acc = dot(tl.trans(left), U, acc, OPERAND, PRECISION, EMULATE)
        squares += tl.sum(values * values, axis=0)
    return acc, squares


@jit
def store_updated(
    R, out, acc, mean_squares, row, column, D, r_r, rate, scale, kappa,
    OPERAND: tl.constexpr, EMULATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`R - rate M R` into the tile (row, column) of `out [D, D]`, from `acc = z^T z R`.

    M R = (1 - kappa) (G R - diag(a) R) + kappa diag(a - 1) R: what the diagonal of G has added to the product
    is taken away again row by row. In `acc` R was rounded, so the rounded R is taken away: with R as it is,
    the difference would always have one sign, and draw R towards numbers halfway between two roundings.
    """
    m = row + tl.arange(0, BLOCK_M)
    n = column + tl.arange(0, BLOCK_N)
    inside = (m < D)[:, None] & (n < D)[None, :]
    old = tl.load(R + m.to(tl.int64)[:, None] * r_r + n[None, :], mask=inside, other=0.0)
    difference = less_identity(old, m, n)
    used = old + (rounded(difference, OPERAND, EMULATE).to(tl.float32) - difference)
    off = scale * acc - mean_squares[:, None] * used
    variance = (mean_squares - 1.0)[:, None] * old
    new = old - rate * ((1.0 - kappa) * off + kappa * variance)
    tl.store(out + m.to(tl.int64)[:, None] * D + n[None, :], new, mask=inside)


@jit
def associate_kernel(
    R, z, lr, ring, items, counters, TICKETS, N, D, z_l, z_n, z_d, scale, kappa,
    LR_TENSOR: tl.constexpr, LR_STRIDE: tl.constexpr, FIELDS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`R [L, D, D] -= lr M R` as `z^T (z R)`, M never formed: `z R` lies in a ring of strips of columns.

    The items are those of `strip_schedule`.
    """
    item = take_item(items, counters, TICKETS, FIELDS)
    kind = tl.load(item)
    layer = tl.load(item + 1).to(tl.int64)
    row, column = tl.load(item + 2) * BLOCK_M, tl.load(item + 3) * BLOCK_N
    slot = ring + tl.load(item + 4).to(tl.int64) * N * BLOCK_N
    R += layer * D * D
    z += layer * z_l
    wait_for_inputs(item, counters)
    if kind == 0:
        acc = product_tile(
            z, R, row, column, N, D, D, z_n, z_d, D, 1, True,
            OPERAND, PRECISION, EMULATE, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        m = row + tl.arange(0, BLOCK_M)
        place = slot + m.to(tl.int64)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tl.store(place, rounded(acc, slot.dtype.element_ty, EMULATE), mask=(m < N)[:, None])
    else:
        rate = load_rate(lr, layer, LR_TENSOR, LR_STRIDE)
        acc, squares = moment_tile(
            z, slot, z, row, N, N, D, z_n, z_d, False,
            OPERAND, PRECISION, EMULATE, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        store_updated(
            R, R, acc, squares * scale, row, column, D, D, rate, scale, kappa,
            OPERAND, EMULATE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    raise_counters(item, counters)


def form_schedule(L: int, steps: int, layers: int, slots: int) -> Schedule:
    """M of `layers` layers and `slots` strips of R lie in scratch at a time; R has `steps` tiles a side."""
    schedule = Schedule()
    triangle = steps * (steps + 1) // 2
    formed = [schedule.counter() for _ in range(L)]
    finished = [schedule.counter() for _ in range(L)]
    copied = [schedule.counter() for _ in range(L * steps)]
    applied = [schedule.counter() for _ in range(L * steps)]
    next_layer = 0
    layers_ahead = max(min(1, layers - 1), (layers - 1) // 2)
    ahead = slots // 2
    for t in range(len(copied) + ahead):
        if t < len(copied):
            free = ((applied[t - slots], steps),) if t >= slots else ()
            for row in range(steps):
                schedule.add(COPY, t // steps, row, t % steps, t % slots, free, (copied[t],))
        s = t - ahead
        if s < 0:
            continue
        layer = s // steps
        while next_layer < min(L, layer + 1 + layers_ahead):
            free = ((finished[next_layer - layers], steps * steps),) if next_layer >= layers else ()
            for tile in range(triangle):
                schedule.add(GRAM, next_layer, tile, waits=free, raises=(formed[next_layer],))
            next_layer += 1
        for row in range(steps):
            ready = ((formed[layer], triangle), (copied[s], steps))
            schedule.add(APPLY, layer, row, s % steps, s % slots, ready, (applied[s], finished[layer]))
    return schedule


def layers_in_ring(L: int, operands: Operands) -> int:
    """How many M fit into the larger part of the scratch, R/8 in all; none where the stack is too small."""
    room = 4 * L / (PIECES * operands.dtype.itemsize)  # in matrices d x d
    if room <= 1:
        return 0
    return max(1, int(room * 3 / 4))  # the strips of R need room, too


def form_places(L: int, d: int, operands: Operands, tiles: Tiles) -> tuple[int, int]:
    """How many M, and how many strips of R, lie in scratch at a time."""
    size, steps = operands.dtype.itemsize, cdiv(d, tiles.m)
    layers = min(L, layers_in_ring(L, operands))
    budget = 4 * L * d * d // PIECES - layers * d * d * size
    return layers, ring_slots(L * steps, d * tiles.m * size, budget, steps)


def associate_slots(L: int, n: int, d: int, operands: Operands, tiles: Tiles) -> int:
    """How many strips of `z R` lie in scratch at a time."""
    slot_bytes = n * tiles.n * operands.dtype.itemsize
    tiles_of_strip = min(cdiv(n, tiles.m), cdiv(d, tiles.m))
    return ring_slots(L * cdiv(d, tiles.n), slot_bytes, 4 * L * d * d // PIECES, tiles_of_strip)


def in_flight(L: int, n: int, d: int, operands: Operands, device: torch.device) -> int:
    """How many tiles the Triton kernel can work on at a time: few, where an eighth of R is little scratch."""
    if not L or not n or not d:
        return 0
    if forms_M(L, n, d, operands):
        tiles = _dispatch.tiles("update_form", operands.kind, d, device)
        return form_places(L, d, operands, tiles)[1] * cdiv(d, tiles.m)
    tiles = _dispatch.tiles("update_associate", operands.kind, d, device)
    slots = associate_slots(L, n, d, operands, tiles)
    return slots * min(cdiv(n, tiles.m), cdiv(d, tiles.m))


def _triton_form(R: Tensor, z: Tensor, lr: Tensor, kappa: float, operands: Operands, tiles: Tiles) -> None:
    L, n, d = z.shape
    block = tiles.m
    # M has the squares of z, for which fp16 has no range.
    dtype = torch.bfloat16 if operands.dtype == torch.float16 else operands.dtype
    layers, slots = form_places(L, d, operands, tiles)
    items, length = tables(form_schedule, L, cdiv(d, block), layers, slots, device=R.device)
    rate, rate_constants = rate_arguments(lr, R.device)
    _triton.launch(
        form_kernel,
        (len(items),),
        {
            "R": R, "z": z, **rate,
            "Ms": torch.empty(layers, d, d, dtype=dtype, device=R.device),
            "ring": torch.empty(slots, d, block, dtype=dtype, device=R.device),
            "items": items, "counters": new_counters(length, R.device), "TICKETS": length - 1,
            "N": n, "D": d, "z_l": z.stride(0), "z_n": z.stride(1), "z_d": z.stride(2),
            "scale": 1 / n, "kappa": kappa,
        },
        {
            **rate_constants, "FIELDS": FIELDS, "LAYERS_IN_RING": layers,
            **operand_constants(operands), "HELD": dtype_name(dtype), "EVEN_K": d % tiles.k == 0,
            "BLOCK": block, "BLOCK_K": tiles.k,
        },
        tiles.warps,
        tiles.stages,
    )  # fmt: skip


def _triton_associate(
    R: Tensor, z: Tensor, lr: Tensor, kappa: float, operands: Operands, tiles: Tiles
) -> None:
    L, n, d = z.shape
    samples, rows, columns = cdiv(n, tiles.m), cdiv(d, tiles.m), cdiv(d, tiles.n)
    slots = associate_slots(L, n, d, operands, tiles)
    items, length = tables(strip_schedule, L, samples, rows, columns, slots, device=R.device)
    rate, rate_constants = rate_arguments(lr, R.device)
    _triton.launch(
        associate_kernel,
        (len(items),),
        {
            "R": R, "z": z, **rate,
            "ring": torch.empty(slots, n, tiles.n, dtype=operands.dtype, device=R.device),
            "items": items, "counters": new_counters(length, R.device), "TICKETS": length - 1,
            "N": n, "D": d, "z_l": z.stride(0), "z_n": z.stride(1), "z_d": z.stride(2),
            "scale": 1 / n, "kappa": kappa,
        },
        {
            **rate_constants, "FIELDS": FIELDS, **operand_constants(operands), "EVEN_K": d % tiles.k == 0,
            "BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k,
        },
        tiles.warps,
        tiles.stages,
    )  # fmt: skip


def forms_correlation(n: int, d: int, triangular: bool = False) -> bool:
    """Whether forming M is the cheaper way for n samples of d features.

    Forming M and multiplying costs `2 n d^2 + 2 d^3`, with a triangular product for M `n d^2 + 2 d^3`; the
    association `z^T (z R)` costs `4 n d^2` and no d x d scratch.
    """
    return 3 * n >= 2 * d if triangular else n >= d


def forms_M(L: int, n: int, d: int, operands: Operands) -> bool:
    """Whether the Triton kernel forms M: where that is cheaper, and the scratch has room for it."""
    return forms_correlation(n, d, triangular=True) and layers_in_ring(L, operands) > 0


def triton_update(R: Tensor, z: Tensor, lr: Tensor, kappa: float) -> None:
    """`R -= lr M R` in one launch."""
    z = within_reach(z)
    L, n, d = z.shape
    operands = _dispatch.operands(z.dtype)
    if forms_M(L, n, d, operands):
        tiles = _dispatch.tiles("update_form", operands.kind, d, R.device)
        _triton_form(R, z, lr, kappa, operands, tiles)
    else:
        tiles = _dispatch.tiles("update_associate", operands.kind, d, R.device)
        _triton_associate(R, z, lr, kappa, operands, tiles)


def eager_update(R: Tensor, z: Tensor, lr: Tensor, kappa: float) -> None:
    """`R -= lr M R` by PyTorch's products; z has rows."""
    _, n, d = z.shape
    z = z.to(R.dtype)
    if forms_correlation(n, d):
        M, _, _ = torch.ops.dbpkern.correlation(z, kappa, False, "eager")
        apply_in_place(R, M, lr)
        return
    # M R = (1 - kappa) z^T (z R) / n + diag(c) R, with the diagonal of M corrected row by row:
    # c = kappa (a - 1) - (1 - kappa) a.
    a = torch.linalg.vector_norm(z, dim=1).square_().div_(n)
    rate = per_layer(lr, R.dtype)
    rows = 1 - rate * (kappa * (a - 1) - (1 - kappa) * a)[:, :, None]
    zR = torch.bmm(z, R).mul_(rate)
    R.mul_(rows)
    R.baddbmm_(z.mT, zR, alpha=-(1 - kappa) / n)


@torch.library.custom_op("dbpkern::update_", mutates_args=("R",))
def _update(R: Tensor, z: Tensor, lr: Tensor, kappa: float, backend: str) -> None:
    L, n, d = z.shape
    kind = _dispatch.operands(z.dtype)
    serves = _tuning.serving(
        "update_",
        backend,
        stack_refusal(R, z),
        "update_form" if forms_M(L, n, d, kind) else "update_associate",
        kind.kind,
        R.device,
        {"d": d, "n": n, "flight": in_flight(L, n, d, kind, R.device)},
        lambda name: torch.ops.dbpkern.update_(R.clone(), z, lr, kappa, name),
    )
    if z.numel() == 0:
        return
    if serves == "triton":
        triton_update(R, z, lr, kappa)
        return
    with autocast_off(R.device):
        eager_update(R, z, lr, kappa)


@_update.register_fake
def _(R: Tensor, z: Tensor, lr: Tensor, kappa: float, backend: str) -> None:
    return None


@register_flop_formula(torch.ops.dbpkern.update_)
def _flops(R_shape, z_shape, *args, **kwargs) -> int:
    L, n, d = z_shape
    return L * (2 * n * d**2 + 2 * d**3 if forms_correlation(n, d) else 4 * n * d**2)


def update_(
    R: Tensor, z: Tensor, lr: float | Tensor, kappa: float = 0.0, *, backend: str | None = None
) -> Tensor:
    """Update a stack of R in place from decorrelated samples: `apply_(R, correlation(z, kappa)[0], lr)`.

    The fast path when nothing (a reduction over processes, averaging, a limiter) acts on M: with few samples
    for the number of features M is never formed. The Triton kernel does the whole stack in one launch, with
    scratch of at most an eighth of R (or one strip of at most 128 columns, where that is more).

    Args:
        R: `[L, d, d]`, fp32 or fp64; changed in place.
        z: `[L, n, d]`, the samples after R, any floating-point dtype. n = 0 leaves R as it is.
        lr: eta, a number >= 0, a 0-d tensor, or `[L]` for a rate per layer. A CUDA graph freezes a number;
            a tensor on the device is read at each replay.
        kappa: weight in [0, 1] of the unit-variance term.
        backend: None for the automatic choice, "eager" or "triton".

    Returns:
        R.

    Raises:
        TypeError: R not fp32 or fp64, z not a floating-point tensor.
        ValueError: shapes or devices that do not fit, rate or kappa out of range, a backend that cannot serve
            the call.
    """
    check_tensor("R", R, "[L, d, d]", (3,))
    check_accumulator("R", R)
    check_tensor("z", z, "[L, n, d]", (3,))
    check_matrix("R", R, z.shape[-1], "[L, d, d]")
    if len(R) != len(z):
        raise ValueError(f"R and z: expected equal numbers of layers, got {len(R)} and {len(z)}")
    check_same_device(R=R, z=z)
    check_kappa(kappa)
    _dispatch.check_backend(backend)
    torch.ops.dbpkern.update_(R, z, rate_tensor(lr, len(R), R.device), float(kappa), backend or "")
    return R
