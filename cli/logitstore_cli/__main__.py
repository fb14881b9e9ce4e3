"""`python -m logitstore_cli`, for where the command is not on the path."""

from logitstore_cli import run

run()
