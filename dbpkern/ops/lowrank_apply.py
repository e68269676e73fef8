"""The decorrelation step of a low-rank R from finished statistics; the subspace follows the input's."""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dbpkern.ops._common import (
    autocast_off,
    check_accumulator,
    check_kappa,
    check_same_device,
    check_same_dtype,
    check_tensor,
    eta_tensor,
    operator,
    per_layer,
)
from dbpkern.ops._dispatch import check_backend, choose
from dbpkern.ops.lowrank_fold import check_factors, ieee_products

# Added to B's diagonal, relative to its trace, before B is inverted: with fewer rows than ranks B is
# singular, and with about as many its inverse is mostly noise, which Q would follow.
RIDGE = 1e-4
# Newton-Schulz steps of `_rotation`; they bring cosines from 0.4 up to 1 in fp32.
ROTATION_STEPS = 6


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _stepped(Q: Tensor, S: Tensor, B: Tensor, Y: Tensor, c: Tensor, rate: Tensor, kappa: float) -> Tensor:
    """S after `T <- T - eta M_Q T`, `T = I + S`; a step too small to show in T still shows in S."""
    V = torch.bmm(Q, S)
    g = c + 2 * (Y * V).sum(-1) + (torch.bmm(V, B) * V).sum(-1)  # mean squares of z, [L, d]
    eye = _identity(S)
    T = S + eye
    diagonal = torch.bmm(Q.mT, g[:, :, None] * Q)
    M = torch.bmm(torch.bmm(T, B), T.mT).sub_(diagonal)
    if kappa:
        M.mul_(1 - kappa).add_(diagonal.sub_(eye), alpha=kappa)
    return S - rate * torch.bmm(M, T)


def _orthonormal(A: Tensor) -> tuple[Tensor, Tensor]:
    """A basis of the columns of `A [L, d, r]`, and per layer whether it is one.

    Cholesky and not QR, which has no batched form that leaves the host alone; twice, because once loses
    digits with the square of A's condition number.
    """
    found = torch.ones(len(A), dtype=torch.bool, device=A.device)
    for _ in range(2):
        factor, info = torch.linalg.cholesky_ex(torch.bmm(A.mT, A))
        A = torch.linalg.solve_triangular(factor.mT, A, upper=True, left=False)
        found &= info == 0
    return A, found & A.isfinite().all(-1).all(-1)


def _moved(Q: Tensor, B: Tensor, Y: Tensor, q_eta: float) -> tuple[Tensor, Tensor]:
    """Q after `orth(Q + q_eta (Y B^-1 - Q))`, and per layer whether that succeeded."""
    ridge = RIDGE * B.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    factor, info = torch.linalg.cholesky_ex(B + ridge * _identity(B))
    half = torch.linalg.solve_triangular(factor.mT, Y, upper=True, left=False)
    target = torch.linalg.solve_triangular(factor, half, upper=False, left=False)
    moved, found = _orthonormal(torch.lerp(Q, target, q_eta))
    return moved, found & (info == 0)


def _rotation(P: Tensor) -> Tensor:
    """The orthogonal factor of `P [L, r, r]`, whose singular values are at most 1.

    They are the cosines of the angles between old and new subspace. Where one is small, S fades instead.
    """
    for _ in range(ROTATION_STEPS):
        P = torch.baddbmm(P, torch.bmm(P, P.mT), P, beta=1.5, alpha=-0.5)
    return P


@operator("lowrank_apply_", mutates=("Q", "S"))
def _lowrank_apply(
    Q: Tensor, S: Tensor, B: Tensor, Y: Tensor, c: Tensor, eta: Tensor, kappa: float, q_eta: float
) -> None:
    # S is turned by two products in every step: in TF32 it would grow or fade, step after step.
    with autocast_off(Q.device), ieee_products(Q.device):
        stepped = _stepped(Q, S, B, Y, c, per_layer(eta, S.dtype), kappa)
        moved, found = _moved(Q, B, Y, q_eta)
        U = _rotation(torch.bmm(moved.mT, Q))
        found = found[:, None, None]
        turned = torch.bmm(torch.bmm(U, stepped), U.mT)
        # No rows, no evidence; a NaN is evidence of something.
        seen = (c != 0).any(-1)[:, None, None]
        S.copy_(torch.where(seen, torch.where(found, turned, stepped), S))
        Q.copy_(torch.where(seen & found, moved, Q))


