"""Images for self-supervised pre-training: a training set, a held-out set and their order.

Every sample (its crop, its flip and the noise that decides its mask) is a function of
(seed, epoch, index) alone, and so is the order of the samples of (seed, epoch). A run that was
stopped and resumed, or that is spread over more processes, therefore sees exactly the same data.
"""

import collections
import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, NotRequired

import torch
from torch import Tensor
from torch.utils.data import default_collate

from dbpkern.capture import derive_seed
from train.data import augment
from train.data.augment import Chooser, Crop, View, whole
from train.data.photos import HELD_OUT_CROPS, HELD_OUT_PHOTOS, cut, load_photos
from train.data.reading import (
    IMAGE_EXTENSIONS,
    Images,
    by_hash,
    check_cache,
    choose_subset,
    decode,
    keep_decoded,
    list_images,
    load_file,
    seeded,
)
from train.data.samples import Batch, SampleSet
from train.data.shards import Shards, find_shards

MAX_HELD_OUT_FILES = 2_000


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

    def __post_init__(self) -> None:
        kind, _, path = self.source.partition(":")
        if kind not in SOURCES or bool(path) != (":" in SOURCES[kind].spelling):
            *spellings, last = (repr(source.spelling) for source in SOURCES.values())
            raise ValueError(f"source must be {', '.join(spellings)} or {last}, not {self.source!r}")
        files = SOURCES[kind].of_files
        if self.val is not None and not files:
            raise ValueError(
                f"val must be null for source {kind!r}, which has held-out images, not {self.val!r}"
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
        if self.draft and not files:
            raise ValueError(f"draft has no meaning for source {kind!r}, which are decoded once")
        check_cache(self.cache, "cache", None if files else f"{kind!r}, which are decoded once")
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


class TrainingSet(SampleSet[Sample]):
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
        images: Images[Crop],
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


class HeldOutSet(SampleSet[Sample]):
    """A fixed list of samples for evaluation, the same in every run and whatever its seed.

    Args:
        images: The images to crop.
        img_size: Height and width of the crops, in pixels.
        num_patches: Length of the noise of a sample.
        crops: Length of the list, as fixed random crops that take the images in turn; None for one
            centre crop of each image.
    """

    def __init__(self, images: Images[Crop], img_size: tuple[int, int], num_patches: int, crops: int | None):
        self.images = images
        self.img_size = img_size
        self.num_patches = num_patches
        self.length = len(images.names) if crops is None else crops
        # Not the scale of the run, so that runs with different crops can be compared.
        self.view: Chooser = (
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


class Opened(NamedTuple):
    """A source whose images are known.

    Attributes:
        names: Of all images, in a fixed order.
        load: Gives the chosen view of the image of a name, as of `Images`.
        held_out: Names that the source itself holds out; where there are none, a part of all is.
        shards: That the images lie in.
    """

    names: list[str]
    load: Callable[[str, Chooser], Crop]
    held_out: tuple[str, ...] = ()
    shards: Shards | None = None


def open_photos(_: str) -> Opened:
    """The photographs of scikit-image and scikit-learn."""
    photos = load_photos()
    return Opened(list(photos), functools.partial(cut, photos), HELD_OUT_PHOTOS)


def open_folder(path: str) -> Opened:
    """All image files below a folder."""
    root = Path(path).expanduser()
    return Opened(list_images(root), functools.partial(load_file, root))


def open_shards(pattern: str) -> Opened:
    """All image files in the shards of a pattern."""
    shards = Shards(find_shards(pattern), IMAGE_EXTENSIONS)
    return Opened(shards.names(), functools.partial(load_member, shards), shards=shards)


class Source(NamedTuple):
    """A kind of source.

    Attributes:
        spelling: What users write, with a colon where something follows the kind.
        open: Finds the images by what follows; raises FileNotFoundError or ValueError.
        of_files: Whether images are decoded from files at each turn, and some of them held out; otherwise
            the source has them in memory, and holds out its own.
    """

    spelling: str
    open: Callable[[str], Opened]
    of_files: bool


SOURCES = {
    "photos": Source("photos", open_photos, False),
    "folder": Source("folder:PATH", open_folder, True),
    "wds": Source("wds:PATTERN", open_shards, True),
}


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
    found, load, own, shards = SOURCES[kind].open(path)
    held_out_load = load
    if isinstance(config.val, str):
        check_apart(kind, path, config.val)
        names = found
        held_out, held_out_load, _, _ = SOURCES[kind].open(config.val)
        Images(held_out, held_out_load).read(0)  # fails now rather than in the first evaluation
    elif own:
        names, held_out = [name for name in found if name not in own], list(own)
    else:
        names, held_out = split_files(found, load, config.val)
    # A photograph is as large as many images.
    photos = kind == "photos"
    crops_per_image, held_out_crops = (config.crops_per_photo, HELD_OUT_CROPS) if photos else (1, None)
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
    training, apart = Images(names, load), Images(held_out, held_out_load)
    keep_decoded((training, apart), config.cache)
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
    return training_set, HeldOutSet(apart, img_size, num_patches, held_out_crops)


class PretrainingBatch(Batch):
    """What `collate` gives of samples, and what else a task's own collate function draws.

    Attributes:
        image: Of all images, see `to_images`.
        noise: float32 [B, num_patches].
        size: Heights and widths [B, 2]; missing where the images are ready, like flip.
        flip: Whether images are mirrored, bool [B].
        drawn: The random numbers of diffusion: noise levels [B, L] and noise [B, L, P].
    """

    image: Tensor
    noise: Tensor
    size: NotRequired[Tensor]
    flip: NotRequired[Tensor]
    drawn: NotRequired[tuple[Tensor, Tensor]]


def collate(samples: list[Sample]) -> PretrainingBatch:
    """Stack B samples: image [B, 3, H, W], noise [B, num_patches], and one list of all skipped.

    Crops for `to_images` have different sizes: image is padded, uint8 [B, 3, max h, max w], beside it are
    size [B, 2] and flip [B].
    """
    noise = default_collate([sample.noise for sample in samples])
    skipped = [record for sample in samples for record in sample.skipped]
    images = [sample.image for sample in samples]
    if samples[0].flip is None:
        return {"noise": noise, "skipped": skipped, "image": default_collate(images)}
    padded, sizes = augment.pad(images)
    flip = torch.tensor([sample.flip for sample in samples])
    return {"noise": noise, "skipped": skipped, "image": padded, "size": sizes, "flip": flip}


def to_images(batch: PretrainingBatch, img_size: tuple[int, int]) -> Tensor:
    """Finish a batch's images where they are, if the loader has not: float32 [B, 3, H, W] of img_size."""
    if "size" not in batch:
        return batch["image"]
    return augment.finish_batch(batch["image"], batch["size"], batch["flip"], img_size)
