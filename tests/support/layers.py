"""What the tests of layers and of DecorSGD share: small layers, their R, and what counts as the same."""

import torch
import torch.nn.functional as F
from torch import nn
from vits import decorrelated, mlp, shake

from dbpkern import DecorConv2d, DecorLinear, DecorMultiheadAttention

CPU = torch.device("cpu")
FORMS = ["fold", "apply"]
DOUBLE = {"dtype": torch.float64}


def exact(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def identical(one, other):
    assert one.shape == other.shape
    assert torch.equal(one, other)


def backward(model, x):
    model(x).square().mean().backward()


def Rs(model):
    return {name: layer.R.clone() for name, layer in decorrelated(model).items()}


def linears(n, d, dtype=torch.float32):
    """n layers of one width in a row, in the folded form for any number of rows."""
    return mlp(*[d] * (n + 1), dtype=dtype, form="fold")


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def linear(form="auto", d=5, o=3, **kwargs):
    return shake(DecorLinear.from_linear(nn.Linear(d, o, **DOUBLE | kwargs), form))


# name: arguments of Conv2d after the channels
CONVS = {
    "patches": {"kernel_size": 3, "stride": 3},
    "overlap": {"kernel_size": 3, "stride": 2, "padding": 1},
    "gaps": {"kernel_size": 2, "stride": 4},
    "dilated": {"kernel_size": (2, 3), "dilation": (3, 2)},
    "uneven": {"kernel_size": (2, 3), "stride": (3, 1), "padding": (0, 2), "dilation": (2, 1)},
    "same": {"kernel_size": (3, 2), "padding": "same", "dilation": 2},
    "same, even span": {"kernel_size": 4, "padding": "same"},
    "valid": {"kernel_size": 4, "padding": "valid"},
    "reflect": {"kernel_size": 3, "stride": 2, "padding": 2, "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "replicate"},
    "circular": {"kernel_size": 3, "stride": 3, "padding": (2, 1), "padding_mode": "circular"},
    "same circular": {"kernel_size": 4, "padding": "same", "padding_mode": "circular"},
    "no bias": {"kernel_size": 3, "stride": 3, "bias": False},
    "pointwise": {"kernel_size": 1},
}


def conv(case="patches", form="auto", dtype=torch.float64):
    return shake(DecorConv2d.from_conv(nn.Conv2d(2, 3, **CONVS[case], dtype=dtype), form))


def patches(layer, x):
    """All patches `[n, C kh kw]` of the images x, by F.unfold."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    return F.unfold(x, layer.kernel_size, layer.dilation, stride=layer.stride).mT.flatten(0, 1)


def attention(form="auto", d=6, **kwargs):
    stock = nn.MultiheadAttention(d, 2, **DOUBLE | {"batch_first": True} | kwargs)
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.5)
    return shake(DecorMultiheadAttention.from_attention(stock, form))
