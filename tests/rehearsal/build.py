"""Compiles the device guard, once for each version of torch, into the temporary folder."""

import fcntl
import getpass
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def environment() -> dict[str, str]:
    """The environment variables of a process with the guard: its path, and for a CUDA build of torch the library to
    load first. Builds what is missing; skips the test if that is not possible."""
    if not sys.platform.startswith("linux") or torch.version.hip:
        pytest.skip("the device guard is for Linux, and for a torch without ROCm")
    cpu_build, torch_at = torch.version.cuda is None, Path(torch.__file__).parent
    lib = torch_at / "lib"
    flags = [f"-DCPU_BUILD={int(cpu_build)}", f"-DTORCH_MINOR={torch.__version__.split('.')[1]}"]
    flags += [f"-I{torch_at / 'include'}", f"-L{lib}", f"-Wl,-rpath,{lib}", "-lc10", "-ltorch_cpu"]
    guard = str(_library("guard", flags))
    if cpu_build:
        return {"NANOFUSE_TORCH": "cpu", "NANOFUSE_GUARD": guard}
    preload = str(_library("preload", ["-Wl,-soname,libcuda.so.1"]))
    return {"NANOFUSE_TORCH": "cuda", "NANOFUSE_GUARD": guard, "LD_PRELOAD": preload}


def _library(name: str, flags: list[str]) -> Path:
    """`name`.cpp as a shared library. All workers of pytest-xdist need it, and one of them compiles it."""
    compiler, source = os.environ.get("CXX", "g++"), HERE / f"{name}.cpp"
    if shutil.which(compiler) is None:
        pytest.skip("no C++ compiler (g++, or what CXX names)")
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", str(source), *flags]
    key = hashlib.sha256("\0".join([torch.__version__, source.read_text(), *command]).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"nanofuse-guard-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{name}-{key}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if not library.exists():
            unfinished = library.with_suffix(".tmp")
            done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
            if done.returncode:
                reason = next((line for line in done.stderr.splitlines() if "error" in line), "no error named")
                pytest.skip(f"{compiler} cannot compile {source.name}: {reason}")
            unfinished.rename(library)
    return library
