"""`ops.choose_rates_`: caution, eta and the limiter."""

import pytest
import torch
from checks import BACKENDS, DEVICE, SERVED, close, launches, tensor

from dbpkern import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned")
NAN, INF = float("nan"), float("inf")
BOTH = [(backend, dtype) for backend, dtype in SERVED if dtype.itemsize >= 4]


def state(L, dtype=torch.float32):
    """Caution, rates that nobody has written, and mean squares of 1,100 features."""
    caution = 0.5 + torch.rand(L, device=DEVICE, dtype=dtype)
    return caution, torch.empty_like(caution), tensor(L, 1100, dtype=dtype).square()


@pytest.mark.parametrize("eta", [0, 0.3, "tensor", "on the device"])
@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("L", [0, 1, 5])
@pytest.mark.parametrize(("backend", "dtype"), BOTH)
def test_rates(backend, dtype, L, limit, eta):
    value = 0.3 if isinstance(eta, str) else eta
    if isinstance(eta, str):
        eta = torch.tensor(0.3, dtype=dtype, device=DEVICE if "device" in eta else "cpu")
    caution, rates, a = state(L, dtype)
    bound = None if limit is None else torch.logspace(-3, 2, L, device=DEVICE, dtype=dtype)
    expected = reference.choose_rates(caution, a, bound, value, limit)
    assert ops.choose_rates_(caution, rates, a, bound, eta, limit, backend=backend) is rates
    for actual, wanted in zip((caution, rates), expected, strict=True):
        close(actual, wanted)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize(("backend", "dtype"), BOTH)
def test_a_layer_that_is_not_finite_rests_and_is_trusted_less(backend, dtype, limit, bad):
    caution, rates, a = state(3, dtype)
    before = caution.clone()
    a[1, 1099] = bad
    bound = None if limit is None else torch.zeros(3, dtype=dtype, device=DEVICE)
    ops.choose_rates_(caution, rates, a, bound, 0.1, limit, backend=backend)
    close(rates, torch.tensor([before[0] * 0.1, 0.0, before[2] * 0.1], device=DEVICE))
    close(caution, torch.stack([before[0], before[1] / 2, before[2]]))


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_beyond_the_range_rests(backend):
    caution, rates, a = state(1)
    ops.choose_rates_(caution, rates, a.fill_(1e38), None, 0.1, backend=backend)
    assert not rates.any()


@pytest.mark.parametrize("bound", [0.0, 1e-45, INF])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bounds_of_every_size(backend, bound):
    caution, rates, a = state(1)
    ops.choose_rates_(caution, rates, a, torch.full((1,), bound, device=DEVICE), 0.1, 0.5, backend=backend)
    close(rates, torch.zeros_like(rates) if bound == INF else 0.1 * caution)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mean_squares_of_any_strides(backend):
    caution, rates, a = state(3)
    a = torch.stack([a, torch.full_like(a, NAN)], 2)[..., 0].T.contiguous().T
    ops.choose_rates_(caution, rates, a, None, 0.1, backend=backend)
    close(rates, 0.1 * caution)


def test_one_launch():
    caution, rates, a = state(3)
    bound = torch.ones_like(caution)
    assert launches(lambda: ops.choose_rates_(caution, rates, a, bound, 0.1, 0.5, backend="triton")) == [
        "rates_kernel"
    ]
