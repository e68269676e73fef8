"""Small segmentation models on encoders of both classes."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from models.classifier import Architecture, create_vit
from models.segmentation import HEADS, SegmentationModel

SIZES = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
MAE = Architecture("mae_vit_tiny", 32, SIZES)
DARL = Architecture("darl_vit_tiny", 32, SIZES)
SHALLOW = replace(MAE, sizes=SIZES | {"depth": 1})
ENCODERS = {"VisionTransformer": MAE, "Eva": DARL}
CLASSES = ["sky", "road", "cat", "dog", "grün"]

encoders = pytest.mark.parametrize("architecture", ENCODERS.values(), ids=ENCODERS)
heads = pytest.mark.parametrize("head", HEADS)


def shaken(model: nn.Module) -> nn.Module:
    """All parameters and statistics at random, so that none is at a value where it does nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))
    return model


def build(head: str, architecture: Architecture = MAE, **options) -> SegmentationModel:
    if head != "linear":
        options.setdefault("width", 16)
    encoder = create_vit(architecture, dynamic_img_size=True)
    return shaken(SegmentationModel(encoder, len(CLASSES), head, **options))
