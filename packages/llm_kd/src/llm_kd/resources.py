"""What a process has used."""

import resource
import sys

import torch


def peak_memory_gib() -> float:
    """Largest memory so far in GiB: allocated on the CUDA device if there is one, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
