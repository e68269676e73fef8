"""Orders and places of patches in DARL, and who sees whom.

Letters used in shapes: L patches.
"""

from collections.abc import Sequence

import torch
from timm.layers import build_rotary_pos_embed
from torch import Tensor

ORDERS = ("raster", "nested", "round-robin", "fixed", "random")


def check_choice(name: str, value: object, known: Sequence[object]) -> None:
    """Raise ValueError unless the value is known."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, known))}, got {value!r}")


def patch_order(kind: str, grid_size: tuple[int, int], block: int = 2, seed: int = 0) -> Tensor:
    """The order in which the patches of a grid are predicted, as their raster numbers [L].

    Args:
        kind: "raster"; "nested", the squares of `block` by `block` patches one after the other, each in
            raster order; "round-robin", the first patch of every square, then the second, and so on; or
            "fixed", one random order.
        grid_size: Rows and columns of patches; squares at the far edges may be incomplete.
        block: Side of a square.
        seed: Of the order "fixed".

    Raises:
        ValueError: There is no such kind, or block is below 1.
    """
    check_choice("order", kind, [known for known in ORDERS if known != "random"])
    if block < 1:
        raise ValueError(f"order_block: expected at least 1, got {block}")
    rows, columns = grid_size
    numbers = torch.arange(rows * columns)
    if kind == "raster":
        return numbers
    if kind == "fixed":
        return torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))
    row, column = numbers // columns, numbers % columns
    square = (row // block) * (-(-columns // block)) + column // block
    within = (row % block) * block + column % block
    first, second = (square, within) if kind == "nested" else (within, square)
    return (first * (rows * columns * block**2) + second).argsort()


def rotary_positions(
    kind: str,
    grid_size: tuple[int, int],
    head_dim: int,
    reference: tuple[int, int] | None = None,
    temperature: float = 100.0,
) -> Tensor:
    """Sines and cosines of RoPE for every patch in raster order, [L, 2 * head_dim], as timm has them.

    Args:
        kind: "rope1d", by the patch's raster number, or "rope2d", half of the pairs of channels by its column
            and half by its row (section 3.4 of the paper).
        grid_size: Rows and columns of patches.
        head_dim: Width of an attention head; divisible by 2, or by 4 for "rope2d".
        reference: Positions are scaled to the range of this grid; None for the grid itself.
        temperature: The longest wavelength, over 2 pi, in patches.
    """
    if kind == "rope2d":
        scaled = None if reference in (None, grid_size) else reference
        waves = build_rotary_pos_embed(
            list(grid_size),
            dim=head_dim,
            temperature=temperature,
            in_pixels=False,
            ref_feat_shape=None if scaled is None else list(scaled),
            grid_indexing="xy",
        )
        return torch.cat(waves, dim=-1)
    length = grid_size[0] * grid_size[1]
    place = torch.arange(length, dtype=torch.float64)
    if reference is not None:
        place *= reference[0] * reference[1] / length
    frequency = temperature ** -(torch.arange(head_dim // 2, dtype=torch.float64) / (head_dim // 2))
    angle = torch.outer(place, frequency).repeat_interleave(2, dim=-1)
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


def two_stream_mask(length: int, device: torch.device | None = None) -> Tensor:
    """Who sees whom in two-stream attention [2 L, 2 L]: start token and L - 1 patches, then L queries.

    Patches see those before and themselves. A query sees the patches before its own. Nobody sees queries.
    """
    before = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return torch.cat([torch.cat([before, before]), before.new_zeros(2 * length, length)], dim=1)
