"""How fast is it here, beside a plain GPT and beside what the arithmetic allows? One command, one table, one JSON file.

    python bench.py                                                          # a laptop, some minutes
    python bench.py --size=6x384x6 --dtypes=float32,bfloat16 --compiled      # wants a C++ compiler
    python bench.py --size=base --vocab_size=50368 --input_len=512 --target_len=512 --dtypes=bfloat16 --compiled

Every ratio is of runs that took turns in this process: the median over --rounds of (this one's time / the yardstick's of the
same round), with the quartiles. Seconds depend on what else the machine does; ratios much less. The yardstick of training is a
plain GPT-2 (below), eager and in the first dtype; that of decoding is this repository's AR decoder with its cache. All decoding
is eager; AR without a cache is timed up to 512 tokens. A floor is the larger of FLOPs / matmul peak and bytes of weights / copy
rate, both measured at the start (the bf16 peak of a known GPU is the one its maker states). Weights that stay in a cache of the
processor are read faster than that.
"""
import itertools
import json
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.nn as nn
import torch.nn.functional as F

from autoregressive import Autoregressive
from config import UserError, check, one_of, parse, run
from data.dataset import Batch
from diffusion import Absorbing, Uniform
from model import Transformer, flops, shape_of
from noise import Noise
from start import pick_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L4": 121e12}  # dense bf16 FLOP/s that NVIDIA states, not for PCIe


@dataclass
class Config:
    size: str = "4x128x4"  # LAYERSxWIDTHxHEADS or a name, see model.py
    vocab_size: int = 4096
    input_len: int = 128  # of training and decoding
    target_len: int = 128  # of training
    batch_size: int = 8  # sequences of a training step
    lengths: str = "128,512"  # target tokens to decode
    n_steps: str = "1,2,5,10,20,50"  # decoding steps of diffusion
    decode_batch: str = "1"  # inputs decoded at once
    dtypes: str = "float32"  # float32, bfloat16: weights in float32 and autocast in training, weights of that type in decoding
    compiled: bool = False  # training also by torch.compile
    rounds: int = 7  # repetitions, interleaved
    device: str = "auto"
    out: str | None = None  # JSON file for all numbers


class PlainBlock(nn.Module):
    """GPT-2's block: LayerNorm, biases, GELU."""

    def __init__(self, width, n_head):
        super().__init__()
        self.n_head = n_head
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class PlainGPT(nn.Module):
    """The yardstick: a language model of GPT-2's blocks, learned positions and tied embedding, with nothing of ours in it."""

    def __init__(self, vocab_size, n_layer, width, n_head, n_positions):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(n_positions, width)
        self.blocks = nn.ModuleList(PlainBlock(width, n_head) for _ in range(n_layer))
        self.norm = nn.LayerNorm(width)
        for weight in (self.embedding.weight, self.positions.weight):
            nn.init.normal_(weight, std=0.02)

    def forward(self, tokens):
        """Return the mean loss over all tokens (B, L + 1) but the first."""
        x = self.embedding(tokens[:, :-1]) + self.positions.weight[:tokens.size(1) - 1]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(F.linear(self.norm(x), self.embedding.weight).flatten(0, 1).float(), tokens[:, 1:].flatten())


# ---- timing ----

def take_turns(functions, rounds, device):
    """Return {name: [seconds]}: each function once a round, after two rounds that do not count."""
    times = {name: [] for name in functions}
    for i in range(rounds + 2):
        for name, function in functions.items():
            sync(device)
            start = time.perf_counter()
            function()
            sync(device)
            if i >= 2:
                times[name].append(time.perf_counter() - start)
    return times


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(times, yardstick):
    """Return (median, lower quartile, upper quartile) of the ratios of two lists of seconds, round by round."""
    ratios = [a / b for a, b in zip(times, yardstick)]
    low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else (ratios * 3)
    return median(ratios), low, high


