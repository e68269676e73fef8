"""The specification: every operation written for reading, in any dtype, float64 included.

Row convention throughout: `x [n, d]` holds n tokens of d features, `R [d, d]`, `W [o, d]`.
The functions return new tensors, loop over stacked layers, and allocate freely; `dbpkern.ops` computes
the same numbers fast, and the tests hold it to these.

Sources: the decorrelation rule is Eqs. 4 and 5 of Carrigg et al., "Decorrelation Speeds Up Vision
Transformers" (arXiv 2510.14657); its kappa term for the variances is from Dalm et al., "Efficient Deep
Learning with Decorrelated Backpropagation" (arXiv 2405.02385).
"""

import torch
from torch import Tensor


def transform(x: Tensor, R: Tensor) -> Tensor:
    """`z = x R^T`: `[*, d], [d, d] -> [*, d]`, or stacked `[L, n, d], [L, d, d] -> [L, n, d]`."""
    return x @ R.mT


def fold(W: Tensor, R: Tensor) -> Tensor:
    """`W R`, the weight that acts on x as W acts on z: `[(L,) o, d], [(L,) d, d] -> [(L,) o, d]`."""
    return W @ R


def correlation(z: Tensor, kappa: float = 0.0) -> tuple[Tensor, Tensor]:
    """`M [L, d, d]` and the mean squares `a [L, d]` of the samples `z [L, n, d]`.

    `G = z^T z / n`, `a = diag G`, `M = (1 - kappa) offdiag(G) + kappa (diag(G) - I)`. No rows, no
    evidence: with n = 0 both are zero.
    """
    L, n, d = z.shape
    if n == 0:
        return z.new_zeros(L, d, d), z.new_zeros(L, d)
    G = z.mT @ z / n
    a = G.diagonal(dim1=-2, dim2=-1)
    M = (1 - kappa) * (G - torch.diag_embed(a)) + kappa * torch.diag_embed(a - 1)
    return M, a.clone()


def loss(z: Tensor, kappa: float = 0.0) -> Tensor:
    """Decorrelation loss `[L]` of the samples `z [L, n, d]`.

    `((1 - kappa) ||offdiag G||_F^2 + kappa ||diag G - 1||^2) / d^2`.
    """
    L, n, d = z.shape
    if n == 0:
        return z.new_zeros(L)
    G = z.mT @ z / n
    a = G.diagonal(dim1=-2, dim2=-1)
    off = G - torch.diag_embed(a)
    return ((1 - kappa) * off.square().sum((-2, -1)) + kappa * (a - 1).square().sum(-1)) / d**2


def apply(R: Tensor, M: Tensor, lr: float) -> Tensor:
    """`R - lr M R`, the decorrelation step: `[L, d, d], [L, d, d] -> [L, d, d]`."""
    return R - lr * (M @ R)


def update(R: Tensor, z: Tensor, lr: float, kappa: float = 0.0) -> Tensor:
    """The step from the samples: `apply(R, correlation(z, kappa)[0], lr)`."""
    return apply(R, correlation(z, kappa)[0], lr)


def fused_step(
    x: Tensor, R: Tensor, index: Tensor, lr: float, kappa: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """`z [n, d]` of all rows with the old R, the new R from the rows `index [n_s]`, and `a [d]`."""
    z = transform(x, R)
    M, a = correlation(z[index][None], kappa)
    return z, apply(R[None], M, lr)[0], a[0]


def published_step(R: Tensor, x: Tensor, lr: float, kappa: float = 0.0) -> Tensor:
    """One update of R from the sampled inputs `x [n, d]` as the papers state it, with no reordering.

    The sampled rows go through R a second time, the full C is formed, and R changes by `-lr C R`. The
    variance term scales rows of R, as the equation asks (the published code scales columns).
    """
    z = x @ R.T
    X = z.T @ z / len(z)
    v = torch.diag(X) - 1
    C = X - torch.diag(torch.diag(X))
    return R - lr * ((1 - kappa) * (C @ R) + kappa * (torch.diag(v) @ R))
