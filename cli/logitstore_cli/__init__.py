"""The command `logitstore`: thin commands over the package. They parse, call and print.

Results go to standard output, everything else to standard error. Exit status: 0 done, 1 failed or invalid, 2 wrong
usage, 3 finished with loss.
"""

from logitstore_cli.main import run

__all__ = ["run"]
