"""Which setting a launch takes: the default, or the one that was timed to be the fastest."""

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import triton

from quailora.kernels import error_product_configs, error_products, gram_product, settings, tuning
from quailora.kernels.settings import Problem, chosen, timings_file
from quailora.kernels.tuning import tune
from tests.helpers import interpreter

interpreter.install()

CPU = torch.device("cpu")
SLOW, FAST = {"TILE": 16, "num_warps": 1}, {"TILE": 32, "num_warps": 2}


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings.forget_timings()
    yield timings_file(CPU)
    settings.forget_timings()


def one_problem(device: torch.device) -> Iterator[Problem]:
    yield Problem("a product", [SLOW, FAST], lambda setting: setting)


def by_warps(run: Callable[[], object]) -> float:
    """In place of a clock: more warps are faster."""
    setting = run()
    assert isinstance(setting, dict)
    return 1 / setting["num_warps"]


def test_the_fastest_is_written_and_taken(file: Path) -> None:
    assert chosen("a product", [SLOW, FAST], CPU) == SLOW
    assert tune(CPU, by_warps, one_problem) == {"a product": FAST}
    assert json.loads(file.read_text()) == {"a product": FAST}
    assert [each.name for each in file.parent.iterdir()] == [file.name]  # nothing half written is left
    assert chosen("a product", [SLOW, FAST], CPU) == FAST
    assert chosen("another", [SLOW, FAST], CPU) == SLOW


def test_sizes_of_one_problem_count_together() -> None:
    clock = iter([1.0, 2.0, 5.0, 1.0])  # slow and fast at one size, then at the other: 6 and 3
    assert tune(CPU, lambda run: next(clock), lambda device: [*one_problem(device), *one_problem(device)]) == {
        "a product": FAST
    }


def test_a_setting_that_is_no_longer_shipped_is_not_taken() -> None:
    tune(CPU, by_warps, one_problem)
    assert chosen("a product", [SLOW], CPU) == SLOW


def test_the_file_is_read_once(file: Path) -> None:
    tune(CPU, by_warps, one_problem)
    assert chosen("a product", [SLOW, FAST], CPU) == FAST
    file.unlink()
    assert chosen("a product", [SLOW, FAST], CPU) == FAST


@pytest.mark.parametrize("text", ["", "{", "[]", '"a product"', "\udcff"])
def test_a_file_that_cannot_be_read_is_reported_and_ignored(text: str, file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.warns(UserWarning, match="cannot be read .*default settings; `quailora doctor --tune` writes it anew"):
        assert chosen("a product", [SLOW, FAST], CPU) == SLOW
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen("a product", [SLOW, FAST], CPU)  # once is enough
    assert tune(CPU, by_warps, one_problem) == {"a product": FAST}
    assert chosen("a product", [SLOW, FAST], CPU) == FAST


def test_another_triton_or_kernel_has_a_file_of_its_own(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune(CPU, by_warps, one_problem)
    monkeypatch.setattr(triton, "__version__", "0.0.0")
    assert timings_file(CPU) != file
    settings.forget_timings()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen("a product", [SLOW, FAST], CPU) == SLOW


def test_an_interrupted_write_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune(CPU, by_warps, one_problem)

    def fails(*arguments: object, **keywords: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(json, "dump", fails)
    with pytest.raises(OSError, match="no space left"):
        tune(CPU, lambda run: -by_warps(run), one_problem)
    assert json.loads(file.read_text()) == {"a product": FAST}


def test_every_problem_runs_with_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels themselves, at sizes for the interpreter: a launch then finds what was timed under its own name."""
    monkeypatch.setattr(error_products, "_SHAPES", ((256, 256),))
    monkeypatch.setattr(gram_product, "_SIZES", (64,))
    runs = 0

    def last_is_fastest(run: Callable[[], object]) -> float:
        nonlocal runs
        runs += 1
        run()
        return -runs

    problems = list(tuning.problems(CPU))
    fastest = tune(CPU, last_is_fastest)
    assert runs == sum(len(problem.settings) for problem in problems) >= 2 * len(problems)
    assert fastest == {problem.name: problem.settings[-1] for problem in problems}
    taken: list[str] = []
    monkeypatch.setattr(gram_product, "chosen", lambda name, *_: taken.append(name) or fastest[name])
    gram_product.gram_product(torch.eye(64), torch.ones(64, 128), precision="bf16x3")
    assert taken == ["gram_product-k128-bf16x3"]
    # What the solvers launch at rank 64, in the forms of whole tiles: krylov, als, and als that has E in memory.
    for name in ("4bit-bf16-r64-tf32", "4bit-bf16-r64-bf16x3", "dense-bf16-r64-bf16x3"):
        assert {f"error_product-{name}-n", f"error_product-{name}-t"} <= fastest.keys()
    assert {
        "gram_product-k64-bf16x3",
        "gram_product-k128-bf16x3",
    } <= fastest.keys()  # of one linear, and of two or three
    case = error_product_configs.Case.of(torch.bfloat16, None, [256], 256, 16, False, "ieee")
    assert case.problem not in fastest  # no alternatives, so nothing to time
