"""`z = x R^T`: the decorrelated input."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dbpkern.ops import _dispatch
from dbpkern.ops._common import autocast_off, check_matrix, check_same_device, check_tensor, operator
from dbpkern.ops._matmul import matmul


def triton_transform(x: Tensor, R: Tensor) -> Tensor:
    """The product by the kernel of `_matmul`."""
    d = x.shape[-1]
    operands = _dispatch.operands(x.dtype, R.dtype)
    tiles = _dispatch.tiles("matmul", operands.kind, d)
    stacks = (x, R.mT) if R.dim() == 3 else (x.reshape(1, math.prod(x.shape[:-1]), d), R.mT[None])
    return matmul(*stacks, x.dtype, operands, tiles).view(x.shape)


@operator("transform")
def _transform(x: Tensor, R: Tensor, backend: str) -> Tensor:
    refusal = _dispatch.triton_refusal(x.device, x.dtype, R.dtype)
    automatic = _dispatch.preferred("transform", x.device, _dispatch.operands(x.dtype, R.dtype).kind)
    if _dispatch.choose("transform", backend, {"triton": refusal}, automatic) == "triton":
        return triton_transform(x, R)
    with autocast_off(x.device):
        compute = torch.promote_types(x.dtype, R.dtype)
        # A new tensor also for the identity and for empty x: an op may not return its input.
        return torch.matmul(x.to(compute), R.to(compute).mT).to(x.dtype)


@_transform.register_fake
def _(x: Tensor, R: Tensor, backend: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, R, ctx.backend = inputs
    ctx.save_for_backward(R)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (R,) = ctx.saved_tensors
    return torch.ops.dbpkern.transform(grad, R.mT, ctx.backend), None, None  # dx = dz R


_transform.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.dbpkern.transform)
def _flops(x_shape: Sequence[int], R_shape: Sequence[int], *args: object, **kwargs: object) -> int:
    return 2 * math.prod(x_shape) * x_shape[-1]


def transform(x: Tensor, R: Tensor, *, backend: str | None = None) -> Tensor:
    """Apply R to every row: `z = x R^T`.

    Args:
        x: `[*, d]`, or `[L, n, d]` together with a stack of R.
        R: `[d, d]` or `[L, d, d]`; gets no gradient.
        backend: None for the automatic choice, "eager" or "triton". Eager computes in the wider of the two
            dtypes; Triton rounds R to 16 bits in registers where x has them, and sums in fp32.

    Returns:
        `[*, d]` in the dtype of x, rounded once; differentiable in x (`dx = dz R`).

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes or devices that do not fit, a backend that cannot serve the call.
    """
    check_tensor("R", R, "[d, d] or [L, d, d]", (2, 3))
    check_tensor("x", x, "[*, d]", (3,) if R.dim() == 3 else tuple(range(1, 9)))
    check_matrix("R", R, x.shape[-1], "[(L,) d, d]")
    if R.dim() == 3 and len(R) != len(x):
        raise ValueError(f"x and R: expected equal numbers of layers, got {len(x)} and {len(R)}")
    check_same_device(x=x, R=R)
    _dispatch.check_backend(backend)
    return torch.ops.dbpkern.transform(x, R, backend or "")
