"""AdamW between the two maps of DBP, in one pass over a group of weights.

A program owns a block of rows. It reads gradient, weight and moments from memory once, and what it needs of
them again from L2, in the order in which it comes there last: 28 bytes for a weight in fp32, as
`torch.optim.AdamW(fused=True)`, in two launches for all full R of a width, and one for all low-rank R.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dbpkern.ops._common import check_tensor, operator
from dbpkern.ops._matmul import dot, rounded
from dbpkern.ops._table import load_tile, locate, matrix, number, serve
from dbpkern.ops._triton import jit, tl
from dbpkern.ops.maps import (
    Factors,
    add_deviation_,
    checked,
    load_factor,
    map_flops,
    nested,
    strip_product,
    times_Q,
    times_S,
    transposed,
)


@jit
def corrections(table, weight, count, log_beta1, log_beta2, COLUMN: tl.constexpr):
    """`1 - beta^step` of both moments of a weight, whose step has its address in a column of the table."""
    step = tl.load(number(table, weight, count, COLUMN).to(tl.pointer_type(tl.float32))).to(tl.float64)
    # In 64 bits: little is left of 1 - 0.999.
    return (1.0 - tl.exp(step * log_beta1)).to(tl.float32), (1.0 - tl.exp(step * log_beta2)).to(tl.float32)


@jit
def direction(
    exp_avg, exp_avg_sq, inside, mapped, weight1, weight2, correction1, correction2, eps,
    FIRST: tl.constexpr, DTYPE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """A tile of what AdamW subtracts beside the decay, divided by lr; zero outside.

    The FIRST time the moments take the mapped gradient, and count as they are stored.
    """
    mean = load_tile(exp_avg, inside)
    square = load_tile(exp_avg_sq, inside)
    if FIRST:
        mean = rounded(mean + (mapped - mean) * weight1, DTYPE, EMULATE)
        square = rounded(square + (mapped * mapped - square) * weight2, DTYPE, EMULATE)
        tl.store(exp_avg, mean, mask=inside)
        tl.store(exp_avg_sq, square, mask=inside)
        mean = mean.to(tl.float32)
        square = square.to(tl.float32)
    denominator = tl.sqrt(square) / tl.sqrt(correction2) + eps
    return tl.where(inside, mean / correction1 / denominator, 0.0)


@jit
def strip_times(
    strip, deviation, product, padded, TRANSPOSED: tl.constexpr,
    EMULATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A strip times R - I, or its transpose, into another; threads wait for each other before and after."""
    m = tl.arange(0, BLOCK_M)[:, None]
    n = tl.arange(0, BLOCK_N)[None, :]
    tl.debug_barrier()
    for start in range(0, padded, BLOCK_N):
        acc = strip_product(strip, deviation, padded, start, TRANSPOSED, EMULATE, BLOCK_M, BLOCK_N, BLOCK_K)
        tl.store(product + start + (m * padded + n), rounded(acc, tl.bfloat16, EMULATE))
    tl.debug_barrier()


