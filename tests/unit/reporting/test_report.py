"""The report: what is computed from its layers, and what is written."""

import errno
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from quailora.errors import AdapterError, QuailoraError
from quailora.reporting.record import RECORD, read_record, was_trained
from quailora.reporting.report import BlockReport, ModelReport, Report, error_left
from tests.helpers.adapters import WEIGHTS
from tests.unit.reporting.sample import layer, make_report


def test_error_left_is_a_geometric_mean() -> None:
    assert error_left([layer("a", 2, 1), layer("b", 8, 1)]) == pytest.approx(0.25)
    assert error_left([layer("a", 2, 1), layer("exact", 0, 0)]) == pytest.approx(0.5)
    assert error_left([layer("a", 2, 1), layer("undone", 2, 0)]) == 0
    assert error_left([layer("exact", 0, 0)]) == 1


def test_a_saved_report_is_loaded_as_it_was(tmp_path: Path) -> None:
    report = make_report()
    report.save(tmp_path / "new" / "folder")
    assert Report.load(tmp_path / "new" / "folder") == report
    assert read_record(tmp_path / "new" / "folder") == report.record
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [RECORD, "report.json", "report.md"]


def test_json_is_strict(tmp_path: Path) -> None:
    report = make_report()
    report.layers.append(layer("bad", after=math.nan))
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.save(tmp_path)
    assert not any(tmp_path.iterdir())


def test_markdown_has_every_layer_once_and_what_was_left() -> None:
    report = make_report()
    text = report.to_markdown()
    for name in [x.name for x in report.layers] + list(report.left):
        # Ended, for layers.1 begins the name of none but layers.10 would.
        assert text.count(f"{name} ") + text.count(f"{name},") + text.count(f"{name}\n") == 1, name
    assert "| q_proj | 12 | 2 | 1 | 50.0% |" in text
    assert "| o_proj | 12 | 2 | 0.25 | 12.5% |" in text
    assert r"a\|b.txt" in text
    assert "| write | 2 min 01 s | 97% |" in text
    assert "- a note" in text


def test_every_row_of_a_table_has_as_many_cells_as_its_header() -> None:
    tables = [part for part in make_report().to_markdown().split("\n\n") if part.startswith("|")]
    assert len(tables) == 4
    for table in tables:
        assert len({line.replace(r"\|", "").count("|") for line in table.splitlines()}) == 1


def test_summary_names_a_few_that_were_left_and_counts_the_rest() -> None:
    lines = str(make_report().summary()).splitlines()
    assert lines[0] == (
        "24 linear layers initialized; 25.0% of their output error on the calibration tokens is left (geometric mean)"
    )
    assert lines[1] == "400 tokens of a|b.txt, 2 min 05 s"
    assert lines[2].count("up_proj") == 3 and "and 2 more (no calibration token reached it)" in lines[2]
    assert lines[3] == "a note"


def test_summary_has_what_refining_the_model_took() -> None:
    report = make_report()
    report.model = ModelReport(40, 0.123456, 0.1, 24, "", 60.0)
    report.stages |= {"full precision": 20.0, "refine the model": 40.0}
    report.record["model_refinement"] = {"data": "other.txt", "drawn_tokens": 1234}
    lines = str(report.summary()).splitlines()
    assert lines[0].endswith("The whole model refined; KL divergence on held-out tokens 0.1235 before, 0.1000 after")
    assert lines[1:3] == ["400 tokens of a|b.txt, 2 min 05 s", "the whole model: 1234 tokens of other.txt, 1 min 00 s"]
    assert "on 40 held-out tokens is 0.1235 nats before and 0.1000 after" in report.to_markdown()


def test_of_one_there_is_no_plural() -> None:
    report = make_report()
    del report.layers[1:]
    report.blocks.append(BlockReport("model.layers.0", 40, 0.2, 0.1, 24, "", 1.0))
    report.record["calibration"]["samples"] = 1
    assert "400 tokens in 1 sequence of at most" in report.to_markdown()
    summary = str(report.summary())
    assert summary.startswith("1 linear layer initialized; ") and "1 block refined; " in summary


def test_the_digest_of_the_weights_is_that_of_the_first_folder(tmp_path: Path) -> None:
    (initial := tmp_path / "initial").mkdir()
    (trained := tmp_path / "trained").mkdir()
    (initial / WEIGHTS).write_bytes(b"initial")
    (trained / WEIGHTS).write_bytes(b"trained")
    report = make_report()
    report.save(initial)
    Report.load(initial).save(trained)
    records = {folder: read_record(folder) or {} for folder in (initial, trained)}
    assert [was_trained(*each) for each in records.items()] == [False, True]
    assert was_trained(initial, records[initial] | {"trained": True})
    assert not was_trained(trained, make_report().record)  # older ones do not say


def fail_on_fsync(number: int) -> Callable[[int], None]:
    """An fsync that finds the disk full at the `number`th file."""
    calls = iter(range(1, number))

    def fsync(descriptor: int) -> None:
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fsync


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_full_disk_leaves_the_old_files_whole(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_report().save(tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    newer = make_report()
    newer.notes.append("another note")
    newer.record["quailora"] = "0.2.0"

    monkeypatch.setattr(os, "fsync", fail_on_fsync(number))
    file = ("report.json", "report.md", RECORD)[number - 1]
    with pytest.raises(QuailoraError, match=f"{file} cannot be written: No space left on device; free some space"):
        newer.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_a_folder_without_a_report_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"has no report\.json"):
        Report.load(tmp_path)


def test_a_damaged_report_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"layers": [{"name": "x"}]}')
    with pytest.raises(AdapterError, match="is not a report that quailora wrote"):
        Report.load(tmp_path)
