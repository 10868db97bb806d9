"""The llama flavour of the Transformer: SmolLM2, Llama 3, Qwen2, Qwen3 (read by published.py).

    python train_diff.py --init_from=smollm2 ...      # or a folder with config.json and weights, or a GGUF file

RMSNorm with gains, fewer heads of keys and values than of queries (arXiv 2305.13245), SwiGLU (arXiv 2002.05202), rotary
positions. Qwen2 adds biases to q, k and v; Qwen3 norms queries and keys. Published rotary pairs are (i, i + D/2), a half of the
head apart; model.rotate() turns (2i, 2i + 1), so the rows of q and k change places on the way in, and back on the way out.
"""
import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from engine.cli import check, one_of
from engine.files import fitting, integer
from model import Transformer, rotate
from pretrained.gpt2 import token_rows

# Ours -> transformers', GGUF's: names of modules, and below of what config.json says.
OUTER = {"embedding": ("model.embed_tokens", "token_embd"), "norm": ("model.norm", "output_norm"),
         "head": ("lm_head", "output")}
INNER = {"attention_norm": ("input_layernorm", "attn_norm"), "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
         "q": ("self_attn.q_proj", "attn_q"), "k": ("self_attn.k_proj", "attn_k"), "v": ("self_attn.v_proj", "attn_v"),
         "q_norm": ("self_attn.q_norm", "attn_q_norm"), "k_norm": ("self_attn.k_norm", "attn_k_norm"),
         "attention_out": ("self_attn.o_proj", "attn_output"), "gate": ("mlp.gate_proj", "ffn_gate"),
         "mlp_in": ("mlp.up_proj", "ffn_up"), "mlp_out": ("mlp.down_proj", "ffn_down")}
LAYER = ("model.layers.{}.", "blk.{}.")
FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
FIELDS = {"n_layer": ("num_hidden_layers", "block_count"), "width": ("hidden_size", "embedding_length"),
          "n_head": ("num_attention_heads", "attention.head_count"), "mlp_width": ("intermediate_size", "feed_forward_length"),
          "n_kv_head": ("num_key_value_heads", "attention.head_count_kv"), "head_width": ("head_dim", "attention.key_length"),
          "n_positions": ("max_position_embeddings", "context_length"), "base": ("rope_theta", "rope.freq_base"),
          "eps": ("rms_norm_eps", "attention.layer_norm_rms_epsilon")}
POSITIVE = "a number above 0", lambda x: type(x) in (int, float) and 0 < x < math.inf
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# What config.json says of a model that is like this class; and what sounds like that, but is read, or changes nothing.
LIKE = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
READ = {*(theirs for theirs, _ in FIELDS.values()), "rope_parameters", "rope_scaling", "sliding_window", "attention_dropout",
        "max_window_layers"}


class LlamaBlock(nn.Module):
    """Llama's block behind the signature of model.Block: no cross-attention."""

    def __init__(self, width, n_head, dropout, cross=False, n_kv_head=1, head_width=64, mlp_width=1, eps=1e-6, bias=False,
                 qk_norm=False):
        super().__init__()
        self.head_width = head_width
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.q = nn.Linear(width, n_head * head_width, bias)
        self.k, self.v = (nn.Linear(width, n_kv_head * head_width, bias) for _ in range(2))
        self.q_norm, self.k_norm = (nn.RMSNorm(head_width, eps) if qk_norm else nn.Identity() for _ in range(2))
        self.attention_out = nn.Linear(n_head * head_width, width, bias=False)
        self.gate, self.mlp_in = (nn.Linear(width, mlp_width, bias=False) for _ in range(2))
        self.mlp_out = nn.Linear(mlp_width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, rotary, mask, is_causal, past=None, cross=None):
        """Return x (B, T, C) after the block, and the keys and values (B, H_kv, L, D) it saw, those of `past` first."""
        h = self.attention_norm(x)
        q, k, v = (f(h).unflatten(-1, (-1, self.head_width)).transpose(1, 2) for f in (self.q, self.k, self.v))  # (B, H, T, D)
        q, k = (rotate(norm(t.float()), rotary).type_as(v) for norm, t in ((self.q_norm, q), (self.k_norm, k)))
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)        # (B, H_kv, L, D)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=True)
        x = x + self.dropout(self.attention_out(a.transpose(1, 2).flatten(2)))           # (B, T, C)
        h = self.mlp_norm(x)
        return x + self.dropout(self.mlp_out(F.silu(self.gate(h)) * self.mlp_in(h))), (k, v)


