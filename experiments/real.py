"""A real language model turned into a diffusion model: the cells of `reproduce.py --what=real`, and their data.

SmolLM2-135M, 60 steps of 8, on the questions of SQuAD that fit a short canvas. METHODS of the rows are flags of train_diff.py.
"""
import json
from functools import partial

from data.dataset import read_meta
from data.folder import draft_of
from data.tasks import SPLITS, read_jsonl
from data.tokenizer import load_tokenizer

TASK, CANVAS = "squad_short", (80, 12)  # in SmolLM2's tokens
CAUSAL = {"inputs_attention": "causal", "n_draws": 4}
METHODS = {  # row -> flags of its fine-tuning
    "AR": {},
    "uniform, shift": CAUSAL | {"shift": "true"},
    "absorbing, shift": CAUSAL | {"shift": "true", "process": "absorbing"},
    "uniform": CAUSAL | {"shift": "false"},
    "absorbing": CAUSAL | {"shift": "false", "process": "absorbing"},
    "uniform, the paper's": {"inputs_attention": "bidirectional", "shift": "false", "n_draws": 4}}


def cells(lab):
    """SmolLM2-135M turned by 60 steps of 8 on SQuAD's short questions, beside fresh weights of its size."""
    for seed in lab.seeds():
        scratch = []
        for row, flags in METHODS.items():
            tune = partial(lab.stage, "train_diff.py" if flags else "train_ar.py", TASK, CANVAS, 60, seed=seed, **flags)
            more = {"n_samples": 4} if flags else {}
            yield lab.cell(row, TASK, tune(lr=3e-4, init_from="smollm2"), **more)
            if "," not in row:
                fresh = tune(lr=1e-3, size="30x576x9", tokenizer="smollm2")
                scratch.append(lab.cell(f"{row}, from scratch", TASK, fresh, **more))
        yield from scratch


def write_data(out):
    """Write SQuAD again as `out`, with those of its examples that fit the canvas."""
    (folder, meta), tokenizer = read_meta("squad"), load_tokenizer("smollm2")
    with draft_of(out, overwrite=False) as draft:
        for split in SPLITS:
            examples = read_jsonl(folder / f"{split}.jsonl")
            inputs, targets = (map(len, tokenizer.encode_batch([e[key] for e in examples])) for key in ("input", "target"))
            rows = [json.dumps(e) + "\n" for e, i, t in zip(examples, inputs, targets) if i <= CANVAS[0] and t < CANVAS[1]]
            if rows:  # of SQuAD's validation articles none is so short
                (draft / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
        meta |= {"name": out.name, "input_len": CANVAS[0], "target_len": CANVAS[1]}
        (draft / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
