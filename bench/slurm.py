"""Many short jobs on a cluster, as a batch and by plain sbatch, and the controller's requests.

The cluster is that of the tests, tests/clusters.py: a real Slurm, two nodes of 4 cores.
"""
import subprocess
import time

import clusters
from ground import SAFETY_NET_S, Failed, Goal, rig_folder

# Runs on the login node.  $1: the number of jobs, $2: the folder of their results.
SUBMIT = r'''
for ((number = 1; number <= $1; number++)); do
    printf '#!/bin/bash\ntrue\necho $? >%s/%s.new && mv %s/%s.new %s/%s\n' \
        "$2" "$number" "$2" "$number" "$2" "$number" |
        sbatch --quiet --chdir=/ --output=/dev/null || exit
done
'''


def on_a_cluster(bench):
    """Compare 200 x true by sbatch and as a batch; measure how soon the end of a job is shown."""
    why_not = clusters.why_not()
    if why_not:
        raise Failed(why_not)
    jobs, rounds = (50, 1) if bench.quick else (200, 3)
    with rig_folder(bench.top):
        plain, ours = zip(*((submit_all(bench, jobs), run_batch(bench, jobs))
                            for _ in range(rounds)))
        late_s = sorted(lateness(bench) for _ in range(rounds))
    cost, submitted_s, rpcs = sorted(plain)[rounds // 2]
    bench.row(f'{jobs} x true by plain sbatch, 2 nodes of 4 cores', f'{cost.seconds:.2f} s', '-',
              None, f'from {min(plain)[0].seconds:.1f} to {max(plain)[0].seconds:.1f} s; '
              f'{submitted_s:.2f} s until all are submitted; {told(rpcs)}; processor time of '
              f'ssh {cost.here_ms:.0f} ms, of its login {cost.there_ms:.0f} ms')
    mine, asked = sorted(ours)[rounds // 2]
    bench.compared(f'{jobs} x true on a cluster : plain sbatch', Goal('<=', 1.5, '{:.2f}'),
                   bench.in_memory([mine.seconds / cost.seconds]),
                   f'{mine.seconds:.1f} s, from {min(ours)[0].seconds:.1f} to '
                   f'{max(ours)[0].seconds:.1f}; {told(asked)}; processor time here '
                   f'{mine.here_ms:.0f} ms, of the login node {mine.there_ms:.0f} ms')
    bench.row('from the end of a job there to `finished:`', f'{late_s[rounds // 2]:.2f} s', '3 s',
              late_s[rounds // 2] <= 3, f'from {late_s[0]:.2f} to {late_s[-1]:.2f} s')


def told(rpcs):
    return ', '.join(f'{count} {kind}' for kind, count in rpcs)


def run_batch(bench, jobs):
    """Run the lines as a batch on a new cluster; return (Cost, counts of requests)."""
    with clusters.Cluster() as cluster:
        bench.meter.watch(cluster.login)
        file = cluster.yaml()
        cost, _ = bench.meter.measure(lambda enter: bench.batch(
            bench.versions[0].argv('execute_batch'), ['true'] * jobs, bench.folder(),
            '--no-gpu-required', '--memory-required=100', '--copy-forwards', '--copy-backwards',
            '--machines', file, enter=enter))
        return cost, sorted(cluster.rpcs().items())


def lateness(bench):
    """Return the seconds from the end of a job of 20 s to the line `finished:` of the client."""
    with clusters.Cluster() as cluster:
        folder = bench.folder()
        (folder / 'batch.sh').write_text('sleep 20; date +%s.%N\n')
        argv = [*bench.versions[0].argv('execute_batch'), 'batch.sh', '--no-gpu-required',
                '--copy-forwards', '--machines', cluster.yaml()]
        with subprocess.Popen([*map(str, argv)], cwd=folder, env=bench.env, text=True,
                              stdout=subprocess.PIPE) as process:
            until_s = next(time.time() for line in process.stdout if line.startswith('finished:'))
            process.stdout.read()
        return until_s - float((folder / 'job_results/batch.sh.1.out').read_text())


def submit_all(bench, jobs):
    """Submit the jobs on a new cluster; return (Cost, seconds of all sbatch, requests)."""
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
