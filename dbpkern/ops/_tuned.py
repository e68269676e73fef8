"""What `python -m dbpkern.tune` has found on a GPU: the backend of each op, and tiles.

Environment:
    DBPKERN_CACHE: the folder of the files; `dbpkern` in XDG_CACHE_HOME or `~/.cache` otherwise. Processes
        that run together read them only from a folder named so, which all of them must see: else one might
        choose otherwise than the rest.
"""

import functools
import importlib.metadata
import json
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

_log = logging.getLogger("dbpkern")
TILE_SIZES = frozenset(2**i for i in range(9))


@dataclass(frozen=True)
class Tuned:
    """The entries of a file; those that it lacks are the defaults."""

    backends: dict[str, str] = field(default_factory=dict)
    """Backends by op."""
    tiles: dict[tuple[str, str], dict[tuple[int, int], tuple[int, ...]]] = field(default_factory=dict)
    """As `_dispatch.TILES`, with the fields of a `Tiles` as numbers."""


NOTHING = Tuned()
_given: Tuned | None = None


def use(found: Tuned | None) -> None:
    """Let these entries hold in this process, whatever the files say; None for the files again."""
    global _given
    _given = found


def versions(gpu: str) -> dict[str, str]:
    """What a file is valid for."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {"gpu": gpu, "torch": torch.__version__, "triton": triton}


def tuned_file(gpu: str) -> Path:
    """Where the choices for a GPU of this name lie."""
    named = os.environ.get("DBPKERN_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    found = versions(gpu)
    name = re.sub(r"[^\w.+-]+", "_", f"{gpu}-torch{found['torch']}-triton{found['triton']}")
    return (Path(named) if named else Path(home, "dbpkern")) / f"{name}.json"


def parse(text: str, gpu: str, backends: tuple[str, ...]) -> Tuned:
    """The entries of a file's text.

    Raises:
        ValueError: it is no such file, or one of another GPU or of other versions.
    """
    try:
        content = json.loads(text)
        for name, expected in versions(gpu).items():
            if content[name] != expected:
                raise ValueError(f"it is of {name} {content[name]!r}, here is {expected!r}")
        chosen = dict(content["backends"])
        if unknown := set(chosen.values()) - set(backends):
            raise ValueError(f"expected backends {backends}, got {sorted(map(str, unknown))}")
        tiles: dict[tuple[str, str], dict[tuple[int, int], tuple[int, ...]]] = {}
        for entry in content["tiles"]:
            least, multiple, *sizes = (int(entry[name]) for name in ("least", "multiple", *"mnk"))
            counts = int(entry["warps"]), int(entry["stages"])
            if not {*sizes, counts[0]} <= TILE_SIZES or not 1 <= counts[1] <= 8:
                raise ValueError(f"expected tiles of powers of two, got {entry}")
            rows = tiles.setdefault((entry["kernel"], entry["kind"]), {})
            rows[least, multiple] = (*sizes, *counts)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no file of dbpkern.tune: {type(error).__name__}: {error}") from error
    return Tuned(chosen, tiles)


@functools.cache
def read(gpu: str, backends: tuple[str, ...]) -> Tuned:
    """The entries for a GPU, looked up once a process; nothing where there is no file that fits."""
    file = tuned_file(gpu)
    try:
        found = parse(file.read_text(), gpu, backends)
    except FileNotFoundError:
        _log.info("not tuned on this GPU: run python -m dbpkern.tune")
        return NOTHING
    except (OSError, ValueError) as error:
        _log.warning("%s is left out, run python -m dbpkern.tune again: %s", file, error)
        return NOTHING
    _log.info("%s says which kernels serve", file)
    return found


@functools.cache
def _tell_processes() -> None:
    _log.info("tuning is not read: several processes run together, and DBPKERN_CACHE names no folder of all")


@functools.cache
def _gpu(device: torch.device | None) -> str:
    return torch.cuda.get_device_name(device)


def tuned(backends: tuple[str, ...], device: torch.device | None = None) -> Tuned:
    """What holds in this process; for the current device unless one is named."""
    if _given is not None:
        return _given
    if not torch.cuda.is_initialized():  # the tensors are fake
        return NOTHING
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if together and not os.environ.get("DBPKERN_CACHE"):
        _tell_processes()
        return NOTHING
    return read(_gpu(device), backends)
