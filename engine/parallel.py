"""Several GPUs behind one torchrun line: each rank holds a copy of the model (DDP) or a shard of it (FSDP2, --fsdp).

Either way batch_size is global and a step is the same to rounding. Copies add up their gradients once a step, on its last
micro-batch; shards after every one, as whole gradients would have to be kept in between. Checkpoints hold whole tensors, so a
run may go on with another number of ranks, with or without --fsdp.
"""
import warnings
from contextlib import nullcontext

import torch
import torch.nn as nn

from engine.cli import check
from engine.devices import choose_compile, choose_dtype


class LossModule(nn.Module):
    """The model in a module whose forward() is the loss of a process: what is copied or sharded, and hooked, as a whole."""

    def __init__(self, model, token_loss):
        super().__init__()
        self.model, self.token_loss = model, token_loss

    def forward(self, process, batch, rng):
        return process.loss(self.model, batch, rng, self.token_loss)


def prepare(model, token_loss, config, world, device):
    """Return (LossModule, autocast context, dtype) of a training run. Raises UserError for what this machine lacks."""
    dtype, compiled = choose_dtype(config.dtype, device, model.shape["width"]), choose_compile(config.compile, device)
    if compiled:
        compile_model(model, blockwise=config.fsdp)
        token_loss = torch.compile(token_loss)
    loss_module = spread(LossModule(model, token_loss), config.fsdp, world, device, dtype)
    return loss_module, torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16), dtype


def compile_model(model, blockwise=False, dynamic=None):
    """Compile the three parts of the model; blockwise: each block alone, as the hooks of FSDP2 stand between them."""
    if blockwise:
        for block in (*(model.encoder or ()), *model.blocks):
            block.compile(dynamic=dynamic)
    else:
        for name in ("encode", "states", "logits"):
            setattr(model, name, torch.compile(getattr(model, name), dynamic=dynamic))


def spread(loss_module, fsdp, world, device, dtype):
    """Return the LossModule as this rank holds it: alone, as one of `world` equal copies, or its share of every tensor.

    A block's weights are gathered when it is run, and let go behind it; on a GPU in the dtype of the products, as what autocast
    made of them would stay for the backward pass. On a CPU they stay float32, which LayerNorm (gpt2.py) needs there.
    """
    if world == 1:
        return loss_module
    if not fsdp:
        return nn.parallel.DistributedDataParallel(loss_module, device_ids=[device.index] if device.type == "cuda" else None)
    from torch.distributed.device_mesh import init_device_mesh  # half a second that other runs need not wait
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # no block's output is changed in place
    mesh, model = init_device_mesh(device.type, (world,)), loss_module.model
    policy = MixedPrecisionPolicy(None if device.type == "cpu" else dtype, torch.float32, cast_forward_inputs=False)
    for block in model.blocks if model.encoder else ():  # its keys_values() is called from outside of the block
        fully_shard(block.cross, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(block.cross, "keys_values")
    for block in (*(model.encoder or ()), *model.blocks):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(loss_module, mesh=mesh)  # the embedding and whatever else is in no block


def synchronised(loss_module, last):
    """Return a context for the forward and backward pass of a micro-batch: copies add up their gradients in the last one."""
    is_copy = isinstance(loss_module, nn.parallel.DistributedDataParallel)
    return loss_module.no_sync() if is_copy and not last else nullcontext()


def agreed(caught, world, device):
    """Return the highest number that any rank has, of a signal that it caught, say; 0 for none. All ranks must ask together."""
    number = int(max(caught, default=0))
    if world == 1:
        return number
    highest = torch.tensor(number, device=device)
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
    return int(highest)


def whole(state, rank=0):
    """Return a state with shards put together: to be called on all ranks, of which only rank 0 gets them, on its CPU."""
    if isinstance(state, dict):
        return {key: whole(value, rank) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole(value, rank) for value in state)
    if not hasattr(state, "full_tensor"):  # of a DTensor, whose class takes half a second to import
        return state
    full = state.full_tensor()
    return full.cpu() if rank == 0 else None


def load_optimizer(optimizer, state):
    """Load the state dict of a checkpoint, whose tensors are whole; a rank of a sharded model takes its share of them."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:  # PyTorch would take moments of any shape, and crash at the first step
        found = [(state["state"][i][key], p.shape if key != "step" else ()) for i, p in enumerate(parameters)
                 for key in ("step", "exp_avg", "exp_avg_sq")]
        fit = all(x.is_floating_point() and x.isfinite().all() and x.shape == shape for x, shape in found)
    except (KeyError, TypeError, AttributeError):
        fit = False
    check(fit, "the optimizer's moments in ckpt.pt do not fit its weights; start from it with --init_from instead")
    state = {"state": state["state"], "param_groups": optimizer.state_dict()["param_groups"]}  # as the flags say, as before
    if hasattr(parameters[0], "full_tensor"):
        from torch.distributed.tensor import distribute_tensor
        share = lambda x, p: distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
        state["state"] = {i: {key: share(x, p) if x.dim() else x for key, x in state["state"][i].items()}
                          for i, p in enumerate(parameters)}
    optimizer.load_state_dict(state)
