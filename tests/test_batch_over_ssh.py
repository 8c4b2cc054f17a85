"""execute_batch on real machines: what it prints, what jobs find, and which results arrive."""
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import rig
from batching import NO_GPU, RESULTS, argv_of, assert_clean, events, places, result, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLE = Path(__file__).resolve().parent.parent / 'example'


# ---- What is printed ----

def test_the_example_of_the_spec_on_two_machines(run_cli, project, lab1, lab2):
    shutil.copytree(EXAMPLE, project / 'example')
    lines = (EXAMPLE / 'batch_script.sh').read_text().splitlines()
    machines = ['example/machine.yaml', 'example/machine2.yaml']
    for name, machine in zip(machines, (lab1, lab2)):
        shutil.copy(machine.yaml(), name)
    before = lab1.logins(), lab2.logins()

    done = run_cli('execute_batch', 'example/batch_script.sh', '--machines', *machines)

    assert (lab1.logins(), lab2.logins()) == (before[0] + 1, before[1] + 1)
    printed = done.stdout.splitlines()
    assert printed[:2] == [f"machine limits:  {{'{machines[0]}': 2, '{machines[1]}': 2}}",
                           'machine gpu choices: [[0, 1], [0, 1]]']
    names = [f'example_batch_script.sh.{number}' for number in range(1, 5)]
    started = {f'started: {name};  export CUDA_VISIBLE_DEVICES={gpu} && {line}'
               for name, line in zip(names, lines) for gpu in (0, 1)}
    assert len(events(done.stdout, 'started:')) == 4
    assert set(events(done.stdout, 'started:')) < started
    assert sorted(events(done.stdout, 'finished:', 'failed:')) == [
        f'finished: {name}; {line}' for name, line in zip(names, lines)]
    assert printed[-1].startswith('done: 4 jobs: 4 finished, 0 failed, ')
    assert len(printed) == 11
    assert done.returncode == 0
    assert [result(name) for name in names[:3]] == [
        b'one job\n', b'another job\n', b'another job\na combined job (bash syntax applies)\n']
    assert result(names[3]).startswith(b'local.sh runs on ')
    assert all(result(name, 'err') == b'' and not list((RESULTS / name).iterdir())
               for name in names)
    assert_clean(lab1)
    assert_clean(lab2)


def test_the_lines_in_their_order_as_in_the_spec(batches, project, lab1, gate):
    shutil.copy(lab1.yaml(), 'my_machine.yaml')
    lines = ['echo "one job"', f'{gate.wait("two")}; exit 1',
             f'{gate.pull("two")}; {gate.wait("three")}',
             f'{gate.pull("three")}; {gate.wait("four")}']
    batch = batches.start(lines, ['my_machine.yaml'], '--memory-required=2000')
    batch.until('finished: batch.sh.3')
    gate.open('four')
    done = batch.end()
    gpus = (0, 1, 0, 1)
    started = [f'started: batch.sh.{n};  export CUDA_VISIBLE_DEVICES={gpu} && {line}'
               for n, (gpu, line) in enumerate(zip(gpus, lines), 1)]
    ended = [f'{"failed" if n == 2 else "finished"}: batch.sh.{n}; {line}'
             for n, line in enumerate(lines, 1)]
    printed = done.stdout.splitlines()
    assert printed[:-2] == [
        "machine limits:  {'my_machine.yaml': 2}", 'machine gpu choices: [[0, 1]]',
        started[0], started[1], ended[0], started[2], ended[1], started[3], ended[2], ended[3]]
    assert printed[-2].startswith('done: 4 jobs: 3 finished, 1 failed, ')
    assert printed[-1] == (
        'batch.sh.2: exit code 1 on my_machine.yaml, see job_results/batch.sh.2.err')
    assert done.returncode == 1


