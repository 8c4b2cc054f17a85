"""The protocol between the client and the remote runner, while the channel and both ends fail.

Both ends are real: the client is execute_batch, in a thread that runs only when the test lets it,
and the runner is the bash of REMOTE_RUNNER with real jobs.  The test stands between them: it holds
each request and each answer, and delivers, delays, repeats, tears or loses them as Hypothesis
chooses.  The test also sets the client's clock, so nothing here waits for real seconds.

Once everything works again, each job must have run once from its start to its end, and its result
must have arrived here unchanged.
"""
import collections
import contextlib
import io
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from unittest import mock

import ledgers
import pytest
import rig
from batching import NO_GPU
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

import ssh_scheduler as s

HELD = ['the channel']      # the argv of a channel that the test plays instead of starting it
OURS = 10**9                # the first number of the pings that the test sends
LIMIT_S = 2 * rig.SAFETY_NET_S
KINDS = ('short', 'long', 'files')
ONCE = ('probe', 'enter', 'unpack', 'finish')   # a contact's first and last requests: no repeats
ROOM = (3000, 8000)         # the limits for all batches together: thousandths of a core, MB

# A job reports its start to the test, and ends when and with the exit code that the test tells it.
JOB = r'''
try=${SSH_SCHEDULER_ID##*.}
try=${try%-*}
gate=$FOLDER/gates/$SSH_SCHEDULER_JOB.$try
mkfifo "$gate"
[[ $1 != long ]] || printf 'x%.0s' {1..1500}
[[ $1 != files ]] || touch -- {1..9}{0..9}-of-many-files "made by $try"
echo "$SSH_SCHEDULER_JOB $try start $$ $PPID" >"$FOLDER/notes"
read -r code <"$gate"
[[ $1 != long ]] || printf 'y%.0s' {1..1500}
echo "$SSH_SCHEDULER_JOB $try"
echo "$SSH_SCHEDULER_JOB $try end" >"$FOLDER/notes"
exit "$code"
'''


def written(kind, name, attempt, ended):
    """Return the text that such a job writes to its stdout."""
    many = 1500 if kind == 'long' else 0
    return 'x' * many + ('y' * many + f'{name} {attempt}\n' if ended else '')


# ---- The two ends ----

class Killed(BaseException):
    """The client was killed: whatever it does afterwards has no effect."""


class Client:
    """A run of execute_batch in a thread; whenever it waits, the test runs."""

    def __init__(self, world):
        self.world, self.lines = world, []
        self.out, self.err = io.StringIO(), io.StringIO()
        self.inbox = collections.deque()        # callbacks to call in its next wait()
        self.processes = None
        self.killed, self.status, self.crash = False, None, None
        self.reported = False
        self._timeout_s = 0
        self._its, self._ours = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    @property
    def lives(self):
        return self.status is None

    @property
    def line(self):
        """Return the open channel of the client, or None."""
        return self.lines[-1] if self.lives and self.lines and self.lines[-1].is_open else None

    def _live(self):
        self._its.acquire()
        try:
            self.status = s.execute_batch([*NO_GPU, '--no-live', '--machines', 'localhost', '--',
                                           'batch.sh'])
        except s.SchedulerError as error:
            self.status = str(error)
        except Killed:
            self.status = 'killed'
        except BaseException as error:
            self.status, self.crash = 'crashed', error
        finally:
            self._ours.release()

    def wait(self):
        """Let the test run until it lets the client run again.  The client calls this."""
        if not self.killed:
            self._ours.release()
            self._its.acquire()
        if self.killed:
            raise Killed
        while self.inbox:
            self.inbox.popleft()()
        return self._timeout_s

    def turn(self, timeout_s=0):
        """Let the client run to its next wait."""
        self._timeout_s = timeout_s
        self._its.release()
        assert self._ours.acquire(timeout=LIMIT_S), 'the client does not come to a wait'
        if self.crash:
            raise self.crash

    def settle(self):
        """Let the client, and the processes that it started, do all that they can do now."""
        self.turn()
        until = time.monotonic() + LIMIT_S
        while self.lives and (self.inbox or self.processes.restless):
            assert time.monotonic() < until, 'the client does not come to rest'
            self.turn(0.02)

    def kill(self):
        if self.lives:
            self.killed = True
            self.turn()
        self._thread.join()


class Processes(s.Processes):
    """The client's processes: all is real except the channel, and the clock of the timers."""

    def __init__(self, client, on_start=None):
        super().__init__(on_start, client.world.clock)
        self.client, client.processes = client, self

    @property
    def restless(self):
        return self._children or any(due <= self._clock() for due, _ in self._timers)

    def start(self, argv, on_output, on_exit, **settings):
        if argv != HELD:
            return super().start(argv, on_output, on_exit, **settings)
        line = Line(self.client, on_output, on_exit)
        self.client.lines.append(line)
        self.client.world.lines.append(line)
        return line

    def wait(self, timeout_s=None):
        super().wait(self.client.wait())


