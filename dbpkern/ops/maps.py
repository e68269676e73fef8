"""The maps around a step of the weights, for all layers in a few launches: `g R^T` before, `dV R` after it.

Both are written with `R - I`: what R is multiplied with is added as it is, so the 16-bit operands of the
tensor cores count only in what R differs from the identity. A program owns a block of rows over their whole
width; nothing it reads is written by another, so the matrices change in place and no program waits.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dbpkern.ops import _dispatch, _triton
from dbpkern.ops._common import autocast_off, check_matrix, check_tensor, operator
from dbpkern.ops._matmul import cdiv, dot, dtype_name, less_identity, product_loop, rounded
from dbpkern.ops._table import address, address_table
from dbpkern.ops._triton import jit, tl
from dbpkern.ops.lowrank_fold import check_factors, ieee_products, lowrank_flops

Factors = tuple[Tensor] | tuple[Tensor, Tensor]

MAX_RANK = 128
"""The widest S that fits into shared memory as an operand."""

PROGRAMS = 2
"""Programs of a kernel with scratch on each multiprocessor."""


@jit
def locate(table, block, count, SPAN: tl.constexpr, BLOCK_M: tl.constexpr):
    """Which weight a block of rows belongs to, its first row, and which of its rows exist `[BLOCK_M, 1]`.

    Columns 0 and 1 of the table: the number of each weight's first block, and its rows.
    """
    i = tl.arange(0, SPAN)
    firsts = tl.load(table + i, mask=i < count, other=2**62)
    weight = tl.sum((firsts <= block).to(tl.int32), 0) - 1
    row = (block - tl.load(table + weight)) * BLOCK_M  # 64 bits, like the table
    height = (tl.load(table + count + weight) - row).to(tl.int32)
    return weight, row, (tl.arange(0, BLOCK_M) < height)[:, None]


@jit
def matrix(table, weight, count, row, SLOT: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a row of a weight's matrix number SLOT begins, and the stride of rows.

    Columns 2 + 2 SLOT and 3 + 2 SLOT of the table. 32 bits hold the distances within a block of rows.
    """
    entry = table + (2 + 2 * SLOT) * count + weight
    pointer = tl.load(entry).to(tl.pointer_type(DTYPE))
    stride = tl.load(entry + count).to(tl.int32)
    if ALIGNED:  # so that 16 bytes are loaded at a time
        pointer = tl.multiple_of(pointer, 16)
        stride = tl.multiple_of(stride, 128 // DTYPE.primitive_bitwidth)
    return pointer + row * stride, stride


@jit
def load_tile(tile, inside):
    """The tile that pointers point to, in fp32."""
    return tl.load(tile, mask=inside, other=0.0).to(tl.float32)


@jit
def deviation_kernel(table, deviation, D, padded, EMULATE: tl.constexpr, BLOCK: tl.constexpr):
    """`R - I` in 16 bits, `[*, padded, padded]`, zeros beyond D; rows on axis 0, columns on 1, an R on 2."""
    R = tl.program_id(2)
    pointer = tl.load(table + R).to(tl.pointer_type(tl.float32))
    stride = tl.load(table + tl.num_programs(2) + R)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (i < D)[:, None] & (j < D)[None, :]
    tile = load_tile(pointer + i[:, None] * stride + j[None, :], inside)
    tile = rounded(tl.where(inside, less_identity(tile, i, j), 0.0), tl.bfloat16, EMULATE)
    deviation += R.to(tl.int64) * padded * padded
    inside = (i < padded)[:, None] & (j < padded)[None, :]
    tl.store(deviation + (i[:, None] * padded + j[None, :]), tile, mask=inside)


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
    """`x += x (R - I)^T`, or with CHANGE `x += (x - before) (R - I)`, for the weights of a table.

    The table's matrices are x and, with CHANGE, before; its last column is R's number in `deviation`. What is
    multiplied waits in 16 bits in the program's own strip of scratch, since x is overwritten tile by tile.
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
        R = deviation + tl.load(table + (4 + 2 * CHANGE) * count + weight) * padded * padded
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
def lowrank_map_kernel(
    table, count, D, RANK,
    CHANGE: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, SPAN: tl.constexpr,
    EMULATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`map_kernel` for `R = I + Q S Q^T`; a block of rows on axis 0.

    The table's matrices are x, with CHANGE before, Q and S. The first pass over the columns gives `x Q`,
    which stays in registers; the second takes them in reverse, since those read last are still in L2.
    """
    weight, row, m_in = locate(table, tl.program_id(0), count, SPAN, BLOCK_M)
    x, x_m = matrix(table, weight, count, row, 0, DTYPE, ALIGNED)
    if CHANGE:
        before, before_m = matrix(table, weight, count, row, 1, DTYPE, ALIGNED)
    Q, q_d = matrix(table, weight, count, 0, 1 + CHANGE, tl.float32, ALIGNED)
    m = tl.arange(0, BLOCK_M)[:, None]
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rank = tl.arange(0, BLOCK_R)
    t = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, D, BLOCK_K):
        inside = m_in & (k < D - start)[None, :]
        tile = tl.load(x + start + (m * x_m + k[None, :]), mask=inside, other=0.0)
        if CHANGE:
            tile = tile.to(tl.float32) - load_tile(before + start + (m * before_m + k[None, :]), inside)
        factor = load_factor(Q, q_d, start, k, D, rank, RANK, EMULATE)
        t = dot(tile, factor, t, tl.bfloat16, "ieee", EMULATE)
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


