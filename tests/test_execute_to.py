"""execute_to: one command on many machines at once, with real sshds and real processes."""
import os
import re
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import rig
from batching import (
    RESULTS,
    assert_clean,
    constants,
    places,
    until_sleep,
    wait_until,
    with_constants,
)
from commands import Running, assert_ended, at_terminal, nasty_pids, nasty_tree, peak_mb, word

import ssh_scheduler


@pytest.fixture
def start(start_cli, project):
    """Start execute_to: start(machines, command, *options) -> Running."""
    def begin(machines, command, *options, **settings):
        return Running(start_cli('execute_to', *options, '--machines', *map(word, machines), '--',
                                 command, binary=True, **settings))

    return begin


@pytest.fixture
def run(start):
    """Run execute_to to its end, with an empty standard input."""
    return lambda *words, **settings: start(*words, stdin=subprocess.DEVNULL, **settings).end()


@pytest.fixture
def named(lab):
    """Make machines of these names: named('a', 'bc', …) -> (Machines, their files)."""
    def make(*names, **settings):
        machines = [lab(name=name, **settings) for name in names]
        return machines, [file_of(machine) for machine in machines]

    return make


def file_of(machine, **more):
    return str(machine.yaml(name=machine.name, **more))


def assert_all_clean(machines):
    for machine in machines:
        assert_clean(machine)


# ---- All at once ----

def test_ten_machines_at_once(run, named, gate):
    """Each command ends only when all have begun, so they all run at the same time."""
    machines, files = named(*(f'node{n}' for n in range(1, 11)))
    for machine, command in zip(machines, gate.meeting(10)):
        (machine.folder / 'meet').write_text(command)
    done = run(files, '. $RIG_MACHINE/meet; echo here; echo there >&2')
    assert done.status == 0
    assert sorted(done.out.decode().splitlines()) == sorted(
        f'{f"node{n}:":<8}here' for n in range(1, 11))
    assert sorted(done.notes) == sorted(f'{f"node{n}:":<8}there' for n in range(1, 11))
    assert [machine.logins() for machine in machines] == [1] * 10
    assert_all_clean(machines)
    assert not os.listdir('.')          # nothing is left on the client, either


@pytest.mark.parametrize('fanout, most', [(1, 1), (3, 3), (64, 6)])
def test_no_more_than_fanout_at_a_time(start, named, ledger, gate, fanout, most):
    machines, files = named(*(f'm{n}' for n in range(6)))
    for machine in machines:
        gate.path(machine.name)
    command = (f'name=${{SSH_SCHEDULER_JOB##*_}}; echo start $name >>{ledger}; '
               f'read -r <{gate.folder}/$name; echo end $name >>{ledger}')
    running = start(files, command, f'--fanout={fanout}')
    for count in range(6):
        wait_until(lambda count=count: ledger.read_text().count('start') == min(most + count, 6),
                   'the next start')
        begun, ended = ({line.split()[1] for line in ledger.read_text().splitlines()
                         if line.startswith(word)} for word in ('start', 'end'))
        gate.open(min(begun - ended))
        wait_until(lambda count=count: ledger.read_text().count('end') == count + 1, 'an end')
    assert running.end().status == 0
    at_once = peak = 0
    for line in ledger.read_text().splitlines():
        at_once += 1 if line.startswith('start') else -1
        peak = max(peak, at_once)
    assert peak == most
    assert (at_once, len(ledger.read_text().splitlines())) == (0, 12)


def test_localhost_too(run, named, client_home):
    machines, files = named('far')
    done = run([*files, 'localhost'], 'echo ${RIG_MACHINE-here}')
    assert sorted(done.out.splitlines()) == [
        f'far:       {machines[0].folder}'.encode(), b'localhost: here']
    assert done.status == 0
    assert set().union(*places(client_home).values()) == set()


# ---- Lines ----

