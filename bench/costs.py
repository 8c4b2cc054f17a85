"""The cost of a job, for client and machine, compared with an earlier commit: see README.md.

This commit and the earlier one run each kind of batch in turns, on each ground.  The cost of a job
is the cost of a batch of 1,000 jobs, with its start and the logins, divided by 1,000.  The cost of
a smaller batch is extrapolated: a batch of one job shows the part that does not grow with jobs.
"""
import contextlib
import functools
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Callable, NamedTuple

import rig
from ground import SMALL_JOBS, Cost, Failed, Goal, costs_in_turns, remove, slots

MS = '{:.2f} ms'
COMPLETION = Path('/usr/share/bash-completion/bash_completion')
NO_FILES = ('--copy-forwards', '--copy-backwards')
AT_ONCE = 16


class Kind(NamedTuple):
    """A kind of batch: its lines are all the same."""
    line: str
    options: tuple
    prepare: Callable = lambda folder: None             # makes the files to send
    check: Callable = lambda folder, jobs: None         # raises Failed
    slow: bool = False                                  # see Version.argv


PLAIN = Kind('true', NO_FILES)


def run_batch(bench, ground, version, kind, jobs, where):
    """Run a batch of `jobs` jobs; return its Cost.  where: options that name machines."""
    folder = ground.folder()
    kind.prepare(folder)
    argv = version.argv('execute_batch', kind.slow)

    def run(enter):
        return ground.batch(argv, [kind.line] * jobs, folder, *SMALL_JOBS, *kind.options, *where,
                            enter=enter)

    cost, _ = bench.meter.measure(run)
    kind.check(folder, jobs)
    remove(folder)
    return cost


def of_thousand(many, one, jobs):
    """Return the Cost of each of 1,000 jobs.

    many, one: the Cost of a batch of this many jobs, and of a batch of one job
    """
    if jobs >= 1000:
        return Cost(*(value / jobs for value in many))
    return Cost(*((first + (value - first) / (jobs - 1) * 999) / 1000
                  for value, first in zip(many, one)))


def per_job(bench, measures, jobs):
    """Return {key: Cost per job}.  measures: {key: function(number of jobs) -> Cost}."""
    rounds = 1 if bench.quick else 3
    ones = costs_in_turns(rounds, {key: functools.partial(measure, 1)
                                   for key, measure in measures.items()})     # warms up, too
    many = costs_in_turns(rounds, {key: functools.partial(measure, jobs)
                                   for key, measure in measures.items()})
    return {key: of_thousand(many[key], ones[key], jobs) for key in measures}


def told(costs):
    """Return a text with the costs on the machines, those of the client, and the rates."""
    return '; '.join(f'{word}:{name} there {cost.there_ms:.2f}, here {cost.here_ms:.2f} ms, '
                     f'{1 / cost.seconds:.0f} jobs/s' for (word, name), cost in costs.items())


def costs_of(bench, kind, jobs, at_once=AT_ONCE, grounds=None):
    """Return {(ground's word, version's name): Cost per job} of a kind on a bench machine."""
    found = {}
    for ground in grounds or bench.grounds:
        with ground.machine('lab1') as machine:
            bench.meter.watch(machine)
            where = (slots(at_once), '--machines', machine.yaml())
            costs = per_job(bench, {
                version.name: functools.partial(run_batch, bench, ground, version, kind,
                                                where=where)
                for version in bench.versions}, jobs)
        found.update({(ground.word, name): cost for name, cost in costs.items()})
    return found


def cost_row(bench, name, goal_ms, kind, jobs, **where):
    """Add a line to the table: the processor time of a job at both ends."""
    costs = costs_of(bench, kind, jobs, **where)
    values = {column: cost.all_ms for column, cost in costs.items()}
    bench.costs(name, Goal('<=', goal_ms, MS), values, told(costs))


# ---- The figures ----

def slow_fsync(bench):
    """Measure the jobs per second with a slow disk of the client."""
    grounds = bench.grounds[:1] if bench.quick else bench.grounds
    costs = costs_of(bench, PLAIN._replace(slow=True), 300 if bench.quick else 1000,
                     grounds=grounds)
    bench.compared('jobs/s, an fsync takes 20 ms more', Goal('>=', 190, '{:.0f}/s'),
                   {column: 1 / cost.seconds for column, cost in costs.items()}, told(costs))


