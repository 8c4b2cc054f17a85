"""Faults of machines, networks, disks and of the program itself, each named by its number.

The numbers are those of the matrix of faults.  After each of them, no job has run twice, no result
is partial or was replaced, and what is reported is true: check_exactly_once() compares it all.
Rows that other files hold:

    1, 2, 4, 5  also test_crashes.py, at each point of the program's life
    3           test_interrupt.py: a_job_survives_the_program_and_is_collected_once, and others
    18          test_logins.py
    22, 23      also test_runner_script.py: the_exit_status_is_told_and_recorded
    29          also test_interrupt.py: an_interrupt_ends_all_jobs, and others
    33 - 37     test_logins.py, test_copies.py, test_archive.py, test_live.py
    39          also test_results.py: what_exists_is_seen_and_stays
    40          test_resources.py, test_runner_script.py
    43          also test_results.py: a_journal_torn_at_any_byte_forgets_no_whole_line

Keepalives, and the times after which the program tries again, are shortened.
"""
import json
import os
import re
import signal
from pathlib import Path

import pytest
import rig
from batching import NO_GPU, RESULTS, Batches, assert_clean, wait_until, wrote
from ledgers import check_exactly_once, ledger_line

PROGRAM = Path(__file__).with_name('crash.py')
IMPATIENT = {'CRASH_SETTINGS': json.dumps({
    'RETRY_S': 0.3, 'LONGEST_RETRY_S': 1.0, 'ASIDE_S': 1.0, 'BEAT_S': 0.5, 'SILENCE_LIMIT_S': 4.0,
    'REFRESH_S': 0.5})}
QUICK = {'ServerAliveInterval': 1, 'ServerAliveCountMax': 2, 'ConnectTimeout': 2}


def quick(machine, options=None, **extra):
    """The machine's file, with keepalives that notice a loss within 3 s."""
    known = {'UserKnownHostsFile': str(machine.known_hosts)}
    return machine.yaml(ssh_options={**known, **(QUICK if options is None else options)}, **extra)


@pytest.fixture
def scheduler():
    return PROGRAM


@pytest.fixture
def batches(run_cli, start_cli, project):
    return Batches(run_cli, start_cli, env=IMPATIENT)


class Watched:
    """A batch under way, of which also stderr can be waited for."""

    def __init__(self, follower, errors):
        self.follower, self.process, self._errors = follower, follower.process, errors
        self.until = follower.until

    def complains(self, text):
        wait_until(lambda: text in self._errors.read_text() or self.process.poll() is not None,
                   f'{text}, but {self._errors.read_text()}')
        assert text in self._errors.read_text()

    def stopped(self):
        """Wait until it has stopped itself; see CRASH_SIGNAL."""
        wait_until(lambda: rig.parent_and_state(self.process.pid)[1] == 'T', 'it has stopped')

    def go_on(self):
        self.process.send_signal(signal.SIGCONT)

    def kill(self):
        self.process.kill()
        return self.end()

    def end(self):
        done = self.follower.end()
        done.stderr = self._errors.read_text()
        assert 'Traceback' not in done.stderr, done.stderr
        return done


@pytest.fixture
def watch(batches, tmp_path):
    """Start batches: watch(lines, machines, *options, crash='after ...')."""
    count = 0

    def start(lines, machines, *options, crash=None, with_signal='SIGKILL', after=None):
        nonlocal count
        count += 1
        env = {**IMPATIENT, **({'CRASH_WHEN': crash, 'CRASH_SIGNAL': with_signal} if crash else {}),
               **({'CRASH_AFTER': str(after)} if after else {})}
        errors = tmp_path / f'stderr.{count}'
        with open(errors, 'w') as file:
            follower = batches.start(lines, machines, *NO_GPU, *options, env=env, stderr=file)
        return Watched(follower, errors)

    return start


@pytest.fixture
def run(watch):
    """Run a batch to its end."""
    return lambda *args, **settings: watch(*args, **settings).end()


def once(machines, *runs, jobs, **settings):
    names = [f'batch.sh.{n}' for n in range(1, jobs + 1)]
    check_exactly_once(machines, RESULTS, [done.stdout for done in runs], jobs=names, **settings)


def has_begun(machine, job='batch.sh.1', attempt=1):
    wrote(machine.ledger, f'{job} {attempt} start')


def waiting(gate, name='a', then='true'):
    """A line whose job waits at a gate."""
    return ledger_line(f'{gate.wait(name)}; {then}')


def master_of(machine):
    """The pid of the ssh that is the channel to it."""
    found = [pid for pid in rig.pids() if re.match(r'ssh -F \S+ -T -- ', rig.cmdline(pid))
             and rig.cmdline(pid).split()[5] == machine.address]
    assert len(found) == 1, found
    return found[0]


# ---- The program dies ----

