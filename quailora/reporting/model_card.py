"""The model card of an adapter: README.md in its folder."""

from __future__ import annotations

import json
from typing import Any

from quailora.modeling.model_class import CAUSAL_LM
from quailora.quantization.registry import from_dict
from quailora.reporting.markdown import count
from quailora.reporting.record import settings_table
from quailora.reporting.report import Report


def model_card(record: dict[str, Any], report: Report, folder: str = "path/to/this/folder") -> str:
    """The text of README.md, with the metadata that Hugging Face reads.

    record: the adapter's, usually `report.record`.
    folder: the adapter's folder as the code example names it.

    Raises:
        AdapterError: no config of transformers gives the recorded quantization, so no code could load the base.
    """
    base = record["base"]
    quantization = from_dict(base["quantization"])
    written = base.get("path")
    revision = f"    revision={base['revision']!r},\n" if base["revision"] else ""
    auto_class = base.get("auto_class", CAUSAL_LM)
    remote = "    trust_remote_code=True,\n" if base.get("trust_remote_code") else ""
    linears = count(len(report.layers), "linear layer was", "linear layers were")
    if written:
        loading = _loading_written(base, auto_class, remote, folder)
    else:
        loading = _loading(base, auto_class, revision + remote, folder)
    return f"""---
library_name: peft
base_model: {json.dumps(written or base["checkpoint"], ensure_ascii=False)}
base_model_relation: adapter
pipeline_tag: {"text-generation" if auto_class == CAUSAL_LM else "image-text-to-text"}
tags:
- quailora
- qlora
- lora
{chr(10).join(f"- {tag}" for tag in quantization.tags)}
---

# A starting point for QLoRA fine-tuning of {base["checkpoint"]}

This LoRA adapter has not been trained yet. It is initialized to reduce the error that quantization causes: for each
linear layer, A and B minimize ‖(W - Q - A Bᵀ) X‖, where W is the full-precision weight, Q the quantized weight and X
the layer's inputs on calibration data (QuAILoRA, [arXiv 2410.14713](https://arxiv.org/abs/2410.14713)).
{linears} initialized, and {report.error_left:.1%} of the output error on that data is
left (geometric mean). {_depth(record, report)}`report.md` lists every layer.

{settings_table(record)}

## Use

{loading}
Training and serving the adapter do not need quailora.

{_learning_rate(record, folder)}

## Do not merge it into the full-precision weights

A Bᵀ approximates the quantization error W - Q. The full-precision weights have no such error, and a base that was
quantized differently has another one, so adding this adapter to either makes the model worse. To serve the model,
before or after training, use

- `quailora merge`, which writes the dense checkpoint Q + scaling · B A, or
- `quailora convert`, which turns what training learned into an adapter for the full-precision weights. It needs this
  folder as it is now, so keep a copy before you train.
"""


def _depth(record: dict[str, Any], report: Report) -> str:
    """What was done along the depth."""
    behind = _QUANTIZED_INPUTS if any(layer.quantized_inputs for layer in report.layers) else ""
    return behind + (_REFINED if report.blocks else "") + _refined_model(record, report)


_QUANTIZED_INPUTS = """X are the inputs behind quantized layers with their factors, and W is changed to undo part of
what those left (GPTAQ, [arXiv 2504.02692](https://arxiv.org/abs/2504.02692)). """
_REFINED = """Then the factors of each block were trained together, on that data, for the output of the block in the
quantized model. """


def _refined_model(record: dict[str, Any], report: Report) -> str:
    if report.model is None:
        return ""
    return (
        f"{'Last' if report.blocks else 'Then'} all factors were trained together, on "
        f"{record['model_refinement']['data']}, for what the quantized model predicts: its KL divergence from the "
        f"full-precision model on held-out tokens was {report.model.kl:.4f} nats, and is {report.model.kl_after:.4f}. "
    )


