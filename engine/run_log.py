"""What a run tells, and how it is stopped: sums of losses, lines on the terminal, metrics.jsonl, one run a folder, signals."""
import json
import math
import os
import shlex
import signal
import sys
import threading
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from engine.cli import UserError, check, say
from engine.files import NUMBER, as_text, integer, parse_json, write_new

try:
    import fcntl
except ImportError:  # Windows: nothing refuses a second run
    fcntl = None

N_LEVELS = 5  # noise levels in the log: t in [0, 0.2), [0.2, 0.4), ...


class Tally:
    """Sums of losses over sequences, in all and per noise level; they stay on the device and are read out once a log line."""

    def __init__(self, device):
        self.sums = torch.zeros(2, 1 + N_LEVELS, device=device)  # losses; sequences. Column 0: in all, then one per noise level

    def add(self, losses):
        n = len(losses.per_sequence)  # a mean over n sequences weighs n, so micro-batches may differ in size
        self.sums[0, 0] += n * losses.total.detach()
        self.sums[1, 0] += n
        if losses.t is not None:
            column = 1 + (losses.t * N_LEVELS).long().clamp(max=N_LEVELS - 1)
            self.sums.index_add_(1, column, torch.stack([losses.per_sequence, torch.ones_like(losses.per_sequence)]))

    def summary(self, world):
        """Return the means over the sequences of all ranks: {loss} and, for diffusion, {first_pass, by_level}.

        The loss is the sum of all passes; the first pass alone compares with log V: its mean, and that per level (or None).
        """
        if world > 1:
            dist.all_reduce(self.sums)
        (total, *by_level), (n, *counts) = self.sums.tolist()
        if not any(counts):
            return {"loss": total / n}
        return {"loss": total / n, "first_pass": sum(by_level) / n,
                "by_level": [s / count if count else None for s, count in zip(by_level, counts)]}


def read_log(path):
    """Return the objects of a metrics.jsonl; lines that were torn when a run was killed, or damaged since, are left out."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError, UserError):
            rows.append(parse_json(as_text(line, path), {"step": integer(), "loss": NUMBER}))
    return rows


@contextmanager
def one_run(folder, enabled):
    """Keep a second run out of a folder (UserError); yield a list for the first SIGINT or SIGTERM. Another one acts at once."""
    caught = []
    with ExitStack() as lock, ExitStack() as handlers:
        def note(number, frame):
            caught.append(number)
            handlers.close()
        if fcntl and enabled:
            held = os.open(folder, os.O_RDONLY)
            lock.callback(os.close, held)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:  # another one: a file system without locks
                check(not isinstance(error, BlockingIOError), f"another run is writing to {folder}; wait for it, or choose "
                                                              f"another --out_dir")
        for number in (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ():
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                handlers.callback(signal.signal, number, signal.signal(number, note))
        yield caught


def leave(number, world, enabled):
    """End the process as the signal of this number would, behind the command line that goes on with its run; 0 is none."""
    if number and enabled:
        python = "python" if world == 1 else f"torchrun --nproc_per_node={world}"
        words = shlex.join(word for word in sys.argv if not word.startswith("--resume"))
        say(f"stopped and saved; go on with: {python} {words} --resume")
    if number:
        sys.exit(128 + number)


class RunLog:
    """A progress bar, the lines above it, and metrics.jsonl: an object per line. All ranks but the first are silent."""

    def __init__(self, path, config, first_step, tokens_per_step, enabled):
        self.path, self.steps, self.tokens_per_step, self.enabled = path, config.steps, tokens_per_step, enabled
        self.bar = tqdm(total=config.steps, initial=first_step, disable=None if enabled else True, leave=False)
        # Of a stopped run what lies past its checkpoint goes, and all of a run that left none.
        rows = [row for row in read_log(path) if row["step"] <= first_step and first_step]
        self.validated = {row["step"] for row in rows if row.get("split") == "valid"}
        if enabled:
            write_new(path, "".join(json.dumps(row) + "\n" for row in rows), "out_dir")

    def say(self, text):
        """Print a line without tearing the progress bar, where there is one."""
        if self.enabled:
            say(text, print if self.bar.disable else self.bar.write)

    def train(self, step, summary, lr, norm, seconds):
        """Tell the losses of the steps since the last line, the last gradient norm, and the seconds a step took."""
        self.say(f"step {step:6d}/{self.steps} | {losses_text(summary)} | norm {norm:.2f} | lr {lr:.2e} | "
                 f"{1000 * seconds:.0f} ms | {self.tokens_per_step / seconds:,.0f} tokens/s | "
                 f"{timedelta(seconds=round(seconds * (self.steps - step)))} left")
        self.write(step=step, lr=lr, norm=norm, seconds_per_step=seconds, **summary)

    def valid(self, step, summary):
        """Tell the losses of a validation."""
        levels = "".join(" nan" if x is None else f" {x:.2f}" for x in summary.get("by_level", []))
        self.say(f"valid {step:5d}/{self.steps} | {losses_text(summary)}" + (f" | by noise level{levels}" if levels else ""))
        self.write(step=step, split="valid", **summary)
        self.validated.add(step)

    def write(self, **values):
        if not self.enabled:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; what was saved beside it stays") from error


def losses_text(summary):
    first_pass = f" | first pass {summary['first_pass']:.4f}" if "first_pass" in summary else ""
    return f"loss {summary['loss']:.4f}{first_pass}"


def check_finite(loss, norm, weights, step, lr, out_dir):
    """Raise UserError if the step broke the weights, which must not be saved then, or is about to."""
    broken = not all(x.isfinite().all() for x in weights.values() if x is not None)
    if broken or not (math.isfinite(loss) and math.isfinite(norm)):
        raise UserError(f"loss {loss}, gradient norm {norm} at or shortly before step {step}, learning rate {lr:.2e}; "
                        f"checkpoints saved before are untouched. Lower --lr or raise --warmup, in a new --out_dir (with "
                        f"--init_from={out_dir} where it holds a checkpoint)")
