"""One writer and one reader of checkpoint files: plain tensors and primitives, nothing that could run code when loaded.

A checkpoint is a dict: model (state dict), shape (constructor arguments of the Transformer, and its flavour if that is one of
pretrained/), process (its name and options), tokenizer (name and hash), input_len, target_len, step, config (all flags),
history (the runs it descends from), commit (of this code); and, to resume, optimizer and best (the lowest validation loss so
far). What is built from it: pretrained/loading.py.
"""
import os
import pickle
import subprocess
import warnings
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from engine.cli import UserError, check

FORMAT = "ar2diff-4"


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


def read_plain(file, device="cpu"):
    """Return the tensors and primitives in a file. Raises UserError for a truncated or foreign one; never runs code from it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of a foreign pickle before it refuses it
            return torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{file} is refused: it is not plain tensors, and loading it could run code") from error
    except Exception as error:  # damaged bytes raise whatever the reader stumbles over
        reason = f"{type(error).__name__}: {error}".split(". ")[0]
        raise UserError(f"{file} is truncated or no checkpoint ({reason}); use an older one") from error


def read_checkpoint(file, device="cpu"):
    """Return the dict in a file of ours. Raises UserError for any other."""
    checkpoint = read_plain(file, device)
    found = str(checkpoint.get("format")) if isinstance(checkpoint, dict) else ""
    check(not found.startswith("ar2diff-") or found == FORMAT,
          f"{file} was written by another version of this project ({found}, not {FORMAT}); train it again, or use that version")
    check(found == FORMAT, f"{file} was not written by this project (no format {FORMAT!r} in it)")
    return checkpoint


def describe(process):
    """Return a process as primitives: its name and its options, the attention patterns among them."""
    return {"name": process.name, **asdict(process)}


def commit():
    """Return the commit of this code, with a + where files of it were changed since; None where git does not say."""
    git = lambda *words: subprocess.run(["git", "-C", os.path.dirname(__file__), *words], capture_output=True, text=True)
    with suppress(OSError):
        head = git("rev-parse", "--short=12", "HEAD").stdout.strip()
        return head + "+" * bool(git("status", "--porcelain", "-uno").stdout.strip()) or None


def lineage(checkpoint):
    """Return the runs that led to a checkpoint's weights, oldest first, its own last (one just converted has none yet)."""
    own = f"{checkpoint['process']['name']}, {checkpoint['step']} steps on {checkpoint['config']['data']}"
    return checkpoint["history"] + [own] * (checkpoint["step"] > 0)
