"""What the pre-trained models share: sizes of ViTs, patches, fixed positions, initial values.

Letters used in shapes: B images, C channels, H and W their size, L patches in raster order, P the values in a
patch (rows * columns * channels), D the width of the encoder.
"""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

norm_layer = partial(nn.LayerNorm, eps=1e-6)

SIZES = {
    "tiny": {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16},
}


def create(
    cls: type[Model], sizes: Mapping[str, Mapping[str, Any]], name: str, overrides: Mapping[str, Any]
) -> Model:
    """Build a model by name.

    Args:
        cls: Of the model.
        sizes: Arguments by name.
        name: One of these.
        overrides: Arguments that replace those of the table, or come beside them.

    Raises:
        ValueError: If there is no such model or argument, or a value is out of its range.
    """
    if name not in sizes:
        raise ValueError(f"unknown model {name!r}, expected one of {', '.join(sizes)}")
    known = inspect.signature(cls).parameters
    unknown = [key for key in overrides if key not in known]
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]!r} for {name}, expected some of {', '.join(known)}")
    return cls(**{**sizes[name], **overrides})


def pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """Return `value` as (height, width), raising ValueError for anything but one or two positive numbers."""
    found = (value, value) if isinstance(value, int) else tuple(value)
    if len(found) != 2 or min(found) < 1:
        raise ValueError(f"{name} must be a positive number or two, got {value}")
    return found


def check_sizes(img_size: tuple[int, int], patch_size: tuple[int, int]) -> None:
    """Raise ValueError unless the patch divides the image."""
    if img_size[0] % patch_size[0] or img_size[1] % patch_size[1]:
        raise ValueError(f"img_size must be divisible by patch_size, got {img_size} and {patch_size}")


def grid_of(imgs: Tensor, in_chans: int, patch_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches, raising ValueError unless images [B, C, H, W] can be cut into them."""
    rows, columns = patch_size
    if imgs.dim() != 4 or imgs.shape[1] != in_chans:
        raise ValueError(f"expected images of shape [B, {in_chans}, H, W], got {list(imgs.shape)}")
    height, width = imgs.shape[2:]
    if not height or not width or height % rows or width % columns:
        raise ValueError(
            f"expected images whose sides are multiples of {rows} and {columns}, got {list(imgs.shape)}"
        )
    return height // rows, width // columns


def check_transformer(part: str, dim: int, heads: int, depth: int) -> None:
    """Raise ValueError for a width, a number of heads or a depth that make no transformer.

    Args:
        part: Prefix of the arguments' names in the message, such as "decoder_".
        dim: Width; sine-cosine positions need it divisible by 4.
        heads: Attention heads; they divide the width.
        depth: Blocks.
    """
    if depth < 1:
        raise ValueError(f"{part}depth must be at least 1, got {depth}")
    if heads < 1:
        raise ValueError(f"{part}num_heads must be at least 1, got {heads}")
    if dim < 1 or dim % heads:
        raise ValueError(f"{part}embed_dim must be divisible by {part}num_heads {heads}, got {dim}")
    if dim % 4:
        raise ValueError(f"{part}embed_dim must be divisible by 4 for its positions, got {dim}")


def patchify(imgs: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut images [B, C, H, W] into patches [B, L, P], a patch being ordered (row, column, channel)."""
    b, c, height, width = imgs.shape
    p, q = patch_size
    patches = imgs.reshape(b, c, height // p, p, width // q, q).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(b, (height // p) * (width // q), p * q * c)


def unpatchify(patches: Tensor, grid_size: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """Put patches [B, L, P] together to images [B, C, H, W]: the inverse of `patchify`.

    Raises:
        ValueError: If the number or size of the patches does not fit the grid.
    """
    (h, w), (p, q) = grid_size, patch_size
    length, values = patches.shape[1:]
    if length != h * w or values % (p * q):
        raise ValueError(
            f"expected patches of shape [B, {h * w}, a multiple of {p * q}], got {list(patches.shape)}"
        )
    c = values // (p * q)
    imgs = patches.reshape(-1, h, w, p, q, c).permute(0, 5, 1, 3, 2, 4)
    return imgs.reshape(-1, c, h * p, w * q)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (unbiased, kept off zero) of every patch, both [B, L, 1]."""
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (var + 1e-6).sqrt()


def sincos_positions(
    grid_size: tuple[int, int], dim: int, reference: tuple[int, int] | None = None
) -> Tensor:
    """Return MAE's fixed position embedding [1, 1 + h * w, dim] for a grid of h by w patches.

    The first row belongs to the class token and is zero. In the others every angle is a coordinate divided
    by 10000^(i / (dim / 4)), and the channels are [sin of columns, cos of columns, sin of rows, cos of rows],
    each with dim / 4 values. timm's `build_sincos2d_pos_embed` has the same numbers in another order.

    Args:
        grid_size: Rows and columns of patches.
        dim: Width, divisible by 4.
        reference: Coordinates are scaled to the range of this grid; None for the grid itself.
    """
    # float64, because the error of a float32 frequency grows with the coordinate.
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(
        *(
            torch.arange(n, dtype=torch.float64) * (ref / n)
            for n, ref in zip(grid_size, reference or grid_size, strict=True)
        ),
        indexing="ij",
    )
    angles = [torch.outer(axis.flatten(), frequency) for axis in (columns, rows)]
    patches = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return torch.cat([patches.new_zeros(1, dim), patches]).float().unsqueeze(0)


def init_xavier(model: nn.Module) -> None:
    """Initialise as MAE: Xavier-uniform weights and zero biases of linear layers and patch convolutions."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            # The patch embedding is a linear layer written as a convolution; flat, its fans are right.
            nn.init.xavier_uniform_(module.weight.detach().flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
