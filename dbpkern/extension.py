"""The CUDA extension: `python -m dbpkern.extension` compiles it, training loads such a build or does without.

Environment:
    DBPKERN_EXTENSION: "0" leaves the extension out.
    TORCH_CUDA_ARCH_LIST: architectures to build for, as PyTorch's own extensions read it.
    TORCH_EXTENSIONS_DIR: where builds are kept, in a folder `dbpkern`; `~/.cache/torch_extensions` otherwise.
    CUDA_HOME: the CUDA toolkit whose nvcc compiles. CXX: the host compiler, `g++` otherwise.
"""

import argparse
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

# In the package in a wheel, beside it in a checkout.
SOURCES = next(Path(__file__).parent.glob("csrc"), Path(__file__).parent.parent / "csrc")
# Temporary files lie beside the result: nvcc names them by process id, which containers can share.
FLAGS = ("-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v", "-objtemp")
# Torch's own CUDA runtime, already loaded, must serve: the current device is a state of the runtime.
LINK = ("-shared", "-cudart=shared", "-ltorch_cpu", "-ltorch_cuda", "-lc10", "-lc10_cuda")
# What TORCH_CUDA_ARCH_LIST may say instead of numbers.
FAMILIES = {"Turing": "7.5", "Ampere": "8.0;8.6", "Ada": "8.9", "Hopper": "9.0", "Blackwell": "10.0;12.0"}


class BuildError(RuntimeError):
    """The extension could not be built."""


def capabilities() -> list[tuple[int, int]]:
    """Compute capabilities of the GPUs here that are new enough; an older one may serve the display."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return sorted({c for c in map(torch.cuda.get_device_capability, range(count)) if c >= (8, 0)})


def codes(named: str = "") -> list[str]:
    """What to compile for the names given, else TORCH_CUDA_ARCH_LIST's, else the GPUs'.

    That is sm_90 for "9.0", sm_90 and compute_90 for "9.0+PTX"; what is older than 8.0 is left out.
    """
    text = named or os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    text = text or " ".join(f"{major}.{minor}" for major, minor in capabilities())
    for family, numbers in FAMILIES.items():
        text = text.replace(family, numbers)
    found = set()
    for name in re.findall(r"[^;,\s]+", text):
        # The kernels use nothing that the architectures "a" and "f" add.
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name)
        if match is None:
            raise BuildError(f'expected a compute capability such as 8.0 or 9.0+PTX, got "{name}"')
        if int(match[1]) >= 8:
            found |= {f"{kind}_{match[1]}{match[2]}" for kind in ("sm", "compute")[: 1 + bool(match[3])]}
    if not found:
        raise BuildError(f"--arch: expected compute capability 8.0 or newer, got {text or 'no GPU'}")
    return sorted(found)


def runs(code: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU runs what was compiled: newer minor versions do, and of PTX all newer GPUs."""
    kind, _, number = code.partition("_")
    built = divmod(int(number), 10)
    return capability >= built and (kind == "compute" or capability[0] == built[0])


