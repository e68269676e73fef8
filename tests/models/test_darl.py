"""DARL against its definition: who sees whom, orders, rotations, losses, timm's ViTs, decorrelated layers."""

import math
from functools import partial
from itertools import pairwise

import pytest
import timm
import torch
from rotary_embedding_torch import RotaryEmbedding, apply_rotary_emb
from rules import convert, decor_sgd, preconditioner
from timm.layers import apply_rot_embed_cat
from timm.models import eva
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

import dbpkern
from dbpkern.layers.modules import Decorrelated
from models import diffusion
from models.darl import DARL, POSITIONS, SIZES, create_darl
from models.darl_decoder import PairBlock, PairDecoder
from models.darl_order import ORDERS, patch_order, rotary_positions, two_stream_mask
from models.vit import patchify, sincos_positions

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

# timm's ViTs with axial RoPE; widths that it lacks are set.
TIMM = {
    "darl_vit_tiny": ("vit_small_patch16_rope_224", {"embed_dim": 192, "num_heads": 3}),
    "darl_vit_small": ("vit_small_patch16_rope_224", {}),
    "darl_vit_base": ("vit_base_patch16_rope_224", {}),
    "darl_vit_large": ("vit_large_patch16_rope_224", {}),
    "darl_vit_huge": ("vit_large_patch16_rope_224", {"patch_size": 14, "embed_dim": 1280, "depth": 32}),
}

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


# Who sees whom.


