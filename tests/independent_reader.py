"""A reader of logitstore 1.0, written from `spec/README.md` alone: it shares no code with the package.

It is simple, reads whole files, and makes every check that section 11 asks of readers. It makes some that are left to
validators too, where they show that the spec's words are right: dataset digest, id hashes, sha256, sums.
"""

import base64
import contextlib
import hashlib
import json
import math
import re
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from pcodec import wrapped


class SpecViolation(ValueError):  # noqa: N818
    """The bytes are not what the spec says."""


def must(condition, rule):
    if not condition:
        raise SpecViolation(rule)


@contextlib.contextmanager
def refusing(where, *errors):
    """What goes wrong in here is a violation, and is reported with its place."""
    try:
        yield
    except (SpecViolation, *errors) as e:
        raise SpecViolation(f"{where}: {e!r}") from e


MALFORMED = (KeyError, TypeError, ValueError, AttributeError, RecursionError)  # JSON of another shape
ARROW = (pa.ArrowException, ValueError, OSError, EOFError)

# ---- Section 3: manifest; section 10: versions and features --------------------------------------------------


def read_manifest(file):
    must(file.is_file(), "no manifest: no dataset, or an unfinished one")
    must(file.stat().st_size <= 2**28, "over 2^28 bytes")
    data = file.read_bytes()
    start = max(len(data) - len(',\n "sha256": "') - 64 - len('"\n}\n'), 0)
    digest = hashlib.sha256(data[:start]).hexdigest()
    must(data[start:] == f',\n "sha256": "{digest}"\n}}\n'.encode(), "seal")
    manifest = json.loads(data.decode("utf-8"))
    check_version(manifest)
    shards, tokenizer = manifest["shards"], manifest["tokenizer"] or {}
    for path in [named["path"] for named in shards + tokenizer.get("files", [])]:
        must(not {"", ".", ".."} & set(path.split("/")), path)  # an absolute one has an empty first part
        must(not set("\\:\0") & set(path), path)
    must(manifest["logit_width"] is None or 1 <= manifest["logit_width"] <= 2**31, "logit width")
    lines = [tokenizer.get("digest") or "-", *(f"{s['split']} {s['sequences']} {s['sha256']}" for s in shards)]
    digest = hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest()
    must(manifest["dataset_digest"] == digest, "dataset digest")
    for name in ("sequences", "positions", "candidates", "bytes"):
        must(manifest["totals"][name] == sum(s[name] for s in shards), f"total of {name}")
        for split, sums in manifest["splits"].items():
            must(sums.get(name, 0) == sum(s[name] for s in shards if s["split"] == split), f"{split}'s sum of {name}")
    return manifest


def check_version(described):
    must(described["format"] == "logitstore", "another format")
    must(re.fullmatch(r"1\.[0-9]+", described["version"]), f"version {described['version']}")
    must(not described.get("features", {}).get("required"), f"required features: {described.get('features')}")


# ---- Sections 4 and 7: a shard and its tail ------------------------------------------------------------------


def read_shard(data, info, manifest):
    must(len(data) == info["bytes"], "size: not the manifest's")
    schema_message, chunks, hashes = read_tail(data, info)
    schema, header = read_schema(schema_message, manifest)
    rows = []
    for number, (offset, length, *sums, digest) in enumerate(chunks):
        with refusing(f"chunk {number} at byte {offset}"):
            message = data[offset : offset + length]
            must(xxhash.xxh3_128(message).digest() == digest, "digest")
            rows += read_chunk(schema_message, message, schema, header, sums)
    ids = [xxhash.xxh3_64(row["id"].encode()).intdigest() for row in rows]
    must(hashes == struct.pack(f"<{len(ids)}Q", *ids), "id hashes")
    must(hashlib.sha256(data).hexdigest() == info["sha256"], "sha256")
    return rows


