"""Faults of machines, networks, disks and of the program itself, each named by its number.

The numbers are those of the matrix of faults.  After each of them, no job has run twice, no result
is partial or was replaced, and what is reported is true: check_exactly_once() compares it all.
Each row is a test with its number in its name, in this file or in test_faults_data.py.  More of
them, by other names:

    1, 2, 4, 5  also test_crashes.py, at each point of the program's life
    3           also test_interrupt.py: a_job_survives_the_program_and_is_collected_once
    18          test_faults_data.py: 18_a_refused_login_is_one_line_and_one_attempt,
                18_a_key_that_cannot_be_used_is_one_line_and_no_attempt;
                also test_logins.py: an_unreachable_machine_is_one_line_and_the_others_go_on
    22, 23      also test_runner_script.py: the_exit_status_is_told_and_recorded
    29          also test_interrupt.py: an_interrupt_ends_all_jobs
    33          test_faults_data.py: 33_a_login_that_does_odd_things_works,
                33_a_login_that_cannot_work_is_one_precise_line,
                33_noise_that_begins_later_makes_rsync_fall_back_to_tar;
                also test_logins.py: start_files_that_print, an_account_for_sftp_only
    34          test_faults_data.py: 34_without_a_proper_rsync_the_result_is_the_same
    35          test_faults_data.py: 35_a_hostile_rsync_writes_nothing_outside,
                35_a_hostile_rsync_gives_no_rights_and_no_devices,
                35_an_rsync_with_a_hole_is_confined, 35_a_hostile_tar_writes_nothing_outside,
                35_five_thousand_files_come;
                test_hostile.py: a_terabyte_that_is_none_does_not_fill_the_disk_here, and
                a_confined_process_writes_nowhere_else;
                also test_archive.py: no_sequence_of_members_writes_outside
    36          test_faults_data.py: 36_whatever_a_runner_says_memory_is_bounded,
                36_a_login_that_says_a_line_without_an_end, 36_words_that_look_like_something_else,
                36_a_job_that_says_a_line_without_an_end;
                test_logins.py: noise_that_looks_like_events
    37          test_faults_data.py: 37_names_of_any_bytes_go_and_come;
                also test_copies.py: a_nasty_tree_goes_and_comes_byte_for_byte, also on localhost
    39          also test_results.py: what_exists_is_seen_and_stays
    40          test_faults_data.py: 40_no_nvidia_smi_holds_a_query_up,
                40_gpu_jobs_begin_only_where_the_gpus_are_known,
                40_a_machine_whose_nvidia_smi_hangs_has_no_gpu_and_other_jobs_run;
                also test_resources.py: why_there_is_no_gpu, the_modes_of_a_card
    43          also test_results.py: a_journal_torn_at_any_byte_forgets_no_whole_line

Keepalives, and the times after which the program tries again, are shortened.
"""
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rig
from batching import (
    NO_GPU,
    RESULTS,
    Batches,
    assert_clean,
    constants,
    result,
    wait_until,
    wrote,
)
from ledgers import check_exactly_once, ledger_line

PROGRAM = Path(__file__).with_name('crash.py')
QUICK = {'ServerAliveInterval': 1, 'ServerAliveCountMax': 2, 'ConnectTimeout': 2}


def impatient(**more):
    """Return an environment that shortens the program's times.

    But each machine may take its time to answer, before the first one gets a job.
    """
    return constants(**{'RETRY_S': 0.3, 'LONGEST_RETRY_S': 1.0, 'ASIDE_S': 1.0, 'BEAT_S': 0.5,
                        'SILENCE_LIMIT_S': 30.0, 'REFRESH_S': 0.5, 'LATECOMER_S': 30.0, **more})


IMPATIENT = impatient()


def quick(machine, options=None, **extra):
    """Write the machine's file, with keepalives that notice a loss within 3 s."""
    known = {'UserKnownHostsFile': str(machine.known_hosts)}
    return machine.yaml(ssh_options={**known, **(QUICK if options is None else options)}, **extra)


@pytest.fixture
def scheduler():
    return PROGRAM


@pytest.fixture
def batches(run_cli, start_cli, project):
    return Batches(run_cli, start_cli, env=IMPATIENT)


