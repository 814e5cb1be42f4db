"""The errors for bad input. The command line prints them in one line; any other exception is a bug and keeps its
traceback."""


class QuailoraError(Exception):
    """Bad input. The message says what is wrong, with its value, and how to fix it."""


class CheckpointError(QuailoraError):
    """The full-precision checkpoint is missing, incomplete or damaged, or does not match the model."""


class CalibrationError(QuailoraError):
    """The calibration data gives no usable tokens."""


class AdapterError(QuailoraError):
    """The LoRA configuration or the adapter is invalid."""


class MismatchError(AdapterError):
    """The adapter was not made for this base."""


class SolverError(QuailoraError):
    """A layer's weights or input statistics that no solver can work with, or invalid solver settings."""


class NotFiniteError(SolverError):
    """A layer's inputs are too large for the dtype; the same run would fail again."""


class BudgetError(QuailoraError):
    """No plan fits the memory budget; the message names the smallest budget that is enough."""
