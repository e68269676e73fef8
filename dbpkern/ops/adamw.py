"""AdamW between the two maps of DBP, in one pass over a group of weights.

A program owns a block of rows. It reads gradient, weight and moments from memory once, and what it needs of
them again from L2, in the order in which it comes there last.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dbpkern.ops import _dispatch
from dbpkern.ops._common import FLOATS, autocast_off, operator
from dbpkern.ops._matmul import dot, dtype_name, rounded
from dbpkern.ops._table import address
from dbpkern.ops._triton import jit, tl
from dbpkern.ops.lowrank_fold import ieee_products
from dbpkern.ops.maps import (
    Factors,
    Group,
    add_deviation,
    as_matrix,
    check_like,
    checked_factors,
    distinct,
    grouped,
    load_factor,
    load_tile,
    locate,
    map_flops,
    mapped_gradient,
    matrix,
    nested,
    served_by,
    strip_product,
    times_S,
)


@jit
def correction(table, log_beta, count, weight, COLUMN: tl.constexpr):
    """`1 - beta^step` of a weight, whose step has its address in a column of the table."""
    step = tl.load(tl.load(table + COLUMN * count + weight).to(tl.pointer_type(tl.float32)))
    # In 64 bits: little is left of 1 - 0.999.
    return (1.0 - tl.exp(step.to(tl.float64) * log_beta)).to(tl.float32)


@jit
def load_lr(lr, LR_TENSOR: tl.constexpr):
    """The rate of the weights, a number or a tensor that the device may change between launches."""
    if LR_TENSOR:
        rate = tl.load(lr).to(tl.float32)
    else:
        rate = lr
    return rate


@jit
def new_moment(tile, inside, target, weight, DTYPE: tl.constexpr, EMULATE: tl.constexpr):
    """Move a tile of a moment towards `target` by `weight`, and store it: as it is stored, in fp32."""
    old = load_tile(tile, inside)
    new = rounded(old + (target - old) * weight, DTYPE, EMULATE)
    tl.store(tile, new, mask=inside)
    return new.to(tl.float32)


@jit
def direction(V, exp_avg, exp_avg_sq, inside, correction1, correction2, eps, weight_decay):
    """A tile of what AdamW subtracts from V, divided by lr; zero outside."""
    denominator = tl.sqrt(exp_avg_sq) / tl.sqrt(correction2) + eps
    return tl.where(inside, exp_avg / correction1 / denominator + weight_decay * V, 0.0)


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
    table, deviation, strips, products, lr, count, blocks, D, padded,
    weight1, weight2, log_beta1, log_beta2, eps, weight_decay,
    LR_TENSOR: tl.constexpr, DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    SPAN: tl.constexpr, EMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The step of the weights of a table with full R; weight1 is `1 - beta1`, weight2 `1 - beta2`.

    The table's matrices are V, g and the moments; then the step's address, and R's number in `deviation`. Two
    strips of scratch hold a block in 16 bits: first g, whose product with R - I goes into the other, then the
    direction, whose product comes back.
    """
    rate = load_lr(lr, LR_TENSOR)
    HALF: tl.constexpr = BLOCK_K // 2  # few columns at a time, for there are four matrices
    m = tl.arange(0, BLOCK_M)[:, None]
    n = tl.arange(0, HALF)[None, :]
    strip = strips + tl.program_id(0).to(tl.int64) * BLOCK_M * padded
    product = products + tl.program_id(0).to(tl.int64) * BLOCK_M * padded
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        weight, row, m_in = locate(table, block, count, SPAN, BLOCK_M)
        V, V_m = matrix(table, weight, count, row, 0, DTYPE, ALIGNED)
        g, g_m = matrix(table, weight, count, row, 1, G_DTYPE, ALIGNED)
        exp_avg, exp_avg_m = matrix(table, weight, count, row, 2, DTYPE, ALIGNED)
        exp_avg_sq, exp_avg_sq_m = matrix(table, weight, count, row, 3, DTYPE, ALIGNED)
        correction1 = correction(table, log_beta1, count, weight, 10)
        correction2 = correction(table, log_beta2, count, weight, 10)
        R = deviation + tl.load(table + 11 * count + weight) * padded * padded
        for start in range(0, padded, HALF):
            tile = load_tile(g + start + (m * g_m + n), m_in & (n < D - start))
            tl.store(strip + start + (m * padded + n), rounded(tile, tl.bfloat16, EMULATE))
        strip_times(strip, R, product, padded, True, EMULATE, BLOCK_M, BLOCK_N, BLOCK_K)
        for start in range(0, padded, HALF):
            inside = m_in & (n < D - start)
            held = product + start + (m * padded + n)
            mapped = load_tile(g + start + (m * g_m + n), inside) + tl.load(held).to(tl.float32)
            first = exp_avg + start + (m * exp_avg_m + n)
            first = new_moment(first, inside, mapped, weight1, DTYPE, EMULATE)
            second = exp_avg_sq + start + (m * exp_avg_sq_m + n)
            second = new_moment(second, inside, mapped * mapped, weight2, DTYPE, EMULATE)
            old = load_tile(V + start + (m * V_m + n), inside)
            change = direction(old, first, second, inside, correction1, correction2, eps, weight_decay)
            tl.store(held, rounded(change, tl.bfloat16, EMULATE))
        strip_times(product, R, strip, padded, False, EMULATE, BLOCK_M, BLOCK_N, BLOCK_K)
        for start in range(0, padded, HALF):
            inside = m_in & (n < D - start)
            first = load_tile(exp_avg + start + (m * exp_avg_m + n), inside)
            second = load_tile(exp_avg_sq + start + (m * exp_avg_sq_m + n), inside)
            old = load_tile(V + start + (m * V_m + n), inside)
            change = direction(old, first, second, inside, correction1, correction2, eps, weight_decay)
            change += tl.load(strip + start + (m * padded + n)).to(tl.float32)
            tl.store(V + start + (m * V_m + n), rounded(old - rate * change, DTYPE, EMULATE), mask=inside)
        tl.debug_barrier()  # the next block overwrites the strips


