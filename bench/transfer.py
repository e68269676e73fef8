"""Transfer: what a pre-trained encoder is worth in fine-tuning, against the same network from scratch.

The encoders are those of `python -m bench convergence`: runs of the same settings, at each arm's best rate
there, made again here for their weights, which lie in FOLDER/PRESET/encoders and are not for git. Every start
is fine-tuned by train/finetune.py's own loop, with the same seeds and steps: at each of the preset's rates
with the first seed, then at its best one with the others. Each run is a process with one thread that leaves
one JSON in FOLDER/PRESET/runs; runs that have theirs are skipped. The report, report.md with its plot, is
written at the end, and by --report alone.

The exit code is 1 if a run failed, and 2 if nothing could be started.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean

import torch
from matplotlib.figure import Figure

from bench import convergence, record
from bench.convergence import Matrix
from bench.curves import ENOUGH
from bench.jobs import Job, run_all
from bench.matrix import SEEDS, assign
from bench.matrix import Run as Pretraining
from bench.options import count
from train import finetune, pretrain, processes
from train.plots import WINDOW
from train.run import whole_weights
from train.run_folder import NEUTRAL, RunFolder, flat, to_json, write_atomically

FOLDER = Path(__file__).parent / "reports" / "transfer"
WORKER = (sys.executable, "-m", "bench", "transfer", "--worker")  # what makes a run or an encoder
IMAGES = {"data.source": "photos"}  # of the pre-training


@dataclass(frozen=True)
class Start:
    """Where fine-tuning starts.

    Args:
        title: in tables.
        settings: of `train.finetune.Config`, by dotted name: the read-out, and from scratch the network.
        pretraining: preset and arm of the convergence matrix; None for scratch.
    """

    title: str
    settings: Mapping[str, object]
    pretraining: tuple[str, str] | None = None


@dataclass(frozen=True)
class Preset:
    """What all runs of a comparison share.

    Args:
        settings: of `train.finetune.Config`, by dotted name.
        starts: by name.
        rates: peak learning rates to try.
        evaluations: how often a run is evaluated, at equal intervals.
    """

    settings: Mapping[str, object]
    starts: Mapping[str, Start]
    rates: tuple[float, ...]
    evaluations: int = 5


_SIZES = {"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}  # of the convergence presets
_MAE = {"readout": "mean"}
_DARL = {"readout": "last"}
_DIGITS = {
    "data.source": "digits",
    "data.crop_scale": (0.7, 1.0),
    "data.crop_pct": 1.0,
    # A mirrored 2 is no digit, and a box of noise hides what 8 x 8 pixels tell.
    "augment.policy": None,
    "augment.flip": 0.0,
    "augment.erase": 0.0,
    "augment.mixup": 0.0,
    "augment.cutmix": 0.0,
    "img_size": 32,
    "drop_path": 0.0,
    "steps": 225,  # 5 epochs
    "batch_size": 32,
    "optim.warmup_steps": 45,
    "optim.layer_decay": 0.75,
    "device": "cpu",
    "precision": "fp32",
}
PRESETS = {
    "digits": Preset(
        _DIGITS,
        {
            "mae-scratch": Start(
                "MAE's encoder, from scratch", _MAE | {"model": "mae_vit_tiny", "model_args": _SIZES}
            ),
            "mae": Start("MAE", _MAE, ("photos", "adamw")),
            "mae-dbp": Start("MAE with DBP", _MAE, ("photos", "dbp")),
            "darl-scratch": Start(
                "DARL's encoder, from scratch", _DARL | {"model": "darl_vit_tiny", "model_args": _SIZES}
            ),
            "darl": Start("DARL", _DARL, ("darl", "adamw")),
            "darl-dbp": Start("DARL with DBP", _DARL, ("darl", "dbp")),
        },
        (1e-3, 3e-3, 6e-3),
    )
}


@dataclass(frozen=True)
class Run:
    """One run of fine-tuning."""

    preset: str
    start: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its JSON file."""
        return f"{self.start}_lr{self.rate:g}_seed{self.seed}"

    def config(self, out: str, encoder: str | None) -> finetune.Config:
        """What `train/finetune.py` is started with.

        Args:
            out: folder of the run.
            encoder: file of the encoder; None from scratch.

        Raises:
            ValueError: one of the settings has no such name.
        """
        preset = PRESETS[self.preset]
        config = finetune.Config(out)
        steps = preset.settings["steps"]
        common = {
            "encoder": encoder,
            "optim.lr": self.rate,
            "seed": self.seed,
            "eval_every": max(1, steps // preset.evaluations),
            "checkpoint_every": steps,
        }
        for name, value in (preset.settings | common | preset.starts[self.start].settings).items():
            assign(config, name, value)
        return config


@dataclass(frozen=True)
class Result:
    """What is kept of a run.

    Args:
        run: which one.
        settings: as `Comparison.settings` gave them when it was made.
        pretraining: steps and final training loss of the encoder; None from scratch.
        evals: step, held-out loss, top-1 and top-5 accuracy.
        machine: header of `bench.record`.
    """

    run: Run
    settings: dict[str, object]
    pretraining: dict[str, float] | None
    evals: list[dict[str, float]]
    machine: dict[str, object]

    @property
    def quality(self) -> tuple[float, float]:
        """Accuracy at the end, and the loss where that is equal; higher is better."""
        return self.evals[-1]["top1"], -self.evals[-1]["heldout_loss"]


@dataclass
class Comparison:
    """The results of a preset on disk.

    Args:
        folder: of the results of all presets.
        preset: name of one.

    Attributes:
        results: by run, those that are sound and of today's settings.
        unusable: why the others are not used.
    """

    folder: Path
    preset: str
    results: dict[Run, Result] = field(default_factory=dict)
    unusable: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder = self.folder / self.preset
        self._rates: dict[tuple[str, str], float] = {}
        for path in sorted((self.folder / "runs").glob("*.json")):
            try:
                self.take(path)
            except ValueError as error:
                self.unusable.append(str(error))

    @property
    def starts(self) -> Mapping[str, Start]:
        """Of the preset."""
        return PRESETS[self.preset].starts

    def pretraining(self, start: str, seed: int) -> Pretraining | None:
        """The run that an encoder comes from; None from scratch.

        Raises:
            ValueError: the convergence matrix does not know its arm's best rate yet.
        """
        asked = self.starts[start].pretraining
        if asked is None:
            return None
        if asked not in self._rates:
            preset, arm = asked
            rate = Matrix(convergence.FOLDER, preset, IMAGES).best_rate(arm, SEEDS[0])
            if rate is None:
                raise ValueError(
                    f"{start}: the best rate of {arm} is not known; first run python -m bench convergence "
                    f"--preset {preset} --arms {arm}"
                )
            self._rates[asked] = rate
        return Pretraining(*asked, self._rates[asked], seed)

    def settings(self, run: Run) -> dict[str, object]:
        """All that a run's numbers depend on, as JSON gives it back.

        Raises:
            ValueError: as `pretraining`.
        """
        settings = flat(asdict(run.config("", None)))
        settings = {k: v for k, v in settings.items() if k not in NEUTRAL or k == "eval_every"}
        pretraining = self.pretraining(run.start, run.seed)
        settings["pretraining"] = None if pretraining is None else pretraining.settings(IMAGES)
        return json.loads(json.dumps(settings))

    def path(self, run: Run) -> Path:
        """The file of a run."""
        return self.folder / "runs" / f"{run.name}.json"

    def encoder(self, start: str, seed: int) -> Path:
        """The weights that a start has with a seed; what is known of them lies beside them as JSON."""
        return self.folder / "encoders" / f"{start}_seed{seed}.safetensors"

    def has_encoder(self, start: str, seed: int) -> bool:
        """Whether the weights are there, by today's settings."""
        path = self.encoder(start, seed)
        try:
            about = json.loads(path.with_suffix(".json").read_text())
        except (OSError, ValueError):
            return False
        return path.exists() and about["settings"] == self.pretraining(start, seed).settings(IMAGES)

    def take(self, path: Path) -> Result:
        """Read the file of a run.

        Raises:
            ValueError: it is damaged, or of another run or other settings; the message names it.
        """
        try:
            content = json.loads(path.read_text())
            result = Result(**content | {"run": Run(**content["run"])})
            sound = (result.run.preset, f"{result.run.name}.json") == (self.preset, path.name)
            sound = sound and result.run.start in self.starts and len(result.quality) == 2
        except (ValueError, LookupError, TypeError):
            sound = False
        if not sound:
            raise ValueError(
                f"{path} is damaged: expected the JSON of a run of python -m bench transfer, under its name"
            )
        now = self.settings(result.run)
        names = [k for k in now | result.settings if now.get(k) != result.settings.get(k)]
        if names:
            raise ValueError(f"{path} is of other settings: {', '.join(sorted(names))}")
        self.results[result.run] = result
        return result

    def best_rate(self, start: str) -> float | None:
        """The best of the rates with the first seed; None before all are there."""
        runs = [Run(self.preset, start, rate, SEEDS[0]) for rate in PRESETS[self.preset].rates]
        if not all(run in self.results for run in runs):
            return None
        return max(runs, key=lambda run: self.results[run].quality).rate

    def missing(self, starts: Sequence[str], seeds: Sequence[int]) -> Iterator[Run]:
        """The runs that are known to be wanted and have no file."""
        for start in starts:
            best = self.best_rate(start)
            if best is None:
                runs = [Run(self.preset, start, rate, SEEDS[0]) for rate in PRESETS[self.preset].rates]
            else:
                runs = [Run(self.preset, start, best, seed) for seed in seeds]
            yield from (run for run in runs if not self.path(run).exists())

    def jobs(self, starts: Sequence[str], seeds: Sequence[int]) -> Iterator[Job]:
        """What is to be done next for the missing runs: their encoders, where these are missing, too."""
        for run in self.missing(starts, seeds):
            pretraining = self.pretraining(run.start, run.seed)
            encoder = self.encoder(run.start, run.seed)
            if pretraining is not None and not self.has_encoder(run.start, run.seed):
                spec = {"pretraining": asdict(pretraining)}
                yield Job(f"encoder {run.start}, seed {run.seed}", encoder, spec)
            else:
                known = None if pretraining is None else str(encoder.resolve())
                spec = {"run": asdict(run), "encoder": known, "settings": self.settings(run)}
                yield Job(run.name, self.path(run), spec)

    def collect(self, job: Job) -> str:
        """Take over what a job left."""
        if "run" not in job.spec:
            return f"training loss {json.loads(job.path.with_suffix('.json').read_text())['final_loss']:.4f}"
        result = self.take(job.path)
        return f"top 1 {result.quality[0]:.2f} %"


def pretrain_encoder(run: Pretraining, path: Path) -> None:
    """Make a run of the convergence matrix in this process, and write its encoder to `path`.

    Its steps, its final training loss and its settings lie beside it as JSON.
    """
    with tempfile.TemporaryDirectory() as out:
        config = run.config(out, IMAGES)
        config.eval_every = config.steps
        procs = processes.start(config.device)
        loop, evaluator, batches = pretrain.prepare(config, procs, convergence.builder(run))
        evaluator.observes = False
        loop.train(batches)
        losses = convergence.losses(RunFolder(out).records())[-WINDOW:]
        stock = pretrain.fused_model(config, loop.ranks, whole_weights(loop.model))
        about = {"steps": loop.step, "final_loss": mean(losses), "settings": run.settings(IMAGES)}
        write_atomically(path.with_suffix(".json"), to_json(about) + "\n")
        write_atomically(path, evaluator.task.exports(stock)["encoder.safetensors"])


def tune(run: Run, encoder: str | None, settings: dict[str, object]) -> Result:
    """Make one run of fine-tuning in this process.

    Args:
        run: which one.
        encoder: file of the encoder; None from scratch.
        settings: to be kept with the result.
    """
    with tempfile.TemporaryDirectory() as out:
        config = run.config(out, encoder)
        procs = processes.start(config.device)
        loop, _, batches = finetune.prepare(config, procs)
        loop.train(batches)
        found = [r for r in RunFolder(out).records() if r["kind"] == "eval"]
    names = ("step", "heldout_loss", "top1", "top5")
    about = None
    if encoder is not None:
        about = json.loads(Path(encoder).with_suffix(".json").read_text())
        del about["settings"]  # which `settings` has
    return Result(
        run=run,
        settings=settings,
        pretraining=about,
        evals=[{name: r[name] for name in names} for r in found],
        machine=record.header(["transfer", "--preset", run.preset], procs.device, config.precision),
    )


def work(spec: Mapping) -> None:
    """Do what a worker is told, and write its file when it is whole."""
    torch.set_num_threads(1)
    path = Path(spec["path"])
    if "pretraining" in spec:
        pretrain_encoder(Pretraining(**spec["pretraining"]), path)
    else:
        result = tune(Run(**spec["run"]), spec["encoder"], spec["settings"])
        write_atomically(path, to_json(asdict(result)) + "\n")


def rows(comparison: Comparison) -> list[dict[str, object]]:
    """What the report says of every start that has runs, at its best rate."""
    found = []
    for name, start in comparison.starts.items():
        rate = comparison.best_rate(name)
        runs = [r for r in comparison.results.values() if r.run.start == name and r.run.rate == rate]
        if not runs:
            continue
        runs.sort(key=lambda result: result.run.seed)
        steps = [e["step"] for e in runs[0].evals]
        losses = [r.pretraining["final_loss"] for r in runs if r.pretraining]
        found.append(
            {
                "start": name,
                "title": start.title,
                "rate": rate,
                "seeds": [r.run.seed for r in runs],
                "pretraining_loss": mean(losses) if losses else None,
                "top1": [r.evals[-1]["top1"] for r in runs],
                "heldout_loss": mean(r.evals[-1]["heldout_loss"] for r in runs),
                "curve": {step: mean(r.evals[i]["top1"] for r in runs) for i, step in enumerate(steps)},
                "sweep": {
                    rate: comparison.results[run].quality[0]
                    for rate in PRESETS[comparison.preset].rates
                    if (run := Run(comparison.preset, name, rate, SEEDS[0])) in comparison.results
                },
            }
        )
    return found


def table(found: Sequence[Mapping]) -> str:
    """The rows as Markdown."""
    lines = []
    for row in found:
        few = f" (fewer than {ENOUGH})" if len(row["seeds"]) < ENOUGH else ""
        loss = "-" if row["pretraining_loss"] is None else f"{row['pretraining_loss']:.4f}"
        early = list(row["curve"].values())[1]
        lines.append(
            [
                row["title"],
                f"{row['rate']:g}",
                f"{len(row['seeds'])}{few}",
                loss,
                f"{early:.1f}",
                f"{mean(row['top1']):.2f} ({min(row['top1']):.2f} to {max(row['top1']):.2f})",
                f"{row['heldout_loss']:.4f}",
                ", ".join(f"{rate:g}: {value:.1f}" for rate, value in row["sweep"].items()),
            ]
        )
    early = list(found[0]["curve"])[1]
    return record.table(
        [
            "start", "rate", "seeds", "pre-training loss", f"top 1 after {early} steps, %",
            "top 1 at the end, %", "held-out loss", "top 1 by rate, first seed",
        ],
        lines,
    )  # fmt: skip


def plot(found: Sequence[Mapping], path: Path) -> None:
    """Accuracy over the steps of fine-tuning, means over seeds."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for i, row in enumerate(found):
        style = "--" if row["pretraining_loss"] is None else "-"
        axis.plot(
            list(row["curve"]), list(row["curve"].values()), f"o{style}", color=f"C{i}", label=row["title"]
        )
    axis.set_xlabel("step of fine-tuning")
    axis.set_ylabel("top 1 accuracy, held out, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def report(comparison: Comparison) -> str:
    """Write report.md, report.json and accuracy.png; returns the text.

    Raises:
        ValueError: no start has all of its rates yet.
    """
    found = rows(comparison)
    if not found:
        raise ValueError(f"{comparison.folder} holds no start whose rates are all there; nothing to report")
    machines = {}
    for result in comparison.results.values():
        machines.setdefault(record.machine_line(result.machine).rpartition(", commit")[0])
    about = PRESETS[comparison.preset].settings
    text = "\n".join(
        [
            f"# Transfer: {comparison.preset}",
            "",
            f"{about['steps']} steps of {about['batch_size']} images of {about['img_size']} pixels, by one "
            "protocol. Each start has its own best rate, by the accuracy of the first seed on the held-out "
            "images that the table is about: all starts have that advantage. Mean over seeds, with the "
            "lowest and the highest.",
            "",
            table(found),
            "",
            "![Accuracy](accuracy.png)",
            "",
            "Machine: " + "; ".join(machines),
            "",
        ]
    )
    plot(found, comparison.folder / "accuracy.png")
    write_atomically(comparison.folder / "report.json", to_json({"starts": found}, indent=1) + "\n")
    write_atomically(comparison.folder / "report.md", text)
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m bench transfer`."""
    parser.add_argument("--preset", choices=PRESETS, default="digits", help="(default: %(default)s)")
    parser.add_argument("--starts", nargs="+", metavar="START", help="(default: all of the preset)")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="(default: %(default)s)")
    parser.add_argument(
        "--jobs", type=count, default=os.cpu_count() or 1, help="runs at a time (default: cores)"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the results (default: %(default)s)")
    parser.add_argument(
        "--report", action="store_true", help="write the report of what is there and nothing else"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # the one thing that this process is to make


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Make what is missing and the report; returns the exit code."""
    if args.worker is not None:
        work(json.loads(args.worker))
        return 0
    failed: list[str] = []
    try:
        if min(args.seeds) < 0:
            raise ValueError(f"--seeds: expected numbers of at least 0, got {min(args.seeds)}")
        comparison = Comparison(args.folder, args.preset)
        starts = list(comparison.starts) if args.starts is None else args.starts
        unknown = [name for name in starts if name not in comparison.starts]
        if unknown:
            raise ValueError(f"--starts: expected some of {', '.join(comparison.starts)}, got {unknown[0]}")
        if comparison.unusable:
            wrong = [*comparison.unusable, "move or delete these files, and their runs are made again"]
            raise ValueError("\n".join(wrong))
        if not args.report:
            for start in starts:
                comparison.pretraining(start, SEEDS[0])  # raises now
            failed = run_all(
                WORKER, lambda: comparison.jobs(starts, args.seeds), comparison.collect, args.jobs
            )
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
