"""The command line: typer commands, terminal progress and tables. Each command calls one function of `hpo.api`."""

from hpo.cli.app import main

__all__ = ["main"]
