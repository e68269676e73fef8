"""Several dependent products in one launch: items of work, taken in an order that cannot deadlock.

Work whose later parts need the results of earlier ones is cut into items, one tile of a product each. Every
program takes the next item of a list that the host has written once for the shape, waits until the counters
named there have been raised often enough, does its tile, and raises counters in turn. An item waits only for
items before it in the list: those have been taken by programs that run already, so the launch makes progress
however few programs run at a time, also one after the other in the interpreter. Sums have a fixed order.

    tickets      0   1   2   3   4   5   6   7  ...
    items        A0  A1  B0  A2  B1  A3  B2  ...        B_i reads what A_i wrote; A_(i+slots) may then
    slots        0   1       0       1                  write over it, once B_i is done
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dbpkern.ops._triton import jit, tl

PREPARE, FINISH = 0, 1
"""The kinds of items of `strip_schedule`."""

FIELDS = 11
"""Numbers of an item: kind, layer, row, column, slot, two counters with counts to await, two to raise."""


@dataclass
class Schedule:
    """The items of a launch in order, and the number of counters they use. Counter 0 is nobody's."""

    items: list[tuple[int, ...]] = field(default_factory=list)
    counters: int = 1

    def counter(self) -> int:
        """A new counter, zero at first."""
        self.counters += 1
        return self.counters - 1

    def add(
        self,
        kind: int,
        layer: int = 0,
        row: int = 0,
        column: int = 0,
        slot: int = 0,
        waits: tuple[tuple[int, int], ...] = (),
        raises: tuple[int, ...] = (),
    ) -> None:
        """Append an item; `waits` holds up to two (counter, count), `raises` up to two counters."""
        (a, n_a), (b, n_b) = (*waits, (0, 0), (0, 0))[:2]
        first, second = (*raises, 0, 0)[:2]
        self.items.append((kind, layer, row, column, slot, a, n_a, b, n_b, first, second))

    def tables(self, device: torch.device) -> tuple[Tensor, int]:
        """The items `[items, FIELDS]` on a device, and the length of the counters that a launch needs."""
        table = torch.tensor(self.items, dtype=torch.int32).reshape(-1, FIELDS)
        if device.type == "cuda":  # so that the host need not wait for the copy
            table = table.pin_memory()
        table = table.to(device, non_blocking=True)
        return table, self.counters + 1  # the last counts tickets


def strip_schedule(L: int, before: int, after: int, columns: int, slots: int) -> Schedule:
    """Strips of columns of R in two phases: PREPARE fills a ring's slot, FINISH reads it half a ring later.

    A strip of one of L layers has `before` items of the first phase and `after` tiles of R, a layer `columns`
    strips. Strip t lies in slot t modulo `slots`.
    """
    schedule = Schedule()
    prepared = [schedule.counter() for _ in range(L * columns)]
    finished = [schedule.counter() for _ in range(L * columns)]
    ahead = slots // 2
    for t in range(len(prepared) + ahead):
        if t < len(prepared):
            free = ((finished[t - slots], after),) if t >= slots else ()
            for row in range(before):
                schedule.add(PREPARE, t // columns, row, t % columns, t % slots, free, (prepared[t],))
        s = t - ahead
        if s >= 0:
            for row in range(after):
                ready = ((prepared[s], before),)
                schedule.add(FINISH, s // columns, row, s % columns, s % slots, ready, (finished[s],))
    return schedule


@functools.cache  # for good: captured CUDA graphs read the tables
def tables(make: Callable[..., Schedule], *shape: int, device: torch.device) -> tuple[Tensor, int]:
    """`make(*shape)` on a device: written once for a shape."""
    return make(*shape).tables(device)


def new_counters(length: int, device: torch.device) -> Tensor:
    """Zeros for one launch."""
    return torch.zeros(length, dtype=torch.int32, device=device)


@jit
def take_item(items, counters, TICKETS, FIELDS: tl.constexpr):
    """Pointer to the next item of the list."""
    ticket = tl.atomic_add(counters + TICKETS, 1, sem="relaxed")
    return items + ticket.to(tl.int64) * FIELDS


@jit
def wait_until(counter, count):
    """Wait for a counter to reach `count`; what its raisers wrote before is visible afterwards."""
    if count > 0:
        while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < count:
            pass


@jit
def wait_for_inputs(item, counters):
    """Wait for all that the item reads, and for the place it writes to."""
    wait_until(counters + tl.load(item + 5), tl.load(item + 6))
    wait_until(counters + tl.load(item + 7), tl.load(item + 8))


@jit
def raise_counters(item, counters):
    """Tell that the item is done: the whole program's writes come before."""
    tl.debug_barrier()
    first, second = tl.load(item + 9), tl.load(item + 10)
    if first > 0:
        tl.atomic_add(counters + first, 1, sem="release", scope="gpu")
    if second > 0:
        tl.atomic_add(counters + second, 1, sem="release", scope="gpu")
