"""Decorrelate every row and update R from a sample of them, in one operation."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dbpkern.ops._common import (
    autocast_off,
    check_accumulator,
    check_kappa,
    check_matrix,
    check_same_device,
    check_tensor,
    rate_tensor,
)
from dbpkern.ops.apply import apply_in_place


@torch.library.custom_op("dbpkern::fused_step", mutates_args=())
def _fused_step(
    x: Tensor, R: Tensor, index: Tensor, lr: Tensor, kappa: float
) -> tuple[Tensor, Tensor, Tensor]:
    with autocast_off(x.device):
        compute = torch.promote_types(x.dtype, R.dtype)
        z = torch.matmul(x.to(compute), R.to(compute).mT)
        M, a = torch.ops.dbpkern.correlation(z.index_select(0, index)[None].to(R.dtype), kappa)
        R_new = R.clone(memory_format=torch.contiguous_format)
        apply_in_place(R_new[None], M, lr)
        return z.to(x.dtype), R_new, a[0]


@_fused_step.register_fake
def _(x: Tensor, R: Tensor, index: Tensor, lr: Tensor, kappa: float) -> tuple[Tensor, Tensor, Tensor]:
    z = torch.empty_like(x, memory_format=torch.contiguous_format)
    R_new = torch.empty_like(R, memory_format=torch.contiguous_format)
    return z, R_new, R.new_empty(len(R))


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dz: Tensor | None, *_) -> tuple[Tensor | None, None, None, None, None]:
    (R,) = ctx.saved_tensors
    return None if dz is None else torch.ops.dbpkern.transform(dz, R.mT), None, None, None, None


_fused_step.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.dbpkern.fused_step)
def _flops(x_shape, R_shape, index_shape, *args, **kwargs) -> int:
    n, d = x_shape
    return 2 * n * d**2 + 2 * index_shape[0] * d**2 + 2 * d**3


def fused_step(
    x: Tensor, R: Tensor, index: Tensor, lr: float | Tensor, kappa: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Decorrelate all rows with R and form the R of the next step from the rows `index`.

    Args:
        x: `[n, d]`.
        R: `[d, d]`, fp32 or fp64; gets no gradient and is not changed.
        index: `[n_s]`, int64 row numbers in [0, n), as a rule without repetition. Their range is checked
            where the rows are gathered (on a GPU asynchronously), so that the host need not wait.
        lr: eta, a number >= 0 or a 0-d tensor.
        kappa: weight in [0, 1] of the unit-variance term.

    Returns:
        `z [n, d]` in the dtype of x, differentiable in x with the old R; `R_new [d, d]`; and `a [d]`, the
        mean squares of the sampled rows of z. An empty `index` returns R unchanged and zeros.

    Raises:
        TypeError: dtypes other than those above.
        ValueError: shapes or devices that do not fit, rate or kappa out of range.
    """
    check_tensor("x", x, "[n, d]", (2,))
    check_tensor("R", R, "[d, d]", (2,))
    check_accumulator("R", R)
    check_matrix("R", R, x.shape[-1], "[d, d]")
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index: expected an int64 tensor [n_s], got {kind}")
    if index.dim() != 1:
        raise ValueError(f"index: expected shape [n_s], got {list(index.shape)}")
    check_same_device(x=x, R=R, index=index)
    check_kappa(kappa)
    return torch.ops.dbpkern.fused_step(x, R, index, rate_tensor(lr, 1, R.device), float(kappa))
