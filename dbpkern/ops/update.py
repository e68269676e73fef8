"""`R <- R - lr M R` straight from the samples, by the cheaper association."""

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
    per_layer,
    rate_tensor,
)
from dbpkern.ops.apply import apply_in_place


def forms_correlation(n: int, d: int) -> bool:
    """Whether forming M is the cheaper way for n samples of d features.

    Forming M and multiplying costs `2 n d^2 + 2 d^3`, the association `z^T (z R)` costs `4 n d^2`
    and no d x d scratch.
    """
    return n >= d


@torch.library.custom_op("dbpkern::update_", mutates_args=("R",))
def _update(R: Tensor, z: Tensor, lr: Tensor, kappa: float) -> None:
    _, n, d = z.shape
    if n == 0:
        return
    with autocast_off(R.device):
        z = z.to(R.dtype)
        if forms_correlation(n, d):
            M, _ = torch.ops.dbpkern.correlation(z, kappa)
            apply_in_place(R, M, lr)
            return
        # M R = (1 - kappa) z^T (z R) / n + diag(c) R, with the diagonal of M corrected row by row:
        # c = kappa (a - 1) - (1 - kappa) a.
        a = torch.linalg.vector_norm(z, dim=1).square_().div_(n)
        rate = per_layer(lr, R.dtype)
        rows = 1 - rate * (kappa * (a - 1) - (1 - kappa) * a)[:, :, None]
        zR = torch.bmm(z, R).mul_(rate)
        R.mul_(rows)
        R.baddbmm_(z.mT, zR, alpha=-(1 - kappa) / n)


@_update.register_fake
def _(R: Tensor, z: Tensor, lr: Tensor, kappa: float) -> None:
    return None


@register_flop_formula(torch.ops.dbpkern.update_)
def _flops(R_shape, z_shape, *args, **kwargs) -> int:
    L, n, d = z_shape
    return L * (2 * n * d**2 + 2 * d**3 if forms_correlation(n, d) else 4 * n * d**2)


def update_(R: Tensor, z: Tensor, lr: float | Tensor, kappa: float = 0.0) -> Tensor:
    """Update a stack of R in place from decorrelated samples: `apply_(R, correlation(z, kappa)[0], lr)`.

    The fast path when nothing (a reduction over processes, averaging, a limiter) acts on M: with fewer
    samples than features M is never formed.

    Args:
        R: `[L, d, d]`, fp32 or fp64; changed in place.
        z: `[L, n, d]`, the samples after R, any floating-point dtype. n = 0 leaves R as it is.
        lr: eta, a number >= 0, a 0-d tensor, or `[L]` for a rate per layer.
        kappa: weight in [0, 1] of the unit-variance term.

    Returns:
        R.

    Raises:
        TypeError: R not fp32 or fp64, z not a floating-point tensor.
        ValueError: shapes or devices that do not fit, rate or kappa out of range.
    """
    check_tensor("R", R, "[L, d, d]", (3,))
    check_accumulator("R", R)
    check_tensor("z", z, "[L, n, d]", (3,))
    check_matrix("R", R, z.shape[-1], "[L, d, d]")
    if len(R) != len(z):
        raise ValueError(f"R and z: expected equal numbers of layers, got {len(R)} and {len(z)}")
    check_same_device(R=R, z=z)
    check_kappa(kappa)
    torch.ops.dbpkern.update_(R, z, rate_tensor(lr, len(R), R.device), float(kappa))
    return R
