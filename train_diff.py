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
from engine.cli import parse, run, say
from start import LoopConfig, ModelConfig, choose_process, choose_tokenizer, origin_of
from train_loop import train


@dataclass
class Config(LoopConfig, ModelConfig, GuideConfig):
    out_dir: str = "out/diff"  # where ckpt.pt, best.pt and metrics.jsonl go
    inputs_attention: str | None = None  # causal, bidirectional or full; default: the checkpoint's, else as ar2diff.py has it
    shift: bool | None = None  # read position i from the slot that predicted it under AR; default: likewise
    process: str | None = None  # uniform (the paper), absorbing or gaussian; default: a diffusion checkpoint's, else uniform
    # Options of one process; default: the checkpoint's, else as told
    n_unroll: int | None = None  # uniform: passes of the loss; 1 = plain denoising; default 2, the paper's L1 + L2
    unroll_temperature: float | None = None  # uniform: of the model's own guess in between; default 0, the paper; 1 = SUNDAE
    weighted: bool | None = None  # absorbing: weight 1/t, which makes the loss a likelihood bound; default true
    vector_width: int | None = None  # gaussian: width of the token vectors; default 32
    self_condition: float | None = None  # uniform, gaussian: share that is told its last estimate; default 0, gaussian 0.5


def main(argv=None):
    config = parse(Config, argv)
    origin = origin_of(config)
    tokenizer = choose_tokenizer(config, origin)
    process, ar = choose_process(config, tokenizer, origin)
    guide = new_guide(config, process, ar)
    if origin and origin["process"]["name"] == "ar" and not config.resume:
        say(f"AR2Diff: {config.init_from} is an autoregressive checkpoint (step {origin['step']}); its weights go on as "
              f"{process.name} diffusion, attention of the targets turns from causal to bidirectional, inputs "
              f"{process.inputs_attention}, {'not ' * (process.shift is None)}shifted"
              f"{'; defaults of published weights: causal inputs, shifted, --lr=3e-4' * ('flavour' in origin['shape'])}")
        origin, _ = transfer(origin, process, config.seed)
    return train(config, process, tokenizer, origin, guide)


if __name__ == "__main__":
    run(main)