def test_lines_come_while_the_command_runs(start, named, gate):
    _, files = named('a', 'bb')
    mine = f'read -r <{gate.path("a").parent}/${{SSH_SCHEDULER_JOB##*_}}'
    gate.path('bb')
    running = start(files, f'echo one; printf half; {mine}; echo " two"')
    running.until(b'a:  one\n')
    running.until(b'bb: one\n')
    assert b'half' not in running.out
    gate.open('a')
    gate.open('bb')
    assert sorted(running.end().out.splitlines()) == [
        b'a:  half two', b'a:  one', b'bb: half two', b'bb: one']


def test_whole_lines_are_never_mixed(run, named):
    machines, files = named('left', 'right')
    done = run(files, 'x=$(printf %3000s); for n in {1..3000}; do echo "$n$x$n"; '
               'echo "$n${x:0:100}$n" >&2; done')
    assert done.status == 0
    for said in (done.out, done.err):
        seen = Counter()
        for line in bytes(said).splitlines():
            name, first, last = line.split()
            assert first == last
            seen[name] += 1
            assert int(first) == seen[name]
        assert seen == {b'left:': 3000, b'right:': 3000}


@pytest.mark.parametrize('text, lines', [
    (r'1\r2\r3\n', [b'3']), (r'a\r\nb\r\n', [b'a', b'b']), (r'10%%\r20%%\r', [b'20%']),
    (r'no end', [b'no end']), (r'\n\n', [b'', b'']), (r'\0\377\n', [b'\0\xff']),
    (r'a\n\rb\r\n', [b'a', b'b']), ('', [])])
def test_what_a_line_is(run, lab1, text, lines):
    done = run([file_of(lab1)], f"printf '{text}'; printf '{text}' >&2")
    assert done.status == 0
    assert bytes(done.out).split(b'\n') == [b'lab1: ' + line for line in lines] + [b'']
    assert done.err == done.out


def test_a_progress_bar_shows_its_last_state(run, lab1):
    done = run([file_of(lab1)], r'for n in {1..50}; do printf "\r%d%%" $n >&2; done; '
               r'printf "\r\n" >&2')
    assert done.notes == ['lab1: 50%']


def test_memory_is_bounded_however_much_comes(start, named, gate):
    machines, files = named('a')
    running = start(files, f'yes | head -c 40000000; {gate.wait("a")}')
    count, expected = 0, 20_000_000 * len(b'a: y\n')
    while count < expected:
        running.size(1)
        count += len(running.out)
        running.out.clear()
    assert peak_mb(running.process.pid) < 70
    gate.open('a')
    assert (running.end().status, count) == (0, expected)
    assert_all_clean(machines)


def test_a_line_without_end_is_bounded_too(start, lab1, gate):
    running = start([file_of(lab1)], f'head -c 100000000 /dev/zero; {gate.wait("a")}')
    count = 0
    while count < 99_000_000:
        running.size(1)
        count += running.out.count(b'\0')
        running.out.clear()
    assert peak_mb(running.process.pid) < 100
    gate.open('a')
    count += running.end().out.count(b'\0')
    assert count == 100_000_000


def test_on_a_terminal_names_have_colours(scheduler, client_env, named, project):
    _, files = named('a', 'bb')
    with at_terminal(scheduler, client_env, 'execute_to', '--machines', *files, '--',
                     '[ -t 1 ] || echo x') as at:
        assert at.end() == 0
    assert sorted(bytes(at.said).split(b'\r\n')) == [
        b'', b'\x1b[31ma: \x1b[m x', b'\x1b[32mbb:\x1b[m x']


def test_its_input_is_empty(start, lab1):
    assert start([lab1], 'cat; echo end').end().status == 0


# ---- What goes wrong ----

