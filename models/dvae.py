"""Discrete VAE: a stub until the tokenizer is written."""

from torch import nn


class DiscreteVae(nn.Module): ...


def load_tokenizer(path):
    raise NotImplementedError
