"""Shared machines: other people and other batches use them, and no machine is overbooked.

The nvidia-smi and /proc/loadavg of the rig show the values that the test has set.
"""
import json
import os
import re
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import rig
from batching import (
    NO_GPU,
    RESULTS,
    Follower,
    constants,
    result,
    wait_until,
    with_constants,
    wrote,
)

import ssh_scheduler as s

SHARED_GPU = ('--memory-required=100', '--no-reserve-gpu', '--gpu-utilization=0.1')
as_root = pytest.mark.skipif(os.getuid() != 0, reason='only root has machines of other accounts')


class Notes:
    """The stderr of a running program, which goes to a file."""

    def __init__(self, path):
        self.path = path

    def until(self, pattern):
        found = []

        def look():
            found[:] = re.findall(pattern, self.path.read_text(), re.MULTILINE)
            return found

        wait_until(look, pattern)
        return found[0]


@pytest.fixture
def watched(start_cli, project, tmp_path, scheduler):
    """Start a batch whose stderr can be read while it runs: watched(argv) -> Follower, Notes."""
    def start(lines, machines, *options, env=None):
        Path('batch.sh').write_text('\n'.join(lines) + '\n')
        notes = Notes(tmp_path / f'stderr.{len(os.listdir(tmp_path))}')
        with open(notes.path, 'w') as file:
            process = start_cli('execute_batch', 'batch.sh', *options, '--machines',
                                *[machine.yaml() for machine in machines], stderr=file,
                                env=env)
        return Follower(process), notes

    return start


def exclusive(ledger):
    """Assert that no GPU had two jobs at a time; return the highest number of jobs at a time."""
    in_use, most = set(), 0
    for line in ledger.read_text().splitlines():
        word, _, gpu = line.partition(' ')
        if word == 'start':
            assert gpu not in in_use, ledger.read_text()
            in_use.add(gpu)
        else:
            in_use.remove(gpu)
        most = max(most, len(in_use))
    assert not in_use
    return most


# ---- Two batches on one machine ----

def in_folder(tmp_path, monkeypatch, name):
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.chdir(folder)


@pytest.mark.parametrize('account', ['the same', pytest.param('another', marks=as_root)])
def test_two_batches_share_the_gpus_of_a_machine(batches, lab, ledger, tmp_path, monkeypatch,
                                                 account):
    machine = lab(gpus=rig.fake_gpus(3))
    uid = 65533 if account == 'another' else None
    other = machine if uid is None else lab(gpus=rig.fake_gpus(3), uid=uid, beside=machine)
    line = (f'echo start $CUDA_VISIBLE_DEVICES >>{ledger}; sleep 0.3; '
            f'echo end $CUDA_VISIBLE_DEVICES >>{ledger}')
    running = []
    for name, place in (('one', machine), ('two', other)):
        in_folder(tmp_path, monkeypatch, name)
        running.append(batches.start([line] * 8, [place]))
    for name, batch in zip(('one', 'two'), running):
        monkeypatch.chdir(tmp_path / name)
        done = batch.end()
        assert (done.returncode, done.stdout.count('finished: ')) == (0, 8), done.stderr
    assert exclusive(ledger) <= 3
    assert not [*machine.shared.rglob('*')], 'a claim is left'


def test_two_batches_do_not_promise_memory_twice(batches, lab, ledger, gate, tmp_path,
                                                 monkeypatch):
    """The first job does not use its memory yet, so no look at the machine shows it."""
    machine = lab(memory_mb=10000)
    in_folder(tmp_path, monkeypatch, 'one')
    first = batches.start([f'echo one >>{ledger}; {gate.wait("one")}'], [machine],
                          '--no-gpu-required', '--memory-required=6000')
    wrote(ledger, 'one')
    in_folder(tmp_path, monkeypatch, 'two')
    second = batches.start([f'echo two >>{ledger}'], [machine], '--no-gpu-required',
                           '--memory-required=5000')
    assert second.until('machine limits') == f"machine limits:  {{'{machine.yaml()}': 0}}"
    in_folder(tmp_path, monkeypatch, 'three')
    small = batches.run(['echo small'], [machine], '--no-gpu-required', '--memory-required=3000')
    assert small.returncode == 0, small.stderr
    assert ledger.read_text() == 'one\n'
    gate.open('one')
    assert first.end().returncode == 0
    monkeypatch.chdir(tmp_path / 'two')
    assert second.end().returncode == 0
    assert ledger.read_text() == 'one\ntwo\n'


