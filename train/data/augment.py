"""Random crops and flips: chosen on the host, carried out there or on the training device.

What a sample shows is a `View`, chosen by the size of the image. Either path starts from the same views:
`finish` resizes one crop in the loader, `finish_batch` a whole batch where the model is.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

# The statistics of ImageNet, as timm.data.IMAGENET_DEFAULT_MEAN and _STD.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

RATIO = (3 / 4, 4 / 3)  # smallest and largest width / height of random crops
# Sides of a crop that goes to the device unscaled, in sides of the result: with 2, a batch of bytes is never
# larger than the finished one of float32.
MAX_SCALE = 2
CHUNK = 32  # images that finish_batch holds in float32 at a time


class View(NamedTuple):
    """What a sample shows of an image.

    Attributes:
        top: First row of the box, in pixels of the whole image.
        left: First column.
        height: Rows of the box.
        width: Columns.
        flip: Whether the box is mirrored left to right.
        reduction: The image may be decoded this many times smaller: 1, 2, 4 or 8.
    """

    top: int
    left: int
    height: int
    width: int
    flip: bool = False
    reduction: int = 1


# From height and width of an image, in pixels.
Chooser = Callable[[int, int], View]


class Crop(NamedTuple):
    """The box of a view, uint8 [3, h, w]: of the view's height and width if nothing was reduced."""

    pixels: Tensor
    view: View


def whole(height: int, width: int) -> View:
    """View all of an image."""
    return View(0, 0, height, width)


class Centre:
    """View the middle of an image, as large as the shape allows.

    Args:
        img_size: Height and width of the result, in pixels.
    """

    def __init__(self, img_size: tuple[int, int]):
        self.img_size = img_size

    def __call__(self, height: int, width: int) -> View:
        """Choose the box for an image of this size, in pixels."""
        # Cropped before it is resized: the long side of a panorama would grow without bound.
        scale = min(height / self.img_size[0], width / self.img_size[1])
        h, w = (max(1, round(scale * side)) for side in self.img_size)
        return View(round((height - h) / 2), round((width - w) / 2), h, w)


class RandomView:
    """View a random box of an image, mirrored half of the time, from torch's CPU random numbers.

    Args:
        img_size: Height and width of the result, in pixels.
        crop_scale: Smallest and largest area of the box, as parts of the image's area.
        draft: Whether the image may be decoded smaller as long as the box keeps at least img_size.
    """

    def __init__(self, img_size: tuple[int, int], crop_scale: tuple[float, float], draft: bool = False):
        self.img_size = img_size
        self.draft = draft
        self.crop = v2.RandomResizedCrop(img_size, scale=crop_scale, ratio=RATIO)

    def __call__(self, height: int, width: int) -> View:
        """Draw the box and the flip for an image of this size, in pixels."""
        box = self.crop.make_params([torch.empty(1, 1, 1).expand(3, height, width)])
        flip = bool(torch.rand(1) < 0.5)
        reduction = 1
        if self.draft:
            spare = min(box["height"] // self.img_size[0], box["width"] // self.img_size[1])
            reduction = next(factor for factor in (8, 4, 2, 1) if factor <= max(1, spare))
        return View(**box, flip=flip, reduction=reduction)


def scaled_box(view: View, size: tuple[int, int], scaled: tuple[int, int]) -> tuple[int, int, int, int]:
    """Find the box of a view in an image that was scaled: top, left, height, width, at least one pixel.

    Args:
        view: The view, in pixels of the image before.
        size: Height and width before.
        scaled: Height and width after.
    """
    if size == scaled:
        return view[:4]
    starts: list[int] = []
    lengths: list[int] = []
    for start, length, before, after in zip(view[:2], view[2:4], size, scaled, strict=True):
        first = min(round(start * after / before), after - 1)
        starts.append(first)
        lengths.append(max(1, min(round((start + length) * after / before), after) - first))
    (top, left), (rows, columns) = starts, lengths
    return top, left, rows, columns


def resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an image bicubically with antialiasing: uint8 [3, h, w] to uint8 [3, H, W] of (H, W) = size."""
    return v2.functional.resize(pixels, list(size), InterpolationMode.BICUBIC, antialias=True)


def normalize(image: Tensor) -> Tensor:
    """Bring uint8 [3, H, W] to float32 with the statistics MEAN and STD of ImageNet."""
    image = v2.functional.to_dtype(image, torch.float32, scale=True)
    return v2.functional.normalize(image, MEAN, STD)


def denormalize(images: Tensor) -> Tensor:
    """Undo the normalisation with MEAN and STD, for pictures: [..., 3, H, W] to values in [0, 1]."""
    mean = images.new_tensor(MEAN).view(3, 1, 1)
    std = images.new_tensor(STD).view(3, 1, 1)
    return (images * std + mean).clamp(0, 1)


def finish(crop: Crop, img_size: tuple[int, int]) -> Tensor:
    """Resize, flip and normalise a crop on the host: float32 [3, H, W] of (H, W) = img_size."""
    image = resize(crop.pixels, img_size)
    return normalize(v2.functional.horizontal_flip(image) if crop.view.flip else image)


def bound(pixels: Tensor, img_size: tuple[int, int]) -> Tensor:
    """Resize a crop with a side above MAX_SCALE times that of the result to this bound: uint8 [3, h, w]."""
    sides = zip(pixels.shape[1:], img_size, strict=True)
    height, width = (min(side, MAX_SCALE * result) for side, result in sides)
    return pixels if (height, width) == pixels.shape[1:] else resize(pixels, (height, width))


def pad(crops: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack crops of different sizes, zeros beyond: uint8 [B, 3, max h, max w], and their sizes [B, 2]."""
    sizes = torch.tensor([crop.shape[1:] for crop in crops])
    padded = torch.zeros(len(crops), 3, *sizes.amax(0).tolist(), dtype=torch.uint8)
    for target, crop in zip(padded, crops, strict=True):
        target[:, : crop.shape[1], : crop.shape[2]] = crop
    return padded, sizes


def _cubic(x: Tensor) -> Tensor:
    # Keys' kernel with a = -0.5, the one of PIL and of antialiased resizing in PyTorch.
    x = x.abs()
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, inner, torch.where(x < 2, outer, 0))


