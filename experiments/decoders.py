"""Quality against decoding steps for every decoder of every process: a table and a plot.

    python experiments/decoders.py --allow_code_execution --models=out/processes/uniform,out/processes/absorbing

Each model answers the task that it was trained on; code tasks run generated programs. Writes OUT.txt, OUT.json and OUT.png: a
row of panels a task, a panel a process.
"""
import contextlib
import io
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # a script finds only modules of its own folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval as evaluation
from beyond.decoders import DECODERS
from data.dataset import read_meta
from engine.cli import UserError, check, parse, run
from pretrained.loading import load_checkpoint

STEPS = (1, 2, 4, 8, 16, 32)
# Beside each decoder with its defaults: the options that change what it is.
VARIANTS = {("absorbing", "confidence"): ["", "--block_len=8"], ("absorbing", "ancestral"): ["", "--remask=1"]}


@dataclass
class Config:
    models: str = "out/processes/uniform,out/processes/absorbing,out/processes/gaussian"  # checkpoints, fine-tuned on tasks
    n_examples: int = 100  # test examples
    allow_code_execution: bool = False  # run the programs that the models write: see the warning in scoring/sandbox.py
    out: str = "out/processes/decoders"  # where the table goes: OUT.txt, OUT.json, OUT.png


def measure(path, process, config):
    """Yield a row for each decoder, variant and number of steps of one model."""
    allowed = ["--allow_code_execution"] if config.allow_code_execution else []
    for decoder, n_steps in itertools.product(DECODERS[process], STEPS):
        for flags in VARIANTS.get((process, decoder), [""]):
            words = [path, f"--decoder={decoder}", *flags.split(), f"--n_steps={n_steps}", f"--n_examples={config.n_examples}"]
            with contextlib.redirect_stdout(io.StringIO()):
                r, = evaluation.main([*words, *allowed])
            metric, (score, error) = next(iter(r["scores"].items()))
            yield dict(process=process, model=path, decoder=f"{decoder} {flags.strip('-')}".strip(), n_steps=n_steps,
                       metric=metric, score=score, error=error, task=Path(r["data"]).name,
                       **{key: r[key] for key in ("evaluations", "seconds", "distinct_2")})


def plot(rows, path):
    import matplotlib.pyplot as plt  # here: a second that a mistake in the flags need not wait
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
    processes, rows, seen = {}, [], {}
    for path in config.models.split(","):
        checkpoint = load_checkpoint(path)
        processes[path], data = checkpoint["process"]["name"], checkpoint["config"]["data"]
        name = processes[path]
        other = seen.setdefault((name, data), path)
        check(other == path, f"{other} and {path} are both {name} models of {data}; compare one of each")
        check(name != "ar", f"{path} is autoregressive: it has no decoders to compare")
        metric = read_meta(data)[1].get("metric", "exact")
        check(metric != "code" or config.allow_code_execution, f"{path} writes code: scoring it means running its programs; "
              f"read the top of scoring/sandbox.py, then say --allow_code_execution")
    try:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out={config.out}: {error.strerror}") from error
    lines = [f"n = {config.n_examples} test examples, 8 samples each, best by model score",
             f"{'task':10s} {'process':10s} {'decoder':24s} {'n_steps':>7s} {'metric':>7s} {'score %':>8s} {'+-':>5s}"
             f" {'evaluations':>11s} {'s/example':>9s} {'distinct-2':>10s}"]
    for r in itertools.chain.from_iterable(measure(path, process, config) for path, process in processes.items()):
        rows.append(r)
        lines.append(f"{r['task']:10s} {r['process']:10s} {r['decoder']:24s} {r['n_steps']:7d} {r['metric']:>7s} "
                     f"{r['score']:8.1f} {r['error']:5.1f} {r['evaluations']:11.1f} {r['seconds']:9.4f}"
                     f" {r['distinct_2']:10.3f}")
        print("\n".join(lines[-1 if len(rows) > 1 else 0:]), flush=True)
    Path(f"{config.out}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    Path(f"{config.out}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    plot(rows, f"{config.out}.png")


if __name__ == "__main__":
    run(main)
