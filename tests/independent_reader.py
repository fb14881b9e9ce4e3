"""A reader of logitstore 1.0, written from `spec/README.md` alone: it shares no code with the package.

It is simple and slow, reads whole files, and makes every check that the spec asks of readers. It also checks
what the spec leaves to validators where that shows that the spec's text is right: digests, id hashes, sums.
"""

import contextlib
import math
import re
from pathlib import Path

SPEC = Path(__file__).resolve().parent.parent / "spec"


class SpecViolation(ValueError):
    """The bytes are not what the spec says."""


def must(condition, rule):
    if not condition:
        raise SpecViolation(rule)


@contextlib.contextmanager
def refusing(what, *errors):
    """Report what another library says of its input as a violation, too."""
    try:
        yield
    except errors as e:
        raise SpecViolation(f"{what}: {e}") from e


# ---- The two JSON schemas, as far as they go ----------------------------------------------------------------

TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None)}


def conforms(value, schema, definitions):
    def inner(v, s):
        return conforms(v, s, definitions)

    if "$ref" in schema:
        return inner(value, definitions[schema["$ref"].removeprefix("#/$defs/")])
    if "anyOf" in schema:
        return any(inner(value, s) for s in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    if not isinstance(value, TYPES[schema["type"]]) or isinstance(value, bool):
        return False
    if isinstance(value, dict):
        known, other = schema.get("properties", {}), schema.get("additionalProperties", {"anyOf": [{}]})
        named = all(inner(n, {"type": "string"} | schema.get("propertyNames", {})) for n in value)
        fields = all(k in value for k in schema.get("required", ()))
        return named and fields and all(v is None or True for v in ()) and all(
            inner(v, known.get(k, other)) for k, v in value.items() if k in known or "additionalProperties" in schema
        )
    if isinstance(value, list):
        return all(inner(v, schema["items"]) for v in value)
    if isinstance(value, str):
        length = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
        return length and ("pattern" not in schema or bool(re.fullmatch(schema["pattern"], value)))
    return value is None or (
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
        and schema.get("exclusiveMinimum", -math.inf) < value < schema.get("exclusiveMaximum", math.inf)
    )
