"""`DecorSGD`: the optimizer of the decorrelation matrices."""

import math
import warnings
import weakref
from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dbpkern import distributed, ops
from dbpkern.nn import Decorrelated, Full, LowRank
from dbpkern.ops._common import check_kappa, check_lr
from dbpkern.sampling import Rule, Sampler, Slot


def _for_tensor_cores(rows: Tensor) -> bool:
    """Whether rows stay as they are: 16 bits on a GPU. Elsewhere they are widened to R's dtype."""
    return rows.is_cuda and rows.itemsize < 4


class _Site:
    """One R: the layers that hold it (several where projections share an input) and their samples."""

    def __init__(self, name: str, layer: Decorrelated, sampler: Sampler, rule: Callable[[], Rule]) -> None:
        self.name = name
        self.layers = [layer]
        self.slot = Slot(layer, sampler, rule)

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The tensors that hold the R: one, or Q and S."""
        return self.layers[0].factors

    @property
    def kind(self) -> tuple:
        """What sites must agree in to lie in one stack."""
        return (type(self.layers[0].structure), *((f.shape, f.dtype, f.device) for f in self.factors))

    def bind(self, factors: tuple[Tensor, ...]) -> None:
        for layer in self.layers:
            layer.factors = factors


class _Stack:
    """Sites whose R are of one kind; the factors of all lie in one tensor each, with the layer in front."""

    halves = False
    """Whether all processes sample rows of 16 bits on GPUs; known where there are several processes."""

    def __init__(self, sites: list[_Site]) -> None:
        self.sites = sites
        with torch.no_grad():
            self.factors = tuple(
                torch.stack(parts) for parts in zip(*(site.factors for site in sites), strict=True)
            )
        for site, *factors in zip(sites, *self.factors, strict=True):
            site.bind(tuple(factors))
        self.samples: dict[tuple[int, int], Tensor] = {}

    def holds(self) -> bool:
        """Whether the layers' factors still are the parts of this stack."""
        return all(
            part.data_ptr() == whole.data_ptr() + i * part.nbytes and part.dtype == whole.dtype
            for i, site in enumerate(self.sites)
            for layer in site.layers
            for part, whole in zip(layer.factors, self.factors, strict=True)
        )

    def step(self, lr: float | Tensor, kappa: float) -> None:
        """Update every R from the rows sampled since the last step."""
        raise NotImplementedError

    def decorrelated(self, where: slice, rows: Tensor) -> Tensor:
        """z of the rows `[L', n, d]` of the sites `where`."""
        raise NotImplementedError

    def losses(self, kappa: float, stale: bool) -> tuple[Tensor, Tensor]:
        """Decorrelation losses `[L]` of the rows of all processes, and the numbers of rows `[L]`."""
        if distributed.world_size() > 1:
            # Sums of squares over rows that lie on different processes need the correlations themselves.
            off, a, counts = self.correlations(0.0, stale)
            return _loss(off.square().sum((1, 2)), a, kappa), counts
        like = self.factors[0]
        losses, counts = like.new_zeros(len(self.sites)), like.new_zeros(len(self.sites))
        for where, rows in self.runs(stale):
            losses[where] = _loss_of_rows(self.decorrelated(where, rows), kappa)
            counts[where] = rows.shape[1]
        return losses, counts

    def correlations(self, kappa: float, stale: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """M `[L, d, d]`, a `[L, d]` and row counts `[L]`, of many processes.

        Layers without rows here still take part: other processes may have some.
        """
        L, d, _ = self.factors[0].shape
        M, a, counts = (self.factors[0].new_zeros(L, *shape) for shape in ((d, d), (d,), ()))
        for where, rows in self.runs(stale):
            M[where], a[where] = ops.correlation(self.decorrelated(where, rows), kappa)
            counts[where] = rows.shape[1]
        return distributed.average_statistics(M, a, counts)

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


class _FullStack(_Stack):
    """R `[L, d, d]`."""

    def step(self, lr: float | Tensor, kappa: float) -> None:
        (R,) = self.factors
        if distributed.world_size() > 1:
            M, *_ = self.correlations(kappa)
            # In 16 bits, M and R are the operands that they are with one process.
            ops.apply_(R, M.bfloat16() if self.halves else M, lr)
            return
        runs = self.runs()
        proposals = [self._proposed(where, Rule.of(lr, kappa)) for where, _ in runs]  # before any R changes
        for (where, rows), proposed in zip(runs, proposals, strict=True):
            if proposed is None:
                ops.update_(R[where], self.decorrelated(where, rows), lr, kappa)
            else:
                torch._foreach_copy_(list(R[where]), proposed)

    def _proposed(self, where: slice, rule: Rule) -> list[Tensor] | None:
        """The R that the sites `where` made in their forwards, if all did, by this rule from this R."""
        found = []
        for site in self.sites[where]:
            proposal, (R,) = site.slot.proposal, site.factors
            if (
                proposal is None
                or not proposal.rule.same(rule)
                or proposal.base != (R.data_ptr(), R._version)
            ):
                return None
            found.append(proposal.R)
        return found

    def decorrelated(self, where: slice, rows: Tensor) -> Tensor:
        (R,) = self.factors
        return ops.transform(rows if _for_tensor_cores(rows) else rows.to(R.dtype), R[where])


class _LowRankStack(_Stack):
    """Q `[L, d, r]` and S `[L, r, r]`."""

    def step(self, lr: float | Tensor, kappa: float) -> None:
        Q, S = self.factors
        if distributed.world_size() > 1:
            ops.lowrank_apply_(Q, S, *self._statistics(), lr, kappa)
            return
        for where, rows in self.runs():
            ops.lowrank_apply_(Q[where], S[where], *self._of_rows(where, rows), lr, kappa)

    def _of_rows(self, where: slice, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        Q = self.factors[0]
        # 16-bit rows go as they are: the op widens them where it must.
        return ops.lowrank_statistics(rows if rows.itemsize < 4 else rows.to(Q.dtype), Q[where])

    def _statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        """B, Y and c of the whole stack, over all processes."""
        Q, S = self.factors
        B, Y, c = torch.zeros_like(S), torch.zeros_like(Q), torch.zeros_like(Q[:, :, 0])
        counts = Q.new_zeros(len(Q))
        for where, rows in self.runs():
            B[where], Y[where], c[where] = self._of_rows(where, rows)
            counts[where] = rows.shape[1]
        *averages, _ = distributed.average_lowrank_statistics(B, Y, c, counts)
        return tuple(averages)

    def decorrelated(self, where: slice, rows: Tensor) -> Tensor:
        Q, S = self.factors
        return ops.lowrank_transform(rows.to(Q.dtype), Q[where], S[where])


_STACKS = {Full: _FullStack, LowRank: _LowRankStack}


def _loss(off: Tensor, a: Tensor, kappa: float) -> Tensor:
    """The losses `[L]` from `||offdiag G||_F^2 [L]` and `diag G [L, d]`."""
    return ((1 - kappa) * off + kappa * (a - 1).square().sum(1)) / a.shape[1] ** 2


def _loss_of_rows(z: Tensor, kappa: float) -> Tensor:
    """The losses `[L']` of rows `z [L', n, d]`, by the smaller of their two Gram matrices."""
    n, d = z.shape[1:]
    if n >= d:
        off, a = ops.correlation(z)
        return _loss(off.square().sum((1, 2)), a, kappa)
    a = torch.linalg.vector_norm(z, dim=1).square_().div_(n)
    squares = torch.bmm(z, z.mT).div_(n).square().sum((1, 2))  # ||z z^T||_F = ||z^T z||_F
    return _loss((squares - a.square().sum(1)).clamp(min=0), a, kappa)


class DecorSGD(torch.optim.Optimizer):
    """Updates every R of a model by the decorrelation rule `R <- R - lr M R`.

    Call `step()` after the main optimizer's:

        loss.backward(); optimizer.step(); decor.step()

    While it lives, every converted layer in training mode copies a random sample of its input rows aside
    in each backward. `step()` decorrelates the samples, forms their statistics (averaged over processes
    where a process group is initialised) and updates all R of equal width together, without waiting for
    the device. R rests in layers whose weight is frozen or which are in eval mode. For a low-rank R,
    `ops.lowrank_apply_` states the rule.

    It is a `torch.optim.Optimizer`, so learning-rate schedulers attach to it. It finds R in the modules at
    every step: `.to()`, `load_state_dict` and the like are safe in between. Afterwards R, or Q and S, are
    views of one tensor per width and rank.

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
        self._halves: bool | None = None
        super().__init__(self._factors(), {"lr": lr, "kappa": kappa})
        self._refresh()  # now rather than at the first step: from here on R keep their addresses

    def _make_sites(self, layers: list[tuple[str, Decorrelated]]) -> list[_Site]:
        sites: dict[int, _Site] = {}
        owner = weakref.ref(self)  # or the slots would keep alive whom they must not outlive

        def rule() -> Rule:
            group = owner().param_groups[0]
            return Rule.of(group["lr"], group["kappa"])

        for name, layer in layers:
            key = id(layer) if layer.shared is None else id(layer.shared)
            if key in sites:
                sites[key].layers.append(layer)
            else:
                sites[key] = _Site(name, layer, self._sampler, rule)
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
                kinds.setdefault(site.kind, []).append(site)
            self._stacks = [_STACKS[structure](sites) for (structure, *_), sites in kinds.items()]
            self.param_groups[0]["params"] = self._factors()
        return self._stacks

    def _factors(self) -> list[Tensor]:
        """All that `step` changes: each R, or its Q and S, in the order of `names`."""
        return [factor for site in self._sites for factor in site.factors]

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
        if self._halves is None and distributed.world_size() > 1:
            # Once: a process without rows cannot tell for itself, and all must compute alike.
            samples = [rows for stack in stacks for _, rows in stack.runs()]
            wide = not all(_for_tensor_cores(rows) for rows in samples)
            device = stacks[0].factors[0].device
            self._halves = device.type == "cuda" and not distributed.any_process(wide, device)
        for stack in stacks:
            stack.halves = bool(self._halves)
            stack.step(lr, kappa)
        for site in self._sites:
            site.slot.settle()
        self._sampler.advance()

    @torch.no_grad()
    def loss(self) -> dict[str, Tensor]:
        """Decorrelation loss of each R, by layer name, as 0-d tensors on its device.

        `((1 - kappa) ||offdiag G||_F^2 + kappa ||diag G - 1||^2) / d^2` of the rows sampled since the last
        step or, right after a step, of the rows that it used, with R as it is now. Computed when called;
        a collective where a process group is initialised, and then `d x d` also for a low-rank R. Layers
        without rows are left out.
        """
        kappa = self.param_groups[0]["kappa"]
        pending = any(site.slot.pending for site in self._sites)
        # All processes must mean the same rows, also those that have none since the last step.
        stale = not distributed.any_process(pending, self._sites[0].factors[0].device)
        losses: dict[str, Tensor] = {}
        for stack in self._refresh():
            values, counts = stack.losses(kappa, stale)
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
        self._halves = None
