"""The way back: a checkpoint of a flavour of this wing -> config.json and model.safetensors in its published format.

    python pretrained/export.py out/gpt2 NEW_FOLDER

transformers opens the folder as an AR model. config.json also names our tokenizer, whose layout of ids the rows have, and, of a
diffusion model, the process: so the folder is again what it was wherever a checkpoint is asked for here.
"""
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # a script finds only modules of its own folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.checkpoint import read_checkpoint
from engine.cli import UserError, check, parse, run
from pretrained.loading import tokenizer_of
from pretrained.published import FLAVOURS, WEIGHTS, names, renamed, start_of


def export(checkpoint, folder):
    """Write the folder. Raises UserError if the published format cannot hold the checkpoint."""
    process, shape, folder = checkpoint["process"], checkpoint["shape"], Path(folder)
    flavour = FLAVOURS.get(shape.get("flavour"))
    check(flavour, f"this checkpoint is not of the {' or '.join(FLAVOURS)} flavour: no published model computes as its blocks")
    check(not shape["vector_width"], f"{process['name']}: its vectors of tokens have no place in the published format")
    check(process["name"] != "ar" or checkpoint["input_len"] == 0 or process["inputs_attention"] == "causal",
          "this model's inputs see each other both ways (--inputs_attention=bidirectional), which no published AR model can")
    check(not folder.exists(), f"{folder} exists; it is not overwritten")
    import safetensors.torch  # here: only whoever reads or writes such files needs it
    tokenizer, own = tokenizer_of(checkpoint), flavour.config_of(shape)
    config = own | flavour.LIKE | {
        "architectures": [flavour.FAMILIES[own["model_type"]]], "vocab_size": shape["vocab_size"],
        "bos_token_id": process.get("start", start_of(tokenizer)), "eos_token_id": tokenizer.eos,
        "ar2diff_tokenizer": checkpoint["tokenizer"], "ar2diff_canvas": [checkpoint["input_len"], checkpoint["target_len"]]}
    config |= {} if process["name"] == "ar" else {"ar2diff_process": process}
    partial = folder.with_name(folder.name + ".partial")
    tensors = renamed(checkpoint["model"], names(flavour, shape["n_layer"]),
                      lambda ours, _, tensor: flavour.turned(ours, tensor, shape, back=True))
    try:
        partial.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(tensors, partial / WEIGHTS[0], metadata={"format": "pt"})
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write {folder} ({error})") from error


@dataclass
class Config:
    source: str  # checkpoint that began as a published model: a .pt file or the out_dir of a run
    folder: str  # the folder to write, which transformers' AutoModelForCausalLM.from_pretrained() opens


def main(argv=None):
    config = parse(Config, argv)
    source = Path(config.source)
    file = source / "ckpt.pt" if source.is_dir() else source
    check(file.is_file() and file.suffix == ".pt", f"no checkpoint at {file}; give the .pt file or the out_dir of a run")
    checkpoint = read_checkpoint(file)
    export(checkpoint, config.folder)
    print(f"wrote {config.folder}: {WEIGHTS[0]} and config.json; its tokenizer is {checkpoint['tokenizer']['name']!r}")


if __name__ == "__main__":
    run(main)
