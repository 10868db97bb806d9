"""One writer and one reader of checkpoints: plain tensors and primitives, nothing that could run code when loaded.

A checkpoint holds: model (state dict), shape (constructor arguments of the Transformer, and its flavour if that is gpt2.py's),
process (its name and options), tokenizer (name and hash), input_len, target_len, step, config (all flags), history (the runs it
descends from); and, to resume, optimizer and best (the lowest validation loss so far). A file of GPT-2's weights is read as
such a checkpoint, too.
"""
import os
import pickle
import warnings
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from autoregressive import Autoregressive
from config import UserError, check
from data.tokenizer import load_tokenizer
from diffusion import PROCESSES
from gpt2 import GPT2, PUBLISHED, WEIGHTS, fetch_weights, import_weights
from model import Transformer

FORMAT = "ar2diff-3"
FLAVOURS = {"ar2diff": Transformer, "gpt2": GPT2}


def save_checkpoint(path, checkpoint):
    """Write to a temporary file, flush it to the disk, rename: killed at any time, `path` is the old file or the new one."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            torch.save({"format": FORMAT, **checkpoint}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with suppress(OSError):  # a parent that is a file, say
            partial.unlink()
        raise UserError(f"cannot write {path} ({error}); free some space or write to another folder") from error


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
    """Return the checkpoint's dict. Raises UserError for a missing, truncated or foreign file; never runs code from it.

    tokenizer: the name of the one that a file of GPT-2's weights goes with; every other checkpoint knows its own.
    """
    file = find_checkpoint(path)
    if file.suffix == ".safetensors":
        return {"format": FORMAT} | import_weights(file, tokenizer)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of a foreign pickle before it refuses it
            checkpoint = torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{file} is refused: it is not plain tensors, and loading it could run code") from error
    except Exception as error:  # damaged bytes raise whatever the reader stumbles over
        reason = f"{type(error).__name__}: {error}".split(". ")[0]
        raise UserError(f"{file} is truncated or no checkpoint ({reason}); use an older one") from error
    found = str(checkpoint.get("format")) if isinstance(checkpoint, dict) else ""
    check(not found.startswith("ar2diff-") or found == FORMAT,
          f"{file} was written by another version of this project ({found}, not {FORMAT}); train it again, or use that version")
    check(found == FORMAT, f"{file} was not written by this project (no format {FORMAT!r} in it)")
    return checkpoint


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


PROCESS_CLASSES = {cls.name: cls for cls in (Autoregressive, *PROCESSES.values())}


def describe(process):
    """Return a process as primitives: its name and its options, the attention pattern of the inputs among them."""
    return {"name": process.name, **asdict(process)}


def lineage(checkpoint):
    """Return the runs that led to a checkpoint's weights, oldest first, its own last (one just converted has none yet)."""
    own = f"{checkpoint['process']['name']}, {checkpoint['step']} steps on {checkpoint['config']['data']}"
    return checkpoint["history"] + [own] * (checkpoint["step"] > 0)


def process_of(checkpoint):
    """Return the process (an Autoregressive or one of diffusion.py) that a checkpoint was trained with."""
    options = dict(checkpoint["process"])
    return PROCESS_CLASSES[options.pop("name")](**options)
