"""Which rows a layer's statistics are taken from, and where they wait for the next step.

The sample is drawn in a layer's backward, where its input is at hand anyway. There, under autograd and
inside compiled graphs, no Python object of ours can be reached but through the operator
`dbpkern::capture`: it gets a layer's input and its key, a small CPU tensor that names the layer's slot.
"""

import hashlib
import itertools
import struct
import weakref
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dbpkern import distributed


class RowSource(Protocol):
    """A layer whose input can be read as rows of features."""

    def count_rows(self, x: Tensor) -> int:
        """Number of rows of the input x."""

    def take_rows(self, x: Tensor, index: Tensor | None) -> Tensor:
        """The rows `index` (all of them for None) of the input x, `[n_s, d]`."""


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from integers, the same on every platform and in every process."""
    packed = struct.pack(f"<{len(parts)}q", *parts)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


class Sampler:
    """Draws one set of rows per step, micro-batch and number of rows: equal inputs share an index.

    On every `every`-th step alone, the first included.

    The draw is without replacement, on the device of the input. It is a function of (seed, rank, step,
    micro-batch, n) alone, so a resumed run draws what the interrupted one would have drawn.
    """

    def __init__(self, sample: float, seed: int, every: int = 1) -> None:
        self.sample = sample
        self.seed = seed
        self.every = every
        self.step = 0
        self._drawn: dict[tuple, Tensor] = {}
        self._generators: dict[torch.device, torch.Generator] = {}

    @property
    def arguments(self) -> tuple[float, int, int]:
        """What it was made with."""
        return self.sample, self.seed, self.every

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
            generator = self._generators.get(device)
            if generator is None:
                generator = self._generators[device] = torch.Generator(device)
            generator.manual_seed(derive_seed(self.seed, distributed.rank(), self.step, turn, n))
            self._drawn[key] = torch.randperm(n, generator=generator, device=device)[:n_s]
        return self._drawn[key]

    def seek(self, seed: int, step: int) -> None:
        """Go to the draws of `step` under `seed`."""
        self.seed, self.step = seed, step
        self._drawn.clear()

    def advance(self) -> None:
        """Go on to the next step's draws."""
        self.seek(self.seed, self.step + 1)


_slots: weakref.WeakValueDictionary[int, "Slot"] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class Rule(NamedTuple):
    """The rate and kappa of a step; a tensor counts as another rate once it has been written to."""

    lr: float | Tensor
    kappa: float
    version: int

    @classmethod
    def of(cls, lr: float | Tensor, kappa: float) -> "Rule":
        """The rule as it stands."""
        return cls(lr, kappa, lr._version if isinstance(lr, Tensor) else 0)

    def same(self, other: "Rule") -> bool:
        """Whether both make the same step, as far as can be told without reading a device's memory."""
        lr = self.lr is other.lr if isinstance(self.lr, Tensor) else self.lr == other.lr
        return lr and self.kappa == other.kappa and self.version == other.version


class Proposal(NamedTuple):
    """The R that a layer's forward has made beside its output, for the step to take over."""

    R: Tensor
    """`[d, d]`, after the step."""
    rows: int
    """How many sampled rows it comes from."""
    rule: Rule
    base: tuple[int, int]
    """Address and version of the R it started from."""


