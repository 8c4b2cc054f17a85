"""A result belongs to the command and the files that made it, also after the batch was edited."""
import collections
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import rig
from batching import NO_GPU, RESULTS, argv_of, assert_clean, events, result, wait_until, wrote
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ssh_scheduler as s

AGAIN = 'WARNING: job results already exists for line {}, skipping evaluation: delete if you ' \
    'wish to rerun'
ELSEWHERE = 'WARNING: job results already exists for line {} (done as {}), skipping evaluation: ' \
    'delete if you wish to rerun'


@pytest.fixture
def run(batches, lab1):
    """Run lines on localhost, which has room for a few jobs however busy this computer is."""
    def run(*lines, options=(), start=False):
        how = batches.start if start else batches.run
        return how(lines, ['localhost'], *NO_GPU, '--num-cpus=0.1', *options,
                   env={'SSH_SCHEDULER_PROC': str(lab1.proc)})

    return run


def warnings(done):
    return events(done.stdout, 'WARNING:')


def started(done):
    return [line.partition(': ')[2].partition(';')[0] for line in events(done.stdout, 'started:')]


# ---- Edits, after the jobs have ended ----

def test_an_unchanged_batch_has_the_names_and_warnings_of_the_spec(run):
    assert started(run('echo a', 'echo b')) == ['batch.sh.1', 'batch.sh.2']
    done = run('echo a', 'echo b')
    assert (warnings(done), started(done)) == ([AGAIN.format(1), AGAIN.format(2)], [])


def test_an_inserted_line_is_run_and_the_others_keep_their_results(run):
    run('echo a', 'echo b')
    done = run('echo new', 'echo a', 'echo b')
    assert warnings(done) == [ELSEWHERE.format(2, 'batch.sh.1'), ELSEWHERE.format(3, 'batch.sh.2')]
    assert started(done) == ['batch.sh.1-2']
    assert 'line 1: batch.sh.1-2' in done.stderr
    assert [result(name) for name in ('batch.sh.1', 'batch.sh.2', 'batch.sh.1-2')] == [
        b'a\n', b'b\n', b'new\n']
    again = run('echo new', 'echo a', 'echo b')
    assert started(again) == [] and ELSEWHERE.format(1, 'batch.sh.1-2') in warnings(again)
    assert run('# a', 'echo b', 'echo new', options=['--status']).returncode == 0


def test_equal_lines_have_each_a_result_of_their_own(run, ledger):
    line = f'echo one >>{ledger}'
    run(line, line)
    assert started(run(line, line, line)) == ['batch.sh.3']
    assert started(run(line, 'true', line, line)) == ['batch.sh.2-2']
    assert ledger.read_text() == 'one\n' * 3


def test_results_of_lines_that_are_gone_stay_and_are_told_in_one_line(run):
    run('echo a', 'echo b', 'echo c', 'echo d', 'echo e')
    done = run('echo c')
    assert (started(done), done.returncode) == ([], 0)
    assert done.stderr.splitlines()[-1] == (
        'the results of 4 lines that are no longer in the batch file stay in job_results: '
        'batch.sh.1 and 3 more')
    assert result('batch.sh.5') == b'e\n'


def test_a_failure_is_found_under_its_name_after_an_edit(run):
    run('exit 3', 'true')
    done = run('true', 'exit 3')
    assert (done.returncode, started(done)) == (1, [])
    assert 'batch.sh.1: exit code 3 on localhost, in an earlier run' in done.stdout


@pytest.mark.parametrize('one, other, runs', [
    ('--copy-forwards a', '--copy-forwards a b', True),
    ('--copy-forwards a', '', True), ('', '--copy-backwards --', True),
    ('--exclude x', '--exclude y', True), ('--reserve', '', True),
    ('--memory-required=1', '--memory-required=2', False), ('--num-cpus=0.1', '', False),
    ('--job-name=x', '--job-name=y', False)])
def test_options_of_the_line_count_where_they_change_what_runs(run, project, one, other, runs):
    for name in ('a', 'b'):
        (project / name).touch()
    run(f"execute_remote {one} 'ls'")
    done = run(f"execute_remote {other} 'ls'")
    assert bool(started(done)) == runs, done.stdout + done.stderr


def test_a_new_name_is_none_that_another_line_asks_for(run):
    run('echo a')
    done = run('echo new', "execute_remote --job-name batch.sh.1-2 'echo named'")
    assert sorted(started(done)) == ['batch.sh.1-2', 'batch.sh.1-3']
    assert [result(f'batch.sh.{name}') for name in ('1', '1-2', '1-3')] == [
        b'a\n', b'named\n', b'new\n']


def test_the_longest_name_can_be_changed(run):
    name = 'a' * 180
    run(f"execute_remote --job-name {name} 'echo a'")
    assert started(run(f"execute_remote --job-name {name} 'echo b'")) == [f'{name}-2']


def test_another_batch_of_the_folder_has_results_of_its_own(run, run_cli, lab1):
    run('echo a')
    Path('other.sh').write_text('echo a\n')
    done = run_cli('execute_batch', 'other.sh', *NO_GPU, '--machines', 'localhost')
    assert started(done) == ['other.sh.1']


