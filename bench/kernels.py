"""Every op and the whole-model update, against the published rule and PyTorch's best algebra on stacks.

The arms: ours as dispatched, ours with each backend that can serve, the published rule (a loop over layers in
fp32; forward and backward of bf16 rows also as under autocast) in eager PyTorch and under torch.compile, and
`baddbmm` on stacks by the cheaper association. Each is compared with fp64 in this run, on the first, middle
and last layer: its largest error may be twice that of PyTorch with operands of the same dtype, and four units
in the last place of the largest value. An arm that gives another result, or none without an excuse, gets no
time, and the exit code is 1. It is excused where its backend refuses, memory runs out, PyTorch lacks a
product or a compiler is missing.

The arms run one after the other in each round, in an order that rotates; speed-ups are medians over rounds of
(published / arm) within a round, where the published rule multiplies in the dtype of the rows if it has such
an arm. FLOPs and bytes are those of the least arithmetic known and of every operand moved once, the same for
all arms that compute the same: an arm of low rank beside those of a full R has its own, and so has the
published rule beside a low rank, which it knows as a dense R of the same value alone. Rates stand beside the
ceilings of a large matrix product and a large copy, measured in this run. Steps change R in place at a rate
of 1e-8, and Q at 4e-8, so that they stay what they were. On a GPU events are timed, L2 is flushed before each
call and inputs rotate; CUDA graphs are replayed where an arm can be captured, and what a replay gives is
checked likewise.

By default, on a GPU: the whole-model update of all models at all batches and tokens, and every op at ViT-B,
batch 256, 50 tokens; on the CPU: the update of ViT-B, and every op at ViT-S, batch 64. Any of --model,
--batch, --tokens, --op measures the product of what is named, with ViT-B, 256, 50 and every op for what is
not. How many minutes are left is told after each shape.
"""

import argparse
import functools
import gc
import itertools
import json
import math
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench import accuracy, measure, options, record, report, workloads
from bench.record import progress
from bench.workloads import Arm, Inputs, Workload

NEEDS_GPU = (
    "No CUDA device here: the kernels need an NVIDIA GPU of compute capability 8.0 or newer, and Triton; "
    "what follows compares the eager implementation on the CPU."
)
CHECK_RATE = 0.05  # of R: large enough that a wrong step shows
TIMED_RATE = 1e-8
LEAST_SECONDS = 0.02  # that a measurement of an arm in a round should take
MOST_INNER = 20
ROTATED_BYTES = 2**28  # inputs up to this size are made three times over
CAPTURED_BYTES = 2**30  # what a CUDA graph may keep for itself; larger steps gain nothing from one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m bench kernels`."""
    parser.add_argument(
        "--device", type=options.device, help="cpu or cuda (default: cuda where there is a device)"
    )
    parser.add_argument("--model", nargs="+", choices=workloads.MODELS, help="ViT-S, B, L or H")
    parser.add_argument("--batch", nargs="+", type=options.count, help="images")
    parser.add_argument("--tokens", nargs="+", type=options.count, help="of an image")
    parser.add_argument("--op", nargs="+", choices=workloads.OPS, help="what is measured")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=workloads.DTYPES,
        help="of rows and of folded weights; R is fp32 always (default: fp32, on a GPU bf16)",
    )
    parser.add_argument(
        "--matmul",
        nargs="+",
        choices=("ieee", "tf32"),
        help="fp32 products of PyTorch, ours among them (default: ieee, on a GPU both)",
    )
    parser.add_argument("--rank", type=options.count, default=64, help="of low-rank R (default: 64)")
    parser.add_argument("--rounds", type=options.count, help="default: 3, on a GPU 20")
    parser.add_argument("--no-compile", action="store_true", help="leave out the arms under torch.compile")
    parser.add_argument("--threads", type=options.count, help="CPU threads (default: as PyTorch chooses)")
    parser.add_argument(
        "--out", type=options.file, metavar="JSON", help="write what is measured to this file, as it comes"
    )


