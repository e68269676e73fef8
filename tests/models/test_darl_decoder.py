"""The decoders of DARL, and diffusion from its definition, with its random numbers."""

import math
from functools import partial

import pytest
import torch
from darls import LENGTH, VALUES, images, name_of, patch_of, perturbed, small
from timm.models.vision_transformer import Block
from torch import nn

from models import diffusion
from models.darl import DARL
from models.darl_decoder import PairBlock, PairDecoder
from models.vit import patchify

# The MLP decoder.


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


# Diffusion.

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
