"""Train autoregressively: pretraining on text, or fine-tuning on a task.

    python train_ar.py --data=text --steps=2000 --out_dir=out/ar
    python train_ar.py --data=code --init_from=out/ar --out_dir=out/ar_code
    torchrun --nproc_per_node=8 train_ar.py ...             # the same experiment, on 8 GPUs
"""
from dataclasses import dataclass

from engine.cli import check, one_of, parse, run
from start import LoopConfig, ModelConfig, ar_of, choose_tokenizer, origin_of
from train_loop import train


@dataclass
class Config(LoopConfig, ModelConfig):
    out_dir: str = "out/ar"  # where ckpt.pt, best.pt and metrics.jsonl go
    inputs_attention: str | None = None  # causal or bidirectional; default: the checkpoint's, else causal (encoder: both ways)


def main(argv=None):
    config = parse(Config, argv)
    origin = origin_of(config)
    check(origin is None or origin["process"]["name"] == "ar",
          "train_ar.py continues autoregressive checkpoints only; this one is a diffusion checkpoint")
    tokenizer = choose_tokenizer(config, origin)
    process = ar_of(config, tokenizer, origin)
    if config.inputs_attention:
        process.inputs_attention = one_of("inputs_attention", config.inputs_attention, ("causal", "bidirectional"))
    return train(config, process, tokenizer, origin)


if __name__ == "__main__":
    run(main)
