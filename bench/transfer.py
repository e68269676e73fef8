"""Transfer: what a pre-trained encoder is worth in fine-tuning, against the same network without.

The encoders are those of `python -m bench convergence`, at each arm's best rate there. Its --encoders leaves
them; what is missing is made here by runs of the same settings. They lie beside those runs, in
PRESET/encoders, and are not for git. Every start is fine-tuned by the loop of train/finetune.py or
train/segment.py, with the same seeds and steps: at each of the preset's rates with the first seed, then at
its best one with the others. Each run is a process with one thread that leaves one JSON in
FOLDER/PRESET/runs; runs that have theirs are skipped. The report, report.md with its plot, is written at the
end, and by --report alone.

"Equal seconds" is pre-training for as many steps as take the time of AdamW's: by the ratio of the steps'
times in the convergence matrix's timing.json. Whoever times the steps anew makes these runs anew.

What pre-training itself is worth is the difference to the weights that it starts from: they have other
positions and larger weights than timm's, which fine-tuning inherits.

The exit code is 1 if a run failed, and 2 if nothing could be started.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

import torch
from matplotlib.figure import Figure

from bench import convergence, record
from bench.convergence import FINISHED, Matrix, changes
from bench.curves import ENOUGH, edge_of
from bench.jobs import Job, run_all
from bench.matrix import SEEDS
from bench.options import count
from bench.starts import PRESETS, Preset, Pretraining, Run, Start, Task
from train import pretrain, processes
from train.loop import Diverged
from train.run_folder import RunFolder, flat, to_json, write_atomically

FOLDER = Path(__file__).parent / "reports" / "transfer"
WORKER = (sys.executable, "-m", "bench", "transfer", "--worker")  # what makes a run or an encoder


@dataclass(frozen=True)
class Result:
    """What is kept of a run.

    Args:
        run: which one.
        outcome: "finished", or how it diverged.
        settings: as `Run.settings` gave them when it was made.
        pretraining: what lay beside the encoder: its steps, final training loss, settings and machine; None
            from scratch.
        evals: step, held-out loss (None if it is not finite) and the figures of the preset's task.
        held_out: how many images these are of.
        machine: header of `bench.record`.
    """

    run: Run
    outcome: str
    settings: dict[str, object]
    pretraining: dict[str, object] | None
    evals: list[dict[str, float]]
    held_out: int
    machine: dict[str, object]

    @property
    def quality(self) -> tuple[float, float]:
        """The deciding figure at the end, and the loss where that is equal; higher is better.

        Diverged runs are last.
        """
        if self.outcome != FINISHED:
            return -math.inf, -math.inf
        last = self.evals[-1]
        loss = math.inf if last["heldout_loss"] is None else last["heldout_loss"]
        return last[PRESETS[self.run.preset].task.figures[0]], -loss


def read(path: Path, preset: str) -> Result:
    """Read the file of a run.

    Raises:
        ValueError: it is damaged, or not the file of a run of this preset; the message names it.
    """
    try:
        content = json.loads(path.read_text())
        result = Result(**content | {"run": Run(**content["run"])})
        sound = (result.run.preset, f"{result.run.name}.json") == (preset, path.name)
        sound = sound and result.run.start in PRESETS[preset].starts and len(result.quality) == 2
        sound = sound and (result.pretraining is None or "settings" in result.pretraining)
    except (ValueError, LookupError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ValueError(
            f"{path} is damaged: expected the JSON of a run of python -m bench transfer, under its name"
        )
    return result


class Comparison:
    """The results of a preset on disk.

    Args:
        folder: of the results of all presets.
        preset: name of one.
        data: settings of fine-tuning, such as where the images are.
        images: likewise of pre-training.

    Attributes:
        results: by run, those that are sound and of today's settings.
        unusable: why the others are not used, by file.

    Raises:
        ValueError: the convergence matrix does not know a best rate, or a time, that a result here rests on.
    """

    def __init__(
        self, folder: Path, preset: str, data: Mapping[str, object], images: Mapping[str, object]
    ) -> None:
        self.name = preset
        self.preset: Preset = PRESETS[preset]
        self.folder = folder / preset
        self.data = dict(data)
        self.images = dict(images)
        self.results: dict[Run, Result] = {}
        self.unusable: dict[Path, str] = {}
        self._pretraining: dict[str, Pretraining] = {}  # with the first seed, by start
        self._matrices: dict[str, Matrix] = {}  # by preset
        for path in sorted((self.folder / "runs").glob("*.json")):
            try:
                result = read(path, preset)
            except ValueError as error:
                self.unusable[path] = str(error)
                continue
            found = self.differences(result)
            if found:
                self.unusable[path] = f"{path} is of other settings: {'; '.join(found)}"
            else:
                self.results[result.run] = result

    @property
    def starts(self) -> Mapping[str, Start]:
        """Of the preset."""
        return self.preset.starts

    def matrix(self, preset: str) -> Matrix:
        """The convergence matrix that encoders come from, as it was when it was first asked for."""
        if preset not in self._matrices:
            self._matrices[preset] = Matrix(convergence.FOLDER, preset, self.images)
        return self._matrices[preset]

    def pretraining(self, start: str, seed: int) -> Pretraining | None:
        """The run that an encoder comes from; None from scratch.

        Raises:
            ValueError: the convergence matrix does not know its arm's best rate yet, or its time.
        """
        if self.starts[start].pretraining is None:
            return None
        if start not in self._pretraining:  # asked for often, and the same for as long as this process lives
            self._pretraining[start] = self._find_pretraining(start)
        return replace(self._pretraining[start], seed=seed)

    def _find_pretraining(self, start: str) -> Pretraining:
        (preset, arm), length = self.starts[start].pretraining, self.starts[start].length
        matrix = self.matrix(preset)
        source = f" --source {self.images['data.source']}" if convergence.PRESETS[preset].needs_source else ""
        rate = matrix.best_rate(arm, SEEDS[0])
        if rate is None:
            raise ValueError(
                f"{start}: the best rate of {arm} is not known; first run python -m bench convergence "
                f"--preset {preset} --arms {arm}{source}"
            )
        if length == "seconds":
            timing = matrix.timing(self.images)
            if timing is None or arm not in timing["arms"]:
                raise ValueError(
                    f"{start}: the time of a step of {arm} is not known; first run python -m bench "
                    f"convergence --preset {preset} --time 20{source}"
                )
            ratio = timing["arms"][arm]["ratio"]["median"]
            steps = round(convergence.PRESETS[preset].steps / ratio)
        else:
            steps = {"steps": None, "none": 0}[length]
        return Pretraining(preset, arm, rate, SEEDS[0], steps)

    def differences(self, result: Result) -> list[str]:
        """In which settings of fine-tuning and of pre-training a run was made otherwise than now."""
        run = result.run
        default = flat(asdict(self.preset.task.script.Config("")))
        found = changes(result.settings, run.settings(self.data), default)
        pretraining = self.pretraining(run.start, run.seed)
        if (pretraining is None) != (result.pretraining is None):
            return [*found, f"pretraining was {result.pretraining}, is {pretraining}"]
        if pretraining is not None:
            then, now = result.pretraining["settings"], pretraining.settings(self.images)
            found += [
                f"pretraining: {text}" for text in changes(then, now, flat(asdict(pretrain.Config(""))))
            ]
        return found

    def path(self, run: Run) -> Path:
        """The file of a run."""
        return self.folder / "runs" / f"{run.name}.json"

    def _sweep(self, start: str) -> list[Run]:
        return [Run(self.name, start, rate, SEEDS[0]) for rate in self.preset.rates_of(start)]

    def best_rate(self, start: str) -> float | None:
        """The best of the rates with the first seed; None before all are there, or if all diverged."""
        runs = self._sweep(start)
        if not all(run in self.results for run in runs):
            return None
        best = max((self.results[run] for run in runs), key=lambda result: result.quality)
        return best.run.rate if best.outcome == FINISHED else None

    def missing(self, starts: Sequence[str], seeds: Sequence[int]) -> Iterator[Run]:
        """The runs that are known to be wanted and have no file."""
        for start in starts:
            best = self.best_rate(start)
            if best is None:
                runs = self._sweep(start)
            else:
                runs = [Run(self.name, start, best, seed) for seed in seeds]
            yield from (run for run in runs if not self.path(run).exists())

    def jobs(self, starts: Sequence[str], seeds: Sequence[int]) -> Iterator[Job]:
        """What is to be done next for the missing runs: their encoders, where these are missing, too."""
        for run in self.missing(starts, seeds):
            pretraining = self.pretraining(run.start, run.seed)
            if pretraining is None:
                spec = {"run": asdict(run), "encoder": None, "data": self.data}
                yield Job(run.name, self.path(run), spec)
                continue
            matrix = self.matrix(pretraining.preset)
            encoder = matrix.encoder(pretraining)
            if matrix.has_encoder(pretraining):
                spec = {"run": asdict(run), "encoder": str(encoder.resolve()), "data": self.data}
                yield Job(run.name, self.path(run), spec)
            else:
                spec = {"pretraining": asdict(pretraining), "images": self.images}
                yield Job(f"encoder {run.start}, seed {run.seed}", encoder, spec)

    def collect(self, job: Job) -> str:
        """Take over what a job left.

        Raises:
            ValueError: it is damaged, or of other settings: somebody has edited them meanwhile.
        """
        if "pretraining" in job.spec:
            run = Pretraining(**job.spec["pretraining"])
            if not self.matrix(run.preset).has_encoder(run):
                raise ValueError(f"{job.path} is damaged or of other settings")
            loss = json.loads(job.path.with_suffix(".json").read_text())["final_loss"]
            return "not trained" if loss is None else f"training loss {loss:.4f}"
        result = read(job.path, self.name)
        found = self.differences(result)
        if found:
            raise ValueError(f"{job.path} is of other settings: {'; '.join(found)}")
        self.results[result.run] = result
        if result.outcome != FINISHED:
            return result.outcome
        return f"{self.preset.task.title} {result.quality[0]:.2f} %"


def pretrain_encoder(run: Pretraining, path: Path, images: Mapping[str, object]) -> None:
    """Make a run of pre-training on `images` in this process, and leave its encoder at `path`."""
    with tempfile.TemporaryDirectory() as out:
        trains = run.steps != 0
        config = (run if trains else replace(run, steps=None)).config(out, images)
        config.eval_every = config.steps
        procs = processes.start(config.device)
        loop, evaluator, batches = pretrain.prepare(config, procs, convergence.builder(run))
        evaluator.observes = False
        if trains:
            loop.train(batches)
        convergence.leave_encoder(path, run, images, loop, evaluator)


def tune(run: Run, encoder: str | None, data: Mapping[str, object]) -> Result:
    """Make one run of fine-tuning in this process.

    Args:
        run: which one.
        encoder: file of the encoder; None from scratch.
        data: as for `Run.config`.
    """
    task = PRESETS[run.preset].task
    pretraining = None if encoder is None else json.loads(Path(encoder).with_suffix(".json").read_text())
    with tempfile.TemporaryDirectory() as out:
        config = run.config(out, encoder, data)
        procs = processes.start(config.device)
        loop, evaluator, batches = task.script.prepare(config, procs)
        outcome = FINISHED
        try:
            loop.train(batches)
        except Diverged as error:
            outcome = str(error)
        found = [r for r in RunFolder(out).records() if r["kind"] == "eval"]
    names = ("step", "heldout_loss", *task.figures)
    return Result(
        run=run,
        outcome=outcome,
        settings=run.settings(data),
        pretraining=pretraining,
        evals=[{name: r[name] for name in names} for r in found],
        held_out=len(evaluator.held_out),
        machine=record.header(["transfer", "--preset", run.preset], procs.device, config.precision),
    )


def work(spec: Mapping) -> None:
    """Do what a worker is told, and write its file when it is whole."""
    torch.set_num_threads(1)
    path = Path(spec["path"])
    if "pretraining" in spec:
        pretrain_encoder(Pretraining(**spec["pretraining"]), path, spec["images"])
    else:
        result = tune(Run(**spec["run"]), spec["encoder"], spec["data"])
        write_atomically(path, to_json(asdict(result)) + "\n")


def rows(comparison: Comparison) -> list[dict[str, object]]:
    """What the report says of every start, at its best rate; of one without finished runs its title alone."""
    found = []
    preset = comparison.preset
    figure = preset.task.figures[0]
    for name, start in comparison.starts.items():
        rate = comparison.best_rate(name)
        every = [r for r in comparison.results.values() if (r.run.start, r.run.rate) == (name, rate)]
        runs = sorted((r for r in every if r.outcome == FINISHED), key=lambda result: result.run.seed)
        row: dict[str, object] = {"start": name, "title": start.title}
        if runs:
            encoders = [r.pretraining for r in runs if r.pretraining]
            lost = [e["final_loss"] for e in encoders if e["final_loss"] is not None]
            steps = [e["step"] for e in runs[0].evals]
            rates = preset.rates_of(name)
            sweep = {r: comparison.results[Run(comparison.name, name, r, SEEDS[0])] for r in rates}
            row |= {
                "rate": rate,
                "edge": edge_of(rate, rates),
                "seeds": [r.run.seed for r in runs],
                "diverged": [r.run.seed for r in every if r.outcome != FINISHED],
                "images": encoders[0]["steps"] * encoders[0]["settings"]["batch_size"] if encoders else None,
                "pretraining_loss": mean(lost) if lost else None,
                figure: [r.evals[-1][figure] for r in runs],
                "heldout_loss": [r.evals[-1]["heldout_loss"] for r in runs],
                "curve": {step: mean(r.evals[i][figure] for r in runs) for i, step in enumerate(steps)},
                "sweep": {r: s.quality[0] if s.outcome == FINISHED else None for r, s in sweep.items()},
            }
        found.append(row)
    return found


def table(found: Sequence[Mapping], task: Task) -> str:
    """Rows with figures as Markdown."""
    lines = []
    for row in found:
        last = row[task.figures[0]]
        few = f" (fewer than {ENOUGH})" if len(row["seeds"]) < ENOUGH else ""
        if row["diverged"]:
            few += f", and {len(row['diverged'])} that diverged"
        edge = "" if row["edge"] is None else f", {row['edge']} tried"
        lost = [loss for loss in row["heldout_loss"] if loss is not None]
        lines.append(
            [
                row["title"],
                f"{row['rate']:g}{edge}",
                f"{len(row['seeds'])}{few}",
                "-" if row["images"] is None else f"{row['images']:,}",
                "-" if row["pretraining_loss"] is None else f"{row['pretraining_loss']:.4f}",
                f"{list(row['curve'].values())[1]:.1f}",
                f"{mean(last):.2f} ({min(last):.2f} to {max(last):.2f})",
                f"{mean(lost):.4f}" if lost else "-",
                ", ".join(
                    f"{rate:g}: {'diverged' if value is None else format(value, '.1f')}"
                    for rate, value in row["sweep"].items()
                ),
            ]
        )
    early = list(found[0]["curve"])[1]
    return record.table(
        [
            "start", "rate", "seeds", "images of pre-training", "its loss",
            f"{task.title} after {early} steps, %", f"{task.title} at the end, %", "held-out loss",
            f"{task.title} by rate, first seed",
        ],
        lines,
    )  # fmt: skip


def plot(found: Sequence[Mapping], task: Task, path: Path) -> None:
    """The deciding figure over the steps of fine-tuning, means over seeds."""
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axis = figure.subplots()
    for i, row in enumerate(found):
        style = "-" if row["images"] else "--"
        axis.plot(
            list(row["curve"]), list(row["curve"].values()), f"o{style}", color=f"C{i}", label=row["title"]
        )
    axis.set_xlabel("step of fine-tuning")
    axis.set_ylabel(f"{task.title}, held out, %")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=120)


def report(comparison: Comparison) -> str:
    """Write report.md, report.json and curves.png; returns the text.

    Raises:
        ValueError: no start has all of its rates yet.
    """
    every = rows(comparison)
    found = [row for row in every if "rate" in row]
    if not found:
        raise ValueError(
            f"{comparison.folder} holds no start whose rates are all there and finished; nothing to report"
        )
    results = comparison.results.values()
    encoders = {(r.run.start, r.run.seed): r.pretraining["machine"] for r in results if r.pretraining}
    headers = [*(r.machine for r in results), *encoders.values()]
    about, task = comparison.preset.settings, comparison.preset.task
    parts = [
        f"# Transfer: {comparison.name}",
        f"{about['steps']} steps of {about['batch_size']} images of {about['img_size']} pixels, "
        f"{max(r.held_out for r in results)} held-out images. The protocol is the same for all starts, and "
        f"made for pre-trained ones: a layer has {about['optim.layer_decay']} times the rate of the next. "
        f"Each has its own best rate, by the {task.title} of the first seed on the held-out images that the "
        "table is about: all have that advantage. Mean over seeds, with the lowest and the highest; a best "
        "rate at the edge of those tried is marked. Losses of pre-training compare between runs of one task "
        "alone.",
        table(found, task),
        "![Over the steps](curves.png)",
    ]
    missing = [row["title"] for row in every if "rate" not in row]
    if missing:
        parts.append(f"Without figures, not all run or diverged at every rate: {', '.join(missing)}.")
    parts += ["Machines:", "\n".join(f"- {line}" for line in record.machine_lines(headers))]
    text = "\n\n".join(parts) + "\n"
    plot(found, task, comparison.folder / "curves.png")
    write_atomically(comparison.folder / "report.json", to_json({"starts": every}, indent=1) + "\n")
    write_atomically(comparison.folder / "report.md", text)
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m bench transfer`."""
    parser.add_argument("--preset", choices=PRESETS, default="digits", help="(default: %(default)s)")
    known = "; ".join(f"{name}: {', '.join(preset.starts)}" for name, preset in PRESETS.items())
    parser.add_argument(
        "--starts", nargs="+", metavar="START", help=f"of {known} (default: all of the preset)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="(default: %(default)s)")
    parser.add_argument("--jobs", type=count, help="runs at a time (default: cores; 1 on a GPU)")
    parser.add_argument("--source", help="images to fine-tune on, as --data.source of the preset's script")
    parser.add_argument("--images", help="to pre-train on, as --source of convergence (default: photos)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the results (default: %(default)s)")
    parser.add_argument(
        "--report", action="store_true", help="write the report of what is there and nothing else"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # the one thing that this process is to make


def check_start(preset: Preset, args: argparse.Namespace) -> None:
    """Raise ValueError for what would make all runs fail."""
    if min(args.seeds) < 0:
        raise ValueError(f"--seeds: expected numbers of at least 0, got {min(args.seeds)}")
    if preset.needs_source and args.source is None:
        raise ValueError(f"{args.preset} needs --source, the images to fine-tune on")
    if preset.needs_images and args.images is None:
        raise ValueError(f"{args.preset} needs --images, those to pre-train on")
    if args.source is not None:
        _, _, path = type(preset.task.script.Config("").data)(source=args.source).source.partition(":")
        if path and not args.report and not Path(path).expanduser().is_dir():
            raise ValueError(f"--source: there is no folder {path}")
    if args.images is not None and not args.report:
        try:
            convergence.check_source(args.images)
        except FileNotFoundError as error:
            raise ValueError(str(error).replace("--source", "--images")) from error
    if preset.on_gpu and not args.report and not torch.cuda.is_available():
        raise ValueError(f"{args.preset} needs a GPU, and PyTorch finds none")


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Make what is missing and the report; returns the exit code."""
    if args.worker is not None:
        work(json.loads(args.worker))
        return 0
    failed: list[str] = []
    try:
        preset = PRESETS[args.preset]
        check_start(preset, args)
        comparison = Comparison(
            args.folder,
            args.preset,
            {} if args.source is None else {"data.source": args.source},
            {"data.source": args.images or "photos"},
        )
        starts = list(comparison.starts) if args.starts is None else args.starts
        unknown = [name for name in starts if name not in comparison.starts]
        if unknown:
            raise ValueError(f"--starts: expected some of {', '.join(comparison.starts)}, got {unknown[0]}")
        wrong = [t for path, t in comparison.unusable.items() if path.stem.partition("_lr")[0] in starts]
        if wrong:
            wrong.append("move or delete these files, and their runs are made again")
            raise ValueError("\n".join(wrong))
        if not args.report:
            for start in starts:
                comparison.pretraining(start, SEEDS[0])  # raises now
            jobs = args.jobs or (1 if preset.on_gpu else os.cpu_count() or 1)
            failed = run_all(WORKER, lambda: comparison.jobs(starts, args.seeds), comparison.collect, jobs)
        print(report(comparison))
    except ValueError as error:
        record.progress(f"transfer: {error}")
        return 1 if failed else 2
    except KeyboardInterrupt:
        record.progress("transfer: stopped; what was cut off is made again by the same command")
        return 130
    if failed:
        record.progress(f"transfer: {len(failed)} runs failed: {', '.join(failed)}")
    return 1 if failed else 0
