"""Bad input: the error says what, how much and the way out, before anything is computed, and leaves nothing behind."""

import errno
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import quailora
from quailora import files
from quailora.calibration.calls import Calls
from quailora.errors import (
    AdapterError,
    CalibrationError,
    CheckpointError,
    MismatchError,
    NotFiniteError,
    QuailoraError,
    SolverError,
)
from quailora.files import new_folder
from quailora.modeling.checkpoint import SINGLE
from quailora.modeling.devices import default_device
from quailora.modeling.streamed_model import StreamedModel
from quailora.pipeline import outputs
from quailora.pipeline import resume as workspace
from quailora.pipeline.loop import Loop
from tests.helpers import tiny

TOKENS = torch.randint(2, tiny.VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def lora(init_lora_weights: bool | str = True, **settings: Any) -> LoraConfig:
    defaults: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    config = LoraConfig(**(defaults | settings))
    config.init_lora_weights = init_lora_weights  # type: ignore[assignment]  # PEFT asks LoftQ for scipy otherwise
    return config


@dataclass
class Case:
    """What is wrong: changed in the checkpoint's folder, or an argument of `build_adapter`."""

    error: type[QuailoraError]
    words: tuple[str, ...]  # that the message must have
    spoil: Callable[[Path], object] = lambda folder: None
    family: str = "llama"
    lora: dict[str, Any] = field(default_factory=dict)
    data: Any = TOKENS
    arguments: dict[str, Any] = field(default_factory=dict)


def set_weight(name: str, value: float) -> Callable[[Path], object]:
    """Put a value in the middle of one weight."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        tensors[name].view(-1)[tensors[name].numel() // 2] = value
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})

    return spoil


def set_config(**values: Any) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return spoil


def drop_weight(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / SINGLE)


def as_integers(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    save_file(tensors, folder / SINGLE)


def truncate(folder: Path) -> None:
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[: len(content) // 2])


def shards_with_one_missing(folder: Path) -> None:
    (folder / SINGLE).unlink()
    tiny.model().save_pretrained(folder, max_shard_size="100KB")
    sorted(folder.glob("*.safetensors"))[1].unlink()


ALL_MASKED: Any = [{"input_ids": row, "attention_mask": torch.zeros(16)} for row in TOKENS]
Q_PROJ = "model.layers.0.self_attn.q_proj"

KNOWN_AT_ONCE = {
    "a missing shard": Case(CheckpointError, ("shard model-00002-of-", "missing", "download"), shards_with_one_missing),
    "a truncated file": Case(CheckpointError, (SINGLE, "bytes", "truncated", "download it again"), truncate),
    "a missing tensor": Case(CheckpointError, ("1 of 20", "model.layers.1.mlp.up_proj.weight"), drop_weight),
    "integers for weights": Case(
        CheckpointError, ("model.layers.0.mlp.up_proj.weight", "I8", "full-precision"), as_integers
    ),
    "a wider configuration": Case(
        CheckpointError,
        ("gate_proj.weight", "[128, 64]", "[192, 64]", "config.json"),
        set_config(intermediate_size=192),
    ),
    "a deeper configuration": Case(CheckpointError, ("9 of 29", "model.layers.2."), set_config(num_hidden_layers=3)),
    "a configuration with a string for a number": Case(
        CheckpointError, ("config.json", "hidden_size", "big"), set_config(hidden_size="big")
    ),
    "a configuration that makes no model": Case(
        CheckpointError, ("configuration of", "KeyError: 'no_such'"), set_config(hidden_act="no_such")
    ),
    "an unknown architecture": Case(CheckpointError, ("config.json", "no_such"), set_config(model_type="no_such")),
    "an unknown dtype": Case(CheckpointError, ("config.json", "bfloat17"), set_config(dtype="bfloat17")),
    "an encoder-decoder": Case(CheckpointError, ("no causal language model", "T5"), set_config(model_type="t5")),
    "quantized already": Case(
        CheckpointError,
        ("already quantized", "full-precision checkpoint"),
        set_config(quantization_config={"quant_method": "gptq", "bits": 4}),
    ),
    "a rank above every min(m, n)": Case(AdapterError, ("rank 65", "every targeted linear", "--rank"), lora={"r": 65}),
    "alpha 0": Case(AdapterError, ("scaling 0.0", "positive"), lora={"lora_alpha": 0}),
    "a misspelt target module": Case(
        AdapterError, ("'q_prj'", "LlamaForCausalLM", "q_proj"), lora={"target_modules": ["q_prj", "v_proj"]}
    ),
    "a misspelt full name": Case(
        AdapterError,
        ("'model.layers.0.self_attn.q_prj'", "q_proj"),
        lora={"target_modules": ["model.layers.0.self_attn.q_prj"]},
    ),
    "a target module like no other": Case(
        AdapterError, ("'xxx'", "down_proj, gate_proj, k_proj"), lora={"target_modules": ["xxx"]}
    ),
    "a regular expression that matches nothing": Case(
        AdapterError, (r"'.*\.q_prj'", "nearest: ", "q_proj"), lora={"target_modules": r".*\.q_prj"}
    ),
    "no regular expression": Case(
        AdapterError, ("'*q_proj'", "regular expression"), lora={"target_modules": "*q_proj"}
    ),
    "targets that stay unquantized": Case(
        AdapterError, ("no quantized linear", "lm_head", "full precision"), lora={"target_modules": ["lm_head"]}
    ),
    "a target that is no linear": Case(AdapterError, ("PEFT", "LlamaMLP"), lora={"target_modules": ["mlp"]}),
    "DoRA": Case(AdapterError, ("use_dora=True", "plain LoRA"), lora={"use_dora": True}),
    "PiSSA": Case(AdapterError, ("init_lora_weights='pissa'", "True"), lora={"init_lora_weights": "pissa"}),
    "LoftQ": Case(
        AdapterError,
        ("init_lora_weights='loftq'", "True"),
        lora={"init_lora_weights": "loftq"},
    ),
    "repeated blocks": Case(AdapterError, ("layer_replication",), lora={"layer_replication": [(0, 2), (0, 2)]}),
    "no quantization": Case(
        AdapterError, ("BitsAndBytesConfig", "load_in_4bit"), arguments={"quantization": BitsAndBytesConfig()}
    ),
    "an unknown solver": Case(
        SolverError, ("'krilov'", "did you mean 'krylov'", "als", "eigh", "svd"), arguments={"solver": "krilov"}
    ),
    "iterations of a closed form": Case(
        SolverError, ("'eigh'", "iterations (--iterations), got 3"), arguments={"solver": "eigh", "iterations": 3}
    ),
    "negative iterations": Case(SolverError, ("iterations (--iterations)", ">= 0", "-1"), arguments={"iterations": -1}),
    "damping that is no number": Case(SolverError, ("damping", "nan"), arguments={"damping": float("nan")}),
    "negative damping": Case(SolverError, ("damping", ">= 0", "-1"), arguments={"damping": -1.0}),
    "a device that is not there": Case(QuailoraError, ("'cuda:99'", "cpu"), arguments={"device": "cuda:99"}),
    "a device of no known kind": Case(QuailoraError, ("'gpu'", "cpu"), arguments={"device": "gpu"}),
    "no tokens after masking": Case(
        CalibrationError, ("no tokens", "masked"), data=DataLoader(ALL_MASKED, batch_size=2)
    ),
    "no tokens at all": Case(CalibrationError, ("no tokens", "empty"), data=[]),
    "text without a tokenizer": Case(CalibrationError, ("tokenizer",), data=["some text"]),
    "text that tokenizes to nothing": Case(CalibrationError, ("no tokens", "tokenizes to nothing"), data=["", ""]),
    "a tokenizer that takes code of its own": Case(
        CheckpointError,
        ("tokenizer of", "trust_remote_code"),
        lambda folder: (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}})
        ),
        data=["some text"],
    ),
    "a damaged tokenizer": Case(
        CheckpointError,
        ("tokenizer of", "Unterminated string"),
        lambda folder: (folder / "tokenizer.json").write_text('{"bad'),
        data=["some text"],
    ),
    "a missing file": Case(CalibrationError, ("'no/such/file.txt'",), data="no/such/file.txt"),
    "tokens beyond the vocabulary": Case(
        CalibrationError, ("token id 128", "vocabulary has 128", "tokenizer"), data=torch.full((2, 8), 128)
    ),
    "negative tokens": Case(CalibrationError, ("negative token id -100",), data=torch.full((2, 8), -100)),
    "tokens that are no integers": Case(CalibrationError, ("integers", "float32"), data=torch.ones(2, 8)),
    "sequences beyond the positions": Case(
        CalibrationError,
        ("65 tokens", "64 positions", "sequence_length"),
        family="gpt2",
        data=torch.full((2, 65), 5),
        arguments={"sequence_length": 65},
    ),
    "no samples": Case(CalibrationError, ("samples", "at least 1", "0"), arguments={"samples": 0}),
}

FOUND_ON_THE_WAY = {
    f"{value} in {name}": Case(CheckpointError, (name, "NaN or infinite", "float32"), set_weight(name, value))
    for name in (
        f"{Q_PROJ}.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
    )
    for value in (float("nan"), float("inf"))
} | {
    "a weight too large for fp16": Case(
        CheckpointError,
        (f"{Q_PROJ}.weight", "float16"),
        set_weight(f"{Q_PROJ}.weight", 1e6),
        arguments={"dtype": torch.float16},
    ),
    "activations that overflow": Case(
        NotFiniteError,
        (Q_PROJ, "gram", "not finite"),
        set_weight("model.layers.0.input_layernorm.weight", 1e30),
    ),
}


@pytest.fixture
def computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*args: object, **kwargs: object) -> None:
        pytest.fail("the model was run before the input was checked")

    monkeypatch.setattr(Loop, "run", reached)
    monkeypatch.setattr(Calls, "record", reached)
    monkeypatch.setattr(StreamedModel, "resident", reached)


def fails(case: Case, folder: Path) -> str:
    """The message of the error that the case must give, no output being left behind: at most blocks that are done."""
    checkpoint = tiny.checkpoint(folder / "model", case.family)
    case.spoil(checkpoint)
    with pytest.raises(QuailoraError) as caught:
        quailora.build_adapter(
            checkpoint, lora(**case.lora), case.data, folder / "out" / "adapter", progress=False, **case.arguments
        )
    assert caught.type is case.error, caught.value
    left = list((folder / "out").iterdir()) if (folder / "out").exists() else []
    assert all("1 block are kept" in str(caught.value) and path.name == ".adapter.quailora" for path in left)
    return str(caught.value)


@pytest.mark.usefixtures("computes_nothing")
@pytest.mark.parametrize("wrong", KNOWN_AT_ONCE)
def test_what_can_be_known_at_once_is_said_before_anything_is_computed(wrong: str, tmp_path: Path) -> None:
    message = fails(KNOWN_AT_ONCE[wrong], tmp_path)
    assert [words for words in KNOWN_AT_ONCE[wrong].words if words not in message] == [], message


@pytest.mark.parametrize("wrong", FOUND_ON_THE_WAY)
def test_numbers_that_are_not_finite_are_found_and_the_place_is_named(wrong: str, tmp_path: Path) -> None:
    message = fails(FOUND_ON_THE_WAY[wrong], tmp_path)
    assert [words for words in FOUND_ON_THE_WAY[wrong].words if words not in message] == [], message


@pytest.mark.parametrize("solver", ["krilov", "alsx"])
def test_an_unknown_solver_is_refused_before_anything_is_read(solver: str, tmp_path: Path) -> None:
    with pytest.raises(SolverError, match=f"'{solver}'; did you mean"):
        quailora.build_adapter(tmp_path / "no such model", None, None, tmp_path / "out", solver=solver)


# The output folder


def build(checkpoint: Path, output: Path) -> None:
    quailora.build_adapter(checkpoint, lora(), TOKENS, output, progress=False)


@pytest.mark.usefixtures("computes_nothing")
def test_an_output_folder_with_something_in_it_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(QuailoraError, match=r"out is not empty: give another one"):
        build(tmp_path / "not even read", tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]
    with pytest.raises(QuailoraError, match=r"mine is a file, and the output must be a folder"):
        build(tmp_path / "not even read", tmp_path / "out" / "mine")


def test_an_empty_folder_and_a_link_to_one_are_filled(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_folder(tmp_path / "link") as partial:
        (partial / "file").touch()
        assert not list((tmp_path / "real").iterdir())
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "file").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_a_mount_point_is_refused_before_the_work_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os.path, "ismount", lambda path: path == tmp_path / "volume")
    with pytest.raises(QuailoraError, match=r"volume is a mount point, .* give a folder inside it"):
        files.check_new_folder(tmp_path / "volume")


@pytest.mark.usefixtures("computes_nothing")
def test_a_parent_that_cannot_be_written_is_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny.checkpoint(tmp_path / "model")

    (tmp_path / "file").touch()
    with pytest.raises(QuailoraError, match=r"file/out cannot be written: .*Not a directory"):
        build(checkpoint, tmp_path / "file" / "out")

    def refuse(path: Path, **kwargs: object) -> None:  # tests may run as root, whom no permission stops
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(workspace.Path, "mkdir", refuse)
    with pytest.raises(QuailoraError, match=r"out cannot be written: .*Permission denied"):
        build(checkpoint, tmp_path / "out")


FULL = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=["ENOSPC", "EDQUOT", "safetensors"])
def test_a_disk_that_fills_up_leaves_nothing(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny.checkpoint(tmp_path / "model")

    def fill(tensors: dict[str, Tensor], filename: str, **kwargs: object) -> None:
        Path(filename).write_bytes(b"the first half")
        raise error

    monkeypatch.setattr(workspace, "save_file", fill)
    with pytest.raises(QuailoraError, match=r"the disk that holds .* is full: block 0 could not be kept$"):
        build(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_bug_of_ours_stays_what_it_is_and_leaves_no_half_of_an_output(tmp_path: Path) -> None:
    checkpoint = tiny.checkpoint(tmp_path / "model")
    for number in range(2):
        with (
            mock.patch.object(outputs, "model_card", side_effect=ZeroDivisionError),
            pytest.raises(ZeroDivisionError),
        ):
            build(checkpoint, tmp_path / "out")
        assert not (tmp_path / "out").exists(), number
    build(checkpoint, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


# In place


def loaded(checkpoint: Path, config: BitsAndBytesConfig | None = NF4) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, quantization_config=config, device_map="cpu"
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("in place") / "model")


@pytest.fixture
def adapted(checkpoint: Path) -> PeftModel:
    model = get_peft_model(loaded(checkpoint), lora())
    assert isinstance(model, PeftModel)
    return model


def refused(error: type[QuailoraError], words: str, model: Any, checkpoint: Path, **arguments: Any) -> None:
    """`initialize` raises, and the adapter is what it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name}
    with pytest.raises(error, match=words):
        quailora.initialize(model, TOKENS, checkpoint=checkpoint, progress=False, **arguments)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.usefixtures("computes_nothing")
