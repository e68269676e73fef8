"""The studies of fine-tuning and of segmentation, as data: settings, starts, learning rates."""

from collections.abc import Mapping, Sequence

from bench.experiments import pretraining
from bench.experiments.preset import PRESETS, Arm, Encoder, Preset
from train import finetune, segment

_SIZES = {"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}  # of the studies of pre-training
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


_TINY_CIFAR = {"model": "mae_vit_tiny", "model_args": _SIZES | {"patch_size": 4}}


def _mae_starts(study: str, scratch: Mapping[str, object]) -> dict[str, Arm]:
    """An MAE's encoder untrained, by AdamW, and with DBP in as many steps and in as many seconds."""
    return {
        "mae-scratch": Arm("MAE's encoder, random as timm has it", scratch),
        "mae-untrained": Arm(
            "MAE's encoder, random as pre-training starts", encoder=Encoder(study, "adamw", "none")
        ),
        "mae": Arm("MAE", encoder=Encoder(study, "adamw")),
        "mae-dbp": Arm("MAE with DBP, equal steps", encoder=Encoder(study, "dbp")),
        "mae-dbp-seconds": Arm("MAE with DBP, equal seconds", encoder=Encoder(study, "dbp", "seconds")),
    }


def _by_optimizer(study: str, arms: Sequence[str]) -> dict[str, Arm]:
    """An MAE's encoder untrained, and pre-trained by each of the arms in as many steps."""
    untrained = Arm("random, as pre-training starts", encoder=Encoder(study, "adamw", "none"))
    return {"untrained": untrained} | {
        arm: Arm(pretraining.ARMS[arm].title, encoder=Encoder(study, arm)) for arm in arms
    }


def _of_cifar(fraction: float, steps: int) -> Preset:
    """Fine-tuning on a part of CIFAR-10's labels; accuracy on its test images."""
    settings = _CIFAR | {"data.fraction": fraction, "steps": steps, "optim.warmup_steps": steps // 10}
    arms = _by_optimizer("cifar10-short", ("adamw", "muon", "decor-adamw", "decor-muon"))
    lrs = dict.fromkeys(arms, (1e-3, 2e-3, 4e-3))
    return Preset(finetune, settings, arms, decides="top1", evaluations=2, needs_source=True, lrs=lrs)


def _supervised(name: str, title: str, decor: bool, lrs: tuple[float, ...]) -> Arm:
    return Arm(title, _TINY_CIFAR | {"optim.name": name, "decor.enable": decor}, lrs)


_DIGITS_STARTS = {
    "mae-scratch": Arm("MAE's encoder, random as timm has it", _MAE | _TINY_MAE),
    "mae-untrained": Arm(
        "MAE's encoder, random as pre-training starts", _MAE, encoder=Encoder("photos", "adamw", "none")
    ),
    "mae": Arm("MAE", _MAE, encoder=Encoder("photos", "adamw")),
    "mae-dbp": Arm("MAE with DBP", _MAE, encoder=Encoder("photos", "dbp")),
    "darl-scratch": Arm(
        "DARL's encoder, random as timm has it", _DARL | {"model": "darl_vit_tiny", "model_args": _SIZES}
    ),
    "darl-untrained": Arm(
        "DARL's encoder, random as pre-training starts", _DARL, encoder=Encoder("darl", "adamw", "none")
    ),
    "darl": Arm("DARL", _DARL, encoder=Encoder("darl", "adamw")),
    "darl-dbp": Arm("DARL with DBP", _DARL, encoder=Encoder("darl", "dbp")),
}
_SCENES_STARTS = _mae_starts("photos", _TINY_MAE)
_CAMVID_STARTS = {
    "scratch": Arm("random, as timm has it", _TINY_MAE),
    **_by_optimizer("camvid", ("adamw", "decor-adamw")),
    "decor-adamw-seconds": Arm(
        "DecorAdamW, in AdamW's seconds", encoder=Encoder("camvid", "decor-adamw", "seconds")
    ),
}
_ADE20K_STARTS = _mae_starts("vit-b", {"model": "mae_vit_base"})

PRESETS |= {
    "digits": Preset(
        finetune,
        _DIGITS,
        _DIGITS_STARTS,
        decides="top1",
        evaluations=5,
        lrs=dict.fromkeys(_DIGITS_STARTS, (1e-3, 3e-3, 6e-3)),
    ),
    "cifar10-labels": _of_cifar(1.0, steps=600),
    "cifar10-labels-tenth": _of_cifar(0.1, steps=300),
    "cifar10-labels-hundredth": _of_cifar(0.01, steps=150),
    "cifar10-supervised": Preset(
        finetune,
        _CIFAR | {"steps": 600, "optim.warmup_steps": 60, "optim.layer_decay": 1.0},
        {
            "adamw": _supervised("adamw", "AdamW", False, (1e-3, 2e-3, 4e-3)),
            "muon": _supervised("muon", "Muon", False, (4e-3, 8e-3, 1.6e-2)),
            "decor-adamw": _supervised("adamw", "DecorAdamW", True, (1e-3, 2e-3, 4e-3)),
            "decor-muon": _supervised("muon", "DecorMuon", True, (4e-3, 8e-3, 1.6e-2)),
        },
        decides="top1",
        evaluations=3,
        needs_source=True,
    ),
    "scenes": Preset(
        segment,
        _SCENES,
        _SCENES_STARTS,
        decides="miou",
        evaluations=4,
        lrs=dict.fromkeys(_SCENES_STARTS, (1e-3, 3e-3, 6e-3, 1.2e-2)),
    ),
    "camvid-masks": Preset(
        segment,
        _CAMVID,
        _CAMVID_STARTS,
        decides="miou",
        evaluations=2,
        needs_source=True,
        lrs=dict.fromkeys(_CAMVID_STARTS, (1e-3, 3e-3, 6e-3)),
    ),
    "ade20k": Preset(
        segment,
        _ADE20K,
        _ADE20K_STARTS,
        decides="miou",
        evaluations=5,
        needs_source=True,
        lrs=dict.fromkeys(_ADE20K_STARTS, (5e-5, 1e-4, 2e-4)),
    ),
}
