"""The held-out images: a pass of all processes over them, whatever the task."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dbpkern import diagnostics
from train.data.loading import build_loader
from train.engine.processes import moved, progress
from train.engine.task import AnyTask


class Observation:
    """Decorrelation losses of a task's layers in one forward of its model.

    Args:
        task: Prepared.
        wanted: Whether to observe at all.

    Attributes:
        losses: Of the observed layers, by name; empty before.
    """

    def __init__(self, task: AnyTask, wanted: bool) -> None:
        self.task, self.wanted = task, wanted
        self.losses: dict[str, float] = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Observe the forward inside the block, the first time; afterwards do nothing."""
        if not self.wanted:
            yield
            return
        self.wanted = False
        model, decor = self.task.model, self.task.config.decor
        with diagnostics.observe(model, decor.present(model), decor.accepts) as layers:
            yield
        self.losses = {name: layer.loss_after for name, layer in layers.items()}


class Evaluator:
    """Figures and pictures of a task's held-out images, and the correlations of the layers' inputs.

    Processes share the images, in batches as large as the micro-batches of training, which fit in memory.

    Args:
        task: Prepared.
    """

    def __init__(self, task: AnyTask) -> None:
        self.task = task
        processes, size = task.processes, len(task.held_out)
        share = max(1, task.config.micro_batch(processes.world_size))
        mine = processes.share(range(size))
        self.chunks = [list(mine[i : i + share]) for i in range(0, len(mine), share)]
        # Sharded weights are gathered by all together: who has less to do runs the first image once more.
        rounds = math.ceil(math.ceil(size / processes.world_size) / share)
        self.fillers = [[0]] * (rounds - len(self.chunks))

    @torch.no_grad()
    def __call__(self) -> dict[str, Any]:
        """The record of an evaluation, on every process.

        Its "decorrelation_loss" are what is left of the correlations in the first forward, by layer. Stock
        layers are observed at the sites that DBP would take: both can be compared.
        """
        task, processes = self.task, self.task.processes
        task.model.eval()
        # Its workers end with the evaluation, as between evaluations they would only hold memory.
        loader = build_loader(
            task.held_out,
            self.chunks + self.fillers,
            task.workers,
            processes.device.type == "cuda",
            task.collate_held_out,
        )
        total: Tensor | int = 0
        observe = Observation(task, task.observes and processes.is_main)
        unreadable: dict[str, str] = {}
        for i, batch in enumerate(progress(loader, "evaluating", "batch")):
            unreadable |= dict(batch.pop("skipped"))
            counted = task.evaluate(moved(batch, processes.device), i == 0, observe)
            total = total + (counted if i < len(self.chunks) else torch.zeros_like(counted))
        assert isinstance(total, Tensor)  # there are held-out images
        task.model.train()
        return task.figures(processes.sum(total)) | {
            "decorrelation_loss": observe.losses,
            "pictures": task.pictures() if processes.is_main else {},
            "unreadable": unreadable,
        }
