"""What each knob of the transfer gives: the code task from the same AR model, several seeds, one table.

    python results/knobs.py --allow_code_execution

About 90 seconds a run on one core. Writes OUT/table.txt beside the runs. The models' programs are executed.
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only modules of its own folder
import eval as evaluation
import train_ar
import train_diff
from checkpoint import load_checkpoint
from config import check, one_of, parse, run
from data import prepare
from data.dataset import PREPARED


@dataclass
class Config:
    seeds: int = 3  # runs per row, seeds 0, 1, ...
    pretrain_steps: int = 200  # AR steps on mostly Python text, as in demo.py
    steps: int = 600  # fine-tuning steps
    n_examples: int = 200  # test examples
    knobs: str = ""  # names of rows, with commas; default: all
    allow_code_execution: bool = False  # run the programs that the models write: see the warning in sandbox.py
    out: str = "out/knobs"


def main(argv=None):
    config = parse(Config, argv)
    check(config.allow_code_execution, "scoring code means running programs that a model wrote; see the top of sandbox.py")
    out = Path(config.out)
    check(not out.exists(), f"{out} exists; it is not overwritten")
    for name in ("seeds", "steps", "n_examples"):
        check(getattr(config, name) >= 1, f"--{name}={getattr(config, name)} must be at least 1")
    check(config.pretrain_steps >= 10, f"--pretrain_steps={config.pretrain_steps} must be at least 10: a tenth is used too")
    text, n = out / "text", config.pretrain_steps
    ar = f"--init_from={out}/ar"
    knobs = {
        "from scratch": ["--size=4x96x3"],
        "AR2Diff_0": [ar],
        f"AR2Diff_{n // 10}": [f"--init_from={out}/ar2diff"],
        "shift": [ar, "--shift"],
        "anneal": [ar, f"--anneal_steps={config.steps // 3}"],
        "causal inputs": [ar, "--inputs_attention=causal"],
        "full": [ar, "--inputs_attention=full"],
        "teacher": [ar, f"--teacher={out}/teacher"],
        "alignment": [ar, f"--teacher={out}/teacher", "--teacher_weight=0", "--align_weight=0.5"],
        "AR loss": [ar, "--ar_weight=0.5"],
    }
    chosen = [one_of("knobs", name, knobs) for name in config.knobs.split(",")] if config.knobs else list(knobs)
    prepare.main(["text", "--sources=stdlib:docs:0.2,stdlib:code:0.8", f"--out={text}"])
    if not (PREPARED / "code").exists():
        prepare.main(["code"])
    shared = ["--batch_size=16", "--log_every=200", "--eval_every=100000", "--eval_sequences=256"]
    pretrain = [f"--data={text}", "--lr=3e-4", "--input_len=24", "--target_len=32", *shared]
    task = ["--data=code", "--lr=3e-3", f"--steps={config.steps}", *shared]
    train_ar.main([*pretrain, "--size=4x96x3", f"--steps={n}", f"--out_dir={out}/ar"])
    train_ar.main([*task, f"--init_from={out}/ar", f"--out_dir={out}/teacher"])
    train_diff.main([*pretrain, f"--init_from={out}/ar", f"--steps={n // 10}", "--warmup=5", f"--out_dir={out}/ar2diff"])
    lines = [f"{config.seeds} seeds, {config.steps} steps of 16, n = {config.n_examples}; +- is the standard error over seeds",
             f"{'':16s}{'pass@1 %':>10s}{'+-':>6s}{'valid, L1 + L2':>20s}{'+-':>8s}   each"]
    for name in chosen:
        scores, losses = [], []
        for seed in range(config.seeds):
            folder = f"{out}/{name.replace(' ', '_')}.{seed}"
            train_diff.main([*task, f"--seed={seed}", *knobs[name], f"--out_dir={folder}"])
            result = evaluation.main([folder, f"--n_examples={config.n_examples}", "--allow_code_execution"])
            scores.append(result["scores"]["pass@1"][0])
            losses.append(load_checkpoint(f"{folder}/best.pt")["best"])
        error = lambda x: stdev(x) / len(x) ** 0.5 if len(x) > 1 else float("nan")
        lines.append(f"{name:16s}{mean(scores):10.1f}{error(scores):6.1f}{mean(losses):20.4f}{error(losses):8.4f}   "
                     + " ".join(f"{s:.1f}" for s in scores))
        print("\n".join(lines), flush=True)
        Path(f"{out}/table.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
