"""How fast is it here, beside a plain GPT? One command, two tables, one JSON file.

    python experiments/bench.py                                                          # a laptop, some minutes
    python experiments/bench.py --size=6x384x6 --dtypes=float32,bfloat16 --compiled      # wants a C++ compiler
    python experiments/bench.py --size=base --vocab_size=50368 --input_len=512 --target_len=512 --dtypes=bfloat16 --compiled

Every ratio is of runs that took turns in this process: the median over --rounds of (this one's time / the yardstick's of the
same round), with the quartiles. Seconds depend on what else the machine does; ratios much less. The yardstick of training is
plain_gpt.py, that of decoding this repository's AR decoder with its cache, in the same dtype, and compiled where others are.
AR without a cache is timed eager, up to 1 TFLOP. FLOPs are those of the weights. MB: the most that a step has allocated at
once, with weights and moments.
"""
import copy
import itertools
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.nn as nn

if __name__ == "__main__":  # a script finds only modules of its own folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from autoregressive import Autoregressive, cross_entropy
from data.dataset import Batch
from diffusion import Absorbing, Uniform
from engine.cli import check, check_new, one_of, parse, run, write_json
from engine.devices import compiler_fault, out_of_memory, pick_device
from engine.noise import Noise
from engine.parallel import compile_model
from experiments.common import flops
from experiments.plain_gpt import PlainGPT
from model import Transformer
from start import shape_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Config:
    size: str = "4x128x4"  # LAYERSxWIDTHxHEADS or a name, see start.py
    vocab_size: int = 4096
    input_len: int = 128
    target_len: int = 128  # tokens to train on
    batch_size: int = 8  # sequences of a training step
    lengths: str = "128,512"  # target tokens to decode
    n_steps: str = "1,2,5,10,20,50"  # decoding steps of diffusion
    decode_batch: str = "1"  # inputs decoded at once
    dtypes: str = "float32"  # float32, bfloat16: weights in float32 and autocast in training, weights of that type in decoding
    compiled: bool = False  # by torch.compile too
    rounds: int = 7  # repetitions, interleaved
    device: str = "auto"
    out: str | None = None  # JSON file for all numbers


# ---- timing ----

def take_turns(functions, rounds, device):
    """Return {name: [seconds]}: each function once a round, after two rounds that do not count."""
    times, sync = {name: [] for name in functions}, torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for i in range(rounds + 2):
        for name, function in functions.items():
            sync()
            start = time.perf_counter()
            function()
            sync()
            if i >= 2:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times, yardstick):
    """Return (median, lower quartile, upper quartile) of the ratios of two lists of seconds, round by round."""
    ratios = [a / b for a, b in zip(times, yardstick)]
    low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else (ratios * 3)
    return median(ratios), low, high


def peak_memory(function, kept, device):
    """Return the bytes that a function needs at its peak: those kept since its first call, and those that it allocates now."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)  # of all models
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before + kept
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler says on stderr when it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event["args"]["Bytes"] for event in events if event["name"] == "[memory]"]  # below 0: freed
    return kept + max(itertools.accumulate(changes))


def allow_tf32(yes, device):
    """Let float32 products be TF32, as in train_loop.py, or not, as in sample.py."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if yes else "highest")


