"""Where the bytes of a training step go, for plain training, dbpkern and the published rule.

Parameters, gradients, optimizer states, R and samples (the rows from which R is updated) lie there between
steps. "saved" is what autograd keeps from the forward for the backward, without inputs, parameters and
buffers; "scratch" is what the update of R allocates on top of all that is there when it begins; "peak" is the
most that is held at any time of a step, inputs excepted. Where an optimizer holds R, its update is part of
the optimizer's step, and has no scratch of its own here. Steps are looked at that update R, when all states
exist, after the check that `python -m bench step` makes.
"""

import argparse
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from bench import cases, command, measure, record
from bench.arms import PERIOD, Arm, methods

MIB = 2**20
PARTS = ("parameters", "gradients", "optimizer", "R", "samples", "saved", "scratch", "peak")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m bench memory`."""
    cases.add_arguments(parser, tokens={"cpu": 1600, "cuda": 12800})


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def measure_arm(
    case: cases.Case, method: str, sites: str | None, inputs: tuple[Tensor, ...], precision: str
) -> dict[str, object]:
    """Bytes of each of the `PARTS`, and the peak in each phase of a step."""
    with measure.Allocations(inputs[0].device) as memory:
        arm = Arm(case, method, sites, inputs, precision)
        for _ in range(PERIOD):  # then the optimizer has its states, and R lies in stacks
            arm.step()
        known = [*arm.model.parameters(), *arm.model.buffers(), *inputs]
        with measure.saved_storages(known) as storages:
            arm.step()
        saved = sum(storages.values())
        for _ in range(PERIOD - 1):
            arm.step()
        arm.step(memory.phase)
    parameters = list(arm.model.parameters())
    update = memory.spans["decor"]
    return {
        "parameters": _bytes(parameters),
        "gradients": _bytes(p.grad for p in parameters if p.grad is not None),
        "optimizer": _bytes(
            value
            for state in arm.optimizer.state.values()
            for name, value in state.items()
            if isinstance(value, Tensor) and not name.startswith("decor_")  # R, counted beside it
        ),
        "R": _bytes(arm.factors()),
        "samples": _bytes(arm.samples()),
        "saved": saved,
        "scratch": update.peak - update.start,
        "peak": max(span.peak for span in memory.spans.values()),
        "phase_peaks": {name: span.peak for name, span in memory.spans.items()},
    }


def measure_case(case: cases.Case, args: argparse.Namespace) -> dict[str, object]:
    """The bytes of every arm, one arm after the other."""
    inputs = case.inputs(args.device, torch.float32)
    found = []
    for method, sites in methods(args.sites):
        command.progress(f"{case.name}: {method} {sites or ''}")
        found.append(
            {"arm": method, "sites": sites, "bytes": measure_arm(case, method, sites, inputs, args.precision)}
        )
    return {"arms": found}


def table(result: dict) -> str:
    """The figures of a case as Markdown, in MiB."""
    rows = [
        [arm["arm"], arm["sites"] or "-", *(f"{arm['bytes'][part] / MIB:.2f}" for part in PARTS)]
        for arm in result["arms"]
    ]
    return record.table(("arm", "sites or ranks", *(f"{part} MiB" for part in PARTS)), rows)


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Check, measure, print; returns the exit code."""
    return command.run(args, argv, measure_case, table)
