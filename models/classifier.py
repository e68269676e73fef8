"""Image classifiers on pre-trained encoders: plain ViTs of timm, a linear head on one of three read-outs.

    "mean"    the mean of the patch tokens, then a LayerNorm of its own in place of the encoder's last one:
              MAE's fine-tuning (He et al. 2021, arXiv 2111.06377, main_finetune.py)
    "class"   the class token: MAE's linear probing
    "last"    the token of the patch that was predicted last: DARL's fine-tuning (Li, Bornschein, Chen 2024,
              arXiv 2403.05196)

An encoder with added positions is timm's `VisionTransformer`, one with RoPE timm's `Eva`. At another size of
images than the encoder's, added positions are resampled, and RoPE's are scaled to the range of before.

Letters used in shapes: B images, H and W their size, L patches, D the width, C classes.
"""

import json
import os
from ast import literal_eval
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.models import Eva, VisionTransformer
from torch import Tensor, nn

from models import darl, mae
from models.darl_order import patch_order, rotary_positions
from models.vit import check_sizes, check_transformer, norm_layer, pair

READOUTS = ("mean", "class", "last")
Readout = Literal["mean", "class", "last"]

SIZES = mae.SIZES | darl.SIZES
SIZE_ARGS = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")

Vit = VisionTransformer | Eva


@dataclass(frozen=True)
class Architecture:
    """A ViT as it was pre-trained.

    Args:
        model: A name such as "mae_vit_base" or "darl_vit_base", or "timm:NAME".
        img_size: Height and width of the images in pixels; one number for squares.
        sizes: Changes to the model: patch_size, embed_dim, depth, num_heads, mlp_ratio.
        positions: Of DARL, like all that follow: "none", "sincos", "learned", "rope1d" or "rope2d".
        rope_temperature: RoPE's longest wavelength, over 2 pi, in patches.
        order: In which order patches are predicted.
        order_block: Side of a square in the orders "nested" and "round-robin".
        order_seed: Of the order "fixed".
        inputs: What the encoder reads, "pixels" or "tokens".
    """

    model: str
    img_size: int | tuple[int, int] = 224
    sizes: Mapping[str, Any] = field(default_factory=dict)
    positions: str = "rope2d"
    rope_temperature: float = 100.0
    order: str = "raster"
    order_block: int = 2
    order_seed: int = 0
    inputs: str = "pixels"

    @property
    def is_darl(self) -> bool:
        """Whether the encoder is DARL's."""
        return self.model.startswith("darl")

    def metadata(self) -> dict[str, str]:
        """What `from_metadata` reads, for a safetensors file."""
        about = {name: getattr(self, name) for name in ("model", "img_size")} | dict(self.sizes)
        if self.is_darl:
            about |= {name: getattr(self, name) for name in self._parts()}
        return {name: str(value) for name, value in about.items()}

    @classmethod
    def _parts(cls) -> set[str]:
        """What there is to tell of DARL alone."""
        return {f.name for f in fields(cls)} - {"model", "img_size", "sizes"}

    @classmethod
    def from_metadata(cls, about: Mapping[str, str]) -> "Architecture":
        """Read the metadata of an exported encoder or classifier.

        Raises:
            ValueError: Something is missing, or the encoder reads no pixels.
        """
        names = {"img_size"} | cls._parts()
        needed = {"model", "img_size"} | (names if about.get("model", "").startswith("darl") else set())
        missing = sorted(needed - about.keys())
        if missing:
            raise ValueError(
                f"expected an encoder.safetensors of train/pretrain.py, whose metadata has {sorted(needed)}; "
                f"{', '.join(missing)} missing"
            )
        if about.get("inputs", "pixels") != "pixels":
            raise ValueError(f"expected an encoder that reads pixels, got one for {about['inputs']}")
        values: dict[str, Any] = {name: _value(about[name]) for name in names & about.keys()}
        sizes = {name: _value(about[name]) for name in SIZE_ARGS if name in about}
        return cls(about["model"], sizes=sizes, **values)


def _value(text: str) -> object:
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text


