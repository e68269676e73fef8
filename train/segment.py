"""Train a semantic segmentation model on a pre-trained encoder, plain or with DBP, and evaluate it.

    torchrun --standalone --nproc_per_node 1 train/segment.py --config train/configs/segment_scenes.yaml \
        --encoder runs/a/encoder.safetensors --out runs/b

Also runs with plain python. `--help` lists every option; `docs/segmentation.md` explains them.
"""

from train.engine.loop import Loop
from train.engine.processes import Processes
from train.engine.run import open_run, parse_config, run_script
from train.tasks import transfer
from train.tasks.segmentation import Config, SegmentationTask


def prepare(config: Config, procs: Processes) -> Loop:
    """Everything up to the first step. Whatever can be wrong is found before a file is written.

    Args:
        config: What is asked for.
        procs: This process among the others.

    Raises:
        ValueError, FileNotFoundError: what the user asked for cannot be done; the message says why.
    """
    task = SegmentationTask(config)
    task.prepare(procs)
    optimizer, decor = transfer.build_optimizers(config, task.model)
    run, found = open_run(config, procs, task.files)
    return Loop(task, run, optimizer, decor, found)


def parse(arguments: list[str] | None = None) -> Config:
    """The configuration from the command line and YAML files."""
    return parse_config(Config, "train/segment.py", __doc__, arguments)


def main(arguments: list[str] | None = None) -> None:
    """Train."""
    run_script("segment", parse, prepare, arguments)


if __name__ == "__main__":
    main()