class Line:
    """One connection.  For the client it stands in for the process of the channel."""

    def __init__(self, client, on_output, on_exit):
        self.client, self.on_output, self.on_exit = client, on_output, on_exit
        self.popen, self.status = self, None
        self.unread = bytearray()
        self.requests = collections.deque()     # (fields, bytes), not delivered
        self.head = None                        # the bytes that turn a bash into a remote runner
        self.closed = False                     # no more requests follow
        self.runner = None

    # Called by the client

    def write(self, data):
        if not self.client.killed:
            self.unread += data

    def close_stdin(self):
        self.closed = True

    def poll(self):
        return self.status

    def kill(self):
        self.end(-signal.SIGKILL)

    # Called by the test

    @property
    def is_open(self):
        return self.status is None and not self.client.killed

    def end(self, status):
        """End the connection for the client."""
        if self.status is None:
            self.status = status
            self.client.inbox.append(lambda: self.on_exit(status, b''))

    def hear(self, data):
        """Let bytes arrive at the client."""
        self.client.inbox.append(lambda: self.on_output(bytes(data)))

    def read(self):
        """Split what the client has sent into the head and the requests."""
        if self.head is None and self.unread:
            loader, size, rest = bytes(self.unread).split(b'\0', 2)
            reader = FieldReader(rest, int(size))
            count = int(reader.fields(8)[-1])
            reader.fields(count)
            self.head = loader + b'\0' + size + b'\0' + rest[:reader.place]
            del self.unread[:len(self.head)]
        reader = FieldReader(self.unread)
        while reader.place < len(self.unread):
            start = reader.place
            fields = reader.request()
            self.requests.append((fields, bytes(self.unread[start:reader.place])))
        self.unread.clear()


class FieldReader:
    """Fields that end with NUL; the client sends whole requests only."""

    def __init__(self, data, place=0):
        self.data, self.place = data, place

    def fields(self, count):
        found = []
        for _ in range(count):
            end = self.data.index(b'\0', self.place)
            found.append(bytes(self.data[self.place:end]).decode())
            self.place = end + 1
        return found

    def request(self):
        verb, count = self.fields(2)
        fields = self.fields(int(count))
        if verb == 'unpack':
            self.place += int(fields[-1])
        return [verb, *fields]


