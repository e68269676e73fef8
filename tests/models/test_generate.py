"""Generation against the model's own forward, with and without the cache."""

import math

import pytest
import torch

from models import diffusion
from models.darl import DARL, POSITIONS, create_darl
from models.darl_order import patch_order
from models.generate import generate
from models.vit import patchify, unpatchify

# A grid of 3 by 5 patches: nothing is square, so swapped axes do not go unnoticed.
SMALL = {"img_size": (24, 60), "patch_size": (8, 12), "embed_dim": 48, "depth": 2, "num_heads": 3}
GRID, LENGTH, VALUES = (3, 5), 15, 8 * 12 * 3

TOKENS = {"objective": "tokens", "inputs": "tokens", "vocabulary": 7}
ORDERS = [
    {"order": "raster"},
    {"order": "nested", "order_block": 3},
    {"order": "round-robin"},
    {"order": "fixed"},
]
OBJECTIVES = [
    {},
    {"decoder_depth": 1},
    {"objective": "diffusion"},
    {"objective": "diffusion", "decoder": "mlp", "gamma_conditioned": True},
    {"objective": "diffusion", "decoder_depth": 2, "prediction": "epsilon"},
    TOKENS,
]


def small(**overrides) -> DARL:
    """A model none of whose biases or scales is trivial."""
    model = create_darl("darl_vit_tiny", **{**SMALL, **overrides})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(count: int = 2, size: tuple[int, int] = SMALL["img_size"]) -> torch.Tensor:
    return torch.randn(count, 3, *size)


def given(model: DARL, count: int = 2) -> dict:
    """Entries of the vocabulary, for a model that reads them."""
    return {"codes": torch.randint(7, (count, LENGTH))} if model.config.inputs == "tokens" else {}


def parts(model: DARL, made: torch.Tensor) -> torch.Tensor:
    """What was generated, patch by patch in raster order: [B, L, ...]."""
    return made if model.config.inputs == "tokens" else patchify(made, model.patch_embed.patch_size)


def name_of(options: dict) -> str:
    return " ".join(map(str, options.values())) or "default"


each_objective = pytest.mark.parametrize("options", OBJECTIVES, ids=name_of)
each_order = pytest.mark.parametrize("order", ORDERS, ids=name_of)
each_position = pytest.mark.parametrize("positions", POSITIONS)


# The cache.