def resize_weights(lengths: Tensor, length: int, result: int) -> Tensor:
    """Make the matrices that resize lines of different lengths, bicubically with antialiasing.

    Args:
        lengths: Length of each line in pixels, [B].
        length: Length to which the lines are padded, at least the longest.
        result: Length of the result.

    Returns:
        float32 [B, result, length]: rows add up to 1 and are zero on the padding.
    """
    lengths = lengths.float()[:, None, None]
    scale = lengths / result
    target = torch.arange(result, device=lengths.device)[:, None]
    source = torch.arange(length, device=lengths.device)
    weights = _cubic((source + 0.5 - (target + 0.5) * scale) / scale.clamp(min=1))
    weights = torch.where(source < lengths, weights, 0)
    return weights / weights.sum(-1, keepdim=True)


# Not torchvision's resize: it takes one size a call, hundreds of small launches a batch; grid_sample, which
# takes many, has no antialiasing. Resizing is linear along each axis, so two batched products do it.
@torch.no_grad()
def finish_batch(pixels: Tensor, sizes: Tensor, flip: Tensor, img_size: tuple[int, int]) -> Tensor:
    """Resize, flip and normalise crops of different sizes where they are; follows autocast in nothing.

    Args:
        pixels: Padded crops, uint8 [B, 3, h, w].
        sizes: Height and width of each, [B, 2].
        flip: Which are mirrored, bool [B].
        img_size: Height and width of the result, in pixels.

    Returns:
        float32 [B, 3, H, W].
    """
    images = []
    with torch.autocast(pixels.device.type, enabled=False):
        for part, size, mirrored in zip(
            pixels.split(CHUNK), sizes.split(CHUNK), flip.split(CHUNK), strict=True
        ):
            rows = resize_weights(size[:, 0], part.shape[2], img_size[0])
            columns = resize_weights(size[:, 1], part.shape[3], img_size[1])
            columns = torch.where(mirrored[:, None, None], columns.flip(1), columns)
            images.append(rows[:, None] @ (part.float() @ columns.mT[:, None]))
        image = torch.cat(images).div_(255).clamp_(0, 1)
        return v2.functional.normalize(image, MEAN, STD, inplace=True)