def nvcc(*arguments: str, named: str = "") -> str:
    """What nvcc prints when it compiles for `codes(named)`: registers and spills of each kernel are in it.

    Raises BuildError where a tool is missing, of another CUDA than torch's, or fails.
    """
    home, host = os.environ.get("CUDA_HOME"), os.environ.get("CXX") or "g++"
    path = f"{home}/bin" if home else f"{os.environ.get('PATH', os.defpath)}:/usr/local/cuda/bin"
    program = shutil.which("nvcc", path=path)
    if program is None:
        raise BuildError(f"nvcc is missing in {path}: install the CUDA toolkit, or set CUDA_HOME")
    if shutil.which(host) is None:
        raise BuildError(f'a C++ compiler is missing: there is no "{host}"; install g++, or set CXX')
    version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    release = version.partition("release ")[2].partition(",")[0]
    if release.split(".")[0] != str(torch.version.cuda).split(".")[0]:
        raise BuildError(f"nvcc is of CUDA {release}, torch of CUDA {torch.version.cuda}")
    targets = [f"-gencode=arch=compute_{c.partition('_')[2]},code={c}" for c in codes(named)]
    command = [program, f"-ccbin={host}", *FLAGS, f"--threads={len(targets)}", *targets, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise BuildError(f"nvcc failed with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def cache() -> Path:
    """The folder that builds are kept in."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "torch_extensions")
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default, "dbpkern")


def key() -> str:
    """A hash of all that a build must have in common with this process to be loaded by it."""
    parts = [repr((FLAGS, LINK, torch.__version__, torch.version.cuda, os.uname().machine)).encode()]
    parts += [file.read_bytes() for file in sorted(SOURCES.glob("*.*"))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def build(folder: Path, named: str = "") -> tuple[Path, str]:
    """Compile the library for `codes(named)` into a folder; in `cache()` it is found by `load`.

    Returns the library and what nvcc printed. Raises BuildError as `nvcc` does, and OSError.
    """
    at, library = Path(torch.__file__).parent, folder / f"{key()}-{'+'.join(codes(named))}.so"
    sources = [str(SOURCES / name) for name in ("lowrank_statistics.cu", "planner.cpp", "bindings.cpp")]
    command = [f"-isystem={at}/include", *sources, f"-L{at}/lib", *LINK]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as scratch:
        printed = nvcc(*command, f"-o={scratch}/made.so", named=named)
        Path(scratch, "made.so").replace(library)  # in one step: nobody loads half of it
    return library, printed


def _find() -> tuple[Path | None, str]:
    """The build that fits this process, or None; and the reason."""
    if os.environ.get("DBPKERN_EXTENSION") == "0":
        return None, "DBPKERN_EXTENSION=0"
    for library in sorted(cache().glob(f"{key()}-*.so")):
        built = library.stem.partition("-")[2].split("+")
        if all(any(runs(code, capability) for code in built) for capability in capabilities()):
            return library, f"a build for {', '.join(built)}"
    return None, "no build for this torch and these GPUs: python -m dbpkern.extension makes one"


class Operators(Protocol):
    """The extension's operators."""

    def lowrank_statistics(self, x: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """B, Y and c of `x [L, n, d]` and `Q [L, d, r]`."""


_decision: tuple[Operators | None, str] | None = None


def load() -> Operators | None:
    """The extension's operators, or None where no build fits; decided once a process, with one log line.

    They are a namespace with `lowrank_statistics(x [L, n, d], Q [L, d, r]) -> (B, Y, c)`.
    """
    global _decision
    if _decision is None:
        library, reason = _find()
        try:
            if library is not None:
                torch.ops.load_library(library)
            _decision = None if library is None else torch.ops.dbpkern_cuda, reason
        except (OSError, RuntimeError) as error:
            _decision = None, f"{library} did not load: {error}"
        logging.getLogger("dbpkern").info("CUDA extension: %s", _decision[1])
    return _decision[0]


def why() -> str:
    """What serves, or why nothing does: before the first `load` what that would find. It loads nothing."""
    return (_decision or _find())[1]


def main(arguments: list[str] | None = None) -> None:
    """Compile ahead of time; exits with 1 on a failure and, with `--check`, on spilled registers."""
    parser = argparse.ArgumentParser(prog="python -m dbpkern.extension", description=main.__doc__)
    parser.add_argument("--arch", nargs="+", default=[], help="default: TORCH_CUDA_ARCH_LIST, or the GPUs'")
    parser.add_argument("--check", action="store_true", help="keep nothing; fail where registers are spilled")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            library, printed = build(Path(scratch) if options.check else cache(), " ".join(options.arch))
            torch.ops.load_library(library)
        spills = re.findall(r"(\d+) bytes spill", printed)
        if options.check and (not spills or any(map(int, spills))):
            raise BuildError(f"{printed}\nregisters are spilled, or ptxas does not say whether they are")
    except (BuildError, OSError) as error:
        sys.exit(str(error))
    print(f"{len(spills) // 2} kernels compiled{'' if options.check else f' into {library}'}")


if __name__ == "__main__":
    main()
