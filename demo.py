"""The whole of AR2Diff in minutes on a laptop: pretrain, convert, continue, fine-tune, and compare, at equal budgets.

    python demo.py                     # translation; `make demo` runs this
    python demo.py --task=code         # or qa

It calls the project's scripts and prints each command, so that every line can be run, and changed, by hand. Models that do not
depend on each other are trained at the same time.
"""
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

import ar2diff
import eval as evaluation
import sample
import train_ar
import train_diff
from data import prepare
from data.dataset import PREPARED
from engine.cli import UserError, check, one_of, parse, run
from experiments.common import training_flops
from pretrained.loading import load_checkpoint
from start import shape_of


@dataclass
class Config:
    task: str = "translate"  # translate, code or qa
    size: str = "4x96x3"  # of every model: LAYERSxWIDTHxHEADS or a name, see start.py
    pretrain_steps: int = 200  # on text, AR and diffusion each; AR2Diff_N continues for a tenth of them
    finetune_steps: int = 1200  # on the task, every model
    batch_size: int = 16  # sequences per step: small batches learn these tasks from fewer sequences
    pretrain_lr: float = 3e-4  # peak learning rate on text: more makes the tied rows of rare tokens, digits say, alike
    finetune_lr: float = 3e-3  # peak learning rate on the task
    n_examples: int = 100  # test examples
    out_dir: str = "out/demo"  # everything that is made goes here; replaced if it is there


METRIC = {"code": "pass@1", "translate": "bleu", "qa": "f1"}


def show(script, *words):
    """Print a command as one would type it."""
    name = script.__name__.replace("data.", "data/")
    print(f"\n$ python {name}.py " + " ".join(shlex.quote(word) for word in words), flush=True)


def step(script, *words):
    """Show a command and run it in this process."""
    show(script, *words)
    return script.main(list(words))


def side_by_side(*jobs):
    """Run training commands (script, *words, --out_dir=...) at the same time, each on its share of the cores: small models keep
    two cores busier so. Before every line of a run stands the name of its out_dir. UserError where one failed."""
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // len(jobs)))}

    def train(job):
        script, *words = job
        with subprocess.Popen([sys.executable, "-u", script.__file__, *words], env=environment, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, encoding="utf-8") as process:
            for line in process.stdout:
                print(f"{Path(words[-1]).name:22s} {line}", end="", flush=True)
        return process.returncode
    for job in jobs:
        show(*job)
    print()
    with ThreadPoolExecutor(len(jobs)) as pool:
        check(not any(pool.map(train, jobs)), "a run failed; its last line above says why")


