"""The program is interrupted or killed: no job is left behind, none is run twice or forgotten."""
import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import rig
from batching import (
    NO_GPU,
    RESULTS,
    Batches,
    assert_clean,
    constants,
    places,
    result,
    tree_of,
    wait_until,
    with_constants,
    wrote,
)


@pytest.fixture
def batches(run_cli, start_cli, project, lab1):
    """Batches on a localhost with room for a few jobs, even while tests take all processors."""
    return Batches(run_cli, start_cli, env={'SSH_SCHEDULER_PROC': str(lab1.proc)})


@pytest.fixture
def patient(run_cli, start_cli, project, lab1):
    """Clients that give jobs 30 s to end, which is more than a busy computer may need."""
    return Batches(run_cli, start_cli, env={'SSH_SCHEDULER_PROC': str(lab1.proc),
                                            **constants(INTERRUPT_S=30.0)})


@pytest.fixture(params=['ssh', 'localhost'])
def machine(request, lab):
    return lab() if request.param == 'ssh' else 'localhost'


def jobs_left(machine, client_home):
    """Return the processes of jobs on the machine, as (pid, words)."""
    if machine == 'localhost':
        pids = [(pid, rig.cmdline(pid)) for pid in rig.knowing(client_home)]
    else:
        pids = machine.processes()
    return [(pid, line) for pid, line in pids
            if b'SSH_SCHEDULER_JOB=' in rig.read_proc(pid, 'environ')]


