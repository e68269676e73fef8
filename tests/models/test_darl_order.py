"""The orders of DARL, its rotations, the mask of its two streams, and positions at other sizes."""

import math
from itertools import pairwise

import pytest
import timm
import torch
from darls import (
    GRID,
    LENGTH,
    SHARED,
    SMALL,
    VALUES,
    each_place,
    images,
    name_of,
    perturbed,
    rename,
    small,
    timm_rope_vit,
)
from rotary_embedding_torch import RotaryEmbedding, apply_rotary_emb
from timm.layers import apply_rot_embed_cat
from timm.models.vision_transformer import VisionTransformer

from models.darl import create_darl
from models.darl_order import patch_order, rotary_positions, two_stream_mask
from models.vit import sincos_positions

# Orders.


@pytest.mark.parametrize("length", [1, 2, 5])
def test_two_stream_mask_from_the_definition(length):
    mask = two_stream_mask(length)
    assert mask.dtype == torch.bool
    assert mask.shape == (2 * length, 2 * length)
    names = [("content", t) for t in range(length)] + [("query", t) for t in range(length)]
    for i, (_, reader) in enumerate(names):
        for j, (kind, read) in enumerate(names):
            # Content t is the start token and then patch t - 1; query t may know the patches up to t - 1.
            assert mask[i, j] == (kind == "content" and read <= reader)


def squares(rows: int, columns: int, block: int) -> list[tuple[int, int]]:
    return [(top, left) for top in range(0, rows, block) for left in range(0, columns, block)]


def nested(rows: int, columns: int, block: int) -> list[int]:
    return [
        row * columns + column
        for top, left in squares(rows, columns, block)
        for row in range(top, min(top + block, rows))
        for column in range(left, min(left + block, columns))
    ]


def round_robin(rows: int, columns: int, block: int) -> list[int]:
    return [
        (top + down) * columns + left + right
        for down in range(block)
        for right in range(block)
        for top, left in squares(rows, columns, block)
        if top + down < rows and left + right < columns
    ]


@pytest.mark.parametrize("block", [1, 2, 3, 20])
@pytest.mark.parametrize("grid", [(4, 6), (3, 5), (5, 3), (7, 8), (1, 4), (1, 1), (14, 14)])
def test_orders_from_their_definitions(grid, block):
    length = grid[0] * grid[1]
    assert patch_order("raster", grid, block).tolist() == list(range(length))
    assert patch_order("nested", grid, block).tolist() == nested(*grid, block)
    assert patch_order("round-robin", grid, block).tolist() == round_robin(*grid, block)
    for kind in ("nested", "round-robin", "fixed"):
        assert sorted(patch_order(kind, grid, block).tolist()) == list(range(length))


def test_nested_and_round_robin_by_eye():
    assert patch_order("nested", (2, 4)).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert patch_order("round-robin", (2, 4)).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_seed_decides_the_fixed_order():
    state = torch.get_rng_state()
    orders = [patch_order("fixed", GRID, seed=seed).tolist() for seed in (0, 0, 1, 2)]
    assert orders[0] == orders[1]
    assert len(set(map(tuple, orders))) == 3
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["random", "spiral", None])
def test_unknown_orders_are_refused(kind):
    with pytest.raises(
        ValueError, match=f"order: expected one of raster, nested, round-robin, fixed, got {kind!r}"
    ):
        patch_order(kind, GRID)


@pytest.mark.parametrize("block", [0, -2])
def test_squares_have_a_side(block):
    with pytest.raises(ValueError, match=f"order_block: expected at least 1, got {block}"):
        patch_order("nested", GRID, block)


def test_random_orders_are_uniform_and_follow_the_seed():
    model, imgs = small(order="random", two_stream=True), torch.zeros(3000, 3, 24, 60)
    order = model.order_of(GRID, None, imgs)
    assert torch.equal(order.sort(dim=1).values, torch.arange(LENGTH).expand(3000, -1))
    for t in range(LENGTH):
        # The frequency of a patch has a standard deviation of 0.0046.
        assert order[:, t].bincount(minlength=LENGTH).div(3000).sub(1 / 15).abs().max() < 0.02
    torch.manual_seed(7)
    first, other = (model.order_of(GRID, None, imgs[:2]) for _ in range(2))
    torch.manual_seed(7)
    assert torch.equal(model.order_of(GRID, None, imgs[:2]), first)
    assert not torch.equal(first, other)


