"""Choose the kernels on the GPU at hand: `python -m dbpkern.tune`.

Each op that has more than one implementation is run on shapes of a ViT with 16-bit rows. A candidate is a
backend, or one with other tiles. Each has a process of its own with a time limit: a kernel that hangs or dies
stops no other. A result is right if its error against fp64 is at most twice that of PyTorch's products of the
same operands, plus 4 units in the last place of the largest value. The fastest of those that are right serves
from then on, PyTorch's where none is faster. The CUDA extension takes part if it has been built, by
`python -m dbpkern.extension`.

The choice is written after every op to a file in the user's cache: DBPKERN_CACHE, else `dbpkern` in
XDG_CACHE_HOME or `~/.cache`. Processes that run together read it only from a folder that DBPKERN_CACHE names,
and must all see the same one.
"""

import argparse
import functools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dbpkern import problems
from dbpkern.ops import _dispatch, _tuned
from dbpkern.ops._dispatch import AUTOMATIC, Tiles

KIND = "16bit"
TRIED = {
    "adamw_": ("adamw", (Tiles(64, 64, 64, 4, 3), Tiles(128, 64, 64, 8, 3))),
    "correlation": ("correlation", (Tiles(64, 64, 64, 4, 4), Tiles(128, 128, 32, 8, 4))),
    "fold": ("matmul", (Tiles(128, 128, 64, 8, 3), Tiles(64, 128, 32, 4, 4))),
    "map_": ("map", (Tiles(128, 64, 32, 8, 4), Tiles(64, 64, 64, 4, 4))),
}
"""Tiles tried beyond those of a table, by the first op that uses it; later ones take what was found."""

Row = dict[str, Any]
"""What is known of a candidate, by name, or of a table's row."""
Entries = list[Row]
"""Rows of tables as they lie in the file: kernel, kind, least, multiple, and the fields of a `Tiles`."""


@dataclass(frozen=True)
class Candidate:
    """An op by a backend, with tiles of its own if any."""

    op: str
    backend: str
    entry: Row | None = None

    def describe(self) -> str:
        """In words."""
        tiles = self.entry and "x".join(str(self.entry[name]) for name in (*"mnk", "warps", "stages"))
        return f"{self.backend} {tiles}" if tiles else self.backend


def candidates(op: str, width: int) -> list[Candidate]:
    """All that an op may be served by; PyTorch's first."""
    found = [Candidate(op, backend) for backend in ("eager", *problems.kernels(op))]
    table, tried = TRIED.get(op, ("", ()))
    for tiles in tried:
        least, multiple = _dispatch.tiles_row(table, KIND, width)
        row = {"kernel": table, "kind": KIND, "least": least, "multiple": multiple}
        found.append(Candidate(op, "triton", row | asdict(tiles)))
    return found


def examine(candidate: Candidate, sizes: tuple[int, int, int], device: str, entries: Entries) -> Row:
    """Error, seconds and PyTorch's seconds of a candidate in all forms of its op.

    `entries` are tiles that were found before.
    """
    depth, rows, width = sizes
    gpu = torch.device(device)
    tiles = entries if candidate.entry is None else [*entries, candidate.entry]
    content = {"backends": {}, "tiles": tiles, **_tuned.versions("")}
    _tuned.use(_tuned.parse(json.dumps(content), "", _dispatch.BACKENDS))
    found = {"error_ratio": 0.0, "seconds": 0.0, "eager_seconds": 0.0}
    for name in (name for name in problems.MAKERS if name.partition(",")[0] == candidate.op):
        # The layers of a ViT that are of one width, and the second one of its MLP.
        low = "low" in name
        for shape in [(3 * depth, rows, width), (depth, rows, 4 * width)] if low else [(depth, rows, width)]:
            problem = problems.make(name, *shape, gpu)
            error = problem.error(problem.call(*problem.fresh(), backend=candidate.backend))
            found["error_ratio"] = max(found["error_ratio"], error)
            for key, backend in (("eager_seconds", "eager"), ("seconds", candidate.backend)):
                if key == "eager_seconds" or backend != "eager":
                    call = functools.partial(problem.call, *problem.inputs, backend=backend)
                    found[key] += problems.seconds(call, gpu)
    if candidate.backend == "eager":
        found["seconds"] = found["eager_seconds"]
    return found


def choose(rows: Sequence[Row]) -> Row:
    """The row of the candidate that serves an op: the fastest that is right, else PyTorch's, the first."""
    right = [row for row in rows if row.get("error_ratio", 2.0) <= 1.0]
    return min(right, key=lambda row: row["seconds"] / row["eager_seconds"], default=rows[0])


def write(file: Path, content: dict[str, Any]) -> None:
    """Write JSON so that nobody ever reads half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(file)


def line(row: Row) -> str:
    """A row of the table."""
    name = f"{row['op']:20} {row['candidate']:24}"
    if "error" in row:
        return f"{name} {row['error']}"
    ratio, error = row["seconds"] / row["eager_seconds"], row["error_ratio"]
    verdict = "right" if error <= 1 else "WRONG"
    return f"{name} {1e6 * row['seconds']:10.1f} us {ratio:7.3f} of PyTorch's, error {error:.2f}, {verdict}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune; returns the exit code: 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m dbpkern.tune", description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=768, help="of the encoder (default: 768)")
    parser.add_argument("--depth", type=int, default=12, help="blocks of the encoder (default: 12)")
    parser.add_argument("--rows", type=int, default=1280, help="sampled rows of a layer (default: 1280)")
    parser.add_argument("--ops", nargs="+", choices=sorted(AUTOMATIC), default=sorted(AUTOMATIC))
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for a candidate (default: 60)")
    parser.add_argument("--out", type=Path, help="the file, in place of that in the cache")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, to see that it runs")
    args = parser.parse_args(arguments)
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # for the processes of the candidates
        args.width, args.depth, args.rows = 32, 1, 16
    elif not torch.cuda.is_available():
        print("there is no CUDA GPU here, so nothing can be tuned", file=sys.stderr)
        return 2
    gpu, device = ("dry run", "cpu") if args.dry else (torch.cuda.get_device_name(), "cuda")
    file = args.out or (None if args.dry else _tuned.tuned_file(gpu))
    content: dict[str, Any] = {**_tuned.versions(gpu), "backends": {}, "tiles": [], "rows": []}
    content |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": " ".join(sys.argv[1:])}
    sizes = args.depth, args.rows, args.width
    for op in args.ops:
        rows: list[Row] = []
        for one in candidates(op, args.width):
            found = problems.isolated(examine, one, sizes, device, content["tiles"], seconds=args.limit)
            rows.append(
                {"op": op, "candidate": one.describe(), "backend": one.backend, "entry": one.entry} | found
            )
            print(line(rows[-1]), flush=True)
        best = choose(rows)
        content["backends"][op] = best["backend"]
        content["tiles"] += [best["entry"]] * (best["entry"] is not None)
        content["rows"] += rows
        if file is not None:
            write(file, content)
    print(f"written to {file}" if file else "nothing was written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
