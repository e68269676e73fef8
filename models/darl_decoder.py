"""DARL's decoders: what predicts a patch from the encoder's output (section 3.3 of arXiv 2403.05196).

Letters used in shapes: D the width of the encoder.
"""

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from models.vit import norm_layer


class ResidualMlp(nn.Module):
    """LayerNorm and a two-layer MLP around a skip connection."""

    def __init__(self, dim: int, mlp_ratio: float):
        super().__init__()
        self.norm = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return x + self.mlp(self.norm(x))


class MlpDecoder(nn.Module):
    """Residual MLP on the context, to which the embedded noisy patch is added where there is one.

    Args:
        dim: D.
        out: Values that are predicted.
        depth: Residual blocks; none makes a linear decoder.
        mlp_ratio: Hidden width of a block over D.
        noisy: Values of a noisy patch, None for none.
    """

    def __init__(self, dim: int, out: int, depth: int, mlp_ratio: float, noisy: int | None = None):
        super().__init__()
        self.embed = None if noisy is None else nn.Linear(noisy, dim)
        self.blocks = nn.ModuleList(ResidualMlp(dim, mlp_ratio) for _ in range(depth))
        # Without blocks or patch, the encoder's last norm has just been.
        self.norm = norm_layer(dim) if depth or noisy is not None else nn.Identity()
        self.pred = nn.Linear(dim, out)

    def forward(self, context: Tensor, noisy: Tensor | None = None) -> Tensor:
        """Context [..., D], and the noisy patch [..., noisy], to predictions [..., out]."""
        x = context
        if noisy is not None:
            assert self.embed is not None
            x = x + self.embed(noisy)
        for block in self.blocks:
            x = block(x)
        return self.pred(self.norm(x))


class PairBlock(Block):
    """timm's block on sequences of two tokens.

    The softmax over two is a sigmoid of the difference of their scores, so attention is elementwise work
    on the projections, with no kernel for sequences of length 2.
    """

    attn: Attention

    def forward(self, x: Tensor, second: bool = False) -> Tensor:  # type: ignore[override]  # no masks
        """Pairs [..., 2, D] to pairs, or to their second tokens [..., 1, D] alone."""
        attn = self.attn
        q, k, v = attn.qkv(self.norm1(x)).unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(-3)
        if second:
            x, q = x[..., 1:, :], q[..., 1:, :, :]
        (k0, k1), (v0, v1) = k.split(1, dim=-3), v.split(1, dim=-3)
        first = torch.sigmoid((q * (k0 - k1)).sum(-1, keepdim=True) * attn.scale)
        x = x + attn.proj(torch.lerp(v1, v0, first).flatten(-2))
        return x + self.mlp(self.norm2(x))


class PairDecoder(nn.Module):
    """Transformer on two tokens, the context and the embedded noisy patch (section 3.3 of the paper).

    Args:
        dim: D.
        out: Values that are predicted.
        depth: Blocks, at least 1.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLPs over D.
        noisy: Values of a noisy patch.
    """

    def __init__(self, dim: int, out: int, depth: int, num_heads: int, mlp_ratio: float, noisy: int):
        super().__init__()
        self.embed = nn.Linear(noisy, dim)
        self.blocks = nn.ModuleList(
            PairBlock(
                dim,
                num_heads,
                mlp_ratio,
                qkv_bias=True,
                norm_layer=norm_layer,  # type: ignore[arg-type]  # timm takes any function that makes one
            )
            for _ in range(depth)
        )
        self.norm = norm_layer(dim)
        self.pred = nn.Linear(dim, out)

    def forward(self, context: Tensor, noisy: Tensor) -> Tensor:
        """Context [..., D] and noisy patch [..., noisy] to predictions [..., out]."""
        noisy = self.embed(noisy)
        x = torch.stack([context, noisy], dim=-2)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x = block(x, second=i == last)  # nobody reads the context's token after the last
        return self.pred(self.norm(x.squeeze(-2)))
