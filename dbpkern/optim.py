"""`DecorSGD`: the optimizer of the decorrelation matrices."""

import math
import warnings
from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dbpkern import distributed, ops
from dbpkern.nn import Decorrelated
from dbpkern.ops._common import check_kappa, check_lr
from dbpkern.sampling import Sampler, Slot


class _Site:
    """One R: the layers that hold it (several where projections share an input) and their samples."""

    def __init__(self, name: str, layer: Decorrelated, sampler: Sampler) -> None:
        self.name = name
        self.layers = [layer]
        self.slot = Slot(layer, sampler)

    @property
    def R(self) -> Tensor:
        return self.layers[0].R

    def bind(self, R: Tensor) -> None:
        for layer in self.layers:
            layer.R = R


class _Stack:
    """Sites of equal width, dtype and device; their R lie in one tensor `[L, d, d]`."""

    def __init__(self, sites: list[_Site]) -> None:
        self.sites = sites
        with torch.no_grad():
            self.R = torch.stack([site.R for site in sites])
        for site, R in zip(sites, self.R, strict=True):
            site.bind(R)
        self.samples: dict[tuple[int, int], Tensor] = {}

    def holds(self) -> bool:
        """Whether the layers' R still are the parts of this stack."""
        start, size = self.R.data_ptr(), self.R[0].nbytes
        return all(
            layer.R.data_ptr() == start + i * size and layer.R.dtype == self.R.dtype
            for i, site in enumerate(self.sites)
            for layer in site.layers
        )

    def runs(self, stale: bool = False) -> list[tuple[slice, Tensor]]:
        """The samples: (which sites, their rows `[L', n, d]`) for each run of sites with equal n > 0.

        Rows from before the last step count only with `stale`.
        """
        found = []
        start = 0
        for count, group in groupby(self.sites, key=lambda site: site.slot.count(stale)):
            sites = list(group)
            where = slice(start, start + len(sites))
            start = where.stop
            if count:
                found.append((where, self._rows(where, sites, count)))
        return found

    def _rows(self, where: slice, sites: list[_Site], count: int) -> Tensor:
        buffer = self.samples.get((where.start, where.stop))
        lands = buffer is not None and all(
            site.slot.used == count and site.slot.room.data_ptr() == part.data_ptr()
            for site, part in zip(sites, buffer, strict=True)
        )
        if not lands:
            # The first step, or more rows than before: gather once, and give every site its room in the
            # new buffer, so that later captures need no gathering.
            buffer = torch.stack([site.slot.gather() for site in sites])
            self.samples = {
                k: v for k, v in self.samples.items() if k[1] <= where.start or k[0] >= where.stop
            }
            self.samples[where.start, where.stop] = buffer
            for site, part in zip(sites, buffer, strict=True):
                site.slot.house(part)
        return buffer[:, :count]


