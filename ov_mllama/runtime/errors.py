"""Errors that a user can fix. Each message has the problem, numbers, and the fix.

Every class also derives from the built-in exception that fits, so `except ValueError` works. Misuse of the Python
interface, such as a misspelt argument, stays a plain `TypeError` or `AttributeError`.
"""


class UserError(Exception):
    """An error that a user can fix. Commands print its message without a traceback."""


class InputError(UserError, ValueError):
    """Invalid input: an argument, a prompt, a checkpoint or a model's folder."""


class ImageError(InputError):
    """An image that cannot be used."""


class TemplateError(InputError):
    """A conversation that a model's chat template refuses, or a model without one."""


class NumericalError(UserError, FloatingPointError):
    """Results that are not finite."""


class OutOfMemoryError(UserError, MemoryError):
    """Less free memory than a step needs."""


class DiskError(UserError, OSError):
    """A disk that is full, or a file that cannot be read or written: `DiskError(errno, message)`."""

    def __str__(self) -> str:
        return self.strerror or super().__str__()


class NotFoundError(UserError, FileNotFoundError):
    """A missing file: `NotFoundError(message)`."""


class AccessError(UserError, PermissionError):
    """A missing permission: `AccessError(message)`."""
