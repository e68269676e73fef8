"""Images with masks: ADE20K's layout, folders, scenes, and what training does to them."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from train.data import scenes
from train.data.loading import StepSampler, build_loader
from train.data.masks import IGNORE
from train.data.photos import load_photos
from train.data.reading import seeded
from train.data.segmented import (
    Augment,
    PhotometricDistort,
    Preprocess,
    SegmentedConfig,
    build_segmented,
    collate,
)

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
SIZE = (16, 24)


def build(source="scenes", img_size=SIZE, seed=0, **kwargs):
    return build_segmented(SegmentedConfig(source, **kwargs), img_size, MEAN, STD, seed)


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def save_pair(image: Path, mask: Path, values, size: tuple[int, int] | None = None, fill: int = 128) -> None:
    """A grey image with a mask of these values, [H, W]."""
    values = np.asarray(values, np.uint8)
    save(image, np.full((*(size or values.shape), 3), fill, np.uint8))
    save(mask, values)


def save_folder(root: Path, count: int = 5) -> Path:
    """Pairs of 9 x 7 pixels, with labels 0 to 2 and 255."""
    for i in range(count):
        values = np.arange(63).reshape(9, 7) % 3
        values[0, 0] = IGNORE
        save_pair(root / f"images/{i}.png", root / f"masks/{i}.png", values, fill=10 * i)
    return root


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def assert_same(a, b):
    assert torch.equal(a.image, b.image)
    assert torch.equal(a.mask, b.mask)
    assert a.skipped == b.skipped


# ADE20K


@pytest.fixture
def ade20k(tmp_path) -> Path:
    save_pair(
        tmp_path / "images/training/ADE_train_00000001.jpg",
        tmp_path / "annotations/training/ADE_train_00000001.png",
        [[0, 1, 2], [149, 150, 0]],
    )
    save_pair(
        tmp_path / "images/validation/ADE_val_00000001.jpg",
        tmp_path / "annotations/validation/ADE_val_00000001.png",
        [[150, 1], [0, 77]],
    )
    return tmp_path


def test_labels_of_ade20k_are_shifted_once(ade20k):
    training, held_out, classes = build(f"ade20k:{ade20k}", (2, 3), scale=(1, 1), flip=0, max_category=1)
    assert training.files == ["images/training/ADE_train_00000001.jpg"]
    for epoch in range(2):
        assert training[epoch, 0].mask.tolist() == [[255, 0, 1], [148, 149, 255]]
        assert held_out[epoch, 0].mask.tolist() == [[149, 0], [255, 76]]
    assert training[0, 0].mask.dtype == torch.uint8
    assert classes == tuple(f"class {number}" for number in range(1, 151))


def test_names_of_ade20k_come_from_its_table(ade20k):
    rows = [f"{i}\t0.1\t2\t3\tname{i}, synonym{i} " for i in range(1, 151)]
    table = ade20k / "objectInfo150.txt"
    table.write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows, ""]))
    assert build(f"ade20k:{ade20k}")[2] == tuple(f"name{i}" for i in range(1, 151))
    table.write_text("\n".join(rows))
    with pytest.raises(ValueError, match=f"{table}: expected 150 classes, got 149"):
        build(f"ade20k:{ade20k}")


def test_labels_beyond_those_of_ade20k_are_refused(ade20k):
    mask = ade20k / "annotations/training/ADE_train_00000002.png"
    save_pair(ade20k / "images/training/ADE_train_00000002.jpg", mask, [[151]])
    training, _, _ = build(f"ade20k:{ade20k}")
    with pytest.raises(
        ValueError, match=re.escape(f"{mask}: expected labels 1 to 150, or 0 for none, got 151")
    ):
        training[0, 1]


# Folders


def test_folder_is_split_the_same_in_every_run(tmp_path):
    save_folder(tmp_path, 10)
    training, held_out, classes = build(f"folder:{tmp_path}")
    assert (len(training), len(held_out)) == (8, 2)
    assert sorted(training.files + held_out.files) == [f"images/{i}.png" for i in range(10)]
    assert classes == ("class 0", "class 1", "class 2")
    for seed, fraction in ((1, 1.0), (0, 0.5)):
        other, same, _ = build(f"folder:{tmp_path}", seed=seed, fraction=fraction)
        assert same.files == held_out.files
        assert len(other) == 8 * fraction
        assert set(other.files) <= set(training.files)
    subsets = {tuple(build(f"folder:{tmp_path}", fraction=0.5, subset_seed=i)[0].files) for i in range(5)}
    assert len(subsets) > 1
    assert len(build(f"folder:{tmp_path}", fraction=0.01)[0]) == 1


def test_folder_with_train_and_val(tmp_path):
    save_folder(tmp_path / "train")
    save_pair(tmp_path / "val/images/sub/a.JPG", tmp_path / "val/masks/sub/a.png", [[2, 255]])
    save_pair(tmp_path / "val/images/sub/b.png", tmp_path / "val/masks/sub/b.png", [[3]])
    training, held_out, classes = build(f"folder:{tmp_path}")
    assert training.files == [f"train/images/{i}.png" for i in range(5)]
    assert held_out.files == ["val/images/sub/a.JPG", "val/images/sub/b.png"]
    assert len(classes) == 3  # as in training
    assert held_out[0, 0].mask.tolist() == [[2, 255]]
    with pytest.raises(
        ValueError, match=r"val/masks/sub/b.png: expected labels 0 to 2, or 255 for none, got 3"
    ):
        held_out[0, 1]


def test_names_of_classes_fix_their_number(tmp_path):
    save_folder(tmp_path)
    names = tmp_path / "classes.txt"
    names.write_text("sky\n sea \n\nland\nship\n")
    assert build(f"folder:{tmp_path}")[2] == ("sky", "sea", "land", "ship")
    names.write_text("sky\nsea\n")
    with pytest.raises(ValueError, match=r"masks/\d.png: expected labels 0 to 1, or 255 for none, got 2"):
        build(f"folder:{tmp_path}")
    for text in ("", "sky", "sky\nsea\nsky", "\n".join(map(str, range(256)))):
        names.write_text(text)
        with pytest.raises(ValueError, match=r"classes.txt: expected 2 to 255 different names"):
            build(f"folder:{tmp_path}")


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "1"])
def test_masks_of_every_depth_are_numbers(tmp_path, mode):
    save_folder(tmp_path)
    values = np.array([[0, 1], [1, 0]] if mode == "1" else [[0, 2], [254, 255]])
    for i in range(5):
        if mode == "P":
            image = Image.fromarray(values.astype(np.uint8)).convert("L")
            image.putpalette([(255 - i) % 256 for i in range(768)])
        else:
            image = Image.fromarray(values.astype({"L": np.uint8, "I;16": np.uint16, "1": bool}[mode]))
        image.save(tmp_path / f"masks/{i}.png")
        with Image.open(tmp_path / f"masks/{i}.png") as stored:
            assert stored.mode == mode
        save(tmp_path / f"images/{i}.png", np.zeros((2, 2, 3), np.uint8))
    _, held_out, classes = build(f"folder:{tmp_path}")
    assert held_out[0, 0].mask.tolist() == values.tolist()
    assert len(classes) == (2 if mode == "1" else 255)


# What values mean


def one_pair(root: Path, values) -> Path:
    """A folder of one training image and one to validate by, both with a mask of these values."""
    for part in ("train", "val"):
        shape = np.shape(values)[:2]
        save(root / f"images/{part}/a.png", np.zeros((*shape, 3), np.uint8))
        save(root / f"annotations/{part}/a.png", np.asarray(values, np.uint8))
    return root


def test_the_label_that_is_no_class_can_be_named(tmp_path):
    one_pair(tmp_path, [[0, 1, 2, 11]])
    _, held_out, classes = build(f"folder:{tmp_path}", ignored=11)
    assert classes == ("class 0", "class 1", "class 2")
    assert held_out[0, 0].mask.tolist() == [[0, 1, 2, 255]]
    assert len(build(f"folder:{tmp_path}")[2]) == 12
    _, held_out, classes = build(f"folder:{tmp_path}", ignored=[0, 11])  # classes need not begin at 0
    assert classes == ("class 1", "class 2")
    assert held_out[0, 0].mask.tolist() == [[255, 0, 1, 255]]
    with pytest.raises(ValueError, match=r"labels from 0 to 3 at least, and 1 to 2, 11 for .* are all 0"):
        build(f"folder:{tmp_path}", ignored=[1, 2, 11])
    (tmp_path / "classes.txt").write_text("sky\nsea\n")
    with pytest.raises(ValueError, match=r"a.png: expected labels 0 to 1, or 11 for none, got 2"):
        build(f"folder:{tmp_path}", ignored=11)
    _, held_out, classes = build(f"folder:{tmp_path}", ignored="rest")
    assert classes == ("sky", "sea")
    assert held_out[0, 0].mask.tolist() == [[0, 1, 255, 255]]


def test_values_are_mapped_to_classes(tmp_path):
    one_pair(tmp_path, [[7, 26, 27, 3], [255, 0, 7, 28]])
    (tmp_path / "classes.txt").write_text("others\nthan\nthese\n")
    options = {"classes": {"road": 7, "vehicle": [26, 27, 28]}}
    _, held_out, classes = build(f"folder:{tmp_path}", **options, ignored=[0, 3, 255])
    assert classes == ("road", "vehicle")
    assert held_out[0, 0].mask.tolist() == [[0, 1, 1, 255], [255, 255, 0, 1]]
    _, rest, _ = build(f"folder:{tmp_path}", **options, ignored="rest")
    assert torch.equal(rest[0, 0].mask, held_out[0, 0].mask)
    with pytest.raises(ValueError, match=r"a.png: expected labels 7, 26 to 28, or 255 for none, got 3"):
        build(f"folder:{tmp_path}", **options)


def test_a_class_may_have_the_value_255(tmp_path):
    one_pair(tmp_path, [[0, 255]])  # as masks of one object and its ground often are
    _, held_out, _ = build(f"folder:{tmp_path}", classes={"ground": 0, "object": 255})
    assert held_out[0, 0].mask.tolist() == [[0, 1]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_mapped_to_classes(tmp_path, mode):
    colours = np.array([[[128, 128, 128], [64, 0, 128]], [[0, 0, 0], [64, 0, 128]]], np.uint8)
    one_pair(tmp_path, np.zeros((2, 2)))
    for part in ("train", "val"):
        image = Image.fromarray(colours).convert(mode, palette=Image.Palette.ADAPTIVE)
        image.save(tmp_path / f"annotations/{part}/a.png")
        with Image.open(tmp_path / f"annotations/{part}/a.png") as stored:
            assert stored.mode == mode
    options = {"classes": {"sky": "#808080", "car": ["#400080", "#FFFFff"]}}
    _, held_out, classes = build(f"folder:{tmp_path}", **options, ignored="#000000")
    assert classes == ("sky", "car")
    assert held_out[0, 0].mask.tolist() == [[0, 1], [255, 1]]
    _, rest, _ = build(f"folder:{tmp_path}", **options, ignored="rest")
    assert torch.equal(rest[0, 0].mask, held_out[0, 0].mask)
    with pytest.raises(ValueError, match=r"a.png: expected colours #808080, #400080, #ffffff, got #000000"):
        build(f"folder:{tmp_path}", **options)


def test_the_rest_needs_classes(tmp_path):
    one_pair(tmp_path, [[0, 1]])
    with pytest.raises(
        ValueError, match=f"data.ignored: 'rest' .* expected {tmp_path}/classes.txt or data.c"
    ):
        build(f"folder:{tmp_path}", ignored="rest")


# Parts


def test_images_and_annotations_with_parts(tmp_path):
    for part, label in (("train", 2), ("val", 1), ("test", 0)):
        for i in range(2):
            save_pair(
                tmp_path / f"images/{part}/{i}.jpg", tmp_path / f"annotations/{part}/{i}.png", [[label]]
            )
    training, held_out, classes = build(f"folder:{tmp_path}")
    assert training.files == ["images/train/0.jpg", "images/train/1.jpg"]
    assert held_out.files == ["images/val/0.jpg", "images/val/1.jpg"]
    assert len(classes) == 3
    same, held_out, _ = build(f"folder:{tmp_path}", split="test")
    assert same.files == training.files
    assert held_out[0, 0].mask.tolist() == [[0]]
    assert len(held_out) == 2


@pytest.mark.parametrize("layout", ["{part}/images {part}/masks", "images/{part} annotations/{part}"])
def test_test_takes_the_place_of_a_missing_val(tmp_path, layout):
    for part in ("train", "test"):
        images, masks = layout.format(part=part).split()
        save_pair(tmp_path / images / "a.png", tmp_path / masks / "a.png", [[0, 1]])
    _, held_out, _ = build(f"folder:{tmp_path}")
    assert held_out.files == [f"{layout.split()[0].format(part='test')}/a.png"]
    with pytest.raises(FileNotFoundError, match=f"no such folder: {tmp_path}/.*val"):
        build(f"folder:{tmp_path}", split="val")


def test_annotations_without_parts_are_something_else(tmp_path):
    save_folder(tmp_path)
    (tmp_path / "annotations").mkdir()
    assert len(build(f"folder:{tmp_path}")[0]) == 4


def test_a_split_needs_parts(tmp_path):
    save_folder(tmp_path)
    with pytest.raises(ValueError, match=f"data.split: .*expected {tmp_path}/test or .*annotations/test"):
        build(f"folder:{tmp_path}", split="test")


# Cityscapes


def test_cityscapes_from_its_official_layout(tmp_path):
    for part, city in (("train", "ulm"), ("val", "bonn")):
        name = f"{part}/{city}/{city}_000000_000019"
        mask = tmp_path / f"gtFine/{name}_gtFine_labelIds.png"
        save_pair(tmp_path / f"leftImg8bit/{name}_leftImg8bit.png", mask, [[*range(34), 255]])
        for other in ("color", "instanceIds", "labelTrainIds"):
            save(tmp_path / f"gtFine/{name}_gtFine_{other}.png", np.zeros((3, 3), np.uint8))
        (tmp_path / f"gtFine/{name}_gtFine_polygons.json").write_text("{}")
    training, held_out, classes = build(f"cityscapes:{tmp_path}")
    assert training.files == ["leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png"]
    assert held_out.files == ["leftImg8bit/val/bonn/bonn_000000_000019_leftImg8bit.png"]
    assert len(classes) == 19
    assert (classes[0], classes[13], classes[18]) == ("road", "car", "bicycle")
    none = 255
    # The train ids of cityscapesScripts, by id.
    expected = [none] * 7 + [0, 1, none, none, 2, 3, 4, none, none, none, 5, none, 6, 7, 8, 9, 10, 11, 12, 13]
    expected += [14, 15, none, none, 16, 17, 18, none]
    assert held_out[0, 0].mask.tolist() == [expected]
    (tmp_path / "gtFine/val/bonn/bonn_000000_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"no image file .*_gtFine_labelIds"):
        build(f"cityscapes:{tmp_path}")


# What is found at the start


@pytest.mark.parametrize("kind", ["ade20k", "folder"])
def test_missing_folders_are_named(tmp_path, kind):
    with pytest.raises(FileNotFoundError, match=f"no such folder: {tmp_path}/nowhere/images"):
        build(f"{kind}:{tmp_path}/nowhere")


@pytest.mark.parametrize("missing", ["images", "masks"])
def test_missing_and_empty_parts_are_named(tmp_path, missing):
    save_folder(tmp_path)
    for path in (tmp_path / missing).iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=f"no image file .* below {tmp_path}/{missing}"):
        build(f"folder:{tmp_path}")
    (tmp_path / missing).rmdir()
    with pytest.raises(FileNotFoundError, match=f"no such folder: {tmp_path}/{missing}"):
        build(f"folder:{tmp_path}")


def test_validation_is_required_beside_training(tmp_path):
    save_folder(tmp_path / "train")
    with pytest.raises(FileNotFoundError, match=f"no such folder: {tmp_path}/val/images"):
        build(f"folder:{tmp_path}")


@pytest.mark.parametrize(("has", "lacks"), [("images", "masks"), ("masks", "images")])
def test_files_without_partner_are_named(tmp_path, has, lacks):
    save_folder(tmp_path)
    (tmp_path / lacks / "3.png").unlink()
    expected = f"1 of 5 {has} have no partner in {tmp_path}/{lacks}, among them {tmp_path}/{has}/3.png"
    with pytest.raises(ValueError, match=re.escape(expected)):
        build(f"folder:{tmp_path}")


def test_masks_are_png_files(tmp_path):
    save_folder(tmp_path)
    (tmp_path / "masks/3.png").rename(tmp_path / "masks/3.jpg")
    with pytest.raises(ValueError, match=r"1 of 5 images have no partner in .*images/3.png"):
        build(f"folder:{tmp_path}")


def test_images_of_one_name_are_refused(tmp_path):
    save_folder(tmp_path)
    save(tmp_path / "images/3.jpg", np.zeros((9, 7, 3), np.uint8))
    with pytest.raises(ValueError, match=r"images/3.jpg and .*3.png have the same name"):
        build(f"folder:{tmp_path}")


def test_classes_of_the_held_out_part_count_too(tmp_path):
    save_folder(tmp_path)
    held_out = build(f"folder:{tmp_path}")[1].files
    save(tmp_path / held_out[0].replace("images", "masks"), np.full((9, 7), 6, np.uint8))
    assert len(build(f"folder:{tmp_path}")[2]) == 7


def test_masks_with_channels_are_named_where_classes_are_counted(tmp_path):
    save_folder(tmp_path)
    save(tmp_path / "masks/3.png", np.zeros((9, 7, 3), np.uint8))
    with pytest.raises(ValueError, match=r"masks/3.png: expected one channel of class numbers, got 3"):
        build(f"folder:{tmp_path}")


def test_a_further_image_moves_at_most_one_other(tmp_path):
    save_folder(tmp_path, 20)
    before = set(build(f"folder:{tmp_path}")[1].files)
    assert len(before) == 4
    for i in range(20, 25):
        save_pair(tmp_path / f"images/{i}.png", tmp_path / f"masks/{i}.png", [[0, 1, 2]])
        after = set(build(f"folder:{tmp_path}")[1].files)
        assert len(before - after) <= 1
        before = after


def test_one_image_cannot_be_split(tmp_path):
    save_folder(tmp_path, 1)
    with pytest.raises(ValueError, match=f"at least 2 images in {tmp_path}/images, got 1"):
        build(f"folder:{tmp_path}")


def test_classes_that_cannot_be_told_are_refused(tmp_path):
    for i in range(5):
        save_pair(tmp_path / f"images/{i}.png", tmp_path / f"masks/{i}.png", [[255]])
    with pytest.raises(ValueError, match=r"those of 5 masks, such as .*masks/\d.png, are all without"):
        build(f"folder:{tmp_path}")
    save(tmp_path / "masks/3.png", np.array([[0]], np.uint8))  # a mask of 0 and 255, as of one class alone
    with pytest.raises(ValueError, match=r"labels from 0 to 1 at least, and 255 .*, are all 0"):
        build(f"folder:{tmp_path}")
    for i in range(5):
        save(tmp_path / f"masks/{i}.png", np.array([[300]], np.uint16))
    with pytest.raises(ValueError, match=r"masks/\d.png: expected labels below 255, or 255, got 300"):
        build(f"folder:{tmp_path}")


# What is found when a pair is read


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((9, 8), np.uint8), r"expected a mask of its image's size \(9, 7\), got \(9, 8\)"),
        (np.zeros((9, 7, 3), np.uint8), "expected one channel of class numbers, got 3 channels"),
        (np.zeros((9, 7, 4), np.uint8), "expected one channel of class numbers, got 4 channels"),
        (np.full((9, 7), 3, np.uint8), "expected labels 0 to 2, or 255 for none, got 3"),
        (np.full((9, 7), 511, np.uint16), "expected labels 0 to 2, or 255 for none, got 511"),
    ],
)
def test_masks_that_do_not_fit_stop_the_run(tmp_path, values, message):
    save_folder(tmp_path)
    (tmp_path / "classes.txt").write_text("a\nb\nc")
    training, _, _ = build(f"folder:{tmp_path}")
    for index in (1, 0):
        mask = tmp_path / training.files[index].replace("images", "masks")
        save(mask, values)
        with pytest.raises(ValueError, match=f"{mask}: {message}"):
            training[0, index]
    with pytest.raises(ValueError, match=f"{mask}: {message}"):  # of the first pair at once
        build(f"folder:{tmp_path}")


@pytest.mark.parametrize("broken", ["images", "masks"])
def test_pairs_with_an_unreadable_file_are_replaced_by_the_next(tmp_path, broken):
    save_folder(tmp_path)
    training, _, _ = build(f"folder:{tmp_path}")
    name = training.files[1]
    truncate(tmp_path / name.replace("images", broken))
    training, _, classes = build(f"folder:{tmp_path}")
    assert len(classes) == 3
    sample, whole = training[0, 1], training[0, 2]
    assert [skipped for skipped, _ in sample.skipped] == [name]
    if broken == "masks":
        assert f"{tmp_path}/masks/" in sample.skipped[0][1]
    assert whole.skipped == []
    batch = collate([sample, whole])
    assert batch["skipped"] == sample.skipped
    for name in training.files:
        truncate(tmp_path / name)
    with pytest.raises(ValueError, match=r"none of 4 images can be read, among them: images/"):
        build(f"folder:{tmp_path}")


# Samples


@pytest.fixture(scope="module")
def composed():
    return build()


def test_sample_is_a_function_of_seed_epoch_and_index(composed):
    keys = [(0, 0), (0, 1), (5, 1), (5, 1999)]
    expected = {key: composed[0][key] for key in keys}
    other, _, _ = build()
    for state, key in enumerate(reversed(keys)):
        torch.manual_seed(state)
        np.random.seed(state)
        random.seed(state)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        assert_same(other[key], expected[key])
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    image, mask, _ = expected[0, 0]
    assert (image.shape, image.dtype) == ((3, *SIZE), torch.float32)
    assert (mask.shape, mask.dtype) == (SIZE, torch.uint8)
    samples = [*expected.values(), build(seed=1)[0][0, 0]]
    for i, a in enumerate(samples):
        assert not any(torch.equal(a.image, b.image) for b in samples[:i])


def test_batches_do_not_depend_on_workers_or_their_cut(composed, tmp_path):
    save_folder(tmp_path, 8)
    folder, _, _ = build(f"folder:{tmp_path}")
    for dataset in (composed[0], folder):
        whole = StepSampler(len(dataset), 6, seed=0, total_steps=2)
        cut = StepSampler(len(dataset), 6, seed=0, total_steps=2, accumulation=3)
        runs = [
            list(build_loader(dataset, sampler, workers, False, collate))
            for sampler, workers in ((whole, 0), (whole, 2), (cut, 2))
        ]
        assert [len(run) for run in runs] == [2, 2, 6]
        for key in ("image", "mask"):
            stacked = [torch.cat([batch[key] for batch in run]) for run in runs]
            assert all(torch.equal(stacked[0], other) for other in stacked[1:])
        assert runs[0][0]["mask"].dtype == torch.int64


def test_held_out_samples_keep_the_size_of_their_masks(tmp_path):
    for i, size in enumerate([(9, 7), (30, 61), (1, 5)]):
        values = np.arange(size[0] * size[1]).reshape(size) % 3
        save_pair(tmp_path / f"val/images/{i}.png", tmp_path / f"val/masks/{i}.png", values)
    save_folder(tmp_path / "train")
    source = f"folder:{tmp_path}"
    for short_side, shapes in ((None, [(9, 7), (30, 61), (1, 5)]), (14, [(18, 14), (14, 28), (14, 70)])):
        _, held_out, _ = build(source, short_side=short_side)
        for i, shape in enumerate(shapes):
            (image,), mask, _ = held_out[0, i]
            assert image.shape == (3, *shape)
            expected = (128 / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
            torch.testing.assert_close(image, expected.view(3, 1, 1).expand_as(image))
            assert torch.equal(mask, (torch.arange(mask.numel()) % 3).view_as(mask).to(torch.uint8))
            assert torch.equal(held_out[7, i].image[0], image)


# Augmentation


def augmenting(img_size, mean=MEAN, **kwargs) -> Augment:
    config = SegmentedConfig("folder:.", **kwargs)
    return Augment(config, img_size, Preprocess(config.short_side, mean, (1, 1, 1)))


@pytest.mark.parametrize("short_side", [None, 75])
def test_masks_stay_on_their_images(short_side):
    size, img_size = (100, 120), (64, 48)
    # A pixel tells where it is, in the image by twice the pixels; the mask by one coordinate at a time.
    places = torch.stack(torch.meshgrid(torch.arange(100), torch.arange(120), indexing="ij"))
    pixels = torch.stack([*(2 * places), torch.full(size, 200)]).to(torch.uint8)
    augment = augmenting(img_size, (0, 0, 0), short_side=short_side, max_category=1, distort=0)
    seen = torch.zeros(size, dtype=torch.bool)
    flips = set()
    for key in range(40):
        masks = []
        for axis in range(2):
            with seeded(key):
                image, mask = augment(pixels, places[axis].to(torch.uint8))
            masks.append(mask.long())
        mask = torch.stack(masks)
        assert image.shape == (3, *img_size)
        inside = mask[0] != IGNORE
        assert torch.equal(inside, image[2] > 0)
        # Antialiasing bends the ramp near the sides of the image.
        inside &= ((mask >= 3) & (mask < torch.tensor(size).view(2, 1, 1) - 3)).all(0)
        distance = image[:2] * 255 / 2 - mask
        assert distance[:, inside].abs().max() <= 0.76  # half a pixel, and how exactly the image tells it
        seen[mask[0, inside], mask[1, inside]] = True
        flips.add(bool(mask[1, 10, 10] > mask[1, 10, 20]))
    assert seen.float().mean() > 0.5
    assert flips == {False, True}


def test_scales_are_those_asked_for():
    # Half of a ramp's columns are left at scale 0.5, and so on: its slope tells the scale.
    pixels = torch.arange(200).expand(3, 100, 200).to(torch.uint8)
    scales = []
    for short_side, factor in ((None, 1), (50, 0.5)):
        augment = augmenting((20, 20), short_side=short_side, max_category=1, flip=0, distort=0)
        for key in range(200):
            with seeded(key):
                image, _ = augment(pixels, torch.zeros(100, 200, dtype=torch.uint8))
            scales.append(19 / (255 * float(image[0, 0, -1] - image[0, 0, 0])) / factor)
    assert 0.4 < min(scales) < 0.6
    assert 1.6 < max(scales) < 2.3
    assert abs(sum(scales) / len(scales) - 1.25) < 0.1


def test_small_and_odd_images_are_padded():
    for size in ((1, 1), (5, 40), (40, 5), (15, 23)):
        pixels = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
        mask = torch.randint(0, 3, size, dtype=torch.uint8)
        augment = augmenting((17, 31), scale=(1, 1), flip=0, distort=0)
        image, padded = augment(pixels, mask)
        h, w = min(size[0], 17), min(size[1], 31)
        assert (image[:, h:] == 0).all()
        assert (image[:, :, w:] == 0).all()
        assert (padded[h:] == IGNORE).all()
        assert (padded[:, w:] == IGNORE).all()
        assert (padded[:h, :w] < 3).all()
        assert (image[:, :h, :w] != 0).any()
        if size == (15, 23):
            assert torch.equal(padded[:h, :w], mask)
            expected = v2.functional.normalize(pixels / 255, MEAN, (1, 1, 1))
            torch.testing.assert_close(image[:, :h, :w], expected)
        image, padded = augmenting((17, 31), scale=(0.01, 0.02))(pixels, mask)
        assert 1 <= (padded != IGNORE).sum() <= 4


def test_crops_of_one_class_are_avoided():
    mask = torch.zeros(60, 60, dtype=torch.uint8)
    mask[:12, :12] = 1
    mask[30:] = IGNORE
    augment = augmenting((20, 20))

    def fits(top, left):
        crop = mask[top : top + 20, left : left + 20]
        counts = [int((crop == label).sum()) for label in (0, 1)]
        return 0 < max(counts) <= 0.75 * sum(counts)

    outcomes = set()
    for key in range(100):
        with seeded(key):
            tries = [(int(torch.randint(41, ())), int(torch.randint(41, ()))) for _ in range(10)]
        with seeded(key):
            top, left, *size = augment.choose_crop(mask)
        assert size == [20, 20]
        assert (top, left) == next((place for place in tries if fits(*place)), tries[-1])
        outcomes.add(next((i for i, place in enumerate(tries) if fits(*place)), None))
    assert {0, None} < outcomes
    # Ignored pixels count for nothing: a few of two classes are enough.
    mask = torch.full((20, 20), IGNORE, dtype=torch.uint8)
    mask[0, :2] = torch.tensor([0, 254])
    with seeded(0):
        assert augment.choose_crop(mask) == (0, 0, 20, 20)
        state = torch.get_rng_state()
    with seeded(0):
        torch.randint(1, ()), torch.randint(1, ())
        assert torch.equal(torch.get_rng_state(), state)  # the first try


def test_distortion_keeps_the_order_of_channels():
    pixels = torch.tensor([200, 120, 40], dtype=torch.uint8).view(3, 1, 1).expand(3, 4, 4)
    distort = PhotometricDistort(p=1.0)
    images = torch.stack([distort(pixels) for _ in range(50)])
    assert (images[:, 0] >= images[:, 1]).all()
    assert (images[:, 1] >= images[:, 2]).all()
    assert len(images.unique(dim=0)) == 50


# Scenes


@pytest.fixture(scope="module")
def textures():
    return scenes.load_textures()


def test_scenes_have_every_class_and_pixels_of_none(composed):
    training, held_out, classes = composed
    assert classes == tuple(scenes.TEXTURES)
    for dataset in (training, held_out):
        labels = torch.cat([dataset[0, i].mask.flatten() for i in range(60)])
        parts = labels.bincount(minlength=256) / len(labels)
        assert labels.unique().tolist() == [*range(len(classes)), IGNORE]
        assert parts[: len(classes)].min() > 0.02
        assert 0.01 < parts[IGNORE] < 0.3
    assert (len(training), len(held_out)) == (2000, 200)
    assert training.files[:2] == ["training/0000", "training/0001"]
    assert not torch.equal(training.images.read(0)[0].values, held_out.images.read(0)[0].values)
    assert len(build(fraction=0.25)[0]) == 500


def test_scene_is_a_function_of_its_keys(textures):
    for size in ((64, 64), (33, 100)):
        image, mask = scenes.compose(textures[0], size, 0, 7)
        assert (image.shape, image.dtype) == ((3, *size), torch.uint8)
        assert (mask.shape, mask.dtype) == (size, torch.uint8)
        again = scenes.compose(textures[0], size, 0, 7)
        assert torch.equal(image, again[0])
        assert torch.equal(mask, again[1])
        for keys in ((1, 7), (0, 8)):
            assert not torch.equal(mask, scenes.compose(textures[0], size, *keys)[1])


def test_masks_of_scenes_are_exact(monkeypatch):
    for name, bounds in {
        "COLOUR": (0, 0),
        "CONTRAST": (1, 1),
        "SLOPE": (0, 0),
        "LIGHT": (0, 0),
        "NOISE": (0, 0),
    }.items():
        monkeypatch.setattr(scenes, name, bounds)
    flat = [torch.full((3, 5, 8), label / 255) for label in range(11)]
    for number in range(20):
        image, mask = scenes.compose(flat, (48, 64), number)
        assert torch.equal(image, mask.expand(3, -1, -1))
        assert len(mask.unique()) > 2


def test_areas_of_held_out_scenes_are_disjoint(monkeypatch):
    # Every photograph tells its columns: what reduction mixes stays within the columns of the area.
    sizes = {name: photo.shape[1:] for name, photo in load_photos().items()}
    columns = {name: torch.arange(w).float().expand(3, h, w) for name, (h, w) in sizes.items()}
    monkeypatch.setattr(scenes, "load_photos", lambda: columns)
    names = [*scenes.TEXTURES.values(), scenes.CLUTTER]
    for texture, training, held_out in zip(names, *scenes.load_textures(), strict=True):
        height, width = sizes[texture.photo]
        assert texture.top + texture.height <= height
        assert texture.left + texture.width <= width
        assert training.max() < held_out.min()
        assert min(held_out.shape[1:]) > 45


def test_textures_tell_more_than_their_mean_colour(textures):
    for area in textures[0]:
        torch.testing.assert_close(area.mean((1, 2)), torch.zeros(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(area.square().mean(), torch.tensor(1.0), atol=1e-4, rtol=0)
    means = torch.zeros(10, 3)
    squares, counts = torch.zeros(10, 3), torch.zeros(10, 1)
    for number in range(100):
        image, mask = scenes.compose(textures[0], (32, 32), 0, number)
        for label in set(mask.unique().tolist()) - {10}:
            mean = image[:, mask == label].float().mean(1)
            means[label] += mean
            squares[label] += mean**2
            counts[label] += 1
    means, squares = means / counts, squares / counts
    assert (means - means.mean(0)).abs().max() < (squares - means**2).sqrt().min()


# Options


@pytest.mark.parametrize(
    "options",
    [
        {"source": "photos"},
        {"source": "folder:"},
        {"workers": -1},
        {"fraction": 0.0},
        {"fraction": float("nan")},
        {"subset_seed": -1},
        {"source": "folder:a", "short_side": 0},
        {"short_side": 64},
        {"scale": (0.0, 1.0)},
        {"scale": (2.0, 1.0)},
        {"scale": (1.0, float("inf"))},
        {"max_category": 0.0},
        {"flip": 1.5},
        {"distort": float("nan")},
        {"split": "test"},
        {"source": "ade20k:a", "classes": {"a": 0, "b": 1}},
        {"source": "cityscapes:a", "ignored": 255},
        {"source": "folder:a", "split": "train"},
        {"source": "folder:a", "classes": {"a": 0}},
        {"source": "folder:a", "classes": {"a": 0, "b": []}},
        {"source": "folder:a", "classes": {"a": 0, "b": -1}},
        {"source": "folder:a", "classes": {"a": 0, "b": 65536}},
        {"source": "folder:a", "classes": {"a": 0, "b": [1, 0]}},
        {"source": "folder:a", "classes": {"a": 0, "b": "#000001"}},
        {"source": "folder:a", "classes": {"a": "#00000g", "b": "#000001"}},
        {"source": "folder:a", "classes": {"a": "#0000ff", "b": "#0000FF"}},
        {"source": "folder:a", "ignored": "all"},
        {"source": "folder:a", "ignored": [255, 255]},
        {"source": "folder:a", "classes": {"a": 0, "b": 1}, "ignored": 1},
        {"source": "folder:a", "classes": {"a": "#000000", "b": "#000001"}, "ignored": 255},
    ],
)
def test_options_out_of_their_range_are_named(options):
    with pytest.raises(ValueError, match=f"data.{list(options)[-1]}: "):
        SegmentedConfig(**options)
