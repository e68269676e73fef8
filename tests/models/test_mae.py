"""The masked autoencoder against its definition, timm's ViT and the names of the released checkpoints."""

import argparse
import math
import pickle

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models import mae
from models.mae import DECODERS, MaskedAutoencoder, create_mae, load_mae_checkpoint
from models.vit import sincos_positions

# A grid of 3 by 5 patches: nothing is square, so swapped axes do not go unnoticed.
SMALL = {
    "img_size": (24, 60),
    "patch_size": (8, 12),
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "decoder_embed_dim": 32,
    "decoder_depth": 2,
    "decoder_num_heads": 4,
}
GRID, LENGTH, VALUES = (3, 5), 15, 8 * 12 * 3

# Blocks and widths of encoder and decoder, patch size and timm's name.
RELEASED = {
    "mae_vit_tiny": (12, 192, 16, "vit_tiny_patch16_224"),
    "mae_vit_small": (12, 384, 16, "vit_small_patch16_224"),
    "mae_vit_base": (12, 768, 16, "vit_base_patch16_224"),
    "mae_vit_large": (24, 1024, 16, "vit_large_patch16_224"),
    "mae_vit_huge": (32, 1280, 14, "vit_huge_patch14_224"),
}


def small(**overrides) -> MaskedAutoencoder:
    return MaskedAutoencoder(**{**SMALL, **overrides})