@_lowrank_apply.register_fake
def _(Q: Tensor, S: Tensor, B: Tensor, Y: Tensor, c: Tensor, eta: Tensor, kappa: float, q_eta: float) -> None:
    return None


@register_flop_formula(torch.ops.dbpkern.lowrank_apply_)
def _flops(Q_shape, *args, **kwargs) -> int:
    L, d, r = Q_shape
    # 5 products and 3 Gram matrices or solves of d rows; then T B T^T, M T, 3 Cholesky, the rotation.
    return L * (16 * d * r**2 + (6 + 1 + 4 * ROTATION_STEPS + 4) * r**3)


def lowrank_apply_(
    Q: Tensor,
    S: Tensor,
    B: Tensor,
    Y: Tensor,
    c: Tensor,
    eta: float | Tensor,
    kappa: float = 0.0,
    q_eta: float = 0.2,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Update a stack of low-rank `R = I + Q S Q^T` in place from the statistics of its input.

    Inside the subspace, S follows the rule of the full R (arXiv 2510.14657, Eq. 4; its kappa term from arXiv
    2405.02385): `T <- T - eta M_Q T` with `T = I + S` and `M_Q = Q^T M Q`, where M is that of all d features.
    Q then follows the leading eigenvectors of the input's second moment, `orth(Q + q_eta (Y B^-1 - Q))`, and
    S turns with it. With r = d this is the full update, however Q moves.

    A layer whose statistics are all zero, having no rows, stays as it is. Where a factorisation fails or a
    result is not finite, that layer's Q stays. Nothing waits for the device, and nothing of size `d x d` is
    formed. Products are fp32 throughout, also where PyTorch may use TF32 for its own: what a step loses of S
    is lost for good.

    Args:
        Q: `[L, d, r]`, fp32 or fp64, orthonormal columns; changed in place.
        S: `[L, r, r]` of the same dtype; changed in place.
        B: `[L, r, r]` of the same dtype, as `lowrank_statistics` returns it.
        Y: `[L, d, r]`, likewise.
        c: `[L, d]`, likewise.
        eta: eta, a number >= 0, a 0-d tensor, or `[L]` for a rate per layer.
        kappa: weight in [0, 1] of the unit-variance term.
        q_eta: how far Q moves towards its target, in [0, 1]; free of the input's scale.
        backend: "eager", or None for the same.

    Returns:
        Q and S.

    Raises:
        TypeError: dtypes other than fp32 or fp64, or unequal ones.
        ValueError: shapes or devices that do not fit, r > d, a rate or kappa out of range.
    """
    check_tensor("Q", Q, "[L, d, r]", (3,))
    check_accumulator("Q", Q)
    L, d, r = Q.shape
    if r > d:
        raise ValueError(f"Q: expected shape [L, d, r] with r <= d, got {list(Q.shape)}")
    check_factors(Q, S, d, L)
    for name, value, letters, shape in (
        ("B", B, "[L, r, r]", (L, r, r)),
        ("Y", Y, "[L, d, r]", (L, d, r)),
        ("c", c, "[L, d]", (L, d)),
    ):
        check_tensor(name, value, letters, (len(shape),))
        if value.shape != shape:
            raise ValueError(f"{name}: expected shape {letters} = {list(shape)}, got {list(value.shape)}")
    check_same_dtype(Q=Q, B=B, Y=Y, c=c)
    check_same_device(Q=Q, S=S, B=B, Y=Y, c=c)
    check_kappa(kappa)
    if not (math.isfinite(q_eta) and 0.0 <= q_eta <= 1.0):
        raise ValueError(f"q_eta: expected a number in [0, 1], got {q_eta}")
    check_backend(backend)
    choose("lowrank_apply_", backend or "", {})
    rate = eta_tensor(eta, L, Q.device)
    torch.ops.dbpkern.lowrank_apply_(Q, S, B, Y, c, rate, float(kappa), float(q_eta))
    return Q, S