def test_a_job_results_of_the_version_before_is_read(run, project):
    """Its journal has no identity, no digest of files, and keys without an identity."""
    run('echo a', 'echo b')
    journal = RESULTS / '.ssh_scheduler/journal'
    old = [json.loads(line) for line in journal.read_text().splitlines()]
    for event in old:
        for key in ('files', 'batch', 'own', 'backwards'):
            event.pop(key, None)
    journal.write_text(''.join(json.dumps(event) + '\n' for event in old
                               if event['event'] not in ('journal', 'tidied')))
    shutil.rmtree(RESULTS / '.ssh_scheduler/sent')
    done = run('echo b', 'echo a', 'echo c')
    assert warnings(done) == [ELSEWHERE.format(1, 'batch.sh.2'), ELSEWHERE.format(2, 'batch.sh.1')]
    assert (started(done), done.returncode) == (['batch.sh.3'], 0)
    assert 'no journal' not in done.stderr and 'files changed' not in done.stderr
    assert s.ResultStore('job_results').peek().journal.record('batch.sh.3')['key'] != 'batch.sh.3.1'


def test_digests_of_the_version_before_are_not_compared(run, project):
    (project / 'code').write_text('1')
    run('echo a')
    journal, inner = RESULTS / '.ssh_scheduler/journal', RESULTS / '.ssh_scheduler'
    digest = re.search('"files": "(.*?)"', journal.read_text())[1]
    journal.write_text(journal.read_text().replace(digest, '0123456789abcdef'))
    assert 'files changed' in run('echo a').stderr
    (inner / 'files').mkdir()
    (inner / 'files/0123456789abcdef.json').write_text('{}')
    assert 'files changed' not in run('echo a').stderr


def test_results_without_a_journal_are_kept_and_told(run):
    run('echo a', 'echo b')
    shutil.rmtree(RESULTS / '.ssh_scheduler')
    done = run('echo changed', 'echo b')
    assert warnings(done) == [AGAIN.format(1), AGAIN.format(2)]
    assert ('the journal does not know which commands made batch.sh.1, batch.sh.2'
            in done.stderr.splitlines())
    assert result('batch.sh.1') == b'a\n'
    rows = run('echo changed', 'echo b', options=['--status']).stdout.splitlines()[2:4]
    assert [re.sub('  +', '|', row) for row in rows] == [
        f'.{number}|finished|{rest}|the journal does not know which command made these results'
        for number, rest in ((1, 'changed'), (2, 'b'))]


@pytest.mark.parametrize('left', [['.err'], [''], ['.out', '.err'], ['', '.out']])
def test_results_of_which_a_part_was_deleted_are_told_as_they_are(run, left):
    run('echo a >made', 'true')
    for end in {'', '.out', '.err'} - set(left):
        path = RESULTS / f'batch.sh.1{end}'
        path.unlink() if end else shutil.rmtree(path)
    done = run('echo a >made', 'true')
    assert (warnings(done), started(done)) == ([AGAIN.format(1), AGAIN.format(2)], [])
    (note,) = [line for line in done.stderr.splitlines() if 'only a part' in line]
    paths = [f'job_results/batch.sh.1{end}' for end in ('', '.out', '.err') if end in left]
    assert f'line 1: {" and ".join(paths)}. ' in note
    os.system(note.partition('again: ')[2])             # the note has the exact command
    done = run('echo a >made', 'true')
    assert (started(done), 'only a part' in done.stderr) == (['batch.sh.1'], False)


# ---- Edits, while jobs run and their client is dead ----

def test_a_job_that_runs_belongs_to_its_command_after_an_edit(batches, lab, gate):
    machine = lab()
    lines = [f'{gate.wait("a")}; echo a', f'{gate.wait("b")}; echo b']
    batch = batches.start(lines, [machine], '--num-cpus=0.1', *NO_GPU)
    batch.until('started: batch.sh.2')
    batch.process.kill()
    batch.end()
    batch = batches.start(['echo new', *reversed(lines)], [machine], '--num-cpus=0.1', *NO_GPU)
    batch.until('finished: batch.sh.1-2')
    gate.open('b')
    gate.open('a')
    done = batch.end()
    assert done.returncode == 0, done.stderr
    assert [result(f'batch.sh.{name}') for name in ('1', '2', '1-2')] == [b'a\n', b'b\n', b'new\n']
    assert sorted(events(done.stdout, 'finished:')) == [
        f'finished: batch.sh.1-2; {"echo new"}', f'finished: batch.sh.1; {lines[0]}',
        f'finished: batch.sh.2; {lines[1]}']
    assert_clean(machine)


def test_a_job_whose_line_is_gone_is_collected_and_not_run_again(batches, lab, gate, ledger):
    machine = lab()
    line = f'echo ran >>{ledger}; {gate.wait("a")}; echo a'
    batch = batches.start([line, 'echo b'], [machine], *NO_GPU)
    batch.until('finished: batch.sh.2')
    batch.process.kill()
    batch.end()
    status = batches.run(['echo b'], [], '--status')
    assert '\n.1 ' in status.stdout
    assert status.returncode == 1
    batch = batches.start(['echo b', 'echo c'], [machine], *NO_GPU)
    batch.until('finished: batch.sh.2-2')
    gate.open('a')
    done = batch.end()
    assert (done.returncode, result('batch.sh.1'), ledger.read_text()) == (0, b'a\n', 'ran\n')
    assert f'finished: batch.sh.1; {line}' in done.stdout
    assert 'batch.sh.1' in done.stderr.splitlines()[-1]
    assert_clean(machine)


