"""Images for self-supervised pre-training: a training set, a held-out set and their order.

Every sample (its crop, its flip and the noise that decides its mask) is a function of
(seed, epoch, index) alone, and so is the order of the samples of (seed, epoch). A run that was
stopped and resumed, or that is spread over more processes, therefore sees exactly the same data.
"""

import collections
import functools
import hashlib
import importlib.resources
import importlib.util
import io
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import psutil
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.transforms import v2

from dbpkern.capture import derive_seed
from train import augment
from train.augment import Chooser, Crop, View, whole
from train.processes import progress, tell
from train.shards import Shards, find_shards

# Photographs inside the wheels of scikit-image and scikit-learn, by the folder that holds them.
PHOTOS = {
    "skimage/data": (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "cell.png",
        "chelsea.png",
        "coffee.png",
        "coins.png",
        "grass.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "retina.jpg",
        "rocket.jpg",
    ),
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
}
# Whole photographs, so that no training crop overlaps a held-out one. The two motorcycles show
# one scene and stay on the same side.
HELD_OUT_PHOTOS = ("chelsea.png", "coins.png", "gravel.png", "rocket.jpg")
HELD_OUT_CROPS = 256  # of the held-out photographs, in total

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MAX_HELD_OUT_FILES = 2_000
# Larger images are skipped. Pillow refuses some 179 million pixels by itself, but that limit is
# often lifted by other code.
MAX_PIXELS = 200_000_000
AUTO_CACHE = 2**32  # bytes of decoded images that cache "auto" takes at most


class DataError(ValueError):
    """A file of a data set cannot be what it is taken for; the message names it."""


@dataclass
class DataConfig:
    """Where the training images come from and how they are cropped.

    Args:
        source: "photos": the 18 photographs that ship with scikit-image and scikit-learn, nothing
            is downloaded. "folder:PATH": all image files below PATH, whether they lie in one
            folder or in a sub-folder per class. "wds:PATTERN": the image files in WebDataset shards, that
            is, tar files: a folder of them, wildcards, or braces such as shard-{000000..000099}.tar.
        val: What is held out for evaluation: a part in (0, 1) of the images, the same in every run and for
            every fraction; or all images of another folder, or of other shards, as source names them. null:
            about 2 % of the images, at least 1 and at most 2,000, or four of the photographs.
        fraction: Part of the training images to use, above 0 and at most 1. Held-out images are
            the same for every fraction.
        subset_seed: Chooses which images make up the fraction, independently of the seed of the run.
        files: Text file with the names of the training images, one a line, in place of a fraction: as
            in a run's files.txt, relative to the folder, or shard.tar/member.jpg. Names on it are not
            held out.
        workers: Loader processes per training process; 0 loads in the training process itself.
        crop_scale: Smallest and largest area of a random crop, as parts of the image's area.
        crops_per_photo: Random crops of each photograph that make up one epoch ("photos" only; an
            epoch of the others takes one crop of each file).
        shard_window: Shards whose images are mixed at a time ("wds" only): an epoch takes the shards in
            random order, so many together. 0 mixes all.
        augment_on: Where random crops are resized, flipped and normalised: "host", in the loader, or
            "device", in batches where the model is. Boxes and flips are the same.
        draft: Whether JPEG files may be decoded at 1/2, 1/4 or 1/8 of their size where the crop keeps
            at least img_size. Faster for large images; pixels differ slightly.
        cache: Memory in MiB for decoded images, of each training process: if all images fit, they are
            decoded once, at the start; otherwise each time. "auto" is a quarter of the memory that is free,
            at most 4,096 MiB, shared by the processes of a machine. 0 for none. Samples stay the same.

    Raises:
        ValueError: If a value is out of its range.
    """

    source: str = "photos"
    val: float | str | None = None
    fraction: float = 1.0
    subset_seed: int = 0
    files: str | None = None
    workers: int = 0
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crops_per_photo: int = 64
    shard_window: int = 32
    augment_on: Literal["host", "device"] = "host"
    draft: bool = False
    cache: int | Literal["auto"] = 0

    def __post_init__(self):
        kind, _, path = self.source.partition(":")
        if self.source != "photos" and not (kind in ("folder", "wds") and path):
            raise ValueError(f"source must be 'photos', 'folder:PATH' or 'wds:PATTERN', not {self.source!r}")
        if self.val is not None and self.source == "photos":
            raise ValueError(
                f"val must be null for source 'photos', which has held-out images, not {self.val!r}"
            )
        # A comparison with nan is false: these refuse it as well.
        if self.val == "" or not (self.val is None or isinstance(self.val, str) or 0 < self.val < 1):
            raise ValueError(f"val must be a part above 0 and below 1, a path, or null, not {self.val!r}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be above 0 and at most 1, not {self.fraction}")
        if not 0 <= self.subset_seed < 2**63:
            raise ValueError(f"subset_seed must be at least 0 and below 2**63, not {self.subset_seed}")
        if self.files is not None and self.fraction != 1:
            raise ValueError(f"files and a fraction exclude each other, but fraction is {self.fraction}")
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, not {self.workers}")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must be two areas, 0 < min <= max <= 1, not {self.crop_scale}")
        if self.crops_per_photo < 1:
            raise ValueError(f"crops_per_photo must be at least 1, not {self.crops_per_photo}")
        if self.shard_window < 0:
            raise ValueError(f"shard_window must be at least 0, not {self.shard_window}")
        if self.augment_on not in ("host", "device"):
            raise ValueError(f"augment_on must be 'host' or 'device', not {self.augment_on!r}")
        if self.draft and self.source == "photos":
            raise ValueError("draft has no meaning for source 'photos', which are decoded once")
        check_cache(
            self.cache, "cache", None if self.source != "photos" else "'photos', which are decoded once"
        )
        if self.draft and self.cache != 0:
            raise ValueError(f"cache must be 0 beside draft, which decodes images anew, not {self.cache!r}")


