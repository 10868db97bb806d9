"""Bits per token and per byte: the likelihood of held-out text, exact for AR, an upper bound for diffusion.

    python eval.py out/ar2diff --metric=bits

A bound is compared with the exact number of an AR model on the same targets: lower is better, and a bound may be loose, so a
diffusion model is at least this good. A mean denoising loss is no likelihood and cannot be compared so. BOUNDS holds what is
known, by the exact class of a process: one derived from another noises differently, and inherits no bound.
"""
import math

import torch

from autoregressive import Autoregressive, cross_entropy
from data.dataset import pad_rows, tokenized
from diffusion import Absorbing, Gaussian, Uniform, denoise, rank
from engine.cli import check
from engine.noise import Noise

T_MIN = 1e-4  # lowest noise level of the bounds; a higher one would make Uniform's visibly too small


# ---- bounds: functions (process, model, batch, noise, n_draws) -> (B,) nats ----
def levels(n_draws, rng, low=0.0):
    """Yield n_draws noise levels (B,), stratified: one in each n-th of [low, 1], so that their mean has a small variance."""
    u = rng.uniform()                                                                  # (B,)
    for k in range(n_draws):
        yield low + (1 - low) * (k + u) / n_draws


@torch.no_grad()
def exact(process, model, batch, rng=None, n_draws=1):
    """Return -log p(x0 | inputs) of an AR model, (B,) nats: exact, where the others are upper bounds."""
    context = model.encode(batch.inputs, batch.pad_mask, process.inputs_attention)
    logits = model.decode(process.feed(batch.targets), context, "causal")
    return cross_entropy(logits, batch.targets).double().sum(dim=1)


@torch.no_grad()
def uniform(process, model, batch, rng, n_draws):
    """Return an upper bound of -log p(x0 | inputs), (B,) nats: E_t E_xt of the divergence of the reverse rates.

    Continuous-time bound of uniform diffusion (UDLM, arXiv 2412.10193) in a form for a network that predicts x0 from all of xt:
    s_y is the ratio p(xt with y here) / p(xt) that it implies. To put d in place of s, which leaves this token of xt out, looks
    alike and is no bound.
    """
    V = process.n_noise
    x0, impossible = batch.targets.clamp(max=V - 1), (batch.targets >= V).any(dim=1)     # noise cannot end at a MASK
    context, total = model.encode(batch.inputs, batch.pad_mask, process.inputs_attention), 0.0
    for t in levels(n_draws, rng, T_MIN):
        xt, a = process.corrupt(x0, t, rng), (1 - t)[:, None].to(x0.device)            # (B, T), (B, 1)
        logits = tell(V, denoise(process, model, xt, context), xt, t)
        w, c = odds(V, logits, xt, a[..., None]), (1 - a) / V
        s = c[..., None] * w.sum(-1, keepdim=True) + a[..., None] * w                    # (B, T, V); 1 at xt
        kappa, log_s = c / (c + a), s.log()
        log_s0, others = log_s.gather(-1, x0[..., None]).squeeze(-1), s.sum(-1) - 1
        clean = others - (V - 1) * kappa * (1 - kappa.log()) - kappa * log_s.sum(-1)
        noised = others - (1 / kappa + V - 2) - (log_s.sum(-1) - log_s0) - (kappa.log() + log_s0) / kappa
        total += (torch.where(xt == x0, clean, noised) / (a * V)).sum(dim=1)
    return ((1 - T_MIN) * total / n_draws).masked_fill(impossible, torch.inf)


def tell(V, logits, xt, t):
    """Return logits (B, T, V) of what the model would say of x0 had it known t, (B,), which it must guess from xt.

    By Bayes' rule only the odds of "this token is the clean one" change, by those of q_t over those of q at the level that the
    model sees: the share of tokens that it holds for replaced. Any prediction gives a valid bound; without this it is loose, as
    at t near 0 the model still expects some replaced token.
    """
    at_xt = xt.clamp(max=V - 1)[..., None]
    replaced = 1 - logits[..., :V].double().softmax(-1).gather(-1, at_xt).squeeze(-1)    # (B, T)
    seen = (replaced.mean(dim=1) * V / (V - 1)).clamp(1e-6, 1)                           # (B,)
    log_odds = lambda t: torch.log1p(V * (1 - t) / t)  # of q(xt = y | x0 = y) against q(xt = y | x0 = another)
    change = log_odds(t.to(seen)) - log_odds(seen)
    return logits.double().scatter_add(-1, at_xt, change[:, None, None].expand(at_xt.shape))


def odds(V, logits, xt, a):
    """Return w (B, T, V), w_y = d_y / q(xt | x0 = y), d the predicted distribution of x0; a = alpha_t, (B, 1, 1)."""
    d = logits[..., :V].double().softmax(-1)
    c, at_xt = (1 - a) / V, xt.clamp(max=V - 1)[..., None]
    return (d / c).scatter(-1, at_xt, d.gather(-1, at_xt) / (c + a))