class Llama(Transformer):
    """The Transformer of model.py with the parts of Llama: the same encode() and decode(), patterns, context and cache."""
    init_weights = lambda self: None  # this flavour exists to start from weights that are there already

    def __init__(self, vocab_size, n_layer, width, n_head, architecture="decoder-only", vector_width=0, dropout=0.0,
                 self_condition=False, n_kv_head=1, head_width=64, mlp_width=1, eps=1e-6, bias=False, qk_norm=False,
                 base=10000.0, scaling=None, tied=True, n_positions=2048):
        check(architecture == "decoder-only", "the llama flavour is decoder-only")
        block = dict(n_kv_head=n_kv_head, head_width=head_width, mlp_width=mlp_width, eps=eps, bias=bias, qk_norm=qk_norm)
        self.Block = partial(LlamaBlock, **block)
        super().__init__(vocab_size, n_layer, width, n_head, architecture, vector_width, dropout, self_condition)
        self.shape |= block | dict(flavour="llama", base=base, scaling=scaling, tied=tied, n_positions=n_positions)
        self.norm = nn.RMSNorm(width, eps)
        self.head = None if tied else nn.Linear(width, vocab_size, bias=False)

    def embed(self, inputs, context):
        return self.dropout(self.embedding(inputs))

    def embed_targets(self, y, context):
        return self.dropout(token_rows(self.embedding, y))                               # (B, T, C)

    def rotary(self, start, n):
        columns = start + torch.arange(n, device=self.embedding.weight.device, dtype=torch.float32)
        angles = columns[:, None] * frequencies(*(self.shape[key] for key in ("head_width", "base", "scaling")), columns.device)
        return angles.cos(), angles.sin()                                                # 2 x (n, D / 2)

    def logits(self, x):
        return F.linear(self.norm(x), (self.head or self.embedding).weight)


def frequencies(dim, base, scaling, device="cpu"):
    """Return the angles (D / 2,) of one column. Llama 3 divides those that turn rarely in the first training's length."""
    plain = base ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    if scaling is None:
        return plain
    factor, low, high, length = (scaling[key] for key in SCALING)
    kept = ((plain * length / (2 * torch.pi) - low) / (high - low)).clamp(0, 1)  # 0: below `low` turns, 1: above `high`
    return plain * (kept + (1 - kept) / factor)


def shape_of(config, found):
    """Return the model's shape by config.json. Raises UserError for what is missing there or of another kind."""
    rope, name = config.get("rope_parameters") or config.get("rope_scaling") or {}, config["model_type"]
    scaled = one_of("rope_type", rope.get("rope_type", rope.get("type", "default")), ("default", "llama3")) == "llama3"
    check({*config.get("layer_types", [])} <= {"full_attention"}, f"layer_types={config.get('layer_types')} are not known here")
    said = {key: value for key, value in (config | rope).items() if value is not None}
    fitting(said, {theirs + "?" * (ours == "head_width"): POSITIVE if ours in ("base", "eps") else integer(1, 1 << 30)
                   for ours, (theirs, _) in FIELDS.items()} | (dict.fromkeys(SCALING, POSITIVE) if scaled else {}))
    shape = {ours: said.get(theirs) for ours, (theirs, _) in FIELDS.items()}
    check(shape["n_layer"] <= len(found) and shape["n_head"] % shape["n_kv_head"] == 0, f"no such shape: {shape}")
    return shape | dict(architecture="decoder-only", flavour="llama", vector_width=0, self_condition=False,
                        bias=name == "qwen2", qk_norm=name == "qwen3",
                        head_width=shape["head_width"] or shape["width"] // shape["n_head"],
                        tied=config.get("tie_word_embeddings", "lm_head.weight" not in found),
                        scaling={key: rope[key] for key in SCALING} if scaled else None)


def config_of(shape):
    """Return what config.json says of this shape, beside its FIELDS."""
    kind = "qwen2" if shape["bias"] else "qwen3" if shape["qk_norm"] else "llama"
    scaling = shape["scaling"] and {"rope_type": "llama3"} | shape["scaling"]
    return {"model_type": kind, "tie_word_embeddings": shape["tied"], "rope_scaling": scaling}


def turned(module, tensor, shape, back=False):
    """Return the rows of q, k and their norms with rotary pairs side by side, from half a head apart, or back."""
    if module.rpartition(".")[2] not in ("q", "k", "q_norm", "k_norm"):
        return tensor
    half = shape["head_width"] // 2
    return tensor.unflatten(0, (-1, half, 2) if back else (-1, 2, half)).transpose(1, 2).flatten(0, 2)
