"""Semantic segmentation by a pre-trained encoder: its options and its task."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import save
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.utils import save_image

from models.classifier import Architecture, Vit
from models.segmentation import (
    Head,
    SegmentationModel,
    is_segmenter,
    load_segmenter,
    multiscale_logits,
    segmentation_loss,
    segmenter_metadata,
    segmenter_state_dict,
)
from models.vit import check_sizes, pair
from train.data.loading import AtEpochZero
from train.data.masks import IGNORE
from train.data.reading import DataError
from train.data.segmented import (
    SegmentedBatch,
    SegmentedConfig,
    SegmentedSample,
    WholeBatch,
    build_segmented,
    collate,
    collate_whole,
)
from train.engine import plots
from train.engine.processes import Processes
from train.engine.run_folder import write_atomically
from train.engine.schedule import warmup_linear
from train.engine.task import Collate, Observe, Task
from train.tasks import transfer

Model = TypeVar("Model", bound=nn.Module)

PICTURES = 8  # held-out images in overlays.png
LEAST_SIDE = 128  # of their pictures, in pixels
FIGURES = {"pixel_accuracy": "of pixels", "mean_accuracy": "mean of classes", "miou": "mean IoU"}


@dataclass
class OptimConfig(transfer.OptimConfig):
    """The optimizer and its schedule, a linear decay; by default as in MAE's evaluation of ViT-B on ADE20K.

    Args:
        name: "adamw", or "muon" (dbpkern.DecorMuon, AdamW for vectors and tokens).
        weight_decay: Of weights with two or more dimensions; biases, norms, tokens and positions have none.
        betas: Of AdamW; the first is the momentum of Muon.
    """

    name: Literal["adamw", "muon"] = "adamw"
    _: KW_ONLY
    blr: float = 1.6e-3  # 1e-4 at 16 images a step
    warmup_epochs: float = 0
    warmup_steps: int | None = 1500


@dataclass
class EvaluationConfig:
    """How held-out images are segmented.

    Args:
        stride: Pixels from one window of img_size to the next, down and to the right, in images that are
            larger than one; or one number; null for two thirds of img_size.
        scales: Factors of the size in which images are looked at; of several, probabilities are averaged.
        flip: Whether mirrored images are looked at, too.
    """

    stride: int | tuple[int, int] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        if not self.scales or not all(0 < scale < float("inf") for scale in self.scales):
            raise ValueError(f"evaluation.scales: expected factors above 0, got {list(self.scales)}")

    def windows(self, window: tuple[int, int]) -> tuple[int, int]:
        """The stride of windows of this size, raising ValueError if it is no stride."""
        if self.stride is None:
            return max(1, 2 * window[0] // 3), max(1, 2 * window[1] // 3)
        stride = pair("evaluation.stride", self.stride)
        if stride[0] > window[0] or stride[1] > window[1]:
            raise ValueError(f"evaluation.stride: expected at most the window's {window}, got {stride}")
        return stride


@dataclass
class Config(transfer.TransferConfig):
    """Fine-tuning of an encoder for semantic segmentation; by default with MAE's recipe for ViT-B on ADE20K.

    Args:
        encoder: encoder.safetensors of a run of train/pretrain.py; classifier.safetensors of one of
            train/finetune.py; segmenter.safetensors of one of this script; "timm:NAME" for a ViT of timm; a
            checkpoint file of facebookresearch/mae, which needs model; or null for random weights, which
            need it, too.
        head: "upernet", "dpt", or "linear" for a linear layer on the patch tokens.
        width: Channels of the decoder; null for the encoder's width with "upernet" and 256 with "dpt".
        img_size: Side of the crops and of the windows of evaluation in pixels, or height and width.
        data: The images.
        evaluation: How held-out images are segmented.
        steps: The same in optimizer steps; overrides epochs. 0 evaluates a segmenter.safetensors alone.
        seed: Of weights, order, augmentation and samples.
    """

    head: Head = "upernet"
    width: int | None = None
    data: SegmentedConfig = field(default_factory=SegmentedConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    _: KW_ONLY
    img_size: int | tuple[int, int] = 512
    epochs: float = 127  # of ADE20K, as many as these steps
    steps: int | None = 160_000
    batch_size: int = 16
    optim: OptimConfig = field(default_factory=OptimConfig)

    decay = staticmethod(warmup_linear)

    def check(self, procs: Processes) -> None:
        """Raise ValueError for settings that do not go together, in these processes."""
        if self.deterministic and procs.device.type == "cuda":
            raise ValueError(
                "deterministic: on GPUs PyTorch has no reproducible cross-entropy of pixels, nor gradients "
                "of UPerNet's pooling; expected false there"
            )
        share = self.micro_batch(procs.world_size)
        synchronised = procs.world_size > 1 and procs.device.type == "cuda"
        if self.head == "upernet" and self.steps != 0 and share < 2 and not synchronised:
            raise ValueError(
                "batch_size: the BatchNorms of UPerNet need at least 2 images in a micro-batch, got "
                f"{self.batch_size} over {self.accumulation * procs.world_size} micro-batches"
            )
        self.evaluation.windows(pair("img_size", self.img_size))


class Start(NamedTuple):
    """What training starts from.

    Attributes:
        model: A whole segmentation model, or an encoder for images of any size.
        architecture: How the encoder was pre-trained.
        classes: That the model tells; None for an encoder.
    """

    model: SegmentationModel | Vit
    architecture: Architecture
    classes: tuple[str, ...] | None

    @property
    def encoder(self) -> Vit:
        """The encoder."""
        return self.model.encoder if isinstance(self.model, SegmentationModel) else self.model


def load(config: Config) -> Start:
    """What a configuration asks to start from.

    Raises:
        FileNotFoundError, ValueError: as `transfer.load` and `load_segmenter`; a segmenter has another head
            or width, or a classifier is causal.
    """
    name = config.encoder
    if name is not None and is_segmenter(name):
        segmenter = load_segmenter(name, config.drop_path)
        model = segmenter.model
        known = segmenter.architecture
        if config.model not in (None, known.model) or not config.model_args.items() <= known.sizes.items():
            raise ValueError(
                f"model: {name} says itself that it is {known.model} with {dict(known.sizes)}; expected null "
                f"or the same, got {config.model} with {config.model_args}"
            )
        if config.head != model.head or config.width not in (None, model.width):
            raise ValueError(
                f"head: {name} has the head {model.head!r} of width {model.width}; expected the same, got "
                f"{config.head!r} of width {config.width}"
            )
        return Start(model, known, segmenter.classes)
    loaded = transfer.load(config, dynamic_img_size=True)
    if loaded.causal:
        raise ValueError(f"encoder: {name} is a causal classifier, whose mask is for images of one size")
    return Start(loaded.model, loaded.architecture, None)


def build_model(config: Config, start: Start, classes: tuple[str, ...]) -> SegmentationModel:
    """The model of a run, in which a segmenter's head stays, but for the last layers where classes differ.

    Raises:
        ValueError: as `SegmentationModel`; or there is nothing to evaluate in a run of no steps.
    """
    if config.steps == 0 and start.classes != classes:
        found = "none" if start.classes is None else f"{len(start.classes)}, such as {start.classes[0]!r}"
        raise ValueError(
            f"steps: 0 evaluates a segmenter.safetensors with the classes of the data ({len(classes)}, such "
            f"as {classes[0]!r}), but {config.encoder} has {found}"
        )
    img_size = pair("img_size", config.img_size)
    if not isinstance(start.model, SegmentationModel):
        return SegmentationModel(
            start.model, len(classes), config.head, img_size=img_size, width=config.width
        )
    model = start.model
    if model.encoder.patch_embed.img_size != img_size:
        check_sizes(img_size, model.encoder.patch_embed.patch_size)
        model.encoder.set_input_size(img_size)
    if start.classes != classes:
        model.reset_classifier(len(classes))
    return model


def describe(classes: tuple[str, ...]) -> str:
    """Classes in a few words."""
    return f"{len(classes)} classes from {classes[0]!r} to {classes[-1]!r}"


def synchronise(model: Model, procs: Processes) -> Model:
    """Make BatchNorms those of all processes: nn.SyncBatchNorm, which takes GPUs.

    On CPUs each process normalises by its own images; the running statistics, by which evaluation goes, are
    the means over all processes.
    """
    if procs.world_size == 1:
        return model
    if procs.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(transfer.average_statistics)
    return model


class Scores(NamedTuple):
    """Figures of a confusion matrix, in per cent.

    Attributes:
        miou: The mean over the classes of their intersection over union; classes that are neither in a mask
            nor predicted are left out.
        mean_accuracy: The mean over the classes that are in a mask of the part of their pixels that is right.
        pixel_accuracy: Part of all pixels with a class that is right.
        iou: Of each class [C]; NaN for those left out.
        accuracy: Of each class [C]; NaN for those in no mask.
        pixels: In the masks, of each class [C].
    """

    miou: float
    mean_accuracy: float
    pixel_accuracy: float
    iou: Tensor
    accuracy: Tensor
    pixels: Tensor


def count_pixels(predicted: Tensor, masks: Tensor, classes: int) -> Tensor:
    """How many pixels of each class were taken for which: int64 [C, C], rows by the mask.

    torchmetrics counts the same, but under torch.use_deterministic_algorithms by a matrix of all pixels
    times C^2.

    Args:
        predicted: Labels 0 to C - 1, of any shape.
        masks: Labels or IGNORE, int64 of the same shape.
        classes: C.
    """
    known = masks != IGNORE
    pairs = masks[known] * classes + predicted[known]
    return pairs.bincount(minlength=classes**2).view(classes, classes)


def score(counts: Tensor) -> Scores:
    """The figures of a confusion matrix, as `count_pixels` gives it, summed over a set."""
    counts = counts.double().cpu()
    right, pixels, predicted = counts.diag(), counts.sum(1), counts.sum(0)
    iou = 100 * right / (pixels + predicted - right)  # 0 / 0 is NaN
    accuracy = 100 * right / pixels
    return Scores(
        iou.nanmean().item(),
        accuracy.nanmean().item(),
        (100 * right.sum() / pixels.sum()).item(),
        iou,
        accuracy,
        pixels.long(),
    )


def class_table(classes: tuple[str, ...], scores: Scores) -> str:
    """A line of CSV for each class: IoU and accuracy in per cent, empty where not defined, and pixels."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["class", "iou", "accuracy", "pixels"])
    for name, *figures, pixels in zip(
        classes, scores.iou.tolist(), scores.accuracy.tolist(), scores.pixels.tolist(), strict=True
    ):
        table.writerow([name, *("" if f != f else f"{f:.2f}" for f in figures), pixels])
    return text.getvalue()


