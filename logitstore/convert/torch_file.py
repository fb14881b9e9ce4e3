"""Files of `torch.save`, read without torch and without unpickling.

Such a file is a zip of stored members: `data.pkl`, a pickle that says how lists and dictionaries hold tensors, and
under `data/` the bytes of each tensor's storage. The pickle is never run: its opcodes are walked, and those that plain
containers of tensors need are the only ones that are known. Nothing is imported or called on its word.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from logitstore.convert.source import BROKEN_ARCHIVE
from logitstore.encoding.ordinals import bfloat16_to_float32
from logitstore.errors import SourceError

_PICKLE_LIMIT: Final = 2**24  # 100,000 tensors; the bytes of tensors stand elsewhere
_TYPES: Final = {
    "float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int64": "<i8", "int32": "<i4",
    "int16": "<i2", "int8": "i1", "uint64": "<u8", "uint32": "<u4", "uint16": "<u2", "uint8": "u1", "bool": "?",
}  # fmt: skip
_STORAGES: Final = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
    "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
}  # fmt: skip
_MARK: Final = object()


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor whose values are not read yet.

    Attributes:
        dtype: torch's name of it, such as `bfloat16`.
        shape: its shape.
        strides: in values, one a dimension.
        offset: of its first value in its storage, in values.
        archive: the file.
        member: name of its storage in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    archive: zipfile.ZipFile = field(repr=False)
    member: str

    def read(self) -> NDArray[Any]:
        """Its values; bfloat16 comes as float32.

        Raises:
            SourceError: they are damaged, or outside their storage.
        """
        try:
            values = self._strided(_stored(self.archive, self.member))
        except BROKEN_ARCHIVE as error:
            raise SourceError(f"the tensor in {self.member} cannot be read ({error})") from error
        return bfloat16_to_float32(values) if self.dtype == "bfloat16" else values

    def _strided(self, data: bytes) -> NDArray[Any]:
        dtype = np.dtype(_TYPES[self.dtype])
        size = math.prod(self.shape)
        if size == 0:
            return np.empty(self.shape, dtype)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        storage = np.frombuffer(data, dtype)
        # A tensor that repeats the values of its storage could claim to be of any size.
        if min((self.offset, *self.shape, *self.strides)) < 0 or last >= len(storage) or size > len(storage):
            raise ValueError("it is larger than its storage")
        steps = [step * dtype.itemsize for step in self.strides]
        view = np.lib.stride_tricks.as_strided(storage[self.offset :], self.shape, steps, writeable=False)
        return view.copy()


def read_torch(file: BinaryIO) -> Any:
    """What was saved: dictionaries, lists, tuples, strings, numbers, and `Tensor`s whose values are read when wanted.

    Args:
        file: the file, seekable; it must stay open as long as tensors are read.

    Raises:
        SourceError: it is damaged, or holds something else.
    """
    try:
        archive = zipfile.ZipFile(file)
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1)
        root = name.removesuffix("data.pkl")
        if root + "byteorder" in archive.namelist() and _stored(archive, root + "byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        if archive.getinfo(name).file_size > _PICKLE_LIMIT:
            raise ValueError("its data.pkl is too large")
        return _Walk(archive, root).of(_stored(archive, name))
    except BROKEN_ARCHIVE as error:
        raise SourceError(f"no file of torch.save with plain tensors ({error})") from error


def _stored(archive: zipfile.ZipFile, member: str) -> bytes:
    if archive.getinfo(member).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"the member {member} is compressed")
    return archive.read(member)


class _Walk:
    """The stack and memo of a pickle whose opcodes are walked."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        self._archive, self._root = archive, root
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def of(self, pickle: bytes) -> Any:
        """What the pickle describes."""
        for opcode, argument, _ in pickletools.genops(pickle):
            if opcode.name == "STOP":
                (found,) = self._stack
                return found
            self._step(opcode.name, argument)
        raise EOFError("the pickle has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _LITERALS:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in _TUPLES:
            stack.append(tuple(self._pop(_TUPLES[name])))
        elif name in ("APPENDS", "SETITEMS", "APPEND", "SETITEM"):
            self._fill(name)
        elif name != "PROTO":
            self._refer(name, argument)

    def _refer(self, name: str, argument: Any) -> None:
        """What stands for something outside the pickle."""
        stack = self._stack
        if name == "GLOBAL":
            stack.append(_Name(argument))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name == "REDUCE":
            arguments, called = stack.pop(), stack.pop()
            stack.append(self._made(called, arguments))
        else:
            raise ValueError(f"the opcode {name} is not of a plain container of tensors")

    def _pop(self, count: int | None) -> list[Any]:
        """The last so many values; those behind the last mark where the number is None."""
        if count is None:
            at = len(self._stack) - 1
            while self._stack[at] is not _MARK:
                at -= 1
                if at < 0:
                    raise ValueError("a mark is missing")
            found = self._stack[at + 1 :]
            del self._stack[at:]
            return found
        if count > len(self._stack):
            raise ValueError("values are missing")
        found = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return found

    def _fill(self, name: str) -> None:
        """Put values into the list or dictionary under them."""
        values = self._pop(None if name.endswith("S") else 1 if name == "APPEND" else 2)
        target = self._stack[-1]
        if name.startswith("APPEND"):
            if not isinstance(target, list):
                raise TypeError("values are appended to no list")
            target.extend(values)
            return
        if not isinstance(target, dict) or not all(isinstance(key, str | int) for key in values[::2]):
            raise TypeError("values are set in no dictionary, or under keys that are no text")
        target.update(zip(values[::2], values[1::2], strict=True))

    def _storage(self, said: Any) -> _Storage:
        kind, storage, key, _, _ = said
        if kind != "storage" or not isinstance(storage, _Name) or not isinstance(key, str):
            raise ValueError("a persistent id is no storage")
        return _Storage(storage.storage_type(), f"{self._root}data/{key}")

    def _made(self, called: Any, arguments: Any) -> Any:
        name = called.text if isinstance(called, _Name) else None
        if name == "collections OrderedDict" and arguments == ():
            return {}
        if name not in ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3"):
            raise ValueError(f"a call of {name}")
        storage, offset, shape, strides = arguments[:4]
        dtype = storage.dtype if name.endswith("v2") else arguments[6].dtype()
        numbers = (offset, *shape, *strides)
        if dtype is None or len(shape) != len(strides) or not all(type(number) is int for number in numbers):
            raise ValueError("a tensor without a dtype or with a shape of no numbers")
        return Tensor(dtype, tuple(shape), tuple(strides), offset, self._archive, storage.member)


@dataclass(frozen=True, slots=True)
class _Name:
    """The name of a class, a function or a dtype, as `module name`; nothing is looked up by it."""

    text: str

    def storage_type(self) -> str | None:
        """The dtype of a storage of this class; None where the storage has none."""
        if self.text == "torch.storage UntypedStorage":
            return None
        return _STORAGES[self.text.removeprefix("torch ").removesuffix("Storage")]

    def dtype(self) -> str:
        """The dtype of this name."""
        name = self.text.removeprefix("torch ")
        if name not in _TYPES:
            raise ValueError(f"the dtype {self.text}")
        return name


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str | None
    member: str


_CONSTANTS: Final[dict[str, Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
_LITERALS: Final = frozenset(("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"))
_TUPLES: Final[dict[str, int | None]] = {"TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
