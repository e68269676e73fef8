"""Layers in the applied form make their next R in the forward: the same training as in the folded form."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from vits import decorrelated, mlp

import dbpkern
from dbpkern import DecorSGD, ops
from dbpkern.ops import _triton
from models.mae import MaskedAutoencoder

pytestmark = pytest.mark.filterwarnings("error")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DOUBLE = {"rtol": 1e-12, "atol": 1e-12}


def autoencoder(form, dtype):
    torch.manual_seed(0)
    model = MaskedAutoencoder(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, decoder_embed_dim=16, decoder_depth=1,
        decoder_num_heads=2,
    )  # fmt: skip
    return dbpkern.decorrelate(model.to(DEVICE, dtype), "all", form=form)


def train(form, dtype, steps):
    """Losses and R of an autoencoder in training."""
    model = autoencoder(form, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    decor = DecorSGD(model, lr=0.02, kappa=0.1, sample=0.3, limit=None)
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(6, 3, 32, 32, generator=generator, dtype=dtype).to(DEVICE)
        loss = model(images, 0.5, torch.rand(6, 16, generator=generator).to(DEVICE))[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decor.step()
        losses.append(loss.item())
    return losses, {name: layer.R for name, layer in decorrelated(model).items()}


def compare(applied, folded, tolerance):
    assert all(
        loss == pytest.approx(other, rel=tolerance)
        for loss, other in zip(*(applied[0], folded[0]), strict=True)
    )
    for name, R in applied[1].items():
        torch.testing.assert_close(R, folded[1][name], rtol=tolerance, atol=tolerance)
        assert (R - torch.eye(len(R), device=DEVICE)).abs().max() > 1e-3


def never(*_, **__):
    raise AssertionError("called")


def test_an_autoencoder_trains_alike_in_both_forms(monkeypatch):
    folded = train("fold", torch.float64, 8)
    assert folded[0][-1] < folded[0][0]
    monkeypatch.setattr(ops, "update_", never)
    compare(train("apply", torch.float64, 8), folded, 1e-10)


def test_an_autoencoder_trains_alike_by_the_kernels(monkeypatch):
    folded = train("fold", torch.float32, 2)
    monkeypatch.setenv("DBPKERN_BACKEND", "triton")
    monkeypatch.setattr(ops, "update_", never)
    launched = set()
    launch = _triton.launch
    # Where they were imported from: every op calls it through its module.
    monkeypatch.setattr(
        _triton, "launch", lambda kernel, *args: (launched.add(kernel.__name__), launch(kernel, *args))
    )
    compare(train("apply", torch.float32, 2), folded, 1e-4)
    assert {"fused_kernel", "matmul_kernel"} <= launched


def pair(*widths, sample=0.5, **kwargs):
    """The same model in the folded and in the applied form, with optimizers of R."""
    models = [mlp(*widths, dtype=torch.float64, form=form) for form in ("fold", "apply")]
    models[1].load_state_dict(models[0].state_dict())
    return [(model, DecorSGD(model, lr=0.1, sample=sample, **kwargs, limit=None)) for model in models]


def backward(model, x):
    model(x).square().mean().backward()


def same_R(pairs):
    (one, _), (other, _) = pairs
    for name, layer in decorrelated(one).items():
        torch.testing.assert_close(layer.R, decorrelated(other)[name].R, **DOUBLE)
        assert (layer.R - torch.eye(len(layer.R))).abs().max() > 1e-6


@pytest.mark.parametrize("sizes", [(8, 8), (5, 9, 3)])
def test_micro_batches_count_by_their_rows(monkeypatch, sizes):
    pairs = pair(6, 6, 4)
    x = torch.randn(sum(sizes), 6, dtype=torch.float64)
    for model, decor in pairs:
        if model is pairs[1][0]:
            monkeypatch.setattr(ops, "update_", never)
        for part in x.split(sizes):
            backward(model, part)
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


def test_an_R_that_changes_before_the_step_is_the_one_that_is_updated():
    pairs = pair(6, 6, 4)
    x = torch.randn(20, 6, dtype=torch.float64)
    for model, decor in pairs:
        backward(model, x)
        with torch.no_grad():
            model[0].R.mul_(1.5)
        decor.step()
    same_R(pairs)


def test_micro_batches_in_either_form(monkeypatch):
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


def test_checkpointing_samples_once():
    pairs = pair(6, 6, 4)
    x = torch.randn(20, 6, dtype=torch.float64)
    for model, decor in pairs:
        checkpoint(lambda x, model=model: model(x), x, use_reentrant=False).square().mean().backward()
        decor.step()
    same_R(pairs)


def test_a_forward_without_a_backward_proposes_nothing():
    model, decor = pair(6, 6, 4)[1]
    model(torch.randn(20, 6, dtype=torch.float64))
    with torch.no_grad():
        model(torch.randn(20, 6, dtype=torch.float64))
    assert all(site.slot.proposal is None for site in decor._sites)
    with pytest.warns(UserWarning, match="sampled no input"):
        decor.step()
    for layer in decorrelated(model).values():
        assert torch.equal(layer.R, torch.eye(6, dtype=torch.float64))


def test_what_was_proposed_is_let_go():
    model, decor = pair(6, 6, 4)[1]
    x = torch.randn(20, 6, dtype=torch.float64)
    for finish in (decor.step, decor.zero_grad):
        backward(model, x)
        assert all(site.slot.proposal is not None for site in decor._sites)
        finish()
        assert all(site.slot.proposal is None for site in decor._sites)
    backward(model, x)
    assert decor.loss().keys() == {"0", "2"}


def test_frozen_layers_rest_and_eval_proposes_nothing():
    model, decor = pair(6, 6, 4)[1]
    model[0].weight.requires_grad_(False)
    x = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    backward(model, x)
    assert [site.slot.proposal is not None for site in decor._sites] == [False, True]
    decor.zero_grad()
    backward(model.eval(), x)
    assert not any(site.slot.pending for site in decor._sites)


@pytest.mark.parametrize("rows", [1, 2, 0])
def test_few_rows(rows):
    pairs = pair(6, 6, 4, sample=0.1)
    x = torch.randn(rows, 6, dtype=torch.float64)
    for model, decor in pairs:
        model(x).square().sum().backward()
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
        model = dbpkern.decorrelate(copy.deepcopy(stock), None, lambda name, _: "out_proj" not in name, form)
        decor = DecorSGD(model, lr=0.1, sample=0.3, limit=None)
        for step in range(3):
            torch.manual_seed(step)
            backward(model, torch.randn(2, 3, 16, 16, dtype=torch.float64))
            assert all((site.slot.proposal is not None) == (form == "apply") for site in decor._sites)
            decor.step()
        pairs.append((model, decor))
    same_R(pairs)