def read_tail(data, info):
    must(len(data) >= 128, "too short")
    length, major, minor, digest, magic = struct.unpack("<IHH16s8s", data[-32:])
    must(magic == bytes.fromhex("89 4c 4f 47 49 54 53 0a"), "magic")
    must(32 <= length <= len(data), "length of the tail")
    must(xxhash.xxh3_128(data[-length:-24]).digest() == digest, "digest of the tail")
    must(major == 1, f"version {major}.{minor}")
    must(length == 128, "length of the tail")
    must(digest.hex() == info["tail_digest"], "tail digest: not the manifest's")
    size, schema_bytes, number, *sums = struct.unpack("<6Q", data[-128:-80])
    must(size == len(data), "size of the file")
    index_start = size - 128 - 48 * number
    hashes_start = index_start - 8 * sums[0]
    end_mark = hashes_start - 8
    must(0 < schema_bytes <= min(end_mark, 2**24), "the parts do not fit the file")
    must(data[end_mark:hashes_start] == bytes.fromhex("ff ff ff ff 00 00 00 00"), "end mark")
    must(sums == [info["sequences"], info["positions"], info["candidates"]], "sums: not the manifest's")
    parts = data[:schema_bytes], data[hashes_start:index_start], data[index_start:-128]
    for part, at in zip(parts, (-80, -64, -48), strict=True):
        must(xxhash.xxh3_128(part).digest() == data[at : at + 16], "digest of schema, id hashes or index")
    chunks = list(struct.iter_unpack("<QQIIQ16s", parts[2]))
    ends = [schema_bytes, *(offset + length for offset, length, *_ in chunks)]
    must([offset for offset, *_ in chunks] + [end_mark] == ends, "index: gaps")
    must(all(0 < length < 2**31 and sequences > 0 for _, length, sequences, *_ in chunks), "index: limits")
    must([sum(chunk[n] for chunk in chunks) for n in (2, 3, 4)] == sums, "index: not the tail's sums")
    return parts[0], chunks, parts[1]


# ---- Section 5: schema message and header --------------------------------------------------------------------

OPTIONAL = {"tail": "u2", "target_logprob": "f4", "target_rank": "u4"}
OPTIONAL |= {"logsumexp": "f4", "entropy": "f4", "loss_mask": "u2"}
COLUMNS = {"id": pa.utf8(), "length": pa.uint32(), "encoding": pa.uint8()}
COLUMNS |= dict.fromkeys(("tokens", "count", "ids", "top", "gaps", *OPTIONAL), pa.binary())


def read_schema(message, manifest):
    with refusing("schema message", *ARROW):
        source = pa.BufferReader(message)
        schema = pa.ipc.read_schema(source)
        must(source.tell() == len(message), "bytes left over")
        first, users, names = list(schema)[:14], schema.names[14:], set(schema.names)
    must([(f.name, f.type, f.nullable) for f in first] == [(*c, False) for c in COLUMNS.items()], "columns")
    must(not {"logprobs", "draws", "logits", "offsets", "columns"} & names, "a reserved name")
    must(len(names) == len(schema), "a name twice")
    must(not any(has_dictionary(f.type) for f in schema), "a dictionary")
    must(set(users) == set(manifest.get("user_columns", {})), "user columns: not the manifest's")
    with refusing("header", *MALFORMED):
        header = json.loads(schema.metadata[b"logitstore"])
        check_version(header)
        expected = {"resolution": manifest["sampling"]["resolution"]}
        expected |= {name: manifest[name] for name in ("logit_width", "normalised", "temperature")}
        must(expected.items() <= header.items(), "not as the manifest")
        must(header["resolution"] in [2.0**-n for n in range(21)], "resolution")
        must(re.fullmatch(r"[0-9]+\.[0-9]+", header["pco"]), "pco")
    return schema, header


def has_dictionary(kind):
    inner = (kind.field(n).type for n in range(kind.num_fields))
    return pa.types.is_dictionary(kind) or any(map(has_dictionary, inner))


# ---- Section 6: chunk messages -------------------------------------------------------------------------------


