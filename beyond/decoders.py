"""Other ways to generate text with the processes of diffusion.py, each one function, found by name in DECODERS.

    python sample.py out/ar2diff_code --decoder=ancestral --prompt="..."

A decoder is called as decoder(process, model, batch, rng, ...) and yields what generate() does: drafts (B, T), the noise first,
then one for every evaluation of the network. It returns what best_of() returns, for beyond/trace.py. Its keyword arguments are
its options; n_samples and frozen are every diffusion decoder's. n_steps is the most evaluations that it may take: the last of
them leaves no noise. To add one, write the function and give it an entry: sample.py, eval.py and tests/test_every_process.py
find it there. A new option also wants a flag in sample.py: GenerateConfig.
"""
import torch

from autoregressive import Autoregressive, best_of, cross_entropy
from diffusion import PROCESSES, begin, denoise, pure_noise, rank


@torch.no_grad()
def ancestral(process, model, batch, rng, n_steps=10, temperature=0.2, n_samples=8, frozen=None):
    """Draw x0, then x_s from q(x_s | x_t, x0): at temperature 1 this samples what the bound of likelihood.py measures."""
    context, rng, x0, frozen = begin(process, model, batch, rng, n_samples, frozen)
    drafts = [pure_noise(process, x0, frozen, rng)]                                    # each (B N, T)
    for i in range(n_steps):
        t, s = 1 - i / n_steps, 1 - (i + 1) / n_steps
        xt, logits = drafts[-1], denoise(process, model, drafts[-1], context)
        never = torch.arange(logits.size(-1), device=xt.device) >= process.n_noise       # x_t cannot have come from there
        guess = rng.categorical(logits.masked_fill(never, -torch.inf), temperature)
        drafts.append(torch.where(frozen, xt, reverse(process.n_noise, guess, xt, t, s, rng)))
    return (yield from best_of(drafts, cross_entropy(logits, xt).mean(dim=1), n_samples))


def reverse(V, x0, xt, t, s, rng):
    """Draw x_s (B N, T) from q(x_s | x_t, x0), s < t: by Bayes' rule x_t, x0 or a random one of V tokens, with these odds."""
    share = (1 - t) / (1 - s)                                                            # of tokens kept from s to t
    as_xt = share * (s + V * (1 - s) * (x0 == xt).double())                               # (B, T)
    as_x0, other = (1 - share) * (1 - s), (1 - share) * s
    u = rng.uniform(x0.size(1)).to(x0.device) * (as_xt + as_x0 + other)
    random = rng.integers(V, x0.size(1)).to(x0.device)
    return torch.where(u < as_xt, xt, torch.where(u < as_xt + as_x0, x0, random))


# ---- absorbing; score: mean cross-entropy of the tokens that were revealed, each when it was ----

@torch.no_grad()
def confidence(process, model, batch, rng, n_steps=32, temperature=0.2, n_samples=8, block_len=0, frozen=None):
    """Reveal the most certain tokens, equally many a step (LLaDA, arXiv 2502.09992).

    block_len: finish blocks of so many positions from left to right; at once (0) PAD, most certain, may cut a text short.
    """
    context, rng, x0, frozen = begin(process, model, batch, rng, n_samples, frozen)
    drafts, score = [pure_noise(process, x0, frozen, rng)], torch.full(x0.shape, torch.nan, device=x0.device)
    block = torch.arange(x0.size(1), device=x0.device) // (block_len or x0.size(1))      # (T,)
    n_masked = (drafts[0] == process.mask).sum(dim=1, keepdim=True)                      # (B N, 1)
    n_steps = min(n_steps, max(1, int(n_masked.max())))  # no more than there are gaps to fill
    for i in range(n_steps):
        masked, logits = drafts[-1] == process.mask, process.predict(model, drafts[-1], context)
        guess = rng.categorical(logits, temperature)
        nats = cross_entropy(logits, guess)
        order = rank((nats.double() + 1e6 * block).masked_fill(~masked, torch.inf))      # block by block, certain ones first
        reveal = masked & (order < masked.sum(dim=1, keepdim=True) - (n_masked * (n_steps - i - 1)) // n_steps)
        drafts.append(torch.where(reveal, guess, drafts[-1]))
        score = torch.where(reveal, nats, score)
        if not (drafts[-1] == process.mask).any():
            break
    return (yield from best_of(drafts, score.nanmean(dim=1).nan_to_num(torch.inf), n_samples))


@torch.no_grad()
def unmask_at_random(process, model, batch, rng, n_steps=32, temperature=0.2, n_samples=8, frozen=None):
    """Reveal each token with probability (t - s) / t: at temperature 1 what the bound of likelihood.py measures is sampled."""
    context, rng, x0, frozen = begin(process, model, batch, rng, n_samples, frozen)
    drafts, score = [pure_noise(process, x0, frozen, rng)], torch.full(x0.shape, torch.nan, device=x0.device)
    for i in range(n_steps):
        t, s = 1 - i / n_steps, 1 - (i + 1) / n_steps
        masked, logits = drafts[-1] == process.mask, process.predict(model, drafts[-1], context)
        guess = rng.categorical(logits, temperature)
        nats = cross_entropy(logits, guess)
        reveal = masked & (rng.uniform(x0.size(1)).to(x0.device) < (t - s) / t)          # in the last step all
        drafts.append(torch.where(reveal, guess, drafts[-1]))
        score = torch.where(reveal, nats, score)
        if not (drafts[-1] == process.mask).any():
            break
    return (yield from best_of(drafts, score.nanmean(dim=1).nan_to_num(torch.inf), n_samples))


# Process -> {name: decoder}, its default first.
DECODERS = {name: {cls.decoder: cls.generate} for name, cls in PROCESSES.items()} | {
    Autoregressive.name: {"left to right": Autoregressive.generate}}
DECODERS["uniform"] |= {"ancestral": ancestral}
DECODERS["absorbing"] |= {"confidence": confidence, "ancestral": unmask_at_random}
