"""Labelled images: digits, folders of classes, fractions, augmentation, mixing."""

import pytest
import torch
from image_files import make_folder
from PIL import Image
from timm.data.auto_augment import AugmentOp
from torch import nn

from train.data.labelled import (
    AugmentConfig,
    LabelledConfig,
    LabelledSample,
    Mixer,
    all_seeded,
    build_labelled,
)

MEAN = STD = (0.5, 0.5, 0.5)


def sample(number: int) -> LabelledSample:
    return LabelledSample(torch.full((3, 8, 8), float(number)), number, number, [])


def test_neighbours_are_mixed_however_the_batch_is_cut():
    samples = [sample(i) for i in range(8)]
    mixer = Mixer(AugmentConfig(smoothing=0.0), 8)
    whole = mixer(samples)
    parts = [mixer(samples[:2]), mixer(samples[2:])]
    for name in ("image", "target"):
        torch.testing.assert_close(torch.cat([p[name] for p in parts]), whole[name], rtol=0, atol=0)
    # Pixels are class numbers: their mean is that of the classes by their weights, mixed up or cut out.
    means = whole["image"].mean((1, 2, 3))
    torch.testing.assert_close(means, whole["target"] @ torch.arange(8.0))
    weights = whole["target"].view(4, 2, 4, 2)
    assert all(weights[i, :, j].sum() == 0 for i in range(4) for j in range(4) if i != j)
    assert len({round(float(w), 4) for w in whole["target"].amax(1)}) > 2
    flat = [image.std() < 1e-6 for image in whole["image"][::2]]
    assert any(flat)  # mixup
    assert not all(flat)  # CutMix


def test_without_mixing_labels_are_smoothed_alone():
    batch = Mixer(AugmentConfig(mixup=0, cutmix=0, smoothing=0.2), 4)([sample(i) for i in range(3)])
    assert batch["image"][:, 0, 0, 0].tolist() == [0, 1, 2]
    expected = torch.full((3, 4), 0.05)
    expected[range(3), range(3)] = 0.85
    torch.testing.assert_close(batch["target"], expected)


