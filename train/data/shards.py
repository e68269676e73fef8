"""Images in WebDataset shards: tar files without compression, read at any place.

The package webdataset reads shards as streams: what comes when depends on the numbers of processes and
workers, and no stream can be entered at a step. Here the members of every shard are found once, with
tarfile, and each is read by its offset, so that shards are as good as folders for exact resumption.
"""

import bisect
import glob
import hashlib
import os
import tarfile
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

import braceexpand
import numpy as np

MAX_OPEN = 64  # shards that a process keeps open
INDEXERS = 8  # threads that index shards: they mostly wait for the disk


class Members(NamedTuple):
    """Where the members of a shard are, by name.

    Attributes:
        names: Encoded names, sorted, [n] of NumPy's bytes. Python's strings would be copied into each
            loader process, one page after the other, as their reference counts change.
        offsets: Of the first byte, int64 [n].
        sizes: In bytes, int64 [n].
    """

    names: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray


def find_shards(pattern: str) -> list[Path]:
    """List the shards of a pattern, sorted.

    Args:
        pattern: A tar file, a folder (every *.tar below it), or a path with braces `{000000..000099}`,
            wildcards, or both.

    Raises:
        FileNotFoundError: If a shard that the braces name, or any that the wildcards stand for, is missing.
        ValueError: If the braces do not match, or if the pattern is a URL or a command.
    """
    if "://" in pattern or pattern.startswith("pipe:"):
        raise ValueError(f"shards must be files on this machine or its network drives, not {pattern!r}")
    try:
        parts = list(braceexpand.braceexpand(pattern, escape=False))
    except braceexpand.UnbalancedBracesError as error:  # type: ignore[attr-defined]  # its stub lacks it
        raise ValueError(f"shards {pattern!r}: {error}") from None
    found: set[Path] = set()
    missing = []
    for path in (Path(part).expanduser() for part in parts):
        if path.is_dir():
            matches = [match for match in path.rglob("*.tar") if match.is_file()]
        elif path.is_file():
            matches = [path]
        else:
            matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        if not matches:
            missing.append(str(path))
        found.update(matches)
    if missing:
        others = f" (and {len(missing) - 1} more of {len(parts)})" if len(missing) > 1 else ""
        raise FileNotFoundError(f"no such shard: {missing[0]}{others}")
    return sorted(found)


def read_members(path: Path, wanted: Callable[[str], bool]) -> Members:
    """Find the files in a shard whose names are wanted.

    Raises:
        ValueError: If it is no plain tar file, ends too early, is damaged, or holds a name twice.
    """
    entries: dict[bytes, tuple[int, int]] = {}
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile keeps them all otherwise
                    if not (member.isreg() and wanted(member.name)) or member.issparse():
                        continue
                    name = os.fsencode(member.name)
                    if name in entries:
                        raise ValueError(f"shard {path} holds {member.name} twice")
                    entries[name] = member.offset_data, member.size
                end = tar.offset
        except tarfile.TarError as error:
            raise ValueError(
                f"shard {path} cannot be read as a tar file without compression, or is damaged: {error}"
            ) from None
        # tarfile takes both the end of the file and a damaged header for the end of the archive.
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE or any(block):
            raise ValueError(f"shard {path} is truncated or damaged: no member and no end at byte {end}")
    names = sorted(entries)
    places = np.array([entries[name] for name in names], np.int64).reshape(-1, 2)
    return Members(np.array(names, np.bytes_), places[:, 0].copy(), places[:, 1].copy())


