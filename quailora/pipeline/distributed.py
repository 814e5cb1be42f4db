"""The processes that share a run, one to a device, by torch.distributed: each has a share of the samples and solves.

A run of one process takes the same path; then nothing is sent.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from quailora.calibration.data import Calibration
from quailora.calibration.gram import Gram
from quailora.errors import QuailoraError

T = TypeVar("T")

# A process whose peer died is told at once, by the connection; this is only how long an honest one may take to come.
_PATIENCE = timedelta(hours=12)


class Crew:
    """This process among those that share the run: `rank` of `size`; rank 0 writes and speaks.

    together: whether all processes of the default group of torch.distributed, which there has to be, run this.
    """

    def __init__(self, together: bool = False) -> None:
        if together and not (dist.is_available() and dist.is_initialized()):
            raise QuailoraError(
                "distributed=True, and there is no process group: start the processes with torchrun and call "
                "torch.distributed.init_process_group first"
            )
        self.together = together
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, data: Calibration) -> Calibration:
        """Every size-th sample of this rank, the longest of all dealt first; none where there are fewer samples."""
        if not self.together:
            return data
        ordered = sorted(data.sequences, key=len, reverse=True)
        return replace(data, sequences=tuple(ordered[self.rank :: self.size]))

    def from_leader(self, value: T) -> T:
        """What rank 0 gave; plain values."""
        if not self.together:
            return value
        box = [value]
        with _peers():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def least(self, value: int) -> int:
        """The least of what all gave."""
        return min(self._from_all(value))

    def merge(self, grams: Mapping[str, Gram], device: torch.device) -> dict[str, Gram]:
        """The H of every linear over the tokens of all, the same on each rank; linears that share one still do.

        grams: by linear; a linear that no token of this rank reached may lack.
        """
        if not self.together:
            return dict(grams)
        mine = [(names, grams[names[0]].features) for names in _sharing(grams)]
        merged: dict[str, Gram] = {}
        for names, features in _agreed(self._from_all(mine)):
            own = {id(grams[name]): grams[name] for name in names if name in grams}
            total = next(iter(own.values()), None) or Gram(features, device)
            for other in list(own.values())[1:]:
                total.merge(other)
            with _peers():
                total.reduce(dist.all_reduce)
            merged |= dict.fromkeys(names, total)
        return merged

    def deal(self, costs: Mapping[str, float]) -> dict[str, int]:
        """Item -> the rank that does it: the dearest first, each to the rank with the least to do."""
        load = [0.0] * self.size
        owners = {}
        for name in sorted(costs, key=lambda name: (-costs[name], name)):
            owners[name] = load.index(min(load))
            load[owners[name]] += costs[name]
        return owners

    def to_leader(self, value: T) -> list[T]:
        """On rank 0 what each rank gave, by rank; elsewhere nothing. Tensors are to be on the CPU."""
        if not self.together:
            return [value]
        found: list[Any] | None = [None] * self.size if self.leads else None
        with _peers():
            dist.gather_object(value, found, dst=0)
        return found or []

    def _from_all(self, value: T) -> list[T]:
        if not self.together:
            return [value]
        found: list[Any] = [None] * self.size
        with _peers():
            dist.all_gather_object(found, value)
        return found


@contextmanager
def _peers() -> Iterator[None]:
    """What torch.distributed raises when another process has gone is no fault of this one."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise QuailoraError(
            f"another process of this run has ended; its own message says why ({' '.join(str(error).split())[:120]})"
        ) from error


def _sharing(grams: Mapping[str, Gram]) -> list[list[str]]:
    """The names that have one and the same Gram, together."""
    names: dict[int, list[str]] = {}
    for name, gram in grams.items():
        names.setdefault(id(gram), []).append(name)
    return list(names.values())


def _agreed(of_ranks: Sequence[list[tuple[list[str], int]]]) -> list[tuple[list[str], int]]:
    """The groups of names, of which a rank may have seen a part: those that overlap are one. In an order all share."""
    groups: list[tuple[set[str], int]] = []
    for names, features in (group for of_one in of_ranks for group in of_one):
        united = set(names)
        for known in [known for known in groups if known[0] & united]:
            united |= known[0]
            groups.remove(known)
        groups.append((united, features))
    return sorted((sorted(names), features) for names, features in groups)


def launched() -> bool:
    """Whether torchrun started this process together with others. Schedulers set WORLD_SIZE alone."""
    alone = any(name not in os.environ for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "WORLD_SIZE"))
    return not alone and int(os.environ["WORLD_SIZE"]) > 1


def rank() -> int:
    """Of this process among them; 0 where it is alone."""
    return int(os.environ["RANK"]) if launched() else 0


@contextmanager
def joined(device: torch.device | str | None) -> Iterator[torch.device | str | None]:
    """Within it the processes that torchrun started are a group; yields the device of this one, or `device` itself
    where there is but one process.

    Raises:
        QuailoraError: a GPU was named though there are several processes.
    """
    if not launched() or dist.is_initialized():
        yield device
        return
    kind = torch.device(device).type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    if device is not None and torch.device(device).index is not None:
        raise QuailoraError(f"--device {device} with several processes: name the kind only, {kind}; each takes its own")
    if kind == "cuda":
        index = int(os.environ["LOCAL_RANK"])
        if index >= torch.cuda.device_count():
            raise QuailoraError(
                f"there are {torch.cuda.device_count()} GPUs here and more processes: lower --nproc-per-node"
            )
        torch.cuda.set_device(index)
        device = torch.device("cuda", index)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=_PATIENCE)
    yield device
    dist.destroy_process_group()  # not after an error: it would wait for the others, and they for us
