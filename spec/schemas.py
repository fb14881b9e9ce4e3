"""Prints or writes the JSON Schemas of manifest and shard header, made from the typed metadata."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec

from logitstore.schema import Manifest, ShardHeader

SCHEMAS = {"manifest.schema.json": Manifest, "shard-header.schema.json": ShardHeader}


def schema_text(name: str) -> str:
    """One schema as JSON text."""
    schema = msgspec.json.schema(SCHEMAS[name])
    for definition in schema["$defs"].values():
        definition["description"] = definition.get("description", "").partition("\n\n")[0]
    top = schema["$defs"][SCHEMAS[name].__name__]
    if name == "manifest.schema.json":
        # The seal is made of the bytes before it, so it is no field of the type.
        top["properties"]["sha256"] = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
        top["required"].append("sha256")
    top["required"].insert(0, "format")
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2) + "\n"


def main() -> None:
    """Write the schemas beside this file with `--write`, else print them."""
    for name in SCHEMAS:
        if "--write" in sys.argv:
            Path(__file__).with_name(name).write_text(schema_text(name), encoding="utf-8")
        else:
            print(schema_text(name), end="")


if __name__ == "__main__":
    main()
