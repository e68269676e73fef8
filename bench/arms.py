"""The sides of every comparison: a model in training, plain, by dbpkern or by the published rule."""

import contextlib
import functools
from collections.abc import Callable, Iterable
from dataclasses import replace

import timm.optim.muon
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import dbpkern
from bench.baselines import PublishedLinear, published_convert, published_layers, published_update
from bench.cases import Case, in_encoder
from dbpkern import Decor
from dbpkern.engine import Engine
from dbpkern.sites import RANK_PRESETS, select

# dtype of the weights, dtype of autocast
PRECISIONS = {
    "fp64": (torch.float64, None),
    "fp32": (torch.float32, None),
    "bf16": (torch.float32, torch.bfloat16),
}
METHODS = ("full", "layers", "published")
PERIOD = Decor.every  # steps that hold one update of every arm's R

Optimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def muon(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """timm's Muon as `DecorMuon` has it: fp32 on a CPU, where its bf16 may take ten times as long."""
    optimizer = timm.optim.muon.Muon(parameters, lr=1e-3, nesterov=True, ns_coefficients="original")
    if all(not p.is_cuda for group in optimizer.param_groups for p in group["params"]):
        iterate = timm.optim.muon.zeropower_via_newtonschulz
        if not isinstance(iterate, functools.partial):
            timm.optim.muon.zeropower_via_newtonschulz = functools.partial(iterate, dtype=torch.float32)
    return optimizer


def rule_of(method: str, choice: str | None) -> Decor | None:
    """The rule of an arm; `choice` is a preset of ranks, or one of sites for a full R in the encoder."""
    if method in METHODS:
        named = Decor.layers() if method == "layers" else Decor.published()
        rule = replace(named, sites=choice, filter=in_encoder)
        return replace(rule, scale_free=True, limit=0.5) if method == "full" else rule
    return None if choice is None else Decor(rank=choice)


class Arm:
    """One model in training.

    Args:
        case: the model.
        method: "plain"; "DecorAdamW", "DecorMuon" or "DecorPreconditioner" as they are by default but for the
            ranks; "full" (`DecorPreconditioner` with a full R, updated in each step), "layers" (decorrelated
            layers) or "published".
        choice: a preset of ranks, or of sites for the last three; None for no R.
        inputs: of the model, the same at every step.
        precision: a key of `PRECISIONS`.
        optimizer: makes the optimizer of the weights where the method has none of its own.
        rule: in place of `rule_of(method, choice)`.
    """

    def __init__(
        self,
        case: Case,
        method: str,
        choice: str | None,
        inputs: tuple[Tensor, ...],
        precision: str,
        optimizer: Optimizer = torch.optim.AdamW,
        rule: Decor | None = None,
    ) -> None:
        self.method, self.choice = method, choice
        self.inputs = inputs
        self.rule = rule or rule_of(method, choice)
        device = inputs[0].device
        dtype, lower = PRECISIONS[precision]
        self.autocast = lambda: torch.autocast(device.type, lower, enabled=lower is not None)
        self.model = case.build()
        if not isinstance(inputs[0], FakeTensor):  # whose model cannot be moved, not even to where it is
            self.model.to(device, dtype)
        if method == "layers":
            dbpkern.decorrelate(self.model, self.rule)
        elif method == "published":
            published_convert(self.model, select(self.model, self.rule.sites, self.rule.filter))
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.decor = None
        if method in ("DecorAdamW", "DecorMuon"):
            model = None if self.rule is None else self.model
            self.optimizer = getattr(dbpkern, method)(parameters, model=model, decor=self.rule)
            self.decor = self.optimizer
        else:
            self.optimizer = optimizer(parameters)
            if method == "layers":
                self.decor = dbpkern.DecorSGD(self.model, self.rule)
            elif method in ("full", "DecorPreconditioner"):
                self.decor = dbpkern.DecorPreconditioner(self.model, self.optimizer, self.rule)

    @property
    def engine(self) -> Engine | None:
        """What holds R, of arms by dbpkern."""
        return None if self.decor is None else self.decor.engine

    def step(self, phase: Callable = contextlib.nullcontext) -> Tensor:
        """One training step; `phase(name)` is entered around its parts. Returns the loss."""
        with phase("forward"):
            self.optimizer.zero_grad()
            with self.autocast():
                loss, _ = self.model(*self.inputs)
        with phase("backward"):
            loss.backward()
        self.update(phase)
        return loss.detach()

    def update(self, phase: Callable = contextlib.nullcontext) -> None:
        """The part of a step after the backward."""
        with phase("optimizer"):
            self.optimizer.step()
        with phase("decor"):
            if self.method == "layers":
                self.decor.step()
            elif self.method == "published":
                published_update(self.model, self.rule.eta, self.rule.kappa)

    @torch.no_grad()
    def output(self) -> Tensor:
        """What the model makes of its inputs."""
        with self.autocast():
            return self.model(*self.inputs)[1]

    def samples(self) -> list[Tensor]:
        """The sampled rows as they lie in memory between steps; images that are kept count as inputs."""
        if self.engine is not None:
            return [rows for stack in self.engine.stacks() for rows in stack.samples.values()]
        layers = published_layers(self.model).values()
        return [layer.z for layer in layers if isinstance(layer, PublishedLinear)]

    def R(self) -> dict[str, Tensor]:
        """Every R by layer name; of arms with full ones."""
        if self.engine is not None:
            return {name: layer.factors[0] for name, layer in self.engine.layers.items()}
        return {name: layer.R for name, layer in published_layers(self.model).items()}

    def factors(self) -> list[Tensor]:
        """What holds the R of all layers."""
        return list(self.R().values()) if self.engine is None else self.engine.factors()


def methods(sites: Iterable[str], optimizer: str = "adamw") -> list[tuple[str, str | None]]:
    """Plain first, then the defaults, then, with AdamW, full R at each choice of sites."""
    if optimizer == "muon":
        return [("plain", None), ("DecorMuon", None), ("DecorMuon", "mixed")]
    arms = [("plain", None), ("DecorAdamW", "mixed")]
    arms += [("DecorPreconditioner", rank) for rank in RANK_PRESETS]
    return arms + [(method, chosen) for chosen in sites for method in METHODS]
