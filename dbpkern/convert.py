"""Convert a model to decorrelated layers and back."""

import math
import re
from collections.abc import Callable, Iterable, Mapping

from torch import nn

from dbpkern.nn import (
    DecorConv2d,
    DecorLinear,
    DecorMultiheadAttention,
    Decorrelated,
    check_form,
    is_sharded,
)

# The parts of a transformer block by the names that timm, torchvision and Hugging Face give them; a
# pattern is matched against the end of a module's qualified name.
SITES = {
    "patch_embed": r"patch_embed(dings?)?(\.proj|\.projection)?|patch_embedding|conv_proj",
    "qkv": (
        r"(attn|attention|self_attn|self_attention)"
        r"(\.(qkv|query_key_value|query|key|value|[qkv]|[qkv]_proj|in_proj|Wqkv))?"
    ),
    "proj": r"(attn|attention|self_attn|self_attention)\.(proj|out_proj|o_proj|output\.dense)",
    "fc1": r"mlp\.(fc1|fc1_g|fc1_x|0|w12|gate_proj|up_proj)|intermediate\.dense",
    "fc2": r"mlp\.(fc2|3|w3|down_proj)|(?<!attention\.)output\.dense",
}
_PATTERNS = {site: re.compile(rf"(^|.*\.)({pattern})") for site, pattern in SITES.items()}

PRESETS = {
    "sublayers": ("patch_embed", "qkv", "fc1"),
    "all": ("patch_embed", "qkv", "proj", "fc1", "fc2"),
}

_CONVERTERS = {
    nn.Linear: DecorLinear.from_linear,
    nn.Conv2d: DecorConv2d.from_conv,
    nn.MultiheadAttention: DecorMultiheadAttention.from_attention,
}

Filter = Callable[[str, nn.Module], bool]
Rank = int | float | None
Ranks = Rank | str | Mapping[str, Rank]

_LOW: Mapping[str | None, Rank] = {**dict.fromkeys((*SITES, None), 1 / 12), "fc2": 1 / 48}
RANK_PRESETS = {"mixed": {**_LOW, "qkv": None}, "low": _LOW}
"""Presets of ranks by site; None stands for layers of no known site. fc2's input is four times as wide as the
others': the same number of dimensions is a smaller part of it."""
Chosen = Mapping[str, tuple[nn.Module, str | None]]
"""Layers by name, with the site at which each stands, if known."""


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d | nn.MultiheadAttention)


def _is_patch_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and tuple(module.stride) == tuple(module.kernel_size) != (1, 1)


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that could hold an R, by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if _is_layer(module)}


def find_sites(model: nn.Module) -> dict[str, dict[str, nn.Module]]:
    """The sites of a model: for each site name, its layers by qualified name, in the model's order."""
    found: dict[str, dict[str, nn.Module]] = {site: {} for site in SITES}
    for name, module in _layers(model).items():
        for site, pattern in _PATTERNS.items():
            # What a pattern says of the name, the class must bear out.
            kinds = {"patch_embed": nn.Conv2d, "qkv": nn.Linear | nn.MultiheadAttention}.get(site, nn.Linear)
            if isinstance(module, kinds) and pattern.fullmatch(name):
                found[site][name] = module
                break
    return found


def _site_names(sites: str | Iterable[str]) -> tuple[str, ...]:
    if isinstance(sites, str):
        names = PRESETS.get(sites, (sites,))
    else:
        names = tuple(sites)
    unknown = [name for name in names if name not in SITES]
    if unknown or not names:
        hint = "; dbpkern.plan(model, step) chooses by measurement" if "auto" in unknown else ""
        raise ValueError(
            f"sites: expected a preset {tuple(PRESETS)} or some of {tuple(SITES)}, got {sites!r}{hint}"
        )
    return tuple(dict.fromkeys(names))


def _describe(found: dict[str, dict[str, nn.Module]], model: nn.Module) -> str:
    """What there is to decorrelate, for error messages."""
    here = [f"{site}: {len(layers)} ({next(iter(layers))}, ...)" for site, layers in found.items() if layers]
    if here:
        return "; ".join(here)
    names = list(_layers(model))
    listing = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"none of the known sites; layers that sites=None with a filter could choose: {listing or 'none'}"


