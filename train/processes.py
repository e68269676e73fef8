"""The processes of a run: one, or as many as torchrun started."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


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

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.world_size > 1:
            dist.barrier()


def start(device: str = "auto") -> Processes:
    """Join the processes that torchrun started; without torchrun, be the only one.

    Args:
        device: "auto" (a GPU if there is one), "cpu" or "cuda".

    Raises:
        ValueError: "cuda" without a GPU, or fewer GPUs than processes on this machine.
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
        if device == "cuda":
            dist.init_process_group("nccl", device_id=place)
        else:
            dist.init_process_group("gloo")
    return Processes(int(os.environ.get("RANK", 0)), world_size, place)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
