"""Figures of ssh-scheduler, beside an earlier commit and a peer, all from the same run.

    make bench
    .venv/bin/python bench/bench.py [--quick] [--only NAME]... [--against COMMIT] [--results FILE]

README.md explains each figure.  The machines are those of the tests, tests/rig.py: sshds on
loopback, here with OpenSSH's default key exchange and the start files of /etc/skel.  The compared
programs run in turns, and the median of each counts.

GNU parallel uses an open ControlMaster, so its time includes no login; the time of ssh-scheduler
does.  The machine allows more sessions than sshd does by default.  GNU parallel and each version
run with several numbers of jobs at a time, and the best number counts.
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
sys.path.insert(0, str(HERE.parent / 'tests'))
sys.path.insert(0, str(HERE.parent))
import costs  # noqa: E402
import rig  # noqa: E402
import slurm  # noqa: E402
from ground import (  # noqa: E402
    SAFETY_NET_S,
    SMALL_JOBS,
    Bench,
    Failed,
    Goal,
    bench_machine,
    journalled_disk,
    medians,
    own_mounts,
    remove,
    slots,
)

import ssh_scheduler  # noqa: E402

COMBINE_FOLDERS = Path(sys.executable).with_name('combine_folders')     # as users have it
MEMORY_FOLDER = '/dev/shm'      # see README.md: the figures must not depend on a disk
EARLIER = 'fb897de'             # the commit to compare this one with
OUR_SLOTS = (4, 8, 16, 32)      # numbers of jobs at a time to try
PEER_SLOTS = (2, 4, 8, 16)


def quickest(candidates, seconds, rounds):
    """Return the candidate with the fewest seconds in any round; each round runs them all."""
    taken = [[seconds(candidate) for candidate in candidates] for _ in range(rounds)]
    return min(zip(map(min, zip(*taken)), candidates))[1]


# ---- GNU parallel, with a ready master ----

@contextlib.contextmanager
def gnu_parallel(ground, machine):
    """Yield run(jobs, slots, command, *options) -> seconds; {} in the command is a job's number."""
    if not shutil.which('parallel'):
        raise Failed('the peer is missing: apt install parallel')
    shared = ('-o', f'ControlPath={machine.folder}/master')
    subprocess.run(machine.ssh_argv(*shared, '-fNM'), check=True, stdin=subprocess.DEVNULL)
    *ssh, address = machine.ssh_argv(*shared)

    def run(jobs, slots, command, *options, cwd=ground.home):
        argv = ['parallel', '--will-cite', '--ssh', ' '.join(ssh), '-S', f'{slots}/{address}',
                *options, command]
        return ground.run(argv, cwd, stdin=''.join(f'{n}\n' for n in range(jobs)))[0]

    try:
        yield run
    finally:
        subprocess.run(machine.ssh_argv(*shared, '-O', 'exit'), check=True, capture_output=True)


def compare_rates(bench, name, goal, comparison, jobs):
    """Add the row of a comparison.

    comparison(ground): a context that yields (ours, theirs): ours(version, jobs, slots) -> seconds,
    theirs(jobs, slots) -> seconds
    """
    values, details = {}, []
    for ground in bench.grounds[:1] if bench.quick else bench.grounds:
        with comparison(ground) as (ours, theirs):
            rates, at_once = rates_at_best(bench, ours, theirs, jobs)
        for version in bench.versions:
            values[ground.word, version.name] = rates[version.name] / rates['parallel']
        details.append(f'{ground.word}: ' + ', '.join(
            f'{who} {rate:.0f} jobs/s with {at_once[who]} at a time'
            for who, rate in rates.items()))
    bench.compared(name, Goal('>=', goal, '{:.1f} x'), values, '; '.join(details))


