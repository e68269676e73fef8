import argparse
import io
import json
import os
import pickle
import random
import socket
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from functools import partial
from itertools import chain
from multiprocessing import resource_sharer
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from train import pretrain
from train.data import augment, pretraining, reading, shards
from train.data import photos as photographs
from train.data.augment import Crop, View
from train.data.loading import StepSampler, build_loader
from train.data.pretraining import DataConfig, HeldOutSet, TrainingSet, build_data, collate
from train.data.reading import Images
from train.tasks.families import task_of

IMG_SIZE = (16, 24)
NUM_PATCHES = 6
RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


def build(source="photos", seed=0, **kwargs):
    return build_data(DataConfig(source=source, **kwargs), IMG_SIZE, NUM_PATCHES, seed)


@pytest.fixture(scope="module")
def photos():
    return build()


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


@pytest.fixture
def broken_folder(tmp_path):
    for i in range(10):
        save(tmp_path / f"good{i}.png")
    for name, write in BROKEN.items():
        write(tmp_path / name)
    return tmp_path


def training_set(root, names, seed=0, crop_scale=(0.2, 1.0)):
    return TrainingSet(
        Images(names, partial(reading.load_file, root)), IMG_SIZE, NUM_PATCHES, seed, crop_scale, 1
    )


# Samples


def test_sample_is_a_function_of_seed_epoch_and_index(photos):
    first, _ = photos
    keys = [(0, 0), (0, 1), (5, 1), (5, 895)]
    expected = {key: first[key] for key in keys}
    other, _ = build()
    for state, key in enumerate(reversed(keys)):
        torch.manual_seed(state)
        np.random.seed(state)
        random.seed(state)
        assert_same(other[key], expected[key])
    assert expected[0, 0].image.shape == (3, *IMG_SIZE)
    assert expected[0, 0].image.dtype == torch.float32
    assert expected[0, 0].noise.shape == (NUM_PATCHES,)
    assert expected[0, 0].noise.dtype == torch.float32


def test_sample_differs_between_epochs_indices_and_seeds(photos):
    samples = [photos[0][0, 0], photos[0][1, 0], photos[0][0, 1], build(seed=1)[0][0, 0]]
    for i, a in enumerate(samples):
        for b in samples[:i]:
            assert not torch.equal(a.image, b.image)
            assert not torch.equal(a.noise, b.noise)


def test_random_numbers_of_the_caller_are_untouched(photos, monkeypatch):
    def fail(seed):
        raise AssertionError("the GPUs were seeded")

    state = torch.get_rng_state()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "manual_seed_all", fail)
        _ = photos[0][0, 0]
        _ = photos[1][0]
    for workers in (0, 2):
        sampler = StepSampler(len(photos[0]), 2, seed=0, total_steps=2)
        list(build_loader(photos[0], sampler, workers, False, collate))
    assert torch.equal(torch.get_rng_state(), state)


def test_loader_gives_the_same_batches_with_workers(photos):
    for dataset, sampler in [
        (photos[0], StepSampler(len(photos[0]), 6, seed=0, total_steps=3, accumulation=2)),
        (photos[1], [[0, 1, 2], [3, 255]]),
    ]:
        alone = list(build_loader(dataset, sampler, 0, False, collate))
        pooled = list(build_loader(dataset, sampler, 2, False, collate))
        keys = list(sampler)
        assert len(alone) == len(pooled) == len(keys)
        for a, b, batch in zip(alone, pooled, keys, strict=True):
            assert a["image"].shape == (len(batch), 3, *IMG_SIZE)
            assert torch.equal(a["image"], torch.stack([dataset[key].image for key in batch]))
            assert torch.equal(a["noise"], torch.stack([dataset[key].noise for key in batch]))
            assert torch.equal(a["image"], b["image"])
            assert torch.equal(a["noise"], b["noise"])
            assert a["skipped"] == b["skipped"] == []


LEAVE = """\
import os, signal, subprocess, sys, time

from torch.utils.data import Dataset

from train.data.loading import build_loader

class Odd(Dataset):
    def __getitem__(self, index):
        if index == 3 and sys.argv[1] == "raise":
            raise ValueError("odd")
        return index

batches = iter(build_loader(Odd(), [[index] for index in range(20)], 2, False, list))
print([next(batches), next(batches)])  # of either worker
if sys.argv[1] == "group":
    signal.signal(signal.SIGTERM, lambda *_: None)
    # By another process, as torchrun's or a terminal's: the workers heed their parent.
    subprocess.run(["kill", "-TERM", "--", f"-{os.getpgrp()}"], start_new_session=True, check=True)
    time.sleep(0.5)
print([*batches] if sys.argv[1] != "exit" else "")
"""


@pytest.mark.parametrize(("how", "code"), [("raise", 1), ("exit", 0), ("group", 0)])
def test_processes_with_loaders_end(tmp_path, how, code):
    # A real process: what hung was Python's exit, in which multiprocessing ends the workers.
    script = tmp_path / "leave.py"
    script.write_text(LEAVE)
    done = subprocess.run(
        [sys.executable, str(script), how],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
    )
    assert done.returncode == code, done.stderr
    assert ("ValueError: odd" in done.stderr) == (how == "raise")
    assert "killed" not in done.stderr
    if how == "group":  # a signal to all processes leaves the workers at work
        assert done.stdout.splitlines()[1] == str([[index] for index in range(2, 20)])


def test_loader_processes_use_one_thread():
    class Threads(TrainingSet):
        def __init__(self):
            pass

        def __getitem__(self, key):
            return pretraining.Sample(torch.tensor(torch.get_num_threads()), torch.zeros(1), [])

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (batch,) = build_loader(Threads(), [[0]], 1, False, collate)
    finally:
        torch.set_num_threads(before)
    assert batch["image"].tolist() == [1]


def test_datasets_can_be_sent_to_processes_that_are_not_forked(photos, broken_folder):
    folder = build(f"folder:{broken_folder}")
    for dataset, key in [(photos[0], (0, 5)), (photos[1], 5), (folder[0], (0, 0)), (folder[1], 0)]:
        assert_same(pickle.loads(pickle.dumps(dataset))[key], dataset[key])


def test_normalisation(tmp_path):
    save(tmp_path / "a.png", (255, 0, 51))
    image = training_set(tmp_path, ["a.png"])[0, 0].image
    expected = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225])
    torch.testing.assert_close(image, expected.view(3, 1, 1).expand_as(image))
    torch.testing.assert_close(augment.denormalize(image)[:, 0, 0], torch.tensor([1.0, 0.0, 0.2]))
    batch = torch.rand(2, 3, 4, 5)
    torch.testing.assert_close(augment.denormalize(torch.stack([augment.normalize(x) for x in batch])), batch)
    assert augment.denormalize(torch.full((3, 1, 1), 100.0)).max() == 1


