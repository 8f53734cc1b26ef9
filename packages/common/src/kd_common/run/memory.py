"""What a process or a call needs in memory."""

import os
import resource
import sys
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_memory_gib() -> float:
    """Return the peak memory in GiB: allocated on the CUDA device if there is one, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class LiveBytes(TorchDispatchMode):
    """Peak bytes of the tensors alive at once among those that operations return, workspaces inside kernels left out.

    Args:
        ignore: Tensors that were there before.

    Attributes:
        peak: Bytes.
    """

    def __init__(self, ignore: Iterable[Tensor]) -> None:
        super().__init__()
        self.seen = {t.untyped_storage()._cdata for t in ignore if t.layout == torch.strided}
        self.live = self.peak = 0

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Run an operation and count what it returns."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out


def peak_bytes(call: Callable[[], object], ignore: Iterable[Tensor], device: torch.device) -> int:
    """Peak of the bytes that a call holds beyond what was there before.

    Args:
        call: The call.
        ignore: Tensors that were there before and that it uses; only needed on a CPU, where what kernels allocate
            inside is not seen.
        device: Where it runs. On CUDA the allocator's statistics are reset.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes(ignore) as record:
        call()
    return record.peak


def limit_primitive_cache(entries: int = 64) -> None:
    """Let oneDNN keep fewer of the kernels that it builds for every new shape of a bfloat16 product on a CPU.

    By default it keeps 1,024 with their buffers, and batches of ever new lengths fill that, which can take gigabytes.
    Building a kernel anew costs little beside its product. It takes effect before the first such product of a process;
    an `ONEDNN_PRIMITIVE_CACHE_CAPACITY` in the environment stays.

    Args:
        entries: Kernels kept, >= 0.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(entries))
