"""`ops.sample_rows_` and `ops.sample_patches_`: sampled rows in their place and dtype."""

import pytest
import torch
import torch.nn.functional as F
from checks import BACKENDS, DEVICE, FLOATS, launches, tensor
from torch import nn

from dbpkern import ops, rows

pytestmark = pytest.mark.usefixtures("poisoned")

INPUTS = {
    "rows": lambda: tensor(40, 300),
    "one row": lambda: tensor(5),
    "tokens": lambda: tensor(3, 7, 19),
    "without the class token": lambda: tensor(3, 8, 19)[:, 1:],
    "channels first": lambda: tensor(3, 19, 7).mT,
    "images": lambda: tensor(2, 3, 4, 5),
    "images, channels first": lambda: tensor(2, 5, 3, 4).permute(0, 2, 3, 1),
    "one feature": lambda: tensor(9, 1),
    "no features": lambda: tensor(9, 0),
    "nothing": lambda: tensor(0, 4),
}


def place(n, d, dtype):
    """A part of a larger buffer, with the buffer."""
    buffer = torch.full((n + 2, d + 3), 7.0, dtype=dtype, device=DEVICE)
    return buffer[1 : n + 1, 1 : d + 1], buffer


def untouched(buffer, n, d):
    buffer[1 : n + 1, 1 : d + 1] = 7.0
    return (buffer == 7.0).all()


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", INPUTS)
def test_sample_rows(case, backend, dtype, out_dtype):
    if backend == "triton" and {dtype, out_dtype} == {torch.float16, torch.bfloat16}:
        pytest.skip("not mixed")
    x = INPUTS[case]().to(dtype)
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    n, d = flat.shape
    for index in (None, *([torch.randint(n, (11,), device=DEVICE)] if n else [])):
        count = n if index is None else 11
        out, buffer = place(count, d, out_dtype)
        assert ops.sample_rows_(out, x, index, backend=backend) is out
        assert torch.equal(out, (flat if index is None else flat[index]).to(out_dtype))
        assert untouched(buffer, count, d)


def test_rows_in_fp64():
    x, out = tensor(9, 5, dtype=torch.float64), torch.empty(3, 5, dtype=torch.float64, device=DEVICE)
    index = torch.tensor([8, 0, 8], device=DEVICE)
    assert torch.equal(ops.sample_rows_(out, x, index), x[index])


# kernel, stride, (left, right, top, bottom), dilation
CONVOLUTIONS = [
    ((2, 2), (2, 2), (0, 0, 0, 0), (1, 1)),
    ((3, 2), (2, 1), (1, 0, 2, 1), (1, 2)),
    ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
    ((3, 3), (1, 1), (1, 1, 1, 1), (2, 2)),
]


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 7, 9), (5, 7, 9), (0, 5, 7, 9)])
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), CONVOLUTIONS)
def test_sample_patches(shape, last, kernel, stride, padding, dilation, backend, out_dtype):
    x = tensor(*shape)
    if last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    images = x if x.dim() == 4 else x[None]
    d = 5 * kernel[0] * kernel[1]
    if len(images):
        patches = F.unfold(F.pad(images, padding), kernel, dilation, stride=stride).mT.reshape(-1, d)
    else:
        patches = x.new_empty(0, d)
    n = len(patches)
    for index in (None, *([torch.randint(n, (11,), device=DEVICE)] if n else [])):
        count = n if index is None else 11
        out, buffer = place(count, d, out_dtype)
        arguments = (kernel, stride, padding, dilation)
        assert ops.sample_patches_(out, x, index, *arguments, backend=backend) is out
        assert torch.equal(out, (patches if index is None else patches[index]).to(out_dtype))
        assert untouched(buffer, count, d)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", [0, (1, 2), "same"])
def test_patches_are_those_of_a_convolution(padding, backend):
    stride = 1 if padding == "same" else 2
    conv = nn.Conv2d(5, 4, (3, 2), stride, padding, dilation=(1, 2), device=DEVICE)
    x, index = tensor(2, 5, 8, 9), torch.tensor([3, 0, 11, 3], device=DEVICE)
    out = torch.empty(4, 30, device=DEVICE)
    margins = conv._reversed_padding_repeated_twice
    ops.sample_patches_(out, x, index, conv.kernel_size, conv.stride, margins, conv.dilation, backend=backend)
    unfolded = F.unfold(rows.pad(conv, x), conv.kernel_size, conv.dilation, stride=conv.stride)
    assert torch.equal(out, unfolded.mT.flatten(0, 1)[index])


@pytest.mark.parametrize("wrong", [-1, 12, 2**40])
def test_an_index_out_of_range(wrong):
    index = torch.tensor([3, wrong, 5], device=DEVICE)
    x, out = tensor(12, 7), torch.empty(3, 7, device=DEVICE)
    ops.sample_rows_(out, x, index, backend="triton")
    assert torch.equal(out[[0, 2]], x[[3, 5]])
    assert out[1].isnan().all()
    out = torch.empty(3, 4, device=DEVICE)
    ops.sample_patches_(out, tensor(1, 1, 4, 5), index, (2, 2), backend="triton")
    assert out[[0, 2]].isfinite().all()
    assert out[1].isnan().all()


def test_one_launch():
    out, x, index = torch.empty(3, 8, device=DEVICE), tensor(2, 9, 8), torch.arange(3, device=DEVICE)
    assert launches(lambda: ops.sample_rows_(out, x, index, backend="triton")) == ["rows_kernel"]
    images = tensor(2, 2, 4, 4)
    assert launches(lambda: ops.sample_patches_(out, images, index, (2, 2), backend="triton")) == [
        "patches_kernel"
    ]
