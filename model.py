"""One Transformer behind two calls. Whether it is autoregressive or a diffusion model is decided by whoever calls it:

    context = model.encode(inputs, pad_mask, attention)            # the conditioning text, never noised
    logits  = model.decode(y, context, attention)                  # (B, T, V)

    AR:         y = [start, x0[:-1]],  attention = "causal"          logits[:, i] predicts x0[:, i]
    diffusion:  y = xt, noised x0,     attention = "bidirectional"   logits[:, i] predicts x0[:, i]

So AR2Diff (arXiv 2401.17181, Figure 2) changes three arguments and no weight: y, what targets may see, and, unless one says
--inputs_attention=causal, what inputs may see (each other both ways; an encoder's always do). Loss and sampler change too.
Inputs never see targets (but for an option, --inputs_attention=full): encode() computes them once; decode() uses that for both
passes of the loss, all steps and all samples; AR decoding appends its own tokens, and read() a finished text.

Two architectures. decoder-only: targets attend to the keys and values that the same blocks made of the inputs, and to each
other. encoder-decoder (as T5): inputs pass a stack of their own, and targets attend to its output.

Shapes: B sequences, S input columns, T target columns, L = columns seen, C width, H heads, D = C / H, V vocabulary.
Inputs are padded on the left, targets on the right. Positions count from the border: targets at 0, 1, ..., inputs at ..., -1.
"""
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from engine.cli import check, one_of

INPUTS_ATTENTION = ("causal", "bidirectional", "full")  # full: inputs also see the targets
ARCHITECTURES = ("decoder-only", "encoder-decoder")


@dataclass
class Context:
    """What decode() needs to know of the inputs. AR decoding appends to keys and values: then they are its KV cache."""
    keys: list  # n_layer x (B, H, S + n_targets, D) for self-attention, None where there is nothing to see
    values: list  # likewise; in an encoder-decoder both hold targets only
    pad_mask: torch.Tensor | None  # (B, S) bool, True = padding; None = no padding
    n_targets: int = 0  # target columns that were appended
    border: int = 0  # position of the first target; more than 0 where finished texts were read behind the inputs
    inputs: torch.Tensor | None = None  # (B, S) tokens, kept only for the `full` pattern, which can cache nothing
    cross: list | None = None  # encoder-decoder: n_layer x (keys, values) of the encoder's output

    def repeat(self, n):
        """Return the context with every row n times in a row: n samples share one encoding of their input."""
        rows = lambda x: None if x is None else x.repeat_interleave(n, dim=0)
        return replace(self, keys=[rows(k) for k in self.keys], values=[rows(v) for v in self.values], inputs=rows(self.inputs),
                       pad_mask=rows(self.pad_mask), cross=self.cross and [(rows(k), rows(v)) for k, v in self.cross])


def attention_mask(n_query, n_key, causal, pad_mask, device):
    """Return (mask, is_causal) for attention; the queries are the last n_query of the n_key columns.

    mask: bool, True = may be seen. None lets PyTorch choose its fastest kernel, and is_causal too, which is right only where
    n_query == n_key. A query always sees itself, else a row of padding alone would be NaN.
    """
    if pad_mask is None and (not causal or n_query == 1):
        return None, False
    if pad_mask is None and n_query == n_key:
        return None, True
    column = torch.arange(n_key, device=device)                                          # (L,)
    own = column[n_key - n_query:, None]                                                 # (T, 1): where each query stands
    mask = (column <= own) | (not causal)                                                # (T, L)
    if pad_mask is not None:
        real = F.pad(~pad_mask, (0, n_key - pad_mask.size(1)), value=True)               # (B, L): targets are never masked
        mask = (mask & real[:, None, None, :]) | (column == own)                         # (B, 1, T, L)
    return mask, False


def waves(start, n, dim, device, base=10000.0):
    """Return (cos, sin), each (n, dim / 2), of positions start .. start+n-1, wavelengths 2 pi to 2 pi base^(1 - 2/dim)."""
    frequencies = base ** torch.linspace(0, 2 / dim - 1, dim // 2, device=device)
    angles = (start + torch.arange(n, device=device, dtype=torch.float32))[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x, rotary):
    """Rotary position embedding (arXiv 2104.09864): turn each pair (2i, 2i + 1) of x (B, H, T, D) by its column's angle.

    rotary: (cos, sin), each (T, D / 2). Angles grow with the column, so a score depends on the distance of two columns only.
    """
    a, b, (cos, sin) = x[..., 0::2], x[..., 1::2], rotary
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).type_as(x)


