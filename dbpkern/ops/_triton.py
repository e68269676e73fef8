"""Triton where it is installed, and one way to launch its kernels.

Kernels are defined at import on every machine; without Triton they are plain functions that nothing calls.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    # What the definitions of kernels need; their bodies are not run.
    tl = SimpleNamespace(constexpr=object)

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on the CPU; settled when the kernels are defined."""


class Kernel(Protocol):
    """What `triton.jit` makes of a function."""

    arg_names: list[str]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        """What launches it on a grid."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What other kernels do."""


def jit(fn: Callable[..., Any]) -> Kernel:
    """`triton.jit`, or nothing at all where Triton is missing."""
    return cast(Kernel, fn) if triton is None else triton.jit(fn)


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments of one launch."""

    kernel: Kernel
    grid: tuple[int, ...]
    args: Mapping[str, object]
    constants: Mapping[str, object]
    warps: int
    stages: int


_recorder: list[Launch] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within, launches are written down in the list instead of being made; tensors may be of device meta."""
    global _recorder
    outer, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = outer


def launch(
    kernel: Kernel,
    grid: tuple[int, ...],
    args: Mapping[str, object],
    constants: Mapping[str, object],
    warps: int,
    stages: int,
) -> None:
    """Launch a kernel on the device of its first tensor; an empty grid launches nothing."""
    if 0 in grid:
        return
    if _recorder is not None:
        _recorder.append(Launch(kernel, grid, args, constants, warps, stages))
        return
    device = next(value.device for value in args.values() if isinstance(value, Tensor))
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](**args, **constants, num_warps=warps, num_stages=stages)
