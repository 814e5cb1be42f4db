"""What the stages of a run take."""

from typing import Any

import pytest
import torch

from quailora.pipeline import stages
from quailora.pipeline.stages import Stages


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_stage_takes_until_what_it_queued_is_done(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now, queued = 0.0, 0.0

    def wait(of: Any) -> None:
        nonlocal now, queued
        assert of == torch.device(device)
        now, queued = now + queued, 0.0

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(stages, "perf_counter", lambda: now)
    measured = Stages(torch.device(device))
    queued = 4.0  # by something else
    with measured("forward"):
        now, queued = now + 1, queued + 2
    with measured("solve"):
        now += 3
    with pytest.raises(KeyError), measured("solve"):
        now += 3
        raise KeyError
    assert measured.seconds == {"forward": 1.0 if device == "cpu" else 3.0, "solve": 6.0}
