"""Zero-padding of thin matrices, so that their rows start at multiples of 16 bytes."""

from torch import Tensor
from torch.nn.functional import pad


def padded(x: Tensor, *lengths: int) -> Tensor:
    """x padded with zeros to these lengths of its last dimensions; x itself if it has them already."""
    missing = [length - size for length, size in zip(reversed(lengths), reversed(x.shape), strict=False)]
    return pad(x, [each for length in missing for each in (0, length)]) if any(missing) else x


def round_up(size: int, step: int = 16) -> int:
    """The next multiple of `step`; 16 elements of fp32 are four loads of 16 bytes, and the least that tl.dot takes."""
    return -(-size // step) * step
