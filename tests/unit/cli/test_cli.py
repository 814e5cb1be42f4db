"""The command line: what reaches the library, what a person sees, and the exit status."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import quailora
from quailora.cli import app as cli
from quailora.cli import doctor, options
from quailora.errors import CheckpointError, QuailoraError
from quailora.memory import planner
from quailora.memory.allocator import overhead
from quailora.ops import dispatch
from quailora.pipeline import build as pipeline
from quailora.pipeline import refine as refinement
from quailora.pipeline import setup
from quailora.pipeline.resume import Workspace, workspace_of
from quailora.quantization.registry import config_for
from quailora.quantization.rounding import DEFAULT_INPUTS
from quailora.refinement.config import RefinementConfig
from quailora.solvers.config import DEFAULT_DAMPING
from tests.helpers import tiny

QUAILORA = Path(sys.executable).parent / "quailora"
LINES = [f"the {i} th line says that {i * i % 97} is what comes after {i}\n" for i in range(40)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a tokenizer, one token to a word."""
    folder = tiny.checkpoint(tmp_path_factory.mktemp("cli") / "model")
    words = sorted(set("".join(LINES).split()))
    vocabulary = {word: number for number, word in enumerate(["<s>", "<pad>", "<unk>", *words])}
    assert len(vocabulary) <= tiny.VOCABULARY
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(checkpoint: Path) -> Path:
    file = checkpoint.parent / "corpus.txt"
    file.write_text("".join(LINES))
    return file


def script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The console script in a process of its own; each costs seconds of imports."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "60"}
    return subprocess.run([*map(str, arguments)], capture_output=True, text=True, env=environment)


def beside_progress(err: str) -> str:
    """Standard error without the lines of progress that `init` prints where that is no terminal."""
    return "".join(line for line in err.splitlines(keepends=True) if not line.startswith("QuAILoRA: "))


