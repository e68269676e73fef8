"""Images per second of the loader, and of the parts of its work.

Needs the extra `train`. The folder and the shards hold the same JPEG files of 500 x 400 pixels, or of --side,
made of the shipped photographs in a temporary folder; they were just written, so that they come from memory:
what a disk or a network delivers is not measured. Photographs are decoded once, at the start; with a --cache
that holds them, files are, too.

Stages run in this process, on one thread unless --threads says otherwise, as a loader process does. The
loader is timed with nothing that takes its batches, from the state in which no batch is ready. A worker's
figure is the loader's divided by the workers (0 workers: the training process itself), and the last column
is how many such workers a training step of --rate images per second needs; with more workers than cores they
share what there is.

Before anything is timed, the first batch of every loader is compared with direct reading, and what the device
makes of it with what the host makes: unless they agree, no figure is printed and the exit code is 1.
"""

import argparse
import io
import json
import math
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from bench import measure, options, record
from bench.check import CheckFailed
from bench.record import progress
from train.data import augment, loading, photos, pretraining, reading
from train.engine.processes import moved

PER_SHARD = 128
QUALITY = 95  # of the JPEG files
SEED = 0
# Mean difference between host and device, in levels of 255: rounding to whole levels alone makes 0.25, and
# crops that are resized in two steps for the device some more.
TOLERANCE = 1.0


def number(text: str) -> int:
    """A number of something, or none, for argparse."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m bench data`."""
    sources = ("photos", "folder", "wds")
    places = ("host", "device")
    parser.add_argument("--sources", nargs="+", choices=sources, default=sources, help="default: all")
    parser.add_argument("--augment", nargs="+", choices=places, default=places, help="default: both")
    parser.add_argument(
        "--workers", nargs="+", type=number, default=(0, 1, 2), help="loader processes (default: 0 1 2)"
    )
    parser.add_argument("--draft", action="store_true", help="let the loaders decode at a part of the size")
    parser.add_argument(
        "--cache", type=number, default=0, metavar="MIB", help="memory for decoded images (default: 0)"
    )
    parser.add_argument(
        "--side", type=options.count, metavar="PIXELS", help="make square files of this side, not 500 x 400"
    )
    parser.add_argument("--img-size", type=options.count, default=224, help="of crops (default: 224)")
    parser.add_argument("--batch", type=options.count, default=64, help="images in a batch (default: 64)")
    parser.add_argument("--images", type=options.count, default=512, help="files to make (default: 512)")
    parser.add_argument(
        "--batches", type=options.count, default=6, help="that are timed in a round (default: 6)"
    )
    parser.add_argument("--rounds", type=options.count, default=5, help="default: 5")
    parser.add_argument(
        "--rate", type=options.count, default=1000, help="images/s of a training step (default: 1000)"
    )
    parser.add_argument("--device", type=options.device, default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=options.count, default=1, help="of PyTorch (default: 1)")
    parser.add_argument("--json", type=options.file, metavar="FILE", help="also write the figures here")


def make_files(root: Path, count: int, side: int | None = None) -> tuple[Path, Path]:
    """Write JPEG files: a folder, and shards of the same.

    Args:
        root: Where they go.
        count: How many.
        side: In pixels; None for 500 x 400, every fourth upright.
    """
    pictures = list(photos.load_photos().values())
    generator = torch.Generator().manual_seed(SEED)
    folder, shards = root / "folder", root / "shards"
    shards.mkdir()
    for start in range(0, count, PER_SHARD):
        with tarfile.open(shards / f"{start // PER_SHARD:06}.tar", "w") as tar:
            for i in range(start, min(start + PER_SHARD, count)):
                photo = pictures[i % len(pictures)]
                size = (500, 400) if i % 4 == 3 else (400, 500)
                size = size if side is None else (side, side)
                part = 0.5 + 0.5 * torch.rand((), generator=generator).item()
                scale = part * min(photo.shape[1] / size[0], photo.shape[2] / size[1])
                h, w = (int(scale * side) for side in size)
                top, left = (
                    int(torch.randint(whole - length + 1, (), generator=generator))
                    for whole, length in zip(photo.shape[1:], (h, w), strict=True)
                )
                pixels = augment.resize(v2.functional.crop(photo, top, left, h, w), size)
                content = io.BytesIO()
                v2.functional.to_pil_image(pixels).save(content, "JPEG", quality=QUALITY)
                path = folder / f"{i % 10}" / f"{i:06}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.getvalue())
                member = tarfile.TarInfo(path.name)
                member.size = path.stat().st_size
                tar.addfile(member, io.BytesIO(content.getvalue()))
    return folder, shards


