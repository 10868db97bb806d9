"""Turn text, or a task's original files, into a folder that the training scripts read.

    python data/prepare.py text                              the Python standard library: no download
    python data/prepare.py text --sources=books/:0.8,stdlib:code:0.2 --out=data/prepared/books
    python data/prepare.py text --sources=input.txt --tokenizer=bytes --out=data/prepared/shakespeare
    python data/prepare.py multi30k --from_dir=FOLDER        a task; without --from_dir it is fetched

A source is FILE:weight or FOLDER:weight; data/text.py says how they are read. The default mixes docstrings and source as the
AR2Diff paper mixes its corpus (section 4.2: 80 % text, 20 % Python). A text folder holds meta.json and, of each source, its
token ids with one EOS between documents: train.SOURCE.bin, and its last tenth, valid.SOURCE.bin.
"""
import itertools
import os
import re
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

if __name__ == "__main__":  # a script finds only modules of its own folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.folder import draft_of
from data.tasks import TASKS, write_task
from data.text import parse_sources, pieces
from data.tokenizer import load_tokenizer
from engine.cli import check, one_of, parse, run
from engine.files import write_json

N_PIECES = 16  # pieces tokenized together


@dataclass
class Config:
    name: str  # text, translate, qa, code, plan, squad, mbpp, multi30k or wmt14
    out: str = ""  # folder to write (default: data/prepared/NAME)
    overwrite: bool = False  # replace a folder prepared before
    sources: str = "stdlib:docs:0.8,stdlib:code:0.2"  # text: FILE_OR_FOLDER:weight,FILE_OR_FOLDER:weight,...
    tokenizer: str = "bpe"  # text: bpe, bytes, gpt2, smollm2, or a ranks file, a published model's folder or .gguf file
    separator: str | None = None  # text: what stands between two documents of a file, '<|endoftext|>' say; default: nothing
    valid_share: float = 0.1  # text: the last share of each source that becomes its validation stream
    from_dir: str = ""  # task: folder with a copy of the original files (default: fetch them)
    n_train: int = 0  # task: number of training examples (0: the task's default)
    seed: int = 0  # task: seed of the examples that are generated or picked
    langs: str = "en-fr"  # translation: from which language to which


TEXT_FLAGS = ("sources", "tokenizer", "separator", "valid_share")
KNOWN_SEPARATORS = re.compile(r"<\|end_?of_?text\|>|<\|im_end\|>|</s>|<eos>")
TASK_FLAGS = ("from_dir", "n_train", "seed", "langs")


def write_tokens(source, path, tokenizer, dtype, separator=None):
    """Write the token ids of a source to a file; return how many tokens, bytes, and known separators there are in its text."""
    n_bytes, found, stream = 0, Counter(), pieces(source, separator)
    with open(path, "wb") as file, tqdm(desc=source.name, unit=" tokens", unit_scale=True, leave=False, disable=None) as bar:
        while batch := list(itertools.islice(stream, N_PIECES)):
            texts = [piece or "" for piece in batch]
            for piece, ids in zip(batch, tokenizer.encode_batch(texts)):
                ids = [tokenizer.eos] if piece is None else ids
                file.write(np.array(ids, dtype=dtype).tobytes())
                bar.update(len(ids))
            n_bytes += sum(len(text.encode("utf-8")) for text in texts)
            found.update(mark for text in texts for mark in KNOWN_SEPARATORS.findall(text))
            found[None] += batch.count(None)  # borders of documents
        return file.tell() // dtype.itemsize, n_bytes, found


def write_text(folder, config):
    """Fill an empty folder with the token streams of all sources and meta.json; print a line for each source."""
    check(0 < config.valid_share < 1, f"valid_share={config.valid_share} must lie between 0 and 1")
    sources, tokenizer = parse_sources(config.sources), load_tokenizer(config.tokenizer)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    rows = []
    for source in sources:
        train, valid = (folder / f"{split}.{source.name}.bin" for split in ("train", "valid"))
        n_tokens, n_bytes, found = write_tokens(source, train, tokenizer, dtype, config.separator)
        n_train = int(n_tokens * (1 - config.valid_share))
        n_valid = n_tokens - n_train
        with open(train, "r+b") as file, open(valid, "wb") as rest:  # what follows n_train tokens moves there
            file.seek(n_train * dtype.itemsize)
            shutil.copyfileobj(file, rest)
            file.truncate(n_train * dtype.itemsize)
        check(n_train and n_valid, f"source {source.name!r} is too short: {n_train} tokens to train on, {n_valid} to test")
        weight = source.weight / sum(each.weight for each in sources)
        rows.append({"name": source.name, "weight": weight, "train_tokens": n_train, "valid_tokens": n_valid})
        print(f"{source.name}: {n_train:,} tokens to train on, {n_valid:,} to validate on, "
              f"{n_bytes / n_tokens:.2f} bytes per token, weight {weight:.3g}")
        if found.pop(None, 0) < len(source.files) and config.separator:
            print(f"warning: --separator={config.separator!r} parts nothing in {source.name}", file=sys.stderr)
        for mark, n in found.items():
            print(f"warning: {source.name} holds {mark!r} {n:,} times, as plain text; if documents end there, say "
                  f"--separator='{mark}'", file=sys.stderr)
    meta = {"kind": "text", "tokenizer": tokenizer.name, "tokenizer_hash": tokenizer.hash, "dtype": dtype.name, "sources": rows}
    write_json(folder / "meta.json", meta, "out")


def main(argv=None):
    config = parse(Config, argv)
    one_of("name", config.name, ["text", *TASKS])
    for flag in TASK_FLAGS if config.name == "text" else TEXT_FLAGS:
        check(getattr(config, flag) == getattr(Config, flag), f"--{flag} has no meaning for {config.name!r}")
    out = (Path(os.path.expanduser(config.out)) if config.out else Path(__file__).parent / "prepared" / config.name).resolve()
    with draft_of(out, config.overwrite) as draft:
        if config.name == "text":
            write_text(draft, config)
            done = "wrote"
        else:
            counts = write_task(config.name, draft, config.from_dir, config.n_train, config.seed, config.langs)
            done = ", ".join(f"{count:,} {split}" for split, count in counts.items()) + " examples in"
    print(done, out)


if __name__ == "__main__":
    run(main)
