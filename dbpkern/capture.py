"""Which rows a layer's statistics are taken from, and where they wait for the next step.

A stock layer is sampled in its forward, by a hook: the rows are gathered, converted to the dtype of their
stack and written once, into the stack's buffer. They count once a backward has come by; a forward without
one changes nothing. A decorrelated layer, and any layer in a compiled graph, is sampled in its backward,
where its input is at hand anyway. There no Python object of ours can be reached but through the operator
`dbpkern::capture`: it gets a layer's input and its key, a small CPU tensor that names the layer's slot.
"""

import hashlib
import itertools
import struct
import warnings
import weakref
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dbpkern import distributed
from dbpkern.ops._dispatch import capturing

TURNS = 64
"""Micro-batches of one step that are sampled, at most: further ones add memory and hardly any evidence."""


class RowSource(Protocol):
    """A layer whose input can be read as rows of features."""

    def count_rows(self, x: Tensor) -> int:
        """Number of rows of the input x."""

    def take_rows(self, out: Tensor, x: Tensor, index: Tensor | None) -> None:
        """Write the rows `index` (all of them for None) of the input x into `out [n_s, d]`."""


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from integers, the same on every platform and in every process."""
    packed = struct.pack(f"<{len(parts)}q", *parts)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


class Sampler:
    """Draws one set of rows per step, micro-batch and number of rows: equal inputs share an index.

    On every `every`-th step alone, the first included.

    The draw is without replacement, on the device of the input. It is a function of (seed, rank, step,
    micro-batch, n) alone, so a resumed run draws what the interrupted one would have drawn. A CUDA graph that
    is being captured draws from the device's own generator, whose numbers are new at each replay.
    """

    def __init__(self, sample: float, seed: int, every: int = 1) -> None:
        self.sample = sample
        self.seed = seed
        self.every = every
        self.step = 0
        self.seen = False
        """Whether a layer has met an input since the last step, also on a step that is not due."""
        self.warned = False
        self._drawn: dict[tuple[int, int, torch.device], Tensor] = {}
        self._generators: dict[torch.device, torch.Generator] = {}

    @property
    def due(self) -> bool:
        """Whether this step samples."""
        return self.step % self.every == 0

    def size(self, n: int) -> int:
        """Number of rows drawn from n: `max(1, round(sample n))`, and none from none."""
        return min(n, max(1, round(self.sample * n)))

    def index(self, n: int, turn: int, device: torch.device) -> Tensor | None:
        """Row numbers `[n_s]` for micro-batch `turn` of this step, or None where every row is taken."""
        n_s = self.size(n)
        if n_s == n:
            return None
        key = (n, turn, device)
        if key not in self._drawn:
            generator = None
            # Fake tensors have a device that may not be there.
            there = device.type != "cuda" or torch.cuda.is_available()
            if there and not capturing(device):
                if device not in self._generators:
                    self._generators[device] = torch.Generator(device)
                generator = self._generators[device]
                generator.manual_seed(derive_seed(self.seed, distributed.rank(), self.step, turn, n))
            self._drawn[key] = torch.randperm(n, generator=generator, device=device)[:n_s]
        return self._drawn[key]

    def seek(self, seed: int, step: int) -> None:
        """Go to the draws of `step` under `seed`."""
        self.seed, self.step, self.seen = seed, step, False
        self._drawn.clear()

    def advance(self) -> None:
        """Go on to the next step's draws."""
        self.seek(self.seed, self.step + 1)


class RowKind:
    """What the sampled rows of a stack are: their width, and the dtype that the first gives to all."""

    def __init__(self, factor: Tensor) -> None:
        self.width = factor.shape[-2]
        self.held = factor.dtype
        self.dtype: torch.dtype | None = None

    def of(self, x: Tensor) -> torch.dtype:
        """The dtype of the stack's rows, fixed by the first input x that is sampled.

        On a GPU that of autocast, where it is on, or 16 bits as x has them: operands of tensor cores.
        Otherwise that of R.
        """
        if self.dtype is None:
            self.dtype = self.held
            if x.device.type == "cuda" and self.held == torch.float32:
                if torch.is_autocast_enabled("cuda"):
                    self.dtype = torch.get_autocast_dtype("cuda")
                elif x.itemsize == 2:
                    self.dtype = x.dtype
        return self.dtype


class _Token:
    """Lives as long as the graph of a forward whose backward may yet come."""


