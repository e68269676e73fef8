"""The rate of each R in a step: caution, eta and the limiter."""

import torch
from torch import Tensor

from dbpkern.ops import _dispatch, _triton
from dbpkern.ops._common import (
    autocast_off,
    check_same_device,
    check_same_dtype,
    check_tensor,
    eta_tensor,
    operator,
)
from dbpkern.ops._matmul import load_rate, rate_arguments
from dbpkern.ops._triton import jit, tl


@jit
def rates_kernel(
    caution, rates, a, bound, eta, limit, D, a_l, a_d, tiny, LIMITED: tl.constexpr,
    ETA_TENSOR: tl.constexpr, ETA_STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`caution` and `rates [L]` from `a [L, D]`, and `bound [L]` where LIMITED; a layer is a program."""
    layer = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    a += layer.to(tl.int64) * a_l
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        total += tl.load(a + (start + d) * a_d, mask=start + d < D, other=0.0)
    sound = tl.abs(tl.sum(total)) < float("inf")  # false for NaN
    trust = tl.load(caution + layer)
    trust = tl.where(sound, trust, 0.5 * trust)
    tl.store(caution + layer, trust)
    rate = trust * load_rate(eta, layer, ETA_TENSOR, ETA_STRIDE)
    if LIMITED:
        rate = tl.minimum(rate, limit / tl.maximum(tl.load(bound + layer), tiny))
    tl.store(rates + layer, tl.where(sound, rate, 0.0))


def triton_rates(
    caution: Tensor, rates: Tensor, a: Tensor, bound: Tensor | None, eta: Tensor, limit: float
) -> None:
    """The step of caution and rates by the Triton kernel."""
    rate, constants = rate_arguments(eta, a.device)
    _triton.launch(
        rates_kernel,
        (len(a),),
        {
            "caution": caution, "rates": rates, "a": a, "bound": caution if bound is None else bound,
            **rate, "limit": limit, "D": a.shape[1], "a_l": a.stride(0), "a_d": a.stride(1),
            "tiny": torch.finfo(torch.float32).tiny,
        },
        {"LIMITED": bound is not None, **constants, "BLOCK": 1024},
        4,
        1,
    )  # fmt: skip


def eager_rates(
    caution: Tensor, rates: Tensor, a: Tensor, bound: Tensor | None, eta: Tensor, limit: float
) -> None:
    """The same by PyTorch's operations."""
    sound = a.sum(1).isfinite()
    caution.mul_(torch.where(sound, 1.0, 0.5))
    found = caution * eta
    if bound is not None:
        found = torch.minimum(found, limit / bound.clamp(min=torch.finfo(bound.dtype).tiny))
    rates.copy_(torch.where(sound, found, 0.0))


@operator("choose_rates_", mutates=("caution", "rates"))
def _choose_rates(
    caution: Tensor, rates: Tensor, a: Tensor, bound: Tensor | None, eta: Tensor, limit: float, backend: str
) -> None:
    refusal = _dispatch.triton_refusal(a.device, a.dtype)
    automatic = _dispatch.preferred("choose_rates_", a.device)
    serves = _dispatch.choose("choose_rates_", backend, {"triton": refusal}, automatic)
    with autocast_off(a.device):
        (triton_rates if serves == "triton" else eager_rates)(caution, rates, a, bound, eta, limit)


@_choose_rates.register_fake
def _(
    caution: Tensor, rates: Tensor, a: Tensor, bound: Tensor | None, eta: Tensor, limit: float, backend: str
) -> None:
    return None


def choose_rates_(
    caution: Tensor,
    rates: Tensor,
    a: Tensor,
    bound: Tensor | None,
    eta: float | Tensor,
    limit: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """The rates of one step of L layers: `min(caution eta, limit / bound)`.

    A layer whose mean squares are not finite rests, rate 0, and its caution is halved from then on.

    Args:
        caution: `[L]`, contiguous, fp32 or fp64, by what each layer's eta is multiplied; changed in place.
        rates: `[L]`, contiguous; overwritten.
        a: `[L, d]`, mean squares: their sum is finite where the layer's samples and products of them are.
        bound: `[L]`, at least the largest absolute eigenvalue of each M, see `correlation`; None for no
            limiter.
        eta: a number >= 0, or a 0-d tensor. A CUDA graph freezes a number; a tensor on the device is read
            at each replay.
        limit: what no rate times its bound exceeds, a number > 0: below 2 a step is stable, below 1 no
            direction turns round. None with no bound.
        backend: None for the automatic choice, "eager" or "triton" (one launch).

    Returns:
        rates.

    Raises:
        TypeError: not floating-point tensors of equal dtype.
        ValueError: shapes, strides or devices that do not fit, eta or limit out of range, a bound without a
            limit or a limit without a bound, a backend that cannot serve the call.
    """
    check_tensor("a", a, "[L, d]", (2,))
    vectors = {"caution": caution, "rates": rates} | ({} if bound is None else {"bound": bound})
    for name, vector in vectors.items():
        check_tensor(name, vector, "[L]", (1,))
        if len(vector) != len(a) or not vector.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous [L] with L = {len(a)}, got shape {list(vector.shape)}, "
                f"strides {list(vector.stride())}"
            )
    check_same_dtype(a=a, **vectors)
    check_same_device(a=a, **vectors)
    if (bound is None) != (limit is None):
        raise ValueError(f"bound and limit: expected both or neither, got limit {limit}")
    if limit is not None and not limit > 0:
        raise ValueError(f"limit: expected a number > 0, got {limit}")
    eta = eta_tensor(eta, len(a), a.device)
    if eta.dim():
        raise ValueError(f"eta: expected a number or a 0-d tensor, got {list(eta.shape)}")
    _dispatch.check_backend(backend)
    torch.ops.dbpkern.choose_rates_(caution, rates, a, bound, eta, float(limit or 0.0), backend or "")
    return rates
