"""Requests of other commands to the client of a batch, and what they do if no client runs."""
import json
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
from batching import NO_GPU, RESULTS, assert_clean, result, wait_until, wrote
from hypothesis import given, settings
from hypothesis import strategies as st

import ssh_scheduler as s

quickly = settings(deadline=None, derandomize=True, max_examples=300)
INBOX = RESULTS / '.ssh_scheduler/inbox'
CRASH = Path(__file__).with_name('crash.py')


@pytest.fixture
def ask(run_cli):
    """Run execute_batch batch.sh with these options."""
    return lambda *options: run_cli('execute_batch', 'batch.sh', *options)


@pytest.fixture
def held(gate, ledger):
    """Return a line that writes its start and its end to the ledger, and waits at its gate."""
    def line(name, end='true'):
        return f'echo {name} >>{ledger}; {gate.wait(name)}; echo {name} ended >>{ledger}; {end}'
    return line


AGAIN = ('The next run of the batch starts cancelled jobs again. To prevent that, delete their '
         'lines\n')


def said(done, *lines, status=0):
    assert (done.returncode, done.stdout.splitlines()) == (status, [*lines]), done.stderr


def journal():
    return s.ResultStore('job_results').peek().journal


def kill(batch):
    batch.process.kill()
    return batch.end()


# ---- Cancelled ----

def test_single_jobs_are_cancelled(batches, ask, lab, held, gate, ledger):
    machine = lab()
    file = machine.yaml(max_jobs=2)
    batch = batches.start([held('a'), held('b'), 'echo c', 'echo d'], [file], *NO_GPU)
    wrote(ledger, 'a', 'b')
    batch.until('started: batch.sh.2')
    done = ask('--cancel', '1', '.3', 'batch.sh.3')
    said(done, f'batch.sh.1: is being stopped on {file}',
         'batch.sh.3: cancelled; it had not started')
    assert done.stderr == AGAIN
    done = ask('--status')      # the first line and the last one have the same numbers
    assert int(re.search(' ([0-9]) waiting ', done.stdout)[1]) == int(
        re.search(r', ([0-9]) waiting\n\Z', done.stdout)[1])
    assert re.search(r'^\.3 +cancelled .* the next run starts it, not this one$', done.stdout, re.M)
    assert re.search(r'^a client runs .* waiting \(([12]) of them cancelled\)', done.stdout)
    done = ask('--follow', '3')
    assert (done.returncode, done.stderr) == (1, 'batch.sh.3 was cancelled\n')
    batch.until('finished: batch.sh.4')         # job 4 takes the place of job 1
    said(ask('--cancel', '3', '4'), 'batch.sh.3: was cancelled before', 'batch.sh.4: has ended')
    gate.open('b')
    done = batch.end()
    assert done.returncode == 1
    assert 'done: 4 jobs: 2 finished, 0 failed, 2 cancelled' in done.stdout
    assert f'batch.sh.1: stopped on {file}. Partial results: ' in done.stderr
    assert sorted(ledger.read_text().splitlines()) == ['a', 'b', 'b ended']
    assert not [*RESULTS.glob('batch.sh.[13]*')]
    assert_clean(machine, cache=True)

    batch = batches.start(None, [machine], *NO_GPU)
    gate.open('a')
    assert batch.end().returncode == 0
    assert (result('batch.sh.3'), Counter(ledger.read_text().splitlines())['a ended']) == (
        b'c\n', 1)


def until_recorded(machine):
    """Wait until the machine has the record that the job of the first line ended."""
    wait_until(lambda: any('#ended ' in path.read_text() for path in machine.home.glob(
        '.ssh_scheduler/*/jobs/batch.sh.1.1-????????')), 'the record of its end')


@pytest.mark.parametrize('dies', [False, True], ids=['the client lives', 'the client is killed'])
@pytest.mark.parametrize('ended', [False, True], ids=['the job runs', 'the job has ended'])
def test_a_job_on_a_machine_that_is_away_is_cancelled_later(batches, ask, lab, held, gate, ledger,
                                                            dies, ended):
    machine = lab()
    lines = [held('a'), held('b')]
    batch = batches.start(lines, [machine], *NO_GPU)
    wrote(ledger, 'a', 'b')
    batch.until('started: batch.sh.2')
    machine.stop()
    while 'connection lost' not in batch.process.stderr.readline():
        pass
    said(ask('--cancel', '1'), f'batch.sh.1: is stopped when '
                               f'{machine.yaml()} is connected again')
    if ended:
        gate.open('a')
        until_recorded(machine)
    if dies:
        kill(batch)
    machine.start()
    if dies:
        batch = batches.start(None, [machine], *NO_GPU)
    gate_of_b(gate, batch, ended, machine)
    done = batch.end()
    fate = '2 finished, 0 failed' if ended else '1 finished, 0 failed, 1 cancelled'
    assert f'done: 2 jobs: {fate}' in done.stdout, done.stderr
    assert ('a ended' in ledger.read_text(), done.returncode) == (ended, int(not ended))
    assert_clean(machine, cache=True)


def gate_of_b(gate, batch, ended, machine):
    """Open the gate of the second job once the first one has finished or was stopped."""
    if ended:
        batch.until('finished: batch.sh.1')
    else:
        line = ''
        while f'batch.sh.1: stopped on {machine.yaml()}' not in line:
            line = batch.process.stderr.readline()
            assert line
    gate.open('b')


def test_cancel_without_a_client(batches, ask, lab, held, gate, ledger):
    machine = lab()
    file = machine.yaml(max_jobs=2)
    batch = batches.start([held('a'), held('b'), 'echo c'], [file], *NO_GPU)
    wrote(ledger, 'a', 'b')
    batch.until('started: batch.sh.2')
    kill(batch)
    said(ask('--cancel', '3'), 'batch.sh.3: does not run, since no client runs the batch. The '
         'same command starts it, unless you delete its line')
    said(ask('--cancel', '1'), f'batch.sh.1: stopped, on {file}',
         'cancelled: 1 job')
    batch = batches.start(['true', held('b'), 'echo c'], [file], *NO_GPU)
    batch.until('running: batch.sh.2')
    gate.open('b')
    assert batch.end().returncode == 0
    assert sorted(ledger.read_text().splitlines()) == ['a', 'b', 'b ended']
    said(ask('--cancel', '2'), 'batch.sh.2: has ended')


def test_a_job_that_had_ended_does_not_count_as_cancelled(batches, ask, lab, held, gate, ledger):
    machine = lab()
    file = machine.yaml(max_jobs=2)
    batch = batches.start([held('a'), held('b')], [file], *NO_GPU)
    wrote(ledger, 'a', 'b')
    batch.until('started: batch.sh.2')
    kill(batch)
    gate.open('a')
    until_recorded(machine)
    done = ask('--cancel')
    said(done, f'batch.sh.1: had ended, and is collected, on {file}',
         f'batch.sh.2: stopped, on {file}', 'cancelled: 1 job')
    assert done.stderr == AGAIN
    assert ask('--cancel').stderr == ''
    assert result('batch.sh.1') == b''


