"""The runs of `python -m bench transfer`, as data: tasks, starts, learning rates, seeds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Literal

from bench import matrix
from bench.matrix import assign
from train import finetune, pretrain, segment
from train.run_folder import NEUTRAL, flat
from train.transfer import TransferConfig


@dataclass(frozen=True)
class Task:
    """What encoders are fine-tuned for.

    Args:
        script: of `train`.
        figures: of its evaluations, in %, higher is better; the first one decides.
        title: of the first one.
    """

    script: ModuleType
    figures: tuple[str, ...]
    title: str


CLASSIFICATION = Task(finetune, ("top1", "top5"), "top 1")
SEGMENTATION = Task(segment, ("miou", "mean_accuracy", "pixel_accuracy"), "mean IoU")


@dataclass(frozen=True)
class Start:
    """Where fine-tuning starts.

    Args:
        title: in tables.
        settings: of the script's configuration, by dotted name: the read-out, and from scratch the network.
        pretraining: preset and arm of the convergence matrix; None for scratch.
        length: of pre-training: "steps" for as many as AdamW's, "seconds" for those that take as long as all
            of AdamW's, "none" for the weights that pre-training starts from.
        rates: peak learning rates to try in place of the preset's, where another optimizer fine-tunes.
    """

    title: str
    settings: Mapping[str, object]
    pretraining: tuple[str, str] | None = None
    length: Literal["steps", "seconds", "none"] = "steps"
    rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Preset:
    """What all runs of a comparison share.

    Args:
        task: what encoders are fine-tuned for.
        settings: of the script's configuration, by dotted name.
        starts: by name.
        rates: peak learning rates to try.
        evaluations: how often a run is evaluated, at equal intervals.
        needs_source: whether the images to fine-tune on must be named.
    """

    task: Task
    settings: Mapping[str, object]
    starts: Mapping[str, Start]
    rates: tuple[float, ...]
    evaluations: int = 5
    needs_source: bool = False

    def rates_of(self, start: str) -> tuple[float, ...]:
        """Peak learning rates that a start is tried at."""
        return self.starts[start].rates or self.rates

    @property
    def on_gpu(self) -> bool:
        """Whether the runs need a GPU."""
        return self.settings["device"] == "cuda"

    @property
    def needs_images(self) -> bool:
        """Whether the images to pre-train on must be named."""
        found = {start.pretraining[0] for start in self.starts.values() if start.pretraining}
        return any(matrix.PRESETS[name].needs_source for name in found)


_SIZES = {"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}  # of the convergence presets
_TINY_MAE = {"model": "mae_vit_tiny", "model_args": _SIZES}
_MAE = {"readout": "mean"}
_DARL = {"readout": "last"}
_DIGITS = {
    "data.source": "digits",
    "data.crop_scale": (0.7, 1.0),
    "data.crop_pct": 1.0,
    # A mirrored 2 is no digit, and a box of noise hides what 8 x 8 pixels tell.
    "augment.policy": None,
    "augment.flip": 0.0,
    "augment.erase": 0.0,
    "augment.mixup": 0.0,
    "augment.cutmix": 0.0,
    "img_size": 64,
    "drop_path": 0.0,
    "steps": 225,  # 5 epochs
    "batch_size": 32,
    "optim.warmup_steps": 45,
    "optim.layer_decay": 0.75,
    "device": "cpu",
    "precision": "fp32",
}
_CIFAR = {
    "data.crop_padding": 4,
    "data.crop_pct": 1.0,
    "data.cache": "auto",
    "augment.policy": None,
    "augment.erase": 0.0,
    "augment.mixup": 0.0,
    "augment.cutmix": 0.0,
    "img_size": 32,
    "drop_path": 0.0,
    "batch_size": 64,
    "optim.layer_decay": 0.75,
    "device": "cpu",
    "precision": "fp32",
}
_SEGMENTATION = {
    "drop_path": 0.0,
    "head": "linear",
    "batch_size": 16,
    "optim.layer_decay": 0.75,
    "device": "cpu",
    "precision": "fp32",
}
_SCENES = _SEGMENTATION | {
    "data.source": "scenes",
    "data.scale": (1.0, 1.0),  # textures are scaled already
    "img_size": 64,
    "steps": 400,
    "optim.warmup_steps": 40,
}
_CAMVID = _SEGMENTATION | {
    "data.ignored": 11,
    "data.split": "test",
    "data.short_side": 144,
    "data.scale": (0.75, 1.5),
    "img_size": 96,
    "steps": 500,
    "optim.warmup_steps": 50,
}
_ADE20K = {  # a tenth of the images, as in the DBP paper, for as many passes as MAE's recipe
    "data.fraction": 0.1,
    "data.short_side": 512,
    "data.workers": 14,
    "head": "upernet",
    "img_size": 512,
    "drop_path": 0.1,
    "steps": 16_000,
    "batch_size": 16,
    "optim.warmup_steps": 1_500,
    "optim.layer_decay": 0.65,
    "device": "cuda",
    "precision": "bf16",
}


def _mae_starts(preset: str, scratch: Mapping[str, object]) -> dict[str, Start]:
    """An MAE's encoder untrained, by AdamW, and with DBP in as many steps and in as many seconds."""
    return {
        "mae-scratch": Start("MAE's encoder, random as timm has it", scratch),
        "mae-untrained": Start("MAE's encoder, random as pre-training starts", {}, (preset, "adamw"), "none"),
        "mae": Start("MAE", {}, (preset, "adamw")),
        "mae-dbp": Start("MAE with DBP, equal steps", {}, (preset, "dbp")),
        "mae-dbp-seconds": Start("MAE with DBP, equal seconds", {}, (preset, "dbp"), "seconds"),
    }


