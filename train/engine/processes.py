"""The processes of a run: one, or as many as torchrun started."""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

Item = TypeVar("Item")
Tensors = TypeVar("Tensors", bound=Mapping[str, object])

SILENT = 1.0  # seconds of work beside the steps without a bar


@dataclass
class Processes:
    """This process among the others, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over all processes, in place, and return it."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Item) -> list[Item]:
        """The values that all processes give, in the order of their ranks; anything that can be pickled."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of a list of work."""
        return items[self.rank :: self.world_size]

    def shard(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Share a model's weights among the processes by FSDP2: the blocks one by one, then the rest.

        Weights are gathered for a block's forward, again for its backward, and in fp32: autocast then rounds
        what it would round without sharding.
        """
        if self.world_size > 1:
            mesh = init_device_mesh(self.device.type, (self.world_size,))
            for module in (*blocks, model):
                fully_shard(module, mesh=mesh)

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.world_size > 1:
            dist.barrier()


def moved(batch: Tensors, device: torch.device) -> Tensors:
    """A batch with its tensors on a device."""
    return tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), batch)


def _is_first() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def progress(items: Iterable[Item], what: str, unit: str) -> Iterable[Item]:
    """Give items one by one, on the main process with a bar on stderr if they take longer than SILENT.

    It is gone when they are, unlike the bar of the steps, below which it stands.

    Args:
        items: Of known number.
        what: Is done with them.
        unit: What they are called.
    """
    return tqdm(items, what, unit=unit, leave=False, mininterval=1, delay=SILENT, disable=not _is_first())


def tell(message: str) -> None:
    """Write a line to stderr, on the main process, above bars that are there."""
    if _is_first():
        tqdm.write(message, file=sys.stderr)


def _attempt() -> int:
    """How often torchrun has started this run's processes again, as far as all of them count alike."""
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) == 1:
        return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    # Every machine counts its own failures: its processes could not find those of the others.
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            "torchrun: with --max-restarts on several machines, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in "
            "the environment of every torchrun, and use --rdzv-backend c10d; otherwise a restart takes the "
            "addresses of processes that are gone"
        )
    return 0


def start(device: str = "auto") -> Processes:
    """Join the processes that torchrun started; without torchrun, be the only one.

    Args:
        device: "auto" (a GPU if there is one), "cpu" or "cuda".

    Raises:
        ValueError: "cuda" without a GPU, fewer GPUs than processes on this machine, or a torchrun on several
            machines that could not restart.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {device!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"device: process {local_rank} needs a GPU of its own, this machine has "
                f"{torch.cuda.device_count()}; start fewer processes or use --device cpu"
            )
        torch.cuda.set_device(local_rank)
        place = torch.device("cuda", local_rank)
    else:
        place = torch.device("cpu")
    if world_size > 1 and not dist.is_initialized():
        attempt = _attempt()
        store, rank, _ = next(rendezvous("env://"))
        # torchrun restarts on the store of the attempt before, where its addresses still stand.
        store = dist.PrefixStore(f"attempt-{attempt}", store)
        backend, device_id = ("nccl", place) if device == "cuda" else ("gloo", None)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, device_id=device_id)
    return Processes(int(os.environ.get("RANK", 0)), world_size, place)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
