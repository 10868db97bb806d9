"""The docs cannot rot: every command parses, every file, function and flag that is named exists, and the quick start runs."""
import ast
import importlib
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.cli import parse

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "results").glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(text):
    """Return [(script, words)] of the shell blocks of a text: what is called, and with what."""
    found = []
    for block in BLOCK.findall(text):
        for line in re.split(r"\n|; do |; done", block.replace("\\\n", " ")):
            words = shlex.split(re.sub(r"\$\w+", "0", line), comments=True)
            script = next((i for i, word in enumerate(words) if word.endswith(".py") and not word.startswith("tests/")), None)
            if script is not None and ("python" in words[0] or words[0] == "torchrun"):
                found.append((words[script], words[script + 1:]))
    return found


def flags_of(script):
    return importlib.import_module(script.removesuffix(".py").replace("/", ".")).Config.__dataclass_fields__


def inline(text):
    """Return the pieces of inline code of a text, outside of its blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: str(doc.relative_to(ROOT)))
def test_every_command_parses(doc):
    for script, words in commands(doc.read_text(encoding="utf-8")):
        assert (ROOT / script).is_file(), script
        if script == "exercises.py":  # words, no flags; tests/exercises.py has the same name
            own = runpy.run_path(str(ROOT / script))
            command, *words = words
            if command != "grade":  # whose words are folders
                assert len(words) == len(own["WORDS"][command].split()) and {*words[:1]} <= {*own["tasks"]()}, words
        elif script not in ("nano.py", "tests/stress.py") and "..." not in words:
            parse(importlib.import_module(script.removesuffix(".py").replace("/", ".")).Config, words)


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: str(doc.relative_to(ROOT)))
def test_every_flag_that_is_named_exists(doc):
    scripts = [path.relative_to(ROOT).as_posix() for folder in (".", "data", "experiments", "pretrained")
               for path in sorted((ROOT / folder).glob("*.py")) if "\nclass Config" in path.read_text(encoding="utf-8")]
    everything = {flag for script in scripts for flag in flags_of(script)}
    others = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_id", "rdzv_endpoint", "no-deps", "set-upstream", "help"}
    others |= {"anneal_steps"} if doc.name == "older.md" else set()  # results keep the names of their time
    for code in inline(doc.read_text(encoding="utf-8")):
        called = next((script for script in scripts if re.match(rf"(python )?{re.escape(script)}\b", code)), None)
        own = set(flags_of(called)) if called else everything
        for flag in re.findall(r"(?<![\w-])--([a-z]\w+)", code):
            assert flag in own | others, f"{doc.name}: `{code}` has no --{flag}"


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: str(doc.relative_to(ROOT)))
def test_every_file_and_function_that_is_named_exists(doc):
    text = doc.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (doc.parent / target).exists(), target
    for code in inline(text):
        match = re.fullmatch(r"((?:\w+/)*\w+\.(?:py|sh))(?::\s*([\w., ]+))?", code)
        if match is None:
            continue
        path = ROOT / match[1]
        assert path.is_file() or list(ROOT.glob(f"*/{match[1]}")), f"{doc.name}: `{code}`"
        if match[2]:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            known = {name for node in ast.walk(tree) for name in names_of(node)}
            for name in re.split(r"[.,]\s*", match[2].strip()):
                assert name in known, f"{doc.name}: `{code}`: no {name}"


def names_of(node):
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    return [t.id for t in getattr(node, "targets", ()) if isinstance(t, ast.Name)] if isinstance(node, ast.Assign) else []


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: str(doc.relative_to(ROOT)))
def test_every_checkpoint_is_made_before_it_is_used(doc):
    readme = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    own = commands(doc.read_text(encoding="utf-8"))
    made = set() if doc == DOCS[0] else {out_of(*command) for command in readme}
    for script, words in own:
        new = out_of(script, words)
        for word in words:
            folder = word.split("=")[-1]
            if re.fullmatch(r"out/\w+", folder) and folder != new:
                assert folder in made or "demo" in folder, f"{doc.name}: {script} uses {folder}, which nothing made before"
        made.add(new)


def out_of(script, words):
    """Return the folder that a command makes, or None."""
    if script == "ar2diff.py":
        return words[1]
    return next((word.split("=")[1] for word in words if word.startswith("--out_dir=")), None)


def test_the_readme_is_one_page():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    tables = sum(bool(re.match(r"\|[-| ]+\|$", line)) for line in lines)
    assert len(lines) <= 200 and max(map(len, lines)) <= 100 and tables <= 3 and len(" ".join(lines).split()) <= 1600


def test_make_has_every_target_that_is_named():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for doc in DOCS:
        for target in re.findall(r"^make (\w+)", "\n".join(BLOCK.findall(doc.read_text(encoding="utf-8"))), re.MULTILINE):
            assert f"\n{target}:" in makefile, f"{doc.name}: make {target}"


# What makes a command of the quick start quick: flags of a script that stand in for its own.
SHRUNK = {"train_ar.py": {"steps": 2, "batch_size": 4, "eval_sequences": 4, "device": "cpu"},
          "train_diff.py": {"steps": 2, "batch_size": 4, "eval_sequences": 4, "device": "cpu"},
          "eval.py": {"n_examples": 2, "device": "cpu"}, "sample.py": {"device": "cpu"},
          "experiments/compare.py": {"n_examples": 2}}


@pytest.mark.slow
def test_the_quick_start_runs_as_it_stands_in_a_copy_with_fewer_steps(tmp_path):
    ignored = shutil.ignore_patterns(".git", ".venv", "out", "prepared", "downloads", "tests", "results", "__pycache__", ".*")
    home = shutil.copytree(ROOT, tmp_path / "home", ignore=ignored)
    (home / "input.txt").write_text("ROMEO: But soft, what light\n" * 400, encoding="utf-8")
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Train on a CPU")[1].split("\n## ")[0]
    quick = commands(section)
    assert len(quick) > 12
    chain = []
    for script, words in quick:
        small = SHRUNK.get(script, {})
        words = [word for word in words if word.lstrip("-").split("=")[0] not in small]
        words += [f"--{flag}={value}" for flag, value in small.items()]
        words += ["--sources=input.txt"] if (script, words) == ("data/prepare.py", ["text"]) else []
        words += ["--n_train=40"] if (script, words) == ("data/prepare.py", ["code"]) else []
        chain.append((script, words))
    one_interpreter = """import json, os, runpy, sys
for script, words in json.loads(sys.argv[1]):
    print(script, *words, file=sys.stderr)
    sys.argv, sys.path[0] = [script, *words], os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")"""  # importing torch for each would take most of the time
    result = subprocess.run([sys.executable, "-c", one_interpreter, json.dumps(chain)], cwd=home, text=True,
                            capture_output=True)
    assert result.returncode == 0, result.stderr
