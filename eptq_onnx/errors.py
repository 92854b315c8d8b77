"""Every error that eptq-onnx raises on purpose.

::

    EptqError
    ├── ConfigError        an option or a target file is wrong
    ├── ModelError         the float model cannot be read or has nothing to quantize
    ├── DataError          the calibration data does not fit the model
    ├── InstallError       a runtime or gradient builder is missing or damaged
    ├── GradientError      a gradient graph could not be built
    ├── CapabilityError    a runtime cannot do what is asked of it here
    ├── WorkerError        no process or machine is left to work on
    └── OutputError        a result could not be written

The message of each is one sentence that names the node, file or option and says what to do; the command
line prints it and exits with code 2.
"""


class EptqError(Exception):
    """Base of all errors that a user can act upon."""


class ConfigError(EptqError):
    """An option or a target description is wrong."""


class ModelError(EptqError):
    """The float model cannot be read, is invalid, or has nothing to quantize."""


class DataError(EptqError):
    """The calibration data does not fit the model."""


class InstallError(EptqError):
    """A runtime, or the gradient builder of onnxruntime's training build, is missing or damaged."""


class GradientError(EptqError):
    """A gradient graph could not be built for the model."""


class CapabilityError(EptqError):
    """A runtime cannot do what is asked of it, on this machine or at all."""


class WorkerError(EptqError):
    """No worker is left, or what a worker sent back cannot be used."""


class OutputError(EptqError):
    """A result could not be written."""


def one_line(error: BaseException, most: int | None = 300) -> str:
    """The message of somebody else's error on one line, for a sentence of ours; None: all of it.

    Parameters
    ----------
    error : BaseException
    most : int or None
        Characters.
    """
    return " ".join(str(error).split())[:most]
