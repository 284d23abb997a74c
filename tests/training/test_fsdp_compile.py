"""torch.compile wraps the model before FSDP2 shards it, so the hooks that gather the weights are on the wrapper."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from training import tiny_llama

from geko_kernels.training.model_loss.found_loss import find_loss_of
from geko_kernels.training.model_loss.own_loss import Route, module_to_call, unwrap_compiled


@pytest.fixture
def mesh(reference, tmp_path):
    """Of one process."""
    torch._dynamo.reset()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_the_loss_is_found_with_the_weights_gathered_and_nothing_compiled(mesh):
    model, calls = tiny_llama(), []

    def backend(graph, inputs):
        calls.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(compiled, mesh=mesh)
    assert isinstance(compiled, FSDPModule) and not isinstance(model, FSDPModule)
    assert all(isinstance(weight, DTensor) for weight in compiled.parameters())
    assert module_to_call(compiled) is compiled and unwrap_compiled(compiled) is model
    labels = torch.randint(0, 16, (2, 6))
    inputs = {"input_ids": labels, "labels": labels, "sample_ids": torch.arange(2)}
    asked = {"shift": None, "takes_num_items": True, "fuse": True}
    found = find_loss_of(
        module_to_call(compiled), model, inputs, "labels", routes=(Route.LOSS_FUNCTION, Route.UNUSED), **asked
    )
    assert found.own and found.form.shift and found.form.route is Route.LOSS_FUNCTION
    assert calls == []
    compiled(**{name: value for name, value in inputs.items() if name != "sample_ids"}).loss.backward()
    assert len(calls) > 0


def test_ddp_is_left_out(mesh):
    model = tiny_llama()
    assert module_to_call(torch.nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager"))) is model