def dependence(model: DARL, imgs: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Whether the t-th context of an image depends on the pixels of the s-th patch: [B, t, s]."""
    copies = imgs.repeat_interleave(LENGTH, dim=0).requires_grad_()  # one for every t
    each = order if order.dim() == 1 else order.repeat_interleave(LENGTH, dim=0)
    contexts = model.contexts(copies, each).unflatten(0, (len(imgs), LENGTH))
    chosen = contexts.diagonal(dim1=1, dim2=2)
    (chosen * torch.randn_like(chosen)).sum().backward()
    moved = torch.stack([patch_of(copies.grad, i).any(dim=1) for i in range(LENGTH)], dim=1)
    return moved.gather(1, each.expand(len(copies), -1)).unflatten(0, (len(imgs), LENGTH))


BEFORE = torch.tensor([[s < t for s in range(LENGTH)] for t in range(LENGTH)])


@each_position
@pytest.mark.parametrize("two_stream", [False, True])
@each_order
def test_a_context_depends_on_the_patches_before_and_no_other(order, two_stream, positions):
    model, imgs = small(positions=positions, two_stream=two_stream, **order), images(1)
    places = model.order_of(GRID, None, imgs)
    assert torch.equal(places, patch_order(grid_size=GRID, **rename(order)))
    assert torch.equal(dependence(model, imgs, places), BEFORE[None])


def rename(order: dict) -> dict:
    """Arguments of `patch_order` for those of DARL."""
    return {{"order": "kind", "order_block": "block", "order_seed": "seed"}[k]: v for k, v in order.items()}


@each_place
def test_a_context_depends_on_the_patches_before_in_the_order_of_its_image(positions):
    model, imgs = small(positions=positions, two_stream=True, order="random"), images(2)
    noise = torch.rand(2, LENGTH)
    order = model.order_of(GRID, noise, imgs)
    for b in range(2):
        assert order[b].tolist() == sorted(range(LENGTH), key=noise[b].tolist().__getitem__)
    assert torch.equal(dependence(model, imgs, order), BEFORE.expand(2, -1, -1))


@pytest.mark.parametrize("two_stream", [False, True])
@pytest.mark.parametrize("positions", ["none", "learned", "rope1d"])
def test_a_context_depends_on_the_tokens_before_and_no_other(positions, two_stream):
    model = small(inputs="tokens", vocabulary=7, positions=positions, two_stream=two_stream, order="nested")
    imgs, entries, order = images(1), codes(1), model.places
    copies = entries.repeat(1 + LENGTH, 1)
    for s in range(LENGTH):
        copies[1 + s, order[s]] = (copies[1 + s, order[s]] + 1) % 7
    contexts = model.contexts(imgs.expand(1 + LENGTH, -1, -1, -1), order, copies)
    changed = (contexts[1:] - contexts[:1]).abs().amax(dim=-1)  # [s, t]
    assert (changed.T[~BEFORE] < 1e-5).all()
    assert (changed.T[BEFORE] > 1e-3).all()


@pytest.mark.parametrize(
    "options", [{"order": "nested"}, {"order": "random", "two_stream": True}], ids=name_of
)
def test_predictions_depend_on_the_patches_before(options):
    model, imgs, noise = small(**options), images(1), torch.rand(1, LENGTH)
    order = model.order_of(GRID, noise, imgs).flatten()
    for t in (0, 1, 7, 14):
        pixels = imgs.clone().requires_grad_()
        _, pred = model(pixels, noise)
        pred[0, order[t]].square().sum().backward()
        moved = [s for s in range(LENGTH) if patch_of(pixels.grad, s).any()]
        assert moved == sorted(order[:t].tolist())


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


def two_stream_tokens(model: DARL) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Record the tokens before the first and after the last block, both [B, 2 L, D]."""
    first, last = [], []

    def enter(_, args):
        first.append(args[0].detach().requires_grad_())
        return (first[-1], *args[1:])

    model.blocks[0].register_forward_pre_hook(enter)
    model.blocks[-1].register_forward_hook(lambda _, args, output: last.append(output))
    return first, last


@pytest.mark.parametrize("positions", ["learned", "rope2d"])
@pytest.mark.parametrize("order", ["raster", "random"])
def test_nobody_sees_queries(order, positions):
    model, count = small(two_stream=True, order=order, positions=positions), 2 * LENGTH
    first, last = two_stream_tokens(model)
    imgs = images(1).expand(count, -1, -1, -1)  # one for every token
    model.contexts(imgs, model.order_of(GRID, torch.rand(1, LENGTH).expand(count, -1), imgs))
    chosen = last[0].diagonal(dim1=0, dim2=1)
    (chosen * torch.randn_like(chosen)).sum().backward()
    found = first[0].grad.any(dim=-1)
    # Whether token i depends on token j: by the definition of the two streams, and a query on itself.
    for i in range(count):
        reader, queries = i % LENGTH, i >= LENGTH
        seen = [j for j in range(LENGTH) if j <= reader] + ([i] if queries else [])
        assert found[i].nonzero().flatten().tolist() == seen


@each_position
def test_the_stream_of_patches_is_that_of_a_plain_model(positions):
    model, imgs = small(two_stream=True, order="nested", positions=positions), images()
    plain = create_darl("darl_vit_tiny", **SMALL, order="nested", positions=positions)
    plain.load_state_dict(model.state_dict() | {"query_token": None}, strict=False)
    _, last = two_stream_tokens(model)
    model.contexts(imgs, model.places)
    expected = plain.contexts(imgs, plain.places)
    torch.testing.assert_close(model.norm(last[0][:, :LENGTH]), expected, rtol=1e-5, atol=1e-5)


@each_place
def test_a_query_is_the_next_token_of_what_it_sees(positions):
    # The context of patch t is the last output for the sequence: start, the patches before t, the query. Each
    # token sees itself, but the query does not.
    model, imgs = small(two_stream=True, order="random", positions=positions), images()
    order = model.order_of(GRID, None, imgs)
    contexts = model.contexts(imgs, order)
    added, rope = model.place(GRID, imgs.device)
    for b in range(2):
        content = model.patch_embed(imgs[b : b + 1]) + (0 if added is None else added[:, 1:])
        start = model.cls_token + (0 if added is None else added[:, :1])
        for t in (0, 1, 6, 14):
            query = model.query_token + (0 if added is None else added[:, 1 + order[b, t : t + 1]])
            x = torch.cat([start, content[:, order[b, :t]], query], dim=1)
            mask = torch.ones(t + 2, t + 2, dtype=torch.bool).tril()
            mask[-1, -1] = False
            for block in model.blocks:
                x = block(x, rope=None if rope is None else rope[order[b, : t + 1]], attn_mask=mask)
            torch.testing.assert_close(contexts[b, t], model.norm(x)[0, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("two_stream", [False, True])
@each_position
def test_orders_of_images_are_those_of_each_image(positions, two_stream):
    model, imgs = small(two_stream=two_stream, positions=positions), images()
    order = torch.stack([torch.randperm(LENGTH) for _ in range(2)])
    contexts = model.contexts(imgs, order)
    for b in range(2):
        alone = model.contexts(imgs[b : b + 1], order[b])
        torch.testing.assert_close(contexts[b], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", ["sincos", "learned", "rope1d", "rope2d"])
def test_queries_alone_know_which_patch_is_next(positions):
    order = torch.randperm(LENGTH)
    other = order.clone()
    other[[5, 9]] = order[[9, 5]]
    for two_stream in (False, True):
        model, imgs = small(two_stream=two_stream, positions=positions), images()
        change = (model.contexts(imgs, order) - model.contexts(imgs, other)).abs().amax(dim=(0, 2))
        assert (change[:5] < 1e-5).all()
        assert (change[5] > 1e-3) == two_stream
        assert (change[6:] > 1e-3).all()


# Orders.


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


# timm's ViTs.


@pytest.mark.parametrize("name", SIZES)
def test_encoder_loads_into_timm(name):
    other, overrides = TIMM[name]
    with torch.device("meta"):
        model = create_darl(name, objective="diffusion")
        vit = timm_rope_vit(other, **overrides)
    state = model.encoder_state_dict()
    assert {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in vit.state_dict().items()
    }
    vit.load_state_dict(state, strict=True, assign=True)
    assert len(model.blocks) == len(vit.blocks)
    assert model.blocks[0].attn.num_heads == vit.blocks[0].attn.num_heads


def test_encoder_state_dict_is_a_contiguous_copy():
    model = small(two_stream=True, positions="learned", objective="diffusion").to(
        memory_format=torch.channels_last
    )
    assert not model.patch_embed.proj.weight.is_contiguous()
    state = model.encoder_state_dict()
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in state.values())
    before = model.cls_token.detach().clone()
    state["cls_token"].add_(1)
    assert torch.equal(model.cls_token, before)


@each_objective
def test_what_is_no_encoder_is_named_decoder(options):
    model = small(**options)
    others = model.state_dict().keys() - model.encoder_state_dict().keys()
    assert all(name.startswith("decoder") for name in others - {"query_token"})
    assert ("query_token" in others) == model.config.two_stream
    assert {"decoder.pred.weight", "decoder.pred.bias"} <= others


@pytest.mark.parametrize("is_causal", [False, True])
def test_features_are_those_of_timm(is_causal):
    model, vit, imgs = small(), timm_rope_vit(**SMALL), images()
    vit.load_state_dict(model.encoder_state_dict(), strict=True)
    found, expected = model.features(imgs, is_causal), vit.forward_features(imgs, is_causal=is_causal)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_vit_of_timm_with_layer_scale_needs_scales_of_one():
    model, imgs = small(), images()
    vit = timm.create_model("vit_small_patch16_rope_224", init_values=1.0, num_classes=0, **SMALL)
    missing, unexpected = vit.load_state_dict(model.encoder_state_dict(), strict=False)
    assert not unexpected
    assert set(missing) == {f"blocks.{i}.gamma_{j}" for i in range(2) for j in (1, 2)}
    torch.testing.assert_close(model.features(imgs), vit.forward_features(imgs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("positions", ["none", "sincos", "learned"])
def test_features_with_absolute_positions_are_those_of_timm(positions, is_causal):
    model, imgs = small(positions=positions), images()
    vit = VisionTransformer(num_classes=0, pos_embed="none" if positions == "none" else "learn", **SMALL)
    vit.load_state_dict(model.encoder_state_dict(), strict=True)
    found, expected = model.features(imgs, is_causal), vit.forward_features(imgs, is_causal=is_causal)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@each_position
@each_order
def test_causal_features_are_the_contexts_of_the_next_patches(order, positions):
    model, imgs = small(positions=positions, **order), images()
    features = model.features(imgs, is_causal=True)
    assert features.shape == (2, 1 + LENGTH, 48)
    contexts = model.contexts(imgs, model.places)
    torch.testing.assert_close(features[:, :-1], contexts, rtol=1e-5, atol=1e-5)


@each_place
def test_features_without_causality_have_no_order(positions):
    model, imgs = small(positions=positions), images()
    expected = model.features(imgs)
    for order in ("nested", "fixed", "random"):
        other = create_darl("darl_vit_tiny", **SMALL, positions=positions, order=order, two_stream=True)
        other.load_state_dict(model.state_dict(), strict=False)
        assert torch.equal(other.features(imgs), expected)


def test_features_of_tokens():
    model, imgs, entries = small(inputs="tokens", vocabulary=7, positions="sincos"), images(), codes()
    features = model.features(imgs, codes=entries)
    x = model.patch_embed.embedding.weight[entries] + model.pos_embed[:, 1:]
    x = torch.cat([model.cls_token.expand(2, -1, -1), x], dim=1)
    for block in model.blocks:
        x = block(x)
    torch.testing.assert_close(features, model.norm(x), rtol=1e-5, atol=1e-5)


# Objectives.


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("order", [{"order": "nested"}, {"order": "random", "two_stream": True}], ids=name_of)
def test_squared_error_from_the_definition(order, norm_pix_loss):
    model = small(norm_pix_loss=norm_pix_loss, **order)
    # Contrast close to the 1e-6 under the root, so that leaving it out is noticed.
    imgs, noise = 0.5 + 2e-3 * images(), torch.rand(2, LENGTH)
    loss, pred = model(imgs, noise)
    places = model.order_of(GRID, noise, imgs).expand(2, -1)
    contexts = model.contexts(imgs, places)
    total = 0.0
    for b in range(2):
        for t in range(LENGTH):
            i = places[b, t]
            torch.testing.assert_close(pred[b, i], model.decoder(contexts[b, t]), rtol=1e-5, atol=1e-5)
            target = patch_of(imgs, int(i))[b].double()
            if norm_pix_loss:
                mean = target.sum() / VALUES
                var = (target - mean).square().sum() / (VALUES - 1)
                target = (target - mean) / math.sqrt(var + 1e-6)
            total += ((pred[b, i].double() - target) ** 2).sum().item() / VALUES
    assert loss.shape == ()
    assert loss.item() == pytest.approx(total / (2 * LENGTH), rel=1e-5)


@pytest.mark.parametrize("decoder_depth", [0, 1, 3])
def test_mlp_decoder_from_the_definition(decoder_depth):
    model, context = small(decoder_depth=decoder_depth), torch.randn(2, 5, 48)
    x = context
    for block in model.decoder.blocks:
        x = x + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm(x))))
    assert len(model.decoder.blocks) == decoder_depth
    # A linear decoder has no norm: the encoder's last one has just been.
    assert isinstance(model.decoder.norm, nn.Identity) == (decoder_depth == 0)
    torch.testing.assert_close(model.decoder(context), model.decoder.pred(model.decoder.norm(x)))


DENOISERS = [
    {"decoder": decoder, "decoder_depth": depth, "gamma_conditioned": conditioned, "prediction": prediction}
    for decoder, depth in (("mlp", 0), ("mlp", 2), ("transformer", 1), ("transformer", 2))
    for conditioned in (False, True)
    for prediction in ("x0", "epsilon")
]


def decode(model: DARL, context: torch.Tensor, noisy: torch.Tensor, gamma: float) -> torch.Tensor:
    """What the decoder of a diffusion model makes of one patch, in terms of timm's blocks: [288]."""
    decoder = model.decoder
    if model.config.gamma_conditioned:
        noisy = torch.cat([noisy, torch.tensor([gamma])])
    embedded = decoder.embed(noisy)
    if isinstance(decoder, PairDecoder):
        x = torch.stack([context, embedded]).unsqueeze(0)
        for block in decoder.blocks:
            x = Block.forward(block, x)
        x = x[0, 1]
    else:
        x = context + embedded
        for block in decoder.blocks:
            x = x + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm(x))))
    return decoder.pred(decoder.norm(x))


