"""The photographs that ship with scikit-image and scikit-learn."""

import importlib.resources
import importlib.util

from torch import Tensor
from torchvision.transforms import v2

from train.data.augment import Chooser, Crop
from train.data.reading import decode

# Photographs inside the wheels of scikit-image and scikit-learn, by the folder that holds them.
PHOTOS = {
    "skimage/data": (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "cell.png",
        "chelsea.png",
        "coffee.png",
        "coins.png",
        "grass.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "retina.jpg",
        "rocket.jpg",
    ),
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
}
# Whole photographs, so that no training crop overlaps a held-out one. The two motorcycles show
# one scene and stay on the same side.
HELD_OUT_PHOTOS = ("chelsea.png", "coins.png", "gravel.png", "rocket.jpg")
HELD_OUT_CROPS = 256  # of the held-out photographs, in total


def load_photos() -> dict[str, Tensor]:
    """Decode the photographs of PHOTOS: name to uint8 [3, H, W].

    Raises:
        ModuleNotFoundError: If scikit-image or scikit-learn is not installed.
    """
    photos = {}
    for folder, names in PHOTOS.items():
        package, _, subfolder = folder.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise ModuleNotFoundError(f"source 'photos' needs the files of {package}: install dbpkern[train]")
        # A module that is found but not executed: importing scikit-learn takes a second.
        root = importlib.resources.files(importlib.util.module_from_spec(spec)) / subfolder
        for name in names:
            with importlib.resources.as_file(root / name) as path:
                photos[name] = decode(path).pixels
    return photos


def cut(photos: dict[str, Tensor], name: str, choose: Chooser) -> Crop:
    """Cut the chosen view out of the decoded photograph `name`."""
    photo = photos[name]
    view = choose(*photo.shape[1:])
    return Crop(v2.functional.crop(photo, *view[:4]), view)
