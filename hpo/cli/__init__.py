"""The command line: typer commands, terminal progress and tables. Each command calls one function of `hpo.api`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, `hpo.cli.app`. Ctrl-C ends it without a traceback while it is still being imported, too."""
    try:
        from hpo.cli.app import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()
