"""Every op against PyTorch: time, error and shares of the machine's ceilings.

The ops run as `dbpkern.problems` has them, at the shapes of vision transformers: all layers of a width at
once. The ways to compute them:

- ours: what serves by itself here; on a GPU also each kernel by its name;
- eager, on a GPU: PyTorch's batched algebra, the op's implementation without kernels (on a CPU it is ours);
- plain: the few lines of PyTorch that say what the op computes; "compiled" is the same by torch.compile;
- for `adamw_`, torch.optim.AdamW, fused and with the maps around it.

On a GPU PyTorch's products have bf16 operands where no "TF32" is added. Each way is checked first: its error
against fp64 may be twice that of PyTorch's products of the same operands, plus four units in the last place
of the largest value. A wrong result gets no time; if it is ours, the exit code is 1.

The ways run one after the other in each round, in an order that rotates. A speed-up is the median over rounds
of (PyTorch / ours) within a round, with quartiles, against the fastest of PyTorch's ways. On a GPU events are
timed, and L2 is flushed before each call. Operations and bytes are those of the plain formula and of every
operand moved once. Every op has a process of its own, which ends after --limit seconds. DIR gets
kernels.json, written after each op, kernels.md, and, with matplotlib, kernels.png.
"""

import argparse
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from bench import measure, options, record
from bench.record import progress
from dbpkern import ops, problems, tune
from dbpkern.ops import _triton
from dbpkern.problems import Problem

