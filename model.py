"""One Transformer for both kinds of model: what makes it autoregressive or a diffusion model is decided by its caller.

    context = model.encode(inputs)                              # the conditioning text, never noised
    logits  = model.decode(y, context, attention="causal")      # AR:        y = [start, x0[:-1]]
    logits  = model.decode(y, context, attention="bidirectional")  # diffusion: y = xt, the noised targets

In both calls logits[:, i] predicts x0[:, i]. AR2Diff (arXiv 2401.17181, Figure 2) is therefore two changed arguments: what is
fed as y, and the attention pattern. The same weights serve both, and no tensor is added or removed.

Inputs never see targets (except in the `full` pattern), so their keys and values do not depend on y. encode() computes them
once; decode() reuses them for both SUNDAE passes, all denoising steps and all samples, and AR decoding extends them.

Two architectures behind the two calls. decoder-only: one stack of blocks; targets attend to what the same blocks made of the
inputs, and to each other. encoder-decoder (as T5): inputs pass a stack of their own, and targets attend to its output.

Shapes: B sequences, S input columns, T target columns, L = S + T, C width, H heads, D = C / H, V vocabulary.
Inputs are padded on the left and targets on the right, so column S is always the border. Positions count from there: targets
stand at 0, 1, 2, ..., inputs at ..., -2, -1.
"""
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from config import UserError, check, one_of

INPUTS_ATTENTION = ("causal", "bidirectional", "full")  # full: inputs also see the targets
TARGETS_ATTENTION = ("causal", "bidirectional")
ARCHITECTURES = ("decoder-only", "encoder-decoder")

# Name -> (layers, width, heads). base, large and xl are the T5.1.1 shapes, which fit the sizes the paper prints.
SIZES = {
    "tiny": (4, 128, 4),      # 0.8M backbone, minutes on a laptop CPU
    "mini": (6, 384, 6),      # 11M, nanoGPT's Shakespeare model
    "base": (12, 768, 12),    # 85M, GPT-2 small
    "large": (24, 1024, 16),  # 302M
    "xl": (24, 2048, 32),     # 1.2B
}


@dataclass
class ModelConfig:
    size: str | None = None  # tiny, mini, base, large, xl or LAYERSxWIDTHxHEADS (4x128x4); default: the checkpoint's, or tiny
    architecture: str | None = None  # decoder-only or encoder-decoder; default: the checkpoint's, or decoder-only
    dropout: float = 0.0  # share of activations dropped on each residual branch, while training


