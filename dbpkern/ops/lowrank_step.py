"""The decorrelation step of low-rank R from finished statistics; the subspace follows the input's."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dbpkern.ops import _common, _dispatch, _triton
from dbpkern.ops._matmul import cdiv, load_rate, rate_arguments
from dbpkern.ops._table import address, address_table
from dbpkern.ops._triton import jit, tl
from dbpkern.ops.lowrank_fold import ieee_products
from dbpkern.ops.lowrank_statistics import rank_block, rank_refusal
from dbpkern.ops.rates import eager_rates

# Added to B's diagonal, relative to its trace, before B is inverted: with fewer rows than ranks B is
# singular, and with about as many its inverse is mostly noise, which Q would follow.
RIDGE = 1e-4
# Newton-Schulz steps towards a rotation; they bring cosines from 0.4 up to 1 in fp32.
ROTATION_STEPS = 6
# Features, ranks, and terms of a product, that a program takes at a time. Not measured.
BLOCK_D, BLOCK_H, BLOCK_K = 64, 64, 16
# Warps and stages of the kernel of small matrices, by the block of ranks.
SMALL = {16: (4, 3), 32: (4, 3), 64: (4, 1), 128: (16, 1)}

Stack = tuple[Tensor, ...]
"""Q, S, caution, rates, B, Y, c."""


# The kernels serve all stacks of a rank through a table, whose columns are the numbers of a stack's first
# program (0), first layer (1) and first feature (2), its width (3), and where its tensors lie (4 to 10).


@jit
def find(table, count, COLUMN: tl.constexpr, number, SPAN: tl.constexpr):
    """The stack that a program or layer belongs to, and its number within."""
    i = tl.arange(0, SPAN)
    firsts = tl.load(table + COLUMN * count + i, mask=i < count, other=2**62)
    stack = tl.sum((firsts <= number).to(tl.int32), 0) - 1
    return stack, number - tl.load(table + COLUMN * count + stack)


@jit
def place(table, count, ROWS, SPAN: tl.constexpr):
    """A program's stack and layer, its first feature in all layers of the stack, and how many it has."""
    stack, number = find(table, count, 0, tl.program_id(0), SPAN)
    D = tl.load(table + 3 * count + stack)
    parts = tl.cdiv(D, ROWS)
    first = number % parts * ROWS
    return stack, number // parts, number // parts * D + first, min(ROWS, D - first).to(tl.int32)


@jit
def tensor(table, count, stack, COLUMN: tl.constexpr):
    """Where a tensor of a stack lies. Matrices lie so that 16 bytes are loaded at a time, numbers alone."""
    return tl.multiple_of(tl.load(table + COLUMN * count + stack).to(tl.pointer_type(tl.float32)), 16)


@jit
def load(a, i, j, M, N, RANK: tl.constexpr, T: tl.constexpr):
    """Rows i and columns j of `a [M, N]`, whose rows, with T its columns, are RANK apart; zeros beyond it."""
    place = j[None, :] * RANK + i[:, None] if T else i[:, None] * RANK + j[None, :]
    return tl.load(a + place, mask=(i < M)[:, None] & (j < N)[None, :], other=0.0)


@jit
def load_rows(a, first, M, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """Rows of `a [M, RANK]` from `first` on."""
    return load(a, first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R), M, RANK, RANK, False)


@jit
def store_rows(a, value, first, M, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """Store such rows."""
    i, j = first + tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_R)[None, :]
    tl.store(a + i * RANK + j, value, mask=(i < M) & (j < RANK))