class SegmentationTask(Task[SegmentedBatch, WholeBatch]):
    """Give each pixel of an image a class."""

    config: Config
    model: SegmentationModel
    scores: Scores  # of the last evaluation
    counts: Tensor  # likewise, [C, C], rows by the mask
    least_steps = 0

    def check(self) -> None:
        """Raise ValueError for options that do not go together."""
        self.config.check(self.processes)

    def make(self) -> None:
        """Make the model and open the data."""
        config, processes = self.config, self.processes
        start = load(config)
        pixels = resolve_model_data_config(start.encoder)  # as timm's own weights want them
        self.window = pair("img_size", config.img_size)
        self.training, held_out, self.classes = build_segmented(
            config.data, self.window, pixels["mean"], pixels["std"], config.seed, config.evaluation.scales
        )
        self.held_out, self.preprocess = AtEpochZero(held_out), held_out.transform.preprocess
        self.files = [
            *self.training.files,
            *(f"held out: {name}" for name in held_out.files),
            *(f"class {number}: {name}" for number, name in enumerate(self.classes)),
        ]
        self.architecture = start.architecture
        model = build_model(config, start, self.classes)
        if processes.is_main and start.classes not in (None, self.classes):
            print(
                f"segment: the data have {describe(self.classes)}, {config.encoder} "
                f"{describe(start.classes)}: the last layers start anew",
                flush=True,
            )
        self.model = synchronise(model.to(processes.device), processes)
        self.stride = config.evaluation.windows(self.window)
        self.shown: dict[str, list[Tensor]] = {}  # of the last evaluation

    @property
    def workers(self) -> int:
        """Loader processes of each training process."""
        return self.config.data.workers

    @property
    def rows_per_image(self) -> int:
        """Tokens of an image in training."""
        encoder = self.model.encoder
        return encoder.num_prefix_tokens + encoder.patch_embed.num_patches

    @property
    def collate(self) -> Collate[SegmentedBatch]:
        """Makes a batch of crops."""
        return collate

    @property
    def collate_held_out(self) -> Collate[WholeBatch]:
        """Makes a batch of whole images, which differ in size."""
        return collate_whole

    def loss(self, model: nn.Module, batch: SegmentedBatch) -> Tensor:
        """Cross-entropy of the pixels with a class."""
        return segmentation_loss(model(batch["image"]), batch["mask"], IGNORE)

    def _parts(
        self, samples: list[SegmentedSample[list[Tensor]]]
    ) -> Iterator[list[SegmentedSample[list[Tensor]]]]:
        """Samples that go through the model together: of one size, one by one if larger than a window."""
        for shape, equal in groupby(samples, lambda s: ([v.shape for v in s.image], s.mask.shape)):
            group = list(equal)
            sides = [v[i] <= self.window[i - 1] for v in shape[0] for i in (1, 2)]
            yield from [group] if all(sides) else ([sample] for sample in group)

    def _show(self, image: Tensor, mask: Tensor, predicted: Tensor) -> None:
        """Keep pictures of an image [3, H, W] and of labels [h, w], squares of one size."""
        side = max(LEAST_SIDE, *self.window)
        height, width = image.shape[1:]
        size = [max(1, round(side * length / max(height, width))) for length in (height, width)]
        padding = (0, side - size[1], 0, side - size[0])
        colours = plots.colour_table().float() / 255
        for name, picture, mode in (
            ("image", self.preprocess.denormalize(image), "bilinear"),
            ("truth", colours[mask.cpu().long()].permute(2, 0, 1), "nearest-exact"),
            ("prediction", colours[predicted.cpu()].permute(2, 0, 1), "nearest-exact"),
        ):
            resized = F.interpolate(picture[None].cpu(), size, mode=mode)[0]
            self.shown.setdefault(name, []).append(F.pad(resized, padding, value=1.0))

    def evaluate(self, batch: WholeBatch, first: bool, observe: Observe) -> Tensor:
        """Sum of the pixels' cross-entropies, confusion matrix of pixels; and pictures."""
        if first:
            self.shown = {}
        evaluation, count = self.config.evaluation, len(self.classes)
        share = max(1, self.config.micro_batch(self.processes.world_size))
        total = torch.zeros(1 + count**2, dtype=torch.float64, device=self.processes.device)
        for part in self._parts(batch["samples"]):
            versions = [torch.stack(images) for images in zip(*(s.image for s in part), strict=True)]
            masks = torch.stack([sample.mask for sample in part]).long()
            with observe():
                logits = multiscale_logits(
                    self.model, versions, masks.shape[1:], self.window, self.stride, evaluation.flip, share
                )
            predicted = logits.argmax(1)
            total[0] += F.cross_entropy(logits, masks, ignore_index=IGNORE, reduction="none").double().sum()
            total[1:] += count_pixels(predicted, masks, count).flatten()
            if self.processes.is_main:
                for sample, labels in zip(part, predicted, strict=True):
                    if len(self.shown.get("image", ())) < PICTURES:
                        self._show(sample.image[0], sample.mask, labels)
        return total

    def figures(self, total: Tensor) -> dict[str, float]:
        """Loss per pixel with a class; mean IoU and accuracies in per cent."""
        count = len(self.classes)
        self.counts = total[1:].view(count, count).cpu()
        if not self.counts.any():
            raise DataError(
                f"data.source: no pixel of the held-out masks of {self.config.data.source} has a class"
            )
        self.scores = score(self.counts)
        return {
            "heldout_loss": (total[0].cpu() / self.scores.pixels.sum()).item(),
            "miou": self.scores.miou,
            "mean_accuracy": self.scores.mean_accuracy,
            "pixel_accuracy": self.scores.pixel_accuracy,
        }

    def shown_rows(self) -> dict[str, Tensor]:
        """Images, masks and predictions of the last evaluation, [B, 3, H, W] each, for `image_grid`."""
        return {name: torch.stack(pictures) for name, pictures in self.shown.items()}

    def pictures(self) -> dict[str, Tensor]:
        """The confusion matrix, and some images with their masks and predictions."""
        figure = plots.confusion_figure(self.counts, self.classes, "pixels")
        pictures = {"confusion": plots.as_picture(figure)}
        if self.shown:  # this process may have no readable image
            pictures["overlays"] = plots.image_grid(self.shown_rows())
        return pictures

    def export(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Write the model, which is whole on each process, so that `weights` need not be gathered."""
        model = self.model.cpu()
        about = segmenter_metadata(model, self.architecture, self.classes, self.config.data.short_side)
        write_atomically(folder / "segmenter.safetensors", save(segmenter_state_dict(model), metadata=about))

    def summary(self, records: Sequence[Mapping[str, Any]]) -> dict[str, object]:
        """Figures at the end and where the mean IoU is best."""
        evals = [record for record in records if record["kind"] == "eval"]
        best = max(evals, key=lambda record: record["miou"])
        return {name: evals[-1][name] for name in FIGURES} | {
            "best": {name: best[name] for name in (*FIGURES, "heldout_loss", "step")}
        }

    def draw(self, records: Sequence[Mapping[str, Any]], folder: Path) -> None:
        """Write the table of classes, the figures over the steps, and pictures."""
        write_atomically(folder / "classes.csv", class_table(self.classes, self.scores))
        plots.plot_accuracy(records, FIGURES, folder / "accuracy.png")
        save_image(self.pictures()["confusion"], folder / "confusion.png")
        if self.shown:
            plots.save_image_grid(self.shown_rows(), folder / "overlays.png")
