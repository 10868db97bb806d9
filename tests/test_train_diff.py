"""train_diff.py: which process a run trains, with which options, said or inherited; every process goes on where it stopped."""
import os
import re
import shutil

import pytest
import torch

import start
import train_diff
import train_loop
from conftest import width_of
from diffusion import Absorbing, Gaussian, Uniform
from engine.cli import UserError
from pretrained.loading import process_of

FEW = ["--steps=1", "--eval_sequences=0"]


@pytest.fixture(scope="module")
def runs(train, tmp_path_factory):
    """One short run of each process, with an option of its own."""
    flags = {"uniform": ["--n_unroll=1"], "absorbing": ["--weighted=no"], "gaussian": ["--vector_width=6"]}
    folder = tmp_path_factory.mktemp("processes")
    return {name: train("diff", folder / name, f"--process={name}", *own, *FEW) for name, own in flags.items()}


def test_without_a_checkpoint_the_process_is_the_papers_and_options_are_as_documented(train, tmp_path):
    assert process_of(train("diff", tmp_path / "x", *FEW).checkpoint()) == Uniform(258, 2, 0.0, 0.0, "bidirectional")
    for process in (Absorbing(258, True), Gaussian(32, self_condition=0.5)):
        run = train("diff", tmp_path / process.name, f"--process={process.name}", *FEW)
        assert process_of(run.checkpoint()) == process


@pytest.mark.parametrize("flags, process", [
    (["--n_unroll=1", "--unroll_temperature=0.5"], Uniform(258, 1, 0.5)),
    (["--n_unroll=1", "--self_condition=0.5", "--inputs_attention=causal"], Uniform(258, 1, 0.0, 0.5, "causal")),
    (["--process=absorbing", "--weighted", "no", "--inputs_attention=causal"], Absorbing(258, False, "causal")),
    (["--process=gaussian", "--vector_width=7", "--self_condition=0"], Gaussian(7, self_condition=0.0))])
def test_options_reach_the_process_and_its_checkpoint(train, tmp_path, flags, process):
    run = train("diff", tmp_path / "x", *flags, *FEW)
    assert process_of(run.checkpoint()) == process and run.checkpoint()["shape"]["vector_width"] == width_of(process)


def test_a_checkpoints_process_and_options_are_inherited_and_may_be_said_anew(train, runs, tmp_path):
    expected = {"uniform": Uniform(258, 1), "absorbing": Absorbing(258, False), "gaussian": Gaussian(6)}
    for name, run in runs.items():
        for i, flags in enumerate(([], [f"--process={name}"])):
            assert process_of(train("diff", tmp_path / f"{name}{i}", f"--init_from={run.folder}", *FEW, *flags).checkpoint()) \
                == expected[name]
    changed = train("diff", tmp_path / "x", f"--init_from={runs['absorbing'].folder}", "--weighted", *FEW)
    assert process_of(changed.checkpoint()) == Absorbing(258, True)
    same = train("diff", tmp_path / "y", f"--init_from={runs['gaussian'].folder}", "--vector_width=6", *FEW)
    assert process_of(same.checkpoint()) == Gaussian(6)


@pytest.mark.parametrize("origin, process", [("uniform", "absorbing"), ("absorbing", "gaussian"), ("gaussian", "uniform")])
def test_another_process_than_the_checkpoints_is_refused(train, runs, tmp_path, origin, process):
    with pytest.raises(UserError, match=f"checkpoint of the process '{origin}', not '{process}'; .*autoregressive"):
        train("diff", tmp_path / "x", f"--init_from={runs[origin].folder}", f"--process={process}")
    with pytest.raises(UserError, match=f"checkpoint of the process '{origin}', not '{process}'"):
        train("diff", runs[origin].folder, "--resume", "--steps=9", f"--process={process}")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("flags, message", [
    (["--weighted"], "--weighted is for --process=absorbing, not for uniform"),
    (["--vector_width=8"], "--vector_width is for --process=gaussian, not for uniform"),
    (["--process=absorbing", "--n_unroll=2"], "--n_unroll is for --process=uniform, not for absorbing"),
    (["--process=absorbing", "--n_unroll=3"], "--n_unroll is for --process=uniform, not for absorbing"),
    (["--process=gaussian", "--weighted=no"], "--weighted is for --process=absorbing, not for gaussian"),
    (["--process=gaussian", "--unroll_temperature=0"], "--unroll_temperature is for --process=uniform, not for gaussian"),
    (["--process=absorbing", "--self_condition=0"], "--self_condition is for --process=uniform or gaussian, not for absorbing"),
    (["--process=absorbin"], "did you mean 'absorbing'"), (["--process=ar"], "is not one of uniform, absorbing, gaussian"),
    (["--process=gaussian", "--vector_width=0"], "--vector_width=0 must lie between 2 and"),
    (["--process=gaussian", "--self_condition=1.5"], "--self_condition=1.5 must lie between 0 and 1"),
    (["--n_unroll=0"], "--n_unroll=0 must lie between 1 and 2"), (["--n_unroll=3"], "--n_unroll=3 must lie between 1 and 2"),
    (["--process=absorbing", "--weighted=2"], "neither true nor false"),
    (["--init_from={gaussian}", "--vector_width=8"], "--vector_width=8 differs from the checkpoint's, 6"),
    (["--init_from={absorbing}", "--n_unroll=1"], "--n_unroll is for --process=uniform, not for absorbing")])
