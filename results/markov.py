"""A text whose entropy is known: a Markov chain of order k with the k+1-gram counts of a real text (Shannon 1948, section 3).

    python results/markov.py input.txt --order=2 --out=out/order2.txt

Writes the text and prints the bits per character that a window of it needs: with G_k the entropy of a k-gram of the
text, read in a circle, an ideal model needs G_k for the first k characters and G_(k+1) - G_k for each of the others. What a
model needs beyond that is what it has not learned. The chain itself is as easy for a masked model as for AR; what has to
be learned is not: AR needs the next character after k others, a masked model any character between any others.
"""
import math
import random
import sys
from bisect import bisect
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only modules of its own folder
from config import UserError, check, parse, run
from data.text import read_text


@dataclass
class Config:
    text: str  # positional: the text to count in
    order: int = 2  # k, how many characters the next one depends on
    length: int = 4_000_000  # characters to write
    window: int = 64  # characters per window, to print the entropy of
    seed: int = 0
    out: str = "out/markov.txt"


def count_grams(text, n):
    """Return how often each n-gram occurs in text, which goes round in a circle."""
    around = text + text[:n]
    return Counter(around[i: i + n] for i in range(len(text)))


def entropy(counts):
    """Return the entropy in bits of drawing from counts."""
    total = sum(counts.values())
    return math.log2(total) - sum(c * math.log2(c) for c in counts.values()) / total


def chain(text, order, length, seed):
    """Yield characters: each drawn after the `order` before it, as often as in text; the first after the text's first few."""
    follow = {}  # context -> (next characters, their cumulative counts)
    for gram, count in sorted(count_grams(text, order + 1).items()):
        nexts, ends = follow.setdefault(gram[:-1], ([], []))
        nexts.append(gram[-1])
        ends.append(count + (ends[-1] if ends else 0))
    draw, context = random.Random(seed).random, text[:order]
    for _ in range(length):
        nexts, ends = follow[context]
        character = nexts[bisect(ends, draw() * ends[-1])]
        yield character
        context = (context + character)[1:] if order else ""


def main(argv=None):
    config = parse(Config, argv)
    check(config.order >= 0, f"--order={config.order} must be at least 0")
    check(config.window > config.order, f"--window={config.window} must be longer than --order={config.order}")
    check(config.length >= 1, f"--length={config.length} must be at least 1")
    check(not Path(config.out).exists(), f"{config.out} exists; it is not overwritten")
    check(Path(config.text).is_file(), f"no file {config.text}")
    text, k, out = read_text(config.text), config.order, Path(config.out)
    check(len(text) > k, f"{config.text} has {len(text)} characters, too few for --order={k}")
    first, first_and_next = entropy(count_grams(text, k)) if k else 0.0, entropy(count_grams(text, k + 1))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(chain(text, k, config.length, config.seed)), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write --out={out}: {error.strerror}") from error
    rate = first_and_next - first
    print(f"{out}: {config.length:,} characters, a chain of order {k}; entropy {rate:.4f} bits per character, "
          f"{(first + (config.window - k) * rate) / config.window:.4f} in windows of {config.window}")


if __name__ == "__main__":
    run(main)
