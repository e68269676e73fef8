"""Images for self-supervised pre-training: a training set, a held-out set and their order.

Every sample (its crop, its flip and the noise that decides its mask) is a function of
(seed, epoch, index) alone, and so is the order of the samples of (seed, epoch). A run that was
stopped and resumed, or that is spread over more processes, therefore sees exactly the same data.
"""

import functools
import hashlib
import importlib.resources
import importlib.util
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.transforms import InterpolationMode, v2

from dbpkern.sampling import derive_seed

# The statistics of ImageNet, as timm.data.IMAGENET_DEFAULT_MEAN and _STD.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

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


@dataclass
class DataConfig:
    """Where the training images come from and how they are cropped.

    Args:
        source: "photos": the 18 photographs that ship with scikit-image and scikit-learn, nothing
            is downloaded. "folder:PATH": all image files below PATH, whether they lie in one
            folder or in a sub-folder per class; about 2 % of them (at least 1, at most 2,000) are
            held out for evaluation.
        fraction: Part of the training images to use, above 0 and at most 1. Held-out images are
            the same for every fraction.
        subset_seed: Chooses which images make up the fraction, independently of the seed of the run.
        workers: Loader processes per training process; 0 loads in the training process itself.
        crop_scale: Smallest and largest area of a random crop, as parts of the image's area.
        crops_per_photo: Random crops of each photograph that make up one epoch ("photos" only; an
            epoch of a folder takes one crop of each file).

    Raises:
        ValueError: If a value is out of its range.
    """

    source: str = "photos"
    fraction: float = 1.0
    subset_seed: int = 0
    workers: int = 0
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crops_per_photo: int = 64

    def __post_init__(self):
        kind, _, path = self.source.partition(":")
        if self.source != "photos" and not (kind == "folder" and path):
            raise ValueError(f"source must be 'photos' or 'folder:PATH', not {self.source!r}")
        # A comparison with nan is false: these refuse it as well.
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be above 0 and at most 1, not {self.fraction}")
        if not 0 <= self.subset_seed < 2**63:
            raise ValueError(f"subset_seed must be at least 0 and below 2**63, not {self.subset_seed}")
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, not {self.workers}")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must be two areas, 0 < min <= max <= 1, not {self.crop_scale}")
        if self.crops_per_photo < 1:
            raise ValueError(f"crops_per_photo must be at least 1, not {self.crops_per_photo}")


class Sample(NamedTuple):
    """One image, ready for the model.

    Attributes:
        image: Normalised crop, float32 [3, H, W].
        noise: Uniform in [0, 1), float32 [num_patches]; its order decides which patches are masked.
        skipped: (name, reason) of the files that could not be read and that this image replaces.
    """

    image: Tensor
    noise: Tensor
    skipped: list[tuple[str, str]]


def denormalize(images: Tensor) -> Tensor:
    """Undo the normalisation with MEAN and STD, for pictures: [..., 3, H, W] to values in [0, 1]."""
    mean = images.new_tensor(MEAN).view(3, 1, 1)
    std = images.new_tensor(STD).view(3, 1, 1)
    return (images * std + mean).clamp(0, 1)


