"""Which task a model belongs to."""

from models import darl, dvae, mae
from train.tasks.autoregressive import AutoregressiveTask
from train.tasks.masked import MaskedTask
from train.tasks.task import Task
from train.tasks.tokenizer import TokenizerTask

# Settings of a run that are for the models of one family alone.
FAMILIES = {"mae": ("decoder", "mask_ratio", "norm_pix_loss"), "darl": ("darl",), "dvae": ("dvae",)}
TASKS = {task.name: task for task in (MaskedTask, AutoregressiveTask, TokenizerTask)}


def task_of(config) -> Task:
    """The task of a run's configuration, by the first part of the model's name.

    Raises:
        ValueError: there is no such family.
    """
    family = config.model.partition("_")[0]
    if family not in TASKS:
        known = ", ".join([*mae.SIZES, *darl.SIZES, *dvae.SIZES])
        raise ValueError(f"unknown model {config.model!r}, expected one of {known}")
    return TASKS[family](config)
