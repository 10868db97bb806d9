"""sample.py: what is typed reaches the model, what the model says reaches the terminal, and every draft can be seen."""
import io
import random
import re
import sys
from functools import partial

import pytest
import torch

import sample
from beyond.decoders import DECODERS
from data.dataset import pad_rows
from data.tokenizer import load_tokenizer
from diffusion import Absorbing
from engine.checkpoint import save_checkpoint
from engine.cli import UserError
from engine.noise import Noise
from pretrained.loading import build_model, process_of
from sample import load_writer, prompt_batch, show

BYTES = load_tokenizer("bytes")


@pytest.fixture(scope="module", params=["causal", "bidirectional"])
def lm_run(request, train, text, tmp_path_factory):
    """A plain language model: no input columns (so that the pattern of the inputs must not matter)."""
    run = train("ar", tmp_path_factory.mktemp("runs") / "lm", f"--data={text}", "--input_len=0", "--target_len=12",
                f"--inputs_attention={request.param}")
    c = run.checkpoint()
    for name, tensor in c["model"].items():
        tensor *= 5 if "out" in name else 1  # now every token of the context matters to the next one
    save_checkpoint(run.path, c)
    return run


def stdin(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def say(capsys, *words):
    capsys.readouterr()
    sample.main([str(word) for word in words])
    return capsys.readouterr().out


def test_a_prompt_on_stdin_is_the_prompt_on_the_command_line(ar_run, monkeypatch, capsys):
    prompts, real = [], sample.prompt_batch
    monkeypatch.setattr(sample, "prompt_batch", lambda writer, prompt, n: prompts.append(prompt) or real(writer, prompt, n))
    outputs = []
    for words, content in ((["--prompt=ab é"], "not read"), ([], "ab é\n"), ([], "ab é"), ([], "ab é\r\n")):
        stdin(monkeypatch, content.encode())
        outputs.append(say(capsys, ar_run.folder, *words))
    assert prompts == ["ab é"] * 4 and len(set(outputs)) == 1
    stdin(monkeypatch, b"not read")
    say(capsys, ar_run.folder, "--prompt=")
    assert prompts[-1] == ""  # an empty prompt is a prompt


def test_the_prompt_reaches_the_model_padded_on_the_left(ar_run, monkeypatch):
    seen = []
    monkeypatch.setattr(sample.Writer, "drafts", lambda self, batch, noise: seen.append(batch) or [batch.targets])
    sample.main([str(ar_run.folder), "--prompt=abc", "--target_len=4"])
    assert seen[0].inputs.tolist() == [[BYTES.pad] * 5 + list(b"abc")]
    assert seen[0].pad_mask.tolist() == [[True] * 5 + [False] * 3] and seen[0].targets.shape == (1, 4)


@pytest.mark.parametrize("kind, n", [("ar", 5), ("diff", 10), ("diff", 3)])
def test_show_steps_prints_every_draft_and_then_the_answer(ar_run, diff_run, capsys, kind, n):
    run, flags = (ar_run, ["--target_len=5"]) if kind == "ar" else (diff_run, [f"--n_steps={n}", "--n_samples=2"])
    lines = say(capsys, "--show_steps", run.folder, "--prompt=ab", *flags).split("\n")
    steps = [line for line in lines if re.match(r" +\d+  ", line)]
    assert [int(line.split()[0]) for line in steps] == list(range(n + 1)) and lines[n + 1] == ""  # 0: what it starts from
    config = sample.GenerateConfig() if kind == "ar" else sample.GenerateConfig(n_steps=n, n_samples=2)
    writer = load_writer(run.folder, config, 5 if kind == "ar" else None)
    writer, batch = prompt_batch(writer, "ab")
    drafts = writer.drafts(batch, Noise(0, "generate", 0, [0]))
    assert [line[6:] for line in steps] == [show(BYTES, draft[0]) for draft in drafts]
    assert "\n".join(lines[n + 2:]) == BYTES.decode(drafts[-1][0]) + "\n"


def test_a_draft_is_shown_whole_on_one_line_with_a_mark_for_each_special_id():
    sentinel, unused = BYTES.sentinels[0], BYTES.vocab_size - 1
    ids = [*"é{\r\n".encode(), BYTES.mask, *b"b", BYTES.eos, BYTES.pad, *b"c", BYTES.pad, sentinel, unused]
    assert show(BYTES, torch.tensor(ids)) == "é{↵▒b∎·c·??"
    assert show(BYTES, [0xC3, BYTES.pad, 0xA9]) == "\ufffd·\ufffd"  # half a character on either side
    assert show(BYTES, []) == ""


def test_a_language_model_continues_its_prompt_as_a_joint_pass_without_cache_would(lm_run, capsys):
    model, process = build_model(lm_run.checkpoint()).eval(), process_of(lm_run.checkpoint())
    rng = random.Random(0)
    prompts = ["".join(rng.choices("abcde ", k=k)) for k in (0, 1, *[10] * 20, 30)]  # the last is longer than its canvas
    for prompt in prompts:
        ids = [process.start, *prompt.encode()]
        with torch.no_grad():
            while len(ids) < len(prompt) + 13 and ids[-1] != BYTES.eos:
                nothing = model.encode(torch.empty(1, 0, dtype=torch.long))
                ids.append(model.decode(torch.tensor([ids]), nothing, "causal")[0, -1].argmax().item())
        assert say(capsys, lm_run.folder, f"--prompt={prompt}") == prompt + BYTES.decode(ids[1 + len(prompt):]) + "\n"


def test_a_diffusion_model_without_inputs_writes_and_continues_a_prompt(train, text, tmp_path, capsys):
    run = train("diff", tmp_path / "x", f"--data={text}", "--input_len=0", "--target_len=6", "--steps=1")
    assert say(capsys, run.folder, "--prompt=").endswith("\n")
    assert say(capsys, run.folder, "--prompt=ab").startswith("ab")
    sample.main([str(run.folder), "--prompt=ab"])
    assert "note: 2 tokens of prompt and 6 to write are more than the 6" in capsys.readouterr().err


def test_one_seed_gives_one_text(diff_run, ar_run, capsys):
    for run in (diff_run, ar_run):
        texts = [say(capsys, run.folder, "--prompt=ab", "--temperature=1", f"--seed={seed}") for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("flags, expected", [
    ([], {"temperature": 0.0, "n_samples": 1, "top_k": 0}), (["--temperature=0.7", "--top_k=3", "--n_samples=4"],
                                                            {"temperature": 0.7, "n_samples": 4, "top_k": 3})])
def test_flags_left_out_become_greedy_for_an_ar_model(ar_run, flags, expected):
    writer = load_writer(ar_run.folder, sample.parse(sample.Config, ["x", *flags]))
    assert (writer.decoder, writer.options) == ("left to right", expected)


@pytest.mark.parametrize("flags, decoder, expected", [
    ([], "resample", {}),  # the paper's
    (["--temperature=0", "--n_samples=1", "--n_steps=3"], "resample", {"temperature": 0.0, "n_samples": 1, "n_steps": 3}),
    (["--decoder=ancestral"], "ancestral", {})])
def test_flags_left_out_become_the_papers_for_a_diffusion_model(diff_run, flags, decoder, expected):
    papers = dict(temperature=0.2, n_samples=8, n_steps=10)
    writer = load_writer(diff_run.folder, sample.parse(sample.Config, ["x", *flags]))
    assert (writer.decoder, writer.options) == (decoder, papers | expected)


@pytest.mark.parametrize("flags, decoder, expected", [
    ([], "threshold", {"threshold": 0.9}), (["--decoder=confidence"], "confidence", {"block_len": 0}),
    (["--threshold=0.5"], "threshold", {"threshold": 0.5}), (["--decoder=ancestral"], "ancestral", {}),
    (["--decoder=confidence", "--block_len=8"], "confidence", {"block_len": 8})])
def test_flags_left_out_become_those_of_the_decoder_for_masked_diffusion(flags, decoder, expected):
    config = sample.parse(sample.Config, ["x", *flags])
    defaults = dict(temperature=0.2, n_samples=8, n_steps=32)
    assert sample.choose_decoder(config, Absorbing(BYTES.mask)) == (decoder, defaults | expected)


def test_a_prompt_that_fills_the_canvas_fits_and_one_token_more_is_refused_with_the_numbers(ar_run, diff_run, capsys):
    for run in (ar_run, diff_run):
        say(capsys, run.folder, "--prompt=12345678")
        with pytest.raises(UserError, match="prompt has 9 tokens, .* holds 8"):
            say(capsys, run.folder, "--prompt=123456789")


@pytest.mark.parametrize("flags, message", [
    (["--n_samples=0"], "--n_samples=0 must be at least 1"), (["--n_samples=-3"], "--n_samples=-3 must be at least 1"),
    (["--temperature=-1"], "--temperature=-1.0 must be at least 0"), (["--target_len=0"], "--target_len=0 must be at least 1"),
    (["--seed=-1"], "--seed=-1 must be at least 0"), ([f"--seed={1 << 40}"], "below 2.32"), (["--device=gpu"], "device='gpu'"),
    (["--n_step=5"], "did you mean --n_steps"), (["--temperature=hot"], "--temperature: invalid float"),
    (["--compile=maybe"], "compile='maybe' is not one of auto, yes, no")])
def test_a_wrong_flag_is_refused_in_one_line(ar_run, diff_run, capsys, flags, message):
    for run in (ar_run, diff_run):
        with pytest.raises(UserError, match=message) as caught:
            say(capsys, run.folder, "--prompt=a", *flags)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind, flags, message", [
    ("ar", ["--top_k=-1"], "--top_k=-1 must be at least 0"), ("diff", ["--top_k=5"], "--top_k is not for uniform models"),
    ("ar", ["--n_steps=5"], "--n_steps is not for ar models"), ("diff", ["--n_steps=0"], "--n_steps=0 must be at least 1"),
    ("ar", ["--infill=a___"], "--infill needs a diffusion model"),
    ("diff", ["--decoder=ancestrl"], f"not one of {', '.join(DECODERS['uniform'])}; did you mean 'ancestral'"),
    ("diff", ["--decoder=confidence"], f"not one of {', '.join(DECODERS['uniform'])}"),
    ("ar", ["--decoder=ancestral"], "--decoder is not for ar models"),
    ("diff", ["--threshold=0.5"], "--threshold is not for uniform models"),
    ("absorbing", ["--threshold=0.9", "--decoder=confidence"], "--threshold goes with --decoder=threshold, not"),
    ("absorbing", ["--decoder=threshold", "--threshold=1.5"], "--threshold=1.5 must be above 0 and at most 1"),
    ("absorbing", ["--block_len=4"], "--block_len goes with --decoder=confidence, not with threshold"),
    ("absorbing", ["--decoder=confidence", "--block_len=-1"], "--block_len=-1 must be at least 0"),
    ("gaussian", ["--decoder=ancestral"], "not one of euler")])