def check_cache(model: DARL, known: int, **arguments) -> None:
    imgs = images()
    arguments = given(model) | {"known": known, "steps": 2, "seed": 4} | arguments
    cached, anew = (generate(model, imgs, cached=cached, **arguments) for cached in (True, False))
    if model.config.inputs == "tokens":
        assert torch.equal(cached, anew)
    else:
        torch.testing.assert_close(cached, anew, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("two_stream", [False, True])
@each_position
@each_order
def test_cache_gives_the_same_numbers(order, positions, two_stream):
    check_cache(small(positions=positions, two_stream=two_stream, **order), known=2)


@pytest.mark.parametrize("two_stream", [False, True])
@pytest.mark.parametrize("known", [0, 1, 14])
@each_objective
def test_cache_gives_the_same_numbers_from_any_place(options, known, two_stream):
    check_cache(small(two_stream=two_stream, order="nested", **options), known)


@pytest.mark.parametrize("positions", ["none", "sincos", "learned", "rope2d"])
def test_cache_gives_the_same_entries(positions):
    for two_stream in (False, True):
        check_cache(small(positions=positions, two_stream=two_stream, **TOKENS), known=0)


@each_objective
def test_cache_serves_an_order_that_is_given(options):
    model = small(order="random", two_stream=True, **options)
    check_cache(model, known=3, order=torch.randperm(LENGTH))


@pytest.mark.parametrize("two_stream", [False, True])
@pytest.mark.parametrize("known", [0, 6])
def test_with_a_cache_every_token_is_read_once(known, two_stream):
    model, read = small(two_stream=two_stream), []
    model.blocks[1].attn.qkv.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    generate(model, images(), known)
    # First the start token and what is known, then one patch at a time, and a query each time.
    assert read == [1 + known + two_stream] + [1 + two_stream] * (LENGTH - known - 1)
    read.clear()
    generate(model, images(), known, cached=False)
    assert read == [LENGTH * (1 + two_stream)] * (LENGTH - known)


# What is generated.


@pytest.mark.parametrize("two_stream", [False, True])
@each_order
def test_means_are_the_predictions_for_what_was_generated(order, two_stream):
    model, imgs = small(two_stream=two_stream, **order), images()
    made = generate(model, imgs, known=4)
    assert made.shape == imgs.shape
    assert made.dtype == torch.float32
    assert not made.requires_grad
    with torch.no_grad():
        _, pred = model(made)
    new = patch_order(grid_size=GRID, kind=order["order"], block=order.get("order_block", 2))[4:]
    torch.testing.assert_close(parts(model, made)[:, new], pred[:, new], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [None, torch.arange(LENGTH).flip(0)], ids=["own", "given"])
@torch.no_grad()
def test_confident_entries_are_the_likeliest(order):
    model, entries = small(order="nested", **TOKENS), torch.randint(7, (2, LENGTH))
    model.decoder.pred.weight.mul_(1e4)
    made = generate(model, images(), known=4, codes=entries, order=order)
    assert made.dtype == torch.long
    order = model.places if order is None else order
    assert torch.equal(made[:, order[:4]], entries[:, order[:4]])
    best = model.decoder(model.contexts(images(), order, made)).argmax(dim=-1)
    assert torch.equal(made[:, order[4:]], best[:, 4:])
    assert len(made.unique()) > 1


@torch.no_grad()
def test_entries_follow_their_distribution():
    model, imgs, count = small(img_size=(8, 24), **TOKENS), images(1, (8, 24)), 4000
    entries = torch.tensor([[3, 0]])
    many = imgs.expand(count, -1, -1, -1), entries.expand(count, -1)
    made = generate(model, many[0], known=1, codes=many[1])[:, 1]
    chances = model(imgs, codes=entries)[1][0, 1].softmax(dim=-1)
    assert chances.max() < 0.9
    # The frequency of an entry has a standard deviation below 0.008.
    torch.testing.assert_close(made.bincount(minlength=7) / count, chances, rtol=0, atol=0.03)


@pytest.mark.parametrize("two_stream", [False, True])
@pytest.mark.parametrize("options", OBJECTIVES[2:5], ids=name_of)
@pytest.mark.parametrize("cached", [False, True])
def test_patches_are_denoised_by_their_contexts(cached, options, two_stream, monkeypatch):
    model, imgs, steps, seen = small(order="nested", two_stream=two_stream, **options), images(), 3, []
    denoise = model.denoise

    def record(context, noisy, gamma):
        clean = denoise(context, noisy, gamma)
        seen.append((context, noisy, gamma, clean))
        return clean

    monkeypatch.setattr(model, "denoise", record)
    made = generate(model, imgs, known=2, steps=steps, cached=cached)
    assert len(seen) == steps * (LENGTH - 2)
    with torch.no_grad():
        contexts = model.contexts(made, model.places)
    first = 0.5 / steps if model.config.prediction == "epsilon" else 0.0
    levels = diffusion.levels(steps, first)
    for t in range(2, LENGTH):
        calls = seen[steps * (t - 2) : steps * (t - 1)]
        for level, (context, noisy, gamma, _) in zip(levels[:-1], calls, strict=True):
            torch.testing.assert_close(context, contexts[:, t], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(gamma, torch.full((2,), level))
            assert noisy.shape == (2, VALUES)
        # The last step ends at what the model takes for clean.
        assert torch.equal(calls[-1][-1], parts(model, made)[:, model.places[t]])
    starts = torch.stack([noisy for _, noisy, _, _ in seen[::steps]])
    assert starts.mean().item() == pytest.approx(0, abs=0.05)
    assert starts.std().item() == pytest.approx(1, abs=0.05)
    assert len(starts.flatten(0, 1).unique(dim=0)) == 2 * (LENGTH - 2)


def test_a_denoiser_that_knows_completes_the_image(monkeypatch):
    model, imgs, place = small(objective="diffusion", order="round-robin"), images(), []

    def denoise(context, noisy, gamma):
        place.append(model.places[6 + len(place) // 5])
        return patchify(imgs, (8, 12))[:, place[-1]]

    monkeypatch.setattr(model, "denoise", denoise)
    assert torch.equal(generate(model, imgs, known=6, steps=5), imgs)
    assert len(place) == 5 * (LENGTH - 6)


# What is given.


@pytest.mark.parametrize("known", [0, 1, 6, 15])
@each_objective
def test_known_patches_are_kept_and_nothing_else_is_read(options, known):
    model, imgs = small(order="nested", **options), images()
    extra = given(model)
    made = generate(model, imgs, known, steps=2, **extra)
    there, missing = model.places[:known], model.places[known:]
    wanted = extra["codes"] if extra else patchify(imgs, (8, 12))
    assert torch.equal(parts(model, made)[:, there], wanted[:, there])
    assert not torch.equal(parts(model, made)[:, missing], wanted[:, missing]) or known == LENGTH
    if extra:
        extra["codes"][:, missing] = 6 - extra["codes"][:, missing]
        hidden = torch.full_like(imgs, math.nan)  # pixels are no inputs
    else:
        wanted[:, missing] = math.nan
        hidden = unpatchify(wanted, GRID, (8, 12))
    assert torch.equal(generate(model, hidden, known, steps=2, **extra), made)


def test_what_is_known_decides_what_follows():
    model, imgs = small(order="nested"), images()
    other = imgs.clone()
    other[:, :, :8, :12] += 1
    made, changed = (parts(model, generate(model, x, known=3)) for x in (imgs, other))
    difference = (made - changed).abs().amax(dim=-1)
    new = model.places[3:]
    assert (difference[:, new] > 1e-3).all()


def test_given_arguments_are_left_alone():
    model, imgs = small(**TOKENS), images()
    entries, before = torch.randint(7, (2, LENGTH)), imgs.clone()
    kept = entries.clone()
    generate(model, imgs, known=3, codes=entries)
    generate(small(), imgs, known=3)
    assert torch.equal(entries, kept)
    assert torch.equal(imgs, before)


# Seeds.


@each_objective
def test_a_seed_decides_what_is_drawn(options):
    model, imgs, state = small(**options), images(), torch.get_rng_state()
    extra = {"codes": torch.zeros(2, LENGTH, dtype=torch.long)} if model.config.inputs == "tokens" else {}
    made = [generate(model, imgs, known=3, steps=2, seed=seed, **extra) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2]) == (model.config.objective == "mse")


def test_images_of_a_batch_have_noise_of_their_own():
    for options in ({"objective": "diffusion"}, TOKENS):
        model, extra = small(**options), {"codes": torch.zeros(2, LENGTH, dtype=torch.long)}
        made = generate(model, images(1).expand(2, -1, -1, -1), known=1, steps=2, **extra)
        assert not torch.equal(made[0], made[1])


# Orders, sizes, precision.


@pytest.mark.parametrize("options", OBJECTIVES[1:3], ids=name_of)
def test_a_model_of_random_orders_takes_one(options):
    model, imgs, order = small(order="random", two_stream=True, **options), images(), torch.randperm(LENGTH)
    made = generate(model, imgs, known=5, steps=2, order=order)
    assert torch.equal(parts(model, made)[:, order[:5]], patchify(imgs, (8, 12))[:, order[:5]])
    other = generate(model, imgs, known=5, steps=2, order=order.flip(0))
    assert torch.equal(parts(model, other)[:, order[10:]], patchify(imgs, (8, 12))[:, order[10:]])
    assert not torch.allclose(made, other, atol=1e-2)
    if model.config.objective == "mse":
        with torch.no_grad():
            pred = model.decoder(model.contexts(made, order))
        torch.testing.assert_close(parts(model, made)[:, order[5:]], pred[:, 5:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("size", [(32, 24), (24, 72), (8, 12)])
def test_images_of_another_size(size, positions):
    model, imgs = small(order="nested", positions=positions), images(2, size)
    cached, anew = (generate(model, imgs, cached=cached) for cached in (True, False))
    torch.testing.assert_close(cached, anew, rtol=1e-5, atol=2e-5)
    with torch.no_grad():
        _, pred = model(cached)
    assert cached.shape == imgs.shape
    torch.testing.assert_close(parts(model, cached), pred, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [0, 1, 3])
@each_objective
def test_any_number_of_images(options, count):
    model = small(**options)
    made = generate(model, images(count), known=2, steps=2, **given(model, count))
    assert made.shape == ((count, LENGTH) if model.config.inputs == "tokens" else (count, 3, 24, 60))


def test_images_of_any_layout():
    model, imgs = small(), images()
    expected = generate(model, imgs, known=5)
    for other in (imgs.to(memory_format=torch.channels_last), imgs.mT.contiguous().mT):
        assert not other.is_contiguous()
        torch.testing.assert_close(generate(model, other, known=5), expected)


@each_objective
def test_autocast_gives_finite_float32(options):
    model, imgs = small(**options), images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for cached in (False, True):
            made = generate(model, imgs, known=2, steps=2, cached=cached, **given(model))
            assert made.isfinite().all()
            assert made.dtype == (torch.long if model.config.inputs == "tokens" else torch.float32)


# Errors.


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"norm_pix_loss": True}, {}, "generate: the model predicts normalised patches"),
        (
            {"objective": "tokens", "vocabulary": 7},
            {},
            "expected a model that reads what it predicts, got inputs pixels and objective tokens",
        ),
        ({"inputs": "tokens", "vocabulary": 7}, {}, "got inputs tokens and objective mse"),
        (
            {"order": "random", "two_stream": True},
            {},
            'order: expected one for a model of the order "random"',
        ),
        ({"objective": "diffusion"}, {"steps": 0}, "steps: expected at least 1, got 0"),
        ({}, {"known": -1}, "known: expected between 0 and 15 patches, got -1"),
        ({}, {"known": 16}, "known: expected between 0 and 15 patches, got 16"),
        (TOKENS, {}, r"codes: expected a tensor of shape \[2, 15\], got None"),
        (
            TOKENS,
            {"codes": torch.zeros(2, 14)},
            r"codes: expected a tensor of shape \[2, 15\], got \[2, 14\]",
        ),
    ],
)
def test_arguments_are_checked(options, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(create_darl("darl_vit_tiny", **SMALL, **options), images(), **arguments)


@pytest.mark.parametrize("shape", [(2, 3, 20, 60), (2, 3, 24, 50), (2, 1, 24, 60), (3, 24, 60)])
def test_images_are_checked(shape):
    with pytest.raises(ValueError, match="expected images"):
        generate(small(), torch.zeros(shape), known=1)


@pytest.mark.parametrize(
    "order",
    [torch.arange(14), torch.arange(16), torch.zeros(15, dtype=torch.long), torch.arange(15).expand(2, -1)],
    ids=["short", "long", "twice", "two"],
)
def test_an_order_names_every_patch_once(order):
    with pytest.raises(ValueError, match="order"):
        generate(small(), images(), known=1, order=order)
