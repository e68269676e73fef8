"""`B`, `Y` and `c`: what the sampled rows say about a low-rank R."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dbpkern.ops import _dispatch, _triton
from dbpkern.ops._common import (
    accumulator_dtype,
    autocast_off,
    check_accumulator,
    check_same_device,
    check_tensor,
    operator,
    product,
)
from dbpkern.ops._dispatch import Operands, Tiles
from dbpkern.ops._matmul import (
    cdiv,
    dot,
    operand_constants,
    product_loop,
    rounded,
    within_reach,
)
from dbpkern.ops._triton import jit, tl

# What the CUDA kernel is built for.
RANKS = range(8, 257)
# The widest block of ranks that stays in registers.
MAX_RANK = 256


@jit
def project_kernel(
    x, Q, P, N, D, RANK, x_l, x_n, x_d,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`P [L, N, r] = x [L, N, D] @ Q [L, D, r]`: a block of rows on grid axis 0, a layer on axis 1."""
    row = tl.program_id(0) * BLOCK_M
    layer = tl.program_id(1).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    rank = tl.arange(0, BLOCK_R)
    m_in = (row + m < N)[:, None]
    r_in = (rank < RANK)[None, :]
    x += layer * x_l + row.to(tl.int64) * x_n
    acc = product_loop(
        x + (m[:, None] * x_n + k[None, :] * x_d),
        Q + layer * D * RANK + (k[:, None] * RANK + rank[None, :]),
        m_in, r_in, D, x_d, RANK, rank, False, OPERAND, PRECISION, EMULATE, EVEN_K, BLOCK_M, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    P += (layer * N + row) * RANK + (m[:, None] * RANK + rank[None, :])
    tl.store(P, rounded(acc, P.dtype.element_ty, EMULATE), mask=m_in & r_in)


@jit
def transposed_product(
    a, P, first, D, N, RANK, a_n, a_d,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`a^T P` for the BLOCK_D columns of `a [N, D]` from `first` on, and the sums of their squares."""
    d = tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    rank = tl.arange(0, BLOCK_R)
    d_in = (first + d < D)[None, :]
    r_in = (rank < RANK)[None, :]
    left = a + first.to(tl.int64) * a_d + (k[:, None] * a_n + d[None, :] * a_d)
    right = P + (k[:, None] * RANK + rank[None, :])
    acc = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    squares = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, N, BLOCK_K):
        k_in = (k < N - start)[:, None]
        columns = tl.load(left, mask=k_in & d_in, other=0.0)
        rows = tl.load(right, mask=k_in & r_in, other=0.0)
        wide = columns.to(tl.float32)
        squares += tl.sum(wide * wide, axis=0)
        # Loaded as the rows lie, transposed in registers.
        acc = dot(tl.trans(columns), rows, acc, OPERAND, PRECISION, EMULATE)
        left += BLOCK_K * a_n
        right += BLOCK_K * RANK
    return acc, squares


@jit
def moments_kernel(
    x, P, B, Y, c, N, D, RANK, x_l, x_n, x_d, scale, d_blocks,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Y and c for a block of features, or B for a block of ranks: on grid axis 0, a layer on axis 1.

    x is read once. Sums have a fixed order.
    """
    block = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    rank = tl.arange(0, BLOCK_R)
    r_in = (rank < RANK)[None, :]
    P += layer * N * RANK
    if block < d_blocks:
        first = block * BLOCK_D
        acc, squares = transposed_product(
            x + layer * x_l, P, first, D, N, RANK, x_n, x_d,
            OPERAND, PRECISION, EMULATE, BLOCK_D, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        inside = first + d < D
        tl.store(c + layer * D + first + d, squares * scale, mask=inside)
        y_tile = Y + (layer * D + first) * RANK + (d[:, None] * RANK + rank[None, :])
        tl.store(y_tile, acc * scale, mask=inside[:, None] & r_in)
    else:
        first = (block - d_blocks) * BLOCK_D
        acc, squares = transposed_product(
            P, P, first, RANK, N, RANK, RANK, 1,
            OPERAND, PRECISION, EMULATE, BLOCK_D, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        b_tile = B + (layer * RANK + first) * RANK + (d[:, None] * RANK + rank[None, :])
        tl.store(b_tile, acc * scale, mask=(first + d < RANK)[:, None] & r_in)


def rank_block(r: int) -> int:
    """The block that holds r ranks: tensor cores take no fewer than 16."""
    return max(16, 1 << (r - 1).bit_length())


def _operands(x: Tensor, Q: Tensor) -> tuple[Operands, Operands]:
    """The operands of `x Q`, and of the products with its result P."""
    kind = _dispatch.operands(x.dtype, Q.dtype)
    # P, a sum of d products, can leave the range of fp16. TF32 holds its digits, and x unchanged.
    return kind, Operands(torch.float32, "tf32") if kind.dtype == torch.float16 else kind


def _tiles(kind: Operands, d: int, r: int) -> Tiles:
    # The table goes by the rank, as an odd one where the width is no multiple of 16.
    return _dispatch.tiles("lowrank", kind.kind, r if d % 16 == 0 or r % 2 else r - 1)


def triton_statistics(x: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """B, Y and c by two launches; n > 0."""
    L, n, d = x.shape
    r = Q.shape[2]
    x, Q = within_reach(x), Q.contiguous()
    operands, p_operands = _operands(x, Q)
    P = torch.empty(L, n, r, dtype=p_operands.dtype, device=x.device)
    B, Y, c = (
        torch.empty(L, *shape, dtype=torch.float32, device=x.device) for shape in ((r, r), (d, r), (d,))
    )
    sizes = {"N": n, "D": d, "RANK": r, "x_l": x.stride(0), "x_n": x.stride(1), "x_d": x.stride(2)}
    tiles = _tiles(operands, d, r)
    _triton.launch(
        project_kernel,
        (cdiv(n, tiles.m), L),
        {"x": x, "Q": Q, "P": P, **sizes},
        {
            **operand_constants(operands), "EVEN_K": d % tiles.k == 0,
            "BLOCK_M": tiles.m, "BLOCK_K": tiles.k, "BLOCK_R": rank_block(r),
        },
        tiles.warps,
        tiles.stages,
    )  # fmt: skip
    tiles = _tiles(p_operands, d, r)
    d_blocks = cdiv(d, tiles.m)
    _triton.launch(
        moments_kernel,
        (d_blocks + cdiv(r, tiles.m), L),
        {"x": x, "P": P, "B": B, "Y": Y, "c": c, **sizes, "scale": 1 / n, "d_blocks": d_blocks},
        {
            **operand_constants(p_operands),
            "BLOCK_D": tiles.m, "BLOCK_K": tiles.k, "BLOCK_R": rank_block(r),
        },
        tiles.warps,
        tiles.stages,
    )  # fmt: skip
    return B, Y, c


def _cuda_refusal(x: Tensor, Q: Tensor) -> str | None:
    """Why the extension cannot serve the call, or None."""
    if x.device.type != "cuda":
        return f"it needs a CUDA device, got {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16) or Q.dtype != torch.float32:
        return f"it serves float32 and bfloat16 rows with float32 Q, got {x.dtype} and {Q.dtype}"
    _, d, r = Q.shape
    if r not in RANKS or r > d:
        return f"it serves ranks from {RANKS.start} to {RANKS.stop - 1} and at most d = {d}, got {r}"
    if _dispatch.capability(x.device) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    from dbpkern import extension  # here: it loads a library when it is first asked for one

    return extension.why() if extension.load() is None else None


def _triton_refusal(x: Tensor, Q: Tensor) -> str | None:
    """Why the Triton kernels cannot serve the call, or None."""
    r = Q.shape[2]
    if not 1 <= r <= MAX_RANK:
        return f"it serves ranks from 1 to {MAX_RANK}, got {r}"
    return _dispatch.triton_refusal(x.device, x.dtype, Q.dtype)


def _serves(x: Tensor, Q: Tensor, backend: str) -> str:
    """The backend that serves the call."""
    automatic = _dispatch.preferred("lowrank_statistics", x.device, _operands(x, Q)[0].kind)
    refusals = {"triton": _triton_refusal(x, Q), "cuda": None}
    if (backend or _dispatch.named_backend() or automatic) == "cuda":  # asking it loads it
        refusals["cuda"] = _cuda_refusal(x, Q)
    return _dispatch.choose("lowrank_statistics", backend, refusals, automatic)


def _multiplies_bfloat16(x: Tensor, Q: Tensor) -> bool:
    """Whether PyTorch multiplies the rows as they are, with fp32 sums and results.

    float16 rows do not count: P, a sum of d products, can leave their range.
    """
    return (
        x.dtype == torch.bfloat16
        and Q.dtype == torch.float32
        and x.device.type == "cuda"
        and torch.version.hip is None
        and _dispatch.capability(x.device) >= (8, 0)
    )


def _eager_statistics(x: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = x.shape[1]
    dtype = _result_dtype(x, Q)
    c = torch.linalg.vector_norm(x, dim=1, dtype=dtype).square_().div_(n)
    if _multiplies_bfloat16(x, Q):
        operand, bmm = torch.bfloat16, product
    else:
        operand, bmm = dtype, torch.bmm
    x = x.to(operand)
    P = bmm(x, Q.to(operand)).to(operand)
    return bmm(P.mT, P).div_(n), bmm(x.mT, P).div_(n), c


def _result_dtype(x: Tensor, Q: Tensor) -> torch.dtype:
    return torch.promote_types(accumulator_dtype(x.dtype), Q.dtype)


@operator("lowrank_statistics")
def _lowrank_statistics(x: Tensor, Q: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    backend = _serves(x, Q, backend)
    if x.numel() == 0:
        L, _, d = x.shape
        r = Q.shape[2]
        return tuple(x.new_zeros(L, *shape, dtype=_result_dtype(x, Q)) for shape in ((r, r), (d, r), (d,)))
    if backend == "cuda":
        from dbpkern import extension

        return extension.load().lowrank_statistics(x, Q)
    if backend == "triton":
        return triton_statistics(x, Q)
    with autocast_off(x.device):
        return _eager_statistics(x, Q)


@_lowrank_statistics.register_fake
def _(x: Tensor, Q: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    L, _, d = x.shape
    r = Q.shape[2]
    return tuple(x.new_empty(L, *shape, dtype=_result_dtype(x, Q)) for shape in ((r, r), (d, r), (d,)))


@register_flop_formula(torch.ops.dbpkern.lowrank_statistics)
def _flops(x_shape, Q_shape, *args, **kwargs) -> int:
    L, n, d = x_shape
    r = Q_shape[2]
    return L * (4 * n * d * r + 2 * n * r**2)


def lowrank_statistics(x: Tensor, Q: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of sampled rows for low-rank updates, per layer: with `P = x Q`, all that the step needs.

    The rows are those before R. Averages of the results, weighted by their numbers of rows, are the results
    of all rows together: micro-batches and processes combine exactly.

    Args:
        x: `[L, n, d]`, the sampled rows of L layers. n = 0 gives zeros.
        Q: `[L, d, r]`, fp32 or fp64.
        backend: "eager", "triton" (two launches, ranks up to 256), or "cuda", the extension (fp32 and bf16
            rows, ranks from 8 to 256) once `python -m dbpkern.extension` has built it; None chooses between
            the first two. On a GPU all round Q and P to bf16 where the rows are bf16; sums are fp32.
            Otherwise eager widens the rows.

    Returns:
        `B [L, r, r] = P^T P / n`, `Y [L, d, r] = x^T P / n` and `c [L, d]`, the mean squares of x, in fp32
        (fp64 where x or Q is fp64).

    Raises:
        TypeError: dtypes other than those above.
        ValueError: shapes or devices that do not fit, or a backend that cannot serve the call.
    """
    check_tensor("x", x, "[L, n, d]", (3,))
    check_tensor("Q", Q, "[L, d, r]", (3,))
    check_accumulator("Q", Q)
    if Q.shape[:2] != (x.shape[0], x.shape[2]):
        raise ValueError(
            f"Q: expected shape [L, d, r] with L = {x.shape[0]} and d = {x.shape[2]}, got {list(Q.shape)}"
        )
    check_same_device(x=x, Q=Q)
    _dispatch.check_backend(backend)
    return torch.ops.dbpkern.lowrank_statistics(x, Q, backend or "")
