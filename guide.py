"""Help from AR while AR weights become a diffusion model: a teacher's predictions, and the AR loss kept alive.

    python train_diff.py --data=text --init_from=out/ar --teacher=out/ar --ar_weight=0.5 --steps=200 --out_dir=out/guided

The paper trains on the gold text alone and names distillation as the alternative (arXiv 2401.17181). An AR model does not see
the right context that diffusion has, so what it predicts is biased, and the weight of it falls to 0 in the course of the run.
The AR loss beside that of diffusion is from NBDiff (arXiv 2512.06776); its weight stays. It costs a pass of AR more: 5/3 of the
arithmetic of a uniform step where inputs and targets are equally long. The training loss in the log is that on the mixed
targets, validation that on the gold text.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from autoregressive import Autoregressive
from checkpoint import build_model, load_checkpoint, process_of
from config import check
from start import canvas


@dataclass
class GuideConfig:
    teacher: str | None = None  # AR checkpoint whose predictions are targets beside the gold text
    teacher_weight: float | None = None  # share of those targets at first, falling to 0 at the end; default 0.5 with a teacher
    ar_weight: float = 0.0  # weight of the AR loss of the model that is trained, beside its diffusion loss


@dataclass
class Guide:
    """A process whose loss has more in it; everything else about it is as before."""
    process: object
    ar: Autoregressive  # of the model that is trained
    teacher: torch.nn.Module | None
    teacher_ar: Autoregressive | None
    config: GuideConfig  # and its steps
    mask: int

    def loss(self, model, batch, noise):
        """Return the Losses of the process on softened targets, plus what the other weights ask for."""
        soft = self.soften(batch, noise.train_step) if self.teacher is not None else None
        losses = self.process.loss(model, batch, noise, soft)
        weight = self.config.ar_weight
        return losses._replace(total=losses.total + weight * self.ar.loss(model, batch, noise).total) if weight else losses

    @torch.no_grad()
    def soften(self, batch, step):
        """Return (1 - w) [x0] + w p_teacher(. | x0_<i, inputs), (B, T, V)."""
        w = self.config.teacher_weight * (1 - step / self.config.steps)
        teacher = self.teacher.to(batch.targets.device)  # moves at the first step only
        context = teacher.encode(batch.inputs, batch.pad_mask, self.teacher_ar.inputs_attention)
        logits = teacher.decode(self.teacher_ar.feed(batch.targets), context, "causal").float()
        logits[..., self.mask] = -torch.inf  # masked diffusion never predicts it
        return w * logits.softmax(-1) + (1 - w) * F.one_hot(batch.targets, logits.size(-1))


def new_guide(config, process, ar, tokenizer):
    """Return a Guide, or None where the flags ask for nothing. Raises UserError."""
    check(0 <= config.ar_weight < math.inf, f"--ar_weight={config.ar_weight} must be 0 or more, and finite")
    check(config.teacher or not config.teacher_weight,
          "--teacher_weight needs an AR model to learn from: --teacher=AR_CHECKPOINT")
    if config.teacher is None:
        return Guide(process, ar, None, None, config, tokenizer.mask) if config.ar_weight else None
    config.teacher_weight = 0.5 if config.teacher_weight is None else config.teacher_weight  # as the checkpoint records it
    check(0 < config.teacher_weight <= 1, f"--teacher_weight={config.teacher_weight} must be above 0 and at most 1")
    checkpoint = load_checkpoint(config.teacher, tokenizer=tokenizer.name)
    teacher_ar, shape, (input_len, target_len) = process_of(checkpoint), checkpoint["shape"], canvas(config)
    its = f"--teacher={config.teacher}"
    check(teacher_ar.name == "ar", f"{its} is a {teacher_ar.name!r} checkpoint; only autoregressive ones can teach")
    check(checkpoint["tokenizer"]["hash"] == tokenizer.hash, f"{its} was trained with the tokenizer "
          f"{checkpoint['tokenizer']['name']!r}, this model uses {tokenizer.name!r}")
    check(input_len or shape["architecture"] == "decoder-only", f"{its} is an encoder-decoder: set --input_len above 0")
    n_positions = shape.get("n_positions", math.inf)
    check(input_len + target_len <= n_positions, f"--input_len and --target_len make {input_len + target_len} columns, {its} "
                                                 f"has {n_positions} positions")
    teacher = build_model(checkpoint).eval().requires_grad_(False)
    return Guide(process, ar, teacher, teacher_ar, config, tokenizer.mask)
