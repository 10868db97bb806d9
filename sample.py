"""Write text with a trained model, AR or diffusion, and watch it being written.

    python sample.py out/ar2diff_code --prompt="multiply each even number by 2 and return the sum" --show_steps
    echo "ROMEO:" | python sample.py out/shakespeare --temperature=0.8 --top_k=40
"""
import sys
from dataclasses import dataclass, replace

import torch

from checkpoint import build_model, load_checkpoint, process_of, tokenizer_of
from config import UserError, check, parse, run
from data.dataset import Batch, pad_rows
from noise import Noise
from start import pick_device


@dataclass
class DecodeConfig:
    n_steps: int = 10  # diffusion: decoding steps
    n_samples: int | None = None  # drawn in parallel, the best by model score is kept; default: 8 for diffusion, 1 for AR
    temperature: float | None = None  # 0 = argmax; default: 0.2 for diffusion, 0 for AR
    top_k: int = 0  # AR: draw from the k likeliest tokens only; 0 = from all
    seed: int = 0  # of the random draws
    device: str = "auto"  # auto, cpu, cuda or mps


@dataclass(kw_only=True)
class Config(DecodeConfig):
    checkpoint: str  # positional: a .pt file or the out_dir of a run
    prompt: str | None = None  # the input text; default: standard input
    target_len: int | None = None  # tokens to write at most; default: as trained
    show_steps: bool = False  # print the draft after every step


@dataclass
class Writer:
    """A model ready to write: what sample.py and eval.py need of a checkpoint."""
    model: torch.nn.Module
    process: object
    tokenizer: object
    input_len: int
    target_len: int
    device: torch.device
    options: dict  # for process.decode()

    def drafts(self, batch, noise):
        """Return the drafts (B, T) of every decoding step, the last of which is the answer."""
        return list(self.process.decode(self.model, batch.to(self.device), noise, **self.options))


def load_writer(path, config, target_len=None):
    """Load a checkpoint and check the decoding flags against its process. Raises UserError."""
    checkpoint = load_checkpoint(path)
    process, tokenizer, device = process_of(checkpoint), tokenizer_of(checkpoint), pick_device(config.device)
    is_ar = process.name == "ar"
    n_samples = config.n_samples if config.n_samples is not None else (1 if is_ar else 8)
    temperature = config.temperature if config.temperature is not None else (0.0 if is_ar else 0.2)
    check(config.n_steps >= 1, f"--n_steps={config.n_steps} must be at least 1")
    check(n_samples >= 1, f"--n_samples={n_samples} must be at least 1")
    check(temperature >= 0, f"--temperature={temperature} must not be negative")
    check(0 <= config.seed < 1 << 32, f"--seed={config.seed} must be at least 0 and below 2^32")
    check(config.top_k >= 0, f"--top_k={config.top_k} must not be negative")
    check(is_ar or not config.top_k, f"--top_k is for autoregressive models; {path} is a {process.name} diffusion model")
    check(target_len is None or target_len >= 1, f"--target_len={target_len} must be at least 1")
    own = {"top_k": config.top_k} if is_ar else {"n_steps": config.n_steps}
    longest = checkpoint["target_len"]
    check(target_len is None or target_len <= longest or (is_ar and checkpoint["input_len"] == 0),
          f"--target_len={target_len} is longer than the canvas the model was trained on, {longest} tokens")
    return Writer(build_model(checkpoint, device).eval(), process, tokenizer, checkpoint["input_len"],
                  target_len or checkpoint["target_len"], device, {"temperature": temperature, "n_samples": n_samples, **own})


def prompt_batch(writer, prompt):
    """Return (writer, batch of one row) for a prompt. Raises UserError when it does not fit the model's input columns."""
    ids = writer.tokenizer.encode(prompt)
    if writer.input_len:
        check(len(ids) <= writer.input_len, f"the prompt has {len(ids)} tokens, the model's canvas holds {writer.input_len}; "
                                            f"shorten it, or train with a larger --input_len")
        return writer, pad_rows([(ids, [])], writer.tokenizer, writer.input_len, writer.target_len)
    empty = torch.zeros(1, writer.target_len, dtype=torch.long)
    if not ids:
        return writer, Batch(empty[:, :0], None, empty)
    check(writer.process.name == "ar", "this diffusion model was trained without inputs (input_len 0), so it takes no prompt")
    # A plain language model continues the prompt itself: its columns are read as context, and its last token is fed first.
    inputs = torch.tensor([[writer.process.start, *ids[:-1]]])
    process = replace(writer.process, start=ids[-1], inputs_attention="causal")
    return replace(writer, process=process), Batch(inputs, None, empty)


def show(tokenizer, ids):
    """Return a draft on one line, all of it: EOS as ∎, PAD as a dot, a line end as an arrow."""
    marks = {tokenizer.eos: "∎", tokenizer.pad: "·", tokenizer.mask: "_"}
    pieces, text_ids = [], []
    for i in [*map(int, ids), None]:
        if i is None or i >= tokenizer.n_text:
            pieces.append(tokenizer.decode(text_ids))
            pieces.append("" if i is None else marks.get(i, "?"))
            text_ids = []
        else:
            text_ids.append(i)
    return "".join(pieces).replace("\r", "").replace("\n", "↵")


def main(argv=None):
    config = parse(Config, argv)
    writer = load_writer(config.checkpoint, config, config.target_len)
    try:
        prompt = sys.stdin.read().rstrip("\n") if config.prompt is None else config.prompt
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt on standard input is not UTF-8 ({error.reason} at byte {error.start})") from error
    writer, batch = prompt_batch(writer, prompt)
    drafts = writer.drafts(batch, Noise(config.seed, "decode", 0, [0]))
    if config.show_steps:
        for number, draft in enumerate(drafts, 1):
            print(f"{number:4d}  {show(writer.tokenizer, draft[0])}")
        print()
    print(("" if writer.input_len else prompt) + writer.tokenizer.decode(drafts[-1][0]))


if __name__ == "__main__":
    run(main)
