"""The paper's Figure 3: seconds per example against length for every way of decoding, the memory each takes, and both by task.

reproduce.py --what=figure3 measures it by experiments/bench.py, on all cores: let nothing else run meanwhile.
"""
from pathlib import Path

import torch

from engine.cli import UserError, check, write_json
from experiments import bench
from experiments.cells import known
from experiments.plot import picture

INPUTS, LENGTHS = 128, (16, 32, 64, 128, 256)


def measure(lab):
    """Return facts and "ways": {way of decoding: {column: [seconds per example, MB]}}, columns are target lengths and tasks."""
    device, ways = bench.checked(bench.Config(size=lab.size)), {}
    canvases = {str(T): (INPUTS, T) for T in LENGTHS} | {task: lab.canvas(task) for task in lab.scale.tasks}
    for column, (S, T) in canvases.items():
        config = bench.Config(size=lab.size, input_len=S, lengths=str(T), n_steps="5,10,20")
        for r in bench.bench_decoding(config, device):
            ways.setdefault(r["what"], {})[column] = [r["seconds"], r["MB"]]
    return {"size": lab.size, "device": bench.name_of(device), "torch": torch.__version__, "ways": ways}


def markdown(ways):
    """Return the lines of a table: a row a way of decoding, a column a length or a task."""
    columns = list(dict.fromkeys(column for way in ways.values() for column in way))
    lines = ["| seconds (MB) | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    words = lambda way: (f"{way[c][0]:.3f} ({way[c][1]:.0f})" if c in way else "" for c in columns)
    return lines + [f"| {name} | " + " | ".join(words(way)) + " |" for name, way in ways.items()]


def make(folder, lab, draw, refresh=False):
    """Measure, unless it was done or `draw` says to draw what is known; write figure3.md and figure3.png."""
    path = Path(folder, "figure3.json")
    if refresh and not draw:
        path.unlink(missing_ok=True)
    if not draw and not path.exists():
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
    print(f"\n== figure3: {__doc__.splitlines()[0]} ({folder}/figure3.md)\n\n{text}", end="")
