"""Whether 16-bit operands in the maps change what a run ends at: the demo with and without, on the CPU.

On a GPU the kernels round gradients, changes, R - I, Q and S to bf16 where they map, and sum in fp32. Here
the same operands are rounded in PyTorch's implementation. Arms: AdamW, DecorAdamW, DecorAdamW with rounded
operands, and DecorPreconditioner; a run of `train/configs/demo.yaml` each, for every seed, with losses kept
in FOLDER.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from bench import options, record
from dbpkern.ops import adamw, maps

FOLDER = Path("bench/reports/rounding")
ARMS = {
    "AdamW": [],
    "DecorAdamW": ["--decor.enable", "true"],
    "DecorAdamW, operands in bf16": ["--decor.enable", "true"],
    "DecorPreconditioner": ["--decor.enable", "true", "--decor.mode", "preconditioner"],
}
ROUNDED = "DecorAdamW, operands in bf16"
WINDOW = 50
"""Steps over which losses are averaged."""


def rounded(x: Tensor) -> Tensor:
    """x with the digits of bf16."""
    return x.bfloat16().to(x.dtype)


def add_deviation_(
    base: Tensor, x: Tensor, factors: Sequence[Tensor], before: Tensor | float = 0.0
) -> Tensor:
    """As `dbpkern.ops.maps.add_deviation_`, with the operands that the kernels have."""
    if len(factors) == 1:
        deviation = rounded(factors[0] - torch.eye(len(factors[0])))
        return base.addmm_(rounded(x - before), deviation)
    Q, S = map(rounded, factors)
    t = rounded(rounded(x) @ Q - before)
    return base.addmm_(rounded(t @ S), Q.mT)


def train(arm: str, seed: int, out: str) -> None:
    """One run, in this process."""
    from train import pretrain

    torch.set_num_threads(1)
    with contextlib.ExitStack() as patches:
        for module in (maps, adamw) if arm == ROUNDED else ():
            patches.enter_context(mock.patch.object(module, "add_deviation_", add_deviation_))
        pretrain.main(["--config", "train/configs/demo.yaml", "--out", out, "--seed", str(seed), *ARMS[arm]])


def losses(arm: str, seed: int) -> list[float]:
    """The training losses of a run, from its file, or by running it."""
    file = FOLDER / "runs" / f"{arm.replace(', ', ' ').replace(' ', '-')}_seed{seed}.json"
    if file.exists():
        return json.loads(file.read_text())["losses"]
    record.progress(f"{arm}, seed {seed}")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "run")
        command = [sys.executable, "-m", "bench", "rounding", "--run", arm, str(seed), str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
        found = [line["loss"] for line in lines if line["kind"] == "step"]
    file.parent.mkdir(parents=True, exist_ok=True)
    head = record.header(["rounding"], torch.device("cpu"), "fp32")
    file.write_text(
        json.dumps(head | {"arm": arm, "seed": seed, "losses": [round(x, 5) for x in found]}) + "\n"
    )
    return found


def reaches(curve: Sequence[float], target: float) -> int | None:
    """The first step from which the mean of `WINDOW` losses stays at or below the target."""
    means = [sum(curve[max(0, i - WINDOW + 1) : i + 1]) / min(i + 1, WINDOW) for i in range(len(curve))]
    above = [i for i, value in enumerate(means) if value > target]
    first = above[-1] + 1 if above else 0
    return first + 1 if first < len(means) else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m bench rounding`."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument(
        "--run", nargs=3, metavar=("ARM", "SEED", "OUT"), help="one run alone, in this process"
    )
    parser.add_argument("--out", type=options.file, help=f"the report (default: {FOLDER}/report.md)")


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Run what is missing, write the report; returns the exit code."""
    if args.run:
        train(args.run[0], int(args.run[1]), args.run[2])
        return 0
    curves = {arm: {seed: losses(arm, seed) for seed in args.seeds} for arm in ARMS}
    final = {arm: {s: sum(c[-WINDOW:]) / WINDOW for s, c in found.items()} for arm, found in curves.items()}
    rows = []
    for arm, found in curves.items():
        values = list(final[arm].values())
        steps = [reaches(curve, final["AdamW"][seed]) for seed, curve in found.items()]
        length = len(next(iter(found.values())))
        shares = ["never" if s is None else f"{100 * s / length:.0f} %" for s in steps]
        mean = sum(values) / len(values)
        rows.append([arm, f"{mean:.4f}", " ".join(f"{v:.4f}" for v in values), " ".join(shares)])
    columns = ("arm", "final loss, mean", "by seed", "steps to AdamW's, by seed")
    head = record.header(argv, torch.device("cpu"), "fp32")
    text = (
        f"# 16-bit operands in the maps\n\n{record.machine_line(head)}\n\n`{head['command']}`, demo, seeds "
        f"{', '.join(map(str, args.seeds))}; training loss, mean of the last {WINDOW} steps.\n\n"
        f"{record.table(columns, rows)}\n"
    )
    report = args.out or FOLDER / "report.md"
    report.write_text(text)
    print(text)
    return 0