def perturbed(model: nn.Module) -> nn.Module:
    """Move every trained tensor off its initial value, so that no bias or scale is trivial."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *SMALL["img_size"])


def patch_of(imgs: torch.Tensor, index: int) -> torch.Tensor:
    """Cut patch `index` out of images: [B, C, 8, 12]."""
    row, column = divmod(index, GRID[1])
    return imgs[:, :, 8 * row : 8 * row + 8, 12 * column : 12 * column + 12]


def inputs_of(module: nn.Module) -> list[torch.Tensor]:
    """Record what a module is called with."""
    seen = []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    return seen


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# Names, shapes and initial values.


def layer_shapes(prefix: str, out: int, inp: int) -> dict[str, tuple]:
    return {f"{prefix}.weight": (out, inp), f"{prefix}.bias": (out,)}


def norm_shapes(prefix: str, dim: int) -> dict[str, tuple]:
    return {f"{prefix}.weight": (dim,), f"{prefix}.bias": (dim,)}


def block_shapes(prefix: str, depth: int, dim: int) -> dict[str, tuple]:
    shapes = {}
    for i in range(depth):
        shapes |= norm_shapes(f"{prefix}.{i}.norm1", dim) | norm_shapes(f"{prefix}.{i}.norm2", dim)
        shapes |= layer_shapes(f"{prefix}.{i}.attn.qkv", 3 * dim, dim)
        shapes |= layer_shapes(f"{prefix}.{i}.attn.proj", dim, dim)
        shapes |= layer_shapes(f"{prefix}.{i}.mlp.fc1", 4 * dim, dim)
        shapes |= layer_shapes(f"{prefix}.{i}.mlp.fc2", dim, 4 * dim)
    return shapes


@pytest.mark.parametrize(("decoder", "decoder_depth"), [("mae", 8), ("dbp", 2)])
@pytest.mark.parametrize("name", RELEASED)
def test_names_and_shapes_of_the_released_checkpoints(name, decoder, decoder_depth):
    depth, dim, patch, _ = RELEASED[name]
    tokens = (224 // patch) ** 2 + 1
    expected = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, tokens, dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
        **block_shapes("blocks", depth, dim),
        **norm_shapes("norm", dim),
        **layer_shapes("decoder_embed", 512, dim),
        "mask_token": (1, 1, 512),
        "decoder_pos_embed": (1, tokens, 512),
        **block_shapes("decoder_blocks", decoder_depth, 512),
        **norm_shapes("decoder_norm", 512),
        **layer_shapes("decoder_pred", patch * patch * 3, 512),
    }
    with torch.device("meta"):
        model = getattr(mae, name)(decoder=decoder)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected
    assert {block.attn.num_heads for block in model.decoder_blocks} == {16}


@pytest.mark.parametrize("name", RELEASED)
def test_encoder_loads_into_timm(name):
    with torch.device("meta"):
        model = create_mae(name)
        vit = timm.create_model(RELEASED[name][-1], num_classes=0)
    vit.load_state_dict(model.encoder_state_dict(), strict=True, assign=True)
    assert model.blocks[0].attn.num_heads == vit.blocks[0].attn.num_heads


def test_encoder_state_dict_is_a_contiguous_copy():
    model = small().to(memory_format=torch.channels_last)
    assert not model.patch_embed.proj.weight.is_contiguous()
    state = model.encoder_state_dict()
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in state.values())
    before = model.cls_token.detach().clone()
    state["cls_token"].add_(1)
    assert torch.equal(model.cls_token, before)


def test_initial_values():
    model = create_mae("mae_vit_tiny", depth=1, decoder_depth=1)
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
    for token in (model.cls_token, model.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.2)


def test_overrides_reach_the_model():
    model = create_mae("mae_vit_tiny", "dbp", img_size=32, patch_size=8, depth=1, decoder_embed_dim=64)
    assert model.patch_embed.grid_size == (4, 4)
    assert (len(model.blocks), len(model.decoder_blocks)) == (1, 2)
    assert model.decoder_embed.out_features == 64
    assert not model.norm_pix_loss
    assert mae.mae_vit_tiny(img_size=32, norm_pix_loss=True, depth=1, decoder="dbp").norm_pix_loss


# Positions.


@pytest.mark.parametrize(("grid", "dim"), [((3, 5), 16), ((14, 14), 24), ((1, 2), 4)])
def test_positions_from_the_definition(grid, dim):
    positions = sincos_positions(grid, dim)
    height, width = grid
    quarter = dim // 4
    assert positions.shape == (1, 1 + height * width, dim)
    assert positions.dtype == torch.float32
    assert not positions[0, 0].any()
    for h in range(height):
        for w in range(width):
            for i in range(quarter):
                scale = 10000 ** (i / quarter)
                row = positions[0, 1 + h * width + w]
                expected = [
                    math.sin(w / scale),
                    math.cos(w / scale),
                    math.sin(h / scale),
                    math.cos(h / scale),
                ]
                assert row[i::quarter].tolist() == pytest.approx(expected, abs=1e-7)


def test_positions_are_fixed():
    model = small()
    for parameter, dim in ((model.pos_embed, 48), (model.decoder_pos_embed, 32)):
        assert not parameter.requires_grad
        assert torch.equal(parameter, sincos_positions(GRID, dim))


# Patches.


def test_patch_order_is_row_column_channel():
    imgs = images()
    patches = small().patchify(imgs)
    assert patches.shape == (2, LENGTH, VALUES)
    for index in range(LENGTH):
        patch = patch_of(imgs, index)
        for row, column, channel in [(0, 0, 0), (0, 0, 2), (0, 7, 1), (5, 0, 0), (7, 11, 2)]:
            value = patches[:, index, (row * 12 + column) * 3 + channel]
            assert torch.equal(value, patch[:, channel, row, column])


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_unpatchify_inverts_patchify(in_chans):
    model = small(in_chans=in_chans)
    imgs = torch.randn(2, in_chans, *SMALL["img_size"])
    assert torch.equal(model.unpatchify(model.patchify(imgs)), imgs)
    loss, pred, _ = model(imgs)
    assert loss.isfinite()
    assert model.unpatchify(pred).shape == imgs.shape


# Masking.


def test_masks_are_uniform_and_of_exact_size():
    tokens = torch.zeros(4000, LENGTH, 1)
    _, mask, _ = small().random_masking(tokens, 0.75)
    assert ((mask == 0) | (mask == 1)).all()
    assert (mask.sum(dim=1) == LENGTH - 3).all()  # int(15 / 4) = 3 are kept
    # The frequency of a patch among 4000 masks has a standard deviation of 0.0063.
    assert mask.mean(dim=0).sub(12 / 15).abs().max() < 0.035
    assert len(mask.unique(dim=0)) > 400  # of the 455 possible


def test_noise_decides_the_mask():
    noise = torch.rand(2, LENGTH)
    tokens = torch.arange(2 * LENGTH).reshape(2, LENGTH, 1)
    kept, mask, ids_restore = small().random_masking(tokens, 0.6, noise)
    assert kept.shape == (2, 6, 1)
    for b in range(2):
        smallest = sorted(range(LENGTH), key=noise[b].tolist().__getitem__)
        assert kept[b, :, 0].tolist() == [b * LENGTH + i for i in smallest[:6]]
        assert [i for i in range(LENGTH) if mask[b, i] == 0] == sorted(smallest[:6])
        assert [smallest[place] for place in ids_restore[b].tolist()] == list(range(LENGTH))


def test_masks_repeat_with_noise_or_seed_and_differ_without():
    model, imgs, noise = small(), images(), torch.rand(2, LENGTH)
    first, second = model(imgs, noise=noise), model(imgs, noise=noise)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    masks = [model(imgs)[2] for _ in range(4)]
    assert any(not torch.equal(masks[0], mask) for mask in masks[1:])
    torch.manual_seed(3)
    seeded = model(imgs)[2]
    torch.manual_seed(3)
    assert torch.equal(model(imgs)[2], seeded)


def test_encoder_blocks_see_fifty_tokens():
    model = create_mae("mae_vit_tiny", depth=1, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    encoder, decoder = inputs_of(model.blocks[0]), inputs_of(model.decoder_blocks[0])
    _, pred, mask = model(torch.randn(1, 3, 224, 224))
    assert [x.shape for x in encoder] == [(1, 50, 192)]
    assert [x.shape for x in decoder] == [(1, 197, 32)]
    assert pred.shape == (1, 196, 768)
    assert mask.sum() == 147


def test_removed_patches_do_not_reach_the_encoder():
    model, imgs, noise = perturbed(small()), images(), torch.rand(2, LENGTH)
    latent, mask, _ = model.forward_encoder(imgs, 0.75, noise)
    removed = model.unpatchify(mask.unsqueeze(-1).expand(-1, -1, VALUES))
    other, _, _ = model.forward_encoder(imgs + removed, 0.75, noise)
    assert torch.equal(latent, other)
    other, _, _ = model.forward_encoder(imgs + (1 - removed), 0.75, noise)
    assert not torch.allclose(latent, other, atol=1e-2)


# Encoder and decoder.


def test_unmasked_encoder_is_timm_vit():
    model, imgs, noise = perturbed(small()), images(), torch.rand(2, LENGTH)
    keys = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
    vit = VisionTransformer(num_classes=0, **{key: SMALL[key] for key in keys})
    vit.load_state_dict(model.encoder_state_dict(), strict=True)
    expected = vit.forward_features(imgs)

    latent, mask, ids_restore = model.forward_encoder(imgs, 0.0, noise)
    assert not mask.any()
    torch.testing.assert_close(latent[:, 0], expected[:, 0])
    for b in range(2):
        torch.testing.assert_close(latent[b, 1:][ids_restore[b]], expected[b, 1:])


def test_decoder_puts_every_token_in_its_place():
    model = perturbed(small())
    model.decoder_blocks = nn.Identity()  # the tokens stay apart
    latent, mask, ids_restore = model.forward_encoder(images(), 0.75)
    pred = model.forward_decoder(latent, ids_restore)
    assert pred.shape == (2, LENGTH, VALUES)
    embedded = model.decoder_embed(latent)
    for b in range(2):
        for i in range(LENGTH):
            token = model.mask_token[0, 0] if mask[b, i] else embedded[b, 1 + ids_restore[b, i]]
            token = token + model.decoder_pos_embed[0, 1 + i]
            torch.testing.assert_close(pred[b, i], model.decoder_pred(model.decoder_norm(token)))


def test_prediction_depends_on_the_visible_patches():
    model, imgs, noise = perturbed(small()), images(), torch.rand(2, LENGTH)
    _, pred, _ = model(imgs, noise=noise)
    assert pred.shape == (2, LENGTH, VALUES)
    _, other, _ = model(imgs.flip(0), noise=noise)
    assert not torch.allclose(pred, other, atol=1e-2)


# Loss.


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_loss_from_the_definition(norm_pix_loss):
    model = small(norm_pix_loss=norm_pix_loss)
    # Contrast close to the 1e-6 under the root, so that leaving it out is noticed.
    imgs = 0.5 + 2e-3 * images()
    loss, pred, mask = model(imgs)
    total, count = 0.0, 0
    for b in range(2):
        for i in range(LENGTH):
            if mask[b, i] == 0:
                continue
            target = patch_of(imgs, i)[b].permute(1, 2, 0).flatten().double()
            if norm_pix_loss:
                mean = target.sum() / VALUES
                var = (target - mean).square().sum() / (VALUES - 1)
                target = (target - mean) / math.sqrt(var + 1e-6)
            total += ((pred[b, i].double() - target) ** 2).sum().item() / VALUES
            count += 1
    assert count == mask.sum()
    assert loss.shape == ()
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_variance_of_the_target_is_unbiased():
    model = small(img_size=4, patch_size=2, in_chans=1, norm_pix_loss=True)
    imgs, mask = torch.randn(1, 1, 4, 4), torch.ones(1, 4)
    # The mean square of n values divided by their unbiased deviation is (n - 1) / n, here 3 / 4.
    assert model.forward_loss(imgs, torch.zeros(1, 4, 4), mask).item() == pytest.approx(0.75, rel=1e-4)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_only_removed_patches_count(norm_pix_loss):
    model, imgs = small(norm_pix_loss=norm_pix_loss), images()
    loss, pred, mask = model(imgs)
    kept = (1 - mask).unsqueeze(-1)
    assert torch.equal(model.forward_loss(imgs, pred + 7 * kept, mask), loss)
    assert model.forward_loss(imgs, pred + 7 * (1 - kept), mask) > loss + 40


def test_gradients_reach_every_trained_parameter():
    model = perturbed(small())
    loss, _, _ = model(images(), noise=torch.rand(2, LENGTH))
    loss.backward()
    frozen = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert frozen == {"pos_embed", "decoder_pos_embed"}
    for name, parameter in model.named_parameters():
        if name not in frozen:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_loss_stays_float32_under_autocast(norm_pix_loss):
    model, imgs = small(norm_pix_loss=norm_pix_loss), images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, pred, mask = model(imgs)
    assert pred.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    # Arithmetic in bfloat16 that was cast at the end would be off by 1e-3.
    torch.testing.assert_close(loss, model.forward_loss(imgs, pred.float(), mask), rtol=1e-6, atol=0)
    loss.backward()
    assert model.patch_embed.proj.weight.grad.isfinite().all()


def test_bfloat16_model_has_float32_loss():
    model, imgs = small(norm_pix_loss=True).bfloat16(), images().bfloat16()
    loss, pred, mask = model(imgs)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, model.forward_loss(imgs.float(), pred.float(), mask))


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_compiles_in_one_graph(norm_pix_loss):
    torch._dynamo.reset()
    model = small(norm_pix_loss=norm_pix_loss)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for count, mask_ratio in [(2, 0.75), (3, 0.5)]:
        imgs, noise = images(count), torch.rand(count, LENGTH)
        expected = model(imgs, mask_ratio, noise)
        for a, b in zip(compiled(imgs, mask_ratio, noise), expected, strict=True):
            torch.testing.assert_close(a, b)
    loss, _, mask = compiled(images())
    assert loss.isfinite()
    assert (mask.sum(dim=1) == 12).all()


# Pictures.


def test_reconstruct_undoes_the_normalisation():
    model, imgs = small(norm_pix_loss=True), 3 + 0.5 * images()
    patches = model.patchify(imgs)
    mean, std = patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    pred = ((patches - mean) / std).requires_grad_()
    mask = (torch.rand(2, LENGTH) < 0.75).float()
    picture = model.reconstruct(imgs, pred, mask)
    assert not picture.requires_grad
    torch.testing.assert_close(picture, imgs, rtol=0, atol=1e-5)
    wrong = model.reconstruct(imgs, pred + 1, mask)
    assert not torch.allclose(wrong, imgs, atol=0.1)


def test_reconstruct_mixes_prediction_and_image():
    model, imgs = small(), images()
    _, pred, mask = model(imgs)
    picture = model.reconstruct(imgs, pred, mask)
    for b in range(2):
        for i in range(LENGTH):
            guess = pred[b, i].reshape(8, 12, 3).permute(2, 0, 1)
            expected = guess if mask[b, i] else patch_of(imgs, i)[b]
            assert torch.equal(patch_of(picture, i)[b], expected)


# Checkpoints.


def training_checkpoint(model: MaskedAutoencoder) -> dict:
    """What facebookresearch/mae writes while it trains."""
    loss, _, _ = model(images())
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    loss.backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
        "args": argparse.Namespace(model="mae_vit_base_patch16", blr=1e-3, resume="", betas=(0.9, 0.95)),
    }


def test_training_checkpoint_loads(tmp_path):
    source, target = small(), small()
    torch.save(training_checkpoint(source), tmp_path / "checkpoint-3.pth")
    assert load_mae_checkpoint(target, tmp_path / "checkpoint-3.pth") == []
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name


def test_encoder_checkpoint_leaves_the_decoder_untouched(tmp_path):
    source, target = perturbed(small()), small(decoder_depth=1)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    torch.save({"model": source.encoder_state_dict()}, tmp_path / "encoder.pth")
    untouched = load_mae_checkpoint(target, str(tmp_path / "encoder.pth"))
    assert set(untouched) == {name for name in before if name.startswith(("decoder_", "mask_token"))}
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, before[name] if name in untouched else source.state_dict()[name]), name


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("head.weight", (10, 48), r"head\.weight \(unknown\)"),
        ("blocks.2.norm1.weight", (48,), r"blocks\.2\.norm1\.weight \(unknown\)"),
        ("pos_embed", (1, 17, 48), r"pos_embed \(expected \[1, 16, 48\], got \[1, 17, 48\]\)"),
        ("norm.bias", (1,), r"norm\.bias \(expected \[48\], got \[1\]\)"),
    ],
)
def test_checkpoint_of_another_model_is_refused(tmp_path, name, shape, message):
    model = small()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    weights = perturbed(small()).state_dict() | {name: torch.zeros(shape)}
    torch.save({"model": weights}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message):
        load_mae_checkpoint(model, tmp_path / "other.pth")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"state_dict": {}, "epoch": 1}, r"\['state_dict', 'epoch'\]"),
        ([1, 2], "list"),
        ({"model": 3}, "model"),
    ],
)
def test_checkpoint_without_weights_is_refused(tmp_path, content, found):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"expected a dict of weights under 'model', got .*{found}"):
        load_mae_checkpoint(small(), tmp_path / "other.pth")


class Executed:
    """Pickles to a call, as a malicious file would."""

    def __reduce__(self):
        return (pytest.fail, ("code from the checkpoint was executed",))


def test_checkpoint_is_not_executed(tmp_path):
    model = small()
    torch.save({"model": model.state_dict(), "args": Executed()}, tmp_path / "evil.pth")
    with pytest.raises(pickle.UnpicklingError):
        load_mae_checkpoint(model, tmp_path / "evil.pth")


# Errors.


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"img_size": (24, 50)}, r"img_size must be divisible by patch_size, got \(24, 50\) and \(8, 12\)"),
        ({"img_size": (20, 60)}, "img_size must be divisible by patch_size"),
        ({"img_size": (24, 60, 3)}, "img_size must be a positive number or two"),
        ({"patch_size": 0}, "patch_size must be a positive number or two, got 0"),
        ({"embed_dim": 50}, "^embed_dim must be divisible by num_heads 3, got 50"),
        ({"embed_dim": 54}, "^embed_dim must be divisible by 4 for its positions, got 54"),
        ({"decoder_embed_dim": 34}, "decoder_embed_dim must be divisible by decoder_num_heads 4, got 34"),
        (
            {"decoder_embed_dim": 30, "decoder_num_heads": 3},
            "decoder_embed_dim must be divisible by 4 for its positions, got 30",
        ),
        ({"depth": 0}, "^depth must be at least 1, got 0"),
        ({"decoder_depth": -1}, "decoder_depth must be at least 1, got -1"),
        ({"num_heads": 0}, "^num_heads must be at least 1, got 0"),
        ({"decoder_num_heads": 0}, "decoder_num_heads must be at least 1, got 0"),
    ],
)
def test_sizes_are_checked(overrides, message):
    with pytest.raises(ValueError, match=message):
        small(**overrides)


@pytest.mark.parametrize("mask_ratio", [-0.1, 0.0, 1.0, 1.5, math.nan])
def test_mask_ratio_is_checked(mask_ratio):
    with pytest.raises(ValueError, match=f"mask_ratio must lie .*got {mask_ratio}"):
        small()(images(), mask_ratio)


def test_mask_has_to_keep_and_remove_something():
    model, imgs = small(), images()
    with pytest.raises(ValueError, match=r"mask_ratio 0\.95 keeps none of 15 patches"):
        model(imgs, 0.95)
    with pytest.raises(ValueError, match=r"mask_ratio must lie in \(0, 1\) and remove at least one patch"):
        model(imgs, 1e-20)
    for mask_ratio, kept in [(0.93, 1), (0.01, 14)]:
        loss, _, mask = model(imgs, mask_ratio)
        assert loss.isfinite()
        assert (mask.sum(dim=1) == LENGTH - kept).all()


@pytest.mark.parametrize("shape", [(2, 3, 60, 24), (2, 3, 24, 72), (2, 1, 24, 60), (3, 24, 60), (2, 3, 24)])
def test_images_are_checked(shape):
    model = small()
    for call in (model, model.patchify, model.forward_encoder):
        with pytest.raises(ValueError, match=r"expected images of shape \[B, 3, 24, 60\], got \[") as error:
            call(torch.zeros(shape))
        assert str(list(shape)) in str(error.value)


@pytest.mark.parametrize("shape", [(1, LENGTH), (2, LENGTH + 1), (LENGTH,), (2, LENGTH, 1)])
def test_noise_is_checked(shape):
    with pytest.raises(ValueError, match=rf"expected noise of shape \[2, {LENGTH}\], got \["):
        small()(images(), noise=torch.rand(shape))


@pytest.mark.parametrize("shape", [(2, LENGTH, VALUES + 1), (2, LENGTH - 1, VALUES), (LENGTH, VALUES)])
def test_patches_are_checked(shape):
    with pytest.raises(ValueError, match=rf"expected patches of shape \[B, {LENGTH}, {VALUES}\], got \["):
        small().unpatchify(torch.zeros(shape))


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown model 'vit_base', expected one of mae_vit_tiny, .*_huge"):
        create_mae("vit_base")
    with pytest.raises(ValueError, match="unknown decoder 'tiny', expected one of mae, dbp"):
        create_mae("mae_vit_tiny", decoder="tiny")
    assert list(DECODERS) == ["mae", "dbp"]