def test_a_job_that_never_began_and_whose_line_is_gone_is_not_run(batches, lab, client_env, ledger):
    """The client was killed after it wrote the claim and before it started the job."""
    machine, options = lab(), [*NO_GPU, '--copy-forwards']
    argv = argv_of([f'echo gone >>{ledger}'], [machine], options)
    cut = subprocess.run(
        [sys.executable, Path(__file__).with_name('crash.py'), *map(str, argv)],
        env={**client_env, 'CRASH_WHEN': 'after write to journal.*"claimed"'}, capture_output=True)
    assert cut.returncode == -signal.SIGKILL, cut.stderr
    done = batches.run([f'echo new >>{ledger}'], [machine], *options)
    assert (done.returncode, ledger.read_text()) == (0, 'new\n')
    assert 'done: 1 job: 1 finished, 0 failed, ' in done.stdout
    assert_clean(machine)


def test_a_job_whose_line_is_gone_is_cancelled_with_its_batch(batches, lab, outside):
    machine = lab()
    batch = batches.start(['sleep 1000', 'true'], [machine], *NO_GPU)
    batch.until('finished: batch.sh.2')
    batch.process.kill()
    batch.end()
    done = batches.run(['true'], [machine], '--cancel')
    assert done.returncode == 0 and 'batch.sh.1: stopped, on ' in done.stdout
    assert_clean(machine)


def test_a_job_whose_line_is_gone_is_cancelled_with_its_client(batches, lab):
    machine = lab()
    batch = batches.start(['sleep 1000', 'echo b'], [machine], *NO_GPU)
    batch.until('finished: batch.sh.2')
    done = batches.run(['echo b'], [machine], '--cancel')
    assert (done.returncode, batch.process.wait(rig.SAFETY_NET_S)) == (0, 130)
    assert f'batch.sh.1: stopped, on {machine.yaml()}\n' in done.stdout
    assert 'cancelled: 1 job\n' in done.stdout
    assert_clean(machine)


def job_files(machine, name=''):
    """Return the files with the records of all jobs on the machine, or of one job."""
    return [path for path in machine.home.glob(f'.ssh_scheduler/*/jobs/{name}*-*')
            if '.' not in path.name.rpartition('-')[2]]


def record_of(file):
    """Return the words of the record of a job, such as starting PID START BOOT_ID FOLDER."""
    return file.read_text().rpartition('#')[2].split()


@pytest.mark.parametrize('options', [(), ('--retries=0',)])
def test_a_job_whose_line_is_gone_and_that_is_lost_is_not_run_again(batches, lab, ledger, options):
    machine = lab()
    batch = batches.start([f'echo ran >>{ledger}; sleep 1000', 'echo b'], [machine], *NO_GPU)
    batch.until('finished: batch.sh.2')
    wrote(ledger, 'ran')
    batch.process.kill()
    batch.end()
    (file,) = job_files(machine, 'batch.sh.1')
    machine.kill_processes()
    before, boot_id = file.read_text(), record_of(file)[3]
    file.write_text(before.replace(boot_id, '0' * 8 + boot_id[8:]))
    done = batches.run(['echo b'], [machine], *options, *NO_GPU)
    assert 'the machine was restarted. Its line is not in the batch file any more' in done.stderr
    assert (done.returncode, ledger.read_text()) == (0, 'ran\n')
    assert 'done: 1 job: ' in done.stdout and ', 0 failed, ' in done.stdout
    assert_clean(machine)


# ---- Another journal ----

def leave_jobs(batches, machine, gate):
    """Run two jobs, kill their client, and remove job_results, as for a fresh start."""
    lines = [f'echo old >made; {gate.wait("a")}; echo old; exit 3', 'sleep 1000']
    batch = batches.start(lines, [machine], '--num-cpus=0.1', *NO_GPU)
    batch.until('started: batch.sh.2')
    batch.process.kill()
    batch.end()
    shutil.rmtree(RESULTS)
    return lines


def test_a_job_of_another_journal_is_never_taken_for_one_of_this(batches, lab, gate):
    machine = lab()
    lines = leave_jobs(batches, machine, gate)
    done = batches.run(['echo new', 'echo 2'], [machine], '--num-cpus=0.1', *NO_GPU)
    assert (done.returncode, result('batch.sh.1'), result('batch.sh.2')) == (0, b'new\n', b'2\n')
    assert not (RESULTS / 'batch.sh.1/made').exists()
    (note,) = [line for line in done.stderr.splitlines() if 'earlier job_results' in line]
    assert note.startswith(
        f'{machine.yaml()}: 2 jobs of an earlier job_results of this folder run there. ')
    gate.open('a')
    wait_until(lambda: record_of(job_files(machine, 'batch.sh.1')[0])[0] == 'ended', 'its end')

    def earlier(action):
        told = batches._run_cli('execute_batch', '--machines', machine.yaml(),
                                f'--earlier={action}')
        assert (told.returncode, told.stdout.count('Traceback')) == (0, 0), told.stderr
        return told

    told = earlier('show').stdout
    assert told == (f'ended with exit code 3: batch.sh.1 on {machine.yaml()};  {lines[0]}\n'
                    f'running: batch.sh.2 on {machine.yaml()};  {lines[1]}\n')
    assert f'collected: batch.sh.1-earlier; {lines[0]}' in earlier('collect').stdout
    assert result('batch.sh.1-earlier') == b'old\n' and result('batch.sh.1') == b'new\n'
    assert (RESULTS / 'batch.sh.1-earlier/made').read_text() == 'old\n'
    assert any('sleep 1000' in words for _, words in machine.processes())
    assert earlier('remove').stdout.splitlines()[-1] == f'removed: batch.sh.2 on {machine.yaml()}'
    assert earlier('show').stdout == ''
    assert_clean(machine)
    assert '.1-earlier' not in batches.run(['echo new', lines[0].replace('exit 3', 'true')],
                                                   [], '--status').stdout


