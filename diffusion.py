"""Text diffusion processes, side by side: forward noise, loss, decoding and likelihood bound of each in one class.

    Uniform    tokens become random ones     AR2Diff (arXiv 2401.17181, section 4.1), a simplified SUNDAE (arXiv 2112.06749)
    Absorbing  tokens become MASK            masked diffusion: MDLM (arXiv 2406.07524), LLaDA (arXiv 2502.09992)
    Gaussian   embeddings get normal noise   CDCD (arXiv 2211.15089), Plaid (arXiv 2305.18619)

All three learn x0 by cross-entropy; only forward noise and the reverse step differ. t in [0, 1] is the noise level: 0 = clean,
1 = pure noise, alpha_t = 1 - t. Inputs are never noised; targets (B, T) include EOS and PAD, predicted like any token, so the
length of the text is learned. Every process has
    corrupt(x0, t, noise) -> xt        loss(model, batch, noise) -> Losses
    decode(model, batch, noise, ...) -> drafts        bound(model, batch, noise, n_draws) -> nats per sequence
draws all randomness from `noise` (noise.py), and in decode() reads one schedule: n_steps levels from t_start down to 0.

decode() is a generator of drafts (B, T), one per evaluation of the network; the last is the answer. Of n_samples drawn in
parallel for each input the one with the best model score is kept. Positions where `frozen` (B, T) is True keep
batch.targets through every draft (infilling). t_start < 1 starts from batch.targets noised to that level (revision).
Else the content of batch.targets is not read, only its width.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from autoregressive import Losses, best_of, cross_entropy
from config import check
from noise import send

T_MIN = 1e-4  # lowest noise level of the bounds; a higher one would make Uniform's visibly too small


def begin(process, model, batch, noise, n_samples, frozen):
    """Return (context, noise, x0, frozen) with n_samples rows per input: what every decode() starts with."""
    context = model.encode(batch.inputs, batch.pad_mask, process.inputs_attention).repeat(n_samples)  # once for all steps
    x0 = batch.targets.repeat_interleave(n_samples, dim=0)                               # (B * n_samples, T)
    frozen = torch.zeros_like(x0, dtype=torch.bool) if frozen is None else frozen.repeat_interleave(n_samples, dim=0)
    return context, noise.split(n_samples), x0, frozen


def levels(n_draws, noise, low=0.0):
    """Yield n_draws noise levels (B,), stratified: one in each n-th of [low, 1], so that their mean has a small variance."""
    u = noise.uniform()                                                                  # (B,)
    for k in range(n_draws):
        yield low + (1 - low) * (k + u) / n_draws


def denoise(process, model, y, context, noise=None):
    """Return logits (B, T, V) of x0 from noised targets y, tokens or vectors: how every process calls the network.

    Two ways to make this more like what an AR model has learned, both off by default, both from DiffuLLaMA (arXiv 2410.17891):
    shift: logits[:, i] are read where AR read them, from the slot before i; so one slot more is fed, AR's start token.
    anneal_steps: in so many first training steps (told by `noise`) a target sees from none to all of the targets to its right.
    """
    T, step = y.size(1), None if noise is None else noise.train_step
    pattern = "bidirectional" if step is None or step >= process.anneal_steps else T * step // process.anneal_steps
    if process.shift is None:
        return model.decode(y, context, pattern)
    start = torch.full((len(y), 1), process.shift, device=y.device)
    start = model.embedding(start) if y.is_floating_point() else start
    return model.decode(torch.cat((start, y), dim=1), context, pattern)[:, :-1]


@dataclass
class Uniform:
    """Replace tokens by uniformly drawn ones; learn to predict the clean text, also from the model's own first guess."""
    n_noise: int  # noise draws from ids [0, n_noise): text, EOS and PAD, never MASK, a sentinel or an unused id
    n_unroll: int = 2  # passes: 1 = plain denoising, 2 = the paper
    unroll_temperature: float = 0.0  # 0 = the paper (argmax), 1 = SUNDAE
    unroll_mean: bool = False  # False = the paper (sum of the passes' losses), True = SUNDAE (their mean)
    inputs_attention: str = "bidirectional"
    shift: int | None = None  # AR's start token; None = not shifted
    anneal_steps: int = 0
    name = "uniform"
    vector_width = 0
    decoders = ("resample", "unrolled", "ancestral")
    cross_entropy = staticmethod(cross_entropy)  # of the loss: compile_model() compiles it

    def corrupt(self, x0, t, noise):
        """Replace each token with probability t (B,) by a random one: q(xt | x0) = (1 - t) [xt = x0] + t / V.

        A random token may be the old one, so a share t * (1 - 1/V) changes.
        """
        replaced = noise.uniform(x0.size(1)) < t[:, None]                                # (B, T), in float64, on the CPU
        random = noise.integers(self.n_noise, x0.size(1))
        return torch.where(send(replaced, x0.device), send(random, x0.device), x0)

    def predict(self, model, xt, t, context, noise=None):
        """Return logits (B, T, V) of x0. The model is not told t (arXiv 2401.17181, 4.1); it sees how noisy xt looks."""
        return denoise(self, model, xt, context, noise)

    def loss(self, model, batch, noise, soft=None):
        """L1 + L2: cross-entropy against x0 from the corrupted text, plus that from the model's own argmax of it.

        Averaged over all B * T target positions, corrupted or not, PAD included. No gradient flows through the argmax.
        """
        t = noise.uniform()                                                              # (B,)
        xt = self.corrupt(batch.targets, t, noise)                                       # (B, T)
        context = model.encode(batch.inputs, batch.pad_mask, self.inputs_attention)      # once for all passes
        total, first = 0.0, None
        for i in range(self.n_unroll):
            logits = self.predict(model, xt, t, context, noise)                          # (B, T, V)
            per_sequence = self.cross_entropy(logits, batch.targets, soft).mean(dim=1)   # (B,)
            total = total + per_sequence.mean() / (self.n_unroll if self.unroll_mean else 1)
            first = per_sequence.detach() if first is None else first
            if i + 1 < self.n_unroll:
                xt = noise.categorical(logits.detach(), self.unroll_temperature)
        return Losses(total, first, send(t.float(), first.device))

    @torch.no_grad()
    def decode(self, model, batch, noise, n_steps=10, temperature=0.2, n_samples=8, decoder="resample", update_share=1.0,
               unroll_share=0.3, early_stop=False, frozen=None, t_start=1.0):
        """Yield drafts (B, T), by one of three decoders; the first is the paper's.

        resample: draw all positions anew at every step (update_share < 1: a random share of them).
        unrolled: take the argmax; then, for the unroll_share of positions that were least certain, that of a second pass on it.
        ancestral: draw x0, then x_s from q(x_s | x_t, x0); the one that samples what bound() measures.
        early_stop ends a sample that a step left as it was. Score: cross-entropy between the last step's input and its output
        logits, which costs no evaluation.
        """
        context, noise, x0, frozen = begin(self, model, batch, noise, n_samples, frozen)
        xt = self.corrupt(x0, torch.full((len(x0),), t_start), noise)                    # at t = 1 nothing is left of x0
        xt = torch.where(frozen, x0, xt)                                                 # (B * n_samples, T)
        drafts, kept = [], frozen
        for i in range(n_steps):
            t, s = t_start * (1 - i / n_steps), t_start * (1 - (i + 1) / n_steps)
            logits = self.predict(model, xt, t, context)
            if decoder == "resample":
                guess = noise.categorical(logits, temperature)
                if update_share < 1:
                    guess = torch.where((noise.uniform(x0.size(1)) < update_share).to(xt.device), guess, xt)
            elif decoder == "unrolled":
                first = torch.where(kept, xt, logits.argmax(-1))
                drafts.append(first)
                second = self.predict(model, first, t, context).argmax(-1)
                certainty = logits.float().log_softmax(-1).amax(-1).masked_fill(kept, torch.inf)
                guess = torch.where(rank(certainty) < math.ceil(unroll_share * x0.size(1)), second, first)
            else:
                never = torch.arange(logits.size(-1), device=xt.device) >= self.n_noise  # x_t cannot have come from there
                guess = noise.categorical(logits.masked_fill(never, -torch.inf), temperature)
                guess = self.reverse(guess, xt, t, s, noise)
            last, xt = xt, torch.where(kept, xt, guess)
            drafts.append(xt)
            if early_stop:
                kept = kept | (xt == last).all(dim=1, keepdim=True)
                if kept.all():
                    break
        score = cross_entropy(logits, last).mean(dim=1)                                  # (B * n_samples,)
        yield from best_of(drafts, score, n_samples)

    def tell(self, logits, xt, t):
        """Return logits (B, T, V) of what the model would say of x0 had it known t, (B,), which it must guess from xt.

        By Bayes' rule only the odds of "this token is the clean one" change, by those of q_t over those of q at the level that
        the model sees: the share of tokens that it holds for replaced. Any prediction gives a valid bound; without this it is
        loose, as at t near 0 the model still expects some replaced token.
        """
        V, at_xt = self.n_noise, xt.clamp(max=self.n_noise - 1)[..., None]
        replaced = 1 - logits[..., :V].double().softmax(-1).gather(-1, at_xt).squeeze(-1)     # (B, T)
        seen = (replaced.mean(dim=1) * V / (V - 1)).clamp(1e-6, 1)                            # (B,)
        log_odds = lambda t: torch.log1p(V * (1 - t) / t)      # of q(xt = y | x0 = y) against q(xt = y | x0 = another)
        change = log_odds(t.to(seen)) - log_odds(seen)
        return logits.double().scatter_add(-1, at_xt, change[:, None, None].expand(at_xt.shape))

    def reverse(self, x0, xt, t, s, noise):
        """Draw x_s (B, T) from q(x_s | x_t, x0), s < t: by Bayes' rule it is x_t, x0, or a random token, with these odds."""
        V, kept = self.n_noise, (1 - t) / (1 - s)                                        # share of tokens kept from s to t
        as_xt = kept * (s + V * (1 - s) * (x0 == xt).double())                           # (B, T)
        as_x0, other = (1 - kept) * (1 - s), (1 - kept) * s
        u = noise.uniform(x0.size(1)).to(x0.device) * (as_xt + as_x0 + other)
        other = noise.integers(V, x0.size(1)).to(x0.device)
        return torch.where(u < as_xt, xt, torch.where(u < as_xt + as_x0, x0, other))

    def weights(self, logits, xt, a):
        """Return w (B, T, n_noise), w_y = d_y / q(xt | x0 = y), d the predicted distribution of x0; a = alpha_t, (B, 1, 1)."""
        d = logits[..., :self.n_noise].double().softmax(-1)
        c, at_xt = (1 - a) / self.n_noise, xt.clamp(max=self.n_noise - 1)[..., None]     # more only where frozen
        return (d / c).scatter(-1, at_xt, d.gather(-1, at_xt) / (c + a))

    @torch.no_grad()
    def bound(self, model, batch, noise, n_draws):
        """Return an upper bound of -log p(x0 | inputs), (B,) nats: E_t E_xt of the divergence of the reverse rates.

        Continuous-time bound of uniform diffusion (UDLM, arXiv 2412.10193) in a form for a network that predicts x0 from all of
        xt: s_y is the ratio p(xt with y here) / p(xt) that it implies. To put d in place of s, which leaves this token of xt
        out, looks alike and is no bound.
        """
        V = self.n_noise
        x0, impossible = batch.targets.clamp(max=V - 1), (batch.targets >= V).any(dim=1)  # noise cannot end at a MASK
        context = model.encode(batch.inputs, batch.pad_mask, self.inputs_attention)
        total = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
        for t in levels(n_draws, noise, T_MIN):
            xt, a = self.corrupt(x0, t, noise), (1 - t)[:, None].to(x0.device)           # (B, T), (B, 1)
            logits = self.tell(self.predict(model, xt, t, context), xt, t)
            w, c = self.weights(logits, xt, a[..., None]), (1 - a) / V
            s = c[..., None] * w.sum(-1, keepdim=True) + a[..., None] * w                # (B, T, V); 1 at xt
            kappa, log_s = c / (c + a), s.log()
            log_s0, others = log_s.gather(-1, x0[..., None]).squeeze(-1), s.sum(-1) - 1
            clean = others - (V - 1) * kappa * (1 - kappa.log()) - kappa * log_s.sum(-1)
            noised = others - (1 / kappa + V - 2) - (log_s.sum(-1) - log_s0) - (kappa.log() + log_s0) / kappa
            total += (torch.where(xt == x0, clean, noised) / (a * V)).sum(dim=1)
        return ((1 - T_MIN) * total / n_draws).masked_fill(impossible, torch.inf)


