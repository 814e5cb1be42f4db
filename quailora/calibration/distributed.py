"""Several processes that share a run, one to a device, through torch.distributed.

Each takes a share of the samples and of the solves. A run of one process takes the same path and sends nothing.
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
from torch import Tensor

from quailora.calibration.data import Calibration
from quailora.calibration.gram import Gram
from quailora.calibration.inputs import InputPair
from quailora.errors import QuailoraError

T = TypeVar("T")

# Only how long a slow process may keep the others waiting: one that died is noticed at once, by its connection.
_TIMEOUT = timedelta(hours=12)


class Processes:
    """This process among those that share the run: `rank` of `size`. Rank 0 writes the output.

    distributed: whether every process of the default process group runs this.

    Raises:
        QuailoraError: `distributed` without an initialized process group.
    """

    def __init__(self, distributed: bool = False) -> None:
        if distributed and not (dist.is_available() and dist.is_initialized()):
            raise QuailoraError(
                "distributed=True, but there is no process group: start the processes with torchrun and call "
                "torch.distributed.init_process_group first"
            )
        self.distributed = distributed
        self.rank = dist.get_rank() if distributed else 0
        self.size = dist.get_world_size() if distributed else 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard(self, data: Calibration) -> Calibration:
        """This rank's samples: every size-th one by descending length; none if there are too few."""
        if not self.distributed:
            return data
        ordered = sorted(data.sequences, key=len, reverse=True)
        return replace(data, sequences=tuple(ordered[self.rank :: self.size]))

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank. It must be picklable."""
        if not self.distributed:
            return value
        box = [value]
        with _other_rank_errors():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def minimum(self, value: int) -> int:
        """The smallest value of any rank."""
        return min(self._all_gather(value))

    def maximum(self, value: int) -> int:
        """The largest value of any rank."""
        return max(self._all_gather(value))

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each of these tensors, of one dtype, by its sum over all ranks: the same bits on each."""
        if not self.distributed:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with _other_rank_errors():
            dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def all_reduce(self, grams: Mapping[str, Gram], device: torch.device) -> dict[str, Gram]:
        """The H of every linear over the tokens of all ranks, the same on each. Linears that shared an H still do.

        grams: by linear. A linear that none of this rank's tokens reached may be missing.
        """
        if not self.distributed:
            return dict(grams)
        mine = [(names, grams[names[0]].features) for names in _shared_grams(grams)]
        total: dict[str, Gram] = {}
        for names, features in _united(self._all_gather(mine)):
            own = {id(grams[name]): grams[name] for name in names if name in grams}
            gram = next(iter(own.values()), None) or Gram(features, device)
            for other in list(own.values())[1:]:
                gram.merge(other)
            with _other_rank_errors():
                gram.reduce(dist.all_reduce)
            total |= dict.fromkeys(names, gram)
        return total

    def reduce(self, pair: InputPair) -> None:
        """H and D over the tokens of all ranks, the same on each."""
        with _other_rank_errors():
            pair.reduce(dist.all_reduce)

    def assign(self, costs: Mapping[str, float]) -> dict[str, int]:
        """Item -> the rank that works on it: the most expensive first, each to the rank with the least work so far."""
        load = [0.0] * self.size
        owners = {}
        for name in sorted(costs, key=lambda name: (-costs[name], name)):
            owners[name] = load.index(min(load))
            load[owners[name]] += costs[name]
        return owners

    def gather(self, value: T) -> list[T]:
        """On rank 0 the values of all ranks, in order; an empty list elsewhere. Tensors must be on the CPU."""
        if not self.distributed:
            return [value]
        found: list[Any] | None = [None] * self.size if self.is_main else None
        with _other_rank_errors():
            dist.gather_object(value, found, dst=0)
        return found or []

    def _all_gather(self, value: T) -> list[T]:
        if not self.distributed:
            return [value]
        found: list[Any] = [None] * self.size
        with _other_rank_errors():
            dist.all_gather_object(found, value)
        return found


@contextmanager
def _other_rank_errors() -> Iterator[None]:
    """torch.distributed raises RuntimeError here when another process has died."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise QuailoraError(
            f"another process of this run has ended; its own message says why ({' '.join(str(error).split())[:120]})"
        ) from error


def _shared_grams(grams: Mapping[str, Gram]) -> list[list[str]]:
    """The names, grouped by the Gram they share."""
    names: dict[int, list[str]] = {}
    for name, gram in grams.items():
        names.setdefault(id(gram), []).append(name)
    return list(names.values())


def _united(groups_by_rank: Sequence[list[tuple[list[str], int]]]) -> list[tuple[list[str], int]]:
    """The groups of names over all ranks, in the same order everywhere. A rank may have seen part of a group: groups
    that overlap are one."""
    groups: list[tuple[set[str], int]] = []
    for names, features in (group for of_one in groups_by_rank for group in of_one):
        united = set(names)
        for known in [known for known in groups if known[0] & united]:
            united |= known[0]
            groups.remove(known)
        groups.append((united, features))
    return sorted((sorted(names), features) for names, features in groups)


def launched_by_torchrun() -> bool:
    """Whether torchrun started this process together with others. (Job schedulers may set WORLD_SIZE alone.)"""
    alone = any(name not in os.environ for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "WORLD_SIZE"))
    return not alone and int(os.environ["WORLD_SIZE"]) > 1


def rank() -> int:
    """This process's rank; 0 where it is alone."""
    return int(os.environ["RANK"]) if launched_by_torchrun() else 0


@contextmanager
def process_group(device: torch.device | str | None) -> Iterator[torch.device | str | None]:
    """Within it the processes that torchrun started are a process group. Yields the device of this process, or `device`
    itself where there is only one process.

    Raises:
        QuailoraError: one particular GPU was named for several processes, or there are fewer GPUs than processes.
    """
    if not launched_by_torchrun() or dist.is_initialized():
        yield device
        return
    kind = torch.device(device).type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    if device is not None and torch.device(device).index is not None:
        raise QuailoraError(
            f"--device {device} with several processes: give the type only (--device {kind}); each process takes its "
            "own GPU"
        )
    if kind == "cuda":
        index = int(os.environ["LOCAL_RANK"])
        if index >= torch.cuda.device_count():
            raise QuailoraError(
                f"there are {torch.cuda.device_count()} GPUs here and more processes: lower --nproc-per-node"
            )
        torch.cuda.set_device(index)
        device = torch.device("cuda", index)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=_TIMEOUT)
    yield device
    dist.destroy_process_group()  # not after an error: it would wait for the other ranks, and they for this one