def peak(dtype, device):
    """Return FLOP/s: what the maker states for this GPU, else the best of some large matrix products."""
    words = torch.cuda.get_device_name(device).replace("-", " ").split() if device.type == "cuda" else []
    stated = [PEAKS[word] for word in words if word in PEAKS and "PCIe" not in words]
    if stated and dtype == torch.bfloat16:
        return stated[0]
    n = 4096 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n ** 3 / min(take_turns({"": lambda: a @ a}, 5, device)[""])


def copy_rate(device):
    """Return bytes/s of memory read and written by a copy too large for caches."""
    a = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() / min(take_turns({"": lambda: b.copy_(a)}, 3, device)[""])


# ---- training ----

def stepper(model, loss, device, autocast):
    """Return a function that takes one optimizer step on loss(), as train_loop.py does."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type in ("cpu", "cuda"))

    def step():
        with autocast:
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def training_steps(config, device, dtype, compiled):
    """Return ({name: function}, {name: FLOPs of a step}, {name: parameters}) of all that is trained."""
    B, S, T, V, shape = config.batch_size, config.input_len, config.target_len, config.vocab_size, shape_of(config.size)
    tokens = torch.randint(V - 1, (B, S + T + 1), generator=torch.Generator().manual_seed(0)).to(device)
    autocast = torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()
    noise, split = Noise(0, "train", 0, range(B)), Batch(tokens[:, :S], None, tokens[:, S:-1])
    plain = PlainGPT(V, *shape, S + T).to(device)
    compile_ = partial(torch.compile, dynamic=False)
    call = compile_(plain) if compiled else plain
    steps = {"plain GPT": stepper(plain, lambda: call(tokens), device, autocast)}
    n_params = {"plain GPT": sum(p.numel() for p in plain.parameters())}
    cost = {"plain GPT": 3 * B * flops(Transformer(V, *shape).shape, S + T)}
    kinds = {"AR, no inputs": (Autoregressive(0, 1, 2), Batch(tokens[:, :0], None, tokens[:, :-1]), 1),
             "AR": (Autoregressive(0, 1, 2), split, 1),
             "absorbing": (Absorbing(V - 1), split, 1),
             "uniform (SUNDAE)": (Uniform(V), split, 2),
             "uniform, inputs twice": (Uniform(V, inputs_attention="full"), split, 2)}
    for name, (process, batch, passes) in kinds.items():
        model = Transformer(V, *shape).to(device)
        if compiled:
            model.encode, model.states, model.logits = map(compile_, (model.encode, model.states, model.logits))
        n_params[name] = model.n_params()
        steps[name] = stepper(model, lambda p=process, m=model, b=batch: p.loss(m, b, noise).total, device, autocast)
        n_inputs, n_targets = batch.inputs.size(1), batch.targets.size(1)
        encodings = passes if process.inputs_attention == "full" else 1
        cost[name] = 3 * B * (encodings * flops(model.shape, n_inputs, logits=False) + passes * flops(model.shape, n_targets))
    return steps, cost, n_params


def bench_training(config, device, peaks):
    """Return rows, one for each kind of training step in each dtype, eager and compiled."""
    modes = [(dtype, compiled) for dtype in config.dtypes.split(",") for compiled in (False, True)[:1 + config.compiled]]
    torch._dynamo.config.recompile_limit = 100  # all models share their code, so each counts as a recompilation
    functions, costs, memory = {}, {}, {}
    for dtype, compiled in modes:
        for found, of_mode in zip((functions, costs, memory), training_steps(config, device, dtype, compiled)):
            found |= {(name, dtype, compiled): value for name, value in of_mode.items()}
    memory = {key: peak_memory(functions[key], n_params, device) for key, n_params in memory.items()}
    times, rows = take_turns(functions, config.rounds, device), []
    for (name, *mode), seconds in times.items():
        dtype, compiled = mode
        middle, low, high = ratio(seconds, times["plain GPT", *modes[0]])
        tokens, cost = config.batch_size * (config.input_len + config.target_len), costs[name, *mode]
        rows.append(dict(what=name, dtype=dtype, compiled=compiled, seconds=median(seconds), ratio=middle, low=low, high=high,
                         tokens_per_second=tokens / median(seconds), mfu=cost / median(seconds) / peaks[dtype],
                         ar=ratio(seconds, times["AR", *mode])[0], arithmetic=cost / costs["AR", *mode],
                         memory=memory[name, *mode]))
    return rows


def peak_memory(step, n_params, device):
    """Return the bytes of GPU memory that a step needs at the most, weights and AdamW's moments included; nan elsewhere."""
    if device.type != "cuda":
        return float("nan")
    step()  # allocates the moments, and compiles
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)  # of all models
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before + 3 * 4 * n_params


