"""Compilers that tests need: where one is missing, they are skipped, or fail in CI."""

import os
import shutil

import pytest


def require(tool, found):
    """Skip, or fail in CI, where a tool is missing."""
    if not found:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{tool} is missing")


def compiler():
    """A C++ compiler."""
    found = os.environ.get("CXX") or "c++"
    require(found, shutil.which(found))
    return found
