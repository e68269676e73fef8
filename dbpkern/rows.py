"""The rows of features that a layer reads: tokens for a linear layer, unfolded patches for a convolution."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from dbpkern import ops


def count_tokens(x: Tensor) -> int:
    """Number of rows of `x [*, d]`."""
    return x.numel() // x.shape[-1] if x.shape[-1] else 0


def take_tokens(out: Tensor, x: Tensor, index: Tensor | None) -> None:
    """Write the rows `index` (all of them for None) of `x [*, d]` into `out [n_s, d]`."""
    ops.sample_rows_(out, x, index)


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
    rows, columns = [
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, dilation in zip(
            sizes, conv.kernel_size, conv.stride, conv.dilation, strict=True
        )
    ]
    return rows, columns


def count_patches(conv: nn.Conv2d, x: Tensor) -> int:
    """Number of patches in the images x, `[B, C, H, W]` or `[C, H, W]`."""
    rows, columns = patch_grid(conv, x)
    return (len(x) if x.dim() == 4 else 1) * rows * columns


def take_patches(out: Tensor, conv: nn.Conv2d, x: Tensor, index: Tensor | None) -> None:
    """Write the patches `index` (all of them for None) of the images x into `out [n_s, C kh kw]`."""
    margins = _margins(conv)
    if conv.padding_mode != "zeros":
        x, margins = pad(conv, x), (0, 0, 0, 0)
    ops.sample_patches_(out, x, index, conv.kernel_size, conv.stride, margins, conv.dilation)
