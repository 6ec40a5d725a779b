"""Write a one-dimensional ``.npy`` file whose length is not known beforehand."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class NpyStream:
    """Append arrays to a ``.npy`` file; ``size`` is the number of elements so far.

    numpy pads the header of a file so that its length can grow in place; the header is written once more at the end.
    """

    def __init__(self, path: Path, dtype: DTypeLike) -> None:
        self.size = 0
        self._dtype = np.dtype(dtype)
        self._file: IO[bytes] = path.open("wb")
        self._header_bytes = self._header()

    def _header(self) -> int:
        self._file.seek(0)
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self.size,)}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()

    def write(self, values: NDArray[Any]) -> None:
        """Append (n,) values; they must fit into the type of the file."""
        if values.dtype.itemsize > self._dtype.itemsize and values.size:
            limits = np.iinfo(self._dtype)
            assert limits.min <= int(values.min()) <= int(values.max()) <= limits.max, (
                f"value does not fit {self._dtype}"
            )
        self._file.write(np.ascontiguousarray(values, dtype=self._dtype).data)
        self.size += len(values)

    def __enter__(self) -> NpyStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            assert self._header() == self._header_bytes, "the header of a .npy file changed its length"
        self._file.close()
