"""`M`, the mean squares of z and a bound of M's eigenvalues: what the sampled rows say about R."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dbpkern.ops import _dispatch, _triton
from dbpkern.ops._common import (
    accumulator_dtype,
    autocast_off,
    check_kappa,
    check_tensor,
    operator,
    product,
)
from dbpkern.ops._matmul import cdiv, dot, operand_constants, rounded, within_reach
from dbpkern.ops._triton import jit, tl


@jit
def triangle_position(p):
    """Row and column, row >= column, of element number p of a lower triangle counted row by row."""
    row = ((tl.sqrt(8.0 * p.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root is rounded: at most one off.
    row = tl.where(row * (row + 1) // 2 > p, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= p, row + 1, row)
    return row, p - row * (row + 1) // 2


@jit
def gram_tile(
    z, i, j, N, D, z_n, z_d, SQUARES: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The fp32 tile [BLOCK, BLOCK] of `z^T z` at block (i, j), for `z [N, D]`.

    With SQUARES also the diagonals of `z^T z` at blocks i and j, [BLOCK] each; zeros without.
    """
    block = tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K)
    i_in = (i * BLOCK + block < D)[None, :]
    j_in = (j * BLOCK + block < D)[None, :]
    # The corners in 64 bits, the rest relative to them in 32.
    tile = k[:, None] * z_n + block[None, :] * z_d  # [BLOCK_K, BLOCK]
    z_i = z + (i * BLOCK).to(tl.int64) * z_d
    z_j = z + (j * BLOCK).to(tl.int64) * z_d
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    squares_i = tl.zeros((BLOCK_K, BLOCK), tl.float32)
    squares_j = tl.zeros((BLOCK_K, BLOCK), tl.float32)
    for start in range(0, N, BLOCK_K):
        k_in = (k < N - start)[:, None]
        # Loaded as the rows lie, transposed in registers.
        left = tl.load(z_i + tile, mask=k_in & i_in, other=0.0)
        right = tl.load(z_j + tile, mask=k_in & j_in, other=0.0)
        acc = dot(tl.trans(left), right, acc, OPERAND, PRECISION, EMULATE)
        if SQUARES:
            squares_i += left.to(tl.float32) * left.to(tl.float32)
            squares_j += right.to(tl.float32) * right.to(tl.float32)
        z_i += BLOCK_K * z_n
        z_j += BLOCK_K * z_n
    return acc, tl.sum(squares_i, axis=0), tl.sum(squares_j, axis=0)


@jit
def store_symmetric(tile, M, i, j, D, EMULATE: tl.constexpr, BLOCK: tl.constexpr):
    """Store the tile (i, j), i >= j, of the contiguous symmetric `M [D, D]` and its mirror image (j, i)."""
    block = tl.arange(0, BLOCK)
    r, c = block[:, None], block[None, :]
    tile = rounded(tile, M.dtype.element_ty, EMULATE)
    mirrored = tl.trans(tile)
    # A product of equal operands need not be symmetric in its last bits: on M's diagonal, too, the lower
    # triangle is mirrored.
    tile = tl.where((i == j) & (r < c), mirrored, tile)
    # The corner in 64 bits, the rest relative to it in 32.
    lower = M + (i * BLOCK).to(tl.int64) * D + j * BLOCK
    tl.store(lower + (r * D + c), tile, mask=(r < D - i * BLOCK) & (c < D - j * BLOCK))
    if i != j:
        upper = M + (j * BLOCK).to(tl.int64) * D + i * BLOCK
        tl.store(upper + (r * D + c), mirrored, mask=(r < D - j * BLOCK) & (c < D - i * BLOCK))


