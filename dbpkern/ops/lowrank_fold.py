"""`W + ((W Q) S) Q^T`: a weight folded with a low-rank R, and the kernel that `lowrank_transform` shares."""

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dbpkern.ops import _dispatch, _triton
from dbpkern.ops._common import (
    FLOATS,
    autocast_off,
    check_same_device,
    check_same_dtype,
    check_tensor,
    operator,
)
from dbpkern.ops._dispatch import Operands, check_backend
from dbpkern.ops._matmul import (
    cdiv,
    dot,
    dtype_name,
    operand_constants,
    product_loop,
    rounded,
    within_reach,
)
from dbpkern.ops._triton import jit, tl

# The widest block of ranks that stays in registers.
MAX_RANK = 256

# The precision is one setting for all threads, and each backward has a thread of its own for every GPU.
_precision_lock = threading.RLock()


@contextlib.contextmanager
def ieee_products(device: torch.device) -> Iterator[None]:
    """fp32 products within keep all their digits, whatever `torch.set_float32_matmul_precision` allows.

    State of the host alone: nothing waits for the device, and a captured graph keeps the precision.
    """
    # The newer of two interfaces: while its word differs from what `set_float32_matmul_precision` wrote, the
    # older getters raise, but products read this one, and within there is nothing else.
    setting = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul
    with _precision_lock:
        before = setting.fp32_precision
        if before in ("ieee", "none"):
            yield
            return
        setting.fp32_precision = "none"
        # A value that comes from `torch.backends.fp32_precision` has to follow it afterwards, too.
        restored = "none" if setting.fp32_precision == before else before
        setting.fp32_precision = "ieee"
        try:
            yield
        finally:
            setting.fp32_precision = restored


def check_factors(Q: object, S: object, d: int, layers: int | None = None) -> None:
    """Raise unless Q and S are the factors of an R of width `d`, of `layers` of them if given."""
    lead, dims = ("", (2,)) if layers is None else ("L, ", (3,))
    check_tensor("Q", Q, f"[{lead}d, r]", dims)
    check_tensor("S", S, f"[{lead}r, r]", dims)
    if Q.shape[-2] != d:
        raise ValueError(f"Q: expected shape [{lead}d, r] with d = {d}, got {list(Q.shape)}")
    r = Q.shape[-1]
    if S.shape[-2:] != (r, r):
        raise ValueError(f"S: expected shape [{lead}r, r] with r = {r}, got {list(S.shape)}")
    for name, factor in (("Q", Q), ("S", S)):
        if layers is not None and len(factor) != layers:
            raise ValueError(f"{name}: expected {layers} layers, got {len(factor)}")
    check_same_dtype(Q=Q, S=S)


def lowrank_flops(rows: int, d: int, r: int) -> int:
    """Operations of `A + ((A Q) S) Q^T` for A of that many rows."""
    return 4 * rows * d * r + 2 * rows * r**2


