"""Discrete VAE: code each patch by an entry of a vocabulary."""

import torch
from torch import Tensor, nn

from models import dvae
from train.data.augment import denormalize
from train.data.pretraining import PretrainingBatch
from train.engine.schedule import warmup_cosine
from train.tasks.pretraining import COUNT, PretrainingTask, Rows

TEMPERATURES = (1.0, 1 / 16)  # of the Gumbel-softmax, at the start and the end of a run; DALL-E's


class TokenizerTask(PretrainingTask[dvae.DiscreteVae, tuple[Tensor, Tensor]]):
    """Discrete VAE: code each patch by an entry of a vocabulary."""

    name = "dvae"
    model_args = ("patch_size", "vocabulary", "width", "depth")

    def build(self) -> dvae.DiscreteVae:
        """The stock model, from torch's random numbers."""
        config = self.config
        return dvae.create_dvae(
            config.model, img_size=config.img_size, kl_weight=config.dvae.kl_weight, **config.model_args
        )

    def blocks(self, model: dvae.DiscreteVae) -> list[nn.Module]:
        """What FSDP shards one by one."""
        return [*model.encoder, *model.decoder]

    def tokens(self, num_patches: int) -> int:
        """Rows of an image in the encoder."""
        return num_patches

    def forward(
        self, model: nn.Module, images: Tensor, batch: PretrainingBatch
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss of a batch and what its picture is made of: in evaluation, by the best entries."""
        temperature = None
        if model.training:
            # A tensor, for torch.compile makes a graph for each number.
            temperature = torch.tensor(warmup_cosine(*batch["progress"], 0, *TEMPERATURES))
        loss, made, logits = model(images, temperature)
        return loss, (made, logits)

    def tally(self, model: dvae.DiscreteVae, images: Tensor, made: tuple[Tensor, Tensor]) -> Tensor:
        """The sum of the images' mean squared errors, and how often each entry is the best."""
        reconstruction, logits = made
        error = (reconstruction - images).square().mean() * len(images)
        counts = logits.argmax(-1).flatten().bincount(minlength=logits.shape[-1])
        return torch.cat([error.reshape(1), counts]).double()

    def measures(self, tally: Tensor, size: int) -> dict[str, float]:
        """The mean squared error, and the perplexity of the codes: how many entries are in even use."""
        chances = tally[1:] / tally[1:].sum()
        perplexity = torch.special.entr(chances).sum().exp()
        return {"reconstruction_error": tally[0].item() / size, "perplexity": perplexity.item()}

    def rows_of(
        self, model: dvae.DiscreteVae, images: Tensor, batch: PretrainingBatch, made: tuple[Tensor, Tensor]
    ) -> dict[str, Rows]:
        """Pictures of what `forward` gave."""
        rows = {
            "original": denormalize(images[:COUNT]),
            "reconstruction": denormalize(made[0][:COUNT]),
        }
        return {"reconstructions": rows}

    def exports(self, model: dvae.DiscreteVae) -> dict[str, bytes]:
        """The file that DARL's runs take as --darl.tokenizer."""
        return {"tokenizer.safetensors": dvae.packed_tokenizer(model)}
