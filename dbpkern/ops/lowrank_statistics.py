"""`B`, `Y` and `c`: what the sampled rows say about a low-rank R."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dbpkern.ops._common import (
    accumulator_dtype,
    autocast_off,
    check_accumulator,
    check_same_device,
    check_tensor,
    operator,
)
from dbpkern.ops._dispatch import check_backend, choose, named_backend

# What the CUDA kernel is built for.
RANKS = range(8, 257)


def _cuda_refusal(x: Tensor, Q: Tensor) -> str | None:
    """Why the extension cannot serve the call, or None."""
    if x.device.type != "cuda":
        return f"it needs a CUDA device, got {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16) or Q.dtype != torch.float32:
        return f"it serves float32 and bfloat16 rows with float32 Q, got {x.dtype} and {Q.dtype}"
    _, d, r = Q.shape
    if r not in RANKS or r > d:
        return f"it serves ranks from {RANKS.start} to {RANKS.stop - 1} and at most d = {d}, got {r}"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    from dbpkern import extension  # here: it builds or loads a library when it is first asked for one

    return extension.why() if extension.load() is None else None


def _multiplies_bfloat16(x: Tensor, Q: Tensor) -> bool:
    """Whether PyTorch multiplies the rows as they are, with fp32 sums and results.

    float16 rows do not count: P, a sum of d products, can leave their range.
    """
    return (
        x.dtype == torch.bfloat16
        and Q.dtype == torch.float32
        and x.device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


def _half_bmm(a: Tensor, b: Tensor) -> Tensor:
    """`torch.bmm` of bf16 stacks, rounded to fp32 alone."""
    return torch.bmm(a, b, out_dtype=torch.float32)


def _result_dtype(x: Tensor, Q: Tensor) -> torch.dtype:
    return torch.promote_types(accumulator_dtype(x.dtype), Q.dtype)


@operator("lowrank_statistics")
def _lowrank_statistics(x: Tensor, Q: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    L, n, d = x.shape
    r = Q.shape[2]
    dtype = _result_dtype(x, Q)
    # Asking whether the extension can serve may build it.
    unasked = (backend or named_backend()) in ("eager", "triton")
    refusal = "it was not asked for" if unasked else _cuda_refusal(x, Q)
    backend = choose("lowrank_statistics", backend, {"cuda": refusal}, lambda: "cuda")
    if x.numel() == 0:
        return tuple(x.new_zeros(L, *shape, dtype=dtype) for shape in ((r, r), (d, r), (d,)))
    if backend == "cuda":
        from dbpkern import extension

        return extension.load().lowrank_statistics(x, Q)
    with autocast_off(x.device):
        c = torch.linalg.vector_norm(x, dim=1, dtype=dtype).square_().div_(n)
        if _multiplies_bfloat16(x, Q):
            operand, bmm = torch.bfloat16, _half_bmm
        else:
            operand, bmm = dtype, torch.bmm
        x = x.to(operand)
        P = bmm(x, Q.to(operand)).to(operand)
        return bmm(P.mT, P).div_(n), bmm(x.mT, P).div_(n), c


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
        backend: "eager" or "cuda", the extension (fp32 and bf16 rows, ranks from 8 to 256); None chooses. On
            a GPU both round Q and P to bf16 where the rows are bf16; sums are fp32. Otherwise eager widens
            the rows.

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
    check_backend(backend)
    return torch.ops.dbpkern.lowrank_statistics(x, Q, backend or "")
