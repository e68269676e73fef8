"""Decorrelate every row and update R from a sample of them, in one operation.

Launches with Triton: one for d <= 64, where a program holds R whole; for wider R with fewer samples than two
thirds of d one, after the zeroing of its counters; otherwise those of `transform`, `correlation` and
`apply_`, with a gathering of the samples and a copy of R between them.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dbpkern.ops import _dispatch, _triton, _tuning
from dbpkern.ops._common import (
    autocast_off,
    check_accumulator,
    check_kappa,
    check_matrix,
    check_same_device,
    check_tensor,
    rate_tensor,
)
from dbpkern.ops._dispatch import Operands
from dbpkern.ops._matmul import (
    cdiv,
    dot,
    dtype_name,
    less_identity,
    operand_constants,
    product_loop,
    product_tile,
    rounded,
    within_reach,
)
from dbpkern.ops._pipeline import (
    FIELDS,
    Schedule,
    new_counters,
    raise_counters,
    tables,
    take_item,
    wait_for_inputs,
)
from dbpkern.ops._triton import jit, tl
from dbpkern.ops.apply import load_rate, rate_arguments
from dbpkern.ops.update import eager_update, forms_correlation, moment_tile, store_updated

ON_CHIP = {"16bit": 64, "tf32": 64, "ieee": 0}
"""The widest R that one program holds, by kind of operands: without tensor cores none pays."""

ON_CHIP_SAMPLES = 1024
"""The largest sample that is left to that one program: it takes its rows one block after the other."""

TRANSFORM, PROJECT, FINISH = 0, 1, 2


@jit
def on_chip_kernel(
    x, R, index, lr, z, new, a, N, SAMPLES, D, x_n, x_d, r_r, r_c, scale, kappa,
    LR_TENSOR: tl.constexpr, LR_STRIDE: tl.constexpr,
    OPERAND: tl.constexpr, HELD: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program 0 updates R from the sampled rows; every other one decorrelates BLOCK_M rows.

    The samples are decorrelated a second time by program 0, so that nobody waits for anybody.
    """
    program = tl.program_id(0)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_D)
    square = (k < D)[:, None] & (k < D)[None, :]
    transposed = tl.load(R + k[:, None] * r_c + k[None, :] * r_r, mask=square, other=0.0)
    transposed = less_identity(transposed, k, k)  # R^T - I
    columns = (k < D)[None, :]
    if program > 0:
        rows = (program - 1).to(tl.int64) * BLOCK_M + m
        inside = (rows < N)[:, None] & columns
        tile = tl.load(x + rows[:, None] * x_n + k[None, :] * x_d, mask=inside, other=0.0)
        acc = dot(tile, transposed, tile.to(tl.float32), OPERAND, PRECISION, EMULATE)
        tl.store(z + rows[:, None] * D + k[None, :], rounded(acc, z.dtype.element_ty, EMULATE), mask=inside)
    else:
        G = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
        for start in range(0, SAMPLES, BLOCK_M):
            drawn = start + m < SAMPLES
            rows = tl.load(index + start + m, mask=drawn, other=0)
            known = (rows >= 0) & (rows < N)
            inside = (drawn & known)[:, None] & columns
            tile = tl.load(x + rows[:, None] * x_n + k[None, :] * x_d, mask=inside, other=0.0)
            acc = dot(tile, transposed, tile.to(tl.float32), OPERAND, PRECISION, EMULATE)
            # An index out of range reads nothing, and shows as NaN in all that follows from it.
            acc = tl.where((drawn & (known == 0))[:, None] & columns, float("nan"), acc)
            sampled = rounded(acc, z.dtype.element_ty, EMULATE)
            G = dot(tl.trans(sampled), sampled, G, OPERAND, PRECISION, EMULATE)
        G *= scale
        on_diagonal = k[:, None] == k[None, :]
        tl.store(a + k, tl.sum(tl.where(on_diagonal, G, 0.0), axis=0), mask=k < D)
        M = tl.where(on_diagonal, tl.where(columns, kappa * (G - 1.0), 0.0), (1.0 - kappa) * G)
        old = tl.load(R + k[:, None] * r_r + k[None, :] * r_c, mask=square, other=0.0)
        MR = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
        MR = dot(M, old, MR, HELD, PRECISION, EMULATE)
        rate = load_rate(lr, 0, LR_TENSOR, LR_STRIDE)
        tl.store(new + k[:, None] * D + k[None, :], old - rate * MR, mask=square)


