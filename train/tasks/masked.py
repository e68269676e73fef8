"""MAE: fill in the patches that are hidden."""

import torch
from torch import Tensor, nn

from models import mae
from train.data.augment import denormalize
from train.data.pretraining import PretrainingBatch
from train.tasks.pretraining import COUNT, PretrainingTask, Rows


class MaskedTask(PretrainingTask[mae.MaskedAutoencoder, tuple[Tensor, Tensor]]):
    """MAE: fill in the patches that are hidden."""

    name = "mae"
    model_args = (
        "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio",
        "decoder_embed_dim", "decoder_depth", "decoder_num_heads",
    )  # fmt: skip

    def check(self) -> None:
        """Raise ValueError for settings out of range."""
        super().check()
        if not 0 < self.config.mae.mask_ratio < 1:
            raise ValueError(f"mae.mask_ratio: expected a number in (0, 1), got {self.config.mae.mask_ratio}")

    def build(self) -> mae.MaskedAutoencoder:
        """The stock model, from torch's random numbers."""
        config = self.config
        return mae.create_mae(
            config.model,
            config.mae.decoder,
            img_size=config.img_size,
            norm_pix_loss=config.mae.norm_pix_loss,
            **config.model_args,
        )

    def blocks(self, model: mae.MaskedAutoencoder) -> list[nn.Module]:
        """What FSDP shards one by one."""
        return [*model.blocks, *model.decoder_blocks]

    def tokens(self, num_patches: int) -> int:
        """Tokens of an image in the encoder."""
        return 1 + mae.num_kept(num_patches, self.config.mae.mask_ratio)

    def forward(
        self, model: nn.Module, images: Tensor, batch: PretrainingBatch
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss of a batch and what its picture is made of."""
        loss, pred, mask = model(images, self.config.mae.mask_ratio, batch["noise"])
        return loss, (pred, mask)

    def rows_of(
        self,
        model: mae.MaskedAutoencoder,
        images: Tensor,
        batch: PretrainingBatch,
        made: tuple[Tensor, Tensor],
    ) -> dict[str, Rows]:
        """Pictures of what `forward` gave."""
        images, pred, mask = images[:COUNT], made[0][:COUNT], made[1][:COUNT]
        hidden = model.unpatchify(mask[..., None].expand_as(pred))
        rows = {
            "original": denormalize(images),
            "masked": torch.where(hidden > 0, 0.5, denormalize(images)),
            "reconstruction": denormalize(model.reconstruct(images, pred, mask)),
        }
        return {"reconstructions": rows}