@pytest.mark.parametrize("options", DENOISERS, ids=name_of)
@torch.no_grad()
def test_diffusion_from_the_definition(options):
    model, imgs = small(objective="diffusion", order="nested", **options), images()
    gamma = torch.rand(2, LENGTH)
    gamma[0, 3], gamma[1, 7] = 1, 1e-3
    eps = torch.randn(2, LENGTH, VALUES)
    loss, pred = model(imgs, drawn=(gamma, eps))
    assert pred.shape == (2, LENGTH, VALUES)
    contexts = model.contexts(imgs, model.places)
    total = 0.0
    for b in range(2):
        for t, i in enumerate(model.places.tolist()):
            g, target = gamma[b, i].item(), patch_of(imgs, i)[b]
            noisy = math.sqrt(g) * target + math.sqrt(1 - g) * eps[b, i]
            made = decode(model, contexts[b, t], noisy, g)
            if options["prediction"] == "epsilon":
                total += (made - eps[b, i]).square().mean().item()
                made = (noisy - math.sqrt(1 - g) * made) / math.sqrt(g)
            else:
                total += (made - target).square().mean().item()
            torch.testing.assert_close(pred[b, i], made, rtol=1e-4, atol=1e-4)
            found = model.denoise(contexts[b, t], noisy, gamma[b, i])
            torch.testing.assert_close(found, made, rtol=1e-4, atol=1e-4)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(total / (2 * LENGTH), rel=1e-5)


