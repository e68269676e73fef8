"""DARL: denoising autoregressive representation learning (Li, Bornschein, Chen 2024, arXiv 2403.05196).

A ViT with causal attention reads the patches of an image one after the other, after a start token; from its
output at each place a small decoder predicts the next patch, by mean squared error or by diffusion. The
blocks and their parameters' names are timm's: with 2D RoPE the encoder is that of
`vit_base_patch16_rope_224` without LayerScale, `timm.models.eva.vit_base_patch16_rope_224(init_values=None)`.

What the paper leaves open is chosen here as follows: a final LayerNorm; the start token is learned and has no
rotation (it stands at (0, 0)); RoPE's longest wavelength is 2 pi * 100, as in timm's models of that name; the
decoder of two tokens is as wide as the encoder, embeds the noisy patch by weights of its own and reads its
prediction from that patch's token; losses are means over patches and their values.

Letters used in shapes: B images, C channels, H and W their size, L patches, P the values in a patch (rows *
columns * channels), D the width, V entries of a vocabulary, n tokens, E twice the width of an attention head.
"""

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from timm.layers import (
    PatchEmbed,
    apply_rot_embed_cat,
    resample_abs_pos_embed,
)
from timm.models.eva import EvaBlock
from torch import Tensor, nn

from models import diffusion
from models.darl_decoder import MlpDecoder, PairDecoder
from models.darl_order import ORDERS, check_choice, patch_order, rotary_positions, two_stream_mask
from models.vit import SIZES as VIT_SIZES
from models.vit import (
    check_sizes,
    check_transformer,
    create,
    grid_of,
    init_xavier,
    norm_layer,
    pair,
    patch_statistics,
    patchify,
    sincos_positions,
    unpatchify,
)

SIZES = {f"darl_vit_{size}": arguments for size, arguments in VIT_SIZES.items()}

# First components of the names that make up the encoder; they are timm's.
ENCODER = ("cls_token", "pos_embed", "patch_embed", "blocks", "norm")

POSITIONS = ("none", "sincos", "learned", "rope1d", "rope2d")
OBJECTIVES = ("mse", "diffusion", "tokens")
DECODERS = ("mlp", "transformer")
PREDICTIONS = ("x0", "epsilon")
INPUTS = ("pixels", "tokens")


def _take(tokens: Tensor, order: Tensor) -> Tensor:
    """Bring tokens [B, L, ...] into an order [L], or one for every image [B, L]."""
    if order.dim() == 1:
        return tokens[:, order]
    index = order.view(*order.shape, *[1] * (tokens.dim() - 2)).expand(-1, -1, *tokens.shape[2:])
    return tokens.expand(len(order), *tokens.shape[1:]).gather(1, index)


