"""One trial of a study: trained by the loop of its script, in this process."""

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean

import torch
from torch import nn

from bench import record
from bench.baselines import published_convert, published_update
from bench.experiments import probe
from bench.experiments.preset import Trial
from bench.experiments.study import FINISHED, Result
from dbpkern.sites import select
from train import pretrain
from train.engine import processes
from train.engine.loop import Diverged, Loop
from train.engine.plots import WINDOW
from train.engine.results import whole_weights
from train.engine.run_folder import RunFolder, to_json, write_atomically
from train.tasks.pretraining import Config

PROBES = {"probe": "Linear probe", "knn": "Nearest neighbours"}  # accuracies, of pre-training
FIGURES = {  # of fine-tuning and segmentation, in %
    "top1": "top 1",
    "top5": "top 5",
    "miou": "mean IoU",
    "mean_accuracy": "mean accuracy",
    "pixel_accuracy": "pixel accuracy",
}


def _build_published(config: Config, model: nn.Module, ranks: None = None) -> tuple:
    """As `train.pretrain.build_optimizers`, with layers by the published rule: R lies in the model."""
    decor = config.decor
    published_convert(model, select(model, decor.sites, decor.accepts))
    optimizer, _ = pretrain.build_optimizers(config, model)
    optimizer.register_step_post_hook(lambda *_: published_update(model, decor.eta, decor.kappa))
    return optimizer, None


def prepare(trial: Trial, out: str, data: Mapping[str, object], encoder: str | None = None) -> Loop:
    """Everything up to the first step.

    Args:
        trial: which one.
        out: folder of the run.
        data: as for `Trial.config`.
        encoder: likewise.
    """
    config = trial.config(out, data, encoder)
    procs = processes.start(config.device)
    if trial.preset.every_arm[trial.arm].published:
        return pretrain.prepare(config, procs, _build_published)
    return trial.preset.script.prepare(config, procs)


def losses(records: Iterable[Mapping]) -> list[float]:
    """The training loss of every step in a log; a skipped step has that of the step before it, or the first.

    Args:
        records: as `train.engine.run_folder.RunFolder.records` gives them.
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


def probe_of(trial: Trial, loop: Loop) -> probe.Probe | None:
    """The labelled images that the encoder of a trial is asked for; None for no probe.

    Raises:
        ValueError: the source has no classes.
    """
    known = trial.preset.probe
    if not known:
        return None
    size = loop.model.patch_embed.img_size
    kind, _, path = loop.config.data.source.partition(":")
    if kind == "photos":
        return probe.of_digits(known, size)
    if kind != "folder":
        raise ValueError(
            f"{loop.config.data.source}: expected a folder with a sub-folder for each class, for the probe"
        )
    task = loop.task
    names = task.held_out.images.names
    return probe.of_folder(Path(path).expanduser(), task.files, names, known, size)


def _watch(trial: Trial, loop: Loop) -> Callable[[], dict[str, float]]:
    """Evaluations of pre-training: the held-out loss, and the probe."""
    loop.task.observes = False
    evaluator, asks = loop.evaluate, probe_of(trial, loop)

    def evaluate() -> dict[str, float]:
        found = {"heldout_loss": evaluator()["heldout_loss"]}
        return found | ({} if asks is None else asks(loop.model))

    return evaluate


def leave_encoder(path: Path, trial: Trial, data: Mapping[str, object], loop: Loop) -> None:
    """Write the encoder of a trial of pre-training, as it is now.

    What is known of it lies beside it as JSON, which is there only if the weights are.

    Args:
        path: of the weights.
        trial: which one.
        data: as for `Trial.config`.
        loop: of the trial.
    """
    stock = loop.task.stock(whole_weights(loop.model))
    lost = losses(loop.run.records())[-WINDOW:]
    about = {
        "steps": loop.step,
        "final_loss": mean(lost) if lost else None,
        "settings": trial.settings(data),
        "machine": record.header(["study", trial.study], loop.processes.device, loop.config.precision),
    }
    about_path = path.with_suffix(".json")
    about_path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, loop.task.exports(stock)["encoder.safetensors"])
    write_atomically(about_path, to_json(about) + "\n")


def train(
    trial: Trial,
    data: Mapping[str, object],
    encoder: str | None = None,
    jobs: int = 1,
    leaves: Path | None = None,
) -> Result:
    """Make a trial.

    Args:
        trial: which one.
        data: as for `Trial.config`.
        encoder: where it starts, if not from random weights.
        jobs: how many trials there are at a time.
        leaves: where its encoder is left, if it finishes.

    Raises:
        train.engine.loop.Interrupted: SIGTERM or Ctrl-C.
    """
    preset = trial.preset
    about = None if encoder is None else json.loads(Path(encoder).with_suffix(".json").read_text())
    with tempfile.TemporaryDirectory() as out:
        loop = prepare(trial, out, data, encoder)
        if preset.pretrains:
            loop.evaluate = _watch(trial, loop)
        outcome = FINISHED
        try:
            loop.train()
        except Diverged as error:
            outcome = str(error)
        finally:
            loop.close()
        if leaves is not None and outcome == FINISHED:
            leave_encoder(leaves, trial, data, loop)
        records = list(RunFolder(out).records())
    kept = ("step", "heldout_loss", *PROBES, *FIGURES)
    return Result(
        trial=trial,
        outcome=outcome,
        settings=trial.settings(data),
        losses=in_strides(losses(records), preset.stride) if preset.pretrains else [],
        seconds=loop.seconds,
        evals=[{name: r[name] for name in kept if name in r} for r in records if r["kind"] == "eval"],
        held_out=len(loop.task.held_out),
        energy=loop.energy.summary(None),
        skipped_steps=loop.skipped,
        jobs=jobs,
        encoder=about,
        machine=record.header(["study", trial.study], loop.processes.device, loop.config.precision),
    )


def pretrain_encoder(trial: Trial, data: Mapping[str, object], leaves: Path) -> None:
    """Make a trial of pre-training for nothing but its encoder."""
    with tempfile.TemporaryDirectory() as out:
        trains = trial.steps != 0
        whole = trial if trains else Trial(trial.study, trial.arm, trial.lr, trial.seed)
        loop = prepare(whole, out, data)
        loop.task.observes = False
        loop.config.eval_every = loop.config.steps
        if trains:
            loop.train()
        loop.close()
        leave_encoder(leaves, trial, data, loop)


def work(spec: Mapping) -> None:
    """Do what a job says with one thread, and write its file when it is whole."""
    torch.set_num_threads(1)
    trial = Trial(**spec["trial"])
    leaves = None if spec["leaves"] is None else Path(spec["leaves"])
    if "encoder" not in spec:
        pretrain_encoder(trial, spec["data"], leaves)
    else:
        result = train(trial, spec["data"], spec["encoder"], spec["jobs"], leaves)
        write_atomically(Path(spec["path"]), to_json(asdict(result)) + "\n")
