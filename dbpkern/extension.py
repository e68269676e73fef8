"""The CUDA extension: found, built and loaded without ever being required.

`python -m dbpkern.extension` builds it ahead of time. Otherwise the first call that could use it builds it
with ninja, where there is a CUDA compiler and a GPU. Where neither is the case PyTorch serves.

Environment:
    DBPKERN_EXTENSION: "0" leaves the extension out; a folder names the build to use (`--out` made it).
    TORCH_CUDA_ARCH_LIST: architectures to build for, as PyTorch's own extensions read it.
    TORCH_EXTENSIONS_DIR: where builds are kept, in a folder `dbpkern`; `~/.cache` otherwise.
    CUDA_HOME: the CUDA toolkit whose nvcc compiles. CXX: the host compiler; ccache before it is left out.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import json
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

LIBRARY = "dbpkern_cuda.so"
MANIFEST = "build.json"
LOG = "build.log"
PLANNER = "dbpkern_planner"
MIN_CAPABILITY = (8, 0)
# Families by the names that TORCH_CUDA_ARCH_LIST allows; the old ones are known to be left out.
FAMILIES = {
    "Maxwell": ("5.0", "5.2"),
    "Pascal": ("6.0", "6.1"),
    "Volta": ("7.0",),
    "Turing": ("7.5",),
    "Ampere": ("8.0", "8.6"),
    "Ada": ("8.9",),
    "Hopper": ("9.0",),
    "Blackwell": ("10.0", "12.0"),
}
# What may stand before the compiler in CXX.
LAUNCHERS = ("ccache", "sccache", "distcc")

_log = logging.getLogger("dbpkern")


class BuildError(RuntimeError):
    """The extension could not be built; the message says why in one line."""


class ToolMissing(BuildError):
    """A tool that building needs is not installed."""


@dataclass(frozen=True)
class Architecture:
    """A compute capability to compile for.

    `suffix` "a" or "f" asks for features that newer GPUs may lack; `ptx` adds code that newer GPUs can
    compile for themselves.
    """

    major: int
    minor: int
    suffix: str = ""
    ptx: bool = False

    @classmethod
    def parse(cls, text: str) -> "Architecture":
        """From "9.0", "9.0a" or "9.0+PTX". Raises ValueError for anything else."""
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", text)
        if match is None:
            raise ValueError(
                f'architecture: expected a compute capability such as 8.0 or 9.0+PTX, got "{text}"'
            )
        return cls(int(match[1]), int(match[2]), match[3], match[4] is not None)

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}{self.suffix}{'+PTX' if self.ptx else ''}"

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of this compute capability can run the code."""
        if self.suffix == "a":
            return capability == (self.major, self.minor)
        if self.ptx and not self.suffix and capability >= (self.major, self.minor):
            return True
        return capability[0] == self.major and capability[1] >= self.minor

    def flags(self) -> list[str]:
        """What nvcc is told."""
        name = f"{self.major}{self.minor}{self.suffix}"
        codes = [f"sm_{name}", *([f"compute_{name}"] if self.ptx else [])]
        return [f"-gencode=arch=compute_{name},code={code}" for code in codes]


def architectures(named: list[str] | None = None) -> list[Architecture]:
    """Architectures to build for: those named, else TORCH_CUDA_ARCH_LIST, else those of the GPUs found.

    Those older than the kernels need (compute capability 8.0) are left out.

    Raises:
        ValueError: a name that is no architecture, or none that is new enough.
    """
    if not named:
        named = [name for name in re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "")) if name]
    if named:
        expanded = []
        for name in named:
            family, plus, ptx = name.partition("+")
            expanded += [f"{n}{plus}{ptx}" for n in FAMILIES[family]] if family in FAMILIES else [name]
        found = [Architecture.parse(name) for name in expanded]
    else:
        found = [Architecture(*capability) for capability in _capabilities()]
    new = sorted({a for a in found if (a.major, a.minor) >= MIN_CAPABILITY}, key=str)
    if not new and found:
        raise ValueError(f"expected compute capability 8.0 or newer, got {', '.join(map(str, found))}")
    if not new:
        raise ValueError("no GPU found: name architectures with --arch or TORCH_CUDA_ARCH_LIST")
    return new


