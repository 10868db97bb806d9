"""data/tokenizer_files.py against the library `tokenizers`: the same ids for any text, in the form of each family."""
import json
import random
import unicodedata
from pathlib import Path

import pytest

from data.tokenizer import load_tokenizer
from data.tokenizer_files import BYTE_OF, LLAMA3_PATTERN, QWEN2_PATTERN
from engine.cli import UserError
from test_tokenizer import random_texts

LANGUAGES = ["The quick brown fox jumps over the lazy dog, doesn't it? She'll pay $1,234.56 in 2024.",
             "L'été dernier, où étiez-vous ? Ça fait 25 ans qu'elle n'a pas mangé de crème brûlée.",
             "Die Straße führt über größere Hügel; am 3. Oktober 1990 war's schön.",
             "Съешь же ещё этих мягких французских булок, да выпей чаю. Это стоит 1500 рублей.",
             "中文测试：我们在2024年3月去了北京。天气很好！",
             "日本語のテキストです。数字は１２３と456。"]
CODE = ["def f(x):\n    if x == 10:\n        return {'a': [1, 22, 333]}\n\n\n    return None\r\n",
        "for(int i=0;i<100;i++){\tx+=i; }\n",
        "a  b   c    1  22   333 \n \n\n  x\t\t9", "SELECT * FROM t WHERE id=12345 AND name LIKE '%x%';"]
ODD = ["", " ", "  ", "\n", "\r\n\r\n", "1", " 1", "  1", "12345678", "½ ²³ ४५६ Ⅷ", "e\u0301a\u0308 Å",
       "I'M DON'T 'S 'ſ", "👩‍👩‍👧 🇩🇪 ❤️", "\u2028\xa0\u3000x",
       "ﬁ ﷺ", "\x00\x01\x7f", "a" * 300, "한국어 ᄒ\u1161\u11ab", "-=#@!~`^", "´’s ‘t", "x\u200by\ufeffz", "<|endoftext", "́́"]
TEXTS = LANGUAGES + CODE + ODD
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def trained(folder, kind, alphabet=True, special=SPECIAL):
    """Train a tiny tokenizer in the form of a family by the reference library, save tokenizer.json and return it."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "gpt2":
        tokenizer.pre_tokenizer = byte_level
    elif kind == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    else:
        pattern = Regex(LLAMA3_PATTERN if kind == "llama3" else QWEN2_PATTERN)
        bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), bare])
        if kind == "qwen":
            tokenizer.normalizer = normalizers.NFC()
    first = kind in ("smollm", "gpt2")  # where the special tokens stand: before the others, or after them
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special if first else [], show_progress=False,
                                  initial_alphabet=list(BYTE_OF) if alphabet else [])
    corpus = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.parent.glob("docs/*.md")]
    tokenizer.train_from_iterator(corpus + 30 * (LANGUAGES + CODE + ["  \n" * 9]), trainer)
    tokenizer.add_special_tokens([] if first else special)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


@pytest.fixture(scope="module", params=["gpt2", "smollm", "llama3", "qwen"])
def pair(request, tmp_path_factory):
    """(kind, the reference, its folder)"""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, trained(folder, request.param), folder


def differences(reference, ours, texts):
    """Return the texts that the two encode otherwise, ours by the model's ids."""
    return [text for text, ids in zip(texts, ours.encode_batch(texts))
            if [ours.ids[i] for i in ids] != reference.encode(text, add_special_tokens=False).ids]


def test_ids_are_those_of_the_reference_on_five_languages_code_and_odd_strings(pair):
    kind, reference, folder = pair
    ours, rng = load_tokenizer(str(folder)), random.Random(0)
    mixed = ["".join(rng.choices(TEXTS + [" ", "\n", "7"], k=3)) for _ in range(100)]
    texts = [text for text in [*TEXTS, *mixed, *random_texts(300)] if "<|endoftext|>" not in text]
    assert differences(reference, ours, texts) == []
    assert [ours.encode(text) for text in texts] == ours.encode_batch(texts)
    wanted = [unicodedata.normalize("NFC", text) if kind == "qwen" else text for text in texts]
    assert [ours.decode(ours.encode(text)) for text in texts] == wanted


def test_ids_are_laid_out_as_everywhere_and_special_tokens_are_no_text(pair):
    _, reference, folder = pair
    ours, vocab = load_tokenizer(str(folder)), reference.get_vocab()
    assert ours.special == {name: vocab[name] for name in SPECIAL}
    assert sorted([*ours.ids, *ours.special.values()]) == list(range(len(vocab))) and ours.ids == sorted(ours.ids)
    assert (ours.eos, ours.pad, ours.mask) == (len(ours.ids), len(ours.ids) + 1, len(ours.ids) + 2)
    assert max(ours.encode("<|endoftext|>")) < ours.n_text and ours.decode(ours.encode("<|endoftext|>")) == "<|endoftext|>"
    assert ours.hash == load_tokenizer(str(folder)).hash and len({t.hash for t in (ours, load_tokenizer("bytes"))}) == 2


