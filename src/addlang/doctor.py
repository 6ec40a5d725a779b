"""``addlang doctor``: what this machine can do, and what is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

OPTIONAL = {
    "lm_eval": "lm-eval tasks: pip install 'addlang[lm-eval]'",
    "tensorboard": "report_to: tensorboard: pip install 'addlang[trackers]'",
    "torchao": "8-bit optimizer and stochastic rounding",
    "peft": "adapters",
    "liger_kernel": "fused kernels on GPUs",
}


def examine() -> dict[str, Any]:
    """Versions, devices, cache and hub. ``ok`` is False when addlang cannot run at all."""
    from addlang.data.prepare import cache_root

    problems: list[str] = []
    found: dict[str, str | None] = {}
    for name in ("torch", "transformers", "datasets", "safetensors", "numpy", "scipy", "pydantic"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
            problems.append(f"package '{name}' is missing: pip install addlang again")
    devices: list[dict[str, Any]] = []
    if found["torch"]:
        import torch

        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            devices.append(
                {"name": p.name, "memory_gib": round(p.total_memory / 2**30, 1), "bf16": torch.cuda.is_bf16_supported()}
            )
        if not devices and shutil.which("nvidia-smi"):
            problems.append("there is an NVIDIA driver but torch sees no CUDA device: install a CUDA build of torch")
    cache = cache_root()
    probe = cache
    while not probe.exists():
        probe = probe.parent
    writable = probe.is_dir() and os.access(probe, os.W_OK)
    if not writable:
        problems.append(f"the cache directory {cache} is not writable: set ADDLANG_CACHE")
    return {
        "ok": not problems,
        "problems": problems,
        "python": platform.python_version(),
        "packages": found,
        "optional": {name: importlib.util.find_spec(name) is not None for name in OPTIONAL},
        "cpu_threads": os.cpu_count(),
        "gpus": devices,
        "cache": {
            "path": str(cache),
            "writable": writable,
            "free_gib": round(shutil.disk_usage(probe).free / 2**30, 1),
        },
        "hub": hub_state(),
    }


def hub_state() -> str:
    """``offline (switched off)``, ``reachable`` or ``unreachable``."""
    if any(os.environ.get(k, "") not in ("", "0") for k in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")):
        return "offline (HF_HUB_OFFLINE)"
    import urllib.error
    import urllib.request

    from huggingface_hub.constants import ENDPOINT

    try:
        with urllib.request.urlopen(urllib.request.Request(ENDPOINT, method="HEAD"), timeout=3):
            return "reachable"
    except urllib.error.HTTPError:
        return "reachable"
    except (OSError, ValueError):
        return "unreachable: hub ids work only from the local cache"


def show(result: dict[str, Any]) -> None:
    """Print the examination as plain lines."""
    print(f"python        {result['python']}")
    for name, found in result["packages"].items():
        print(f"{name:<13} {found or 'MISSING'}")
    for name, present in result["optional"].items():
        print(f"{name:<13} {'yes' if present else 'no    (' + OPTIONAL[name] + ')'}")
    print(f"cpu threads   {result['cpu_threads']}")
    for gpu in result["gpus"]:
        print(f"gpu           {gpu['name']}, {gpu['memory_gib']} GiB{', bf16' if gpu['bf16'] else ''}")
    if not result["gpus"]:
        print("gpu           none: training runs on the CPU in fp32")
    cache = result["cache"]
    print(
        f"cache         {cache['path']} ({cache['free_gib']} GiB free{'' if cache['writable'] else ', NOT WRITABLE'})"
    )
    print(f"hub           {result['hub']}")
    for problem in result["problems"]:
        print(f"problem: {problem}")
    print("ready" if result["ok"] else "not ready")
