"""The base of the figures: disks, versions of the program, processor time, and the table.

A Ground is a place for the files of client and machines.  One Ground lies in memory.  The other is
an ext4 with a journal, as most users have, which only root may mount.  Its image also lies in
memory, so that the figures do not depend on a device.
"""
import collections
import contextlib
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / 'tests'))
import rig  # noqa: E402

CORES = 8                       # of each machine; with the overload, jobs can request 12
SMALL_JOBS = ('--no-gpu-required', '--memory-required=1')
SAFETY_NET_S = 300
FSYNC_DELAY_S = 0.02
IMAGE_GB = 4
CGROUPS = Path('/sys/fs/cgroup')
SKEL = Path('/etc/skel')


class Failed(Exception):
    """A measured program failed or is missing, so there is no figure."""


# ---- Machines ----

def skel(completion=False):
    """Return the start files of a new user; by default they do not load bash-completion."""
    files = {path.name: path.read_text() for path in SKEL.iterdir() if path.is_file()}
    if not completion and '.bashrc' in files:
        files['.bashrc'] = (files['.bashrc'].replace('bash_completion', 'no_completion')
                            + 'unset -v BASH_COMPLETION_VERSINFO\n')
    return files


def bench_machine(name, completion=False, cores=CORES, env=None, kind=rig.Machine, **settings):
    """Return a machine that is set up like a user's.

    It exchanges keys as sshd does by default: the `+` adds an algorithm that is already a default.
    """
    options = 'KexAlgorithms +curve25519-sha256\nMaxSessions 100\nMaxStartups 100'
    env = {**(env or {}), **({} if completion else NO_COMPLETION)}
    return kind(name, cores=cores, gpus=rig.fake_gpus(2), startup=skel(completion),
                sshd_options=options, env=env, **settings)


# With this variable /etc/profile does not load an installed bash-completion in a login.  The start
# files unset the variable, so that jobs have the environment of a machine without the package.
NO_COMPLETION = {'BASH_COMPLETION_VERSINFO': '0'}


def slots(number, cores=CORES):
    """Return the option that lets `number` jobs run at a time on a bench machine."""
    return f'--num-cpus={cores * 1.5 / number:.3f}'


@contextlib.contextmanager
def rig_folder(folder):
    """Let the rig make its folders in this one until the end of the with block."""
    before = os.environ.get('RIG_FOLDER')
    os.environ['RIG_FOLDER'] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ['RIG_FOLDER']
        else:
            os.environ['RIG_FOLDER'] = before


# ---- Disks ----

def own_mounts():
    """Enter a new mount namespace: the kernel unmounts its disks even if this process is killed."""
    mark = 'BENCH_OWN_MOUNTS'
    if os.getuid() == 0 and rig.program('unshare') and mark not in os.environ:
        argv = [rig.program('unshare'), '--mount', '--propagation', 'private']
        if subprocess.run([*argv, 'true'], capture_output=True).returncode == 0:
            os.environ[mark] = 'yes'
            os.execv(argv[0], [*argv, sys.executable, *sys.argv])
    os.environ.pop(mark, None)


def trouble_of(argv):
    """Run argv; return its error message if it fails, else ''."""
    try:
        done = subprocess.run([*map(str, argv)], capture_output=True, text=True)
    except OSError as error:
        return f'{argv[0]}: {error.strerror}'
    return (done.stderr.strip() or f'{argv[0]} failed') if done.returncode else ''


@contextlib.contextmanager
def journalled_disk(memory_folder):
    """Yield (folder, '') of an ext4 with a journal, in memory; or (None, the reason for none)."""
    if os.getuid() != 0:
        yield None, 'only root may mount one'
        return
    mounted = Path(tempfile.mkdtemp(prefix='ext4-', dir=memory_folder))
    image = mounted.with_suffix('.image')
    try:
        with open(image, 'wb') as file:
            file.truncate(IMAGE_GB * 10**9)
        # Initialize everything now: else the kernel would do so during the measurements.
        trouble = trouble_of([rig.program('mke2fs') or 'mke2fs', '-q', '-t', 'ext4', '-O',
                              'has_journal', '-i', '8192', '-E',
                              'lazy_itable_init=0,lazy_journal_init=0', image])
        trouble = trouble or trouble_of(['mount', '-o', 'loop', image, mounted])
        image.unlink()          # the mount keeps it open, so the kernel frees it at the unmount
        yield (None if trouble else mounted), trouble
    finally:
        image.unlink(missing_ok=True)
        if os.path.ismount(mounted):
            unmount(mounted)
        mounted.rmdir()


