"""Images with a class for each pixel: ADE20K, Cityscapes, folders with masks, or synthetic scenes.

Every training sample (its crop and its augmentation) is a function of (seed, epoch, index) alone, as in
`train.data`, for runs that are resumed or spread over more processes.
"""

import functools
import itertools
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

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
    choose_split,
    choose_subset,
    decode,
    list_images,
    seeded,
)
from train.processes import progress

IGNORE = 255  # label of the pixels that count neither in the loss nor in metrics
UNKNOWN = 256  # beside labels: a value that is no class, where that is an error
MAX_CLASSES = 255
ADE20K_CLASSES = 150
# The classes that Cityscapes evaluates, and their ids among its 34.
CITYSCAPES = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
REST = "rest"  # as ignored values: all that are no class's
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
            ROOT/images and ROOT/annotations, both with training and validation. "cityscapes:ROOT": Cityscapes
            with 19 classes in its official layout, ROOT/leftImg8bit and ROOT/gtFine, both with train and val.
            "folder:ROOT": ROOT/images and ROOT/annotations, both with train and val; ROOT/train and ROOT/val,
            both with images and masks; or images and masks in ROOT itself, of which a fifth is held out, the
            same in every run. Masks are PNG files with the names of their images. The names of the classes
            are the lines of ROOT/classes.txt.
        split: Part that evaluation takes of a folder with parts, "val" or "test"; null for val, or for test
            where there is no val.
        classes: Of a folder, in place of classes.txt: the name of each class and its value in the masks, or
            a list of values, such as {road: 7, vehicle: [26, 27]}. A value is a number (of masks with a
            palette, the index), or a colour of RGB masks, such as "#804080". null: the classes are the
            numbers from 0 that are not ignored.
        ignored: Of a folder, the value or values in masks of the pixels without a class, or "rest" for all
            that are no class; null for 255, or for none in colours.
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
    split: Literal["val", "test"] | None = None
    classes: dict[str, int | str | list[int | str]] | None = None
    ignored: int | str | list[int | str] | None = None
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
        if self.source != "scenes" and not (kind in ("ade20k", "cityscapes", "folder") and path):
            raise ValueError(
                "data.source: expected 'scenes', 'ade20k:ROOT', 'cityscapes:ROOT' or 'folder:ROOT', got "
                f"{self.source!r}"
            )
        for name in ("split", "classes", "ignored"):
            if kind != "folder" and getattr(self, name) is not None:
                raise ValueError(
                    f"data.{name}: is for folder:ROOT; expected null for {kind}, got {getattr(self, name)!r}"
                )
        if self.split not in (None, "val", "test"):
            raise ValueError(f"data.split: expected null, 'val' or 'test', got {self.split!r}")
        self._check_values()
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

    @property
    def colours(self) -> bool:
        """Whether classes are colours of RGB masks."""
        return self.classes is not None and any(
            isinstance(value, str) for values in self.classes.values() for value in as_list(values)
        )

    def _check_values(self) -> None:
        kinds = {"data.classes": itertools.chain(*map(as_list, (self.classes or {}).values()))}
        if self.ignored not in (None, REST):
            kinds["data.ignored"] = as_list(self.ignored)
        seen = set()
        for name, values in kinds.items():
            expected = "colours such as '#804080'" if self.colours else "numbers from 0 to 65535"
            if name == "data.ignored":
                expected += ", or 'rest'"
            for value in values:
                if self.colours:
                    fits = isinstance(value, str) and re.fullmatch("#[0-9a-fA-F]{6}", value)
                else:
                    fits = isinstance(value, int) and 0 <= value < 2**16
                if not fits:
                    raise ValueError(f"{name}: expected {expected}, got {value!r}")
                if to_number(value) in seen:
                    raise ValueError(f"{name}: expected each value once, got {value!r} again")
                seen.add(to_number(value))
        if self.classes is not None and not (
            2 <= len(self.classes) <= MAX_CLASSES and all(as_list(v) for v in self.classes.values())
        ):
            raise ValueError(
                f"data.classes: expected 2 to {MAX_CLASSES} classes with a value each, got {self.classes}"
            )


