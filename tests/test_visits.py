"""Access to a running job: a shell beside it, and ports; with real sshds, ptys and servers."""
import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import rig
from batching import NO_GPU, RESULTS, assert_clean, result, wait_until, wrote
from commands import Running, at_terminal, word
from test_jumps import at, ssh_config  # noqa: F401

import ssh_scheduler as s

JOB = ('--detach', '--copy-forwards', '--job-name', 'job')
# Variables that a shell sets itself, more of them on a terminal, and those of one job.
OWN = {'PWD', 'OLDPWD', 'SHLVL', '_', 'TERM', 'SSH_SCHEDULER_ID', 'BASH_ENV', 'SSH_CLIENT',
       'SSH_CONNECTION', 'SSH_TTY'}


@pytest.fixture
def command(start_cli, project, outside):
    """Start execute_remote: command(*words) -> Running."""
    def begin(*words, stdin=subprocess.DEVNULL, **settings):
        return Running(start_cli('execute_remote', *words, binary=True, stdin=stdin, **settings))

    begin.begun = outside / 'begun'         # see with_job
    return begin


@pytest.fixture
def shell(command):
    """Run a text in a shell beside a job: shell(text, name) -> Running that has ended."""
    def run(text, name='job', *words):
        visit = command('--shell', name, *words, stdin=subprocess.PIPE)
        visit.process.stdin.write(text.encode())
        visit.process.stdin.close()
        return visit.end()

    return run


@pytest.fixture
def terminal(scheduler, client_env, project):
    """Open a shell on its own terminal: terminal(name) -> Terminal."""
    with contextlib.ExitStack() as ends:
        yield lambda *words: ends.enter_context(
            at_terminal(scheduler, client_env, 'execute_remote', '--shell', *words))


@pytest.fixture(params=['ssh', 'localhost'])
def machine(request):
    return request.getfixturevalue('lab1') if request.param == 'ssh' else 'localhost'


def variables(text):
    """Return {name: value} of the output of `env -0`, without a shell's own variables."""
    entries = (entry.partition('=')[::2] for entry in text.split('\0') if '=' in entry)
    return {name: value for name, value in entries if name not in OWN}


def with_job(command, machine, text, *words):
    """Start a job that no client watches, and wait until it has begun."""
    text = f': >{command.begun}; {text}'
    done = command('--machine', word(machine), *JOB, *words, '--', text).end()
    assert done.status == 0, done
    wait_until(command.begun.exists, 'the job')     # a shell waits only some seconds for it


def refused(shell):
    """Return the one sentence with which a shell is refused."""
    visit = shell('echo ran')
    assert (visit.status, visit.out, len(visit.notes)) == (2, b'', 1)
    return visit.notes[0]


def without_job(command, name='job'):
    """Cancel the job."""
    assert command('--cancel', name).end().status == 0


# ---- The shell ----

def test_it_has_the_folder_and_the_environment_of_the_job(
        command, shell, machine, gate, outside, ledger):
    with_job(command, machine, f'env -0 >{outside}/env; echo mine >made; echo ran >>{ledger}; '
             f'{gate.wait("end")}')
    wrote(ledger, 'ran')
    visit = shell(f'cat made; env -0 >{outside}/shell; exit 7')
    assert (visit.status, bytes(visit.out), bytes(visit.err)) == (7, b'mine\n', b'')
    of_job = variables((outside / 'env').read_text())
    assert of_job['SSH_SCHEDULER_JOB'] == 'job'
    assert variables((outside / 'shell').read_text()) == of_job
    gate.open('end')
    assert command('--attach', 'job').end().status == 0
    assert (RESULTS / 'job/made').read_text() == 'mine\n'


def test_it_finds_the_job_of_a_folder_that_was_moved(command, shell, lab1, project):
    with_job(command, lab1, 'echo mine >made; sleep 1000')
    project.rename(project.parent / 'new')
    os.chdir(project.parent / 'new')
    visit = shell('until cat made; do sleep 0.1; done 2>/dev/null')
    assert (visit.status, bytes(visit.out)) == (0, b'mine\n'), visit
    without_job(command)
    assert_clean(lab1)


