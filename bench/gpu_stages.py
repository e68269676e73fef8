"""The stages of `python -m bench gpu`: what each measures, on a GPU or with tiny sizes on the CPU."""

import functools
import importlib.util
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

import dbpkern
from bench import anatomy, kernels, measure
from bench.arms import PERIOD
from bench.cases import Case
from bench.record import Stage
from dbpkern import problems
from dbpkern.ops import _tuned

NEEDS_GPU = "needs a GPU"
SHAPES = ((37, 1280, 768), (12, 1280, 3072), (3, 700, 771))
COMPARED = (
    "correlation", "apply_", "transform", "map_, gradients", "map_, gradients, low rank", "adamw_",
    "adamw_, low rank", "lowrank_statistics", "lowrank_step_", "orthogonalize",
)  # fmt: skip
ARMS = (
    "AdamW, fused", "DecorAdamW", "DecorPreconditioner", "DecorPreconditioner, low rank",
    "DecorPreconditioner, full R, sublayers", "DecorPreconditioner, full R, all sites",
)  # fmt: skip
"""Of `bench launches`."""


def environment(stage: Stage) -> None:
    """Clocks and ceilings."""
    query = (
        "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    )
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        clocks = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
        stage.set("clocks", dict(zip(query.split(","), clocks.splitlines()[0].split(", "), strict=False)))
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        stage.set("clocks", f"not readable: {error}")
    file = _tuned.tuned_file(stage.content["device"])
    stage.set("tuned", str(file) if file.exists() else None)  # it says which kernels serve in the stages
    for kind in ("16bit", "tf32", "ieee"):
        flops = measure.matmul_ceiling(kind, stage.device, 64 if stage.dry else None)
        stage.add(ceiling=kind, flops_per_second=flops)
    copied = measure.copy_ceiling(stage.device, 2**16 if stage.dry else None)
    stage.add(ceiling="copy", bytes_per_second=copied)


def equal(one: object, other: object) -> bool:
    """Whether two results are the same bit for bit."""
    return all(map(torch.equal, tree_leaves(one), tree_leaves(other)))


def try_kernel(name: str, backend: str, shape: tuple[int, int, int], device: str, repeats: int) -> dict:
    """Repeat an op, compare it with fp64, and replay it."""
    problem = problems.make(name, *shape, torch.device(device))
    first = problem.call(*problem.fresh(), backend=backend)
    again = [problem.call(*problem.fresh(), backend=backend) for _ in range(repeats - 1)]
    row = {"repeats_equal": all(equal(first, found) for found in again)}
    row["error_ratio"] = problem.error(first)
    row["eager_error_ratio"] = problem.error(problem.call(*problem.fresh(), backend="eager"))
    row["replay_equal"] = NEEDS_GPU
    if device == "cuda":
        inputs = problem.fresh()
        replay = measure.graph_replay(lambda: functools.partial(problem.call, *inputs, backend=backend))
        for own, value in zip(tree_leaves(inputs), tree_leaves(problem.inputs), strict=True):
            own.copy_(value)  # the op may have changed it
        replay()
        torch.cuda.synchronize()
        row["replay_equal"] = equal(replay.outputs, first)
    return row | {"right": row["error_ratio"] <= 1 and row["repeats_equal"] and bool(row["replay_equal"])}


def smoke(stage: Stage) -> None:
    """Every kernel in a process of its own, several at a time."""
    shapes, repeats = (((1, 12, 32),), 2) if stage.dry else (SHAPES, 6)
    work = [
        (name, backend, shape)
        for shape in shapes
        for name in problems.MAKERS
        for backend in problems.kernels(name.partition(",")[0])
    ]

    def one(job: tuple) -> dict:
        found = problems.isolated(try_kernel, *job, stage.device.type, repeats, seconds=20)
        return dict(zip(("op", "backend", "shape"), job, strict=True)) | {"right": False} | found

    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 1) // 2))) as pool:
        for row in pool.map(one, work):
            stage.add(**row)


def steps(stage: Stage) -> None:
    """The parts of a training step."""
    case = Case("mae50", 64, 1, 2, 1) if stage.dry else Case("mae50", 768, 12, 256, 8)
    anatomy.measure_arms(stage, case, ARMS, 0.7)


