"""Which implementation serves a call, and with which tiles.

Every op has an eager implementation that serves any device. A faster one is asked for by name
(`backend="triton"`), which raises where it cannot serve, or chosen by itself. The choice is a function of
dtypes, the kind of device and what `python -m dbpkern.tune` has found there, so all processes of a run on
equal machines make the same one. Where several run together, what it has found counts only if DBPKERN_CACHE
names a folder, which all of them must share.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dbpkern.ops import _triton, _tuned

BACKENDS = ("eager", "triton", "cuda")
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Operands:
    """How the operands of a product enter the tensor cores; sums are fp32 always."""

    dtype: torch.dtype
    """What each operand is rounded to in registers."""
    precision: str
    """`input_precision` of `tl.dot`."""

    @property
    def kind(self) -> str:
        """The row of the table of tiles that this is: "16bit", "tf32" or "ieee"."""
        return "16bit" if self.dtype in _HALVES else self.precision


def operands(*inputs: torch.dtype, out: torch.dtype | None = None) -> Operands:
    """The operands of a product of such inputs.

    A 16-bit input makes the product a 16-bit one, since its partner cannot add precision that it lacks, and
    so does a 16-bit result. fp32 inputs use TF32 where PyTorch may use it for its own products
    (`torch.set_float32_matmul_precision`); otherwise they stay fp32.
    """
    halves = [dtype for dtype in (*inputs, out) if dtype in _HALVES]
    if halves:
        return Operands(halves[0], "ieee")
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return Operands(torch.float32, "tf32" if allowed else "ieee")


def check_backend(backend: str | None) -> None:
    """Raise unless `backend` is None or names an implementation."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: expected None or one of {BACKENDS}, got {backend!r}")


def named_backend() -> str | None:
    """What the user asks for in the environment."""
    named = os.environ.get("DBPKERN_BACKEND") or None
    check_backend(named)
    return named


_assumed: tuple[int, int] | None = None


@contextlib.contextmanager
def assume(capability: tuple[int, int]) -> Iterator[None]:
    """Within, tensors without a device behind them (meta, fake) stand for those of such a GPU.

    For compilation ahead of time and for counting launches: (9, 0) is sm_90.
    """
    global _assumed
    outer, _assumed = _assumed, capability
    try:
        yield
    finally:
        _assumed = outer


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, or the assumed one."""
    return _assumed or torch.cuda.get_device_capability(device)


PROCESSORS = {(8, 0): 108, (9, 0): 132, (10, 0): 148}
"""Multiprocessors of A100, H100 and H200, and B200."""


def processors(device: torch.device) -> int:
    """How many multiprocessors the device has, or is assumed to have; 1 in the interpreter."""
    if _assumed is not None:
        return PROCESSORS[_assumed]
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def triton_refusal(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Why Triton cannot serve tensors of these dtypes on this device, or None."""
    if _triton.triton is None:
        return "Triton is not installed"
    if device.type != "meta":  # shapes alone, for compilation ahead of time
        if _triton.INTERPRETED:
            if device.type != "cpu":
                return f"TRITON_INTERPRET=1 serves CPU tensors alone, got {device}"
        elif device.type != "cuda":
            return f"it needs a CUDA device (or TRITON_INTERPRET=1), got {device}"
        elif torch.version.hip is not None:
            return "its kernels are made for NVIDIA GPUs"
        elif capability(device) < (8, 0):
            return "it needs compute capability 8.0 or newer"
    if torch.float64 in dtypes:
        return "it does not serve float64"
    if torch.float16 in dtypes and torch.bfloat16 in dtypes:
        return "it does not mix float16 and bfloat16"
    return None


AUTOMATIC: dict[str, str] = {
    "adamw_": "triton",
    "choose_rates_": "triton",
    "correlation": "triton",
    "fold": "triton",
    "fused_step": "triton",
    "lowrank_statistics": "triton",
    "lowrank_step_": "triton",
    "map_": "triton",
    "orthogonalize": "triton",
    "remember": "triton",
    "sample_patches_": "triton",
    "sample_rows_": "triton",
    "transform": "triton",
}
"""The backend that serves an op by itself on a GPU, if not eager. An op that is not listed, and fp32 or TF32
products, are PyTorch's, until `python -m dbpkern.tune` finds on a device that another is right and faster."""


def preferred(op: str, device: torch.device, kind: str = "16bit") -> str:
    """The backend that serves an op by itself, for a kind of operands."""
    if device.type != "cuda" or kind != "16bit":
        return "eager"
    return _found(device).backends.get(op) or AUTOMATIC.get(op, "eager")


def _found(device: torch.device | None = None) -> _tuned.Tuned:
    """What tuning has found there; nothing for a GPU that is assumed."""
    return _tuned.NOTHING if _assumed is not None else _tuned.tuned(BACKENDS, device)