class Watched:
    """A running batch whose stderr can be waited for, too."""

    def __init__(self, follower, errors):
        self.follower, self.process, self._errors = follower, follower.process, errors
        self.until = follower.until

    def complains(self, text):
        wait_until(lambda: text in self._errors.read_text() or self.process.poll() is not None,
                   f'{text}, but {self._errors.read_text()}')
        assert text in self._errors.read_text()

    def stopped(self):
        """Wait until the program has stopped itself; see CRASH_SIGNAL."""
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
    """Start batches: watch(lines, machines, *options, crash='after ...').

    times: of the program, instead of those of impatient()
    """
    count = 0

    def start(lines, machines, *options, crash=None, with_signal='SIGKILL', after=None,
              times=None):
        nonlocal count
        count += 1
        env = {**impatient(**times or {}),
               **({'CRASH_WHEN': crash, 'CRASH_SIGNAL': with_signal} if crash else {}),
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


def waiting_once(gate, outside):
    """A line whose job waits at a gate, unless it is started again; see begun_once()."""
    return ledger_line(f'[ -e {outside}/go ] || {{ echo >{outside}/waits; {gate.wait("a")}; }}')


def begun_once(outside):
    """Wait until the job of waiting_once() waits, and let its next start pass."""
    wait_until((outside / 'waits').exists, 'the first start')
    (outside / 'go').touch()


def master_of(machine):
    """Return the pid of the ssh that is the channel to the machine."""
    found = [pid for pid in rig.pids() if re.match(
        rf'ssh -F \S+ -T -- {re.escape(machine.address)}( |$)', rig.cmdline(pid))]
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
    batch.until('running: batch.sh.1')
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
    run([*lines, 'true'], [machine])        # the new line makes the client connect
    assert_clean(machine, cache=True)


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
    assert (done.returncode, 'connection lost' in done.stderr, machine.logins()) == (0, False, 1)
    once([machine], done, jobs=1)


def test_07_a_cut_that_is_longer_than_the_keepalive(host, watch, gate, outside):
    machine = host(sees=(outside,))
    batch = watch([waiting(gate, then='exit 7'), waiting(gate, 'b')], [quick(machine)])
    has_begun(machine)
    has_begun(machine, 'batch.sh.2')
    machine.cut()
    batch.complains('connection lost (2 jobs keep running)')
    gate.open('a')
    machine.restore()
    batch.complains('connected again')
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
    if first.returncode:        # else the jobs of `dead` had ended before the cut
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
    batch.complains('connection lost')
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
    batch.complains('connected again')
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
    batch = watch([waiting(gate)], [quick(machine)], times={'SILENCE_LIMIT_S': 4.0})
    has_begun(machine)
    if what == 'session':
        machine.freeze_sessions()
    else:
        os.kill(master_of(machine), signal.SIGSTOP)
    batch.complains('connected again')
    gate.open('a')
    done = batch.end()
    assert done.returncode == 0, done.stderr
    once([machine], done, jobs=1)
    if what == 'session':
        machine.thaw()


def test_14_a_master_that_is_killed_with_copies_on_their_way(host, watch, gate, outside):
    machine = host(sees=(outside,))
    # Not a copy of a file that is here: rsync would send next to nothing.
    lines = [waiting(gate, name, 'head -c 2000000 /dev/urandom >made') for name in 'abcde']
    batch = watch(lines, [machine.yaml(max_jobs=5)])        # whoever is slow is not lost
    for number in range(1, 6):
        has_begun(machine, f'batch.sh.{number}')
    machine.slow(500_000)
    for name in 'abcde':
        gate.open(name)
    wait_until(lambda: [*RESULTS.glob('.ssh_scheduler/incoming*/*')], 'results on their way')
    rig.kill(master_of(machine), lambda pid: True)
    batch.complains('connected again')
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


def test_17_a_login_that_is_refused_for_the_moment(lab, watch):
    """Another connection occupies the only slot for incomplete logins."""
    machine = lab(sshd_options='MaxStartups 1:100:1')
    with socket.create_connection((machine.address, machine.port)) as other:
        assert other.recv(100).startswith(b'SSH-')
        batch = watch([ledger_line(f'echo {n}') for n in range(20)], [machine])
        wait_until(lambda: 'drop connection' in machine.log.read_text(), 'a login is refused')
    done = batch.end()
    assert (done.returncode, done.stderr.count('cannot be used')) == (0, 0), done.stderr
    once([machine], done, jobs=20)


def test_19_sshd_is_stopped_and_started(lab, watch, gate):
    machine = lab()
    batch = watch([waiting(gate), ledger_line('echo two')], [machine], '--reserve')
    has_begun(machine)
    machine.stop()
    batch.complains('connection lost (1 job keeps running)')
    gate.open('a')
    machine.start()
    done = batch.end()
    assert done.returncode == 0, done.stderr
    assert 'connected again' in done.stderr
    once([machine], done, jobs=2)
    assert_clean(machine)


# ---- Faults on the machine ----

@pytest.mark.parametrize('retries', [0, 1])
def test_20_a_reboot(host, watch, gate, outside, retries):
    machine = host(sees=(outside,))
    batch = watch([waiting_once(gate, outside), ledger_line('echo 2')], [quick(machine)],
                  f'--retries={retries}')
    batch.until('finished: batch.sh.2')
    begun_once(outside)
    machine.reboot()
    done = batch.end()
    assert 'batch.sh.1: lost on' in done.stderr and 'the machine was restarted' in done.stderr
    assert ('failed: batch.sh.1;' in done.stdout, done.returncode) == (
        (False, 0) if retries else (True, 1))
    once([machine], done, jobs=2)
    assert machine.ledger.read_text().count('batch.sh.1 1 start') == 1
    assert_clean(machine)


def test_21_a_wrapper_that_is_killed(host, watch, gate, outside):
    machine = host(sees=(outside,))
    batch = watch([waiting(gate), waiting(gate, 'b')], [quick(machine)])
    for number in (1, 2):
        has_begun(machine, f'batch.sh.{number}')
        machine.kill_wrapper(f'batch.sh.{number}')
    gate.open('a')
    assert 'batch.sh.1' in batch.until('failed: ')          # after its last process has ended
    assert machine.job_processes('batch.sh.2')
    batch.process.send_signal(signal.SIGINT)
    done = batch.end()
    assert done.returncode == 130 and 'may still run on' not in done.stderr
    assert machine.job_processes('batch.sh.2') == []
    once([machine], done, jobs=0)


@pytest.mark.parametrize('command, code', [('exit 255', 255), ('kill -9 $$', 137),
                                           ('exec false', 1), ('kill -9 0', 137)])
def test_22_23_ends_that_look_like_a_lost_connection(lab1, run, command, code):
    done = run([f'echo x >made; {command}', 'true'], [lab1])
    assert done.returncode == 1 and (RESULTS / 'batch.sh.1/made').read_text() == 'x\n'
    assert f'batch.sh.1: exit code {code} on' in done.stdout
    assert 'connection lost' not in done.stderr
    again = run(None, [lab1])
    assert again.returncode == 1 and again.stdout.count('already exists') == 2
    assert f'batch.sh.1: exit code {code} on {lab1.yaml()}, in an earlier run' in again.stdout


def test_24_a_pid_that_is_used_again(host, watch, gate, outside):
    machine = host(sees=(outside,))
    batch = watch([ledger_line(f'[ -e {outside}/go ] || {gate.wait("a")}')], [quick(machine)])
    has_begun(machine)
    first = batch.kill()
    wrapper = machine.wrapper('batch.sh.1')
    there = machine.pid_there(wrapper)
    jobs = machine.job_processes('batch.sh.1')
    for pid in (wrapper, *jobs):
        rig.kill(pid, lambda pid: True)
    wait_until(lambda: machine.run(f'kill -0 {there}').returncode, 'pid 1 has waited for it')
    machine.reuse_pid(there, 'setsid sleep 1000')
    (outside / 'go').touch()
    last = watch(None, [quick(machine)]).end()
    assert 'batch.sh.1: exit code 137 on' in last.stdout, last.stderr
    assert 'sleep 1000' in rig.cmdline(machine.pid_here(there))
    once([machine], first, last, jobs=1)


@pytest.mark.parametrize('record', [
    b'#starting -1 1 a work.1.1\n', b'#starting 1 1 a work.1.1\n', b'', b'\n', b'#ended\n',
    b'#ended x\n', b'#ended -1\n', b'#ended 99999999999999999999\n', bytes(range(256)) * 40000,
    b'#starting 2 ', b'#claimed 5 5 5\n', b'#ended 0 work.1/2\n', b'#ended 0 ../work.1\n'])
def test_25_a_damaged_record(host, watch, gate, outside, record):
    """No foreign process is killed, and no damaged record counts as a success."""
    machine = host(sees=(outside,))
    batch = watch([ledger_line(f'[ -e {outside}/go ] || {gate.wait("a")}')], [quick(machine)])
    has_begun(machine)
    first = batch.kill()
    file, = (path for path in machine.home.glob('.ssh_scheduler/*/jobs/batch.sh.1.1-*')
             if path.name.count('.') == 3)          # not the streams of the job
    machine.kill_wrapper('batch.sh.1')
    command, mark, _ = file.read_bytes().rpartition(b'#')
    assert mark
    file.write_bytes(command + record)
    foreign = machine.spawn('sleep 1000 </dev/null >/dev/null 2>&1')
    (outside / 'go').touch()
    last = watch(None, [quick(machine)]).end()
    assert 'sleep 1000' in rig.cmdline(machine.pid_here(foreign))
    once([machine], first, last, jobs=1)
    assert not machine.job_processes('batch.sh.1')
    assert 'batch.sh.1: lost on' in last.stderr and last.returncode == 0


def test_26_a_full_disk_over_there_before_it_begins(host, run):
    full, works = host(disk={'size': 1 << 20}), host()
    full.fill_disk()
    done = run([ledger_line('echo')] * 3, [quick(full), quick(works)])
    assert done.returncode == 0, done.stderr
    assert 'cannot write there' in done.stderr and 'No space left on device' in done.stderr
    once([full, works], done, jobs=3)


def test_26_a_disk_over_there_that_is_full_when_jobs_begin(host, watch, gate, outside):
    full, works = host(disk={'size': 2 << 20}, sees=(outside,)), host()
    # A job that has its note in the ledger still writes the others, on the disk.
    lines = [ledger_line(f'echo >{outside}/begun; {gate.wait("a")}')] + [ledger_line('echo')] * 3
    batch = watch(lines[:1], [quick(full)], '--reserve')
    wait_until((outside / 'begun').exists, 'the first')
    full.fill_disk()
    first = batch.kill()
    second = watch(lines, [quick(full), quick(works)]).end()
    assert second.returncode == 1 and 'cannot write there' in second.stderr
    full.free_disk()
    gate.open('a')
    last = watch(lines, [quick(full), quick(works)]).end()
    assert last.returncode == 0, last.stderr
    once([full, works], first, second, last, jobs=4)


def test_26_the_only_machine_is_waited_for_until_it_has_room_on_its_disk(host, watch, gate,
                                                                         outside):
    machine = host(disk={'size': 2 << 20}, sees=(outside,))
    lines = [ledger_line(f'echo >{outside}/begun; {gate.wait("a")}'),
             ledger_line('echo 2'), ledger_line('echo 3')]
    batch = watch(lines, [quick(machine)], '--reserve')
    wait_until((outside / 'begun').exists, 'the first')
    machine.fill_disk()
    gate.open('a')
    batch.complains('gets no more jobs for a while')
    machine.free_disk()
    done = batch.end()
    assert (done.returncode, 'not started' in done.stdout) == (0, False), done.stderr
    assert re.search(r': gets no more jobs for a while: it cannot start batch.sh.2: '
                     r'(?!environment: line)\S.*: No space left on device\.\n', done.stderr)
    once([machine], done, jobs=3)
    assert_clean(machine)


def test_26_a_disk_over_there_that_a_job_fills(host, run):
    machine = host(disk={'size': 3 << 20})
    done = run([ledger_line('head -c 9000000 /dev/zero >big; exit 3')], [quick(machine)])
    assert done.returncode == 1 and 'batch.sh.1: exit code 3 on' in done.stdout, done.stderr
    once([machine], done, jobs=1)


@pytest.mark.parametrize('files', [1, 200])
def test_26_a_disk_over_there_that_is_full_when_a_job_ends(host, watch, gate, outside, files):
    """The files of the job are fetched, though the machine cannot write the list of them."""
    machine = host(disk={'size': 4 << 20, 'inodes': 1000}, sees=(outside,))
    line = ledger_line(f'for n in {{1..{files}}}; do echo $n >file.$n; done; echo >{outside}/made; '
                       f'{gate.wait("a")}')
    batch = watch([line], [quick(machine)])
    wait_until((outside / 'made').exists, 'its files')
    machine.fill_disk()
    gate.open('a')
    done = batch.end()
    assert done.returncode == 0, done.stdout + done.stderr
    assert ('batch.sh.1: the disk of the machine is full; its output may be incomplete'
            in done.stderr)
    once([machine], done, jobs=1)
    assert len([*(RESULTS / 'batch.sh.1').glob('file.*')]) == files
    machine.free_disk()


@pytest.mark.parametrize('fault', ['inodes', 'read-only home', 'read-only /tmp', 'noexec /tmp'])
def test_27_a_home_that_cannot_be_written(host, run, fault):
    bad = host(disk={'size': 1 << 20, 'inodes': 100},
               tmp={'read-only /tmp': 'ro', 'noexec /tmp': 'noexec'}.get(fault, 'rw'))
    good = host()
    if fault == 'inodes':
        bad.fill_inodes()
    elif fault == 'read-only home':
        bad.read_only_home()
    done = run([ledger_line('echo')] * 3, [quick(bad), quick(good)])
    assert done.returncode == 0, done.stderr
    assert ('cannot write there' in done.stderr) == ('tmp' not in fault)
    once([bad, good], done, jobs=3)


@pytest.mark.parametrize('how', ['tar', 'rsync'])
def test_27_no_inodes_for_the_files(host, run, project, how):
    """The disk has free bytes but no inode; the last line of tar never names the reason."""
    bad, good = host(disk={'size': 4 << 20, 'inodes': 60}), host()
    for n in range(100):
        (project / f'file.{n}').write_bytes(b'x' * (4000 if how == 'rsync' else 10))
    done = run([ledger_line('ls | wc -l')], [quick(bad), quick(good)])
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if 'cannot be used' in line]
    assert line.startswith((f'{bad.yaml()}: cannot be used: the files could not be ',
                            f'{bad.yaml()}: cannot be used: the machine could not store the files'))
    assert 'No space left on device' in line and 'due to previous errors' not in line
    assert '(no inode is left for one more file: see df -i)' in line
    once([bad, good], done, jobs=1)


