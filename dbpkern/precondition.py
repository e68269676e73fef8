"""`DecorPreconditioner`: decorrelated backpropagation around an optimizer, with the model left as it is.

The layers keep the fused weight `V = W R` and compute with it as ever. Around each step of their optimizer
the gradient goes to the coordinates of z and the change of the weight comes back:

    g = dV R^T              before: what backpropagation through `z = R x`, `y = W z` would give for W
    V <- V_old + (V - V_old) R      after: the change that the optimizer made of g, as a change of V

R then makes its step, which leaves V and so the function of the network as they are. This is the update
`W <- W R_old R_new^-1` of a decorrelated layer, without R's inverse.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dbpkern.convert import (
    Chosen,
    Filter,
    Ranks,
    check_stock,
    check_weights,
    inputs_of,
    ranks_of,
    select,
    share_inputs,
)
from dbpkern.nn import structure_of
from dbpkern.optim import DecorSGD
from dbpkern.rows import count_patches, count_tokens, take_patches, take_tokens
from dbpkern.sampling import ForwardTap, Slot, Tap, slot_of


def _local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that lies in this process; the tensor itself if it is whole."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


EVERY = 2  # steps from one update of R to the next, by default


@contextmanager
def _as_matrix(tensor: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """`[o, d]` of a dtype, whose changes go to the tensor: itself, where that is possible."""
    matrix = tensor.flatten(1).to(dtype)
    yield matrix
    if matrix.data_ptr() != tensor.data_ptr():
        tensor.copy_(matrix.view_as(tensor))


class PreconditionedLayer:
    """A stock layer with an R beside it: to `DecorSGD` what a decorrelated layer is.

    Args:
        layer: `nn.Linear`, `nn.Conv2d` with `groups=1`, or `nn.MultiheadAttention`, whose `in_proj_weight`
            is meant.
        rank: of `R - I` for a low-rank R; None for a full one.

    Raises:
        TypeError: rank is neither None nor an integer.
        ValueError: rank out of range, a layer that has no single weight for its input, or a weight sharded
            by columns.
    """

    shared: object | None = None
    live: bool
    """Whether a `DecorPreconditioner` has this layer; a copy of the model brings ones that none has."""

    def __init__(self, layer: nn.Module, rank: int | None) -> None:
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
        self._factors = self.structure.start(self.weight.shape[1:].numel(), dtype, self.weight.device)
        self.live = True
        self._key: Tensor | None = None
        self._before: Tensor | None = None
        self._mapped: tuple[Tensor, int] | None = None
        self._hook = layer.register_forward_hook(self._sample, with_kwargs=True)

    @property
    def weight(self) -> nn.Parameter | None:
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

    def attach(self, slot: Slot | None) -> None:
        """Send samples to `slot` from now on; None stops sampling."""
        self._key = None if slot is None else slot.key

    def count_rows(self, x: Tensor) -> int:
        """Number of rows in the input x."""
        return count_patches(self.layer, x) if isinstance(self.layer, nn.Conv2d) else count_tokens(x)

    def take_rows(self, x: Tensor, index: Tensor | None) -> Tensor:
        """The rows `index` of the input x, `[n_s, d]`; all of them for None."""
        return (
            take_patches(self.layer, x, index) if isinstance(self.layer, nn.Conv2d) else take_tokens(x, index)
        )

    def _sample(self, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> object:
        """Forward hook: tie the output to a sample of the input, so that its backward delivers it."""
        if self._key is None or not layer.training or not torch.is_grad_enabled() or not self.trains:
            return None
        x = args[0] if args else kwargs["query" if isinstance(layer, nn.MultiheadAttention) else "input"]
        if isinstance(layer, nn.MultiheadAttention):
            others = [*args[1:3], *(kwargs[name] for name in ("key", "value") if name in kwargs)]
            if any(other is not x for other in others):
                raise ValueError(
                    "DecorPreconditioner serves self-attention alone: expected the same tensor as query, key "
                    "and value; keep cross-attention out with filter"
                )
        y = output[0] if isinstance(output, tuple) else output
        if torch.compiler.is_compiling():
            tied = Tap.apply(y, x.detach(), self._key)
        else:
            slot = slot_of(self._key)
            if slot is None or not slot.sampler.due or not self.count_rows(x):
                return None
            # Rows rather than x, which nothing else may keep: autocast makes a copy of its own.
            rows = self.take_rows(x.detach(), slot.draw(self.count_rows(x), x.device))
            tied = ForwardTap.apply(y, rows, self._key)
        return (tied, *output[1:]) if isinstance(output, tuple) else tied

    @torch.no_grad()
    def enter(self) -> None:
        """Bring the gradient to the coordinates of z, and remember V; nothing without a gradient.

        Nor a second time, where `leave` did not come in between and the gradient is the one mapped before.
        """
        if self.weight.grad is None:
            self._before = self._mapped = None
            return
        gradient = _local(self.weight.grad)
        before, version = self._mapped or (None, None)
        if before is self.weight.grad and version == gradient._version:
            return
        R = self.factors
        self._before = self.structure.remember(_local(self.weight).flatten(1), *R)
        with _as_matrix(gradient, R[0].dtype) as matrix:
            self.structure.transform_(matrix, *R)
        self._mapped = (self.weight.grad, gradient._version)

    @torch.no_grad()
    def leave(self) -> None:
        """Bring the change of V since `enter` back from the coordinates of z."""
        if self._before is None:
            return
        R = self.factors
        with _as_matrix(_local(self.weight), R[0].dtype) as V:
            self.structure.carry_(V, self._before, *R)
        self._before = self._mapped = None

    def dense_R(self) -> Tensor:
        """R as a matrix, `[d, d]`, whatever holds it."""
        return self.structure.matrix(*self.factors)

    def remove(self) -> None:
        """Leave the layer without hook."""
        self._hook.remove()
        self.attach(None)

    def __getstate__(self) -> dict:
        # A copy of the model does not send its samples to the original's optimizer.
        return {**self.__dict__, "live": False, "_key": None, "_before": None, "_mapped": None}


def preconditioned(module: nn.Module) -> PreconditionedLayer | None:
    """What holds the module's R for a `DecorPreconditioner`, if any does."""
    owners = (getattr(hook, "__self__", None) for hook in module._forward_hooks.values())
    return next((o for o in owners if isinstance(o, PreconditionedLayer) and o.live), None)


