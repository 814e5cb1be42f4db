"""What a launch may choose, by the GPU it runs on: tile sizes, warps and stages of the pipeline.

Each kernel has a short list of settings for a problem on a target, with the one expected to be fastest first. A launch
uses the first, unless `tuning.tune` has timed the list on this GPU and saved a file that names another.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import triton

Setting = dict[str, int]  # keywords of a launch: constants of the kernel, num_warps, num_stages

# Shared memory that one block may have, bytes (CUDA Programming Guide, "Compute Capabilities"; AMD CDNA 3 white paper).
SHARED_BYTES = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}


def shared_bytes(target: str) -> int:
    """As in SHARED_BYTES; for a target that is not listed, the smallest of that vendor's."""
    return SHARED_BYTES.get(target, SHARED_BYTES["gfx942" if target.startswith("gfx") else "sm_86"])


# Whether the compiler may fuse a multiplication and an addition into one operation, which rounds once. It may not:
# bitsandbytes rounds Q to fp32 before anything is subtracted from it. That costs one instruction per element where Q
# is fp32 or int8 and none elsewhere: `tl.dot` is made of fused operations whatever this says.
FP_FUSION = False


@dataclass(frozen=True)
class Problem:
    """What `tuning.tune` times: `run` makes one launch with a setting of the list."""

    name: str
    settings: Sequence[Setting]
    run: Callable[[Setting], object]


@cache
def target_of(device: torch.device) -> str:
    """The device's target, as in SHARED_BYTES; for the CPU, where Triton interprets, that of the smallest GPU."""
    if device.type == "cpu":
        return "sm_86"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def chosen(problem: str, settings: Sequence[Setting], device: torch.device) -> Setting:
    """The setting to launch with: the fastest one if it was timed, else the first."""
    fastest = _timed(device).get(problem)
    return fastest if fastest in settings else settings[0]


def timings_file(device: torch.device) -> Path:
    """Where the fastest settings are kept: in $XDG_CACHE_HOME or ~/.cache, by GPU, Triton and these kernels' text."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quailora" / "tuning"
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    sources = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    words = (name.replace(" ", "_").replace("/", "_"), triton.__version__, hashlib.sha256(sources).hexdigest()[:16])
    return folder / ("-".join(words) + ".json")


def forget_timings() -> None:
    """Read the file again at the next launch; it is otherwise read once."""
    _timed.cache_clear()


@cache
def _timed(device: torch.device) -> dict[str, Setting]:
    """Problem -> its fastest setting, as the file says; empty without one."""
    path = timings_file(device)
    try:
        timed = json.loads(path.read_text())
        if not isinstance(timed, dict):
            raise ValueError("it is no JSON object")
        return timed
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(
            f"{path} cannot be read ({error}): kernels run with default settings; "
            "`quailora doctor --tune` writes it anew",
            stacklevel=2,
        )
        return {}
