"""What the trials of a study say: losses, targets and when they are reached, accuracies, seconds, joules.

The target is the final training loss of AdamW at its best rate, the mean over its last 50 steps and its
seeds. An arm reaches it at the first step from which its curve (averaged over its seeds, mean of 50 steps)
stays at or below the target. Seconds are steps times the time of a step in timing.json; the trials' own
clocks show what else the machine did.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench import record
from bench.experiments.study import Result, Study
from bench.experiments.trial import FIGURES, PROBES
from train.compare import average, mean
from train.engine.energy import KINDS
from train.engine.plots import WINDOW

BASE = "adamw"  # sets the target
RIVALS = (BASE, "muon")  # whose final held-out losses are targets, too
ENOUGH = 3  # seeds


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


def edge_of(lr: float, lrs: Sequence[float]) -> str | None:
    """On which side of the best rate none was tried: "lowest", "highest" or None; `lrs` rise."""
    return {lrs[0]: "lowest", lrs[-1]: "highest"}.get(lr) if len(lrs) > 1 else None


def summary(values: Iterable[float | None]) -> dict[str, float | None]:
    """Mean of what is known, and the largest minus the smallest of two or more."""
    known = [value for value in values if value is not None]
    spread = max(known) - min(known) if len(known) > 1 else None
    return {"mean": mean(known) if known else None, "spread": spread}


@dataclass
class ArmFigures:
    """What the trials of an arm say.

    Args:
        name: of the arm.
        title: in tables.
        results: all of them, not empty.
    """

    name: str
    title: str
    results: Sequence[Result]

    def __post_init__(self) -> None:
        by_seed: dict[int, dict[float, Result]] = {}
        for result in self.results:
            by_seed.setdefault(result.trial.seed, {})[result.trial.lr] = result
        # Rates are compared with the seed that was tried at most of them.
        self.first_seed = max(by_seed, key=lambda seed: (len(by_seed[seed]), -seed))
        self.sweep = dict(sorted(by_seed[self.first_seed].items()))
        best = min(self.sweep.values(), key=lambda result: result.badness)
        self.lr = None if best.diverged else best.trial.lr
        self.seeds = {s: by_seed[s][self.lr] for s in sorted(by_seed) if self.lr in by_seed[s]}
        self.finished = [r for r in self.seeds.values() if not r.diverged]
        self.diverged = len(self.seeds) - len(self.finished)
        # A seed that diverged has no loss from there on, and nor has the mean.
        complete = self.finished and not self.diverged and all(r.losses for r in self.finished)
        self.curve = average([r.curve for r in self.finished]) if complete else None

    @property
    def edge(self) -> str | None:
        """On which side rates are missing beside the best one: "lowest", "highest" or None."""
        return None if self.lr is None else edge_of(self.lr, list(self.sweep))

    def steps_to(self, target: float | None) -> int | None:
        """The step from which its curve stays at or below a target; None if it does not, or without one."""
        if self.curve is None or target is None:
            return None
        return reach(self.curve, target, self.finished[0].stride)

    def steps_by_seed(self, base: "ArmFigures | None") -> dict[int, int | None]:
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
        return {step: summary(values) for step, values in sorted(found.items())}

    def steps_to_heldout_of(self, rival: "ArmFigures") -> dict[int, int | None]:
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
class EnergyFigures:
    """What the trials of a study can say of energy.

    Args:
        kinds: of device that all of them measured.
        reason: why there are no joules, None if there are some.
    """

    kinds: list[str]
    reason: str | None

    @classmethod
    def of(cls, results: Sequence[Result]) -> "EnergyFigures":
        """Look at what the trials have."""
        if not results:
            return cls([], "no trial has finished")
        crowded = next((r for r in results if r.jobs > 1), None)
        if crowded is not None:
            return cls(
                [],
                f"{crowded.trial.name} was one of {crowded.jobs} trials at a time, which counters cannot "
                "tell apart",
            )
        kinds = [kind for kind in KINDS if all(kind in r.energy["by_device"] for r in results)]
        if kinds:
            return cls(kinds, None)
        lacking = next((r for r in results if not r.energy["by_device"]), None)
        if lacking is None:
            return cls([], "no kind of device was measured by all trials")
        missing = {k: v for k, v in lacking.energy["missing"].items() if k in KINDS}
        reasons = "; ".join(f"{kind}: {why}" for kind, why in missing.items()) or "nothing was measured"
        return cls([], f"{lacking.trial.name} has none ({reasons})")

    def joules(self, arm: ArmFigures, steps: int | None) -> float | None:
        """Of that many steps, on average over the arm's seeds."""
        if steps is None or not self.kinds:
            return None
        totals = [sum(r.energy["by_device"][kind] for kind in self.kinds) for r in arm.finished]
        return mean(totals) * steps / arm.finished[0].settings["steps"]