def test_initialize_refuses_at_once_what_it_cannot_start(checkpoint: Path, adapted: PeftModel, tmp_path: Path) -> None:
    refused(AdapterError, r"takes a PeftModel, got LlamaForCausalLM: .*get_peft_model", tiny.model(), checkpoint)
    whole = get_peft_model(loaded(checkpoint, None), lora())
    refused(AdapterError, "no quantized linear .* is the base loaded in 4 or 8 bits", whole, checkpoint)
    refused(AdapterError, "no adapter 'other', only default", adapted, checkpoint, adapter="other")
    refused(SolverError, "'krilov'; did you mean 'krylov'", adapted, checkpoint, solver="krilov")
    refused(QuailoraError, r"device \(--device\) 'gpu' cannot be used", adapted, checkpoint, device="gpu")
    refused(CheckpointError, "no such model", adapted, tmp_path / "no such model")
    wider = tiny.checkpoint(tmp_path / "wider", intermediate_size=192)
    refused(MismatchError, r"mlp\.\w+ is \(128, 64\) in the loaded base and \(192, 64\) in", adapted, wider)
    deeper = tiny.checkpoint(tmp_path / "deeper", num_hidden_layers=3)
    refused(MismatchError, "the loaded base has 2 blocks, and .*deeper has 3", adapted, deeper)


def test_initialize_refuses_a_checkpoint_with_other_weights(adapted: PeftModel, tmp_path: Path) -> None:
    other = tiny.checkpoint(tmp_path / "other", seed=1)
    refused(
        MismatchError,
        r"model\.layers\.0\.\S+ is not the quantized weight of .* off by \d+% .* the base was made from",
        adapted,
        other,
    )


def test_a_device_without_fp64_is_refused_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*size: int, dtype: torch.dtype | None = None, device: str) -> None:
        if dtype == torch.float64:  # in the words of MPS
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(
        QuailoraError, match=r"device \(--device\) 'mps' cannot be used here: .*float64.*; name another"
    ):
        default_device("mps")
