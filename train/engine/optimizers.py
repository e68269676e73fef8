"""The optimizers of the weights that all scripts know."""

from typing import Any

import torch
from torch import nn

import dbpkern
from dbpkern import Decor
from train.engine.config import RunConfig


def build_optimizer(
    config: RunConfig,
    groups: list[dict[str, Any]],
    lr: float,
    model: nn.Module | None = None,
    rule: Decor | None = None,
) -> torch.optim.Optimizer:
    """AdamW or Muon, as `optim.name` says; with a rule one that holds R.

    Args:
        config: What is asked for.
        groups: Of the parameters.
        lr: The peak rate.
        model: Whose layers are decorrelated, by a rule.
        rule: Of R; None for none.
    """
    betas = config.optim.betas
    chosen = None if rule is None else model
    if config.optim.name == "muon":
        # Without a model it is Muon. timm's is in bf16, which takes ten times as long without bf16 units.
        return dbpkern.DecorMuon(groups, lr=lr, momentum=betas[0], betas=betas, model=chosen, decor=rule)
    # Without a model DecorAdamW is AdamW, bit for bit on a CPU; the baseline is PyTorch's all the same.
    if rule is None:
        return torch.optim.AdamW(groups, lr=lr, betas=betas)
    return dbpkern.DecorAdamW(groups, lr=lr, betas=betas, model=model, decor=rule)
