"""Decorrelate every row and update R from a sample of them, in one operation."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dbpkern.ops import _dispatch
from dbpkern.ops._common import (
    autocast_off,
    check_accumulator,
    check_kappa,
    check_matrix,
    check_same_device,
    check_tensor,
    eta_tensor,
    operator,
)
from dbpkern.ops.update import eager_update, forms_correlation


def _eager_fused(
    x: Tensor, R: Tensor, index: Tensor, eta: Tensor, kappa: float
) -> tuple[Tensor, Tensor, Tensor]:
    compute = torch.promote_types(x.dtype, R.dtype)
    z = torch.matmul(x.to(compute), R.to(compute).mT)
    new = R.clone(memory_format=torch.contiguous_format)
    if not len(index):
        return z.to(x.dtype), new, R.new_zeros(len(R))
    # In the precision of R: z is not rounded to the dtype of x before it is summed.
    samples = z.index_select(0, index).to(R.dtype)
    eager_update(new[None], samples[None], eta, kappa)
    return z.to(x.dtype), new, torch.linalg.vector_norm(samples, dim=0).square_().div_(len(index))


@operator("fused_step")
def _fused_step(
    x: Tensor, R: Tensor, index: Tensor, eta: Tensor, kappa: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    _dispatch.choose("fused_step", backend, {})
    with autocast_off(x.device):
        return _eager_fused(x, R, index, eta, kappa)


@_fused_step.register_fake
def _(
    x: Tensor, R: Tensor, index: Tensor, eta: Tensor, kappa: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    z = torch.empty_like(x, memory_format=torch.contiguous_format)
    R_new = torch.empty_like(R, memory_format=torch.contiguous_format)
    return z, R_new, R.new_empty(len(R))


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.backend = inputs[5]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dz: Tensor | None, *_) -> tuple[Tensor | None, None, None, None, None, None]:
    (R,) = ctx.saved_tensors
    dx = None if dz is None else torch.ops.dbpkern.transform(dz, R.mT, ctx.backend)
    return dx, None, None, None, None, None


_fused_step.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.dbpkern.fused_step)
def _flops(x_shape, R_shape, index_shape, *args, **kwargs) -> int:
    n, d = x_shape
    samples = index_shape[0]
    return 2 * n * d**2 + (2 * (samples + d) if forms_correlation(samples, d) else 4 * samples) * d**2


def fused_step(
    x: Tensor,
    R: Tensor,
    index: Tensor,
    eta: float | Tensor,
    kappa: float = 0.0,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Decorrelate all rows with R and form the R of the next step from the rows `index`.

    Args:
        x: `[n, d]`.
        R: `[d, d]`, fp32 or fp64; gets no gradient and is not changed.
        index: `[n_s]`, int64 row numbers in [0, n), as a rule without repetition. The host does not wait for
            a look at their range: eager gathering checks it (on a GPU asynchronously), the Triton kernels
            that gather rows themselves answer a number out of range with NaN in R_new and a.
        eta: eta, a number >= 0 or a 0-d tensor.
        kappa: weight in [0, 1] of the unit-variance term.
        backend: None for the automatic choice, "eager" or "triton".

    Returns:
        `z [n, d]` in the dtype of x, differentiable in x with the old R; `R_new [d, d]`; and `a [d]`, the
        mean squares of the sampled rows of z. An empty `index` returns R unchanged and zeros.

    Raises:
        TypeError: dtypes other than those above.
        ValueError: shapes or devices that do not fit, rate or kappa out of range, a backend that cannot serve
            the call.
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
    _dispatch.check_backend(backend)
    rate = eta_tensor(eta, 1, R.device)
    return torch.ops.dbpkern.fused_step(x, R, index, rate, float(kappa), backend or "")