@dataclass
class _Part:
    """The sampled rows of one micro-batch."""

    rows: Tensor
    housed: bool
    """Whether they lie in the slot's room."""
    delivered: bool
    """Whether their backward has come."""
    token: weakref.ref[_Token] | None = None

    @property
    def waits(self) -> bool:
        """Whether its backward may yet come."""
        return not self.delivered and self.token is not None and self.token() is not None


_slots: weakref.WeakValueDictionary[int, "Slot"] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class Slot:
    """The sampled rows of one layer since the last step.

    `room` is the layer's part `[capacity, d]` of its stack's buffer: once the buffer has been made, after the
    first step, rows are written there and never again. It moves only when more rows come than ever before.

    A layer in the applied form brings `-M R` of its rows with them, from `ops.fused_step`.
    """

    kind: RowKind
    """Of the stack, which sets it."""

    def __init__(self, layer: RowSource, sampler: Sampler) -> None:
        self.layer = layer
        self.sampler = sampler
        self.linear = False
        """Whether R's step is linear in M, so that the applied form may bring it."""
        self.kappa = 0.0
        number = next(_numbers)
        # On the CPU, so that reading it never waits for a device, and a tensor, so that compiled graphs
        # take it as an input instead of a constant to guard on.
        self.key = torch.tensor([number])
        self.room: Tensor | None = None
        self.clear()
        _slots[number] = self

    def clear(self) -> None:
        """Forget the rows; the room stays."""
        self._parts: list[_Part] = []
        self._open = False
        self._moved: Tensor | None = None
        self._moved_rows = 0

    def settle(self) -> None:
        """The step is made. Its rows stay for `loss()`, those of an older one do not."""
        if self._open:
            self._open, self._moved = False, None
        else:
            self.clear()

    @property
    def pending(self) -> bool:
        """Whether rows were sampled, and their backward came, since the last step."""
        return self._open and any(part.delivered for part in self._parts)

    def count(self, stale: bool = False) -> int:
        """Number of rows sampled since the last step; with `stale`, those of the last step otherwise."""
        if not (self._open or stale):
            return 0
        return sum(len(part.rows) for part in self._parts if part.delivered)

    def in_room(self, count: int) -> bool:
        """Whether the first `count` rows of the room are the sampled ones."""
        found = 0
        for part in self._parts:
            if not (part.housed and part.delivered):
                break
            found += len(part.rows)
        return found == count and self.room is not None

    def gather(self) -> Tensor:
        """All rows, `[n, d]`, wherever they are."""
        return torch.cat([part.rows for part in self._parts if part.delivered])

    def house(self, room: Tensor) -> None:
        """Take `room`, which holds all rows that count already, as the place for them and for later ones."""
        waiting = [part for part in self._parts if part.waits]
        for part in waiting:
            part.housed = False  # it lies in the room before this one
        self.room, self._parts = room, [_Part(room, True, True), *waiting]

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Sample the rows of one micro-batch's input, in its backward."""
        self.sampler.seen = True
        if self.sampler.due:
            part = self._sample(x)
            if part is not None:
                part.delivered = True

    @torch.no_grad()
    def add_moved(self, x: Tensor, index: Tensor, moved: Tensor) -> None:
        """Take the rows `index` of x together with what R moves by, in their backward."""
        self.sampler.seen = True
        part = self._begin(len(index), x)
        if part is None:
            return
        self.layer.take_rows(part.rows, x, index)
        part.delivered = True
        self._moved = moved * len(index) if self._moved is None else self._moved.add_(moved, alpha=len(index))
        self._moved_rows += len(index)

    def moves(self) -> Tensor | None:
        """`-M R` of all rows, or None where some of them came without."""
        if self._moved is None or self._moved_rows != self.count():
            return None
        return self._moved / self._moved_rows

    def forward(self, x: Tensor, output: Tensor) -> None:
        """Sample x in the forward that made `output` of it; the rows count once its backward comes."""
        self.sampler.seen = True
        if not self.sampler.due:
            return
        repeats = torch._C._current_graph_task_id() != -1  # for activation checkpointing, in a backward
        if repeats and self._open and any(part.waits for part in self._parts):
            return  # the first forward has sampled the same rows
        with torch.no_grad():
            part = self._sample(x.detach())
        if part is None:
            return
        token = _Token()
        part.token = weakref.ref(token)

        def deliver(_: Tensor, token: _Token = token) -> None:
            part.delivered = True

        # Not an autograd function around the output: that would be a view, which others may not change in
        # place. A hook on a view is lost when its base changes, so it goes on the base.
        base = output._base
        (base if base is not None and base.requires_grad else output).register_hook(deliver)

    def deliver(self) -> None:
        """Count all rows as if their backward had come, where there can be none (on fake tensors)."""
        for part in self._parts:
            part.delivered = True

    def draw(self, n: int, device: torch.device) -> Tensor | None:
        """The rows out of n that the next micro-batch samples; None for all."""
        return self.sampler.index(n, len(self._parts) if self._open else 0, device)

    def _sample(self, x: Tensor) -> _Part | None:
        n = self.layer.count_rows(x)
        if not n:
            return None
        index = self.draw(n, x.device)
        part = self._begin(n if index is None else len(index), x)
        if part is not None:
            self.layer.take_rows(part.rows, x, index)
        return part

    def _begin(self, n: int, x: Tensor) -> _Part | None:
        """Room for n rows of x; None where so many micro-batches have come that no more are sampled."""
        if not self._open:  # the first since the last step, whose rows were kept for loss()
            self.clear()
            self._open = True
        # Forwards whose graph is gone will have no backward.
        while self._parts and not (self._parts[-1].delivered or self._parts[-1].waits):
            self._parts.pop()
        if len(self._parts) >= TURNS:
            if len(self._parts) == TURNS and not self.sampler.warned:
                self.sampler.warned = True
                warnings.warn(
                    f"{TURNS} micro-batches were sampled since the last step, and further ones are not. If "
                    "the optimizer that holds this model's R is not the one that steps, R rests",
                    stacklevel=2,
                )
            return None
        dtype = self.kind.of(x)
        start = sum(len(part.rows) for part in self._parts) if all(p.housed for p in self._parts) else None
        if (
            start is not None
            and self.room is not None
            and start + n <= len(self.room)
            and self.room.dtype == dtype
            and self.room.device == x.device
        ):
            part = _Part(self.room[start : start + n], True, False)
        else:
            part = _Part(torch.empty(n, self.kind.width, dtype=dtype, device=x.device), False, False)
        self._parts.append(part)
        return part