def test_bytes_without_a_token_follow_the_others(tmp_path):
    reference = trained(tmp_path, "smollm", alphabet=False)
    ours = load_tokenizer(str(tmp_path))
    n_alone = ours.ids.count(-1)
    assert n_alone > 0 and ours.ids[-n_alone:] == [-1] * n_alone and ours.n_text == reference.get_vocab_size() - 3 + n_alone
    assert ours.decode(ours.encode("\x00\x7f ﷺ")) == "\x00\x7f ﷺ"
    assert differences(reference, ours, LANGUAGES + CODE) == []


def test_every_split_of_a_token_as_a_merge_is_the_same_tokenizer(tmp_path):
    """As Llama 3's tokenizer.json has them, which was converted from ranks: whole words are looked up first."""
    from tokenizers import Tokenizer
    trained(tmp_path, "llama3")
    plain, content = load_tokenizer(str(tmp_path)), json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    merges = [(t[:i], t[i:]) for t in sorted(vocab, key=vocab.get) for i in range(1, len(t)) if {t[:i], t[i:]} <= vocab.keys()]
    assert len(merges) > len(content["model"]["merges"]) + 50
    content["model"] |= {"merges": merges, "ignore_merges": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    ours = load_tokenizer(str(tmp_path))
    assert ours.hash == plain.hash
    texts = [*TEXTS, *(text for text in random_texts(300) if "<|endoftext|>" not in text)]
    assert differences(Tokenizer.from_file(str(tmp_path / "tokenizer.json")), ours, texts) == []


@pytest.mark.parametrize("kind, model_type", [("gpt2", None), ("gpt2", "gpt2"), ("qwen", "qwen2"), ("qwen", "qwen3")])
def test_vocab_and_merges_are_the_same_tokenizer(tmp_path, kind, model_type):
    reference = trained(tmp_path, kind, special=["<|endoftext|>"])
    whole = load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    reference.model.save(str(tmp_path))
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours = load_tokenizer(str(tmp_path))
    assert (ours.hash, ours.ids) == (whole.hash, whole.ids)
    assert ours.special == whole.special or kind == "qwen"  # there its id stands in config.json alone
    lines = (tmp_path / "merges.txt").read_bytes()
    (tmp_path / "merges.txt").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"))  # as some editors save it
    assert load_tokenizer(str(tmp_path)).hash == whole.hash
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="do not say how 'llama' splits a text; tokenizer.json is needed"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("change, message", [
    (lambda c: c["model"].update(type="Unigram"), "tokenizer Unigram; only byte-level BPE"),
    (lambda c: c["model"].update(byte_fallback=True), "tokenizer BPE, byte_fallback; only"),
    (lambda c: c.update(normalizer={"type": "NFKC"}), "normalizer NFKC; only NFC"),
    (lambda c: c["pre_tokenizer"].update(add_prefix_space=True), "add_prefix_space.: true.*known are ByteLevel"),
    (lambda c: c.update(pre_tokenizer=None), "pre_tokenizer .*known are"),
    (lambda c: c.update(pre_tokenizer={"type": "Metaspace", "replacement": "▁"}), "Metaspace"),
    (lambda c: c["model"]["merges"].reverse(), "merges are not in the order of the ids"),
    (lambda c: c["model"]["vocab"].update(zzzz=5000), r"1 tokens are no marks.*\('zzzz'\)"),
    (lambda c: c["added_tokens"].append({"content": "    ", "id": 5001}), "1 tokens are no marks"),
    (lambda c: c["added_tokens"].append({"content": "zq", "id": 5001}), "1 tokens are no marks"),
    (lambda c: c["added_tokens"].append({"content": "he", "id": c["model"]["vocab"]["he"]}), "tokens are no marks"),
    (lambda c: c.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\p{L}+|\p{N}"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}), "known are ByteLevel"),
    (lambda c: c["pre_tokenizer"].update(type="Sequence", pretokenizers=[]), "cannot be read|known are"),
    (lambda c: c["model"]["vocab"].pop("he"), "cannot be read .KeyError: 'he'"),
    (lambda c: c.pop("model"), "tokenizer.json: 'model' is missing"),
    (lambda c: c["model"]["merges"].append(["▁", "▁"]) or c["model"]["vocab"].update({"▁▁": 7000, "▁": 7001}),
     "no marks|not spelled in bytes"),
])
def test_what_tiktoken_would_encode_otherwise_is_refused_by_name(tmp_path, change, message):
    trained(tmp_path, "gpt2")
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_or_with_a_damaged_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer.json, nor vocab.json with merges.txt"):
        load_tokenizer(str(tmp_path))
    for damaged, message in ((b"{", "tokenizer.json: not JSON"), (b"[" * 100_000, "tokenizer.json: not JSON"),
                             ('{"model": 1}'.encode("utf-16"), "tokenizer.json is UTF-16, not UTF-8; convert it first")):
        (tmp_path / "tokenizer.json").write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            load_tokenizer(str(tmp_path))
