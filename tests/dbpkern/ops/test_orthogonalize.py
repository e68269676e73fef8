"""`ops.orthogonalize`: Muon's Newton-Schulz steps on stacks."""

import pytest
import torch
from checks import BACKENDS, DEVICE, LAYOUTS, SERVED, as_good, launches, tensor

from dbpkern import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned", "small_tiles")
# (L, o, d): wide, tall, square, one and none of each.
SHAPES = [(2, 20, 33), (2, 40, 17), (1, 16, 16), (2, 1, 5), (1, 7, 1), (0, 3, 4), (2, 0, 4), (2, 4, 0)]


def plain(X, steps=5, coefficients=(3.4445, -4.7750, 2.0315)):
    """Muon's steps by PyTorch's products in the dtype of X."""
    return reference.orthogonalize(X, steps, coefficients) if X.numel() else X


@pytest.mark.parametrize(("backend", "dtype"), SERVED)
@pytest.mark.parametrize(("L", "o", "d"), SHAPES)
def test_orthogonalize(L, o, d, backend, dtype):
    X = tensor(L, o, d, dtype=dtype)
    before = X.clone()
    found = ops.orthogonalize(X, backend=backend)
    as_good(found, plain(X.double()), plain(X))
    assert found.is_contiguous()
    assert torch.equal(X, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("o", "d"), [(20, 33), (33, 20), (32, 32)])
def test_it_is_what_muon_computes(o, d, backend):
    muon = pytest.importorskip("torch.optim._muon")
    X = tensor(2, o, d, dtype=torch.bfloat16)
    expected = torch.stack(
        [muon._zeropower_via_newtonschulz(x, (3.4445, -4.7750, 2.0315), 5, 1e-7) for x in X]
    )
    found = ops.orthogonalize(X, backend=backend)
    # A few of bf16's steps apart, where the rounding of a sum falls to the other side.
    torch.testing.assert_close(found, expected, rtol=0, atol=8 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_and_coefficients(backend, steps):
    X = tensor(2, 20, 33)
    found = ops.orthogonalize(X, steps, (2.0, -1.5, 0.5), backend=backend)
    as_good(found, plain(X.double(), steps, (2.0, -1.5, 0.5)), plain(X, steps, (2.0, -1.5, 0.5)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_singular_values_come_near_one(backend):
    values = torch.linalg.svdvals(ops.orthogonalize(tensor(2, 20, 60), backend=backend))
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize(("backend", "dtype"), SERVED)
def test_a_matrix_of_zeros_stays_zero(backend, dtype):
    X = tensor(2, 5, 7, dtype=dtype)
    X[1] = 0
    found = ops.orthogonalize(X, backend=backend)
    assert found.isfinite().all()
    assert not found[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_matrix_does_not_see_the_rest_of_the_stack(backend):
    X = tensor(2, 20, 33)
    whole = ops.orthogonalize(X, backend=backend)
    for i in range(2):
        torch.testing.assert_close(ops.orthogonalize(X[i : i + 1], backend=backend)[0], whole[i])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend):
    X = tensor(2, 9, 20)
    found = ops.orthogonalize(layout(X)[0], 2, backend=backend)
    torch.testing.assert_close(found, ops.orthogonalize(X, 2, backend=backend))


def test_two_launches_a_step():
    X = torch.randn(3, 20, 33, device=DEVICE)
    assert launches(lambda: ops.orthogonalize(X, 4, backend="triton")) == ["gram_kernel"] * 8
