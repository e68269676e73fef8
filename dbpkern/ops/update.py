"""`R <- R - eta M R` straight from the samples, by the cheaper association."""

from collections.abc import Sequence

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
    per_layer,
)
from dbpkern.ops.apply import apply_in_place


def forms_correlation(n: int, d: int) -> bool:
    """Whether forming M is the cheaper way for n samples of d features.

    Forming M and multiplying costs `2 n d^2 + 2 d^3`; the association `z^T (z R)` costs `4 n d^2` and no
    d x d scratch.
    """
    return n >= d


def eager_update(R: Tensor, z: Tensor, eta: Tensor, kappa: float) -> None:
    """`R -= eta M R` by PyTorch's products; z has rows."""
    _, n, d = z.shape
    z = z.to(R.dtype)
    if forms_correlation(n, d):
        M, a, _ = torch.ops.dbpkern.correlation(z, kappa, False, z.dtype, "eager")
        # M hides samples that are not finite; R shows them, as it does in the other association.
        apply_in_place(R, M, eta + 0.0 * a.sum(1))
        return
    # M R = (1 - kappa) z^T (z R) / n + diag(c) R, with the diagonal of M corrected row by row:
    # c = kappa (a - 1) - (1 - kappa) a.
    a = torch.linalg.vector_norm(z, dim=1).square_().div_(n)
    rate = per_layer(eta, R.dtype)
    rows = 1 - rate * (kappa * (a - 1) - (1 - kappa) * a)[:, :, None]
    zR = torch.bmm(z, R).mul_(rate)
    R.mul_(rows)
    R.baddbmm_(z.mT, zR, alpha=-(1 - kappa) / n)


@operator("update_", mutates=("R",))
def _update(R: Tensor, z: Tensor, eta: Tensor, kappa: float) -> None:
    if z.numel():
        with autocast_off(R.device):
            eager_update(R, z, eta, kappa)


@_update.register_fake
def _(R: Tensor, z: Tensor, eta: Tensor, kappa: float) -> None:
    return None


@register_flop_formula(torch.ops.dbpkern.update_)
def _flops(R_shape: Sequence[int], z_shape: Sequence[int], *args: object, **kwargs: object) -> int:
    L, n, d = z_shape
    return L * (2 * n * d**2 + 2 * d**3 if forms_correlation(n, d) else 4 * n * d**2)


def update_(
    R: Tensor, z: Tensor, eta: float | Tensor, kappa: float = 0.0, *, backend: str | None = None
) -> Tensor:
    """Update a stack of R in place from decorrelated samples: `apply_(R, correlation(z, kappa)[0], eta)`.

    For when nothing (a reduction over processes, averaging, a limiter) acts on M: with fewer samples than
    features M is never formed.

    Args:
        R: `[L, d, d]`, fp32 or fp64; changed in place.
        z: `[L, n, d]`, the samples after R, any floating-point dtype. n = 0 leaves R as it is; samples that
            are not finite make R so.
        eta: a number >= 0, a 0-d tensor, or `[L]` for a rate per layer. A CUDA graph freezes a number;
            a tensor on the device is read at each replay.
        kappa: weight in [0, 1] of the unit-variance term.
        backend: "eager", or None for the same.

    Returns:
        R.

    Raises:
        TypeError: R not fp32 or fp64, z not a floating-point tensor.
        ValueError: shapes or devices that do not fit, rate or kappa out of range, a backend that cannot serve
            the call.
    """
    check_tensor("R", R, "[L, d, d]", (3,))
    check_accumulator("R", R)
    check_tensor("z", z, "[L, n, d]", (3,))
    check_matrix("R", R, z.shape[-1], "[L, d, d]")
    if len(R) != len(z):
        raise ValueError(f"R and z: expected equal numbers of layers, got {len(R)} and {len(z)}")
    check_same_device(R=R, z=z)
    check_kappa(kappa)
    _dispatch.check_backend(backend)
    _dispatch.choose("update_", backend or "", {})
    torch.ops.dbpkern.update_(R, z, eta_tensor(eta, len(R), R.device), float(kappa))
    return R
