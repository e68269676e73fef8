"""Processes of tests, forked from a server that has imported what they need: importing it takes seconds each.

They are real processes with their own group of gloo; what torchrun adds is tested where a test calls it.
"""

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path

import torch
from torch.multiprocessing import start_processes
from torch.multiprocessing.spawn import ProcessContext

# DistributedDataParallel needs _dynamo, and the shards of a checkpoint torch.distributed.checkpoint.
PRELOAD = [
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "train.pretrain",
    "train.finetune",
    "train.segment",
]
ROOT = str(Path(__file__).parents[2])


def _serve() -> None:
    """Start the server if there is none; it finds this repository."""
    forkserver.set_forkserver_preload(PRELOAD)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = ROOT if before is None else ROOT + os.pathsep + before
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def processes(work: Callable, world: int, *arguments: object) -> None:
    """Call `work(rank, world, *arguments)` in `world` processes; an exception in one is raised here."""
    _serve()
    start_processes(work, (world, *arguments), nprocs=world, start_method="forkserver")


class Script:
    """A script's main that runs in processes of its own, as under torchrun."""

    output = ""

    def __init__(self, main: Callable[[Sequence[str]], None], arguments: Sequence[str], world: int = 1):
        descriptor, name = tempfile.mkstemp()
        os.close(descriptor)
        self._file = Path(name)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        _serve()
        self._context: ProcessContext = start_processes(
            _worker,
            (world, port, name, main, list(arguments)),
            nprocs=world,
            join=False,
            start_method="forkserver",
        )

    def check_runs(self) -> None:
        """Assert that no process has ended."""
        assert not any(process.exitcode for process in self._context.processes), self._file.read_text()

    def kill(self) -> None:
        """End all processes by SIGKILL."""
        for process in self._context.processes:
            process.kill()
            process.join()
        self._file.unlink()

    def wait(self) -> None:
        """Wait until the processes have ended; `output` is what they have printed, also if one failed.

        Raises:
            ProcessExitedException, ProcessRaisedException: one failed; the others are ended.
        """
        try:
            while not self._context.join():
                pass
        finally:
            self.output = self._file.read_text()
            self._file.unlink()


def wait_until(condition: Callable[[], bool], started: Script | subprocess.Popen) -> None:
    """Wait until something is so, at most two minutes, as long as what was started runs."""
    deadline = time.monotonic() + 120
    while not condition():
        if isinstance(started, Script):
            started.check_runs()
        else:
            assert started.poll() is None, f"ended with {started.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def run(main: Callable[[Sequence[str]], None], arguments: Sequence[str], world: int = 1) -> str:
    """Run a script's main in processes of its own to the end, and return what they printed."""
    script = Script(main, arguments, world)
    script.wait()
    return script.output


def _worker(rank: int, world: int, port: int, output: str, main: Callable, arguments: list[str]) -> None:
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if world > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in names.items()}
    main(arguments)
