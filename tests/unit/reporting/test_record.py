"""The record beside an adapter."""

import json
from pathlib import Path

import pytest

from quailora.errors import AdapterError
from quailora.reporting.record import RECORD, read_record
from tests.unit.reporting.sample import make_record


def test_without_a_record_it_is_none(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"base": {', "cannot be read"),
        ("[]", "holds a list"),
        ("{}", "lacks base, calibration, lora, solver, versions"),
        (json.dumps(make_record() | {"base": {"checkpoint": "x"}}), r"lacks base\.revision, base\.fingerprint"),
        (json.dumps(make_record() | {"lora": None}), "lacks lora"),
    ],
)
def test_a_damaged_record_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(AdapterError, match=complaint):
        read_record(tmp_path)