@jit
def pipeline_kernel(
    x, R, index, lr, z, new, a, U, items, counters, TICKETS, N, SAMPLES, D, x_n, x_d, scale, kappa,
    LR_TENSOR: tl.constexpr, LR_STRIDE: tl.constexpr, FIELDS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """z of all rows, then `U = z_s R` of the sampled ones, then `R - lr M R` as `z_s^T U`."""
    item = take_item(items, counters, TICKETS, FIELDS)
    kind = tl.load(item)
    row, column = tl.load(item + 2) * BLOCK_M, tl.load(item + 3) * BLOCK_N
    slot = U + tl.load(item + 4).to(tl.int64) * SAMPLES * BLOCK_N
    wait_for_inputs(item, counters)
    m = row + tl.arange(0, BLOCK_M)
    n = column + tl.arange(0, BLOCK_N)
    if kind == 0:
        acc = product_tile(
            x, R, row, column, N, D, D, x_n, x_d, 1, D, True,
            OPERAND, PRECISION, EMULATE, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        place = z + m.to(tl.int64)[:, None] * D + n[None, :]
        inside = (m < N)[:, None] & (n < D)[None, :]
        tl.store(place, rounded(acc, z.dtype.element_ty, EMULATE), mask=inside)
    elif kind == 1:
        k = tl.arange(0, BLOCK_K)
        drawn = m < SAMPLES
        rows = tl.load(index + m, mask=drawn, other=0)
        known = (rows >= 0) & (rows < N)
        sampled = (drawn & known)[:, None]
        acc = product_loop(
            z + rows[:, None] * D + k[None, :], R + k[:, None] * D + n[None, :],
            sampled, (n < D)[None, :], D, 1, D, n, True,
            OPERAND, PRECISION, EMULATE, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        own = tl.load(z + rows[:, None] * D + n[None, :], mask=sampled & (n < D)[None, :], other=0.0)
        acc += own.to(tl.float32)
        # An index out of range reads nothing, and shows as NaN in all that follows from it.
        acc = tl.where((known == 0)[:, None], float("nan"), acc)
        place = slot + m.to(tl.int64)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tl.store(place, rounded(acc, slot.dtype.element_ty, EMULATE), mask=drawn[:, None])
    else:
        acc, squares = moment_tile(
            z, slot, index, row, SAMPLES, N, D, D, 1, True,
            OPERAND, PRECISION, EMULATE, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if column == 0:
            tl.store(a + m, squares * scale, mask=m < D)
        rate = load_rate(lr, 0, LR_TENSOR, LR_STRIDE)
        store_updated(
            R, new, acc, squares * scale, row, column, D, D, rate, scale, kappa,
            OPERAND, EMULATE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    raise_counters(item, counters)


def fused_schedule(tokens: int, samples: int, rows: int, columns: int) -> Schedule:
    """z whole, then strip after strip of U and of the new R.

    z has `tokens` tiles of rows, its sample has `samples`, R has `rows` times `columns` tiles.
    """
    schedule = Schedule()
    transformed = schedule.counter()
    for row in range(tokens):
        for column in range(columns):
            schedule.add(TRANSFORM, row=row, column=column, raises=(transformed,))
    projected = [schedule.counter() for _ in range(columns)]
    for column in range(columns):
        for row in range(samples):
            ready = ((transformed, tokens * columns),)
            schedule.add(PROJECT, 0, row, column, column, ready, (projected[column],))
    for column in range(columns):
        for row in range(rows):
            ready = ((projected[column], samples),)
            schedule.add(FINISH, 0, row, column, column, ready)
    return schedule


def fits_on_chip(d: int, samples: int, operands: Operands) -> bool:
    """Whether R and its update are left to one program."""
    return d <= ON_CHIP[operands.kind] and samples <= ON_CHIP_SAMPLES


def triton_fused(
    x: Tensor, R: Tensor, index: Tensor, lr: Tensor, kappa: float
) -> tuple[Tensor, Tensor, Tensor]:
    """z, the new R and a in one launch; R and index contiguous, index not empty."""
    x = within_reach(x)
    operands = _dispatch.operands(x.dtype)
    (n, d), samples = x.shape, len(index)
    z = torch.empty(n, d, dtype=x.dtype, device=x.device)
    new = torch.empty(d, d, dtype=R.dtype, device=R.device)
    a = torch.empty(d, dtype=R.dtype, device=R.device)
    rate, rate_constants = rate_arguments(lr.reshape(()), R.device)
    args = {"x": x, "R": R, "index": index, **rate, "z": z, "new": new, "a": a}
    sizes = {"N": n, "SAMPLES": samples, "D": d, "x_n": x.stride(0), "x_d": x.stride(1)}
    rule = {"scale": 1 / samples, "kappa": kappa}
    constants = {**rate_constants, **operand_constants(operands)}
    if fits_on_chip(d, samples, operands):
        held = (
            torch.bfloat16 if operands.dtype == torch.float16 else operands.dtype
        )  # fp16 has no range for M
        tiles = _dispatch.tiles("fused_on_chip", operands.kind, d, x.device)
        _triton.launch(
            on_chip_kernel,
            (1 + cdiv(n, tiles.m),),
            {**args, **sizes, "r_r": R.stride(0), "r_c": R.stride(1), **rule},
            {
                **constants,
                "HELD": dtype_name(held),
                "BLOCK_M": tiles.m,
                "BLOCK_D": max(16, 1 << (d - 1).bit_length()),
            },
            tiles.warps,
            tiles.stages,
        )
        return z, new, a
    tiles = _dispatch.tiles("fused_pipeline", operands.kind, d, x.device)
    columns = cdiv(d, tiles.n)
    shape = (cdiv(n, tiles.m), cdiv(samples, tiles.m), cdiv(d, tiles.m), columns)
    items, length = tables(fused_schedule, *shape, device=x.device)
    U = torch.empty(columns, samples, tiles.n, dtype=operands.dtype, device=x.device)
    counters = new_counters(length, x.device)
    _triton.launch(
        pipeline_kernel,
        (len(items),),
        {**args, "U": U, "items": items, "counters": counters, "TICKETS": length - 1, **sizes, **rule},
        {
            **constants, "FIELDS": FIELDS, "EVEN_K": d % tiles.k == 0,
            "BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k,
        },
        tiles.warps,
        tiles.stages,
    )  # fmt: skip
    return z, new, a


def _composed(
    x: Tensor, R: Tensor, index: Tensor, lr: Tensor, kappa: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the other ops."""
    z = torch.ops.dbpkern.transform(x, R, backend)
    samples = z.index_select(0, index)[None]
    new = R.clone(memory_format=torch.contiguous_format)
    M, a, _ = torch.ops.dbpkern.correlation(samples, kappa, False, backend)
    torch.ops.dbpkern.apply_(new[None], M, lr, backend)
    return z, new, a[0]


def _eager_fused(
    x: Tensor, R: Tensor, index: Tensor, lr: Tensor, kappa: float
) -> tuple[Tensor, Tensor, Tensor]:
    compute = torch.promote_types(x.dtype, R.dtype)
    z = torch.matmul(x.to(compute), R.to(compute).mT)
    new = R.clone(memory_format=torch.contiguous_format)
    if not len(index):
        return z.to(x.dtype), new, R.new_zeros(len(R))
    # In the precision of R: z is not rounded to the dtype of x before it is summed.
    samples = z.index_select(0, index).to(R.dtype)
    eager_update(new[None], samples[None], lr, kappa)
    return z.to(x.dtype), new, torch.linalg.vector_norm(samples, dim=0).square_().div_(len(index))


@torch.library.custom_op("dbpkern::fused_step", mutates_args=())
def _fused_step(
    x: Tensor, R: Tensor, index: Tensor, lr: Tensor, kappa: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    d = len(R)
    operands = _dispatch.operands(x.dtype)
    serves = _tuning.serving(
        "fused_step",
        backend,
        _dispatch.triton_refusal(x.device, x.dtype, R.dtype),
        "fused_on_chip" if fits_on_chip(d, len(index), operands) else "fused_pipeline",
        operands.kind,
        x.device,
        {"d": d, "rows": len(x)},
        lambda name: torch.ops.dbpkern.fused_step(x, R, index, lr, kappa, name),
    )
    if serves == "triton" and d and len(index):
        many = forms_correlation(len(index), d, triangular=True)
        if many and not fits_on_chip(d, len(index), operands):
            return _composed(x, R, index, lr, kappa, backend)
        return triton_fused(x, R.contiguous(), index.contiguous(), lr, kappa)
    with autocast_off(x.device):
        return _eager_fused(x, R, index, lr, kappa)


@_fused_step.register_fake
def _(
    x: Tensor, R: Tensor, index: Tensor, lr: Tensor, kappa: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    z = torch.empty_like(x, memory_format=torch.contiguous_format)
    R_new = torch.empty_like(R, memory_format=torch.contiguous_format)
    return z, R_new, R.new_empty(len(R))


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.backend = inputs[5]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dz: Tensor | None, *_) -> tuple[Tensor | None, None, None, None, None, None]:
    (R,) = ctx.saved_tensors
    dx = None if dz is None else torch.ops.dbpkern.transform(dz, R.mT, ctx.backend)
    return dx, None, None, None, None, None


_fused_step.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.dbpkern.fused_step)
def _flops(x_shape, R_shape, index_shape, *args, **kwargs) -> int:
    n, d = x_shape
    samples = index_shape[0]
    return 2 * n * d**2 + (2 * (samples + d) if forms_correlation(samples, d) else 4 * samples) * d**2


def fused_step(
    x: Tensor,
    R: Tensor,
    index: Tensor,
    lr: float | Tensor,
    kappa: float = 0.0,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Decorrelate all rows with R and form the R of the next step from the rows `index`.

    Args:
        x: `[n, d]`.
        R: `[d, d]`, fp32 or fp64; gets no gradient and is not changed.
        index: `[n_s]`, int64 row numbers in [0, n), as a rule without repetition. The host does not wait for
            a look at their range: eager gathering checks it (on a GPU asynchronously), the Triton kernels
            that gather rows themselves answer a number out of range with NaN in R_new and a.
        lr: eta, a number >= 0 or a 0-d tensor.
        kappa: weight in [0, 1] of the unit-variance term.
        backend: None for the automatic choice, "eager" or "triton".

    Returns:
        `z [n, d]` in the dtype of x, differentiable in x with the old R; `R_new [d, d]`; and `a [d]`, the
        mean squares of the sampled rows of z. An empty `index` returns R unchanged and zeros.

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
    rate = rate_tensor(lr, 1, R.device)
    return torch.ops.dbpkern.fused_step(x, R, index, rate, float(kappa), backend or "")
