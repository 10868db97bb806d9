"""Text <-> token ids. Every tokenizer is byte-level BPE run by tiktoken, with one layout of ids:

    0 ... n_text - 1 | EOS | PAD | MASK | 100 sentinels | unused, up to a multiple of 64
    text tokens        n_text      n_text + 2             vocab_size

The special ids are there before AR pretraining starts, so AR2Diff never has to resize an embedding. They have no spelling:
no text encodes to one, not even "<|endoftext|>".
"""
import base64
import hashlib
import re
import unicodedata
from pathlib import Path

import tiktoken

from data.originals import smollm2
from data.tokenizer_files import GPT2_PATTERN, read_tokenizer_files
from engine.cli import UserError, check, one_of

N_SENTINELS = 100  # as in T5, for span corruption
MOST_SPACES = 900_000  # in a row, for a pattern that looks ahead: with a million tiktoken panics (its issues 15, 245)
# 3993 + 103 special ids = 4096. Learned with PATTERN by the library `tokenizers` 0.23.3 from Python 3.11.7 (code 2.2 MB, docs
# 2.2), 107 books in English (4.4), training captions of Multi30k (en 1.8, fr 2.1, de 0.5): data/train_bpe.py at 987c4fc.
SHIPPED = Path(__file__).parent / "bpe4k.tiktoken"

# Text is split into pieces by the first alternative that matches; merges never cross the border of a piece. None looks ahead
# (linear time), none takes a newline after anything else: a text may be cut before a newline, as data/text.py does.
PATTERN = "|".join([
    r"[\r\n]+[ \t]*",                          # line ends with the indentation that follows: Python's blocks in one token
    r" ?\p{L}['’]",                            # d'une, l'homme, I'm; also f'...' and r'...' of Python
    r"['’](?:s|t|re|ve|m|ll|d)\b",             # don't, she'll; \b keeps 'select' whole
    r"[ _]?[\p{L}\p{M}]+",                     # a word with the space before it; snake_case by words
    r"\p{N}",                                  # digits one at a time: numbers can be copied and computed
    r" ?[^\s\p{L}\p{M}\p{N}]+",                # punctuation, "):" and "==" together
    r"[^\S\r\n]+",                             # other spaces
])


