"""The exceptions that gemmify raises on purpose, and the exit code that each one carries.

*Not applicable* is a value (`lowering.base.Reason`), *wrong input* is one of these exceptions, *our bug* is an
assertion.
Every message is one sentence or two: what was asked, what is required, what was found, what to try.
"""

from __future__ import annotations


class GemmifyError(Exception):
    """The work failed: a check did not hold, a file could not be written (exit code 1)."""

    exit_code = 1


class InputError(GemmifyError, ValueError):
    """The input or the call is wrong: a bad file, an unknown name, a wrong shape or dtype (exit code 2)."""

    exit_code = 2


class UnsupportedError(InputError):
    """The model holds an operator or a form of it that cannot be imported; the message names the node (exit code 2)."""


class CheckError(GemmifyError):
    """A numerical or structural check did not hold (exit code 1)."""


class IncompatibleError(InputError):
    """A library cannot run here: other CPU features, another architecture, another runtime version (exit code 2)."""


class GemmifyWarning(UserWarning):
    """Something the user should know that does not stop the work."""