def as_matrix(t: Tensor) -> Tensor:
    """t as `[o, d]`: a view where its strides allow one, otherwise a copy."""
    return t.reshape(t.shape[0], t.shape[1:].numel())


class Group:
    """Weights that one launch serves, of equal width and dtypes: their table, and how it is launched.

    Args:
        name: the kernel's in the table of tiles.
        size: the width or rank that the tiles go by.
        matrices: for each weight the matrices `[o, *]` of the table's slots, the weight's own first.
        extra: for each weight numbers that follow them.
    """

    def __init__(
        self, name: str, size: int, matrices: Sequence[Sequence[Tensor]], extra: Sequence[Sequence[int]]
    ):
        places = [[(address(t), t.stride(0)) for t in own] for own in matrices]
        sizes = [t.itemsize for t in matrices[0]]
        aligned = all(
            (a | row * size) % 16 == 0 for own in places for (a, row), size in zip(own, sizes, strict=True)
        )
        self.tiles = tiles = _dispatch.tiles(name, "16bit", size if aligned else size | 1)
        rows = [own[0].shape[0] for own in matrices]
        firsts = list(itertools.accumulate((cdiv(o, tiles.m) for o in rows), initial=0))
        self.blocks = firsts.pop()
        numbers = [(*itertools.chain(*own), *more) for own, more in zip(places, extra, strict=True)]
        x = matrices[0][0]
        self.device, self.d = x.device, x.shape[1]
        table = address_table([firsts, rows, *zip(*numbers, strict=True)], x.device)
        self.args = {"table": table, "count": len(rows), "D": self.d}
        self.constants = {
            "ALIGNED": aligned, "SPAN": 1 << (len(rows) - 1).bit_length(), "EMULATE": _triton.INTERPRETED,
            "BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k,
        }  # fmt: skip

    def launch(
        self, kernel: Callable, grid: int, args: dict[str, object], constants: dict[str, object]
    ) -> None:
        """Launch a kernel on the group's table."""
        constants = self.constants | constants
        _triton.launch(kernel, (grid,), self.args | args, constants, self.tiles.warps, self.tiles.stages)

    def launch_full(
        self, kernel: Callable, Rs: Sequence[Tensor], strips: Sequence[str], args: dict, constants: dict
    ) -> None:
        """Write `R - I` of the matrices R, and launch a kernel with such strips of scratch."""
        wide = max(self.tiles.n, self.tiles.k)
        padded = cdiv(self.d, wide) * wide
        deviation = torch.empty(len(Rs), padded, padded, dtype=torch.bfloat16, device=self.device)
        columns = [[address(R) for R in Rs], [R.stride(0) for R in Rs]]
        _triton.launch(
            deviation_kernel,
            (cdiv(padded, 64), cdiv(padded, 64), len(Rs)),
            {
                "table": address_table(columns, self.device), "deviation": deviation,
                "D": self.d, "padded": padded,
            },
            {"EMULATE": _triton.INTERPRETED, "BLOCK": 64},
            4,
            1,
        )  # fmt: skip
        grid = min(self.blocks, PROGRAMS * _dispatch.processors(self.device))
        rooms = torch.empty(len(strips), grid, self.tiles.m, padded, dtype=torch.bfloat16, device=self.device)
        args = args | dict(zip(strips, rooms, strict=True))
        args |= {"deviation": deviation, "blocks": self.blocks, "padded": padded}
        self.launch(kernel, grid, args, constants)

    def launch_lowrank(self, kernel: Callable, r: int, args: dict, constants: dict) -> None:
        """Launch a kernel with a program for each block of rows."""
        constants = constants | {"BLOCK_R": max(16, 1 << (r - 1).bit_length())}
        self.launch(kernel, self.blocks, args | {"RANK": r}, constants)


