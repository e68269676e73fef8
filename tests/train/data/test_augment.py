"""Random crops and flips, on the host and on the device, and decoding at a part of the size."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from image_files import GREEN, IMG_SIZE, NUM_PATCHES, save, training_set
from PIL import Image

from train.data import augment, pretraining, reading
from train.data import photos as photographs
from train.data.augment import View
from train.data.pretraining import DataConfig, HeldOutSet, TrainingSet, build_data, collate
from train.data.reading import Images

# Crops


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
