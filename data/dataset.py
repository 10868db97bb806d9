"""Prepared data folders become batches. The rows of a step are a pure function of (seed, step, index of the row in the batch).

A text folder (token files made by data/prepare.py) gives windows of a stream, which an objective (objectives.py) turns into
inputs and targets: by default the first input_len tokens and the next target_len, the paper's prefix LM.
A task folder (JSONL) gives one example a row, its input padded on the left, its target closed by EOS and padded on the right.
"""
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data.objectives import OBJECTIVES, choose, row_length
from data.tasks import read_jsonl
from engine.cli import UserError, check, say
from engine.files import LIST, NUMBER, TEXT, content_hash, fitting, integer, read_json
from engine.noise import Noise, send

META = {"kind": ("task or text", lambda x: x in ("task", "text")), "input_len?": integer(0, 1 << 24),
        "target_len?": integer(1, 1 << 24), "metric?": TEXT, "language?": TEXT}
SOURCE = {"name": TEXT, "weight": ("a number, 0 or more", lambda x: NUMBER[1](x) and x >= 0)}
STREAMS = {"tokenizer": TEXT, "tokenizer_hash": TEXT, "dtype": ("uint16 or uint32", lambda x: x in ("uint16", "uint32")),
           "sources": LIST}
PREPARED = Path(__file__).parent / "prepared"  # where data/prepare.py writes unless told otherwise


class Batch(NamedTuple):
    inputs: torch.Tensor  # (B, S) int64
    pad_mask: torch.Tensor | None  # (B, S) bool, True = padding; None where inputs have none
    targets: torch.Tensor  # (B, T) int64, also called x0

    def to(self, device):
        return Batch(*(x if x is None else send(x, device) for x in self))


def find_folder(name):
    """Return the Path of a folder, given by path or by name in data/prepared, or None."""
    folders = [path for path in (Path(name), PREPARED / name) if path.is_dir()]
    made = [path for path in folders if any((path / file).is_file() for file in ("meta.json", "train.jsonl", "test.jsonl"))]
    return next(iter(made + folders), None)  # a folder that only happens to be called so comes last


def read_meta(folder):
    """Return (path, meta) of a prepared folder, given by path or by name in data/prepared. Raises UserError without one."""
    path = find_folder(folder)
    check(not Path(folder).is_file(), f"{folder} is a file: name the folder that it is in, as train.jsonl")
    check(path is not None, f"no data folder {folder!r}, nor data/prepared/{folder}; a task is a folder with train.jsonl, and "
                            f"python data/prepare.py -h lists what it can make")
    if (path / "meta.json").exists():
        return path, read_json(path / "meta.json", META, "; data/prepare.py writes such files")
    check((path / "train.jsonl").exists() or (path / "test.jsonl").exists(),
          f"{path} holds neither meta.json nor train.jsonl / test.jsonl; data/prepare.py makes such folders")
    return path, {"kind": "task", "name": path.name, "metric": "exact"}


def open_data(folder, tokenizer, input_len, target_len, too_long="error", objective=None, n_canvases=1):
    """Return TextData or TaskData for a prepared folder. Raises UserError when it is missing, empty or made for other ids."""
    if n_canvases > 1:
        data = open_data(folder, tokenizer, input_len, n_canvases * target_len, too_long, objective)
        return Canvases(data, target_len, tokenizer.pad)
    path, meta = read_meta(folder)
    if meta["kind"] == "text":
        try:
            return TextData(path, meta, tokenizer, input_len, target_len, objective)
        except (OSError, ValueError) as error:  # a file that is missing or empty
            raise UserError(f"{path} is damaged ({error}); prepare it again") from error
    check(objective is None, f"--objective={objective} is for text, but {path} is a task, with inputs and targets of its own")
    return TaskData(path, meta, tokenizer, input_len, target_len, too_long)


def data_hash(path, meta):
    """Return a hash of what is trained and validated on, wherever it lies."""
    is_text = meta["kind"] == "text"
    files = [file for split in ("train", "valid") for file in path.glob(f"{split}.*.bin" if is_text else f"{split}.jsonl")]
    return content_hash(files + [path / "meta.json"] * is_text)  # which has the weights of its sources


