"""R in an optimizer's state: what `state_dict` holds beside the moments of each decorrelated weight.

The state of the first weight that an R serves has R (`decor_R`, or `decor_Q` and `decor_S`), its caution, and
the position of the sampling. R goes wherever the optimizer's own state goes, by the same parameter numbers.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from dbpkern.engine import Engine
from dbpkern.stacks import Site
from dbpkern.stock import StockLayer

PREFIX = "decor_"


def _weights(engine: Engine[StockLayer], optimizer: torch.optim.Optimizer) -> dict[int, Site]:
    """The sites by the id of the first of their weights that the optimizer has."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found: dict[int, Site] = {}
    for site in engine.sites:
        weight = next((id(layer.weight) for layer in site.layers if id(layer.weight) in known), None)
        if weight is not None:
            found[weight] = site
    return found


def _entries(engine: Engine[StockLayer], site: Site) -> dict[str, Tensor | int]:
    names = site.layers[0].structure.names
    return {
        **{PREFIX + name: factor for name, factor in zip(names, site.factors, strict=True)},
        PREFIX + "caution": site.caution,
        PREFIX + "step": engine.sampler.step,
        PREFIX + "seed": engine.sampler.seed,
    }


def attach(engine: Engine[StockLayer], optimizer: torch.optim.Optimizer) -> None:
    """Put R into the optimizer's live state of weights that it has met, after a step.

    Some loaders ask the live state, and not `state_dict`, what a parameter has. An optimizer that has not met
    a parameter yet takes an empty state for the sign of it.
    """
    sites = _weights(engine, optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            met = optimizer.state.get(parameter) or parameter.grad is not None
            if met and id(parameter) in sites:
                optimizer.state[parameter].update(_entries(engine, sites[id(parameter)]))


def detach(optimizer: torch.optim.Optimizer) -> None:
    """Take R out of the optimizer's live state."""
    for entry in optimizer.state.values():
        for name in [name for name in entry if str(name).startswith(PREFIX)]:
            del entry[name]


def write(
    engine: Engine[StockLayer], optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
) -> dict[str, Any]:
    """Add R to a `state_dict` of the optimizer; returns it.

    No R of weights that were never stepped, it is the identity. Every parameter has an entry, if an empty
    one: some loaders ask for one of each once there are any.
    """
    sites = _weights(engine, optimizer)
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    numbers = (number for group in state_dict["param_groups"] for number in group["params"])
    for parameter, number in zip(parameters, numbers, strict=True):
        entry, site = dict(state_dict["state"].get(number, {})), sites.get(id(parameter))
        if site is not None and (entry or any(layer.trains for layer in site.layers)):
            entry |= _entries(engine, site)
        state_dict["state"][number] = entry
    return state_dict


def split(
    engine: Engine[StockLayer], optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
) -> tuple[dict[str, Any], list[tuple[Site, dict[str, Any]]]]:
    """Take R out of a `state_dict`: the optimizer's own part, and for each site what it holds.

    Raises:
        ValueError: it holds some R, but not those of this model: other layers, widths or ranks.
    """
    sites = _weights(engine, optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    own: dict[int, dict[str, Any]] = {}
    taken: dict[int, dict[str, Any]] = {}
    for number, entry in state_dict["state"].items():
        own[number] = {k: v for k, v in entry.items() if not str(k).startswith(PREFIX)}
        ours = {k.removeprefix(PREFIX): v for k, v in entry.items() if str(k).startswith(PREFIX)}
        if ours:
            taken[number] = ours
        if not own[number]:
            del own[number]  # an optimizer without state for it
    found = []
    if taken and len(parameters) == len(numbers):
        for parameter, number in zip(parameters, numbers, strict=True):
            site, entry = sites.get(id(parameter)), taken.get(number, {})
            if not entry and (site is None or number not in own):
                continue  # a weight that was never stepped: R is the identity
            expected = {} if site is None else _shapes(_entries(engine, site))
            got = _shapes({PREFIX + k: v for k, v in entry.items()})
            if site is None or expected != got:
                where = "a layer without R" if site is None else site.name
                raise ValueError(
                    f"load_state_dict: R of {where}: expected {expected or None}, got {got or None}"
                )
            found.append((site, entry))
    return {**state_dict, "state": own}, found


def _shapes(entries: dict[str, Tensor | int]) -> dict[str, list[int]]:
    return {
        name.removeprefix(PREFIX): list(value.shape)
        for name, value in entries.items()
        if isinstance(value, Tensor) and value.dim()
    }


@torch.no_grad()
def restore(engine: Engine[StockLayer], found: list[tuple[Site, dict[str, Any]]]) -> None:
    """Take R, caution and the position of the sampling from what `split` found; R is I where none was."""
    engine.drop_samples()
    if not found:
        warnings.warn(
            "load_state_dict: the state holds no R, so R starts from the identity: it was saved without "
            "decorrelation",
            stacklevel=3,
        )
        engine.sampler.seek(engine.decor.seed, 0)
    given = {id(site) for site, _ in found}
    for site in engine.sites:
        if id(site) not in given:
            site.layers[0].structure.reset(*site.factors)
            site.caution.fill_(1.0)
    for site, entry in found:
        for name, factor in zip(site.layers[0].structure.names, site.factors, strict=True):
            factor.copy_(entry[name])
        site.caution.fill_(float(entry["caution"]))
        engine.sampler.seek(int(entry["seed"]), int(entry["step"]))
