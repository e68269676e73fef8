"""Semantic segmentation on pre-trained encoders: a plain ViT of timm, a decoder, a class for every pixel.

    "upernet"  feature maps of four blocks, brought to four scales, then UPerNet (Xiao et al. 2018, arXiv
               1807.10221): how BEiT and MAE are evaluated (He et al. 2021, arXiv 2111.06377, section 5)
    "dpt"      feature maps of four blocks, then the decoder of dense prediction transformers (Ranftl et al.
               2021, arXiv 2103.13413)
    "linear"   a linear layer on the patch tokens: the baseline of Segmenter (Strudel et al. 2021, arXiv
               2105.05633)

The decoders are those of segmentation-models-pytorch. The encoder sees all patches, whatever mask it was
pre-trained with.

Letters used in shapes: B images, H and W their size, h and w rows and columns of patches, D the encoder's
width, C classes.
"""

import json
import os
from ast import literal_eval
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from segmentation_models_pytorch.base.initialization import initialize_decoder
from segmentation_models_pytorch.base.modules import Conv2dReLU
from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn

from models.classifier import Architecture, Vit, create_vit, fill, read_safetensors
from models.vit import check_sizes, pair

HEADS = ("upernet", "dpt", "linear")
Head = Literal["upernet", "dpt", "linear"]

STRIDES = (4, 8, 16, 32)
"""Pixels from one value of a feature map to the next, for the four scales of a pyramid."""

AUXILIARY_WIDTH = 256
AUXILIARY_WEIGHT = 0.4


def _check_pyramid(patch_size: tuple[int, int]) -> int:
    """The side of a patch, raising ValueError unless maps of all `STRIDES` can be made from its grid."""
    side = patch_size[0]
    if patch_size != (side, side) or side & (side - 1):
        raise ValueError(
            "patch_size: expected a square patch whose side is a power of two, for feature maps of the "
            f'strides {STRIDES}, got {patch_size}; the head "linear" takes any'
        )
    return side


