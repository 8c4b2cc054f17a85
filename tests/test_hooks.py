"""What a batch reports to other programs: --joblog, --on-finish, --on-failure and --report."""
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace as Some

import pytest
import rig
from batching import NO_GPU, RESULTS, Batches, events, result, wait_until, wrote

import ssh_scheduler as s

HEAD = ['Seq', 'Host', 'Starttime', 'JobRuntime', 'Send', 'Receive', 'Exitval', 'Signal', 'Command',
        'Name', 'GPUs', 'PeakMemoryMB', 'PeakGPUMemoryMB', 'Attempt']


@pytest.fixture
def batches(run_cli, start_cli, project, lab1):
    """localhost has room for a few jobs, even while these tests take all processors."""
    return Batches(run_cli, start_cli, env={'SSH_SCHEDULER_PROC': str(lab1.proc)})


@pytest.fixture
def run(batches):
    """Run lines on localhost."""
    return lambda *lines, options=(), **more: batches.run(
        lines, ['localhost'], *NO_GPU, '--num-cpus=0.1', *options, **more)


@pytest.fixture
def start(batches):
    """Start a batch of these lines on localhost; None: of the same lines as before."""
    return lambda lines, *options, **more: batches.start(
        lines, ['localhost'], *NO_GPU, '--num-cpus=0.1', *options, **more)


def rows(path='log'):
    """Return the lines of a job log as {column: value}; assert that it is whole with one header."""
    text = Path(path).read_text()
    assert text.endswith('\n')
    head, *lines = (line.split('\t') for line in text[:-1].split('\n'))
    assert head == HEAD and {len(line) for line in lines} <= {len(HEAD)}
    return [dict(zip(HEAD, line)) for line in lines]


def names(path='log'):
    return sorted(row['Name'] for row in rows(path))


# ---- --joblog: what a line has ----

def test_a_job_log_has_the_columns_of_gnu_parallel_and_ours(run):
    began = time.time()
    assert run('echo abc; echo de >&2', 'exit 3', 'kill -9 $$', 'exit 145', "echo 'a\tb' '\\c'",
               'echo x;\\', 'echo y', options=['--joblog', 'log']).returncode == 1
    found = {row['Seq']: row for row in rows()}
    assert sorted(found) == ['1', '2', '3', '4', '5', '6']
    first = found['1']
    assert [first[name] for name in ('Host', 'Send', 'Receive', 'Exitval', 'Signal', 'Command',
                                     'Name', 'GPUs', 'PeakGPUMemoryMB', 'Attempt')] == [
        'localhost', '0', '7', '0', '0', 'echo abc; echo de >&2', 'batch.sh.1', '', '', '1']
    ends = [(found[n]['Exitval'], found[n]['Signal']) for n in '2345']
    assert ends == [('3', '0'), ('0', '9'), ('145', '0'), ('0', '0')]      # SIGCHLD kills nothing
    assert found['5']['Command'] == r"echo 'a\tb' '\\c'"
    assert found['6']['Command'] == r'echo x;\\\necho y'
    for row in found.values():
        assert began - 1 < float(row['Starttime']) < time.time()
        assert len(row['Starttime'].partition('.')[2]) == 3
        assert 0 <= float(row['JobRuntime']) < 60 and row['JobRuntime'][-4] == '.'


@pytest.mark.parametrize(('code', 'expected'), [
    (0, (0, 0)), (1, (1, 0)), (124, (124, 0)), (128, (128, 0)), (130, (0, 2)), (137, (0, 9)),
    (139, (0, 11)), (143, (0, 15)), (146, (146, 0)), (200, (200, 0)), (255, (255, 0)),
    (-1, (255, 0))])
def test_an_exit_code_is_split_as_gnu_parallel_does(code, expected):
    assert s.exit_and_signal(code) == expected


# ---- --joblog: the file ----

def test_a_rerun_continues_the_file(run):
    run('echo a', 'exit 1', options=['--joblog', 'log'])
    before = Path('log').read_bytes()
    done = run('echo a', 'exit 1', 'echo c', options=['--joblog', 'log'])
    assert Path('log').read_bytes().startswith(before)
    assert names() == ['batch.sh.1', 'batch.sh.2', 'batch.sh.3']
    assert 'files changed' not in done.stderr, done.stderr      # the file is not sent


