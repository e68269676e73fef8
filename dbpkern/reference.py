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


def map_gradient(g: Tensor, R: Tensor) -> Tensor:
    """`g R^T`, what an optimizer of `V = W R` takes for the gradient g of V: that of W. `[o, d], [d, d]`."""
    return g @ R.T


def map_change(V: Tensor, before: Tensor, R: Tensor) -> Tensor:
    """`before + (V - before) R`: a step of W, made on V, as one of V. All `[o, d]`, R `[d, d]`."""
    return before + (V - before) @ R


def adamw(
    V: Tensor,
    g: Tensor,
    R: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """AdamW between the two maps: the new V, first and second moments, all `[o, d]`; `step` counts from 1.

    The decay is of V itself, which it is where W decays in `V = W R`.
    """
    g = map_gradient(g, R)
    exp_avg = beta1 * exp_avg + (1 - beta1) * g
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g**2
    m, v = exp_avg / (1 - beta1**step), exp_avg_sq / (1 - beta2**step)
    D = m / (v.sqrt() + eps)
    return (1 - lr * weight_decay) * V - lr * D @ R, exp_avg, exp_avg_sq


def correlation(z: Tensor, kappa: float = 0.0, scale_free: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """M `[L, d, d]`, the mean squares `a [L, d]` and a bound `[L]` from the samples `z [L, n, d]`.

    `G = z^T z / n`, `a = diag G`, `M = (1 - kappa) offdiag(G) + kappa (diag(G) - I)`; `scale_free` divides
    `M_ij` by `a_i + a_j`. What is not finite then is zero in M: features without variance, and layers whose
    samples are not finite. No eigenvalue of M exceeds the bound, the smaller of its Frobenius norm and its
    largest absolute row sum. No rows, no evidence: with n = 0 all are zero.
    """
    L, n, d = z.shape
    if n == 0 or d == 0:
        return z.new_zeros(L, d, d), z.new_zeros(L, d), z.new_zeros(L)
    G = z.mT @ z / n
    a = G.diagonal(dim1=-2, dim2=-1)
    M = (1 - kappa) * (G - torch.diag_embed(a)) + kappa * torch.diag_embed(a - 1)
    if scale_free:
        M = M / (a[:, :, None] + a[:, None, :])
    M = torch.where(M.isfinite(), M, 0)
    bound = torch.minimum(M.square().sum((1, 2)).sqrt(), M.abs().sum(2).amax(1))
    return M, a.clone(), bound


def choose_rates(
    caution: Tensor, a: Tensor, bound: Tensor | None, eta: float, limit: float | None
) -> tuple[Tensor, Tensor]:
    """The caution `[L]` after a step and the rates `[L]` of that step.

    A layer whose mean squares `a [L, d]` are not finite rests, and its caution is halved. The others step by
    `min(caution eta, limit / bound)`, or by `caution eta` without a bound.
    """
    sound = a.sum(1).isfinite()
    caution = torch.where(sound, caution, caution / 2)
    rates = caution * eta
    if bound is not None:
        assert limit is not None
        rates = torch.minimum(rates, limit / bound.clamp(min=torch.finfo(bound.dtype).tiny))
    return caution, torch.where(sound, rates, 0)


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


def apply(R: Tensor, M: Tensor, eta: float) -> Tensor:
    """`R - eta M R`, the decorrelation step: `[L, d, d], [L, d, d] -> [L, d, d]`."""
    return R - eta * (M @ R)


def update(R: Tensor, z: Tensor, eta: float, kappa: float = 0.0) -> Tensor:
    """The step from the samples: `apply(R, correlation(z, kappa)[0], eta)`."""
    return apply(R, correlation(z, kappa)[0], eta)


def fused_step(
    x: Tensor, R: Tensor, index: Tensor, eta: float, kappa: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """`z [n, d]` of all rows with the old R, the new R from the rows `index [n_s]`, and `a [d]`."""
    z = transform(x, R)
    M, a, _ = correlation(z[index][None], kappa)
    return z, apply(R[None], M, eta)[0], a[0]


def orthogonalize(
    X: Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
) -> Tensor:
    """Nearly `U V^T` of each `X [L, o, d] = U diag(s) V^T`, by Newton-Schulz steps as Muon takes them.

    A step maps every singular value s to `a s + b s^3 + c s^5` (Jordan et al. 2024, "Muon: An optimizer for
    hidden layers in neural networks"). With its coefficients five steps bring most of them to 0.7 ... 1.2.
    """
    a, b, c = coefficients
    found = []
    for x in X:
        tall = len(x) > x.shape[1]
        x = x.T if tall else x
        x = x / x.norm().clamp(min=eps)
        for _ in range(steps):
            A = x @ x.T
            x = a * x + (b * A + c * A @ A) @ x
        found.append(x.T if tall else x)
    return torch.stack(found) if found else X.clone()


def published_step(R: Tensor, x: Tensor, eta: float, kappa: float = 0.0) -> Tensor:
    """One update of R from the sampled inputs `x [n, d]` as the papers state it, with no reordering.

    The sampled rows go through R a second time, the full C is formed, and R changes by `-eta C R`. The
    variance term scales rows of R, as the equation asks (the published code scales columns).
    """
    z = x @ R.T
    X = z.T @ z / len(z)
    v = torch.diag(X) - 1
    C = X - torch.diag(torch.diag(X))
    return R - eta * ((1 - kappa) * (C @ R) + kappa * (torch.diag(v) @ R))


def lowrank_matrix(Q: Tensor, S: Tensor) -> Tensor:
    """`R = I + Q S Q^T`: `[(L,) d, r], [(L,) r, r] -> [(L,) d, d]`."""
    return torch.eye(Q.shape[-2], dtype=Q.dtype, device=Q.device) + Q @ S @ Q.mT


def lowrank_transform(x: Tensor, Q: Tensor, S: Tensor) -> Tensor:
    """`transform(x, R)` with the low-rank R."""
    return transform(x, lowrank_matrix(Q, S))


def lowrank_fold(W: Tensor, Q: Tensor, S: Tensor) -> Tensor:
    """`fold(W, R)` with the low-rank R."""
    return fold(W, lowrank_matrix(Q, S))


def lowrank_statistics(x: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`B [L, r, r]`, `Y [L, d, r]` and `c [L, d]` of the rows `x [L, n, d]` before R, `Q [L, d, r]`.

    With the input's second moment `C = x^T x / n`: `B = Q^T C Q`, `Y = C Q`, `c = diag C`. With n = 0 all
    are zero.
    """
    C = x.mT @ x / max(x.shape[1], 1)
    return Q.mT @ C @ Q, C @ Q, C.diagonal(dim1=-2, dim2=-1).clone()


def lowrank_apply(
    Q: Tensor,
    S: Tensor,
    B: Tensor,
    Y: Tensor,
    c: Tensor,
    eta: float | Tensor,
    kappa: float = 0.0,
    q_eta: float = 0.2,
    ridge: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """The step of `R = I + Q S Q^T` from its statistics: the new `Q [L, d, r]` and `S [L, r, r]`.

    S follows the rule of the full R within the subspace. Q moves towards `Y B^-1`, which spans what one step
    of subspace iteration does, and S turns with it, by the rotation nearest to `Q_new^T Q`. (The op iterates
    towards that rotation, and falls short of it where Q turns by more than 65 degrees in one step.) B is
    inverted with `ridge` times its trace on its diagonal. A layer with all statistics zero stays as it is.
    """
    Q_new, S_new = Q.clone(), S.clone()
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    for i in range(len(Q)):
        if not c[i].any():
            continue
        V, T = Q[i] @ S[i], eye + S[i]
        g = c[i] + 2 * (Y[i] * V).sum(1) + (V @ B[i] * V).sum(1)  # mean squares of z
        D = Q[i].T @ torch.diag(g) @ Q[i]
        M = (1 - kappa) * (T @ B[i] @ T.T - D) + kappa * (D - eye)
        T = T - eta * M @ T
        target = torch.linalg.solve(B[i] + ridge * B[i].trace() * eye, Y[i].T).T
        basis, upper = torch.linalg.qr(Q[i] + q_eta * (target - Q[i]))
        Q_new[i] = basis * upper.diagonal().sign()
        left, _, right = torch.linalg.svd(Q_new[i].T @ Q[i])
        U = left @ right
        S_new[i] = U @ (T - eye) @ U.T
    return Q_new, S_new


def lowrank_step(
    Q: Tensor,
    S: Tensor,
    caution: Tensor,
    B: Tensor,
    Y: Tensor,
    c: Tensor,
    eta: float,
    kappa: float = 0.0,
    scale_free: bool = True,
    limit: float | None = 0.5,
    q_eta: float = 0.2,
    ridge: float = 1e-4,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`lowrank_apply` at rates chosen for each layer: the new Q, S and `caution [L]`, and the `rates [L]`.

    The rate is `min(caution eta, limit / bound)`, where `bound = (||T B T^T||_F + kappa) / unit` is at least
    the largest eigenvalue of M within the subspace. With `scale_free`, M is divided by `unit`, twice the mean
    of the mean squares of z, which is 1 otherwise. A layer whose statistics are not finite rests: its rate
    is 0, and its caution is halved.
    """
    Q_new, S_new, caution = Q.clone(), S.clone(), caution.clone()
    rates = torch.zeros_like(caution)
    tiny = torch.finfo(Q.dtype).tiny
    for i in range(len(Q)):
        if not c[i].sum().isfinite():
            caution[i] /= 2
            continue
        V, T = Q[i] @ S[i], torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device) + S[i]
        g = c[i] + 2 * (Y[i] * V).sum(1) + (V @ B[i] * V).sum(1)  # mean squares of z
        unit = (2 * g.mean()).clamp(min=tiny) if scale_free else 1.0
        rates[i] = caution[i] * eta
        if limit is not None:
            bound = (torch.linalg.matrix_norm(T @ B[i] @ T.T) + kappa) / unit
            rates[i] = torch.minimum(rates[i], limit / bound.clamp(min=tiny))
        one = slice(i, i + 1)
        Q_new[one], S_new[one] = lowrank_apply(
            Q[one], S[one], B[one], Y[one], c[one], rates[i] / unit, kappa, q_eta, ridge
        )
    return Q_new, S_new, caution, rates
