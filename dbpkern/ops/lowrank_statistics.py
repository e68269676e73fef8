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
from dbpkern.ops._dispatch import Operands
from dbpkern.ops._matmul import (
    cdiv,
    dot,
    operand_constants,
    product_loop,
    rounded,
)
from dbpkern.ops._triton import jit, tl
from dbpkern.ops.lowrank_fold import multiplies_bfloat16

# What the CUDA kernel is built for.
RANKS = range(8, 257)
# The widest block of ranks that stays in registers.
MAX_RANK = 128


@jit
def project_kernel(
    x, Q, P, N, D, x_l, x_n,
    RANK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr, EVEN_K: tl.constexpr,
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
        x + (m[:, None] * x_n + k[None, :]),
        Q + layer * D * RANK + (k[:, None] * RANK + rank[None, :]),
        m_in, r_in, D, 1, RANK, rank, False, OPERAND, PRECISION, EMULATE, EVEN_K, BLOCK_M, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    P += (layer * N + row) * RANK + (m[:, None] * RANK + rank[None, :])
    tl.store(P, rounded(acc, P.dtype.element_ty, EMULATE), mask=m_in & r_in)


@jit
def moments(
    a, P, out, squares, first, D, N, a_n, scale,
    SQUARES: tl.constexpr, RANK: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`out = scale a^T P` for BLOCK_D columns of `a [N, D]` from `first` on; with SQUARES their mean squares."""
    d = first + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    rank = tl.arange(0, BLOCK_R)
    r_in = (rank < RANK)[None, :]
    left = a + (k[:, None] * a_n + d[None, :])
    right = P + (k[:, None] * RANK + rank[None, :])
    acc = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, N, BLOCK_K):
        k_in = (k < N - start)[:, None]
        columns = tl.load(left, mask=k_in & (d < D)[None, :], other=0.0)
        rows = tl.load(right, mask=k_in & r_in, other=0.0)
        if SQUARES:
            wide = columns.to(tl.float32)
            total += tl.sum(wide * wide, axis=0)
        # Loaded as the rows lie, transposed in registers.
        acc = dot(tl.trans(columns), rows, acc, OPERAND, PRECISION, EMULATE)
        left += BLOCK_K * a_n
        right += BLOCK_K * RANK
    tl.store(out + (d[:, None] * RANK + rank[None, :]), acc * scale, mask=(d < D)[:, None] & r_in)
    if SQUARES:
        tl.store(squares + d, total * scale, mask=d < D)


@jit
def moments_kernel(
    x, P, B, Y, c, N, D, x_l, x_n, scale, d_blocks,
    RANK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Y and c for a block of features, or B for a block of ranks: on grid axis 0, a layer on axis 1.

    x is read once. Sums have a fixed order.
    """
    block = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    P += layer * N * RANK
    if block < d_blocks:
        moments(
            x + layer * x_l, P, Y + layer * D * RANK, c + layer * D, block * BLOCK_D, D, N, x_n, scale,
            True, RANK, OPERAND, PRECISION, EMULATE, BLOCK_D, BLOCK_K, BLOCK_R,
        )  # fmt: skip
    else:
        moments(
            P, P, B + layer * RANK * RANK, c, (block - d_blocks) * BLOCK_D, RANK, N, RANK, scale,
            False, RANK, OPERAND, PRECISION, EMULATE, BLOCK_D, BLOCK_K, BLOCK_R,
        )  # fmt: skip


def rank_block(r: int) -> int:
    """The block that holds r ranks: tensor cores take no fewer than 16."""
    return max(16, 1 << (r - 1).bit_length())


def rank_refusal(r: int) -> str | None:
    """Why the kernels of low-rank steps cannot serve a rank, or None."""
    return (
        f"it serves ranks that are multiples of 8 up to {MAX_RANK}, got {r}"
        if r % 8 or not 0 < r <= MAX_RANK
        else None
    )


def _operands(x: Tensor, Q: Tensor) -> tuple[Operands, Operands]:
    """The operands of `x Q`, and of the products with its result P."""
    kind = _dispatch.operands(x.dtype, Q.dtype)
    # P, a sum of d products, can leave the range of fp16. TF32 holds its digits, and x unchanged.
    return kind, Operands(torch.float32, "tf32") if kind.dtype == torch.float16 else kind


def triton_statistics(x: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """B, Y and c by two launches; n > 0."""
    L, n, d = x.shape
    r = Q.shape[2]
    # A row in one piece, and rows within 32 bits of each other, where 16 bytes begin.
    if x.stride(2) != 1 or x.stride(0) % 16 or x.stride(1) % 16 or x.stride(1) >= 2**23:
        x = x.contiguous()
    Q = Q.contiguous()
    kinds = _operands(x, Q)
    P = torch.empty(L, n, r, dtype=kinds[1].dtype, device=x.device)
    B, Y, c = (
        torch.empty(L, *shape, dtype=torch.float32, device=x.device) for shape in ((r, r), (d, r), (d,))
    )
    strides = {"N": n, "D": d, "x_l": x.stride(0), "x_n": x.stride(1)}
    first, second = (_dispatch.tiles("lowrank", kind.kind, r) for kind in kinds)
    constants = {"RANK": r, "BLOCK_R": rank_block(r)}
    _triton.launch(
        project_kernel,
        (cdiv(n, first.m), L),
        {"x": x, "Q": Q, "P": P, **strides},
        {
            **operand_constants(kinds[0]), **constants,
            "EVEN_K": d % first.k == 0, "BLOCK_M": first.m, "BLOCK_K": first.k,
        },
        first.warps,
        first.stages,
    )  # fmt: skip
    d_blocks = cdiv(d, second.m)
    _triton.launch(
        moments_kernel,
        (d_blocks + cdiv(r, second.m), L),
        {"x": x, "P": P, "B": B, "Y": Y, "c": c, **strides, "scale": 1 / n, "d_blocks": d_blocks},
        {**operand_constants(kinds[1]), **constants, "BLOCK_D": second.m, "BLOCK_K": second.k},
        second.warps,
        second.stages,
    )
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
    from dbpkern import extension  # here: it builds or loads a library when it is first asked for one

    return extension.why() if extension.load() is None else None


def _triton_refusal(x: Tensor, Q: Tensor) -> str | None:
    """Why the Triton kernels cannot serve the call, or None."""
    d, r = Q.shape[1:]
    width = f"it serves widths that are multiples of 16, got {d}" if d % 16 else None
    return width or rank_refusal(r) or _dispatch.triton_refusal(x.device, x.dtype, Q.dtype)


def _serves(x: Tensor, Q: Tensor, backend: str) -> str:
    """The backend that serves the call."""
    automatic = _dispatch.preferred("lowrank_statistics", x.device, _operands(x, Q)[0].kind)
    refusals = {"triton": _triton_refusal(x, Q), "cuda": None}
    if (backend or _dispatch.named_backend() or automatic) == "cuda":  # asking it may build it
        refusals["cuda"] = _cuda_refusal(x, Q)
    return _dispatch.choose("lowrank_statistics", backend, refusals, automatic)


def _eager_statistics(x: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = x.shape[1]
    dtype = _result_dtype(x, Q)
    c = torch.linalg.vector_norm(x, dim=1, dtype=dtype).square_().div_(n)
    if multiplies_bfloat16(x.device, x.dtype, Q.dtype):
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
    """Statistics of sampled rows before R for low-rank updates, per layer: with `P = x Q`, all the step needs.

    Averages of the results, weighted by their numbers of rows, are the results of all rows together.

    Args:
        x: `[L, n, d]`, the sampled rows of L layers. n = 0 gives zeros.
        Q: `[L, d, r]`, fp32 or fp64.
        backend: "eager", "triton" (two launches, widths that are multiples of 16, ranks that are multiples of 8
            up to 128), or "cuda", the extension (fp32 and bf16 rows, ranks from 8 to 256), which is built
            when it is first asked for; None chooses between the first two. On a GPU all round Q and P to
            bf16 where the rows are bf16; sums are fp32. Otherwise eager widens the rows.

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