def test_a_rerun_skips_what_is_done_and_says_so(batches, run_cli, lab1):
    lines = ['echo one', 'exit 3']
    assert batches.run(lines, [lab1]).returncode == 1
    (RESULTS / 'batch.sh.1').rmdir()
    for stream in ('out', 'err'):
        (RESULTS / f'batch.sh.1.{stream}').unlink()
    again = batches.run(lines, [lab1])
    printed = again.stdout.splitlines()
    assert printed[2:5] == [
        'WARNING: job results already exists for line 2, skipping evaluation: '
        'delete if you wish to rerun',
        'started: batch.sh.1;  export CUDA_VISIBLE_DEVICES=0 && echo one',
        'finished: batch.sh.1; echo one']
    assert printed[5].startswith(
        'done: 2 jobs: 1 finished, 0 failed, 1 skipped (1 of them failed), ')
    assert printed[6] == (f'batch.sh.2: exit code 3 on {lab1.yaml()}, in an earlier run, see '
                          'job_results/batch.sh.2.err')
    assert (again.returncode, result('batch.sh.1')) == (1, b'one\n')
    status = run_cli('execute_batch', 'batch.sh', '--status')
    lines = status.stdout.splitlines()
    assert re.fullmatch(rf'\.2 +failed 3  {lab1.yaml()} GPU \d +\d+s +exit 3 +exit code 3, empty '
                        'stderr', lines[3])
    assert (status.returncode, lines[-1]) == (
        1, '2 jobs: 1 finished, 1 failed, 0 on a machine, 0 waiting')


def test_numbers_are_those_of_the_lines_in_the_file(batches, lab1):
    lines = ['#!/bin/bash', '', 'echo three', '  # a comment', 'echo five \\', '  and six', 'true']
    done = batches.run(lines, [lab1], *NO_GPU)
    assert sorted(path.name for path in RESULTS.glob('*.out')) == [
        'batch.sh.3.out', 'batch.sh.5.out', 'batch.sh.7.out']
    assert (result('batch.sh.3'), result('batch.sh.5')) == (b'three\n', b'five and six\n')
    assert done.returncode == 0


def test_standard_input_as_the_batch(run_cli, project, lab1):
    done = run_cli('execute_batch', '-', '--machines', lab1.yaml(), *NO_GPU,
                   stdin='echo from\necho stdin\n')
    assert 'finished: stdin.2; echo stdin' in done.stdout
    assert result('stdin.1') + result('stdin.2') == b'from\nstdin\n'


def test_dry_run_tells_why_nothing_would_start(batches, lab, ledger, tmp_path, monkeypatch, gate):
    machine = lab().yaml()
    batch = batches.start([f'echo a >>{ledger}; {gate.wait("a")}'], [machine], *NO_GPU, '--reserve')
    wait_until(ledger.read_text, 'the job')
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    done = batches.run(['true'], [machine], *NO_GPU, '--dry-run')
    assert done.stdout.splitlines()[-1] == 'would wait: batch.sh.1;  true'
    assert (f'waiting: 1 job for 1 core and 100 MB of memory: {machine} is in use by another batch'
            in done.stderr)
    gate.open('a')
    assert batch.end().returncode == 0


def test_dry_run_starts_nothing(batches, lab1, ledger):
    lines = [f'echo {n} >>{ledger}' for n in (1, 2, 3)]
    done = batches.run(lines, [lab1], '--dry-run')
    printed = done.stdout.splitlines()
    assert printed[0].startswith('machine limits:  {')
    assert printed[2:] == [
        *(f'would start: batch.sh.{n} on {lab1.yaml()};  export CUDA_VISIBLE_DEVICES={n - 1} && '
          f'{lines[n - 1]}' for n in (1, 2)),
        f'would wait: batch.sh.3;  {lines[2]}']
    assert (done.returncode, ledger.read_text()) == (0, '')
    assert not [path for path in RESULTS.glob('*') if path.name != '.ssh_scheduler']
    assert_clean(lab1)


def test_verbose_shows_commands_and_events_on_stderr_only(batches, lab1):
    done = batches.run(['echo x >new'], [lab1], *NO_GPU, '--verbose')
    assert [line for line in done.stderr.splitlines() if line.startswith('+ ssh ')]
    assert [line for line in done.stderr.splitlines() if line.startswith('+ rsync ')]
    assert re.search(r'ended  batch\.sh\.1\.1-[0-9a-f]{8}  0', done.stderr)
    assert [line.split(' ')[0] for line in done.stdout.splitlines()] == [
        'machine', 'machine', 'started:', 'finished:', 'done:']


