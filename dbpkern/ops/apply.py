"""`R <- R - lr M R`: the decorrelation step from finished statistics."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

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

# R is updated in at least this many pieces, each read into scratch before it is overwritten.
PIECES = 8


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
    """`R -= lr M R` with scratch of at most R/8."""
    rate = per_layer(lr, R.dtype)
    for layers, columns in _pieces(R):
        target = R[layers, :, columns]
        old = target * (rate[layers] if rate.dim() else rate)
        target.baddbmm_(M[layers], old, alpha=-1)
        del old  # before the next piece's is made, or two of them would live at a time


@torch.library.custom_op("dbpkern::apply_", mutates_args=("R",))
def _apply(R: Tensor, M: Tensor, lr: Tensor) -> None:
    with autocast_off(R.device):
        apply_in_place(R, M, lr)


@_apply.register_fake
def _(R: Tensor, M: Tensor, lr: Tensor) -> None:
    return None


@register_flop_formula(torch.ops.dbpkern.apply_)
def _flops(R_shape, *args, **kwargs) -> int:
    L, d, _ = R_shape
    return 2 * L * d**3


def apply_(R: Tensor, M: Tensor, lr: float | Tensor) -> Tensor:
    """Update a stack of R in place: `R <- R - lr M R` (arXiv 2510.14657, Eq. 4).

    The scratch is at most an eighth of R, and R keeps its address.

    Args:
        R: `[L, d, d]`, fp32 or fp64; changed in place.
        M: `[L, d, d]` of the same dtype, as `correlation` returns it.
        lr: eta, a number >= 0, a 0-d tensor, or `[L]` for a rate per layer.

    Returns:
        R.

    Raises:
        TypeError: dtypes other than fp32 or fp64, or unequal ones.
        ValueError: shapes or devices that do not fit, a negative or non-finite number as rate.
    """
    check_tensor("R", R, "[L, d, d]", (3,))
    check_accumulator("R", R)
    check_matrix("R", R, R.shape[-1], "[L, d, d]")
    check_tensor("M", M, "[L, d, d]", (3,))
    if M.shape != R.shape:
        raise ValueError(f"M: expected the shape of R {list(R.shape)}, got {list(M.shape)}")
    check_same_dtype(R=R, M=M)
    check_same_device(R=R, M=M)
    torch.ops.dbpkern.apply_(R, M, rate_tensor(lr, len(R), R.device))
    return R
