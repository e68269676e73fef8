"""Masks: files with a class for each pixel, and what the values in them mean."""

import functools
import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from train.data.augment import Chooser
from train.data.reading import (
    IMAGE_EXTENSIONS,
    DataError,
    decode,
    list_images,
)
from train.engine.processes import progress

IGNORE = 255  # label of the pixels that count neither in the loss nor in metrics
UNKNOWN = 256  # beside labels: a value that is no class, where that is an error
MAX_CLASSES = 255


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


def read_values(path: Path, colours: bool = False) -> Tensor:
    """Read the values in a mask, int32 [H, W], colours by `to_number`; [H, W, C] where it has C channels.

    Raises:
        OSError: The file cannot be read; the message names it.
    """
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
    return Pair(decode(root / name).pixels, read_values(path, colours), str(path))


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
        by_stem: dict[str, str] = {}
        for name in list_images(root / folder):
            stem, _, extension = name.rpartition(".")
            if f".{extension.lower()}" in extensions and stem.endswith(ending):
                stem = stem.removesuffix(ending)
                if stem in by_stem:
                    raise ValueError(f"data.source: {root / by_stem[stem]} and {name} have the same name")
                by_stem[stem] = f"{folder}/{name}"
        if not by_stem:
            patterns = " or ".join(f"*{ending}{extension}" for extension in extensions)
            raise FileNotFoundError(f"no image file {patterns} below {root / folder}")
        found.append(by_stem)
    pictures, labels = found
    for these, those, what, folder in (
        (pictures, labels, "images", masks),
        (labels, pictures, "masks", images),
    ):
        alone = [these[stem] for stem in these if stem not in those]
        if alone:
            raise ValueError(
                f"data.source: {len(alone)} of {len(these)} {what} have no partner in {root / folder}, "
                f"among them {root / alone[0]}"
            )
    return {name: labels[stem] for stem, name in pictures.items()}


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
            values = read_values(path)
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
