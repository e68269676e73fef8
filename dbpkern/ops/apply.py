"""`R <- R - lr M R`: the decorrelation step from finished statistics."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dbpkern.ops import _dispatch, _triton, _tuning
from dbpkern.ops._common import (
    autocast_off,
    check_accumulator,
    check_matrix,
    check_same_device,
    check_same_dtype,
    check_tensor,
    per_layer,
    rate_tensor,
)
from dbpkern.ops._dispatch import Operands, Tiles
from dbpkern.ops._matmul import cdiv, operand_constants, product_tile, rounded, within_reach
from dbpkern.ops._pipeline import (
    FIELDS,
    new_counters,
    raise_counters,
    strip_schedule,
    tables,
    take_item,
    wait_for_inputs,
)
from dbpkern.ops._triton import jit, tl

# R is updated in at least this many pieces, each read into scratch before it is overwritten.
PIECES = 8
# Strips in scratch beyond these bring nothing: so many tiles keep any GPU busy between two phases.
TILES_IN_FLIGHT = 1024


@jit
def copy_tile(R, slot, row, column, D, EMULATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Copy R's tile at (row, column) into `slot [D, BLOCK_N]`, rounded; zeros beyond D columns."""
    m = row + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    m_in = (m < D)[:, None]
    tile = tl.load(
        R + m.to(tl.int64)[:, None] * D + (column + n)[None, :],
        mask=m_in & (column + n < D)[None, :],
        other=0.0,
    )
    place = slot + m.to(tl.int64)[:, None] * BLOCK_N + n[None, :]
    tl.store(place, rounded(tile, slot.dtype.element_ty, EMULATE), mask=m_in)


