"""The gpt2 flavour of the Transformer, so that AR2Diff can start from the published GPT-2 weights; and the way back.

    python train_diff.py --init_from=gpt2 ...      # or gpt2-medium, gpt2-large, gpt2-xl, or a folder with model.safetensors
    python pretrained/gpt2.py out/ar FOLDER                   # AR checkpoint of this flavour -> model.safetensors, config.json

GPT-2 (Radford et al. 2019) as published: learned positions, LayerNorm with bias, GELU, biases, no QK-norm, logits unscaled.
Its positions are absolute. A row's first token that is no padding stands at 0, and targets go on behind the inputs, so a text
stands where it stood when GPT-2 was trained, however much padding precedes it.
"""
import json
import os
import re
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

if __name__ == "__main__":  # a script finds only modules of its own folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from autoregressive import Autoregressive
from data import originals
from data.tokenizer import load_tokenizer
from engine.checkpoint import read_checkpoint
from engine.cli import UserError, check, parse, run
from model import Transformer, rms_norm

WEIGHTS = "model.safetensors"
# Name at huggingface.co/openai-community -> commit and SHA-256 of its model.safetensors. The sums are those that several public
# projects pinned to the same commit; where none could be found, the one that the server states for this commit must do.
PUBLISHED = {
    "gpt2": ("607a30d783dfa663caf39e06633721c8d4cfcd7e", "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"),
    "gpt2-medium": ("6dcaa7a952f72f9298047fd5137cd6e4f05f41da", None),
    "gpt2-large": ("32b71b12589c2f8d625668d2335a01cac3249519", None),
    "gpt2-xl": ("15ea56dee5df4983c59b2538573817e1667135e2", "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a"),
}
# What config.json says of a model that is like this class; any other value would be silently wrong logits.
LIKE_GPT2 = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
             "scale_attn_by_inverse_layer_idx": False}
# Published module -> ours. Those that are no LayerNorm or embedding store their matrix as (in, out), nn.Linear as (out, in).
OUTER = {"wte": "embedding", "wpe": "positions", "ln_f": "norm"}
INNER = {"ln_1": "attention_norm", "attn.c_attn": "qkv", "attn.c_proj": "attention_out",
         "ln_2": "mlp_norm", "mlp.c_fc": "mlp_in", "mlp.c_proj": "mlp_out"}


