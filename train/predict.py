"""Segment images with a model of train/segment.py, or export it.

    python train/predict.py --segmenter runs/a --images photos --out masks
    python train/predict.py --segmenter runs/a --export model.pt2

Writes out/masks/NAME.png, the number of the class of every pixel, and out/overlays/NAME.png, the image under
the classes' colours. `docs/segmentation.md` tells more.
"""

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import ArgumentParser
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms import v2
from tqdm import tqdm

from models.segmentation import LoadedSegmenter, SegmentationModel, load_segmenter, multiscale_logits
from train.data.reading import decode, list_images
from train.data.segmented import Preprocess, Scales
from train.engine import plots, processes
from train.engine.run_folder import write_atomically
from train.tasks.segmentation import EvaluationConfig

BATCH = 4  # windows in one call of the model


@dataclass
class Config:
    """Masks of images, or an exported model.

    Args:
        segmenter: segmenter.safetensors, or the folder of a finished run of train/segment.py.
        images: An image file, or a folder of them with its sub-folders; null to export alone.
        out: Folder of the results.
        first: Number of the first class in the masks; 1 for submissions to ADE20K.
        evaluation: How images are segmented. The window is that of training.
        export: File to export the model to, with the ending .pt2.
        device: "auto", "cpu" or "cuda".
    """

    segmenter: str
    images: str | None = None
    out: str | None = None
    first: int = 0
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    export: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def check(self) -> None:
        """Raise ValueError for settings out of range or that do not go together."""
        if (self.images is None) != (self.out is None):
            raise ValueError("images, out: expected both or none")
        if self.images is None and self.export is None:
            raise ValueError("images: expected a file or a folder; or --export")
        if self.first not in (0, 1):
            raise ValueError(f"first: expected 0 or 1, got {self.first}")
        if self.export is not None and Path(self.export).suffix != ".pt2":
            raise ValueError(f"export: expected the name of a .pt2 file, got {self.export}")


def find_segmenter(path: str) -> LoadedSegmenter:
    """Load a file, or that in the folder of a run.

    Raises:
        FileNotFoundError, ValueError: as `load_segmenter`.
    """
    place = Path(path)
    loaded = load_segmenter(place / "segmenter.safetensors" if place.is_dir() else place)
    loaded.model.eval()
    return loaded


class Predictor:
    """The labels of single images.

    Args:
        loaded: The model.
        evaluation: How images are segmented.
        device: Where.

    Raises:
        ValueError: The stride does not fit the model's window.
    """

    def __init__(self, loaded: LoadedSegmenter, evaluation: EvaluationConfig, device: torch.device):
        pixels = resolve_model_data_config(loaded.model.encoder)
        self.model = loaded.model.to(device)
        self.window = tuple(loaded.model.encoder.patch_embed.img_size)
        self.stride = evaluation.windows(self.window)
        self.flip = evaluation.flip
        self.device = device
        preprocess = Preprocess(loaded.short_side, pixels["mean"], pixels["std"])
        self.scales = Scales(preprocess, evaluation.scales)

    def __call__(self, pixels: Tensor) -> Tensor:
        """The class of each pixel of an image, uint8 [3, H, W] to uint8 [H, W]."""
        versions = [version[None].to(self.device) for version in self.scales.versions(pixels)]
        logits = multiscale_logits(
            self.model, versions, pixels.shape[1:], self.window, self.stride, self.flip, BATCH
        )
        return logits[0].argmax(0).to(torch.uint8).cpu()


def find_images(path: Path) -> dict[Path, Path]:
    """The image files of a path and the names of what is made of each, without endings.

    Raises:
        FileNotFoundError: There is no such file or folder, or no image in it.
        ValueError: Two files differ by their extension alone.
    """
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"images: no such file or folder: {path}")
        return {path: Path(path.stem)}
    found: dict[Path, Path] = {}
    for name in list_images(path):
        made = Path(name).with_suffix("")
        if made in found:
            raise ValueError(f"images: {path / found[made]} and {name} would have the same masks")
        found[made] = Path(name)
    return {path / name: made for made, name in found.items()}


def png(pixels: Tensor) -> bytes:
    """A PNG file of uint8 [H, W] or [3, H, W]."""
    file = io.BytesIO()
    array = pixels.numpy() if pixels.ndim == 2 else pixels.permute(1, 2, 0).numpy()
    Image.fromarray(array).save(file, "png")
    return file.getvalue()