def test_a_job_of_a_copied_folder_is_found_without_the_first_folder(
        command, lab1, project, outside, ledger):
    text = f'echo ran >>{ledger}; sleep 1000'
    with_job(command, lab1, text)
    wrote(ledger, 'ran')
    copy = project.parent / 'copy'
    shutil.copytree(project, copy, symlinks=True)
    without_job(command)
    os.chdir(copy)
    command.begun.unlink()
    with_job(command, lab1, text)           # the copy has a job of its own
    wrote(ledger, 'ran', 'ran')
    project.rename(outside / 'old')
    shutil.rmtree(outside / 'old')
    visit = command('--shell', 'job', stdin=subprocess.DEVNULL).end()
    assert visit.status == 0, visit
    without_job(command)
    assert_clean(lab1)


def test_it_has_the_gpus_and_the_setup_of_a_job_of_a_batch(
        batches, shell, lab, gate, outside, ledger):
    """The client runs and has the lock; the start file of the login sets other values."""
    machine = lab(gpus=rig.fake_gpus(2), startup={'.bashrc': '''
        export CUDA_VISIBLE_DEVICES=9 CHOSEN=login ONLY_LOGIN=1
        hello() { echo "hello $CHOSEN"; }
    '''})
    yaml = machine.yaml(env={'OF_FILE': 'a b\n"c'}, setup='export CHOSEN=setup; unset ONLY_LOGIN')
    line = f'env -0 >{outside}/$SSH_SCHEDULER_JOB; echo ran >>{ledger}; {gate.wait("end")}'
    batch = batches.start([line, line], [yaml], '--memory-required=100')
    wrote(ledger, 'ran', 'ran')
    seen = set()
    for name in ('batch.sh.1', 'batch.sh.2'):
        visit = shell(f'hello; env -0 >{outside}/shell', name)
        assert (visit.status, bytes(visit.out)) == (0, b'hello setup\n'), visit
        got = variables((outside / 'shell').read_text())
        assert got == variables((outside / name).read_text())
        assert (got['OF_FILE'], got['CHOSEN']) == ('a b\n"c', 'setup')
        seen.add(got['CUDA_VISIBLE_DEVICES'])
    assert seen == {'0', '1'}
    gate.open('end')
    gate.open('end')
    assert batch.end().returncode == 0
    assert_clean(machine)


def test_a_terminal_has_the_same(command, terminal, lab, outside, ledger):
    machine = lab(startup={'.bashrc': 'export CHOSEN=login\nPS1="prompt> "\nalias hi="echo hi"\n'})
    yaml = machine.yaml(setup='export CHOSEN=setup')
    with_job(command, yaml, f'env -0 >{outside}/env; echo mine >made; echo ran >>{ledger}; '
             'sleep 1000')
    wrote(ledger, 'ran')
    at = terminal('job')
    at.until(rb'\(job\) prompt> ')
    at.type(f'hi; cat made; stty size; env -0 >{outside}/shell; exit 3\n'.encode())
    assert at.end() == 3
    for said in (rb'[\r\n]hi\r', rb'\nmine\r', rb'\n30 90\r'):
        assert re.search(said, at.said), at.said
    assert variables((outside / 'shell').read_text()) == variables((outside / 'env').read_text())
    wait_until(lambda: not [*machine.shared.glob('ssh_scheduler_shell.*')], 'no file of it')
    without_job(command)


def test_a_start_file_that_becomes_another_shell(command, terminal, lab):
    machine = lab(startup={'.bashrc': '[[ $- != *i* ]] || exec zsh -f\n'})
    yaml = machine.yaml(setup='export CHOSEN=setup')
    with_job(command, yaml, 'sleep 1000')
    at = terminal('job')
    at.until(rb'# |% ')
    at.type(b'echo "<$CHOSEN $SSH_SCHEDULER_ID>"; exit 255\n')
    assert at.end() == 255
    assert b'<setup >' in at.said
    wait_until(lambda: not [*machine.shared.glob('ssh_scheduler_shell.*')], 'no file of it')
    without_job(command)


