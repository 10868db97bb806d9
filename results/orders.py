"""A masked model writes in any order. How many bits does it need from left to right, from right to left, in a random order?

    python results/orders.py out/processes/absorbing_shakespeare_4x128x4_16000 --n_examples=128

By the chain rule an ideal model needs equally many in every order, and the average over all orders is the bound that
eval.py --metric=bits reports. Each token costs one pass, so this is slow: T passes per batch and order.
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only modules of its own folder
from autoregressive import cross_entropy
from checkpoint import load_checkpoint
from config import check, parse, run
from data.dataset import open_data, read_meta
from sample import DecodeConfig, load_writer


@dataclass
class Config:
    checkpoint: str  # positional: an absorbing model, trained on text
    n_examples: int = 128  # validation windows


@torch.no_grad()
def bits(writer, batch, order):
    """Return bits per token (B,) when target l of a row is the order[:, l]-th to be revealed, (B, T)."""
    process, model, x0 = writer.process, writer.model, batch.targets
    context, total = model.encode(batch.inputs, batch.pad_mask, process.inputs_attention), 0.0
    for k in range(x0.size(1)):
        logits = process.predict(model, torch.where(order >= k, process.mask, x0), None, context)
        total = total + cross_entropy(logits, x0)[order == k]                            # one of each row
    return total / x0.size(1) / math.log(2)


def main(argv=None):
    config = parse(Config, argv)
    check(config.n_examples >= 2, f"--n_examples={config.n_examples} must be at least 2")
    writer, checkpoint = load_writer(config.checkpoint, DecodeConfig(device="cpu")), load_checkpoint(config.checkpoint)
    check(writer.process.name == "absorbing", f"{config.checkpoint} is {writer.process.name}; only masked models have an order")
    folder, objective = checkpoint["config"]["data"], checkpoint["config"]["objective"]
    check(read_meta(folder)[1]["kind"] == "text", f"{config.checkpoint} was trained on a task; this is for text")
    data = open_data(folder, writer.tokenizer, writer.input_len, writer.target_len, objective=objective)
    batch = data.valid_batch(range(config.n_examples))
    forwards = torch.arange(writer.target_len).expand(config.n_examples, -1)
    shuffled = torch.rand(forwards.shape, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    for name, order in (("left to right", forwards), ("right to left", forwards.flip(1)), ("random", shuffled)):
        found = bits(writer, batch, order)
        print(f"{name:14s}{found.mean():7.3f} +- {found.std() / len(found) ** 0.5:.3f} bits per token")


if __name__ == "__main__":
    run(main)