def read_chunk(schema_message, message, schema, header, sums):
    sequences, positions, candidates = sums
    with refusing("record batch", *ARROW):
        must(pa.ipc.read_message(message).type == "record batch", "another message")
        source = pa.py_buffer(schema_message + message)
        reader = pa.BufferReader(source)
        batch, metadata = pa.ipc.open_stream(reader).read_next_batch_with_custom_metadata()
        must(reader.tell() == source.size, "bytes left over")
        batch.validate(full=True)
        columns = {name: batch.column(name).to_pylist() for name in schema.names}
    buffers = [b.address for column in batch.columns for b in column.buffers() if b and b.size]
    must(all(0 <= b - source.address < source.size for b in buffers), "compressed: not the message's own bytes")
    must(not any(batch.column(name).null_count for name in COLUMNS), "nulls")
    must(batch.num_rows == sequences, "sequences: not the index's")
    must(sum(columns["length"]) == positions, "positions: not the index's")
    with refusing("metadata", *MALFORMED):
        found = json.loads(metadata[b"logitstore"])
        must(0 <= found["order_length"] <= 4096, "length of the order")
        cell = base64.b64decode(found["order"], validate=True)
        order = decode(cell, "u4", found["order_length"], header)
    rows = [read_sequence({k: c[n] for k, c in columns.items()}, order, header) for n in range(sequences)]
    must(sum(int(row["count"].sum()) for row in rows) == candidates, "candidates: not the index's")
    return rows


def read_sequence(row, order, header):
    """From `length` to `count`; from that to N and P; from these to all other columns."""
    length, encoding = row["length"], row["encoding"]
    must(length <= 2**24, "positions of a sequence")
    must(encoding in KINDS, f"encoding {encoding}")
    tokens = ids_of(decode(row["tokens"], "u4", length, header), order, 2**31)
    count = decode(row["count"], "u4", length, header).astype(np.int64)
    must(count.sum() <= 2**24, "candidates of a sequence")
    optional = {n: decode(row[n], kind, length, header) if row[n] else None for n, kind in OPTIONAL.items()}
    counts = count[count > 0]
    total = int(counts.sum())
    codes = decode(row["ids"], "u4", total, header).astype(np.int64)
    top = decode(row["top"], KINDS[encoding][0], len(counts), header)
    gaps = decode(row["gaps"], KINDS[encoding][1], total - len(counts), header)
    if encoding == DRAWS:
        codes = running_sums(codes, counts)
    values = {"ids": ids_of(codes, order, header["logit_width"] or 2**31), "draws": None, "logits": None}
    missing = np.full(length, np.nan)
    logsumexp = (missing if optional["logsumexp"] is None else optional["logsumexp"])[count > 0]
    values |= read_values(encoding, values["ids"], top, gaps, counts, logsumexp, header["resolution"])
    users = {name: value for name, value in row.items() if name not in COLUMNS}
    values |= {"id": row["id"], "tokens": tokens, "count": count, "columns": users}
    return values | read_optional(length, **optional)


def ids_of(codes, order, limit):
    """A code is a place in the order, or M' + id."""
    listed = codes < len(order)
    ids = codes.astype(np.int64) - len(order)
    ids[listed] = order[codes[listed]]
    must((ids < limit).all(), f"ids that are not below {limit}")
    return ids


def read_optional(length, tail, target_rank, loss_mask, **floats):
    """The tail in nats; the markers of what is unknown as the files of expected values have them."""
    steps = np.full(length, 65535, np.uint16) if tail is None else tail
    tail = steps.astype(np.float32) / np.float32(-32)
    tail[steps == 65534], tail[steps == 65535] = -np.inf, np.nan
    if target_rank is not None:
        target_rank = np.where(target_rank == 2**32 - 1, 0, target_rank)
    if loss_mask is not None:
        must(np.isin(loss_mask, (0, 1, 65535)).all(), "loss_mask")
        loss_mask = loss_mask.view(np.int16)
    return {"tail": tail, "target_rank": target_rank, "loss_mask": loss_mask, **floats}


# ---- Section 8: cells ----------------------------------------------------------------------------------------


def decode(cell, kind, length, header):
    if length == 0:
        must(cell == b"", "a cell without values has bytes")
        return np.zeros(0, kind)
    must(cell[:1] == b"\0", "a cell that is empty, of another mode, or with delta encoding")
    with refusing("cell", RuntimeError, ValueError):
        pco = bytes(int(part) for part in header["pco"].split("."))
        chunk, meta = wrapped.FileDecompressor.new(pco)[0].chunk_decompressor(cell, kind[0] + str(8 * int(kind[1])))
        values = np.zeros(length, kind)
        progress, page = chunk.read_page_into(cell[meta:], length, values)
    must(progress.finished and progress.n_processed == length, "a cell of another length")
    must(meta + page == len(cell), "a cell with bytes left over")
    return values