class Ran:
    """`main` run in this process, as the console script calls it."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        """Exit status, standard output, standard error."""
        self._monkeypatch.setattr(sys, "argv", ["quailora", *map(str, arguments)])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        code = exit_.value.code
        assert isinstance(code, int)
        return code, *self._capsys.readouterr()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ran:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # which main would set for good
    monkeypatch.setenv("COLUMNS", "200")
    return Ran(capsys, monkeypatch)


# The normal path


def test_init_eval_merge_and_convert(run: Ran, checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    data = ("--data", corpus, "--samples", "8", "--sequence-length", "32")
    for output, alpha in ((first, "16"), (second, "32")):
        code, out, err = run("init", checkpoint, *data, "--output", output, "--rank", "4", "--alpha", alpha)
        assert (code, beside_progress(err)) == (0, "")
        assert f"adapter, report.md and model card: {output}\n" in out
    assert {file.name for file in first.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors"),
        *("quailora.json", "report.json", "report.md", "README.md"),
    }

    code, out, err = run("eval", checkpoint, "--adapter", first, *data, "--json", tmp_path / "scores.json")
    assert (code, err) == (0, "")
    scores = json.loads((tmp_path / "scores.json").read_text())
    for row in ("full", "quantized", "adapted"):
        assert re.search(rf"{re.escape(scores[row]['name'])} .*{scores[row]['perplexity']:.2f}", out)
    # The adapter undoes a part of what quantization did to the very tokens it was made on.
    assert 0 < scores["adapted"]["kl"] < scores["quantized"]["kl"]
    assert "not held-out scores" in " ".join(out.split()) and "corpus.txt" in scores["notes"][0]

    code, out, err = run("merge", checkpoint, first, "--output", tmp_path / "dense")
    assert (code, err, out) == (0, "", f"dense checkpoint: {tmp_path / 'dense'}\n")
    AutoModelForCausalLM.from_pretrained(tmp_path / "dense")

    (second / "quailora.json").unlink()  # as if it had been trained
    code, out, err = run("convert", first, second, "--output", tmp_path / "converted", "--rank", "2")
    assert (code, err) == (0, "")
    assert out == f"adapter for the full-precision weights: {tmp_path / 'converted'}\n"
    assert json.loads((tmp_path / "converted" / "adapter_config.json").read_text())["r"] == 2


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """Stands for `build_adapter`."""
    found = mock.Mock()
    found.return_value.summary.return_value = "done"
    monkeypatch.setattr(pipeline, "build_adapter", found)
    return found


def test_options_reach_build_adapter(run: Ran, build: mock.Mock, checkpoint: Path, tmp_path: Path) -> None:
    def call(*options: str) -> tuple[Any, Any, dict[str, Any]]:
        code, _, err = run("init", checkpoint, "--data", "some.jsonl", "--output", tmp_path / "out", *options)
        assert (code, err) == (0, "")
        (source, config, data, output), keywords = build.call_args
        assert (source.name, data, output) == (str(checkpoint), "some.jsonl", tmp_path / "out")
        return config, keywords.pop("quantization"), keywords

    config, quantization, keywords = call()
    assert (config.r, config.lora_alpha, config.use_rslora, config.lora_dropout) == (64, 16, False, 0)
    assert (config.target_modules, config.task_type) == ("all-linear", "CAUSAL_LM")
    assert quantization.to_diff_dict() == config_for("nf4", torch.float32).to_diff_dict()
    assert keywords == {
        "base_output": None,
        "rounding": None,
        "rounding_damping": None,
        "alternations": None,
        "magr": None,
        "inputs": None,
        "alpha": None,
        "refine": None,
        "refine_steps": None,
        "refine_rate": None,
        "solver": "krylov",
        "iterations": None,
        "damping": pipeline.DEFAULT_DAMPING,
        "samples": 2000,
        "sequence_length": None,
        "split": "train",
        "column": None,
        "batch_size": None,
        "memory_budget": None,
        "host_memory_budget": None,
        "dtype": torch.float32,
        "resume": True,
        "distributed": False,
        "device": None,
        "seed": 0,
        "progress": True,
    }

    config, quantization, keywords = call(
        *("--rank", "8", "--alpha", "3", "--rslora", "--dropout", "0.1", "--target-modules", "q_proj, v_proj,"),
        *("--quant", "fp4", "--no-double-quant", "--compute-dtype", "float16"),
        *("--refine", "blocks", "--refine-steps", "7", "--refine-rate", "0.5"),
        *("--solver", "als", "--iterations", "7", "--damping", "0", "--samples", "3", "--sequence-length", "5"),
        *("--split", "validation", "--column", "body", "--batch-size", "2", "--device", "cpu", "--seed", "9"),
        *(
            "--memory-budget",
            "3GiB",
            "--host-memory-budget",
            "2GB",
            "--no-resume",
            "--no-progress",
            "--dtype",
            "float16",
        ),
    )
    assert (config.r, config.lora_alpha, config.use_rslora, config.lora_dropout) == (8, 3, True, 0.1)
    assert config.target_modules == {"q_proj", "v_proj"}
    assert (quantization.bnb_4bit_quant_type, quantization.bnb_4bit_use_double_quant) == ("fp4", False)
    assert quantization.bnb_4bit_compute_dtype == torch.float16
    assert keywords == {
        "base_output": None,
        "rounding": None,
        "rounding_damping": None,
        "alternations": None,
        "magr": None,
        "inputs": None,
        "alpha": None,
        "refine": "blocks",
        "refine_steps": 7,
        "refine_rate": 0.5,
        "solver": "als",
        "iterations": 7,
        "damping": 0.0,
        "samples": 3,
        "sequence_length": 5,
        "split": "validation",
        "column": "body",
        "batch_size": 2,
        "memory_budget": "3GiB",
        "host_memory_budget": "2GB",
        "dtype": torch.float16,
        "resume": False,
        "distributed": False,
        "device": "cpu",
        "seed": 9,
        "progress": False,
    }

    config, _, keywords = call("--alpha", "matched:32")
    assert (config.lora_alpha, keywords["alpha"]) == (32, "matched")

    _, quantization, keywords = call("--dtype", "bfloat16")
    assert quantization.bnb_4bit_compute_dtype == keywords["dtype"] == torch.bfloat16

    config, quantization, _ = call("--quant", "int8", "--target-modules", r"model\.layers\.\d+\.mlp\..*")
    assert quantization.load_in_8bit and config.target_modules == r"model\.layers\.\d+\.mlp\..*"

    base = ("--base-output", tmp_path / "base")
    _, quantization, keywords = call(
        "--bits", "3", "--group-size", "128", "--asymmetric", *base, "--rounding", "nearest"
    )
    assert (quantization.bits, quantization.group_size, quantization.sym) == (3, 128, False)
    assert (keywords["base_output"], keywords["rounding"]) == (tmp_path / "base", "nearest")
    _, quantization, keywords = call("--bits", "2", *base, "--rounding-damping", "0.5", "--inputs", "quantized")
    assert (quantization.bits, quantization.group_size, quantization.sym) == (2, 64, True)
    assert (keywords["rounding_damping"], keywords["inputs"]) == (0.5, "quantized")
    _, _, keywords = call(*base, "--alternations", "4")
    assert keywords["alternations"] == 4


@pytest.mark.parametrize(
    "options, message",
    [
        (("--bits", "5"), "--bits 5, --group-size 64"),
        (("--bits", "3", "--quant", "nf4"), "--quant is for bitsandbytes"),
        (("--bits", "3", "--compute-dtype", "float16"), "--compute-dtype is for bitsandbytes"),
        (("--bits", "4", "--no-double-quant"), "--no-double-quant is for bitsandbytes"),
        (("--quant", "int8", "--compute-dtype", "float16"), "--compute-dtype is of nf4 and fp4"),
        (("--quant", "int8", "--no-double-quant"), "--no-double-quant is of nf4 and fp4"),
        (("--group-size", "64"), "--group-size goes with --bits"),
        (("--asymmetric",), "--asymmetric goes with --bits"),
        (("--rank-pattern", "q_proj"), "--rank-pattern 'q_proj': write it as name=number"),
        (("--bits", "3"), "has to be written: give base_output (--base-output)"),
        (("--rounding", "calibrated"), "give base_output (--base-output)"),
        (("--refine", "block"), "refine='block' (--refine): it is 'blocks' or 'model'"),
        (("--refine-rate", "1"), "refine_rate (--refine-rate) goes with refine (--refine)"),
        (("--alternations", "2"), "(--alternations) is of calibrated rounding"),
        (("--rounding-damping", "0.1"), "(--rounding-damping) is of calibrated rounding"),
        (("--inputs", "quantized"), "(--inputs quantized) takes codes that are chosen by calibration"),
    ],
)
def test_options_that_do_not_go_together(
    options: tuple[str, ...], message: str, run: Ran, corpus: Path, tmp_path: Path
) -> None:
    """They are refused before the checkpoint is looked for, which may be a download."""
    code, out, err = run("init", tmp_path / "nowhere", "--data", corpus, "--output", tmp_path / "out", *options)
    assert (code, out) == (1, "") and message in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_a_base_that_an_unfinished_run_has_published_is_not_in_the_way(
    run: Ran, build: mock.Mock, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").touch()
    arguments = ("init", checkpoint, "--data", "some.jsonl", "--output", tmp_path / "out", "--bits", "3")
    code, _, err = run(*arguments, "--base-output", tmp_path / "base")
    assert code == 1 and "is not empty" in err and not build.called
    workspace_of(tmp_path / "out").mkdir()
    assert run(*arguments, "--base-output", tmp_path / "base")[0] == 0 and build.called


def test_options_reach_refine(run: Ran, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refine = mock.Mock()
    refine.return_value.summary.return_value = "done"
    monkeypatch.setattr(refinement, "refine", refine)

    def call(*options: str) -> dict[str, Any]:
        code, out, err = run("refine", tmp_path / "in", "--data", "some.jsonl", "--output", tmp_path / "out", *options)
        assert (code, err) == (0, "") and "done" in out and "model card" in out
        positional, keywords = refine.call_args
        assert positional == (tmp_path / "in", "some.jsonl", tmp_path / "out")
        return dict(keywords)

    assert call() == {
        "checkpoint": None,
        "base": None,
        "steps": None,
        "rate": None,
        "samples": 2000,
        "sequence_length": None,
        "split": "train",
        "column": None,
        "batch_size": None,
        "memory_budget": None,
        "device": None,
        "seed": 0,
        "progress": True,
    }
    keywords = call(
        *("--checkpoint", str(checkpoint), "--base", "base", "--steps", "7", "--rate", "0.5", "--samples", "3"),
        *("--sequence-length", "5", "--split", "validation", "--column", "body", "--batch-size", "2"),
        *("--memory-budget", "3GiB", "--device", "cpu", "--seed", "9", "--no-progress"),
    )
    assert keywords.pop("checkpoint").name == str(checkpoint)
    assert keywords == {
        "base": Path("base"),
        "steps": 7,
        "rate": 0.5,
        "samples": 3,
        "sequence_length": 5,
        "split": "validation",
        "column": "body",
        "batch_size": 2,
        "memory_budget": "3GiB",
        "device": "cpu",
        "seed": 9,
        "progress": False,
    }


@pytest.mark.parametrize(
    "options, message",
    [
        (("--steps", "0"), "error: steps (--steps) must be a whole number, at least 1; got 0"),
        (("--rate", "0"), "error: rate (--rate) must be a number above 0, got 0.0"),
        (("--memory-budget", "much"), "memory_budget (--memory-budget)"),
        (("--revision", "main"), "--revision and --trust-remote-code go with --checkpoint"),
        ((), "does not exist or is not a folder: give an adapter's folder"),
    ],
)
def test_what_refine_refuses(options: tuple[str, ...], message: str, run: Ran, tmp_path: Path) -> None:
    code, out, err = run("refine", tmp_path / "in", "--data", "some.jsonl", "--output", tmp_path / "out", *options)
    assert (code, out) == (1, "") and message in " ".join(err.split())


@pytest.mark.parametrize("command", ["init", "eval", "refine"])
def test_a_split_of_a_file_is_an_error(command: str, run: Ran, checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    output = () if command == "eval" else ("--output", tmp_path / "out")
    message = one_line(run, command, checkpoint, *output, "--data", corpus, "--split", "train")
    assert f"--split train is of a data set, and {corpus} is a file" in message


@pytest.mark.parametrize("rounding", ["calibrated", "nearest"])
def test_plan_refuses_a_base_that_init_does_not_write(rounding: str, run: Ran, checkpoint: Path) -> None:
    code, out, err = run("plan", checkpoint, "--quant", "int8", "--rounding", rounding)
    assert (code, out) == (1, "") and "is not written as a checkpoint" in " ".join(err.split())


def test_plan_says_what_refining_the_model_takes(run: Ran, checkpoint: Path) -> None:
    options = ("--refine", "model", "--sequence-length", "8", "--samples", "4", "--rank", "4", "--device", "cpu")
    code, out, err = run("plan", checkpoint, *options)
    assert (code, err) == (0, "")
    assert "then the quantized model is refined as a whole, in micro-batches of 128 sequences: " in out
    code, one, err = run("plan", checkpoint, *options, "--batch-size", "1")
    assert "in micro-batches of 1 sequence: " in one
    code, out, err = run("plan", checkpoint, *options, "--json")
    values = json.loads(out)["model"]
    parts = ("base", "adapter", "gradients", "optimizer", "activations", "overhead")
    assert values["total"] == sum(values[part] for part in parts) and values["batch_size"] == 128
    assert values["overhead"] == overhead(values["total"] - values["overhead"], torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "of_init", "counted"),
    [((), (), 2), (("--refine", "blocks"), (), 14)]
    + [(options, ("--base-output", "base"), 14) for options in [("--bits", "4"), ("--rounding", "nearest")]],
)
def test_plan_counts_the_linears_that_init_does(
    options: tuple[str, ...],
    of_init: tuple[str, ...],
    counted: int,
    run: Ran,
    checkpoint: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Linears that no adapter is on, where the base is written or blocks are refined."""
    monkeypatch.chdir(tmp_path)
    found = []

    def make_plan(stream: Any, ranks: dict[str, int], *others: Any, **options: Any) -> None:
        found.append(ranks)
        raise QuailoraError("no more")

    monkeypatch.setattr(planner, "make_plan", make_plan)
    monkeypatch.setattr(setup, "make_plan", make_plan)
    both = ("--target-modules", "q_proj", "--rank", "4", "--device", "cpu", *options)
    run("plan", checkpoint, *both)
    run("init", checkpoint, *both, *of_init, "--data", corpus, "--sequence-length", "8", "--output", "out")
    assert found[0] == found[1] and len(found[0]) == counted