def build(source: str, place: str, args: argparse.Namespace) -> pretraining.TrainingSet:
    """The training set of a source."""
    # The photographs are decoded already.
    draft = args.draft and source != "photos"
    cache = args.cache if source != "photos" else 0
    config = pretraining.DataConfig(source=source, augment_on=place, draft=draft, cache=cache)
    size = (args.img_size, args.img_size)
    return pretraining.build_data(config, size, num_patches=196, seed=SEED)[0]


class Loader:
    """A loader that is started anew for each measurement.

    Args:
        name: of the source.
        place: "host" or "device".
        workers: loader processes.
        dataset: what it loads.
        args: of the command line.
    """

    def __init__(
        self, name: str, place: str, workers: int, dataset: pretraining.TrainingSet, args: argparse.Namespace
    ) -> None:
        self.name = name
        self.place = place
        self.workers = workers
        self.dataset = dataset
        self.batches = args.batches
        self.ahead = 1 + 2 * workers  # a worker has two batches ready before the first is asked for
        self.sampler = loading.StepSampler(
            len(dataset), args.batch, SEED, self.ahead + args.batches, shards=dataset.shards
        )
        self.pin = args.device.type == "cuda"

    def start(self) -> DataLoader:
        """Make the loader."""
        return loading.build_loader(self.dataset, self.sampler, self.workers, self.pin, pretraining.collate)

    def seconds(self) -> float:
        """Time of a batch, once those that are ready at the start are used up."""
        batches = iter(self.start())
        for _ in islice(batches, self.ahead):
            pass
        return measure.seconds(lambda: next(batches), torch.device("cpu"), self.batches)


def _equal(a: Tensor | list, b: Tensor | list) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def check(loaders: Sequence[Loader], device: torch.device) -> dict[str, float]:
    """Compare the first batch of each loader with direct reading, and device with host.

    Returns:
        By source, the mean difference between what device and host make, in levels of 255.

    Raises:
        CheckFailed: a batch is another one, or the difference is more than rounding explains.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for loader in loaders:
        batch = next(iter(loader.start()))
        keys = next(iter(loader.sampler))
        direct = pretraining.collate([loader.dataset[key] for key in keys])
        if batch.keys() != direct.keys() or not all(
            _equal(batch[name], direct[name]) for name in batch if name != "skipped"
        ):
            raise CheckFailed(
                f"{loader.name} on the {loader.place}, {loader.workers} workers: the first batch is not that "
                "of direct reading"
            )
        batch = moved(batch, device)
        made = pretraining.to_images(batch, loader.dataset.img_size)
        found.setdefault(loader.name, {})[loader.place] = made
    differences = {}
    for name, images in found.items():
        if len(images) == 2:
            host, made = (augment.denormalize(images[place].cpu()) for place in ("host", "device"))
            differences[name] = 255 * (host - made).abs().mean().item()
            if not differences[name] <= TOLERANCE:  # also for NaN
                raise CheckFailed(
                    f"{name}: device and host differ by {differences[name]:.2g} levels in the mean, expected "
                    f"at most {TOLERANCE}"
                )
    return differences


def stages(folder: Path, args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """The parts of a loader's work on a batch of files, each from what the one before it gives."""
    size = (args.img_size, args.img_size)
    names = reading.list_images(folder)
    names = [names[i % len(names)] for i in range(args.batch)]
    scale = pretraining.DataConfig.crop_scale
    views = {draft: augment.RandomView(size, scale, draft) for draft in (False, True)}
    draws = {
        draft: [pretraining.Draw((SEED, 0, i), 196, view) for i in range(args.batch)]
        for draft, view in views.items()
    }

    def decode(draft: bool) -> list[augment.Crop]:
        pairs = zip(names, draws[draft], strict=True)
        return [reading.load_file(folder, name, draw) for name, draw in pairs]

    crops = decode(False)
    images = [augment.resize(crop.pixels, size) for crop in crops]
    bounded = [augment.bound(crop.pixels, size) for crop in crops]
    padded, sizes = (tensor.to(args.device) for tensor in augment.pad(bounded))
    flip = torch.tensor([crop.view.flip for crop in crops], device=args.device)
    return {
        "decode all of the file": lambda: [reading.load_file(folder, name) for name in names],
        "decode and cut the box": lambda: decode(False),
        "decode and cut the box, draft": lambda: decode(True),
        "resize on the host": lambda: [augment.resize(crop.pixels, size) for crop in crops],
        "normalise and collate": lambda: torch.stack([augment.normalize(image) for image in images]),
        "pad for the device": lambda: augment.pad([augment.bound(crop.pixels, size) for crop in crops]),
        f"finish on the device ({args.device.type})": lambda: augment.finish_batch(padded, sizes, flip, size),
    }