@pytest.mark.parametrize('moment', ['after write to journal.*"claimed"',
                                    'before write to journal.*"collected"'])
def test_a_collection_that_is_killed_is_completed_by_the_next(batches, client_env, lab, gate,
                                                              moment):
    machine = lab()
    leave_jobs(batches, machine, gate)
    gate.open('a')
    wait_until(lambda: any(record_of(file)[0] == 'ended' for file in job_files(machine)), 'its end')
    argv = ['execute_batch', '--machines', machine.yaml(), '--earlier=collect']
    cut = subprocess.run([sys.executable, Path(__file__).with_name('crash.py'), *argv],
                         env={**client_env, 'CRASH_WHEN': moment}, capture_output=True)
    assert cut.returncode == -signal.SIGKILL, cut.stderr
    assert batches._run_cli(*argv).returncode == 0
    assert result('batch.sh.1-earlier') == b'old\n'
    assert not [*RESULTS.glob('*earlier-2*')]
    batches._run_cli(*argv[:-1], '--earlier=remove')
    assert_clean(machine)


def test_a_command_of_another_journal_is_none_of_this(run_cli, batches, lab, gate):
    """The user ran `rm -r job_results`, as the error of another command advises, too."""
    machine = lab()
    argv = ['execute_remote', '--machine', machine.yaml(), '--job-name', 'n', '--copy-forwards']
    run_cli(*argv, '--detach', '--', f'{gate.wait("a")}; echo old')
    shutil.rmtree(RESULTS)
    done = run_cli(*argv, '--', 'echo new')
    assert (done.returncode, done.stdout) == (0, 'new\n')
    assert '1 job of an earlier job_results of this folder runs there' in done.stderr
    gate.open('a')
    batches._run_cli('execute_batch', '--machines', machine.yaml(), '--earlier=remove')
    assert_clean(machine)


def test_commands_beside_a_batch_are_no_strangers(run_cli, batches, lab, gate):
    machine = lab()
    run_cli('execute_remote', '--machine', machine.yaml(), '--job-name', 'n', '--copy-forwards',
            '--detach', '--', gate.wait('a'))
    done = batches.run(['true'], [machine], *NO_GPU)
    assert (done.returncode, 'earlier' in done.stderr) == (0, False)
    gate.open('a')
    assert run_cli('execute_remote', '--attach=n').returncode == 0


# ---- Another name of the batch file ----

def test_lines_that_have_results_as_another_batch_are_told(run_cli, project):
    def run(path, *lines):
        (project / path).write_text(''.join(f'{line}\n' for line in lines))
        return run_cli('execute_batch', path, *NO_GPU, '--machines', 'localhost', '--dry-run'
                       if lines[0] == 'echo c' else '--num-cpus=0.1')

    (project / 'sub').mkdir()
    run('sub/one.sh', 'true', 'echo a', 'echo b')
    assert 'results as' not in run('two.sh', 'true', 'echo a').stderr       # a copy
    (project / 'sub/one.sh').unlink()
    assert 'results as' not in run('more.sh', 'echo c', 'echo d', 'echo a').stderr
    assert 'results as' not in run('two.sh', 'true', 'echo a').stderr
    said = run('again.sh', 'echo a', 'echo b', 'echo d').stderr.splitlines()
    assert ('2 lines have results as sub_one.sh, and run again as again.sh. To skip these lines, '
            'give the batch file its former name') in said


# ---- Files ----

def test_other_files_than_those_of_earlier_jobs_are_told(run, project):
    (project / 'train.py').write_text('print(1)\n')
    (project / 'large').write_bytes(bytes(200_000))
    lines = ['cat train.py', 'true', 'exit 1']
    run(*lines[:2])
    assert 'files changed' not in run(*lines).stderr            # only the batch file changed
    os.utime(project / 'train.py')                              # its content stays the same
    assert 'files changed' not in run(*lines).stderr
    (project / 'train.py').write_text('print(2)\n')
    (project / 'more').touch()
    (project / 'large').write_bytes(bytes(300_000))
    (note,) = [line for line in run(*lines).stderr.splitlines() if 'files changed' in line]
    assert note == (
        'files changed since: large, train.py: 3 lines that have results had the older files. To '
        'run them again: --rerun {1..3}')
    done = run(*lines, options=('--rerun', '1', '2', '3'))
    assert started(done) == ['batch.sh.1', 'batch.sh.2', 'batch.sh.3']
    assert result('batch.sh.1') == b'print(2)\n' and 'files changed' not in done.stderr


