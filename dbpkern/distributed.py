"""Statistics over many processes.

Every process samples its own rows; their statistics are averaged, weighted by the number of rows. Either all
processes then make the same step, or each makes that of its own layers and all gather the R. `choose_mode`
decides for a stack; in both modes all processes hold bitwise the same R afterwards.

A collective is started here, and waited for by whoever needs what it brings. The bytes that a process sends
are counted as a ring sends them, with w processes: `2 (w - 1) / w` of a tensor that is all-reduced,
`(w - 1) / w` of one that is reduced and scattered, or gathered.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Bytes a second that a process sends, and operations a second of R's update, by type of device. Estimates, to
# be replaced once measured. cuda: H100s of one node, NCCL over NVLink, 16-bit operands. cpu: gloo, one core.
BANDWIDTH = {"cuda": 3e11, "cpu": 1e9}
THROUGHPUT = {"cuda": 3e14, "cpu": 3e10}


class Traffic(NamedTuple):
    """What this process sent of one stack in one step."""

    shape: tuple[int, ...]
    """`[L, d, d]` of the stack's R, or `[L, d, r]` of its Q."""
    mode: str
    """`all-reduce` or `owner`, see `choose_mode`."""
    sent: int
    """Bytes."""


@dataclass
class Transfer:
    """A collective under way."""

    work: dist.Work
    tensor: Tensor
    """What it brings, once it is there."""
    sent: int
    """Bytes that this process sends."""
    read: Callable[[Tensor], Any]
    """What to make of the tensor."""

    def wait(self) -> Any:
        """What `read` makes of the tensor. With NCCL the device waits, and the host does not."""
        self.work.wait()
        return self.read(self.tensor)


def world_size() -> int:
    """Number of processes, 1 where no process group is initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 where no process group is initialised."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` holds on any process; a collective, and it waits for the device."""
    return any_processes([flag], device)[0]


