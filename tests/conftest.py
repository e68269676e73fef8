"""What every test shares: one thread, so that sums do not depend on the machine, and a fixed seed.

Without a GPU the Triton kernels run in Triton's interpreter, and tests marked `gpu` are skipped: the summary
says how many.
"""

import gc
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when dbpkern defines its kernels, so before it is imported

# Older PyTorch refuses cuBLAS under deterministic algorithms without it; read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_terminal_summary(terminalreporter):
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if "needs a CUDA GPU" in str(r.longrepr)]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} GPU tests did not run: there is no CUDA GPU", yellow=True
        )


@pytest.fixture(scope="module", autouse=True)
def _collect():
    """What a module's tests leave behind is collected under its filters of warnings, not the next one's."""
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Fill what `torch.empty` returns with NaN: whoever reads memory that nobody wrote is found out."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