def test_the_file_is_never_sent(run):
    Path('other').touch()
    run("execute_remote --exclude other 'ls'", options=['--joblog', 'log'])
    assert result('batch.sh.1') == b'batch.sh\n'
    run('ls', options=['--joblog', './log'])
    assert result('batch.sh.1-2') == b'batch.sh\nother\n'


def test_a_job_that_ended_without_a_client_is_written_when_it_is_collected(start, ledger, gate):
    began = time.time()
    batch = start(['true', f'echo begun >>{ledger}; {gate.wait("b")}; sleep 0.1; '
                   f'echo b >>{ledger}; exit 4'], '--joblog', 'log')
    batch.until('finished: batch.sh.1')
    wrote(ledger, 'begun')
    batch.process.kill()
    batch.end()
    at = time.time()
    gate.open('b')
    wrote(ledger, 'b')
    done = start(None, '--joblog', 'log').end()
    assert names() == ['batch.sh.1', 'batch.sh.2'], done
    row, = (row for row in rows() if row['Seq'] == '2')
    assert row['Exitval'] == '4' and began < float(row['Starttime']) < at
    assert 0.1 <= float(row['JobRuntime']) < time.time() - began


def test_an_end_that_is_heard_again_is_not_written_again(start, gate):
    """The results could not be stored, so the next run asks for them again."""
    batch = start([gate.wait('a')], '--joblog', 'log')
    batch.until('started: batch.sh.1')
    (RESULTS / 'batch.sh.1').mkdir()
    gate.open('a')
    assert 'could not be fetched' in batch.end().stderr
    first = Path('log').read_bytes()
    assert names() == ['batch.sh.1']
    (RESULTS / 'batch.sh.1').rmdir()
    done = start(None, '--joblog', 'log').end()
    assert 'finished: batch.sh.1' in done.stdout
    assert Path('log').read_bytes() == first


def test_a_new_job_results_has_new_ends(run):
    for _ in range(2):
        run('echo a', options=['--joblog', '../log'])
        RESULTS.rename(f'old{time.time_ns()}')
    assert names('../log') == ['batch.sh.1'] * 2


def test_a_cancelled_job_is_not_written(start, ledger, gate):
    batch = start(['true', f'echo begun >>{ledger}; {gate.wait("never")}'], '--joblog', 'log')
    batch.until('finished: batch.sh.1')
    wrote(ledger, 'begun')
    batch.process.send_signal(signal.SIGINT)
    assert batch.end().returncode == 130
    assert names() == ['batch.sh.1']


@pytest.mark.parametrize(('path', 'why'), [
    ('missing/log', 'this file cannot be written: No such file or directory.'),
    ('.', 'this file cannot be written: Is a directory.'),
    ('/dev/full', 'this file cannot be written: No space left on device.'),
    ('batch.sh', 'this file has other columns than a job log of execute_batch, so nothing is added '
     'to it. Name another file.')])
def test_a_file_that_cannot_be_used_is_an_error_before_anything_starts(run, path, why):
    done = run('echo a', options=['--joblog', path])
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.splitlines()[0] == f'execute_batch: --joblog {path}: {why}'
    assert Path('batch.sh').read_text() == 'echo a\n' and not RESULTS.exists()


def test_lines_that_the_disk_refuses_follow_later(project):
    """The limit on the size of files acts like a full disk: a part of the line is written."""
    said = []
    log = s.JobLog('log', said.append)

    def end(number):
        job = s.Job(f'b.{number}', 'x' * 50, number, s.Allocation(), None)
        ended = s.JobResult(job.name, 'lab1', 0, 1.0, started=1000.0 + number)
        log.changed(Some(job=job, result=ended, state='ended', streams={}, record={'attempt': 1}),
                    'running')

    end(1)
    size, limits = os.path.getsize('log'), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))
    try:
        end(2)
        end(3)
        assert names() == ['b.1'] and os.path.getsize('log') == size
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert said == ['log cannot be written: No space left on device. The batch keeps '
                    'running, and adds the missing lines when the file can be written']
    end(4)
    log.close()
    assert names() == ['b.1', 'b.2', 'b.3', 'b.4']


def test_a_last_line_that_was_cut_stays_apart(run):
    run('echo a', options=['--joblog', 'log'])
    text = Path('log').read_text()
    Path('log').write_text(text[:-5])
    run('echo b', options=['--joblog', 'log'])
    lines = Path('log').read_text().splitlines()
    assert lines[1] == text[:-5].splitlines()[1] and lines[2].split('\t')[9] == 'batch.sh.1-2'


