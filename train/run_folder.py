"""The folder of a run: its configuration, its log, its checkpoints and its results.

config.yaml            what the run was started with
files.txt              the training images, one a line
log.jsonl              one record a line: {"kind": "step" | "eval" | "skip" | "file", "step": ...}
tb/                    the same for TensorBoard, with pictures
checkpoints/           see train.checkpoint
summary.json, *.png    written at the end
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import yaml


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

    def read_config(self) -> dict | None:
        """The configuration of the run that this folder holds, None if it holds none.

        Raises:
            ValueError: the folder holds something else than a run.
        """
        if self.config.is_file():
            config = yaml.safe_load(self.config.read_text())
            if not isinstance(config, dict):
                raise ValueError(f"{self.config} is not the configuration of a run")
            return config
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ValueError(f"out: {self.path} exists and is not the folder of a run; choose another")
        return None

    def write_config(self, config: dict) -> None:
        """Write the configuration, which makes the folder that of a run."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config, yaml.safe_dump(config, sort_keys=False))

    def records(self) -> Iterator[dict]:
        """The records of the log, in order; a last line cut short by a kill is passed over."""
        if not self.log.exists():
            return
        with self.log.open() as lines:
            for line in lines:
                if line.endswith("\n"):
                    yield json.loads(line)

    def rewind(self, step: int) -> None:
        """Drop what the log says of steps after `step`, which a resumed run makes again.

        A run that starts at 0 makes the evaluation at 0 again, too.
        """
        kept = [record for record in self.records() if 0 < step >= record["step"]]
        write_atomically(self.log, "".join(json.dumps(record) + "\n" for record in kept))


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that readers see the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