class Sample(NamedTuple):
    """One image, ready for the model, or for `to_images` on its device.

    Attributes:
        image: Normalised crop, float32 [3, H, W]; or the crop as it was decoded, uint8 [3, h, w].
        noise: Uniform in [0, 1), float32 [num_patches]; its order decides which patches are masked.
        skipped: (name, reason) of the files that could not be read and that this image replaces.
        flip: Whether `to_images` has to mirror the crop; None if the image is ready.
        seed: Of what else is random about the image, such as the noise of diffusion.
    """

    image: Tensor
    noise: Tensor
    skipped: list[tuple[str, str]]
    flip: bool | None = None
    seed: int = 0


@contextmanager
def seeded(*keys: int) -> Iterator[None]:
    """Seed torch's CPU random numbers from the keys inside the block; the caller's state is restored."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that one seeds the GPUs as well, which fork_rng leaves out here.
        torch.default_generator.manual_seed(derive_seed(*keys))
        yield


@dataclass(frozen=True)
class Draw:
    """What is random in a sample: its noise, and its view by the size of the image.

    Both are functions of the keys alone, so that an image that cannot be decoded takes nothing from the
    random numbers of the one that replaces it.

    Args:
        keys: Of the random numbers, 64-bit integers.
        num_patches: Length of the noise.
        view: Chooses the view from torch's random numbers.
    """

    keys: tuple[int, ...]
    num_patches: int
    view: Chooser

    @property
    def noise(self) -> Tensor:
        """Uniform in [0, 1), float32 [num_patches]."""
        with seeded(*self.keys):
            return torch.rand(self.num_patches)

    @property
    def seed(self) -> int:
        """For random numbers beside these."""
        return derive_seed(*self.keys, self.num_patches)

    def __call__(self, height: int, width: int) -> View:
        """Choose the view of an image of this size, in pixels."""
        with seeded(*self.keys):
            torch.rand(self.num_patches)  # the noise comes first
            return self.view(height, width)


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
        image = image.crop((left, top, left + w, top + h)).convert("RGB")
        return Crop(v2.functional.pil_to_tensor(image), view)


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


class Images:
    """Images by name, in a fixed order, some of which may turn out to be unreadable.

    One that could not be read is not tried again by the same process.

    Args:
        names: The names, in order; not empty.
        load: Gives the view that a chooser chooses of the image of a name, or raises any exception.

    Attributes:
        decoded: The images in memory, see `keep_decoded`; None where they are read each time.
    """

    def __init__(self, names: list[str], load: Callable[[str, Chooser], Crop]):
        self.names = names
        self.load = load
        self.unreadable: dict[str, str] = {}  # name: reason, as found so far by this process
        self.decoded: Decoded | None = None

    def read(self, index: int, choose: Chooser = whole) -> tuple[Crop, list[tuple[str, str]]]:
        """Read a view of an image or, in place of an unreadable one, of the next (circularly).

        Returns:
            The view's box, uint8 [3, h, w], and (name, reason) of those that were passed over.

        Raises:
            ValueError: If no image at all can be read.
        """
        skipped = []
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


def cache_bytes(setting: int | str) -> int:
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


def keep_decoded(sets: Sequence[Images], setting: int | str) -> None:
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


def load_photos() -> dict[str, Tensor]:
    """Decode the photographs of PHOTOS: name to uint8 [3, H, W].

    Raises:
        ModuleNotFoundError: If scikit-image or scikit-learn is not installed.
    """
    photos = {}
    for folder, names in PHOTOS.items():
        package, _, subfolder = folder.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise ModuleNotFoundError(f"source 'photos' needs the files of {package}: install dbpkern[train]")
        # A module that is found but not executed: importing scikit-learn takes a second.
        root = importlib.resources.files(importlib.util.module_from_spec(spec)) / subfolder
        for name in names:
            with importlib.resources.as_file(root / name) as path:
                photos[name] = decode(path).pixels
    return photos


def cut(photos: dict[str, Tensor], name: str, choose: Chooser) -> Crop:
    """Cut the chosen view out of the decoded photograph `name`."""
    photo = photos[name]
    view = choose(*photo.shape[1:])
    return Crop(v2.functional.crop(photo, *view[:4]), view)


def list_images(root: Path) -> list[str]:
    """List the image files below a folder: sorted paths relative to it, links followed.

    Raises:
        FileNotFoundError: If there is no such folder or it holds no image file.
        OSError: If a sub-folder cannot be listed.
    """

    def fail(error: OSError):
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


def load_member(shards: Shards, name: str, choose: Chooser = whole) -> Crop:
    """Decode the chosen view of the image `name` in a shard."""
    return decode(io.BytesIO(shards.read(name)), choose)


def split_files(
    names: list[str], load: Callable[[str, Chooser], Crop], part: float | None = None
) -> tuple[list[str], list[str]]:
    """Split file names in training and held-out ones, by a hash of the name.

    Args:
        names: Of all files.
        load: As of `Images`.
        part: Of the names, that is held out; None for 2 %, at most MAX_HELD_OUT_FILES.

    Returns:
        Training names, sorted, and held-out names, in the order of the hash, at least 1. At least one of
        them can be read.

    Raises:
        ValueError: If no file can be read, or if none would be left to train on.
    """
    ranked = by_hash(names)
    count = min(len(names) // 50, MAX_HELD_OUT_FILES) if part is None else round(part * len(names))
    count = max(1, count)
    # In a small folder, one broken file may be all that is held out: go on to the first good one.
    _, unreadable = Images(ranked, load).read(0)
    count = max(count, len(unreadable) + 1)
    if count == len(names):
        raise ValueError(
            f"at least 2 readable images are needed, one of them held out: "
            f"{len(names)} found, {len(unreadable)} of them unreadable"
            + ("" if part is None else f", and val {part} would hold out all")
        )
    held_out = ranked[:count]
    return sorted(set(names) - set(held_out)), held_out


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


def read_files(path: Path, names: list[str]) -> list[str]:
    """Read a list of training images, one name a line.

    Args:
        path: The list.
        names: Of all images of the source.

    Returns:
        The listed names, in the order of `names`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it lists no image, one twice, or one that the source does not have.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such list of files: {path}")
    listed = [line for line in path.read_text(errors="surrogateescape").split("\n") if line]
    if not listed:
        raise ValueError(f"{path} lists no image")
    chosen = set(listed)
    if len(chosen) < len(listed):
        counts = collections.Counter(listed)
        twice = [name for name, count in counts.items() if count > 1]
        raise ValueError(f"{path} lists {len(twice)} images more than once, among them {twice[0]!r}")
    unknown = sorted(chosen.difference(names))
    if unknown:
        raise ValueError(
            f"{len(unknown)} of the {len(listed)} images of {path} are not in the source, "
            f"among them {unknown[0]!r}; expected names such as {names[0]!r}"
        )
    return [name for name in names if name in chosen]


