"""Convergence: how soon each way to train reaches the loss that AdamW ends at.

The matrix of `bench/matrix.py` is run, as many runs at a time as there are cores, or one on a GPU (--jobs).
Each is a process with one thread that trains by `train/pretrain.py`'s own loop and then leaves one JSON file
in FOLDER/PRESET/runs; NAME.log beside it shows how far it is, and stays if it fails. Runs that have their
file are skipped: the matrix can be filled over days, Ctrl-C stops it, and what is there can be reported at
any time. --list tells what is there. --time measures the time of a step of every arm, interleaved in one
process; let the machine do nothing else then. `python -m bench curves FOLDER/PRESET` makes the report.

The exit code is 1 if a run failed, and 2 if nothing could be started.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean

import torch
from timm.optim.kron import Kron, precond_update_prob_schedule
from torch import nn

from bench import measure, probe, record
from bench.baselines import PublishedRule
from bench.jobs import Job, run_all
from bench.matrix import ABLATIONS, ARMS, PRESETS, SEEDS, Preset, Run, every_arm, tuned
from bench.options import count
from train import pretrain, processes
from train.data import DataConfig
from train.loop import Diverged, Loop, moved
from train.plots import WINDOW, trailing_mean
from train.pretrain import Config
from train.run import whole_weights
from train.run_folder import RunFolder, flat, to_json, write_atomically

FOLDER = Path(__file__).parent / "reports" / "convergence"
WORKER = (sys.executable, "-m", "bench", "convergence", "--worker")  # what makes a run
FINISHED = "finished"
PROBES = {"probe": "Linear probe", "knn": "Nearest neighbours"}  # accuracies that evaluations have


def rate(text: str) -> float:
    """A learning rate, for argparse."""
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m bench convergence`."""
    parser.add_argument("--preset", choices=PRESETS, default="photos", help="(default: %(default)s)")
    parser.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        help=f"of {', '.join(ARMS)} (default: all of them), or ablations: {', '.join(ABLATIONS)}",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="(default: %(default)s)")
    parser.add_argument("--rate", type=rate, help="run all arms at this rate alone")
    parser.add_argument("--jobs", type=count, help="runs at a time (default: cores; 1 on a GPU)")
    parser.add_argument("--source", help="images, as --data.source of train/pretrain.py")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the results (default: %(default)s)")
    parser.add_argument(
        "--encoders", action="store_true", help="leave the encoders in FOLDER/PRESET/encoders for transfer"
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--list", action="store_true", help="tell which runs are there and which are not")
    action.add_argument(
        "--time", type=count, metavar="ROUNDS", help="time the arms' steps and do nothing else"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # the one run that this process is to make


@dataclass(frozen=True)
class Result:
    """What is kept of a run.

    Args:
        run: which one.
        outcome: "finished", or how it diverged.
        settings: as `Run.settings` gave them when it was made.
        losses: mean training losses of `stride` steps each.
        seconds: spent in steps, on a machine that other runs may have shared.
        evals: step, held-out loss (None if it is not finite) and accuracies of the probe.
        energy: as in the `summary.json` of `train/pretrain.py`.
        skipped_steps: steps that were left out because their loss was not finite.
        jobs: how many runs there were at a time.
        machine: header of `bench.record`.
    """

    run: Run
    outcome: str
    settings: dict[str, object]
    losses: list[float]
    seconds: float
    evals: list[dict[str, float]]
    energy: dict[str, object]
    skipped_steps: int
    jobs: int
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


def read(path: Path, preset: str) -> Result:
    """Read the file of a run.

    Raises:
        ValueError: it is damaged, or not the file of a run of this preset; the message names it.
    """
    try:
        content = json.loads(path.read_text())
        result = Result(**content | {"run": Run(**content["run"])})
        sound = (
            all(isinstance(loss, float | int) and math.isfinite(loss) for loss in result.losses)
            and isinstance(result.outcome, str)
            and WINDOW % result.stride == 0
            and (result.diverged or len(result.losses) * result.stride == result.settings["steps"])
            and all({"step", "heldout_loss"} <= found.keys() for found in result.evals)
        )
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        sound = False
    if not sound:
        raise ValueError(f"{path} is damaged: expected the JSON of a run of python -m bench convergence")
    if (result.run.preset, f"{result.run.name}.json") != (preset, path.name):
        raise ValueError(
            f"{path} holds another run: {result.run.name} of {result.run.preset}, expected one of {preset} "
            "under its own name"
        )
    if result.run.arm not in every_arm():
        raise ValueError(f"{path} is of an arm that there is no more: {result.run.arm}")
    return result


def changes(
    then: Mapping[str, object], now: Mapping[str, object], default: Mapping[str, object]
) -> list[str]:
    """In which settings a run was made otherwise than it would be now.

    A setting that did not exist when the run was made was what it is by default.

    Args:
        then: of the run, by dotted name.
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


def differences(result: Result, data: Mapping[str, object]) -> list[str]:
    """In which settings a run was made otherwise than the matrix says now, as `changes` tells them.

    Args:
        result: of the run.
        data: as for `Run.config`; without a source, the run's own is right.
    """
    source = {"data.source": result.settings.get("data.source")}
    now = result.run.settings(source | dict(data))
    return changes(result.settings, now, _defaults())


def _defaults() -> dict[str, object]:
    """Every setting by default, by dotted name."""
    return flat(asdict(Config("")))


def best(sweep: Iterable[Result]) -> Result | None:
    """The run with the lowest final loss; None if all have diverged."""
    return min((r for r in sweep if not r.diverged), key=lambda r: r.final, default=None)


class Matrix:
    """The results of a preset on disk.

    Args:
        folder: of the results of all presets.
        preset: name of one.
        data: as for `Run.config`.

    Attributes:
        results: by run, those that are sound and of the settings that the matrix has now.
        unusable: why the others are not used, by file.
    """

    def __init__(self, folder: Path, preset: str, data: Mapping[str, object]) -> None:
        self.preset = preset
        self.folder = folder / preset
        self.runs = self.folder / "runs"
        self.data = dict(data)
        self.results: dict[Run, Result] = {}
        self.unusable: dict[Path, str] = {}
        for path in sorted(self.runs.glob("*.json")):
            try:
                result = read(path, preset)
            except ValueError as error:
                self.unusable[path] = str(error)
                continue
            found = differences(result, self.data)
            if found:
                self.unusable[path] = f"{path} is of other settings: {'; '.join(found)}"
            else:
                self.results[result.run] = result

    def path(self, run: Run) -> Path:
        """The file of a run."""
        return self.runs / f"{run.name}.json"

    def encoder(self, run: Run) -> Path:
        """The weights that a run left, or would leave; what is known of them lies beside them as JSON."""
        return self.folder / "encoders" / f"{run.name}.safetensors"

    def has_encoder(self, run: Run) -> bool:
        """Whether the weights are there, whole and by today's settings."""
        path = self.encoder(run)
        try:
            settings = json.loads(path.with_suffix(".json").read_text())["settings"]
        except (OSError, ValueError, LookupError, TypeError):
            return False
        return path.exists() and settings == run.settings(self.data)

    def best_rate(self, arm: str, seed: int) -> float | None:
        """The best of an arm's rates with this seed; None before all are there, or if all diverged."""
        runs = [Run(self.preset, arm, rate, seed) for rate in PRESETS[self.preset].rates_of(arm)]
        if not all(run in self.results for run in runs):
            return None
        found = best(self.results[run] for run in runs)
        return None if found is None else found.run.rate

    def timing(self, data: Mapping[str, object]) -> dict[str, object] | None:
        """What timing.json holds, the arms whose settings have changed apart in "changed"; None without it.

        Args:
            data: as for `Run.config`.

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
                run = Run(self.preset, name, 1e-3, 0) if name in every_arm() else None
                if run is None or changes(item["settings"], run.settings(data), _defaults()):
                    changed.append(name)
            record.machine_line(timing)
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(
                f"{path} is damaged: expected the JSON of python -m bench convergence --time"
            ) from None
        arms = {name: item for name, item in timing["arms"].items() if name not in changed}
        return timing | {"arms": arms, "changed": changed}

    def wanted(self, arms: Sequence[str], seeds: Sequence[int], rate: float | None) -> dict[Run, None]:
        """The runs that are known to be part of the matrix, in the order in which they are worth it."""
        found: list[Run] = []
        for arm in arms:
            if rate is None and arm in ARMS:
                found += [Run(self.preset, arm, r, seeds[0]) for r in PRESETS[self.preset].rates_of(arm)]
            chosen = rate if rate is not None else self.best_rate(tuned(arm), seeds[0])
            if chosen is not None:
                found += [Run(self.preset, arm, chosen, seed) for seed in seeds]
        return dict.fromkeys(found)

    def missing(self, arms: Sequence[str], seeds: Sequence[int], rate: float | None) -> Iterator[Run]:
        """Those of the wanted runs that have no file."""
        return (run for run in self.wanted(arms, seeds, rate) if not self.path(run).exists())

    def waiting(self, arms: Sequence[str], seeds: Sequence[int], rate: float | None) -> list[str]:
        """The arms whose further seeds wait until a best rate is known."""
        return [a for a in arms if rate is None and self.best_rate(tuned(a), seeds[0]) is None]


def build_published(config: pretrain.Config, model: nn.Module) -> tuple:
    """As `train.pretrain.build_optimizers`, with R by the published rule."""
    decor = config.decor
    rule = PublishedRule(model, decor.sites, decor.accepts, decor.eta, decor.kappa)
    optimizer, _ = pretrain.build_optimizers(config, model)
    optimizer.register_step_post_hook(lambda *_: rule.step())
    return optimizer, rule


def builder(run: Run) -> Callable:
    """What makes the optimizers of a run."""
    return build_published if every_arm()[run.arm].published else pretrain.build_optimizers


def losses(records: Iterable[Mapping]) -> list[float]:
    """The training loss of every step in a log; a skipped step has that of the step before it, or the first.

    Args:
        records: as `train.run_folder.RunFolder.records` gives them.
    """
    found: list[float | None] = []
    for step in records:
        if step["kind"] in ("step", "skip"):
            found.append(step["loss"] if step["kind"] == "step" else (found or [None])[-1])
    first = next((loss for loss in found if loss is not None), None)
    return [] if first is None else [first if loss is None else loss for loss in found]


def in_strides(values: Sequence[float], stride: int) -> list[float]:
    """Means of `stride` values each, rounded; what does not fill a stride is left out."""
    whole = range(0, len(values) - stride + 1, stride)
    return [round(sum(values[i : i + stride]) / stride, 5) for i in whole]


def leave_encoder(
    path: Path, run: Run, data: Mapping[str, object], loop: Loop, evaluator: pretrain.Evaluator
) -> None:
    """Write the encoder of a run of pre-training, as it is now.

    What is known of it lies beside it as JSON, which is there only if the weights are.

    Args:
        path: of the weights.
        run: which one.
        data: as for `Run.config`.
        loop: of the run.
        evaluator: likewise.
    """
    stock = pretrain.fused_model(loop.config, loop.ranks, whole_weights(loop.model))
    lost = losses(loop.run.records())[-WINDOW:]
    about = {
        "steps": loop.step,
        "final_loss": mean(lost) if lost else None,
        "settings": run.settings(data),
        "machine": record.header(["convergence"], loop.processes.device, loop.config.precision),
    }
    about_path = path.with_suffix(".json")
    about_path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, evaluator.task.exports(stock)["encoder.safetensors"])
    write_atomically(about_path, to_json(about) + "\n")


def probe_of(preset: Preset, loop: Loop, evaluator: pretrain.Evaluator) -> probe.Probe | None:
    """The labelled images that the encoder of a run is asked for; None for no probe.

    Raises:
        ValueError: the source has no classes.
    """
    if not preset.probe:
        return None
    size = loop.model.patch_embed.img_size
    kind, _, path = loop.config.data.source.partition(":")
    if kind == "photos":
        return probe.of_digits(preset.probe, size)
    if kind != "folder":
        raise ValueError(f"{path}: expected a folder with a sub-folder a class, for the probe")
    names = evaluator.held_out.images.names
    return probe.of_folder(Path(path).expanduser(), loop.files, names, preset.probe, size)


def train(run: Run, data: Mapping[str, object], jobs: int, encoder: Path | None = None) -> Result:
    """Make one run in this process.

    Args:
        run: which one.
        data: as for `Run.config`.
        jobs: how many runs there are at a time.
        encoder: where its encoder is left.

    Raises:
        train.loop.Interrupted: SIGTERM or Ctrl-C.
    """
    torch.set_num_threads(1)
    preset = PRESETS[run.preset]
    with tempfile.TemporaryDirectory() as out:
        config = run.config(out, data)
        procs = processes.start(config.device)
        loop, evaluator, batches = pretrain.prepare(config, procs, builder(run))
        evaluator.observes = False
        asks = probe_of(preset, loop, evaluator)

        def evaluate() -> dict[str, float]:
            found = {"heldout_loss": evaluator()["heldout_loss"]}
            return found | ({} if asks is None else asks(loop.model))

        loop.evaluate = evaluate
        outcome = FINISHED
        try:
            loop.train(batches)
        except Diverged as error:
            outcome = str(error)
        if encoder is not None and outcome == FINISHED:
            leave_encoder(encoder, run, data, loop, evaluator)
        records = list(RunFolder(out).records())
    return Result(
        run=run,
        outcome=outcome,
        settings=run.settings(data),
        losses=in_strides(losses(records), preset.stride),
        seconds=loop.seconds,
        evals=[
            {name: r[name] for name in ("step", "heldout_loss", *PROBES) if name in r}
            for r in records
            if r["kind"] == "eval"
        ],
        energy=loop.energy.summary(None),
        skipped_steps=loop.skipped,
        jobs=jobs,
        machine=record.header(["convergence", "--preset", run.preset], procs.device, config.precision),
    )


def work(spec: Mapping) -> None:
    """Make the run of a worker's specification, and write its file when it is whole."""
    encoder = None if spec["encoder"] is None else Path(spec["encoder"])
    result = train(Run(**spec["run"]), spec["data"], spec["jobs"], encoder)
    write_atomically(Path(spec["path"]), to_json(asdict(result)) + "\n")


def fill(matrix: Matrix, args: argparse.Namespace, arms: Sequence[str]) -> list[str]:
    """Make all missing runs; returns the names of those that failed."""

    def missing() -> Iterator[Job]:
        for run in matrix.missing(arms, args.seeds, args.rate):
            encoder = str(matrix.encoder(run).resolve()) if args.encoders else None
            spec = {"run": asdict(run), "data": matrix.data, "jobs": args.jobs, "encoder": encoder}
            yield Job(run.name, matrix.path(run), spec)

    def collect(job: Job) -> str:
        result = read(job.path, matrix.preset)
        found = differences(result, matrix.data)
        if found:  # somebody has edited the matrix while it was filled
            raise ValueError(f"{job.path} is of other settings: {'; '.join(found)}")
        matrix.results[result.run] = result
        return f"diverged: {result.outcome}" if result.diverged else f"final loss {result.final:.4f}"

    return run_all(WORKER, missing, collect, args.jobs)


def listing(matrix: Matrix, args: argparse.Namespace, arms: Sequence[str]) -> str:
    """What is there of the runs that are asked for, and what is missing."""
    lines, done = [], 0
    wanted = matrix.wanted(arms, args.seeds, args.rate)
    for run in wanted:
        fate = "missing"
        if run in matrix.results:
            result = matrix.results[run]
            done += 1
            fate = "diverged" if result.diverged else f"done, final loss {result.final:.4f}"
        elif matrix.path(run) in matrix.unusable:
            fate = "not usable"
        lines.append(f"{run.name}: {fate}")
    lines.append(f"{done} of {len(wanted)} runs are there")
    waiting = matrix.waiting(arms, args.seeds, args.rate)
    if waiting:
        lines.append(f"further runs wait until a best rate is known: {', '.join(waiting)}")
    return "\n".join([*lines, *matrix.unusable.values()])


def _cadence(loop: Loop, steps: int) -> int:
    """Steps after which the work of a step repeats."""
    if isinstance(loop.optimizer, Kron):
        # It updates its preconditioner ever more seldom. Timed is its mean over the run, evenly spread.
        updates, waited = 0, 0
        for step in range(steps):
            waited += 1
            if waited >= 1 / precond_update_prob_schedule(step):
                updates, waited = updates + 1, 0
        every = round(steps / updates)
        for group in loop.optimizer.param_groups:
            group["preconditioner_update_probability"] = 1 / (every - 0.5)  # it compares 1/p with a count
        return every
    decor = loop.config.decor
    return decor.every if decor.enable else 1


def time_steps(matrix: Matrix, arms: Sequence[str], rounds: int) -> dict[str, object]:
    """Seconds of a step of every arm, interleaved, and their ratios to the first arm's within a round.

    A step is forward, backward and the optimizers', without the loading of data. Arms that do not do the same
    at every step are timed over whole turns.
    """
    timed = []
    for name in arms:
        record.progress(f"{name}: building")
        run = Run(matrix.preset, name, 1e-3, 0)
        with tempfile.TemporaryDirectory() as out:
            config = run.config(out, matrix.data)
            procs = processes.start(config.device)
            loop, _, batches = pretrain.prepare(config, procs, builder(run))
            batch = next(batches)
        every = _cadence(loop, config.steps)
        timed.append((_step(loop, batch), every * math.ceil(4 / every)))
    times = []
    for turn in range(1 + rounds):
        record.progress(f"round {turn} of {rounds}{'' if turn else ', to warm up'}")
        times.append(
            measure.rotated_round(timed, turn, lambda arm: measure.seconds(arm[0], procs.device, arm[1]))
        )
    found = {}
    by_arm = list(zip(*times[1:], strict=True))
    for name, seconds in zip(arms, by_arm, strict=True):
        found[name] = {
            "seconds": measure.quartiles(seconds)._asdict(),
            "ratio": measure.paired_ratio(seconds, by_arm[0])._asdict(),
            "settings": Run(matrix.preset, name, 1e-3, 0).settings(matrix.data),
        }
    return found


def _step(loop: Loop, batch: dict) -> Callable[[], None]:
    device = loop.processes.device
    batch = moved(batch, device)

    def step() -> None:
        with torch.autocast(device.type, loop.autocast, enabled=loop.autocast is not None):
            loss = loop.loss(loop.model, batch)
        loss.backward()
        loop.optimizer.step()
        loop.optimizer.zero_grad(set_to_none=True)

    return step


def _write_timing(matrix: Matrix, arms: Sequence[str], rounds: int) -> None:
    measure.keep_freed_memory()
    arms = ["adamw", *(name for name in arms if name != "adamw")]
    config = Run(matrix.preset, "adamw", 1e-3, 0).config("", matrix.data)
    # As for the runs, without the folder, which is of this machine alone.
    command = ["convergence", "--preset", matrix.preset, "--arms", *arms, "--time", str(rounds)]
    head = record.header(command, torch.device(config.device), config.precision)
    timing = head | {"arms": time_steps(matrix, arms, rounds)}
    matrix.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(matrix.folder / "timing.json", json.dumps(timing, indent=1) + "\n")


def choose_arms(asked: Sequence[str] | None) -> list[str]:
    """The arms that names of arms and of families of ablations stand for; None for the main arms.

    Raises:
        ValueError: there is none of a name.
    """
    arms = [name for a in (ARMS if asked is None else asked) for name in ABLATIONS.get(a, [a])]
    unknown = [name for name in arms if name not in every_arm()]
    if unknown:
        known = ", ".join([*every_arm(), *ABLATIONS])
        raise ValueError(f"--arms: expected some of {known}, got {', '.join(unknown)}")
    return list(dict.fromkeys(arms))


def check_source(source: str | None) -> None:
    """Raise ValueError or FileNotFoundError for images that no run would find."""
    if source is None:
        return
    DataConfig(source)
    kind, _, path = source.partition(":")
    if kind == "folder" and not Path(path).expanduser().is_dir():
        raise FileNotFoundError(f"--source: there is no folder {path}")


def check_start(matrix: Matrix, args: argparse.Namespace, arms: Sequence[str]) -> None:
    """Raise ValueError for what would make all runs fail, or mix runs that differ."""
    preset = PRESETS[matrix.preset]
    if min(args.seeds) < 0:
        raise ValueError(f"--seeds: expected numbers of at least 0, got {min(args.seeds)}")
    if preset.needs_source and args.source is None:
        raise ValueError(f"{matrix.preset} needs --source folder:PATH or --source wds:PATTERN")
    if preset.on_gpu and not torch.cuda.is_available():
        raise ValueError(f"{matrix.preset} needs a GPU, and PyTorch finds none")
    if args.time is not None:
        return
    unusable = [text for path, text in matrix.unusable.items() if path.stem.partition("_lr")[0] in arms]
    if unusable:
        raise ValueError("\n".join([*unusable, "move or delete these files, and their runs are made again"]))
    ablations = [arm for arm in arms if arm not in ARMS]
    waiting = matrix.waiting(ablations, args.seeds, args.rate)
    unknown = sorted({tuned(arm) for arm in waiting} - set(arms))
    if unknown:
        raise ValueError(
            f"{', '.join(waiting)}: ablations run at the best rate of {' and '.join(unknown)}, which is not "
            f"known yet; add {' '.join(unknown)} to --arms, or give a --rate"
        )


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Fill the matrix, list it, or time its arms; returns the exit code."""
    if args.worker is not None:
        work(json.loads(args.worker))
        return 0
    preset = PRESETS[args.preset]
    if args.jobs is None:
        args.jobs = 1 if preset.on_gpu else os.cpu_count() or 1
    try:
        arms = choose_arms(args.arms)
        check_source(args.source)
        source = args.source if args.source or preset.needs_source else "photos"
        matrix = Matrix(args.folder, args.preset, {} if source is None else {"data.source": source})
        if args.list:
            print(listing(matrix, args, arms))
            return 0
        check_start(matrix, args, arms)
        if args.time is not None:
            _write_timing(matrix, arms, args.time)
            return 0
    except (ValueError, FileNotFoundError) as error:
        record.progress(f"convergence: {error}")
        return 2
    try:
        failed = fill(matrix, args, arms)
    except KeyboardInterrupt:
        record.progress("convergence: stopped; runs that were cut off are made again by the same command")
        return 130
    if failed:
        record.progress(f"convergence: {len(failed)} runs failed: {', '.join(failed)}")
    return 1 if failed else 0