def selected(args: argparse.Namespace) -> list[Workload]:
    """The workloads asked for."""
    gpu = args.device.type == "cuda"
    dtypes = args.dtype or (["bf16"] if gpu else ["fp32"])
    choose = functools.partial(workloads.workloads, dtypes=dtypes, rank=args.rank)
    if args.model or args.batch or args.tokens or args.op:
        ops = args.op or workloads.OPS
        return choose(ops, args.model or ["B"], args.batch or [256], args.tokens or [50])
    singles = [op for op in workloads.OPS if op != "model_update"]
    if gpu:
        updates = choose(["model_update"], workloads.MODELS, [64, 256, 1024], [50, 197])
        return updates + choose(singles, ["B"], [256], [50])
    return choose(["model_update"], ["B"], [256], [50]) + choose(singles, ["S"], [64], [50])


@dataclass
class Candidate:
    """An arm under a setting of PyTorch's fp32 products, and what was found of it."""

    arm: Arm
    setting: str
    found: dict[str, object]

    @property
    def kind(self) -> str:
        """The operands of its products."""
        return self.arm.kind or self.setting

    def call(self, function: Callable[[], object]) -> object:
        """Call under the setting."""
        with measure.matmul_setting(self.setting):
            return function()

    def fail(self, reason: str) -> None:
        """It gives a wrong result, or none where it should."""
        self.found["failed"] = reason

    def refuse(self, reason: str) -> None:
        """It cannot serve."""
        self.found["refused"] = reason

    @property
    def valid(self) -> bool:
        """Whether its figures may be shown."""
        return not {"failed", "refused"} & self.found.keys()


def candidates(workload: Workload, args: argparse.Namespace) -> list[Candidate]:
    """All arms under all settings."""
    gpu = args.device.type == "cuda"
    settings = args.matmul or (["ieee", "tf32"] if gpu else ["ieee"])
    found = []
    for setting in settings:
        for arm in workload.arms:
            if args.no_compile and arm.compiled:
                continue
            if arm.halves and setting != settings[0]:
                continue  # without fp32 operands the settings are one
            about = {"arm": arm.name, "family": arm.family, "group": arm.group}
            about |= {"backend": arm.backend, "compiled": arm.compiled}
            found.append(Candidate(arm, setting, about | {"matmul": "bf16" if arm.halves else setting}))
    return found


def _reason(error: Exception) -> str:
    lines = [textwrap.shorten(line, 200) for line in str(error).strip().splitlines()]
    if isinstance(error, ValueError) and lines:
        return lines[0]
    return ": ".join([type(error).__name__, *lines[:1]])


COMPILER_MISSING = (
    "No working C++ compiler found",
    "Failed to find C compiler",
    "Cannot find a working triton installation",
)
"""How PyTorch and Triton say so; the types of these errors differ between versions."""


