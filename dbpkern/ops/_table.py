"""Tables of addresses, through which one launch serves tensors that lie anywhere."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from dbpkern.ops._dispatch import on_device

# A step uses one or two tables for each group of equal layers.
_KEPT = 64
_tables: OrderedDict[tuple, Tensor] = OrderedDict()


def address(t: Tensor) -> int:
    """Where t lies in memory; 0 for a tensor without any."""
    return t.data_ptr() if on_device(t) else 0


def _written(columns: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    numbers = [number for column in columns for number in column]
    table = torch.zeros(len(numbers), dtype=torch.int64, device=device)
    # The numbers travel as arguments of a kernel: no copy from pageable memory, for which the host would wait
    # and which a CUDA graph would repeat from memory that is gone.
    torch._foreach_add_(list(table.unbind()), numbers)
    return table.view(len(columns), -1)


def address_table(columns: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Columns of equal length as an int64 tensor `[columns, length]` on the device.

    Equal numbers give the table that was made for them before, on the same stream. A CUDA graph that is being
    captured makes its own, which it writes again at each replay.
    """
    if device.type != "cuda":
        return torch.tensor(columns, dtype=torch.int64, device=device)
    stream = 0
    if torch.cuda.is_initialized():  # not so where tensors are fake
        if torch.cuda.is_current_stream_capturing():
            return _written(columns, device)
        stream = torch.cuda.current_stream(device).cuda_stream
    key = (tuple(map(tuple, columns)), device, stream)
    if key not in _tables:
        _tables[key] = _written(columns, device)
        if len(_tables) > _KEPT:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    return _tables[key]
