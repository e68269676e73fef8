"""A linear probe: how well a frozen encoder's features tell the digits that ship with scikit-learn."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from models.darl import DARL
from models.mae import MaskedAutoencoder

DIGITS = 1797  # that scikit-learn has
CHUNK = 100  # images a forward


def digits(count: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The first `count` digits as images `[count, 3, H, W]` of zero mean and unit variance, and labels."""
    data = load_digits()
    images = torch.from_numpy(data.images[:count]).float()[:, None]
    images = F.interpolate(images, size, mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    return (images - images.mean()) / images.std(), torch.from_numpy(data.target[:count])


@torch.no_grad()
def accuracy(model: MaskedAutoencoder | DARL, count: int) -> float:
    """Share of digits told right by ridge regression on the mean of the patch tokens.

    The first half of `count` digits fits it, the other half is told. Deterministic. DARL's patches see those
    before them alone, as in pre-training.

    Returns:
        A number in [0, 1]; NaN where a feature is not finite.

    Raises:
        ValueError: there are not so many digits.
    """
    if not 2 <= count <= DIGITS:
        raise ValueError(f"count: expected 2 to {DIGITS} digits, got {count}")
    device = next(model.parameters()).device
    images, labels = digits(count, model.patch_embed.img_size)
    training = model.training
    model.eval()
    mask = {"is_causal": True} if isinstance(model, DARL) else {}
    tokens = [model.features(part.to(device), **mask) for part in images.split(CHUNK)]
    model.train(training)
    features = torch.cat([part[:, 1:].mean(1) for part in tokens]).cpu().double().numpy()
    if not np.isfinite(features).all():
        return math.nan
    half = count // 2
    classifier = make_pipeline(StandardScaler(), RidgeClassifier())
    classifier.fit(features[:half], labels[:half])
    return float(classifier.score(features[half:], labels[half:]))
