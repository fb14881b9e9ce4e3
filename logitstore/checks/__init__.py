"""All checks of a dataset, as findings: nothing stops at the first problem.

- `findings`: what a check reports.
- `quick`: manifest, files, tails, indexes, schemas, tokenizer.
- `parts`: a shard, or some chunks of one; every byte and every row.
- `repeated`: sequence ids that are there twice.
- `deep`: what only the whole shows.
- `workers`: how many processes do it.
"""

from logitstore.checks.findings import Finding
from logitstore.checks.run import is_valid, validate

__all__ = ["Finding", "is_valid", "validate"]