@jit
def lowrank_kernel(
    a, q, v, c, M, D, RANK, a_l, a_m, a_d, q_l, q_d, q_r, v_l, v_d, v_r, c_l, c_m,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
    T_OPERAND: tl.constexpr, T_PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`c [L, M, D] = a + (a q) v^T`, q and v `[L, D, RANK]`; BLOCK_M rows on grid axis 0, a layer on axis 1.

    The first pass over D gives `t = a q`, which stays in registers; the second finds a in L2.
    """
    layer = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rank = tl.arange(0, BLOCK_R)
    m_in = (row + m < M)[:, None]
    # The corner in 64 bits, the rest relative to it in 32.
    a += layer * a_l + row.to(tl.int64) * a_m
    q += layer * q_l
    t = product_loop(
        a + (m[:, None] * a_m + k[None, :] * a_d), q + (k[:, None] * q_d + rank[None, :] * q_r),
        m_in, (rank < RANK)[None, :], D, a_d, q_d, rank,
        False, OPERAND, PRECISION, EMULATE, EVEN_K, BLOCK_M, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    t = rounded(t, T_OPERAND, EMULATE)
    a_tile = a + (m[:, None] * a_m + n[None, :] * a_d)
    v_tile = v + layer * v_l + (rank[:, None] * v_r + n[None, :] * v_d)
    c_tile = c + layer * c_l + row.to(tl.int64) * c_m + (m[:, None] * c_m + n[None, :])
    rank_in = (rank < RANK)[:, None]
    for start in range(0, D, BLOCK_N):
        n_in = (n < D - start)[None, :]
        plain = tl.load(a_tile, mask=m_in & n_in, other=0.0).to(tl.float32)
        columns = tl.load(v_tile, mask=rank_in & n_in, other=0.0)
        total = dot(t, columns, plain, T_OPERAND, T_PRECISION, EMULATE)
        tl.store(c_tile, rounded(total, c.dtype.element_ty, EMULATE), mask=m_in & n_in)
        a_tile += BLOCK_N * a_d
        v_tile += BLOCK_N * v_d
        c_tile += BLOCK_N


def _tile_key(d: int, r: int) -> int:
    """What the table of tiles goes by: the rank, as an odd one where the width is no multiple of 16."""
    return r if d % 16 == 0 or r % 2 else r - 1


def _operands(A: Tensor, Q: Tensor, out_dtype: torch.dtype) -> tuple[Operands, Operands]:
    """The operands of the first and of the second product."""
    kind = _dispatch.operands(A.dtype, Q.dtype, out=out_dtype)
    # A sum of d products can leave the range of fp16, where each of its terms is inside.
    return kind, Operands(torch.float32, "tf32") if kind.dtype == torch.float16 else kind


def triton_lowrank(A: Tensor, Q: Tensor, S: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`A + ((A Q) S) Q^T` by the kernel, for stacks `[L, M, d], [L, d, r], [L, r, r]`."""
    L, M, d = A.shape
    r = Q.shape[2]
    kind, t_kind = _operands(A, Q, out_dtype)
    # S joins the right factor: as an operand of its own it would not fit into shared memory at large ranks,
    # and A has more rows than Q as a rule.
    A, Q = within_reach(A), Q.float().contiguous()  # a tile has up to 256 of Q's columns
    with ieee_products(A.device):
        V = torch.bmm(Q, S.float().mT)
    out = torch.empty(L, M, d, dtype=out_dtype, device=A.device)
    blocks = _dispatch.tiles("lowrank", t_kind.kind, _tile_key(d, r))
    _triton.launch(
        lowrank_kernel,
        (cdiv(M, blocks.m), L),
        {
            "a": A, "q": Q, "v": V, "c": out, "M": M, "D": d, "RANK": r,
            "a_l": A.stride(0), "a_m": A.stride(1), "a_d": A.stride(2),
            "q_l": Q.stride(0), "q_d": Q.stride(1), "q_r": Q.stride(2),
            "v_l": V.stride(0), "v_d": V.stride(1), "v_r": V.stride(2),
            "c_l": out.stride(0), "c_m": out.stride(1),
        },
        {
            **operand_constants(kind),
            "T_OPERAND": dtype_name(t_kind.dtype), "T_PRECISION": t_kind.precision,
            "EVEN_K": d % blocks.k == 0,
            "BLOCK_M": blocks.m, "BLOCK_N": blocks.n, "BLOCK_K": blocks.k,
            "BLOCK_R": max(16, 1 << (r - 1).bit_length()),
        },
        blocks.warps,
        blocks.stages,
    )  # fmt: skip
    return out


def add_lowrank(op: str, A: Tensor, Q: Tensor, S: Tensor, out_dtype: torch.dtype, backend: str) -> Tensor:
    """`A + ((A Q) S) Q^T` for stacks `[L, M, d], [L, d, r], [L, r, r]`, rounded once to `out_dtype`."""
    r = Q.shape[2]
    refusal = _dispatch.triton_refusal(A.device, A.dtype, Q.dtype, out_dtype)
    if not 1 <= r <= MAX_RANK:
        refusal = refusal or f"it serves ranks from 1 to {MAX_RANK}, got {r}"
    automatic = _dispatch.preferred(op, A.device, _operands(A, Q, out_dtype)[1].kind)
    backend = _dispatch.choose(op, backend, {"triton": refusal}, automatic)
    with autocast_off(A.device):
        if backend == "triton":
            return triton_lowrank(A, Q, S, out_dtype)
        compute = torch.promote_types(A.dtype, Q.dtype)
        A, Q, S = A.to(compute), Q.to(compute), S.to(compute)
        return torch.baddbmm(A, torch.bmm(torch.bmm(A, Q), S), Q.mT).to(out_dtype)


@operator("lowrank_fold")
def _lowrank_fold(W: Tensor, Q: Tensor, S: Tensor, out_dtype: torch.dtype, backend: str) -> Tensor:
    if W.dim() == 3:
        return add_lowrank("lowrank_fold", W, Q, S, out_dtype, backend)
    return add_lowrank("lowrank_fold", W[None], Q[None], S[None], out_dtype, backend)[0]


@_lowrank_fold.register_fake
def _(W: Tensor, Q: Tensor, S: Tensor, out_dtype: torch.dtype, backend: str) -> Tensor:
    return torch.empty_like(W, dtype=out_dtype, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output) -> None:
    W, Q, S, _, ctx.backend = inputs
    ctx.save_for_backward(Q, S)
    ctx.dtype = W.dtype


def _backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    Q, S = ctx.saved_tensors
    # dW = dW~ R^T = dW~ (I + Q S^T Q^T), so one op serves both directions.
    return torch.ops.dbpkern.lowrank_fold(grad, Q, S.mT, ctx.dtype, ctx.backend), None, None, None, None


_lowrank_fold.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.dbpkern.lowrank_fold)
def _flops(W_shape, Q_shape, *args, **kwargs) -> int:
    layers = W_shape[0] if len(W_shape) == 3 else 1
    return lowrank_flops(layers * W_shape[-2], *Q_shape[-2:])


