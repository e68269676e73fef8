"""Checkpoints that are whole or not there.

A checkpoint is a folder `step-00000100` with the state (`state.pt`) and a description (`meta.json`) that
holds its size and SHA-256. It is written under a temporary name and renamed when complete, so a process
killed at any moment leaves at most a temporary folder behind, which its continuation removes.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch

PREFIX = "step-"
TEMPORARY = ".writing-"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: missing, truncated or corrupted."""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(folder: Path, step: int, state: dict, keep: int) -> Path:
    """Write `state` as the checkpoint of `step` below `folder`, then remove all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{PREFIX}{step:08d}"
    writing = folder / f"{TEMPORARY}{step:08d}"
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir()
    torch.save(state, writing / "state.pt")
    meta = {
        "step": step,
        "bytes": (writing / "state.pt").stat().st_size,
        "sha256": _digest(writing / "state.pt"),
    }
    (writing / "meta.json").write_text(json.dumps(meta))
    # On disk before the rename is: a power cut must not leave the new name over missing data.
    for path in (writing / "state.pt", writing / "meta.json", writing):
        _sync(path)
    if target.exists():  # this step's, from a run that was resumed before it
        shutil.rmtree(target)
    writing.rename(target)
    _sync(folder)
    for old in paths(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def paths(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, oldest first."""
    return sorted(folder.glob(f"{PREFIX}*"))


def rewind(folder: Path, step: int) -> None:
    """Remove checkpoints of later steps than `step`, which a resumed run makes again, and unfinished ones.

    Later ones are damaged or were passed over on purpose; `keep` must not count them as the newest.
    """
    later = [path for path in paths(folder) if path.name > f"{PREFIX}{step:08d}"]
    for path in [*later, *folder.glob(f"{TEMPORARY}*")]:
        shutil.rmtree(path)


def load(path: Path) -> dict:
    """Read a checkpoint onto the CPU.

    Raises:
        CheckpointError: it is missing, truncated or corrupted; the message says which.
    """
    state, meta = path / "state.pt", path / "meta.json"
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}")
    for file in (state, meta):
        if not file.is_file():
            raise CheckpointError(f"{path} is not a whole checkpoint: {file.name} is missing")
    try:
        expected = json.loads(meta.read_text())
        size, sha256 = expected["bytes"], expected["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{meta} is corrupted: {error}") from error
    if state.stat().st_size != size:
        raise CheckpointError(f"{state} is truncated: expected {size} bytes, found {state.stat().st_size}")
    if _digest(state) != sha256:
        raise CheckpointError(f"{state} is corrupted: its SHA-256 is not the one in meta.json")
    return torch.load(state, map_location="cpu", weights_only=True)


def newest(folder: Path) -> tuple[Path, dict] | None:
    """The newest checkpoint below `folder` that is whole, and its state; None if there is none.

    Damaged ones are passed over with a message.
    """
    for path in reversed(paths(folder)):
        try:
            return path, load(path)
        except CheckpointError as error:
            print(f"passing over a damaged checkpoint: {error}", flush=True)
    return None