class TrainingSet(Dataset):
    """Random crops of images; `dataset[epoch, index]` is a function of (seed, epoch, index) alone.

    Args:
        images: The images to crop.
        img_size: Height and width of the crops, in pixels.
        num_patches: Length of the noise of a sample.
        seed: Seed of crops, flips and noise, a 64-bit integer.
        crop_scale: Smallest and largest area of a crop, as parts of the image's area.
        crops_per_image: Crops of each image per epoch.
        shards: Images in each shard, in the order of the images; None without shards.
        on_device: Whether crops are left as they were decoded, for `to_images` on the device.
        draft: Whether JPEG files may be decoded at a part of their size.

    Raises:
        ValueError: If none of the images can be read.
    """

    def __init__(
        self,
        images: Images,
        img_size: tuple[int, int],
        num_patches: int,
        seed: int,
        crop_scale: tuple[float, float],
        crops_per_image: int,
        shards: list[int] | None = None,
        on_device: bool = False,
        draft: bool = False,
    ):
        images.read(0)  # fails now rather than in the first step
        self.images = images
        self.img_size = img_size
        self.num_patches = num_patches
        self.seed = seed
        self.crops_per_image = crops_per_image
        self.shards = shards
        self.on_device = on_device
        self.view = augment.RandomView(img_size, crop_scale, draft)

    @property
    def files(self) -> list[str]:
        """Names of the images, in order; paths relative to the folder if they come from one."""
        return self.images.names

    def __len__(self) -> int:
        return len(self.files) * self.crops_per_image

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        draw = Draw((self.seed, epoch, index), self.num_patches, self.view)
        crop, skipped = self.images.read(index // self.crops_per_image, draw)
        if self.on_device:
            pixels = augment.bound(crop.pixels, self.img_size)
            return Sample(pixels, draw.noise, skipped, crop.view.flip, draw.seed)
        return Sample(augment.finish(crop, self.img_size), draw.noise, skipped, seed=draw.seed)


class HeldOutSet(Dataset):
    """A fixed list of samples for evaluation, the same in every run and whatever its seed.

    Args:
        images: The images to crop.
        img_size: Height and width of the crops, in pixels.
        num_patches: Length of the noise of a sample.
        crops: Length of the list, as fixed random crops that take the images in turn; None for one
            centre crop of each image.
    """

    def __init__(self, images: Images, img_size: tuple[int, int], num_patches: int, crops: int | None):
        self.images = images
        self.img_size = img_size
        self.num_patches = num_patches
        self.length = len(images.names) if crops is None else crops
        # Not the scale of the run, so that runs with different crops can be compared.
        self.view = (
            augment.Centre(img_size) if crops is None else augment.RandomView(img_size, DataConfig.crop_scale)
        )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} samples")
        draw = Draw((index,), self.num_patches, self.view)
        crop, skipped = self.images.read(index % len(self.images.names), draw)
        return Sample(augment.finish(crop, self.img_size), draw.noise, skipped, seed=draw.seed)


