"""What a bug report says about the machine."""

import platform
import subprocess
import sys

import pytest
import torch

import dbpkern
from dbpkern import env, extension

pytestmark = pytest.mark.filterwarnings("error")


def test_the_command_prints_versions():
    command = [sys.executable, "-m", "dbpkern.env"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    facts = {
        name: value.strip() for name, _, value in (line.partition(":") for line in done.stdout.splitlines())
    }
    assert facts.keys() == env.collect().keys()
    assert facts["dbpkern"] == dbpkern.__version__
    assert facts["python"] == platform.python_version()
    assert f"torch {env.collect()['packages']['torch']}," in facts["packages"]
    assert facts["cuda"] == (torch.version.cuda or "none")
    assert int(facts["cores"]) >= 1
    assert all(facts.values())


def test_versions_of_packages(monkeypatch):
    monkeypatch.setattr(env, "PACKAGES", ("torch", "no-such-package"))
    versions = env.collect()["packages"]
    assert torch.__version__.startswith(versions["torch"].partition("+")[0])
    assert versions["no-such-package"] is None


def test_missing_things_are_named(monkeypatch, capsys):
    monkeypatch.setattr(env, "PACKAGES", ("no-such-package",))
    monkeypatch.setattr(env, "_gpus", list)
    monkeypatch.setattr(env, "_driver", lambda: None)
    env.main()
    lines = capsys.readouterr().out.splitlines()
    assert "packages:    no-such-package missing" in lines
    assert "gpus:        none" in lines
    assert "driver:      none" in lines


def test_gpus_are_listed(monkeypatch, capsys):
    gpu = {"name": "Accelerator", "capability": "9.0", "memory_gib": 139.8, "processors": 132}
    monkeypatch.setattr(env, "_gpus", lambda: [gpu])
    env.main()
    assert (
        "gpus:        name Accelerator, capability 9.0, memory_gib 139.8, processors 132"
        in capsys.readouterr().out
    )


def test_the_extension_is_not_loaded(monkeypatch, capsys):
    monkeypatch.setattr(extension, "_decision", None)
    monkeypatch.setattr(extension, "load", lambda: pytest.fail("loaded the extension"))
    monkeypatch.setenv("DBPKERN_EXTENSION", "0")
    env.main()
    assert "extension:   DBPKERN_EXTENSION=0" in capsys.readouterr().out.splitlines()


def test_variables_that_change_what_dbpkern_does(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("UNRELATED_SECRET", "1")
    environment = env.collect()["environment"]
    assert environment["TRITON_INTERPRET"] == "1"
    assert "UNRELATED_SECRET" not in environment


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_commit_of_a_checkout(monkeypatch, tmp_path):
    package = tmp_path / "dbpkern"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(dbpkern, "__file__", str(package / "__init__.py"))
    assert env.commit() is None
    git(tmp_path, "init", "--quiet")
    assert env.commit() is None  # nothing committed yet
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert env.commit() == head
    (tmp_path / "untracked").write_text("")
    assert env.commit() == head
    (package / "__init__.py").write_text("changed")
    assert env.commit() == f"{head}+changes"
    monkeypatch.setenv("PATH", "")
    assert env.commit() is None  # no git
