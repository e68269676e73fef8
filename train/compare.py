"""Compare runs: which reached what loss when.

    python -m train.compare runs/plain runs/dbp [--out comparison.png]

Runs that differ only in their seed are one arm and are averaged. The target is the final training loss of
the first run's arm: the mean over its last 50 steps and its seeds. An arm reaches it at the first step from
which its curve (averaged over its seeds, mean of 50 steps) stays at or below the target. Held-out losses
stand beside it and decide nothing.

Joules and kilograms of CO2 to the target show where all runs measured energy, for the kinds of device that
all of them measured.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from train.engine.energy import JOULES_PER_KWH, KINDS, carbon_intensity
from train.engine.plots import WINDOW, trailing_mean
from train.engine.run_folder import NEUTRAL, RunFolder, flat

# Settings in which the runs of one arm may differ.
WITHIN_ARM = ("seed", *NEUTRAL)


@dataclass
class Run:
    """What a finished or running run has logged."""

    path: Path
    config: dict[str, Any]
    losses: list[float]
    seconds: list[float]
    joules: list[dict[str, float]]
    heldout: list[tuple[int, float]]

    @property
    def country(self) -> str | None:
        """Where the run's electricity comes from, as far as it was told."""
        return self.config.get("energy", {}).get("country")


def read(path: str | Path) -> Run:
    """Read a run's folder.

    Raises:
        ValueError: it is not the folder of a run, no step was logged, or the first ones are missing.
    """
    folder = RunFolder(path)
    config = folder.read_config()
    if config is None:
        raise ValueError(f"no run at {folder.path}")
    run = Run(folder.path, config, [], [], [], [])
    for record in folder.records():
        if record["kind"] == "eval":
            run.heldout.append((record["step"], record["heldout_loss"]))
        if record["kind"] not in ("step", "skip"):
            continue
        if record["step"] != len(run.seconds) + 1:
            raise ValueError(
                f"{folder.log} lacks steps: expected {len(run.seconds) + 1}, found {record['step']}; a run "
                "that was continued in another folder has the rest of its log there"
            )
        run.seconds.append(record["seconds"])
        run.joules.append(record.get("joules", {}))
        if record["kind"] == "step":
            # A skipped step has no loss of its own: it counts, with the loss before it (or the first).
            skipped = len(run.seconds) - 1 - len(run.losses)
            run.losses += [run.losses[-1] if run.losses else record["loss"]] * skipped + [record["loss"]]
    if not run.losses:
        raise ValueError(f"{folder.log} has no finished step")
    return run


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def average(curves: Sequence[Sequence[float]]) -> list[float]:
    """Mean of equally long curves, point by point."""
    return [mean(values) for values in zip(*curves, strict=True)]


@dataclass
class Arm:
    """Runs that differ only in their seed."""

    name: str
    runs: list[Run]

    def __post_init__(self) -> None:
        length = min(len(run.losses) for run in self.runs)
        self.curve = trailing_mean(average([run.losses[:length] for run in self.runs]))
        self.seconds = average([run.seconds[:length] for run in self.runs])
        self.final = self.curve[-1]
        finals = [mean(run.losses[:length][-WINDOW:]) for run in self.runs]
        self.spread = max(finals) - min(finals)
        held = [run.heldout[-1][1] for run in self.runs if run.heldout and run.heldout[-1][1] is not None]
        self.heldout = mean(held) if held else None

    def reaches(self, target: float) -> int | None:
        """Steps after which the curve stays at or below the target; None if it does not."""
        above = [i for i, value in enumerate(self.curve) if value > target]
        first = above[-1] + 1 if above else 0
        return first + 1 if first < len(self.curve) else None

    def energy(
        self, steps: int | None, kinds: Sequence[str], factors: Mapping[str | None, float]
    ) -> float | None:
        """What the runs measured in their first steps on some kinds of device, on average.

        Args:
            steps: How many steps.
            kinds: Kinds of device.
            factors: By country, what to multiply joules by.

        Returns:
            The mean, None without steps, kinds, factors, or anything measured by then.
        """
        if steps is None or not kinds or not factors:
            return None
        # Records are without a kind until its counter has moved.
        joules = [sum(run.joules[steps - 1].get(kind, 0.0) for kind in kinds) for run in self.runs]
        return mean([j * factors[run.country] for j, run in zip(joules, self.runs, strict=True)]) or None


def describe(config: dict[str, Any]) -> str:
    """Name of an arm in tables."""
    decor = config.get("decor", {})
    if not decor.get("enable"):
        return "plain"
    sites = decor["sites"] if isinstance(decor["sites"], str) else "+".join(decor["sites"])
    rank = decor.get("rank")
    if isinstance(rank, dict):
        rank = ", ".join(f"{site} {r}" for site, r in rank.items())
    return f"DBP {sites}" + (f", rank {rank}" if rank else "")


def group(runs: Sequence[Run]) -> list[Arm]:
    """Runs by arm, in the order in which the arms appear."""
    arms: dict[str, list[Run]] = {}
    for run in runs:
        settings = {k: v for k, v in flat(run.config).items() if k not in WITHIN_ARM}
        key = json.dumps(settings, sort_keys=True)
        arms.setdefault(key, []).append(run)
    names = [describe(members[0].config) for members in arms.values()]
    return [
        # Two arms of one name differ in something else: then the folder tells them apart.
        Arm(name if names.count(name) == 1 else f"{name} ({members[0].path.name})", members)
        for name, members in zip(names, arms.values(), strict=True)
    ]


