"""The held-out images: a pass of all processes over them, whatever the task."""

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from dbpkern import diagnostics
from train.data.loading import build_loader
from train.engine.processes import moved, progress
from train.engine.task import Task


class Evaluator:
    """Figures and pictures of a task's held-out images, and the correlations of the layers' inputs.

    Processes share the images, in batches as large as the micro-batches of training, which fit in memory.

    Args:
        task: Prepared.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        processes, size = task.processes, len(task.held_out)
        share = max(1, task.config.micro_batch(processes.world_size))
        mine = processes.share(range(size))
        self.chunks = [list(mine[i : i + share]) for i in range(0, len(mine), share)]
        # Sharded weights are gathered by all together: who has less to do runs the first image once more.
        rounds = math.ceil(math.ceil(size / processes.world_size) / share)
        self.fillers = [[0]] * (rounds - len(self.chunks))

    @torch.no_grad()
    def __call__(self) -> dict:
        """The record of an evaluation, on every process.

        Its "decorrelation_loss" are what is left of the correlations in the first batch, by layer. Stock
        layers are observed at the sites that DBP would take: both can be compared.
        """
        task, processes, decor = self.task, self.task.processes, self.task.config.decor
        task.model.eval()
        # Its workers end with the evaluation, as between evaluations they would only hold memory.
        loader = build_loader(
            task.held_out,
            self.chunks + self.fillers,
            task.config.data.workers,
            processes.device.type == "cuda",
            task.collate_held_out,
        )
        total: Tensor | int = 0
        losses: dict[str, float] = {}
        unreadable: dict[str, str] = {}
        for i, batch in enumerate(progress(loader, "evaluating", "batch")):
            unreadable |= dict(batch.pop("skipped"))
            watch = nullcontext({})
            if i == 0 and task.observes and processes.is_main:
                watch = diagnostics.observe(task.model, decor.present(task.model), decor.accepts)
            with watch as layers:
                counted = task.evaluate(moved(batch, processes.device), first=i == 0)
            losses |= {name: layer.loss_after for name, layer in layers.items()}
            total = total + (counted if i < len(self.chunks) else torch.zeros_like(counted))
        task.model.train()
        return task.figures(processes.sum(total)) | {
            "decorrelation_loss": losses,
            "pictures": task.pictures() if processes.is_main else {},
            "unreadable": unreadable,
        }
