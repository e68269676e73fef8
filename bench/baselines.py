"""The published rule as published: the baseline that dbpkern has to beat.

Written from the equations of Carrigg et al. (arXiv 2510.14657) and Dalm et al. (arXiv 2405.02385), in the
order in which the authors' code (github.com/artcogsys/decorbp) computes them:

- a linear layer sends every token through R, then through W; the sampled rows go through R once more;
- a convolution folds R into its kernel, keeps its images, and decorrelates the sampled ones at the update;
- a sample is 10 % of the tokens (of the images), with replacement, its index drawn on the CPU;
- the update forms C and C R in full, layer by layer in a Python loop, and the host reads each layer's loss.

What is a slip there rather than a cost is put right, because it has no bearing on time: the variance term
scales rows of R, the convolution adds its bias, samples hold no autograd graph, and statistics of samples
that autocast lowered are formed in R's precision.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLE = 0.1


def draw_rows(n: int) -> Tensor:
    """Index of the sample out of n rows (or images), on the CPU."""
    return torch.randint(n, (max(1, int(SAMPLE * n)),))


class _Published(nn.Module):
    """A layer's own Parameters, and R."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, draw: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.weight, self.bias, self.draw = layer.weight, layer.bias, draw
        d = layer.weight[0].numel()
        self.register_buffer("R", torch.eye(d, dtype=layer.weight.dtype, device=layer.weight.device))

    def samples(self) -> Tensor:
        """The decorrelated sample of the last forward, `[n_s, d]`."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, lr: float, kappa: float) -> Tensor:
        """`R <- R - lr ((1 - kappa) C R + kappa diag(v) R)`; returns the decorrelation loss."""
        z = self.samples().to(self.R.dtype)
        G = z.T @ z / len(z)
        C = G - torch.diag(torch.diag(G))
        v = torch.diag(G) - 1
        self.R -= lr * ((1 - kappa) * (C @ self.R) + kappa * (v[:, None] * self.R))
        return ((1 - kappa) * C.square().sum() + kappa * v.square().sum()) / len(v) ** 2


class PublishedLinear(_Published):
    """`y = W (R x) + b`, two products for every token."""

    def forward(self, x: Tensor) -> Tensor:
        """`[*, d] -> [*, o]`."""
        if self.training:
            rows = x.detach().flatten(0, -2)
            self.z = F.linear(rows[self.draw(len(rows))], self.R)
        return F.linear(F.linear(x, self.R), self.weight, self.bias)

    def samples(self) -> Tensor:
        """The tokens drawn in the last forward, after R."""
        return self.z


class PublishedConv2d(_Published):
    """A convolution whose patches are decorrelated: R folded into the kernel, samples at the update."""

    def __init__(self, conv: nn.Conv2d, draw: Callable[[int], Tensor]) -> None:
        super().__init__(conv, draw)
        self.geometry = (conv.stride, conv.padding, conv.dilation)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W] -> [B, o, H', W']`."""
        if self.training:
            self.images = x.detach()
        kernel = (self.weight.flatten(1) @ self.R).view_as(self.weight)
        return F.conv2d(x, kernel, self.bias, *self.geometry)

    def samples(self) -> Tensor:
        """All patches of the images drawn now from those of the last forward, after R."""
        images = self.images[self.draw(len(self.images))]
        R = self.R.view(-1, *self.weight.shape[1:])
        return F.conv2d(images, R, None, *self.geometry).movedim(1, -1).flatten(0, -2)


def published_layers(model: nn.Module) -> dict[str, _Published]:
    """The converted layers by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, _Published)}


def published_convert(model: nn.Module, layers: Iterable[str], draw: Callable = draw_rows) -> nn.Module:
    """Replace the linear layers and convolutions of these names, in place; Parameters stay the same objects.

    Args:
        model: any model.
        layers: names, as `dbpkern.convert.select` gives them for sites.
        draw: number of rows (or images) -> index of the sample.
    """
    for name in layers:
        layer = model.get_submodule(name)
        kind = PublishedConv2d if isinstance(layer, nn.Conv2d) else PublishedLinear
        model.set_submodule(name, kind(layer, draw))
    return model


def published_update(model: nn.Module, lr: float, kappa: float = 0.0) -> float:
    """Update every R, one after the other; returns the sum of the layers' decorrelation losses."""
    return sum(layer.update(lr, kappa).item() for layer in published_layers(model).values())
