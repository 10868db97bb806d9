"""Help from AR while AR weights become a diffusion model: a teacher's predictions and states, and the AR loss kept alive.

    python train_diff.py --data=text --init_from=out/ar --teacher=out/ar --ar_weight=0.5 --steps=200 --out_dir=out/guided

The paper trains on the gold text alone and names distillation as the alternative (arXiv 2401.17181). An AR model does not see
the right context that diffusion has, so what it predicts is biased, and the weight of it falls to 0 in the course of the run.
The AR loss beside that of diffusion is from NBDiff (arXiv 2512.06776), the alignment of states from REPR-ALIGN (arXiv
2605.06885); their weights stay. The training loss in the log is that on the mixed targets, validation that on the gold text.
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
    align_weight: float = 0.0  # weight of 1 - cosine between the model's final states and the teacher's
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
        c, soft = self.config, None
        if self.teacher is not None:
            states = self.teacher_states(batch)                                          # (B, T, C)
            soft = self.soften(states, batch.targets, noise.train_step) if c.teacher_weight else None
        watched = Watched(model) if c.align_weight else model
        losses = self.process.loss(watched, batch, noise, soft)
        extra = c.ar_weight * self.ar.loss(model, batch, noise).total if c.ar_weight else 0.0
        if c.align_weight:  # the last pass; one slot more where the process reads shifted
            cosine = F.cosine_similarity(watched.seen[:, :states.size(1)].float(), states.float(), dim=-1)  # (B, T)
            extra = extra + c.align_weight * (1 - cosine).mean()
        return losses._replace(total=losses.total + extra)

    @torch.no_grad()
    def teacher_states(self, batch):
        teacher = self.teacher.to(batch.targets.device)  # moves at the first step only
        context = teacher.encode(batch.inputs, batch.pad_mask, self.teacher_ar.inputs_attention)
        return teacher.states(self.teacher_ar.feed(batch.targets), context, "causal")

    @torch.no_grad()
    def soften(self, states, x0, step):
        """Return (1 - w) [x0] + w p_teacher(. | x0_<i, inputs), (B, T, V)."""
        w = self.config.teacher_weight * (1 - step / self.config.steps)
        logits = self.teacher.logits(states).float()
        logits[..., self.mask] = -torch.inf  # masked diffusion never predicts it
        return w * logits.softmax(-1) + (1 - w) * F.one_hot(x0, logits.size(-1))


class Watched:
    """A model as a process sees it, that keeps the final states of the last decode()."""

    def __init__(self, model):
        self.model, self.seen = model, None

    def __getattr__(self, name):
        return getattr(self.model, name)

    def decode(self, y, context, attention):
        self.seen = self.model.states(y, context, attention)
        return self.model.logits(self.seen)


def new_guide(config, process, ar, tokenizer, width):
    """Return a Guide, or None where the flags ask for nothing. Raises UserError."""
    for name in ("ar_weight", "align_weight"):
        check(0 <= getattr(config, name) < math.inf, f"--{name}={getattr(config, name)} must be 0 or more, and finite")
    for name in ("teacher_weight", "align_weight"):
        check(config.teacher or not getattr(config, name), f"--{name} needs an AR model to learn from: --teacher=AR_CHECKPOINT")
    if config.teacher is None:
        return Guide(process, ar, None, None, config, tokenizer.mask) if config.ar_weight else None
    config.teacher_weight = 0.5 if config.teacher_weight is None else config.teacher_weight  # as the checkpoint records it
    check(0 <= config.teacher_weight <= 1, f"--teacher_weight={config.teacher_weight} must lie between 0 and 1")
    check(config.teacher_weight or config.align_weight, "--teacher_weight=0 without --align_weight: there is nothing to teach")
    checkpoint = load_checkpoint(config.teacher, tokenizer=tokenizer.name)
    teacher_ar, shape, (input_len, target_len) = process_of(checkpoint), checkpoint["shape"], canvas(config)
    its = f"--teacher={config.teacher}"
    check(teacher_ar.name == "ar", f"{its} is a {teacher_ar.name!r} checkpoint; only autoregressive ones can teach")
    check(checkpoint["tokenizer"]["hash"] == tokenizer.hash, f"{its} was trained with the tokenizer "
          f"{checkpoint['tokenizer']['name']!r}, this model uses {tokenizer.name!r}")
    check(not config.align_weight or shape["width"] == width, f"--align_weight: the states of {its} are of width "
          f"{shape['width']}, those of this model of width {width}")
    check(input_len or shape["architecture"] == "decoder-only", f"{its} is an encoder-decoder: set --input_len above 0")
    n_positions = shape.get("n_positions", math.inf)
    check(input_len + target_len <= n_positions, f"--input_len and --target_len make {input_len + target_len} columns, {its} "
                                                 f"has {n_positions} positions")
    teacher = build_model(checkpoint).eval().requires_grad_(False)
    return Guide(process, ar, teacher, teacher_ar, config, tokenizer.mask)
