"""Fill the middle third of each target, both sides given: what diffusion can do by construction, and AR by guessing only.

    python experiments/infill.py out/ar2diff_code --allow_code_execution
    python experiments/infill.py out/ar_code --n_samples=8 --temperature=0.7 --allow_code_execution

AR sees the left side alone. With --n_samples above 1 it guesses so many gaps, and the likeliest *whole* is kept: then the right
side has its say, too. The number of missing tokens is known to all. Scores: the task's; exact_match: gold gaps.
"""
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

if __name__ == "__main__":  # a script finds only modules of its own folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval as evaluation
from data.dataset import pad_rows
from engine.cli import check, parse, run
from engine.noise import Noise


def fill(writer, batch, first, last, seed, index):
    """Return (ids (T,), evaluations) of one target, columns first .. last-1 written by the model; batch: of one row."""
    noise = Noise(seed, "generate", 0, [index])
    if writer.process.name != "ar":
        frozen = torch.ones_like(batch.targets, dtype=torch.bool)
        frozen[:, first:last] = False
        drafts = writer.drafts(batch, noise, frozen=frozen.to(writer.device))
        return drafts[-1][0], len(drafts) - 1
    n = writer.options["n_samples"]
    batch = type(batch)(*(None if x is None else x.repeat_interleave(n, dim=0) for x in batch)).to(writer.device)
    gap = batch._replace(targets=batch.targets[:, first:last])
    writer = replace(writer, options=writer.options | {"n_samples": 1})
    drafts = writer.drafts(gap, noise.split(n), prefix=batch.targets[:, :first] if first else None)
    wholes = batch.targets.clone()
    wholes[:, first:last] = drafts[-1]
    best = writer.bound(batch._replace(targets=wholes), noise.split(n), 1).argmin() if n > 1 else 0
    return wholes[best], len(drafts) - 1 + (n > 1)


def answer(writer, examples, config):
    """Return what eval.answer() does, of filled gaps: exact matches are gaps filled as in the gold text."""
    tokenizer, predictions = writer.tokenizer, []
    facts = dict(too_long=0, unfinished=0, evaluations=0, seconds=0.0)
    for i, example in enumerate(examples):
        ids, target = tokenizer.encode(example["input"]), tokenizer.encode(example["target"])
        if len(ids) > writer.input_len or not 0 < len(target) < writer.target_len:
            facts["too_long"] += 1
            predictions.append([""])
            continue
        first, last, start = len(target) // 3, max(len(target) // 3 + 1, 2 * len(target) // 3), time.perf_counter()
        batch = pad_rows([(ids, target)], tokenizer, writer.input_len, writer.target_len)
        filled, n = fill(writer, batch, first, last, config.seed, i)
        facts["seconds"] += time.perf_counter() - start
        facts["evaluations"] += n
        predictions.append([tokenizer.decode([token for token in filled.tolist()[:len(target)] if token < tokenizer.n_text])])
    return predictions, facts


def main(argv=None):
    config = parse(evaluation.Config, argv)
    evaluation.check_flags(config)
    check(not (config.drafter or config.out or config.json or config.metric == "bits") and config.n_programs == 1,
          "--drafter, --out, --json, --n_programs and --metric=bits are eval.py's, not for infilling")
    found = evaluation.evaluate(replace(config, strict=True), answer)
    print("\n".join(evaluation.report(found)))
    return [found]


if __name__ == "__main__":
    run(main)
