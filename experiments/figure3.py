"""The paper's Figure 3, seconds per example against length for every way of decoding, as a table and a plot.

    python experiments/bench.py --lengths=32,64,128,256,512 --n_steps=5,10,20 --out=bench.json
    python experiments/figure3.py bench.json --out=figure3.png
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # a script finds only modules of its own folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.cli import UserError, check, parse, run


@dataclass
class Config:
    path: str  # positional: the JSON file that experiments/bench.py --out wrote
    batch: int = 1  # inputs decoded at once, one of bench.py's --decode_batch
    dtype: str | None = None  # one of bench.py's --dtypes; default: the first in the file
    out: str = "figure3.png"


def read(path):
    """Return {(dtype, batch): {way of decoding: {length: seconds per example}}}. Raises UserError."""
    found = {}
    try:
        for r in json.loads(Path(path).read_text(encoding="utf-8"))["decoding"]:
            way = found.setdefault((r["dtype"], int(r["batch"])), {}).setdefault(r["what"] + ", compiled" * r["compiled"], {})
            way[int(r["length"])] = r["seconds"] / r["batch"]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not what experiments/bench.py --out=FILE.json writes, or has no decoding in it") from error
    return found


def plot(ways, title, path):
    import matplotlib.pyplot as plt  # here: a second that a mistake in the flags need not wait
    figure, axis = plt.subplots(figsize=(6.5, 4.5))
    for name, way in ways.items():
        axis.plot(*zip(*sorted(way.items())), label=name, marker="o", linestyle="--" if name.startswith("AR") else "-")
    axis.set(title=title, xlabel="target tokens", ylabel="seconds per example", xscale="log", yscale="log")
    lengths = sorted({length for way in ways.values() for length in way})
    axis.set_xticks(lengths, lengths, minor=False)
    axis.set_xticks([], minor=True)
    axis.legend(fontsize=7)
    try:
        figure.savefig(path, dpi=110, bbox_inches="tight")
    except (OSError, ValueError) as error:  # ValueError: matplotlib does not know this kind of file
        raise UserError(f"cannot write --out={path}: {error}") from error


def main(argv=None):
    config = parse(Config, argv)
    check(not Path(config.out).exists(), f"--out={config.out} exists; it is not overwritten")
    found = read(config.path)
    key = config.dtype or next((dtype for dtype, _ in found), None), config.batch
    check(key in found, f"{config.path} has no decoding of --dtype={key[0]} --batch={key[1]}, but of "
                        f"{', '.join(f'{dtype} {batch}' for dtype, batch in found) or 'nothing'}")
    ways, title = found[key], f"Seconds per example, {key[0]}, {key[1]} at once"
    lengths = sorted({length for way in ways.values() for length in way})
    print(title, f"{'':24s}" + "".join(f"{length:10d}" for length in lengths), sep="\n")
    for name, way in ways.items():  # AR without a cache is measured as long as it takes no minutes
        print(f"{name:24s}" + "".join(f"{way[length]:10.4f}" if length in way else f"{'-':>10s}" for length in lengths))
    plot(ways, title, config.out)


if __name__ == "__main__":
    run(main)
