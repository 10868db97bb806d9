"""Sources of pretraining text: any files and folders, and the standard library that every Python brings along.

A source is FILE:weight or FOLDER:weight (weight 1 if left out). Of a folder: .txt .py .md, also .gz and .xz of them, hidden
folders left out; a file that is named itself may end in anything. UTF-8; line ends become \\n; nothing else is changed or
dropped, not even empty lines. A file is one document. Embedded: stdlib:docs, the docstrings and the language reference of the
running Python, and stdlib:code, its source; both differ a little from one Python version to the next.
"""
import ast
import math
import os
import re
import sysconfig
from collections import namedtuple
from pathlib import Path

from data.originals import DAMAGED, OPEN
from engine.cli import UserError, check
from engine.files import not_utf8

PIECE = 1 << 18  # characters read at a time: memory use does not depend on the size of a corpus
Source = namedtuple("Source", "name weight files read")  # read(path) yields the text of that document, in pieces


def read_pieces(path):
    """Yield the text of a UTF-8 file, plain, .gz or .xz, in pieces that end before a newline. UserError for other bytes."""
    text = ""
    with OPEN.get(path.suffix.lower(), open)(path, "rt", encoding="utf-8-sig") as file:  # -sig: without the mark of Windows
        try:
            while block := file.read(PIECE):
                text += block
                # Every tokenizer's pattern has a border between a visible character and a newline: a cut there is harmless.
                cut = re.match(r".*\S(?=\n)|.*", text, re.DOTALL).end()  # not one in PIECE characters: a token may split
                yield text[:cut]
                text = text[cut:]
        except UnicodeDecodeError as error:
            raise not_utf8(error, path, file.buffer.tell() - len(error.object)) from error
        except DAMAGED as error:
            raise UserError(f"{path} is damaged: {error}") from error
    yield text


def read_code(path):
    if path.parent.name not in ("encodings", "pydoc_data"):  # long tables, which are no code to learn from
        yield from read_pieces(path)


def read_docs(path):
    """Yield the docstrings of a module, in their order in the file."""
    tree = ast.parse("".join(read_pieces(path)))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    documented = [node for node in ast.walk(tree) if isinstance(node, kinds) and ast.get_docstring(node)]
    texts = [ast.get_docstring(node) for node in sorted(documented, key=lambda node: node.body[0].lineno)]
    if path.parts[-2:] == ("pydoc_data", "topics.py"):  # the language reference behind help(), as {topic: text}
        texts += ast.literal_eval(tree.body[-1].value).values()
    if texts:
        yield "\n\n".join(texts) + "\n"


def stdlib_files():
    root = Path(sysconfig.get_path("stdlib"))
    # Tests are mostly data, packages are not ours to take, and _sysconfigdata describes one machine.
    skip = re.compile(r"(^|/)(test|tests|idle_test|site-packages|dist-packages|_sysconfigdata[^/]*)(/|$)")
    files = [path for path in root.rglob("*.py") if not skip.search(path.relative_to(root).as_posix())]
    check(files, f"this Python has no source of its standard library in {root}; name your own text with --sources")
    return sorted(files, key=Path.as_posix)


def text_files(place):
    path = Path(os.path.expanduser(place))
    check(path.exists(), f"source {place!r} does not exist; a source is FILE:weight, FOLDER:weight, {' or '.join(EMBEDDED)}")
    if not path.is_dir():
        return [path]
    files = [file for file in path.rglob("*") if re.search(r"\.(txt|py|md)(\.gz|\.xz)?$", file.name, re.IGNORECASE)
             and file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)]  # .git, .venv
    check(files, f"source {place!r}: no .txt, .py or .md file in that folder, nor .gz or .xz of them")
    return sorted(files, key=Path.as_posix)  # the file system's own order differs from machine to machine


EMBEDDED = {"stdlib:docs": read_docs, "stdlib:code": read_code}


def parse_sources(text):
    """Turn 'FILE_OR_FOLDER:weight,...' into a list of Source. Raises UserError for a source that is not there."""
    sources = []
    for item in text.split(","):
        # The last colon starts a weight only where a number follows: C:\books and stdlib:code have colons of their own.
        match = re.fullmatch(r"(.*?)(?::([-+]?\d*\.?\d+(?:e[-+]?\d+)?))?", item.strip(), re.IGNORECASE | re.DOTALL)
        place, weight = match[1], float(match[2] or 1)
        check(place, f"sources={text!r} holds an empty source; write FILE_OR_FOLDER:weight,FILE_OR_FOLDER:weight")
        check(0 < weight < math.inf, f"source {place!r}: weight {match[2]} must be above 0")
        files, read = (stdlib_files(), EMBEDDED[place]) if place in EMBEDDED else (text_files(place), read_pieces)
        stem = place.split(":")[1] if place in EMBEDDED else Path(os.path.expanduser(place)).resolve().name.split(".")[0]
        stem = re.sub(r"[^a-z0-9_-]+", "_", stem.lower()) or "source"
        names, taken = (f"{stem}{n}" for n in ("", *range(2, len(sources) + 2))), {source.name for source in sources}
        sources.append(Source(next(name for name in names if name not in taken), weight, files, read))
    return sources


def pieces(source, separator=None):
    """Yield a source in pieces, and one None between two documents that hold text: two files, or what a separator parts."""
    begun = due = False
    for path in source.files:
        due = begun
        for piece in split(source.read(path), separator) if separator else source.read(path):
            if piece is None:
                due = begun
            elif piece:
                yield from [None] * due
                begun, due = True, False
                yield piece


def split(texts, separator):
    """Yield what lies between separators, None in their place; a piece of text may end within one, which then waits as rest."""
    rest = ""
    for text in texts:
        *whole, last = (rest + text).split(separator)
        for document in whole:
            yield from (document, None)
        n = next((n for n in range(len(separator) - 1, 0, -1) if last.endswith(separator[:n])), 0)
        yield last[:len(last) - n]
        rest = last[len(last) - n:]
    yield rest
