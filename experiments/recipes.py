"""The paper's recipe beside DiffusionGemma's, ingredient by ingredient: cells of `reproduce.py --what=recipes`, recipes_real.

docs/paper.md compares the two. Rows are flags of fine-tuning, columns a task and a way to decode; one answer at a time.
"""
from functools import partial

from experiments import real

RECIPES = {  # row -> flags of train_diff.py, beside the paper's
    "the paper's": {}, "one pass": {"n_unroll": 1}, "+ self-conditioning": {"self_condition": 0.5},
    "+ AR loss": {"ar_weight": 1.0}, "+ causal inputs": {"inputs_attention": "causal"},
    "+ all three": {"self_condition": 0.5, "ar_weight": 1.0, "inputs_attention": "causal"},
    "DiffusionGemma's": {"n_unroll": 1, "self_condition": 0.5, "ar_weight": 1.0, "inputs_attention": "causal"}}
FEW = {"10 steps": {"n_samples": 1}, "entropy, cool": {"decoder": "entropy", "temperature": 0.4, "last_temperature": 0.2}}
QUICK = {"n_examples": 60, "dtype": "bfloat16"}  # of SmolLM2: `entropy` writes an answer in four seconds
MANY = FEW | {"10 steps x 8 samples": {}, "entropy": {"decoder": "entropy"}}


def compared(lab, name, task, tune, whole=False, **shared):
    """Cells of all recipes, at equal steps and at equal FLOPs; tune(**flags) is a fine-tuning. whole: at more steps, too."""
    steps, work = tune().flag("steps"), tune().work
    for row, flags in RECIPES.items():
        equal = round(steps * work / tune(**flags).work)
        for label, n in ((row, steps), *[(f"{row}, equal FLOPs", equal)] * (abs(equal / steps - 1) > 0.05),
                         *[(f"{row}, 4 x steps", 4 * steps)] * (whole and row == "+ AR loss")):
            for way, options in (MANY if whole and n == steps else FEW).items():
                yield lab.cell(label, task, tune(**flags, steps=n), f"{name}, {way}", batch_size=1, **shared, **options)


def cells(lab, seed):
    """The paper's recipe, DiffusionGemma's ingredients alone and together, from AR weights: of text, or of plan itself."""
    for task in [task for task in ("code", "plan", "qa") if task in lab.scale.tasks] or lab.tasks:
        steps, tune = lab.scale.tasks[task][1], partial(lab.tune, task, seed, **{"batch_size": 16} if task == "plan" else {})
        ar = tune(script="train_ar.py", steps=2 * steps) if task == "plan" else lab.pretrain("train_ar.py", seed)
        yield lab.cell("AR", task, ar if task == "plan" else tune(ar, "train_ar.py"), f"{task}, greedy", batch_size=1)
        if task == "code":  # does diffusion come nearer where both learn for longer?
            yield lab.cell("AR, 4 x steps", task, tune(ar, "train_ar.py", 4 * steps), f"{task}, greedy", batch_size=1)
        yield from compared(lab, task, task, partial(tune, ar), whole=task == "code")


def real_cells(lab, seed):
    """The recipes from SmolLM2, shifted in all rows, 480 examples; and captions from AR weights of one's own."""
    own = dict(canvas=(48, 64), steps=1200, lr=lab.scale.lrs[2], origin=lab.pretrain("train_ar.py", seed), too_long="drop")
    smollm2 = {f"{task}_smollm2": (task, dict(canvas=real.TASKS[task][1], steps=60, lr=3e-4, init_from="smollm2"))
               for task in (real.SHORT, real.CODE, "plan_line", "en_fr_short")}
    for name, (task, flags) in ({"captions": ("en_fr", own)} | smollm2).items():
        tune, shared = partial(lab.stage, data=task, seed=seed, **flags), QUICK if "init_from" in flags else {}
        yield lab.cell("AR", task, tune("train_ar.py"), f"{name}, greedy", batch_size=1, **shared)
        yield from compared(lab, name, task, partial(tune, "train_diff.py", inputs_attention="bidirectional"), **shared)
