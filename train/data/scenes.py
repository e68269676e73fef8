"""Synthetic scenes for semantic segmentation: regions of textures from photographs.

A class is a texture. Its place, orientation, size, contrast, mean colour and lighting are drawn anew for each
region, so that the texture alone tells the class. Training scenes and held-out scenes have the same
classes, from areas of the photographs that share no pixel.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from dbpkern.capture import derive_seed
from train.data.photos import load_photos


class Texture(NamedTuple):
    """Where a texture is in a photograph: a box in pixels, that is shrunk `reduction` times."""

    photo: str
    top: int
    left: int
    height: int
    width: int
    reduction: int


# The reductions bring bricks, stones, coins and so on to some 10 or 20 pixels.
TEXTURES = {
    "brick": Texture("brick.png", 0, 0, 512, 512, 3),
    "grass": Texture("grass.png", 0, 0, 512, 512, 2),
    "gravel": Texture("gravel.png", 0, 0, 512, 512, 2),
    "coins": Texture("coins.png", 0, 0, 303, 384, 2),
    "galaxies": Texture("hubble_deep_field.jpg", 0, 0, 872, 1000, 2),
    "tissue": Texture("ihc.png", 0, 0, 512, 512, 2),
    "foliage": Texture("china.jpg", 305, 330, 122, 310, 1),
    "petals": Texture("flower.jpg", 120, 195, 200, 235, 1),
    "ripples": Texture("cell.png", 0, 0, 270, 550, 2),
    "vessels": Texture("retina.jpg", 350, 250, 700, 950, 4),
}
CLUTTER = Texture("motorcycle_left.png", 0, 0, 500, 741, 2)  # of the regions without a class
TRAINING_WIDTH = 0.7  # part of each box, from the left, for training scenes; the rest is for held-out ones

GROUND = 2  # regions that cover a scene
SHAPES = (1, 3)  # fewest and most ellipses and polygons in front of them
CLUTTERED = 0.5  # chance that the foremost shape has no class
# Ranges of uniform draws. Lengths are in halves of the scene's shorter side, intensities in [0, 1].
RADIUS = (0.2, 0.5)
STRETCH = (0.6, 1.6)
TEXTURE_SCALE = (0.7, 1.4)  # pixels of a texture per pixel of the scene
COLOUR = (0.3, 0.7)  # mean of a region, by channel
CONTRAST = (0.15, 0.3)  # standard deviation of a region
SLOPE = (-0.1, 0.1)  # of the intensity across a region
LIGHT = (-0.2, 0.2)  # of the factor of the scene's light
NOISE = (0.0, 0.04)  # standard deviation


def load_textures() -> tuple[list[Tensor], list[Tensor]]:
    """Cut the textures out of the photographs, in the order of TEXTURES and the clutter last.

    Returns:
        The areas for training scenes and those for held-out scenes: float32 [3, h, w] with mean 0 by channel
        and standard deviation 1 over all channels in training.

    Raises:
        ModuleNotFoundError: A package with the photographs is not installed.
    """
    photos = load_photos()
    training: list[Tensor] = []
    held_out: list[Tensor] = []
    for photo, top, left, height, width, reduction in (*TEXTURES.values(), CLUTTER):
        box = v2.functional.crop(photos[photo], top, left, height, width).float()
        # Cut first and shrunk then: no pixel of one area is in the other's.
        parts = box.tensor_split([round(TRAINING_WIDTH * width)], dim=2)
        areas = [
            v2.functional.resize(
                part, [part.shape[1] // reduction, part.shape[2] // reduction], antialias=True
            )
            for part in parts
        ]
        mean = areas[0].mean((1, 2), keepdim=True)
        std = (areas[0] - mean).square().mean().sqrt()
        for areas_of_part, area in zip((training, held_out), areas, strict=True):
            areas_of_part.append((area - mean) / std)
    return training, held_out


# Points of the plane are complex numbers: a product turns and scales them. Products of matrices so narrow are
# no faster, and BLAS would start threads of its own in every loader process.
def _turn(rng: np.random.Generator) -> np.complex64:
    return np.exp(1j * rng.uniform(0, 2 * math.pi)).astype(np.complex64)


def _ramp(rng: np.random.Generator, bounds: tuple[float, float], points: np.ndarray) -> np.ndarray:
    return rng.uniform(*bounds) * points.real + rng.uniform(*bounds) * points.imag


def _draw_regions(
    rng: np.random.Generator, points: np.ndarray, size: tuple[int, int], shapes: int
) -> np.ndarray:
    # The number of each point's region, [H * W]: smooth random ground, then one shape in front of the other.
    coarse = torch.from_numpy(rng.standard_normal((GROUND, 1, 4, 4), np.float32))
    fields = F.interpolate(coarse, size, mode="bicubic", align_corners=True)
    regions = fields.view(GROUND, -1).numpy().argmax(0)
    for region in range(GROUND, GROUND + shapes):
        local = (points - rng.choice(points)) * _turn(rng) / rng.uniform(*RADIUS)
        stretch = rng.uniform(*STRETCH)
        local.real /= stretch
        local.imag *= stretch
        corners = rng.integers(2, 7)
        if corners == 2:  # none at all: an ellipse
            regions[np.abs(local) < 1] = region
        else:
            sides = np.exp(2j * math.pi / corners * np.arange(corners)).astype(np.complex64)
            regions[np.multiply.outer(sides, local).real.max(0) < 1] = region
    return regions


def compose(textures: list[Tensor], size: tuple[int, int], *keys: int) -> tuple[Tensor, Tensor]:
    """Compose the scene that belongs to the keys.

    Args:
        textures: As of `load_textures`: one for each class, and the clutter.
        size: Height and width in pixels.
        keys: Of its random numbers, 64-bit integers.

    Returns:
        The image, uint8 [3, H, W], and the class of each pixel, uint8 [H, W]: clutter is len(textures) - 1.
    """
    rng = np.random.default_rng(derive_seed(*keys))  # a scene takes many scalars: slow as tensors
    rows, columns = np.indices(size, np.float32).reshape(2, -1)
    pixels = columns + np.complex64(1j) * rows
    points = (2 * pixels + 1 + 1j - complex(size[1], size[0])) / min(size)
    shapes = int(rng.integers(*SHAPES, endpoint=True))
    regions = _draw_regions(rng, points, size, shapes)
    labels = rng.permutation(len(textures) - 1)[: GROUND + shapes]
    if rng.uniform() < CLUTTERED:
        labels[-1] = len(textures) - 1
    image = np.empty((3, len(points)), np.float32)
    for region, label in enumerate(labels):
        inside = np.flatnonzero(regions == region)
        height, width = textures[label].shape[1:]
        places = pixels[inside] * _turn(rng) * rng.uniform(*TEXTURE_SCALE)
        grid = np.stack([2 * places.real / width, 2 * places.imag / height], 1)
        grid += rng.uniform(-1, 1, 2).astype(np.float32)
        sampled = F.grid_sample(  # beyond its sides, the texture is mirrored
            textures[label][None],
            torch.from_numpy(grid)[None, None],
            padding_mode="reflection",
            align_corners=False,
        )
        texture = rng.uniform(*CONTRAST) * sampled[0, :, 0].numpy() + _ramp(rng, SLOPE, points[inside])
        image[:, inside] = texture + rng.uniform(*COLOUR, (3, 1)).astype(np.float32)
    image *= 1 + _ramp(rng, LIGHT, points)
    image += rng.uniform(*NOISE) * rng.standard_normal(image.shape, np.float32)
    image = (255 * image).round().clip(0, 255).astype(np.uint8)
    mask = labels[regions].astype(np.uint8)
    return torch.from_numpy(image).view(3, *size), torch.from_numpy(mask).view(size)
