"""The whole of AR2Diff in minutes on a laptop: what are AR weights worth where text is plentiful and pairs are scarce?

    python demo.py                     # translation; `make demo` runs this
    python demo.py --task=code         # or qa, plan

It calls the project's scripts and prints each command, so that every line can be run, and changed, by hand. Runs that do not
depend on each other go side by side, one core each.
"""
import io
import json
import shlex
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

import ar2diff
import eval as evaluation
import sample
import train_ar
import train_diff
from data import prepare, synthetic
from engine.cli import UserError, check, one_of, parse, run
from engine.devices import n_cores
from experiments.common import apart, training_flops, training_step_flops, unpaired
from experiments.plot import curve, picture, terminal
from start import shape_of


@dataclass
class Config:
    task: str = "translate"  # translate, code, qa or plan
    size: str = "3x96x3"  # of every model: LAYERSxWIDTHxHEADS or a name, see start.py
    n_pairs: int = 300  # training examples of the task
    pretrain_steps: int = 1200  # AR steps on text; diffusion gets the same FLOPs, AR2Diff_N goes on for N = a tenth
    finetune_steps: int = 500  # on the task, every model
    n_examples: int = 200  # test examples
    seed: int = 0  # of weights, data order and noise
    out_dir: str = "out/demo"  # everything that is made goes here; replaced if it is there


SCRATCH, DIFFUSION, AR2DIFF_0, AR = "Diffusion, no text", "Diffusion, text", "AR2Diff_0", "AR"


def show(script, *words):
    """Print a command as one would type it."""
    name = script.__name__.replace("data.", "data/")
    print(f"\n$ python {name}.py " + " ".join(shlex.quote(word) for word in words), flush=True)


def step(script, *words):
    """Show a command and run it in this process."""
    show(script, *words)
    return script.main(list(words))


class Named(io.TextIOBase):
    """A stream that puts a name before every line."""

    def __init__(self, name, stream):
        self.name, self.stream, self.rest = name, stream, ""

    def write(self, text):
        *lines, self.rest = (self.rest + text).split("\n")
        self.stream.write("".join(f"{self.name:20s} {line}\n" for line in lines))
        self.stream.flush()


def work(name, commands):
    """Run commands (script, *words) one after the other on one core."""
    torch.set_num_threads(1)
    with redirect_stdout(Named(name, sys.stdout)), redirect_stderr(Named(name, sys.stderr)):
        for script, *words in commands:
            import_module(script).main(words)


def side_by_side(jobs):
    """Run jobs {name: [command (script, *words), ...]} side by side. Raises UserError where one fails."""
    for command in (command for job in jobs.values() for command in job):
        show(*command)
    print(flush=True)
    named = {name: [(script.__name__, *words) for script, *words in job] for name, job in jobs.items()}
    with ThreadPoolExecutor(n_cores()) as pool:
        list(pool.map(lambda name: apart(work, name, named[name]), jobs))


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


def prepare_data(config, out):
    """Write the pairs, and a text of which half is unpaired: inputs of some other examples, targets of yet others."""
    step(prepare, config.task, f"--n_train={config.n_pairs}", f"--out={out}/pairs")
    sources = ["stdlib:docs", "stdlib:code", *map(str, unpaired(config.task, config.n_pairs, out))]
    step(prepare, "text", f"--sources={','.join(sources)}", f"--out={out}/text")


def pretrain(config, out):
    """Run stages 1 and 2; return {label: (folders of the runs on text that led to it, script that fine-tunes it)}."""
    canvas, N = synthetic.META[config.task], config.pretrain_steps // 10
    columns = canvas["input_len"], canvas["target_len"]
    text = (f"--data={out}/text", f"--input_len={columns[0]}", f"--target_len={columns[1]}", "--batch_size=8",
            "--log_every=200", "--eval_every=2000", f"--seed={config.seed}")
    first = (*text, f"--size={config.size}", "--lr=2e-3")
    cost = {passes: training_step_flops(shape_of(config.size), *columns, passes) for passes in (1, 2)}
    equal = round(config.pretrain_steps * cost[1] / cost[2])
    print("\n== Stage 1: pretraining on text, AR and, for the same FLOPs, diffusion")
    side_by_side({AR: [(train_ar, *first, f"--steps={config.pretrain_steps}", f"--out_dir={out}/ar")],
                  DIFFUSION: [(train_diff, *first, f"--steps={equal}", f"--out_dir={out}/diffusion")]})
    print(f"\n== Stage 2: the AR weights become a diffusion model: as they are (AR2Diff_0), and {N} steps on (AR2Diff_{N})")
    step(ar2diff, f"{out}/ar", f"{out}/ar2diff_0")
    # A low learning rate: at that of stage 1 these few steps unlearn more than they teach.
    step(train_diff, *text, f"--init_from={out}/ar2diff_0", "--lr=3e-4", f"--steps={N}", f"--out_dir={out}/ar2diff_{N}")
    return {SCRATCH: ([], train_diff), DIFFUSION: ([f"{out}/diffusion"], train_diff), AR2DIFF_0: ([f"{out}/ar"], train_diff),
            f"AR2Diff_{N}": ([f"{out}/ar", f"{out}/ar2diff_{N}"], train_diff), AR: ([f"{out}/ar"], train_ar)}