class Remote:
    """A real remote runner, whose answers are held back."""

    numbers = itertools.count(OURS)

    def __init__(self, world, head):
        self.world = world
        self.process = subprocess.Popen(
            [*s.BOOTSTRAP_BASH, s.BOOTSTRAP], env=world.env, cwd=world.home, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0, start_new_session=True)
        os.set_blocking(self.process.stdout.fileno(), False)
        self.answers = collections.deque()      # bytes of whole events, not delivered
        self.mentioned = set()                  # keys of the jobs that its events named
        self.pongs = set()
        self.at_end = False                     # its output has ended
        self._unread, self._answer = b'', b''
        self.write(head)

    def write(self, data):
        """Send this to the runner, if it still lives."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(data)

    def close(self):
        """Close the runner's input, as when the connection ends, and wait for the runner's end."""
        self.process.stdin.close()
        self.world.until(lambda: self.at_end, 'the end of a remote runner')
        self.process.wait(LIMIT_S)

    def sync(self):
        """Wait until the runner has read all of its input, and looked at it again."""
        for number in itertools.islice(self.numbers, 2):
            self.write(s.request('ping', number))
            self.world.until(lambda number=number: number in self.pongs or self.at_end, 'a pong')

    def read(self):
        """Read what the runner wrote; probes and notes stay with the event that follows them."""
        while not self.at_end:
            try:
                data = os.read(self.process.stdout.fileno(), 2**18)
            except BlockingIOError:
                break
            self.at_end = not data
            self._unread += data
        while b'\n' in self._unread:
            line, _, rest = self._unread.partition(b'\n')
            word, *fields = line.split(b'\t')
            size = int(fields[0]) if word == b'data' else 0
            if len(rest) < size:
                break
            self._unread = rest[size:]
            if word == b'pong' and int(fields[0]) >= OURS:
                self.pongs.add(int(fields[0]))
                continue
            self._answer += line + b'\n' + rest[:size]
            if line and word not in (b'probe', b'note'):
                self.mentioned.update(field.decode() for field in fields)
                self.answers.append(self._answer)
                self._answer = b''

    def kill(self):
        """Kill the runner: its writer still writes the rest, and its jobs keep running."""
        self.process.kill()
        self.process.wait()


class Attempt:
    """An attempt that started on the machine, as the test knows it."""

    def __init__(self, pid, worker):
        self.pid, self.worker = pid, worker
        self.ended = False              # the job reached its end and reported that
        self.over = False               # no process of it is left
        self.status = None              # the exit status that was recorded
        self.broken = False             # the process that records its end was killed
        self.unwanted = False           # somebody asked to cancel it, or to run its job again


class World:
    """One example: a machine, a project, its batch, and the clients that run the batch."""

    def __init__(self):
        self._stack = contextlib.ExitStack()
        self.folder = rig.temporary_folder('protocol')
        self._stack.callback(rig.remove, self.folder)
        self.project, self.home = self.folder / 'project', self.folder / 'home'
        for name in ('project', 'home', 'shared', 'gates', 'tmp', 'proc/self',
                     'proc/sys/kernel/random'):
            (self.folder / name).mkdir(parents=True)
        (self.folder / 'job').write_text(JOB.replace('$FOLDER', str(self.folder)))
        proc = self.folder / 'proc'
        (proc / 'stat').write_text('cpu  1 0 1 8 0 0 0 0 0 0\n' + ''.join(
            f'cpu{n} 1 0 1 8 0 0 0 0 0 0\n' for n in range(2)))
        (proc / 'loadavg').write_text('0.00 0.00 0.00 1/100 1\n')
        (proc / 'meminfo').write_text('MemTotal: 8192000 kB\nMemAvailable: 8192000 kB\n')
        (proc / 'self/cgroup').touch()
        self.boots = 0
        self.boot()
        os.mkfifo(self.folder / 'notes')
        self.notes = os.open(self.folder / 'notes', os.O_RDWR | os.O_NONBLOCK)
        self._stack.callback(os.close, self.notes)
        self.env = {'PATH': os.environ['PATH'], 'HOME': str(self.home), 'SHELL': '/bin/sh',
                    'LC_ALL': 'C.UTF-8', 'SSH_SCHEDULER_SHARED': str(self.folder / 'shared'),
                    'SSH_SCHEDULER_PROC': str(proc)}
        self.now = 1000.0
        self.client, self.reports = None, []
        self.finished = False           # the last answer of the machine was "finished"
        self.lines, self.remotes, self.heard = [], [], []
        self.kinds = []                 # of the jobs, in the order of their lines
        self.attempts = collections.defaultdict(dict)       # job -> {number: Attempt}
        self.ledger = []
        self._unread = b''
        self._step_into()

    def _step_into(self):
        """Set the current folder, and replace parts of the client, such as clock and channel."""
        enter, before, reporter = self._stack.enter_context, os.getcwd(), s.Reporter
        os.chdir(self.project)
        self._stack.callback(os.chdir, before)
        enter(mock.patch.dict(os.environ, {'TMPDIR': str(self.folder / 'tmp')}))
        os.environ.pop('XDG_RUNTIME_DIR', None)
        for name, value in {
            'Processes': lambda *args: Processes(self.client, *args),
            'Reporter': lambda verbose: reporter(verbose, self.client.out, self.client.err),
            'interruptible': lambda handler: contextlib.nullcontext(),  # main thread only
            'allow_files': lambda machines: None,                       # it changes this process
            'time': types.SimpleNamespace(monotonic=self.clock, time=time.time,
                                          strftime=time.strftime, time_ns=time.time_ns,
                                          localtime=time.localtime),
        }.items():
            enter(mock.patch.object(s, name, value))
        enter(mock.patch.object(s.Connection, 'channel', lambda connection: HELD))

    def clock(self):
        return self.now

    def boot(self):
        self.boots += 1
        (self.folder / 'proc/sys/kernel/random/boot_id').write_text(
            f'{self.boots:08}-0000-4000-8000-000000000000\n')

    def close(self):
        """Kill the client, the runners and the jobs."""
        try:
            if self.client:
                self.client.kill()
            for remote in self.remotes:
                remote.process.stdin.close()
                remote.kill()
            self.kill_all()
            for remote in self.remotes:
                remote.process.stdout.close()
        finally:
            self._stack.close()

    def kill_all(self):
        """Kill all processes on the machine."""
        while True:
            left = rig.knowing(self.home)
            if not left:
                return
            for pid in left:
                rig.kill(pid, lambda pid: pid in rig.knowing(self.home))

    # ---- The machine ----

    def until(self, happened, what):
        """Wait until this has happened; meanwhile read the output of jobs and remote runners."""
        until = time.monotonic() + LIMIT_S
        while not happened():
            assert time.monotonic() < until, f'there never was {what}'
            self.look(20)

    def look(self, timeout_ms=0):
        """Read what remote runners and jobs have written."""
        poll = select.poll()
        poll.register(self.notes, select.POLLIN)
        for remote in self.remotes:
            if not remote.at_end:
                poll.register(remote.process.stdout, select.POLLIN)
        poll.poll(timeout_ms)
        for remote in self.remotes:
            remote.read()
        with contextlib.suppress(BlockingIOError):
            while True:
                self._unread += os.read(self.notes, 2**16)
        *lines, self._unread = self._unread.split(b'\n')
        for line in lines:
            self.take_note(*line.decode().split())

    def take_note(self, name, number, word, *pids):
        """Note that a job began or ended; assert that no other attempt ran when it began."""
        number, others = int(number), self.attempts[name]
        self.ledger.append(f'{name} {number} {word}')
        if word == 'end':
            others[number].ended = True
            return
        assert number not in others, f'{name} {number} is started twice'
        self.note_cancelled()
        for other, attempt in others.items():
            assert attempt.over, f'{name} {number} is started, and {other} still runs'
            assert attempt.status is None or attempt.broken or attempt.unwanted, (
                f'{name} {number} is started, and {other} has ended with {attempt.status}')
        others[number] = Attempt(*map(int, pids))

    def running(self):
        """Return [(job, number, Attempt)] of the attempts that have processes."""
        self.note_cancelled()
        return [(name, number, attempt) for name, attempts in sorted(self.attempts.items())
                for number, attempt in sorted(attempts.items())
                if not (attempt.over or attempt.unwanted and rig.ends(attempt.pid, timeout_s=0))]

    def note_cancelled(self):
        """Note which unwanted attempts have ended."""
        for name, attempts in self.attempts.items():
            for number, attempt in attempts.items():
                if attempt.over or not attempt.unwanted or not rig.ends(attempt.pid, timeout_s=0):
                    continue
                word, *status = self.record(name, number).split() or ['']
                attempt.broken |= word != 'ended' and rig.ends(attempt.worker, timeout_s=0)
                if word == 'ended' and not attempt.broken:
                    attempt.status = int(status[0])
                attempt.over = word == 'ended' or attempt.broken

    def record(self, name, number):
        """Return the machine's record of the attempt: 'ended 0', ..."""
        for path in self.home.glob(f'.ssh_scheduler/*/jobs/{name}.{number}-*'):
            if '.' not in path.name.rpartition('-')[2]:
                with contextlib.suppress(FileNotFoundError):
                    words = path.read_text().rpartition('#')[2].split()
                    return ' '.join(word for word in words if not s.FOLDER.fullmatch(word))
        return ''

    def end_job(self, name, number, attempt, code):
        """Let the attempt end with this exit code."""
        gate = os.open(self.folder / f'gates/{name}.{number}', os.O_RDWR)       # does not block
        os.write(gate, b'%d\n' % code)
        # An unwanted attempt may be killed before it can report its end.
        self.until(lambda: attempt.ended or attempt.unwanted and rig.ends(
            attempt.pid, timeout_s=0), f'the end of {name} {number}')
        os.close(gate)
        if attempt.ended:
            self.is_over(name, number, attempt)

    def is_over(self, name, number, attempt):
        """Wait until the attempt's processes are gone and its end is recorded."""
        assert rig.ends(attempt.pid, LIMIT_S)
        attempt.over = True
        if not attempt.broken:
            self.until(lambda: self.record(name, number).split()[:1] == ['ended'],
                       f'the record of the end of {name} {number}')
            attempt.status = int(self.record(name, number).split()[1])

    def break_job(self, name, number, attempt, how):
        """Kill the command of the attempt, the process that records its end, or both."""
        if how == 'command':
            os.kill(attempt.pid, signal.SIGKILL)
            self.is_over(name, number, attempt)
            return
        attempt.broken = True
        rig.kill(attempt.worker, lambda pid: True)      # killed first: it must record nothing
        if how == 'group':
            os.killpg(attempt.pid, signal.SIGKILL)
            self.is_over(name, number, attempt)
        assert rig.ends(attempt.worker, LIMIT_S)

    def reboot(self):
        """Cut the power of the machine, and boot it again."""
        for remote in self.remotes:
            remote.process.kill()
        self.kill_all()
        for remote in self.remotes:
            remote.process.wait()
        self.look()
        for _, _, attempt in self.running():
            attempt.over = attempt.broken = True
        rig.remove(self.folder / 'shared')
        (self.folder / 'shared').mkdir()
        self.boot()

    def take_room(self, taken):
        """Claim all room for another batch, whose client this process plays, or release it."""
        claim = self.folder / 'shared/ssh_scheduler.other/claim'
        if taken:
            began = Path('/proc/self/stat').read_text().rpartition(') ')[2].split()[19]
            boot_id = (self.folder / 'proc/sys/kernel/random/boot_id').read_text().strip()
            claim.parent.mkdir(exist_ok=True)
            claim.write_text(' '.join(map(str, [os.getpid(), began, boot_id, *ROOM, 0])) + '\n')
        elif claim.exists():
            rig.remove(claim.parent)

    # ---- Requests of other commands ----

    def ask(self, action, name):
        """Put a request for the job into the client's inbox, and let the client act on it."""
        attempts = self.attempts[name]
        if attempts:
            attempts[max(attempts)].unwanted = True
        inbox = self.project / 'job_results/.ssh_scheduler/inbox'
        inbox.mkdir(0o700, parents=True, exist_ok=True)
        path = inbox / f'{time.time_ns():020}-1'
        path.with_suffix('.new').write_text(json.dumps(
            {'batch': 'batch.sh', 'action': action, 'jobs': [name]}))
        path.with_suffix('.new').rename(path.with_suffix('.request'))
        self.now += 2 * s.REQUEST_S
        if self.client.lives:
            self.client.settle()

    # ---- The way between client and machine ----

    def connect(self, line):
        """Let a connection that the client began reach the machine."""
        line.read()
        if line.head and not line.runner:
            line.runner, self.finished = Remote(self, line.head), False
            self.remotes.append(line.runner)
            line.runner.write(s.request('limits', *ROOM))
            line.runner.sync()

    def deliver(self, line, count, twice=False):
        """Deliver this many requests, each once or twice, and wait for their effects."""
        line.read()
        if not line.runner:
            return 0
        arrived = [line.requests.popleft() for _ in range(min(count, len(line.requests)))]
        for fields, data in arrived:
            line.runner.write(data * (2 if twice and fields[0] not in ONCE else 1))
        if not line.runner.process.stdin.closed:
            line.runner.sync()
        for (verb, *fields), _ in arrived:
            for key in {'start': fields[:1], 'adopt': fields}.get(verb, ()):
                self.until(lambda key=key: self.is_known(line.runner, key), f'a word of {key}')
        if line.closed and not line.requests and not line.runner.process.stdin.closed:
            line.runner.close()
        return len(arrived)

    def is_known(self, runner, key):
        """Tell whether the runner has carried out the request for the job."""
        if runner.at_end or runner.process.poll() is not None:
            return True
        name, _, number = key.partition('-')[0].rpartition('.')
        word = self.record(name, number).partition(' ')[0]
        if key in runner.mentioned:
            return int(number) in self.attempts[name] or word not in ('starting', 'running')
        return word == 'revoked'

    def hear(self, line, count, twice=False):
        """Let this many answers arrive at the client, each once or twice."""
        self.look()
        answers = line.runner.answers if line.runner else ()
        arrived = [answers.popleft() for _ in range(min(count, len(answers)))]
        for answer in arrived:
            # Repeat neither the first nor the last answer: that would end the connection.
            once = answer.startswith(b'\n') or answer == b'finished\n'
            self.finished = answer == b'finished\n'
            line.hear(answer * (2 if twice and not once else 1))
            self.heard += [] if once else [answer]
        gone = line.runner and line.runner.at_end and not answers
        if gone and line.is_open:
            line.end(0 if line.runner.process.wait(LIMIT_S) == 0 else 255)
        return gone

    # ---- The client ----

    def write_batch(self, kinds):
        self.kinds += kinds
        (self.project / 'batch.sh').write_text(''.join(
            f'. {self.folder}/job {kind}\n' for kind in self.kinds))

    def start_client(self):
        self.client = Client(self)
        self.client.settle()

    def client_ends(self):
        """Kill the client unless it has ended, and keep what it printed."""
        if not self.client.reported:
            self.client.reported = True
            self.client.kill()
            self.reports.append(self.client.out.getvalue())

    def run_again(self):
        self.client_ends()
        self.start_client()

    @property
    def journal(self):
        return ledgers.read_journal(self.project / 'job_results/.ssh_scheduler/journal')

    # ---- Without further faults ----

    def come_into_contact(self):
        """Let the client try until it has a connection; let the connection reach the machine."""
        for _ in range(100):
            if not self.client.lives:
                return
            if self.client.line:
                break
            self.now += 1
            self.client.settle()
        else:
            raise AssertionError('the client does not try to come into contact')
        self.connect(self.client.line)

    def exchange(self, twice=False):
        """Deliver all requests and answers; return whether there were any."""
        line = self.client.line
        if not line:
            return False
        count = self.deliver(line, 1000, twice) + len(line.runner.answers)
        gone = self.hear(line, 1000, twice)
        self.client.settle()
        return count or gone

    def until_it_sends(self, verb):
        """Deliver everything until a request with this verb waits for delivery."""
        for _ in range(100):
            self.client.line.read()
            if any(fields[0] == verb for fields, _ in self.client.line.requests):
                return
            self.exchange()
        raise AssertionError(f'the client does not send {verb}')

    def until_it_says(self, line, word):
        """Wait until an answer with this word waits for delivery; others may come before it.

        Some answers come late: the machine looks for its Python, for example, in the background.
        """
        self.until(lambda: any(f'{word}\t'.encode() in answer for answer in line.runner.answers),
                   f'an answer "{word}"')

    def finish(self):
        """Run the batch without further faults until nothing is left to do."""
        self.take_room(False)
        for _ in range(8):
            until = time.monotonic() + LIMIT_S
            while self.client.lives:
                assert time.monotonic() < until, 'the batch does not come to its end'
                self.come_into_contact()
                for job in self.running():
                    self.end_job(*job, 0)
                if self.client.lives and not self.exchange():
                    self.now += 1
                    self.look(20)
                    self.client.settle()
                self.check_ends()
            known = self.journal
            if all(known[name] and known[name][-1]['event'] == 'collected' for name in self.names):
                break
            self.run_again()
        self.run_again()
        assert not self.client.lives, 'all is done, and yet it does something'
        self.client_ends()
        for line in self.lines:         # requests that were delayed until now arrive, too
            self.deliver(line, 1000)
            if line.runner and not line.runner.process.stdin.closed:
                line.runner.close()

    @property
    def names(self):
        return [f'batch.sh.{number}' for number, _ in enumerate(self.kinds, 1)]

    def check_ends(self):
        """Assert that each job whose end is in the journal has ended."""
        self.note_cancelled()
        for name, events in self.journal.items():
            if events[-1]['event'] in ('ended', 'collected'):
                number = [entry['attempt'] for entry in events if entry['event'] == 'claimed'][-1]
                assert self.attempts[name][number].over, f'{name} {number} has not ended'

    def check_starts(self):
        """Assert that each job whose start was printed has started."""
        for line in self.client.out.getvalue().splitlines() if self.client else ():
            name = line.partition(': ')[2].partition(';')[0]
            assert not line.startswith('started: ') or self.attempts[name], line

    def check_streams(self):
        """Assert that each output fetched so far is the beginning of the output of an attempt."""
        for name, kind in zip(self.names, self.kinds):
            path = self.project / f'job_results/{name}.out'
            here = path.read_text() if path.exists() else ''
            assert not here or any(written(kind, name, number, True).startswith(here)
                                   for number in self.attempts[name]), f'{path} is {here!r}'

    def check(self):
        """Compare the notes of the jobs, the journal, the report and the results."""
        journal, reported = self.journal, ledgers.read_report(self.reports, again=True)
        ledger = self.folder / 'ledger'
        ledger.write_text(''.join(f'{line}\n' for line in self.ledger))
        runs = ledgers.read_ledgers({'localhost': ledger})
        wrong = []
        for name, kind in zip(self.names, self.kinds):
            events = journal[name]
            number = [entry['attempt'] for entry in events if entry['event'] == 'claimed'][-1]
            code = [entry['exit_code'] for entry in events if entry['event'] == 'ended'][-1]
            said = 'failed' if code else 'finished'
            wrong += ledgers.check_runs(name, runs[name], events, True)
            wrong += ledgers.check_journal(name, runs[name], events, said)
            if reported[name] not in (said, 'skipped'):
                wrong.append(f'{name} is reported {reported[name]}, and is {said}')
            attempt = self.attempts[name][number]
            if code != (137 if attempt.broken else attempt.status):
                wrong.append(f'{name} {number} ended with {attempt.status}, and not with {code}')
            out, made = (Path('job_results', name + end) for end in ('.out', ''))
            if out.read_text() != written(kind, name, number, attempt.ended):
                wrong.append(f'{out} is not what {name} {number} has written')
            # If an attempt cannot record its end, the list of sent files is lost: all are fetched.
            files = {'batch.sh'} if attempt.broken else set()
            if kind == 'files':
                files |= {f'made by {number}', *(f'{n}-of-many-files' for n in range(10, 100))}
            if {path.name for path in made.iterdir()} != files:
                wrong.append(f'{made} is not what {name} {number} has made')
        if self.finished:       # else its last runner was killed, and the next batch tidies up
            wrong += [f'{path} was not removed over there' for path in (
                *self.home.glob('.ssh_scheduler/*'), *self.folder.glob('shared/*'))]
        assert not wrong, '\n'.join(wrong)