def test_ctrl_c_is_one_line_that_says_what_is_kept(
    run: Ran, checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = Workspace.save_block, []

    def interrupt(self: Workspace, *arguments: Any) -> None:
        if saved:
            raise KeyboardInterrupt
        saved.append(save(self, *arguments))

    options = (
        "--data",
        corpus,
        "--samples",
        "4",
        "--sequence-length",
        "32",
        "--rank",
        "4",
        "--output",
        tmp_path / "out",
    )
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "save_block", interrupt)
        code, out, err = run("init", checkpoint, *options)
    assert (code, out) == (130, "")
    kept = tmp_path / ".out.quailora"
    assert (
        beside_progress(err)
        == f"interrupted; the factors of 1 block are kept in {kept}, and the same command continues from there\n"
    )
    code, out, _ = run("init", checkpoint, *options)
    assert code == 0 and "1 block was solved by an earlier run" in out
    assert not kept.exists()


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("all-linear", "all-linear"),
        ("q_proj", ["q_proj"]),
        ("q_proj,layers.0.mlp.up_proj", ["q_proj", "layers.0.mlp.up_proj"]),
        (".*q_proj", ".*q_proj"),
        ("(q|k)_proj", "(q|k)_proj"),
    ],
)
def test_target_modules_are_names_or_one_regular_expression(text: str, targets: str | list[str]) -> None:
    assert options.parse_target_modules(text) == targets


