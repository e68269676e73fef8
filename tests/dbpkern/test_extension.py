"""The CUDA extension from Python: when it is loaded, for which GPUs it is built, and why it is not."""

import logging
import subprocess

import pytest
import torch
from compilers import compiler

from dbpkern import extension


@pytest.fixture
def undecided(monkeypatch, tmp_path):
    """As in a new process, with an empty cache of builds, no GPU and no variable set."""
    monkeypatch.setattr(extension, "_decision", None)
    monkeypatch.setattr(extension, "capabilities", list)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    for name in ("DBPKERN_EXTENSION", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CXX"):
        monkeypatch.delenv(name, raising=False)


def pretend_build(name):
    """An empty library in the cache."""
    extension.cache().mkdir(parents=True, exist_ok=True)
    library = extension.cache() / name
    library.touch()
    return library


@pytest.mark.usefixtures("undecided")
class TestLoading:
    def test_left_out_by_the_environment(self, monkeypatch):
        monkeypatch.setenv("DBPKERN_EXTENSION", "0")
        pretend_build(f"{extension.key()}-sm_80.so")
        assert extension.why() == "DBPKERN_EXTENSION=0"
        assert extension.load() is None

    def test_without_a_build_nothing_is_compiled(self, monkeypatch, caplog):
        monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("started a program"))
        with caplog.at_level(logging.INFO, logger="dbpkern"):
            assert extension.load() is None
            assert extension.load() is None
        assert [record.getMessage() for record in caplog.records] == [f"CUDA extension: {extension.why()}"]
        assert extension.why().startswith(
            "no build for this torch and these GPUs: python -m dbpkern.extension"
        )

    @pytest.mark.parametrize("change", ["sources", "torch", "GPU"])
    def test_stale_builds_are_left_alone(self, monkeypatch, tmp_path, change):
        monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("loaded"))
        monkeypatch.setattr(extension, "SOURCES", tmp_path)
        monkeypatch.setattr(extension, "capabilities", lambda: [(8, 0), (9, 0)])
        (tmp_path / "kernel.cu").write_text("old")
        pretend_build(f"{extension.key()}-{'sm_90' if change == 'GPU' else 'sm_80+sm_90'}.so")
        if change == "sources":
            (tmp_path / "kernel.cu").write_text("new")
        elif change == "torch":
            monkeypatch.setattr(torch, "__version__", "2.0.0")
        assert extension.load() is None

    def test_a_fitting_build_is_loaded_once(self, monkeypatch):
        monkeypatch.setattr(extension, "capabilities", lambda: [(8, 6), (9, 0)])
        loaded = []
        monkeypatch.setattr(torch.ops, "load_library", loaded.append)
        library = pretend_build(f"{extension.key()}-sm_80+sm_90.so")
        assert extension.why() == "a build for sm_80, sm_90"
        assert loaded == []
        assert extension.load() is extension.load() is torch.ops.dbpkern_cuda
        assert loaded == [library]

    def test_a_library_that_does_not_load(self):
        library = pretend_build(f"{extension.key()}-sm_80.so")
        assert extension.load() is None
        assert extension.why().startswith(f"{library} did not load: ")


@pytest.mark.parametrize(
    ("code", "serves", "refuses"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(9, 0), (7, 5)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0)]),
        ("sm_100", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("compute_90", [(9, 0), (10, 0), (12, 1)], [(8, 9)]),
    ],
)
def test_what_runs_where(code, serves, refuses):
    assert all(extension.runs(code, capability) for capability in serves)
    assert not any(extension.runs(code, capability) for capability in refuses)


@pytest.mark.usefixtures("undecided")
class TestArchitectures:
    def test_where_they_come_from(self, monkeypatch):
        monkeypatch.setattr(extension, "capabilities", lambda: [(8, 6), (9, 0)])
        assert extension.codes() == ["sm_86", "sm_90"]
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.0, 9.0a+PTX Ampere+PTX Turing")
        assert extension.codes() == ["compute_86", "compute_90", "sm_80", "sm_86", "sm_90"]
        assert extension.codes("10.0") == ["sm_100"]

    @pytest.mark.parametrize("name", ["sm_90", "9", "9.0b", "90", "Kepler", "9.0+ptx", "+PTX"])
    def test_refuses_other_names(self, name):
        with pytest.raises(extension.BuildError, match="expected a compute capability such as"):
            extension.codes(name)

    @pytest.mark.parametrize(("name", "told"), [("7.5", "7.5"), ("", "no GPU")])
    def test_refuses_none(self, name, told):
        with pytest.raises(
            extension.BuildError, match=f"expected compute capability 8.0 or newer, got {told}"
        ):
            extension.codes(name)


def stub_nvcc(monkeypatch, folder, script="exit 1", release=torch.version.cuda):
    """A CUDA toolkit whose nvcc is a shell script."""
    nvcc = folder / "toolkit/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    version = f'[ "$1" = --version ] && {{ echo "Cuda compilation tools, release {release}, V1"; exit 0; }}'
    nvcc.write_text(f"#!/bin/sh\n{version}\n{script}\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(folder / "toolkit"))


@pytest.mark.usefixtures("undecided")
class TestFailures:
    """What `python -m dbpkern.extension` says where it cannot build; it ends with status 1."""

    def failure(self):
        with pytest.raises(SystemExit) as exit:
            extension.main(["--arch", "9.0"])
        assert not list(extension.cache().glob("*"))
        return exit.value.code

    def test_no_nvcc(self, monkeypatch, tmp_path):
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        assert self.failure().startswith(f"nvcc is missing in {tmp_path}/bin: install the CUDA toolkit")

    def test_no_compiler(self, monkeypatch, tmp_path):
        stub_nvcc(monkeypatch, tmp_path)
        monkeypatch.setenv("CXX", "ccache g++")
        assert self.failure().startswith('a C++ compiler is missing: there is no "ccache g++"')

    def test_nvcc_of_another_cuda(self, monkeypatch, tmp_path):
        stub_nvcc(monkeypatch, tmp_path, release="5.5")
        compiler()
        assert self.failure() == f"nvcc is of CUDA 5.5, torch of CUDA {torch.version.cuda}"

    def test_nvcc_fails(self, monkeypatch, tmp_path):
        stub_nvcc(monkeypatch, tmp_path, "echo nvcc fatal: out of order >&2; exit 3")
        compiler()
        assert self.failure() == "nvcc failed with status 3:\nnvcc fatal: out of order\n"

    @pytest.mark.parametrize("printed", ["0 bytes spill stores, 8 bytes spill loads", "in new words"])
    def test_spills(self, monkeypatch, capsys, tmp_path, printed):
        """They fail a check alone: the build serves."""
        monkeypatch.setattr(extension, "build", lambda folder, named: (tmp_path / "library", printed))
        monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
        with pytest.raises(SystemExit, match="registers are spilled"):
            extension.main(["--check"])
        extension.main([])
        assert capsys.readouterr().out.endswith(f"kernels compiled into {tmp_path / 'library'}\n")
