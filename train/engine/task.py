"""What a run learns, as the loop, the evaluator and the results see it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from dbpkern.diagnostics import observed
from train.data.loading import StepSampler
from train.data.samples import Batch, SampleSet
from train.engine.config import RunConfig
from train.engine.processes import Processes

BatchT = TypeVar("BatchT", bound=Batch)  # of training samples
HeldOutT = TypeVar("HeldOutT", bound=Batch)  # of held-out samples

Collate = Callable[[list[Any]], BatchT]
"""Makes a batch of samples. Its "skipped" are the unreadable files."""
Observe = Callable[[], AbstractContextManager[None]]
"""Makes what is entered around a forward."""


class Task(ABC, Generic[BatchT, HeldOutT]):
    """What a run learns: its model, its images, its loss and its figures.

    Args:
        config: What is asked for.

    Attributes:
        processes: This process among the others.
        model: The model whose state is saved.
        training: The training set, by (epoch, index).
        held_out: The held-out set, by index.
        files: What the data are, line by line, for files.txt: names of the training images, and what else
            they are known by.
        ranks: The layers that a plan chose, with the ranks of their R; None where nothing was planned.
        shards: Samples in each shard of the training set; None without shards.
        shard_window: Shards whose samples are mixed at a time; 0 for all.
        observes: Whether evaluation measures what is left of the correlations of the layers' inputs, which
            takes layers that DBP would serve; may be set once the task is prepared.
        least_steps: The shortest run; 0 where one may evaluate only.
    """

    least_steps = 1

    processes: Processes
    model: nn.Module
    training: SampleSet[Any]
    held_out: SampleSet[Any]
    files: Sequence[str]

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.ranks: dict[str, int | None] | None = None
        self.observes = True
        self.shards: Sequence[int] | None = None
        self.shard_window = 0

    def prepare(self, processes: Processes) -> None:
        """Make the model, open the data, and check that the options fit them.

        Raises:
            ValueError, FileNotFoundError: What the user asked for cannot be done; the message says why.
        """
        config = self.config
        self.processes = processes
        config.check_numbers(self.least_steps)
        self.check()
        torch.manual_seed(config.seed)
        self.make()
        sites = config.decor.present(self.model)
        self.observes = self.observes and bool(sites)
        if self.observes:
            observed(self.model, sites, config.decor.accepts)  # raises now, not in the first evaluation
        total, _ = config.schedule(len(self.training))
        self.order(total)  # raises where the batch does not fit
        config.check_sample(self.rows_per_image, processes.world_size)

    def check(self) -> None:
        """Raise ValueError for options that do not go together; single numbers have been checked."""

    @abstractmethod
    def make(self) -> None:
        """Make the model and open the data, for the processes that `prepare` was given.

        Torch's random numbers are those of the run's seed.
        """

    @property
    @abstractmethod
    def workers(self) -> int:
        """Loader processes of each training process."""

    @property
    @abstractmethod
    def rows_per_image(self) -> int:
        """Rows that an image has in the model's layers, from which R's samples are taken."""

    def order(self, total: int, start: int = 0) -> StepSampler:
        """The samples of this process in the steps from `start` to `total`."""
        config = self.config
        return StepSampler(
            len(self.training),
            config.batch_size,
            config.seed,
            total,
            start,
            config.accumulation,
            self.processes.rank,
            self.processes.world_size,
            self.shards,
            self.shard_window,
        )

    @property
    @abstractmethod
    def collate(self) -> Collate[BatchT]:
        """Makes a batch of training samples, in the processes of the loader: a small object."""

    @property
    @abstractmethod
    def collate_held_out(self) -> Collate[HeldOutT]:
        """The same of held-out samples."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: BatchT) -> Tensor:
        """The loss of a batch, a 0-d tensor.

        Args:
            model: As the run wraps it.
            batch: On the device. Its "progress" are the step and the length of the run.
        """

    @abstractmethod
    def evaluate(self, batch: HeldOutT, first: bool, observe: Observe) -> Tensor:
        """What adds up over batches and processes to the figures: float64 [n].

        A collective where weights are sharded.

        Args:
            batch: Of held-out images, on the device.
            first: Whether it is the first one, of which pictures may be kept.
            observe: Entered around each forward of the model, of which it observes the first.
        """

    @abstractmethod
    def figures(self, total: Tensor) -> dict[str, float]:
        """What the log says of the sum over all images, "heldout_loss" among it.

        Raises:
            train.data.reading.DataError: The held-out images say nothing.
        """

    def pictures(self) -> dict[str, Tensor]:
        """Pictures of the last evaluation by name, `[3, H, W]` in [0, 1], on the main process.

        They may show what `figures` was given.
        """
        return {}

    @abstractmethod
    def export(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Write the model of a finished run into its folder.

        Args:
            weights: Of the whole model.
            folder: Of the run.
        """

    def summary(self, records: Sequence[Mapping[str, Any]]) -> dict[str, object]:
        """What the summary of a finished run says beside what every run's does, by its log."""
        return {}

    def draw(self, records: Sequence[Mapping[str, Any]], folder: Path) -> None:
        """Write the pictures of a finished run into its folder, by its log; after `export`."""


AnyTask = Task[Any, Any]
"""A task of any batches."""