def rms_norm(x):
    """RMSNorm over the last dimension (arXiv 1910.07467). No gain: the linear layer behind it can hold one."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-12)


class CrossAttention(nn.Module):
    """Attention of the targets to the output of the encoder."""

    def __init__(self, width, n_head):
        super().__init__()
        self.n_head = n_head
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def keys_values(self, encoded, rotary):
        """Return keys and values (B, H, S, D) of the encoder's output (B, S, C)."""
        k, v = self.kv(encoded).unflatten(-1, (2, self.n_head, -1)).transpose(1, 3).unbind(2)  # 2 x (B, H, S, D)
        return rotate(rms_norm(k), rotary), v

    def forward(self, x, rotary, keys_values, pad_mask):
        q = rotate(rms_norm(self.q(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)), rotary)  # (B, H, T, D)
        if pad_mask is None:
            return self.out(F.scaled_dot_product_attention(q, *keys_values).transpose(1, 2).flatten(2))
        empty = pad_mask.all(dim=1)[:, None]                                             # (B, 1): such a row must not be NaN
        seen = (~pad_mask | empty)[:, None, None, :]                                     # (B, 1, 1, S)
        a = F.scaled_dot_product_attention(q, *keys_values, attn_mask=seen)              # (B, H, T, D)
        return self.out(a.transpose(1, 2).flatten(2) * ~empty[..., None])                # (B, T, C)


class Block(nn.Module):
    """Pre-norm attention (two of them in the decoder of an encoder-decoder) and MLP, each added to the residual stream."""

    def __init__(self, width, n_head, dropout, cross=False):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.cross = CrossAttention(width, n_head) if cross else None
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, rotary, mask, is_causal, past=None, cross=None):
        """Return x (B, T, C) after the block, and the keys and values (B, H, L, D) it attended to, those of `past` first."""
        qkv = self.qkv(rms_norm(x)).unflatten(-1, (3, self.n_head, -1))                  # (B, T, 3, H, D)
        q, k, v = qkv.transpose(1, 3).unbind(2)                                          # 3 x (B, H, T, D)
        q, k = rotate(rms_norm(q), rotary), rotate(rms_norm(k), rotary)  # QK-norm: scores stay bounded
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)        # (B, H, L, D)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)  # (B, H, T, D)
        x = x + self.dropout(self.attention_out(a.transpose(1, 2).flatten(2)))           # (B, T, C)
        if self.cross is not None:  # cross: (keys and values of the encoder's output, pad_mask of the inputs)
            x = x + self.dropout(self.cross(x, rotary, *cross))
        h = F.relu(self.mlp_in(rms_norm(x))).square()                                    # (B, T, 4C), arXiv 2109.08668
        return x + self.dropout(self.mlp_out(h)), (k, v)


class NoisyVectors(nn.Module):
    """What embedding diffusion adds: a vector of width D_e per token, and a way of noised vectors into the model."""

    def __init__(self, vocab_size, vector_width, width):
        super().__init__()
        self.table = nn.Embedding(vocab_size, vector_width)
        self.vectors_in = nn.Linear(2 * vector_width, width, bias=False)
        self.level_in = nn.Linear(16, width, bias=False)

    def forward(self, z, x_hat, level):
        """Return (B, T, C) from noised vectors z and an earlier estimate x_hat, both (B, T, D_e), and noise levels (B,)."""
        angles = level[:, None] * torch.arange(1, 9, device=z.device) * torch.pi         # (B, 8)
        angles = torch.cat((angles.cos(), angles.sin()), dim=-1)                         # (B, 16)
        return self.vectors_in(torch.cat((z, x_hat), dim=-1)) + self.level_in(angles)[:, None]