def test_a_typed_interrupt_is_the_shells(command, terminal, machine):
    with_job(command, machine, 'sleep 1000')
    at = terminal('job')
    at.until(rb'\(job\) ')
    sleep = f'sleep 1000.{os.getpid()}'         # unique among runs of these tests
    at.type(f'HISTFILE=; (exec {sleep})\n'.encode())
    # A bash that is about to exec another program forgets that it was interrupted.
    wait_until(lambda: any(rig.cmdline(pid) == sleep for pid in rig.pids()), 'the sleep')
    at.type(b'\x03')
    at.type(b'echo "go"es on; exit 5\n')
    at.until(rb'goes on')
    assert at.end() == 5
    without_job(command)


def test_to_cancel_the_job_leaves_the_shell(command, terminal, machine, ledger):
    with_job(command, machine, f'echo $$ >>{ledger}; sleep 1000')
    at = terminal('job')
    at.until(rb'\(job\) ')
    at.type(f'HISTFILE=; echo $$ >>{ledger}; (exec sleep 2000) &\n'.encode())
    wait_until(lambda: len(ledger.read_text().splitlines()) == 2, 'the shell')
    without_job(command)
    assert rig.ends(int(ledger.read_text().split()[0]))
    at.type(b'kill %1 && echo "still " here\n')
    at.until(rb'still  here')
    at.until(rb'ssh-scheduler: job has ended')
    at.type(b'exit 6\n')
    assert at.end() == 6
    if machine != 'localhost':
        assert_clean(machine)


def test_the_end_of_the_job_does_not_wait_for_the_shell(batches, terminal, lab, gate, ledger):
    """Processes of the shell are not reported as the job's; the next job starts, too."""
    machine = lab(cores=1)
    batch = batches.start([f'echo ran >>{ledger}; {gate.wait("end")}; echo made >made',
                           f'ls; {gate.wait("next")}'],
                          [machine], '--copy-forwards', *NO_GPU)
    wrote(ledger, 'ran')
    at = terminal('batch.sh.1')
    at.until(rb'\(batch.sh.1\) ')
    at.type(f'HISTFILE=; sleep 1000 & exec 5<.; echo shell >>{ledger}\n'.encode())
    wrote(ledger, 'ran', 'shell')
    gate.open('end')
    batch.until('finished: batch.sh.1;')
    batch.until('started: batch.sh.2;')
    gate.open('next')
    done = batch.end()
    assert (done.returncode, done.stderr) == (0, ''), done
    assert (RESULTS / 'batch.sh.1/made').read_text() == 'made\n' and result('batch.sh.2') == b''
    at.type(b'kill %1; exit 0\n')
    assert at.end() == 0
    assert_clean(machine)


def test_beside_a_job_whose_client_was_killed(batches, shell, lab1, gate, ledger):
    batch = batches.start([f'echo ran >>{ledger}; {gate.wait("end")}'], [lab1], *NO_GPU)
    wrote(ledger, 'ran')
    batch.process.kill()
    batch.end()
    assert shell('echo $SSH_SCHEDULER_JOB', 'batch.sh.1').out == b'batch.sh.1\n'
    gate.open('end')
    again = batches.run(None, [lab1], *NO_GPU)
    assert again.returncode == 0, again.stderr
    assert_clean(lab1, cache=True)


