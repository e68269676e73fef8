"""Image files: folders, broken files, what is held out, decoded images in memory, fractions, lists."""

import argparse
from functools import partial
from multiprocessing import resource_sharer
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from image_files import (
    BLUE,
    BROKEN,
    GREEN,
    IMG_SIZE,
    RED,
    assert_same,
    build,
    color,
    save,
    training_set,
    write_bomb,
)
from PIL import Image

from train.data import pretraining, reading
from train.data.augment import Crop
from train.data.loading import StepSampler, build_loader
from train.data.pretraining import collate
from train.data.reading import Images

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
