"""`M` and the column mean squares: what the sampled rows say about R."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dbpkern.ops import _dispatch, _triton
from dbpkern.ops._common import accumulator_dtype, autocast_off, check_kappa, check_tensor, operator
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
    z, i, j, N, D, z_n, z_d,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The fp32 tile [BLOCK, BLOCK] of `z^T z` at block (i, j), for `z [N, D]`."""
    block = tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K)
    i_in = (i * BLOCK + block < D)[None, :]
    j_in = (j * BLOCK + block < D)[None, :]
    rows = z + k[:, None] * z_n
    z_i = rows + (i * BLOCK).to(tl.int64) * z_d + block[None, :] * z_d  # [BLOCK_K, BLOCK]
    z_j = rows + (j * BLOCK).to(tl.int64) * z_d + block[None, :] * z_d
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, N, BLOCK_K):
        k_in = (k < N - start)[:, None]
        # Loaded as the rows lie, transposed in registers.
        left = tl.trans(tl.load(z_i, mask=k_in & i_in, other=0.0))
        right = tl.load(z_j, mask=k_in & j_in, other=0.0)
        acc = dot(left, right, acc, OPERAND, PRECISION, EMULATE)
        z_i += BLOCK_K * z_n
        z_j += BLOCK_K * z_n
    return acc


@jit
def store_symmetric(G, M, i, j, D, m_r, kappa, EMULATE: tl.constexpr, BLOCK: tl.constexpr):
    """Store M's tile (i, j) made from the second moments G [BLOCK, BLOCK], and its mirror image (j, i).

    Returns M's off-diagonal part of G, the diagonal of G [BLOCK], and where the diagonal lies in the tile.
    """
    r = i * BLOCK + tl.arange(0, BLOCK)
    c = j * BLOCK + tl.arange(0, BLOCK)
    on_diagonal = r[:, None] == c[None, :]
    off = tl.where(on_diagonal, 0.0, G)
    tile = rounded(tl.where(on_diagonal, kappa * (G - 1.0), (1.0 - kappa) * G), M.dtype.element_ty, EMULATE)
    inside = (r < D)[:, None] & (c < D)[None, :]
    tl.store(M + r.to(tl.int64)[:, None] * m_r + c[None, :], tile, mask=inside)
    if i != j:
        tl.store(M + c.to(tl.int64)[:, None] * m_r + r[None, :], tl.trans(tile), mask=tl.trans(inside))
    return off, tl.sum(tl.where(on_diagonal, G, 0.0), axis=0)


