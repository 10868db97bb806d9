"""Which of your own models is better, and is the difference more than luck? One task, several models, seeds of each.

    python experiments/compare.py "AR=out/ar0,out/ar1; AR2Diff=out/b0,out/b1" --data=translate --n_examples=200 --out=ours

All models answer the same examples, so differences from the first row are taken example by example.
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

if __name__ == "__main__":  # a script finds only modules of its own folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval as evaluation
from engine.cli import check, parse, run
from engine.files import check_new, write_json, write_new
from experiments.plot import picture
from experiments.report import summary
from pretrained.loading import load_checkpoint
from scoring.metrics import standard_error


@dataclass
class Config:
    runs: str  # positional: "NAME=CHECKPOINT,CHECKPOINT; NAME=CHECKPOINT": the seeds of a row with commas between them
    data: str | None = None  # task folder, by path or by its name in data/prepared; default: the one each was trained on
    n_examples: int | None = None  # score the first n test examples only
    allow_code_execution: bool = False  # run the programs that the models write: see the warning in scoring/sandbox.py
    out: str = "compare"  # all results OUT.json, the table OUT.md, and OUT.png, quality against seconds


def rows_of(text):
    """Return {name: [checkpoints]}. Raises UserError."""
    rows = {}
    for part in filter(None, map(str.strip, text.split(";"))):
        name, _, paths = map(str.strip, part.partition("="))
        paths = [path.strip() for path in paths.split(",")]
        check(name and all(path and path[0] != "-" for path in paths), f"{part!r} is not NAME=CHECKPOINT,CHECKPOINT")
        check(name not in rows, f"{name!r} is named twice; give all its seeds in one list")
        check(len({Path(path).resolve() for path in paths}) == len(paths), f"{part!r} names a checkpoint twice: one seed")
        rows[name] = paths
    check(rows, "no runs; write NAME=CHECKPOINT,CHECKPOINT; NAME=CHECKPOINT")
    return rows


def entry(name, results, first):
    """Return what a row shows: score and error over seeds, and the paired difference from the results of the first row."""
    scores, base_scores = ([next(iter(r["scores"].values())) for r in rows] for rows in (results, first))
    means, base = ([fmean(values) for values in zip(*(r["values"] for r in rows))] for rows in (results, first))  # by example
    paired = standard_error([a - b for a, b in zip(means, base)])
    seeds = [standard_error([score for score, _ in rows]) for rows in (scores, base_scores) if len(rows) > 1]
    mean, over_seeds, _ = summary(scores)
    return dict(name=name, score=mean, over_seeds=over_seeds, over_examples=standard_error(means), n_seeds=len(results),
                difference=fmean(means) - fmean(base), difference_error=math.hypot(paired, *seeds),
                seconds=fmean(r["seconds"] for r in results), evaluations=fmean(r["evaluations"] for r in results))


def markdown(entries, metric):
    """Return the lines of a table."""
    lines = [f"| | {metric}, % | +- seeds | +- examples | above the first | evaluations | s/example |", "|---" * 7 + "|"]
    for e in entries:
        same = e is not entries[0] and not abs(e["difference"]) > 2 * e["difference_error"]
        change = "" if e is entries[0] else f"{e['difference']:+.1f} +- {e['difference_error']:.1f}{' =' * same}"
        over_seeds = f"{e['over_seeds']:.1f}" if e["n_seeds"] > 1 else ""
        lines.append(f"| {e['name']} ({e['n_seeds']}) | {e['score']:.1f} | {over_seeds} | {e['over_examples']:.1f} | "
                     f"{change} | {e['evaluations']:.1f} | {e['seconds']:.4f} |")
    return [*lines, "", "In brackets the number of seeds; one seed is an anecdote. `=`: within two standard errors (over "
                        "seeds, and over examples pair by pair)."]


def main(argv=None):
    config = parse(Config, argv)
    rows = rows_of(config.runs)
    for ending in ("json", "md", "png"):
        check_new(f"{config.out}.{ending}", "out")
    origins = {path: load_checkpoint(path)["config"]["data"] for paths in rows.values() for path in paths}
    folders = {str(Path(config.data or data).resolve()): path for path, data in origins.items()}
    check(len(folders) == 1, "these models were trained on different data; name the task by --data: "
                             + ", ".join(f"{path} on {data}" for data, path in folders.items()))
    words = [f"--{k}={value}" for k, value in vars(config).items() if k not in ("runs", "out") and value is not None]
    results = {name: [evaluation.main([path, *words])[0] for path in paths] for name, paths in rows.items()}
    everything = [r for row in results.values() for r in row]
    tokenizers = {r["tokenizer"]: r["checkpoint"] for r in everything}
    check(len(tokenizers) == 1, "these models differ in their tokenizer, so their scores cannot be compared: "
                                + ", ".join(f"{path} has {tokenizer}" for tokenizer, path in tokenizers.items()))
    entries = [entry(name, row, results[next(iter(rows))]) for name, row in results.items()]
    metric = next(iter(everything[0]["scores"]))
    text = "\n".join(markdown(entries, metric)) + "\n"
    write_json(f"{config.out}.json", {"entries": entries, "results": everything}, "out")
    write_new(f"{config.out}.md", text, "out")
    points = {e["name"]: [(e["seconds"], e["score"], e["over_examples"])] for e in entries}
    picture(points, f"{config.out}.png", "seconds per example", f"{metric}, %", xscale="log")
    print("\n" + text, end="")
    return entries


if __name__ == "__main__":
    run(main)
