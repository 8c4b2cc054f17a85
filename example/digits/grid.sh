#!/usr/bin/env bash
# Print a batch file: four learning rates, three seeds each.  PYTHON is python3 by default.
for lr in 0.01 0.1 1 10; do
    for seed in 1 2 3; do
        echo "${PYTHON:-python3} example/digits/train.py --lr $lr --seed $seed"
    done
done
