"""The rows of features that a layer reads: tokens for a linear layer, unfolded patches for a convolution."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def count_tokens(x: Tensor) -> int:
    """Number of rows of `x [*, d]`."""
    return x.numel() // x.shape[-1] if x.shape[-1] else 0


def take_tokens(x: Tensor, index: Tensor | None) -> Tensor:
    """The rows `index` of `x [*, d]`, `[n_s, d]`; all of them for None."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.clone() if index is None else rows.index_select(0, index)


def _margins(conv: nn.Conv2d) -> Sequence[int]:
    """Padding at the left, right, top and bottom."""
    return conv._reversed_padding_repeated_twice


def pad(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The images x with the convolution's padding."""
    margins = _margins(conv)
    if not any(margins):
        return x
    return F.pad(x, margins, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)


def patch_grid(conv: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    """Numbers of rows and columns of patches in the images x."""
    left, right, top, bottom = _margins(conv)
    sizes = (x.shape[-2] + top + bottom, x.shape[-1] + left + right)
    return tuple(
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, dilation in zip(
            sizes, conv.kernel_size, conv.stride, conv.dilation, strict=True
        )
    )


def count_patches(conv: nn.Conv2d, x: Tensor) -> int:
    """Number of patches in the images x, `[B, C, H, W]` or `[C, H, W]`."""
    rows, columns = patch_grid(conv, x)
    return (len(x) if x.dim() == 4 else 1) * rows * columns


def take_patches(conv: nn.Conv2d, x: Tensor, index: Tensor | None) -> Tensor:
    """The patches `index` of the images x, `[n_s, C kh kw]`; all of them for None."""
    _, columns = patch_grid(conv, x)
    if index is None:
        index = torch.arange(count_patches(conv, x), device=x.device)
    x = x if x.dim() == 4 else x[None]
    cells = count_patches(conv, x) // len(x)
    x = pad(conv, x)
    # Reads the sampled patches alone: unfolding every patch would copy the whole batch.
    starts = (index % cells // columns, index % columns)
    y, v = (
        start[:, None] * stride + torch.arange(kernel, device=x.device) * dilation  # [n_s, k]
        for start, stride, kernel, dilation in zip(
            starts, conv.stride, conv.kernel_size, conv.dilation, strict=True
        )
    )
    image = (index // cells)[:, None, None]
    patches = x[image, :, y[:, :, None], v[:, None, :]]  # [n_s, kh, kw, C]
    return patches.permute(0, 3, 1, 2).flatten(1)
