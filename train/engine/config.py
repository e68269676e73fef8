"""The options that all training scripts share, as dataclasses; each script's own are derived from them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from dbpkern import Decor
from dbpkern.sites import PRESETS, Filter, Ranks, find_sites
from train.engine.energy import EnergyConfig, carbon_intensity
from train.engine.schedule import warmup_cosine


@dataclass(kw_only=True)
class OptimConfig:
    """The optimizer of the weights and its schedule.

    Args:
        name: Of the optimizer, one of those that a script offers.
        blr: Base learning rate; the peak rate is blr * batch_size / 256.
        min_lr: Rate at the end of the run.
        warmup_epochs: Length of the linear warm-up.
        warmup_steps: The same in steps; overrides warmup_epochs.
        weight_decay: Of weights with two or more dimensions; biases and norms have none.
        betas: Of AdamW.
        clip_grad: Largest norm of the gradient, before R maps it; null for no limit.
    """

    name: str
    blr: float
    min_lr: float = 0.0
    warmup_epochs: float
    warmup_steps: int | None = None
    weight_decay: float = 0.05
    betas: tuple[float, float]
    clip_grad: float | None = None


@dataclass
class DecorConfig:
    """Decorrelated backpropagation around the optimizer.

    Args:
        enable: Turns it on.
        sites: Which layers of a block: "sublayers" (patch embedding, qkv, fc1), "all", or a list of
            patch_embed, qkv, proj, fc1, fc2.
        encoder_only: Leaves the decoder as it is.
        eta: Rate of the decorrelation step.
        follow: Whether eta follows the schedule of the learning rate.
        scale_free: Whether the step is free of the variances of z; with an eta of 0.05 for runs of some
            hundred steps.
        limit: Of eta times an upper bound of the eigenvalues of each layer's M; null for no limit.
        every: Steps from one update of R to the next, which has that many times eta.
        kappa: Weight in [0, 1] of the unit-variance term.
        sample: Part of the rows, in (0, 1], that the statistics are taken from.
        rank: Of R - I: "low" (a twelfth of each layer's width, 1/48 for fc2), "mixed" (the same, with a full
            R for qkv), null for a full R everywhere, a number of dimensions, or below 1 a part of the width;
            also by site, such as {fc2: 64}, where the others get a full R.
    """

    enable: bool = False
    sites: str | list[str] = "all"
    encoder_only: bool = False
    eta: float = float(Decor.eta)
    follow: bool = Decor.follow
    scale_free: bool = Decor.scale_free
    limit: float | None = Decor.limit
    every: int = Decor.every
    kappa: float = Decor.kappa
    sample: float = Decor.sample
    rank: Literal["mixed", "low"] | int | float | dict[str, int | float] | None = "mixed"

    def present(self, model: nn.Module) -> list[str]:
        """The sites; of a preset those that the model has: one that reads tokens has no patch embedding."""
        if isinstance(self.sites, str) and self.sites in PRESETS:
            found = find_sites(model)
            return [site for site in PRESETS[self.sites] if found[site]]
        return [self.sites] if isinstance(self.sites, str) else self.sites

    def accepts(self, name: str, module: nn.Module) -> bool:
        """The filter of the rule: leaves the decoder out where only the encoder is asked for."""
        return not (self.encoder_only and name.startswith("decoder"))

    def rule(self, model: nn.Module, seed: int, ranks: Mapping[str, int | None] | None = None) -> Decor:
        """The rule for a model, with the layers of the options, or those of a plan by its `ranks`.

        Raises:
            ValueError: a number out of range, or unknown sites.
        """
        sites: tuple[str, ...] | None
        accepts: Filter
        rank: Ranks
        if ranks is None:
            sites, accepts, rank = tuple(self.present(model)), self.accepts, self.rank
        else:
            sites, accepts, rank = None, lambda name, module: name in ranks, ranks
        return Decor(
            sites=sites,
            filter=accepts,
            rank=rank,
            eta=self.eta,
            sample=self.sample,
            every=self.every,
            scale_free=self.scale_free,
            limit=self.limit,
            kappa=self.kappa,
            follow=self.follow,
            seed=seed,
        )


@dataclass(kw_only=True)
class RunConfig:
    """A run, whatever it trains.

    Args:
        out: Folder of the run; made if missing. It must be empty, or hold this very run and be resumed.
        epochs: Length of the run, in passes over the training images.
        steps: The same in optimizer steps; overrides epochs.
        batch_size: Images per optimizer step, over all processes and micro-batches.
        accumulation: Micro-batches per step.
        optim: The optimizer of the weights.
        decor: Decorrelated backpropagation, around the optimizer.
        energy: What is told of the energy that the steps take.
        seed: Of everything random.
        device: "auto", "cpu" or "cuda".
        precision: "fp32", "bf16" (autocast), or "auto" for bf16 on GPUs and fp32 elsewhere.
        compile: Whether to run the model through torch.compile.
        deterministic: Whether to ask for bit-reproducible results on GPUs, which segmentation does not have
            there; on CPUs they always are.
        resume: "none", "auto" to continue from the newest whole checkpoint in out if there is one, or
            the path of a checkpoint of this run.
        eval_every: Steps between evaluations on held-out images.
        checkpoint_every: Steps between checkpoints.
        keep: Checkpoints kept.
        max_bad_steps: Steps in a row with a non-finite loss that are skipped before the run stops.
        profile: Whether to write a trace of a few steps, for TensorBoard's profiler plugin.
    """

    out: str = field(kw_only=False)
    epochs: float
    steps: int | None = None
    batch_size: int
    accumulation: int = 1
    optim: OptimConfig
    decor: DecorConfig = field(default_factory=DecorConfig)
    energy: EnergyConfig = field(default_factory=EnergyConfig)
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    deterministic: bool = False
    resume: str = "none"
    eval_every: int = 1000
    checkpoint_every: int = 1000
    keep: int = 2
    max_bad_steps: int = 10
    profile: bool = False

    decay = staticmethod(warmup_cosine)  # the schedule of the learning rate

    @property
    def peak_lr(self) -> float:
        """Learning rate at the end of the warm-up."""
        return self.optim.blr * self.batch_size / 256

    def autocast(self, device: torch.device) -> torch.dtype | None:
        """dtype of mixed precision on a device, None for none."""
        bf16 = self.precision == "bf16" or (self.precision == "auto" and device.type == "cuda")
        return torch.bfloat16 if bf16 else None

    def check_numbers(self, least_steps: int = 1) -> None:
        """Raise ValueError for numbers out of range, and for a country that is not known.

        Args:
            least_steps: The shortest run.
        """
        at_least = {
            "batch_size": 1, "accumulation": 1, "eval_every": 1, "checkpoint_every": 1,
            "keep": 1, "max_bad_steps": 1, "seed": 0,
        }  # fmt: skip
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.steps is not None and self.steps < least_steps:
            raise ValueError(f"steps: expected at least {least_steps}, got {self.steps}")
        if not (math.isfinite(self.epochs) and self.epochs > 0):
            raise ValueError(f"epochs: expected a number above 0, got {self.epochs}")
        if self.seed >= 2**63:
            raise ValueError(f"seed: expected less than 2**63, got {self.seed}")
        clip = self.optim.clip_grad
        if clip is not None and not 0 < clip < math.inf:
            raise ValueError(f"optim.clip_grad: expected a finite number above 0 or null, got {clip}")
        for name, value in vars(self.optim).items():
            if isinstance(value, int | float) and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"optim.{name}: expected a finite number >= 0, got {value}")
        if self.energy.country is not None:
            carbon_intensity(self.energy.country)

    def micro_batch(self, processes: int) -> int:
        """Images that each of so many processes takes at a time."""
        return self.batch_size // (self.accumulation * processes)

    def schedule(self, samples: int) -> tuple[int, Callable[[int], float]]:
        """The length of the run in steps, and the learning rate by step.

        Args:
            samples: Training images.

        Raises:
            ValueError: the warm-up is longer than the run.
        """
        per_epoch = samples / self.batch_size
        total = max(1, round(self.epochs * per_epoch)) if self.steps is None else self.steps
        warmup = self.optim.warmup_steps
        if warmup is None:
            warmup = round(self.optim.warmup_epochs * per_epoch)
        if warmup > total > 0:
            raise ValueError(
                f"optim: the warm-up of {warmup} steps is longer than the run of {total}; "
                "set --optim.warmup_steps or --optim.warmup_epochs"
            )
        return total, lambda step: self.decay(step, total, warmup, self.peak_lr, self.optim.min_lr)

    def check_sample(self, tokens: int, processes: int) -> None:
        """Raise ValueError if a micro-batch would give no rows to decorrelate by.

        `DecorSGD` takes one row at the least; statistics of one row where the user asked for less are noise.

        Args:
            tokens: Of an image, in the layers.
            processes: That share a batch.
        """
        rows = self.micro_batch(processes) * tokens
        sample = self.decor.sample
        if self.decor.enable and 0 < sample <= 1 and round(sample * rows) < 1:
            raise ValueError(
                f"decor.sample: {sample} of the {rows} rows of a micro-batch gives no rows; "
                f"expected at least {1 / rows:.2g}"
            )
