"""R in stacks of equal kind, and what a step does to a stack.

A stack takes the sampled rows of its sites from `dbpkern.capture`, and updates their R together: statistics,
rates under the limiter, the update; averaged over processes where there are several.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from dbpkern import distributed, ops
from dbpkern.capture import RowKind, RowSource, Sampler, Slot
from dbpkern.sites import Shares
from dbpkern.structure import Full, LowRank

HALVES = (torch.float16, torch.bfloat16)


class Holder(RowSource, Shares, Protocol):
    """A layer that holds an R: a decorrelated one, or a stock layer with an R beside it."""

    structure: Full | LowRank

    @property
    def weight(self) -> Tensor:
        """What R acts on, `[o, ...]`."""

    @property
    def trains(self) -> bool:
        """Whether the weight is trained; R rests where it is not."""

    @property
    def slot_key(self) -> Tensor | None:
        """The key of the slot that samples go to, or None."""

    def attach(self, slot: Slot | None, samples: bool = True) -> None:
        """Belong to `slot` from now on, and send samples there if this layer is to; None ends both."""


@dataclass(frozen=True)
class Step:
    """What one step does to every R."""

    eta: float | Tensor
    """The rate before the limiter, times the steps that it stands for."""
    kappa: float
    scale_free: bool
    limit: float | None
    keep: Tensor | None = None
    """0-d, 1 or 0: whether the step counts, where only the device knows. None for one that does."""
    lowrank: list[tuple[Tensor, ...]] = field(default_factory=list)
    """Low-rank R with their statistics, as `ops.lowrank_step_` takes them: one call steps all stacks."""

    @property
    def linear(self) -> bool:
        """Whether the step is linear in M."""
        return self.limit is None and not self.scale_free


class Site:
    """One R: the layers that hold it (several where projections share an input) and their samples."""

    def __init__(self, name: str, layer: Holder, sampler: Sampler) -> None:
        self.name = name
        self.layers = [layer]
        self.source = layer
        """The layer that is sampled."""
        self.slot = Slot(layer, sampler)
        self.caution = torch.ones_like(layer.factors[0][0, 0])
        """By what the rate of this R is multiplied: halved when its samples were not finite."""

    def choose_source(self) -> None:
        """Sample from a layer whose weight trains, if any does: one sample of a common input is enough."""
        self.source = next((layer for layer in self.layers if layer.trains), self.layers[0])
        self.slot.layer = self.source
        for layer in self.layers:
            layer.attach(self.slot, layer is self.source)

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The tensors that hold the R: one, or Q and S."""
        return self.layers[0].factors

    @property
    def kind(self) -> tuple[Any, ...]:
        """What sites must agree in to lie in one stack."""
        return (type(self.layers[0].structure), *((f.shape, f.dtype, f.device) for f in self.factors))

    def bind(self, factors: tuple[Tensor, ...]) -> None:
        """Let all layers hold these tensors."""
        for layer in self.layers:
            layer.factors = factors


