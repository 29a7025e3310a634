"""Makes a folder in which NVIDIA's libraries have the names that are looked for: libraries.py FOLDER.

The Python packages of CUDA bring them under versioned names (libnccl.so.2) in folders that no loader searches. They go before those of the
system, because they are the ones that PyTorch runs with on the same driver.
"""

import ctypes
import re
import sys
import sysconfig
from pathlib import Path

NAMES = ("nvrtc", "nvrtc-builtins", "cublasLt", "cublas", "nccl", "cuda")
PLACES = ("/usr/local/cuda/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/local/nvidia/lib64")


def driver_major() -> int:
    """The major version of CUDA that the driver is of: it takes nothing that a later one compiled."""
    try:
        version = ctypes.c_int()
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
        return version.value // 1000
    except OSError:
        return sys.maxsize


def major(path: Path) -> int:
    """The major version in a library's name; 0 if it has none."""
    found = re.search(r"\.so\.(\d+)", path.resolve().name)
    return int(found[1]) if found else 0


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    driver = driver_major()
    places = {Path(path) for path in (*sys.path, sysconfig.get_path("purelib"), *PLACES) if path}
    for name in NAMES:
        found = []
        for place in places:
            for pattern in (f"nvidia/*/lib/lib{name}.so*", f"lib{name}.so*"):
                found += place.glob(pattern)
        # NCCL and the driver itself have versions of their own.
        if name not in ("nccl", "cuda"):
            found = [path for path in found if major(path) <= driver]
        if not found:
            print(f"no lib{name}.so")
            continue
        # The longest name has the most of its version.
        library = max(found, key=lambda path: ("nvidia" in path.parts, path.name)).resolve()
        # Every name under which it may be asked for, so that it is loaded once.
        for link in {f"lib{name}.so", *(path.name for path in found)}:
            target = folder / link
            target.unlink(missing_ok=True)
            target.symlink_to(library)
        print(f"lib{name}.so is {library}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
