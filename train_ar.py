"""Train autoregressively: pretraining on text, or fine-tuning on a task.

    python train_ar.py --data=text --steps=2000 --out_dir=out/ar
    python train_ar.py --data=code --init_from=out/ar --out_dir=out/ar_code
    torchrun --nproc_per_node=8 train_ar.py ...             # the same experiment, on 8 GPUs
"""
from dataclasses import dataclass

from autoregressive import Autoregressive
from config import check, one_of, parse, run
from model import ModelConfig
from start import architecture_of, choose_tokenizer, origin_of
from train_loop import LoopConfig, train


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
    default = "causal" if architecture_of(config, origin) == "decoder-only" else "bidirectional"
    inputs_attention = config.inputs_attention or (origin["process"]["inputs_attention"] if origin else default)
    one_of("inputs_attention", inputs_attention, ("causal", "bidirectional"))
    start = origin["process"]["start"] if origin else tokenizer.mask
    process = Autoregressive(start, tokenizer.eos, tokenizer.pad, inputs_attention)
    return train(config, process, tokenizer, origin)


if __name__ == "__main__":
    run(main)
