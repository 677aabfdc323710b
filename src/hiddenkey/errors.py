"""The errors a user can mend: each says what was given, what is allowed, and the way out."""

from __future__ import annotations

import re

_LONGEST_WORD, _LONGEST_MESSAGE = 1_000, 8_000


class UserError(ValueError):
    """A mistake in what was given. The command line shows it as one message, without a traceback.

    Long values in the message are cut in the middle.
    """

    def __init__(self, message: str) -> None:
        words = re.sub(rf"\S{{{_LONGEST_WORD + 1},}}", lambda word: _cut(word[0], _LONGEST_WORD), message)
        super().__init__(_cut(words, _LONGEST_MESSAGE))


def _cut(text: str, longest: int) -> str:
    """The text, or its beginning and its end where it is longer than `longest` characters."""
    if len(text) <= longest:
        return text
    half = (longest - 50) // 2  # 50 for what is said between them
    return f"{text[:half]}… ({len(text) - 2 * half:,} characters left out) …{text[-half:]}"


class UnknownNameError(UserError):
    """A name that no built-in and no installed plugin has."""


class RecipeError(UserError):
    """A recipe that does not parse: what was given, what is allowed, what to write instead."""


class PlanError(UserError):
    """A recipe that does not fit a model: what was asked, what the model has, what to write instead."""


class AttachError(UserError):
    """A model that has a recipe attached already, or has none where one is needed."""


class SavedRecipeError(UserError):
    """A saved recipe that is damaged, of a newer format, or not the one that is wanted."""


class LabError(UserError):
    """A mistake in what a person gave, told in one message; the command line shows it without a traceback."""


class ConfigError(LabError):
    """An unknown name or a value out of its range in a configuration."""


class DataError(LabError):
    """Data that cannot be trained on as it is: a missing column, rows without a label, nothing left."""


class RunError(LabError):
    """What stands in the way of a run or a report: a folder, a device, a storage, a worker, or records."""


class BusyError(RunError):
    """A folder in which another process is at work."""


class DamagedFileError(RunError):
    """A file that holds something else than what hiddenkey writes into it."""


class UnfitFolderError(RunError):
    """What lies in a run's folder is not what that run can go on from."""


class NonFiniteLossError(LabError):
    """The loss became NaN or infinite, so training stopped."""