def test_27_a_disk_too_small_for_the_files(host, run, project):
    bad, good = host(disk={'size': 200_000, 'inodes': 1000}), host()
    (project / 'data').write_bytes(bytes(240_000))
    done = run([ledger_line('wc -c <data')], [quick(bad), quick(good)])
    (line,) = [line for line in done.stderr.splitlines() if 'cannot be used' in line]
    assert re.search('No space left on device|the disk of the machine is full', line)
    assert 'inode' not in line
    once([bad, good], done, jobs=1)


# ---- The machine's limits ----

@pytest.fixture
def crowd():
    """Start processes of a user: crowd(uid, number); kill them at the end."""
    started = []

    def gather(uid, number):
        started.extend(subprocess.Popen(['sleep', '1000'], user=uid) for _ in range(number))
        return started

    yield gather
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.skipif(os.getuid() != 0, reason='only root can log in as another uid')
def test_27_no_more_processes_at_the_login(lab, run, crowd):
    uid = 30_000 + os.getpid() % 20_000
    bad, good = lab(uid=uid, startup={'.bashrc': 'ulimit -u 20\n'}), lab()
    crowd(uid, 20)
    done = run([ledger_line('true')], [bad, good], times={'LATECOMER_S': 2.0})
    assert done.returncode == 0, done.stderr
    assert f'{bad.yaml()}: ' in done.stderr
    alone = run([ledger_line('true')] * 2, [bad])
    assert alone.returncode == 2
    (line,) = [line for line in alone.stderr.splitlines() if 'cannot be used' in line]
    assert 'cannot be used: this account can start no more processes' in line
    once([bad, good], done, jobs=1)


