"""The errors of this room: each names what was given, what is allowed, and the way out."""

from ..errors import UserError


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