def test_a_reserved_machine_is_reserved_for_other_batches_too(batches, lab, ledger, gate, tmp_path,
                                                              monkeypatch):
    machine = lab()
    in_folder(tmp_path, monkeypatch, 'one')
    first = batches.start([f'echo one >>{ledger}; {gate.wait("one")}; echo end >>{ledger}'],
                          [machine], '--reserve', *NO_GPU)
    wrote(ledger, 'one')
    in_folder(tmp_path, monkeypatch, 'two')
    second = batches.start([f'echo two >>{ledger}'], [machine], *NO_GPU)
    second.until('machine limits')
    gate.open('one')
    assert second.end().returncode == first.end().returncode == 0
    assert ledger.read_text() == 'one\nend\ntwo\n'


def test_the_claim_of_what_was_killed_claims_nothing(batches, lab, ledger, gate, tmp_path,
                                                     monkeypatch):
    machine = lab(gpus=rig.fake_gpus(1))
    in_folder(tmp_path, monkeypatch, 'one')
    first = batches.start([f'echo $PPID >>{ledger}; {gate.wait("never")}'], [machine])
    wait_until(lambda: ledger.read_text().strip(), 'the job')
    os.kill(first.process.pid, signal.SIGKILL)
    first.end()
    claims = [path for path in machine.shared.rglob('*') if path.is_file()]
    assert len(claims) == 1 and claims[0].read_text()
    in_folder(tmp_path, monkeypatch, 'two')
    second = batches.start(['true'], [machine])
    assert second.until('machine limits') == f"machine limits:  {{'{machine.yaml()}': 0}}"
    os.killpg(int(ledger.read_text()), signal.SIGKILL)      # the worker, which records the end
    assert second.end().returncode == 0


def test_a_run_that_goes_on_after_a_kill_counts_its_jobs_once(batches, lab, ledger, gate):
    machine = lab(gpus=rig.fake_gpus(2))
    lines = [f'echo start $CUDA_VISIBLE_DEVICES >>{ledger}; {gate.wait("a")}; '
             f'echo end $CUDA_VISIBLE_DEVICES >>{ledger}',
             *[f'echo start $CUDA_VISIBLE_DEVICES >>{ledger}; {wait}'
               f'echo end $CUDA_VISIBLE_DEVICES >>{ledger}'
               for wait in ('', f'{gate.wait("b")}; ', '', '')]]
    batch = batches.start(lines, [machine], '--gpu-utilization=1')
    batch.until('finished: batch.sh.2')
    os.kill(batch.process.pid, signal.SIGKILL)
    batch.end()
    again = batches.start(None, [machine], '--gpu-utilization=1')
    gate.open('b')
    again.until('finished: batch.sh.5')
    gate.open('a')
    done = again.end()
    assert done.returncode == 0, done.stderr
    assert Counter(ledger.read_text().split())['start'] == 5
    exclusive(ledger)
    assert not [*machine.shared.rglob('*')], 'a claim is left'


# ---- Other people ----

@pytest.fixture
def stranger():
    """The pid of a process that belongs to no batch."""
    with subprocess.Popen(['sleep', '1000']) as process:
        yield process.pid
        process.kill()


