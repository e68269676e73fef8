"""`dbpkern::capture`: the operator by which a layer's backward leaves its rows."""

import pytest
import torch

from dbpkern import sampling

pytestmark = pytest.mark.filterwarnings("error")


class Everything:
    """A layer whose rows are its input's."""

    def count_rows(self, x):
        return len(x)

    def take_rows(self, x, index):
        return x.clone() if index is None else x[index]


def test_opcheck_of_capture():
    slot = sampling.Slot(Everything(), sampling.Sampler(1.0, 0), lambda: sampling.Rule.of(0.1, 0.0))
    torch.library.opcheck(torch.ops.dbpkern.capture.default, (torch.randn(4, 5), torch.randn(3, 5), slot.key))
    slot.clear()
    grad, x = torch.randn(4, 5), torch.randn(3, 5)
    before = grad.clone()
    torch.ops.dbpkern.capture(grad, x, slot.key)
    assert torch.equal(slot.gather(), x)
    assert torch.equal(grad, before)


def test_capture_for_a_slot_that_is_gone_does_nothing():
    key = sampling.Slot(Everything(), sampling.Sampler(1.0, 0), lambda: sampling.Rule.of(0.1, 0.0)).key
    assert key.item() not in sampling._slots
    torch.ops.dbpkern.capture(torch.randn(4, 5), torch.randn(3, 5), key)