# Rotations.


def angles_of_library(grid: tuple[int, int], head_dim: int) -> torch.Tensor:
    """Angles [L, head_dim]; the library has rows first, and we have columns."""
    rows, columns = grid
    made = RotaryEmbedding(dim=head_dim // 2, freqs_for="lang", theta=100).get_axial_freqs(rows, columns)
    by_row, by_column = made.flatten(0, 1).chunk(2, dim=-1)
    return torch.cat([by_column, by_row], dim=-1)


@pytest.mark.parametrize("head_dim", [8, 16, 64])
@pytest.mark.parametrize("grid", [(3, 5), (14, 14)])
def test_rope2d_is_that_of_another_library(grid, head_dim):
    angles, rope = angles_of_library(grid, head_dim), rotary_positions("rope2d", grid, head_dim)
    assert rope.dtype == torch.float32
    assert rope.shape == (grid[0] * grid[1], 2 * head_dim)
    torch.testing.assert_close(rope, torch.cat([angles.sin(), angles.cos()], dim=-1), rtol=0, atol=1e-6)
    x = torch.randn(2, 3, len(rope), head_dim)
    torch.testing.assert_close(apply_rot_embed_cat(x, rope), apply_rotary_emb(angles, x), rtol=0, atol=1e-5)


def test_rope1d_is_that_of_another_library():
    angles = RotaryEmbedding(dim=16, freqs_for="lang", theta=100)(torch.arange(LENGTH))
    rope = rotary_positions("rope1d", GRID, 16)
    assert rope.dtype == torch.float32
    torch.testing.assert_close(rope, torch.cat([angles.sin(), angles.cos()], dim=-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_rope2d_is_that_of_timm(size):
    vit = timm.create_model(f"vit_{size}_patch16_rope_224", depth=1, embed_dim=64, num_heads=1)
    model = create_darl(f"darl_vit_{size}", depth=1, embed_dim=64, num_heads=1)
    assert vit.patch_embed.grid_size == (14, 14)
    assert torch.equal(model.rope, vit.rope.get_embed())


@pytest.mark.parametrize("kind", ["rope1d", "rope2d"])
def test_rotated_scores_depend_on_the_distance_alone(kind):
    rope = rotary_positions(kind, GRID, 16).double()
    q, k = torch.randn(2, 1, 16, dtype=torch.float64)
    scores = (
        apply_rot_embed_cat(q.expand(LENGTH, -1), rope) @ apply_rot_embed_cat(k.expand(LENGTH, -1), rope).T
    )
    by_distance = {}
    for i in range(LENGTH):
        for j in range(LENGTH):
            (r, c), (s, d) = divmod(i, GRID[1]), divmod(j, GRID[1])
            distance = i - j if kind == "rope1d" else (r - s, c - d)
            by_distance.setdefault(distance, []).append(scores[i, j].item())
    assert len(by_distance) == {"rope1d": 2 * LENGTH - 1, "rope2d": 5 * 9}[kind]
    for found in by_distance.values():
        assert max(found) - min(found) < 1e-5
    # Other distances have other scores: each axis counts, and so do signs.
    means = sorted(sum(found) / len(found) for found in by_distance.values())
    assert min(b - a for a, b in pairwise(means)) > 1e-5


@pytest.mark.parametrize("grid", [(3, 5), (6, 5), (4, 10), (2, 3)])
def test_rotations_are_scaled_to_the_range_of_the_reference(grid):
    plane, line = (rotary_positions(kind, grid, 16, reference=GRID) for kind in ("rope2d", "rope1d"))
    for index in range(grid[0] * grid[1]):
        row, column = divmod(index, grid[1])
        axes = [column * GRID[1] / grid[1]] * 4 + [row * GRID[0] / grid[0]] * 4
        place = index * LENGTH / (grid[0] * grid[1])
        for pair in range(8):
            for rope, angle in (
                (plane, axes[pair] * 100 ** (-(pair % 4) / 4)),
                (line, place * 100 ** (-pair / 8)),
            ):
                for channel in (2 * pair, 2 * pair + 1):
                    assert rope[index, channel].item() == pytest.approx(math.sin(angle), abs=2e-6)
                    assert rope[index, 16 + channel].item() == pytest.approx(math.cos(angle), abs=2e-6)


def test_temperature_sets_the_longest_wavelength():
    for kind in ("rope1d", "rope2d"):
        model = small(positions=kind, rope_temperature=1000.0)
        assert torch.equal(model.rope, rotary_positions(kind, GRID, 16, temperature=1000.0))
        assert not torch.allclose(model.rope, rotary_positions(kind, GRID, 16), atol=1e-2)
        _, other = model.place((4, 4), torch.device("cpu"))
        assert torch.equal(other, rotary_positions(kind, (4, 4), 16, GRID, 1000.0))


# Other sizes of images.


@pytest.mark.parametrize("size", [(384, 384), (112, 336)])
def test_rope_serves_other_sizes_as_timm_does(size):
    options = {"img_size": 224, "patch_size": 16, "embed_dim": 48, "depth": 1, "num_heads": 3}
    model = perturbed(create_darl("darl_vit_tiny", **options))
    vit = timm_rope_vit(**options, dynamic_img_size=True, ref_feat_shape=(14, 14))
    vit.load_state_dict(model.encoder_state_dict(), strict=True)
    with torch.no_grad():
        imgs = images(1, size)
        torch.testing.assert_close(model.features(imgs), vit.forward_features(imgs), rtol=1e-5, atol=1e-5)
        loss, pred = model(imgs)
    assert loss.isfinite()
    assert pred.shape == (1, size[0] * size[1] // 256, 768)


@pytest.mark.parametrize("size", [(40, 48), (48, 60), (8, 12)])
def test_learned_positions_are_resampled_as_timm_does(size):
    model = small(positions="learned")
    vit = VisionTransformer(num_classes=0, dynamic_img_size=True, **SMALL)
    vit.load_state_dict(model.encoder_state_dict(), strict=True)
    imgs = images(2, size)
    torch.testing.assert_close(model.features(imgs), vit.forward_features(imgs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", [(5, 4), (6, 5), (3, 10), (1, 1)])
def test_fixed_positions_are_scaled_to_the_range_of_the_model(grid):
    model = small(positions="sincos")
    added, rope = model.place(grid, torch.device("cpu"))
    assert rope is None
    assert added.shape == (1, 1 + grid[0] * grid[1], 48)
    assert not added[0, 0].any()
    for index in range(grid[0] * grid[1]):
        row, column = divmod(index, grid[1])
        for i in range(12):
            scale = 10000 ** (i / 12)
            angles = column * GRID[1] / grid[1] / scale, row * GRID[0] / grid[0] / scale
            expected = [wave(angle) for angle in angles for wave in (math.sin, math.cos)]
            assert added[0, 1 + index, i::12].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("order", [*SHARED, {"order": "random", "two_stream": True}], ids=name_of)
@each_place
def test_every_model_serves_other_sizes(positions, order):
    model = small(positions=positions, **order)
    loss, pred = model(images(2, (32, 24)))
    assert loss.isfinite()
    assert pred.shape == (2, 8, VALUES)
    if order["order"] != "random":
        found = model.order_of((4, 2), None, images(2, (32, 24)))
        assert torch.equal(found, patch_order(grid_size=(4, 2), **rename(order)))


def test_at_its_own_size_a_model_has_its_own_positions():
    for positions in ("sincos", "learned"):
        model = small(positions=positions)
        assert model.place(GRID, torch.device("cpu")) == (model.pos_embed, None)
    assert torch.equal(small(positions="sincos").pos_embed, sincos_positions(GRID, 48))
    assert small(positions="none").place(GRID, torch.device("cpu")) == (None, None)