def test_load_that_comes_holds_back_starts_and_load_that_goes_lets_go_on(watched, lab, gate,
                                                                         stranger):
    machine = lab(gpus=rig.fake_gpus(1))
    lines = [gate.wait('one'), 'echo two', 'echo three']
    batch, notes = watched(lines, [machine], '--verbose')
    batch.until('started: batch.sh.1')
    (machine.folder / 'gpus.apps').write_text(f'{rig.gpu_row(0)[1]}, {stranger}, 15000\n')
    machine.set_gpus(rig.fake_gpus(1, memory_free_mb=500, utilization=100))
    notes.until('probe  gpu  0, .* 500, (?:.*\n)*.* measured ')
    gate.open('one')
    batch.until('finished: batch.sh.1')
    note = notes.until('^waiting: .* others')
    assert note == ('waiting: 2 jobs for a GPU of its own with 1000 MB: '
                    f'{machine.yaml()} has 1 in use by others')
    assert not (RESULTS / 'batch.sh.2.out').exists()
    machine.set_gpus(rig.fake_gpus(1))
    batch.until('finished: batch.sh.3')
    assert batch.process.wait(rig.SAFETY_NET_S) == 0


def test_without_live_machines_are_looked_at_once(batches, lab, gate):
    machine = lab(gpus=rig.fake_gpus(1))
    batch = batches.start([gate.wait('one'), 'echo two'], [machine], '--no-live', '--verbose')
    batch.until('started: batch.sh.1')
    machine.set_gpus(rig.fake_gpus(1, memory_free_mb=500, utilization=100))
    gate.open('one')
    done = batch.end()
    assert (done.returncode, result('batch.sh.2')) == (0, b'two\n')
    assert 'measured' not in done.stderr


def test_what_own_jobs_have_taken_is_not_counted_twice(watched, lab, gate):
    """Two of three jobs fit.  One of them keeps its memory while the third one starts."""
    machine = lab(gpus=rig.fake_gpus(1, memory_free_mb=15000))
    uuid = rig.gpu_row(0)[1]
    lines = [f'echo "{uuid}, $$, 6000" >>{machine.folder}/gpus.apps; {gate.wait("one")}',
             gate.wait('two'), 'echo three']
    batch, notes = watched(lines, [machine], '--gpu-memory-required=6000', *SHARED_GPU,
                           '--verbose')
    batch.until('started: batch.sh.2')
    wait_until(lambda: uuid in (machine.folder / 'gpus.apps').read_text(), 'the process')
    machine.set_gpus(rig.fake_gpus(1, memory_free_mb=9000))
    notes.until('probe  gpu  0, .* 9000, (?:.*\n)*.* measured ')
    gate.open('two')
    batch.until('finished: batch.sh.3')         # 9000 + 6000 - 2 * 6000 MB are left
    gate.open('one')
    assert batch.process.wait(rig.SAFETY_NET_S) == 0
    journal = [json.loads(line) for line in
               (RESULTS / '.ssh_scheduler/journal').read_text().splitlines()]
    used = {entry['job']: entry for entry in journal if entry['event'] == 'ended'}
    assert used['batch.sh.1']['peak_gpu_memory_mb'] == 6000


@with_constants
@pytest.mark.parametrize('script', ['#!/bin/bash\nexec sleep 1000\n', '#!/bin/bash\nexit 15\n'])
def test_an_nvidia_smi_that_fails_later_holds_back_gpu_jobs_only(watched, lab, gate, script):
    machine = lab(gpus=rig.fake_gpus(1))
    lines = [gate.wait('one'), 'echo two',
             *[f'execute_remote --no-gpu-required "{gate.wait(name)}"' for name in 'abc']]
    batch, notes = watched(lines, [machine], '--verbose', '--memory-required=100', env=constants(
        REMOTE_RUNNER=s.REMOTE_RUNNER.replace('GPU_LIMIT_S=20 ', 'GPU_LIMIT_S=5 ')))
    batch.until('started: batch.sh.5')
    machine.set_gpus([], nvidia_smi=script)
    notes.until(f'^{machine.yaml()}: probe  nvidia_smi  (timeout|15)')
    gate.open('one')
    gate.open('a')
    batch.until('finished: batch.sh.3')
    notes.until('^waiting: 1 job for a GPU of its own with 1000 MB: .* '
                'has (an nvidia-smi that|lost its GPUs)')
    assert not (RESULTS / 'batch.sh.2.out').exists()
    machine.set_gpus(rig.fake_gpus(1))
    batch.until('finished: batch.sh.2')
    gate.open('b')
    gate.open('c')
    assert batch.process.wait(rig.SAFETY_NET_S) == 0


