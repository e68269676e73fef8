"""What a run learns, as the loop, the evaluator and the results see it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn
from torch.utils.data import Dataset

from train.data.loading import StepSampler
from train.engine.config import RunConfig
from train.engine.processes import Processes


class Task(ABC):
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
        observes: Whether evaluation measures what is left of the correlations of the layers' inputs.
    """

    processes: Processes
    model: nn.Module
    training: Dataset
    held_out: Dataset
    files: Sequence[str]

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.ranks: dict[str, int | None] | None = None
        self.observes = True
        self.shards: Sequence[int] | None = None
        self.shard_window = 0

    @abstractmethod
    def prepare(self, processes: Processes) -> None:
        """Make the model and open the data.

        Raises:
            ValueError, FileNotFoundError: What the user asked for cannot be done; the message says why.
        """

    @property
    @abstractmethod
    def rows(self) -> int:
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

    @abstractmethod
    def collate(self, samples: list) -> dict[str, object]:
        """A batch of training samples, made by the loader. Its "skipped" are unreadable files."""

    def collate_held_out(self, samples: list) -> dict[str, object]:
        """The same of held-out samples."""
        return self.collate(samples)

    @abstractmethod
    def loss(self, model: nn.Module, batch: Mapping) -> Tensor:
        """The loss of a batch, a 0-d tensor.

        Args:
            model: As the run wraps it.
            batch: On the device. Its "progress" are the step and the length of the run.
        """

    @abstractmethod
    def evaluate(self, batch: Mapping, first: bool) -> Tensor:
        """What adds up over batches and processes to the figures: float64 [n].

        A collective where weights are sharded.

        Args:
            batch: Of held-out images, on the device.
            first: Whether it is the first one, of which pictures may be kept.
        """

    @abstractmethod
    def figures(self, total: Tensor) -> dict[str, float]:
        """What the log says of the sum over all images, "heldout_loss" among it.

        Raises:
            train.data.reading.DataError: The held-out images say nothing.
        """

    @abstractmethod
    def pictures(self) -> dict[str, Tensor]:
        """Pictures of the last evaluation by name, `[3, H, W]` in [0, 1]; on the main process."""

    @abstractmethod
    def finish(self, weights: Mapping[str, Tensor], records: Sequence[Mapping], folder: Path) -> dict:
        """Write the model of a finished run and what is drawn of it; returns its lines of the summary.

        Args:
            weights: Of the whole model.
            records: Of the log.
            folder: Of the run.
        """