def test_01_killed_between_journal_and_launch(lab, run):
    machine = lab()
    lines = [ledger_line('echo 1')]
    first = run(lines, [machine], crash='after write to journal.*"claimed"')
    assert first.returncode == -signal.SIGKILL and machine.ledger.read_text() == ''
    last = run(lines, [machine])
    assert last.returncode == 0
    once([machine], first, last, jobs=1)
    assert_clean(machine)


def test_02_killed_after_the_claim_over_there_before_its_reply(lab, run):
    machine = lab()
    lines = [ledger_line('echo 1')]
    first = run(lines, [machine], crash='after write to pipe.*echo 1', after=machine.ledger)
    assert first.returncode == -signal.SIGKILL and 'started' not in first.stdout
    last = run(lines, [machine])
    assert last.returncode == 0
    once([machine], first, last, jobs=1)
    assert_clean(machine)


def test_03_killed_while_a_job_runs(lab, watch, gate):
    machine = lab()
    batch = watch([waiting(gate)], [machine])
    has_begun(machine)
    first = batch.kill()
    batch = watch(None, [machine])
    batch.until('started: batch.sh.1')
    gate.open('a')
    last = batch.end()
    assert last.returncode == 0
    once([machine], first, last, jobs=1)
    assert_clean(machine)


@pytest.mark.parametrize('tools', ['rsync', 'tar'])
def test_04_killed_during_a_fetch(lab, run, tools):
    machine = lab(leave_out=() if tools == 'rsync' else ('rsync',))
    lines = [ledger_line('head -c 3000000 /dev/urandom >big')]
    first = run(lines, [machine], crash=r"after start .*(jobs/'|-T', '--', 'ssh-scheduler-copy)")
    assert first.returncode == -signal.SIGKILL and not (RESULTS / 'batch.sh.1').exists()
    last = run(lines, [machine])
    assert last.returncode == 0
    assert (RESULTS / 'batch.sh.1/big').stat().st_size == 3_000_000
    once([machine], first, last, jobs=1)
    assert not [*RESULTS.glob('.ssh_scheduler/incoming*')]
    assert_clean(machine)


def test_05_killed_after_the_commit_before_it_is_noted(lab, run):
    machine = lab()
    lines = [ledger_line('echo 1')]
    first = run(lines, [machine], crash='before write to journal.*"collected"')
    assert first.returncode == -signal.SIGKILL
    before = (RESULTS / 'batch.sh.1').stat()
    last = run(lines, [machine])
    assert last.returncode == 0 and 'already exists for line 1' in last.stdout
    assert (RESULTS / 'batch.sh.1').stat() == before
    once([machine], first, last, jobs=1)


# ---- The network ----

def test_06_a_cut_that_is_shorter_than_the_keepalive_is_not_noticed(host, watch, gate, outside):
    machine = host(sees=(outside,))
    batch = watch([waiting(gate)], [quick(machine, {'ServerAliveInterval': 1,
                                                   'ServerAliveCountMax': 20})])
    has_begun(machine)
    machine.cut()
    wait_until(lambda: machine.link.filtered() >= 3, 'packets that are dropped')
    machine.restore()
    gate.open('a')
    done = batch.end()
    assert (done.returncode, 'contact' in done.stderr, machine.logins()) == (0, False, 1)
    once([machine], done, jobs=1)


def test_07_a_cut_that_is_longer_than_the_keepalive(host, watch, gate, outside):
    machine = host(sees=(outside,))
    batch = watch([waiting(gate, then='exit 7'), waiting(gate, 'b')], [quick(machine)])
    has_begun(machine)
    has_begun(machine, 'batch.sh.2')
    machine.cut()
    batch.complains('lost contact (2 jobs go on there)')
    gate.open('a')
    machine.restore()
    batch.complains('in contact again')
    gate.open('b')
    done = batch.end()
    assert done.returncode == 1 and 'batch.sh.1: exit code 7' in done.stdout
    once([machine], done, jobs=2)
    assert_clean(machine)


def test_08_a_cut_for_ever(hosts, watch, gate):
    dead, alive = hosts
    lines = [ledger_line('while [ ! -e ~/go ]; do sleep 0.1; done')] * 2 + [ledger_line('echo')] * 4
    batch = watch(lines, [quick(dead, max_jobs=2), quick(alive, max_jobs=2)], '--away-limit=3')
    wait_until(lambda: all(host.ledger.read_text().count('start') for host in hosts), 'a job each')
    (dead.home / 'go').touch()
    (alive.home / 'go').touch()
    wait_until(lambda: dead.ledger.read_text().count('start'), 'a job')
    dead.cut()
    first = batch.end()
    if first.returncode:        # else all of its jobs had ended before
        assert 'run the same command again' in first.stdout and dead.name in first.stderr
    dead.restore()
    last = watch(lines, [quick(dead), quick(alive)]).end()
    assert last.returncode == 0, last.stderr
    once(hosts, first, last, jobs=6)


