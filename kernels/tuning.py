"""The fastest settings of each kernel on this GPU: timed on request, saved in a file.

Never inside a solve: a setting decides the order in which a product is summed, so a solve that timed its kernels first
could give different bits from one run to the next. This way, a GPU gives the same bits until it is tuned again.
"""

import itertools
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial

import torch
from triton.testing import do_bench

from quailora.kernels import error_products, gram_product, settings
from quailora.kernels.settings import Problem, Setting


def problems(device: torch.device) -> Iterable[Problem]:
    """What is timed: the most common cases of each kernel, on synthetic matrices of sizes found in LLMs."""
    return itertools.chain(error_products.problems(device), gram_product.problems(device))


def tune(
    device: torch.device,
    milliseconds: Callable[[Callable[[], object]], float] = do_bench,
    problems: Callable[[torch.device], Iterable[Problem]] = problems,
) -> dict[str, Setting]:
    """Time the settings of every problem, write the fastest to `settings.timings_file`, and return them by name.

    From then on, launches use these settings, in this process too. Problems of one name are sizes of one problem, and
    their times add up. Raises OSError if the file cannot be written.
    """
    times: defaultdict[str, list[float]] = defaultdict(list)
    candidates: dict[str, list[Setting]] = {}
    for problem in problems(device):
        candidates[problem.name] = list(problem.settings)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            taken = [milliseconds(partial(problem.run, setting)) for setting in problem.settings]
        times[problem.name] = [a + b for a, b in itertools.zip_longest(times[problem.name], taken, fillvalue=0.0)]
    fastest = {name: candidates[name][of.index(min(of))] for name, of in times.items()}
    path = settings.timings_file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(fastest, file, indent=1)
    os.replace(file.name, path)  # atomic: other processes may read or write it
    settings.forget_timings()
    return fastest
