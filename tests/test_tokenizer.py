"""data/tokenizer.py against a brute-force BPE, its layout of ids, and damaged ranks files."""
import base64
import itertools
import os
import random
from pathlib import Path

import pytest
import regex
import tiktoken

from data import tokenizer as module
from data.tokenizer import PATTERN, SHIPPED, Tokenizer, load_tokenizer, read_ranks
from engine.cli import UserError

BYTES = {bytes([b]): b for b in range(256)}
SMALL = BYTES | {b"th": 256, b" th": 257, b"he": 258, b"the": 259, b" the": 260, b"\n ": 261, b"\n  ": 262, b"ab": 263}


def write_ranks(path, ranks):
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return path


@pytest.fixture(params=["bpe", "bytes", "gpt2", "ranks file"])
def tokenizer(request, tmp_path, monkeypatch):
    """Every kind of tokenizer; GPT-2's download is replaced by a small encoding of the same build."""
    fake = tiktoken.Encoding("gpt2", pat_str=module.GPT2_PATTERN, mergeable_ranks=SMALL,
                             special_tokens={"<|endoftext|>": len(SMALL)})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: fake)
    name = request.param
    return load_tokenizer(str(write_ranks(tmp_path / "own.tiktoken", SMALL)) if name == "ranks file" else name)


