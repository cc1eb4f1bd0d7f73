"""How much memory this machine has for models, and how much a process takes.

If there are GPUs whose driver can be asked (NVML, by the package ``pynvml`` or ``nvidia-ml-py``, if one is installed),
their memory is what models are put into; otherwise it is that of the machine, or of the container that this process is
in. A tenth of the latter is left for everything else.

What processes take is the memory that they have in use now, with the files that they have mapped: the weights of a
model usually are such a file. Linux only; elsewhere nothing is measured.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

__all__ = ["available_memory", "group_memory", "own_memory"]

logger = logging.getLogger("trio_cluster.on_demand")

#: The part of a machine's memory that is there for models.
_SHARE: Final = 0.9
_PROC: Final = Path("/proc")
_CGROUP_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")
#: Fields of ``/proc/PID/stat`` after the name of the program: the process group, and the resident pages.
_GROUP_FIELD: Final = 2
_PAGES_FIELD: Final = 21


def available_memory() -> tuple[float, str]:
    """Return the bytes that there are for models, and where: ``"GPU"`` or ``"RAM"``. Blocks for a short time.

    Infinite if the system does not tell.
    """
    if (gpu := _gpu_memory()) is not None:
        return gpu, "GPU"
    try:
        total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (OSError, ValueError):
        return math.inf, "RAM"
    # There may be no container, or it has no limit.
    with suppress(OSError, ValueError):
        total = min(total, float(_CGROUP_LIMIT.read_text(encoding="ascii")))
    return total * _SHARE if total > 0 else math.inf, "RAM"


def own_memory() -> int:
    """Return the bytes of memory that this process has in use; 0 if the system does not tell. Synchronous."""
    return _resident_size("self")[1]


def group_memory(group: int) -> int:
    """Return the bytes of memory that the processes of a group take; 0 if the system does not tell.

    That is memory of GPUs if :func:`available_memory` is. Blocks for a short time: it looks at all processes.

    Args:
        group: the id of the process group.
    """
    try:
        numbers = [name for name in os.listdir(_PROC) if name.isdecimal()]
    except OSError:
        return 0
    sizes = {int(number): size for number in numbers for at, size in [_resident_size(number)] if at == group}
    used = _gpu_memory_of(sizes.keys())
    return sum(sizes.values()) if used is None else used


def _resident_size(process: str) -> tuple[int, int]:
    """Return the group of a process, and the bytes that it has in use; zeros if there is no such process."""
    try:
        fields = (_PROC / process / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
        values = fields.split()
        return int(values[_GROUP_FIELD]), int(values[_PAGES_FIELD]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0, 0


# NVML. The package is not a dependency, and has no types; whatever goes wrong in it means that there is no GPU.


def _nvml() -> Any:
    try:
        library: Any = importlib.import_module("pynvml")
        library.nvmlInit()
    except Exception:
        return None
    return library


def _gpu_memory() -> float | None:
    """Return the memory of all GPUs together; ``None`` if there are none that can be asked."""
    library = _nvml()
    if library is None:
        return None
    try:
        handles = [library.nvmlDeviceGetHandleByIndex(index) for index in range(library.nvmlDeviceGetCount())]
        return float(sum(library.nvmlDeviceGetMemoryInfo(handle).total for handle in handles)) or None
    except Exception as error:
        logger.warning("the memory of the GPUs is not known: %s", error)
        return None


def _gpu_memory_of(processes: Iterable[int]) -> int | None:
    """Return the memory of GPUs that processes take; ``None`` if there are no GPUs that can be asked."""
    library = _nvml()
    if library is None:
        return None
    wanted, used = set(processes), 0
    try:
        for index in range(library.nvmlDeviceGetCount()):
            handle = library.nvmlDeviceGetHandleByIndex(index)
            for each in library.nvmlDeviceGetComputeRunningProcesses(handle):
                used += (each.usedGpuMemory or 0) if each.pid in wanted else 0
    except Exception:
        return None
    return used
