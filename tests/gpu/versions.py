"""What the machine is and what is installed on it: versions.py OUT LOCKSTEP. Prints it, and writes OUT/versions.json."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "triton", "nvidia-nccl-cu13", "nvidia-cuda-nvrtc", "nvidia-cublas", "grpcio")
FIELDS = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit,compute_mode,mig.mode.current"


def said(*command: str) -> str:
    """The output of a command, or why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"({error})"
    return (done.stdout.strip() or done.stderr.strip()).removesuffix("\n")


def commit(lockstep: Path) -> str:
    """What the programs were built of: as they were packed with it, or else this repository's."""
    packed = lockstep.parent / "commit"
    return packed.read_text().strip() if packed.exists() else said("git", "describe", "--always", "--abbrev=40", "--dirty")


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main(out: Path, lockstep: str) -> None:
    versions = {
        "gpu": said("nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv,noheader"),
        "lockstep": said(lockstep, "--version"),
        "commit": commit(Path(lockstep)),
        "kernel": platform.release(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "compute-sanitizer": said("compute-sanitizer", "--version"),
        **{package: version(package) for package in PACKAGES},
    }
    (out / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")
    for name, value in versions.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
