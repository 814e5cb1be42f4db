"""Build `quailora._C` with its CUDA half, import it, and try it: python csrc/cuda/check_build.py

To be run by a Python whose torch is a CUDA build, where a toolkit of the same major version is installed. No GPU is
needed; where there is one, the kernel is compared with fp64 on it, as the CPU's is anywhere.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
TOLERANCE = 1e-6  # relative Frobenius: what gram_ promises for fp32 input; bf16 and fp16 stay below


def build(folder: Path) -> Path:
    """The extension, built by setup.py as an installation would, but into `folder`."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder / "o")]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"QUAILORA_EXT": "1"}, check=True)
    (library,) = (folder / "quailora").glob("_C.*")
    return library


def error(device: torch.device, dtype: torch.dtype) -> float:
    """Relative error of H of 3000 tokens x 200 features, of which a quarter is masked and NaN."""
    x = torch.randn(3000, 200, device=device).to(dtype)
    keep = torch.rand(3000, device=device) < 0.75
    x[~keep] = torch.nan
    h = torch.zeros(200, 200, device=device)
    torch.ops.quailora.gram_(h, x, keep)
    exact = (x[keep].double().T @ x[keep].double()).tril()
    return ((h.double() - exact).norm() / exact.norm()).item()


def main() -> None:
    if torch.version.cuda is None:
        sys.exit(f"torch {torch.__version__} of {sys.executable} is not a CUDA build")
    with tempfile.TemporaryDirectory() as folder:
        torch.ops.load_library(build(Path(folder)))
    for key in ("CPU", "CUDA", "Meta"):
        if not torch._C._dispatch_has_kernel_for_dispatch_key("quailora::gram_", key):
            sys.exit(f"quailora::gram_ has no kernel for {key}: was a CUDA toolkit found? See the output of the build")
    print(f"quailora._C built and imported: torch {torch.__version__}, CUDA {torch.version.cuda}")
    devices = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if len(devices) == 1:
        print("no GPU here: the CUDA kernel was not run")
    for device in map(torch.device, devices):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            found = error(device, dtype)
            print(f"{device} {dtype}: relative error {found:.1e}")
            if not found <= TOLERANCE:
                sys.exit(f"that is more than {TOLERANCE}")


if __name__ == "__main__":
    main()
