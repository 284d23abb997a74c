"""Every internal of Triton that geko_kernels uses: how a compiled kernel starts without inspecting its arguments.

No other file of the package uses one. If the installed Triton starts its kernels in another way, `start_of` returns
None, and each launch is `kernel[grid](...)`, which is correct but takes more CPU time.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any, NamedTuple

import triton

try:
    from triton import knobs
    from triton.compiler import CompiledKernel
    from triton.runtime import driver
except ImportError:  # `missing` says so
    knobs = CompiledKernel = driver = None

# what a `CompiledKernel`, asked by `binary[grid]`, passes to its `run`
STARTS_WITH = (
    "grid[0]",
    "grid[1]",
    "grid[2]",
    "stream",
    "self.function",
    "self.packed_metadata",
    "launch_metadata",
    "knobs.runtime.launch_enter_hook",
    "knobs.runtime.launch_exit_hook",
    "*args",
)


class Start(NamedTuple):
    """How one binary starts: `run(*grid, stream_of(device), *about, *arguments)`, without metadata and hooks."""

    run: Any
    stream_of: Any
    device: int
    about: tuple[Any, ...]


@functools.cache
def missing() -> list[str]:
    """One sentence for each internal that the installed Triton lacks or has changed."""
    says = f"Triton {triton.__version__}"
    absent = [
        f"{says} has no {name}, by which geko_kernels {why}"
        for holder, name, why in (
            (triton, "knobs", "learns whether a profiler watches launches"),
            (getattr(knobs, "runtime", None), "launch_enter_hook", "learns whether a profiler watches launches"),
            (getattr(knobs, "runtime", None), "launch_exit_hook", "learns whether a profiler watches launches"),
            (driver, "active", "learns the device and its stream"),
        )
        if name not in dir(holder)  # reading `driver.active` would need a device
    ]
    found = _run_arguments()
    if found != STARTS_WITH:
        absent.append(
            f"{says} starts a compiled kernel by run({', '.join(found)}), and geko_kernels knows "
            f"run({', '.join(STARTS_WITH)})"
        )
    return absent


def _run_arguments() -> tuple[str, ...]:
    """What `CompiledKernel.__getitem__` passes to `self.run`; () if its source cannot be read."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(CompiledKernel.__getitem__)))
    except (AttributeError, OSError, SyntaxError, TypeError):
        return ()
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.run"]
    return tuple(ast.unparse(argument) for argument in calls[0].args) if len(calls) == 1 else ()


def start_of(binary: Any) -> Start | None:
    """How `binary` starts on the current device; None if unknown, as under the interpreter."""
    if binary is None or missing():
        return None
    about = (binary.function, binary.packed_metadata, None, None, None)
    return Start(binary.run, driver.active.get_current_stream, driver.active.get_current_device(), about)


def watched() -> bool:
    """Whether a profiler (Proton) has hooks on launches; calling empty chains of hooks would cost time."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