def test_an_option_that_does_not_fit_is_refused_in_one_line_before_anything_is_written(train, runs, tmp_path, flags, message):
    with pytest.raises(UserError, match=message) as caught:
        train("diff", tmp_path / "x", *(flag.format(**{name: run.folder for name, run in runs.items()}) for flag in flags))
    assert "\n" not in str(caught.value) and not (tmp_path / "x").exists()


@pytest.mark.parametrize("flags", [["--process=absorbing"], ["--process=gaussian"], ["--unroll_temperature=1"],
                                   ["--self_condition=0.5"], ["--self_condition=0.5", "--n_unroll=1"]])
def test_every_process_resumes_bit_identically_and_is_fine_tuned(train, tmp_path, monkeypatch, flags):
    flags = [*flags, "--steps=6", "--eval_every=3", "--dropout=0.1"]
    whole, real = train("diff", tmp_path / "whole", *flags), train_loop.learning_rate

    def killed(config, step):
        if step == 5:
            raise KeyboardInterrupt
        return real(config, step)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_loop, "learning_rate", killed)
        train("diff", tmp_path / "part", *flags)
    part = type(whole)(tmp_path / "part")
    assert part.checkpoint()["step"] == 3
    train("diff", part.folder, *flags, "--resume")
    assert part.log() == whole.log()
    assert all(torch.equal(part.checkpoint()["model"][k], v) for k, v in whole.checkpoint()["model"].items())

    tuned = train("diff", tmp_path / "tuned", f"--init_from={whole.folder}", "--steps=2", "--lr=1e-2").checkpoint()
    assert process_of(tuned) == process_of(whole.checkpoint()) and len(tuned["history"]) == 1
    assert all(not torch.equal(tuned["model"][k], v) for k, v in whole.checkpoint()["model"].items()), "every tensor learns"


def test_on_the_text_of_the_checkpoint_canvas_and_objective_are_inherited_unless_said_and_elsewhere_they_are_not(
        train, text, tmp_path, capsys):
    first = ["--objective=span", "--input_len=20", "--target_len=7", f"--data={text}", *FEW]
    ar = train("ar", tmp_path / "ar", *first)

    def of(out, *flags):
        capsys.readouterr()
        run = train("diff", tmp_path / out, *(f"--init_from={ar.folder}", *FEW, *flags))
        objective = re.search(r"uniform on \S+?(?: \((\w+)\))?:", capsys.readouterr().out)[1]
        return run.checkpoint()["input_len"], run.checkpoint()["target_len"], objective

    assert of("same", f"--data={text}") == (20, 7, "span")
    assert of("prefix", f"--data={text}", "--objective=prefix") == (20, 7, "prefix")
    assert of("longer", f"--data={text}", "--target_len=9") == (20, 9, "span")
    assert of("task") == (8, 7, None), "a task has its own"
    assert of("plain", f"--data={text}", "--input_len=0") == (0, 7, "causal"), "spans need inputs"
    assert of("elsewhere", f"--data={text}/../{text.name}") == (20, 7, "span"), "the same folder"
    copy = shutil.copytree(text, tmp_path / "other")
    assert of("copy", f"--data={copy}") == (20, 7, "span"), "the same text, wherever it lies"
    stream = (copy / "valid.prose.bin").read_bytes()
    (copy / "valid.prose.bin").write_bytes(stream[:-2] + b"b\0")
    os.utime(copy / "valid.prose.bin", ns=(1, 1))
    assert of("other", f"--data={copy}") == (64, 64, "prefix"), "of the same size, but another text"
    resumed = train("diff", tmp_path / "same", "--resume", f"--data={text}", f"--init_from={ar.folder}", "--eval_sequences=0",
                    "--steps=2")
    assert resumed.checkpoint()["step"] == 2 and resumed.checkpoint()["config"]["objective"] == "span"


def test_the_config_names_every_option_of_every_process_that_a_user_may_set():
    fields = {field for process in start.PROCESSES.values() for field in process.__dataclass_fields__}
    own = {"n_noise", "mask", "inputs_attention", "targets_attention", "shift", "sigma_min", "sigma_max"}  # of all, or fixed
    assert set(start.OPTIONS) == fields - own
    assert all(train_diff.Config.__dataclass_fields__[option].default is None for option in start.OPTIONS)
