"""The engine: all R of a model, and the step that moves them.

`DecorAdamW`, `DecorMuon`, `DecorPreconditioner` and `DecorSGD` have one each. An engine knows layers that
hold an R, and keeps those of equal kind in one stack.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from dbpkern import distributed, ops
from dbpkern.capture import Sampler
from dbpkern.config import Decor
from dbpkern.ops._common import check_eta
from dbpkern.stacks import HALVES, STACKS, Holder, Site, Stack, Step

HolderT = TypeVar("HolderT", bound=Holder)


def _moved(layer: Holder) -> bool:
    """Whether a gradient has come to the weight that is not zero; waits for its device."""
    gradient = layer.weight.grad
    return gradient is not None and bool(gradient.any())


class Engine(Generic[HolderT]):
    """All R of some layers, and the rule by which they move.

    Args:
        layers: those that hold an R, by name.
        decor: the rule; its sites, filter and ranks have had their say in `layers`.
    """

    def __init__(self, layers: Mapping[str, HolderT], decor: Decor) -> None:
        self.decor = decor
        self.eta = decor.eta
        """The rate of R, a number or a 0-d tensor; may be set between steps."""
        self.sampler = Sampler(decor.sample, decor.seed, decor.every)
        self.layers = dict(layers)
        self.sites = self._make_sites()
        self._stacks: list[Stack] = []
        self._checked = False
        self._halves: bool | None = None
        self.stacks()  # now rather than at the first step: from here on R keep their addresses

    def _make_sites(self) -> list[Site]:
        sites: dict[int, Site] = {}
        for name, layer in self.layers.items():
            key = id(layer) if layer.shared is None else id(layer.shared)
            if key in sites:
                sites[key].layers.append(layer)
            else:
                sites[key] = Site(name, layer, self.sampler)
        for site in sites.values():
            site.choose_source()
            site.slot.kappa = self.decor.kappa
            site.slot.linear = self.decor.limit is None and not self.decor.scale_free
        return list(sites.values())

    @property
    def names(self) -> list[str]:
        """The layer that each R belongs to (the first, where several share one), in the model's order."""
        return [site.name for site in self.sites]

    def stacks(self) -> list[Stack]:
        """The stacks of R, rebuilt where a module got other storage since the last look."""
        taken = [site.name for site in self.sites if site.source.slot_key is not site.slot.key]
        if taken:
            raise RuntimeError(
                f"the samples of {taken[0]} no longer come here: the layer's R has another optimizer since, "
                "or was fused"
            )
        if not self._stacks or not all(stack.holds() for stack in self._stacks):
            kinds: dict[tuple[Any, ...], list[Site]] = {}
            for site in self.sites:
                kinds.setdefault(site.kind, []).append(site)
            self._stacks = [STACKS[structure](sites) for (structure, *_), sites in kinds.items()]
        return self._stacks

    def factors(self) -> list[Tensor]:
        """All that a step changes: each R, or its Q and S, in the order of `names`."""
        return [factor for site in self.sites for factor in site.factors]

    def drop_samples(self) -> None:
        """Forget the rows sampled since the last step, for steps that are to be skipped."""
        for site in self.sites:
            site.slot.clear()

    @torch.no_grad()
    def step(self, scale: float | Tensor = 1.0, found_inf: Tensor | None = None) -> None:
        """Update every R from the rows sampled since the last step; layers without rows keep theirs.

        With a process group initialised this is a collective: every process must call it. A step before which
        no layer met any input changes nothing.

        Args:
            scale: multiplies eta.
            found_inf: 0-d, on the device; where it is not 0, R rests.

        Raises:
            RuntimeError: as `check_sampled`.
            ValueError: in the first step, processes with other R, types of device or rules; or an eta out of
                range.
        """
        for site in self.sites:
            if not site.source.trains and any(layer.trains for layer in site.layers):
                site.choose_source()  # it was frozen since, or another no longer is
        if not self.check_sampled():
            self.stacks()  # raises where the samples go elsewhere
            return
        if not self.sampler.due:
            self.sampler.advance()
            return
        stacks = self.stacks()
        together = distributed.world_size() > 1
        factor = scale * self.decor.every
        eta = self.eta if not isinstance(factor, Tensor) and factor == 1 else self.eta * factor
        if not isinstance(eta, Tensor):
            check_eta(eta)
        if self._halves is None and together:
            self._halves = self._agree(stacks)
        for stack in stacks:
            stack.halves = bool(self._halves)
        keep = None if found_inf is None else (found_inf == 0).to(stacks[0].rates.dtype)
        step = Step(eta, self.decor.kappa, self.decor.scale_free, self.decor.limit, keep)
        # In turns: every stack has sent its statistics before the first waits for those of the others.
        under_way, done = [stack.step(step) for stack in stacks], object()
        while under_way:
            under_way = [updates for updates in under_way if next(updates, done) is not done]
        # Full R have moved in their stacks; low ranks have queued.
        ops.lowrank_step_(step.lowrank, step.eta, step.kappa, step.scale_free, step.limit)
        for site in self.sites:
            site.slot.settle()
        self.sampler.advance()

    def _agree(self, stacks: list[Stack]) -> bool:
        """Check that all processes have the same to do; returns whether all sample rows of 16 bits on GPUs.

        Once: a process without rows cannot tell for itself, and all must compute alike. Otherwise processes
        would wait for each other for ever.
        """
        device = stacks[0].factors[0].device
        stacked = [
            [(tuple(factor.shape), str(factor.dtype), factor.device.type) for factor in stack.factors]
            for stack in stacks
        ]
        names = ("kappa", "scale_free", "limit", "every")
        rule = {name: getattr(self.decor, name) for name in names} | {"eta": float(self.eta)}
        if distributed.differs(repr((stacked, rule)), device):
            raise ValueError(
                "expected the same R, types of device and rule on all processes; this one has "
                f"{stacked} and {rule}, another has others"
            )
        wide = not all(rows.dtype in HALVES for stack in stacks for _, rows in stack.runs())
        return device.type == "cuda" and not distributed.any_process(wide, device)

    def traffic(self) -> list[distributed.Traffic]:
        """What this process sent in the last step that updated R, for each stack of R of one width.

        In bytes, of the numbers that the collectives were given, by the formulas of a ring: see
        `dbpkern.distributed`. Empty before the first step, and where no process group is initialised.
        """
        return [stack.traffic for stack in self._stacks if stack.traffic is not None]

    def rates(self) -> dict[str, Tensor]:
        """The rate of each R in the last step that updated it, after limit, as 0-d tensors by layer name."""
        pairs = (pair for stack in self.stacks() for pair in zip(stack.sites, stack.rates, strict=True))
        found = {site.name: rate for site, rate in pairs}
        return {name: found[name] for name in self.names}

    @torch.no_grad()
    def report(self) -> str:
        """A table for people: each R, with what it serves and what its last step did. Reads the device.

        Columns: the first layer of the R and how many more read the same input; the site, where the layer's
        name has told one; the width and the form of R; the rows that the last step used; how far R is from
        the identity, `||R - I||_F / sqrt(d)`; and its rate after the limiter.
        """
        rates = self.rates()
        rows = [("layer", "site", "width", "R", "rows", "|R - I|", "eta")]
        for site in self.sites:
            first, more = site.layers[0], len(site.layers) - 1
            d = first.weight.shape[1:].numel()
            away = first.structure.matrix(*site.factors) - torch.eye(d, device=site.factors[0].device)
            rows.append(
                (
                    site.name + (f" and {more} more" if more else ""),
                    getattr(first, "site", None) or "-",
                    str(d),
                    "full" if len(site.factors) == 1 else f"rank {len(site.factors[1])}",
                    str(site.slot.count(stale=True)),
                    f"{float(away.norm()) / d**0.5:.3g}",
                    f"{float(rates[site.name]):.3g}",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)

    def caution(self) -> dict[str, float]:
        """The factors below 1 on eta, by layer name: 0.5 to the number of steps with samples not finite.

        Reads the device's memory.
        """
        values = torch.stack([site.caution for site in self.sites]).tolist()
        return {name: value for name, value in zip(self.names, values, strict=True) if value < 1.0}

    def restore_caution(self, caution: Mapping[str, float]) -> None:
        """Set what `caution()` has told; layers that it does not name are as at the start."""
        for site in self.sites:
            site.caution.fill_(caution.get(site.name, 1.0))

    @torch.no_grad()
    def loss(self) -> dict[str, Tensor]:
        """Decorrelation loss of each R, by layer name, as 0-d tensors on its device.

        `((1 - kappa) ||offdiag G||_F^2 + kappa ||diag G - 1||^2) / d^2` of the rows sampled since the last
        step or, right after a step, of the rows that it used, with R as it is now. Computed when called;
        a collective where a process group is initialised, and then `d x d` also for a low-rank R. Layers
        without rows are left out.
        """
        kappa = self.decor.kappa
        pending = any(site.slot.pending for site in self.sites)
        # All processes must mean the same rows, also those that have none since the last step.
        stale = not distributed.any_process(pending, self.sites[0].factors[0].device)
        losses: dict[str, Tensor] = {}
        for stack in self.stacks():
            values, counts = stack.losses(kappa, stale)
            losses |= {s.name: v for s, v, n in zip(stack.sites, values, counts.tolist(), strict=True) if n}
        return {name: losses[name] for name in self.names if name in losses}

    def __getstate__(self) -> dict[str, Any]:
        # A filter has had its say, and may be a function that cannot be pickled.
        decor = replace(self.decor, sites="all", filter=None)
        where = (self.sampler.seed, self.sampler.step)
        factors = {name: layer.factors for name, layer in self.layers.items()}
        kept = {"layers": self.layers, "factors": factors, "eta": self.eta, "_checked": self._checked}
        return {**kept, "decor": decor, "sampling": where, "caution": self.caution()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        sampling, caution, factors = (state.pop(name) for name in ("sampling", "caution", "factors"))
        self.__dict__.update(state)
        for name, layer in self.layers.items():
            layer.factors = factors[name]
        self.sampler = Sampler(self.decor.sample, sampling[0], self.decor.every)
        self.sampler.seek(*sampling)
        self.sites = self._make_sites()
        self.restore_caution(caution)
        self._stacks, self._halves = [], None
        self.stacks()

    def check_sampled(self) -> bool:
        """Whether layers have met an input since the last step; the first time, whether all of them have.

        To be called before weights change. With a process group initialised the first is a collective.

        Raises:
            RuntimeError: a layer has a gradient, but its input was not sampled. `Decor(unsampled="warn")`
                makes it a warning, as it is for layers without a gradient.
        """
        together = distributed.world_size() > 1
        if self._checked:
            return self.sampler.seen or together
        device = self.sites[0].factors[0].device
        flags = [self.sampler.seen, *(site.slot.pending for site in self.sites)]
        seen, *sampled = distributed.any_processes(flags, device)
        # Loaders of checkpoints make a step with gradients of zero. Others should have given samples.
        if not seen and not any(map(_moved, self.layers.values())):
            return False
        if seen and not self.sampler.due:
            return True
        self._checked = True
        resting = [site for site, found in zip(self.sites, sampled, strict=True) if not found]
        silent = [site for site in resting if any(map(_moved, site.layers))]
        if not resting:
            return seen
        names = ", ".join(site.name for site in (silent or resting)[:5])
        message = (
            f"{len(silent or resting)} of {len(self.sites)} layers sampled no input before the first step"
        )
        if not silent:
            why = "and no gradient came to their weights, so that their R rest"
            warnings.warn(f"{message}, {why}: {names}", stacklevel=3)
            return seen
        message += (
            f", though a gradient came to their weights: {names}. Eval mode does this, models that read a "
            "weight without calling its layer, and ones that were compiled and run before their optimizer "
            "was made"
        )
        if self.decor.unsampled == "warn":
            warnings.warn(message, stacklevel=3)
            return seen
        raise RuntimeError(
            f'{message}. Leave them out with Decor(filter=...), or let their R rest: Decor(unsampled="warn")'
        )