class FeaturePyramid(nn.Module):
    """Four feature maps of one size to the strides 4, 8, 16 and 32, as BEiT and MAE do for UPerNet.

    A map is doubled by transposed convolutions of 2 x 2, with BatchNorm and GELU between two of them, and
    shrunk by max-pooling. For patches of 16 pixels the four are enlarged 4 times, 2 times, kept and halved;
    for patches of 8 pixels enlarged 2 times, kept, halved and quartered.

    Args:
        dim: Channels of the maps.
        patch_size: Height and width of a patch in pixels.

    Raises:
        ValueError: A patch is no square, or its side is no power of two.
    """

    def __init__(self, dim: int, patch_size: tuple[int, int]):
        super().__init__()
        side = _check_pyramid(patch_size)
        self.scales = nn.ModuleList(self._scale(dim, side, stride) for stride in STRIDES)

    @staticmethod
    def _scale(dim: int, side: int, stride: int) -> nn.Module:
        if stride > side:
            return nn.MaxPool2d(stride // side)
        layers: list[nn.Module] = []
        for _ in range((side // stride).bit_length() - 1):
            if layers:
                layers += [nn.BatchNorm2d(dim), nn.GELU()]
            layers.append(nn.ConvTranspose2d(dim, dim, 2, stride=2))
        return nn.Sequential(*layers)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps [B, D, h, w] to [B, D, H / 4, W / 4], ..., [B, D, H / 32, W / 32]."""
        return [scale(x) for scale, x in zip(self.scales, maps, strict=True)]


class Segmentation(NamedTuple):
    """What a `SegmentationModel` says of images.

    Attributes:
        logits: [B, C, H, W].
        auxiliary: Those of the auxiliary head, of the same shape; None unless the model is training and has
            such a head.
    """

    logits: Tensor
    auxiliary: Tensor | None


def feature_blocks(depth: int) -> tuple[int, int, int, int]:
    """The blocks whose output a decoder reads, counted from 0.

    They are those after a third, a half, two thirds and all of the depth, rounded up: 3, 5, 7, 11 of 12 and
    7, 11, 15, 23 of 24, as in BEiT's and MAE's evaluations.
    """
    return (-(-depth // 3) - 1, -(-depth // 2) - 1, -(-2 * depth // 3) - 1, depth - 1)


def resize_logits(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolate [B, C, h, w] to [B, C, *size] bilinearly, pixels being squares (align_corners=False)."""
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


class SegmentationModel(nn.Module):
    """A ViT encoder with a decoder: images [B, 3, H, W] of any size to the logits of every pixel.

    Images are padded with zeros, which is the mean color after the usual normalisation, at the right and the
    lower edge: to multiples of the patch, and of 32 for the decoders that need maps of that stride. The
    logits of the padding are cut off. Added positions are resampled bicubically wherever the grid is another
    than that of `img_size`, RoPE's are scaled as the encoder has it.

    "upernet" and "dpt" have an auxiliary head on the third of the four maps, for training alone: a
    convolution of 3 x 3 to 256 channels, BatchNorm, ReLU, dropout, a convolution of 1 x 1. They read the
    blocks' outputs without the encoder's last norm; "linear" reads them with it. Class tokens are left out.

    All norms of the decoders are BatchNorms, which `nn.SyncBatchNorm.convert_sync_batchnorm` replaces, but
    for the LayerNorm that segmentation-models-pytorch puts before UPerNet. A BatchNorm of UPerNet sees one
    value per image and channel: training takes at least two images, and raises ValueError otherwise.

    Args:
        encoder: Of `create_vit` or `load_encoder` with dynamic_img_size=True. It is changed in place: the
            head and blocks and norms that nothing reads are removed.
        num_classes: C.
        head: "upernet", "dpt" or "linear".
        img_size: Height and width in pixels of the images that the model is trained with, or one number:
            added positions are resampled to it once, and trained so. None for the encoder's own.
        blocks: The blocks that are read, counted from 0, in ascending order: four, or one for "linear". None
            for `feature_blocks`, and the last for "linear".
        width: Channels of the decoder; None for the encoder's width with "upernet", as in MAE's evaluation,
            and 256 with "dpt". "linear" has none.
        dropout: Rate at which whole channels are dropped before the last convolutions of "upernet" and "dpt"
            and of their auxiliary head.

    Attributes:
        multiple: Height and width in pixels to whose multiples images are padded. `torch.export` with dynamic
            sides takes multiples alone, and for "upernet" and "dpt" none below twice that.

    Raises:
        ValueError: Choices that do not go with each other or with the encoder; numbers out of range.
    """

    pyramid: FeaturePyramid | None
    decoder: UPerNetDecoder | DPTDecoder | None
    auxiliary: nn.Sequential | None

    def __init__(
        self,
        encoder: Vit,
        num_classes: int,
        head: Head = "upernet",
        *,
        img_size: int | tuple[int, int] | None = None,
        blocks: Sequence[int] | None = None,
        width: int | None = None,
        dropout: float = 0.1,
    ):
        super().__init__()
        linear = head == "linear"
        depth, dim, patch_size = len(encoder.blocks), encoder.embed_dim, encoder.patch_embed.patch_size
        if blocks is None:
            blocks = (depth - 1,) if linear else feature_blocks(depth)
        if head not in HEADS:
            raise ValueError(f"head: expected one of {', '.join(HEADS)}, got {head!r}")
        if num_classes < 2:
            raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
        if not encoder.dynamic_img_size:
            raise ValueError("encoder: expected one for images of any size, built with dynamic_img_size=True")
        count = 1 if linear else 4
        if len(blocks) != count or list(blocks) != sorted(blocks) or not 0 <= blocks[0] <= blocks[-1] < depth:
            raise ValueError(
                f"blocks: expected {count} of 0 to {depth - 1} in ascending order for {head!r}, got {blocks}"
            )
        if width is not None and (linear or width < 1):
            raise ValueError(
                f"width: expected {'null' if linear else 'at least 1'} for {head!r}, got {width}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a number from 0 to below 1, got {dropout}")
        if not linear:
            side = _check_pyramid(patch_size)
        if img_size is not None:
            check_sizes(pair("img_size", img_size), patch_size)
            encoder.set_input_size(pair("img_size", img_size))
        norm = encoder.fc_norm if isinstance(encoder.norm, nn.Identity) else encoder.norm
        encoder.prune_intermediate_layers(list(blocks), prune_norm=True)
        if linear:
            encoder.norm = norm
        if width is None:
            width = {"upernet": dim, "dpt": 256, "linear": dim}[head]

        self.encoder = encoder
        self.num_classes = num_classes
        self.head = head
        self.blocks = tuple(blocks)
        self.width = width
        # Maps of the coarsest stride have to be whole.
        self.multiple = patch_size if linear else (max(side, STRIDES[-1]),) * 2
        self.pyramid = self.decoder = self.auxiliary = None
        if head == "upernet":
            self.pyramid = FeaturePyramid(dim, patch_size)
            # It looks neither at images nor at maps of stride 2, which would come first.
            self.decoder = UPerNetDecoder([encoder.in_chans, 0, *[dim] * 4], decoder_channels=width)
        elif head == "dpt":
            self.decoder = DPTDecoder(
                encoder_out_channels=[dim] * 4,
                encoder_output_strides=[side] * 4,
                encoder_has_prefix_tokens=False,
                readout="ignore",
                # In the proportions of the paper's ViT-L.
                intermediate_channels=[dim // 4, dim // 2, dim, dim],
                fusion_channels=width,
            )
            self.refine = Conv2dReLU(width, width, 3, padding=1)
        self.dropout = nn.Dropout2d(0.0 if linear else dropout)
        if not linear:
            self.auxiliary = nn.Sequential(
                Conv2dReLU(dim, AUXILIARY_WIDTH, 3, padding=1),
                nn.Dropout2d(dropout),
                nn.Identity(),
            )
        for name, child in self.named_children():
            if name not in ("encoder", "pyramid"):
                initialize_decoder(child)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Start the last layer anew, and that of the auxiliary head, for other classes; as timm's models."""

        def last(width: int) -> nn.Conv2d:
            conv = nn.Conv2d(width, num_classes, 1)
            nn.init.normal_(conv.weight, std=0.01)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
            return conv

        self.num_classes = num_classes
        self.classifier = last(self.width)
        if self.auxiliary is not None:
            self.auxiliary[-1] = last(AUXILIARY_WIDTH)

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Layers by name, for timm's `param_groups_layer_decay`: what is not named comes after all blocks.

        Args:
            coarse: Of timm's interface; without effect.
        """
        return {
            "stem": r"^encoder\.(?:cls_token|reg_token|pos_embed|patch_embed)",
            "blocks": [(r"^encoder\.blocks\.(\d+)", None)],
        }

    def no_weight_decay(self) -> set[str]:
        """Names of tokens and positions, as timm's models tell them."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def features(self, images: Tensor) -> list[Tensor]:
        """The maps [B, D, h, w] that the decoder reads, for images whose sides are multiples of the patch."""
        # One block may be read several times, but timm gives its output once.
        read = sorted(set(self.blocks))
        found = self.encoder.forward_intermediates(
            images, indices=read, norm=self.head == "linear", intermediates_only=True
        )
        maps = cast(list[Tensor], found)
        return [maps[read.index(block)] for block in self.blocks]

    def forward(self, images: Tensor) -> Segmentation:
        """Logits [B, C, H, W] of images [B, 3, H, W], and in training those of the auxiliary head.

        Raises:
            ValueError: The images are of another shape, or a single one is to be trained with UPerNet.
        """
        if images.dim() != 4 or images.shape[1] != self.encoder.in_chans or 0 in images.shape[2:]:
            raise ValueError(
                f"expected images of shape [B, {self.encoder.in_chans}, H, W], got {list(images.shape)}"
            )
        height, width = images.shape[2:]
        rows, columns = self.multiple
        padded = ((height + rows - 1) // rows * rows, (width + columns - 1) // columns * columns)
        maps = self.features(F.pad(images, (0, padded[1] - width, 0, padded[0] - height)))
        if self.pyramid is not None:
            maps = self.pyramid(maps)
        if self.decoder is None:
            decoded = maps[-1]
        elif self.head == "upernet":
            decoded = self.decoder([None, None, *maps])
        else:
            decoded = self.refine(self.decoder(maps, [None] * 4))
        logits = self.classifier(self.dropout(decoded))
        auxiliary = self.auxiliary(maps[2]) if self.training and self.auxiliary is not None else None

        def at_images(x: Tensor) -> Tensor:
            return resize_logits(x, padded)[..., :height, :width]

        return Segmentation(at_images(logits), None if auxiliary is None else at_images(auxiliary))


def segmentation_loss(outputs: Segmentation, target: Tensor, ignore_index: int = 255) -> Tensor:
    """Cross-entropy, plus 0.4 times that of the auxiliary head if there is one.

    It is the mean over all pixels, those that are ignored counting 0, which is mmsegmentation's default: so
    it is defined if all are ignored, and the loss of a batch is the mean of those of its equal parts.

    Args:
        outputs: Of a `SegmentationModel`.
        target: Number of the class of every pixel [B, H, W], of any integer type.
        ignore_index: In place of a class, for pixels without.

    Raises:
        ValueError: The target is of another shape than the images.
    """
    expected = [outputs.logits.shape[0], *outputs.logits.shape[2:]]
    if list(target.shape) != expected:
        raise ValueError(f"target: expected the shape {expected}, got {list(target.shape)}")

    def cross_entropy(logits: Tensor) -> Tensor:
        return F.cross_entropy(
            logits.float(), target.long(), ignore_index=ignore_index, reduction="none"
        ).mean()

    loss = cross_entropy(outputs.logits)
    return loss if outputs.auxiliary is None else loss + AUXILIARY_WEIGHT * cross_entropy(outputs.auxiliary)


def _starts(size: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one side, the last being moved back into the image."""
    count = max(size - window + stride - 1, 0) // stride + 1
    return [min(i * stride, size - window) for i in range(count)]


@torch.no_grad()
def sliding_logits(
    model: Callable[[Tensor], Segmentation],
    images: Tensor,
    window: int | tuple[int, int],
    stride: int | tuple[int, int],
    batch: int = 1,
) -> Tensor:
    """Logits [B, C, H, W] in float32, each the mean over the windows that see the pixel, as mmsegmentation's.

    Args:
        model: A `SegmentationModel` in evaluation mode.
        images: [B, 3, H, W].
        window: Height and width of a window in pixels, or one number; at most the image's are taken.
        stride: Pixels from one window to the next, down and to the right, or one number.
        batch: Windows of each image in one call of the model.

    Raises:
        ValueError: A window, stride or batch below 1, or a stride above the window, which would leave gaps.
    """
    window, stride = pair("window", window), pair("stride", stride)
    if stride[0] > window[0] or stride[1] > window[1]:
        raise ValueError(f"stride: expected at most the window's {window}, got {stride}")
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    size = images.shape[2:]
    height, width = (min(sides) for sides in zip(window, size, strict=True))
    corners = list(product(_starts(size[0], height, stride[0]), _starts(size[1], width, stride[1])))
    total, seen = None, images.new_zeros(size, dtype=torch.float32)
    for first in range(0, len(corners), batch):
        chunk = corners[first : first + batch]
        crops = torch.cat([images[:, :, y : y + height, x : x + width] for y, x in chunk])
        logits = model(crops).logits
        if total is None:
            total = logits.new_zeros((len(images), logits.shape[1], *size), dtype=torch.float32)
        for (y, x), part in zip(chunk, logits.split(len(images)), strict=True):
            total[:, :, y : y + height, x : x + width] += part
            seen[y : y + height, x : x + width] += 1
    assert total is not None
    return total / seen


@torch.no_grad()
def multiscale_logits(
    model: Callable[[Tensor], Segmentation],
    versions: Sequence[Tensor],
    size: Sequence[int],
    window: int | tuple[int, int],
    stride: int | tuple[int, int],
    flip: bool = False,
    batch: int = 1,
) -> Tensor:
    """Logits [B, C, *size] of images in several sizes, by `sliding_logits`.

    Of several versions, they are the logarithm of the mean probability, which mmsegmentation's tests take.

    Args:
        model: A `SegmentationModel` in evaluation mode.
        versions: The images in one or more sizes, [B, 3, h, w] each.
        size: Height and width to which logits are resized, in pixels.
        window: As in `sliding_logits`, like stride and batch.
        stride: See window.
        flip: Whether mirrored images count as versions, too.
        batch: See window.

    Raises:
        ValueError: As `sliding_logits`.
    """

    def logits(images: Tensor) -> Tensor:
        return resize_logits(sliding_logits(model, images, window, stride, batch), size)

    if len(versions) == 1 and not flip:
        return logits(versions[0])
    total = None
    for images in versions:
        for mirrored in (False, True) if flip else (False,):
            found = logits(images.flip(-1)).flip(-1) if mirrored else logits(images)
            found = found.softmax(1)
            total = found if total is None else total.add_(found)
    assert total is not None
    count = len(versions) * (1 + flip)
    return total.div_(count).clamp_(min=torch.finfo(total.dtype).tiny).log_()


class LoadedSegmenter(NamedTuple):
    """A segmentation model with its weights.

    Attributes:
        model: At the image size that it was trained with.
        architecture: How the encoder was pre-trained.
        classes: Their names.
        short_side: Pixels to which the shorter side of an image is brought; None for images as they are.
    """

    model: SegmentationModel
    architecture: Architecture
    classes: tuple[str, ...]
    short_side: int | None


def segmenter_metadata(
    model: SegmentationModel,
    architecture: Architecture,
    classes: Sequence[str],
    short_side: int | None = None,
) -> dict[str, str]:
    """What `load_segmenter` needs to build a model again, for a safetensors file.

    Args:
        model: The model.
        architecture: How its encoder was pre-trained.
        classes: Names of the classes.
        short_side: Pixels to which the shorter side of an image is brought; None for images as they are.

    Raises:
        ValueError: There are not as many names as classes.
    """
    if len(classes) != model.num_classes:
        raise ValueError(f"classes: expected {model.num_classes} names, got {len(classes)}")
    return architecture.metadata() | {
        "format": "pt",
        "head": model.head,
        "blocks": str(model.blocks),
        "width": str(None if model.head == "linear" else model.width),
        "fine_tuned_at": str(tuple(model.encoder.patch_embed.img_size)),
        "short_side": str(short_side),
        "classes": json.dumps(list(classes)),
    }


def segmenter_state_dict(model: SegmentationModel) -> dict[str, Tensor]:
    """Contiguous copies of a model's tensors, the auxiliary head's among them, so that training can go on."""
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }


def is_segmenter(path: str | os.PathLike[str]) -> bool:
    """Whether a file has `segmenter_metadata`; False where there is no file, or it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return "blocks" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def load_segmenter(path: str | os.PathLike[str], drop_path: float = 0.0) -> LoadedSegmenter:
    """Load a model with `segmenter_metadata` from a file.

    Args:
        path: segmenter.safetensors.
        drop_path: As in `create_vit`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds something else, or not the weights of this model.
    """
    path = Path(path)
    if not path.is_file():
        hint = ": a folder, expected a file such as its segmenter.safetensors" if path.is_dir() else ""
        raise FileNotFoundError(f"no such segmentation model: {path}{hint}")
    about, weights = read_safetensors(path)
    needed = ("head", "blocks", "width", "fine_tuned_at", "short_side", "classes")
    missing = [name for name in needed if name not in about]
    if missing:
        raise ValueError(
            f"{path}: expected a segmenter.safetensors, whose metadata has {', '.join(needed)}; "
            f"{', '.join(missing)} missing"
        )
    try:
        classes = tuple(json.loads(about["classes"]))
        blocks, width, img_size, short_side = (literal_eval(about[name]) for name in needed[1:-1])
        architecture = Architecture.from_metadata(about)
        model = SegmentationModel(
            create_vit(architecture, drop_path, dynamic_img_size=True),
            len(classes),
            cast(Head, about["head"]),
            img_size=img_size,
            blocks=blocks,
            width=width,
        )
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    told = weights.get("classifier.weight")
    if told is not None and len(told) != len(classes):
        raise ValueError(f"{path}: expected weights for the {len(classes)} classes named, got {len(told)}")
    fill(model, weights, path)
    return LoadedSegmenter(model, architecture, classes, short_side)