def test_jobs_whose_files_are_on_their_way(batches, ask, lab, outside, project):
    """A job that waits for its files has not started; one whose results are under way has ended."""
    machine = lab()
    machine.hold_sends(outside / 'sent')
    (project / 'data').write_bytes(bytes(300_000))
    batch = batches.start(['wc -c <data', 'cp data made'], [machine], *NO_GPU)
    wait_until((outside / 'sent.awaited').exists, 'the copy')
    said(ask('--cancel', '1'), 'batch.sh.1: cancelled; it had not started')
    machine.hold_fetches(outside / 'fetched')
    (outside / 'sent').touch()
    wait_until((outside / 'fetched.awaited').exists, 'the results')
    said(ask('--cancel', '2'), 'batch.sh.2: has ended')
    done = ask('--rerun', '2')
    assert (done.returncode, done.stdout) == (2, '')
    assert f'the results of batch.sh.2 are still on {machine.yaml()}.' in done.stderr
    (outside / 'fetched').touch()
    done = batch.end()
    assert 'done: 2 jobs: 1 finished, 0 failed, 1 cancelled' in done.stdout, done.stderr
    assert 'cancelled job' not in done.stderr           # the cancelled job left no files
    assert (RESULTS / 'batch.sh.2/made').stat().st_size == 300_000
    assert_clean(machine, cache=True)


def test_a_job_that_is_unknown(batches, ask, lab, held, gate, ledger):
    batch = batches.start([held('a')], [lab()], *NO_GPU)
    wrote(ledger, 'a')
    for option in ('--cancel', '--rerun', '--follow'):
        done = ask(option, '7')
        assert (done.returncode, done.stdout) == (2, '')
        assert done.stderr.startswith(
            'execute_batch: batch.sh has no job 7. To see its jobs: execute_batch batch.sh '
            '--status')
        for word, written in (('7-9', '{7..9}'), ('1,.8', '1 .8')):
            assert (f'has no job {word} (for several jobs write {written}). To see its jobs: '
                    in ask(option, word).stderr)
    gate.open('a')
    assert batch.end().returncode == 0


def test_a_batch_whose_file_was_renamed_keeps_its_name(batches, ask, start_cli, lab, held, gate,
                                                       ledger):
    file = lab().yaml(max_jobs=2)
    lines = ['exit 3', held('a'), held('b'), held('c'), 'true']
    batch = batches.start(lines, [file], *NO_GPU)
    wrote(ledger, 'a', 'b')
    wait_until(lambda: journal().record('batch.sh.1').get('state') == 'collected', 'its results')
    Path('batch.sh').rename('other.sh')
    done = ask('--status')
    assert [line.split()[:2] for line in done.stdout.splitlines()[2:-1]] == [
        ['.1', 'failed'], ['.2', 'running'], ['.3', 'running']]
    assert (done.returncode, done.stderr) == (
        1, 'there is no batch file batch.sh any more. These are the jobs of batch.sh that have '
           'started\n')
    waits = start_cli('execute_batch', 'batch.sh', '--wait')
    said(ask('--cancel', '2'), f'batch.sh.2: is being stopped on {file}')
    wrote(ledger, 'c')
    gate.open('b')
    gate.open('c')
    assert batch.end().returncode == 1
    out, _ = waits.communicate(timeout=rig.SAFETY_NET_S)    # it counts jobs that started later
    assert (waits.returncode, out) == (
        1, '5 jobs: 3 finished, 1 failed, 0 on a machine, 1 waiting\n')
    assert ask('--follow', '3').returncode == 0
    said(ask('--cancel'), 'cancelled: 0 jobs')
    assert 'No such file or directory' in ask('--rerun', '3').stderr
    Path('batch.sh').write_text('true\n')
    assert 'any more' not in ask('--status').stderr


def test_jobs_of_a_batch_whose_file_is_gone_are_cancelled(batches, ask, lab, held, gate, ledger):
    file = lab().yaml()
    batch = batches.start([held('a'), f'execute_remote --job-name own {held("b")!r}'], [file],
                          *NO_GPU)
    wrote(ledger, 'a', 'b')
    Path('batch.sh').unlink()
    done = ask('--cancel')
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, [
        f'batch.sh.1: stopped, on {file}', 'cancelled: 2 jobs', f'own: stopped, on {file}'])
    assert batch.end().returncode == 130


# ---- Run again ----

def test_jobs_run_again_while_the_client_runs(batches, ask, lab, held, gate, ledger, outside):
    machine, go = lab(), outside / 'go'
    lines = [f'echo one >>{ledger}; echo $RANDOM >made; echo out', f'test -e {go}', held('last')]
    batch = batches.start(lines, [machine], *NO_GPU)
    batch.until('started: batch.sh.3')
    wait_until(lambda: journal().record('batch.sh.2').get('state') == 'collected', 'both')
    wait_until(lambda: journal().record('batch.sh.1').get('state') == 'collected', 'both')
    first = (RESULTS / 'batch.sh.1/made').read_text()
    go.touch()
    said(ask('--rerun-failed'), 'batch.sh.2: runs again; its earlier results are batch.sh.2~1')
    batch.until('finished: batch.sh.2')
    done = ask('--rerun', '1')
    said(done, 'batch.sh.1: runs again; its earlier results are batch.sh.1~1')
    assert done.stderr == 'To wait for the end of the batch: execute_batch batch.sh --wait\n'
    batch.until('finished: batch.sh.1')
    done = ask('--rerun', '3')
    assert (done.returncode, done.stdout) == (2, '')
    assert f'batch.sh.3 runs on {machine.yaml()}. Cancel it first' in done.stderr
    done = ask('--rerun-failed')
    assert (done.returncode, 'no job of the batch has failed' in done.stderr) == (2, True)
    gate.open('last')
    done = batch.end()
    assert (done.returncode, 'done: 3 jobs: 3 finished, 0 failed, ' in done.stdout) == (0, True)
    assert (RESULTS / 'batch.sh.1~1/made').read_text() == first
    assert (RESULTS / 'batch.sh.1/made').exists() and result('batch.sh.1~1') == b'out\n'
    assert ledger.read_text().splitlines().count('one') == 2
    assert journal().record('batch.sh.2')['attempt'] == 2
    assert_clean(machine, cache=True)
    again = batches.run(None, [machine], *NO_GPU)       # NAME~1 is the result of no line
    assert again.stdout.count('WARNING: job results already exists') == 3