def as_list(values: int | str | Iterable[int | str]) -> list[int | str]:
    """One value or several as a list."""
    return [values] if isinstance(values, int | str) else list(values)


def to_number(value: int | str) -> int:
    """A value in masks as a number: a colour's is 65536 red + 256 green + blue."""
    return int(value[1:], 16) if isinstance(value, str) else value


class Pair(NamedTuple):
    """An image and its mask as they are stored.

    Attributes:
        pixels: uint8 [3, H, W].
        values: Of the mask's pixels, integers [H, W], colours by `to_number`; [H, W, C] where the file is no
            mask.
        file: Name of the mask, for messages.
    """

    pixels: Tensor
    values: Tensor
    file: str


def check_channels(values: Tensor, file: str) -> None:
    """Raise DataError unless what was read from a file can be a mask, that is, [H, W]."""
    if values.ndim != 2:
        raise DataError(
            f"{file}: expected one channel of class numbers, got {values.shape[2]} channels; where they are "
            "colours, data.classes tells the classes"
        )


def in_words(values: Collection[int], colours: bool) -> str:
    """Values of masks in a few words, runs of numbers by their ends."""
    if colours:
        shown = [f"#{value:06x}" for value in itertools.islice(values, 4)]
        return ", ".join([*shown, "..."] if len(values) > len(shown) else shown)
    runs = []
    for _, run in itertools.groupby(enumerate(sorted(values)), lambda pair: pair[1] - pair[0]):
        numbers = [value for _, value in run]
        runs.append(f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}")
    return ", ".join(runs)


@dataclass(frozen=True)
class Coding:
    """What the values in stored masks mean.

    Args:
        classes: Names of the classes, in the order of their labels.
        labels: The label, 0 to C - 1, of each value of a class.
        ignored: Values of the pixels without a class; None for all that are no class's.
        colours: Whether the values are those of colours.
    """

    classes: tuple[str, ...]
    labels: dict[int, int]
    ignored: frozenset[int] | None = frozenset({IGNORE})
    colours: bool = False

    @classmethod
    def numbered(cls, classes: tuple[str, ...], ignored: frozenset[int] | None) -> "Coding":
        """The coding in which the classes are the numbers from 0 that are not ignored."""
        numbers = (number for number in itertools.count() if number not in (ignored or ()))
        return cls(classes, dict(zip(numbers, range(len(classes)), strict=False)), ignored)

    @functools.cached_property
    def _table(self) -> Tensor:
        """The label of each value up to the largest known, UNKNOWN for others and at the end, int16."""
        known = dict.fromkeys(self.ignored or (), IGNORE) | self.labels
        other = IGNORE if self.ignored is None else UNKNOWN
        table = torch.full((max(known) + 2,), other, dtype=torch.int16)
        for value, label in known.items():
            table[value] = label
        return table

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
        labels = self._table[values.int().clamp(max=len(self._table) - 1)]
        unknown = labels == UNKNOWN
        if unknown.any():
            none = f", or {in_words(self.ignored, self.colours)} for none" if self.ignored else ""
            raise DataError(
                f"{pair.file}: expected {'colours' if self.colours else 'labels'} "
                f"{in_words(self.labels, self.colours)}{none}, "
                f"got {in_words([int(values[unknown][0])], self.colours)}"
            )
        return labels.to(torch.uint8)


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


def _read_values(path: Path, colours: bool = False) -> Tensor:
    try:
        with Image.open(path) as image:
            if colours:
                red, green, blue = np.asarray(image.convert("RGB")).astype(np.int32).transpose(2, 0, 1)
                return torch.from_numpy(red << 16 | green << 8 | blue)
            # Of 1, 8 or 16 bits or with a palette: the numbers as they are stored.
            return torch.from_numpy(np.asarray(image).astype(np.int32))
    except Exception as error:  # decoders of broken files raise nearly anything
        raise OSError(f"{path}: {error}") from error


