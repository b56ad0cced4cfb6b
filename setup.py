"""Build muka_fast._C: C++ always, CUDA where nvcc is found (MUKA_FAST_CUDA=0 or 1 forces the choice)."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

CPU_SOURCES = ["csrc/bindings.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
CUDA_SOURCES = sorted(map(str, Path("csrc/cuda").glob("*.cu")))
# Vectorised float sums without -ffast-math: NaN and infinity must survive.
CPU_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros", "-freciprocal-math"]
COMMON_FLAGS = ["-g0", "-Wall", "-Wextra", "-fvisibility=hidden"]
# Machine code for A100, H100/H200 and B200; PTX of the first and the last for every card between and after.
CUDA_ARCHS = ["arch=compute_80,code=[sm_80,compute_80]", "arch=compute_90,code=sm_90", "arch=compute_100,code=[sm_100,compute_100]"]


def find_nvcc():
    """The nvcc to use, or None; MUKA_FAST_CUDA=1 without one ends the build."""
    choice = os.environ.get("MUKA_FAST_CUDA", "auto")
    if choice == "0" or not CUDA_SOURCES:
        return None
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None and choice == "1":
        sys.exit("MUKA_FAST_CUDA=1, but nvcc is not on PATH: install the CUDA toolkit or unset MUKA_FAST_CUDA")
    return nvcc


def cudart_folder(nvcc):
    """Folder of libcudart_static.a. nvcc on PATH may be a wrapper, so it is asked where its toolkit lies."""
    dryrun = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull], capture_output=True, text=True, check=True
    )
    top = Path(re.search(r"^#\$ TOP=(.*)$", dryrun.stderr, re.MULTILINE)[1])
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (top / folder / "libcudart_static.a").exists():
            return str(top / folder)
    sys.exit(f"nvcc was found at {nvcc}, but no libcudart_static.a under {top}: install it or set MUKA_FAST_CUDA=0")


class BuildExtension(build_ext):
    """Compiles csrc/cuda with nvcc and links the objects into the one extension."""

    def build_extension(self, ext):
        nvcc = find_nvcc()
        print(f"muka_fast._C: CUDA {'with ' + nvcc if nvcc else 'left out'}", flush=True)
        if nvcc:
            ext.define_macros.append(("MUKA_FAST_CUDA", "1"))
            ext.extra_objects = [self.compile_cuda(nvcc, source) for source in CUDA_SOURCES]
            ext.library_dirs.append(cudart_folder(nvcc))
            ext.libraries += ["cudart_static", "rt", "dl", "pthread"]
        super().build_extension(ext)

    def compile_cuda(self, nvcc, source):
        out = Path(self.build_temp) / (Path(source).stem + ".cu.o")
        out.parent.mkdir(parents=True, exist_ok=True)
        flags = ["-O3", "-std=c++17", "-cudart=static", "-Icsrc", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "0"]
        archs = [f"-gencode={arch}" for arch in CUDA_ARCHS]
        self.spawn([nvcc, *flags, *archs, "-c", source, "-o", str(out)])
        return str(out)


setup(
    ext_modules=[
        Pybind11Extension(
            "muka_fast._C",
            CPU_SOURCES,
            include_dirs=["csrc"],
            depends=[*map(str, Path("csrc").rglob("*.h")), *CUDA_SOURCES],
            extra_compile_args=CPU_FLAGS + COMMON_FLAGS,
            extra_link_args=["-s", "-pthread"],
            cxx_std=17,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
