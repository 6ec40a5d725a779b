"""Install a torch that suits this machine into the environment of the running Python.

- A torch >= 2.6 that is already there stays.
- With an NVIDIA GPU: the default build (on Linux a CUDA build).
- Without one: a build that needs no CUDA packages. Where the configured package index offers such a build of the tested
  version (macOS, Windows, or an index with CPU wheels) pip takes it; elsewhere uv knows where PyTorch keeps its CPU wheels.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys

TESTED = "torch==2.13.0"
RANGE = "torch>=2.6"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def main() -> None:
    if importlib.util.find_spec("torch") is not None:
        return
    if has_gpu():
        run([*PIP, "install", "--quiet", RANGE])
    elif needs_cuda_packages(TESTED):
        run([*PIP, "install", "--quiet", "uv"])
        run(
            [
                sys.executable,
                "-m",
                "uv",
                "pip",
                "install",
                "--quiet",
                "--python",
                sys.executable,
                "--torch-backend",
                "cpu",
                RANGE,
            ]
        )
    else:
        run([*PIP, "install", "--quiet", TESTED])


def has_gpu() -> bool:
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True, check=False).stdout.startswith(b"GPU")


def needs_cuda_packages(requirement: str) -> bool:
    """Whether pip would bring CUDA packages along; resolves, downloads at most torch itself, installs nothing."""
    done = subprocess.run(
        [*PIP, "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-", requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"error: pip cannot resolve {requirement}\n{done.stderr.strip()}")
    names = [item["metadata"]["name"].lower() for item in json.loads(done.stdout)["install"]]
    return any(name.startswith(("nvidia-", "cuda-", "triton")) for name in names)


def run(command: list[str]) -> None:
    print("$", " ".join(command), flush=True)
    if subprocess.run(command, check=False).returncode:
        sys.exit(
            f"error: '{' '.join(command)}' failed\n  fix: install torch >= 2.6 into this environment yourself, then run the same command again"
        )


if __name__ == "__main__":
    main()
