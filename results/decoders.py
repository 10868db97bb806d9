"""Quality against decoding steps for every decoder of every process: a table and a plot.

    python results/decoders.py --allow_code_execution --models=out/processes/uniform,out/processes/absorbing

Each model answers the task that it was trained on; code tasks run generated programs. Writes OUT.txt, OUT.json and, where
matplotlib is installed, OUT.png: a row of panels a task, a panel a process.
"""
import contextlib
import io
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only modules of its own folder
import eval as evaluation
from checkpoint import load_checkpoint, process_of
from config import UserError, check, parse, run
from data.dataset import read_meta

STEPS = (1, 2, 4, 8, 16, 32)
# Beside each decoder with its defaults: the options that change what it is.
VARIANTS = {"resample": ["", "--update_share=0.3"], "unrolled": [""], "confidence": ["", "--block_len=8"],
            "threshold": ["", "--block_len=8"], "ancestral": [""], "euler": [""]}


@dataclass
class Config:
    models: str = "out/processes/uniform,out/processes/absorbing,out/processes/gaussian"  # checkpoints, fine-tuned on tasks
    n_examples: int = 100  # test examples
    allow_code_execution: bool = False  # run the programs that the models write: see the warning in sandbox.py
    out: str = "out/processes/decoders"  # where the table goes: OUT.txt, OUT.json, OUT.png


def variants(process):
    """Return [(name, flags)] of all decoders of a process."""
    rows = [(f"{decoder} {flags.strip('-')}".strip(), [f"--decoder={decoder}", *flags.split()])
            for decoder in process.decoders for flags in VARIANTS[decoder]]
    return rows + ([("ancestral remask=1", ["--decoder=ancestral", "--remask=1"])] if process.name == "absorbing" else [])


def measure(path, flags, n_steps, config):
    allowed = ["--allow_code_execution"] if config.allow_code_execution else []
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluation.main([path, *flags, f"--n_steps={n_steps}", f"--n_examples={config.n_examples}", *allowed])


def plot(rows, path):
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    tasks, processes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "process"))
    size = (4.5 * len(processes), 3.2 * len(tasks))
    figure, axes = plt.subplots(len(tasks), len(processes), figsize=size, sharey="row", squeeze=False)
    for (i, task), (j, process) in itertools.product(enumerate(tasks), enumerate(processes)):
        panel, axis = [row for row in rows if (row["task"], row["process"]) == (task, process)], axes[i, j]
        for decoder in dict.fromkeys(row["decoder"] for row in panel):
            x, y, error = zip(*[(p["evaluations"], p["score"], p["error"]) for p in panel if p["decoder"] == decoder])
            axis.errorbar(x, y, error, label=decoder, marker="o", capsize=2)
            axis.set(title=f"{task}, {process}", xlabel="network evaluations in a row", xscale="log")
            axis.legend(fontsize=7)
            axes[i, 0].set_ylabel(f"{panel[0]['metric']}, %")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv=None):
    config = parse(Config, argv)
    check(config.n_examples >= 1, f"--n_examples={config.n_examples} must be at least 1")
    check(not Path(f"{config.out}.txt").exists(), f"{config.out}.txt exists; it is not overwritten")
    models, rows, seen = {path: load_checkpoint(path) for path in config.models.split(",")}, [], {}
    for path, checkpoint in models.items():
        key = process_of(checkpoint).name, checkpoint["config"]["data"]
        check(key not in seen, f"{seen.get(key)} and {path} are both {key[0]} models of {key[1]}; compare one of each")
        seen[key] = path
        check(process_of(checkpoint).name != "ar", f"{path} is autoregressive: it has no decoders to compare")
        metric = read_meta(checkpoint["config"]["data"])[1].get("metric", "exact")
        check(metric != "code" or config.allow_code_execution, f"{path} writes code: scoring it means running its programs; "
                                                               f"read the top of sandbox.py, then say --allow_code_execution")
    try:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out={config.out}: {error.strerror}") from error
    lines = [f"n = {config.n_examples} test examples, 8 samples each, best by model score",
             f"{'task':10s} {'process':10s} {'decoder':24s} {'n_steps':>7s} {'metric':>7s} {'score %':>8s} {'+-':>5s}"
             f" {'evaluations':>11s} {'s/example':>9s} {'distinct-2':>10s}"]
    print("\n".join(lines))
    for path, checkpoint in models.items():
        process, task = process_of(checkpoint), Path(checkpoint["config"]["data"]).name
        for (decoder, flags), n_steps in itertools.product(variants(process), STEPS):
            r = measure(path, flags, n_steps, config)
            metric, (score, error) = next(iter(r["scores"].items()))
            rows.append(dict(task=task, process=process.name, model=path, decoder=decoder, n_steps=n_steps, metric=metric,
                             score=score, error=error, **{key: r[key] for key in ("evaluations", "seconds", "distinct_2")}))
            lines.append(f"{task:10s} {process.name:10s} {decoder:24s} {n_steps:7d} {metric:>7s} {score:8.1f} {error:5.1f}"
                         f" {r['evaluations']:11.1f} {r['seconds']:9.4f} {r['distinct_2']:10.3f}")
            print(lines[-1], flush=True)
    Path(f"{config.out}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    Path(f"{config.out}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    plot(rows, f"{config.out}.png")


if __name__ == "__main__":
    run(main)