def load_pair(root: Path, masks: dict[str, str], colours: bool, name: str, choose: Chooser) -> Pair:
    """Decode the image file `name` below `root` and its mask, of numbers or colours, both whole."""
    path = root / masks[name]
    return Pair(decode(root / name).pixels, _read_values(path, colours), str(path))


def load_scene(
    textures: dict[str, list[Tensor]], img_size: tuple[int, int], name: str, choose: Chooser
) -> Pair:
    """Compose the scene of a name, PART/NUMBER, from the textures of its part."""
    part, _, number = name.partition("/")
    keys = list(textures).index(part), int(number)
    return Pair(*scenes.compose(textures[part], img_size, *keys), name)


def find_pairs(root: Path, images: str, masks: str, endings: tuple[str, str] = ("", "")) -> dict[str, str]:
    """Pair the image files below a folder with the PNG files of the same names below another.

    Args:
        root: What the names are relative to.
        images: Folder of the images, relative to it.
        masks: Folder of the masks, relative to it.
        endings: Of the names of images and masks before the extension, by which they differ; files without
            are left out.

    Returns:
        Names of the images, sorted, and the mask of each.

    Raises:
        FileNotFoundError: One of the folders is missing, or holds no image.
        ValueError: Two files of a folder differ by their extension alone, or one has no partner; the message
            names it.
    """
    found = []
    kinds = zip((images, masks), endings, (IMAGE_EXTENSIONS, (".png",)), strict=True)
    for folder, ending, extensions in kinds:
        by_stem = {}
        for name in list_images(root / folder):
            stem, _, extension = name.rpartition(".")
            if f".{extension.lower()}" in extensions and stem.endswith(ending):
                stem = stem.removesuffix(ending)
                if stem in by_stem:
                    raise ValueError(f"data.source: {root / by_stem[stem]} and {name} have the same name")
                by_stem[stem] = f"{folder}/{name}"
        if not by_stem:
            endings = " or ".join(f"*{ending}{extension}" for extension in extensions)
            raise FileNotFoundError(f"no image file {endings} below {root / folder}")
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


def scan_classes(paths: list[Path], ignored: frozenset[int]) -> tuple[str, ...]:
    """Name the classes up to the largest label in any of the masks by their numbers: "class 0" and so on.

    Unreadable masks are passed over.

    Args:
        paths: Of the masks.
        ignored: Values that are no class.

    Raises:
        ValueError: A mask has several channels, a label is too large, or there are fewer than two.
    """
    largest = -1
    none = torch.tensor(sorted(ignored), dtype=torch.int32)
    for path in progress(paths, "counting classes", "mask"):
        try:
            values = _read_values(path)
        except OSError:  # it will be listed as skipped, if its turn comes
            continue
        check_channels(values, str(path))
        labels = values[~torch.isin(values, none)]
        if labels.numel() and int(labels.max()) > largest:
            largest = int(labels.max())
            if largest >= MAX_CLASSES:
                raise ValueError(
                    f"{path}: expected labels below {MAX_CLASSES}, or {in_words(ignored, False)}, "
                    f"got {largest}"
                )
    numbers = [number for number in range(largest + 1) if number not in ignored]
    if len(numbers) < 2:
        least = itertools.islice((number for number in itertools.count() if number not in ignored), 2)
        raise ValueError(
            f"data.source: expected masks with labels from {' to '.join(map(str, least))} at least, and "
            f"{in_words(ignored, False)} for pixels without a class; those of {len(paths)} masks, such as "
            f"{paths[0]}, are {f'all {numbers[0]}' if numbers else 'all without'}"
        )
    return tuple(f"class {number}" for number in numbers)


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
    coding = Coding.numbered(tuple(scenes.TEXTURES), frozenset({len(scenes.TEXTURES)}))
    return Source(functools.partial(load_scene, textures, img_size), training, held_out, coding)