def test_a_gpu_that_others_use_is_the_last_choice(batches, lab, stranger):
    machine = lab(gpus=[{'index': 0, 'memory_free_mb': 15900}, {'index': 1}])
    (machine.folder / 'gpus.apps').write_text(f'{rig.gpu_row(0)[1]}, {stranger}, 100\n')
    done = batches.run(['echo $CUDA_VISIBLE_DEVICES'], [machine])
    assert f'machine gpu choices: {[[1, 0]]}' in done.stdout
    assert result('batch.sh.1') == b'1\n'


# ---- Several GPUs, options of a line ----

def test_several_gpus_for_a_job(batches, lab, gate):
    machine = lab(gpus=rig.fake_gpus(4))
    show = 'echo $CUDA_VISIBLE_DEVICES'
    meet = gate.meeting(3)
    done = batches.run([f'{meet[0]}; {show}', f'execute_remote --num-gpus=1 "{meet[1]}; {show}"',
                        f'execute_remote --no-gpu-required "{meet[2]}; {show}"'],
                       [machine], '--num-gpus=2', '--memory-required=100')
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == 'machine gpu choices: [[[0, 1], [2, 3]]]'
    assert [result(f'batch.sh.{n}') for n in (1, 2, 3)] == [b'0,1\n', b'2\n', b'\n']
    assert 'started: batch.sh.1;  export CUDA_VISIBLE_DEVICES=0,1 && ' in done.stdout


def test_more_gpus_than_any_machine_has(batches, lab1):
    done = batches.run(['true'], [lab1], '--num-gpus=3')
    assert done.returncode == 2
    assert ('line 1 needs 3 GPUs of its own, each with 1000 MB, and no machine has that even when '
            f'idle: {lab1.yaml()} has 2 GPUs.') in done.stderr


def test_each_kind_that_fits_nowhere_is_told(batches, lab1):
    done = batches.run(['true', 'execute_remote --num-gpus=3 true',
                        'execute_remote --num-cpus=99 true'], [lab1])
    assert done.returncode == 2 and 'started' not in done.stdout
    first, second = done.stderr.splitlines()[-2:]
    assert 'line 2 needs 3 GPUs of its own' in first and second.startswith('line 3 needs 99 cores')


def test_more_memory_than_any_machine_has(batches, run_cli, lab1):
    done = batches.run(['true'], [lab1], '--memory-required=9000G')
    assert done.returncode == 2
    assert ('line 1 needs 9216000 MB (9000 GB) of memory (--memory-required), and no machine has '
            f'that even when idle: {lab1.yaml()} has 32000 MB of memory.') in done.stderr
    done = run_cli('execute_remote', '--machine', str(lab1.yaml()), '--num-cpus=99', 'true')
    assert f'the job needs 99 cores (--num-cpus), and {lab1.yaml()} has 8 cores.' in done.stderr


# ---- Politeness ----

