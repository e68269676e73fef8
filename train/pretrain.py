"""Pre-train a model, MAE or DARL, plain or with decorrelated backpropagation.

    torchrun --standalone --nproc_per_node 1 train/pretrain.py --config train/configs/demo.yaml --out runs/a

Also runs with plain python. `--help` lists every option; `docs/training.md` explains them.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.optim import kron, param_groups_weight_decay
from torch import nn
from tqdm import tqdm

import dbpkern
from dbpkern.optim.base import DecorOptimizer
from train import planning
from train.data.loading import build_loader
from train.engine import checkpoint
from train.engine.loop import HoldsR, Loop
from train.engine.optimizers import build_optimizer
from train.engine.processes import Processes, moved
from train.engine.run import open_run, parse_config, run_script
from train.engine.run_folder import RunFolder
from train.tasks.families import task_of
from train.tasks.pretraining import AnyPretraining, Config

Optimizers = Callable[
    [Config, nn.Module, Mapping[str, int | None] | None], tuple[torch.optim.Optimizer, HoldsR | None]
]


def build_optimizers(
    config: Config, model: nn.Module, ranks: Mapping[str, int | None] | None = None
) -> tuple[torch.optim.Optimizer, HoldsR | None]:
    """The optimizer of the weights, and what moves R where the run decorrelates; one step makes both.

    With a plan, `ranks` are its layers.
    """
    groups = param_groups_weight_decay(model, config.optim.weight_decay)
    peak, decor = config.peak_lr, config.decor
    rule = decor.rule(model, config.seed, ranks) if decor.enable else None
    inside = decor.enable and decor.mode == "optimizer" and config.optim.name != "kron"
    if config.optim.name == "kron":
        optimizer: torch.optim.Optimizer = kron.Kron(
            groups, lr=peak, decoupled_decay=True, deterministic=True
        )
        # Compiled, as timm has them, its contractions of a 384 x 128 weight ask for 9 GB.
        for name in ("_calc_A_and_conjB", "_q_terms", "_precond_grad", "_balance_Q"):
            setattr(optimizer, name, getattr(kron, name))
    else:
        optimizer = build_optimizer(config, groups, peak, model, rule if inside else None)
    for group in optimizer.param_groups:
        group["initial_lr"] = peak
    if not decor.enable:
        return optimizer, None
    if decor.in_layers:
        layers = dbpkern.DecorSGD(model, rule, optimizer if decor.follow else None)
        optimizer.register_step_post_hook(lambda *_: layers.step())
        return optimizer, layers
    if not inside:
        return optimizer, dbpkern.DecorPreconditioner(model, optimizer, rule)
    assert isinstance(optimizer, DecorOptimizer)
    return optimizer, optimizer


def make_plan(task: AnyPretraining) -> planning.Plan:
    """Measure a model on the run's first batches, which are read anew, and choose layers and ranks.

    Args:
        task: Prepared, with a model without decorrelated layers.

    Raises:
        ValueError: as `train.planning.plan`.
    """
    calls = 4
    config, device = task.config, task.processes.device
    decor = config.decor
    batches = iter(
        build_loader(
            task.training, task.order(calls), config.data.workers, device.type == "cuda", task.collate
        )
    )
    autocast = config.autocast(device)

    def step() -> None:
        for _ in range(config.accumulation):
            batch = moved(next(batches), device) | {"progress": (0, calls)}
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                value = task.loss(task.model, batch) / config.accumulation
            value.backward()

    plan = planning.plan(
        task.model,
        step,
        decor.budget,
        calls,
        mode="layers" if decor.in_layers else "optimizer",
        decor=decor.rule(task.model, config.seed),
        seed=config.seed,
    )
    if task.processes.is_main:
        tqdm.write(f"pretrain: sites by measurement\n{plan}")
    return plan


def load_run(folder: str, which: str | None = None) -> tuple[AnyPretraining, nn.Module]:
    """The task of a run, not prepared, and its stock model by a checkpoint, fused and for evaluation.

    Args:
        folder: Of the run.
        which: Path of the checkpoint, None for the newest that is whole.

    Raises:
        ValueError: there is no run, or no such checkpoint.
    """
    run = RunFolder(folder)
    if run.read_config() is None:
        raise ValueError(f"run: expected the folder of a run of train/pretrain.py, got {folder}")
    config = parse(["--config", str(run.config)])
    alone = Processes(0, 1, torch.device("cpu"))
    if which is None:
        found = checkpoint.newest(run.checkpoints, alone)
        if found is None:
            raise ValueError(f"run: {folder} has no checkpoint")
        path, state = found
    else:
        path, state = Path(which), checkpoint.load(Path(which), alone)
    weights = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in state["model"].items()}
    checkpoint.fill(path, {"model": weights}, alone)
    task = task_of(config)
    task.ranks = state["ranks"]
    return task, task.stock(weights)


def prepare(config: Config, procs: Processes, optimizers: Optimizers = build_optimizers) -> Loop:
    """Everything up to the first step. Whatever can be wrong is found before a file is written.

    Args:
        config: What is asked for.
        procs: This process among the others.
        optimizers: `build_optimizers`, or another that takes its place.

    Raises:
        ValueError, FileNotFoundError: what the user asked for cannot be done; the message says why.
    """
    task = task_of(config)
    task.prepare(procs)
    run, found = open_run(config, procs, task.files)
    planned = 0.0
    if config.decor.planned:
        if found is not None:
            task.ranks = found[1]["ranks"]
        else:
            start = time.perf_counter()
            task.ranks = make_plan(task).ranks
            planned = time.perf_counter() - start
        if not task.ranks:
            raise ValueError(
                f"decor.budget: no layer could be chosen for {config.decor.budget:g} of a step; expected a "
                "larger budget, or --decor.enable false"
            )
        if config.decor.in_layers:
            task.place_model()  # again, as the plan says which layers are decorrelated
    optimizer, decor = optimizers(config, task.model, task.ranks)

    def recheck() -> dict[str, Any]:
        plan = make_plan(task)
        if plan.ranks:  # or the layers of before stay
            assert isinstance(decor, DecorOptimizer | dbpkern.DecorPreconditioner)
            decor.replan(task.model, plan.decor())
            task.ranks = plan.ranks
        chosen = [f"{group.name}: {group.chosen}" for group in plan.groups if group.chosen is not None]
        return {"overhead": plan.cost, "chosen": chosen}

    rechecks = config.decor.planned and not config.decor.in_layers
    loop = Loop(task, run, optimizer, decor, found, recheck if rechecks else None)
    loop.seconds += planned
    return loop


def parse(arguments: list[str] | None = None) -> Config:
    """The configuration from the command line and YAML files."""
    return parse_config(Config, "train/pretrain.py", __doc__, arguments)


def main(arguments: list[str] | None = None) -> None:
    """Pre-train."""
    run_script("pretrain", parse, prepare, arguments)


if __name__ == "__main__":
    main()
