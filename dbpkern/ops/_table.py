"""One launch for many weights, through tables of where they lie."""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dbpkern.ops import _dispatch, _triton
from dbpkern.ops._common import autocast_off
from dbpkern.ops._matmul import cdiv, dtype_name, less_identity, rounded
from dbpkern.ops._triton import Kernel, jit, tl
from dbpkern.ops.lowrank_fold import ieee_products

MAX_RANK = 128
"""The widest S that fits into shared memory as an operand."""

PROGRAMS = 2
"""Programs of a kernel with scratch on each multiprocessor."""

# A step uses a few tables for each group of equal layers.
_KEPT = 64
_tables: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()


def address(t: Tensor) -> int:
    """Where t lies in memory; 0 for a tensor without any."""
    return t.data_ptr() if _dispatch.on_device(t) else 0


def address_table(columns: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Columns of equal length as an int64 tensor `[columns, length]` on the device.

    Equal numbers give the table that was made for them before, on the same stream. A CUDA graph that is being
    captured makes its own, which it writes again at each replay.
    """
    if device.type != "cuda":
        return torch.tensor(columns, dtype=torch.int64, device=device)
    capturing = _dispatch.capturing(device)
    # Fake tensors are there without CUDA.
    stream = torch.cuda.current_stream(device).cuda_stream if torch.cuda.is_initialized() else 0
    key = (tuple(map(tuple, columns)), device, stream)
    if key in _tables and not capturing:
        _tables.move_to_end(key)
        return _tables[key]
    table = torch.zeros(len(columns), len(columns[0]), dtype=torch.int64, device=device)
    # The numbers travel as arguments of a kernel: no copy from pageable memory, for which the host would wait
    # and which a CUDA graph would repeat from memory that is gone.
    torch._foreach_add_(list(table.view(-1).unbind()), [number for column in columns for number in column])
    if not capturing:
        _tables[key] = table
        if len(_tables) > _KEPT:
            _tables.popitem(last=False)
    return table


def wide(x: Tensor, factors: Sequence[Tensor]) -> torch.dtype:
    """The dtype of products in eager: that of x or R, fp32 at least."""
    return torch.promote_types(torch.promote_types(x.dtype, factors[0].dtype), torch.float32)


@jit
def number(table, weight, count, COLUMN: tl.constexpr):
    """A weight's number in a column of the table."""
    return tl.load(table + COLUMN * count + weight)


@jit
def locate(table, block, count, SPAN: tl.constexpr, BLOCK_M: tl.constexpr):
    """Which weight a block of rows belongs to, its first row, and which of its rows exist `[BLOCK_M, 1]`."""
    i = tl.arange(0, SPAN)
    firsts = tl.load(table + i, mask=i < count, other=2**62)
    weight = tl.sum((firsts <= block).to(tl.int32), 0) - 1
    row = (block - number(table, weight, count, 0)) * BLOCK_M  # 64 bits, like the table
    height = (number(table, weight, count, 1) - row).to(tl.int32)
    return weight, row, (tl.arange(0, BLOCK_M) < height)[:, None]


@jit
def matrix(table, weight, count, row, SLOT: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a row of a weight's matrix number SLOT begins, and the stride of rows.

    32 bits hold the distances within a block of rows.
    """
    pointer = number(table, weight, count, 2 + 2 * SLOT).to(tl.pointer_type(DTYPE))
    stride = number(table, weight, count, 3 + 2 * SLOT).to(tl.int32)
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


def deviations(Rs: Sequence[Tensor], padded: int) -> tuple[Tensor, list[int]]:
    """`R - I` of the different ones among some R `[d, d]`, and the number of each there."""
    keys = [address(R) or id(R) for R in Rs]
    found = dict(zip(keys, Rs, strict=True))
    out = torch.empty(len(found), padded, padded, dtype=torch.bfloat16, device=Rs[0].device)
    columns = zip(*((address(R), R.stride(0)) for R in found.values()), strict=True)
    table = address_table(list(columns), out.device)
    args = {"table": table, "deviation": out, "D": len(Rs[0]), "padded": padded}
    grid = (cdiv(padded, 64), cdiv(padded, 64), len(found))
    _triton.launch(deviation_kernel, grid, args, {"EMULATE": _triton.INTERPRETED, "BLOCK": 64}, 4, 1)
    return out, [list(found).index(key) for key in keys]


def served(matrices: Sequence[Tensor], factors: Sequence[Tensor], squares: bool) -> bool:
    """Whether kernels know the layouts: rows in one piece each, within reach, and ranks up to MAX_RANK.

    With `squares`, which they would keep as they are stored, not in fp16: it has no range for these.
    """
    if squares and matrices[0].dtype == torch.float16:
        return False
    try:
        rows = [*(t.view(len(t), -1) for t in matrices), *factors]
    except RuntimeError:
        return False
    near = all(max(t.stride(0), 1) * max(len(factors[0]), 128) < 2**31 for t in rows)
    fits = len(factors) == 1 or factors[0].shape[1] <= MAX_RANK
    return near and fits and all(t.stride(1) == 1 for t in rows if t.shape[1] > 1)


def serve(
    op: str, backend: str, kernels: Mapping[int, tuple[str, Kernel]],
    eager: Callable[[int, list[Tensor]], None],
    matrices: Sequence[Sequence[Tensor]], factors: Sequence[Sequence[Tensor]],
    args: Mapping[str, object], constants: Mapping[str, object],
    steps: Sequence[Tensor] = (), strips: int = 1,
) -> None:  # fmt: skip
    """Serve weights by a launch for each group of equal widths, ranks and dtypes, the others one by one.

    The table's columns: the number of each weight's first block of rows, its rows, address and stride of each
    of its matrices, Q and S among them, the address of its step, and the number of a full R in `deviation`.

    `kernels`, by the number of factors, come with their rows in the table of tiles. With full R a program
    takes one block of rows after the other, in `strips` of scratch; with low-rank R it takes one.
    `eager(i, factors)` serves a weight, with its factors in the dtype of the products. `matrices` are for
    each weight itself and what comes with it; DTYPE and OTHER are the dtypes of the first two.
    """
    device = matrices[0][0].device
    # float16 beside bfloat16 is no obstacle: no operand is float16.
    dtypes = {t.dtype for own in matrices for t in own} - {torch.float16}
    refusal = _dispatch.triton_refusal(device, *dtypes)
    if any(f.dtype != torch.float32 for own in factors for f in own):
        refusal = refusal or "it serves R of float32"
    if any(step.device != device for step in steps):
        refusal = refusal or "it reads the steps on the weights' device"
    chosen = _dispatch.choose(op, backend, {"triton": refusal}, _dispatch.preferred(op, device))
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, (own, factor) in enumerate(zip(matrices, factors, strict=True)):
        if chosen == "eager" or not served(own, factor, bool(steps)):
            with autocast_off(device), ieee_products(device):
                eager(i, [f.to(wide(own[0], factor)) for f in factor])
        elif own[0].numel():
            key = (len(factor), *factor[0].shape, *(t.dtype for t in own))
            groups.setdefault(key, []).append(i)
    for (size, d, r, *kinds), members in groups.items():
        name, kernel = kernels[size]
        every = [[t.flatten(1) for t in matrices[i]] + list(factors[i] if size == 2 else ()) for i in members]
        aligned = all((address(t) | t.stride(0) * t.itemsize) % 16 == 0 for ts in every for t in ts)
        # An odd number takes the table's row for what is not aligned.
        tiles = _dispatch.tiles(name, "16bit", r if aligned else r | 1)
        rows = [len(ts[0]) for ts in every]
        *firsts, blocks = itertools.accumulate((cdiv(o, tiles.m) for o in rows), initial=0)
        columns = [firsts, rows]
        for ts in zip(*every, strict=True):
            columns += [[address(t) for t in ts], [t.stride(0) for t in ts]]
        if steps:
            columns.append([address(steps[i]) for i in members])
        given = {"count": len(members), "D": d, **args}
        fixed = {
            "DTYPE": dtype_name(kinds[0]), "OTHER": dtype_name(kinds[min(1, len(kinds) - 1)]),
            "ALIGNED": aligned, "SPAN": 1 << (len(members) - 1).bit_length(), "EMULATE": _triton.INTERPRETED,
            "BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k, **constants,
        }  # fmt: skip
        if size == 2:
            grid = blocks
            given["RANK"] = r
            fixed["BLOCK_R"] = max(16, 1 << (r - 1).bit_length())
        else:
            grid = min(blocks, PROGRAMS * _dispatch.processors(device))
            padded = cdiv(d, max(tiles.n, tiles.k)) * max(tiles.n, tiles.k)
            deviation, numbers = deviations([factors[i][0] for i in members], padded)
            columns.append(numbers)
            scratch = torch.empty(strips, grid, tiles.m, padded, dtype=torch.bfloat16, device=device)
            given |= {"deviation": deviation, "strips": scratch, "blocks": blocks, "padded": padded}
        given["table"] = address_table(columns, device)
        _triton.launch(kernel, (grid,), given, fixed, tiles.warps, tiles.stages)