# ---- All events, in any order ----

few = st.integers(1, 6)
index = st.integers(0, 9)


class Protocol(RuleBasedStateMachine):
    """Each rule is one thing that happens; teardown lets the batch end, and checks the outcome."""

    def __init__(self):
        super().__init__()
        self.world = World()

    @property
    def client(self):
        return self.world.client

    @initialize(kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3),
                so_far=st.sampled_from(['begun', 'ready', 'starting', 'starting', 'running',
                                        'running']),
                twice=st.booleans(), taken=st.sampled_from([False, False, True]))
    def begin(self, kinds, so_far, twice, taken):
        self.world.write_batch(kinds)
        self.world.start_client()
        if so_far != 'begun':
            self.world.come_into_contact()
            self.world.exchange()
        if so_far in ('starting', 'running'):
            self.world.until_it_sends('start')
        self.world.take_room(taken)
        if so_far == 'running':
            for _ in range(2):
                self.world.exchange(twice)

    # The channel

    @rule()
    def connect(self):
        self.world.come_into_contact()

    @rule(rounds=few, twice=st.booleans())
    def all_is_said_for_a_while(self, rounds, twice):
        self.world.come_into_contact()
        for _ in range(rounds):
            self.world.exchange(twice)

    @rule(count=few, twice=st.booleans())
    def requests_arrive(self, count, twice):
        if self.client.line:
            self.world.deliver(self.client.line, count, twice)

    @rule(back=st.integers(1, 3), count=few, torn=st.none() | st.integers(1, 60))
    def late_requests_arrive(self, back, count, torn):
        """Deliver requests on a connection that the client has lost; torn: cut the last one."""
        lines = [line for line in self.world.lines if not line.is_open and line.runner]
        if lines[-back:]:
            line = lines[-back:][0]
            self.world.deliver(line, count)
            if torn is not None and not line.runner.process.stdin.closed:
                if line.requests:
                    line.runner.write(line.requests.popleft()[1][:-torn])
                line.requests.clear()
                line.runner.close()

    @rule(count=few, twice=st.booleans())
    def answers_arrive(self, count, twice):
        if self.client.line:
            self.world.hear(self.client.line, count, twice)
            self.client.settle()

    @rule(back=st.integers(1, 20))
    def an_answer_arrives_again(self, back):
        """Repeat the last answer or an older one, of this connection or of an earlier one."""
        if self.client.line and self.world.heard:
            self.client.line.hear(self.world.heard[-back:][0])
            self.client.settle()

    @rule(back=st.integers(1, 3), count=few)
    def late_answers_arrive(self, back, count):
        """Deliver answers on a connection that has ended for the client."""
        lines = [line for line in self.client.lines if not line.is_open and line.runner]
        if self.client.lives and lines[-back:]:
            self.world.hear(lines[-back:][0], count)
            self.client.settle()

    @rule(torn=st.integers(0, 200))
    def the_connection_breaks(self, torn):
        """Requests under way may still reach the runner; the client may get part of an answer."""
        line = self.client.line
        if line:
            line.read()
            if torn and line.runner and line.runner.answers:
                line.hear(line.runner.answers[0][:-torn])
            line.end(255)
            self.client.settle()

    @rule(seconds=st.sampled_from([0.5, 3, 30, 100]))
    def time_passes(self, seconds):
        self.world.now += seconds
        if self.client.lives:
            self.client.settle()

    # The machine

    @rule(index=index, code=st.sampled_from([0, 0, 3]))
    def a_job_ends(self, index, code):
        running = self.world.running()
        if running:
            self.world.end_job(*running[index % len(running)], code)

    @rule(index=index, how=st.sampled_from(['command', 'wrapper', 'group']))
    def a_job_is_killed(self, index, how):
        running = [job for job in self.world.running() if not job[2].broken]
        if running:
            self.world.break_job(*running[index % len(running)], how)

    @rule(taken=st.booleans())
    def another_batch_takes_or_leaves_the_room(self, taken):
        self.world.take_room(taken)

    @rule()
    def the_remote_runner_is_killed(self):
        line = self.client.line
        if line and line.runner:
            line.runner.kill()

    @rule()
    def the_machine_is_restarted(self):
        self.world.reboot()

    # Other commands

    @rule(index=index, action=st.sampled_from(['cancel', 'cancel', 'rerun']))
    def something_is_asked(self, index, action):
        names = self.world.names
        self.world.ask(action, names[index % len(names)])

    # The client

    # No preconditions: whether a client lives depends on real processes, and Hypothesis must be
    # able to repeat what it chose.

    @rule(count=st.integers(0, 3))
    def the_client_is_killed(self, count):
        """Kill the client, right after this many answers have arrived."""
        if count and self.client.line:
            self.world.hear(self.client.line, count)
            self.client.turn()
        self.world.client_ends()

    @rule(kinds=st.lists(st.sampled_from(KINDS), max_size=1))
    def the_batch_is_run_again(self, kinds):
        if not self.client.lives:
            self.world.write_batch(kinds)
            self.world.run_again()

    # At any time

    @invariant()
    def jobs_run_once(self):
        self.world.look()
        self.world.check_ends()

    @invariant()
    def what_is_known_of_jobs_is_so(self):
        self.world.check_starts()
        self.world.check_streams()

    # The end

    def teardown(self):
        try:
            if not sys.exc_info()[1] and self.client:
                self.world.finish()
                self.world.check()
        finally:
            self.world.close()