@pytest.mark.parametrize("prediction", ["x0", "epsilon"])
def test_pure_noise_has_a_finite_loss(prediction):
    model = small(objective="diffusion", prediction=prediction)
    loss, pred = model(images(), drawn=(torch.zeros(2, LENGTH), torch.randn(2, LENGTH, VALUES)))
    assert loss.isfinite()
    assert pred.isfinite().all()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("decoder", ["mlp", "transformer"])
@pytest.mark.parametrize("conditioned", [False, True])
def test_a_conditioned_decoder_is_told_the_noise_level(conditioned, decoder):
    model = small(objective="diffusion", gamma_conditioned=conditioned, decoder=decoder)
    assert model.decoder.embed.in_features == VALUES + conditioned
    context, noisy = torch.randn(4, 48), torch.randn(4, VALUES)
    low, high = (model.denoise(context, noisy, torch.full((4,), gamma)) for gamma in (0.1, 0.9))
    assert torch.allclose(low, high, atol=1e-4) != conditioned


def test_normalised_patches_are_corrupted_and_predicted():
    model, imgs = small(objective="diffusion", norm_pix_loss=True), 3 + 0.5 * images()
    gamma, eps = torch.rand(2, LENGTH), torch.randn(2, LENGTH, VALUES)
    patches = patchify(imgs, (8, 12))
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(model.targets(imgs), target, rtol=1e-4, atol=1e-4)
    loss, pred = model(imgs, drawn=(gamma, eps))
    assert loss.item() == pytest.approx((pred - target).square().mean().item(), rel=1e-4)
    context = model.contexts(imgs, model.places)
    expected = model.denoise(context, diffusion.corrupt(target, gamma, eps), gamma)
    torch.testing.assert_close(pred, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inputs", ["pixels", "tokens"])
def test_cross_entropy_from_the_definition(inputs):
    model = small(objective="tokens", inputs=inputs, vocabulary=7, order="round-robin")
    imgs, entries = images(), codes()
    loss, scores = model(imgs, codes=entries)
    assert scores.shape == (2, LENGTH, 7)
    contexts = model.contexts(imgs, model.places, entries)
    total = 0.0
    for b in range(2):
        for t, i in enumerate(model.places.tolist()):
            expected = model.decoder(contexts[b, t])
            torch.testing.assert_close(scores[b, i], expected, rtol=1e-5, atol=1e-5)
            chances = [math.exp(score) for score in expected.tolist()]
            total -= math.log(chances[entries[b, i]] / sum(chances))
    assert loss.item() == pytest.approx(total / (2 * LENGTH), rel=1e-5)


def test_pixels_are_predicted_from_tokens():
    model, imgs, entries = small(inputs="tokens", vocabulary=7), images(), codes()
    loss, pred = model(imgs, codes=entries)
    assert loss.item() == pytest.approx((pred - patchify(imgs, (8, 12))).square().mean().item(), rel=1e-5)
    _, other = model(images(), codes=entries)
    assert torch.equal(pred, other)  # pixels are not read
    _, other = model(imgs, codes=(entries + 1) % 7)
    assert not torch.allclose(pred[:, 1:], other[:, 1:], atol=1e-2)


def arguments(model: DARL, imgs: torch.Tensor) -> dict:
    """What a step of this model needs beside the images, random numbers included."""
    found = {"noise": torch.rand(len(imgs), LENGTH)}
    if model.config.objective == "diffusion":
        found["drawn"] = model.draw(imgs)
    if "tokens" in (model.config.inputs, model.config.objective):
        found["codes"] = codes(len(imgs))
    return found


@each_objective
def test_gradients_reach_every_parameter(options):
    model, imgs = small(**options), images()
    loss, _ = model(imgs, **arguments(model, imgs))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_fixed_positions_are_not_trained():
    model = small(positions="sincos")
    model(images())[0].backward()
    frozen = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert frozen == {"pos_embed"}


@each_objective
def test_loss_stays_float32_under_autocast(options):
    model, imgs = small(**options), images()
    extra = arguments(model, imgs)
    expected, _ = model(imgs, **extra)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, pred = model(imgs, **extra)
    assert loss.dtype == pred.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)
    if model.config.prediction == "x0" and model.config.objective != "tokens":
        # Arithmetic in bfloat16 that was cast at the end would be off by 1e-3.
        again = (pred - model.targets(imgs)).square().mean()
        torch.testing.assert_close(loss, again, rtol=1e-6, atol=0)
    loss.backward()
    assert model.norm.weight.grad.isfinite().all()


