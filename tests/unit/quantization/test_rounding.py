"""The settings of rounding, given or left out."""

from typing import Any

import pytest

from quailora.errors import AdapterError
from quailora.quantization.rounding import DEFAULT_ALTERNATIONS, DEFAULT_DAMPING, RoundingConfig
from quailora.quantization.verify import CALIBRATED, NEAREST


@pytest.mark.parametrize(
    "values, message",
    [
        ({"rounding": 3}, r"rounding=3 \(--rounding\)"),
        ({"alternations": 1.5}, r"alternations \(--alternations\) must be a whole number and at least 0, got 1.5"),
        ({"alternations": "2"}, "got '2'"),
        ({"alternations": None}, "got None"),
        ({"damping": "0.1"}, r"rounding_damping \(--rounding-damping\) must be a number above 0, got '0.1'"),
        ({"damping": float("nan")}, "got nan"),
    ],
)
def test_a_value_of_another_type_is_an_error_that_shows_it(values: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        RoundingConfig(**values)


def test_what_is_left_out_depends_on_whether_the_base_is_written() -> None:
    assert RoundingConfig.given(None, None, None, written=False).rounding == NEAREST
    written = RoundingConfig.given(None, None, None, written=True)
    assert written == RoundingConfig(CALIBRATED, DEFAULT_DAMPING, DEFAULT_ALTERNATIONS)
    assert RoundingConfig.given(None, 0.5, 0, written=True) == RoundingConfig(CALIBRATED, 0.5, 0)


@pytest.mark.parametrize(
    "rounding, damping, alternations, written, message",
    [
        (CALIBRATED, None, None, False, r"their base has to be written: give base_output \(--base-output\)"),
        (None, None, 0, False, r"alternations \(--alternations\) is of calibrated rounding.* give base_output"),
        (None, 0.1, 2, False, r"rounding_damping \(--rounding-damping\) is of calibrated rounding.* give base_output"),
        (NEAREST, None, 3, True, r"alternations .* take rounding='calibrated' \(--rounding calibrated\), or leave it"),
    ],
)
def test_settings_of_calibrated_rounding_go_with_it(
    rounding: str | None, damping: float | None, alternations: int | None, written: bool, message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        RoundingConfig.given(rounding, damping, alternations, written=written)