def test_one_line_for_each_kind_of_failure(run, named):
    machines, files = named('good', 'bad1', 'bad2', 'worse', 'off', 'hangs')
    (noisy,), noisy_file = named('noisy', startup={'.bashrc': 'echo noise; echo more >&2\n'})
    files += noisy_file
    good, bad1, bad2, worse, off, hangs = machines
    for machine, command in ((bad1, 'exit 3'), (bad2, 'exit 3'), (worse, 'exit 255'),
                             (noisy, 'exit 0'), (good, 'exit 0')):
        (machine.folder / 'it').write_text(command)
    off.stop()
    hangs.freeze()
    done = run(files, 'echo said; . $RIG_MACHINE/it', '--timeout=12')
    hangs.thaw()
    assert done.status == 1
    assert sorted(done.out.decode().split('\n')) == [
        '', *(f'{name:<6} said' for name in ('bad1:', 'bad2:', 'good:', 'noisy:', 'worse:'))]
    assert sorted(done.notes) == [
        'failed: bad1, bad2 (exit code 3)', 'failed: worse (exit code 255)',
        'timed out: hangs (after 12 s)',
        f'unreachable: off (nothing listens at 127.0.0.1 port {off.port})']
    assert_all_clean([good, bad1, bad2, worse, noisy])


# Like `yes`, but with a limit: a full disk would stop all other tests.
SAYS_MUCH = 'yes | head -c 500000000; sleep 1000'


def test_what_says_too_much_is_ended_in_time(run, start, named):
    """The stop does not wait for all the output on the machine, which would take a minute."""
    machines, files = named('a')
    began = time.monotonic()
    running = start(files, SAYS_MUCH, '--timeout=2', stdout=subprocess.DEVNULL)
    assert running.end().status == 1
    assert time.monotonic() - began < 45
    assert_all_clean(machines)


@with_constants
def test_a_machine_that_hangs_while_it_runs(start, named):
    machines, files = named('a')
    running = start(files, 'echo one; sleep 1000', '--timeout=10', env=constants(
        INTERRUPT_S=3.0, FAREWELL_S=3.0))
    running.until(b'a: one')
    machines[0].freeze()
    began = time.monotonic()
    done = running.end()
    assert (done.status, time.monotonic() - began < 50) == (1, True)
    assert 'timed out: a (after 10 s)' in done.notes
    assert any('may still run on a' in line for line in done.notes)
    machines[0].thaw()


def test_all_that_fail_are_not_success(run, named):
    """The exit status is 1; that of clush would be 0."""
    _, files = named('a', 'b')
    done = run(files, 'exit 9')
    assert (done.status, done.out, done.notes) == (1, b'', ['failed: a, b (exit code 9)'])


def test_a_command_that_takes_too_long_is_ended(run, named, ledger):
    machines, files = named('slow', 'quick')
    (machines[0].folder / 'it').write_text(nasty_tree(ledger))
    (machines[1].folder / 'it').write_text('echo quick')
    done = run(files, '. $RIG_MACHINE/it', '--timeout=10')
    assert done.status == 1
    assert 'timed out: slow (after 10 s)' in done.notes
    assert b'quick: quick\n' in done.out
    assert_ended(nasty_pids(ledger))
    assert_all_clean(machines)


def test_a_machine_that_is_lost_on_the_way(start, host, lab1, gate):
    machine = host(sees=(gate.folder,))
    patient = {'UserKnownHostsFile': str(machine.known_hosts), 'ServerAliveInterval': '1',
               'ServerAliveCountMax': '2'}
    for name in ('host1', 'lab1'):
        gate.path(name)
    running = start([file_of(machine, ssh_options=patient), file_of(lab1)],
                    f'echo here; read -r <{gate.folder}/${{SSH_SCHEDULER_JOB##*_}}')
    running.until(b'host1: here\n')
    running.until(b'lab1:  here\n')
    machine.cut()
    gate.open('lab1')
    done = running.end()
    assert done.status == 1
    assert [line for line in done.notes if line.startswith('lost: host1 (')], done.notes
    machine.restore()
    wait_until(lambda: not machine.processes(), 'the end of what was tied to the connection')
    assert_clean(machine)


