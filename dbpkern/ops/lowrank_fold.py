"""`W + ((W Q) S) Q^T`: a weight folded with a low-rank R, and what `lowrank_transform` shares."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dbpkern.ops import _dispatch
from dbpkern.ops._common import (
    FLOATS,
    autocast_off,
    check_same_device,
    check_same_dtype,
    check_tensor,
    operator,
    product,
)
from dbpkern.ops._dispatch import check_backend

# The precision is one setting for all threads, and each backward has a thread of its own for every GPU.
_precision_lock = threading.RLock()


@contextlib.contextmanager
def ieee_products(device: torch.device) -> Iterator[None]:
    """fp32 products within keep all their digits, whatever `torch.set_float32_matmul_precision` allows.

    State of the host alone: nothing waits for the device, and a captured graph keeps the precision.
    """
    # The newer of two interfaces: while its word differs from what `set_float32_matmul_precision` wrote, the
    # older getters raise, but products read this one, and within there is nothing else.
    mkldnn: Any = torch.backends.mkldnn  # its attributes are those of a class that torch puts in its place
    setting = torch.backends.cuda.matmul if device.type == "cuda" else mkldnn.matmul
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


def check_factors(Q: Tensor, S: Tensor, d: int, layers: int | None = None) -> None:
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


def multiplies_bfloat16(device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether PyTorch multiplies such operands as bfloat16, with fp32 sums and results.

    float16 does not count: sums of d products, which are operands again, can leave its range.
    """
    return (
        torch.bfloat16 in dtypes
        and {*dtypes} <= {torch.bfloat16, torch.float32}
        and device.type == "cuda"
        and torch.version.hip is None
        and _dispatch.capability(device) >= (8, 0)
    )


def add_lowrank(op: str, A: Tensor, Q: Tensor, S: Tensor, out_dtype: torch.dtype, backend: str) -> Tensor:
    """`A + ((A Q) S) Q^T` for stacks `[L, M, d], [L, d, r], [L, r, r]`, rounded once to `out_dtype`."""
    _dispatch.choose(op, backend, {})
    with autocast_off(A.device):
        if multiplies_bfloat16(A.device, A.dtype, Q.dtype, out_dtype):
            with ieee_products(A.device):
                V = torch.bmm(Q, S.mT)  # S joins the right factor: one rounding less
            T = product(A.bfloat16(), Q.bfloat16())
            return torch.add(product(T.bfloat16(), V.mT.bfloat16()), A).to(out_dtype)
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


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    W, Q, S, _, ctx.backend = inputs
    ctx.save_for_backward(Q, S)
    ctx.dtype = W.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    Q, S = ctx.saved_tensors
    # dW = dW~ R^T = dW~ (I + Q S^T Q^T), so one op serves both directions.
    return torch.ops.dbpkern.lowrank_fold(grad, Q, S.mT, ctx.dtype, ctx.backend), None, None, None, None


_lowrank_fold.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.dbpkern.lowrank_fold)
def _flops(W_shape: Sequence[int], Q_shape: Sequence[int], *args: object, **kwargs: object) -> int:
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
        backend: "eager", or None for the same. On a GPU the operands are bf16 where W or the result is.

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
