"""The ``sparseattn`` command. One file a command; what a command needs is imported when it runs."""

from __future__ import annotations

import sys

_HINT = "the sparseattn command needs {name}: pip install 'sparseattn[cli]'"


def main() -> None:
    """Entry point of the ``sparseattn`` script."""
    try:
        from sparseattn.cli.app import app
    except ModuleNotFoundError as error:
        if error.name in ("typer", "rich"):
            sys.exit(_HINT.format(name=error.name))
        raise
    app()
