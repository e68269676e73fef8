"""Newton-Schulz orthogonalization of stacks, Muon's step."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dbpkern.ops import _dispatch
from dbpkern.ops._common import autocast_off, check_tensor, operator
from dbpkern.ops.correlation import triton_gram

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Jordan et al.: the steepest at zero whose iteration keeps singular values near one."""


@operator("orthogonalize")
def _orthogonalize(X: Tensor, steps: int, coefficients: Sequence[float], eps: float, backend: str) -> Tensor:
    refusal = _dispatch.triton_refusal(X.device, X.dtype)
    automatic = _dispatch.preferred("orthogonalize", X.device, _dispatch.operands(X.dtype).kind)
    serves = _dispatch.choose("orthogonalize", backend, {"triton": refusal}, automatic)
    if not X.numel():
        return torch.empty_like(X, memory_format=torch.contiguous_format)
    a, b, c = coefficients
    tall = X.shape[1] > X.shape[2]
    x = X.mT if tall else X
    with autocast_off(X.device):
        x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_(min=eps)
        for _ in range(steps):
            if serves == "triton":
                A = triton_gram(x.mT)
                B = triton_gram(A, A, c, b)
            else:
                A = torch.bmm(x, x.mT)
                B = torch.baddbmm(A, A, A, beta=b, alpha=c)
            x = torch.baddbmm(x, B, x, beta=a)
    return (x.mT if tall else x).contiguous()


@_orthogonalize.register_fake
def _(X: Tensor, steps: int, coefficients: Sequence[float], eps: float, backend: str) -> Tensor:
    return torch.empty_like(X, memory_format=torch.contiguous_format)


@register_flop_formula(torch.ops.dbpkern.orthogonalize)
def _flops(X_shape: Sequence[int], steps: int, *args: object, **kwargs: object) -> int:
    L, o, d = X_shape
    o, d = min(o, d), max(o, d)
    return steps * L * (4 * o**2 * d + 2 * o**3)


def orthogonalize(
    X: Tensor,
    steps: int = 5,
    coefficients: Sequence[float] = COEFFICIENTS,
    eps: float = 1e-7,
    *,
    backend: str | None = None,
) -> Tensor:
    """Bring the singular values of every matrix of a stack near one, by Newton-Schulz steps.

    `x <- a x + (b A + c A^2) x` with `A = x x^T` (Jordan et al. 2024, "Muon: An optimizer for hidden layers
    in neural networks"), on each matrix divided by its norm, and transposed where it has more rows than
    columns. A matrix of zeros stays zero. With Triton the two symmetric products of a step compute half of
    their tiles; the third is PyTorch's.

    Args:
        X: `[L, o, d]`, any floating-point dtype, which every product and result has: bfloat16 serves.
        steps: how many, at least 0.
        coefficients: a, b and c.
        eps: the least norm that a matrix is divided by.
        backend: None for the automatic choice, "eager" or "triton".

    Returns:
        `[L, o, d]`.

    Raises:
        TypeError: X not a floating-point tensor.
        ValueError: X not of three dimensions, not three coefficients, fewer than 0 steps, a backend that
            cannot serve the call.
    """
    check_tensor("X", X, "[L, o, d]", (3,))
    if steps < 0:
        raise ValueError(f"steps: expected at least 0, got {steps}")
    if len(coefficients) != 3:
        raise ValueError(f"coefficients: expected three, got {coefficients}")
    _dispatch.check_backend(backend)
    return torch.ops.dbpkern.orthogonalize(X, steps, [float(c) for c in coefficients], eps, backend or "")