def cache_folder() -> Path:
    """Where indices are kept: `dbpkern/shards` in the user's folder for caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dbpkern" / "shards"


def load_members(path: Path, extensions: tuple[str, ...]) -> Members:
    """Find the files in a shard by the ends of their names, or remember them from an earlier time.

    What was found is kept in `cache_folder` under the shard's path, size and time of change. Without a
    folder that can be written, shards are indexed each time.

    Raises:
        ValueError: As `read_members`.
    """
    status = path.stat()
    key = repr((str(path.absolute()), status.st_size, status.st_mtime_ns, extensions))
    cached = cache_folder() / f"{hashlib.blake2b(key.encode(errors='surrogateescape')).hexdigest()[:32]}.npz"
    try:
        with np.load(cached, allow_pickle=False) as arrays:
            return Members(*(arrays[name] for name in Members._fields))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # none, or a damaged one
        members = read_members(path, lambda name: name.lower().endswith(extensions))
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may write the same index at a time, each under a name of its own.
        with tempfile.NamedTemporaryFile(dir=cached.parent, suffix=".writing", delete=False) as file:
            np.savez(file, **members._asdict())
        Path(file.name).replace(cached)
    except OSError:
        pass  # a read-only or full home is no reason to stop
    return members


class Shards:
    """The images of some shards by name, `shard.tar/member.jpg`.

    The name of a shard is its path relative to the folder that all shards have in common. One object may be
    used after a fork and may be pickled: each process opens its own files, at most MAX_OPEN at a time.

    Args:
        paths: The shards.
        extensions: Ends of the names of images, lower case.

    Raises:
        FileNotFoundError: If no shard holds an image.
        ValueError: If a shard is damaged or holds a name twice.
    """

    def __init__(self, paths: Sequence[Path], extensions: tuple[str, ...]):
        root = Path(os.path.commonpath([path.absolute().parent for path in paths]))
        # With the slash, so that a shard's prefix is the greatest that is not above a name.
        by_prefix = {f"{path.absolute().relative_to(root).as_posix()}/": path.absolute() for path in paths}
        self.prefixes = sorted(by_prefix)
        self.paths = [by_prefix[prefix] for prefix in self.prefixes]
        with ThreadPoolExecutor(INDEXERS) as pool:
            self.members = list(pool.map(lambda path: load_members(path, extensions), self.paths))
        if not any(len(members.names) for members in self.members):
            raise FileNotFoundError(f"no image ({' '.join(extensions)}) in {len(paths)} shards below {root}")
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_files": OrderedDict()}

    def names(self) -> list[str]:
        """List the names of all images, sorted by shard and within shards."""
        pairs = zip(self.prefixes, self.members, strict=True)
        return [prefix + os.fsdecode(name) for prefix, members in pairs for name in members.names.tolist()]

    def sizes(self, names: Iterable[str]) -> list[int]:
        """Count the names of each shard, in the order of the names, which must not come back to a shard."""
        return [sum(1 for _ in group) for _, group in groupby(names, self._shard)]

    def read(self, name: str) -> bytes:
        """Read the file of a name.

        Raises:
            KeyError: If there is no such name.
            OSError: If the shard cannot be read or has become too short.
        """
        shard = self._shard(name)
        member = os.fsencode(name.removeprefix(self.prefixes[shard]))
        names, offsets, sizes = self.members[shard]
        place = int(np.searchsorted(names, member))
        if place == len(names) or names[place] != member:
            raise KeyError(f"no such image: {name}")
        size = int(sizes[place])
        # pread has no position that processes or threads could share.
        content = os.pread(self._open(shard).fileno(), size, int(offsets[place]))
        if len(content) < size:
            raise OSError(f"{self.paths[shard]} ends within {name}")
        return content

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():  # it may not have come so far
            file.close()

    def _shard(self, name: str) -> int:
        return max(bisect.bisect_right(self.prefixes, name) - 1, 0)

    def _open(self, shard: int) -> BinaryIO:
        if self._process != os.getpid():  # forked: close what the parent opened, here alone
            self._files, self._process = OrderedDict(), os.getpid()
        if shard not in self._files:
            if len(self._files) == MAX_OPEN:
                self._files.popitem(last=False)[1].close()
            self._files[shard] = self.paths[shard].open("rb", buffering=0)
        self._files.move_to_end(shard)
        return self._files[shard]