def rates(images: int, seconds: Sequence[float]) -> dict[str, object]:
    """Images per second: all rounds, and quartiles."""
    values = [images / value for value in seconds]
    return {"images_per_second": measure.quartiles(values)._asdict(), "rounds": values}


def measure_rounds(name: str, steps: Sequence[Callable[[], float]], rounds: int) -> list[tuple[float, ...]]:
    """Run every measurement in each round, after one to warm up; returns the times by measurement."""
    times = []
    for turn in range(1 + rounds):
        progress(f"{name}: round {turn} of {rounds}{'' if turn else ', to warm up'}")
        times.append(measure.rotated_round(steps, turn, lambda step: step()))
    return list(zip(*times[1:], strict=True))


def figures(rate: dict[str, float]) -> str:
    """Median and quartiles in a cell."""
    return f"{rate['median']:.0f} [{rate['low']:.0f}, {rate['high']:.0f}]"


def tables(result: dict) -> str:
    """The figures as Markdown."""
    first = [[row["stage"], figures(row["images_per_second"])] for row in result["stages"]]
    second = [
        [
            row["source"],
            row["augment_on"],
            f"{row['workers']}",
            figures(row["images_per_second"]),
            f"{row['per_worker']:.0f}",
            f"{row['workers_needed']}",
        ]
        for row in result["loaders"]
    ]
    columns = ("source", "augmented on", "workers", "images/s", "a worker", f"for {result['rate']} images/s")
    return f"{record.table(('stage', 'images/s'), first)}\n\n{record.table(columns, second)}"


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Check, measure, print; returns the exit code."""
    with tempfile.TemporaryDirectory() as name, mock.patch.dict(os.environ, XDG_CACHE_HOME=name):
        progress(f"making {args.images} files")
        folder, shards = make_files(Path(name), args.images, args.side)
        sizes = [path.stat().st_size for path in folder.rglob("*.jpg")]
        specs = {"photos": "photos", "folder": f"folder:{folder}", "wds": f"wds:{shards}"}
        loaders = [
            Loader(source, place, count, build(specs[source], place, args), args)
            for source in args.sources
            for place in args.augment
            for count in args.workers
        ]
        progress("comparing the first batches with direct reading")
        try:
            differences = check(loaders, args.device)
        except CheckFailed as error:
            print(f"the check failed, so nothing was measured: {error}", file=sys.stderr)
            return 1
        parts = stages(folder, args)
        steps = [lambda step=step: measure.seconds(step, args.device) for step in parts.values()]
        stage_times = measure_rounds("stages", steps, args.rounds)
        loader_times = measure_rounds("loaders", [loader.seconds for loader in loaders], args.rounds)
    result = {
        "img_size": args.img_size,
        "batch": args.batch,
        "files": len(sizes),
        "bytes_per_file": sum(sizes) / len(sizes),
        "batches": args.batches,
        "draft": args.draft,
        "cache": args.cache,
        "rate": args.rate,
        "differences": differences,
        "stages": [
            {"stage": stage} | rates(args.batch, times)
            for stage, times in zip(parts, stage_times, strict=True)
        ],
        "loaders": [],
    }
    for loader, times in zip(loaders, loader_times, strict=True):
        row = {"source": loader.name, "augment_on": loader.place, "workers": loader.workers}
        row |= rates(args.batch, times)
        row["per_worker"] = row["images_per_second"]["median"] / max(1, loader.workers)
        row["workers_needed"] = math.ceil(args.rate / row["per_worker"])
        result["loaders"].append(row)
    head = record.header(argv, args.device, "fp32")
    print(record.machine_line(head))
    print(
        f"\n## Crops of {args.img_size} pixels, batches of {args.batch}, files of "
        f"{result['bytes_per_file'] / 1e3:.3g} kB{', draft' if args.draft else ''}"
        f"{f', cache of {args.cache} MiB' if args.cache else ''}\n\n{tables(result)}\n"
    )
    print("Checked: first batches as by direct reading.")
    for source, value in differences.items():
        print(f"Checked: device and host differ by {value:.2f} of 255 levels in the mean ({source}).")
    if args.json:
        args.json.write_text(json.dumps(head | {"results": [result]}, indent=1) + "\n")
    return 0
