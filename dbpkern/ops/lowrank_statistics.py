"""`B`, `Y` and `c`: what the sampled rows say about a low-rank R."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dbpkern.ops import _common, _dispatch, _triton
from dbpkern.ops._common import product
from dbpkern.ops._dispatch import Operands
from dbpkern.ops._matmul import cdiv, dot, operand_constants, product_loop, rounded
from dbpkern.ops._triton import jit, tl
from dbpkern.ops.lowrank_fold import multiplies_bfloat16

# What the CUDA kernel is built for.
RANKS = range(8, 257)
# The widest block of ranks that stays in registers.
MAX_RANK = 128


@jit
def project_kernel(
    x, Q, P, N, D, x_l, x_n, EVEN_K: tl.constexpr, RANK: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`P [L, N, r] = x [L, N, D] @ Q [L, D, r]`: a block of rows on grid axis 0, a layer on axis 1."""
    row = tl.program_id(0) * BLOCK_M
    layer = tl.program_id(1).to(tl.int64)
    m, k, rank = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    m_in = row + m < N
    r_in = (rank < RANK)[None, :]
    x += layer * x_l + row.to(tl.int64) * x_n + (m * x_n + k[None, :])
    Q += layer * D * RANK + (k[:, None] * RANK + rank[None, :])
    acc = product_loop(
        x, Q, m_in, r_in, D, 1, RANK, rank,
        False, OPERAND, PRECISION, EMULATE, EVEN_K, BLOCK_M, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    P += (layer * N + row) * RANK + (m * RANK + rank[None, :])
    tl.store(P, rounded(acc, P.dtype.element_ty, EMULATE), mask=m_in & r_in)


@jit
def moments(
    a, P, out, squares, first, D, N, a_n, SQUARES: tl.constexpr, RANK: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`out = a^T P / N` for BLOCK_D columns of `a [N, D]` from `first` on, and with SQUARES c."""
    d = first + tl.arange(0, BLOCK_D)
    k, rank = tl.arange(0, BLOCK_K)[:, None], tl.arange(0, BLOCK_R)[None, :]
    a += k * a_n + d[None, :]
    P += k * RANK + rank
    acc = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, N, BLOCK_K):
        columns = tl.load(a, mask=(k < N - start) & (d < D)[None, :], other=0.0)
        rows = tl.load(P, mask=(k < N - start) & (rank < RANK), other=0.0)
        if SQUARES:
            total += tl.sum(columns.to(tl.float32) * columns.to(tl.float32), axis=0)
        # Loaded as the rows lie, transposed in registers.
        acc = dot(tl.trans(columns), rows, acc, OPERAND, PRECISION, EMULATE)
        a += BLOCK_K * a_n
        P += BLOCK_K * RANK
    tl.store(out + (d[:, None] * RANK + rank), acc * (1.0 / N), mask=(d < D)[:, None] & (rank < RANK))
    if SQUARES:
        tl.store(squares + d, total * (1.0 / N), mask=d < D)


@jit
def moments_kernel(
    x, P, B, Y, c, N, D, x_l, x_n, d_blocks, RANK: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
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
            x + layer * x_l, P, Y + layer * D * RANK, c + layer * D, block * BLOCK_D, D, N, x_n,
            True, RANK, OPERAND, PRECISION, EMULATE, BLOCK_D, BLOCK_K, BLOCK_R,
        )  # fmt: skip
    else:
        moments(
            P, P, B + layer * RANK * RANK, c, (block - d_blocks) * BLOCK_D, RANK, N, RANK,
            False, RANK, OPERAND, PRECISION, EMULATE, BLOCK_D, BLOCK_K, BLOCK_R,
        )  # fmt: skip


def rank_block(r: int) -> int:
    """The block that holds r ranks: tensor cores take no fewer than 16."""
    return max(16, 1 << (r - 1).bit_length())


def rank_refusal(r: int) -> str | None:
    """Why the kernels of low-rank steps cannot serve a rank, or None."""
    fits = 0 < r <= MAX_RANK and r % 8 == 0
    return None if fits else f"it serves ranks that are multiples of 8 up to {MAX_RANK}, got {r}"


def triton_statistics(x: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """B, Y and c by two launches; n > 0."""
    L, n, d = x.shape
    r = Q.shape[2]
    # A row in one piece, and rows within 32 bits of each other, where 16 bytes begin.
    if x.stride(2) != 1 or x.stride(0) % 16 or x.stride(1) % 16 or x.stride(1) >= 2**23:
        x = x.contiguous()
    kind = _dispatch.operands(x.dtype, Q.dtype)
    # P, a sum of d products, can leave the range of fp16. TF32 holds its digits, and x unchanged.
    p_kind = Operands(torch.float32, "tf32") if kind.dtype == torch.float16 else kind
    P = torch.empty(L, n, r, dtype=p_kind.dtype, device=x.device)
    B, Y, c = _results(x.new_empty, x, Q)
    args = {"x": x, "P": P, "N": n, "D": d, "x_l": x.stride(0), "x_n": x.stride(1)}
    first, second = (_dispatch.tiles("lowrank", k.kind, r) for k in (kind, p_kind))
    constants = {"RANK": r, "BLOCK_R": rank_block(r)}
    even = {"EVEN_K": d % first.k == 0, "BLOCK_M": first.m, "BLOCK_K": first.k}
    _triton.launch(
        project_kernel, (cdiv(n, first.m), L), args | {"Q": Q.contiguous()},
        operand_constants(kind) | constants | even, first.warps, first.stages,
    )  # fmt: skip
    blocks = cdiv(d, second.m)
    _triton.launch(
        moments_kernel, (blocks + cdiv(r, second.m), L), args | {"B": B, "Y": Y, "c": c, "d_blocks": blocks},
        operand_constants(p_kind) | constants | {"BLOCK_D": second.m, "BLOCK_K": second.k},
        second.warps, second.stages,
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
    d, r = Q.shape[1:]
    width = f"it serves widths that are multiples of 16, got {d}" if d % 16 else None
    return width or rank_refusal(r) or _dispatch.triton_refusal(x.device, x.dtype, Q.dtype)


def _eager_statistics(x: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, dtype = x.shape[1], _result_dtype(x, Q)
    c = x.to(dtype).square().sum(1).div_(n)
    halves = multiplies_bfloat16(x.device, x.dtype, Q.dtype)
    operand, bmm = (torch.bfloat16, product) if halves else (dtype, torch.bmm)
    x = x.to(operand)
    P = bmm(x, Q.to(operand)).to(operand)
    return bmm(P.mT, P).div_(n), bmm(x.mT, P).div_(n), c


def _result_dtype(x: Tensor, Q: Tensor) -> torch.dtype:
    return torch.promote_types(_common.accumulator_dtype(x.dtype), Q.dtype)


def _results(make: Callable[..., Tensor], x: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """B, Y and c, made by `x.new_empty` or `x.new_zeros`."""
    (L, d, r), dtype = Q.shape, _result_dtype(x, Q)
    return make(L, r, r, dtype=dtype), make(L, d, r, dtype=dtype), make(L, d, dtype=dtype)


@_common.operator("lowrank_statistics")
def _lowrank_statistics(x: Tensor, Q: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    kind = _dispatch.operands(x.dtype, Q.dtype).kind
    automatic = _dispatch.preferred("lowrank_statistics", x.device, kind)
    refusals = {"triton": _triton_refusal(x, Q), "cuda": None}
    if (backend or _dispatch.named_backend() or automatic) == "cuda":  # asking it loads it
        refusals["cuda"] = _cuda_refusal(x, Q)
    backend = _dispatch.choose("lowrank_statistics", backend, refusals, automatic)
    if x.numel() == 0:
        return _results(x.new_zeros, x, Q)
    if backend == "cuda":
        from dbpkern import extension

        operators = extension.load()
        assert operators is not None  # or it had refused the call
        return operators.lowrank_statistics(x, Q)
    if backend == "triton":
        return triton_statistics(x, Q)
    with _common.autocast_off(x.device):
        return _eager_statistics(x, Q)


_lowrank_statistics.register_fake(lambda x, Q, backend: _results(x.new_empty, x, Q))


@register_flop_formula(torch.ops.dbpkern.lowrank_statistics)
def _flops(x_shape: Sequence[int], Q_shape: Sequence[int], *args: object, **kwargs: object) -> int:
    L, n, d = x_shape
    r = Q_shape[2]
    return L * (4 * n * d * r + 2 * n * r**2)


def lowrank_statistics(x: Tensor, Q: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of rows before R, `x [L, n, d]`, for low-rank steps, per layer: `P = x Q`, `Q [L, d, r]`.

    Averages of the results, weighted by their numbers of rows, are the results of all rows together.

    Args:
        x: any floating-point dtype. n = 0 gives zeros.
        Q: fp32 or fp64.
        backend: "eager"; "triton", two launches, for widths that are multiples of 16 and ranks of 8 up to
            128; or "cuda", the extension, once `python -m dbpkern.extension` has built it: fp32 and bf16
            rows, ranks from 8 to 256. None chooses between the first two. bf16 rows have bf16 operands on a
            GPU, and sums in fp32.

    Returns:
        `B [L, r, r] = P^T P / n`, `Y [L, d, r] = x^T P / n` and `c [L, d]`, the mean squares of x, in fp32
        (fp64 where x or Q is fp64).

    Raises:
        TypeError: dtypes other than those above.
        ValueError: shapes or devices that do not fit, or a backend that cannot serve the call.
    """
    _common.check_tensor("x", x, "[L, n, d]", (3,))
    _common.check_tensor("Q", Q, "[L, d, r]", (3,))
    _common.check_accumulator("Q", Q)
    L, _, d = x.shape
    if Q.shape[:2] != (L, d):
        raise ValueError(f"Q: expected shape [L, d, r] with L = {L} and d = {d}, got {list(Q.shape)}")
    _common.check_same_device(x=x, Q=Q)
    _dispatch.check_backend(backend)
    return torch.ops.dbpkern.lowrank_statistics(x, Q, backend or "")
