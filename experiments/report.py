"""From the results of cells to a table: means over seeds, standard errors, and marks where a difference may be luck."""
import math
from statistics import fmean, stdev


def summary(scores):
    """Return (mean, standard error, luck) of (score, error) pairs, one a seed.

    Luck is the error that the examples alone leave; no standard error is below it: equal scores of all seeds are not exact.
    """
    values, errors = zip(*scores)
    luck = fmean(errors) / math.sqrt(len(errors))
    return fmean(values), max(stdev(values) / math.sqrt(len(values)), luck) if len(values) > 1 else luck, luck


def collect(cells, results):
    """Return a dict for each row and column that has results: mean, se, n, the values by seed, and mean costs."""
    found = {}
    for cell, known in zip(cells, results):
        if known:
            found.setdefault((cell.row, cell.column), {})[cell.seed] = known
    entries = []
    for (row, column), seeds in found.items():
        results = [known["result"] for known in seeds.values()]
        scores = [r["per_byte"] if "per_byte" in r else next(iter(r["scores"].values())) for r in results]
        mean, se, luck = summary(scores)
        entries.append(dict(row=row, column=column, mean=mean, se=se, luck=luck,
                            seeds={s: v for s, (v, _) in zip(seeds, scores)},
                            metric="bits per byte" if "per_byte" in results[0] else next(iter(results[0]["scores"])),
                            tflop=fmean(known["work"] for known in seeds.values()) / 1e12,
                            training_seconds=fmean(known.get("training_seconds", math.nan) for known in seeds.values()),
                            **{key: fmean(r.get(key, math.nan) for r in results)
                               for key in ("seconds", "evaluations", "early", "tokens_each")},
                            commits=sorted({str(known["commit"]) for known in seeds.values()})))
    return entries


def differs(a, b):
    """Return whether two entries lie more than two standard errors of their difference apart; nan errors decide nothing.

    Seeds that both have are compared one by one: they share an AR model, or even all weights, and so their luck.
    """
    gaps = [score - b["seeds"][seed] for seed, score in a["seeds"].items() if seed in b["seeds"]]
    if len(gaps) < 2:
        return abs(a["mean"] - b["mean"]) > 2 * math.hypot(a["se"], b["se"])
    return abs(fmean(gaps)) > 2 * max(stdev(gaps) / math.sqrt(len(gaps)), a["luck"], b["luck"])


def markdown(entries, reference):
    """Return the lines of a table: mean +- standard error; `=` where the reference row is within two standard errors."""
    at = {(entry["row"], entry["column"]): entry for entry in entries}
    rows, columns = (list(dict.fromkeys(keys)) for keys in zip(*at))

    def words(row, column):
        entry, base = at.get((row, column)), at.get((reference, column))
        mark = " =" if entry and base and entry is not base and not differs(entry, base) else ""
        return f"{entry['mean']:.{2 if entry['metric'] == 'bits per byte' else 1}f} +- {entry['se']:.2g}{mark}" if entry else ""
    lines = ["| | " + " | ".join([*columns, "TFLOP of training"]) + " |", "|---|" + "---|" * (len(columns) + 1)]
    for row in rows:
        tflop = fmean(entry["tflop"] for entry in entries if entry["row"] == row)
        lines.append(f"| {row} | " + " | ".join([*(words(row, column) for column in columns), f"{tflop:.1f}"]) + " |")
    metrics, n = ", ".join(dict.fromkeys(entry["metric"] for entry in entries)), [len(entry["seeds"]) for entry in entries]
    seeds = " to ".join(map(str, dict.fromkeys([min(n), max(n)])))
    return [*lines, "", f"{metrics}; seeds: {seeds}; +- is the standard error over them (of a single one over its examples); "
                        f"all answer the same examples. `=`: less than two standard errors of their difference, taken seed by "
                        f"seed, from the row {reference!r}; with 3 seeds chance alone passes two in about one of five."]


def costs(entries):
    """Return the lines of a table of what an answer takes."""
    lines = ["", "| | | evaluations | tokens each | ended early, % | seconds |", "|---" * 6 + "|"]
    return [*lines, *("| {row} | {column} | {evaluations:.1f} | {tokens_each:.1f} | {early:.0f} | {seconds:.4f} |".format(**e)
                      for e in entries)]


def show(folder, name, title, lines):
    """Write NAME.md, and print it."""
    text = "\n".join(lines) + "\n"
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    print(f"\n== {name}: {title} ({folder}/{name}.md)\n\n{text}", end="", flush=True)
