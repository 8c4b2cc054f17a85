"""Fixtures based on rig.py: machines to log in to, and the program as a user starts it."""
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import clusters
import hosts as host_rig
import pytest
import rig
from batching import Batches, Gate, tell

# ---- The session ----

# A script starts pytest in the background with these signals ignored; children would inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)


@pytest.fixture(scope='session', autouse=True)
def nothing_left():
    """Exit at once if the rig cannot work; fail at the end if the tests left anything."""
    missing = rig.missing_tools()
    if missing:
        pytest.exit('The tests start real machines on loopback and need more Debian packages: '
                    f'sudo apt-get install {" ".join(missing)}', returncode=3)
    results = Path(__file__).resolve().parent.parent / 'job_results'
    were_there = results.exists()
    yield
    rig.remove_shared_farms()
    left = rig.leftovers() + host_rig.leftovers() + clusters.leftovers()
    left += [f'{results}: a test ran a batch in the checkout'] * (
        results.exists() and not were_there)
    assert not left, 'the tests left behind:\n' + '\n'.join(left)


def pytest_make_parametrize_id(val):
    """Shorten the name of a test with long data: pytest puts it into the environment."""
    if isinstance(val, (str, bytes)) and len(val) > 100:
        return f'{len(val)} of {val[:20]!r}'
    return None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Show the end of each machine's log and its processes below a failed test.

    Kill these processes, since other tests share the machine.
    """
    report = (yield).get_result()
    if report.failed:
        for machine in rig.RUNNING:
            lines = machine.log.read_text(errors='replace').splitlines()
            report.sections.append((f'sshd log of {machine.name}', '\n'.join(lines[-40:])))
            left = machine.processes()
            report.sections.append((f'processes on {machine.name}', tell(left)))
            for pid, _ in left:
                rig.kill(pid, lambda pid, machine=machine: pid in dict(machine.processes()))
        for cluster in clusters.RUNNING:
            report.sections.append(('log of slurmctld',
                                    '\n'.join(cluster.events().splitlines()[-60:])))
            report.sections.append(('jobs and workdir of the cluster', cluster.records()))


# ---- Machines ----

@pytest.fixture
def lab():
    """Start machines: lab(shell='/bin/zsh', ...); they stop with the test."""
    with contextlib.ExitStack() as machines:
        count = 0

        def start(**settings):
            nonlocal count
            count += 1
            settings.setdefault('name', f'own{count}')
            return machines.enter_context(rig.Machine(**settings))

        yield start


@pytest.fixture(scope='session')
def lab1():
    """Start a machine with two GPUs that all tests share: leave it as you found it."""
    with rig.Machine('lab1', gpus=rig.fake_gpus(2)) as machine:
        yield machine


@pytest.fixture(scope='session')
def lab2():
    """Start another machine like lab1."""
    with rig.Machine('lab2', gpus=rig.fake_gpus(2)) as machine:
        yield machine


@pytest.fixture
def host():
    """Make separate computers (see hosts.py): host(disk={'size': 1 << 20}, ...)."""
    if host_rig.why_not():
        pytest.skip(host_rig.why_not())
    with contextlib.ExitStack() as made:
        count = 0

        def start(**settings):
            nonlocal count
            count += 1
            settings.setdefault('name', f'host{count}')
            return made.enter_context(host_rig.Host(**settings))

        yield start


@pytest.fixture
def hosts(host):
    """Make two hosts."""
    return host(), host()


@pytest.fixture
def disk():
    """Make small file systems on this computer: disk(size=..., inodes=..., at=folder)."""
    if host_rig.why_not():
        pytest.skip(host_rig.why_not())
    with contextlib.ExitStack() as made:
        yield lambda **settings: made.enter_context(host_rig.Disk(**settings))


@pytest.fixture
def make_cluster():
    """Make clusters with a real Slurm (see clusters.py): make_cluster(nodes=3, conf=[...])."""
    with contextlib.ExitStack() as made:
        def start(*nodes, **settings):
            trouble = clusters.why_not(settings.get('accounting', False))
            if trouble:
                pytest.skip(trouble)
            return made.enter_context(clusters.Cluster(*nodes, **settings))

        yield start


@pytest.fixture
def cluster(make_cluster):
    """Make a cluster of two nodes, each with 4 cores and 2 GPUs."""
    return make_cluster()


# ---- The client ----

@pytest.fixture
def project(tmp_path, monkeypatch):
    """Make an empty folder, and change to it."""
    folder = tmp_path / 'project'
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def client_home():
    """Make HOME of the program under test, with a short path, because tmp/ may have sockets.

    ssh takes `~` from the passwd database and not from $HOME.  So this folder alone does not hide
    the real user's ~/.ssh: the program names every file that ssh reads in its own configuration,
    and Machine.yaml() names the known hosts.

    When the test ends, all processes of the program must end: their environment has this folder.
    """
    folder = rig.temporary_folder('client')
    (folder / 'tmp').mkdir()
    yield folder
    left = [f'{pid} {rig.cmdline(pid)}' for pid in rig.knowing(folder)
            if not rig.ends(pid)]
    kill_all_of(folder)
    rig.remove(folder)
    assert not left, 'the program left processes behind on this side:\n' + '\n'.join(left)


def kill_all_of(client_home):
    for pid in rig.knowing(client_home):
        rig.kill(pid, lambda pid: pid in rig.knowing(client_home))


@pytest.fixture
def client_env(client_home):
    """Return the environment of the program under test, without the user's settings for ssh."""
    private = ('SSH_', 'XDG_', 'CUDA_')
    env = {name: value for name, value in os.environ.items() if not name.startswith(private)}
    # SHARED: each test gets a localhost with claims of its own
    return {**env, 'HOME': str(client_home), 'TMPDIR': str(client_home / 'tmp'),
            'SSH_SCHEDULER_SHARED': str(client_home / 'tmp')}


