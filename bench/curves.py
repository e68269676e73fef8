"""The report of what `python -m bench convergence` has found in FOLDER/PRESET.

It writes report.md, report.json and plots there, or to --out. The target is the final training loss of
AdamW at its best rate, the mean over its last 50 steps and its seeds. An arm reaches it at the first step
from which its curve (averaged over its seeds, mean of 50 steps) stays at or below the target. Seconds are
steps times the time of a step in timing.json; the runs' own clocks show what else the machine did.

Files that are damaged or of other settings than the matrix has now are left out, and named; the exit code is
then 1, and 2 if there is nothing to report.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from bench import record
from bench.convergence import PROBES, Matrix, Result, best
from bench.matrix import ABLATIONS, ARMS, PRESETS, every_arm, tuned
from train.compare import average, mean
from train.energy import KINDS
from train.plots import WINDOW
from train.run_folder import to_json, write_atomically

BASE = "adamw"  # sets the target
RIVALS = (BASE, "muon")  # whose final held-out losses are targets, too
ENOUGH = 3  # seeds
CROWD = 8  # arms whose names still fit among their curves
# tab20 has ten hues, dark and light: first the dark ones.
COLOURS = {name: f"C{i}" if i < 10 else colormaps["tab20"](2 * i - 19) for i, name in enumerate(ARMS)}
# Shown beside a family of ablations, black and silver: the arm that they change, and another.
BESIDE = {"decor-muon": ("decor-muon", "muon")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m bench curves`."""
    parser.add_argument("results", type=Path, metavar="FOLDER/PRESET", help="what convergence has filled")
    parser.add_argument("--out", type=Path, metavar="DIR", help="of the report (default: beside the results)")


def _beside(names: Sequence[str]) -> tuple[str, str]:
    """What a family is shown beside: by default the first rival that is not the changed arm itself."""
    changed = tuned(names[0])
    return BESIDE.get(changed, (changed, next(rival for rival in RIVALS if rival != changed)))


def reach(curve: Sequence[float], target: float, stride: int = 1) -> int | None:
    """The first step from which a curve stays at or below the target; None if it ends above it.

    Args:
        curve: values at every stride-th step.
        target: a loss.
        stride: steps from one value to the next.
    """
    above = [i for i, value in enumerate(curve) if not value <= target]
    first = above[-1] + 1 if above else 0
    return (first + 1) * stride if first < len(curve) else None


def crossing(evals: Mapping[int, float | None], target: float) -> int | None:
    """The step from which an evaluated loss stays at or below a target; None if it ends above it.

    Between two evaluations by a straight line.
    """
    steps = sorted(evals)
    values = [math.inf if evals[step] is None else evals[step] for step in steps]
    count = reach(values, target)
    if count is None:
        return None
    if count == 1:
        return steps[0]
    (x, y), (x2, y2) = ((steps[i], values[i]) for i in (count - 2, count - 1))
    return x2 if y == math.inf else math.ceil(x + (x2 - x) * (y - target) / (y - y2))


def edge_of(rate: float, rates: Sequence[float]) -> str | None:
    """On which side of the best rate none was tried: "lowest", "highest" or None; `rates` rise."""
    return {rates[0]: "lowest", rates[-1]: "highest"}.get(rate) if len(rates) > 1 else None


def _spread(values: Sequence[float]) -> float | None:
    return max(values) - min(values) if len(values) > 1 else None


