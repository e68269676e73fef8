"""Which layers of a model are decorrelated: sites by name, ranks, and which layers read one input."""

import math
import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeGuard

from torch import Tensor, nn

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

Layer = nn.Linear | nn.Conv2d | nn.MultiheadAttention
"""What could hold an R."""

Filter = Callable[[str, nn.Module], bool]
Rank = int | float | None
Ranks = Rank | str | Mapping[str, Rank]

_LOW: Mapping[str | None, Rank] = {**dict.fromkeys((*SITES, None), 1 / 12), "fc2": 1 / 48}
RANK_PRESETS = {"mixed": {**_LOW, "qkv": None}, "low": _LOW}
"""Presets of ranks by site; None stands for layers of no known site. fc2's input is four times as wide as the
others': the same number of dimensions is a smaller part of it."""

Chosen = Mapping[str, tuple[Layer, str | None]]
"""Layers by name, with the site at which each stands, if known."""


def _is_layer(module: nn.Module) -> TypeGuard[Layer]:
    return isinstance(module, Layer)


def _is_patch_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and tuple(module.stride) == tuple(module.kernel_size) != (1, 1)


def _layers(model: nn.Module) -> dict[str, Layer]:
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
    """The names of sites that a preset or the names themselves stand for."""
    if isinstance(sites, str):
        return PRESETS.get(sites, (sites,))
    return tuple(dict.fromkeys(sites))


def check_sites(sites: str | Iterable[str] | None, filter: Filter | None) -> None:
    """Raise ValueError unless these name sites, or leave the choice to a filter."""
    if sites is None:
        if filter is None:
            raise ValueError("sites=None: expected a filter(name, module) that chooses the layers")
        return
    names = _site_names(sites)
    unknown = [name for name in names if name not in SITES]
    if unknown or not names:
        raise ValueError(
            f"sites: expected a preset {tuple(PRESETS)} or some of {tuple(SITES)}, got {sites!r}"
        )


def _describe(found: dict[str, dict[str, nn.Module]], model: nn.Module) -> str:
    """What there is to decorrelate, for error messages."""
    here = [f"{site}: {len(layers)} ({next(iter(layers))}, ...)" for site, layers in found.items() if layers]
    if here:
        return "; ".join(here)
    names = list(_layers(model))
    listing = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"none of the known sites; layers that sites=None with a filter could choose: {listing or 'none'}"


def select(
    model: nn.Module, sites: str | Iterable[str] | None, filter: Filter | None = None
) -> dict[str, tuple[Layer, str | None]]:
    """The layers that `sites` and `filter` choose: name -> (module, site).

    Raises:
        ValueError: unknown sites, one that matches nothing (the message lists what exists) or that cannot be
            served, or a filter that leaves nothing.
    """
    check_sites(sites, filter)
    found = find_sites(model)
    if sites is None:
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


def check_kind(name: str, module: nn.Module) -> None:
    """Raise ValueError unless the layer is of exactly one of the classes that are served."""
    if type(module) not in (nn.Linear, nn.Conv2d, nn.MultiheadAttention):
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


def inputs_of(chosen: Chosen) -> list[list[str]]:
    """The chosen layers, in groups that read one input.

    One block's projections of one site and width do, in timm's and Hugging Face's models; every other layer
    is a group of its own.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, (module, site) in chosen.items():
        key: tuple[object, ...] = (name,)
        if site in ("qkv", "fc1") and isinstance(module, nn.Linear):
            key = (name.rpartition(".")[0], site, module.in_features)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


class SharedInput:
    """What layers that read one input, and have one R, have in common."""

    def __init__(self) -> None:
        self._seen: dict[int, weakref.ref[Tensor]] = {}

    def check(self, layer: object, x: Tensor) -> None:
        """Raise ValueError where the layers turn out to read different inputs, as in class attention."""
        if id(layer) in self._seen:  # the next forward
            self._seen.clear()
        self._seen[id(layer)] = weakref.ref(x)
        inputs = [found() for found in self._seen.values()]
        if any(found is not x for found in inputs if found is not None):
            raise ValueError(
                "decorrelation gives one R to q, k and v of a block (and to the two halves of a gated MLP): "
                "expected them to read the same tensor, got different ones, as in cross-attention; keep "
                "these layers out with filter"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"_seen": {}}


class Shares(Protocol):
    """A layer that holds an R, as far as others may hold the same."""

    factors: tuple[Tensor, ...]
    """The tensors that hold R: one, or Q and S."""
    shared: SharedInput | None
    """Layers that hold the same object read one input and have one R."""


def share_inputs(chosen: Chosen, holders: Mapping[str, Shares]) -> None:
    """Give one R to the holders of layers that read one input, decorrelated or preconditioned ones."""
    for first, *others in inputs_of(chosen):
        if others:
            tie = SharedInput()
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


def check_ranks(rank: Ranks) -> None:
    """Raise TypeError or ValueError for what can be no ranks of any layers."""
    if isinstance(rank, str):
        if rank not in RANK_PRESETS:
            raise ValueError(
                f"rank: expected a number, ranks by site, or one of {tuple(RANK_PRESETS)}, got {rank!r}"
            )
        return
    for one in rank.values() if isinstance(rank, Mapping) else (rank,):
        _check_rank(one)


def _as_integer(rank: Rank, module: Layer) -> int | None:
    """The rank that a part of this layer's width stands for: a multiple of 8, as tensor cores like it.

    None, a full R, where that is the whole width.
    """
    if not isinstance(rank, float):
        return rank
    d = module.embed_dim if isinstance(module, nn.MultiheadAttention) else module.weight.shape[1:].numel()
    r = 8 * math.ceil(round(rank * d / 8, 6))  # 0.07 of 800 is 56 and a rounding error
    return r if r < d else None


def ranks_of(rank: Ranks, chosen: Chosen) -> dict[str, int | None]:
    """The rank of R for each chosen layer, None for a full one; a layer's own goes before its site's.

    Raises:
        TypeError: a rank that is no number.
        ValueError: an unknown preset, a number out of range, ranks for a site or layer that is not chosen, or
            several for layers that share an R.
    """
    check_ranks(rank)
    if isinstance(rank, str):
        rank_at = RANK_PRESETS[rank]
        return {name: _as_integer(rank_at[site], module) for name, (module, site) in chosen.items()}
    if not isinstance(rank, Mapping):
        return {name: _as_integer(rank, module) for name, (module, _) in chosen.items()}
    sites = tuple(dict.fromkeys(site for _, site in chosen.values() if site is not None))
    unknown = [key for key in rank if key not in sites and key not in chosen]
    if unknown:
        raise ValueError(
            f"rank: expected some of the chosen sites {sites} as keys, got {unknown[0]!r}, which is none of "
            "the chosen layers either"
        )
    ranks = {
        name: _as_integer(rank.get(name, None if site is None else rank.get(site)), module)
        for name, (module, site) in chosen.items()
    }
    for names in inputs_of(chosen):
        if len({ranks[name] for name in names}) > 1:
            given = ", ".join(f"{name}: {ranks[name]}" for name in names)
            raise ValueError(f"rank: expected one rank for layers that read one input, got {given}")
    return ranks
