"""The command line: `python -m bench NAME`."""

import argparse
import os
import sys
from collections.abc import Sequence

# The profiler, which counts bytes on the CPU, otherwise reports each of its starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch

from bench import memory, step

COMMANDS = {"step": step, "memory": memory}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a measurement; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure dbpkern on this machine.")
    commands = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.__doc__.partition("\n")[0],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    return COMMANDS[args.name].run(args, argv)


if __name__ == "__main__":
    sys.exit(main())