def _from_parts(root: Path, training: dict[str, str], held_out: dict[str, str], coding: Coding) -> Source:
    load = functools.partial(load_pair, root, training | held_out, coding.colours)
    return Source(load, list(training), list(held_out), coding)


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
    return _from_parts(root, training, held_out, Coding.numbered(classes, frozenset({0})))


def _open_cityscapes(root: Path) -> Source:
    endings = ("_leftImg8bit", "_gtFine_labelIds")
    training, held_out = (
        find_pairs(root, f"leftImg8bit/{part}", f"gtFine/{part}", endings) for part in ("train", "val")
    )
    labels = {value: label for label, value in enumerate(CITYSCAPES.values())}
    return _from_parts(root, training, held_out, Coding(tuple(CITYSCAPES), labels, ignored=None))


def _coding_of(config: SegmentedConfig, root: Path, masks: Iterable[str]) -> Coding:
    """What the values in the masks of a folder mean, which are read if nothing else tells the classes."""
    if config.ignored == REST:
        ignored = None
    elif config.ignored is None:
        ignored = frozenset() if config.colours else frozenset({IGNORE})
    else:
        ignored = frozenset(map(to_number, as_list(config.ignored)))
    if config.classes is not None:
        labels = {
            to_number(value): label
            for label, values in enumerate(config.classes.values())
            for value in as_list(values)
        }
        return Coding(tuple(config.classes), labels, ignored and ignored.difference(labels), config.colours)
    names = root / "classes.txt"
    if names.is_file():
        return Coding.numbered(read_classes(names), ignored)
    if ignored is None:
        raise ValueError(
            f"data.ignored: 'rest' are the values that are no class; expected {names} or data.classes, which "
            "tell the classes"
        )
    return Coding.numbered(scan_classes([root / mask for mask in masks], ignored), ignored)


def _open_folder(config: SegmentedConfig, root: Path) -> Source:
    def has_parts(place: str) -> bool:
        return any((root / place.format(part)).is_dir() for part in ("train", "val", "test"))

    layouts = {"annotations/{}": ("images/{}", "annotations/{}"), "{}": ("{}/images", "{}/masks")}
    layout = next((folders for place, folders in layouts.items() if has_parts(place)), None)
    if layout is None:
        masks = find_pairs(root, "images", "masks")
        if config.split is not None:
            raise ValueError(
                f"data.split: is for folders with parts; expected {root / config.split} or "
                f"{root / 'annotations' / config.split}, or null, for a fifth of {root / 'images'}"
            )
        # The whole data set is split at random: its classes are those of either part.
        coding = _coding_of(config, root, masks.values())
        held_out = sorted(by_hash(masks)[: max(1, round(HELD_OUT * len(masks)))])
        training = sorted(set(masks) - set(held_out))
        if not training:
            raise ValueError(f"data.source: expected at least 2 images in {root / 'images'}, got 1")
        return Source(functools.partial(load_pair, root, masks, coding.colours), training, held_out, coding)
    training, held_out = (
        find_pairs(root, *(folder.format(part) for folder in layout))
        for part in ("train", choose_split(config.split, root, layout[0]))
    )
    return _from_parts(root, training, held_out, _coding_of(config, root, training.values()))


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
    all training masks of a folder whose classes nothing tells, or all of one without parts.

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
    elif kind == "cityscapes":
        source = _open_cityscapes(root)
    else:
        source = _open_folder(config, root)
    preprocess = Preprocess(config.short_side, mean, std)
    training = choose_subset(source.training, config.fraction, config.subset_seed)
    return (
        SegmentedSet(
            Images(training, source.load), source.coding, Augment(config, img_size, preprocess), seed
        ),
        SegmentedSet(Images(source.held_out, source.load), source.coding, Scales(preprocess, scales), seed),
        source.coding.classes,
    )
