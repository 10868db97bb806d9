"""Quality against decoding steps for every decoder of every process: a table and a plot.

    python results/decoders.py --allow_code_execution --models=out/processes/uniform,out/processes/absorbing

Writes OUT.txt, OUT.json and (where matplotlib is installed) OUT.png. The models answer a code task: generated programs are run.
"""
import contextlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only modules of its own folder
import eval as evaluation
from checkpoint import load_checkpoint, process_of
from config import UserError, check, parse, run

STEPS = (1, 2, 4, 8, 16, 32)
# Beside each decoder with its defaults: the options that change what it is.
VARIANTS = {"resample": ["", "--update_share=0.3"], "unrolled": [""], "confidence": ["", "--block_len=8"], "threshold": [""],
            "ancestral": [""], "euler": [""]}


@dataclass
class Config:
    models: str = "out/processes/uniform,out/processes/absorbing,out/processes/gaussian"  # checkpoints, fine-tuned on code
    n_examples: int = 100  # test examples
    allow_code_execution: bool = False  # run the programs that the models write: see the warning in sandbox.py
    out: str = "out/processes/decoders"  # where the table goes: OUT.txt, OUT.json, OUT.png


def variants(process):
    """Return [(name, flags)] of all decoders of a process."""
    rows = [(f"{decoder} {flags.strip('-')}".strip(), [f"--decoder={decoder}", *flags.split()])
            for decoder in process.decoders for flags in VARIANTS[decoder]]
    return rows + ([("ancestral remask=1", ["--decoder=ancestral", "--remask=1"])] if process.name == "absorbing" else [])


def measure(path, flags, n_steps, n_examples):
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluation.main([path, *flags, f"--n_steps={n_steps}", f"--n_examples={n_examples}", "--allow_code_execution"])


def plot(rows, path):
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    processes = list(dict.fromkeys(row["process"] for row in rows))
    figure, axes = plt.subplots(1, len(processes), figsize=(4.5 * len(processes), 3.6), sharey=True, squeeze=False)
    for axis, process in zip(axes[0], processes):
        for decoder in dict.fromkeys(row["decoder"] for row in rows if row["process"] == process):
            points = [row for row in rows if (row["process"], row["decoder"]) == (process, decoder)]
            axis.errorbar([p["evaluations"] for p in points], [p["score"] for p in points], [p["error"] for p in points],
                          label=decoder, marker="o", capsize=2)
        axis.set(title=process, xlabel="network evaluations in a row", xscale="log")
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("score, %")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv=None):
    config = parse(Config, argv)
    check(config.n_examples >= 1, f"--n_examples={config.n_examples} must be at least 1")
    check(config.allow_code_execution, "scoring code means running programs that a model wrote; see the top of sandbox.py")
    check(not Path(f"{config.out}.txt").exists(), f"{config.out}.txt exists; it is not overwritten")
    models, rows = {path: process_of(load_checkpoint(path)) for path in config.models.split(",")}, []
    for path, process in models.items():
        check(process.name != "ar", f"{path} is autoregressive: it has no decoders to compare")
    try:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out={config.out}: {error.strerror}") from error
    lines = [f"n = {config.n_examples} test examples, 8 samples each, best by model score",
             f"{'process':10s} {'decoder':24s} {'n_steps':>7s} {'score %':>8s} {'+-':>5s} {'evaluations':>11s}"
             f" {'s/example':>9s} {'distinct-2':>10s}"]
    print("\n".join(lines))
    for path, process in models.items():
        for decoder, flags in variants(process):
            for n_steps in STEPS:
                r = measure(path, flags, n_steps, config.n_examples)
                score, error = next(iter(r["scores"].values()))
                rows.append(dict(process=process.name, model=path, decoder=decoder, n_steps=n_steps, score=score, error=error,
                                 evaluations=r["evaluations"], seconds=r["seconds"], distinct_2=r["distinct_2"]))
                lines.append(f"{process.name:10s} {decoder:24s} {n_steps:7d} {score:8.1f} {error:5.1f} {r['evaluations']:11.1f}"
                             f" {r['seconds']:9.4f} {r['distinct_2']:10.3f}")
                print(lines[-1], flush=True)
    Path(f"{config.out}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    Path(f"{config.out}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    plot(rows, f"{config.out}.png")


if __name__ == "__main__":
    run(main)
