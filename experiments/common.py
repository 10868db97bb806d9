"""What reading tokens costs, in FLOPs, and processes that start at once."""
import multiprocessing
import sys
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor

from engine.cli import UserError


def flops(shape, n_tokens, logits=True):
    """Return the FLOPs of a forward pass over n_tokens, all inputs or all targets: 2 per weight and token.

    Attention scores, a few %, are left out.
    """
    per_layer = 14 if shape["architecture"] == "encoder-decoder" else 12  # half of cross-attention is paid by either side
    backbone = per_layer * shape["n_layer"] * shape["width"] ** 2
    return 2 * n_tokens * (backbone + (shape["vocab_size"] * shape["width"] if logits else 0))


def apart(function, *args):
    """Return what a function returns in a process of its own, which goes on if this one is killed; UserError if it dies."""
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")  # macOS's Metal wants no fork
    context.set_forkserver_preload(["torch", "torch._dynamo", "sacrebleu"])  # imported once, not for every cell
    try:
        with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
            return pool.submit(function, *args).result()
    except BrokenExecutor as error:
        raise UserError("a process ended without a word; was it killed, for want of memory?") from error
