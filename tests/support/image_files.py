"""Image files and shards that tests write, broken ones too, and samples of pre-training from them."""

import io
import struct
import tarfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from train.data import augment, reading
from train.data.pretraining import DataConfig, TrainingSet, build_data
from train.data.reading import Images

IMG_SIZE = (16, 24)
NUM_PATCHES = 6
RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


def build(source="photos", seed=0, **kwargs):
    return build_data(DataConfig(source=source, **kwargs), IMG_SIZE, NUM_PATCHES, seed)


def assert_same(a, b):
    assert torch.equal(a.image, b.image)
    assert torch.equal(a.noise, b.noise)
    assert a.skipped == b.skipped


def color(image):
    """The mean colour of a normalised image, in 0 .. 255."""
    return tuple(augment.denormalize(image).mean((1, 2)).mul(255).round().int().tolist())


def save(path, color=RED, size=(40, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path)


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def write_bomb(path):
    """Write a file of 70 bytes whose header announces 400 million pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"")))


def truncate(path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BROKEN = {
    "truncated.jpg": truncate,
    "truncated.png": truncate,
    "text.jpg": lambda path: path.write_text("not an image"),
    "empty.png": lambda path: path.write_bytes(b""),
    "bomb.png": write_bomb,
    "depth.png": lambda path: Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(path),
    "gone.jpg": lambda path: path.symlink_to("nowhere"),
}


def training_set(root, names, seed=0, crop_scale=(0.2, 1.0)):
    return TrainingSet(
        Images(names, partial(reading.load_file, root)), IMG_SIZE, NUM_PATCHES, seed, crop_scale, 1
    )


def encoded(color, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(buffer, kind)
    return buffer.getvalue()


def write_shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def make_folder(root: Path, classes: str, count: int) -> Path:
    for i, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for j in range(count):
            Image.new("RGB", (20, 20), (20 * i, 0, 0)).save(root / name / f"{j}.png")
    return root
