"""Helpers of the tests with real batches: start one, follow it, and read its results.

Events order the jobs, never a sleep: a job that has to wait reads from a FIFO of Gate; a job that
a test has to notice adds a line to a ledger, and the test waits for that line.
"""
import json
import os
import stat
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import rig

import ssh_scheduler

NO_GPU = ('--no-gpu-required', '--memory-required=100')
RESULTS = Path('job_results')

# With this mark a test runs crash.py, so that constants() can change constants, such as timeouts.
with_constants = pytest.mark.parametrize('scheduler', [Path(__file__).with_name('crash.py')],
                                         ids=['hasty'])


def constants(**values):
    """Return an environment that changes constants of the program; see with_constants."""
    return {'CRASH_SETTINGS': json.dumps(values)}


class Batches:
    """Runs batches in the current folder: batches.run(lines, machines, *options)."""

    def __init__(self, run_cli, start_cli, env=None):
        self._run_cli, self._start_cli, self._env = run_cli, start_cli, env

    def run(self, lines, machines, *options, **settings):
        """Run the batch to its end."""
        settings.setdefault('env', self._env)
        return self._run_cli(*argv_of(lines, machines, options), **settings)

    def start(self, lines, machines, *options, **settings):
        """Start the batch, and return its Follower."""
        settings.setdefault('env', self._env)
        return Follower(self._start_cli(*argv_of(lines, machines, options), **settings))


def argv_of(lines, machines, options):
    """Write batch.sh, unless lines is None, and return the words of execute_batch."""
    if lines is not None:
        Path('batch.sh').write_text('\n'.join(lines) + '\n')
    words = [m.yaml() if isinstance(m, rig.Machine) else m for m in machines]
    return ['execute_batch', 'batch.sh', *options, '--machines', *words]


class Follower:
    """Reads the output of a program while it runs; `lines` has the lines of stdout so far."""

    def __init__(self, process):
        self.process = process
        self.lines = []
        self._rest = b''

    def until(self, start):
        """Return the next line that begins with `start`; read up to it."""
        fd, limit = self.process.stdout.fileno(), time.monotonic() + rig.SAFETY_NET_S
        while True:
            while b'\n' in self._rest:
                line, _, self._rest = self._rest.partition(b'\n')
                self.lines.append(line.decode(errors='replace'))
                if self.lines[-1].startswith(start):
                    return self.lines[-1]
            ready = rig.wait_readable(fd, timeout_s=max(limit - time.monotonic(), 0))
            data = os.read(fd, 65536) if ready else b''
            if not data:
                self.process.kill()
                why = 'it ended' if ready else 'it was not said in time'
                raise AssertionError(f'no line {start!r}: {why}: {self.lines}\n'
                                     f'{self.process.stderr and self.process.stderr.read()}')
            self._rest += data

    def end(self, timeout_s=60):
        """Wait until the program ends, and return a CompletedProcess with its whole output."""
        said, complaint = self.process.communicate(timeout=timeout_s)
        self.lines += (self._rest.decode(errors='replace') + said).splitlines()
        self._rest = b''
        return subprocess.CompletedProcess(self.process.args, self.process.returncode,
                                           ''.join(line + '\n' for line in self.lines), complaint)


