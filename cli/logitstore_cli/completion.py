"""`logitstore completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from logitstore_cli.output import result


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print a script that completes commands and options in a shell.

    Example: logitstore completion bash >> ~/.bashrc
    """
    from logitstore_cli.main import main  # noqa: PLC0415 - main loads this module

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"no completion for {shell}")
    result(kind(main, {}, "logitstore", "_LOGITSTORE_COMPLETE").source())
