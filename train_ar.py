"""Train autoregressively: pretraining on text, or fine-tuning on a task.

    python train_ar.py --data=text --steps=2000 --out_dir=out/ar
    python train_ar.py --data=code --init_from=out/ar --out_dir=out/ar_code
    torchrun --nproc_per_node=8 train_ar.py ...             # the same experiment, on 8 GPUs
"""
from dataclasses import dataclass

from autoregressive import Autoregressive
from checkpoint import load_checkpoint
from config import check, one_of, parse, run
from model import ModelConfig
from train_loop import LoopConfig, choose_tokenizer, train


@dataclass
class Config(LoopConfig, ModelConfig):
    out_dir: str = "out/ar"  # where ckpt.pt, best.pt and metrics.jsonl go
    inputs_attention: str = "causal"  # causal (the paper's AR stage) or bidirectional (a prefix LM in the sense of T5)


def main(argv=None):
    config = parse(Config, argv)
    one_of("inputs_attention", config.inputs_attention, ("causal", "bidirectional"))
    initial = load_checkpoint(config.init_from) if config.init_from and not config.resume else None
    check(initial is None or initial["process"]["name"] == "ar",
          f"{config.init_from} is a diffusion checkpoint; train_ar.py continues autoregressive ones only")
    tokenizer = choose_tokenizer(config, initial)
    process = Autoregressive(tokenizer.mask, tokenizer.eos, tokenizer.pad, config.inputs_attention)
    return train(config, process, tokenizer, initial)


if __name__ == "__main__":
    run(main)