class DecorSGD(torch.optim.Optimizer):
    """Updates every R of a model by the decorrelation rule `R <- R - lr M R`.

    Call `step()` after the main optimizer's:

        loss.backward(); optimizer.step(); decor.step()

    While it lives, every converted layer in training mode copies a random sample of its input rows aside
    in each backward. `step()` decorrelates the samples, forms their statistics (averaged over processes
    where a process group is initialised) and updates all R of equal width together, without waiting for
    the device. R rests in layers whose weight is frozen or which are in eval mode.

    It is a `torch.optim.Optimizer`, so learning-rate schedulers attach to it. It finds R in the modules at
    every step: `.to()`, `load_state_dict` and the like are safe in between. Afterwards R are views of one
    tensor per width.

    Args:
        model: a model with decorrelated layers.
        lr: eta >= 0 (arXiv 2510.14657 uses a constant 5e-4), a number or a 0-d tensor.
        kappa: weight in [0, 1] of the unit-variance term (arXiv 2405.02385); 0 for pure decorrelation.
        sample: fraction in (0, 1] of rows to sample, without replacement; at least one row is taken.
        seed: of the sampling.

    Raises:
        TypeError: `model` is not a module.
        ValueError: no decorrelated layer in the model, or a number out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 5e-4,
        kappa: float = 0.0,
        sample: float = 0.1,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"DecorSGD: expected a model, got {type(model).__name__}")
        if isinstance(lr, Tensor) and lr.dim():
            raise ValueError(f"lr: expected a number or a 0-d tensor, got shape {list(lr.shape)}")
        check_lr(float(lr))
        check_kappa(kappa)
        if not (math.isfinite(sample) and 0.0 < sample <= 1.0):
            raise ValueError(f"sample: expected a fraction in (0, 1], got {sample}")
        if isinstance(model, DistributedDataParallel) and model.broadcast_buffers:
            warnings.warn(
                "DistributedDataParallel(broadcast_buffers=True) sends every R before each forward, though "
                "they are equal on all processes; pass broadcast_buffers=False (in newer versions of torch: "
                "forward_sync_buffers=False)",
                stacklevel=2,
            )
        self._sampler = Sampler(sample, seed)
        self._sites = self._make_sites(
            [(name, module) for name, module in model.named_modules() if isinstance(module, Decorrelated)]
        )
        if not self._sites:
            raise ValueError(
                "DecorSGD: expected a model with decorrelated layers; call decorrelate(model) first"
            )
        self._stacks: list[_Stack] = []
        self._checked = False
        super().__init__([site.R for site in self._sites], {"lr": lr, "kappa": kappa})
        self._refresh()  # now rather than at the first step: from here on R keep their addresses

    def _make_sites(self, layers: list[tuple[str, Decorrelated]]) -> list[_Site]:
        sites: dict[int, _Site] = {}
        for name, layer in layers:
            key = id(layer) if layer.shared is None else id(layer.shared)
            if key in sites:
                sites[key].layers.append(layer)
            else:
                sites[key] = _Site(name, layer, self._sampler)
        for site in sites.values():
            # Layers with a common input need one sample of it: from one that trains, if any does.
            source = next((layer for layer in site.layers if layer.trains), site.layers[0])
            site.slot.layer = source
            for layer in site.layers:
                layer.attach(site.slot if layer is source else None)
        return list(sites.values())

    @property
    def names(self) -> list[str]:
        """The layer that each R belongs to (the first, where several share one), in the model's order."""
        return [site.name for site in self._sites]

    def _refresh(self) -> list[_Stack]:
        """The stacks of R, rebuilt where a module got other storage since the last look."""
        taken = [site.name for site in self._sites if site.slot.layer.slot_key is not site.slot.key]
        if taken:
            raise RuntimeError(
                f"DecorSGD: the samples of {taken[0]} no longer come here: another DecorSGD was made for "
                "this model since, or it was fused"
            )
        if not self._stacks or not all(stack.holds() for stack in self._stacks):
            kinds: dict[tuple, list[_Site]] = {}
            for site in self._sites:
                kinds.setdefault((site.R.shape, site.R.dtype, site.R.device), []).append(site)
            self._stacks = [_Stack(sites) for sites in kinds.values()]
            self.param_groups[0]["params"] = [site.R for site in self._sites]
        return self._stacks

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the rows sampled since the last step, for steps that are to be skipped."""
        for site in self._sites:
            site.slot.clear()
        self._sampler.advance()

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """Update every R from the rows sampled since the last step; layers without rows keep theirs.

        With a process group initialised this is a collective: every process must call it.
        """
        if closure is not None:
            raise ValueError("DecorSGD.step: expected no closure: R is not a function of the task loss")
        stacks = self._refresh()
        self._warn_of_silent_layers()
        group = self.param_groups[0]
        lr, kappa = group["lr"], group["kappa"]
        if not isinstance(lr, Tensor):
            check_lr(lr)
        for stack in stacks:
            if distributed.world_size() > 1:
                M, *_ = self._statistics(stack, kappa)
                ops.apply_(stack.R, M, lr)
                continue
            for where, rows in stack.runs():
                R = stack.R[where]
                ops.update_(R, ops.transform(rows.to(R.dtype), R), lr, kappa)
        for site in self._sites:
            if site.slot.pending:
                site.slot.pending = False  # the rows stay for loss()
            else:
                site.slot.clear()  # those of an older step do not
        self._sampler.advance()

    def _statistics(self, stack: _Stack, kappa: float, stale: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """M, a and row counts of a stack, over all processes.

        Layers without rows here still take part: other processes may have some.
        """
        L, d, _ = stack.R.shape
        M = stack.R.new_zeros(L, d, d)
        a = stack.R.new_zeros(L, d)
        counts = stack.R.new_zeros(L)
        for where, rows in stack.runs(stale):
            R = stack.R[where]
            M[where], a[where] = ops.correlation(ops.transform(rows.to(R.dtype), R), kappa)
            counts[where] = rows.shape[1]
        if distributed.world_size() > 1:
            return distributed.average_statistics(M, a, counts)
        return M, a, counts

    @torch.no_grad()
    def loss(self) -> dict[str, Tensor]:
        """Decorrelation loss of each R, by layer name, as 0-d tensors on its device.

        `((1 - kappa) ||offdiag G||_F^2 + kappa ||diag G - 1||^2) / d^2` of the rows sampled since the last
        step or, right after a step, of the rows that it used, with R as it is now. Computed when called;
        a collective where a process group is initialised. Layers without rows are left out.
        """
        kappa = self.param_groups[0]["kappa"]
        pending = any(site.slot.pending for site in self._sites)
        # All processes must mean the same rows, also those that have none since the last step.
        stale = not distributed.any_process(pending, self._sites[0].R.device)
        losses: dict[str, Tensor] = {}
        for stack in self._refresh():
            off, a, counts = self._statistics(stack, 0.0, stale)  # kappa = 0: the off-diagonal part of G
            d = a.shape[1]
            values = ((1 - kappa) * off.square().sum((1, 2)) + kappa * (a - 1).square().sum(1)) / d**2
            losses |= {s.name: v for s, v, n in zip(stack.sites, values, counts.tolist(), strict=True) if n}
        return {name: losses[name] for name in self.names if name in losses}

    def _warn_of_silent_layers(self) -> None:
        if self._checked:
            return
        self._checked = True
        silent = [site.name for site in self._sites if not site.slot.pending]
        if silent:
            warnings.warn(
                f"DecorSGD: {len(silent)} of {len(self._sites)} layers sampled no input before the first "
                f"step, so their R rests: {', '.join(silent[:5])}{', ...' if len(silent) > 5 else ''}. "
                "Frozen weights and eval mode do this, and models that read a weight without calling its "
                "layer",
                stacklevel=3,
            )

    def state_dict(self) -> dict:
        """Rate, kappa and the sampling's seed and position; R itself is in the model's state_dict."""
        state = super().state_dict()
        state["sampling"] = {"seed": self._sampler.seed, "step": self._sampler.step}
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore `state_dict()`; rows sampled since the last step are dropped.

        Raises:
            ValueError: it was made for another number of layers, or by another optimizer.
        """
        if "sampling" not in state_dict:
            raise ValueError(
                "DecorSGD.load_state_dict: expected the state of a DecorSGD, got another optimizer's"
            )
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "sampling"})
        for site in self._sites:
            site.slot.clear()
        self._sampler.seek(**state_dict["sampling"])

    def __getstate__(self) -> dict:
        state = super().__getstate__()
        layers = [(site.name, layer) for site in self._sites for layer in site.layers]
        return state | {"decor": (layers, self._sampler.sample, self._sampler.seed, self._sampler.step)}

    def __setstate__(self, state: dict) -> None:
        if "decor" not in state:  # Optimizer.load_state_dict comes here, too
            super().__setstate__(state)
            return
        layers, sample, seed, step = state.pop("decor")
        super().__setstate__(state)
        self._sampler = Sampler(sample, seed)
        self._sampler.seek(seed, step)
        self._sites = self._make_sites(layers)
        self._stacks = []
        self._checked = True
