"""Argument checks and precision rules shared by the ops."""

import contextlib
import math
from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
"""The Python function behind each operator, by name: what `bench launches` runs on fake tensors."""


def operator(
    name: str, mutates: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], torch.library.CustomOpDef]:
    """`torch.library.custom_op("dbpkern::<name>")` that remembers its implementation."""

    def register(fn: Callable[..., Any]) -> torch.library.CustomOpDef:
        IMPLEMENTATIONS[name] = fn
        return torch.library.custom_op(f"dbpkern::{name}", fn, mutates_args=tuple(mutates))

    return register


def product(a: Tensor, b: Tensor) -> Tensor:
    """`torch.bmm` of 16-bit stacks on a GPU, summed and returned in fp32."""
    return torch.bmm(a, b, out_dtype=torch.float32)


def check_tensor(name: str, value: object, shape: str, dims: Container[int]) -> None:
    """Raise unless `value` is a floating-point tensor with one of the numbers of dimensions `dims`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {value.dtype}")
    if value.dim() not in dims:
        raise ValueError(f"{name}: expected shape {shape}, got {list(value.shape)}")


def check_matrix(name: str, R: Tensor, d: int, shape: str) -> None:
    """Raise unless the trailing dimensions of `R` are `d` x `d`."""
    if R.shape[-2:] != (d, d):
        raise ValueError(f"{name}: expected shape {shape} with d = {d}, got {list(R.shape)}")


def check_same_device(**tensors: Tensor) -> None:
    """Raise unless all tensors lie on one device."""
    if len({t.device for t in tensors.values()}) > 1:
        places = ", ".join(f"{name} on {t.device}" for name, t in tensors.items())
        raise ValueError(f"expected all tensors on one device, got {places}")


def check_same_dtype(**tensors: Tensor) -> None:
    """Raise unless all tensors share one dtype."""
    if len({t.dtype for t in tensors.values()}) > 1:
        kinds = ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
        raise TypeError(f"expected equal dtypes, got {kinds}")


def check_accumulator(name: str, R: Tensor) -> None:
    """Raise unless `R` has a dtype that statistics and updates may accumulate in."""
    if R.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected float32 or float64 (R is never kept in less), got {R.dtype}")


def check_kappa(kappa: float) -> None:
    """Raise unless kappa lies in [0, 1]."""
    if not 0.0 <= kappa <= 1.0:  # also false for NaN
        raise ValueError(f"kappa: expected a number in [0, 1], got {kappa}")


def check_eta(eta: float) -> None:
    """Raise unless the rate of R is finite and not negative."""
    if not 0.0 <= eta < math.inf:  # also false for NaN; math.isfinite would break a compiled graph
        raise ValueError(f"eta: expected a finite number >= 0, got {eta}")


def eta_tensor(eta: float | Tensor, layers: int, device: torch.device) -> Tensor:
    """The rate of R as the tensor the ops take: 0-d or `[L]`.

    A Python number becomes a 0-d CPU tensor, which combines with tensors on any device without a copy to
    it; its value is checked here. A rate that is a tensor already is checked by shape and device alone:
    reading its value would make the host wait for the device.
    """
    if not isinstance(eta, Tensor):
        check_eta(eta)
        return torch.tensor(eta, dtype=torch.float64)
    if eta.dtype not in FLOATS:
        raise TypeError(f"eta: expected a floating-point tensor, got {eta.dtype}")
    if eta.shape not in ((), (layers,)):
        raise ValueError(
            f"eta: expected a number, a 0-d tensor or [L] with L = {layers}, got {list(eta.shape)}"
        )
    if eta.device != device and (eta.dim() or eta.device.type != "cpu"):
        raise ValueError(f"eta: expected a tensor on {device}, or a 0-d one on the CPU, got {eta.device}")
    return eta


def per_layer(eta: Tensor, dtype: torch.dtype) -> Tensor:
    """A rate shaped to scale stacks `[L, *, *]`: 0-d stays, `[L]` becomes `[L, 1, 1]` in `dtype`.

    Unlike a 0-d tensor, a wider `[L]` would widen what it scales.
    """
    return eta if eta.dim() == 0 else eta[:, None, None].to(dtype)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64, everything else accumulates in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The ops choose their precision themselves: inside one, autocast must not lower it again."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
