"""What a run tells: sums of its losses, lines on the terminal, and metrics.jsonl for plots."""
import json
import math
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from config import UserError

N_LEVELS = 5  # noise levels in the log: t in [0, 0.2), [0.2, 0.4), ...


class Tally:
    """Sums of losses on the device, in all and per noise level, read out once a log line."""

    def __init__(self, device):
        self.sums = torch.zeros(2 + 2 * N_LEVELS, device=device)  # total, micro-batches, then per level: losses, sequences
        self.has_levels = False

    def add(self, losses):
        self.sums[0] += losses.total.detach()
        self.sums[1] += 1
        if losses.t is not None:
            self.has_levels = True
            level = (losses.t * N_LEVELS).long().clamp(max=N_LEVELS - 1)
            self.sums[2:2 + N_LEVELS].index_add_(0, level, losses.per_sequence.float())
            self.sums[2 + N_LEVELS:].index_add_(0, level, torch.ones_like(losses.per_sequence, dtype=torch.float))

    def summary(self, world):
        """Return {loss, by_level} averaged over all ranks; by_level is the first pass' cross-entropy, nan where no t fell."""
        if world > 1:
            dist.all_reduce(self.sums)
        sums = self.sums.tolist()
        pairs = zip(sums[2:2 + N_LEVELS], sums[2 + N_LEVELS:])
        by_level = [s / n if n else math.nan for s, n in pairs] if self.has_levels else None
        return {"loss": sums[0] / max(sums[1], 1), "by_level": by_level}


class RunLog:
    """A progress bar, the lines above it, and metrics.jsonl: an object per line. All ranks but the first are silent."""

    def __init__(self, path, config, first_step, tokens_per_step, enabled):
        self.path, self.steps, self.tokens_per_step, self.enabled = path, config.steps, tokens_per_step, enabled
        self.bar = tqdm(total=config.steps, initial=first_step, disable=None if enabled else True, leave=False)
        if enabled and path.exists():
            self.cut(first_step)

    def cut(self, step):
        """Drop what a stopped run had written past the checkpoint that is resumed, or all of a run that left no checkpoint."""
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if step else []:
            with suppress(ValueError):  # the last line of a killed run may be torn
                kept += [line + "\n"] * (json.loads(line)["step"] <= step)
        self.path.write_text("".join(kept), encoding="utf-8")

    def say(self, text):
        """Print a line without tearing the progress bar, where there is one."""
        if self.enabled:
            (print if self.bar.disable else self.bar.write)(text)

    def train(self, step, summary, lr, norm, seconds):
        """Tell the losses of the steps since the last line, the last gradient norm, and the seconds a step took."""
        self.say(f"step {step:6d}/{self.steps} | loss {summary['loss']:.4f} | norm {norm:.2f} | lr {lr:.2e} | "
                 f"{1000 * seconds:.0f} ms | {self.tokens_per_step / seconds:,.0f} tokens/s | "
                 f"{timedelta(seconds=round(seconds * (self.steps - step)))} left")
        self.write(step=step, lr=lr, norm=norm, seconds_per_step=seconds, **summary)

    def valid(self, step, summary):
        """Tell the losses of a validation."""
        levels = " | by noise level " + " ".join(f"{x:.2f}" for x in summary["by_level"]) if summary["by_level"] else ""
        self.say(f"valid {step:5d}/{self.steps} | loss {summary['loss']:.4f}{levels}")
        self.write(step=step, split="valid", **summary)

    def write(self, **values):
        if not self.enabled:
            return
        if values["by_level"]:  # JSON has no nan
            values["by_level"] = [None if math.isnan(x) else x for x in values["by_level"]]
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; ckpt.pt beside it can be resumed") from error