class Loaded(NamedTuple):
    """An encoder or a classifier with its weights.

    Attributes:
        model: At the image size of `architecture`, or for a classifier at its own.
        architecture: How the encoder was pre-trained.
        classes: Names of the classes that the head tells; None for an encoder, which has no head.
        readout: Of the head; None for an encoder.
        causal: Whether the model has a causal mask.
    """

    model: Vit
    architecture: Architecture
    classes: tuple[str, ...] | None = None
    readout: Readout | None = None
    causal: bool = False


class RasterRotations(nn.Module):
    """1D RoPE for timm's `Eva`, in the place of its own module.

    Args:
        grid_size: Rows and columns of patches; positions on other grids are scaled to its range.
        head_dim: Width of an attention head.
        temperature: The longest wavelength, over 2 pi, in patches.
    """

    pos_embed: Tensor

    def __init__(self, grid_size: tuple[int, int], head_dim: int, temperature: float):
        super().__init__()
        self._make = partial(
            rotary_positions, "rope1d", head_dim=head_dim, reference=grid_size, temperature=temperature
        )
        self.grid_size = grid_size
        self.register_buffer("pos_embed", self._make(grid_size), persistent=False)

    def update_feat_shape(self, grid_size: tuple[int, int]) -> None:
        """Keep those of another grid from now on."""
        rows, columns = grid_size
        self.grid_size = (rows, columns)
        self.pos_embed = self._make(self.grid_size).to(self.pos_embed.device)

    def get_embed(self, shape: Sequence[int] | None = None) -> Tensor:
        """Sines and cosines [L, 2 * head_dim] for a grid of rows and columns; those of one grid are kept.

        timm before 1.0.31 names no shape where it is that grid's.
        """
        if shape is None:
            return self.pos_embed
        # A comparison would bind an exported graph to this one size.
        if not torch.compiler.is_exporting() and tuple(shape) == self.grid_size:
            return self.pos_embed
        rows, columns = shape
        return self._make((rows, columns)).to(self.pos_embed.device)