@dataclass
class Absorbing:
    """Replace tokens by MASK; learn to predict the masked ones. What is not masked is known to be clean, and stays."""
    mask: int
    weighted: bool = True  # True: loss times 1/t, the likelihood bound; False: all masked positions count alike
    inputs_attention: str = "bidirectional"
    shift: int | None = None  # AR's start token; None = not shifted
    anneal_steps: int = 0
    name = "absorbing"
    vector_width = 0
    decoders = ("threshold", "confidence", "ancestral")
    cross_entropy = staticmethod(cross_entropy)  # of the loss: compile_model() compiles it

    def corrupt(self, x0, t, noise):
        """Mask each token with probability t (B,)."""
        return torch.where(send(noise.uniform(x0.size(1)) < t[:, None], x0.device), self.mask, x0)

    def predict(self, model, xt, t, context, noise=None):
        """Return logits (B, T, V) of x0, where MASK is never predicted. They need no t: xt shows how much is masked."""
        logits = denoise(self, model, xt, context, noise)
        logits[..., self.mask] = -torch.inf
        return logits

    def loss(self, model, batch, noise, soft=None):
        """(1/t) * cross-entropy of the masked positions, summed and divided by the fixed B * T (MDLM, arXiv 2406.07524)."""
        t = 1e-3 + (1 - 1e-3) * noise.stratified()                                       # (B,): 1/t stays finite
        xt = self.corrupt(batch.targets, t, noise)
        context = model.encode(batch.inputs, batch.pad_mask, self.inputs_attention)
        logits = self.predict(model, xt, t, context, noise)
        nats = self.cross_entropy(logits, batch.targets, soft).masked_fill(xt != self.mask, 0.0).mean(dim=1)  # (B,)
        t = send(t.float(), nats.device)
        per_sequence = nats / t                                                          # t * T tokens are masked on average
        return Losses((per_sequence if self.weighted else nats).mean(), per_sequence.detach(), t)

    @torch.no_grad()
    def decode(self, model, batch, noise, n_steps=32, temperature=0.2, n_samples=8, decoder="threshold", threshold=0.9,
               block_len=0, remask=0.0, frozen=None, t_start=1.0):
        """Yield drafts (B, T), in which fewer and fewer tokens are masked, by one of three decoders.

        threshold: reveal all tokens of probability >= threshold, and the most certain one; the last step reveals the rest. Ends
        when nothing is masked, so n_steps is a limit (Fast-dLLM, arXiv 2505.22618).
        confidence: reveal the most certain tokens, equally many a step (LLaDA's low-confidence remasking).
        ancestral: reveal each token with probability (t - s) / t, which samples what bound() measures; remask in (0, 1] also
        masks decided tokens again, with that share of the largest probability that keeps q(x_t) (ReMDM, arXiv 2503.00307).
        block_len > 0 finishes blocks of so many positions from left to right (the first two decoders).
        Score: mean cross-entropy of the tokens that were revealed, each when it was.
        """
        context, noise, x0, frozen = begin(self, model, batch, noise, n_samples, frozen)
        T, device = x0.size(1), x0.device
        xt = self.corrupt(x0, torch.full((len(x0),), t_start), noise)                    # at t = 1 nothing is left of x0
        xt = torch.where(frozen, x0, xt)                                                 # (B * n_samples, T)
        n_masked = (xt == self.mask).sum(dim=1, keepdim=True)                            # (B * n_samples, 1)
        block = torch.arange(T, device=device) // (block_len or T)                       # (T,)
        n_steps = min(n_steps, T) if decoder == "confidence" else n_steps                # at least one token a step
        drafts, score = [], torch.full(xt.shape, torch.nan, device=device)               # nan: a token that was given
        for i in range(n_steps):
            t, s = t_start * (1 - i / n_steps), t_start * (1 - (i + 1) / n_steps)
            masked = xt == self.mask
            logits = self.predict(model, xt, t, context)
            guess = noise.categorical(logits, temperature)
            nats = cross_entropy(logits, guess)                                          # low = certain
            order = rank((nats.double() + 1e6 * block).masked_fill(~masked, torch.inf))  # block by block, certain ones first
            decided = torch.zeros_like(masked)
            if decoder == "confidence":
                reveal = order < masked.sum(dim=1, keepdim=True) - (n_masked * (n_steps - i - 1)) // n_steps
            elif decoder == "threshold":
                current = block == torch.where(masked, block, T).amin(dim=1, keepdim=True)
                reveal = (current & ((-nats).exp() >= threshold)) | (order == 0)
            else:
                sigma = remask * min(1.0, s / (1 - t)) if t < 1 else 0.0                 # ReMDM's "rescale"
                u = noise.uniform(T).to(device)
                reveal = u < ((1 - s) - (1 - sigma) * (1 - t)) / t
                decided = ~masked & ~frozen & (u < sigma)
            reveal = masked & (reveal | (i + 1 == n_steps))  # whatever rounding says, the last step leaves no MASK
            xt = torch.where(reveal, guess, xt).masked_fill(decided, self.mask)
            score = torch.where(reveal, nats, score)  # of a token masked again, its last one counts
            drafts.append(xt)
            if not remask and not (xt == self.mask).any():
                break
        yield from best_of(drafts, score.nanmean(dim=1).nan_to_num(torch.inf), n_samples)  # inf: nothing was revealed

    @torch.no_grad()
    def bound(self, model, batch, noise, n_draws):
        """Return an upper bound of -log p(x0 | inputs), (B,) nats, by counts: mask exactly n of L, n uniform, weight L / n.

        Equal in expectation to E_t (1/t) sum over masked -log p(x0_l | xt), with less variance (LLaDA, arXiv 2502.09992).
        """
        x0, L = batch.targets, batch.targets.size(1)
        context = model.encode(batch.inputs, batch.pad_mask, self.inputs_attention)
        total = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
        for u in levels(n_draws, noise):
            n = 1 + (u * L).long()[:, None]                                              # (B, 1), 1 ... L
            masked = (rank(noise.uniform(L)) < n).to(x0.device)
            logits = self.predict(model, torch.where(masked, self.mask, x0), u, context)
            nats = cross_entropy(logits, x0).masked_fill(~masked, 0.0).double().sum(dim=1)
            total += nats * L / n[:, 0].to(x0.device)
        return total / n_draws