def finetune(config, out, starts):
    """Run stage 3 and score its models; return {label: (folders of all runs that led to it, result of eval.py)}."""
    print(f"\n== Stage 3: fine-tuning on {config.n_pairs} pairs, {config.finetune_steps} steps each, and evaluation")
    tune = (f"--data={out}/pairs", "--lr=3e-3", "--batch_size=8", "--log_every=100", f"--steps={config.finetune_steps}",
            f"--eval_every={max(1, config.finetune_steps // 8)}", "--eval_sequences=64", f"--seed={config.seed}")
    allowed = ["--allow_code_execution"] if config.task == "code" else []
    folder = lambda label: f"{out}/{label.lower().replace(', ', '_').replace(' ', '_')}_tuned"
    jobs = {}
    for label, (runs, script) in starts.items():
        start = f"--init_from={runs[-1]}" if runs else f"--size={config.size}"
        jobs[label] = [(script, *tune, start, f"--out_dir={folder(label)}"),
                       (evaluation, folder(label), f"--n_examples={config.n_examples}", *allowed,
                        f"--json={folder(label)}.json")]
    side_by_side(jobs)
    result = lambda label: json.loads(Path(f"{folder(label)}.json").read_text(encoding="utf-8"))[0]
    return {label: ([*runs, folder(label)], result(label)) for label, (runs, _) in starts.items()}


def table(rows):
    """Return the lines of the final table."""
    names = list(rows[AR][1]["scores"])
    heads = "".join(f"{name:>14s}{'+-':>5s}" for name in names)
    lines = [f"{'':20s}{'TFLOP':>7s}{heads}{'evaluations':>13s}{'s/example':>11s}"]
    for label, (folders, r) in rows.items():
        scores = "".join(f"{r['scores'][name][0]:14.1f}{r['scores'][name][1]:5.1f}" for name in names)
        evaluations = f"{r['evaluations']:.0f} x {r['options']['n_samples']}"
        lines.append(f"{label:20s}{training_flops(folders) / 1e12:7.1f}{scores}{evaluations:>13s}{r['seconds']:11.3f}")
    return lines


def seen(config, rows):
    """Return the lines that say what the table shows."""
    metric = next(iter(rows[AR][1]["scores"]))
    score = {label: r["scores"][metric] for label, (_, r) in rows.items()}
    best, error = score[AR2DIFF_0]

    def beside(label):
        gap, noise = best - score[label][0], (error ** 2 + score[label][1] ** 2) ** 0.5
        words = "more than" if gap > 2 * noise else "less than" if gap < -2 * noise else "within two standard errors of"
        return f"{words} {score[label][0]:.1f}"
    return [f"From {config.n_pairs} pairs diffusion that starts from AR weights (AR2Diff_0) reaches {metric} {best:.1f}:",
            f"{beside(SCRATCH)}, without any text, and {beside(DIFFUSION)}, pretrained as diffusion for the same FLOPs.",
            f"Read from left to right the same AR weights reach {score[AR][0]:.1f}. (One seed; results/README.md has three.)"]


def main(argv=None):
    config = parse(Config, argv)
    one_of("task", config.task, synthetic.TASKS)
    check(config.pretrain_steps >= 10, f"--pretrain_steps={config.pretrain_steps} must be at least 10: a tenth is used too")
    for name in ("n_pairs", "finetune_steps", "n_examples"):
        check(1 <= getattr(config, name) <= 1_000_000, f"--{name}={getattr(config, name)} must be 1 to a million")
    check(0 <= config.seed < 1 << 32, f"--seed={config.seed} must be at least 0 and below 2^32")
    shape_of(config.size)
    start, out = time.time(), new_folder(config.out_dir)
    prepare_data(config, out)
    rows = finetune(config, out, pretrain(config, out))
    curves = {label: curve(folders[-1]) for label, (folders, _) in rows.items() if label != AR}
    picture(curves, out / "curves.png", "fine-tuning step", "validation loss, first pass",
            title=f"{config.task}, {config.n_pairs} pairs")
    prompt = json.loads((out / "pairs/test.jsonl").open(encoding="utf-8").readline())["input"]
    print("\n== One denoising, step by step: 0 is the noise (∎ is EOS, · is PAD)")
    step(sample, rows[AR2DIFF_0][0][-1], f"--prompt={prompt}", "--show_steps")
    print(f"\n== Validation loss while fine-tuning ({out}/curves.png): first pass, nats per token\n")
    print("\n".join(terminal(curves)))
    print(f"\n== {config.task}: {config.n_examples} test examples that were not in training\n")
    print("\n".join([*table(rows), "", *seen(config, rows)]))
    facts = {"config": vars(config), "rows": rows, "curves": curves, "seconds": time.time() - start}
    (out / "demo.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    print("\n+- is one standard error over examples. TFLOP: of all training. Evaluations: of the network, in a row x samples in"
          f" parallel.\n{facts['seconds']:.0f} seconds in all.")


if __name__ == "__main__":
    run(main)
