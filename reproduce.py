"""The paper's tables and figures at a chosen scale, with means over seeds and standard errors.

    python reproduce.py --scale=demo --what=table2
    python reproduce.py --scale=cpu --what=all --allow_code_execution       # code tasks run the models' programs
    python reproduce.py --scale=cpu --what=all --draw                       # tables and pictures again, from what is known

What is done is kept in OUT/SCALE and never done twice: stop it at any time, start it again, let several work on it. Experiments
are in experiments/tables.py, how they are run in experiments/cells.py; results/README.md reads the numbers.
"""
from dataclasses import dataclass
from pathlib import Path

from engine.cli import check, one_of, parse, run
from engine.devices import n_cores
from engine.files import LIST, read_json, write_json
from experiments import bench, report, tables
from experiments.cells import Store
from experiments.plot import picture


@dataclass
class Config:
    scale: str = "demo"  # demo (minutes), cpu (hours of two cores), gpu or paper
    what: str = "table2"  # table1-3, figure3, bits, curves, decoders, infill, knobs, plan, rates, recipes, all; (recipes_)real
    dry_run: bool = False  # print what would be run, with FLOPs and minutes, and stop
    refresh: bool = False  # measure again what another version of the code measured
    draw: bool = False  # write tables and pictures from what is known, and run nothing
    allow_code_execution: bool = False  # run the programs that the models write: see the warning in scoring/sandbox.py
    out: str = "out/reproduce"  # OUT/SCALE/TABLE.json, .md and .png, and all that they are made of


def chosen(config):
    """Return the names of the tables. Raises UserError for one that is not there or cannot be run."""
    one_of("scale", config.scale, tables.SCALES)
    everything = [*(name for name in tables.TABLES if "real" not in name), "figure3"]  # those want downloads
    names = [one_of("what", name, [*everything, *tables.TABLES, "all"]) for name in config.what.split(",")]
    names = [*everything, *(name for name in names if "real" in name)] if "all" in names else names
    if "plan" in names and "plan" not in tables.SCALES[config.scale].tasks:
        check("all" in config.what, f"--what=plan: scale {config.scale!r} has no such task; take --scale=cpu")
        names.remove("plan")
    return names


def show_plan(store, name, cells):
    """Print what a table, or all of them, still need."""
    stages, open_cells = store.missing(cells)
    work = sum(job.work for job in [*stages, *open_cells])
    n = len({cell.key for cell in cells})
    print(f"{name:9s} {n - len(open_cells):4d} of {n:4d} cells done, {len(stages):4d} stages to train, "
          f"{work / 1e12:9.1f} TFLOP, about {work / store.rate() / n_cores() / 60:7.1f} minutes of {n_cores()} cores")


def draw(folder, name, entries, cost=None):
    """Draw scores against what columns count, or a cost; a picture for each task. Lone points are left out, but of recipes."""
    pictures, counted = {}, {"decoders": "decoding steps", "real": "examples of fine-tuning"}.get(name, "fine-tuning steps")
    for e in entries:
        task, _, number = e["column"].rpartition(" ")
        if number.isdigit() or cost and "recipes" in name:
            task, x = task if number.isdigit() else e["column"].split(",")[0], e[cost] if cost else int(number)
            pictures.setdefault((task, e["metric"]), {}).setdefault(e["row"], []).append((x, e["mean"], e["se"]))
    for (task, metric), lines in pictures.items():
        some = max(map(len, lines.values()))
        lines = {row: sorted(points) for row, points in lines.items() if len(points) > 1 or some == 1 or "recipes" in name}
        short = f"_{cost.removeprefix('training_')}" if cost else ""
        picture(lines, folder / f"{name}{short}_{task.replace(', ', '_')}.png", (cost or counted).replace("_", " "),
                f"{metric}, %", title=task, xscale="log")


def main(argv=None):
    config = parse(Config, argv)
    names, folder = chosen(config), Path(config.out, config.scale)
    store, lab = Store(folder), tables.Lab(tables.SCALES[config.scale], folder)
    if not (config.dry_run or config.draw):
        lab.prepare(names)
    plans = {name: tables.all_cells(name, lab) for name in names if name != "figure3"}
    cells = [cell for plan in plans.values() for cell in plan]
    if config.dry_run:
        for name, plan in plans.items():
            show_plan(store, name, plan)
        show_plan(store, "together", cells)  # shared stages count once
        if "figure3" in names:
            print("figure3 is not counted: experiments/bench.py, some minutes")
        return None
    check(config.draw or config.allow_code_execution or not any(dict(cell.flags).get("allow_code_execution") for cell in cells),
          "code tasks run programs that a model wrote; read the top of scoring/sandbox.py, then say --allow_code_execution")
    if not config.draw:
        store.refuse_other_code(cells, config.refresh)
    for name, plan in plans.items():
        if not config.draw:
            store.run(plan)
        (function, reference), entries = tables.TABLES[name], report.collect(plan, map(store.done, plan))
        if config.draw and not entries:  # cells need not be at hand: a table's own file has its numbers
            then = f"; --what={name}, without --draw, makes it"
            entries = read_json(folder / f"{name}.json", {"entries": LIST}, then)["entries"]
        write_json(folder / f"{name}.json", {"reference": reference, "entries": entries}, "out")
        draw(folder, name, entries)
        if name == "real":
            draw(folder, name, [e for e in entries if (e.get("training_seconds") or 0) > 0], "training_seconds")
        for cost in ("evaluations", "seconds") if "recipes" in name else ():
            draw(folder, name, [e for e in entries if "FLOPs" not in e["row"]], cost)
        costs = report.costs(entries) if "recipes" in name else []
        report.show(folder, name, function.__doc__, [*report.markdown(entries, reference), *costs])
    if "figure3" in names:
        bench.figure3(folder, lab, config.draw, config.refresh)
    return {name: read_json(folder / f"{name}.json") for name in plans}


if __name__ == "__main__":
    run(main)
