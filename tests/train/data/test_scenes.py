"""Synthetic scenes: their textures, exact masks, and areas that are held out."""

import pytest
import torch

from train.data import scenes
from train.data.photos import load_photos


@pytest.fixture(scope="module")
def textures():
    return scenes.load_textures()


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
