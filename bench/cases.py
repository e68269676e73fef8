"""What is timed: models that train, with inputs, at any size."""

import argparse
import importlib.util
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from bench.options import count, device, file
from dbpkern.sites import PRESETS
from models.darl import DARL, DarlConfig
from models.mae import MaskedAutoencoder

PATCH = 16
SEGMENTED = 150  # classes of ADE20K


class Classifier(VisionTransformer):
    """A ViT with its loss."""

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and logits."""
        logits = super().forward(images)
        return F.cross_entropy(logits, labels), logits


class Autoencoder(MaskedAutoencoder):
    """MAE as published: the encoder sees a quarter of the patches, 50 tokens."""

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and prediction."""
        return super().forward(images, 0.75, noise)[:2]


class DenseAutoencoder(MaskedAutoencoder):
    """MAE whose encoder keeps every patch, 197 tokens, as in code that masks tokens instead of dropping them.

    The encoder reads the patches themselves in place of mask tokens, which cost the same; the loss is taken
    over the masked three quarters as ever.
    """

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and prediction."""
        latent, _, ids_restore = self.forward_encoder(images, 0.0, noise)
        pred = self.forward_decoder(latent, ids_restore)
        mask = (ids_restore >= noise.shape[1] // 4).float()
        return self.forward_loss(images, pred, mask), pred


class Autoregression(DARL):
    """DARL on mean squared error, or on diffusion with the noise that it is given."""

    def forward(self, images: Tensor, *drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and prediction."""
        return super().forward(images, drawn=drawn or None)