def test_crop_scale_is_the_area_of_the_crops(tmp_path):
    ramp = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    for crop_scale, low, high in [((0.01, 0.01), 15, 40), ((0.25, 0.25), 100, 160)]:
        dataset = training_set(tmp_path, ["ramp.png"], crop_scale=crop_scale)
        for epoch in range(10):
            image = augment.denormalize(dataset[epoch, 0].image) * 255
            assert low < image.max() - image.min() < high


def test_crops_are_flipped_half_of_the_time(tmp_path):
    Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1))).save(tmp_path / "ramp.png")
    dataset = training_set(tmp_path, ["ramp.png"])
    images = [dataset[epoch, 0].image for epoch in range(100)]
    assert 30 < sum(bool(image[0, 0, 0] > image[0, 0, -1]) for image in images) < 70


# Photographs


def test_photos_without_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", refuse)
    train, held_out = build()
    assert len(train) == 14 * 64
    assert len(held_out) == 256


def test_photos_split(photos):
    train, held_out = photos
    assert not set(train.files) & set(held_out.images.names)
    assert sorted(held_out.images.names) == ["chelsea.png", "coins.png", "gravel.png", "rocket.jpg"]
    assert len(train.files) == 14
    assert {"motorcycle_left.png", "motorcycle_right.png", "china.jpg", "flower.jpg"} < set(train.files)
    for dataset in photos:
        for i in range(len(dataset.images.names)):
            (image, _), skipped = dataset.images.read(i)
            assert image.dtype == torch.uint8
            assert image.shape[0] == 3
            assert min(image.shape[1:]) >= 300
            assert skipped == []


def test_an_epoch_of_photos_has_as_many_crops_of_each(photos, monkeypatch):
    train, _ = build(crops_per_photo=3)
    assert len(train) == 42
    read = []
    crop = Crop(torch.zeros(3, 8, 8).byte(), View(0, 0, 8, 8))
    monkeypatch.setattr(train.images, "read", lambda i, choose: read.append(i) or (crop, []))
    for index in range(42):
        _ = train[0, index]
    assert sorted(read) == sorted(list(range(14)) * 3)


def test_missing_photo_package(monkeypatch):
    monkeypatch.setattr(photographs, "PHOTOS", {"a_package_nobody_has/data": ("a.png",)})
    with pytest.raises(ModuleNotFoundError, match="a_package_nobody_has"):
        build()


def test_held_out_set_is_fixed(photos):
    _, expected = photos
    _, other = build(seed=7, fraction=0.2, subset_seed=3, crop_scale=(0.5, 0.6), crops_per_photo=2)
    torch.manual_seed(9)
    assert len(other) == len(expected) == 256
    for index in (0, 1, 255):
        assert_same(other[index], expected[index])
    assert not torch.equal(expected[0].image, expected[4].image)  # two crops of one photograph
    assert not torch.equal(expected[0].noise, expected[4].noise)
    with pytest.raises(IndexError, match="256"):
        _ = expected[256]


def test_held_out_crops_are_spread_over_the_photos():
    solid = {"red": RED, "green": GREEN, "blue": BLUE}
    solid = {
        name: torch.tensor(c, dtype=torch.uint8).view(3, 1, 1).expand(3, 9, 9) for name, c in solid.items()
    }
    held_out = HeldOutSet(
        Images(list(solid), partial(photographs.cut, solid)), IMG_SIZE, NUM_PATCHES, crops=6
    )
    assert [color(sample.image) for sample in held_out] == [RED, GREEN, BLUE] * 2


# Fraction


def test_fraction_chooses_by_subset_seed_alone(photos):
    all_files = photos[0].files
    half = build(fraction=0.5)[0].files
    assert len(half) == 7
    for subset_seed in range(4):
        files = build(fraction=0.5, subset_seed=subset_seed)[0].files
        assert files == [name for name in all_files if name in files]
    assert build(fraction=0.5, seed=1, crops_per_photo=1)[0].files == half
    assert any(build(fraction=0.5, subset_seed=s)[0].files != half for s in (1, 2))
    assert len(build(fraction=1e-9)[0].files) == 1
    assert len(build(fraction=0.5)[0]) == 7 * 64


# Folders


def test_flat_and_nested_folders(tmp_path):
    save(tmp_path / "flat" / "b.PNG")
    save(tmp_path / "flat" / "a.jpeg")
    (tmp_path / "flat" / "notes.txt").write_text("no image")
    assert reading.list_images(tmp_path / "flat") == ["a.jpeg", "b.PNG"]
    for name in ("dog/2.webp", "dog/1.JPEG", "cat/deep/1.bmp", "cat/1.tif", "0.gif", "z.TIFF"):
        save(tmp_path / "nested" / name)
    expected = ["0.gif", "cat/1.tif", "cat/deep/1.bmp", "dog/1.JPEG", "dog/2.webp", "z.TIFF"]
    assert reading.list_images(tmp_path / "nested") == expected
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "class").symlink_to(tmp_path / "flat")
    assert reading.list_images(tmp_path / "linked") == ["class/a.jpeg", "class/b.PNG"]

    train, held_out = build(f"folder:{tmp_path / 'nested'}")
    assert len(train) == len(train.files) == 5
    assert len(held_out) == 1
    assert sorted(train.files + held_out.images.names) == expected
    for index in range(5):
        sample = train[0, index]
        assert sample.skipped == []
        assert sample.image.shape == (3, *IMG_SIZE)


def test_folder_samples_are_a_function_of_seed_epoch_and_index(tmp_path):
    for name in "abcd":
        pixels = np.random.default_rng(ord(name)).integers(0, 256, (50, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    source = f"folder:{tmp_path}"
    first, second = build(source)[0], build(source)[0]
    expected = [first[1, index] for index in range(3)]
    for index in (2, 0, 1):
        assert_same(second[1, index], expected[index])
        assert not torch.equal(second[2, index].image, expected[index].image)
    held_out, other = build(source)[1], build(source, seed=1, fraction=0.1)[1]
    assert_same(held_out[0], other[0])


@pytest.mark.parametrize(
    ("mode", "name", "expected"),
    [
        ("L", "a.png", (60, 60, 60)),
        ("LA", "a.png", (60, 60, 60)),
        ("1", "a.png", None),
        ("P", "a.png", (204, 0, 0)),
        ("P", "a.gif", (204, 0, 0)),
        ("RGBA", "a.png", RED),
        ("RGB", "a.jpg", RED),
        ("RGB", "a.webp", RED),
        ("CMYK", "a.jpg", RED),
        ("CMYK", "a.tif", RED),
    ],
)
def test_every_kind_of_image_is_read_as_rgb(tmp_path, mode, name, expected):
    save(tmp_path / name, mode=mode)
    with Image.open(tmp_path / name) as image:
        assert image.mode == mode or name == "a.gif"
    image = reading.decode(tmp_path / name).pixels
    assert image.dtype == torch.uint8
    assert image.shape == (3, 30, 40)
    if expected is not None:
        difference = image.float().mean((1, 2)) - torch.tensor(expected)
        assert difference.abs().max() < 4


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("truncated.jpg", "OSError: image file is truncated"),
        ("truncated.png", ""),
        ("text.jpg", "cannot identify image file"),
        ("empty.png", "cannot identify image file"),
        ("bomb.png", "DecompressionBombError"),
        ("depth.png", "is not of 8 bits per channel"),
        ("gone.jpg", "FileNotFoundError"),
    ],
)
def test_broken_file_is_replaced_by_the_next(tmp_path, name, reason):
    save(tmp_path / "good0.png", RED)
    save(tmp_path / "good1.png", GREEN)
    BROKEN[name](tmp_path / name)
    dataset = training_set(tmp_path, ["good0.png", name, "good1.png"])
    intact = training_set(tmp_path, ["good0.png", "good1.png", "good1.png"])
    for _ in range(2):  # found, and remembered
        sample = dataset[3, 1]
        assert color(sample.image) == GREEN
        assert torch.equal(sample.image, intact[3, 1].image)
        assert torch.equal(sample.noise, intact[3, 1].noise)
        ((skipped, why),) = sample.skipped
        assert skipped == name
        assert reason in why
    assert dataset[3, 0].skipped == dataset[3, 2].skipped == []
    last = training_set(tmp_path, ["good0.png", "good1.png", name])
    assert color(last[0, 2].image) == RED  # the order is circular


