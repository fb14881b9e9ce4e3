"""Foreign captures in: one module per format behind one registry that plugins can join.

A plugin declares an entry point in the group `logitstore.importers` that names an `Importer`.
"""

from logitstore.convert.base import Import, Importer, Input, Item, Options
from logitstore.convert.run import Converted, convert, importers

__all__ = ["Converted", "Import", "Importer", "Input", "Item", "Options", "convert", "importers"]