def test_a_daemon_is_named_with_its_machine(run, lab1, ledger):
    done = run([file_of(lab1)], f'setsid sleep 1000 >/dev/null 2>&1 & echo $! >>{ledger}; '
               f'{until_sleep("$!")}')
    pid = int(ledger.read_text())
    rig.kill(pid, lambda pid: rig.read_proc(pid, 'comm') == b'sleep\n')
    assert done.status == 0
    assert re.fullmatch(rf'lab1: setsid-\S+ has ended, but it left processes running: sleep '
                        rf'\({pid}\)', done.notes[0])


@pytest.mark.parametrize('words', [
    ('true',), ('--machines', 'nowhere', '--', 'true', 'x'), ('--machines', 'no.yaml', '--', 'x'),
    ('--machines', 'localhost', '--fanout=0', '--', 'x'),
    ('--machines', 'localhost', '--timeout=-1', '--', 'x'), ('--machines', 'localhost', '--'),
    ('--machines', '@nowhere', '--', 'x'), ('--machines', 'localhost', '--nice=99', '--', 'x'),
    ('--machines', 'localhost', '--copy-forwards', 'missing', '--', 'x')])
def test_a_wrong_command_line_is_named_and_nothing_is_made(start_cli, project, words):
    done = Running(start_cli('execute_to', *words, binary=True)).end()
    assert (done.status, done.out) == (2, b'')
    assert done.notes[0].startswith('execute_to: ')
    assert done.notes[0].endswith(('.', '?', " execute_to --machines nowhere -- 'true x'"))
    assert not [*project.iterdir()]


# ---- A command without quotes, whose first words would be machines ----

@pytest.mark.parametrize(('words', 'what', 'typed'), [
    ('lab1 lab2 echo hi', 'echo is a program', "lab1 lab2 'echo hi'"),
    ('lab1 lab2 sudo reboot', 'sudo is a program', "lab1 lab2 'sudo reboot'"),
    ('lab1 cd data', 'cd is a word of bash', "lab1 'cd data'"),
    ('lab1 A=1 sh run.sh', 'A=1 is a variable', "lab1 'A=1 sh run.sh'"),
    ('lab1 ./run.sh 3', './run.sh is a program', "lab1 './run.sh 3'"),
    ('lab1 --gather lab2 echo hi', None, None),         # an unexpected word in any case
    ('lab1 bash --timeout 5 echo', 'bash is a program', "lab1 --timeout 5 'bash echo'")])
def test_a_program_among_the_machines_is_refused(run_cli, project, words, what, typed):
    (project / 'run.sh').write_text('#!/bin/sh\n')
    (project / 'run.sh').chmod(0o755)
    done = run_cli('execute_to', '--machines', *words.split())
    assert (done.returncode, done.stdout) == (2, '')
    if what:
        said, _, shown = done.stderr.splitlines()[0].partition(' Try: ')
        assert said == (f'execute_to: {what}, not a machine. (If a machine has this name, write -- '
                        'between the machines and the command.) Put the command in quotes.')
        assert shown.endswith(f' execute_to --machines {typed}')


@pytest.mark.parametrize(('words', 'config'), [
    ('bash true', ''),                          # the first word is a machine
    ('lab1 bash -- true', ''), ('lab1 bash --gather -- true', ''),
    ('lab1 sh true', ''), ('lab1 ./sh true', ''),       # machine files
    ('lab1 bash true', 'Host bash other\n'), ('lab1 bash true', 'Host=lab3 ba*\n'),
    ('lab1 bash true', 'Host *\nInclude more\n'), ('lab1 localhost true', ''),
    ('lab1 lab2 bash', '')])
def test_a_machine_with_the_name_of_a_program_is_known(home_here, words, config):
    (home_here / '.ssh' / 'config').write_text(config)
    (home_here / '.ssh' / 'more').write_text('Host "bash"\n')
    for name in ('sh', 'sh.yaml'):
        Path(name).write_text('ip: h\n')
        Path(name).chmod(0o755)
    ssh_scheduler.refuse_programs(ssh_scheduler.read_options(
        ssh_scheduler.EXECUTE_TO_USAGE, ['--machines', *words.split()]), '<command>')


