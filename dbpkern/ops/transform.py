"""`z = x R^T`: the decorrelated input."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dbpkern.ops._common import autocast_off, check_matrix, check_same_device, check_tensor


@torch.library.custom_op("dbpkern::transform", mutates_args=())
def _transform(x: Tensor, R: Tensor) -> Tensor:
    with autocast_off(x.device):
        compute = torch.promote_types(x.dtype, R.dtype)
        # A new tensor also for the identity and for empty x: an op may not return its input.
        return torch.matmul(x.to(compute), R.to(compute).mT).to(x.dtype)


@_transform.register_fake
def _(x: Tensor, R: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output) -> None:
    _, R = inputs
    ctx.save_for_backward(R)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
    (R,) = ctx.saved_tensors
    return torch.ops.dbpkern.transform(grad, R.mT), None  # dx = dz R


_transform.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.dbpkern.transform)
def _flops(x_shape, R_shape, *args, **kwargs) -> int:
    rows = 1
    for size in x_shape[:-1]:
        rows *= size
    return 2 * rows * x_shape[-1] ** 2


def transform(x: Tensor, R: Tensor) -> Tensor:
    """Apply R to every row: `z = x R^T`.

    Args:
        x: `[*, d]`, or `[L, n, d]` together with a stack of R.
        R: `[d, d]` or `[L, d, d]`; gets no gradient.

    Returns:
        `[*, d]` in the dtype of x, computed in the wider of the two dtypes and rounded once;
        differentiable in x (`dx = dz R`).

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes or devices that do not fit.
    """
    check_tensor("R", R, "[d, d] or [L, d, d]", (2, 3))
    check_tensor("x", x, "[*, d]", (3,) if R.dim() == 3 else tuple(range(1, 9)))
    check_matrix("R", R, x.shape[-1], "[(L,) d, d]")
    if R.dim() == 3 and len(R) != len(x):
        raise ValueError(f"x and R: expected equal numbers of layers, got {len(x)} and {len(R)}")
    check_same_device(x=x, R=R)
    return torch.ops.dbpkern.transform(x, R)