def test_broken_file_is_tried_once(tmp_path):
    save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"")
    images = Images(["bad.png", "good.png"], partial(reading.load_file, tmp_path))
    _, first = images.read(0)
    save(tmp_path / "bad.png")
    _, second = images.read(0)
    assert first == second
    assert len(first) == 1


def test_oversized_file_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    write_bomb(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ValueError, match="20000 x 20000 is more than 200000000 pixels"):
        reading.decode(tmp_path / "bomb.png")
    save(tmp_path / "a.png", size=(40, 30))
    monkeypatch.setattr(reading, "MAX_PIXELS", 1200)
    reading.decode(tmp_path / "a.png")
    monkeypatch.setattr(reading, "MAX_PIXELS", 1199)
    with pytest.raises(ValueError, match="40 x 30 is more than 1199 pixels"):
        reading.decode(tmp_path / "a.png")


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_files_are_reported_with_the_batches(broken_folder, workers):
    train, _ = build(f"folder:{broken_folder}")
    broken = set(BROKEN) & set(train.files)
    assert len(broken) >= len(BROKEN) - 1
    skipped = {}
    for batch in build_loader(train, StepSampler(len(train), 4, 0, total_steps=4), workers, False, collate):
        assert batch["image"].shape == (4, 3, *IMG_SIZE)
        skipped.update(batch["skipped"])
    assert set(skipped) == broken
    assert "DecompressionBombError" in skipped.get("bomb.png", "DecompressionBombError")


def blank(name, choose):
    return Crop(torch.zeros(3, 1, 1, dtype=torch.uint8), choose(1, 1))


def test_held_out_files_are_a_fiftieth(monkeypatch):
    names = [f"{i:04}.png" for i in range(1000)]
    train, held_out = pretraining.split_files(names, blank)
    assert len(held_out) == 20
    assert sorted(train + held_out) == names
    assert train == sorted(train)
    assert max(int(name[:4]) for name in held_out) - min(int(name[:4]) for name in held_out) > 500
    assert pretraining.split_files(names[::-1], blank)[1] == held_out
    monkeypatch.setattr(pretraining, "MAX_HELD_OUT_FILES", 5)
    assert pretraining.split_files(names, blank)[1] == held_out[:5]


def test_the_held_out_part_can_be_chosen(tmp_path):
    names = [f"{i:04}.png" for i in range(1000)]
    _, fiftieth = pretraining.split_files(names, blank)
    train, held_out = pretraining.split_files(names, blank, 0.1)
    assert len(held_out) == 100
    assert held_out[:20] == fiftieth  # a smaller part lies in a larger one
    assert sorted(train + held_out) == names
    assert len(pretraining.split_files(names, blank, 1e-9)[1]) == 1
    for i in range(40):
        save(tmp_path / f"{i:02}.png")
    train, held_out = build(f"folder:{tmp_path}", val=0.25)
    assert (len(train), len(held_out)) == (30, 10)
    part, same = build(f"folder:{tmp_path}", val=0.25, fraction=0.5, subset_seed=7, seed=1)
    assert len(part) == 15
    assert set(part.files) < set(train.files)
    assert same.images.names == held_out.images.names
    assert_same(same[3], held_out[3])
    with pytest.raises(ValueError, match=r"40 found, 0 of them unreadable, and val 0.99 would hold out all"):
        build(f"folder:{tmp_path}", val=0.99)


def test_a_folder_can_be_held_out(tmp_path):
    for i in range(4):
        save(tmp_path / "train/a" / f"{i}.png")
        save(tmp_path / "test/a" / f"{i}.png", BLUE)
    train, held_out = build(f"folder:{tmp_path / 'train'}", val=str(tmp_path / "test"))
    names = [f"a/{i}.png" for i in range(4)]
    assert train.files == held_out.images.names == names
    assert color(train[0, 0].image) == RED
    assert color(held_out[0].image) == BLUE
    listed = tmp_path / "files.txt"
    listed.write_text("\n".join(names))  # names of the held-out ones, too, which are others
    train, held_out = build(f"folder:{tmp_path / 'train'}", val=str(tmp_path / "test"), files=str(listed))
    assert len(train) == len(held_out) == 4


def test_held_out_folders_that_cannot_be(tmp_path):
    for place in ("train/a", "train/b", "other"):
        save(tmp_path / place / "0.png")
    source = f"folder:{tmp_path}/train"
    for val in ("train", "train/b", "other/../train/a", "."):
        with pytest.raises(ValueError, match=f"val must have no image in common with source {source}, not"):
            build(source, val=f"{tmp_path}/{val}")
    with pytest.raises(FileNotFoundError, match=f"no such folder: {tmp_path}/nowhere"):
        build(source, val=f"{tmp_path}/nowhere")
    (tmp_path / "other/0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of 1 images can be read, among them: 0.png"):
        build(source, val=f"{tmp_path}/other")


def test_one_held_out_file_that_is_broken_does_not_stop_the_run(tmp_path):
    for i in range(5):
        save(tmp_path / f"{i}.png")
    _, before = build(f"folder:{tmp_path}")
    (broken,) = before.images.names
    (tmp_path / broken).write_bytes(b"")
    train, held_out = build(f"folder:{tmp_path}")
    assert len(train) == 3
    assert held_out.images.names[0] == broken
    assert [name for name, _ in held_out[0].skipped] == [broken]
    assert color(held_out[0].image) == RED


