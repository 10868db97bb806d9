"""What a run tells: sums of its losses, lines on the terminal, and metrics.jsonl for plots."""
import json
import math
from contextlib import suppress

import torch
import torch.distributed as dist

from config import UserError

N_LEVELS = 5  # noise levels in the log: t in [0, 0.2), [0.2, 0.4), ...


class Tally:
    """Sums of losses on the device, in all and per noise level, read out once a log line."""

    def __init__(self, device):
        self.sums = torch.zeros(2 + 2 * N_LEVELS, device=device)  # total, micro-batches, then per level: losses, sequences
        self.n, self.has_levels = 0, False

    def add(self, losses):
        self.n += 1
        self.sums[0] += losses.total.detach()
        self.sums[1] += 1
        if losses.t is not None:
            self.has_levels = True
            level = (losses.t * N_LEVELS).long().clamp(max=N_LEVELS - 1)
            self.sums[2:2 + N_LEVELS].index_add_(0, level, losses.per_sequence.float())
            self.sums[2 + N_LEVELS:].index_add_(0, level, torch.ones_like(losses.per_sequence, dtype=torch.float))

    def steps(self, n_micro):
        return max(self.n / n_micro, 1)

    def summary(self, world):
        """Return {loss, by_level} averaged over all ranks; by_level is the first pass' cross-entropy, nan where no t fell."""
        if world > 1:
            dist.all_reduce(self.sums)
        sums = self.sums.tolist()
        pairs = zip(sums[2:2 + N_LEVELS], sums[2 + N_LEVELS:])
        by_level = [s / n if n else math.nan for s, n in pairs] if self.has_levels else None
        return {"loss": sums[0] / max(sums[1], 1), "by_level": by_level}


class Metrics:
    """metrics.jsonl: one JSON object per log line and validation, for plots."""

    def __init__(self, path, enabled):
        self.path, self.enabled = path, enabled

    def write(self, **values):
        if self.enabled:
            if values["by_level"]:  # JSON has no nan
                values["by_level"] = [None if math.isnan(x) else x for x in values["by_level"]]
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(values) + "\n")
            except OSError as error:
                raise UserError(f"cannot write {self.path}: {error.strerror}; ckpt.pt beside it can be resumed") from error

    def cut(self, step):
        """Drop what a stopped run had written past the checkpoint that is resumed, or all of a run that left no checkpoint."""
        if self.enabled and self.path.exists():
            kept = []
            for line in self.path.read_text(encoding="utf-8").splitlines() if step else []:
                with suppress(ValueError):  # the last line of a killed run may be torn
                    kept += [line + "\n"] * (json.loads(line)["step"] <= step)
            self.path.write_text("".join(kept), encoding="utf-8")


def tqdm_line(progress, say, text):
    """Print a line without tearing the progress bar, where there is one."""
    (say if progress.disable else progress.write)(text)
