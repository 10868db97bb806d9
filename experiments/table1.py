"""The paper's Table 1 in small (arXiv 2401.17181): architecture x pretraining objective, all of it diffusion, on three tasks.

    python experiments/table1.py --allow_code_execution                                  # code tasks run the models' programs
    python experiments/table1.py --tasks=multi30k,squad --text=books --steps=2000        # prepared as in real_data.sh

Every cell sees the same rows of 64 tokens of text, as diffusion from the start; then each task. An encoder-decoder has --size's
layers in either stack, as in the paper, so more parameters than a decoder (7/3 of its blocks'). Writes OUT/table.txt.
"""
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # a script finds only modules of its own folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval as evaluation
import train_diff
from data.objectives import span_lengths
from engine.cli import check, parse, run
from experiments.common import prepared_task, prepared_text
from model import ARCHITECTURES
from pretrained.loading import build_model, load_checkpoint

ROW = 64  # tokens of text in a row
SPAN = span_lengths(ROW)
CANVAS = {"prefix": (ROW // 2, ROW // 2), "span": (SPAN.n_inputs, SPAN.n_targets)}


@dataclass
class Config:
    tasks: str = "translate,qa,code"  # prepared tasks; these three are prepared where they are missing
    text: str | None = None  # a prepared text to pretrain on; default: mostly Python source, as in demo.py
    pretrain_steps: int = 500  # diffusion steps on the text
    steps: int = 600  # fine-tuning steps on each task
    n_examples: int = 100  # test examples
    size: str = "4x96x3"
    seed: int = 0
    allow_code_execution: bool = False  # run the programs that the models write: see the warning in scoring/sandbox.py
    out: str = "out/table1"


def main(argv=None):
    config = parse(Config, argv)
    tasks = config.tasks.split(",")
    for name in ("pretrain_steps", "steps", "n_examples"):
        check(getattr(config, name) >= 1, f"--{name}={getattr(config, name)} must be at least 1")
    out = Path(config.out)
    check(not out.exists(), f"{out} exists; it is not overwritten")
    for task in tasks:
        prepared_task(task, config.allow_code_execution)
    text = prepared_text(config.text, out)

    shared = ["--batch_size=16", "--log_every=200", "--eval_every=100000", "--eval_sequences=256", f"--seed={config.seed}"]
    allowed = ["--allow_code_execution"] if config.allow_code_execution else []
    lines = [f"{config.pretrain_steps} steps on text, {config.steps} on each task, 16 sequences a step; "
             f"n = {config.n_examples}, seed {config.seed}; +- over examples",
             f"{'architecture':17s}{'objective':11s}{'M params':>8s}{'text loss':>11s}" + "".join(f"{t:>20s}" for t in tasks)]
    for architecture, objective in itertools.product(ARCHITECTURES, CANVAS):
        cell, (input_len, target_len) = f"{out}/{architecture}_{objective}", CANVAS[objective]
        train_diff.main([f"--data={text}", f"--architecture={architecture}", f"--objective={objective}", "--lr=1e-3",
                         f"--input_len={input_len}", f"--target_len={target_len}", f"--steps={config.pretrain_steps}",
                         f"--size={config.size}", *shared, f"--out_dir={cell}"])
        best = load_checkpoint(f"{cell}/best.pt")
        line = f"{architecture:17s}{objective:11s}{build_model(best).n_params() / 1e6:8.2f}{best['best']:11.3f}"
        for task in tasks:
            train_diff.main([f"--data={task}", f"--init_from={cell}", f"--steps={config.steps}", "--lr=3e-3", *shared,
                             "--too_long=drop", f"--out_dir={cell}_{task}"])
            result, = evaluation.main([f"{cell}_{task}", f"--n_examples={config.n_examples}", *allowed])
            metric, (score, error) = next(iter(result["scores"].items()))
            line += f"{metric:>9s}{score:6.1f}{error:5.1f}"
        lines.append(line)
        print("\n".join(lines), flush=True)
        (out / "table.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