def unmount(folder):
    """Unmount a folder as soon as nobody uses it, or after 5 s in any case."""
    for _ in range(50):
        if not trouble_of(['umount', folder]):
            return
        time.sleep(0.1)
    subprocess.run(['umount', '--lazy', folder], check=True)


# ---- Versions ----

COMMAND = '''\
import os, sys, time
sys.path.insert(0, {source!r})
if {delay_s}:
    def later(sync):
        def synced(fd):
            time.sleep({delay_s})
            return sync(fd)
        return synced
    os.fsync, os.fdatasync = later(os.fsync), later(os.fdatasync)
from ssh_scheduler import main
sys.exit(main())
'''


class Version(NamedTuple):
    """A version of the program.  All run with this Python, and start in the same way."""
    name: str
    folder: Path

    def argv(self, command, slow=False):
        """Return the beginning of a command line; slow: each fsync takes FSYNC_DELAY_S longer."""
        return [sys.executable, self.folder / ('slow' if slow else 'quick') / command]


def version(name, source, folder):
    """Make commands in `folder` for the ssh_scheduler.py in `source`; return their Version."""
    for kind, delay_s in (('quick', 0), ('slow', FSYNC_DELAY_S)):
        (folder / kind).mkdir(parents=True)
        for command in ('execute_batch', 'execute_remote', 'execute_to'):
            (folder / kind / command).write_text(
                COMMAND.format(source=str(source), delay_s=delay_s))
    return Version(name, folder)


def exported(commit, folder):
    """Put the program of a commit into `folder`; return '' or the reason why that failed."""
    try:
        archive = subprocess.run(['git', '-C', HERE.parent, 'archive', commit, 'ssh_scheduler.py'],
                                 capture_output=True)
    except FileNotFoundError:
        return 'git is missing'
    if archive.returncode:
        return archive.stderr.decode(errors='replace').strip().partition('\n')[0]
    folder.mkdir(parents=True)
    subprocess.run(['tar', '-xf', '-', '-C', folder], input=archive.stdout, check=True)
    return ''


# ---- Processor time ----

class Group:
    """A cgroup: it includes all descendants of its processes, and keeps their time at their end."""

    def __init__(self, name):
        for kind, parent in group_parents():
            remove_dead(parent, name)
            self.path, self._kind = parent / f'{name}.{os.getpid()}', kind
            with contextlib.suppress(OSError):
                self.path.mkdir()
                self.used_ms()
                return
            with contextlib.suppress(OSError):
                self.path.rmdir()
        raise OSError('no cgroup can be made')

    def add(self, pid):
        (self.path / 'cgroup.procs').write_text(f'{pid}\n')

    def pids(self):
        return {int(pid) for pid in (self.path / 'cgroup.procs').read_text().split()}

    def used_ms(self):
        """Return the processor time that the processes of the group have used."""
        if self._kind == 1:
            return int((self.path / 'cpuacct.usage').read_text()) / 1e6
        return int(re.search(r'usage_usec (\d+)', (self.path / 'cpu.stat').read_text())[1]) / 1e3

    def remove(self):
        for _ in range(50):
            with contextlib.suppress(OSError):
                self.path.rmdir()
                return
            time.sleep(0.1)         # its last processes still exit


def remove_dead(parent, name):
    """Remove the groups of this name that a killed bench left."""
    for path in parent.glob(f'{name}.*'):
        if not Path(f'/proc/{path.suffix[1:]}').exists():
            with contextlib.suppress(OSError):
                path.rmdir()


def group_parents():
    """Yield (version of cgroups, folder) for each folder in which to try to make a group."""
    own = dict(re.findall(r'^\d+:(.*?):(.*)$', Path('/proc/self/cgroup').read_text(), re.M))
    for name in ('cpuacct', 'cpu,cpuacct'):
        for path in (own.get(name), '/'):
            if path and (CGROUPS / name).is_dir():
                yield 1, CGROUPS / name / path.lstrip('/')
    if (CGROUPS / 'cgroup.controllers').exists():
        yield 2, CGROUPS / own.get('', '/').lstrip('/')
        yield 2, CGROUPS


class Cost(NamedTuple):
    """A cost: seconds, and processor time of the client (here) and the machines, in ms."""
    seconds: float
    here_ms: float
    there_ms: float

    @property
    def all_ms(self):
        return self.here_ms + self.there_ms