class Tokenizer:
    """Byte-level BPE. `ranks` maps the bytes of each text token to its id; the lower of two ids was merged first.

    nfc: texts are first brought to Unicode's normal form NFC (Qwen). ids, special: a published model's (tokenizer_files.py).
    """

    def __init__(self, name, ranks, pattern=PATTERN, nfc=False, ids=None, special=()):
        self.name, self.nfc, self.ids, self.special = name, nfc, ids, special
        self.n_text = len(ranks)
        self.eos, self.pad, self.mask = self.n_text, self.n_text + 1, self.n_text + 2
        self.sentinels = range(self.n_text + 3, self.n_text + 3 + N_SENTINELS)
        self.vocab_size = -(-self.sentinels.stop // 64) * 64  # matrix units like multiples of 64
        # Uniform noise draws from [0, n_noise): whatever a clean target may hold, hence EOS and PAD too, and nothing else.
        self.n_noise = self.n_text + 2
        self.backtracks = "(?!" in pattern
        self._encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        digest = hashlib.sha256(f"{pattern}\n{N_SENTINELS} {self.vocab_size}\n{'NFC' * self.nfc}".encode())
        for token in sorted(ranks, key=ranks.get):
            digest.update(len(token).to_bytes(4, "little") + token)  # the length, or "ab" "c" would hash like "a" "bc"
        self.hash = digest.hexdigest()[:16]

    def encode(self, text):
        """Return the ids of a text: all of them below n_text, none added at either end."""
        return self._encoding.encode_ordinary(self._normal(text))

    def encode_batch(self, texts):
        """Return [encode(text) for text in texts], by several threads."""
        return self._encoding.encode_ordinary_batch(list(map(self._normal, texts)))

    def _normal(self, text):
        if self.backtracks and len(text) > MOST_SPACES:
            longest = max(len(run[0]) for run in re.finditer(r"\s*", text))
            check(longest <= MOST_SPACES, f"a text holds more than {MOST_SPACES:,} spaces in a row, on which the pattern of "
                                          f"tokenizer {self.name!r} gives up; --tokenizer=bpe takes them")
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def decode(self, ids):
        """Return the text up to the first EOS. Other special ids vanish; bytes that are not UTF-8 become U+FFFD."""
        ids = [int(i) for i in ids]
        ids = ids[:ids.index(self.eos)] if self.eos in ids else ids
        return self._encoding.decode_bytes([i for i in ids if 0 <= i < self.n_text]).decode("utf-8", errors="replace")

    def pieces(self, ids):
        """Return how each token is shown: EOS as ∎, PAD as a dot, MASK as ▒, bytes that are no character as U+FFFD.

        A character of several tokens stands whole at the first of them, and nothing at the others.
        """
        ids, pieces, marks = [int(i) for i in ids], [], {self.eos: "∎", self.pad: "·", self.mask: "▒"}
        while rest := ids[len(pieces):]:
            runs = [rest[:n] for n in (1, 2, 3, 4) if max(rest[:n]) < self.n_text]
            whole = next((run for run in runs if "\ufffd" not in self.decode(run)), rest[:1])
            pieces += [self.decode(whole) if runs else marks.get(rest[0], "?"), *[""] * (len(whole) - 1)]
        return pieces

    def n_bytes(self, ids):
        """Return how many bytes of text the ids stand for; special ids stand for none."""
        return len(self._encoding.decode_bytes([i for i in ids if 0 <= i < self.n_text]))


def load_tokenizer(name):
    """Return the Tokenizer of this name, or of this ranks file, model's folder or GGUF file. UserError when there is none."""
    if name in _NAMED:
        return _NAMED[name](name)
    if Path(name).is_dir() or Path(name).suffix == ".gguf":
        return Tokenizer(name, *read_tokenizer_files(Path(name)))
    return Tokenizer(name, read_ranks(name if Path(name).is_file() else one_of("tokenizer", name, (*_NAMED, "a ranks file"))))


def _gpt2(name):
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a ValueError is a bad checksum
        raise UserError("tokenizer gpt2 needs one download by tiktoken, which failed "
                        f"({type(error).__name__}); go online once, or use --tokenizer=bpe") from error
    # GPT-2's own <|endoftext|> is the id after its text tokens, 50256: our EOS, so its trained embedding row stays of use.
    ranks = {encoding.decode_single_token_bytes(i): i for i in range(encoding.eot_token)}
    return Tokenizer(name, ranks, GPT2_PATTERN)


def read_ranks(path):
    """Read a ranks file, tiktoken's own format: per line the base64 of a token, a space, its rank."""
    ranks = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except ValueError:
            raise UserError(f"{path}, line {number}: not a base64 token, a space and a rank (tiktoken's format)") from None
        check(token not in ranks, f"{path}, line {number}: the token is there twice")
        # Ranks are ids: a gap would be an embedding row without text, and EOS would not be where the layout says.
        check(rank == number - 1, f"{path}, line {number}: rank {rank} where {number - 1} is due; ranks count up from 0")
        ranks[token] = rank
    missing = next((b for b in range(256) if bytes([b]) not in ranks), None)
    check(missing is None, f"{path}: byte {missing} is no token of its own, so not every text could be encoded")
    return ranks


_NAMED = {"bpe": lambda name: Tokenizer(name, read_ranks(SHIPPED)),
          "bytes": lambda name: Tokenizer(name, {bytes([b]): b for b in range(256)}),  # no merges: an id is a byte
          "gpt2": _gpt2, "smollm2": lambda name: Tokenizer(name, *read_tokenizer_files(smollm2()))}
