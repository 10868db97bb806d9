"""What the demo and the tables share: text without pairs, FLOPs, and processes that start at once."""
import multiprocessing
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from data import synthetic
from engine.cli import UserError, check


def unpaired(task, n_pairs, folder, n=8000):
    """Write the inputs of n training examples behind the first n_pairs, and the targets of n others; return both paths."""
    paths = []
    for i, part in enumerate(("input", "target")):
        first = n_pairs + i * n
        paths.append(Path(folder, f"{task}_{part}s.txt"))
        lines = [synthetic.example(task, 0, "train", k)[part] for k in range(first, first + n)]
        paths[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def flops(shape, n_tokens, logits=True):
    """Return the FLOPs of a forward pass over n_tokens, all inputs or all targets: 2 per weight and token.

    Attention scores, a few %, are left out.
    """
    per_layer = 14 if shape["architecture"] == "encoder-decoder" else 12  # half of cross-attention is paid by either side
    backbone = per_layer * shape["n_layer"] * shape["width"] ** 2
    return 2 * n_tokens * (backbone + (shape["vocab_size"] * shape["width"] if logits else 0))


def training_step_flops(shape, input_len, target_len, passes, vocab_size=4096, architecture="decoder-only"):
    """Return the FLOPs of a training step for one sequence: forward pass x 3; shape: (n_layer, width, n_head)."""
    shape = dict(zip(("n_layer", "width", "n_head"), shape), vocab_size=vocab_size, architecture=architecture)
    return 3 * (flops(shape, input_len, logits=False) + passes * flops(shape, target_len))


def apart(function, *args):
    """Return what a function returns in a process of its own, which goes on if this one is killed. Raises UserError."""
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")  # macOS's Metal wants no fork
    context.set_forkserver_preload(["torch", "sacrebleu"])  # imported once, not for every cell
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=tell, args=(writer, function, args))
    process.start()
    writer.close()
    try:
        fault, value = reader.recv()
    except EOFError:
        fault = "a process ended without a word; was it killed, for want of memory?"
    process.join()
    check(not fault, fault)
    return value


def tell(writer, function, args):
    """Send (fault, value): what a function returns, or why it does not."""
    try:
        told = None, function(*args)
    except BaseException as error:  # whatever it was, it is told where it can be seen
        told = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}", None
        if not isinstance(error, (UserError, KeyboardInterrupt)):
            traceback.print_exc(file=sys.__stderr__)
    with suppress(BrokenPipeError):  # nobody is there any more
        writer.send(told)