def small(stage: Stage) -> None:
    """Steps so short that the host is the limit, and Muon's."""
    sizes = [(64, 1, 2, 1)] if stage.dry else [(192, 12, 256, 8), (768, 12, 32, 8)]
    for number, size in enumerate(sizes):
        anatomy.measure_arms(stage, Case("mae50", *size), ARMS[:3], (number + 1) * 0.3)
    anatomy.measure_arms(stage, Case("mae50", *sizes[0]), ["Muon", "DecorMuon"], 0.8)


def compare(stage: Stage) -> None:
    """Every op by its kernels and by PyTorch; PyTorch's maps and steps of low-rank R use no TF32."""
    for shape in ((1, 12, 32),) if stage.dry else ((12, 1280, 768), SHAPES[1], SHAPES[0]):
        for name in COMPARED:
            job = name, shape, stage.device.type, 2 if stage.dry else 20, False
            stage.add(op=name, shape=shape, **problems.isolated(kernels.examine, *job, seconds=60))


def run_tests(stage: Stage) -> None:
    """The tests of the ops, then those of all else that need a GPU; interrupted in time to report."""
    root = Path(__file__).parents[1]
    jobs = ["-n", "12"] if importlib.util.find_spec("xdist") and not stage.dry else []
    kernels = "tests/dbpkern/ops"
    chosen = {"junit.xml": [kernels], "junit_gpu.xml": ["tests", "-m", "gpu", "--ignore", kernels]}
    if stage.dry:
        chosen = {"junit.xml": [f"{kernels}/test_rates.py", "-k", "beyond"]}
    for number, (name, what) in enumerate(chosen.items()):
        file = stage.file.parent.resolve() / name
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={file}"]
        process = subprocess.Popen([*command, *jobs, *what], cwd=root)
        try:
            left = stage.limit * (0.6, 0.85)[number] - (time.monotonic() - stage.begin)
            code = process.wait(max(1.0, left))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest then writes what it has
            code = "interrupted: " + str(process.wait(0.1 * stage.limit))
        stage.add(tests=what, file=name, exit_code=code)
    if any(row["exit_code"] not in (0, 5) for row in stage.content["rows"]):  # 5: there were none
        raise RuntimeError("tests failed or did not end in time")


def capture_step(due: bool, size: tuple[int, int, int, int]) -> dict:
    """Two equal models: the next step of one as it is, that of the other captured and replayed."""
    case, device = Case("mae50", *size), torch.device("cuda")
    inputs, pair = case.inputs(device, torch.float32), []
    for _ in range(2):
        model = case.build().to(device)
        optimizer = dbpkern.DecorAdamW(model.parameters(), model=model, capturable=True)
        pair.append((model, optimizer))
    for step in range(PERIOD * 3 + 1):
        for model, optimizer in pair:
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss, _ = model(*inputs)
            loss.backward()
        for own, other in zip(*(model.parameters() for model, _ in pair), strict=True):
            if own.grad is not None:
                other.grad.copy_(own.grad)  # a backward need not repeat itself
        (_, eager), (_, captured) = pair
        if step >= PERIOD * 2 and eager.engine.sampler.due == due:
            break
        for _, optimizer in pair:
            optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    graph.replay()
    seconds = measure.seconds(eager.step, device)
    worst, same = 0.0, True
    states = []
    for model, optimizer in pair:
        factors = [factor for site in optimizer.engine.sites for factor in site.factors]
        states.append([*(p.detach() for p in model.parameters()), *factors])
    for one, other in zip(*states, strict=True):
        same &= torch.equal(one, other)
        worst = max(worst, float((one - other).abs().max() / one.abs().max().clamp(min=1e-12)))
    row = {"due": due, "bit_equal": same, "relative_difference": worst, "eager_seconds": seconds}
    return row | {"replay_seconds": problems.seconds(graph.replay, device)}


def graphs(stage: Stage) -> None:
    """The optimizer's step, due and not due, in a CUDA graph."""
    for due in (False, True):
        if stage.device.type != "cuda":
            stage.add(due=due, error=NEEDS_GPU)
            continue
        for size in ((192, 2, 8, 1), (768, 12, 64, 8)):
            found = problems.isolated(capture_step, due, size, seconds=stage.limit / 3)
            stage.add(**{"size": size, "due": due} | found)
