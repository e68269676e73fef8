"""Small models of the kinds that people convert, with the module names of their libraries."""

import itertools

import torch
from rules import convert
from torch import nn

import dbpkern
from dbpkern.layers.modules import Decorrelated

WIDTH, HEADS, CLASSES, PIXELS = 24, 3, 5, 32


def timm_vit(**kwargs) -> nn.Module:
    import timm  # here: the processes of test_distributed do without it

    config = {"img_size": PIXELS, "patch_size": 8, "embed_dim": WIDTH, "num_heads": HEADS, "depth": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **config | kwargs)


def torchvision_vit() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        image_size=PIXELS,
        patch_size=8,
        num_layers=2,
        num_heads=HEADS,
        hidden_dim=WIDTH,
        mlp_dim=2 * WIDTH,
        num_classes=CLASSES,
    )


class Projection(nn.Module):
    """`.dense`, as in Hugging Face's ViTSelfOutput, ViTIntermediate and ViTOutput."""

    def __init__(self, d: int, o: int) -> None:
        super().__init__()
        self.dense = nn.Linear(d, o)

    def forward(self, x):
        return self.dense(x)


class SelfAttention(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(d, d) for _ in range(3))

    def forward(self, x):
        split = (m(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for m in (self.query, self.key, self.value))
        return nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.attention, self.output = SelfAttention(d), Projection(d, d)

    def forward(self, x):
        return self.output(self.attention(x))


class Layer(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention, self.intermediate, self.output = (
            Attention(d),
            Projection(d, 2 * d),
            Projection(2 * d, d),
        )

    def forward(self, x):
        x = x + self.attention(self.layernorm_before(x))
        return x + self.output(nn.functional.gelu(self.intermediate(self.layernorm_after(x))))


class HuggingFaceViT(nn.Module):
    """`embeddings.patch_embeddings.projection`, `encoder.layer.0.attention.attention.query` and so on."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.patch_embeddings = nn.Module()
        self.embeddings.patch_embeddings.projection = nn.Conv2d(3, WIDTH, 8, 8)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(Layer(WIDTH) for _ in range(2))
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def forward(self, images):
        x = self.embeddings.patch_embeddings.projection(images).flatten(2).mT
        for layer in self.encoder.layer:
            x = layer(x)
        return self.classifier(x.mean(1))


def randomise(model: nn.Module) -> nn.Module:
    """No zero biases and heads, as libraries initialise them: outputs would not depend on what is tested."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


MODELS = {"timm": timm_vit, "torchvision": torchvision_vit, "huggingface": HuggingFaceViT}

# What each preset finds in them, by the module names above.
SITES = {
    "timm": {
        "patch_embed": ["patch_embed.proj"],
        "qkv": ["blocks.0.attn.qkv", "blocks.1.attn.qkv"],
        "proj": ["blocks.0.attn.proj", "blocks.1.attn.proj"],
        "fc1": ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"],
        "fc2": ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2"],
    },
    "torchvision": {
        "patch_embed": ["conv_proj"],
        "qkv": [f"encoder.layers.encoder_layer_{i}.self_attention" for i in (0, 1)],
        "fc1": [f"encoder.layers.encoder_layer_{i}.mlp.0" for i in (0, 1)],
        "fc2": [f"encoder.layers.encoder_layer_{i}.mlp.3" for i in (0, 1)],
    },
    "huggingface": {
        "patch_embed": ["embeddings.patch_embeddings.projection"],
        "qkv": [
            f"encoder.layer.{i}.attention.attention.{name}"
            for i in (0, 1)
            for name in ("query", "key", "value")
        ],
        "proj": [f"encoder.layer.{i}.attention.output.dense" for i in (0, 1)],
        "fc1": [f"encoder.layer.{i}.intermediate.dense" for i in (0, 1)],
        "fc2": [f"encoder.layer.{i}.output.dense" for i in (0, 1)],
    },
}


def make(kind: str) -> nn.Module:
    return randomise(MODELS[kind]())


def images(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 3, PIXELS, PIXELS)


def everything(name: str, module: nn.Module) -> bool:
    return True


def mlp(
    *widths: int, form: str = "auto", dtype: torch.dtype = torch.float32, rank: int | None = None
) -> nn.Sequential:
    """Decorrelated linear layers with tanh in between."""
    layers = [nn.Linear(d, o, dtype=dtype) for d, o in itertools.pairwise(widths)]
    model = nn.Sequential(*(m for layer in layers for m in (layer, nn.Tanh())))[:-1]
    return convert(model, sites=None, filter=everything, form=form, rank=rank)


def decorrelated(model: nn.Module) -> dict[str, Decorrelated]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Decorrelated)}


def shake(model: nn.Module, size: float = 0.1) -> nn.Module:
    """Move every R away from the identity; layers that share one keep it equal."""
    seen: dict[int, torch.Tensor] = {}
    for layer in decorrelated(model).values():
        factor = layer.factors[-1]  # R, or S
        if factor.data_ptr() not in seen:
            seen[factor.data_ptr()] = factor.add_(torch.randn_like(factor) * size)
    return model


def captured(decor: dbpkern.DecorSGD) -> dict[str, torch.Tensor]:
    """The rows sampled since the last step, by layer."""
    return {site.name: site.slot.gather() for site in decor.engine.sites if site.slot.count()}


def random_like(parameters) -> list[torch.Tensor]:
    return [torch.randn_like(p) for p in parameters]
