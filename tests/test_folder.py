"""data/folder.py: a folder is the old one or the new one, whatever stops the writing, and never somebody else's."""
from pathlib import Path

import pytest

from data.folder import draft_of
from engine.cli import UserError

MINE = {"meta.json": "{}", "train.books.bin": "ids", "valid.jsonl": "rows"}


def write(out, files, overwrite=True):
    with draft_of(out, overwrite) as draft:
        for name, content in files.items():
            (draft / name).write_text(content, encoding="utf-8")


def files(folder):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def test_the_new_folder_takes_the_place_of_the_old_one_whole(tmp_path):
    write(tmp_path / "deep" / "out", MINE, overwrite=False)
    assert files(tmp_path) == {f"deep/out/{name}": content for name, content in MINE.items()}
    write(tmp_path / "deep" / "out", {"test.jsonl": "new"})
    assert files(tmp_path) == {"deep/out/test.jsonl": "new"}


@pytest.mark.parametrize("name", ["thesis.tex", "train.py", "train.csv", "training.jsonl", "train.mine.jsonl", "meta.json2"])
def test_a_file_that_no_preparation_writes_is_never_deleted(tmp_path, name):
    write(tmp_path / "out", MINE)
    (tmp_path / "out" / name).mkdir()
    with pytest.raises(UserError, match=f"holds more than prepared data .{name}"):
        write(tmp_path / "out", {"test.jsonl": "new"})
    assert files(tmp_path / "out") == MINE and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt(), UserError("bad line")])
@pytest.mark.parametrize("last", [0, 1, 2])
def test_a_stop_at_any_point_leaves_the_old_folder(tmp_path, monkeypatch, error, last):
    """While the files are written (0), and at either of the two renames that follow."""
    write(tmp_path / "out", MINE)
    renames, real = [], Path.rename

    def rename(self, target):
        renames.append(target)
        if len(renames) == last:
            raise error
        return real(self, target)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
        with draft_of(tmp_path / "out", True) as draft:
            (draft / "test.jsonl").write_text("new", encoding="utf-8")
            if last == 0:
                raise error
    assert files(tmp_path / "out") == MINE and [path.name for path in tmp_path.iterdir()] == ["out"]
