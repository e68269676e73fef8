"""What each process of test_distributed.py does; the results go to files, and the tests judge them."""

import contextlib
import inspect
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from vits import HuggingFaceViT, captured, decorrelated, images, mlp, randomise

import dbpkern
from dbpkern import DecorSGD

MICRO, STEPS, BATCH = 2, 3, 8

# What the server of processes imports once and for all: the first test that starts it decides.
PRELOAD = ["torch", "torch._dynamo", "torch.distributed", "dbpkern", "timm", "train.pretrain"]


def models() -> dict[str, tuple[nn.Module, list[torch.Tensor]]]:
    """Models and their global batches, the same in every process and in the single one."""
    torch.manual_seed(1)
    vit, lean = (
        dbpkern.decorrelate(randomise(HuggingFaceViT()), "all", rank=rank)
        for rank in (None, {"fc2": 6, "qkv": 3})
    )
    return {
        "vit, float32": (vit, [images(BATCH) for _ in range(MICRO * STEPS)]),
        "vit, some low rank, float64": (
            lean.double(),
            [images(BATCH).double() for _ in range(MICRO * STEPS)],
        ),
        "mlp, float64": (
            mlp(6, 9, 5, dtype=torch.float64),
            [torch.randn(BATCH, 6, dtype=torch.float64) for _ in range(MICRO * STEPS)],
        ),
    }


def parallel(model: nn.Module, broadcast_buffers: bool) -> DistributedDataParallel:
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # the old name
    return DistributedDataParallel(model, **{name: broadcast_buffers})


def train(
    model: nn.Module, batches: list[torch.Tensor], rank: int = 0, world: int = 1
) -> dict[str, torch.Tensor]:
    """Data-parallel training: steps of MICRO micro-batches on this process's part of each batch."""
    net = parallel(model, False) if world > 1 else model
    decor = DecorSGD(net, lr=0.05, kappa=0.1, sample=1.0, limit=None)
    main = torch.optim.SGD(model.parameters(), lr=0.1)
    part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    for step in range(STEPS):
        main.zero_grad()
        for i in range(MICRO):
            last = i == MICRO - 1
            with contextlib.nullcontext() if last or world == 1 else net.no_sync():
                (net(batches[step * MICRO + i][part]).square().mean() / MICRO).backward()
        main.step()
        decor.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def Rs(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.R.clone() for name, layer in decorrelated(model).items()}


def factors(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    return {name: [f.clone() for f in layer.factors] for name, layer in decorrelated(model).items()}


def sampled_step(rank: int) -> dict:
    """Samples of 20 % and a DecorSGD of their statistics, on different data."""
    model = mlp(6, 9, 6, 6)
    decor = DecorSGD(model, lr=0.05, kappa=0.1, sample=0.2, limit=None)
    torch.manual_seed(rank)
    x = torch.randn(40, 6)
    steps = []
    for _ in range(3):
        before = Rs(model)
        model(x).square().mean().backward()
        rows = {name: r.clone() for name, r in captured(decor).items()}
        loss = decor.loss()
        decor.step()
        steps.append({"before": before, "rows": rows, "loss": loss, "after": Rs(model)})
    return {"steps": steps, "index": decor._sampler.index(1000, 0, x.device)}


def unequal_step(rank: int) -> dict:
    """Another number of rows on every rank; then none on rank 0, and none anywhere for one layer."""
    model = mlp(5, 5, 5, 5, dtype=torch.float64)
    decor = DecorSGD(model, lr=0.05, sample=1.0, limit=None)
    torch.manual_seed(rank)
    steps = []
    for step in range(2):
        before = Rs(model)
        if step == 0:
            model(torch.randn(3 * rank + 2, 5, dtype=torch.float64)).square().mean().backward()
        elif rank:
            model[:3](torch.randn(rank, 5, dtype=torch.float64)).square().mean().backward()
        rows = {name: r.clone() for name, r in captured(decor).items()}
        loss = decor.loss()
        decor.step()
        steps.append(
            {"before": before, "rows": rows, "loss": loss, "after": Rs(model), "loss after": decor.loss()}
        )
    return {"steps": steps}


def lowrank_step(rank: int) -> dict:
    """Low-rank R: other numbers of rows on every rank; then none on rank 0, none anywhere for one layer."""
    model = mlp(5, 5, 5, 5, dtype=torch.float64, rank=2)
    decor = DecorSGD(model, lr=0.05, kappa=0.1, sample=1.0, limit=None)
    torch.manual_seed(rank)
    steps = []
    for step in range(2):
        before = factors(model)
        if step == 0:
            model(torch.randn(7 * rank + 6, 5, dtype=torch.float64)).square().mean().backward()
        elif rank:
            model[:3](torch.randn(6 * rank, 5, dtype=torch.float64)).square().mean().backward()
        rows = {name: r.clone() for name, r in captured(decor).items()}
        loss = decor.loss()
        decor.step()
        steps.append({"before": before, "rows": rows, "loss": loss, "after": factors(model)})
    return {"steps": steps}


def messages(broadcast_buffers: bool) -> list[str]:
    """The warnings of a DecorSGD for a DistributedDataParallel."""
    model = parallel(mlp(3, 3, 3), broadcast_buffers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decor = DecorSGD(model, sample=1.0, limit=None)
        for _ in range(2):
            model(torch.randn(9, 3)).square().mean().backward()
            decor.step()
    return [str(w.message) for w in caught if "broadcast_buffers" in str(w.message)]


def operators_of_a_step(low: int | None) -> list[str]:
    model = mlp(5, 5, 5, rank=low)
    decor = DecorSGD(model, sample=1.0, limit=None)
    model(torch.randn(9, 5)).sum().backward()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        decor.step()
    return [event.name for event in recorded.events()]


def run(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(Path(folder) / "rendezvous").as_uri(),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    results = {
        "trained": {name: train(model, batches, rank, world) for name, (model, batches) in models().items()},
        "sampled": sampled_step(rank),
        "unequal": unequal_step(rank),
        "warnings": {flag: messages(flag) for flag in (True, False)},
        "lowrank": lowrank_step(rank),
        "operators": {low: operators_of_a_step(low) for low in (None, 2)},
    }
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