@pytest.mark.parametrize('config', ['Host *\n', 'Host ?* !bash\n', 'Host ba\n', ''])
def test_a_pattern_for_all_hosts_makes_no_program_a_machine(home_here, config):
    (home_here / '.ssh' / 'config').write_text(config)
    with pytest.raises(ssh_scheduler.UsageError) as caught:
        ssh_scheduler.refuse_programs(ssh_scheduler.read_options(
            ssh_scheduler.EXECUTE_TO_USAGE, ['--machines', 'lab1', 'bash', 'x']), '<command>')
    assert str(caught.value).endswith("Try: execute_to --machines lab1 'bash x'")


@pytest.fixture
def home_here(tmp_path, monkeypatch):
    """An empty HOME with a folder .ssh, which is the current folder, too."""
    (tmp_path / '.ssh').mkdir()
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- Gathered ----

@pytest.fixture
def alike(named):
    """Four machines: the third prints another text, and the fourth nothing."""
    machines, files = named('n1', 'n2', 'n3', 'n4')
    for machine, text in zip(machines, ('x\ny\n', 'x\ny\n', 'x\nz', '')):
        (machine.folder / 'text').write_text(text)
    return files


def test_equal_outputs_are_folded(run, alike):
    done = run(alike, 'cat $RIG_MACHINE/text; echo err >&2', '--gather')
    assert (done.status, bytes(done.out).decode()) == (
        0, '---- n1, n2 (2 machines)\nx\ny\n---- n3\nx\nz\n')
    assert done.notes == ['---- n1, n2 (2 machines)', 'err', '---- n3', 'err', '---- n4', 'err']
    assert not os.listdir('.')


def test_differences_from_the_first(run, alike):
    done = run(alike, 'cat $RIG_MACHINE/text', '--diff')
    assert bytes(done.out).decode() == (
        '---- n1, n2 (2 machines)\nx\ny\n'
        '---- n3\n--- n1\n+++ n3\n@@ -1,2 +1,2 @@\n x\n-y\n+z\n'
        '---- n4\n--- n1\n+++ n4\n@@ -1,2 +0,0 @@\n-x\n-y\n')


def test_gathered_failures_are_shown_with_what_they_said(run, named):
    machines, files = named('a', 'b', 'off')
    machines[2].stop()
    done = run(files, 'echo said; exit 3', '--gather')
    assert (done.status, done.out) == (1, b'---- a, b (2 machines)\nsaid\n')
    assert done.notes == ['failed: a, b (exit code 3)', 'unreachable: off (nothing listens at '
                          f'127.0.0.1 port {machines[2].port})']


def test_much_can_be_gathered(start, named):
    machines, files = named('a', 'b')
    running = start(files, 'yes | head -c 30000000', '--gather')
    done = running.end()
    assert done.out == b'---- a, b (2 machines)\n' + b'y\n' * 15_000_000


@pytest.mark.parametrize('option', ['--gather', '--diff'])
def test_what_was_not_fetched_when_it_was_interrupted_is_not_shown(start, named, outside, option):
    (machine,), files = named('a')
    machine.hold_fetches(outside / 'go')
    running = start(files, 'head -c 300000 /dev/zero', option)
    wait_until((outside / 'go.awaited').exists, 'a fetch')
    running.signal(signal.SIGINT)
    running.signal(signal.SIGTERM)      # two of one kind could arrive as one
    done = running.end()
    assert (done.status, done.out) == (130, b'')
    (outside / 'go').touch()
    wait_until(lambda: not machine.processes(), 'the end of the held fetch, which uses the folder')


# ---- Results ----