EXAMPLES = os.environ.get('PROTOCOL_EXAMPLES')      # run this many random examples


@pytest.mark.timeout(0 if EXAMPLES else 900)    # many examples, each with a dozen processes
def test_no_fault_of_the_channel_makes_a_job_run_twice_or_loses_a_result():
    run_state_machine_as_test(Protocol, settings=settings(
        max_examples=int(EXAMPLES or 30), stateful_step_count=20, derandomize=not EXAMPLES,
        deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True,
        phases=[Phase.generate, *([Phase.shrink] if EXAMPLES else [])]))


# ---- Faults that such examples found, or could have found ----

@pytest.fixture
def world():
    made = World()
    yield made
    made.close()


def begin(world, *kinds):
    """Begin a batch of such jobs, and wait until some run."""
    world.write_batch(list(kinds))
    world.start_client()
    while not world.running():
        world.come_into_contact()
        world.exchange()


def test_a_list_is_taken_once_and_when_it_was_asked_for(world):
    """Empty lists that nobody asked for arrive while the job runs, and after the right list."""
    begin(world, 'files')
    line = world.client.line
    key = s.ResultStore('job_results').peek().journal.key('batch.sh.1', 1)
    unasked = f'data\t0\tback\t{key}\n'.encode()
    line.hear(unasked)
    world.client.settle()
    world.end_job(*world.running()[0], 0)
    world.until_it_says(line, 'ended')
    world.hear(line, 1000, twice=True)      # its end counts once, too
    world.client.settle()
    world.deliver(line, 1000)               # "list"
    world.until_it_says(line, 'data')
    line.runner.answers.append(unasked)
    world.hear(line, 1000, twice=True)
    world.client.settle()
    assert world.journal['batch.sh.1'][-1]['event'] == 'collected'
    world.finish()
    world.check()


