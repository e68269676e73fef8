"""Images with masks: ADE20K's layout, Cityscapes', folders, samples, and what training does to them."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mask_files import MEAN, SIZE, STD, build, save, save_folder, save_pair
from PIL import Image
from torchvision.transforms import v2

from train.data import scenes
from train.data.loading import StepSampler, build_loader
from train.data.masks import IGNORE
from train.data.reading import seeded
from train.data.segmented import Augment, PhotometricDistort, Preprocess, SegmentedConfig, collate


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