# ---- --on-finish ----

SHOW = 'env | grep ^SSH_SCHEDULER_ | sort >{}'


def shown(path):
    """Return the variables that a command was given, without SSH_SCHEDULER_ in their names."""
    pairs = (line.partition('=') for line in Path(path).read_text().splitlines())
    return {name[len('SSH_SCHEDULER_'):]: value for name, _, value in pairs
            if name not in ('SSH_SCHEDULER_PROC', 'SSH_SCHEDULER_SHARED')}


def test_on_finish_has_the_counts_and_comes_last(run, lab1, outside):
    path = outside / 'env'
    run('exit 2')
    done = run('exit 2', 'true', 'exit 3', options=[
        '--on-finish', f'{SHOW.format(path)}; read -r x; echo "said $? $x"; echo wrong >&2; '
        'exit 7'], env={'SSH_SCHEDULER_JOB': 'outer', 'SSH_SCHEDULER_PROC': str(lab1.proc)})
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == 'said 1 '
    assert done.stderr.splitlines()[-2:] == ['wrong', '--on-finish: its command failed with exit '
                                             'code 7.']
    found = shown(path)
    assert 0 <= int(found.pop('SECONDS')) < 60
    assert found == {
        'BATCH': 'batch.sh', 'JOBS': '3', 'FINISHED': '1', 'FAILED': '1', 'SKIPPED': '1',
        'CANCELLED': '0', 'NOT_STARTED': '0', 'NOT_COLLECTED': '0', 'STATUS': '1',
        'RESULTS': os.path.abspath('job_results')}


def test_on_finish_comes_after_an_interrupt(start, gate, outside):
    batch = start([gate.wait('never')], '--on-finish', SHOW.format(outside / 'env'))
    batch.until('started: batch.sh.1')
    os.killpg(batch.process.pid, signal.SIGINT)
    assert batch.end().returncode == 130
    found = shown(outside / 'env')
    assert (found['STATUS'], found['CANCELLED'], found['JOBS']) == ('130', '1', '1')


def test_an_interrupt_ends_on_finish_and_changes_no_status(start, ledger):
    batch = start(['true'], '--on-finish', f'sleep 1000 & echo $! >>{ledger}; echo begun; wait')
    batch.until('begun')
    os.killpg(batch.process.pid, signal.SIGINT)
    done = batch.end()
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        0, '--on-finish: its command was stopped, because the client was interrupted.')
    assert rig.ends(int(ledger.read_text()))


def test_on_finish_has_a_limit(project, monkeypatch, capsys):
    monkeypatch.setattr(s, 'FINISH_LIMIT_S', 0.2)
    hooks = s.Hooks('b', {'--on-finish': 'sleep 1000', '--on-failure': None}, None, s.Reporter())
    hooks.begin(Some(began=time.monotonic(), outcome=Some(facts=lambda is_over: {})))
    hooks.finish(0)
    assert capsys.readouterr().err == '--on-finish: its command was stopped after 0.2 s.\n'


def test_on_finish_may_start_a_batch_in_the_same_folder(run, scheduler):
    Path('next.sh').write_text('echo next\n')
    done = run('echo a', options=[
        '--on-finish', f'{sys.executable} {scheduler} execute_batch next.sh --machines localhost '
        f'{" ".join(NO_GPU)}'])
    assert done.returncode == 0, done.stderr
    assert result('next.sh.1') == b'next\n'


def test_a_batch_that_breaks_off_ends_with_on_finish(start, gate, outside):
    batch = start([gate.wait('a')], '--on-finish', SHOW.format(outside / 'env'))
    batch.until('started: batch.sh.1')
    RESULTS.rename('moved')
    gate.open('a')
    done = batch.end()
    assert done.returncode == 2
    assert 'execute_batch: job_results was removed or moved away' in done.stderr
    assert shown(outside / 'env')['STATUS'] == '2'


# ---- --on-failure ----

