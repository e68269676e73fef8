"""The sides of every comparison: a model in training, plain, by dbpkern or by the published rule."""

import contextlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import dbpkern
from bench.baselines import PublishedLinear, published_convert, published_layers, published_update
from bench.cases import Case, in_encoder
from dbpkern.convert import RANK_PRESETS, select
from dbpkern.precondition import EVERY

# dtype of the weights, dtype of autocast
PRECISIONS = {
    "fp64": (torch.float64, None),
    "fp32": (torch.float32, None),
    "bf16": (torch.float32, torch.bfloat16),
}
METHODS = ("around", "ours", "published")
PERIOD = EVERY  # steps that hold one update of every arm's R
RATE = 5e-4  # of R (arXiv 2510.14657)


class Arm:
    """One model in training.

    Args:
        case: the model.
        method: "plain"; "ours" (decorrelated layers), "around" (`DecorPreconditioner`) or "published", which
            have a full R in the encoder and update it in each step; or "default", `DecorPreconditioner` as it
            is by default, but for the ranks.
        sites: a preset of `dbpkern.decorrelate`; of "default" a preset of ranks; plain has no use for it.
        inputs: of the model, the same at every step.
        precision: a key of `PRECISIONS`.
        optimizer: makes the optimizer of the weights.
        lr: rate of R.
        kappa: weight of the unit-variance term.
        rule: further options of `DecorSGD` or `DecorPreconditioner`.
    """

    def __init__(
        self,
        case: Case,
        method: str,
        sites: str | None,
        inputs: tuple[Tensor, ...],
        precision: str,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] = torch.optim.AdamW,
        lr: float = RATE,
        kappa: float = 0.0,
        **rule: object,
    ) -> None:
        self.method, self.sites = method, sites
        self.inputs = inputs
        self.lr, self.kappa = lr, kappa
        device = inputs[0].device
        dtype, lower = PRECISIONS[precision]
        self.autocast = lambda: torch.autocast(device.type, lower, enabled=lower is not None)
        self.model = case.build()
        if not isinstance(inputs[0], FakeTensor):  # whose model cannot be moved, not even to where it is
            self.model.to(device, dtype)
        self.decor = None
        if method == "ours":
            dbpkern.decorrelate(self.model, sites, in_encoder)
            self.decor = dbpkern.DecorSGD(self.model, lr, kappa, **rule)
        elif method == "published":
            published_convert(self.model, select(self.model, sites, in_encoder))
        self.optimizer = optimizer([p for p in self.model.parameters() if p.requires_grad])
        if method == "around":
            rule = {"rank": None, "every": 1} | rule
            self.decor = dbpkern.DecorPreconditioner(
                self.model, self.optimizer, sites, in_encoder, lr=lr, kappa=kappa, **rule
            )
        elif method == "default":
            self.decor = dbpkern.DecorPreconditioner(self.model, self.optimizer, rank=sites)

    def step(self, phase: Callable = contextlib.nullcontext) -> Tensor:
        """One training step; `phase(name)` is entered around its parts. Returns the loss."""
        with phase("forward"):
            self.optimizer.zero_grad()
            with self.autocast():
                loss, _ = self.model(*self.inputs)
        with phase("backward"):
            loss.backward()
        with phase("optimizer"):
            self.optimizer.step()
        with phase("decor"):
            if self.method == "ours":
                self.decor.step()
            elif self.method == "published":
                published_update(self.model, self.lr, self.kappa)
        return loss.detach()

    @torch.no_grad()
    def output(self) -> Tensor:
        """What the model makes of its inputs."""
        with self.autocast():
            return self.model(*self.inputs)[1]

    def samples(self) -> list[Tensor]:
        """The sampled rows as they lie in memory between steps; images that are kept count as inputs."""
        if self.decor is not None:
            return [rows for stack in self.decor._stacks for rows in stack.samples.values()]
        layers = published_layers(self.model).values()
        return [layer.z for layer in layers if isinstance(layer, PublishedLinear)]

    def R(self) -> dict[str, Tensor]:
        """Every R by layer name; of arms with full ones."""
        if self.method == "ours":
            # The modules' buffers, not the optimizer's list, which is of its last step.
            return {name: self.model.get_submodule(name).R for name in self.decor.names}
        if self.decor is not None:
            return {name: layer.factors[0] for name, layer in self.decor.layers.items()}
        return {name: layer.R for name, layer in published_layers(self.model).items()}

    def factors(self) -> list[Tensor]:
        """What holds the R of all layers."""
        if self.method == "default":
            return [factor for layer in self.decor.layers.values() for factor in layer.factors]
        return list(self.R().values())


def methods(sites: Iterable[str]) -> list[tuple[str, str | None]]:
    """Plain first, then the default with each preset of ranks, then full R at each choice of sites."""
    arms = [("plain", None)] + [("default", rank) for rank in RANK_PRESETS]
    return arms + [(method, chosen) for chosen in sites for method in METHODS]