def test_a_pipe_gets_the_option_that_runs_skipped_lines_again(run):
    """The warnings of the specification only advise to delete the results."""
    run('true', 'false', 'true')
    said = run('true', 'false', 'true', options=('--dry-run',)).stderr.splitlines()
    assert 'skipped: 3 lines that have results (1 of them failed: --rerun-failed)' in said
    said = run('true', '#', 'true', 'echo').stderr.splitlines()
    assert 'skipped: 2 lines that have results. To run them again: --rerun 1 3' in said


def test_a_line_that_was_cancelled_keeps_its_name(batches, lab, gate, run_cli):
    """Its command has a second name, since it replaced one that ran."""
    where = [lab()]                     # localhost may be busy, and gets only one job then
    batch = batches.start([gate.wait('a')], where, *NO_GPU)
    batch.until('started: batch.sh.1')
    done = batches.run([f'true; {gate.wait("a")}'], where, *NO_GPU)
    assert '1 line added, batch.sh.1 keeps running, without a line in the batch file' in done.stdout
    batch.until('started: batch.sh.1-2')
    run_cli('execute_batch', 'batch.sh', '--cancel', '1', '1-2')
    assert batch.end().returncode == 1
    shown = run_cli('execute_batch', 'batch.sh', '--status').stdout.splitlines()
    assert [line.split()[0] for line in shown if line.startswith('.')] == ['.1-2']
    again = batches.start(None, where, *NO_GPU)
    again.until('started: batch.sh.1-2')
    gate.open('a')
    assert again.end().returncode == 0


def test_a_job_of_another_line_is_named(run, batches):
    run('true', 'echo')
    done = run('#', 'true', 'echo', options=('--rerun', '3'))
    assert ('batch.sh has no job 3 (line 3 is job batch.sh.2). To see its jobs: execute_batch '
            'batch.sh --status') in done.stderr
    done = run('#', 'true', 'echo', options=('--rerun', '2'))
    assert 'new names' not in done.stderr and started(done) == ['batch.sh.2']
    told = '2 means the job batch.sh.2 (line 3); line 2 is the job batch.sh.1'
    assert told in done.stderr.splitlines()
    assert told in run('#', 'true', 'echo', options=('--follow', '2')).stderr.splitlines()
    assert 'means the job' not in run('true', 'echo', options=('--follow', '2')).stderr


def test_files_that_are_only_new_are_told_apart(run, project):
    lines = ['cat train.py', 'true']
    (project / 'train.py').write_text('print(1)\n')
    run(*lines)
    (project / 'sweep.csv').write_text('a table\n')
    said = run(*lines).stderr
    assert 'new files since: sweep.csv: 2 lines ran without them' in said.splitlines()
    assert 'files changed' not in said
    (project / 'train.py').unlink()
    said = run(*lines).stderr
    assert 'deleted files since: train.py: 2 lines ran with them' in said.splitlines()
    assert 'new files' not in said and 'files changed' not in said
    (project / 'train.py').write_text('print(2)\n')
    (project / 'sweep.csv').unlink()
    run('cat train.py', 'true', 'echo')
    (project / 'train.py').write_text('print(3)\n')
    said = run('cat train.py', 'true', 'echo').stderr
    assert 'files changed since: train.py: 3 lines that have results had the older files.' in (
        said)


def test_the_machine_files_of_a_batch_are_no_files_of_its_jobs(batches, project, lab1, lab):
    files = [project / 'one.yaml', project / 'two.yaml']
    files[0].write_text(lab1.yaml().read_text())
    batches.run(['true'], ['one'], *NO_GPU)
    files[0].write_text(files[0].read_text() + 'max_jobs: 3\n')
    files[1].write_text(lab().yaml().read_text())
    done = batches.run(['true', 'echo'], ['one', './two.yaml'], *NO_GPU)
    assert done.returncode == 0 and 'files changed' not in done.stderr + done.stdout
    assert 'new files' not in done.stderr
    done = batches.run(['true', 'echo'], ['one'], *NO_GPU)
    assert 'new files since: two.yaml: 1 line ran without them' in done.stderr.splitlines()


def test_a_job_that_runs_with_older_files_is_told_too(batches, project, lab, gate):
    machine = lab()
    (project / 'data').write_text('old')
    batch = batches.start([f'{gate.wait("a")}; cat data'], [machine], *NO_GPU)
    batch.until('started: batch.sh.1')
    batch.process.kill()
    batch.end()
    (project / 'data').write_text('new')
    gate.open('a')
    done = batches.run(None, [machine], *NO_GPU)
    assert 'files changed since: data: 1 running line has the older files' in done.stderr
    assert result('batch.sh.1') == b'old'


