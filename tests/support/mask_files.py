"""Images with masks that tests write, and the data sets of segmentation from them."""

from pathlib import Path

import numpy as np
from PIL import Image

from train.data.masks import IGNORE
from train.data.segmented import SegmentedConfig, build_segmented

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
