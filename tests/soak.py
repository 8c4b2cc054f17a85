"""Random faults on hosts and a cluster for a while: tests/soak.py [SECONDS [SEED]]; or make soak.

A round is one batch of 200 short jobs in a new folder, with files to fetch.  Meanwhile faults hit
the three hosts: cut networks, resets, freezes, reboots, full disks, killed runners.  The program
itself is killed or interrupted.  Nodes of the cluster crash or lose contact, and its controller
freezes, stops and lies.  Then the faults end, the same command runs until the batch is done, and
each job must have run exactly once.  pytest does not collect this; it needs the packages of
hosts.py and clusters.py.
"""
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import clusters
import hosts as host_rig
from batching import NO_GPU, wait_until
from ledgers import check_exactly_once, ledger_line
from test_slurm import hasty
from test_slurm_faults import FINAL

PROGRAM = Path(__file__).with_name('crash.py')
IMPATIENT = hasty(RETRY_S=0.3, LONGEST_RETRY_S=2.0, BEAT_S=1.0, SILENCE_LIMIT_S=8.0,
                  LATECOMER_S=2.0)
JOBS, RUNS = 200, 30
COMMANDS = ('true', 'sleep 0.1', 'sleep 0.5', 'head -c 30000 /dev/zero | tr "\\0" x && echo',
            'head -c 200000 /dev/urandom >big', 'mkdir -p a/b; echo made >a/b/c', 'wc -c <data')
LIMIT_S = 120               # for one run without faults


def for_a_while(begin, end):
    def fault(dice):
        begin()
        time.sleep(dice.choice((0.2, 1, 5)))
        end()
    return fault


def faults_of(machine):
    """Return {name: function}; each function makes a fault on the machine and ends it again."""
    return (faults_of_cluster if isinstance(machine, clusters.Login) else faults_of_host)(machine)


def faults_of_host(host):
    def if_there(function):
        def fault(_dice):
            with contextlib.suppress(LookupError, ProcessLookupError):
                function()
        return fault

    def if_room(function):
        def begin():
            with contextlib.suppress(OSError):          # a job used the space at this moment
                function()
        return begin

    return {'cut': for_a_while(host.cut, host.restore),
            'drop replies': for_a_while(host.drop_replies, host.restore),
            'drop requests': for_a_while(host.drop_requests, host.restore),
            'reject': for_a_while(host.reject, host.restore),
            'loss': for_a_while(host.lossy, host.restore),
            'freeze sessions': for_a_while(host.freeze_sessions, host.thaw),
            'freeze': for_a_while(host.freeze, host.thaw),
            'stop sshd': for_a_while(host.stop, host.start),
            'fill disk': for_a_while(if_room(host.fill_disk), host.free_disk),
            'reset': if_there(host.reset_connections),
            'kill sessions': if_there(host.kill_sessions),
            'kill runner': if_there(host.kill_runner),
            'reboot': if_there(host.reboot)}


LIES = {'banners': ('sbatch', clusters.BANNERS),
        'accepted, timed out': ('sbatch', clusters.ACCEPTED_TIMED_OUT),
        'lost, timed out': ('sbatch', clusters.LOST_TIMED_OUT),
        'accepted, killed': ('sbatch', clusters.ACCEPTED_KILLED),
        'lost, killed': ('sbatch', clusters.LOST_KILLED),
        'twice': ('sbatch', clusters.ACCEPTED_TWICE),
        'another id': ('sbatch', clusters.says_id(77777)),
        'silent scancel': ('scancel', clusters.NOTHING), 'empty list': ('squeue', clusters.NOTHING),
        'no list': ('squeue', clusters.AWAY), 'old list': ('squeue', clusters.LAGS)}


