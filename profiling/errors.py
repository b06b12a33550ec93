"""Everything that profiling raises on purpose.

ProfilingError (ValueError)
├── ProfileFileError       a file is missing, unreadable or not what it should be
├── ProfileMismatchError   a profile was made for another model
├── UnsupportedModelError  a model cannot be measured, by name of the feature
└── ScoringError           a measurement gave no scores
"""

from pydantic import ValidationError


class ProfilingError(ValueError):
    """Base of all errors that profiling raises on purpose."""


class ProfileFileError(ProfilingError):
    """A file is missing, unreadable or does not hold what it should; the message names the file."""


class ProfileMismatchError(ProfilingError):
    """A profile was made for another model; the message says which numbers differ."""


class UnsupportedModelError(ProfilingError):
    """A model or its tokenizer has, or lacks, a feature without which it cannot be measured."""


class ScoringError(ProfilingError):
    """A measurement gave no scores, or scores that are not finite numbers."""


def describe_fault(error: ValidationError) -> str:
    """Says in one line which field failed first and why."""
    fault = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in fault["loc"])
    message = fault["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