WIDTHS = {"S": (384, 12), "B": (768, 12), "L": (1024, 24), "H": (1280, 32)}
"""Width and depth of ViTs."""
LEAST_SECONDS, MOST_INNER = 0.02, 20
"""That a measurement of an arm in a round should take, and most calls in it."""
OURS = ("ours", "triton", "cuda")
Call = Callable[..., object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m bench kernels`."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    parser.add_argument("--device", type=options.device, default=device, help="default: cuda where it is")
    parser.add_argument(
        "--model",
        nargs="+",
        choices=WIDTHS,
        default=["B" if gpu else "S"],
        help="ViTs (default: %(default)s)",
    )
    parser.add_argument(
        "--rows", type=options.count, default=1280 if gpu else 320,
        help="sampled rows of a layer (default: %(default)s, a tenth of 256 (CPU: 64) images of 50 tokens)",
    )  # fmt: skip
    names = sorted(problems.MAKERS)
    parser.add_argument("--op", nargs="+", choices=names, default=names, metavar="OP", help="default: all")
    parser.add_argument("--rounds", type=options.count, default=20 if gpu else 5, help="default: %(default)s")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for an op (default: 300)")
    parser.add_argument("--threads", type=options.count, help="CPU threads (default: as PyTorch chooses)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the results to this folder")


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """The product in fp32."""
    return a.float() @ b.float()


def half_product(a: Tensor, b: Tensor) -> Tensor:
    """The product of operands in bf16 on a GPU, in fp32."""
    multiply = torch.mm if a.dim() == b.dim() == 2 else torch.bmm
    return multiply(a.bfloat16(), b.bfloat16(), out_dtype=torch.float32)


def fused_adamw(maps: bool, *inputs: object) -> Call:
    """PyTorch's fused AdamW on the inputs of `adamw_`, with the maps around it or without them."""
    weights, gradients, *_, factors = inputs
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    optimizer = torch.optim.AdamW(weights, fused=True)

    def step() -> None:
        if maps:
            ops.map_gradients_(gradients, factors)
            kept = ops.remember(weights, factors)
        optimizer.step()
        if maps:
            ops.map_changes_(weights, kept, factors)

    return step


def ways(
    problem: Problem, dtypes: Sequence[torch.dtype], gpu: bool, compiled: bool
) -> Iterator[tuple[str, str, Call]]:
    """Name, setting of PyTorch's fp32 products, and call of every way to compute a problem but ours.

    `dtypes` are those of our results, which the plain formulas give, too.
    """
    if gpu or _triton.INTERPRETED:
        for backend in (*problems.kernels(problem.op), "eager"):
            yield backend, "ieee", functools.partial(problem.call, backend=backend)
    if gpu:
        yield "eager, TF32", "tf32", functools.partial(problem.call, backend="eager")

    def plain(product: Callable[[Tensor, Tensor], Tensor], *inputs: object) -> list[Tensor]:
        found = tree_leaves(problem.formula(product, *inputs))
        return [t.to(dtype) for t, dtype in zip(found, dtypes, strict=True)]

    products = {"": half_product, ", TF32": wide_product} if gpu else {"": wide_product}
    for ending, product in products.items():
        setting = "tf32" if ending else "ieee"
        yield f"plain{ending}", setting, functools.partial(plain, product)
        if compiled:
            fused = torch.compile(plain, dynamic=False)
            yield f"plain, compiled{ending}", setting, functools.partial(fused, product)


def cost(problem: Problem) -> dict[str, int]:
    """Operations of the products, and bytes of all that is read and written."""
    shapes = tree_map_only(Tensor, lambda t: t.to("meta"), problem.cast(torch.float32))
    with FlopCounterMode(display=False) as counter:
        found = problem.formula(torch.matmul, *shapes)
    moved = sum(t.nbytes for t in tree_leaves((problem.inputs, found)) if isinstance(t, Tensor))
    return {"flops": counter.get_total_flops(), "bytes": moved}


def examine(
    name: str,
    shape: tuple[int, int, int],
    device: str,
    rounds: int,
    compiled: bool,
    threads: int | None = None,
) -> dict:
    """Check and time all ways to compute an op; for a process of its own.

    Returns:
        `flops`, `bytes` and `arms`: by name `error_ratio`, and `seconds` of each round or `error`.
    """
    place = torch.device(device)
    gpu = place.type == "cuda"
    torch.set_num_threads(threads or torch.get_num_threads())
    torch._inductor.config.compile_threads = 1  # what it starts would outlive a process that is killed
    flush = measure.flush_buffer(place)
    problem = problems.make(name, *shape, place)
    arms: dict[str, dict] = {}
    timed: dict[str, Callable[[], float]] = {}

    def ready(arm: str, setting: str, step: Call) -> None:
        def seconds(inner: int) -> float:
            with measure.matmul_setting(setting):
                return measure.cold_seconds([step], place, inner, flush)

        seconds(1)
        inner = max(1, min(MOST_INNER, math.ceil(LEAST_SECONDS / seconds(1))))
        timed[arm] = functools.partial(seconds, inner)

    def check(arm: str, setting: str, call: Call) -> object:
        try:
            with measure.matmul_setting(setting):
                result = call(*problem.fresh())
            error = problem.error(result)
            arms[arm] = {"error_ratio": error}
            if error <= 1:
                ready(arm, setting, functools.partial(call, *problem.fresh()))
            else:
                arms[arm]["error"] = f"wrong: its error is {error:.2g} times what is allowed"
            return result
        except Exception as exception:  # a product that PyTorch lacks, no compiler, no memory
            arms[arm] = {"error": problems.reason(exception)}

    own = check("ours", "ieee", functools.partial(problem.call, backend=None))
    dtypes = [t.dtype for t in tree_leaves(own) if isinstance(t, Tensor)]
    if dtypes:  # else ours failed, and nobody can be compared with it
        for arm, setting, call in ways(problem, dtypes, gpu, compiled):
            check(arm, setting, call)
    if problem.op == "adamw_" and gpu:
        for arm, maps in (("torch.optim.AdamW", False), ("torch.optim.AdamW and maps", True)):
            arms[arm] = {}  # without maps it computes something else, and is shown for its time
            ready(arm, "ieee", fused_adamw(maps, *problem.fresh()))
    for turn in range(rounds):
        found = measure.rotated_round(list(timed.values()), turn, lambda seconds: seconds())
        for arm, seconds in zip(timed, found, strict=True):
            arms[arm].setdefault("seconds", []).append(seconds)
    return cost(problem) | {"arms": arms}


def median(arm: dict) -> float:
    """Seconds of an arm; infinite where it has none."""
    return measure.quartiles(arm["seconds"]).median if "seconds" in arm else math.inf


def best_baseline(arms: dict[str, dict]) -> str | None:
    """The fastest of PyTorch's ways that was found right."""
    rivals = [
        name for name, arm in arms.items() if name not in OURS and {"seconds", "error_ratio"} <= arm.keys()
    ]
    return min(rivals, key=lambda name: median(arms[name]), default=None)


def speedup(row: dict) -> measure.Quartiles | None:
    """Of ours over the best of PyTorch's ways."""
    arms = row.get("arms", {})
    best = best_baseline(arms) if "seconds" in arms.get("ours", {}) else None
    return best and measure.paired_ratio(arms[best]["seconds"], arms["ours"]["seconds"])


def tables(content: dict) -> str:
    """The results as Markdown: ours against the best of PyTorch's ways, every way, and what has no time."""
    products, copied = content["ceilings"]["products"], content["ceilings"]["copy"]
    first, second, missing = [], [], []
    names = list(dict.fromkeys(name for row in content["rows"] for name in row.get("arms", {})))
    for row in content["rows"]:
        label = [row["op"], _shape(row)]
        if "error" in row:
            missing.append(f"- {', '.join(label)}: {row['error']}")
            continue
        arms = row["arms"]
        missing += [f"- {', '.join(label)}, {name}: {a['error']}" for name, a in arms.items() if "error" in a]
        second.append([*label, *(_milliseconds(arms.get(name, {})) for name in names)])
        ratio, own = speedup(row), median(arms["ours"])
        if math.isfinite(own):
            best = best_baseline(arms)
            faster = "-" if ratio is None else f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
            shares = row["flops"] / own / products, row["bytes"] / own / copied
            first.append(
                [*label, _milliseconds(arms["ours"]), best or "-", _milliseconds(arms.get(best, {})), faster]
                + [f"{share:.0%}" for share in shares] + [f"{arms['ours']['error_ratio']:.2f}"]
            )  # fmt: skip
    columns = ("op", "layers x rows x width", "ours, ms", "best of PyTorch", "its ms", "speed-up")
    columns += ("of products", "of copy", "error over allowed")
    parts = [
        f"Ceilings: products {products / 1e12:.3g} TFLOP/s, copy {copied / 1e9:.4g} GB/s.",
        record.table(columns, first),
        "Every way, ms:",
        record.table(("op", "layers x rows x width", *names), second),
    ]
    return "\n\n".join([*parts, "Without a time:\n\n" + "\n".join(missing)] if missing else parts)


def _shape(row: dict) -> str:
    return "x".join(map(str, row["shape"]))


def _milliseconds(arm: dict) -> str:
    return f"{1e3 * median(arm):.4g}" if "seconds" in arm else "-"


def plot(content: dict, file: Path) -> bool:
    """Draw the speed-ups; returns False where matplotlib is missing or there is nothing to draw."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = [(row, ratio) for row in content["rows"] if (ratio := speedup(row))]
    if not rows:
        return False
    figure = Figure(figsize=(8, 1.2 + 0.27 * len(rows)), layout="constrained")
    axis = figure.subplots()
    medians = [ratio.median for _, ratio in rows]
    spread = [[m - r.low for m, (_, r) in zip(medians, rows, strict=True)]]
    spread.append([r.high - m for m, (_, r) in zip(medians, rows, strict=True)])
    places = range(len(rows))
    colours = ["tab:blue" if m >= 1 else "tab:red" for m in medians]
    axis.barh(places, [m - 1 for m in medians], left=1, color=colours, xerr=spread, ecolor="0.4")
    axis.set_yticks(places, [f"{row['op']}  {_shape(row)}" for row, _ in rows], fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xlabel("PyTorch's time / ours (fastest of PyTorch's ways; quartiles)")
    axis.grid(alpha=0.3, axis="x")
    axis.set_title(record.machine_line(content).partition(";")[0], fontsize=9)
    figure.savefig(file, dpi=110)
    return True


def write(content: dict, folder: Path) -> None:
    """Write the report and the picture."""
    head = f"# Ops against PyTorch\n\n`{content['command']}`\n\n{record.machine_line(content)}"
    text = f"{head}\n\n{tables(content)}\n"
    if plot(content, folder / "kernels.png"):
        text += "\n![speed-up](kernels.png)\n"
    (folder / "kernels.md").write_text(text)


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Check and time one op after the other; returns the exit code."""
    gpu = args.device.type == "cuda"
    measure.keep_freed_memory()
    content = record.header(argv, args.device, "bf16 rows")
    print(record.machine_line(content))
    progress("measuring the ceilings")
    content["ceilings"] = {
        "products": measure.matmul_ceiling("16bit" if gpu else "ieee", args.device),
        "copy": measure.copy_ceiling(args.device),
    }
    content["rows"] = rows = []
    work = [
        (name, (layers, args.rows, d))
        for name in args.op
        for width, depth in map(WIDTHS.get, args.model)
        for layers, d in ((3 * depth, width), (depth, 4 * width))
    ]
    begin = time.monotonic()
    for number, (name, shape) in enumerate(work):
        left = (time.monotonic() - begin) / number * (len(work) - number) if number else 0
        progress(
            f"{number + 1} of {len(work)}: {name} {shape}" + f", {left / 60:.0f} min to go" * bool(number)
        )
        job = name, shape, args.device.type, args.rounds, not args.no_compile, args.threads
        found = problems.isolated(examine, *job, seconds=args.limit)
        rows.append({"op": name, "shape": shape} | found)
        if args.out:  # after each: what was measured outlives an interruption
            tune.write(args.out / "kernels.json", content)
    print(f"\n{tables(content)}")
    if args.out:
        write(content, args.out)
    return int(any("error" in arm for row in rows for arm in (row.get("arms", {}).get("ours", row),)))