def test_held_out_files_are_cropped_in_the_centre(tmp_path):
    height, width = IMG_SIZE
    pixels = np.zeros((height * 2, width * 6, 3), np.uint8)
    pixels[:, width * 2 : width * 4] = GREEN
    Image.fromarray(pixels).save(tmp_path / "a.png")
    images = Images(["a.png"], partial(reading.load_file, tmp_path))
    image = HeldOutSet(images, IMG_SIZE, NUM_PATCHES, crops=None)[0].image
    assert image.shape == (3, *IMG_SIZE)
    green = torch.tensor(GREEN).view(3, 1, 1) / 255
    torch.testing.assert_close(augment.denormalize(image), green.expand_as(image), atol=1e-5, rtol=0)
    assert augment.Centre(IMG_SIZE)(500, 1) == View(250, 0, 1, 1)


def test_folders_without_enough_images(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nowhere"):
        build(f"folder:{tmp_path / 'nowhere'}")
    with pytest.raises(FileNotFoundError, match=f"no image file .* below {tmp_path}"):
        build(f"folder:{tmp_path}")
    save(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"at least 2 readable images .* 1 found, 0 of them unreadable"):
        build(f"folder:{tmp_path}")
    (tmp_path / "0.png").write_bytes(b"")
    (tmp_path / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of 2 images can be read, among them: .\.png \(Unid"):
        build(f"folder:{tmp_path}")
    save(tmp_path / "2.png")
    with pytest.raises(ValueError, match=r"at least 2 readable|none of \d images can be read"):
        build(f"folder:{tmp_path}")


def test_a_fraction_that_cannot_be_read(tmp_path):
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of 1 images can be read, among them: 0\.png"):
        training_set(tmp_path, ["0.png"])


def test_files_that_vanish_stop_the_run(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png")
    train, _ = build(f"folder:{tmp_path}")
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="none of 2 images can be read"):
        _ = train[0, 0]


# Order


@pytest.mark.parametrize("batch_size", [8, 24])  # of 10 samples: batches span two epochs and more
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_and_micro_batches_share_the_batch(world_size, accumulation, batch_size):
    expected = list(StepSampler(10, batch_size, seed=3, total_steps=5))
    ranks = [
        list(StepSampler(10, batch_size, 3, 5, 0, accumulation, rank, world_size))
        for rank in range(world_size)
    ]
    assert all(len(micro_batches) == 5 * accumulation for micro_batches in ranks)
    for step, batch in enumerate(expected):
        slices = [ranks[r][step * accumulation + m] for m in range(accumulation) for r in range(world_size)]
        assert len({len(part) for part in slices}) == 1
        assert list(chain(*slices)) == batch


def test_resumed_order_is_the_tail():
    arguments = {"num_samples": 7, "batch_size": 12, "seed": 0, "accumulation": 3, "rank": 1, "world_size": 2}
    complete = StepSampler(total_steps=6, **arguments)
    resumed = StepSampler(total_steps=6, start_step=4, **arguments)
    assert list(resumed) == list(complete)[4 * 3 :]
    assert list(complete) == list(complete)
    assert len(complete) == len(list(complete)) == 18
    assert len(resumed) == len(list(resumed)) == 6
    assert list(StepSampler(total_steps=6, start_step=6, **arguments)) == []


def test_every_epoch_has_each_sample_once():
    def epochs(seed):
        stream = list(chain(*StepSampler(50, 20, seed, total_steps=10)))
        assert [epoch for epoch, _ in stream] == [epoch for epoch in range(4) for _ in range(50)]
        return [[index for epoch, index in stream if epoch == e] for e in range(4)]

    orders = epochs(seed=0)
    assert all(sorted(order) == list(range(50)) for order in orders)
    orders += epochs(seed=1)
    assert len({tuple(order) for order in orders}) == 8


def test_order_leaves_the_random_numbers_of_the_caller_alone():
    state = torch.get_rng_state()
    expected = list(StepSampler(10, 5, 0, total_steps=4))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert list(StepSampler(10, 5, 0, total_steps=4)) == expected


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 14, "world_size": 2, "accumulation": 2}, r"2 \* 2, not 14; the nearest: 12 or 16"),
        ({"batch_size": 3, "world_size": 2, "accumulation": 2}, r"not 3; the nearest: 4$"),
        ({"batch_size": 0}, r"not 0; the nearest: 1$"),
        ({"world_size": 11, "batch_size": 11}, "11 processes are more than the 10 training samples"),
        ({"accumulation": 0}, "accumulation must be at least 1, not 0"),
        ({"rank": 1}, "rank must be .* not 1 of 1"),
        ({"rank": -1}, "rank must be .* not -1 of 1"),
        ({"start_step": 3}, "start_step must be .* not 3 of 2"),
        ({"start_step": -1}, "start_step must be .* not -1 of 2"),
        ({"window": -1}, "window must be at least 0, not -1"),
        ({"shards": [4, 5]}, "shards must add up to the 10 samples, not to 9"),
    ],
)
def test_sampler_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        StepSampler(**{"num_samples": 10, "batch_size": 4, "seed": 0, "total_steps": 2} | kwargs)


