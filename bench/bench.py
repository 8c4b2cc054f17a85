"""Figures of ssh-scheduler, each a ratio to a peer at its best that was measured in the same run.

    make bench        or    .venv/bin/python bench/bench.py [--quick] [--only NAME]...

The machines are those of the tests, tests/rig.py: sshd's on loopback, here with OpenSSH's default
key exchange and the start files of /etc/skel.  We and the peer take turns, and the median of each
counts.  Before that both are tried with several numbers of jobs at a time, and keep their best.

The peer is GNU parallel over a ready ControlMaster (its time has no login in it, ours does), on a
machine that allows it more sessions than sshd would by default.
"""
import argparse
import contextlib
import itertools
import os
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
MEMORY_FOLDER = '/dev/shm'      # see README.md: a disk is not what is measured
if os.access(MEMORY_FOLDER, os.W_OK):
    os.environ.setdefault('RIG_FOLDER', MEMORY_FOLDER)
sys.path.insert(0, str(HERE.parent / 'tests'))
sys.path.insert(0, str(HERE.parent))
import rig  # noqa: E402

import ssh_scheduler  # noqa: E402

EXECUTE_BATCH = Path(sys.executable).with_name('execute_batch')    # installed, as users have it
EXECUTE_REMOTE = EXECUTE_BATCH.with_name('execute_remote')
EXECUTE_TO = EXECUTE_BATCH.with_name('execute_to')
COMBINE_FOLDERS = Path(sys.executable).with_name('combine_folders')

CORES = 8                       # what the machines claim; with the overload, 12 can be promised
OUR_SLOTS = (4, 8, 16, 32)      # jobs at a time that are tried
PEER_SLOTS = (2, 4, 8, 16)
SMALL_JOBS = ('--no-gpu-required', '--memory-required=1')
SAFETY_NET_S = 300


class Failed(Exception):
    """Something did not do what is measured here, so there is no figure."""


def bench_machine(name, **settings):
    """A machine as a user's: `+` adds to the default key exchange what is in it already."""
    skel = {path.name: path.read_text() for path in Path('/etc/skel').iterdir() if path.is_file()}
    options = 'KexAlgorithms +curve25519-sha256\nMaxSessions 100\nMaxStartups 100'
    return rig.Machine(name, cores=CORES, gpus=rig.fake_gpus(2), startup=skel,
                       sshd_options=options, **settings)


class Bench:
    """What all figures share: a home for the client, new folders, and the table."""

    def __init__(self, quick):
        self.quick = quick
        self.home = rig.temporary_folder('bench')
        for name in ('tmp', '.parallel'):
            (self.home / name).mkdir()
        self.env = {name: value for name, value in os.environ.items()
                    if not name.startswith(('SSH_', 'XDG_', 'CUDA_'))}
        self.env.update(HOME=str(self.home), TMPDIR=str(self.home / 'tmp'), SHELL='/bin/bash')
        # What is installed is compiled once, and not each time, as these settings may have it here.
        self.env.pop('PYTHONDONTWRITEBYTECODE', None)
        self.env['PYTHONPYCACHEPREFIX'] = str(self.home / 'tmp/compiled')
        self.rows = []
        self._folders = 0

    def folder(self):
        """A new empty folder: for the machines, a project that they have never seen."""
        self._folders += 1
        folder = self.home / f'project{self._folders}'
        folder.mkdir()
        return folder

    def run(self, argv, cwd, stdin=None, env=None):
        """Run argv to its end; return (seconds, its standard output)."""
        began = time.monotonic()
        done = subprocess.run([*map(str, argv)], cwd=cwd, input=stdin, env=env or self.env,
                              capture_output=True, text=True, timeout=SAFETY_NET_S)
        took_s = time.monotonic() - began
        if done.returncode:
            raise Failed(f'{argv[0]} exited with {done.returncode}: '
                         f'{(done.stderr or done.stdout).strip()[-500:]}')
        return took_s, done.stdout

    def batch(self, lines, folder, *options):
        """Run the lines as a batch in the folder; return the seconds from nothing to exit."""
        (folder / 'batch.sh').write_text(''.join(line + '\n' for line in lines))
        took_s, said = self.run([EXECUTE_BATCH, *options, '--', 'batch.sh'], folder)
        if said.count('\nfinished: ') != len(lines):
            raise Failed(f'not all of {len(lines)} jobs finished: {said[-500:]}')
        return took_s

    def row(self, name, measured, goal, passed, details):
        """One line of the table, shown as soon as it is known."""
        self.rows.append((name, measured, goal, passed))
        word = {True: 'pass', False: 'MISS', None: '-'}[passed]
        print(f'{name:<50} {measured:>11} {goal:>11}  {word:<5} {details}', flush=True)


