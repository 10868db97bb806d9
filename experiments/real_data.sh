#!/usr/bin/env bash
# Real data at laptop scale: pretrain on books + Python source, AR2Diff, then Multi30k, MBPP and SQuAD with both kinds of model.
# Wants AR2DIFF_DATA, a folder with text/books_train.txt.xz, multi30k/, squad/ and mbpp.jsonl; writes data/prepared/ and out/real/.
set -euo pipefail
: "${AR2DIFF_DATA:?set it to the folder with the data sets}"
PY=${PYTHON:-python} OUT=${OUT:-out/real}
common="--log_every=100 --lr=3e-3 --eval_sequences=128"
run() { echo; echo "\$ python $*"; "$PY" "$@"; }

run data/prepare.py text --out=data/prepared/books --sources="$AR2DIFF_DATA/text/books_train.txt.xz:0.8,stdlib:code:0.2"
for task in multi30k squad mbpp; do run data/prepare.py $task --from_dir="$AR2DIFF_DATA"; done
run train_ar.py   --data=books --steps=1000 --batch_size=16 --eval_every=250 $common --out_dir="$OUT/ar"
run train_diff.py --data=books --steps=100 --warmup=10 --batch_size=16 --eval_every=100 $common --init_from="$OUT/ar" \
    --out_dir="$OUT/ar2diff_100"

finetune() {  # SCRIPT INIT MODEL: the three tasks, the same steps for both kinds of model
  run $1 --data=multi30k --too_long=drop $common --steps=2000 --batch_size=16 --eval_every=500 \
      --init_from="$OUT/$2" --out_dir="$OUT/$3_multi30k"
  run eval.py "$OUT/$3_multi30k" --n_examples=200 --out="$OUT/$3_multi30k/predictions.jsonl"
  run $1 --data=mbpp --too_long=drop $common --steps=200 --batch_size=8 --eval_every=50 --input_len=256 --target_len=160 \
      --init_from="$OUT/$2" --out_dir="$OUT/$3_mbpp"
  run eval.py "$OUT/$3_mbpp" --n_examples=50 --allow_code_execution --out="$OUT/$3_mbpp/predictions.jsonl"
  run $1 --data=squad --too_long=drop $common --steps=400 --batch_size=16 --eval_every=200 --input_len=256 --target_len=24 \
      --init_from="$OUT/$2" --out_dir="$OUT/$3_squad"
  run eval.py "$OUT/$3_squad" --n_examples=200 --out="$OUT/$3_squad/predictions.jsonl"
}
finetune train_ar.py ar ar
finetune train_diff.py ar2diff_100 ar2diff