def plain_job(bench):
    """Measure a job that does nothing, without files, 16 at once."""
    cost_row(bench, 'true, no files, 16 at once', 3.0, PLAIN, 500 if bench.quick else 1000)


def one_at_a_time(bench):
    """Measure a job that does nothing on localhost, one at a time."""
    jobs, kind = 100 if bench.quick else 500, PLAIN
    where = (f'--num-cpus={os.cpu_count()}', '--machines', 'localhost')
    costs = {}
    for ground in bench.grounds:
        found = per_job(bench, {
            version.name: functools.partial(run_batch, bench, ground, version, kind, where=where)
            for version in bench.versions}, jobs)
        costs.update({(ground.word, name): cost for name, cost in found.items()})
    bench.costs('true, no files, localhost, one at a time', Goal('<=', 4.5, MS),
                {column: cost.all_ms for column, cost in costs.items()}, told(costs))


def two_files(folder):
    """Make the files to send with each job."""
    (folder / 'data').mkdir()
    for name in ('one', 'two'):
        (folder / 'data' / name).write_text(f'{name}\n' * 200)


def check_lines(folder, jobs):
    texts = [path.read_text() for path in folder.glob('job_results/*.out')]
    if texts != ['one\n'] * jobs:
        raise Failed(f'{jobs} jobs should have printed a line, {texts.count("one" + chr(10))} did')


def check_three(folder, jobs):
    found = [path for path in folder.glob('job_results/batch*/made*') if path.stat().st_size]
    if len(found) != 3 * jobs:
        raise Failed(f'{3 * jobs} files should have come back, {len(found)} did')


def sent_files(bench):
    """Measure a typical job: it gets files and prints a line."""
    kind = Kind('read -r line <data/one; echo "$line"', ('--copy-forwards', 'data'), two_files,
                check_lines)
    cost_row(bench, 'two files sent, one line printed', 4.5, kind, 300 if bench.quick else 1000)


def made_files(bench):
    """Measure a job that gets files and makes three, which are fetched."""
    kind = Kind('for n in 1 2 3; do echo "$n" >made$n; done', ('--copy-forwards', 'data'),
                two_files, check_three)
    cost_row(bench, 'two files sent, three made and brought back', 7.0, kind,
             200 if bench.quick else 500)


def completion(bench):
    """Measure the cost that bash-completion, which most logins load, adds to a job."""
    if not COMPLETION.exists():
        raise Failed('a login has nothing to load: apt install bash-completion')
    costs, seen, jobs = {}, {}, 300 if bench.quick else 1000
    for ground in bench.grounds[:1] if bench.quick else bench.grounds:
        with ground.machine('plain') as plain, ground.machine('full', completion=True) as full:
            bench.meter.watch(plain, full)
            check_functions(plain, full)
            measures = {}
            for machine, version in ((m, v) for v in bench.versions for m in (plain, full)):
                measures[version.name, machine.name] = functools.partial(
                    run_batch, bench, ground, version, PLAIN,
                    where=(slots(AT_ONCE), '--machines', machine.yaml()))
            found = per_job(bench, measures, jobs)
            seen = {version.name: job_functions(ground, version, full)
                    for version in bench.versions}
        costs.update({(ground.word, *key): cost for key, cost in found.items()})
    added_row(bench, 'a login with bash-completion adds to a job', 0.2, costs, 'plain', 'full',
              '; ' + ', '.join(f'{count} functions in a job of {name}'
                               for name, count in seen.items()))


def job_functions(ground, version, machine):
    """Return the number of functions in a job's bash: a version may fail to read them all."""
    folder = ground.folder()
    ground.batch(version.argv('execute_batch'), ['declare -F | wc -l'], folder, *SMALL_JOBS,
                 *NO_FILES, '--machines', machine.yaml())
    return int((folder / 'job_results/batch.sh.1.out').read_text())


def check_functions(plain, full):
    """Raise Failed unless the second login has the functions and the first one has not."""
    counts = [int(machine.run("bash -lic 'declare -F | wc -l'").stdout.split()[-1])
              for machine in (plain, full)]
    if counts[0] > 20 or counts[1] < counts[0] + 50:
        raise Failed(f'the logins have {counts[0]} and {counts[1]} functions')


