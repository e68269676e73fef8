"""The runs of `python -m bench convergence`, as data: settings, arms, learning rates, seeds.

A run is named by (preset, arm, rate, seed). The main arms are run at several rates with the first seed; each
arm's best rate, by its final training loss, is then run with the other seeds, too. Ablations change
settings of a main arm, one where one can change alone, and run at that arm's best rate.
"""

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from train.config import RunConfig
from train.plots import WINDOW
from train.pretrain import Config
from train.run_folder import NEUTRAL, flat

SEEDS = (0, 1, 2)
KEPT = 5_000  # losses of a run that its file holds, at most, where the window allows it


@dataclass(frozen=True)
class Preset:
    """What all runs of a matrix share.

    Args:
        settings: of `train.pretrain.Config`, by dotted name.
        evaluations: how often a run is evaluated, at equal intervals.
        probe: how many labelled images the probe learns from, see `bench.probe`; 0 for no probe.
        needs_source: whether the images must be named; otherwise they are the photographs.
        rates: peak learning rates to try, by arm, where they are not the arm's own.
        own: settings by main arm, tuned for it; they hold for its ablations, too.
    """

    settings: Mapping[str, object]
    evaluations: int = 4
    probe: int = 400
    needs_source: bool = False
    rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    own: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Length of a run."""
        return self.settings["steps"]

    @property
    def on_gpu(self) -> bool:
        """Whether the runs need a GPU."""
        return self.settings["device"] == "cuda"

    def rates_of(self, arm: str) -> tuple[float, ...]:
        """Peak learning rates that an arm is tried at; none for an ablation."""
        return self.rates.get(arm, ARMS[arm].rates if arm in ARMS else ())

    @property
    def stride(self) -> int:
        """Steps whose losses are kept as one mean.

        It divides the window, so that a trailing mean is the mean of whole strides, and the length of a run.
        """
        fitting = [k for k in range(1, WINDOW + 1) if WINDOW % k == 0 and self.steps % k == 0]
        return next((k for k in fitting if self.steps <= k * KEPT), fitting[-1])


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Args:
        title: in tables.
        settings: of `train.pretrain.Config`, by dotted name.
        rates: peak learning rates to try; none for an ablation.
        published: whether R is served by `bench.baselines`, the published rule as published.
        like: the main arm that an ablation changes, and whose best rate it runs at.
    """

    title: str
    settings: Mapping[str, object] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    published: bool = False
    like: str = ""


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
_DARL = _PHOTOS | {  # an image has four times the tokens of one that is masked, and a loss for each
    "batch_size": 32,
    "model": "darl_vit_tiny",
    "model_args": {"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4},
}
_CIFAR = _PHOTOS | {
    "model_args": {**_PHOTOS["model_args"], "patch_size": 4},
    "img_size": 32,
    "steps": 3000,
    "batch_size": 128,
    "optim.warmup_steps": 150,
    "data.cache": "auto",
}
_CAMVID = _PHOTOS | {
    "img_size": 96,
    "steps": 1000,
    "optim.warmup_steps": 100,
    "data.cache": "auto",
}
_SHORT = {"steps": 1200, "batch_size": 64, "optim.warmup_steps": 80}
_CIFAR_DARL = _CIFAR | {
    "model": "darl_vit_tiny",
    "model_args": _DARL["model_args"] | {"patch_size": 4},
    "steps": 600,
    "batch_size": 64,
    "optim.warmup_steps": 60,
}
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
_CIFAR_RATES = {
    "adamw": (2e-3, 3e-3, 5e-3),
    "muon": (1.2e-2, 1.6e-2, 2.4e-2),
    "decor-adamw": (3e-3, 5e-3, 8e-3),
    "decor-muon": (1.2e-2, 1.6e-2, 2.4e-2),
}


def _decay(by_arm: Mapping[str, float]) -> dict[str, dict[str, float]]:
    return {arm: {"optim.weight_decay": decay} for arm, decay in by_arm.items()}


PRESETS = {
    "photos": Preset(_PHOTOS),
    "darl": Preset(_DARL),
    "darl-diffusion": Preset(_DARL | {"darl.objective": "diffusion"}),
    "cifar10": Preset(
        _CIFAR,
        evaluations=12,
        probe=2000,
        needs_source=True,
        rates=_CIFAR_RATES,
        own=_decay({"adamw": 0.2, "muon": 0.1, "decor-adamw": 0.2, "decor-muon": 0.1}),
    ),
    "cifar10-short": Preset(
        _CIFAR | _SHORT,
        evaluations=12,
        probe=0,
        needs_source=True,
        rates=_CIFAR_RATES,
        own=_decay({"adamw": 0.5, "muon": 0.1, "decor-adamw": 0.5, "decor-muon": 0.1}),
    ),
    "cifar10-darl": Preset(_CIFAR_DARL, 6, 2000, True, _CIFAR_RATES),
    "cifar10-darl-diffusion": Preset(
        _CIFAR_DARL | {"darl.objective": "diffusion"}, 6, 2000, True, _CIFAR_RATES
    ),
    "camvid": Preset(_CAMVID, evaluations=6, probe=0, needs_source=True, rates=_CIFAR_RATES),
    "vit-s": Preset(_IMAGENET | {"model": "mae_vit_small"}, evaluations=10, probe=0, needs_source=True),
    "vit-b": Preset(_IMAGENET | {"model": "mae_vit_base"}, evaluations=10, probe=0, needs_source=True),
}

_RATES = (2e-3, 3e-3, 5e-3, 8e-3)
_HIGHER = (5e-3, 8e-3, 1.2e-2)  # decorrelated, the best rate lies higher
_DECOR = {"decor.enable": True}
_MUON = {"optim.name": "muon"}
_LAYERS = _DECOR | {
    "decor.mode": "layers",
    "decor.sites": "all",
    "decor.rank": None,
    "decor.every": 1,
    "decor.scale_free": False,
    "decor.eta": 1e-2,
    "decor.follow": True,
}
# Spelled out, as runs that are finished say what they were: the preset of this name may change.
_SUBLAYERS = {"proj": 1 / 12, "fc2": 1 / 48}
_WIDE = _CIFAR["model_args"] | {
    "embed_dim": 256, "num_heads": 8, "decoder_embed_dim": 128, "decoder_num_heads": 8,
}  # fmt: skip

ARMS = {
    "adamw": Arm("AdamW", {}, _RATES),
    "muon": Arm("Muon", _MUON, (*_RATES, 1.2e-2)),
    "kron": Arm("Kron (PSGD)", {"optim.name": "kron"}, (5e-4, 1e-3, 2e-3, 3e-3)),
    "published": Arm(
        "DBP as published",
        {
            "decor.sites": "all",
            "decor.decoder": False,
            "decor.eta": 5e-4,
            "decor.rank": None,
            "decor.every": 1,
        },
        _RATES[1:],
        published=True,
    ),
    # Around PyTorch's AdamW; DecorAdamW computes the same, but for the decay and rounding.
    "dbp": Arm("DecorPreconditioner", _DECOR | {"decor.mode": "preconditioner"}, (3e-3, *_HIGHER)),
    "dbp-layers": Arm("DBP in the layers", _LAYERS, _HIGHER),
    "decor-adamw": Arm("DecorAdamW", _DECOR, _HIGHER),
    "decor-muon": Arm("DecorMuon", _DECOR | _MUON, (*_HIGHER, 2e-2)),
}


_OPTIMIZERS = ("adamw", "muon", "decor-adamw", "decor-muon")


def _changes(*changes: tuple[str, str, Mapping[str, object]], arms: Sequence[str]) -> dict[str, Arm]:
    """Ablations of main arms from (name, title, settings)."""
    return {
        f"{arm}-{name}": Arm(f"{ARMS[arm].title}, {title}", ARMS[arm].settings | settings, like=arm)
        for arm in arms
        for name, title, settings in changes
    }


ABLATIONS = {
    "rank": _changes(
        ("low", "low rank", {"decor.rank": "low"}),
        ("full", "full R everywhere", {"decor.rank": None}),
        ("sublayers-full", "full R in front of sublayers", {"decor.rank": _SUBLAYERS}),
        ("rank-8", "rank 8", {"decor.rank": 8}),
        ("rank-quarter", "rank 1/4 of the width", {"decor.rank": 0.25}),
        arms=["decor-adamw"],
    ),
    "sites": _changes(
        ("sublayers", "sublayer sites", {"decor.sites": "sublayers"}),
        ("without-proj", "without proj", {"decor.sites": ["patch_embed", "qkv", "fc1", "fc2"]}),
        ("without-fc2", "without fc2", {"decor.sites": ["patch_embed", "qkv", "proj", "fc1"]}),
        ("encoder", "encoder alone", {"decor.decoder": False}),
        ("auto", "sites by measurement", {"decor.sites": "auto"}),
        arms=["decor-adamw"],
    ),
    "rate": _changes(
        *((f"eta-{eta:g}", f"eta {eta:g}", {"decor.eta": eta}) for eta in (0.01, 0.02, 0.15)),
        arms=["decor-adamw"],
    ),
    "sample": _changes(
        *((f"sample-{k}", f"sample {k} %", {"decor.sample": k / 100}) for k in (1, 2, 5, 20)),
        arms=["decor-adamw"],
    ),
    "every": _changes(
        *((f"every-{k}", f"every {k} steps", {"decor.every": k}) for k in (1, 4, 10)),
        arms=["decor-adamw"],
    ),
    "rule": _changes(
        ("unscaled", "not scale-free, eta 0.01", {"decor.scale_free": False, "decor.eta": 1e-2}),
        ("unlimited", "no limiter", {"decor.limit": None}),
        ("kappa", "towards unit variances, kappa 0.5", {"decor.kappa": 0.5}),
        ("follow", "eta follows the learning rate", {"decor.follow": True}),
        arms=["decor-adamw"],
    ),
    "beside-muon": _changes(
        ("low", "low rank", {"decor.rank": "low"}),
        ("full", "full R everywhere", {"decor.rank": None}),
        ("qkv", "qkv alone", {"decor.sites": ["qkv"]}),
        ("patches", "patch embedding alone", {"decor.sites": ["patch_embed"], "decor.rank": None}),
        ("encoder", "encoder alone", {"decor.decoder": False}),
        ("eta-0.02", "eta 0.02", {"decor.eta": 0.02}),
        ("eta-0.005", "eta 0.005", {"decor.eta": 0.005}),
        ("unscaled", "not scale-free, eta 0.01", {"decor.scale_free": False, "decor.eta": 1e-2}),
        ("kappa", "towards unit variances, kappa 0.5", {"decor.kappa": 0.5}),
        ("follow", "eta follows the learning rate", {"decor.follow": True}),
        arms=["decor-muon"],
    ),
    "decay": {
        name: arm
        for main, decays in (
            ("adamw", (0.05, 0.1, 0.2, 0.5, 1.0)),
            ("decor-adamw", (0.05, 0.1, 0.2, 0.5)),
            ("muon", (0.05, 0.1, 0.2, 0.4)),
            ("decor-muon", (0.05, 0.1, 0.2)),
        )
        for name, arm in _changes(
            *((f"decay-{k:g}", f"weight decay {k:g}", {"optim.weight_decay": k}) for k in decays),
            arms=[main],
        ).items()
    },
    "batch": _changes(
        *((f"batch-{size}", f"batch {size}", {"batch_size": size}) for size in (256, 512)),
        arms=_OPTIMIZERS,
    ),
    "width": _changes(("wide", "twice as wide", {"model_args": _WIDE}), arms=_OPTIMIZERS),
}


def tuned(arm: str) -> str:
    """The main arm whose best rate an arm runs at: itself, or the one that an ablation changes."""
    return arm if arm in ARMS else every_arm()[arm].like


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

        Raises:
            ValueError: one of the settings has no such name.
        """
        arm, preset = every_arm()[self.arm], PRESETS[self.preset]
        config = Config(out)
        common = {
            "seed": self.seed,
            "eval_every": max(1, preset.steps // preset.evaluations),
            "checkpoint_every": preset.steps,
        }
        own = preset.own.get(tuned(self.arm), {})
        for name, value in (preset.settings | common | dict(data) | own | arm.settings).items():
            assign(config, name, value)
        config.optim.blr = self.rate * 256 / config.batch_size
        return config

    def settings(self, data: Mapping[str, object]) -> dict[str, object]:
        """All that its numbers depend on, by dotted name and as JSON gives it back.

        Args:
            data: as for `config`.
        """
        arm = every_arm()[self.arm]
        settings = flat(asdict(self.config("", data)))
        settings = {k: v for k, v in settings.items() if k not in NEUTRAL or k == "eval_every"}
        if not (arm.published or settings["decor.enable"]):
            settings = {k: v for k, v in settings.items() if k == "decor.enable" or k[:6] != "decor."}
        others = {"darl.", "dvae."} - {f"{settings['model'].partition('_')[0]}."}
        settings = {k: v for k, v in settings.items() if k[:5] not in others}
        preset = PRESETS[self.preset]
        settings |= {"stride": preset.stride, "published": arm.published}
        return json.loads(json.dumps(settings))


def assign(config: RunConfig, name: str, value: object) -> None:
    """Set a setting of a training script by its dotted name.

    Raises:
        ValueError: there is none of that name.
    """
    target = config
    *path, last = name.split(".")
    for part in path:
        target = getattr(target, part, None)
    if not dataclasses.is_dataclass(target) or last not in {f.name for f in dataclasses.fields(target)}:
        script = type(config).__module__.replace(".", "/")
        raise ValueError(f"expected the name of a setting of {script}.py, got {name!r}")
    setattr(target, last, copy.deepcopy(value))