def faults_of_cluster(login):
    cluster = login.cluster

    def node_fails(*how):
        def fault(dice):
            node = dice.choice(('n1', 'n2'))
            for begin in how:
                begin(node)
            time.sleep(dice.choice((0.2, 1, 5)))
            cluster.boot(node)
            with contextlib.suppress(RuntimeError):         # the node is up already
                cluster.scontrol('update', f'nodename={node}', 'state=resume')
        return fault

    def lies(name, script):
        def end():
            with contextlib.suppress(FileNotFoundError):    # the stand-in removed one of its files
                cluster.unwrap(name)
        return for_a_while(lambda: cluster.wrap(name, script), end)

    def kill_runner(_dice):
        for file in cluster.workdir.glob('*/run.*/self'):
            with contextlib.suppress(OSError, IndexError, ValueError):
                os.kill(int(file.read_text().split()[0]), signal.SIGKILL)

    def reboot(_dice):
        login.power_off()
        login.set_boot_id()
        login.start()

    return {'freeze controller': for_a_while(cluster.freeze, cluster.thaw),
            'end controller': for_a_while(cluster.halt, cluster.resume),
            'part node': node_fails(cluster.part),
            'part and lose node': node_fails(cluster.part, cluster.lose),
            'crash node': node_fails(cluster.crash),
            'crash and lose node': node_fails(cluster.crash, cluster.lose),
            'kill runner there': kill_runner, 'reboot login node': reboot,
            **{f'Slurm lies: {name}': lies(*lie) for name, lie in LIES.items()}}


def round_of(dice, machines, folder, happened):
    """Run one batch under faults, check it, and return the number of runs.

    happened: counts the faults, and the job starts on each machine
    """
    project = folder / 'project'
    project.mkdir(parents=True)
    (project / 'data').write_bytes(os.urandom(400_000))
    lines = [ledger_line(f': {n}; {dice.choice(COMMANDS)}') for n in range(JOBS)]
    (project / 'batch.sh').write_text('\n'.join(lines) + '\n')
    quick = {'ServerAliveInterval': 1, 'ServerAliveCountMax': 3, 'ConnectTimeout': 3}
    files = [machine.yaml(max_jobs=4, ssh_options={
        'UserKnownHostsFile': str(machine.known_hosts), **quick}) for machine in machines]
    argv = [sys.executable, PROGRAM, 'execute_batch', 'batch.sh', *NO_GPU, '--retries=50',
            '--cluster-after=0.2', '--machines', *map(str, files)]
    (folder / 'tmp').mkdir()
    env = {**os.environ, 'HOME': str(folder), 'TMPDIR': str(folder / 'tmp'),
           **IMPATIENT}
    said, complaints, troubled = [], [], dice.randrange(1, 6)
    for number in range(RUNS):
        calm = number >= troubled
        out, err = folder / f'out.{number}', folder / f'err.{number}'
        with open(out, 'w') as stdout, open(err, 'w') as stderr:
            process = subprocess.Popen(argv, cwd=project, env=env, stdin=subprocess.DEVNULL,
                                       stdout=stdout, stderr=stderr, start_new_session=True)
            try:
                began = time.monotonic()
                while process.poll() is None and not calm and time.monotonic() < began + 20:
                    time.sleep(dice.uniform(0, 1.5))
                    if dice.random() < 0.3:
                        said.append(ask(dice, argv, {'cwd': project, 'env': env}, happened))
                    else:
                        trouble(dice, machines, process, happened)
                if not calm:        # a calm run continues to its end
                    process.send_signal(dice.choice((signal.SIGKILL, signal.SIGINT)))
                process.wait(LIMIT_S)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        said.append(out.read_text())
        complaints.append(err.read_text())
        assert 'Traceback' not in complaints[-1], complaints[-1]
        (summary,) = re.findall('^(?:done|interrupted): .*', said[-1], re.M) or ['']
        if calm and summary.startswith('done') and ' not ' not in summary:
            break               # some jobs may have failed, when the disk was full
    else:
        raise AssertionError(f'not done after {RUNS} runs:\n{said[-1]}\n{complaints[-1]}')
    check_exactly_once(machines, project / 'job_results', said,
                       jobs=[f'batch.sh.{n}' for n in range(1, JOBS + 1)], again=True)
    for machine in machines:
        happened[f'jobs on {machine.name}'] += machine.ledger.read_text().count(' start\n')
        forget(machine)
    return number + 1


