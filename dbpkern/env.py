"""What a bug report or a measurement needs to say about the machine: `python -m dbpkern.env`."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import dbpkern
from dbpkern import extension

PACKAGES = ("torch", "triton", "torchvision", "timm", "numpy")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Processors this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str | None:
    """Commit of the source tree that dbpkern runs from, with "+changes" where it differs; None elsewhere."""
    root = Path(dbpkern.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        changes = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+changes" if changes.strip() else "")


def _gpus() -> list[dict[str, object]]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "memory_gib": round(p.total_memory / 2**30, 1),
            "processors": p.multi_processor_count,
        }
        for p in properties
    ]


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return out.splitlines()[0].strip() if out.strip() else None


def collect() -> dict[str, object]:
    """Versions, processor, GPUs and the environment variables that change what dbpkern does.

    Of the CUDA extension it says which build there is; it does not load it.
    """
    prefixes = ("DBPKERN_", "TRITON_", "TORCH_", "OMP_NUM", "MKL_NUM", "CUDA_VISIBLE")
    return {
        "dbpkern": dbpkern.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": _processor(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "gpus": _gpus(),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "extension": extension.why(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(prefixes)},
    }


def main() -> None:
    """Print `collect()`, a line a fact."""
    for name, value in collect().items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v or 'missing'}" for k, v in value.items())
        elif isinstance(value, list):
            value = "; ".join(", ".join(f"{k} {v}" for k, v in item.items()) for item in value)
        print(f"{name + ':':13}{value or 'none'}")


if __name__ == "__main__":
    main()
