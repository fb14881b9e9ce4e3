"""Typed metadata: the manifest and the shard header, frozen, with strict parsers and no I/O.

The JSON Schemas in `spec/` are made from these types.
"""

from logitstore.schema.header import ShardHeader, parse_header, serialise_header
from logitstore.schema.manifest import (
    Manifest,
    Sampling,
    ShardInfo,
    Source,
    Split,
    Teacher,
    TokenizerInfo,
    Totals,
    dataset_digest,
    parse_manifest,
    serialise_manifest,
)
from logitstore.schema.version import FORMAT_VERSION, Features, FormatVersion, check_readable

__all__ = [
    "FORMAT_VERSION",
    "Features",
    "FormatVersion",
    "Manifest",
    "Sampling",
    "ShardHeader",
    "ShardInfo",
    "Source",
    "Split",
    "Teacher",
    "TokenizerInfo",
    "Totals",
    "check_readable",
    "dataset_digest",
    "parse_header",
    "parse_manifest",
    "serialise_header",
    "serialise_manifest",
]