@jit
def adamw_kernel(
    table, deviation, strips, lr, count, blocks, D, padded,
    weight1, weight2, log_beta1, log_beta2, eps, weight_decay,
    LR_TENSOR: tl.constexpr, DTYPE: tl.constexpr, OTHER: tl.constexpr, ALIGNED: tl.constexpr,
    SPAN: tl.constexpr, EMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The step of weights with full R; the matrices are V, g and the moments, weight1 is `1 - beta1`.

    Two strips hold a block in 16 bits: first g, whose product with R - I goes into the other, then the
    direction, whose product comes back.
    """
    rate = tl.load(lr).to(tl.float32) if LR_TENSOR else lr
    kept = 1.0 - rate * weight_decay
    HALF: tl.constexpr = BLOCK_K // 2  # few columns at a time, for there are four matrices
    m = tl.arange(0, BLOCK_M)[:, None]
    n = tl.arange(0, HALF)[None, :]
    strip = strips + tl.program_id(0).to(tl.int64) * BLOCK_M * padded
    product = strip + tl.num_programs(0).to(tl.int64) * BLOCK_M * padded
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        weight, row, m_in = locate(table, block, count, SPAN, BLOCK_M)
        V, V_m = matrix(table, weight, count, row, 0, DTYPE, ALIGNED)
        g, g_m = matrix(table, weight, count, row, 1, OTHER, ALIGNED)
        exp_avg, exp_avg_m = matrix(table, weight, count, row, 2, DTYPE, ALIGNED)
        exp_avg_sq, exp_avg_sq_m = matrix(table, weight, count, row, 3, DTYPE, ALIGNED)
        correction1, correction2 = corrections(table, weight, count, log_beta1, log_beta2, 10)
        R = deviation + number(table, weight, count, 11) * padded * padded
        for start in range(0, padded, HALF):
            tile = load_tile(g + start + (m * g_m + n), m_in & (n < D - start))
            tl.store(strip + start + (m * padded + n), rounded(tile, tl.bfloat16, EMULATE))
        strip_times(strip, R, product, padded, True, EMULATE, BLOCK_M, BLOCK_N, BLOCK_K)
        for start in range(0, padded, HALF):
            inside = m_in & (n < D - start)
            held = product + start + (m * padded + n)
            mapped = load_tile(g + start + (m * g_m + n), inside) + tl.load(held).to(tl.float32)
            change = direction(
                exp_avg + start + (m * exp_avg_m + n), exp_avg_sq + start + (m * exp_avg_sq_m + n), inside,
                mapped, weight1, weight2, correction1, correction2, eps, True, DTYPE, EMULATE,
            )  # fmt: skip
            tl.store(held, rounded(change, tl.bfloat16, EMULATE))
        strip_times(product, R, strip, padded, False, EMULATE, BLOCK_M, BLOCK_N, BLOCK_K)
        for start in range(0, padded, HALF):
            inside = m_in & (n < D - start)
            change = direction(
                exp_avg + start + (m * exp_avg_m + n), exp_avg_sq + start + (m * exp_avg_sq_m + n), inside,
                None, weight1, weight2, correction1, correction2, eps, False, DTYPE, EMULATE,
            )  # fmt: skip
            change += tl.load(strip + start + (m * padded + n)).to(tl.float32)
            old = load_tile(V + start + (m * V_m + n), inside)
            new = rounded(kept * old - rate * change, DTYPE, EMULATE)
            tl.store(V + start + (m * V_m + n), new, mask=inside)
        tl.debug_barrier()  # the next block overwrites the strips


@jit
def lowrank_adamw_kernel(
    table, lr, count, D, RANK, weight1, weight2, log_beta1, log_beta2, eps, weight_decay,
    LR_TENSOR: tl.constexpr, DTYPE: tl.constexpr, OTHER: tl.constexpr, ALIGNED: tl.constexpr,
    SPAN: tl.constexpr, EMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`adamw_kernel` for `R = I + Q S Q^T`; a block of rows on axis 0.

    The matrices are V, g, the moments, Q and S. The products with Q stay in registers; the second pass runs
    in reverse, so that it begins with what the first read last.
    """
    rate = tl.load(lr).to(tl.float32) if LR_TENSOR else lr
    kept = 1.0 - rate * weight_decay
    weight, row, m_in = locate(table, tl.program_id(0), count, SPAN, BLOCK_M)
    V, V_m = matrix(table, weight, count, row, 0, DTYPE, ALIGNED)
    g, g_m = matrix(table, weight, count, row, 1, OTHER, ALIGNED)
    exp_avg, exp_avg_m = matrix(table, weight, count, row, 2, DTYPE, ALIGNED)
    exp_avg_sq, exp_avg_sq_m = matrix(table, weight, count, row, 3, DTYPE, ALIGNED)
    Q, q_d = matrix(table, weight, count, 0, 4, tl.float32, ALIGNED)
    correction1, correction2 = corrections(table, weight, count, log_beta1, log_beta2, 14)
    m = tl.arange(0, BLOCK_M)[:, None]
    n = tl.arange(0, BLOCK_N)
    rank = tl.arange(0, BLOCK_R)
    t = times_Q(g, g_m, m_in, Q, q_d, D, RANK, tl.bfloat16, "ieee", EMULATE, BLOCK_M, BLOCK_K, BLOCK_R)
    t = times_S(t, table, weight, count, RANK, 5, True, ALIGNED, EMULATE, BLOCK_R)
    p = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    steps = tl.cdiv(D, BLOCK_N)
    for step in range(steps):
        start = (steps - 1 - step) * BLOCK_N
        inside = m_in & (n < D - start)[None, :]
        factor = load_factor(Q, q_d, start, n, D, rank, RANK, EMULATE)
        mapped = load_tile(g + start + (m * g_m + n[None, :]), inside)
        mapped = dot(t, tl.trans(factor), mapped, tl.bfloat16, "ieee", EMULATE)
        change = direction(
            exp_avg + start + (m * exp_avg_m + n[None, :]),
            exp_avg_sq + start + (m * exp_avg_sq_m + n[None, :]), inside, mapped, weight1, weight2,
            correction1, correction2, eps, True, DTYPE, EMULATE,
        )  # fmt: skip
        p = dot(change, factor, p, tl.bfloat16, "ieee", EMULATE)
    p = times_S(p, table, weight, count, RANK, 5, False, ALIGNED, EMULATE, BLOCK_R)
    tl.debug_barrier()  # the moments are written
    for start in range(0, D, BLOCK_N):
        inside = m_in & (n < D - start)[None, :]
        change = direction(
            exp_avg + start + (m * exp_avg_m + n[None, :]),
            exp_avg_sq + start + (m * exp_avg_sq_m + n[None, :]), inside, None, weight1, weight2,
            correction1, correction2, eps, False, DTYPE, EMULATE,
        )  # fmt: skip
        factor = load_factor(Q, q_d, start, n, D, rank, RANK, EMULATE)
        change = dot(p, tl.trans(factor), change, tl.bfloat16, "ieee", EMULATE)
        old = load_tile(V + start + (m * V_m + n[None, :]), inside)
        new = rounded(kept * old - rate * change, DTYPE, EMULATE)
        tl.store(V + start + (m * V_m + n[None, :]), new, mask=inside)


@operator("adamw_", mutates=("weights", "exp_avgs", "exp_avg_sqs"))
def _adamw(
    weights: list[Tensor], factors: list[Tensor], sizes: list[int], gradients: list[Tensor],
    exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], steps: list[Tensor],
    lr: Tensor, beta1: float, beta2: float, eps: float, weight_decay: float, backend: str,
) -> None:  # fmt: skip
    as_tensor = lr.device == weights[0].device

    def eager(i: int, own: list[Tensor]) -> None:
        """PyTorch's AdamW of a weight that is zero: V's digits do not hide its change."""
        V, moments, compute = weights[i], (exp_avgs[i], exp_avg_sqs[i]), own[0].dtype
        g = gradients[i].flatten(1).to(compute, copy=True)
        g = add_deviation_(g, g, transposed(own)).view(V.shape).to(moments[0].dtype)
        # It takes elements as they lie in memory.
        g, mean, square = (t.contiguous() for t in (g, *moments))
        change = torch.zeros_like(g)
        torch._fused_adamw_(
            [change], [g], [mean], [square], [], [steps[i].to(V.device)],
            lr=lr if as_tensor else float(lr), beta1=beta1, beta2=beta2, weight_decay=0.0, eps=eps,
            amsgrad=False, maximize=False,
        )  # fmt: skip
        new, change = V.flatten(1).to(compute), change.flatten(1).to(compute)
        new.mul_(1 - weight_decay * lr)
        add_deviation_(new.add_(change), change, own)
        for out, value in zip((V, *moments), (new, mean, square), strict=True):
            if value is not out:  # perhaps a view of it
                out.copy_(value.view(V.shape))

    args = {
        "lr": lr if as_tensor else float(lr), "weight1": 1 - beta1, "weight2": 1 - beta2,
        "log_beta1": math.log(beta1) if beta1 else -math.inf,
        "log_beta2": math.log(beta2) if beta2 else -math.inf,
        "eps": eps, "weight_decay": weight_decay,
    }  # fmt: skip
    kernels = {1: ("adamw", adamw_kernel), 2: ("lowrank_adamw", lowrank_adamw_kernel)}
    matrices = list(zip(weights, gradients, exp_avgs, exp_avg_sqs, strict=True))
    serve(
        "adamw_", backend, kernels, eager, matrices, nested(factors, sizes), args,
        {"LR_TENSOR": as_tensor}, steps, strips=2,
    )  # fmt: skip


