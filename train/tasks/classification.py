"""Classification by a pre-trained encoder: its options and its task."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save
from timm.data import resolve_model_data_config
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torchvision.utils import save_image

from models.classifier import Readout, Vit, classifier_metadata, classifier_state_dict, to_classifier
from models.vit import pair
from train.data.labelled import (
    AugmentConfig,
    LabelledBatch,
    LabelledConfig,
    MixedBatch,
    Mixer,
    build_labelled,
    collate,
)
from train.data.loading import AtEpochZero
from train.engine import plots
from train.engine.run_folder import write_atomically
from train.engine.task import Collate, Observe, Task
from train.tasks import transfer


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
        """Raise ValueError for settings that do not go together, in so many processes."""
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


class ClassificationTask(Task[MixedBatch, LabelledBatch]):
    """Classify images, by a whole network or by a linear layer on a frozen encoder."""

    config: Config
    model: Vit
    confusion: Tensor  # of the last evaluation, [C, C], rows by the label
    least_steps = 0

    def check(self) -> None:
        """Raise ValueError for options that do not go together."""
        self.config.check(self.processes.world_size)

    def make(self) -> None:
        """Make the model and open the data."""
        config, processes = self.config, self.processes
        loaded = transfer.load(config)
        model, img_size = loaded.model, pair("img_size", config.img_size)
        pixels = resolve_model_data_config(model)  # as timm's own weights want them, or ImageNet's way
        self.training, held_out, self.classes = build_labelled(
            config.data, config.augment, img_size, pixels["mean"], pixels["std"], config.seed
        )
        self.files, self.held_out = self.training.files, AtEpochZero(held_out)
        asked = (self.classes, config.readout, config.causal)
        keeps_head = (loaded.classes, loaded.readout, loaded.causal) == asked
        keeps_head = keeps_head and config.layer in (None, len(model.blocks)) and not config.linear
        head = model.head.state_dict()
        self.architecture = to_classifier(
            model,
            loaded.architecture,
            len(self.classes),
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
                "steps: 0 evaluates a classifier.safetensors with its own classes, readout, causal and "
                f"layer, and --linear false; {config.encoder} is not one, or was made with other settings"
            )
        self.observes = not config.linear
        self.model = model.to(processes.device)
        if config.linear and processes.world_size > 1:
            norm = next(model.head.children())  # before the linear layer
            norm.register_forward_hook(transfer.average_statistics)
        self.mixer = Mixer(config.augment, len(self.classes))
        self.entropy = SoftTargetCrossEntropy()

    @property
    def workers(self) -> int:
        """Loader processes of each training process."""
        return self.config.data.workers

    @property
    def rows_per_image(self) -> int:
        """Tokens of an image."""
        return self.model.num_prefix_tokens + self.model.patch_embed.num_patches

    @property
    def collate(self) -> Collate[MixedBatch]:
        """Makes a batch of mixed images."""
        return self.mixer

    @property
    def collate_held_out(self) -> Collate[LabelledBatch]:
        """Makes a batch of images as they are."""
        return collate

    def loss(self, model: nn.Module, batch: MixedBatch) -> Tensor:
        """Cross-entropy with mixed labels."""
        return self.entropy(model(batch["image"]), batch["target"])

    def evaluate(self, batch: LabelledBatch, first: bool, observe: Observe) -> Tensor:
        """Sum of the cross-entropies, images whose class is among the best five, confusion matrix."""
        count, labels = len(self.classes), batch["label"]
        with observe():
            scores = self.model(batch["image"])
        best = scores.topk(min(5, count)).indices
        loss = F.cross_entropy(scores, labels, reduction="sum")
        among = (best == labels[:, None]).sum()
        confusion = (labels * count + best[:, 0]).bincount(minlength=count**2)
        return torch.cat([loss.double().reshape(1), among.double().reshape(1), confusion.double()])

    def figures(self, total: Tensor) -> dict[str, float]:
        """Loss, top-1 and top-5 accuracy in per cent."""
        count = len(self.classes)
        self.confusion = total[2:].view(count, count).cpu()
        images = self.confusion.sum()
        return {
            "heldout_loss": (total[0].cpu() / images).item(),
            "top1": (100 * self.confusion.trace() / images).item(),
            "top5": (100 * total[1].cpu() / images).item(),
        }

    def pictures(self) -> dict[str, Tensor]:
        """The confusion matrix."""
        return {"confusion": plots.as_picture(plots.confusion_figure(self.confusion, self.classes))}

    def export(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Write the classifier, which is whole on each process, so that `weights` need not be gathered."""
        config, classifier = self.config, self.model.cpu()
        about = classifier_metadata(
            classifier, self.architecture, self.classes, config.readout, config.causal
        )
        content = save(classifier_state_dict(classifier), metadata=about)
        write_atomically(folder / "classifier.safetensors", content)

    def summary(self, records: Sequence[Mapping[str, Any]]) -> dict[str, object]:
        """Accuracies at the end and at their best, and the size of what was trained."""
        evals = [record for record in records if record["kind"] == "eval"]
        best = max(evals, key=lambda record: record["top1"])
        return {
            "top1": evals[-1]["top1"],
            "top5": evals[-1]["top5"],
            "best": {name: best[name] for name in ("top1", "top5", "heldout_loss", "step")},
            "trained_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
        }

    def draw(self, records: Sequence[Mapping[str, Any]], folder: Path) -> None:
        """Write the accuracies over the steps, and the confusion matrix."""
        plots.plot_accuracy(records, {"top5": "top 5", "top1": "top 1"}, folder / "accuracy.png")
        save_image(self.pictures()["confusion"], folder / "confusion.png")
