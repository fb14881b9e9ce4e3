"""Bytes of files: mapped or from the network, and writing that survives a crash."""

from logitstore.io.files import (
    SYNC_BYTES,
    SYNC_SECONDS,
    DurableFile,
    GrowingFile,
    MappedFile,
    make_directory,
    partial_path,
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
    "GrowingFile",
    "LocalStore",
    "MappedFile",
    "Store",
    "make_directory",
    "partial_path",
    "read_limited",
    "regular_size",
    "sha256_file",
    "sync_directory",
    "write_atomic",
]
