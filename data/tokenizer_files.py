"""The tokenizer of a published model, from its own files: tokenizer.json, vocab.json + merges.txt, or inside a GGUF file.

Only what tiktoken computes: byte-level BPE with ids in the order of merges, behind one of four patterns that split the text.
SentencePiece and its like are refused, and so is whatever else is known to differ. In our layout of ids (tokenizer.py) text
tokens keep the order of the model's ids, its special tokens are left out, and bytes without a token follow.
"""
import json
import re

from engine.checkpoint import read_gguf
from engine.cli import UserError, check
from engine.files import OBJECT, TEXT, as_text, read_json

# GPT-2's pattern, published with its weights; then with digits cut off first, so that the spaces before one stay together.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                  r"|\s+(?!\S)|\s+")
QWEN2_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")
# GGUF's name of a split -> (pattern, whether a text is first brought to Unicode's normal form NFC)
SPLITS = {"gpt-2": (GPT2_PATTERN, False), "smollm": (DIGITS_PATTERN, False), "llama-bpe": (LLAMA3_PATTERN, False),
          "qwen2": (QWEN2_PATTERN, True)}
FAMILY = {"gpt2": "gpt-2", "qwen2": "qwen2", "qwen3": "qwen2"}  # model_type -> what goes with its vocab.json and merges.txt
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2 spells these bytes as they are, others by U+0100 ...
BYTE_OF = {chr(b): b for b in _VISIBLE} | {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*_VISIBLE}))}


def has_files(path):
    lists = (path / "vocab.json").is_file() and (path / "merges.txt").is_file()
    return path.suffix == ".gguf" or (path / "tokenizer.json").is_file() or lists


def read_tokenizer_files(path):
    """Return ({bytes of each text token: our id}, pattern, nfc, ids, special) of a folder or GGUF file, for Tokenizer.

    ids: for each of ours the model's, -1 for a byte that has none there. special: {spelling: the model's id} of other tokens.
    Raises UserError for what tiktoken is known to encode otherwise.
    """
    check(has_files(path), f"{path} holds no tokenizer.json, nor vocab.json with merges.txt")
    read = _from_gguf if path.suffix == ".gguf" else _from_json if (path / "tokenizer.json").is_file() else _from_lists
    try:
        return _laid_out(path, *read(path))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its tokenizer cannot be read ({type(error).__name__}: {error})") from error


def _from_gguf(path):
    meta, _ = read_gguf(path)
    kind, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    check(kind == "gpt2" and pre in SPLITS, f"{path}: tokenizer {kind!r}, pre {pre!r}; known: 'gpt2' with {', '.join(SPLITS)}")
    tokens = {token: i for i, token in enumerate(meta["tokenizer.ggml.tokens"])}
    added = {token: i for token, i in tokens.items() if meta["tokenizer.ggml.token_type"][i] != 1}
    return tokens, meta["tokenizer.ggml.merges"], added, *SPLITS[pre]


def _from_json(path):
    content = read_json(path / "tokenizer.json", {"model": OBJECT})
    model, normal, pre = content["model"], (content.get("normalizer") or {}).get("type"), content.get("pre_tokenizer") or {}
    model.setdefault("type", "BPE" if "merges" in model else None)  # as in GPT-2's old file
    other = [key for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(key)]
    check(model["type"] == "BPE" and not other, f"{path}: tokenizer {', '.join([str(model['type']), *other])}; only "
                                                    f"byte-level BPE is known")
    check(normal in (None, "NFC"), f"{path}: normalizer {normal}; only NFC is known")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False}
    known = {GPT2_PATTERN: [byte_level], DIGITS_PATTERN: [{"type": "Digits", "individual_digits": True}, byte_level]}
    for pattern in (LLAMA3_PATTERN, QWEN2_PATTERN):
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        known[pattern] = [split, byte_level | {"use_regex": False}]
    steps = [{k: v for k, v in step.items() if k != "trim_offsets" and (k, v) != ("use_regex", True)}  # True is the default
             for step in pre.get("pretokenizers", [pre])]
    pattern = next((pattern for pattern, its_steps in known.items() if its_steps == steps), None)
    check(pattern, f"{path}: pre_tokenizer {json.dumps(steps)}; known are ByteLevel, Digits (individual) + ByteLevel, and "
                   f"Llama 3's and Qwen2's Split (isolated) + ByteLevel, all without add_prefix_space")
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    return model["vocab"], model["merges"], added, pattern, normal == "NFC"


def _from_lists(path):
    config = path / "config.json"
    kind = read_json(config, {"model_type": TEXT})["model_type"] if config.is_file() else "gpt2"
    check(kind in FAMILY, f"{path}: vocab.json and merges.txt do not say how {kind!r} splits a text; tokenizer.json is needed")
    lines = as_text((path / "merges.txt").read_bytes(), path / "merges.txt").splitlines()
    merges = [line for line in lines if line and not line.startswith("#version:")]
    return read_json(path / "vocab.json"), merges, {}, *SPLITS[FAMILY[kind]]


def _laid_out(path, vocab, merges, added, pattern, nfc):
    """Return the result, from {spelling: id}, merges in their order, and the tokens that are none of text."""
    made = [vocab["".join(merge.split(" ") if isinstance(merge, str) else merge)] for merge in merges]
    check(made == sorted(made), f"{path}: merges are not in the order of the ids that they make, as tiktoken has them")
    is_text = {*made, *(vocab[c] for c in BYTE_OF if c in vocab)} - {*added.values()}
    text, spelling = sorted(is_text), {i: token for token, i in vocab.items()}
    special = {token: i for token, i in vocab.items() if i not in is_text} | added
    odd = [token for token, i in special.items() if i in made or not re.fullmatch("<.*>", token)]  # they are text, then
    check(not odd, f"{path}: {len(odd)} tokens are no marks as <s> is, but no merge, or more than one rule makes them, as "
                   f"tiktoken cannot ({str(odd[:3])[1:-1]})")
    odd = [spelling[i] for i in text if not {*spelling[i]} <= BYTE_OF.keys()]
    check(not odd, f"{path}: {len(odd)} tokens are not spelled in bytes, as GPT-2's are ({str(odd[:3])[1:-1]})")
    tokens = [bytes(BYTE_OF[c] for c in spelling[i]) for i in text]
    alone = sorted({bytes([b]) for b in range(256)} - {*tokens})
    return {token: i for i, token in enumerate(tokens + alone)}, pattern, nfc, text + [-1] * len(alone), special