def test_commands_are_printed_on_one_line_and_without_control_characters(batches, lab1):
    done = batches.run(['echo \x1b[31m \a', 'echo a\\', 'b'], [lab1], *NO_GPU)
    assert r'finished: batch.sh.1; echo \x1b[31m \x07' in done.stdout.splitlines()
    assert 'finished: batch.sh.2; echo a b' in done.stdout.splitlines()
    assert result('batch.sh.1') == b'\x1b[31m \x07\n'


# ---- The surroundings of a job ----

def test_gpus_are_in_the_jobs_environment(batches, lab):
    machine = lab(gpus=rig.fake_gpus(2), startup={'.bashrc': 'export CUDA_VISIBLE_DEVICES=7\n'})
    show = 'echo "${CUDA_VISIBLE_DEVICES-unset} ${CUDA_DEVICE_ORDER-unset}"'
    batches.run([show, show], [machine])
    assert sorted(result(f'batch.sh.{n}') for n in (1, 2)) == [b'0 PCI_BUS_ID\n',
                                                              b'1 PCI_BUS_ID\n']


@pytest.mark.parametrize('option', ['--no-gpu-required', '--reserve'])
@pytest.mark.parametrize('startup', [
    {'.bashrc': 'export CUDA_VISIBLE_DEVICES=7\n'},
    {'.bashrc': 'export BASH_ENV=~/.bashenv\n', '.bashenv': 'export CUDA_VISIBLE_DEVICES=7\n'},
], ids=['bashrc', 'BASH_ENV'])
def test_without_a_gpu_of_its_own_a_job_has_no_cuda_variable(batches, lab, option, startup):
    machine = lab(gpus=rig.fake_gpus(2), startup=startup)
    done = batches.run(['echo "${CUDA_VISIBLE_DEVICES-unset}"'], [machine], option)
    assert result('batch.sh.1') == b'unset\n'
    assert 'started: batch.sh.1;  echo' in done.stdout


def test_bash_env_of_a_login_does_not_take_the_gpu_away(batches, lab):
    machine = lab(gpus=rig.fake_gpus(2), startup={
        '.bashrc': 'export BASH_ENV=~/.bashenv\n',
        '.bashenv': 'export CUDA_VISIBLE_DEVICES=7 FROM_BASH_ENV=yes\n'})
    show = 'echo "$CUDA_VISIBLE_DEVICES $FROM_BASH_ENV"; bash -c \'echo "$FROM_BASH_ENV"\''
    batches.run([show], [machine])
    assert result('batch.sh.1') == b'0 yes\nyes\n'


def test_two_jobs_never_have_the_same_reserved_gpu(batches, lab1, lab2, ledger, gate):
    body = (f'echo "start $RIG_MACHINE $CUDA_VISIBLE_DEVICES" >>{ledger}; {{}}'
            f'echo "end $RIG_MACHINE $CUDA_VISIBLE_DEVICES" >>{ledger}')
    meet = gate.meeting(4)      # so that all four GPUs are in use at one time
    lines = [body.format(f'{meet[n]}; ' if n < 4 else '') for n in range(20)]
    assert batches.run(lines, [lab1, lab2]).returncode == 0
    in_use, most = set(), 0
    for line in ledger.read_text().splitlines():
        word, where = line.split(' ', 1)
        if word == 'start':
            assert where not in in_use
            in_use.add(where)
        else:
            in_use.remove(where)
        most = max(most, len(in_use))
    assert (most, in_use) == (4, set())


@pytest.mark.parametrize('options, most', [
    (['--memory-required=6000', '--no-gpu-required'], 2),
    (['--memory-required=100', '--num-cpus=4', '--no-gpu-required'], 3),
    (['--memory-required=100', '--reserve'], 1),
    (['--memory-required=100', '--gpu-memory-required=5000', '--gpu-utilization=0.1',
      '--no-reserve-gpu'], 3),
])
def test_no_more_jobs_at_a_time_than_there_is_room_for(batches, lab, ledger, gate, options, most):
    machine = lab(gpus=rig.fake_gpus(1), cores=8, memory_mb=16000)
    meet = gate.meeting(most)
    lines = [f'echo start >>{ledger}; {meet[n] if n < most else "true"}; echo end >>{ledger}'
             for n in range(3 * most + 1)]
    done = batches.run(lines, [machine], *options)
    assert done.stdout.startswith(f"machine limits:  {{'{machine.yaml()}': {most}}}\n")
    assert done.returncode == 0
    running = peak = 0
    for line in ledger.read_text().split():
        running += 1 if line == 'start' else -1
        peak = max(peak, running)
    assert (peak, running) == (most, 0)


