"""The house: imports point one way, nothing happens on import, every script has its help, and files stay small."""
import ast
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WINGS = ("engine", "data", "scoring", "pretrained", "beyond", "experiments")
FILES = sorted(path for folder in (ROOT, *(ROOT / wing for wing in WINGS)) for path in folder.glob("*.py"))
CORE = ("model", "autoregressive", "diffusion", "ar2diff", "train_loop", "train_ar", "train_diff")
# Who may import whom: a file imports from floors below its own, and within its wing.
FLOORS = (("engine",), ("data", "scoring"), ("model",), ("autoregressive",), ("diffusion",), ("pretrained",), ("beyond",),
          ("ar2diff",), ("start",), ("train_loop",), ("train_ar", "train_diff", "sample"), ("eval",), ("experiments",),
          ("demo", "reproduce", "exercises"))


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports_of(path):
    """Return the project's modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(map(name_of, FILES))


GRAPH = {name_of(path): imports_of(path) for path in FILES}
SCRIPTS = [path for path in FILES if "if __name__ ==" in path.read_text(encoding="utf-8")
           and name_of(path) not in ("nano", "exercises")]  # exercises has words, not flags: test_exercises.py


def test_the_top_folder_holds_at_most_14_python_files():
    assert len(list(ROOT.glob("*.py"))) <= 14


def test_imports_point_one_way():
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    for importer, imported in ((a, b) for a, many in GRAPH.items() for b in many):
        here, there = importer.split(".")[0], imported.split(".")[0]
        assert here == there or floor[here] > floor[there], f"{importer} imports {imported}, which is not below it"


def test_there_is_no_circle():
    below = {}

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in below:
            below[name] = [visit(other, [*path, name]) for other in GRAPH[name]]
    for name in GRAPH:
        visit(name, [])


def test_nano_imports_torch_and_the_standard_library_only():
    tree = ast.parse((ROOT / "nano.py").read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= {"torch", *sys.stdlib_module_names}


def test_importing_does_nothing(tmp_path):
    code = ("import importlib, os, sys, torch\n"
            "before = sys.path[:], torch.get_num_threads(), torch.initial_seed(), torch.get_float32_matmul_precision()\n"
            f"for name in {sorted(GRAPH)!r}: importlib.import_module(name)\n"
            "assert before == (sys.path, torch.get_num_threads(), torch.initial_seed(), torch.get_float32_matmul_precision())")
    result = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""},
                            capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "") and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_a_script_shows_its_help_from_any_working_directory(script, tmp_path):
    result = subprocess.run([sys.executable, script, "-h"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("usage: python ") and not result.stderr
    assert "--" in result.stdout or "positional arguments" in result.stdout


def test_files_and_functions_stay_small():
    lines = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    yours = "lines; an addition of your own? Raise this bound"
    assert lines["nano"] <= 150 and lines["diffusion"] <= 260, f"diffusion.py has {lines['diffusion']} {yours}"
    assert sum(lines[name] for name in CORE) <= 1050 and sum(lines.values()) <= 7200, f"{sum(lines.values())} {yours}"
    assert sum(n for name, n in lines.items() if name.startswith("pretrained.")) <= 600
    assert not {name: n for name, n in lines.items() if n > 300}
    functions = ((f"{name_of(path)}: {node.name}", node.end_lineno - node.lineno + 1) for path in FILES
                 for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef))
    assert not {name: n for name, n in functions if n > (90 if name == "train_loop: train" else 40)}


def test_no_local_name_hides_a_function_or_an_import_of_its_file():
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = (alias.asname or alias.name.split(".")[0] for node in tree.body
                    if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names)
        known = {*imported, *(n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)))}
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            stored = (n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
            hidden = known & {*stored, *(a.arg for a in itertools.chain(function.args.args, function.args.kwonlyargs))}
            assert not hidden, f"{name_of(path)}: {function.name} hides {hidden}"
