"""The gate of every kernel's figure: its error against fp64, next to that of PyTorch with the same dtypes."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

HALVES = (torch.float16, torch.bfloat16)


def round_tf32(x: Tensor) -> Tensor:
    """An fp32 tensor with the 10 bits of mantissa that TF32 keeps, rounded to nearest."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


ROUNDING: dict[str, Callable[[Tensor], Tensor]] = {
    "ieee": lambda x: x,
    "tf32": round_tf32,
    "16bit": lambda x: x.bfloat16().float(),
}
"""What happens to an fp32 operand of a product, by the kind of the operands."""


class RoundedOperands(TorchFunctionMode):
    """Within, operands of fp32 matrix products are rounded as tensor cores do; sums stay fp32.

    So the specification, run in fp32, has the error that PyTorch has with such operands, on any device.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.round = ROUNDING[kind]

    def __torch_function__(self, function, types, args=(), kwargs=None) -> object:
        if getattr(function, "__name__", "") in ("matmul", "bmm", "mm"):
            a, b = args
            args = (self.round(a), self.round(b))
        return function(*args, **(kwargs or {}))


def error(found: Tensor, truth: Tensor) -> float:
    """Largest difference from an fp64 truth, relative to its largest value.

    Infinite where the shape is another one or anything is not finite.
    """
    if found.shape != truth.shape:
        return float("inf")
    difference = (found.double() - truth).abs().max()
    if not difference.isfinite():
        return float("inf")
    scale = truth.abs().max()
    return float(difference / scale if scale > 0 else difference)


def limit(yardstick: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    """The largest error allowed: twice the yardstick's and four units in the last place of the largest value.

    Args:
        yardstick: the specification in fp32 with the operands' dtypes, not yet rounded to `dtype`.
        truth: the specification in fp64.
        dtype: of the result that is judged.
    """
    return 2 * error(yardstick.to(dtype), truth) + 4 * torch.finfo(dtype).eps
