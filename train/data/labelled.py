"""Labelled images: a folder for each class, or the digits that ship with scikit-learn.

Every training sample (its crop, its augmentation and how it is mixed with another) is a function of
(seed, epoch, index) alone, as in `train.data.pretraining`, for runs that are resumed or spread over more
processes.
"""

import functools
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, auto_augment, create_transform
from timm.data.mixup import mixup_target
from timm.data.transforms import ResizeKeepRatio
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from dbpkern.capture import derive_seed
from train.data.augment import Chooser, Crop, View
from train.data.reading import Images, check_cache, choose_split, keep_decoded, load_file, seeded
from train.data.samples import Batch, SampleSet

HELD_OUT = 0.2  # part of each class that is held out where the source has no split of its own


@dataclass
class LabelledConfig:
    """Where labelled images come from and how they are cropped.

    Args:
        source: "digits": the 1,797 handwritten digits, grey and of 8 x 8 pixels, that ship with scikit-learn.
            "folder:PATH": image files in a sub-folder of PATH/train for each class, and the same classes in
            PATH/val or PATH/test for evaluation; or sub-folders of PATH itself. Digits, and folders without
            these parts, are split: a fifth of each class is held out, the same in every run.
        split: Part that evaluation takes of a folder with parts, "val" or "test"; null for val, or for test
            where there is no val.
        fraction: Part of the training images to use, above 0 and at most 1. Below 1 it has the same number
            of each class, at least one.
        subset_seed: Chooses which images make up the fraction, independently of the seed of the run.
        workers: Loader processes per training process; 0 loads in the training process itself.
        crop_scale: Smallest and largest area of a random crop, as parts of the image's area.
        crop_padding: Pixels of black that are put around the image before a random crop of img_size, in place
            of crop_scale: 4 is usual for images of 32 pixels. Images that are not of img_size are resized
            before, so that they cover it. null for crop_scale.
        crop_pct: Side of the centre crop of evaluation, as a part of the image's shorter side.
        cache: Memory in MiB for decoded images, of each training process: if all images fit, they are
            decoded once, at the start; otherwise each time. "auto" is a quarter of the memory that is free,
            at most 4,096 MiB, shared by the processes of a machine. 0 for none. Samples stay the same.
    """

    source: str = "digits"
    split: Literal["val", "test"] | None = None
    fraction: float = 1.0
    subset_seed: int = 0
    workers: int = 0
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_padding: int | None = None
    crop_pct: float = 0.875
    cache: int | Literal["auto"] = 0

    def __post_init__(self) -> None:
        kind, _, path = self.source.partition(":")
        if self.source != "digits" and not (kind == "folder" and path):
            raise ValueError(f"data.source: expected 'digits' or 'folder:PATH', got {self.source!r}")
        if self.split not in (None, "val", "test"):
            raise ValueError(f"data.split: expected null, 'val' or 'test', got {self.split!r}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"data.fraction: expected a part in (0, 1], got {self.fraction}")
        if not 0 <= self.subset_seed < 2**63:
            raise ValueError(f"data.subset_seed: expected at least 0 and below 2**63, got {self.subset_seed}")
        if self.workers < 0:
            raise ValueError(f"data.workers: expected at least 0, got {self.workers}")
        check_cache(
            self.cache, "data.cache", "digits, which are in memory" if self.source == "digits" else None
        )
        if self.crop_padding is not None and self.crop_padding < 0:
            raise ValueError(f"data.crop_padding: expected null or at least 0, got {self.crop_padding}")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"data.crop_scale: expected two areas, 0 < min <= max <= 1, got {self.crop_scale}"
            )
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"data.crop_pct: expected a part in (0, 1], got {self.crop_pct}")


