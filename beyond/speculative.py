"""Diffusion drafts, AR verifies: the text of greedy AR decoding, in fewer passes where the two models agree.

    python sample.py out/ar_code --drafter=out/ar2diff_code --prompt="..." --show_steps
    python eval.py out/ar_code --drafter=out/ar2diff_code

Speculative decoding (arXiv 2211.17192) with a drafter that writes the whole canvas at once. A round is a draft, and one causal
pass of the AR model over it, which tells what AR would have written. The longest prefix on which they agree is settled, and
AR's own token behind it: at least one token a round. The text is AR's to rounding.
"""
import copy
from dataclasses import dataclass

import torch

from engine.cli import check
from pretrained.loading import build_model, load_checkpoint, process_of


@dataclass
class Speculative:
    """Greedy decoding of an AR model, helped by a diffusion model. Both have the same tokenizer and canvas."""
    ar: object
    drafter: torch.nn.Module
    process: object  # of the drafter
    name = "speculative"

    @torch.no_grad()
    def generate(self, model, batch, rng, n_steps=1, n_samples=1):
        """Yield drafts (B, T): the empty canvas, then one per evaluation of either network; the last is greedy AR's text.

        n_steps: of the drafter, in every round. n_samples: drafted in parallel, the best by the drafter's score is verified.
        """
        context = model.encode(batch.inputs, batch.pad_mask, self.ar.inputs_attention)
        drafter, T = copy.copy(self.drafter), batch.targets.size(1)
        encoded = drafter.encode(batch.inputs, batch.pad_mask, self.process.inputs_attention)
        drafter.encode = lambda *args: encoded                                           # once for all rounds
        place, settled = torch.arange(T, device=batch.targets.device), torch.zeros_like(batch.targets[:, :1])  # (T,), (B, 1)
        text = torch.full_like(batch.targets, self.ar.pad)                               # (B, T)
        yield text
        while (settled < T).any():
            options = dict(n_steps=n_steps, n_samples=n_samples, temperature=0.0, frozen=place < settled)
            _, *drafts = self.process.generate(drafter, batch._replace(targets=text), rng, **options)  # after the noise
            yield from drafts
            draft = torch.where(place < settled, text, drafts[-1])  # were a MASK settled, masked diffusion would fill it
            greedy = model.decode(self.ar.feed(draft), context, "causal").argmax(-1)     # (B, T)
            agreed = (draft == greedy).cumprod(1).sum(1, keepdim=True)                   # (B, 1)
            text = torch.where(place <= agreed, greedy, self.ar.pad)                     # at place `agreed`, AR's own token
            is_eos = (text == self.ar.eos).long()
            text = text.masked_fill(is_eos.cumsum(1) > is_eos, self.ar.pad)              # as AR does: PAD behind EOS
            settled = torch.where(is_eos.any(dim=1, keepdim=True), T, agreed + 1)
            yield text


def new_speculative(path, checkpoint, device):
    """Return the Speculative of an AR checkpoint dict and the drafter at `path`. Raises UserError where they do not fit."""
    ar, other = process_of(checkpoint), load_checkpoint(path)
    process = process_of(other)
    check(ar.name == "ar", f"--drafter: only an autoregressive model verifies drafts, this one is a {ar.name} model")
    check(process.name != "ar", f"--drafter={path} is autoregressive; a diffusion model drafts")
    check(other["tokenizer"]["hash"] == checkpoint["tokenizer"]["hash"], f"--drafter={path} has the tokenizer "
          f"{other['tokenizer']['name']!r}, this model has {checkpoint['tokenizer']['name']!r}")
    own, its = ((c["input_len"], c["target_len"]) for c in (checkpoint, other))
    check(own == its, f"--drafter={path} has a canvas of {its[0]} + {its[1]} tokens, this model one of {own[0]} + {own[1]}")
    check(own[0] > 0, "--drafter: a plain language model (input_len 0) has no canvas to draft")
    return Speculative(ar, build_model(other, device).eval(), process)