def test_what_does_not_fit_is_an_error_before_anything_starts(batches, lab1, ledger):
    done = batches.run([f'echo 1 >>{ledger}', 'true'], [lab1], '--memory-required=99999')
    assert (done.returncode, ledger.read_text()) == (2, '')
    assert 'execute_batch: line 1 (and 1 more line) needs ' in done.stderr
    assert '99999 MB of memory' in done.stderr
    assert 'has 32000 MB of memory' in done.stderr
    assert_clean(lab1)


def test_no_gpu_there_names_the_option_that_helps(batches, lab):
    done = batches.run(['true'], [lab()])
    assert done.returncode == 2
    assert '--no-gpu-required' in done.stderr.splitlines()[-1]


def test_without_any_gpu_the_error_shows_the_command_that_runs(run_cli, lab, client_env, project):
    """The test runs the printed command as it is; a shell would change the batch's bare name."""
    machine, batch = lab(), "a batch's $file.sh"
    (project / batch).write_text('echo "it ran"\n')
    done = run_cli('execute_batch', '--memory-required=0.01G', '--num-gpus', '2', '--exclude', '*',
                   '--machine', machine.yaml(), batch)
    assert (done.returncode, done.stderr.count('If the jobs need no GPU, type\n')) == (2, 1)
    command = done.stderr.splitlines()[-1]
    assert '--no-gpu-required' in command and '--num-gpus' not in command
    again = subprocess.run(['sh', '-c', command], env=client_env, capture_output=True, text=True,
                           timeout=rig.SAFETY_NET_S)
    assert again.returncode == 0, again.stderr
    assert 'done: 1 job: 1 finished' in again.stdout


def test_the_surroundings_of_a_job(batches, lab1):
    lines = ['echo "$SSH_SCHEDULER_JOB $PYTHONUNBUFFERED"', 'wc -c', 'ps -o pgid= -p $$',
             'ls /proc/$$/fd', 'echo "$PATH"; pwd; umask',
             'shopt -p extglob expand_aliases; echo $0 $#; trap; jobs',
             'read -r -t 20 x; echo $?; [ -t 0 ] || echo no terminal']
    done = batches.run(lines, [lab1], *NO_GPU)
    out = [result(f'batch.sh.{n}').decode() for n in range(1, len(lines) + 1)]
    assert done.returncode == 0
    assert out[0] == 'batch.sh.1 1\n'
    assert out[1] == '0\n'
    # 255: bash reads the command.  alive: marks all processes of the job; scripts use 3 to 9
    *streams, alive, script = sorted(map(int, out[3].split()))
    assert (streams, alive > 9, script) == ([0, 1, 2], True, 255)
    path, folder, umask = out[4].splitlines()
    assert path == lab1.path
    assert re.fullmatch(re.escape(f'{lab1.home}/.ssh_scheduler/') + r'[^/]+/jobs/work[.0-9]+',
                        folder)
    assert int(umask, 8) == int(lab1.run('umask').stdout, 8)
    # bash-completion sets extglob
    extglob = lab1.run('bash -lic "shopt -p extglob" 2>/dev/null').stdout
    assert re.fullmatch(re.escape(extglob) + r'shopt -u expand_aliases\n'
                        r'\.\./batch\.sh\.6\.1-[0-9a-f]+ 0\n', out[5])
    assert out[6] == '1\nno terminal\n'
    assert all(result(f'batch.sh.{n}', 'err') == b'' for n in range(1, len(lines) + 1))


