"""Which task of pre-training a model belongs to."""

from models import darl, dvae, mae
from train.tasks.autoregressive import AutoregressiveTask
from train.tasks.masked import MaskedTask
from train.tasks.pretraining import AnyPretraining, Config
from train.tasks.tokenizer import TokenizerTask

TASKS: dict[str, type[AnyPretraining]] = {
    task.name: task for task in (MaskedTask, AutoregressiveTask, TokenizerTask)
}


def task_of(config: Config) -> AnyPretraining:
    """The task of a run's configuration, by the first part of the model's name.

    Raises:
        ValueError: there is no such family.
    """
    family = config.model.partition("_")[0]
    if family not in TASKS:
        known = ", ".join([*mae.SIZES, *darl.SIZES, *dvae.SIZES])
        raise ValueError(f"unknown model {config.model!r}, expected one of {known}")
    return TASKS[family](config)