@pytest.mark.parametrize('fault', ['cut', 'drop_replies', 'drop_requests', 'reject'])
def test_09_10_the_network_fails_at_the_launch(host, watch, fault):
    machine = host()
    batch = watch([ledger_line('echo 1'), ledger_line('echo 2')], [quick(machine)],
                  crash=r'before write to pipe.*start\\x00', with_signal='SIGSTOP')
    batch.stopped()
    getattr(machine, fault)()
    batch.go_on()
    if fault == 'drop_replies':
        has_begun(machine)
    batch.complains('lost contact')
    machine.restore()
    done = batch.end()
    assert done.returncode == 0, done.stderr
    once([machine], done, jobs=2)
    assert_clean(machine)


def test_11_all_connections_are_reset(host, watch, gate, outside, project):
    (project / 'data').write_bytes(bytes(500_000))
    machine = host(sees=(outside,))
    batch = watch([waiting(gate), *[ledger_line('wc -c <data')] * 3],
                  [quick(machine, max_jobs=2)])
    has_begun(machine)
    machine.reset_connections()
    batch.complains('in contact again')
    gate.open('a')
    done = batch.end()
    assert done.returncode == 0, done.stderr
    once([machine], done, jobs=4)
    assert_clean(machine, cache=True)


# ---- ssh ----

def test_12_a_listener_that_hangs(hosts, watch):
    hangs, works = hosts
    hangs.freeze_listener()
    done = watch([ledger_line('echo 1')] * 3, [quick(hangs), quick(works)]).end()
    assert done.returncode == 0, done.stderr
    assert hangs.ledger.read_text() == ''
    once(hosts, done, jobs=3)
    hangs.thaw()


@pytest.mark.parametrize('what', ['session', 'master'])
def test_13_a_session_or_master_that_hangs(host, watch, gate, outside, what):
    machine = host(sees=(outside,))
    batch = watch([waiting(gate)], [quick(machine)])
    has_begun(machine)
    if what == 'session':
        machine.freeze_sessions()
    else:
        os.kill(master_of(machine), signal.SIGSTOP)
    batch.complains('in contact again')
    gate.open('a')
    done = batch.end()
    assert done.returncode == 0, done.stderr
    once([machine], done, jobs=1)
    if what == 'session':
        machine.thaw()


def test_14_a_master_that_is_killed_with_copies_on_their_way(host, watch, gate, outside, project):
    (project / 'data').write_bytes(os.urandom(2_000_000))
    machine = host(sees=(outside,))
    lines = [waiting(gate, name, 'cp data made') for name in 'abcde']
    batch = watch(lines, [quick(machine, max_jobs=5)])
    for number in range(1, 6):
        has_begun(machine, f'batch.sh.{number}')
    machine.slow(500_000)
    for name in 'abcde':
        gate.open(name)
    wait_until(lambda: [*RESULTS.glob('.ssh_scheduler/incoming*/*')], 'results on their way')
    rig.kill(master_of(machine), lambda pid: True)
    batch.complains('in contact again')
    machine.restore()
    done = batch.end()
    assert done.returncode == 0, done.stderr
    once([machine], done, jobs=5)
    assert machine.logins() == 2
    assert all((RESULTS / f'batch.sh.{n}/made').stat().st_size == 2_000_000 for n in range(1, 6))
    assert_clean(machine, cache=True)


def test_15_what_a_killed_run_left_here_is_in_nobodys_way(lab, watch, gate, client_home):
    machine = lab()
    batch = watch([waiting(gate)], [machine])
    has_begun(machine)
    first = batch.kill()
    assert [*(client_home / 'tmp').iterdir()]
    gate.open('a')
    last = watch(None, [machine]).end()
    assert last.returncode == 0
    once([machine], first, last, jobs=1)


@pytest.mark.parametrize('sessions', [1, 2])
def test_16_few_sessions(lab, run, project, sessions):
    (project / 'data').write_bytes(os.urandom(400_000))
    machine = lab(sshd_options=f'MaxSessions {sessions}')
    lines = [ledger_line(f'cp data made; head -c {n}00000 /dev/zero | tr "\\0" x; echo')
             for n in range(4)]
    done = run(lines, [machine])
    assert done.returncode == 0, done.stderr
    once([machine], done, jobs=4)
    assert machine.logins() <= 10


def test_17_few_logins_at_a_time(lab, run):
    machines = [lab(sshd_options='MaxStartups 1:100:1') for _ in range(2)]
    done = run([ledger_line(f'echo {n}') for n in range(20)], machines)
    assert done.returncode == 0, done.stderr
    once(machines, done, jobs=20)
    assert all(machine.logins() == 1 for machine in machines)


def test_19_sshd_is_stopped_and_started(lab, watch, gate):
    machine = lab()
    batch = watch([waiting(gate), ledger_line('echo two')], [machine], '--reserve')
    has_begun(machine)
    machine.stop()
    batch.complains('lost contact (1 job goes on there)')
    gate.open('a')
    machine.start()
    done = batch.end()
    assert done.returncode == 0, done.stderr
    assert 'in contact again' in done.stderr
    once([machine], done, jobs=2)
    assert_clean(machine)