@pytest.fixture
def scheduler():
    """Return the file that start_cli and run_cli run."""
    return Path(__file__).resolve().parent.parent / 'ssh_scheduler.py'


@pytest.fixture
def start_cli(scheduler, client_env):
    """Start the program as a Popen with its own process group; kill the group after the test.

    `env` adds to the environment; with `binary` its streams are bytes, without any buffer.
    """
    started = []

    def start(*argv, cwd=None, env=None, binary=False, stdin=subprocess.PIPE,
              stdout=subprocess.PIPE, stderr=subprocess.PIPE):
        how = {'bufsize': 0} if binary else {'text': True, 'errors': 'replace'}
        process = subprocess.Popen(
            [sys.executable, str(scheduler), *map(str, argv)], cwd=cwd,
            env={**client_env, **(env or {})}, start_new_session=True, stdin=stdin,
            stdout=stdout, stderr=stderr, **how)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:      # not yet waited for, so nobody has reused its pid
            os.killpg(process.pid, signal.SIGKILL)
        for pipe in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(BrokenPipeError, AttributeError):
                pipe.close()
        process.wait()


@pytest.fixture
def run_cli(start_cli, client_home):
    """Run the program to its end, and to the end of its output: run_cli('execute_to', ...)."""
    def run(*argv, stdin='', cwd=None, env=None, timeout=60):
        process = start_cli(*argv, cwd=cwd, env=env)
        try:
            stdout, stderr = process.communicate(stdin, timeout)
        except subprocess.TimeoutExpired:
            why = ('did not end' if process.poll() is None else
                   f'exited with {process.returncode}, but something holds its output open')
            kill_all_of(client_home)
            stdout, stderr = process.communicate(timeout=rig.SAFETY_NET_S)
            pytest.fail(f'{" ".join(map(str, argv))}\n{why}, {timeout} s after its start\n'
                        f'---- stdout\n{stdout}\n---- stderr\n{stderr}')
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return run


# ---- Batches, and the gates and ledgers that order their jobs ----

@pytest.fixture
def batches(run_cli, start_cli, project):
    """Return Batches, which runs batches in the current, empty folder."""
    return Batches(run_cli, start_cli)


@pytest.fixture
def outside():
    """Make a folder that all machines and accounts share, for a ledger and gates."""
    folder = rig.temporary_folder('outside', mode=0o777)
    yield folder
    rig.remove(folder)


@pytest.fixture
def gate(outside):
    """Make a Gate at which jobs wait."""
    gate = Gate(outside / 'gate')
    yield gate
    gate.close()


@pytest.fixture
def ledger(outside):
    """Make a file to which jobs of all machines add lines; short lines are never mixed."""
    file = outside / 'ledger'
    file.touch()
    file.chmod(0o666)
    return file
