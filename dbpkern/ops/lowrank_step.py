"""The decorrelation step of a low-rank R from finished statistics; the subspace follows the input's."""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dbpkern.ops import _dispatch, _triton
from dbpkern.ops._common import (
    autocast_off,
    check_accumulator,
    check_kappa,
    check_same_device,
    check_same_dtype,
    check_tensor,
    eta_tensor,
    operator,
)
from dbpkern.ops._matmul import cdiv, load_rate, rate_arguments
from dbpkern.ops._triton import jit, tl
from dbpkern.ops.lowrank_fold import check_factors, ieee_products
from dbpkern.ops.lowrank_statistics import rank_block

# Added to B's diagonal, relative to its trace, before B is inverted: with fewer rows than ranks B is
# singular, and with about as many its inverse is mostly noise, which Q would follow.
RIDGE = 1e-4
# Newton-Schulz steps towards a rotation; they bring cosines from 0.4 up to 1 in fp32.
ROTATION_STEPS = 6
# The widest rank whose matrices stay in registers.
MAX_RANK = 128
TINY = torch.finfo(torch.float32).tiny
# Features, and terms of a product, that a program takes at a time. Not measured.
BLOCK_D, BLOCK_K, WARPS, STAGES = 64, 16, 8, 2


@jit
def inverse_factor(M, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """`L^-1` of `M = L L^T [RANK, RANK]` in a block of zeros; NaN or infinite where there is no L.

    Elimination in place: what turns column k into zeros below the diagonal takes their room.
    """
    i = tl.arange(0, BLOCK)[:, None]
    j = tl.arange(0, BLOCK)[None, :]
    for k in range(RANK):
        row = tl.sum(tl.where(i == k, M, 0.0), axis=0)[None, :]
        column = tl.sum(tl.where(j == k, M, 0.0), axis=1)[:, None]
        pivot = tl.sum(tl.where(j == k, row, 0.0))
        factor = tl.where(i > k, column / pivot, 0.0)
        M = tl.where((i > k) & (j == k), -factor, M - factor * row)
    pivots = tl.sum(tl.where(i == j, M, 0.0), axis=1)[:, None]
    scale = 1.0 / tl.sqrt_rn(tl.where(i < RANK, pivots, 1.0))
    return tl.where(i == j, 1.0, tl.where(i > j, M, 0.0)) * scale


@jit
def product(
    a, b, M, N, K, a_m, a_k, b_k, b_n, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`a [M, K] @ b [K, N]` in fp32, of any strides; both come from memory piece by piece.

    Whole matrices of ranks as operands would take all registers. What the program itself has written there
    needs a barrier before.
    """
    m = tl.arange(0, BLOCK_M)[:, None]
    n = tl.arange(0, BLOCK_N)[None, :]
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        terms = start + k
        left = tl.load(a + m * a_m + terms[None, :] * a_k, mask=(m < M) & (terms < K)[None, :], other=0.0)
        right = tl.load(b + terms[:, None] * b_k + n * b_n, mask=(n < N) & (terms < K)[:, None], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    return acc


@jit
def small_product(
    a, b, a_m, a_k, b_k, b_n,
    RANK: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`product` of two matrices of ranks, once all threads have written them."""
    tl.debug_barrier()
    return product(a, b, RANK, RANK, RANK, a_m, a_k, b_k, b_n, PRECISION, BLOCK_R, BLOCK_R, BLOCK_K)


@jit
def load_small(a, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    """A matrix of ranks in a block of zeros."""
    i = tl.arange(0, BLOCK_R)[:, None]
    j = tl.arange(0, BLOCK_R)[None, :]
    return tl.load(a + i * RANK + j, mask=(i < RANK) & (j < RANK), other=0.0)


@jit
def store_small(a, value, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    """Store a matrix of ranks, once all threads have read what was there."""
    i = tl.arange(0, BLOCK_R)[:, None]
    j = tl.arange(0, BLOCK_R)[None, :]
    tl.debug_barrier()
    tl.store(a + i * RANK + j, value, mask=(i < RANK) & (j < RANK))


@jit
def moved_kernel(
    Q, S, B, Y, c, A, gQ, sums, sizes, D, ROWS, q_eta, ridge,
    RANK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`A = Q + q_eta (Y B^-1 - Q)` and `diag(g) Q`, g the mean squares of z, for ROWS features of a layer.

    Stores these features' terms of `Q^T diag(g) Q`, `A^T A` and `A^T Q` in `sums [L, parts, 3, r, r]`, and
    of the sums of c and of g in `sizes [L, parts, 2]`. A part on grid axis 0, a layer on axis 1. Each part
    inverts B for itself: that takes no longer than to wait for one that does. A is formed before its Gram
    matrix is: put together from those of Q and Y, it would lose digits with the square of B's condition.
    """
    layer = tl.program_id(1).to(tl.int64)
    part = layer * tl.num_programs(0) + tl.program_id(0)
    AREA: tl.constexpr = RANK * RANK
    S += layer * AREA
    B += layer * AREA
    # Until they are known, the room of the sums holds what the program needs of B.
    factor = sums + part * 3 * AREA
    inverse = factor + AREA
    SB = inverse + AREA
    on_diagonal = tl.arange(0, BLOCK_R)[:, None] == tl.arange(0, BLOCK_R)[None, :]
    b = load_small(B, RANK, BLOCK_R)
    b += tl.where(on_diagonal, ridge * tl.sum(tl.where(on_diagonal, b, 0.0)), 0.0)
    store_small(factor, inverse_factor(b, RANK, BLOCK_R), RANK, BLOCK_R)
    store_small(SB, small_product(S, B, RANK, 1, RANK, 1, RANK, PRECISION, BLOCK_R, BLOCK_K), RANK, BLOCK_R)
    found = small_product(factor, factor, 1, RANK, RANK, 1, RANK, PRECISION, BLOCK_R, BLOCK_K)
    store_small(inverse, found, RANK, BLOCK_R)
    tl.debug_barrier()

    first = tl.program_id(0) * ROWS
    rows = min(ROWS, D - first)
    corner = layer * D + first
    Q += corner * RANK
    Y += corner * RANK
    A += corner * RANK
    gQ += corner * RANK
    c += corner
    d = tl.arange(0, BLOCK_D)
    rank = tl.arange(0, BLOCK_R)[None, :]
    c_sum = tl.zeros((BLOCK_D,), tl.float32)
    g_sum = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, rows, BLOCK_D):
        left = rows - start
        at = start * RANK
        V = product(Q + at, S, left, RANK, RANK, RANK, 1, RANK, 1, PRECISION, BLOCK_D, BLOCK_R, BLOCK_K)
        VB = product(Q + at, SB, left, RANK, RANK, RANK, 1, RANK, 1, PRECISION, BLOCK_D, BLOCK_R, BLOCK_K)
        place = at + d[:, None] * RANK + rank
        inside = (d < left)[:, None] & (rank < RANK)
        c_block = tl.load(c + start + d, mask=d < left, other=0.0)
        g = c_block + tl.sum((2 * tl.load(Y + place, mask=inside, other=0.0) + VB) * V, axis=1)
        c_sum += c_block
        g_sum += g
        target = product(
            Y + at, inverse, left, RANK, RANK, RANK, 1, RANK, 1, PRECISION, BLOCK_D, BLOCK_R, BLOCK_K
        )
        q = tl.load(Q + place, mask=inside, other=0.0)
        tl.store(gQ + place, g[:, None] * q, mask=inside)
        tl.store(A + place, q + q_eta * (target - q), mask=inside)
    tl.store(sizes + 2 * part, tl.sum(c_sum))
    tl.store(sizes + 2 * part + 1, tl.sum(g_sum))
    tl.debug_barrier()
    found = product(Q, gQ, RANK, RANK, rows, 1, RANK, RANK, 1, PRECISION, BLOCK_R, BLOCK_R, BLOCK_K)
    store_small(factor, found, RANK, BLOCK_R)
    found = product(A, A, RANK, RANK, rows, 1, RANK, RANK, 1, PRECISION, BLOCK_R, BLOCK_R, BLOCK_K)
    store_small(inverse, found, RANK, BLOCK_R)
    found = product(A, Q, RANK, RANK, rows, 1, RANK, RANK, 1, PRECISION, BLOCK_R, BLOCK_R, BLOCK_K)
    store_small(SB, found, RANK, BLOCK_R)


@jit
def sum_parts(sums, parts, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    """The sum of one of the three matrices over the parts of a layer."""
    total = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
    for part in range(parts):
        total += load_small(sums + part * (3 * RANK * RANK), RANK, BLOCK_R)
    return total


@jit
def small_kernel(
    S, B, caution, rates, sums, sizes, factor, room, moves, eta, kappa, limit, D, parts,
    ETA_TENSOR: tl.constexpr, ETA_STRIDE: tl.constexpr, SCALE_FREE: tl.constexpr, LIMITED: tl.constexpr,
    TINY: tl.constexpr, STEPS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The rate and the new S of a layer, `L^-1` of `A^T A = L L^T`, and whether Q is to become `A L^-T`.

    `room [L, 5, r, r]` holds what products need of earlier ones.
    """
    layer = tl.program_id(0).to(tl.int64)
    AREA: tl.constexpr = RANK * RANK
    S += layer * AREA
    B += layer * AREA
    factor += layer * AREA
    sums += layer * parts * 3 * AREA
    T = room + layer * 5 * AREA
    U = T + AREA
    stepped = U + AREA
    one = stepped + AREA
    other = one + AREA
    on_diagonal = tl.arange(0, BLOCK_R)[:, None] == tl.arange(0, BLOCK_R)[None, :]

    p = tl.arange(0, BLOCK_P)
    sizes += 2 * (layer * parts + p)
    size = tl.sum(tl.load(sizes, mask=p < parts, other=0.0))
    mean = tl.sum(tl.load(sizes + 1, mask=p < parts, other=0.0)) / D
    sound = tl.abs(size) < float("inf")
    store_small(T, load_small(S, RANK, BLOCK_R) + tl.where(on_diagonal, 1.0, 0.0), RANK, BLOCK_R)
    store_small(one, small_product(T, B, RANK, 1, RANK, 1, RANK, PRECISION, BLOCK_R, BLOCK_K), RANK, BLOCK_R)
    M = small_product(one, T, RANK, 1, 1, RANK, RANK, PRECISION, BLOCK_R, BLOCK_K)
    store_small(other, M, RANK, BLOCK_R)

    if SCALE_FREE:
        unit = tl.maximum(2 * mean, TINY)
    else:
        unit = 1.0
    careful = tl.load(caution + layer) * tl.where(sound, 1.0, 0.5)
    rate = careful * load_rate(eta, layer, ETA_TENSOR, ETA_STRIDE)
    if LIMITED:
        bound = (tl.sqrt(tl.sum(M * M)) + kappa) / unit
        rate = tl.minimum(rate, limit / tl.maximum(bound, TINY))
    rate = tl.where(sound, rate, 0.0)
    tl.store(caution + layer, careful)
    tl.store(rates + layer, rate)

    diagonal = sum_parts(sums, parts, RANK, BLOCK_R)  # Q^T diag(g) Q
    M = (1 - kappa) * (load_small(other, RANK, BLOCK_R) - diagonal)
    M += kappa * (diagonal - tl.where(on_diagonal, 1.0, 0.0))
    store_small(other, M, RANK, BLOCK_R)
    found = small_product(other, T, RANK, 1, RANK, 1, RANK, PRECISION, BLOCK_R, BLOCK_K)
    # A step too small to show in T still shows in S.
    store_small(stepped, load_small(S, RANK, BLOCK_R) - rate / unit * found, RANK, BLOCK_R)

    inverse = inverse_factor(sum_parts(sums + AREA, parts, RANK, BLOCK_R), RANK, BLOCK_R)
    valid = tl.sum(inverse * 0.0) == 0
    seen = sound & (size != 0)
    store_small(factor, inverse, RANK, BLOCK_R)
    tl.store(moves + layer, (seen & valid).to(tl.int32))

    # The rotation nearest to Q_new^T Q.
    store_small(one, sum_parts(sums + 2 * AREA, parts, RANK, BLOCK_R), RANK, BLOCK_R)
    found = small_product(factor, one, RANK, 1, RANK, 1, RANK, PRECISION, BLOCK_R, BLOCK_K)
    store_small(U, found, RANK, BLOCK_R)
    for _ in range(STEPS):
        found = small_product(U, U, RANK, 1, 1, RANK, RANK, PRECISION, BLOCK_R, BLOCK_K)
        store_small(other, found, RANK, BLOCK_R)
        found = small_product(other, U, RANK, 1, RANK, 1, RANK, PRECISION, BLOCK_R, BLOCK_K)
        store_small(U, 1.5 * load_small(U, RANK, BLOCK_R) - 0.5 * found, RANK, BLOCK_R)
    found = small_product(U, stepped, RANK, 1, RANK, 1, RANK, PRECISION, BLOCK_R, BLOCK_K)
    store_small(one, found, RANK, BLOCK_R)
    found = small_product(one, U, RANK, 1, 1, RANK, RANK, PRECISION, BLOCK_R, BLOCK_K)
    found = tl.where(valid, found, load_small(stepped, RANK, BLOCK_R))
    # A layer that rests keeps its S bit for bit.
    store_small(S, tl.where(seen, found, load_small(S, RANK, BLOCK_R)), RANK, BLOCK_R)


@jit
def turn_kernel(
    Q, A, factor, moves, D, RANK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`Q = A L^-T` where it moves: a block of features on grid axis 0, a layer on axis 1."""
    layer = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_D
    rows = D * tl.load(moves + layer) - first
    corner = (layer * D + first) * RANK
    q = product(
        A + corner, factor + layer * RANK * RANK, rows, RANK, RANK, RANK, 1, 1, RANK,
        PRECISION, BLOCK_D, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    d = tl.arange(0, BLOCK_D)[:, None]
    rank = tl.arange(0, BLOCK_R)[None, :]
    tl.store(Q + corner + d * RANK + rank, q, mask=(d < rows) & (rank < RANK))


def triton_step(
    Q: Tensor, S: Tensor, caution: Tensor, rates: Tensor, B: Tensor, Y: Tensor, c: Tensor, eta: Tensor,
    kappa: float, scale_free: bool, limit: float | None, q_eta: float,
) -> None:  # fmt: skip
    """The step by three launches, for contiguous fp32 tensors."""
    L, d, r = Q.shape
    # As many programs as run at a time, each with a number of whole blocks of features.
    rows = cdiv(cdiv(d, BLOCK_D), max(1, 2 * _dispatch.processors(Q.device) // max(L, 1))) * BLOCK_D
    parts = cdiv(d, rows)
    A, gQ, sizes = torch.empty_like(Q), torch.empty_like(Q), Q.new_empty(L, parts, 2)
    sums, room, factor = (Q.new_empty(L, *lead, r, r) for lead in ((parts, 3), (5,), ()))
    moves = torch.empty(L, dtype=torch.int32, device=Q.device)
    constants = {"RANK": r, "BLOCK_K": BLOCK_K, "BLOCK_R": rank_block(r)}
    by_rows = {**constants, "PRECISION": "tf32x3", "BLOCK_D": BLOCK_D}
    _triton.launch(
        moved_kernel,
        (parts, L),
        {
            "Q": Q, "S": S, "B": B, "Y": Y, "c": c, "A": A, "gQ": gQ, "sums": sums, "sizes": sizes,
            "D": d, "ROWS": rows, "q_eta": q_eta, "ridge": RIDGE,
        },
        by_rows, WARPS, STAGES,
    )  # fmt: skip
    eta_argument, eta_constants = rate_arguments(eta, Q.device)
    _triton.launch(
        small_kernel,
        (L,),
        {
            "S": S, "B": B, "caution": caution, "rates": rates, "sums": sums, "sizes": sizes,
            "factor": factor, "room": room, "moves": moves, **eta_argument,
            "kappa": kappa, "limit": limit or 0.0, "D": d, "parts": parts,
        },
        {
            **constants, **eta_constants, "SCALE_FREE": scale_free, "LIMITED": limit is not None,
            "TINY": TINY, "STEPS": ROTATION_STEPS, "PRECISION": "ieee",
            "BLOCK_P": max(2, 1 << (parts - 1).bit_length()),
        },
        *((4, 3) if r <= 64 else (16, 1)),
    )  # fmt: skip
    _triton.launch(
        turn_kernel,
        (cdiv(d, BLOCK_D), L),
        {"Q": Q, "A": A, "factor": factor, "moves": moves, "D": d},
        by_rows, WARPS, STAGES,
    )  # fmt: skip


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


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


def _eager_step(
    Q: Tensor, S: Tensor, caution: Tensor, rates: Tensor, B: Tensor, Y: Tensor, c: Tensor, eta: Tensor,
    kappa: float, scale_free: bool, limit: float | None, q_eta: float,
) -> None:  # fmt: skip
    tiny = torch.finfo(Q.dtype).tiny
    eye = _identity(S)
    V, T = torch.bmm(Q, S), S + eye
    g = c + ((2 * Y + torch.bmm(V, B)) * V).sum(-1)  # mean squares of z, [L, d]
    M = torch.bmm(torch.bmm(T, B), T.mT)  # the second moment of z within the subspace

    size = c.sum(-1)
    sound = size.isfinite()
    unit = 2 * g.mean(-1).clamp(min=tiny) if scale_free else torch.ones_like(size)
    caution.mul_(torch.where(sound, 1.0, 0.5))
    rate = caution * eta.to(Q.dtype)
    if limit is not None:
        bound = (torch.linalg.matrix_norm(M) + kappa) / unit
        rate = torch.minimum(rate, limit / bound.clamp(min=tiny))
    rates.copy_(torch.where(sound, rate, 0.0))

    diagonal = torch.bmm(Q.mT, g[:, :, None] * Q)
    M.sub_(diagonal)
    if kappa:
        M.mul_(1 - kappa).add_(diagonal.sub_(eye), alpha=kappa)
    # A step too small to show in T still shows in S.
    stepped = S - (rates / unit)[:, None, None] * torch.bmm(M, T)
    moved, found = _moved(Q, B, Y, q_eta)
    U = _rotation(torch.bmm(moved.mT, Q))
    turned = torch.bmm(torch.bmm(U, stepped), U.mT)
    found, seen = found[:, None, None], (sound & (size != 0))[:, None, None]
    S.copy_(torch.where(seen, torch.where(found, turned, stepped), S))
    Q.copy_(torch.where(seen & found, moved, Q))


def _triton_refusal(*tensors: Tensor) -> str | None:
    """Why the kernels cannot serve these tensors, Q the first and those that change in front, or None."""
    r = tensors[0].shape[2]
    if not 1 <= r <= MAX_RANK:
        return f"it serves ranks from 1 to {MAX_RANK}, got {r}"
    if not all(t.is_contiguous() for t in tensors[:4]):
        return "it needs contiguous Q, S, caution and rates"
    return _dispatch.triton_refusal(tensors[0].device, *(t.dtype for t in tensors))


@operator("lowrank_step_", mutates=("Q", "S", "caution", "rates"))
def _lowrank_step(
    Q: Tensor, S: Tensor, caution: Tensor, rates: Tensor, B: Tensor, Y: Tensor, c: Tensor, eta: Tensor,
    kappa: float, scale_free: bool, limit: float | None, q_eta: float, backend: str,
) -> None:  # fmt: skip
    refusal = _triton_refusal(Q, S, caution, rates)
    automatic = _dispatch.preferred("lowrank_step_", Q.device)  # its operands are its own, not the caller's
    rule = (eta, kappa, scale_free, limit, q_eta)
    if _dispatch.choose("lowrank_step_", backend, {"triton": refusal}, automatic) == "triton":
        triton_step(Q, S, caution, rates, B.contiguous(), Y.contiguous(), c.contiguous(), *rule)
        return
    # S is turned by two products in every step: in TF32 it would grow or fade, step after step.
    with autocast_off(Q.device), ieee_products(Q.device):
        _eager_step(Q, S, caution, rates, B, Y, c, *rule)


@_lowrank_step.register_fake
def _(Q, S, caution, rates, B, Y, c, eta, kappa, scale_free, limit, q_eta, backend) -> None:
    return None


@register_flop_formula(torch.ops.dbpkern.lowrank_step_)
def _flops(Q_shape, *args, **kwargs) -> int:
    L, d, r = Q_shape
    # 5 products and 3 Gram matrices or solves of d rows; then T B T^T, M T, 3 Cholesky, the rotation.
    return L * (16 * d * r**2 + (6 + 1 + 4 * ROTATION_STEPS + 4) * r**3)


def lowrank_step_(
    Q: Tensor,
    S: Tensor,
    caution: Tensor,
    rates: Tensor,
    B: Tensor,
    Y: Tensor,
    c: Tensor,
    eta: float | Tensor,
    kappa: float = 0.0,
    scale_free: bool = True,
    limit: float | None = 0.5,
    q_eta: float = 0.2,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Update a stack of low-rank `R = I + Q S Q^T` in place from the statistics of its input.

    Inside the subspace, S follows the rule of the full R (arXiv 2510.14657, Eq. 4; its kappa term from arXiv
    2405.02385): `T <- T - rate / unit M_Q T` with `T = I + S` and `M_Q = Q^T M Q`, where M is that of all d
    features. Q then follows the leading eigenvectors of the input's second moment,
    `orth(Q + q_eta (Y B^-1 - Q))`, and S turns with it. With r = d this is the full update, however Q moves.

    The rate of a layer is `min(caution eta, limit / bound)`, where `bound = (||T B T^T||_F + kappa) / unit`
    is no less than the largest eigenvalue of M_Q. With `scale_free`, `unit` is twice the mean square of z.

    A layer without rows, whose statistics are all zero, stays as it is. So does one whose sum of c is not
    finite: its rate is 0, and its caution is halved. Where a factorisation fails or a result is not finite,
    that layer's Q stays. Nothing waits for the device, and nothing of size `d x d` is formed. No product is
    shortened, also where PyTorch may use TF32 for its own: what a step loses of S is lost for good.

    Args:
        Q: `[L, d, r]`, fp32 or fp64, orthonormal columns; changed in place.
        S: `[L, r, r]` of the same dtype; changed in place.
        caution: `[L]` of the same dtype, factors of eta; changed in place.
        rates: `[L]` of the same dtype; receives the rates.
        B: `[L, r, r]` of the same dtype, as `lowrank_statistics` returns it.
        Y: `[L, d, r]`, likewise.
        c: `[L, d]`, likewise.
        eta: a number >= 0, a 0-d tensor, or `[L]` for a rate per layer. A CUDA graph freezes a number; a
            tensor on the device is read at each replay.
        kappa: weight in [0, 1] of the unit-variance term.
        scale_free: whether M is divided by `unit`, so that eta is free of the input's scale.
        limit: how far a step may go along M's eigenvectors, > 0; None for no limit.
        q_eta: how far Q moves towards its target, in [0, 1]; free of the input's scale.
        backend: "eager", or "triton": three launches, ranks up to 128, contiguous fp32 factors, products of d
            rows in three TF32 ones, which keep 22 bits. None chooses.

    Returns:
        Q and S.

    Raises:
        TypeError: dtypes other than fp32 or fp64, or unequal ones.
        ValueError: shapes or devices that do not fit, r > d, numbers out of range, or a backend that cannot
            serve the call.
    """
    check_tensor("Q", Q, "[L, d, r]", (3,))
    check_accumulator("Q", Q)
    L, d, r = Q.shape
    if r > d:
        raise ValueError(f"Q: expected shape [L, d, r] with r <= d, got {list(Q.shape)}")
    check_factors(Q, S, d, L)
    for name, value, letters, shape in (
        ("caution", caution, "[L]", (L,)),
        ("rates", rates, "[L]", (L,)),
        ("B", B, "[L, r, r]", (L, r, r)),
        ("Y", Y, "[L, d, r]", (L, d, r)),
        ("c", c, "[L, d]", (L, d)),
    ):
        check_tensor(name, value, letters, (len(shape),))
        if value.shape != shape:
            raise ValueError(f"{name}: expected shape {letters} = {list(shape)}, got {list(value.shape)}")
    check_same_dtype(Q=Q, caution=caution, rates=rates, B=B, Y=Y, c=c)
    check_same_device(Q=Q, S=S, caution=caution, rates=rates, B=B, Y=Y, c=c)
    check_kappa(kappa)
    if limit is not None and not 0.0 < limit < math.inf:
        raise ValueError(f"limit: expected a finite number > 0 or None, got {limit}")
    if not 0.0 <= q_eta <= 1.0:  # also false for NaN
        raise ValueError(f"q_eta: expected a number in [0, 1], got {q_eta}")
    _dispatch.check_backend(backend)
    rate = eta_tensor(eta, L, Q.device)
    limit = None if limit is None else float(limit)
    torch.ops.dbpkern.lowrank_step_(
        Q, S, caution, rates, B, Y, c, rate, float(kappa), scale_free, limit, float(q_eta), backend or ""
    )
    return Q, S
