"""The folder of a run: its configuration, its log, its checkpoints and its results.

config.yaml            what the run was started with
files.txt              the training images, one a line; for segmentation also those held out, and classes
log.jsonl              one record a line: {"kind": "step" | "skip" | "eval" | "plan", "step": ..., ...}
tb/                    the same for TensorBoard, with pictures
checkpoints/           see train.engine.checkpoint
summary.json, *.png    written at the end
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

# Settings that change none of a run's numbers: they may differ between a run and its continuation.
NEUTRAL = (
    "out", "resume", "eval_every", "checkpoint_every", "keep", "max_bad_steps", "profile", "data.workers",
    "data.cache", "energy.country", "parallel",
)  # fmt: skip

UNFINISHED = ".writing"  # end of the names that files have while they are written


class RunFolder:
    """Paths of one run's folder and its log."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.log = self.path / "log.jsonl"
        self.files = self.path / "files.txt"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tb"
        self.summary = self.path / "summary.json"

    def read_config(self) -> dict[str, Any] | None:
        """The configuration of the run that this folder holds, None if it holds none.

        Raises:
            ValueError: the folder holds something else than a run.
        """
        if self.config.is_file():
            config = yaml.safe_load(self.config.read_text())
            if not isinstance(config, dict):
                raise ValueError(f"{self.config} is not the configuration of a run")
            return config
        if not self.path.exists():
            return None
        # A run that was killed while it wrote its first file is no stranger.
        if not self.path.is_dir() or any(not p.name.endswith(UNFINISHED) for p in self.path.iterdir()):
            raise ValueError(f"out: {self.path} exists and is not the folder of a run; choose another")
        return None

    def write_start(self, config: dict[str, Any], files: Iterable[str]) -> None:
        """Write the configuration, which makes the folder that of a run, and the names of the images."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config, yaml.safe_dump(config, sort_keys=False))
        write_atomically(self.files, lines(files))

    def records(self) -> Iterator[dict[str, Any]]:
        """The records of the log, in order; a last line cut short by a kill is passed over."""
        if not self.log.exists():
            return
        with self.log.open() as lines:
            for line in lines:
                if line.endswith("\n"):
                    yield json.loads(line)

    def rewind(self, step: int, evaluates: bool) -> None:
        """Drop what the log says of steps after `step`, which a resumed run makes again.

        With `evaluates`, it makes the evaluation at `step` again, too.
        """
        kept = [
            record
            for record in self.records()
            if record["step"] < step
            or (record["step"] == step and not (evaluates and record["kind"] == "eval"))
        ]
        write_atomically(self.log, "".join(json.dumps(record) + "\n" for record in kept))


def lines(names: Iterable[str]) -> str:
    """The text of a file with a name on each line."""
    return "".join(f"{name}\n" for name in names)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """A nested configuration with dotted names; lists and tuples are alike."""
    items: dict[str, object] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and name != "model_args":
            items |= flat(value, f"{prefix}{name}.")
        else:
            items[prefix + name] = list(value) if isinstance(value, tuple) else value
    return items


def to_json(value: object, **options: Any) -> str:
    """JSON, in which numbers that are not finite become null: it has no others."""

    def clean(item: object) -> object:
        if isinstance(item, Mapping):
            return {key: clean(part) for key, part in item.items()}
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(clean(value), **options)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that readers see the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}{UNFINISHED}")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
