"""Checkpoints that are whole or not there, and that any number of processes can load.

A checkpoint is a folder `step-00000100` with

    *.safetensors   the tensors, a file for each process that wrote, by torch.distributed.checkpoint: every
                    process reads the parts that it needs
    state.pt        the rest of the state, with shapes and dtypes in the tensors' places
    meta.json       the size and SHA-256 of every file

It is written under a temporary name and renamed when complete, so processes killed at any moment leave at
most a temporary folder behind, which their continuation removes. Several machines must share the folder.
"""

import hashlib
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.utils._pytree import tree_map_only

from train.engine.processes import Processes

PREFIX = "step-"
TEMPORARY = ".writing-"
STATE = "state.pt"
META = "meta.json"


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


@contextmanager
def _no_warning_alone() -> Iterator[None]:
    """A single process is nothing to warn of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _named(state: object, name: str = "") -> dict[str, Tensor]:
    """The tensors of a state by their places in it, such as `model.norm.weight`."""
    if isinstance(state, Tensor):
        return {name: state}
    parts: Iterable[tuple[object, object]] = state.items() if isinstance(state, dict) else ()
    parts = enumerate(state) if isinstance(state, list | tuple) else parts
    prefix = f"{name}." if name else ""
    return {place: t for key, part in parts for place, t in _named(part, f"{prefix}{key}").items()}


def save(folder: Path, step: int, state: dict[str, Any], keep: int, processes: Processes) -> Path:
    """Write `state` as the checkpoint of `step` below `folder`, then remove all but the newest `keep`.

    A collective: every process must call it, with a state that is the same but for its parts of DTensors.

    Args:
        folder: Of all checkpoints of a run.
        step: Which one it is.
        state: Tensors, DTensors and plain Python data, in dicts, lists and tuples.
        keep: Checkpoints kept.
        processes: This process among the others.
    """
    target = folder / f"{PREFIX}{step:08d}"
    writing = folder / f"{TEMPORARY}{step:08d}"
    if processes.is_main:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        outline = tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"), state)
        torch.save(outline, writing / STATE)
    processes.barrier()
    # Not the default format of torch.distributed.checkpoint, whose index is a pickle: reading one runs code.
    writer = HuggingFaceStorageWriter(str(writing), save_distributed=True)
    with _no_warning_alone():
        dcp.save(_named(state), storage_writer=writer, no_dist=processes.world_size == 1)
    processes.barrier()
    names = sorted(path.name for path in writing.iterdir())
    files = {name: _describe(writing / name) for name in processes.share(names)}
    files = {name: entry for part in processes.gather(files) for name, entry in part.items()}
    if processes.is_main:
        (writing / META).write_text(json.dumps({"step": step, "files": files}))
        # On disk before the rename is: a power cut must not leave the new name over missing data.
        for path in (writing / META, writing):
            _sync(path)
        if target.exists():  # this step's, from a run that was resumed before it
            shutil.rmtree(target)
        writing.rename(target)
        _sync(folder)
        for old in paths(folder)[:-keep]:
            shutil.rmtree(old)
    processes.barrier()
    return target


def _describe(path: Path) -> dict[str, Any]:
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


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


def _files(path: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of a checkpoint's files by name."""
    meta = path / META
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}")
    if not meta.is_file():
        raise CheckpointError(f"{path} is not a whole checkpoint: {META} is missing")
    try:
        return {
            name: {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
            for name, entry in json.loads(meta.read_text())["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{meta} is corrupted: {error!r}") from error


def _check(file: Path, entry: dict[str, Any]) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file.parent} is not a whole checkpoint: {file.name} is missing")
    size = file.stat().st_size
    if size != entry["bytes"]:
        raise CheckpointError(f"{file} is truncated: expected {entry['bytes']} bytes, found {size}")
    if _digest(file) != entry["sha256"]:
        raise CheckpointError(f"{file} is corrupted: its SHA-256 is not the one in {META}")


def load(path: Path, processes: Processes) -> dict[str, Any]:
    """Check every file of a checkpoint and return the state that was saved, with meta tensors for tensors.

    A collective: the processes share the files to check. `fill` reads the tensors.

    Raises:
        CheckpointError: it is missing, truncated, corrupted or holds code, on every process; the message says
            which.
    """
    error = None
    try:
        files = _files(path)
        for name in processes.share(sorted(files)):
            _check(path / name, files[name])
    except (CheckpointError, OSError) as found:
        error = str(found)
    for message in processes.gather(error):
        if message is not None:
            raise CheckpointError(message)
    try:
        return torch.load(path / STATE, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path / STATE} holds more than plain data: {error}") from error


def fill(path: Path, state: dict[str, Any], processes: Processes) -> None:
    """Read the tensors of a checkpoint into those of `state`, in the same places; a collective.

    They may be sharded otherwise than those that were saved, or not at all.
    """
    reader = HuggingFaceStorageReader(str(path))
    with _no_warning_alone():
        dcp.load(_named(state), storage_reader=reader, no_dist=processes.world_size == 1)


def newest(folder: Path, processes: Processes) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint below `folder` that is whole, and what `load` gives; None if there is none.

    A collective. Damaged ones are passed over with a message.
    """
    for path in reversed(processes.gather(paths(folder))[0]):
        try:
            return path, load(path, processes)
        except CheckpointError as error:
            if processes.is_main:
                print(f"passing over a damaged checkpoint: {error}", flush=True)
    return None
