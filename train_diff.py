"""Train a text diffusion model: from scratch, from an AR checkpoint (AR2Diff), or on from a diffusion checkpoint.

    python train_diff.py --data=text --steps=2000 --out_dir=out/diff                          # diffusion from scratch
    python train_diff.py --data=text --init_from=out/ar --steps=200 --out_dir=out/ar2diff     # AR2Diff_N, N = 200
    python train_diff.py --data=code --init_from=out/ar2diff --out_dir=out/ar2diff_code       # fine-tuning
    python train_diff.py --data=code --init_from=out/ar --out_dir=out/ar2diff0_code           # AR2Diff_0: no stage 2
    python train_diff.py --data=text --process=absorbing --out_dir=out/masked                 # another process: diffusion.py
"""
from dataclasses import dataclass

from ar2diff import transfer
from checkpoint import process_of
from config import check, one_of, parse, run
from diffusion import PROCESSES, new_process
from guide import GuideConfig, new_guide
from model import INPUTS_ATTENTION, ModelConfig
from start import architecture_of, choose_tokenizer, new_ar, origin_of
from train_loop import LoopConfig, train


@dataclass
class Config(LoopConfig, ModelConfig, GuideConfig):
    out_dir: str = "out/diff"  # where ckpt.pt, best.pt and metrics.jsonl go
    inputs_attention: str | None = None  # causal, bidirectional or full; default: a diffusion checkpoint's, else bidirectional
    shift: bool | None = None  # read position i from the slot that predicted it under AR; default: the checkpoint's, else false
    anneal_steps: int = 0  # first steps in which the targets' right context is revealed little by little
    process: str | None = None  # uniform (the paper), absorbing or gaussian; default: a diffusion checkpoint's, else uniform
    # Options of one process; default: the checkpoint's, else as told
    n_unroll: int | None = None  # uniform: passes of the loss; 1 = plain denoising; default 2, the paper's L1 + L2
    unroll_temperature: float | None = None  # uniform: of the model's own guess in between; default 0, the paper; 1 = SUNDAE
    unroll_mean: bool | None = None  # uniform: the mean of the passes' losses (SUNDAE); default: their sum, the paper
    weighted: bool | None = None  # absorbing: weight 1/t, which makes the loss a likelihood bound; default true
    vector_width: int | None = None  # gaussian: width of the token vectors; default 32
    self_condition: float | None = None  # gaussian: share of steps that see a first estimate; default 0.5


OPTIONS = ("n_unroll", "unroll_temperature", "unroll_mean", "weighted", "vector_width", "self_condition")


def main(argv=None):
    config = parse(Config, argv)
    check(config.n_unroll is None or config.n_unroll >= 1, f"--n_unroll={config.n_unroll} must be at least 1")
    check(config.unroll_temperature is None or 0 <= config.unroll_temperature <= 1000,
          f"--unroll_temperature={config.unroll_temperature} must lie between 0 and 1000")
    check(config.vector_width is None or config.vector_width >= 2, f"--vector_width={config.vector_width} must be at least 2")
    check(config.self_condition is None or 0 <= config.self_condition <= 1,
          f"--self_condition={config.self_condition} must lie between 0 and 1")
    check(config.anneal_steps >= 0, f"--anneal_steps={config.anneal_steps} must not be negative")
    origin = origin_of(config)
    tokenizer = choose_tokenizer(config, origin)
    is_ar = origin is not None and origin["process"]["name"] == "ar"
    inherited = origin["process"] if origin and not is_ar else {"name": "uniform", "inputs_attention": "bidirectional"}
    name = one_of("process", config.process or inherited["name"], PROCESSES)
    check(origin is None or is_ar or name == inherited["name"],
          f"{config.init_from or config.out_dir} is a checkpoint of the process {inherited['name']!r}, not {name!r}; "
          f"start from an autoregressive one, or leave --process out")
    inputs_attention = one_of("inputs_attention", config.inputs_attention or inherited["inputs_attention"], INPUTS_ATTENTION)
    options = {option: inherited[option] for option in OPTIONS if option in inherited}
    options |= {option: getattr(config, option) for option in OPTIONS if getattr(config, option) is not None}
    ar = process_of(origin) if is_ar else new_ar(config, tokenizer, origin)  # what these weights were, or would have been
    shifted = config.shift if config.shift is not None else inherited.get("shift") is not None
    options["shift"] = ar.start if shifted else None
    check(not shifted or architecture_of(config, origin) == "decoder-only",
          "--shift: the targets of an encoder-decoder stand behind no inputs")
    check(not config.anneal_steps or inputs_attention != "full", "--anneal_steps does not go with --inputs_attention=full: the "
                                                                 "inputs would show the targets what is still hidden")
    process = new_process(name, tokenizer, inputs_attention=inputs_attention, anneal_steps=config.anneal_steps, **options)
    check(origin is None or is_ar or process.vector_width == inherited.get("vector_width", 0),
          f"--vector_width={process.vector_width} differs from the checkpoint's, {inherited.get('vector_width')}")
    guide = new_guide(config, process, ar, tokenizer)
    if is_ar and not config.resume:
        print(f"AR2Diff: {config.init_from} is an autoregressive checkpoint (step {origin['step']}); its weights go on as "
              f"{name} diffusion, attention of the targets turns from causal to bidirectional")
        origin, _ = transfer(origin, process, config.seed)
    return train(config, process, tokenizer, origin, guide)


if __name__ == "__main__":
    run(main)