@pytest.mark.parametrize('how', ['exec', 'limit', 'tty'])
def test_beside_jobs_of_other_kinds(command, shell, scheduler, client_env, lab1, ledger, how):
    """A job that became another program, without any mark; with a time limit; on a terminal."""
    bare = 'for fd in $(ls /proc/$$/fd); do ((fd < 3)) || eval "exec $fd>&-"; done; exec sleep 1000'
    text = f"echo $$ >>{ledger}; export OF_JOB=1; exec env -i OF_JOB=2 /bin/bash -c '{bare}'"
    if how == 'tty':
        line = ['execute_remote', '--machine', word(lab1), '--copy-forwards', '--job-name', 'job',
                '--tty', '--', 'echo ready; sleep 1000']
        with at_terminal(scheduler, client_env, *line) as job:
            job.until(rb'ready')
            assert shell('echo $SSH_SCHEDULER_JOB').out == b'job\n'
            job.type(b'\x03')
            assert job.end() == 130
        return
    with_job(command, lab1, *([text] if how == 'exec' else [
        f'echo $$ >>{ledger}; sleep 1000', '--timeout=1h']))
    wait_until(lambda: ledger.read_text(), 'the job')
    if how == 'exec':       # wait until bash has become `sleep`
        pid = int(ledger.read_text())
        wait_until(lambda: rig.read_proc(pid, 'comm') == b'sleep\n', 'the other program')
    visit = shell('echo "$OF_JOB $SSH_SCHEDULER_JOB"')
    assert visit.out == (b'2 \n' if how == 'exec' else b' job\n'), visit
    without_job(command)


def test_an_sshd_that_allows_one_session(command, shell, terminal, lab, server, ledger):
    machine, (there, text), here = lab(sshd_options='MaxSessions 1'), server, rig.free_port()
    with_job(command, machine, text)
    wrote(ledger, 'up')
    visit = shell('echo $SSH_SCHEDULER_JOB; echo err >&2; exit 3')
    assert (visit.status, bytes(visit.out), bytes(visit.err)) == (3, b'job\n', b'err\n')
    at = terminal('job', '--forward', f'{here}:{there}')
    at.until(rb'\(job\) ')
    assert get(here) == b'content\n'
    at.type(b'exit 255\n')
    assert at.end() == 255
    without_job(command)


def test_by_a_jump_host(command, shell, lab, ssh_config):       # noqa: F811
    machine, jump = lab(), lab()
    ssh_config(jump)
    with_job(command, machine.yaml(proxy_jump=at(jump)), 'sleep 1000')
    assert shell('echo $SSH_SCHEDULER_JOB').out == b'job\n'
    assert machine.logins() == jump.logins() == 2
    without_job(command)


# ---- No shell ----

def test_no_such_job(shell, project):
    visit = shell('echo ran', 'other')
    assert (visit.status, visit.out) == (2, b'')
    assert visit.notes == ['execute_remote: no job other has started in this folder. If it is one '
                           'of a batch, it may wait: execute_batch <batch> --status shows that.']
    assert not RESULTS.exists()


def test_a_job_that_has_ended(command, shell, lab1, ledger, gate):
    with_job(command, lab1, f'{gate.wait("go")}; echo ran >>{ledger}')
    gate.open('go')         # no client is there to fetch its results
    wrote(ledger, 'ran')
    jobs = lab1.home / '.ssh_scheduler' / s.project_name() / 'jobs'
    wait_until(lambda: any('#ended' in path.read_text() for path in jobs.glob('job.1-*')
                           if path.suffix not in ('.out', '.err', '.back')), 'its record')
    visit = shell('echo ran')
    assert (visit.status, visit.out) == (2, b'')
    assert visit.notes == [f'execute_remote: job has ended on {word(lab1)}. The client '
                           'that runs fetches its results; if none runs, type the command again '
                           'that started it.']
    assert command('--attach', 'job').end().status == 0
    visit = shell('echo ran')
    assert (visit.status, visit.notes) == (2, [
        'execute_remote: the job job has ended, and its results are here: look at job_results/job'])


def test_a_job_that_was_cancelled(command, shell, lab1):
    with_job(command, lab1, 'sleep 1000')
    without_job(command)
    visit = shell('echo ran')
    assert (visit.status, visit.notes) == (
        2, ['execute_remote: the job job does not run: it was cancelled. To start it again, type '
            'the command again that started it.'])


def test_a_job_whose_files_are_copied(batches, shell, lab, gate, ledger):
    """The job was sent, but has not begun: its process on the machine waits for its files."""
    machine = lab()
    real = rig.program('cp')
    machine._script('cp', f'#!/bin/bash\necho cp >>{ledger}\n{gate.wait("cp")}\nexec {real} "$@"\n')
    batch = batches.start(['true'], [machine], *NO_GPU)
    wrote(ledger, 'cp')
    visit = shell('echo ran', 'batch.sh.1')
    assert (visit.status, visit.out) == (2, b'')
    assert visit.notes == ['execute_remote: batch.sh.1 is about to begin on '
                           f'{word(machine)}: try again in a moment.']
    gate.open('cp')
    assert batch.end().returncode == 0


