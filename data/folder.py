"""Prepared data, text or task, is written to a folder beside its place, which is renamed at the end: see draft_of()."""
import os
import re
import shutil
from contextlib import contextmanager

from engine.cli import UserError, check

OURS = re.compile(r"meta\.json|(train|valid|test)\.(jsonl|.*\.(bin|npz))")  # of prepared data: what overwriting may delete


@contextmanager
def draft_of(out, overwrite):
    """Yield an empty folder that becomes the Path `out` when the with-block ends; what stops it before leaves `out` as it was.

    Raises UserError if `out` is a file, holds more than prepared data, holds any without `overwrite`, or cannot be written.
    """
    draft, old = (out.with_name(f"{out.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        check(not out.is_file(), f"cannot prepare {out}: it is a file, and --out names a folder")
        there = [path.name for path in out.iterdir()] if out.exists() else []
        foreign = [name for name in there if not OURS.fullmatch(name)]
        check(not foreign, f"{out} holds more than prepared data ({min(foreign, default='')}); choose another --out")
        check(overwrite or not there, f"{out} is not empty; pass --overwrite to replace it, or another --out")
        draft.mkdir(parents=True)
        yield draft
        if out.exists():
            out.rename(old)
        draft.rename(out)
    except OSError as error:
        raise UserError(f"cannot prepare {out} ({error}); nothing was left behind") from error
    finally:
        if old.exists() and not out.exists():  # stopped between the two renames
            old.rename(out)
        for folder in (draft, old):
            shutil.rmtree(folder, ignore_errors=True)
