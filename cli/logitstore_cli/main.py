"""The group of commands, and the one place where an outcome becomes an exit status."""

from __future__ import annotations

import os
import sys
import warnings

import click

from logitstore.errors import LogitStoreError
from logitstore_cli.output import note, warn_on_stderr
from logitstore_cli.types import SIZE_NOTE

COMMANDS = {
    "append": "logitstore_cli.append",
    "commit": "logitstore_cli.commit",
    "compare": "logitstore_cli.compare",
    "completion": "logitstore_cli.completion",
    "convert": "logitstore_cli.convert",
    "demo": "logitstore_cli.demo",
    "export": "logitstore_cli.export",
    "head": "logitstore_cli.head",
    "info": "logitstore_cli.info",
    "merge": "logitstore_cli.merge",
    "pull": "logitstore_cli.pull",
    "push": "logitstore_cli.push",
    "recover": "logitstore_cli.recover",
    "repack": "logitstore_cli.repack",
    "select": "logitstore_cli.select",
    "show": "logitstore_cli.show",
    "split": "logitstore_cli.split",
    "stats": "logitstore_cli.stats",
    "status": "logitstore_cli.status",
    "validate": "logitstore_cli.validate",
    "view": "logitstore_cli.view",
}


class Lazy(click.Group):
    """Loads the module of a command when it is named: `--help` must not wait for what it does not use."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Names of the commands."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The command of this name."""
        if cmd_name not in COMMANDS:
            return None
        module = __import__(COMMANDS[cmd_name], fromlist=["command"])
        command: click.Command = module.command
        return command


@click.group(cls=Lazy, epilog=SIZE_NOTE, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="logitstore", prog_name="logitstore")
def main() -> None:
    """Teacher distributions as files: small, verified, fast.

    Example: logitstore convert capture.jsonl my-dataset && logitstore validate my-dataset
    """


def run() -> None:
    """Entry point: run a command and turn what happens into an exit status."""
    warnings.showwarning = warn_on_stderr
    try:
        code = main(prog_name="logitstore", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        note("Stopped.")
        code = 1
    except BrokenPipeError:
        # Whoever read our output has gone, as `head` does; nothing is left to say, and Python must not try.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except LogitStoreError as error:
        note(f"Error: {error}")
        code = 1
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        note(f"Error: {place}{error.strerror or error}")
        code = 1
    sys.exit(code if isinstance(code, int) else 0)
