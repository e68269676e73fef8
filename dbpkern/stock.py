"""Stock layers with an R beside them: the model, its forward and its state_dict stay as they are."""

import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dbpkern.capture import Slot, Tap, slot_of
from dbpkern.rows import count_patches, count_tokens, take_patches, take_tokens
from dbpkern.sites import Chosen, Layer, SharedInput, share_inputs
from dbpkern.structure import structure_of


class StockLayer:
    """A stock layer with an R beside it: to an `Engine` what a decorrelated layer is.

    Args:
        layer: `nn.Linear`, `nn.Conv2d` with `groups=1`, or `nn.MultiheadAttention`, whose `in_proj_weight`
            is meant.
        rank: of `R - I` for a low-rank R; None for a full one.

    Raises:
        TypeError: rank is neither None nor an integer.
        ValueError: rank out of range, a layer that has no single weight for its input, or a weight sharded
            by columns.
    """

    shared: SharedInput | None = None
    site: str | None = None
    """What it was chosen as, where its name has told."""

    def __init__(self, layer: Layer, rank: int | None) -> None:
        self.layer = layer
        self.structure = structure_of(rank)
        if getattr(layer, "groups", 1) != 1:
            raise ValueError(f"expected a convolution with groups=1, got groups={layer.groups}")
        if self.weight is None:
            raise ValueError("expected one in_proj_weight for q, k and v, got kdim or vdim of their own")
        placements = getattr(self.weight, "placements", ())  # of FSDP
        if any(p.is_shard() and not p.is_shard(0) for p in placements):
            raise ValueError(f"expected a weight sharded by rows, Shard(0), got {placements}")
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self._factors: tuple[Tensor, ...] = self.structure.start(
            self.weight.shape[1:].numel(), dtype, self.weight.device
        )
        self._owner: weakref.ref[Slot] | None = None
        self._key: Tensor | None = None
        self._hook = layer.register_forward_hook(self._sample, with_kwargs=True)

    @property
    def weight(self) -> Tensor:
        """V, `[o, d]`, or `[o, C, kh, kw]` of a convolution."""
        return (
            self.layer.in_proj_weight if isinstance(self.layer, nn.MultiheadAttention) else self.layer.weight
        )

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The tensors that hold R, `(R,)` or `(Q, S)`, on the weight's device, in its dtype or fp32."""
        weight, held = self.weight, self._factors[0]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if held.device != weight.device or held.dtype != dtype:
            self._factors = tuple(factor.to(weight.device, dtype) for factor in self._factors)
        return self._factors

    @factors.setter
    def factors(self, values: tuple[Tensor, ...]) -> None:
        self._factors = values

    @property
    def trains(self) -> bool:
        """Whether the weight is trained; R rests where it is not."""
        return self.weight.requires_grad

    @property
    def slot_key(self) -> Tensor | None:
        """The key of the slot that samples go to, or None."""
        return self._key

    @property
    def live(self) -> bool:
        """Whether an optimizer has this layer: a copy of the model brings ones that none has."""
        return self._owner is not None and self._owner() is not None

    def attach(self, slot: Slot | None, samples: bool = True) -> None:
        """Belong to `slot` from now on, and send samples there if this layer is to; None ends both."""
        self._owner = None if slot is None else weakref.ref(slot)
        self._key = None if slot is None or not samples else slot.key

    def count_rows(self, x: Tensor) -> int:
        """Number of rows in the input x."""
        return count_patches(self.layer, x) if isinstance(self.layer, nn.Conv2d) else count_tokens(x)

    def take_rows(self, out: Tensor, x: Tensor, index: Tensor | None) -> None:
        """Write the rows `index` (all of them for None) of the input x into `out [n_s, d]`."""
        if isinstance(self.layer, nn.Conv2d):
            take_patches(out, self.layer, x, index)
        else:
            take_tokens(out, x, index)

    def _sample(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> object:
        """Forward hook: sample the input, for when the output's backward comes."""
        if not layer.training or not torch.is_grad_enabled() or not self.trains:
            return None
        x = args[0] if args else kwargs["query" if isinstance(layer, nn.MultiheadAttention) else "input"]
        if isinstance(layer, nn.MultiheadAttention):
            others = [*args[1:3], *(kwargs[name] for name in ("key", "value") if name in kwargs)]
            if any(other is not x for other in others):
                raise ValueError(
                    "decorrelation serves self-attention alone: expected the same tensor as query, key and "
                    "value; keep cross-attention out with filter"
                )
        if self.shared is not None and not torch.compiler.is_compiling():
            self.shared.check(self, x)
        if self._key is None:
            return None
        y = output[0] if isinstance(output, tuple) else output
        if not torch.compiler.is_compiling():
            slot = slot_of(self._key)
            if slot is not None:
                slot.forward(x, y)
            return None
        # In a compiled graph the backward samples: from the input as autocast has it for the product, which
        # is kept for the weight's gradient anyway.
        x = x.detach()
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        tied = Tap.apply(y, x, self._key)
        return (tied, *output[1:]) if isinstance(output, tuple) else tied

    def dense_R(self) -> Tensor:
        """R as a matrix, `[d, d]`, whatever holds it."""
        return self.structure.matrix(*self.factors)

    def remove(self) -> None:
        """Leave the layer without hook."""
        self._hook.remove()
        self.attach(None)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model alone has no R, and does not send its samples to the original's optimizer.
        return {**self.__dict__, "_factors": (), "_owner": None, "_key": None}


def _stock_layers(module: nn.Module) -> list[StockLayer]:
    owners = [getattr(hook, "__self__", None) for hook in module._forward_hooks.values()]
    return [owner for owner in owners if isinstance(owner, StockLayer)]


def stock_layer(module: nn.Module) -> StockLayer | None:
    """What holds the R beside a module, if an optimizer has one."""
    return next((layer for layer in _stock_layers(module) if layer.live), None)


@contextmanager
def unsampled(model: nn.Module) -> Iterator[None]:
    """Let nothing that the model does meanwhile count as a sample for an R beside its layers."""
    layers = [layer for layer in map(stock_layer, model.modules()) if layer is not None]
    keys = [(layer, layer._key) for layer in layers]
    for layer in layers:
        layer._key = None
    try:
        yield
    finally:
        for layer, key in keys:
            layer._key = key


def hold(chosen: Chosen, ranks: Mapping[str, int | None]) -> dict[str, StockLayer]:
    """The chosen layers, each with an R that is the identity beside it."""
    layers: dict[str, StockLayer] = {}
    try:
        for name, (module, site) in chosen.items():
            for old in _stock_layers(module):
                if not old.live:
                    old.remove()  # of an optimizer that is gone
            try:
                layers[name] = StockLayer(module, ranks[name])
                layers[name].site = site
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    except BaseException:
        for layer in layers.values():
            layer.remove()
        raise
    share_inputs(chosen, layers)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # compiled code does not see hooks that came later
    return layers