def new_folder(path):
    """Return an empty out_dir; what an earlier demo left there goes, anything else is refused."""
    out = Path(path)
    try:
        if out.exists():
            check((out / "demo.json").exists(), f"{out} exists and is not a demo's; choose another --out_dir")
            shutil.rmtree(out)
        out.mkdir(parents=True)
        (out / "demo.json").write_text("{}", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to --out_dir={out}: {error.strerror}") from error
    return out


def comparison(rows, metric):
    """Return the lines of the final table from (label, steps, FLOPs, result of eval.py) rows."""
    lines = [f"{'':24s}{'steps':>16s}{'TFLOP':>8s}{metric + ' %':>10s}{'+-':>6s}{'evaluations':>13s}{'s/example':>11s}"]
    for label, steps, cost, r in rows:
        score, error = r["scores"][metric]
        evaluations = f"{r['evaluations']:.0f} x {r['options']['n_samples']}"
        lines.append(f"{label:24s}{steps:>16s}{cost / 1e12:8.1f}{score:10.1f}{error:6.1f}{evaluations:>13s}"
                     f"{r['seconds']:11.3f}")
    return lines


def prepare_data(task, out):
    """Prepare the text and, if need be, the task; return (folder of the text, meta.json of the task)."""
    # NOTE: the paper pretrains on 80 % text and 20 % Python; here it is the reverse: so few steps teach one thing at most.
    corpus = out / "python"
    step(prepare, "text", "--sources=stdlib:docs:0.2,stdlib:code:0.8", f"--out={corpus}")
    if not (PREPARED / task).exists():
        step(prepare, task)
    return corpus, json.loads((PREPARED / task / "meta.json").read_text(encoding="utf-8"))


def train_all(config, out, corpus, canvas):
    """Run the three stages; return {label: [folders of the runs that led to a model, but for the task's]}."""
    task, n = config.task, config.pretrain_steps // 10
    shared = (f"--batch_size={config.batch_size}", "--log_every=100", "--eval_every=100000", "--eval_sequences=128")
    text = (f"--data={corpus}", f"--lr={config.pretrain_lr}", f"--size={config.size}", f"--input_len={canvas['input_len']}",
            f"--target_len={canvas['target_len']}", *shared)
    print(f"\n== Stage 1: pretraining on text, {config.pretrain_steps} steps")
    side_by_side((train_ar, *text, f"--steps={config.pretrain_steps}", f"--out_dir={out}/ar"),
                 (train_diff, *text, f"--steps={config.pretrain_steps}", f"--out_dir={out}/diffusion"))
    print(f"\n== Stage 2: the AR weights become a diffusion model, as they are (AR2Diff_0) and {n} steps on (AR2Diff_{n})")
    step(ar2diff, f"{out}/ar", f"{out}/ar2diff_0")
    step(train_diff, *text, f"--steps={n}", "--warmup=5", f"--init_from={out}/ar2diff_0", f"--out_dir={out}/ar2diff_{n}")
    print(f"\n== Stage 3: fine-tuning on {task}, {config.finetune_steps} steps each")
    lineage = {"AR": ["ar"], "Diffusion from scratch": ["diffusion"], "AR2Diff_0": ["ar", "ar2diff_0"],
               f"AR2Diff_{n}": ["ar", f"ar2diff_{n}"]}
    side_by_side(*((train_ar if name == "ar" else train_diff, f"--data={task}", f"--lr={config.finetune_lr}", *shared,
                    f"--steps={config.finetune_steps}", f"--init_from={out}/{name}", f"--out_dir={out}/{name}_{task}")
                   for *_, name in lineage.values()))
    return lineage


def evaluate_all(config, out, lineage):
    """Return rows (label, steps, FLOPs, result of eval.py) for comparison()."""
    rows = []
    for label, names in lineage.items():
        path = f"{out}/{names[-1]}_{config.task}"
        result, = step(evaluation, path, f"--n_examples={config.n_examples}", f"--out={path}/predictions.jsonl",
                      *(["--allow_code_execution"] if config.task == "code" else []))
        folders = [f"{out}/{name}" for name in names if name != "ar2diff_0"] + [path]
        steps = " + ".join(str(load_checkpoint(folder)["step"]) for folder in folders)
        rows.append((label, steps, training_flops(folders), result))
    return rows


def main(argv=None):
    config = parse(Config, argv)
    one_of("task", config.task, METRIC)
    check(config.pretrain_steps >= 10, f"--pretrain_steps={config.pretrain_steps} must be at least 10: a tenth is used too")
    for name in ("finetune_steps", "batch_size", "n_examples"):
        check(getattr(config, name) >= 1, f"--{name}={getattr(config, name)} must be at least 1")
    shape_of(config.size)
    start, out, task = time.time(), new_folder(config.out_dir), config.task
    lineage = train_all(config, out, *prepare_data(task, out))
    print("\n== Evaluation")
    rows = evaluate_all(config, out, lineage)
    table = comparison(rows, METRIC[task])
    facts = {"config": vars(config), "table": table, "results": [r for *_, r in rows], "torch": torch.__version__}
    (out / "demo.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")

    final = f"{out}/ar2diff_{config.pretrain_steps // 10}_{task}"
    prompt = json.loads((PREPARED / task / "test.jsonl").open(encoding="utf-8").readline())["input"]
    print("\n== One denoising, step by step (∎ is EOS, · is PAD)")
    step(sample, final, f"--prompt={prompt}", "--show_steps")
    print(f"\n== {task}: {config.n_examples} test examples that were not in training; {config.batch_size} sequences per step")
    print("\n".join(table))
    print("+- is one standard error. Evaluations: of the network, in a row x samples in parallel. TFLOP: of all training.")
    print(f"\n{time.time() - start:.0f} seconds in all. To go on:\n"
          f"  python sample.py {final} --prompt={shlex.quote(prompt)} --show_steps --n_steps=20\n"
          f"  python train_diff.py --data={task} --init_from={final} --steps=1000 --out_dir=out/longer")


if __name__ == "__main__":
    run(main)
