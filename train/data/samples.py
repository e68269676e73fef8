"""What all data sets and batches have in common."""

from abc import abstractmethod
from typing import NotRequired, TypedDict, TypeVar

from torch.utils.data import Dataset

SampleT = TypeVar("SampleT")


class SampleSet(Dataset[SampleT]):
    """Samples whose number is known."""

    @abstractmethod
    def __len__(self) -> int: ...


class Batch(TypedDict):
    """Samples stacked by a collate function, by name, and what comes with them.

    Attributes:
        skipped: (name, reason) of the files that could not be read.
        progress: The step and the length of the run, in training.
    """

    skipped: NotRequired[list[tuple[str, str]]]
    progress: NotRequired[tuple[int, int]]