@jit
def gram_kernel(
    z, C, out, N, D, z_l, z_n, z_d, alpha, beta, ADD: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`out [L, D, D] = alpha z^T z + beta C`, C symmetric and taken in where ADD, for `z [L, N, D]`.

    A tile of the lower triangle on axis 0, a layer on axis 1.
    """
    layer = tl.program_id(1).to(tl.int64)
    i, j = triangle_position(tl.program_id(0))
    tile, _, _ = gram_tile(
        z + layer * z_l, i, j, N, D, z_n, z_d, False, OPERAND, PRECISION, EMULATE, BLOCK, BLOCK_K
    )
    tile *= alpha
    if ADD:
        block = tl.arange(0, BLOCK)
        r, c = block[:, None], block[None, :]
        lower = C + layer * D * D + (i * BLOCK).to(tl.int64) * D + j * BLOCK
        inside = (r < D - i * BLOCK) & (c < D - j * BLOCK)
        tile += beta * tl.load(lower + (r * D + c), mask=inside, other=0.0).to(tl.float32)
    store_symmetric(tile, out + layer * D * D, i, j, D, EMULATE, BLOCK)


def triton_gram(z: Tensor, C: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """`alpha z^T z + beta C` for `z [L, n, d]` and contiguous symmetric `C [L, d, d]`, in the dtype of z."""
    z = within_reach(z)
    L, n, d = z.shape
    operands = _dispatch.operands(z.dtype)
    tiles = _dispatch.tiles("correlation", operands.kind, d)
    blocks = cdiv(d, tiles.m)
    out = torch.empty(L, d, d, dtype=z.dtype, device=z.device)
    _triton.launch(
        gram_kernel,
        (blocks * (blocks + 1) // 2, L),
        {
            "z": z, "C": out if C is None else C, "out": out, "N": n, "D": d,
            "z_l": z.stride(0), "z_n": z.stride(1), "z_d": z.stride(2), "alpha": alpha, "beta": beta,
        },
        {
            "ADD": C is not None, **operand_constants(operands),
            "BLOCK": tiles.m, "BLOCK_K": tiles.k,
        },
        tiles.warps,
        tiles.stages,
    )  # fmt: skip
    return out


@jit
def correlation_kernel(
    z, M, a, row_sums, squares, N, D, z_l, z_n, z_d, scale, kappa, SCALE_FREE: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """M and a of `z [L, N, D]`: a tile of the lower triangle on axis 0, a layer on axis 1.

    For the bound it leaves `row_sums [L, D / BLOCK, D]`, absolute sums of M's rows over each block of
    columns, and `squares [L, tiles]`, sums of M's squares. Every number is written by one program: the sums
    have a fixed order.
    """
    p = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    i, j = triangle_position(p)
    G, a_i, a_j = gram_tile(
        z + layer * z_l, i, j, N, D, z_n, z_d, True, OPERAND, PRECISION, EMULATE, BLOCK, BLOCK_K
    )
    a_i, a_j = a_i * scale, a_j * scale
    r = i * BLOCK + tl.arange(0, BLOCK)
    c = j * BLOCK + tl.arange(0, BLOCK)
    on_diagonal = r[:, None] == c[None, :]
    tile = tl.where(on_diagonal, kappa * (a_i - 1.0)[:, None], ((1.0 - kappa) * scale) * G)
    if SCALE_FREE:
        unit = a_i[:, None] + a_j[None, :]
        tile = tl.where(unit > 0.0, tile / tl.where(unit > 0.0, unit, 1.0), 0.0)
    inside = (r < D)[:, None] & (c < D)[None, :]
    tile = tl.where(inside & (tl.abs(tile) < float("inf")), tile, 0.0)
    store_symmetric(tile, M + layer * D * D, i, j, D, EMULATE, BLOCK)

    row_sums += layer * tl.cdiv(D, BLOCK) * D
    size = tl.abs(tile)
    tl.store(row_sums + j * D + r, tl.sum(size, axis=1), mask=r < D)
    if i == j:
        tl.store(a + layer * D + c, a_j, mask=c < D)
    else:
        tl.store(row_sums + i * D + c, tl.sum(size, axis=0), mask=c < D)
    # A tile off the diagonal stands for two of the matrix.
    weight = tl.where(i == j, 1.0, 2.0)
    tl.store(squares + layer * tl.num_programs(0) + p, weight * tl.sum(tile * tile))


@jit
def bound_kernel(
    row_sums, squares, bound, D, BLOCKS, TILES, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`bound [L]` from `row_sums [L, BLOCKS, D]` and `squares [L, TILES]`; a layer is a program."""
    layer = tl.program_id(0).to(tl.int64)
    row_sums += layer * BLOCKS * D
    squares += layer * TILES
    r = tl.arange(0, ROWS)
    block = tl.arange(0, COLUMNS)
    largest = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, ROWS):
        inside = (block < BLOCKS)[:, None] & (start + r < D)[None, :]
        sums = tl.load(row_sums + block[:, None] * D + (start + r)[None, :], mask=inside, other=0.0)
        largest = tl.maximum(largest, tl.sum(sums, axis=0))
    p = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, TILES, BLOCK):
        total += tl.load(squares + start + p, mask=start + p < TILES, other=0.0)
    norm = tl.sqrt(tl.sum(total))
    tl.store(bound + layer, tl.minimum(norm, tl.max(largest)))