def test_each_job_has_a_process_group_of_its_own(batches, lab1, gate):
    show = 'ps -o pgid= -p $$; ps -e -o pgid= -o comm= | grep -c "^ *$(ps -o pgid= -p $$) *sshd"'
    batches.run([f'{gate.wait("a")}; {show}', f'{gate.pull("a")}; {show}'], [lab1], *NO_GPU)
    groups = {result(f'batch.sh.{n}').split()[0] for n in (1, 2)}
    assert len(groups) == 2
    assert {result(f'batch.sh.{n}').split()[1] for n in (1, 2)} == {b'0'}


def test_jobs_do_not_see_each_others_folders(batches, lab1, gate):
    lines = [f'echo 1 >mine; {gate.wait("a")}; ls', f'echo 2 >mine; {gate.pull("a")}; cat mine']
    batches.run(lines, [lab1], *NO_GPU, '--copy-forwards')
    assert (result('batch.sh.1'), result('batch.sh.2')) == (b'mine\n', b'2\n')
    assert (RESULTS / 'batch.sh.1/mine').read_text() == '1\n'


# ---- Commands arrive as they were written ----

ODD_COMMANDS = [
    (r'''printf %s "a 'b' \"c\" \\ \$d"''', b'''a 'b' "c" \\ $d'''),
    (r"printf %s 'a\nb%s%%'", rb'a\nb%s%%'),
    (r"printf '%s|' a\ b 'c  d' e", b'a b|c  d|e|'),
    ('echo !! !$ "!x"', b'!! !$ !x\n'),
    ('echo ${HOME:+home} $((6 * 7)) `echo tick` $(echo dollar)', b'home 42 tick dollar\n'),
    ('printf %s ünïcödé→🚀', 'ünïcödé→🚀'.encode()),
    ('printf %s "tab\there"', b'tab\there'),
    ('echo a; echo b >&2; (echo c) & wait', b'a\nc\n'),
    ('cat <<<"here string"', b'here string\n'),
    ('x=(1 2 3); echo ${x[@]: -1} {a..c}', b'3 a b c\n'),
    ('[[ abc =~ ^a(.)c$ ]] && echo ${BASH_REMATCH[1]}', b'b\n'),
    ('echo  two  blanks # and a comment', b'two blanks\n'),
    ("printf %s 'a\\\nb'", b'a\\\nb'),
    ('echo a\\\nb', b'ab\n'),
    ('echo -n', b''),
    ('   echo leading', b'leading\n'),
    ('echo "\\\\" \\\\', b'\\ \\\n'),
    ("printf %s $'\\x01\\xff'", b'\x01\xff'),
]


def test_odd_commands(batches, lab1):
    batches.run([command for command, _ in ODD_COMMANDS], [lab1], *NO_GPU)
    line, expected, found = 1, {}, {}
    for command, out in ODD_COMMANDS:
        expected[command], found[command] = out, result(f'batch.sh.{line}')
        line += 1 + command.count('\n')
    assert found == expected


# A word of a shell cannot hold a NUL; a newline, with a CR before it, ends the line of the batch.
any_text = st.text(st.characters(exclude_characters='\0\n', exclude_categories=['Cs']),
                   max_size=60)
shell_text = st.text(' \t!"#$%&\'()*;<=>?[\\]^`{|}~ab\r\x1b\x7fé', max_size=30)


@settings(max_examples=4, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow,
                                 HealthCheck.data_too_large])
@given(texts=st.lists(any_text | shell_text, min_size=1, max_size=60))
def test_any_text_arrives_byte_for_byte(batches, lab1, texts):
    quoted = ["'" + text.replace("'", "'\\''") + "'" for text in texts]
    os.chdir(tempfile.mkdtemp(dir='.'))
    try:
        done = batches.run([f'printf %s {word}' for word in quoted], [lab1], *NO_GPU)
        found = [result(f'batch.sh.{n}') for n in range(1, len(texts) + 1)]
        assert found == [text.encode() for text in texts]
        assert done.returncode == 0
    finally:
        os.chdir('..')


def test_a_command_of_200_kb(batches, lab1):
    text = 'x%\\ ' * 50_000
    done = batches.run([f"printf %s '{text}' | cksum"], [lab1], *NO_GPU)
    expected = subprocess.run('cksum', input=text.encode(), capture_output=True).stdout
    assert (done.returncode, result('batch.sh.1')) == (0, expected)


