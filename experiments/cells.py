"""Stages of training and cells of tables: what each costs, where it is kept, and how all of them are run, none twice.

A stage is a training run, a cell an evaluation of one. Both are known by a hash of their flags, of their data's content and of
all that they start from, so what several rows start from is trained once. A run that was stopped goes on from its last
checkpoint. Several processes may fill a store at once. When one is killed, its runs go on to their end, and are kept.
"""
import hashlib
import io
import json
import multiprocessing
import shlex
import shutil
import sys
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from engine.checkpoint import commit, read_checkpoint, save_checkpoint
from engine.cli import UserError, check
from engine.devices import n_cores, pick_device
from engine.files import NUMBER, OBJECT, TEXT, content_hash, read_json, write_new
from engine.run_log import fcntl  # None on Windows: one process at a time, and what is killed must be gone
from start import shape_of

ROOT = Path(__file__).resolve().parent.parent
MATTERS = ("*.py", "beyond/*.py", "data/*.py", "data/words.json", "engine/*.py", "pretrained/*.py", "scoring/*.py")
OTHERS = ("demo.py", "nano.py", "reproduce.py")  # that no number depends on
TRAINED = {"code": TEXT, "work": NUMBER, "seconds": NUMBER}  # what is kept of a stage
MEASURED = {"code": TEXT, "work": NUMBER, "result": OBJECT}  # and of a cell


class Stage(NamedTuple):
    script: str  # train_ar.py or train_diff.py
    data: str  # a prepared folder
    flags: tuple  # (name, value) pairs; steps, batch_size, input_len, target_len and size among them
    origin: "Stage | None" = None  # what it starts from

    def flag(self, name, default=None):
        return dict(self.flags).get(name, default)

    @property
    def key(self):
        return digest([self.script, content(self.data), sorted(self.flags), self.origin and self.origin.key])

    @property
    def shape(self):
        """Of the model, as flops() has it: what the first stage says of it, or SmolLM2-135M's."""
        flag = self.lineage[0].flag
        n_layer, width, _ = shape_of(flag("size", "30x576x9"))
        vocab_size = 49_280 if flag("tokenizer", flag("init_from")) else 4096  # about
        return dict(n_layer=n_layer, width=width, vocab_size=vocab_size, architecture=flag("architecture", "decoder-only"))

    @property
    def work(self):
        """FLOPs of this stage, without those of its origin: three times those of its forward passes."""
        uniform = self.script == "train_diff.py" and self.flag("process", "uniform") == "uniform"
        n, ar, told = self.flag("n_draws", 1), self.flag("ar_weight", 0) > 0, uniform and self.flag("self_condition", 0) > 0
        unroll, T, C = self.flag("n_unroll", 2) if uniform else 1, self.flag("target_len"), self.shape["width"]
        passes = n * (unroll + told * (unroll == 1) / 3) + ar  # one that only tells has no gradient, nor has a belief
        believing = told * n * 2 * C * (self.shape["vocab_size"] / 3 + 3 * C)  # for a token
        reads = 1 + (ar and self.flag("inputs_attention", "bidirectional") != "causal")  # AR's inputs see no later ones
        forward = flops(self.shape, reads * self.flag("input_len"), passes * T) + believing * T
        return 3 * forward * self.flag("batch_size") * self.flag("steps")

    @property
    def lineage(self):
        """The stages that lead here, the first one first."""
        return (*(self.origin.lineage if self.origin else ()), self)


class Cell(NamedTuple):
    row: str
    column: str
    seed: int
    stage: Stage
    flags: tuple = ()  # of eval.py

    @property
    def key(self):
        return digest([self.stage.key, sorted(self.flags)])

    @property
    def work(self):
        """FLOPs of the evaluation."""
        flags = dict(self.flags)
        rounds = 1 if self.stage.script == "train_ar.py" else flags.get("n_steps", 10) * flags.get("n_samples", 8)
        return flags["n_examples"] * flops(self.stage.shape, 0, rounds * self.stage.flag("target_len"))