# ---- Section 9: values ---------------------------------------------------------------------------------------

GRID, WIDE_GRID, BFLOAT16, FLOAT16, FLOAT32, DRAWS = range(6)
KINDS = {GRID: ("f4", "u2"), WIDE_GRID: ("f4", "u4"), BFLOAT16: ("u2", "u2")}  # of `top` and `gaps`
KINDS |= {FLOAT16: ("u2", "u2"), FLOAT32: ("u4", "u4"), DRAWS: ("u4", "u4")}


def running_sums(values, counts):
    """Sums that begin anew at each position."""
    sums, starts = np.cumsum(values), np.cumsum(counts) - counts
    return sums - np.repeat((sums - values)[starts], counts)


def after_firsts(gaps, counts):
    """Each candidate's gap; 0 for the first one of a position."""
    firsts = np.cumsum(counts - 1) - (counts - 1)
    return np.insert(gaps.astype(np.int64), firsts, 0)


@np.errstate(all="ignore")  # of NaN and infinities, which are a validator's matter
def read_values(encoding, ids, top, gaps, counts, logsumexp, resolution):
    if encoding == DRAWS:
        return read_draws(ids, top.astype(np.int64), gaps, counts)
    steps = running_sums(after_firsts(gaps, counts), counts)
    if encoding in (GRID, WIDE_GRID):
        must((steps < 2**24).all(), "steps that are not below 2^24")
        return {"logprobs": np.repeat(top, counts) - np.float32(resolution) * steps.astype(np.float32)}
    ordinals = np.repeat(top.astype(np.int64), counts) - steps
    must((ordinals >= 0).all(), "an ordinal below 0")
    sign = 2 ** (8 * top.itemsize - 1)
    patterns = np.where(ordinals >= sign, ordinals - sign, 2 * sign - 1 - ordinals).astype(top.dtype)
    if encoding == BFLOAT16:
        must(np.isfinite(logsumexp).all(), "bfloat16 without a finite logsumexp")
        logits = (patterns.astype(np.uint32) << 16).view(np.float32)
        return {"logits": logits, "logprobs": logits - np.repeat(logsumexp, counts)}
    return {"logprobs": patterns.view("f2" if encoding == FLOAT16 else "f4").astype(np.float32)}


def read_draws(ids, top, gaps, counts):
    draws, starts = after_firsts(gaps, counts), np.cumsum(counts) - counts
    draws[starts] = top - running_sums(draws, counts)[starts + counts - 1]  # the first one has the rest
    must((top < 2**31).all() and (draws >= 1).all(), "draws: below 1, or 2^31 or more at a position")
    ranked = np.lexsort((ids, -draws, np.repeat(starts, counts)))
    logprobs = np.log(draws / np.repeat(top, counts)).astype(np.float32)  # in float64, rounded once
    return {"ids": ids[ranked], "draws": draws[ranked], "logprobs": logprobs[ranked]}


# ---- The dataset, in the form of the files of expected values ------------------------------------------------


def plain(value):
    """JSON has no NaN and no infinities; a digest stands for a long array, of 32-bit values."""
    if isinstance(value, np.ndarray) and len(value) > 500:
        value = value.astype("<f4" if value.dtype.kind == "f" else "<i4")
        digest = hashlib.sha256(value.tobytes()).hexdigest()
        return {"dtype": value.dtype.name, "length": len(value), "sha256": digest}
    if isinstance(value, np.ndarray):
        return [plain(v) for v in value.tolist()]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def read_dataset(path):
    """Everything that a dataset holds, checked."""
    root, sequences = Path(path), []
    with refusing("logitstore.json", OSError, *MALFORMED):
        manifest = read_manifest(root / "logitstore.json")
    for info in manifest["shards"]:
        with refusing(info["path"], OSError):
            sequences += read_shard((root / info["path"]).read_bytes(), info, manifest)
    return {
        "format_version": manifest["version"],
        **{name: manifest[name] for name in ("logit_width", "normalised", "temperature")},
        "sequences": [{name: plain(value) for name, value in row.items()} for row in sequences],
    }