# ---- decoding ----

@torch.no_grad()
def decode_uncached(process, model, batch):
    """AR decoding without a cache: every token costs a pass over all before it, inputs included. Greedy."""
    tokens = torch.full_like(batch.targets, process.start)
    for i in range(batch.targets.size(1)):
        context = model.encode(batch.inputs, batch.pad_mask, process.inputs_attention)
        states = model.states(process.feed(tokens[:, :i + 1]), context, "causal")        # (B, i + 1, C)
        tokens[:, i] = model.logits(states[:, -1]).argmax(-1)
    return tokens


def decoders(config, model, batch):
    """Return {name: (function, FLOPs, bytes)} of all ways to fill a canvas; FLOPs and bytes are those of the weights."""
    (B, S), T, V = batch.inputs.shape, batch.targets.size(1), config.vocab_size
    noise, ar = Noise(0, "decode", 0, range(B)), Autoregressive(0, -1, 2)  # -1: no text ends before its canvas does
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    backbone = weights - model.embedding.weight.numel() * model.embedding.weight.element_size()  # what encode() reads
    passed = lambda silent, read: B * (flops(model.shape, silent, logits=False) + flops(model.shape, read))  # tokens
    found = {"AR": (lambda: list(ar.decode(model, batch, noise)), passed(S, T), T * weights + backbone)}
    if T <= 512:
        work = passed(T * S + T * (T - 1) / 2, T)
        found["AR, no cache"] = (lambda: decode_uncached(ar, model, batch), work, T * (weights + backbone))
    several = [(n, 1, "bidirectional") for n in map(int, config.n_steps.split(","))]
    for n, samples, attention in [*several, (10, 8, "bidirectional"), (10, 1, "full")]:
        name = f"{n} steps" + f" x {samples} samples" * (samples > 1) + ", inputs anew" * (attention == "full")
        decode = partial(Uniform(V, inputs_attention=attention).decode, model, batch, noise, n_steps=n, n_samples=samples)
        work = passed(S * n if attention == "full" else S, n * samples * T)
        read = n * weights + (0 if attention == "full" else backbone)
        found[name] = (lambda decode=decode: list(decode()), work, read)
    return found


def bench_decoding(config, device, peaks, bytes_per_second):
    """Return rows: AR with and without its cache, and diffusion, at every length and batch size."""
    numbers = lambda text: map(int, text.split(","))
    rows, V = [], config.vocab_size
    for dtype in config.dtypes.split(","):
        model = Transformer(V, *shape_of(config.size)).to(device, DTYPES[dtype]).eval()
        for B, T in itertools.product(numbers(config.decode_batch), numbers(config.lengths)):
            inputs = torch.randint(V, (B, config.input_len), device=device)
            ways = decoders(config, model, Batch(inputs, None, torch.zeros(B, T, dtype=torch.long, device=device)))
            times = take_turns({name: function for name, (function, *_) in ways.items()}, config.rounds, device)
            for name, seconds in times.items():
                (middle, low, high), (_, operations, read) = ratio(times["AR"], seconds), ways[name]
                rows.append(dict(what=name, dtype=dtype, batch=B, length=T, seconds=median(seconds), faster=middle, low=low,
                                 high=high, flops=operations, bytes=read,
                                 floor=max(operations / peaks[dtype], read / bytes_per_second)))
    return rows


