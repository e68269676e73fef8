"""Fine-tuning and linear probes without a run: rates and weight decay by layer, recipes of the presets."""

import pytest
from runs import CONFIGS, SIZES

from models.classifier import Architecture, create_vit, to_classifier
from train import finetune


def mae_layer(name: str, depth: int) -> int:
    """As `get_layer_id_for_vit` in facebookresearch/mae, util/lr_decay.py."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    if name.startswith("blocks"):
        return int(name.split(".")[1]) + 1
    return depth + 1


@pytest.mark.parametrize(("model", "readout"), [("mae_vit_tiny", "mean"), ("darl_vit_tiny", "last")])
def test_rates_and_weight_decay_by_layer_are_those_of_mae(model, readout):
    depth = 3
    architecture = Architecture(model, 32, SIZES | {"depth": depth})
    vit = create_vit(architecture)
    to_classifier(vit, architecture, 5, readout)
    config = finetune.parse(["--out=x", "--optim.layer_decay=0.65", "--batch_size=1024"])
    optimizer, _ = finetune.build_optimizers(config, vit)
    assert config.peak_lr == pytest.approx(2e-3)
    names = {id(p): name for name, p in vit.named_parameters()}
    found = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert set(found) == set(names.values())
    for name, group in found.items():
        scale = 0.65 ** (depth + 1 - mae_layer(name, depth))
        if name.startswith("norm."):
            scale = 0.65  # of the last block, by timm
        assert group["lr_scale"] == pytest.approx(scale), name
        assert group["initial_lr"] == pytest.approx(2e-3 * scale), name
        free = name in ("cls_token", "pos_embed") or vit.get_parameter(name).ndim == 1
        assert group["weight_decay"] == (0 if free else 0.05), name


MAE_AUGMENT = {"policy": "rand-m9-mstd0.5-inc1", "flip": 0.5, "erase": 0.25}
MAE_AUGMENT |= {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}
PLAIN_AUGMENT = {"policy": None, "flip": 0.5, "erase": 0, "mixup": 0, "cutmix": 0, "smoothing": 0}


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        (
            "finetune_mae_base",
            {
                "readout": "mean",
                "linear": False,
                "causal": False,
                "layer": None,
                "drop_path": 0.1,
                "epochs": 100,
            }
            | {"optim": {"name": "adamw", "betas": (0.9, 0.999), "weight_decay": 0.05, "warmup_epochs": 5}}
            | {"peak_lr": 2e-3, "min_lr": 1e-6, "layer_decay": 0.65, "augment": MAE_AUGMENT},
        ),
        (
            "finetune_darl_base",
            {
                "readout": "last",
                "linear": False,
                "causal": False,
                "layer": None,
                "drop_path": 0.0,
                "epochs": 90,
            }
            | {"optim": {"name": "adamw", "betas": (0.9, 0.95), "weight_decay": 0.05, "warmup_epochs": 5}}
            | {"peak_lr": 1e-3, "min_lr": 0.0, "layer_decay": 0.75, "augment": MAE_AUGMENT | {"erase": 0}},
        ),
        (
            "linprobe_mae_base",
            {"readout": "class", "linear": True, "causal": False, "layer": None, "drop_path": 0, "epochs": 90}
            | {"optim": {"name": "lars", "betas": (0.9, 0.999), "weight_decay": 0, "warmup_epochs": 10}}
            | {"peak_lr": 6.4, "min_lr": 0.0, "layer_decay": 1.0, "augment": PLAIN_AUGMENT},
        ),
        (
            "linprobe_darl_base",
            {"readout": "mean", "linear": True, "causal": True, "layer": 6, "drop_path": 0, "epochs": 90}
            | {"optim": {"name": "lars", "betas": (0.9, 0.999), "weight_decay": 0, "warmup_epochs": 10}}
            | {"peak_lr": 6.4, "min_lr": 0.0, "layer_decay": 1.0, "augment": PLAIN_AUGMENT},
        ),
    ],
)
def test_presets_are_the_recipes(preset, expected):
    config = finetune.parse([f"--config={CONFIGS / preset}.yaml", "--out=x"])
    config.check(processes=8)
    for name in ("readout", "linear", "causal", "layer", "drop_path", "epochs"):
        assert getattr(config, name) == expected[name], name
    for name, value in expected["optim"].items():
        assert getattr(config.optim, name) == value, name
    assert config.peak_lr == pytest.approx(expected["peak_lr"])
    assert config.optim.min_lr == expected["min_lr"]
    assert config.optim.layer_decay == expected["layer_decay"]
    assert vars(config.augment) == expected["augment"]
    assert config.img_size == 224