def forget(machine):
    """Remove the files of a round from a machine.

    A killed run leaves files, which the next run in the same folder would remove.  But each round
    has a new folder, so after 50 rounds the disk would be full.
    """
    machine.ledger.write_text('')
    shutil.rmtree(machine.home / '.ssh_scheduler', ignore_errors=True)
    if isinstance(machine, clusters.Login):
        wait_until(lambda: all(job.state in FINAL for job in machine.cluster.squeue()),
                   'Slurm has no job any more')
        for path in machine.cluster.workdir.iterdir():
            shutil.rmtree(path, ignore_errors=True)


def ask(dice, argv, how, happened):
    """Run another command that requests something of the client; return its output.

    If no client runs, the command acts by itself, and `the same again` becomes the client.
    """
    job, file = str(dice.randrange(1, JOBS + 1)), dice.choice(argv[argv.index('--machines') + 1:])
    name, options = dice.choice([
        ('cancel', ['--cancel', job]), ('rerun', ['--rerun', job]), ('rerun', ['--rerun-failed']),
        ('drop', ['--drop-machine', file]), ('move', ['--drop-machine', file, '--now']),
        ('the same again', None)])
    happened[name] += 1
    words = argv if options is None else [*argv[:argv.index('batch.sh') + 1], *options]
    done = subprocess.run(words, **how, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=LIMIT_S)
    assert 'Traceback' not in done.stderr, done.stderr
    return done.stdout


def trouble(dice, machines, process, happened):
    if dice.random() < 0.1:
        what = dice.choice((signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        happened[f'{what.name} here'] += 1
        process.send_signal(what)
        return
    machine = dice.choice(machines)
    name, fault = dice.choice(sorted(faults_of(machine).items()))
    happened[name] += 1
    fault(dice)


def main(limit_s=600, seed=None):
    missing = host_rig.why_not() or clusters.why_not()
    if missing:
        sys.exit(missing)
    seed = random.randrange(10**6) if seed is None else seed
    print(f'soak: seed {seed}, {limit_s} s', flush=True)
    dice, happened, began = random.Random(seed), Counter(), time.monotonic()
    rounds = runs = 0
    folder = Path(tempfile.mkdtemp(prefix='soak-'))
    with contextlib.ExitStack() as stack:
        machines = [stack.enter_context(host_rig.Host(f'host{n}', disk={
            'size': 60 << 20, 'inodes': 50000})) for n in range(3)]
        machines.append(stack.enter_context(clusters.Cluster(conf=['MessageTimeout=2'])).login)
        while time.monotonic() < began + limit_s:
            try:
                runs += round_of(dice, machines, folder / str(rounds), happened)
            except BaseException:
                print(f'soak: seed {seed}: round {rounds} failed: {folder}/{rounds}', flush=True)
                raise
            shutil.rmtree(folder / str(rounds))
            rounds += 1
            print(f'soak: round {rounds}, {runs} runs, {time.monotonic() - began:.0f} s',
                  flush=True)
    shutil.rmtree(folder)
    where = {name: happened.pop(name) for name in list(happened) if name.startswith('jobs on ')}
    print(f'soak: seed {seed}: {rounds} rounds of {JOBS} jobs in {runs} runs, '
          f'{time.monotonic() - began:.0f} s, each job exactly once; '
          + ', '.join(f'{count} {name}' for name, count in sorted(where.items()))
          + f'; {sum(happened.values())} faults: '
          + ', '.join(f'{count} {name}' for name, count in sorted(happened.items())))


if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
