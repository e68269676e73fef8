"""Draw images with a DARL model that train/pretrain.py has trained.

    python train/generate.py --run runs/a --out samples.png --known 0.5

Each patch is drawn from those before it: by DDPM for a model of diffusion, without chance for one of mean
squared error. `docs/darl.md` tells what to expect of which.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from models.darl import DARL
from models.generate import generate
from train.data.augment import denormalize
from train.data.pretraining import build_data, collate
from train.engine import plots, processes
from train.pretrain import load_run
from train.tasks.autoregressive import AutoregressiveTask, given_part


@dataclass
class Config:
    """Images from a run of train/pretrain.py.

    Args:
        run: Folder of the run.
        out: The picture, a PNG.
        known: Part of the patches of held-out images that is given, in the order of prediction: 0.5 in raster
            order is the upper half. 0 draws images freely.
        count: Images.
        steps: Denoising steps of each patch, of equal size in the noise level.
        seed: Of the noise.
        cache: Whether keys and values are kept from patch to patch; without, the images are the same up to
            rounding.
        checkpoint: Of the run; null for its newest.
        device: "auto", "cpu" or "cuda".
    """

    run: str
    out: str
    known: float = 0.5
    count: int = 8
    steps: int = 1000
    seed: int = 0
    cache: bool = True
    checkpoint: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def check(self) -> None:
        """Raise ValueError for numbers out of range."""
        if not 0 <= self.known <= 1:
            raise ValueError(f"known: expected a part in [0, 1], got {self.known}")
        for name in ("count", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if Path(self.out).suffix != ".png":
            raise ValueError(f"out: expected the name of a PNG file, got {self.out}")


def draw(config: Config) -> dict[str, Tensor]:
    """The rows of the picture.

    Raises:
        ValueError, OSError: there is no such run, or its model cannot draw; the message says why.
    """
    config.check()
    device = processes.start(config.device).device
    task, model = load_run(config.run, config.checkpoint)
    trained = task.config
    if not (isinstance(task, AutoregressiveTask) and isinstance(model, DARL)):
        raise ValueError(f"run: expected that of a model darl_vit_*, got {trained.model}")
    model.to(device)
    patches = model.patch_embed
    known = round(config.known * patches.num_patches)
    images = torch.zeros(config.count, model.in_chans, *patches.img_size, device=device)
    if known:
        data = replace(trained.data, cache=0)  # a few images are read once
        _, held_out = build_data(data, patches.img_size, patches.num_patches, trained.seed)
        batch = collate([held_out[i % len(held_out)] for i in range(config.count)])
        images = batch["image"].to(device)
    tokenizer, codes = task.tokenizer, task.codes(images)
    order = (
        torch.arange(patches.num_patches, device=device) if model.config.order == "random" else model.places
    )
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)  # fails now rather than after the work
    start = time.perf_counter()
    made = generate(model, images, known, config.steps, config.seed, config.cache, order, codes)
    seconds = time.perf_counter() - start
    made = denormalize(made if tokenizer is None else tokenizer.decode(made, patches.grid_size))
    print(f"generate: {config.count} images, {patches.num_patches - known} patches each, in {seconds:.1f} s")
    if known:
        given = given_part(model, images, order[:known])
        return {"original": denormalize(images), "given": given, "drawn": made}
    return {"drawn": made}


def main(arguments: list[str] | None = None) -> None:
    """Draw, and say in one line what went wrong where it is not a defect of the program."""
    parser = ArgumentParser(prog="train/generate.py", description=__doc__)
    parser.add_class_arguments(Config)
    config = Config(**parser.instantiate(parser.parse_args(arguments)))
    try:
        rows = draw(config)
        plots.save_image_grid(rows, Path(config.out))
    except (ValueError, OSError) as error:
        sys.exit(f"generate: {error}")


if __name__ == "__main__":
    main()