class TextData:
    """Windows of memory-mapped token streams, each drawn from a source in proportion to the sources' weights."""

    def __init__(self, path, meta, tokenizer, input_len, target_len, objective):
        check(fitting(meta, STREAMS)["tokenizer_hash"] == tokenizer.hash,
              f"{path} was tokenized with {meta['tokenizer']!r} ({meta['tokenizer_hash']}), but the model uses "
              f"{tokenizer.name!r} ({tokenizer.hash}); prepare it again with --tokenizer={tokenizer.name}")
        self.objective, self.tokenizer, self.canvas = choose(objective, input_len), tokenizer, (input_len, target_len)
        self.length = row_length(self.objective, *self.canvas)
        self.path, self.hash = path.resolve(), data_hash(path, meta)
        self.names = [fitting(source, SOURCE)["name"] for source in meta["sources"]]
        weights = np.array([source["weight"] for source in meta["sources"]], dtype=np.float64)
        check(weights.sum() > 0, f"{path} names no source of a weight above 0; prepare it again")
        self.cumulative = np.cumsum(weights / weights.sum())
        self.streams = {split: [np.memmap(path / f"{split}.{name}.bin", dtype=meta["dtype"], mode="r") for name in self.names]
                        for split in ("train", "valid")}
        for split, streams in self.streams.items():
            for name, stream in zip(self.names, streams):
                check(len(stream) > self.length, f"{path}: the {split} part of {name!r} has {len(stream)} tokens, but "
                                                 f"--input_len={input_len} --target_len={target_len} need {self.length + 1}")
                highest, V = stream.max(), tokenizer.vocab_size
                check(highest < V, f"{path}: the {split} part of {name!r} holds token {highest}, of {V}; prepare it again")
        self.n_tokens = sum(len(stream) for stream in self.streams["train"])
        self.tokens_per_row = input_len + target_len

    def _windows(self, split, noise):
        which = np.searchsorted(self.cumulative, noise.uniform().numpy(), side="right").clip(max=len(self.names) - 1)
        streams = [self.streams[split][source] for source in which]
        starts = [int(u * (len(stream) - self.length)) for stream, u in zip(streams, noise.uniform().numpy())]
        rows = np.stack([stream[at:at + self.length] for stream, at in zip(streams, starts)]).astype(np.int64)  # (B, L)
        return Batch(*OBJECTIVES[self.objective](torch.from_numpy(rows), noise, self.tokenizer, *self.canvas))

    def train_batch(self, seed, step, indices, batch_size):
        return self._windows("train", Noise(seed, "order", step, indices))

    def valid_batch(self, indices):
        """Return fixed validation rows: the same for every seed, step and model."""
        return self._windows("valid", Noise(0, "order", 0, indices))  # not "valid": the noise level would tell the source

    def n_valid(self):
        return len(self.streams["valid"][0])


