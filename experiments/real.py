"""A real language model turned into a diffusion model: the cells of `reproduce.py --what=real`, and their data.

SmolLM2-135M, in batches of 8; columns count the examples of fine-tuning. METHODS of the rows are flags of train_diff.py.
"""
from data import prepare
from data.dataset import read_meta
from data.folder import draft_of
from data.tasks import SPLITS, read_jsonl, write_jsonl
from data.tokenizer import load_tokenizer
from engine.files import write_json

SHORT, CODE, TEXT = "squad_short", "code_line", "text_smollm2"
TASKS = {  # name -> (what it is made of, canvas in SmolLM2's tokens, steps, n_draws)
    SHORT: ("squad", (80, 12), 60, 4), "squad_whole": ("squad", (384, 24), 60, 4), "en_fr": ("multi30k", (32, 48), 120, 4),
    "en_de": ("multi30k_de", (32, 48), 120, 4), CODE: ("code", (24, 32), 240, 1),
    "plan_line": ("plan", (27, 8), 60, 1), "en_fr_short": ("multi30k", (16, 24), 60, 1)}  # of the recipes alone
SOURCES = {  # prepared folder -> words for data/prepare.py that make it
    "squad": "squad", "multi30k": "multi30k", "multi30k_de": "multi30k --langs=en-de --out=data/prepared/multi30k_de"}
METHODS = {  # row -> flags of its fine-tuning
    "AR": {},
    "uniform, shift": {"inputs_attention": "causal", "shift": "true"},
    "absorbing, shift": {"inputs_attention": "causal", "shift": "true", "process": "absorbing"},
    "uniform, shift, two draws": {"inputs_attention": "causal", "shift": "true", "n_draws": 2},
    "uniform": {"inputs_attention": "causal", "shift": "false"},
    "absorbing": {"inputs_attention": "causal", "shift": "false", "process": "absorbing"},
    "uniform, the paper's": {"inputs_attention": "bidirectional", "shift": "false"}}
KNOBS = {  # of "absorbing, shift", one at a time -> flags
    "bidirectional inputs": {"inputs_attention": "bidirectional"}, "one draw": {"n_draws": 1}, "AR loss": {"ar_weight": 0.5},
    "rate 1e-4": {"lr": 1e-4}, "rate 1e-3": {"lr": 1e-3}, "warm-up 30": {"warmup": 30}}
DECODING = {"AR": {}, "AR, 8 guesses": {"n_samples": 8, "temperature": 0.7}, "uniform": {"n_samples": 4},
            "absorbing": {"decoder": "confidence", "block_len": 1, "temperature": 0.0, "n_samples": 1}}
MAIN = ("AR", "uniform, shift, two draws", "absorbing, shift")


def cells(lab, seed):
    """SmolLM2-135M turned by few steps on real tasks, beside fresh weights; one seed but on short questions and code."""
    def cell(task, row, steps=None, name=None, middle=False, lr=3e-4, origin=None, **more):
        _, canvas, usual, n_draws = TASKS[task]
        trainer, flags = ("train_ar.py", {}) if row == "AR" else ("train_diff.py", {"n_draws": n_draws})
        start, steps = {} if origin or "size" in more else {"init_from": "smollm2"}, steps or usual
        stage = lab.stage(trainer, task, canvas, steps, lr, seed, origin, **start, **flags | METHODS[row] | more)
        column, row = f"{task}{', middle' * middle} {lab.scale.batch * steps}", name or row
        decoding = DECODING.get(row, DECODING[row.split(",")[0]]) | ({"middle": "true"} if middle else {})
        return lab.cell(row, task, stage, column, **decoding)

    yield from (cell(SHORT, row) for row in METHODS)
    for row in MAIN:
        yield cell(SHORT, row, name=f"{row}, from scratch", lr=1e-3, size="30x576x9", tokenizer="smollm2")
        for N in (10, 40) if METHODS[row] else ():
            text = lab.stage("train_diff.py", TEXT, (64, 32), N, 1e-4, seed, init_from="smollm2", **METHODS[row])
            yield cell(SHORT, row, name=f"{row}, AR2Diff_{N}", origin=text)
    for row, name in (("AR", None), ("AR", "AR, 8 guesses"), ("absorbing, shift", None)):
        yield cell(CODE, row, name=name, middle=True)
    if seed == 0:
        yield from (cell(SHORT, "absorbing, shift", name=f"absorbing, shift, {name}", **flags) for name, flags in KNOBS.items())
        yield from (cell(SHORT, row, steps) for steps in (20, 140) for row in MAIN)
        yield from (cell(task, row) for task in ("squad_whole", "en_fr", "en_de", CODE) for row in MAIN)
        yield cell("en_fr", "absorbing, shift", name="absorbing, shift, one draw", **KNOBS["one draw"])
        yield from (cell("squad_whole", row, steps) for row, steps in (("AR", 180), ("AR", 480), ("absorbing, shift", 180)))


def write_data(lab):
    """Write the tasks as the lab's, with those of their examples that fit, and the text that SmolLM2 goes on with."""
    tokenizer = load_tokenizer("smollm2")
    for out, *words in ((TEXT, "text", "--tokenizer=smollm2"), ("code", "code"), ("plan", "plan")):
        if not (lab.folder / out).exists():
            prepare.main([*words, f"--out={lab.folder / out}"])
    for task, (source, canvas, *_) in TASKS.items():
        if not (lab.folder / task).exists():
            folder, meta = read_meta(source if source in SOURCES else lab.folder / source)
            with draft_of(lab.folder / task, overwrite=False) as draft:
                for split in SPLITS:
                    examples = read_jsonl(folder / f"{split}.jsonl")
                    encoded = (tokenizer.encode_batch([e[key] for e in examples]) for key in ("input", "target"))
                    rows = [e for e, i, t in zip(examples, *encoded) if len(i) <= canvas[0] and len(t) < canvas[1]]
                    if rows:  # of SQuAD's validation articles none is so short
                        write_jsonl(draft / f"{split}.jsonl", rows)
                write_json(draft / "meta.json", meta | {"name": task, "input_len": canvas[0], "target_len": canvas[1]}, "out")
