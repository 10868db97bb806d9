"""Texts longer than a canvas: a finished canvas joins what was read, causally, and the next one is written behind it.

    python train_diff.py --data=text --init_from=out/ar --inputs_attention=causal --n_canvases=4 --out_dir=out/long
    python sample.py out/long --prompt="def main(" --n_tokens=512

Block-autoregressive, as DiffusionGemma writes; the cache is AR decoding's (model.py: read). Training: dataset.py: Canvases.
"""
import copy
from dataclasses import replace

import torch

from engine.cli import check


def reader(model, context):
    """Return a model of the same weights that has read: its encode() gives the context, whatever there is to encode."""
    model = copy.copy(model)
    model.encode = lambda *_: context.repeat(1)  # a copy: AR decoding appends to it
    return model


def check_canvases(writer, n_tokens):
    """Raise UserError where a model cannot write n_tokens canvas by canvas."""
    T, process = writer.target_len, writer.process
    check(n_tokens >= T and n_tokens % T == 0, f"--n_tokens={n_tokens} must be a multiple of the canvas, {T} tokens")
    check(process.name != "speculative", "--n_tokens and --drafter do not go together: drafts are of one canvas")
    check(getattr(process, "shift", None) is None, "--n_tokens: a shifted model begins where AR does, and writes one canvas")
    check(process.name != "ar" or writer.input_len, "--n_tokens: a plain AR language model has no canvas; say --target_len")
    check(process.inputs_attention != "full" and not writer.model.encoder,
          "--n_tokens: behind inputs that see the targets, or that an encoder read, nothing can be read on")


def write(writer, batch, noise_of, n_tokens):
    """Return drafts (B, n), growing, of n_tokens behind the inputs; noise_of(k): random numbers for canvas k.

    A row that has written EOS is finished: what follows is PAD.
    """
    model, process, pad, eos = writer.model, writer.process, writer.tokenizer.pad, writer.tokenizer.eos
    batch = batch.to(writer.device)
    with torch.no_grad(), writer.autocast():
        context = model.encode(batch.inputs, batch.pad_mask, process.inputs_attention)
    drafts, written = [], batch.targets[:, :0]
    for k in range(n_tokens // writer.target_len):
        done = (written == eos).any(dim=1, keepdim=True)
        canvas = replace(writer, model=reader(model, context)).drafts(batch, noise_of(k))
        drafts += [torch.cat((written, draft.masked_fill(done, pad)), dim=1) for draft in canvas[k > 0:]]
        written = drafts[-1]
        if written.size(1) == n_tokens or (written == eos).any(dim=1).all():
            break
        with torch.no_grad(), writer.autocast():
            model.read(canvas[-1], context)
    return drafts
