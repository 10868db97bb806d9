"""Train a text diffusion model: from scratch, from an AR checkpoint (AR2Diff), or on from a diffusion checkpoint.

    python train_diff.py --data=text --steps=2000 --out_dir=out/diff                          # diffusion from scratch
    python train_diff.py --data=text --init_from=out/ar --steps=200 --out_dir=out/ar2diff     # AR2Diff_N, N = 200
    python train_diff.py --data=code --init_from=out/ar2diff --out_dir=out/ar2diff_code       # fine-tuning
    python train_diff.py --data=code --init_from=out/ar --out_dir=out/ar2diff0_code           # AR2Diff_0: no stage 2
"""
from dataclasses import dataclass

from ar2diff import transfer
from config import check, one_of, parse, run
from diffusion import Uniform
from model import INPUTS_ATTENTION, ModelConfig
from start import choose_tokenizer, origin_of
from train_loop import LoopConfig, train


@dataclass
class Config(LoopConfig, ModelConfig):
    out_dir: str = "out/diff"  # where ckpt.pt, best.pt and metrics.jsonl go
    inputs_attention: str | None = None  # causal, bidirectional or full; default: a diffusion checkpoint's, else bidirectional
    n_unroll: int = 2  # passes of the loss: 1 = plain denoising, 2 = the paper's L1 + L2
    unroll_temperature: float = 0.0  # of the model's own guess in between: 0 = the paper, 1 = SUNDAE


def main(argv=None):
    config = parse(Config, argv)
    check(config.n_unroll >= 1, f"--n_unroll={config.n_unroll} must be at least 1")
    check(config.unroll_temperature >= 0, f"--unroll_temperature={config.unroll_temperature} must not be negative")
    origin = origin_of(config)
    tokenizer = choose_tokenizer(config, origin)
    is_ar = origin is not None and origin["process"]["name"] == "ar"
    inherited = origin["process"]["inputs_attention"] if origin and not is_ar else "bidirectional"
    inputs_attention = one_of("inputs_attention", config.inputs_attention or inherited, INPUTS_ATTENTION)
    process = Uniform(tokenizer.n_noise, config.n_unroll, config.unroll_temperature, inputs_attention)
    if is_ar and not config.resume:
        print(f"AR2Diff: {config.init_from} is an autoregressive checkpoint (step {origin['step']}); its weights go on as "
              f"diffusion, attention of the targets turns from causal to bidirectional")
        origin, _ = transfer(origin, process)
    return train(config, process, tokenizer, origin)


if __name__ == "__main__":
    run(main)
