"""The autoregressive factorisation: p(x0 | inputs) = product over i of p(x0_i | x0_<i, inputs). Loss and decoding.

Same shape as the processes in diffusion.py: loss(model, batch, noise); decode(...), a generator of drafts; bound(...).
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Losses(NamedTuple):
    total: torch.Tensor  # scalar, to be differentiated
    per_sequence: torch.Tensor  # (B,) cross-entropy of the first pass, nats per target token, for the log
    t: torch.Tensor | None  # (B,) noise level; None for an AR model


class ChunkedCrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[x0], in fp32 a few rows at a time: with a large vocabulary all logits in fp32, and once more
    as probabilities for the backward pass, would need more memory than the model.

    One softmax serves both passes: the derivative by a logit, its probability minus 1 at x0, is what is kept of the logits.
    """

    @staticmethod
    def forward(ctx, logits, x0):
        """Return (N,) nats in fp32 for logits (N, V) of any dtype and x0 (N,)."""
        ctx.rows = max(1, (1 << (26 if logits.is_cuda else 19)) // logits.size(1))  # on a CPU a chunk stays in its cache
        many = logits.size(1) > 1 << 16 and logits.device.type == "cpu"  # it adds them one by one: 1e-5 nats are lost
        slopes, nats = torch.empty_like(logits) if ctx.needs_input_grad[0] else None, []
        for i in range(0, len(logits), ctx.rows):
            part, x = logits[i:i + ctx.rows].to(torch.float64 if many else torch.float32), x0[i:i + ctx.rows, None]
            p = part.softmax(-1)
            # -log p[x0], by way of the likeliest token, whose probability is no smaller than 1 / V: others may be 0 in fp32.
            nats.append(part.amax(-1) - part.gather(1, x)[:, 0] - p.amax(-1).log())
            if slopes is not None:
                slopes[i:i + ctx.rows] = p.scatter_add_(1, x, p.new_full(x.shape, -1.0))
        ctx.save_for_backward(slopes)
        return torch.cat(nats).float()

    @staticmethod
    def backward(ctx, grad):
        slopes, = ctx.saved_tensors
        if slopes.is_cuda or slopes.dtype == torch.float32:
            return slopes.mul_(grad[:, None]), None
        for part, g in zip(slopes.split(ctx.rows), grad.split(ctx.rows)):  # on a CPU faster than a product of two types
            part.copy_(part.float().mul_(g[:, None]))
        return slopes, None


def cross_entropy(logits, x0, soft=None):
    """Return -log p(x0) per position in nats: logits (B, T, V), x0 (B, T) -> (B, T), in fp32 whatever the logits are.

    soft (B, T, V): a distribution to be learned in place of x0 (guide.py).
    """
    if soft is not None:
        return -(soft * logits.float().log_softmax(-1)).masked_fill(soft == 0, 0.0).sum(-1)  # 0 * -inf is 0 here
    rows, x0_rows = logits.flatten(0, 1), x0.flatten()
    if torch.compiler.is_compiling():  # the compiler needs no chunks: its fp32 logits live in registers only
        return F.cross_entropy(rows.float(), x0_rows, reduction="none").view_as(x0)
    return ChunkedCrossEntropy.apply(rows, x0_rows).view_as(x0)


@dataclass
class Autoregressive:
    """Predict each target token from the inputs and the targets before it."""
    start: int  # id fed at the first target slot
    eos: int
    pad: int
    inputs_attention: str = "causal"
    name = "ar"
    vector_width = 0  # no vectors of embedding diffusion
    shift = None  # its logits are read where they are
    cross_entropy = staticmethod(cross_entropy)  # of the loss: compile_model() compiles it

    def feed(self, x0):
        """Return [start, x0[:-1]]: slot i reads the token before the one it predicts."""
        return F.pad(x0[:, :-1], (1, 0), value=self.start)

    def loss(self, model, batch, noise):
        """Cross-entropy over all B * T target positions, PAD after EOS included (so a micro-batch mean is a batch mean)."""
        context = model.encode(batch.inputs, batch.pad_mask, self.inputs_attention)
        logits = model.decode(self.feed(batch.targets), context, "causal")               # (B, T, V)
        per_sequence = self.cross_entropy(logits, batch.targets).mean(dim=1)             # (B,)
        return Losses(per_sequence.mean(), per_sequence.detach(), None)

    @torch.no_grad()
    def decode(self, model, batch, noise, temperature=0.0, top_k=0, n_samples=1, prefix=None):
        """Yield drafts (B, T), one token longer each, PAD to the right; stop when every row has reached EOS.

        prefix (B, P) are targets that are given already: what a model without inputs (S = 0) continues.

        T is the width of batch.targets (their content is not read). temperature 0 is greedy; top_k 0 keeps all tokens.
        Of n_samples drawn in parallel for each input the likeliest is kept, as the diffusion decoder does.
        """
        context = model.encode(batch.inputs, batch.pad_mask, self.inputs_attention)
        if prefix is not None:
            model.decode(self.feed(prefix), context, "causal", extend=True)
        context, noise = context.repeat(n_samples), noise.split(n_samples)
        B, T = batch.targets.shape
        draft = torch.full((B * n_samples, T), self.pad, device=batch.targets.device)
        drafts, score = [], torch.zeros(B * n_samples, device=draft.device)
        token = torch.full_like(draft[:, :1], self.start)
        if prefix is not None:
            token = prefix[:, -1:].repeat_interleave(n_samples, dim=0)
        done = torch.zeros_like(draft[:, 0], dtype=torch.bool)
        for i in range(T):
            logits = model.decode(token, context, "causal", extend=True)                 # (B, 1, V)
            allowed = logits
            if top_k:
                kth = logits.topk(min(top_k, logits.size(-1))).values[..., -1:]
                allowed = logits.masked_fill(logits < kth, -torch.inf)
            token = noise.categorical(allowed, temperature)                              # (B, 1)
            token = torch.where(done[:, None], self.pad, token)
            if n_samples > 1:  # else there is nothing to choose from
                score += torch.where(done, 0.0, cross_entropy(logits, token)[:, 0])
            draft[:, i] = token[:, 0]
            done |= token[:, 0] == self.eos
            drafts.append(draft.clone())
            if done.all():
                break
        yield from best_of(drafts, score, n_samples)

    @torch.no_grad()
    def bound(self, model, batch, noise=None, n_draws=1):
        """Return -log p(x0 | inputs), (B,) nats: exact, where the bounds of diffusion.py are upper bounds."""
        context = model.encode(batch.inputs, batch.pad_mask, self.inputs_attention)
        logits = model.decode(self.feed(batch.targets), context, "causal")
        return cross_entropy(logits, batch.targets).double().sum(dim=1)


def best_of(drafts, score, n_samples):
    """Yield each draft (B * n_samples, T) as (B, T): of every input the sample with the lowest score (B * n_samples,)."""
    best = score.view(-1, n_samples).argmin(dim=1)                                       # (B,)
    rows = torch.arange(len(best), device=best.device) * n_samples + best
    for draft in drafts:
        yield draft[rows]
