"""Make a ranks file for data/tokenizer.py. For development only: needs `pip install tokenizers`, which nothing else here does.

    python data/train_bpe.py --vocab=3993 --out=my.tiktoken books.txt:4.4,stdlib:code:2.2

Sources are written as in data/prepare.py, but the number is megabytes: of a larger source every k-th line is taken.
The shipped data/bpe4k.tiktoken comes from Python 3.11.7, tokenizers 0.23.3, 107 public-domain books in English and the captions
of Multi30k, training parts only, so that Python, prose, English and French all become short:

    python data/train_bpe.py stdlib:code:2.2,stdlib:docs:2.2,books.txt:4.4,train.en:1.8,train.fr:2.1,train.de:0.5
"""
import base64
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only modules of its own folder, data/
from config import check, parse, run
from data.text import parse_sources, pieces
from data.tokenizer import PATTERN, SHIPPED, load_tokenizer


@dataclass
class Config:
    sources: str  # FILE_OR_FOLDER:megabytes,FILE_OR_FOLDER:megabytes,...
    vocab: int = 3993  # text tokens, the 256 bytes among them
    out: str = str(SHIPPED)  # ranks file to write


def sample(source):
    """Return about source.weight megabytes of a source, lines taken evenly from all over it."""
    lines = "".join(piece or "\n" for piece in pieces(source)).splitlines(keepends=True)
    stride = max(1.0, sum(len(line.encode("utf-8")) for line in lines) / (source.weight * 1e6))
    return "".join(lines[int(n * stride)] for n in range(int(len(lines) / stride)))


def byte_of_character():
    """Return the table of GPT-2's byte-level BPE: each byte is written as a visible character."""
    visible = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + n): b for n, b in enumerate(others)}


def train(texts, vocab):
    """Learn byte-level BPE; return the trained library object."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers  # here: importing this file needs nothing new
    bpe = Tokenizer(models.BPE())
    # Ranks are valid for tiktoken only if the pieces are the same in both: our pattern here too, not the library's.
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=sorted(byte_of_character()), special_tokens=[], show_progress=False))
    return bpe


def main(argv=None):
    config = parse(Config, argv)
    check(config.vocab > 256, f"vocab={config.vocab} must be above 256, the number of bytes")
    texts = [sample(source) for source in parse_sources(config.sources)]
    bpe, table = train(texts, config.vocab), byte_of_character()
    learned = [bytes(table[c] for c in token) for token, _ in sorted(bpe.get_vocab().items(), key=lambda item: item[1])]
    # A byte's own rank is its value: nothing depends on it, and ids of `bytes` and of this file agree.
    ranks = [bytes([b]) for b in range(256)] + [token for token in learned if len(token) > 1]
    check(len(ranks) == config.vocab, f"the text gives only {len(ranks)} tokens; take more text or a smaller --vocab")
    Path(config.out).write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % n for n, token in enumerate(ranks)))

    tokenizer = load_tokenizer(config.out)
    for text in texts:  # the two libraries must cut alike: the one that learned, and the one that will be used
        theirs = [bytes(table[c] for c in token) for token in bpe.encode(text).tokens]
        ours = [ranks[i] for i in tokenizer.encode(text)]
        check(theirs == ours, f"tiktoken ({len(ours)} tokens) and tokenizers ({len(theirs)}) disagree")
        print(f"{text[:40]!r}: {len(text.encode('utf-8')) / len(ours):.3f} bytes per token")
    print(f"wrote {config.out}: {len(ranks)} tokens, hash {tokenizer.hash}")


if __name__ == "__main__":
    run(main)
