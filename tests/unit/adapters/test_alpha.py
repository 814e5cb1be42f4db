"""alpha="matched": the identity behind it, the length of a first step, and adapters made with it."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import quailora
from quailora.adapters.alpha import matched_alpha
from quailora.adapters.saved_adapter import SavedAdapter
from quailora.calibration.data import Calibration
from quailora.cli.options import parse_alpha
from quailora.errors import QuailoraError
from quailora.reporting.report import LayerReport, Report
from tests.helpers import tiny

DATA = Calibration(tiny.sequences(), "random tokens")
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def row(outputs: int, inputs: int, rank: int, nuclear_norm: float, name: str = "linear") -> LayerReport:
    return LayerReport(name, outputs, inputs, rank, 1, 0, 0, 0, 0, 0, 0, nuclear_norm)


def trained(a: Tensor, b: Tensor, scaling: float, rate: float, steps: int) -> Tensor:
    """scaling * B A after `steps` of Adam on a fixed regression. a (r, n), b (m, r), fp64."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(20, size, generator=generator, dtype=torch.float64) for size in (a.shape[1], len(b)))
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    adam = torch.optim.Adam([a, b], lr=rate, eps=0)
    for _ in range(steps):
        adam.zero_grad()
        (scaling * x @ a.T @ b.T - y).square().mean().backward()
        adam.step()
    return (scaling * b @ a).detach()


@given(factor=st.floats(0.1, 10), steps=st.integers(1, 12), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_adam_trains_the_rescaled_form_alike(factor: float, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 7), (5, 3)))
    plain = trained(a, b, 0.25, 1e-2, steps)
    rescaled = trained(factor * a, factor * b, 0.25 / factor**2, factor * 1e-2, steps)
    torch.testing.assert_close(rescaled, plain, rtol=1e-9, atol=1e-9)


def test_a_first_step_goes_as_far_as_from_zero() -> None:
    """With signs at random the lengths agree to the noise of 64 x 32 signs."""
    torch.manual_seed(0)
    m, n, r, alpha = 96, 64, 32, 16
    scaling, zero_a = alpha / r, (torch.rand(r, n) * 2 - 1) / math.sqrt(n)
    a, b = 0.3 * torch.randn(r, n), 0.3 * torch.randn(m, r)
    a *= (b.norm() / a.norm()).sqrt()
    b *= a.norm() / b.norm()
    new = matched_alpha([row(m, n, r, float(a.norm() ** 2))], {"linear": scaling}, alpha)
    root = math.sqrt(new / r)  # factors with PEFT's scaling taken out
    signs = [torch.randn(m, r).sign() for _ in range(2)], [torch.randn(r, n).sign() for _ in range(2)]
    from_zero = scaling * signs[0][0] @ zero_a
    ours = new / r * (signs[0][1] @ (a / root) + (b / root) @ signs[1][1])
    assert float(ours.norm()) == pytest.approx(float(from_zero.norm()), rel=0.05)


def test_it_is_the_geometric_mean_of_the_layers() -> None:
    one, other = row(8, 8, 4, 0.1, "one"), row(8, 8, 4, 1.6, "other")
    apart = [matched_alpha([each], {each.name: 0.5}, 16) for each in (one, other)]
    both = matched_alpha([one, other], {"one": 0.5, "other": 0.5}, 16)
    assert both == pytest.approx(math.sqrt(apart[0] * apart[1]), rel=1e-3)
    assert matched_alpha([row(8, 8, 4, 0.0)], {"linear": 0.5}, 16) == 16


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8}}],
    ids=["plain", "rslora", "patterns"],
)
def test_the_product_stays_and_the_alphas_change(settings: dict[str, object], tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    reports = {}
    for name, alpha in (("plain", None), ("matched", "matched")):
        config = LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=["q_proj", "down_proj", "embed_tokens"],
            task_type="CAUSAL_LM",
            **settings,
        )
        reports[name] = quailora.build_adapter(
            folder, config, DATA, tmp_path / name, quantization=NF4, alpha=alpha, progress=False
        )
    plain, matched = (SavedAdapter(tmp_path / name) for name in reports)
    for module in plain.modules:
        (a, b), (its_a, its_b) = plain.factors(module), matched.factors(module)
        torch.testing.assert_close(its_b @ its_a, b @ a, rtol=1e-6, atol=1e-7)
    factor = matched.config.lora_alpha / 16
    assert factor not in (0, 1)
    assert matched.config.alpha_pattern["model.embed_tokens"] == 16  # it begins at zero
    if "alpha_pattern" in settings:
        assert matched.config.alpha_pattern["q_proj"] == pytest.approx(8 * factor)
    assert reports["matched"].record["lora"]["alpha"] == matched.config.lora_alpha
    assert any(f"alpha is {matched.config.lora_alpha:g}" in note for note in reports["matched"].notes)
    assert Report.load(tmp_path / "matched").layers[0].nuclear_norm > 0


def test_initialize_changes_the_loaded_adapter(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    quailora.build_adapter(folder, config, DATA, tmp_path / "built", quantization=NF4, alpha="matched", progress=False)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4, device_map="cpu")
    model = get_peft_model(base, config)
    quailora.initialize(model, DATA, checkpoint=folder, alpha="matched", progress=False)
    built = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4, device_map="cpu"), tmp_path / "built"
    )
    assert model.peft_config["default"].lora_alpha == built.peft_config["default"].lora_alpha != 16
    layers = {name: each for name, each in built.named_modules() if isinstance(each, LoraLayer)}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            assert layer.scaling["default"] == pytest.approx(layers[name].scaling["default"])
            delta, expected = (each.get_delta_weight("default") for each in (layer, layers[name]))
            torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-6)


def test_what_the_command_line_takes() -> None:
    assert [parse_alpha(text) for text in ("32", "matched", "matched:8")] == [
        (32, None),
        (16, "matched"),
        (8, "matched"),
    ]
    for text in ("0", "matched:", "matched:x", "best", "1.5", "best:16", ":16"):
        with pytest.raises(QuailoraError, match="--alpha"):
            parse_alpha(text)
    with pytest.raises(QuailoraError, match=r"alpha='best' \(--alpha\)"):
        quailora.build_adapter("nowhere", None, DATA, "nowhere-either", alpha="best")


def test_experts_that_begin_at_zero_keep_their_alpha(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model", "qwen3_moe")
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    quailora.build_adapter(
        folder, config, DATA, tmp_path / "initial", quantization=NF4, alpha="matched", progress=False
    )
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4, device_map="cpu")
    model = PeftModel.from_pretrained(base, tmp_path / "initial")
    scalings = {name: layer.scaling["default"] for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    assert {scaling for name, scaling in scalings.items() if "experts" in name} == {2.0}
    assert all(scaling != 2.0 for name, scaling in scalings.items() if "q_proj" in name)