def shape_of(size):
    """Return (n_layer, width, n_head) for a preset name or a LAYERSxWIDTHxHEADS string. Raises UserError."""
    if size in SIZES:
        return SIZES[size]
    parts = size.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"size={size!r} is neither one of {', '.join(SIZES)} nor LAYERSxWIDTHxHEADS such as 4x128x4")
    n_layer, width, n_head = map(int, parts)
    if width % n_head or (width // n_head) % 2:
        raise UserError(f"size={size!r}: width {width} must be a multiple of twice the number of heads, {2 * n_head}")
    return n_layer, width, n_head


def flops(shape, n_tokens, logits=True):
    """Return the FLOPs of a forward pass over n_tokens, all inputs or all targets: 2 per weight and token.

    Attention scores, a few %, are left out.
    """
    per_layer = 14 if shape["architecture"] == "encoder-decoder" else 12  # half of cross-attention is paid by either side
    backbone = per_layer * shape["n_layer"] * shape["width"] ** 2
    return 2 * n_tokens * (backbone + (shape["vocab_size"] * shape["width"] if logits else 0))


@dataclass
class Context:
    """What decode() needs to know of the inputs: keys and values (B, H, S, D) per layer, and those that extend=True adds."""
    keys: list  # n_layer x (B, H, S, D) for self-attention, with room behind them once extended; None: no inputs there
    values: list  # n_layer x (B, H, S, D)
    pad_mask: torch.Tensor | None  # (B, S) bool, True = padding; None = no padding
    n_targets: int = 0  # target columns in the cache: above 0 once AR decoding has extended it
    n_inputs: int = 0  # columns of keys and values that inputs take, once the cache was extended
    place: torch.Tensor | None = None  # (1,) then: n_inputs + n_targets; were it a number, each would be compiled anew
    inputs: torch.Tensor | None = None  # (B, S) tokens, kept only for the `full` pattern, which can cache nothing
    cross: list | None = None  # encoder-decoder: n_layer x (keys, values) of the encoder's output

    def repeat(self, n):
        """Return the context with every row n times in a row: n samples share one encoding of their input."""
        rows = lambda x: None if x is None else x.repeat_interleave(n, dim=0)
        cross = None if self.cross is None else [(rows(k), rows(v)) for k, v in self.cross]
        return replace(self, keys=[rows(k) for k in self.keys], values=[rows(v) for v in self.values],
                       pad_mask=rows(self.pad_mask), inputs=rows(self.inputs), cross=cross,
                       place=None if self.place is None else self.place.clone())


def attention_mask(n_query, n_key, causal, pad_mask, device, ahead=0, place=None):
    """Return (mask, is_causal) for attend(); the queries are the last n_query of the n_key positions.

    ahead: so many positions to its right a causal query sees too. place (1,): where the first query stands instead, with empty
    room behind the last, which nobody sees.

    The mask is bool, True = may be seen, or None where SDPA needs none, which is what keeps its fastest kernels. A causal
    block of queries behind a context needs the lower-right alignment; SDPA's own is_causal aligns to the upper left.
    A query always sees itself: a row that is masked as a whole would be NaN.
    """
    if place is None and pad_mask is None and (not causal or n_query == 1):
        return None, False
    if place is None and pad_mask is None and n_query == n_key and not ahead:
        return None, True
    first = n_key - n_query if place is None else place
    columns = torch.arange(n_key, device=device)                                         # (L,)
    rows = (first + torch.arange(n_query, device=device))[:, None]                       # (T, 1): the column of each query
    last = first + n_query - 1
    mask = columns <= ((rows + ahead).clamp(max=last) if causal else last)               # (T, L), or (L,) for all queries
    if pad_mask is not None:
        seen = F.pad(~pad_mask, (0, n_key - pad_mask.size(1)), value=True)  # (B, L): targets are never masked
        mask = (mask & seen[:, None, None, :]) | (columns == rows)                       # (B, 1, T, L)
    return mask.expand(*mask.shape[:-2], n_query, n_key), False


def attend(q, k, v, mask, is_causal):
    """Return what queries (B, H, T, D) read of keys and values (B, H, L, D), by attention_mask()'s answer: (B, H, T, D).

    PyTorch's kernel, but where a CPU trains in bfloat16: there it takes up to five times as long, both passes together, as the
    products it consists of (measured with AMX). Written out, a layer keeps T x L weights (so not for long texts), and scores
    are rounded to bfloat16, which is exact enough because QK-norm bounds them.
    """
    write_out = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad and k.size(2) <= 512
    if not write_out:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
    scores = q * q.size(-1) ** -0.5 @ k.mT                                               # (B, H, T, L)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()                    # (T, L)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1) @ v


def joined(past, k, v):
    """Return keys and values (B, H, L, D), those of `past` first: (keys, values, places), places None or those of k and v.

    With places (T,) all of `past` is returned, with room behind k and v, which are written into it: no gradient survives that.
    """
    if past is None:
        return k, v
    keys, values, places = past
    if places is None:
        return torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
    return keys.index_copy_(2, places, k.type_as(keys)), values.index_copy_(2, places, v.type_as(values))


def waves(start, n, dim, device, base=10000.0):
    """Return (cos, sin), each (n, dim / 2), of positions start .. start+n-1 at wavelengths of 2 pi to 2 pi base."""
    frequencies = base ** torch.linspace(0, 2 / dim - 1, dim // 2, device=device)
    angles = (start + torch.arange(n, device=device, dtype=torch.float32))[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x, turn):
    """Turn each pair of x (B, T, n, H, D), dimensions 2i and 2i + 1, as a complex number; turn (T, 1, 1, D/2, 2): cos, sin.

    Rotary position embedding (arXiv 2104.09864): angles grow with the column, so scores depend on distances only, and padding
    shifts nothing.
    """
    pairs = x.view(*x.shape[:-1], x.size(-1) // 2, 2)                                    # (B, T, n, H, D/2, 2)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # one operation; complex numbers have no bfloat16
        pairs = pairs.to(torch.promote_types(x.dtype, torch.float32))
        pairs = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turn))
    else:
        (a, b), (cos, sin) = pairs.unbind(-1), turn.unbind(-1)
        pairs = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return pairs.flatten(-2).type_as(x)


def rms_norm(x):
    """RMSNorm over the last dimension (arXiv 1910.07467), 0 for 0. No gain: the linear layer behind it can hold one.

    Differentiable once.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not x.numel():
        return F.rms_norm(x, x.shape[-1:], eps=1e-12)
    # On a CPU PyTorch has no kernel for it, but one for weight normalisation (arXiv 1602.07868), which gives each row a length.
    rows = x.reshape(-1, x.size(-1)).contiguous()                                        # (N, C)
    length = rows.new_full((len(rows), 1), x.size(-1) ** 0.5)
    y, norm = torch._weight_norm_interface(rows, length, 0)                              # (N, C), (N, 1)
    if not norm.min().item() > 0:
        some = norm != 0  # so nan stays nan
        y = torch._weight_norm(rows.where(some, 1.0), length, 0).where(some, 0.0)  # else 0 / 0, and its gradient nan
    return y.view_as(x)


class SquaredReLU(torch.autograd.Function):
    """relu(x)^2 with its own backward pass, 2 relu(x): two operations instead of four, the same bits. Differentiable once."""

    @staticmethod
    def forward(ctx, x):
        h = x.relu_()
        ctx.save_for_backward(h)
        return h * h

    @staticmethod
    def backward(ctx, grad):
        h, = ctx.saved_tensors
        return (grad * h).mul_(2)


def squared_relu(x):
    """Return relu(x)^2 (arXiv 2109.08668), in the memory of x where it is no longer needed: pass what nobody else reads."""
    if torch.compiler.is_compiling():
        return F.relu(x).square()
    return SquaredReLU.apply(x) if torch.is_grad_enabled() else x.relu_().square_()


class CrossAttention(nn.Module):
    """Attention of the targets to the output of the encoder."""

    def __init__(self, width, n_head):
        super().__init__()
        self.n_head, self.head_dim = n_head, width // n_head
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def keys_values(self, encoded, rotary):
        """Return keys and values (B, H, S, D) of the encoder's output (B, S, C)."""
        k, v = self.kv(encoded).unflatten(-1, (2, self.n_head, self.head_dim)).split(1, dim=2)
        k = rotate(rms_norm(k), rotary)                                                  # (B, S, 1, H, D)
        return tuple(t.squeeze(2).transpose(1, 2) for t in (k, v))                       # 2 x (B, H, S, D)

    def forward(self, x, rotary, keys_values, pad_mask):
        q = self.q(x).unflatten(-1, (1, self.n_head, self.head_dim))                     # (B, T, 1, H, D)
        q = rotate(rms_norm(q), rotary).squeeze(2).transpose(1, 2)                       # (B, H, T, D)
        if pad_mask is None:
            return self.out(attend(q, *keys_values, None, False).transpose(1, 2).flatten(2))
        empty = pad_mask.all(dim=1)[:, None]                                             # (B, 1): such a row must not be NaN
        seen = (~pad_mask | empty)[:, None, None, :]                                     # (B, 1, 1, S)
        a = attend(q, *keys_values, seen, False)                                         # (B, H, T, D)
        return self.out(a.transpose(1, 2).flatten(2) * ~empty[..., None])                # (B, T, C)


class Block(nn.Module):
    """Pre-norm attention (in a decoder behind an encoder, two of them) and MLP, each added to the residual stream."""

    def __init__(self, width, n_head, dropout, cross=False):
        super().__init__()
        self.n_head, self.head_dim = n_head, width // n_head
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.cross = CrossAttention(width, n_head) if cross else None
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, rotary, mask, is_causal, past=None, cross=None):
        """Return x (B, T, C) after the block, and the keys and values (B, H, L, D) it attended to, those of `past` first.

        cross: (keys and values of the encoder's output, pad_mask of the inputs).
        """
        B, T, C = x.shape
        qkv = self.qkv(rms_norm(x)).view(B, T, 3, self.n_head, self.head_dim)            # (B, T, 3, H, D)
        qk, v = qkv.split((2, 1), dim=2)
        qk = rotate(rms_norm(qk), rotary)                                                # QK-norm: scores stay bounded
        q, k, v = (t.transpose(1, 2) for t in (*qk.unbind(2), v.squeeze(2)))             # 3 x (B, H, T, D)
        k, v = joined(past, k, v)                                                        # (B, H, L, D)
        a = attend(q, k, v, mask, is_causal)                                             # (B, H, T, D)
        a = a.transpose(1, 2).reshape(B, T, C)                                           # (B, T, C)
        x = x + self.dropout(self.attention_out(a))
        if self.cross is not None:
            x = x + self.dropout(self.cross(x, rotary, *cross))  # normalised there, as QK-norm
        h = squared_relu(self.mlp_in(rms_norm(x)))                                       # (B, T, 4C)
        return x + self.dropout(self.mlp_out(h)), (k, v)


