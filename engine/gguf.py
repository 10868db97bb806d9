"""GGUF files, llama.cpp's format, as its own package `gguf` reads them: metadata, and tensors as float32."""
import torch

from engine.cli import UserError


def read_gguf(path):
    """Return (metadata, {name: what dequantised() takes}); no tensor is read yet. Raises UserError with the reason."""
    try:
        from gguf import GGUFReader  # here: only who reads such a file waits for it
        reader = GGUFReader(path)
        return {key: field.contents() for key, field in reader.fields.items()}, {x.name: x for x in reader.tensors}
    except ImportError as error:
        raise UserError(f"{path} needs a package that is not installed: python -m pip install gguf ({error})") from error
    except Exception as error:  # a damaged file may be anything
        raise UserError(f"{path} is truncated or no GGUF file ({error}); fetch it again") from error


def dequantised(tensor):
    """Return the float32 tensor. Raises UserError for a quantisation that the package cannot undo."""
    from gguf import dequantize
    try:
        return torch.tensor(dequantize(tensor.data, tensor.tensor_type))
    except NotImplementedError as error:
        raise UserError(f"tensor {tensor.name} is of type {tensor.tensor_type.name}, which is not known ({error})") from error