@pytest.mark.skipif(os.getuid() != 0, reason='only root can log in as another uid')
def test_27_no_more_processes_while_jobs_start_and_end(lab, batches, crowd, gate, ledger,
                                                       tmp_path):
    """No job fails for that reason: a job that cannot begin waits, and an exit status is kept."""
    uid = 30_000 + os.getpid() % 20_000
    machine = lab(uid=uid, startup={'.bashrc': 'ulimit -u 40\n'})
    lines = [f'echo {n} >>{ledger}; {then}' for n, then in enumerate(        # builtins only
        [f'{gate.wait("a")}; exit 3', 'true', 'true'], 1)]
    env = {'CRASH_SETTINGS': json.dumps({'RETRY_S': 0.3, 'REFRESH_S': 0.5, 'ASIDE_S': 1.0})}
    errors = tmp_path / 'stderr'
    with open(errors, 'w') as file:
        batch = Watched(batches.start(lines, [machine.yaml(max_jobs=1)], *NO_GPU, env=env,
                                      stderr=file), errors)
    wrote(ledger, '1')
    started = crowd(uid, 40)
    gate.open('a')
    batch.complains('this account can start no more processes (ulimit -u: 40)')
    for process in started:
        process.kill()
        process.wait()
    done = batch.end()
    assert done.returncode == 1, done.stderr
    assert done.stdout.count('failed: ') == 1 and 'batch.sh.1: exit code 3 on' in done.stdout
    assert (ledger.read_text(), result('batch.sh.1', 'err')) == ('1\n2\n3\n', b'')
    assert_clean(machine)


@pytest.mark.parametrize(('number', 'jobs'), [
    (signal.SIGTERM, 1), (signal.SIGTERM, 3), (signal.SIGKILL, 3)])
def test_27_a_login_whose_processes_are_all_ended_with_it(host, watch, number, jobs):
    """All processes end but the boot id stays, as with KillUserProcesses=yes of logind."""
    machine = host()
    batch = watch([ledger_line('sleep 1000')] * jobs, [quick(machine)])
    for n in range(1, jobs + 1):
        has_begun(machine, f'batch.sh.{n}')
    wait_until(lambda: sum(line == 'sleep 1000' for _, line in machine.processes()) == jobs,
               'all of them sleep')
    machine.freeze_listener()               # no contact until all are dead
    machine.kill_sessions()
    for how in (signal.SIGSTOP, number, signal.SIGCONT):        # all at once
        for pid, _ in machine.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, how)
    wait_until(lambda: not machine.processes(), 'the end of all')
    machine.thaw()
    done = batch.end()
    count = f'{jobs} job{"s that ran there were" if jobs > 1 else " that ran there was"}'
    assert (f'WARNING: {quick(machine)}: {count} killed while it was not connected, though it was '
            'not restarted. If its logind kills all that a login leaves (KillUserProcesses=yes in '
            '/etc/systemd/logind.conf), ask for KillUserProcesses=no') in done.stderr
    assert done.stderr.count('KillUserProcesses=no') == 1
    # a stopped process that loses its parent also gets a SIGHUP
    codes = re.findall(r'exit code (\d+) on', done.stdout)
    assert (done.returncode, len(codes)) == (1, jobs) and {*codes} <= {'129', str(128 + number)}


