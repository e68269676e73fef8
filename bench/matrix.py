"""The runs of `python -m bench convergence`, as data: settings, arms, learning rates, seeds.

A run is named by (preset, arm, rate, seed). The main arms are run at several rates with the first seed; each
arm's best rate, by its final training loss, is then run with the other seeds, too. Ablations change
settings of a main arm, one where one can change alone, and run at that arm's best rate.
"""

import copy
import dataclasses
import json
from collections.abc import Mapping
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
        like: the main arm whose best rate an ablation runs at.
    """

    title: str
    settings: Mapping[str, object] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    published: bool = False
    like: str = "dbp-full"


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
_LONG = {
    "model_args": {
        "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3,
        "decoder_embed_dim": 48, "decoder_depth": 1, "decoder_num_heads": 3,
    },
    "steps": 5000,
    "batch_size": 32,
    "optim.warmup_steps": 100,
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
    "steps": 1500,
    "optim.warmup_steps": 100,
    "data.cache": "auto",
}
_SHORT = {"steps": 1200, "batch_size": 64, "optim.warmup_steps": 80}
_CIFAR_DARL = (
    _CIFAR | _SHORT | {"model": "darl_vit_tiny", "model_args": _DARL["model_args"] | {"patch_size": 4}}
)
_LARGE = {"batch_size": 256, "steps": 300, "optim.warmup_steps": 24}
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
    "muon": (8e-3, 1.2e-2, 1.6e-2, 2.4e-2),
    "decor-adamw": (5e-3, 8e-3, 1.2e-2),
    "decor-muon": (8e-3, 1.2e-2, 1.6e-2, 2.4e-2),
}


def _decay(by_arm: Mapping[str, float]) -> dict[str, dict[str, float]]:
    return {arm: {"optim.weight_decay": decay} for arm, decay in by_arm.items()}


PRESETS = {
    "photos": Preset(_PHOTOS),
    "photos-large": Preset(_PHOTOS | _LARGE, evaluations=3),
    "photos-long": Preset(_PHOTOS | _LONG, evaluations=10, probe=0),
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
# Around PyTorch's AdamW; DecorAdamW computes the same, to rounding.
_DEFAULT = {"decor.enable": True, "decor.mode": "preconditioner"}
_FULL = _DEFAULT | {"decor.sites": "all", "decor.rank": None, "decor.every": 1, "decor.sample": 0.1}
_LAYERS = _FULL | {
    "decor.mode": "layers",
    "decor.scale_free": False,
    "decor.eta": 1e-2,
    "decor.follow": True,
}
_SUBLAYERS = _DEFAULT | {"decor.rank": {"proj": 1 / 12, "fc2": 1 / 48}}
_MUON = {"optim.name": "muon"}
# Spelled out, as runs that are finished say what they were: the preset of this name may change.
_LOW = {"patch_embed": 1 / 12, "qkv": 1 / 12, "proj": 1 / 12, "fc1": 1 / 12, "fc2": 1 / 48}
_DECOR_MUON = {"decor.enable": True} | _MUON

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
    "dbp": Arm("DBP", _DEFAULT, (3e-3, *_HIGHER)),
    "dbp-low": Arm("DBP, low rank", _DEFAULT | {"decor.rank": "low"}, (3e-3, *_HIGHER)),
    "dbp-sublayers": Arm("DBP, full R in front of sublayers", _SUBLAYERS, (3e-3, *_HIGHER)),
    "dbp-full": Arm("DBP, full R everywhere", _FULL, (2e-3, 3e-3, *_HIGHER)),
    "dbp-auto": Arm("DBP, sites by measurement", _DEFAULT | {"decor.sites": "auto"}, _HIGHER[:2]),
    "dbp-layers": Arm("DBP in the layers", _LAYERS, _HIGHER),
    "dbp-muon": Arm("DBP with Muon", _DEFAULT | _MUON, (*_HIGHER, 2e-2)),
    "decor-adamw": Arm("DecorAdamW", {"decor.enable": True}, (5e-3,)),
    "decor-muon": Arm("DecorMuon", _DECOR_MUON, (8e-3,)),
}

ABLATIONS = {
    "sample": {
        f"sample-{share}": Arm(f"sample {share} %", _FULL | {"decor.sample": share / 100})
        for share in (2, 5, 20)
    },
    "every": {f"every-{k}": Arm(f"every {k} steps", _FULL | {"decor.every": k}) for k in (2, 4, 10)},
    "sites": {
        "sublayers": Arm("sublayer sites", _FULL | {"decor.sites": "sublayers"}),
        "without-proj": Arm("without proj", _FULL | {"decor.sites": ["patch_embed", "qkv", "fc1", "fc2"]}),
        "without-fc2": Arm("without fc2", _FULL | {"decor.sites": ["patch_embed", "qkv", "proj", "fc1"]}),
        "encoder": Arm("encoder alone", _FULL | {"decor.decoder": False}),
        "encoder-sublayers": Arm(
            "encoder alone, sublayer sites", _FULL | {"decor.decoder": False, "decor.sites": "sublayers"}
        ),
    },
    "one-site": {
        f"only-{site}": Arm(
            f"{site} alone, low rank, every 2 steps",
            _FULL | {"decor.sites": [site], "decor.rank": rank, "decor.every": 2},
        )
        for site, rank in _LOW.items()
    },
    "rank": {
        "rank-8": Arm("rank 8", _FULL | {"decor.rank": 8}),
        "rank-twelfth": Arm("rank 1/12 of the width", _FULL | {"decor.rank": 1 / 12}),
        "rank-eighth": Arm("rank 1/8 of the width", _FULL | {"decor.rank": 0.125}),
        "rank-quarter": Arm("rank 1/4 of the width", _FULL | {"decor.rank": 0.25}),
    },
    "cheap": {
        "eighth-every-4": Arm("rank 1/8, every 4 steps", _FULL | {"decor.rank": 0.125, "decor.every": 4}),
        "quarter-every-4": Arm("rank 1/4, every 4 steps", _FULL | {"decor.rank": 0.25, "decor.every": 4}),
        "mixed-every-4": Arm(
            "sublayers full, others rank 1/8, every 4 steps",
            _FULL | {"decor.rank": {"proj": 0.125, "fc2": 0.125}, "decor.every": 4},
        ),
        **{
            f"mixed-16-every-{k}": Arm(
                f"sublayers full, others rank 16, every {k} steps",
                _FULL | {"decor.rank": {"proj": 16, "fc2": 16}, "decor.every": k},
            )
            for k in (2, 4)
        },
        "fc1-full": Arm(
            "fc1 full, others low, every 2 steps",
            _FULL | {"decor.rank": {k: r for k, r in _LOW.items() if k != "fc1"}, "decor.every": 2},
        ),
        "all-but-fc2": Arm(
            "full R but for fc2, every 2 steps", _DEFAULT | {"decor.rank": {"fc2": _LOW["fc2"]}}
        ),
        **{
            f"fc2-{part}th": Arm(
                f"as by default, but rank 1/{part} for fc2",
                _DEFAULT | {"decor.rank": {k: r for k, r in _LOW.items() if k != "qkv"} | {"fc2": 1 / part}},
            )
            for part in (16, 24)
        },
        "all-but-fc2-16th": Arm(
            "full R but for fc2 with rank 1/16, every 2 steps", _DEFAULT | {"decor.rank": {"fc2": 1 / 16}}
        ),
        "low-every-1": Arm("low rank, every step", _FULL | {"decor.rank": _LOW}),
        "sublayers-every-4": Arm(
            "sublayer sites, every 4 steps", _FULL | {"decor.sites": "sublayers", "decor.every": 4}
        ),
    },
    "rate": {f"eta-{eta:g}": Arm(f"eta {eta:g}", _FULL | {"decor.eta": eta}) for eta in (0.02, 0.15)},
    "limit": {
        f"unlimited-{eta:g}": Arm(
            f"in the layers, eta {eta:g}, constant and without limiter",
            _LAYERS | {"decor.eta": eta, "decor.limit": None, "decor.follow": False},
        )
        for eta in (1e-2, 2e-2, 3e-2)
    },
    "beside-muon": {
        f"muon-{name}": Arm(f"DecorMuon, {title}", _DECOR_MUON | settings, like="decor-muon")
        for name, title, settings in (
            ("follow", "eta follows the learning rate", {"decor.follow": True}),
            ("eta-0.02", "eta 0.02", {"decor.eta": 0.02}),
            ("eta-0.005", "eta 0.005", {"decor.eta": 0.005}),
            ("low", "low rank", {"decor.rank": "low"}),
            ("full", "full R everywhere", {"decor.rank": None}),
            ("qkv", "qkv alone", {"decor.sites": ["qkv"]}),
            (
                "patches",
                "patch embedding alone",
                {"decor.sites": ["patch_embed"], "decor.rank": None},
            ),
            ("encoder", "encoder alone", {"decor.decoder": False}),
            ("kappa", "towards unit variances, kappa 0.5", {"decor.kappa": 0.5}),
        )
    },
    "decay": {
        f"{arm}-decay-{decay:g}": Arm(
            f"{ARMS[arm].title}, weight decay {decay:g}",
            ARMS[arm].settings | {"optim.weight_decay": decay},
            like=arm,
        )
        for arm, decays in (
            ("adamw", (0.05, 0.1, 0.2, 0.5, 1.0)),
            ("decor-adamw", (0.05, 0.1, 0.2, 0.5)),
            ("muon", (0.05, 0.1, 0.2, 0.4)),
            ("decor-muon", (0.05, 0.1, 0.2)),
        )
        for decay in decays
    },
    "schedule": {"follow": Arm("eta follows the learning rate", _FULL | {"decor.follow": True})},
    "scale": {
        "unscaled": Arm("not scale-free, eta 0.01", _FULL | {"decor.scale_free": False, "decor.eta": 1e-2}),
        **{
            f"default-unscaled-{eta:g}": Arm(
                f"as by default, but not scale-free, eta {eta:g}",
                _DEFAULT | {"decor.scale_free": False, "decor.eta": eta},
            )
            for eta in (1e-2, 2e-2)
        },
        "layers-scale-free": Arm(
            "in the layers, scale-free", _FULL | {"decor.mode": "layers", "decor.follow": True}
        ),
    },
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