class StepSampler(Sampler[list[tuple[int, int]]]):
    """The (epoch, index) of one process, a list for each micro-batch of each optimizer step.

    The stream of samples is one permutation of the training set after the other, each drawn from
    (seed, epoch). Step s takes the positions [s * batch_size, (s + 1) * batch_size) of the stream, so
    that a batch may span epochs and no sample is dropped. The batch is cut into accumulation *
    world_size equal slices: the first world_size of them are the first micro-batch of each rank,
    and so on.

    With shards, the permutation takes them in random order, cut into as few and as even groups of at most
    `window` shards as there can be, and permutes the samples of a group among themselves: near steps read
    near places, and all processes read the same shards.

    Args:
        num_samples: Length of the training set.
        batch_size: Samples per optimizer step, over all processes and micro-batches.
        seed: Seed of the permutations, a 64-bit integer.
        total_steps: Step to stop before.
        start_step: First step, above 0 for a run that is resumed.
        accumulation: Micro-batches per step.
        rank: Index of this process.
        world_size: Number of processes.
        shards: Samples in each shard, in the order of the samples; None for one permutation of all.
        window: Shards whose samples are mixed; 0 for all.

    Raises:
        ValueError: If the batch cannot be cut into equal slices, if there are more processes than
            samples, or if a number is out of its range.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        total_steps: int,
        start_step: int = 0,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        shards: Sequence[int] | None = None,
        window: int = 0,
    ):
        if accumulation < 1:
            raise ValueError(f"accumulation must be at least 1, not {accumulation}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be at least 0 and below world_size, not {rank} of {world_size}")
        if not 0 <= start_step <= total_steps:
            raise ValueError(f"start_step must be in 0 .. total_steps, not {start_step} of {total_steps}")
        if world_size > num_samples:
            raise ValueError(f"{world_size} processes are more than the {num_samples} training samples")
        slices = world_size * accumulation
        if batch_size < 1 or batch_size % slices:
            below = batch_size // slices * slices
            nearest = f"{below} or {below + slices}" if below > 0 else f"{slices}"
            raise ValueError(
                f"batch_size must be a multiple of world_size * accumulation = "
                f"{world_size} * {accumulation}, not {batch_size}; the nearest: {nearest}"
            )
        if window < 0:
            raise ValueError(f"window must be at least 0, not {window}")
        if shards is not None and sum(shards) != num_samples:
            raise ValueError(f"shards must add up to the {num_samples} samples, not to {sum(shards)}")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.total_steps = total_steps
        self.start_step = start_step
        self.accumulation = accumulation
        self.rank = rank
        self.world_size = world_size
        self.shards = shards
        self.window = window

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # Positions only grow, so that one epoch's permutation is all that is ever kept.
        permutation = functools.lru_cache(maxsize=1)(self._permutation)
        micro_batch_size = self.batch_size // (self.accumulation * self.world_size)
        for micro_batch in range(self.start_step * self.accumulation, self.total_steps * self.accumulation):
            start = (micro_batch * self.world_size + self.rank) * micro_batch_size
            positions = range(start, start + micro_batch_size)
            places = (divmod(position, self.num_samples) for position in positions)
            yield [(epoch, int(permutation(epoch)[place])) for epoch, place in places]

    def _permutation(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        if self.shards is None or self.window == 0:
            return torch.randperm(self.num_samples, generator=generator)
        samples = torch.arange(self.num_samples).split(list(self.shards))
        order = torch.randperm(len(samples), generator=generator)
        parts = []
        for group in order.tensor_split(-(-len(samples) // self.window)):
            mixed = torch.cat([samples[shard] for shard in group.tolist()])
            parts.append(mixed[torch.randperm(len(mixed), generator=generator)])
        return torch.cat(parts)


def open_source(kind: str, path: str) -> tuple[list[str], Callable[[str, Chooser], Crop], Shards | None]:
    """Find the images of a folder or of shards.

    Returns:
        Their names, what loads them, as of `Images`, and the shards.

    Raises:
        FileNotFoundError: If the folder or a shard is missing, or no image is found.
        ValueError: If a shard is damaged.
    """
    if kind == "folder":
        root = Path(path).expanduser()
        return list_images(root), functools.partial(load_file, root), None
    shards = Shards(find_shards(path), IMAGE_EXTENSIONS)
    return shards.names(), functools.partial(load_member, shards), shards


def check_apart(kind: str, source: str, val: str) -> None:
    """Raise ValueError if images of `val` would be trained on as well: both are folders, or both shards."""
    if kind == "folder":
        inside, outside = (Path(path).expanduser().resolve() for path in (val, source))
        both = inside.is_relative_to(outside) or outside.is_relative_to(inside)
    else:
        found = ({shard.resolve() for shard in find_shards(path)} for path in (val, source))
        both = not set.isdisjoint(*found)
    if both:
        raise ValueError(f"val must have no image in common with source {kind}:{source}, not {val!r}")


def build_data(
    config: DataConfig, img_size: tuple[int, int], num_patches: int, seed: int
) -> tuple[TrainingSet, HeldOutSet]:
    """Build the training set and the held-out set of a source.

    A folder is listed and shards are indexed, but images are read only up to the first good one: broken
    ones are skipped when their turn comes, and reported with the sample that replaces them.

    Args:
        config: The source, and how it is cropped.
        img_size: Height and width of the crops, in pixels.
        num_patches: Length of the noise of a sample.
        seed: Seed of the training set's crops and noise, a 64-bit integer.

    Raises:
        FileNotFoundError: If the folder, a shard or the list of files is missing, or no image is found.
        ValueError: If fewer than two images of the source, or none of the training images, can be read; if
            a shard is damaged; if the list of files does not fit the source.
        ModuleNotFoundError: If a package with the photographs is not installed.
    """
    kind, _, path = config.source.partition(":")
    shards = None
    crops_per_image, held_out_crops = 1, None
    if kind == "photos":
        photos = load_photos()
        load = held_out_load = functools.partial(cut, photos)
        found = list(photos)
        names = [name for name in found if name not in HELD_OUT_PHOTOS]
        held_out = list(HELD_OUT_PHOTOS)
        crops_per_image, held_out_crops = config.crops_per_photo, HELD_OUT_CROPS
    else:
        found, load, shards = open_source(kind, path)
        if isinstance(config.val, str):
            check_apart(kind, path, config.val)
            names = found
            held_out, held_out_load, _ = open_source(kind, config.val)
            Images(held_out, held_out_load).read(0)  # fails now rather than in the first evaluation
        else:
            names, held_out = split_files(found, load, config.val)
            held_out_load = load
    if config.files is None:
        names = choose_subset(names, config.fraction, config.subset_seed)
    else:
        names = read_files(Path(config.files).expanduser(), found)
        if not isinstance(config.val, str):  # names of another folder may be the same
            chosen = set(names)
            rest = [name for name in held_out if name not in chosen]
            if not rest:
                raise ValueError(
                    f"{config.files} leaves no image to hold out: it lists all of "
                    f"{', '.join(held_out[:3])} ..."
                )
            held_out = rest
    training, held_out = Images(names, load), Images(held_out, held_out_load)
    keep_decoded((training, held_out), config.cache)
    training_set = TrainingSet(
        training,
        img_size,
        num_patches,
        seed,
        config.crop_scale,
        crops_per_image,
        None if shards is None else shards.sizes(names),
        config.augment_on == "device",
        config.draft,
    )
    return training_set, HeldOutSet(held_out, img_size, num_patches, held_out_crops)


def collate(samples: list[Sample]) -> dict[str, Tensor | list]:
    """Stack B samples: image [B, 3, H, W], noise [B, num_patches], and one list of all skipped.

    Crops for `to_images` have different sizes: image is padded, uint8 [B, 3, max h, max w], beside it are
    size [B, 2] and flip [B].
    """
    batch = {
        "noise": default_collate([sample.noise for sample in samples]),
        "skipped": [record for sample in samples for record in sample.skipped],
    }
    images = [sample.image for sample in samples]
    if samples[0].flip is None:
        return batch | {"image": default_collate(images)}
    padded, sizes = augment.pad(images)
    return batch | {"image": padded, "size": sizes, "flip": torch.tensor([s.flip for s in samples])}


def to_images(batch: dict[str, Tensor], img_size: tuple[int, int]) -> Tensor:
    """Finish a batch's images where they are, if the loader has not: float32 [B, 3, H, W] of img_size."""
    if "size" not in batch:
        return batch["image"]
    return augment.finish_batch(batch["image"], batch["size"], batch["flip"], img_size)


