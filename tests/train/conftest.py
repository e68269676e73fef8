"""A folder of images with masks, and a run on it."""

from pathlib import Path

import pytest
from segment_runs import SCRATCH, TINY, make_pair

from train import segment


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images of several sizes, three labels, some ignored."""
    root = tmp_path_factory.mktemp("data") / "folder"
    for i in range(4):
        make_pair(root, "train", f"{i}", (40, 48), 3, "folder")
    for i, size in enumerate([(40, 56), (32, 32), (32, 32), (24, 30), (33, 70)]):
        make_pair(root, "val", f"{i}", size, 3, "folder")
    return root


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> Path:
    """A run with decorrelation."""
    out = tmp_path_factory.mktemp("segmented") / "run"
    decor = ["--decor.enable=true", "--decor.every=1"]
    segment.main([*TINY, *SCRATCH, *decor, f"--data.source=folder:{folder}", f"--out={out}"])
    return out
