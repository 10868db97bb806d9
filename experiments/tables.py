"""The paper's tables and figures as cells: what is trained, what is measured, at which scale.

The situation is the one that transfer learning is for: plenty of text, few steps on a task. `text` holds standard library docs,
Python source, and unpaired sentences: inputs of some training examples and targets of others.
"""
import sys
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from beyond.decoders import DECODERS
from data import prepare, synthetic
from data.dataset import find_folder, read_meta
from engine.cli import check
from engine.files import content_hash
from experiments import real, recipes
from experiments.cells import ROOT, Cell, Stage, alone, digest


class Scale(NamedTuple):
    seeds: int
    sizes: tuple  # of Table 2; the others take the last
    pretrain: int  # AR steps on text
    batch: int
    n_examples: int
    tasks: dict  # name -> (training examples, fine-tuning steps); 0 = the data as it was prepared by the user
    canvas: tuple  # input and target columns of text
    lrs: tuple = (2e-3, 3e-4, 3e-3)  # peak learning rates of pretraining, stage 2, fine-tuning
    draws: int = 4  # noise levels of a bound


EMBEDDED = {"translate": (300, 450), "qa": (20_000, 500), "code": (20_000, 1200), "plan": (20_000, 1200)}
REAL = {"multi30k": (0, 4000), "squad": (0, 4000), "mbpp": (0, 1000)}
SCALES = {
    "demo": Scale(1, ("3x96x3",), 1200, 8, 200, {"translate": (300, 500)}, (20, 20)),
    "cpu": Scale(3, ("2x64x2", "3x96x3"), 1000, 8, 100, EMBEDDED, (32, 32)),
    "gpu": Scale(3, ("mini", "base"), 20_000, 64, 500, REAL, (128, 128), (1e-3, 3e-4, 1e-3), 32),
    "paper": Scale(1, ("base", "large", "xl"), 1_000_000, 128, 1000,  # sizes, steps and batch of arXiv 2401.17181, section 4.2
                   {"wmt14": (0, 500_000), "squad": (0, 250_000), "mbpp": (0, 5_000)}, (512, 512), (1e-3, 1e-3, 1e-3), 32),
}
DEFAULTS = {"process": "uniform", "objective": "prefix", "architecture": "decoder-only", "shift": "false"}
CODE = ("code", "mbpp", real.CODE)
PAPER_TASKS = 3  # the first three of a scale's tasks are those of the paper's tables