def random_texts(n, seed=0):
    """Words, code and arbitrary characters of all planes, mixed."""
    rng = random.Random(seed)
    parts = ["the", " the", "don't", "'select'", "L'homme", " été", "snake_case", "\n    return", "\n\n", "\r\n", "\t", "  ",
             " ", "3.14", " 1999", "==", "):", "…", "’s", "e\u0301", "<|endoftext|>", "<pad>", "\x00", "\u2028", "\xa0"]
    for _ in range(n):
        yield "".join(rng.choice(parts) if rng.random() < 0.7 else chr(rng.choice(
            [rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(rng.randrange(12)))


def brute_force(text, ranks, pattern):
    """BPE by its definition: in each piece, merge the adjacent pair of lowest rank, leftmost first, until none is left."""
    ids = []
    for piece in regex.findall(pattern, text):
        parts = [bytes([b]) for b in piece.encode("utf-8")]
        while True:
            pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
            if not pairs:
                break
            i = min(pairs)[1]
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def test_any_text_survives_encode_and_decode_and_batches_equal_singles(tokenizer):
    texts = list(random_texts(300))
    ids = [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(row) for row in ids] == texts
    assert tokenizer.encode_batch(texts) == ids


def test_any_bytes_survive_as_token_ids(tokenizer):
    """Ids that spell invalid UTF-8 decode as Python itself decodes those bytes; a model may well emit them."""
    rng = random.Random(1)
    for _ in range(100):
        raw = rng.randbytes(10)
        ids = [tokenizer._encoding.encode_single_token(bytes([b])) for b in raw]
        assert tokenizer.decode(ids) == raw.decode("utf-8", errors="replace")


def test_ids_are_laid_out_as_documented(tokenizer):
    t, n = tokenizer, tokenizer.n_text
    specials = [t.eos, t.pad, t.mask, *t.sentinels]
    assert specials == list(range(n, n + 103))
    assert t.vocab_size % 64 == 0 and 0 <= t.vocab_size - (n + 103) < 64
    assert t.n_noise == n + 2  # text, EOS, PAD; not MASK, no sentinel, nothing unused


def test_no_text_encodes_to_a_special_id(tokenizer):
    texts = [*random_texts(300, seed=2), "<|endoftext|>", "<|endoftext|>" * 3, " <|endoftext|>\n", "<extra_id_0>", "[MASK]"]
    assert max(max(ids, default=0) for ids in tokenizer.encode_batch(texts)) < tokenizer.n_text
    assert tokenizer.decode(tokenizer.encode("a<|endoftext|>b")) == "a<|endoftext|>b"


def test_vocabularies_have_the_promised_sizes():
    bpe, plain = load_tokenizer("bpe"), load_tokenizer("bytes")
    assert (bpe.n_text, bpe.vocab_size) == (3993, 4096)
    assert (plain.n_text, plain.vocab_size) == (256, 384)
    assert plain.encode("aé\n") == list("aé\n".encode())
    assert SHIPPED.stat().st_size < 100_000


def test_the_shipped_ids_never_change():
    """Every checkpoint and token file made with `bpe` is void on the day when this fails."""
    assert load_tokenizer("bpe").hash == "f31e432dfbf6f797"


def test_bpe_equals_brute_force(tokenizer):
    pattern = module.GPT2_PATTERN if tokenizer.name == "gpt2" else PATTERN
    ranks = {"bpe": read_ranks(SHIPPED), "bytes": BYTES}.get(tokenizer.name, SMALL)
    for text in [*random_texts(200, seed=3), "ththe the thab", "\n   the", "abab" * 5]:
        assert tokenizer.encode(text) == brute_force(text, ranks, pattern), repr(text)


def test_bpe_equals_brute_force_on_real_text_and_shortens_it():
    folder = os.environ.get("AR2DIFF_DATA")
    if not folder:
        pytest.skip("real text is needed: set AR2DIFF_DATA to a folder with tinyshakespeare.txt")
    text = (Path(folder) / "tinyshakespeare.txt").read_text(encoding="utf-8")[:50_000]
    ids = load_tokenizer("bpe").encode(text)
    assert ids == brute_force(text, read_ranks(SHIPPED), PATTERN)
    assert len(text) / len(ids) > 2.5


def test_text_is_split_where_the_pattern_says():
    cases = {"x = 1234\n": ["x", " =", " ", "1", "2", "3", "4", "\n"],
             "def f():\n    if x:\n\n        y": ["def", " f", "():", "\n    ", "if", " x", ":", "\n\n        ", "y"],
             "don't 'select' she’ll": ["don", "'t", " '", "select", "'", " she", "’ll"],
             "L'été d'une": ["L'", "été", " d'", "une"],
             "read_text": ["read", "_text"],
             "'select'": ["'", "select", "'"],
             "a  \n b": ["a", "  ", "\n ", "b"]}
    for text, pieces in cases.items():
        assert regex.findall(PATTERN, text) == pieces


def test_a_digit_is_always_a_token_of_its_own():
    t = load_tokenizer("bpe")
    ids = t.encode("in 1984, 3.14159 (2nd) x10 -77\n")
    digits = [t.decode([i]) for i in ids if any(c.isdigit() for c in t.decode([i]))]
    assert digits == list("19843141592" + "1077")


def test_hash_tells_any_two_sets_of_ids_apart():
    hashes = [Tokenizer("x", ranks, pattern).hash for ranks, pattern in [
        (SMALL, PATTERN), (SMALL | {b"th": 258, b"he": 256}, PATTERN), (SMALL | {b"xy": 264}, PATTERN),
        (SMALL, PATTERN.replace(r"\p{N}", r"\p{N}+")),
        (BYTES | {b"abc": 256, b"de": 257}, PATTERN), (BYTES | {b"ab": 256, b"cde": 257}, PATTERN)]]
    assert len(set(hashes)) == len(hashes)
    assert all(regex.fullmatch("[0-9a-f]{16}", h) for h in hashes)
    assert Tokenizer("another name", SMALL).hash == hashes[0]  # the same ids wherever the file lies


def test_decode_stops_at_the_first_eos_and_drops_other_special_ids(tokenizer):
    t, ab, c = tokenizer, tokenizer.encode("ab"), tokenizer.encode("c")
    assert t.decode([*ab, t.eos, *c, t.eos]) == "ab"
    assert t.decode([t.pad, *ab, t.mask, t.sentinels[0], t.sentinels[-1], t.vocab_size - 1, *c]) == "abc"
    assert t.decode([t.eos]) == t.decode([]) == ""


def test_each_token_is_shown_once_and_a_character_of_several_whole(tokenizer):
    for text in random_texts(50):
        pieces = tokenizer.pieces(tokenizer.encode(text))
        assert len(pieces) == len(tokenizer.encode(text)) and ("\ufffd" in text or "".join(pieces) == text)
    marks = [tokenizer.eos, tokenizer.pad, tokenizer.mask, tokenizer.sentinels[0]]
    assert tokenizer.pieces([*marks, *tokenizer.encode("a")]) == ["∎", "·", "▒", "?", "a"] and tokenizer.pieces([]) == []


def test_parts_of_a_character_that_are_not_side_by_side_are_shown_as_such():
    tokenizer, bad = load_tokenizer("bytes"), "\ufffd"
    assert tokenizer.pieces("é😀x".encode()) == ["é", "", "😀", "", "", "", "x"]
    assert tokenizer.pieces([0xC3, tokenizer.pad, 0xA9]) == [bad, "·", bad]
    assert tokenizer.pieces([0xC3]) == [bad] and tokenizer.pieces([0xC3, tokenizer.eos]) == [bad, "∎"]
    assert tokenizer.pieces([0xA9, 0xC3, 0xA9, 0xF0, 0x9F]) == [bad, "é", "", bad, bad]


@pytest.mark.parametrize("line, content, complaint", [
    (300, b"YW*Jj 299", "base64"), (300, b"YWJj", "base64"), (300, b"YWJj 299 1", "base64"), (300, b"YWJj x", "base64"),
    (300, b"", "base64"), (300, b"YWJj 310", "rank 310 where 299 is due"), (300, b"YWJj 298", "rank 298"),
    (300, b"QQ== 299", "twice")])
def test_a_malformed_ranks_file_is_named_with_its_line(tmp_path, line, content, complaint):
    lines = SHIPPED.read_bytes().splitlines()
    lines[line - 1] = content
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=f"bad.tiktoken, line {line}: .*{complaint}"):
        load_tokenizer(str(path))


def test_a_ranks_file_without_all_bytes_is_refused(tmp_path):
    ranks = {token: n for n, token in enumerate(token for token in SMALL if token != b"\xff")}
    with pytest.raises(UserError, match="byte 255"):
        load_tokenizer(str(write_ranks(tmp_path / "few.tiktoken", ranks)))


def test_missing_things_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="not one of bpe, bytes, gpt2, smollm2, a ranks file"):
        load_tokenizer(str(tmp_path / "none.tiktoken"))
    with pytest.raises(UserError, match="did you mean 'bytes'"):
        load_tokenizer("byte")

    def offline(name):
        raise ConnectionError("no route")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="one download"):
        load_tokenizer("gpt2")
