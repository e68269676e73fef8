"""Train a classifier on a pre-trained encoder: fine-tuning or a linear probe, plain or with DBP.

    torchrun --standalone --nproc_per_node 1 train/finetune.py --config train/configs/finetune_digits.yaml \
        --encoder runs/a/encoder.safetensors --out runs/b

Also runs with plain python. `--help` lists every option; `docs/finetuning.md` explains them.
"""

import torch
from timm.optim import Lars

import dbpkern
from models.classifier import Vit
from train.engine.loop import Loop
from train.engine.processes import Processes
from train.engine.run import open_run, parse_config, run_script
from train.tasks import transfer
from train.tasks.classification import ClassificationTask, Config


def build_optimizers(
    config: Config, model: Vit
) -> tuple[torch.optim.Optimizer, dbpkern.DecorAdamW | dbpkern.DecorMuon | None]:
    """The optimizer of the weights, and what moves R where the run decorrelates: the same one.

    Rates are those of `parameter_groups`. timm puts a final norm of all tokens, which the read-outs "class"
    and "last" have, with the last block.
    """
    if config.optim.name != "lars":
        return transfer.build_optimizers(config, model)
    # As MAE's: the trust ratio is for weights, not for biases.
    groups = transfer.parameter_groups(config, model)
    groups = [group | {"always_adapt": group["params"][0].ndim > 1} for group in groups]
    return Lars(groups, lr=config.peak_lr, momentum=config.optim.betas[0]), None


def prepare(config: Config, procs: Processes) -> Loop:
    """Everything up to the first step. Whatever can be wrong is found before a file is written.

    Args:
        config: What is asked for.
        procs: This process among the others.

    Raises:
        ValueError, FileNotFoundError: what the user asked for cannot be done; the message says why.
    """
    task = ClassificationTask(config)
    task.prepare(procs)
    optimizer, decor = build_optimizers(config, task.model)
    run, found = open_run(config, procs, task.files)
    return Loop(task, run, optimizer, decor, found)


def parse(arguments: list[str] | None = None) -> Config:
    """The configuration from the command line and YAML files."""
    return parse_config(Config, "train/finetune.py", __doc__, arguments)


def main(arguments: list[str] | None = None) -> None:
    """Fine-tune."""
    run_script("finetune", parse, prepare, arguments)


if __name__ == "__main__":
    main()
