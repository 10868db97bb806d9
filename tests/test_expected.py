"""results/EXPECTED.json: short runs still reach the losses that they reached when it was written. Drift is caught here.

To write it anew, after a change that is meant to change training: python tests/test_expected.py
"""
import json
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parent.parent / "results" / "EXPECTED.json"
SHARED = ["--data=pairs", "--size=2x64x2", "--batch_size=16", "--steps=60", "--warmup=10", "--lr=3e-3", "--log_every=60",
          "--eval_sequences=64", "--device=cpu", "--dtype=float32"]
RUNS = {  # each may start from those before it
    "ar": [], "uniform": [], "absorbing": ["--process=absorbing"], "gaussian": ["--process=gaussian"],
    "ar2diff": ["--init_from=ar"], "ar2diff_shift": ["--init_from=ar", "--shift"],
    "ar2diff_guided": ["--init_from=ar", "--ar_weight=0.5"],
}


def train(name):
    """Run one of RUNS in the working directory; return its validation loss."""
    import train_ar
    import train_diff
    flags = [flag for flag in SHARED if not (flag.startswith("--size") and "--init_from=ar" in RUNS[name])]
    (train_ar if name == "ar" else train_diff).main([*flags, *RUNS[name], f"--out_dir={name}"])
    rows = [json.loads(line) for line in Path(name, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return next(row["loss"] for row in rows if row.get("split") == "valid")


@pytest.mark.slow
def test_short_runs_reach_the_losses_that_are_written_down(tmp_path, monkeypatch):
    from data import prepare
    monkeypatch.chdir(tmp_path)
    prepare.main(["translate", "--n_train=300", "--out=pairs"])
    expected = json.loads(FILE.read_text(encoding="utf-8"))
    found = {name: train(name) for name in RUNS}
    assert set(found) == set(expected["valid_loss"])
    for name, loss in found.items():
        assert loss == pytest.approx(expected["valid_loss"][name], rel=expected["tolerance"]), name
    assert found["ar2diff"] < found["uniform"], "AR weights are worth something"


if __name__ == "__main__":
    import os
    import tempfile
    sys.path.insert(0, str(FILE.parent.parent))
    from data import prepare
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare.main(["translate", "--n_train=300", "--out=pairs"])
        losses = {name: train(name) for name in RUNS}
    FILE.write_text(json.dumps({"tolerance": 0.02, "valid_loss": losses}, indent=1) + "\n", encoding="utf-8")
