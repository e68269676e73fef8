"""Layers in the applied form bring what R moves by from their forward, where R's step is linear in M."""

import copy

import pytest
import torch
from rules import convert, decor_sgd
from torch import nn
from torch.utils.checkpoint import checkpoint
from vits import decorrelated, mlp

from dbpkern import ops
from models.mae import MaskedAutoencoder

pytestmark = pytest.mark.filterwarnings("error")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autoencoder(form):
    torch.manual_seed(0)
    model = MaskedAutoencoder(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, decoder_embed_dim=16, decoder_depth=1,
        decoder_num_heads=2,
    )  # fmt: skip
    return convert(model.to(DEVICE, torch.float64), sites="all", form=form)


def train(form, steps, **rule):
    """Losses and R of an autoencoder in training."""
    model = autoencoder(form)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    decor = decor_sgd(model, kappa=0.1, sample=0.3, **rule)
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(6, 3, 32, 32, generator=generator, dtype=torch.float64).to(DEVICE)
        loss = model(images, 0.5, torch.rand(6, 16, generator=generator).to(DEVICE))[0]
        optimizer.zero_grad()
        loss.backward()
        moves = [site.slot.moves() is not None for site in decor.engine.sites]
        linear = decor.engine.decor.limit is None and not decor.engine.decor.scale_free
        assert set(moves) == {form == "apply" and linear and decor.engine.sampler.due}
        optimizer.step()
        decor.step()
        losses.append(loss.item())
    return losses, {name: layer.R for name, layer in decorrelated(model).items()}


@pytest.mark.parametrize(
    "rule",
    [
        {"eta": 0.02, "limit": None},
        {"eta": 0.02, "limit": None, "every": 2},
        {"eta": 0.5, "limit": 0.1},
        {"eta": 0.1, "scale_free": True},
    ],
    ids=str,
)
def test_an_autoencoder_trains_alike_in_both_forms(rule):
    folded, applied = (train(form, 6, **rule) for form in ("fold", "apply"))
    assert folded[0][-1] < folded[0][0]
    assert applied[0] == pytest.approx(folded[0], rel=1e-10)
    for name, R in applied[1].items():
        torch.testing.assert_close(R, folded[1][name], rtol=1e-10, atol=1e-10)
        assert (R - torch.eye(len(R), device=DEVICE)).abs().max() > 1e-3


def pair(*widths, sample=0.5):
    """The same model in the folded and in the applied form, with optimizers of R."""
    models = [mlp(*widths, dtype=torch.float64, form=form) for form in ("fold", "apply")]
    models[1].load_state_dict(models[0].state_dict())
    return [(model, decor_sgd(model, eta=0.1, sample=sample, limit=None)) for model in models]


def backward(model, x):
    model(x).square().mean().backward()


def same_R(pairs):
    (one, _), (other, _) = pairs
    for name, layer in decorrelated(one).items():
        torch.testing.assert_close(layer.R, decorrelated(other)[name].R, rtol=1e-12, atol=1e-12)
        assert (layer.R - torch.eye(len(layer.R))).abs().max() > 1e-6


@pytest.mark.parametrize("sizes", [(8, 8), (5, 9, 3)])
def test_micro_batches_count_by_their_rows(monkeypatch, sizes):
    pairs = pair(6, 6, 4)
    x = torch.randn(sum(sizes), 6, dtype=torch.float64)
    for model, decor in pairs:
        for part in x.split(sizes):
            backward(model, part)
        if model is pairs[1][0]:  # the step itself forms no statistics
            for name in ("correlation", "update_", "apply_"):
                monkeypatch.setattr(ops, name, None)
        decor.step()
    same_R(pairs)


@pytest.mark.parametrize("tensor", [False, True])
def test_a_rate_that_changes_before_the_step_is_the_one_that_counts(tensor):
    pairs = pair(6, 6, 4)
    x = torch.randn(20, 6, dtype=torch.float64)
    for model, decor in pairs:
        group = decor.param_groups[0]
        if tensor:
            group["lr"] = torch.tensor(0.3)
        backward(model, x)
        if tensor:
            group["lr"].fill_(0.01)
        else:
            group["lr"] = 0.01
        decor.step()
    same_R(pairs)


def test_micro_batches_in_either_form():
    # 12 rows fold, 3 are fewer than the outputs: the statistics of both count.
    pairs = pair(6, 8, 8)
    for layer in decorrelated(pairs[1][0]).values():
        layer.form = "auto"
    x = torch.randn(15, 6, dtype=torch.float64)
    for order in ((12, 3), (3, 12)):
        for model, decor in pairs:
            for part in x.split(order):
                backward(model, part)
            decor.step()
        same_R(pairs)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_samples_once(reentrant):
    pairs = pair(6, 6, 4)
    x = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    for model, decor in pairs:
        checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
        assert [site.slot.count() for site in decor.engine.sites] == [10, 10]
        decor.step()
    same_R(pairs)


def test_nothing_moves_without_a_backward_in_training():
    model, decor = pair(6, 6, 4)[1]
    x = torch.randn(20, 6, dtype=torch.float64)
    model(x)
    with torch.no_grad():
        model(x)
    backward(model.eval(), x)
    assert not any(site.slot.pending or site.slot.moves() is not None for site in decor.engine.sites)
    with pytest.raises(RuntimeError, match=r"2 of 2 layers sampled no input.*Eval mode"):
        decor.step()
    for layer in decorrelated(model).values():
        assert torch.equal(layer.R, torch.eye(6, dtype=torch.float64))


def test_what_was_brought_is_let_go():
    model, decor = pair(6, 6, 4)[1]
    x = torch.randn(20, 6, dtype=torch.float64)
    for finish in (decor.step, decor.drop_samples):
        backward(model, x)
        assert all(site.slot.moves() is not None for site in decor.engine.sites)
        finish()
        assert all(site.slot.moves() is None for site in decor.engine.sites)
    backward(model, x)
    assert decor.engine.loss().keys() == {"0", "2"}


def test_frozen_layers_rest():
    model, decor = pair(6, 6, 4)[1]
    model[0].weight.requires_grad_(False)
    backward(model, torch.randn(20, 6, dtype=torch.float64, requires_grad=True))
    assert [site.slot.moves() is not None for site in decor.engine.sites] == [False, True]


@pytest.mark.parametrize("rows", [1, 2, 0])
def test_few_rows(rows):
    pairs = pair(6, 6, 4, sample=0.1)
    x = torch.randn(rows, 6, dtype=torch.float64)
    for model, decor in pairs:
        model(x).square().sum().backward()
        if rows:
            decor.step()
        else:
            with pytest.warns(UserWarning, match="2 of 2 layers sampled no input"):
                decor.step()
    if rows:
        same_R(pairs)


class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, images):
        x = self.conv(images).flatten(2).mT
        return self.attention(x, x, x)[0]


def test_convolutions_and_attention():
    torch.manual_seed(0)
    stock = Patches().double()
    pairs = []
    for form in ("fold", "apply"):
        model = convert(
            copy.deepcopy(stock), sites=None, filter=lambda name, _: "out_proj" not in name, form=form
        )
        decor = decor_sgd(model, eta=0.1, sample=0.3, limit=None)
        for step in range(3):
            torch.manual_seed(step)
            backward(model, torch.randn(2, 3, 16, 16, dtype=torch.float64))
            assert all((site.slot.moves() is not None) == (form == "apply") for site in decor.engine.sites)
            decor.step()
        pairs.append((model, decor))
    same_R(pairs)
