"""ar2diff.py: the diffusion model starts as the AR model, bit for bit, and both ways to get there are the same."""
import copy

import pytest
import torch
import torch.nn.functional as F

import ar2diff
import train_ar
from ar2diff import transfer
from autoregressive import Autoregressive
from conftest import width_of
from data.dataset import open_data
from diffusion import Absorbing, Gaussian, Uniform
from engine.cli import UserError
from engine.noise import Noise
from model import Transformer
from pretrained.loading import build_model, load_checkpoint, process_of, tokenizer_of

UNIFORM, ABSORBING, GAUSSIAN = Uniform(258), Absorbing(258), Gaussian(5)
NEW = {"noisy.table.weight", "noisy.vectors_in.weight", "noisy.level_in.weight"}  # what embedding diffusion adds
every_process = pytest.mark.parametrize("process", [UNIFORM, ABSORBING, GAUSSIAN], ids=["uniform", "absorbing", "gaussian"])


@pytest.fixture(params=["ar_run", "encoder_decoder_run"])
def any_ar_run(request):
    """An AR run of each architecture."""
    return request.getfixturevalue(request.param)


@every_process
def test_transfer_keeps_every_tensor_and_the_causal_logits_bit_for_bit(any_ar_run, process):
    before = any_ar_run.checkpoint()
    untouched = copy.deepcopy(before["model"])
    after, report = transfer(before, process)
    assert before["model"].keys() == dict(Transformer(**before["shape"]).named_parameters()).keys()
    assert after["model"].keys() - before["model"].keys() == (NEW if process is GAUSSIAN else set())
    assert all(torch.equal(c["model"][k], untouched[k]) for c in (before, after) for k in untouched)
    assert process_of(after) == process and process_of(before).name == "ar"
    assert after["shape"] == before["shape"] | {"vector_width": width_of(process)}

    # The AR model as it is used: start token, ragged inputs, its own attention pattern.
    inputs, x0 = torch.randint(256, (3, 8)), torch.randint(258, (3, 7))
    pad_mask = torch.arange(8) < torch.tensor([[0], [3], [8]])
    logits = []
    for c in (before, after):
        model, ar = build_model(c).eval(), process_of(before)
        context = model.encode(inputs, pad_mask, ar.inputs_attention)
        logits.append(model.decode(ar.feed(x0), context, "causal"))
    assert torch.equal(*logits)
    assert logits[0].std() > 0.01  # not two constants


@every_process
def test_the_report_is_complete_and_calls_new_exactly_what_is(any_ar_run, process):
    c = any_ar_run.checkpoint()
    after, report = transfer(c, process)
    assert {(name, shape) for name, shape, *_ in report} == {(name, tuple(t.shape)) for name, t in after["model"].items()}
    assert {name for name, *_, fate in report if fate == "new"} == (NEW if process is GAUSSIAN else set())
    assert {name for name, *_, fate in report if fate == "copied"} == c["model"].keys()
    n_values = {fate: sum(n for *_, n, f in report if f == fate) for fate in ("copied", "new")}
    assert n_values["copied"] == sum(t.numel() for t in c["model"].values())
    assert sum(n_values.values()) == Transformer(**after["shape"]).n_params() == build_model(after).n_params()


def test_new_tensors_come_from_the_seed_of_the_run_and_nothing_else(ar_run):
    c = ar_run.checkpoint()
    first, state = transfer(c, GAUSSIAN)[0]["model"], torch.get_rng_state()
    torch.manual_seed(99)
    moved = torch.get_rng_state()
    again = transfer(c, GAUSSIAN)[0]["model"]
    assert torch.equal(torch.get_rng_state(), moved) and not torch.equal(state, moved), "the global generator is left alone"
    assert all(torch.equal(first[k], again[k]) for k in first)
    other = transfer(c, GAUSSIAN, seed=1)[0]["model"]
    assert {k for k in first if not torch.equal(first[k], other[k])} == NEW
    assert all(first[k].std() > 0.01 for k in NEW)