def test_on_failure_runs_once_while_the_batch_runs_on(run, gate, outside):
    """The last job waits for the command."""
    done = run('echo why >&2; exit 3', 'exit 4', f'{gate.wait("a")}; true', options=[
        '--on-failure', f'cat "$SSH_SCHEDULER_STDERR"; {SHOW.format(outside / "env")}; '
        f'echo x >>{outside}/times; {gate.pull("a")}'])
    assert done.returncode == 1
    found = shown(outside / 'env')
    code = {'batch.sh.1': '3', 'batch.sh.2': '4'}[found['JOB']]
    assert (found['EXIT_CODE'], found['MACHINE'], found['JOBS']) == (code, 'localhost', '3')
    assert found['STDERR'] == os.path.abspath(f'job_results/{found["JOB"]}.err')
    assert 'STATUS' not in found and int(found['FAILED']) >= 1 and found['FINISHED'] == '0'
    counts = Counter({name: int(found[name]) for name in (
        'FINISHED', 'FAILED', 'SKIPPED', 'CANCELLED', 'NOT_STARTED', 'NOT_COLLECTED')})
    assert sum(counts.values()) == 3
    assert (outside / 'times').read_text() == 'x\n'
    if code == '3':
        assert 'why' in done.stdout.splitlines()


def test_on_failure_is_not_run_without_a_failure(run):
    done = run('true', options=['--on-failure', 'echo failed: hook'])
    assert events(done.stdout, 'failed:') == [] and done.returncode == 0


def test_an_interrupt_leaves_on_failure_that_goes_on(start, ledger):
    batch = start(['exit 1'], '--on-failure', f'echo $$ >>{ledger}; echo on; exec sleep 1000',
                  '--on-finish', 'echo over')
    batch.until('on')
    pid = int(ledger.read_text())
    while 'waiting for the command of --on-failure' not in batch.process.stderr.readline():
        assert batch.process.poll() is None
    os.killpg(batch.process.pid, signal.SIGINT)
    done = batch.end()
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == 'over'
    assert done.stderr.splitlines()[-1] == (
        f'--on-failure: its command keeps running here, as process {pid}.')
    wait_until(lambda: rig.cmdline(pid) == 'sleep 1000', 'bash has become it')
    os.kill(pid, signal.SIGKILL)


def test_on_failure_that_goes_on_is_left_after_a_time(project, monkeypatch, capsys):
    monkeypatch.setattr(s, 'FAILURE_LIMIT_S', 0.1)
    processes = s.Processes()
    hooks = s.Hooks('b', {'--on-finish': None, '--on-failure': 'exec sleep 1000'}, processes,
                    s.Reporter())
    hooks.begin(Some(began=time.monotonic(),
                     outcome=Some(facts=lambda is_over: {'RESULTS': '/r'})))
    hooks.lost(Some(name='b.1', result=s.JobResult('b.1', 'lab1', -1, 0.0)))
    hooks.await_failure()
    processes.close()
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith('waiting for the command of --on-failure, at most 0.1 s')
    pid = int(second.rpartition(' ')[2][:-1])
    wait_until(lambda: rig.cmdline(pid) == 'sleep 1000', 'bash has become it')
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_job_that_its_machine_loses_for_good_is_told_of(start, ledger, gate, outside):
    """The job overwrites its record, and kills the process that would write another."""
    batch = start([f'{gate.wait("a")}; echo >~/.ssh_scheduler/*/jobs/batch.sh.1.1-????????; '
                   f'kill -KILL $PPID; echo over >>{ledger}'])
    batch.until('started: batch.sh.1')
    batch.process.send_signal(signal.SIGSTOP)           # the client does not notice the end
    gate.open('a')
    wrote(ledger, 'over')
    batch.process.kill()
    batch.end()
    done = start(None, '--retries=0', '--joblog', 'log', '--on-failure',
                 SHOW.format(outside / 'env')).end()
    assert done.returncode == 1 and 'batch.sh.1: lost on' in done.stderr, done
    row, = rows()
    assert (row['Exitval'], row['Signal'], row['Name']) == ('255', '0', 'batch.sh.1')
    found = shown(outside / 'env')
    assert (found['EXIT_CODE'], found['JOB'], found['FAILED']) == ('255', 'batch.sh.1', '1')


def test_a_failed_job_counts_as_failed_first_and_at_the_end_as_not_collected(start, gate, outside):
    batch = start([f'{gate.wait("a")}; exit 1'], '--on-failure', SHOW.format(outside / 'failure'),
                  '--on-finish', SHOW.format(outside / 'finish'))
    batch.until('started: batch.sh.1')
    (RESULTS / 'batch.sh.1').mkdir()        # in the way of its results
    gate.open('a')
    assert 'could not be fetched' in batch.end().stderr
    first, last = shown(outside / 'failure'), shown(outside / 'finish')
    assert (first['FAILED'], first['NOT_COLLECTED']) == ('1', '0')
    assert (last['FAILED'], last['NOT_COLLECTED']) == ('0', '1')


