"""DARL: predict each patch from those before it."""

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from models import darl, diffusion, dvae
from models.classifier import Architecture
from models.generate import generate
from models.vit import pair, patchify, unpatchify
from train.data.augment import denormalize
from train.data.pretraining import PretrainingBatch, Sample, collate
from train.engine.task import Collate
from train.tasks.pretraining import COUNT, PretrainingTask, Rows

GAMMAS = (0.0, 0.1, 0.3, 0.6, 0.9)  # noise levels that a picture of denoising shows
SAMPLING_STEPS = 50  # of the samples at the end of a run


def given_part(model: darl.DARL, images: Tensor, given: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1], grey but for the patches with the raster numbers `given`."""
    pixels = denormalize(images)
    patches = patchify(pixels, model.patch_embed.patch_size)
    shown = torch.full_like(patches, 0.5)
    shown[:, given] = patches[:, given]
    return unpatchify(shown, model.patch_embed.grid_size, model.patch_embed.patch_size)


def neighbours_mean(patches: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Predict each patch without a model: the mean of the patch to the left and the one above.

    Patches at an edge have the one that there is; the first one is 0, the mean of standardised pixels.

    Args:
        patches: [B, L, P] in raster order.
        grid_size: Rows and columns of patches, whose product is L.

    Returns:
        The predictions [B, L, P].
    """
    grid = patches.unflatten(1, grid_size)
    left, above = torch.zeros_like(grid), torch.zeros_like(grid)
    left[:, :, 1:], above[:, 1:] = grid[:, :, :-1], grid[:, :-1]
    mean = (left + above) / 2
    mean[:, 0], mean[:, :, 0] = left[:, 0], above[:, :, 0]
    return mean.flatten(1, 2)