def test_a_job_of_which_the_machine_knows_nothing(command, shell, lab):
    machine = lab()
    with_job(command, machine, 'sleep 1000')
    machine.power_off()
    for path in machine.home.glob('.ssh_scheduler/project-*/jobs/job.1-*'):
        path.unlink()
    machine.start()
    assert f'job has not begun on {word(machine)}. Its client may be ' in refused(shell)


def test_a_job_that_is_lost(command, shell, lab):
    machine = lab()
    with_job(command, machine, 'sleep 1000')
    machine.power_off()
    machine.set_boot_id()
    machine.start()
    assert f'job does not run on {word(machine)} any more: the machine was ' in refused(shell)


def test_a_machine_without_room_for_the_files_of_a_shell(command, shell, lab):
    machine = lab()
    with_job(command, machine, 'sleep 1000')
    machine._script('mktemp', '#!/bin/bash\nexit 1\n')
    assert 'there is no room for the files of a shell' in refused(shell)
    without_job(command)


@pytest.mark.skipif(os.getuid() != 0, reason='only root has machines of another uid')
def test_a_job_whose_environment_is_closed(command, shell, lab, ledger):
    """A program that has become another user has such an environment."""
    machine = lab(uid=12345)
    with_job(command, machine, 'exec python3 -c "import ctypes, time; ctypes.CDLL(None).prctl('
             f"4, 0, 0, 0, 0); open('{ledger}', 'a').write('up\\n'); time.sleep(1000)\"")
    wrote(ledger, 'up')
    visit = shell('echo ran')
    assert (visit.status, visit.out, len(visit.notes)) == (2, b'', 1)
    assert 'but its environment cannot be read there: ' in visit.notes[0]
    without_job(command)


def test_a_machine_that_is_away(command, shell, lab):
    machine = lab()
    with_job(command, machine, 'sleep 1000')
    machine.stop()
    visit = shell('echo ran')
    assert (visit.status, visit.out) == (125, b'')
    assert visit.notes == [f'execute_remote: {word(machine)} cannot be used: nothing listens at '
                           f'127.0.0.1 port {machine.port}.']
    machine.start()
    without_job(command)


def test_a_machine_that_is_cut_off(command, terminal, lab):
    machine = lab()
    with_job(command, machine, 'sleep 1000')
    at = terminal('job')
    at.until(rb'\(job\) ')
    machine.stop()
    assert at.end() == 125
    assert b': connection lost: ' in at.said and b'job keeps running.' in at.said
    machine.start()
    without_job(command)


def test_another_machine(command, shell, lab1, lab2):
    with_job(command, lab1, 'sleep 1000')
    visit = shell('echo ran', 'job', '--machine', word(lab2))
    assert visit.status == 2 and 'was started on ' in visit.notes[0]
    assert shell('echo ran', 'job', '--machine', word(lab1)).out == b'ran\n'
    without_job(command)


def test_an_interrupt_while_it_logs_in(command, terminal, lab, client_home):
    machine = lab()
    with_job(command, machine, 'sleep 1000')
    machine.freeze()
    at = terminal('job')
    wait_until(lambda: any('visit.config' in rig.cmdline(pid) for pid in rig.knowing(client_home)),
               'an ssh that waits')
    at.type(b'\x03')
    assert at.end() == 130
    machine.thaw()
    without_job(command)


def test_a_shell_that_is_told_to_end(command, lab1, ledger):
    with_job(command, lab1, 'sleep 1000')
    visit = command('--shell', 'job', stdin=subprocess.PIPE)
    visit.process.stdin.write(f'echo $$ >>{ledger}; exec sleep 1000\n'.encode())
    wait_until(lambda: ledger.read_text(), 'the shell')
    visit.process.send_signal(signal.SIGTERM)
    assert visit.end().status == 143
    without_job(command)