class StudyFigures:
    """All figures of a study.

    Args:
        study: its results.

    Raises:
        ValueError: there are none, or they are of several sources.
    """

    def __init__(self, study: Study) -> None:
        self.study, self.preset = study, study.preset
        results = list(study.results.values())
        if not results:
            texts = [unusable.text for unusable in study.unusable]
            raise ValueError("\n".join([*texts, f"{study.file} holds no trial that can be used"]))
        sources = sorted({r.settings["data.source"] for r in results})
        if len(sources) > 1:
            raise ValueError(f"{study.file} mixes trials on several sources: {', '.join(sources)}")
        self.source = sources[0]
        self.arms = {
            name: ArmFigures(name, arm.title, found)
            for name, arm in self.preset.every_arm.items()
            if (found := [r for r in results if r.trial.arm == name])
        }
        self.base = self.arms.get(BASE) if self.preset.pretrains else None
        self.target = None if self.base is None or self.base.curve is None else self.base.curve[-1]
        timing = study.timing({"data.source": self.source}) if self.preset.pretrains else None
        if timing is None:
            command = f"python -m bench study {study.name} --time 20"
            self.no_timing = f"There is no timing.json; `{command}` writes it, on a machine that is quiet."
        elif timing["changed"]:
            self.no_timing = f"timing.json is of other settings for {', '.join(timing['changed'])}."
        else:
            self.no_timing = None
        self.timing = timing or {"arms": {}}
        self.energy = EnergyFigures.of([r for arm in self.arms.values() for r in arm.finished])
        self.rows = {name: self._row(arm) for name, arm in self.arms.items()}

    def _row(self, arm: ArmFigures) -> dict[str, object]:
        steps = arm.steps_to(self.target)
        timing = self.timing["arms"].get(arm.name)
        seconds = None if timing is None else timing["seconds"]
        encoders = [r.encoder for r in arm.finished if r.encoder]
        row = {
            "arm": arm.name,
            "title": arm.title,
            "lr": arm.lr,
            "edge": arm.edge,
            "first_seed": arm.first_seed,
            "lrs": {f"{lr:g}": None if r.diverged else r.decisive for lr, r in arm.sweep.items()},
            "missing_lrs": len(set(self.preset.lrs_of(arm.name)) - set(arm.sweep)),
            "seeds": list(arm.seeds),
            "few_seeds": len(arm.seeds) < ENOUGH,
            "diverged": arm.diverged,
            "skipped_steps": sum(r.skipped_steps for r in arm.seeds.values()),
            "final_loss": summary(r.final for r in arm.finished if r.losses),
            **{key: arm.evals(key) for key in ("heldout_loss", *PROBES, *FIGURES)},
        }
        if self.preset.pretrains:
            row |= {
                "steps_to_target": steps,
                "steps_by_seed": arm.steps_by_seed(self.base),
                "steps_to_heldout_of": {
                    rival: arm.steps_to_heldout_of(self.arms[rival]) for rival in RIVALS if rival in self.arms
                },
                "step_seconds": seconds,
                "step_ratio": None if timing is None else timing["ratio"],
                "seconds_to_target": None if None in (steps, seconds) else steps * seconds["median"],
                "joules_to_target": self.energy.joules(arm, steps),
            }
        if encoders:
            lost = [e["final_loss"] for e in encoders]
            row["pretrained_images"] = encoders[0]["steps"] * encoders[0]["settings"]["batch_size"]
            row["pretraining_loss"] = summary(lost)["mean"]
        return row

    @property
    def families(self) -> dict[str, list[str]]:
        """The ablations that there are, by family."""
        found = {family: [n for n in arms if n in self.arms] for family, arms in self.preset.families.items()}
        return {family: names for family, names in found.items() if names}

    @property
    def main(self) -> list[str]:
        """The main arms that there are."""
        return [name for name in self.arms if name in self.preset.arms]

    @property
    def diverged(self) -> list[Result]:
        """The trials that diverged, at any rate."""
        return [r for arm in self.arms.values() for r in arm.results if r.diverged]

    def machines(self) -> list[str]:
        """Machine, versions and commit of the trials, one line for those that are alike."""
        results = self.study.results.values()
        encoders = {(r.trial.arm, r.trial.seed): r.encoder["machine"] for r in results if r.encoder}
        lines = record.machine_lines([*(r.machine for r in results), *encoders.values()])
        if self.timing["arms"]:
            lines.append(f"timing: {record.machine_line(self.timing)}")
        return lines

    def to_json(self) -> dict[str, object]:
        """What report.json holds."""
        return {
            "study": self.study.name,
            "source": self.source,
            "steps": self.preset.steps,
            "window": WINDOW,
            "stride": self.preset.stride,
            "decides": self.preset.decides,
            "target": self.target,
            "arms": self.rows,
            "diverged": {r.trial.name: r.outcome for r in self.diverged},
            "no_timing": self.no_timing,
            "energy": {"kinds": self.energy.kinds, "reason": self.energy.reason},
            "left_out": [unusable.text for unusable in self.study.unusable],
            "machines": self.machines(),
        }