@dataclass
class Gaussian:
    """Add normal noise to unit vectors that stand for the tokens; learn to tell the token (after CDCD and Plaid)."""
    vector_width: int = 32  # D_e
    sigma_min: float = 0.1  # vectors are about sqrt(2) apart, the nearest of 4,096 about 0.9: here every token can be told
    sigma_max: float = 20.0  # here none
    self_condition: float = 0.5  # share of the training steps in which the model also sees its first estimate
    inputs_attention: str = "bidirectional"
    shift: int | None = None  # AR's start token; None = not shifted
    anneal_steps: int = 0
    name = "gaussian"
    decoders = ("euler",)
    cross_entropy = staticmethod(cross_entropy)  # of the loss: compile_model() compiles it

    def sigma(self, t):
        """Return the standard deviation of the noise at level t, (B, 1, 1): log sigma is linear in t."""
        return (self.sigma_min * (self.sigma_max / self.sigma_min) ** t)[:, None, None]

    def vectors(self, model, tokens):
        """Return the unit vector of each token, (B, T, D_e). Their length is fixed, so noise cannot be outgrown."""
        return F.normalize(model.noisy.table(tokens), dim=-1)

    def corrupt(self, e, t, noise):
        """Return z = e + sigma_t * eps, (B, T, D_e), for vectors e."""
        return e + send(self.sigma(t).float(), e.device) * send(noise.normal(*e.shape[1:]), e.device)

    def predict(self, model, z, t, context, x_hat, noise=None):
        """Return logits (B, T, V) of x0 from z and an earlier estimate x_hat, both (B, T, D_e), scaled to unit variance."""
        z = z / (1 / self.vector_width + send(self.sigma(t).float(), z.device) ** 2).sqrt()
        x_hat = x_hat * self.vector_width ** 0.5
        return denoise(self, model, model.noisy(z, x_hat, send(t.float(), z.device)), context, noise)

    def estimate(self, model, logits, temperature=1.0):
        """Return the mean vector (B, T, D_e) of the predicted tokens."""
        return (logits.float() / max(temperature, 1e-6)).softmax(-1) @ F.normalize(model.noisy.table.weight, dim=-1)

    def loss(self, model, batch, noise, soft=None):
        """Cross-entropy of x0 at every noise level alike, over all B * T target positions."""
        t = noise.stratified()                                                           # (B,)
        context = model.encode(batch.inputs, batch.pad_mask, self.inputs_attention)
        z = self.corrupt(self.vectors(model, batch.targets), t, noise)
        x_hat = torch.zeros_like(z)
        if noise.shared(1) < self.self_condition:
            with torch.no_grad():
                x_hat = self.estimate(model, self.predict(model, z, t, context, x_hat, noise))
        logits = self.predict(model, z, t, context, x_hat, noise)
        per_sequence = self.cross_entropy(logits, batch.targets, soft).mean(dim=1)
        return Losses(per_sequence.mean(), per_sequence.detach(), send(t.float(), per_sequence.device))

    @torch.no_grad()
    def decode(self, model, batch, noise, n_steps=50, temperature=1.0, n_samples=8, decoder="euler", frozen=None, t_start=1.0):
        """Yield drafts (B, T), the likeliest tokens at every step; between them z takes an Euler step of dz/dsigma.

        dz/dsigma = (z - x_hat) / sigma: z_s = x_hat + (sigma_s / sigma_t) (z_t - x_hat), which for noise that is added to e
        unscaled is DDIM too (arXiv 2010.02502). temperature acts on the tokens that x_hat averages. Score: cross-entropy of the
        last draft.
        """
        context, noise, x0, frozen = begin(self, model, batch, noise, n_samples, frozen)
        level = lambda t: torch.full((len(x0),), t, dtype=torch.float64)
        known = frozen if t_start == 1 else torch.ones_like(frozen)
        e = self.vectors(model, x0) * known[..., None]                                   # (B * n_samples, T, D_e)
        start = z = self.corrupt(e, level(t_start), noise)
        x_hat, drafts = torch.zeros_like(z), []
        for i in range(n_steps):
            t, s = t_start * (1 - i / n_steps), t_start * (1 - (i + 1) / n_steps)
            seen = x_hat if self.self_condition else torch.zeros_like(x_hat)            # as in training
            logits = self.predict(model, z, level(t), context, seen)
            x_hat = self.estimate(model, logits, temperature)
            shrink = lambda z, x, r: x + r * (z - x)
            z = shrink(z, x_hat, (self.sigma(level(s)) / self.sigma(level(t))).to(z))
            z = torch.where(frozen[..., None], shrink(start, e, (self.sigma(level(s)) / self.sigma(level(t_start))).to(z)), z)
            drafts.append(torch.where(frozen, x0, logits.argmax(-1)))
        yield from best_of(drafts, cross_entropy(logits, drafts[-1]).mean(dim=1), n_samples)

    @torch.no_grad()
    def bound(self, model, batch, noise, n_draws):
        """Return an upper bound of -log p(x0 | inputs), (B,) nats: the three terms of Plaid (arXiv 2305.18619, section 2).

        KL(q(z_1 | x0) || prior) + E[-log p(x0 | z_0)] + 1/2 int |e - x_hat|^2 d(1 / sigma^2). In t the last is
        log(sigma_max / sigma_min) E_t[|e - x_hat|^2 / sigma_t^2].
        """
        x0 = batch.targets
        context = model.encode(batch.inputs, batch.pad_mask, self.inputs_attention)
        e = self.vectors(model, x0)
        total = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
        for t in levels(n_draws, noise):
            z = self.corrupt(e, t, noise)
            x_hat = self.estimate(model, self.predict(model, z, t, context, torch.zeros_like(z)))
            total += ((e - x_hat) ** 2).double().sum(dim=(1, 2)) / self.sigma(t).to(x0.device).flatten() ** 2
        diffusion = math.log(self.sigma_max / self.sigma_min) * total / n_draws
        t = torch.zeros(len(x0), dtype=torch.float64)
        z = self.corrupt(e, t, noise)
        reconstruction = cross_entropy(self.predict(model, z, t, context, torch.zeros_like(z)), x0).double().sum(dim=1)
        return x0.size(1) / (2 * self.sigma_max ** 2) + reconstruction + diffusion


def rank(values):
    """Return the place (B, T) of each value in its row when sorted, 0 = smallest, ties in order of position."""
    return values.argsort(dim=1, stable=True).argsort(dim=1)


PROCESSES = {"uniform": Uniform, "absorbing": Absorbing, "gaussian": Gaussian}


def new_process(name, tokenizer, **options):
    """Return the process of that name with a tokenizer's ids. Raises UserError for an option that belongs to another one."""
    own = {"uniform": {"n_noise": tokenizer.n_noise}, "absorbing": {"mask": tokenizer.mask}, "gaussian": {}}[name]
    known = PROCESSES[name].__dataclass_fields__
    for option in options:
        owner = next(other for other, cls in PROCESSES.items() if option in cls.__dataclass_fields__)
        check(option in known, f"--{option} is for --process={owner}, not for {name}")
    return PROCESSES[name](**own, **options)


# Which decoders an option of decode() belongs to; options that are not here belong to all of a process.
DECODER_OPTIONS = {"update_share": ("resample",), "unroll_share": ("unrolled",), "early_stop": ("resample", "unrolled"),
                   "threshold": ("threshold",), "block_len": ("confidence", "threshold"), "remask": ("ancestral",)}
