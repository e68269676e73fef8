"""Studies: trials of several arms at several learning rates with several seeds.

Every arm is tried at each of its rates with the first seed; at its best one with the others, too. Ablations
change settings of an arm, one where one can change alone, and are tried at that arm's best rate. The results
of a study are lines of FOLDER/STUDY/runs.jsonl. Trials that have theirs are not made again.
"""

import dataclasses
import fcntl
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

from bench.experiments.jobs import Job
from bench.experiments.preset import PRESETS, Encoder, Trial
from train import pretrain
from train.engine.plots import WINDOW, trailing_mean
from train.engine.run_folder import flat, to_json, write_atomically

SEEDS = (0, 1, 2)
FINISHED = "finished"
LOSSES = ("loss", "heldout_loss")  # what may decide, lower is better; of anything else higher is


@dataclass(frozen=True)
class Result:
    """What is kept of a trial.

    Args:
        trial: which one.
        outcome: "finished", or how it diverged.
        settings: as `Trial.settings` gave them when it was made.
        losses: mean training losses of `stride` steps each, of pre-training.
        seconds: spent in steps, on a machine that others may have shared.
        evals: step, held-out loss (None if it is not finite), accuracies of the probe, figures of the task.
        held_out: how many images these are of.
        energy: as in the `summary.json` of the script.
        skipped_steps: steps that were left out because their loss was not finite.
        jobs: how many trials there were at a time.
        encoder: what lay beside the encoder: its steps, final training loss, settings and machine; None
            without one.
        machine: header of `bench.record`.
    """

    trial: Trial
    outcome: str
    settings: dict[str, object]
    losses: list[float]
    seconds: float
    evals: list[dict[str, float]]
    held_out: int
    energy: dict[str, object]
    skipped_steps: int
    jobs: int
    encoder: dict[str, object] | None
    machine: dict[str, object]

    @property
    def diverged(self) -> bool:
        """Whether it did not come to its end with finite weights."""
        return self.outcome != FINISHED

    @property
    def stride(self) -> int:
        """Steps whose mean loss is one of `losses`."""
        return self.settings["stride"]

    @cached_property
    def curve(self) -> list[float]:
        """Training loss, mean of the last 50 steps, at every stride-th step."""
        return trailing_mean(self.losses, WINDOW // self.stride)

    @property
    def final(self) -> float:
        """Final training loss, mean of the last 50 steps; infinite if it diverged."""
        return math.inf if self.diverged else self.curve[-1]

    @property
    def decisive(self) -> float:
        """The figure that decides about rates, at the end; the worst there is where it is not finite."""
        decides = self.trial.preset.decides
        value = self.final if decides == "loss" else self.evals[-1][decides]
        worst = math.inf if decides in LOSSES else -math.inf
        return worst if value is None else value

    @property
    def badness(self) -> tuple[float, float]:
        """To compare rates by, lower is better; the held-out loss where the figure is equal."""
        if self.diverged:
            return math.inf, math.inf
        held_out = self.evals[-1]["heldout_loss"]
        sign = 1 if self.trial.preset.decides in LOSSES else -1
        return sign * self.decisive, math.inf if held_out is None else held_out

    def short(self) -> str:
        """How it went, in a few words."""
        if self.diverged:
            return f"diverged: {self.outcome}"
        decides = self.trial.preset.decides
        if decides not in LOSSES:
            return f"{decides} {self.decisive:.2f} %"
        held_out = self.evals[-1]["heldout_loss"]
        return f"final loss {self.final:.4f}" + ("" if held_out is None else f", held out {held_out:.4f}")


def _steps_kept(result: Result) -> int:
    return result.settings["steps"] if result.trial.preset.pretrains else 0


def parse(text: str, study: str) -> Result:
    """Read a line of results.

    Raises:
        ValueError: it is damaged, or not of a trial of this study; the message says which.
    """
    try:
        content = json.loads(text)
        result = Result(**content | {"trial": Trial(**content["trial"])})
        sound = (
            all(isinstance(loss, float | int) and math.isfinite(loss) for loss in result.losses)
            and isinstance(result.outcome, str)
            and WINDOW % result.stride == 0
            and (result.diverged or len(result.losses) * result.stride == _steps_kept(result))
            and all({"step", "heldout_loss"} <= found.keys() for found in result.evals)
            and (result.encoder is None or "settings" in result.encoder)
            and (result.diverged or result.badness is not None)  # has the figure that decides
        )
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        sound = False
    if not sound:
        raise ValueError("is damaged: expected the JSON of a trial of python -m bench study")
    if result.trial.study != study:
        raise ValueError(f"is a trial of {result.trial.study}, expected one of {study}")
    if result.trial.arm not in PRESETS[study].every_arm:
        raise ValueError(f"is of an arm that there is no more: {result.trial.arm}")
    return result


def changes(
    then: Mapping[str, object], now: Mapping[str, object], default: Mapping[str, object]
) -> list[str]:
    """In which settings a trial was made otherwise than it would be now.

    A setting that did not exist when the trial was made was what it is by default.

    Args:
        then: of the trial, by dotted name.
        now: likewise.
        default: likewise.
    """
    then = {name: default[name] for name in now.keys() & default.keys()} | dict(then)
    missing = "not there"
    return [
        f"{name} was {then.get(name, missing)}, is {now.get(name, missing)}"
        for name in sorted(now.keys() | then.keys())
        if now.get(name, missing) != then.get(name, missing)
    ]


def _defaults(script: ModuleType) -> dict[str, object]:
    """Every setting of a script by default, by dotted name."""
    return flat(asdict(script.Config("")))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes that want the same away."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Unusable:
    """A line of results that is not used.

    Args:
        arm: whose it is; None where the line is damaged.
        text: why, with the place.
    """

    arm: str | None
    text: str


class Study:
    """The results of a study on disk.

    Args:
        root: folder of all studies.
        name: of one, a key of `PRESETS`.
        data: settings of all trials, such as where the images are; what is not given is taken to be as each
            result has it.
        images: likewise for the pre-training of encoders.

    Attributes:
        results: by trial, those that are sound and of today's settings.
        unusable: the others.

    Raises:
        ValueError: a result rests on an encoder, and its study does not know the best rate, or the time, yet.
    """

    def __init__(
        self,
        root: Path,
        name: str,
        data: Mapping[str, object] | None = None,
        images: Mapping[str, object] | None = None,
    ) -> None:
        self.root, self.name = root, name
        self.preset = PRESETS[name]
        self.folder = root / name
        self.file = self.folder / "runs.jsonl"
        self.data = dict(data or {})
        self.images = dict(images or {})
        self.results: dict[Trial, Result] = {}
        self.unusable: list[Unusable] = []
        self._parents: dict[str, Study] = {}
        self._encoders: dict[str, Trial] = {}  # with the first seed, by arm
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        for number, line in enumerate(lines, 1):
            place = f"{self.file}:{number}"
            try:
                result = parse(line, name)
            except ValueError as error:
                self.unusable.append(Unusable(None, f"{place} {error}"))
                continue
            found = self.differences(result)
            problem = f"is of other settings: {'; '.join(found)}" if found else ""
            if result.trial in self.results:
                problem = "is there twice"
            if problem:
                text = f"{place}, {result.trial.name}, {problem}"
                self.unusable.append(Unusable(result.trial.arm, text))
            else:
                self.results[result.trial] = result

    def parent(self, name: str) -> "Study":
        """The study that encoders come from, as it was when it was first asked for."""
        if name not in self._parents:
            self._parents[name] = Study(self.root, name, self.images)
        return self._parents[name]

    def encoder_of(self, arm: str, seed: int) -> Trial | None:
        """The trial that leaves the encoder that an arm starts from; None without one.

        Raises:
            ValueError: its study does not know its arm's best rate yet, or its time.
        """
        wanted = self.preset.every_arm[arm].encoder
        if wanted is None:
            return None
        if arm not in self._encoders:  # asked for often, and the same for as long as this process lives
            self._encoders[arm] = self._find_encoder(arm, wanted)
        return dataclasses.replace(self._encoders[arm], seed=seed)

    def _find_encoder(self, arm: str, wanted: Encoder) -> Trial:
        parent = self.parent(wanted.study)
        known = self.images.get("data.source")
        source = f" --source {known}" if parent.preset.needs_source and known else ""
        command = f"python -m bench study {wanted.study}"
        lr = parent.best_lr(wanted.arm, SEEDS[0])
        if lr is None:
            raise ValueError(
                f"{arm}: the best rate of {wanted.arm} is not known; first run {command} "
                f"--arms {wanted.arm}{source}"
            )
        steps = 0 if wanted.length == "none" else None
        if wanted.length == "seconds":
            timing = parent.timing()
            if timing is None or wanted.arm not in timing["arms"]:
                raise ValueError(
                    f"{arm}: the time of a step of {wanted.arm} is not known; first run {command} --time 20"
                    f"{source}"
                )
            steps = round(parent.preset.steps / timing["arms"][wanted.arm]["ratio"]["median"])
        return Trial(wanted.study, wanted.arm, lr, SEEDS[0], steps)

    def differences(self, result: Result) -> list[str]:
        """In which settings, also of pre-training, a trial was made otherwise than now."""
        trial = result.trial
        source = {"data.source": result.settings.get("data.source")}
        now = trial.settings(source | self.data)
        found = changes(result.settings, now, _defaults(self.preset.script))
        encoder = self.encoder_of(trial.arm, trial.seed)
        if (encoder is None) != (result.encoder is None):
            return [*found, f"encoder was {result.encoder}, is {encoder}"]
        if encoder is not None:
            then = result.encoder["settings"]
            now = encoder.settings({"data.source": then.get("data.source")} | self.images)
            found += [f"pre-training: {text}" for text in changes(then, now, _defaults(pretrain))]
        return found

    def sweep(self, arm: str, seed: int) -> list[Trial]:
        """The trials of an arm at each of its rates with a seed."""
        return [Trial(self.name, arm, lr, seed) for lr in self.preset.lrs_of(arm)]

    def best_lr(self, arm: str, seed: int) -> float | None:
        """The best of an arm's rates with this seed; None before all are there, or if all diverged."""
        trials = self.sweep(arm, seed)
        if not trials or not all(trial in self.results for trial in trials):
            return None
        best = min((self.results[trial] for trial in trials), key=lambda result: result.badness)
        return None if best.diverged else best.trial.lr

    def wanted(self, arms: Sequence[str], seeds: Sequence[int], lr: float | None) -> dict[Trial, None]:
        """The trials that are known to be part of the study, in the order in which they are worth it."""
        found: list[Trial] = []
        for arm in arms:
            if lr is None:
                found += self.sweep(arm, seeds[0])
            chosen = lr if lr is not None else self.best_lr(self.preset.tuned(arm), seeds[0])
            if chosen is not None:
                found += [Trial(self.name, arm, chosen, seed) for seed in seeds]
        return dict.fromkeys(found)

    def missing(self, arms: Sequence[str], seeds: Sequence[int], lr: float | None = None) -> list[Trial]:
        """Those of the wanted trials that have no result."""
        return [trial for trial in self.wanted(arms, seeds, lr) if trial not in self.results]

    def waiting(self, arms: Sequence[str], seeds: Sequence[int], lr: float | None) -> list[str]:
        """The arms whose further seeds wait until a best rate is known."""
        return [a for a in arms if lr is None and self.best_lr(self.preset.tuned(a), seeds[0]) is None]

    def jobs(
        self,
        arms: Sequence[str],
        seeds: Sequence[int],
        lr: float | None = None,
        at_a_time: int = 1,
        leaves: bool = False,
    ) -> Iterator[Job]:
        """What is to be done next for the missing trials: their encoders, where these are missing, too.

        Args:
            arms: to make trials of.
            seeds: to make trials with, the first one at each rate.
            lr: in place of the arms' rates.
            at_a_time: how many jobs there are at a time.
            leaves: whether the trials leave their encoders.
        """
        for trial in self.missing(arms, seeds, lr):
            encoder = self.encoder_of(trial.arm, trial.seed)
            parent = None if encoder is None else self.parent(encoder.study)
            if parent is not None and not parent.has_encoder(encoder):
                path = parent.encoder_path(encoder)
                spec = {"trial": asdict(encoder), "data": self.images, "leaves": str(path.resolve())}
                yield Job(f"encoder {encoder.name} of {encoder.study}", path, spec)
                continue
            spec = {
                "trial": asdict(trial),
                "data": self.data,
                "encoder": None if parent is None else str(parent.encoder_path(encoder).resolve()),
                "jobs": at_a_time,
                "leaves": str(self.encoder_path(trial).resolve()) if leaves else None,
            }
            yield Job(trial.name, self.folder / "running" / f"{trial.name}.json", spec)

    def collect(self, job: Job) -> str:
        """Take over what a job left; returns how it went.

        Raises:
            ValueError: it is damaged, or of other settings: somebody has edited them meanwhile.
        """
        trial = Trial(**job.spec["trial"])
        if "encoder" not in job.spec:
            parent = self.parent(trial.study)
            if not parent.has_encoder(trial):
                raise ValueError(f"{job.path} is damaged or of other settings")
            loss = json.loads(job.path.with_suffix(".json").read_text())["final_loss"]
            return "not trained" if loss is None else f"training loss {loss:.4f}"
        try:
            result = parse(job.path.read_text(), self.name)
        except ValueError as error:
            raise ValueError(f"{job.path} {error}") from None
        found = self.differences(result)
        if found:
            raise ValueError(f"{job.path} is of other settings: {'; '.join(found)}")
        if result.trial != trial:
            raise ValueError(f"{job.path} is {result.trial.name}, expected {trial.name}")
        self.add(result)
        job.path.unlink()
        return result.short()

    def take_over(self, jobs: Iterable[Job]) -> None:
        """Take over what earlier jobs left while nobody waited for them; what is not sound is made again."""
        for job in list(jobs):
            if "encoder" in job.spec and job.path.exists():
                try:
                    self.collect(job)
                except ValueError:
                    job.path.unlink()

    def add(self, result: Result) -> None:
        """Keep a result, beside those that other processes keep meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder):
            before = self.file.read_text() if self.file.exists() else ""
            write_atomically(self.file, f"{before}{to_json(asdict(result))}\n")
        self.results[result.trial] = result

    def encoder_path(self, trial: Trial) -> Path:
        """The weights that a trial left, or would leave; what is known of them lies beside them as JSON."""
        return self.folder / "encoders" / f"{trial.name}.safetensors"

    def has_encoder(self, trial: Trial) -> bool:
        """Whether the weights are there, whole and by today's settings."""
        path = self.encoder_path(trial)
        try:
            settings = json.loads(path.with_suffix(".json").read_text())["settings"]
        except (OSError, ValueError, LookupError, TypeError):
            return False
        return path.exists() and settings == trial.settings(self.data)

    def timing(self, data: Mapping[str, object] | None = None) -> dict[str, object] | None:
        """What timing.json holds, the arms whose settings have changed apart in "changed"; None without it.

        Args:
            data: in place of the study's own.

        Raises:
            ValueError: it is damaged.
        """
        path = self.folder / "timing.json"
        if not path.is_file():
            return None
        try:
            timing = json.loads(path.read_text())
            changed = []
            for name, item in timing["arms"].items():
                for key in ("seconds", "ratio"):
                    float(item[key]["low"]), float(item[key]["median"]), float(item[key]["high"])
                known = name in self.preset.every_arm
                source = {"data.source": item["settings"].get("data.source")}
                now = Trial(self.name, name, 1e-3, 0).settings(source | (data or self.data)) if known else {}
                if not known or changes(item["settings"], now, _defaults(self.preset.script)):
                    changed.append(name)
            timing["machine"]["packages"], timing["device"], timing["date"]
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(
                f"{path} is damaged: expected the JSON of python -m bench study --time"
            ) from None
        arms = {name: item for name, item in timing["arms"].items() if name not in changed}
        return timing | {"arms": arms, "changed": changed}
