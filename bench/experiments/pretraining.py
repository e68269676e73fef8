"""The studies of pre-training, as data: settings, arms, learning rates, ablations."""

from collections.abc import Mapping, Sequence

from bench.experiments.preset import PRESETS, Arm, Preset
from train import pretrain

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
_CIFAR_DARL = _CIFAR | {
    "model": "darl_vit_tiny",
    "model_args": _DARL["model_args"] | {"patch_size": 4},
    "steps": 600,
    "batch_size": 64,
    "optim.warmup_steps": 60,
}
_IMAGENET = {
    "img_size": 224,
    "mae.decoder": "dbp",
    "steps": 20_000,
    "batch_size": 512,
    "optim.warmup_steps": 1_000,
    "data.fraction": 0.1,
    "data.workers": 14,
    "device": "cuda",
    "precision": "bf16",
}
_CIFAR_LRS = {
    "adamw": (2e-3, 3e-3, 5e-3),
    "muon": (1.2e-2, 1.6e-2, 2.4e-2),
    "decor-adamw": (3e-3, 5e-3, 8e-3),
    "decor-muon": (1.2e-2, 1.6e-2, 2.4e-2),
}


def _decay(by_arm: Mapping[str, float]) -> dict[str, dict[str, float]]:
    return {arm: {"optim.weight_decay": decay} for arm, decay in by_arm.items()}


_LRS = (2e-3, 3e-3, 5e-3, 8e-3)
_HIGHER = (5e-3, 8e-3, 1.2e-2)  # decorrelated, the best rate lies higher
_DECOR = {"decor.enable": True}
_MUON = {"optim.name": "muon"}
_LAYERS = _DECOR | {
    "decor.mode": "layers",
    "decor.sites": "all",
    "decor.rank": None,
    "decor.every": 1,
    "decor.follow": True,
}
_SCALE_FREE = {"decor.scale_free": True, "decor.eta": 0.05}  # for runs of some hundred steps
# Spelled out, as runs that are finished say what they were: the preset of this name may change.
_SUBLAYERS = {"proj": 1 / 12, "fc2": 1 / 48}
_WIDE = _CIFAR["model_args"] | {
    "embed_dim": 256, "num_heads": 8, "decoder_embed_dim": 128, "decoder_num_heads": 8,
}  # fmt: skip

