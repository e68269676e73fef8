import pickle
import random
import socket
import struct
import zlib
from functools import partial
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image

from train import data
from train.data import DataConfig, HeldOutSet, Images, StepSampler, TrainingSet, build_data, build_loader

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
    return tuple(data.denormalize(image).mean((1, 2)).mul(255).round().int().tolist())


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
        Images(names, partial(data.load_file, root)), IMG_SIZE, NUM_PATCHES, seed, crop_scale, 1
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
        list(build_loader(photos[0], sampler, workers, pin_memory=False))
    assert torch.equal(torch.get_rng_state(), state)


def test_loader_gives_the_same_batches_with_workers(photos):
    for dataset, sampler in [
        (photos[0], StepSampler(len(photos[0]), 6, seed=0, total_steps=3, accumulation=2)),
        (photos[1], [[0, 1, 2], [3, 255]]),
    ]:
        alone = list(build_loader(dataset, sampler, 0, pin_memory=False))
        pooled = list(build_loader(dataset, sampler, 2, pin_memory=False))
        keys = list(sampler)
        assert len(alone) == len(pooled) == len(keys)
        for a, b, batch in zip(alone, pooled, keys, strict=True):
            assert a["image"].shape == (len(batch), 3, *IMG_SIZE)
            assert torch.equal(a["image"], torch.stack([dataset[key].image for key in batch]))
            assert torch.equal(a["noise"], torch.stack([dataset[key].noise for key in batch]))
            assert torch.equal(a["image"], b["image"])
            assert torch.equal(a["noise"], b["noise"])
            assert a["skipped"] == b["skipped"] == []


def test_loader_processes_use_one_thread():
    class Threads(TrainingSet):
        def __init__(self):
            pass

        def __getitem__(self, key):
            return data.Sample(torch.tensor(torch.get_num_threads()), torch.zeros(1), [])

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (batch,) = build_loader(Threads(), [[0]], 1, pin_memory=False)
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
    torch.testing.assert_close(data.denormalize(image)[:, 0, 0], torch.tensor([1.0, 0.0, 0.2]))
    batch = torch.rand(2, 3, 4, 5)
    torch.testing.assert_close(data.denormalize(torch.stack([data.normalize(x) for x in batch])), batch)
    assert data.denormalize(torch.full((3, 1, 1), 100.0)).max() == 1


def test_crop_scale_is_the_area_of_the_crops(tmp_path):
    ramp = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    for crop_scale, low, high in [((0.01, 0.01), 15, 40), ((0.25, 0.25), 100, 160)]:
        dataset = training_set(tmp_path, ["ramp.png"], crop_scale=crop_scale)
        for epoch in range(10):
            image = data.denormalize(dataset[epoch, 0].image) * 255
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
            image, skipped = dataset.images.read(i)
            assert image.dtype == torch.uint8
            assert image.shape[0] == 3
            assert min(image.shape[1:]) >= 300
            assert skipped == []


def test_an_epoch_of_photos_has_as_many_crops_of_each(photos, monkeypatch):
    train, _ = build(crops_per_photo=3)
    assert len(train) == 42
    read = []
    monkeypatch.setattr(train.images, "read", lambda i: read.append(i) or (torch.zeros(3, 8, 8).byte(), []))
    for index in range(42):
        _ = train[0, index]
    assert sorted(read) == sorted(list(range(14)) * 3)


def test_missing_photo_package(monkeypatch):
    monkeypatch.setattr(data, "PHOTOS", {"a_package_nobody_has/data": ("a.png",)})
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
    held_out = HeldOutSet(Images(list(solid), solid.__getitem__), IMG_SIZE, NUM_PATCHES, crops=6)
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
    assert data.list_images(tmp_path / "flat") == ["a.jpeg", "b.PNG"]
    for name in ("dog/2.webp", "dog/1.JPEG", "cat/deep/1.bmp", "cat/1.tif", "0.gif", "z.TIFF"):
        save(tmp_path / "nested" / name)
    expected = ["0.gif", "cat/1.tif", "cat/deep/1.bmp", "dog/1.JPEG", "dog/2.webp", "z.TIFF"]
    assert data.list_images(tmp_path / "nested") == expected
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "class").symlink_to(tmp_path / "flat")
    assert data.list_images(tmp_path / "linked") == ["class/a.jpeg", "class/b.PNG"]

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
    image = data.decode(tmp_path / name)
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
    images = Images(["bad.png", "good.png"], partial(data.load_file, tmp_path))
    _, first = images.read(0)
    save(tmp_path / "bad.png")
    _, second = images.read(0)
    assert first == second
    assert len(first) == 1


def test_oversized_file_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    write_bomb(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ValueError, match="20000 x 20000 is more than 200000000 pixels"):
        data.decode(tmp_path / "bomb.png")
    save(tmp_path / "a.png", size=(40, 30))
    monkeypatch.setattr(data, "MAX_PIXELS", 1200)
    data.decode(tmp_path / "a.png")
    monkeypatch.setattr(data, "MAX_PIXELS", 1199)
    with pytest.raises(ValueError, match="40 x 30 is more than 1199 pixels"):
        data.decode(tmp_path / "a.png")


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_files_are_reported_with_the_batches(broken_folder, workers):
    train, _ = build(f"folder:{broken_folder}")
    broken = set(BROKEN) & set(train.files)
    assert len(broken) >= len(BROKEN) - 1
    skipped = {}
    for batch in build_loader(train, StepSampler(len(train), 4, 0, total_steps=4), workers, pin_memory=False):
        assert batch["image"].shape == (4, 3, *IMG_SIZE)
        skipped.update(batch["skipped"])
    assert set(skipped) == broken
    assert "DecompressionBombError" in skipped.get("bomb.png", "DecompressionBombError")


def test_held_out_files_are_a_fiftieth(monkeypatch):
    names = [f"{i:04}.png" for i in range(1000)]
    train, held_out = data.split_files(names, lambda name: torch.zeros(3, 1, 1))
    assert len(held_out) == 20
    assert sorted(train + held_out) == names
    assert train == sorted(train)
    assert max(int(name[:4]) for name in held_out) - min(int(name[:4]) for name in held_out) > 500
    assert data.split_files(names[::-1], lambda name: torch.zeros(3, 1, 1))[1] == held_out
    monkeypatch.setattr(data, "MAX_HELD_OUT_FILES", 5)
    assert data.split_files(names, lambda name: torch.zeros(3, 1, 1))[1] == held_out[:5]


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
    images = Images(["a.png"], partial(data.load_file, tmp_path))
    image = HeldOutSet(images, IMG_SIZE, NUM_PATCHES, crops=None)[0].image
    assert image.shape == (3, *IMG_SIZE)
    green = torch.tensor(GREEN).view(3, 1, 1) / 255
    torch.testing.assert_close(data.denormalize(image), green.expand_as(image), atol=1e-5, rtol=0)
    assert data.center_crop(torch.zeros(3, 500, 1, dtype=torch.uint8), IMG_SIZE).shape == (3, *IMG_SIZE)


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
    ],
)
def test_sampler_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        StepSampler(**{"num_samples": 10, "batch_size": 4, "seed": 0, "total_steps": 2} | kwargs)


# Configuration


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"source": "imagenet"}, "source must be 'photos' or 'folder:PATH', not 'imagenet'"),
        ({"source": "folder:"}, "source must be"),
        ({"source": "photos:x"}, "source must be"),
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
    ],
)
def test_config_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**kwargs)
