"""The model and the data of test_planning.py, and what each of its processes does."""

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from train import planning

RHO, N = 0.6, 400


class Net(nn.Module):
    """One layer reads features that have a part in common, the other independent ones."""

    def __init__(self) -> None:
        super().__init__()
        self.alike, self.apart = nn.Linear(32, 8), nn.Linear(16, 8)

    def forward(self, x):
        return self.alike(x[:, :32]) + self.apart(x[:, 32:])


def rows(seed: int, n: int = N) -> torch.Tensor:
    """`[n, 48]`: 32 features of unit variance, any two with correlation RHO, and 16 independent ones."""
    x = torch.randn(n, 49, generator=torch.Generator().manual_seed(seed))
    x[:, :32] = RHO**0.5 * x[:, 48:] + (1 - RHO) ** 0.5 * x[:, :32]
    return x[:, :48]


def stepper(model: nn.Module, make=rows):
    """A `step` for plan, that goes on to new data."""
    seeds = iter(range(10**6))
    return lambda: model(make(next(seeds))).square().mean().backward()


def other_data(model: nn.Module, rank: int):
    return stepper(model, lambda seed: rows(100 * rank + seed, 100 + 50 * rank))


def run(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = (Path(folder) / "rendezvous").as_uri()
    dist.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    torch.manual_seed(0)
    model = Net()
    plan = planning.plan(model, other_data(model, rank), 0.5, ranks=(2,))
    (Path(folder) / f"{rank}.txt").write_text(f"{plan.groups!r}\n{plan.groups[0].correlation}")
    dist.destroy_process_group()