class Meter:
    """Measures the processor time of a client, and of the watched sshds with their children."""

    def __init__(self):
        self.trouble, self._sshds = '', set()
        self._groups = []
        try:
            for name in ('bench-here', 'bench-there'):
                self._groups.append(Group(name))
        except OSError as error:
            self.close()
            self.trouble = str(error)

    @property
    def is_whole(self):
        """Tell whether the meter measures the machines, too, and not only the client."""
        return not self.trouble

    def watch(self, *machines):
        """Measure also the processes of these machines."""
        for machine in machines if self.is_whole else ():
            self._groups[1].add(machine.sshd.pid)
            self._sshds.add(machine.sshd.pid)

    def measure(self, run):
        """Call run(function for the client's process to call first); return (Cost, run's result).

        The cost includes the cleanup on the machines after the client's end.
        """
        before, began = self._used_ms(), time.monotonic()
        try:
            result = run(self._enter)
            seconds = time.monotonic() - began
            self._wait_for_the_rest()
        except BaseException:
            self._kill_the_rest()
            raise
        return Cost(seconds, *(now - then for now, then in zip(self._used_ms(), before))), result

    def _enter(self):
        if self.is_whole:
            self._groups[0].add(os.getpid())

    def _used_ms(self):
        if self.is_whole:
            return [group.used_ms() for group in self._groups]
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return [(used.ru_utime + used.ru_stime) * 1000, 0.0]

    def _wait_for_the_rest(self):
        for _ in range(1000 if self.is_whole else 0):
            left = self._left()
            if not left:
                return
            time.sleep(0.01)
        if self.is_whole:
            raise Failed('ten seconds after the client something still runs: '
                         f'{[rig.cmdline(pid) for pid in left][:5]}')

    def _left(self):
        return set().union(*(group.pids() for group in self._groups)) - self._sshds

    def _kill_the_rest(self):
        """Kill the processes of both groups; wait for none of them: others may fork meanwhile."""
        for _ in range(1000):
            left = self._left()
            if not left:
                return
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def close(self):
        for group in self._groups:
            group.remove()
        self._groups = []


# ---- Grounds, and the table ----

def remove(folder):
    shutil.rmtree(folder, ignore_errors=True)


class Ground:
    """A place for files: a home for the client, new folders, and machines."""

    def __init__(self, word, top, memory_top):
        self.word, self.top, self.memory_top = word, top, memory_top
        with rig_folder(top):
            self.home = rig.temporary_folder('bench')
        for name in ('tmp', '.parallel'):
            (self.home / name).mkdir()
        for name, text in skel().items():
            (self.home / name).write_text(text)
        self.env = {name: value for name, value in os.environ.items()
                    if not name.startswith(('SSH_', 'XDG_', 'CUDA_'))}
        self.env.update(HOME=str(self.home), TMPDIR=str(self.home / 'tmp'), SHELL='/bin/bash',
                        SSH_SCHEDULER_SHARED=str(self.shared_folder()), **NO_COMPLETION)
        # Python compiles an installed program once; with these settings this one, too.
        self.env.pop('PYTHONDONTWRITEBYTECODE', None)
        self.env['PYTHONPYCACHEPREFIX'] = str(self.home / 'tmp/compiled')
        self._folders = 0

    def shared_folder(self):
        """Make a new folder in memory that stands for /dev/shm."""
        with rig_folder(self.memory_top):
            folder = rig.temporary_folder('shared')
        folder.chmod(0o1777)
        return folder

    @contextlib.contextmanager
    def machine(self, name, shared=None, **settings):
        """Run a bench machine whose home is on this ground."""
        shared = shared or self.shared_folder()
        with rig_folder(self.top):
            machine = bench_machine(name, env={'SSH_SCHEDULER_SHARED': str(shared)}, **settings)
            machine.__enter__()
        try:
            yield machine
        finally:
            machine.__exit__()

    def folder(self):
        """Make a new empty folder: to the machines it is a new project."""
        self._folders += 1
        folder = self.home / f'project{self._folders}'
        folder.mkdir()
        return folder

    def run(self, argv, cwd, stdin=None, env=None, enter=None):
        """Run argv to its end; return (seconds, its standard output).

        enter: a function that its process calls first
        """
        began = time.monotonic()
        try:
            done = subprocess.run([*map(str, argv)], cwd=cwd, input=stdin, env=env or self.env,
                                  capture_output=True, text=True, timeout=SAFETY_NET_S,
                                  preexec_fn=enter)
        except subprocess.TimeoutExpired:
            raise Failed(f'{argv[0]} did not end in {SAFETY_NET_S} seconds') from None
        took_s = time.monotonic() - began
        if done.returncode:
            raise Failed(f'{argv[0]} exited with {done.returncode}: '
                         f'{(done.stderr or done.stdout).strip()[-500:]}')
        return took_s, done.stdout

    def batch(self, command, lines, folder, *options, enter=None):
        """Run the lines as a batch in the folder; return the seconds from start to exit."""
        (folder / 'batch.sh').write_text(''.join(line + '\n' for line in lines))
        took_s, said = self.run([*command, *options, '--', 'batch.sh'], folder, enter=enter)
        if said.count('\nfinished: ') != len(lines):
            raise Failed(f'not all of {len(lines)} jobs finished: {said[-500:]}')
        return took_s

    def close(self):
        """Kill the processes that still use its home, and remove the home."""
        for pid in rig.knowing(self.home):
            rig.kill(pid, lambda pid: pid in rig.knowing(self.home))
        rig.remove(self.home)