@dataclass
class AugmentConfig:
    """What training does to images and labels beside the crop, all by timm.

    Args:
        policy: timm's string for RandAugment and its like; null for none.
        flip: Chance of a mirrored image.
        erase: Chance of a box of noise in an image.
        mixup: Parameter of the Beta distribution of mixup's weights; 0 for none.
        cutmix: The same of CutMix's areas. With both, half of the pairs of images get each.
        smoothing: Part of a label that goes to all classes.
    """

    policy: str | None = "rand-m9-mstd0.5-inc1"
    flip: float = 0.5
    erase: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        for name in ("flip", "erase", "smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name}: expected a part in [0, 1], got {getattr(self, name)}")
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"augment.{name}: expected a number >= 0, got {getattr(self, name)}")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, which needs pairs of them."""
        return self.mixup > 0 or self.cutmix > 0


def posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    """As timm's, but black where no bit is kept: timm's policies ask for that, which Pillow 13 refuses."""
    return auto_augment.posterize(image, bits_to_keep) if bits_to_keep else Image.new(image.mode, image.size)


auto_augment.NAME_TO_OP |= {
    name: posterize
    for name, operation in auto_augment.NAME_TO_OP.items()
    if operation is auto_augment.posterize
}


@contextmanager
def all_seeded(*keys: int) -> Iterator[None]:
    """As `seeded`, and the random numbers of Python and NumPy, too: timm draws from all three."""
    states = random.getstate(), np.random.get_state()
    seed = derive_seed(*keys)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        with seeded(*keys):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


class LabelledSample(NamedTuple):
    """One image, ready for the model.

    Attributes:
        image: float32 [3, H, W].
        label: Number of its class.
        seed: Of how it is mixed.
        skipped: (name, reason) of the files that could not be read and that this image replaces.
    """

    image: Tensor
    label: int
    seed: int
    skipped: list[tuple[str, str]]


class LabelledSet(SampleSet[LabelledSample]):
    """Images with labels; `dataset[epoch, index]` is a function of (seed, epoch, index) alone.

    Args:
        images: Where they come from.
        labels: Number of each one's class.
        transform: From a PIL image to float32 [3, H, W]; may draw random numbers.
        seed: Of what the transform draws, a 64-bit integer.

    Raises:
        ValueError: None of the images can be read.
    """

    def __init__(
        self,
        images: Images[Crop],
        labels: list[int],
        transform: Callable[[Image.Image], Tensor],
        seed: int,
    ):
        images.read(0)  # fails now rather than in the first step
        self.images = images
        self.labels = labels
        self.transform = transform
        self.seed = seed

    @property
    def files(self) -> list[str]:
        """Names of the images, in order."""
        return self.images.names

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> LabelledSample:
        epoch, index = key
        crop, skipped = self.images.read(index)
        label = self.labels[(index + len(skipped)) % len(self)]  # of the image that was read
        with all_seeded(self.seed, epoch, index):
            image = self.transform(v2.functional.to_pil_image(crop.pixels))
        return LabelledSample(image, label, derive_seed(self.seed, epoch, index, 1), skipped)


class LabelledBatch(Batch):
    """What `collate` gives.

    Attributes:
        image: float32 [B, 3, H, W].
        label: Numbers of the classes, int64 [B].
    """

    image: Tensor
    label: Tensor


class MixedBatch(LabelledBatch):
    """What a `Mixer` gives.

    Attributes:
        target: Weights of the classes [B, C].
    """

    target: Tensor


def collate(samples: list[LabelledSample]) -> LabelledBatch:
    """Stack B samples: image [B, 3, H, W], label [B], and one list of all skipped."""
    return {
        "image": torch.stack([sample.image for sample in samples]),
        "label": torch.tensor([sample.label for sample in samples]),
        "skipped": [record for sample in samples for record in sample.skipped],
    }


class Mixer:
    """As `collate`, for training: each image is mixed with its neighbour in the batch.

    timm's `Mixup` pairs the first image of a batch with the last, and gives all pairs one weight or one box.
    Here neighbours are a pair, with a weight or box of its own: that does not depend on how a batch is cut
    into micro-batches and spread over processes.

    Args:
        augment: How images are mixed.
        num_classes: C.
    """

    def __init__(self, augment: AugmentConfig, num_classes: int):
        self.num_classes = num_classes
        self.smoothing = augment.smoothing
        self.mixup = None
        if augment.mixes:
            self.mixup = Mixup(
                augment.mixup, augment.cutmix, label_smoothing=augment.smoothing, num_classes=num_classes
            )

    def __call__(self, samples: list[LabelledSample]) -> MixedBatch:
        """Stack B samples, mixed in place; "target" are the weights of the classes [B, C]."""
        batch = collate(samples)
        if self.mixup is None:
            target = mixup_target(batch["label"], self.num_classes, smoothing=self.smoothing)
            return {**batch, "target": target}
        targets = []
        pairs = zip(samples[::2], batch["image"].split(2), batch["label"].split(2), strict=True)
        for first, images, labels in pairs:
            with all_seeded(first.seed):
                targets.append(self.mixup(images, labels)[1])  # changes the images in place
        return {**batch, "target": torch.cat(targets)}


def take_digit(pixels: Tensor, name: str, choose: Chooser) -> Crop:
    """The image of a digit by its name, uint8 [3, 8, 8]."""
    return Crop(pixels[int(name.rpartition("-")[2])].expand(3, -1, -1), View(0, 0, 8, 8))


def _read_digits() -> tuple[Images[Crop], list[int], tuple[str, ...]]:
    from sklearn.datasets import load_digits  # takes a second

    data = load_digits()
    pixels = torch.from_numpy((data.images * (255 / 16)).round().astype(np.uint8))  # of 0 to 16
    names = [f"digit-{i:04d}" for i in range(len(pixels))]
    images = Images(names, functools.partial(take_digit, pixels[:, None]))
    return images, data.target.tolist(), tuple(str(name) for name in data.target_names)


def _read_folder(root: Path, part: str = "") -> tuple[Images[Crop], list[int], tuple[str, ...]]:
    folder = ImageFolder(str(root / part))  # FileNotFoundError where there are no classes, or empty ones
    names = [Path(os.path.relpath(path, root)).as_posix() for path, _ in folder.samples]
    images = Images(names, functools.partial(load_file, root))
    return images, [label for _, label in folder.samples], tuple(folder.classes)


def _split(
    images: Images[Crop], labels: list[int]
) -> tuple[tuple[Images[Crop], list[int]], tuple[Images[Crop], list[int]]]:
    from sklearn.model_selection import train_test_split  # takes a second

    try:
        parts = train_test_split(range(len(labels)), test_size=HELD_OUT, random_state=0, stratify=labels)
    except ValueError as error:
        raise ValueError(f"data.source: a fifth of each class cannot be held out: {error}") from error
    first, second = (
        (Images([images.names[i] for i in part], images.load), [labels[i] for i in part])
        for part in map(sorted, parts)
    )
    return first, second


def choose_balanced(
    labels: list[int], classes: tuple[str, ...], fraction: float, subset_seed: int
) -> list[int]:
    """Choose a random part of labelled images, as many of each class: their indices, ascending.

    A smaller fraction lies in a larger one.

    Args:
        labels: Number of each image's class.
        classes: Names of the classes.
        fraction: Of all images, in (0, 1]; 1 takes all.
        subset_seed: Of the choice.

    Raises:
        ValueError: A class has fewer images than each would have to give.
    """
    if fraction == 1:
        return list(range(len(labels)))
    count = max(1, round(fraction * len(labels) / len(classes)))
    members: list[list[int]] = [[] for _ in classes]
    for index, label in enumerate(labels):
        members[label].append(index)
    chosen = []
    for label, own in enumerate(members):
        if len(own) < count:
            raise ValueError(
                f"data.fraction: {fraction} of {len(labels)} images takes {count} of each of the "
                f"{len(classes)} classes, but {classes[label]!r} has {len(own)}; expected a smaller part, "
                "or 1 for all images"
            )
        generator = torch.Generator().manual_seed(derive_seed(subset_seed, label))
        chosen += [own[i] for i in torch.randperm(len(own), generator=generator)[:count].tolist()]
    return sorted(chosen)


def build_labelled(
    config: LabelledConfig,
    augment: AugmentConfig,
    img_size: tuple[int, int],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    seed: int,
) -> tuple[LabelledSet, LabelledSet, tuple[str, ...]]:
    """Build the training set and the held-out set of a source.

    Args:
        config: The source, and how it is cropped.
        augment: What else training does to images.
        img_size: Height and width of the crops, in pixels.
        mean: Of the pixels in [0, 1] by channel, which is taken off.
        std: Of the same, by which they are divided.
        seed: Of the training set, a 64-bit integer.

    Returns:
        The two sets, and the names of the classes in the order of their numbers.

    Raises:
        FileNotFoundError: The folder is missing, has no folders for classes, or one of them is empty.
        ValueError: Training and evaluation have other classes, a class is too small to split or for the
            fraction, no image can be read, or timm does not know the policy of augmentation.
    """
    common: dict[str, Any] = {
        "input_size": (3, *img_size),
        "interpolation": "bicubic",
        "mean": mean,
        "std": std,
    }
    try:
        random_crop = create_transform(
            is_training=True,
            scale=config.crop_scale,
            hflip=augment.flip,
            color_jitter=None,  # type: ignore[arg-type]  # timm takes None for none
            auto_augment=augment.policy,
            re_prob=augment.erase,
            re_mode="pixel",
            **common,
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(f"augment.policy: timm does not know {augment.policy!r}: {error}") from error
    if config.crop_padding is not None:
        # As DeiT does for small images: timm's transforms but for the first, which crops and resizes.
        random_crop.transforms[:1] = [
            ResizeKeepRatio(img_size, longest=0, interpolation="bicubic"),
            v2.RandomCrop(img_size, padding=config.crop_padding),
        ]
    centre_crop = create_transform(is_training=False, crop_pct=config.crop_pct, **common)
    kind, _, path = config.source.partition(":")
    root = Path(path).expanduser()
    if kind == "folder" and not root.is_dir():
        raise FileNotFoundError(f"data.source: no such folder: {root}")
    if kind == "folder" and any((root / part).is_dir() for part in ("train", "val", "test")):
        part = choose_split(config.split, root)
        images, labels, classes = _read_folder(root, "train")
        apart, apart_labels, others = _read_folder(root, part)
        held_out = apart, apart_labels
        if classes != others:
            odd = sorted(set(classes) ^ set(others))
            raise ValueError(
                f"data.source: expected the same classes in {root / 'train'} and {root / part}, but only "
                f"one has {', '.join(odd[:5])}"
            )
    else:
        if config.split is not None:
            raise ValueError(
                f"data.split: is for folders with parts, such as PATH/{config.split}; expected null for "
                f"{config.source}, got {config.split!r}"
            )
        images, labels, classes = _read_digits() if kind == "digits" else _read_folder(root)
        (images, labels), held_out = _split(images, labels)
    chosen = choose_balanced(labels, classes, config.fraction, config.subset_seed)
    images = Images([images.names[i] for i in chosen], images.load)
    keep_decoded((images, held_out[0]), config.cache)
    training = LabelledSet(images, [labels[i] for i in chosen], random_crop, seed)
    return training, LabelledSet(*held_out, centre_crop, seed), classes
