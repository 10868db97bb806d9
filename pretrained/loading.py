"""From a checkpoint, ours or published, to what it is of: a model, a process, a tokenizer."""
from pathlib import Path

from autoregressive import Autoregressive
from data.tokenizer import load_tokenizer
from diffusion import PROCESSES
from engine.checkpoint import FORMAT, read_checkpoint
from engine.cli import UserError, check
from model import Transformer
from pretrained.gpt2 import GPT2, PUBLISHED, WEIGHTS, fetch_weights, import_weights

FLAVOURS = {"ar2diff": Transformer, "gpt2": GPT2}


def find_checkpoint(path):
    """Return the file: `path` itself, ckpt.pt or model.safetensors in it, or that of a published GPT-2, fetched if need be."""
    if str(path) in PUBLISHED and not Path(path).exists():
        return fetch_weights(str(path))
    path = Path(path)
    file = path / "ckpt.pt" if path.is_dir() else path
    if not file.exists() and (path / WEIGHTS).is_file():
        return path / WEIGHTS
    check(file.is_file(), f"no checkpoint at {file}; give the .pt file or the out_dir of a run, or {', '.join(PUBLISHED)}")
    return file


def load_checkpoint(path, device="cpu", tokenizer=None):
    """Return the checkpoint's dict. Raises UserError for a missing, truncated or foreign file.

    tokenizer: the name of the one that a file of GPT-2's weights goes with; every other checkpoint knows its own.
    """
    file = find_checkpoint(path)
    if file.suffix == ".safetensors":
        return {"format": FORMAT} | import_weights(file, tokenizer)
    return read_checkpoint(file, device)


def build_model(checkpoint, device="cpu", dropout=0.0):
    """Return the Transformer of a checkpoint with its weights; strict: a missing, extra or misshapen tensor is a UserError."""
    model = model_of(checkpoint["shape"], dropout)
    try:
        model.load_state_dict(checkpoint["model"], strict=True)
    except RuntimeError as error:
        raise UserError("the checkpoint's tensors do not fit its model: " + " ".join(str(error).split())) from error
    return model.to(device)


def model_of(shape, dropout=0.0):
    """Return a Transformer of this shape, of the flavour that it names."""
    shape = dict(shape)
    return FLAVOURS[shape.pop("flavour", "ar2diff")](**shape, dropout=dropout)


def tokenizer_of(checkpoint):
    """Return the tokenizer a checkpoint was trained with, checked by its hash: other ids would make every output noise."""
    name, digest = checkpoint["tokenizer"]["name"], checkpoint["tokenizer"]["hash"]
    tokenizer = load_tokenizer(name)
    check(tokenizer.hash == digest,
          f"tokenizer mismatch: the checkpoint was trained with {name!r} of hash {digest}, here {name!r} has {tokenizer.hash}")
    return tokenizer


def process_of(checkpoint):
    """Return the process (an Autoregressive or one of diffusion.py) that a checkpoint was trained with."""
    options, name = dict(checkpoint["process"]), checkpoint["process"]["name"]
    del options["name"]
    check(name == "ar" or name in PROCESSES, f"this is a checkpoint of the process {name!r}, which is not in diffusion.py")
    return (Autoregressive if name == "ar" else PROCESSES[name])(**options)
