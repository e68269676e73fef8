"""What a task of pre-training is: how its model is built, its loss, its pictures."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from safetensors.torch import save
from torch import Tensor, nn

from models.classifier import Architecture
from train.data.pretraining import Sample, collate

COUNT = 8  # images in a picture
Rows = dict[str, Tensor]
"""A picture: rows of images, each `[B, 3, H, W]` with values in [0, 1], by what they show."""


class Task(ABC):
    """What is learned, and what tasks have in common.

    The name is the first part of the names of a task's models; model_args are those that may be changed.
    """

    name: str
    model_args: tuple[str, ...]

    def __init__(self, config) -> None:
        self.config = config

    def check(self) -> None:  # noqa: B027, most have nothing to check
        """Raise ValueError for settings out of range, or that do not go together."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The stock model, from torch's random numbers."""

    @abstractmethod
    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """What FSDP shards one by one."""

    @abstractmethod
    def tokens(self, num_patches: int) -> int:
        """Tokens of an image in the encoder."""

    def collate(self, samples: list[Sample]) -> dict[str, object]:
        """A batch of samples, with what else `forward` needs, made by the loader."""
        return collate(samples)

    @abstractmethod
    def forward(self, model: nn.Module, images: Tensor, batch: Mapping) -> tuple[Tensor, object]:
        """The loss of a batch, and what its pictures and its tally are made of."""

    @abstractmethod
    def pictures(self, model: nn.Module, images: Tensor, batch: Mapping, made: object) -> dict[str, Rows]:
        """Pictures of what `forward` gave; a collective where weights are sharded."""

    def final_pictures(self, model: nn.Module, images: Tensor) -> dict[str, Rows]:
        """Pictures that are made once, at the end of a run."""
        return {}

    def tally(self, model: nn.Module, images: Tensor, made: object) -> Tensor:
        """What evaluation adds up over all images beside the loss, float64 [n], by what `forward` gave."""
        return torch.zeros(0, dtype=torch.float64, device=images.device)

    def measures(self, tally: Tensor, size: int) -> dict[str, float]:
        """What the log is to say of the `tally` of so many images."""
        return {}

    def exports(self, model: nn.Module) -> dict[str, bytes]:
        """The files that a finished run leaves of its stock model: the encoder, under timm's names."""
        about = {"format": "pt"} | self.architecture().metadata()
        return {"encoder.safetensors": save(model.encoder_state_dict(), metadata=about)}

    def architecture(self) -> Architecture:
        """What the weights of the encoder do not tell, for whoever builds it again."""
        config = self.config
        return Architecture(config.model, config.img_size, config.model_args)