def test_results_come_back_to_a_folder_for_each_machine(run, named, project):
    machines, files = named('a', 'b')
    (project / 'data').write_text('data')
    (project / 'big').write_bytes(bytes(300_000))
    done = run(files, 'cat data; wc -c <big; hostname >name; echo $SSH_SCHEDULER_JOB >made/job',
               '--copy-forwards', 'data', '--copy-backwards', 'made', '--job-name', 'r')
    assert done.status == 1             # the folder `made` is missing
    for path in RESULTS.glob('r_*'):
        path.unlink() if path.is_file() else path.rmdir()
    done = run(files, 'cat data; ls; mkdir made; echo $SSH_SCHEDULER_JOB >made/job',
               '--copy-forwards', 'data', '--copy-backwards', 'made', '--job-name', 's')
    assert done.status == 0, done
    assert sorted(bytes(done.out).split(b'\n')) == [b'', b'a: datadata', b'b: datadata']
    for name in 'ab':
        assert (RESULTS / f's_{name}/made/job').read_text() == f's_{name}\n'
        assert (RESULTS / f's_{name}.out').read_text() == 'datadata\n'
    assert_all_clean(machines)


def test_nothing_goes_and_nothing_comes_by_default(run, lab1, project):
    (project / 'data').write_text('data')
    done = run([file_of(lab1)], 'ls; echo made >made')
    assert (done.status, done.out, done.err) == (0, b'', b'')
    assert os.listdir(project) == ['data']


def test_where_results_go_is_said(run, lab1):
    done = run([file_of(lab1)], 'echo made >made', '--copy-backwards', 'made')
    place = re.fullmatch(r'results go to (job_results/echo-\d{4}_)<machine>', done.notes[0])[1]
    assert (done.status, done.notes[1:]) == (0, [])
    assert Path(f'{place}lab1/made').read_text() == 'made\n'
    quiet = run([file_of(lab1)], 'echo made >made', '--copy-backwards', 'made', '--job-name', 'n')
    assert (quiet.status, quiet.err) == (0, b'')


@pytest.mark.skipif(os.getuid() != 0, reason='only root can make files of another user')
def test_what_the_login_cannot_read_is_not_removed_at_the_end(start, lab, gate):
    machine = lab(uid=20001)
    running = start([file_of(machine)], f'mkdir shut; echo $PWD/; {gate.wait("a")}',
                    '--copy-backwards', '.')
    running.until(b'/\n')
    shut = Path(running.out.decode().split()[-1]) / 'shut'
    (shut / 'model').write_text('m')
    shut.chmod(0o700)
    os.chown(shut, 0, 0)
    gate.open('a')
    done = running.end()
    assert done.status == 0 and 'may not read shut' in done.notes[-1], done
    for pid, _ in machine.processes():
        assert rig.ends(pid)            # also a process that would remove the folder
    assert (shut / 'model').read_text() == 'm'


def test_results_that_are_there_are_not_replaced(run, lab1, project):
    assert run([file_of(lab1)], 'echo 1', '--job-name', 'x').status == 0
    done = run([file_of(lab1)], 'echo 2', '--job-name', 'x')
    assert (done.status, done.out) == (2, b'')
    assert ('there are results of x_lab1 already. Choose another --job-name, or delete them: rm -r '
            'job_results/x_lab1.out job_results/x_lab1.err') in done.notes[0]
    assert (RESULTS / 'x_lab1.out').read_text() == '1\n'


def test_machines_of_one_name_are_told_apart(run, lab1, lab2):
    done = run([str(lab1.yaml(name='same')), str(lab2.yaml(name='same'))], 'true')
    assert (done.status, done.out) == (2, b'')
    assert 'same' in done.notes[0]


# ---- Machines from a file ----

def test_machines_from_a_file(run, run_cli, named, project):
    _, files = named('a', 'b')
    Path('all').write_text(f'# the machines\n{files[0]}\n\n  {files[1]}\n')
    done = run(['@all'], 'echo x')
    assert (done.status, sorted(done.out.splitlines())) == (0, [b'a: x', b'b: x'])
    Path('one').write_text(f'{files[0]}\n')
    assert sorted(run(['@one', files[1]], 'echo x').out.splitlines()) == [b'a: x', b'b: x']
    asked = run_cli('query_machines', '--machines', '@all')
    assert (asked.returncode, asked.stdout.count('\n')) == (0, 4)
    Path('batch.sh').write_text('echo batch\n')
    batch = run_cli('execute_batch', 'batch.sh', '--no-gpu-required', '--machines', '@all')
    assert batch.returncode == 0, batch.stderr
    assert batch.stdout.startswith("machine limits:  {'a': ")
    assert (RESULTS / 'batch.sh.1.out').read_text() == 'batch\n'


