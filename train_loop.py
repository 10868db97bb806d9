"""The training loop, whole and visible, shared by train_ar.py and train_diff.py, for pretraining and for fine-tuning.

The same command is the same experiment on a CPU, on one GPU, or on N of them under torchrun: batch_size is global, and data and
noise depend on (seed, step, row of the global batch) alone. So accumulation and ranks change no more than rounding (and the
dropout masks, where dropout is used), and resuming on a CPU changes nothing.
"""
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

from checkpoint import build_model, describe, save_checkpoint
from config import UserError, check
from data.dataset import open_data
from model import Transformer, shape_of
from noise import Noise
from run_log import Metrics, Tally, tqdm_line
from start import best_loss, canvas, check_config, open_out_dir, start_ranks


@dataclass
class LoopConfig:
    data: str = "text"  # a folder made by data/prepare.py, by path or by its name in data/prepared
    out_dir: str = "out/run"  # where ckpt.pt, best.pt and metrics.jsonl go
    init_from: str | None = None  # checkpoint (.pt or out_dir) to start from, with a fresh optimizer
    resume: bool = False  # continue the run in out_dir exactly where its ckpt.pt left it
    tokenizer: str | None = None  # bpe, bytes, gpt2 or a ranks file; default: the checkpoint's, else the data's, else bpe
    input_len: int | None = None  # input columns S (0 = plain language model); default: what the data recommends, else 64
    target_len: int | None = None  # target columns T, EOS included; default: what the data recommends, else 64
    too_long: str = "error"  # training examples that do not fit the canvas: error or drop
    steps: int = 1000  # optimizer steps
    batch_size: int = 64  # sequences per optimizer step, over all ranks
    micro_batch_size: int = 64  # sequences per forward pass of one rank; lower it if memory runs out
    lr: float = 1e-3  # peak learning rate of AdamW
    schedule: str = "cosine"  # cosine (to a tenth of lr) or constant, after the warm-up
    warmup: int = 50  # steps of linear warm-up
    weight_decay: float = 0.1  # on matrices only
    beta2: float = 0.99  # AdamW's second moment decay
    grad_clip: float = 1.0  # largest gradient norm
    log_every: int = 10  # steps between log lines
    eval_every: int = 250  # steps between checkpoints, each followed by a validation
    eval_sequences: int = 256  # validation sequences, always the same ones with the same noise
    seed: int = 0  # of weights, data order and noise
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # auto (bfloat16 where the GPU has it), float32 or bfloat16
    compile: str = "auto"  # auto (on CUDA), yes or no


