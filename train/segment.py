"""Train a semantic segmentation model on a pre-trained encoder, plain or with DBP, and evaluate it.

    torchrun --standalone --nproc_per_node 1 train/segment.py --config train/configs/segment_scenes.yaml \
        --encoder runs/a/encoder.safetensors --out runs/b

Also runs with plain python. `--help` lists every option; `docs/segmentation.md` explains them.
"""

import csv
import io
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field
from itertools import groupby
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.utils import save_image

from dbpkern import diagnostics
from dbpkern.sites import select
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
from train import transfer
from train.data.masks import IGNORE
from train.data.reading import DataError
from train.data.segmented import (
    Preprocess,
    SegmentedConfig,
    SegmentedSample,
    SegmentedSet,
    build_segmented,
    collate,
    collate_whole,
)
from train.engine import plots
from train.engine.loop import Loop, moved
from train.engine.processes import Processes, progress
from train.engine.run import open_run, parse_config, plot_correlations, run_script, summary_of
from train.engine.run_folder import to_json, write_atomically
from train.engine.schedule import warmup_linear

PICTURES = 8  # held-out images in overlays.png
LEAST_SIDE = 128  # of their pictures, in pixels


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

    def __post_init__(self):
        if not self.scales or not all(0 < scale < float("inf") for scale in self.scales):
            raise ValueError(f"evaluation.scales: expected factors above 0, got {list(self.scales)}")

    def windows(self, window: tuple[int, int]) -> tuple[int, int]:
        """The stride of windows of this size, raising ValueError if it is no stride."""
        if self.stride is None:
            return tuple(max(1, 2 * side // 3) for side in window)
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
        """Raise ValueError for settings out of range or that do not go together, in these processes."""
        self.check_numbers(least_steps=0)
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
        loaded = load_segmenter(name, config.drop_path)
        model = loaded.model
        known = loaded.architecture
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
        return Start(model, loaded.architecture, loaded.classes)
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
    if start.classes is None:
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


def synchronise(model: nn.Module, procs: Processes) -> nn.Module:
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


class Evaluator:
    """Held-out loss, mean IoU, accuracies, pictures and input correlations of a segmentation model."""

    def __init__(
        self,
        config: Config,
        model: SegmentationModel,
        architecture: Architecture,
        classes: tuple[str, ...],
        held_out: SegmentedSet,
        preprocess: Preprocess,
        processes: Processes,
    ) -> None:
        self.config = config
        self.model = model
        self.architecture = architecture
        self.classes = classes
        self.held_out = held_out
        self.preprocess = preprocess
        self.processes = processes
        self.window = pair("img_size", config.img_size)
        self.stride = config.evaluation.windows(self.window)
        self.scores: Scores | None = None  # of the last evaluation
        self.pictures: dict[str, list[Tensor]] = {}  # likewise

    def _parts(self, samples: list[SegmentedSample]) -> Iterator[list[SegmentedSample]]:
        """Samples that go through the model together: of one size, one by one if larger than a window."""
        for shape, group in groupby(samples, lambda s: ([v.shape for v in s.image], s.mask.shape)):
            group = list(group)
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
            self.pictures.setdefault(name, []).append(F.pad(resized, padding, value=1.0))

    @torch.no_grad()
    def __call__(self) -> dict:
        """Loss per pixel with a class; figures in per cent; the decorrelation loss of the first images."""
        self.model.eval()
        device, evaluation = self.processes.device, self.config.evaluation
        share = max(1, self.config.micro_batch(self.processes.world_size))
        loader = transfer.held_out_batches(self.config, self.held_out, self.processes, collate_whole)
        counts = torch.zeros(2 * (len(self.classes),), dtype=torch.int64, device=device)
        loss = torch.zeros((), dtype=torch.float64, device=device)
        losses: dict[str, float] = {}
        unreadable: dict[str, str] = {}
        self.pictures = {}
        decor, observes = self.config.decor, self.processes.is_main
        for batch in progress(loader, "evaluating", "batch"):
            unreadable |= dict(batch.pop("skipped"))
            for part in self._parts(moved(batch, device)["samples"]):
                versions = [torch.stack(images) for images in zip(*(s.image for s in part), strict=True)]
                masks = torch.stack([sample.mask for sample in part]).long()
                watch = nullcontext({})
                if observes:
                    watch = diagnostics.observe(self.model, decor.present(self.model), decor.accepts)
                    observes = False
                with watch as layers:
                    logits = multiscale_logits(
                        self.model,
                        versions,
                        masks.shape[1:],
                        self.window,
                        self.stride,
                        evaluation.flip,
                        share,
                    )
                losses |= {name: layer.loss_after for name, layer in layers.items()}
                predicted = logits.argmax(1)
                counts += count_pixels(predicted, masks, len(self.classes))
                loss += F.cross_entropy(logits, masks, ignore_index=IGNORE, reduction="none").double().sum()
                if self.processes.is_main:
                    for sample, labels in zip(part, predicted, strict=True):
                        if len(self.pictures.get("image", ())) < PICTURES:
                            self._show(sample.image[0], sample.mask, labels)
        self.model.train()
        self.processes.sum(counts)
        self.processes.sum(loss)
        if not counts.any():
            raise DataError(
                f"data.source: no pixel of the held-out masks of {self.config.data.source} has a class"
            )
        self.scores = score(counts)
        pictures = {}
        if self.processes.is_main:
            figure = plots.confusion_figure(counts.cpu().double(), self.classes, "pixels")
            pictures["confusion"] = plots.as_picture(figure)
            if self.pictures:
                pictures["overlays"] = plots.image_grid(self.rows)
        return {
            "heldout_loss": (loss.cpu() / self.scores.pixels.sum()).item(),
            "miou": self.scores.miou,
            "mean_accuracy": self.scores.mean_accuracy,
            "pixel_accuracy": self.scores.pixel_accuracy,
            "decorrelation_loss": losses,
            "pictures": pictures,
            "unreadable": unreadable,
        }

    @property
    def rows(self) -> dict[str, Tensor]:
        """Images, masks and predictions of the last evaluation, [B, 3, H, W] each, for `image_grid`."""
        return {name: torch.stack(pictures) for name, pictures in self.pictures.items()}


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


def write_results(loop: Loop, evaluator: Evaluator, weights: dict[str, Tensor]) -> None:
    """The model, the summary, the table and the pictures of a finished run.

    The model is whole on each process, so that its `weights` need not be gathered.
    """
    run, config = loop.run, loop.config
    records = list(run.records())
    evals = [r for r in records if r["kind"] == "eval"]
    model = loop.model.cpu()
    about = segmenter_metadata(model, evaluator.architecture, evaluator.classes, config.data.short_side)
    write_atomically(run.path / "segmenter.safetensors", save(segmenter_state_dict(model), metadata=about))
    figures = {"pixel_accuracy": "of pixels", "mean_accuracy": "mean of classes", "miou": "mean IoU"}
    best = max(evals, key=lambda record: record["miou"])
    summary = summary_of(loop, records)
    summary |= {name: evals[-1][name] for name in figures}
    summary |= {"best": {name: best[name] for name in (*figures, "heldout_loss", "step")}}
    write_atomically(run.summary, to_json(summary, indent=1))
    write_atomically(run.path / "classes.csv", class_table(evaluator.classes, evaluator.scores))
    plots.plot_curves(records, run.path / "curves.png")
    plots.plot_accuracy(records, figures, run.path / "accuracy.png")
    save_image(loop.pictures["confusion"], run.path / "confusion.png")
    if evaluator.pictures:  # this process may have no readable image
        plots.save_image_grid(evaluator.rows, run.path / "overlays.png")
        plot_correlations(records, run.path / "correlation.png")


def prepare(config: Config, procs: Processes) -> tuple[Loop, Evaluator, Iterator[dict]]:
    """Everything up to the first step. Whatever can be wrong is found before a file is written.

    Args:
        config: What is asked for.
        procs: This process among the others.

    Raises:
        ValueError, FileNotFoundError: what the user asked for cannot be done; the message says why.
    """
    config.check(procs)
    torch.manual_seed(config.seed)
    start = load(config)
    pixels = resolve_model_data_config(start.encoder)  # how timm's own weights want them, or ImageNet's way
    img_size = pair("img_size", config.img_size)
    training, held_out, classes = build_segmented(
        config.data, img_size, pixels["mean"], pixels["std"], config.seed, config.evaluation.scales
    )
    preprocess = held_out.transform.preprocess
    model = build_model(config, start, classes)
    if procs.is_main and start.classes not in (None, classes):
        print(
            f"segment: the data have {describe(classes)}, {config.encoder} {describe(start.classes)}: "
            "the last layers start anew",
            flush=True,
        )
    select(model, config.decor.present(model), config.decor.accepts)  # raises now: evaluation observes them
    model = synchronise(model.to(procs.device), procs)
    optimizer, decor = transfer.build_optimizers(config, model)

    total, rate = config.schedule(len(training))
    files = [
        *training.files,
        *(f"held out: {name}" for name in held_out.files),
        *(f"class {number}: {name}" for number, name in enumerate(classes)),
    ]
    run, found = open_run(config, procs, files)
    step = 0 if found is None else found[1]["step"]
    batches = transfer.training_batches(config, training, total, step, procs, collate)
    config.check_sample(
        model.encoder.num_prefix_tokens + model.encoder.patch_embed.num_patches, procs.world_size
    )
    evaluator = Evaluator(config, model, start.architecture, classes, held_out, preprocess, procs)
    loop = Loop(
        config=config,
        processes=procs,
        run=run,
        files=files,
        model=model,
        optimizer=optimizer,
        decor=decor,
        loss=lambda model, batch: segmentation_loss(model(batch["image"]), batch["mask"], IGNORE),
        evaluate=evaluator,
        total_steps=total,
        rate=rate,
    )
    if found is not None:
        loop.load(*found)
    return loop, evaluator, iter(batches)


def parse(arguments: list[str] | None = None) -> Config:
    """The configuration from the command line and YAML files."""
    return parse_config(Config, "train/segment.py", __doc__, arguments)


def main(arguments: list[str] | None = None) -> None:
    """Fine-tune."""
    run_script("segment", parse, prepare, write_results, arguments)


if __name__ == "__main__":
    main()
