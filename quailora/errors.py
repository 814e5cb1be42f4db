"""What can be wrong with what a user gave us. The command line prints these in one line; anything else is a bug and
keeps its traceback."""


class QuailoraError(Exception):
    """A problem with the input, said so that it can be mended: the thing, its value, and the way out."""


class CheckpointError(QuailoraError):
    """The full-precision checkpoint is missing, incomplete, damaged, or does not fit the model."""


class CalibrationError(QuailoraError):
    """The calibration data gives no usable tokens."""


class AdapterError(QuailoraError):
    """The LoRA configuration, or an adapter given to us, asks for something that cannot be right."""


class MismatchError(AdapterError):
    """An adapter and a base that do not belong together."""


class SolverError(QuailoraError):
    """A layer's weights or statistics that no solver can work with."""


class BudgetError(QuailoraError):
    """No plan fits the memory budget; the message names the smallest that would do."""
