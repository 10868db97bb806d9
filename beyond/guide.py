"""Help while AR weights become a diffusion model: options of training that end with it, all off by default.

    python train_diff.py --data=text --init_from=out/ar --ar_weight=0.5 --steps=200 --out_dir=out/guided

The AR loss beside that of diffusion (NBDiff, arXiv 2512.06776): a pass more, and unless --inputs_attention=causal the inputs
once more. Several noised canvases behind each encoded input: where inputs are long, three more cost less than the first.
Validation is the loss of the process alone.
"""
import copy
import math
from dataclasses import dataclass
from functools import cache

from autoregressive import Autoregressive
from engine.cli import check


@dataclass
class GuideConfig:
    ar_weight: float = 0.0  # weight of the AR loss of the model that is trained, beside its diffusion loss
    n_draws: int = 1  # noised canvases of each target, behind one encoding of its input


@dataclass
class Guide:
    """What a process is trained by: its own loss, with the help that the flags ask for."""
    process: object
    ar: Autoregressive  # of the same weights
    config: GuideConfig

    def loss(self, model, batch, rng, token_loss):
        """Return the Losses of the process, plus what the weights ask for."""
        weight, n = self.config.ar_weight, self.config.n_draws
        many = batch._replace(targets=batch.targets.repeat_interleave(n, dim=0))
        once, several = copy.copy(model), copy.copy(model)  # the same weights; an encoding serves both losses and n canvases
        once.encode = cache(model.encode)
        several.encode = lambda *inputs: once.encode(*inputs).repeat(n)
        losses = self.process.loss(several, many, rng.split(n) if n > 1 else rng, token_loss)
        if not weight:
            return losses
        return losses._replace(total=losses.total + weight * self.ar.loss(once, batch, rng, token_loss).total)


def new_guide(config, process, ar):
    """Return a Guide, or None where the flags ask for nothing. Raises UserError."""
    check(0 <= config.ar_weight < math.inf, f"--ar_weight={config.ar_weight} must be 0 or more, and finite")
    check(config.n_draws >= 1, f"--n_draws={config.n_draws} must be at least 1")
    return Guide(process, ar, config) if config.ar_weight or config.n_draws > 1 else None