def predict(config: Config, predictor: Predictor, images: dict[Path, Path]) -> Iterator[tuple[Path, str]]:
    """Write masks and overlays of images; gives those that cannot be read, with the reason."""
    assert config.out is not None  # beside images
    colours = plots.colour_table()
    for path, name in tqdm(images.items(), unit="image", mininterval=1):
        try:
            pixels = decode(path).pixels
        except Exception as error:  # decoders of broken files raise nearly anything
            yield path, f"{type(error).__name__}: {error}"
            continue
        labels = predictor(pixels)
        over = v2.functional.to_dtype(pixels, torch.float32) + colours[labels.long()].permute(2, 0, 1)
        for folder, picture in (("masks", labels + config.first), ("overlays", (over / 2).to(torch.uint8))):
            target = Path(config.out) / folder / f"{name}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, png(picture))


class Logits(nn.Module):
    """A segmentation model that gives its logits alone."""

    def __init__(self, model: SegmentationModel):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to logits [B, C, H, W]."""
        return self.model(images).logits


def export(loaded: LoadedSegmenter) -> bytes:
    """The content of a .pt2 file: a graph from images [B, 3, H, W] to logits [B, C, H, W].

    B, H and W are free, but H and W are multiples of the model's `multiple`, and of "upernet" and "dpt" no
    less than twice that. Beside the graph are the classes, and mean and deviation of the pixels.

    Raises:
        RuntimeError: The graph does not compute what the model does.
    """
    model = Logits(loaded.model.cpu().eval())
    rows, columns = loaded.model.multiple
    least = 1 if loaded.model.head == "linear" else 2
    dynamic = {
        0: torch.export.Dim("batch", min=1),
        2: rows * torch.export.Dim("rows", min=least),
        3: columns * torch.export.Dim("columns", min=least),
    }
    channels = loaded.model.encoder.in_chans
    example = torch.randn(2, channels, 3 * rows, 2 * columns)
    graph = torch.export.export(model, (example,), dynamic_shapes=(dynamic,))
    pixels = resolve_model_data_config(loaded.model.encoder)
    about = {"classes": loaded.classes, "mean": pixels["mean"], "std": pixels["std"]}
    file = io.BytesIO()
    torch.export.save(graph, file, extra_files={"about.json": json.dumps(about)})
    again = torch.export.load(io.BytesIO(file.getvalue())).module()
    for batch, height, width in ((1, least, least + 1), (3, 4, 3)):
        images = torch.randn(batch, channels, height * rows, width * columns)
        with torch.no_grad():
            expected, found = model(images), again(images)
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item()):
            error = (found - expected).abs().max().item()
            raise RuntimeError(f"the exported graph is off by {error:g} for images of {list(images.shape)}")
    return file.getvalue()


def run(config: Config) -> int:
    """Do what is asked for; gives the number of images that could not be read.

    Raises:
        ValueError, FileNotFoundError: what the user asked for cannot be done; the message says why.
    """
    config.check()
    device = processes.start(config.device).device
    images = {} if config.images is None else find_images(Path(config.images).expanduser())
    loaded = find_segmenter(config.segmenter)
    if config.export is not None:
        target = Path(config.export)
        target.parent.mkdir(parents=True, exist_ok=True)  # fails now rather than after the work
        write_atomically(target, export(loaded))
        print(f"predict: exported to {target}")
    skipped = 0
    if images:
        predictor = Predictor(loaded, config.evaluation, device)
        for path, reason in predict(config, predictor, images):
            skipped += 1
            tqdm.write(f"predict: {path} was skipped: {reason}", file=sys.stderr)
        print(f"predict: {len(images) - skipped} masks in {config.out}")
    return skipped


def main(arguments: list[str] | None = None) -> None:
    """Segment, and say in one line what went wrong where it is not a defect of the program."""
    parser = ArgumentParser(prog="train/predict.py", description=__doc__)
    parser.add_class_arguments(Config)
    parsed = parser.parse_args(arguments)
    try:
        skipped = run(Config(**parser.instantiate(parsed)))
    except (ValueError, FileNotFoundError) as error:
        print(f"predict: {error}", file=sys.stderr)
        sys.exit(2)
    if skipped:
        print(f"predict: {skipped} images could not be read", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
