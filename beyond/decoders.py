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
from diffusion import PROCESSES, begin, believe, denoise, pure_noise, rank


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


SURE = 0.005  # nats a token: a draft that does not change and is so certain is finished


@torch.no_grad()
def entropy(process, model, batch, rng, n_steps=48, temperature=0.8, last_temperature=0.4, budget=0.1, n_samples=1,
            frozen=None):
    """Settle what is nearly independent, and make the rest noise again (EB, arXiv 2505.24857, in DiffusionGemma's form).

    Uniform: a settled token is judged again in each step. Absorbing: it stays. A sample ends when its argmax is that of a step
    ago and its mean entropy at most SURE; what is open gets its argmax. Score: the cross-entropy of tokens when written.
    """
    context, rng, x0, frozen = begin(process, model, batch, rng, n_samples, frozen)
    drafts, belief, before, absorbs = [pure_noise(process, x0, frozen, rng)], None, None, process.name == "absorbing"
    score, done = torch.zeros(x0.shape, device=x0.device), torch.zeros(len(x0), dtype=torch.bool, device=x0.device)
    for i in range(n_steps):
        xt, heat = drafts[-1], last_temperature + (temperature - last_temperature) * (1 - i / n_steps)
        fixed = frozen | (xt != process.mask) if absorbs else frozen                     # (B N, T)
        logits = process.predict(model, xt, context) if absorbs else denoise(process, model, xt, context, belief)
        logits = logits.float() / max(heat, 1e-6)                                        # (B N, T, V)
        belief = None if absorbs else believe(process, model, logits)
        nats = torch.special.entr(logits.softmax(-1)).sum(-1).masked_fill(fixed, 0.0)    # (B N, T)
        answer = torch.where(fixed, xt, logits.argmax(-1))
        sure = nats.sum(dim=1) <= SURE * (~fixed).sum(dim=1)                             # (B N,): the mean of what is open
        ends = sure & (answer == before).all(dim=1) if i else done                       # (B N,)
        guess = torch.where(fixed, xt, rng.categorical(logits, 1.0))
        draft = torch.where(fixed | within(nats, budget), guess, pure_noise(process, x0, frozen, rng))
        full = (draft != process.mask).all(dim=1) if absorbs else ends                   # (B N,): nothing is left to settle
        draft = torch.where((ends | (i + 1 == n_steps) & ~full)[:, None], answer, draft)
        drafts.append(torch.where(done[:, None], xt, draft))
        score = torch.where(done[:, None] | fixed, score, cross_entropy(logits, draft))  # (B N, T)
        before, done = answer, done | ends | full
        if done.all():
            break
    return (yield from best_of(drafts, score.mean(dim=1), n_samples))


def within(nats, budget):
    """Return which positions (B, T) to settle: the most certain, while the entropies of all but the last are within the budget.

    Their sum bounds the mutual information of what is settled. At budget 0 that is one token, and what is certain.
    """
    lowest, order = nats.sort(dim=1)
    return torch.zeros_like(nats, dtype=torch.bool).scatter(1, order, lowest.cumsum(dim=1) - lowest <= budget)


# Process -> {name: decoder}, its default first.
DECODERS = {name: {cls.decoder: cls.generate} for name, cls in PROCESSES.items()} | {
    Autoregressive.name: {"left to right": Autoregressive.generate}}
DECODERS["uniform"] |= {"ancestral": ancestral, "entropy": entropy}
DECODERS["absorbing"] |= {"confidence": confidence, "ancestral": unmask_at_random, "entropy": entropy}
