"""Train a text diffusion model: from scratch, from an AR checkpoint (AR2Diff), or on from a diffusion checkpoint.

    python train_diff.py --data=text --steps=2000 --out_dir=out/diff                          # diffusion from scratch
    python train_diff.py --data=text --init_from=out/ar --steps=200 --out_dir=out/ar2diff     # AR2Diff_N, N = 200
    python train_diff.py --data=code --init_from=out/ar2diff --out_dir=out/ar2diff_code       # fine-tuning
    python train_diff.py --data=code --init_from=out/ar --out_dir=out/ar2diff0_code           # AR2Diff_0: no stage 2
    python train_diff.py --data=text --process=absorbing --out_dir=out/masked                 # another process: diffusion.py
"""
from dataclasses import dataclass

from ar2diff import transfer
from beyond.guide import GuideConfig, new_guide
from diffusion import PROCESSES, new_process
from engine.cli import check, one_of, parse, run
from model import INPUTS_ATTENTION
from pretrained.loading import process_of
from start import ModelConfig, architecture_of, canvas, choose_tokenizer, new_ar, origin_of
from train_loop import LoopConfig, train


@dataclass
class Config(LoopConfig, ModelConfig, GuideConfig):
    out_dir: str = "out/diff"  # where ckpt.pt, best.pt and metrics.jsonl go
    inputs_attention: str | None = None  # causal, bidirectional or full; default: a diffusion checkpoint's, else bidirectional
    shift: bool | None = None  # read position i from the slot that predicted it under AR; default: the checkpoint's, else false
    process: str | None = None  # uniform (the paper), absorbing or gaussian; default: a diffusion checkpoint's, else uniform
    # Options of one process; default: the checkpoint's, else as told
    n_unroll: int | None = None  # uniform: passes of the loss; 1 = plain denoising; default 2, the paper's L1 + L2
    unroll_temperature: float | None = None  # uniform: of the model's own guess in between; default 0, the paper; 1 = SUNDAE
    weighted: bool | None = None  # absorbing: weight 1/t, which makes the loss a likelihood bound; default true
    vector_width: int | None = None  # gaussian: width of the token vectors; default 32
    self_condition: float | None = None  # gaussian: share of steps that see a first estimate; default 0.5


RANGES = {"n_unroll": (1, 2), "unroll_temperature": (0, 1000), "vector_width": (2, 1 << 20), "self_condition": (0, 1)}
OPTIONS = (*RANGES, "weighted")


def main(argv=None):
    config = parse(Config, argv)
    given = {option: value for option in OPTIONS if (value := getattr(config, option)) is not None}
    for option, (low, high) in RANGES.items():
        value = given.get(option, low)
        check(low <= value <= high, f"--{option}={value} must lie between {low} and {high}")
    origin = origin_of(config)
    tokenizer = choose_tokenizer(config, origin)
    is_ar = origin is not None and origin["process"]["name"] == "ar"
    inherited = origin["process"] if origin and not is_ar else {"name": "uniform", "inputs_attention": "bidirectional"}
    name = one_of("process", config.process or inherited["name"], PROCESSES)
    check(origin is None or is_ar or name == inherited["name"],
          f"{config.init_from or config.out_dir} is a checkpoint of the process {inherited['name']!r}, not {name!r}; "
          f"start from an autoregressive one, or leave --process out")
    inputs_attention = one_of("inputs_attention", config.inputs_attention or inherited["inputs_attention"], INPUTS_ATTENTION)
    options = {option: inherited[option] for option in OPTIONS if option in inherited} | given
    ar = process_of(origin) if is_ar else new_ar(config, tokenizer, origin)  # what these weights were, or would have been
    shifted = config.shift if config.shift is not None else inherited.get("shift") is not None
    check(not shifted or architecture_of(config, origin) == "decoder-only",
          "--shift: the targets of an encoder-decoder stand behind no inputs")
    options["shift"] = ar.start if shifted else None
    process = new_process(name, tokenizer, inputs_attention=inputs_attention, **options)
    new, old = options.get("vector_width"), inherited.get("vector_width")
    check(old is None or new == old, f"--vector_width={new} differs from the checkpoint's, {old}")
    guide = new_guide(config, process, ar, tokenizer, canvas(config))
    if is_ar and not config.resume:
        print(f"AR2Diff: {config.init_from} is an autoregressive checkpoint (step {origin['step']}); its weights go on as "
              f"{name} diffusion, attention of the targets turns from causal to bidirectional")
        origin, _ = transfer(origin, process, config.seed)
    return train(config, process, tokenizer, origin, guide)


if __name__ == "__main__":
    run(main)
