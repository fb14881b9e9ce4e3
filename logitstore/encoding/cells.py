"""Cells: one column of one sequence, as pcodec chunk metadata followed by one page (spec, "Cells").

A cell is decodable by itself, given the number of its values and their type. No values: an empty cell.
"""

from __future__ import annotations

import functools
import re
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, PagingSpec
from pcodec.wrapped import FileCompressor, FileDecompressor

from logitstore.errors import CorruptDataError
from logitstore.limits import SEQUENCE_CANDIDATES

PCO_NAMES: Final = {np.dtype(np.uint16): "u16", np.dtype(np.uint32): "u32", np.dtype(np.float32): "f32"}
"""The types of cells and pcodec's names for them."""

_VERSION: Final = re.compile(r"([4-9]|[1-9][0-9]{1,2})\.(0|[1-9][0-9]{0,2})")  # headers before 4.0 are of another form

_PCO_HEADER: Final = bytes(FileCompressor().write_header())

PCO_VERSION: Final = f"{_PCO_HEADER[0]}.{_PCO_HEADER[1]}"
"""The pcodec format version that this process writes; shard headers record it."""


def _config(level: int) -> ChunkConfig:
    # Classic mode without delta: readers refuse anything else, since directed metadata of the other modes can ask for
    # a hundred megabytes. Pages of the limit's size: a cell has one.
    return ChunkConfig(
        compression_level=level,
        mode_spec=ModeSpec.classic(),
        delta_spec=DeltaSpec.no_op(),
        paging_spec=PagingSpec.equal_pages_up_to(SEQUENCE_CANDIDATES),
    )


# Measured on real ids: level 8 is 0.6 % smaller than 6 and takes a third longer, 12 is 0.9 % smaller and takes six
# times as long. Few values do not fill the bins of a high level: on real cells of 512, level 5 is within 0.5 % of 8.
_CONFIG: Final = _config(6)
_CONFIG_FEW: Final = _config(5)
_FEW: Final = 4096


@functools.lru_cache(16)
def pco_header(version: str) -> bytes:
    """The file header of pcodec for a recorded format version such as `"4.1"`.

    Raises:
        CorruptDataError: this is no version.
    """
    match = _VERSION.fullmatch(version)
    if match is None or int(match[1]) > 255 or int(match[2]) > 255:
        raise CorruptDataError(f"{version!r} is no pcodec format version", code="shard-header")
    return bytes([int(match[1]), int(match[2])])


def can_decode(version: str) -> bool:
    """Whether the installed pcodec reads this pcodec format version."""
    try:
        FileDecompressor.new(pco_header(version))
    except RuntimeError:
        return False
    return True


def encode_cell(values: NDArray[Any]) -> bytes:
    """Values as a cell.

    Args:
        values: uint16, uint32 or float32 [n], contiguous, n at most 2^24.

    Returns:
        The cell; empty when there are no values.
    """
    if len(values) == 0:
        return b""
    compressor = FileCompressor().chunk_compressor(values, _CONFIG if len(values) >= _FEW else _CONFIG_FEW)
    return bytes(compressor.write_meta()) + bytes(compressor.write_page(0))


class CellDecoder:
    """Decodes cells of one pcodec format version.

    pcodec's decompressors are neither thread-safe nor picklable: one of these belongs to one thread.
    """

    def __init__(self, version: str = PCO_VERSION) -> None:
        self._file, _ = FileDecompressor.new(pco_header(version))

    def decode(self, cell: bytes, n: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """The n values of a cell.

        Raises:
            CorruptDataError: the cell does not hold exactly n values of this type.
        """
        if n == 0 or not cell:
            if n != 0 or cell:
                raise CorruptDataError(f"a cell of {len(cell)} bytes for {n} values", code="cell")
            return np.empty(0, dtype)
        if cell[0] != 0:
            raise CorruptDataError(
                "a cell in a pcodec mode or delta encoding that the format does not use", code="cell"
            )
        values = np.empty(n, dtype)
        try:
            chunk, used = self._file.chunk_decompressor(cell, PCO_NAMES[dtype])
            progress, read = chunk.read_page_into(cell[used:], n, values)
        except RuntimeError as error:
            raise CorruptDataError(f"a cell that pcodec cannot decode ({error})", code="cell") from error
        if not progress.finished or progress.n_processed != n or used + read != len(cell):
            raise CorruptDataError(f"a cell that does not hold exactly {n} values", code="cell")
        return values
