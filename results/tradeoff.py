"""Score against seconds on one task: an AR model, a diffusion model in a few steps, and AR with diffusion drafts.

    python results/tradeoff.py out/demo/ar_code out/demo/ar2diff_0_code --allow_code_execution

Each test example is answered alone, by all ways in turn. "AR takes x" is the median over examples of AR's seconds / this way's,
with quartiles; its own seconds depend on what else the machine does.
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only modules of its own folder
import torch

import bench
import eval as evaluation
from checkpoint import load_checkpoint, process_of
from config import check, parse, run
from data.dataset import read_meta
from sample import load_writer

STEPS = {f"{n} step{'s' * (n > 1)}": ["--n_samples=1", f"--n_steps={n}"] for n in (1, 2, 5, 10)}
WAYS = STEPS | {"10 steps, early stop": [*STEPS["10 steps"], "--early_stop"], "10 steps x 8 samples": ["--n_steps=10"]}


@dataclass
class Config:
    ar: str  # positional: checkpoint, fine-tuned on the task
    diffusion: str  # positional: checkpoint of a uniform model with the same tokenizer and canvas
    drafter: str | None = None  # another diffusion model of the task, of any process, that drafts for AR too
    n_examples: int = 100  # test examples
    compiled: bool = False  # models by torch.compile
    allow_code_execution: bool = False  # run the programs that the models write: see the warning in sandbox.py


def main(argv=None):
    config = parse(Config, argv)
    check(config.n_examples >= 1, f"--n_examples={config.n_examples} must be at least 1")
    checkpoints = load_checkpoint(config.ar), load_checkpoint(config.diffusion)
    for path, checkpoint, process in zip((config.ar, config.diffusion), checkpoints, ("ar", "uniform")):
        name = process_of(checkpoint).name
        check(name == process, f"{path} is a model of the process {name!r}, not {process!r}")
        check(checkpoint["config"]["data"], f"{path} was trained elsewhere, on no task: fine-tune it first")
    (path, meta), (other, _) = (read_meta(checkpoint["config"]["data"]) for checkpoint in checkpoints)
    check(path.samefile(other), f"{config.ar} was trained on {path}, {config.diffusion} on {other}: compare models of one task")
    shared = [f"--n_examples={config.n_examples}", f"--compile={'yes' if config.compiled else 'no'}",
              f"--allow_code_execution={config.allow_code_execution}"]
    ways = {"AR": [config.ar], **{name: [config.diffusion, *flags] for name, flags in WAYS.items()},
            "AR, diffusion drafts": [config.ar, f"--drafter={config.diffusion}"]}
    if config.drafter is not None:
        ways[f"AR, {process_of(load_checkpoint(config.drafter)).name} drafts"] = [config.ar, f"--drafter={config.drafter}"]
    settings = {name: parse(evaluation.Config, [*words, *shared]) for name, words in ways.items()}
    writers = {name: load_writer(setting.checkpoint, setting) for name, setting in settings.items()}
    ar = writers["AR"]
    metric, examples = evaluation.scored_examples(settings["AR"], path, meta)
    n, examples = len(examples), [e for e in examples if len(ar.tokenizer.encode(e["input"])) <= ar.input_len]
    check(examples, f"{path}: every input is longer than the models' {ar.input_len} tokens")

    seconds, evaluations, predictions = ({name: [] for name in ways} for _ in range(3))
    for i, example in enumerate([examples[0], *examples]):  # the first time does not count
        for name, writer in writers.items():
            settings[name].seed = i
            (texts,), facts = evaluation.answer(writer, [example], settings[name])
            if i:
                seconds[name].append(facts["seconds"])
                evaluations[name].append(facts["steps"])
                predictions[name].append(texts)

    print(f"{bench.name_of(ar.device)}, torch {torch.__version__}, {len(examples)} test examples of {path.name}, one at a time"
          f"{', compiled' * config.compiled}; {n - len(examples)} left out, too long\n"
          f"{'':24s}{'score %':>16s}{'+-':>6s}{'evaluations':>13s}{'ms':>9s}{'AR takes x':>12s}{'quartiles':>14s}")
    for name in ways:
        score, (percent, error) = next(iter(evaluation.score(metric, predictions[name], examples, settings[name]).items()))
        faster, low, high = bench.ratio(seconds["AR"], seconds[name])
        print(f"{name:24s}{score:>8s}{percent:8.1f}{error:6.1f}{sum(evaluations[name]) / len(examples):13.1f}"
              f"{1e3 * median(seconds[name]):9.1f}{faster:12.2f}{low:8.2f}{high:6.2f}")


if __name__ == "__main__":
    run(main)
