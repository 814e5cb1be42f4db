"""A GPU that is not there: tensors on "cuda" that have a shape but no values, and kernels that are not run.

It shows the host's part of what runs on a GPU: which operations and launches there are, and with what. torch's
FakeTensorMode refuses operations between devices, and whatever would make the host wait for a value.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from quailora.ops import dispatch
from quailora.ops import triton as triton_backend
from quailora.solvers import krylov

CUDA = torch.device("cuda", 0)


class Indexing(TorchFunctionMode):
    """Python's indexing, and copies, which a torch built without CUDA refuses for its fake tensors."""

    def copied(self, source: Tensor) -> None:
        """Called for each copy that the device makes, or that is made to it."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.__getitem__:
            return _part(*args)
        if function is Tensor.__setitem__:
            assert torch.broadcast_shapes(_part(args[0], args[1]).shape, args[2].shape)
            return self.copied(args[2])
        if function is Tensor.copy_:
            assert torch.broadcast_shapes(args[0].shape, args[1].shape) == args[0].shape
            self.copied(args[1])
            return args[0]
        if function is Tensor.contiguous and not args[0].is_contiguous():
            self.copied(args[0])
            return torch.empty(args[0].shape, dtype=args[0].dtype, device=args[0].device)
        return function(*args, **(kwargs or {}))


def _part(x: Tensor, index: Any) -> Tensor:
    dim = 0
    for each in index if isinstance(index, tuple) else (index,):
        if each is None:
            x = x.unsqueeze(dim)
        elif isinstance(each, slice):
            start, stop, step = each.indices(x.shape[dim])
            assert step == 1
            x = x.narrow(dim, start, max(0, stop - start))
        else:
            x, dim = x.select(dim, each), dim - 1
        dim += 1
    return x


@contextmanager
def fake_cuda(
    launch: Callable[..., None],
    device: Callable[[torch.device], AbstractContextManager[object]] = nullcontext,
    indexing: Indexing | None = None,
) -> Iterator[None]:
    """Within it there is a GPU of sm_90, as far as `quailora.ops` can tell.

    launch: called instead of each launch of a Triton kernel, with the kernel and what it is launched with.
    device: stands for `torch.cuda.device`.
    """
    from triton import JITFunction

    with ExitStack() as stack:
        for owner, name, fake in (
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            (torch.cuda, "get_device_name", lambda device=None: "a GPU"),
            (triton_backend, "_launcher_obstacle", lambda: None),
            (torch.cuda, "device", device),
            (JITFunction, "run", lambda kernel, *args, **keywords: launch(kernel, *args, **keywords)),
        ):
            stack.enter_context(patch.object(owner, name, fake))
        for cache in (dispatch._choose, krylov.gaussian):
            cache.cache_clear()
            stack.callback(cache.cache_clear)
        stack.enter_context(FakeTensorMode())
        stack.enter_context(indexing or Indexing())
        yield
