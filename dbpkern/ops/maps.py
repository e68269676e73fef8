"""The maps around a step of the weights: `g R^T` before, `dV R` after it.

Launches for the weights of one width, rank and dtype, and bytes that move for a weight in fp32:

    map_gradients_    full R: 2 launches, 8 bytes              low-rank R: 1 launch, 8 bytes
    remember          one operation for all full R, 8 bytes    1 launch, 4 bytes
    map_changes_      2 launches, 12 bytes                     1 launch, 8 bytes

Maps are written with `R - I`: what R is multiplied with is added as it is, so the 16-bit operands of the
tensor cores count only in what R differs from the identity. A program owns a block of rows over their whole
width; nothing it reads is written by another, so the matrices change in place and no program waits.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dbpkern.ops import _dispatch
from dbpkern.ops._common import check_matrix, check_tensor, operator
from dbpkern.ops._matmul import dot, product_loop, rounded
from dbpkern.ops._table import as_matrix, load_tile, locate, matrix, number, serve
from dbpkern.ops._triton import jit, tl
from dbpkern.ops.lowrank_fold import check_factors, lowrank_flops

Factors = tuple[Tensor] | tuple[Tensor, Tensor]


@jit
def strip_product(
    strip, deviation, padded, start, TRANSPOSED: tl.constexpr,
    EMULATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns from `start` on of a strip `[BLOCK_M, padded]` times R - I, or its transpose."""
    if TRANSPOSED:
        d_k, d_n = 1, padded
    else:
        d_k, d_n = padded, 1
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Zeros fill what lies beyond a matrix, so nothing is masked.
    return product_loop(
        strip + (m[:, None] * padded + k[None, :]),
        deviation + start * d_n + (k[:, None] * d_k + n[None, :] * d_n),
        tl.full((BLOCK_M, 1), True, tl.int1), tl.full((1, BLOCK_N), True, tl.int1), padded, 1, d_k, n,
        False, tl.bfloat16, "ieee", EMULATE, True, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


@jit
def map_kernel(
    table, deviation, strips, count, blocks, D, padded,
    CHANGE: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, SPAN: tl.constexpr,
    EMULATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`x += x (R - I)^T`, or with CHANGE `x += (x - before) (R - I)`; the matrices are x and before.

    What is multiplied waits in 16 bits in the program's own strip, since x is overwritten tile by tile.
    """
    m = tl.arange(0, BLOCK_M)[:, None]
    n = tl.arange(0, BLOCK_N)[None, :]
    k = tl.arange(0, BLOCK_K)[None, :]
    strip = strips + tl.program_id(0).to(tl.int64) * BLOCK_M * padded
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        weight, row, m_in = locate(table, block, count, SPAN, BLOCK_M)
        x, x_m = matrix(table, weight, count, row, 0, DTYPE, ALIGNED)
        if CHANGE:
            before, before_m = matrix(table, weight, count, row, 1, DTYPE, ALIGNED)
        R = deviation + number(table, weight, count, 4 + 2 * CHANGE) * padded * padded
        for start in range(0, padded, BLOCK_K):
            inside = m_in & (k < D - start)
            tile = load_tile(x + start + (m * x_m + k), inside)
            if CHANGE:
                tile -= load_tile(before + start + (m * before_m + k), inside)
            tl.store(strip + start + (m * padded + k), rounded(tile, tl.bfloat16, EMULATE))
        tl.debug_barrier()
        for start in range(0, D, BLOCK_N):
            acc = strip_product(strip, R, padded, start, not CHANGE, EMULATE, BLOCK_M, BLOCK_N, BLOCK_K)
            inside = m_in & (n < D - start)
            acc += load_tile(x + start + (m * x_m + n), inside)
            tl.store(x + start + (m * x_m + n), rounded(acc, DTYPE, EMULATE), mask=inside)
        tl.debug_barrier()  # the next block overwrites the strip


@jit
def load_factor(Q, q_d, start, n, D, rank, RANK, EMULATE: tl.constexpr):
    """Rows of Q from `start` on, as an operand `[n, rank]`."""
    inside = (n < D - start)[:, None] & (rank < RANK)[None, :]
    factor = tl.load(Q + start * q_d + (n[:, None] * q_d + rank[None, :]), mask=inside, other=0.0)
    return rounded(factor, tl.bfloat16, EMULATE)


@jit
def times_Q(
    x, x_m, m_in, Q, q_d, D, RANK, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    EMULATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`x Q [BLOCK_M, BLOCK_R]` of a block of rows."""
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    rank = tl.arange(0, BLOCK_R)
    return product_loop(
        x + (m[:, None] * x_m + k[None, :]), Q + (k[:, None] * q_d + rank[None, :]),
        m_in, (rank < RANK)[None, :], D, 1, q_d, rank,
        False, OPERAND, PRECISION, EMULATE, False, BLOCK_M, BLOCK_R, BLOCK_K,
    )  # fmt: skip


@jit
def times_S(
    t, table, weight, count, RANK, SLOT: tl.constexpr, TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr, EMULATE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`t S`, or `t S^T`, for `t [*, BLOCK_R]`, as the operand of the next product."""
    S, stride = matrix(table, weight, count, 0, SLOT, tl.float32, ALIGNED)
    rank = tl.arange(0, BLOCK_R)
    S = load_factor(S, stride, 0, rank, RANK, rank, RANK, EMULATE)
    if TRANSPOSED:
        S = tl.trans(S)
    return rounded(dot(t, S, tl.zeros_like(t), tl.bfloat16, "ieee", EMULATE), tl.bfloat16, EMULATE)


@jit
def remember_kernel(
    table, count, D, RANK, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, SPAN: tl.constexpr,
    EMULATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`kept = x Q` by three TF32 products; a block of rows on axis 0. The matrices are x, kept, Q and S."""
    weight, row, m_in = locate(table, tl.program_id(0), count, SPAN, BLOCK_M)
    x, x_m = matrix(table, weight, count, row, 0, DTYPE, ALIGNED)
    kept, kept_m = matrix(table, weight, count, row, 1, tl.float32, ALIGNED)
    Q, q_d = matrix(table, weight, count, 0, 2, tl.float32, ALIGNED)
    t = times_Q(x, x_m, m_in, Q, q_d, D, RANK, tl.float32, "tf32x3", EMULATE, BLOCK_M, BLOCK_K, BLOCK_R)
    m = tl.arange(0, BLOCK_M)[:, None]
    rank = tl.arange(0, BLOCK_R)[None, :]
    tl.store(kept + (m * kept_m + rank), t, mask=m_in & (rank < RANK))


@jit
def lowrank_map_kernel(
    table, count, D, RANK,
    CHANGE: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, SPAN: tl.constexpr,
    EMULATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`map_kernel` for `R = I + Q S Q^T`; a block of rows on axis 0.

    The matrices are x, with CHANGE what `remember_kernel` kept, Q and S. The first pass over the columns gives
    `x Q`, which stays in registers; the second takes them in reverse, since those read last are still in L2.
    """
    weight, row, m_in = locate(table, tl.program_id(0), count, SPAN, BLOCK_M)
    x, x_m = matrix(table, weight, count, row, 0, DTYPE, ALIGNED)
    Q, q_d = matrix(table, weight, count, 0, 1 + CHANGE, tl.float32, ALIGNED)
    m = tl.arange(0, BLOCK_M)[:, None]
    n = tl.arange(0, BLOCK_N)
    rank = tl.arange(0, BLOCK_R)
    if CHANGE:  # as it was made of the old x, so that what did not change gives zero
        t = times_Q(x, x_m, m_in, Q, q_d, D, RANK, tl.float32, "tf32x3", EMULATE, BLOCK_M, BLOCK_K, BLOCK_R)
        kept, kept_m = matrix(table, weight, count, row, 1, tl.float32, ALIGNED)
        t -= load_tile(kept + (m * kept_m + rank[None, :]), m_in & (rank < RANK)[None, :])
    else:
        t = times_Q(x, x_m, m_in, Q, q_d, D, RANK, tl.bfloat16, "ieee", EMULATE, BLOCK_M, BLOCK_K, BLOCK_R)
    t = times_S(t, table, weight, count, RANK, 2 + CHANGE, not CHANGE, ALIGNED, EMULATE, BLOCK_R)
    tl.debug_barrier()  # every thread has read x
    steps = tl.cdiv(D, BLOCK_N)
    for step in range(steps):
        start = (steps - 1 - step) * BLOCK_N
        inside = m_in & (n < D - start)[None, :]
        acc = load_tile(x + start + (m * x_m + n[None, :]), inside)
        factor = load_factor(Q, q_d, start, n, D, rank, RANK, EMULATE)
        acc = dot(t, tl.trans(factor), acc, tl.bfloat16, "ieee", EMULATE)
        tl.store(x + start + (m * x_m + n[None, :]), rounded(acc, DTYPE, EMULATE), mask=inside)


def wide(x: Tensor, factors: Sequence[Tensor]) -> torch.dtype:
    """The dtype of products in eager: that of x or R, fp32 at least."""
    return torch.promote_types(torch.promote_types(x.dtype, factors[0].dtype), torch.float32)


def add_deviation(base: Tensor, x: Tensor, factors: Sequence[Tensor], before: Tensor | float = 0.0) -> Tensor:
    """`base + (x - before) (R - I)` by PyTorch's products; for a low-rank R, `before` is times Q already."""
    if len(factors) == 1:
        (R,) = factors
        return torch.addmm(base, x - before, R - torch.eye(len(R), dtype=R.dtype, device=R.device))
    Q, S = factors
    return torch.addmm(base, (x @ Q - before) @ S, Q.mT)


def mapped_gradient(g: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """`g R^T`: R^T has the factors of R but the last, which is transposed."""
    return add_deviation(g, g, [*factors[:-1], factors[-1].mT])


def nested(factors: Sequence[Tensor], sizes: Sequence[int]) -> list[list[Tensor]]:
    """The factors of each R, from a flat list and how many each R has."""
    parts = iter(factors)
    return [list(itertools.islice(parts, size)) for size in sizes]


@operator("map_gradients_", mutates=("gradients",))
def _map_gradients(gradients: list[Tensor], factors: list[Tensor], sizes: list[int], backend: str) -> None:
    pairs = nested(factors, sizes)

    def eager(i: int) -> None:
        g = as_matrix(gradients[i]).to(wide(gradients[i], pairs[i]))
        mapped = mapped_gradient(g, [f.to(g.dtype) for f in pairs[i]])
        gradients[i].copy_(mapped.view(gradients[i].shape))

    kernels = {1: ("map", map_kernel), 2: ("lowrank_map", lowrank_map_kernel)}
    matrices = [(g,) for g in gradients]
    serve("map_gradients_", backend, kernels, eager, matrices, pairs, constants={"CHANGE": False})


@operator("map_changes_", mutates=("weights",))
def _map_changes(
    weights: list[Tensor], factors: list[Tensor], sizes: list[int], before: list[Tensor], backend: str
) -> None:
    pairs = nested(factors, sizes)

    def eager(i: int) -> None:
        V = as_matrix(weights[i]).to(wide(weights[i], pairs[i]))
        mapped = add_deviation(V, V, [f.to(V.dtype) for f in pairs[i]], as_matrix(before[i]))
        weights[i].copy_(mapped.view(weights[i].shape))

    kernels = {1: ("map", map_kernel), 2: ("lowrank_change", lowrank_map_kernel)}
    matrices = list(zip(weights, before, strict=True))
    serve("map_changes_", backend, kernels, eager, matrices, pairs, constants={"CHANGE": True})


@operator("remember", mutates=("kept",))
def _remember(
    weights: list[Tensor], factors: list[Tensor], sizes: list[int], kept: list[Tensor], backend: str
) -> None:
    pairs = nested(factors, sizes)
    copied = [i for i, pair in enumerate(pairs) if len(pair) == 1]
    if copied:
        torch._foreach_copy_([kept[i] for i in copied], [weights[i] for i in copied])
    rest = [i for i, pair in enumerate(pairs) if len(pair) == 2]

    def eager(i: int) -> None:
        V, out = matrices[i]
        out.copy_(as_matrix(V).to(out.dtype) @ low[i][0].to(out.dtype))

    low, matrices = [pairs[i] for i in rest], [(weights[i], kept[i]) for i in rest]
    if low:
        serve("remember", backend, {2: ("lowrank_change", remember_kernel)}, eager, matrices, low)


for _operator in (_map_gradients, _map_changes, _remember):
    _operator.register_fake(lambda *args: None)


@register_flop_formula([torch.ops.dbpkern.map_gradients_, torch.ops.dbpkern.map_changes_])
def map_flops(shapes: Sequence, factor_shapes: Sequence, sizes: Sequence[int], *args, **kwargs) -> int:
    """Operations of one map of each weight."""
    total = 0
    for (o, *width), own in zip(shapes, nested(factor_shapes, sizes), strict=True):
        d = math.prod(width)
        total += 2 * o * d**2 if len(own) == 1 else lowrank_flops(o, d, own[0][1])
    return total


@register_flop_formula(torch.ops.dbpkern.remember)
def _(shapes, factor_shapes, sizes, *args, **kwargs) -> int:
    pairs = zip(shapes, nested(factor_shapes, sizes), strict=True)
    return sum(2 * math.prod(shape) * own[0][1] for shape, own in pairs if len(own) == 2)


def check_like(
    name: str, tensors: Sequence[Tensor], likes: Sequence[tuple[Sequence[int], torch.dtype | None]]
) -> None:
    """Raise unless the tensors have such shapes and dtypes, None for any."""
    if len(tensors) != len(likes):
        raise ValueError(f"{name}: expected {len(likes)} tensors, got {len(tensors)}")
    for i, (t, (shape, dtype)) in enumerate(zip(tensors, likes, strict=True)):
        check_tensor(f"{name}[{i}]", t, str(list(shape)), (len(shape),))
        if t.shape != torch.Size(shape):
            raise ValueError(f"{name}[{i}]: expected shape {list(shape)}, got {list(t.shape)}")
        if dtype not in (None, t.dtype):
            raise TypeError(f"{name}[{i}]: expected {dtype}, got {t.dtype}")


def checked(
    name: str, xs: Sequence[Tensor], factors: Sequence[Factors], backend: str | None, others: Sequence = ()
) -> tuple[list[Tensor], list[int]]:
    """The factors as a flat list and how many each R has; raises unless they fit `xs [o, ...]`."""
    _dispatch.check_backend(backend)
    if len(factors) != len(xs):
        raise ValueError(f"factors: expected one for each of {len(xs)} {name}, got {len(factors)}")
    for i, (x, own) in enumerate(zip(xs, factors, strict=True)):
        check_tensor(f"{name}[{i}]", x, "[o, ...]", (2, 3, 4, 5))
        d = x.shape[1:].numel()
        if len(own) == 1:
            check_tensor("R", own[0], "[d, d]", (2,))
            check_matrix("R", own[0], d, "[d, d]")
        elif len(own) == 2:
            check_factors(*own, d)
        else:
            raise ValueError(f"factors[{i}]: expected (R,) or (Q, S), got {len(own)} tensors")
    flat = [f for own in factors for f in own]
    devices = {t.device for t in (*xs, *flat, *others)}
    if len(devices) > 1:
        raise ValueError(f"expected all tensors on one device, got {', '.join(sorted(map(str, devices)))}")
    return flat, [len(own) for own in factors]


def map_gradients_(
    gradients: Sequence[Tensor], factors: Sequence[Factors], *, backend: str | None = None
) -> None:
    """Map the gradients of `V = W R` in place to those of W: `g <- g R^T` (arXiv 2510.14657, Eq. 3).

    Args:
        gradients: `[o, ...]` each, taken as `[o, d]`, in any floating-point dtypes.
        factors: for each `(R,)`, `[d, d]`, or `(Q, S)`, `[d, r]` and `[r, r]`, of `R = I + Q S Q^T`.
        backend: None, "eager", or "triton": R in fp32, operands rounded to bf16, sums in fp32. It leaves
            matrices without contiguous rows, and ranks above 128, to eager.
    """
    flat, sizes = checked("gradients", gradients, factors, backend)
    if gradients:
        torch.ops.dbpkern.map_gradients_(list(gradients), flat, sizes, backend or "")


def _kept(V: Tensor, own: Factors) -> tuple[Sequence[int], torch.dtype]:
    """Shape and dtype of what `remember` keeps of a weight."""
    return (V.shape, V.dtype) if len(own) == 1 else ((len(V), own[0].shape[1]), wide(V, own))


def remember(
    weights: Sequence[Tensor], factors: Sequence[Factors], *, backend: str | None = None
) -> list[Tensor]:
    """What `map_changes_` needs of V `[o, ...]` before a step: a copy for a full R, `V Q [o, r]` for (Q, S).

    `V Q` keeps the digits of fp32, for its change is a difference of two. Arguments as for `map_gradients_`.
    """
    flat, sizes = checked("weights", weights, factors, backend)
    groups: dict[tuple, list[int]] = {}
    for i, (V, own) in enumerate(zip(weights, factors, strict=True)):
        (_, *width), dtype = _kept(V, own)
        groups.setdefault((*width, dtype), []).append(i)
    kept = {}
    for (*width, dtype), members in groups.items():
        rows = [len(weights[i]) for i in members]
        room = torch.empty(sum(rows), *width, dtype=dtype, device=weights[0].device)
        kept |= zip(members, room.split(rows), strict=True)
    kept = [kept[i] for i in range(len(weights))]
    if weights:
        torch.ops.dbpkern.remember(list(weights), flat, sizes, kept, backend or "")
    return kept


def map_changes_(
    weights: Sequence[Tensor],
    before: Sequence[Tensor],
    factors: Sequence[Factors],
    *,
    backend: str | None = None,
) -> None:
    """Map what a step changed in V `[o, ...]`, in place: `V <- V_old + (V - V_old) R`, rounded once.

    `before` is what `remember` gave with the same factors; other arguments as for `map_gradients_`.
    """
    flat, sizes = checked("weights", weights, factors, backend, before)
    check_like("before", before, [_kept(V, own) for V, own in zip(weights, factors, strict=True)])
    if weights:
        torch.ops.dbpkern.map_changes_(list(weights), flat, sizes, list(before), backend or "")
