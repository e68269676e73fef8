"""Images with a class for each pixel: ADE20K, folders of images and masks, or synthetic scenes.

Every training sample (its crop and its augmentation) is a function of (seed, epoch, index) alone, as in
`train.data`, for runs that are resumed or spread over more processes.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

from train import scenes
from train.augment import Chooser
from train.data import (
    IMAGE_EXTENSIONS,
    DataError,
    Images,
    by_hash,
    choose_subset,
    decode,
    list_images,
    seeded,
)

IGNORE = 255  # label of the pixels that count neither in the loss nor in metrics
MAX_CLASSES = 255
ADE20K_CLASSES = 150
HELD_OUT = 0.2  # part of the images that is held out where the source has no split of its own
CROP_TRIES = 10
TRAINING_SCENES = 2_000
HELD_OUT_SCENES = 200


@dataclass
class SegmentedConfig:
    """Where images with masks come from, and what training does to them.

    Args:
        source: "scenes": synthetic scenes of ten textures, composed from photographs that ship with
            scikit-image and scikit-learn. "ade20k:ROOT": ADE20K with 150 classes in its official layout,
            ROOT/images and ROOT/annotations, both with training and validation. "folder:ROOT": ROOT/train
            and ROOT/val, both with images and masks of the same names; or images and masks in ROOT itself,
            of which a fifth is held out, the same in every run. Masks are PNG files of class numbers, 255
            where there is none; the names of the classes are the lines of ROOT/classes.txt.
        workers: Loader processes per training process; 0 loads in the training process itself.
        fraction: Part of the training images to use, above 0 and at most 1.
        subset_seed: Chooses which images make up the fraction, independently of the seed of the run.
        short_side: Pixels to which the shorter side of an image is brought, in training before the random
            scale; null leaves images as they are. Scenes have img_size from the outset.
        scale: Smallest and largest factor by which training resizes images.
        max_category: Largest part of a crop that one class may take, of the pixels that have a class
            (mmsegmentation's cat_max_ratio); the last of 10 tries is taken anyway.
        flip: Chance of a mirrored image.
        distort: Chance of each change of brightness, contrast, saturation and hue.

    Raises:
        ValueError: If a value is out of its range.
    """

    source: str = "scenes"
    workers: int = 0
    fraction: float = 1.0
    subset_seed: int = 0
    short_side: int | None = None
    scale: tuple[float, float] = (0.5, 2.0)
    max_category: float = 0.75
    flip: float = 0.5
    distort: float = 0.5

    def __post_init__(self):
        kind, _, path = self.source.partition(":")
        if self.source != "scenes" and not (kind in ("ade20k", "folder") and path):
            raise ValueError(
                f"data.source: expected 'scenes', 'ade20k:ROOT' or 'folder:ROOT', got {self.source!r}"
            )
        if self.workers < 0:
            raise ValueError(f"data.workers: expected at least 0, got {self.workers}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"data.fraction: expected a part in (0, 1], got {self.fraction}")
        if not 0 <= self.subset_seed < 2**63:
            raise ValueError(f"data.subset_seed: expected at least 0 and below 2**63, got {self.subset_seed}")
        if self.short_side is not None and self.short_side < 1:
            raise ValueError(f"data.short_side: expected null or at least 1 pixel, got {self.short_side}")
        if self.short_side is not None and self.source == "scenes":
            raise ValueError("data.short_side: has no meaning for scenes, which are composed in img_size")
        if not 0 < self.scale[0] <= self.scale[1] < float("inf"):
            raise ValueError(f"data.scale: expected two factors, 0 < min <= max, got {self.scale}")
        if not 0 < self.max_category <= 1:
            raise ValueError(f"data.max_category: expected a part in (0, 1], got {self.max_category}")
        for name in ("flip", "distort"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name}: expected a chance in [0, 1], got {getattr(self, name)}")


class Pair(NamedTuple):
    """An image and its mask as they are stored.

    Attributes:
        pixels: uint8 [3, H, W].
        values: Of the mask's pixels, integers [H, W]; [H, W, C] where the file is no mask.
        file: Name of the mask, for messages.
    """

    pixels: Tensor
    values: Tensor
    file: str


def check_channels(values: Tensor, file: str) -> None:
    """Raise DataError unless what was read from a file can be a mask, that is, [H, W]."""
    if values.ndim != 2:
        raise DataError(f"{file}: expected one channel of class numbers, got {values.shape[2]} channels")


@dataclass(frozen=True)
class Coding:
    """What the values in stored masks mean.

    Args:
        classes: Names of the classes, in the order of their values.
        first: Value of the first class.
        ignored: Value of the pixels without a class.
    """

    classes: tuple[str, ...]
    first: int = 0
    ignored: int = IGNORE

    def decode(self, pair: Pair) -> Tensor:
        """Bring a stored mask to the labels 0 to C - 1, and IGNORE: uint8 [H, W].

        Raises:
            DataError: It is no mask of class numbers, has another size than its image, or a value that is
                no class; the message names the file.
        """
        values, size = pair.values, tuple(pair.pixels.shape[1:])
        check_channels(values, pair.file)
        if tuple(values.shape) != size:
            raise DataError(
                f"{pair.file}: expected a mask of its image's size {size}, got {tuple(values.shape)}"
            )
        last = self.first + len(self.classes) - 1
        ignored = values == self.ignored
        unknown = ~ignored & ((values < self.first) | (values > last))
        if unknown.any():
            raise DataError(
                f"{pair.file}: expected labels {self.first} to {last}, or {self.ignored} for none, "
                f"got {int(values[unknown][0])}"
            )
        return torch.where(ignored, IGNORE, values - self.first).to(torch.uint8)


class SegmentedSample(NamedTuple):
    """One image with its mask, ready for the model.

    Attributes:
        image: float32 [3, H, W]; in evaluation a list of such.
        mask: Labels 0 to C - 1, or IGNORE: uint8 [H, W]; in evaluation of the size that it is stored in,
            which need not be the image's.
        skipped: (name, reason) of the images that could not be read, or whose masks could not, and that this
            one replaces.
    """

    image: Tensor | list[Tensor]
    mask: Tensor
    skipped: list[tuple[str, str]]


class SegmentedSet(Dataset):
    """Images with masks; `dataset[epoch, index]` is a function of (seed, epoch, index) alone.

    A pair with an unreadable file is replaced by the next. A mask that does not fit its image, or the
    classes, is an error: masks of another data set would be skipped one and all.

    Args:
        images: Where they come from; a Pair each.
        coding: Of the masks.
        transform: From uint8 [3, H, W] and uint8 [H, W] to a sample's image and mask; may draw random numbers
            of torch.
        seed: Of what the transform draws, a 64-bit integer.

    Raises:
        ValueError: None of the images can be read.
        DataError: A mask does not fit, the first one here and others when they are taken.
    """

    def __init__(
        self,
        images: Images,
        coding: Coding,
        transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        seed: int,
    ):
        coding.decode(images.read(0)[0])  # fails now rather than in the first step
        self.images = images
        self.coding = coding
        self.transform = transform
        self.seed = seed

    @property
    def files(self) -> list[str]:
        """Names of the images, in order."""
        return self.images.names

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> SegmentedSample:
        epoch, index = key
        pair, skipped = self.images.read(index)
        mask = self.coding.decode(pair)
        with seeded(self.seed, epoch, index):
            return SegmentedSample(*self.transform(pair.pixels, mask), skipped)


def collate(samples: list[SegmentedSample]) -> dict[str, Tensor | list]:
    """Stack B training samples: image [B, 3, H, W], mask int64 [B, H, W], and one list of all skipped."""
    return {
        "image": torch.stack([sample.image for sample in samples]),
        "mask": torch.stack([sample.mask for sample in samples]).long(),
        "skipped": [record for sample in samples for record in sample.skipped],
    }


def collate_whole(samples: list[SegmentedSample]) -> dict[str, list]:
    """List samples of any sizes, without those that stand in for others, and beside them all skipped."""
    return {
        "samples": [sample for sample in samples if not sample.skipped],
        "skipped": [record for sample in samples for record in sample.skipped],
    }


class Preprocess:
    """What is done to all images: resizing that keeps the ratio, and normalisation.

    Args:
        short_side: Of the result, in pixels; None for the image's own size.
        mean: Of the pixels in [0, 1] by channel, which is taken off.
        std: Of the same, by which they are divided.
    """

    def __init__(self, short_side: int | None, mean: tuple[float, ...], std: tuple[float, ...]):
        self.short_side = short_side
        self.mean = mean
        self.std = std

    def resize(self, pixels: Tensor, scale: float = 1.0) -> Tensor:
        """Bring uint8 [3, h, w] to the short side times a scale: uint8 [3, H, W]."""
        sides = pixels.shape[1:]
        factor = scale if self.short_side is None else scale * self.short_side / min(sides)
        # PyTorch fails to shrink an image to a single pixel.
        size = [max(min(2, side), round(factor * side)) for side in sides]
        return v2.functional.resize(pixels, size, antialias=True)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Normalise uint8 [3, H, W]: float32 [3, H, W]."""
        image = v2.functional.to_dtype(pixels, torch.float32, scale=True)
        return v2.functional.normalize(image, list(self.mean), list(self.std))

    def denormalize(self, image: Tensor) -> Tensor:
        """Undo `normalize`: float32 [3, H, W] in [0, 1]."""
        mean, std = (image.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (image * std + mean).clamp(0, 1)


class Scales:
    """What evaluation does to images: a list of versions, of one or more sizes. Masks stay as they are.

    Args:
        preprocess: For the size that factors are of, and the normalisation.
        factors: Of the sizes.
    """

    def __init__(self, preprocess: Preprocess, factors: tuple[float, ...]):
        self.preprocess = preprocess
        self.factors = factors

    def versions(self, pixels: Tensor) -> list[Tensor]:
        """Uint8 [3, h, w] to float32 [3, H, W] for each factor."""
        preprocess = self.preprocess
        return [preprocess.normalize(preprocess.resize(pixels, factor)) for factor in self.factors]

    def __call__(self, pixels: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor]:
        """Resize and normalise the image alone."""
        return self.versions(pixels), mask


class PhotometricDistort(v2.RandomPhotometricDistort):
    """As torchvision's, but channels keep their order: a red sky is no sky."""

    def make_params(self, flat_inputs: list) -> dict:
        """Draw the changes of one image."""
        return super().make_params(flat_inputs) | {"channel_permutation": None}


class Augment:
    """Random scale, crop, flip and colours of an image, and the same scale, crop and flip of its mask.

    Draws from torch's random numbers.

    Args:
        config: The ranges.
        img_size: Height and width of the crops, in pixels. Smaller images are padded at the bottom and on the
            right, by the mean colour and IGNORE.
        preprocess: What else is done to images.
    """

    def __init__(self, config: SegmentedConfig, img_size: tuple[int, int], preprocess: Preprocess):
        self.config = config
        self.img_size = img_size
        self.preprocess = preprocess
        self.distort = PhotometricDistort(p=config.distort)

    def choose_crop(self, mask: Tensor) -> tuple[int, int, int, int]:
        """Draw top, left, height and width of a crop in which no class takes more than its limit.

        Args:
            mask: Of the whole image, [H, W].
        """
        height, width = (min(sides) for sides in zip(mask.shape, self.img_size, strict=True))
        for _ in range(CROP_TRIES):
            top = int(torch.randint(mask.shape[0] - height + 1, ()))
            left = int(torch.randint(mask.shape[1] - width + 1, ()))
            crop = mask[top : top + height, left : left + width]
            counts = torch.bincount(crop.flatten(), minlength=MAX_CLASSES)[:MAX_CLASSES]  # IGNORE is beyond
            if 0 < counts.max() <= self.config.max_category * counts.sum():
                break
        return top, left, height, width

    def __call__(self, pixels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Augment uint8 [3, h, w] and uint8 [h, w]: float32 [3, H, W] and uint8 [H, W] of img_size."""
        low, high = self.config.scale
        pixels = self.preprocess.resize(pixels, low + (high - low) * float(torch.rand(())))
        # Not NEAREST, as torchvision resizes its own masks: that one is up to half a pixel off the image.
        mask = v2.functional.resize(mask[None], list(pixels.shape[1:]), InterpolationMode.NEAREST_EXACT)
        box = self.choose_crop(mask[0])
        pixels, mask = v2.functional.crop(pixels, *box), v2.functional.crop(mask, *box)
        if torch.rand(()) < self.config.flip:
            pixels, mask = pixels.flip(-1), mask.flip(-1)
        image = self.preprocess.normalize(self.distort(pixels))
        padding = [0, 0, self.img_size[1] - box[3], self.img_size[0] - box[2]]
        return v2.functional.pad(image, padding), v2.functional.pad(mask, padding, fill=IGNORE)[0]


def _read_values(path: Path) -> Tensor:
    try:
        with Image.open(
            path
        ) as image:  # of 1, 8 or 16 bits or with a palette: the numbers as they are stored
            return torch.from_numpy(np.asarray(image).astype(np.int32))
    except Exception as error:  # decoders of broken files raise nearly anything
        raise OSError(f"{path}: {error}") from error


def load_pair(root: Path, masks: dict[str, str], name: str, choose: Chooser) -> Pair:
    """Decode the image file `name` below `root` and its mask, both whole."""
    path = root / masks[name]
    return Pair(decode(root / name).pixels, _read_values(path), str(path))


def load_scene(
    textures: dict[str, list[Tensor]], img_size: tuple[int, int], name: str, choose: Chooser
) -> Pair:
    """Compose the scene of a name, PART/NUMBER, from the textures of its part."""
    part, _, number = name.partition("/")
    keys = list(textures).index(part), int(number)
    return Pair(*scenes.compose(textures[part], img_size, *keys), name)


def find_pairs(root: Path, images: str, masks: str) -> dict[str, str]:
    """Pair the image files below a folder with the PNG files of the same names below another.

    Args:
        root: What the names are relative to.
        images: Folder of the images, relative to it.
        masks: Folder of the masks, relative to it.

    Returns:
        Names of the images, sorted, and the mask of each.

    Raises:
        FileNotFoundError: One of the folders is missing, or holds no image.
        ValueError: Two files of a folder differ by their extension alone, or one has no partner; the message
            names it.
    """
    found = []
    for folder, extensions in ((images, IMAGE_EXTENSIONS), (masks, (".png",))):
        by_stem = {}
        for name in list_images(root / folder):
            stem, _, extension = name.rpartition(".")
            if f".{extension.lower()}" in extensions:
                if stem in by_stem:
                    raise ValueError(f"data.source: {root / by_stem[stem]} and {name} have the same name")
                by_stem[stem] = f"{folder}/{name}"
        found.append(by_stem)
    for these, those, kinds, folder in ((*found, "images", masks), (*reversed(found), "masks", images)):
        alone = [these[stem] for stem in these if stem not in those]
        if alone:
            raise ValueError(
                f"data.source: {len(alone)} of {len(these)} {kinds} have no partner in {root / folder}, "
                f"among them {root / alone[0]}"
            )
    return {name: found[1][stem] for stem, name in found[0].items()}


def read_classes(path: Path) -> tuple[str, ...]:
    """Read the names of classes, one a line.

    Raises:
        ValueError: There are fewer than two, too many, or one twice.
    """
    names = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    if not 2 <= len(names) <= MAX_CLASSES or len(set(names)) < len(names):
        raise ValueError(
            f"{path}: expected 2 to {MAX_CLASSES} different names of classes, one a line, "
            f"got {len(names)}, {len(set(names))} of them different"
        )
    return names


def scan_classes(paths: list[Path]) -> tuple[str, ...]:
    """Number the classes up to the largest label in any of the masks: "class 0" and so on.

    Unreadable masks are passed over.

    Raises:
        ValueError: A mask has several channels, a label is too large, or there are fewer than two.
    """
    largest = -1
    for path in paths:
        try:
            values = _read_values(path)
        except OSError:  # it will be listed as skipped, if its turn comes
            continue
        check_channels(values, str(path))
        labels = values[values != IGNORE]
        if labels.numel() and int(labels.max()) > largest:
            largest = int(labels.max())
            if largest >= MAX_CLASSES:
                raise ValueError(f"{path}: expected labels below {MAX_CLASSES}, or {IGNORE}, got {largest}")
    if largest < 1:
        raise ValueError(
            f"data.source: expected masks with labels from 0 to 1 at least, and {IGNORE} for pixels without "
            f"a class; those of {len(paths)} masks, such as {paths[0]}, are "
            f"{'all without' if largest < 0 else 'all 0'}"
        )
    return tuple(f"class {number}" for number in range(largest + 1))


class Source(NamedTuple):
    """The images of a source.

    Attributes:
        load: Of `Images`; gives a Pair.
        training: Names of the training images.
        held_out: Names of the held-out images.
        coding: Of the masks.
    """

    load: Callable[[str, Chooser], Pair]
    training: list[str]
    held_out: list[str]
    coding: Coding


def _open_scenes(img_size: tuple[int, int]) -> Source:
    textures = dict(zip(("training", "held-out"), scenes.load_textures(), strict=True))
    training, held_out = (
        [f"{part}/{number:04d}" for number in range(count)]
        for part, count in zip(textures, (TRAINING_SCENES, HELD_OUT_SCENES), strict=True)
    )
    coding = Coding(tuple(scenes.TEXTURES), ignored=len(scenes.TEXTURES))
    return Source(functools.partial(load_scene, textures, img_size), training, held_out, coding)


def _open_ade20k(root: Path) -> Source:
    training, held_out = (
        find_pairs(root, f"images/{part}", f"annotations/{part}") for part in ("training", "validation")
    )
    classes = tuple(f"class {number}" for number in range(1, ADE20K_CLASSES + 1))
    info = root / "objectInfo150.txt"  # comes with the masks: a table, the names in its last column
    if info.is_file():
        rows = info.read_text().splitlines()[1:]
        classes = tuple(row.rpartition("\t")[2].partition(",")[0].strip() for row in rows)
        if len(classes) != ADE20K_CLASSES:
            raise ValueError(f"{info}: expected {ADE20K_CLASSES} classes, got {len(classes)}")
    load = functools.partial(load_pair, root, training | held_out)
    return Source(load, list(training), list(held_out), Coding(classes, first=1, ignored=0))


def _open_folder(root: Path) -> Source:
    if (root / "train").is_dir() or (root / "val").is_dir():
        pairs, others = (find_pairs(root, f"{part}/images", f"{part}/masks") for part in ("train", "val"))
        training, held_out = list(pairs), list(others)
        masks = pairs | others
    else:
        masks = find_pairs(root, "images", "masks")
        pairs = masks  # the whole data set has been split at random: its classes are those of either part
        held_out = sorted(by_hash(masks)[: max(1, round(HELD_OUT * len(masks)))])
        training = sorted(set(masks) - set(held_out))
        if not training:
            raise ValueError(f"data.source: expected at least 2 images in {root / 'images'}, got 1")
    names = root / "classes.txt"
    if names.is_file():
        classes = read_classes(names)
    else:
        classes = scan_classes([root / mask for mask in pairs.values()])
    return Source(functools.partial(load_pair, root, masks), training, held_out, Coding(classes))


def build_segmented(
    config: SegmentedConfig,
    img_size: tuple[int, int],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    seed: int,
    scales: tuple[float, ...] = (1.0,),
) -> tuple[SegmentedSet, SegmentedSet, tuple[str, ...]]:
    """Build the training set and the held-out set of a source.

    All names are paired here; files are read when their turn comes, but for the first of each set, and for
    all training masks of a folder without classes.txt, or all of one without train and val.

    Args:
        config: The source, and what training does to its images.
        img_size: Height and width of the crops, in pixels.
        mean: Of the pixels in [0, 1] by channel, which is taken off.
        std: Of the same, by which they are divided.
        seed: Of the training set, a 64-bit integer.
        scales: Factors of the sizes that held-out images come in.

    Returns:
        The two sets, and the names of the classes in the order of their labels.

    Raises:
        FileNotFoundError: A folder is missing or holds no image.
        ValueError: An image or a mask has no partner, the classes cannot be told, no image can be read, or
            the first mask of a set does not fit; the message names the file.
        ModuleNotFoundError: A package with the photographs of scenes is not installed.
    """
    kind, _, path = config.source.partition(":")
    root = Path(path).expanduser()
    if kind == "scenes":
        source = _open_scenes(img_size)
    elif kind == "ade20k":
        source = _open_ade20k(root)
    else:
        source = _open_folder(root)
    preprocess = Preprocess(config.short_side, mean, std)
    training = choose_subset(source.training, config.fraction, config.subset_seed)
    return (
        SegmentedSet(
            Images(training, source.load), source.coding, Augment(config, img_size, preprocess), seed
        ),
        SegmentedSet(Images(source.held_out, source.load), source.coding, Scales(preprocess, scales), seed),
        source.coding.classes,
    )