class SelfConditioning(nn.Module):
    """A way into the model for what it believed a pass before, as DiffusionGemma has it (the idea: arXiv 2208.04202)."""

    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.gate, self.up, self.out = (nn.Linear(width, width, bias=False) for _ in range(3))
        nn.init.zeros_(self.out.weight)  # AR weights begin as if it were not there

    def forward(self, x, belief):
        """Return embeddings x (B, T, C) with soft embeddings (B, T, C) mixed in, as long as they were; zeros change nothing."""
        h = rms_norm(belief) * self.gain                                                 # (B, T, C)
        mixed = x + self.out(F.silu(self.gate(h)) * self.up(h))
        return mixed * (x.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True))


class Transformer(nn.Module):
    """A Transformer with rotary positions and sinusoids, RMSNorm, QK-norm, squared ReLU, no biases, tied embedding.

    A "flavour" of it for published weights (pretrained/) overrides Block, init_weights, embed, embed_targets, rotary, logits.
    """
    Block = Block

    def __init__(self, vocab_size, n_layer, width, n_head, architecture="decoder-only", vector_width=0, dropout=0.0,
                 self_condition=False):
        super().__init__()
        self.shape = dict(vocab_size=vocab_size, n_layer=n_layer, width=width, n_head=n_head,  # goes into the checkpoint
                          architecture=architecture, vector_width=vector_width, self_condition=self_condition)
        has_encoder = architecture == "encoder-decoder"
        self.embedding = nn.Embedding(vocab_size, width)  # also the output layer: one tensor, used twice
        self.encoder = nn.ModuleList(self.Block(width, n_head, dropout) for _ in range(n_layer)) if has_encoder else None
        self.blocks = nn.ModuleList(self.Block(width, n_head, dropout, cross=has_encoder) for _ in range(n_layer))
        self.dropout = nn.Dropout(dropout)
        # For diffusion.py: Gaussian, whose estimate is a point where its noise is, so that both enter by one layer; and Uniform
        self.noisy = NoisyVectors(vocab_size, vector_width, width) if vector_width else None
        self.self_conditioning = SelfConditioning(width) if self_condition else None
        self.init_weights()

    def init_weights(self):
        n_layer, width = self.shape["n_layer"], self.shape["width"]
        # 0.02 would be too small: Adam pushes the rows of all rare tokens the same way, and small rows soon look alike.
        nn.init.normal_(self.embedding.weight, std=0.09)
        for stack, cross, n_sums in ((self.encoder or [], False, 2 * n_layer),
                                     (self.blocks, self.encoder is not None, (3 if self.encoder else 2) * n_layer)):
            for block in stack:
                for linear in (block.qkv, block.mlp_in, *([block.cross.q, block.cross.kv] if cross else [])):
                    nn.init.normal_(linear.weight, std=width ** -0.5)  # keeps the variance of a normalised input
                for linear in (block.attention_out, block.mlp_out, *([block.cross.out] if cross else [])):  # n_sums add up
                    nn.init.normal_(linear.weight, std=linear.in_features ** -0.5 / n_sums ** 0.5)

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    def embed(self, inputs, context):
        """Return (B, S, C) for input tokens (B, S). context is for models with absolute positions (pretrained/gpt2.py)."""
        return self.dropout(rms_norm(self.embedding(inputs)))

    def embed_targets(self, y, context):
        """Return (B, T, C) for tokens (B, T), or for vectors (B, T, C) in their place, after context.n_targets others."""
        x = rms_norm(y if y.is_floating_point() else self.embedding(y))
        # Distances, all that rotary angles give, say little when all targets are noise: so each is also told its position, by
        # the sinusoids of the first Transformer (arXiv 1706.03762).
        places = torch.cat(waves(context.n_targets, y.size(1), x.size(-1), y.device), dim=-1)  # (T, C)
        return self.dropout(x + places.to(self.embedding.weight.dtype))

    def rotary(self, start, n):
        """Return (cos, sin), each (n, D / 2), of positions start .. start+n-1, for rotate()."""
        return waves(start, n, self.shape["width"] // self.shape["n_head"], self.embedding.weight.device)

    def encode(self, inputs, pad_mask=None, attention="causal"):
        """Return the Context of inputs (B, S), padded on the left, for any number of decode() calls; S = 0: a language model.

        attention: causal (the paper's AR stage), bidirectional, or full (inputs see the targets too; nothing is cached).
        """
        one_of("inputs attention", attention, INPUTS_ATTENTION)
        nothing, S = [None] * len(self.blocks), inputs.size(1)
        check(self.encoder is None or (S > 0 and attention != "full"),
              "an encoder-decoder needs inputs (input_len above 0), and they cannot see the targets (attention 'full')")
        context = Context(nothing, nothing[:], pad_mask if S else None)
        if S == 0 or attention == "full":
            context.inputs = inputs if S else None
        elif self.encoder is None:
            self.through(self.embed(inputs, context), context, attention == "causal", -S, extend=True)
        else:
            x, rotary = self.embed(inputs, context), self.rotary(-S, S)                  # (B, S, C)
            mask, is_causal = attention_mask(S, S, attention == "causal", pad_mask, inputs.device)
            for block in self.encoder:
                x, _ = block(x, rotary, mask, is_causal)                                 # (B, S, C)
            context.cross = [block.cross.keys_values(rms_norm(x), rotary) for block in self.blocks]
        return context

    def read(self, tokens, context):
        """Append tokens (B, n) to the context as inputs, causally: what is written next is written behind them."""
        self.through(self.embed(tokens, context), context, True, context.border, extend=True)
        context.border += tokens.size(1)

    def decode(self, y, context, attention, extend=False, belief=None):
        """Return logits (B, T, V) for the targets y, which see the context and, causally or not, each other.

        y holds tokens (B, T), or vectors (B, T, C) in embedding diffusion. extend=True appends its keys and values to the
        context: the KV cache of AR decoding, one token a call. belief (B, T, C): what believe() made of an earlier pass.
        """
        return self.logits(self.states(y, context, attention, extend, belief))

    def states(self, y, context, attention, extend=False, belief=None):
        """Return the residual stream (B, T, C) after the last block; logits() is the rest of decode()."""
        one_of("targets attention", attention, ("causal", "bidirectional"))
        T, first, x = y.size(1), context.border + context.n_targets, self.embed_targets(y, context)  # (B, T, C)
        if belief is not None:
            x = self.self_conditioning(x, belief)
        if context.inputs is not None:  # the literal reading of the paper's "bidirectional": all of [inputs; y] see all
            check(attention == "bidirectional" and not extend, "inputs attention 'full' needs bidirectional targets, all at "
                                                               "once: it would leak them to an AR model")
            first, x = -context.inputs.size(1), torch.cat((self.embed(context.inputs, context), x), dim=1)  # (B, S + T, C)
        x = self.through(x, context, attention == "causal", first, extend)
        context.n_targets += T if extend else 0
        return x[:, -T:]                                                                 # (B, T, C)

    def through(self, x, context, causal, first, extend=False):
        """Pass columns x (B, n, C) at positions first, ... through the blocks, where they see the context; extend: join it."""
        old, rotary = context.keys[0], self.rotary(first, x.size(1))
        n_key = x.size(1) + (0 if old is None else old.size(2))
        pad_mask = context.pad_mask if context.cross is None else None  # else the keys here are targets alone
        mask, is_causal = attention_mask(x.size(1), n_key, causal, pad_mask, x.device)
        for i, block in enumerate(self.blocks):
            past = None if old is None else (context.keys[i], context.values[i])
            cross = None if context.cross is None else (context.cross[i], context.pad_mask)
            x, seen = block(x, rotary, mask, is_causal, past, cross)                     # (B, n, C)
            if extend:
                context.keys[i], context.values[i] = seen
        return x

    @torch.no_grad()
    def believe(self, logits):
        """Return the mean embedding (B, T, C) of the tokens that logits (B, T, V) predict."""
        return logits.softmax(-1).to(self.embedding.weight.dtype) @ self.embedding.weight

    def logits(self, x):
        """Return the logits (B, T, V) of the residual stream x (B, T, C)."""
        # Tied rows echo the token that was fed, by a logit that grows with C: at C = 768 AR would start at five times log V.
        # Scaled by 1/C (muP, arXiv 2203.03466; 1 at C = 128) loss and learning rate start alike at every width.
        return F.linear(rms_norm(x) * (128 / x.size(-1)), self.embedding.weight)