def medians(rounds, *measures):
    """Call the measures in turn, so many rounds; return the median of each."""
    taken = [[measure() for measure in measures] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*taken)]


def quickest(candidates, seconds, rounds):
    """The candidate with the least seconds in any of the rounds, which all take part in."""
    taken = [[seconds(candidate) for candidate in candidates] for _ in range(rounds)]
    return min(zip(map(min, zip(*taken)), candidates))[1]


# ---- GNU parallel, with a ready master ----

@contextlib.contextmanager
def gnu_parallel(bench, machine):
    """Yield run(jobs, slots, command, *options) -> seconds; {} in the command is a number."""
    if not shutil.which('parallel'):
        raise Failed('the peer is missing: apt install parallel')
    shared = ('-o', f'ControlPath={machine.folder}/master')
    subprocess.run(machine.ssh_argv(*shared, '-fNM'), check=True, stdin=subprocess.DEVNULL)
    *ssh, address = machine.ssh_argv(*shared)

    def run(jobs, slots, command, *options, cwd=bench.home):
        argv = ['parallel', '--will-cite', '--ssh', ' '.join(ssh), '-S', f'{slots}/{address}',
                *options, command]
        return bench.run(argv, cwd, stdin=''.join(f'{n}\n' for n in range(jobs)))[0]

    try:
        yield run
    finally:
        subprocess.run(machine.ssh_argv(*shared, '-O', 'exit'), check=True, capture_output=True)


def slots(number):
    """The option that lets so many jobs run at a time on a bench machine."""
    return f'--num-cpus={CORES * 1.5 / number:.3f}'


