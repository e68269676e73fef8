"""What training on pre-trained encoders shares: where they come from, rates by layer, statistics."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from timm.optim import param_groups_layer_decay
from torch.nn.modules.batchnorm import _BatchNorm

import dbpkern
from models.classifier import Architecture, Loaded, Vit, create_vit, load_encoder
from train.engine import config as shared
from train.engine.optimizers import build_optimizer

if TYPE_CHECKING:  # classifiers do without what it imports
    from models.segmentation import SegmentationModel


@dataclass(kw_only=True)
class OptimConfig(shared.OptimConfig):
    """The optimizer of the weights and its schedule.

    Args:
        lr: The peak rate itself; overrides blr.
        layer_decay: Factor of the rate from each block to the one before it; 1 for one rate.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    lr: float | None = None
    layer_decay: float = 0.65


@dataclass(kw_only=True)
class TransferConfig(shared.RunConfig):
    """A run that starts from an encoder.

    Args:
        encoder: encoder.safetensors of a run of train/pretrain.py; classifier.safetensors of one of
            train/finetune.py; "timm:NAME" for a ViT of timm; a checkpoint file of facebookresearch/mae, which
            needs model; or null for random weights, which need it, too.
        model: mae_vit_base, darl_vit_base and so on; null where the encoder tells.
        model_args: Changes to model, or to timm's, such as {depth: 6, embed_dim: 128}; any of patch_size,
            embed_dim, depth, num_heads, mlp_ratio.
        pretrained: Whether timm:NAME has timm's weights, which timm downloads once, or random ones.
        drop_path: Rate of stochastic depth at the last block.
        img_size: Side of the images in pixels, or height and width; need not be that of pre-training.
    """

    encoder: str | None = None
    model: str | None = None
    model_args: dict[str, int | float | list[int]] = field(default_factory=dict)
    pretrained: bool = True
    drop_path: float = 0.1
    img_size: int | tuple[int, int] = 224
    optim: OptimConfig

    @property
    def peak_lr(self) -> float:
        """Learning rate of the last layer at the end of the warm-up."""
        return super().peak_lr if self.optim.lr is None else self.optim.lr

    def check_numbers(self, least_steps: int = 1) -> None:
        """As of all runs, and the numbers of this class."""
        super().check_numbers(least_steps)
        if not 0 < self.optim.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay: expected a factor in (0, 1], got {self.optim.layer_decay}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path: expected a rate in [0, 1), got {self.drop_path}")


def load(config: TransferConfig, dynamic_img_size: bool = False) -> Loaded:
    """The encoder that a configuration asks for, from torch's random numbers where it has no weights.

    Args:
        config: What is asked for.
        dynamic_img_size: As in `create_vit`.

    Raises:
        FileNotFoundError, ValueError: as `create_vit` and `load_encoder`.
    """
    name = config.encoder
    if name is not None and not name.startswith("timm:"):
        return load_encoder(name, config.drop_path, config.model, config.model_args, dynamic_img_size)
    if name is not None and config.model is not None:
        raise ValueError(f"model: {name} is one itself; expected null, got {config.model}")
    asked = config.model if name is None else name
    if asked is None:
        raise ValueError(
            "encoder: expected a file or timm:NAME; or, for random weights, --model such as mae_vit_base"
        )
    architecture = Architecture(asked, config.img_size, config.model_args)
    vit = create_vit(architecture, config.drop_path, config.pretrained, dynamic_img_size)
    return Loaded(vit, architecture)


def parameter_groups(config: TransferConfig, model: "Vit | SegmentationModel") -> list[dict[str, Any]]:
    """The groups of an optimizer, whose rates decay by layers as in BEiT and MAE.

    What is no part of the encoder has the whole rate, a block `layer_decay` times that of the next, patch
    embedding, tokens and positions that of a block before the first.

    Args:
        config: The rates and the weight decay.
        model: With timm's `group_matcher` and `no_weight_decay`.
    """
    c = config.optim
    groups = param_groups_layer_decay(
        model, c.weight_decay, model.no_weight_decay(), layer_decay=c.layer_decay
    )
    return [group | {"initial_lr": config.peak_lr * group["lr_scale"]} for group in groups]


def build_optimizers(
    config: TransferConfig, model: "Vit | SegmentationModel"
) -> tuple[torch.optim.Optimizer, dbpkern.DecorAdamW | dbpkern.DecorMuon | None]:
    """The optimizer, with the rates of `parameter_groups`, and what moves R if the run decorrelates: it."""
    rule = config.decor.rule(model, config.seed) if config.decor.enable else None
    optimizer = build_optimizer(config, parameter_groups(config, model), config.peak_lr, model, rule)
    if rule is None:
        return optimizer, None
    assert isinstance(optimizer, dbpkern.DecorAdamW | dbpkern.DecorMuon)
    return optimizer, optimizer


def average_statistics(norm: _BatchNorm, *_: object) -> None:
    """Forward hook: give all processes the same running statistics, the means of theirs."""
    if norm.training:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        # The backward has been given them, but makes no use of them: autograd need not see the change.
        for statistic in (norm.running_mean.data, norm.running_var.data):
            dist.all_reduce(statistic)
            statistic /= dist.get_world_size()