class Stack:
    """Sites whose R are of one kind; the factors of all lie in one tensor each, with the layer in front."""

    traffic: distributed.Traffic | None = None
    """What this process sent in the last step, where there are several processes."""
    halves = False
    """Whether all processes sample rows of 16 bits on GPUs; known where there are several processes."""

    def __init__(self, sites: list[Site]) -> None:
        self.sites = sites
        with torch.no_grad():
            self.factors = tuple(
                torch.stack(parts) for parts in zip(*(site.factors for site in sites), strict=True)
            )
        for site, *factors in zip(sites, *self.factors, strict=True):
            site.bind(tuple(factors))
        like = self.factors[0]
        self.caution = torch.stack(
            [torch.ones_like(like[0, 0, 0]) if c.is_meta else c.to(like) for c in (s.caution for s in sites)]
        )
        self.rates = torch.zeros_like(self.caution)
        kind = RowKind(like)
        for site, caution in zip(sites, self.caution, strict=True):
            site.caution = caution
            site.slot.kind = kind
        self.samples: dict[tuple[int, int], Tensor] = {}

    def holds(self) -> bool:
        """Whether the layers' factors still are the parts of this stack."""
        return all(
            part._base is whole and part.dtype == whole.dtype
            for site in self.sites
            for layer in site.layers
            for part, whole in zip(layer.factors, self.factors, strict=True)
        )

    def step(self, step: Step) -> Iterator[None]:
        """Update every R from the rows sampled since the last step; yields before each wait for others."""
        if distributed.world_size() > 1:
            yield from self.step_together(step)
        else:
            self.step_alone(step)

    def step_alone(self, step: Step) -> None:
        """The step of one process."""
        raise NotImplementedError

    def step_together(self, step: Step) -> Iterator[None]:
        """The step of many processes; yields once it has sent what it needs the others for."""
        raise NotImplementedError

    def decorrelated(self, where: slice, rows: Tensor) -> Tensor:
        """z of the rows `[L', n, d]` of the sites `where`."""
        raise NotImplementedError

    def losses(self, kappa: float, stale: bool) -> tuple[Tensor, Tensor]:
        """Decorrelation losses `[L]` of the rows of all processes, and the numbers of rows `[L]`."""
        if distributed.world_size() > 1:
            # Sums of squares over rows that lie on different processes need the correlations themselves.
            off, a, counts = self.correlations(0.0, stale).wait()
            return _loss(off.square().sum((1, 2)), a, kappa), counts
        like = self.factors[0]
        losses, counts = like.new_zeros(len(self.sites)), like.new_zeros(len(self.sites))
        for where, rows in self.runs(stale):
            losses[where] = _loss_of_rows(self.decorrelated(where, rows), kappa)
            counts[where] = rows.shape[1]
        return losses, counts

    def correlations(self, kappa: float, stale: bool = False, owner: bool = False) -> distributed.Transfer:
        """M `[L, d, d]`, a `[L, d]` and row counts `[L]`, on their way from many processes.

        Layers without rows here still take part: other processes may have some. With `owner`, those of the
        layers alone that this process owns.
        """
        L, d, _ = self.factors[0].shape
        M, a, counts = (self.factors[0].new_zeros(L, *shape) for shape in ((d, d), (d,), ()))
        for where, rows in self.runs(stale):
            M[where], a[where], _ = ops.correlation(self.decorrelated(where, rows), kappa)
            counts[where] = rows.shape[1]
        return distributed.average_statistics(M, a, counts, owner)

    def runs(self, stale: bool = False) -> list[tuple[slice, Tensor]]:
        """The samples: (which sites, their rows `[L', n, d]`) for each run of sites with equal n > 0.

        Rows from before the last step count only with `stale`.
        """
        found = []
        start = 0
        for count, group in groupby(self.sites, key=lambda site: site.slot.count(stale)):
            sites = list(group)
            where = slice(start, start + len(sites))
            start = where.stop
            if count:
                found.append((where, self._rows(where, sites, count)))
        return found

    def _rows(self, where: slice, sites: list[Site], count: int) -> Tensor:
        buffer = self.samples.get((where.start, where.stop))
        if buffer is None or not all(
            site.slot.in_room(count) and site.slot.room is not None and site.slot.room._base is buffer
            for site in sites
        ):
            # The first step, or more rows than before: gather once, and give every site its room in the
            # new buffer, where later rows are written at once.
            buffer = torch.stack([site.slot.gather() for site in sites])
            self.samples = {
                k: v for k, v in self.samples.items() if k[1] <= where.start or k[0] >= where.stop
            }
            self.samples[where.start, where.stop] = buffer
            for site, part in zip(sites, buffer.unbind(), strict=True):
                site.slot.house(part)
        rows, like = buffer[:, :count], self.factors[0]
        # As they are in 16 bits. Otherwise in R's dtype, which may have changed since they were sampled.
        return rows if rows.dtype in HALVES else rows.to(like.device, like.dtype)


class FullStack(Stack):
    """R `[L, d, d]`."""

    def step_together(self, step: Step) -> Iterator[None]:  # noqa: D102
        (R,) = self.factors
        L, d, _ = R.shape
        mode = distributed.choose_mode(L, d, R.itemsize, R.device.type)
        owner = mode == "owner"
        statistics = self.correlations(step.kappa, owner=owner)
        sent = statistics.sent
        yield
        M, a, _ = statistics.wait()
        self._apply(distributed.own_layers(L) if owner else slice(None), M, a, step)
        if owner:
            gathered = distributed.gather_layers([R, self.caution, self.rates])
            sent += gathered.sent
            del statistics, M, a  # more than R itself; others may still compute
            yield
            gathered.wait()
        self.traffic = distributed.Traffic((L, d, d), mode, sent)

    def step_alone(self, step: Step) -> None:  # noqa: D102
        (R,) = self.factors
        for where, rows in self.runs():
            sites = self.sites[where] if step.linear else []
            moves = [move for site in sites if (move := site.slot.moves()) is not None]
            if sites and len(moves) == len(sites):
                self._move(where, torch.stack(moves), step)
                continue
            z = self.decorrelated(where, rows)
            n, d = z.shape[1:]
            if n < d and step.linear and z.itemsize > 2:
                self._associate(where, z, step)
                continue
            dtype = torch.bfloat16 if z.itemsize == 2 else None
            M, a, bound = ops.correlation(z, step.kappa, step.scale_free, dtype)
            ops.apply_(R[where], M, self._choose_rates(where, a, bound, step))

    def _choose_rates(self, where: slice, a: Tensor, bound: Tensor, step: Step) -> Tensor:
        """The rates `[L']` of the sites `where`, see `ops.choose_rates_`."""
        limited = None if step.limit is None else bound
        eta = step.eta if step.keep is None else step.eta * step.keep
        return ops.choose_rates_(self.caution[where], self.rates[where], a, limited, eta, step.limit)

    def _associate(self, where: slice, z: Tensor, step: Step) -> None:
        """Step the sites `where` by fewer rows than features: M need not be formed."""
        R = self.factors[0][where]
        # Finite where M R is, too: without a limiter, R may have grown very large.
        size = z.square().sum((1, 2)) * R.abs().amax((1, 2))
        rates = self._choose_rates(where, size[:, None], size, step)
        ops.update_(R, z.masked_fill(~size.isfinite()[:, None, None], 0.0), rates, step.kappa)

    def _move(self, where: slice, moves: Tensor, step: Step) -> None:
        """Step the sites `where` by `-M R [L', d, d]`, which their forwards have made."""
        size = moves.abs().sum((1, 2))
        rates = self._choose_rates(where, size[:, None], size, step)
        moves.masked_fill_(~size.isfinite()[:, None, None], 0.0)
        self.factors[0][where].addcmul_(moves, rates[:, None, None])

    def _apply(self, where: slice, M: Tensor, a: Tensor, step: Step) -> None:
        """Step the sites `where` by the averages M `[L', d, d]`, which is used up, and a `[L', d]`."""
        if step.scale_free:
            scale_free_(M, a)
        M.masked_fill_(~M.isfinite(), 0.0)
        rates = self._choose_rates(where, a, eigenvalue_bound(M), step)
        # In 16 bits where rows are, M and R are the operands that they are with one process.
        ops.apply_(self.factors[0][where], M.bfloat16() if self.halves else M, rates)

    def decorrelated(self, where: slice, rows: Tensor) -> Tensor:  # noqa: D102
        return ops.transform(rows, self.factors[0][where])