def select(
    model: nn.Module, sites: str | Iterable[str] | None = "sublayers", filter: Filter | None = None
) -> dict[str, tuple[nn.Module, str | None]]:
    """The layers that `decorrelate` with the same arguments would convert: name -> (module, site).

    Raises:
        ValueError: as `decorrelate` does for sites and filters.
    """
    found = find_sites(model)
    if sites is None:
        if filter is None:
            raise ValueError("sites=None: expected a filter(name, module) that chooses the layers")
        site_of = {name: site for site, layers in found.items() for name in layers}
        chosen = {
            name: (module, site_of.get(name))
            for name, module in _layers(model).items()
            if not isinstance(module, nn.Conv2d) or _is_patch_conv(module)
        }
    else:
        names = _site_names(sites)
        for site in names:
            served_inside = site == "proj" and any(
                isinstance(module, nn.MultiheadAttention) for module in found["qkv"].values()
            )
            if served_inside:
                raise ValueError(
                    "site 'proj': nn.MultiheadAttention applies its output projection inside one function "
                    f"({next(iter(found['qkv']))}), where its input cannot be sampled; name the other "
                    "sites: sites=('patch_embed', 'qkv', 'fc1', 'fc2')"
                )
            if not found[site]:
                raise ValueError(
                    f"site {site!r} matches no layer of this model; it has {_describe(found, model)}"
                )
        # In the model's order, so that equal layers lie side by side in their stack.
        site_of = {name: site for site in names for name in found[site]}
        chosen = {name: (m, site_of[name]) for name, m in _layers(model).items() if name in site_of}
    if filter is not None:
        chosen = {name: (m, site) for name, (m, site) in chosen.items() if filter(name, m)}
    if not chosen:
        raise ValueError(f"the filter leaves no layer; the model has {_describe(found, model)}")
    return chosen


def as_decorrelated(module: nn.Module, form: str = "auto", rank: int | None = None) -> Decorrelated:
    """A decorrelated layer over the same Parameters with R = I; `module` itself if it is one already."""
    return module if isinstance(module, Decorrelated) else _CONVERTERS[type(module)](module, form, rank)


def check_kind(name: str, module: nn.Module) -> None:
    """Raise ValueError unless the layer is of a class that has a decorrelated counterpart."""
    if type(module) not in _CONVERTERS and not isinstance(module, Decorrelated):
        raise ValueError(
            f"{name}: expected exactly nn.Linear, nn.Conv2d or nn.MultiheadAttention, got "
            f"{type(module).__module__}.{type(module).__qualname__}, whose forward may differ; "
            "exclude it with filter"
        )


