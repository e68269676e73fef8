"""Pre-training: its options, and what its tasks have in common."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn

import dbpkern
from models import darl
from models.classifier import Architecture
from models.darl import DARL
from models.dvae import DiscreteVae
from models.mae import MaskedAutoencoder
from train.data.pretraining import DataConfig, PretrainingBatch, build_data, collate, to_images
from train.engine import config as shared
from train.engine import plots
from train.engine.run_folder import write_atomically
from train.engine.task import Collate, Observe, Task

COUNT = 8  # images in a picture
# Each has settings under its own name, which are for its models only.
FAMILIES = ("mae", "darl", "dvae")

Model = TypeVar("Model", MaskedAutoencoder, DARL, DiscreteVae)
Made = TypeVar("Made")  # what `forward` gives beside the loss

Rows = dict[str, Tensor]
"""A picture: rows of images, each `[B, 3, H, W]` with values in [0, 1], by what they show."""


@dataclass
class OptimConfig(shared.OptimConfig):
    """The optimizer of the weights and its schedule; by default AdamW, as in MAE.

    Args:
        name: "adamw", "muon" (dbpkern.DecorMuon, AdamW for vectors and tokens), or timm's "kron" (PSGD).
        betas: Of AdamW; the first is Muon's momentum (Nesterov's), too.
    """

    name: Literal["adamw", "muon", "kron"] = "adamw"
    _: KW_ONLY
    blr: float = 1.5e-4
    warmup_epochs: float = 40
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass
class DarlConfig(darl.DarlConfig):
    """DARL, for models darl_vit_*.

    Args:
        tokenizer: tokenizer.safetensors of a run of train/tokenizer.py, where inputs or objective are tokens.
    """

    tokenizer: str | None = None


@dataclass
class MaeConfig:
    """MAE, for models mae_*.

    Args:
        decoder: Preset of the decoder: "mae" (8 blocks, 512 wide) or "dbp" (2 blocks, 512 wide).
        mask_ratio: Part of the patches that is hidden, in (0, 1).
        norm_pix_loss: Whether the targets are pixels normalised per patch.
    """

    decoder: str = "mae"
    mask_ratio: float = 0.75
    norm_pix_loss: bool = True


@dataclass
class DvaeConfig:
    """The discrete VAE, for models dvae_*.

    Args:
        kl_weight: Of the KL divergence of codes from the uniform distribution; 1 makes the loss the negative
            evidence lower bound.
    """

    kl_weight: float = 1.0


@dataclass
class DecorConfig(shared.DecorConfig):
    """Decorrelated backpropagation.

    Args:
        mode: "optimizer" takes an optimizer that holds R (dbpkern.DecorAdamW, dbpkern.DecorMuon),
            "preconditioner" maps gradients and changes around a plain one (dbpkern.DecorPreconditioner), as
            kron always has it; "layers" puts decorrelated layers into the model, see docs/method.md.
        form: How decorrelated layers compute: "auto", "fold" or "apply".
        sites: Which layers of a block: "sublayers" (patch embedding, qkv, fc1), "all", or a list of
            patch_embed, qkv, proj, fc1, fc2. "auto" chooses layers and ranks by measurements, see budget.
        budget: For sites "auto": the part of a step's time that decorrelation may take.
    """

    mode: Literal["optimizer", "preconditioner", "layers"] = "optimizer"
    form: Literal["auto", "fold", "apply"] = "auto"
    budget: float = 0.05

    @property
    def in_layers(self) -> bool:
        """Whether the model has decorrelated layers."""
        return self.enable and self.mode == "layers"

    @property
    def planned(self) -> bool:
        """Whether a plan chooses the layers."""
        return self.enable and self.sites == "auto"

    def present(self, model: nn.Module) -> list[str]:
        """The sites that the model has; where a plan chooses, those of "all".

        Evaluation observes them in a model without decorrelated layers.
        """
        return replace(self, sites="all").present(model) if self.sites == "auto" else super().present(model)


@dataclass
class Config(shared.RunConfig):
    """Pre-training of a masked autoencoder or a DARL model.

    Args:
        model: mae_vit_tiny, mae_vit_small, mae_vit_base, mae_vit_large or mae_vit_huge; or darl_vit_tiny and
            so on; dvae_tiny, dvae_small or dvae_base.
        model_args: Changes to the model, such as {depth: 6, embed_dim: 128}; any of patch_size (one number or
            two), embed_dim, depth, num_heads, mlp_ratio, and for MAE decoder_embed_dim, decoder_depth,
            decoder_num_heads; of a discrete VAE patch_size, vocabulary, width, depth.
        img_size: Side of the training crops in pixels, or height and width.
        mae: What MAE hides and predicts.
        darl: What DARL predicts, and how.
        dvae: The loss of a discrete VAE.
        data: The images.
        decor: Decorrelated backpropagation.
        seed: Of weights, order, crops, masks and samples.
        parallel: What several processes share: "ddp" for the batch alone, or "fsdp" for the weights and the
            optimizer's state, too.
    """

    model: str = "mae_vit_base"
    model_args: dict[str, int | float | list[int]] = field(default_factory=dict)
    img_size: int | tuple[int, int] = 224
    mae: MaeConfig = field(default_factory=MaeConfig)
    darl: DarlConfig = field(default_factory=DarlConfig)
    dvae: DvaeConfig = field(default_factory=DvaeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: Literal["ddp", "fsdp"] = "ddp"
    _: KW_ONLY
    epochs: float = 800
    batch_size: int = 4096
    optim: OptimConfig = field(default_factory=OptimConfig)
    decor: DecorConfig = field(default_factory=DecorConfig)


class PretrainingTask(Task[PretrainingBatch, PretrainingBatch], Generic[Model, Made]):
    """What tasks of pre-training have in common.

    The name is the first part of the names of a task's models; `model_args` are those that may be changed.
    """

    config: Config
    model: Model
    name: str
    model_args: tuple[str, ...]
    images: Tensor  # of the pictures
    finished: Model

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.shown: dict[str, Rows] = {}

    def check(self) -> None:
        """Raise ValueError for settings out of range, or that do not go together."""
        config = self.config
        for family in FAMILIES:
            if family != self.name and getattr(config, family) != getattr(Config(""), family):
                raise ValueError(
                    f"{family}: settings of models {family}_*, got model {config.model}; leave them out"
                )
        for name, value in config.model_args.items():
            if name not in self.model_args:
                raise ValueError(f"model_args: unknown argument {name!r}, expected some of {self.model_args}")
            parts = value if isinstance(value, list) and name == "patch_size" else [value]
            if name != "mlp_ratio" and not all(isinstance(part, int) for part in parts):
                raise ValueError(f"model_args: {name}: expected a whole number, got {value}")
        if config.parallel == "fsdp" and config.optim.name != "adamw":
            raise ValueError(
                f"parallel: {config.optim.name} works on whole matrices, which fsdp shares out; "
                "expected --optim.name adamw or --parallel ddp"
            )
        if config.decor.sites == "auto" and config.decor.rank not in (None, "mixed"):
            raise ValueError(
                f'decor.rank: sites "auto" choose the ranks, too; expected null, got {config.decor.rank}'
            )

    @abstractmethod
    def build(self) -> Model:
        """The stock model, from torch's random numbers."""

    @abstractmethod
    def blocks(self, model: Model) -> list[nn.Module]:
        """What FSDP shards one by one."""

    @abstractmethod
    def tokens(self, num_patches: int) -> int:
        """Tokens of an image in the encoder."""

    @abstractmethod
    def forward(self, model: nn.Module, images: Tensor, batch: PretrainingBatch) -> tuple[Tensor, Made]:
        """The loss of a batch, and what its pictures and its tally are made of."""

    @abstractmethod
    def rows_of(self, model: Model, images: Tensor, batch: PretrainingBatch, made: Made) -> dict[str, Rows]:
        """Pictures of what `forward` gave; a collective where weights are sharded."""

    def final_rows(self, model: Model, images: Tensor) -> dict[str, Rows]:
        """Pictures that are made once, at the end of a run."""
        return {}

    def tally(self, model: Model, images: Tensor, made: Made) -> Tensor:
        """What evaluation adds up over all images beside the loss, float64 [n], by what `forward` gave."""
        return torch.zeros(0, dtype=torch.float64, device=images.device)

    def measures(self, tally: Tensor, size: int) -> dict[str, float]:
        """What the log is to say of the `tally` of so many images."""
        return {}

    def exports(self, model: Model) -> dict[str, bytes]:
        """The files that a finished run leaves of its stock model: the encoder, under timm's names."""
        assert not isinstance(model, DiscreteVae)  # which has no encoder for others
        about = {"format": "pt"} | self.architecture().metadata()
        return {"encoder.safetensors": save(model.encoder_state_dict(), metadata=about)}

    def architecture(self) -> Architecture:
        """What the weights of the encoder do not tell, for whoever builds it again."""
        config = self.config
        return Architecture(config.model, config.img_size, config.model_args)

    def build_model(self) -> Model:
        """The model of a run, with decorrelated layers if it asks for them.

        Where a plan chooses them, they are those of `ranks`, and there are none before it has.
        """
        config, decor = self.config, self.config.decor
        torch.manual_seed(config.seed)
        model = self.build()
        if decor.in_layers and (self.ranks is not None or not decor.planned):
            dbpkern.decorrelate(model, decor.rule(model, config.seed, self.ranks), decor.form)
        return model

    def place_model(self) -> None:
        """Make `model`, on the device and sharded as the run asks for."""
        model = self.build_model()
        if self.config.parallel == "fsdp":
            self.processes.shard(model, self.blocks(model))
        self.model = model.to(self.processes.device)

    def make(self) -> None:
        """Make the model and open the data."""
        self.place_model()
        patches = self.model.patch_embed
        self.training, self.held_out = build_data(
            self.config.data, patches.img_size, patches.num_patches, self.config.seed
        )
        self.files, self.shards = self.training.files, self.training.shards
        self.shard_window = self.config.data.shard_window

    @property
    def workers(self) -> int:
        """Loader processes of each training process."""
        return self.config.data.workers

    @property
    def rows_per_image(self) -> int:
        """Tokens of an image in the encoder."""
        return self.tokens(self.model.patch_embed.num_patches)

    @property
    def collate(self) -> Collate[PretrainingBatch]:
        """Makes a batch of samples, with what else `forward` needs."""
        return collate

    @property
    def collate_held_out(self) -> Collate[PretrainingBatch]:
        """The same of held-out samples."""
        return self.collate

    def loss(self, model: nn.Module, batch: PretrainingBatch) -> Tensor:
        """The loss of a batch."""
        return self.forward(model, to_images(batch, self.model.patch_embed.img_size), batch)[0]

    def evaluate(self, batch: PretrainingBatch, first: bool, observe: Observe) -> Tensor:
        """The loss and the tally of a batch, and the pictures of the first one."""
        images = batch["image"]
        with observe():
            loss, made = self.forward(self.model, images, batch)
        if first:  # by all: sharded weights are gathered for it
            self.images = images[:COUNT].clone()
            self.shown = self.rows_of(self.model, images, batch, made)
        tally = self.tally(self.model, images, made)
        return torch.cat([loss.double().reshape(1) * len(images), tally])

    def figures(self, total: Tensor) -> dict[str, float]:
        """The mean loss, and what the tally says."""
        size = len(self.held_out)
        return {"heldout_loss": total[0].item() / size, **self.measures(total[1:], size)}

    def pictures(self) -> dict[str, Tensor]:
        """Of the first batch of the last evaluation."""
        return {name: plots.image_grid(rows) for name, rows in self.shown.items()}

    def stock(self, weights: Mapping[str, Tensor]) -> Model:
        """The stock model for evaluation, its layers fused, by the weights that a run's `model` has."""
        model = self.build_model()
        model.load_state_dict(weights)
        if self.config.decor.in_layers:
            dbpkern.fuse(model)
        return model.eval()

    def export(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Write the encoder, or the tokenizer."""
        self.finished = self.stock(weights)
        for name, content in self.exports(self.finished).items():
            write_atomically(folder / name, content)

    def draw(self, records: Sequence[Mapping[str, Any]], folder: Path) -> None:
        """Write the pictures of the last evaluation, and those that are made once."""
        final = self.final_rows(self.finished.to(self.processes.device), self.images)
        for name, rows in (self.shown | final).items():
            plots.save_image_grid(rows, folder / f"{name}.png")


AnyPretraining = PretrainingTask[Any, Any]
"""A task of pre-training, whatever its model."""
