"""Three text diffusion processes, side by side: forward noise, loss and default decoder of each in one class.

    Uniform    tokens become random ones     AR2Diff (arXiv 2401.17181, section 4.1), a simplified SUNDAE (arXiv 2112.06749)
    Absorbing  tokens become MASK            masked diffusion: MDLM (arXiv 2406.07524), LLaDA (arXiv 2502.09992)
    Gaussian   embeddings get normal noise   CDCD (arXiv 2211.15089), Plaid (arXiv 2305.18619); corrupts vectors of x0

All three learn x0 by cross-entropy, each from its own noise and with its own way back. t in [0, 1] is the noise level: 0 =
clean, 1 = pure noise. Inputs are never noised; targets (B, T) include EOS and PAD, predicted like any token, so the length of
the text is learned. Every process has
    corrupt(x0, t, rng) -> xt        loss(model, batch, rng) -> Losses        generate(model, batch, rng, ...) -> drafts
where rng gives random numbers, a row for each sequence: uniform() is (B,), integers(V, T) are (B, T) (engine/noise.py).

generate() yields drafts (B, T): the noise it starts from, one for every evaluation of the network, the last is the answer.
Of N = n_samples drawn in parallel for each input the one with the best model score is kept. Of batch.targets only the width is
used, but where `frozen` (B, T) is True a token stays through every draft (infilling). Beyond: decoders.py, likelihood.py.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from autoregressive import Losses, best_of, cross_entropy
from engine.noise import send


def denoise(process, model, y, context, belief=None):
    """Return logits (B, T, V) of x0 from y, noised targets or a guess of them, and a belief. t is not told: y shows its noise.

    Shifted (DiffuLLaMA, arXiv 2410.17891) AR's start token is fed in front, and they are read a position earlier, as AR did.
    """
    if process.shift is None:  # as in the paper: logits[:, i] are read at the position of y[:, i]
        return model.decode(y, context, process.targets_attention, belief=belief)
    start = torch.full((len(y), 1), process.shift, device=y.device)
    start = model.embedding(start) if y.is_floating_point() else start
    belief = None if belief is None else F.pad(belief, (0, 0, 1, 0))  # of the start token there is none
    return model.decode(torch.cat((start, y), dim=1), context, process.targets_attention, belief=belief)[:, :-1]


@torch.no_grad()
def believe(process, model, logits, rng=None):
    """Return the belief (B, T, C) that a pass hands on, None if not self-conditioned; rng: in training, of some rows alone."""
    if not process.self_condition:
        return None
    told = torch.ones(len(logits)) if rng is None else rng.uniform() < process.self_condition
    return model.believe(logits) * send(told, logits.device)[:, None, None]


def begin(process, model, batch, rng, n_samples, frozen):
    """Return (context, noise, x0, frozen) with n_samples rows per input: what every decoder starts with."""
    context = model.encode(batch.inputs, batch.pad_mask, process.inputs_attention).repeat(n_samples)  # once for all steps
    x0 = batch.targets.repeat_interleave(n_samples, dim=0)                               # (B N, T)
    frozen = torch.zeros_like(x0, dtype=torch.bool) if frozen is None else frozen.repeat_interleave(n_samples, dim=0)
    return context, rng.split(n_samples), x0, frozen


def pure_noise(process, x0, frozen, rng):
    """Return the draft (B N, T) at t = 1, where of tokens x0 nothing is left but what is frozen."""
    return torch.where(frozen, x0, process.corrupt(x0, torch.ones(len(x0)), rng))


@dataclass
class Uniform:
    """Replace tokens by uniformly drawn ones; learn to predict the clean text, also from the model's own first guess."""
    n_noise: int  # noise draws from ids [0, n_noise): text, EOS and PAD, never MASK, a sentinel or an unused id
    n_unroll: int = 2  # passes: 1 = plain denoising, 2 = the paper
    unroll_temperature: float = 0.0  # 0 = the paper (argmax), 1 = SUNDAE
    self_condition: float = 0.0  # share of the sequences whose last pass is told the one before; 0 = the paper
    inputs_attention: str = "bidirectional"
    targets_attention: str = "bidirectional"
    shift: int | None = None  # AR's start token; None = not shifted
    name = "uniform"
    decoder = "resample"

    def corrupt(self, x0, t, rng):
        """Replace each token with probability t (B,) by a random one: q(xt | x0) = (1 - t) [xt = x0] + t / n_noise."""
        replaced = rng.uniform(x0.size(1)) < t[:, None]                                # (B, T), on the CPU
        random = rng.integers(self.n_noise, x0.size(1))  # perhaps the old one: a share t (1 - 1 / n_noise) changes
        return torch.where(send(replaced, x0.device), send(random, x0.device), x0)

    def loss(self, model, batch, rng, token_loss=cross_entropy):
        """L(1:2) = L1 + L2: the cross-entropy of x0 from the corrupted text, and that from the model's own argmax of it.

        The second pass trains what decoding does: to read the model's own output, not noised gold text. Averaged over all B * T
        target positions, corrupted or not, PAD included. No gradient flows through the argmax.
        """
        t = rng.uniform()                                                              # (B,)
        xt = self.corrupt(batch.targets, t, rng)                                       # (B, T)
        context = model.encode(batch.inputs, batch.pad_mask, self.inputs_attention)      # once for both passes
        belief = None
        if self.n_unroll == 1 and self.self_condition:  # else L2's pass is the second, and is told the first
            with torch.no_grad():
                belief = believe(self, model, denoise(self, model, xt, context), rng)
        logits = denoise(self, model, xt, context, belief)                               # (B, T, V)
        L1 = token_loss(logits, batch.targets).mean(dim=1)                               # (B,)
        t = send(t.float(), L1.device)
        if self.n_unroll == 1:
            return Losses(L1.mean(), L1.detach(), t)
        x0_hat = rng.categorical(logits.detach(), self.unroll_temperature)               # (B, T), at temperature 0 the argmax
        logits = denoise(self, model, x0_hat, context, believe(self, model, logits, rng))
        L2 = token_loss(logits, batch.targets).mean(dim=1)                               # (B,)
        return Losses(L1.mean() + L2.mean(), L1.detach(), t)

    @torch.no_grad()
    def generate(self, model, batch, rng, n_steps=10, temperature=0.2, n_samples=8, frozen=None):
        """Yield drafts (B, T); every step draws all positions that are not frozen anew from the model's prediction of x0.

        Score, as in the paper: cross-entropy between the last step's input and its output logits. It is low where that step
        left the draft as it was, and costs no evaluation: the last draft itself is not scored.
        """
        context, rng, x0, frozen = begin(self, model, batch, rng, n_samples, frozen)
        drafts, belief = [pure_noise(self, x0, frozen, rng)], None                     # each (B N, T)
        for _ in range(n_steps):
            logits = denoise(self, model, drafts[-1], context, belief)                   # (B N, T, V)
            belief = believe(self, model, logits / max(temperature, 1e-6))
            drafts.append(torch.where(frozen, x0, rng.categorical(logits, temperature)))
        score = cross_entropy(logits, drafts[-2]).mean(dim=1)                            # (B N,)
        return (yield from best_of(drafts, score, n_samples))


