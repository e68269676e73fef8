"""Small models of DARL whose parameters are at random, and inputs for them."""

import pytest
import torch
from timm.models import eva
from torch import nn

from models.darl import DARL, POSITIONS, create_darl

# A grid of 3 by 5 patches: nothing is square, so swapped axes do not go unnoticed.
SMALL = {"img_size": (24, 60), "patch_size": (8, 12), "embed_dim": 48, "depth": 2, "num_heads": 3}
GRID, LENGTH, VALUES = (3, 5), 15, 8 * 12 * 3

# Orders that every image shares.
SHARED = [
    {"order": "raster"},
    {"order": "nested"},
    {"order": "nested", "order_block": 3},
    {"order": "round-robin"},
    {"order": "round-robin", "order_block": 3},
    {"order": "fixed", "order_seed": 1},
]

OBJECTIVES = [
    {},
    {"decoder_depth": 2},
    {"norm_pix_loss": True},
    {"objective": "diffusion"},
    {"objective": "diffusion", "decoder": "mlp", "decoder_depth": 0, "gamma_conditioned": True},
    {"objective": "diffusion", "decoder_depth": 2, "prediction": "epsilon", "gamma": (3, 10)},
    {"objective": "tokens", "vocabulary": 7},
    {"objective": "tokens", "vocabulary": 7, "inputs": "tokens", "positions": "learned", "two_stream": True},
    {"inputs": "tokens", "vocabulary": 7},
    {"order": "random", "two_stream": True},
]


def perturbed(model: nn.Module) -> nn.Module:
    """Move every trained tensor off its initial value, so that no bias or scale is trivial."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def small(**overrides) -> DARL:
    return perturbed(create_darl("darl_vit_tiny", **{**SMALL, **overrides}))


def images(count: int = 2, size: tuple[int, int] = SMALL["img_size"]) -> torch.Tensor:
    return torch.randn(count, 3, *size)


def codes(count: int = 2) -> torch.Tensor:
    return torch.randint(7, (count, LENGTH))


def patch_of(imgs: torch.Tensor, index: int) -> torch.Tensor:
    """The values of patch `index` in the order (row, column, channel): [B, 288]."""
    row, column = divmod(index, GRID[1])
    return imgs[:, :, 8 * row : 8 * row + 8, 12 * column : 12 * column + 12].permute(0, 2, 3, 1).flatten(1)


def timm_rope_vit(name: str = "vit_small_patch16_rope_224", **overrides) -> nn.Module:
    """timm's ViT without LayerScale; `timm.create_model` would drop an init_values of None."""
    return getattr(eva, name)(init_values=None, num_classes=0, **overrides)


def name_of(options: object) -> str:
    return " ".join(map(str, options.values())) or "default" if isinstance(options, dict) else "layers"


each_order = pytest.mark.parametrize("order", SHARED, ids=name_of)
each_position = pytest.mark.parametrize("positions", POSITIONS)
each_place = pytest.mark.parametrize("positions", [name for name in POSITIONS if name != "none"])
each_objective = pytest.mark.parametrize("options", OBJECTIVES, ids=name_of)


def rename(order: dict) -> dict:
    """Arguments of `patch_order` for those of DARL."""
    return {{"order": "kind", "order_block": "block", "order_seed": "seed"}[k]: v for k, v in order.items()}


def arguments(model: DARL, imgs: torch.Tensor) -> dict:
    """What a step of this model needs beside the images, random numbers included."""
    found = {"noise": torch.rand(len(imgs), LENGTH)}
    if model.config.objective == "diffusion":
        found["drawn"] = model.draw(imgs)
    if "tokens" in (model.config.inputs, model.config.objective):
        found["codes"] = codes(len(imgs))
    return found