@contextmanager
def seeded(*keys: int) -> Iterator[None]:
    """Seed torch's CPU random numbers from the keys inside the block; the caller's state is restored."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that one seeds the GPUs as well, which fork_rng leaves out here.
        torch.default_generator.manual_seed(derive_seed(*keys))
        yield


def decode(path: str | Path) -> Tensor:
    """Read an image file (the first frame, if there are more) as RGB, uint8 [3, H, W].

    Raises:
        ValueError: If it has more than MAX_PIXELS pixels or is not of 8 bits per channel.
        Exception: Whatever Pillow raises for a broken file, OSError in most cases.
    """
    with Image.open(path) as image:  # reads the header alone
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} is more than {MAX_PIXELS} pixels")
        if image.mode[0] in "IF":  # 16 or 32 bits, which convert() would clip to white
            raise ValueError(f"mode {image.mode!r} is not of 8 bits per channel")
        return v2.functional.pil_to_tensor(image.convert("RGB"))


class Images:
    """Images by name, in a fixed order, some of which may turn out to be unreadable.

    One that could not be read is not tried again by the same process.

    Args:
        names: The names, in order; not empty.
        load: Gives the image of a name, uint8 [3, H, W], or raises any exception.
    """

    def __init__(self, names: list[str], load: Callable[[str], Tensor]):
        self.names = names
        self.load = load
        self.unreadable: dict[str, str] = {}  # name: reason, as found so far by this process

    def read(self, index: int) -> tuple[Tensor, list[tuple[str, str]]]:
        """Read an image or, in place of an unreadable one, the next in the order (circularly).

        Returns:
            The image, uint8 [3, H, W], and (name, reason) of those that were passed over.

        Raises:
            ValueError: If no image at all can be read.
        """
        skipped = []
        for i in range(len(self.names)):
            name = self.names[(index + i) % len(self.names)]
            if name not in self.unreadable:
                try:
                    return self.load(name), skipped
                except Exception as error:  # decoders of broken files raise nearly anything
                    self.unreadable[name] = f"{type(error).__name__}: {error}"
            skipped.append((name, self.unreadable[name]))
        examples = "; ".join(f"{name} ({reason})" for name, reason in skipped[:3])
        raise ValueError(f"none of {len(self.names)} images can be read, among them: {examples}")


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
                photos[name] = decode(path)
    return photos


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
        relative = Path(folder).relative_to(root)
        names += [(relative / file).as_posix() for file in files if file.lower().endswith(IMAGE_EXTENSIONS)]
    if not names:
        raise FileNotFoundError(f"no image file ({' '.join(IMAGE_EXTENSIONS)}) below {root}")
    return sorted(names)


def load_file(root: Path, name: str) -> Tensor:
    """Decode the image file `name` below `root`, uint8 [3, H, W]."""
    return decode(root / name)


def split_files(names: list[str], load: Callable[[str], Tensor]) -> tuple[list[str], list[str]]:
    """Split file names in training and held-out ones, by a hash of the name.

    Returns:
        Training names, sorted, and held-out names, in the order of the hash: 2 % of
        all, at least 1 and at most MAX_HELD_OUT_FILES. At least one of them can be read.

    Raises:
        ValueError: If no file can be read, or if none would be left to train on.
    """
    by_hash = sorted(names, key=lambda name: hashlib.blake2b(os.fsencode(name), digest_size=8).digest())
    count = min(max(1, len(names) // 50), MAX_HELD_OUT_FILES)
    # In a small folder, one broken file may be all that is held out: go on to the first good one.
    _, unreadable = Images(by_hash, load).read(0)
    count = max(count, len(unreadable) + 1)
    if count == len(names):
        raise ValueError(
            f"at least 2 readable images are needed, one of them held out: "
            f"{len(names)} found, {len(unreadable)} of them unreadable"
        )
    held_out = by_hash[:count]
    return sorted(set(names) - set(held_out)), held_out


def choose_subset(names: list[str], fraction: float, subset_seed: int) -> list[str]:
    """Choose a random part of the names, at least one, and keep their order."""
    generator = torch.Generator().manual_seed(subset_seed)
    count = max(1, round(fraction * len(names)))
    chosen = torch.randperm(len(names), generator=generator)[:count]
    return [names[i] for i in chosen.sort().values.tolist()]


def build_random_crop(img_size: tuple[int, int], crop_scale: tuple[float, float]) -> v2.Transform:
    """Build the random crop and flip: uint8 [3, any, any] to uint8 [3, H, W] of (H, W) = img_size."""
    crop = v2.RandomResizedCrop(
        img_size,
        scale=crop_scale,
        ratio=(3 / 4, 4 / 3),
        interpolation=InterpolationMode.BICUBIC,
        antialias=True,
    )
    return v2.Compose([crop, v2.RandomHorizontalFlip()])


def center_crop(image: Tensor, img_size: tuple[int, int]) -> Tensor:
    """Resize the middle of an image, as large as the shape allows: [3, any, any] to [3, H, W]."""
    # Cropped before it is resized: the long side of a panorama would grow without bound.
    scale = min(image.shape[-2] / img_size[0], image.shape[-1] / img_size[1])
    image = v2.functional.center_crop(image, [max(1, round(scale * side)) for side in img_size])
    return v2.functional.resize(image, list(img_size), InterpolationMode.BICUBIC, antialias=True)


def normalize(image: Tensor) -> Tensor:
    """Bring uint8 [3, H, W] to float32 with the statistics MEAN and STD of ImageNet."""
    image = v2.functional.to_dtype(image, torch.float32, scale=True)
    return v2.functional.normalize(image, MEAN, STD)


class TrainingSet(Dataset):
    """Random crops of images; `dataset[epoch, index]` is a function of (seed, epoch, index) alone.

    Args:
        images: The images to crop.
        img_size: Height and width of the crops, in pixels.
        num_patches: Length of the noise of a sample.
        seed: Seed of crops, flips and noise, a 64-bit integer.
        crop_scale: Smallest and largest area of a crop, as parts of the image's area.
        crops_per_image: Crops of each image per epoch.

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
    ):
        images.read(0)  # fails now rather than in the first step
        self.images = images
        self.num_patches = num_patches
        self.seed = seed
        self.crops_per_image = crops_per_image
        self.crop = build_random_crop(img_size, crop_scale)

    @property
    def files(self) -> list[str]:
        """Names of the images, in order; paths relative to the folder if they come from one."""
        return self.images.names

    def __len__(self) -> int:
        return len(self.files) * self.crops_per_image

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        image, skipped = self.images.read(index // self.crops_per_image)
        with seeded(self.seed, epoch, index):
            noise = torch.rand(self.num_patches)
            return Sample(normalize(self.crop(image)), noise, skipped)


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
        self.num_patches = num_patches
        self.length = len(images.names) if crops is None else crops
        if crops is None:
            self.crop = functools.partial(center_crop, img_size=img_size)
        else:
            # Not the scale of the run, so that runs with different crops can be compared.
            self.crop = build_random_crop(img_size, DataConfig.crop_scale)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} samples")
        image, skipped = self.images.read(index % len(self.images.names))
        with seeded(index):
            noise = torch.rand(self.num_patches)
            return Sample(normalize(self.crop(image)), noise, skipped)