@each_objective
def test_a_step_down_the_gradient_lowers_the_loss(options):
    model, imgs = small(**options), images()
    extra = arguments(model, imgs)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    before = model(imgs, **extra)[0]
    before.backward()
    optimizer.step()
    assert model(imgs, **extra)[0] < before


# Random numbers of diffusion.


def test_noise_follows_torch():
    model, imgs = small(objective="diffusion"), images()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(imgs)[0])
        torch.manual_seed(seed)
        assert torch.equal(model(imgs, drawn=model.draw(imgs))[0], losses[-1])
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[1], losses[2])


def test_noise_fits_images_of_any_size():
    gamma, noise = small(objective="diffusion").draw(images(2, (32, 24)))
    assert (gamma.shape, noise.shape) == ((2, 8), (2, 8, VALUES))


# The decoder of two tokens.


@pytest.mark.parametrize("second", [False, True])
def test_pair_block_is_that_of_timm(second):
    make = partial(Block, 48, 3, 4.0, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    expected = perturbed(make())
    block = PairBlock(48, 3, 4.0, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    block.load_state_dict(expected.state_dict(), strict=True)
    pairs = torch.randn(2, 5, 2, 48)
    outputs, gradients = [], []
    for module in (block, expected):
        x = pairs.clone().requires_grad_()
        if module is block:
            y = module(x, second=second)
        else:
            y = module(x.flatten(0, 1)).unflatten(0, (2, 5))[:, :, int(second) :]
        assert y.shape == (2, 5, 2 - second, 48)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        outputs.append(y)
        gradients.append(torch.autograd.grad((y * weight).sum(), [x, *module.parameters()]))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-6, atol=2e-6)
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)


