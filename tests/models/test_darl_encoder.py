"""The encoder of DARL: features and weights of timm's ViTs, also with decorrelated layers."""

import pytest
import timm
import torch
from darls import (
    LENGTH,
    SMALL,
    arguments,
    codes,
    each_objective,
    each_order,
    each_place,
    each_position,
    images,
    name_of,
    small,
    timm_rope_vit,
)
from rules import convert, decor_sgd, preconditioner
from timm.models.vision_transformer import VisionTransformer

import dbpkern
from dbpkern.layers.modules import Decorrelated
from models.darl import DARL, SIZES, create_darl

# timm's ViTs with axial RoPE; widths that it lacks are set.
TIMM = {
    "darl_vit_tiny": ("vit_small_patch16_rope_224", {"embed_dim": 192, "num_heads": 3}),
    "darl_vit_small": ("vit_small_patch16_rope_224", {}),
    "darl_vit_base": ("vit_base_patch16_rope_224", {}),
    "darl_vit_large": ("vit_large_patch16_rope_224", {}),
    "darl_vit_huge": ("vit_large_patch16_rope_224", {"patch_size": 14, "embed_dim": 1280, "depth": 32}),
}


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
