"""The command line: `python -m bench NAME`."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

# The profiler, which counts bytes on the CPU, otherwise reports each of its starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch

COMMANDS = {
    "kernels": "every op against PyTorch: time, error, shares of the machine's ceilings",
    "step": "time, FLOPs and peak memory of a training step",
    "launches": "what a training step launches on a GPU, counted without one, and an estimate of its time",
    "gpu": "everything that a GPU is needed for, in one command of a few minutes",
    "memory": "where the bytes of a training step go",
    "data": "images per second of the loader and of the parts of its work",
    "study": "how soon each way to train reaches a loss, and what the encoders that it leaves are worth",
    "compile": "every shipped kernel configuration ahead of time, its registers, shared memory and spills",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a measurement; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure dbpkern on this machine.")
    commands = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    module = None
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if argv[:1] == [name]:  # the others may need packages that are not installed
            module = importlib.import_module(f"bench.{name}")
            command.description = module.__doc__
            module.add_arguments(command)
    args = parser.parse_args(argv)
    if getattr(args, "threads", None):
        torch.set_num_threads(args.threads)
    return module.run(args, argv)


if __name__ == "__main__":
    sys.exit(main())
