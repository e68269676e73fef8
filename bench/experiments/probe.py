"""What a frozen encoder's features tell about the classes of images, while it is pre-trained."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from models.darl import DARL
from models.mae import MaskedAutoencoder
from train.data.pretraining import HeldOutSet
from train.data.reading import Images, load_file

CHUNK = 100  # images a forward
NEIGHBOURS = 20


@dataclass(frozen=True)
class Probe:
    """Labelled images: those that the classifiers learn from, and those whose classes they are asked for.

    Args:
        images: normalised, those to learn from first, `[N, 3, H, W]`.
        labels: `[N]`.
        known: how many are learnt from.
    """

    images: Tensor
    labels: Sequence
    known: int

    @torch.no_grad()
    def __call__(self, model: MaskedAutoencoder | DARL) -> dict[str, float]:
        """Accuracies on the mean of the patch tokens, in [0, 1], or NaN where a feature is not finite.

        DARL's patches see those before them alone, as in pre-training. Nothing is drawn at random.

        Returns:
            "probe", of ridge regression on standardised features, and "knn", of the 20 nearest by cosine.
        """
        device = next(model.parameters()).device
        training = model.training
        model.eval()
        mask = {"is_causal": True} if isinstance(model, DARL) else {}
        tokens = [model.features(part.to(device), **mask)[:, 1:].mean(1) for part in self.images.split(CHUNK)]
        model.train(training)
        features = torch.cat(tokens).cpu().double().numpy()
        if not np.isfinite(features).all():
            return {"probe": math.nan, "knn": math.nan}
        classifiers = {
            "probe": make_pipeline(StandardScaler(), RidgeClassifier()),
            "knn": KNeighborsClassifier(min(NEIGHBOURS, self.known), metric="cosine"),
        }
        found = {}
        for name, classifier in classifiers.items():
            classifier.fit(features[: self.known], self.labels[: self.known])
            found[name] = float(classifier.score(features[self.known :], self.labels[self.known :]))
        return found


def of_digits(known: int, size: tuple[int, int]) -> Probe:
    """The first digits that ship with scikit-learn, scaled up; as many are asked for as are known.

    Raises:
        ValueError: there are not so many digits.
    """
    data = load_digits()
    if not 1 <= known <= len(data.images) // 2:
        raise ValueError(f"known: expected 1 to {len(data.images) // 2} digits, got {known}")
    images = torch.from_numpy(data.images[: 2 * known]).float()[:, None]
    images = F.interpolate(images, size, mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    return Probe((images - images.mean()) / images.std(), data.target[: 2 * known], known)


def of_folder(
    root: Path, training: Sequence[str], held_out: Sequence[str], known: int, size: tuple[int, int]
) -> Probe:
    """Images of a folder with a sub-folder a class: some of those trained on, and all held out.

    Args:
        root: the folder.
        training: names of images in it.
        held_out: likewise; the classes of these are asked for.
        known: how many images of training are learnt from, at most, spread over their sorted names.
        size: height and width of the centre crops.

    Raises:
        ValueError: the names tell no two classes.
    """
    training, known = sorted(training), min(known, len(training))
    names = [*(training[i * len(training) // known] for i in range(known)), *held_out]
    labels = [name.partition("/")[0] if "/" in name else None for name in names]
    classes = sorted({label for label in labels if label is not None})
    if None in labels or len(classes) < 2:
        raise ValueError(f"{root}: expected a sub-folder for each of two or more classes, for the probe")
    samples = HeldOutSet(Images(names, partial(load_file, root)), size, 0, None)
    images = torch.stack([sample.image for sample in samples])
    return Probe(images, [classes.index(label) for label in labels], known)
