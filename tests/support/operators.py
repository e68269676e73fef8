"""Which operators of PyTorch run in a function, and which of them make the host wait."""

from torch.profiler import ProfilerActivity, profile

SYNCHRONISING = {
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::is_nonzero",
    "aten::equal",
}


def operators(function) -> list[str]:
    """Every operator that runs in `function`, also inside of others."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        function()
    return [event.name for event in recorded.events() if "::" in event.name]
