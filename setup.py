"""Builds `geko_kernels._C`, the CPU kernels in csrc/; everything else is in pyproject.toml.

Without torch at build time, or where the build fails (no C++ compiler), the package installs without the extension
and uses its plain PyTorch reference, which is right but slow.
"""

import warnings
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def cpu_extension(cpp_extension, torch_version):
    """`geko_kernels._C`, against the stable ABI of LibTorch 2.11: one binary for that torch and later ones."""
    return cpp_extension.CppExtension(
        "geko_kernels._C",
        sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/*.cpp")),
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
        warnings.warn("geko_kernels: no torch at build time, the C++ kernels are left out", stacklevel=2)
        return {}

    class BuildOrSkip(cpp_extension.BuildExtension):
        """Builds with ninja; a failure is a warning, not the end of the install."""

        def run(self):
            try:
                super().run()
            except Exception as error:
                warnings.warn(f"geko_kernels: the C++ kernels did not build and are left out: {error}", stacklevel=2)
                self.extensions = self.distribution.ext_modules = []

    return {
        "ext_modules": [cpu_extension(cpp_extension, torch.__version__)],
        "cmdclass": {"build_ext": BuildOrSkip},
    }


setup(**build_settings())