@pytest.mark.parametrize("window", [1, 2, 3, 100])
def test_shards_are_mixed_a_window_at_a_time(window):
    sizes = [5, 1, 7, 3, 4, 6, 2]
    shard_of = [shard for shard, size in enumerate(sizes) for _ in range(size)]
    sampler = StepSampler(28, 7, seed=0, total_steps=8, shards=sizes, window=window)
    indices = [index for _, index in chain(*sampler)]
    epochs = [indices[:28], indices[28:]]
    assert epochs[0] != epochs[1]
    groups = -(-7 // window)
    for epoch in epochs:
        assert sorted(epoch) == list(range(28))
        # As many groups as needed, of as many shards each, one after the other.
        group_sizes = [len(part) for part in torch.arange(7).tensor_split(groups)]
        first_seen = list(dict.fromkeys(shard_of[index] for index in epoch))
        for size in group_sizes:
            shards_of_group, first_seen = first_seen[:size], first_seen[size:]
            count = sum(sizes[shard] for shard in shards_of_group)
            assert {shard_of[index] for index in epoch[:count]} == set(shards_of_group)
            del epoch[:count]


def test_order_of_shards_is_shared_and_resumed():
    arguments = {"num_samples": 20, "batch_size": 8, "seed": 1, "shards": [6, 5, 9], "window": 2}
    whole = list(StepSampler(total_steps=7, **arguments))
    assert list(StepSampler(total_steps=7, start_step=4, **arguments)) == whole[4:]
    ranks = [list(StepSampler(total_steps=7, rank=r, world_size=2, **arguments)) for r in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole
    everywhere = StepSampler(20, 8, 1, total_steps=7, shards=[6, 5, 9], window=0)
    assert list(everywhere) == list(StepSampler(20, 8, 1, total_steps=7))


# Shards


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "dbpkern" / "shards"


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


@pytest.fixture
def sharded(tmp_path):
    """Four shards of five images with labels, each image of another colour, and one that is broken."""
    for shard in range(4):
        members = []
        for i in range(5):
            content = encoded((10 * shard, 50 * i, 0))
            members += [(f"{i}.png", content), (f"{i}.cls", b"7")]
        members.append(("sub/zero.JPG", b"" if shard == 2 else encoded(BLUE, "JPEG")))
        write_shard(tmp_path / f"set-{shard:03}.tar", members)
    return tmp_path


def test_shards_give_their_images(sharded):
    train, held_out = build(f"wds:{sharded}/set-{{000..003}}.tar")
    names = sorted(train.files + held_out.images.names)
    assert names == [
        f"set-{shard:03}.tar/{name}"
        for shard in range(4)
        for name in (*(f"{i}.png" for i in range(5)), "sub/zero.JPG")
    ]
    assert sum(train.shards) == len(train) == 23
    assert len(train.shards) == 4
    for index, name in enumerate(train.files):
        sample = train[0, index]
        if name == "set-002.tar/sub/zero.JPG":
            ((skipped, reason),) = sample.skipped
            assert skipped == name
            assert "cannot identify image file" in reason
        elif name.endswith("png"):
            assert color(sample.image) == (10 * int(name[6]), 50 * int(name[12]), 0)
            assert sample.skipped == []


def test_shards_equal_the_same_images_in_a_folder(sharded, tmp_path):
    for shard in range(4):
        with tarfile.open(sharded / f"set-{shard:03}.tar") as tar:
            tar.extractall(tmp_path / "folder" / f"set-{shard:03}.tar", filter="data")
    (tmp_path / "shards").mkdir()
    for path in sharded.glob("*.tar"):
        path.rename(tmp_path / "shards" / path.name)
    pairs = zip(build(f"folder:{tmp_path / 'folder'}"), build(f"wds:{tmp_path / 'shards'}"), strict=True)
    (folder, shard), held_out = pairs
    assert folder.files == shard.files
    for index in range(len(folder)):
        assert torch.equal(folder[2, index].image, shard[2, index].image)
    assert torch.equal(held_out[0][0].image, held_out[1][0].image)


@pytest.mark.parametrize(
    "pattern", ["set-{000..003}.tar", "set-*.tar", "", "{set-00[01],set-*}.tar", "set-00{0..1}.tar*"]
)
def test_patterns(sharded, pattern):
    paths = [f"set-{shard:03}.tar" for shard in range(2 if pattern.endswith("*") else 4)]
    assert [path.name for path in shards.find_shards(f"{sharded}/{pattern}")] == paths


def test_shards_in_folders_are_named_from_what_they_share(tmp_path):
    for name in ("a/x.tar", "b/x.tar"):
        write_shard(tmp_path / name, [("0.png", encoded(RED)), ("1.png", encoded(RED))])
    assert shards.Shards(shards.find_shards(str(tmp_path)), (".png",)).names() == [
        "a/x.tar/0.png", "a/x.tar/1.png", "b/x.tar/0.png", "b/x.tar/1.png",
    ]  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_sharded_batches_are_those_of_direct_reading(sharded, workers):
    train, _ = build(f"wds:{sharded}")
    sampler = StepSampler(len(train), 6, 0, total_steps=5, shards=train.shards, window=2)
    _ = train[0, 0]  # leaves a file open, which the loaders must not use
    for keys, batch in zip(sampler, build_loader(train, sampler, workers, False, collate), strict=True):
        assert torch.equal(batch["image"], torch.stack([train[key].image for key in keys]))
    again = pickle.loads(pickle.dumps(train))
    assert_same(again[1, 3], train[1, 3])


def test_a_bounded_number_of_shards_is_open(sharded, monkeypatch):
    monkeypatch.setattr(shards, "MAX_OPEN", 2)

    def count():
        links = (Path("/proc/self/fd") / number for number in os.listdir("/proc/self/fd"))
        return sum(link.exists() and link.resolve().suffix == ".tar" for link in links)

    store = shards.Shards(shards.find_shards(str(sharded)), (".png",))
    assert count() == 0
    for name in store.names() * 2:
        assert Image.open(io.BytesIO(store.read(name))).size == (40, 30)
        assert 1 <= count() <= 2
    child = os.fork()
    if child == 0:
        opened, real = [], Path.open
        monkeypatch.setattr(Path, "open", lambda path, *a, **k: opened.append(path) or real(path, *a, **k))
        store.read(store.names()[-1])
        os._exit(len(opened))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_index_is_kept_and_renewed_when_a_shard_changes(sharded, cache, monkeypatch):
    path = sharded / "set-000.tar"
    real, calls = shards.read_members, []
    monkeypatch.setattr(shards, "read_members", lambda *args: calls.append(1) or real(*args))
    before = set(sharded.iterdir())
    first = shards.load_members(path, (".png",))
    second = shards.load_members(path, (".png",))
    assert len(calls) == 1
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(shards.load_members(path, (".png", ".jpg")).names) == 6
    assert len(calls) == 2
    write_shard(path, [("new.png", encoded(RED))])
    assert shards.load_members(path, (".png",)).names.tolist() == [b"new.png"]
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert shards.load_members(path, (".png",)).names.tolist() == [b"new.png"]
    assert len(calls) == 4
    assert set(sharded.iterdir()) == before
    assert {file.suffix for file in cache.iterdir()} == {".npz"}


def test_shards_without_a_place_for_their_index(sharded, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(build(f"wds:{sharded}/set-*.tar")[0]) == 23


def cut_at(size):
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def garbage(path):
    content = bytearray(path.read_bytes())
    content[1024:1536] = b"?" * 512  # the second header
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_at(1024), "is truncated or damaged: no member and no end at byte 1024"),
        (cut_at(1300), "or is damaged: truncated header|no member and no end at byte 1024"),
        (cut_at(600), "or is damaged: unexpected end of data"),
        (cut_at(0), "or is damaged: empty file"),
        (garbage, "no member and no end at byte 1024"),
        (lambda path: path.write_text("no tar" * 1000), "cannot be read as a tar file"),
        (lambda path: write_shard(path, [("a.png", b"1"), ("a.png", b"2")]), "holds a.png twice"),
    ],
)
def test_damaged_shards_are_refused_by_name(sharded, damage, message):
    content = encoded(RED)
    assert len(content) < 512
    path = sharded / "set-001.tar"
    write_shard(path, [("a.png", content), ("b.png", content)])
    damage(path)
    with pytest.raises(ValueError, match=f"shard {path} .*({message})"):
        build(f"wds:{sharded}")


