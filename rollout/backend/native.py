"""The C++ of kernels/, compiled for the machine at hand when it is first needed, and kept."""

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

# -march=native: the library never leaves the machine it was made on. Sums are contracted into fused multiply-adds, in
# the order written; nothing is reordered (no -ffast-math).
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-std=c++17", "-fPIC", "-shared", "-fopenmp")
KERNELS = Path(__file__).with_name("kernels")


@cache
def load_library(name: str) -> ctypes.CDLL | None:
    """The library of kernels/`name`.cpp, or None, with a warning, where there is no compiler to make it.

    Libraries are kept in $XDG_CACHE_HOME/torchrun-rollout (by default ~/.cache/torchrun-rollout), named after all that
    they depend on. The compiler is $CXX, by default g++, which torch.compile takes too. Ranks that compile at the same
    time do not wait for each other: a lock left by a killed job would stop the next one.

    >>> load_library("attention") is load_library("attention")
    True
    """
    source = KERNELS / f"{name}.cpp"
    compiler = os.environ.get("CXX", "g++")
    try:
        library = _cache_folder() / f"{name}-{_fingerprint(source, compiler)}.so"
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                made = Path(folder) / library.name
                subprocess.run([compiler, *FLAGS, str(source), "-o", str(made)], check=True, capture_output=True)
                made.replace(library)  # whole or not at all, whoever else is doing the same
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.CalledProcessError) as error:
        details = error.stderr.decode()[-2000:] if isinstance(error, subprocess.CalledProcessError) else str(error)
        logger.warning(
            "%s could not be compiled with %s: rollouts go on without it, slower. To mend it, install "
            "g++ or set CXX. It said: %s",
            source.name,
            compiler,
            details,
        )
        return None


def _fingerprint(source: Path, compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True).stdout
    cpu = _processor()
    parts = (
        source.read_bytes(),
        (KERNELS / "vectors.h").read_bytes(),
        " ".join(FLAGS).encode(),
        compiler.encode(),
        version,
        cpu,
    )
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> bytes:
    """What the compiler can see of the processor: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model"))})).encode()


def _cache_folder() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "torchrun-rollout"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