def compare_rates(bench, name, goal, aim, ours, theirs, jobs):
    """Add the row of a comparison.  ours, theirs: (jobs, slots) -> seconds."""
    our_jobs, their_jobs = (count // 2 if bench.quick else count for count in jobs)
    rounds = 1 if bench.quick else 2
    our_slots = quickest(OUR_SLOTS, lambda n: ours(our_jobs // 3, n), rounds)
    their_slots = quickest(PEER_SLOTS, lambda n: theirs(their_jobs // 2, n), rounds)
    our_s, their_s = medians(2 * rounds - 1, lambda: ours(our_jobs, our_slots),
                             lambda: theirs(their_jobs, their_slots))
    our_rate, their_rate = our_jobs / our_s, their_jobs / their_s
    ratio = our_rate / their_rate
    bench.row(name, f'{ratio:.1f} x', f'>= {goal} x', ratio >= goal,
              f'{our_rate:.0f} jobs/s, {our_slots} at a time; parallel {their_rate:.1f} jobs/s, '
              f'{their_slots} at a time; hoped for: {aim} x')


# ---- The figures ----

def spec_batch(bench):
    """The four lines of the example on two machines, against a bare login; counts the logins."""
    with bench_machine('lab1') as lab1, bench_machine('lab2') as lab2:
        files = [lab1.yaml(), lab2.yaml()]
        logins = []

        def login():
            return bench.run([*lab1.ssh_argv(), 'true'], bench.home)[0]

        def batch():
            folder = bench.folder()
            shutil.copytree(HERE.parent / 'example', folder / 'example')
            before = [machine.logins() for machine in (lab1, lab2)]
            took_s, said = bench.run([EXECUTE_BATCH, 'example/batch_script.sh', '--machines',
                                      *files], folder)
            if said.count('\nfinished: ') != 4:
                raise Failed(f'not all four jobs finished: {said}')
            logins.append([machine.logins() - count for machine, count
                           in zip((lab1, lab2), before)])
            return took_s

        login(), batch()
        login_s, batch_s = medians(3 if bench.quick else 9, login, batch)
    ratio = batch_s / login_s
    bench.row("spec's four lines, two machines : one login", f'{ratio:.2f} x', '<= 2.0 x',
              ratio <= 2.0, f'{batch_s:.2f} s; bare login {login_s:.2f} s')
    most = max(map(max, logins))
    bench.row('logins per machine and batch', str(most), '1',
              all(pair == [1, 1] for pair in logins), f'{len(logins)} batches')


def many_jobs(bench):
    """1,000 x true without copies."""
    with bench_machine('lab1') as machine, gnu_parallel(bench, machine) as parallel:
        file = machine.yaml()

        def ours(jobs, number):
            return bench.batch(['true'] * jobs, bench.folder(), *SMALL_JOBS, slots(number),
                               '--copy-forwards', '--copy-backwards', '--machines', file)

        def theirs(jobs, number):
            return parallel(jobs, number, 'true {}')

        compare_rates(bench, '1,000 x true, one machine : GNU parallel', 8, 10, ours, theirs,
                      (1000, 150))


def many_files(bench):
    """500 jobs with 20 small files staged, a folder each, one result file and output back."""
    with bench_machine('lab1') as machine, gnu_parallel(bench, machine) as parallel:
        file = machine.yaml()

        def project():
            folder = bench.folder()
            (folder / 'data').mkdir()
            for number in range(20):
                (folder / f'data/{number}').write_text(f'{number}\n' * 200)
            return folder

        def ours(jobs, number):
            folder = project()
            took_s = bench.batch(['cat data/* >result; echo done'] * jobs, folder, *SMALL_JOBS,
                                 slots(number), '--copy-forwards', 'data', '--copy-backwards',
                                 'result', '--machines', file)
            check_results(folder.glob('job_results/*/result'), jobs)
            return took_s

        def theirs(jobs, number):
            # Under `--workdir ...` parallel puts relative base files nowhere, so a folder for
            # each job is made by the command; that is faster, too.
            folder = project()
            command = 'mkdir {} && cp -r data {} && cd {} && cat data/* >result; echo done'
            took_s = parallel(jobs, number, command, '--basefile', 'data', '--workdir',
                              folder.name, '--return', '{}/result', '--cleanup', cwd=folder)
            check_results(folder.glob('*/result'), jobs)
            return took_s

        compare_rates(bench, '500 jobs with 20 files, result : GNU parallel', 5, 8, ours, theirs,
                      (500, 100))


def check_results(paths, jobs):
    sizes = [path.stat().st_size for path in paths]
    if len(sizes) != jobs or not all(sizes):
        raise Failed(f'{jobs} results should have come back, {len(sizes)} did')


def memory(bench):
    """Peak memory of a client whose 10,000 lines wait behind jobs that block."""
    folder = bench.folder()
    os.mkfifo(folder / 'never')
    (folder / 'batch.sh').write_text('cat <"$OLDPWD"/never\n' * 10000)
    with started(bench, folder, 'batch.sh', '--num-cpus=0.01') as client:
        limits = running = 0
        for line in client.stdout:
            if line.startswith('machine limits: '):
                limits = int(line.rpartition(':')[2].strip(' }\n'))
            running += line.startswith('started: ')
            if running and running == limits:
                break
        else:
            raise Failed('the batch did not start')
        status = Path(f'/proc/{client.pid}/status').read_text()
        client.send_signal(signal.SIGINT)
        client.stdout.read()
        if client.wait(SAFETY_NET_S) != 130:
            raise Failed(f'interrupted, it exited with {client.returncode}')
    peak_mb = int(status.partition('VmHWM:')[2].split()[0]) / 1000
    bench.row('client memory, 10,000 lines waiting', f'{peak_mb:.0f} MB', '<= 60 MB',
              peak_mb <= 60, f'peak, {running} jobs running')


def cost_per_job(bench):
    """Processor time of the client per job: 5,000 lines against 500."""
    long, rounds = (2000, 1) if bench.quick else (5000, 3)

    def cpu_of(jobs):
        folder = bench.folder()
        (folder / 'batch.sh').write_text('true\n' * jobs)
        with started(bench, folder, 'batch.sh', '--num-cpus=0.1') as client:
            client.stdout.read()
            # Its own time, without that of its children: readable until it is waited for.
            os.waitid(os.P_PID, client.pid, os.WEXITED | os.WNOWAIT)
            stat = Path(f'/proc/{client.pid}/stat').read_text()
            if client.wait(SAFETY_NET_S):
                raise Failed(f'a batch of {jobs} exited with {client.returncode}')
        ticks = sum(map(int, stat.rpartition(')')[2].split()[11:13]))
        return ticks / os.sysconf('SC_CLK_TCK')

    one, few, many = medians(rounds, *(lambda n=n: cpu_of(n) for n in (1, 500, long)))
    few_ms, many_ms = (few - one) / 499 * 1000, (many - one) / (long - 1) * 1000
    ratio = many_ms / few_ms
    bench.row(f"client's cost per job, {long:,} lines : 500", f'{ratio:.2f} x', '<= 1.3 x',
              ratio <= 1.3, f'{many_ms:.2f} ms and {few_ms:.2f} ms; to start: {one:.2f} s')


@contextlib.contextmanager
def started(bench, folder, batch, *options):
    """A running batch on this machine without files; it is killed if it is left running."""
    client = subprocess.Popen(
        [str(EXECUTE_BATCH), *SMALL_JOBS, *options, '--copy-forwards', '--copy-backwards',
         '--machines', 'localhost', '--', batch], cwd=folder, env=bench.env, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        yield client
    finally:
        client.stdout.close()
        if client.poll() is None:
            client.kill()
            client.wait()


def small_sources(folder, files):
    """Three folders of so many small files, in folders of 100; half of the paths are in all."""
    for number in (1, 2, 3):
        for file in range(files):
            into = folder / f'src{number}/{file // 100:05}'
            if file % 100 == 0:
                into.mkdir(parents=True)
            owner = number if file % 2 else 'all'
            (into / f'result-{file}-{owner}').write_text(f'{file} {owner}\n' * (50 + file % 100))
    return [folder / f'src{number}' for number in (1, 2, 3)]


def combine_small(bench):
    """Three folders of 10,000 small files that share half of their paths: rsync, one dest."""
    files, rounds = 10000, 3 if bench.quick else 9
    folder = bench.folder()
    sources = small_sources(folder, files)
    ours, theirs = folder / 'ours', folder / 'theirs'

    def combine():
        shutil.rmtree(ours, ignore_errors=True)
        return bench.run([COMBINE_FOLDERS, '--quiet', ours, *sources], folder)[0]

    def rsync():
        shutil.rmtree(theirs, ignore_errors=True)
        return bench.run(['rsync', '-a', *(f'{source}/' for source in sources), f'{theirs}/'],
                         folder)[0]

    combine(), rsync()
    our_s, their_s = medians(rounds, combine, rsync)
    bench.run(['diff', '-r', ours, theirs], folder)
    shutil.rmtree(folder)
    bench.row(f'combine 3 x {files:,} small files : rsync -a', f'{our_s / their_s:.2f} x',
              '<= 1.0 x', our_s <= their_s, f'{our_s:.2f} s; rsync {their_s:.2f} s, which compares '
              'nothing')


def combine_large(bench):
    """One file of 4 GB against cp, which copies with the same system call."""
    megabytes, rounds = (2000, 3) if bench.quick else (4000, 7)
    folder = bench.folder()
    (folder / 'src').mkdir()
    with open(folder / 'src/large', 'wb') as file:
        for _ in range(megabytes):
            file.write(os.urandom(10**6))
    ours, theirs = folder / 'ours', folder / 'theirs'

    def copy(argv, made):
        shutil.rmtree(made, ignore_errors=True)
        took_s = bench.run([*argv], folder)[0]
        if (made / 'large').stat().st_size != megabytes * 10**6:
            raise Failed(f'{argv[0]} did not copy the file')
        shutil.rmtree(made)
        return took_s

    # The best of each: what a copy of gigabytes takes in memory varies threefold on virtual
    # machines, with the pages that the host has to find.
    taken = [(copy([COMBINE_FOLDERS, '--quiet', ours, folder / 'src'], ours),
              copy(['cp', '-a', folder / 'src', theirs], theirs)) for _ in range(rounds)]
    our_s, their_s = map(min, zip(*taken))
    shutil.rmtree(folder)
    bench.row(f'combine one file of {megabytes / 1000} GB : cp', f'{our_s / their_s:.2f} x',
              '<= 1.1 x', our_s <= 1.1 * their_s, f'best {our_s:.2f} s; cp {their_s:.2f} s; '
              f'medians {statistics.median(ours for ours, _ in taken):.2f} and '
              f'{statistics.median(theirs for _, theirs in taken):.2f}')


def combine_memory(bench):
    """Peak memory for each file of the sources, above that of an empty one; in one folder."""
    files = 50000 if bench.quick else 1000000
    folder = bench.folder()
    for name in ('none', 'many'):
        (folder / name).mkdir()
    for number in range(files):
        os.close(os.open(folder / f'many/result-{number:08}.txt', os.O_CREAT | os.O_WRONLY))
    code = ('import resource, sys\n'
            'sys.argv = ["combine_folders", "--quiet", *sys.argv[1:]]\n'
            'from combine_folders import main\n'
            'main()\n'
            'print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)')
    peaks = []
    for name in ('none', 'many'):
        said = bench.run([sys.executable, '-c', code, folder / f'dest-{name}', folder / name],
                         folder)[1]
        peaks.append(int(said) * 1024)
    each = (peaks[1] - peaks[0]) / files
    shutil.rmtree(folder)
    bench.row(f'memory of combine, {files:,} files in a folder', f'{each:.0f} bytes',
              '<= 500', each <= 500, f'for each file; peak {peaks[1] / 1e6:.0f} MB')


def placing(bench):
    """Placements among 1,000 machines in use, each end of a job followed by what starts then."""
    few, many = 1000, 10_000 if bench.quick else 100_000
    placements, rounds = (5000, 1) if bench.quick else (20_000, 3)
    few_us, many_us = medians(rounds, *(lambda n=n: placement_us(1000, n, placements)
                                        for n in (few, many)))
    bench.row('placements a second, 1,000 machines', f'{1e6 / many_us:,.0f}', '>= 20,000',
              1e6 / many_us >= 20_000, f'{many_us:.0f} us each while {many:,} jobs wait')
    bench.row(f'one placement, {many:,} waiting : 1,000', f'{many_us / few_us:.2f} x', '<= 1.5 x',
              many_us / few_us <= 1.5, f'{many_us:.0f} us and {few_us:.0f} us')


def placement_us(machines, waiting, placements):
    """Processor time of a placement while so many jobs of ten kinds wait."""
    gpus = tuple(ssh_scheduler.Gpu(index, 24000) for index in range(4))
    kinds = [ssh_scheduler.Allocation(1 + n % 3, 1000 + 500 * n, gpus=0) for n in range(6)]
    kinds += [ssh_scheduler.Allocation(1, 2000, gpus=1 + n % 2, gpu_memory_mb=4000 + 1000 * n,
                                       gpu_utilization=0.3, reserve_gpu=n > 1) for n in range(4)]
    scheduler, chance, lines = ssh_scheduler.Scheduler(), random.Random(1), itertools.count()
    for place in range(machines):
        scheduler.add_machine(place, place, ssh_scheduler.Capacity(
            32, 128_000 + place % 7 * 1000, gpus if place % 2 else (), 32))

    def refill(allocations):
        for allocation in allocations:
            scheduler.add(ssh_scheduler.Job('job', 'true', next(lines), allocation,
                                            ssh_scheduler.Forwards()))

    refill(kinds * (waiting // len(kinds)))
    running, taken = [], list(scheduler.choose())
    while taken:                # until all machines are full, and as many jobs wait as before
        running += taken
        refill(job.allocation for job, *_ in taken)
        taken = list(scheduler.choose())
    placed = used_s = 0
    while placed < placements:
        number = chance.randrange(len(running))
        running[number], running[-1] = running[-1], running[number]
        _, machine, placement = running.pop()
        began = time.process_time()
        scheduler.give_back(machine, placement)
        taken = list(scheduler.choose())
        used_s += time.process_time() - began
        running += taken
        placed += len(taken)
        refill(job.allocation for job, *_ in taken)
    if scheduler.waits != waiting:
        raise Failed(f'{waiting} jobs should wait, {scheduler.waits} do')
    return used_s / placed * 1e6


def remote(bench):
    """The commands that run one thing: execute_remote : ssh, execute_to : clush and pdsh, 1 GB."""
    with bench_machine('lab1') as machine:
        start_up(bench, machine)
        streaming(bench, machine)
    with contextlib.ExitStack() as stack:
        fan_out(bench, [stack.enter_context(bench_machine(f'node{n}')) for n in range(10)])


def start_up(bench, machine):
    """A command that does nothing, without files, against a bare login for the same."""
    file, folder = machine.yaml(), bench.folder()

    def ours():
        return bench.run([EXECUTE_REMOTE, '--machine', file, '--copy-forwards',
                          '--copy-backwards', '--', 'true'], folder)[0]

    def theirs():
        return bench.run([*machine.ssh_argv(), 'true'], folder)[0]

    ours(), theirs()
    our_s, their_s = medians(5 if bench.quick else 15, ours, theirs)
    bench.row('execute_remote M true : ssh M true', f'{our_s / their_s:.2f} x', '<= 1.5 x',
              our_s <= 1.5 * their_s, f'{our_s:.3f} s; ssh {their_s:.3f} s')


def streaming(bench, machine):
    """A large file through execute_remote, which keeps it on both sides, against ssh."""
    megabytes = 200 if bench.quick else 1000
    with open(machine.home / 'big', 'wb') as file:
        for _ in range(megabytes):
            file.write(os.urandom(10**6))
    path, folder = machine.yaml(), bench.folder()
    count, names = ' | wc -c', itertools.count()

    def shell(line):
        took_s, said = bench.run(['bash', '-c', line], folder)
        if said.strip() not in ('', str(megabytes * 10**6)):
            raise Failed(f'of {megabytes} MB came {said}')
        return took_s

    ssh = shlex.join([*map(str, machine.ssh_argv()), 'cat big'])

    def ours():
        name = f'big{next(names)}'
        took_s = shell(shlex.join([str(EXECUTE_REMOTE), '--machine', str(path), '--copy-forwards',
                                   '--copy-backwards', '--job-name', name, '--',
                                   'cat ~/big']) + count)
        (folder / f'job_results/{name}.out').unlink()
        return took_s

    def kept():
        took_s = shell(f'{ssh} >kept')
        (folder / 'kept').unlink()
        return took_s

    our_s, their_s, kept_s = medians(3, ours, lambda: shell(ssh + count), kept)
    bench.row(f'rate of {megabytes} MB : ssh M cat', f'{their_s / our_s:.2f} x', '>= 0.7 x',
              their_s >= 0.7 * our_s, f'{megabytes / our_s:.0f} MB/s; ssh '
              f'{megabytes / their_s:.0f} MB/s, into a file {megabytes / kept_s:.0f} MB/s '
              f'({kept_s / our_s:.2f} x)')


def fan_out(bench, machines):
    """A command on ten machines at once."""
    folder = bench.folder()
    files = [machine.yaml(name=machine.name) for machine in machines]
    config = folder / 'ssh_config'
    config.write_text(''.join(
        f'Host {machine.name}\n  HostName {machine.address}\n  Port {machine.port}\n'
        f'  User {machine.user}\n  IdentityFile {machine.key}\n  IdentitiesOnly yes\n'
        f'  BatchMode yes\n  UserKnownHostsFile {machine.known_hosts}\n  LogLevel ERROR\n'
        for machine in machines))
    names = ','.join(machine.name for machine in machines)
    expected = sorted(machine.name for machine in machines)

    def check(took_s, said):
        if sorted(line.partition(':')[0] for line in said.splitlines()) != expected:
            raise Failed(f'not all of them answered: {said[-300:]}')
        return took_s

    def ours():
        return check(*bench.run([EXECUTE_TO, '--machines', *files, '--', 'echo x'], folder))

    def clush():
        return check(*bench.run(['clush', '-w', names, '-o', f'-F {config}', 'echo x'], folder))

    def pdsh():
        env = {**bench.env, 'PDSH_SSH_ARGS_APPEND': f'-F {config}'}
        return check(*bench.run(['pdsh', '-R', 'ssh', '-w', names, 'echo x'], folder, env=env))

    peers = {name: measure for name, measure in (('clush', clush), ('pdsh', pdsh))
             if shutil.which(name)}
    if not peers:
        raise Failed('the peers are missing: apt install clustershell pdsh')
    for measure in (ours, *peers.values()):
        measure()
    our_s, *their_s = medians(5 if bench.quick else 15, ours, *peers.values())
    for name, peer_s in zip(peers, their_s):
        bench.row(f'execute_to, ten machines : {name}', f'{our_s / peer_s:.2f} x', '<= 1.2 x',
                  our_s <= 1.2 * peer_s, f'{our_s:.2f} s; {name} {peer_s:.2f} s')


FIGURES = {'spec': spec_batch, 'jobs': many_jobs, 'files': many_files, 'memory': memory,
           'cost': cost_per_job, 'combine': combine_small, 'large': combine_large,
           'names': combine_memory, 'place': placing, 'remote': remote}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--quick', action='store_true', help='fewer jobs, fewer rounds')
    parser.add_argument('--only', action='append', choices=FIGURES, help='this figure')
    options = parser.parse_args()
    missing = rig.missing_tools()
    if missing:
        sys.exit(f'bench: the machines need more packages: apt install {" ".join(missing)}')
    if not EXECUTE_BATCH.exists():
        sys.exit(f'bench: there is no {EXECUTE_BATCH}. Try: make bench')
    bench = Bench(options.quick)
    print(f'{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before this began, files in '
          f'{os.environ.get("RIG_FOLDER", "/tmp")}\n\n'
          f'{"figure":<50} {"measured":>11} {"goal":>11}')
    troubles = 0
    try:
        for name in options.only or FIGURES:
            try:
                FIGURES[name](bench)
            except Failed as trouble:
                troubles += 1
                bench.row(name, 'no figure', '', None, str(trouble))
    finally:
        for pid in rig.knowing(bench.home):
            rig.kill(pid, lambda pid: pid in rig.knowing(bench.home))
        rig.remove(bench.home)
        rig.remove_shared_farms()
    left = rig.leftovers()
    if left:
        sys.exit('bench: this was left behind:\n' + '\n'.join(left))
    sys.exit(1 if troubles else 0)


if __name__ == '__main__':
    main()
