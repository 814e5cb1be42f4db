"""The model card of an adapter: README.md in its folder."""

from __future__ import annotations

import json
from typing import Any

from quailora.modeling.model_class import CAUSAL_LM
from quailora.quantization.registry import from_dict
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
    config_class, config = quantization.code()
    revision = f"    revision={base['revision']!r},\n" if base["revision"] else ""
    auto_class = base.get("auto_class", CAUSAL_LM)
    remote = "    trust_remote_code=True,\n" if base.get("trust_remote_code") else ""
    return f"""---
library_name: peft
base_model: {json.dumps(base["checkpoint"], ensure_ascii=False)}
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
{len(report.layers)} linear layers were initialized, and {report.error_left:.1%} of their output error on that data is
left (geometric mean). `report.md` lists every layer.

{settings_table(record)}

## Use

Load the base quantized exactly as here:

```python
from peft import PeftModel
from transformers import {auto_class}, {config_class}

quantization = {config}
model = {auto_class}.from_pretrained(
    {base["checkpoint"]!r},
{revision}{remote}    dtype={base["dtype"]!r},
    quantization_config=quantization,
)
model = PeftModel.from_pretrained(model, {folder!r}, is_trainable=True)
```

Training and serving the adapter do not need quailora.

## Do not merge it into the full-precision weights

A Bᵀ approximates the quantization error W - Q. The full-precision weights have no such error, and a base that was
quantized differently has another one, so adding this adapter to either makes the model worse. To serve the model,
before or after training, use

- `quailora merge`, which writes the dense checkpoint Q + scaling · B A, or
- `quailora convert`, which turns what training learned into an adapter for the full-precision weights. It needs this
  folder as it is now, so keep a copy before you train.
"""