def test_shards_that_are_missing_or_hold_no_image(sharded, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such shard: .*set-004\.tar \(and 1 more of 6\)"):
        build(f"wds:{sharded}/set-{{000..005}}.tar")
    with pytest.raises(FileNotFoundError, match=r"no such shard: .*other-\*\.tar$"):
        build(f"wds:{sharded}/other-*.tar")
    with pytest.raises(ValueError, match=r"must be files on this machine .* not 'https://x/a\.tar'"):
        build("wds:https://x/a.tar")
    with pytest.raises(ValueError, match="Unbalanced"):
        build(f"wds:{sharded}/set-{{000..003.tar")
    write_shard(tmp_path / "labels" / "0.tar", [("a.cls", b"1")])
    with pytest.raises(FileNotFoundError, match=r"no image \(\.jpg .*\) in 1 shards below .*labels"):
        build(f"wds:{tmp_path}/labels")


def test_a_shard_that_vanishes_or_shrinks_later_is_skipped(sharded):
    train = pickle.loads(pickle.dumps(build(f"wds:{sharded}")[0]))  # with no file open
    (sharded / "set-000.tar").unlink()
    cut_at(100)(sharded / "set-001.tar")
    skipped = {}
    for index in range(len(train)):
        skipped |= dict(train[0, index].skipped)
    lost = [name for name in train.files if name < "set-002.tar"]
    assert set(skipped) == {*lost, "set-002.tar/sub/zero.JPG"}
    assert "FileNotFoundError" in skipped[lost[0]]
    assert "ends within" in skipped[lost[-1]]


def test_shards_can_be_held_out(sharded):
    train, held_out = build(f"wds:{sharded}/set-00{{0,1}}.tar", val=f"{sharded}/set-003.tar")
    assert (len(train), train.shards, len(held_out)) == (12, [6, 6], 6)
    assert color(held_out[1].image) == (30, 50, 0)
    part, rest = build(f"wds:{sharded}", val=0.5)
    assert (len(part), len(rest)) == (12, 12)
    with pytest.raises(ValueError, match="val must have no image in common with source wds:"):
        build(f"wds:{sharded}/set-00*.tar", val=f"{sharded}/set-003.tar")
    with pytest.raises(FileNotFoundError, match=r"no such shard: .*set-009\.tar"):
        build(f"wds:{sharded}/set-00{{0,1}}.tar", val=f"{sharded}/set-009.tar")


# Decoded images in memory


@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("kind", ["folder", "wds"])
def test_samples_from_memory_are_the_same(sharded, tmp_path, monkeypatch, kind, place):
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, mode in enumerate(["RGB", "L", "P", "RGBA", "CMYK", "1"] * 2):
        pixels = torch.randint(256, (40 + i, 30, 3), generator=generator, dtype=torch.uint8)
        ending = "jpg" if mode == "CMYK" else "png"
        Image.fromarray(pixels.numpy()).convert(mode).save(folder / f"{i:02}.{ending}")
    source = f"{kind}:{folder if kind == 'folder' else sharded}"
    plain, kept = (build(source, cache=cache, augment_on=place) for cache in (0, 1))
    keys = [(epoch, index) for epoch in range(2) for index in range(len(plain[0]))]
    before = [[plain[0][key] for key in keys], [plain[1][i] for i in range(len(plain[1]))]]

    def load(*arguments):
        raise OSError("gone")

    for dataset in kept:
        dataset.images.load = load  # nothing is read again
    for key, sample in zip(keys, before[0], strict=True):
        assert torch.equal(kept[0][key].image, sample.image)
        assert torch.equal(kept[0][key].noise, sample.noise)
        assert (kept[0][key].flip, kept[0][key].seed) == (sample.flip, sample.seed)
        assert [name for name, _ in kept[0][key].skipped] == [name for name, _ in sample.skipped]
    for index, sample in enumerate(before[1]):
        assert torch.equal(kept[1][index].image, sample.image)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_beside_images_in_memory_are_skipped(broken_folder, workers):
    train, _ = build(f"folder:{broken_folder}", cache=1)
    plain, _ = build(f"folder:{broken_folder}")
    assert (train.images.decoded.places[:, 1] > 0).any()
    sampler = StepSampler(len(train), 4, 0, total_steps=4)
    batches, others = (build_loader(dataset, sampler, workers, False, collate) for dataset in (train, plain))
    skipped = {}
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch["image"], other["image"])
        assert batch["skipped"] == other["skipped"]
        skipped.update(batch["skipped"])
    assert set(skipped) == set(BROKEN) & set(train.files)


def test_images_that_do_not_fit_are_decoded_when_their_turn_comes(tmp_path, capsys, monkeypatch):
    for i in range(30):
        save(tmp_path / f"{i:02}.png", (i, 0, 0), size=(128, 100))  # 38,400 bytes each
    train, held_out = build(f"folder:{tmp_path}", cache=1)
    assert (len(train), len(held_out)) == (29, 1)
    assert train.images.decoded is held_out.images.decoded is None
    assert "data.cache: 30 images take more than 1 MiB, so that each is decoded" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    build(f"folder:{tmp_path}", cache=1)
    assert capsys.readouterr().err == ""
    train, held_out = build(f"folder:{tmp_path}", cache=1, fraction=0.8)  # 23 of 29, and one held out
    for images in (train.images, held_out.images):
        assert images.decoded.block.numel() == 24 * 38_400
    assert train.images.decoded.block.data_ptr() == held_out.images.decoded.block.data_ptr()


def test_memory_for_images_can_be_chosen_by_what_is_free(monkeypatch):
    assert reading.cache_bytes(3) == 3 * 2**20
    memory = argparse.Namespace(available=2**30)
    monkeypatch.setattr(reading.psutil, "virtual_memory", lambda: memory)
    assert reading.cache_bytes("auto") == 2**28
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert reading.cache_bytes("auto") == 2**26
    memory.available = 2**40
    assert reading.cache_bytes("auto") == 2**30


def test_images_in_memory_are_shared_with_processes_that_are_not_forked(tmp_path):
    for i in range(4):
        save(tmp_path / f"{i}.png", (50 * i, 0, 0), size=(100, 100))
    train, _ = build(f"folder:{tmp_path}", cache="auto")
    try:
        sent = ForkingPickler.dumps(train)  # as a loader's process that is not forked is given it
    finally:
        resource_sharer.stop()
    assert len(sent) < 20_000 < 4 * 30_000 == train.images.decoded.block.numel()
    assert train.images.decoded.block.is_shared()
    assert color(train[0, 2].image)[0] == 50 * int(train.files[2][0])


# Lists of files


def test_a_list_of_files_is_the_training_set(sharded, tmp_path):
    for i in range(60):
        save(tmp_path / "folder" / "class" / f"{i:02}.png")
    for source in ("photos", f"folder:{tmp_path / 'folder'}", f"wds:{sharded}"):
        some, before = build(source, fraction=0.5, subset_seed=3)
        path = tmp_path / "files.txt"
        path.write_text("".join(f"{name}\n" for name in reversed(some.files)))
        listed, held_out = build(source, files=str(path))
        assert listed.files == some.files
        assert listed.shards == some.shards
        assert held_out.images.names == before.images.names
        assert_same(listed[1, 2], some[1, 2])
    assert len(listed.shards) == 4


