"""A small network that DecorAdamW and DecorMuon train, and what makes two runs the same."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from vits import everything

from dbpkern import Decor, DecorAdamW, DecorMuon

D = 12
RULE = Decor(sites=None, filter=everything, rank=None, eta=0.1, sample=0.5)
RULES = {
    "full": RULE,
    "low": replace(RULE, rank=5),
    "mixed": replace(RULE, rank={"0": 5}),
    "published": replace(RULE, eta=1e-3, every=1, scale_free=False, limit=None, kappa=0.2),
}


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 8)).to(dtype)


def batch(seed, dtype=torch.float64, n=40):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(D, D, generator=torch.Generator().manual_seed(99), dtype=dtype)
    return torch.randn(n, D, generator=generator, dtype=dtype) @ mixing


def loss_of(model, x):
    return (model(x) - x[:, :8]).square().mean()


def train(model, optimizer, steps, start=0, closure=False, scheduler=None, set_to_none=True):
    losses = []
    for step in range(start, start + steps):
        x = batch(step, next(model.parameters()).dtype)

        def evaluate(x=x):
            optimizer.zero_grad(set_to_none)
            loss = loss_of(model, x)
            loss.backward()
            return loss

        if closure:
            loss = optimizer.step(evaluate)
        else:
            loss = evaluate()
            optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def groups(model, decay=0.1):
    """Matrices and vectors, with options of their own."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return [
        {"params": matrices, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0, "lr": 0.02, "betas": (0.8, 0.9)},
    ]


def adamw(model, decor=RULE, **options):
    return DecorAdamW(groups(model), 0.01, model=model, decor=decor, **options)


def muon(model, decor=RULE, **options):
    return DecorMuon(groups(model), 0.01, model=model, decor=decor, **options)


BOTH = pytest.mark.parametrize("make_optimizer", [adamw, muon])


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def moved(model, start, by=1e-3):
    return all((p - q).abs().max() > by for p, q in zip(model.parameters(), start, strict=True))


def factors(optimizer):
    return [f.clone() for f in optimizer.engine.factors()]


def identical(ones, others):
    ones, others = list(ones), list(others)
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def same_state(one, other):
    """Of state dicts: the same, bit for bit."""
    assert one["param_groups"] == other["param_groups"]
    torch.testing.assert_close(one["state"], other["state"], rtol=0, atol=0)


def same_run(one, other):
    """Of (model, optimizer) pairs: the same weights, R and state, bit for bit."""
    identical(one[0].parameters(), other[0].parameters())
    if one[1].engine is not None:
        identical(factors(one[1]), factors(other[1]))
    same_state(one[1].state_dict(), other[1].state_dict())
