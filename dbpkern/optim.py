"""`DecorSGD`: the optimizer of the decorrelation matrices."""

import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dbpkern import distributed, ops
from dbpkern.nn import Decorrelated, Full, LowRank
from dbpkern.ops._common import check_eta, check_kappa
from dbpkern.sampling import Rule, Sampler, Slot


@dataclass(frozen=True)
class _Step:
    """What one step does to every R."""

    lr: float | Tensor
    """The rate before the limiter, times the steps that it stands for."""
    kappa: float
    scale_free: bool
    limit: float | None


def _for_tensor_cores(rows: Tensor) -> bool:
    """Whether rows stay as they are: 16 bits on a GPU. Elsewhere they are widened to R's dtype."""
    return rows.is_cuda and rows.itemsize < 4


class _Site:
    """One R: the layers that hold it (several where projections share an input) and their samples."""

    def __init__(self, name: str, layer: Decorrelated, sampler: Sampler, rule: Callable[[], Rule]) -> None:
        self.name = name
        self.layers = [layer]
        self.slot = Slot(layer, sampler, rule)
        self.caution = torch.ones_like(layer.factors[0][0, 0])
        """By what the rate of this R is multiplied: halved when its samples were not finite."""

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
    traffic: distributed.Traffic | None = None
    """What this process sent in the last step, where there are several processes."""

    def __init__(self, sites: list[_Site]) -> None:
        self.sites = sites
        with torch.no_grad():
            self.factors = tuple(
                torch.stack(parts) for parts in zip(*(site.factors for site in sites), strict=True)
            )
        for site, *factors in zip(sites, *self.factors, strict=True):
            site.bind(tuple(factors))
        like = self.factors[0]
        self.caution = torch.stack(
            [torch.ones_like(like[0, 0, 0]) if c.is_meta else c.to(like) for c in (s.caution for s in sites)]
        )
        for site, caution in zip(sites, self.caution, strict=True):
            site.caution = caution
        self.rates = torch.zeros_like(self.caution)
        self.samples: dict[tuple[int, int], Tensor] = {}

    def holds(self) -> bool:
        """Whether the layers' factors still are the parts of this stack."""
        return all(
            part.data_ptr() == whole.data_ptr() + i * part.nbytes and part.dtype == whole.dtype
            for i, site in enumerate(self.sites)
            for layer in site.layers
            for part, whole in zip(layer.factors, self.factors, strict=True)
        )

    def step(self, step: _Step) -> Iterator[None]:
        """Update every R from the rows sampled since the last step; yields before each wait for others."""
        if distributed.world_size() > 1:
            yield from self.step_together(step)
        else:
            self.step_alone(step)

    def step_alone(self, step: _Step) -> None:
        """The step of one process."""
        raise NotImplementedError

    def step_together(self, step: _Step) -> Iterator[None]:
        """The step of many processes; yields once it has sent what it needs the others for."""
        raise NotImplementedError

    def choose_rates(self, where: slice, step: _Step, size: Tensor, bound: Tensor | None) -> Tensor:
        """The rates `[L']` of the sites `where`, and note of those whose samples are not finite.

        Args:
            where: which sites.
            step: what is asked for.
            size: `[L']`, finite where the statistics are.
            bound: `[L']`, upper bounds of the largest eigenvalues of M; None without a limiter.

        Returns:
            `min(caution lr, limit / bound)`, and 0 where `size` is not finite; there, caution is halved.
        """
        sound = size.isfinite()
        self.caution[where] *= torch.where(sound, 1.0, 0.5)
        rates = self.caution[where] * step.lr
        if bound is not None:
            rates = torch.minimum(rates, step.limit / bound.clamp(min=torch.finfo(bound.dtype).tiny))
        self.rates[where] = torch.where(sound, rates, 0.0)
        return self.rates[where]

    def decorrelated(self, where: slice, rows: Tensor) -> Tensor:
        """z of the rows `[L', n, d]` of the sites `where`."""
        raise NotImplementedError

    def losses(self, kappa: float, stale: bool) -> tuple[Tensor, Tensor]:
        """Decorrelation losses `[L]` of the rows of all processes, and the numbers of rows `[L]`."""
        if distributed.world_size() > 1:
            # Sums of squares over rows that lie on different processes need the correlations themselves.
            off, a, counts = self.correlations(0.0, stale).wait()
            return _loss(off.square().sum((1, 2)), a, kappa), counts
        like = self.factors[0]
        losses, counts = like.new_zeros(len(self.sites)), like.new_zeros(len(self.sites))
        for where, rows in self.runs(stale):
            losses[where] = _loss_of_rows(self.decorrelated(where, rows), kappa)
            counts[where] = rows.shape[1]
        return losses, counts

    def correlations(self, kappa: float, stale: bool = False, owner: bool = False) -> distributed.Transfer:
        """M `[L, d, d]`, a `[L, d]` and row counts `[L]`, on their way from many processes.

        Layers without rows here still take part: other processes may have some. With `owner`, those of the
        layers alone that this process owns.
        """
        L, d, _ = self.factors[0].shape
        M, a, counts = (self.factors[0].new_zeros(L, *shape) for shape in ((d, d), (d,), ()))
        for where, rows in self.runs(stale):
            M[where], a[where], _ = ops.correlation(self.decorrelated(where, rows), kappa)
            counts[where] = rows.shape[1]
        return distributed.average_statistics(M, a, counts, owner)

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

    def step_together(self, step: _Step) -> Iterator[None]:
        (R,) = self.factors
        L, d, _ = R.shape
        mode = distributed.choose_mode(L, d, R.itemsize, R.device.type)
        owner = mode == "owner"
        statistics = self.correlations(step.kappa, owner=owner)
        sent = statistics.sent
        yield
        M, a, _ = statistics.wait()
        self._apply(distributed.own_layers(L) if owner else slice(None), M, a, step)
        if owner:
            gathered = distributed.gather_layers([R, self.caution, self.rates])
            sent += gathered.sent
            del statistics, M, a  # more than R itself; others may still compute
            yield
            gathered.wait()
        self.traffic = distributed.Traffic((L, d, d), mode, sent)

    def step_alone(self, step: _Step) -> None:
        (R,) = self.factors
        runs = self.runs()
        plain = step.limit is None and not step.scale_free
        proposals = [
            self._proposed(where, Rule.of(step.lr, step.kappa)) if plain else None for where, _ in runs
        ]  # before any R changes
        for (where, rows), proposed in zip(runs, proposals, strict=True):
            if proposed is not None:
                self._take_over(where, torch.stack(proposed), step)
                continue
            z = self.decorrelated(where, rows)
            n, d = z.shape[1:]
            if plain or (n < d and not step.scale_free):
                # M need not be formed.
                # Finite where M R is, too: without a limiter, R may have grown very large.
                size = z.square().sum((1, 2), dtype=R.dtype) * R[where].abs().amax((1, 2))
                bound = None if step.limit is None else _bound_of_rows(z, step.kappa)
                rates = self.choose_rates(where, step, size, bound)
                z = z.masked_fill(~size.isfinite()[:, None, None], 0.0)
                ops.update_(R[where], z, rates, step.kappa)
            else:
                self._apply(where, *ops.correlation(z, step.kappa)[:2], step)

    def _take_over(self, where: slice, proposed: Tensor, step: _Step) -> None:
        """Step the sites `where` to the R `[L', d, d]` that their forwards have made by `step`."""
        R = self.factors[0][where]
        size = proposed.abs().sum((1, 2))
        self.choose_rates(where, step, size, None)
        share = (self.caution[where] * size.isfinite())[:, None, None]  # R moves in proportion to its rate
        R.copy_(torch.where(share > 0, torch.lerp(R, proposed, share), R))

    def _apply(self, where: slice, M: Tensor, a: Tensor, step: _Step) -> None:
        """Step the sites `where` by their M `[L', d, d]`, which is used up, and a `[L', d]`."""
        (R,) = self.factors
        size = a.sum(1)  # bounds every |M_ij|
        unsound = ~size.isfinite()[:, None]
        M.masked_fill_(unsound[..., None], 0.0)
        if step.scale_free:
            scale_free_(M, a.masked_fill(unsound, 1.0))
        bound = None if step.limit is None else eigenvalue_bound(M)
        rates = self.choose_rates(where, step, size, bound)
        # In 16 bits, M and R are the operands that they are with one process.
        ops.apply_(R[where], M.bfloat16() if self.halves else M, rates)

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

    def step_together(self, step: _Step) -> Iterator[None]:
        # No owners: to send Q and S takes the bytes that they would save of the statistics, and the update is
        # small, many short operations whose time hardly depends on the number of layers.
        statistics = self._statistics()
        yield
        B, Y, c, _ = statistics.wait()
        self._apply(slice(None), B, Y, c, step)
        self.traffic = distributed.Traffic(tuple(Y.shape), "all-reduce", statistics.sent)

    def step_alone(self, step: _Step) -> None:
        for where, rows in self.runs():
            self._apply(where, *self._of_rows(where, rows), step)

    def _apply(self, where: slice, B: Tensor, Y: Tensor, c: Tensor, step: _Step) -> None:
        """Step the sites `where` by their statistics, see `ops.lowrank_statistics`."""
        Q, S = (factor[where] for factor in self.factors)
        size = c.sum(1)
        unsound = ~size.isfinite()[:, None]
        B, Y = (part.masked_fill(unsound[..., None], 0.0) for part in (B, Y))
        c = c.masked_fill(unsound, 0.0)
        T = S + torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
        inner = T @ B @ T.mT  # the second moment of z within the subspace
        unit = 1.0
        if step.scale_free:
            V = Q @ S
            squares = c + 2 * (Y * V).sum(2) + ((V @ B) * V).sum(2)  # [L', d], of z
            unit = 2 * squares.mean(1).clamp(min=torch.finfo(S.dtype).tiny)
        bound = None
        if step.limit is not None:
            bound = (torch.linalg.matrix_norm(inner) + step.kappa) / unit
        rates = self.choose_rates(where, step, size, bound) / unit
        ops.lowrank_apply_(Q, S, B, Y, c, rates, step.kappa)

    def _of_rows(self, where: slice, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        Q = self.factors[0]
        # 16-bit rows go as they are: the op widens them where it must.
        return ops.lowrank_statistics(rows if rows.itemsize < 4 else rows.to(Q.dtype), Q[where])

    def _statistics(self) -> distributed.Transfer:
        """B, Y, c and row counts of the whole stack, on their way from all processes."""
        Q, S = self.factors
        B, Y, c = torch.zeros_like(S), torch.zeros_like(Q), torch.zeros_like(Q[:, :, 0])
        counts = Q.new_zeros(len(Q))
        for where, rows in self.runs():
            B[where], Y[where], c[where] = self._of_rows(where, rows)
            counts[where] = rows.shape[1]
        return distributed.average_lowrank_statistics(B, Y, c, counts)

    def decorrelated(self, where: slice, rows: Tensor) -> Tensor:
        Q, S = self.factors
        return ops.lowrank_transform(rows.to(Q.dtype), Q[where], S[where])


_STACKS = {Full: _FullStack, LowRank: _LowRankStack}


def scale_free_(M: Tensor, a: Tensor) -> Tensor:
    """Divide `M [L, d, d]` by `a_i + a_j`, in place, for the mean squares `a [L, d]` of z; returns M.

    Near a diagonal G every correlation then shrinks by `1 - eta` a step, whatever the variances. Features
    without variance have no correlations; their rows of M become zero.
    """
    unit = a[:, :, None] + a[:, None, :]
    return M.div_(unit.masked_fill_(unit == 0, math.inf))


def eigenvalue_bound(M: Tensor) -> Tensor:
    """Upper bounds `[L]` of the largest absolute eigenvalues of symmetric `M [L, d, d]`.

    The smaller of the Frobenius norm and the largest absolute row sum.
    """
    return torch.minimum(torch.linalg.matrix_norm(M), torch.linalg.matrix_norm(M, ord=math.inf))


def _bound_of_rows(z: Tensor, kappa: float) -> Tensor:
    """The same `[L']` for M of fewer rows `z [L', n, d]` than features, by their Gram matrix.

    `||offdiag G|| <= ||G|| <= ||z z^T||_F / n`, and the term of the variances adds at most kappa.
    """
    z = z.float() if z.dtype == torch.float16 else z  # its squares leave that range
    gram = torch.bmm(z, z.mT).div_(z.shape[1])
    return torch.linalg.matrix_norm(gram.to(torch.promote_types(z.dtype, torch.float32))) + kappa


def _loss(off: Tensor, a: Tensor, kappa: float) -> Tensor:
    """The losses `[L]` from `||offdiag G||_F^2 [L]` and `diag G [L, d]`."""
    return ((1 - kappa) * off + kappa * (a - 1).square().sum(1)) / a.shape[1] ** 2


def _loss_of_rows(z: Tensor, kappa: float) -> Tensor:
    """The losses `[L']` of rows `z [L', n, d]`, by the smaller of their two Gram matrices."""
    n, d = z.shape[1:]
    if n >= d:
        off, a, _ = ops.correlation(z)
        return _loss(off.square().sum((1, 2)), a, kappa)
    a = torch.linalg.vector_norm(z, dim=1).square_().div_(n)
    squares = torch.bmm(z, z.mT).div_(n).square().sum((1, 2))  # ||z z^T||_F = ||z^T z||_F
    return _loss((squares - a.square().sum(1)).clamp(min=0), a, kappa)


class DecorSGD(torch.optim.Optimizer):
    """Updates every R of a model by the decorrelation rule `R <- R - eta M R`.

    Call `step()` after the main optimizer's:

        loss.backward(); optimizer.step(); decor.step()

    While it lives, every converted layer in training mode copies a random sample of its input rows aside
    in each backward. `step()` decorrelates the samples, forms their statistics (averaged over processes
    where a process group is initialised) and updates all R of equal width together, without waiting for
    the device. R rests in layers whose weight is frozen or which are in eval mode. For a low-rank R,
    `ops.lowrank_apply_` states the rule.

    A layer whose samples are not finite rests for that step, and its eta is halved from then on: see
    `caution()`.

    It is a `torch.optim.Optimizer`, so learning-rate schedulers attach to it. It finds R in the modules at
    every step: `.to()`, `load_state_dict` and the like are safe in between. Afterwards R, or Q and S, are
    views of one tensor per width and rank.

    Args:
        model: a model with decorrelated layers.
        lr: eta >= 0 (arXiv 2510.14657 uses a constant 5e-4), a number or a 0-d tensor.
        kappa: weight in [0, 1] of the unit-variance term (arXiv 2405.02385); 0 for pure decorrelation.
        sample: fraction in (0, 1] of rows to sample, without replacement; at least one row is taken.
        seed: of the sampling.
        scale_free: divide `M_ij` by `a_i + a_j`, a the mean squares of z: correlations then shrink by the
            factor `1 - eta` a step, whatever the variances. For a low-rank R, divide M by twice their mean.
        limit: each layer's eta is at most this over an upper bound of the largest eigenvalue of its M. A
            step is stable below 2 and turns no direction round below 1. None for no limit.
        every: update R on every so-many-th step alone, by `every` times the rate; nothing is sampled on the
            others.
        follow: an optimizer whose learning rate, relative to its `initial_lr`, scales eta. The schedulers
            of torch and timm set `initial_lr`, and may be attached later. None for an eta that changes only
            with `param_groups`.

    Raises:
        TypeError: `model` is not a module, or `follow` not an optimizer.
        ValueError: no decorrelated layer in the model, or a number out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 5e-4,
        kappa: float = 0.0,
        sample: float = 0.1,
        seed: int = 0,
        scale_free: bool = False,
        limit: float | None = 0.5,
        every: int = 1,
        follow: torch.optim.Optimizer | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"DecorSGD: expected a model, got {type(model).__name__}")
        if isinstance(model, DistributedDataParallel) and model.broadcast_buffers:
            warnings.warn(
                "DistributedDataParallel(broadcast_buffers=True) sends every R before each forward, though "
                "they are equal on all processes; pass broadcast_buffers=False (in newer versions of torch: "
                "forward_sync_buffers=False)",
                stacklevel=2,
            )
        layers = [
            (name, module) for name, module in model.named_modules() if isinstance(module, Decorrelated)
        ]
        if not layers:
            raise ValueError(
                "DecorSGD: expected a model with decorrelated layers; call decorrelate(model) first"
            )
        self._start(layers, lr, kappa, sample, seed, scale_free, limit, every, follow)

    def _start(
        self,
        layers: list[tuple[str, Decorrelated]],
        lr: float | Tensor,
        kappa: float,
        sample: float,
        seed: int,
        scale_free: bool,
        limit: float | None,
        every: int,
        follow: torch.optim.Optimizer | None,
    ) -> None:
        """What `__init__` does once it knows the layers."""
        if isinstance(lr, Tensor) and lr.dim():
            raise ValueError(f"lr: expected a number or a 0-d tensor, got shape {list(lr.shape)}")
        check_eta(float(lr))
        check_kappa(kappa)
        if not (math.isfinite(sample) and 0.0 < sample <= 1.0):
            raise ValueError(f"sample: expected a fraction in (0, 1], got {sample}")
        if limit is not None and not 0.0 < limit < 2.0:
            raise ValueError(
                f"limit: expected a number in (0, 2), where a step is stable, or None, got {limit}"
            )
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every: expected a whole number of steps, at least 1, got {every!r}")
        if follow is not None and not isinstance(follow, torch.optim.Optimizer):
            raise TypeError(f"follow: expected an optimizer, got {type(follow).__name__}")
        self._follow = follow
        self._sampler = Sampler(sample, seed, every)
        self._sites = self._make_sites(layers)
        self._stacks: list[_Stack] = []
        self._checked = False
        self._halves: bool | None = None
        defaults = {"lr": lr, "kappa": kappa, "scale_free": scale_free, "limit": limit}
        super().__init__(self._factors(), defaults)
        self._refresh()  # now rather than at the first step: from here on R keep their addresses

    def _step_now(self) -> _Step:
        """The step as the options and the followed optimizer have it at this moment."""
        group = self.param_groups[0]
        lr = group["lr"]
        if self._follow is not None:
            leader = self._follow.param_groups[0]
            if "initial_lr" not in leader:
                raise RuntimeError(
                    "DecorSGD(follow=...): expected an optimizer with a scheduler, which sets 'initial_lr' "
                    "in its param_groups; attach one, or set 'initial_lr' to the peak learning rate"
                )
            if leader["initial_lr"]:
                lr = lr * (leader["lr"] / leader["initial_lr"])
        if self._sampler.every > 1:
            lr = lr * self._sampler.every
        return _Step(lr, group["kappa"], group["scale_free"], group["limit"])

    def _make_sites(self, layers: list[tuple[str, Decorrelated]]) -> list[_Site]:
        sites: dict[int, _Site] = {}
        owner = weakref.ref(self)  # or the slots would keep alive whom they must not outlive

        def rule() -> Rule | None:
            step = owner()._step_now()
            plain = step.limit is None and not step.scale_free
            return Rule.of(step.lr, step.kappa) if plain else None

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

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """Update every R from the rows sampled since the last step; layers without rows keep theirs.

        With a process group initialised this is a collective: every process must call it.

        Raises:
            ValueError: a closure, or in the first step processes with other R, types of device or options.
        """
        if closure is not None:
            raise ValueError("DecorSGD.step: expected no closure: R is not a function of the task loss")
        if not self._sampler.due:
            self._sampler.advance()
            return
        stacks = self._refresh()
        self._warn_of_silent_layers()
        step = self._step_now()
        if not isinstance(step.lr, Tensor):
            check_eta(step.lr)
        if self._halves is None and distributed.world_size() > 1:
            self._halves = self._agree(stacks)
        for stack in stacks:
            stack.halves = bool(self._halves)
        # In turns: every stack has sent its statistics before the first waits for those of the others.
        under_way, done = [stack.step(step) for stack in stacks], object()
        while under_way:
            under_way = [updates for updates in under_way if next(updates, done) is not done]
        for site in self._sites:
            site.slot.settle()
        self._sampler.advance()

    def _agree(self, stacks: list[_Stack]) -> bool:
        """Check that all processes have the same to do; returns whether all sample rows of 16 bits on GPUs.

        Once: a process without rows cannot tell for itself, and all must compute alike. Otherwise processes
        would wait for each other for ever.
        """
        device = stacks[0].factors[0].device
        stacked = [
            [(tuple(factor.shape), str(factor.dtype), factor.device.type) for factor in stack.factors]
            for stack in stacks
        ]
        group = self.param_groups[0]
        options = {name: group[name] for name in ("kappa", "scale_free", "limit")}
        options |= {"every": self._sampler.every, "lr": float(group["lr"])}
        if distributed.differs(repr((stacked, options)), device):
            raise ValueError(
                "DecorSGD: expected the same R, types of device and options on all processes; this one has "
                f"{stacked} and {options}, another has others"
            )
        samples = [rows for stack in stacks for _, rows in stack.runs()]
        wide = not all(_for_tensor_cores(rows) for rows in samples)
        return device.type == "cuda" and not distributed.any_process(wide, device)

    def traffic(self) -> list[distributed.Traffic]:
        """What this process sent in the last step that updated R, for each stack of R of one width.

        In bytes, of the numbers that the collectives were given, by the formulas of a ring: see
        `dbpkern.distributed`. Empty before the first step, and where no process group is initialised.
        """
        return [stack.traffic for stack in self._stacks if stack.traffic is not None]

    def rates(self) -> dict[str, Tensor]:
        """The eta of each R in the last step that updated it, after limit, as 0-d tensors by layer name."""
        pairs = (pair for stack in self._refresh() for pair in zip(stack.sites, stack.rates, strict=True))
        found = {site.name: rate for site, rate in pairs}
        return {name: found[name] for name in self.names}

    def caution(self) -> dict[str, float]:
        """The factors below 1 on eta, by layer name: 0.5 to the number of steps with samples not finite.

        Reads the device's memory.
        """
        values = torch.stack([site.caution for site in self._sites]).tolist()
        return {name: value for name, value in zip(self.names, values, strict=True) if value < 1.0}

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

    def _restore_caution(self, caution: Mapping[str, float]) -> None:
        """Set what `caution()` has told; layers that it does not name are as at the start."""
        for site in self._sites:
            site.caution.fill_(caution.get(site.name, 1.0))

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
        """The options, the sampling's position, and caution; R itself is in the model's state_dict."""
        state = super().state_dict()
        state["sampling"] = {"seed": self._sampler.seed, "step": self._sampler.step}
        state["caution"] = self.caution()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore `state_dict()`; rows sampled since the last step are dropped.

        Raises:
            ValueError: it was made for another number of layers, or by another optimizer.
        """
        ours = ("sampling", "caution")
        if any(key not in state_dict for key in ours):
            raise ValueError(
                "DecorSGD.load_state_dict: expected the state of a DecorSGD of this version, got one without "
                f"{' and '.join(key for key in ours if key not in state_dict)}"
            )
        super().load_state_dict({k: v for k, v in state_dict.items() if k not in ours})
        for site in self._sites:
            site.slot.clear()
        self._restore_caution(state_dict["caution"])
        self._sampler.seek(**state_dict["sampling"])

    def __getstate__(self) -> dict:
        state = super().__getstate__()
        layers = [(site.name, layer) for site in self._sites for layer in site.layers]
        where = (self._sampler.arguments, self._sampler.step)
        return state | {"decor": (layers, *where, self.caution(), self._follow)}

    def __setstate__(self, state: dict) -> None:
        if "decor" not in state:  # Optimizer.load_state_dict comes here, too
            super().__setstate__(state)
            return
        layers, sampling, step, caution, self._follow = state.pop("decor")
        super().__setstate__(state)
        self._sampler = Sampler(*sampling)
        self._sampler.seek(self._sampler.seed, step)
        self._sites = self._make_sites(layers)
        self._restore_caution(caution)
        self._stacks = []
        self._checked = True
        self._halves = None
