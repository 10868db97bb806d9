"""From a checkpoint, ours or published, to what it is of: a model, a process, a tokenizer."""
import typing
from pathlib import Path

import torch

from autoregressive import Autoregressive
from data.originals import smollm2
from data.tokenizer import load_tokenizer
from diffusion import PROCESSES
from engine.checkpoint import FORMAT, checked, read_checkpoint
from engine.cli import UserError, check
from model import INPUTS_ATTENTION
from pretrained.published import WEIGHTS, import_published, model_of


def find_checkpoint(path):
    """Return the file: `path` itself, ckpt.pt or published weights in it, or those of the name smollm2, fetched if need be."""
    path = Path(path)
    if str(path) == "smollm2" and not path.exists():
        return smollm2()
    files = [path / name for name in ("ckpt.pt", *WEIGHTS)] if path.is_dir() else [path]
    found = next((file for file in files if file.is_file()), None)
    check(found, f"no checkpoint at {files[0]}; give the .pt file or the out_dir of a run, a published model's folder or .gguf "
                 f"file, or the name smollm2")
    return found


def load_checkpoint(path, device="cpu", tokenizer=None):
    """Return the checkpoint's dict. tokenizer: of published weights, if it is not beside them. Raises UserError."""
    file = find_checkpoint(path)
    if file.suffix in (".safetensors", ".bin", ".json", ".gguf"):
        checkpoint = checked(file, {"format": FORMAT} | import_published(file, tokenizer))
    else:
        checkpoint = read_checkpoint(file, device)
    process_of(checkpoint)  # an option that is not possible is found out now
    return checkpoint


def build_model(checkpoint, device="cpu", dropout=0.0):
    """Return the Transformer of a checkpoint with its weights; strict: a missing, extra or misshapen tensor is a UserError."""
    try:
        check(checkpoint["shape"]["n_layer"] <= len(checkpoint["model"]), "more layers than tensors")
        with torch.device("meta"):  # shapes alone: a damaged one asks for no memory
            model_of(checkpoint["shape"]).load_state_dict(checkpoint["model"], strict=True, assign=True)
    except Exception as error:  # a shape of no model stumbles anywhere
        raise UserError("the checkpoint's tensors do not fit its model: " + " ".join(str(error).split())) from error
    model = model_of(checkpoint["shape"], dropout)
    model.load_state_dict(checkpoint["model"])
    return model.to(device)


def tokenizer_of(checkpoint):
    """Return the tokenizer a checkpoint was trained with, checked by its hash: other ids would make every output noise."""
    name, digest = checkpoint["tokenizer"]["name"], checkpoint["tokenizer"]["hash"]
    tokenizer = load_tokenizer(name)
    check(tokenizer.hash == digest and tokenizer.vocab_size == checkpoint["shape"]["vocab_size"],
          f"tokenizer mismatch: the checkpoint was trained with {name!r} of hash {digest}, here {name!r} has {tokenizer.hash}")
    return tokenizer


def process_of(checkpoint):
    """Return the process (an Autoregressive or one of diffusion.py) that a checkpoint was trained with."""
    options, classes = dict(checkpoint["process"]), PROCESSES | {"ar": Autoregressive}
    name = options.pop("name")
    check(name in classes, f"this is a checkpoint of the process {name!r}, which is not in diffusion.py")
    known = classes[name].__dataclass_fields__.keys()
    check(options.keys() == known, f"this is a checkpoint of the process {name!r} with other options than {', '.join(known)}")
    process, kinds, shape = classes[name](**options), typing.get_type_hints(classes[name]), checkpoint["shape"]
    for option, value in vars(process).items():
        allowed = typing.get_args(kinds[option]) or (kinds[option],)
        most = max(shape["vocab_size"], shape["vector_width"]) if type(value) is int else 1000
        counts = not isinstance(value, (int, float)) or 0 <= value <= most
        check(counts and type(value) in (*allowed, *[int] * (float in allowed)),
              f"this is a checkpoint of the process {name!r} with {option}={value!r}, which is not possible")
    check(name != "uniform" or not process.self_condition or shape["self_condition"], "this checkpoint lacks self-conditioning")
    check(process.inputs_attention in INPUTS_ATTENTION, f"inputs_attention={process.inputs_attention!r} is not known")
    return process


def new_process(name, tokenizer, **options):
    """Return the process of that name with a tokenizer's ids. Raises UserError for an option that belongs to another one."""
    known = PROCESSES[name].__dataclass_fields__
    for option in options:
        owners = " or ".join(other for other, cls in PROCESSES.items() if option in cls.__dataclass_fields__)
        check(option in known, f"--{option} is for --process={owners}, not for {name}")
    ids = {"n_noise": tokenizer.n_noise, "mask": tokenizer.mask}
    return PROCESSES[name](**{field: i for field, i in ids.items() if field in known}, **options)
