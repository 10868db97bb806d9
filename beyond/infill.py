r"""What diffusion can do by construction and AR cannot: fill gaps between fixed text.

    python sample.py out/ar2diff_code --infill="def f(data):\n    return___(data,___)"

The text around the gaps is `frozen` in generate() (diffusion.py): the model sees it at every step and never changes it. A
canvas has fixed columns, so text behind a gap fixes the gap's length. All lengths are tried, and the likeliest by the bound of
likelihood.py is kept. A space before a gap belongs to the gap, as tokens bring the space before their word along.
"""
import itertools

import torch

from engine.cli import check

GAP = "___"
MAX_ROWS = 64  # choices of gap lengths that are decoded together


def canvases(template, tokenizer, target_len, gap_len):
    """Return targets (R, T) int64 and frozen (R, T) bool, a row for each choice of gap lengths that fits; R >= 1.

    A gap that text follows has 1 to gap_len tokens; one at the end is open: the model decides where it ends. Raises UserError.
    """
    *before, after = template.replace("\\n", "\n").split(GAP)  # \n as typed on a command line
    pieces = [tokenizer.encode(piece.removesuffix(" ")) for piece in before] + [tokenizer.encode(after)]
    check(len(pieces) > 1, f"the template has no gap: write {GAP} where text is missing")
    check(gap_len >= 1, f"--gap_len={gap_len} must be at least 1")
    *starts, end = pieces
    n_closed = len(starts) if end else len(starts) - 1
    check(gap_len ** n_closed <= MAX_ROWS, f"{n_closed} gap(s) of up to {gap_len} tokens are {gap_len ** n_closed} choices of "
                                           f"lengths, at most {MAX_ROWS} are tried; lower --gap_len")
    n_text = sum(map(len, pieces))
    shortest = n_text + n_closed + 1
    check(shortest <= target_len, f"the template has {n_text} tokens, {shortest} with its gaps and EOS, but the model's canvas "
                                  f"holds {target_len}; shorten it")
    rows = []
    for lengths in itertools.product(range(1, gap_len + 1), repeat=n_closed):
        if n_text + sum(lengths) + 1 > target_len:
            continue
        columns = []  # token, or None in a gap
        for piece, length in zip(starts, [*lengths, 0]):
            columns += [*piece, *[None] * length]
        columns += [*end, tokenizer.eos] if end else []
        rest = tokenizer.pad if end else None
        rows.append(columns + [rest] * (target_len - len(columns)))
    frozen = torch.tensor([[token is not None for token in row] for row in rows])
    return torch.tensor([[tokenizer.pad if token is None else token for token in row] for row in rows]), frozen


def infill(writer, batch, rng, template, gap_len):
    """Fill the gaps of a template for a batch of one input; return (drafts (1, T) each, function from such a row to text)."""
    tokenizer = writer.tokenizer
    targets, frozen = canvases(template, tokenizer, writer.target_len, gap_len)
    R, device = len(targets), writer.device
    repeat = lambda x: None if x is None else x.repeat(R, *[1] * (x.dim() - 1))
    batch = type(batch)(repeat(batch.inputs), repeat(batch.pad_mask), targets).to(device)
    drafts = writer.drafts(batch, rng.split(R), frozen=frozen.to(device))
    best = 0
    if R > 1:
        best = int(writer.bound(batch._replace(targets=drafts[-1]), rng.split(R), n_draws=16).argmin())
    n_fixed = int(frozen[best].nonzero().max()) + 1 if frozen[best].any() else 0

    def text(ids):
        """Return the text of a row; EOS and PAD in a gap that text follows mean that nothing is there."""
        ids = ids.tolist()
        return tokenizer.decode([i for i in ids[:n_fixed] if i < tokenizer.n_text] + ids[n_fixed:])
    return [draft[best:best + 1] for draft in drafts], text
