"""The gpt2 flavour of the Transformer, so that AR2Diff can start from the published GPT-2 weights (read by published.py).

    python train_diff.py --init_from=FOLDER ...    # with GPT-2's files

GPT-2 (Radford et al. 2019) as published: learned positions, LayerNorm with bias, GELU, biases, no QK-norm, logits unscaled.
Its positions are absolute. A row's first token that is no padding stands at 0, and targets go on behind the inputs, so a text
stands where it stood when GPT-2 was trained, however much padding precedes it.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from engine.cli import check
from engine.files import fitting, integer
from model import Transformer, rms_norm

# Our module -> published.
OUTER = {"embedding": ("wte",), "positions": ("wpe",), "norm": ("ln_f",)}
INNER = {"attention_norm": ("ln_1",), "qkv": ("attn.c_attn",), "attention_out": ("attn.c_proj",),
         "mlp_norm": ("ln_2",), "mlp_in": ("mlp.c_fc",), "mlp_out": ("mlp.c_proj",)}
LAYER = ("h.{}.",)
FAMILIES = {"gpt2": "GPT2LMHeadModel"}  # model_type -> transformers' class
# What config.json says: ours -> theirs; of this shape alone; of a model that is like this class (any other value would be
# silently wrong logits); and what sounds like that, but changes nothing.
FIELDS = {"n_layer": ("n_layer",), "width": ("n_embd",), "n_head": ("n_head",), "n_positions": ("n_positions",)}
config_of = lambda shape: {"model_type": "gpt2", "tie_word_embeddings": True}
LIKE = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False}
READ = {"attn_pdrop", "reorder_and_upcast_attn"}


def token_rows(embedding, y):
    """Return (B, T, C) of tokens, or of vectors: at the scale of token rows, or they would drown the positions."""
    return rms_norm(y) * embedding.weight.detach().square().mean().sqrt() if y.is_floating_point() else embedding(y)


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
    init_weights = lambda self: None  # this flavour exists to start from weights that are there already
    rotary = lambda self, start, n: None

    def __init__(self, vocab_size, n_layer, width, n_head, architecture="decoder-only", vector_width=0, dropout=0.0,
                 self_condition=False, n_positions=1024):
        check(architecture == "decoder-only", "the gpt2 flavour is decoder-only: GPT-2 has no encoder")
        super().__init__(vocab_size, n_layer, width, n_head, architecture, vector_width, dropout, self_condition)
        self.shape |= {"flavour": "gpt2", "n_positions": n_positions}
        self.positions = nn.Embedding(n_positions, width)
        self.norm = nn.LayerNorm(width)

    def add_positions(self, x, start, pad_mask):
        """Return x (B, T, C), which begins at column `start` of the canvas, with positions added. UserError beyond the last."""
        n_positions, end = self.shape["n_positions"], start + x.size(1)
        check(end <= n_positions, f"{end} columns of inputs and targets, but this model has {n_positions} positions")
        columns = torch.arange(start, end, device=x.device)                              # (T,)
        if pad_mask is not None:  # clamp: what stands at padded columns is seen by nobody
            columns = (columns - pad_mask.sum(dim=1, keepdim=True)).clamp(min=0)         # (B, T)
        return self.dropout(x + self.positions(columns))                                 # (B, T, C)

    def embed(self, inputs, context):
        return self.add_positions(self.embedding(inputs), self.n_seen(context), context.pad_mask)

    def n_seen(self, context):
        """Return the number of columns that stand in the context."""
        return 0 if context.keys[0] is None else context.keys[0].size(2)

    def embed_targets(self, y, context):
        x = token_rows(self.embedding, y)                                                # (B, T, C)
        n_inputs = 0 if context.inputs is None else context.inputs.size(1)  # full: they are in the same pass
        return self.add_positions(x, n_inputs + self.n_seen(context), context.pad_mask)

    def logits(self, x):
        return F.linear(self.norm(x), self.embedding.weight)


def shape_of(config, found):
    """Return the model's shape by config.json. Raises ValueError or UserError for what is missing there or of another kind."""
    fitting(config, {theirs: integer(1, 1 << 20) for theirs, in FIELDS.values()})
    shape = {ours: config[theirs] for ours, (theirs,) in FIELDS.items()}
    check(shape["n_layer"] <= len(found) and shape["width"] % shape["n_head"] == 0, f"no such shape: {shape}")
    return shape | dict(architecture="decoder-only", flavour="gpt2", vector_width=0, self_condition=False)


def turned(module, tensor, shape, back=False):
    """Return a matrix as nn.Linear stores it, (out, in), from the published (in, out), or back; what is no matrix as it is."""
    return tensor.t() if module.rpartition(".")[2] in ("qkv", "attention_out", "mlp_in", "mlp_out") else tensor
