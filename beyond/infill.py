r"""What diffusion can do by construction and AR cannot: fill gaps between fixed text.

    python sample.py out/ar2diff_code --infill="def f(data):\n    return___(data,___)"
    python eval.py out/ar2diff_code --middle --allow_code_execution

The text around the gaps is `frozen` in generate() (diffusion.py). A canvas has fixed columns, so text behind a gap fixes the
gap's length: all are tried, and the likeliest by the bound of likelihood.py is kept. A space before a gap belongs to the gap.
"""
import itertools
import re
import time
from dataclasses import replace

import torch

from data.dataset import pad_rows, tokenized
from engine.cli import check
from engine.noise import Noise

GAP = "___"  # or longer
MAX_ROWS = 64  # choices of gap lengths that are decoded together


def canvases(template, tokenizer, target_len, gap_len):
    """Return targets (R, T) int64 and frozen (R, T) bool, a row for each choice of gap lengths that fits; R >= 1.

    A gap that text follows has 1 to gap_len tokens; one at the end is open: the model decides where it ends. Raises UserError.
    """
    typed = re.sub(r"\\([\\n])", lambda escape: {"n": "\n"}.get(escape[1], "\\"), template)
    *before, after = re.split("_{3,}", typed)
    starts, end = [tokenizer.encode(piece.removesuffix(" ")) for piece in before], tokenizer.encode(after)
    check(starts, f"the template has no gap: write {GAP} where text is missing")
    check(gap_len >= 1, f"--gap_len={gap_len} must be at least 1")
    n_closed = len(starts) if end else len(starts) - 1
    check(gap_len ** n_closed <= MAX_ROWS, f"{n_closed} gap(s) of up to {gap_len} tokens are {gap_len ** n_closed} choices of "
                                           f"lengths, at most {MAX_ROWS} are tried; lower --gap_len")
    n_text = sum(map(len, [*starts, end]))
    check(n_text + n_closed < target_len, f"the template has {n_text} tokens, {n_text + n_closed + 1} with its gaps and EOS, "
                                          f"but the model's canvas holds {target_len}; shorten it")
    rows = []
    for lengths in itertools.product(range(1, gap_len + 1), repeat=n_closed):
        columns = []  # token, or None in a gap
        for piece, length in zip(starts, [*lengths, 0]):
            columns += [*piece, *[None] * length]
        columns += [*end, tokenizer.eos] if end else []
        if n_text + sum(lengths) < target_len:
            rows.append(columns + [tokenizer.pad if end else None] * (target_len - len(columns)))
    frozen = torch.tensor([[token is not None for token in row] for row in rows])
    return torch.tensor([[tokenizer.pad if token is None else token for token in row] for row in rows]), frozen


def infill(writer, batch, rng, template, gap_len):
    """Fill the gaps of a template for a batch of one input; return (drafts (1, T) each, function from such a row to text)."""
    tokenizer = writer.tokenizer
    targets, frozen = canvases(template, tokenizer, writer.target_len, gap_len)
    R = len(targets)
    batch = type(batch)(*(None if x is None else x.repeat_interleave(R, dim=0) for x in batch[:2]), targets)
    drafts = writer.drafts(batch, rng.split(R), frozen=frozen.to(writer.device))
    best = int(writer.bound(batch._replace(targets=drafts[-1]), rng.split(R), n_draws=16).argmin()) if R > 1 else 0
    n_fixed = int(frozen[best].nonzero().max()) + 1 if frozen[best].any() else 0

    def text(ids):
        ids = ids.tolist()  # EOS and PAD in a gap that text follows mean that nothing is there
        return tokenizer.decode([i for i in ids[:n_fixed] if i < tokenizer.n_text] + ids[n_fixed:])
    return [draft[best:best + 1] for draft in drafts], text


def fill(writer, batch, first, last, seed, index):
    """Return (ids (T,), evaluations) of one target, columns first .. last-1 written by the model; batch: of one row.

    AR sees the left side alone. With n_samples above 1 it guesses so many gaps, and the likeliest *whole* is kept: then the
    right side has its say, too.
    """
    noise = Noise(seed, "generate", 0, [index])
    if writer.process.name != "ar":
        frozen = torch.ones_like(batch.targets, dtype=torch.bool)
        frozen[:, first:last] = False
        drafts = writer.drafts(batch, noise, frozen=frozen.to(writer.device))
        return drafts[-1][0], len(drafts) - 1
    n = writer.options["n_samples"]
    batch = type(batch)(*(None if x is None else x.repeat_interleave(n, dim=0) for x in batch)).to(writer.device)
    gap = batch._replace(targets=batch.targets[:, first:last])
    writer = replace(writer, options=writer.options | {"n_samples": 1})
    drafts = writer.drafts(gap, noise.split(n), prefix=batch.targets[:, :first] if first else None)
    wholes = batch.targets.clone()
    wholes[:, first:last] = drafts[-1]
    best = writer.bound(batch._replace(targets=wholes), noise.split(n), 1).argmin() if n > 1 else 0
    return wholes[best], len(drafts) - 1 + (n > 1)


def middle(writer, examples, config):
    """Return what eval.answer() does, of targets whose middle third the model fills: the number of its tokens is known."""
    tokenizer, predictions = writer.tokenizer, [[""] for _ in examples]
    facts = dict(too_long=0, unfinished=0, early=0, tokens=0, evaluations=0, seconds=0.0)
    for i, (ids, target) in enumerate(tokenized(examples, tokenizer)):
        if len(ids) > writer.input_len or not 0 < len(target) < writer.target_len:
            facts["too_long"] += 1
            continue
        first, last, start = len(target) // 3, max(len(target) // 3 + 1, 2 * len(target) // 3), time.perf_counter()
        batch = pad_rows([(ids, target)], tokenizer, writer.input_len, writer.target_len)
        filled, n = fill(writer, batch, first, last, config.seed, i)
        facts["seconds"] += time.perf_counter() - start
        facts["evaluations"] += n
        facts["tokens"] += last - first
        predictions[i] = [tokenizer.decode([token for token in filled.tolist()[:len(target)] if token < tokenizer.n_text])]
    return predictions, facts
