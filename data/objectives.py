"""Pretraining objectives: how a row of text becomes inputs (B, S), which are given, and targets (B, T), which are learned.

    a row       Thank you for inviting me to your party last week
    prefix      Thank you for inviting me             ->  to your party last week      the border is a fixed column
    span        Thank you <0> me to your party <1>    ->  <0> for inviting <1> last week EOS
    causal                                            ->  Thank you for inviting me to your party last week

The paper compares prefix LM with span corruption (arXiv 2401.17181, Table 1). Both are T5's (arXiv 1910.10683): prefix LM in
section 3.2.3, where the border is a random one; spans in 3.1.4 and 3.3.4, at 15 % of the tokens and a mean length of 3, by the
arithmetic of its random_spans_helper. `causal` is the plain language model, S = 0.

    python train_ar.py --data=text --objective=span --input_len=128 --target_len=29

Targets that are shorter than T are filled with PAD, which is learned like any token: for spans a larger T is wasted.
"""
from collections import namedtuple

import torch
import torch.nn.functional as F

from data.tokenizer import N_SENTINELS
from engine.cli import check, one_of

DENSITY, MEAN_SPAN = 0.15, 3.0  # T5's: share of the tokens that are noised, and the mean length of a noised span
SpanLengths = namedtuple("SpanLengths", "n_noise n_spans n_inputs n_targets")


# ---- rows (B, L) -> inputs (B, S), pad_mask (B, S) or None, targets (B, T); L is what row_length() says ----
def prefix(rows, rng, tokenizer, input_len, target_len):
    """Split at column S. Nothing is random; with S = 0 this is the causal objective."""
    return rows[:, :input_len], None, rows[:, input_len:]


def span(rows, rng, tokenizer, input_len, target_len):
    """Replace random spans by sentinels 0, 1, ...; the targets are each sentinel, the span it stands for, and EOS at the end.

    Kept and noised spans alternate. As in T5 the first is kept and the last is noised: a row with one span is a prefix LM.
    """
    L = rows.size(1)
    n_noise, n_spans, _, n_targets = span_lengths(L)
    kept, noised = segments(L - n_noise, n_spans, rng), segments(n_noise, n_spans, rng)
    ends = torch.stack((kept, noised), dim=2).flatten(1).cumsum(1)                       # (B, 2 n_spans)
    starts = F.pad(ends, (1, -1))
    first = torch.zeros_like(rows, dtype=torch.bool).scatter(1, starts, True)            # (B, L): a span begins here
    number = first.cumsum(1) - 1                                                         # (B, L): 0 kept, 1 noised, 2 kept, ...
    noised, sentinel = number % 2 == 1, tokenizer.sentinels[0] + number // 2
    # The first token of a span makes room for its sentinel on the side that lacks the span, the others go. Every row keeps
    # equally many on each side, so picking from the whole batch leaves rows of one length.
    inputs = torch.where(noised, sentinel, rows)[~noised | first].view(len(rows), -1)    # (B, S)
    targets = torch.where(noised, rows, sentinel)[noised | first].view(len(rows), -1)
    targets = F.pad(targets, (0, 1), value=tokenizer.eos)
    return inputs, None, F.pad(targets, (0, target_len - n_targets), value=tokenizer.pad)


OBJECTIVES = {"prefix": prefix, "span": span, "causal": prefix}


def choose(objective, input_len):
    """Return the name of the objective; of None `prefix`, or `causal` where there are no inputs. Raises UserError."""
    objective = one_of("objective", objective or ("prefix" if input_len else "causal"), OBJECTIVES)
    check(objective != "causal" or input_len == 0, "--objective=causal has no inputs: say --input_len=0")
    check(objective == "causal" or input_len > 0, f"--objective={objective} has inputs: set --input_len above 0")
    return objective


def row_length(objective, input_len, target_len):
    """Return L, how many tokens of text fill a canvas of S + T. Raises UserError where they cannot."""
    if objective != "span":
        return input_len + target_len
    L = input_len
    while span_lengths(L + 1).n_inputs <= input_len:  # a token more is at most an input more, so the last L fills S exactly
        L += 1
    n_noise, n_spans, _, n_targets = span_lengths(L)
    flags = f"--objective=span with --input_len={input_len} gives rows of {L} tokens"
    check(n_noise > 0, f"{flags}, too short for a span: raise --input_len")
    most = next(n for n in range(L, 0, -1) if span_lengths(n).n_spans <= N_SENTINELS)
    check(most == L, f"{flags} and {n_spans} spans, but there are {N_SENTINELS} sentinels: lower --input_len to "
                     f"{span_lengths(most).n_inputs}")
    check(n_targets <= target_len, f"{flags} and targets of {n_targets}: raise --target_len to {n_targets}")
    return L


def span_lengths(L):
    """Return what span corruption makes of a row of L tokens, whichever row: every batch has the same shape.

    n_noise tokens in n_spans; n_inputs are the others and sentinels, n_targets are sentinels, noised tokens and EOS.
    """
    n_noise = round(L * DENSITY)
    n_spans = max(1, round(n_noise / MEAN_SPAN))
    # NOTE: T5 counts an EOS in the inputs too; here they have none, because inputs fill their columns and never end.
    return SpanLengths(n_noise, n_spans, L - n_noise + n_spans, n_noise + n_spans + 1)


def segments(n, n_segments, rng):
    """Return the lengths (B, n_segments), none of them 0, of a uniformly random split of n things."""
    cuts = 1 + rng.uniform(n - 1).argsort(dim=1)[:, :n_segments - 1].sort(dim=1).values  # of n - 1 borders, a random set
    return F.pad(F.pad(cuts, (1, 0)), (0, 1), value=n).diff(dim=1)
