"""execute_remote: one command on one machine, as if it ran here; with real sshds and processes."""
import hashlib
import os
import pty
import re
import signal
import socket
import statistics
import subprocess
import sys
import termios
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
    places,
    result,
    until_sleep,
    wait_until,
    with_constants,
    wrote,
)
from commands import (
    Running,
    assert_ended,
    at_terminal,
    nasty_pids,
    nasty_tree,
    peak_mb,
    word,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lines import job_files, record_of

import ssh_scheduler as s

PATIENT = {'ServerAliveInterval': '1', 'ServerAliveCountMax': '2'}     # a cut shows after 2 s
BYTES = bytes(range(256))
# Writes the same bytes each time, 8 for each number, so that no piece repeats.
NUMBERED = 'import sys; [sys.stdout.buffer.write(b"%%07d\\n" %% n) for n in range(%d)]'


def numbered(count):
    return b''.join(b'%07d\n' % n for n in range(count))


@pytest.fixture
def start(start_cli, project):
    """Start execute_remote: start(machine or None, command or None, *options) -> Running."""
    def begin(machine, command, *options, **settings):
        at = [] if machine is None else ['--machine', word(machine)]
        command = [] if command is None else ['--', command]
        return Running(start_cli('execute_remote', *options, *at, *command, binary=True,
                                 **settings))

    return begin


@pytest.fixture
def run(start):
    """Run execute_remote to its end, with an empty standard input."""
    def begin(*words, stdin=subprocess.DEVNULL, **settings):
        return start(*words, stdin=stdin, **settings).end()

    return begin


@pytest.fixture(params=['ssh', 'localhost'])
def machine(request):
    return request.getfixturevalue('lab1') if request.param == 'ssh' else 'localhost'


@pytest.fixture
def clean(machine, client_home):
    """Assert that nothing is left on the machine."""
    def check():
        if machine == 'localhost':
            wait_until(lambda: not any(places(client_home).values()), 'the end of what was killed')
        else:
            assert_clean(machine)

    return check


# ---- Output and exit status ----

def test_the_example_of_the_usage(run, machine, clean):
    done = run(machine, 'echo out; echo err >&2; exit 7', '--job-name', 'first')
    assert (done.status, done.out, done.err) == (7, b'out\n', b'err\n')
    assert (result('first'), result('first', 'err')) == (b'out\n', b'err\n')
    assert not [*(RESULTS / 'first').iterdir()]
    clean()


@pytest.mark.parametrize('command, status', [
    ('true', 0), ('exit 1', 1), ('exit 7', 7), ('exit 125', 125), ('exit 255', 255),
    ('kill -TERM $$', 143), ('kill -KILL $$', 137), ('bash -c "kill -SEGV \\$\\$"', 139),
    ('no-such-program', 127), ('if', 2)])
def test_the_exit_status_is_that_of_the_command(run, lab1, command, status):
    done = run(lab1, command)
    assert (done.status, done.out) == (status, b'')
    assert_clean(lab1)


@pytest.mark.parametrize('data', [
    b'', b'\n', b'no end', b'\0', b'\0\0\n\0', BYTES, BYTES * 5, b'x' * 600, b'x' * 601,
    '\u00e4\u20ac\U0001f600'.encode(), b'\xff\xfe\n', b'\r\n\r', b'\x1b[31mred\x1b[m\n',
    BYTES * 2000, BYTES * 40000], ids=lambda data: f'{len(data)}:{data[:6]!r}')
def test_both_streams_come_byte_for_byte(run, machine, outside, data, clean):
    (outside / 'data').write_bytes(data)
    done = run(machine, f'cd {outside}; cat data; cat data data >&2; exit 3', '--job-name', 'b')
    assert done.status == 3
    assert (done.out == data, done.err == data + data) == (True, True)
    assert (result('b'), result('b', 'err')) == (data, data + data)
    clean()


def test_only_what_the_command_says_is_on_stdout(run, lab1, project):
    (project / 'file').write_text('text')
    done = run(lab1, 'cat file; echo made >made')
    assert (done.status, done.out) == (0, b'text')
    name = re.fullmatch(rf'job (cat-\d{{4}}) on {lab1.yaml()}', done.notes[0])[1]
    assert done.notes[1:] == [f'{lab1.yaml()}: sent 1 file, 4 bytes']
    assert (RESULTS / name / 'made').read_text() == 'made\n'


@pytest.mark.parametrize('command, word', [
    ('python3 -u src/train.py --lr 0.1', 'train'), ('bash run-all.sh', 'run-all'),
    ('python3 -m pkg.eval --x', 'eval'), ('python3.11 -u -m eval', 'eval'),
    ('cd src && A=1 B="x y" ./bin/fit -v', 'fit'), ('export A=1; source env; sleep 5', 'sleep'),
    ('torchrun --nproc 2 train.py; true', 'train'), ('nvidia-smi -L', 'nvidia-smi'),
    ('python3 -c "print(1)"', 'python3'), ("'/opt/a b/x y' z", 'a'), ('cd src', 'command'),
    ('', 'command'), ('../' + 'long' * 20, 'long' * 6), ('é', 'command'), ('--x', 'x')])
def test_a_made_up_name_is_short_and_tells_the_program(command, word):
    assert s.new_name(command) == f'{word}-{time.strftime("%m%d")}'


@settings(derandomize=True, max_examples=300)
@given(st.text(max_size=40) | st.text('ab./-_=;&|\'" $(){}py\n', max_size=40))
def test_a_made_up_name_is_a_name(command):
    name = s.new_name(command)
    s.check_job_name(name, 'here', 40)
    assert re.fullmatch(r'.{1,24}-\d{4}', name)


def test_clients_that_start_at_once_have_names_of_their_own(start, lab1, project):
    (project / 'job_results').mkdir()
    day = time.strftime('%m%d')
    (project / f'job_results/tr-{day}-2.err').write_text('mine')
    clients = [start(lab1, f'tr a b <<<{number}a', '--copy-forwards') for number in range(6)]
    done = [client.end() for client in clients]
    assert [end.out for end in done] == [f'{number}b\n'.encode() for number in range(6)]
    names = [re.match(r'job (\S+) on', end.notes[0])[1] for end in done]
    assert sorted(names) == sorted([f'tr-{day}', *(f'tr-{day}-{n}' for n in range(3, 8))])
    for number, name in enumerate(names):
        assert result(name) == f'{number}b\n'.encode()


def test_a_name_is_free_again_where_nothing_was_started(run, lab1, project):
    for _ in range(2):
        done = run('nowhere.invalid:1', 'true', '--away-limit', '0')
        assert done.status == 125
        assert not (project / 'job_results').exists()


def test_a_job_that_takes_too_long_is_stopped(run, lab1):
    done = run(lab1, 'echo begun; sleep 1000', '--timeout', '0.1m', '--job-name', 'late')
    assert (done.status, done.out) == (124, b'begun\n')
    assert b'its time limit' in done.err


def test_either_form_of_machine_is_taken(run_cli, lab1, project):
    done = run_cli('execute_remote', '--machines', lab1.yaml(), '--copy-forwards', '--', 'echo a')
    assert (done.returncode, done.stdout) == (0, 'a\n')


def test_a_list_of_machines_may_have_one(run, lab1, project):
    (project / 'one').write_text(f'# the only one\n{lab1.yaml()}\n')
    done = run('@one', 'echo a', '--copy-forwards', '--job-name', 'n')
    assert (done.status, done.out) == (0, b'a\n')
    (project / 'two').write_text(f'{lab1.yaml()}\nlocalhost\n')
    done = run('@two', 'echo a')
    assert done.status == 2 and not (project / 'job_results/echo').exists()
    assert done.notes == [
        f'execute_remote: the command runs on one machine, and 2 are named: {lab1.yaml()}, '
        'localhost. For many machines: execute_to or execute_batch.']


def test_it_says_nothing_at_all_where_there_is_nothing_to_say(run, lab1):
    done = run(lab1, 'true', '--job-name', 'quiet')
    assert (done.status, done.out, done.err) == (0, b'', b'')
    assert lab1.logins() > 0


def test_one_login_is_enough(run, lab):
    machine = lab()
    assert run(machine, 'echo x; head -c 1000000 /dev/zero; echo y >made').status == 0
    assert machine.logins() == 1


# ---- Output while the command runs ----

@pytest.mark.parametrize('stream', ['out', 'err'])
@pytest.mark.parametrize('text', [b'line\n', b'no end of line: ', b'\0\xff'])
def test_what_is_said_arrives_while_the_command_runs(start, machine, gate, stream, text):
    say = f"printf '{''.join(chr(92) + format(byte, '03o') for byte in text)}'"
    to = ' >&2' if stream == 'err' else ''
    running = start(machine, f'{say}{to}; {gate.wait("a")}; printf 2{to}; {gate.wait("b")}',
                    '--job-name', 'live')
    running.until(text, stream)
    assert result('live', stream) == text
    gate.open('a')
    running.until(text + b'2', stream)
    gate.open('b')
    done = running.end()
    assert (done.status, getattr(done, stream)) == (0, text + b'2')
    assert not (done.out if stream == 'err' else done.err)


def test_nobody_notices_a_delay(start, machine, gate):
    gates = gate.path('0'), gate.path('1')          # a job could pass a single gate twice
    running = start(machine, f'for n in {{1..15}}; do read -r <{gates[0].parent}/$((n % 2)); '
                    'echo $n; done')
    taken = []
    for number in range(1, 16):
        gate.open(str(number % 2))
        began = time.monotonic()
        running.until(b'%d\n' % number)
        taken.append(time.monotonic() - began)
    assert running.end().status == 0
    assert statistics.median(taken) < 0.4, taken        # polling each second would take 0.5 s


def test_what_is_said_arrives_where_copying_its_files_took_long(start, lab, project, gate):
    """The follower of the output starts before the streams of the job exist."""
    machine = lab()
    (project / 'data').write_text('data')
    (machine.bin / 'cp').write_text(
        f'#!/bin/bash\n[[ ${{!#}} != */jobs/work.* ]] || {gate.wait("copy")}\nexec /bin/cp "$@"\n')
    (machine.bin / 'cp').chmod(0o755)
    running = start(machine, f'cat data; {gate.wait("a")}; head -c 3000 /dev/zero')
    wait_until(lambda: machine.log.read_text().count('Starting session: ') == 2, 'a follower')
    gate.open('copy')
    running.until(b'data')
    gate.open('a')
    assert (running.end().status, running.out) == (0, b'data' + bytes(3000))


def test_megabytes_come_whole_while_and_after_it_runs(start, machine, gate, clean):
    command = f"python3 -c '{NUMBERED % 500_000}'"
    running = start(machine, f'{command}; {gate.wait("a")}; {command}', '--job-name', 'big')
    running.size(4_000_000)
    gate.open('a')
    done = running.end()
    assert (done.status, done.err) == (0, b'')
    assert done.out == numbered(500_000) * 2
    assert result('big') == done.out
    clean()


def test_memory_is_bounded_however_much_comes(start, lab1, gate, scheduler):
    running = start(lab1, f'head -c 300000000 /dev/zero; {gate.wait("a")}', '--job-name', 'huge')
    count = 0
    while count < 300_000_000:
        running.size(1)
        count += len(running.out)
        running.out.clear()
    assert peak_mb(running.process.pid) < 100
    gate.open('a')
    assert (running.end().status, count) == (0, 300_000_000)


def test_a_slow_reader_gets_everything(start_cli, lab1, project, scheduler, client_env):
    """The pipe stays full for a long time; then the test reads small pieces."""
    process = start_cli('execute_remote', '--job-name', 'slow', '--machine', lab1.yaml(), '--',
                        f"python3 -c '{NUMBERED % 300_000}'", binary=True)
    journal = project / 'job_results/.ssh_scheduler/commands/slow/journal'
    wait_until(lambda: journal.exists() and 'claimed' in journal.read_text(), 'its start')
    data = b''
    while piece := os.read(process.stdout.fileno(), 7000):
        data += piece
    assert data == numbered(300_000)
    assert process.wait(rig.SAFETY_NET_S) == 0


# ---- Its input ----

def test_its_input_is_empty(run, machine):
    done = run(machine, 'cat; echo end', stdin=subprocess.PIPE)     # which the test leaves open
    assert (done.status, done.out) == (0, b'end\n')


def test_standard_input_is_passed_on_as_it_comes(start, machine, clean):
    running = start(machine, 'while IFS= read -r line; do echo "<$line>"; done; echo "[$line]"',
                    '--stdin')
    for line in (b'one', b'', b'three'):
        running.process.stdin.write(line + b'\n')
        running.until(b'<' + line + b'>\n')
    running.process.stdin.write(b'rest')
    running.process.stdin.close()
    done = running.end()
    assert (done.status, done.out) == (0, b'<one>\n<>\n<three>\n[rest]\n')
    clean()


@pytest.mark.parametrize('size', [0, 1, 4096, 65536, 65537, 20_000_000])
@pytest.mark.parametrize('kind', ['file', 'pipe'])
def test_any_input_comes_whole(start, run, lab1, tmp_path, size, kind):
    data = (BYTES * (size // 256 + 1))[:size]
    (tmp_path / 'in').write_bytes(data)
    with open(tmp_path / 'in', 'rb') as file:
        if kind == 'file':
            done = run(lab1, 'sha256sum; wc -c /dev/stdin </dev/null', '--stdin', stdin=file)
        else:
            with subprocess.Popen(['cat'], stdin=file, stdout=subprocess.PIPE) as cat:
                done = run(lab1, 'sha256sum', '--stdin', stdin=cat.stdout)
    assert done.status == 0
    assert done.out.split()[0].decode() == hashlib.sha256(data).hexdigest()
    assert_clean(lab1)


def test_devices_are_input_too(run, lab1):
    assert run(lab1, 'wc -c', '--stdin', stdin=subprocess.DEVNULL).out == b'0\n'


def test_a_command_need_not_read_its_input(run, machine, tmp_path, clean):
    (tmp_path / 'in').write_bytes(bytes(5_000_000))
    with open(tmp_path / 'in', 'rb') as file:
        done = run(machine, 'head -c 3 | wc -c; exit 4', '--stdin', stdin=file)
    assert (done.status, done.out) == (4, b'3\n')
    assert not [line for line in done.notes if 'WARNING' in line]
    clean()


def test_input_that_never_ends_does_not_hold_it_up(start, lab1):
    done = start(lab1, 'head -n 1', '--stdin')
    done.process.stdin.write(b'one\ntwo\n')
    assert (done.end().status, done.out) == (0, b'one\n')
    assert_clean(lab1)


# ---- Files and environment ----

def test_files_go_and_come_as_for_a_batch(run, machine, project, clean):
    (project / 'kept').write_text('kept')
    (project / 'changed').write_text('old')
    (project / 'data').mkdir()
    (project / 'data/x').write_text('x')
    command = 'cat data/x kept; echo new >changed; mkdir made; echo y >made/y'
    done = run(machine, command, '--job-name', 'files', '--link-forwards', 'data')
    assert (done.status, done.out) == (0, b'xkept')
    assert {path.name for path in (RESULTS / 'files').rglob('*')} == {'changed', 'made', 'y'}
    assert (project / 'changed').read_text() == 'old'
    done = run(machine, 'ls; touch a b', '--job-name', 'named', '--copy-forwards', 'kept',
               '--copy-backwards', 'b')
    assert done.out == b'kept\n'
    assert [path.name for path in (RESULTS / 'named').iterdir()] == ['b']
    done = run(machine, 'ls; touch a', '--job-name', 'none', '--copy-forwards', '--copy-backwards')
    assert (done.out, (RESULTS / 'none').exists()) == (b'', False)


def test_large_results_come_back_too(run, lab1, project):
    (project / 'data').write_bytes(BYTES * 2000)
    done = run(lab1, 'cat data data >twice', '--job-name', 'large')
    assert done.status == 0
    assert (RESULTS / 'large/twice').read_bytes() == BYTES * 4000
    assert_clean(lab1, cache=True)


def test_without_a_list_that_is_wrong_nothing_starts(run, lab1):
    done = run(lab1, 'true', '--copy-forwards', '../x', '--')
    assert (done.status, done.out) == (2, b'')
    done = run(lab1, 'true', '--copy-forwards', 'missing')
    assert (done.status, done.out) == (2, b'') and b'missing' in done.err


def test_the_environment_is_that_of_a_batch(run, lab1):
    done = run(lab1, 'echo $SSH_SCHEDULER_JOB $PYTHONUNBUFFERED ${CUDA_VISIBLE_DEVICES-unset}; '
               'pwd -P | grep -c /.ssh_scheduler/; nice', '--job-name', 'env')
    assert done.out.split() == [b'env', b'1', b'unset', b'1', b'%d' % os.nice(0)]
    assert run(lab1, 'nice', '--nice=7').out == b'%d\n' % min(os.nice(0) + 7, 19)


def test_a_program_that_holds_each_session_open_is_not_waited_for(run, lab, gate):
    """sshd ends a session when no process has its pipes, so such a program would hold up ssh."""
    machine = lab(startup={'.bashrc': 'sleep 1000 &\n'})
    begin = time.monotonic()
    assert run(machine, gate.wait('a'), '--job-name', 'd', '--detach').out == b'd\n'
    gate.open('a')
    assert run(machine, 'echo ok').out == b'ok\n'
    assert time.monotonic() - begin < s.FAREWELL_S
    assert run(None, None, '--attach', 'd').status == 0


def test_a_noisy_login_is_no_trouble(run, start, lab, gate):
    machine = lab(startup={'.bashrc': 'echo noise; echo complaint >&2; printf "no end"\n'})
    running = start(machine, f'echo one; {gate.wait("a")}; head -c 700000 /dev/zero; echo e >&2',
                    '--job-name', 'n')
    running.until(b'one\n')
    gate.open('a')
    done = running.end()
    assert (done.status, done.out, done.err) == (0, b'one\n' + bytes(700000), b'e\n')
    running = start(machine, 'wc -c', '--stdin')
    running.process.stdin.write(b'12345')
    running.process.stdin.close()
    assert running.end().out == b'5\n'


# ---- Hardware ----

GPU = ('--memory-required=100', '--num-cpus=0.1')


def test_hardware_options_give_a_gpu_and_wait_for_room(start, lab, gate):
    machine = lab(gpus=rig.fake_gpus(2))
    held = []
    for number in (0, 1):
        held.append(start(machine, f'echo $CUDA_VISIBLE_DEVICES; {gate.wait(str(number))}', *GPU))
        held[-1].until(b'\n')
    assert sorted(bytes(running.out) for running in held) == [b'0\n', b'1\n']
    waiting = start(machine, 'echo $CUDA_VISIBLE_DEVICES', *GPU)
    waiting.until(b'waiting for ', 'err')
    assert not waiting.out
    gate.open('1')
    assert held[1].end().status == 0
    assert (waiting.end().status, waiting.out) == (0, held[1].out)
    gate.open('0')
    assert held[0].end().status == 0
    assert_clean(machine)


def test_without_hardware_options_it_starts_at_once(run, lab):
    machine = lab(memory_mb=1, cores=1, busy_cores=5)
    assert run(machine, 'echo ${CUDA_VISIBLE_DEVICES-unset}').out == b'unset\n'


def test_what_never_fits_is_an_error_before_it_starts(run, lab1):
    done = run(lab1, 'echo started', '--memory-required=999999', '--no-gpu-required')
    assert (done.status, done.out) == (2, b'')
    assert '999999 MB' in done.notes[-1] and str(lab1.yaml()) in done.notes[-1]
    assert_clean(lab1)


def test_it_counts_with_the_jobs_of_a_batch(start, run_cli, start_cli, lab, gate, project):
    machine = lab(gpus=rig.fake_gpus(1))
    batch = Batches(run_cli, start_cli).start([gate.wait('a')], [machine], *GPU)
    batch.until('started: ')
    waiting = start(machine, 'echo mine', *GPU)
    waiting.until(b'waiting for ', 'err')
    gate.open('a')
    assert batch.end().returncode == 0
    assert (waiting.end().status, waiting.out) == (0, b'mine\n')


def test_it_runs_beside_a_batch_of_the_same_folder(run, run_cli, start_cli, lab1, gate, project):
    batch = Batches(run_cli, start_cli).start([gate.wait('a')], [lab1], *NO_GPU)
    batch.until('started: ')
    done = run(lab1, 'echo beside; echo x >made', '--job-name', 'beside', '--copy-forwards')
    assert (done.status, done.out, done.err) == (0, b'beside\n', b'')
    gate.open('a')
    assert batch.end().returncode == 0
    assert {path.name for path in RESULTS.iterdir()} >= {'beside', 'beside.out', 'batch.sh.1.out'}
    assert_clean(lab1, cache=True)


# ---- The command outlives its client ----

def test_detach_attach(run, start, machine, gate, clean):
    done = run(machine, f'echo one; {gate.wait("a")}; echo two; exit 5', '--job-name', 'far',
               '--detach')
    assert (done.status, done.out, done.err) == (0, b'far\n', b'')
    attached = start(None, None, '--attach', 'far')
    attached.until(b'one\n')
    gate.open('a')
    assert (attached.end().status, attached.out) == (5, b'one\ntwo\n')
    assert re.fullmatch(rf'running: far on {word(machine)} since [0-9]{{2}}:[0-9]{{2}}\n',
                        attached.err.decode())
    clean()


def test_detach_makes_a_name(run, lab1):
    done = run(lab1, 'echo x', '--detach')
    name = done.out.decode().strip()
    assert done.out.count(b'\n') == 1 and re.fullmatch(r'echo-\d{4}', name)
    assert run(None, None, '--attach', name).out == b'x\n'
    assert_clean(lab1)


def test_detach_sends_files_and_attach_brings_results(run, lab1, project, gate):
    (project / 'data').write_bytes(BYTES * 2000)
    done = run(lab1, f'{gate.wait("a")}; wc -c <data; cp data made', '--job-name', 'files',
               '--detach', '--copy-backwards', 'made')
    assert done.status == 0
    (project / 'data').unlink()
    gate.open('a')
    done = run(None, None, '--attach', 'files')
    assert (done.status, done.out) == (0, b'512000\n')
    assert (RESULTS / 'files/made').read_bytes() == BYTES * 2000
    assert_clean(lab1, cache=True)


def ended_note(name, machine):
    return (f'{name}: stopped on {word(machine)}. Partial results are in '
            f'job_results/.ssh_scheduler/commands/{name}/cancelled')


def return_note(name, machine):
    return (f'{name} runs on {word(machine)}. To watch it again: execute_remote --attach={name}  '
            f'To cancel it: execute_remote --cancel={name}')


@pytest.mark.parametrize('how', ['detached', 'its client was killed'])
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_who_attaches_only_watches(run, start, machine, gate, clean, how, number):
    command = f'echo one; {gate.wait("a")}; echo two; exit 5'
    if how == 'detached':
        run(machine, command, '--job-name', 'far', '--detach')
    else:
        first = start(machine, command, '--job-name', 'far')
        first.until(b'one\n')
        first.kill()
    attached = start(None, None, '--attach', 'far')
    attached.until(b'one\n')
    attached.signal(number)
    told = time.monotonic()
    assert (attached.end().status, attached.notes[-1]) == (130, return_note('far', machine))
    assert time.monotonic() - told < 20     # below FAREWELL_S, after which ssh is killed
    again = start(None, None, '--attach', 'far')
    again.until(b'one\n')
    gate.open('a')
    assert (again.end().status, again.out) == (5, b'one\ntwo\n')
    clean()


def test_the_same_command_only_watches_what_was_detached(run, start, lab1, gate):
    command = ['echo one; ' + gate.wait('a'), '--job-name', 'far']
    run(lab1, *command, '--detach')
    watching = start(lab1, *command)
    watching.until(b'one\n')
    watching.signal()
    assert (watching.end().status, watching.notes[-1]) == (130, return_note('far', lab1))
    gate.open('a')
    assert run(lab1, *command).status == 0
    assert_clean(lab1)


def test_the_same_command_ends_what_was_not_detached(start, lab1, gate, client_home):
    command = ['echo one; ' + gate.wait('a'), '--job-name', 'near']
    for how in ('kill', 'signal'):
        client = start(lab1, *command)
        client.until(b'one\n')
        getattr(client, how)()
    assert (client.end().status, client.notes[-1]) == (130, ended_note('near', lab1))
    assert_clean(lab1)


def test_a_reader_that_leaves_what_is_attached(run, scheduler, client_env, lab1, gate):
    run(lab1, f'echo one; echo two; {gate.wait("a")}; seq 100000; {gate.wait("b")}; exit 4',
        '--job-name', 'far', '--detach')
    line = f'{sys.executable} {scheduler} execute_remote --attach far'
    with subprocess.Popen(['bash', '-c', f'{line} | head -n 1; exit ${{PIPESTATUS[0]}}'],
                          env=client_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as left:
        assert left.stdout.readline() == b'one\n'
        gate.open('a')
        _, complaint = left.communicate(timeout=60)
    assert (left.returncode, complaint.decode().splitlines()[-1]) == (
        141, return_note('far', lab1))
    gate.open('b')
    done = run(None, None, '--attach', 'far')
    assert (done.status, done.out.count(b'\n')) == (4, 100_002)
    assert_clean(lab1)


@pytest.mark.parametrize('how', ['starts it', 'attaches to it'])
def test_cancel_while_a_client_has_it(run, start, lab1, gate, how):
    command = f'echo one; {gate.wait("a")}'
    if how == 'starts it':
        client = start(lab1, command, '--job-name', 'far')
    else:
        run(lab1, command, '--job-name', 'far', '--detach')
        client = start(None, None, '--attach', 'far')
    client.until(b'one\n')
    done = run(None, None, '--cancel', 'far')
    assert (done.status, done.notes) == (0, [
        f'far: cancelling: process {client.process.pid} runs it',
        ended_note('far', lab1)])
    assert client.end().status == 130
    assert_clean(lab1)


def test_cancel_ends_the_tree(run, machine, ledger, clean):
    run(machine, nasty_tree(ledger), '--job-name', 'tree', '--detach')
    pids = nasty_pids(ledger)
    done = run(None, None, '--cancel', 'tree')
    assert (done.status, done.out) == (0, b''), done
    assert done.notes == [ended_note('tree', machine)]
    assert_ended(pids)
    clean()
    again = run(None, None, '--cancel', 'tree')
    assert (again.status, again.notes[-1]) == (
        2, 'execute_remote: the job tree does not run: it was cancelled.')


def test_cancel_of_what_has_ended(run, lab1, ledger):
    run(lab1, f'echo ran >>{ledger}', '--job-name', 'quick', '--detach')
    wrote(ledger, 'ran')
    wait_until(lambda: not [pid for pid, _ in lab1.processes()], 'its end')
    done = run(None, None, '--cancel', 'quick')
    assert (done.status, done.notes) == (0, ['quick: it has ended already'])
    assert run(None, None, '--attach', 'quick').status == 0


@pytest.mark.parametrize('option', ['--attach', '--cancel'])
def test_a_job_that_nobody_knows(run, option, project):
    done = run(None, None, option, 'nobody')
    assert (done.status, done.out) == (2, b'')
    assert done.notes[0].startswith('execute_remote: no job nobody was started from this folder')
    assert not [*project.iterdir()]


def test_the_same_command_attaches(run, start, machine, gate, ledger, clean):
    command = f'echo start >>{ledger}; echo one; {gate.wait("a")}; echo two; echo e >&2; exit 9'
    first = start(machine, command, '--job-name', 'twice')
    first.until(b'one\n')
    first.kill()
    second = start(machine, command, '--job-name', 'twice')
    second.until(b'one\n')
    gate.open('a')
    done = second.end()
    assert (done.status, done.out, done.notes[1:]) == (9, b'one\ntwo\n', ['e'])
    assert done.notes[0].startswith(f'running: twice on {word(machine)} since ')
    assert ledger.read_text() == 'start\n'
    assert (result('twice'), result('twice', 'err')) == (b'one\ntwo\n', b'e\n')
    third = run(machine, command, '--job-name', 'twice')
    assert (third.status, third.out) == (9, b'one\ntwo\n')
    assert third.notes == ['WARNING: job results already exists for twice, showing them: delete if '
                           'you wish to rerun: rm -r job_results/twice job_results/twice.out '
                           'job_results/twice.err', 'e']
    assert ledger.read_text() == 'start\n'
    assert (run(None, None, '--attach', 'twice').out, run(None, None, '--attach', 'twice').status
            ) == (b'one\ntwo\n', 9)
    clean()


def test_killed_again_and_again_the_output_is_whole_and_once(start, machine, ledger, gate, clean):
    """Each client is killed amid megabytes of output; the last one prints all, in order."""
    count = 400_000
    command = (f'echo start >>{ledger}; python3 -uc "\nimport sys\nfor n in range({count}):\n'
               f'    sys.stdout.write(\'%07d\\\\n\' % n)\n    n % 40000 or sys.stdout.flush()\n'
               f'    if n == {count // 2}: open(\'{gate.path("a")}\').readline()\n"; exit 6')
    for kill_at in (1, 100_000, 1_000_000):
        running = start(machine, command, '--job-name', 'whole')
        running.size(kill_at)
        running.kill()
        assert numbered(count).startswith(running.out)
    running = start(machine, command, '--job-name', 'whole')
    running.size(1)
    gate.open('a')
    done = running.end()
    assert (done.status, len(done.out), done.out == numbered(count)) == (6, 8 * count, True)
    assert result('whole') == done.out
    assert ledger.read_text() == 'start\n'
    clean()


def test_what_ended_while_nobody_listened_is_shown(start, run, lab1, gate, ledger):
    command = f'head -c 1000000 /dev/zero; {gate.wait("a")}; echo end >>{ledger}; exit 8'
    running = start(lab1, command, '--job-name', 'alone')
    running.size(1)
    running.kill()
    gate.open('a')
    wrote(ledger, 'end')
    done = run(lab1, command, '--job-name', 'alone')
    assert (done.status, done.out) == (8, bytes(1_000_000))
    assert_clean(lab1)


@pytest.mark.skipif(os.getuid() != 0, reason='only root can make files of another user')
def test_what_the_login_could_not_read_comes_with_the_same_command(start, run, lab, gate):
    machine = lab(uid=20001)
    command = f'mkdir shut; echo $PWD/; {gate.wait("a")}'
    words = (machine, command, '--job-name', 'docked', '--copy-backwards', '.')
    running = start(*words)
    running.until(b'/\n')
    shut = Path(running.out.decode().strip()) / 'shut'
    (shut / 'model').write_text('m')
    shut.chmod(0o700)
    os.chown(shut, 0, 0)
    gate.open('a')
    for done in (running.end(), run(*words)):
        assert done.status == 0 and f'the login on {machine.yaml()} may not read shut' in str(done)
        assert list((RESULTS / 'docked').iterdir()) == []
    os.chown(shut, 20001, 20001)
    done = run(*words)
    assert done.status == 0 and 'may not read' not in str(done)
    assert (RESULTS / 'docked/shut/model').read_text() == 'm'
    assert_clean(machine)


def test_files_are_not_sent_where_the_command_cannot_run(run, lab, project):
    machine = lab()
    (project / 'data').write_bytes(bytes(300_000))
    done = run(machine, 'true', '--copy-forwards', 'data', '--num-gpus=1', '--verbose')
    assert done.status == 2 and 'the job needs ' in done.notes[-1], str(done)
    assert 'waiting for' not in str(done)
    assert not any(note.startswith('+ rsync') for note in done.notes)
    assert places(machine.home) == {}


def test_killed_before_it_started(start, run, lab, ledger):
    machine = lab()
    machine.freeze()
    running = start(machine, f'echo start >>{ledger}', '--job-name', 'early')
    wait_until(lambda: Path('job_results/.ssh_scheduler/commands/early').exists(), 'its journal')
    running.kill()
    machine.thaw()
    assert run(machine, f'echo start >>{ledger}', '--job-name', 'early').status == 0
    assert ledger.read_text() == 'start\n'


@pytest.mark.parametrize('how', ['attach', 'the same command'])
def test_a_second_client_is_told_who_has_it(start, run, lab1, gate, how):
    command = f'echo one; {gate.wait("a")}'
    first = start(lab1, command, '--job-name', 'mine')
    first.until(b'one\n')
    done = (run(lab1, command, '--job-name', 'mine') if how == 'the same command' else
            run(None, None, f'--{how}', 'mine'))
    assert (done.status, done.out) == (2, b'')
    assert f'process {first.process.pid} on ' in done.notes[0] and 'mine' in done.notes[0]
    gate.open('a')
    assert first.end().status == 0


def test_the_input_of_a_job_ends_where_its_client_is_killed(start, run, lab1):
    """The job reads what the first client sent; the client that attaches can send more."""
    running = start(lab1, 'while read -r line; do echo "<$line>"; done; echo end',
                    '--stdin', '--job-name', 'fed')
    running.process.stdin.write(b'one\n')
    running.until(b'<one>\n')
    running.kill()
    again = start(lab1, 'while read -r line; do echo "<$line>"; done; echo end',
                  '--stdin', '--job-name', 'fed')
    again.process.stdin.write(b'two\n')
    again.until(b'<two>\n')
    again.process.stdin.close()
    done = again.end()
    assert (done.status, done.out) == (0, b'<one>\n<two>\nend\n')
    assert_clean(lab1)


def test_another_command_of_the_same_name_is_refused(start, run, lab1, gate):
    command = f'echo one; {gate.wait("a")}'
    first = start(lab1, command, '--job-name', 'name')
    first.until(b'one\n')
    first.kill()
    done = run(lab1, 'echo other', '--job-name', 'name')
    assert (done.status, done.out) == (2, b'')
    assert 'the job name exists, with another command: echo one' in done.notes[0]
    assert done.notes[0].endswith('or cancel it: execute_remote --cancel=name')
    gate.open('a')
    assert run(lab1, command, '--job-name', 'name').status == 0
    done = run(lab1, 'echo other', '--job-name', 'name')
    assert done.status == 2
    subprocess.run(['bash', '-c', done.notes[0].rpartition('delete it: ')[2]], check=True)
    assert run(lab1, 'echo other', '--job-name', 'name').status == 0


def test_a_job_with_files_of_then_is_shown_with_what_changed(run, lab1, project):
    """Somebody repairs a file, types the same command, and gets the former output."""
    (project / 'code').write_text('echo wrong; exit 3\n')
    order = [lab1, 'bash code', '--job-name', 'fix', '--copy-forwards', 'code']
    assert run(*order).status == 3
    (project / 'code').write_text('echo right\n')
    done = run(*order)
    assert (done.status, done.out, done.notes[1]) == (3, b'wrong\n', 'files changed since: code')
    warning, _, command = done.notes[0].rpartition(': ')
    assert warning == ('WARNING: job results already exists for fix, showing them: delete if you '
                       'wish to rerun')
    subprocess.run(['bash', '-c', command], check=True)
    done = run(*order)
    assert (done.status, done.out) == (0, b'right\n')


def test_another_machine_is_refused(start, run, lab1, lab2, gate):
    command = f'echo one; {gate.wait("a")}'
    first = start(lab1, command, '--job-name', 'there')
    first.until(b'one')
    first.kill()
    done = run(lab2, command, '--job-name', 'there')
    assert (done.status, done.out) == (2, b'')
    assert f'was started on {lab1.account}, not on {lab2.account}' in done.notes[0]
    gate.open('a')
    assert run(lab1, command, '--job-name', 'there').status == 0


def test_results_that_are_there_are_not_replaced(run, lab1, project):
    RESULTS.mkdir()
    (RESULTS / 'mine.out').write_text('precious')
    done = run(lab1, 'echo new', '--job-name', 'mine')
    assert (done.status, done.out) == (2, b'')
    assert done.notes[0].endswith('or delete them: rm -r job_results/mine.out')
    assert (RESULTS / 'mine.out').read_text() == 'precious'


def test_results_that_are_shown_again_where_nobody_reads(run, scheduler, client_env, lab1):
    command = 'head -c 1000000 /dev/zero; exit 3'
    assert run(lab1, command, '--job-name', 'again').status == 3
    again = ('job results already exists for again, showing them: delete if you wish to rerun: rm '
             '-r job_results/again job_results/again.out job_results/again.err')
    with open('/dev/full', 'wb') as full:
        done = run(lab1, command, '--job-name', 'again', stdout=full)
    assert (done.status, done.notes) == (125, [
        f'WARNING: {again}',
        'again: its stdout cannot be written here: No space left on device.'])
    line = f'{sys.executable} {scheduler} execute_remote --attach again'
    done = subprocess.run(['bash', '-c', f'{line} | head -c 1; exit ${{PIPESTATUS[0]}}'],
                          env=client_env, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (
        141, b'\0', f'WARNING: {again}\n'.encode())


def test_detach_of_what_is_collected_prints_its_name(run, lab1, ledger):
    command = f'echo run >>{ledger}; echo out'
    assert run(lab1, command, '--job-name', 'mine').out == b'out\n'
    done = run(lab1, command, '--job-name', 'mine', '--detach')
    assert (done.status, done.out, done.err) == (0, b'mine\n', b'')
    assert ledger.read_text() == 'run\n'


def test_after_its_results_were_deleted_it_runs_again(run, lab1, ledger):
    command = f'echo run >>{ledger}; echo out'
    assert run(lab1, command, '--job-name', 'again').out == b'out\n'
    for path in RESULTS.glob('again*'):
        path.unlink() if path.is_file() else path.rmdir()
    done = run(lab1, command, '--job-name', 'again')
    assert (done.status, done.out) == (0, b'out\n'), done
    assert ledger.read_text() == 'run\nrun\n'


# ---- The command is stopped ----

@with_constants
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_whole_tree(start, machine, ledger, number, clean):
    running = start(machine, nasty_tree(ledger), '--job-name', 'tree',
                    env=constants(INTERRUPT_S=30.0))    # a process that ignores SIGTERM gets 5 s
    pids = nasty_pids(ledger)
    running.until(b'started\n')
    running.signal(number)
    done = running.end()
    assert done.status == 130
    assert_ended(pids)
    assert not [line for line in done.notes if 'could not' in line], done.notes
    clean()


def test_a_command_may_tidy_up(start, lab1, ledger):
    running = start(lab1, f'trap "echo tidy >>{ledger}; exit" TERM; echo begun; sleep 1000 & wait; '
                    f'echo after >>{ledger}')
    running.until(b'begun\n')
    running.signal()
    assert running.end().status == 130
    assert ledger.read_text() == 'tidy\n'


def test_the_last_words_of_what_is_interrupted_are_shown(start, lab1):
    running = start(lab1, 'trap "echo last words; exit" TERM; echo begun; sleep 1000 & wait')
    running.until(b'begun\n')
    running.signal()
    assert (running.end().status, running.out) == (130, b'begun\nlast words\n')


def test_an_interrupted_command_can_be_run_again(start, run, lab1, gate, ledger):
    command = f'echo start >>{ledger}; echo one; [ -e {ledger}.go ] || {gate.wait("a")}'
    running = start(lab1, command, '--job-name', 'again')
    running.until(b'one\n')
    running.signal()
    assert running.end().status == 130
    Path(f'{ledger}.go').touch()
    done = run(lab1, command, '--job-name', 'again')
    assert (done.status, done.out) == (0, b'one\n')
    assert ledger.read_text() == 'start\nstart\n'
    assert result('again') == b'one\n'


@with_constants
def test_a_second_interrupt_stops_waiting(start, lab, gate):
    machine = lab()
    running = start(machine, f'echo one; {gate.wait("a")}', '--job-name', 'stuck',
                    env=constants(INTERRUPT_S=40.0))
    running.until(b'one\n')
    machine.freeze()
    began = time.monotonic()
    running.signal()
    running.signal(signal.SIGTERM)      # two of one kind could arrive as one
    done = running.end()
    assert (done.status, time.monotonic() - began < 30) == (130, True)
    assert 'may still run on' in done.notes[-1]
    machine.thaw()


def test_contact_that_is_lost_while_results_are_fetched(start, lab, outside):
    machine, go = lab(), outside / 'go'
    machine.hold_fetches(go)
    running = start(machine, 'echo out; echo made >made; exit 3', '--job-name', 'held')
    wait_until(Path(f'{go}.awaited').exists, 'a fetch')
    machine.stop()
    go.touch()
    machine.start()
    done = running.end()
    assert (done.status, done.out, result('held')) == (3, b'out\n', b'out\n'), str(done)
    assert (RESULTS / 'held/made').read_text() == 'made\n'
    assert any('connected again' in line for line in done.notes)
    assert_clean(machine)


def test_a_second_interrupt_while_results_are_fetched(start, run, lab, ledger, outside):
    machine, go = lab(), outside / 'go'
    machine.hold_fetches(go)
    running = start(machine, f'echo run >>{ledger}; echo out; echo made >made; exit 3',
                    '--job-name', 'held')
    wait_until(Path(f'{go}.awaited').exists, 'a fetch')
    running.signal(signal.SIGINT)
    running.signal(signal.SIGTERM)      # two of one kind could arrive as one
    done = running.end()
    assert (done.status, done.notes) == (130, [
        f'held: it has ended, and its results are on {machine.yaml()}: execute_remote '
        '--attach=held fetches them'])
    go.touch()
    done = run(None, None, '--attach', 'held')
    assert (done.status, done.out, done.notes) == (3, b'out\n', [])
    assert (RESULTS / 'held/made').read_text() == 'made\n'
    assert ledger.read_text() == 'run\n'
    assert_clean(machine)


def test_an_interrupt_while_it_connects(start, lab, client_home):
    machine = lab()
    machine.freeze()
    running = start(machine, 'true', '--job-name', 'early')
    wait_until(lambda: any('ssh -F' in rig.cmdline(pid) for pid in rig.knowing(client_home)),
               'an ssh that waits')
    running.signal()
    done = running.end()
    assert (done.status, done.out) == (130, b'')
    machine.thaw()


@pytest.mark.parametrize('stream', ['stdout', 'stderr'])
def test_a_reader_that_leaves_ends_the_job(start, lab1, ledger, stream):
    to = ' >&2' if stream == 'stderr' else ''
    # The output has a limit, since a slow client ends the job late, and other tests need the disk.
    running = start(lab1, f'(echo $BASHPID >>{ledger}; yes | head -c 500000000{to}; '
                    'exec sleep 1000)', '--job-name', 'yes')
    said = 'out' if stream == 'stdout' else 'err'
    running.until(b'y\n', said)
    pid = int(ledger.read_text())
    pipe = getattr(running.process, stream)
    del running._open[pipe.fileno()]
    pipe.close()
    assert running.end().status == 141
    assert rig.ends(pid)
    assert_clean(lab1)


def test_head_in_a_shell(start_cli, scheduler, client_env, lab1, project):
    line = (f'{sys.executable} {scheduler} execute_remote --machine {lab1.yaml()} -- '
            "'seq 10000000' | head -n 3; echo ${PIPESTATUS[0]}")
    done = subprocess.run(['bash', '-c', line], env=client_env, capture_output=True, timeout=60)
    assert done.stdout == b'1\n2\n3\n141\n'
    assert b'Traceback' not in done.stderr
    assert_clean(lab1)


def test_what_outlives_its_command_is_named(run, machine, ledger, gate):
    command = (f'setsid bash -c "echo \\$\\$ >>{ledger}; exec sleep 1000" </dev/null >/dev/null '
               f'2>&1 & {until_sleep(f"$(cat {ledger})")}; echo done; exit 3')
    done = run(machine, command, '--job-name', 'daemon')
    pid = int(ledger.read_text())
    try:
        assert (done.status, done.out) == (3, b'done\n')
        assert done.notes == [f'{word(machine)}: daemon has ended, but it left processes running: '
                              f'sleep ({pid})']
        assert rig.read_proc(pid, 'comm') == b'sleep\n'
    finally:
        rig.kill(pid, lambda pid: b'SSH_SCHEDULER_JOB=daemon' in rig.read_proc(pid, 'environ'))


def test_a_daemon_that_holds_the_streams_open_holds_nobody_up(run, lab1, ledger):
    done = run(lab1, f'sleep 1000 & echo $! >>{ledger}; {until_sleep("$!")}; echo done',
               '--job-name', 'holder')
    pid = int(ledger.read_text())
    rig.kill(pid, lambda pid: rig.read_proc(pid, 'comm') == b'sleep\n')
    assert (done.status, done.out) == (0, b'done\n')
    assert f'sleep ({pid})' in done.notes[-1]


# ---- Out of reach ----

def test_a_machine_that_is_off(run, lab):
    machine = lab()
    machine.stop()
    done = run(machine, 'echo x', '--job-name', 'off')
    assert (done.status, done.out) == (125, b'')
    assert done.notes == [f'off: {machine.yaml()} cannot be used: nothing listens at 127.0.0.1 '
                          f'port {machine.port}.']
    machine.start()
    assert run(machine, 'echo x', '--job-name', 'off').out == b'x\n'


def test_a_login_that_fails(run, lab):
    machine = lab(startup={'.bashrc': 'exit 3\n'})
    done = run(machine, 'echo x', '--job-name', 'e')
    assert (done.status, done.out) == (125, b'') and 'start files' in done.notes[0]


@pytest.mark.parametrize('words', [
    ('--machine', 'nowhere.yaml', 'true'), ('true',), ('--machine=', 'true'),
    ('--machine', 'localhost'),
    ('--machine', 'localhost', '--job-name', '../x', 'true'),
    ('--machine', 'localhost', '--tty', '--stdin', 'true'), ('--attach', 'a', '--cancel', 'b'),
    ('--attach', 'a', '--job-name', 'b'), ('--attach', 'a', '--copy-forwards', 'b'),
    ('--machine', 'localhost', '--nice=x', 'true'),
    ('--machine', 'localhost', '--detach', '--stdin', 'true'),
    ('--machine', 'localhost', '--num-cpus=x', 'true'), ('--machine', 'localhost', 'a', 'b')])
def test_a_wrong_command_line_is_named_and_nothing_is_made(start_cli, project, words):
    done = Running(start_cli('execute_remote', *words, binary=True)).end()
    assert (done.status, done.out) == (2, b'')
    assert done.notes[0].startswith('execute_remote: ')
    assert done.notes[0].endswith(('.', '?', " execute_remote --machine localhost 'a b'"))
    assert not [*project.iterdir()]


@pytest.mark.parametrize('fault', ['cut', 'reset_connections', 'kill_sessions', 'power_off'])
def test_a_link_that_breaks_is_said_and_the_job_goes_on(start, run, host, gate, fault):
    machine = host(sees=(gate.folder,))
    file = str(machine.yaml(name='lab', ssh_options={
        'UserKnownHostsFile': str(machine.known_hosts), **PATIENT}))
    command = f'echo one; {gate.wait("a")}; echo two; exit 4'
    running = start(file, command, '--job-name', 'cut', '--away-limit=0')
    running.until(b'one\n')
    getattr(machine, fault)()
    done = running.end()
    assert (done.status, done.out) == (125, b'one\n')
    assert re.fullmatch(r'cut: lab: connection lost: .* The job keeps running; '
                        r'execute_remote --attach=cut shows its output\.',
                        done.notes[-1]), done.notes
    if fault == 'power_off':
        machine.power_on()
        machine.run('true')
        done = run(file, command, '--job-name', 'cut')
        assert (done.status, done.out) == (125, b'')
        assert 'cut: the job is gone: the machine was restarted.' in done.notes[-1]
        return
    machine.restore()
    gate.open('a')
    (file,) = job_files(machine, 'cut')
    wait_until(lambda: record_of(file)[0] == 'ended', 'its end, else --attach says that it runs')
    done = run(None, None, '--attach', 'cut')
    assert (done.status, done.out, done.err) == (4, b'one\ntwo\n', b'')
    assert_clean(machine)


def test_a_link_that_breaks_while_megabytes_come(start, run, host, gate):
    machine = host(sees=(gate.folder,))
    file = str(machine.yaml(ssh_options={'UserKnownHostsFile': str(machine.known_hosts),
                                         **PATIENT}))
    command = f"python3 -c '{NUMBERED % 300_000}'; {gate.wait('a')}; python3 -c '{NUMBERED % 9}'"
    running = start(file, command, '--job-name', 'cut', '--away-limit=0')
    running.size(100_000)
    machine.reset_connections()
    assert running.end().status == 125
    assert numbered(300_000).startswith(running.out)
    again = start(file, command, '--job-name', 'cut')
    again.size(2_400_000)
    gate.open('a')
    done = again.end()
    assert (done.status, done.out) == (0, numbered(300_000) + numbered(9))


def test_a_link_that_comes_back_is_used_again(start, host, gate):
    """The client survives the break, and shows each byte once."""
    machine = host(sees=(gate.folder,))
    file = str(machine.yaml(ssh_options={'UserKnownHostsFile': str(machine.known_hosts),
                                         **PATIENT}))
    running = start(file, f"python3 -c '{NUMBERED % 300_000}'; {gate.wait('a')}; "
                    f"python3 -c '{NUMBERED % 9}'; exit 4")
    running.size(100_000)
    machine.reset_connections()
    running.size(2_400_000)
    gate.open('a')
    done = running.end()
    assert (done.status, done.out) == (4, numbered(300_000) + numbered(9))
    assert_clean(machine)


@pytest.mark.parametrize('size', [10, 400_000], ids=['over the channel', 'with rsync'])
def test_files_reach_a_machine_whose_first_login_is_refused_for_the_moment(
        start, lab, project, size):
    """The files were handed over with the refused login, and are handed over again."""
    (project / 'data').write_bytes(b'x' * size)
    machine = lab(sshd_options='MaxStartups 1:100:1')
    with socket.create_connection((machine.address, machine.port)) as other:
        assert other.recv(100).startswith(b'SSH-')
        running = start(machine, 'wc -c <data')
        wait_until(lambda: 'drop connection' in machine.log.read_text(), 'a login is refused')
    assert (running.end().status, running.out) == (0, b'%d\n' % size), running.notes
    assert_clean(machine, cache=True)


def test_a_machine_that_allows_one_session(run, start, lab, gate):
    """The output and the files need logins of their own."""
    machine = lab(sshd_options='MaxSessions 1')
    running = start(machine, f'echo one; {gate.wait("a")}; echo two; exit 3', '--job-name', 'one')
    running.until(b'one\n')
    gate.open('a')
    assert (running.end().status, running.out) == (3, b'one\ntwo\n')
    assert_clean(machine)


def test_much_output_of_a_machine_that_allows_one_session(start, lab, gate):
    machine = lab(sshd_options='MaxSessions 1')
    running = start(machine, f'head -c 1000000 /dev/zero; {gate.wait("a")}; exit 3')
    running.size(1_000_000)
    gate.open('a')
    assert (running.end().status, running.out) == (3, bytes(1_000_000))


def test_what_a_machine_with_one_session_cannot_do_is_said(run, lab, tmp_path):
    machine = lab(sshd_options='MaxSessions 1')
    done = run(machine, 'head -c 1000000 /dev/zero', '--job-name', 'quick')
    assert (done.status, done.out) == (0, bytes(1_000_000))
    (tmp_path / 'in').write_bytes(b'input')
    with open(tmp_path / 'in', 'rb') as file:
        done = run(machine, 'cat', '--stdin', '--job-name', 'fed', stdin=file)
    assert done.status == 143
    assert 'WARNING: fed: its input could not be sent' in done.notes[0]
    done = run(machine, 'cat', '--tty', '--job-name', 'tty')
    assert (done.status, done.notes[-1]) == (
        125, f'tty: {machine.yaml()} has no free terminal.')
    wait_until(lambda: not machine.processes(), 'its end')


def test_a_full_disk_here_is_said(start, lab1):
    with open('/dev/full', 'wb') as full:
        done = start(lab1, 'echo x; sleep 1000', '--job-name', 'full', stdout=full).end()
    assert (done.status, done.notes) == (125, [
        ended_note('full', lab1),
        'full: its stdout cannot be written here: No space left on device.'])
    assert_clean(lab1)


# ---- A terminal ----

@pytest.fixture
def terminal(scheduler, client_env, project):
    """At a terminal of 30 rows and 90 columns: terminal(machine, command, *options)."""
    opened = []

    def begin(machine, command, *options, **size):
        opened.append(at_terminal(scheduler, client_env, 'execute_remote', '--machine',
                                  word(machine), *options, '--', command, **size))
        return opened[-1]

    yield begin
    for one in opened:
        one.__exit__()


def test_a_program_has_a_terminal(terminal, machine, clean):
    at = terminal(machine, 'stty size; tty; for fd in 0 1 2; do [ -t $fd ] && echo "<$fd>"; done; '
                  'echo $TERM; echo made >made; exit 7', '--tty', '--job-name', 't')
    assert at.end() == 7
    lines = bytes(at.said).replace(b'\r', b'').split(b'\n')
    assert b'30 90' in lines and [line for line in lines if line.startswith(b'/dev/pts/')]
    assert [b'<0>' in lines, b'<1>' in lines, b'<2>' in lines, b'xterm' in lines] == [True] * 4
    assert (RESULTS / 't/made').read_text() == 'made\n'
    clean()


def test_what_is_typed_reaches_the_program(terminal, machine):
    at = terminal(machine, 'read -p "name: " name; echo "<$name>"', '--tty')
    at.until(rb'name: ')
    at.type(b'ben\n')
    at.until(rb'<ben>')
    assert at.end() == 0


def test_a_typed_interrupt_is_the_programs(terminal, machine, clean):
    # A signal just before a `read` would run the trap only when that `read` ends.
    at = terminal(machine, 'trap "echo caught; got=1" INT; echo ready; until [[ $got ]]; do '
                  'sleep 0.05; done; read -r line; echo "<$line>"; exit 6', '--tty')
    at.until(rb'ready\r\n')
    at.type(b'\x03')
    at.until(rb'caught')
    at.type(b'one\n')
    at.until(rb'<one>')
    assert at.end() == 6
    clean()


def test_a_typed_interrupt_ends_what_does_not_catch_it(terminal, machine, clean):
    at = terminal(machine, 'echo ready; sleep 1000', '--tty')
    at.until(rb'ready\r\n')
    at.type(b'\x03')
    assert at.end() == 130
    clean()


def test_a_program_at_a_terminal_has_the_environment_of_any_job(terminal, lab):
    machine = lab(startup={'.bashrc': '''
        export code=7 held=8 term=9 exports=10 entry=11 TMOUT=900
        hello() { echo "hello $code $held $term $exports $entry $TMOUT"; }
    '''})
    at = terminal(machine, 'hello; exit 3', '--tty')
    at.until(rb'hello 7 8 9 10 11 900')
    assert at.end() == 3


def test_a_terminal_that_is_cut_off(terminal, lab, ledger):
    machine = lab()
    at = terminal(machine, f'echo ready; echo $$ >>{ledger}; sleep 1000', '--tty', '--job-name',
                  'cut')
    at.until(rb'ready\r\n')
    machine.stop()
    assert at.end() == 125
    assert b'connection lost' in at.said and b'keeps running' not in at.said
    assert b'The job has ended with its terminal; reconnecting' in at.said
    assert b'KillUserProcesses' not in at.said


def test_tty_without_a_terminal_here(run, lab1):
    """As with ssh -tt, the command has a terminal on the machine, whose output is shown."""
    done = run(lab1, 'tty; exit 4', '--tty')
    assert done.status == 4 and b'/dev/pts/' in done.out


def test_at_a_terminal_without_tty_the_command_has_none(terminal, lab1):
    at = terminal(lab1, '[ -t 0 ] || [ -t 1 ] || echo none; cat; echo end')
    assert at.end() == 0
    assert rb'none' in at.said and rb'end' in at.said


def test_an_interrupt_typed_before_there_is_a_terminal(terminal, lab, client_home):
    machine = lab()
    machine.freeze()
    at = terminal(machine, 'true', '--tty')
    wait_until(lambda: any('ssh -F' in rig.cmdline(pid) for pid in rig.knowing(client_home)),
               'an ssh that waits')
    at.type(b'\x03')
    assert at.end() == 130
    machine.thaw()


def test_an_interrupt_typed_without_tty_ends_the_job(terminal, lab1, ledger):
    at = terminal(lab1, nasty_tree(ledger))
    pids = nasty_pids(ledger)
    at.until(rb'started')
    at.type(b'\x03')
    assert at.end() == 130
    assert_ended(pids)


def test_the_terminal_is_left_as_it_was(terminal, lab1):
    at = terminal(lab1, 'stty raw -echo; echo x', '--tty')
    assert at.end() == 0
    ours, theirs = pty.openpty()            # the other terminal may be changed already at its start
    try:
        assert termios.tcgetattr(at.fd) == termios.tcgetattr(ours)
    finally:
        os.close(ours)
        os.close(theirs)