@contextmanager
def unsampled(model: nn.Module) -> Iterator[None]:
    """Let nothing that the model does meanwhile count as a sample for a `DecorPreconditioner`."""
    layers = [layer for layer in map(preconditioned, model.modules()) if layer is not None]
    keys = [(layer, layer._key) for layer in layers]
    for layer in layers:
        layer._key = None
    try:
        yield
    finally:
        for layer, key in keys:
            layer._key = key


def _hold(chosen: Chosen, ranks: Mapping[str, int | None]) -> dict[str, PreconditionedLayer]:
    """The chosen layers, each with an R that is the identity."""
    layers: dict[str, PreconditionedLayer] = {}
    try:
        for name, (module, _) in chosen.items():
            try:
                layers[name] = PreconditionedLayer(module, ranks[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    except BaseException:
        for layer in layers.values():
            layer.remove()
        raise
    share_inputs(chosen, layers)
    return layers


class DecorPreconditioner(DecorSGD):
    """Decorrelated backpropagation with any optimizer, in one line and without a change of the model.

        decor = dbpkern.DecorPreconditioner(model, optimizer)
        ...
        loss.backward(); optimizer.step()          # as before

    Hooks on the optimizer map the gradients of the chosen layers before its step and the changes of their
    weights after it, and then update R by `DecorSGD`'s rule. The modules, their forward and backward and
    their state_dict stay those of the plain model: nothing has to be fused at the end. R is in the state_dict
    of this object.

    The optimizer's weight decay is mapped like the rest of its change: V decays by `lr wd V R`.

    Args:
        model: any model; layers that share an input, like separate q, k and v projections, share R.
        optimizer: of its weights, with a `step()` without closure.
        sites: as for `decorrelate`.
        filter: as for `decorrelate`.
        rank: as for `decorrelate`.
        lr: eta >= 0, a number or a 0-d tensor. With `scale_free` the part of a correlation that one step
            removes near a diagonal G.
        kappa: as for `DecorSGD`, like all that follow.
        sample: fraction in (0, 1] of rows to sample.
        seed: of the sampling.
        scale_free: whether the step is free of the variances of z.
        limit: of eta times the largest eigenvalue of M.
        every: update R on every so-many-th step alone.
        follow: an optimizer, this or another, whose learning rate scales eta.

    Raises:
        TypeError: `optimizer` is no optimizer, or a rank no number.
        ValueError: as `decorrelate` does for sites, filters and ranks, as `DecorSGD` does for numbers, a
            weight that FSDP shards by columns, or the optimizer lacks a chosen layer's weight that trains.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sites: str | Iterable[str] | None = "all",
        filter: Filter | None = None,
        rank: Ranks = "mixed",
        lr: float | Tensor = 0.05,
        kappa: float = 0.0,
        sample: float = 0.1,
        seed: int = 0,
        scale_free: bool = True,
        limit: float | None = 0.5,
        every: int = EVERY,
        follow: torch.optim.Optimizer | None = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        check_stock(model)
        chosen = select(model, sites, filter)
        check_weights(model, chosen)
        ranks = ranks_of(rank, chosen)
        taken = [name for name, (module, _) in chosen.items() if preconditioned(module) is not None]
        if taken:
            raise ValueError(
                f"{taken[0]}: another DecorPreconditioner holds this layer; remove() that one first"
            )
        self._optimizer = optimizer
        self.layers = self._take(chosen, ranks)
        try:
            self._start(list(self.layers.items()), lr, kappa, sample, seed, scale_free, limit, every, follow)
        except BaseException:
            for layer in self.layers.values():
                layer.remove()
            raise
        self._entered = False
        self._hooks = (
            optimizer.register_step_pre_hook(self._enter),
            optimizer.register_step_post_hook(self._leave),
        )

    def _take(self, chosen: Chosen, ranks: Mapping[str, int | None]) -> dict[str, PreconditionedLayer]:
        """The chosen layers, each with an R that is the identity, if the optimizer has their weights."""
        layers = _hold(chosen, ranks)
        known = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        # One that does not train may be missing. The gradient of another would be mapped, and its change not.
        strange = [name for name, layer in layers.items() if layer.trains and id(layer.weight) not in known]
        if strange:
            for layer in layers.values():
                layer.remove()
            raise ValueError(
                "optimizer: expected one with the weights of all chosen layers that train, it lacks "
                f"{len(strange)} of {len(layers)} ({strange[0]}, ...); make it from this model's parameters, "
                "or leave the others out with filter"
            )
        return layers

    def __getstate__(self) -> dict:
        raise TypeError(
            "a DecorPreconditioner cannot be copied or pickled: its hooks are on one optimizer; make a new "
            "one for the copy, and load state_dict()"
        )

    @torch.compiler.disable
    def _enter(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if any(argument is not None for argument in (*args[1:], *kwargs.values())):  # args[0]: the optimizer
            raise ValueError(
                "DecorPreconditioner: expected optimizer.step() without a closure or other arguments: its "
                "gradients would come after they were mapped"
            )
        self._entered = True
        for layer in self.layers.values():
            layer.enter()

    @torch.compiler.disable
    def _leave(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if not self._entered:
            return  # a step() that calls super().step() runs the hooks of both
        self._entered = False
        for layer in self.layers.values():
            layer.leave()
        self._opt_called = True  # for a scheduler of eta, which warns otherwise
        super().step()

    def step(self, closure: None = None) -> None:
        """R's step is part of the optimizer's: there is nothing to call.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("DecorPreconditioner: expected optimizer.step() alone, which updates R, too")

    def replan(
        self,
        model: nn.Module,
        sites: str | Iterable[str] | None,
        filter: Filter | None,
        rank: Ranks,
    ) -> None:
        """Choose other layers, between two steps; the function of the network stays as it is.

        Layers that stay chosen with the same rank keep their R, new ones start from the identity. Moments of
        the optimizer stay, too: those of a layer that comes or goes are of the other coordinates at first.

        Args:
            model: of this object.
            sites: as for `decorrelate`, like all that follow.
            filter: which layers of them.
            rank: of their R.

        Raises:
            TypeError: a rank that is no number.
            ValueError: as `decorrelate` does for sites, filters and ranks, or the optimizer lacks a weight;
                nothing is changed then.
        """
        check_stock(model)
        chosen = select(model, sites, filter)
        check_weights(model, chosen)
        ranks = ranks_of(rank, chosen)
        layers = self._take(chosen, ranks)
        caution = self.caution()
        with torch.no_grad():
            for names in inputs_of(chosen):
                structure = layers[names[0]].structure
                old = [self.layers[name] for name in names if name in self.layers]
                kept = next((layer for layer in old if layer.structure == structure), None)
                if kept is not None:
                    for factor, value in zip(layers[names[0]].factors, kept.factors, strict=True):
                        factor.copy_(value)
        for layer in self.layers.values():
            layer.remove()
        self.layers = layers
        self._sites = self._make_sites(list(layers.items()))
        self._restore_caution(caution)
        self._stacks = []
        self._refresh()
        self._checked, self._halves = False, None  # looked at anew in the next step
        torch.compiler.reset()  # compiled code does not see hooks that came later

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore `state_dict()`.

        Raises:
            ValueError: as for `DecorSGD`, or R of other layers, widths or ranks; nothing is changed then.
        """
        ours = {site.name: site.factors for site in self._sites}
        theirs = state_dict.get("R", {})
        shapes, found = (
            {name: [tuple(f.shape) for f in factors] for name, factors in both.items()}
            for both in (ours, theirs)
        )
        if shapes != found:
            differing = sorted(n for n in shapes.keys() | found.keys() if shapes.get(n) != found.get(n))
            name = differing[0]
            raise ValueError(
                f"DecorPreconditioner.load_state_dict: R of {len(differing)} layers differ; expected "
                f"{shapes.get(name, 'none')} for {name}, got {found.get(name, 'none')}"
            )
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "R"})
        with torch.no_grad():
            for name, factors in ours.items():
                for factor, value in zip(factors, theirs[name], strict=True):
                    factor.copy_(value)

    def remove(self) -> None:
        """Take all hooks off: the optimizer goes on without this object, from the same weights."""
        for hook in self._hooks:
            hook.remove()
        for layer in self.layers.values():
            layer.remove()

    def state_dict(self) -> dict:
        """As of `DecorSGD`, with R: `{"R": {layer: [R] or [Q, S]}}`."""
        state = super().state_dict()
        state["R"] = {site.name: list(site.factors) for site in self._sites}
        return state