_adamw.register_fake(lambda *args: None)


@register_flop_formula(torch.ops.dbpkern.adamw_)
def _flops(*args: Any, **kwargs: object) -> int:
    return 2 * map_flops(*args)


def adamw_(
    weights: Sequence[Tensor], gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor], factors: Sequence[Factors],
    lr: float | Tensor, beta1: float, beta2: float, eps: float, weight_decay: float,
    *, backend: str | None = None,
) -> None:  # fmt: skip
    """One step of AdamW on fused weights in place, with the maps of DBP before and after it.

    The same as `map_gradients_`, `torch.optim.AdamW` and `map_changes_`, but for what these round in between,
    and for the decay, which is of V itself, as if W decayed in `V = W R`:
    `g <- g R^T`, both moments, `D = m_hat / (sqrt(v_hat) + eps)`, `V <- (1 - lr weight_decay) V - lr D R`.

    Args:
        weights: V, `[o, ...]` each, taken as `[o, d]`; moments are of the same shapes and dtypes, gradients
            of the same shapes.
        gradients: of V, not changed.
        exp_avgs: first moments of the mapped gradients.
        exp_avg_sqs: second moments.
        steps: the numbers of the step being made, from 1 on, `[]` in fp32; Triton needs them beside V.
        factors: as for `map_gradients_`.
        lr: a number, or a tensor `[]`, which is read on its device: a CUDA graph freezes a number.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times lr.
        backend: as for `map_gradients_`; eager serves weights in fp16, which has no range for squares.
    """
    if not isinstance(lr, Tensor):
        lr = torch.tensor(lr, dtype=torch.float64)
    check_tensor("lr", lr, "[]", (0,))
    flat, sizes = checked(
        "weights", weights, factors, backend, gradients=(gradients, lambda V, own: (V.shape, None)),
        exp_avgs=(exp_avgs, lambda V, own: (V.shape, V.dtype)),
        exp_avg_sqs=(exp_avg_sqs, lambda V, own: (V.shape, V.dtype)),
        steps=(steps, lambda V, own: (torch.Size(), torch.float32)),
    )  # fmt: skip
    if weights:
        torch.ops.dbpkern.adamw_(
            list(weights), flat, sizes, list(gradients), list(exp_avgs), list(exp_avg_sqs), list(steps),
            lr, beta1, beta2, eps, weight_decay, backend or "",
        )  # fmt: skip