_TINY_CIFAR = {"model": "mae_vit_tiny", "model_args": _SIZES | {"patch_size": 4}}


def _by_optimizer(preset: str, arms: Sequence[str]) -> dict[str, Start]:
    """An MAE's encoder untrained, and pre-trained by each of the arms in as many steps."""
    untrained = Start("random, as pre-training starts", {}, (preset, "adamw"), "none")
    return {"untrained": untrained} | {arm: Start(matrix.ARMS[arm].title, {}, (preset, arm)) for arm in arms}


def _of_cifar(fraction: float, steps: int) -> Preset:
    """Fine-tuning on a part of CIFAR-10's labels; accuracy on its test images."""
    settings = _CIFAR | {"data.fraction": fraction, "steps": steps, "optim.warmup_steps": steps // 10}
    starts = _by_optimizer("cifar10-short", ("adamw", "muon", "decor-adamw", "decor-muon"))
    return Preset(CLASSIFICATION, settings, starts, (1e-3, 2e-3, 4e-3), evaluations=2, needs_source=True)


def _supervised(name: str, title: str, decor: bool, rates: tuple[float, ...]) -> Start:
    settings = _TINY_CIFAR | {"optim.name": name, "decor.enable": decor}
    return Start(title, settings, rates=rates)


PRESETS = {
    "digits": Preset(
        CLASSIFICATION,
        _DIGITS,
        {
            "mae-scratch": Start("MAE's encoder, random as timm has it", _MAE | _TINY_MAE),
            "mae-untrained": Start(
                "MAE's encoder, random as pre-training starts", _MAE, ("photos", "adamw"), "none"
            ),
            "mae": Start("MAE", _MAE, ("photos", "adamw")),
            "mae-dbp": Start("MAE with DBP", _MAE, ("photos", "dbp")),
            "darl-scratch": Start(
                "DARL's encoder, random as timm has it",
                _DARL | {"model": "darl_vit_tiny", "model_args": _SIZES},
            ),
            "darl-untrained": Start(
                "DARL's encoder, random as pre-training starts", _DARL, ("darl", "adamw"), "none"
            ),
            "darl": Start("DARL", _DARL, ("darl", "adamw")),
            "darl-dbp": Start("DARL with DBP", _DARL, ("darl", "dbp")),
        },
        (1e-3, 3e-3, 6e-3),
    ),
    "cifar10": _of_cifar(1.0, steps=600),
    "cifar10-tenth": _of_cifar(0.1, steps=300),
    "cifar10-hundredth": _of_cifar(0.01, steps=150),
    "cifar10-supervised": Preset(
        CLASSIFICATION,
        _CIFAR | {"steps": 600, "optim.warmup_steps": 60, "optim.layer_decay": 1.0},
        {
            "adamw": _supervised("adamw", "AdamW", False, (1e-3, 2e-3, 4e-3)),
            "muon": _supervised("muon", "Muon", False, (4e-3, 8e-3, 1.6e-2)),
            "decor-adamw": _supervised("adamw", "DecorAdamW", True, (1e-3, 2e-3, 4e-3)),
            "decor-muon": _supervised("muon", "DecorMuon", True, (4e-3, 8e-3, 1.6e-2)),
        },
        (),
        evaluations=3,
        needs_source=True,
    ),
    "scenes": Preset(
        SEGMENTATION,
        _SCENES,
        _mae_starts("photos", _TINY_MAE),
        (1e-3, 3e-3, 6e-3, 1.2e-2),
        evaluations=4,
    ),
    "camvid": Preset(
        SEGMENTATION,
        _CAMVID,
        {
            "scratch": Start("random, as timm has it", _TINY_MAE),
            **_by_optimizer("camvid", ("adamw", "decor-adamw")),
            "decor-adamw-seconds": Start(
                "DecorAdamW, in AdamW's seconds", {}, ("camvid", "decor-adamw"), "seconds"
            ),
        },
        (1e-3, 3e-3, 6e-3),
        evaluations=2,
        needs_source=True,
    ),
    "ade20k": Preset(
        SEGMENTATION,
        _ADE20K,
        _mae_starts("vit-b", {"model": "mae_vit_base"}),
        (5e-5, 1e-4, 2e-4),
        needs_source=True,
    ),
}


@dataclass(frozen=True)
class Pretraining(matrix.Run):
    """A run of the convergence matrix, or one that differs from it in its length alone.

    Args:
        steps: None for those of the matrix; 0 for no training at all.
    """

    steps: int | None = None

    @property
    def name(self) -> str:
        """As of a run of the matrix, which has the same encoder, if it is one."""
        return super().name + ("" if self.steps is None else f"_steps{self.steps}")

    def config(self, out: str, data: Mapping[str, object]) -> pretrain.Config:
        """As of a run of the matrix."""
        config = super().config(out, data)
        if self.steps is not None:
            config.steps = self.steps
        return config


@dataclass(frozen=True)
class Run:
    """One run of fine-tuning."""

    preset: str
    start: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its JSON file."""
        return f"{self.start}_lr{self.rate:g}_seed{self.seed}"

    def config(self, out: str, encoder: str | None, data: Mapping[str, object]) -> TransferConfig:
        """What the script is started with.

        Args:
            out: folder of the run.
            encoder: file of the encoder; None from scratch.
            data: further settings, such as where the images are.

        Raises:
            ValueError: one of the settings has no such name.
        """
        preset = PRESETS[self.preset]
        config = preset.task.script.Config(out)
        steps = preset.settings["steps"]
        common = {
            "encoder": encoder,
            "optim.lr": self.rate,
            "seed": self.seed,
            "eval_every": max(1, steps // preset.evaluations),
            "checkpoint_every": steps,
        }
        for name, value in (preset.settings | common | data | preset.starts[self.start].settings).items():
            assign(config, name, value)
        return config

    def settings(self, data: Mapping[str, object]) -> dict[str, object]:
        """What its numbers depend on beside the encoder, by dotted name and as JSON gives it back.

        Args:
            data: as for `config`.
        """
        settings = flat(asdict(self.config("", None, data)))
        settings = {k: v for k, v in settings.items() if k not in NEUTRAL or k == "eval_every"}
        return json.loads(json.dumps(settings))