def test_files_that_change_before_they_are_copied_are_told(batches, project, lab, client_env):
    """The program stops itself right before it starts rsync; meanwhile somebody edits a file."""
    machine, options = lab(), [*NO_GPU, '--copy-forwards', 'large', 'train.py', 'gone']
    (project / 'gone').mkdir()
    (project / 'gone/file').touch()
    (project / 'large').write_bytes(bytes(300_000))
    (project / 'train.py').write_text('old')
    client = subprocess.Popen(
        [sys.executable, Path(__file__).with_name('crash.py'),
         *map(str, argv_of(['cat train.py'], [machine], options))],
        env={**client_env, 'CRASH_WHEN': "before start .*'rsync'", 'CRASH_SIGNAL': 'SIGSTOP'},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert os.WIFSTOPPED(os.waitpid(client.pid, os.WUNTRACED)[1])
    (project / 'train.py').write_text('new!')
    (project / 'gone/file').unlink()
    client.send_signal(signal.SIGCONT)
    _, err = client.communicate(timeout=rig.SAFETY_NET_S)
    assert result('batch.sh.1') == b'new!'
    assert 'gone/file, train.py changed after this run began, so jobs there have the newer files' \
        in err
    again = batches.run(None, [machine], *options)
    assert warnings(again) and 'files changed' not in again.stderr     # the jobs had the new files


@pytest.mark.parametrize('new', ['news', 'a much longer text', ''])
def test_a_line_s_own_files_are_those_of_the_moment_at_which_they_are_sent(batches, project, lab,
                                                                            gate, new):
    machine = lab()
    (project / 'data').write_text('old!')
    lines = [gate.wait('a'), "execute_remote --copy-forwards=data 'cat data'"]
    options = ['--reserve', *NO_GPU, '--copy-forwards']
    batch = batches.start(lines, [machine], *options)
    batch.until('started: batch.sh.1')
    (project / 'data').write_text(new)
    gate.open('a')
    assert batch.end().returncode == 0
    assert result('batch.sh.2') == new.encode()
    again = batches.run(lines, [machine], *options)
    assert 'files changed' not in again.stderr
    (project / 'data').write_text('old!')
    assert 'files changed since: data: ' in batches.run(lines, [machine], *options).stderr


def test_a_file_that_is_removed_while_a_batch_runs_takes_no_machine_away(batches, project, lab,
                                                                         gate):
    machine = lab()
    (project / 'd').mkdir()
    (project / 'd/large').write_bytes(bytes(300_000))
    (project / 'd/gone').touch()
    batch = batches.start([gate.wait('a'), "execute_remote --copy-forwards d -- 'ls d'"], [machine],
                          '--reserve', *NO_GPU, '--copy-forwards')
    batch.until('started: batch.sh.1')
    (project / 'd/gone').unlink()
    (project / 'd/new').touch()
    gate.open('a')
    done = batch.end()
    assert (done.returncode, result('batch.sh.2')) == (0, b'large\nnew\n'), done.stderr
    assert_clean(machine, cache=True)


@pytest.mark.parametrize('names, words', [
    (['b.sh.1'], '1'), (['b.sh.1', 'b.sh.2'], '1 2'), (['b.sh.3', 'b.sh.1', 'b.sh.2', 'b.sh.9'],
                                                       '{1..3} 9'), (['b.sh.1-2', 'x'], None)])
def test_what_runs_jobs_again_names_all_of_them(names, words):
    text = s.rerun_of(names, 'b.sh')
    assert words is None or text == f'--rerun {words}'
    said = subprocess.run(['bash', '-c', f'printf "%s\\n" {text.partition(" ")[2]}'],
                          capture_output=True, text=True, check=True).stdout.split()
    jobs, told = {name: SimpleNamespace(line=0) for name in (*names, 'b.sh.4', 'b.sh.10')}, []
    assert sorted(s.jobs_named(said, jobs, 'b.sh', told.append)) == sorted(names)
    assert told == []


def test_a_manifest_has_all_that_tells_files_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a\udcff').write_text('1')
    (tmp_path / 'link').symlink_to('a')
    (tmp_path / 'large').write_bytes(bytes(100_000))

    def now():
        return s.Manifest.of(s.scan_tree(('.',), ()), s.Tree((), ()))

    first = now()
    assert json.loads(json.dumps(first.files)).keys() == {'a\udcff', 'link', 'large'}
    changes = [lambda: (tmp_path / 'a\udcff').write_text('2'),
               lambda: (tmp_path / 'a\udcff').chmod(0o755),
               lambda: (tmp_path / 'large').write_bytes(bytes(99_999) + b'1'),
               lambda: (tmp_path / 'link').unlink()]
    for change, path in zip(changes, ['a\udcff', 'a\udcff', 'large', 'link']):
        before = now()
        change()
        assert now().changed(before) == [path] and now().digest != before.digest
    assert first.digest == s.Manifest(json.loads(json.dumps(first.files))).digest


# ---- Any edits ----

COMMANDS = st.sampled_from('abcd')
EDITS = st.lists(st.tuples(
    st.sampled_from(['insert', 'delete', 'swap', 'change', 'duplicate', 'comment']),
    st.integers(0, 7), st.integers(0, 7), COMMANDS), max_size=5)


def edit(lines, edits):
    """Return the lines after these edits; at least one is left."""
    lines = list(lines)
    for word, one, other, command in edits:
        one, other = one % len(lines), other % len(lines)
        if word == 'insert':
            lines.insert(one, command)
        elif word == 'delete' and len([line for line in lines if line != '#']) > 1:
            del lines[one]
        elif word == 'swap':
            lines[one], lines[other] = lines[other], lines[one]
        elif word == 'change':
            lines[one] = command
        elif word == 'duplicate':
            lines.insert(other, lines[one])
        elif word == 'comment' and len([line for line in lines if line != '#']) > 1:
            lines[one] = '#'
    return lines if set(lines) - {'#'} else ['a']


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.lists(COMMANDS, min_size=1, max_size=6),
       st.lists(st.tuples(EDITS, st.integers(0, 9)), max_size=5))
