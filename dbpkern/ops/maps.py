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
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dbpkern.ops import _dispatch
from dbpkern.ops._common import check_matrix, check_tensor, operator
from dbpkern.ops._matmul import dot, product_loop, rounded
from dbpkern.ops._table import load_tile, locate, matrix, number, serve, wide
from dbpkern.ops._triton import jit, tl
from dbpkern.ops.lowrank_fold import check_factors, lowrank_flops

Factors = tuple[Tensor, ...]
"""`(R,)` or `(Q, S)`."""

Form = Callable[[Tensor, Factors], tuple[Sequence[int], torch.dtype | None]]
"""The shape, and dtype or None, that a tensor beside x and its factors has."""

Part = TypeVar("Part")


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
    CHANGE: tl.constexpr, DTYPE: tl.constexpr, OTHER: tl.constexpr, ALIGNED: tl.constexpr,
    SPAN: tl.constexpr, EMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
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
            before, before_m = matrix(table, weight, count, row, 1, OTHER, ALIGNED)
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
    table, count, D, RANK, DTYPE: tl.constexpr, OTHER: tl.constexpr, ALIGNED: tl.constexpr,
    SPAN: tl.constexpr, EMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`kept = x Q` by three TF32 products; a block of rows on axis 0. The matrices are x, kept, Q and S."""
    weight, row, m_in = locate(table, tl.program_id(0), count, SPAN, BLOCK_M)
    x, x_m = matrix(table, weight, count, row, 0, DTYPE, ALIGNED)
    kept, kept_m = matrix(table, weight, count, row, 1, OTHER, ALIGNED)
    Q, q_d = matrix(table, weight, count, 0, 2, tl.float32, ALIGNED)
    t = times_Q(x, x_m, m_in, Q, q_d, D, RANK, tl.float32, "tf32x3", EMULATE, BLOCK_M, BLOCK_K, BLOCK_R)
    m = tl.arange(0, BLOCK_M)[:, None]
    rank = tl.arange(0, BLOCK_R)[None, :]
    tl.store(kept + (m * kept_m + rank), t, mask=m_in & (rank < RANK))


@jit
def lowrank_map_kernel(
    table, count, D, RANK,
    CHANGE: tl.constexpr, DTYPE: tl.constexpr, OTHER: tl.constexpr, ALIGNED: tl.constexpr,
    SPAN: tl.constexpr, EMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`map_kernel` for `R = I + Q S Q^T`; a block of rows on axis 0.

    The matrices are x, with CHANGE what `remember_kernel` kept, Q and S. The first pass over the columns
    gives `x Q`, which stays in registers; the second goes in reverse: what was read last is still in L2.
    """
    weight, row, m_in = locate(table, tl.program_id(0), count, SPAN, BLOCK_M)
    x, x_m = matrix(table, weight, count, row, 0, DTYPE, ALIGNED)
    Q, q_d = matrix(table, weight, count, 0, 1 + CHANGE, tl.float32, ALIGNED)
    m = tl.arange(0, BLOCK_M)[:, None]
    n = tl.arange(0, BLOCK_N)
    rank = tl.arange(0, BLOCK_R)
    if CHANGE:  # as it was made of the old x, so that what did not change gives zero
        t = times_Q(x, x_m, m_in, Q, q_d, D, RANK, tl.float32, "tf32x3", EMULATE, BLOCK_M, BLOCK_K, BLOCK_R)
        kept, kept_m = matrix(table, weight, count, row, 1, OTHER, ALIGNED)
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


def add_deviation_(
    base: Tensor, x: Tensor, factors: Sequence[Tensor], before: Tensor | float = 0.0
) -> Tensor:
    """Add `(x - before) (R - I)` to base in place; for a low-rank R, `before` is times Q already."""
    if len(factors) == 1:
        (R,) = factors
        return base.addmm_(x - before, R - torch.eye(len(R), dtype=R.dtype, device=R.device))
    Q, S = factors
    return base.addmm_((x @ Q - before) @ S, Q.mT)


def transposed(factors: Sequence[Tensor]) -> list[Tensor]:
    """The factors of R^T."""
    return [*factors[:-1], factors[-1].mT]


def nested(factors: Sequence[Part], sizes: Sequence[int]) -> list[list[Part]]:
    """The factors of each R, from a flat list and how many each R has."""
    parts = iter(factors)
    return [list(itertools.islice(parts, size)) for size in sizes]


@operator("map_", mutates=("xs",))
def _map(
    xs: list[Tensor], factors: list[Tensor], sizes: list[int], before: list[Tensor], backend: str
) -> None:
    """Map gradients, or with `before` changes."""

    def eager(i: int, own: list[Tensor]) -> None:
        x = xs[i].flatten(1).to(own[0].dtype)
        old = before[i].flatten(1) if before else 0.0
        add_deviation_(x, x, own if before else transposed(own), old)
        if x is not xs[i]:  # perhaps a view of it
            xs[i].copy_(x.view(xs[i].shape))

    kernels = {1: ("map", map_kernel), 2: ("lowrank_map", lowrank_map_kernel)}
    matrices = list(zip(xs, before, strict=True) if before else zip(xs, strict=True))
    serve("map_", backend, kernels, eager, matrices, nested(factors, sizes), {}, {"CHANGE": bool(before)})