def _summary(values: Iterable[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    return {"mean": mean(known) if known else None, "spread": _spread(known)}


@dataclass
class Arm:
    """The runs of an arm.

    Args:
        name: in the matrix.
        results: all of them, not empty.
    """

    name: str
    results: Sequence[Result]

    def __post_init__(self) -> None:
        by_seed: dict[int, dict[float, Result]] = {}
        for result in self.results:
            by_seed.setdefault(result.run.seed, {})[result.run.rate] = result
        # Rates are compared with the seed that was run at most of them.
        self.first_seed = max(by_seed, key=lambda seed: (len(by_seed[seed]), -seed))
        self.sweep = dict(sorted(by_seed[self.first_seed].items()))
        chosen = best(self.sweep.values())
        self.rate = None if chosen is None else chosen.run.rate
        self.seeds = {s: by_seed[s][self.rate] for s in sorted(by_seed) if self.rate in by_seed[s]}
        self.finished = [r for r in self.seeds.values() if not r.diverged]
        self.diverged = len(self.seeds) - len(self.finished)
        # A seed that diverged has no loss from there on, and nor has the mean.
        complete = self.finished and not self.diverged
        self.curve = average([r.curve for r in self.finished]) if complete else None

    @property
    def title(self) -> str:
        """In tables."""
        return every_arm()[self.name].title

    @property
    def edge(self) -> str | None:
        """On which side rates are missing beside the best one: "lowest", "highest" or None."""
        return None if self.rate is None else edge_of(self.rate, list(self.sweep))

    def steps_to(self, target: float | None) -> int | None:
        """The step from which its curve stays at or below a target; None if it does not, or without one."""
        if self.curve is None or target is None:
            return None
        return reach(self.curve, target, self.finished[0].stride)

    def steps_by_seed(self, base: "Arm | None") -> dict[int, int | None]:
        """The same for each seed that AdamW has, too, against the final loss of AdamW with that seed."""
        targets = {} if base is None else {s: r.final for s, r in base.seeds.items() if not r.diverged}
        return {
            seed: None if result.diverged else reach(result.curve, targets[seed], result.stride)
            for seed, result in self.seeds.items()
            if seed in targets
        }

    def evals(self, name: str) -> dict[int, dict[str, float | None]]:
        """Mean and spread over the seeds of what evaluations found, by step."""
        found: dict[int, list[float | None]] = {}
        for result in self.finished:
            for item in result.evals:
                if name in item:
                    found.setdefault(item["step"], []).append(item[name])
        return {step: _summary(values) for step, values in sorted(found.items())}

    def steps_to_heldout_of(self, rival: "Arm") -> dict[int, int | None]:
        """By seed that both have: from where its held-out loss stays at or below the rival's final one."""
        found = {}
        for seed, result in self.seeds.items():
            other = rival.seeds.get(seed)
            if other is None or other.diverged or not other.evals:
                continue
            target = other.evals[-1]["heldout_loss"]
            if target is not None:
                evals = {item["step"]: item["heldout_loss"] for item in result.evals}
                found[seed] = None if result.diverged else crossing(evals, target)
        return found


@dataclass
class Energy:
    """What the runs of a report can say of energy.

    Args:
        kinds: of device that all of them measured.
        reason: why there are no joules, None if there are some.
    """

    kinds: list[str]
    reason: str | None

    @classmethod
    def of(cls, results: Sequence[Result]) -> "Energy":
        """Look at what the runs have."""
        if not results:
            return cls([], "no run has finished")
        crowded = next((r for r in results if r.jobs > 1), None)
        if crowded is not None:
            return cls(
                [], f"{crowded.run.name} was one of {crowded.jobs} runs at a time; counters tell no run"
            )
        kinds = [kind for kind in KINDS if all(kind in r.energy["by_device"] for r in results)]
        if kinds:
            return cls(kinds, None)
        lacking = next((r for r in results if not r.energy["by_device"]), None)
        if lacking is None:
            return cls([], "no kind of device was measured by all runs")
        missing = {k: v for k, v in lacking.energy["missing"].items() if k in KINDS}
        reasons = "; ".join(f"{kind}: {why}" for kind, why in missing.items()) or "nothing was measured"
        return cls([], f"{lacking.run.name} has none ({reasons})")

    def joules(self, arm: Arm, steps: int | None) -> float | None:
        """Of that many steps, on average over the arm's seeds."""
        if steps is None or not self.kinds:
            return None
        totals = [sum(r.energy["by_device"][kind] for kind in self.kinds) for r in arm.finished]
        return mean(totals) * steps / arm.finished[0].settings["steps"]


class Report:
    """All figures of a preset.

    Args:
        matrix: its results.

    Raises:
        ValueError: there are none, or they are of several sources.
    """

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix
        self.preset = PRESETS[matrix.preset]
        results = list(matrix.results.values())
        if not results:
            raise ValueError(
                "\n".join([*matrix.unusable.values(), f"{matrix.runs} holds no run that can be used"])
            )
        sources = sorted({r.settings["data.source"] for r in results})
        if len(sources) > 1:
            raise ValueError(f"{matrix.runs} mixes runs on several sources: {', '.join(sources)}")
        self.source = sources[0]
        self.arms = {
            name: Arm(name, found)
            for name in every_arm()
            if (found := [r for r in results if r.run.arm == name])
        }
        self.base = self.arms.get(BASE)
        self.target = None if self.base is None or self.base.curve is None else self.base.curve[-1]
        timing = matrix.timing({"data.source": self.source})
        if timing is None:
            command = f"python -m bench convergence --preset {matrix.preset} --time 20"
            self.no_timing = f"There is no timing.json; `{command}` writes it, on a machine that is quiet."
        elif timing["changed"]:
            self.no_timing = f"timing.json is of other settings for {', '.join(timing['changed'])}."
        else:
            self.no_timing = None
        self.timing = timing or {"arms": {}}
        self.energy = Energy.of([r for arm in self.arms.values() for r in arm.finished])
        self.rows = {name: self._row(arm) for name, arm in self.arms.items()}

    def _row(self, arm: Arm) -> dict[str, object]:
        steps = arm.steps_to(self.target)
        timing = self.timing["arms"].get(arm.name)
        heldout = arm.evals("heldout_loss")
        return {
            "arm": arm.name,
            "title": arm.title,
            "rate": arm.rate,
            "edge": arm.edge,
            "first_seed": arm.first_seed,
            "rates": {f"{rate:g}": None if r.diverged else r.final for rate, r in arm.sweep.items()},
            "rates_planned": list(self.preset.rates_of(arm.name)),
            "seeds": list(arm.seeds),
            "few_seeds": len(arm.seeds) < ENOUGH,
            "diverged": arm.diverged,
            "skipped_steps": sum(r.skipped_steps for r in arm.seeds.values()),
            "final_loss": _summary(r.final for r in arm.finished),
            "heldout_loss": heldout[max(heldout)] if heldout else _summary([]),
            "heldout_by_step": heldout,
            **{name: arm.evals(name) for name in PROBES},
            "steps_to_target": steps,
            "steps_by_seed": arm.steps_by_seed(self.base),
            "steps_to_heldout_of": {
                rival: arm.steps_to_heldout_of(self.arms[rival]) for rival in RIVALS if rival in self.arms
            },
            "step_seconds": None if timing is None else timing["seconds"],
            "step_ratio": None if timing is None else timing["ratio"],
            "seconds_to_target": None
            if steps is None or timing is None
            else steps * timing["seconds"]["median"],
            "joules_to_target": self.energy.joules(arm, steps),
        }

    @property
    def diverged(self) -> list[Result]:
        """The runs that diverged, at any rate."""
        return [r for arm in self.arms.values() for r in arm.results if r.diverged]

    def machines(self) -> list[str]:
        """Machine, versions and commit of the runs, one line for those that are alike."""
        lines = record.machine_lines(r.machine for arm in self.arms.values() for r in arm.results)
        if self.timing["arms"]:
            lines.append(f"timing: {record.machine_line(self.timing)}")
        return lines

    def to_json(self) -> dict[str, object]:
        """What report.json holds."""
        return {
            "preset": self.matrix.preset,
            "source": self.source,
            "steps": self.preset.steps,
            "window": WINDOW,
            "stride": self.preset.stride,
            "target": self.target,
            "arms": self.rows,
            "diverged": {r.run.name: r.outcome for r in self.diverged},
            "no_timing": self.no_timing,
            "energy": {"kinds": self.energy.kinds, "reason": self.energy.reason},
            "left_out": list(self.matrix.unusable.values()),
            "machines": self.machines(),
        }


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _mean_cell(found: Mapping[str, float | None], form: str = ".4f") -> str:
    spread = "" if found["spread"] is None else f" ({found['spread']:{form}})"
    return _number(found["mean"], form) + spread


def _quartiles_cell(found: Mapping[str, float] | None, scale: float, form: str) -> str:
    if found is None:
        return "-"
    low, median, high = (f"{found[key] * scale:{form}}" for key in ("low", "median", "high"))
    return f"{median} [{low}, {high}]"


def _cost_cell(report: Report, row: Mapping, key: str, form: str) -> str:
    """What an arm needed to reach the target, and the ratio to what AdamW needed."""
    if report.target is None:
        return "-"
    if row["steps_to_target"] is None:
        return "not reached"
    value, base = row[key], report.rows[BASE][key]
    ratio = "" if value is None or base is None else f" ({value / base:.0%})"
    return _number(value, form) + ratio


def _rate_cell(row: Mapping) -> str:
    if row["rate"] is None:
        return "all diverged"
    return f"{row['rate']:g}" + ("" if row["edge"] is None else f", {row['edge']} tried")


def _seeds_cell(row: Mapping) -> str:
    count = len(row["seeds"])
    notes = [f"{row['diverged']} diverged"] if row["diverged"] else []
    notes += [f"fewer than {ENOUGH}"] if row["few_seeds"] else []
    return f"{count}" + (f" ({', '.join(notes)})" if notes else "")


def _by_seed_cell(row: Mapping) -> str:
    found = row["steps_by_seed"].values()
    return ", ".join("not reached" if steps is None else str(steps) for steps in found) or "-"


def losses_table(report: Report, names: Iterable[str]) -> str:
    """Losses, accuracy and steps to the target of some arms as Markdown."""
    rows = []
    for name in names:
        row = report.rows[name]
        last = row["probe"][max(row["probe"])] if row["probe"] else _summary([])
        rows.append(
            [
                row["title"],
                _rate_cell(row),
                _seeds_cell(row),
                _mean_cell(row["final_loss"]),
                _mean_cell(row["heldout_loss"]),
                _mean_cell(last, ".3f"),
                _cost_cell(report, row, "steps_to_target", "d"),
                _by_seed_cell(row),
            ]
        )
    columns = ("arm", "best rate", "seeds", "final loss", "held out", "probe", "steps to target", "by seed")
    return record.table(columns, rows)


def heldout_table(report: Report, names: Iterable[str]) -> str:
    """Held-out losses, and the steps to those that the rivals end at, as Markdown."""
    rivals = [name for name in RIVALS if name in report.arms]
    rows = []
    for name in names:
        row = report.rows[name]
        cells = [row["title"], _mean_cell(row["heldout_loss"])]
        for rival in rivals:
            steps = list(row["steps_to_heldout_of"][rival].values())
            part = f"{mean(steps) / report.preset.steps:.0%}" if steps and None not in steps else "-"
            cells += [part, ", ".join("not reached" if n is None else str(n) for n in steps) or "-"]
        rows.append(cells)
    titles = [ARMS[rival].title for rival in rivals]
    columns = [text for title in titles for text in (f"of the steps to {title}'s", "by seed")]
    return record.table(["arm", "held out", *columns], rows)


def costs_table(report: Report, names: Iterable[str]) -> str:
    """Time of a step and time and energy to the target of some arms as Markdown."""
    rows = []
    for name in names:
        row = report.rows[name]
        cells = [
            row["title"],
            _cost_cell(report, row, "steps_to_target", "d"),
            _quartiles_cell(row["step_seconds"], 1e3, ".4g"),
            _quartiles_cell(row["step_ratio"], 1, ".3f"),
            _cost_cell(report, row, "seconds_to_target", ".1f"),
        ]
        if report.energy.kinds:
            cells.append(_cost_cell(report, row, "joules_to_target", ".0f"))
        rows.append(cells)
    columns = ["arm", "steps to target", "ms/step", "of AdamW's", "seconds to target"]
    if report.energy.kinds:
        columns.append(f"joules to target ({'+'.join(report.energy.kinds)})")
    return record.table(columns, rows)


def rates_table(report: Report) -> str:
    """Final loss of the first seed by rate as Markdown."""
    names = [name for name in report.arms if name in ARMS]
    rates = sorted({rate for name in names for rate in report.arms[name].sweep})
    rows = []
    for name in names:
        arm = report.arms[name]
        cells = []
        for rate in rates:
            result = arm.sweep.get(rate)
            missing = "missing" if rate in report.preset.rates_of(name) else "-"
            fate = missing if result is None else "diverged" if result.diverged else f"{result.final:.4f}"
            cells.append(fate)
        rows.append([arm.title, str(arm.first_seed), *cells])
    return record.table(["arm", "seed", *(f"{rate:g}" for rate in rates)], rows)


def probe_table(report: Report, probe: str) -> str:
    """Accuracy of a classifier of the probe by step as Markdown; empty if no run has it."""
    rows = {n: row[probe] for n, row in report.rows.items() if n in ARMS and row[probe]}
    if not rows:
        return ""
    steps = sorted({step for found in rows.values() for step in found})
    cells = [
        [report.rows[name]["title"], _seeds_cell(report.rows[name])]
        + [_mean_cell(found[step], ".3f") if step in found else "-" for step in steps]
        for name, found in rows.items()
    ]
    return record.table(["arm", "seeds", *(f"step {step}" for step in steps)], cells)


def _target_text(report: Report) -> str:
    if report.target is None:
        return "There is no target: AdamW has no rate at which all of its seeds finished."
    base = report.rows[BASE]
    seeds = ", ".join(map(str, base["seeds"]))
    text = (
        f"Target: {report.target:.4f}, the final training loss of AdamW at its best rate, {base['rate']:g} "
        f"(mean of {WINDOW} steps and of the seeds {seeds}). An arm reaches it at the first step from which "
        f"its curve, averaged over its seeds, mean of {WINDOW} steps, stays at or below it; in brackets, the "
        "ratio to AdamW's own. By seed: each seed against AdamW's final loss with that seed."
    )
    if report.preset.stride > 1:
        text += f" Losses are kept as means of {report.preset.stride} steps: steps are rounded up to these."
    return text


def _families(report: Report) -> dict[str, list[str]]:
    found = {family: [n for n in arms if n in report.arms] for family, arms in ABLATIONS.items()}
    return {family: names for family, names in found.items() if names}


def markdown(report: Report, pictures: Mapping[str, str]) -> str:
    """The report.

    Args:
        report: figures.
        pictures: file names of the plots that were made, by section.
    """
    main = [name for name in report.arms if name in ARMS]
    parts: list[str] = []

    def section(title: str, name: str, *texts: str) -> None:
        parts.extend([f"## {title}", *filter(None, texts)])
        if name in pictures:
            parts.append(f"![{title}]({pictures[name]})")

    parts.append(f"# Convergence: {report.matrix.preset}")
    parts.append(f"{report.preset.steps} steps on {report.source}. {_target_text(report)}")
    parts.append(
        "Losses and accuracies are means over the seeds that finished, with the largest minus the smallest "
        "in brackets; held-out loss and probe are of the last step. Fewer than "
        f"{ENOUGH} seeds are marked, and so is a best rate at the edge of those tried: a better one may lie "
        "beyond."
    )
    section("Arms", "loss", losses_table(report, main))
    section(
        "Held out",
        "heldout",
        "From where a seed's held-out loss stays at or below the one that the rival ends at with the same "
        "seed, between evaluations by a straight line; in parts of a run, the mean of the seeds.",
        heldout_table(report, main),
    )
    cost = [report.no_timing] if report.no_timing else []
    if report.timing["arms"]:
        cost.append(
            "Time of a step: median and quartiles, interleaved in one process, without the loading of data; "
            "beside it the ratio to AdamW's within a round. Seconds to the target: steps times that median."
        )
    if report.energy.reason:
        cost.append(f"No joules: {report.energy.reason}.")
    else:
        cost.append("Joules to the target: the steps' share of what the runs measured.")
    section("Costs", "costs", " ".join(cost), costs_table(report, report.arms))
    section(
        "Rates",
        "rates",
        "Final training loss by peak learning rate, one seed. The best is run with the other seeds.",
        rates_table(report),
    )
    for probe, title in PROBES.items():
        table = probe_table(report, probe)
        if table:
            text = f"Accuracy on {_probed(report)} that it did not learn from, step by step."
            section(title, probe, text, table)
    for family, names in _families(report).items():
        shown = [name for name in _beside(names) if name in report.arms]
        section(f"Ablation: {family}", f"ablation_{family}", losses_table(report, [*shown, *names]))
    if report.diverged:
        lines = [f"- {r.run.name}: {r.outcome}" for r in report.diverged]
        section("Diverged", "diverged", "\n".join(lines))
    if report.matrix.unusable:
        section("Left out", "left out", "\n".join(f"- {text}" for text in report.matrix.unusable.values()))
    section("Machines", "machines", "\n".join(f"- {line}" for line in report.machines()))
    return "\n\n".join(parts) + "\n"


def _probed(report: Report) -> str:
    return "digits" if report.source == "photos" else "held-out images"


def _draw_curves(figure: Figure, report: Report, names: Sequence[str], colours: Mapping[str, str]) -> None:
    """Curves over steps and, where all of them have a time of a step, over seconds."""
    timing = report.timing["arms"]
    timed = all(name in timing for name in names)
    if timed:
        figure.set_figwidth(11)
    axes = figure.subplots(1, 1 + timed, sharey=True, squeeze=False)[0]
    units = [("step", lambda name: 1.0)]
    if timed:
        units.append(
            ("seconds: steps times the time of a step", lambda name: timing[name]["seconds"]["median"])
        )
    stride = report.preset.stride
    for axis, (label, unit) in zip(axes, units, strict=True):
        for name in names:
            arm = report.arms[name]
            x = [(i + 1) * stride * unit(name) for i in range(len(arm.curve))]
            seeds = f"{len(arm.seeds)} {'seed' if len(arm.seeds) == 1 else 'seeds'}"
            axis.plot(x, arm.curve, color=colours[name], linewidth=1.2, label=f"{arm.title} ({seeds})")
            steps = arm.steps_to(report.target)
            if steps is not None:
                axis.plot(steps * unit(name), arm.curve[steps // stride - 1], "o", color=colours[name])
        if report.target is not None:
            axis.axhline(report.target, color="gray", linewidth=0.8, linestyle="--")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    # The start of every curve is high and alike: show the part in which they differ.
    late = [v for name in names for v in report.arms[name].curve[len(report.arms[name].curve) // 4 :]]
    margin = 0.03 * (max(late) - min(late)) or 0.01
    axes[0].set_ylim(min(late) - margin, max(late) + margin)
    axes[0].set_ylabel(f"training loss, mean of {WINDOW} steps")
    if len(names) <= CROWD:
        axes[0].legend(fontsize=8)
    else:
        figure.set_figwidth(figure.get_figwidth() + 3)
        figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")


def _plot_loss(report: Report, names: Sequence[str]) -> Callable[[Figure], None]:
    return lambda figure: _draw_curves(figure, report, names, COLOURS)


def _plot_family(report: Report, names: Sequence[str], near: Sequence[str]) -> Callable[[Figure], None]:
    many = colormaps["tab20"].colors
    colours = {name: many[i % len(many)] for i, name in enumerate(names)}
    colours |= dict(zip(near, ("black", "silver"), strict=True))
    return lambda figure: _draw_curves(figure, report, names, colours)


def _plot_rates(figure: Figure, report: Report) -> None:
    axis = figure.subplots()
    finals = []
    for name, arm in report.arms.items():
        found = {rate: r.final for rate, r in arm.sweep.items() if not r.diverged}
        if name not in ARMS:
            continue
        finals += found.values()
        axis.plot(list(found), list(found.values()), "o-", color=COLOURS[name], label=arm.title)
        for rate, result in arm.sweep.items():
            if result.diverged:
                axis.plot(
                    rate, 1.0, "x", color=COLOURS[name], transform=axis.get_xaxis_transform(), clip_on=False
                )
    rates = sorted({rate for name, arm in report.arms.items() if name in ARMS for rate in arm.sweep})
    axis.set_xscale("log")
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates], fontsize=8)
    axis.minorticks_off()
    axis.set_xlabel("peak learning rate")
    axis.set_ylabel(f"final training loss, mean of {WINDOW} steps, one seed")
    axis.set_title("x at the top: diverged", fontsize=9, pad=10)
    axis.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")  # curves go everywhere


def _plot_evals(figure: Figure, report: Report, key: str, label: str) -> None:
    axis = figure.subplots()
    for name, row in report.rows.items():
        found = {step: item for step, item in row[key].items() if item["mean"] is not None}
        if key not in PROBES:  # the loss before training is so high that it would hide the rest
            found.pop(0, None)
        if name in ARMS and found:
            means = [item["mean"] for item in found.values()]
            axis.plot(list(found), means, "o-", markersize=3, color=COLOURS[name], label=row["title"])
    axis.set_xlabel("step")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def plots(report: Report, folder: Path) -> dict[str, str]:
    """Write the plots that there is something for; returns their file names by section."""
    drawn: dict[str, Callable[[Figure], None]] = {}
    main = [name for name, arm in report.arms.items() if name in ARMS and arm.curve is not None]
    if main:
        drawn["loss"] = _plot_loss(report, main)
    if any(len(report.arms[name].sweep) > 1 for name in report.arms if name in ARMS):
        drawn["rates"] = lambda figure: _plot_rates(figure, report)
    if any(row["heldout_by_step"] for row in report.rows.values()):
        drawn["heldout"] = lambda figure: _plot_evals(figure, report, "heldout_by_step", "held-out loss")
    for probe, title in PROBES.items():
        if probe_table(report, probe):
            label = f"{title}, accuracy on {_probed(report)}"
            drawn[probe] = partial(_plot_evals, report=report, key=probe, label=label)
    for family, names in _families(report).items():
        near = _beside(names)
        chosen = [n for n in (*near, *names) if n in report.arms and report.arms[n].curve is not None]
        if chosen:
            drawn[f"ablation_{family}"] = _plot_family(report, chosen, near)
    for name, draw in drawn.items():
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        draw(figure)
        figure.savefig(folder / f"{name}.png", dpi=120)
    return {name: f"{name}.png" for name in drawn}


def load(path: Path) -> Report:
    """Read the results of a preset.

    Raises:
        ValueError: the folder is of no preset, or holds nothing that can be used.
    """
    folder = path.resolve()
    if folder.name not in PRESETS:
        raise ValueError(f"expected FOLDER/PRESET with a preset of {', '.join(PRESETS)}, got {path}")
    if not folder.is_dir():
        raise ValueError(f"there is no folder {path}; python -m bench convergence fills it")
    return Report(Matrix(folder.parent, folder.name, {}))


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Write the report and its plots; returns the exit code."""
    try:
        report = load(args.results)
    except ValueError as error:
        print(f"curves: {error}", file=sys.stderr)
        return 2
    out = args.results if args.out is None else args.out
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(report, plots(report, out))
    write_atomically(out / "report.md", text)
    write_atomically(out / "report.json", to_json(report.to_json(), indent=1) + "\n")
    print(text)
    for problem in report.matrix.unusable.values():
        record.progress(f"curves: left out: {problem}")
    return 1 if report.matrix.unusable else 0