# ---- the tables ----

TRAINING = (f"{'':24s}{'dtype':10s}{'':9s}{'ms':>9s}{'tokens/s':>10s}{'x plain GPT':>13s}{'quartiles':>14s}{'x AR':>7s}"
            f"{'FLOPs':>7s}{'MFU':>6s}{'GB':>7s}")
DECODING = (f"{'':24s}{'dtype':10s}{'batch':>6s}{'length':>7s}{'ms':>10s}{'AR takes x':>12s}{'quartiles':>14s}{'GFLOP':>9s}"
            f"{'MB':>9s}{'floor ms':>10s}")


def training_line(r):
    return (f"{r['what']:24s}{r['dtype']:10s}{'compiled' if r['compiled'] else 'eager':9s}{1e3 * r['seconds']:9.1f}"
            f"{r['tokens_per_second']:10,.0f}{r['ratio']:13.2f}{r['low']:8.2f}{r['high']:6.2f}{r['ar']:7.2f}"
            f"{r['arithmetic']:7.2f}{100 * r['mfu']:5.0f}%{r['memory'] / 1e9:7.2f}")


def decoding_line(r):
    return (f"{r['what']:24s}{r['dtype']:10s}{r['batch']:6d}{r['length']:7d}{1e3 * r['seconds']:10.1f}{r['faster']:12.2f}"
            f"{r['low']:8.2f}{r['high']:6.2f}{r['flops'] / 1e9:9.2f}{r['bytes'] / 1e6:9.1f}{1e3 * r['floor']:10.2f}")


def main(argv=None):
    config = parse(Config, argv)
    device = pick_device(config.device)
    device = torch.device("cpu") if device.type == "mps" else device  # samplers compute in float64, MPS has none
    check(config.vocab_size >= 4, f"--vocab_size={config.vocab_size} must be at least 4")  # three of them mean something
    for name in ("target_len", "batch_size", "rounds"):
        check(getattr(config, name) >= 1, f"--{name}={getattr(config, name)} must be at least 1")
    for name in ("lengths", "n_steps", "decode_batch"):
        check(all(n.isdecimal() and int(n) > 0 for n in getattr(config, name).split(",")),
              f"--{name}={getattr(config, name)} must be whole numbers above 0 with commas between them")
    check(config.input_len >= 1, f"--input_len={config.input_len} must be at least 1")
    for dtype in config.dtypes.split(","):
        one_of("dtypes", dtype, DTYPES)
    shape_of(config.size)
    check(not (config.out and Path(config.out).exists()), f"--out={config.out} exists; it is not overwritten")
    try:
        Path(config.out or os.devnull).touch()  # found out now, not after minutes
    except OSError as error:
        raise UserError(f"cannot write --out={config.out}: {error.strerror}") from error
    peaks, bandwidth = {dtype: peak(DTYPES[dtype], device) for dtype in config.dtypes.split(",")}, copy_rate(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, " + ", ".join(f"{dtype} {p / 1e12:.3g} TFLOP/s" for dtype, p in peaks.items())
          + f", memory {bandwidth / 1e9:.3g} GB/s; {config.size}, {config.rounds} rounds")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as train_loop.py does, and sample.py does not
    training = bench_training(config, device, peaks)
    torch.set_float32_matmul_precision("highest")
    print(f"\nTraining step, {config.batch_size} x ({config.input_len} + {config.target_len}) tokens", TRAINING,
          *map(training_line, training), sep="\n", flush=True)
    decoding = bench_decoding(config, device, peaks, bandwidth)
    print(f"\nDecoding behind {config.input_len} inputs; FLOPs, bytes and floor are those of the weights", DECODING,
          *map(decoding_line, decoding), sep="\n")
    if config.out:
        facts = dict(config=asdict(config), device=name, torch=torch.__version__, peaks=peaks, bytes_per_second=bandwidth,
                     training=training, decoding=decoding)
        Path(config.out).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