def check_weights(model: nn.Module, chosen: Chosen) -> None:
    """Raise ValueError for layers whose weight is no Parameter of theirs alone, or of a class not known."""
    users: dict[int, list[tuple[nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            users.setdefault(id(parameter), []).append((module, f"{name}.{key}"))
    for name, (module, _) in chosen.items():
        check_kind(name, module)
        weight = module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight
        if weight is None:
            continue  # separate q, k and v projections: whoever takes the layer says so
        if not isinstance(weight, nn.Parameter):
            raise ValueError(
                f"{name}: its weight is not a Parameter but computed from others, as pruning and weight_norm "
                "do, so what R does to it would be lost; exclude it with filter"
            )
        tied = [label for user, label in users[id(weight)] if user is not module]
        if tied:
            raise ValueError(
                f"{name}: its weight is tied to {', '.join(tied)}; what R does to it would change "
                "that layer, too; exclude it with filter"
            )


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


def inputs_of(chosen: Chosen) -> list[list[str]]:
    """The chosen layers, in groups that read one input.

    One block's projections of one site and width do, in timm's and Hugging Face's models; every other layer
    is a group of its own.
    """
    groups: dict[tuple, list[str]] = {}
    for name, (module, site) in chosen.items():
        shares = site in ("qkv", "fc1") and isinstance(module, nn.Linear)
        key = (name.rpartition(".")[0], site, module.in_features) if shares else (name,)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def share_inputs(chosen: Chosen, holders: Mapping[str, object]) -> None:
    """Give one R to the holders of layers that read one input, decorrelated or preconditioned ones."""
    for first, *others in inputs_of(chosen):
        if others:
            tie = object()
            for name in (first, *others):
                holders[name].shared = tie
                holders[name].factors = holders[first].factors


def _check_rank(rank: Rank) -> None:
    """Raise TypeError or ValueError for what is no rank of any layer."""
    if rank is None:
        return
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise TypeError(
            f"rank: expected an integer, a part of the width in (0, 1) or None, got {type(rank).__name__}"
        )
    if isinstance(rank, float) and not 0 < rank < 1:
        raise ValueError(f"rank: expected an integer, or a part of the width in (0, 1), got {rank}")


def _as_integer(rank: Rank, module: nn.Module) -> int | None:
    """The rank that a part of this layer's width stands for: a multiple of 8, as tensor cores like it.

    None, a full R, where that is the whole width.
    """
    if not isinstance(rank, float):
        return rank
    attends = isinstance(module, nn.MultiheadAttention)
    d = module.embed_dim if attends else module.weight.shape[1:].numel()
    r = 8 * math.ceil(round(rank * d / 8, 6))  # 0.07 of 800 is 56 and a rounding error
    return r if r < d else None


def ranks_of(rank: Ranks, chosen: Chosen) -> dict[str, int | None]:
    """The rank of R for each chosen layer, None for a full one; a layer's own goes before its site's."""
    if isinstance(rank, str):
        if rank not in RANK_PRESETS:
            raise ValueError(
                f"rank: expected a number, ranks by site, or one of {tuple(RANK_PRESETS)}, got {rank!r}"
            )
        rank_at = RANK_PRESETS[rank]
        return {name: _as_integer(rank_at[site], module) for name, (module, site) in chosen.items()}
    if not isinstance(rank, Mapping):
        _check_rank(rank)
        return {name: _as_integer(rank, module) for name, (module, _) in chosen.items()}
    for one in rank.values():
        _check_rank(one)
    sites = tuple(dict.fromkeys(site for _, site in chosen.values() if site is not None))
    unknown = [key for key in rank if key not in sites and key not in chosen]
    if unknown:
        raise ValueError(
            f"rank: expected some of the chosen sites {sites} as keys, got {unknown[0]!r}, which is none of "
            "the chosen layers either"
        )
    ranks = {
        name: _as_integer(rank.get(name, rank.get(site)), module) for name, (module, site) in chosen.items()
    }
    for names in inputs_of(chosen):
        if len({ranks[name] for name in names}) > 1:
            given = ", ".join(f"{name}: {ranks[name]}" for name in names)
            raise ValueError(f"rank: expected one rank for layers that read one input, got {given}")
    return ranks


def decorrelate(
    model: nn.Module,
    sites: str | Iterable[str] | None = "sublayers",
    filter: Filter | None = None,
    form: str = "auto",
    rank: Ranks = None,
) -> nn.Module:
    """Replace layers of a model by decorrelated ones, in place.

    R starts as the identity, so the model's outputs stay the same bit for bit; Parameters stay the same
    objects, so an optimizer made before remains valid. Separate q, k and v projections (or gate and up
    projections) that stand side by side share one R. Nothing happens to R until a `DecorSGD` is made.

    Args:
        model: any model; the site names know the ViTs of timm, torchvision and Hugging Face.
        sites: which layers: "sublayers" (patch embedding, qkv, fc1: the inputs of both sublayers), "all"
            (with proj and fc2), or some of "patch_embed", "qkv", "proj", "fc1", "fc2". With None, `filter`
            alone chooses among all linear layers, patch convolutions and `nn.MultiheadAttention`.
        filter: `filter(name, module) -> bool` narrows the choice to the layers it accepts, for example
            `lambda name, module: not name.startswith("decoder")`.
        form: how the layers compute: "auto", "fold" or "apply", see `dbpkern.nn`.
        rank: None for a full R of `d^2` numbers in every layer; an integer r for `R = I + Q S Q^T` with
            `d r + r^2` numbers; a number in (0, 1) for that part of each layer's width d, rounded up to a
            multiple of 8 (from about a third on, a full R takes less time); ranks by site or by layer's name,
            as in `{"fc2": 128}`, where others get a full R; or a preset: "low" (1/12 of the width, and 1/48
            for fc2) or "mixed" (the same, with a full R for qkv).

    Returns:
        The model.

    Raises:
        TypeError: a rank that is no number.
        ValueError: a site that matches nothing (the message lists what exists) or that cannot be served, a
            filter that leaves nothing, a model that is converted or sharded already, tied weights, an unknown
            form, a rank below 1 or above a layer's width, ranks for a site or layer that is not chosen, or
            several for layers that share an R. The model is unchanged then, as it is after a TypeError.
    """
    check_form(form)
    check_stock(model)
    chosen = select(model, sites, filter)
    _check_replaceable(model, chosen)
    ranks = ranks_of(rank, chosen)
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


def fuse(model: nn.Module) -> nn.Module:
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


def _replace(model: nn.Module, new: dict[int, nn.Module]) -> None:
    """Put `new[id(old)]` wherever a module `old` is registered."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if id(child) in new:
                module._modules[name] = new[id(child)]
