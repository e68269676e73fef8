"""The order of samples, and the processes that load them."""

import functools
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dbpkern.capture import derive_seed
from train.data.samples import SampleSet, SampleT


class AtEpochZero(SampleSet[SampleT]):
    """Held-out samples by index: those that a data set has in epoch 0.

    Args:
        dataset: By (epoch, index).
    """

    def __init__(self, dataset: SampleSet[SampleT]):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> SampleT:
        return self.dataset[0, index]


class StepSampler(Sampler[list[tuple[int, int]]]):
    """The (epoch, index) of one process, a list for each micro-batch of each optimizer step.

    The stream of samples is one permutation of the training set after the other, each drawn from
    (seed, epoch). Step s takes the positions [s * batch_size, (s + 1) * batch_size) of the stream, so
    that a batch may span epochs and no sample is dropped. The batch is cut into accumulation *
    world_size equal slices: the first world_size of them are the first micro-batch of each rank,
    and so on.

    With shards, the permutation takes them in random order, cut into as few and as even groups of at most
    `window` shards as there can be, and permutes the samples of a group among themselves: near steps read
    near places, and all processes read the same shards.

    Args:
        num_samples: Length of the training set.
        batch_size: Samples per optimizer step, over all processes and micro-batches.
        seed: Seed of the permutations, a 64-bit integer.
        total_steps: Step to stop before.
        start_step: First step, above 0 for a run that is resumed.
        accumulation: Micro-batches per step.
        rank: Index of this process.
        world_size: Number of processes.
        shards: Samples in each shard, in the order of the samples; None for one permutation of all.
        window: Shards whose samples are mixed; 0 for all.

    Raises:
        ValueError: If the batch cannot be cut into equal slices, if there are more processes than
            samples, or if a number is out of its range.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        total_steps: int,
        start_step: int = 0,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        shards: Sequence[int] | None = None,
        window: int = 0,
    ):
        if accumulation < 1:
            raise ValueError(f"accumulation must be at least 1, not {accumulation}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be at least 0 and below world_size, not {rank} of {world_size}")
        if not 0 <= start_step <= total_steps:
            raise ValueError(f"start_step must be in 0 .. total_steps, not {start_step} of {total_steps}")
        if world_size > num_samples:
            raise ValueError(f"{world_size} processes are more than the {num_samples} training samples")
        slices = world_size * accumulation
        if batch_size < 1 or batch_size % slices:
            below = batch_size // slices * slices
            nearest = f"{below} or {below + slices}" if below > 0 else f"{slices}"
            raise ValueError(
                f"batch_size must be a multiple of world_size * accumulation = "
                f"{world_size} * {accumulation}, not {batch_size}; the nearest: {nearest}"
            )
        if window < 0:
            raise ValueError(f"window must be at least 0, not {window}")
        if shards is not None and sum(shards) != num_samples:
            raise ValueError(f"shards must add up to the {num_samples} samples, not to {sum(shards)}")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.total_steps = total_steps
        self.start_step = start_step
        self.accumulation = accumulation
        self.rank = rank
        self.world_size = world_size
        self.shards = shards
        self.window = window

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # Positions only grow, so that one epoch's permutation is all that is ever kept.
        permutation = functools.lru_cache(maxsize=1)(self._permutation)
        micro_batch_size = self.batch_size // (self.accumulation * self.world_size)
        for micro_batch in range(self.start_step * self.accumulation, self.total_steps * self.accumulation):
            start = (micro_batch * self.world_size + self.rank) * micro_batch_size
            positions = range(start, start + micro_batch_size)
            places = (divmod(position, self.num_samples) for position in positions)
            yield [(epoch, int(permutation(epoch)[place])) for epoch, place in places]

    def _permutation(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        if self.shards is None or self.window == 0:
            return torch.randperm(self.num_samples, generator=generator)
        samples = torch.arange(self.num_samples).split(list(self.shards))
        order = torch.randperm(len(samples), generator=generator)
        parts = []
        for group in order.tensor_split(-(-len(samples) // self.window)):
            mixed = torch.cat([samples[shard] for shard in group.tolist()])
            parts.append(mixed[torch.randperm(len(mixed), generator=generator)])
        return torch.cat(parts)


def _heed_parent_alone(_: int) -> None:
    # Stopping is for the process that trains: it still needs its loaders to finish the step, and torchrun
    # and Ctrl-C signal all processes. But when it exits itself, multiprocessing sends it SIGTERM and waits.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # of the threads to come, too
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)  # with another code, the training process would report a loader that died

    threading.Thread(target=wait, daemon=True).start()


def build_loader(
    dataset: Dataset[Any],
    sampler: Iterable[list[Any]],
    workers: int,
    pin_memory: bool,
    collate: Callable[[list[Any]], Mapping[str, object]],
) -> DataLoader[Any]:
    """Build the loader of the batches that `collate` makes.

    The (name, reason) of skipped files come with the batches because a loader process has no other
    way to report them. A file is reported each time it is met: `dict.update` keeps one of each.

    Args:
        dataset: Where the samples come from.
        sampler: Gives a list of the dataset's keys for each batch: a StepSampler for a TrainingSet,
            lists of indices for a HeldOutSet.
        workers: Loader processes, each with one torch thread (torch's own choice); 0 for none. There are no
            more than batches, where the sampler knows how many these are.
        pin_memory: Whether batches are copied to page-locked memory, for faster transfers to a GPU.
        collate: Makes a batch of a list of samples.
    """
    if isinstance(sampler, Sized):
        workers = min(workers, len(sampler))
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=_heed_parent_alone,
        generator=torch.Generator(),  # it would draw from the caller's random numbers otherwise
    )