class TaskData:
    """Input and target pairs from train.jsonl and valid.jsonl, shuffled anew every epoch."""
    objective = None  # a task has its own inputs and targets

    def __init__(self, path, meta, tokenizer, input_len, target_len, too_long):
        check(input_len > 0, f"{path} is a task with inputs: set --input_len above 0")
        self.path, self.hash = path.resolve(), data_hash(path, meta)
        self.input_len, self.target_len, self.tokenizer = input_len, target_len, tokenizer
        self.rows = {"train": self._read("train", too_long), "valid": self._read("valid", "drop")}
        self.order = (None, None)  # what the last permutation was for, and the permutation
        self.input_lengths = np.array([len(i) for i, _ in self.rows["train"]])
        self.n_tokens = int(sum(len(i) + len(t) for i, t in self.rows["train"]))
        self.tokens_per_row = float(self.input_lengths.mean()) + target_len  # PAD in a target is predicted

    def _read(self, split, too_long):
        file = self.path / f"{split}.jsonl"
        if split == "valid" and not file.exists():
            return []
        pairs = tokenized(read_jsonl(file), self.tokenizer)
        fits = [len(i) <= self.input_len and len(t) < self.target_len for i, t in pairs]  # one slot is for EOS
        n_dropped = len(pairs) - sum(fits)
        flags = f"--input_len={self.input_len} --target_len={self.target_len}"
        longest = f"the longest are {max(len(i) for i, _ in pairs)} and {max(len(t) for _, t in pairs) + 1}"
        check(any(fits) or split == "valid", f"{file}: not one of {len(pairs)} examples fits {flags}; {longest}")
        if n_dropped and too_long == "error":
            first = fits.index(False)
            raise UserError(
                f"{file}: {n_dropped} of {len(pairs)} examples do not fit {flags}; the first is line {first + 1} with an input "
                f"of {len(pairs[first][0])} tokens and a target of {len(pairs[first][1])} + EOS; {longest}. Raise these, or "
                f"say --too_long=drop")
        if n_dropped:
            say(f"{file}: left out {n_dropped} of {len(pairs)} examples that do not fit {flags}")
        return [pair for pair, fit in zip(pairs, fits) if fit]

    def train_batch(self, seed, step, indices, batch_size):
        rows = self.rows["train"]
        chosen = []
        for index in indices:
            epoch, position = divmod(step * batch_size + index, len(rows))
            if self.order[0] != (seed, epoch, batch_size):
                self.order = (seed, epoch, batch_size), self._epoch(seed, epoch, batch_size)
            chosen.append(rows[self.order[1][position]])
        return self._trimmed(chosen)

    def valid_batch(self, indices):
        return self._trimmed([self.rows["valid"][i] for i in indices])

    def _epoch(self, seed, epoch, batch_size):
        """Return a permutation of the training rows, in which those of a step have inputs of similar length.

        Of the shuffled rows of every 50 steps, neighbours in length make a step; then steps are shuffled. Rows that share a
        step with the epoch before or after stay as they are.
        """
        n, rng = len(self.rows["train"]), Noise(seed, "order", epoch, [0]).rows[0]
        order, first = rng.permutation(n), -epoch * n % batch_size
        last = first + max(0, n - first) // batch_size * batch_size
        whole, many = order[first:last], 50 * batch_size
        pools = np.split(whole, range(many, len(whole), many))
        by_length = [pool[np.argsort(self.input_lengths[pool], kind="stable")] for pool in pools]
        steps = rng.permutation(np.concatenate(by_length).reshape(-1, batch_size))
        return np.concatenate((order[:first], steps.ravel(), order[last:]))

    def _trimmed(self, rows):
        """Lay rows on a canvas without the columns that would hold padding alone: they change nothing but the time."""
        longest = max(1, *(len(i) for i, _ in rows))
        n_columns = min(self.input_len, -(-longest // 8) * 8)  # 8, 16, ..., which matrix units like
        return pad_rows(rows, self.tokenizer, n_columns, self.target_len)

    def n_valid(self):
        return len(self.rows["valid"])


class Canvases:
    """Data whose targets are several canvases long: one of them is learned, and the text before it joins the inputs."""

    def __init__(self, data, target_len, pad):
        self.data, self.target_len, self.pad = data, target_len, pad

    def __getattr__(self, name):
        return getattr(self.data, name)

    def train_batch(self, seed, step, indices, batch_size):
        return self._one(self.data.train_batch(seed, step, indices, batch_size), Noise(seed, "order", step, indices))

    def valid_batch(self, indices):
        return self._one(self.data.valid_batch(indices), Noise(0, "order", 0, indices))

    def _one(self, batch, noise):
        """Return the batch with one canvas of each row, drawn from those that hold text, behind what precedes it."""
        T, L = self.target_len, batch.inputs.size(1) + batch.targets.size(1)
        n_text = (batch.targets != self.pad).sum(dim=1)                                  # (B,), EOS included
        k = (noise.split(1).uniform() * -(-n_text // T)).long()                          # (B,): another draw than the window's
        source = torch.arange(L) - (batch.targets.size(1) - (k + 1) * T)[:, None]        # (B, L): canvas k ends the row
        whole = torch.cat((batch.inputs, batch.targets), dim=1).gather(1, source.clamp(min=0))
        pad_mask = torch.zeros_like(batch.inputs, dtype=torch.bool) if batch.pad_mask is None else batch.pad_mask
        hidden = F.pad(pad_mask, (0, batch.targets.size(1))).gather(1, source.clamp(min=0)) | (source < 0)
        return Batch(whole[:, :-T], hidden[:, :-T], whole[:, -T:])


def tokenized(examples, tokenizer):
    """Return [(input ids, target ids)], int32 arrays, of examples."""
    texts = [text for example in examples for text in (example["input"], example["target"])]
    rows = [np.array(ids, dtype=np.int32) for ids in tokenizer.encode_batch(texts)]
    return list(zip(rows[::2], rows[1::2]))


def pad_rows(rows, tokenizer, input_len, target_len):
    """Lay (input ids, target ids) pairs on a canvas: inputs padded on the left, targets followed by EOS and PAD."""
    inputs = torch.full((len(rows), input_len), tokenizer.pad)
    targets = torch.full((len(rows), target_len), tokenizer.pad)
    pad_mask = torch.ones(len(rows), input_len, dtype=torch.bool)
    for b, (i, t) in enumerate(rows):
        inputs[b, input_len - len(i):] = torch.as_tensor(i)
        pad_mask[b, input_len - len(i):] = False
        targets[b, :len(t)] = torch.as_tensor(t)
        targets[b, len(t)] = tokenizer.eos
    return Batch(inputs, pad_mask, targets)