def test_listed_files_are_not_held_out(tmp_path):
    for i in range(150):
        save(tmp_path / f"{i:03}.png")
    full, held_out = build(f"folder:{tmp_path}")
    a, b, c = held_out.images.names
    path = tmp_path / "files.txt"
    path.write_text("\n".join([b, *full.files[:9]]))
    listed, rest = build(f"folder:{tmp_path}", files=str(path))
    assert listed.files == sorted([b, *full.files[:9]])
    assert rest.images.names == [a, c]
    path.write_text("\n".join([*held_out.images.names, *full.files[:9]]))
    with pytest.raises(ValueError, match="leaves no image to hold out"):
        build(f"folder:{tmp_path}", files=str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n", "lists no image"),
        ("astronaut.png\nbrick.png\nastronaut.png\n", "lists 1 images more than once, among them 'astro"),
        ("brick.png\na.png\nb.png\n", "2 of the 3 images .* are not in the source, among them 'a.png'; exp"),
    ],
)
def test_bad_lists_of_files(tmp_path, content, message):
    (tmp_path / "files.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        build(files=str(tmp_path / "files.txt"))
    with pytest.raises(FileNotFoundError, match=r"no such list of files: .*none\.txt"):
        build(files=str(tmp_path / "none.txt"))


# Augmentation on the device


@pytest.mark.parametrize("size", [(224, 224), (32, 48), (8, 8)])
def test_device_and_host_show_the_same(size):
    """The same boxes and flips; pixels differ by what is rounded and clamped between passes."""
    sets = [build_data(DataConfig(augment_on=place), size, NUM_PATCHES, 3)[0] for place in ("host", "device")]
    keys = [(epoch, index) for epoch in range(2) for index in range(0, 896, 40)]
    host, device = (collate([dataset[key] for key in keys]) for dataset in sets)
    assert device["image"].dtype == torch.uint8
    assert device["size"].shape == (len(keys), 2)
    assert 0 < device["flip"].sum() < len(keys)
    assert torch.equal(host["noise"], device["noise"])
    images = pretraining.to_images(device, size)
    assert images.shape == host["image"].shape
    assert images.dtype == torch.float32
    levels = (augment.denormalize(images) - augment.denormalize(host["image"])).abs() * 255
    assert levels.mean() < 0.6
    assert torch.quantile(levels[:, :, ::3, ::3].flatten(), 0.99) < 3
    assert levels.max() < 16
    in_one_go = (device["size"] < 2 * torch.tensor(size)).all(1)
    if in_one_go.any():
        assert levels[in_one_go].mean() < 0.3  # rounding to whole levels alone makes 0.25
    assert in_one_go.any() == (size == (224, 224))
    assert pretraining.to_images(host, size) is host["image"]


def test_views_are_those_of_torchvision(photos):
    train, _ = photos
    image = train.images.read(3)[0].pixels
    draw = pretraining.Draw((0, 4, 200), NUM_PATCHES, train.view)
    view = draw(*image.shape[1:])
    with reading.seeded(0, 4, 200):
        torch.rand(NUM_PATCHES)
        crop = augment.v2.RandomResizedCrop(
            IMG_SIZE, (0.2, 1.0), augment.RATIO, augment.InterpolationMode.BICUBIC, antialias=True
        )
        expected = augment.v2.RandomHorizontalFlip()(crop(image))
    assert torch.equal(augment.finish(photographs.cut({"a": image}, "a", lambda *_: view), IMG_SIZE),
                       augment.normalize(expected))  # fmt: skip
    assert torch.equal(train[4, 200].image, augment.normalize(expected))


def test_resize_weights_are_those_of_antialiased_interpolation():
    lengths = torch.tensor([5, 40, 13, 1])
    weights = augment.resize_weights(lengths, 40, 13)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 13))
    for length, matrix in zip(lengths.tolist(), weights, strict=True):
        line = torch.rand(1, 1, 1, length)
        expected = F.interpolate(line, (1, 13), mode="bicubic", antialias=True)
        torch.testing.assert_close(matrix[:, :length] @ line.flatten(), expected.flatten())
        assert not matrix[:, length:].any()


def test_a_batch_on_the_device_is_bounded_and_independent_of_its_company():
    generator = torch.Generator().manual_seed(0)
    large = torch.randint(256, (3, 400, 30), generator=generator, dtype=torch.uint8)
    small = torch.randint(256, (3, 9, 100), generator=generator, dtype=torch.uint8)
    crops = [augment.bound(crop, IMG_SIZE) for crop in (large, small)]
    assert [crop.shape for crop in crops] == [(3, 32, 30), (3, 9, 48)]
    padded, sizes = augment.pad(crops)
    assert padded.shape == (2, 3, 32, 48)
    assert padded.nbytes <= 2 * 3 * 16 * 24 * 4  # as the result
    flip = torch.tensor([True, False])
    with torch.autocast("cpu", torch.bfloat16):
        together = augment.finish_batch(padded, sizes, flip, IMG_SIZE)
    for i, crop in enumerate(crops):
        alone = augment.finish_batch(*augment.pad([crop]), flip[i : i + 1], IMG_SIZE)
        torch.testing.assert_close(together[i], alone[0], atol=1e-4, rtol=0)
    repeated = augment.finish_batch(
        padded.repeat(40, 1, 1, 1), sizes.repeat(40, 1), flip.repeat(40), IMG_SIZE
    )
    torch.testing.assert_close(repeated, together.repeat(40, 1, 1, 1), atol=1e-4, rtol=0)


# Decoding at a part of the size


