"""Masks: what their values mean, and what is found at the start or when a pair is read."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mask_files import build, save, save_folder, save_pair, truncate
from PIL import Image

from train.data.segmented import collate

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
