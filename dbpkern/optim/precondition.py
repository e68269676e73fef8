"""`DecorPreconditioner`: decorrelated backpropagation around an optimizer, with the model left as it is.

R makes its step after the optimizer's, which leaves V and so the function of the network as they are. This is
the update `W <- W R_old R_new^-1` of a decorrelated layer, without R's inverse.
"""

from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dbpkern.config import Decor
from dbpkern.optim import state
from dbpkern.optim.base import Decorrelates, make_engine, step_engine
from dbpkern.stacks import Site
from dbpkern.stock import StockLayer


class DecorPreconditioner(Decorrelates):
    """Decorrelated backpropagation with any optimizer, in one line and without a change of the model.

        decor = dbpkern.DecorPreconditioner(model, optimizer)
        ...
        loss.backward(); optimizer.step()          # as before

    Hooks on the optimizer map the gradients of the chosen layers before its step and the changes of their
    weights after it, and then update R. The modules, their forward and backward and their state_dict stay
    those of the plain model: nothing has to be fused at the end. R is in the optimizer's own state_dict.

    `step(closure)` works with optimizers that evaluate the closure once, before they step.

    The optimizer's weight decay is mapped like the rest of its change: V decays by `lr wd V R`. `DecorAdamW`
    and `DecorMuon`, which know their decay, take it off V itself: prefer them where it is strong.

    Args:
        model: any model; layers that share an input, like separate q, k and v projections, share R.
        optimizer: of its weights.
        decor: which layers, and how their R move; `Decor()` for None.

    Raises:
        TypeError: `model` is no module, `optimizer` no optimizer, or `decor` no `Decor`.
        ValueError: as `decorrelate` for sites, filters and ranks, a weight that FSDP shards by columns, or
            the optimizer lacks a chosen layer's weight that trains.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, decor: Decor | None = None
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self._around = optimizer
        self._entered = False
        self._loading: list[tuple[Site, dict[str, Any]]] = []
        self.engine = make_engine(model, optimizer, Decor() if decor is None else decor)
        self._hooks: list[RemovableHandle] = []
        try:
            self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))
            self._hooks.append(optimizer.register_state_dict_post_hook(self._write_state))
            self._hooks.append(optimizer.register_load_state_dict_pre_hook(self._split_state))
            self._hooks.append(optimizer.register_load_state_dict_post_hook(self._restore_state))
        except AttributeError as error:  # it does not call its base class's __init__
            self.remove()
            raise TypeError(
                "optimizer: expected one with the hooks of torch.optim.Optimizer, "
                f"{type(optimizer).__name__} lacks some; take the optimizer inside it"
            ) from error

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        return self._around

    @property
    def layers(self) -> dict[str, StockLayer]:
        """The chosen layers, each with its R beside it, by name."""
        return self._live.layers

    @torch.compiler.disable
    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        first, *others = args  # the optimizer itself comes first
        closure = kwargs.get("closure", others[0] if others else None)
        if closure is None:
            self._enter(optimizer)
            return None
        evaluated = False

        def mapped() -> object:
            nonlocal evaluated
            if evaluated:
                raise RuntimeError(
                    "DecorPreconditioner: expected an optimizer that evaluates its closure once, but "
                    f"{type(optimizer).__name__} does so again: its later gradients would be of weights "
                    "half way between two coordinates"
                )
            evaluated = True
            with torch.enable_grad():
                loss = closure()
            self._enter(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": mapped}
        return (first, mapped, *others[1:]), kwargs

    def _enter(self, optimizer: torch.optim.Optimizer) -> None:
        self._live.check_sampled()  # before a weight has changed
        self._entered = True
        self._maps.enter(optimizer)

    @torch.compiler.disable
    def _after_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not self._entered:
            return  # a step() that calls super().step() runs the hooks of both
        self._entered = False
        self._maps.leave()
        step_engine(self._live, optimizer)

    def _write_state(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return state.write(self._live, optimizer, state_dict)

    def _split_state(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        own, self._loading = state.split(self._live, optimizer, state_dict)
        return own

    def _restore_state(self, optimizer: torch.optim.Optimizer) -> None:
        state.restore(self._live, self._loading)
        self._loading = []

    def remove(self) -> None:
        """Take all hooks off: the optimizer goes on without this object, from the same weights."""
        for hook in self._hooks:
            hook.remove()
        super().remove()

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "a DecorPreconditioner cannot be copied or pickled: its hooks are on one optimizer; make a new "
            "one for the copy, and load the optimizer's state_dict()"
        )