def triton_correlation(
    z: Tensor, kappa: float, scale_free: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """M, a and the bound by the Triton kernels."""
    z = within_reach(z)
    L, n, d = z.shape
    operands = _dispatch.operands(z.dtype)
    tiles = _dispatch.tiles("correlation", operands.kind, d)
    blocks = cdiv(d, tiles.m)
    count = blocks * (blocks + 1) // 2
    M = torch.empty(L, d, d, dtype=dtype, device=z.device)
    a, row_sums, squares, bound = (
        torch.empty(shape, dtype=torch.float32, device=z.device)
        for shape in ((L, d), (L, blocks, d), (L, count), (L,))
    )
    _triton.launch(
        correlation_kernel,
        (count, L),
        {
            "z": z, "M": M, "a": a, "row_sums": row_sums, "squares": squares, "N": n, "D": d,
            "z_l": z.stride(0), "z_n": z.stride(1), "z_d": z.stride(2), "scale": 1 / n, "kappa": kappa,
        },
        {
            "SCALE_FREE": scale_free, **operand_constants(operands),
            "BLOCK": tiles.m, "BLOCK_K": tiles.k,
        },
        tiles.warps,
        tiles.stages,
    )  # fmt: skip
    columns = 1 << (blocks - 1).bit_length()
    _triton.launch(
        bound_kernel,
        (L,),
        {
            "row_sums": row_sums, "squares": squares, "bound": bound,
            "D": d, "BLOCKS": blocks, "TILES": count,
        },
        {"COLUMNS": columns, "ROWS": max(1, 4096 // columns), "BLOCK": 256},
        4,
        2,
    )  # fmt: skip
    return M, a, bound


def _eager_correlation(
    z: Tensor, kappa: float, scale_free: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    n = z.shape[1]
    if z.is_cuda and z.itemsize == 2:
        G = product(z.mT, z).div_(n)
    else:
        z = z.to(accumulator_dtype(z.dtype))
        G = torch.bmm(z.mT, z).div_(n)
    # G becomes M in place: a second d x d matrix per layer would double the scratch.
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    a = diagonal.clone()
    if kappa:
        G.mul_(1 - kappa)
        diagonal.copy_(a - 1).mul_(kappa)
    else:
        diagonal.zero_()
    if scale_free:
        G.div_(a[:, :, None] + a[:, None, :])  # by zero, too: no number, see the next line
    G.nan_to_num_(0.0, 0.0, 0.0)
    norm = torch.linalg.vector_norm
    # Of the norms of the rows: one sum over a wide G loses digits on a CPU, which adds one after the other.
    bound = torch.minimum(norm(norm(G, dim=2), dim=1), norm(G, 1, dim=2).amax(1))
    return G.to(dtype), a, bound


@operator("correlation")
def _correlation(
    z: Tensor, kappa: float, scale_free: bool, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    L, n, d = z.shape
    refusal = _dispatch.triton_refusal(z.device, z.dtype)
    automatic = _dispatch.preferred("correlation", z.device, _dispatch.operands(z.dtype).kind)
    serves = _dispatch.choose("correlation", backend, {"triton": refusal}, automatic)
    if n == 0 or d == 0:
        sums = accumulator_dtype(z.dtype)
        return (
            z.new_zeros((L, d, d), dtype=dtype),
            z.new_zeros((L, d), dtype=sums),
            z.new_zeros((L,), dtype=sums),
        )
    if serves == "triton":
        return triton_correlation(z, kappa, scale_free, dtype)
    with autocast_off(z.device):
        return _eager_correlation(z, kappa, scale_free, dtype)


@_correlation.register_fake
def _(
    z: Tensor, kappa: float, scale_free: bool, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    L, _, d = z.shape
    sums = accumulator_dtype(z.dtype)
    return (
        z.new_empty((L, d, d), dtype=dtype),
        z.new_empty((L, d), dtype=sums),
        z.new_empty((L,), dtype=sums),
    )


@register_flop_formula(torch.ops.dbpkern.correlation)
def _flops(z_shape: Sequence[int], *args: object, **kwargs: object) -> int:
    L, n, d = z_shape
    return 2 * L * n * d**2


def correlation(
    z: Tensor,
    kappa: float = 0.0,
    scale_free: bool = False,
    dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of decorrelated samples, per layer, with `G = z^T z / n`, not centred.

    The rule is Eq. 4 of arXiv 2510.14657, its kappa term that of arXiv 2405.02385. The Triton kernels
    compute the lower triangle of tiles alone, over all layers in one launch, and reduce the bound in a
    second one; they are deterministic, and M is symmetric bit for bit.

    Args:
        z: `[L, n, d]`, the sampled rows of L layers. n = 0 gives zeros.
        kappa: weight in [0, 1] of the unit-variance term, 0 for pure decorrelation.
        scale_free: divide `M_ij` by `a_i + a_j`: a step of R then shrinks every correlation by the same
            factor, whatever the variances. Features without variance have zeros in M.
        dtype: of M: None for that of the sums, or bfloat16 for an M that is rounded once and then the
            operand of a 16-bit product, see `apply_`.
        backend: None for the automatic choice, "eager" or "triton".

    Returns:
        `M [L, d, d] = (1 - kappa) offdiag(G) + kappa (diag(G) - I)`, divided where `scale_free`, with zeros
        where that is not finite; `a [L, d] = diag(G)` as it is; and `bound [L]`, at least M's largest
        absolute eigenvalue: the smaller of its Frobenius norm and its largest absolute row sum. Sums, a and
        bound are fp32 (fp64 for fp64 samples).

    Raises:
        TypeError: z not a floating-point tensor, `dtype` neither that of the sums nor bfloat16.
        ValueError: z not of three dimensions, kappa outside [0, 1], a backend that cannot serve the call.
    """
    check_tensor("z", z, "[L, n, d]", (3,))
    check_kappa(kappa)
    sums = accumulator_dtype(z.dtype)
    if dtype not in (None, sums, torch.bfloat16):
        raise TypeError(f"dtype: expected None, {sums} or torch.bfloat16, got {dtype}")
    _dispatch.check_backend(backend)
    return torch.ops.dbpkern.correlation(z, float(kappa), scale_free, dtype or sums, backend or "")