def test_a_flag_that_does_not_fit_the_process_or_decoder_is_refused_in_one_line(train, ar_run, diff_run, tmp_path, capsys, kind,
                                                                               flags, message):
    run = {"ar": ar_run, "diff": diff_run}.get(kind) or train("diff", tmp_path / "x", f"--process={kind}", "--steps=1")
    with pytest.raises(UserError, match=message) as caught:
        say(capsys, run.folder, "--prompt=a", *flags)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_compiled_models_write_the_same_text(ar_run, diff_run, capsys, monkeypatch):
    torch._dynamo.reset()  # it compiles a function 8 times at most
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traces, and needs no C++ compiler
    for words in ([ar_run.folder], [diff_run.folder], [ar_run.folder, f"--drafter={diff_run.folder}"]):
        texts = {say(capsys, *words, "--prompt=ab", "--show_steps", f"--compile={which}") for which in ("no", "yes")}
        assert len(texts) == 1
    writer = load_writer(ar_run.folder, sample.GenerateConfig(drafter=str(diff_run.folder), compile="yes"))
    assert all(hasattr(getattr(model, name), "_torchdynamo_orig_callable")
               for model in (writer.model, writer.process.drafter) for name in ("encode", "states", "logits"))


def test_a_wrong_checkpoint_is_refused(capsys, tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        say(capsys, tmp_path / "none", "--prompt=a")
    (tmp_path / "x.pt").write_text("hello", encoding="utf-8")
    with pytest.raises(UserError, match="x.pt is"):
        say(capsys, tmp_path / "x.pt", "--prompt=a")


def test_a_prompt_that_is_not_utf8_is_refused(ar_run, monkeypatch):
    stdin(monkeypatch, b"ab\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        sample.main([str(ar_run.folder)])


def test_a_sample_does_not_depend_on_the_batch_it_is_drawn_in(diff_run, ar_run):
    for run in (diff_run, ar_run):
        writer = load_writer(run.folder, sample.GenerateConfig(temperature=1.0, n_samples=3))
        rows = [(list(b"ab"), []), (list(b"abcdefgh"), []), ([], [])]
        whole = writer.drafts(pad_rows(rows, BYTES, 8, 7), Noise(0, "generate", 0, range(3)))[-1]
        alone = [writer.drafts(pad_rows([row], BYTES, 8, 7), Noise(0, "generate", 0, [i]))[-1] for i, row in enumerate(rows)]
        assert torch.equal(whole, torch.cat(alone))
        assert len({tuple(row) for row in whole.tolist()}) == 3


@pytest.mark.parametrize("process", ["ar", "uniform", "absorbing", "gaussian"])
def test_in_bfloat16_products_are_rounded_and_bounds_stay_near(train, tmp_path, monkeypatch, process):
    kind, flags = ("ar", []) if process == "ar" else ("diff", [f"--process={process}"])
    run = train(kind, tmp_path / "x", *flags)
    batch = pad_rows([(list(b"ab"), list(b"ba")), (list(b"abcdefgh"), list(b"h"))], BYTES, 8, 7)
    bounds, dtypes = {}, set()
    for dtype in ("float32", "bfloat16"):
        writer = load_writer(run.folder, sample.GenerateConfig(dtype=dtype, device="cpu"))
        writer.model.blocks[0].mlp_out.register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
        dtypes.clear()
        drafts = writer.drafts(batch, Noise(0, "generate", 0, range(2)))
        assert drafts[-1].shape == (2, 7) and dtypes == {getattr(torch, dtype)}
        dtypes.clear()
        bounds[dtype] = writer.bound(batch, Noise(0, "valid", 0, range(2)), 3)
        assert dtypes == {getattr(torch, dtype)} and not torch.is_autocast_enabled("cpu")
    assert 0 < (bounds["bfloat16"] / bounds["float32"] - 1).abs().max() < 0.02


def test_drafts_for_ar_stay_in_float32_and_an_unknown_dtype_is_refused(ar_run, diff_run):
    with pytest.raises(UserError, match="leave out --dtype"):
        load_writer(ar_run.folder, sample.GenerateConfig(drafter=str(diff_run.folder), dtype="bfloat16"))
    with pytest.raises(UserError, match="dtype.*float32, bfloat16"):
        load_writer(ar_run.folder, sample.GenerateConfig(dtype="half"))
