"""Builds csrc/: `geko_kernels._C`, the CPU kernels, and `_hopper`, the CUDA kernels; the rest is in pyproject.toml.

Without torch at build time, or where the build fails (no C++ compiler), the package installs without `_C` and uses its
plain PyTorch reference, which is right but slow; without nvcc it installs without `_hopper`, and Triton does its work.
A wheel that holds `_C` is for one version of Python, as pybind11's module is, and one platform; one without any
compiled code is for all. MANIFEST.in names the sources, so that an sdist made without torch holds them too.
"""

import os
import shutil
import subprocess
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
HOPPER = "geko_kernels._hopper"
HOPPER_SOURCE = "csrc/hopper/library.cu"
NVCC_FLAGS = ["-gencode=arch=compute_90,code=sm_90", "-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-I."]


class WheelOfWhatWasBuilt(bdist_wheel):
    """Takes the wheel's tag from what the build left, not from what it set out to build."""

    def run_command(self, command):
        super().run_command(command)
        if command == "build":
            self.root_is_pure = not self.distribution.has_ext_modules()


def find_nvcc():
    """The compiler in CUDA_HOME or on the path; None where there is none."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=os.path.join(home, "bin")) or shutil.which("nvcc")


def hopper_extension():
    """A plain C library that `hopper.py` loads, no Python module: nothing of Python or torch goes in."""
    return Extension(HOPPER, [], depends=[*map(str, ROOT.glob("csrc/hopper/*"))], optional=True)


def cpu_extension(cpp_extension, torch_version):
    """`geko_kernels._C`, against the stable ABI of LibTorch 2.11: one binary for that torch and later ones."""
    return cpp_extension.CppExtension(
        "geko_kernels._C",
        sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/**/*.cpp")),
        include_dirs=[str(ROOT)],
        depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h")),
        define_macros=[("GEKO_BUILD_TORCH", f'"{torch_version}"')],
        extra_compile_args=[
            *("-O3", "-g0", "-fvisibility=hidden"),
            "-ffp-contract=off",  # visit.h has to round as the reference does; the row kernels ask for fma by name
            *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # GCC 12 warns of its own AVX-512 header
        ],
    )


def build_settings():
    """What `setup` builds: nothing where torch is missing."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        warnings.warn(
            "geko_kernels: no torch at build time, so this is the pure Python package, right but slow on the CPU; with "
            "torch installed, `pip install --no-build-isolation --no-cache-dir` builds the C++ kernels",
            stacklevel=2,
        )
        return {}

    class BuildOrSkip(cpp_extension.BuildExtension):
        """Builds with ninja; a failure is a warning, not the end of the install."""

        def build_extension(self, ext):
            if ext.name != HOPPER:
                return super().build_extension(ext)
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            done = subprocess.run([find_nvcc(), *NVCC_FLAGS, HOPPER_SOURCE, "-o", target], cwd=ROOT)
            if done.returncode:
                raise CompileError("nvcc failed")

        def run(self):
            try:
                super().run()
            except Exception as error:
                warnings.warn(
                    "geko_kernels: the C++ kernels did not build and are left out, so this is the pure Python package, "
                    f"right but slow on the CPU: {error}",
                    stacklevel=2,
                )
                if not self.inplace:  # what an earlier build left must not go into this wheel
                    for extension in self.extensions:
                        Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
                self.extensions = self.distribution.ext_modules = []

    return {
        "ext_modules": [
            cpu_extension(cpp_extension, torch.__version__),
            *([hopper_extension()] if find_nvcc() else []),
        ],
        "cmdclass": {"build_ext": BuildOrSkip, "bdist_wheel": WheelOfWhatWasBuilt},
    }


setup(**build_settings())