class DrawingCollate:
    """Makes a batch of samples, with the random numbers of diffusion that each one's seed decides.

    Drawn here, in the loader's processes, for a generator by image would be dozens of small launches on a
    GPU; and they are the same on all devices.

    Args:
        img_size: Height and width of the images.
        gamma: Parameters of the Beta distribution of noise levels.
    """

    def __init__(self, img_size: tuple[int, int], gamma: tuple[float, float]) -> None:
        self.img_size, self.gamma = img_size, gamma

    def __call__(self, samples: list[Sample]) -> PretrainingBatch:
        """Stack B samples; "drawn" are noise levels [B, L] and noise [B, L, P]."""
        batch = collate(samples)
        length = len(samples[0].noise)
        shape = (length, 3 * self.img_size[0] * self.img_size[1] // length)
        generators = [torch.Generator().manual_seed(sample.seed) for sample in samples]
        drawn = [diffusion.draw(shape, *self.gamma, generator=g) for g in generators]
        gamma, noise = map(torch.stack, zip(*drawn, strict=True))
        return {**batch, "drawn": (gamma, noise)}


class AutoregressiveTask(PretrainingTask[darl.DARL, Tensor]):
    """DARL: predict each patch from those before it."""

    name = "darl"
    model_args = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")

    @cached_property
    def tokenizer(self) -> dvae.DiscreteVae | None:
        """What makes codes of images, if any are needed."""
        path = self.config.darl.tokenizer
        return None if path is None else dvae.load_tokenizer(path)

    def check(self) -> None:
        """Raise ValueError for settings that do not go together."""
        super().check()
        options = self.config.darl
        if options.reads_tokens != (options.tokenizer is not None):
            expected = "the file of one" if options.reads_tokens else "null where nothing is tokens"
            raise ValueError(f"darl.tokenizer: expected {expected}, got {options.tokenizer}")

    def build(self) -> darl.DARL:
        """The stock model, from torch's random numbers."""
        config = self.config
        model = darl.create_darl(
            config.model,
            config=config.darl,
            img_size=config.img_size,
            order_seed=config.seed,
            vocabulary=None if self.tokenizer is None else self.tokenizer.vocabulary,
            **config.model_args,
        )
        if self.tokenizer is not None and self.tokenizer.patch_size != model.patch_embed.patch_size:
            raise ValueError(
                f"darl.tokenizer: expected codes of patches of {model.patch_embed.patch_size} pixels, got "
                f"{self.tokenizer.patch_size}"
            )
        return model

    def blocks(self, model: darl.DARL) -> list[nn.Module]:
        """What FSDP shards one by one."""
        return [*model.blocks, *model.decoder.blocks]

    def architecture(self) -> Architecture:
        """What the weights of the encoder do not tell, for whoever builds it again."""
        options = self.config.darl
        return replace(
            super().architecture(),
            positions=options.positions,
            rope_temperature=options.rope_temperature,
            order=options.order,
            order_block=options.order_block,
            order_seed=self.config.seed,
            inputs=options.inputs,
        )

    def tokens(self, num_patches: int) -> int:
        """Tokens of an image in the encoder."""
        return num_patches * (2 if self.config.darl.two_stream else 1)

    def codes(self, images: Tensor) -> Tensor | None:
        """The tokenizer's codes of images [B, L]; None where nothing is tokens."""
        return None if self.tokenizer is None else self.tokenizer.to(images.device).codes(images)

    @property
    def collate(self) -> Collate[PretrainingBatch]:
        """Makes a batch of samples, for diffusion with their noise."""
        options = self.config.darl
        if options.objective != "diffusion":
            return super().collate
        return DrawingCollate(pair("img_size", self.config.img_size), options.gamma)

    def forward(self, model: nn.Module, images: Tensor, batch: PretrainingBatch) -> tuple[Tensor, Tensor]:
        """The loss of a batch and what its picture is made of."""
        # A batch that lacks it is a mistake: the model would draw, but other noise in every process.
        drawn = batch["drawn"] if self.config.darl.objective == "diffusion" else None
        return model(images, batch["noise"], drawn, self.codes(images))

    @property
    def predicts_patches(self) -> bool:
        """Whether the loss is the mean squared error of patches, which needs no model to compare with."""
        options = self.config.darl
        return options.objective == "mse" or (options.objective, options.prediction) == ("diffusion", "x0")

    def tally(self, model: darl.DARL, images: Tensor, made: Tensor) -> Tensor:
        """The sum of the losses that `neighbours_mean` has, where they compare with the model's."""
        if not self.predicts_patches:
            return super().tally(model, images, made)
        target = model.targets(images)
        error = (neighbours_mean(target, model.patch_embed.grid_size) - target).square().mean()
        return (error * len(images)).double().reshape(1)

    def measures(self, tally: Tensor, size: int) -> dict[str, float]:
        """The loss of `neighbours_mean`, where it compares with the model's."""
        return {"neighbours_loss": tally[0].item() / size} if self.predicts_patches else {}

    def rows_of(
        self, model: darl.DARL, images: Tensor, batch: PretrainingBatch, made: Tensor
    ) -> dict[str, Rows]:
        """Pictures of what `forward` gave."""
        images, made = images[:COUNT], made[:COUNT]
        grid_size = model.patch_embed.grid_size
        if model.config.objective == "tokens":
            tokenizer, codes = self.tokenizer, self.codes(images)
            assert tokenizer is not None  # as `check` asks for
            assert codes is not None
            rows = {
                "original": denormalize(images),
                "its codes": denormalize(tokenizer.decode(codes, grid_size)),
                "predicted codes": denormalize(tokenizer.decode(made.argmax(-1), grid_size)),
            }
            return {"predictions": rows}
        if model.config.objective == "mse":
            rows = {
                "original": denormalize(images),
                "predicted from the patches before": denormalize(model.images_of(images, made)),
            }
            return {"predictions": rows}
        return {"denoising": self._denoising(model, images, batch)}

    def _denoising(self, model: darl.DARL, images: Tensor, batch: PretrainingBatch) -> Rows:
        """The same images corrupted to several levels, and what the model takes each patch for."""
        noise, eps = batch["noise"][:COUNT], batch["drawn"][1][:COUNT]
        order = model.order_of(model.patch_embed.grid_size, noise, images)
        context = model.in_raster_order(model.contexts(images, order, self.codes(images)), order)
        target = model.targets(images)
        rows = {"original": denormalize(images)}
        for gamma in GAMMAS:
            # Noise cannot be subtracted where there is nothing else.
            least = 1e-3 if model.config.prediction == "epsilon" else 0.0
            level = torch.full(target.shape[:2], max(gamma, least), device=images.device)
            noisy = diffusion.corrupt(target, level, eps)
            clean = model.denoise(context, noisy, level)
            if gamma:
                rows[f"gamma {gamma}"] = denormalize(model.images_of(images, noisy))
            rows[f"from gamma {gamma}"] = denormalize(model.images_of(images, clean))
        return rows

    def final_rows(self, model: darl.DARL, images: Tensor) -> dict[str, Rows]:
        """Pictures that are made once, at the end of a run: images continued from their first half."""
        options = self.config.darl
        if options.norm_pix_loss or (options.inputs == "tokens") != (options.objective == "tokens"):
            return {}  # such a model cannot draw
        images = images[:COUNT]
        length = model.patch_embed.num_patches
        known = length // 2
        order = torch.arange(length, device=images.device) if model.config.order == "random" else model.places
        codes = self.codes(images)
        made = generate(model, images, known, SAMPLING_STEPS, self.config.seed, order=order, codes=codes)
        if self.tokenizer is not None:
            made = self.tokenizer.decode(made, model.patch_embed.grid_size)
        rows = {
            "original": denormalize(images),
            "given": given_part(model, images, order[:known]),
            "continued": denormalize(made),
        }
        return {"samples": rows}
