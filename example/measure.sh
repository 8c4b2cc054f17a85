#!/usr/bin/env bash
# One experiment of example/sweep.sh: it writes a file that all have, and a table of its own.
set -eu
seed=$1
mkdir -p results/tables
echo '{"model": "small", "steps": 3}' >results/config.json
for step in 1 2 3; do
    echo "$seed,$step,$((seed * step))"
done >"results/tables/seed$seed.csv"
