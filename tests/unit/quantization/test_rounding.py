"""The settings of rounding, given or left out."""

from typing import Any

import pytest

from quailora.errors import AdapterError
from quailora.quantization.rounding import (
    DEFAULT_ALTERNATIONS,
    DEFAULT_DAMPING,
    DEFAULT_INPUTS,
    FULL,
    QUANTIZED,
    RoundingConfig,
)
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
        ({"magr": -1.0}, r"magr \(--magr\) must be a number and at least 0, got -1.0"),
        ({"magr": "1"}, "got '1'"),
    ],
)
def test_a_value_of_another_type_is_an_error_that_shows_it(values: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        RoundingConfig(**values)


def test_what_is_left_out_depends_on_whether_the_base_is_written() -> None:
    assert RoundingConfig.given(None, written=False, damping=None).rounding == NEAREST
    written = RoundingConfig.given(None, written=True, damping=None, alternations=None, magr=None)
    assert written == RoundingConfig(CALIBRATED, DEFAULT_DAMPING, DEFAULT_ALTERNATIONS, 0.0, DEFAULT_INPUTS)
    given = RoundingConfig.given(None, written=True, damping=0.5, alternations=0, magr=1e-3, inputs=QUANTIZED)
    assert given == RoundingConfig(CALIBRATED, 0.5, 0, 1e-3, QUANTIZED)
    for written in (False, True):  # where codes are nearest, inputs are full, and to say so is no error
        for inputs in (None, FULL):
            assert RoundingConfig.given(NEAREST, written=written, inputs=inputs) == RoundingConfig(NEAREST)


@pytest.mark.parametrize(
    "rounding, written, settings, message",
    [
        (CALIBRATED, False, {}, r"their base has to be written: give base_output \(--base-output\)"),
        (None, False, {"alternations": 0}, r"alternations \(--alternations\) is of calibrated.* give base_output"),
        (None, False, {"damping": 0.1}, r"rounding_damping \(--rounding-damping\) is of.* give base_output"),
        (None, False, {"magr": 0.1}, r"magr \(--magr\) is of calibrated rounding.* give base_output"),
        (
            NEAREST,
            True,
            {"inputs": QUANTIZED},
            r"inputs='quantized' \(--inputs quantized\) takes codes that are chosen",
        ),
        (None, False, {"inputs": QUANTIZED}, r"factors alone gain little .* rounding='calibrated'"),
        (NEAREST, True, {"alternations": 3}, r"take rounding='calibrated' \(--rounding calibrated\), or leave it"),
    ],
)
def test_settings_of_calibrated_rounding_go_with_it(
    rounding: str | None, written: bool, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        RoundingConfig.given(rounding, written=written, **settings)