def lowrank_fold(
    W: Tensor, Q: Tensor, S: Tensor, out_dtype: torch.dtype | None = None, *, backend: str | None = None
) -> Tensor:
    """Fold a low-rank R into a weight: `W~ = W R = W + ((W Q) S) Q^T` with `R = I + Q S Q^T`.

    Costs `4 o d r + 2 o r^2` and forms no `d x d` matrix. With S = 0 the result is W, bit for bit.

    Args:
        W: `[o, d]` or `[L, o, d]`, any floating-point dtype.
        Q: `[d, r]` or `[L, d, r]`, orthonormal columns as a rule; gets no gradient.
        S: `[r, r]` or `[L, r, r]`, of the dtype of Q; gets no gradient.
        out_dtype: dtype of the result, by default that of W; the sum is rounded to it once.
        backend: "eager" or "triton"; None chooses.

    Returns:
        `[(L,) o, d]`, differentiable in W (`dW = dW~ R^T`, the same with `S^T`).

    Raises:
        TypeError: not floating-point tensors, Q and S of unequal dtypes, or `out_dtype` not a floating-point
            dtype.
        ValueError: shapes or devices that do not fit, or a backend that cannot serve the call.
    """
    check_tensor("W", W, "[o, d] or [L, o, d]", (2, 3))
    check_factors(Q, S, W.shape[-1], len(W) if W.dim() == 3 else None)
    check_same_device(W=W, Q=Q, S=S)
    if out_dtype is None:
        out_dtype = W.dtype
    elif out_dtype not in FLOATS:
        raise TypeError(f"out_dtype: expected float16, bfloat16, float32 or float64, got {out_dtype}")
    check_backend(backend)
    return torch.ops.dbpkern.lowrank_fold(W, Q, S, out_dtype, backend or "")
