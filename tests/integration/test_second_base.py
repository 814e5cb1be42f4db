"""A base that is not bitsandbytes', and has no fused kernels, works through the protocol alone."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import quailora
import quailora.quantization.registry
from quailora.errors import AdapterError, MismatchError
from quailora.quantization.verify import digest
from quailora.reporting.report import Report
from tests.helpers import int4, tiny
from tests.helpers.int4 import Int4, Int4Config, Int4Linear

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    with int4.registered():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("int4") / "model")


def load(folder: Path, seed: int | None = None) -> Any:
    """The quantized base; with `seed`, codes that do not follow from W, as calibration chooses them."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    int4.quantize_in_place(model)
    if seed is not None:
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, Int4Linear):
                module.codes = (module.codes + torch.randint(-1, 2, module.codes.shape)).clamp(-8, 7).to(torch.int8)
    return model


def adapt(model: Any) -> PeftModel:
    return get_peft_model(model, int4.lora_config(r=4, target_modules=TARGETS))


def initialize(model: PeftModel, folder: Path) -> Report:
    return quailora.initialize(model, tiny.sequences(), checkpoint=folder, device="cpu", progress=False)


def test_it_is_initialized_recorded_and_checked(folder: Path, tmp_path: Path) -> None:
    model = adapt(load(folder))
    report = initialize(model, folder)
    assert len(report.layers) == 4 and report.error_left < 0.95
    model.save_pretrained(str(tmp_path / "adapter"))
    report.save(tmp_path / "adapter")
    digests = report.record["base"]["digests"]
    base = load(folder)
    assert digests.keys() == {row.name for row in report.layers}
    for name, recorded in digests.items():
        assert digest(Int4.read(base.get_submodule(name))) == recorded
    quailora.check_base(base, tmp_path / "adapter")

    with torch.no_grad():
        tokens = torch.arange(2, 18)[None]
        expected = model.eval()(tokens).logits
    config = int4.lora_config(r=4, target_modules=TARGETS)
    again = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), config=config).eval()
    torch.testing.assert_close(again(tokens).logits, expected)


def test_build_adapter_needs_nothing_but_its_config(folder: Path, tmp_path: Path) -> None:
    report = quailora.build_adapter(
        folder,
        int4.lora_config(r=4, target_modules=TARGETS),
        tiny.sequences(),
        tmp_path / "adapter",
        quantization=Int4Config(),
        device="cpu",
        progress=False,
    )
    in_place = initialize(adapt(load(folder)), folder)
    assert report.record["base"]["digests"] == in_place.record["base"]["digests"]
    assert "Int4Config" in (tmp_path / "adapter" / "README.md").read_text()
    quailora.check_base(load(folder), tmp_path / "adapter")


def test_codes_that_calibration_chose_pass_where_they_are_the_recorded_ones(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="is not the quantized weight of"):  # no record: nearest rounding is asked
        initialize(adapt(load(folder, seed=1)), folder)

    model = load(folder, seed=1)
    base_folder = tmp_path / "base"
    record = initialize(adapt(load(folder)), folder).record
    record["base"] |= {
        "rounding": "calibrated",
        "digests": {n: digest(Int4.read(m)) for n, m in model.named_modules() if isinstance(m, Int4Linear)},
    }
    base_folder.mkdir()
    (base_folder / "quailora.json").write_text(json.dumps(record))
    model.name_or_path = str(base_folder)
    peft_model = adapt(model)
    report = initialize(peft_model, folder)
    assert report.record["base"]["rounding"] == "calibrated"
    adapter = tmp_path / "adapter"
    peft_model.save_pretrained(str(adapter))
    report.save(adapter)

    quailora.check_base(load(folder, seed=1), adapter, checkpoint=folder)
    for other in (load(folder), load(folder, seed=2)):
        with pytest.raises(MismatchError, match=r"its codes are not the recorded ones .* calibration chose"):
            quailora.check_base(other, adapter, checkpoint=folder)
    other = load(folder, seed=2)
    other.name_or_path = str(base_folder)
    with pytest.raises(MismatchError, match="its codes are not the recorded ones"):
        initialize(adapt(other), folder)


def test_a_library_that_is_not_known_is_named(folder: Path) -> None:
    with pytest.raises(
        AdapterError, match="'nowhere', which is not supported here; known: bitsandbytes, gptq, tests-int4"
    ):
        quailora.quantization.registry.from_dict({"library": "nowhere"})