class Goal(NamedTuple):
    sign: str                   # '<=' or '>='
    limit: float
    form: str = '{:.2f} x'

    def text(self):
        return f'{self.sign} {self.form.format(self.limit)}'

    def is_met(self, value):
        return value <= self.limit if self.sign == '<=' else value >= self.limit


class Bench(Ground):
    """The shared state of all figures: grounds (this object is the one in memory), versions, table.

    disk: the Ground with the journal, or None.  versions: this commit's first.
    """

    def __init__(self, quick, top, disk_top=None):
        word = 'memory' if str(top).startswith('/dev/shm') else str(top)
        super().__init__(word, top, top)
        self.quick = quick
        self.disk = Ground('ext4', disk_top, top) if disk_top else None
        self.grounds = [ground for ground in (self.disk, self) if ground]
        self.meter = Meter()
        self.versions = []
        self.rows = []          # the table so far: lists of texts
        self._add(version('ours', HERE.parent, self.home / 'ours'))

    def add_version(self, commit):
        """Measure this commit, too; return '' or the reason why that is impossible."""
        source = self.home / 'earlier/source'
        trouble = exported(commit, source)
        if not trouble:
            self._add(version(commit[:12], source, self.home / 'earlier'))
        return trouble

    def _add(self, version):
        self.versions.append(version)
        for ground in self.grounds:     # let Python compile it before the measurements
            ground.run([*version.argv('execute_batch'), '--version'], ground.home)

    def close(self):
        if self.disk:
            self.disk.close()
        super().close()
        self.meter.close()
        for folder in list(rig.FOLDERS):
            if folder.name.startswith('rig-shared-') and folder.exists():
                rig.remove(folder)

    # The table

    def columns(self):
        return [(ground.word, version.name) for ground in self.grounds
                for version in self.versions]

    def header(self):
        names = [f'{word}:{name}' for word, name in self.columns()]
        return f'{"figure":<50} ' + ' '.join(f'{name:>14}' for name in names) + f' {"goal":>13}'

    def row(self, name, measured, goal, passed, details):
        """Add a line to the table with a figure of this commit alone, in memory."""
        self._print(name, {(self.word, 'ours'): measured}, goal, passed, details)

    def in_memory(self, numbers):
        """Return the values for `compared` from one number of each version, measured in memory."""
        return {(self.word, version.name): number
                for version, number in zip(self.versions, numbers)}

    def compared(self, name, goal, values, details):
        """Add a line to the table.  values: {(ground's word, version's name): number}.

        The first measured ground decides whether the goal is met.
        """
        cells = {column: goal.form.format(value) for column, value in values.items()}
        mine = [values[column] for column in self.columns()
                if column[1] == 'ours' and column in values]
        self._print(name, cells, goal.text(), goal.is_met(mine[0]), details)

    def costs(self, name, goal, values, details):
        """Do the same as `compared`; but ignore the goal if only the client's time is known."""
        if self.meter.is_whole:
            self.compared(name, goal, values, details)
        else:
            cells = {column: goal.form.format(value) for column, value in values.items()}
            self._print(name, cells, goal.text(), None, f'the client alone; {details}')

    def _print(self, name, cells, goal, passed, details):
        """Keep one line of the table, and print it at once."""
        word = {True: 'pass', False: 'MISS', None: '-'}[passed]
        texts = ' '.join(f'{cells.get(column, "-"):>14}' for column in self.columns())
        self.rows.append([name, *(cells.get(column, '-') for column in self.columns()), goal, word,
                          details])
        print(f'{name:<50} {texts} {goal:>13}  {word:<5} {details}', flush=True)


# ---- Taking turns ----

def medians(rounds, *measures):
    """Call the measures in turn, `rounds` times; return the median of each."""
    taken = [[measure() for measure in measures] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*taken)]


def costs_in_turns(rounds, measures):
    """Call the measures, {key: function -> Cost}, in turn; return {key: median Cost}."""
    taken = collections.defaultdict(list)
    for _ in range(rounds):
        for key, measure in measures.items():
            taken[key].append(measure())
    return {key: Cost(*map(statistics.median, zip(*costs))) for key, costs in taken.items()}
