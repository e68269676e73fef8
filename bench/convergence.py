"""Convergence: how soon each way to train reaches the loss that AdamW ends at.

The matrix of `bench/matrix.py` is run, as many runs at a time as there are cores (--jobs), each a process
with one thread that trains by `train/pretrain.py`'s own loop and then leaves one JSON file in
FOLDER/PRESET/runs. Runs that have their file are skipped: the matrix can be filled over days, and what is
there can be reported at any time. --time measures the time of a step of every arm, interleaved in one
process; let the machine do nothing else then. `python -m bench curves FOLDER/PRESET` makes the report.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from bench import measure, probe, record
from bench.baselines import PublishedRule
from bench.matrix import ABLATIONS, ARMS, PRESETS, SEEDS, Run, every_arm
from bench.options import count
from train import pretrain, processes
from train.loop import Diverged, Loop
from train.plots import WINDOW

FOLDER = Path(__file__).parent / "reports" / "convergence"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m bench convergence`."""
    parser.add_argument("--preset", choices=PRESETS, default="photos", help="(default: %(default)s)")
    parser.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        help=f"of {', '.join(ARMS)} (default: all of them), or ablations: {', '.join(ABLATIONS)}",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="(default: %(default)s)")
    parser.add_argument("--rate", type=float, help="run all arms at this rate alone")
    parser.add_argument("--jobs", type=count, default=os.cpu_count(), help="runs at a time (default: cores)")
    parser.add_argument("--source", help="images, as --data.source of train/pretrain.py")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the results (default: %(default)s)")
    parser.add_argument(
        "--time", type=count, metavar="ROUNDS", help="time the arms' steps and do nothing else"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # the one run that this process is to make


class Matrix:
    """The results of a preset on disk."""

    def __init__(self, folder: Path, preset: str) -> None:
        self.preset = preset
        self.folder = folder / preset
        self.runs = self.folder / "runs"

    def path(self, run: Run) -> Path:
        """The file of a run."""
        return self.runs / f"{run.name}.json"

    def final(self, run: Run) -> float:
        """Final training loss of a finished run: infinite if it diverged."""
        losses = json.loads(self.path(run).read_text())["losses"]
        final = statistics.fmean(losses[-WINDOW:])
        return final if len(losses) == PRESETS[self.preset].settings["steps"] else math.inf

    def best_rate(self, arm: str, seed: int) -> float | None:
        """The rate with the lowest final loss among the runs with this seed; None before all are there."""
        runs = [Run(self.preset, arm, rate, seed) for rate in ARMS[arm].rates]
        if not all(self.path(run).exists() for run in runs):
            return None
        return min(runs, key=self.final).rate

    def missing(self, arms: Sequence[str], seeds: Sequence[int], rate: float | None) -> Iterator[Run]:
        """The runs that can be made now, in the order in which they are worth it."""
        wanted: list[Run] = []
        for arm in arms:
            tuned = arm if arm in ARMS else "dbp"
            if rate is None and arm in ARMS:
                wanted += [Run(self.preset, arm, r, seeds[0]) for r in ARMS[arm].rates]
            chosen = rate if rate is not None else self.best_rate(tuned, seeds[0])
            if chosen is not None:
                wanted += [Run(self.preset, arm, chosen, seed) for seed in seeds]
        yield from (run for run in dict.fromkeys(wanted) if not self.path(run).exists())


def build_published(config: pretrain.Config, model: nn.Module) -> tuple:
    """As `train.pretrain.build_optimizers`, with R by the published rule."""
    decor = config.decor
    rule = PublishedRule(model, decor.sites, decor.accepts, decor.eta, decor.kappa)
    optimizer, _ = pretrain.build_optimizers(config, model)
    optimizer.register_step_post_hook(lambda *_: rule.step())
    return optimizer, rule


def builder(run: Run) -> Callable:
    """What makes the optimizers of a run."""
    return build_published if every_arm()[run.arm].published else pretrain.build_optimizers


def train(run: Run, data: dict[str, object]) -> dict[str, object]:
    """Make one run in this process and return what is kept of it."""
    torch.set_num_threads(1)
    preset = PRESETS[run.preset]
    with tempfile.TemporaryDirectory() as out:
        config = run.config(out, data)
        procs = processes.start(config.device)
        loop, evaluator, batches = pretrain.prepare(config, procs, builder(run))
        evaluator.observes = False
        evals: list[dict[str, float]] = []

        def evaluate() -> dict[str, object]:
            if loop.step:
                found = {"step": loop.step, "heldout_loss": evaluator()["heldout_loss"]}
                if preset.probe:
                    found["probe"] = probe.accuracy(loop.model, preset.probe)
                evals.append(found)
            return {}

        loop.evaluate = evaluate
        outcome = "finished"
        try:
            loop.train(batches)
        except Diverged as error:
            outcome = str(error)
        steps = [r for r in loop.run.records() if r["kind"] == "step"]
        settings = asdict(config)
    del settings["out"]
    return {
        "run": asdict(run),
        "outcome": outcome,
        "settings": settings,
        "losses": [round(r["loss"], 5) for r in steps],
        "seconds": loop.seconds,
        "evals": evals,
        "energy": loop.energy.summary(None),
        "skipped_steps": loop.skipped,
        "machine": record.header(["convergence", "--preset", run.preset], procs.device, config.precision),
    }


def _start(run: Run, path: Path, data: dict[str, object]) -> Run:
    """Make one run in a process of its own; its file appears when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    spec = json.dumps({"run": asdict(run), "data": data})
    result = subprocess.run(
        [sys.executable, "-m", "bench", "convergence", "--worker", spec],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    if result.returncode:
        raise RuntimeError(f"{run.name} failed:\n{result.stderr[-2000:]}")
    writing = path.with_suffix(".writing")
    writing.write_text(result.stdout.strip().splitlines()[-1] + "\n")
    writing.replace(path)
    return run


def fill(matrix: Matrix, args: argparse.Namespace, arms: Sequence[str], data: dict) -> None:
    """Make all missing runs."""
    started: set[Run] = set()
    running: set[Future] = set()
    with ThreadPoolExecutor(args.jobs) as pool:
        while True:
            for run in matrix.missing(arms, args.seeds, args.rate):
                if len(running) >= args.jobs:
                    break
                if run not in started:
                    started.add(run)
                    record.progress(f"{run.name}: started")
                    running.add(pool.submit(_start, run, matrix.path(run), data))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                run = future.result()
                record.progress(f"{run.name}: final loss {matrix.final(run):.4f}")


def time_steps(matrix: Matrix, arms: Sequence[str], rounds: int, data: dict) -> dict[str, object]:
    """Seconds of a step of every arm, interleaved, and their ratios to the first arm's within a round."""
    steps = []
    for name in arms:
        run = Run(matrix.preset, name, 1e-3, 0)
        with tempfile.TemporaryDirectory() as out:
            config = run.config(out, data)
            procs = processes.start(config.device)
            loop, _, batches = pretrain.prepare(config, procs, builder(run))
            batch = next(batches)
        steps.append(_step(loop, batch))
    times = []
    for turn in range(1 + rounds):
        record.progress(f"round {turn} of {rounds}{'' if turn else ', to warm up'}")
        timed = measure.rotated_round(steps, turn, lambda step: measure.seconds(step, procs.device, 4))
        times.append(timed)
    found = {}
    by_arm = list(zip(*times[1:], strict=True))
    for name, seconds in zip(arms, by_arm, strict=True):
        ratio = measure.paired_ratio(seconds, by_arm[0])
        found[name] = {"seconds": measure.quartiles(seconds)._asdict(), "ratio": ratio._asdict()}
    return found


def _step(loop: Loop, batch: dict) -> Callable[[], None]:
    device = loop.processes.device
    batch = {k: v.to(device) for k, v in batch.items() if k != "skipped"}

    def step() -> None:
        with torch.autocast(device.type, loop.autocast, enabled=loop.autocast is not None):
            loss = loop.loss(loop.model, batch)
        loss.backward()
        loop.optimizer.step()
        loop.optimizer.zero_grad(set_to_none=True)

    return step


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Fill the matrix, or time its arms; returns the exit code."""
    if args.worker is not None:
        spec = json.loads(args.worker)
        print(json.dumps(train(Run(**spec["run"]), spec["data"])))
        return 0
    data = {} if args.source is None else {"data.source": args.source}
    asked = list(ARMS) if args.arms is None else args.arms
    arms = [name for a in asked for name in ABLATIONS.get(a, [a])]
    unknown = [name for name in arms if name not in every_arm()]
    if unknown:
        record.progress(
            f"convergence: expected some of {', '.join([*every_arm(), *ABLATIONS])}, got {unknown[0]}"
        )
        return 2
    matrix = Matrix(args.folder, args.preset)
    if args.time is None:
        fill(matrix, args, arms, data)
        return 0
    measure.keep_freed_memory()
    arms = ["adamw", *(name for name in arms if name != "adamw")]
    config = Run(args.preset, "adamw", 1e-3, 0).config("unused", data)
    head = record.header(argv, torch.device(config.device), config.precision)
    matrix.folder.mkdir(parents=True, exist_ok=True)
    path = matrix.folder / "timing.json"
    path.write_text(json.dumps(head | {"arms": time_steps(matrix, arms, args.time, data)}, indent=1) + "\n")
    return 0