def slot_of(key: Tensor) -> Slot | None:
    """The slot that `key` names; None if its owner is gone."""
    return _slots.get(int(key))


def capture_rows(x: Tensor, key: Tensor) -> None:
    """Sample the rows of x for the slot that `key` names; nothing if its owner is gone."""
    slot = slot_of(key)
    if slot is not None:
        slot.add(x)


# A compiler drops a call that changes nothing, so the weight's gradient, which every step needs, is declared
# as changed. It is left as it is, in place. A counter of our own would not do: it would have to live
# through the forward, where autograd refuses tensors that another backward has changed since.
# Kept out of CUDA graphs: a replay would not call it.
@torch.library.custom_op("dbpkern::capture", mutates_args=("grad",), tags=(torch.Tag.cudagraph_unsafe,))
def _capture(grad: Tensor, x: Tensor, key: Tensor) -> None:
    capture_rows(x, key)


@_capture.register_fake
def _(grad: Tensor, x: Tensor, key: Tensor) -> None:
    return None


class Tap(torch.autograd.Function):
    """Passes a weight, or in compiled graphs an output, through; its backward samples the input x.

    Backward rather than forward: it runs once per backward also where activation checkpointing repeats
    the forward, and never under `no_grad`. On the weight rather than the input: the first layer's input
    needs no gradient, and R must rest where W is frozen.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, key: Tensor) -> Tensor:  # noqa: D102
        # Not with setup_context: apply() would then inspect this signature at every call, per layer.
        ctx.save_for_backward(x)
        ctx.key = key
        return weight.detach()  # a view could not be changed in place by what comes next

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: D102
        (x,) = ctx.saved_tensors
        if torch.compiler.is_compiling():
            torch.ops.dbpkern.capture(grad, x, ctx.key)
        else:  # saves the dispatch of a Python operator per layer
            capture_rows(x, ctx.key)
        return grad, None, None


class MovedTap(torch.autograd.Function):
    """As `Tap`, for an input whose sampled rows have said already what R moves by."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, weight: Tensor, x: Tensor, index: Tensor, moved: Tensor, key: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, index, moved)
        ctx.key = key
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # noqa: D102
        slot = slot_of(ctx.key)
        if slot is not None and slot.sampler.due:
            slot.add_moved(*ctx.saved_tensors)
        return grad, None, None, None, None
