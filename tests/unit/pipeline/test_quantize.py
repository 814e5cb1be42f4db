"""Q and the factors in turn, on one linear."""

import pytest
import torch

from quailora import ops
from quailora.calibration.gram import Gram
from quailora.pipeline.quantize import CalibratedQ
from quailora.pipeline.stages import Stages
from quailora.quantization.bitsandbytes import BitsAndBytes
from quailora.quantization.feedback import Curvature
from quailora.quantization.gptq import GPTQ
from quailora.quantization.magr import reduce_magnitude
from quailora.quantization.protocol import QuantizedBase
from quailora.quantization.rounding import RoundingConfig
from quailora.solvers.config import SolverConfig

NF4 = BitsAndBytes("nf4", double=True, blocksize=64, compute_dtype=torch.bfloat16)


@pytest.mark.parametrize("base, group", [(GPTQ(3, 32), 32), (GPTQ(3, -1), 128), (NF4, 64)], ids=["int3", "rows", "NF4"])
def test_with_magr_smaller_extremes_are_rounded_and_the_factors_are_of_w(base: QuantizedBase, group: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator).bfloat16()
    gram = Gram(128)
    gram.update(torch.randn(512, 128, generator=generator) @ torch.randn(128, 128, generator=generator))
    rounding = RoundingConfig(damping=0.1, alternations=1, magr=0.02)
    found = CalibratedQ(base, rounding, SolverConfig(), Stages())({"w": weight}, {"w": 4}, gram, overwrite=False)["w"]
    h = gram.matrix()
    reduced = reduce_magnitude(weight, h, group=group, strength=0.02)
    first = base.calibrated(reduced, Curvature.of(h, 0.1)).dequantize().float()
    assert found.before[0] == pytest.approx(float(ops.gram_energy(h, weight.float() - first)) / 2, rel=1e-4)
    assert found.factors is not None
    error = weight.float() - found.quantized.dequantize().float()
    best = found.after.index(min(found.after))
    assert found.before[best] == pytest.approx(float(ops.gram_energy(h, error)) / 2, rel=1e-4)
    left = error - found.factors.A @ found.factors.B.T
    assert found.after[best] == pytest.approx(float(ops.gram_energy(h, left)) / 2, rel=1e-4)
