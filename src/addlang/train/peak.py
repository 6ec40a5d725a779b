"""How much memory tensors take on a CPU, where nothing else counts it; a GPU's allocator does."""

from __future__ import annotations

import gc
import os
from typing import Any

import torch
from torch import Tensor, nn

BEGIN = "addlang: peak begins"


def live_bytes() -> int:
    """Bytes of all CPU tensors that Python knows."""
    gc.collect()
    storages = {}
    for x in gc.get_objects():
        if type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu":
            storage = x.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Peak:
    """The most bytes of CPU tensors that are alive at once while this is open, as ``torch.cuda.max_memory_allocated`` on a GPU.

    The process's resident memory would also count what the C library keeps of what was freed: that differs by a
    quarter between two runs of one step.

    Attributes:
        bytes: after closing.
    """

    bytes: int

    def __enter__(self) -> Peak:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it writes to the terminal when it starts and stops
        self._profile: Any = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        )
        self._profile.__enter__()
        self.begin()
        return self

    def begin(self) -> None:
        """Forget what was before. A step that is measured should follow one that was watched too, because the profiler does not
        see how large a block was that was made before it came."""
        self._before = live_bytes()
        with torch.profiler.record_function(BEGIN):
            pass

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        events = self._profile.profiler.kineto_results.events()
        start = max(e.start_ns() for e in events if e.name() == BEGIN)
        changes = [e for e in events if e.name() == "[memory]" and e.start_ns() > start]
        live = most = self._before
        for change in sorted(changes, key=lambda e: e.start_ns()):
            live += change.nbytes()
            most = max(most, live)
        self.bytes = most