def _capabilities() -> list[tuple[int, int]]:
    if not torch.cuda.is_available():
        return []
    return sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})


def source_folder() -> Path:
    """Where the C++ and CUDA sources lie: inside the package in a wheel, beside it in a checkout.

    Raises:
        BuildError: they are in neither place.
    """
    package = Path(__file__).parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "planner.cpp").exists():
            return folder
    raise BuildError(f"the sources are missing: there is no csrc in {package} or beside it")


def cache_folder() -> Path:
    """Where builds are kept unless `--out` says otherwise.

    Raises:
        BuildError: no variable names a folder, and there is no home directory.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(root or Path.home() / ".cache") / "dbpkern"
    except RuntimeError as error:
        raise BuildError("there is no home directory to keep builds in: set TORCH_EXTENSIONS_DIR") from error


def _digest(*parts: object) -> str:
    text = hashlib.sha256()
    for part in parts:
        text.update(part if isinstance(part, bytes) else str(part).encode())
        text.update(b"\0")
    return text.hexdigest()[:16]


def fingerprint() -> dict[str, str]:
    """What a library must have been built from and for, beside its architectures, to be loaded here."""
    files = sorted(f for f in source_folder().iterdir() if f.suffix in (".h", ".cuh", ".cu", ".cpp"))
    return {
        "sources": _digest(*(part for f in files for part in (f.name, f.read_bytes()))),
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "machine": platform.machine(),
    }


def mismatch(folder: Path, capabilities: list[tuple[int, int]]) -> str | None:
    """Why the library in `folder` must not be loaded here, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        built_for = [Architecture.parse(name) for name in manifest["architectures"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder} holds no build of the extension ({error})"
    for name, here in fingerprint().items():
        if manifest.get(name) != here:
            return f"the build in {folder} is of {name} {manifest.get(name)}, this is {here}"
    for capability in capabilities:
        if not any(a.runs_on(capability) for a in built_for):
            names = ", ".join(map(str, built_for))
            return f"the build in {folder} is for {names}, a GPU here has {capability[0]}.{capability[1]}"
    return None


def _find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        nvcc = Path(home, "bin", "nvcc")
        if not nvcc.exists():
            raise ToolMissing(f"nvcc is missing: CUDA_HOME names {home}, which holds no bin/nvcc")
        return str(nvcc)
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        raise ToolMissing("nvcc is missing: install the CUDA toolkit, or set CUDA_HOME to where it is")
    return nvcc


def _find_ninja() -> str:
    ninja = shutil.which("ninja")
    if ninja is None and importlib.util.find_spec("ninja"):
        import ninja as package

        # A folder of that name in the working directory passes for a package.
        ninja = shutil.which("ninja", path=getattr(package, "BIN_DIR", None))
    if ninja is None:
        raise ToolMissing("ninja is missing: pip install ninja")
    return ninja


def _find_compiler() -> str:
    words = shlex.split(os.environ.get("CXX", ""))
    if words and Path(words[0]).name in LAUNCHERS:
        words = words[1:]  # nvcc takes a program alone, and one build needs no cache
    if len(words) > 1:
        raise BuildError(f"CXX: expected a compiler without options, got {os.environ['CXX']!r}")
    for name in words or ("c++", "g++", "clang++"):
        if shutil.which(name):
            return name
    if words:
        raise ToolMissing(f"a C++ compiler is missing: CXX names {words[0]}, which is not found")
    raise ToolMissing("a C++ compiler is missing: install g++, or set CXX")


def _run(command: list[str], what: str, scratch: str | None = None) -> str:
    """Output of a command, whose temporary files lie in `scratch`.

    Raises BuildError with its first error line; the rest goes to a log file.
    """
    # nvcc names temporary files by process id, which containers that share their folder can share too.
    environment = {**os.environ, **({"TMPDIR": scratch} if scratch else {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    try:
        done = subprocess.run(command, env=environment, check=False, **pipes)
    except OSError as error:
        raise BuildError(f"{what} did not start: {error}") from error
    if done.returncode == 0:
        return done.stdout
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    first = next(
        (line for line in lines if re.search(r"\berror\b|fatal|not found", line, re.I)), "".join(lines[-1:])
    )
    whole = ""
    with contextlib.suppress(OSError, BuildError):
        log = cache_folder() / "failed.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(" ".join(command) + "\n" + done.stdout, errors="replace")
        whole = f" (all of it: {log})"
    raise BuildError(f"{what} failed with status {done.returncode}: {first}{whole}")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time builds in `folder`; the others wait and then find what it built."""
    try:
        import fcntl  # not on every platform that the rest of the package runs on
    except ImportError as error:
        raise BuildError(f"builds need file locks, which {platform.system()} lacks: {error}") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise BuildError(f"cannot write to {folder}: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks
            raise BuildError(
                f"cannot lock {folder}: {error}; set TORCH_EXTENSIONS_DIR to another file system"
            ) from error
        yield


def _install(folder: Path, make: Callable[[Path], None]) -> None:
    """Let `make` fill a new folder, then put it in the place of `folder` in one step."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=folder.parent) as scratch:
            new = Path(scratch, "new")
            new.mkdir()
            make(new)
            if folder.exists():
                folder.rename(Path(scratch, "old"))
            new.rename(folder)
    except OSError as error:
        raise BuildError(f"cannot build in {folder.parent}: {error}") from error


def parse_resources(output: str) -> list[dict[str, object]]:
    """What `ptxas -v` says of each kernel: registers, bytes of stack and of spills.

    Returns:
        A row a kernel and architecture, with the template arguments by name: `element` ("bf16" or "fp32"),
        `rank` (padded) and `tile`.

    Raises:
        BuildError: there is no kernel in it, or it is worded in another way.
    """
    rows = []
    for part in output.split("Compiling entry function '")[1:]:
        name, _, rest = part.partition("'")
        template = re.search(r"ConfigI(?:NS_4(Bf16)E|f)Li(\d+)ELi(\d+)E", name)
        target = re.match(r" for '(\w+)'", rest)
        spills = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", rest
        )
        registers = re.search(r"Used (\d+) registers", rest)
        if not (template and target and spills and registers):
            raise BuildError(f"ptxas said something else than expected of {name}")
        rows.append(
            {
                "architecture": target[1],
                "element": "bf16" if template[1] else "fp32",
                "rank": int(template[2]),
                "tile": int(template[3]),
                "registers": int(registers[1]),
                "stack": int(spills[1]),
                "spill_stores": int(spills[2]),
                "spill_loads": int(spills[3]),
            }
        )
    if not rows:
        raise BuildError("ptxas named no kernel")
    return sorted(rows, key=lambda row: tuple(str(row[key]).rjust(8) for key in list(row)[:4]))


def _release(nvcc: str) -> str:
    release = re.search(r"release (\d+\.\d+)", _run([nvcc, "--version"], "nvcc --version"))
    if release is None:
        raise BuildError(f"{nvcc} --version names no release")
    return release[1]


def nvcc_release() -> str | None:
    """CUDA version of the nvcc that a build would use, such as "13.0"; None where there is none that runs."""
    try:
        return _release(_find_nvcc())
    except BuildError:
        return None


def _check_toolkit(nvcc: str) -> str:
    """Version of nvcc, which must be of the CUDA that torch is built for, to the major version."""
    if torch.version.cuda is None:
        raise BuildError("this torch is built without CUDA")
    release = _release(nvcc)
    if release.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise BuildError(f"nvcc is of CUDA {release}, torch of CUDA {torch.version.cuda}")
    return release


def _torch_headers() -> list[Path]:
    # torch.utils.cpp_extension knows them too, but warns on import where there is no GPU.
    include = Path(torch.__file__).with_name("include")
    return [include, include / "torch/csrc/api/include"]


def _ninja_file(nvcc: str, targets: list[Architecture]) -> str:
    def path(text: object) -> str:
        return re.sub(r"([$: ])", r"$\1", str(text))

    def command(parts: list[str]) -> str:
        return shlex.join(parts).replace("$", "$$")

    host = [f"-ccbin={_find_compiler()}"] if os.environ.get("CXX") else []
    shared = [*host, "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    gencode = [flag for target in targets for flag in target.flags()]
    cuda = [*shared, "-std=c++17", "-Xptxas=-v", f"--threads={len(gencode)}", *gencode]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    # The newest torch headers need C++20.
    cxx = [*shared, "-std=c++20", abi, *(f"-isystem={folder}" for folder in _torch_headers())]
    libraries = [f"-L{Path(torch.__file__).with_name('lib')}"]
    libraries += [f"-l{name}" for name in ("torch", "torch_cpu", "torch_cuda", "c10", "c10_cuda")]
    # Torch's own CUDA runtime, already loaded, must serve: the current device is a state of the runtime.
    link = [*host, "-shared", "-cudart=shared", *libraries]
    lines = [
        "rule compile\n  command = $nvcc $flags -c $in -o $out",
        "rule link\n  command = $nvcc $in $flags -o $out",
        f"nvcc = {command([nvcc])}",
    ]
    csrc, objects = source_folder(), []
    for name, flags in (("lowrank_statistics.cu", cuda), ("planner.cpp", shared), ("bindings.cpp", cxx)):
        objects.append(f"{Path(name).stem}.o")
        lines.append(f"build {objects[-1]}: compile {path(csrc / name)}\n  flags = {command(flags)}")
    lines.append(f"build {LIBRARY}: link {' '.join(objects)}\n  flags = {command(link)}")
    return "\n".join(lines) + "\n"


def build(targets: list[Architecture], folder: Path) -> None:
    """Build the library for these architectures into `folder`, which is replaced in one step.

    What the compilers said is kept beside it.

    Raises:
        BuildError: a tool is missing or failed, or `folder` holds something else.
    """
    nvcc, ninja = _find_nvcc(), _find_ninja()
    release = _check_toolkit(nvcc)
    try:
        foreign = folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).exists()
    except OSError as error:
        raise BuildError(f"cannot build in {folder}: {error}") from error
    if foreign:
        raise BuildError(f"{folder} holds something else: name another folder")
    # A warning, which Python shows unless told otherwise: the first training step may be waiting.
    _log.warning("building the CUDA extension for %s, about half a minute", ", ".join(map(str, targets)))

    def make(new: Path) -> None:
        with tempfile.TemporaryDirectory() as objects:
            Path(objects, "build.ninja").write_text(_ninja_file(nvcc, targets))
            output = _run([ninja, "-C", objects], "the build", scratch=objects)
            shutil.copy(Path(objects, LIBRARY), new)
        manifest = {
            **fingerprint(),
            "architectures": [str(target) for target in targets],
            "nvcc": release,
        }
        (new / LOG).write_text(output, errors="replace")
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1))

    _install(folder, make)


def _build_in_cache(targets: list[Architecture]) -> Path:
    """Where the library for these architectures lies, which is built unless it is there already."""
    names = "_".join(map(str, targets))
    folder = cache_folder() / f"{names}-{_digest(fingerprint(), names)}"
    with _locked(cache_folder()):
        if mismatch(folder, []) is not None:
            build(targets, folder)
    return folder


@dataclass(frozen=True)
class _Decision:
    ops: object | None
    reason: str
    level: int = logging.INFO


def _open(folder: Path) -> _Decision:
    try:
        built_for = json.loads((folder / MANIFEST).read_text())["architectures"]
        torch.ops.load_library(folder / LIBRARY)
    except (OSError, RuntimeError) as error:
        return _Decision(None, f"the library in {folder} did not load: {error}", logging.WARNING)
    return _Decision(torch.ops.dbpkern_cuda, f"{folder} serves, built for {', '.join(built_for)}")


def _find(capabilities: list[tuple[int, int]]) -> Path | None:
    """A build in the cache that fits this process."""
    folders = sorted(manifest.parent for manifest in cache_folder().glob(f"*/{MANIFEST}"))
    return next((folder for folder in folders if mismatch(folder, capabilities) is None), None)


def _choose() -> _Decision:
    setting = os.environ.get("DBPKERN_EXTENSION", "")
    if setting == "0":
        return _Decision(None, "DBPKERN_EXTENSION=0")
    if torch.version.cuda is None:
        return _Decision(None, "this torch is built without CUDA")
    found = _capabilities()
    # An older GPU, for the display perhaps, keeps no other from being served.
    capabilities = [capability for capability in found if capability >= MIN_CAPABILITY]
    if found and not capabilities:
        best = "{}.{}".format(*found[-1])
        return _Decision(None, f"the GPUs here have at most compute capability {best}, 8.0 is needed")
    if setting:
        unfit = mismatch(Path(setting), capabilities)
        return _Decision(None, unfit, logging.WARNING) if unfit else _open(Path(setting))
    folder = _find(capabilities)
    if folder is None and not capabilities:
        return _Decision(None, "there is no GPU, and no build for this version of torch")
    if folder is None:
        targets = architectures()
        for capability in capabilities:
            if not any(target.runs_on(capability) for target in targets):
                reason = "TORCH_CUDA_ARCH_LIST leaves out compute capability {}.{}".format(*capability)
                return _Decision(None, reason, logging.WARNING)
        folder = _build_in_cache(targets)
    return _open(folder)


def _decide() -> _Decision:
    try:
        return _choose()
    except ToolMissing as error:
        return _Decision(None, str(error))
    except (BuildError, ValueError) as error:
        return _Decision(None, str(error), logging.WARNING)
    # Whatever a file system, a driver or an import comes up with: PyTorch can serve, so training goes on.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return _Decision(None, reason, logging.WARNING)


_guard = threading.Lock()
_decision: _Decision | None = None


def _decided() -> _Decision:
    global _decision
    if _decision is None:
        with _guard:
            if _decision is None:
                made = _decide()
                head = "CUDA extension" if made.ops is not None else "no CUDA extension, PyTorch serves"
                _log.log(made.level, "%s: %s", head, made.reason)
                _decision = made
    return _decision


def load() -> object | None:
    """The extension's operators, or None where it cannot serve; decided once a process, with one log line.

    A build that fits the sources, torch, CUDA and the GPUs of compute capability 8.0 and newer is loaded;
    else one is made, where there is nvcc and such a GPU, which a log line of its own says first. Any failure
    gives None and its reason in `why()`.

    Returns:
        The namespace with `lowrank_statistics(x [L, n, d], Q [L, d, r]) -> (B, Y, c)`. It raises ValueError
        for tensors on an older GPU.
    """
    return _decided().ops


def _outlook() -> tuple[str, str]:
    if _decision is not None:
        return ("not available" if _decision.ops is None else "loaded"), _decision.reason
    setting = os.environ.get("DBPKERN_EXTENSION", "")
    if setting == "0":
        return "not available", "DBPKERN_EXTENSION=0"
    if torch.version.cuda is None:
        return "not available", "this torch is built without CUDA"
    try:
        if setting:
            unfit = mismatch(Path(setting), [])
            if unfit:
                return "not available", unfit
        folder = Path(setting) if setting else _find([])
        if folder is not None:
            return "built", f"not used yet: the build in {folder} fits"
        nvcc, _ = _find_nvcc(), _find_ninja()
    except Exception as error:  # as in `_decide`
        return "not available", str(error) or type(error).__name__
    return "not built", f"not used yet: the first use on a GPU builds it with {nvcc}"


def state() -> str:
    """In a word: "loaded", "built", "not built" (the first use would) or "not available".

    It neither builds nor loads anything, nor looks for GPUs: before the first use it says what that would
    find.
    """
    return _outlook()[0]


def why() -> str:
    """What serves and why: where the library was loaded from, or why there is none.

    Before the first use, what that would find; like `state` it does not build or load.
    """
    return _outlook()[1]


@functools.cache
def load_planner() -> ModuleType:
    """The host-side planner as a Python module, for tests and reports. Needs a C++ compiler, no CUDA.

    Raises:
        BuildError: the compiler is missing or failed.
    """
    csrc = source_folder()
    files = [csrc / name for name in ("planner.cpp", "planner_module.cpp")]
    headers = [csrc / name for name in ("planner.h", "schedule.h", "tiling.h")]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    contents = [f.read_bytes() for f in (*files, *headers)]
    folder = cache_folder() / f"planner-{_digest(torch.__version__, suffix, *contents)}"
    library = folder / f"{PLANNER}{suffix}"

    def make(new: Path) -> None:
        includes = [*_torch_headers(), sysconfig.get_paths()["include"]]
        flags = ["-std=c++17", "-O0", "-fPIC", "-shared", "-fvisibility=hidden"]
        command = [_find_compiler(), *flags, *(f"-I{folder}" for folder in includes), *map(str, files)]
        _run([*command, "-o", str(new / library.name)], "the planner's build")

    if not library.exists():
        with _locked(cache_folder()):
            if not library.exists():
                _install(folder, make)
    spec = importlib.util.spec_from_file_location(PLANNER, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _report(folder: Path) -> bool:
    """Print the kernels of a build; whether none spills registers."""
    rows = parse_resources((folder / LOG).read_text())
    shared = torch.ops.dbpkern_cuda.shared_memory
    heads = [*rows[0], "shared"]
    print("  ".join(heads))
    for row in rows:
        row["shared"] = shared({"bf16": 2, "fp32": 4}[row["element"]], row["rank"], row["tile"])
        print("  ".join(f"{row[head]:>{len(head)}}" for head in heads))
    return all(row["spill_stores"] == row["spill_loads"] == 0 for row in rows)


def main(arguments: list[str] | None = None) -> int:
    """Build ahead of time and report registers, shared memory and spills of each kernel.

    Returns:
        0, or 1 where the build or its loading failed or a kernel spills registers; with `--check` also where
        that cannot be read from what ptxas says.
    """
    parser = argparse.ArgumentParser(
        prog="python -m dbpkern.extension", description="Build the CUDA extension."
    )
    parser.add_argument(
        "--arch",
        nargs="+",
        metavar="X.Y",
        help="such as 8.0 or 9.0+PTX; default: TORCH_CUDA_ARCH_LIST, else the GPUs found",
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--out",
        type=lambda text: Path(text).absolute(),
        help="folder for the build; then set DBPKERN_EXTENSION to it",
    )
    place.add_argument("--check", action="store_true", help="keep nothing, only report")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        try:
            targets = architectures(options.arch)
            if options.out or options.check:
                folder = options.out or Path(stack.enter_context(tempfile.TemporaryDirectory()), "build")
                build(targets, folder)
            else:
                folder = _build_in_cache(targets)
        except (OSError, RuntimeError, ValueError) as error:
            print(error, file=sys.stderr)
            return 1
        opened = _open(folder)
        if opened.ops is None:
            print(opened.reason, file=sys.stderr)
            return 1
        try:
            sound = _report(folder)
            if not sound:
                print("registers are spilled to memory", file=sys.stderr)
        except (BuildError, OSError) as error:
            print(f"registers and spills are not known: {error}", file=sys.stderr)
            sound = not options.check
        if not options.check:
            print(opened.reason)
        return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