def test_pair_decoder_reads_both_tokens():
    decoder, context, noisy = (
        perturbed(PairDecoder(48, 5, 2, 3, 4.0, 9)),
        torch.randn(4, 48),
        torch.randn(4, 9),
    )
    pred = decoder(context, noisy)
    assert pred.shape == (4, 5)
    assert not torch.allclose(decoder(context.flip(0), noisy), pred, atol=1e-2)
    assert not torch.allclose(decoder(context, noisy.flip(0)), pred, atol=1e-2)
    # Every pair is by itself.
    torch.testing.assert_close(decoder(context.flip(0), noisy.flip(0)), pred.flip(0))


# Pictures.


def test_images_of_undoes_the_normalisation():
    model, imgs = small(norm_pix_loss=True), 3 + 0.5 * images()
    torch.testing.assert_close(model.images_of(imgs, model.targets(imgs)), imgs, rtol=0, atol=1e-5)
    assert not torch.allclose(model.images_of(imgs, model.targets(imgs) + 1), imgs, atol=0.1)
    plain = small()
    assert torch.equal(plain.images_of(imgs, plain.targets(imgs)), imgs)
    assert plain.images_of(imgs, plain.targets(imgs).bfloat16()).dtype == torch.float32


# Initial values.


@pytest.mark.parametrize(
    "options", [{"two_stream": True, "positions": "learned"}, {"objective": "diffusion"}], ids=name_of
)
def test_initial_values(options):
    model = create_darl("darl_vit_tiny", depth=1, **options)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_out, fan_in = module.weight.shape[0], module.weight[0].numel()
            bound = math.sqrt(6 / (fan_in + fan_out))
            assert module.weight.abs().max() <= bound, name
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02), name
            assert not module.bias.any(), name
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert not module.bias.any(), name
            assert module.eps == 1e-6, name
    tokens = (
        [model.cls_token, model.query_token, model.pos_embed]
        if options.get("two_stream")
        else [model.cls_token]
    )
    for token in tokens:
        assert token.std().item() == pytest.approx(0.02, rel=0.2)


def test_embeddings_of_entries_start_small():
    model = create_darl("darl_vit_tiny", **SMALL, inputs="tokens", vocabulary=1000)
    assert model.patch_embed.embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)


# Odd inputs.


@each_objective
def test_images_of_any_layout_and_number(options):
    model, imgs = small(**options).eval(), images(3)
    extra = arguments(model, imgs)
    loss, pred = model(imgs, **extra)
    backwards = torch.empty(60, 24, 3, 3).permute(2, 3, 1, 0).copy_(imgs)
    for other in (imgs.to(memory_format=torch.channels_last), backwards):
        assert not other.is_contiguous()
        again = model(other, **extra)
        torch.testing.assert_close(again[0], loss)
        torch.testing.assert_close(again[1], pred, rtol=1e-4, atol=1e-4)
    if "drawn" in extra:
        gamma, noise = extra["drawn"]
        extra["drawn"] = gamma[1:2], noise[1:2]
    extra |= {key: value[1:2] for key, value in extra.items() if key != "drawn"}
    loss, alone = model(imgs[1:2], **extra)
    assert loss.isfinite()
    torch.testing.assert_close(alone[0], pred[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("order", "two_stream"), [*((order, False) for order in ORDERS[:-1]), ("raster", True), ("random", True)]
)
@each_place
def test_a_single_patch_is_predicted_from_the_start_alone(positions, order, two_stream):
    model = small(img_size=(8, 12), positions=positions, two_stream=two_stream, order=order)
    loss, pred = model(images(2, (8, 12)))
    assert loss.isfinite()
    assert pred.shape == (2, 1, VALUES)
    assert torch.equal(pred[0], pred[1])
    assert model.features(images(2, (8, 12))).shape == (2, 2, 48)


def test_a_batch_without_images_has_no_loss():
    loss, pred = small()(images(0))
    assert pred.shape == (0, LENGTH, VALUES)
    assert loss.isnan()


@pytest.mark.parametrize("in_chans", [1, 4])
def test_any_number_of_channels(in_chans):
    imgs = torch.randn(2, in_chans, 24, 60)
    for objective in ("mse", "diffusion"):
        loss, pred = small(in_chans=in_chans, objective=objective)(imgs)
        assert loss.isfinite()
        assert pred.shape == (2, LENGTH, 96 * in_chans)


# Errors.


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"img_size": (24, 50)}, r"img_size must be divisible by patch_size, got \(24, 50\) and \(8, 12\)"),
        ({"img_size": (24, 60, 3)}, "img_size must be a positive number or two"),
        ({"patch_size": 0}, "patch_size must be a positive number or two, got 0"),
        ({"embed_dim": 50}, "^embed_dim must be divisible by num_heads 3, got 50"),
        ({"embed_dim": 54}, "^embed_dim must be divisible by 4 for its positions, got 54"),
        ({"depth": 0}, "^depth must be at least 1, got 0"),
        ({"num_heads": 0}, "^num_heads must be at least 1, got 0"),
        ({"num_heads": 8}, "a head's width must be divisible by 4 for rope2d, got 6"),
        ({"num_heads": 8, "positions": "rope1d"}, "a head's width must be divisible by 4 for rope1d, got 6"),
        ({"positions": "rope3d"}, "positions: expected one of none, sincos, .*, rope2d, got 'rope3d'"),
        ({"order": "spiral"}, "order: expected one of raster, nested, .*, random, got 'spiral'"),
        ({"order": "nested", "order_block": 0}, "order_block: expected at least 1, got 0"),
        ({"objective": "mae"}, "objective: expected one of mse, diffusion, tokens, got 'mae'"),
        ({"decoder": "conv"}, "decoder: expected one of .*mlp, transformer, got 'conv'"),
        ({"prediction": "v"}, "prediction: expected one of x0, epsilon, got 'v'"),
        ({"inputs": "words"}, "inputs: expected one of pixels, tokens, got 'words'"),
        ({"decoder": "transformer"}, 'decoder: "transformer" denoises patches; expected "mlp" for mse'),
        ({"decoder": "transformer", "objective": "tokens"}, 'expected "mlp" for tokens'),
        ({"decoder_depth": -1}, "decoder_depth: expected at least 0 for mlp, got -1"),
        (
            {"objective": "diffusion", "decoder_depth": 0},
            "decoder_depth: expected at least 1 for transformer, got 0",
        ),
        ({"order": "random"}, 'order: "random" needs two_stream'),
        ({"order": "random", "two_stream": True, "positions": "none"}, "needs two_stream and positions"),
        ({"rope_temperature": 0.0}, "rope_temperature: expected a finite number above 0, got 0.0"),
        ({"objective": "tokens", "vocabulary": 7, "norm_pix_loss": True}, "norm_pix_loss: expected False"),
        ({"gamma": (0.0, 1.0)}, r"gamma: expected two finite numbers above 0, got \(0\.0, 1\.0\)"),
        ({"gamma": (1.0, math.inf)}, "gamma: expected two finite numbers above 0"),
        ({"gamma": (1.0, math.nan)}, "gamma: expected two finite numbers above 0"),
        ({"gamma": (1.0,)}, "gamma: expected two finite numbers above 0"),
        ({"gamma": (1.0, 1.0, 1.0)}, "gamma: expected two finite numbers above 0"),
        ({"objective": "tokens"}, "vocabulary: expected at least 2 entries for tokens, got None"),
        ({"inputs": "tokens", "vocabulary": 1}, "vocabulary: expected at least 2 entries for tokens, got 1"),
        (
            {"inputs": "tokens", "vocabulary": -3},
            "vocabulary: expected at least 2 entries for tokens, got -3",
        ),
    ],
)
def test_arguments_are_checked(overrides, message):
    with pytest.raises(ValueError, match=message):
        create_darl("darl_vit_tiny", **{**SMALL, **overrides})


