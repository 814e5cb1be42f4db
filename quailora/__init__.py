"""A start for QLoRA fine-tuning that undoes most of what 4-bit quantisation costs (QuAILoRA, arXiv 2410.14713)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from quailora import evaluate as evaluate
    from quailora.base import check_base as check_base
    from quailora.gram import Gram as Gram
    from quailora.ops import backends as backends
    from quailora.pipeline import build_adapter as build_adapter
    from quailora.pipeline import initialize as initialize
    from quailora.serving import convert as convert
    from quailora.serving import merge as merge
    from quailora.solvers import LoraFactors as LoraFactors
    from quailora.solvers import solve as solve

_HOMES = {
    "Gram": "gram",
    "LoraFactors": "solvers",
    "backends": "ops",
    "build_adapter": "pipeline",
    "check_base": "base",
    "convert": "serving",
    "initialize": "pipeline",
    "merge": "serving",
    "solve": "solvers",
}
__all__ = ["__version__", "evaluate", *_HOMES]


def __getattr__(name: str) -> Any:
    """Public names are imported when first used: `import quailora` and the command line's help stay quick."""
    if name == "evaluate":
        return import_module("quailora.evaluate")
    if name in _HOMES:
        return getattr(import_module(f"quailora.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'quailora' has no attribute '{name}'")