@jit
def apply_tile(
    R, M, slot, row, column, D, m_r, m_c, rate,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`R -= rate M R` for the tile at (row, column); `slot [D, BLOCK_N]` holds R's columns as they were."""
    acc = product_tile(
        M, slot, row, column * 0, D, BLOCK_N, D, m_r, m_c, BLOCK_N, 1, False,
        OPERAND, PRECISION, EMULATE, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    m = row + tl.arange(0, BLOCK_M)
    n = column + tl.arange(0, BLOCK_N)
    place = R + m.to(tl.int64)[:, None] * D + n[None, :]
    inside = (m < D)[:, None] & (n < D)[None, :]
    old = tl.load(place, mask=inside, other=0.0)
    tl.store(place, old - rate * acc, mask=inside)


@jit
def load_rate(lr, layer, LR_TENSOR: tl.constexpr, LR_STRIDE: tl.constexpr):
    """The rate of a layer, from a number or from a tensor that the device may change between launches."""
    if LR_TENSOR:
        rate = tl.load(lr + layer * LR_STRIDE).to(tl.float32)
    else:
        rate = lr
    return rate


@jit
def apply_kernel(
    R, M, lr, ring, items, counters, TICKETS, D, m_l, m_r, m_c,
    LR_TENSOR: tl.constexpr, LR_STRIDE: tl.constexpr, FIELDS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`R [L, D, D] -= lr M R` in place: strips of columns are copied aside, then overwritten tile by tile.

    The items are those of `strip_schedule`.
    """
    item = take_item(items, counters, TICKETS, FIELDS)
    kind = tl.load(item)
    layer = tl.load(item + 1).to(tl.int64)
    row, column = tl.load(item + 2) * BLOCK_M, tl.load(item + 3) * BLOCK_N
    slot = ring + tl.load(item + 4).to(tl.int64) * D * BLOCK_N
    R += layer * D * D
    wait_for_inputs(item, counters)
    if kind == 0:
        copy_tile(R, slot, row, column, D, EMULATE, BLOCK_M, BLOCK_N)
    else:
        rate = load_rate(lr, layer, LR_TENSOR, LR_STRIDE)
        apply_tile(
            R, M + layer * m_l, slot, row, column, D, m_r, m_c, rate,
            OPERAND, PRECISION, EMULATE, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    raise_counters(item, counters)


def apply_slots(L: int, d: int, operands: Operands, tiles: Tiles) -> int:
    """How many strips of R `apply_` copies aside at a time."""
    strips, slot_bytes = L * cdiv(d, tiles.n), d * tiles.n * operands.dtype.itemsize
    return ring_slots(strips, slot_bytes, 4 * L * d * d // PIECES, cdiv(d, tiles.m))


def ring_slots(strips: int, slot_bytes: int, budget_bytes: int, tiles: int) -> int:
    """How many strips lie in scratch at a time: as the budget allows, as many as are of use, at least one."""
    useful = 2 * cdiv(TILES_IN_FLIGHT, tiles)
    return max(1, min(strips, useful, budget_bytes // slot_bytes))


def rate_arguments(lr: Tensor, device: torch.device) -> tuple[dict[str, object], dict[str, object]]:
    """Arguments and constants for a kernel that calls `load_rate`."""
    if lr.device.type == "cpu" and lr.dim() == 0 and device.type != "cpu":
        # Reading it waits for nobody, and the kernel takes it as a number.
        return {"lr": float(lr)}, {"LR_TENSOR": False, "LR_STRIDE": 0}
    if lr.dtype == torch.float64:
        lr = lr.float()
    return {"lr": lr}, {"LR_TENSOR": True, "LR_STRIDE": lr.stride(0) if lr.dim() else 0}


def triton_apply(R: Tensor, M: Tensor, lr: Tensor) -> None:
    """`R -= lr M R` in one launch."""
    M = within_reach(M)
    L, d, _ = R.shape
    operands = _dispatch.operands(M.dtype, R.dtype)
    tiles = _dispatch.tiles("apply_", operands.kind, d, R.device)
    slots = apply_slots(L, d, operands, tiles)
    rows, columns = cdiv(d, tiles.m), cdiv(d, tiles.n)
    items, length = tables(strip_schedule, L, rows, rows, columns, slots, device=R.device)
    rate, rate_constants = rate_arguments(lr, R.device)
    _triton.launch(
        apply_kernel,
        (len(items),),
        {
            "R": R, "M": M, **rate,
            "ring": torch.empty(slots, d, tiles.n, dtype=operands.dtype, device=R.device),
            "items": items, "counters": new_counters(length, R.device), "TICKETS": length - 1, "D": d,
            "m_l": M.stride(0), "m_r": M.stride(1), "m_c": M.stride(2),
        },
        {
            **rate_constants, "FIELDS": FIELDS, **operand_constants(operands), "EVEN_K": d % tiles.k == 0,
            "BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k,
        },
        tiles.warps,
        tiles.stages,
    )  # fmt: skip


def _pieces(R: Tensor) -> list[tuple[slice, slice]]:
    """Cut a stack `[L, d, d]` into (layers, columns) blocks of at most 1/`PIECES` of it, where d allows.

    Columns of `M R` depend on the same columns of R alone, layers are independent: either cut is exact.
    """
    L, _, d = R.shape
    if L >= PIECES:
        step = L // PIECES
        return [(slice(i, i + step), slice(None)) for i in range(0, L, step)]
    # With few layers, cut the columns of all of them: fewer, larger products than a loop over layers.
    step = max(1, d // PIECES)
    return [(slice(None), slice(i, i + step)) for i in range(0, d, step)]


def apply_in_place(R: Tensor, M: Tensor, lr: Tensor) -> None:
    """`R -= lr M R` with scratch of at most R/8, by PyTorch's products."""
    rate = per_layer(lr, R.dtype)
    for layers, columns in _pieces(R):
        target = R[layers, :, columns]
        old = target * (rate[layers] if rate.dim() else rate)
        target.baddbmm_(M[layers].to(R.dtype), old, alpha=-1)
        del old  # before the next piece's is made, or two of them would live at a time


def stack_refusal(R: Tensor, *others: Tensor) -> str | None:
    """Why Triton cannot update this stack in place, or None."""
    if not R.is_contiguous():
        return f"it updates contiguous stacks of R alone, got strides {R.stride()}"
    return _dispatch.triton_refusal(R.device, R.dtype, *(t.dtype for t in others))


def in_flight(R: Tensor, operands: Operands) -> int:
    """How many tiles the Triton kernel can work on at a time: few, where an eighth of R is little scratch."""
    L, d, _ = R.shape
    if not d or not L:
        return 0
    tiles = _dispatch.tiles("apply_", operands.kind, d, R.device)
    return apply_slots(L, d, operands, tiles) * cdiv(d, tiles.m)


@torch.library.custom_op("dbpkern::apply_", mutates_args=("R",))
def _apply(R: Tensor, M: Tensor, lr: Tensor, backend: str) -> None:
    d = R.shape[-1]
    operands = _dispatch.operands(M.dtype, R.dtype)
    serves = _tuning.serving(
        "apply_",
        backend,
        stack_refusal(R, M),
        "apply_",
        operands.kind,
        R.device,
        {"d": d, "flight": in_flight(R, operands)},
        lambda name: torch.ops.dbpkern.apply_(R.clone(), M, lr, name),
    )
    if R.numel() == 0:
        return
    if serves == "triton":
        triton_apply(R, M, lr)
        return
    with autocast_off(R.device):
        apply_in_place(R, M, lr)


@_apply.register_fake
def _(R: Tensor, M: Tensor, lr: Tensor, backend: str) -> None:
    return None


@register_flop_formula(torch.ops.dbpkern.apply_)
def _flops(R_shape, *args, **kwargs) -> int:
    L, d, _ = R_shape
    return 2 * L * d**3


def apply_(R: Tensor, M: Tensor, lr: float | Tensor, *, backend: str | None = None) -> Tensor:
    """Update a stack of R in place: `R <- R - lr M R` (arXiv 2510.14657, Eq. 4).

    R keeps its address, and the scratch is at most an eighth of R (or one strip of at most 128 columns, where
    that is more). The Triton kernel does the whole stack in one launch.

    Args:
        R: `[L, d, d]`, fp32 or fp64; changed in place.
        M: `[L, d, d]` as `correlation` returns it: of the same dtype, or of 16 bits, which then are the
            operands of the product.
        lr: eta, a number >= 0, a 0-d tensor, or `[L]` for a rate per layer. A CUDA graph freezes a number;
            a tensor on the device is read at each replay.
        backend: None for the automatic choice, "eager" or "triton".

    Returns:
        R.

    Raises:
        TypeError: dtypes other than those.
        ValueError: shapes or devices that do not fit, a negative or non-finite number as rate, a backend that
            cannot serve the call.
    """
    check_tensor("R", R, "[L, d, d]", (3,))
    check_accumulator("R", R)
    check_matrix("R", R, R.shape[-1], "[L, d, d]")
    check_tensor("M", M, "[L, d, d]", (3,))
    if M.shape != R.shape:
        raise ValueError(f"M: expected the shape of R {list(R.shape)}, got {list(M.shape)}")
    if M.itemsize != 2:
        check_same_dtype(R=R, M=M)
    check_same_device(R=R, M=M)
    _dispatch.check_backend(backend)
    torch.ops.dbpkern.apply_(R, M, rate_tensor(lr, len(R), R.device), backend or "")
    return R