@jit
def product(
    a, b, M, K, A_T: tl.constexpr, B_T: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`a b` in fp32 for `a [M, K]` and `b [K, RANK]`; with A_T or B_T the transpose lies in memory.

    Both come from memory piece by piece: whole matrices of ranks as operands would take all registers. What
    the program itself has written there needs a barrier before.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = load(a, tl.arange(0, BLOCK_M), k, M, K, RANK, A_T)
        right = load(b, k, tl.arange(0, BLOCK_R), K, RANK, RANK, B_T)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    return acc


@jit
def multiply(
    out, a, b, c, K, ALPHA: tl.constexpr, BETA: tl.constexpr, A_T: tl.constexpr, B_T: tl.constexpr,
    RANK: tl.constexpr, PRECISION: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`out = ALPHA a b + BETA c`, `[RANK, RANK]`, once all threads have written these.

    In blocks of rows, or wide ranks would take more registers than there are.
    """
    tl.debug_barrier()
    for first in range(0, RANK, BLOCK_H):
        left = a + (first if A_T else first * RANK)
        found = product(left, b, RANK - first, K, A_T, B_T, RANK, PRECISION, BLOCK_H, BLOCK_R, BLOCK_K)
        if BETA != 0:
            found = ALPHA * found + BETA * load_rows(c, first, RANK, RANK, BLOCK_H, BLOCK_R)
        store_rows(out, found, first, RANK, RANK, BLOCK_H, BLOCK_R)


@jit
def inverse_factor(M, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """`L^-1` of `M = L L^T [RANK, RANK]` in a block of zeros; NaN or infinite where there is no L.

    Elimination in place: what turns column k into zeros below the diagonal takes their room.
    """
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
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
def moved_kernel(
    table, A, gQ, sums, sizes, count, ROWS, q_eta, ridge,
    SPAN: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`A = Q + q_eta (Y B^-1 - Q)` and `diag(g) Q`, g the mean squares of z, for ROWS features of a layer.

    Stores these features' terms of `Q^T diag(g) Q`, `A^T A` and `A^T Q` in `sums [programs, 3, r, r]`, and of
    the sums of c and of g in `sizes [programs, 2]`. Each program inverts B for itself: that takes no longer
    than to wait for one that does. A is formed before its Gram matrix is: put together from those of Q and Y,
    it would lose digits with the square of B's condition.
    """
    program = tl.program_id(0).to(tl.int64)
    stack, layer, corner, rows = place(table, count, ROWS, SPAN)
    scratch = tl.load(table + 2 * count + stack) + corner
    AREA: tl.constexpr = RANK * RANK
    Q = tensor(table, count, stack, 4) + corner * RANK
    S = tensor(table, count, stack, 5) + layer * AREA
    B = tensor(table, count, stack, 8) + layer * AREA
    Y = tensor(table, count, stack, 9) + corner * RANK
    c = tensor(table, count, stack, 10) + corner
    A += scratch * RANK
    gQ += scratch * RANK
    # Until they are known, the room of the sums holds what the program needs of B.
    factor = sums + program * 3 * AREA
    inverse, SB = factor + AREA, factor + 2 * AREA
    on_diagonal = tl.arange(0, BLOCK_R)[:, None] == tl.arange(0, BLOCK_R)[None, :]
    b = load_rows(B, 0, RANK, RANK, BLOCK_R, BLOCK_R)
    b += tl.where(on_diagonal, ridge * tl.sum(tl.where(on_diagonal, b, 0.0)), 0.0)
    store_rows(factor, inverse_factor(b, RANK, BLOCK_R), 0, RANK, RANK, BLOCK_R, BLOCK_R)
    multiply(SB, S, B, S, RANK, 1.0, 0.0, 0, 0, RANK, PRECISION, BLOCK_H, BLOCK_R, BLOCK_K)
    multiply(inverse, factor, factor, S, RANK, 1.0, 0.0, 1, 0, RANK, PRECISION, BLOCK_H, BLOCK_R, BLOCK_K)
    tl.debug_barrier()

    d = tl.arange(0, BLOCK_D)
    c_sum, g_sum = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, rows, BLOCK_D):
        left = rows - start
        q, y = Q + start * RANK, Y + start * RANK
        V = product(q, S, left, RANK, 0, 0, RANK, PRECISION, BLOCK_D, BLOCK_R, BLOCK_K)
        VB = product(q, SB, left, RANK, 0, 0, RANK, PRECISION, BLOCK_D, BLOCK_R, BLOCK_K)
        c_block = tl.load(c + start + d, mask=d < left, other=0.0)
        g = c_block + tl.sum((2 * load_rows(y, 0, left, RANK, BLOCK_D, BLOCK_R) + VB) * V, axis=1)
        c_sum += c_block
        g_sum += g
        target = product(y, inverse, left, RANK, 0, 0, RANK, PRECISION, BLOCK_D, BLOCK_R, BLOCK_K)
        before = load_rows(q, 0, left, RANK, BLOCK_D, BLOCK_R)
        store_rows(gQ, g[:, None] * before, start, rows, RANK, BLOCK_D, BLOCK_R)
        store_rows(A, before + q_eta * (target - before), start, rows, RANK, BLOCK_D, BLOCK_R)
    tl.store(sizes + 2 * program, tl.sum(c_sum))
    tl.store(sizes + 2 * program + 1, tl.sum(g_sum))
    multiply(factor, Q, gQ, S, rows, 1.0, 0.0, 1, 0, RANK, PRECISION, BLOCK_H, BLOCK_R, BLOCK_K)
    multiply(inverse, A, A, S, rows, 1.0, 0.0, 1, 0, RANK, PRECISION, BLOCK_H, BLOCK_R, BLOCK_K)
    multiply(SB, A, Q, S, rows, 1.0, 0.0, 1, 0, RANK, PRECISION, BLOCK_H, BLOCK_R, BLOCK_K)


@jit
def small_kernel(
    table, sums, sizes, room, moves, count, ROWS, eta, kappa, limit,
    ETA_TENSOR: tl.constexpr, ETA_STRIDE: tl.constexpr, SCALE_FREE: tl.constexpr, LIMITED: tl.constexpr,
    TINY: tl.constexpr, STEPS: tl.constexpr, SPAN: tl.constexpr, RANK: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The rate and the new S of a layer, `L^-1` of `A^T A = L L^T`, and whether Q is to become `A L^-T`.

    `room [layers, 8, r, r]` holds what products need of earlier ones; its second matrix is `L^-1`.
    """
    number = tl.program_id(0).to(tl.int64)
    stack, layer = find(table, count, 1, number, SPAN)
    AREA: tl.constexpr = RANK * RANK
    D = tl.load(table + 3 * count + stack)
    parts = tl.cdiv(D, ROWS).to(tl.int32)
    first_part = tl.load(table + stack) + layer * parts
    S = tensor(table, count, stack, 5) + layer * AREA
    B = tensor(table, count, stack, 8) + layer * AREA
    diagonal = room + number * 8 * AREA
    gram, overlap, one, M = diagonal + AREA, diagonal + 2 * AREA, diagonal + 3 * AREA, diagonal + 4 * AREA
    stepped, U, other = diagonal + 5 * AREA, diagonal + 6 * AREA, diagonal + 7 * AREA

    size = 0.0
    mean = 0.0
    for part in range(parts):
        size += tl.load(sizes + 2 * (first_part + part))
        mean += tl.load(sizes + 2 * (first_part + part) + 1) / D.to(tl.float32)
    sound = tl.abs(size) < float("inf")
    sums += first_part * 3 * AREA
    for first in range(0, 3 * RANK, BLOCK_H):
        total = tl.zeros((BLOCK_H, BLOCK_R), tl.float32)
        for part in range(parts):
            total += load_rows(sums + part * (3 * AREA), first, 3 * RANK, RANK, BLOCK_H, BLOCK_R)
        store_rows(diagonal, total, first, 3 * RANK, RANK, BLOCK_H, BLOCK_R)

    # The second moment of z within the subspace, T B T^T with T = I + S.
    multiply(one, S, B, B, RANK, 1.0, 1.0, 0, 0, RANK, "ieee", BLOCK_H, BLOCK_R, BLOCK_K)
    multiply(M, one, S, one, RANK, 1.0, 1.0, 0, 1, RANK, "ieee", BLOCK_H, BLOCK_R, BLOCK_K)
    tl.debug_barrier()
    if SCALE_FREE:
        unit = tl.maximum(2 * mean, TINY)
    else:
        unit = 1.0
    caution = tensor(table, count, stack, 6) + layer
    careful = tl.load(caution) * tl.where(sound, 1.0, 0.5)
    rate = careful * load_rate(eta, layer, ETA_TENSOR, ETA_STRIDE)
    if LIMITED:
        squares = 0.0
        for first in range(0, RANK, BLOCK_H):
            rows = load_rows(M, first, RANK, RANK, BLOCK_H, BLOCK_R)
            squares += tl.sum(rows * rows)
        rate = tl.minimum(rate, limit / tl.maximum((tl.sqrt(squares) + kappa) / unit, TINY))
    rate = tl.where(sound, rate, 0.0)
    tl.store(caution, careful)
    tl.store(tensor(table, count, stack, 7) + layer, rate)

    gain = -rate / unit
    # S - rate / unit M T: what M becomes here is added to S, and times S. So a step too small to show in T
    # still shows in S.
    for first in range(0, RANK, BLOCK_H):
        rows = load_rows(diagonal, first, RANK, RANK, BLOCK_H, BLOCK_R)
        i, j = first + tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_R)[None, :]
        eye = tl.where(i == j, 1.0, 0.0)
        off = load_rows(M, first, RANK, RANK, BLOCK_H, BLOCK_R) - rows
        step = gain * ((1 - kappa) * off + kappa * (rows - eye))
        store_rows(M, step, first, RANK, RANK, BLOCK_H, BLOCK_R)
        step += load_rows(S, first, RANK, RANK, BLOCK_H, BLOCK_R)
        store_rows(stepped, step, first, RANK, RANK, BLOCK_H, BLOCK_R)
    multiply(stepped, M, S, stepped, RANK, 1.0, 1.0, 0, 0, RANK, "ieee", BLOCK_H, BLOCK_R, BLOCK_K)

    inverse = inverse_factor(load_rows(gram, 0, RANK, RANK, BLOCK_R, BLOCK_R), RANK, BLOCK_R)
    valid = tl.sum(inverse * 0.0) == 0
    seen = sound & (size != 0)
    tl.debug_barrier()
    store_rows(gram, inverse, 0, RANK, RANK, BLOCK_R, BLOCK_R)
    tl.store(moves + number, (seen & valid).to(tl.int32))

    # The rotation nearest to Q_new^T Q.
    multiply(U, gram, overlap, S, RANK, 1.0, 0.0, 0, 0, RANK, "ieee", BLOCK_H, BLOCK_R, BLOCK_K)
    for _ in range(STEPS):
        multiply(one, U, U, S, RANK, 1.0, 0.0, 0, 1, RANK, "ieee", BLOCK_H, BLOCK_R, BLOCK_K)
        multiply(other, one, U, U, RANK, -0.5, 1.5, 0, 0, RANK, "ieee", BLOCK_H, BLOCK_R, BLOCK_K)
        U, other = other, U
    multiply(one, U, stepped, S, RANK, 1.0, 0.0, 0, 0, RANK, "ieee", BLOCK_H, BLOCK_R, BLOCK_K)
    multiply(other, one, U, S, RANK, 1.0, 0.0, 0, 1, RANK, "ieee", BLOCK_H, BLOCK_R, BLOCK_K)
    tl.debug_barrier()
    if seen:  # a layer that rests keeps its S bit for bit
        for first in range(0, RANK, BLOCK_H):
            turned = load_rows(other, first, RANK, RANK, BLOCK_H, BLOCK_R)
            plain = load_rows(stepped, first, RANK, RANK, BLOCK_H, BLOCK_R)
            store_rows(S, tl.where(valid, turned, plain), first, RANK, RANK, BLOCK_H, BLOCK_R)


@jit
def turn_kernel(
    table, A, room, moves, count, ROWS, SPAN: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`Q = A L^-T` where it moves, for ROWS features of a layer."""
    stack, layer, corner, rows = place(table, count, ROWS, SPAN)
    scratch = tl.load(table + 2 * count + stack) + corner
    number = tl.load(table + count + stack) + layer
    Q = tensor(table, count, stack, 4) + corner * RANK
    factor = room + (8 * number + 1) * RANK * RANK
    A += scratch * RANK
    rows *= tl.load(moves + number)
    for start in range(0, rows, BLOCK_D):
        a = A + start * RANK
        q = product(a, factor, rows - start, RANK, 0, 1, RANK, PRECISION, BLOCK_D, BLOCK_R, BLOCK_K)
        store_rows(Q, q, start, rows, RANK, BLOCK_D, BLOCK_R)


def triton_step(
    stacks: Sequence[Stack], eta: Tensor, kappa: float, scale_free: bool, limit: float | None, q_eta: float
) -> None:
    """The step of stacks of one rank, contiguous and in fp32, by three launches."""
    like = stacks[0][0]
    r, device = like.shape[2], like.device
    sizes = [Q.shape[:2] for Q, *_ in stacks]
    # No more programs than run at a time, one on a processor, each with a number of whole blocks of features.
    most = max(_dispatch.processors(device), sum(L for L, _ in sizes))
    rows = next(n for n in itertools.count(BLOCK_D, BLOCK_D) if sum(L * cdiv(d, n) for L, d in sizes) <= most)
    counts = [[L * cdiv(d, rows) for L, d in sizes], [L for L, _ in sizes], [L * d for L, d in sizes]]
    columns = [list(itertools.accumulate(column, initial=0)) for column in counts]
    programs, layers, features = (column.pop() for column in columns)
    columns += [[d for _, d in sizes]]
    columns += [[address(t) for t in column] for column in zip(*stacks, strict=True)]
    A, gQ = like.new_empty(2, features, r)
    eta_argument, eta_constants = rate_arguments(eta, device)
    args = {
        "table": address_table(columns, device), "count": len(stacks), "ROWS": rows,
        "A": A, "gQ": gQ, "sums": like.new_empty(programs, 3, r, r), "sizes": like.new_empty(programs, 2),
        "room": like.new_empty(layers, 8, r, r), "moves": like.new_empty(layers, dtype=torch.int32),
        **eta_argument, "kappa": kappa, "limit": limit or 0.0, "q_eta": q_eta, "ridge": RIDGE,
    }  # fmt: skip
    block = rank_block(r)
    constants = {
        **eta_constants, "SCALE_FREE": scale_free, "LIMITED": limit is not None, "STEPS": ROTATION_STEPS,
        "TINY": torch.finfo(torch.float32).tiny, "SPAN": 1 << (len(stacks) - 1).bit_length(), "RANK": r,
        "BLOCK_D": BLOCK_D, "BLOCK_K": BLOCK_K, "BLOCK_R": block,
        "BLOCK_H": min(BLOCK_H, block), "PRECISION": "tf32x3",
    }  # fmt: skip
    grids, compiled = (programs, layers, programs), ((8, 2), SMALL[block], (8, 2))
    kernels = (moved_kernel, small_kernel, turn_kernel)
    for kernel, grid, (warps, stages) in zip(kernels, grids, compiled, strict=True):
        own, fixed = ({k: v for k, v in d.items() if k in kernel.arg_names} for d in (args, constants))
        _triton.launch(kernel, (grid,), own, fixed, warps, stages)


def _moved(Q: Tensor, B: Tensor, Y: Tensor, q_eta: float) -> tuple[Tensor, Tensor]:
    """Q after `orth(Q + q_eta (Y B^-1 - Q))`, and per layer whether that succeeded.

    By Cholesky and not QR, which has no batched form that leaves the host alone; twice, because once loses
    digits with the square of the condition number.
    """
    ridge = RIDGE * B.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    factor, info = torch.linalg.cholesky_ex(B + torch.diag_embed(ridge.expand(B.shape[:2])))
    half = torch.linalg.solve_triangular(factor.mT, Y, upper=True, left=False)
    target = torch.linalg.solve_triangular(factor, half, upper=False, left=False)
    A, found = torch.lerp(Q, target, q_eta), info == 0
    for _ in range(2):
        factor, info = torch.linalg.cholesky_ex(torch.bmm(A.mT, A))
        A = torch.linalg.solve_triangular(factor.mT, A, upper=True, left=False)
        found = found & (info == 0)
    return A, found & A.isfinite().all(-1).all(-1)


def _eager_step(
    Q: Tensor, S: Tensor, caution: Tensor, rates: Tensor, B: Tensor, Y: Tensor, c: Tensor, eta: Tensor,
    kappa: float, scale_free: bool, limit: float | None, q_eta: float,
) -> None:  # fmt: skip
    tiny = torch.finfo(Q.dtype).tiny
    eye = torch.eye(Q.shape[2], dtype=Q.dtype, device=Q.device)
    V, T = torch.bmm(Q, S), S + eye
    g = c + ((2 * Y + torch.bmm(V, B)) * V).sum(-1)  # mean squares of z, [L, d]
    M = torch.bmm(torch.bmm(T, B), T.mT)  # the second moment of z within the subspace
    size = c.sum(-1)
    unit = 2 * g.mean(-1).clamp(min=tiny) if scale_free else torch.ones_like(size)
    bound = None if limit is None else (torch.linalg.matrix_norm(M) + kappa) / unit
    eager_rates(caution, rates, c, bound, eta, limit or 0.0)

    diagonal = torch.bmm(Q.mT, g[:, :, None] * Q)
    M = torch.lerp(M - diagonal, diagonal - eye, kappa)
    # A step too small to show in T still shows in S.
    stepped = S - (rates / unit)[:, None, None] * torch.bmm(M, T)
    moved, found = _moved(Q, B, Y, q_eta)
    # Towards the rotation nearest to this: its singular values, cosines of the angles between old and new
    # subspace, become 1. Where one is small, S fades instead.
    U = torch.bmm(moved.mT, Q)
    for _ in range(ROTATION_STEPS):
        U = torch.baddbmm(U, torch.bmm(U, U.mT), U, beta=1.5, alpha=-0.5)
    turned = torch.bmm(torch.bmm(U, stepped), U.mT)
    found, seen = found[:, None, None], (size.isfinite() & (size != 0))[:, None, None]
    S.copy_(torch.where(seen, torch.where(found, turned, stepped), S))
    Q.copy_(torch.where(seen & found, moved, Q))


def _triton_refusal(Q: Tensor, *changed: Tensor) -> str | None:
    """Why the kernels cannot serve a stack whose Q, S, caution and rates these are, or None."""
    if not all(t.is_contiguous() for t in (Q, *changed)) or any(address(t) % 16 for t in (Q, changed[0])):
        return "it needs contiguous Q, S, caution and rates, and Q and S where 16 bytes begin"
    return rank_refusal(Q.shape[2]) or _dispatch.triton_refusal(Q.device, Q.dtype)


def _compact(t: Tensor) -> Tensor:
    """t, or a copy that lies where 16 bytes begin and in one piece."""
    return t if t.is_contiguous() and address(t) % 16 == 0 else t.clone(memory_format=torch.contiguous_format)


@_common.operator("lowrank_step_", mutates=("Qs", "Ss", "cautions", "rates"))
def _lowrank_step(
    Qs: list[Tensor], Ss: list[Tensor], cautions: list[Tensor], rates: list[Tensor],
    Bs: list[Tensor], Ys: list[Tensor], cs: list[Tensor], eta: Tensor,
    kappa: float, scale_free: bool, limit: float | None, q_eta: float, backend: str,
) -> None:  # fmt: skip
    rule = (eta, kappa, scale_free, limit, q_eta)
    by_rank: dict[tuple[torch.device, int], list[Stack]] = {}
    for Q, S, caution, own_rates, B, Y, c in zip(Qs, Ss, cautions, rates, Bs, Ys, cs, strict=True):
        changed = (Q, S, caution, own_rates)
        device, r = Q.device, Q.shape[2]
        automatic = _dispatch.preferred("lowrank_step_", device)  # its operands are its own, not the caller's
        serves = _dispatch.choose("lowrank_step_", backend, {"triton": _triton_refusal(*changed)}, automatic)
        if serves == "triton":
            if len(B):
                by_rank.setdefault((device, r), []).append((*changed, *map(_compact, (B, Y, c))))
            continue
        # S is turned by two products in every step: in TF32 it would grow or fade, step after step.
        with _common.autocast_off(device), ieee_products(device):
            _eager_step(Q, S, caution, own_rates, B, Y, c, *rule)
    for stacks in by_rank.values():
        triton_step(stacks, *rule)


_lowrank_step.register_fake(lambda *args: None)


@register_flop_formula(torch.ops.dbpkern.lowrank_step_)
def _flops(Q_shapes: Sequence[Sequence[int]], *args: object, **kwargs: object) -> int:
    # 5 products and 3 Gram matrices or solves of d rows; then T B T^T, M T, 3 Cholesky, the rotation.
    return sum(L * (16 * d * r**2 + (6 + 1 + 4 * ROTATION_STEPS + 4) * r**3) for L, d, r in Q_shapes)


def lowrank_step_(
    stacks: Sequence[Stack],
    eta: float | Tensor,
    kappa: float = 0.0,
    scale_free: bool = True,
    limit: float | None = 0.5,
    q_eta: float = 0.2,
    *,
    backend: str | None = None,
) -> None:
    """Update stacks of low-rank `R = I + Q S Q^T` in place from the statistics of their input.

    S follows the rule of the full R (arXiv 2510.14657, Eq. 4) within the subspace: with `T = I + S`,
    `T <- T - rate / unit Q^T M Q T`. Q follows the leading eigenvectors of the input's second moment,
    `orth(Q + q_eta (Y B^-1 - Q))`, and S turns with it. `rate = min(caution eta, limit / bound)`, where
    `bound = (||T B T^T||_F + kappa) / unit`; `unit` is 1, or with `scale_free` twice the mean square of z.
    A layer without rows rests. So does one whose sum of c is not finite: its rate is 0, and its caution is
    halved. Where a factorisation fails, Q stays. Nothing waits for the device.

    Args:
        stacks: (Q, S, caution, rates, B, Y, c) of L layers each, in fp32 or fp64: `Q [L, d, r]`,
            `S [L, r, r]`, `caution [L]` and `rates [L]` change in place; the rest is of `lowrank_statistics`.
        eta: a number >= 0, which a CUDA graph freezes, or a 0-d tensor.
        kappa: weight in [0, 1] of the unit-variance term.
        scale_free: whether eta is free of the input's scale.
        limit: how far a step may go along M's eigenvectors, > 0; None for no limit.
        q_eta: how far Q moves towards its target, in [0, 1].
        backend: "eager", or "triton": three launches for all stacks of a rank, fp32, ranks that are multiples
            of 8 up to 128, products of d rows in three TF32 ones. None chooses for each stack.

    Raises:
        TypeError: dtypes other than fp32 or fp64, or unequal ones in a stack.
        ValueError: shapes or devices that do not fit, numbers out of range, a backend that cannot serve.
    """
    if isinstance(eta, Tensor) and eta.dim():
        raise ValueError(f"eta: expected a number or a 0-d tensor, got {list(eta.shape)}")
    for stack in stacks:
        tensors = dict(zip(("Q", "S", "caution", "rates", "B", "Y", "c"), stack, strict=True))
        _common.check_tensor("Q", stack[0], "[L, d, r]", (3,))
        _common.check_accumulator("Q", stack[0])
        L, d, r = stack[0].shape
        shapes = ((L, d, min(r, d)), (L, r, r), (L,), (L,), (L, r, r), (L, d, r), (L, d))
        for (name, value), shape in zip(tensors.items(), shapes, strict=True):
            _common.check_tensor(name, value, str(list(shape)), (len(shape),))
            if value.shape != shape:
                raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")
        _common.check_same_dtype(**tensors)
        _common.check_same_device(**tensors)
        rate = _common.eta_tensor(eta, 0, stack[0].device)
    _common.check_kappa(kappa)
    if limit is not None and not 0.0 < limit < math.inf:
        raise ValueError(f"limit: expected a finite number > 0 or None, got {limit}")
    if not 0.0 <= q_eta <= 1.0:  # also false for NaN
        raise ValueError(f"q_eta: expected a number in [0, 1], got {q_eta}")
    _dispatch.check_backend(backend)
    if stacks:
        rule = (rate, float(kappa), scale_free, None if limit is None else float(limit), float(q_eta))
        torch.ops.dbpkern.lowrank_step_(*map(list, zip(*stacks, strict=True)), *rule, backend or "")
