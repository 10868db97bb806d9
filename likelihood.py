"""Bits per token and per byte: the likelihood of held-out text, exact for AR, an upper bound for diffusion.

The bounds of diffusion.py are compared with the exact number of an AR model on the same targets: lower is better, and a bound
may be loose, so a diffusion model is at least this good. A mean denoising loss is no likelihood and cannot be compared so.
"""
import math
from typing import NamedTuple

import torch

from config import check
from data.dataset import pad_rows
from noise import Noise


class Bits(NamedTuple):
    per_token: tuple  # (mean, standard error), over target tokens, EOS included
    per_byte: tuple  # (mean, standard error), over bytes of the target text
    n: int  # sequences


def ratio(nats, counts):
    """Return (sum of nats / sum of counts in bits, its standard error over sequences), by the delta method of a ratio."""
    nats, counts = torch.tensor(nats, dtype=torch.float64) / math.log(2), torch.tensor(counts, dtype=torch.float64)
    value, n = nats.sum() / counts.sum(), len(nats)
    error = (nats - value * counts).norm() * math.sqrt(n / (n - 1)) / counts.sum() if n > 1 else math.nan
    return float(value), float(error)


def task_batches(examples, writer, batch_size):
    """Return (batches, number of examples left out) of a task's examples, those that fit the model's canvas."""
    encode = writer.tokenizer.encode_batch
    pairs = zip(encode([e["input"] for e in examples]), encode([e["target"] for e in examples]))
    rows = [(i, t) for i, t in pairs if len(i) <= writer.input_len and len(t) < writer.target_len]
    check(rows, f"not one of {len(examples)} examples fits the canvas of {writer.input_len} + {writer.target_len} tokens")
    batches = [pad_rows(rows[k:k + batch_size], writer.tokenizer, writer.input_len, writer.target_len)
               for k in range(0, len(rows), batch_size)]
    return batches, len(examples) - len(rows)


def bits(writer, batches, n_draws, seed):
    """Return Bits of a model on batches, by n_draws noise levels per sequence (AR needs none)."""
    tokenizer, nats, n_tokens, n_bytes = writer.tokenizer, [], [], []
    for batch in batches:
        rows = range(len(nats), len(nats) + len(batch.targets))
        noise = Noise(seed, "valid", 0, rows)
        nats += writer.bound(batch, noise, n_draws).tolist()
        n_tokens += (batch.targets != tokenizer.pad).sum(dim=1).tolist()
        n_bytes += [tokenizer.n_bytes(row) for row in batch.targets.tolist()]
    return Bits(ratio(nats, n_tokens), ratio(nats, n_bytes), len(nats))
