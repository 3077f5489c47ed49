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

import torch

HERE = Path(__file__).parent


class CannotBuild(Exception):
    """Why there is no device guard on this machine, in one line."""


def environment() -> dict[str, str]:
    """The environment variables of a process with the guard: its path, and for a CUDA build of torch the library to
    load first. Builds what is missing; CannotBuild if that is not possible."""
    if not sys.platform.startswith("linux"):
        raise CannotBuild(f"the device guard is for Linux, this is {sys.platform}")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise CannotBuild("no C++ compiler (g++, or what CXX names)")
    cpu_build = torch.version.cuda is None
    if torch.version.hip:
        raise CannotBuild("this torch is built for ROCm")
    guard = str(_library(compiler, "guard", _torch_flags(cpu_build)))
    if cpu_build:
        return {"NANOFUSE_TORCH": "cpu", "NANOFUSE_GUARD": guard}
    preload = str(_library(compiler, "preload", ["-Wl,-soname,libcuda.so.1"]))
    return {"NANOFUSE_TORCH": "cuda", "NANOFUSE_GUARD": guard, "LD_PRELOAD": preload}


def _torch_flags(cpu_build: bool) -> list[str]:
    root = Path(torch.__file__).parent
    return [
        f"-DCPU_BUILD={int(cpu_build)}",
        f"-DTORCH_MINOR={torch.__version__.split('.')[1]}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-I{root / 'include'}",
        f"-I{root / 'include/torch/csrc/api/include'}",
        f"-L{root / 'lib'}",
        f"-Wl,-rpath,{root / 'lib'}",
        "-lc10",
        "-ltorch_cpu",
    ]


def _library(compiler: str, name: str, flags: list[str]) -> Path:
    """`name`.cpp as a shared library. All workers of pytest-xdist need it, and one of them compiles it."""
    source = HERE / f"{name}.cpp"
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
                raise CannotBuild(f"{compiler} cannot compile {source.name}: {reason}")
            unfinished.rename(library)
    return library
