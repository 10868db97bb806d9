"""How fast does each way of decoding write here, beside AR with its cache? One command, one table, one JSON file.

    python experiments/bench.py                                     # a laptop, some minutes
    python experiments/bench.py --size=base --vocab_size=50368 --input_len=512 --lengths=512 --dtype=bfloat16

Every ratio is of runs that took turns in this process, one text at a time: the median over --rounds, with the quartiles (low,
high). FLOPs are those of the weights. At the end is what `reproduce.py --what=figure3` does. Let nothing else run meanwhile.
"""
import sys
import time
from dataclasses import dataclass
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
    """Return {name: [seconds]}: each generator function once a round, after two rounds that do not count."""
    times, sync = {name: [] for name in functions}, torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(rounds + 2):
        for name, function in functions.items():
            sync()
            start = time.perf_counter()
            list(function())
            sync()
            times[name].append(time.perf_counter() - start)
    return {name: seconds[2:] for name, seconds in times.items()}


def decoders(config, model, T, n_steps):
    """Return {name: (generator function, FLOPs)} of all ways to fill a canvas of T tokens."""
    S, V, device = config.input_len, config.vocab_size, model.embedding.weight.device
    batch = Batch(torch.randint(V, (1, S), device=device), None, torch.zeros(1, T, dtype=torch.long, device=device))
    noise, ar = Noise(0, "generate", 0, range(1)), Autoregressive(0, -1, 2)  # -1: no text ends before its canvas does
    found = {"AR": (partial(ar.generate, model, batch, noise), flops(model.shape, S, T))}
    for n, samples in (*((n, 1) for n in n_steps), (10, 8)):
        generate = partial(Uniform(V).generate, model, batch, noise, n_steps=n, n_samples=samples)
        found[f"{n} steps" + f" x {samples} samples" * (samples > 1)] = generate, flops(model.shape, S, n * samples * T)
    return found


def bench_decoding(config, device, lengths, n_steps):
    """Yield rows: AR with its cache, and diffusion, at every length."""
    model = Transformer(config.vocab_size, *shape_of(config.size)).to(device, getattr(torch, config.dtype)).eval()
    for T in lengths:
        ways = decoders(config, model, T, n_steps)
        times = take_turns({name: function for name, (function, _) in ways.items()}, config.rounds, device)
        for name, (_, work) in ways.items():
            ratios = [a / b for a, b in zip(times["AR"], times[name])]  # round by round
            low, middle, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            yield {"what": name, "length": T, "seconds": median(times[name]), "AR takes x": middle, "low": low, "high": high,
                   "GFLOP": work / 1e9}


def checked(config):
    """Return the device, its name, the lengths and the numbers of steps. Raises UserError for a wrong flag."""
    numbers, device = [], pick_device(config.device)
    device = torch.device("cpu") if device.type == "mps" else device  # samplers compute in float64, MPS has none
    for name, least in (("vocab_size", 4), ("input_len", 1), ("rounds", 1)):  # three ids mean something
        check(getattr(config, name) >= least, f"--{name}={getattr(config, name)} must be at least {least}")
    for name in ("lengths", "n_steps"):
        words = getattr(config, name).split(",")
        check(all(word.isdecimal() and int(word) > 0 for word in words),
              f"--{name}={getattr(config, name)} must be whole numbers above 0 with commas between them")
        numbers.append([int(word) for word in words])
    one_of("dtype", config.dtype, ("float32", "bfloat16"))
    shape_of(config.size)
    check_new(config.out, "out")  # a file that cannot be written is found out now, not after minutes
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return device, name, *numbers


@out_of_memory("--lengths", "--size")
def main(argv=None):
    config = parse(Config, argv)
    (device, machine, *numbers), rows = checked(config), []
    print(f"{machine}, torch {torch.__version__}; {config.size}, {config.dtype}, {config.rounds} rounds\n\n"
          f"Decoding behind {config.input_len} inputs")
    for row in bench_decoding(config, device, *numbers):
        what, *values = row.values()
        if not rows:
            print(f"{'':24s}" + "".join(f"{name:>12s}" for name in [*row][1:]))
        print(f"{what:24s}" + "".join(f"{value:12.5g}" for value in values), flush=True)
        rows.append(row)
    if config.out:
        write_json(config.out, {"config": vars(config), "torch": torch.__version__, "device": machine, "decoding": rows}, "out")


def figure3(folder, lab, draw, refresh=False):
    """Measure seconds against length and task, unless that is done; write figure3.json, figure3.md, figure3.png."""
    path, then = folder / "figure3.json", "; --what=figure3 --refresh, without --draw, makes it"
    if not draw and (refresh or not path.exists()):
        (device, machine, *_), ways = checked(Config(size=lab.size)), {}  # {way of decoding: {column: [seconds]}}
        canvases = {str(T): (INPUTS, T) for T in LENGTHS} | {task: lab.canvas(task) for task in lab.scale.tasks}
        for column, (S, T) in canvases.items():
            for r in bench_decoding(Config(size=lab.size, input_len=S), device, [T], (5, 10, 20)):
                ways.setdefault(r["what"], {})[column] = [r["seconds"]]  # older files have MB behind them
        write_json(path, {"size": lab.size, "device": machine, "torch": torch.__version__, "ways": ways}, "out")
    ways = read_json(path, {"ways": OBJECT}, then)["ways"]
    try:
        curves = {name: [(int(c), way[c][0]) for c in way if c.isdigit()] for name, way in ways.items()}
        columns = list(dict.fromkeys(column for way in ways.values() for column in way))
        lines = ["| seconds | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
        for name, way in ways.items():
            lines.append(f"| {name} | " + " | ".join(f"{way[c][0]:.3f}" if c in way else "" for c in columns) + " |")
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path} is damaged ({error}){then}") from error
    picture(curves, path.with_suffix(".png"), "target tokens", "seconds per example", xscale="log", yscale="log")
    show(folder, "figure3", figure3.__doc__, lines)


if __name__ == "__main__":
    run(main)
