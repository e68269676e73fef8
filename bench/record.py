"""How results are told: the machine they come from, and tables."""

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from dbpkern import env, tune


def progress(text: str) -> None:
    """Tell what is being done, on stderr: stdout holds results alone."""
    print(text, file=sys.stderr, flush=True)


def header(argv: Sequence[str], device: torch.device, precision: str) -> dict[str, object]:
    """What every JSON says of its run: command, date, machine, versions, commit and precision."""
    return {
        "command": " ".join(["python -m bench", *argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": env.collect(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "precision": precision,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def machine_line(header: dict) -> str:
    """The header in a line."""
    machine = header["machine"]
    processor = header["device"]
    if processor == "cpu":
        processor = f"{machine['cpu']}, {machine['threads']} threads"
    found = {name: machine["packages"][name] for name in ("torch", "triton", "timm")}
    versions = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    head, changes, _ = (machine["commit"] or "unknown").partition("+changes")
    commit = head[:12] + changes
    return f"{processor}; {versions}; dbpkern {machine['dbpkern']}, commit {commit}; {header['date']}"


def machine_lines(headers: Iterable[dict]) -> list[str]:
    """Machine, versions, commit and dates of several runs, one line for those that are alike."""
    dates: dict[str, list[str]] = {}
    for header in headers:
        line, _, date = machine_line(header).rpartition("; ")
        dates.setdefault(line, []).append(date)
    return [f"{line}; {len(found)} runs, {min(found)} to {max(found)}" for line, found in dates.items()]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right; the first two columns are names."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        pairs = list(zip(cells, widths, strict=True))
        names = [cell.ljust(width) for cell, width in pairs[:2]]
        return f"| {' | '.join(names + [cell.rjust(width) for cell, width in pairs[2:]])} |"

    rule = ["-" * w if i < 2 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(lines[0]), line(rule), *map(line, lines[1:])])


class Stage:
    """What a stage writes, and how long it may go on.

    Args:
        file: written after every change.
        args: of the command.
        argv: the command line.
    """

    def __init__(self, file: Path, args: argparse.Namespace, argv: Sequence[str]) -> None:
        self.file, self.dry, self.limit = file, args.dry, args.budget
        self.begin = time.monotonic()
        self.device = torch.device("cpu" if args.dry else "cuda")
        self.content: dict = header(argv, self.device, "bf16") | {"dry": args.dry, "rows": []}
        tune.write(file, self.content)

    def add(self, **row: object) -> None:
        """Add a row."""
        self.content["rows"].append(row)
        tune.write(self.file, self.content)

    def set(self, name: str, value: object) -> None:
        """Set what stands beside the rows."""
        self.content[name] = value
        tune.write(self.file, self.content)

    def within(self, part: float) -> bool:
        """Whether less than this part of the time is over."""
        return time.monotonic() - self.begin < part * self.limit
