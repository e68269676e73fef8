"""Time, FLOPs and peak memory of a training step, against plain training and the published rule.

A step is zero_grad, forward, backward, the optimizer and the update of R, the mean of two steps, as the
default updates R in every second one. DecorAdamW and DecorPreconditioner decorrelate the encoder, and the
decoders of MAE and DARL, by the ranks of a preset; the others decorrelate the encoder alone, by full R that
are updated in every step: "full" around the optimizer, "layers" in decorrelated layers, and as published.
Before anything is timed, these and the published rule train a small model of the same kind from one start on
the same samples, in fp64 and in the precision asked for: unless losses, weights and R agree, no figure is
printed and the exit code is 1. Low ranks are another rule, which the tests hold to its own mathematics.

All arms run in one process, one after the other in each round, in an order that rotates. The time ratio is
the median over rounds of (arm / plain) within a round, with its quartiles; the seconds are medians, too. Peak
memory is what an arm holds at most during a step, weights and optimizer states included, inputs not.
"""

import argparse
import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
from torch import nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import ShapeEnv  # for numbers that are read back
from torch.utils.flop_counter import FlopCounterMode

from bench import cases, command, measure, record
from bench.arms import PERIOD, Arm, methods, muon

MIB = 2**20
OPTIMIZERS = {"adamw": torch.optim.AdamW, "muon": muon}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m bench step`."""
    cases.add_arguments(parser, tokens={"cpu": 6400, "cuda": 12800})
    parser.add_argument("--rounds", type=cases.count, help="after one to warm up (default: 7, on a GPU 20)")
    parser.add_argument(
        "--inner", type=cases.count, help="pairs of steps of an arm in a round (default: 1, on a GPU 3)"
    )
    parser.add_argument(
        "--count", action="store_true", help="count FLOPs alone, without weights or time: for any size"
    )
    parser.add_argument(
        "--optimizer", choices=("adamw", "muon"), default="adamw",
        help="of plain training; muon is timm's, in fp32 on a CPU, beside DecorMuon (default: adamw)",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="torch.compile the model of every arm")


def prepare(make: Callable[[], Arm], args: argparse.Namespace) -> tuple[Arm, dict[str, int]]:
    """Make an arm and run its first steps; returns it with the FLOPs and the peak bytes of a step."""
    with measure.Allocations(args.device) as memory:
        arm = make()
        flops = count(arm)
        if args.compile:
            arm.model.compile()
            arm.step()
        with memory.phase("step"):
            steps(arm)
    return arm, {"flops": flops, "peak_bytes": memory.spans["step"].peak}


def steps(arm: Arm) -> None:
    """Steps from one update of R to the next."""
    for _ in range(PERIOD):
        arm.step()


def count(arm: Arm) -> float:
    """FLOPs of a step."""
    with FlopCounterMode(display=False) as counter:
        steps(arm)
    return counter.get_total_flops() / PERIOD


class _Counted(cases.Case):
    """A case whose model has fake weights, if built where tensors are fake."""

    def build(self) -> nn.Module:
        mode = detect_fake_mode()
        with unset_fake_temporarily():
            model = super().build()  # timm reads numbers back, which fake tensors do not have
            with FakeCopyMode(mode):
                return copy.deepcopy(model)


def count_case(case: cases.Case, args: argparse.Namespace) -> dict[str, object]:
    """FLOPs of every arm, on tensors without memory."""
    case = _Counted(**asdict(case))
    found = []
    for method, sites in methods(args.sites, args.optimizer):
        with FakeTensorMode(shape_env=ShapeEnv()), warnings.catch_warnings():
            # Whether R lies in its stack is told by addresses; without them it is put there anew.
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            inputs = case.inputs(args.device, torch.float32)
            arm = Arm(case, method, sites, inputs, args.precision, OPTIMIZERS[args.optimizer])
            found.append({"arm": method, "sites": sites, "flops": count(arm)})
        found[-1]["flop_ratio"] = found[-1]["flops"] / found[0]["flops"]
    return {"arms": found}


def measure_case(case: cases.Case, args: argparse.Namespace) -> dict[str, object]:
    """Times, FLOPs and bytes of every arm."""
    if args.count:
        return count_case(case, args)
    gpu = args.device.type == "cuda"
    rounds, inner = args.rounds or (20 if gpu else 7), args.inner or (3 if gpu else 1)
    inputs = case.inputs(args.device, torch.float32)
    arms, found = [], []
    for method, sites in methods(args.sites, args.optimizer):
        command.progress(f"{case.name}: counting {method} {sites or ''}")
        optimizer = OPTIMIZERS[args.optimizer]
        make = functools.partial(Arm, case, method, sites, inputs, args.precision, optimizer)
        arm, counts = prepare(make, args)
        arms.append(arm)
        found.append({"arm": method, "sites": sites, **counts})

    def timed(step: Callable) -> float:
        return measure.seconds(step, args.device, inner) / PERIOD

    times: list[list[float]] = []
    for turn in range(1 + rounds):
        command.progress(f"{case.name}: round {turn} of {rounds}{'' if turn else ', to warm up'}")
        times.append(measure.rotated_round([functools.partial(steps, arm) for arm in arms], turn, timed))
    for arm, seconds in zip(found, zip(*times[1:], strict=True), strict=True):
        plain = found[0]
        arm["seconds"] = seconds
        arm["median_seconds"] = measure.quartiles(seconds).median
        arm["time_ratio"] = measure.paired_ratio(seconds, plain["seconds"])._asdict()
        arm["flop_ratio"] = arm["flops"] / plain["flops"]
        arm["peak_ratio"] = arm["peak_bytes"] / plain["peak_bytes"]
    return {"rounds": rounds, "inner": inner, "compiled": args.compile, "arms": found}


def table(result: dict) -> str:
    """The figures of a case as Markdown."""
    rows = []
    for arm in result["arms"]:
        row = {"arm": arm["arm"], "sites or ranks": arm["sites"] or "-"}
        if "seconds" in arm:
            ratio = arm["time_ratio"]
            row["s/step"] = f"{arm['median_seconds']:.4g}"
            row["time / plain"] = f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
        row["GFLOP"] = f"{arm['flops'] / 1e9:.4g}"
        row["GFLOP / plain"] = f"{arm['flop_ratio']:.3f}"
        if "seconds" in arm:
            row["peak MiB"] = f"{arm['peak_bytes'] / MIB:.1f}"
            row["peak / plain"] = f"{arm['peak_ratio']:.3f}"
        rows.append(row)
    return record.table(tuple(rows[0]), [list(row.values()) for row in rows])


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Check, measure, print; returns the exit code."""
    measure.keep_freed_memory()
    return command.run(args, argv, measure_case, table)
