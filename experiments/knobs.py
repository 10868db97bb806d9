"""What each knob of the transfer gives: one AR model, N more steps with the knob, the same fine-tuning; several seeds.

    python experiments/knobs.py                                                      # the embedded translation task
    python experiments/knobs.py --task=code --steps=600 --allow_code_execution      # runs the models' programs
    python experiments/knobs.py --task=multi30k --text=books --steps=600             # prepared as in real_data.sh

N is a percentage of the AR steps, as in the paper. With N = 0 the knob works in the fine-tuning, and the teacher is the AR
model fine-tuned on the task; else it works in the N steps on text, and the teacher is the AR model. Two rows lack AR weights:
`from scratch` starts the fine-tuning at random, `diffusion` is pretrained as diffusion with the FLOPs of the AR steps and the
largest N together. Writes OUT/table.txt beside the runs.
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

if __name__ == "__main__":  # a script finds only modules of its own folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval as evaluation
import train_ar
import train_diff
from diffusion import PROCESSES
from engine.cli import check, one_of, parse, run
from experiments.common import flops, prepared_task, prepared_text
from pretrained.loading import load_checkpoint

KNOBS = {  # flags, from the steps that they work in and the teacher
    "plain": lambda steps, teacher: [],
    "shift": lambda steps, teacher: ["--shift"],
    "anneal": lambda steps, teacher: [f"--anneal_steps={steps // 2}"],
    "causal inputs": lambda steps, teacher: ["--inputs_attention=causal"],
    "full": lambda steps, teacher: ["--inputs_attention=full"],
    "teacher": lambda steps, teacher: [f"--teacher={teacher}"],
    "AR loss": lambda steps, teacher: ["--ar_weight=0.5"],
}
WITHOUT_AR = ("from scratch", "diffusion")


@dataclass
class Config:
    task: str = "translate"  # a prepared task; translate, code and qa are prepared where they are missing
    text: str | None = None  # a prepared text to pretrain on; default: mostly Python source, as in demo.py
    process: str = "uniform"  # or absorbing, gaussian
    seeds: int = 3  # runs per row, seeds 0, 1, ...; all from one AR model
    pretrain_steps: int = 1000  # AR steps on the text
    steps: int = 300  # fine-tuning steps
    n_examples: int = 100  # test examples
    knobs: str = ",".join((*WITHOUT_AR, *KNOBS))  # the rows
    percents: str = "0,1,10"  # the N of each row, in % of the AR steps
    size: str = "4x96x3"
    allow_code_execution: bool = False  # run the programs that the models write: see the warning in scoring/sandbox.py
    out: str = "out/knobs"


def row(name, n, results):
    """Return a line of the table from the (score, loss) of each seed: means with their standard errors."""
    scores, losses = zip(*results)
    error = lambda x: stdev(x) / len(x) ** 0.5 if len(x) > 1 else float("nan")
    return (f"{name:14s}{n:>6}{mean(scores):9.1f}{error(scores):6.1f}{mean(losses):13.4f}{error(losses):8.4f}   "
            + " ".join(f"{s:.1f}" for s in scores))


def checked(config):
    """Return (rows to measure, adaptation steps N to measure them at). Raises UserError for a flag that makes no sense."""
    chosen = [one_of("knobs", name, (*WITHOUT_AR, *KNOBS)) for name in config.knobs.split(",")]
    one_of("process", config.process, PROCESSES)
    for name in ("seeds", "steps", "n_examples"):
        check(getattr(config, name) >= 1, f"--{name}={getattr(config, name)} must be at least 1")
    percents = config.percents.split(",")
    check(all(p.isdecimal() for p in percents), f"--percents={config.percents} must be whole numbers with commas between them")
    adapt = [config.pretrain_steps * int(p) // 100 for p in percents]
    check(all(n or p == "0" for n, p in zip(adapt, percents)), f"--percents={config.percents}: less than one of "
                                                               f"--pretrain_steps={config.pretrain_steps}")
    check(not Path(config.out).exists(), f"{config.out} exists; it is not overwritten")
    return chosen, adapt


SHARED = ("--batch_size=16", "--log_every=200", "--eval_every=100000", "--eval_sequences=256", "--too_long=drop")


class Runs:
    """The AR model, its fine-tuned twin that teaches, and what is trained from them."""

    def __init__(self, config, text, canvas):
        self.config, (S, T) = config, canvas
        self.on_text = [f"--data={text}", "--lr=1e-3", f"--input_len={S}", f"--target_len={T}", *SHARED]
        self.on_task = [f"--data={config.task}", "--lr=3e-3", f"--steps={config.steps}", *SHARED]
        self.ar, self.teacher = f"{config.out}/ar", f"{config.out}/ar_task"

    def prepare(self):
        """Train AR on the text and on the task."""
        size, steps = f"--size={self.config.size}", f"--steps={self.config.pretrain_steps}"
        train_ar.main([*self.on_text, size, steps, f"--out_dir={self.ar}"])
        train_ar.main([*self.on_task, f"--init_from={self.ar}", f"--out_dir={self.teacher}"])

    def tuned(self, name, n, seed):
        """Return the folder of a fine-tuned diffusion model that saw n steps on text with this knob."""
        model, size = f"{self.config.out}/{name.replace(' ', '_')}_{n}_{seed}", [f"--size={self.config.size}"]
        new = [f"--process={self.config.process}", f"--seed={seed}"]
        knob = lambda steps, teacher: size if name in WITHOUT_AR else [f"--init_from={self.ar}", *KNOBS[name](steps, teacher)]
        if n == 0:
            train_diff.main([*self.on_task, *new, *knob(self.config.steps, self.teacher), f"--out_dir={model}"])
        else:
            train_diff.main([*self.on_text, *new, *knob(n, self.ar), f"--steps={n}", f"--warmup={n // 5}",
                             f"--out_dir={model}_text"])
            train_diff.main([*self.on_task, f"--seed={seed}", f"--init_from={model}_text", f"--out_dir={model}"])
        return model

    def measured(self, model):
        """Return (score in %, best validation loss)."""
        allowed = ["--allow_code_execution"] if self.config.allow_code_execution else []
        words = [f"--data={self.config.task}", f"--n_examples={self.config.n_examples}", *allowed]
        result, = evaluation.main([model, *words])
        return next(iter(result["scores"].values()))[0], load_checkpoint(f"{model}/best.pt")["best"]


def main(argv=None):
    config = parse(Config, argv)
    (chosen, adapt), out = checked(config), Path(config.out)
    S, T = prepared_task(config.task, config.allow_code_execution)
    runs = Runs(config, prepared_text(config.text, out), (S, T))
    runs.prepare()
    shape, P = load_checkpoint(runs.ar)["shape"], config.pretrain_steps
    cost = lambda passes: flops(shape, S, logits=False) + passes * flops(shape, T)
    equal = round(P * cost(1) / cost(2 if config.process == "uniform" else 1)) + max(adapt)
    steps = {"from scratch": (0,), "diffusion": (equal,)}
    lines = [f"{config.task}: {P} AR steps on text, {config.steps} steps of fine-tuning as {config.process} diffusion, 16 "
             f"sequences a step; n = {config.n_examples}, {config.seeds} seeds, +- over seeds",
             f"{'':14s}{'N':>6s}{'score %':>9s}{'+-':>6s}{'valid loss':>13s}{'+-':>8s}   each",
             row("AR itself", "", [runs.measured(runs.teacher)])]
    for name in chosen:
        for n in steps.get(name, adapt):
            lines.append(row(name, n, [runs.measured(runs.tuned(name, n, seed)) for seed in range(config.seeds)]))
            print("\n".join(lines), flush=True)
            (out / "table.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