class Slot:
    """The sampled rows of one layer since the last step.

    `room` is the layer's part `[capacity, d]` of its stack's sample buffer; in the steady state every
    capture lands there and nothing is copied again. Rows that do not fit wait in `spill`.

    A layer in the applied form brings the step's result with its rows: `proposal`, as long as that stands for
    all rows of the step.
    """

    def __init__(self, layer: RowSource, sampler: Sampler, rule: Callable[[], Rule | None]) -> None:
        self.layer = layer
        self.sampler = sampler
        self.rule = rule
        number = next(_numbers)
        # On the CPU, so that reading it never waits for a device, and a tensor, so that compiled graphs
        # take it as an input instead of a constant to guard on.
        self.key = torch.tensor([number])
        self.room: Tensor | None = None
        self.clear()
        _slots[number] = self

    def clear(self) -> None:
        """Forget the rows; the room stays."""
        self._forget_rows()
        self.forwards = 0

    def settle(self) -> None:
        """The step is made. Its rows stay for `loss()`, those of an older one do not."""
        if self.pending:
            self.pending, self.proposal, self.forwards = False, None, 0
        else:
            self.clear()

    def _forget_rows(self) -> None:
        self.turn = 0
        self.used = 0
        self.spill: list[Tensor] = []
        self.pending = False
        self.proposal: Proposal | None = None

    def count(self, stale: bool = False) -> int:
        """Number of rows sampled since the last step; with `stale`, those of the last step otherwise."""
        return self.used + sum(len(rows) for rows in self.spill) if self.pending or stale else 0

    def gather(self) -> Tensor:
        """All rows, `[n, d]`, wherever they are."""
        return torch.cat(([self.room[: self.used]] if self.used else []) + self.spill)

    def house(self, room: Tensor) -> None:
        """Take `room`, which holds all rows already, as the place for them and for later ones."""
        self.room, self.used, self.spill = room, len(room), []

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Sample the rows of one micro-batch's input, on a step that is due."""
        if not self.sampler.due:
            return
        self._begin()
        n = self.layer.count_rows(x)
        if n:
            self._keep(self.layer.take_rows(x, self.sampler.index(n, self.turn, x.device)))
            self.proposal = None  # it would lack these rows

    @torch.no_grad()
    def add_rows(self, rows: Tensor) -> None:
        """Take rows that were sampled in a forward, on a step that is due."""
        if not self.sampler.due:
            return
        self._begin()
        self._keep(rows)
        self.proposal = None  # it would lack these rows

    @torch.no_grad()
    def add_proposed(self, rows: Tensor, proposal: Proposal) -> None:
        """Take sampled rows together with the R that they lead to."""
        self._begin()
        before = self.used + sum(len(part) for part in self.spill)
        self._keep(rows)
        if not before:
            self.proposal = proposal
        elif self.proposal is not None:
            # R - lr M R is linear in M: the R of all rows is the mean of those of the parts.
            old, new = self.proposal, proposal
            same = old.rule.same(new.rule) and old.base == new.base and old.rows == before
            total = old.rows + new.rows
            self.proposal = (
                new._replace(R=torch.lerp(old.R, new.R, new.rows / total), rows=total) if same else None
            )

    def proposes(self) -> bool:
        """Whether this step's R follows from the rows alone, without a limiter or a normalisation."""
        return self.sampler.due and self.rule() is not None

    def draw(self, n: int, device: torch.device) -> Tensor | None:
        """The rows out of n that the micro-batch of a forward samples; None for all.

        Forwards count from the last step on, like the backwards that follow them. One that runs within a
        backward repeats an earlier one, for activation checkpointing.
        """
        turn = self.turn if self.pending else 0
        if torch._C._current_graph_task_id() == -1:
            turn = max(turn, self.forwards)
            self.forwards = turn + 1
        return self.sampler.index(n, turn, device)

    def _begin(self) -> None:
        if not self.pending:  # the first since the last step, whose rows were kept for loss()
            self._forget_rows()
            self.pending = True

    def _keep(self, rows: Tensor) -> None:
        self.turn += 1
        end = self.used + len(rows)
        fits = (
            not self.spill
            and self.room is not None
            and end <= len(self.room)
            and self.room.dtype == rows.dtype
            and self.room.device == rows.device
        )
        if fits:
            self.room[self.used : end].copy_(rows)
            self.used = end
        else:
            self.spill.append(rows)


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
    """Passes a weight through; its backward samples the input the weight was used with.

    Backward rather than forward: it runs once per backward also where activation checkpointing repeats
    the forward, and never under `no_grad`. On the weight rather than the input: the first layer's input
    needs no gradient, and R must rest where W is frozen.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, x: Tensor, key: Tensor) -> Tensor:  # noqa: D102
        # Not with setup_context: apply() would then inspect this signature at every call, per layer.
        ctx.save_for_backward(x)
        ctx.key = key
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: D102
        (x,) = ctx.saved_tensors
        if torch.compiler.is_compiling():
            torch.ops.dbpkern.capture(grad, x, ctx.key)
        else:  # saves the dispatch of a Python operator per layer
            capture_rows(x, ctx.key)
        return grad, None, None


class ForwardTap(torch.autograd.Function):
    """Passes a tensor through; its backward delivers rows that were sampled in the forward.

    They count only once the backward has come by: a forward without one changes nothing.
    """

    @staticmethod
    def forward(ctx, passed: Tensor, rows: Tensor, key: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(rows)
        ctx.key = key
        return passed.view_as(passed)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: D102
        (rows,) = ctx.saved_tensors
        slot = slot_of(ctx.key)
        if slot is not None:
            slot.add_rows(rows)
        return grad, None, None


class ProposingTap(torch.autograd.Function):
    """As `ForwardTap` on a weight, for rows that come with the R that they lead to."""

    @staticmethod
    def forward(ctx, weight: Tensor, rows: Tensor, proposal: Proposal, key: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(rows, proposal.R)
        ctx.proposal = proposal._replace(R=None)
        ctx.key = key
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: D102
        rows, R = ctx.saved_tensors
        slot = slot_of(ctx.key)
        if slot is not None:
            slot.add_proposed(rows, ctx.proposal._replace(R=R))
        return grad, None, None, None
