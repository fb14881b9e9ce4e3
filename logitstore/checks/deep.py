"""The checks of what only the whole of a dataset shows, after every byte and every row was read."""

from __future__ import annotations

from logitstore.checks.findings import Findings
from logitstore.checks.parts import Sums
from logitstore.schema import Manifest


def check_sums(sums: Sums, manifest: Manifest, vocabulary_size: int | None, findings: Findings) -> None:
    """Check sums over all sequences.

    Args:
        sums: of what could be read.
        manifest: of the dataset.
        vocabulary_size: of its tokenizer; None where that is not known.
        findings: get what is wrong.
    """
    if (problem := sums.alignment.problem()) is not None:
        findings.add("alignment", problem)
    if vocabulary_size is not None and sums.highest_token >= vocabulary_size:
        findings.add(
            "id-range",
            f"the token {sums.highest_token} is outside the tokenizer's {vocabulary_size} tokens",
            "warning",
        )
    if not sums.whole:
        return  # what could not be read is missing from the sums
    totals = manifest.totals
    highest = sums.highest_id if sums.highest_id >= 0 else None
    for name, found, said in (
        ("encodings", dict(sums.encodings), totals.encodings),
        ("columns", dict(sums.optional), totals.columns),
        ("highest_id", highest, totals.highest_id),
    ):
        if found != said:
            findings.add("totals", f"the content's {name} are {found}, the manifest says {said}")
