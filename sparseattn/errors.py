"""One form for every message about a bad argument: its name, what was expected, what came, and what to do."""

from __future__ import annotations


def argument_error(
    name: str, expected: str, got: object, hint: str = "", kind: type[Exception] = ValueError
) -> Exception:
    """Build (not raise) the exception for a bad argument.

    Args:
        name: The argument as the caller spells it.
        expected: What would have been accepted.
        got: What came; shown with ``str``.
        hint: What to do about it, a sentence.
        kind: ``ValueError`` or ``TypeError``.
    """
    message = f"{name}: expected {expected}, got {got}."
    return kind(f"{message} {hint}" if hint else message)
