"""The whole of AR2Diff in minutes on a laptop: what are AR weights worth where text is plentiful and pairs are scarce?

    python demo.py                     # translation; `make demo` runs this
    python demo.py --task=code         # or qa, plan

It runs the project's scripts, side by side where they do not depend on each other, and prints each command, so that every line
can be run, and changed, by hand. Interrupted, it goes on where it was; what is done is not done again.
"""
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import sample
from data import synthetic
from engine.cli import check, one_of, parse, run
from engine.files import write_json
from experiments import tables
from experiments.cells import Store
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
    out_dir: str = "out/demo"  # everything that is made goes here


SCRATCH, DIFFUSION, AR2DIFF_0, AR = "Diffusion, no text", "Diffusion, text", "AR2Diff_0", "AR"


def plan(config, lab):
    """Return ({key of a run: name of its folder}, {row: cell}) of all that the demo compares."""
    seed, steps = config.seed, config.finetune_steps
    ar = lab.pretrain("train_ar.py", seed)  # stage 1, and for the same FLOPs:
    diffusion = lab.pretrain("train_diff.py", seed, lab.equal_flops(config.size))
    adapted = lab.adapt(ar, seed, 0.1, warmup=50)  # stage 2
    N = adapted.flag("steps")
    tune = partial(lab.tune, config.task, seed, eval_every=max(1, steps // 8))  # stage 3
    tuned = {SCRATCH: tune(), DIFFUSION: tune(diffusion), AR2DIFF_0: tune(ar), f"AR2Diff_{N}": tune(adapted),
             AR: tune(ar, "train_ar.py")}
    names = {ar.key: "ar", diffusion.key: "diffusion", adapted.key: f"ar2diff_{N}"}
    names |= {stage.key: f"{row.lower().replace(', ', '_').replace(' ', '_')}_tuned" for row, stage in tuned.items()}
    return names, {row: lab.cell(row, config.task, stage) for row, stage in tuned.items()}


def told(config, rows):
    """Return the lines of the final table, and of what it shows."""
    names = list(rows[AR]["result"]["scores"])
    heads = "".join(f"{name:>14s}{'+-':>5s}" for name in names)
    lines = [f"{'':20s}{'TFLOP':>7s}{heads}{'evaluations':>13s}{'s/example':>11s}"]
    for row, found in rows.items():
        r = found["result"]
        scores = "".join(f"{r['scores'][name][0]:14.1f}{r['scores'][name][1]:5.1f}" for name in names)
        evaluations = f"{r['evaluations']:.0f} x {r['options']['n_samples']}"
        lines.append(f"{row:20s}{found['work'] / 1e12:7.1f}{scores}{evaluations:>13s}{r['seconds']:11.3f}")
    score = {row: found["result"]["scores"][names[0]] for row, found in rows.items()}
    best, error = score[AR2DIFF_0]

    def beside(row):
        gap, noise = best - score[row][0], (error ** 2 + score[row][1] ** 2) ** 0.5
        words = "more than" if gap > 2 * noise else "less than" if gap < -2 * noise else "within two standard errors of"
        return f"{words} {score[row][0]:.1f}"
    return [*lines, "",
            f"From {config.n_pairs} pairs diffusion that starts from AR weights (AR2Diff_0) reaches {names[0]} {best:.1f}:",
            f"{beside(SCRATCH)}, without any text, and {beside(DIFFUSION)}, pretrained as diffusion for the same FLOPs.",
            f"Read from left to right the same AR weights reach {score[AR][0]:.1f}. "
            + ("(One seed; results/README.md has three.)" if config.task == "translate" else "(One seed is an anecdote.)")]


def main(argv=None):
    config = parse(Config, argv)
    one_of("task", config.task, synthetic.TASKS)
    for name, least in (("pretrain_steps", 10), ("n_pairs", 1), ("finetune_steps", 1), ("n_examples", 1)):
        check(least <= getattr(config, name) <= 1_000_000, f"--{name}={getattr(config, name)} must be {least} to a million")
    shape_of(config.size)
    start, out, canvas = time.time(), Path(config.out_dir), synthetic.META[config.task]
    check(not out.exists() or (out / "stages").is_dir(), f"{out} exists and is not a demo's; choose another --out_dir")
    lab = tables.Lab(tables.SCALES["demo"]._replace(
        sizes=(config.size,), pretrain=config.pretrain_steps, n_examples=config.n_examples,
        tasks={config.task: (config.n_pairs, config.finetune_steps)}, canvas=(canvas["input_len"], canvas["target_len"])), out)
    print(f"== {config.n_pairs} pairs, and a text, half of it inputs and targets of other examples, unpaired")
    lab.prepare()
    names, cells = plan(config, lab)
    store = Store(out, names)
    print(f"\n== Every row: text, {config.finetune_steps} steps on {config.n_pairs} pairs, its score", flush=True)
    turns = sorted(cells.values(), key=lambda cell: (-cell.stage.work, -len(cell.stage.lineage)))  # what takes longest first
    store.refuse_other_code(turns, refresh=True)
    store.run(turns, show=True)
    rows = {row: store.done(cell) for row, cell in cells.items()}
    curves = {row: curve(store.place(cell.stage)) for row, cell in cells.items() if row != AR}
    picture(curves, out / "curves.png", "fine-tuning step", "validation loss, first pass",
            title=f"{config.task}, {config.n_pairs} pairs")
    print("\n== One denoising by AR2Diff_0, step by step: 0 is the noise (∎ is EOS, · is PAD)\n")
    prompt = synthetic.example(config.task, 0, "test", 0)["input"]
    sample.main([str(store.place(cells[AR2DIFF_0].stage)), f"--prompt={prompt}", "--show_steps"])
    print(f"\n== Validation loss while fine-tuning ({out}/curves.png): first pass, nats per token\n")
    print(*terminal(curves), sep="\n")
    print(f"\n== {config.task}: {config.n_examples} test examples that were not in training\n", *told(config, rows), sep="\n")
    facts = {"config": vars(config), "rows": rows, "curves": curves, "seconds": time.time() - start}
    write_json(out / "demo.json", facts, "out_dir")
    print("\n+- is one standard error over examples. TFLOP: of all training. Evaluations: of the network, in a row x samples in"
          f" parallel.\n{facts['seconds']:.0f} seconds in all.")


if __name__ == "__main__":
    run(main)
