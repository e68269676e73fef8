"""Discrete VAE: images as entries of a vocabulary, one for each patch (Ramesh et al. 2021, arXiv 2102.12092).

The encoder scores the entries of the vocabulary at each patch; the decoder makes the image of the entries'
embeddings. In training the choice is relaxed by the Gumbel-softmax, as in DALL-E, whose section 2.1 and
appendix A.2 this follows but for what is chosen here:

- A patch convolution and residual blocks at the grid's resolution, in place of a pyramid, serve any patch.
  Their 3 x 3 convolutions read neighbouring patches, so that an entry tells of the pixels around, too.
- The likelihood is a Gaussian of variance 1/2 on normalised pixels, whose negative logarithm is the squared
  error and a constant, in place of DALL-E's logit-Laplace.

Letters used in shapes: B images, C channels, H and W their size, L patches in raster order, D the width, V
entries of the vocabulary.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.layers import PatchEmbed
from torch import Tensor, nn

from models.vit import check_sizes, create, grid_of, pair, unpatchify

SIZES = {
    "dvae_tiny": {"patch_size": 16, "vocabulary": 512, "width": 128, "depth": 2},
    "dvae_small": {"patch_size": 16, "vocabulary": 2048, "width": 256, "depth": 4},
    "dvae_base": {"patch_size": 16, "vocabulary": 8192, "width": 512, "depth": 8},
}

ARGUMENTS = "discrete_vae"  # the entry of a file's metadata that rebuilds the model


class ResidualConv(nn.Module):
    """A 3 x 3 and a 1 x 1 convolution around a skip connection."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, rows, columns] to the same shape."""
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class DiscreteVae(nn.Module):
    """Convolutional autoencoder whose latent is one of V entries for each patch.

    Args:
        img_size: Height and width of the training images; one number for squares. Other sizes that the patch
            divides are served, too.
        patch_size: Height and width of a patch; has to divide the image.
        in_chans: Channels of the images.
        vocabulary: V, at least 2.
        width: Channels of the convolutions, and of an entry's embedding.
        depth: Residual blocks of the encoder, and of the decoder.
        kl_weight: Of the KL divergence in the loss; 1 makes the loss the negative evidence lower bound.

    Raises:
        ValueError: For numbers that break these conditions.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        vocabulary: int,
        width: int,
        depth: int,
        kl_weight: float = 1.0,
    ):
        super().__init__()
        img_size = pair("img_size", img_size)
        rows, columns = patch_size = pair("patch_size", patch_size)
        check_sizes(img_size, patch_size)
        for name, value, least in (
            ("in_chans", in_chans, 1), ("vocabulary", vocabulary, 2), ("width", width, 1),
            ("depth", depth, 0),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if not 0 <= kl_weight < math.inf:
            raise ValueError(f"kl_weight: expected a finite number >= 0, got {kl_weight}")
        self.in_chans = in_chans
        self.vocabulary = vocabulary
        self.kl_weight = kl_weight
        self.patch_embed = PatchEmbed(
            img_size,
            patch_size,  # type: ignore[arg-type]  # timm takes two numbers, too
            in_chans,
            width,
            flatten=False,
            strict_img_size=False,
        )
        self.encoder = nn.Sequential(*(ResidualConv(width) for _ in range(depth)))
        # Without it the scores start out alike, and few entries ever come into use.
        self.norm = nn.LayerNorm(width)
        self.scores = nn.Linear(width, vocabulary)
        self.codebook = nn.Embedding(vocabulary, width)
        self.decoder = nn.Sequential(*(ResidualConv(width) for _ in range(depth)))
        self.pixels = nn.Linear(width, rows * columns * in_chans)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return self.patch_embed.patch_size

    def logits(self, imgs: Tensor) -> Tensor:
        """Scores [B, L, V] of the entries, in float32, for images [B, C, H, W].

        Raises:
            ValueError: For images that do not fit.
        """
        grid_of(imgs, self.in_chans, self.patch_size)
        x = self.encoder(self.patch_embed(imgs))
        return self.scores(self.norm(x.flatten(2).mT)).float()

    def _image(self, embedded: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Images [B, C, H, W], in float32, of embedded entries [B, L, D]."""
        x = self.decoder(embedded.mT.unflatten(2, grid_size)).flatten(2).mT
        return unpatchify(self.pixels(F.relu(x)).float(), grid_size, self.patch_size)

    def forward(
        self, imgs: Tensor, temperature: float | Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode and decode.

        The loss is the mean squared error over the values of the images, plus `kl_weight` times the KL
        divergence of the entries' distribution from the uniform one, in nats per value of the image: that of
        a patch over its values, as DALL-E divides it.

        Args:
            imgs: [B, C, H, W].
            temperature: Of the Gumbel-softmax, above 0, with noise from torch's random numbers. None for the
                best entry at each patch, without noise, as `codes` and `decode` have it: no gradient reaches
                the encoder through it.

        Returns:
            The loss (scalar), the reconstruction [B, C, H, W] and the scores of the entries [B, L, V], all in
            float32.

        Raises:
            ValueError: For images that do not fit.
        """
        logits = self.logits(imgs)
        if temperature is None:
            embedded = self.codebook(logits.argmax(-1))
        else:
            soft = F.gumbel_softmax(logits, temperature)  # type: ignore[arg-type]  # torch divides by it
            embedded = soft @ self.codebook.weight
        made = self._image(embedded, grid_of(imgs, self.in_chans, self.patch_size))
        error = (made - imgs.float()).square().mean()
        log_q = logits.log_softmax(-1)
        divergence = (log_q.exp() * (log_q + math.log(self.vocabulary))).sum(-1).mean()
        return error + self.kl_weight * divergence / self.pixels.out_features, made, logits

    @torch.no_grad()
    def codes(self, imgs: Tensor) -> Tensor:
        """The best entry at each patch, int64 [B, L] in raster order, for images [B, C, H, W].

        Raises:
            ValueError: For images that do not fit.
        """
        # Rounded scores would give other entries in training than in evaluation.
        with torch.autocast(imgs.device.type, enabled=False):
            return self.logits(imgs).argmax(-1)

    @torch.no_grad()
    def decode(self, codes: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        """Images [B, C, H, W], in float32, of entries.

        Args:
            codes: int64 [B, L] in raster order.
            grid_size: Rows and columns of patches; None for those of the training images.

        Raises:
            ValueError: For entries that are not there, or another number of them.
        """
        grid_size = grid_size or self.patch_embed.grid_size
        length = grid_size[0] * grid_size[1]
        if codes.dim() != 2 or codes.shape[1] != length:
            raise ValueError(
                f"codes: expected shape [B, {length}] for a grid of {grid_size}, got {list(codes.shape)}"
            )
        if codes.numel() and not 0 <= codes.min() <= codes.max() < self.vocabulary:
            raise ValueError(
                f"codes: expected numbers from 0 to {self.vocabulary - 1}, got {codes.min()} to {codes.max()}"
            )
        return self._image(self.codebook(codes), grid_size)


def create_dvae(name: str, **overrides: Any) -> DiscreteVae:
    """Build a model by name.

    Args:
        name: A key of `SIZES`, such as "dvae_small".
        overrides: Arguments of `DiscreteVae` that replace those of the table.

    Raises:
        ValueError: If there is no such model or argument, or a value is out of its range.
    """
    return create(DiscreteVae, SIZES, name, overrides)


def packed_tokenizer(model: DiscreteVae) -> bytes:
    """The content of a file that `load_tokenizer` reads: safetensors, with the arguments as metadata."""
    arguments = {
        "img_size": model.patch_embed.img_size,
        "patch_size": model.patch_size,
        "in_chans": model.in_chans,
        "vocabulary": model.vocabulary,
        "width": model.codebook.embedding_dim,
        "depth": len(model.encoder),
        "kl_weight": model.kl_weight,
    }
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return save(tensors, metadata={ARGUMENTS: json.dumps(arguments)})  # one entry: several have no order


def load_tokenizer(path: str | Path) -> DiscreteVae:
    """The model of a file that train/tokenizer.py wrote, on the CPU, in eval mode, without gradients.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or another kind of file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}; train/tokenizer.py makes one")
    try:
        with safe_open(path, "pt") as file:
            arguments = (file.metadata() or {}).get(ARGUMENTS)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if arguments is None:
            raise ValueError("it has no such model's arguments")
        with torch.device("meta"):  # draws none of torch's random numbers
            model = DiscreteVae(**json.loads(arguments))
        if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in model.state_dict().items()}:
            raise ValueError(f"its tensors are not those of a model of {arguments}")
    except (SafetensorError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is not a whole tokenizer.safetensors of train/tokenizer.py: {error}"
        ) from error
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)
