"""What optimizers of the weights that have an engine share."""

import gc
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from dbpkern import ops
from dbpkern.config import Decor
from dbpkern.engine import Engine
from dbpkern.layers.convert import check_stock
from dbpkern.optim import state
from dbpkern.sites import check_weights, ranks_of, select
from dbpkern.stock import StockLayer, hold, stock_layer

Loss = TypeVar("Loss")


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that lies in this process; the tensor itself if it is whole."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def gradients_of(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of parameters that have one each."""
    return [gradient for p in parameters if (gradient := p.grad) is not None]


def choose_layers(
    model: nn.Module, optimizer: torch.optim.Optimizer, decor: Decor, but: tuple[StockLayer, ...] = ()
) -> dict[str, StockLayer]:
    """The layers that `decor` chooses, each with an R that is the identity beside it.

    Args:
        model: a stock model.
        optimizer: of its weights.
        decor: says which layers.
        but: layers that may hold an R already, since the caller gives them up.

    Raises:
        TypeError: `model` is no module, or `decor` no `Decor`.
        ValueError: as `decorrelate` for sites, filters and ranks, a weight that FSDP shards by columns, a
            layer whose R another optimizer holds, or the optimizer lacks a chosen weight that trains.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    if not isinstance(decor, Decor):
        raise TypeError(f"decor: expected a Decor, got {type(decor).__name__}")
    check_stock(model)
    chosen = select(model, decor.sites, decor.filter)
    check_weights(model, chosen)
    ranks = ranks_of(decor.rank, chosen)

    def held() -> list[str]:
        return [name for name, (module, _) in chosen.items() if stock_layer(module) not in (None, *but)]

    taken = held()
    if taken:
        gc.collect()  # optimizers that are gone hold nothing
        taken = held()
    if taken:
        raise ValueError(
            f"{taken[0]}: another optimizer holds this layer's R; call its remove() first, or copy the model"
        )
    layers = hold(chosen, ranks)
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
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


def make_engine(model: nn.Module, optimizer: torch.optim.Optimizer, decor: Decor) -> Engine[StockLayer]:
    """An engine for the layers that `decor` chooses; raises as `choose_layers` does."""
    layers = choose_layers(model, optimizer, decor)
    try:
        return Engine(layers, decor)
    except BaseException:
        for layer in layers.values():
            layer.remove()
        raise


def rechosen(
    engine: Engine[StockLayer], model: nn.Module, optimizer: torch.optim.Optimizer, decor: Decor
) -> Engine[StockLayer]:
    """An engine in place of another, for the layers that `decor` chooses, between two steps.

    Layers that stay chosen with the same rank keep their R, new ones start from the identity; the function of
    the network stays as it is. Raises as `choose_layers` does, and nothing is changed then.
    """
    layers = choose_layers(model, optimizer, decor, tuple(engine.layers.values()))
    with torch.no_grad():
        for name, layer in layers.items():
            kept = engine.layers.get(name)
            if kept is not None and kept.structure == layer.structure:
                for factor, value in zip(layer.factors, kept.factors, strict=True):
                    factor.copy_(value)
    for layer in engine.layers.values():
        layer.remove()
    state.detach(optimizer)
    new = Engine(layers, decor)
    new.sampler.seek(engine.sampler.seed, engine.sampler.step)
    new.restore_caution(engine.caution())
    return new


def followed(optimizer: torch.optim.Optimizer) -> float | Tensor:
    """The optimizer's learning rate, relative to its peak.

    Raises:
        RuntimeError: it has no `initial_lr`.
    """
    leader = optimizer.param_groups[0]
    if "initial_lr" not in leader:
        raise RuntimeError(
            "Decor(follow=True): expected an optimizer with a scheduler, which sets 'initial_lr' in its "
            "param_groups; attach one, or set 'initial_lr' to the peak learning rate"
        )
    return leader["lr"] / leader["initial_lr"] if leader["initial_lr"] else 1.0


def step_engine(engine: Engine[StockLayer], optimizer: torch.optim.Optimizer) -> None:
    """R's step, after the optimizer's; R then is in the optimizer's state.

    A GradScaler tells fused optimizers, which it cannot leave out, by `found_inf` that a step does not count.
    """
    scale = followed(optimizer) if engine.decor.follow else 1.0
    engine.step(scale, getattr(optimizer, "found_inf", None))
    state.attach(engine, optimizer)


class Maps:
    """Gradients and changes of an engine's weights, on their way around an optimizer's step.

    g = dV R^T              before: what backpropagation through `z = R x`, `y = W z` would give for W
    V <- V_old + (V - V_old) R      after: the change that the optimizer made of g, as a change of V
    """

    def __init__(self, engine: Engine[StockLayer]) -> None:
        self.engine = engine
        self._inside: list[tuple[StockLayer, Tensor]] = []
        self._mapped: dict[int, tuple[Tensor, int]] = {}

    @torch.no_grad()
    def enter(self, optimizer: torch.optim.Optimizer) -> None:
        """Bring the gradients to the coordinates of z, and remember what `leave` needs of V.

        Not a second time, where `leave` did not come in between and the gradient is the one mapped before.
        """
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        pairs = [
            (layer, gradient)
            for layer in self.engine.layers.values()
            if id(layer.weight) in known and (gradient := layer.weight.grad) is not None
        ]
        fresh = []
        for layer, gradient in pairs:
            before, version = self._mapped.get(id(layer), (None, None))
            if before is not gradient or version != local(gradient)._version:
                fresh.append((layer, gradient))
        ops.map_gradients_([local(gradient) for _, gradient in fresh], [layer.factors for layer, _ in fresh])
        self._mapped = {id(layer): (gradient, local(gradient)._version) for layer, gradient in pairs}
        layers = [layer for layer, _ in pairs]
        kept = ops.remember([local(layer.weight) for layer in layers], [layer.factors for layer in layers])
        self._inside = list(zip(layers, kept, strict=True))

    @torch.no_grad()
    def leave(self) -> None:
        """Bring the changes of V since `enter` back from the coordinates of z."""
        inside, self._inside, self._mapped = self._inside, [], {}
        ops.map_changes_(
            [local(layer.weight) for layer, _ in inside],
            [before for _, before in inside],
            [layer.factors for layer, _ in inside],
        )


class Decorrelates:
    """What optimizers, and objects around one, do with their engine between steps."""

    engine: Engine[StockLayer] | None
    """Holds R: `engine.rates()`, `engine.caution()`, `engine.loss()`, `engine.eta`."""
    _kept_maps: Maps | None = None

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        """Of the weights."""
        raise NotImplementedError

    @property
    def _live(self) -> Engine[StockLayer]:
        """The engine, where there is one."""
        assert self.engine is not None
        return self.engine

    @property
    def _maps(self) -> Maps:
        """Of the engine; the same at every step, as a step that raises may have mapped gradients."""
        if self._kept_maps is None or self._kept_maps.engine is not self.engine:
            self._kept_maps = Maps(self._live)
        return self._kept_maps

    def drop_samples(self) -> None:
        """Forget the rows sampled since the last step, for steps that are to be skipped."""
        if self.engine is not None:
            self.engine.drop_samples()

    def report(self) -> str:
        """A table of all R, see `dbpkern.engine.Engine.report`; what is silent shows here.

        Raises:
            ValueError: there is no engine.
        """
        if self.engine is None:
            raise ValueError(
                f"{type(self).__name__}.report: expected an optimizer that was made with a model"
            )
        return self.engine.report()

    def replan(self, model: nn.Module, decor: Decor) -> None:
        """Choose other layers, between two steps; the function of the network stays as it is.

        Layers that stay chosen with the same rank keep their R, new ones start from the identity. Moments
        stay, too: those of a layer that comes or goes are of the other coordinates at first.

        Args:
            model: of the optimizer.
            decor: which layers, and how their R move from now on.

        Raises:
            TypeError: `decor` is no `Decor`.
            ValueError: as at construction, or there is no engine; nothing is changed then.
        """
        if self.engine is None:
            raise ValueError(
                f"{type(self).__name__}.replan: expected an optimizer that was made with a model"
            )
        self.engine = rechosen(self.engine, model, self._optimizer, decor)

    def remove(self) -> None:
        """Leave the model without R, free for another optimizer; the optimizer goes on as a plain one."""
        if self.engine is not None:
            for layer in self.engine.layers.values():
                layer.remove()
            state.detach(self._optimizer)
        self.engine = None


class DecorOptimizer(Decorrelates, torch.optim.Optimizer):
    """An optimizer of the weights with an engine of its own: R is in its state.

    Args:
        params: parameters or groups of them, as every optimizer takes them.
        defaults: of the groups.
        model: whose layers are decorrelated; None for none.
        decor: the rule; `Decor()` for None.
    """

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], model: nn.Module | None, decor: Decor | None
    ) -> None:
        for name in ("lr", "eps", "weight_decay"):
            value = defaults[name]
            if name == "lr" and isinstance(value, Tensor):  # not read: that would wait for its device
                if value.dim() or not value.is_floating_point():
                    raise ValueError(
                        f"lr: expected a number or a 0-d tensor of one, got {value.dtype} {list(value.shape)}"
                    )
            elif not value >= 0:
                raise ValueError(f"{name}: expected a number >= 0, got {value}")
        if not all(0 <= beta < 1 for beta in defaults["betas"]):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {defaults['betas']}")
        if model is None and decor is not None:
            raise ValueError(f"{type(self).__name__}: expected the model that decor is for, got none")
        super().__init__(params, defaults)
        self.engine = None if model is None else make_engine(model, self, decor or Decor())

    def _trained(self) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """Each group with its parameters that have gradients; raises before a step has changed anything."""
        found = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        if any(gradient.is_sparse for _, trained in found for gradient in gradients_of(trained)):
            raise RuntimeError(f"{type(self).__name__}: expected dense gradients, got a sparse one")
        return found

    def _adamw_states(self, group: dict[str, Any], parameters: list[Tensor]) -> tuple[list[Tensor], ...]:
        """The counts of steps, and both moments, of parameters that AdamW steps."""
        for parameter in parameters:
            state = self.state[parameter]
            if "step" not in state:
                # On the device where kernels read it there.
                device = parameter.device if group["capturable"] or parameter.is_cuda else None
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        names = ("step", "exp_avg", "exp_avg_sq")
        return tuple([self.state[p][name] for p in parameters] for name in names)

    def _step_adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Step parameters of a group by PyTorch's AdamW."""
        if not parameters:
            return
        steps, means, squares = self._adamw_states(group, parameters)
        adamw(
            parameters, gradients_of(parameters), means, squares, [], steps,
            fused=all(p.is_cuda and p.is_floating_point() for p in parameters) or None,
            capturable=group["capturable"], amsgrad=False, maximize=False,
            beta1=group["betas"][0], beta2=group["betas"][1],
            lr=group["lr"], eps=group["eps"], weight_decay=group["weight_decay"],
        )  # fmt: skip

    def _step_weights(self) -> None:
        """Step all weights, in the coordinates of z where they have an R."""
        raise NotImplementedError

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """Step the weights, then R.

        Args:
            closure: evaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.engine is not None:
            self.engine.check_sampled()  # before a weight has changed
        self._step_weights()
        if self.engine is not None:
            step_engine(self.engine, self)
        return loss

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        return self

    def state_dict(self) -> dict[str, Any]:
        """As every optimizer's, with R beside the state of its weights, see `dbpkern.optim.state`."""
        found = super().state_dict()
        return found if self.engine is None else state.write(self.engine, self, found)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict()`; rows sampled since the last step are dropped.

        A state without R, of a plain optimizer, loads with a warning: R is the identity then.

        Raises:
            ValueError: R of other layers, widths or ranks; nothing is changed then.
        """
        own, found = (state_dict, []) if self.engine is None else state.split(self.engine, self, state_dict)
        super().load_state_dict(own)
        for entry in self.state.values():
            if "step" in entry:  # others count in fp64 or in integers
                entry["step"] = torch.as_tensor(entry["step"], dtype=torch.float32)
        if self.engine is not None:
            state.restore(self.engine, found)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"engine": self.engine}
