"""What tests of runs share: a tiny run, its encoder, its losses, and the environment of processes."""

import os
from pathlib import Path

import torch

from models.classifier import Architecture
from train.engine.processes import Processes
from train.engine.run_folder import RunFolder

CONFIGS = Path(__file__).parents[2] / "train" / "configs"

TINY = [
    "--model=mae_vit_tiny",
    "--model_args={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2, decoder_embed_dim: 16,"
    " decoder_depth: 1, decoder_num_heads: 2}",
    "--img_size=32",
    "--batch_size=8",
    "--steps=24",
    "--optim.warmup_steps=2",
    "--optim.blr=0.03",
    "--eval_every=8",
    "--checkpoint_every=4",
    "--device=cpu",
]
SIZES = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
ARCHITECTURE = Architecture("mae_vit_tiny", 32, SIZES)
ALONE = Processes(0, 1, torch.device("cpu"))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def losses(folder: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in RunFolder(folder).records() if r["kind"] == "step"}
