"""The errors a person can cause. Each message says what happened, where, and what to do next."""

from __future__ import annotations


class VerifyError(Exception):
    """Base of every error that ends a command with one sentence and exit code 2."""


class UsageError(VerifyError):
    """The command was asked for something that it cannot do."""


class UnreadableError(VerifyError):
    """A file of a run directory cannot be read as what its name says; becomes an `unreadable` node."""


class TrainingError(VerifyError):
    """A training could not be started, or is not the one that was asked for."""
