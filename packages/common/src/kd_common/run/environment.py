"""The machine and the versions that measurements belong to."""

import os
import platform
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Hardware and versions the numbers belong to."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "device": device,
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
