"""Images from a pre-trained DARL model, patch by patch, with or without a cache of what it has read."""

import torch
from torch import Tensor

from models import diffusion
from models.darl import DARL, Cache
from models.vit import patchify


class _Reader:
    """What a model knows of the next patch, given those before it.

    Args:
        model: That predicts.
        imgs: [B, C, H, W], whose size counts.
        order: Raster numbers of the patches in the order of prediction [L].
        cached: Whether keys and values of patches that were read are kept, or all is computed anew each time.
    """

    def __init__(self, model: DARL, imgs: Tensor, order: Tensor, cached: bool):
        self.model, self.imgs, self.order = model, imgs, order
        self.added, rope = model.place(model.grid(imgs), imgs.device)
        self.rope = None
        if rope is not None:
            # The start token is not rotated: sine 0 and cosine 1.
            still = torch.cat([rope.new_zeros(rope.shape[1] // 2), rope.new_ones(rope.shape[1] // 2)])
            self.rope = torch.cat([still[None], rope[order]])
        self.cache = Cache(model, len(imgs), 1 + len(order)) if cached else None

    def __call__(self, patches: Tensor, t: int) -> Tensor:
        """The context [B, D] of the t-th patch, by those before it.

        Args:
            patches: All patches [B, L, P] in raster order, or entries of the vocabulary [B, L].
            t: Place in the order of prediction.
        """
        model = self.model
        if self.cache is None:
            if model.config.inputs == "tokens":
                return model.contexts(self.imgs, self.order, patches)[:, t]
            imgs = model.images_of(self.imgs, patches).to(model.norm.weight.dtype)
            return model.contexts(imgs, self.order)[:, t]
        read = self.cache.tokens  # start token included
        new = self.order[max(read - 1, 0) : t]
        x = model.embed_patches(patches[:, new])
        x = x if self.added is None else x + self.added[:, 1 + new]
        if read == 0:
            start = model.cls_token if self.added is None else model.cls_token + self.added[:, :1]
            x = torch.cat([start.expand(len(x), -1, -1), x], dim=1)
        keep = x.shape[1]
        places = torch.arange(read, read + keep, device=x.device)
        if model.config.two_stream:
            query = model.queries(self.added, self.order[t : t + 1])
            x = torch.cat([x, query.expand(len(x), -1, -1)], dim=1)
            places = torch.cat([places, places.new_tensor([1 + t])])
        rope = None if self.rope is None else self.rope[places]
        return model.extend(x, rope, self.cache, keep)[:, -1]


@torch.no_grad()
def generate(
    model: DARL,
    imgs: Tensor,
    known: int = 0,
    steps: int = 1000,
    seed: int = 0,
    cached: bool = True,
    order: Tensor | None = None,
    codes: Tensor | None = None,
) -> Tensor:
    """Continue images patch by patch.

    A model of mean squared error gives its prediction, the mean of what may follow; one of diffusion
    denoises each patch from pure noise by DDPM's steps; one of tokens draws from its distribution.

    Args:
        model: Trained on plain pixels, or on tokens alone.
        imgs: [B, C, H, W]; what comes after the known patches is not read.
        known: Patches that are given, in the order of prediction.
        steps: Denoising steps of a patch, of equal size in the noise level.
        seed: Of the noise.
        cached: Whether the keys and values of what was read are kept: the same up to rounding, sooner.
        order: Of the prediction, raster numbers [L]; None for the model's own.
        codes: Entries of the vocabulary [B, L], where these are the inputs.

    Returns:
        The images [B, C, H, W], float32; or the entries [B, L] of a model whose objective is tokens.

    Raises:
        ValueError: The model predicts normalised patches, tokens from pixels or pixels from tokens, or has
            no order of its own; images or order do not fit; or a number is out of range.
    """
    if model.config.norm_pix_loss:
        raise ValueError("generate: the model predicts normalised patches, without brightness")
    if (model.config.inputs == "tokens") != (model.config.objective == "tokens"):
        raise ValueError(
            f"generate: expected a model that reads what it predicts, got inputs {model.config.inputs} and "
            f"objective {model.config.objective}"
        )
    if steps < 1:
        raise ValueError(f"generate: steps: expected at least 1, got {steps}")
    grid_size = model.grid(imgs)
    tokens = model.config.inputs == "tokens"
    patches = patchify(imgs.float(), model.patch_embed.patch_size)
    length = patches.shape[1]
    if order is None:
        if model.config.order == "random":
            raise ValueError('generate: order: expected one for a model of the order "random"')
        order = model.order_of(grid_size, None, imgs)
    elif order.shape != (length,) or not torch.equal(order.sort().values.cpu(), torch.arange(length)):
        raise ValueError(f"generate: order: expected the numbers 0 to {length - 1}, each once, got {order}")
    if not 0 <= known <= length:
        raise ValueError(f"generate: known: expected between 0 and {length} patches, got {known}")
    made = patches.new_zeros(patches.shape)
    if tokens:
        model.check_codes(codes, len(imgs), grid_size)
        assert codes is not None
        patches, made = codes, torch.zeros_like(codes)
    made[:, order[:known]] = patches[:, order[:known]]
    generator = torch.Generator(imgs.device).manual_seed(seed)
    read = _Reader(model, imgs, order, cached)
    for t in range(known, length):
        made[:, order[t]] = _draw(model, read(made, t), steps, generator)
    return made if tokens else model.images_of(imgs, made)


def _draw(model: DARL, context: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """One patch [B, P], or one entry [B], by its context [B, D]."""
    if model.config.objective == "mse":
        return model.decoder(context).float()
    if model.config.objective == "tokens":
        chances = model.decoder(context).float().softmax(-1)
        return torch.multinomial(chances, 1, generator=generator).squeeze(1)
    values = model.decoder.pred.out_features

    def normal() -> Tensor:
        return torch.randn(len(context), values, device=context.device, generator=generator)

    def denoise(x: Tensor, gamma: float) -> Tensor:
        return model.denoise(context, x, context.new_full((len(context),), gamma))

    # Noise cannot be subtracted where there is nothing else.
    first = 0.5 / steps if model.config.prediction == "epsilon" else 0.0
    return diffusion.sample(denoise, normal(), diffusion.levels(steps, first), normal)
