"""The batched matrix product in Triton, which `fold` and `transform` are, and what other kernels share."""

import torch
from torch import Tensor

from dbpkern.ops import _triton
from dbpkern.ops._dispatch import Operands, Tiles
from dbpkern.ops._triton import jit, tl

# Tiles of this many rows of blocks are computed together, so that they find their columns in L2.
GROUP = 8


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def within_reach(t: Tensor) -> Tensor:
    """t, or a copy where the rows of a tile lie so far apart that 32 bits do not hold their distance."""
    return t if max(t.stride()[-2:]) < 2**23 else t.contiguous()


def dtype_name(dtype: torch.dtype) -> object:
    """The dtype as Triton knows it."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def operand_constants(operands: Operands) -> dict[str, object]:
    """What `dot` needs to know of the operands."""
    return {
        "OPERAND": dtype_name(operands.dtype),
        "PRECISION": operands.precision,
        "EMULATE": _triton.INTERPRETED,
    }


@jit
def rounded(x, DTYPE: tl.constexpr, EMULATE: tl.constexpr):
    """x rounded to DTYPE, to the nearest and to even."""
    if EMULATE and tl.bfloat16 == DTYPE and x.dtype == tl.float32:  # the interpreter would cut bits off
        bits = x.to(tl.uint32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@jit
def dot(a, b, acc, OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr):
    """`acc + a b` with the operands rounded to OPERAND in registers, summed in fp32."""
    a = rounded(a, OPERAND, EMULATE)
    b = rounded(b, OPERAND, EMULATE)
    if EMULATE:  # the interpreter multiplies the bits of 16-bit operands
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@jit
def less_identity(R, rows, columns):
    """R - I, for the part of R with these rows and columns.

    What R is multiplied with is added as it is: `x R = x + x (R - I)` is exact for R = I, and the operands'
    rounding counts only in what R differs from it.
    """
    return R.to(tl.float32) - tl.where(rows[:, None] == columns[None, :], 1.0, 0.0)


@jit
def product_loop(
    a, b, m_in, n_in, K, a_k, b_k, columns,
    LESS_IDENTITY: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The fp32 product [BLOCK_M, BLOCK_N] over K terms from a [BLOCK_M, BLOCK_K] and b [BLOCK_K, BLOCK_N] on.

    `m_in [BLOCK_M, 1]` and `n_in [1, BLOCK_N]` say which rows and columns exist. With LESS_IDENTITY the
    identity is taken from b, whose columns have the numbers `columns [BLOCK_N]`.
    """
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a_tile = tl.load(a, mask=m_in, other=0.0)
            b_tile = tl.load(b, mask=n_in, other=0.0)
        else:
            k_in = k < K - start
            a_tile = tl.load(a, mask=m_in & k_in[None, :], other=0.0)
            b_tile = tl.load(b, mask=n_in & k_in[:, None], other=0.0)
        if LESS_IDENTITY:
            b_tile = less_identity(b_tile, start + k, columns)
        acc = dot(a_tile, b_tile, acc, OPERAND, PRECISION, EMULATE)
        a += BLOCK_K * a_k
        b += BLOCK_K * b_k
    return acc


@jit
def product_tile(
    a, b, row, column, M, N, K, a_m, a_k, b_k, b_n,
    LESS_IDENTITY: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The fp32 tile [BLOCK_M, BLOCK_N] of `a [M, K] @ b [K, N]` whose corner is (row, column).

    With LESS_IDENTITY b is square, and the tile that of `a + a (b - I)`.
    """
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    m_in = (row + m < M)[:, None]
    n_in = (column + n < N)[None, :]
    # The corner in 64 bits, the rest relative to it in 32.
    a += row.to(tl.int64) * a_m
    b += column.to(tl.int64) * b_n + (k[:, None] * b_k + n[None, :] * b_n)
    acc = product_loop(
        a + (m[:, None] * a_m + k[None, :] * a_k), b, m_in, n_in, K, a_k, b_k, column + n,
        LESS_IDENTITY, OPERAND, PRECISION, EMULATE, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if LESS_IDENTITY:
        a += column.to(tl.int64) * a_k + (m[:, None] * a_m + n[None, :] * a_k)
        acc += tl.load(a, mask=m_in & n_in, other=0.0).to(tl.float32)
    return acc


@jit
def tile_position(tile, rows, columns, GROUP: tl.constexpr):
    """Row and column of blocks of the tile number `tile`, in groups of GROUP rows."""
    per_group = GROUP * columns
    first = tile // per_group * GROUP
    height = min(rows - first, GROUP)
    within = tile % per_group
    return first + within % height, within // height


@jit
def matmul_kernel(
    a, b, c, M, N, a_l, a_m, a_k, b_l, b_k, b_n, c_l, c_m,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`c [L, M, N] = a [L, M, N] @ b [L, N, N]`, b near I; a tile on grid axis 0, a layer on axis 1."""
    tile_m, tile_n = tile_position(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
    layer = tl.program_id(1).to(tl.int64)
    acc = product_tile(
        a + layer * a_l, b + layer * b_l, row, column, M, N, N, a_m, a_k, b_k, b_n, True,
        OPERAND, PRECISION, EMULATE, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    c += layer * c_l + row.to(tl.int64) * c_m + column + m[:, None] * c_m + n[None, :]
    inside = (row + m < M)[:, None] & (column + n < N)[None, :]
    tl.store(c, rounded(acc, c.dtype.element_ty, EMULATE), mask=inside)


def matmul(a: Tensor, b: Tensor, out_dtype: torch.dtype, operands: Operands, tiles: Tiles) -> Tensor:
    """`a [L, M, N] @ b [L, N, N] -> [L, M, N]`, rounded once to `out_dtype`; best for b near I."""
    L, M, N = a.shape
    a, b = within_reach(a), within_reach(b)
    c = torch.empty(L, M, N, dtype=out_dtype, device=a.device)
    _triton.launch(
        matmul_kernel,
        (cdiv(M, tiles.m) * cdiv(N, tiles.n), L),
        {
            "a": a, "b": b, "c": c, "M": M, "N": N,
            "a_l": a.stride(0), "a_m": a.stride(1), "a_k": a.stride(2),
            "b_l": b.stride(0), "b_k": b.stride(1), "b_n": b.stride(2),
            "c_l": c.stride(0), "c_m": c.stride(1),
        },
        {
            **operand_constants(operands),
            "EVEN_K": N % tiles.k == 0,
            "BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k, "GROUP": GROUP,
        },
        tiles.warps,
        tiles.stages,
    )  # fmt: skip
    return c


@jit
def load_rate(eta, layer, ETA_TENSOR: tl.constexpr, ETA_STRIDE: tl.constexpr):
    """The rate of a layer, from a number or from a tensor that the device may change between launches."""
    if ETA_TENSOR:
        rate = tl.load(eta + layer * ETA_STRIDE).to(tl.float32)
    else:
        rate = eta
    return rate


def rate_arguments(eta: Tensor, device: torch.device) -> tuple[dict[str, object], dict[str, object]]:
    """Arguments and constants for a kernel that calls `load_rate`."""
    if eta.device.type == "cpu" and eta.dim() == 0 and device.type != "cpu":
        # Reading it waits for nobody, and the kernel takes it as a number.
        return {"eta": float(eta)}, {"ETA_TENSOR": False, "ETA_STRIDE": 0}
    if eta.dtype == torch.float64:
        eta = eta.float()
    return {"eta": eta}, {"ETA_TENSOR": True, "ETA_STRIDE": eta.stride(0) if eta.dim() else 0}
