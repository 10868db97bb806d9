"""Reader of GGUF files (github.com/ggml-org/ggml, docs/gguf.md), llama.cpp's format: metadata, and tensors as float32."""
import math
import struct

import numpy as np
import torch

from engine.cli import UserError, check

SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # type of a value -> struct's code; 8 is text, 9 a list
FORMATS = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34)}  # values, bytes


def read_gguf(path):
    """Return (metadata, {name: what dequantised() takes}); only the header is read yet. Raises UserError with the reason."""
    try:
        data = memoryview(np.memmap(path, np.uint8, mode="r"))
        meta, infos, start = _header(data)
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, struct.error) as error:
        raise UserError(f"{path} is truncated or no GGUF file ({error}); fetch it again") from error
    tensors = {}
    for name, shape, kind, offset in infos:
        check(kind in FORMATS, f"{path}: tensor {name} has quantisation type {kind}; known are "
                               f"{', '.join(f'{i} = {form[0]}' for i, form in FORMATS.items())}")
        form, n_values, n_bytes = FORMATS[kind]
        end = start + offset + math.prod(shape) // n_values * n_bytes
        check(math.prod(shape) % n_values == 0, f"{path}: tensor {name} holds no whole blocks of {n_values} values")
        check(end <= len(data), f"{path} is truncated: it ends inside tensor {name}; fetch it again")
        tensors[name] = form, shape, data[start + offset:end]
    return meta, tensors


def _header(data):
    """Return (metadata, [(name, shape, type, offset)] of the tensors, where their bytes begin)."""
    magic, version, n_tensors, n_fields = struct.unpack_from("<4sIQQ", data)
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {magic!r}, version {version}")
    place = struct.calcsize("<4sIQQ")

    def value(kind):
        nonlocal place
        if kind == 8:
            n = value(10)  # first: it moves the place too
            place += n
            return str(data[place - n:place], "utf-8")
        if kind == 9:
            kind, n = value(4), value(10)
            return [value(kind) for _ in range(n)]
        place += struct.calcsize(code := "<" + SCALARS[kind])
        return struct.unpack_from(code, data, place - struct.calcsize(code))[0]

    meta = {value(8): value(value(4)) for _ in range(n_fields)}
    infos = [(value(8), [value(10) for _ in range(value(4))][::-1], value(4), value(10)) for _ in range(n_tensors)]
    return meta, infos, -(-place // (step := meta.get("general.alignment", 32))) * step


def dequantised(form, shape, data):
    """Return the float32 tensor. Blocks of 32 hold scale * q (Q8_0), scale * (q - 8) (Q4_0) or scale * q + lowest (Q4_1)."""
    if form in ("F32", "F16"):
        return torch.from_numpy(np.frombuffer(data, "<f4" if form == "F32" else "<f2").astype(np.float32).reshape(shape))
    block = np.frombuffer(data, np.uint8).reshape(-1, {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[form])
    half = lambda i: block[:, i:i + 2].copy().view("<f2").astype(np.float32)             # (n, 1)
    q = np.concatenate((block[:, -16:] & 15, block[:, -16:] >> 4), axis=1).astype(np.float32)  # (n, 32): low halves come first
    w = {"Q8_0": lambda: half(0) * block[:, 2:].view(np.int8), "Q4_0": lambda: half(0) * (q - 8),
         "Q4_1": lambda: half(0) * q + half(2)}[form]()
    return torch.from_numpy(w.reshape(shape))
