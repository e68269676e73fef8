"""Images with a class for each pixel: ADE20K, Cityscapes, folders with masks, or synthetic scenes.

Every training sample (its crop and its augmentation) is a function of (seed, epoch, index) alone, as in
`train.data.pretraining`, for runs that are resumed or spread over more processes.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from train.data import scenes
from train.data.augment import Chooser
from train.data.masks import (
    IGNORE,
    MAX_CLASSES,
    Coding,
    Pair,
    as_list,
    find_pairs,
    load_pair,
    read_classes,
    scan_classes,
    to_number,
)
from train.data.reading import (
    Images,
    by_hash,
    choose_split,
    choose_subset,
    seeded,
)
from train.data.samples import Batch, SampleSet

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

    def __post_init__(self) -> None:
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
        kinds: dict[str, Iterable[int | str]] = {
            "data.classes": itertools.chain(*map(as_list, (self.classes or {}).values()))
        }
        if self.ignored not in (None, REST):
            kinds["data.ignored"] = as_list(self.ignored)
        seen: set[int] = set()
        for name, values in kinds.items():
            expected = "colours such as '#804080'" if self.colours else "numbers from 0 to 65535"
            if name == "data.ignored":
                expected += ", or 'rest'"
            for value in values:
                if self.colours:
                    fits = isinstance(value, str) and bool(re.fullmatch("#[0-9a-fA-F]{6}", value))
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


ImageT = TypeVar("ImageT")
ImageT_co = TypeVar("ImageT_co", covariant=True)


class SegmentedSample(NamedTuple, Generic[ImageT]):
    """One image with its mask, ready for the model.

    Attributes:
        image: float32 [3, H, W]; in evaluation a list of such.
        mask: Labels 0 to C - 1, or IGNORE: uint8 [H, W]; in evaluation of the size that it is stored in,
            which need not be the image's.
        skipped: (name, reason) of the images that could not be read, or whose masks could not, and that this
            one replaces.
    """

    image: ImageT
    mask: Tensor
    skipped: list[tuple[str, str]]


class Transform(Protocol[ImageT_co]):
    """What is done to the images and masks of a set.

    Attributes:
        preprocess: The part of it that is done to all images.
    """

    preprocess: "Preprocess"

    def __call__(self, pixels: Tensor, mask: Tensor) -> tuple[ImageT_co, Tensor]:
        """From uint8 [3, H, W] and uint8 [H, W] to a sample's image and mask."""


class SegmentedSet(SampleSet[SegmentedSample[ImageT]]):
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
        images: Images[Pair],
        coding: Coding,
        transform: Transform[ImageT],
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

    def __getitem__(self, key: tuple[int, int]) -> SegmentedSample[ImageT]:
        epoch, index = key
        pair, skipped = self.images.read(index)
        mask = self.coding.decode(pair)
        with seeded(self.seed, epoch, index):
            return SegmentedSample(*self.transform(pair.pixels, mask), skipped)


class SegmentedBatch(Batch):
    """What `collate` gives.

    Attributes:
        image: float32 [B, 3, H, W].
        mask: Labels or IGNORE, int64 [B, H, W].
    """

    image: Tensor
    mask: Tensor


class WholeBatch(Batch):
    """What `collate_whole` gives.

    Attributes:
        samples: Of any sizes.
    """

    samples: list[SegmentedSample[list[Tensor]]]


def collate(samples: list[SegmentedSample[Tensor]]) -> SegmentedBatch:
    """Stack B training samples: image [B, 3, H, W], mask int64 [B, H, W], and one list of all skipped."""
    return {
        "image": torch.stack([sample.image for sample in samples]),
        "mask": torch.stack([sample.mask for sample in samples]).long(),
        "skipped": [record for sample in samples for record in sample.skipped],
    }


def collate_whole(samples: list[SegmentedSample[list[Tensor]]]) -> WholeBatch:
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

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
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


def load_scene(
    textures: dict[str, list[Tensor]], img_size: tuple[int, int], name: str, choose: Chooser
) -> Pair:
    """Compose the scene of a name, PART/NUMBER, from the textures of its part."""
    part, _, number = name.partition("/")
    keys = list(textures).index(part), int(number)
    return Pair(*scenes.compose(textures[part], img_size, *keys), name)


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
        pairs = find_pairs(root, "images", "masks")
        if config.split is not None:
            raise ValueError(
                f"data.split: is for folders with parts; expected {root / config.split} or "
                f"{root / 'annotations' / config.split}, or null, for a fifth of {root / 'images'}"
            )
        # The whole data set is split at random: its classes are those of either part.
        coding = _coding_of(config, root, pairs.values())
        rest = sorted(by_hash(pairs)[: max(1, round(HELD_OUT * len(pairs)))])
        names = sorted(set(pairs) - set(rest))
        if not names:
            raise ValueError(f"data.source: expected at least 2 images in {root / 'images'}, got 1")
        return Source(functools.partial(load_pair, root, pairs, coding.colours), names, rest, coding)
    images, masks = layout
    training, held_out = (
        find_pairs(root, images.format(part), masks.format(part))
        for part in ("train", choose_split(config.split, root, images))
    )
    return _from_parts(root, training, held_out, _coding_of(config, root, training.values()))


def build_segmented(
    config: SegmentedConfig,
    img_size: tuple[int, int],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    seed: int,
    scales: tuple[float, ...] = (1.0,),
) -> tuple[SegmentedSet[Tensor], SegmentedSet[list[Tensor]], tuple[str, ...]]:
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