def test_samples_are_functions_of_seed_epoch_and_index():
    augment = AugmentConfig()
    sets = [build_labelled(LabelledConfig(), augment, (16, 16), MEAN, STD, seed)[0] for seed in (0, 0, 1)]
    first = sets[0][2, 5]
    torch.rand(3)
    sets[1][0, 1]
    assert torch.equal(sets[1][2, 5].image, first.image)
    assert sets[1][2, 5].seed == first.seed
    assert not torch.equal(sets[2][2, 5].image, first.image)
    assert not torch.equal(sets[0][3, 5].image, first.image)
    state = torch.get_rng_state()
    with all_seeded(1):
        torch.rand(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_digits_are_split_by_class_and_upscaled():
    training, held_out, classes = build_labelled(
        LabelledConfig(crop_pct=1.0), AugmentConfig(), (16, 24), MEAN, STD, 0
    )
    assert classes == tuple("0123456789")
    assert (len(training), len(held_out)) == (1437, 360)
    assert not set(training.files) & set(held_out.files)
    counts = torch.tensor(held_out.labels).bincount()
    assert counts.tolist() == pytest.approx([36] * 10, abs=2)
    image = held_out[0, 0].image
    assert image.shape == (3, 16, 24)
    assert torch.equal(image[0], image[1])
    assert -1.01 <= image.min() < image.max() <= 1.01


def test_folders_of_classes(tmp_path):
    args = (AugmentConfig(policy=None, erase=0), (16, 16), (0.0,) * 3, (1.0,) * 3, 0)
    own = make_folder(tmp_path / "own", "abc", 5)
    training, held_out, classes = build_labelled(LabelledConfig(f"folder:{own}"), *args)
    assert (classes, len(training), len(held_out)) == (("a", "b", "c"), 12, 3)
    assert sorted(held_out.labels) == [0, 1, 2]
    given = make_folder(tmp_path / "given" / "train", "abc", 3).parent
    make_folder(given / "val", "abc", 2)
    (given / "train" / "b" / "0.png").write_bytes(b"not an image")
    training, held_out, _ = build_labelled(LabelledConfig(f"folder:{given}"), *args)
    assert (len(training), len(held_out)) == (9, 6)
    assert training.files[0] == "train/a/0.png"
    # What stands in for an unreadable image brings its own label.
    found = [training[0, i] for i in range(len(training))]
    assert [s.label for s in found] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [name for s in found for name, _ in s.skipped] == ["train/b/0.png"]
    for s in found:
        assert float(s.image[0].mean()) == pytest.approx(20 * s.label / 255, abs=0.01)


def test_folders_with_test_in_place_of_val_or_beside_it(tmp_path):
    args = (AugmentConfig(), (16, 16), MEAN, STD, 0)
    make_folder(tmp_path / "train", "ab", 3)
    make_folder(tmp_path / "test", "ab", 2)
    training, held_out, _ = build_labelled(LabelledConfig(f"folder:{tmp_path}"), *args)
    assert (len(training), len(held_out)) == (6, 4)
    assert held_out.files[0] == "test/a/0.png"
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/val"):
        build_labelled(LabelledConfig(f"folder:{tmp_path}", split="val"), *args)
    make_folder(tmp_path / "val", "ab", 1)
    _, held_out, _ = build_labelled(LabelledConfig(f"folder:{tmp_path}"), *args)
    assert held_out.files == ["val/a/0.png", "val/b/0.png"]
    same, held_out, _ = build_labelled(LabelledConfig(f"folder:{tmp_path}", split="test"), *args)
    assert same.files == training.files
    assert held_out.files[0] == "test/a/0.png"


def test_a_fraction_has_as_many_of_each_class(tmp_path):
    args = (AugmentConfig(), (16, 16), MEAN, STD, 0)
    for name, count in (("a", 20), ("b", 30), ("c", 50)):
        make_folder(tmp_path / "train", name, count)
        make_folder(tmp_path / "val", name, 2)
    source = f"folder:{tmp_path}"

    def subset(fraction, subset_seed=0):
        training, held_out, _ = build_labelled(LabelledConfig(source, None, fraction, subset_seed), *args)
        assert len(held_out) == 6
        assert [name.split("/")[1] for name in training.files] == ["abc"[label] for label in training.labels]
        return training

    tenth = subset(0.1)
    assert torch.tensor(tenth.labels).bincount().tolist() == [3, 3, 3]
    assert tenth.files == sorted(tenth.files, key=subset(1.0).files.index)
    assert subset(0.1).files == tenth.files
    assert subset(0.1, 1).files != tenth.files
    assert set(tenth.files) < set(subset(0.3).files)
    assert torch.tensor(subset(1e-9).labels).bincount().tolist() == [1, 1, 1]
    assert len(subset(1.0)) == 100
    assert len(subset(0.6)) == 60  # all of a
    with pytest.raises(ValueError, match=r"data.fraction: 0.7 of 100 images takes 23 .* but 'a' has 20"):
        subset(0.7)


def test_samples_of_a_fraction_have_their_labels():
    args = (AugmentConfig(), (16, 16), MEAN, STD, 0)
    training, held_out, _ = build_labelled(LabelledConfig(fraction=0.1), *args)
    whole, same, _ = build_labelled(LabelledConfig(), *args)
    assert torch.tensor(training.labels).bincount().tolist() == [14] * 10
    assert held_out.files == same.files
    for index in (0, 70, 139):
        assert training[0, index].label == whole.labels[whole.files.index(training.files[index])]


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m9-mstd0.5-inc1", "original"])
def test_policies_of_timm_may_keep_no_bit_of_a_colour(policy):
    operation = AugmentOp("PosterizeIncreasing", prob=1, magnitude=10)
    white = Image.new("RGB", (4, 4), "white")
    assert operation(white).getextrema() == ((0, 0),) * 3
    training, _, _ = build_labelled(LabelledConfig(), AugmentConfig(policy=policy), (8, 8), MEAN, STD, 0)
    for index in range(1000):  # some of them are posterised as strongly
        training[0, index]


def test_images_in_memory_are_those_of_files(tmp_path):
    args = (AugmentConfig(), (16, 16), MEAN, STD, 0)
    make_folder(tmp_path / "train", "ab", 4)
    make_folder(tmp_path / "val", "ab", 2)
    (tmp_path / "train/a/1.png").write_bytes(b"no image")
    configs = (LabelledConfig(f"folder:{tmp_path}", cache=cache) for cache in (0, "auto"))
    plain, kept = (build_labelled(config, *args) for config in configs)
    before = [[part[1, i] for i in range(len(part))] for part in plain[:2]]
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    for part, samples in zip(kept, before, strict=False):
        for i, sample in enumerate(samples):
            assert torch.equal(part[1, i].image, sample.image)
            assert part[1, i].label == sample.label
            assert [name for name, _ in part[1, i].skipped] == [name for name, _ in sample.skipped]
    assert [name for sample in before[0] for name, _ in sample.skipped] == ["train/a/1.png"]


def test_small_images_are_padded_and_cropped_as_they_are(tmp_path):
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        values = torch.arange(32 * 32 * 3).reshape(32, 32, 3) % 255 + 1
        Image.fromarray(values.to(torch.uint8).numpy()).save(tmp_path / part / "a/0.png")
    config = LabelledConfig(f"folder:{tmp_path}", crop_padding=4, crop_pct=1.0)
    augment = AugmentConfig(policy=None, erase=0)
    training, held_out, _ = build_labelled(config, augment, (32, 32), (0.0,) * 3, (1.0,) * 3, 0)
    image = held_out[0, 0].image
    assert torch.equal((255 * image).round().permute(1, 2, 0), values.float())  # no upscaling, no crop
    padded = nn.functional.pad(image, (4, 4, 4, 4))
    found = set()
    for epoch in range(40):
        crop = training[epoch, 0].image
        assert crop.shape == (3, 32, 32)
        places = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
            if torch.equal(crop.flip(-1) if flip else crop, padded[:, top : top + 32, left : left + 32])
        ]
        assert len(places) == 1
        found.update(places)
    assert {flip for *_, flip in found} == {False, True}
    assert {top for top, *_ in found} > {0, 8}
    assert {left for _, left, _ in found} > {0, 8}
    config = LabelledConfig(f"folder:{tmp_path}", crop_padding=0)  # other sizes cover img_size
    training, _, _ = build_labelled(config, augment, (16, 24), (0.0,) * 3, (1.0,) * 3, 0)
    assert training[0, 0].image.shape == (3, 16, 24)
    assert training[0, 0].image.min() > 0
