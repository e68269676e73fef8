"""The runs of `python -m bench convergence`, as data: settings, arms, learning rates, seeds.

A run is named by (preset, arm, rate, seed). The main arms are run at several rates with the first seed; each
arm's best rate, by its final training loss, is then run with the other seeds, too. Ablations change one
setting of the arm "dbp" and run at that arm's best rate.
"""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from train.pretrain import Config

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Preset:
    """What all runs of a matrix share.

    Args:
        settings: of `train.pretrain.Config`, by dotted name.
        evaluations: how often a run is evaluated, at equal intervals.
        probe: images of the linear probe, half of them to fit it; 0 for no probe.
    """

    settings: Mapping[str, object]
    evaluations: int = 4
    probe: int = 800


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Args:
        title: in tables.
        settings: of `train.pretrain.Config`, by dotted name.
        rates: peak learning rates to try; none for an ablation.
        published: whether R is served by `bench.baselines`, the published rule as published.
    """

    title: str
    settings: Mapping[str, object] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    published: bool = False


_PHOTOS = {
    "model": "mae_vit_tiny",
    "model_args": {
        "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4,
        "decoder_embed_dim": 64, "decoder_depth": 2, "decoder_num_heads": 4,
    },
    "img_size": 64,
    "steps": 500,
    "batch_size": 64,
    "optim.warmup_steps": 40,
    "device": "cpu",
    "precision": "fp32",
}  # fmt: skip
_IMAGENET = {
    "img_size": 224,
    "decoder": "dbp",
    "steps": 20_000,
    "batch_size": 512,
    "optim.warmup_steps": 1_000,
    "data.fraction": 0.1,
    "data.workers": 14,
    "device": "cuda",
    "precision": "bf16",
}
PRESETS = {
    "photos": Preset(_PHOTOS),
    "photos-long": Preset(_PHOTOS | {"steps": 5000, "optim.warmup_steps": 100}, evaluations=10, probe=0),
    "vit-s": Preset(_IMAGENET | {"model": "mae_vit_small"}, evaluations=10),
    "vit-b": Preset(_IMAGENET | {"model": "mae_vit_base"}, evaluations=10),
}

_RATES = (2e-3, 3e-3, 5e-3, 8e-3)
_DBP = {"decor.enable": True}
_LAYERS = {"decor.enable": True, "decor.form": "auto", "decor.scale_free": False, "decor.eta": 1e-2}

ARMS = {
    "adamw": Arm("AdamW", {}, _RATES),
    "muon": Arm("Muon", {"optim.name": "muon"}, _RATES),
    "kron": Arm("Kron (PSGD)", {"optim.name": "kron"}, (3e-4, 1e-3, 2e-3, 3e-3)),
    "published": Arm(
        "DBP as published",
        {"decor.sites": "all", "decor.decoder": False, "decor.eta": 5e-4},
        _RATES,
        published=True,
    ),
    "dbp": Arm("DBP", _DBP, _RATES),
    "dbp-rank32": Arm("DBP, rank 32", _DBP | {"decor.rank": 32}, _RATES),
    "dbp-muon": Arm("DBP with Muon", _DBP | {"optim.name": "muon"}, _RATES),
    "dbp-layers": Arm("DBP in the layers", _LAYERS, _RATES),
}

ABLATIONS = {
    "sample": {
        f"sample-{share}": Arm(f"sample {share} %", _DBP | {"decor.sample": share / 100})
        for share in (2, 5, 20)
    },
    "every": {f"every-{k}": Arm(f"every {k} steps", _DBP | {"decor.every": k}) for k in (2, 4, 10)},
    "sites": {
        "sublayers": Arm("sublayer sites", _DBP | {"decor.sites": "sublayers"}),
        "encoder": Arm("encoder alone", _DBP | {"decor.decoder": False}),
        "encoder-sublayers": Arm(
            "encoder alone, sublayer sites", _DBP | {"decor.decoder": False, "decor.sites": "sublayers"}
        ),
    },
    "rank": {f"rank-{r}": Arm(f"rank {r}", _DBP | {"decor.rank": r}) for r in (8, 16)},
    "rate": {f"eta-{eta:g}": Arm(f"eta {eta:g}", _DBP | {"decor.eta": eta}) for eta in (0.02, 0.15)},
    "schedule": {"constant": Arm("constant eta", _DBP | {"decor.follow": False})},
    "scale": {
        "unscaled": Arm("not scale-free, eta 0.01", _DBP | {"decor.scale_free": False, "decor.eta": 1e-2})
    },
}


def every_arm() -> dict[str, Arm]:
    """Main arms and ablations by name."""
    return ARMS | {name: arm for family in ABLATIONS.values() for name, arm in family.items()}


@dataclass(frozen=True)
class Run:
    """One run of a matrix."""

    preset: str
    arm: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its JSON file."""
        return f"{self.arm}_lr{self.rate:g}_seed{self.seed}"

    def config(self, out: str, data: Mapping[str, object]) -> Config:
        """What `train/pretrain.py` is started with.

        Args:
            out: folder of the run.
            data: further settings, such as where the images are.
        """
        arm, preset = every_arm()[self.arm], PRESETS[self.preset]
        config = Config(out)
        steps = preset.settings["steps"]
        common = {"seed": self.seed, "eval_every": steps // preset.evaluations, "checkpoint_every": steps}
        for name, value in (preset.settings | common | dict(data) | dict(arm.settings)).items():
            assign(config, name, value)
        config.optim.blr = self.rate * 256 / config.batch_size
        return config


def assign(config: Config, name: str, value: object) -> None:
    """Set a setting by its dotted name.

    Raises:
        ValueError: there is none of that name.
    """
    target = config
    *path, last = name.split(".")
    for part in path:
        target = getattr(target, part, None)
    if last not in {f.name for f in dataclasses.fields(target)} if target is not None else True:
        raise ValueError(f"expected the name of a setting of train/pretrain.py, got {name!r}")
    setattr(target, last, copy.deepcopy(value))