def any_processes(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Which of the flags hold on any process; a collective, and it waits for the device."""
    if world_size() == 1:
        return list(flags)
    found = torch.tensor(flags, dtype=torch.int, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]


def differs(value: str, device: torch.device) -> bool:
    """Whether processes give different values; a collective, and it waits for the device."""
    digest = int.from_bytes(hashlib.blake2b(value.encode(), digest_size=4).digest(), "little")
    extremes = torch.tensor([digest, -digest], device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    return bool(extremes.sum())


def _share(L: int) -> int:
    """How many of L layers a process owns at most."""
    return -(-L // world_size())


def own_layers(L: int) -> slice:
    """Which of the L layers of a stack this process owns: `ceil(L / w)` in a row, the last processes less."""
    return slice(*(min(L, owner * _share(L)) for owner in (rank(), rank() + 1)))


def seconds(mode: str, L: int, d: int, itemsize: int, device_type: str) -> float:
    """Estimated time of a step of R `[L, d, d]`: bytes sent / bandwidth + operations / throughput.

    Args:
        mode: `all-reduce` sends twice a triangle for each layer, and every process does `2 d^3` for each.
            `owner` sends a triangle and an R, and a process does its own layers alone.
        L: number of layers.
        d: their width.
        itemsize: bytes of a number.
        device_type: a key of `BANDWIDTH` and `THROUGHPUT`; the other types count as `cuda`.
    """
    world, kind = world_size(), device_type if device_type in BANDWIDTH else "cuda"
    triangle = d * (d + 1) // 2
    if mode == "owner":
        layers, numbers = _share(L), _share(L) * world * (triangle + d * d)
    else:
        layers, numbers = L, L * 2 * triangle
    sent = numbers * itemsize * (world - 1) / world
    return sent / BANDWIDTH[kind] + layers * 2 * d**3 / THROUGHPUT[kind]


def choose_mode(L: int, d: int, itemsize: int, device_type: str) -> str:
    """How to step R `[L, d, d]`: `all-reduce` or `owner`, whichever `seconds` finds the faster."""
    return min(("all-reduce", "owner"), key=lambda mode: seconds(mode, L, d, itemsize, device_type))


def _all_reduce(tensor: Tensor, read: Callable[[Tensor], Any]) -> Transfer:
    """Start to sum `tensor` over processes, in place."""
    world = world_size()
    work = dist.all_reduce(tensor, async_op=True)
    return Transfer(work, tensor, 2 * (world - 1) * tensor.nbytes // world, read)


def _reduce_scatter(tensor: Tensor, read: Callable[[Tensor], Any]) -> Transfer:
    """Start to sum `tensor [w k, ...]` over processes; process i gets the i-th k rows.

    gloo makes an all-reduce of it, and so sends twice of what is counted.
    """
    world = world_size()
    part = tensor.new_empty(len(tensor) // world, *tensor.shape[1:])
    work = dist.reduce_scatter_tensor(part, tensor, async_op=True)
    assert work is not None  # as for a process outside the group
    return Transfer(work, part, (world - 1) * part.nbytes, read)


def _all_gather(part: Tensor, read: Callable[[Tensor], Any]) -> Transfer:
    """Start to bring `part [k, ...]` of every process to all, `[w k, ...]` in the order of ranks."""
    world = world_size()
    whole = part.new_empty(world * len(part), *part.shape[1:])
    work = dist.all_gather_into_tensor(whole, part, async_op=True)
    assert work is not None
    return Transfer(work, whole, (world - 1) * part.nbytes, read)


def _average(
    parts: list[Tensor], counts: Tensor, read: Callable[[list[Tensor], Tensor], Any], owner: bool = False
) -> Transfer:
    """Start to average `parts`, each `[L, k]`, over processes, weighted by their `counts [L]`.

    Brings what `read` makes of the averages and the total counts, with `owner` of this process's own layers.
    """
    L, own = len(counts), own_layers(len(counts))
    widths = [part.shape[1] for part in parts]
    packed = parts[0].new_empty(world_size() * _share(L) if owner else L, sum(widths) + 1)
    torch.cat([*parts, torch.ones_like(counts)[:, None]], dim=1, out=packed[:L])
    packed[:L].mul_(counts[:, None])
    packed[L:].zero_()

    def divide(packed: Tensor) -> Any:
        packed = packed[: own.stop - own.start] if owner else packed
        total = packed[:, -1].clone()
        packed.div_(total.clamp(min=1)[:, None])
        return read(list(packed[:, :-1].split(widths, dim=1)), total)

    return (_reduce_scatter if owner else _all_reduce)(packed, divide)


def average_statistics(M: Tensor, a: Tensor, counts: Tensor, owner: bool = False) -> Transfer:
    """Start to average `M [L, d, d]`, `a [L, d]` over processes, each weighted by its `counts [L]` of rows.

    One collective for the stack: M is symmetric, so each layer sends its lower triangle, its mean squares
    and its count, `d (d + 1) / 2 + d + 1` numbers.

    Brings the averages and the total counts `[L]`, with `owner` those of this process's `own_layers`. Layers
    without a row on any process come back as zeros.
    """
    d = M.shape[-1]
    row, column = torch.tril_indices(d, d, device=M.device)

    def unpack(parts: list[Tensor], total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        triangle, a = parts
        M = triangle.new_empty(len(triangle), d, d)
        M[:, row, column] = triangle
        M[:, column, row] = triangle
        return M, a, total

    return _average([M[:, row, column], a], counts, unpack, owner)


def average_lowrank_statistics(B: Tensor, Y: Tensor, c: Tensor, counts: Tensor) -> Transfer:
    """Start to average `B [L, r, r]`, `Y [L, d, r]`, `c [L, d]` over processes, weighted by `counts [L]`.

    One collective for the stack: each layer sends `r^2 + d r + d + 1` numbers.

    Brings the averages and the total counts `[L]`. Layers without a row on any process come back as zeros.
    """
    shapes = B.shape, Y.shape

    def unpack(parts: list[Tensor], total: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        b, y, c = parts
        return b.reshape(shapes[0]), y.reshape(shapes[1]), c, total

    return _average([B.flatten(1), Y.flatten(1), c], counts, unpack)


def gather_layers(wholes: list[Tensor]) -> Transfer:
    """Start to bring each process's `own_layers` of `wholes`, each `[L, ...]` and of one dtype, to all.

    One collective; `wait` writes the layers of all processes into `wholes`.
    """
    L, own = len(wholes[0]), own_layers(len(wholes[0]))
    n = own.stop - own.start
    widths = [whole[0].numel() for whole in wholes]
    part = wholes[0].new_zeros(_share(L), sum(widths))
    mine = [whole[own].reshape(n, width) for whole, width in zip(wholes, widths, strict=True)]
    torch.cat(mine, dim=1, out=part[:n])

    def write(gathered: Tensor) -> None:
        for whole, values in zip(wholes, gathered[:L].split(widths, dim=1), strict=True):
            whole.copy_(values.view(whole.shape))

    return _all_gather(part, write)