def test_what_a_stream_grew_by_is_taken_once(world):
    begin(world, 'long')
    line = world.client.line
    world.now += s.REFRESH_S + 1
    world.client.settle()
    world.deliver(line, 1000)               # "watch"
    world.until_it_says(line, 'data')
    world.hear(line, 1000, twice=True)
    world.client.settle()
    assert Path('job_results/batch.sh.1.out').stat().st_size == 1500
    world.check_streams()
    world.finish()
    world.check()


@pytest.mark.parametrize('answer', [b'data\t1\tback\n.', b'data\t1\tgrowth\tbatch.sh.1.1\n.',
                                    b'ended\tbatch.sh.1.1\n', b'data\t0\tgrowth\n'])
def test_an_answer_from_which_something_is_missing_breaks_off(world, answer):
    begin(world, 'long')
    key = s.ResultStore('job_results').peek().journal.key('batch.sh.1', 1)
    world.client.line.hear(answer.replace(b'batch.sh.1.1', key.encode()))
    world.client.settle()
    world.finish()
    world.check()


def test_that_a_job_never_began_is_said_again_where_that_was_lost(world):
    world.write_batch(['short'])
    world.start_client()
    world.come_into_contact()
    world.exchange()                        # its start is on the way, and never arrives
    for _ in range(2):
        world.client.line.end(255)
        world.client.settle()
        world.come_into_contact()
        world.exchange()
        world.deliver(world.client.line, 1000)          # "adopt"; its answer does not arrive
    world.finish()
    world.check()
    assert list(world.attempts['batch.sh.1']) == [2]


