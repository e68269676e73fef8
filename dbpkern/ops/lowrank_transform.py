"""`z = x + ((x Q) S^T) Q^T`: the input decorrelated by a low-rank R."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dbpkern.ops._common import check_same_device, check_tensor, operator
from dbpkern.ops._dispatch import check_backend
from dbpkern.ops.lowrank_fold import add_lowrank, check_factors, lowrank_flops


@operator("lowrank_transform")
def _lowrank_transform(x: Tensor, Q: Tensor, S: Tensor, backend: str) -> Tensor:
    if Q.dim() == 3:
        return add_lowrank("lowrank_transform", x, Q, S.mT, x.dtype, backend)
    rows = x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1])
    return add_lowrank("lowrank_transform", rows, Q[None], S[None].mT, x.dtype, backend).view(x.shape)


@_lowrank_transform.register_fake
def _(x: Tensor, Q: Tensor, S: Tensor, backend: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, Q, S, ctx.backend = inputs
    ctx.save_for_backward(Q, S)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    Q, S = ctx.saved_tensors
    # dx = dz R: the rows of dz meet S where those of x met S^T.
    return torch.ops.dbpkern.lowrank_transform(grad, Q, S.mT, ctx.backend), None, None, None


_lowrank_transform.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.dbpkern.lowrank_transform)
def _flops(x_shape: Sequence[int], Q_shape: Sequence[int], *args: object, **kwargs: object) -> int:
    return lowrank_flops(math.prod(x_shape[:-1]), *Q_shape[-2:])


def lowrank_transform(x: Tensor, Q: Tensor, S: Tensor, *, backend: str | None = None) -> Tensor:
    """Apply a low-rank R to every row: `z = x R^T = x + ((x Q) S^T) Q^T` with `R = I + Q S Q^T`.

    Costs `4 n d r + 2 n r^2` and forms no `d x d` matrix. With S = 0 the result is x, bit for bit.

    Args:
        x: `[*, d]`, or `[L, n, d]` together with stacks of Q and S.
        Q: `[d, r]` or `[L, d, r]`, orthonormal columns as a rule; gets no gradient.
        S: `[r, r]` or `[L, r, r]`, of the dtype of Q; gets no gradient.
        backend: "eager", or None for the same. On a GPU the operands are bf16 where x is.

    Returns:
        `[*, d]` in the dtype of x, summed in at least fp32 and rounded once; differentiable in x
        (`dx = dz R`, the same with `S^T`).

    Raises:
        TypeError: not floating-point tensors, or Q and S of unequal dtypes.
        ValueError: shapes or devices that do not fit, or a backend that cannot serve the call.
    """
    check_tensor("Q", Q, "[d, r] or [L, d, r]", (2, 3))
    check_tensor("x", x, "[*, d]" if Q.dim() == 2 else "[L, n, d]", (3,) if Q.dim() == 3 else range(1, 9))
    check_factors(Q, S, x.shape[-1], len(x) if Q.dim() == 3 else None)
    check_same_device(x=x, Q=Q, S=S)
    check_backend(backend)
    return torch.ops.dbpkern.lowrank_transform(x, Q, S, backend or "")