LOST_GPU = '''#!/bin/bash
[[ "$*" == *--query-gpu=*,compute_mode,* ]] || exit 15
echo '0, GPU-a, 16000, 16000, 0, Default, [N/A], Rig'
echo 'Unable to determine the device handle for GPU0000:02:00.0: GPU is lost.  Reboot it' {to}
echo '2, GPU-c, 16000, 16000, 0, Default, [N/A], Rig'
exit 15
'''


@pytest.mark.parametrize('to', ['', '>&2'])
def test_40_one_lost_gpu_among_several(lab, batches, run_cli, to):
    machine = lab(nvidia_smi=LOST_GPU.format(to=to))
    done = batches.run(['echo $CUDA_VISIBLE_DEVICES; sleep 0.1'] * 4, [machine],
                       '--memory-required=10', timeout=60)
    assert done.returncode == 0, done.stderr
    assert {result(f'batch.sh.{n}') for n in range(1, 5)} == {b'0\n', b'2\n'}
    why = 'has lost GPU0000:02:00.0 (nvidia-smi: GPU is lost.  Reboot it)'
    assert f'{machine.yaml()} {why}; 2 other GPUs can be used.' in done.stderr.splitlines()
    shown = run_cli('query_machines', '--machines', machine.yaml())
    assert (shown.returncode, shown.stdout.splitlines()[-2].strip()) == (0, why)


@pytest.fixture
def elsewhere(monkeypatch):
    """Make the folders of the rig and a new current folder outside /tmp."""
    monkeypatch.setenv('RIG_FOLDER', '/var/tmp')
    folder = rig.temporary_folder('project')
    monkeypatch.chdir(folder)
    yield folder
    monkeypatch.chdir('/')
    rig.remove(folder)


def test_27_a_machine_without_any_tmp(elsewhere, host, lab, run_cli, gate):
    machine, good = host(tmp='absent'), lab()
    assert machine.run('ls -d /tmp').returncode == 2
    (elsewhere / 'data').write_bytes(os.urandom(300_000))
    lines = [ledger_line(f'{meet}; cp data copy; ls -d /tmp') for meet in gate.meeting(2)]
    done = Batches(run_cli, None, env=IMPATIENT).run(
        lines, [quick(machine, max_jobs=1), quick(good, max_jobs=1)], *NO_GPU)
    assert done.returncode == 1 and done.stdout.count('exit code 2 on') == 1, done.stderr
    assert sorted(result(f'batch.sh.{n}').count(b'/tmp') for n in (1, 2)) == [0, 1]
    for n in (1, 2):
        assert (RESULTS / f'batch.sh.{n}/copy').read_bytes() == (elsewhere / 'data').read_bytes()
    once([machine, good], done, jobs=2)
    assert_clean(machine, cache=True)


# ---- Faults on the client ----

@pytest.mark.parametrize('how', ['ro', 'nr_inodes=1', 'size=4096', 'absent'])
def test_27_no_temporary_folder_here(elsewhere, host, lab, client_env, how):
    """The test needs root and namespaces, as hosts do."""
    machine, moved = lab(), rig.temporary_folder('moved')      # the program may lie in /tmp
    Path('batch.sh').write_text(f'{ledger_line("true")}\n')
    prepare = f'mount -t tmpfs -o {how} tmpfs /tmp; {{ head -c 4096 /dev/zero >/tmp/a; }} 2>&-; :'
    if how == 'absent':
        prepare = ('mount -t tmpfs tmpfs /mnt; for place in /*; do if [ -L "$place" ]; then cp -P '
                   '"$place" /mnt; elif [ -d "$place" ] && [ "$place" != /tmp ] && [ "$place" != '
                   '/mnt ]; then mkdir "/mnt$place"; mount --rbind "$place" "/mnt$place"; fi; done;'
                   'here=$PWD; cd /mnt; pivot_root . .; umount --lazy .; cd "$here"; ! [ -e /tmp ]')
    move = f'mkdir {moved}/python {moved}/program; mount --bind {sys.prefix} {moved}/python; ' \
        f'mount --bind {PROGRAM.parent.parent} {moved}/program'
    env = {name: value for name, value in client_env.items() if name != 'XDG_RUNTIME_DIR'}
    done = subprocess.run(
        ['unshare', '--mount', 'bash', '-c', f'{move}; {prepare} && exec "$@"', 'bash',
         moved / 'python' / Path(sys.executable).relative_to(sys.prefix),
         moved / 'program/tests' / PROGRAM.name, 'execute_batch', 'batch.sh', *NO_GPU,
         '--machines', machine.yaml()],
        env={**env, 'TMPDIR': '/nowhere'}, capture_output=True, text=True, timeout=60)
    rig.remove(moved)
    assert (done.returncode, done.stdout) == (2, ''), done.stderr
    (line,) = done.stderr.splitlines()
    assert 'there is no folder for temporary files' in line
    assert machine.logins() == 0 and machine.ledger.read_text() == ''


@pytest.mark.parametrize('tools', ['rsync', 'tar'])
def test_28_a_full_disk_here(lab, run, disk, project, tools):
    (project / 'job_results').mkdir()
    here = disk(at=project / 'job_results', size=6 << 20)
    machine = lab(leave_out=() if tools == 'rsync' else ('rsync',))
    here.fill(leave=2 << 20)
    lines = [ledger_line('head -c 2500000 /dev/urandom >big'), ledger_line('echo 2')]
    first = run(lines, [machine])
    assert first.returncode == 1, first.stderr
    assert 'batch.sh.1: its results could not be fetched' in first.stderr, first.stderr
    assert not (RESULTS / 'batch.sh.1').exists()
    assert not [*RESULTS.glob('.ssh_scheduler/incoming*')]
    here.free()
    last = run(lines, [machine])
    assert last.returncode == 0, last.stderr
    assert (RESULTS / 'batch.sh.1/big').stat().st_size == 2_500_000
    once([machine], first, last, jobs=2)
    assert_clean(machine)


