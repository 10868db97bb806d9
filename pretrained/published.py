"""Published models, in and out: a folder as transformers writes it, or (in only) a GGUF file <-> a checkpoint of a flavour.

    python train_diff.py --init_from=FOLDER ...                 # or its .safetensors or .bin file or index, or a .gguf file
    python pretrained/published.py out/gpt2 NEW_FOLDER          # a checkpoint of ours -> config.json, model.safetensors

A folder holds config.json, the weights whole or in shards (of a .bin file only plain tensors are read), and tokenizer.json or
vocab.json + merges.txt. Whatever does not fit is listed in one UserError before anything is made of it.
"""
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

if __name__ == "__main__":  # a script finds only modules of its own folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from autoregressive import Autoregressive
from data import originals
from data.folder import draft_of
from data.tokenizer import load_tokenizer
from data.tokenizer_files import has_files
from engine.checkpoint import dequantised, describe, read_checkpoint, read_gguf, read_plain
from engine.cli import UserError, check, parse, run
from engine.devices import check_memory
from engine.files import OBJECT, TEXT, read_json
from model import Transformer
from pretrained import gpt2, llama

END, BOS = ("<|endoftext|>", "<|end_of_text|>"), "<|begin_of_text|>"  # special tokens, as the families spell them
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
FLAVOURS = {"gpt2": gpt2, "llama": llama}
FAMILIES = {name: flavour for flavour in FLAVOURS.values() for name in flavour.FAMILIES}  # model_type -> flavour
# Fields of a config that by their names change what is computed: unless a flavour knows them, they are refused.
SUSPECT = re.compile("attn|attention|rope|rotary|norm|scal|multiplier|softcap|bias|window|expert|quantization|auto_map")
BUFFERS = re.compile(r".*\.(attn\.(masked_)?bias|rotary_emb\.inv_freq)")  # causal masks and angles, no weights
of_texts = lambda x: isinstance(x, dict) and x != {} and {*map(type, x.values())} == {str}
CONFIG = {"model_type": TEXT, "ar2diff_process?": OBJECT,
          "ar2diff_canvas?": ("two whole numbers", lambda x: isinstance(x, list) and [*map(type, x)] == [int, int]),
          "ar2diff_tokenizer?": ("a name and a hash", lambda x: of_texts(x) and x.keys() == {"name", "hash"})}


def model_of(shape, dropout=0.0):
    """Return a Transformer of this shape, of the flavour that it names."""
    models = {None: Transformer, "gpt2": gpt2.GPT2, "llama": llama.Llama}
    return models[shape.get("flavour")](**{key: shape[key] for key in shape if key != "flavour"}, dropout=dropout)


