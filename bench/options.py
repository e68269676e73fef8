"""Values of command-line options that every measurement shares."""

import argparse
from pathlib import Path

import torch


def count(text: str) -> int:
    """A number of something, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def device(text: str) -> torch.device:
    """A device that this machine has, for argparse."""
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {text}")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("this machine has no CUDA device that PyTorch can use")
    return torch.device(text)


def file(text: str) -> Path:
    """A file that can be written, for argparse."""
    path = Path(text)
    if not path.parent.is_dir():  # better now than after the measurement
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path