TREE = '''\
sleep 1001 &
setsid sleep 1002 &
(setsid sleep 1003 &)
env -i setsid sleep 1004 &
nohup sleep 1005 &
(trap "" TERM; sleep 1006; sleep 1006) &
bash -c "set -m; sleep 1007 & wait" &
wait
'''


def test_29_an_interrupt_ends_whole_trees(hosts, watch):
    Path('tree.sh').write_text(TREE)
    batch = watch([ledger_line('bash tree.sh')] * 2, [quick(host) for host in hosts], '--reserve')
    for host in hosts:
        wait_until(lambda host=host: {line for _, line in host.processes()} >= {
            f'sleep {n}' for n in range(1001, 1008)}, f'all of the tree on {host.name}')
    batch.process.send_signal(signal.SIGINT)
    done = batch.end()
    assert done.returncode == 130 and 'may still run on' not in done.stderr, done.stderr
    for host in hosts:
        assert_clean(host, cache=True)
    once(hosts, done, jobs=0)


# Of each four jobs: one obeys SIGTERM, one ignores it, one leaves its group, one has daemons.
HARD_TO_END = [
    'sleep 1001',
    'trap "" TERM INT HUP; while :; do sleep 1002; done',
    '(setsid bash -c "(sleep 1003 &)" &); setsid sleep 1003',
    'env -i setsid bash -c "trap : TERM; (sleep 1004 & sleep 1004; sleep 1004) & wait; wait"'
]


def test_29_an_interrupt_ends_a_hundred_jobs_on_five_machines(host, batches):
    machines = [host() for _ in range(5)]
    patient = {'CRASH_SETTINGS': json.dumps({'INTERRUPT_S': 60.0})}    # 10 s are too few under load
    batch = batches.start([ledger_line(HARD_TO_END[n % 4]) for n in range(100)],
                          [quick(machine, max_jobs=20) for machine in machines], *NO_GPU,
                          '--num-cpus=0.1', env=patient)

    def sleepers():
        return [line for machine in machines for _, line in machine.processes()
                if line.startswith('sleep 100')]

    # 25 jobs of each kind; jobs of the third and fourth kind have two sleeps each
    wait_until(lambda: len(sleepers()) == 150, 'all of them sleep')
    assert all(machine.ledger.read_text().count('start') == 20 for machine in machines)
    began = time.monotonic()
    batch.process.send_signal(signal.SIGINT)
    done = batch.end()
    took = time.monotonic() - began
    print(f'ended after {took:.1f} s')
    assert done.returncode == 130 and 'may still run on' not in done.stderr, done.stderr
    assert took < 30
    for machine in machines:
        assert_clean(machine)
    once(machines, done, jobs=0)


def test_30_an_interrupt_while_a_machine_is_away(host, watch, gate, outside):
    away, there = host(sees=(outside,)), host(sees=(outside,))
    line = ledger_line(f'[ -e {outside}/go ] || {gate.wait("a")}')
    batch = watch([line] * 2, [quick(away), quick(there)], '--reserve')
    wait_until(lambda: away.ledger.read_text() and there.ledger.read_text(), 'both')
    away.cut()
    batch.complains('connection lost')
    batch.process.send_signal(signal.SIGINT)
    first = batch.end()
    assert first.returncode == 130
    assert first.stderr.count('may still run on') == 1
    assert not [line for _, line in there.processes() if 'noted' in line]
    (outside / 'go').touch()
    away.restore()
    batch = watch(None, [quick(away), quick(there)], '--reserve')
    gate.open('a')
    last = batch.end()
    assert last.returncode == 0, last.stderr
    once([away, there], first, last, jobs=2)


@pytest.mark.parametrize('back', [True, False])
def test_28_job_results_goes_away_while_it_is_in_use(host, watch, batches, gate, outside, back):
    machine = host(sees=(outside,))
    lines = [ledger_line(gate.wait('a')), ledger_line('echo')]
    batch = watch(lines, [quick(machine)], '--reserve')
    has_begun(machine)
    RESULTS.rename('elsewhere')
    gate.open('a')
    first = batch.end()
    assert first.returncode == 2 and first.stderr.count('\n') == 2
    assert 'job_results was removed or moved away while it was in use. Running' in first.stderr
    assert not RESULTS.exists()
    if back:
        Path('elsewhere').rename(RESULTS)
        last = watch(lines, [quick(machine)]).end()
        assert last.returncode == 0, last.stderr
        once([machine], first, last, jobs=2)
    else:                   # a new job_results does not know the jobs of the old one
        batch = watch(lines, [quick(machine)])
        gate.open('a')
        last = batch.end()
        assert last.returncode == 0 and '1 job of an earlier job_results' in last.stderr
        assert machine.ledger.read_text().count('batch.sh.1 1 end') == 2
        batches._run_cli('execute_batch', '--machines', quick(machine), '--earlier=remove')
    assert_clean(machine, cache=True)


def test_30_a_machine_that_comes_back_while_an_interrupt_waits_for_another(lab, watch, outside):
    """Its job has ended meanwhile, and is collected, or set aside and run again."""
    away, there = lab(), lab()
    line = ledger_line(f'[ -e {outside}/go ] || until [ -e {outside}/end ]; do sleep 0.05; done')
    deaf = ledger_line(f'[ -e {outside}/go ] || {{ trap "" TERM; while :; do sleep 1; done; }}')
    batch = watch([line, deaf], [away, there], '--reserve')
    has_begun(away)
    has_begun(there, 'batch.sh.2')
    away.stop()
    batch.complains('connection lost (1 job keeps running)')
    (outside / 'end').touch()
    wait_until(lambda: has(away.ledger, 'batch.sh.1 1 end'), 'its end')
    batch.process.send_signal(signal.SIGINT)
    batch.complains('interrupted: stopping all jobs')
    away.start()
    first = batch.end()
    assert first.returncode == 130
    (outside / 'go').touch()
    last = watch(None, [away, there], '--reserve').end()
    assert last.returncode == 0, last.stderr
    once([away, there], first, last, jobs=2, again=True)
    assert_clean(away)
    assert_clean(there)