@pytest.mark.parametrize('how', ['command', 'wrapper', 'group'])
def test_what_a_killed_job_made_comes_back(world, how):
    begin(world, 'files', 'files', 'files')
    world.break_job(*world.running()[0], how)
    world.finish()
    world.check()


def test_a_machine_that_takes_leave_unasked_is_none_that_has_finished(world):
    begin(world, *['short'] * 9)
    world.client.line.hear(b'finished\n')
    world.client.settle()
    world.finish()
    world.check()


def test_what_is_removed_while_it_is_said_is_said_whole(world):
    """When the last job ends, the runner may remove all files while the writer sends one."""
    program = world.folder / 'bin/stat'
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\n{rig.program("stat")} "$@"\n'
                       'case "$*" in *%n*) exit ;; esac     # of the files that a watch looks at\n'
                       f'rm -f {world.home}/.ssh_scheduler/*/run.*/chunk.*\n')
    program.chmod(0o755)
    world.env['PATH'] = f'{program.parent}:{world.env["PATH"]}'
    begin(world, 'long')
    world.now += s.REFRESH_S + 1
    world.client.settle()
    line = world.client.line
    world.deliver(line, 1000)           # "watch"
    world.until_it_says(line, 'data')
    world.finish()
    world.check()


def break_and_connect(world):
    world.client.line.end(255)
    world.client.settle()
    world.come_into_contact()