def unpaired(task, n_pairs, folder, n=8000):
    """Write the inputs of n training examples behind the first n_pairs, and the targets of n others; yield both paths."""
    for i, part in enumerate(("input", "target")):
        path = Path(folder, f"{task}_{part}s.txt")
        lines = [synthetic.example(task, 0, "train", n_pairs + i * n + k)[part] for k in range(n)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        yield path


class Lab:
    """Builds the cells of a scale; its data lies in `folder`."""

    def __init__(self, scale, folder):
        self.scale = scale
        made_by = content_hash([*ROOT.glob("data/*.py"), ROOT / "data/words.json"])
        self.folder = Path(folder, "data", digest([made_by, self.scale.tasks, sys.version_info[:2]]))  # other code, other data
        self.tasks = list(self.scale.tasks)[:PAPER_TASKS]
        self.size = self.scale.sizes[-1]

    def prepare(self, names=()):
        """Write the data that can be made here, for those tables. Raises UserError for a folder that cannot."""
        prepared = {task: f"{task} --from_dir=FOLDER" for task, (n, _) in self.scale.tasks.items() if not n}
        for task, words in (prepared | (real.SOURCES if any("real" in name for name in names) else {})).items():
            check(find_folder(task), f"no data/prepared/{task}; python data/prepare.py {words} makes it")
        with alone(self.folder.with_suffix(".lock")):
            for task, (n, _) in self.scale.tasks.items():
                if n and not (self.folder / task).exists():
                    prepare.main([task, f"--n_train={n}", f"--out={self.folder / task}"])
            if not (self.folder / "text").exists():
                paths = [path for task, (n, _) in self.scale.tasks.items() if n for path in unpaired(task, n, self.folder)]
                sources = ["stdlib:docs:2", "stdlib:code:2", *(f"{path}:{2 / len(self.scale.tasks)}" for path in paths)]
                prepare.main(["text", f"--sources={','.join(sources)}", f"--out={self.folder / 'text'}"])
            if any("real" in name for name in names):
                real.write_data(self)

    def data(self, name):
        made = name in ("text", real.TEXT, *real.TASKS) or self.scale.tasks[name][0]
        return str(self.folder / name if made else find_folder(name) or name)

    def canvas(self, task):
        meta = synthetic.META[task] if self.scale.tasks[task][0] else read_meta(task)[1] if find_folder(task) else {}
        return meta.get("input_len", 512), meta.get("target_len", 256)

    def stage(self, script, data, canvas, steps, lr, seed, origin=None, size=None, **flags):
        outside = "init_from" in flags  # of a published model, whose defaults are others
        flags = {name: value for name, value in flags.items() if outside or DEFAULTS.get(name) != value}  # one run, one key
        often = {"batch_size": self.scale.batch, "input_len": canvas[0], "target_len": canvas[1], "lr": lr, "seed": seed,
                 "steps": steps, "warmup": min(50, max(1, steps // 5)), "log_every": 100, "eval_every": 1000,
                 "eval_sequences": 64, **flags}
        if origin is None and not outside:
            often["size"] = size or self.size
        return Stage(script, self.data(data), tuple(sorted(often.items())), origin)

    def pretrain(self, script, seed, share=1.0, origin=None, lr=None, **flags):
        """Return a run on text for a share of the AR steps."""
        steps = max(2, round(share * self.scale.pretrain))
        return self.stage(script, "text", self.scale.canvas, steps, lr or self.scale.lrs[0], seed, origin, **flags)

    def equal_flops(self, size):
        """Return the share of steps for which diffusion on text costs what AR does."""
        return self.pretrain("train_ar.py", 0, size=size).work / self.pretrain("train_diff.py", 0, size=size).work

    def tune(self, task, seed, origin=None, script="train_diff.py", steps=None, lr=None, **flags):
        return self.stage(script, task, self.canvas(task), steps or self.scale.tasks[task][1], lr or self.scale.lrs[2], seed,
                          origin, **({"too_long": "drop"} if not self.scale.tasks[task][0] else {}), **flags)

    def adapt(self, ar, seed, share, lr=None, **flags):
        """Return what fine-tuning starts from: AR2Diff_N with N a share of the AR steps."""
        return self.pretrain("train_diff.py", seed, share, ar, lr or self.scale.lrs[1], **flags) if share else ar

    def cell(self, row, task, stage, column=None, **flags):
        flags = {"n_examples": self.scale.n_examples, **({"allow_code_execution": "true"} if task in CODE else {}), **flags}
        return Cell(row, column or task, stage.flag("seed"), stage, tuple(sorted(flags.items())))


SHARES = {"0": 0, "1 %": 0.01, "10 %": 0.1}


def table2(lab, seed):
    """AR, diffusion and AR2Diff_N on every task and size; at the largest size with --shift, too."""
    for size in reversed(lab.scale.sizes):
        ar = lab.pretrain("train_ar.py", seed, size=size)
        same, equal = (lab.pretrain("train_diff.py", seed, share, size=size) for share in (1, lab.equal_flops(size)))
        for task in lab.tasks:
            column = f"{task} {size}"
            yield lab.cell("AR", task, lab.tune(task, seed, ar, "train_ar.py"), column)
            yield lab.cell("Diffusion, no text", task, lab.tune(task, seed, size=size), column)
            yield lab.cell("Diffusion, equal FLOPs", task, lab.tune(task, seed, equal), column)
            yield lab.cell("Diffusion, equal steps", task, lab.tune(task, seed, same), column)
            for name, share in SHARES.items():
                yield lab.cell(f"AR2Diff_{name}", task, lab.tune(task, seed, lab.adapt(ar, seed, share)), column)
            for name, share in SHARES.items() if size == lab.size else ():
                origin = lab.adapt(ar, seed, share, shift="true")
                yield lab.cell(f"AR2Diff_{name}, shift", task, lab.tune(task, seed, origin, shift="true"), column)


def table1(lab, seed):
    """Architecture x pretraining objective, all of it diffusion."""
    for architecture in ("decoder-only", "encoder-decoder"):
        for objective in ("prefix", "span"):
            share = lab.equal_flops(lab.size)
            origin = lab.pretrain("train_diff.py", seed, share, objective=objective, architecture=architecture)
            for task in lab.tasks:
                yield lab.cell(f"{architecture}, {objective}", task, lab.tune(task, seed, origin))


def table3(lab, seed):
    """Decoding steps x samples of AR2Diff_10 %."""
    adapted = lab.adapt(lab.pretrain("train_ar.py", seed), seed, 0.1)
    for task in lab.tasks:
        tuned = lab.tune(task, seed, adapted)
        for n_steps in (5, 10, 20):
            for n_samples in (1, 4, 8):
                yield lab.cell(f"{n_steps} steps x {n_samples}", task, tuned, n_steps=n_steps, n_samples=n_samples)


def infill(lab, seed):
    """The middle third of a target, both sides given; AR sees the left one, and the right one only by guessing eight times."""
    ar = lab.pretrain("train_ar.py", seed)
    for task in dict.fromkeys((lab.tasks[0], lab.tasks[-1])):
        tuned = lab.tune(task, seed, ar, "train_ar.py")
        for row, stage, flags in (("AR", tuned, {}), ("AR, 8 guesses", tuned, {"n_samples": 8, "temperature": 0.7}),
                                  ("Diffusion, no text", lab.tune(task, seed), {}),
                                  ("AR2Diff_0", lab.tune(task, seed, ar), {}),
                                  ("AR2Diff_10 %", lab.tune(task, seed, lab.adapt(ar, seed, 0.1)), {})):
            yield lab.cell(row, task, stage, middle="true", **flags)


def curves(lab, seed):
    """Score against fine-tuning steps: how many steps do AR weights save, and where do they cost some?"""
    ar = lab.pretrain("train_ar.py", seed)
    for task in lab.tasks:
        for factor in (1 / 6, 0.5, 1, 4 / 3) if task in CODE else (0.5, 1, 2, 4):
            steps = round(factor * lab.scale.tasks[task][1])
            yield lab.cell("Diffusion, no text", task, lab.tune(task, seed, steps=steps), f"{task} {steps}")
            for name, share in {"0": 0, "10 %": 0.1, "100 %": 1.0}.items() if factor == 1 else (("0", 0),):
                origin = lab.adapt(ar, seed, share)
                yield lab.cell(f"AR2Diff_{name}", task, lab.tune(task, seed, origin, steps=steps), f"{task} {steps}")


def rates(lab, seed):
    """Peak learning rates of fine-tuning and of stage 2, a third and three times those of the other tables."""
    first, last, (_, stage2, tuning) = lab.tasks[0], lab.tasks[-1], lab.scale.lrs
    ar = lab.pretrain("train_ar.py", seed)
    for task, factor in ((first, 1 / 3), (first, 1), (first, 3), (last, 1), (last, 3)):
        lr = float(f"{factor * tuning:.3g}")
        column = f"{task}, tuned at {lr:g}"
        yield lab.cell("AR", task, lab.tune(task, seed, ar, "train_ar.py", lr=lr), column)
        yield lab.cell("AR2Diff_0", task, lab.tune(task, seed, ar, lr=lr), column)
        yield lab.cell("Diffusion, no text", task, lab.tune(task, seed, lr=lr), column)
    for factor in (1 / 3, 1, 3):
        lr = float(f"{factor * stage2:.3g}")
        adapted = lab.tune(first, seed, lab.adapt(ar, seed, 0.1, lr))
        yield lab.cell("AR2Diff_10 %", first, adapted, f"{first}, stage 2 at {lr:g}")


KNOBS = {"plain": {}, "shift": {"shift": "true"}, "causal inputs": {"inputs_attention": "causal"},
         "full": {"inputs_attention": "full"}, "AR loss": {"ar_weight": 0.5}}


def knobs(lab, seed):
    """Each option of the transfer alone, in the fine-tuning of AR2Diff_0, with two processes."""
    ar = lab.pretrain("train_ar.py", seed)
    code = {name: KNOBS[name] for name in ("plain", "shift", "AR loss") if name in KNOBS}  # a run takes minutes there
    for task, process, options in ((lab.tasks[0], "uniform", KNOBS), (lab.tasks[0], "absorbing", KNOBS),
                                   (lab.tasks[-1], "uniform", code)):
        column = f"{task}, {process}"
        yield lab.cell("from scratch", task, lab.tune(task, seed, process=process), column)
        for name, flags in options.items():
            yield lab.cell(name, task, lab.tune(task, seed, ar, process=process, **flags), column)


def plan(lab, seed):
    """Path-star graphs: what AR weights carry, and where they stand."""
    steps = lab.scale.tasks["plan"][1]
    ar = lab.tune("plan", seed, script="train_ar.py", steps=2 * steps, batch_size=16)
    yield lab.cell("AR", "plan", ar)
    for process in ("uniform", "absorbing"):
        column, flags = f"plan, {process}", {"process": process, "batch_size": 16}
        yield lab.cell("from scratch", "plan", lab.tune("plan", seed, **flags), column)  # no shift: they stand in no slot yet
        yield lab.cell("from AR", "plan", lab.tune("plan", seed, ar, **flags), column)
        yield lab.cell("from AR, shift", "plan", lab.tune("plan", seed, ar, shift="true", **flags), column)


def bits(lab, seed):
    """Bits per byte of text: exact for AR, upper bounds for the others, equal steps."""
    for name in ("AR", "absorbing", "uniform", "gaussian"):
        stage = lab.pretrain("train_ar.py", seed) if name == "AR" else lab.pretrain("train_diff.py", seed, process=name)
        yield Cell(name, "text", seed, stage, (("metric", "bits"), ("n_draws", lab.scale.draws), ("n_examples", 128)))


def decoders(lab, seed):
    """Every decoder in few and many steps, one sample each, on the last of the tasks: code needs them most."""
    task = lab.tasks[-1]
    for process in ("uniform", "absorbing"):
        steps = lab.scale.tasks[task][1] * (1 if process == "uniform" else 2)  # of one pass, not two
        stage = lab.tune(task, seed, steps=steps, process=process)
        for decoder in DECODERS[process]:
            for n in (2, 8, 32):
                yield lab.cell(f"{process}, {decoder}", task, stage, f"{task} {n}", decoder=decoder, n_steps=n, n_samples=1)


TABLES = {  # name -> (cells of a seed, the row that others are compared with)
    "table2": (table2, "Diffusion, equal FLOPs"), "table3": (table3, "10 steps x 8"),
    "table1": (table1, "decoder-only, prefix"), "curves": (curves, "Diffusion, no text"), "rates": (rates, "AR2Diff_0"),
    "knobs": (knobs, "plain"), "plan": (plan, "from scratch"), "infill": (infill, "AR"), "bits": (bits, "AR"),
    "decoders": (decoders, "uniform, resample"), "recipes": (recipes.cells, "the paper's"), "real": (real.cells, "AR"),
    "recipes_real": (recipes.real_cells, "the paper's"),
}


def all_cells(name, lab):
    """Return the cells of a table, seeds in turn: neighbours, which run side by side, wait for no common stage."""
    seeds = [TABLES[name][0](lab, seed) for seed in range(lab.scale.seeds)]
    return [cell for cells in zip_longest(*seeds) for cell in cells if cell]
