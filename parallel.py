"""Several GPUs behind one torchrun line: each rank holds a copy of the model (DDP) or a shard of it (FSDP2, --fsdp).

Either way batch_size is global and a step is the same to rounding. Gradients travel once a step, on its last micro-batch.
Checkpoints hold whole tensors, so a run may go on with another number of ranks, with or without --fsdp.
"""
import warnings
from contextlib import nullcontext

import torch
import torch.nn as nn


class Objective(nn.Module):
    """The model in a module whose forward() is the loss of a process: what is copied or sharded, and hooked, as a whole."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, process, batch, noise):
        return process.loss(self.model, batch, noise)


def compile_model(model, blockwise):
    """Compile the three parts of the model; blockwise: each block alone, as the hooks of FSDP2 stand between them."""
    if blockwise:
        for block in (*(model.encoder or ()), *model.blocks):
            block.compile()
    else:
        model.encode, model.states, model.logits = map(torch.compile, (model.encode, model.states, model.logits))


def spread(objective, fsdp, world, device):
    """Return the objective as this rank holds it: alone, as one of `world` equal copies, or its share of every tensor.

    A block's weights are gathered when it is run, and let go behind it; so a rank needs room for its share and for one block.
    """
    if world == 1:
        return objective
    if not fsdp:
        return nn.parallel.DistributedDataParallel(objective, device_ids=[device.index] if device.type == "cuda" else None)
    from torch.distributed.device_mesh import init_device_mesh  # half a second that other runs need not wait
    from torch.distributed.fsdp import fully_shard
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # no block's output is changed in place
    mesh = init_device_mesh(device.type, (world,))
    for block in (*(objective.model.encoder or ()), *objective.model.blocks):
        fully_shard(block, mesh=mesh)
    return fully_shard(objective, mesh=mesh)  # the embedding and whatever else is in no block


def synchronised(objective, last):
    """Return a context for the forward and backward pass of a micro-batch: ranks add up their gradients in the last one."""
    if isinstance(objective, nn.parallel.DistributedDataParallel):
        return nullcontext() if last else objective.no_sync()
    if hasattr(objective, "set_requires_gradient_sync"):  # what fully_shard() made of it
        objective.set_requires_gradient_sync(last)
    return nullcontext()


def is_shard(x):
    """Return whether x is a DTensor, known by its method: the import of its class takes half a second, too."""
    return hasattr(x, "full_tensor")


def whole(state, rank=0):
    """Return a tensor, or a dict or list of them, with shards put together: to be called on all ranks.

    Of what was sharded only rank 0 gets tensors, in its CPU memory, and the others None.
    """
    if isinstance(state, dict):
        return {key: whole(value, rank) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole(value, rank) for value in state)
    if not is_shard(state):
        return state
    full = state.full_tensor()
    return full.cpu() if rank == 0 else None


def load_optimizer(optimizer, state):
    """Load the state dict of a checkpoint, whose tensors are whole; a rank of a sharded model takes its share of them."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if is_shard(parameters[0]):
        from torch.distributed.tensor import distribute_tensor
        share = lambda x, p: distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
        state = state | {"state": {i: {key: share(x, parameters[i]) if x.dim() else x for key, x in moments.items()}
                                   for i, moments in state["state"].items()}}
    optimizer.load_state_dict(state)
