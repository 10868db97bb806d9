"""Sequence-level distillation (Kim and Rush, arXiv 1606.07947): a task whose training targets are what a model answers.

    python sample.py out/ar_code --task=code --out=data/prepared/code_by_ar
    python train_diff.py --data=code_by_ar --init_from=out/ar2diff --out_dir=out/distilled

A model that decides all tokens at once suffers where several texts are right. An AR teacher answers with one of them, always in
the same manner, which is easier to learn (arXiv 1911.02727).
"""
import json
import shutil
from pathlib import Path

from tqdm import tqdm

from data.dataset import pad_rows, read_meta
from data.folder import draft_of
from data.tasks import read_jsonl
from engine.cli import check
from engine.noise import Noise


def write_answers(config, writer):
    """Write the folder config.out: the task config.task with the writer's answers to its training inputs as targets.

    Inputs that do not fit the canvas, and answers that are empty, do not end, or would not fit it, are left out.
    """
    path, meta = read_meta(config.task)
    check(meta["kind"] == "task", f"{path} holds text, not a task: there is nothing to answer")
    check(writer.input_len > 0, f"{config.checkpoint} is a plain language model (input_len 0): fine-tune it on the task first")
    check(config.n_examples is None or config.n_examples >= 1, f"--n_examples={config.n_examples} must be at least 1")
    check(not Path(config.out).exists(), f"--out={config.out} exists; it is not overwritten")
    tokenizer, inputs = writer.tokenizer, [e["input"] for e in read_jsonl(path / "train.jsonl")[:config.n_examples]]
    longest = min(writer.target_len, meta.get("target_len", writer.target_len))
    batch_size = max(1, 64 // writer.options["n_samples"])
    encoded = tokenizer.encode_batch(inputs)
    fitting = [i for i, ids in enumerate(encoded) if len(ids) <= writer.input_len]
    with draft_of(Path(config.out).resolve(), overwrite=False) as draft:
        n_written = 0
        with open(draft / "train.jsonl", "w", encoding="utf-8", newline="\n") as file:
            for first in tqdm(range(0, len(fitting), batch_size), desc="answers", leave=False, disable=None):
                rows = fitting[first:first + batch_size]
                batch = pad_rows([(encoded[i], []) for i in rows], tokenizer, writer.input_len, writer.target_len)
                answers = writer.drafts(batch, Noise(config.seed, "generate", 0, rows))[-1].tolist()
                for i, ids in zip(rows, answers):
                    pair = {"input": inputs[i], "target": tokenizer.decode(ids)}
                    n_tokens = len(tokenizer.encode(pair["target"]))  # perhaps other tokens than those that were drawn
                    if tokenizer.eos in ids and pair["target"].strip() and n_tokens < longest:
                        file.write(json.dumps(pair, ensure_ascii=False) + "\n")
                        n_written += 1
        check(n_written, f"not one of {len(inputs)} answers ends within the canvas; nothing was written")
        for name in ("valid.jsonl", "test.jsonl"):
            if (path / name).exists():
                shutil.copy(path / name, draft / name)
        meta = meta | {"targets_by": config.checkpoint}
        (draft / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    print(f"{n_written:,} of {len(inputs):,} training inputs answered in {config.out}")