class StepSampler(Sampler[list[tuple[int, int]]]):
    """The (epoch, index) of one process, a list for each micro-batch of each optimizer step.

    The stream of samples is one permutation of the training set after the other, each drawn from
    (seed, epoch). Step s takes the positions [s * batch_size, (s + 1) * batch_size) of the stream, so
    that a batch may span epochs and no sample is dropped. The batch is cut into accumulation *
    world_size equal slices: the first world_size of them are the first micro-batch of each rank,
    and so on.

    Args:
        num_samples: Length of the training set.
        batch_size: Samples per optimizer step, over all processes and micro-batches.
        seed: Seed of the permutations, a 64-bit integer.
        total_steps: Step to stop before.
        start_step: First step, above 0 for a run that is resumed.
        accumulation: Micro-batches per step.
        rank: Index of this process.
        world_size: Number of processes.

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
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.total_steps = total_steps
        self.start_step = start_step
        self.accumulation = accumulation
        self.rank = rank
        self.world_size = world_size

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
        return torch.randperm(self.num_samples, generator=generator)


def build_data(
    config: DataConfig, img_size: tuple[int, int], num_patches: int, seed: int
) -> tuple[TrainingSet, HeldOutSet]:
    """Build the training set and the held-out set of a source.

    A folder is listed, but its files are read only up to the first good one: broken files are skipped
    when their turn comes, and reported with the sample that replaces them.

    Args:
        config: The source, and how it is cropped.
        img_size: Height and width of the crops, in pixels.
        num_patches: Length of the noise of a sample.
        seed: Seed of the training set's crops and noise, a 64-bit integer.

    Raises:
        FileNotFoundError: If the folder is missing or holds no image file.
        ValueError: If fewer than two images of the folder, or none of the training images, can be read.
        ModuleNotFoundError: If a package with the photographs is not installed.
    """
    if config.source == "photos":
        photos = load_photos()
        load = photos.__getitem__
        names = [name for name in photos if name not in HELD_OUT_PHOTOS]
        held_out = list(HELD_OUT_PHOTOS)
        crops_per_image, held_out_crops = config.crops_per_photo, HELD_OUT_CROPS
    else:
        root = Path(config.source.removeprefix("folder:")).expanduser()
        load = functools.partial(load_file, root)
        names, held_out = split_files(list_images(root), load)
        crops_per_image, held_out_crops = 1, None
    names = choose_subset(names, config.fraction, config.subset_seed)
    training_set = TrainingSet(
        Images(names, load), img_size, num_patches, seed, config.crop_scale, crops_per_image
    )
    return training_set, HeldOutSet(Images(held_out, load), img_size, num_patches, held_out_crops)


def collate(samples: list[Sample]) -> dict[str, Tensor | list[tuple[str, str]]]:
    """Stack B samples: image [B, 3, H, W], noise [B, num_patches], and one list of all skipped."""
    return {
        "image": default_collate([sample.image for sample in samples]),
        "noise": default_collate([sample.noise for sample in samples]),
        "skipped": [record for sample in samples for record in sample.skipped],
    }


def _ignore_signals(_: int) -> None:
    # Stopping is for the process that trains: it still needs its loaders to finish the step, and torchrun
    # and Ctrl-C signal all processes.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def build_loader(
    dataset: TrainingSet | HeldOutSet, sampler: Iterable[list], workers: int, pin_memory: bool
) -> DataLoader:
    """Build the loader of the batches that `collate` describes.

    The (name, reason) of skipped files come with the batches because a loader process has no other
    way to report them. A file is reported each time it is met: `dict.update` keeps one of each.

    Args:
        dataset: Where the samples come from.
        sampler: Gives a list of the dataset's keys for each batch: a StepSampler for a TrainingSet,
            lists of indices for a HeldOutSet.
        workers: Loader processes, each with one torch thread (torch's own choice); 0 for none.
        pin_memory: Whether batches are copied to page-locked memory, for faster transfers to a GPU.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # it would draw from the caller's random numbers otherwise
    )
