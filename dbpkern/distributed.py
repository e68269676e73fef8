"""Statistics over many processes.

Every process samples its own rows; their statistics are averaged, weighted by the number of rows, so that
all processes make the same step and hold bitwise the same R. R itself is never sent.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes, 1 where no process group is initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 where no process group is initialised."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` holds on any process; a collective, and it waits for the device."""
    if world_size() == 1:
        return flag
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


def _average(parts: list[Tensor], counts: Tensor) -> tuple[list[Tensor], Tensor]:
    """Average `parts`, each `[L, k]`, over processes in one collective, weighted by their `counts [L]`."""
    packed = torch.cat([*parts, torch.ones_like(parts[0][:, :1])], dim=1)
    packed.mul_(counts[:, None])
    dist.all_reduce(packed)
    total = packed[:, -1].clone()
    packed.div_(total.clamp(min=1)[:, None])
    return list(packed[:, :-1].split([part.shape[1] for part in parts], dim=1)), total


def average_statistics(M: Tensor, a: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Average `M [L, d, d]`, `a [L, d]` over processes, each weighted by its `counts [L]` of rows.

    One collective for the stack: M is symmetric, so each layer sends its lower triangle, its mean squares
    and its count, `d (d + 1) / 2 + d + 1` numbers.

    Returns:
        The averages and the total counts `[L]`. Layers without a row on any process come back as zeros.
    """
    d = M.shape[-1]
    row, column = torch.tril_indices(d, d, device=M.device)
    (triangle, a), total = _average([M[:, row, column], a], counts)  # [L, d (d + 1) / 2], [L, d]
    M = torch.empty_like(M)
    M[:, row, column] = triangle
    M[:, column, row] = triangle
    return M, a, total


def average_lowrank_statistics(
    B: Tensor, Y: Tensor, c: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Average `B [L, r, r]`, `Y [L, d, r]` and `c [L, d]` over processes, weighted by their `counts [L]`.

    One collective for the stack: each layer sends `r^2 + d r + d + 1` numbers.

    Returns:
        The averages and the total counts `[L]`. Layers without a row on any process come back as zeros.
    """
    (b, y, c), total = _average([B.flatten(1), Y.flatten(1), c], counts)
    return b.reshape(B.shape), y.reshape(Y.shape), c, total
