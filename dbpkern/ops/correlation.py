"""`M` and the column mean squares: what the sampled rows say about R."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dbpkern.ops._common import accumulator_dtype, autocast_off, check_kappa, check_tensor


@torch.library.custom_op("dbpkern::correlation", mutates_args=())
def _correlation(z: Tensor, kappa: float) -> tuple[Tensor, Tensor]:
    L, n, d = z.shape
    dtype = accumulator_dtype(z.dtype)
    if n == 0:
        return z.new_zeros(L, d, d, dtype=dtype), z.new_zeros(L, d, dtype=dtype)
    with autocast_off(z.device):
        z = z.to(dtype)
        G = torch.bmm(z.mT, z).div_(n)
        diagonal = G.diagonal(dim1=-2, dim2=-1)
        a = diagonal.clone()
        # G becomes M in place: a second d x d matrix per layer would double the scratch.
        if kappa:
            G.mul_(1 - kappa)
            diagonal.copy_(a - 1).mul_(kappa)
        else:
            diagonal.zero_()
        return G, a


@_correlation.register_fake
def _(z: Tensor, kappa: float) -> tuple[Tensor, Tensor]:
    L, _, d = z.shape
    dtype = accumulator_dtype(z.dtype)
    return z.new_empty(L, d, d, dtype=dtype), z.new_empty(L, d, dtype=dtype)


@register_flop_formula(torch.ops.dbpkern.correlation)
def _flops(z_shape, *args, **kwargs) -> int:
    L, n, d = z_shape
    return 2 * L * n * d**2


def correlation(z: Tensor, kappa: float = 0.0) -> tuple[Tensor, Tensor]:
    """Statistics of decorrelated samples, per layer: `G = z^T z / n`, not centred.

    Args:
        z: `[L, n, d]`, the sampled rows of L layers. n = 0 gives zeros.
        kappa: weight in [0, 1] of the unit-variance term (arXiv 2405.02385), 0 for pure decorrelation.

    Returns:
        `M [L, d, d] = (1 - kappa) offdiag(G) + kappa (diag(G) - I)` and `a [L, d] = diag(G)`, both in
        fp32 (fp64 for fp64 samples).

    Raises:
        TypeError: z not a floating-point tensor.
        ValueError: z not of three dimensions, kappa outside [0, 1].
    """
    check_tensor("z", z, "[L, n, d]", (3,))
    check_kappa(kappa)
    return torch.ops.dbpkern.correlation(z, float(kappa))
