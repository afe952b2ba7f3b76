"""Every error a user can cause or meet, but for onnxruntime's own in the middle of a request (a GPU out of memory).

Each has the exit code that the command-line tools return for it.
"""

LONGEST_REASON = 300  # characters of what another library says
NO_THREAD = "can't start new thread"  # of threading
NO_MEMORY = ("can't allocate memory", "CUDA out of memory", NO_THREAD)  # of torch, on the CPU and on CUDA


class AutoSteerError(Exception):
    """Base of all our errors: one line that says what is wrong, where, and what to do."""

    exit_code = 1


class PackageError(AutoSteerError):
    """A package, checkpoint or safety folder is missing, damaged, of another version, or inconsistent."""

    exit_code = 3


class UnsupportedModelError(PackageError):
    """The checkpoint is intact, but no file in models/ describes its kind."""


class ProviderError(AutoSteerError):
    """The execution provider (CPU, CUDA) that was asked for cannot run here."""

    exit_code = 4


class InputError(AutoSteerError):
    """A prompt, image or data file is unusable, or does not fit the model's context."""

    exit_code = 5


class OptionError(InputError):
    """A number or a text that does not fit. `field` is its name in Python; a command names its option instead."""

    def __init__(self, field: str, problem: str):
        super().__init__(field, problem)
        self.field, self.problem = field, problem

    def __str__(self) -> str:
        return self.field + self.problem


class CancelledError(AutoSteerError):
    """Somebody cancelled the request while it ran (cancel.py)."""

    exit_code = 130


class AuditError(AutoSteerError):
    """The audit record of a request cannot be written."""


class CheckError(AutoSteerError):
    """A validation or package check ran and failed."""

    exit_code = 6


def is_out_of_memory(err: BaseException) -> bool:
    """Whether `err` says that memory is short. PyTorch and threading say so with a RuntimeError."""
    says_so = isinstance(err, RuntimeError) and any(words in str(err) for words in NO_MEMORY)
    return says_so or isinstance(err, MemoryError)


def first_line(err: BaseException) -> str:
    """What an exception says, in one line without a full stop; with the second where the first ends with a colon."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    said = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return said[:LONGEST_REASON].rstrip(".") or type(err).__name__