def added_row(bench, name, goal_ms, costs, without, with_it, more_details=''):
    """Add a line to the table.  costs: {(ground's word, version's name, case): Cost per job}."""
    pairs = {key[:2]: (costs[(*key[:2], without)].all_ms, costs[(*key[:2], with_it)].all_ms)
             for key in costs}
    bench.costs(name, Goal('<=', goal_ms, MS),
                {column: more - less for column, (less, more) in pairs.items()},
                '; '.join(f'{word}:{version} {less:.2f} -> {more:.2f} ms'
                          for (word, version), (less, more) in pairs.items()) + more_details)


# ---- Others on the same machine ----

LIVE_CLAIMS = 64


@contextlib.contextmanager
def live_claims(ground, version, machine):
    """Run LIVE_CLAIMS jobs of another user on the machine until the end of the with block."""
    folder = ground.folder()
    (folder / 'batch.sh').write_text('sleep 1000\n' * LIVE_CLAIMS)
    client = subprocess.Popen(
        [*map(str, version.argv('execute_batch')), *SMALL_JOBS, *NO_FILES, '--num-cpus=0.001',
         '--machines', str(machine.yaml()), '--', 'batch.sh'], cwd=folder, env=ground.env,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        lines = []
        while sum(line.startswith('started: ') for line in lines) < LIVE_CLAIMS:
            lines.append(client.stdout.readline())
            if not lines[-1]:
                raise Failed(f'the jobs of the other user ended: {lines}')
        yield
    finally:
        machine.power_off()             # kills the jobs outside the measured time
        client.kill()
        client.communicate()


def others_claims(bench):
    """Measure the cost that 64 live claims of another user add to a job."""
    costs, jobs = {}, 300 if bench.quick else 1000
    for ground in bench.grounds[:1] if bench.quick else bench.grounds:
        with contextlib.ExitStack() as stack:
            measures = {}
            for version in bench.versions:
                for case in ('alone', 'crowded'):
                    machine = stack.enter_context(ground.machine(case))
                    bench.meter.watch(machine)
                    if case == 'crowded':
                        stack.enter_context(crowd(ground, version, machine))
                    # 16 jobs request slightly less than all cores: the other user's jobs need some.
                    measures[version.name, case] = functools.partial(
                        run_batch, bench, ground, version, PLAIN,
                        where=(slots(AT_ONCE + 0.2), '--machines', machine.yaml()))
            found = per_job(bench, measures, jobs)
        costs.update({(ground.word, *key): cost for key, cost in found.items()})
    added_row(bench, '64 live claims of another user add to a job', 0.3, costs, 'alone', 'crowded')


@contextlib.contextmanager
def crowd(ground, version, machine):
    """Add another account to this machine, if possible of another user, with live claims."""
    other = {'uid': 20000} if os.getuid() == 0 else {}
    with ground.machine('other', shared=shared_of(machine), beside=machine, **other) as beside:
        with live_claims(ground, version, beside):
            yield


def shared_of(machine):
    return machine.env['SSH_SCHEDULER_SHARED']


def many_accounts(bench):
    """Measure the machine's cost of 1,000 jobs on its 50 accounts, with one folder of claims."""
    accounts, ground = 10 if bench.quick else 50, bench.grounds[0]
    jobs = 200 if bench.quick else 1000
    with contextlib.ExitStack() as stack:
        machines = []
        for number in range(accounts):
            settings = {'uid': 20000 + number} if os.getuid() == 0 else {}
            if machines:
                settings.update(beside=machines[0], shared=shared_of(machines[0]))
            machines.append(stack.enter_context(ground.machine(f'a{number}', **settings)))
        bench.meter.watch(*machines)
        where = (slots(AT_ONCE), '--machines', *(machine.yaml() for machine in machines))
        costs = costs_in_turns(1 if bench.quick else 2, {
            version.name: functools.partial(run_batch, bench, ground, version, PLAIN, jobs, where)
            for version in bench.versions})
    bench.costs(f'{accounts} accounts, one /dev/shm, per job there', Goal('<=', 6, MS),
                {(ground.word, name): cost.there_ms / jobs for name, cost in costs.items()},
                '; '.join(f'{name} here {cost.here_ms / jobs:.2f} ms, {cost.seconds:.1f} s'
                          for name, cost in costs.items()) +
                f'; {jobs} jobs, {accounts} logins are in it')


# ---- Round trips of a home on NFS: the files that are made, removed and opened in it ----

TRACED = ('open,openat,creat,mkdir,mkdirat,mknod,mknodat,unlink,unlinkat,rmdir,rename,renameat,'
          'renameat2,link,linkat,symlink,symlinkat,chdir,fchdir,clone,clone3,fork,vfork')
CALL = re.compile(r'(\d+\.\d+) (\w+)\((.*)\) += (\d+)(?:<(.*)>)?')
WORD = re.compile(r'"((?:[^"\\]|\\.)*)"')


class TracedMachine(rig.Machine):
    """A machine on which strace traces sshd and its children, into a file for each process."""

    def _launch(self, log):
        trace = [rig.program('strace'), '-D', '-ff', '-ttt', '-y', '-s', '4096', '-e',
                 f'trace={TRACED}', '-e', 'signal=none', '-o', self.folder / 'trace']
        return subprocess.Popen([*map(str, [*trace, *self._sshd_argv(), '-D', '-e'])],
                                env=self._sshd_env(), stdin=subprocess.DEVNULL, stdout=log,
                                stderr=log, start_new_session=True)


def traced_calls(prefix, pid):
    """Return the successful calls of a process and its descendants, in the order of time.

    Each is (time, name, words, path of the opened file, paths that it names).
    """
    todo, calls = [(pid, '/')], []
    while todo:
        pid, folder = todo.pop()
        try:
            text = Path(f'{prefix}.{pid}').read_text(errors='replace')
        except FileNotFoundError:
            continue            # the process was killed before its first call
        for moment, name, words, result, path in CALL.findall(text):
            if name.startswith(('clone', 'fork', 'vfork')):
                todo.append((int(result), folder))
            elif name == 'chdir':
                folder = os.path.join(folder, WORD.search(words)[1])
            elif name == 'fchdir':
                folder = re.search('<(.*)>', words)[1]
            else:
                calls.append((float(moment), name, words, path, paths_of(words, folder)))
    return sorted(calls)


def paths_of(words, folder):
    """Return the paths that a call names, made absolute, with the folders that strace -y prints."""
    paths = []
    for match in WORD.finditer(words):
        base = re.search(r'<([^<>]*)>, $', words[:match.start()])
        paths.append(os.path.normpath(os.path.join(base[1] if base else folder, match[1])))
    return paths


def count_calls(calls, home):
    """Count the operations on files and folders below `home`; return {operation: count}."""
    kinds, counts = {}, dict.fromkeys(('made', 'removed', 'opened', 'FIFO opened'), 0)
    for _, name, words, opened, paths in calls:
        path = opened or paths[-1]
        if not path.startswith(f'{home}/'):
            continue
        if name.startswith(('open', 'creat')):
            is_made = path not in kinds and ('O_CREAT' in words or name == 'creat')
            is_fifo = kinds.get(path) == 'fifo'
            counts['made' if is_made else 'FIFO opened' if is_fifo else 'opened'] += 1
            if is_made:
                kinds[path] = 'file'
        elif name.startswith(('unlink', 'rmdir')):
            counts['removed'] += 1
            kinds.pop(path, None)
        else:                   # mkdir, mknod, link, symlink; a rename also makes a name
            counts['made'] += 1
            kinds[path] = 'fifo' if 'S_IFIFO' in words else kinds.pop(paths[0], 'other')
    return counts


def traced_batch(bench, version, jobs):
    """Run a batch of `jobs` jobs; return {operation below the machine's home: count}."""
    folder = bench.folder()
    with bench.machine('traced', kind=TracedMachine) as machine:
        pid = machine.sshd.pid
        bench.batch(version.argv('execute_batch'), ['true'] * jobs, folder, *SMALL_JOBS,
                    *NO_FILES, slots(AT_ONCE), '--machines', machine.yaml())
        machine.power_off()
        wait_for_traces(machine.folder)
        counts = count_calls(traced_calls(machine.folder / 'trace', pid), machine.home)
    remove(folder)
    return counts


def wait_for_traces(folder):
    """Wait until strace has written everything: it exits after the traced processes."""
    for pid in rig.knowing(folder):
        rig.ends(pid)


def round_trips(bench):
    """Count the files that a job without files makes, removes and opens in the home."""
    if not rig.program('strace'):
        raise Failed('what is opened cannot be counted: apt install strace')
    values, details = {}, []
    for version in bench.versions:
        few, many = (traced_batch(bench, version, jobs) for jobs in (20, 220))
        each = {what: (many[what] - few[what]) / 200 for what in many}
        values[bench.word, version.name] = sum(each.values())
        details.append(f'{version.name} ' + ', '.join(
            f'{count:.1f} {what}' for what, count in each.items()) +
            f': {sum(each.values()) - each["FIFO opened"]:.1f} without FIFOs that are opened')
    bench.compared('made, removed, opened in the home, per job', Goal('<=', 8, '{:.1f}'), values,
                   '; '.join(details))


# ---- A batch that is nearly done ----

RESULTS = 50_000


def finished_folder(ground, versions, machine):
    """Return a folder with RESULTS results, and a batch file with one more line.

    Each version runs a real batch of three jobs; then the files of the second job are copied to
    all other names.  A folder with the name of the version keeps its job_results/.ssh_scheduler.
    """
    folder = ground.folder()
    for version in versions:
        remove(folder / 'job_results')
        ground.batch(version.argv('execute_batch'), [f'true {n:05}' for n in (1, 2, 3)], folder,
                     *SMALL_JOBS, *NO_FILES, '--machines', machine.yaml())
        shutil.move(folder / 'job_results/.ssh_scheduler', folder / version.name)
        repeat_journal(folder / version.name / 'journal')
    for kept in list((folder / 'job_results').glob('batch.sh.2.*')):
        content = kept.read_bytes()
        for n in range(1, RESULTS + 1):
            (folder / f'job_results/batch.sh.{n}{kept.suffix}').write_bytes(content)
    (folder / 'batch.sh').write_text(''.join(f'true {n:05}\n' for n in range(1, RESULTS + 2)))
    return folder


def repeat_journal(path):
    """Turn a journal of three jobs into one of RESULTS jobs, each with the second job's lines."""
    lines = path.read_text().splitlines(keepends=True)
    of_jobs = [bool(re.search(r'"batch\.sh\.[123]"', line)) for line in lines]
    first = of_jobs.index(True)
    template = ''.join(line for line in lines if '"batch.sh.2"' in line)
    with open(path, 'w') as file:
        file.writelines(lines[:first])
        for n in range(1, RESULTS + 1):
            file.write(template.replace('"batch.sh.2"', f'"batch.sh.{n}"')
                       .replace('true 00002', f'true {n:05}'))
        file.writelines(line for line, is_one in zip(lines[first:], of_jobs[first:]) if not is_one)


def rerun(bench):
    """Measure the time to the first start, and the memory, of a batch with 50,000 finished jobs."""
    values, peaks = {}, {}
    for ground in bench.grounds[:1] if bench.quick else bench.grounds:
        with ground.machine('lab1') as machine:
            folder = finished_folder(ground, bench.versions, machine)
            found = costs_in_turns(1 if bench.quick else 3, {
                version.name: functools.partial(first_start, ground, version, machine, folder)
                for version in bench.versions})
            remove(folder)
        for name, cost in found.items():
            values[ground.word, name], peaks[ground.word, name] = cost[:2]
    bench.compared('rerun over 50,000 results, to the first start', Goal('<=', 1, '{:.2f} s'),
                   values, 'with the login')
    bench.compared('its peak memory', Goal('<=', 60, '{:.0f} MB'), peaks, '')


def first_start(ground, version, machine, folder):
    """Run the batch; return a Cost: seconds to its first start, and its peak memory in MB."""
    remove(folder / 'job_results/.ssh_scheduler')
    shutil.copytree(folder / version.name, folder / 'job_results/.ssh_scheduler')
    for path in (folder / 'job_results').glob(f'batch.sh.{RESULTS + 1}.*'):
        path.unlink()
    argv = [*version.argv('execute_batch'), *SMALL_JOBS, *NO_FILES, '--machines', machine.yaml(),
            '--', 'batch.sh']
    began, skipped = time.monotonic(), 0
    client = subprocess.Popen([*map(str, argv)], cwd=folder, env=ground.env, text=True,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL)
    for line in client.stdout:
        if line.startswith('started: '):
            break
        skipped += 'skipping evaluation' in line
    seconds = time.monotonic() - began
    status = rig.read_proc(client.pid, 'status').decode()
    if skipped != RESULTS:
        client.kill()
    rest = client.communicate()[0]
    if client.returncode or '\nfinished: ' not in '\n' + rest:
        raise Failed(f'of {RESULTS} results {skipped} were taken for results; {rest[-300:]}')
    return Cost(seconds, int(status.partition('VmHWM:')[2].split()[0]) / 1000, 0.0)
