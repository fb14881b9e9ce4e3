"""Bytes of files: mapped or from the network, and writing that survives a crash."""

from logitstore.io.files import (
    SYNC_BYTES,
    SYNC_SECONDS,
    DurableFile,
    MappedFile,
    read_limited,
    regular_size,
    sha256_file,
    sync_directory,
    write_atomic,
)
from logitstore.io.source import Accept, ByteSource
from logitstore.io.store import LocalStore, Store

__all__ = [
    "SYNC_BYTES",
    "SYNC_SECONDS",
    "Accept",
    "ByteSource",
    "DurableFile",
    "LocalStore",
    "MappedFile",
    "Store",
    "read_limited",
    "regular_size",
    "sha256_file",
    "sync_directory",
    "write_atomic",
]