@pytest.mark.parametrize('numbers', [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM,),
                                     (signal.SIGHUP,), (signal.SIGINT, signal.SIGTERM)])
def test_31_signals(host, watch, outside, numbers):
    machine = host(sees=(outside,))
    line = ledger_line(f'trap "" TERM; while [ ! -e {outside}/go ]; do sleep 0.1; done')
    batch = watch([line] * 2, [quick(machine)])
    has_begun(machine)
    has_begun(machine, 'batch.sh.2')
    batch.process.send_signal(numbers[0])
    if len(numbers) > 1:
        batch.complains('stopping all jobs (Ctrl-C again: exit without waiting)')
        batch.process.send_signal(numbers[1])
    first = batch.end()
    assert first.returncode == (-signal.SIGHUP if numbers[0] == signal.SIGHUP else 130)
    (outside / 'go').touch()
    last = watch(None, [quick(machine)]).end()
    assert last.returncode == 0, last.stderr
    # a job that the first run was stopping may have ended before the next run started
    once([machine], first, last, jobs=2, again=len(numbers) > 1)
    assert_clean(machine, cache=True)


def test_32_two_of_the_same(lab, watch, gate):
    machine = lab()
    batch = watch([waiting(gate)], [machine])
    has_begun(machine)
    second = watch(None, [machine]).end()
    assert (second.returncode, second.stdout) == (0, 'handed to the client that runs (process '
        f'{batch.process.pid}): it has these lines and machines already\n')
    gate.open('a')
    done = batch.end()
    assert done.returncode == 0
    once([machine], done, jobs=1)


def test_38_an_input_that_changes_twice_in_a_second(lab, run, project):
    machine, said = lab(), []
    for version in 'abc':
        (project / 'data').write_text(version * 300_000)
        (project / 'small').write_text(version)
        os.utime(project / 'data', ns=(time.time_ns(), 10**18 + ord(version)))
        line = ledger_line(f'head -c 1 data; cat small; echo; : {version}')
        lines = [*['true'] * len(said), line]
        said.append(run(lines, [machine]))
        assert f'{version}{version}\n' in result(f'batch.sh.{len(said)}').decode()


@pytest.mark.parametrize('kind', ['file', 'empty folder', 'dangling link'])
def test_39_results_that_are_there(lab1, run, kind):
    RESULTS.mkdir()
    if kind == 'file':
        (RESULTS / 'batch.sh.1').write_text('mine')
    elif kind == 'empty folder':
        (RESULTS / 'batch.sh.1').mkdir()
    else:
        (RESULTS / 'batch.sh.1').symlink_to('nowhere')
    before = os.lstat(RESULTS / 'batch.sh.1')
    done = run([ledger_line('echo 1'), ledger_line('echo 2')], [lab1])
    assert done.returncode == 0 and 'WARNING: job results already exists for line 1' in done.stdout
    assert os.lstat(RESULTS / 'batch.sh.1') == before and not (RESULTS / 'batch.sh.1.out').exists()


def test_39_a_place_that_somebody_takes_while_the_job_runs(lab1, watch, run, run_cli, gate):
    batch = watch([f'{gate.wait("a")}; echo out; echo made >made'], [lab1])
    batch.until('started: ')
    (RESULTS / 'batch.sh.1').mkdir()
    gate.open('a')
    why = 'another program made job_results/batch.sh.1 while batch.sh.1 ran: move it away'
    for done in (batch.end(), run(None, [lab1])):
        assert (done.returncode, 'skipping' in done.stdout) == (1, False)
        assert f'batch.sh.1: its results could not be fetched: {why}. ' in done.stderr, done.stderr
        assert f'batch.sh.1: has ended on {lab1.yaml()}: run the same command again' in done.stdout
    status = run_cli('execute_batch', 'batch.sh', '--status')
    lines = status.stdout.splitlines()
    assert lines[0] == ('no client runs this batch, 1 ended and not collected yet, 0 waiting. To '
                        'continue, type the command that started it')
    assert lines[2].startswith(f'.1   ended  {lab1.yaml()}  ') and lines[2].endswith('  out')
    assert (status.returncode, lines[-1]) == (
        1, '1 job: 0 finished, 0 failed, 1 on a machine, 0 waiting')
    (RESULTS / 'batch.sh.1').rmdir()
    assert run(None, [lab1]).returncode == 0
    assert (result('batch.sh.1'), (RESULTS / 'batch.sh.1/made').read_text()) == (
        b'out\n', 'made\n')
    assert_clean(lab1)


@pytest.mark.parametrize('fault', ['SIGCHLD', 'few files', 'no stdin', 'no stdin, stdout, stderr',
                                   'TMPDIR'])
def test_41_a_strange_environment(lab, client_env, client_home, project, fault):
    machine = lab()
    (project / 'batch.sh').write_text(f'{ledger_line("echo 1")}\n{ledger_line("exit 5")}\n')
    env = {**client_env, **IMPATIENT}
    if fault == 'TMPDIR':
        env['TMPDIR'] = str(client_home / 'tmp' / ('a % b ' * 20))
        os.mkdir(env['TMPDIR'])
    close = {'no stdin': '<&-', 'no stdin, stdout, stderr': '<&- >&- 2>&-'}.get(fault, '')
    few = 'ulimit -n 64;' if fault == 'few files' else ''
    done = subprocess.run(
        ['bash', '-c', f'{few} exec "$@" {close}', 'bash', sys.executable, PROGRAM,
         'execute_batch', 'batch.sh', *NO_GPU, '--machines', str(machine.yaml())],
        env=env, capture_output=True, text=True, timeout=60, preexec_fn=None if
        fault != 'SIGCHLD' else lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN))
    assert 'Traceback' not in done.stderr, done.stderr
    assert done.returncode == 1
    assert machine.ledger.read_text().count('end') == 2
    if 'stdout' not in fault:
        once([machine], done, jobs=2)


