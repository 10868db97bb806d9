"""The autoregressive factorisation: p(x0 | inputs) = product over i of p(x0_i | x0_<i, inputs). Loss and decoding.

Same interface as the processes of diffusion.py: loss(model, batch, rng) and generate(model, batch, rng, ...). batch: inputs
(B, S), pad_mask, targets (B, T) (data/dataset.py); rng: random numbers, a row for each sequence. The AR loss draws none.
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Losses(NamedTuple):
    total: torch.Tensor  # scalar, to be differentiated
    per_sequence: torch.Tensor  # (B,) nats per target token, for the log; of two passes the first
    t: torch.Tensor | None  # (B,) noise level; None for an AR model


def cross_entropy(logits, x0):
    """Return -log p(x0) per position in nats: logits (B, T, V), x0 (B, T) -> (B, T), in fp32 whatever the logits are."""
    return F.cross_entropy(logits.float().flatten(0, 1), x0.flatten(), reduction="none").view_as(x0)


@dataclass
class Autoregressive:
    """Predict each target token from the inputs and the targets before it."""
    start: int  # id fed at the first target slot
    eos: int
    pad: int
    inputs_attention: str = "causal"
    name = "ar"

    def feed(self, x0):
        """Return [start, x0[:-1]]: slot i reads the token before the one it predicts."""
        return F.pad(x0[:, :-1], (1, 0), value=self.start)

    def loss(self, model, batch, rng, token_loss=cross_entropy):
        """Cross-entropy over all B * T target positions, PAD after EOS included: the mean over micro-batches is that over all.

        token_loss: cross_entropy(), or what stands in for it: compiled (engine/parallel.py).
        """
        context = model.encode(batch.inputs, batch.pad_mask, self.inputs_attention)
        logits = model.decode(self.feed(batch.targets), context, "causal")               # (B, T, V)
        per_sequence = token_loss(logits, batch.targets).mean(dim=1)                           # (B,)
        return Losses(per_sequence.mean(), per_sequence.detach(), None)

    @torch.no_grad()
    def generate(self, model, batch, rng, temperature=0.0, top_k=0, n_samples=1, prefix=None):
        """Yield drafts (B, T), PAD to the right: the empty canvas, then a token more each, until all rows hold EOS or are full.

        T is the width of batch.targets (their content is not read). temperature 0 is greedy; top_k 0 keeps all tokens.
        Of N = n_samples drawn in parallel for each input the likeliest is kept. prefix (B, P): targets that are given already,
        what a model without inputs (S = 0) continues; it is in no draft.
        """
        context = model.encode(batch.inputs, batch.pad_mask, self.inputs_attention)
        token = torch.full_like(batch.targets[:, :1], self.start)
        if prefix is not None:
            model.decode(self.feed(prefix), context, "causal", extend=True)
            token = prefix[:, -1:]
        context, rng = context.repeat(n_samples), rng.split(n_samples)
        token = token.repeat_interleave(n_samples, dim=0)                                # (B N, 1)
        drafts = [torch.full_like(batch.targets, self.pad).repeat_interleave(n_samples, dim=0)]
        score = torch.zeros(len(token), device=token.device)
        done = torch.zeros_like(token[:, 0], dtype=torch.bool)
        for i in range(batch.targets.size(1)):
            logits = model.decode(token, context, "causal", extend=True)                 # (B N, 1, V)
            allowed = logits
            if top_k:
                kth = logits.topk(min(top_k, logits.size(-1))).values[..., -1:]
                allowed = logits.masked_fill(logits < kth, -torch.inf)
            token = rng.categorical(allowed, temperature)                                # (B N, 1)
            token = torch.where(done[:, None], self.pad, token)
            if n_samples > 1:  # else there is nothing to choose from
                score += torch.where(done, 0.0, cross_entropy(logits, token)[:, 0])      # -log p of the whole text
            drafts.append(drafts[-1].clone())
            drafts[-1][:, i] = token[:, 0]
            done |= token[:, 0] == self.eos
            if done.all():
                break
        return (yield from best_of(drafts, score, n_samples))


def best_of(drafts, score, n_samples):
    """Yield each draft (B N, T) as (B, T): of the N samples of every input the one with the lowest score (B N,).

    Return what it chose from, (drafts, score): beyond/trace.py shows it.
    """
    best = score.view(-1, n_samples).argmin(dim=1)                                       # (B,)
    rows = torch.arange(len(best), device=best.device) * n_samples + best
    for draft in drafts:
        yield draft[rows]
    return drafts, score
