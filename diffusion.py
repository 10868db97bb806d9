"""Text diffusion processes, side by side: forward noise, loss and decoding of each in one class.

t in [0, 1] is the noise level: 0 = clean, 1 = pure noise, alpha_t = 1 - t. Inputs are never noised; targets (B, T) include EOS
and PAD, which are predicted like any token, so the length of the text is learned. Every process has
    corrupt(x0, t, noise) -> xt          loss(model, batch, noise) -> Losses          decode(model, batch, noise, ...) -> drafts
and draws all randomness from `noise` (noise.py).

Uniform: the process of AR2Diff (Han et al. 2024, arXiv 2401.17181, section 4.1), a simplified SUNDAE (arXiv 2112.06749).
"""
from dataclasses import dataclass

import torch

from autoregressive import Losses, best_of, cross_entropy


@dataclass
class Uniform:
    """Replace tokens by uniformly drawn ones; learn to predict the clean text, also from the model's own first guess."""
    n_noise: int  # noise draws from ids [0, n_noise): text, EOS and PAD, never MASK, a sentinel or an unused id
    n_unroll: int = 2  # passes: 1 = plain denoising, 2 = the paper
    unroll_temperature: float = 0.0  # 0 = the paper (argmax), 1 = SUNDAE
    inputs_attention: str = "bidirectional"
    name = "uniform"

    def corrupt(self, x0, t, noise):
        """Replace each token with probability t (B,) by a random one: q(xt | x0) = (1 - t) [xt = x0] + t / V.

        A random token may be the old one, so a share t * (1 - 1/V) changes.
        """
        replaced = (noise.uniform(x0.size(1)) < t[:, None]).to(x0.device)                # (B, T), in float64, on the CPU
        return torch.where(replaced, noise.integers(self.n_noise, x0.size(1)).to(x0.device), x0)

    def loss(self, model, batch, noise):
        """L1 + L2: cross-entropy against x0 from the corrupted text, plus that from the model's own argmax of it.

        Averaged over all B * T target positions, corrupted or not, PAD included. No gradient flows through the argmax.
        """
        t = noise.uniform()                                                              # (B,)
        xt = self.corrupt(batch.targets, t, noise)                                       # (B, T)
        context = model.encode(batch.inputs, batch.pad_mask, self.inputs_attention)      # once for all passes
        total, first = 0.0, None
        for i in range(self.n_unroll):
            logits = model.decode(xt, context, "bidirectional")                          # (B, T, V)
            per_sequence = cross_entropy(logits, batch.targets).mean(dim=1)              # (B,)
            total = total + per_sequence.mean()
            first = per_sequence.detach() if first is None else first
            if i + 1 < self.n_unroll:
                xt = noise.categorical(logits.detach(), self.unroll_temperature)
        return Losses(total, first, t.float().to(first.device))

    @torch.no_grad()
    def decode(self, model, batch, noise, n_steps=10, temperature=0.2, n_samples=8):
        """Yield n_steps drafts (B, T): start from random tokens, predict and resample all positions at every step.

        T is the width of batch.targets (their content is not read). Of n_samples in parallel the one with the best model score
        is kept: the lowest cross-entropy between the last step's input and its output logits. It costs no extra evaluation.
        """
        context = model.encode(batch.inputs, batch.pad_mask, self.inputs_attention).repeat(n_samples)
        noise = noise.split(n_samples)
        T, device = batch.targets.size(1), batch.targets.device
        xt = noise.integers(self.n_noise, T).to(device)                                  # (B * n_samples, T)
        drafts = []
        for _ in range(n_steps):
            logits = model.decode(xt, context, "bidirectional")
            drafts.append(noise.categorical(logits, temperature))
            last, xt = xt, drafts[-1]
        score = cross_entropy(logits, last).mean(dim=1)                                  # (B * n_samples,)
        yield from best_of(drafts, score, n_samples)


PROCESSES = {"uniform": Uniform}
