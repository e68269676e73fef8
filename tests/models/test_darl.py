"""DARL against its definition: who sees whom, losses, gradients, initial values, odd inputs, errors."""

import math
from functools import partial

import pytest
import torch
from darls import (
    GRID,
    LENGTH,
    SMALL,
    VALUES,
    arguments,
    codes,
    each_objective,
    each_order,
    each_place,
    each_position,
    images,
    name_of,
    patch_of,
    rename,
    small,
)
from torch import nn

from models.darl import DARL, SIZES, create_darl
from models.darl_decoder import PairDecoder
from models.darl_order import ORDERS, patch_order
from models.vit import patchify

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
