"""What a run ran on: devices, processor, versions; for its report."""

import os
import platform
from importlib import metadata
from pathlib import Path

import psutil
import torch

PACKAGES = ("torch", "transformers", "accelerate", "triton", "torchao", "flash-attn")


def describe_environment(device: torch.device, processes: int) -> dict[str, str]:
    """Devices, memory and versions in words, by what they are of. No names of machines or people.

    Args:
        device: of this process.
        processes: of the run.
    """
    found = {"devices": f"{processes} x {_device_name(device)}"}
    if device.type == "cuda":
        found["GPU memory"] = f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB each"
        found["CUDA"] = str(torch.version.cuda or torch.version.hip)
    else:
        found["threads"] = f"{torch.get_num_threads()} a process, of {os.cpu_count()} processors"
    found["memory"] = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    found["Python"] = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    found["tessera"] = _version("tessera-lm") or "unknown"
    found |= {name: version for name in PACKAGES if (version := _version(name))}
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if device.type == "cpu" and cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return f"CPU, {value.strip()}"
    return f"{device.type.upper()} {platform.processor()}".strip()
