"""The training loop, whole and visible, shared by train_ar.py and train_diff.py, for pretraining and for fine-tuning.

The same command is the same experiment on a CPU, on one GPU, or on N of them under torchrun: batch_size is global, and data and
noise depend on (seed, step, row of the global batch) alone. So accumulation and ranks change no more than rounding (and the
dropout masks, where dropout is used), and resuming on a CPU changes nothing.
"""
import json
import math
import os
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

from checkpoint import build_model, describe, load_checkpoint, save_checkpoint, tokenizer_of
from config import UserError, check, one_of
from data.dataset import open_data, read_meta
from data.tokenizer import load_tokenizer
from model import Transformer, shape_of
from noise import Noise

N_LEVELS = 5  # noise levels in the log: t in [0, 0.2), [0.2, 0.4), ...


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
        model = Transformer(tokenizer.vocab_size, n_layer, width, n_head, process.vector_width, config.dropout).to(device)
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


def pick_device(name):
    """Return the torch.device for auto, cpu, cuda or mps. Raises UserError for one that this machine lacks."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    one_of("device", name, ["auto", *available])
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if available[device])
    check(available[name], f"--device={name}: this machine has none, or this torch was built without it; --device=auto chooses")
    return torch.device(name)


def start_ranks(config):
    """Return (rank, world, device), joining the process group when started by torchrun."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(config.device)
    check(config.batch_size % world == 0, f"--batch_size={config.batch_size} is not divisible by {world} ranks")
    per_rank = config.batch_size // world
    micro = min(config.micro_batch_size, per_rank)
    check(per_rank % micro == 0, f"--batch_size={config.batch_size} over {world} rank(s) is not divisible by "
                                 f"--micro_batch_size={micro}")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world == 1:
        return 0, 1, device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), world, device


def check_config(config):
    """Raise UserError for the first flag that makes no sense."""
    for name in ("steps", "batch_size", "micro_batch_size", "log_every", "eval_every"):
        check(getattr(config, name) >= 1, f"--{name}={getattr(config, name)} must be at least 1")
    for name in ("warmup", "eval_sequences", "weight_decay"):
        check(getattr(config, name) >= 0, f"--{name}={getattr(config, name)} must not be negative")
    check(0 <= config.seed < 1 << 32, f"--seed={config.seed} must be at least 0 and below 2^32")
    check(0 < config.lr < math.inf, f"--lr={config.lr} must be above 0")
    check(0 <= config.beta2 < 1, f"--beta2={config.beta2} must be in [0, 1)")
    check(config.grad_clip > 0, f"--grad_clip={config.grad_clip} must be above 0")
    check(0 <= config.dropout < 1, f"--dropout={config.dropout} must be in [0, 1)")
    check(config.input_len is None or config.input_len >= 0, f"--input_len={config.input_len} must not be negative")
    check(config.target_len is None or config.target_len >= 1, f"--target_len={config.target_len} must be at least 1")
    one_of("schedule", config.schedule, ("cosine", "constant"))
    one_of("too_long", config.too_long, ("error", "drop"))
    one_of("dtype", config.dtype, ("auto", "float32", "bfloat16"))
    one_of("compile", config.compile, ("auto", "yes", "no"))


def canvas(config):
    """Return (input_len, target_len): the flags, else what the data folder recommends, else 64 + 64."""
    _, meta = read_meta(config.data)
    input_len = meta.get("input_len", 64) if config.input_len is None else config.input_len
    return input_len, meta.get("target_len", 64) if config.target_len is None else config.target_len


def origin_of(config):
    """Return the checkpoint that a run goes on from: its own on --resume, else --init_from's, else None."""
    if config.resume:
        return load_checkpoint(Path(config.out_dir) / "ckpt.pt")
    return load_checkpoint(config.init_from) if config.init_from else None


def choose_tokenizer(config, origin):
    """Return the tokenizer: that of the checkpoint, the one named, that of the text folder, or bpe, in this order."""
    if origin:
        tokenizer = tokenizer_of(origin)
        check(config.tokenizer in (None, tokenizer.name),
              f"tokenizer mismatch: --tokenizer={config.tokenizer}, but the checkpoint was trained with {tokenizer.name!r}")
        return tokenizer
    _, meta = read_meta(config.data)
    return load_tokenizer(config.tokenizer or meta.get("tokenizer", "bpe"))


# Flags that may differ between a run and its resumption. All but one leave the computation as it was, to rounding: more --steps
# prolong a run, but also stretch the cosine, so the learning rate rises again.
FREE_ON_RESUME = {"resume", "out_dir", "init_from", "steps", "log_every", "eval_every", "device", "compile", "micro_batch_size"}


def open_out_dir(config, path, process, origin):
    """Make sure that out_dir can be written, that nothing in it would be lost, and that --resume goes on with the same run."""
    held = config.resume or not (path.exists() or path.with_name("best.pt").exists())
    check(held, f"{path.parent} already holds a run; continue it with --resume, or choose another --out_dir")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "metrics.jsonl").open("a", encoding="utf-8").close()
    except OSError as error:
        raise UserError(f"cannot write to --out_dir={config.out_dir}: {error.strerror}") from error
    if not config.resume:
        return
    check("optimizer" in origin, f"{path} holds no optimizer state; start from it with --init_from={path} instead")
    check(origin["process"] == describe(process), f"{path} is a run of {origin['process']}, not of {describe(process)}")
    now, then = asdict(config), origin["config"]
    changed = [k for k in now if k not in FREE_ON_RESUME and now[k] != then.get(k)]
    changes = ", ".join(f"--{k} was {then.get(k)}, is {now[k]}" for k in changed)
    check(not changed, f"resuming would not be the same run: {changes}")
    check(config.steps > origin["step"], f"{path} is at step {origin['step']} already; to go on, raise --steps")


def best_loss(path):
    """Return the validation loss of best.pt, infinity if there is none yet."""
    return load_checkpoint(path)["best"] if path.exists() else math.inf


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