class TokenEmbed(nn.Module):
    """Embedding of one entry of a vocabulary for each patch; it tells the sizes that `PatchEmbed` tells."""

    def __init__(self, img_size: tuple[int, int], patch_size: tuple[int, int], vocabulary: int, dim: int):
        super().__init__()
        self.img_size, self.patch_size = img_size, patch_size
        self.grid_size = (img_size[0] // patch_size[0], img_size[1] // patch_size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.embedding = nn.Embedding(vocabulary, dim)

    def forward(self, codes: Tensor) -> Tensor:
        """Entries [B, L] to [B, L, D]."""
        return self.embedding(codes)


class Cache:
    """Keys and values of the tokens that a model has read, for all of its blocks.

    Args:
        model: Whose cache.
        batch: B.
        capacity: Tokens that fit.
    """

    def __init__(self, model: "DARL", batch: int, capacity: int):
        weight = model.norm.weight
        shape = (len(model.blocks), 2, batch, model.num_heads, capacity, model.head_dim)
        self.tokens = 0
        self._held = weight.new_empty(shape)

    def add(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values [B, heads, n, head_dim] of new tokens; returns those of all, old and new."""
        end = self.tokens + k.shape[2]
        for held, new in zip(self._held[block], (k, v), strict=True):
            held[:, :, self.tokens : end] = new
        keys, values = self._held[block, :, :, :, :end]
        return keys.to(k.dtype), values.to(v.dtype)


@dataclass
class DarlConfig:
    """What a DARL model predicts, and how.

    Args:
        objective: "mse" on pixels; "diffusion", by noise of its own for every patch; or "tokens", the
            cross-entropy of a tokenizer's codes.
        positions: "none"; "sincos" or "learned", which are added to the patches; "rope1d" or "rope2d", which
            rotate queries and keys.
        rope_temperature: RoPE's longest wavelength, over 2 pi, in patches.
        order: In which order patches are predicted: see `patch_order`; or "random", another one for every
            image, which needs two_stream.
        order_block: Side of the squares of "nested" and "round-robin", in patches.
        two_stream: Predict by query tokens that know where the patch is, beside the stream of patches, as
            XLNet does (Yang et al. 2019, arXiv 1906.08237). It doubles the tokens.
        decoder: "mlp" or, for diffusion, "transformer"; null for "transformer" there and "mlp" otherwise.
        decoder_depth: Its blocks; null for 1 in diffusion and 0, a linear decoder, otherwise.
        gamma: Parameters of the Beta distribution of noise levels.
        gamma_conditioned: Tell the decoder the noise level, as one more value of the noisy patch.
        prediction: Of diffusion: "x0", the clean patch, or "epsilon", the noise.
        norm_pix_loss: Predict pixels that are standardised patch by patch; such a model cannot draw images.
        inputs: "pixels", or "tokens" for a tokenizer's codes in place of patches.
    """

    objective: Literal["mse", "diffusion", "tokens"] = "mse"
    positions: Literal["none", "sincos", "learned", "rope1d", "rope2d"] = "rope2d"
    rope_temperature: float = 100.0
    order: Literal["raster", "nested", "round-robin", "fixed", "random"] = "raster"
    order_block: int = 2
    two_stream: bool = False
    decoder: Literal["mlp", "transformer"] | None = None
    decoder_depth: int | None = None
    gamma: tuple[float, float] = (0.03, 1.0)
    gamma_conditioned: bool = False
    prediction: Literal["x0", "epsilon"] = "x0"
    norm_pix_loss: bool = False
    inputs: Literal["pixels", "tokens"] = "pixels"

    @property
    def reads_tokens(self) -> bool:
        """Whether a tokenizer is needed."""
        return "tokens" in (self.objective, self.inputs)

    @property
    def rotates(self) -> bool:
        """Whether positions rotate queries and keys."""
        return self.positions in ("rope1d", "rope2d")

    def resolved(self) -> "DarlConfig":
        """The same with the decoder that null stands for.

        Raises:
            ValueError: for choices that do not exist, or do not go together.
        """
        for name, value, known in (
            ("positions", self.positions, POSITIONS), ("order", self.order, ORDERS),
            ("objective", self.objective, OBJECTIVES), ("decoder", self.decoder, (None, *DECODERS)),
            ("prediction", self.prediction, PREDICTIONS), ("inputs", self.inputs, INPUTS),
        ):  # fmt: skip
            check_choice(name, value, known)
        if not 0 < self.rope_temperature < float("inf"):
            raise ValueError(
                f"rope_temperature: expected a finite number above 0, got {self.rope_temperature}"
            )
        diffuses = self.objective == "diffusion"
        decoder = self.decoder or ("transformer" if diffuses else "mlp")
        depth = int(diffuses) if self.decoder_depth is None else self.decoder_depth
        if decoder == "transformer" and not diffuses:
            raise ValueError(f'decoder: "transformer" denoises patches; expected "mlp" for {self.objective}')
        least = int(decoder == "transformer")
        if depth < least:
            raise ValueError(f"decoder_depth: expected at least {least} for {decoder}, got {depth}")
        if self.order == "random" and not (self.two_stream and self.positions != "none"):
            raise ValueError(
                'order: "random" needs two_stream and positions, for a patch whose place is not known cannot '
                "be predicted"
            )
        if not all(0 < value < float("inf") for value in self.gamma) or len(self.gamma) != 2:
            raise ValueError(f"gamma: expected two finite numbers above 0, got {self.gamma}")
        if self.norm_pix_loss and self.objective == "tokens":
            raise ValueError("norm_pix_loss: expected False for the objective tokens, which are no pixels")
        return replace(self, decoder=decoder, decoder_depth=depth)


class DARL(nn.Module):
    """Causal ViT that predicts each patch of an image from those before it.

    Args:
        config: What is predicted, and how; None for the defaults.
        img_size: Height and width of the images; one number for squares. Other sizes that the patch divides
            are served, too, by positions that are interpolated.
        patch_size: Height and width of a patch; has to divide the image.
        in_chans: Channels of the images.
        embed_dim: Width; divisible by `num_heads` and by 4, with RoPE a head's width by 4.
        depth: Blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLPs over their width.
        order_seed: Of the order "fixed".
        vocabulary: V, where inputs or objective are tokens.

    Raises:
        ValueError: For sizes that break these conditions, and choices that do not go together.
    """

    patch_embed: PatchEmbed | TokenEmbed
    rope: Tensor
    places: Tensor

    def __init__(
        self,
        config: DarlConfig | None = None,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        order_seed: int = 0,
        vocabulary: int | None = None,
    ):
        super().__init__()
        self.config = config = (config or DarlConfig()).resolved()
        img_size = pair("img_size", img_size)
        patch_size = pair("patch_size", patch_size)
        check_sizes(img_size, patch_size)
        check_transformer("", embed_dim, num_heads, depth)
        head_dim = embed_dim // num_heads
        if config.rotates and head_dim % 4:
            raise ValueError(f"a head's width must be divisible by 4 for {config.positions}, got {head_dim}")
        if config.reads_tokens and not (vocabulary and vocabulary > 1):
            raise ValueError(f"vocabulary: expected at least 2 entries for tokens, got {vocabulary}")
        self.in_chans, self.order_seed, self.vocabulary = in_chans, order_seed, vocabulary
        self.num_heads, self.head_dim = num_heads, head_dim

        if config.inputs == "tokens":
            assert vocabulary is not None
            self.patch_embed = TokenEmbed(img_size, patch_size, vocabulary, embed_dim)
        else:
            self.patch_embed = PatchEmbed(
                img_size,
                patch_size,  # type: ignore[arg-type]  # timm takes two numbers, too
                in_chans,
                embed_dim,
                strict_img_size=False,
            )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        grid_size = self.patch_embed.grid_size
        if config.positions == "sincos":
            self.pos_embed = nn.Parameter(sincos_positions(grid_size, embed_dim), requires_grad=False)
        elif config.positions == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid_size[0] * grid_size[1], embed_dim))
        self.query_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if config.two_stream else None
        block = partial(
            EvaBlock, mlp_ratio=mlp_ratio, attn_type="rope", num_prefix_tokens=1, norm_layer=norm_layer
        )
        self.blocks = nn.ModuleList(block(embed_dim, num_heads) for _ in range(depth))
        self.norm = norm_layer(embed_dim)
        self.decoder = self._make_decoder(embed_dim, num_heads, mlp_ratio)
        if config.rotates:
            self.register_buffer("rope", self._rope(grid_size), persistent=False)
        if config.order != "random":
            places = patch_order(config.order, grid_size, config.order_block, order_seed)
            self.register_buffer("places", places, persistent=False)
        self._init_weights()

    def _make_decoder(self, dim: int, num_heads: int, mlp_ratio: float) -> MlpDecoder | PairDecoder:
        config, (rows, columns) = self.config, self.patch_embed.patch_size
        values = rows * columns * self.in_chans
        noisy = values + config.gamma_conditioned if config.objective == "diffusion" else None
        depth = config.decoder_depth
        assert depth is not None
        if config.decoder == "transformer":
            assert noisy is not None
            return PairDecoder(dim, values, depth, num_heads, mlp_ratio, noisy)
        out = self.vocabulary if config.objective == "tokens" else values
        assert out is not None
        return MlpDecoder(dim, out, depth, mlp_ratio, noisy)

    def _init_weights(self) -> None:
        """Initialise by MAE's recipe: Xavier-uniform weights, zero biases, tokens from N(0, 0.02)."""
        nn.init.normal_(self.cls_token, std=0.02)
        if self.query_token is not None:
            nn.init.normal_(self.query_token, std=0.02)
        if self.config.positions == "learned":
            nn.init.normal_(self.pos_embed, std=0.02)
        if isinstance(self.patch_embed, TokenEmbed):
            nn.init.normal_(self.patch_embed.embedding.weight, std=0.02)
        init_xavier(self)

    def _rope(self, grid_size: tuple[int, int]) -> Tensor:
        return rotary_positions(
            self.config.positions,
            grid_size,
            self.head_dim,
            self.patch_embed.grid_size,
            self.config.rope_temperature,
        )

    def grid(self, imgs: Tensor) -> tuple[int, int]:
        """Rows and columns of patches, raising ValueError unless `imgs` [B, C, H, W] can be cut into them."""
        return grid_of(imgs, self.in_chans, self.patch_embed.patch_size)

    def place(self, grid_size: tuple[int, int], device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Added positions [1, 1 + L, D] and rotations [L, E] of a grid, None for those that there are not."""
        own = grid_size == self.patch_embed.grid_size
        if self.config.positions == "none":
            return None, None
        if self.config.rotates:
            return None, self.rope if own else self._rope(grid_size).to(device)
        if own:
            return self.pos_embed, None
        if self.config.positions == "learned":
            return resample_abs_pos_embed(self.pos_embed, list(grid_size), self.patch_embed.grid_size), None
        made = sincos_positions(grid_size, self.pos_embed.shape[-1], self.patch_embed.grid_size)
        return made.to(device, self.pos_embed.dtype), None

    def order_of(self, grid_size: tuple[int, int], noise: Tensor | None, imgs: Tensor) -> Tensor:
        """The order [L] of the patches of a grid, or [B, L] where every image has its own."""
        if self.config.order == "random":
            shape = (len(imgs), grid_size[0] * grid_size[1])
            if noise is None:
                noise = torch.rand(shape, device=imgs.device)
            elif noise.shape != shape:
                raise ValueError(f"expected noise of shape {list(shape)}, got {list(noise.shape)}")
            return noise.argsort(dim=1, stable=True)
        if grid_size == self.patch_embed.grid_size:
            return self.places
        return patch_order(self.config.order, grid_size, self.config.order_block, self.order_seed).to(
            imgs.device
        )

    def _embed(self, imgs: Tensor, codes: Tensor | None) -> tuple[Tensor, tuple[int, int]]:
        """Tokens of the patches [B, L, D] in raster order, without positions, and their grid."""
        grid_size = self.grid(imgs)
        if self.config.inputs == "pixels":
            return self.patch_embed(imgs), grid_size
        self.check_codes(codes, len(imgs), grid_size)
        return self.patch_embed(codes), grid_size

    @staticmethod
    def check_codes(codes: Tensor | None, batch: int, grid_size: tuple[int, int]) -> None:
        """Raise ValueError unless there is an entry of the vocabulary for each patch, [batch, L]."""
        shape = (batch, grid_size[0] * grid_size[1])
        if codes is None or codes.shape != shape:
            raise ValueError(
                f"codes: expected a tensor of shape {list(shape)}, got "
                f"{None if codes is None else list(codes.shape)}"
            )

    def embed_patches(self, patches: Tensor) -> Tensor:
        """Tokens [B, n, D] of any patches [B, n, P], or of entries of the vocabulary [B, n]."""
        if self.config.inputs == "tokens":
            return self.patch_embed(patches)
        patches = patches.to(self.norm.weight.dtype)
        single = unpatchify(patches.flatten(0, 1).unsqueeze(1), (1, 1), self.patch_embed.patch_size)
        tokens = self.patch_embed(single)
        return tokens.view(*patches.shape[:2], tokens.shape[-1])

    def features(self, imgs: Tensor, is_causal: bool = False, codes: Tensor | None = None) -> Tensor:
        """The encoder's output for whole images, [B, 1 + L, D]: start token, then the patches.

        They are in raster order, or in the order of prediction if causal.

        Args:
            imgs: [B, C, H, W].
            is_causal: Whether a patch sees only those before it, as in pre-training, or all of them.
            codes: Entries of the vocabulary [B, L], where these are the inputs.

        Raises:
            ValueError: For images or codes that do not fit, and for a causal order that is random.
        """
        if is_causal and self.config.order == "random":
            raise ValueError('features: expected is_causal=False for the order "random"')
        x, grid_size = self._embed(imgs, codes)
        added, rope = self.place(grid_size, imgs.device)
        start: Tensor = self.cls_token
        if added is not None:
            start, x = start + added[:, :1], x + added[:, 1:]
        if is_causal:
            order = self.order_of(grid_size, None, imgs)
            x = x[:, order]
            rope = None if rope is None else rope[order]
        x = torch.cat([start.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x, rope=rope, is_causal=is_causal)
        return self.norm(x)

    def contexts(self, imgs: Tensor, order: Tensor, codes: Tensor | None = None) -> Tensor:
        """What is known of each patch from those before it: [B, L, D], in the order of prediction.

        Args:
            imgs: [B, C, H, W].
            order: Raster numbers of the patches in the order of prediction, [L], or [B, L].
            codes: Entries of the vocabulary [B, L] in raster order, where these are the inputs.

        Raises:
            ValueError: For images or codes that do not fit.
        """
        x, grid_size = self._embed(imgs, codes)
        length = x.shape[1]
        added, rope = self.place(grid_size, imgs.device)
        start: Tensor = self.cls_token
        if added is not None:
            start, x = start + added[:, :1], x + added[:, 1:]
        start = start.expand(len(x), -1, -1)
        x = _take(x, order)[:, :-1]  # nothing comes after the last patch
        if rope is not None:
            rope = rope[order] if order.dim() == 1 else rope[order].unsqueeze(1)
        if not self.config.two_stream:
            x = torch.cat([start, x], dim=1)
            rope = None if rope is None else rope[..., :-1, :]
            for block in self.blocks:
                x = block(x, rope=rope, is_causal=True)
            return self.norm(x)
        queries = self.queries(added, order).expand(len(x), -1, -1)
        x = torch.cat([start, x, queries], dim=1)
        rope = None if rope is None else torch.cat([rope[..., :-1, :], rope], dim=-2)
        mask = two_stream_mask(length, x.device)
        for block in self.blocks:
            x = block(x, rope=rope, attn_mask=mask)
        return self.norm(x[:, length:])

    @staticmethod
    def in_raster_order(contexts: Tensor, order: Tensor) -> Tensor:
        """Bring `contexts` [B, L, D] back from the order of prediction [L] or [B, L]."""
        return _take(contexts, order.argsort(-1))

    def queries(self, added: Tensor | None, order: Tensor) -> Tensor:
        """Query tokens of patches in an order, [1 or B, n, D]."""
        assert self.query_token is not None
        if added is None:
            return self.query_token.expand(-1, order.shape[-1], -1)
        return self.query_token + _take(added[:, 1:], order)

    def targets(self, imgs: Tensor) -> Tensor:
        """What pixels are predicted, [B, L, P] in raster order and float32."""
        patches = patchify(imgs.float(), self.patch_embed.patch_size)
        if self.config.norm_pix_loss:
            mean, std = patch_statistics(patches)
            patches = (patches - mean) / std
        return patches

    def denoise(self, context: Tensor, noisy: Tensor, gamma: Tensor) -> Tensor:
        """The clean patches that the decoder takes noisy ones for, [..., P], in float32.

        Args:
            context: [..., D].
            noisy: [..., P].
            gamma: Noise levels [...]; above 0 where the model predicts the noise.
        """
        made = self._decode(context, noisy, gamma).float()
        if self.config.prediction == "epsilon":
            return diffusion.clean_from_noise(noisy, gamma, made)
        return made

    def _decode(self, context: Tensor, noisy: Tensor, gamma: Tensor) -> Tensor:
        told = torch.cat([noisy, gamma.unsqueeze(-1)], dim=-1) if self.config.gamma_conditioned else noisy
        return self.decoder(context, told.to(context.dtype))

    def draw(self, imgs: Tensor) -> tuple[Tensor, Tensor]:
        """The random numbers of diffusion for images [B, C, H, W]: see `diffusion.draw`."""
        rows, columns = self.grid(imgs)
        shape = (len(imgs), rows * columns, imgs.shape[1:].numel() // (rows * columns))
        return diffusion.draw(shape, *self.config.gamma, imgs.device)

    def forward(
        self,
        imgs: Tensor,
        noise: Tensor | None = None,
        drawn: tuple[Tensor, Tensor] | None = None,
        codes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predict every patch from those before it.

        Args:
            imgs: [B, C, H, W].
            noise: Random numbers [B, L] that decide the order "random"; drawn from U(0, 1) for None.
            drawn: Noise levels and noise of diffusion, as `draw` gives them; drawn for None.
            codes: Entries of the vocabulary [B, L] in raster order, for tokens as inputs or objective.

        Returns:
            The loss (scalar, float32), the mean over patches and their values; and the prediction in raster
            order, [B, L, P] clean patches (of `targets`), or [B, L, V] scores of the entries.

        Raises:
            ValueError: For images, noise or codes that do not fit.
        """
        grid_size = self.grid(imgs)
        order = self.order_of(grid_size, noise, imgs)
        context = self.in_raster_order(self.contexts(imgs, order, codes), order)
        if self.config.objective == "tokens":
            self.check_codes(codes, len(imgs), grid_size)
            assert codes is not None
            scores = self.decoder(context).float()
            return F.cross_entropy(scores.flatten(0, 1), codes.flatten()), scores
        target = self.targets(imgs)
        if self.config.objective == "mse":
            made = self.decoder(context).float()
            return (made - target).square().mean(), made
        gamma, eps = self.draw(imgs) if drawn is None else drawn
        noisy = diffusion.corrupt(target, gamma, eps)
        made = self._decode(context, noisy, gamma).float()
        if self.config.prediction == "epsilon":
            clean = diffusion.clean_from_noise(noisy, gamma.clamp(min=1e-4), made.detach())
            return (made - eps).square().mean(), clean
        return (made - target).square().mean(), made

    def images_of(self, imgs: Tensor, patches: Tensor) -> Tensor:
        """Images [B, C, H, W], in float32, of predicted patches [B, L, P].

        Under `norm_pix_loss` a prediction has neither brightness nor contrast, and gets those of the patches
        of `imgs`.

        Raises:
            ValueError: For images that do not fit, or another number or size of patches.
        """
        grid_size = self.grid(imgs)
        values = self.in_chans * self.patch_embed.patch_size[0] * self.patch_embed.patch_size[1]
        expected = [len(imgs), grid_size[0] * grid_size[1], values]
        if list(patches.shape) != expected:
            raise ValueError(f"expected patches of shape {expected}, got {list(patches.shape)}")
        patches = patches.float()
        if self.config.norm_pix_loss:
            mean, std = patch_statistics(patchify(imgs.float(), self.patch_embed.patch_size))
            patches = patches * std + mean
        return unpatchify(patches, grid_size, self.patch_embed.patch_size)

    def extend(self, x: Tensor, rope: Tensor | None, cache: Cache, keep: int) -> Tensor:
        """Read new tokens after those of a cache.

        Each sees what is in the cache and, of the new ones, those up to itself that are kept.

        Args:
            x: New tokens [B, n, D], with their positions.
            rope: Their rotations [n, E], or [B, 1, n, E]; None for none.
            cache: Of this model; the first `keep` tokens are added.
            keep: Between 0 and n. What is not kept, a query, is read with nothing left of it.

        Returns:
            The encoder's output [B, n, D].
        """
        n = x.shape[1]
        known = torch.ones(n, cache.tokens, dtype=torch.bool, device=x.device)
        mask = torch.cat([known, known.new_ones(n, keep).tril()], dim=1)
        for i, module in enumerate(self.blocks):
            block = cast(EvaBlock, module)
            attn = block.attn
            qkv = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, attn.head_dim))
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            if rope is not None:
                q, k = (apply_rot_embed_cat(t, rope).type_as(v) for t in (q, k))
            k, v = cache.add(i, k[:, :, :keep], v[:, :, :keep])
            seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + attn.proj(seen.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        cache.tokens += keep
        return self.norm(x)

    def encoder_state_dict(self) -> dict[str, Tensor]:
        """Return contiguous copies of the encoder's tensors, under the names of timm's ViTs."""
        return {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in self.state_dict().items()
            if name.split(".")[0] in ENCODER
        }


def create_darl(name: str, **overrides: Any) -> DARL:
    """Build a model by name.

    Args:
        name: A key of `SIZES`, such as "darl_vit_base".
        overrides: Arguments of `DARL` that replace those of the table, and fields of its config.

    Raises:
        ValueError: If there is no such model or argument, or a value is out of its range.
    """
    config = overrides.pop("config", DarlConfig())
    names = {field.name for field in fields(DarlConfig)} & overrides.keys()
    config = replace(config, **{name: overrides.pop(name) for name in names})
    return create(DARL, SIZES, name, {"config": config, **overrides})