class Segmenter(nn.Module):
    """A ViT encoder with a segmentation head, and its loss."""

    def __init__(self, head: str, **sizes: int):
        super().__init__()
        # It needs segmentation-models-pytorch, which the other cases do without.
        from models.segmentation import SegmentationModel, segmentation_loss

        encoder = VisionTransformer(**sizes, num_classes=0, dynamic_img_size=True)
        # Without dropout: all sides of a comparison compute the same.
        self.segmentation = SegmentationModel(encoder, SEGMENTED, head, dropout=0.0)
        self.loss = segmentation_loss

    def forward(self, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and logits."""
        outputs = self.segmentation(images)
        return self.loss(outputs, masks), outputs.logits


CASES = {
    "vit": "ViT classifier, images of 112 pixels (50 tokens)",
    "mae50": "MAE, 224 pixels, encoder on the visible quarter (50 tokens), decoder on 197",
    "mae197": "MAE, 224 pixels, encoder and decoder on 197 tokens",
    "darl": "DARL, mean squared error, images of 112 pixels (49 tokens)",
    "darl-diffusion": "DARL, diffusion with a decoder of one block, images of 112 pixels (49 tokens)",
    "segment": "segmentation with UPerNet as wide as the encoder, images of 128 pixels (65 tokens)",
    "segment-linear": "segmentation with a linear head, images of 128 pixels (65 tokens)",
}


def default_cases() -> list[str]:
    """All cases whose packages are installed."""
    found = importlib.util.find_spec("segmentation_models_pytorch") is not None
    return [name for name in CASES if found or not name.startswith("segment")]


@dataclass(frozen=True)
class Case:
    """A model by name and size."""

    name: str
    width: int
    depth: int
    batch: int
    decoder_depth: int

    @property
    def image(self) -> int:
        """Height and width of the images."""
        if self.segments:
            return 128
        return 224 if self.masked else 112

    @property
    def segments(self) -> bool:
        """Whether it is a segmentation model."""
        return self.name[:7] == "segment"

    @property
    def masked(self) -> bool:
        """Whether it is a masked autoencoder."""
        return self.name[:3] == "mae"

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image // PATCH) ** 2

    @property
    def tokens(self) -> int:
        """Tokens of an image in the encoder, the class or start token included."""
        if self.name[:4] == "darl":
            return self.patches  # the last patch is not read
        return 1 + (self.patches // 4 if self.name == "mae50" else self.patches)

    def build(self) -> nn.Module:
        """The model, the same weights each time; called with `inputs` it returns the loss and an output."""
        torch.manual_seed(0)
        sizes = {
            "img_size": self.image,
            "patch_size": PATCH,
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": max(1, self.width // 64),
        }
        if self.name == "vit":
            return Classifier(**sizes)
        if self.segments:
            return Segmenter("upernet" if self.name == "segment" else "linear", **sizes)
        if not self.masked:
            objective = "diffusion" if self.name == "darl-diffusion" else "mse"
            return Autoregression(DarlConfig(objective=objective), **sizes)
        decoder_width = min(512, self.width)  # narrower than MAE's 512 for small models alone
        decoder = {
            "decoder_embed_dim": decoder_width,
            "decoder_depth": self.decoder_depth,
            "decoder_num_heads": max(1, decoder_width // 32),
        }
        return (Autoencoder if self.name == "mae50" else DenseAutoencoder)(**sizes, **decoder)

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """One batch of noise: images; labels, of images or pixels; the noise of masks or of diffusion."""
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(self.batch, 3, self.image, self.image, generator=generator, dtype=dtype)
        if self.name == "vit":
            others = (torch.randint(1000, (self.batch,), generator=generator),)
        elif self.segments:
            others = (torch.randint(SEGMENTED, (self.batch, self.image, self.image), generator=generator),)
        elif self.masked:
            others = (torch.rand(self.batch, self.patches, generator=generator),)
        elif self.name == "darl":
            others = ()
        else:
            gamma = torch.rand(self.batch, self.patches, generator=generator, dtype=dtype)
            eps = torch.randn(self.batch, self.patches, 3 * PATCH**2, generator=generator, dtype=dtype)
            others = (gamma, eps)
        return tuple(tensor.to(device) for tensor in (images, *others))

    def small(self) -> "Case":
        """The same model small enough for a check in fp64.

        With 16 images a layer of width 64 has more samples than features and fc2 has fewer: the R update
        takes either of its two ways.
        """
        return replace(
            self,
            width=min(self.width, 64),
            depth=min(self.depth, 2),
            batch=min(self.batch, 16),
            decoder_depth=min(self.decoder_depth, 1),
        )

    def sizes(self) -> dict[str, object]:
        """All sizes, for a JSON file."""
        return asdict(self) | {"image": self.image, "patch": PATCH, "tokens": self.tokens}

    def describe(self) -> str:
        """The sizes in words."""
        decoder = f", decoder {self.decoder_depth} deep" if self.masked else ""
        return (
            f"{self.name}: {self.width} wide, {self.depth} deep{decoder}, {self.tokens} tokens, "
            f"batch {self.batch}"
        )


def in_encoder(name: str, module: nn.Module) -> bool:
    """Decoders stay as they are: decorrelating them is unstable (arXiv 2510.14657)."""
    return not name.startswith("decoder")


def _width(text: str) -> int:
    value = count(text)
    if value % (4 if value < 64 else 64):
        raise argparse.ArgumentTypeError(
            f"expected a multiple of 64, the width of a head (or of 4 below that, for one head), got {text}"
        )
    return value


def add_arguments(parser: argparse.ArgumentParser, tokens: dict[str, int]) -> None:
    """The options that choose models, their sizes and where they run.

    Args:
        parser: gets the options.
        tokens: tokens in the encoder that the default batch makes, by kind of device.
    """
    parser.add_argument(
        "--case",
        nargs="+",
        choices=CASES,
        default=default_cases(),
        help="; ".join(f"{name}: {text}" for name, text in CASES.items())
        + " (default: each of them in turn, segmentation where segmentation-models-pytorch is installed)",
    )
    parser.add_argument(
        "--sites",
        nargs="+",
        choices=PRESETS,
        default=list(PRESETS),
        help="where the encoder is decorrelated (default: each of them in turn)",
    )
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast (default: fp32)"
    )
    parser.add_argument("--width", type=_width, help="of the encoder (default: 384, on a GPU 768)")
    parser.add_argument("--depth", type=count, help="blocks of the encoder (default: 6, on a GPU 12)")
    parser.add_argument("--decoder-depth", type=count, default=2, help="blocks of MAE's decoder (default: 2)")
    parser.add_argument(
        "--batch",
        type=count,
        help=f"images (default: as many as make {tokens['cpu']} tokens, on a GPU {tokens['cuda']}; of "
        "segment an eighth)",
    )
    parser.set_defaults(tokens=tokens)
    parser.add_argument("--threads", type=count, help="CPU threads (default: as PyTorch chooses)")
    parser.add_argument("--json", type=file, metavar="FILE", help="write everything measured to this file")


def from_arguments(args: argparse.Namespace) -> list[Case]:
    """The cases asked for.

    Raises:
        ValueError: one cannot be built: a package is missing, or the batch is too small.
    """
    if unknown := set(args.case) - set(default_cases()):
        raise ValueError(f"--case {min(unknown)} needs segmentation-models-pytorch, which is not installed")
    if args.batch == 1 and "segment" in args.case:
        raise ValueError("--batch: segment needs at least 2 images, as UPerNet has BatchNorms; got 1")
    gpu = args.device.type == "cuda"
    cases = []
    for name in args.case:
        case = Case(
            name,
            width=args.width or (768 if gpu else 384),
            depth=args.depth or (12 if gpu else 6),
            batch=args.batch or 1,
            decoder_depth=args.decoder_depth,
        )
        tokens = args.tokens[args.device.type]
        if name == "segment":  # whose decoder is many times the encoder
            tokens //= 8
        cases.append(case if args.batch else replace(case, batch=max(1, tokens // case.tokens)))
    return cases
