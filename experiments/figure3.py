"""The paper's Figure 3: seconds per example against length for every way of decoding, and the memory each takes.

reproduce.py --what=figure3 measures it by experiments/bench.py, on all cores: let nothing else run meanwhile.
"""
import json
from pathlib import Path

from engine.cli import UserError, check
from experiments import bench
from experiments.plot import picture


def read(path):
    """Return {way of decoding: {length: (seconds per example, MB)}} of a file that bench.py --out wrote. Raises UserError."""
    found = {}
    try:
        for r in json.loads(Path(path).read_text(encoding="utf-8"))["decoding"]:
            if r["batch"] == 1 and r["dtype"] == "float32":
                name = r["what"] + ", compiled" * r["compiled"]
                found.setdefault(name, {})[int(r["length"])] = r["seconds"], r["memory"] / 1e6
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; --what=figure3 without --draw makes it") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not what experiments/bench.py --out=FILE.json writes, or has no decoding in it") from error
    check(found, f"{path} holds no decoding of one example at a time in float32")
    return found


def markdown(ways):
    """Return the lines of a table: a row a way of decoding, a column a length."""
    lengths = sorted({length for way in ways.values() for length in way})
    lines = ["| seconds (MB) | " + " | ".join(map(str, lengths)) + " |", "|---|" + "---|" * len(lengths)]
    words = lambda way: (f"{way[n][0]:.3f} ({way[n][1]:.0f})" if n in way else "" for n in lengths)
    return lines + [f"| {name} | " + " | ".join(words(way)) + " |" for name, way in ways.items()]


def make(folder, size, draw, refresh=False):
    """Measure, unless it was done or `draw` says to draw what is known; write figure3.md and figure3.png."""
    path = Path(folder, "figure3.json")
    if refresh and not draw:
        path.unlink(missing_ok=True)
    if not draw and not path.exists():
        bench.main([f"--size={size}", "--lengths=16,32,64,128,256", "--n_steps=5,10,20", f"--out={path}"])
    ways = read(path)
    (Path(folder) / "figure3.md").write_text("\n".join(markdown(ways)) + "\n", encoding="utf-8")
    lines = {name: sorted((length, seconds) for length, (seconds, _) in way.items()) for name, way in ways.items()}
    picture(lines, Path(folder) / "figure3.png", "target tokens", "seconds per example", xscale="log", yscale="log")
    print(f"\n== figure3: {__doc__.splitlines()[0]} ({folder}/figure3.md)\n")
    print("\n".join(markdown(ways)))
