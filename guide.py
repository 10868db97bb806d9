"""Help from an AR model while AR weights become a diffusion model: its predictions as soft targets, its own loss kept alive.

    python train_diff.py --data=text --init_from=out/ar --teacher=out/ar --ar_weight=0.5 --steps=200 --out_dir=out/guided

The paper trains on the gold text alone and names distillation as the alternative (arXiv 2401.17181). An AR model does not see
the right context that diffusion has, so what it teaches is biased, and its weight falls to 0 in the course of the run. The AR
loss beside that of diffusion is from NBDiff (arXiv 2512.06776).
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from autoregressive import Autoregressive
from checkpoint import build_model, load_checkpoint, process_of
from config import check


@dataclass
class GuideConfig:
    teacher: str | None = None  # AR checkpoint whose predictions are targets beside the gold text
    teacher_weight: float = 0.5  # share of those targets at the first step; it falls to 0, in a line, at the last
    ar_weight: float = 0.0  # weight of the AR loss of the model that is trained, beside its diffusion loss


@dataclass
class Guide:
    """A process whose loss has more in it; everything else about it is as before."""
    process: object
    ar: Autoregressive
    teacher: torch.nn.Module | None
    config: GuideConfig  # and its steps
    mask: int

    def loss(self, model, batch, noise):
        """Return the Losses of the process on softened targets, plus ar_weight times the AR loss of the same model."""
        soft = None if self.teacher is None else self.soften(batch, noise.train_step)
        losses = self.process.loss(model, batch, noise, soft)
        if self.config.ar_weight:
            extra = self.ar.loss(model, batch, noise).total
            losses = losses._replace(total=losses.total + self.config.ar_weight * extra)
        return losses

    @torch.no_grad()
    def soften(self, batch, step):
        """Return (1 - w) [x0] + w p_teacher(. | x0_<i, inputs), (B, T, V)."""
        w = self.config.teacher_weight * (1 - step / self.config.steps)
        teacher = self.teacher.to(batch.targets.device)  # moves at the first step only
        context = teacher.encode(batch.inputs, batch.pad_mask, self.ar.inputs_attention)
        logits = teacher.decode(self.ar.feed(batch.targets), context, "causal").float()
        logits[..., self.mask] = -torch.inf  # masked diffusion never predicts it
        p = logits.softmax(-1)
        return w * p + (1 - w) * F.one_hot(batch.targets, p.size(-1))


def new_guide(config, process, tokenizer):
    """Return a Guide, or None where the flags ask for nothing. Raises UserError."""
    check(0 <= config.teacher_weight <= 1, f"--teacher_weight={config.teacher_weight} must lie between 0 and 1")
    check(config.ar_weight >= 0, f"--ar_weight={config.ar_weight} must not be negative")
    teacher, ar = None, Autoregressive(tokenizer.mask, tokenizer.eos, tokenizer.pad)
    if config.teacher:
        checkpoint = load_checkpoint(config.teacher, tokenizer=tokenizer.name)
        ar = process_of(checkpoint)
        check(ar.name == "ar", f"--teacher={config.teacher} is a {ar.name!r} checkpoint; only autoregressive ones can teach")
        check(checkpoint["tokenizer"]["hash"] == tokenizer.hash,
              f"--teacher={config.teacher} was trained with the tokenizer {checkpoint['tokenizer']['name']!r}, this model uses "
              f"{tokenizer.name!r}")
        teacher = build_model(checkpoint).eval().requires_grad_(False)
    return Guide(process, ar, teacher, config, tokenizer.mask) if teacher is not None or config.ar_weight else None