def test_any_edits_against_a_model(first, rounds):
    """The model: a command has as many results as the most lines that it had at one time."""
    class Known(s.ResultStore):
        """A job_results in memory, whose jobs have begun or are collected."""

        def exists(self, name):
            return self.journal.record(name).get('state') == 'collected'

    results, wanted, lines = Known('x'), collections.Counter(), first
    known = results.journal.jobs
    for edits, runs in [([], 0), *rounds]:
        lines = edit(lines, edits)
        jobs = [s.Job(f'b.{number}', line, number, None, None)
                for number, line in enumerate(lines, 1) if line != '#']
        found = s.match_lines(jobs, 'b', results)
        assert [job.line for job in found.jobs] == [job.line for job in jobs]
        names = [job.name for job in (*found.jobs, *found.gone)]
        assert len(set(names)) == len(names)
        for job in (*found.begun, *found.done):
            assert known[job.name]['command'] == job.command == lines[job.line - 1]
        for job in found.waiting:
            assert known.get(job.name, {}).get('state') is None
            usual = f'b.{job.line}'
            assert job.name == usual or usual in known
        # The client is killed: some jobs have begun, and some of the begun jobs end.
        for number, job in enumerate(found.waiting):
            known[job.name] = s.Record({'command': job.command, 'state': 'claimed', 'own': '',
                                        'batch': 'b'})
            if runs and number == runs:
                break
        for number, record in enumerate(known.values()):
            if not runs or number % 3 == runs % 3:
                record['state'] = 'collected'
        count = collections.Counter(job.command for job in jobs)
        had = collections.Counter(record['command'] for record in known.values())
        wanted |= count
        assert not had - wanted and (runs or not count - had)


@settings(deadline=None, derandomize=True, max_examples=8,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(COMMANDS, min_size=1, max_size=4),
       st.lists(st.tuples(EDITS, st.sampled_from([None, 1, 2])), min_size=1, max_size=4))
def test_any_edits_kills_and_reruns_of_real_batches(run, outside, first, rounds):
    """Each result's content comes from the command that the journal and the screen name for it."""
    folder = Path(tempfile.mkdtemp(dir=outside))
    ledger, hold = folder / 'ledger', folder / 'hold'
    ledger.touch()
    hold.touch()
    home, wanted, lines = os.getcwd(), collections.Counter(), first
    (folder / 'project').mkdir()
    os.chdir(folder / 'project')
    try:
        for edits, killed_after in [([], None), *rounds, ([], None)]:
            lines = edit(lines, edits)
            text = [line if line == '#' else f'flock -s {hold} true; echo {line} >>{ledger}; '
                    f'echo {line} >made; echo {line}' for line in lines]
            wanted |= collections.Counter(line for line in lines if line != '#')
            if killed_after:
                with open(hold) as file:                # the jobs wait for this lock
                    fcntl.flock(file, fcntl.LOCK_EX)
                    batch = run(*text, start=True, options=['--copy-forwards'])
                    for _ in range(killed_after):
                        if batch.until('').startswith('done: '):
                            break
                    batch.process.kill()
                    batch.end()
                continue
            done = run(*text, options=['--copy-forwards'])
            assert done.returncode == 0, done.stderr
            assert_true_results(done, lines)
            runs = collections.Counter(ledger.read_text().split())
            assert not collections.Counter(filter('#'.__ne__, lines)) - runs and not runs - wanted
    finally:
        os.chdir(home)


def assert_true_results(done, lines):
    """Assert that all lines have results, and that journal and screen name the right commands."""
    journal = s.ResultStore('job_results').peek().journal
    made = collections.Counter()
    for name, record in journal.jobs.items():
        command = record['command'].split()[-1]
        if record['state'] == 'lost':       # its client was killed between the claim and the start
            assert not (RESULTS / name).exists()
            continue
        assert record['state'] == 'collected'
        assert result(name).decode() == (RESULTS / name / 'made').read_text() == f'{command}\n'
        made[command] += 1
    assert not collections.Counter(filter('#'.__ne__, lines)) - made
    for line in events(done.stdout, 'finished:'):
        name, _, command = line.removeprefix('finished: ').partition('; ')
        assert result(name).decode() == f'{command.split()[-1]}\n'
    for line in warnings(done):
        number, _, rest = line.partition(' for line ')[2].partition(',')[0].partition(' ')
        name = rest.removeprefix('(done as ').rstrip(')') or f'batch.sh.{number}'
        assert result(name).decode() == f'{lines[int(number) - 1]}\n'


# ---- The journal's identity ----

def test_each_journal_has_an_identity_and_keeps_it(tmp_path):
    identities = []
    for name in ('one', 'two'):
        folder = str(tmp_path / name)
        for _ in range(2):
            store = s.ResultStore(folder).open()
            journal = store.journal
            journal.write(event='claimed', job='job', attempt=1, machine='m', gpus=None,
                          command='true')
            identities.append(journal.identity)
            assert (journal.record('job')['key'] == journal.key('job', 1)
                    == f'job.1-{journal.identity}')
            store.close()
    assert identities[0] == identities[1] != identities[2] == identities[3]
    wrote(tmp_path / 'one/.ssh_scheduler/journal')


