"""Build the C++ of the CPU with AddressSanitizer and UBSan, and run random calls of its ops, most of them hostile.

    python tests/helpers/sanitize.py [--calls 20000] [--seed 0] [--capability avx512|avx2|portable]

Needs GCC with libasan and libubsan, and what setup.py needs. Builds into build/sanitize (a minute, once), starts itself
anew under LD_PRELOAD, and ends with one line; a finding is printed by the sanitizer and ends the run with an error.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "sanitize"
CHECKS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def build() -> Path:
    """The extension with the sanitizers in it."""
    import torch
    from torch.utils import cpp_extension

    target = BUILD / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = sorted(ROOT.glob("csrc/cpu/**/*.cpp"))
    newest = max(path.stat().st_mtime for path in ROOT.glob("csrc/**/*.*"))
    if target.exists() and target.stat().st_mtime > newest:
        return target
    BUILD.mkdir(parents=True, exist_ok=True)
    includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"], str(ROOT)]
    flags = [*CHECKS, "-O1", "-g", "-std=c++20", "-fPIC", "-ffp-contract=off", "-w"]
    flags += [f'-DGEKO_BUILD_TORCH="{torch.__version__}"', "-DTORCH_EXTENSION_NAME=_C", *(f"-I{x}" for x in includes)]
    objects = [str(BUILD / source.with_suffix(".o").name) for source in sources]
    compiler = os.environ.get("CXX", "g++")
    for source, item in zip(sources, objects, strict=True):
        subprocess.run([compiler, *flags, "-c", str(source), "-o", item], check=True)
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([compiler, *CHECKS, "-shared", *objects, *libraries, "-o", str(target)], check=True)
    return target


def runtime(name: str) -> str:
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def calls(extension: str, count: int, seed: int) -> None:
    """Run under the sanitizers: the module at `extension` takes the place of the installed one."""
    import torch

    spec = importlib.util.spec_from_file_location("geko_kernels._C", extension)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["geko_kernels._C"] = module
    spec.loader.exec_module(module)
    from native_calls import Calls

    import geko_kernels
    from geko_kernels import cpu as cpp

    geko_kernels._C = module
    torch.set_num_threads(2)
    random, taken = Calls(seed), collections.Counter()
    for _ in range(count):
        taken[random.run(cpp)] += 1
    for name in sorted({name for name, _ in taken}):
        print(f"{name}: {taken[name, True]} taken, {taken[name, False]} refused")
    print(f"clean: {count} calls, seed {seed}, {cpp.cpu_capability()} kernels, no finding")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--capability", choices=("avx512", "avx2", "portable"))
    parser.add_argument("--extension", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.extension:
        calls(arguments.extension, arguments.calls, arguments.seed)
        return 0
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')} {runtime('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    if arguments.capability:
        environment["GEKO_CPU_CAPABILITY"] = arguments.capability
    again = [sys.executable, __file__, "--extension", str(build()), "--calls", str(arguments.calls)]
    return subprocess.run([*again, "--seed", str(arguments.seed)], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