@dataclass
class Absorbing:
    """Replace tokens by MASK; learn to predict the masked ones. What is not masked is known to be clean, and stays."""
    mask: int
    weighted: bool = True  # True: loss times 1/t, the likelihood bound; False: all masked positions count alike
    inputs_attention: str = "bidirectional"
    targets_attention: str = "bidirectional"
    shift: int | None = None  # AR's start token; None = not shifted
    name = "absorbing"
    decoder = "threshold"

    def corrupt(self, x0, t, rng):
        """Mask each token with probability t (B,)."""
        return torch.where(send(rng.uniform(x0.size(1)) < t[:, None], x0.device), self.mask, x0)

    def predict(self, model, xt, context):
        """Return logits (B, T, V) of x0, where MASK is never predicted."""
        logits = denoise(self, model, xt, context)
        logits[..., self.mask] = -torch.inf
        return logits

    def loss(self, model, batch, rng, token_loss=cross_entropy):
        """(1/t) * cross-entropy of the masked positions, summed and divided by the fixed B * T (MDLM, arXiv 2406.07524).

        At level t about t * T tokens are masked: 1/t lets every level count alike, and makes the mean over t an upper bound of
        -log p in nats per token (docs/faq.md, "Why 1/t"). weighted=False trains without it; what is logged keeps it.
        """
        t = 1e-3 + (1 - 1e-3) * rng.stratified()                                       # (B,): 1/t stays finite
        xt = self.corrupt(batch.targets, t, rng)                                       # (B, T)
        context = model.encode(batch.inputs, batch.pad_mask, self.inputs_attention)
        logits = self.predict(model, xt, context)                                        # (B, T, V)
        masked_nats = token_loss(logits, batch.targets).masked_fill(xt != self.mask, 0.0).mean(dim=1)  # (B,)
        t = send(t.float(), masked_nats.device)
        per_sequence = masked_nats / t                                                   # t * T tokens are masked on average
        return Losses((per_sequence if self.weighted else masked_nats).mean(), per_sequence.detach(), t)

    @torch.no_grad()
    def generate(self, model, batch, rng, n_steps=32, temperature=0.2, n_samples=8, threshold=0.9, frozen=None):
        """Yield drafts (B, T); every step reveals all tokens of probability >= threshold, and the most certain one.

        The last step reveals the rest. Ends when nothing is masked, so n_steps is a limit (Fast-dLLM, arXiv 2505.22618).
        Score: mean cross-entropy of the tokens that were revealed, each when it was.
        """
        context, rng, x0, frozen = begin(self, model, batch, rng, n_samples, frozen)
        xt = pure_noise(self, x0, frozen, rng)                                         # (B N, T)
        drafts, score = [xt], torch.full(xt.shape, torch.nan, device=xt.device)          # nan: a token that was given
        for i in range(n_steps):
            masked = xt == self.mask
            logits = self.predict(model, xt, context)                                    # (B N, T, V)
            guess = rng.categorical(logits, temperature)
            nats = cross_entropy(logits, guess).masked_fill(~masked, torch.inf)          # low = certain
            reveal = masked & (((-nats).exp() >= threshold) | (rank(nats) == 0) | (i + 1 == n_steps))
            xt, score = torch.where(reveal, guess, xt), torch.where(reveal, nats, score)
            drafts.append(xt)
            if not (xt == self.mask).any():
                break
        return (yield from best_of(drafts, score.nanmean(dim=1).nan_to_num(torch.inf), n_samples))  # inf: none was revealed


