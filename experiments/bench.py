"""How fast does each way of decoding write here, beside AR with its cache? One command, one table, one JSON file.

    python experiments/bench.py                                     # a laptop, some minutes
    python experiments/bench.py --size=6x384x6 --dtype=bfloat16
    python experiments/bench.py --size=base --vocab_size=50368 --input_len=512 --lengths=512 --dtype=bfloat16

Every ratio is of runs that took turns in this process, one text at a time: the median over --rounds, with the quartiles (low,
high). The yardstick is this repository's AR decoder with its cache. FLOPs are those of the weights. What a training step takes,
the training scripts say while they run. Below it is what `reproduce.py --what=figure3` does: let nothing else run meanwhile.
"""
import sys
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
from engine.devices import out_of_memory, pick_device
from engine.files import OBJECT, check_new, read_json, write_json
from engine.noise import Noise
from experiments.cells import flops
from experiments.plot import picture
from experiments.report import show
from model import Transformer
from start import shape_of

INPUTS, LENGTHS = 128, (16, 32, 64, 128, 256)  # of figure3


@dataclass
class Config:
    size: str = "4x128x4"  # LAYERSxWIDTHxHEADS or a name, see start.py
    vocab_size: int = 4096
    input_len: int = 128
    lengths: str = "128,512"  # target tokens to decode
    n_steps: str = "1,2,5,10,20,50"  # decoding steps of diffusion
    dtype: str = "float32"  # float32 or bfloat16: of the weights
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


def name_of(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def numbers(config, name):
    """Return the whole numbers of a flag. Raises UserError."""
    words = getattr(config, name).split(",")
    check(all(word.isdecimal() and int(word) > 0 for word in words),
          f"--{name}={getattr(config, name)} must be whole numbers above 0 with commas between them")
    return [int(word) for word in words]


# ---- decoding ----

def decoders(config, model, T):
    """Return {name: (function, FLOPs)} of all ways to fill a canvas of T tokens."""
    S, V, device = config.input_len, config.vocab_size, model.embedding.weight.device
    batch = Batch(torch.randint(V, (1, S), device=device), None, torch.zeros(1, T, dtype=torch.long, device=device))
    noise, ar = Noise(0, "generate", 0, range(1)), Autoregressive(0, -1, 2)  # -1: no text ends before its canvas does
    passed = lambda read: flops(model.shape, S, logits=False) + flops(model.shape, read)  # tokens
    found = {"AR": (lambda: list(ar.generate(model, batch, noise)), passed(T))}
    for n, samples in (*((n, 1) for n in numbers(config, "n_steps")), (10, 8)):
        generate = partial(Uniform(V).generate, model, batch, noise, n_steps=n, n_samples=samples)
        name = f"{n} steps" + f" x {samples} samples" * (samples > 1)
        found[name] = (lambda generate=generate: list(generate()), passed(n * samples * T))
    return found


def bench_decoding(config, device):
    """Yield rows: AR with its cache, and diffusion, at every length."""
    model = Transformer(config.vocab_size, *shape_of(config.size)).to(device, getattr(torch, config.dtype)).eval()
    for T in numbers(config, "lengths"):
        ways = decoders(config, model, T)
        times = take_turns({name: function for name, (function, _) in ways.items()}, config.rounds, device)
        for name, (_, work) in ways.items():
            middle, low, high = ratio(times["AR"], times[name])
            yield {"what": name, "length": T, "seconds": median(times[name]), "AR takes x": middle, "low": low, "high": high,
                   "GFLOP": work / 1e9}


def checked(config):
    """Return the device. Raises UserError for a wrong flag."""
    device = pick_device(config.device)
    device = torch.device("cpu") if device.type == "mps" else device  # samplers compute in float64, MPS has none
    for name, least in (("vocab_size", 4), ("input_len", 1), ("rounds", 1)):  # three ids mean something
        check(getattr(config, name) >= least, f"--{name}={getattr(config, name)} must be at least {least}")
    for name in ("lengths", "n_steps"):
        numbers(config, name)
    one_of("dtype", config.dtype, ("float32", "bfloat16"))
    shape_of(config.size)
    check_new(config.out, "out")  # a file that cannot be written is found out now, not after minutes
    return device


@out_of_memory("--lengths", "--size")
def main(argv=None):
    config = parse(Config, argv)
    device, rows = checked(config), []
    print(f"{name_of(device)}, torch {torch.__version__}; {config.size}, {config.dtype}, {config.rounds} rounds\n\n"
          f"Decoding behind {config.input_len} inputs")
    for row in bench_decoding(config, device):
        what, *values = row.values()
        if not rows:
            print(f"{'':24s}" + "".join(f"{name:>12s}" for name in [*row][1:]))
        print(f"{what:24s}" + "".join(f"{value:12.5g}" for value in values), flush=True)
        rows.append(row)
    if config.out:
        facts = {"config": asdict(config), "torch": torch.__version__, "device": name_of(device), "decoding": rows}
        write_json(config.out, facts, "out")


# ---- the paper's Figure 3 ----

def measure(lab):
    """Return facts and "ways": {way of decoding: {column: [seconds per example]}}, columns are target lengths and tasks."""
    device, ways = checked(Config(size=lab.size)), {}
    canvases = {str(T): (INPUTS, T) for T in LENGTHS} | {task: lab.canvas(task) for task in lab.scale.tasks}
    for column, (S, T) in canvases.items():
        for r in bench_decoding(Config(size=lab.size, input_len=S, lengths=str(T), n_steps="5,10,20"), device):
            ways.setdefault(r["what"], {})[column] = [r["seconds"]]  # older files have MB behind them
    return {"size": lab.size, "device": name_of(device), "torch": torch.__version__, "ways": ways}


def markdown(ways):
    """Return the lines of a table: a row a way of decoding, a column a length or a task."""
    columns = list(dict.fromkeys(column for way in ways.values() for column in way))
    lines = ["| seconds | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    words = lambda way: (f"{way[c][0]:.3f}" if c in way else "" for c in columns)
    return lines + [f"| {name} | " + " | ".join(words(way)) + " |" for name, way in ways.items()]


def figure3(folder, lab, draw, refresh=False):
    """Measure seconds against length and task, unless that is done; write figure3.json, figure3.md, figure3.png."""
    path, then = folder / "figure3.json", "; --what=figure3 --refresh, without --draw, makes it"
    if not draw and (refresh or not path.exists()):
        write_json(path, measure(lab), "out")
    ways = read_json(path, {"ways": OBJECT}, then)["ways"]
    try:
        curves = {name: [(int(c), way[c][0]) for c in way if c.isdigit()] for name, way in ways.items()}
        lines = markdown(ways)
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path} is damaged ({error}){then}") from error
    picture(curves, path.with_suffix(".png"), "target tokens", "seconds per example", xscale="log", yscale="log")
    show(folder, "figure3", figure3.__doc__, lines)


if __name__ == "__main__":
    run(main)