# ---- Results ----

def test_big_and_binary_output_is_complete(batches, lab1):
    lines = ['python3 -c "import sys; sys.stdout.buffer.write(bytes(range(256)) * 20000)"',
             'head -c 5000000 /dev/zero >&2', r"printf 'a\0b'", r"printf '\377\376'",
             r'seq 200 | tr -d "\n"', 'seq 150', r"printf '\\t\t\n\n'"]
    done = batches.run(lines, [lab1], *NO_GPU)
    assert done.returncode == 0
    assert result('batch.sh.1') == bytes(range(256)) * 20000
    assert result('batch.sh.2', 'err') == bytes(5000000)
    assert result('batch.sh.2') == b''
    assert (result('batch.sh.3'), result('batch.sh.4')) == (b'a\0b', b'\xff\xfe')
    assert result('batch.sh.5') == ''.join(map(str, range(1, 201))).encode()
    assert result('batch.sh.6') == ''.join(f'{n}\n' for n in range(1, 151)).encode()
    assert result('batch.sh.7') == b'\\t\t\n\n'
    assert_clean(lab1)


def test_exit_codes_and_deaths_are_told_apart(batches, lab1):
    lines = ['exit 255', 'kill -9 $$', 'kill -TERM $$', 'exit 1', 'exit 125', 'kill -INT $$',
             'no_such_program', 'bash -c if', 'true', 'kill -HUP $$', 'exit 137', 'exit 256',
             'kill -9 0']
    codes = [255, 137, 143, 1, 125, 130, 127, 2, 0, 129, 137, 0, 137]
    done = batches.run(lines, [lab1], *NO_GPU)
    assert done.returncode == 1
    told = {line.split(':')[0]: int(line.split()[3])
            for line in done.stdout.splitlines() if 'exit code' in line}
    assert told == {f'batch.sh.{n}': code for n, code in enumerate(codes, 1) if code}
    assert 'done: 13 jobs: 2 finished, 11 failed, ' in done.stdout
    assert b'no_such_program' in result('batch.sh.7', 'err')
    assert_clean(lab1)


def test_a_result_folder_has_the_permissions_of_any_new_folder(batches, lab1):
    batches.run(['echo x >made', 'true', 'echo x >made; chmod 555 .'], [lab1], *NO_GPU)
    Path('as_usual').mkdir()
    modes = {path.stat().st_mode for path in (
        RESULTS / 'batch.sh.1', RESULTS / 'batch.sh.2', RESULTS / 'batch.sh.3')}
    assert modes == {Path('as_usual').stat().st_mode}


# ---- Kinds of machines ----

@pytest.mark.skipif(os.getuid() != 0, reason='only root can log in as another uid')
@pytest.mark.parametrize('leave_out', [(), ('rsync',)], ids=['rsync', 'tar'])
def test_an_unprivileged_account(batches, lab, project, leave_out):
    (project / 'data').write_bytes(bytes(300_000))
    (project / 'run.sh').write_text('id -u; cp data copy; mkdir ro; touch ro/file; chmod 555 ro .')
    (project / 'run.sh').chmod(0o700)
    machine = lab(uid=20001, leave_out=leave_out)
    done = batches.run(['./run.sh', 'bash run.sh'], [machine], *NO_GPU)
    assert (done.returncode, done.stderr.count('WARNING')) == (0, 0)
    assert result('batch.sh.1') == result('batch.sh.2') == b'20001\n'
    assert (RESULTS / 'batch.sh.2/copy').read_bytes() == bytes(300_000)
    assert (RESULTS / 'batch.sh.2/ro/file').exists()
    assert_clean(machine, cache=not leave_out)


def test_two_sessions_a_connection_are_enough(batches, lab, project):
    (project / 'data').write_bytes(bytes(300_000))
    machine = lab(sshd_options='MaxSessions 2')
    lines = [f'wc -c <data; head -c 100000 /dev/zero >big.{n}' for n in range(20)]
    done = batches.run(lines, [machine], *NO_GPU)
    assert (done.returncode, machine.logins()) == (0, 1), done.stderr
    assert all(result(f'batch.sh.{n}') == b'300000\n' for n in range(1, 21))
    assert all((RESULTS / f'batch.sh.{n + 1}/big.{n}').stat().st_size == 100000 for n in range(20))


