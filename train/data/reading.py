"""Image files: found, decoded, kept in memory, split and chosen by name."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Generic, Literal, NamedTuple, NoReturn, Protocol, TypeVar

import psutil
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from dbpkern.capture import derive_seed
from train.data import augment
from train.data.augment import Chooser, Crop, whole
from train.engine.processes import progress, tell

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# Larger images are skipped. Pillow refuses some 179 million pixels by itself, but that limit is
# often lifted by other code.
MAX_PIXELS = 200_000_000
AUTO_CACHE = 2**32  # bytes of decoded images that cache "auto" takes at most

ReadT = TypeVar("ReadT")
ReadT_co = TypeVar("ReadT_co", covariant=True)


class DataError(ValueError):
    """A file of a data set cannot be what it is taken for; the message names it."""


@contextmanager
def seeded(*keys: int) -> Iterator[None]:
    """Seed torch's CPU random numbers from the keys inside the block; the caller's state is restored."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that one seeds the GPUs as well, which fork_rng leaves out here.
        torch.default_generator.manual_seed(derive_seed(*keys))
        yield


def decode(file: str | Path | BinaryIO, choose: Chooser = whole) -> Crop:
    """Read a view of an image file (the first frame, if there are more) as RGB, uint8 [3, h, w].

    Args:
        file: A path or an open file.
        choose: Gives the view of an image of some height and width, in pixels.

    Raises:
        ValueError: If it has more than MAX_PIXELS pixels or is not of 8 bits per channel.
        Exception: Whatever Pillow raises for a broken file, OSError in most cases.
    """
    with Image.open(file) as image:  # reads the header alone
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} is more than {MAX_PIXELS} pixels")
        if image.mode[0] in "IF":  # 16 or 32 bits, which convert() would clip to white
            raise ValueError(f"mode {image.mode!r} is not of 8 bits per channel")
        view = choose(height, width)
        if view.reduction > 1:
            image.draft(None, (width // view.reduction, height // view.reduction))  # JPEG alone
        top, left, h, w = augment.scaled_box(view, (height, width), image.size[::-1])
        box = image.crop((left, top, left + w, top + h)).convert("RGB")
        return Crop(v2.functional.pil_to_tensor(box), view)


class Held(Protocol[ReadT_co]):
    """Images that are in memory."""

    def cut(self, index: int, choose: Chooser) -> ReadT_co | None:
        """Copy the chosen view of an image; None if it is not here."""


class Decoded(NamedTuple):
    """Decoded images in one block of memory.

    Processes of a loader share the block, whether they are forked or not, as nothing is written to it: there
    is no Python object, with a count of references, for each image.

    Attributes:
        block: The pixels of one image after the other, uint8 [n], each [H, W, 3].
        places: Of each image, its offset in the block, height and width, int64 [N, 3]; height 0 for one that
            is not here.
    """

    block: Tensor
    places: Tensor

    def cut(self, index: int, choose: Chooser) -> Crop | None:
        """Copy the chosen view of an image, with the strides that `decode` gives; None if it is not here."""
        start, height, width = self.places[index].tolist()
        if height == 0:
            return None
        view = choose(height, width)
        image = self.block[start : start + 3 * height * width].view(height, width, 3)
        box = image[view.top : view.top + view.height, view.left : view.left + view.width]
        return Crop(box.clone(memory_format=torch.contiguous_format).permute(2, 0, 1), view)


class Images(Generic[ReadT]):
    """Images by name, in a fixed order, some of which may turn out to be unreadable.

    One that could not be read is not tried again by the same process.

    Args:
        names: The names, in order; not empty.
        load: Gives the view that a chooser chooses of the image of a name, or raises any exception.

    Attributes:
        decoded: The images in memory, see `keep_decoded`; None where they are read each time.
    """

    def __init__(self, names: list[str], load: Callable[[str, Chooser], ReadT]):
        self.names = names
        self.load = load
        self.unreadable: dict[str, str] = {}  # name: reason, as found so far by this process
        self.decoded: Held[ReadT] | None = None

    def read(self, index: int, choose: Chooser = whole) -> tuple[ReadT, list[tuple[str, str]]]:
        """Read a view of an image or, in place of an unreadable one, of the next (circularly).

        Returns:
            The view's box, uint8 [3, h, w], and (name, reason) of those that were passed over.

        Raises:
            ValueError: If no image at all can be read.
        """
        skipped: list[tuple[str, str]] = []
        for i in range(len(self.names)):
            place = (index + i) % len(self.names)
            crop = None if self.decoded is None else self.decoded.cut(place, choose)
            if crop is not None:
                return crop, skipped
            name = self.names[place]
            if name not in self.unreadable:
                try:
                    return self.load(name, choose), skipped
                except Exception as error:  # decoders of broken files raise nearly anything
                    self.unreadable[name] = f"{type(error).__name__}: {error}"
            skipped.append((name, self.unreadable[name]))
        examples = "; ".join(f"{name} ({reason})" for name, reason in skipped[:3])
        raise ValueError(f"none of {len(self.names)} images can be read, among them: {examples}")


def cache_bytes(setting: int | Literal["auto"]) -> int:
    """Bytes that a process may take for decoded images, by `DataConfig.cache`."""
    if setting == "auto":
        free = min(AUTO_CACHE, psutil.virtual_memory().available // 4)
        return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return setting * 2**20


def check_cache(setting: int | str, name: str, kept: str | None) -> None:
    """Raise ValueError unless a setting of this name can be one of `DataConfig.cache`.

    Args:
        setting: The value.
        name: For the message.
        kept: The source, if it is in memory anyway.
    """
    if setting != "auto" and not (isinstance(setting, int) and setting >= 0):
        raise ValueError(f"{name} must be a number of MiB of at least 0, or 'auto', not {setting!r}")
    if kept is not None and setting != 0:
        raise ValueError(f"{name} has no meaning for source {kept}")


def keep_decoded(sets: Sequence[Images[Crop]], setting: int | Literal["auto"]) -> None:
    """Decode all images of some sets into memory, if they fit; those that cannot be read stay as they are.

    Args:
        sets: The images. All of their `decoded` are set, or none.
        setting: The memory for all of them, as `DataConfig.cache`.
    """
    limit = cache_bytes(setting)
    if not limit:
        return
    block, tables = bytearray(), [torch.zeros(len(images.names), 3, dtype=torch.int64) for images in sets]
    everything = [(number, index) for number, images in enumerate(sets) for index in range(len(images.names))]
    for number, index in progress(everything, "decoding", "image"):
        images = sets[number]
        try:
            pixels = images.load(images.names[index], whole).pixels
        except Exception:  # it will be listed as skipped when its turn comes
            continue
        if len(block) + pixels.numel() > limit:
            tell(
                f"data.cache: {len(everything)} images take more than {limit / 2**20:.0f} MiB, so that each "
                "is decoded when its turn comes"
            )
            return
        tables[number][index] = torch.tensor([len(block), *pixels.shape[1:]])
        block += pixels.permute(1, 2, 0).contiguous().numpy().data
    if block:
        shared = torch.frombuffer(block, dtype=torch.uint8)
        for images, places in zip(sets, tables, strict=True):
            images.decoded = Decoded(shared, places)


def list_images(root: Path) -> list[str]:
    """List the image files below a folder: sorted paths relative to it, links followed.

    Raises:
        FileNotFoundError: If there is no such folder or it holds no image file.
        OSError: If a sub-folder cannot be listed.
    """

    def fail(error: OSError) -> NoReturn:
        raise error

    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {root}")
    names = []
    for folder, _, files in os.walk(root, onerror=fail, followlinks=True):
        relative = Path(folder).relative_to(root).as_posix()
        prefix = "" if relative == "." else f"{relative}/"  # a Path for each of a million files takes long
        names += [prefix + file for file in files if file.lower().endswith(IMAGE_EXTENSIONS)]
    if not names:
        raise FileNotFoundError(f"no image file ({' '.join(IMAGE_EXTENSIONS)}) below {root}")
    return sorted(names)


def load_file(root: Path, name: str, choose: Chooser = whole) -> Crop:
    """Decode the chosen view of the image file `name` below `root`."""
    return decode(root / name, choose)


def by_hash(names: Iterable[str]) -> list[str]:
    """Names in a random order in which each has its place whatever others there are."""
    return sorted(names, key=lambda name: hashlib.blake2b(os.fsencode(name), digest_size=8).digest())


def choose_split(asked: str | None, root: Path, folders: str = "{}") -> str:
    """Name the part of a folder that evaluation takes: the one asked for, val, or test where that is alone.

    Args:
        asked: "val" or "test"; None for whatever is there.
        root: The folder.
        folders: Where a part lies in it, with {} for the part.
    """
    val, test = ((root / folders.format(part)).is_dir() for part in ("val", "test"))
    return asked or ("test" if test and not val else "val")


def choose_subset(names: list[str], fraction: float, subset_seed: int) -> list[str]:
    """Choose a random part of the names, at least one, and keep their order."""
    generator = torch.Generator().manual_seed(subset_seed)
    count = max(1, round(fraction * len(names)))
    chosen = torch.randperm(len(names), generator=generator)[:count]
    return [names[i] for i in chosen.sort().values.tolist()]