def test_a_headwidth_of_six_serves_absolute_positions():
    for positions in ("none", "sincos", "learned"):
        loss, _ = create_darl("darl_vit_tiny", **{**SMALL, "num_heads": 8, "positions": positions})(images())
        assert loss.isfinite()


@pytest.mark.parametrize("shape", [(2, 1, 24, 60), (3, 24, 60), (2, 3, 24)])
def test_images_have_channels(shape):
    model, imgs = small(objective="diffusion"), torch.zeros(shape)
    calls = (
        model,
        model.features,
        model.draw,
        partial(model.contexts, order=model.places),
        partial(model.images_of, patches=torch.zeros(2, LENGTH, VALUES)),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"expected images of shape \[B, 3, H, W\], got \[") as error:
            call(imgs)
        assert str(list(shape)) in str(error.value)


@pytest.mark.parametrize("shape", [(2, 3, 60, 24), (2, 3, 20, 60), (2, 3, 24, 50), (2, 3, 0, 60)])
def test_images_can_be_cut_into_patches(shape):
    model = small(objective="diffusion")
    for call in (model, model.features, model.draw):
        with pytest.raises(
            ValueError, match="expected images whose sides are multiples of 8 and 12, got"
        ) as error:
            call(torch.zeros(shape))
        assert str(list(shape)) in str(error.value)


@pytest.mark.parametrize("shape", [(1, LENGTH), (2, LENGTH + 1), (LENGTH,), (2, LENGTH, 1)])
def test_noise_is_checked(shape):
    with pytest.raises(ValueError, match=rf"expected noise of shape \[2, {LENGTH}\], got \["):
        small(order="random", two_stream=True)(images(), noise=torch.rand(shape))


@pytest.mark.parametrize("shape", [None, (1, LENGTH), (2, LENGTH + 1), (LENGTH,), (2, LENGTH, 1)])
@pytest.mark.parametrize(
    "options", [{"objective": "tokens"}, {"inputs": "tokens"}, {"objective": "tokens", "inputs": "tokens"}],
    ids=name_of,
)  # fmt: skip
def test_codes_are_checked(options, shape):
    entries = None if shape is None else torch.zeros(shape, dtype=torch.long)
    with pytest.raises(ValueError, match=rf"codes: expected a tensor of shape \[2, {LENGTH}\], got") as error:
        small(vocabulary=7, **options)(images(), codes=entries)
    assert str(None if shape is None else list(shape)) in str(error.value)