class LowRankStack(Stack):
    """Q `[L, d, r]` and S `[L, r, r]`."""

    def step_together(self, step: Step) -> Iterator[None]:  # noqa: D102
        # No owners: to send Q and S takes the bytes that they would save of the statistics, and the update is
        # small, many short operations whose time hardly depends on the number of layers.
        statistics = self._statistics()
        yield
        B, Y, c, _ = statistics.wait()
        self._queue(slice(None), B, Y, c, step)
        self.traffic = distributed.Traffic(tuple(Y.shape), "all-reduce", statistics.sent)

    def step_alone(self, step: Step) -> None:  # noqa: D102
        for where, rows in self.runs():
            self._queue(where, *ops.lowrank_statistics(rows, self.factors[0][where]), step)

    def _queue(self, where: slice, B: Tensor, Y: Tensor, c: Tensor, step: Step) -> None:
        """Leave the sites `where` and their statistics for `Engine.step`, which moves all at once."""
        if step.keep is not None:  # as without rows
            B, Y, c = (statistic * step.keep for statistic in (B, Y, c))
        changed = (part[where] for part in (*self.factors, self.caution, self.rates))
        step.lowrank.append((*changed, B, Y, c))

    def _statistics(self) -> distributed.Transfer:
        """B, Y, c and row counts of the whole stack, on their way from all processes."""
        Q, S = self.factors
        B, Y, c = torch.zeros_like(S), torch.zeros_like(Q), torch.zeros_like(Q[:, :, 0])
        counts = Q.new_zeros(len(Q))
        for where, rows in self.runs():
            B[where], Y[where], c[where] = ops.lowrank_statistics(rows, Q[where])
            counts[where] = rows.shape[1]
        return distributed.average_lowrank_statistics(B, Y, c, counts)

    def decorrelated(self, where: slice, rows: Tensor) -> Tensor:  # noqa: D102
        Q, S = self.factors
        return ops.lowrank_transform(rows.to(Q.dtype), Q[where], S[where])


STACKS = {Full: FullStack, LowRank: LowRankStack}


def scale_free_(M: Tensor, a: Tensor) -> Tensor:
    """Divide `M [L, d, d]` by `a_i + a_j`, in place, for the mean squares `a [L, d]` of z; returns M.

    Near a diagonal G every correlation then shrinks by `1 - eta` a step, whatever the variances. Features
    without variance have no correlations; their rows of M become zero.
    """
    unit = a[:, :, None] + a[:, None, :]
    return M.div_(unit.masked_fill_(unit == 0, torch.inf))


def eigenvalue_bound(M: Tensor) -> Tensor:
    """Upper bounds `[L]` of the largest absolute eigenvalues of symmetric `M [L, d, d]`.

    The smaller of the Frobenius norm and the largest absolute row sum.
    """
    return torch.minimum(torch.linalg.matrix_norm(M), torch.linalg.matrix_norm(M, ord=torch.inf))


def _loss(off: Tensor, a: Tensor, kappa: float) -> Tensor:
    """The losses `[L]` from `||offdiag G||_F^2 [L]` and `diag G [L, d]`."""
    return ((1 - kappa) * off + kappa * (a - 1).square().sum(1)) / a.shape[1] ** 2


def _loss_of_rows(z: Tensor, kappa: float) -> Tensor:
    """The losses `[L']` of rows `z [L', n, d]`, by the smaller of their two Gram matrices."""
    n, d = z.shape[1:]
    if n >= d:
        off, a, _ = ops.correlation(z)
        return _loss(off.square().sum((1, 2)), a, kappa)
    a = torch.linalg.vector_norm(z, dim=1).square_().div_(n)
    squares = torch.bmm(z, z.mT).div_(n).square().sum((1, 2))  # ||z z^T||_F = ||z^T z||_F
    return _loss((squares - a.square().sum(1)).clamp(min=0), a, kappa)