@jit
def correlation_kernel(
    z, M, a, losses, N, D, z_l, z_n, z_d, scale, kappa,
    LOSS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """M, a and partial losses of `z [L, N, D]`: a tile of the lower triangle on axis 0, a layer on axis 1.

    Every column meets its partners once: z is read in one pass, M is symmetric by construction, and sums
    have a fixed order.
    """
    p = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    i, j = triangle_position(p)
    G = gram_tile(z + layer * z_l, i, j, N, D, z_n, z_d, OPERAND, PRECISION, EMULATE, BLOCK, BLOCK_K)
    G = G * scale
    off, diagonal = store_symmetric(G, M + layer * D * D, i, j, D, D, kappa, EMULATE, BLOCK)
    c = j * BLOCK + tl.arange(0, BLOCK)
    if i == j:
        tl.store(a + layer * D + c, diagonal, mask=c < D)
    if LOSS:
        # A tile off the diagonal stands for two of the matrix.
        weight = tl.where(i == j, 1.0, 2.0) * (1.0 - kappa)
        loss = weight * tl.sum(off * off)
        variance = tl.where((c < D) & (i == j), diagonal - 1.0, 0.0)
        loss += kappa * tl.sum(variance * variance)
        tl.store(losses + layer * tl.num_programs(0) + p, loss)


def triton_correlation(z: Tensor, kappa: float, loss: bool) -> tuple[Tensor, Tensor, Tensor]:
    """M, a and the losses (none unless asked for) by the Triton kernel."""
    z = within_reach(z)
    L, n, d = z.shape
    operands = _dispatch.operands(z.dtype)
    tiles = _dispatch.tiles("correlation", operands.kind, d)
    steps = cdiv(d, tiles.m)
    grid = (steps * (steps + 1) // 2, L)
    M = torch.empty(L, d, d, dtype=torch.float32, device=z.device)
    a = torch.empty(L, d, dtype=torch.float32, device=z.device)
    losses = torch.empty(L, grid[0] if loss else 0, dtype=torch.float32, device=z.device)
    _triton.launch(
        correlation_kernel,
        grid,
        {
            "z": z, "M": M, "a": a, "losses": losses, "N": n, "D": d,
            "z_l": z.stride(0), "z_n": z.stride(1), "z_d": z.stride(2), "scale": 1 / n, "kappa": kappa,
        },
        {
            "LOSS": loss, **operand_constants(operands),
            "BLOCK": tiles.m, "BLOCK_K": tiles.k,
        },
        tiles.warps,
        tiles.stages,
    )  # fmt: skip
    return M, a, losses.sum(1).div_(d * d) if loss else losses.flatten()


def _eager_correlation(z: Tensor, kappa: float, loss: bool) -> tuple[Tensor, Tensor, Tensor]:
    _, n, d = z.shape
    z = z.to(accumulator_dtype(z.dtype))
    G = torch.bmm(z.mT, z).div_(n)
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    a = diagonal.clone()
    # G becomes M in place: a second d x d matrix per layer would double the scratch.
    diagonal.zero_()
    losses = G.new_empty(0)
    if loss:
        off = torch.linalg.vector_norm(G, dim=(1, 2)).square()
        losses = ((1 - kappa) * off + kappa * (a - 1).square().sum(1)) / d**2
    if kappa:
        G.mul_(1 - kappa)
        diagonal.copy_(a - 1).mul_(kappa)
    return G, a, losses


@operator("correlation")
def _correlation(z: Tensor, kappa: float, loss: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    L, n, d = z.shape
    refusal = _dispatch.triton_refusal(z.device, z.dtype)
    automatic = _dispatch.preferred("correlation", z.device, _dispatch.operands(z.dtype).kind)
    serves = _dispatch.choose("correlation", backend, {"triton": refusal}, automatic)
    if n == 0 or d == 0:
        dtype = accumulator_dtype(z.dtype)
        shapes = ((L, d, d), (L, d), (L if loss else 0,))
        return tuple(z.new_zeros(shape, dtype=dtype) for shape in shapes)
    if serves == "triton":
        return triton_correlation(z, kappa, loss)
    with autocast_off(z.device):
        return _eager_correlation(z, kappa, loss)


@_correlation.register_fake
def _(z: Tensor, kappa: float, loss: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    L, _, d = z.shape
    dtype = accumulator_dtype(z.dtype)
    shapes = ((L, d, d), (L, d), (L if loss else 0,))
    return tuple(z.new_empty(shape, dtype=dtype) for shape in shapes)


@register_flop_formula(torch.ops.dbpkern.correlation)
def _flops(z_shape, *args, **kwargs) -> int:
    L, n, d = z_shape
    return 2 * L * n * d**2


def correlation(
    z: Tensor, kappa: float = 0.0, loss: bool = False, *, backend: str | None = None
) -> tuple[Tensor, ...]:
    """Statistics of decorrelated samples, per layer: `G = z^T z / n`, not centred.

    The Triton kernel computes the lower triangle of tiles alone, over all layers in one launch, and reads z
    once; it is deterministic. It takes about half the operations of a full product, and pays where the stack
    fills the device: a single layer some hundred features wide does not.

    Args:
        z: `[L, n, d]`, the sampled rows of L layers. n = 0 gives zeros.
        kappa: weight in [0, 1] of the unit-variance term (arXiv 2405.02385), 0 for pure decorrelation.
        loss: whether to return the decorrelation loss, too.
        backend: None for the automatic choice, "eager" or "triton".

    Returns:
        `M [L, d, d] = (1 - kappa) offdiag(G) + kappa (diag(G) - I)` and `a [L, d] = diag(G)`, both in
        fp32 (fp64 for fp64 samples). With `loss`, also `[L]`:
        `((1 - kappa) ||offdiag G||_F^2 + kappa ||diag G - 1||^2) / d^2`.

    Raises:
        TypeError: z not a floating-point tensor.
        ValueError: z not of three dimensions, kappa outside [0, 1], a backend that cannot serve the call.
    """
    check_tensor("z", z, "[L, n, d]", (3,))
    check_kappa(kappa)
    _dispatch.check_backend(backend)
    M, a, losses = torch.ops.dbpkern.correlation(z, float(kappa), loss, backend or "")
    return (M, a, losses) if loss else (M, a)
