"""What several test files share: mock models, and tiny data and runs made by the project's own scripts in this process."""
import json
import os
import random

import pytest
import torch
import torch.nn.functional as F

import train_ar
import train_diff
from data import prepare
from data.dataset import Batch
from engine.noise import Noise
from model import Transformer
from pretrained.loading import load_checkpoint

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
torch.set_num_threads(1)  # a second thread only slows tiny matrices down,
os.environ["OMP_NUM_THREADS"] = "1"  # also in the processes that tests start
SCRIPTS = {"ar": train_ar, "diff": train_diff}
FLAGS = ["--tokenizer=bytes", "--size=2x16x2", "--batch_size=8", "--steps=4", "--warmup=2", "--log_every=1",
         "--eval_sequences=6", "--device=cpu"]


def pytest_collection_modifyitems(items):
    slow = [item for item in items if item.get_closest_marker("slow")]
    quick = [item for item in items if not item.get_closest_marker("slow")]
    for item in slow:
        item.add_marker("no_cover")  # coverage makes the compiler half as fast, and 90 % is reached without these
    # Two processes begin with one half each, and end together if the long tests come first in each half.
    s, q = len(slow) // 2, len(quick) // 2
    items[:] = slow[:s] + quick[:q] + slow[s:] + quick[q:]


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
def encoder_decoder_run(train, tmp_path_factory):
    return train("ar", tmp_path_factory.mktemp("runs") / "encoder_decoder", "--architecture=encoder-decoder")


@pytest.fixture(scope="session")
def diff_run(train, tmp_path_factory):
    return train("diff", tmp_path_factory.mktemp("runs") / "diff")


# The least that is a checkpoint to its reader, if to nothing else.
CHECKPOINT = dict(
    model={"w": torch.ones(1)}, process={"name": "ar"}, tokenizer={"name": "", "hash": ""}, config={"data": ""}, data="",
    shape=dict(vocab_size=1, n_layer=1, width=1, n_head=1, architecture="", vector_width=0, self_condition=False),
    input_len=0, target_len=1, step=0, history=[], optimizer=None)


# ---- models and batches for the tests of the diffusion processes ----

V, S, T = 16, 4, 6
EOS, PAD, MASK = 9, 10, 11  # text is 0-8, uniform noise draws from 0-10, ids 11-15 stand for MASK, sentinels and unused ones


def width_of(process):
    """Return the width of the vectors that a model for this process must have, 0 where it reads tokens."""
    return getattr(process, "vector_width", 0)


def additions_of(process):
    """Return what a model for this process must have beside that of others, as arguments of tiny_model()."""
    return dict(vector_width=width_of(process), self_condition=process.name == "uniform" and process.self_condition > 0)


def tiny_model(seed=0, vector_width=0, vocab_size=V, self_condition=False):
    torch.manual_seed(seed)
    model = Transformer(vocab_size, n_layer=2, width=16, n_head=2, vector_width=vector_width,
                        self_condition=self_condition).eval()
    torch.nn.init.normal_(model.embedding.weight, std=0.05)  # logits far from zero: likely and unlikely tokens
    with torch.no_grad():
        for block in model.blocks:  # and more than an echo of the token that is fed
            block.attention_out.weight *= 20
            block.mlp_out.weight *= 10
    if self_condition:
        torch.nn.init.normal_(model.self_conditioning.out.weight)  # trained: what it is told matters
    return model


def ragged_batch(lengths=(4, 2, 0, 3), seed=0):
    rng = torch.Generator().manual_seed(seed)
    pad_mask = torch.arange(S)[None] < S - torch.tensor(lengths)[:, None]
    inputs, targets = (torch.randint(9, (len(lengths), n), generator=rng) for n in (S, T))
    return Batch(inputs.masked_fill(pad_mask, PAD), pad_mask, targets)


def targets_only(x0):
    """Return a batch without inputs."""
    return Batch(x0[:, :0], None, x0)


def row(batch, b):
    """Return row b alone, and without its padding."""
    n_pad = int(batch.pad_mask[b].sum())
    return Batch(batch.inputs[b:b + 1, n_pad:], None, batch.targets[b:b + 1])


def train_noise(batch, step=0):
    return Noise(0, "train", step, range(len(batch.targets)))


class Vectors:
    """Stands in for model.NoisyVectors: the vector of token i is the i-th unit vector. It keeps what it was given."""

    def __init__(self):
        self.table = torch.nn.Embedding.from_pretrained(torch.eye(V))
        self.x_hat, self.level = [], []

    def __call__(self, z, x_hat, level):
        self.x_hat.append(x_hat.clone())
        self.level.append(level.clone())
        return z


class Scripted:
    """A model without weights: logits(y) -> (B, T, V). It keeps what it was given, told and gave; the embedding of token i is
    the i-th unit vector, so that a belief is the probabilities themselves."""

    def __init__(self, logits):
        self.script, self.encoded, self.fed, self.told, self.given = logits, [], [], [], []
        self.noisy = Vectors()

    def encode(self, inputs, pad_mask=None, attention="causal"):
        self.encoded.append((inputs.clone(), pad_mask, attention))
        return self

    def repeat(self, n):
        return self

    def decode(self, y, context, attention, extend=False, belief=None):
        assert context is self and attention == "bidirectional" and not extend
        assert y.dtype == torch.int64 or y.is_floating_point()  # tokens, or vectors
        self.fed.append(y.detach().clone())
        self.told.append(None if belief is None else belief.clone())
        self.given.append(self.script(y))
        return self.given[-1]

    def believe(self, logits):
        return logits.detach().softmax(-1)


class Spy(Scripted):
    """A real model, watched."""

    def __init__(self, model):
        super().__init__(None)
        self.model, self.noisy = model, model.noisy

    def encode(self, inputs, pad_mask=None, attention="causal"):
        super().encode(inputs, pad_mask, attention)
        return self.model.encode(inputs, pad_mask, attention)

    def decode(self, y, context, attention, extend=False, belief=None):
        self.script = lambda y: self.model.decode(y, context, attention, belief=belief)
        return super().decode(y, self, attention, extend, belief)

    def believe(self, logits):
        return self.model.believe(logits)


def oracle(x0):
    """A model that knows the answer: one-hot logits on x0 (B, T), or on that of its input for each of n samples."""
    return Scripted(lambda y: 100.0 * F.one_hot(x0.repeat_interleave(len(y) // len(x0), dim=0), V))


# ---- traces ----

def traced(rows, sure=0.5, seconds=None, samples=("a",), name="out/model"):
    """Return what beyond/trace.py would of drafts whose tokens have these texts; None is PAD."""
    steps = [dict(seconds=float(k if seconds is None else seconds[k]), tokens=[257 if text is None else 0 for text in row],
                  texts=["·" if text is None else text for text in row], sure=[sure if k else None] * len(row))
             for k, row in enumerate(rows)]
    return dict(name=name, process="uniform", decoder="resample", options={"n_steps": len(rows) - 1}, n_text=256, pad=257,
                steps=steps, samples=[dict(text=text, score=float(i)) for i, text in enumerate(samples)], best=0)