@dataclass
class Gaussian:
    """Add normal noise to unit vectors that stand for the tokens; learn which token it was (after CDCD and Plaid)."""
    vector_width: int = 32  # D_e
    sigma_min: float = 0.1  # every token can be told: vectors are about sqrt(2) apart, the nearest of 4,096 0.9 on average
    sigma_max: float = 20.0  # none can be told
    self_condition: float = 0.5  # share of the training steps in which the model also sees its first estimate
    inputs_attention: str = "bidirectional"
    targets_attention: str = "bidirectional"
    shift: int | None = None  # AR's start token; None = not shifted
    name = "gaussian"
    decoder = "euler"

    def sigma(self, t):
        """Return the standard deviation of the noise at level t, (B, 1, 1): log sigma is linear in t."""
        return (self.sigma_min * (self.sigma_max / self.sigma_min) ** t)[:, None, None]

    def vectors(self, model, tokens):
        """Return the unit vector of each token, (B, T, D_e). Unit length: training could outgrow the noise by longer ones."""
        return F.normalize(model.noisy.table(tokens), dim=-1)

    def corrupt(self, e, t, rng):
        """Return z = e + sigma_t * eps, (B, T, D_e), for vectors e."""
        return e + send(self.sigma(t).float(), e.device) * send(rng.normal(*e.shape[1:]), e.device)

    def predict(self, model, z, t, context, x_hat):
        """Return logits (B, T, V) of x0 from z and an earlier estimate x_hat, both (B, T, D_e), scaled to unit variance."""
        z = z / (1 / self.vector_width + send(self.sigma(t).float(), z.device) ** 2).sqrt()
        x_hat = x_hat * self.vector_width ** 0.5
        return denoise(self, model, model.noisy(z, x_hat, send(t.float(), z.device)), context)

    def estimate(self, model, logits, temperature=1.0):
        """Return the mean vector (B, T, D_e) of the predicted tokens."""
        return (logits.float() / max(temperature, 1e-6)).softmax(-1) @ F.normalize(model.noisy.table.weight, dim=-1)

    def loss(self, model, batch, rng, token_loss=cross_entropy):
        """Cross-entropy of x0 at every noise level alike, over all B * T target positions."""
        t = rng.stratified()                                                           # (B,)
        context = model.encode(batch.inputs, batch.pad_mask, self.inputs_attention)
        z = self.corrupt(self.vectors(model, batch.targets), t, rng)                   # (B, T, D_e)
        x_hat = torch.zeros_like(z)
        if rng.shared(1) < self.self_condition:
            with torch.no_grad():
                x_hat = self.estimate(model, self.predict(model, z, t, context, x_hat))
        logits = self.predict(model, z, t, context, x_hat)                               # (B, T, V)
        per_sequence = token_loss(logits, batch.targets).mean(dim=1)                           # (B,)
        return Losses(per_sequence.mean(), per_sequence.detach(), send(t.float(), per_sequence.device))

    @torch.no_grad()
    def generate(self, model, batch, rng, n_steps=50, temperature=1.0, n_samples=8, frozen=None):
        """Yield drafts (B, T), the likeliest tokens at every step; between them z takes an Euler step of dz/dsigma.

        dz/dsigma = (z - x_hat) / sigma: z_s = x_hat + (sigma_s / sigma_t) (z_t - x_hat), which for noise that is added to e
        unscaled is DDIM too (arXiv 2010.02502). temperature acts on the tokens that x_hat averages. Score: cross-entropy of the
        last draft.
        """
        context, rng, x0, frozen = begin(self, model, batch, rng, n_samples, frozen)
        level = lambda t: torch.full((len(x0),), t, dtype=torch.float64)
        shrink = lambda z, x, t, s: x + (self.sigma(level(s)) / self.sigma(level(t))).to(z) * (z - x)  # from t to s, towards x
        e = self.vectors(model, x0) * frozen[..., None]                                  # (B N, T, D_e)
        start = z = self.corrupt(e, level(1.0), rng)
        x_hat, drafts = torch.zeros_like(z), [torch.where(frozen, x0, self.nearest(model, z))]
        for i in range(n_steps):
            t, s = 1 - i / n_steps, 1 - (i + 1) / n_steps
            seen = x_hat if self.self_condition else torch.zeros_like(x_hat)            # as in training
            logits = self.predict(model, z, level(t), context, seen)                     # (B N, T, V)
            x_hat = self.estimate(model, logits, temperature)
            z = torch.where(frozen[..., None], shrink(start, e, 1.0, s), shrink(z, x_hat, t, s))
            drafts.append(torch.where(frozen, x0, logits.argmax(-1)))
        return (yield from best_of(drafts, cross_entropy(logits, drafts[-1]).mean(dim=1), n_samples))

    def nearest(self, model, z):
        """Return the tokens (B, T) whose vectors are nearest to z (B, T, D_e): noise, as text."""
        return (z @ F.normalize(model.noisy.table.weight, dim=-1).T).argmax(-1)


def rank(values):
    """Return the place (B, T) of each value in its row when sorted, 0 = smallest, ties in order of position."""
    return values.argsort(dim=1, stable=True).argsort(dim=1)


PROCESSES = {cls.name: cls for cls in (Uniform, Absorbing, Gaussian)}  # to add one: docs/faq.md, "How do I change"