def test_failed_jobs_run_again_without_a_client(batches, ask, lab, outside):
    machine, go = lab(), outside / 'go'
    lines = ['echo fine', f'echo x >made; test -e {go}', f'echo err >&2; test -e {go}']
    assert batches.run(lines, [machine], *NO_GPU).returncode == 1
    done = ask('--rerun-failed')
    assert done.returncode == 2 and '--machines is missing' in done.stderr
    done = ask('--rerun-failed', '--dry-run', *NO_GPU, '--machines', machine.yaml())
    assert done.stdout.count('would start: ') == 2 and not [*RESULTS.glob('*~1*')]
    go.touch()
    done = batches.run(None, [machine], '--rerun-failed', *NO_GPU)
    assert done.returncode == 0, done.stderr
    assert 'done: 3 jobs: 2 finished, 0 failed, 1 skipped' in done.stdout
    assert '2 jobs run again; earlier results are kept: batch.sh.2~1, batch.sh.3~1' in done.stderr
    assert (RESULTS / 'batch.sh.2~1/made').exists() and result('batch.sh.3~1', 'err') == b'err\n'
    done = batches.run(None, [machine], '--rerun', '2', *NO_GPU)
    assert done.returncode == 0 and {'batch.sh.2~1', 'batch.sh.2~2'} < {
        path.name for path in RESULTS.iterdir()}
    done = batches.run(None, [machine], '--rerun-failed', *NO_GPU)
    assert (done.returncode, 'no job of the batch has failed' in done.stderr) == (0, True)


def test_results_stay_where_no_machine_can_run_the_job_again(batches, lab):
    machine = lab()
    batches.run(['echo fine', 'exit 3'], [machine], *NO_GPU)
    before = {path.name for path in RESULTS.iterdir()}
    for where, *options in ((lab().yaml(port=rig.free_port()),),
                            (machine.yaml(), '--num-cpus=999')):
        done = batches.run(None, [where], '--rerun', '1', '2', *options, *NO_GPU)
        assert done.returncode == 2 and 'earlier results' not in done.stderr
        assert 'no machine' in done.stderr, done.stderr
        assert {path.name for path in RESULTS.iterdir()} == before
    off = lab()                         # it does not answer for a while, and could be larger
    off.freeze()
    batch = batches.start(None, [machine, off], '--rerun', '1', '--num-cpus=999', *NO_GPU)
    batch.until('machine limits')
    batch.process.send_signal(signal.SIGINT)
    assert 'earlier results' not in batch.end().stderr
    assert {path.name for path in RESULTS.iterdir()} == before
    done = batches.run(None, [machine], *NO_GPU)
    assert 'done: 2 jobs: 0 finished, 0 failed, 2 skipped (1 of them failed)' in done.stdout


@pytest.mark.parametrize('when', [
    "before write to journal: b'.*renamed", "after write to journal: b'.*renamed",
    'after rename .*batch.sh.1$', 'after rename .*batch.sh.1.out',
    'before rename .*batch.sh.1.err'])