@contextlib.contextmanager
def ignored(*numbers):
    """Let processes that start meanwhile ignore these signals, as in the background of a script."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize('who', ['client', 'sshd'])
def test_jobs_ignore_no_signal_that_we_were_started_with_ignored(batches, lab, who):
    with ignored(signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        machine = 'localhost' if who == 'client' else lab()
        if who == 'client':
            batch = batches.start(SIGNAL_LINES, [machine], *NO_GPU)
    if who == 'sshd':
        batch = batches.start(SIGNAL_LINES, [machine], *NO_GPU)
    assert batch.end().returncode == 1
    assert int(result('batch.sh.1').split()[1], 16) & 0x4007 == 0       # make also ignores 32
    assert [result(f'batch.sh.{n}') for n in (2, 3)] == [b'', b'']
    assert 'exit code 130' in str(batch.lines) or 'signal 2' in str(batch.lines)


SIGNAL_LINES = ['grep ^SigIgn: /proc/self/status', 'kill -INT $$; echo survived',
                "sh -c 'kill -QUIT $$; echo survived'"]


def test_a_client_that_was_started_with_interrupts_ignored_ignores_them(batches, gate):
    """Ctrl-C at a terminal must not stop a client that a script runs in the background."""
    with ignored(signal.SIGINT):
        batch = batches.start([f'{gate.wait("job")}; echo fine'], ['localhost'], *NO_GPU)
    batch.until('started: batch.sh.1')
    batch.process.send_signal(signal.SIGINT)
    gate.open('job')
    assert batch.end().returncode == 0
    assert result('batch.sh.1') == b'fine\n'


def test_these_tests_may_run_in_the_background_of_a_script():
    """A background process of a script ignores interrupts; importing conftest undoes this."""
    show = 'import conftest, subprocess; subprocess.run(["grep", "SigIgn", "/proc/self/status"])'
    done = subprocess.run(['sh', '-c', '"$@" & wait', 'sh', sys.executable, '-c', show],
                          cwd=Path(__file__).parent, capture_output=True, text=True)
    assert int(done.stdout.split()[1], 16) & 0b110 == 0, done.stderr


# ---- Interrupted: the jobs are stopped ----

@with_constants
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_all_jobs(patient, run_cli, machine, ledger, outside, client_home,
                                    number):
    go = outside / 'go'
    lines = [f'echo {{}} >>{ledger}; [ -e {go} ] || {{{{ echo begun; {{}}; }}}}; echo end'] * 4
    how = ['sleep 1000', 'sleep 1000 & sleep 1001 & wait', 'bash -c "sleep 1000; true"',
           'python3 -c "import time; time.sleep(1000)"']
    lines = [line.format(n, what) for n, (line, what) in enumerate(zip(lines, how), 2)]
    lines = [f'echo 1 >>{ledger}', *lines, f'echo 6 >>{ledger}']
    batch = patient.start(lines, [machine], '--num-cpus=3', *NO_GPU)    # 4 at a time
    batch.until('finished: batch.sh.1')
    wrote(ledger, *'12345')
    began = time.monotonic()
    os.killpg(batch.process.pid, number)        # a terminal signals the whole group
    done = batch.end()
    assert time.monotonic() - began < 30
    assert done.returncode == 130
    assert 'Traceback' not in done.stderr and 'may still run on' not in done.stderr
    assert done.stdout.splitlines()[-1].startswith(
        'interrupted: 6 jobs: 1 finished, 0 failed, 4 cancelled, 1 not started, ')
    assert ('partial results of 4 cancelled jobs are in job_results/.ssh_scheduler/cancelled. The '
            'same command runs these jobs from the start') in done.stderr.splitlines()
    assert len([*Path('job_results/.ssh_scheduler/cancelled').glob('*.out')]) == 4
    where = machine if machine == 'localhost' else machine.yaml()
    status = run_cli('execute_batch', 'batch.sh', '--status').stdout.splitlines()
    assert [line.split()[:3] for line in status[3:7]] == [
        [f'.{n}', 'cancelled', str(where)] for n in range(2, 6)]
    assert all(line.endswith('  starts from the beginning') for line in status[3:7])
    assert status[-1] == '6 jobs: 1 finished, 0 failed, 0 on a machine, 5 waiting'
    assert jobs_left(machine, client_home) == []
    assert result('batch.sh.1') == b''
    assert sorted(path.name for path in RESULTS.glob('batch*')) == [
        'batch.sh.1', 'batch.sh.1.err', 'batch.sh.1.out']

    go.touch()
    again = patient.run(None, [machine], '--num-cpus=3', *NO_GPU)
    assert again.returncode == 0, again.stderr
    assert all(result(f'batch.sh.{n}') == b'end\n' for n in range(2, 6))
    assert Counter(ledger.read_text().split()) == Counter('1223344556')
    assert again.stdout.count('started: ') == 5
    if machine != 'localhost':
        assert_clean(machine)


@with_constants
def test_a_job_that_ignores_signals_is_killed(patient, lab, ledger, client_home):
    machine = lab()
    lines = [f'trap "echo term >>{ledger}" TERM; trap "" INT HUP; echo start >>{ledger}; '
             'while :; do sleep 1000; done',
             f'(trap "" TERM INT HUP; echo start >>{ledger}; sleep 1000; sleep 1000) & wait']
    batch = patient.start(lines, [machine], *NO_GPU)
    batch.until('started: batch.sh.2')
    wrote(ledger, 'start', 'start')
    batch.process.send_signal(signal.SIGINT)
    done = batch.end()
    assert (done.returncode, done.stderr.count('Traceback')) == (130, 0)
    assert 'may still run on' not in done.stderr
    assert jobs_left(machine, client_home) == []
    assert 'term' in ledger.read_text().split()


def test_a_job_may_tidy_up_when_it_is_told_to_end(batches, lab, ledger):
    lines = [f'trap "echo tidy >>{ledger}; exit" TERM; echo start >>{ledger}; sleep 1000 & wait']
    batch = batches.start(lines, [lab()], *NO_GPU)
    wrote(ledger, 'start')
    batch.process.send_signal(signal.SIGTERM)
    assert batch.end().returncode == 130
    assert ledger.read_text().split() == ['start', 'tidy']


def test_results_on_their_way_when_it_is_interrupted_are_not_lost(batches, lab, ledger, gate):
    lines = [f'echo 1 >>{ledger}; echo done >made', f'echo 2 >>{ledger}; {gate.wait("never")}']
    machine = lab()
    batch = batches.start(lines, [machine], *NO_GPU)
    batch.until('finished: batch.sh.1')
    batch.process.send_signal(signal.SIGINT)
    assert batch.end().returncode == 130
    batch = batches.start(None, [machine], *NO_GPU)
    gate.open('never')
    assert batch.end().returncode == 0
    assert (RESULTS / 'batch.sh.1/made').read_text() == 'done\n'
    assert Counter(ledger.read_text().split())['1'] == 1
    assert_clean(machine)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_it_connects(batches, lab, number, client_home):
    machine = lab()
    machine.freeze()
    batch = batches.start(['true'], [machine], *NO_GPU)
    wait_until(lambda: any('ssh -F' in rig.cmdline(pid) for pid in rig.knowing(client_home)),
               'an ssh that waits')
    batch.process.send_signal(number)
    done = batch.end()
    assert (done.returncode, done.stdout) == (130, '')
    assert re.fullmatch(rf'{machine.yaml()}: did not answer within \d+ s; interrupted\n',
                        done.stderr)
    assert not list(RESULTS.glob('batch*'))
    assert not list((client_home / 'tmp').iterdir())
    machine.thaw()


def test_a_second_interrupt_waits_for_no_machine(batches, lab, ledger, outside, gate):
    machine = lab()
    batch = batches.start([f'echo 1 >>{ledger}; [ -e {outside}/go ] || {gate.wait("a")}'],
                          [machine], *NO_GPU)
    wrote(ledger, '1')
    machine.freeze()
    began = time.monotonic()
    batch.process.send_signal(signal.SIGINT)
    batch.process.send_signal(signal.SIGTERM)       # two equal signals could merge
    done = batch.end()
    assert (done.returncode, time.monotonic() - began < 20) == (130, True)
    assert f'may still run on {machine.yaml()}' in done.stderr
    machine.thaw()
    (outside / 'go').touch()
    again = batches.run(None, [machine], *NO_GPU)       # it was cancelled, so it starts again
    assert (again.returncode, ledger.read_text()) == (0, '1\n1\n'), again.stderr
    assert_clean(machine, cache=True)


def test_results_that_were_being_fetched_at_a_second_interrupt_are_fetched_later(
        batches, lab, ledger, outside):
    machine, go = lab(), outside / 'go'
    machine.hold_fetches(go)
    batch = batches.start([f'echo 1 >>{ledger}; echo made >made'], [machine], *NO_GPU)
    wait_until(Path(f'{go}.awaited').exists, 'a fetch')
    batch.process.send_signal(signal.SIGINT)
    batch.process.send_signal(signal.SIGTERM)
    done = batch.end()
    assert done.returncode == 130
    assert done.stdout.splitlines()[-1] == (
        f'batch.sh.1: has ended on {machine.yaml()}: run the same command again to collect '
        'its results')
    go.touch()
    again = batches.run(None, [machine], *NO_GPU)
    assert (again.returncode, 'finished: batch.sh.1; ' in again.stdout) == (0, True), again.stderr
    assert (RESULTS / 'batch.sh.1/made').read_text() == 'made\n'
    assert ledger.read_text() == '1\n'
    assert_clean(machine)


# ---- Cancelled from another terminal, while its client runs ----

def cancel(run_cli, batch='batch.sh'):
    return run_cli('execute_batch', batch, '--cancel')


@pytest.mark.parametrize('number', [0, signal.SIGSTOP], ids=['it runs', 'Ctrl-Z'])
def test_cancel_while_the_client_runs(batches, run_cli, lab, ledger, gate, number):
    machine = lab()
    lines = ['true', *[f'echo begun >>{ledger}; {gate.wait("a")}'] * 2, 'echo later']
    batch = batches.start(lines, [machine], '--num-cpus=6', *NO_GPU)     # two at a time
    batch.until('finished: batch.sh.1')
    wrote(ledger, 'begun', 'begun')
    batch.process.send_signal(number)
    done = cancel(run_cli)
    assert (done.returncode, done.stdout.splitlines()) == (0, [
        f'batch.sh.2: stopped, on {machine.yaml()}', f'batch.sh.3: stopped, on {machine.yaml()}',
        'cancelled: 2 jobs']), done
    assert done.stderr == (f'batch.sh: cancelling: process {batch.process.pid} runs it\n'
                           'The next run of the batch starts cancelled jobs again. To prevent '
                           'that, delete their lines\n')
    first = batch.end()
    assert first.returncode == 130
    assert first.stdout.splitlines()[-1].startswith(
        'interrupted: 4 jobs: 1 finished, 0 failed, 2 cancelled, 1 not started, ')
    assert_clean(machine)
    assert cancel(run_cli).stdout == 'cancelled: 0 jobs\n'


def test_cancel_of_another_batch_of_the_same_folder_stops_no_client(batches, run_cli, lab, ledger,
                                                                    gate):
    Path('other.sh').write_text('true\n')
    batch = batches.start([f'echo begun >>{ledger}; {gate.wait("a")}'], [lab()], *NO_GPU)
    wrote(ledger, 'begun')
    done = cancel(run_cli, 'other.sh')
    assert (done.returncode, done.stdout) == (2, '')
    assert f'in use by another run (process {batch.process.pid} on ' in done.stderr
    gate.open('a')
    assert batch.end().returncode == 0


@pytest.mark.parametrize('computer', ['this one', 'elsewhere'])
def test_cancel_signals_nobody_who_does_not_hold_the_lock(batches, run_cli, project, computer):
    """The pid in the lock file may belong to another program by now, or to another computer."""
    own = project / 'job_results/.ssh_scheduler'
    own.mkdir(parents=True)
    (project / 'batch.sh').write_text('true\n')
    with subprocess.Popen(['sleep', '1000']) as bystander, open(own / 'lock', 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            where = os.uname().nodename if computer == 'this one' else computer
            lock.write(f'process {bystander.pid} on {where}\nbatch.sh\n')
            lock.flush()
            done = cancel(run_cli)
            assert (done.returncode, done.stdout, bystander.poll()) == (2, '', None)
        finally:
            bystander.kill()
    assert done.stderr == (
        f'execute_batch: job_results is in use by another run (process {bystander.pid} on {where}).'
        ' It runs the batch batch.sh. Wait for it, add your lines to its batch file, or start from '
        'another folder.\n' if computer == 'this one' else
        f'execute_batch: batch.sh is run by process {bystander.pid} on elsewhere: type the same '
        'command on that computer, in this folder.\n')


@with_constants
def test_an_interrupt_of_who_waits_for_the_client_loses_nothing(batches, start_cli, lab, ledger,
                                                                outside):
    machine = lab()
    batch = batches.start([f'trap "echo told >>{ledger}" TERM; echo begun >>{ledger}; until [ -e '
                           f'{outside}/go ]; do sleep 0.1; done'], [machine], *NO_GPU,
                          env=constants(KILL_GRACE_S=30, INTERRUPT_S=30.0))
    wrote(ledger, 'begun')
    process = start_cli('execute_batch', 'batch.sh', '--cancel')
    wrote(ledger, 'told')
    client = f'process {batch.process.pid}'
    assert process.stderr.readline() == f'batch.sh: cancelling: {client} runs it\n'
    process.send_signal(signal.SIGINT)
    said, complaint = process.communicate(timeout=rig.SAFETY_NET_S)
    assert (process.returncode, said, complaint) == (
        130, '', f'batch.sh: {client} is still cancelling\n')
    (outside / 'go').touch()
    assert batch.end().returncode == 130
    assert_clean(machine)


def test_what_the_client_could_not_confirm_is_not_said_to_have_ended(batches, run_cli, start_cli,
                                                                     lab, ledger, gate):
    machine = lab()
    batch = batches.start([f'echo begun >>{ledger}; {gate.wait("a")}'], [machine], *NO_GPU)
    wrote(ledger, 'begun')
    machine.freeze()
    process = start_cli('execute_batch', 'batch.sh', '--cancel')
    process.stderr.readline()
    batch.process.send_signal(signal.SIGINT)
    assert batch.end().returncode == 130
    said, _ = process.communicate(timeout=rig.SAFETY_NET_S)
    assert (process.returncode, said.splitlines()) == (1, [
        f'batch.sh.1: may still run, on {machine.yaml()}',
        'cancelled: 1 job, 1 may still run'])
    machine.thaw()


# ---- Killed: the jobs keep running, and the same command finds them ----

def kill(batch):
    batch.process.kill()
    return batch.end()


@pytest.mark.parametrize('when', ['it still runs', 'it has ended'])
def test_a_job_survives_the_program_and_is_collected_once(batches, machine, project, ledger, gate,
                                                          client_home, when):
    (project / 'data').write_bytes(bytes(300_000))
    lines = [f'echo start >>{ledger}; echo out; {gate.wait("a")}; wc -c <data; echo made >made; '
             f'echo end >>{ledger}', f'echo other >>{ledger}']
    batch = batches.start(lines, [machine], *NO_GPU)
    out = RESULTS / 'batch.sh.1.out'
    batch.until('finished: batch.sh.2')
    wait_until(lambda: out.exists() and out.read_bytes() == b'out\n', 'the first line')
    kill(batch)
    assert len(jobs_left(machine, client_home)) >= 1

    if when == 'it has ended':
        gate.open('a')
        wrote(ledger, 'end')
        wait_until(lambda: not jobs_left(machine, client_home), 'the end of the job')
        done = batches.run(None, [machine], *NO_GPU)
    else:
        batch = batches.start(None, [machine], *NO_GPU)
        assert batch.until('running: batch.sh.1;').startswith(
            f'running: batch.sh.1;  {lines[0]}'[:40])
        gate.open('a')
        done = batch.end()
        assert 'started: ' not in done.stdout
    assert (done.returncode, done.stderr.count('Traceback')) == (0, 0), done.stderr
    assert 'finished: batch.sh.1; ' in done.stdout
    assert Counter(ledger.read_text().split()) == Counter(['start', 'end', 'other'])
    assert result('batch.sh.1') == b'out\n300000\n'
    assert tree_of(RESULTS / 'batch.sh.1').keys() == {b'made'}
    home = client_home if machine == 'localhost' else machine.home
    assert not list(home.glob('.ssh_scheduler/*/jobs/batch.sh.1*')), places(home)
    assert batches.run(None, [machine], *NO_GPU).stdout.count('WARNING') == 2


def test_a_failure_of_a_job_that_outlived_the_program(batches, lab, ledger, gate):
    machine = lab()
    batch = batches.start([f'echo 1 >>{ledger}; {gate.wait("a")}; exit 77'], [machine], *NO_GPU)
    wrote(ledger, '1')
    kill(batch)
    gate.open('a')
    done = batches.run(None, [machine], *NO_GPU)
    assert done.returncode == 1
    assert 'batch.sh.1: exit code 77' in done.stdout
    assert ledger.read_text() == '1\n'


def test_what_runs_elsewhere_is_not_started_again(batches, lab, lab1, ledger, gate):
    machine = lab()
    lines = [f'echo 1 >>{ledger}; {gate.wait("a")}; echo end >>{ledger}', 'echo 2']
    batch = batches.start(lines, [machine], *NO_GPU)
    batch.until('finished: batch.sh.2')
    kill(batch)
    done = batches.run(None, [lab1], *NO_GPU)
    assert done.returncode == 1
    file = machine.yaml()
    assert f'line 1 was started on {file} by an earlier run. Name that machine too' in done.stdout
    assert (f'batch.sh.1: may still run on {file}: name that machine, too, to collect its results'
            in done.stdout)
    assert ledger.read_text() == '1\n'
    gate.open('a')
    wrote(ledger, 'end')
    both = batches.run(None, [lab1, machine], *NO_GPU)
    assert (both.returncode, ledger.read_text()) == (0, '1\nend\n')


@pytest.mark.parametrize('lines_before', [1, 2, 3, 6, 10])
def test_each_job_runs_once_whenever_the_program_dies(batches, lab, project, ledger,
                                                      lines_before):
    (project / 'data').write_bytes(bytes(300_000))
    machine = lab().yaml(max_jobs=3)
    lines = [f'echo {n} >>{ledger}; wc -c <data; echo {n} >made.{n}' for n in range(12)]
    for _ in range(3):
        batch = batches.start(lines, [machine], *NO_GPU)
        for _ in range(lines_before):
            if batch.until('').startswith('done: '):
                break
        kill(batch)
    done = batches.run(lines, [machine], *NO_GPU)
    assert (done.returncode, done.stderr.count('Traceback')) == (0, 0), done.stderr
    assert sorted(map(int, ledger.read_text().split())) == list(range(12))
    for n in range(12):
        assert result(f'batch.sh.{n + 1}') == b'300000\n'
        assert tree_of(RESULTS / f'batch.sh.{n + 1}').keys() == {b'made.%d' % n}


def test_a_connection_that_is_cut(batches, lab, lab1, ledger, gate):
    machine = lab()
    lines = [f'echo 1 >>{ledger}; {gate.wait("a")}; echo end >>{ledger}; echo made >made',
             f'echo 2 >>{ledger}; {gate.wait("b")}']
    batch = batches.start(lines, [machine, lab1], '--reserve', '--away-limit=0', *NO_GPU)
    wrote(ledger, '1', '2')
    machine.stop()
    for name in 'ab':
        gate.open(name)
    done = batch.end()
    assert done.returncode == 1
    assert 'connection lost (1 job may still run)' in done.stderr
    assert 'run the same command again' in done.stdout
    machine.start()
    again = batches.run(None, [machine, lab1], '--reserve', *NO_GPU)
    assert again.returncode == 0, again.stderr
    assert Counter(ledger.read_text().split()) == Counter(['1', '2', 'end'])
    assert {path.name for path in Path(RESULTS).glob('batch.sh.?')} == {'batch.sh.1', 'batch.sh.2'}
