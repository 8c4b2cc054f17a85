"""Many short jobs on a cluster: what a user of plain sbatch waits for, and asks of the controller.

The cluster is that of the tests, tests/clusters.py: a real Slurm, two nodes of 4 cores.
"""
import subprocess
import time

import clusters
from ground import SAFETY_NET_S, Failed, rig_folder

# Runs on the login node.  $1: how many jobs, $2: the folder of their results.
SUBMIT = r'''
for ((number = 1; number <= $1; number++)); do
    printf '#!/bin/bash\ntrue\necho $? >%s/%s.new && mv %s/%s.new %s/%s\n' \
        "$2" "$number" "$2" "$number" "$2" "$number" |
        sbatch --quiet --chdir=/ --output=/dev/null || exit
done
'''


def plain_sbatch(bench):
    """200 x true, one sbatch for each, from the first of them to the last result on the disk."""
    why_not = clusters.why_not()
    if why_not:
        raise Failed(why_not)
    jobs, rounds = (50, 1) if bench.quick else (200, 3)
    with rig_folder(bench.top):
        runs = sorted(submit_all(bench, jobs) for _ in range(rounds))
    cost, submitted_s, rpcs = runs[len(runs) // 2]
    counted = ', '.join(f'{count} {kind}' for kind, count in rpcs)
    bench.row(f'{jobs} x true by plain sbatch, 2 nodes of 4 cores', f'{cost.seconds:.2f} s', '-',
              None, f'from {runs[0][0].seconds:.1f} to {runs[-1][0].seconds:.1f} s; '
              f'{submitted_s:.2f} s until all are submitted; {counted}; processor time of '
              f'ssh {cost.here_ms:.0f} ms, of its login {cost.there_ms:.0f} ms')


def submit_all(bench, jobs):
    """(Cost, seconds until the last sbatch has ended, what was asked) on a cluster of its own."""
    with clusters.Cluster() as cluster:
        bench.meter.watch(cluster.login)
        folder = cluster.workdir / 'results'
        folder.mkdir()

        def run(enter):
            began = time.monotonic()
            done = subprocess.run([*cluster.login.ssh_argv(), f'bash -s {jobs} {folder}'],
                                  input=SUBMIT, capture_output=True, text=True, preexec_fn=enter,
                                  timeout=SAFETY_NET_S)
            if done.returncode:
                raise Failed(f'sbatch: {done.stderr.strip()[-500:]}')
            submitted_s = time.monotonic() - began
            while len(results(folder)) < jobs:
                if time.monotonic() - began > SAFETY_NET_S:
                    raise Failed(f'{jobs} results should be there, {len(results(folder))} are')
                time.sleep(0.01)
            return submitted_s

        cost, submitted_s = bench.meter.measure(run)
        if {path.read_text() for path in results(folder)} != {'0\n'}:
            raise Failed('not all jobs ended with 0')
        return cost, submitted_s, sorted(cluster.rpcs().items())


def results(folder):
    return [path for path in folder.iterdir() if not path.suffix]
