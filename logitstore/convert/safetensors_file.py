"""Files of safetensors, mapped: a length, a JSON header, and the bytes of the tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from logitstore.convert.source import Input
from logitstore.encoding.ordinals import bfloat16_to_float32
from logitstore.errors import LogitStoreError, SourceError

_HEADER_LIMIT: Final = 100_000_000  # the format's own
_TYPES: Final = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mapped:
    """A tensor of a file.

    Attributes:
        values: its values, mapped; bfloat16 are bit patterns in uint16.
        bfloat16: whether they are bfloat16.
    """

    values: NDArray[Any]
    bfloat16: bool = False

    @property
    def is_float(self) -> bool:
        """Whether its values are floats."""
        return self.bfloat16 or self.values.dtype.kind == "f"

    def floats(self, part: Any) -> NDArray[Any]:
        """Some of its values as floats."""
        values = self.values[part]
        return bfloat16_to_float32(values) if self.bfloat16 else values


def open_safetensors(source: Input) -> dict[str, Mapped]:
    """The tensors of a file by name.

    Raises:
        SourceError: it is damaged, or no such file.
    """
    if source.size is None:
        raise SourceError("safetensors cannot be read from standard input: name the file")
    try:
        return _mapped(source.path, source.size)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, OSError, RecursionError) as error:
        raise SourceError(f"{source.name}: not a whole file of safetensors ({error}); fetch it again") from error


def _mapped(path: Path, size: int) -> dict[str, Mapped]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(file.read(length))
    start = 8 + length
    data = np.memmap(path, np.uint8, "r", offset=start) if size > start else np.empty(0, np.uint8)
    return {name: _tensor(data, entry) for name, entry in header.items() if name != "__metadata__"}


def _tensor(data: NDArray[np.uint8], entry: Mapping[str, Any]) -> Mapped:
    dtype = np.dtype(_TYPES[entry["dtype"]])
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, *offsets)):
        raise ValueError("a shape or an offset that is no number")
    start, end = offsets
    if not start <= end <= len(data):
        raise ValueError("a tensor outside the file")
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError("a tensor whose size is not that of its shape")
    return Mapped(np.asarray(data[start:end].view(dtype).reshape(shape)), bfloat16=entry["dtype"] == "BF16")


def tensor_shapes(source: Input) -> dict[str, int]:
    """The number of dimensions of each tensor, for `recognises`; empty where this is no such file. Never raises."""
    try:
        if source.size is None or source.path.suffix != ".safetensors":
            return {}
        with source.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(2**20, source.size - 8):
                return {}
            header = msgspec.json.decode(file.read(length), type=dict[str, Any])
        return {name: len(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (LogitStoreError, OSError, msgspec.MsgspecError, RecursionError, UnicodeError, KeyError, TypeError):
        return {}
