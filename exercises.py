"""Exercises: a function of this repository is taken out, and you write it again.

    python exercises.py list
    python exercises.py start 1 ../mine       # copies the project to ../mine/, without the function of task 1
    cd ../mine; python exercises.py check 1   # says in words what is not right yet
    python exercises.py hint 1                # or diff 1: your file beside the original
    python exercises.py grade class/*         # runs and checks such folders of others: a line of JSON each

docs/exercises.md has the tasks, tests/exercises.py what is checked. The solution is the repository's own function.
"""
import ast
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from engine.cli import UserError, check, one_of, run

ROOT = Path(__file__).resolve().parent
WORDS = {"list": "", "start": "N FOLDER", "check": "N", "hint": "N", "diff": "N", "grade": "FOLDER..."}  # of each command
STARTED = "exercise.json"  # in a folder made by start(): [task, text of its file as it was]
SECONDS = 120  # for a check
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "venv", "out", "downloads", "prepared", "results")
TASK = re.compile(r"^### (?P<number>\d+)\. (?P<title>[^\n]+)\n"
                  r"(?P<text>(`(?P<file>[\w/]+\.py): (?P<name>[\w.]+)`(?P<short> \(docstring: first line\))?)?.+?)\s*"
                  r"<details><summary>Hint</summary>\s*(?P<hint>.+?)\s*</details>", re.MULTILINE | re.DOTALL)


def tasks():
    """Return {number: the named parts of TASK} from docs/exercises.md. A question has no file and no name: both are None."""
    return {m["number"]: m.groupdict() for m in TASK.finditer((ROOT / "docs" / "exercises.md").read_text(encoding="utf-8"))}


def blanked(text, task):
    """Return the Python text with the body of the task's function, loss or Uniform.loss, taken out but for its docstring."""
    node, lines = ast.parse(text), text.split("\n")
    for part in task["name"].split("."):
        node = next(n for n in node.body if getattr(n, "name", None) == part)
    doc = node.body[0]
    kept = [lines[doc.lineno - 1] + '"""'] if task["short"] else lines[doc.lineno - 1:doc.end_lineno]  # the rest would tell
    gap = f"{' ' * doc.col_offset}raise NotImplementedError(\"task {task['number']}: write me\")"
    return "\n".join([*lines[:doc.lineno - 1], *kept, gap, *lines[node.end_lineno:]])


def start(task, folder):
    """Copy the project into a new folder, without the function of a task. Raises UserError where that cannot be done."""
    check(not (ROOT / STARTED).exists(), f"{ROOT} is the folder of an exercise; start the next one from the project itself")
    try:
        check(not folder.is_file() and not any(folder.glob("*")), f"{folder} is a file or not empty; choose another folder")
        check(ROOT not in folder.resolve().parents, f"{folder} lies in the project that would be copied; choose one outside")
        shutil.copytree(ROOT, folder, ignore=LEFT_OUT, dirs_exist_ok=True)
        text = (ROOT / task["file"]).read_text(encoding="utf-8")
        (folder / task["file"]).write_text(blanked(text, task), encoding="utf-8")
        (folder / STARTED).write_text(json.dumps([task["number"], text]), encoding="utf-8")
    except (OSError, RuntimeError) as error:
        why = error.args[0][0][-1] if isinstance(error, shutil.Error) else error  # of its many files the first
        raise UserError(f"cannot write {folder}: {why}") from error
    print(f"cd {folder}; python exercises.py check {task['number']}  # when this is written:\n\n{task['text']}")


def started(root, number=None):
    """Return (task, lines of the student's file, of the original) of a folder made for task `number`. Raises UserError."""
    try:
        own, original = json.loads((root / STARTED).read_text(encoding="utf-8"))
        lines = [x.split("\n") for x in ((root / tasks()[own]["file"]).read_text(encoding="utf-8-sig"), original)]
    except FileNotFoundError as error:
        raise UserError(f"no {error.filename}; python exercises.py start N FOLDER makes a folder to work in") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{root}: the exercise cannot be read ({error}); start again in a new folder") from error
    check(number in (None, own), f"{root} was started for task {own}, not {number}")
    return own, *lines


def verdict(root, number=None):
    """Return {"folder", "task", "solved", "said"} of a folder, as started() takes it; solved None: it cannot be checked."""
    own, solved = None, None
    try:
        own, *_ = started(root, number)
        ran = subprocess.run([sys.executable, ROOT / "tests" / "exercises.py", own], cwd=root, timeout=SECONDS,
                             env=os.environ | {"PYTHONPATH": str(root.resolve())}, capture_output=True, errors="replace")
        printed = ran.stdout.splitlines()
        sys.stderr.writelines(f"{line}\n" for line in printed[:-1])  # by the student's own print()
        said = (printed or ran.stderr.splitlines() or ["it ended without a word"])[-1]
        solved = None if ran.returncode == 2 else ran.returncode == 0 and "checks hold" in said
    except subprocess.TimeoutExpired:
        said = f"{root}: it does not end, and was stopped after {SECONDS} seconds"
    except UserError as error:
        said = str(error)
    return {"folder": str(root), "task": own, "solved": solved, "said": said}


def main(argv=None):
    command, *words = (sys.argv[1:] if argv is None else argv) or ["-h"]
    if command in ("-h", "--help"):
        return print(f"usage: python exercises.py {' | '.join(f'{name} {WORDS[name]}'.strip() for name in WORDS)}\n\n{__doc__}")
    wanted = WORDS[one_of("command", command, WORDS)]
    check(words if command == "grade" else len(words) == len(wanted.split()), f"say: python exercises.py {command} {wanted}")
    if command == "list":
        return print("\n".join(f"{number:>3s}  {task['title']}" for number, task in tasks().items()))
    if command == "grade":
        return sys.stdout.writelines(f"{json.dumps(verdict(Path(folder)))}\n" for folder in words)
    task = tasks()[number := one_of("task", words[0], tasks())]
    if command == "hint":
        return print(task["hint"])
    check(task["file"], f"task {number} is a question, there is nothing to write; python exercises.py hint {number} answers it")
    if command == "start":
        return start(task, Path(words[1]))
    if command == "diff":
        _, *lines = started(ROOT, number)
        return print("\n".join(difflib.unified_diff(*lines, "yours", "the original", lineterm="")) or "no difference")
    found = verdict(ROOT, number)
    check(found["solved"] is not None, found["said"])
    print(f"task {number}: {'solved' if found['solved'] else 'not yet'}. {found['said']}")
    sys.exit(0 if found["solved"] else 1)


if __name__ == "__main__":
    run(main)
