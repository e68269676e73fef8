"""Everything that a GPU is needed for, in one command for a machine that is lent for minutes.

    python -m bench gpu --budget 560 --out DIR

Every stage is a process of its own, which is killed with its children when its time is over; one that fails,
dies or hangs stops no other. A stage gets at most its share of the budget and of what is left, and is skipped
where that is less than it needs. Each writes its file anew after every measurement, so that what was measured
stays; DIR/summary.json says how each stage ended, DIR/NAME.log what it printed.

    env     env.json     versions, clocks; ceilings of products (bf16, TF32, fp32) and copies
    smoke   smoke.json   every kernel: whether it ends, repeats itself bit for bit, agrees with fp64, replays
    step    step.json    parts of a training step of MAE's ViT-B with 256 images, bf16: plain and by dbpkern
    ops     ops.json     Triton against PyTorch in bf16, TF32 and fp32, op by op
    tests   junit*.xml   the tests of the ops, and those of all else that need a GPU
    tune    tuned.json   python -m dbpkern.tune
    small   small.json   as step, for ViT-Ti and for 32 images, where the host is the limit, and for Muon
    graphs  graphs.json  the step of DecorAdamW in a CUDA graph against the same without one

The stages run by what was tuned before, if anything was: env.json says so. What the stage tune finds they do
not use, and it is not kept in the user's cache.

Needs torch, triton, numpy, timm and pytest. Ratios are medians over rounds of (arm / plain) within a round,
with quartiles. No figure is held back: look at smoke.json and junit.xml before quoting one.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import gpu_stages, record
from bench.record import Stage
from dbpkern import tune

FAULT = "BENCH_GPU_FAULT"
"""An environment variable for tests: "NAME=hang", "NAME=die" or "NAME=raise", separated by commas."""


@dataclass(frozen=True)
class Plan:
    """A stage, its file, its share of the budget, and the seconds that it needs at least."""

    work: Callable[[Stage], None] | None
    file: str
    share: float
    least: float


PLANS = {
    "env": Plan(gpu_stages.environment, "env.json", 20, 5),
    "smoke": Plan(gpu_stages.smoke, "smoke.json", 90, 15),
    "step": Plan(gpu_stages.steps, "step.json", 120, 30),
    "ops": Plan(gpu_stages.compare, "ops.json", 80, 15),
    "tests": Plan(gpu_stages.run_tests, "tests.json", 80, 15),
    "tune": Plan(None, "tuned.json", 100, 15),
    "small": Plan(gpu_stages.small, "small.json", 50, 15),
    "graphs": Plan(gpu_stages.graphs, "graphs.json", 20, 10),
}
TOTAL = sum(plan.share for plan in PLANS.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m bench gpu`."""
    parser.add_argument("--budget", type=float, default=TOTAL, help="seconds for all (default: %(default)g)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder of the results")
    parser.add_argument("--stages", nargs="+", choices=PLANS, default=list(PLANS), help="only these")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, to see that it runs")
    parser.add_argument("--inside", choices=PLANS, help=argparse.SUPPRESS)


def command_of(name: str, args: argparse.Namespace, limit: float) -> list[str]:
    """The command line of a stage."""
    dry = ["--dry"] * args.dry
    if name == "tune":
        few = ["--ops", "correlation", "sample_rows_"] if args.dry else []
        return [sys.executable, "-m", "dbpkern.tune", *dry, *few, "--out", str(args.out / PLANS[name].file)]
    own = ["--out", str(args.out), "--budget", str(limit), "--inside", name, *dry]
    return [sys.executable, "-m", "bench", "gpu", *own]


def run_stage(name: str, args: argparse.Namespace, limit: float) -> dict[str, object]:
    """Run a stage in a process of its own for at most `limit` seconds; returns how it ended."""
    begin, log = time.monotonic(), args.out / f"{name}.log"
    environment = os.environ | ({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if args.dry else {})
    with log.open("wb") as out:
        command = command_of(name, args, limit)
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(limit)
            status = "done" if code == 0 else f"failed, exit code {code}"
        except subprocess.TimeoutExpired:
            status = f"killed after {limit:.0f} s"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # its children, too
                process.wait(10)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass
    found = {"status": status, "seconds": round(time.monotonic() - begin, 1), "log": log.name}
    if status != "done":
        lines = log.read_text(errors="replace").strip().splitlines()
        found["last_line"] = lines[-1][:300] if lines else ""
    return found


def run_inside(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Do the work of a stage in this process."""
    plan = PLANS[args.inside]
    fault = dict(part.split("=") for part in os.environ.get(FAULT, "").split(",") if part).get(args.inside)
    if fault == "hang":
        child = subprocess.Popen(["sleep", "3600"])
        print(child.pid, flush=True)
        child.wait()
    if fault == "die":
        os._exit(9)
    if fault == "raise":
        raise RuntimeError("a fault for a test")
    plan.work(Stage(args.out / plan.file, args, argv))
    return 0


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Run the stages; returns the exit code, 1 where one was not done, 2 where there is no GPU."""
    if args.inside:
        return run_inside(args, argv)
    if not args.dry and not torch.cuda.is_available():
        record.progress("there is no CUDA GPU here; --dry runs all with tiny sizes on the CPU")
        return 2
    begin = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    summary = {"command": " ".join(argv), "budget": args.budget, "dry": args.dry, "stages": {}}
    for name in args.stages:
        plan = PLANS[name]
        left = args.budget - (time.monotonic() - begin)
        limit = min(left, args.budget * plan.share / sum(PLANS[other].share for other in args.stages))
        if limit < (2 if args.dry else plan.least):
            found = {"status": f"skipped: {max(limit, 0):.0f} s are too few", "seconds": 0}
        else:
            found = run_stage(name, args, limit)
        if (args.out / plan.file).exists():
            found["file"] = plan.file
        summary["stages"][name] = found
        summary["seconds"] = round(time.monotonic() - begin, 1)
        tune.write(args.out / "summary.json", summary)
        record.progress(f"{name}: {found['status']}, {found['seconds']} s")
    return int(any(found["status"] != "done" for found in summary["stages"].values()))