@torch.no_grad()
def absorbing(process, model, batch, rng, n_draws):
    """Return an upper bound of -log p(x0 | inputs), (B,) nats, by counts: mask exactly n of L, n uniform, weight L / n.

    Equal in expectation to E_t (1/t) sum over masked -log p(x0_l | xt), with less variance (LLaDA, arXiv 2502.09992).
    """
    x0, L = batch.targets, batch.targets.size(1)
    context, total = model.encode(batch.inputs, batch.pad_mask, process.inputs_attention), 0.0
    for u in levels(n_draws, rng):
        n = 1 + (u * L).long()[:, None]                                                  # (B, 1), 1 ... L
        masked = (rank(rng.uniform(L)) < n).to(x0.device)
        logits = process.predict(model, torch.where(masked, process.mask, x0), context)
        nats = cross_entropy(logits, x0).masked_fill(~masked, 0.0).double().sum(dim=1)
        total += nats * L / n[:, 0].to(x0.device)
    return total / n_draws


@torch.no_grad()
def gaussian(process, model, batch, rng, n_draws):
    """Return an upper bound of -log p(x0 | inputs), (B,) nats: the three terms of Plaid (arXiv 2305.18619, section 2).

    KL(q(z_1 | x0) || prior) + E[-log p(x0 | z_0)] + 1/2 int |e - x_hat|^2 d(1 / sigma^2). In t the last is
    log(sigma_max / sigma_min) E_t[|e - x_hat|^2 / sigma_t^2].
    """
    x0 = batch.targets
    context, total = model.encode(batch.inputs, batch.pad_mask, process.inputs_attention), 0.0
    e = process.vectors(model, x0)
    for t in levels(n_draws, rng):
        z = process.corrupt(e, t, rng)
        x_hat = process.estimate(model, process.predict(model, z, t, context, torch.zeros_like(z)))
        total += ((e - x_hat) ** 2).double().sum(dim=(1, 2)) / process.sigma(t).to(x0.device).flatten() ** 2
    diffusion = math.log(process.sigma_max / process.sigma_min) * total / n_draws
    t = torch.zeros(len(x0), dtype=torch.float64)
    z = process.corrupt(e, t, rng)
    reconstruction = cross_entropy(process.predict(model, z, t, context, torch.zeros_like(z)), x0).double().sum(dim=1)
    return x0.size(1) / (2 * process.sigma_max ** 2) + reconstruction + diffusion


BOUNDS = {Autoregressive: exact, Uniform: uniform, Absorbing: absorbing, Gaussian: gaussian}


def bound_of(process):
    """Return the function of BOUNDS for a process. Raises UserError for one that has none of its own."""
    check(type(process) in BOUNDS, f"no likelihood bound is known for the process {process.name!r}: beyond/likelihood.py has "
                                   f"those of {', '.join(cls.name for cls in BOUNDS)}")
    return BOUNDS[type(process)]


def ratio(nats, counts):
    """Return (sum of nats / sum of counts in bits, its standard error over sequences), by the delta method of a ratio."""
    nats, counts = torch.tensor(nats, dtype=torch.float64) / math.log(2), torch.tensor(counts, dtype=torch.float64)
    value, n = nats.sum() / counts.sum(), len(nats)
    error = (nats - value * counts).norm() * math.sqrt(n / (n - 1)) / counts.sum() if n > 1 else math.nan
    return float(value), float(error)


def task_batches(examples, writer, batch_size):
    """Return (batches, number of examples left out) of a task's examples, those that fit the model's canvas."""
    rows = [(i, t) for i, t in tokenized(examples, writer.tokenizer)
            if len(i) <= writer.input_len and len(t) < writer.target_len]
    check(rows, f"not one of {len(examples)} examples fits the canvas of {writer.input_len} + {writer.target_len} tokens")
    batches = [pad_rows(rows[k:k + batch_size], writer.tokenizer, writer.input_len, writer.target_len)
               for k in range(0, len(rows), batch_size)]
    return batches, len(examples) - len(rows)


def bits(writer, batches, n_draws, seed):
    """Return what a model needs for batches, by n_draws noise levels per sequence (AR needs none).

    {"per_token", "per_byte": (bits, standard error), over target tokens, EOS included, or bytes of text; "n": sequences}.
    """
    tokenizer, nats, n_tokens, n_bytes = writer.tokenizer, [], [], []
    for batch in batches:
        rows = range(len(nats), len(nats) + len(batch.targets))
        nats += writer.bound(batch, Noise(seed, "valid", 0, rows), n_draws).tolist()
        n_tokens += (batch.targets != tokenizer.pad).sum(dim=1).tolist()
        n_bytes += [tokenizer.n_bytes(row) for row in batch.targets.tolist()]
    return {"per_token": ratio(nats, n_tokens), "per_byte": ratio(nats, n_bytes), "n": len(nats)}