class TakeToken(nn.Module):
    """Read-out of one token, which timm's ViTs take for a pooling module.

    Args:
        index: Which, below zero: counted from the last patch in raster order.
    """

    def __init__(self, index: int):
        super().__init__()
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, n, D] to [B, D]."""
        return x[:, self.index]


def create_vit(
    architecture: Architecture,
    drop_path: float = 0.0,
    pretrained: bool = False,
    dynamic_img_size: bool = False,
) -> Vit:
    """Build an encoder, with a final norm and without a head; weights are timm's random ones.

    Args:
        architecture: What to build.
        drop_path: Rate of stochastic depth at the last block; it grows from 0 at the first.
        pretrained: Whether "timm:NAME" gets timm's weights, which timm downloads and keeps.
        dynamic_img_size: Whether images of any size are taken, their positions being resampled in every call.

    Raises:
        ValueError: No such model, sizes out of range, or a model of timm that is not a ViT.
        FileNotFoundError: timm's weights cannot be had.
    """
    img_size = pair("img_size", architecture.img_size)
    family, _, name = architecture.model.partition(":")
    if family == "timm":
        # Few models know the argument.
        dynamic: dict[str, Any] = {"dynamic_img_size": True} if dynamic_img_size else {}
        try:
            model = timm.create_model(
                name,
                pretrained=pretrained,
                img_size=img_size,
                num_classes=0,
                drop_path_rate=drop_path,
                **dynamic,
                **architecture.sizes,
            )
        except (RuntimeError, TypeError) as error:  # for unknown names and arguments
            raise ValueError(f"timm cannot build {name!r} for images of {img_size}: {error}") from error
        if not isinstance(model, Vit):
            raise ValueError(
                f"{architecture.model}: expected timm's VisionTransformer or Eva, got {type(model).__name__}"
            )
        check_sizes(img_size, model.patch_embed.patch_size)
        return model
    if architecture.model not in SIZES:
        known = ", ".join(SIZES)
        raise ValueError(f"unknown model {architecture.model!r}, expected timm:NAME or one of {known}")
    sizes: dict[str, Any] = {"mlp_ratio": 4.0, **SIZES[architecture.model], **architecture.sizes}
    unknown = [name for name in sizes if name not in SIZE_ARGS]
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]!r}, expected some of {', '.join(SIZE_ARGS)}")
    patch_size = sizes["patch_size"] = pair("patch_size", sizes["patch_size"])
    check_sizes(img_size, patch_size)
    check_transformer("", sizes["embed_dim"], sizes["num_heads"], sizes["depth"])
    build: dict[str, Any] = {
        "img_size": img_size,
        "num_classes": 0,
        "global_pool": "token",
        "drop_path_rate": drop_path,
        "dynamic_img_size": dynamic_img_size,
        "norm_layer": norm_layer,
        **sizes,
    }
    positions = architecture.positions if architecture.is_darl else "sincos"
    if not positions.startswith("rope"):
        return VisionTransformer(pos_embed="none" if positions == "none" else "learn", **build)
    grid_size = (img_size[0] // patch_size[0], img_size[1] // patch_size[1])
    model = Eva(
        attn_type="rope",
        use_abs_pos_emb=False,
        use_rot_pos_emb=True,
        rope_grid_indexing="xy",
        rope_temperature=architecture.rope_temperature,
        ref_feat_shape=grid_size,
        **build,
    )
    if positions == "rope1d":
        head_dim = sizes["embed_dim"] // sizes["num_heads"]
        model.rope = RasterRotations(grid_size, head_dim, architecture.rope_temperature)
    return model


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file, raising ValueError if it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            # No mapping, in spite of its keys().
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def fill(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Load weights, raising ValueError that names their file unless they are exactly the model's."""
    own = model.state_dict()
    wrong = [f"{name} (missing)" for name in own if name not in weights]
    wrong += [f"{name} (unknown)" for name in weights if name not in own]
    wrong += [
        f"{name} (expected {list(own[name].shape)}, got {list(tensor.shape)})"
        for name, tensor in weights.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{path} does not fit the model: {', '.join(wrong[:5])}{more}")
    model.load_state_dict(weights)


def load_encoder(
    path: str | os.PathLike[str],
    drop_path: float = 0.0,
    model: str | None = None,
    sizes: Mapping[str, Any] | None = None,
    dynamic_img_size: bool = False,
) -> Loaded:
    """Load an encoder, or a classifier with `classifier_metadata`, from a file.

    Args:
        path: encoder.safetensors of a run of train/pretrain.py, classifier.safetensors of one of
            train/finetune.py, or a checkpoint file of facebookresearch/mae for square images.
        drop_path: As in `create_vit`.
        model: Which model it is. A checkpoint of facebookresearch/mae does not tell; the others do.
        sizes: Changes to the model, as in `Architecture`.
        dynamic_img_size: As in `create_vit`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds something else, or not the weights of this model.
    """
    path = Path(path)
    if not path.is_file():
        hint = ": a folder, expected a file such as its encoder.safetensors" if path.is_dir() else ""
        raise FileNotFoundError(f"no such encoder: {path}{hint}")
    if path.suffix != ".safetensors":
        return _load_mae(path, drop_path, model, sizes or {}, dynamic_img_size)
    about, weights = read_safetensors(path)
    try:
        architecture = Architecture.from_metadata(about)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    asked = {"model": model or architecture.model, **architecture.sizes, **(sizes or {})}
    found = {"model": architecture.model, **architecture.sizes}
    if asked != found:
        raise ValueError(
            f"model: {path} says itself that it is {found}; expected null or the same, got {asked}"
        )
    vit = create_vit(architecture, drop_path, dynamic_img_size=dynamic_img_size)
    if "readout" not in about:
        fill(vit, weights, path)
        return Loaded(vit, architecture)
    classes = tuple(json.loads(about["classes"]))
    size, causal = literal_eval(about["fine_tuned_at"]), literal_eval(about["causal"])
    readout = cast(Readout, about["readout"])
    to_classifier(vit, architecture, len(classes), readout, img_size=size, causal=causal)
    fill(vit, weights, path)
    return Loaded(vit, architecture, classes, readout, causal)


def _load_mae(
    path: Path, drop_path: float, model: str | None, sizes: Mapping[str, Any], dynamic_img_size: bool
) -> Loaded:
    if model is None:
        raise ValueError(
            f"model: {path} is no safetensors file, and a checkpoint of facebookresearch/mae does not tell "
            "of which model it is; expected one such as mae_vit_base"
        )
    try:
        found = mae.read_mae_checkpoint(path)
    except ValueError:
        raise
    except Exception as error:  # torch raises nearly anything where a file is of another kind
        raise ValueError(f"{path} is no checkpoint of facebookresearch/mae: {error}") from error
    weights = {name: tensor for name, tensor in found.items() if name.split(".")[0] in mae.ENCODER}
    patch, positions = weights.get("patch_embed.proj.weight"), weights.get("pos_embed")
    if patch is None or positions is None:
        raise ValueError(
            f"{path} is not an encoder: expected patch_embed and pos_embed, got {list(found)[:5]}"
        )
    rows, columns = patch.shape[2:]
    side = isqrt(positions.shape[1] - 1)
    architecture = Architecture(model, (side * rows, side * columns), dict(sizes))
    vit = create_vit(architecture, drop_path, dynamic_img_size=dynamic_img_size)
    fill(vit, weights, path)
    return Loaded(vit, architecture)


def _order(model: Vit, architecture: Architecture, what: str) -> Tensor:
    """The order of pre-training for the patches of the model's images."""
    patches = model.patch_embed
    if architecture.order == "random":
        raise ValueError(
            f'{what}: expected an encoder with an order of its patches, got one of the order "random"'
        )
    trained = pair("img_size", architecture.img_size)
    if architecture.order == "fixed" and patches.img_size != trained:
        raise ValueError(
            f'{what}: the order "fixed" is one of the patches of {trained} pixels; expected such images, got '
            f"{patches.img_size}"
        )
    return patch_order(
        architecture.order, patches.grid_size, architecture.order_block, architecture.order_seed
    )


def causal_mask(order: Tensor) -> Tensor:
    """Who sees whom [1 + L, 1 + L], patches in raster order: those before itself in `order`, and the start.

    Args:
        order: Raster numbers of the patches in the order in which they were predicted, [L].
    """
    place = torch.cat([order.new_full((1,), -1), order.argsort()])
    return place[:, None] >= place


def _give_mask(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {"attn_mask": model.attn_mask, **kwargs}


def _set_mask(model: Vit, mask: Tensor | None) -> None:
    if hasattr(model, "attn_mask"):
        model.attn_mask = mask  # type: ignore[assignment]  # a buffer may be None
    elif mask is not None:
        model.register_buffer("attn_mask", mask, persistent=False)
        model.register_forward_pre_hook(_give_mask, with_kwargs=True)


def _set_readout(model: Vit, architecture: Architecture, readout: Readout) -> None:
    norms = [norm for norm in (model.norm, model.fc_norm) if not isinstance(norm, nn.Identity)]
    model.attn_pool = None  # type: ignore[assignment]  # as timm itself does
    if readout == "mean":
        model.global_pool = "avg"
        if not isinstance(model.norm, nn.Identity):
            # As MAE does: the last norm of pre-training goes, that of the mean starts anew.
            model.norm, model.fc_norm = nn.Identity(), nn.LayerNorm(model.embed_dim, eps=norms[0].eps)
        return
    # A norm for tokens may as well come before one is taken.
    model.norm, model.fc_norm = norms[0] if norms else nn.Identity(), nn.Identity()
    if readout == "class":
        if model.cls_token is None:
            raise ValueError(f'readout: {architecture.model} has no class token; expected "mean" or "last"')
        model.global_pool = "token"
        return
    order = _order(model, architecture, "readout")
    model.global_pool = ""
    model.attn_pool = TakeToken(int(order[-1]) - len(order))  # type: ignore[assignment]  # timm calls any


def to_classifier(
    model: Vit,
    architecture: Architecture,
    num_classes: int,
    readout: Readout = "mean",
    *,
    img_size: int | tuple[int, int] | None = None,
    layer: int | None = None,
    causal: bool = False,
    linear: bool = False,
) -> Architecture:
    """Make an encoder a classifier of images [B, 3, H, W] to scores [B, C], in place.

    Args:
        model: Of `create_vit` or `load_encoder`.
        architecture: How it was pre-trained.
        num_classes: C.
        readout: What the head sees: "mean", "class" or "last".
        img_size: Height and width of the images in pixels, or one number; None for those of `model`.
        layer: Blocks that are kept, from the first; None for all.
        causal: Whether patches see only those before them, as in DARL's pre-training.
        linear: For a linear probe as in MAE (section A.1): nothing but the head is trained, which has a
            BatchNorm without weights before it and starts from N(0, 0.01^2) in place of N(0, (2e-5)^2).

    Returns:
        The architecture with the blocks that are left.

    Raises:
        ValueError: Choices that do not go with each other or with the encoder; sizes out of range.
    """
    if readout not in READOUTS:
        raise ValueError(f"readout: expected one of {', '.join(READOUTS)}, got {readout!r}")
    if causal and not architecture.is_darl:
        raise ValueError(f"causal: expected an encoder of DARL, got {architecture.model}")
    if causal and readout == "class":
        raise ValueError('readout: the start token sees no patch if causal; expected "mean" or "last"')
    depth = len(model.blocks)
    if layer is not None and not 1 <= layer <= depth:
        raise ValueError(f"layer: expected 1 to {depth}, or null for the last, got {layer}")
    if num_classes < 2:
        raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
    if img_size is not None:
        check_sizes(pair("img_size", img_size), model.patch_embed.patch_size)
        model.set_input_size(pair("img_size", img_size))
    if layer is not None:
        model.blocks = model.blocks[:layer]
    _set_readout(model, architecture, readout)
    mask = causal_mask(_order(model, architecture, "causal")) if causal else None
    _set_mask(model, mask)
    last = nn.Linear(model.embed_dim, num_classes)
    nn.init.trunc_normal_(last.weight, std=0.01 if linear else 2e-5)
    nn.init.zeros_(last.bias)
    head: nn.Module = last
    if linear:
        model.requires_grad_(False)
        head = nn.Sequential(nn.BatchNorm1d(model.embed_dim, eps=1e-6, affine=False), last)
    model.head = head  # type: ignore[assignment]  # timm calls any
    model.num_classes = num_classes
    return replace(architecture, sizes=dict(architecture.sizes) | {"depth": len(model.blocks)})


def classifier_metadata(
    model: Vit, architecture: Architecture, classes: Sequence[str], readout: Readout, causal: bool
) -> dict[str, str]:
    """What `load_encoder` needs to build a classifier again, for a safetensors file.

    Args:
        model: The classifier.
        architecture: As `to_classifier` gave it.
        classes: Names of the classes.
        readout: As for `to_classifier`, like `causal`.
        causal: Whether it has a causal mask.
    """
    return architecture.metadata() | {
        "format": "pt",
        "readout": readout,
        "causal": str(causal),
        "fine_tuned_at": str(tuple(model.patch_embed.img_size)),
        "classes": json.dumps(list(classes)),
    }


def classifier_state_dict(model: Vit) -> dict[str, Tensor]:
    """Contiguous copies of a classifier's tensors, under the names of timm's ViTs.

    A linear probe's BatchNorm is folded into the head, which computes what both did in evaluation.
    """
    state = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
        if not name.startswith("head.")
    }
    head: nn.Module = model.head
    last = head[1] if isinstance(head, nn.Sequential) else head
    weight, bias = (parameter.detach().clone() for parameter in last.parameters())
    if isinstance(head, nn.Sequential):
        norm = head[0]
        assert isinstance(norm, nn.BatchNorm1d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        weight /= (norm.running_var + norm.eps).sqrt()
        bias -= weight @ norm.running_mean
    return state | {"head.weight": weight, "head.bias": bias}
