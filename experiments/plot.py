"""Learning curves of one or more runs, from their metrics.jsonl, on the terminal and as a picture.

    python experiments/plot.py out/ar2diff_code,out/diff_code --out=curves.png
"""
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # a script finds only modules of its own folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.cli import check, parse, run
from engine.files import NUMBER, check_new
from engine.run_log import read_log

MARKS = "ox+*#@%&"


@dataclass
class Config:
    runs: str  # positional: out_dirs, with commas between them
    out: str | None = None  # file for the picture: .png, .svg or .pdf


def curve(folder):
    """Return [(step, validation loss)] of a run, of the first pass where there are two; damaged lines are left out."""
    path, (_, fits) = Path(folder) / "metrics.jsonl", NUMBER
    check(path.is_file(), f"cannot read {path}; name the out_dir of a run")
    rows = [row for row in read_log(path) if row.get("split") == "valid"]
    points = [(row["step"], loss) for row in rows if fits(loss := row.get("first_pass", row.get("loss")))]
    check(points, f"{path} holds no validation loss")
    return points


def terminal(curves, width=72, height=16):
    """Return the lines of a plot of {name: [(x, y)]} in characters."""
    (left, right), (low, high) = ((min(values), max(values)) for values in zip(*sum(curves.values(), [])))
    canvas = [[" "] * width for _ in range(height)]
    for mark, line in zip(MARKS, curves.values()):
        for x, y in line:
            row, column = (high - y) / ((high - low) or 1) * (height - 1), (x - left) / ((right - left) or 1) * (width - 1)
            canvas[round(row)][round(column)] = mark
    scale = {0: f"{high:.3g}", height - 1: f"{low:.3g}"}
    lines = [f"{scale.get(i, ''):>8s} |{''.join(cells)}".rstrip() for i, cells in enumerate(canvas)]
    axis = f"{'':8s} +{'-' * width}\n{'':10s}{left:<{width // 2}g}{right:>{width - width // 2}g}"
    return [*lines, *axis.split("\n"), "   ".join(f"{mark} {name}" for mark, name in zip(MARKS, curves))]


def picture(curves, path, xlabel="step", ylabel="", **axes):
    """Draw {name: [(x, y) or (x, y, error)]} into a file."""
    from matplotlib.figure import Figure  # here: a second that a mistake in the flags need not wait
    figure = Figure(figsize=(6.5, 4.2))
    axis = figure.subplots()
    for name, points in curves.items():
        axis.errorbar(*zip(*points), label=name, marker="o", markersize=3, capsize=2)
    axis.set(xlabel=xlabel, ylabel=ylabel, **axes)
    xs = sorted({x for points in curves.values() for x, *_ in points})
    if axes.get("xscale") == "log" and len(xs) < 10 and all(x % 1 == 0 for x in xs):  # else powers of ten
        axis.set_xticks(xs, [f"{x:g}" for x in xs])
        axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main(argv=None):
    config = parse(Config, argv)
    folders = config.runs.split(",")
    check(len(set(folders)) == len(folders) <= len(MARKS), f"name at most {len(MARKS)} runs, each once")
    curves = {folder: curve(folder) for folder in folders}
    check(config.out is None or Path(config.out).suffix in (".png", ".svg", ".pdf"),
          f"--out={config.out} must end in .png, .svg or .pdf")
    check_new(config.out, "out")
    print("\n".join(terminal(curves)))
    if config.out:
        picture(curves, config.out, ylabel="validation loss")


if __name__ == "__main__":
    run(main)