def test_42_a_clock_that_is_wrong(host, run):
    machines = host(clock='+1d'), host(clock='-1d'), host()
    done = run([ledger_line('echo; sleep 0.1')] * 9, [quick(host, max_jobs=2) for host in machines])
    assert done.returncode == 0, done.stderr
    assert all('start' in host.ledger.read_text() for host in machines)
    assert float(re.search(r'([0-9.]+) s$', done.stdout.splitlines()[-1])[1]) < 60
    once(machines, done, jobs=9)


def test_43_a_full_disk_under_the_journal(lab, run, disk, project):
    (project / 'job_results').mkdir()
    here = disk(at=project / 'job_results', size=1 << 20)
    machine = lab()
    lines = [ledger_line(f'true {"x" * 600} {n}') for n in range(20)]
    here.fill(leave=64 << 10)
    first = run(lines, [machine])
    assert first.returncode in (1, 2) and 'No space left on device' in first.stderr, first.stderr
    here.free()
    last = run(lines, [machine])
    assert last.returncode == 0, last.stderr
    once([machine], first, last, jobs=20)


def test_44_a_slow_line_that_loses_packets(host, run):
    machine = host()
    machine.lossy(10)
    machine.slow(20_000)
    done = run([ledger_line(f'echo {n}') for n in range(6)],
               [quick(machine, {'ServerAliveInterval': 5, 'ConnectTimeout': 15})])
    assert done.returncode == 0 and 'connection lost' not in done.stderr, done.stderr
    once([machine], done, jobs=6)


# ---- Options that change what follows a fault ----

def test_a_machine_that_comes_back_after_its_jobs_went_elsewhere(host, watch, gate, outside):
    machines = host(sees=(outside,)), host(sees=(outside,))
    lines = [waiting_once(gate, outside), waiting(gate, 'b')]
    batch = watch(lines, [quick(machine) for machine in machines], '--lost-after=1')
    wait_until(lambda: any(has(machine.ledger, 'batch.sh.2 1 start') for machine in machines), 'it')
    begun_once(outside)
    gone, there = sorted(machines, key=lambda machine: not machine.job_processes('batch.sh.1'))
    gone.cut()
    batch.complains('on other machines, and will be stopped on')
    assert 'batch.sh.1' in batch.until('finished: ')
    assert gone.job_processes('batch.sh.1')
    gone.restore()
    batch.complains('connected again')
    wait_until(lambda: not gone.job_processes('batch.sh.1'), 'the old attempt is ended')
    wait_until(lambda: not gone.job_processes('batch.sh.2'), 'of all')
    gate.open('b')
    done = batch.end()
    assert done.returncode == 0, done.stderr
    once(machines, done, jobs=2)
    for machine in machines:
        assert_clean(machine)


def test_a_machine_may_be_given_up_later_than_it_would_be_looked_for(lab, watch, gate, outside):
    machines = lab(), lab()
    batch = watch([waiting_once(gate, outside)], machines, '--lost-after=1', '--away-limit=0')
    begun_once(outside)
    gone, = (machine for machine in machines if machine.ledger.read_text())
    gone.stop()
    done = batch.end()
    assert done.returncode == 0, done.stderr
    assert 'on other machines, and will be stopped on' in done.stderr
    once(machines, done, jobs=1)


def has(ledger, line):
    return line in ledger.read_text().splitlines()


def test_what_runs_on_a_machine_that_never_came_is_listed(lab, watch, run, gate):
    off, there = lab(), lab()
    batch = watch([waiting(gate)], [off])
    has_begun(off)
    runs = [batch.kill()]
    off.stop()
    told = (f'batch.sh.1: may still run on {off.account}: run the same command again to '
            'collect its results')
    batch = watch([waiting(gate), waiting(gate, 'b')], [off, there])
    has_begun(there, 'batch.sh.2')
    batch.process.send_signal(signal.SIGINT)
    runs.append(batch.end())
    assert (runs[1].returncode, told in runs[1].stdout.splitlines()) == (130, True), runs[1]
    runs.append(run([waiting(gate), 'exit 3'], [off, there], '--halt-after=1'))
    assert (runs[2].returncode, told in runs[2].stdout.splitlines()) == (1, True), runs[2]
    off.start()
    batch = watch(None, [off, there])
    gate.open('a')
    runs.append(batch.end())
    assert 'batch.sh.2: exit code 3 on' in runs[3].stdout and runs[3].returncode == 1
    once([off, there], *runs, jobs=1)


def test_a_job_that_takes_too_long(lab, run):
    machine = lab()
    done = run([ledger_line('echo said; echo made >made; sleep 1000'), ledger_line('echo')],
               [machine], '--timeout=1')
    assert done.returncode == 1 and 'batch.sh.1: exit code 124 on' in done.stdout
    assert b'said\n' in result('batch.sh.1')
    assert (RESULTS / 'batch.sh.1/made').read_text() == 'made\n'
    assert 'its time limit' in result('batch.sh.1', 'err').decode()
    once([machine], done, jobs=2)
    assert_clean(machine)


def test_no_more_jobs_after_so_many_failed(lab, run):
    machine = lab()
    lines = [ledger_line('exit 3')] * 2 + [ledger_line('echo')] * 6
    first = run(lines, [machine.yaml(max_jobs=1)], '--halt-after=2')
    assert first.returncode == 1
    assert '2 failed' in first.stdout and '6 not started' in first.stdout, first.stdout
    last = run(lines, [machine])
    assert last.returncode == 1 and '6 finished, 0 failed, 2 skipped' in last.stdout, last.stderr
    once([machine], first, last, jobs=8)
    assert_clean(machine)
