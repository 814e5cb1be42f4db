"""alpha="matched": an alpha with which the learning rate that was tuned for QLoRA is right for the initialized adapter.

Under Adam without weight decay, factors (A, B), a scaling s and a rate η train like (c A, c B), s / c² and c η: the
product is the same after every step. So a rate that is too high by c is mended by a smaller alpha and larger factors,
and one that is too low by the reverse.

How far a first step moves the product s B A, in PEFT's letters, if it changes every element by η with random signs:

    from zero (B = 0, A uniform with variance 1 / 3n)    s η √(m r / 3)
    balanced factors of a product with singular values σ    η √(s (m + n) Σσ)

They are equal at s' = s² m r / (3 (m + n) Σσ).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import geometric_mean
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper

from quailora.errors import AdapterError
from quailora.reporting.report import LayerReport

MATCHED = "matched"


def check_alpha(alpha: str | None) -> None:
    """Raises AdapterError if `alpha` is neither None nor "matched"."""
    if alpha not in (None, MATCHED):
        raise AdapterError(
            f"alpha={alpha!r} (--alpha) is not {MATCHED!r}; in Python, a number is given as lora_alpha of the LoRA "
            "configuration"
        )


def matched_alpha(rows: Iterable[LayerReport], scalings: Mapping[str, float], alpha: float) -> float:
    """alpha times the geometric mean of s' / s over the linears, to four digits.

    scalings: PEFT's scaling s of each of these linears, at the alpha that the learning rate was tuned for.
    """
    ratios = [
        scalings[row.name] * row.outputs * row.rank / (3 * (row.outputs + row.inputs) * row.nuclear_norm)
        for row in rows
        if row.nuclear_norm > 0
    ]
    return float(f"{alpha * geometric_mean(ratios):.4g}") if ratios else alpha


def match_alpha(model: PeftModel, adapter: str, rows: Iterable[LayerReport]) -> tuple[float, str]:
    """Change the alpha of an adapter whose linears in `rows` have factors; the others begin at zero and keep theirs.

    Returns the factor by which it changed, and a note for the report. The factors are the caller's: their product has
    to stay the same.
    """
    rows = list(rows)
    config: Any = model.peft_config[adapter]
    layers = {
        name: layer
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer) and adapter in layer.r
    }
    scalings = {row.name: layers[row.name].scaling[adapter] for row in rows}
    tuned, alpha = config.lora_alpha, matched_alpha(rows, scalings, config.lora_alpha)
    factor = alpha / tuned
    keep: dict[str, float] = {}
    for name, layer in layers.items():
        if name in scalings:
            layer.lora_alpha[adapter] *= factor  # PEFT takes floats
            layer.scaling[adapter] *= factor
        else:
            # PEFT matches the alpha of a parameter by the parameter's name.
            key = f"{name}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else name
            keep[key.replace(".base_layer", "")] = layer.lora_alpha[adapter]
    others = {name: its * factor for name, its in (config.alpha_pattern or {}).items() if name not in keep}
    config.alpha_pattern = {**keep, **others}  # PEFT takes the first that matches
    config.lora_alpha = alpha
    return factor, (
        f"alpha is {alpha:g}: at a learning rate that suits QLoRA with alpha {tuned:g}, the first steps change the "
        "weights as much as they do there. That holds for Adam without weight decay, which acts on the factors, and "
        f"they are {'larger' if factor < 1 else 'smaller'} now"
    )