def train(config, process, tokenizer, origin=None):
    """Train `process` on config.data, from the checkpoint dict of origin_of() if there is one; return the path of ckpt.pt."""
    check_config(config)
    rank, world, device = start_ranks(config)
    out_dir, say = Path(config.out_dir), (print if rank == 0 else (lambda *_, **__: None))
    path, metrics = out_dir / "ckpt.pt", Metrics(out_dir / "metrics.jsonl", enabled=rank == 0)
    open_out_dir(config, path, process, origin)
    input_len, target_len = canvas(config)
    data = open_data(config.data, tokenizer, input_len, target_len, config.too_long)

    torch.manual_seed(config.seed)
    if origin:
        shape = tuple(origin["shape"][key] for key in ("n_layer", "width", "n_head"))
        check(config.size is None or shape_of(config.size) == shape,
              f"--size={config.size} differs from the checkpoint's {'x'.join(map(str, shape))}; leave --size out")
        model = build_model(origin, device, config.dropout)
    else:
        n_layer, width, n_head = shape_of(config.size or "tiny")
        model = Transformer(tokenizer.vocab_size, n_layer, width, n_head, config.dropout).to(device)
    optimizer = make_optimizer(model, config, device)
    first_step, best = 0, math.inf
    if config.resume:
        optimizer.load_state_dict(origin["optimizer"])
        first_step, best = origin["step"], best_loss(out_dir / "best.pt")
    metrics.cut(first_step)
    n_params = model.n_params()
    history = [] if origin is None else origin["history"]  # the runs before this one
    if origin and origin["step"] and not config.resume:
        history = [*history, f"{origin['process']['name']}, {origin['step']} steps on {origin['config']['data']}"]

    if config.compile == "yes" or (config.compile == "auto" and device.type == "cuda"):
        model.encode, model.decode = torch.compile(model.encode), torch.compile(model.decode)
    objective = Objective(model, process)
    if world > 1:
        objective = nn.parallel.DistributedDataParallel(objective, device_ids=[device.index] if device.type == "cuda" else None)
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = config.dtype == "bfloat16" or (config.dtype == "auto" and has_bf16)
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
    micro = min(config.micro_batch_size, config.batch_size // world)
    n_micro = config.batch_size // (world * micro)
    tokens_per_step = config.batch_size * (input_len + target_len)
    say(f"{process.name} on {config.data}: {n_params:,} parameters, canvas {input_len} + {target_len}, {tokens_per_step:,} "
        f"tokens per step ({world} rank{'s' * (world > 1)} x {n_micro} x {micro} sequences), {data.n_tokens:,} tokens of data, "
        f"{device}, {'bfloat16' if bf16 else 'float32'}, log V = {math.log(tokenizer.n_noise):.2f} nats")

    def snapshot(step, **more):
        return dict(model=model.state_dict(), shape=model.shape, process=describe(process), step=step, history=history,
                    tokenizer={"name": tokenizer.name, "hash": tokenizer.hash}, input_len=input_len, target_len=target_len,
                    config=asdict(config), **more)

    progress = tqdm(total=config.steps, initial=first_step, disable=None if rank == 0 else True, leave=False)
    tally, clock, seconds = Tally(device), time.perf_counter(), 0.0
    for step in range(first_step, config.steps):
        model.train()
        torch.manual_seed((config.seed * 1_000_003 + step) * 1_009 + rank)  # dropout resumes exactly too
        lr = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for m in range(n_micro):
            first_row = (m * world + rank) * micro
            rows = range(first_row, first_row + micro)
            batch = data.train_batch(config.seed, step, rows, config.batch_size).to(device)
            last = m + 1 == n_micro
            with autocast, (nullcontext() if last or world == 1 else objective.no_sync()):
                losses = objective(batch, Noise(config.seed, "train", step, rows))
            (losses.total / n_micro).backward()
            tally.add(losses)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.update()

        done = step + 1
        evaluate_now = done % config.eval_every == 0 or done == config.steps
        if done % config.log_every == 0 or evaluate_now or step == 0:
            summary = tally.summary(world)
            broken = evaluate_now and not all(p.isfinite().all() for p in model.parameters())  # by this step: must not be saved
            if broken or not (math.isfinite(summary["loss"]) and math.isfinite(norm)):
                raise UserError(f"loss {summary['loss']}, gradient norm {float(norm)} at or shortly before step {done}, "
                                f"learning rate {lr:.2e}; checkpoints saved before are untouched. Lower --lr or raise "
                                f"--warmup, in a new --out_dir (with --init_from={out_dir} where it holds a checkpoint)")
            seconds = (time.perf_counter() - clock) / tally.steps(n_micro)
            eta = timedelta(seconds=round(seconds * (config.steps - done)))
            tqdm_line(progress, say, f"step {done:6d}/{config.steps} | loss {summary['loss']:.4f} | norm {float(norm):.2f} | "
                                     f"lr {lr:.2e} | {1000 * seconds:.0f} ms | {tokens_per_step / seconds:,.0f} tokens/s | "
                                     f"{eta} left")
            metrics.write(step=done, lr=lr, norm=float(norm), seconds_per_step=seconds, **summary)
            tally, clock = Tally(device), time.perf_counter()
        if evaluate_now:
            if rank == 0:  # saved before it is evaluated: a crash there costs nothing
                save_checkpoint(path, snapshot(done, optimizer=optimizer.state_dict()))
            valid = evaluate(model, process, data, config, device, autocast, rank, world)
            if valid:
                levels = " | by noise level " + " ".join(f"{x:.2f}" for x in valid["by_level"]) if valid["by_level"] else ""
                tqdm_line(progress, say, f"valid {done:5d}/{config.steps} | loss {valid['loss']:.4f}{levels}")
                metrics.write(step=done, split="valid", **valid)
                if valid["loss"] < best:
                    best = valid["loss"]
                    if rank == 0:
                        save_checkpoint(out_dir / "best.pt", snapshot(done, best=best))
            clock = time.perf_counter()
    progress.close()
    if world > 1:
        dist.destroy_process_group()
    return path


class Objective(nn.Module):
    """Model and process in one module whose forward() is the loss: what DistributedDataParallel wraps."""

    def __init__(self, model, process):
        super().__init__()
        self.model, self.process = model, process

    def forward(self, batch, noise):
        return self.process.loss(self.model, batch, noise)


@torch.no_grad()
def evaluate(model, process, data, config, device, autocast, rank=0, world=1):
    """Return the mean validation losses over fixed sequences with fixed noise, or None without validation data."""
    n = min(config.eval_sequences, data.n_valid())
    n -= n % world
    if not n:
        return None
    model.eval()
    micro = math.gcd(n // world, config.micro_batch_size)  # equal micro-batches, so that their mean is the mean
    tally = Tally(device)
    for first in range(rank * micro, n, world * micro):
        rows = range(first, first + micro)
        with autocast:
            tally.add(process.loss(model, data.valid_batch(rows).to(device), Noise(0, "valid", 0, rows)))
    return tally.summary(world)


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
    gains = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=device.type in ("cpu", "cuda"))