class NoisyVectors(nn.Module):
    """What embedding diffusion adds: a unit vector of width D_e per token, and a way of noised vectors into the model."""

    def __init__(self, vocab_size, vector_width, width):
        super().__init__()
        self.table = nn.Embedding(vocab_size, vector_width)
        self.vectors_in = nn.Linear(2 * vector_width, width, bias=False)
        self.level_in = nn.Linear(16, width, bias=False)

    def forward(self, z, x_hat, level):
        """Return (B, T, C) from noised vectors z and an earlier estimate x_hat, both (B, T, D_e), and noise levels (B,)."""
        waves = level[:, None] * torch.arange(1, 9, device=z.device) * torch.pi                              # (B, 8)
        waves = torch.cat((waves.cos(), waves.sin()), dim=-1)                                                # (B, 16)
        return self.vectors_in(torch.cat((z, x_hat), dim=-1)) + self.level_in(waves)[:, None]


class Transformer(nn.Module):
    """A Transformer with rotary positions and sinusoids, RMSNorm, QK-norm, squared ReLU, no biases, tied embedding.

    gpt2.py's flavour overrides Block, init_weights, embed, embed_targets, make_room, rotary and logits, and nothing else.
    """
    Block = Block

    def __init__(self, vocab_size, n_layer, width, n_head, architecture="decoder-only", vector_width=0, dropout=0.0):
        super().__init__()
        self.shape = dict(vocab_size=vocab_size, n_layer=n_layer, width=width, n_head=n_head,  # goes into the checkpoint
                          architecture=architecture, vector_width=vector_width)
        has_encoder = architecture == "encoder-decoder"
        self.embedding = nn.Embedding(vocab_size, width)  # also the output layer: tied by use, so no copy can come loose
        self.encoder = nn.ModuleList(self.Block(width, n_head, dropout) for _ in range(n_layer)) if has_encoder else None
        self.blocks = nn.ModuleList(self.Block(width, n_head, dropout, cross=has_encoder) for _ in range(n_layer))
        self.dropout = nn.Dropout(dropout)
        self.noisy = NoisyVectors(vocab_size, vector_width, width) if vector_width else None  # for diffusion.py: Gaussian
        self.recompute = False  # True: activations inside a block are computed again for the backward pass (arXiv 1604.06174)
        self.init_weights()

    def init_weights(self):
        n_layer, width = self.shape["n_layer"], self.shape["width"]
        # Not smaller: Adam moves the rows of all rare tokens alike, so tied rows that start at 0.02 soon look alike as inputs.
        nn.init.normal_(self.embedding.weight, std=0.09)
        for stack, n_sums in ((self.encoder or [], 2 * n_layer), (self.blocks, (3 if self.encoder else 2) * n_layer)):
            for block in stack:
                reading, writing = [block.qkv, block.mlp_in], [block.attention_out, block.mlp_out]
                if block.cross is not None:
                    reading, writing = [*reading, block.cross.q, block.cross.kv], [*writing, block.cross.out]
                for linear in reading:
                    nn.init.normal_(linear.weight, std=width ** -0.5)  # keeps the variance of a normalised input
                for linear in writing:  # n_sums of these add up in the residual stream
                    nn.init.normal_(linear.weight, std=linear.in_features ** -0.5 / n_sums ** 0.5)

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    def run_block(self, block, *args):
        """Return what the block makes of its arguments, keeping its activations or not."""
        return checkpoint(block, *args, use_reentrant=False) if self.recompute and self.training else block(*args)

    def embed(self, inputs, pad_mask):
        """Return (B, S, C) for input tokens (B, S); here neither padding nor place matters: rotary angles tell distances."""
        return self.dropout(rms_norm(self.embedding(inputs)))

    def embed_targets(self, y, context, start=0):
        """Return (B, T, C) for tokens (B, T), or for vectors (B, T, C) in their place, behind `start` targets, int or (1,).

        Rotary angles tell distances only, from what can be recognised. Targets that are all MASK, or all noise, cannot: each is
        also told where it stands, by the sinusoids of the first Transformer (arXiv 1706.03762).
        """
        x = rms_norm(y if y.is_floating_point() else self.embedding(y))
        places = torch.cat(waves(start, y.size(1), x.size(-1), y.device), dim=-1)        # (T, C)
        return self.dropout(x + places.to(self.embedding.weight.dtype))

    def rotary(self, start, n):
        """Return the cos and sin of the angles of positions start .. start+n-1, as rotate() wants them."""
        angles = waves(start, n, self.shape["width"] // self.shape["n_head"], self.embedding.weight.device)
        return torch.stack(angles, dim=-1)[:, None, None]                                # (n, 1, 1, D/2, 2)

    def encode(self, inputs, pad_mask=None, attention="causal"):
        """Encode the inputs once for any number of decode() calls.

        inputs (B, S) tokens, padded on the left; S = 0 makes a plain language model. pad_mask (B, S) bool, True = padding, or
        None. attention: causal (the paper's AR stage), bidirectional, or full (inputs see the targets too; nothing is cached).
        """
        one_of("inputs attention", attention, INPUTS_ATTENTION)
        n_layer, S = len(self.blocks), inputs.size(1)
        check(self.encoder is None or (S > 0 and attention != "full"),
              "an encoder-decoder needs inputs (input_len above 0), and they cannot see the targets (attention 'full')")
        if S == 0 or attention == "full":
            return Context([None] * n_layer, [None] * n_layer, pad_mask if S else None, inputs=inputs if S else None)
        x, rotary = self.embed(inputs, pad_mask), self.rotary(-S, S)                    # (B, S, C)
        mask, is_causal = attention_mask(S, S, attention == "causal", pad_mask, inputs.device)
        keys_values = []
        for block in self.encoder or self.blocks:
            x, cached = self.run_block(block, x, rotary, mask, is_causal)               # (B, S, C)
            keys_values.append(cached)
        if self.encoder is None:
            return Context(*map(list, zip(*keys_values)), pad_mask)
        x = rms_norm(x)
        cross = [block.cross.keys_values(x, rotary) for block in self.blocks]
        return Context([None] * n_layer, [None] * n_layer, pad_mask, cross=cross)

    def decode(self, y, context, attention, extend=False):
        """Return logits (B, T, V) for the targets y, which see the context and, causally or not, each other.

        y holds tokens (B, T), or vectors (B, T, C) in embedding diffusion. attention: causal, bidirectional, or between the two
        a whole number: how many targets to its right each one sees.

        extend=True appends the keys and values of y to the context: the KV cache of AR decoding, one token a call.
        """
        if extend or context.place is not None:
            self.make_room(context, y)
        x = self.states(y, context, attention)
        if extend:
            context.n_targets += y.size(1)
            context.place += y.size(1)
        return self.logits(x)

    def make_room(self, context, y):
        """Let the context's cache hold the keys and values of y (B, T) too. Its size doubles when it is full: few shapes."""
        check(context.inputs is None, "inputs attention 'full' needs bidirectional targets, all at once: nothing can be cached")
        old, (n_head, width) = context.keys[0], (self.shape["n_head"], self.shape["width"])
        n_old = 0 if old is None else old.size(2)
        if context.place is None:
            context.place = torch.tensor([n_old], device=y.device)
            context.n_inputs = n_old
        used = context.n_inputs + context.n_targets
        if used + y.size(1) <= n_old:
            return
        size = max(2 * n_old, used + y.size(1), 64)
        for cache in (context.keys, context.values):
            for i, old in enumerate(cache):
                like = self.embedding.weight if old is None else old
                cache[i] = like.new_zeros(len(y), n_head, size, width // n_head)
                if old is not None:
                    cache[i][:, :, :used] = old[:, :, :used]

    def states(self, y, context, attention):
        """Return what decode() makes its logits of: the residual stream (B, T, C) behind the last block."""
        ahead = attention if isinstance(attention, int) else 0
        one_of("targets attention", "causal" if isinstance(attention, int) else attention, TARGETS_ATTENTION)
        if context.inputs is not None:
            return self._states_full(y, context, attention)
        T, place = y.size(1), context.place
        n_key = (0 if context.keys[0] is None else context.keys[0].size(2)) + (T if place is None else 0)
        start = 0 if place is None else place - context.n_inputs  # of y among the targets
        x, rotary = self.embed_targets(y, context, start), self.rotary(start, T)        # (B, T, C)
        pad_mask = context.pad_mask if context.cross is None else None  # else there are no inputs among these keys
        mask, is_causal = attention_mask(T, n_key, attention != "bidirectional", pad_mask, y.device, ahead, place)
        places = None if place is None else place + torch.arange(T, device=y.device)    # (T,) of y in the cache
        for i, block in enumerate(self.blocks):
            past = None if context.keys[i] is None else (context.keys[i], context.values[i], places)
            cross = None if context.cross is None else (context.cross[i], context.pad_mask)
            x, _ = self.run_block(block, x, rotary, mask, is_causal, past, cross)       # (B, T, C)
        return x

    def _states_full(self, y, context, attention):
        """The literal reading of the paper's "bidirectional": one joint pass over [inputs; y] in which all see all."""
        if attention != "bidirectional":
            raise UserError("inputs attention 'full' needs bidirectional targets: it would leak them to an AR model")
        inputs = self.embed(context.inputs, context.pad_mask)                           # (B, S, C)
        x = torch.cat((inputs, self.embed_targets(y, context)), dim=1)                  # (B, L, C)
        rotary = self.rotary(-context.inputs.size(1), x.size(1))
        mask, is_causal = attention_mask(x.size(1), x.size(1), False, context.pad_mask, y.device)
        for block in self.blocks:
            x, _ = self.run_block(block, x, rotary, mask, is_causal)
        return x[:, -y.size(1):]                                                        # (B, T, C)

    def logits(self, x):
        """Return the logits (B, T, V) of the residual stream x (B, T, C)."""
        # Tied rows echo the token that was fed, by a logit that grows with C: it would start base at twice log V. Scaled by 1/C
        # (muP's output multiplier, arXiv 2203.03466) loss and learning rate start alike at every width.
        return F.linear(rms_norm(x) * (128 / x.size(-1)), self.embedding.weight)