def test_a_shell_that_reads_a_pipe_is_interrupted_with_what_it_runs(command, machine, ledger):
    with_job(command, machine, 'sleep 1000')
    visit = command('--shell', 'job', stdin=subprocess.PIPE)
    sleep = f'sleep 1001.{os.getpid()}'         # unique among runs of these tests
    visit.process.stdin.write(f'echo $$ >>{ledger}; {sleep}\n'.encode())
    visit.process.stdin.flush()
    wait_until(lambda: any(rig.cmdline(pid) == sleep for pid in rig.pids()), 'the sleep')
    visit.signal(signal.SIGINT)
    assert visit.end().status == 130
    wait_until(lambda: not any(rig.cmdline(pid) == sleep for pid in rig.pids()), 'its end')
    without_job(command)


def test_a_shell_at_a_terminal_ends_with_its_client(command, terminal, machine):
    with_job(command, machine, 'sleep 1000')
    at = terminal('job')
    at.until(rb'\(job\) ')
    os.kill(at.pid, signal.SIGTERM)
    assert at.end() == 143
    without_job(command)


def test_a_shell_that_does_not_listen_ends_with_its_client(command, terminal):
    with_job(command, 'localhost', 'sleep 1000')
    at = terminal('job')
    at.until(rb'\(job\) ')
    at.type(b"trap '' HUP; echo de''af\n")
    at.until(rb'deaf')
    os.kill(at.pid, signal.SIGTERM)
    assert at.end() == 143
    without_job(command)


# ---- Ports ----

SERVER = """\
import http.server
server = http.server.HTTPServer(('127.0.0.1', {port}), http.server.SimpleHTTPRequestHandler)
with open('{ledger}', 'a') as ledger:
    ledger.write('up\\n')
server.serve_forever()
"""


@pytest.fixture
def server(ledger):
    """Return (a port, a command that serves its folder at that port and writes to the ledger)."""
    port = rig.free_port()
    return port, f'echo content >file; exec python3 -c {shlex.quote(SERVER.format(**locals()))}'


def get(port):
    with urllib.request.urlopen(f'http://localhost:{port}/file', timeout=rig.SAFETY_NET_S) as page:
        return page.read()


def is_closed(port):
    with socket.socket() as probe:
        return probe.connect_ex(('127.0.0.1', port)) != 0


def test_a_port_while_the_command_runs(command, lab1, server, ledger):
    (there, text), here = server, rig.free_port()
    job = command('--machine', word(lab1), '--copy-forwards', '--forward', f'{here}:{there}', '--',
                  text)
    job.until(f'http://localhost:{here} reaches port {there} of {word(lab1)}\n'.encode(), 'err')
    wrote(ledger, 'up')
    assert get(here) == b'content\n'
    job.signal(signal.SIGINT)
    assert job.end().status == 130
    assert is_closed(here)


def test_ports_while_a_job_is_watched(command, lab1, server, ledger):
    (there, text), here, other = server, rig.free_port(), rig.free_port()
    with_job(command, lab1, text)
    wrote(ledger, 'up')
    watch = command('--attach', 'job', '--forward', f'{here}:{there}', f'{other}:{there}')
    watch.until(f'http://localhost:{here} reaches port {there} of {word(lab1)}\n'.encode(), 'err')
    watch.until(f'http://localhost:{other} reaches port {there} of {word(lab1)}\n'.encode(), 'err')
    assert get(here) == get(other) == b'content\n'
    watch.signal(signal.SIGINT)
    assert watch.end().status == 130
    assert is_closed(here) and is_closed(other)
    without_job(command)