def test_a_converted_checkpoint_remembers_where_it_came_from_but_no_optimizer(ar_run):
    c = ar_run.checkpoint()
    after, _ = transfer(c, UNIFORM)
    assert "optimizer" in c and "optimizer" not in after and "best" not in after
    assert after["step"] == 0 and len(after["history"]) == 1 and "4 steps" in after["history"][0]
    assert {k: after[k] for k in ("tokenizer", "shape", "input_len", "target_len")} == \
           {k: c[k] for k in ("tokenizer", "shape", "input_len", "target_len")}


@pytest.mark.parametrize("change", [
    lambda m: m.pop("blocks.0.qkv.weight"),
    lambda m: m.update(extra=torch.zeros(1)),
    lambda m: m.update({"blocks.0.qkv.weight": m["blocks.0.qkv.weight"].T.contiguous()}),
], ids=["missing", "extra", "misshapen"])
def test_a_tensor_that_does_not_fit_is_refused_by_its_name(ar_run, change):
    c = ar_run.checkpoint()
    change(c["model"])
    with pytest.raises(UserError, match="blocks.0.qkv.weight|extra"):
        transfer(c, UNIFORM)


def test_a_weight_lost_on_the_way_is_noticed(ar_run, monkeypatch):
    real = ar2diff.build_model

    def lossy(c, *args):
        model = real(c, *args)
        if c["process"]["name"] != "ar":
            model.embedding.weight.data[5] += 1e-3
        return model
    monkeypatch.setattr(ar2diff, "build_model", lossy)
    with pytest.raises(UserError, match="not carried over exactly"):
        transfer(ar_run.checkpoint(), UNIFORM)


def test_only_autoregressive_checkpoints_are_converted(diff_run, tmp_path):
    with pytest.raises(UserError, match="a 'uniform' checkpoint.*only autoregressive ones"):
        transfer(diff_run.checkpoint(), UNIFORM)
    with pytest.raises(UserError, match="only autoregressive ones"):
        ar2diff.main([str(diff_run.folder), str(tmp_path / "new")])
    with pytest.raises(UserError, match="is a diffusion checkpoint"):
        train_ar.main([f"--init_from={diff_run.path}", f"--out_dir={tmp_path / 'new'}"])
    assert list(tmp_path.iterdir()) == []


def test_the_command_reports_every_tensor_and_never_overwrites(ar_run, tmp_path, capsys):
    ar2diff.main([str(ar_run.folder), str(tmp_path / "out"), "--inputs_attention=causal"])
    shown = capsys.readouterr().out
    c, made = ar_run.checkpoint(), load_checkpoint(tmp_path / "out")
    assert all(f"copied  {name} " in shown for name in c["model"])
    assert f"{len(c['model'])} tensors, {sum(t.numel() for t in c['model'].values()):,} values" in shown
    assert "bit-identical" in shown
    assert process_of(made) == Uniform(tokenizer_of(c).n_noise, inputs_attention="causal")
    old = (tmp_path / "out" / "ckpt.pt").read_bytes()
    for target in ("out", "out/ckpt.pt"):
        with pytest.raises(UserError, match="exists; it is not overwritten"):
            ar2diff.main([str(ar_run.folder), str(tmp_path / target)])
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == old


@every_process
def test_the_command_converts_to_every_process(ar_run, tmp_path, capsys, process):
    ar2diff.main([str(ar_run.folder), str(tmp_path / "out"), f"--process={process.name}"])
    shown, made = capsys.readouterr().out, load_checkpoint(tmp_path / "out")
    assert process_of(made) == (Gaussian() if process is GAUSSIAN else process)
    lines = {line.split()[1]: line.split()[0] for line in shown.splitlines() if line.startswith("  ")}
    assert lines == {name: "new" if name in NEW else "copied" for name in made["model"]}
    n_new = sum(made["model"][name].numel() for name in NEW & made["model"].keys())
    assert f" copied, {n_new:,} new, none left over" in shown and "bit-identical" in shown