# ---- Both ----

@pytest.mark.parametrize('option', ['--on-finish', '--on-failure'])
def test_a_command_that_bash_refuses_is_an_error_before_anything_starts(run, option):
    done = run('true', options=[option, "echo 'x"])
    assert (done.returncode, done.stdout) == (2, '') and not RESULTS.exists()
    assert done.stderr.splitlines()[0] == (
        f"execute_batch: {option}: bash refuses this command: unexpected EOF while looking for "
        "matching `''.")


@pytest.mark.parametrize('option', ['--dry-run', '--status', '--cancel'])
def test_nothing_is_told_where_no_batch_runs(run, outside, option):
    run('exit 1')
    told = ['--on-finish', f'touch {outside}/finish', '--on-failure', f'touch {outside}/failure',
            '--joblog', 'log']
    assert 'Traceback' not in run('exit 1', options=[option, *told]).stderr
    assert not [*outside.glob('f*')] and not Path('log').exists()


def test_no_command_is_run_of_a_batch_that_cannot_begin(run, outside):
    done = run("execute_remote --memory-required=99999999 'true'",
               options=['--on-finish', f'touch {outside}/finish'])
    assert done.returncode == 2 and 'no machine has that' in done.stderr
    assert not (outside / 'finish').exists()


# ---- --report ----

def states_in(page):
    """Return how many jobs of the page are in each state."""
    text = page.read_text() if page.exists() else ''
    data = json.loads((re.findall('id="data">(.*)</script>', text) or ['{}'])[0])
    return Counter(data['states'][number] for number in data['jobs']['state']) if data else {}


def test_a_page_at_the_end_and_while_the_batch_runs(start, gate, project):
    page = project / 'report.html'
    batch = start(['echo loss: 1', f'{gate.wait("a")}; echo loss: 2; exit 3'],
                  '--report', 'report.html', '--watch', '1')
    wait_until(lambda: states_in(page) == {'finished': 1, 'running': 1}, 'a page on both jobs')
    gate.open('a')
    done = batch.end()
    assert (done.returncode, 'report' in done.stderr) == (1, False), done
    assert states_in(page) == {'finished': 1, 'failed': 1}
    done = start(['echo loss: 1', 'exit 4'], '--report', 'report.html').end()
    (claim,) = [line for line in (RESULTS / '.ssh_scheduler/journal').read_text().splitlines()
                if '"claimed"' in line and 'exit 4' in line]
    sent = Path('job_results/.ssh_scheduler/sent', json.loads(claim)['files'], 'files.json')
    assert 'batch.sh' in sent.read_text() and 'report.html' not in sent.read_text()


def test_a_page_beside_the_results(run):
    done = run('true', options=['--report', 'job_results/report.html'])
    assert (done.returncode, states_in(RESULTS / 'report.html')) == (0, {'finished': 1}), done


def test_a_page_that_cannot_be_written(run):
    for path in ('no/report.html', '.'):
        done = run('true', options=['--report', path])
        assert (done.returncode, f'--report {path}: this is no file' in done.stderr) == (2, True)
    assert not RESULTS.exists()
    for path, why in (('job_results/x', 'such as job_results/report.html'),
                      ('job_results/.ssh_scheduler/x.html', 'lies where results of jobs may be'),
                      ('', 'this is no file'), ('batch.sh', 'this program did not write')):
        done = run('true', options=['--report', path])
        assert (done.returncode, f'{why}' in done.stderr) == (2, True), done
    assert Path('batch.sh').read_text() == 'true\n'
    done = run('true', options=['--report', '/proc/report.html'])
    assert done.returncode == 0 and result('batch.sh.1') == b''
    assert done.stderr.count('/proc/report.html was not written: ') == 1


def test_a_page_without_results_table(project, tmp_path, scheduler, client_env):
    alone = tmp_path / 'ssh_scheduler.py'
    alone.write_bytes(Path(scheduler).read_bytes())
    (project / 'b.sh').write_text('true\n')
    done = subprocess.run(
        [sys.executable, alone, 'execute_batch', 'b.sh', '--machines', 'localhost', *NO_GPU,
         '--report', 'r.html'], env=client_env, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith(
        'execute_batch: --report needs results_table.py, in the same folder as ssh_scheduler.py: '
        f'{tmp_path}\n'), done
    assert not RESULTS.exists()
