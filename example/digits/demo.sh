#!/usr/bin/env bash
# Run a sweep, show its results as a table and a page, change the code, and reproduce a job.
#   bash example/digits/demo.sh                    on this computer, with the python3 of this shell
#   bash example/digits/demo.sh MACHINE...         with the python3 of these machines
# It needs scikit-learn, works in a new folder, and prints its path.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
[ $# -gt 0 ] || { set -- localhost; PYTHON=$(command -v python3); export PYTHON; }
cp -R "$here" "$folder/example"
cd "$folder"

show() {
    echo "\$ $*"
    "$@" || echo "exit status $?"
    echo
}

bash example/digits/grid.sh >digits.sh
show execute_batch digits.sh --machines "$@" --no-gpu-required --memory-required=200M
show results_table job_results --mean-over seed --sort -val_acc --csv job_results/table.csv
show cat job_results/table.csv
show results_table job_results --mean-over seed --sort -val_acc --columns lr,jobs,val_acc --latex
show results_table job_results --html job_results/report.html
echo "# Somebody changes the code: fewer neurons."
sed -i 's/MLPClassifier((32,)/MLPClassifier((8,)/' example/digits/train.py
show execute_batch digits.sh --what 4
show execute_batch digits.sh --reproduce 4
echo "All of it is in $folder"
