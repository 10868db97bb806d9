"""Help while AR weights become a diffusion model: four options of training that end with it, all off by default.

    python train_diff.py --data=text --init_from=out/ar --teacher=out/ar --ar_weight=0.5 --steps=200 --out_dir=out/guided

A teacher's predictions. The paper trains on the gold text alone and names distillation as the alternative (arXiv 2401.17181).
An AR model does not see the right context that diffusion has, so what it predicts is biased, and its weight falls to 0 in the
course of the run. The AR loss beside that of diffusion (NBDiff, arXiv 2512.06776), at a constant weight: a pass of AR more, 5/3
of the arithmetic of a uniform step where inputs and targets are equally long. Annealing (DiffuLLaMA, arXiv 2410.17891): in the
first steps a target sees from none to all of the targets to its right. Several noised canvases behind each encoded input: where
inputs are long, three more cost less than the first. The training loss in the log has all of that in it; validation is the
loss of the process.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from autoregressive import Autoregressive
from engine.cli import check
from pretrained.loading import build_model, load_checkpoint, process_of


@dataclass
class GuideConfig:
    teacher: str | None = None  # AR checkpoint whose predictions are targets beside the gold text
    teacher_weight: float | None = None  # share of those targets at first, falling to 0 at the end; default 0.5 with a teacher
    ar_weight: float = 0.0  # weight of the AR loss of the model that is trained, beside its diffusion loss
    anneal_steps: int = 0  # first steps in which the targets' right context is revealed little by little
    n_draws: int = 1  # noised canvases of each target, behind one encoding of its input


class Draws:
    """A model whose contexts serve n canvases each."""

    def __init__(self, model, n):
        self.model, self.n = model, n

    def encode(self, *inputs):
        return self.model.encode(*inputs).repeat(self.n)

    def __getattr__(self, name):
        return getattr(self.model, name)


@dataclass
class Guide:
    """What a process is trained by at one step: its own loss, with the help that the flags ask for."""
    process: object
    ar: Autoregressive  # of the model that is trained
    teacher: torch.nn.Module | None
    teacher_ar: Autoregressive | None
    config: GuideConfig  # and its steps
    mask: int
    step: int = 0

    def at(self, step):
        return replace(self, step=step)

    def loss(self, model, batch, rng, token_loss):
        """Return the Losses of the process on softened targets, plus what the other weights ask for."""
        process, anneal_steps, n_draws, of_soft = self.process, self.config.anneal_steps, self.config.n_draws, token_loss
        if self.step < anneal_steps:
            process = replace(process, targets_attention=batch.targets.size(1) * self.step // anneal_steps)
        if self.teacher is not None:
            soft = self.soften(batch).repeat_interleave(n_draws, dim=0)
            of_soft = lambda logits, x0: soft_cross_entropy(logits, soft)
        many = batch._replace(targets=batch.targets.repeat_interleave(n_draws, dim=0))
        losses = process.loss(Draws(model, n_draws), many, rng.split(n_draws) if n_draws > 1 else rng, of_soft)
        weight = self.config.ar_weight
        if not weight:
            return losses
        return losses._replace(total=losses.total + weight * self.ar.loss(model, batch, rng, token_loss).total)

    @torch.no_grad()
    def soften(self, batch):
        """Return (1 - w) [x0] + w p_teacher(. | x0_<i, inputs), (B, T, V)."""
        w = self.config.teacher_weight * (1 - self.step / self.config.steps)
        teacher = self.teacher.to(batch.targets.device)  # moves at the first step only
        context = teacher.encode(batch.inputs, batch.pad_mask, self.teacher_ar.inputs_attention)
        logits = teacher.decode(self.teacher_ar.feed(batch.targets), context, "causal").float()
        logits[..., self.mask] = -torch.inf  # masked diffusion never predicts it
        return w * logits.softmax(-1) + (1 - w) * F.one_hot(batch.targets, logits.size(-1))


def soft_cross_entropy(logits, soft):
    """Return the cross-entropy (B, T) against a distribution soft (B, T, V), in fp32."""
    return -(soft * logits.float().log_softmax(-1)).masked_fill(soft == 0, 0.0).sum(-1)  # 0 * -inf is 0 here


def new_guide(config, process, ar, tokenizer, canvas):
    """Return a Guide, or None where the flags ask for nothing; canvas: (input_len, target_len). Raises UserError."""
    check(0 <= config.ar_weight < math.inf, f"--ar_weight={config.ar_weight} must be 0 or more, and finite")
    check(config.anneal_steps >= 0, f"--anneal_steps={config.anneal_steps} must not be negative")
    check(config.n_draws >= 1, f"--n_draws={config.n_draws} must be at least 1")
    check(not config.anneal_steps or process.inputs_attention != "full", "--anneal_steps does not go with --inputs_attention="
          "full: the inputs would show the targets what is still hidden")
    check(config.teacher or not config.teacher_weight,
          "--teacher_weight needs an AR model to learn from: --teacher=AR_CHECKPOINT")
    if config.teacher is None:
        asked = config.ar_weight or config.anneal_steps or config.n_draws > 1
        return Guide(process, ar, None, None, config, tokenizer.mask) if asked else None
    config.teacher_weight = 0.5 if config.teacher_weight is None else config.teacher_weight  # as the checkpoint records it
    check(0 < config.teacher_weight <= 1, f"--teacher_weight={config.teacher_weight} must be above 0 and at most 1")
    checkpoint = load_checkpoint(config.teacher, tokenizer=tokenizer.name)
    teacher_ar, shape = process_of(checkpoint), checkpoint["shape"]
    its = f"--teacher={config.teacher}"
    check(teacher_ar.name == "ar", f"{its} is a {teacher_ar.name!r} checkpoint; only autoregressive ones can teach")
    check(checkpoint["tokenizer"]["hash"] == tokenizer.hash, f"{its} was trained with the tokenizer "
          f"{checkpoint['tokenizer']['name']!r}, this model uses {tokenizer.name!r}")
    check(canvas[0] or shape["architecture"] == "decoder-only", f"{its} is an encoder-decoder: set --input_len above 0")
    n_positions = shape.get("n_positions", math.inf)
    check(sum(canvas) <= n_positions, f"--input_len and --target_len make {sum(canvas)} columns, {its} has {n_positions} "
                                      f"positions")
    teacher = build_model(checkpoint).eval().requires_grad_(False)
    return Guide(process, ar, teacher, teacher_ar, config, tokenizer.mask)
