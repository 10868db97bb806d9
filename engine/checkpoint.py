"""Checkpoint files, written and read, and GGUF files, read: plain tensors and primitives, nothing that could run code.

A checkpoint is a dict: model (state dict), shape (constructor arguments of the Transformer, and its flavour if that is one of
pretrained/), process (its name and options), tokenizer (name and hash), input_len, target_len, step, config (all flags), data
(a hash of what it was trained on), history (the runs it descends from), commit (of this code), to resume optimizer, and in
best.pt best, the lowest validation loss. The file is a zip archive; the checksum of every tensor is checked when it is read.
"""
import os
import pickle
import subprocess
import warnings
import zipfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from engine.cli import UserError, check
from engine.files import NUMBER, TEXT, fitting, integer, replacing

FORMAT = "ar2diff-6"
WEIGHTS = "tensors of finite numbers by name", lambda found: isinstance(found, dict) and found != {} and all(
    isinstance(name, str) and isinstance(x, torch.Tensor) and x.is_floating_point() and x.isfinite().all()
    for name, x in found.items())
SHAPE = {key: integer(1, 1 << 20) for key in ("vocab_size", "n_layer", "width", "n_head")} | {
    "architecture": TEXT, "vector_width": integer(0, 1 << 20),
    "self_condition": ("true or false", lambda x: type(x) is bool)}
SCHEMA = {"model": WEIGHTS, "shape": SHAPE, "process": {"name": TEXT}, "tokenizer": {"name": TEXT, "hash": TEXT},
          "input_len": integer(0, 1 << 24), "target_len": integer(1, 1 << 24), "step": integer(), "config": {"data": TEXT},
          "data": TEXT, "history": ("a list of strings", lambda x: isinstance(x, list) and {*map(type, x)} <= {str}),
          "best?": NUMBER, "optimizer?": ("an object or None", lambda x: x is None or isinstance(x, dict))}


def save_checkpoint(path, checkpoint):
    """Write a checkpoint file, as files.replacing() does. Raises UserError."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, "wb") as file:
            torch.save({"format": FORMAT, **checkpoint}, file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(f"cannot write {path} ({error}); free some space or write to another folder") from error


def read_plain(file, device="cpu"):
    """Return the tensors and primitives in a file. Raises UserError for a truncated or foreign one; never runs code from it."""
    try:
        damaged = zipfile.ZipFile(file).testzip() if zipfile.is_zipfile(file) else None  # torch.load() checks no sums
        if damaged:
            raise ValueError(f"the checksum of {damaged} is another")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of a foreign pickle before it refuses it
            return torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{file} is refused: it is not plain tensors, and loading it could run code") from error
    except Exception as error:  # damaged bytes raise whatever the reader stumbles over
        reason = f"{type(error).__name__}: {error}".split(". ")[0]
        raise UserError(f"{file} is truncated or no checkpoint ({reason}); use an older one") from error


def read_gguf(path):
    """Return (metadata, {name: what dequantised() takes}) of a GGUF file; no tensor is read yet. Raises UserError."""
    try:
        from gguf import GGUFReader  # llama.cpp's own package; here: only who reads such a file waits for it
        reader = GGUFReader(path)
        return {key: field.contents() for key, field in reader.fields.items()}, {x.name: x for x in reader.tensors}
    except Exception as error:  # a damaged file may be anything
        raise UserError(f"{path} is truncated or no GGUF file, or pip install gguf: {error}") from error


def dequantised(tensor):
    """Return the float32 tensor. Raises UserError for a quantisation that the package cannot undo."""
    from gguf import dequantize
    try:
        return torch.tensor(dequantize(tensor.data, tensor.tensor_type))
    except NotImplementedError as error:
        raise UserError(f"tensor {tensor.name} is of type {tensor.tensor_type.name}, which is not known ({error})") from error


def read_checkpoint(file, device="cpu"):
    """Return the dict in a file of ours. Raises UserError for any other."""
    checkpoint = read_plain(file, device)
    found = str(checkpoint.get("format")) if isinstance(checkpoint, dict) else ""
    check(not found.startswith("ar2diff-") or found == FORMAT,
          f"{file} was written by another version of this project ({found}, not {FORMAT}); train it again, or use that version")
    check(found == FORMAT, f"{file} was not written by this project (no format {FORMAT!r} in it)")
    return checked(file, checkpoint)


def checked(file, checkpoint):
    """Return a checkpoint, of which every part is of its kind. Raises UserError for any other."""
    try:
        return fitting(checkpoint, SCHEMA)
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}") from error


def describe(process):
    """Return a process as primitives: its name and its options, the attention patterns among them."""
    return {"name": process.name, **asdict(process)}


def commit():
    """Return the commit of this code, with a + where files of it were changed since; None where git does not say."""
    where = ["git", "--no-optional-locks", "-C", os.path.dirname(__file__)]  # no lock: a commit at the same time must not fail
    git = lambda *words: subprocess.run([*where, *words], capture_output=True, text=True)
    with suppress(OSError):
        head = git("rev-parse", "--short=12", "HEAD").stdout.strip()
        return head + "+" * bool(git("status", "--porcelain", "-uno").stdout.strip()) or None


def lineage(checkpoint):
    """Return the runs that led to a checkpoint's weights, oldest first, its own last (one just converted has none yet)."""
    data = f"{Path(checkpoint['config']['data']).name} ({checkpoint['data'][:8]})"
    own = f"{checkpoint['process']['name']}, {checkpoint['step']} steps on {data}"
    return checkpoint["history"] + [own] * (checkpoint["step"] > 0)
