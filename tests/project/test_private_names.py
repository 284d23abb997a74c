"""What geko_kernels relies on inside torch and Triton: in one file each, and as the installed releases have it."""

import ast
import importlib
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint

import geko_kernels as gk
from geko_kernels import torch_private

PACKAGE = Path(torch_private.__file__).parent


def trees(*besides):
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name not in besides:
            yield path.relative_to(PACKAGE), ast.parse(path.read_text())


def private(name):
    return name.startswith("_") and not name.startswith("__")


def modules_of(node):
    """The dotted names that an import binds or reads."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def test_this_torch_has_every_private_name():
    assert not torch_private.missing(), "\n".join(torch_private.missing())


@pytest.mark.skipif(torch.version.cuda is None, reason="a build of torch without CUDA")
def test_this_torch_has_the_private_names_of_cuda_builds():
    assert not torch_private.missing(torch_private.ON_CUDA), "\n".join(torch_private.missing(torch_private.ON_CUDA))


def test_attributes_of_instances_are_where_torch_reads_them():
    module = torch.nn.BatchNorm1d(2)
    mean = torch.ones(2)
    torch_private.set_buffer(module, "running_mean", mean)
    assert module.running_mean is mean, "torch.nn.Module no longer keeps its buffers in _buffers"
    scheduler = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(module.parameters(), 1.0), lambda _: 1.0)
    torch_private.set_last_rates(scheduler, [0.5])
    assert scheduler.get_last_lr() == [0.5], "LRScheduler.get_last_lr no longer reads _last_lr"


def test_a_name_that_torch_dropped_is_told_in_one_sentence():
    told = torch_private.missing({"torch._C._gone": "nothing at all"})
    assert told == [f"torch {torch.__version__} has no torch._C._gone, by which geko_kernels learns nothing at all"]


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_full_graph_is_told_from_others_and_assumed_if_it_does_not_show(fullgraph):
    def function():
        return None

    compiled = torch.compile(function, backend="eager", fullgraph=fullgraph)
    assert torch_private.is_full_graph(compiled) is fullgraph
    assert not torch_private.is_full_graph(torch.compiler.disable(function))
    assert not torch_private.is_full_graph(function) and not torch_private.is_full_graph(None)
    function._torchdynamo_orig_callable = function
    assert torch_private.is_full_graph(function)


REFUSED = {"_current_graph_task_id", "_top_saved_tensors_default_hooks"}  # a guess could count a visit twice
FALL_BACK = [path for path in torch_private.NAMES if path.startswith(("torch._C._", "torch.autograd._", "torch._sub"))]
FALL_BACK = [path for path in FALL_BACK if "TransformType" not in path and "FunctionBase" not in path]


@pytest.mark.parametrize("path", FALL_BACK)
def test_without_a_name_the_loss_is_the_same_or_refused(reference, monkeypatch, path):
    holder, _, name = path.rpartition(".")

    def gradients():
        logits = torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_()
        state = gk.SampleState(3)

        def recomputed(logits):
            return gk.weighted_loss(logits, torch.tensor([0, 3, 1]), torch.arange(3), state)

        loss = torch.utils.checkpoint.checkpoint(recomputed, logits, use_reentrant=False)
        loss.backward()
        hidden, weight = torch.linspace(-1, 1, 6).reshape(3, 2).requires_grad_(), torch.ones(4, 2, requires_grad=True)
        gk.weighted_linear_loss(hidden, weight, torch.tensor([0, 3, 1])).backward()
        return loss.detach(), logits.grad, state.times_seen, hidden.grad, weight.grad

    expected = gradients()
    with monkeypatch.context() as without:
        without.delattr(torch_private.find(holder), name)
        importlib.reload(torch_private)
    try:
        if name in REFUSED:
            with pytest.raises(RuntimeError, match=rf"has no torch\..*{name}, by which .* install a release of torch"):
                gradients()
        else:
            assert all(map(torch.equal, gradients(), expected))
    finally:
        importlib.reload(torch_private)


def test_no_other_file_names_a_private_part_of_torch():
    named = {path.rpartition(".")[2] for path in (*torch_private.NAMES, *torch_private.ON_CUDA)}
    named = {name for name in named if private(name)} | {"_buffers", "_last_lr"}
    found = []
    for path, tree in trees("torch_private.py"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and private(node.attr):
                owner = ast.unparse(node.value)
                if (
                    (node.attr in named and owner != "self")
                    or owner == "torch"
                    or owner.startswith(("torch.", "F.", "dist.", "nn."))
                ):
                    found.append(f"{path}:{node.lineno}: {owner}.{node.attr}")
            for module in modules_of(node):
                if module.startswith("torch.") and any(map(private, module.split("."))):
                    found.append(f"{path}:{node.lineno}: import {module}")
    assert not found, "private names of torch belong into torch_private.py: " + "; ".join(found)


def test_triton_starts_kernels_as_we_know_it():
    pytest.importorskip("triton")
    from geko_kernels.kernels import triton_private

    assert not triton_private.missing(), "\n".join(triton_private.missing())


def test_without_its_internals_triton_starts_every_kernel_itself(monkeypatch):
    pytest.importorskip("triton")
    from geko_kernels.kernels import launch, triton_private

    monkeypatch.setattr(triton_private, "STARTS_WITH", ("grid", "stream", "*args"))
    triton_private.missing.cache_clear()
    (told,) = triton_private.missing()
    assert told.startswith("Triton ") and told.endswith("and geko_kernels knows run(grid, stream, *args)")
    started = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: started.append((grid, arguments, constants)) or object()

    again = launch.Launch(Kernel(), 6, (5,), {"BLOCK": 16}, 4)
    again("x")
    again("y")
    triton_private.missing.cache_clear()
    assert not again.ready
    assert started == [((6, 1, 1), (name, 5), {"BLOCK": 16, "num_warps": 4}) for name in ("x", "y")]


def test_no_other_file_names_an_internal_of_triton():
    public = {"triton", "triton.language"}
    found = [
        f"{path}:{node.lineno}: {module}"
        for path, tree in trees("triton_private.py")
        for node in ast.walk(tree)
        for module in modules_of(node)
        if module.split(".")[0] == "triton" and module not in public
    ]
    names = {"packed_metadata", "knobs", "driver", "CompiledKernel", "launch_enter_hook", "launch_exit_hook"}
    found += [
        f"{path}:{node.lineno}: {ast.unparse(node)}"
        for path, tree in trees("triton_private.py")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and (node.attr in names or ast.unparse(node).startswith("triton.runtime"))
    ]
    assert not found, "internals of Triton belong into kernels/triton_private.py: " + "; ".join(found)
