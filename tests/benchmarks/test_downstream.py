"""Tasks through lm-eval: the questions made of a text are sound, and the harness scores a model without touching it."""

import json
import pickle
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from quailora.errors import AdapterError, MismatchError, QuailoraError
from tests.helpers import tiny
from tests.integration import test_training

pytest.importorskip("lm_eval")
from benchmarks.paper import downstream

ITEMS = 24


def sentence(rng: random.Random) -> str:
    words = [f"w{rng.randrange(100)}" for _ in range(rng.randint(downstream.WORDS, 20))]
    return " ".join(["W" + words[0][1:], *words[1:], "."])


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As WikiText-2 is: a heading, and paragraphs of one line."""
    rng = random.Random(0)
    paragraphs = [" ".join(sentence(rng) for _ in range(rng.randint(2, 4))) for _ in range(40)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" \n = W1 = \n \n " + " \n ".join(paragraphs) + " \n", encoding="utf-8")
    return path


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{downstream.NEXT_PASSAGE}.jsonl").read_text("utf-8").splitlines()]


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<eos>", "<pad>", "<unk>", ".", *(f"w{number}" for number in range(tiny.VOCABULARY - 4))]
    words_to_ids = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    words_to_ids.normalizer = Lowercase()
    words_to_ids.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words_to_ids, eos_token="<eos>")  # the harness needs a <pad>


def state(model: nn.Module) -> list[Any]:
    """All that a score could leave behind."""
    modules = [(module.training, getattr(module, "support_avx512bf16_for_cpu", None)) for module in model.modules()]
    parameters = [(id(p), p.dtype, tuple(p.shape), p.requires_grad) for p in model.parameters()]
    values = [value.clone() for value in model.state_dict().values() if isinstance(value, torch.Tensor)]
    return [modules, parameters, values]


def assert_same(one: list[Any], other: list[Any]) -> None:
    assert one[:2] == other[:2]
    assert all(map(torch.equal, one[2], other[2]))


# ---- The questions


def test_questions_are_sound(text: Path, tmp_path: Path) -> None:
    downstream.write_choices(text, tmp_path, ITEMS, seed=0)
    whole, questions = " ".join(text.read_text().split()), read(tmp_path)
    assert len(questions) == ITEMS
    for question in questions:
        choices, answer = question["choices"], question["choices"][question["answer"]]
        assert len(set(choices)) == downstream.CHOICES
        assert {len(choice.split()) for choice in choices} == {downstream.WORDS}
        follows = [f"{question['context']} {choice}" in whole for choice in choices]
        assert follows == [choice == answer for choice in choices]
        assert all(choice in whole for choice in choices)
    assert len({question["context"] for question in questions}) == ITEMS
    assert set(Counter(question["answer"] for question in questions).values()) == {ITEMS // downstream.CHOICES}
    # In random order: not the first paragraphs first, nor the places in turn.
    places = [whole.index(question["context"]) for question in questions]
    assert places != sorted(places)
    assert [question["answer"] for question in questions[: downstream.CHOICES]] != list(range(downstream.CHOICES))


def test_questions_depend_on_the_seed_alone(text: Path, tmp_path: Path) -> None:
    for folder, seed in (("one", 0), ("same", 0), ("other", 1)):
        downstream.write_choices(text, tmp_path / folder, ITEMS, seed)
    one, same, other = (read(tmp_path / folder) for folder in ("one", "same", "other"))
    assert one == same
    assert [question["context"] for question in one] != [question["context"] for question in other]


def test_wrong_choices_are_from_near_by_and_other_paragraphs(text: Path, tmp_path: Path) -> None:
    downstream.write_choices(text, tmp_path, ITEMS, seed=0)
    paragraphs = [" ".join(line.split()) for line in text.read_text().splitlines() if line.strip()]
    for question in read(tmp_path):
        (own,) = (index for index, paragraph in enumerate(paragraphs) if question["context"] in paragraph)
        for number, choice in enumerate(question["choices"]):
            (place,) = (index for index, paragraph in enumerate(paragraphs) if choice in paragraph)
            assert (place == own) == (number == question["answer"])
            assert abs(place - own) <= downstream.NEIGHBORS


def test_wrapped_lines_make_the_same_paragraphs(text: Path, tmp_path: Path) -> None:
    wrapped = tmp_path / "wrapped.txt"
    paragraphs = [line.strip() for line in text.read_text().splitlines() if line.strip()]
    wrapped.write_text("\n\n".join(paragraph.replace(" w1", "\nw1") for paragraph in paragraphs))
    for folder, source in (("one", text), ("other", wrapped)):
        downstream.write_choices(source, tmp_path / folder, ITEMS, seed=0)
    assert read(tmp_path / "one") == read(tmp_path / "other")


def test_the_same_passage_elsewhere_is_no_wrong_choice(tmp_path: Path) -> None:
    """Every paragraph twice, and one sentence in all of them."""
    rng = random.Random(0)
    everywhere = sentence(rng)
    paragraphs = [f"{sentence(rng)} {everywhere} {sentence(rng)}" for _ in range(20) for _ in range(2)]
    text = tmp_path / "text.txt"
    text.write_text("\n".join(paragraphs))
    downstream.write_choices(text, tmp_path, 20, seed=0)
    for question in read(tmp_path):
        assert len(set(question["choices"])) == downstream.CHOICES
        wrong = [choice for number, choice in enumerate(question["choices"]) if number != question["answer"]]
        assert not any(everywhere.startswith(choice) for choice in wrong)


def test_what_is_wrong_with_a_text_is_said(text: Path, tmp_path: Path) -> None:
    with pytest.raises(QuailoraError, match=r"text\.txt has too few paragraphs for 1000 questions: 40 of 41 have"):
        downstream.write_choices(text, tmp_path, 1000, seed=0)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(QuailoraError, match=r"empty\.txt has too few"):
        downstream.write_choices(empty, tmp_path, 1, seed=0)
    with pytest.raises(QuailoraError, match=r"missing\.txt cannot be read"):
        downstream.write_choices(tmp_path / "missing.txt", tmp_path, 1, seed=0)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(QuailoraError, match=r"binary\.txt cannot be read as UTF-8"):
        downstream.write_choices(tmp_path / "binary.txt", tmp_path, 1, seed=0)


# ---- The scores


def test_a_random_model_is_scored_and_left_as_it_was(
    text: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    """In train mode, on a 4-bit base, with an adapter that has a head of its own; nothing is said meanwhile."""
    words = tokenizer()
    checkpoint = tiny.checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=test_training.four_bit(torch.bfloat16))
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    task = downstream.write_choices(text, tmp_path, ITEMS, seed=0)
    before, given = state(model), json.dumps(task)
    drawn = torch.random.get_rng_state(), pickle.dumps(np.random.get_state()), random.getstate()
    capfd.readouterr()
    caplog.clear()
    recwarn.clear()
    found = downstream.score(model, words, [task], limit=None, batch_size=4)
    assert not any(capfd.readouterr())
    assert not caplog.records
    assert not recwarn.list
    assert_same(state(model), before)
    assert torch.equal(torch.random.get_rng_state(), drawn[0])
    assert (pickle.dumps(np.random.get_state()), random.getstate()) == drawn[1:]
    assert json.dumps(task) == given
    assert words.pad_token is None
    assert found.keys() == {downstream.NEXT_PASSAGE}
    scores = found[downstream.NEXT_PASSAGE]
    assert scores.keys() == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert all(0 <= value <= 1 for value in scores.values())
    assert scores["acc"] * ITEMS == pytest.approx(round(scores["acc"] * ITEMS))
    # And it can still be trained.
    tokens = tiny.sequences(1)[0][None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "lora_" in name)


def test_a_model_that_knows_the_text_gets_all_right(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, model = tokenizer(), tiny.model()
    tokens = words(text.read_text())["input_ids"]
    known = {tuple(tokens[at : at + 4]): tokens[at + 4] for at in range(len(tokens) - 4)}
    given: list[torch.Size] = []

    def forward(input_ids: torch.Tensor, **_: Any) -> CausalLMOutput:
        given.append(input_ids.shape)
        logits = torch.zeros(*input_ids.shape, tiny.VOCABULARY)
        for row, sequence in enumerate(input_ids.tolist()):
            for place in range(3, len(sequence)):
                if (following := known.get(tuple(sequence[place - 3 : place + 1]))) is not None:
                    logits[row, place, following] = 10
        return CausalLMOutput(logits=logits)

    monkeypatch.setattr(model, "forward", forward)
    config = downstream.write_choices(text, tmp_path, ITEMS, seed=0)
    assert downstream.score(model, words, [config], None, 8) == {
        downstream.NEXT_PASSAGE: {"acc": 1.0, "acc_stderr": 0.0, "acc_norm": 1.0, "acc_norm_stderr": 0.0}
    }
    asked = sum(shape[0] for shape in given)
    assert asked == downstream.CHOICES * ITEMS
    given.clear()
    downstream.score(model, words, [config], 2, 8)
    assert sum(shape[0] for shape in given) == downstream.CHOICES * 2


def test_a_task_without_data_is_said(text: Path, tmp_path: Path) -> None:
    elsewhere = downstream.write_choices(text, tmp_path, ITEMS, seed=0) | {"dataset_path": "nobody/nothing"}
    with pytest.raises(QuailoraError, match="cannot be had: Couldn't reach 'nobody/nothing'"):
        downstream.score(tiny.model(), tokenizer(), [elsewhere], None, 8)


@pytest.mark.slow  # 10 s to look through the harness's tasks
def test_the_harness_has_the_tasks_of_the_paper_and_no_others() -> None:
    assert set(downstream.PAPER_TASKS) <= set(downstream.TaskManager().all_tasks)
    with pytest.raises(QuailoraError, match=r"has no task arc_hard:"):
        downstream.score(tiny.model(), tokenizer(), ["arc_easy", "arc_hard"], None, 8)


# ---- The command line


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path | int) -> None:
    monkeypatch.setattr(sys, "argv", ["downstream", *map(str, arguments)])
    downstream.main()


def test_command_line(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = test_training.make_start(tmp_path, torch.bfloat16)
    tokenizer().save_pretrained(start.checkpoint)  # it knows the words of this text
    output = tmp_path / "scores.json"
    options = ("--base", "nf4", "--adapter", start.adapter, "--text", text, "--items", 8)
    run(monkeypatch, start.checkpoint, *options, "--json", output)
    found = json.loads(output.read_text())
    assert (found["base"], found["adapter"]) == ("nf4", str(start.adapter))
    shown = capsys.readouterr().out
    assert shown == downstream.table(found["scores"]) + "\n"
    acc = found["scores"][downstream.NEXT_PASSAGE]["acc"]
    assert f"| {downstream.NEXT_PASSAGE} | {acc:.1%} ± " in shown


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    start = test_training.make_start(tmp_path, torch.bfloat16)
    checkpoint = downstream.Checkpoint(start.checkpoint)
    for base in ("int8", "bf16"):
        with pytest.raises(MismatchError, match="make the model worse"):
            downstream.read_model(checkpoint, base, start.adapter)
    with pytest.raises(AdapterError, match=r"has no adapter_config\.json"):
        downstream.read_model(checkpoint, "nf4", tmp_path)
