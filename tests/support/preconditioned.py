"""A small network that an optimizer trains with a DecorPreconditioner around it."""

import optimizers
import torch
from optimizers import D, loss_of
from rules import preconditioner
from torch import nn
from vits import everything

ETA = 0.05


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 24, dtype=dtype), nn.GELU(), nn.Linear(24, 8, dtype=dtype))


def batch(seed, n=64, dtype=torch.float64):
    return optimizers.batch(seed, dtype, n)


def precondition(model, optimizer, **options):
    chosen = {
        "sites": None,
        "filter": everything,
        "eta": ETA,
        "sample": 1.0,
        "rank": None,
        "every": 1,
        "scale_free": True,
    }
    return preconditioner(model, optimizer, **chosen | options)


def train(model, optimizer, steps, start=0):
    losses = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss = loss_of(model, batch(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
