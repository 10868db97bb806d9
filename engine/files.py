"""Files: what users give is read as UTF-8 and checked before anything is built of it; what is written is there whole or not.

    meta = read_json(path, {"kind": TEXT, "input_len?": integer()})    # a dict that fits, else a UserError
    with replacing(path) as file: file.write(...)                    # killed at any time, `path` is the old file or the new one
"""
import hashlib
import json
import math
import os
from contextlib import contextmanager, suppress
from pathlib import Path

from engine.cli import UserError, check

MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def not_utf8(error, where, n_before):
    """Return the UserError of an error in decoding bytes that lie behind n_before others; UTF-16 and UTF-32 are named."""
    data, at = error.object, error.start
    other = next((name for mark, name in MARKS.items() if data.startswith(mark) and not n_before), None)
    return UserError(f"{where} is {other}, not UTF-8; convert it first" if other else
                     f"{where} is not UTF-8: byte {n_before + at} is 0x{data[at]:02x}; convert it first")


def as_text(data, where):
    """Return bytes as text, a byte order mark left out. Raises UserError for what is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(error, where, len(data) - len(error.object)) from error


# ---- what a dict must hold: {key: (what it must be, in words; a test), or such a dict}; key? may be missing ----
TEXT = "a string", lambda x: isinstance(x, str)
TEXTS = "a list of at least one string", lambda x: isinstance(x, list) and x != [] and all(isinstance(y, str) for y in x)
OBJECT, LIST = ("an object", lambda x: isinstance(x, dict)), ("a list", lambda x: isinstance(x, list))
NUMBER = "a finite number", lambda x: type(x) in (int, float) and math.isfinite(x)


def integer(low=0, high=1 << 53):
    return f"a whole number, {low} or more", lambda x: type(x) is int and low <= x <= high


def fitting(found, schema):
    """Return `found`, which must be a dict of this schema. Raises ValueError that says what does not fit."""
    if not isinstance(found, dict):
        keys = " and ".join(repr(key) for key in schema if key[-1] != "?")
        raise ValueError(f"an object with {keys} is needed, not a {type(found).__name__}")
    for key, rule in schema.items():
        name = key.rstrip("?")
        if name not in found and name == key:
            raise ValueError(f"{name!r} is missing")
        if name in found and isinstance(rule, dict):
            fitting(found[name], rule)
        elif name in found and not rule[1](found[name]):
            raise ValueError(f"{name!r} must be {rule[0]}, not {str(found[name])[:40] or repr(found[name])}")
    return found


def parse_json(text, schema=None):
    """Return what JSON text holds. Raises ValueError for other text, for what is nested too deep or does not fit the schema."""
    try:
        found = json.loads(text)
        text = json.dumps(found, ensure_ascii=False).encode()  # json reads "\ud800", no tokenizer can
    except UnicodeEncodeError:
        raise ValueError("it contains half of a surrogate pair, which is no character") from None
    except (ValueError, RecursionError) as error:
        reason = str(error).split(": line 1")[0] if text.strip() else "an empty line"
        raise ValueError(f"not JSON ({reason})") from error
    return fitting(found, schema) if schema else found


def read_json(path, schema=None, then=""):
    """Return what a JSON file holds, a dict that fits the schema if there is one. Raises UserError; `then` says what to do."""
    try:
        return parse_json(as_text(Path(path).read_bytes(), path), schema)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error.strerror if isinstance(error, OSError) else error}{then}") from error


def content_hash(paths):
    """Return a hash of what files are called and hold, wherever they lie."""
    found = hashlib.sha256()
    for path in sorted(paths):
        with open(path, "rb") as file:
            found.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:16]


@contextmanager
def replacing(path, mode="w"):
    """Yield a file that becomes `path` when the with-block ends: flushed to the disk, then renamed. Else nothing is left."""
    partial = Path(f"{path}.partial")
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink()


def check_new(path, flag):
    """Raise UserError unless write_new(path, ..., flag) can write there later; leaves nothing. None is no path."""
    if path is not None:
        check(not os.path.exists(path), f"--{flag}={path} exists; it is not overwritten")
        write_new(path, "", flag)
        os.unlink(path)


def write_new(path, text, flag):
    """Write a file, as replacing() does. Raises UserError."""
    try:
        with replacing(path) as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"cannot write --{flag}={path}: {error.strerror}") from error


def write_json(path, facts, flag):
    """Write facts as JSON, which has no nan: null. As write_new() does."""
    plain = lambda x: ({key: plain(value) for key, value in x.items()} if isinstance(x, dict) else
                       [plain(value) for value in x] if isinstance(x, (list, tuple)) else None if x != x else x)
    write_new(path, json.dumps(plain(facts), indent=1) + "\n", flag)
