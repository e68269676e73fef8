"""`ops.fused_step`: every row decorrelated, and the R of the next step from a sample of them."""

import pytest
import torch
from checks import (
    BACKENDS,
    DEVICE,
    HALVES,
    KAPPAS,
    LAYOUTS,
    accumulator,
    as_good,
    close,
    launches,
    matrix,
    tensor,
)

from dbpkern import ops, reference
from dbpkern.ops import _dispatch

pytestmark = pytest.mark.usefixtures("poisoned", "small_tiles")
# (n, samples, d)
SHAPES = [(1, 1, 1), (5, 2, 7), (35, 40, 33), (50, 20, 16)]


def draw(n, samples):
    return torch.randint(n, (samples,), device=DEVICE)


def peers(x, R, index, kappa, backend):
    """What PyTorch makes of it with the operands that a backend takes."""
    if backend == "eager":
        compute = torch.promote_types(x.dtype, R.dtype)
        z, R_new, a = reference.fused_step(x.to(compute), R.to(compute), index, 0.05, kappa)
        return z.to(x.dtype), R_new.to(R.dtype), a.to(R.dtype)
    kind = _dispatch.operands(x.dtype, R.dtype)
    held = torch.bfloat16 if kind.dtype in HALVES else kind.dtype

    def times(A, R, dtype):  # the operands are A and what R differs from the identity by
        A = A.to(dtype).float()
        return A + A @ (R - torch.eye(len(R), device=DEVICE)).to(dtype).float()

    z = times(x, R.mT, kind.dtype).to(x.dtype)
    sample = z[index].float()
    a = sample.square().mean(0)
    G = times(sample.mT @ x[index].float() / len(index), R.mT, held)
    M = (1 - kappa) * (G - torch.diag(G.diagonal())) + kappa * torch.diag(a - 1)
    return z, R - 0.05 * times(M, R, held), a


@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "samples", "d"), SHAPES)
def test_fused_step(n, samples, d, backend, dtype, kappa):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton does not serve float64")
    x, R = tensor(n, d, dtype=dtype), matrix(d, d, dtype=accumulator(dtype))
    before, index = R.clone(), draw(n, samples)
    found = ops.fused_step(x, R, index, 0.05, kappa, backend=backend)
    exact = reference.fused_step(x.double(), R.double(), index, 0.05, kappa)
    for parts in zip(found, exact, peers(x, R, index, kappa, backend), strict=True):
        as_good(*parts)
    assert torch.equal(R, before)


@pytest.mark.parametrize("eta", [0.1, 0, torch.tensor(0.1), "on the device"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_etas(backend, eta):
    x, R, index = tensor(20, 9), matrix(9, 9), draw(20, 12)
    eta = torch.tensor(0.1, device=DEVICE) if isinstance(eta, str) else eta
    _, R_new, _ = ops.fused_step(x, R, index, eta, 0.3, backend=backend)
    close(R_new, reference.fused_step(x, R, index, float(eta), 0.3)[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend):
    x, R, index = tensor(1, 40, 19), matrix(1, 19, 19), draw(40, 21)
    expected = ops.fused_step(x[0], R[0], index, 0.1, 0.3, backend=backend)
    found = ops.fused_step(layout(x)[0][0], layout(R)[0][0], index, 0.1, 0.3, backend=backend)
    for one, other in zip(found, expected, strict=True):
        close(one, other)
        assert one.is_contiguous()


@pytest.mark.parametrize("size", [400.0, 1e-4])
def test_squares_beyond_the_range_of_fp16(size):
    x, R = (size * tensor(40, 20)).half(), matrix(20, 20)
    index, eta = torch.arange(40, device=DEVICE), 0.05 / size**2
    found = ops.fused_step(x, R, index, eta, backend="triton")[1]
    torch.testing.assert_close(found, ops.fused_step(x, R, index, eta, backend="eager")[1], rtol=0, atol=2e-3)
    assert (found - R).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", HALVES)
def test_nothing_draws_R_when_the_samples_are_white(dtype):
    """G = I and M = 0: R stays, though 16-bit operands know it by its rounded value alone."""
    R = 1.003 * torch.eye(16, device=DEVICE) + 0.0017
    white = 8 * torch.linalg.qr(tensor(64, 16)).Q
    x, index = torch.linalg.solve(R, white.T).T.to(dtype), torch.arange(64, device=DEVICE)
    expected = new = R
    for _ in range(4):
        expected = ops.fused_step(x, expected, index, 0.2, backend="eager")[1]
        new = ops.fused_step(x, new, index, 0.2, backend="triton")[1]
    torch.testing.assert_close(new, expected, rtol=0, atol=3e-3)
    assert (new - expected).diagonal().mean().abs() < 1e-4


@pytest.mark.parametrize("wrong", [-1, 40, 2**40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_index_out_of_range(dtype, wrong):
    x, R = tensor(40, 20, dtype=dtype), matrix(20, 20)
    index = torch.tensor([3, wrong, 5], device=DEVICE)
    z, R_new, a = ops.fused_step(x, R, index, 0.1, backend="triton")
    assert torch.equal(z, ops.transform(x, R, backend="triton"))
    assert R_new.isnan().all()
    assert a.isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("samples", [5, 30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_that_are_not_finite_show(backend, samples, bad):
    x, R = tensor(40, 20), matrix(20, 20)
    x[3, 7] = bad
    _, R_new, a = ops.fused_step(x, R, torch.arange(samples, device=DEVICE), 0.1, backend=backend)
    assert not R_new.isfinite().all()
    assert not a.isfinite().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_samples_change_nothing(backend):
    x, R = tensor(9, 20), matrix(20, 20)
    index = torch.arange(0, device=DEVICE)
    z, R_new, a = ops.fused_step(x, R, index, 0.1, 0.3, backend=backend)
    close(z, x @ R.T)
    assert torch.equal(R_new, R)
    assert not a.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend):
    x, R, dz = tensor(9, 20).requires_grad_(), matrix(20, 20), tensor(9, 20)
    z, R_new, a = ops.fused_step(x, R, draw(9, 4), 0.1, backend=backend)
    (dx,) = torch.autograd.grad(z, x, dz)
    close(dx, dz @ R)
    assert not R_new.requires_grad
    assert not a.requires_grad
    x = tensor(7, 4, dtype=torch.float64).requires_grad_()
    R, index = matrix(4, 4, dtype=torch.float64), draw(7, 3)
    assert torch.autograd.gradcheck(lambda x: ops.fused_step(x, R, index, 0.1, 0.3, backend="eager")[0], x)


def test_one_launch_that_repeats_itself_bit_for_bit():
    x, R, index = tensor(50, 37, dtype=torch.bfloat16), matrix(37, 37), draw(50, 30)
    assert launches(lambda: ops.fused_step(x, R, index, 0.1, backend="triton")) == ["fused_kernel"]
    first, again = (ops.fused_step(x, R, index, 0.1, backend="triton") for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_wider_samples_than_R_keep_their_precision():
    x, R, index = tensor(20, 6, dtype=torch.float64), matrix(6, 6), draw(20, 5)
    z, R_new, a = ops.fused_step(x, R, index, 0.1)
    close(z, x @ R.double().mT)
    assert R_new.dtype == a.dtype == torch.float32
