"""How the cost of training and of decoding grows: exponents of time and memory, beside those of the arithmetic.

    python results/growth.py --batch_size=1 --rounds=3

A SUNDAE step against batch, length (inputs = targets) and width (heads stay as wide); 10 steps of decoding against n_samples;
each alone, at 1, 2, 4 and 8 times its size. An exponent is the least-squares slope of log time, or log memory, on log size.
Expected of time: that of the FLOPs of weights and attention; of memory: all but weights and moments grows as the size does.
"""
import itertools
import sys
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from statistics import linear_regression, median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only modules of its own folder
import torch

import bench
from config import parse, run
from model import Transformer, shape_of
from start import out_of_memory


@dataclass
class Config(bench.Setup):
    pass  # the same flags


def axes(config):
    """Return {axis: {size: config}}: the batch, length and width of the config, and one sample, times 1, 2, 4 and 8."""
    (n_layer, C, H), B, T, times = shape_of(config.size), config.batch_size, config.target_len, (1, 2, 4, 8)
    return {"batch": {B * k: replace(config, batch_size=B * k) for k in times},
            "length": {T * k: replace(config, input_len=T * k, target_len=T * k) for k in times},
            "n_samples": {k: config for k in times},
            "width": {C * k: replace(config, size=f"{n_layer}x{C * k}x{H * k}") for k in times}}


def grown(axis, size, config, dtype, device):
    """Return (function, FLOPs of weights and attention, bytes kept) of a training step or, for n_samples, of decoding."""
    (n_layer, C, _), B, S, T = shape_of(config.size), config.batch_size, config.input_len, config.target_len
    attention = lambda passes: 4 * n_layer * C * B * (S * S + passes * T * (S + T))  # scores, and sums of values
    if axis != "n_samples":
        step, work, kept = bench.training_step("uniform (SUNDAE)", config, device, dtype, config.compiled)
        return step, work + 3 * attention(2), kept
    model = Transformer(config.vocab_size, *shape_of(config.size)).to(device, bench.DTYPES[dtype]).eval()
    decode, work, _ = list(bench.decoders(config, model, B, T, [(10, size, "bidirectional")], config.compiled).values())[-1]
    return decode, work + attention(10 * size), bench.size_of(model)


def slope(rows, key):
    """Return the exponent of the power law size -> row[key] that fits best."""
    return linear_regression([log(row["size"]) for row in rows], [log(row[key]) for row in rows]).slope


def measure(config, device):
    """Yield rows, one for each size along each axis; the exponents in them are those of the axis."""
    for dtype, (axis, configs) in itertools.product(config.dtypes.split(","), axes(config).items()):
        bench.allow_tf32(axis != "n_samples", device)
        rows = measure_axis(axis, configs, config.rounds, dtype, device)
        first = rows[0]
        for row in rows:
            row["proportional"] = row["kept"] + (first["memory"] - first["kept"]) * row["size"] / first["size"]
        for row in rows:
            yield row | dict(exponent=slope(rows, "seconds"), expected=slope(rows, "flops"),
                             memory_exponent=slope(rows, "memory"), memory_expected=slope(rows, "proportional"))


def measure_axis(axis, configs, rounds, dtype, device):
    """Return a row for each size; its models are let go before those of the next axis are made."""
    ways = {size: grown(axis, size, larger, dtype, device) for size, larger in configs.items()}
    times = bench.take_turns({size: function for size, (function, *_) in ways.items()}, rounds, device)
    return [dict(axis=axis, size=size, dtype=dtype, seconds=median(times[size]), flops=work, kept=kept,
                 memory=bench.peak_memory(function, kept, device)) for size, (function, work, kept) in ways.items()]


HEADING = (f"{'':12s}{'dtype':10s}{'size':>6s}{'ms':>11s}{'GFLOP':>11s}{'exponent':>10s}{'expected':>10s}{'MB':>9s}"
           f"{'exponent':>10s}{'expected':>10s}")


def line(r):
    return (f"{r['axis']:12s}{r['dtype']:10s}{r['size']:6d}{1e3 * r['seconds']:11.1f}{r['flops'] / 1e9:11.2f}"
            f"{r['exponent']:10.2f}{r['expected']:10.2f}{r['memory'] / 1e6:9.1f}{r['memory_exponent']:10.2f}"
            f"{r['memory_expected']:10.2f}")


@out_of_memory("--batch_size", "--target_len", "--size")
def main(argv=None):
    config = parse(Config, argv)
    device = bench.begin(config)
    name = bench.name_of(device)
    rows = bench.show(f"{name}, torch {torch.__version__}, {config.rounds} rounds; {config.size}, {config.batch_size} x "
                      f"({config.input_len} + {config.target_len}) tokens{', compiled' * config.compiled}",
                      HEADING, line, measure(config, device))
    bench.finish(config, device=name, growth=rows)


if __name__ == "__main__":
    run(main)
