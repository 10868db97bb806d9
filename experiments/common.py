"""What the scripts of this folder share: data that is prepared where it is missing, and FLOPs."""
from data import prepare, synthetic
from data.dataset import find_folder, read_meta
from engine.cli import check
from pretrained.loading import load_checkpoint, process_of


def prepared_task(task, allow_code_execution):
    """Return (input_len, target_len) of a prepared task; one of the embedded ones is prepared first. Raises UserError."""
    if task in synthetic.TASKS and find_folder(task) is None:
        prepare.main([task])
    path, meta = read_meta(task)
    check(meta["kind"] == "task", f"{path} holds text, not a task")
    check(meta.get("metric") != "code" or allow_code_execution,
          f"{task}: scoring it means running programs that a model wrote; read the top of scoring/sandbox.py, then say "
          f"--allow_code_execution")
    return meta.get("input_len", 64), meta.get("target_len", 64)


def prepared_text(text, out):
    """Return the folder of the text to pretrain on: `text`, or mostly Python source in a new folder, as in demo.py."""
    if text is None:
        prepare.main(["text", "--sources=stdlib:docs:0.2,stdlib:code:0.8", f"--out={out}/text"])
    return text or f"{out}/text"


def flops(shape, n_tokens, logits=True):
    """Return the FLOPs of a forward pass over n_tokens, all inputs or all targets: 2 per weight and token.

    Attention scores, a few %, are left out.
    """
    per_layer = 14 if shape["architecture"] == "encoder-decoder" else 12  # half of cross-attention is paid by either side
    backbone = per_layer * shape["n_layer"] * shape["width"] ** 2
    return 2 * n_tokens * (backbone + (shape["vocab_size"] * shape["width"] if logits else 0))


def training_flops(paths):
    """Return the FLOPs of training the runs that led to a model, each counted as forward pass x 3."""
    total = 0
    for path in paths:
        c = load_checkpoint(path)
        process = process_of(c)
        passes = process.n_unroll if process.name == "uniform" else 1
        per_sequence = flops(c["shape"], c["input_len"], logits=False) + passes * flops(c["shape"], c["target_len"])
        total += 3 * per_sequence * c["config"]["batch_size"] * c["step"]
    return total
