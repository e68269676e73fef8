"""Which implementation serves a call, and with which tiles.

Every op has an eager implementation that serves any device. A faster one is asked for by name
(`backend="triton"`), which raises where it cannot serve, or chosen by itself: where it can serve and the
thresholds of `dbpkern/configs/` say that it pays. The choice is a function of shapes, dtypes and the kind of
device alone, so all processes of a run make the same one.
"""

import contextlib
import functools
import importlib.resources
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from dbpkern.ops import _triton

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
        """The row of the tables that this is: "16bit", "tf32" or "ieee"."""
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
        elif torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs compute capability 8.0 or newer"
    if torch.float64 in dtypes:
        return "it does not serve float64"
    if torch.float16 in dtypes and torch.bfloat16 in dtypes:
        return "it does not mix float16 and bfloat16"
    return None


def choose(
    op: str, requested: str, refusals: dict[str, str | None], preferred: Callable[[], str] = lambda: "eager"
) -> str:
    """The backend that serves a call.

    Args:
        op: its name, for messages.
        requested: a backend by name, or "" for the automatic choice.
        refusals: for each backend of this op but eager, why it cannot serve the call, or None.
        preferred: says what is best for this call; asked unless the user has said it.

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
    named = named_backend()
    if not named and all(refusals.values()):
        return "eager"
    wanted = named or preferred()
    return wanted if refusals.get(wanted, "no such backend") is None else "eager"


@dataclass(frozen=True)
class Tiles:
    """Block sizes of a product `[M, K] @ [K, N]`, and how Triton compiles it."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


_assumed = "default"


@contextlib.contextmanager
def assume(name: str) -> Iterator[None]:
    """Within, tensors of device meta stand for those of an architecture: for compilation ahead of time."""
    global _assumed
    outer, _assumed = _assumed, name
    try:
        yield
    finally:
        _assumed = outer


def architecture(device: torch.device) -> str:
    """Name of the table of a device: "sm_90", or "default" where there is none of its own."""
    if device.type == "meta":
        return _assumed
    if device.type != "cuda":
        return "default"
    major, minor = torch.cuda.get_device_capability(device)
    name = f"sm_{major}{minor}"
    return name if name in architectures() else "default"


@functools.cache
def architectures() -> tuple[str, ...]:
    """The tables there are."""
    files = importlib.resources.files("dbpkern").joinpath("configs").iterdir()
    return tuple(sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json")))


@functools.cache
def table(name: str) -> dict:
    """A table of `dbpkern/configs/`: {"measured": ..., "tiles": {...}, "triton": {...}}."""
    file = importlib.resources.files("dbpkern").joinpath("configs", f"{name}.json")
    return json.loads(file.read_text())


def _row(name: str, section: str, op: str, kind: str) -> object:
    """What a table says, or the default table in its place."""
    found = table(name)[section].get(op, {})
    return found[kind] if kind in found else table("default")[section].get(op, {}).get(kind)


def rows(name: str, op: str, kind: str) -> list[dict[str, int]]:
    """The rows of tiles of an architecture's table.

    Each serves widths from its "min_d" on that are multiples of its "multiple": Triton loads 16 bytes at a
    time where strides are multiples of 16, and needs more registers, so smaller tiles, where they are not.
    """
    return _row(name, "tiles", op, kind)


def candidates(name: str, op: str, kind: str, d: int) -> list[tuple[tuple[int, int], Tiles]]:
    """The tiles of a table that can serve width d, with their demands on it."""
    return [
        (
            (row["min_d"], row["multiple"]),
            Tiles(*(row[field] for field in ("m", "n", "k", "warps", "stages"))),
        )
        for row in rows(name, op, kind)
        if d >= row["min_d"] and d % row["multiple"] == 0
    ]


_tuned: dict[tuple[str, str, int], Tiles] = {}
"""Tiles that `_tuning` has found or is trying, by kernel, kind of operands and width."""


def tiles(op: str, kind: str, d: int, device: torch.device) -> Tiles:
    """The tiles of a kernel for width d: those of the most demanding row of the table that d meets."""
    if (op, kind, d) in _tuned:
        return _tuned[op, kind, d]
    serving = candidates(architecture(device), op, kind, d)
    return max(serving, key=lambda found: found[0])[1]


def pays(op: str, kind: str, device: torch.device, **sizes: int) -> bool:
    """Whether Triton pays for a call of these sizes: every `min_<size>` of the table is reached.

    A kind of operands that the table does not list never pays.
    """
    if device.type != "cuda":
        return False
    limits = _row(architecture(device), "triton", op, kind)
    if limits is None:
        return False
    return all(sizes[name.removeprefix("min_")] >= least for name, least in limits.items())
