"""Foreign captures in and out: one module per format behind one registry that plugins can join.

A plugin declares an entry point in the group `logitstore.importers` that names an `Importer`, or in
`logitstore.exporters` one that names an `Exporter`.
"""

from logitstore.convert.base import (
    Export,
    Exporter,
    Import,
    Importer,
    Item,
    Options,
    Parse,
    Piece,
    Ready,
    Record,
    Tally,
    ready,
)
from logitstore.convert.run import Converted, convert, importers
from logitstore.convert.run_export import Exported, export, exporters
from logitstore.convert.source import Input

__all__ = [
    "Converted",
    "Export",
    "Exported",
    "Exporter",
    "Import",
    "Importer",
    "Input",
    "Item",
    "Options",
    "Parse",
    "Piece",
    "Ready",
    "Record",
    "Tally",
    "convert",
    "export",
    "exporters",
    "importers",
    "ready",
]