@jit
def lowrank_adamw_kernel(
    table, lr, count, D, RANK, weight1, weight2, log_beta1, log_beta2, eps, weight_decay,
    LR_TENSOR: tl.constexpr, DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    SPAN: tl.constexpr, EMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`adamw_kernel` for `R = I + Q S Q^T`; a block of rows on axis 0.

    The table's matrices are V, g, the moments, Q and S; then the step's address. The products with Q stay in
    registers; the second pass runs in reverse, so that it begins with what the first read last.
    """
    rate = load_lr(lr, LR_TENSOR)
    weight, row, m_in = locate(table, tl.program_id(0), count, SPAN, BLOCK_M)
    V, V_m = matrix(table, weight, count, row, 0, DTYPE, ALIGNED)
    g, g_m = matrix(table, weight, count, row, 1, G_DTYPE, ALIGNED)
    exp_avg, exp_avg_m = matrix(table, weight, count, row, 2, DTYPE, ALIGNED)
    exp_avg_sq, exp_avg_sq_m = matrix(table, weight, count, row, 3, DTYPE, ALIGNED)
    Q, q_d = matrix(table, weight, count, 0, 4, tl.float32, ALIGNED)
    correction1 = correction(table, log_beta1, count, weight, 14)
    correction2 = correction(table, log_beta2, count, weight, 14)
    m = tl.arange(0, BLOCK_M)[:, None]
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rank = tl.arange(0, BLOCK_R)
    t = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, D, BLOCK_K):
        tile = g + start + (m * g_m + k[None, :])
        tile = tl.load(tile, mask=m_in & (k < D - start)[None, :], other=0.0)
        factor = load_factor(Q, q_d, start, k, D, rank, RANK, EMULATE)
        t = dot(tile, factor, t, tl.bfloat16, "ieee", EMULATE)
    t = times_S(t, table, weight, count, RANK, 5, True, ALIGNED, EMULATE, BLOCK_R)
    p = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    steps = tl.cdiv(D, BLOCK_N)
    for step in range(steps):
        start = (steps - 1 - step) * BLOCK_N
        inside = m_in & (n < D - start)[None, :]
        factor = load_factor(Q, q_d, start, n, D, rank, RANK, EMULATE)
        mapped = load_tile(g + start + (m * g_m + n[None, :]), inside)
        mapped = dot(t, tl.trans(factor), mapped, tl.bfloat16, "ieee", EMULATE)
        first = exp_avg + start + (m * exp_avg_m + n[None, :])
        first = new_moment(first, inside, mapped, weight1, DTYPE, EMULATE)
        second = exp_avg_sq + start + (m * exp_avg_sq_m + n[None, :])
        second = new_moment(second, inside, mapped * mapped, weight2, DTYPE, EMULATE)
        old = load_tile(V + start + (m * V_m + n[None, :]), inside)
        change = direction(old, first, second, inside, correction1, correction2, eps, weight_decay)
        p = dot(change, factor, p, tl.bfloat16, "ieee", EMULATE)
    p = times_S(p, table, weight, count, RANK, 5, False, ALIGNED, EMULATE, BLOCK_R)
    tl.debug_barrier()  # the moments are written
    for start in range(0, D, BLOCK_N):
        inside = m_in & (n < D - start)[None, :]
        first = load_tile(exp_avg + start + (m * exp_avg_m + n[None, :]), inside)
        second = load_tile(exp_avg_sq + start + (m * exp_avg_sq_m + n[None, :]), inside)
        old = load_tile(V + start + (m * V_m + n[None, :]), inside)
        change = direction(old, first, second, inside, correction1, correction2, eps, weight_decay)
        factor = load_factor(Q, q_d, start, n, D, rank, RANK, EMULATE)
        change = dot(p, tl.trans(factor), change, tl.bfloat16, "ieee", EMULATE)
        new = rounded(old - rate * change, DTYPE, EMULATE)
        tl.store(V + start + (m * V_m + n[None, :]), new, mask=inside)


Rule = tuple[Tensor, float, float, float, float]
"""lr, beta1, beta2, eps, weight_decay."""


def triton_adamw(
    matrices: Sequence[Sequence[Tensor]],
    steps: Sequence[Tensor],
    factors: Sequence[Sequence[Tensor]],
    rule: Rule,
) -> None:
    """The step by the kernels, layouts they do not know in eager; `matrices` are V, g and the moments."""
    lr, beta1, beta2, eps, weight_decay = rule
    on_host = lr.device.type == "cpu" and steps[0].device.type != "cpu"
    numbers = {
        "lr": float(lr) if on_host else lr, "weight1": 1 - beta1, "weight2": 1 - beta2,
        "log_beta1": math.log(beta1) if beta1 else -math.inf,
        "log_beta2": math.log(beta2) if beta2 else -math.inf,
        "eps": eps, "weight_decay": weight_decay,
    }  # fmt: skip
    groups, rest = grouped(matrices, factors)
    for (full, d, r, dtype, g_dtype, *_), members in groups.items():
        own = [[as_matrix(t) for t in matrices[i]] for i in members]
        places = [address(steps[i]) for i in members]
        constants = {
            "LR_TENSOR": not on_host, "DTYPE": dtype_name(dtype), "G_DTYPE": dtype_name(g_dtype),
        }  # fmt: skip
        if full:
            Rs, indices = distinct([factors[i][0] for i in members])
            group = Group("adamw", d, own, list(zip(places, indices, strict=True)))
            group.launch_full(adamw_kernel, Rs, ["strips", "products"], numbers, constants)
        else:
            own = [[*ts, *factors[i]] for ts, i in zip(own, members, strict=True)]
            group = Group("lowrank_adamw", r, own, [(place,) for place in places])
            group.launch_lowrank(lowrank_adamw_kernel, r, numbers, constants)
    for i in rest:
        eager_adamw(*matrices[i], steps[i], factors[i], rule)


def eager_adamw(
    V: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    factors: Sequence[Tensor],
    rule: Rule,
) -> None:
    """The step of one weight in the order of operations of PyTorch's AdamW, in the dtype of R."""
    lr, beta1, beta2, eps, weight_decay = rule
    compute = torch.promote_types(V.dtype, factors[0].dtype)
    factors = [f.to(compute) for f in factors]
    mapped = mapped_gradient(as_matrix(g).to(compute), factors).view(V.shape).to(exp_avg.dtype)
    exp_avg.lerp_(mapped, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(mapped, mapped, value=1 - beta2)
    # Numbers of 64 bits, which combine with tensors of any dtype without widening them.
    step = step.double()
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    denominator = (exp_avg_sq.to(compute).sqrt() / correction2.sqrt()).add_(eps)
    change = (exp_avg.to(compute) / denominator).mul_(lr / correction1)
    change += V.to(compute) * (lr * weight_decay)
    old, change = as_matrix(V).to(compute), as_matrix(change)
    V.copy_(add_deviation(old - change, -change, factors).view(V.shape))


@operator("adamw_", mutates=("weights", "exp_avgs", "exp_avg_sqs"))
def _adamw(
    weights: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    factors: list[Tensor],
    sizes: list[int],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    backend: str,
) -> None:
    device = weights[0].device
    refusal = None if all(t.device == device for t in steps) else "it reads the steps on the weights' device"
    matrices = list(zip(weights, gradients, exp_avgs, exp_avg_sqs, strict=True))
    pairs = nested(factors, sizes)
    rule = (lr, beta1, beta2, eps, weight_decay)
    with autocast_off(device), ieee_products(device):
        if served_by("adamw_", [*weights, *gradients], factors, backend, refusal) == "triton":
            triton_adamw(matrices, steps, pairs, rule)
            return
        for own, step, pair in zip(matrices, steps, pairs, strict=True):
            eager_adamw(*own, step, pair, rule)


_adamw.register_fake(lambda *args: None)


@register_flop_formula(torch.ops.dbpkern.adamw_)
def _flops(weights, gradients, exp_avgs, exp_avg_sqs, steps, factors, sizes, *args, **kwargs) -> int:
    return 2 * map_flops(weights, factors, sizes)


def adamw_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    factors: Sequence[Factors],
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    *,
    backend: str | None = None,
) -> None:
    """One step of AdamW on fused weights in place, with the maps of DBP before and after it.

    The same as `map_gradients_`, `torch.optim.AdamW` and `map_changes_`, but for what these round in between:
    `g <- g R^T`, both moments, `D = m_hat / (sqrt(v_hat) + eps) + weight_decay V`, `V <- V - lr D R`. The
    decay (Loshchilov and Hutter, arXiv 1711.05101) is mapped with the rest of the change.

    Args:
        weights: V, `[o, ...]` each, taken as `[o, d]`; changed in place.
        gradients: of V, in any floating-point dtype; not changed.
        exp_avgs: first moments of the mapped gradients, of V's shape and dtype; changed in place.
        exp_avg_sqs: second moments, likewise.
        steps: 0-d fp32 tensors, the number of the step being made, from 1 on.
        factors: as for `map_gradients_`.
        lr: a number, or a 0-d tensor, which is read on its device: a CUDA graph freezes a number.
        beta1: how much of the first moment stays.
        beta2: how much of the second moment stays.
        eps: added to the root of the second moment.
        weight_decay: the share of V, times lr, that each step takes away.
        backend: as for `map_gradients_`. Triton needs the steps on the device of V.

    Raises:
        TypeError: not floating-point tensors, dtypes other than those.
        ValueError: shapes, lengths or devices that do not fit, a backend that cannot serve the call.
    """
    flat, sizes = checked_factors("weights", weights, factors, (*gradients, *exp_avgs, *exp_avg_sqs))
    check_like("gradients", gradients, weights, dtype=False)
    check_like("exp_avgs", exp_avgs, weights)
    check_like("exp_avg_sqs", exp_avg_sqs, weights)
    if len(steps) != len(weights):
        raise ValueError(f"steps: expected {len(weights)} tensors, got {len(steps)}")
    for i, (step, V) in enumerate(zip(steps, weights, strict=True)):
        if step.dim() or step.dtype != torch.float32 or step.device not in (V.device, torch.device("cpu")):
            raise ValueError(
                f"steps[{i}]: expected a 0-d float32 tensor on {V.device} or the CPU, "
                f"got {list(step.shape)}, {step.dtype} on {step.device}"
            )
    if not isinstance(lr, Tensor):
        lr = torch.tensor(lr, dtype=torch.float64)
    if lr.dim() or lr.dtype not in FLOATS:
        raise ValueError(f"lr: expected a number or a 0-d tensor, got {list(lr.shape)} {lr.dtype}")
    _dispatch.check_backend(backend)
    if weights:
        torch.ops.dbpkern.adamw_(
            list(weights), list(gradients), list(exp_avgs), list(exp_avg_sqs), list(steps), flat, sizes,
            lr, beta1, beta2, eps, weight_decay, backend or "",
        )  # fmt: skip
