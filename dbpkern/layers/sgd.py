"""`DecorSGD`: the optimizer of the decorrelation matrices of decorrelated layers."""

import warnings
from collections.abc import Callable
from typing import Any, NoReturn, overload

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dbpkern.config import Decor
from dbpkern.engine import Engine
from dbpkern.layers.modules import Decorrelated
from dbpkern.optim.base import followed


class DecorSGD(torch.optim.Optimizer):
    """Updates every R of a model with decorrelated layers by the rule `R <- R - eta M R`.

    Call `step()` after the main optimizer's:

        loss.backward(); optimizer.step(); decor.step()

    While it lives, every converted layer in training mode copies a random sample of its input rows aside
    in each backward. `step()` decorrelates the samples, forms their statistics (averaged over processes
    where a process group is initialised) and updates all R of equal width together, without waiting for
    the device. R rests in layers whose weight is frozen or which are in eval mode.

    A layer whose samples are not finite rests for that step, and its eta is halved from then on: see
    `engine.caution()`.

    It is a `torch.optim.Optimizer` whose `lr` is eta, so learning-rate schedulers attach to it. It finds R in
    the modules at every step: `.to()`, `load_state_dict` and the like are safe in between. Afterwards R, or Q
    and S, are views of one tensor per width and rank.

    Args:
        model: a model with decorrelated layers.
        decor: how R moves; its sites, filter and rank are those that `decorrelate` was given, and have no say
            here. `Decor.layers()` for None.
        optimizer: of the weights, for `Decor(follow=True)`.

    Raises:
        TypeError: `model` is not a module, `decor` no `Decor`, or `optimizer` no optimizer.
        ValueError: no decorrelated layer in the model, or one of `follow` and `optimizer` without the other.
    """

    engine: Engine[Decorrelated]
    """Holds R: `engine.rates()`, `engine.caution()`, `engine.loss()`."""

    def __init__(
        self, model: nn.Module, decor: Decor | None = None, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"DecorSGD: expected a model, got {type(model).__name__}")
        decor = Decor.layers() if decor is None else decor
        if not isinstance(decor, Decor):
            raise TypeError(f"decor: expected a Decor, got {type(decor).__name__}")
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer: expected an optimizer, got {type(optimizer).__name__}")
        if decor.follow != (optimizer is not None):
            raise ValueError(
                "DecorSGD: expected the optimizer that eta follows with Decor(follow=True), and only then; "
                f"got follow={decor.follow} and {'an' if optimizer is not None else 'no'} optimizer"
            )
        if isinstance(model, DistributedDataParallel) and model.broadcast_buffers:
            warnings.warn(
                "DistributedDataParallel(broadcast_buffers=True) sends every R before each forward, though "
                "they are equal on all processes; pass broadcast_buffers=False (in newer versions of torch: "
                "forward_sync_buffers=False)",
                stacklevel=2,
            )
        layers = {name: m for name, m in model.named_modules() if isinstance(m, Decorrelated)}
        if not layers:
            raise ValueError(
                "DecorSGD: expected a model with decorrelated layers; call decorrelate(model) first"
            )
        self.engine = Engine(layers, decor)
        self._followed = optimizer
        super().__init__(self.engine.factors(), {"lr": decor.eta})

    def drop_samples(self) -> None:
        """Forget the rows sampled since the last step, for steps that are to be skipped."""
        self.engine.drop_samples()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], object]) -> NoReturn: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], object] | None = None) -> None:
        """Update every R from the rows sampled since the last step; layers without rows keep theirs.

        With a process group initialised this is a collective: every process must call it.

        Raises:
            ValueError: a closure, or in the first step processes with other R, types of device or rules.
        """
        if closure is not None:
            raise ValueError("DecorSGD.step: expected no closure: R is not a function of the task loss")
        self.engine.eta = self.param_groups[0]["lr"]
        self.engine.step(1.0 if self._followed is None else followed(self._followed))
        self.param_groups[0]["params"] = self.engine.factors()

    def state_dict(self) -> dict[str, Any]:
        """eta, the sampling's position, and caution; R itself is in the model's state_dict."""
        state = super().state_dict()
        state["sampling"] = {"seed": self.engine.sampler.seed, "step": self.engine.sampler.step}
        state["caution"] = self.engine.caution()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
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
        self.engine.drop_samples()
        self.engine.restore_caution(state_dict["caution"])
        self.engine.sampler.seek(**state_dict["sampling"])

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"engine": self.engine, "_followed": self._followed}
