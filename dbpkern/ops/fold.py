"""`W R`: the weight that acts on x as W acts on the decorrelated z."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dbpkern.ops import _dispatch
from dbpkern.ops._common import FLOATS, autocast_off, check_matrix, check_same_device, check_tensor, operator
from dbpkern.ops._matmul import matmul


def triton_fold(W: Tensor, R: Tensor, out_dtype: torch.dtype) -> Tensor:
    """The product by the kernel of `_matmul`."""
    operands = _dispatch.operands(W.dtype, R.dtype, out=out_dtype)
    tiles = _dispatch.tiles("matmul", operands.kind, W.shape[-1])
    stacks = (W, R) if W.dim() == 3 else (W[None], R[None])
    return matmul(*stacks, out_dtype, operands, tiles).view(W.shape)


@operator("fold")
def _fold(W: Tensor, R: Tensor, out_dtype: torch.dtype, backend: str) -> Tensor:
    refusal = _dispatch.triton_refusal(W.device, W.dtype, R.dtype, out_dtype)
    kind = _dispatch.operands(W.dtype, R.dtype, out=out_dtype).kind
    automatic = _dispatch.preferred("fold", W.device, kind)
    if _dispatch.choose("fold", backend, {"triton": refusal}, automatic) == "triton":
        return triton_fold(W, R, out_dtype)
    with autocast_off(W.device):
        compute = torch.promote_types(W.dtype, R.dtype)
        return torch.matmul(W.to(compute), R.to(compute)).to(out_dtype)


@_fold.register_fake
def _(W: Tensor, R: Tensor, out_dtype: torch.dtype, backend: str) -> Tensor:
    return torch.empty_like(W, dtype=out_dtype, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    W, R, _, ctx.backend = inputs
    ctx.save_for_backward(R)
    ctx.dtype = W.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (R,) = ctx.saved_tensors
    # dW = dW~ R^T is the same product with R transposed, so one op serves both directions.
    return torch.ops.dbpkern.fold(grad, R.mT, ctx.dtype, ctx.backend), None, None, None


_fold.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.dbpkern.fold)
def _flops(W_shape: Sequence[int], R_shape: Sequence[int], *args: object, **kwargs: object) -> int:
    layers = W_shape[0] if len(W_shape) == 3 else 1
    return 2 * layers * W_shape[-2] * W_shape[-1] ** 2


def fold(W: Tensor, R: Tensor, out_dtype: torch.dtype | None = None, *, backend: str | None = None) -> Tensor:
    """Fold R into a weight: `W~ = W R`, so that `x W~^T = (x R^T) W^T`.

    Costs `2 o d^2` whatever the number of tokens, where applying R to n tokens costs `2 n d^2`.

    Args:
        W: `[o, d]` or `[L, o, d]`, any floating-point dtype.
        R: `[d, d]` or `[L, d, d]`; gets no gradient.
        out_dtype: dtype of the result, by default that of W. The product is rounded to it once: fp32 W and R
            give a bf16 weight without a second cast.
        backend: None for the automatic choice, "eager" or "triton". Eager forms the product in the wider
            dtype of W and R; Triton rounds the operands in registers, to TF32 for fp32 W and R with a 16-bit
            result, to 16 bits where W or R has them, and sums in fp32.

    Returns:
        `[(L,) o, d]`, differentiable in W (`dW = dW~ R^T`).

    Raises:
        TypeError: not floating-point tensors, or `out_dtype` not a floating-point dtype.
        ValueError: shapes or devices that do not fit, a backend that cannot serve the call.
    """
    check_tensor("W", W, "[o, d] or [L, o, d]", (2, 3))
    check_tensor("R", R, "[d, d] or [L, d, d]", (W.dim(),))
    check_matrix("R", R, W.shape[-1], "[(L,) d, d]")
    if W.dim() == 3 and len(R) != len(W):
        raise ValueError(f"W and R: expected equal numbers of layers, got {len(W)} and {len(R)}")
    check_same_device(W=W, R=R)
    if out_dtype is None:
        out_dtype = W.dtype
    elif out_dtype not in FLOATS:
        raise TypeError(f"out_dtype: expected float16, bfloat16, float32 or float64, got {out_dtype}")
    _dispatch.check_backend(backend)
    return torch.ops.dbpkern.fold(W, R, out_dtype, backend or "")