def flops(shape, n_inputs, n_targets):
    """Return the FLOPs of a forward pass: 2 per weight and token. Attention scores, a few %, are left out."""
    per_layer = 14 if shape["architecture"] == "encoder-decoder" else 12  # half of cross-attention is paid by either side
    backbone = per_layer * shape["n_layer"] * shape["width"] ** 2
    return 2 * (n_inputs + n_targets) * backbone + 2 * n_targets * shape["vocab_size"] * shape["width"]


def digest(facts):
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


@cache
def content(folder):
    """Return a hash of what a data folder holds, its path left out; of one that is not made yet its name."""
    files = [path for path in Path(folder).glob("*") if path.suffix in (".json", ".jsonl", ".bin")]
    return content_hash(files) if files else str(folder)


def code_version():
    """Return a hash of what a number depends on but its cell: this code, torch, the kind of device."""
    files = {path for pattern in MATTERS for path in ROOT.glob(pattern)} - {ROOT / name for name in OTHERS}
    return digest([content_hash(files), torch.__version__, pick_device("auto").type])


def known(path, schema):
    """Return the dict in a JSON file, None where there is no file. Raises UserError where it is damaged."""
    return read_json(path, schema, "; delete it, and it is made again") if path.exists() else None


class Store:
    """A folder of runs, stages/KEY (or stages/NAME, by names {key: name}), and of results, cells/KEY.json."""

    def __init__(self, folder, names=None):
        self.folder, self.cells, self.stages = Path(folder), Path(folder, "cells"), Path(folder, "stages")
        self.code, self.names = code_version(), names or {}

    def place(self, job):
        """Return the folder of a stage, or the file of a cell."""
        return self.cells / f"{job.key}.json" if isinstance(job, Cell) else self.stages / self.names.get(job.key, job.key)

    def done(self, job):
        """Return what is known of a stage that was trained, or of a cell that was measured; None if it was not."""
        place = self.place(job)
        found = known(place, MEASURED) if isinstance(job, Cell) else known(place / "done.json", TRAINED)
        return found if found and found.get("key", job.key) == job.key else None  # else another one has had its name

    def missing(self, cells):
        """Return (stages, cells) that are yet to be run; stages in order, each behind what it starts from."""
        open_cells = list({cell.key: cell for cell in cells if not self.done(cell)}.values())
        stages = dict.fromkeys(stage for cell in open_cells for stage in cell.stage.lineage)
        return [stage for stage in stages if not self.done(stage)], open_cells

    def refuse_other_code(self, cells, refresh):
        """Raise UserError where one of the cells, or a stage of theirs, is of other code; with refresh delete those."""
        there = {self.place(job): self.done(job) for cell in cells for job in (*cell.stage.lineage, cell)}
        old = [path for path, facts in there.items() if facts and facts["code"] != self.code]
        check(not old or refresh, f"{self.folder} holds numbers of another version of the code, torch or device (this is "
                                  f"{self.code}); keep them by another --out, or measure them again with --refresh")
        for path in old:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def rate(self):
        """Return the FLOPs per second and core of the stages that were timed here, 2e10 before one was."""
        timed = [known(path, TRAINED) for path in self.stages.glob("*/done.json")]
        return sum(t["work"] for t in timed) / sum(t["seconds"] for t in timed) if timed else 2e10

    def keep(self, path, **facts):
        """Write what is known of a job. Raises UserError if the code was edited since the start: what ran may be either."""
        check(code_version() == self.code, "the code was edited while cells were run; start again")
        write_new(path, json.dumps({"code": self.code, **facts}, indent=1) + "\n", "out")

    def command(self, job):
        """Return (script, *words) of a stage or a cell."""
        if isinstance(job, Cell):
            return "eval.py", str(self.place(job.stage)), *(f"--{name}={value}" for name, value in job.flags)
        origin = [f"--init_from={self.place(job.origin)}"] if job.origin else []
        flags = (f"--{name}={value}" for name, value in job.flags)
        return job.script, f"--data={job.data}", *flags, *origin, f"--out_dir={self.place(job)}"

    def do(self, job):
        """Train a stage or measure a cell; return the FLOPs, 0 if it was done."""
        with alone(self.place(job).with_suffix(".lock")):
            if self.done(job):  # perhaps while this one waited
                return 0
            (self.measure if isinstance(job, Cell) else self.train)(job)
        return job.work

    def train(self, stage):
        """Run a stage, or the rest of one."""
        folder, mine = self.place(stage), json.dumps({"code": self.code, "key": stage.key})
        started = folder / "started.json"
        if started.exists() and started.read_text() != mine:  # what was stopped is of other code, or of another stage
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        write_new(started, mine, "out")
        step, start = read_checkpoint(folder / "ckpt.pt")["step"] if (folder / "ckpt.pt").exists() else 0, time.time()
        if step < stage.flag("steps"):
            call(*self.command(stage), *["--resume"] * (step > 0))
        (folder / "best.pt").unlink(missing_ok=True)
        save_checkpoint(folder / "ckpt.pt", read_checkpoint(folder / "ckpt.pt") | {"optimizer": None})  # of no use any more
        work, seconds = stage.work * (1 - step / stage.flag("steps")), time.time() - start
        self.keep(folder / "done.json", key=stage.key, work=work, seconds=seconds)

    def measure(self, cell):
        result, = call(*self.command(cell))
        parts = [(stage.work, self.done(stage)) for stage in cell.stage.lineage]  # of one that was resumed, its last part
        self.keep(self.place(cell), commit=commit(), work=sum(work for work, _ in parts), result=result,
                  training_seconds=sum(work * part["seconds"] / (part["work"] or float("nan")) for work, part in parts))

    def run(self, cells, show=False):
        """Run what is missing: on a CPU one cell a core, on a GPU one after the other. Raises UserError where one fails."""
        stages, open_cells = self.missing(cells)
        sizes = [2 * flops(stage.shape, 0, 1) for stage in stages]  # bytes of weights; a run takes six times that until its end
        free, needed = shutil.disk_usage(self.folder).free, sum(sizes) + 6 * n_cores() * max(sizes, default=0)
        check(free > needed, f"{self.folder} needs about {needed / 1e9:.1f} GB more, its disk has {free / 1e9:.1f} GB free")
        total = sum(job.work for job in [*stages, *open_cells])
        n_jobs = n_cores() if pick_device("auto").type == "cpu" and fcntl else 1

        def finish(cell):
            for job in (*(stage for stage in cell.stage.lineage if not self.done(stage)), cell):
                if show:
                    bar.write(f"{cell.row:20s} $ python {shlex.join(self.command(job))}")
                    sys.stdout.flush()
                bar.update(apart(self.do, job))
        with tqdm(total=total, unit="FLOP", unit_scale=True, disable=None) as bar, ThreadPoolExecutor(n_jobs) as pool:
            list(pool.map(finish, open_cells))  # where one fails, map() cancels those that have not begun


@contextmanager
def alone(path):
    """Wait until no other process works on what `path` stands for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as lock:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def apart(function, *args):
    """Return what a function returns in a process of its own, which goes on if this one is killed; UserError if it dies."""
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")  # macOS's Metal wants no fork
    context.set_forkserver_preload(["torch", "torch._dynamo", "sacrebleu"])  # imported once, not for every cell
    try:
        with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
            return pool.submit(function, *args).result()
    except BrokenExecutor as error:
        raise UserError("a process ended without a word; was it killed, for want of memory?") from error


def call(script, *words):
    """Return what a script's main() returns, unseen. Raises UserError with the command if it fails."""
    torch.set_num_threads(1)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return import_module(script.removesuffix(".py")).main(list(words))
    except (UserError, SystemExit) as error:  # the latter of a run that was stopped
        raise UserError(f"python {shlex.join([script, *words])}: {error}") from error