class GPT2Block(nn.Module):
    """GPT-2's block behind the signature of model.Block: no rotary angles, no cross-attention."""

    def __init__(self, width, n_head, dropout, cross=False):
        super().__init__()
        self.n_head, self.head_dim = n_head, width // n_head
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, rotary, mask, is_causal, past=None, cross=None):
        """Return x (B, T, C) after the block, and the keys and values (B, H, L, D) it attended to, those of `past` first."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.n_head, self.head_dim))  # (B, T, 3, H, D)
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))                             # 3 x (B, H, T, D)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)        # (B, H, L, D)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)  # (B, H, T, D)
        x = x + self.dropout(self.attention_out(a.transpose(1, 2).flatten(2)))           # (B, T, C)
        h = F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh")                    # (B, T, 4C)
        return x + self.dropout(self.mlp_out(h)), (k, v)


class GPT2(Transformer):
    """The Transformer of model.py with the parts of GPT-2: the same encode() and decode(), patterns, context and cache."""
    Block = GPT2Block

    def __init__(self, vocab_size, n_layer, width, n_head, architecture="decoder-only", vector_width=0, dropout=0.0,
                 n_positions=1024):
        check(architecture == "decoder-only", "the gpt2 flavour is decoder-only: GPT-2 has no encoder")
        super().__init__(vocab_size, n_layer, width, n_head, architecture, vector_width, dropout)
        self.shape |= {"flavour": "gpt2", "n_positions": n_positions}
        self.positions = nn.Embedding(n_positions, width)
        self.norm = nn.LayerNorm(width)

    def init_weights(self):
        """Leave them as they are: this flavour exists to start from weights that are there already."""

    def add_positions(self, x, start, pad_mask):
        """Return x (B, T, C), which begins at column `start` of the canvas, with positions added. UserError beyond the last."""
        n_positions, end = self.shape["n_positions"], start + x.size(1)
        check(end <= n_positions, f"{end} columns of inputs and targets, but this model has {n_positions} positions")
        columns = torch.arange(start, end, device=x.device)                              # (T,)
        if pad_mask is not None:  # clamp: what stands at padded columns is seen by nobody
            columns = (columns - pad_mask.sum(dim=1, keepdim=True)).clamp(min=0)         # (B, T)
        return self.dropout(x + self.positions(columns))                                 # (B, T, C)

    def embed(self, inputs, pad_mask):
        return self.add_positions(self.embedding(inputs), 0, pad_mask)

    def embed_targets(self, y, context):
        if y.is_floating_point():  # vectors come at the scale of token rows, or they would drown the positions
            x = rms_norm(y) * self.embedding.weight.detach().square().mean().sqrt()
        else:
            x = self.embedding(y)                                                        # (B, T, C)
        n_inputs = 0 if context.inputs is None else context.inputs.size(1)  # full: they are in the same pass
        return self.add_positions(x, n_inputs if context.keys[0] is None else context.keys[0].size(2), context.pad_mask)

    def rotary(self, start, n):
        return None

    def logits(self, x):
        return F.linear(self.norm(x), self.embedding.weight)


def fetch_weights(name):
    """Return data/downloads/NAME/model.safetensors, fetched and checked first if it is not there."""
    (commit, sha256), path = PUBLISHED[name], originals.DOWNLOADS / name / WEIGHTS
    url = f"https://huggingface.co/openai-community/{name}/resolve/{commit}/{WEIGHTS}"
    return originals.download(url, path, sha256, f"put that file at {path}")


def module_names(n_layer):
    """Return {published module: ours} of a model with n_layer blocks."""
    return OUTER | {f"h.{i}.{theirs}": f"blocks.{i}.{ours}" for i in range(n_layer) for theirs, ours in INNER.items()}


def renamed(tensors, modules):
    """Return the tensors under the names that `modules` gives to their modules, from the published format or back to it."""
    result = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        is_linear = ".c_" in module + modules[module]  # whichever of the two is the published name; a bias has nothing to turn
        result[f"{modules[module]}.{kind}"] = (tensor.t() if is_linear else tensor).contiguous()
    return result


def import_weights(file, tokenizer=None):
    """Return an AR checkpoint (see checkpoint.py) from a .safetensors file in GPT-2's published format.

    The number of heads comes from config.json beside the file, else every head is 64 wide, as in all published sizes.
    tokenizer: its name; default: the one that an exported config.json names, else gpt2. Its text tokens and EOS must be the
    vocabulary of the file. Raises UserError for a file or a tensor that does not fit.
    """
    config, found = read_config(file.with_name("config.json")), read_tensors(file)
    own = config.get("ar2diff_tokenizer", {"name": "gpt2"})
    tokenizer = load_tokenizer(tokenizer or own["name"])
    n_vocab, shape = check_tensors(file, found, config.get("n_head"))
    check(n_vocab in (tokenizer.n_text + 1, tokenizer.vocab_size) and own.get("hash", tokenizer.hash) == tokenizer.hash,
          f"{file} ({n_vocab} tokens) was not trained with the tokenizer {tokenizer.name!r} ({tokenizer.n_text} and EOS); give "
          f"the right one to train_ar.py or train_diff.py, by --tokenizer, and go on with the checkpoint they write")
    model = {name: tensor.float() for name, tensor in renamed(found, module_names(shape["n_layer"])).items()}
    model["embedding.weight"] = grown(model["embedding.weight"], tokenizer.vocab_size)
    # NOTE: our models start from the MASK token; this one from EOS, GPT-2's <|endoftext|>, behind which all its texts began.
    process = {"name": "ar", **asdict(Autoregressive(tokenizer.eos, tokenizer.eos, tokenizer.pad))}
    return dict(model=model, shape=shape | {"vocab_size": tokenizer.vocab_size}, process=process, step=0, config={"data": ""},
                tokenizer={"name": tokenizer.name, "hash": tokenizer.hash}, input_len=0,
                target_len=min(256, shape["n_positions"] // 2), history=[f"GPT-2 weights of {file}"])


def read_config(path):
    """Return config.json as a dict, empty without one. Raises UserError if it describes a model that computes otherwise."""
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        other = {key: value for key, like in LIKE_GPT2.items() if (value := config.get(key, like)) != like}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no description of a model ({error})") from error
    own = config.get("ar2diff_tokenizer", {"name": "gpt2"})
    check(isinstance(own, dict) and isinstance(own.get("name"), str), f"{path}: ar2diff_tokenizer must hold the name of one")
    check(not other, f"{path}: a GPT-2 has {', '.join(f'{key}={LIKE_GPT2[key]}, not {other[key]}' for key in other)}")
    return config


def read_tensors(file):
    """Return {published name: tensor} of a .safetensors file, without the prefix that transformers puts before every name."""
    import safetensors.torch  # here: only whoever reads or writes such files needs it
    try:
        tensors = safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{file} is truncated or no safetensors file ({error}); fetch it again") from error
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def check_tensors(file, found, n_head):
    """Return (number of tokens, shape of the model), leaving its tensors in `found`. Raises UserError listing all misfits."""
    check(all(name in found and found[name].dim() == 2 for name in ("wte.weight", "wpe.weight")),
          f"{file} does not hold a GPT-2: no wte.weight and wpe.weight, the embeddings of tokens and of positions")
    (n_vocab, width), n_positions = found["wte.weight"].shape, len(found["wpe.weight"])
    n_layer = len({match[1] for match in map(re.compile(r"h\.(\d+)\.").match, found) if match})
    n_head = n_head or width / 64
    check(n_layer > 0 and n_head in range(1, width + 1) and width % n_head == 0, f"{file}: {n_layer} layers, width {width}, "
          f"{n_head} heads; config.json beside it must give an n_head that divides the width")
    with torch.device("meta"):  # shapes, no memory
        model = GPT2(n_vocab, n_layer, width, int(n_head), n_positions=n_positions)
    expected = renamed(model.state_dict(), {ours: theirs for theirs, ours in module_names(n_layer).items()})
    head = found.pop("lm_head.weight", found["wte.weight"])
    check(torch.equal(head, found["wte.weight"]), f"{file}: lm_head.weight is not tied to wte.weight, as it is in a GPT-2")
    for name in [name for name in found if re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name)]:
        del found[name]  # causal masks, no weights
    misfits = {"missing": expected.keys() - found.keys(), "unexpected": found.keys() - expected.keys(),
               "of another shape": {k for k in expected.keys() & found.keys() if expected[k].shape != found[k].shape}}
    listed = "; ".join(f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{', ...' * (len(names) > 3)})"
                       for what, names in misfits.items() if names)
    check(not listed, f"{file} does not hold a GPT-2 of {n_layer} layers and width {width}: {listed}")
    return n_vocab, model.shape


def grown(rows, vocab_size):
    """Return the embedding (V, C) with rows for PAD, MASK, sentinels and unused ids: the mean of all, and a little noise.

    A tied row is an output row too, and logits are linear in it: by Jensen's inequality the mean row takes no more probability
    than the average token. 111 new ids beside GPT-2's 50,257 raise the loss by at most 0.002 nats (the noise aside, which is a
    hundredth of the rows' deviation and tells the new ids apart). Fixed seed: the same file is the same model.
    """
    noise = torch.randn(vocab_size - len(rows), rows.size(1), generator=torch.Generator().manual_seed(0))
    return torch.cat((rows, rows.mean(dim=0) + 0.01 * rows.std() * noise))


def export(checkpoint, folder):
    """Write model.safetensors and config.json in the published format. Raises UserError if that cannot hold the checkpoint."""
    process, shape, folder = checkpoint["process"], checkpoint["shape"], Path(folder)
    check(shape.get("flavour") == "gpt2", "this checkpoint is not of the gpt2 flavour: its blocks compute what GPT-2's cannot")
    check(process["name"] == "ar", f"this is a {process['name']!r} checkpoint; GPT-2's format is for autoregressive ones")
    check(checkpoint["input_len"] == 0 or process["inputs_attention"] == "causal",
          "this model's inputs see each other both ways (--inputs_attention=bidirectional), which GPT-2 cannot")
    check(not folder.exists(), f"{folder} exists; it is not overwritten")
    import safetensors.torch
    partial = folder.with_name(folder.name + ".partial")
    modules = {ours: theirs for theirs, ours in module_names(shape["n_layer"]).items()}
    config = LIKE_GPT2 | {"architectures": ["GPT2LMHeadModel"], "n_layer": shape["n_layer"], "n_head": shape["n_head"],
                          "n_embd": shape["width"], "n_positions": shape["n_positions"], "vocab_size": shape["vocab_size"],
                          "tie_word_embeddings": True, "bos_token_id": process["start"], "eos_token_id": process["eos"],
                          "ar2diff_tokenizer": checkpoint["tokenizer"]}
    try:
        partial.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(renamed(checkpoint["model"], modules), partial / WEIGHTS, metadata={"format": "pt"})
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write {folder} ({error})") from error


@dataclass
class Config:
    source: str  # AR checkpoint of the gpt2 flavour: a .pt file or the out_dir of a run
    folder: str  # the folder to write, which transformers' GPT2LMHeadModel.from_pretrained() opens


def main(argv=None):
    config = parse(Config, argv)
    source = Path(config.source)
    file = source / "ckpt.pt" if source.is_dir() else source
    check(file.is_file() and file.suffix == ".pt", f"no checkpoint at {file}; give the .pt file or the out_dir of a run")
    checkpoint = read_checkpoint(file)
    export(checkpoint, config.folder)
    print(f"wrote {config.folder}: {WEIGHTS} and config.json; its tokenizer is {checkpoint['tokenizer']['name']!r}")


if __name__ == "__main__":
    run(main)
