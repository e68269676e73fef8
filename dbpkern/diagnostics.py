"""What one looks at to see whether decorrelation works: correlations, losses, variances, conditioning.

    with diagnostics.observe(model) as layers:
        model(images)
    layers["blocks.3.attn.qkv"].loss_after

`train.engine.correlations` plots it.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dbpkern.layers.convert import as_decorrelated
from dbpkern.layers.modules import Decorrelated
from dbpkern.sites import Filter, check_kind, select
from dbpkern.stock import StockLayer, stock_layer


class Layer:
    """Second moments of one layer's input, before and after R, over the rows seen so far.

    A stock layer without an R beside it is seen as if R were the identity.
    """

    def __init__(self, name: str, layer: Decorrelated | StockLayer) -> None:
        self.name = name
        self.R = layer.dense_R().detach().to(torch.float64, copy=True)
        self.rows = 0
        self._sum = torch.zeros_like(self.R)

    def add(self, x: Tensor) -> None:
        """Count in the rows `x [n, d]`, fp64."""
        self._sum += x.mT @ x
        self.rows += len(x)

    @property
    def before(self) -> Tensor:
        """`E[x x^T] [d, d]`, not centred, fp64."""
        return self._sum / max(self.rows, 1)

    @property
    def after(self) -> Tensor:
        """`E[z z^T] = R E[x x^T] R^T`, `[d, d]`, fp64."""
        return self.R @ self.before @ self.R.mT

    @property
    def loss_before(self) -> float:
        """Decorrelation loss of x: `||offdiag E[x x^T]||_F^2 / d^2`."""
        return _loss(self.before)

    @property
    def loss_after(self) -> float:
        """Decorrelation loss of z: `||offdiag E[z z^T]||_F^2 / d^2`."""
        return _loss(self.after)

    @property
    def correlation_before(self) -> float:
        """Root mean square of the off-diagonal correlations of x; unlike the loss, free of scale."""
        return _loss(correlations(self.before)) ** 0.5

    @property
    def correlation_after(self) -> float:
        """Root mean square of the off-diagonal correlations of z."""
        return _loss(correlations(self.after)) ** 0.5

    @property
    def variance_before(self) -> Tensor:
        """Mean squares of the features of x, `[d]`."""
        return self.before.diagonal()

    @property
    def variance_after(self) -> Tensor:
        """Mean squares of the features of z, `[d]`."""
        return self.after.diagonal()

    @property
    def condition_before(self) -> float:
        """Condition number of `E[x x^T]`; infinite for fewer rows than features."""
        return _condition(self.before, self.rows)

    @property
    def condition_after(self) -> float:
        """Condition number of `E[z z^T]`; infinite for fewer rows than features."""
        return _condition(self.after, self.rows)

    @property
    def condition_R(self) -> float:
        """Condition number of R: how far the folded weight's scales lie apart."""
        return torch.linalg.cond(self.R).item()


def _loss(G: Tensor) -> float:
    off = G - torch.diag(G.diagonal())
    return (off.square().sum() / max(G.numel(), 1)).item()


def _condition(G: Tensor, rows: int) -> float:
    return torch.linalg.cond(G).item() if rows >= len(G) else float("inf")


def correlations(G: Tensor) -> Tensor:
    """Scale a second moment `[d, d]` to unit diagonal; features that are always zero stay zero."""
    scale = G.diagonal().clamp(min=0).sqrt()
    scale = torch.where(scale > 0, 1 / scale, 0)
    return scale[:, None] * G * scale


def observed(
    model: nn.Module, sites: str | Iterable[str] | None = "sublayers", filter: Filter | None = None
) -> dict[str, nn.Module]:
    """The layers that `observe` would observe, by name; arguments and errors are its own."""
    found: dict[str, nn.Module] = {
        name: m for name, m in model.named_modules() if isinstance(m, Decorrelated)
    }
    if found:
        return {name: m for name, m in found.items() if filter is None or filter(name, m)}
    found = {name: module for name, (module, _) in select(model, sites, filter).items()}
    for name, module in found.items():
        check_kind(name, module)
    return found


@contextlib.contextmanager
def observe(
    model: nn.Module,
    sites: str | Iterable[str] | None = "sublayers",
    filter: Filter | None = None,
) -> Iterator[dict[str, Layer]]:
    """Gather the input statistics of layers while the body of the `with` runs the model.

    Args:
        model: a converted model, whose decorrelated layers are observed, or a stock one, whose layers
            `sites` and `filter` choose as in `decorrelate`, with the R beside them, or I.
        sites: as in `decorrelate`; for stock models alone.
        filter: as in `decorrelate`.

    Yields:
        The observed layers by name, in the model's order; complete once the body has ended.

    Raises:
        ValueError: as `decorrelate`, for stock models.
    """
    found = observed(model, sites, filter)
    # Whatever may fail comes before the first hook.
    sources = {name: stock_layer(module) or as_decorrelated(module) for name, module in found.items()}
    layers = {name: Layer(name, source) for name, source in sources.items()}
    handles = []
    for name, module in found.items():

        def hook(
            _: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            layer: Layer = layers[name],
            source: Decorrelated | StockLayer = sources[name],
        ) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            n = source.count_rows(x)
            if n:
                rows = torch.empty(n, len(layer.R), dtype=torch.float64, device=x.device)
                source.take_rows(rows, x.detach(), None)
                layer.add(rows)

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()
