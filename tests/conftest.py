"""Tiny data and tiny runs that several test files share, all made by the project's own scripts in this process."""
import json
import random

import pytest
import torch

import train_ar
import train_diff
from checkpoint import load_checkpoint
from data import prepare

torch.set_num_threads(1)  # a second thread only slows tiny matrices down
SCRIPTS = {"ar": train_ar, "diff": train_diff}
FLAGS = ["--tokenizer=bytes", "--size=2x16x2", "--batch_size=8", "--steps=4", "--warmup=2", "--log_every=1",
         "--eval_sequences=6"]


class Run:
    """What a training run left behind."""

    def __init__(self, folder):
        self.folder, self.path = folder, folder / "ckpt.pt"

    def log(self):
        """Return the lines of metrics.jsonl without what a clock measured."""
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "seconds_per_step"} for line in lines]

    def checkpoint(self):
        return load_checkpoint(self.path)

    def files(self):
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """A task folder: a word of 1 to 6 letters -> the same word backwards."""
    folder, rng = tmp_path_factory.mktemp("data") / "backwards", random.Random(0)
    folder.mkdir()
    for split, n in (("train", 30), ("valid", 7), ("test", 5)):
        words = ["".join(rng.choices("abcd", k=rng.randint(1, 6))) for _ in range(n)]
        rows = [json.dumps({"input": word, "target": word[::-1]}) + "\n" for word in words]
        (folder / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    meta = {"kind": "task", "name": "backwards", "metric": "exact", "input_len": 8, "target_len": 7}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text folder of two sources, made by data/prepare.py."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(1)
    for name, letters in (("prose", "abcde \n"), ("code", "vwxyz \n")):
        (folder / f"{name}.txt").write_text("".join(rng.choices(letters, k=2000)), encoding="utf-8")
    sources = f"{folder}/prose.txt:0.8,{folder}/code.txt:0.2"
    prepare.main(["text", f"--sources={sources}", "--tokenizer=bytes", f"--out={folder}/text"])
    return folder / "text"


@pytest.fixture(scope="session")
def train(task):
    """train("ar" or "diff", out_dir, *flags) runs the script on the tiny task; later flags win."""
    def train(kind, out_dir, *flags):
        SCRIPTS[kind].main([f"--data={task}", f"--out_dir={out_dir}", *FLAGS, *flags])
        return Run(out_dir)
    return train


@pytest.fixture(scope="session")
def ar_run(train, tmp_path_factory):
    return train("ar", tmp_path_factory.mktemp("runs") / "ar")


@pytest.fixture(scope="session")
def diff_run(train, tmp_path_factory):
    return train("diff", tmp_path_factory.mktemp("runs") / "diff")