def test_draft_decodes_less_where_the_crop_stays_large_enough(tmp_path, photos):
    photo = photos[0].images.read(photos[0].files.index("astronaut.png"))[0].pixels
    augment.v2.functional.to_pil_image(photo).save(tmp_path / "a.jpg", quality=95)
    augment.v2.functional.to_pil_image(photo).save(tmp_path / "a.png")
    images = Images(["a.jpg"], partial(reading.load_file, tmp_path))
    full, draft = (TrainingSet(images, (96, 96), 4, 0, (0.2, 1.0), 1, draft=d) for d in (False, True))
    reductions = set()
    for epoch in range(12):
        draws = [pretraining.Draw((0, epoch, 0), 4, dataset.view) for dataset in (full, draft)]
        (_, view), (b, reduced) = (images.load("a.jpg", draw) for draw in draws)
        assert reduced == view._replace(reduction=reduced.reduction)
        factor = reduced.reduction
        reductions.add(factor)
        assert min(b.shape[1:]) >= 96 - 1
        assert max(view.height // factor - b.shape[1], view.width // factor - b.shape[2]) <= 1
        assert min(b.shape[1], b.shape[2]) < 2 * 96 + 2 or factor == 8
        levels = augment.denormalize(full[epoch, 0].image) - augment.denormalize(draft[epoch, 0].image)
        assert levels.abs().mean() * 255 < 10  # boxes move by up to half a pixel of the smaller image
        assert torch.equal(full[epoch, 0].image, draft[epoch, 0].image) == (factor == 1)
        png, _ = reading.decode(tmp_path / "a.png", draws[1])
        assert png.shape[1:] == view[2:4]
    assert reductions >= {2, 4}


@pytest.mark.parametrize("scaled", [(50, 40), (13, 10), (1, 1)])
def test_scaled_boxes_stay_within_the_image(scaled):
    for view in (View(0, 0, 100, 80), View(99, 79, 1, 1), View(33, 7, 51, 73)):
        top, left, height, width = augment.scaled_box(view, (100, 80), scaled)
        assert min(height, width) >= 1
        assert min(top, left) >= 0
        assert top + height <= scaled[0]
        assert left + width <= scaled[1]
        assert abs(top - view.top * scaled[0] / 100) <= 1
    assert augment.scaled_box(View(0, 0, 100, 80), (100, 80), scaled) == (0, 0, *scaled)


# Runs


TINY = [
    "--model=mae_vit_tiny",
    "--model_args={patch_size: 8, embed_dim: 16, depth: 1, num_heads: 1, decoder_embed_dim: 16,"
    " decoder_depth: 1, decoder_num_heads: 1}",
    "--img_size=16",
    "--batch_size=6",
    "--steps=4",
    "--optim.warmup_steps=1",
    "--eval_every=4",
    "--checkpoint_every=2",
    "--device=cpu",
]


def records(out):
    lines = (out / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "step"]


def test_a_run_on_shards_resumes_exactly(sharded, tmp_path, capsys):
    source = [f"--data.source=wds:{sharded}/set-*.tar", "--data.shard_window=2", "--data.augment_on=device"]
    pretrain.main([*TINY, *source, f"--out={tmp_path / 'whole'}"])
    whole = records(tmp_path / "whole")
    half = tmp_path / "whole" / "checkpoints" / "step-00000002"
    memory = "--data.cache=1"  # changes no sample
    pretrain.main([*TINY, *source, memory, f"--resume={half}", f"--out={tmp_path / 'rest'}"])
    assert [r["loss"] for r in records(tmp_path / "rest")] == [r["loss"] for r in whole[2:]]
    # Other images than before would be another run.
    write_shard(sharded / "set-004.tar", [("0.png", encoded(RED))])
    with pytest.raises(SystemExit):
        pretrain.main([*TINY, *source, "--resume=auto", f"--out={tmp_path / 'rest'}"])
    assert "data: they are no longer those of" in capsys.readouterr().err
    (sharded / "set-004.tar").unlink()
    # The list that a run leaves gives the same run.
    listed = [*source, f"--data.files={tmp_path / 'whole' / 'files.txt'}"]
    pretrain.main([*TINY, *listed, f"--out={tmp_path / 'listed'}"])
    assert [r["loss"] for r in records(tmp_path / "listed")] == [r["loss"] for r in whole]


def test_the_log_tells_the_time_spent_waiting_for_data(tmp_path, monkeypatch):
    real = TrainingSet.__getitem__

    def slow(dataset, key):
        time.sleep(0.02)
        return real(dataset, key)

    monkeypatch.setattr(TrainingSet, "__getitem__", slow)
    pretrain.main([*TINY, "--steps=2", "--accumulation=2", f"--out={tmp_path / 'run'}"])
    first, second = records(tmp_path / "run")
    assert 6 * 0.02 <= first["data_seconds"] <= first["seconds"]
    assert 6 * 0.02 <= second["data_seconds"] <= second["seconds"] - first["seconds"]


PRESETS = sorted(Path(pretrain.__file__).parent.glob("configs/*.yaml"))


@pytest.mark.parametrize(
    "preset", [p for p in PRESETS if p.stem.partition("_")[0] not in ("finetune", "linprobe", "segment")]
)
def test_presets_are_understood(preset):
    config = pretrain.parse([f"--config={preset}", "--out=runs/x"])
    task_of(config).check()
    if preset.stem in ("dbp_base", "mae_base"):
        assert (config.model, config.img_size) == ("mae_vit_base", 224)
        assert config.data.fraction == (0.1 if preset.stem == "dbp_base" else 1)
        assert config.decor.enable == (preset.stem == "dbp_base")
        assert config.mae.decoder == ("dbp" if preset.stem == "dbp_base" else "mae")


# Configuration


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"source": "imagenet"}, "source must be 'photos', 'folder:PATH' or 'wds:PATTERN', not 'imagenet'"),
        ({"source": "folder:"}, "source must be"),
        ({"source": "photos:x"}, "source must be"),
        ({"source": "wds:"}, "source must be"),
        ({"fraction": 0.0}, "fraction must be above 0 and at most 1, not 0.0"),
        ({"fraction": 1.5}, "fraction must be"),
        ({"fraction": float("nan")}, "fraction must be .* not nan"),
        ({"subset_seed": -1}, "subset_seed must be"),
        ({"subset_seed": 2**63}, "subset_seed must be"),
        ({"workers": -1}, "workers must be at least 0, not -1"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale must be"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale must be"),
        ({"crop_scale": (0.5, 1.1)}, "crop_scale must be"),
        ({"crop_scale": (0.5, float("nan"))}, "crop_scale must be"),
        ({"crop_scale": (0.5,)}, "crop_scale must be"),
        ({"crops_per_photo": 0}, "crops_per_photo must be at least 1, not 0"),
        ({"files": "list.txt", "fraction": 0.5}, "files and a fraction exclude each other, .* is 0.5"),
        ({"shard_window": -1}, "shard_window must be at least 0, not -1"),
        ({"augment_on": "gpu"}, "augment_on must be 'host' or 'device', not 'gpu'"),
        ({"draft": True}, "draft has no meaning for source 'photos'"),
        ({"cache": 1}, "cache has no meaning for source 'photos', which are decoded once"),
        (
            {"source": "folder:a", "cache": -1},
            "cache must be a number of MiB of at least 0, or 'auto', not -1",
        ),
        ({"source": "folder:a", "cache": "all"}, "cache must be .* not 'all'"),
        (
            {"source": "folder:a", "cache": "auto", "draft": True},
            "cache must be 0 beside draft, .* not 'auto'",
        ),
        ({"val": 0.1}, "val must be null for source 'photos', which has held-out images, not 0.1"),
        (
            {"source": "folder:a", "val": 0.0},
            "val must be a part above 0 and below 1, a path, or null, not 0.0",
        ),
        ({"source": "folder:a", "val": 1.0}, "val must be a part .* not 1.0"),
        ({"source": "folder:a", "val": float("nan")}, "val must be a part .* not nan"),
        ({"source": "folder:a", "val": ""}, "val must be a part .* not ''"),
    ],
)
def test_config_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**kwargs)