def test_one_session_is_enough_for_small_batches(batches, lab):
    machine = lab(sshd_options='MaxSessions 1')
    done = batches.run(['cat batch.sh', 'exit 3'], [machine], *NO_GPU)
    assert (done.returncode, result('batch.sh.1')) == (1, b'cat batch.sh\nexit 3\n')
    assert_clean(machine)


@pytest.mark.parametrize('leave_out', [(), ('rsync',)])
def test_copies_that_are_refused_at_once_log_in_by_themselves(batches, lab, project, leave_out):
    for name in 'abc':
        (project / name).write_bytes(bytes(300_000))
    machine = lab(sshd_options='MaxSessions 1', leave_out=leave_out)
    lines = [f"execute_remote --copy-forwards {name} -- 'wc -c <{name}'" for name in 'abc']
    done = batches.run(lines, [machine], *NO_GPU)
    assert (done.returncode, machine.logins()) == (0, 4), done.stderr
    assert all(result(f'batch.sh.{n}') == b'300000\n' for n in (1, 2, 3))


def test_localhost_and_ssh_share_a_batch(batches, lab1, gate, client_home):
    lines = [f'{gate.wait("a")}; echo "${{RIG_MACHINE-here}}"',
             f'{gate.pull("a")}; echo "${{RIG_MACHINE-here}}"']
    done = batches.run(lines, ['localhost', lab1], '--reserve', *NO_GPU)
    assert done.returncode == 0
    assert {result('batch.sh.1'), result('batch.sh.2')} == {b'here\n', f'{lab1.folder}\n'.encode()}
    assert_clean(lab1)
    assert set().union(*places(client_home).values()) == set()


def test_localhost_needs_neither_ssh_nor_rsync(batches, project, client_home, tmp_path):
    (project / 'data').write_bytes(bytes(300_000))
    path = rig.farm(tmp_path / 'bin', ('ssh', 'sshd', 'rsync', 'nvidia-smi'))
    done = batches.run(['wc -c <data; tail -c 7 data >rest', 'exit 7'], [':'], *NO_GPU,
                       env={'PATH': str(path)})
    assert done.returncode == 1
    assert result('batch.sh.1') == b'300000\n'
    assert (RESULTS / 'batch.sh.1/rest').read_bytes() == bytes(7)
    assert 'exit code 7 on :, see job_results/batch.sh.2.err' in done.stdout


def test_a_machine_without_bash_or_rsync_says_what_is_missing(batches, lab):
    machine = lab(shell=rig.program('dash'), leave_out=('bash',), path_extra=())
    done = batches.run(['true'], [machine], *NO_GPU)
    assert done.returncode == 2
    assert ' has no bash' in done.stderr


def test_partial_commands_have_their_own_files_and_names(run_cli, project, lab1):
    shutil.copytree(EXAMPLE, project / 'example')
    (script,) = [p for p in EXAMPLE.glob('*') if p.is_file() and 'execute_remote' in p.read_text()]
    done = run_cli('execute_batch', f'example/{script.name}', '--machines', lab1.yaml(), *NO_GPU)
    assert done.returncode == 0, done.stderr
    for name in ('example1', 'example2'):
        assert (RESULTS / name / 'example' / name / 'sum.txt').exists()
        assert result(name).startswith(f'example/{name}: '.encode())
    other = run_cli('execute_batch', '-', '--machines', lab1.yaml(), *NO_GPU, stdin=(
        "execute_remote --copy-forwards example/test.py --job-name only 'find . -type f'\n"
        "execute_remote --copy-forwards --job-name none --machine x.yaml 'find . -type f'\n"))
    assert other.returncode == 0
    assert (result('only'), result('none')) == (b'./example/test.py\n', b'')
    assert '--machine is ignored' in other.stderr


