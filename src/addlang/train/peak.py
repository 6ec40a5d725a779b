"""How much memory this process really needs, on machines where only a GPU counts for itself."""

from __future__ import annotations

import ctypes
import platform
import threading
import time
from pathlib import Path


def resident_bytes() -> int:
    """Memory of this process that is in use now, after what was freed is given back to the system."""
    if platform.system() == "Linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    return 0


class Peak:
    """Largest resident memory while open, sampled every 2 ms: the kernel's own high-water mark cannot be reset here."""

    def __enter__(self) -> Peak:
        self.bytes, self._open = 0, True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._open:
            self.bytes = max(self.bytes, int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self._open = False
        self._thread.join()
