"""`R <- R - eta M R`: the decorrelation step from finished statistics."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dbpkern.ops import _dispatch
from dbpkern.ops._common import (
    autocast_off,
    check_accumulator,
    check_matrix,
    check_same_device,
    check_same_dtype,
    check_tensor,
    eta_tensor,
    operator,
    per_layer,
    product,
)

PIECES = 8
"""R is updated in at least this many pieces on a CPU, each read into scratch before it is overwritten."""
NUMBERS = 2**25
"""Numbers of R in a piece on a GPU, where few large products are faster than many small ones."""


def _pieces(R: Tensor) -> list[tuple[slice, slice]]:
    """Cut a stack `[L, d, d]` into (layers, columns) blocks.

    Columns of `M R` depend on the same columns of R alone, layers are independent: either cut is exact.
    """
    L, _, d = R.shape
    count = -(-R.numel() // NUMBERS) if R.device.type == "cuda" else PIECES
    if count <= L:
        step = L // count
        return [(slice(i, i + step), slice(None)) for i in range(0, L, step)]
    # With few layers, cut the columns of all of them: fewer, larger products than a loop over layers.
    step = max(1, d // count)
    return [(slice(None), slice(i, i + step)) for i in range(0, d, step)]


def apply_in_place(R: Tensor, M: Tensor, eta: Tensor) -> None:
    """`R -= eta M R` by PyTorch's products, piece by piece."""
    rate = per_layer(eta, R.dtype)
    halves = M.dtype == torch.bfloat16 and M.is_cuda
    for layers, columns in _pieces(R):
        target = R[layers, :, columns]
        # Scaled before it is rounded, so that a rate however small costs no digits.
        scaled = torch.empty_like(target, dtype=M.dtype if halves else R.dtype)
        torch.mul(target, rate[layers] if rate.dim() else rate, out=scaled)
        if halves:
            target.sub_(product(M[layers], scaled))
        else:
            target.baddbmm_(M[layers].to(R.dtype), scaled, alpha=-1)
        del scaled  # before the next piece's is made, or two of them would live at a time


@operator("apply_", mutates=("R",))
def _apply(R: Tensor, M: Tensor, eta: Tensor) -> None:
    if R.numel():
        with autocast_off(R.device):
            apply_in_place(R, M, eta)


@_apply.register_fake
def _(R: Tensor, M: Tensor, eta: Tensor) -> None:
    return None


@register_flop_formula(torch.ops.dbpkern.apply_)
def _flops(R_shape: Sequence[int], *args: object, **kwargs: object) -> int:
    L, d, _ = R_shape
    return 2 * L * d**3


def apply_(R: Tensor, M: Tensor, eta: float | Tensor, *, backend: str | None = None) -> Tensor:
    """Update a stack of R in place: `R <- R - eta M R` (arXiv 2510.14657, Eq. 4).

    R keeps its address. The products are PyTorch's, batched over layers, in pieces with little scratch: an
    eighth of R on a CPU, 200 MiB on a GPU.

    Args:
        R: `[L, d, d]`, fp32 or fp64; changed in place.
        M: `[L, d, d]` as `correlation` returns it: of the same dtype, or bfloat16, which then is the operand
            of the product on a GPU.
        eta: a number >= 0, a 0-d tensor, or `[L]` for a rate per layer. A CUDA graph freezes a number;
            a tensor on the device is read at each replay.
        backend: "eager", or None for the same.

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
    if M.dtype != torch.bfloat16:
        check_same_dtype(R=R, M=M)
    check_same_device(R=R, M=M)
    _dispatch.check_backend(backend)
    _dispatch.choose("apply_", backend or "", {})
    torch.ops.dbpkern.apply_(R, M, eta_tensor(eta, len(R), R.device))
    return R
