"""Calibrated LoRA initialization for quantized models (QuAILoRA, arXiv 2410.14713)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from quailora import evaluate as evaluate
    from quailora.adapters.base_record import check_base as check_base
    from quailora.adapters.convert import convert as convert
    from quailora.adapters.export import export as export
    from quailora.adapters.freeze import freeze_correction as freeze_correction
    from quailora.adapters.merge import merge as merge
    from quailora.calibration.gram import Gram as Gram
    from quailora.errors import QuailoraError as QuailoraError
    from quailora.ops import backends as backends
    from quailora.pipeline.build import build_adapter as build_adapter
    from quailora.pipeline.initialize import initialize as initialize
    from quailora.pipeline.refine import refine as refine
    from quailora.solvers.solve import LoraFactors as LoraFactors
    from quailora.solvers.solve import solve as solve

_HOMES = {
    "Gram": "calibration.gram",
    "LoraFactors": "solvers.solve",
    "QuailoraError": "errors",
    "backends": "ops",
    "build_adapter": "pipeline.build",
    "check_base": "adapters.base_record",
    "convert": "adapters.convert",
    "export": "adapters.export",
    "freeze_correction": "adapters.freeze",
    "initialize": "pipeline.initialize",
    "merge": "adapters.merge",
    "refine": "pipeline.refine",
    "solve": "solvers.solve",
}
__all__ = ["__version__", "evaluate", *_HOMES]


def __getattr__(name: str) -> Any:
    """Public names are imported when first used: `import quailora` and the command line's help stay quick."""
    if name == "evaluate":
        return import_module("quailora.evaluate")
    if name in _HOMES:
        return getattr(import_module(f"quailora.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'quailora' has no attribute '{name}'")
