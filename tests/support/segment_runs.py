"""What tests of segmentation share: a tiny run, images with masks, figures by definition."""

from pathlib import Path

import numpy as np
from PIL import Image
from runs import CONFIGS

from train.data.masks import IGNORE

SCRATCH = ["--model=mae_vit_tiny", "--model_args={patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2}"]
TINY = [
    f"--config={CONFIGS / 'segment_scenes.yaml'}",
    "--img_size=32",
    "--width=8",
    "--batch_size=4",
    "--steps=6",
    "--optim.warmup_steps=2",
    "--drop_path=0.1",
    "--eval_every=6",
    "--checkpoint_every=3",
    "--device=cpu",
]


def save(path: Path, values) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)
    return path


def make_pair(root: Path, part: str, name: str, size: tuple[int, int], labels: int, kind: str) -> None:
    """An image whose grey tells its labels, and the mask; with values of ADE20K or of folders."""
    height, width = size
    values = (np.arange(height)[:, None] // 8 + np.arange(width) // 8 + len(name)) % labels
    save(root / {"ade20k": f"images/{part}/{name}.jpg", "folder": f"{part}/images/{name}.png"}[kind],
         np.stack([values * 60 + 20] * 3, 2))  # fmt: skip
    if kind == "folder":
        values[0] = IGNORE
    save(
        root / {"ade20k": f"annotations/{part}/{name}.png", "folder": f"{part}/masks/{name}.png"}[kind],
        values,
    )


def by_definition(masks: list[np.ndarray], predictions: list[np.ndarray], classes: int) -> dict:
    """Figures in per cent, each from the pixels of all images."""
    truth, found = (np.concatenate([x.ravel() for x in xs]) for xs in (masks, predictions))
    found, truth = found[truth != IGNORE], truth[truth != IGNORE]
    ious, accuracies = [], []
    for label in range(classes):
        both, either = (
            ((truth == label) & (found == label)).sum(),
            ((truth == label) | (found == label)).sum(),
        )
        ious.append(100 * both / either if either else np.nan)
        accuracies.append(100 * both / (truth == label).sum() if (truth == label).any() else np.nan)
    return {
        "miou": np.nanmean(ious),
        "mean_accuracy": np.nanmean(accuracies),
        "pixel_accuracy": 100 * (truth == found).mean(),
        "iou": ious,
        "accuracy": accuracies,
    }