def excused(arm: Arm, error: Exception) -> bool:
    """Whether an error says that an arm cannot serve here, rather than that something is wrong with it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if arm.halves and isinstance(error, NotImplementedError):
        return True  # an fp32 result of 16-bit operands
    if arm.backend and isinstance(error, ValueError):
        return True
    if arm.compiled:
        causes, cause = [], error
        while cause is not None:
            causes.append(str(cause))
            cause = cause.__cause__ or cause.__context__
        return any(sign in text for sign in COMPILER_MISSING for text in causes)
    return False


class Gate:
    """Compares results of a workload with fp64."""

    def __init__(self, workload: Workload, inputs: Inputs) -> None:
        self.workload = workload
        self.picked = {name: workloads.pick(value) for name, value in inputs.items()}
        self.cuda = any(value.is_cuda for value in inputs.values())
        self.known: dict[object, list] = {}

    def truth(self, reference: workloads.Reference) -> list[torch.Tensor]:
        """The specification in fp64."""
        wide = {n: x.double() if x.is_floating_point() else x for n, x in self.picked.items()}
        return list(reference(wide, CHECK_RATE, lambda x: x))

    def yardstick(self, reference: workloads.Reference, kind: str) -> list[torch.Tensor]:
        """The specification in fp32 with operands of a kind."""
        wide = {n: x.float() if x.is_floating_point() else x for n, x in self.picked.items()}
        narrow = accuracy.ROUNDING["16bit" if kind == "16bit" else "ieee"]
        if kind == "tf32" and self.cuda:  # the device's own way to round
            with measure.matmul_setting("tf32"):
                return list(reference(wide, CHECK_RATE, narrow))
        with measure.matmul_setting("ieee"), accuracy.RoundedOperands(kind):
            return list(reference(wide, CHECK_RATE, narrow))

    def judge(self, candidate: Candidate, outputs: workloads.Outputs) -> None:
        """Note error and limit, and fail the candidate if it is wrong."""
        references = candidate.arm.references or self.workload.references
        exact = references[0]
        if exact not in self.known:
            self.known[exact] = self.truth(exact)
        # A gradient on its way through a rounded operand is rounded, whatever dtype it ends in.
        rounded = candidate.arm.halves and self.workload.mode == "backward"
        key = references, candidate.kind, rounded
        if key not in self.known:
            orders = [self.yardstick(reference, candidate.kind) for reference in references]
            if rounded:
                orders = [[x.bfloat16().float() for x in results] for results in orders]
            self.known[key] = list(zip(*orders, strict=True))
        found = []
        for output, truth, yardsticks in zip(outputs, self.known[exact], self.known[key], strict=True):
            result = workloads.pick(output).detach()
            error = accuracy.error(result, truth)
            if not math.isfinite(error):
                candidate.fail(f"expected finite values {list(truth.shape)}, got {list(result.shape)}")
                return
            limits = [accuracy.limit(yardstick, truth, result.dtype) for yardstick in yardsticks]
            found.append((error, max(limits)))
        error, limit = max(found, key=lambda pair: pair[0] / pair[1])
        candidate.found |= {"error": error, "limit": limit}
        if error > limit:
            candidate.fail(f"its error is {error:.2g} of the largest value, at most {limit:.2g} was expected")


def _copied(gate: Gate, inputs: Inputs) -> Inputs:
    """The inputs, with copies of those that are changed."""
    return inputs | {name: inputs[name].clone() for name in gate.workload.mutates}


def check(gate: Gate, inputs: Inputs, found: Sequence[Candidate]) -> None:
    """Run every candidate once on copies of what it changes, and judge it."""
    for candidate in found:
        arm = candidate.arm
        try:
            step = candidate.call(functools.partial(arm.prepare, _copied(gate, inputs), CHECK_RATE))
            outputs = candidate.call(step)
        except Exception as error:
            (candidate.refuse if excused(arm, error) else candidate.fail)(_reason(error))
            continue
        gate.judge(candidate, outputs)


def check_replay(gate: Gate, inputs: Inputs, candidate: Candidate) -> None:
    """Capture a candidate as it was checked, and judge what the replays give.

    A second one finds what the first left behind, such as a counter that nobody put back.
    """
    copies = _copied(gate, inputs)
    prepare = functools.partial(candidate.arm.prepare, copies, CHECK_RATE)
    replay = candidate.call(lambda: measure.graph_replay(prepare))
    for _ in range(2):
        with torch.no_grad():
            for tensor in itertools.chain(*replay.outputs):  # layer by layer, of stacks and of lists
                tensor.fill_(math.nan)
            for name in gate.workload.mutates:  # also an output, as a rule
                copies[name].copy_(inputs[name])
        replay()
        gate.judge(candidate, replay.outputs)
        if not candidate.valid:
            candidate.fail(f"replayed as a CUDA graph: {candidate.found['failed']}")
            return


def _skip_doubles(found: Sequence[Candidate]) -> None:
    """Where one backend alone can serve, the automatic choice is that one: it is not measured twice."""
    groups: dict[tuple[str, str], list[Candidate]] = {}
    for candidate in found:
        if candidate.arm.backend is not None:
            groups.setdefault((candidate.arm.group, candidate.setting), []).append(candidate)
    for group in groups.values():
        serving = [candidate for candidate in group if "refused" not in candidate.found]
        if len(serving) == 1 and serving[0].valid:
            serving[0].refuse("the only one that can serve, so it is the automatic choice")


def measure_workload(
    workload: Workload, args: argparse.Namespace, ceilings: dict[str, float], flush: torch.Tensor | None
) -> dict[str, object]:
    """All figures of a workload."""
    device = args.device
    torch.compiler.reset()  # what it keeps by function counts against a limit
    gc.collect()  # what a failure left behind
    torch.cuda.empty_cache()
    inputs = workload.make(device, seed=0)
    gate = Gate(workload, inputs)
    sets = [workloads.widen(inputs)]
    size = sum(x.nbytes for x in sets[0].values())
    if device.type == "cuda" and size <= ROTATED_BYTES:
        sets += [workloads.widen(workload.make(device, seed)) for seed in (1, 2)]
    every = candidates(workload, args)
    check(gate, sets[0], every)
    _skip_doubles(every)
    timed: list[tuple[Candidate, str, Callable[[], float]]] = []
    for candidate in every:
        if candidate.valid:
            timed += _prepared(candidate, gate, sets, device, flush)
    rounds = args.rounds or (20 if device.type == "cuda" else 3)
    times = [
        measure.rotated_round([time for *_, time in timed], turn, lambda f: f()) for turn in range(rounds)
    ]
    for (candidate, name, _), seconds in zip(timed, zip(*times, strict=True), strict=True):
        candidate.found[name] = seconds
    _evaluate(workload, every, ceilings)
    return _about(workload) | {
        "rounds": rounds,
        "input_sets": len(sets),
        "base": _base(workload),
        "arms": [candidate.found for candidate in every],
    }


def _about(workload: Workload) -> dict[str, object]:
    return {
        "op": workload.op,
        "mode": workload.mode,
        **workload.where,
        "sizes": workload.sizes,
        "dtype": workload.dtype,
        "flops": workload.cost.flops,
        "bytes": workload.cost.bytes,
        "published_flops": workload.published_flops,
    }


def measured(
    workload: Workload, args: argparse.Namespace, ceilings: dict[str, float], flush: torch.Tensor | None
) -> dict[str, object]:
    """`measure_workload`, or what it was and the reason where it does not fit into memory."""
    try:
        return measure_workload(workload, args, ceilings, flush)
    except torch.OutOfMemoryError as error:
        return _about(workload) | {"refused": _reason(error), "arms": []}


def _prepared(
    candidate: Candidate,
    gate: Gate,
    sets: Sequence[Inputs],
    device: torch.device,
    flush: torch.Tensor | None,
) -> list[tuple[Candidate, str, Callable[[], float]]]:
    """Count a candidate's launches and bytes; returns how it and its CUDA graph are timed."""
    arm, found = candidate.arm, candidate.found
    try:
        steps = [candidate.call(functools.partial(arm.prepare, inputs, TIMED_RATE)) for inputs in sets]
        if arm.compiled:
            candidate.call(steps[0])  # its compiler knows the rate as a constant
        begin = time.perf_counter()
        found["launches"], found["peak_bytes"] = candidate.call(lambda: measure.count_step(steps[0], device))
        spent = time.perf_counter() - begin
        if spent < 1:  # the profiler's part of it may be large
            spent = candidate.call(lambda: measure.cold_seconds(steps, device, 1, flush))
    except torch.OutOfMemoryError as error:
        candidate.refuse(_reason(error))
        return []
    except Exception as error:
        candidate.fail(_reason(error))
        return []
    found["inner"] = max(1, min(MOST_INNER, math.ceil(LEAST_SECONDS / spent)))

    def timer(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
        return lambda: candidate.call(lambda: measure.cold_seconds(calls, device, found["inner"], flush))

    timers = [(candidate, "seconds", timer(steps))]
    if device.type == "cuda":
        if not arm.capturable or found["peak_bytes"] > CAPTURED_BYTES:
            return timers
        try:
            check_replay(gate, sets[0], candidate)
            if not candidate.valid:
                return []
            prepare = functools.partial(arm.prepare, sets[0], TIMED_RATE)
            replay = candidate.call(lambda: measure.graph_replay(prepare))
            timers.append((candidate, "graph_seconds", timer([replay])))
        except Exception as error:
            found["graph_refused"] = _reason(error)  # as of a compiler's own graphs
    return timers


def _base(workload: Workload) -> str:
    """The arm that speed-ups are over: at bf16 an fp32 one would show a ratio of dtypes."""
    names = {arm.name for arm in workload.arms}
    return "published bf16" if "published bf16" in names else "published"


def _evaluate(workload: Workload, every: Sequence[Candidate], ceilings: dict[str, float]) -> None:
    """Medians, speed-ups over the published rule, and rates with their shares of the ceilings."""
    timed = [candidate for candidate in every if "seconds" in candidate.found]
    name = _base(workload)
    base = next((c.found["seconds"] for c in timed if c.arm.name == name), None)
    for candidate in timed:
        found, cost = candidate.found, candidate.arm.cost or workload.cost
        seconds = measure.quartiles(found["seconds"]).median
        peak = ceilings.get(candidate.kind, ceilings["ieee"])
        found |= {
            "median_seconds": seconds,
            "flops": cost.flops,
            "bytes": cost.bytes,
            "operands": candidate.kind,
            "flops_per_second": cost.flops / seconds,
            "bytes_per_second": cost.bytes / seconds,
            "flop_share": cost.flops / seconds / peak,
            "byte_share": cost.bytes / seconds / ceilings["copy"],
        }
        if base is not None:
            found["speedup"] = measure.paired_ratio(base, found["seconds"])._asdict()
        if "graph_seconds" in found:
            found["median_graph_seconds"] = measure.quartiles(found["graph_seconds"]).median


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """FLOP/s of a large product by the kind of its operands, and bytes per second of a large copy.

    On the CPU those of fp32 alone, which are ours there whatever the rows.
    """
    kinds = ("ieee", "tf32", "16bit") if device.type == "cuda" else ("ieee",)
    found = {kind: measure.matmul_ceiling(kind, device) for kind in kinds}
    return found | {"copy": measure.copy_ceiling(device)}


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Check and measure one workload after the other; returns the exit code."""
    gpu = torch.cuda.is_available()
    if args.device is None:
        args.device = torch.device("cuda" if gpu else "cpu")
    if not gpu:
        print(NEEDS_GPU)
    measure.keep_freed_memory()
    if not args.no_compile:
        # One function is compiled for every width, setting and rate of a workload.
        torch._dynamo.config.recompile_limit = 64
    chosen = selected(args)
    result = record.header(argv, args.device, "+".join(dict.fromkeys(w.dtype for w in chosen)))
    print(record.machine_line(result))
    progress("measuring the ceilings")
    result["ceilings"] = ceilings = measure_ceilings(args.device)
    print(report.ceilings_line(ceilings), flush=True)
    result["results"] = []
    flush = measure.flush_buffer(args.device)
    begin, failed = time.monotonic(), False
    for number, workload in enumerate(chosen):
        left = (time.monotonic() - begin) / number * (len(chosen) - number) if number else 0
        ahead = f", about {left / 60:.0f} min to go" if number else ""
        progress(f"{number + 1} of {len(chosen)}: {workload.describe()}{ahead}")
        found = measured(workload, args, ceilings, flush)
        result["results"].append(found)
        failed |= any("failed" in arm for arm in found["arms"])
        print(f"\n## {report.title(found)}\n\n{report.arms_table(found)}", flush=True)
        if args.out:  # after each: what was measured outlives an interruption
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(failed)
