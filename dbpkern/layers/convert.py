"""Convert a model to decorrelated layers and back."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from dbpkern.config import Decor
from dbpkern.layers.modules import (
    DecorConv2d,
    DecorLinear,
    DecorMultiheadAttention,
    Decorrelated,
    check_form,
    is_sharded,
)
from dbpkern.sites import Chosen, check_kind, check_weights, ranks_of, select, share_inputs

Model = TypeVar("Model", bound=nn.Module)

_CONVERTERS: Mapping[type[nn.Module], Callable[[Any, str, int | None], Decorrelated]] = {
    nn.Linear: DecorLinear.from_linear,
    nn.Conv2d: DecorConv2d.from_conv,
    nn.MultiheadAttention: DecorMultiheadAttention.from_attention,
}


def as_decorrelated(module: nn.Module, form: str = "auto", rank: int | None = None) -> Decorrelated:
    """A decorrelated layer over the same Parameters with R = I; `module` itself if it is one already."""
    return module if isinstance(module, Decorrelated) else _CONVERTERS[type(module)](module, form, rank)


def _check_replaceable(model: nn.Module, chosen: Chosen) -> None:
    """Refuse layers that a decorrelated one cannot stand in for."""
    modules = dict(model.named_modules())
    for name, (module, _) in chosen.items():
        if not name:
            raise ValueError(
                f"the model itself is a {type(module).__name__}, which cannot be replaced in place; use "
                "DecorLinear.from_linear, DecorConv2d.from_conv or DecorMultiheadAttention.from_attention"
            )
        if is_sharded(module):
            raise ValueError(
                f"{name}: the model is sharded already, and FSDP holds on to the layers that it was given; "
                "call decorrelate(model) before fully_shard"
            )
        check_kind(name, module)
        owner = modules[name.rpartition(".")[0]]
        if isinstance(owner, nn.TransformerEncoderLayer | nn.MultiheadAttention):
            raise ValueError(
                f"{name}: {type(owner).__name__} reads this layer's weight without calling the layer, so "
                "its R would be ignored; exclude it with filter"
            )
    check_weights(model, chosen)


def check_stock(model: nn.Module) -> None:
    """Raise ValueError if the model has decorrelated layers."""
    already = [name for name, module in model.named_modules() if isinstance(module, Decorrelated)]
    if already:
        raise ValueError(
            f"the model is decorrelated already ({already[0]} and {len(already) - 1} more layers); "
            "name all sites in one call, or fuse(model) first"
        )


def decorrelate(model: Model, decor: Decor | None = None, form: str = "auto") -> Model:
    """Replace layers of a model by decorrelated ones, in place.

    R starts as the identity, so the model's outputs stay the same bit for bit; Parameters stay the same
    objects, so an optimizer made before remains valid. Separate q, k and v projections (or gate and up
    projections) that stand side by side share one R. Nothing happens to R until a `DecorSGD` is made.

    Args:
        model: any model; the site names know the ViTs of timm, torchvision and Hugging Face.
        decor: its `sites`, `filter` and `rank` say which layers, and by which R; `Decor.layers()` for None.
        form: how the layers compute: "auto", "fold" or "apply", see `dbpkern.layers`.

    Returns:
        The model.

    Raises:
        TypeError: a rank that is no number.
        ValueError: a site that matches nothing (the message lists what exists) or that cannot be served, a
            filter that leaves nothing, a model that is converted or sharded already, tied weights, an unknown
            form, a rank below 1 or above a layer's width, ranks for a site or layer that is not chosen, or
            several for layers that share an R. The model is unchanged then, as it is after a TypeError.
    """
    decor = Decor.layers() if decor is None else decor
    check_form(form)
    check_stock(model)
    chosen = select(model, decor.sites, decor.filter)
    _check_replaceable(model, chosen)
    ranks = ranks_of(decor.rank, chosen)
    converted: dict[str, Decorrelated] = {}
    for name, (module, site) in chosen.items():
        try:
            converted[name] = as_decorrelated(module, form, ranks[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        converted[name].site = site
    share_inputs(chosen, converted)
    _replace(model, {id(module): converted[name] for name, (module, _) in chosen.items()})
    return model


def fuse(model: Model) -> Model:
    """Fold every R into its weight, `W <- W R`, and put stock layers back, in place.

    The model computes the same function with the stock state_dict: bit for bit where it folded by PyTorch's
    products without autocast, to rounding otherwise. Parameters stay the same objects. Under FSDP every
    process folds its own rows of the weights, without communication, and the model stays sharded.

    Returns:
        The model.

    Raises:
        ValueError: nothing in the model is decorrelated, the model itself is one such layer (its `fused()`
            returns the stock layer), or a weight is not sharded by rows.
    """
    layers = {id(m): m for m in model.modules() if isinstance(m, Decorrelated)}
    if not layers:
        raise ValueError("fuse: expected a model with decorrelated layers, found none")
    if isinstance(model, Decorrelated):
        raise ValueError("fuse: the model itself is a decorrelated layer; call its fused() instead")
    if any(is_sharded(layer) for layer in layers.values()):
        from torch.distributed.fsdp import FSDPModule  # slow to import, and rarely needed

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the root's weights stay gathered after a forward
    _replace(model, {key: layer.fused() for key, layer in layers.items()})
    return model


def _replace(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Put `new[id(old)]` wherever a module `old` is registered."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if id(child) in new:
                module._modules[name] = new[id(child)]