@pytest.mark.parametrize('lives', [True, False], ids=['its client runs', 'its client was killed'])
def test_a_port_while_a_job_of_a_batch_is_watched(batches, command, lab, server, ledger, lives):
    (there, text), here, machine = server, rig.free_port(), lab()
    Path('serve').write_text(text)      # the command has several lines
    batch = batches.start(['echo out; . ./serve'], [machine], *NO_GPU)
    wrote(ledger, 'up')
    batch.until('started: ')
    if not lives:
        batch.process.kill()
        batch.end()
    watch = command('--attach', 'batch.sh.1', '--forward', f'{here}:{there}')
    reached = f'http://localhost:{here} reaches port {there} of {word(machine)}\n'
    watch.until(reached.encode(), 'err')
    watch.until(b'out\n')
    assert get(here) == b'content\n'
    watch.signal(signal.SIGINT)
    assert watch.end().status == 130
    assert is_closed(here)
    if lives:
        batch.process.send_signal(signal.SIGINT)
        assert batch.end().returncode == 130
    else:
        assert batches._run_cli('execute_batch', 'batch.sh', '--cancel').returncode == 0


def test_a_port_while_a_shell_is_open(command, terminal, lab, server, ledger):
    (there, text), here = server, rig.free_port()
    machine = lab(sshd_options='MaxSessions 10')
    with_job(command, machine, text)
    wrote(ledger, 'up')
    at = terminal('job', '--forward', f'{here}:{there}')
    at.until(f'http://localhost:{here} reaches port {there} of '.encode())
    assert get(here) == b'content\n'
    at.until(rb'\(job\) ')
    at.type(b'exit\n')
    assert at.end() == 0
    assert is_closed(here)
    without_job(command)


def test_a_port_again_when_contact_is_lost(command, lab, server, ledger):
    (there, text), here = server, rig.free_port()
    machine = lab()
    job = command('--machine', word(machine), '--copy-forwards', '--forward', f'{here}:{there}',
                  '--', text)
    wrote(ledger, 'up')
    job.until(b'reaches port', 'err')
    machine.stop()
    job.until(b'connection lost', 'err')
    machine.start()
    job.until(b'connected again', 'err')

    def answers():
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            return get(here) == b'content\n'

    wait_until(answers, 'the port')
    job.signal(signal.SIGINT)
    assert job.end().status == 130
    assert job.err.count(b'reaches port') == 1


def test_a_port_that_is_in_use_here(command, lab1, project):
    with socket.socket() as used:
        used.bind(('127.0.0.1', 0))
        used.listen()
        port = used.getsockname()[1]
        job = command('--machine', word(lab1), '--copy-forwards', '--forward', str(port), '--',
                      'echo ran').end()
    other = port + 10000 if port < 50000 else port - 10000
    assert (job.status, job.out, job.notes) == (2, b'', [
        f'execute_remote: --forward: port {port} of this computer is in use. Try: '
        f'--forward {other}:{port}'])
    assert not RESULTS.exists()


def test_a_port_of_localhost(command, project, server, ledger):
    there, text = server
    job = command('--machine', 'localhost', '--copy-forwards', '--forward', str(there), '--', text)
    job.until(f'http://localhost:{there} reaches port {there} of localhost\n'.encode(), 'err')
    wrote(ledger, 'up')
    assert get(there) == b'content\n'
    job.signal(signal.SIGINT)
    assert job.end().status == 130


@pytest.mark.parametrize('words, said', [
    (['x'], "not 'x'."), (['0'], "not '0'."), (['1:70000'], "not '1:70000'."),
    (['7:8', '7:9'], 'names port 7 twice.')])
def test_ports_that_are_none(run_cli, project, words, said):
    done = run_cli('execute_remote', '--machine', 'localhost', '--forward', *words, '--', 'true')
    assert done.returncode == 2 and said in done.stderr.splitlines()[0]


@pytest.mark.parametrize('words', [
    ['--shell', 'a', '--tty'], ['--shell', 'a', '--detach'], ['--shell', 'a', '--stdin'],
    ['--shell', 'a', '--job-name', 'b'], ['--cancel', 'a', '--forward', '1'],
    ['--machine', 'localhost', '--detach', '--forward', '1', '--', 'true']])
def test_what_cannot_be_given_together(run_cli, project, words):
    done = run_cli('execute_remote', *words)
    assert done.returncode == 2 and 'give one of them' in done.stderr.splitlines()[0]