# ---- execute_to is stopped ----

@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_its_end_is_that_of_what_it_started(start, named, tmp_path, number):
    """Unlike clush, execute_to stops its remote processes even if it is killed."""
    machines, files = named('a', 'b')
    ledgers = []
    for machine in machines:
        ledgers.append(tmp_path / f'ledger.{machine.name}')
        ledgers[-1].touch()
        (machine.folder / 'it').write_text(nasty_tree(ledgers[-1]))
    running = start(files, '. $RIG_MACHINE/it')
    pids = [nasty_pids(ledger) for ledger in ledgers]
    if number == signal.SIGKILL:
        running.process.kill()
    else:
        running.signal(number)
    done = running.end()
    assert done.status == (130 if number != signal.SIGKILL else -9)
    for found in pids:
        for kind, pid in found.items():
            assert rig.ends(pid), kind
    for machine in machines:
        wait_until(lambda machine=machine: not machine.processes(), 'the end of all')
    assert_all_clean(machines)


@with_constants
def test_a_second_interrupt_stops_waiting(start, named, gate):
    machines, files = named('a', 'b')
    running = start(files, f'echo one; {gate.wait("a")}', env=constants(INTERRUPT_S=40.0))
    running.until(b'a: one')
    running.until(b'b: one')
    machines[0].freeze()
    began = time.monotonic()
    running.signal()
    running.signal(signal.SIGTERM)      # two of one kind could arrive as one
    done = running.end()
    assert (done.status, time.monotonic() - began < 30) == (130, True)
    assert any('may still run on a' in line for line in done.notes)
    machines[0].thaw()


def test_a_reader_that_leaves_ends_it_all(start, named):
    machines, files = named('a', 'b')
    began = time.monotonic()
    running = start(files, SAYS_MUCH)
    running.size(1)
    del running._open[running.process.stdout.fileno()]
    running.process.stdout.close()
    assert running.end().status == 1
    assert time.monotonic() - began < 30
    assert_all_clean(machines)


def test_an_interrupt_while_it_connects(start, named, client_home):
    machines, files = named('a')
    machines[0].freeze()
    running = start(files, 'true')
    wait_until(lambda: any('ssh -F' in rig.cmdline(pid) for pid in rig.knowing(client_home)),
               'an ssh that waits')
    running.signal()
    assert running.end().status == 130
    machines[0].thaw()


def test_an_interrupt_names_those_it_waited_for(start, named, gate):
    machines, files = named('cold', 'done', 'one', 'two', 'later')
    machines[0].freeze()
    (machines[1].folder / 'it').write_text('echo done')
    for machine in machines[2:]:
        (machine.folder / 'it').write_text(f'echo here; {gate.wait("a")}')
    running = start(files, '. $RIG_MACHINE/it', '--fanout=3')
    running.until(b'one:   here')
    running.until(b'two:   here')
    running.signal()
    done = running.end()
    assert (done.status, b'done:  done' in done.out) == (130, True)
    cold, ran, later = sorted(done.notes)
    assert re.fullmatch(r'interrupted: cold \(did not answer within \d+ s\)', cold)
    assert (later, ran) == ('interrupted: one, two (the command ran)',
                            'interrupted: later (not begun)')
    machines[0].thaw()


def test_what_has_no_reader_at_all(start_cli, lab1, project):
    """The stdout of the program is open for reading only, so nothing can be printed."""
    null = os.open(os.devnull, os.O_RDONLY)
    process = start_cli('execute_to', '--machines', lab1.yaml(), '--', 'echo x', stdout=null,
                        binary=True)
    os.close(null)
    _, complaint = process.communicate(timeout=60)
    assert (process.returncode, complaint) == (
        1, b'WARNING: stdout cannot be written: Bad file descriptor\n')
