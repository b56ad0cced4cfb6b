"""Build muka_fast._C, the C++ kernels of the CPU; the forms for GPUs are Triton and need no build."""

from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

SOURCES = ["csrc/bindings.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
# Vectorised float sums without -ffast-math: NaN and infinity must survive.
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros", "-freciprocal-math"]
FLAGS += ["-g0", "-Wall", "-Wextra", "-fvisibility=hidden"]

ParallelCompile("MUKA_FAST_BUILD_JOBS").install()  # default: every core

setup(
    ext_modules=[
        Pybind11Extension(
            "muka_fast._C",
            SOURCES,
            include_dirs=["csrc"],
            depends=sorted(map(str, Path("csrc").rglob("*.h"))),
            extra_compile_args=FLAGS,
            extra_link_args=["-s", "-pthread"],
            cxx_std=17,
        )
    ]
)