@pytest.mark.parametrize("words, message", [
    (["{ar}", "new", "--process=gausian"], "did you mean 'gaussian'"),
    (["missing", "new"], "no checkpoint at missing"),
    (["{ar}", "new", "--inputs_attention=bidirectionl"], "did you mean 'bidirectional'"),
    (["{ar}"], "target"),
    (["{ar}", "file/new.pt"], "cannot write"),
])
def test_a_wrong_command_leaves_nothing_behind(ar_run, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        ar2diff.main([word.format(ar=ar_run.folder) for word in words])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_training_from_an_ar_checkpoint_says_so_and_starts_from_exactly_its_weights(train, ar_run, task, tmp_path, capsys):
    run = train("diff", tmp_path / "a", f"--init_from={ar_run.folder}", "--steps=1", "--lr=1e-30", "--weight_decay=0",
                "--seed=5")
    said = capsys.readouterr().out
    assert "AR2Diff" in said and "autoregressive checkpoint" in said and str(ar_run.folder) in said
    ar, now = ar_run.checkpoint(), run.checkpoint()
    assert max((now["model"][k] - ar["model"][k]).abs().max() for k in ar["model"]) < 1e-29  # a step of 1e-30 was all
    # The first loss of the log, computed by hand from the AR weights.
    batch = open_data(task, tokenizer_of(ar), 8, 7).train_batch(5, 0, range(8), 8)
    loss = Uniform(258).loss(build_model(ar), batch, Noise(5, "train", 0, range(8))).total.item()
    assert abs(run.log()[0]["loss"] - loss) < 1e-5
    assert len(now["history"]) == 1 and process_of(now) == Uniform(258)


def test_converting_first_and_converting_on_the_fly_are_the_same(train, ar_run, tmp_path, capsys):
    ar2diff.main([str(ar_run.folder), str(tmp_path / "converted")])
    one, two = (train("diff", tmp_path / name, f"--init_from={start}", "--dropout=0.1")
                for name, start in (("one", ar_run.path), ("two", tmp_path / "converted")))
    assert one.log() == two.log()
    assert all(torch.equal(a, b) for a, b in zip(one.checkpoint()["model"].values(), two.checkpoint()["model"].values()))
    assert one.checkpoint()["history"] == two.checkpoint()["history"]


@pytest.mark.parametrize("process", ["absorbing", "gaussian"])
def test_ar2diff_trains_every_process_from_the_ar_weights(train, ar_run, tmp_path, capsys, process):
    run = train("diff", tmp_path / "on", f"--init_from={ar_run.folder}", f"--process={process}", "--steps=1", "--lr=1e-30",
                "--weight_decay=0")
    assert f"its weights go on as {process} diffusion" in " ".join(capsys.readouterr().out.split())
    ar, now = ar_run.checkpoint()["model"], run.checkpoint()
    assert process_of(now).name == process
    assert max((now["model"][k] - ar[k]).abs().max() for k in ar) < 1e-29


def test_going_on_from_a_diffusion_checkpoint_is_not_called_ar2diff(train, diff_run, tmp_path, capsys):
    train("diff", tmp_path / "on", f"--init_from={diff_run.folder}", "--steps=1")
    assert "AR2Diff" not in capsys.readouterr().out


def test_the_embedding_stays_tied_when_training_goes_on(train, ar_run, tmp_path):
    run = train("diff", tmp_path / "on", f"--init_from={ar_run.folder}", "--lr=1e-2")
    before, after = ar_run.checkpoint()["model"], run.checkpoint()["model"]
    assert after.keys() == before.keys()
    assert not torch.equal(after["embedding.weight"], before["embedding.weight"])
    assert [k for k, t in after.items() if len(t) == 384] == ["embedding.weight"]  # no output layer of its own
    model, seen = build_model(run.checkpoint()).eval(), []
    model.blocks[-1].register_forward_hook(lambda _, __, out: seen.append(out[0]))
    logits = model.decode(torch.randint(256, (2, 7)), model.encode(torch.randint(256, (2, 8))), "bidirectional")
    by_hand = 128 / 16 * F.rms_norm(seen[-1], seen[-1].shape[-1:]) @ after["embedding.weight"].T
    assert (logits - by_hand).abs().max() < 1e-5


def test_the_ar_process_of_a_checkpoint_feeds_the_tokenizers_own_ids(ar_run):
    c = ar_run.checkpoint()
    tokenizer = tokenizer_of(c)
    assert process_of(c) == Autoregressive(tokenizer.mask, tokenizer.eos, tokenizer.pad, "causal")