@operator("remember", mutates=("kept",))
def _remember(
    weights: list[Tensor], factors: list[Tensor], sizes: list[int], kept: list[Tensor], backend: str
) -> None:
    pairs = nested(factors, sizes)
    full = [(out, V) for V, out, size in zip(weights, kept, sizes, strict=True) if size == 1]
    low = [(V, out, pair) for V, out, pair in zip(weights, kept, pairs, strict=True) if len(pair) == 2]

    def eager(i: int, own: list[Tensor]) -> None:
        V, out, _ = low[i]
        out.copy_(V.flatten(1).to(own[0].dtype) @ own[0])

    if full:
        torch._foreach_copy_([out for out, _ in full], [V for _, V in full])
    if low:
        kernels = {2: ("lowrank_map", remember_kernel)}
        serve("remember", backend, kernels, eager, [own[:2] for own in low], [own[2] for own in low], {}, {})


for _operator in (_map, _remember):
    _operator.register_fake(lambda *args: None)


@register_flop_formula(torch.ops.dbpkern.map_)
def map_flops(
    shapes: Sequence[Sequence[int]], factor_shapes: Sequence[Sequence[int]], sizes: Sequence[int],
    *args: object, **kwargs: object,
) -> int:  # fmt: skip
    """Operations of one map of each weight."""
    pairs = zip(shapes, nested(factor_shapes, sizes), strict=True)
    return sum(
        2 * math.prod(x) * math.prod(x[1:]) if len(own) == 1 else lowrank_flops(x[0], *own[0])
        for x, own in pairs
    )


@register_flop_formula(torch.ops.dbpkern.remember)
def _(
    shapes: Sequence[Sequence[int]], factor_shapes: Sequence[Sequence[int]], sizes: Sequence[int],
    *args: object, **kwargs: object,
) -> int:  # fmt: skip
    pairs = zip(shapes, nested(factor_shapes, sizes), strict=True)
    return sum(2 * math.prod(x) * own[0][1] for x, own in pairs if len(own) == 2)


def checked(
    name: str, xs: Sequence[Tensor], factors: Sequence[Factors], backend: str | None,
    **others: tuple[Sequence[Tensor], Form],
) -> tuple[list[Tensor], list[int]]:  # fmt: skip
    """The factors as a flat list and how many each R has; raises unless all fit `xs [o, ...]`.

    `others` are tensors, and a function of x and its factors that gives their shape, and dtype or None.
    """
    _dispatch.check_backend(backend)
    for label, own in {"factors": factors, **{label: ts for label, (ts, _) in others.items()}}.items():
        if len(own) != len(xs):
            raise ValueError(f"{label}: expected one for each of {len(xs)} {name}, got {len(own)}")
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
    for label, (ts, like) in others.items():
        for i, (t, x, own) in enumerate(zip(ts, xs, factors, strict=True)):
            shape, dtype = like(x, own)
            check_tensor(f"{label}[{i}]", t, str(list(shape)), (len(shape),))
            if t.shape != shape:
                raise ValueError(f"{label}[{i}]: expected shape {list(shape)}, got {list(t.shape)}")
            if dtype not in (None, t.dtype):
                raise TypeError(f"{label}[{i}]: expected {dtype}, got {t.dtype}")
    flat = [f for own in factors for f in own]
    every = itertools.chain(xs, flat, *(ts for ts, _ in others.values()))
    devices = {t.device for t in every if t.dim() or t.device.type != "cpu"}  # numbers may lie on the host
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
        backend: None, "eager", or "triton", which takes R in fp32, and leaves matrices without contiguous
            rows and ranks above 128 to eager.
    """
    flat, sizes = checked("gradients", gradients, factors, backend)
    if gradients:
        torch.ops.dbpkern.map_(list(gradients), flat, sizes, [], backend or "")


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
    if not weights:
        return []
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, (V, own) in enumerate(zip(weights, factors, strict=True)):
        (_, *width), dtype = _kept(V, own)
        groups.setdefault((*width, dtype), []).append(i)
    parts: dict[int, Tensor] = {}
    for (*width, dtype), members in groups.items():
        rows = [len(weights[i]) for i in members]
        room = torch.empty(sum(rows), *width, dtype=dtype, device=weights[0].device)
        parts |= zip(members, room.split(rows), strict=True)
    kept = [parts[i] for i in range(len(weights))]
    torch.ops.dbpkern.remember(list(weights), flat, sizes, kept, backend or "")
    return kept


def map_changes_(
    weights: Sequence[Tensor], before: Sequence[Tensor], factors: Sequence[Factors],
    *, backend: str | None = None,
) -> None:  # fmt: skip
    """Map what a step changed in V `[o, ...]`, in place: `V <- V_old + (V - V_old) R`, rounded once.

    `before` is what `remember` gave with the same factors; other arguments as for `map_gradients_`.
    """
    flat, sizes = checked("weights", weights, factors, backend, before=(before, _kept))
    if weights:
        torch.ops.dbpkern.map_(list(weights), flat, sizes, list(before), backend or "")