def name_of(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


# ---- training ----

def kinds(V):
    """Return {kind of training: its process} for a vocabulary of V."""
    ar = Autoregressive(0, 1, 2)
    return {"plain GPT": ar, "AR, no inputs": ar, "AR": ar, "absorbing": Absorbing(V - 1), "uniform (SUNDAE)": Uniform(V),
            "uniform, inputs twice": Uniform(V, inputs_attention="full")}


def training_step(kind, config, device, dtype, compiled):
    """Return (function, FLOPs, bytes of weights and moments): the function takes an optimizer step, as train_loop.py does."""
    B, V, shape, process = config.batch_size, config.vocab_size, shape_of(config.size), kinds(config.vocab_size)[kind]
    S = 0 if kind in ("plain GPT", "AR, no inputs") else config.input_len
    T = config.input_len + config.target_len - S
    tokens = torch.randint(V - 1, (B, S + T + 1), generator=torch.Generator().manual_seed(0)).to(device)
    noise, batch, model = Noise(0, "train", 0, range(B)), Batch(tokens[:, :S], None, tokens[:, S:-1]), Transformer(V, *shape)
    passes = 2 if process.name == "uniform" else 1
    encodings = passes if process.inputs_attention == "full" else 1
    work = 3 * B * (encodings * flops(model.shape, S, logits=False) + passes * flops(model.shape, T))
    model = (PlainGPT(V, *shape, T) if kind == "plain GPT" else model).to(device)
    if compiled:
        if kind == "plain GPT":
            model.compile(dynamic=False)
        else:
            compile_model(model, dynamic=False)
    nats = torch.compile(cross_entropy, dynamic=False) if compiled else cross_entropy
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        with autocast:
            loss = model(tokens) if kind == "plain GPT" else process.loss(model, batch, noise, nats).total
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step, work, 3 * sum(p.numel() * p.element_size() for p in model.parameters())


def bench_training(config, device):
    """Yield rows, one for each kind of training step in each dtype, eager and compiled; the kinds of a mode take turns."""
    allow_tf32(True, device)
    tokens = config.batch_size * (config.input_len + config.target_len)
    for dtype, compiled in itertools.product(config.dtypes.split(","), (False, True)[:1 + config.compiled]):
        steps = {kind: training_step(kind, config, device, dtype, compiled) for kind in kinds(config.vocab_size)}
        times = take_turns({kind: step for kind, (step, *_) in steps.items()}, config.rounds, device)
        for kind, (step, work, kept) in steps.items():
            seconds, (middle, low, high) = median(times[kind]), ratio(times[kind], times["plain GPT"])
            yield dict(what=kind, dtype=dtype, compiled=compiled, seconds=seconds, ratio=middle, low=low, high=high,
                       tokens_per_second=tokens / seconds, flops=work, gflops_per_second=work / seconds / 1e9,
                       ar=ratio(times[kind], times["AR"])[0], arithmetic=work / steps["AR"][1],
                       memory=peak_memory(step, kept, device))
        del steps, step  # the models, before the next ones are made


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


def decoders(config, model, B, T, several, compiled=False):
    """Return {name: (function, FLOPs)} of all ways to fill a canvas (B, T).

    several: (n_steps, n_samples, inputs_attention) of each way by diffusion.
    """
    if compiled:
        model = copy.copy(model)  # of the same weights
        compile_model(model)
    S, V, device = config.input_len, config.vocab_size, model.embedding.weight.device
    batch = Batch(torch.randint(V, (B, S), device=device), None, torch.zeros(B, T, dtype=torch.long, device=device))
    noise, ar = Noise(0, "generate", 0, range(B)), Autoregressive(0, -1, 2)  # -1: no text ends before its canvas does
    passed = lambda silent, read: B * (flops(model.shape, silent, logits=False) + flops(model.shape, read))  # tokens
    found = {"AR": (lambda: list(ar.generate(model, batch, noise)), passed(S, T))}
    work = passed(T * S + T * (T - 1) / 2, T)
    if work < 1e12 and not compiled:  # else it takes minutes
        found["AR, no cache"] = (lambda: decode_uncached(ar, model, batch), work)
    for n, samples, attention in several:
        anew = attention == "full"
        name = f"{n} steps" + f" x {samples} samples" * (samples > 1) + ", inputs anew" * anew
        generate = partial(Uniform(V, inputs_attention=attention).generate, model, batch, noise, n_steps=n, n_samples=samples)
        found[name] = (lambda generate=generate: list(generate()), passed(S * n if anew else S, n * samples * T))
    return found


def bench_decoding(config, device):
    """Yield rows: AR with and without its cache, and diffusion, at every length and batch size."""
    allow_tf32(False, device)
    numbers = lambda text: [int(n) for n in text.split(",")]
    several = [*((n, 1, "bidirectional") for n in numbers(config.n_steps)), (10, 8, "bidirectional"), (10, 1, "full")]
    for dtype in config.dtypes.split(","):
        model = Transformer(config.vocab_size, *shape_of(config.size)).to(device, DTYPES[dtype]).eval()
        for B, T in itertools.product(numbers(config.decode_batch), numbers(config.lengths)):
            ways = {(name, compiled): way for compiled in (False, True)[:1 + config.compiled]
                    for name, way in decoders(config, model, B, T, several, compiled).items()}
            times = take_turns({key: function for key, (function, *_) in ways.items()}, config.rounds, device)
            for (name, compiled), (_, work) in ways.items():
                seconds = times[name, compiled]
                middle, low, high = ratio(times["AR", compiled], seconds)
                kept = sum(p.numel() * p.element_size() for p in model.parameters())
                memory = peak_memory(ways[name, compiled][0], kept, device)
                yield dict(what=name, dtype=dtype, compiled=compiled, batch=B, length=T, seconds=median(seconds), faster=middle,
                           low=low, high=high, flops=work, memory=memory)


# ---- the tables ----

TRAINING = {"ms": "{ms:.1f}", "tokens/s": "{tokens_per_second:,.0f}", "x plain GPT": "{ratio:.2f}",
            "quartiles": "{low:.2f} {high:.2f}", "x AR": "{ar:.2f}", "FLOPs": "{arithmetic:.2f}",
            "GFLOP/s": "{gflops_per_second:.4g}", "MB": "{mb:.0f}"}
DECODING = {"batch": "{batch}", "length": "{length}", "ms": "{ms:.1f}", "AR takes x": "{faster:.2f}",
            "quartiles": "{low:.2f} {high:.2f}", "GFLOP": "{gflop:.2f}", "MB": "{mb:.0f}"}


def show(title, columns, rows):
    """Print a table while its rows are measured; return them. columns: {heading: format of a row's values}"""
    line = lambda words: "".join(f"{word:>{max(9, len(name) + 2)}s}" for word, name in zip(words, columns))
    print(f"\n{title}\n{'':24s}{'dtype':10s}{'':9s}{line(columns)}", flush=True)
    found = []
    for r in rows:
        values = r | dict(ms=1e3 * r["seconds"], mb=r["memory"] / 1e6, gflop=r["flops"] / 1e9)
        print(f"{r['what']:24s}{r['dtype']:10s}{'compiled' if r['compiled'] else 'eager':9s}"
              + line(text.format(**values) for text in columns.values()), flush=True)
        found.append(r)
    return found


def checked(config):
    """Return the device, with the compiler told how many shapes are to come. Raises UserError for a wrong flag."""
    device = pick_device(config.device)
    device = torch.device("cpu") if device.type == "mps" else device  # samplers compute in float64, MPS has none
    check(config.vocab_size >= 4, f"--vocab_size={config.vocab_size} must be at least 4")  # three of them mean something
    for name in ("input_len", "target_len", "batch_size", "rounds"):
        check(getattr(config, name) >= 1, f"--{name}={getattr(config, name)} must be at least 1")
    for name in ("lengths", "n_steps", "decode_batch"):
        check(all(n.isdecimal() and int(n) > 0 for n in getattr(config, name).split(",")),
              f"--{name}={getattr(config, name)} must be whole numbers above 0 with commas between them")
    for dtype in config.dtypes.split(","):
        one_of("dtypes", dtype, DTYPES)
    shape_of(config.size)
    check_new(config.out, "out")  # a file that cannot be written is found out now, not after minutes
    if config.compiled:
        fault = compiler_fault(device)
        check(not fault, f"--compiled: torch.compile does not work here ({fault})")
        torch._dynamo.config.recompile_limit = 100  # all models share their code, so each counts as a recompilation
    return device


def save(config, **found):
    """Write what was found, with what it takes to find it again, where --out says so. Raises UserError."""
    if config.out:
        write_json(config.out, dict(config=asdict(config), torch=torch.__version__) | found, "out")


@out_of_memory("--batch_size", "--lengths")
def main(argv=None):
    config = parse(Config, argv)
    device = checked(config)
    name = name_of(device)
    with torch.device("meta"):
        n_params = Transformer(config.vocab_size, *shape_of(config.size)).n_params()
    facts = dict(device=name, n_params=n_params)
    print(f"{name}, torch {torch.__version__}; {config.size}, {n_params:,} parameters, {config.rounds} rounds")
    facts["training"] = show(f"Training step, {config.batch_size} x ({config.input_len} + {config.target_len}) tokens",
                             TRAINING, bench_training(config, device))
    save(config, **facts)  # decoding takes longer: what is known is kept
    facts["decoding"] = show(f"Decoding behind {config.input_len} inputs", DECODING, bench_decoding(config, device))
    save(config, **facts)


if __name__ == "__main__":
    run(main)
