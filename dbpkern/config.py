"""`Decor`: which layers are decorrelated, and how their R moves."""

import math
from dataclasses import dataclass, replace
from typing import Literal, Self

from torch import Tensor

from dbpkern.ops._common import check_eta, check_kappa
from dbpkern.sites import Filter, Ranks, check_ranks, check_sites


@dataclass(frozen=True)
class Decor:
    """The rule of decorrelation: every entry point takes one, and each field is named here alone.

    Change fields with `dataclasses.replace(Decor.published(), sites="sublayers")`.

    Args:
        sites: which layers: "all" (patch embedding, qkv, proj, fc1, fc2), "sublayers" (patch embedding, qkv,
            fc1: the inputs of both sublayers), or some of "patch_embed", "qkv", "proj", "fc1", "fc2". With
            None, `filter` alone chooses among all linear layers, patch convolutions and
            `nn.MultiheadAttention`.
        filter: `filter(name, module) -> bool` narrows the choice to the layers it accepts, for example
            `lambda name, module: not name.startswith("decoder")`.
        rank: None for a full R of `d^2` numbers in every layer; an integer r for `R = I + Q S Q^T` with
            `d r + r^2` numbers; a number in (0, 1) for that part of each layer's width d, rounded up to a
            multiple of 8 (from about a third on, a full R takes less time); ranks by site or by layer's name,
            as in `{"fc2": 128}`, where others get a full R; or a preset: "low" (1/12 of the width, and 1/48
            for fc2) or "mixed" (the same, with a full R for qkv).
        eta: rate of R, at least 0, before `limit` and `every`; a number or a 0-d tensor, which is read at
            each step. With `scale_free` it is the part of a correlation that one step removes: then give
            about 0.05.
        sample: fraction in (0, 1] of a layer's input rows that are sampled, without replacement; at least
            one row is taken.
        every: R is updated on every so-many-th step, by `every` times the rate; nothing is sampled on the
            others.
        scale_free: divide `M_ij` by `a_i + a_j`, a the mean squares of z: correlations then shrink by the
            factor `1 - eta` a step, whatever the variances. For a low-rank R, divide M by twice their mean.
            It is ahead in runs of some hundred steps and behind from some thousand on.
        limit: each layer's rate is at most this over an upper bound of the largest eigenvalue of its M. A
            step is stable below 2 and turns no direction round below 1. None for no limit.
        kappa: weight in [0, 1] of the unit-variance term (arXiv 2405.02385); 0 for pure decorrelation.
        follow: scale eta by the optimizer's learning rate, relative to its `initial_lr`, which the schedulers
            of torch and timm set.
        seed: of the sampling.
        unsampled: what a step does about layers to whose weights a gradient has come, but whose input was
            never sampled, so that their R would rest without a word: "raise" a RuntimeError before anything
            changes, or "warn".

    Raises:
        TypeError: a rank that is no number.
        ValueError: a number out of range, or unknown sites.
    """

    sites: str | tuple[str, ...] | None = "all"
    filter: Filter | None = None
    rank: Ranks = "mixed"
    eta: float | Tensor = 0.01
    sample: float = 0.1
    every: int = 2
    scale_free: bool = False
    limit: float | None = 0.5
    kappa: float = 0.0
    follow: bool = False
    seed: int = 0
    unsampled: Literal["raise", "warn"] = "raise"

    def __post_init__(self) -> None:
        check_sites(self.sites, self.filter)
        check_ranks(self.rank)
        if not isinstance(self.eta, Tensor):  # to read a tensor would wait for its device
            check_eta(self.eta)
        elif self.eta.dim():
            raise ValueError(f"eta: expected a number or a 0-d tensor, got shape {list(self.eta.shape)}")
        check_kappa(self.kappa)
        if not (math.isfinite(self.sample) and 0.0 < self.sample <= 1.0):
            raise ValueError(f"sample: expected a fraction in (0, 1], got {self.sample}")
        if self.limit is not None and not 0.0 < self.limit < 2.0:
            raise ValueError(
                f"limit: expected a number in (0, 2), where a step is stable, or None, got {self.limit}"
            )
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every: expected a whole number of steps, at least 1, got {self.every!r}")
        if self.unsampled not in ("raise", "warn"):
            raise ValueError(f"unsampled: expected 'raise' or 'warn', got {self.unsampled!r}")

    @classmethod
    def published(cls) -> Self:
        """The papers' rule and sites: a full R everywhere, a constant eta, no limiter (arXiv 2510.14657)."""
        return cls(rank=None, eta=5e-4, every=1, limit=None)

    @classmethod
    def layers(cls) -> Self:
        """The default of `decorrelate` and `DecorSGD`: the papers' rule for sublayers, with a limit."""
        return replace(cls.published(), sites="sublayers", limit=0.5)
