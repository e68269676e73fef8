"""Experiments on training: studies of arms, learning rates and seeds, for `python -m bench study`.

preset.py       what a study is made of: its preset, its arms, its trials
study.py        the results of a study on disk, and which trials are missing
pretraining.py  the presets of pre-training, as data
finetuning.py   those of fine-tuning and segmentation
trial.py        makes one trial, in a process of its own (jobs.py); probe.py watches its encoder
timing.py       times the steps of the arms
figures.py      what the trials of a study say
report.py       the same as tables and plots
"""

from bench.experiments import finetuning, pretraining  # noqa: F401  they say which studies there are