def cell(row: Mapping[str, Any], base: Mapping[str, Any], key: str, form: str) -> str:
    """What an arm needed to reach the target, and the ratio to what the first arm needed."""
    if row["steps_to_target"] is None:
        return "not reached"
    if row[key] is None:
        return "-"
    ratio = "" if base[key] is None else f" ({row[key] / base[key]:.0%})"
    return f"{row[key]:{form}}{ratio}"


def table(arms: Sequence[Arm]) -> tuple[str, list[dict[str, Any]]]:
    """The comparison as Markdown and as records; the first arm sets the target.

    Raises:
        ValueError: there is no carbon intensity for a run's country.
    """
    target = arms[0].final
    runs = [run for arm in arms for run in arm.runs]
    measured = [kind for kind in KINDS if all(kind in run.joules[-1] for run in runs)]
    countries = {run.country for run in runs}
    unit = dict.fromkeys(countries, 1.0)
    kilograms: dict[str | None, float] = {}
    if None not in countries:
        known = [country for country in countries if country is not None]
        kilograms = {country: carbon_intensity(country)[0] / JOULES_PER_KWH for country in known}
    rows: list[dict[str, Any]] = []
    for arm in arms:
        steps = arm.reaches(target)
        rows.append(
            {
                "arm": arm.name,
                "runs": len(arm.runs),
                "steps": len(arm.curve),
                "final_loss": arm.final,
                "spread": arm.spread,
                "heldout_loss": arm.heldout,
                "milliseconds_per_step": 1000 * arm.seconds[-1] / len(arm.seconds),
                "steps_to_target": steps,
                "seconds_to_target": None if steps is None else arm.seconds[steps - 1],
                "joules_to_target": arm.energy(steps, measured, unit),
                "kg_co2_to_target": arm.energy(steps, measured, kilograms),
            }
        )
    base = rows[0]  # ends at the target by definition, so it always reaches it
    costs = [("steps_to_target", "steps to target", ""), ("seconds_to_target", "seconds to target", ".1f")]
    if measured:
        costs.append(("joules_to_target", f"joules to target ({'+'.join(measured)})", ".0f"))
    if measured and kilograms:
        costs.append(("kg_co2_to_target", "kg CO2 to target", ".3g"))
    headings = ["arm", "runs", "final loss", "spread", "held out", "ms/step", *(name for _, name, _ in costs)]
    lines = [
        f"Target: {target:.4f}, the final training loss of {arms[0].name} (mean of {WINDOW} steps)",
        "",
        f"| {' | '.join(headings)} |",
        "|---" * len(headings) + "|",
    ]
    for row in rows:
        reached = [cell(row, base, key, form) for key, _, form in costs]
        held = "-" if row["heldout_loss"] is None else f"{row['heldout_loss']:.4f}"
        spread = f"{row['spread']:.4f}" if row["runs"] > 1 else "-"
        lines.append(
            f"| {row['arm']} | {row['runs']} | {row['final_loss']:.4f} | {spread} | {held} "
            f"| {row['milliseconds_per_step']:.0f} | {' | '.join(reached)} |"
        )
    return "\n".join(lines), rows


def plot(arms: Sequence[Arm], path: Path) -> None:
    """Smoothed training losses over steps and over time, the target, and where each arm reaches it."""
    target = arms[0].final
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for i, arm in enumerate(arms):
        steps = list(range(1, len(arm.curve) + 1))
        at = arm.reaches(target)
        noun = "run" if len(arm.runs) == 1 else "runs"
        for axis, x in ((by_step, steps), (by_time, arm.seconds)):
            axis.plot(x, arm.curve, color=f"C{i}", label=f"{arm.name} ({len(arm.runs)} {noun})")
            if at is not None:
                axis.plot(x[at - 1], arm.curve[at - 1], "o", color=f"C{i}")
    for axis, label in ((by_step, "step"), (by_time, "seconds")):
        axis.axhline(target, color="gray", linewidth=0.8, linestyle="--")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    # The start of every curve is high and alike: show the part in which they differ.
    late = [value for arm in arms for value in arm.curve[len(arm.curve) // 10 :]]
    margin = 0.03 * (max(late) - min(late))
    by_step.set_ylim(min(late) - margin, max(late) + margin)
    by_step.set_ylabel(f"training loss, mean of {WINDOW} steps")
    by_step.legend()
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, print, plot."""
    parser = argparse.ArgumentParser(
        prog="python -m train.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs; the first sets the target")
    parser.add_argument(
        "--out", type=Path, default=Path("comparison.png"), help="plot (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="also write the table as JSON")
    options = parser.parse_args(arguments)
    try:
        arms = group([read(path) for path in options.runs])
        text, rows = table(arms)
    except ValueError as error:
        sys.exit(f"compare: {error}")
    print(text)
    plot(arms, options.out)
    print(f"\nplot: {options.out}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