def test_a_kill_while_results_are_put_aside(batches, lab, client_env, project, when):
    machine = lab()
    assert batches.run(['echo x >made; echo out; exit 1'], [machine], *NO_GPU).returncode == 1
    argv = [sys.executable, str(CRASH), 'execute_batch', 'batch.sh', *NO_GPU, '--rerun-failed',
            '--machines', str(machine.yaml())]
    killed = subprocess.run(argv, env={**client_env, 'CRASH_WHEN': when}, capture_output=True,
                            stdin=subprocess.DEVNULL, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    done = batches.run(None, [machine], *NO_GPU, *['--rerun-failed'] * ('before write' in when))
    assert 'done: 1 job: 0 finished, 1 failed' in done.stdout, done
    here = {path.name for path in RESULTS.iterdir() if path.name != '.ssh_scheduler'}
    assert here == {f'batch.sh.1{number}{end}' for number in ('', '~1')
                    for end in ('', '.out', '.err')}
    assert journal().record('batch.sh.1')['attempt'] == 2


def test_each_action_on_jobs_in_each_state(batches, ask, lab, held, gate, ledger):
    """Jobs: ended, running on a dropped machine, running, waiting.  With a client, and without."""
    machines = [lab(), lab()]
    files = [machine.yaml(max_jobs=1) for machine in machines]
    batch = batches.start(['true', held('a'), held('b'), 'echo w'], files, '--reserve', *NO_GPU)
    wrote(ledger, 'a', 'b')
    for number in (1, 2, 3):
        wait_until(lambda number=number: journal().record(f'batch.sh.{number}'), number)
    wait_until(lambda: journal().record('batch.sh.1')['state'] == 'collected', 'the first')
    where = {number: journal().record(f'batch.sh.{number}')['where'] for number in (2, 3)}
    said(ask('--drop-machine', where[2]),
         f'{where[2]}: gets no more jobs, and its jobs run to their end')
    for number in (2, 3):
        done = ask('--rerun', str(number))
        assert (done.returncode, done.stdout) == (2, '')
        assert f'batch.sh.{number} runs on {where[number]}. Cancel it first' in done.stderr
    said(ask('--rerun', '4', '1'), 'batch.sh.4: waits already',
         'batch.sh.1: runs again; its earlier results are batch.sh.1~1')
    said(ask('--cancel', '1', '2', '4'), 'batch.sh.1: cancelled; it had not started',
         f'batch.sh.2: is being stopped on {where[2]}', 'batch.sh.4: cancelled; it had not started')
    stopped = machines[files.index(Path(where[2]))]
    wait_until(lambda: not stopped.processes(), 'the end of all contact with it')
    said(ask('--cancel', '2'), 'batch.sh.2: was cancelled before')
    said(ask('--rerun', '4'), 'batch.sh.4: runs again')
    kill(batch)

    done = batches.run(None, files, '--rerun', '3', *NO_GPU)
    assert done.returncode == 2 and 'batch.sh.3 may still run. First: execute_batch' in done.stderr
    said(ask('--cancel', '2', '4'), *(
        f'batch.sh.{number}: does not run, since no client runs the batch. The same command '
        'starts it, unless you delete its line' for number in (2, 4)))
    gate.open('b')
    assert ask('--follow', '3').returncode == 0
    said(ask('--cancel', '3'), 'batch.sh.3: has ended')
    assert ask('--wait').returncode == 1                # two have not run
    batch = batches.start(None, files, '--reserve', *NO_GPU)
    gate.open('a')
    done = batch.end()
    assert 'done: 4 jobs: 3 finished, 0 failed, 1 skipped' in done.stdout, done.stderr
    assert Counter(ledger.read_text().splitlines()) == {'a': 2, 'b': 1, 'b ended': 1, 'a ended': 1}
    for machine in machines:
        assert_clean(machine, cache=True)


# ---- The same command again ----

def test_lines_are_added_and_dropped(batches, ask, lab, held, gate, ledger, project):
    machine = lab()
    file = machine.yaml(max_jobs=1)
    (project / 'data').write_text('old')
    batch = batches.start([held('a'), 'echo b', 'cat data', 'echo d'], [file], *NO_GPU)
    wrote(ledger, 'a')
    batch.until('started: batch.sh.1')
    (project / 'data').write_text('new!')
    done = batches.run(['cat data', '# nothing', 'cat data', 'echo d', 'echo e'], [file], *NO_GPU)
    said(done, f'handed to the client that runs (process {batch.process.pid}): '
               '2 lines added, 1 waiting line dropped, batch.sh.1 keeps running, without a line in '
               'the batch file',
         'they get the current files; changed since the batch began: data')
    done = batches.run(None, [file], *NO_GPU)
    said(done, f'handed to the client that runs (process {batch.process.pid}): it has these lines '
               'and machines already')
    gate.open('a')
    done = batch.end()
    assert done.returncode == 0, done.stderr
    assert 'done: 5 jobs: 5 finished' in done.stdout
    assert [line.split(';')[0] for line in done.stdout.splitlines() if line.startswith(
        'started')] == [f'started: batch.sh.{end}' for end in ('1', '1-2', '3', '4', '5')]
    assert (result('batch.sh.1-2'), result('batch.sh.3')) == (b'new!', b'old')
    assert result('batch.sh.5') == b'e\n' and not (RESULTS / 'batch.sh.2.out').exists()
    assert_clean(machine, cache=True)


def test_a_machine_joins_and_another_is_given_back(batches, ask, lab, held, gate, ledger):
    one, two = lab(), lab()
    first, second = one.yaml(max_jobs=1), two.yaml(max_jobs=1)
    lines = [held('a'), held('b'), 'echo c', 'echo d']
    batch = batches.start(lines, [first], *NO_GPU)
    wrote(ledger, 'a')
    batch.until('started: batch.sh.1')
    handed = f'handed to the client that runs (process {batch.process.pid}): '
    lock = RESULTS / '.ssh_scheduler/lock'
    since = os.stat(lock).st_mtime_ns
    said(batches.run(lines, [first, second], *NO_GPU), f'{handed}{second} joins')
    assert os.stat(lock).st_mtime_ns == since           # --status shows when the client began
    said(batches.run(lines, [one.yaml(max_jobs=2), second], *NO_GPU),
         f'{handed}it has these lines and machines already',
         f'{first}: its machine file has changed. This batch uses it as it was')
    one.yaml(max_jobs=1)
    wrote(ledger, 'b')
    done = ask('--drop-machine', 'elsewhere')
    assert (done.returncode, f'elsewhere; it uses {first}, {second}.' in done.stderr) == (2, True)
    said(ask('--drop-machine', first), f'{first}: gets no more jobs, and its jobs run to their end')
    gate.open('a')
    batch.until('finished: batch.sh.1')
    wait_until(lambda: not one.processes(), 'the end of all contact with the first')
    said(batches.run(lines, [second], *NO_GPU), f'{handed}it has these lines and machines already')
    said(batches.run(lines, [first], *NO_GPU), f'{handed}{first} joins',
         f'{second} stays in use. To give it back: execute_batch batch.sh --drop-machine {second}')
    batch.until('finished: batch.sh.4')                 # on the first machine: the second is full
    gate.open('b')
    assert batch.end().returncode == 0
    assert_clean(one, cache=True)
    assert_clean(two, cache=True)


@pytest.mark.parametrize('way', ['well', 'away'])
def test_the_jobs_of_a_machine_move(batches, ask, lab, held, gate, ledger, way):
    one, two = lab(), lab()
    first, second = one.yaml(max_jobs=1), two.yaml(max_jobs=1)
    lines = [held('a'), held('b')]
    batch = batches.start(lines, [first, second], '--reserve', *NO_GPU)
    wrote(ledger, 'a', 'b')
    batch.until('started: ')
    batch.until('started: ')
    where = journal().record('batch.sh.1')['where']
    here, other, machine = (first, second, one) if where == str(first) else (second, first, two)
    if way == 'away':
        machine.stop()
        while 'connection lost' not in batch.process.stderr.readline():
            pass
    said(ask('--drop-machine', here, '--now'), f'{here}: gets no more jobs, and its jobs stop and '
         f'start elsewhere{" when the machine is connected again" * (way == "away")}')
    machine.start() if way == 'away' else None
    gate.open('b')
    batch.until('finished: batch.sh.2')
    batch.until('started: batch.sh.1')
    assert journal().record('batch.sh.1')['where'] == str(other)
    wrote(ledger, 'a', 'a')
    gate.open('a')
    done = batch.end()
    assert (done.returncode, '2 jobs: 2 finished, 0 failed, ' in done.stdout) == (0, True), done
    assert f'batch.sh.1: stopped on {here}; it starts again' in done.stderr
    assert Counter(ledger.read_text().splitlines()) == {'a': 2, 'b': 1, 'a ended': 1, 'b ended': 1}
    assert_clean(one, cache=True)
    assert_clean(two, cache=True)


def test_a_machine_is_dropped_where_no_client_runs(batches, ask, lab, held, gate, ledger):
    machine = lab()
    batch = batches.start([held('a')], [machine], *NO_GPU)
    wrote(ledger, 'a')
    batch.until('started: ')
    kill(batch)
    file = machine.yaml()
    said(ask('--drop-machine', file), f'no client runs batch.sh, so no job starts on {file}. 1 job '
         'may still run there; the same command with --now cancels what runs there')
    said(ask('--drop-machine', file, '--now'), f'batch.sh.1: stopped, on {file}',
         'cancelled: 1 job')


def test_options_that_stay(batches, ask, lab, held, gate, ledger):
    machine = lab()
    file = machine.yaml(max_jobs=1)
    batch = batches.start([held('a'), 'true'], [file], *NO_GPU)
    wrote(ledger, 'a')
    batch.until('started: ')
    handed = f'handed to the client that runs (process {batch.process.pid}): '
    said(batches.run(None, [file], '--retries=3', '--no-gpu-required', '--memory-required=1T'),
         f'{handed}1 waiting line changed',
         'these options stay as they were when the batch began: --retries')
    said(batches.run(None, [file], *NO_GPU), f'{handed}1 waiting line changed')
    done = batches.run(['echo (', 'true'], [file], *NO_GPU)
    assert done.returncode == 2 and 'line 1' in done.stderr
    gate.open('a')
    assert batch.end().returncode == 0


def test_options_for_jobs_that_have_all_started(batches, ask, lab, held, gate, ledger):
    file = lab().yaml()
    batch = batches.start([held('a')], [file], *NO_GPU)
    wrote(ledger, 'a')
    batch.until('started: ')
    handed = f'handed to the client that runs (process {batch.process.pid}): '
    said(batches.run(None, [file], '--num-cpus=2', '--exclude=x', *NO_GPU),
         f'{handed}it has these lines and machines already',
         'no line waits, so these options change nothing: --exclude, --num-cpus')
    done = batches.run([held('a'), held('b')], [file], '--num-cpus=2', *NO_GPU)
    said(done, f'{handed}1 line added')
    assert done.stderr == 'To wait for the end of the batch: execute_batch batch.sh --wait\n'
    wrote(ledger, 'b')
    gate.open('a')
    gate.open('b')
    assert batch.end().returncode == 0


def test_jobs_that_run_again_get_the_files_of_now(batches, ask, lab, held, gate, ledger, project):
    (project / 'script').write_text('echo old; exit 1\n')
    batch = batches.start(['. ./script', held('a')], [lab()], *NO_GPU)
    batch.until('failed: batch.sh.1')
    wait_until(lambda: journal().record('batch.sh.1')['state'] == 'collected', 'its results')
    (project / 'script').write_text('echo new\n')
    said(ask('--rerun-failed'), 'batch.sh.1: runs again; its earlier results are batch.sh.1~1',
         'it gets the current files; changed since the batch began: script')
    batch.until('finished: batch.sh.1')
    wait_until(lambda: journal().record('batch.sh.1')['state'] == 'collected', 'its results')
    said(ask('--rerun', '1'), 'batch.sh.1: runs again; its earlier results are batch.sh.1~2')
    batch.until('finished: batch.sh.1')
    wait_until(lambda: journal().record('batch.sh.1')['state'] == 'collected', 'its results')
    (project / 'script').write_text('echo newest\n')
    said(ask('--rerun', '1'), 'batch.sh.1: runs again; its earlier results are batch.sh.1~3',
         'it gets the current files; changed since the batch began: script')
    batch.until('finished: batch.sh.1')
    gate.open('a')
    assert batch.end().returncode == 0
    assert [result(f'batch.sh.1{end}') for end in ('~1', '~2', '~3', '')] == [
        b'old\n', b'new\n', b'new\n', b'newest\n']


def test_of_equal_lines_the_cancelled_one_is_gone_first(batches, ask, lab, held, gate, ledger):
    file = lab().yaml(max_jobs=1)
    batch = batches.start([held('a'), 'echo same', 'echo same'], [file], *NO_GPU)
    wrote(ledger, 'a')
    batch.until('started: ')
    said(ask('--cancel', '2'), 'batch.sh.2: cancelled; it had not started')
    done = batches.run([held('a'), 'echo same'], [file], *NO_GPU)
    assert 'it has these lines and machines already' in done.stdout
    gate.open('a')
    done = batch.end()
    assert 'done: 3 jobs: 2 finished, 0 failed, 1 cancelled' in done.stdout
    assert result('batch.sh.3') == b'same\n'


def test_a_line_that_is_gone_does_not_start_while_its_files_come(batches, lab, outside, project):
    machine = lab()
    machine.hold_sends(outside / 'sent')
    (project / 'data').write_bytes(bytes(300_000))
    batch = batches.start(['echo a', 'echo b'], [machine], *NO_GPU)
    wait_until((outside / 'sent.awaited').exists, 'the copy')
    done = batches.run(['echo b'], [machine], *NO_GPU)
    assert '1 waiting line dropped' in done.stdout
    (outside / 'sent').touch()
    done = batch.end()
    assert 'done: 1 job: 1 finished' in done.stdout and 'batch.sh.1' not in done.stdout


def test_a_line_that_needs_a_gpu_where_nobody_asked_for_any(batches, lab1, held, gate, ledger):
    batch = batches.start([held('a')], [lab1], *NO_GPU)
    wrote(ledger, 'a')
    done = batches.run([held('a'), 'execute_remote --num-gpus=1 "true"'], [lab1], *NO_GPU)
    assert (done.returncode, done.stdout) == (2, '')
    assert 'batch.sh.2 needs a GPU, and no job of the batch did when it began' in done.stderr
    gate.open('a')
    assert '1 job: 1 finished' in batch.end().stdout


def test_a_machine_that_failed_is_tried_again(batches, lab, held, gate, ledger):
    good, bad = lab(), lab()
    bad.stop()
    batch = batches.start([held('a')], [good, bad], *NO_GPU)
    wrote(ledger, 'a')
    while 'cannot be used' not in batch.process.stderr.readline():
        pass
    bad.start()
    done = batches.run([held('a'), held('b')], [good, bad], *NO_GPU)
    assert done.stdout.endswith(f': 1 line added, {bad.yaml()} joins\n'), done
    for name in 'ab':
        gate.open(name)
    assert batch.end().returncode == 0


def test_the_last_machine_is_not_left_with_its_jobs(batches, ask, lab, held, gate, ledger):
    machine = lab()
    batch = batches.start([held('a'), held('b')], [machine.yaml(max_jobs=1)], *NO_GPU)
    wrote(ledger, 'a')
    done = ask('--drop-machine', machine.yaml(), '--now')
    assert done.returncode == 2 and 'no other machine is in use' in done.stderr
    assert ask('--drop-machine', machine.yaml()).stdout.endswith(
        'no machine is left for 1 job. The same command with --machines adds one\n')
    said(batches.run(None, [machine.yaml(max_jobs=1)], *NO_GPU),
         f'handed to the client that runs (process {batch.process.pid}): {machine.yaml()} joins')
    for name in 'ab':
        gate.open(name)
    assert batch.end().returncode == 0


def test_a_machine_joins_while_the_first_one_is_silent(batches, ask, lab):
    silent, other = lab(), lab()
    silent.freeze()
    batch = batches.start(['echo a', 'echo b'], [silent], *NO_GPU)
    lock = RESULTS / '.ssh_scheduler/lock'
    wait_until(lambda: lock.exists() and lock.read_text(), 'the client')
    wait_until(lambda: ask('--cancel', '1').returncode == 0, 'an answer')
    done = batches.run(None, [silent, other], *NO_GPU)
    assert done.stdout.endswith(f': {other.yaml()} joins\n')
    batch.until('finished: batch.sh.2')
    done = batch.end()
    assert 'done: 2 jobs: 1 finished, 0 failed, 1 cancelled' in done.stdout
    silent.thaw()


def test_lines_from_another_pipe_are_no_new_text(run_cli, start_cli, project, lab, held, gate,
                                                  ledger):
    file = lab().yaml()
    words = ['execute_batch', '-', *NO_GPU, '--machines', file]
    process = start_cli(*words)
    process.stdin.write(held('a') + '\n')
    process.stdin.close()
    wrote(ledger, 'a')
    done = run_cli(*words, stdin='true\n')
    assert done.returncode == 2 and 'in use by another run' in done.stderr
    gate.open('a')
    assert process.wait(rig.SAFETY_NET_S) == 0


# ---- Waited for, and followed ----

NO_CLIENT = ('no client runs this batch, so there is nothing to wait for. To continue it, type the '
             'command that started it\n')


@pytest.mark.parametrize('end, status', [('true', 0), ('false', 1), ('INT', 130), ('KILL', 1)])
def test_waiting_for_a_batch(batches, start_cli, ask, lab, held, gate, ledger, end, status):
    is_signal = end.isupper()
    batch = batches.start([held('a', 'true' if is_signal else end)], [lab()], *NO_GPU)
    wrote(ledger, 'a')
    batch.until('started: ')
    process = start_cli('execute_batch', 'batch.sh', '--wait')
    if is_signal:
        batch.process.send_signal(getattr(signal, f'SIG{end}'))
    else:
        gate.open('a')
    batch.end()
    out, err = process.communicate(timeout=rig.SAFETY_NET_S)
    # A client that was killed at once may have been gone before --wait looked.
    assert process.returncode == status and err in ('', NO_CLIENT) and (is_signal or not err)
    assert out.startswith(f'1 job: {int(end == "true")} finished, {int(end == "false")} failed, ')
    again = ask('--wait')
    assert (again.returncode, again.stdout, again.stderr) == (
        status, out, NO_CLIENT if is_signal else '')


def test_a_job_is_followed(batches, start_cli, ask, lab, gate, ledger):
    machine = lab()
    file = machine.yaml(max_jobs=1)
    lines = [gate.wait('first'), f'echo one; echo err >&2; {gate.wait("a")}; echo two; exit 7']
    batch = batches.start(lines, [file], *NO_GPU)
    batch.until('started: batch.sh.1')
    process = start_cli('execute_batch', 'batch.sh', '--follow', '2')
    assert process.stderr.readline() == 'batch.sh.2 waits\n'
    gate.open('first')
    assert (process.stdout.readline(), process.stderr.readline()) == ('one\n', 'err\n')
    gate.open('a')
    assert (*process.communicate(timeout=rig.SAFETY_NET_S), process.returncode) == ('two\n', '', 7)
    assert batch.end().returncode == 1
    done = ask('--follow', '2')
    assert (done.returncode, done.stdout, done.stderr) == (7, 'one\ntwo\n', 'err\n')


def test_a_job_is_followed_when_its_client_was_killed(batches, start_cli, ask, run_cli, lab, gate):
    machine = lab()
    lines = [f'echo one; {gate.wait("a")}; echo two; {gate.wait("b")}; exit 7', 'true']
    batch = batches.start(lines, [machine.yaml(max_jobs=1)], *NO_GPU)
    batch.until('started: batch.sh.1')
    process = start_cli('execute_batch', 'batch.sh', '--follow', '1')
    assert process.stdout.readline() == 'one\n'
    kill(batch)
    gate.open('a')
    assert process.stdout.readline() == 'two\n'
    process.send_signal(signal.SIGINT)
    _, notes = process.communicate(timeout=rig.SAFETY_NET_S)
    assert process.returncode == 130 and notes.endswith(
        f'batch.sh.1 runs on {machine.yaml()}. To watch it again: execute_batch batch.sh --follow 1'
        '  To cancel it: execute_batch batch.sh --cancel 1\n')
    process = start_cli('execute_remote', '--attach', 'batch.sh.1')
    assert (process.stdout.readline(), process.stdout.readline()) == ('one\n', 'two\n')
    gate.open('b')
    assert process.communicate(timeout=rig.SAFETY_NET_S)[0] == ''
    assert process.returncode == 7
    assert result('batch.sh.1') == b'one\ntwo\n'
    done = ask('--follow', '2')
    assert done.returncode == 1 and 'batch.sh.2 waits, and no client runs batch.sh' in done.stderr


def test_who_only_watches_makes_way_for_the_batch(batches, start_cli, ask, lab, gate):
    machine = lab()
    file = machine.yaml(max_jobs=1)
    lines = [f'echo one; {gate.wait("a")}; echo two; {gate.wait("b")}; echo three', 'echo next']
    batch = batches.start(lines, [file], *NO_GPU)
    batch.until('started: batch.sh.1')
    kill(batch)
    watch = start_cli('execute_batch', 'batch.sh', '--follow', '1')
    assert watch.stdout.readline() == 'one\n'
    batch = batches.start(None, [file], *NO_GPU)
    batch.until('running: batch.sh.1')
    gate.open('a')
    assert watch.stdout.readline() == 'two\n'
    gate.open('b')
    out, err = watch.communicate(timeout=rig.SAFETY_NET_S)
    assert (watch.returncode, out) == (0, 'three\n'), err
    assert batch.end().returncode == 0
    assert (result('batch.sh.1'), result('batch.sh.2')) == (b'one\ntwo\nthree\n', b'next\n')
    assert_clean(machine, cache=True)


def test_two_who_follow_and_a_cancel(batches, start_cli, ask, lab, gate):
    machine = lab(startup={'.profile': 'sleep 1\n'})
    lines = [f'echo one; {gate.wait("a")}; echo two', f'echo other; {gate.wait("b")}']
    batch = batches.start(lines, [machine], *NO_GPU)
    batch.until('started: batch.sh.2')
    kill(batch)
    first, second = (start_cli('execute_batch', 'batch.sh', '--follow', '1') for _ in range(2))
    for watch in (first, second):
        assert watch.stdout.readline() == 'one\n'
    third = start_cli('execute_batch', 'batch.sh', '--follow', '2')
    said(ask('--cancel', '2'), f'batch.sh.2: stopped, on {machine.yaml()}',
         'cancelled: 1 job')
    gate.open('a')
    for watch in (first, second):
        out, err = watch.communicate(timeout=rig.SAFETY_NET_S)
        assert (watch.returncode, out) == (0, 'two\n'), err
    out, err = third.communicate(timeout=rig.SAFETY_NET_S)
    assert third.returncode == 1 and 'no client runs batch.sh' in err
    assert result('batch.sh.1') == b'one\ntwo\n'


def test_a_batch_whose_name_begins_like_that_of_another(batches, run_cli, lab, held, gate, ledger,
                                                        project):
    (project / 'batch').write_text('true\n')
    batch = batches.start([held('a')], [lab()], *NO_GPU)
    wrote(ledger, 'a')
    done = run_cli('execute_batch', 'batch', *NO_GPU, '--machines', 'localhost')
    assert (done.returncode, 'in use by another run' in done.stderr) == (2, True)
    assert not INBOX.exists()
    gate.open('a')
    assert batch.end().returncode == 0


def test_waiting_goes_on_when_the_batch_is_changed(batches, start_cli, lab, held, gate, ledger):
    machine = lab()
    Path('bad.yaml').write_text('no key\n')             # so that the exit status is 1
    batch = batches.start([held('a')], [machine, 'bad.yaml'], *NO_GPU)
    wrote(ledger, 'a')
    process = start_cli('execute_batch', 'batch.sh', '--wait')
    assert batches.run([held('a'), 'true'], [machine], *NO_GPU).returncode == 0
    assert process.poll() is None
    gate.open('a')
    out, _ = process.communicate(timeout=rig.SAFETY_NET_S)
    status = batch.end().returncode
    assert (process.returncode, status) == (1, 1) and out.startswith('2 jobs: 2 finished')


def test_a_client_of_another_computer_that_has_ended(batches, ask, lab):
    """The lock in the shared home has the client's exit status, or no process holds the lock."""
    machine = lab()
    assert batches.run(['false', 'true'], [machine], *NO_GPU).returncode == 1
    lock = RESULTS / '.ssh_scheduler/lock'
    lines = lock.read_text().splitlines()
    lock.write_text('\n'.join(['process 1 on elsewhere', *lines[1:]]) + '\n')
    assert (ask('--wait').returncode, ask('--follow', '2').returncode) == (1, 0)
    said(ask('--cancel', '1'), 'batch.sh.1: has ended')
    done = batches.run(None, [machine], '--rerun-failed', *NO_GPU)
    assert done.returncode == 1 and '0 finished, 1 failed, 1 skipped' in done.stdout


def test_commands_for_single_jobs_know_those_of_batches(batches, start_cli, run_cli, lab, held,
                                                        gate, ledger):
    machine = lab()
    batch = batches.start(['echo 1; ' + held('a'), held('b'), held('c')], [machine], *NO_GPU)
    wrote(ledger, 'a', 'b', 'c')
    batch.until('started: batch.sh.3')
    process = start_cli('execute_remote', '--attach', 'batch.sh.1')
    assert process.stdout.readline() == '1\n'
    file = machine.yaml()
    done = run_cli('execute_remote', '--cancel', 'batch.sh.2')
    assert (done.returncode, done.stdout, done.stderr) == (
        0, '', f'batch.sh.2: is being stopped on {file}\n')
    gate.open('a')
    assert process.wait(rig.SAFETY_NET_S) == 0
    kill(batch)
    done = run_cli('execute_remote', '--cancel', 'batch.sh.3')
    assert (done.returncode, done.stderr.splitlines()) == (0, [
        f'batch.sh.3: stopped, on {file}', 'cancelled: 1 job'])


# ---- The inbox ----

def put(name, content):
    INBOX.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = INBOX / f'{time.time_ns():020}-{name}.request'
    path.with_suffix('.new').write_text(content if isinstance(content, str) else
                                        json.dumps(content))
    path.with_suffix('.new').rename(path)
    return path


def answer_to(path):
    answer = path.with_suffix('.answer')
    wait_until(answer.exists, f'an answer to {path.name}')
    return json.loads(answer.read_text())


CANCEL = {'batch': 'batch.sh', 'action': 'cancel', 'jobs': ['2']}


@pytest.mark.parametrize('how', ['cancel', 'move'])
def test_a_kill_while_jobs_are_stopped(batches, ask, run_cli, lab, outside, ledger, how):
    """The job exits because it was told to: it has not failed, and starts again only if moved."""
    one, two = lab(), lab()
    files = [one.yaml(max_jobs=1), two.yaml(max_jobs=1)]
    line = (f'echo begun >>{ledger}; [ ! -e {outside}/go ] || exit 0; trap "exit 7" TERM; '
            f'until [ -e {outside}/go ]; do sleep 0.05; done; sleep 1; exit 7')
    batch = batches.start([line], files, *NO_GPU)
    wrote(ledger, 'begun')
    batch.until('started: ')
    where = journal().record('batch.sh.1')['where']
    machine = one if where == str(files[0]) else two
    machine.freeze()                        # it gets the request after the client was killed
    assert ask(*(('--cancel', '1') if how == 'cancel' else ('--drop-machine', where, '--now'))
               ).returncode == 0
    wait_until(lambda: journal().record('batch.sh.1').get('stopping'), 'the journal')
    kill(batch)
    (outside / 'go').touch()
    machine.thaw()
    done = batches.run(None, files, *NO_GPU)
    assert ' 0 failed' in done.stdout, done.stdout
    runs = 1 if how == 'cancel' else 2
    assert ledger.read_text().split().count('begun') == runs
    assert ('1 cancelled' if how == 'cancel' else '1 finished') in done.stdout
    assert batches.run(None, files, *NO_GPU).returncode == 0


def test_what_nobody_acted_on_is_acted_on_by_the_next_run_once(batches, lab, held, ledger, gate):
    machine = lab()
    file = machine.yaml(max_jobs=1)
    path, other = put('1', CANCEL), put('2', {**CANCEL, 'batch': 'other.sh'})
    late = put('3', {'batch': 'batch.sh', 'action': 'change', 'argv': [], 'text': ''})
    drop = put('4', {'batch': 'batch.sh', 'action': 'give back', 'machines': [str(file)],
                     'now': False})
    done = batches.run(['echo 1', f'echo 2 >>{ledger}'], [file], *NO_GPU)
    assert answer_to(path)['lines'] == ['batch.sh.2: cancelled; it had not started']
    assert 'typed later' in answer_to(late)['error']
    assert 'typed later' in answer_to(drop)['error']
    assert re.search(r'asked by another command, asked at [0-9:]+: batch.sh.2: cancelled',
                     done.stderr)
    assert 'done: 2 jobs: 1 finished, 0 failed, 1 cancelled' in done.stdout
    assert not path.exists() and other.exists()
    again = batches.run(None, [file], *NO_GPU)
    assert again.returncode == 0 and ledger.read_text() == '2\n'


@pytest.mark.parametrize('content, error', [
    ('{"batch": "batch.sh"', 'is not JSON'), ('[' * 100_000, 'is not JSON'), ('\0', 'is not JSON'),
    ('[]', 'is not a request that this version knows'),
    ('{"action": 3}', 'is not a request that this version knows'),
    ({**CANCEL, 'action': 'rm'}, 'is not a request that this version knows'),
    ({**CANCEL, 'jobs': [1]}, 'is not a request that this version knows'),
    ({**CANCEL, 'jobs': '1'}, 'is not a request that this version knows'),
    ({**CANCEL, 'more': 1}, 'is not a request that this version knows'),
    ({**CANCEL, 'jobs': ['../../x']}, 'has no job ../../x'),
    ({**CANCEL, 'jobs': ['\x1b[2J']}, 'has no job \\x1b[2J'),
    ({'batch': 'batch.sh', 'action': 'change', 'argv': ['--nope'], 'text': ''}, 'unknown option'),
    ({'batch': 'batch.sh', 'action': 'change', 'argv': ['batch.sh'], 'text': ''}, 'no command')])
def test_requests_that_cannot_be_understood(batches, lab, held, gate, ledger, content, error):
    batch = batches.start([held('a')], [lab()], *NO_GPU)
    wrote(ledger, 'a')
    answer = answer_to(put('1', content))
    assert error in answer['error'] and answer['status'] == 2
    gate.open('a')
    done = batch.end()
    assert done.returncode == 0 and '\x1b' not in done.stderr


def test_files_in_the_inbox_that_are_no_requests(batches, ask, lab, held, gate, ledger, outside):
    with open(outside / 'stderr', 'w') as stderr:           # a pipe is too small
        batch = batches.start([held('a')], [lab()], *NO_GPU, stderr=stderr)
    wrote(ledger, 'a')
    INBOX.mkdir(0o700)
    number = f'{time.time_ns():020}'
    (outside / 'secret').write_text(json.dumps(CANCEL))
    (INBOX / f'{number}-1.request').symlink_to(outside / 'secret')
    os.mkfifo(INBOX / f'{number}-2.request')
    (INBOX / f'{number}-3.request').mkdir()
    with open(INBOX / 'large', 'w') as file:
        file.truncate(s.LARGEST_REQUEST + 1)
    (INBOX / 'large').rename(INBOX / f'{number}-4.request')
    for kind, error in enumerate(['is not a file', 'is not a file', 'is not a file',
                                  'is larger than 67.1 MB'], 1):
        assert error in answer_to(INBOX / f'{number}-{kind}.request')['error']
    assert (outside / 'secret').exists()
    for number in range(1000):
        last = put(f'{number}', CANCEL)
    answer_to(last)
    said(ask('--cancel', 'batch.sh.1'), f'batch.sh.1: is being stopped on {lab_of(batch)}')
    assert '1 cancelled' in batch.end().stdout


def lab_of(batch):
    return batch.process.args[-1]


@pytest.mark.skipif(os.getuid() != 0, reason='only root can give a file away')
def test_requests_of_others_are_not_read(batches, lab, held, gate, ledger):
    batch = batches.start([held('a')], [lab()], *NO_GPU)
    wrote(ledger, 'a')
    INBOX.mkdir(0o700)
    path = INBOX / f'{time.time_ns():020}-1.request'
    path.with_suffix('.new').write_text(json.dumps({**CANCEL, 'jobs': ['1']}))
    os.chown(path.with_suffix('.new'), 12345, 12345)
    path.with_suffix('.new').rename(path)
    answer_to(put('2', {**CANCEL, 'jobs': ['9']}))          # a later request
    assert path.exists() and not path.with_suffix('.answer').exists()
    gate.open('a')
    assert batch.end().returncode == 0


@pytest.mark.parametrize('how', ['SIGSTOP', 'SIGKILL'])
def test_a_client_that_does_not_answer(batches, start_cli, lab, held, gate, ledger, scheduler,
                                       client_env, how):
    machine = lab()
    batch = batches.start([held('a')], [machine], *NO_GPU)
    wrote(ledger, 'a')
    batch.until('started: ')
    batch.process.send_signal(signal.SIGSTOP)
    process = subprocess.Popen(
        [sys.executable, CRASH, 'execute_batch', 'batch.sh', '--cancel', '1'],
        env={**client_env, 'CRASH_SETTINGS': json.dumps({
            'ANSWER_LIMIT_S': 2.0 if how == 'SIGSTOP' else 60.0})},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: [*INBOX.glob('*.request')] or process.poll() is not None, 'the request')
    if how == 'SIGKILL':
        batch.process.kill()
    out, err = process.communicate(timeout=rig.SAFETY_NET_S)
    if how == 'SIGKILL':                # the asking command stops the job itself
        assert (process.returncode, out.splitlines()) == (0, [
            f'batch.sh.1: stopped, on {machine.yaml()}',
            'cancelled: 1 job']), err
    else:
        assert process.returncode == 2
        assert ('has not answered for 2 s, so the request was withdrawn. Was it stopped with '
                f'Ctrl-Z? Try: kill -CONT {batch.process.pid}') in err
        batch.process.send_signal(signal.SIGCONT)
        gate.open('a')
        assert batch.end().returncode == 0
    assert not [*INBOX.iterdir()]


# ---- Edits of a batch file ----

def test_lines_that_come_back_are_as_before():
    (job,) = jobs_of('a')
    edit = s.edit_of(jobs_of('b'), {'b.1': job}, {}, set(), {}, lambda name: False)
    assert (edit.gone, [added.name for added in edit.added]) == ({'b.1'}, ['b.1-2'])
    gone = job._replace(forwards=None)
    edit = s.edit_of(jobs_of('a'), {'b.1': gone}, {}, set(), {}, lambda name: False)
    assert (edit.back, edit.added, edit.gone) == ({'b.1': job}, (), frozenset())



COMMANDS = st.sampled_from(['a', 'b', 'c', 'd'])


def jobs_of(commands, memory_mb=100):
    return [s.Job(f'b.{line}', command, line, s.Allocation(memory_mb=memory_mb), s.Forwards())
            for line, command in enumerate(commands, 1)]


@quickly
@given(st.lists(COMMANDS, max_size=8), st.lists(COMMANDS, max_size=8), st.data())
def test_an_edit_leads_to_the_new_text(before, after, data):
    known = {job.name: job for job in jobs_of(before)}
    waiting = {name: job for name, job in known.items() if data.draw(st.booleans())}
    edit = s.edit_of(jobs_of(after), known, waiting, set(), {}, lambda name: False)
    runs = {**{name: job for name, job in known.items() if name not in waiting}, **edit.kept,
            **{job.name: job for job in edit.added}}
    # Each line of the new text has a job; the other jobs had started.
    assert not Counter(after) - Counter(job.command for job in runs.values())
    assert edit.kept.keys() | edit.dropped == waiting.keys()
    assert not edit.kept.keys() & edit.dropped
    assert len({job.name for job in edit.added}) == len(edit.added)
    assert not {job.name for job in edit.added} & (known.keys() - edit.dropped)
    started = Counter(known[name].command for name in known.keys() - waiting.keys())
    wanted = Counter(after)
    for command in wanted | started:
        assert sum(job.command == command for job in runs.values()) == max(
            wanted[command], started[command])
    assert edit.changed == 0
    # A second edit with the same text changes nothing.
    still = {**edit.kept, **{job.name: job for job in edit.added}}
    again = s.edit_of(jobs_of(after), runs, still, set(), {}, lambda name: False)
    assert (again.added, again.dropped) == ((), frozenset())


def test_an_edit_takes_results_of_lines_that_come_back():
    left = {('b', ''): ['b.7']}
    edit = s.edit_of(jobs_of('ab'), {}, {}, set(), left, lambda name: name == 'b.1')
    assert [job.name for job in edit.done] == ['b.7']
    assert [job.name for job in edit.added] == ['b.1-2']


def test_an_edit_changes_options_of_lines_that_wait():
    known = {job.name: job for job in jobs_of('ab')}
    edit = s.edit_of(jobs_of('xab', 200), known, {'b.2': known['b.2']}, set(), {},
                     lambda name: False)
    kept = edit.kept['b.2']
    assert (edit.changed, kept.allocation.memory_mb, kept.line) == (1, 200, 3)
    assert [job.name for job in edit.added] == ['b.1-2']
