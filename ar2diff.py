"""AR -> diffusion: keep every weight of an autoregressive model, change what it is fed and what it may see.

    python ar2diff.py out/ar/ckpt.pt out/ar2diff0/ckpt.pt
    python ar2diff.py smollm2 out/smollm2_ar2diff0

Stage 2 of AR2Diff (arXiv 2401.17181, Figure 2) begins here: no tensor is added, removed, resized or reordered. Of what is
computed only the process changes: targets are fed noised instead of shifted, and see both sides; so do inputs, of each other,
unless --inputs_attention=causal. Every id that either process needs (EOS, PAD, MASK, sentinels) was reserved before AR
pretraining, so the embedding fits as it is. (--process=gaussian is the exception: it needs vectors that no AR model has.)
"""
from dataclasses import dataclass
from pathlib import Path

import torch

from diffusion import PROCESSES
from engine.checkpoint import describe, lineage, save_checkpoint
from engine.cli import check, one_of, parse, run
from model import INPUTS_ATTENTION
from pretrained.loading import build_model, find_checkpoint, load_checkpoint, model_of, new_process, tokenizer_of


@torch.random.fork_rng(devices=[])  # models that are built here draw weights: the caller's generator is left alone
def transfer(checkpoint, process, seed=0):
    """Return (diffusion checkpoint, report): the AR checkpoint's tensors under a diffusion process.

    report: one (name, shape, number of values, "copied" or "new") per tensor. New ones are what embedding diffusion (Gaussian)
    or self-conditioning needs beside the AR weights, drawn from `seed`; all else needs none. Raises UserError if `checkpoint`
    is not autoregressive, lacks a tensor or has one too many, or if its logits under the causal pattern are not bit-identical.
    """
    source = checkpoint["process"]["name"]
    check(source == "ar", f"this is a {source!r} checkpoint; only autoregressive ones are converted")
    check(checkpoint["shape"]["architecture"] == "decoder-only" or process.inputs_attention != "full",
          "--inputs_attention=full: in an encoder-decoder inputs never see targets")
    shape = checkpoint["shape"] | additions(process)
    weights = new_tensors(shape, seed) | checkpoint["model"]
    dropped = ("optimizer", "best")  # moments of another loss, and a validation loss of another process
    converted = {key: value for key, value in checkpoint.items() if key not in dropped}
    converted |= {"model": weights, "shape": shape, "process": describe(process), "step": 0, "history": lineage(checkpoint)}
    check(torch.equal(causal_logits(checkpoint), causal_logits(converted)),
          "the logits under the causal pattern changed: the weights were not carried over exactly")
    report = [(name, tuple(tensor.shape), tensor.numel(), "copied" if name in checkpoint["model"] else "new")
              for name, tensor in weights.items()]
    return converted, report


def additions(process):
    """Return what of a model's shape depends on its process."""
    options = describe(process)
    vector_width, share = options.get("vector_width", 0), options.get("self_condition", 0)
    return {"vector_width": vector_width, "self_condition": share > 0 and not vector_width}  # Gaussian has a way of its own


def new_tensors(shape, seed):
    """Return {name: tensor} of what a process needs beside the AR weights, drawn from `seed`; most need nothing."""
    torch.default_generator.manual_seed(seed)
    new = ("noisy.", "self_conditioning.")
    needed = shape["vector_width"] or shape["self_condition"]
    return {name: x for name, x in model_of(shape).state_dict().items() if name.startswith(new)} if needed else {}


def usual(checkpoint):
    """Return what diffusion from these AR weights is, unless flags say otherwise: as in the paper, but for published weights.

    They lose less of what they know so: results/README.md, "A real model, turned".
    """
    published = checkpoint is not None and "flavour" in checkpoint["shape"]
    return {"inputs_attention": "causal", "shift": True} if published else {"inputs_attention": "bidirectional"}


@torch.no_grad()
def causal_logits(checkpoint):
    """Return the logits (2, 16, V) that a checkpoint's weights give fixed random tokens, inputs and targets causal."""
    model = build_model(checkpoint).eval()  # strict: every tensor is accounted for
    tokens = torch.randint(checkpoint["shape"]["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(0))
    return model.decode(tokens[:, 8:], model.encode(tokens[:, :8], attention="causal"), "causal")


@dataclass
class Config:
    source: str  # AR checkpoint: a .pt file, the out_dir of a run, or a published model: smollm2, a folder, a .gguf file
    target: str  # the diffusion checkpoint to write
    process: str = "uniform"  # uniform (the paper), absorbing or gaussian
    inputs_attention: str | None = None  # causal, bidirectional or full; default: bidirectional, published weights causal
    shift: bool | None = None  # read position i from the slot before it, as AR did; default: published weights only


def main(argv=None):
    config = parse(Config, argv)
    one_of("inputs_attention", config.inputs_attention or "causal", INPUTS_ATTENTION)
    one_of("process", config.process, PROCESSES)
    target = Path(config.target) if config.target.endswith(".pt") else Path(config.target) / "ckpt.pt"
    check(not target.exists(), f"{target} exists; it is not overwritten")
    checkpoint = load_checkpoint(config.source)
    given = {key: value for key in ("inputs_attention", "shift") if (value := getattr(config, key)) is not None}
    options = usual(checkpoint) | given
    check(not options.get("shift") or checkpoint["shape"]["architecture"] == "decoder-only",
          "--shift: the targets of an encoder-decoder do not follow its inputs")
    options["shift"] = checkpoint["process"].get("start") if options.get("shift") else None
    process = new_process(config.process, tokenizer_of(checkpoint), **options)
    converted, report = transfer(checkpoint, process)
    for name, shape, n, fate in report:
        print(f"  {fate:6s}  {name:34s} {str(shape):14s} {n:12,d}")
    print(f"{len(report)} tensors, {sum(n for _, _, n, _ in report):,} values: " + ", ".join(
        f"{sum(n for *_, n, f in report if f == fate):,} {fate}" for fate in ("copied", "new")) + ", none left over")
    print(f"attention of the inputs: {checkpoint['process']['inputs_attention']} -> {process.inputs_attention}; "
          f"of the targets: causal -> bidirectional")
    save_checkpoint(target, converted)
    written = load_checkpoint(target)  # the claim is about the file, so it is read back
    check(torch.equal(causal_logits(checkpoint), causal_logits(written)), f"{target} does not give the same logits")
    print("logits under the causal pattern: bit-identical")
    print(f"wrote {target}, from {find_checkpoint(config.source)}; continue with: python train_diff.py --init_from={target}")


if __name__ == "__main__":
    run(main)