def rates_at_best(bench, ours, theirs, jobs):
    """Run all in turns; return ({who: jobs per second}, {who: jobs at a time}) at their best."""
    our_jobs, their_jobs = (count // 2 if bench.quick else count for count in jobs)
    rounds = 1 if bench.quick else 2
    at_once = {version.name: quickest(OUR_SLOTS, lambda n, v=version: ours(v, our_jobs // 3, n),
                                      rounds) for version in bench.versions}
    at_once['parallel'] = quickest(PEER_SLOTS, lambda n: theirs(their_jobs // 2, n), rounds)
    measures = {version.name: lambda v=version: ours(v, our_jobs, at_once[v.name])
                for version in bench.versions}
    measures['parallel'] = lambda: theirs(their_jobs, at_once['parallel'])
    seconds = dict(zip(measures, medians(2 * rounds - 1, *measures.values())))
    return {who: (their_jobs if who == 'parallel' else our_jobs) / took_s
            for who, took_s in seconds.items()}, at_once


# ---- The figures ----

def spec_batch(bench):
    """Compare the four lines of the example on two machines with a bare login; count the logins."""
    with bench_machine('lab1') as lab1, bench_machine('lab2') as lab2:
        files = [lab1.yaml(), lab2.yaml()]
        logins = []

        def login():
            return bench.run([*lab1.ssh_argv(), 'true'], bench.home)[0]

        def batch(version):
            folder = bench.folder()
            shutil.copytree(HERE.parent / 'example', folder / 'example')
            before = [machine.logins() for machine in (lab1, lab2)]
            took_s, said = bench.run([*version.argv('execute_batch'), 'example/batch_script.sh',
                                      '--machines', *files], folder)
            if said.count('\nfinished: ') != 4:
                raise Failed(f'not all four jobs finished: {said}')
            if version is bench.versions[0]:
                logins.append([machine.logins() - count for machine, count
                               in zip((lab1, lab2), before)])
            return took_s

        measures = [login, *(lambda v=version: batch(v) for version in bench.versions)]
        for measure in measures:
            measure()
        login_s, *batch_s = medians(3 if bench.quick else 9, *measures)
    bench.compared("spec's four lines, two machines : one login", Goal('<=', 1.5),
                   bench.in_memory(took_s / login_s for took_s in batch_s),
                   f'{batch_s[0]:.2f} s; bare login {login_s:.2f} s')
    most = max(map(max, logins))
    bench.row('logins per machine and batch', str(most), '1',
              all(pair == [1, 1] for pair in logins), f'{len(logins)} batches')


def many_jobs(bench):
    """Compare the rate of 1,000 x true without copies with GNU parallel's."""
    @contextlib.contextmanager
    def comparison(ground):
        with ground.machine('lab1') as machine, gnu_parallel(ground, machine) as parallel:
            file = machine.yaml()

            def ours(version, jobs, number):
                return ground.batch(version.argv('execute_batch'), ['true'] * jobs,
                                    ground.folder(), *SMALL_JOBS, slots(number),
                                    '--copy-forwards', '--copy-backwards', '--machines', file)

            yield ours, lambda jobs, number: parallel(jobs, number, 'true {}')

    compare_rates(bench, '1,000 x true, one machine : GNU parallel', 8, comparison, (1000, 150))


def many_files(bench):
    """Compare the rate of 500 jobs that each get 20 small files and return a file and output."""
    @contextlib.contextmanager
    def comparison(ground):
        with ground.machine('lab1') as machine, gnu_parallel(ground, machine) as parallel:
            yield (lambda version, jobs, number: our_files(ground, machine, version, jobs, number),
                   lambda jobs, number: their_files(ground, parallel, jobs, number))

    compare_rates(bench, '500 jobs with 20 files, result : GNU parallel', 8, comparison, (500, 100))


def staged_files(bench):
    """Compare one job in a git checkout with 50,000 small files with the earlier commit.

    The client keeps the list and 5,000 of the files.
    """
    count = 5_000 if bench.quick else 50_000
    source = bench.folder()
    for number in range(count):
        if not number % 100:
            (source / f'd{number // 100}').mkdir()
        (source / f'd{number // 100}/f{number}').write_text(f'{number}\n' * 100)
    (source / '.gitignore').write_text('/job_results/\n')
    for words in (['init', '-q'], ['add', '-A'],
                  ['-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-qm', 'first']):
        bench.run(['git', *words], source)
    (source / 'batch.sh').write_text('true\n')
    with bench_machine('lab1') as machine:
        file = machine.yaml()

        def batch(version):
            for folder in (source / 'job_results', machine.home / '.ssh_scheduler'):
                shutil.rmtree(folder, ignore_errors=True)
            return bench.run([*version.argv('execute_batch'), 'batch.sh', *SMALL_JOBS,
                              '--machines', file], source)[0]

        took_s = medians(3, *(lambda v=version: batch(v) for version in bench.versions))
    if len(took_s) < 2:
        raise Failed('there is no earlier commit to compare with')
    shutil.rmtree(source)
    bench.compared(f'{count:,} files, one job : the earlier commit', Goal('<=', 1.1),
                   bench.in_memory(took / took_s[1] for took in took_s),
                   f'{took_s[0]:.2f} s; earlier {took_s[1]:.2f} s')


def twenty_files(ground):
    folder = ground.folder()
    (folder / 'data').mkdir()
    for number in range(20):
        (folder / f'data/{number}').write_text(f'{number}\n' * 200)
    return folder


def our_files(ground, machine, version, jobs, number):
    folder = twenty_files(ground)
    took_s = ground.batch(version.argv('execute_batch'), ['cat data/* >result; echo done'] * jobs,
                          folder, *SMALL_JOBS, slots(number), '--copy-forwards', 'data',
                          '--copy-backwards', 'result', '--machines', machine.yaml())
    check_results(folder.glob('job_results/*/result'), jobs)
    remove(folder)
    return took_s


def their_files(ground, parallel, jobs, number):
    # With `--workdir ...` parallel loses relative base files, so the command makes a folder for
    # each job, which is also faster.
    folder = twenty_files(ground)
    command = 'mkdir {} && cp -r data {} && cd {} && cat data/* >result; echo done'
    took_s = parallel(jobs, number, command, '--basefile', 'data', '--workdir', folder.name,
                      '--return', '{}/result', '--cleanup', cwd=folder)
    check_results(folder.glob('*/result'), jobs)
    remove(folder)
    return took_s


def check_results(paths, jobs):
    sizes = [path.stat().st_size for path in paths]
    if len(sizes) != jobs or not all(sizes):
        raise Failed(f'{jobs} results should have come back, {len(sizes)} did')


def memory(bench):
    """Measure the peak memory of a client whose 10,000 lines wait behind jobs that block."""
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
    """Compare the client's processor time per job for 5,000 lines with that for 500."""
    long, rounds = (2000, 1) if bench.quick else (5000, 3)

    def cpu_of(jobs):
        folder = bench.folder()
        (folder / 'batch.sh').write_text('true\n' * jobs)
        with started(bench, folder, 'batch.sh', '--num-cpus=0.1') as client:
            client.stdout.read()
            # Read the client's own time, without its children's, before wait() removes the process.
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
    """Run a batch on this machine without files; kill it if it runs at the end of the block."""
    client = subprocess.Popen(
        [*map(str, bench.versions[0].argv('execute_batch')), *SMALL_JOBS, *options,
         '--copy-forwards', '--copy-backwards', '--machines', 'localhost', '--', batch],
        cwd=folder, env=bench.env, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL)
    try:
        yield client
    finally:
        client.stdout.close()
        if client.poll() is None:
            client.kill()
            client.wait()


def small_sources(folder, files):
    """Make three folders of `files` small files, in folders of 100; all share half of the paths."""
    for number in (1, 2, 3):
        for file in range(files):
            into = folder / f'src{number}/{file // 100:05}'
            if file % 100 == 0:
                into.mkdir(parents=True)
            owner = number if file % 2 else 'all'
            (into / f'result-{file}-{owner}').write_text(f'{file} {owner}\n' * (50 + file % 100))
    return [folder / f'src{number}' for number in (1, 2, 3)]


def combine_small(bench):
    """Compare with rsync: three folders of 10,000 small files that share half of their paths."""
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
    """Compare one file of 4 GB with cp, which copies with the same system call."""
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

    # Compare the best times: on a virtual machine the time to copy gigabytes in memory varies
    # threefold, because the host may have to find pages first.
    taken = [(copy([COMBINE_FOLDERS, '--quiet', ours, folder / 'src'], ours),
              copy(['cp', '-a', folder / 'src', theirs], theirs)) for _ in range(rounds)]
    our_s, their_s = map(min, zip(*taken))
    shutil.rmtree(folder)
    bench.row(f'combine one file of {megabytes / 1000} GB : cp', f'{our_s / their_s:.2f} x',
              '<= 1.1 x', our_s <= 1.1 * their_s, f'best {our_s:.2f} s; cp {their_s:.2f} s; '
              f'medians {statistics.median(ours for ours, _ in taken):.2f} and '
              f'{statistics.median(theirs for _, theirs in taken):.2f}')


def combine_memory(bench):
    """Measure the peak memory for each file of one folder, above that for an empty folder."""
    files = 50000 if bench.quick else 1000000
    folder = bench.folder()
    for name in ('none', 'many'):
        (folder / name).mkdir()
    for number in range(files):
        os.close(os.open(folder / f'many/result-{number:08}.txt', os.O_CREAT | os.O_WRONLY))
    # Not ru_maxrss: it includes the memory of this process, from before the child's exec.
    code = ('import sys\n'
            'sys.argv = ["combine_folders", "--quiet", *sys.argv[1:]]\n'
            'from combine_folders import main\n'
            'main()\n'
            'status = open("/proc/self/status").read()\n'
            'print(status.partition("VmHWM:")[2].split()[0])')
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
    """Measure placements on 1,000 full machines: end a job, then place the next ones."""
    few, many = 1000, 10_000 if bench.quick else 100_000
    placements, rounds = (5000, 1) if bench.quick else (20_000, 3)
    few_us, many_us = medians(rounds, *(lambda n=n: placement_us(1000, n, placements)
                                        for n in (few, many)))
    bench.row('placements a second, 1,000 machines', f'{1e6 / many_us:,.0f}', '>= 20,000',
              1e6 / many_us >= 20_000, f'{many_us:.0f} us each while {many:,} jobs wait')
    bench.row(f'one placement, {many:,} waiting : 1,000', f'{many_us / few_us:.2f} x', '<= 1.5 x',
              many_us / few_us <= 1.5, f'{many_us:.0f} us and {few_us:.0f} us')


def placement_us(machines, waiting, placements):
    """Return the processor time of a placement in us while `waiting` jobs of ten kinds wait."""
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
    while taken:                # until all machines are full and `waiting` jobs wait
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
    """Compare execute_remote with ssh, also for 1 GB, and execute_to with clush and pdsh."""
    with bench_machine('lab1') as machine:
        start_up(bench, machine)
        streaming(bench, machine)
    with contextlib.ExitStack() as stack:
        fan_out(bench, [stack.enter_context(bench_machine(f'node{n}')) for n in range(10)])


def start_up(bench, machine):
    """Compare a command that does nothing, without files, with a bare login that runs it."""
    file, folder = machine.yaml(), bench.folder()

    def ours():
        return bench.run([*bench.versions[0].argv('execute_remote'), '--machine', file,
                          '--copy-forwards', '--copy-backwards', '--', 'true'], folder)[0]

    def theirs():
        return bench.run([*machine.ssh_argv(), 'true'], folder)[0]

    ours(), theirs()
    our_s, their_s = medians(5 if bench.quick else 15, ours, theirs)
    bench.row('execute_remote M true : ssh M true', f'{our_s / their_s:.2f} x', '<= 1.5 x',
              our_s <= 1.5 * their_s, f'{our_s:.3f} s; ssh {their_s:.3f} s')


def streaming(bench, machine):
    """Compare a large file through execute_remote, which keeps it on both sides, with ssh."""
    with open(machine.home / 'big', 'wb') as file:
        for megabytes, rounds in ((200, 3), (1000, 1 if bench.quick else 3)):
            while file.tell() < megabytes * 10**6:
                file.write(os.urandom(10**6))
            file.flush()
            stream(bench, machine, megabytes, rounds)


def stream(bench, machine, megabytes, rounds):
    """Add a line to the table for this number of megabytes."""
    path, folder = machine.yaml(), bench.folder()
    count, names = ' | wc -c', itertools.count()

    def shell(line):
        took_s, said = bench.run(['bash', '-c', line], folder)
        if said.strip() not in ('', str(megabytes * 10**6)):
            raise Failed(f'of {megabytes} MB came {said}')
        return took_s

    def shell_warm(line):
        """Allocate memory for two copies, then run the line: a virtual machine that returned its
        free memory to the host waits seconds for a gigabyte."""
        with open(bench.home / 'pages', 'wb') as file:
            for _ in range(2 * megabytes):
                file.write(bytes(10**6))
        (bench.home / 'pages').unlink()
        return shell(line)

    ssh = shlex.join([*map(str, machine.ssh_argv()), 'cat big'])

    def through(version):
        name = f'big{next(names)}'
        took_s = shell_warm(shlex.join([
            *map(str, version.argv('execute_remote')), '--machine', str(path), '--copy-forwards',
            '--copy-backwards', '--job-name', name, '--', 'cat ~/big']) + count)
        (folder / f'job_results/{name}.out').unlink()
        return took_s

    def kept():
        took_s = shell_warm(f'{ssh} >kept')
        (folder / 'kept').unlink()
        return took_s

    their_s, kept_s, *our_s = medians(
        rounds, lambda: shell_warm(ssh + count), kept,
        *(lambda v=version: through(v) for version in bench.versions))
    bench.compared(f'rate of {megabytes} MB : ssh M cat', Goal('>=', 0.8),
                   bench.in_memory(their_s / took_s for took_s in our_s),
                   f'{megabytes / our_s[0]:.0f} MB/s; ssh {megabytes / their_s:.0f} MB/s, into a '
                   f'file {megabytes / kept_s:.0f} MB/s ({kept_s / our_s[0]:.2f} x)')


def fan_out(bench, machines):
    """Compare a command on ten machines at once with clush and pdsh."""
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

    def ours(version):
        return check(*bench.run([*version.argv('execute_to'), '--machines', *files, '--',
                                 'echo x'], folder))

    def clush():
        return check(*bench.run(['clush', '-w', names, '-o', f'-F {config}', 'echo x'], folder))

    def pdsh():
        env = {**bench.env, 'PDSH_SSH_ARGS_APPEND': f'-F {config}'}
        return check(*bench.run(['pdsh', '-R', 'ssh', '-w', names, 'echo x'], folder, env=env))

    peers = {name: measure for name, measure in (('clush', clush), ('pdsh', pdsh))
             if shutil.which(name)}
    if not peers:
        raise Failed('the peers are missing: apt install clustershell pdsh')
    measures = [*peers.values(), *(lambda v=version: ours(v) for version in bench.versions)]
    for measure in measures:
        measure()
    took_s = medians(5 if bench.quick else 15, *measures)
    our_s = took_s[len(peers):]
    for name, peer_s in zip(peers, took_s):
        bench.compared(f'execute_to, ten machines : {name}', Goal('<=', 1.2),
                       bench.in_memory(took / peer_s for took in our_s),
                       f'{our_s[0]:.2f} s; {name} {peer_s:.2f} s')


FIGURES = {'fsync': costs.slow_fsync, 'completion': costs.completion, 'job': costs.plain_job,
           'alone': costs.one_at_a_time, 'sent': costs.sent_files, 'made': costs.made_files,
           'jobs': many_jobs, 'files': many_files, 'trips': costs.round_trips,
           'claims': costs.others_claims, 'accounts': costs.many_accounts, 'rerun': costs.rerun,
           'spec': spec_batch, 'remote': remote, 'memory': memory, 'cost': cost_per_job,
           'staged': staged_files, 'combine': combine_small, 'large': combine_large,
           'names': combine_memory,
           'place': placing, 'slurm': slurm.on_a_cluster}


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--quick', action='store_true', help='fewer jobs, fewer rounds')
    parser.add_argument('--only', action='append', choices=FIGURES, help='this figure')
    parser.add_argument('--against', metavar='COMMIT', default=EARLIER,
                        help='measure this commit in turns with ours (%(default)s)')
    parser.add_argument('--results', metavar='FILE', type=Path,
                        help='write the figures to this Markdown file, with what was measured')
    return parser.parse_args()


def main():
    options = parsed()
    missing = rig.missing_tools()
    if missing:
        sys.exit(f'bench: the machines need more packages: apt install {" ".join(missing)}')
    if not COMBINE_FOLDERS.exists():
        sys.exit(f'bench: there is no {COMBINE_FOLDERS}. Try: make bench')
    own_mounts()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # to run the finally blocks
    in_memory = os.access(MEMORY_FOLDER, os.W_OK)
    top = os.environ.setdefault('RIG_FOLDER', MEMORY_FOLDER if in_memory else '/tmp')
    with journalled_disk(top) as (disk, trouble):
        if not disk:
            print(f'There is no column of an ext4 with a journal: {trouble}.')
        troubles = measured(options, top, disk)
    left = rig.leftovers()
    if left:
        sys.exit('bench: this was left behind:\n' + '\n'.join(left))
    sys.exit(1 if troubles else 0)


def measured(options, top, disk):
    """Measure the figures that the options name; return the number that failed."""
    bench, troubles = Bench(options.quick, top, disk), 0
    began = time.strftime('%Y-%m-%d %H:%M'), os.getloadavg()[0]
    try:
        say_conditions(bench, options.against)
        for name in options.only or FIGURES:
            try:
                FIGURES[name](bench)
            except Failed as trouble:
                troubles += 1
                bench.row(name, 'no figure', '', None, str(trouble))
        if options.results:
            options.results.write_text(page_of(bench, began))
    finally:
        bench.close()
        rig.remove_shared_farms()
    return troubles


def page_of(bench, began):
    """Return the table as Markdown.  began: (local time, load) before the first figure."""
    def line(cells):
        return '| ' + ' | '.join(str(cell).replace('|', '\\|') for cell in cells) + ' |'

    day, load = began
    columns = [f'{word}: {name}' for word, name in bench.columns()]
    names = ['figure', *columns, 'goal', '', 'details']
    return '\n'.join([
        '# Figures', '',
        f'Written by `{shlex.join(["bench/bench.py", *sys.argv[1:]])}`. [README.md](README.md) '
        'tells what each figure is. Believe what stands in one line: other figures were measured '
        'at another moment, and a busy computer blurs all.', '',
        *map(line, (('', ''), ('---', '---'), ('day', day), ('commit', commit_of_this()),
                    ('load before and after', f'{load:.1f} and {os.getloadavg()[0]:.1f}'),
                    *versions_here())), '',
        line(names), line(['---'] * len(names)), *map(line, bench.rows), ''])


def first_line(*argv):
    """Return the first line that a program prints, on either stream; '' if it is missing."""
    with contextlib.suppress(OSError):
        said = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return said.stdout.partition('\n')[0].strip()
    return ''


def commit_of_this():
    return first_line('git', '-C', HERE.parent, 'describe', '--always', '--dirty')


def versions_here():
    """Return rows (word, value) about the computer and the measured programs."""
    model = ''
    with contextlib.suppress(OSError), open('/proc/cpuinfo') as file:
        model = next((text.partition(':')[2].strip() for text in file
                      if text.startswith('model name')), '')
    rows = [('computer', f'{os.cpu_count()} × {model}, Linux {os.uname().release}'),
            ('Python', sys.version.split()[0]), ('ssh', first_line('ssh', '-V')),
            ('bash', first_line('bash', '--version')), ('rsync', first_line('rsync', '--version')),
            ('Slurm', first_line(rig.program('slurmctld') or 'slurmctld', '-V')),
            ('GNU parallel', first_line('parallel', '--version')),
            ('clush', first_line('clush', '--version'))]
    return [(name, value or 'not installed') for name, value in rows]


def say_conditions(bench, earlier):
    trouble = bench.add_version(earlier)
    if trouble:
        print(f'There are no columns of {earlier}: {trouble}.')
    if not bench.meter.is_whole:
        print('Processor time is that of the client alone, without the machines: '
              f'{bench.meter.trouble}.')
    print(f'{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before this began\n\n'
          f'{bench.header()}', flush=True)


if __name__ == '__main__':
    main()
