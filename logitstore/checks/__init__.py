"""All checks of a dataset, as findings: nothing stops at the first problem.

- `findings`: what a check reports.
- `quick`: manifest, files, tails, indexes, schemas, tokenizer.
- `deep`: every byte and every row.
"""

from logitstore.checks.findings import Finding
from logitstore.checks.run import is_valid, validate

__all__ = ["Finding", "is_valid", "validate"]