def test_a_start_that_arrives_after_it_was_asked_about_never_begins(world):
    """The runner is on another computer with the same home, so no process here can kill it."""
    world.write_batch(['short'])
    world.start_client()
    world.come_into_contact()
    world.until_it_sends('start')
    line = world.client.line
    (folder,) = world.home.glob('.ssh_scheduler/*/run.*')
    folder.rename(folder.with_name('run.elsewhere.1.1'))
    break_and_connect(world)
    while not world.running():
        world.exchange()
        world.now += 1
    world.deliver(line, 1000)
    world.finish()
    world.finished = False              # the folder of the other runner stays
    world.check()
    assert list(world.attempts['batch.sh.1']) == [2]


def test_how_a_job_ended_is_recorded_before_it_is_said(world):
    """The process that would report the end is killed while it measures the output."""
    program, victim = world.folder / 'bin/stat', world.folder / 'victim'
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncase "$*" in "-c %s -- "*.out) kill -9 $(cat {victim});; esac\n'
                       f'exec {rig.program("stat")} "$@"\n')
    program.chmod(0o755)
    world.env['PATH'] = f'{program.parent}:{world.env["PATH"]}'
    begin(world, 'long')
    (name, number, attempt), = world.running()
    victim.write_text(str(attempt.worker))
    world.end_job(name, number, attempt, 3)
    assert attempt.status == 3
    break_and_connect(world)
    world.finish()
    world.check()


def test_that_a_job_is_lost_is_said_again_where_that_was_lost(world):
    begin(world, 'short')
    world.reboot()
    for _ in range(2):
        break_and_connect(world)
        world.exchange()
        world.until_it_sends('adopt')
        world.deliver(world.client.line, 1000)          # its answer does not arrive
    world.finish()
    world.check()
    assert list(world.attempts['batch.sh.1']) == [1, 2]


def test_nothing_is_believed_that_a_contact_says_when_it_is_over(world):
    """The old contact's answer that the machine is ready must not count for the next contact."""
    begin(world, 'short')
    break_and_connect(world)
    former = world.client.line
    world.deliver(former, 1000)             # "probe", which is answered
    world.now += s.CONNECT_LIMIT_S
    world.client.settle()
    assert not former.is_open
    world.come_into_contact()
    world.hear(former, 1000)
    world.client.settle()
    line = world.client.line
    assert world.exchange() and world.exchange() and world.client.line is line
    world.finish()
    world.check()


def test_a_job_that_finds_no_room_waits(world):
    world.write_batch(['short'])
    world.start_client()
    world.come_into_contact()
    world.until_it_sends('start')
    world.take_room(True)
    for _ in range(3):
        world.exchange()
    assert 'started' not in world.client.out.getvalue() and not world.running()
    world.finish()
    world.check()
    assert list(world.attempts['batch.sh.1']) == [2]