def _heed_parent_alone(_: int) -> None:
    # Stopping is for the process that trains: it still needs its loaders to finish the step, and torchrun
    # and Ctrl-C signal all processes. But when it exits itself, multiprocessing sends it SIGTERM and waits.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # of the threads to come, too
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)  # with another code, the training process would report a loader that died

    threading.Thread(target=wait, daemon=True).start()


def build_loader(
    dataset: Dataset, sampler: Iterable[list], workers: int, pin_memory: bool, collate: Callable = collate
) -> DataLoader:
    """Build the loader of the batches that `collate` makes.

    The (name, reason) of skipped files come with the batches because a loader process has no other
    way to report them. A file is reported each time it is met: `dict.update` keeps one of each.

    Args:
        dataset: Where the samples come from.
        sampler: Gives a list of the dataset's keys for each batch: a StepSampler for a TrainingSet,
            lists of indices for a HeldOutSet.
        workers: Loader processes, each with one torch thread (torch's own choice); 0 for none. There are no
            more than batches, where the sampler knows how many these are.
        pin_memory: Whether batches are copied to page-locked memory, for faster transfers to a GPU.
        collate: Makes a batch of a list of samples.
    """
    if isinstance(sampler, Sized):
        workers = min(workers, len(sampler))
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=_heed_parent_alone,
        generator=torch.Generator(),  # it would draw from the caller's random numbers otherwise
    )