def test_modules_and_patterns_reach_the_lora_configuration(
    run: Ran, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = mock.Mock()
    build.return_value.summary.return_value = "done"
    monkeypatch.setattr(pipeline, "build_adapter", build)
    options = ("--exclude-modules", "up_proj,down_proj", "--rank-pattern", "q_proj=8", "--alpha-pattern", "q_proj=32")
    code, _, err = run(
        *("init", checkpoint, "--data", "some.jsonl", "--output", tmp_path / "out"),
        *options,
        *("--modules-to-save", "embed_tokens, lm_head"),
    )
    assert (code, err) == (0, "")
    config = build.call_args.args[1]
    assert config.exclude_modules == {"up_proj", "down_proj"}
    assert (config.rank_pattern, config.alpha_pattern) == ({"q_proj": 8}, {"q_proj": 32})
    assert config.modules_to_save == ["embed_tokens", "lm_head"]


def test_patterns_are_names_with_numbers() -> None:
    assert options.parse_pattern("--rank-pattern", "q_proj=8, .*down_proj=16") == {"q_proj": 8, ".*down_proj": 16}
    assert options.parse_pattern("--rank-pattern", None) == {}
    for text in ("q_proj", "q_proj=", "=8", "q_proj=0", "q_proj=a"):
        with pytest.raises(QuailoraError, match=r"--rank-pattern .*name=number"):
            options.parse_pattern("--rank-pattern", text)


def test_doctor_names_the_backend_of_every_operation(run: Ran) -> None:
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    for operation, service in quailora.backends(torch.device("cpu")).items():
        assert re.search(rf"\b{operation}\b.*\b{service.backend}\b", out), operation
    for package in ("quailora", "torch", "transformers", "peft", "bitsandbytes"):
        assert re.search(rf"\b{package} \d+\.\d+", out), package


def test_doctor_ends_with_an_error_where_an_operation_is_wrong(run: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(h: torch.Tensor, rights: list[torch.Tensor], *, precision: str) -> list[torch.Tensor]:
        return [1.0001 * (h @ right) for right in rights]

    def broken(systems: torch.Tensor, right_hand_sides: torch.Tensor) -> None:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setitem(dispatch._BACKENDS, "grouped_gram_product", (dispatch.Backend("planted", wrong),))
    monkeypatch.setitem(dispatch._BACKENDS, "cholesky_solve", (dispatch.Backend("broken", broken),))
    dispatch._choose.cache_clear()
    try:
        code, out, err = run("doctor")
    finally:
        dispatch._choose.cache_clear()
    assert code == 1
    assert err.startswith("error: grouped_gram_product, cholesky_solve, solve: results differ from the reference")
    assert "1.0e-04" in out and "no kernel image" in " ".join(out.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is something to tune")
def test_doctor_of_one_device(run: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workflow for GPUs relies on it: no GPU, or none of our code for it, is an error."""
    assert "there is no cuda:7 here; there are cpu" in one_line(run, "doctor", "--device", "cuda:7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(doctor, "_examined", lambda device, every: [])
    plain = {"gram_": dispatch.Service("extension", {}), "mirror_": dispatch.Service("reference", {})}
    monkeypatch.setattr(quailora, "backends", lambda device: plain)
    assert run("doctor", "--device", "cuda:7")[0] == run("doctor", "--device", "cuda")[0] == 0
    plain["error"] = dispatch.Service("reference", {"triton": "Triton cannot be imported"})
    code, _, err = run("doctor", "--device", "cuda:7")
    assert code == 1 and "cuda:7: plain PyTorch serves error; the table" in err
    code, _, err = run("doctor", "--device", "cuda")
    assert code == 1 and "cuda:0: plain PyTorch serves error; the table" in err


def test_doctor_says_why_there_is_nothing_to_tune(run: Ran) -> None:
    assert "there are no kernels to tune here: its kernels are for CUDA" in one_line(run, "doctor", "--tune")


def test_doctor_tunes_each_gpu(run: Ran, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tuning = pytest.importorskip("quailora.kernels.tuning", reason="Triton is not installed")
    service = dispatch.Service("triton", {})
    monkeypatch.setattr(quailora, "backends", lambda device: {"grouped_error_product": service})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    tuned: list[torch.device] = []
    monkeypatch.setattr(tuning, "tune", lambda device: tuned.append(device) or {"problem": {}})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    doctor._tune([torch.device("cuda", 0), torch.device("cuda", 1)])
    assert tuned == [torch.device("cuda", 0), torch.device("cuda", 1)]

    def full(device: torch.device) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(tuning, "tune", full)
    with pytest.raises(QuailoraError, match="No space left on device; XDG_CACHE_HOME"):
        doctor._tune([torch.device("cuda", 0)])


# Errors


def one_line(run: Ran, *arguments: str | Path) -> str:
    """The message of a command that must end with one line of error."""
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    return err


def test_what_a_user_can_mend_is_one_line(run: Ran, checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    init = ("init", checkpoint, "--data", corpus, "--output", tmp_path / "out")
    assert "'/no/such'" in one_line(run, "init", "/no/such", "--data", corpus, "--output", tmp_path / "out")
    assert "unknown solver (--solver) 'krilov'" in one_line(run, *init, "--solver", "krilov")
    assert "nearest: q_proj" in one_line(run, *init, "--rank", "4", "--target-modules", "q_prj")
    assert "regular expression" in one_line(run, *init, "--rank", "4", "--target-modules", "*proj")
    assert "lower r" in one_line(run, *init, "--rank", "1000")
    assert "'tpu9'" in one_line(run, *init, "--rank", "4", "--device", "tpu9")
    assert "no file 'gone.txt'" in one_line(run, "init", checkpoint, "--rank", "4", "--data", "gone.txt", *init[4:])
    assert not (tmp_path / "out").exists()
    assert "not empty" in one_line(run, *init[:-1], checkpoint)

    out = ("--output", tmp_path / "out")
    assert "adapter_config.json" in one_line(run, "eval", checkpoint, "--data", corpus, "--adapter", tmp_path)
    assert "'tpu9'" in one_line(run, "eval", checkpoint, "--data", corpus, "--device", "tpu9")
    assert str(tmp_path) in one_line(run, "merge", checkpoint, tmp_path, *out)
    for option in (("--no-double-quant",), ("--compute-dtype", "float16")):
        assert f"{option[0]} needs --quant" in one_line(run, "merge", checkpoint, tmp_path, *out, *option)
        assert f"{option[0]} needs --quant" in one_line(
            run, "eval", checkpoint, "--data", corpus, "--adapter", tmp_path, *option
        )
        int8 = ("--quant", "int8", *option)
        assert f"{option[0]} is of nf4" in one_line(run, "merge", checkpoint, tmp_path, *out, *int8)
        assert f"{option[0]} is of nf4" in one_line(run, "eval", checkpoint, "--data", corpus, *int8)
    # Before a checkpoint is looked for, which may be a download.
    assert "not empty" in one_line(run, "init", "/no/such", *init[2:-1], checkpoint)
    assert "not empty" in one_line(run, "merge", "/no/such", tmp_path, "--output", checkpoint)
    assert str(tmp_path) in one_line(run, "convert", tmp_path, tmp_path, *out)
    assert not (tmp_path / "out").exists()


def test_a_message_is_shown_as_it_is(run: Ran, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    odd = "/no/[bold]such[/bold]/:warning:/" + "folder " * 30 + "\\[x]"
    assert odd in one_line(run, "convert", odd, odd, "--output", "out")
    monkeypatch.setattr(quailora, "convert", mock.Mock(side_effect=CheckpointError("two\n  lines [/]")))
    assert one_line(run, "convert", "a", "b", "--output", "out") == "error: two lines [/]\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quailora, "convert", mock.Mock(side_effect=ZeroDivisionError("ours")))
    monkeypatch.setattr(sys, "argv", ["quailora", "convert", "a", "b", "--output", "out"])
    with pytest.raises(ZeroDivisionError, match="ours"):
        cli.main()


def test_ctrl_c_exits_with_130(run: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quailora, "convert", mock.Mock(side_effect=KeyboardInterrupt))
    code, _, err = run("convert", "a", "b", "--output", "out")
    assert code == 130 and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["init"], "CHECKPOINT"),
        (["init", "model"], "Missing option '--data'"),
        (["init", "model", "--data", "d", "--output", "o", "--rank", "0"], "'--rank'"),
        (
            ["init", "model", "--data", "d", "--output", "o", "--quant", "nf5"],
            "'nf5' is not one of 'nf4', 'fp4', 'int8'",
        ),
        (["init", "model", "--data", "d", "--output", "o", "--no-such"], "No such option: --no-such"),
        (["inti"], "No such command 'inti'"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_is_wrong(run: Ran, arguments: list[str], words: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert words in err and "Traceback" not in err


# Help


def test_version_and_help(run: Ran) -> None:
    assert run("--version") == (0, f"{quailora.__version__}\n", "")
    code, out, _ = run("--help")
    assert code == 0
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    assert list(commands) == ["init", "plan", "eval", "refine", "merge", "convert", "export", "doctor"]
    for name, command in commands.items():
        assert re.search(rf"^  {name} +\w+", out, flags=re.MULTILINE), name
        code, shown, _ = run(name, "--help")
        assert code == 0
        for parameter in command.params:
            assert parameter.help, (name, parameter.name)
            assert (parameter.metavar if parameter.param_type_name == "argument" else parameter.opts[0]) in shown


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['quailora', 'init', '--help']\n"
        "from quailora.cli import app as cli\n"
        "try: cli.main()\n"
        "except SystemExit: print({'torch', 'transformers', 'peft', 'bitsandbytes'} & set(sys.modules))"
    )
    shown = script(sys.executable, "-c", code)
    assert shown.returncode == 0 and ast.literal_eval(shown.stdout.splitlines()[-1].replace("set()", "[]")) == []


# The console script itself


def test_the_script_says_nothing_but_its_own_words(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    options = ("--data", corpus, "--samples", "4", "--sequence-length", "32", "--rank", "4")
    made = script(QUAILORA, "init", checkpoint, *options, "--output", tmp_path / "adapter")
    assert (made.returncode, beside_progress(made.stderr)) == (0, "")
    assert made.stdout.endswith(f"adapter, report.md and model card: {tmp_path / 'adapter'}\n")


def test_the_module_runs_as_the_script_does() -> None:
    run = script(sys.executable, "-m", "quailora", "--version")
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{quailora.__version__}\n", "")


@pytest.mark.skipif(not shutil.which("unshare"), reason="takes `unshare` to mount a file system of its own")
def test_a_full_disk_is_one_line_and_leaves_nothing(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = f"mount -t tmpfs -o size=16k tmpfs {disk}"  # the adapter takes more
    namespace = ("unshare", "--map-root-user", "--mount", "sh", "-c")
    if script(*namespace, mounted).returncode:
        pytest.skip("no file system may be mounted here, not even in a namespace")
    options = f"--data {corpus} --samples 4 --sequence-length 32 --rank 4"
    init = f"{QUAILORA} init {checkpoint} {options} --output {disk}/adapter"
    run = script(*namespace, f"{mounted} && {init}; code=$?; ls -A {disk}; exit $code")
    assert (run.returncode, run.stdout) == (1, "")
    full = rf"error: the disk that holds {disk}/\.adapter\.quailora is full: block 0 could not be kept\n"
    assert re.fullmatch(full, beside_progress(run.stderr)), run.stderr


def test_help_names_the_defaults() -> None:
    """They are written out there, so that `--help` imports nothing of what they belong to."""
    named = {"damping": DEFAULT_DAMPING, "refine_rate": RefinementConfig("blocks").rate}
    helps = {option.name: option.help for option in typer.main.get_command(cli.app).commands["init"].params}  # type: ignore[attr-defined]
    for name, default in named.items():
        assert float(helps[name].partition("Default: ")[2].split()[0].rstrip(".")) == default
    assert f"Default: {DEFAULT_INPUTS}." in helps["inputs"]