ARMS = {
    "adamw": Arm("AdamW", {}, _LRS),
    "muon": Arm("Muon", _MUON, (*_LRS, 1.2e-2)),
    "kron": Arm("Kron (PSGD)", {"optim.name": "kron"}, (5e-4, 1e-3, 2e-3, 3e-3)),
    "published": Arm(
        "DBP as published",
        {
            "decor.sites": "all",
            "decor.encoder_only": True,
            "decor.eta": 5e-4,
            "decor.rank": None,
            "decor.every": 1,
        },
        _LRS[1:],
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


# Changes of R's rule by name.
_OF_R = {
    name: (name, title, settings)
    for name, title, settings in (
        ("low", "low rank", {"decor.rank": "low"}),
        ("full", "full R everywhere", {"decor.rank": None}),
        ("sublayers-full", "full R in front of sublayers", {"decor.rank": _SUBLAYERS}),
        ("rank-8", "rank 8", {"decor.rank": 8}),
        ("rank-quarter", "rank 1/4 of the width", {"decor.rank": 0.25}),
        ("sublayers", "sublayer sites", {"decor.sites": "sublayers"}),
        ("without-proj", "without proj", {"decor.sites": ["patch_embed", "qkv", "fc1", "fc2"]}),
        ("without-fc2", "without fc2", {"decor.sites": ["patch_embed", "qkv", "proj", "fc1"]}),
        ("encoder", "encoder alone", {"decor.encoder_only": True}),
        ("auto", "sites by measurement", {"decor.sites": "auto"}),
        ("qkv", "qkv alone", {"decor.sites": ["qkv"]}),
        ("patches", "patch embedding alone", {"decor.sites": ["patch_embed"], "decor.rank": None}),
        *(
            (f"eta-{eta:g}", f"eta {eta:g}", {"decor.eta": eta})
            for eta in (0.0025, 0.005, 0.01, 0.02, 0.04, 0.15)
        ),
        *((f"sample-{k}", f"sample {k} %", {"decor.sample": k / 100}) for k in (1, 2, 5, 20)),
        *((f"every-{k}", f"every {k} steps", {"decor.every": k}) for k in (1, 4, 10)),
        ("scale-free", "scale-free", _SCALE_FREE),
        ("unlimited", "no limiter", {"decor.limit": None}),
        ("kappa", "towards unit variances, kappa 0.5", {"decor.kappa": 0.5}),
        ("follow", "eta follows the learning rate", {"decor.follow": True}),
    )
}


def _of_r(*names: str, arm: str = "decor-adamw") -> dict[str, Arm]:
    return _changes(*(_OF_R[name] for name in names), arms=[arm])


def _scale_free(*names: str) -> dict[str, Arm]:
    """The scale-free rule, and changes of it."""
    changed = (_OF_R[name] for name in names)
    return _of_r("scale-free") | _changes(
        *((f"scale-free-{name}", f"scale-free, {title}", _SCALE_FREE | own) for name, title, own in changed),
        arms=["decor-adamw"],
    )


ABLATIONS = {
    "rank": _of_r("low", "full", "sublayers-full", "rank-8", "rank-quarter"),
    "sites": _of_r("sublayers", "without-proj", "without-fc2", "encoder", "auto"),
    "rate": _of_r("eta-0.0025", "eta-0.005", "eta-0.02", "eta-0.04"),
    "sample": _of_r("sample-1", "sample-2", "sample-5", "sample-20"),
    "every": _of_r("every-1", "every-4", "every-10"),
    "rule": _of_r("unlimited", "kappa", "follow"),
    # The rule that was the default before, and what was changed of it then.
    "scale-free": _scale_free(
        "eta-0.01",
        "eta-0.02",
        "eta-0.15",
        "low",
        "full",
        "sublayers",
        "without-proj",
        "encoder",
        "sample-2",
        "every-4",
        "unlimited",
        "kappa",
        "follow",
    ),
    "beside-muon": _of_r(
        "low",
        "full",
        "qkv",
        "patches",
        "encoder",
        "eta-0.02",
        "eta-0.005",
        "scale-free",
        "kappa",
        "follow",
        arm="decor-muon",
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


_SHORT = dict.fromkeys(("dbp", "decor-adamw", "decor-muon"), _SCALE_FREE)


def _study(settings: Mapping[str, object], **further: object) -> Preset:
    return Preset(pretrain, settings, ARMS, ABLATIONS, **further)


def _images(settings: Mapping[str, object], **further: object) -> Preset:
    """On thousands of images, where the held-out loss decides."""
    return _study(settings, decides="heldout_loss", needs_source=True, **further)


PRESETS |= {
    "photos": _study(_PHOTOS, probe=400, own=_SHORT),
    "darl": _study(_DARL, probe=400, own=_SHORT),
    "darl-diffusion": _study(_DARL | {"darl.objective": "diffusion"}, probe=400, own=_SHORT),
    "cifar10": _images(
        _CIFAR,
        evaluations=12,
        probe=2000,
        lrs=_CIFAR_LRS,
        own=_decay({"adamw": 0.2, "muon": 0.1, "decor-adamw": 0.2, "decor-muon": 0.1}),
    ),
    "cifar10-short": _images(
        _CIFAR | {"steps": 1200, "batch_size": 64, "optim.warmup_steps": 80},
        evaluations=12,
        lrs=_CIFAR_LRS,
        own=_decay({"adamw": 0.5, "muon": 0.1, "decor-adamw": 0.5, "decor-muon": 0.1}),
    ),
    "cifar10-darl": _images(_CIFAR_DARL, evaluations=6, probe=2000, lrs=_CIFAR_LRS),
    "cifar10-darl-diffusion": _images(
        _CIFAR_DARL | {"darl.objective": "diffusion"}, evaluations=6, probe=2000, lrs=_CIFAR_LRS
    ),
    "camvid": _images(_CAMVID, evaluations=5, lrs=_CIFAR_LRS),
    "vit-s": _images(_IMAGENET | {"model": "mae_vit_small"}, evaluations=10),
    "vit-b": _images(_IMAGENET | {"model": "mae_vit_base"}, evaluations=10),
}