@pytest.mark.parametrize('options, nice', [([], 10), (['--nice=0'], 0), (['--nice', '3'], 3)])
def test_jobs_are_nice_and_die_first(batches, lab1, client_home, options, nice):
    lines = ['nice; cat /proc/self/oom_score_adj; bash -c "nice"']
    for machine in (lab1, 'localhost'):
        done = batches.run(lines, [machine], *options, *NO_GPU,
                           env={'SSH_SCHEDULER_PROC': str(lab1.proc)})
        assert done.returncode == 0, done.stderr
        told, score, again = result('batch.sh.1').decode().split()
        assert int(told) == int(again) == min(os.nice(0) + nice, 19)
        assert int(score) >= 500
        for path in RESULTS.glob('batch*'):
            rig.remove(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize('value', ['-1', '20', '1.5', 'x'])
def test_a_wrong_niceness(batches, lab1, value):
    done = batches.run(['true'], [lab1], f'--nice={value}', *NO_GPU)
    assert done.returncode == 2 and '--nice must be a ' in done.stderr
    assert not RESULTS.exists()


# ---- Resources that a job used ----

def test_what_a_job_used_is_noted_and_told_if_far_less_was_enough(watched, lab, gate):
    machine = lab(memory_mb=8000)
    hold = ('python3 -c "import time; b = bytearray(50_000_000); time.sleep(4.5); '
            f'open(\'{gate.path("seen")}\').readline()"')
    busy = 'python3 -c "import time; all(iter(lambda: time.process_time() < 0.4, False))"'
    batch, notes = watched([hold, busy, 'true'], [machine], '--no-gpu-required',
                           '--memory-required=7000', '--verbose')
    notes.until(r'used  batch\.sh\.1\S*  ([5-9][0-9]{4}|1[0-9]{5})$')    # kB
    gate.open('seen')
    assert batch.end().returncode == 0, notes.path.read_text()
    journal = [json.loads(line) for line in
               (RESULTS / '.ssh_scheduler/journal').read_text().splitlines()]
    used = {entry['job'][-1]: entry for entry in journal if entry['event'] == 'ended'}
    assert 50 < used['1']['peak_memory_mb'] < 150
    assert 4 < used['1']['wall_s'] < 60
    assert 0.2 < used['2']['cpu_s'] < 5 and used['3'].get('cpu_s', 0) < 0.2
    peak = max(entry.get('peak_memory_mb', 0) for entry in used.values())
    advice = re.search(rf'^asked 7000 MB, used at most {peak}: with --memory-required=(\d+) '
                       rf'{re.escape(str(machine.yaml()))} would run (\d+) at once$',
                       notes.path.read_text(), re.MULTILINE)
    assert advice, notes.path.read_text()
    assert peak < int(advice[1]) <= 400 and int(advice[2]) == 12      # 1.5 x 8 cores


def test_jobs_that_wait_for_gpus_and_use_none_are_told(batches, lab):
    machine = lab(gpus=rig.fake_gpus(1))
    file, uuid = machine.yaml(), rig.gpu_row(0)[1]
    options = ('--memory-required=100', '--num-cpus=4')
    done = batches.run(['sleep 12', 'echo 2', 'echo 3'], [file], *options)
    assert done.returncode == 0, done.stderr
    assert ('no job was seen to use its GPU: if the jobs need none, with --no-gpu-required '
            f'{file} would run 3 at once') in done.stderr.splitlines()
    machine.set_gpus(rig.fake_gpus(1, memory_free_mb=10000))
    uses = f'echo "{uuid}, $$, 6000" >>{machine.folder}/gpus.apps; sleep 7.5'
    done = batches.run([uses, 'echo 4', 'echo 5'], [file], *options)
    assert (done.returncode, 'no job was seen' in done.stderr) == (0, False)


@pytest.mark.parametrize('pid, used', [('$$', '[N/A]'), ('1', '6000')], ids=['memory', 'process'])
def test_jobs_are_not_told_to_use_no_gpu_where_nobody_knows(batches, lab, pid, used):
    machine = lab(gpus=rig.fake_gpus(1, memory_free_mb=10000))
    uses = f'echo "{rig.gpu_row(0)[1]}, {pid}, {used}" >>{machine.folder}/gpus.apps; sleep 7.5'
    done = batches.run([uses, 'echo 2', 'echo 3'], [machine.yaml()], '--memory-required=100',
                       '--num-cpus=4')
    assert (done.returncode, 'no job was seen' in done.stderr) == (0, False), done.stderr


def test_there_is_no_advice_where_it_would_not_help(batches, lab1):
    done = batches.run(['sleep 2.5'], [lab1], '--no-gpu-required', '--memory-required=7000')
    assert done.returncode == 0 and 'asked' not in done.stderr


def test_an_interrupt_after_a_machine_was_lost(watched, lab, gate):
    one, two = lab(), lab()
    batch, notes = watched([gate.wait('a'), gate.wait('b')], [one, two], *NO_GPU, '--reserve')
    batch.until('started: ')
    batch.until('started: ')
    one.stop()
    notes.until('connection lost')
    os.kill(batch.process.pid, signal.SIGINT)
    batch.until('interrupted: 2 jobs: 0 finished, 0 failed')
    assert batch.process.wait(rig.SAFETY_NET_S) == 130
    assert 'Traceback' not in notes.path.read_text()
