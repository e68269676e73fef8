"""Trying the tiles and backends of an op on the device at hand: only with `DBPKERN_AUTOTUNE=1`.

The first automatic call of each shape is timed with every tile size that the tables know for its operands,
and with the eager implementation; the fastest serves from then on, and is written to a file that later runs
read. Processes of one run must not choose differently, so where several run together nothing is tried, and
the file is read only from a folder that the user has named, with `DBPKERN_CACHE`: one that all of them see.
"""

import functools
import json
import logging
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from dbpkern import distributed
from dbpkern.ops import _dispatch, _triton
from dbpkern.ops._dispatch import Tiles

log = logging.getLogger("dbpkern")

REPEATS = 5


def enabled() -> bool:
    """Whether the user has asked for it."""
    return os.environ.get("DBPKERN_AUTOTUNE") == "1"


def cache_folder() -> Path:
    """`DBPKERN_CACHE`, or dbpkern in the user's cache."""
    named = os.environ.get("DBPKERN_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dbpkern")


def cache_file(device: torch.device) -> Path:
    """The file of choices for a device and the versions that compile for it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    version = getattr(_triton.triton, "__version__", "none")
    return cache_folder() / f"tuned {name}, torch {torch.__version__}, triton {version}.json".replace(
        " ", "_"
    )


@functools.cache
def choices(file: Path) -> dict[str, list]:
    """What is known: key -> [backend, tiles or None]. An unreadable file counts as empty."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s is not read: %s", file, error)
        return {}


def _write(file: Path, known: dict[str, list]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as new:
            json.dump(known, new, indent=1, sort_keys=True)
        os.replace(new.name, file)  # in one go: another process may read it now
    except OSError as error:
        log.warning("%s is not written, so the next run tunes again: %s", file, error)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time of a call after one to warm up."""
    run()
    times = []
    with torch.cuda.device(device):
        for _ in range(REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def trials(table: str, kind: str, d: int) -> list[Tiles]:
    """Every tile size that some architecture's table has for a kernel at width d."""
    found = [
        tiles for name in _dispatch.architectures() for _, tiles in _dispatch.candidates(name, table, kind, d)
    ]
    return list(dict.fromkeys(found))


def serving(
    op: str,
    requested: str,
    refusal: str | None,
    table: str,
    kind: str,
    device: torch.device,
    sizes: dict[str, int],
    run: Callable[[str], object],
) -> str:
    """The backend that serves a call of an op which has an eager and a Triton implementation.

    Args:
        op: its name, as in the tables' thresholds.
        requested: a backend by name, or "".
        refusal: why Triton cannot serve, or None.
        table: the name of its tiles.
        kind: of its operands.
        device: where it runs.
        sizes: of the call, by the names that thresholds use.
        run: makes the call with a backend, on copies of what it would change.

    Raises:
        ValueError: the requested backend cannot serve.
    """

    def preferred() -> str:
        tries = enabled() and device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
        found = best(op, table, kind, device, sizes, run) if tries else None
        return found or ("triton" if _dispatch.pays(op, kind, device, **sizes) else "eager")

    return _dispatch.choose(op, requested, {"triton": refusal}, preferred)


def best(
    op: str, table: str, kind: str, device: torch.device, sizes: dict[str, int], run: Callable[[str], object]
) -> str | None:
    """The fastest backend for a call like that of `serving`, its tiles put in place.

    Sizes other than the width d count as the next power of two. None where nothing is known and other
    processes run beside this one, so that nothing may be tried.
    """
    d = sizes["d"]
    rounded = {
        name: size if name == "d" else 1 << max(0, size - 1).bit_length() for name, size in sizes.items()
    }
    key = " ".join([op, table, kind, *(f"{name}={size}" for name, size in sorted(rounded.items()))])
    alone = distributed.world_size() == 1
    if not alone and not os.environ.get("DBPKERN_CACHE"):
        return None
    file = cache_file(device)
    known = choices(file)
    if key not in known:
        if not alone:
            return None
        known[key] = _try(table, kind, d, device, run)
        log.info("tuned %s: %s", key, known[key])
        _write(file, known)
    backend, tiles = known[key]
    if tiles is not None:
        _dispatch._tuned[table, kind, d] = Tiles(*tiles)
    return backend


def _try(table: str, kind: str, d: int, device: torch.device, run: Callable[[str], object]) -> list:
    key = (table, kind, d)
    before = _dispatch._tuned.get(key)
    fastest, choice = seconds(lambda: run("eager"), device), ["eager", None]
    for tiles in trials(*key):
        _dispatch._tuned[key] = tiles
        try:
            time = seconds(lambda: run("triton"), device)
        except Exception as error:  # too much shared memory, or a compiler that gives up: not this one, then
            log.info("%s with %s does not run here: %s", table, tiles, error)
            continue
        if time < fastest:
            fastest, choice = time, ["triton", [tiles.m, tiles.n, tiles.k, tiles.warps, tiles.stages]]
    if before is None:
        del _dispatch._tuned[key]
    else:
        _dispatch._tuned[key] = before
    return choice
