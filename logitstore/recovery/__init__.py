"""Saving what is left of a dataset whose writer was killed, or whose files are damaged."""

from logitstore.recovery.result import Lost, Recovered
from logitstore.recovery.run import recover

__all__ = ["Lost", "Recovered", "recover"]
