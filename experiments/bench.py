"""How fast does each way of decoding write here, beside AR with its cache? One command, one table, one JSON file.

    python experiments/bench.py                                                          # a laptop, some minutes
    python experiments/bench.py --size=6x384x6 --dtypes=float32,bfloat16 --compiled      # wants a C++ compiler
    python experiments/bench.py --size=base --vocab_size=50368 --input_len=512 --lengths=512 --dtypes=bfloat16 --compiled

Every ratio is of runs that took turns in this process: the median over --rounds, with the quartiles (low, high). The yardstick
is this repository's AR decoder with its cache, in the same dtype, compiled where others are. FLOPs are those of the weights, MB
the most that was allocated at once, with the weights. What a training step takes, the training scripts say while they run.
Below it is what `reproduce.py --what=figure3` does: let nothing else run meanwhile.
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

if __name__ == "__main__":  # a script finds only modules of its own folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from autoregressive import Autoregressive
from data.dataset import Batch
from diffusion import Uniform
from engine.cli import UserError, check, one_of, parse, run
from engine.devices import compiler_fault, out_of_memory, pick_device
from engine.files import check_new, write_json
from engine.noise import Noise
from engine.parallel import compile_model
from experiments.cells import known
from experiments.common import flops
from experiments.plot import picture
from model import Transformer
from start import shape_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
INPUTS, LENGTHS = 128, (16, 32, 64, 128, 256)  # of figure3


@dataclass
class Config:
    size: str = "4x128x4"  # LAYERSxWIDTHxHEADS or a name, see start.py
    vocab_size: int = 4096
    input_len: int = 128
    lengths: str = "128,512"  # target tokens to decode
    n_steps: str = "1,2,5,10,20,50"  # decoding steps of diffusion
    decode_batch: str = "1"  # inputs decoded at once
    dtypes: str = "float32"  # float32, bfloat16: of the weights
    compiled: bool = False  # by torch.compile too
    rounds: int = 7  # repetitions, interleaved
    device: str = "auto"
    out: str | None = None  # JSON file for all numbers


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


def name_of(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


# ---- decoding ----

def decoders(config, model, B, T, several, compiled=False):
    """Return {name: (function, FLOPs)} of all ways to fill a canvas (B, T); several: (n_steps, n_samples) of diffusion."""
    if compiled:
        model = copy.copy(model)  # of the same weights
        compile_model(model)
    S, V, device = config.input_len, config.vocab_size, model.embedding.weight.device
    batch = Batch(torch.randint(V, (B, S), device=device), None, torch.zeros(B, T, dtype=torch.long, device=device))
    noise, ar = Noise(0, "generate", 0, range(B)), Autoregressive(0, -1, 2)  # -1: no text ends before its canvas does
    passed = lambda read: B * (flops(model.shape, S, logits=False) + flops(model.shape, read))  # tokens
    found = {"AR": (lambda: list(ar.generate(model, batch, noise)), passed(T))}
    for n, samples in several:
        generate = partial(Uniform(V).generate, model, batch, noise, n_steps=n, n_samples=samples)
        name = f"{n} steps" + f" x {samples} samples" * (samples > 1)
        found[name] = (lambda generate=generate: list(generate()), passed(n * samples * T))
    return found


def bench_decoding(config, device):
    """Yield rows: AR with its cache, and diffusion, at every length and batch size."""
    numbers = lambda text: [int(n) for n in text.split(",")]
    several = [*((n, 1) for n in numbers(config.n_steps)), (10, 8)]
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
                yield {"what": name, "dtype": dtype, "compiled": compiled, "batch": B, "length": T, "seconds": median(seconds),
                       "AR takes x": middle, "low": low, "high": high, "GFLOP": work / 1e9,
                       "MB": peak_memory(ways[name, compiled][0], kept, device) / 1e6}


def show(title, rows):
    """Print rows, dicts of the same keys, as a table while they are measured; return them."""
    found, word = [], lambda key, x: f"{f'{x:.4g}' if isinstance(x, float) else str(x):>{max(11, len(key) + 2)}s}"
    for row in rows:
        first, *others = row
        if not found:
            print(f"\n{title}\n{first:24s}" + "".join(word(key, key) for key in others))
        found.append(row)
        print(f"{row[first]:24s}" + "".join(word(key, row[key]) for key in others), flush=True)
    return found


def checked(config):
    """Return the device, with the compiler told how many shapes are to come. Raises UserError for a wrong flag."""
    device = pick_device(config.device)
    device = torch.device("cpu") if device.type == "mps" else device  # samplers compute in float64, MPS has none
    check(config.vocab_size >= 4, f"--vocab_size={config.vocab_size} must be at least 4")  # three of them mean something
    for name in ("input_len", "rounds"):
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


@out_of_memory("--decode_batch", "--lengths")
def main(argv=None):
    config = parse(Config, argv)
    device = checked(config)
    with torch.device("meta"):
        n_params = Transformer(config.vocab_size, *shape_of(config.size)).n_params()
    facts = dict(device=name_of(device), n_params=n_params)
    print(f"{facts['device']}, torch {torch.__version__}; {config.size}, {n_params:,} parameters, {config.rounds} rounds")
    facts["decoding"] = show(f"Decoding behind {config.input_len} inputs", bench_decoding(config, device))
    if config.out:
        write_json(config.out, dict(config=asdict(config), torch=torch.__version__) | facts, "out")


# ---- the paper's Figure 3 ----

def measure(lab):
    """Return facts and "ways": {way of decoding: {column: [seconds per example, MB]}}, columns are target lengths and tasks."""
    device, ways = checked(Config(size=lab.size)), {}
    canvases = {str(T): (INPUTS, T) for T in LENGTHS} | {task: lab.canvas(task) for task in lab.scale.tasks}
    for column, (S, T) in canvases.items():
        for r in bench_decoding(Config(size=lab.size, input_len=S, lengths=str(T), n_steps="5,10,20"), device):
            ways.setdefault(r["what"], {})[column] = [r["seconds"], r["MB"]]
    return {"size": lab.size, "device": name_of(device), "torch": torch.__version__, "ways": ways}


def markdown(ways):
    """Return the lines of a table: a row a way of decoding, a column a length or a task."""
    columns = list(dict.fromkeys(column for way in ways.values() for column in way))
    lines = ["| seconds (MB) | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    words = lambda way: (f"{way[c][0]:.3f} ({way[c][1]:.0f})" if c in way else "" for c in columns)
    return lines + [f"| {name} | " + " | ".join(words(way)) + " |" for name, way in ways.items()]


def figure3(folder, lab, draw, refresh=False):
    """Measure seconds and memory against length and task, unless that is done; write figure3.json, figure3.md, figure3.png."""
    path = Path(folder, "figure3.json")
    if not draw and (refresh or not path.exists()):
        write_json(path, measure(lab), "out")
    found = known(path, "ways")
    check(found, f"cannot read {path}; --what=figure3 without --draw makes it")
    try:
        curves = {name: [(int(c), way[c][0]) for c in way if c.isdigit()] for name, way in found["ways"].items()}
        text = "\n".join(markdown(found["ways"])) + "\n"
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and it is made again") from error
    picture(curves, path.with_suffix(".png"), "target tokens", "seconds per example", xscale="log", yscale="log")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"\n== figure3: {figure3.__doc__} ({folder}/figure3.md)\n\n{text}", end="")


if __name__ == "__main__":
    run(main)
