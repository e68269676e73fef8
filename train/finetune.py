"""Train a classifier on a pre-trained encoder: fine-tuning or a linear probe, plain or with DBP.

    torchrun --standalone --nproc_per_node 1 train/finetune.py --config train/configs/finetune_digits.yaml \
        --encoder runs/a/encoder.safetensors --out runs/b

Also runs with plain python. `--help` lists every option; `docs/finetuning.md` explains them.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save
from timm.data import resolve_model_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.optim import Lars
from torch import Tensor, nn
from torchvision.utils import save_image

import dbpkern
from dbpkern import diagnostics
from dbpkern.sites import select
from models.classifier import (
    Architecture,
    Readout,
    classifier_metadata,
    classifier_state_dict,
    to_classifier,
)
from models.vit import pair
from train import transfer
from train.data.labelled import AugmentConfig, LabelledConfig, LabelledSet, Mixer, build_labelled, collate
from train.engine import plots
from train.engine.loop import Loop, moved
from train.engine.processes import Processes, progress
from train.engine.run import open_run, parse_config, plot_correlations, run_script, summary_of
from train.engine.run_folder import to_json, write_atomically


@dataclass
class OptimConfig(transfer.OptimConfig):
    """The optimizer of the weights and its schedule; by default as in MAE's fine-tuning of ViT-B.

    Args:
        name: "adamw", "muon" (dbpkern.DecorMuon, AdamW for vectors and tokens), or "lars" for linear probes.
        weight_decay: Of weights with two or more dimensions; biases, norms, tokens and positions have none.
        betas: Of AdamW; the first is the momentum of Muon and of LARS.
    """

    name: Literal["adamw", "muon", "lars"] = "adamw"
    _: KW_ONLY
    blr: float = 5e-4
    min_lr: float = 1e-6
    warmup_epochs: float = 5


@dataclass
class Config(transfer.TransferConfig):
    """Fine-tuning of an encoder, or a linear probe of it; by default with MAE's recipe for ViT-B.

    Args:
        readout: What the head sees: "mean" of the patch tokens, "class" token, or "last" patch token.
        layer: Blocks that are kept, from the first; null for all.
        causal: Whether patches see only those before them, as in DARL's pre-training.
        linear: Whether the head alone is trained, after a BatchNorm without weights: a linear probe.
        data: The images.
        augment: What training does to them.
        steps: The same in optimizer steps; overrides epochs. 0 evaluates a classifier.safetensors alone.
        seed: Of weights, order, augmentation and samples.
    """

    readout: Readout = "mean"
    layer: int | None = None
    causal: bool = False
    linear: bool = False
    data: LabelledConfig = field(default_factory=LabelledConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    _: KW_ONLY
    epochs: float = 100
    batch_size: int = 1024
    optim: OptimConfig = field(default_factory=OptimConfig)

    def check(self, processes: int) -> None:
        """Raise ValueError for settings out of range or that do not go together, in so many processes."""
        self.check_numbers(least_steps=0)
        slices = self.accumulation * processes
        if self.augment.mixes and self.batch_size // slices % 2:
            raise ValueError(
                f"batch_size: mixup and cutmix need pairs, expected a multiple of {2 * slices}, got "
                f"{self.batch_size}"
            )
        if self.linear and self.drop_path:
            raise ValueError(
                f"drop_path: a linear probe freezes the encoder; expected 0, got {self.drop_path}"
            )
        if self.linear and self.decor.enable:
            raise ValueError("decor.enable: a linear probe trains no layer that has an R; expected false")
        if self.optim.name == "lars" and not self.linear and self.steps != 0:
            raise ValueError("optim.name: lars is for linear probes; expected another, or --linear true")


def build_optimizers(
    config: Config, model: nn.Module
) -> tuple[torch.optim.Optimizer, dbpkern.DecorAdamW | dbpkern.DecorMuon | None]:
    """The optimizer of the weights, and what moves R where the run decorrelates: the same one.

    Rates are those of `parameter_groups`. timm puts a final norm of all tokens, which the read-outs "class"
    and "last" have, with the last block.
    """
    if config.optim.name != "lars":
        return transfer.build_optimizers(config, model)
    # As MAE's: the trust ratio is for weights, not for biases.
    groups = transfer.parameter_groups(config, model)
    groups = [group | {"always_adapt": group["params"][0].ndim > 1} for group in groups]
    return Lars(groups, lr=config.peak_lr, momentum=config.optim.betas[0]), None


class Evaluator:
    """Held-out loss, accuracy, confusion matrix and input correlations of a classifier."""

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        architecture: Architecture,
        classes: tuple[str, ...],
        held_out: LabelledSet,
        processes: Processes,
    ) -> None:
        self.config = config
        self.model = model
        self.architecture = architecture
        self.classes = classes
        self.processes = processes
        self.held_out = held_out

    @torch.no_grad()
    def __call__(self) -> dict:
        """Loss, top-1 and top-5 accuracy in per cent; the decorrelation loss per layer on part of the set."""
        self.model.eval()
        device, count = self.processes.device, len(self.classes)
        loader = transfer.held_out_batches(self.config, self.held_out, self.processes, collate)
        sums = torch.zeros(2 + count**2, dtype=torch.float64, device=device)  # loss, top 5, confusion
        losses: dict[str, float] = {}
        unreadable: dict[str, str] = {}
        decor = self.config.decor
        observes = self.processes.is_main and not self.config.linear
        for batch in progress(loader, "evaluating", "batch"):
            unreadable |= dict(batch.pop("skipped"))
            batch = moved(batch, device)
            labels = batch["label"]
            watch = nullcontext({})
            if observes:
                watch = diagnostics.observe(self.model, decor.present(self.model), decor.accepts)
                observes = False
            with watch as layers:
                scores = self.model(batch["image"])
            losses |= {name: layer.loss_after for name, layer in layers.items()}
            best = scores.topk(min(5, count)).indices
            sums[0] += F.cross_entropy(scores, labels, reduction="sum")
            sums[1] += (best == labels[:, None]).sum()
            sums[2:] += (labels * count + best[:, 0]).bincount(minlength=count**2)
        self.model.train()
        self.processes.sum(sums)
        confusion = sums[2:].view(count, count).cpu()
        total = confusion.sum()
        pictures = {}
        if self.processes.is_main:
            pictures["confusion"] = plots.as_picture(plots.confusion_figure(confusion, self.classes))
        return {
            "heldout_loss": (sums[0].cpu() / total).item(),
            "top1": (100 * confusion.trace() / total).item(),
            "top5": (100 * sums[1].cpu() / total).item(),
            "decorrelation_loss": losses,
            "pictures": pictures,
            "unreadable": unreadable,
        }


def write_results(loop: Loop, evaluator: Evaluator, weights: dict[str, Tensor]) -> None:
    """The classifier, the summary and the pictures of a finished run.

    The model is whole on each process, so that its `weights` need not be gathered.
    """
    run, config = loop.run, loop.config
    records = list(run.records())
    evals = [r for r in records if r["kind"] == "eval"]
    classifier = loop.model.cpu()
    about = classifier_metadata(
        classifier, evaluator.architecture, evaluator.classes, config.readout, config.causal
    )
    write_atomically(
        run.path / "classifier.safetensors", save(classifier_state_dict(classifier), metadata=about)
    )
    figures = ("top1", "top5", "heldout_loss", "step")
    best = max(evals, key=lambda record: record["top1"])
    summary = summary_of(loop, records)
    summary |= {name: evals[-1][name] for name in ("top1", "top5")}
    summary |= {"best": {name: best[name] for name in figures}}
    summary["trained_parameters"] = sum(p.numel() for p in loop.model.parameters() if p.requires_grad)
    write_atomically(run.summary, to_json(summary, indent=1))
    plots.plot_curves(records, run.path / "curves.png")
    plots.plot_accuracy(records, {"top5": "top 5", "top1": "top 1"}, run.path / "accuracy.png")
    save_image(loop.pictures["confusion"], run.path / "confusion.png")
    if not config.linear:
        plot_correlations(records, run.path / "correlation.png")


def prepare(config: Config, procs: Processes) -> tuple[Loop, Evaluator, Iterator[dict]]:
    """Everything up to the first step. Whatever can be wrong is found before a file is written.

    Args:
        config: What is asked for.
        procs: This process among the others.

    Raises:
        ValueError, FileNotFoundError: what the user asked for cannot be done; the message says why.
    """
    config.check(procs.world_size)
    torch.manual_seed(config.seed)
    loaded = transfer.load(config)
    model, img_size = loaded.model, pair("img_size", config.img_size)
    pixels = resolve_model_data_config(model)  # how timm's own weights want them, ImageNet's way otherwise
    training, held_out, classes = build_labelled(
        config.data, config.augment, img_size, pixels["mean"], pixels["std"], config.seed
    )
    keeps_head = (loaded.classes, loaded.readout, loaded.causal) == (classes, config.readout, config.causal)
    keeps_head = keeps_head and config.layer in (None, len(model.blocks)) and not config.linear
    head = model.head.state_dict()
    architecture = to_classifier(
        model,
        loaded.architecture,
        len(classes),
        config.readout,
        img_size=img_size,
        layer=config.layer,
        causal=config.causal,
        linear=config.linear,
    )
    if keeps_head:
        model.head.load_state_dict(head)
    elif config.steps == 0:
        raise ValueError(
            "steps: 0 evaluates a classifier.safetensors with its own classes, readout, causal and layer, "
            f"and --linear false; {config.encoder} is not one, or was made with other settings"
        )
    if not config.linear:
        # Raises now: evaluation observes them.
        select(model, config.decor.present(model), config.decor.accepts)
    model.to(procs.device)
    if config.linear and procs.world_size > 1:
        model.head[0].register_forward_hook(transfer.average_statistics)
    optimizer, decor = build_optimizers(config, model)

    total, rate = config.schedule(len(training))
    run, found = open_run(config, procs, training.files)
    step = 0 if found is None else found[1]["step"]
    mixer = Mixer(config.augment, len(classes))
    batches = transfer.training_batches(config, training, total, step, procs, mixer)
    config.check_sample(model.num_prefix_tokens + model.patch_embed.num_patches, procs.world_size)
    evaluator = Evaluator(config, model, architecture, classes, held_out, procs)
    entropy = SoftTargetCrossEntropy()
    loop = Loop(
        config=config,
        processes=procs,
        run=run,
        files=training.files,
        model=model,
        optimizer=optimizer,
        decor=decor,
        loss=lambda model, batch: entropy(model(batch["image"]), batch["target"]),
        evaluate=evaluator,
        total_steps=total,
        rate=rate,
    )
    if found is not None:
        loop.load(*found)
    return loop, evaluator, iter(batches)


def parse(arguments: list[str] | None = None) -> Config:
    """The configuration from the command line and YAML files."""
    return parse_config(Config, "train/finetune.py", __doc__, arguments)


def main(arguments: list[str] | None = None) -> None:
    """Fine-tune."""
    run_script("finetune", parse, prepare, write_results, arguments)


if __name__ == "__main__":
    main()