def import_published(file, tokenizer=None):
    """Return the checkpoint (see engine/checkpoint.py) of the model whose weights, or their index, are `file`.

    An exported diffusion model is one again. tokenizer: its name, if not as tokenizer_for() has it. Raises UserError.
    """
    is_gguf = file.suffix == ".gguf"
    config, found = from_gguf(file) if is_gguf else from_folder(file)
    kind = config["model_type"]
    check(kind in FAMILIES, f"{file}: a model of type {kind!r}; known are {', '.join(FAMILIES)}")
    flavour = FAMILIES[kind]
    shape, theirs = checked_shape(file, flavour, config, found)
    tokenizer = tokenizer_for(file, config, len(found[theirs["embedding"] + ".weight"]), tokenizer)
    model = renamed(found, {name: ours for ours, name in theirs.items()},
                    lambda _, ours, x: x.float() if is_gguf and kind == "llama" else flavour.turned(ours, x.float(), shape))
    eos = next((tokenizer.special[name] for name in END if name in tokenizer.special), config.get("eos_token_id"))
    for name in {"embedding.weight", "head.weight"} & model.keys():
        model[name] = grown(model[name], tokenizer, eos[0] if isinstance(eos, list) and eos else eos)
    ar = describe(Autoregressive(start_of(tokenizer), tokenizer.eos, tokenizer.pad))
    input_len, target_len = config.get("ar2diff_canvas", [0, min(256, shape["n_positions"] // 2)])
    return dict(model=model, shape=shape | {"vocab_size": tokenizer.vocab_size}, process=config.get("ar2diff_process", ar),
                tokenizer={"name": tokenizer.name, "hash": tokenizer.hash}, input_len=input_len, target_len=target_len, step=0,
                config={"data": ""}, data="", history=[f"published weights of {file}"])


def start_of(tokenizer):
    """Return the id that AR starts from. NOTE: ours from MASK; these from EOS, as in training, or MASK as Llama 3's BOS."""
    return tokenizer.mask if BOS in tokenizer.special else tokenizer.eos


def grown(rows, tokenizer, eos):
    """Return rows (V, C) in our layout. Text tokens and EOS keep theirs; PAD begins near EOS's, MASK as a BOS, if there is one.

    All others begin as the mean: a tied row is an output row too, and logits are linear in it, so by Jensen's inequality it
    takes no more probability than the average token. Too little for PAD, which every short target ends in: SmolLM2 pays 15.1
    nats for it then, and 13.0 near EOS. MASK is only read: as the mean a hidden token costs 9.4 nats, as EOS's row 11.0.
    A little noise tells new ids apart. Fixed seed: the same file is the same model.
    """
    if tokenizer.ids is None and len(rows) == tokenizer.vocab_size:
        return rows
    ids, eos = (tokenizer.ids, eos) if tokenizer.ids else ([*range(tokenizer.n_text)], tokenizer.eos)
    check(eos in range(len(rows)), f"the model has no end-of-text token ({', '.join(END)}, or eos_token_id in config.json)")
    noise = torch.randn(tokenizer.vocab_size, rows.size(1), generator=torch.Generator().manual_seed(0))
    new = rows.mean(dim=0) + 0.01 * rows.std() * noise
    new[tokenizer.pad] += 0.9 * (rows[eos] - rows.mean(dim=0))  # not all of it: where a text ends, EOS must win
    known = {i: old for i, old in enumerate(ids) if old >= 0} | {tokenizer.eos: eos}
    known |= {tokenizer.mask: tokenizer.special[BOS]} if BOS in tokenizer.special else {}
    new[[*known]] = rows[[*known.values()]]
    return new


def names(flavour, n_layer, column=0):
    """Return {our module: its published name} of a model with n_layer blocks; column 1: its name in GGUF."""
    return {ours: theirs[column] for ours, theirs in flavour.OUTER.items()} | {
        f"blocks.{i}.{ours}": flavour.LAYER[column].format(i) + theirs[column]
        for i in range(n_layer) for ours, theirs in flavour.INNER.items()}


def renamed(tensors, modules, turn):
    """Return the tensors under the names that `modules` gives to their modules, each through turn(old module, new, tensor)."""
    split = [(*name.rpartition("."), tensor) for name, tensor in tensors.items()]
    return {f"{modules[old]}.{kind}": turn(old, modules[old], tensor).contiguous() for old, _, kind, tensor in split}


def from_folder(file):
    """Return (config.json, {published name: tensor}) of weights, or of the index of their shards."""
    config, found, shards = read_json(file.with_name("config.json"), CONFIG), {}, {file.name}
    if file.suffix == ".json":
        shards = {*read_json(file, {"weight_map": ("names of shards", of_texts)})["weight_map"].values()}
    for shard in sorted(shards):
        found |= read_tensors(file.with_name(Path(shard).name))
    check_memory(file, sum(tensor.numel() for tensor in found.values()))
    return config, {name.removeprefix("transformer."): x for name, x in found.items() if not BUFFERS.fullmatch(name)}


def read_tensors(file):
    """Return {name: tensor} of one .safetensors or .bin file."""
    check(file.is_file(), f"no file {file}, although its index names it")
    if file.suffix == ".bin":
        check_memory(file, file.stat().st_size // 4)
        found = read_plain(file)
        check(isinstance(found, dict) and {*map(type, found.values())} == {torch.Tensor}, f"{file} holds no tensors by name")
        return found
    import safetensors.torch  # here: only whoever reads or writes such files needs it
    try:
        return safetensors.torch.load_file(file)  # mapped into memory, not read yet
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{file} is truncated or no safetensors file ({error}); fetch it again") from error


def from_gguf(file):
    """Return the same of a GGUF file: metadata under the names of config.json, tensors under their own."""
    meta, packed = read_gguf(file)
    kind = meta.get("general.architecture")
    check(kind in [*llama.FAMILIES], f"{file}: a model of type {kind!r}; known are {', '.join(llama.FAMILIES)}")
    check_memory(file, sum(int(tensor.n_elements) for tensor in packed.values()))
    config = {key.removeprefix(f"{kind}."): value for key, value in meta.items() if key.startswith(f"{kind}.")}
    config = {theirs: config.pop(key) for theirs, key in llama.FIELDS.values() if key in config} | config
    width = config.get("head_dim", config.get("hidden_size", 0) // (config.get("num_attention_heads") or 1))
    same = [key for key in ("rope.dimension_count", "attention.value_length") if config.get(key) == width]  # others are suspect
    config = {key: value for key, value in config.items() if key not in same} | {
        "model_type": kind, "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "tie_word_embeddings": "output.weight" not in packed}
    return config, {name: dequantised(tensor) for name, tensor in packed.items()}


def checked_shape(file, flavour, config, found):
    """Return the model's shape and names(), leaving its tensors in `found`. Raises UserError listing all misfits."""
    kind, like = config["model_type"], flavour.LIKE
    other = [f"{key}={like[key]}, not {config[key]}" for key in like if config.get(key, like[key]) != like[key]]
    check(not other, f"{file}: a {kind} has {', '.join(other)}")
    unknown = [f"{key}={config[key]}" for key in config.keys() - like - flavour.READ
               if SUSPECT.search(key) and config[key] and key[0] != "_"]
    check(not unknown, f"{file}: its config says {', '.join(sorted(unknown))}, which is not known here")
    try:
        shape = flavour.shape_of(config, found)
    except (UserError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{file}: its config and tensors describe no model ({error})") from error
    theirs = names(flavour, shape["n_layer"], int(file.suffix == ".gguf"))
    embedding = found.get(theirs["embedding"] + ".weight", torch.empty(1, 1))
    if shape.get("tied", True):
        check(torch.equal(found.pop("lm_head.weight", embedding), embedding),
              f"{file}: lm_head.weight is not tied to {theirs['embedding']}.weight, as it should be")
    with torch.device("meta"):  # shapes, no memory
        expected = model_of(shape | {"vocab_size": len(embedding)}).state_dict()
    expected = renamed(expected, theirs, lambda ours, _, tensor: flavour.turned(ours, tensor, shape, back=True))
    misfits = {"missing": expected.keys() - found.keys(), "unexpected": found.keys() - expected.keys(),
               "of another shape": {k for k in expected.keys() & found.keys() if expected[k].shape != found[k].shape}}
    listed = "; ".join(f"{len(those)} {what} ({', '.join(sorted(those)[:3])}{', ...' * (len(those) > 3)})"
                       for what, those in misfits.items() if those)
    check(not listed, f"{file} does not hold a {kind} of {shape['n_layer']} layers and width {shape['width']}: {listed}")
    return shape, theirs


def tokenizer_for(file, config, n_rows, name):
    """Return the tokenizer of a model with n_rows tokens; ids None: its rows are in our layout. Raises UserError.

    The one named, else the one that an exported config.json names, else the model's own files, else gpt2 for a GPT-2.
    """
    own, place = config.get("ar2diff_tokenizer"), (file if file.suffix == ".gguf" else file.parent).resolve()
    beside = load_tokenizer(str(place)) if own is None and has_files(place) else None
    name = name or (own["name"] if own else "smollm2" if file == originals.SMOLLM2 else str(place) if beside else
                    "gpt2" if config["model_type"] == "gpt2" else None)
    check(name, f"{place} holds no tokenizer.json, nor vocab.json with merges.txt; put it there, or name one: --tokenizer")
    tokenizer = load_tokenizer(name)
    if beside:
        tokenizer.ids, tokenizer.special = beside.ids, beside.special  # which the one named gpt2 does not know
    tokenizer.ids = None if own else tokenizer.ids
    same = tokenizer.hash == (own["hash"] if own else beside.hash if beside else tokenizer.hash)
    fits = max(tokenizer.ids) < n_rows if tokenizer.ids else n_rows in (tokenizer.n_text + 1, tokenizer.vocab_size)
    check(same and fits, f"{file} ({n_rows} tokens) was not trained with the tokenizer {tokenizer.name!r} ({tokenizer.n_text} "
          f"and EOS); give the right one to train_ar.py or train_diff.py, by --tokenizer, and go on with what they write")
    return tokenizer


def export(checkpoint, folder):
    """Write model.safetensors and config.json, which names the process, too. Raises UserError for what cannot be written."""
    process, shape, folder = checkpoint["process"], checkpoint["shape"], Path(folder)
    flavour = FLAVOURS.get(shape.get("flavour"))
    check(flavour, f"this checkpoint is not of the {' or '.join(FLAVOURS)} flavour: no published model computes as its blocks")
    check(not (shape["vector_width"] or shape["self_condition"]),
          f"{process['name']}: its new tensors have no place in the published format")
    check(process["name"] != "ar" or checkpoint["input_len"] == 0 or process["inputs_attention"] == "causal",
          "this model's inputs see each other both ways (--inputs_attention=bidirectional), which no published AR model can")
    check(not folder.exists(), f"{folder} exists; it is not overwritten")
    import safetensors.torch
    tokenizer, own = load_tokenizer(checkpoint["tokenizer"]["name"]), flavour.config_of(shape)
    check(tokenizer.hash == checkpoint["tokenizer"]["hash"], f"the tokenizer {tokenizer.name!r} has changed since training")
    config = {theirs[0]: shape[ours] for ours, theirs in flavour.FIELDS.items()} | own | flavour.LIKE | {
        "architectures": [flavour.FAMILIES[own["model_type"]]], "vocab_size": shape["vocab_size"],
        "bos_token_id": process.get("start", start_of(tokenizer)), "eos_token_id": tokenizer.eos,
        "ar2diff_tokenizer": checkpoint["tokenizer"], "ar2diff_canvas": [checkpoint["input_len"], checkpoint["target_len"]],
        "ar2diff_process": process}
    tensors = renamed(checkpoint["model"], names(flavour, shape["n_layer"]),
                      lambda ours, _, tensor: flavour.turned(ours, tensor, shape, back=True))
    try:
        with draft_of(folder, overwrite=False) as draft:
            safetensors.torch.save_file(tensors, draft / WEIGHTS[0], metadata={"format": "pt"})
            (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except safetensors.SafetensorError as error:  # of a full disk, too
        raise UserError(f"cannot write {folder} ({error})") from error


@dataclass
class Config:
    source: str  # checkpoint that began as a published model: a .pt file or the out_dir of a run
    folder: str  # the folder to write, which transformers' AutoModelForCausalLM.from_pretrained() opens


def main(argv=None):
    config = parse(Config, argv)
    file = Path(config.source) / "ckpt.pt" if Path(config.source).is_dir() else Path(config.source)
    check(file.is_file() and file.suffix == ".pt", f"no checkpoint at {file}; give the .pt file or the out_dir of a run")
    checkpoint = read_checkpoint(file)
    export(checkpoint, config.folder)
    print(f"wrote {config.folder}: {WEIGHTS[0]} and config.json; its tokenizer is {checkpoint['tokenizer']['name']!r}")


if __name__ == "__main__":
    run(main)
