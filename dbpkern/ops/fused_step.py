"""Decorrelate every row and update R from a sample of them, in one operation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dbpkern.ops import _dispatch, _triton
from dbpkern.ops._common import (
    autocast_off,
    check_accumulator,
    check_kappa,
    check_matrix,
    check_same_device,
    check_tensor,
    eta_tensor,
    operator,
)
from dbpkern.ops._matmul import (
    GROUP,
    cdiv,
    dot,
    dtype_name,
    load_rate,
    operand_constants,
    product_loop,
    product_tile,
    rate_arguments,
    rounded,
    tile_position,
    within_reach,
)
from dbpkern.ops._triton import jit, tl
from dbpkern.ops.transform import triton_transform
from dbpkern.ops.update import eager_update, forms_correlation

STRIP = 16
"""Rows of R that one program steps: few, so that many programs share the work."""


@jit
def sampled_rows(index, s, N, SAMPLES):
    """The row numbers at the places s of `index [SAMPLES]`, and whether each is one of N."""
    row = tl.load(index + s, mask=s < SAMPLES, other=0)
    return row, (s < SAMPLES) & (row >= 0) & (row < N)


@jit
def step_strip(
    strip, x, index, R, eta, R_new, a, samples, P, M, N, SAMPLES, D, x_n, x_d, R_m, R_k, scale, kappa,
    ETA_TENSOR: tl.constexpr, ETA_STRIDE: tl.constexpr, OPERAND: tl.constexpr, HELD: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE: tl.constexpr, EVEN_K: tl.constexpr, STRIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """STRIP rows of R_new, and their mean squares, from all samples.

    With z these rows' features of the samples, G's rows are `((z^T x) / n) R^T`, which needs no other part
    of z. `samples [SAMPLES, STRIP]`, P and `M [STRIP, D]` are this program's own scratch.
    """
    r = tl.arange(0, STRIP)
    k = tl.arange(0, BLOCK_K)
    rows = strip * STRIP + r
    row_in = rows < D
    every = r[:, None] < STRIP
    m = tl.arange(0, BLOCK_M)
    squares = tl.zeros((STRIP,), tl.float32)
    for start in range(0, SAMPLES, BLOCK_M):
        s = start + m
        row, exists = sampled_rows(index, s, N, SAMPLES)
        x_row = x + (row * x_n)[:, None]
        z = product_loop(
            x_row + (k * x_d)[None, :], R + (rows[None, :] * R_m + k[:, None] * R_k),
            exists[:, None], row_in[None, :], D, x_d, R_k, rows,
            True, OPERAND, PRECISION, EMULATE, EVEN_K, BLOCK_M, STRIP, BLOCK_K,
        )  # fmt: skip
        z += tl.load(x_row + (rows * x_d)[None, :], mask=exists[:, None] & row_in[None, :], other=0.0).to(
            tl.float32
        )
        z = rounded(tl.where(exists[:, None], z, float("nan")), samples.dtype.element_ty, EMULATE)
        place = (s < SAMPLES)[:, None]
        tl.store(samples + (s[:, None] * STRIP + r[None, :]), z, mask=place)
        z = tl.where(place, z.to(tl.float32), 0.0)
        squares += tl.sum(z * z, axis=0)
    mean = squares * scale
    tl.store(a + rows, mean, mask=row_in)

    tl.debug_barrier()  # what the program's other threads have stored is read next
    n = tl.arange(0, BLOCK_N)
    for start_n in range(0, D, BLOCK_N):
        columns = start_n + n
        n_in = (columns < D)[None, :]
        acc = tl.zeros((STRIP, BLOCK_N), tl.float32)
        for start in range(0, SAMPLES, BLOCK_K):
            s = start + k
            row, exists = sampled_rows(index, s, N, SAMPLES)
            left = tl.load(
                samples + (s[None, :] * STRIP + r[:, None]), mask=(s < SAMPLES)[None, :], other=0.0
            )
            right = tl.load(
                x + (row * x_n)[:, None] + (columns * x_d)[None, :], mask=exists[:, None] & n_in, other=0.0
            )
            acc = dot(left, right, acc, OPERAND, PRECISION, EMULATE)
        tl.store(P + (r[:, None] * D + columns[None, :]), rounded(acc * scale, HELD, EMULATE), mask=n_in)

    tl.debug_barrier()
    for start_n in range(0, D, BLOCK_N):
        columns = start_n + n
        n_in = (columns < D)[None, :]
        G = product_loop(
            P + (r[:, None] * D + k[None, :]), R + (columns[None, :] * R_m + k[:, None] * R_k),
            every, n_in, D, 1, R_k, columns,
            True, HELD, PRECISION, EMULATE, EVEN_K, STRIP, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        place = r[:, None] * D + columns[None, :]
        G += tl.load(P + place, mask=n_in, other=0.0).to(tl.float32)
        on_diagonal = rows[:, None] == columns[None, :]
        tile = tl.where(on_diagonal, kappa * (mean - 1.0)[:, None], (1.0 - kappa) * G)
        tl.store(M + place, rounded(tile, HELD, EMULATE), mask=n_in)

    tl.debug_barrier()
    rate = load_rate(eta, 0, ETA_TENSOR, ETA_STRIDE)
    for start_n in range(0, D, BLOCK_N):
        columns = start_n + n
        n_in = (columns < D)[None, :]
        MR = product_loop(
            M + (r[:, None] * D + k[None, :]), R + (k[:, None] * R_m + columns[None, :] * R_k),
            every, n_in, D, 1, R_m, columns,
            True, HELD, PRECISION, EMULATE, EVEN_K, STRIP, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        MR += tl.load(M + (r[:, None] * D + columns[None, :]), mask=n_in, other=0.0).to(tl.float32)
        inside = row_in[:, None] & n_in
        old = tl.load(R + (rows[:, None] * R_m + columns[None, :] * R_k), mask=inside, other=0.0)
        tl.store(R_new + (rows[:, None] * D + columns[None, :]), old - rate * MR, mask=inside)


@jit
def fused_kernel(
    x, index, R, eta, z, R_new, a, samples, P, M, N, SAMPLES, D, x_n, x_d, R_m, R_k, scale, kappa,
    ETA_TENSOR: tl.constexpr, ETA_STRIDE: tl.constexpr, OPERAND: tl.constexpr, HELD: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE: tl.constexpr, EVEN_K: tl.constexpr, STRIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`z [N, D] = x R^T`, R_new and a: a strip of R_new for each of the first programs, then a tile of z."""
    strips = tl.cdiv(D, STRIP)
    p = tl.program_id(0)
    if p < strips:
        wide = p.to(tl.int64)
        step_strip(
            p, x, index, R, eta, R_new, a,
            samples + wide * STRIP * SAMPLES, P + wide * STRIP * D, M + wide * STRIP * D,
            N, SAMPLES, D, x_n, x_d, R_m, R_k, scale, kappa, ETA_TENSOR, ETA_STRIDE,
            OPERAND, HELD, PRECISION, EMULATE, EVEN_K, STRIP, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        tile_m, tile_n = tile_position(p - strips, tl.cdiv(N, BLOCK_M), tl.cdiv(D, BLOCK_N), GROUP)
        row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = product_tile(
            x, R, row, column, N, D, D, x_n, x_d, R_k, R_m, True,
            OPERAND, PRECISION, EMULATE, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        m = tl.arange(0, BLOCK_M)
        n = tl.arange(0, BLOCK_N)
        corner = z + row.to(tl.int64) * D + column
        inside = (row + m < N)[:, None] & (column + n < D)[None, :]
        value = rounded(acc, z.dtype.element_ty, EMULATE)
        tl.store(corner + (m[:, None] * D + n[None, :]), value, mask=inside)


def triton_fused(
    x: Tensor, R: Tensor, index: Tensor, eta: Tensor, kappa: float
) -> tuple[Tensor, Tensor, Tensor]:
    """z, R_new and a by the Triton kernel."""
    if not len(index):
        return triton_transform(x, R), R.clone(memory_format=torch.contiguous_format), R.new_zeros(len(R))
    x, R = within_reach(x), within_reach(R)
    n, d = x.shape
    operands = _dispatch.operands(x.dtype, R.dtype)
    # P and M hold squares, for which fp16 has no range.
    held = torch.bfloat16 if operands.dtype.itemsize == 2 else operands.dtype
    tiles = _dispatch.tiles("fused", operands.kind, d)
    strips = cdiv(d, STRIP)
    z, R_new, a = (
        torch.empty(shape, dtype=dtype, device=x.device)
        for shape, dtype in (((n, d), x.dtype), ((d, d), R.dtype), ((d,), R.dtype))
    )
    samples = torch.empty(strips, len(index), STRIP, dtype=x.dtype, device=x.device)
    P, M = torch.empty(2, strips * STRIP, d, dtype=held, device=x.device)
    rate, constants = rate_arguments(eta, x.device)
    _triton.launch(
        fused_kernel,
        (strips + cdiv(n, tiles.m) * cdiv(d, tiles.n),),
        {
            "x": x, "index": index, "R": R, **rate, "z": z, "R_new": R_new, "a": a, "samples": samples,
            "P": P, "M": M, "N": n, "SAMPLES": len(index), "D": d, "x_n": x.stride(0), "x_d": x.stride(1),
            "R_m": R.stride(0), "R_k": R.stride(1), "scale": 1 / len(index), "kappa": kappa,
        },
        {
            **constants, **operand_constants(operands), "HELD": dtype_name(held),
            "EVEN_K": d % tiles.k == 0, "STRIP": STRIP,
            "BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k, "GROUP": GROUP,
        },
        tiles.warps,
        tiles.stages,
    )  # fmt: skip
    return z, R_new, a


def _eager_fused(
    x: Tensor, R: Tensor, index: Tensor, eta: Tensor, kappa: float
) -> tuple[Tensor, Tensor, Tensor]:
    compute = torch.promote_types(x.dtype, R.dtype)
    z = torch.matmul(x.to(compute), R.to(compute).mT)
    new = R.clone(memory_format=torch.contiguous_format)
    if not len(index):
        return z.to(x.dtype), new, R.new_zeros(len(R))
    # In the precision of R: z is not rounded to the dtype of x before it is summed.
    samples = z.index_select(0, index).to(R.dtype)
    eager_update(new[None], samples[None], eta, kappa)
    return z.to(x.dtype), new, torch.linalg.vector_norm(samples, dim=0).square_().div_(len(index))


@operator("fused_step")
def _fused_step(
    x: Tensor, R: Tensor, index: Tensor, eta: Tensor, kappa: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    refusal = _dispatch.triton_refusal(x.device, x.dtype, R.dtype)
    automatic = _dispatch.preferred("fused_step", x.device, _dispatch.operands(x.dtype, R.dtype).kind)
    serves = _dispatch.choose("fused_step", backend, {"triton": refusal}, automatic)
    if serves == "triton" and len(R):
        return triton_fused(x, R, index, eta, kappa)
    with autocast_off(x.device):
        return _eager_fused(x, R, index, eta, kappa)


@_fused_step.register_fake
def _(
    x: Tensor, R: Tensor, index: Tensor, eta: Tensor, kappa: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    z = torch.empty_like(x, memory_format=torch.contiguous_format)
    R_new = torch.empty_like(R, memory_format=torch.contiguous_format)
    return z, R_new, R.new_empty(len(R))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.backend = inputs[5]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dz: Tensor | None, *_: object) -> tuple[Tensor | None, None, None, None, None, None]:
    (R,) = ctx.saved_tensors
    dx = None if dz is None else torch.ops.dbpkern.transform(dz, R.mT, ctx.backend)
    return dx, None, None, None, None, None


_fused_step.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.dbpkern.fused_step)
def _flops(
    x_shape: Sequence[int], R_shape: Sequence[int], index_shape: Sequence[int],
    *args: object, **kwargs: object,
) -> int:  # fmt: skip
    n, d = x_shape
    samples = index_shape[0]
    return 2 * n * d**2 + (2 * (samples + d) if forms_correlation(samples, d) else 4 * samples) * d**2


def fused_step(
    x: Tensor,
    R: Tensor,
    index: Tensor,
    eta: float | Tensor,
    kappa: float = 0.0,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Decorrelate all rows with R and form the R of the next step from the rows `index`.

    With Triton it is one launch, in which no program waits for another: the first ones step a few rows of R
    each, the others decorrelate a tile of x each.

    Args:
        x: `[n, d]`.
        R: `[d, d]`, fp32 or fp64; gets no gradient and is not changed.
        index: `[n_s]`, int64 row numbers in [0, n), as a rule without repetition. The host does not wait for
            a look at their range: eager gathering checks it (on a GPU asynchronously), Triton answers a
            number out of range with NaN in R_new and a.
        eta: eta, a number >= 0 or a 0-d tensor.
        kappa: weight in [0, 1] of the unit-variance term.
        backend: None for the automatic choice, "eager" or "triton".

    Returns:
        `z [n, d]` in the dtype of x, differentiable in x with the old R; `R_new [d, d]`; and `a [d]`, the
        mean squares of the sampled rows of z. An empty `index` returns R unchanged and zeros; sampled rows
        that are not finite make R_new and a so.

    Raises:
        TypeError: dtypes other than those above.
        ValueError: shapes or devices that do not fit, rate or kappa out of range, a backend that cannot serve
            the call.
    """
    check_tensor("x", x, "[n, d]", (2,))
    check_tensor("R", R, "[d, d]", (2,))
    check_accumulator("R", R)
    check_matrix("R", R, x.shape[-1], "[d, d]")
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index: expected an int64 tensor [n_s], got {kind}")
    if index.dim() != 1:
        raise ValueError(f"index: expected shape [n_s], got {list(index.shape)}")
    check_same_device(x=x, R=R, index=index)
    check_kappa(kappa)
    _dispatch.check_backend(backend)
    rate = eta_tensor(eta, 1, R.device)
    return torch.ops.dbpkern.fused_step(x, R, index, rate, float(kappa), backend or "")