def _learning_rate(record: dict[str, Any], folder: str) -> str:
    lora = record["lora"]
    if "alpha_tuned" in lora:
        return (
            f"**Learning rate**: one that was tuned for QLoRA with alpha {lora['alpha_tuned']:g}. Alpha is "
            f"{lora['alpha']:g} here so that it suits this adapter. Weight decay acts on the factors, and they have "
            "another size than with that alpha."
        )
    return (
        "**Learning rate**: lower than QLoRA's; try a quarter of it first. Or keep this adapter frozen and train "
        f"another on top of it at QLoRA's rate: `model = quailora.freeze_correction(base, {folder!r})`."
    )


def _loading(base: dict[str, Any], auto_class: str, arguments: str, folder: str) -> str:
    config_class, config = from_dict(base["quantization"]).code()
    return f"""Load the base quantized exactly as here:

```python
from peft import PeftModel
from transformers import {auto_class}, {config_class}

quantization = {config}
model = {auto_class}.from_pretrained(
    {base["checkpoint"]!r},
{arguments}    dtype={base["dtype"]!r},
    quantization_config=quantization,
)
model = PeftModel.from_pretrained(model, {folder!r}, is_trainable=True)
```
"""


def _loading_written(base: dict[str, Any], auto_class: str, remote: str, folder: str) -> str:
    loading = from_dict(base["quantization"]).loading()
    loading = f"{loading}\n\n" if loading else ""
    return f"""The base is a checkpoint of its own, {base["path"]}, and no other will do:

```python
from peft import PeftModel
from transformers import {auto_class}

model = {auto_class}.from_pretrained(
    {base["path"]!r},
{remote}    dtype={base["dtype"]!r},
)
model = PeftModel.from_pretrained(model, {folder!r}, is_trainable=True)
```

{loading}If the base is moved, `base_model_name_or_path` in `adapter_config.json` has to follow; `quailora merge` and
`eval` take `--base`.
"""


def base_card(record: dict[str, Any]) -> str:
    """The text of README.md of a base that was written."""
    base = record["base"]
    quantization = from_dict(base["quantization"])
    loading = quantization.loading()
    if loading:
        loading = f"\n## Loading\n\n{loading}\n\n{quantization.notes()}"
    settings = base.get("rounding_settings")
    how = "Its codes are those of nearest rounding."
    if settings:
        magr = f"MagR (arXiv 2406.00800, strength {settings['magr']:g}), then " if settings.get("magr") else ""
        how = (
            f"Its codes were chosen by calibration: {magr}error feedback (GPTQ, arXiv 2210.17323) with damping "
            f"{settings['damping']:g}, in turn with the factors of the adapter, {settings['alternations']} times."
        )
    return f"""{_front_of_base(base, quantization.tags)}
# {base["checkpoint"]}, quantized: {quantization.describe()}

{how} It was made together with a LoRA adapter that undoes most of what is left of the quantization error, and is meant
to be fine-tuned with that adapter; alone it is worse.

{settings_table(record)}
{loading}
"""


def exported_card(record: dict[str, Any], format: str) -> str:
    """The text of README.md of a base that `quailora export` wrote. record: that of the base it was made from."""
    base = record["base"]
    quantization = from_dict(base["quantization"])
    return f"""{_front_of_base(base, [format, *quantization.tags[1:]])}
# {base["checkpoint"]}, quantized: {quantization.describe()}, in the format of {format}

For servers. These are the integers and scales of a base in GPTQ's format, in other places, so the quantized weights are
the same to the bit, and the LoRA adapter that was made for that base is served on this one as it is. Fine-tune on the
base in GPTQ's format. Alone, without the adapter, it is worse.

{settings_table(record)}
"""


def _front_of_base(base: dict[str, Any], tags: list[str]) -> str:
    return f"""---
library_name: transformers
base_model: {json.dumps(base["checkpoint"], ensure_ascii=False)}
base_model_relation: quantized
pipeline_tag: {"text-generation" if base.get("auto_class", CAUSAL_LM) == CAUSAL_LM else "image-text-to-text"}
tags:
- quailora
{chr(10).join(f"- {tag}" for tag in tags)}
---
"""
