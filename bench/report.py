"""Markdown tables and plots of the JSON files of `python -m bench kernels`, `step` and `memory`.

The tables go to stdout; with --out, also to report.md in that folder, with the plots beside it: the speed-up
over the published rule by shape, and the roofline, that is, FLOP/s against operations per byte under the
ceilings measured in the same run. Rows where a baseline wins stay in the tables and are listed once more. So
is the fastest backend beside the one chosen automatically: the thresholds of `dbpkern/configs/` follow them.
"""

import argparse
import importlib
import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench import measure, options, record

MIB = 2**20
TOLERANCE = 1.05  # the automatic choice is right if no backend is faster by more
COLOURS = {"ours": "tab:blue", "published": "tab:red", "baddbmm": "tab:green"}


FATES = {"failed": "FAILED", "refused": "Not measured", "graph_refused": "No CUDA graph"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m bench report`."""
    parser.add_argument("json", nargs="+", type=options.readable, metavar="JSON", help="what was measured")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write report.md and the plots to this folder"
    )


def shape(result: dict) -> str:
    """The sizes of a workload."""
    return " ".join(f"{name}={value}" for name, value in result["sizes"].items())


def title(result: dict) -> str:
    """A workload in words."""
    where = f"ViT-{result['model']}, batch {result['batch']}, {result['tokens']} tokens"
    return f"{result['op']}, {result['mode']}: {shape(result)}, {result['dtype']} ({where})"


def ceilings_line(ceilings: dict[str, float]) -> str:
    """The ceilings of a run."""
    products = ", ".join(f"{kind} {value / 1e12:.3g}" for kind, value in ceilings.items() if kind != "copy")
    return f"Ceilings: matrix product {products} TFLOP/s, copy {ceilings['copy'] / 1e9:.4g} GB/s"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.4g}"


def _ratio(found: dict[str, float] | None) -> str:
    return "-" if found is None else f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def arms_table(result: dict) -> str:
    """All arms of a workload as Markdown; below, those without a time or a CUDA graph, with the reason."""
    rows, notes = [], {}
    for arm in result["arms"]:
        for fate in FATES:
            if fate in arm:
                label = f"{arm['arm']} ({arm['matmul']})"
                notes.setdefault((fate, arm[fate]), []).append(label)
        if "median_seconds" not in arm:
            continue
        rows.append(
            [
                arm["arm"],
                arm["matmul"],
                _milliseconds(arm["median_seconds"]),
                _ratio(arm.get("speedup")),
                _milliseconds(arm.get("median_graph_seconds")),
                f"{arm['flops_per_second'] / 1e12:.3g}",
                f"{arm['flop_share']:.0%}",
                f"{arm['bytes_per_second'] / 1e9:.3g}",
                f"{arm['byte_share']:.0%}",
                f"{arm['error']:.1e}",
                f"{arm['limit']:.1e}",
                f"{arm['peak_bytes'] / MIB:.1f}",
                str(arm["launches"] or "-"),
            ]
        )
    columns = ("arm", "fp32 products", "ms", "speed-up", "graph ms", "TFLOP/s", "of ceiling", "GB/s")
    columns += ("of ceiling", "error", "limit", "peak MiB", "launches")
    lines = [record.table(columns, rows)] if rows else []
    for (fate, reason), labels in notes.items():
        lines.append(f"{FATES[fate]}: {', '.join(labels)}: {reason}")
    if "refused" in result:
        lines.append(f"Not measured: {result['refused']}")
    return "\n\n".join(lines)


def comparisons(results: Iterable[dict]) -> list[dict]:
    """Ours, as dispatched, against the fastest baseline of the same results under the same setting.

    Returns:
        For each workload, group of arms and setting: `result`, `ours`, `best` and `ratio`, the quartiles of
        best's time over ours; below one a baseline wins.
    """
    found = []
    for result in results:
        timed = [arm for arm in result["arms"] if "median_seconds" in arm]
        for ours in timed:
            if ours["family"] != "ours" or ours["backend"]:
                continue
            rivals = [
                arm
                for arm in timed
                if arm["family"] != "ours"
                and arm["matmul"] in (ours["matmul"], "bf16")
                and (arm["group"] == ours["group"] or arm["family"] == "published")
            ]
            if rivals:
                best = min(rivals, key=lambda arm: arm["median_seconds"])
                ratio = measure.paired_ratio(best["seconds"], ours["seconds"])._asdict()
                found.append({"result": result, "ours": ours, "best": best, "ratio": ratio})
    return found


def halves_missing(item: dict) -> bool:
    """Whether bf16 rows were compared with no `baddbmm` of bf16 operands, none having been measured."""
    group = item["ours"]["group"]
    return item["result"]["dtype"] == "bf16" and not any(
        "median_seconds" in arm
        for arm in item["result"]["arms"]
        if (arm["family"], arm["group"], arm["matmul"]) == ("baddbmm", group, "bf16")
    )


def _comparison_table(found: Iterable[dict]) -> str:
    rows = []
    for item in found:
        result, ours, best = item["result"], item["ours"], item["best"]
        rows.append(
            [
                f"{result['op']} {result['mode']}",
                " ".join(filter(None, (shape(result), ours["group"]))),
                result["dtype"],
                ours["matmul"],
                _milliseconds(ours["median_seconds"]),
                _ratio(ours.get("speedup")),
                best["arm"],
                _milliseconds(best["median_seconds"]),
                _ratio(item["ratio"]),
                f"{ours['flop_share']:.0%}",
                f"{ours['byte_share']:.0%}",
            ]
        )
    columns = ("op", "shape", "rows", "fp32 products", "ours ms", "against published")
    columns += ("best baseline", "its ms", "against it", "of FLOP/s", "of GB/s")
    return record.table(columns, rows)


def backends(results: Iterable[dict]) -> list[dict]:
    """For each workload, group and setting with a choice: times by backend, and the automatic one's.

    Returns:
        `result`, `ours`, `seconds` by backend, `fastest` and `lost`, the automatic choice's time over it.
    """
    found = []
    for result in results:
        timed = [arm for arm in result["arms"] if "median_seconds" in arm and arm["family"] == "ours"]
        for ours in timed:
            if ours["backend"]:
                continue
            forced = {
                arm["backend"]: arm
                for arm in timed
                if arm["backend"] and (arm["group"], arm["matmul"]) == (ours["group"], ours["matmul"])
            }
            if forced:
                fastest = min(forced.values(), key=lambda arm: arm["median_seconds"])
                lost = measure.paired_ratio(ours["seconds"], fastest["seconds"]).median
                times = {name: arm["median_seconds"] for name, arm in forced.items()}
                found.append(
                    {
                        "result": result,
                        "ours": ours,
                        "seconds": times,
                        "fastest": fastest["backend"],
                        "lost": lost,
                    }
                )
    return found


def _backends_table(found: Sequence[dict]) -> str:
    names = [name for name in ("eager", "triton", "cuda") if any(name in item["seconds"] for item in found)]
    rows = []
    for item in found:
        result, ours = item["result"], item["ours"]
        rows.append(
            [
                f"{result['op']} {result['mode']}",
                " ".join(filter(None, (shape(result), ours["group"]))),
                result["dtype"],
                ours["matmul"],
                *(_milliseconds(item["seconds"].get(name)) for name in names),
                _milliseconds(ours["median_seconds"]),
                item["fastest"],
                "yes" if item["lost"] <= TOLERANCE else f"no, {item['lost']:.2f} times its time",
            ]
        )
    columns = ("op", "shape", "rows", "fp32 products", *(f"{name} ms" for name in names))
    return record.table((*columns, "automatic ms", "fastest", "chosen"), rows)


def kernels_section(data: dict) -> str:
    """What a file of `python -m bench kernels` says."""
    results = data["results"]
    parts = [ceilings_line(data["ceilings"]) + "."]
    parts.append(
        "Speed-ups are medians of paired ratios with quartiles, above one where ours is faster. Forward and "
        "backward of bf16 rows are held against the published rule with bf16 operands, as under autocast. "
        "FLOP/s and GB/s count the least arithmetic and every operand once; their shares are of the ceilings."
    )
    compared = comparisons(results)
    wins = sum(item["ratio"]["median"] >= 1 for item in compared)
    lead = f"Ours is faster in {wins} of {len(compared)} rows."
    missing = sum(halves_missing(item) for item in compared)
    if missing:
        lead += f" In {missing} of them the baseline with bf16 operands is missing."
    parts.append(f"### Ours against the best baseline\n\n{lead}")
    if compared:
        parts.append(_comparison_table(compared))
    losses = [item for item in compared if item["ratio"]["median"] < 1]
    if losses:
        parts += ["### Where a baseline wins", _comparison_table(losses)]
    choices = backends(results)
    if choices:
        parts += ["### Backends", _backends_table(choices)]
    failed = [(r, arm) for r in results for arm in r["arms"] if "failed" in arm]
    if failed:
        lines = [f"- {title(r)}, {arm['arm']} ({arm['matmul']}): {arm['failed']}" for r, arm in failed]
        parts += ["### Failed", "\n".join(lines)]
    unmeasured = [f"- {title(r)}: {r['refused']}" for r in results if "refused" in r]
    if unmeasured:
        parts += ["### Not measured", "\n".join(unmeasured)]
    parts.append("### Every arm")
    parts += [f"#### {title(result)}\n\n{arms_table(result)}" for result in results]
    return "\n\n".join(parts)


def _cases_section(data: dict, command: str) -> str:
    """What a file of `step` or `memory` says, as that command prints it."""
    module = importlib.import_module(f"bench.{command}")  # it needs timm
    return "\n\n".join(f"### {result['case']}\n\n{module.table(result)}" for result in data["results"])


def section(path: Path, data: dict) -> str:
    """A file as Markdown."""
    command = command_of(data)
    body = kernels_section(data) if command == "kernels" else _cases_section(data, command)
    head = f"## {path.stem}\n\n`{data['command']}`\n\n{record.machine_line(data)}"
    return f"{head}\n\n{body}\n"


def command_of(data: dict) -> str:
    """The command that wrote a file: "kernels", "step" or "memory"."""
    return data["command"].removeprefix("python -m bench ").split()[0]


def load(path: Path) -> dict:
    """Read a file.

    Raises:
        ValueError: it is none of those that can be told.
    """
    try:
        data = json.loads(path.read_text())
        known = command_of(data) in ("kernels", "step", "memory")
    except (ValueError, LookupError, TypeError, AttributeError):
        known = False
    if not known:
        raise ValueError(f"{path}: expected a file of python -m bench kernels, step or memory")
    return data


def _pyplot() -> object:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _timed(results: Iterable[dict]) -> list[tuple[dict, dict]]:
    return [(r, arm) for r in results for arm in r["arms"] if "median_seconds" in arm]


def _label(result: dict) -> str:
    if result["op"] == "model_update":
        return f"ViT-{result['model']} n={result['sizes']['n']} {result['dtype']}"
    return f"{shape(result)} {result['dtype']}"


def _is_base(result: dict, arm: dict) -> bool:
    """Whether speed-ups are over this arm, the line at one."""
    base = result.get("base", "published")
    return (arm["arm"], arm["matmul"]) == (base, "bf16" if base == "published bf16" else "ieee")


def _log_axis(axis: object) -> None:
    """Ticks at 1, 2 and 5 of every decade, in plain figures."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def plot_speedups(data: dict, path: Path) -> None:
    """Speed-up over the published rule by shape: a panel for each op and mode, a row for each shape."""
    plt = _pyplot()
    panels: dict[str, list[dict]] = {}
    for result in data["results"]:
        if any("speedup" in arm for arm in result["arms"]):
            panels.setdefault(f"{result['op']}, {result['mode']}", []).append(result)
    shown = [
        (result, arm)
        for result, arm in _timed(data["results"])
        if "speedup" in arm and not _is_base(result, arm)
    ]
    names = dict.fromkeys(arm["arm"] for _, arm in shown)
    markers = dict(zip(names, itertools.cycle("osD^v<>PXph*d8"), strict=False))
    columns = min(3, len(panels))
    stacked = list(panels.values())
    bands = [stacked[i : i + columns] for i in range(0, len(stacked), columns)]
    heights = [0.9 + 0.3 * max(len(results) for results in band) for band in bands]
    figure, axes = plt.subplots(
        len(bands),
        columns,
        figsize=(6.2 * columns, sum(heights) + 1.5),
        gridspec_kw={"height_ratios": heights},
        squeeze=False,
        layout="constrained",
    )
    handles = {}
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (name, results) in zip(axes.flat, panels.items(), strict=False):
        for result, arm in shown:
            if result not in results:
                continue
            tf32 = arm["matmul"] == "tf32"
            colour = COLOURS[arm["family"]]
            handles[arm["arm"] + ", TF32" * tf32] = axis.scatter(
                arm["speedup"]["median"],
                results.index(result),
                marker=markers[arm["arm"]],
                facecolor="none" if tf32 else colour,
                edgecolor=colour,
                zorder=2,
            )
        axis.axvline(1, color="black", linewidth=1)
        axis.set_xscale("log")
        _log_axis(axis.xaxis)
        axis.set_yticks(range(len(results)), [_label(result) for result in results], fontsize=8)
        axis.set_ylim(len(results) - 0.5, -0.5)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3, axis="x")
        axis.tick_params(axis="x", labelsize=8)
    figure.suptitle("Speed-up over the published rule in eager PyTorch", fontsize=12)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, 2 * columns), fontsize=8
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


MODES = {"forward": "o", "backward": "^", "step": "s"}


def plot_roofline(data: dict, path: Path) -> None:
    """FLOP/s against operations per byte, both of the least that is known, under the measured ceilings."""
    plt = _pyplot()
    timed = _timed(data["results"])
    slope = data["ceilings"]["copy"]
    peaks = {kind: value for kind, value in data["ceilings"].items() if kind != "copy"}
    intensities = [arm["flops"] / arm["bytes"] for _, arm in timed]
    knees = [peak / slope for peak in peaks.values()]
    low, high = min(*intensities, *knees) / 2, max(*intensities, *knees) * 2
    ops = list(dict.fromkeys(result["op"] for result, _ in timed))
    columns = min(3, len(ops))
    figure, axes = plt.subplots(
        -(-len(ops) // columns),
        columns,
        figsize=(4.6 * columns + 0.8, 3.6 * -(-len(ops) // columns) + 1),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(ops) :]:
        axis.remove()
    for axis, op in zip(axes.flat, ops, strict=False):
        for kind, peak in peaks.items():
            axis.plot([low, peak / slope, high], [low * slope, peak, peak], color="black", linewidth=0.8)
            axis.annotate(kind, (high, peak), ha="right", va="bottom", fontsize=7)
        for result, arm in timed:
            if result["op"] == op:
                colour = COLOURS[arm["family"]]
                axis.scatter(
                    arm["flops"] / arm["bytes"],
                    arm["flops_per_second"],
                    marker=MODES[result["mode"]],
                    s=18,
                    facecolor="none" if arm["backend"] or arm["compiled"] else colour,
                    edgecolor=colour,
                    zorder=2,
                )
        axis.set_xscale("log")
        axis.set_yscale("log")
        _log_axis(axis.xaxis)
        axis.tick_params(labelsize=8, labelbottom=True)  # also above a panel that is not there
        axis.set_title(op, fontsize=10)
        axis.grid(alpha=0.3)
    figure.suptitle("FLOP/s against operations per byte,\nunder the ceilings of the run", fontsize=12)
    figure.supylabel("FLOP/s", fontsize=10)
    handles = [
        plt.Line2D([], [], linestyle="", marker="o", color=c, label=name) for name, c in COLOURS.items()
    ]
    handles.append(
        plt.Line2D(
            [],
            [],
            linestyle="",
            marker="o",
            color="grey",
            fillstyle="none",
            label="backend by name, or compiled",
        )
    )
    handles += [
        plt.Line2D([], [], linestyle="", marker=mark, color="grey", label=mode)
        for mode, mark in MODES.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2 * columns, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Print the report, and write it with its plots where asked to; returns the exit code."""
    try:
        files = [(path, load(path)) for path in args.json]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    sections = []
    for path, data in files:
        text = section(path, data)
        print(text)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            if command_of(data) == "kernels" and _timed(data["results"]):
                for name, plot in (("speed-up", plot_speedups), ("roofline", plot_roofline)):
                    picture = args.out / f"{path.stem}_{name}.png"
                    plot(data, picture)
                    text += f"\n![{name}]({picture.name})\n"
            sections.append(text)
    if args.out is not None:
        (args.out / "report.md").write_text("\n".join(["# Report\n", *sections]))
    return 0