# ---- A folder that moves ----

@pytest.fixture
def left_running(batches, lab, gate, ledger):
    """Return (machine, lines): a job has begun, its client was killed."""
    machine, lines = lab(), [f'echo ran >>{ledger}; {gate.wait("a")}']
    batch = batches.start(lines, [machine], *NO_GPU)
    wrote(ledger, 'ran')
    batch.process.kill()
    batch.end()
    return machine, lines


def test_a_folder_that_was_moved_finds_its_jobs(left_running, batches, gate, ledger, project):
    machine, lines = left_running
    project.rename(project.parent / 'new')
    os.chdir(project.parent / 'new')
    batch = batches.start(lines, [machine], *NO_GPU)
    batch.until('running: batch.sh.1')
    assert len([*machine.home.glob('.ssh_scheduler/*-*/jobs')]) == 1        # no second folder
    gate.open('a')
    done = batch.end()
    assert (done.returncode, ledger.read_text(), done.stderr) == (0, 'ran\n', '')
    assert_clean(machine)


def test_a_copy_of_a_folder_has_jobs_of_its_own(left_running, batches, gate, ledger, project):
    machine, lines = left_running
    copy = project.parent / 'copy'
    shutil.copytree(project, copy, symlinks=True)
    os.chdir(copy)
    dry = batches.run(lines, [machine], *NO_GPU, '--dry-run')
    assert dry.returncode == 0 and json.loads(journal_lines()[0])['folder'] == str(project)
    batch = batches.start(lines, [machine], *NO_GPU)
    batch.until('started: batch.sh.1')
    wrote(ledger, 'ran', 'ran')
    batch.process.kill()
    assert (f'WARNING: this folder is a copy of {project}. Jobs that were started there and not '
            'collected start here again: batch.sh.1\n') in batch.end().stderr
    batch = batches.start(lines, [machine], *NO_GPU)        # the copy finds its own job
    batch.until('running: batch.sh.1')
    gate.open('a')
    gate.open('a')
    done = batch.end()
    assert (done.returncode, ledger.read_text(), 'is a copy' in done.stderr) == (
        0, 'ran\nran\n', False)
    os.chdir(project)
    assert batches.run(lines, [machine], *NO_GPU).returncode == 0
    assert ledger.read_text() == 'ran\nran\n'
    assert_clean(machine)


def journal_lines():
    return (RESULTS / '.ssh_scheduler/journal').read_text().splitlines()


def journal_at(folder, monkeypatch):
    """Return the path of a new journal with an event, made in this folder."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    with contextlib.closing(s.ResultStore('job_results').open()) as store:
        store.journal.write(event='begun', job='b.sh.1')
    return folder


def project_here():
    return s.project_of(s.ResultStore('job_results').peek())


@pytest.mark.parametrize(('how', 'keeps'), [
    ('moved', True), ('renamed computer', True), ('moved to another disk', True),
    ('copied', False), ('copied to another computer', False), ('restored', True),
    ('moved, and a copy put back', False), ('copied to the same path elsewhere', False)])
def test_which_folders_have_the_same_jobs(tmp_path, monkeypatch, how, keeps):
    old, new = journal_at(tmp_path / 'old', monkeypatch), tmp_path / 'new'
    before = project_here()
    assert before == s.project_name()
    if how.startswith('moved') and 'disk' not in how:
        old.rename(new)
    elif how != 'renamed computer':
        shutil.copytree(old, new)
    if how == 'moved to another disk':
        shutil.rmtree(old)
    if how in ('restored', 'moved, and a copy put back', 'copied to the same path elsewhere'):
        if old.exists():
            old.rename(tmp_path / 'away')       # so that the copy has another inode
        shutil.copytree(new, old)
    monkeypatch.chdir(new if how not in (
        'renamed computer', 'restored', 'copied to the same path elsewhere') else old)
    if 'computer' in how or 'elsewhere' in how:
        uname = os.uname()
        monkeypatch.setattr(os, 'uname', lambda: SimpleNamespace(nodename=f'not-{uname.nodename}'))
    assert s.project_name() != before or how == 'restored'
    assert project_here() == (before if keeps else s.project_name())


def test_a_program_in_a_copied_folder_has_jobs_of_its_own(tmp_path, monkeypatch):
    old, new = journal_at(tmp_path / 'old', monkeypatch), tmp_path / 'new'
    shutil.copytree(old, new)
    monkeypatch.chdir(new)
    runner = s.MachineRunner(s.Machine('lab1', 'lab1'))
    assert runner.session.project == s.project_name()
    runner.session.close()
    runner.session.results.close()
    shutil.rmtree(old)                      # a copy is one also without the first folder
    assert project_here() == s.project_name()


def test_a_journal_of_an_older_version_tells_no_folder(tmp_path, monkeypatch):
    journal_at(tmp_path / 'old', monkeypatch)
    first, *rest = journal_lines()
    known = json.loads(first)
    (RESULTS / '.ssh_scheduler/journal').write_text('\n'.join(
        [json.dumps({key: known[key] for key in ('event', 'identity', 'version')}), *rest, '']))
    assert project_here() == s.project_name()