class Gate:
    """FIFOs at which jobs wait: the command of gate.wait(name) runs until gate.open(name).

    If several jobs wait at one gate, each `open` lets one of them through.
    """

    def __init__(self, folder):
        self.folder = folder
        self._ends = []
        folder.mkdir()
        folder.chmod(0o777)

    def path(self, name):
        path = self.folder / name
        if not path.exists():
            os.mkfifo(path)
            path.chmod(0o666)
        return path

    def wait(self, name):
        """Return a command that waits for the gate to open."""
        return f'read -r <{self.path(name)}'

    def pull(self, name):
        """Return a command that opens the gate as soon as a job waits there."""
        return f'echo >{self.path(name)}'

    def meeting(self, number):
        """Return commands for this many jobs: each ends when all have started."""
        here, go = ([f'{word}.{n}' for n in range(1, number)] for word in ('here', 'go'))
        last = [*map(self.wait, here), *map(self.pull, go), 'true']
        return [*(f'{self.pull(a)}; {self.wait(b)}' for a, b in zip(here, go)), '; '.join(last)]

    def open(self, name):
        """Open the gate as soon as a job waits there."""
        wait_until(lambda: self._let_through(name), f'a job at the gate {name}')

    def _let_through(self, name):
        """Let one job through; return False if none waits."""
        try:
            # Only a reader can be told to go: without one, this open fails.
            fd = os.open(self.path(name), os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return False
        # Keep the FIFO open: without a writer all readers get the end of the file, and the
        # other jobs that wait at this gate would fail.
        self._ends.append(fd)
        try:
            os.write(fd, b'\n')
        except BrokenPipeError:         # the reader was the job of the last call, which has left
            return False
        return True

    def close(self):
        for fd in self._ends:
            os.close(fd)
        self._ends = []


def wait_until(test, what):
    """Wait until test() is true: for changes without an event, such as a file that grows."""
    limit = time.monotonic() + rig.SAFETY_NET_S
    while not test():
        assert time.monotonic() < limit, f'it did not come: {what}'
        time.sleep(0.01)


def until_sleep(pid):
    """Return a command that waits until a child, a copy of its bash at first, has become sleep."""
    return f'until grep -qsx sleep /proc/{pid}/comm; do sleep 0.01; done'


def result(job, stream='out', folder=RESULTS):
    """Return the bytes of a job's stream."""
    return (folder / f'{job}.{stream}').read_bytes()


def events(text, *words):
    """Return the lines of stdout that begin with one of the words, such as 'started:'."""
    return [line for line in text.splitlines() if line.split(' ')[0] in words]


def wrote(ledger, *lines):
    """Wait until the ledger has these lines."""
    wait_until(lambda: not Counter(lines) - Counter(ledger.read_text().splitlines()), lines)


def tree_of(folder):
    """Return {path: (kind, mode, time, content)} of everything below a folder."""
    found, base = {}, os.fsencode(folder)
    for parent, folders, files in os.walk(base):
        for name in folders + files:
            path = os.path.join(parent, name)
            info = os.lstat(path)
            if stat.S_ISLNK(info.st_mode):
                what = ('link', os.readlink(path), info.st_mtime_ns)
            elif stat.S_ISDIR(info.st_mode):
                what = ('folder', stat.S_IMODE(info.st_mode))
            else:
                with open(path, 'rb') as file:
                    what = ('file', stat.S_IMODE(info.st_mode), info.st_mtime_ns, file.read())
            found[os.path.relpath(path, base)] = what
    return found


def places(home):
    """Return the program's folders in the home of a machine: {project: {names in it}}."""
    root = Path(home) / '.ssh_scheduler'
    return {project.name: {entry.name for entry in project.iterdir()}
            for project in (root.iterdir() if root.exists() else ())}


def tell(processes):
    """Return a line for each process: its pid, its words, and its variables SSH_SCHEDULER_*."""
    return '\n'.join(' '.join([str(pid), words, *(
        word.decode() for word in rig.read_proc(pid, 'environ').split(b'\0')
        if word.startswith(b'SSH_SCHEDULER_'))]) for pid, words in processes)


def assert_clean(machine, cache=False):
    """Assert that no process and no file of this folder's batches is left on the machine.

    With `cache`, sent files may stay in the cache.  Ignore the projects of other tests.
    """
    while left := machine.processes():      # one that ends may have started another one
        for pid, _ in left:
            assert rig.ends(pid), f'still on {machine.name}: {tell(machine.processes())}'
    project = ssh_scheduler.project_name()
    left = places(machine.home).get(project, set()) - ({'cache'} if cache else set())
    assert not left, [*machine.home.glob('.ssh_scheduler/*/*/*')]
    assert not [*machine.shared.glob(f'*/{project}.*')], 'a claim is left'
    ours = [path for path in machine.home.iterdir()
            if path.name not in ('.profile', '.ssh_scheduler', *(
                name.split('/')[0] for name in machine.startup))]
    assert not ours, ours
