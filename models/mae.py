"""Masked autoencoder of He et al. 2021 (arXiv 2111.06377), built from timm's patch embedding and blocks.

The parameters have the names and shapes of the checkpoints that were released with the paper
(facebookresearch/mae), and the encoder is, tensor by tensor, a plain timm ViT: the base size loads into
`vit_base_patch16_224` as it is.

Letters used in shapes: B images, C channels, H and W their size, L patches in raster order, P the values in a
patch (rows * columns * channels), D the width of the encoder, K the patches that are kept.
"""

import argparse
import os
from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from models.vit import SIZES as VIT_SIZES
from models.vit import (
    check_sizes,
    check_transformer,
    create,
    init_xavier,
    norm_layer,
    pair,
    patch_statistics,
    patchify,
    sincos_positions,
    unpatchify,
)

# First components of the names that make up the encoder; they are timm's.
ENCODER = ("cls_token", "pos_embed", "patch_embed", "blocks", "norm")

SIZES = {f"mae_vit_{size}": arguments for size, arguments in VIT_SIZES.items()}

# "dbp" is the decoder of "Decorrelation Speeds Up Vision Transformers" (arXiv 2510.14657). The paper gives
# its two layers but neither width nor heads, so those are MAE's.
DECODERS = {
    "mae": {"decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16},
    "dbp": {"decoder_embed_dim": 512, "decoder_depth": 2, "decoder_num_heads": 16},
}


def num_kept(num_patches: int, mask_ratio: float) -> int:
    """Return how many patches the encoder sees; MAE rounds down. ValueError where that is none."""
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio must lie between 0 and 1, got {mask_ratio}")
    num_keep = int(num_patches * (1 - mask_ratio))
    if num_keep < 1:
        raise ValueError(f"mask_ratio {mask_ratio} keeps none of {num_patches} patches, expected 1 or more")
    return num_keep


def _take(tokens: Tensor, ids: Tensor) -> Tensor:
    """Pick the tokens [B, N, D] at the positions `ids` [B, M], row by row: [B, M, D]."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


class MaskedAutoencoder(nn.Module):
    """ViT encoder on the visible patches and a small ViT decoder that predicts the pixels of the others.

    Args:
        img_size: Height and width of the images; one number for squares.
        patch_size: Height and width of a patch; has to divide the image.
        in_chans: Channels of the images.
        embed_dim: Width of the encoder; divisible by `num_heads`, and by 4 for the sine-cosine positions.
        depth: Blocks of the encoder.
        num_heads: Attention heads of the encoder.
        mlp_ratio: Hidden width of the MLPs over their width, in encoder and decoder.
        decoder_embed_dim: Width of the decoder, with the same two conditions.
        decoder_depth: Blocks of the decoder.
        decoder_num_heads: Attention heads of the decoder.
        norm_pix_loss: Predict pixels that are standardised patch by patch, in place of plain pixels. It
            learns better features, but then pictures need the original: see `reconstruct`.

    Raises:
        ValueError: For sizes that break these conditions.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        norm_pix_loss: bool = False,
    ):
        super().__init__()
        img_size = pair("img_size", img_size)
        rows, columns = patch_size = pair("patch_size", patch_size)
        check_sizes(img_size, patch_size)
        check_transformer("", embed_dim, num_heads, depth)
        check_transformer("decoder_", decoder_embed_dim, decoder_num_heads, decoder_depth)

        self.in_chans = in_chans
        self.norm_pix_loss = norm_pix_loss
        block = partial(
            Block,
            mlp_ratio=mlp_ratio,
            qkv_bias=True,
            norm_layer=norm_layer,  # type: ignore[arg-type]  # timm takes any function that makes one
        )

        self.patch_embed = PatchEmbed(
            img_size,
            patch_size,  # type: ignore[arg-type]  # timm takes two numbers, too
            in_chans,
            embed_dim,
        )
        grid_size = self.patch_embed.grid_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        # Positions are parameters, although fixed, because the checkpoints hold them.
        self.pos_embed = nn.Parameter(sincos_positions(grid_size, embed_dim), requires_grad=False)
        self.blocks = nn.Sequential(*(block(embed_dim, num_heads) for _ in range(depth)))
        self.norm = norm_layer(embed_dim)

        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(
            sincos_positions(grid_size, decoder_embed_dim), requires_grad=False
        )
        self.decoder_blocks = nn.Sequential(
            *(block(decoder_embed_dim, decoder_num_heads) for _ in range(decoder_depth))
        )
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, rows * columns * in_chans)

        self._init_weights()

    def _init_weights(self) -> None:
        """Initialise as MAE: Xavier-uniform weights, zero biases, tokens from N(0, 0.02)."""
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        init_xavier(self)

    def _check_images(self, imgs: Tensor) -> None:
        """Raise ValueError unless `imgs` are images [B, C, H, W] of the model's channels and size."""
        c, (h, w) = self.in_chans, self.patch_embed.img_size
        if tuple(imgs.shape[1:]) != (c, h, w):
            raise ValueError(f"expected images of shape [B, {c}, {h}, {w}], got {list(imgs.shape)}")

    def patchify(self, imgs: Tensor) -> Tensor:
        """Cut images [B, C, H, W] into patches [B, L, P], a patch being ordered (row, column, channel).

        Raises:
            ValueError: If the images have another size or number of channels than the model.
        """
        self._check_images(imgs)
        return patchify(imgs, self.patch_embed.patch_size)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Put patches [B, L, P] together to images [B, C, H, W]: the inverse of `patchify`.

        Raises:
            ValueError: If the number or size of the patches is not the model's.
        """
        rows, columns = self.patch_embed.patch_size
        length, values = self.patch_embed.num_patches, rows * columns * self.in_chans
        if tuple(patches.shape[1:]) != (length, values):
            raise ValueError(f"expected patches of shape [B, {length}, {values}], got {list(patches.shape)}")
        return unpatchify(patches, self.patch_embed.grid_size, self.patch_embed.patch_size)

    def random_masking(
        self, tokens: Tensor, mask_ratio: float, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keep a random part of the tokens of every image: those with the smallest noise.

        Args:
            tokens: [B, L, D].
            mask_ratio: Part to remove; K = int(L * (1 - mask_ratio)) tokens are kept. 0 keeps all of them.
            noise: Random numbers [B, L] that decide the mask; drawn from U(0, 1) if None.

        Returns:
            The kept tokens [B, K, D] in the order of their noise; the mask [B, L], 0 = kept, 1 = removed;
            and ids_restore [B, L], the place of every patch in the sequence (kept tokens, removed tokens).

        Raises:
            ValueError: If mask_ratio is outside [0, 1) or keeps nothing, or the noise is of another shape.
        """
        shape = tokens.shape[:2]
        num_keep = num_kept(shape[1], mask_ratio)
        if noise is None:
            noise = torch.rand(shape, device=tokens.device)
        elif noise.shape != shape:
            raise ValueError(f"expected noise of shape {list(shape)}, got {list(noise.shape)}")
        # Stable, so that equal numbers give the same mask on every device.
        ids_shuffle = noise.argsort(dim=1, stable=True)
        ids_restore = ids_shuffle.argsort(dim=1)
        mask = (ids_restore >= num_keep).float()
        return _take(tokens, ids_shuffle[:, :num_keep]), mask, ids_restore

    def forward_encoder(
        self, imgs: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode the patches that a random mask leaves.

        Args:
            imgs: [B, C, H, W].
            mask_ratio: Part of the patches to remove; 0 encodes the whole image.
            noise: See `random_masking`.

        Returns:
            The latent [B, 1 + K, D], class token first; and mask and ids_restore of `random_masking`.

        Raises:
            ValueError: For images that do not fit the model, and as `random_masking`.
        """
        self._check_images(imgs)
        x = self.patch_embed(imgs) + self.pos_embed[:, 1:]
        x, mask, ids_restore = self.random_masking(x, mask_ratio, noise)
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls_token, x], dim=1)
        return self.norm(self.blocks(x)), mask, ids_restore

    def features(self, imgs: Tensor) -> Tensor:
        """The encoder's output for whole images [B, C, H, W]: [B, 1 + L, D], class token first, raster order.

        Raises:
            ValueError: For images that do not fit the model.
        """
        order = torch.arange(self.patch_embed.num_patches, device=imgs.device, dtype=torch.float32)
        return self.forward_encoder(imgs, 0.0, order.expand(len(imgs), -1))[0]

    def forward_decoder(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Predict all patches [B, L, P] from the encoder's latent [B, 1 + K, D] and ids_restore [B, L]."""
        x = self.decoder_embed(latent)
        cls_token, kept = x[:, :1], x[:, 1:]
        removed = self.mask_token.expand(len(x), ids_restore.shape[1] - kept.shape[1], -1)
        patches = _take(torch.cat([kept, removed], dim=1), ids_restore)
        x = torch.cat([cls_token, patches], dim=1) + self.decoder_pos_embed
        x = self.decoder_norm(self.decoder_blocks(x))
        return self.decoder_pred(x[:, 1:])

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Return the mean squared error over the removed patches: a float32 scalar, whatever the inputs.

        Args:
            imgs: [B, C, H, W].
            pred: [B, L, P], as returned by `forward_decoder`.
            mask: [B, L], 1 = removed.

        Raises:
            ValueError: If the images do not fit the model.
        """
        target = self.patchify(imgs.float())
        if self.norm_pix_loss:
            mean, std = patch_statistics(target)
            target = (target - mean) / std
        loss = (pred.float() - target).square().mean(dim=-1)
        return (loss * mask).sum() / mask.sum()

    def forward(
        self, imgs: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mask, encode, decode.

        Args:
            imgs: [B, C, H, W].
            mask_ratio: Part of the patches to remove, between 0 and 1.
            noise: Random numbers [B, L] that decide the mask, for masks that can be repeated: see
                `random_masking`.

        Returns:
            The loss (scalar, float32), the prediction [B, L, P], the mask [B, L] (0 = kept, 1 = removed).

        Raises:
            ValueError: For images or noise of the wrong shape, and for a mask_ratio that is outside (0, 1) or
                that keeps or removes nothing.
        """
        num_patches = self.patch_embed.num_patches
        if num_kept(num_patches, mask_ratio) == num_patches:
            raise ValueError(f"mask_ratio must lie in (0, 1) and remove at least one patch, got {mask_ratio}")
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, noise)
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(imgs, pred, mask), pred, mask

    @torch.no_grad()
    def reconstruct(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Return the images [B, C, H, W], in float32, with their removed patches replaced by the prediction.

        Under `norm_pix_loss` a prediction has neither brightness nor contrast; it is given those of the patch
        that it replaces, so such pictures show a little more than the model knows.

        Args:
            imgs: [B, C, H, W].
            pred: [B, L, P].
            mask: [B, L], 1 = removed.

        Raises:
            ValueError: If the images do not fit the model.
        """
        original, pred = self.patchify(imgs.float()), pred.float()
        if self.norm_pix_loss:
            mean, std = patch_statistics(original)
            pred = pred * std + mean
        return self.unpatchify(torch.where(mask.unsqueeze(-1).bool(), pred, original))

    def encoder_state_dict(self) -> dict[str, Tensor]:
        """Return contiguous copies of the encoder's tensors; they load into the timm ViT of the same size."""
        return {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in self.state_dict().items()
            if name.split(".")[0] in ENCODER
        }


def read_mae_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the weights in a checkpoint file of facebookresearch/mae, by name.

    The released files hold only the encoder, or all of the model, under "model"; those written while training
    also hold the optimizer and the command line. Nothing in the file is executed.

    Raises:
        ValueError: If the file has no weights under "model".
        pickle.UnpicklingError: If the file holds other objects than tensors, containers and a Namespace.
    """
    # Training checkpoints keep the parsed command line under "args".
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    weights = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict):
        found = list(checkpoint) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"{path}: expected a dict of weights under 'model', got {found}")
    return weights


def load_mae_checkpoint(model: MaskedAutoencoder, path: str | os.PathLike[str]) -> list[str]:
    """Load a checkpoint file of facebookresearch/mae into `model`: see `read_mae_checkpoint`.

    Returns:
        The names of the model's tensors that the file lacks and that were left as they were: none for a full
        checkpoint, those of the decoder for an encoder.

    Raises:
        ValueError: If the file has no weights under "model", or weights that the model lacks or has in
            another shape. The model is unchanged then.
        pickle.UnpicklingError: If the file holds other objects than tensors, containers and a Namespace.
    """
    weights = read_mae_checkpoint(path)
    own = model.state_dict()
    wrong = [f"{name} (unknown)" for name in weights if name not in own]
    wrong += [
        f"{name} (expected {list(own[name].shape)}, got {list(tensor.shape)})"
        for name, tensor in weights.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if wrong:
        raise ValueError(f"{path} does not fit the model: {', '.join(wrong)}")
    model.load_state_dict(weights, strict=False)
    return [name for name in own if name not in weights]


def create_mae(name: str, decoder: str = "mae", **overrides: Any) -> MaskedAutoencoder:
    """Build a model by name.

    Args:
        name: A key of `SIZES`, such as "mae_vit_base".
        decoder: A key of `DECODERS`: "mae" or the two-layer "dbp".
        overrides: Arguments of `MaskedAutoencoder` that replace those of the tables.

    Raises:
        ValueError: If there is no such model, decoder or argument, or a value is out of its range.
    """
    if decoder not in DECODERS:
        raise ValueError(f"unknown decoder {decoder!r}, expected one of {', '.join(DECODERS)}")
    return create(MaskedAutoencoder, SIZES, name, {**DECODERS[decoder], **overrides})


def mae_vit_tiny(**overrides: Any) -> MaskedAutoencoder:
    """Build MAE with a ViT-Ti/16 encoder; not among the sizes of the paper. Arguments as in `create_mae`."""
    return create_mae("mae_vit_tiny", **overrides)


def mae_vit_small(**overrides: Any) -> MaskedAutoencoder:
    """Build MAE with a ViT-S/16 encoder; not among the sizes of the paper. Arguments as in `create_mae`."""
    return create_mae("mae_vit_small", **overrides)


def mae_vit_base(**overrides: Any) -> MaskedAutoencoder:
    """Build MAE with a ViT-B/16 encoder. Arguments as in `create_mae`."""
    return create_mae("mae_vit_base", **overrides)


def mae_vit_large(**overrides: Any) -> MaskedAutoencoder:
    """Build MAE with a ViT-L/16 encoder. Arguments as in `create_mae`."""
    return create_mae("mae_vit_large", **overrides)


def mae_vit_huge(**overrides: Any) -> MaskedAutoencoder:
    """Build MAE with a ViT-H/14 encoder. Arguments as in `create_mae`."""
    return create_mae("mae_vit_huge", **overrides)
