"""From an encoder to a classifier: files, positions, read-outs, causal masks, models of timm."""

import argparse
from pathlib import Path

import pytest
import torch
from runs import ARCHITECTURE, SIZES
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import nn

from models import classifier, darl, mae
from models.classifier import Architecture, create_vit, load_encoder, to_classifier
from models.darl_order import patch_order
from train import pretrain
from train.tasks.families import task_of


def exported(folder: Path, **options) -> tuple[darl.DARL, Path]:
    """A DARL model with random weights, and the file that a run would leave of it."""
    config = pretrain.Config("", "darl_vit_tiny", model_args=SIZES, img_size=32, seed=3)
    for name, value in options.items():
        setattr(config.darl, name, value)
    task = task_of(config)
    model = task.build().eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False).add_(0.1 * torch.randn_like(parameter))
    path = folder / "encoder.safetensors"
    path.write_bytes(task.exports(model)["encoder.safetensors"])
    return model, path


@pytest.mark.parametrize("positions", darl.POSITIONS)
@pytest.mark.parametrize("order", ["raster", "nested", "fixed"])
@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
def test_every_darl_encoder_becomes_a_plain_vit(tmp_path, positions, order, size):
    model, path = exported(tmp_path, positions=positions, order=order, rope_temperature=30.0)
    loaded = load_encoder(path)
    if order == "fixed" and size != (32, 32):
        with pytest.raises(
            ValueError, match=r'readout: the order "fixed" is one of the patches of \(32, 32\)'
        ):
            to_classifier(loaded.model, loaded.architecture, 5, "last", img_size=size, causal=True)
        return
    to_classifier(loaded.model, loaded.architecture, 5, "last", img_size=size, causal=True)
    vit = loaded.model.eval()
    imgs = torch.randn(2, 3, *size)
    if positions == "sincos" and size != (32, 32):
        # timm resamples what DARL computes anew.
        table = resample_abs_pos_embed(model.pos_embed, (6, 4), (4, 4))
        torch.testing.assert_close(vit.pos_embed, table)
        return
    torch.testing.assert_close(vit.forward_features(imgs), model.features(imgs))
    seen = vit.forward_features(imgs, attn_mask=vit.attn_mask)
    places = model.order_of((size[0] // 8, size[1] // 8), None, imgs)
    expected = model.features(imgs, is_causal=True)
    torch.testing.assert_close(seen[:, 1 + places], expected[:, 1:])
    torch.testing.assert_close(seen[:, 0], expected[:, 0])
    # The mask is part of what a call computes.
    torch.testing.assert_close(vit(imgs), vit.head(seen[:, 1 + places[-1]]))


def test_read_outs_are_what_they_say(tmp_path):
    model, path = exported(tmp_path, order="nested")
    imgs = torch.randn(2, 3, 32, 32)
    made = {}
    for readout in classifier.READOUTS:
        loaded = load_encoder(path)
        to_classifier(loaded.model, loaded.architecture, 5, readout)
        nn.init.normal_(loaded.model.head.weight)
        made[readout] = loaded.model.eval()
    tokens = model.features(imgs)
    before = []
    model.norm.register_forward_pre_hook(lambda _, args: before.append(args[0]))
    model.features(imgs)
    last = 1 + patch_order("nested", (4, 4))[-1]
    expected = {
        "class": tokens[:, 0],
        "last": tokens[:, last],
        "mean": nn.functional.layer_norm(before[0][:, 1:].mean(1), (32,), eps=1e-6),
    }
    for readout, vit in made.items():
        torch.testing.assert_close(vit(imgs), vit.head(expected[readout]))
        assert vit(imgs).shape == (2, 5)
    assert isinstance(made["mean"].norm, nn.Identity)
    assert isinstance(made["last"].fc_norm, nn.Identity)


def test_the_last_of_raster_order_is_the_last_patch():
    vit = create_vit(ARCHITECTURE)
    to_classifier(vit, ARCHITECTURE, 5, "last")
    imgs = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(vit(imgs), vit.head(vit.forward_features(imgs)[:, -1]))


def test_a_layer_in_the_middle_is_the_pretraining_models_block(tmp_path):
    model, path = exported(tmp_path)
    loaded = load_encoder(path)
    architecture = to_classifier(loaded.model, loaded.architecture, 5, "mean", layer=1)
    after = []
    model.blocks[0].register_forward_hook(lambda _, args, output: after.append(output))
    imgs = torch.randn(2, 3, 32, 32)
    model.features(imgs)
    pooled = nn.functional.layer_norm(after[0][:, 1:].mean(1), (32,), eps=1e-6)
    torch.testing.assert_close(loaded.model(imgs), loaded.model.head(pooled))
    assert architecture.sizes["depth"] == 1


@pytest.mark.parametrize("parts", ["all", "encoder"])
def test_checkpoints_of_facebookresearch_mae(tmp_path, parts):
    model = mae.create_mae("mae_vit_tiny", img_size=32, decoder_embed_dim=16, decoder_depth=1, **SIZES).eval()
    weights = model.state_dict() if parts == "all" else model.encoder_state_dict()
    path = tmp_path / "mae_pretrain.pth"
    torch.save({"model": weights, "args": argparse.Namespace(lr=1)}, path)
    loaded = load_encoder(path, model="mae_vit_tiny", sizes=SIZES)
    assert loaded.architecture.img_size == (32, 32)
    imgs = torch.randn(2, 3, 32, 32)
    expected, _, _ = model.forward_encoder(imgs, 0.0, torch.arange(16.0).expand(2, -1))
    torch.testing.assert_close(loaded.model.eval().forward_features(imgs), expected)


def test_models_of_timm_by_name():
    for name, readout, norm in (
        ("vit_tiny_patch16_224", "mean", "fc_norm"),
        ("vit_tiny_patch16_224", "last", "norm"),
        ("vit_small_patch16_rope_224", "class", "norm"),
        ("vit_medium_patch16_reg4_gap_256", "mean", "fc_norm"),
        ("vit_medium_patch16_reg4_gap_256", "last", "norm"),
    ):
        architecture = Architecture(f"timm:{name}", 32)
        vit = create_vit(architecture, drop_path=0.1)
        to_classifier(vit, architecture, 5, readout)
        assert vit(torch.randn(2, 3, 32, 32)).shape == (2, 5)
        assert isinstance(getattr(vit, norm), nn.LayerNorm)
        assert isinstance(getattr(vit, {"norm": "fc_norm", "fc_norm": "norm"}[norm]), nn.Identity)
    with pytest.raises(ValueError, match="has no class token"):
        to_classifier(vit, architecture, 5, "class")


def test_a_start_token_that_sees_nothing_is_no_read_out():
    architecture = Architecture("darl_vit_tiny", 32, SIZES)
    with pytest.raises(ValueError, match="readout: the start token sees no patch if causal"):
        to_classifier(create_vit(architecture), architecture, 5, "class", causal=True)
    for name, message in (
        ("nonsense", "timm cannot build 'nonsense'"),
        ("resnet18", "timm cannot build 'resnet18'.*img_size"),
        ("swin_tiny_patch4_window7_224", "expected timm's VisionTransformer or Eva, got SwinTransformer"),
    ):
        with pytest.raises(ValueError, match=message):
            create_vit(Architecture(f"timm:{name}", 224 if "swin" in name else 32))


def test_encoders_that_cannot_be_used_say_why(tmp_path):
    _, path = exported(tmp_path)
    weights = load_file(path)
    for about, message in (
        ({"model": "darl_vit_tiny", "img_size": "32"}, "order, order_block, .*positions.* missing"),
        ({"model": "mae_vit_tiny", "img_size": "32", "inputs": "tokens"}, "reads pixels, got one for tokens"),
        ({"model": "mae_vit_tiny", "img_size": "32"}, "does not fit the model: .*missing"),
    ):
        save_file(weights, tmp_path / "other.safetensors", metadata=about)
        with pytest.raises(ValueError, match=message):
            load_encoder(tmp_path / "other.safetensors")
    _, path = exported(tmp_path, order="random", two_stream=True)
    loaded = load_encoder(path)
    for readout, causal in (("last", False), ("mean", True)):
        with pytest.raises(ValueError, match='order "random"'):
            to_classifier(loaded.model, loaded.architecture, 5, readout, causal=causal)
    to_classifier(loaded.model, loaded.architecture, 5, "mean")
