"""The training loop, whole and visible, shared by train_ar.py and train_diff.py, for pretraining and for fine-tuning.

The same command is the same experiment on a CPU, on one GPU, or on N of them under torchrun: batch_size is global, and data and
noise depend on (seed, step, row of the global batch) alone. So accumulation and ranks change no more than rounding (and the
dropout masks, where dropout is used), and resuming on a CPU changes nothing.
"""
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn

from autoregressive import cross_entropy
from data.dataset import open_data
from engine.checkpoint import commit, describe, lineage, read_checkpoint, save_checkpoint
from engine.cli import check
from engine.devices import out_of_memory, start_ranks
from engine.noise import Noise
from engine.parallel import agreed, load_optimizer, prepare, synchronised, whole
from engine.run_log import RunLog, Tally, check_finite, leave, one_run
from start import canvas, check_config, open_out_dir, peak_rate, start_model


@out_of_memory("--micro_batch_size", "--target_len")
def train(config, process, tokenizer, origin=None, guide=None):
    """Train `process` on config.data, from the checkpoint dict of origin_of() if there is one; return the path of ckpt.pt.

    guide: what else the weights are trained by (beyond/guide.py); validation keeps to the loss of the process.
    """
    check_config(config)
    config.lr = peak_rate(config, origin)
    rank, world, device = start_ranks(config.device, config.batch_size, config.micro_batch_size, config.fsdp)
    S, T = canvas(config)
    data = open_data(config.data, tokenizer, S, T, config.too_long, config.objective, config.n_canvases)
    torch.manual_seed(config.seed)
    model = start_model(config, process, tokenizer, origin, "cpu" if config.fsdp else device)  # shards move to their devices
    loss_of, autocast, dtype = prepare(model, cross_entropy, config, world, device)  # loss_of: process.loss(model, ...)
    out_dir = open_out_dir(config, process, origin, data)  # last: what is refused above leaves nothing behind
    optimizer = make_optimizer(model, config, device)
    first_step, best, history = where_it_stands(config, origin, optimizer)
    facts = dict(shape=model.shape, process=describe(process), tokenizer={"name": tokenizer.name, "hash": tokenizer.hash},
                 input_len=S, target_len=T, config=asdict(config) | {"data": str(data.path)}, data=data.hash,
                 history=history, commit=commit())

    micro = min(config.micro_batch_size, config.batch_size // world)
    n_micro = config.batch_size // (world * micro)
    tokens_per_step = round(config.batch_size * data.tokens_per_row)
    share = (0, 1) if config.fsdp else (rank, world)  # shards are gathered at every pass: all ranks evaluate all
    with one_run(out_dir, enabled=rank == 0) as caught:  # signals: the step is finished and saved, then the run stops
        log = RunLog(out_dir / "metrics.jsonl", config, first_step, tokens_per_step, enabled=rank == 0)
        n_valid, alone = min(config.eval_sequences, data.n_valid()), caught if world == 1 else ()
        complete = lambda step: step == config.steps and (step in log.validated or not n_valid)
        check(not complete(first_step), f"{out_dir} is at step {first_step} already; to go on, raise --steps")
        on = f"{config.data} ({data.objective})" if data.objective else config.data
        log.say(f"{process.name} on {on}: {model.n_params():,} parameters, canvas {S} + {T}, "
                f"{tokens_per_step:,} tokens per step ({world} rank{'s' * (world > 1)} x {n_micro} x {micro} sequences), "
                f"{data.n_tokens:,} tokens of data, {device}, {str(dtype).removeprefix('torch.')}, "
                f"log V = {math.log(tokenizer.n_noise):.2f} nats")
        tally, clock, logged, save, stop = Tally(device), time.perf_counter(), first_step, first_step > 0, 0
        for step in range(first_step, config.steps + 1):
            if step and (step % config.eval_every == 0 or step == config.steps) and step not in log.validated:
                # Here, behind the checkpoint, a crash costs nothing: a resumed run begins with the validation that it missed.
                valid = evaluate(loss_of, process, data, config, device, autocast, *share, alone)
                if valid and agreed([valid["loss"] < best], world, device):  # shards give each rank a loss of its own rounding
                    best, weights = valid["loss"], whole(model.state_dict(), rank)
                    if rank == 0:
                        save_checkpoint(out_dir / "best.pt", facts | dict(step=step, model=weights, best=best))
                if valid:
                    log.valid(step, valid)
                clock = time.perf_counter()
            if step == config.steps or (save and (stop or alone)):  # after the next step, if this one is not saved
                break

            model.train()
            torch.manual_seed((config.seed * 1_000_003 + step) * 1_009 + rank)  # dropout resumes exactly too
            lr = learning_rate(config, step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            for m in range(n_micro):
                first_row = (m * world + rank) * micro
                rows = range(first_row, first_row + micro)
                batch = data.train_batch(config.seed, step, rows, config.batch_size).to(device)
                noise = Noise(config.seed, "train", step, rows)
                with synchronised(loss_of, last=m + 1 == n_micro):
                    with autocast:
                        losses = loss_of(guide or process, batch, noise)
                    (losses.total / n_micro).backward()
                tally.add(losses)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            log.bar.update()

            done = step + 1
            tell = done % config.log_every == 0 or step == 0
            stop = agreed(caught, world, device) if world == 1 or tell else 0
            save = done % config.eval_every == 0 or done == config.steps or stop
            if tell or save:
                summary, norm = tally.summary(world), whole(norm).item()
                weights = whole(model.state_dict(), rank) if save else {}
                check_finite(summary["loss"], norm, weights, done, lr, out_dir)
                log.train(done, summary, lr, norm, seconds=(time.perf_counter() - clock) / (done - logged))
                tally, clock, logged = Tally(device), time.perf_counter(), done
            if save:
                moments = whole(optimizer.state_dict(), rank)
                if rank == 0:
                    save_checkpoint(out_dir / "ckpt.pt", facts | dict(step=done, model=weights, optimizer=moments))
        log.bar.close()
        stopped = 0 if complete(step) else agreed(caught, world, device)
    if world > 1:
        del loss_of  # a copy that outlived the group would wait for its threads, holding the lock that they wait for
        dist.destroy_process_group()
    leave(stopped, world, enabled=rank == 0)
    return out_dir / "ckpt.pt"


def where_it_stands(config, origin, optimizer):
    """Return (first step, best validation loss so far, the runs that led here); a resumed run's moments are loaded."""
    if not config.resume:
        return 0, math.inf, lineage(origin) if origin else []
    load_optimizer(optimizer, origin["optimizer"])
    best = Path(config.out_dir) / "best.pt"
    return origin["step"], read_checkpoint(best).get("best", math.inf) if best.exists() else math.inf, origin["history"]


@torch.no_grad()
def evaluate(loss_of, process, data, config, device, autocast, rank=0, world=1, caught=()):
    """Return the mean losses over fixed validation sequences with fixed noise; None if there are none, or a signal came."""
    n = min(config.eval_sequences, data.n_valid())
    loss_of.eval()
    tally, mine = Tally(device), range(n * rank // world, n * (rank + 1) // world)
    for first in range(0, len(mine), config.micro_batch_size):
        if caught:
            return None
        rows = mine[first:first + config.micro_batch_size]
        with autocast:
            tally.add(loss_of(process, data.valid_batch(rows).to(device), Noise(0, "valid", 0, rows)))
    return tally.summary(world) if n else None


def learning_rate(config, step):
    """Linear warm-up, then constant or half a cosine down to a tenth of the peak."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model, config, device):
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    gains = [p for p in model.parameters() if p.dim() < 2]  # and biases: of published models, ours has none
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=device.type in ("cpu", "cuda"))