def distinct(Rs: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """The different ones among some R, and the number of each in that list."""
    keys = [address(R) or id(R) for R in Rs]
    found = dict(zip(keys, Rs, strict=True))
    numbers = {key: i for i, key in enumerate(found)}
    return list(found.values()), [numbers[key] for key in keys]


def serves(matrices: Sequence[Tensor], factors: Sequence[Tensor]) -> bool:
    """Whether kernels know the layouts: rows in one piece each, within reach, and ranks up to MAX_RANK."""
    o, *width = matrices[0].shape
    d = math.prod(width)
    try:
        rows = [*(t.view(o, d) for t in matrices), *factors]
    except RuntimeError:
        return False
    return (
        factors[-1].shape[1] <= (d if len(factors) == 1 else MAX_RANK)
        and all(t.stride(1) == 1 for t in rows if t.shape[1] > 1)
        and all(max(t.stride(0), 1) * max(d, 128) < 2**31 for t in rows)
    )


def grouped(
    matrices: Sequence[Sequence[Tensor]], factors: Sequence[Sequence[Tensor]]
) -> tuple[dict[tuple, list[int]], list[int]]:
    """The numbers of the weights by what one launch serves: (full, d, r, dtypes); then the rest of them."""
    groups, rest = {}, []
    for i, (own, factor) in enumerate(zip(matrices, factors, strict=True)):
        if not own[0].numel():
            continue
        if serves(own, factor):
            key = (len(factor) == 1, *factor[0].shape, *(t.dtype for t in own))
            groups.setdefault(key, []).append(i)
        else:
            rest.append(i)
    return groups, rest


def triton_maps(
    xs: Sequence[Tensor], before: Sequence[Tensor] | None, factors: Sequence[Sequence[Tensor]]
) -> None:
    """Map gradients, or with `before` changes, in place by the kernels; layouts they do not know in eager."""
    matrices = [(x,) for x in xs] if before is None else list(zip(xs, before, strict=True))
    groups, rest = grouped(matrices, factors)
    for (full, d, r, dtype, *_), members in groups.items():
        own = [[as_matrix(t) for t in matrices[i]] for i in members]
        constants = {"CHANGE": before is not None, "DTYPE": dtype_name(dtype)}
        if full:
            Rs, numbers = distinct([factors[i][0] for i in members])
            group = Group("map", d, own, [(number,) for number in numbers])
            group.launch_full(map_kernel, Rs, ["strips"], {}, constants)
        else:
            own = [[*ts, *factors[i]] for ts, i in zip(own, members, strict=True)]
            group = Group("lowrank_map", r, own, [()] * len(own))
            group.launch_lowrank(lowrank_map_kernel, r, {}, constants)
    for i in rest:
        eager_map(xs[i], None if before is None else before[i], factors[i])


def add_deviation(base: Tensor, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """`base + x (R - I)` by PyTorch's products, all of one dtype."""
    if len(factors) == 1:
        (R,) = factors
        return torch.addmm(base, x, R - torch.eye(len(R), dtype=R.dtype, device=R.device))
    Q, S = factors
    return torch.addmm(base, (x @ Q) @ S, Q.mT)


def mapped_gradient(g: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """`g R^T`: R^T has the factors of R but the last, which is transposed."""
    return add_deviation(g, g, [*factors[:-1], factors[-1].mT])


def eager_map(x: Tensor, before: Tensor | None, factors: Sequence[Tensor]) -> None:
    """Map a gradient, or with `before` a change, in place by PyTorch's products in the dtype of R."""
    compute = torch.promote_types(x.dtype, factors[0].dtype)
    factors = [f.to(compute) for f in factors]
    X = as_matrix(x).to(compute)
    if before is None:
        mapped = mapped_gradient(X, factors)
    else:
        mapped = add_deviation(X, X - as_matrix(before).to(compute), factors)
    x.copy_(mapped.view(x.shape))


def nested(factors: Sequence[Tensor], sizes: Sequence[int]) -> list[list[Tensor]]:
    """The factors of each R, from a flat list and how many each R has."""
    parts = iter(factors)
    return [list(itertools.islice(parts, size)) for size in sizes]


def served_by(
    op: str, tensors: Sequence[Tensor], factors: Sequence[Tensor], backend: str, more: str | None = None
) -> str:
    """The backend of a call; `more` is a further reason against Triton."""
    device = tensors[0].device
    # float16 beside bfloat16 is no obstacle: every operand is bfloat16.
    refusal = _dispatch.triton_refusal(device, *({t.dtype for t in tensors} - {torch.float16})) or more
    if any(f.dtype != torch.float32 for f in factors):
        refusal = refusal or "it serves R of float32"
    return _dispatch.choose(op, backend, {"triton": refusal}, _dispatch.preferred(op, device))


def _maps(
    op: str,
    xs: list[Tensor],
    before: list[Tensor] | None,
    factors: list[Tensor],
    sizes: list[int],
    backend: str,
) -> None:
    pairs = nested(factors, sizes)
    device = xs[0].device
    with autocast_off(device), ieee_products(device):
        if served_by(op, xs, factors, backend) == "triton":
            triton_maps(xs, before, pairs)
            return
        for i, x in enumerate(xs):
            eager_map(x, None if before is None else before[i], pairs[i])


@operator("map_gradients_", mutates=("gradients",))
def _map_gradients(gradients: list[Tensor], factors: list[Tensor], sizes: list[int], backend: str) -> None:
    _maps("map_gradients_", gradients, None, factors, sizes, backend)


@operator("map_changes_", mutates=("weights",))
def _map_changes(
    weights: list[Tensor], before: list[Tensor], factors: list[Tensor], sizes: list[int], backend: str
) -> None:
    _maps("map_changes_", weights, before, factors, sizes, backend)


_map_gradients.register_fake(lambda *args: None)
_map_changes.register_fake(lambda *args: None)


def map_flops(shapes: Sequence[Sequence[int]], factor_shapes: Sequence, sizes: Sequence[int]) -> int:
    """Operations of one map of each weight."""
    total = 0
    for (o, *width), own in zip(shapes, nested(factor_shapes, sizes), strict=True):
        d = math.prod(width)
        total += 2 * o * d**2 if len(own) == 1 else lowrank_flops(o, d, own[0][1])
    return total


@register_flop_formula(torch.ops.dbpkern.map_gradients_)
def _(gradients_shapes, factor_shapes, sizes, *args, **kwargs) -> int:
    return map_flops(gradients_shapes, factor_shapes, sizes)


@register_flop_formula(torch.ops.dbpkern.map_changes_)
def _(weights_shapes, before_shapes, factor_shapes, sizes, *args, **kwargs) -> int:
    return map_flops(weights_shapes, factor_shapes, sizes)


def check_like(name: str, tensors: Sequence[Tensor], weights: Sequence[Tensor], dtype: bool = True) -> None:
    """Raise unless the tensors have the shapes, and the dtypes, of the weights."""
    if len(tensors) != len(weights):
        raise ValueError(f"{name}: expected {len(weights)} tensors, got {len(tensors)}")
    for i, (t, V) in enumerate(zip(tensors, weights, strict=True)):
        check_tensor(f"{name}[{i}]", t, "[o, ...]", (V.dim(),))
        if t.shape != V.shape:
            raise ValueError(f"{name}[{i}]: expected shape {list(V.shape)}, got {list(t.shape)}")
        if dtype and t.dtype != V.dtype:
            raise TypeError(f"{name}[{i}]: expected {V.dtype}, got {t.dtype}")


def checked_factors(
    name: str, xs: Sequence[Tensor], factors: Sequence[Factors], others: Sequence[Tensor] = ()
) -> tuple[list[Tensor], list[int]]:
    """The factors as a flat list and how many each R has; raises unless they fit the matrices `xs`."""
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
    """Map the gradients of fused weights in place, before the step of an optimizer: `g <- g R^T`.

    A step of W along the gradient `g R^T` of W is one of `V = W R` along `g R^T R`, with `map_changes_`
    after it (arXiv 2510.14657, Eq. 3: the layer `y = W R x`). On a GPU one launch serves all low-rank R of a
    width and rank, and two all full R of a width.

    Args:
        gradients: `[o, ...]` each, taken as `[o, d]`: a linear layer's, or a convolution's `[o, C, kh, kw]`.
            Any floating-point dtypes; changed in place.
        factors: for each gradient `(R,)`, `[d, d]`, or `(Q, S)`, `[d, r]` and `[r, r]`, of
            `R = I + Q S Q^T`. Several may share one.
        backend: None for the automatic choice, "eager" or "triton". Eager forms the products in the wider
            dtype of gradient and R. Triton takes R in fp32, writes the map as `g + g (R - I)^T`, rounds the
            operands to bf16 and sums in fp32; matrices without contiguous rows, and ranks above 128, are left
            to eager.

    Raises:
        TypeError: not floating-point tensors, Q and S of unequal dtypes.
        ValueError: shapes, lengths or devices that do not fit, a backend that cannot serve the call.
    """
    flat, sizes = checked_factors("gradients", gradients, factors)
    _dispatch.check_backend(backend)
    if gradients:
        torch.ops.dbpkern.map_gradients_(list(gradients), flat, sizes, backend or "")


def map_changes_(
    weights: Sequence[Tensor],
    before: Sequence[Tensor],
    factors: Sequence[Factors],
    *,
    backend: str | None = None,
) -> None:
    """Map what a step changed in fused weights, in place: `V <- V_old + (V - V_old) R`.

    Args:
        weights: V after the step, `[o, ...]` each, taken as `[o, d]`; changed in place.
        before: V before it, of equal shapes and dtypes.
        factors: as for `map_gradients_`.
        backend: as for `map_gradients_`; Triton writes the map as `V + (V - V_old) (R - I)`. V is rounded
            once.

    Raises:
        TypeError: not floating-point tensors, unequal dtypes of V and V_old, or of Q and S.
        ValueError: shapes, lengths or devices that do not fit, a backend that cannot serve the call.
    """
    flat, sizes = checked_factors("weights", weights, factors, before)
    check_like("before", before, weights)
    _dispatch.check_backend(backend)
    if weights:
        torch.ops.dbpkern.map_changes_(list(weights), list(before), flat, sizes, backend or "")