@pytest.mark.parametrize("shape", [(2, LENGTH, VALUES + 1), (2, LENGTH - 1, VALUES)])
def test_predicted_patches_are_checked(shape):
    with pytest.raises(ValueError, match=rf"expected patches of shape \[2, {LENGTH}, {VALUES}\], got \["):
        small().images_of(images(), torch.zeros(shape))


def test_causal_features_need_an_order():
    with pytest.raises(ValueError, match='features: expected is_causal=False for the order "random"'):
        small(order="random", two_stream=True).features(images(), is_causal=True)


def test_models_by_name():
    names = [f"darl_vit_{size}" for size in ("tiny", "small", "base", "large", "huge")]
    assert list(SIZES) == names
    model = create_darl("darl_vit_tiny", img_size=32, patch_size=8, depth=1, objective="diffusion")
    assert (model.patch_embed.grid_size, len(model.blocks)) == ((4, 4), 1)
    assert (model.blocks[0].attn.num_heads, model.norm.weight.shape) == (3, (192,))
    assert isinstance(model.decoder, PairDecoder)
    assert len(model.decoder.blocks) == 1
    with pytest.raises(ValueError, match=r"unknown model 'vit_base', expected one of darl_vit_tiny, .*_huge"):
        create_darl("vit_base")
    with pytest.raises(
        ValueError, match="unknown argument 'depht' for darl_vit_tiny, expected some of config, img_size, "
    ):
        create_darl("darl_vit_tiny", depht=3)


# Decorrelated layers.

BLOCK_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def expected_layers(depth: int, decoder_depth: int, decoder_layers: tuple = BLOCK_LAYERS) -> set[str]:
    return {
        "patch_embed.proj",
        *(f"blocks.{i}.{layer}" for i in range(depth) for layer in BLOCK_LAYERS),
        *(f"decoder.blocks.{i}.{layer}" for i in range(decoder_depth) for layer in decoder_layers),
    }


CONVERTED = [
    ({}, expected_layers(2, 0)),
    ({"decoder_depth": 1}, expected_layers(2, 1, BLOCK_LAYERS[2:])),
    ({"objective": "diffusion", "decoder_depth": 2}, expected_layers(2, 2)),
    ({"objective": "diffusion", "order": "random", "two_stream": True}, expected_layers(2, 1)),
]


def step(model: DARL, optimizer: torch.optim.Optimizer, imgs: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss, _ = model(imgs, torch.rand(2, LENGTH))
    loss.backward()
    optimizer.step()
    return loss


@pytest.mark.parametrize(("options", "names"), CONVERTED, ids=name_of)
def test_decorrelated_layers(options, names):
    model, imgs = small(**options), images()
    extra = arguments(model, imgs)
    expected, keys = model(imgs, **extra), list(model.state_dict())
    assert convert(model, sites="all") is model
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Decorrelated)}
    assert layers.keys() == names
    for found, wanted in zip(model(imgs, **extra), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)

    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    decor = decor_sgd(model, eta=0.05, sample=1.0)
    for _ in range(2):
        assert step(model, optimizer, imgs).isfinite()
        decor.step()
    for name, layer in layers.items():
        assert not torch.equal(layer.R, torch.eye(len(layer.R))), name

    # Fused, it is a stock model of the same function, and its encoder is timm's.
    expected = model(imgs, **extra)
    features = model.features(imgs)
    assert dbpkern.fuse(model) is model
    assert not any(isinstance(m, Decorrelated) for m in model.modules())
    assert list(model.state_dict()) == keys
    for found, wanted in zip(model(imgs, **extra), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    vit = timm_rope_vit(**SMALL)
    vit.load_state_dict(model.encoder_state_dict(), strict=True)
    torch.testing.assert_close(vit.forward_features(imgs), features, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("options", "names"), CONVERTED, ids=name_of)
def test_preconditioned_layers(options, names):
    model, imgs = small(**options), images()
    extra = arguments(model, imgs)
    expected, keys = model(imgs, **extra), list(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    decor = preconditioner(model, optimizer, rank=None, sample=1.0, every=1)
    assert decor.layers.keys() == names
    assert list(model.state_dict()) == keys
    for found, wanted in zip(model(imgs, **extra), expected, strict=True):
        assert torch.equal(found, wanted)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(2):
        assert step(model, optimizer, imgs).isfinite()
    for name, layer in decor.layers.items():
        assert not torch.equal(layer.dense_R(), torch.eye(len(layer.dense_R()))), name
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert not torch.equal(parameter, before[name]), name