def test_the_reader_of_stdout_may_leave(batches, lab1, gate):
    batch = batches.start([f'{gate.wait("a")}; echo done'], [lab1], *NO_GPU)
    batch.until('started:')
    batch.process.stdout.close()
    gate.open('a')
    assert batch.process.wait(rig.SAFETY_NET_S) == 0
    assert result('batch.sh.1') == b'done\n'
    assert 'Traceback' not in batch.process.stderr.read()


def test_another_batch_in_the_same_folder_is_refused(batches, run_cli, lab1, gate):
    batch = batches.start([gate.wait('a')], [lab1], *NO_GPU)
    batch.until('started:')
    Path('other.sh').write_text('true\n')
    other = run_cli('execute_batch', 'other.sh', *NO_GPU, '--machines', lab1.yaml())
    assert (other.returncode, other.stdout) == (2, '')
    assert f'in use by another run (process {batch.process.pid} on ' in other.stderr
    line = re.search('To start this batch when the jobs of batch.sh have succeeded: (.*)',
                     other.stderr)[1]
    first, own = map(shlex.split, line.split(' && '))
    assert first[-3:] == ['execute_batch', 'batch.sh', '--wait']
    assert own[-len(NO_GPU) - 4:] == ['execute_batch', 'other.sh', *NO_GPU, '--machines',
                                      str(lab1.yaml())]
    gate.open('a')
    assert batch.end().returncode == 0


def test_signals_that_a_job_sends_to_its_group_stay_in_it(batches, lab1, ledger):
    lines = [f'trap "" INT TERM; kill -TERM 0; kill -INT 0; echo alive >>{ledger}; exit 4']
    done = batches.run(lines, [lab1], *NO_GPU)
    assert 'exit code 4' in done.stdout
    assert ledger.read_text() == 'alive\n'


# ---- The journal is on the disk before a start ----

# Runs the program, and adds to a file the size of the journal at each fsync, and each start sent.
WATCHED = """\
import os, sys
import ssh_scheduler as s

said = open(sys.argv.pop(1), 'w', buffering=1)
fsync, send = os.fsync, s.Contact.send

def watched_fsync(fd):
    fsync(fd)
    print('fsync', os.fstat(fd).st_size, file=said)

def watched_send(contact, verb, *fields, **settings):
    if verb == 'start':
        print('start', fields[0], file=said)
    send(contact, verb, *fields, **settings)

os.fsync, s.Contact.send = watched_fsync, watched_send
s.main()
"""


@pytest.fixture
def watch(client_env, project, scheduler, tmp_path):
    """Run a batch; return [('fsync', size of the journal) or ('start', key of a job)]."""
    def watch(lines, machines, *options):
        argv = argv_of(lines, machines, options)
        done = subprocess.run(
            [sys.executable, '-c', WATCHED, tmp_path / 'said', *map(str, argv)],
            env={**client_env, 'PYTHONPATH': str(scheduler.parent)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said = [line.split() for line in (tmp_path / 'said').read_text().splitlines()]
        return [(word, int(what) if word == 'fsync' else what) for word, what in said]

    return watch


def test_all_starts_of_a_moment_share_one_fsync(watch, lab1, lab2):
    seen = watch(['true'] * 64, [lab1, lab2], '--no-gpu-required', '--memory-required=1',
                 '--num-cpus=0.01', '--copy-forwards')
    assert [word for word, _ in seen] == ['fsync', *['start'] * 64]


def test_no_start_is_sent_before_its_claim_is_on_the_disk(watch, lab1, lab2, project):
    """This includes starts that wait for files, for an answer or for room."""
    (project / 'file').write_text('x')
    seen = watch(['true'] * 64, [lab1, lab2], '--no-gpu-required', '--memory-required=1',
                 '--num-cpus=2')
    journal = (RESULTS / '.ssh_scheduler/journal').read_bytes()
    synced, sent = 0, 0
    for word, what in seen:
        if word == 'fsync':
            synced = what
            continue
        name, _, attempt = what.partition('-')[0].rpartition('.')
        claim = f'{{"event": "claimed", "job": "{name}", "attempt": {attempt}, '.encode()
        assert claim in journal[:synced], f'{what} was sent before its fsync'
        sent += 1
    assert sent == 64
