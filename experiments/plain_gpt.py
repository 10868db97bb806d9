"""The yardstick of bench.py: a language model of GPT-2's blocks, with nothing of ours in it."""
import torch.nn as nn
import torch.nn.functional as F


class PlainBlock(nn.Module):
    """GPT-2's block: LayerNorm, biases, GELU."""

    def __init__(self, width, n_head):
        super().__init__()
        self.n_head = n_head
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class PlainGPT(nn.Module):
    """GPT-2's blocks, learned positions, tied embedding."""

    def __init__(self, vocab_size, n_layer, width, n_head, n_positions):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(n_positions, width)
        self.blocks = nn.ModuleList(PlainBlock(width, n_head) for _ in range(n_layer))
        self.norm = nn.LayerNorm(width)
        for weight in (self.embedding.weight, self.positions.weight):
            nn.init.normal_(weight, std=0.02)

    def forward(self, tokens):
        """Return the mean loss over all tokens (B, L + 1) but the first."""
        x = self.embedding(tokens[:, :-1]) + self.positions.weight[:tokens.size(1) - 1]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(F.linear(self.norm(x), self.embedding.weight).flatten(0, 1).float(), tokens[:, 1:].flatten())