def choose(op: str, requested: str, refusals: dict[str, str | None], automatic: str = "eager") -> str:
    """The backend that serves a call.

    Args:
        op: its name.
        requested: a backend by name, or "" for the automatic choice.
        refusals: for each backend of this op but eager, why it cannot serve the call, or None.
        automatic: the backend where nobody asks for one, see `preferred`.

    Raises:
        ValueError: the requested backend cannot serve the call, or the op has no such backend.
    """
    if requested:
        if requested == "eager":
            return requested
        if requested not in refusals:
            known = ", ".join(("eager", *refusals))
            raise ValueError(f"{op}: no backend {requested!r}; there are {known}")
        if refusals[requested] is not None:
            raise ValueError(f"{op}: backend {requested!r} cannot serve this call: {refusals[requested]}")
        return requested
    wanted = named_backend() or automatic
    return wanted if refusals.get(wanted, "no such backend") is None else "eager"


@dataclass(frozen=True)
class Tiles:
    """Block sizes of a product `[M, K] @ [K, N]`, and how Triton compiles it."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# Where widths are no multiples of 16, Triton loads less than 16 bytes at a time and needs more registers.
_SMALL_ODD, _SMALL = Tiles(32, 32, 16, 4, 2), Tiles(32, 32, 32, 4, 3)
_ODD, _LARGE = Tiles(64, 64, 32, 8, 2), Tiles(128, 128, 32, 8, 2)
_TENSOR_CORES = {(0, 1): _SMALL_ODD, (0, 16): _SMALL, (128, 1): _ODD, (128, 16): _LARGE}
_IEEE = {(0, 1): Tiles(32, 32, 16, 8, 2), (128, 1): Tiles(64, 64, 16, 8, 2)}

TILES: dict[tuple[str, str], dict[tuple[int, int], Tiles]] = {
    ("matmul", "16bit"): _TENSOR_CORES,
    ("matmul", "tf32"): _TENSOR_CORES,
    ("matmul", "ieee"): _IEEE,
    ("correlation", "16bit"): {**_TENSOR_CORES, (128, 16): Tiles(128, 128, 64, 8, 3)},
    ("correlation", "tf32"): {**_TENSOR_CORES, (128, 1): Tiles(64, 64, 16, 8, 2)},
    ("correlation", "ieee"): _IEEE,
    # By the width, and by the rank; either is odd where rows are not aligned.
    ("map", "16bit"): {(0, 1): Tiles(64, 64, 32, 8, 2), (0, 16): Tiles(64, 128, 32, 8, 4)},
    ("adamw", "16bit"): {(0, 1): Tiles(64, 64, 32, 8, 2), (0, 16): Tiles(64, 128, 64, 8, 3)},
    ("lowrank_map", "16bit"): {
        (0, 1): Tiles(32, 32, 16, 8, 2),
        (0, 8): Tiles(32, 32, 32, 8, 2),
        (33, 8): Tiles(64, 64, 32, 8, 3),
        (65, 1): Tiles(16, 32, 16, 8, 2),
        (65, 8): Tiles(32, 32, 32, 8, 2),
    },
    ("lowrank_adamw", "16bit"): {
        (0, 1): Tiles(32, 32, 32, 8, 2),
        (0, 8): Tiles(32, 32, 32, 4, 3),
        (33, 8): Tiles(32, 16, 32, 4, 3),
        (65, 1): Tiles(16, 16, 16, 8, 2),
        (65, 8): Tiles(32, 32, 32, 8, 2),
    },
    ("fused", "16bit"): _TENSOR_CORES,
    ("fused", "tf32"): _TENSOR_CORES,
    ("fused", "ieee"): _IEEE,
    # By the rank.
    ("lowrank", "16bit"): {(0, 8): Tiles(64, 64, 32, 8, 3), (65, 8): Tiles(64, 32, 32, 4, 2)},
    ("lowrank", "tf32"): {(0, 8): Tiles(64, 64, 32, 4, 2), (65, 8): Tiles(64, 32, 32, 4, 2)},
    ("lowrank", "ieee"): {(0, 8): Tiles(32, 32, 16, 8, 2)},
}
"""Tiles by kernel and kind of operands: `{(least width, multiple): tiles}`. None has been measured;
`python -m dbpkern.tune` finds others for the GPU at hand."""


def tiles(kernel: str, kind: str, d: int) -> Tiles:
    """The tiles of a kernel for width d: those of the most demanding row of the table that d meets."""
    rows = TILES[kernel, kind]
    row = tiles_row(kernel, kind, d)
    own = _found().tiles.get((kernel, kind), {}).get(row)
    return rows[row] if own is None else Tiles(*own)


def tiles_row(kernel: str, kind: str, d: int) -> tuple[int, int]:
    """The key of the row of the table that width d takes."""
    return max(row for row in TILES[kernel, kind] if d >= row[0] and d % row[1] == 0)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured there."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def on_device(tensor: Tensor) -> bool:
    """Whether the tensor has memory behind it: neither meta nor fake."""
    from torch._subclasses.fake_tensor import FakeTensor

    return not (tensor.is_meta or isinstance(tensor, FakeTensor))
