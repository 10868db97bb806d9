#!/usr/bin/env bash
# AR and the three diffusion processes, side by side: likelihood of characters, and quality against decoding steps on code.
# Wants tiny Shakespeare as $1 (input.txt); writes data/prepared/ and $OUT. About 50 minutes on one core.
set -euo pipefail
PY=${PYTHON:-python} OUT=${OUT:-out/processes} TEXT=${1:?the path of tiny Shakespeare}
run() { echo; echo "\$ python $*"; "$PY" "$@"; }

# Bits per character: the same model, the same 4,000 x 12 x 64 characters for each.
[ -d data/prepared/shakespeare ] || run data/prepare.py text --sources="$TEXT" --tokenizer=bytes --out=data/prepared/shakespeare
characters="--data=shakespeare --size=4x128x4 --input_len=0 --target_len=64 --batch_size=12 --steps=4000 --lr=2e-3 --log_every=500 --eval_every=2000"
run train_ar.py $characters --out_dir="$OUT/ar_characters"
for process in absorbing uniform gaussian; do run train_diff.py $characters --process=$process --out_dir="$OUT/${process}_characters"; done
for model in ar absorbing uniform gaussian; do run eval.py "$OUT/${model}_characters" --metric=bits --n_examples=256 --n_draws=32; done

# Code: each process from the same AR model (200 steps on mostly Python text, as in demo.py), and Gaussian from random weights.
[ -d data/prepared/code ] || run data/prepare.py code
[ -d data/prepared/python ] || run data/prepare.py text --sources=stdlib:docs:0.2,stdlib:code:0.8 --out=data/prepared/python
canvas="--size=4x96x3 --batch_size=16 --log_every=200 --eval_every=100000 --eval_sequences=128"
run train_ar.py --data=python --lr=1e-3 --steps=200 --input_len=24 --target_len=32 $canvas --out_dir="$OUT/ar"
for process in uniform absorbing gaussian; do
    run train_diff.py --data=code --lr=3e-3 --steps=1200 $canvas --process=$process --init_from="$OUT/ar" --out_dir="$OUT/$process"
done
run train_diff.py --data=code --lr=3e-3 --steps=1200 $canvas --process=gaussian --out_dir="$OUT/gaussian_scratch"
run eval.py "$OUT/gaussian_scratch" --n_examples=100 --allow_code_execution
run results/decoders.py --allow_code_execution --models="$OUT/uniform,$OUT/absorbing,$OUT/gaussian" --out="$OUT/decoders"
