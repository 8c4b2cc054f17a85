"""A Host causes the faults that it promises, tried with plain ssh.  Fault tests rely on this."""
import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import hosts as host_rig
import pytest
import rig
from batching import NO_GPU, RESULTS, assert_clean, wait_until
from ledgers import check_exactly_once, ledger_line

SOON = ('-o', 'ConnectTimeout=1')       # for a login that cannot succeed


class Session:
    """A login that stays: the host sends back each line that it gets."""

    def __init__(self, host, text='echo in; cat'):
        self.process = subprocess.Popen([*host.ssh_argv(), text], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self.hear() == 'in'

    def say(self, line):
        self.process.stdin.write(f'{line}\n'.encode())
        self.process.stdin.flush()

    def hear(self, timeout_s=rig.SAFETY_NET_S):
        """Return the next line; None if none comes in time, '' at the end."""
        pipe = self.process.stdout
        if rig.wait_readable(pipe.fileno(), timeout_s=timeout_s):
            return pipe.readline().decode().rstrip('\n')

    @property
    def goes_on(self):
        self.say('still there')
        return self.hear() == 'still there'

    def breaks(self):
        """Wait until ssh says that it has lost its connection."""
        return self.process.wait(rig.SAFETY_NET_S) == 255


@pytest.fixture
def session():
    """Make sessions; they end with the test."""
    with contextlib.ExitStack() as made:
        def start(host, *text):
            session = Session(host, *text)
            made.enter_context(session.process)
            made.callback(session.process.kill)
            return session

        yield start


def login(host, text='true', *options):
    return subprocess.run([*host.ssh_argv(*options), text], stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=rig.SAFETY_NET_S)


def start_job(host):
    """Leave a process on the host that outlives its login; return its pid here, and there."""
    there = int(host.run('sleep 1000 </dev/null >/dev/null 2>&1 & echo $!').stdout)
    return host.pid_here(there), there


def until_filtered(host, packets=1):
    """Wait until this many packets have met the fault: silence alone does not show it."""
    wait_until(lambda: host.link.filtered() >= packets, 'a packet that is dropped')


# ---- What a host has for itself ----

def test_a_host_is_a_computer_of_its_own(hosts):
    look = ('hostname; cat /proc/sys/kernel/random/boot_id; pwd; cut -d. -f1 /proc/uptime; '
            'ls /proc/1/root; ps -e -o pid= | wc -l; ip -4 route; touch /tmp/mine /dev/shm/mine')
    said = []
    for host in hosts:
        name, boot_id, home, age, *_root, count, route = host.run(look).stdout.splitlines()
        assert (name, home) == (host.name, str(host.home))
        assert boot_id == (host.proc / 'sys/kernel/random/boot_id').read_text().strip()
        assert int(age) < 60 and int(count) < 10
        assert re.fullmatch(rf'198\.1[89]\.\S+/30 dev eth0 .* src {host.address} *', route)
        said.append((boot_id, route))
        assert {path.name for path in host.shared.iterdir()} == {'mine'}
        assert not Path('/tmp/mine').exists() and not Path('/dev/shm/mine').exists()
        assert host.logins() == 1
    assert said[0] != said[1] and said[0][0] not in Path(
        '/proc/sys/kernel/random/boot_id').read_text()


def test_it_has_what_machines_have(host):
    machine = host(gpus=rig.fake_gpus(3), cores=5, uid=20001, env={'ODD': 'a "b"'})
    said = machine.run('nproc; id -u; printenv ODD; nvidia-smi --query-gpu=index '
                       '--format=csv,noheader,nounits; touch new /tmp/new /dev/shm/new')
    assert (said.stdout, said.stderr) == ('5\n20001\na "b"\n0\n1\n2\n', '')
    assert machine.yaml().read_text().count(machine.address) == 1


def test_its_processes_are_seen_whatever_they_did(host):
    machine = host()
    there = machine.run('env -i setsid sleep 1000 </dev/null >/dev/null 2>&1 & echo $!').stdout
    seen = [(machine.pid_here(int(there)), 'sleep 1000')]
    wait_until(lambda: machine.processes() == seen, 'what was forked has become it')


def test_it_waits_for_orphans(host):
    machine = host()
    pid, _ = start_job(machine)
    wait_until(lambda: rig.parent_and_state(pid)[0] == machine.init, 'its parent is gone')
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not Path(f'/proc/{pid}').exists(), 'no zombie')


def test_folders_that_it_shall_see(host, outside, gate):
    machine = host(sees=(outside,))
    assert machine.run(f'ls -d {outside} {Path(__file__).parent}').stdout == f'{outside}\n' or \
        not str(Path(__file__)).startswith('/tmp/')
    with subprocess.Popen([*machine.ssh_argv(), gate.wait('a')]) as waits:
        gate.open('a')
        assert waits.wait(rig.SAFETY_NET_S) == 0


# ---- Its network ----

def test_a_cut_is_silence_and_what_was_said_comes_later(host, session):
    machine = host()
    line = session(machine)
    machine.cut()
    line.say('late')
    until_filtered(machine)
    assert (line.hear(timeout_s=0.1), line.process.poll()) == (None, None)
    failed = login(machine, 'true', *SOON)
    assert failed.returncode == 255 and 'timed out' in failed.stderr
    machine.restore()
    assert line.hear() == 'late'


def test_requests_arrive_when_replies_are_dropped(host, session):
    machine = host()
    line = session(machine, 'echo in; tee said')
    machine.drop_replies()
    line.say('it arrives')
    wait_until((machine.home / 'said').exists, 'the program that hears it')
    wait_until(lambda: (machine.home / 'said').read_text() == 'it arrives\n', 'what was said')
    until_filtered(machine)
    assert line.hear(timeout_s=0.1) is None
    machine.restore()
    assert line.hear() == 'it arrives'


def test_replies_arrive_when_requests_are_dropped(host, session):
    machine = host()
    os.mkfifo(machine.home / 'go')
    line = session(machine, 'echo in; cat <go; tee said')
    machine.drop_requests()
    line.say('it does not arrive')
    (machine.home / 'go').write_text('said over there\n')
    assert line.hear() == 'said over there'
    until_filtered(machine)
    wait_until((machine.home / 'said').exists, 'the program that would hear it')
    assert (machine.home / 'said').read_text() == ''
    machine.restore()
    assert line.hear() == 'it does not arrive'


def test_connections_are_rejected(host, session):
    machine = host()
    line = session(machine)
    machine.reject()
    line.say('x')
    assert line.breaks()
    assert 'refused' in login(machine, 'true', *SOON).stderr
    machine.restore()
    assert login(machine).returncode == 0


def test_all_connections_break_once(host, session):
    machine = host()
    lines = session(machine), session(machine)
    machine.reset_connections()
    assert all(line.breaks() for line in lines)
    assert login(machine).returncode == 0


def test_a_bad_line_loses_packets_and_still_works(host):
    machine = host()
    machine.lossy(5)
    machine.slow(100_000)
    began = time.monotonic()
    said = login(machine, 'head -c 50000 /dev/zero')
    assert len(said.stdout) == 50000 and time.monotonic() - began > 0.4
    assert machine.link.filtered() > 0
    machine.restore()
    began = time.monotonic()
    assert len(login(machine, 'head -c 3000000 /dev/zero').stdout) == 3_000_000
    assert time.monotonic() - began < 25 and machine.link.filtered() == 0


# ---- Its sshd ----

def test_a_listener_that_hangs(host, session):
    machine = host()
    line = session(machine)
    machine.freeze_listener()
    assert login(machine, 'true', *SOON).returncode == 255
    assert line.goes_on
    machine.thaw()
    assert login(machine).returncode == 0


def test_a_session_that_hangs(host, session):
    machine = host()
    line = session(machine)
    machine.freeze_sessions()
    line.say('late')
    assert login(machine).returncode == 0
    assert line.hear(timeout_s=0.1) is None
    machine.thaw()
    assert line.hear() == 'late'


def test_all_of_sshd_that_hangs_can_be_stopped(host):
    machine = host()
    machine.freeze()
    assert login(machine, 'true', *SOON).returncode == 255
    machine.stop()
    assert 'refused' in login(machine).stderr
    machine.start()
    assert login(machine).returncode == 0


def test_sessions_are_killed_and_jobs_are_not(host, session):
    machine = host()
    pid, _ = start_job(machine)
    line = session(machine)
    assert machine.kill_sessions() >= 1
    assert line.breaks()
    assert pid in dict(machine.processes())
    assert login(machine).returncode == 0


def test_a_listener_that_is_stopped_leaves_sessions(host, session):
    machine = host()
    line = session(machine)
    machine.stop_listener()
    assert 'refused' in login(machine).stderr
    assert line.goes_on
    machine.start()
    assert login(machine).returncode == 0 and line.goes_on
    machine.stop()          # also ends sessions of an earlier listener
    assert line.breaks()


# ---- Its power ----

def test_a_power_cut(host, session):
    machine = host()
    pid, _ = start_job(machine)
    line = session(machine, 'echo kept >kept; echo x >/tmp/gone; echo x >/dev/shm/gone; echo in; '
                            'cat')
    boot_id = machine.run('cat /proc/sys/kernel/random/boot_id').stdout
    machine.power_off()
    assert rig.ends(pid, timeout_s=0) and machine.processes() == []
    assert (line.hear(timeout_s=0), line.process.poll()) == (None, None)    # no goodbye
    unreachable = login(machine)
    assert unreachable.returncode == 255 and 'No route to host' in unreachable.stderr

    machine.power_on()
    look = 'cat /proc/sys/kernel/random/boot_id kept; ls /tmp/gone /dev/shm/gone'
    new_id, kept = machine.run(look).stdout.splitlines()
    assert (kept, len(new_id)) == ('kept', 36) and new_id != boot_id.strip()
    line.say('x')
    assert line.breaks()


def test_a_reboot_is_quick_and_may_happen_again(host):
    machine = host()
    for _ in range(3):
        machine.reboot()
        assert int(float(machine.run('cat /proc/uptime').stdout.split()[0])) < 60
    wait_until(lambda: machine.processes() == [], 'the last login has ended')


# ---- Its disk ----

def test_a_full_disk(host):
    machine = host(disk={'size': 200_000, 'inodes': 100})
    machine.run('echo before >before')
    machine.fill_disk(leave=8192)
    full = machine.run('head -c 8192 /dev/zero >fits && head -c 1 /dev/zero >more; cat before; '
                       'echo x >/tmp/elsewhere && echo y >/dev/shm/elsewhere')
    assert 'No space left on device' in full.stderr
    assert full.stdout == 'before\n'
    assert (machine.home / 'fits').stat().st_size == 8192
    machine.free_disk()
    assert machine.run('head -c 9000 /dev/zero >more').returncode == 0
    machine.reboot()
    assert machine.run('cat before').stdout == 'before\n'


def test_a_disk_without_inodes(host):
    machine = host(disk={'size': 1 << 20, 'inodes': 50})
    machine.fill_inodes(leave=1)
    assert machine.run('echo x >a').returncode == 0
    assert 'No space left on device' in machine.run('echo x >b').stderr
    assert machine.run('head -c 9000 /dev/zero >a').returncode == 0
    machine.free_disk()
    assert machine.run('echo x >b').returncode == 0


def test_a_home_and_tmp_that_are_read_only(host):
    machine = host(tmp='ro')
    machine.read_only_home()
    said = machine.run('echo x >a; echo x >/tmp/a; echo x >/dev/shm/a && echo shm')
    assert said.stderr.count('Read-only file system') == 2 and said.stdout == 'shm\n'
    machine.read_only_home(False)
    assert machine.run('echo x >a').returncode == 0
    strict = host(tmp='noexec').run('cp /bin/true /tmp && /tmp/true')
    assert (strict.returncode, 'Permission denied' in strict.stderr) == (126, True)


def test_small_disks_on_this_side(disk, tmp_path):
    small = disk(size=100_000, inodes=20)
    small.fill()
    with pytest.raises(OSError) as full:
        (small.folder / 'file').write_text('x')
    assert full.value.errno == errno.ENOSPC
    small.free()
    (small.folder / 'file').write_text('x')
    small.fill_inodes()
    with pytest.raises(OSError) as full:
        (small.folder / 'other').touch()
    assert full.value.errno == errno.ENOSPC
    there = disk(at=tmp_path)
    there.read_only()
    with pytest.raises(OSError) as refused:
        (tmp_path / 'file').touch()
    assert refused.value.errno == errno.EROFS


# ---- Its processes and its clock ----

def test_a_pid_is_used_again(host):
    machine = host()
    pid, there = start_job(machine)
    with pytest.raises(OSError, match=f'instead of {there}'):
        machine.reuse_pid(there)
    rig.kill(pid, lambda pid: True)
    wait_until(lambda: machine.run(f'kill -0 {there}').returncode, 'pid 1 has waited for it')
    machine.reuse_pid(there, 'sleep 2000')
    pid = machine.pid_here(there)
    wait_until(lambda: rig.cmdline(pid) == 'sleep 2000', 'what was forked has become it')


def test_a_clock_that_is_wrong(host):
    machine = host(clock='+1d')
    ahead_s = int(machine.run('date +%s; true').stdout) - time.time()
    assert 86000 < ahead_s < 87000


# ---- With the program ----

def test_a_batch_on_two_hosts_runs_exactly_once(batches, hosts, project):
    (project / 'data').write_bytes(bytes(300_000))
    lines = [ledger_line(f'wc -c <data; echo {n} >made.{n}') for n in range(6)]
    done = batches.run(lines, [host.yaml(max_jobs=2) for host in hosts], *NO_GPU)
    assert (done.returncode, done.stderr.count('Traceback')) == (0, 0), done.stderr
    check_exactly_once(hosts, RESULTS, done.stdout,
                       jobs=[f'batch.sh.{n}' for n in range(1, 7)])
    for host in hosts:
        assert ' start\n' in host.ledger.read_text()
        assert_clean(host, cache=True)


def test_runner_and_wrapper_are_found_and_killed_alone(batches, host, outside, gate):
    machine = host(sees=(outside,))
    assert machine.runner() is None and machine.wrapper('batch.sh.1') is None
    lines = [ledger_line(gate.wait('a')), ledger_line(gate.wait('b'))]
    batch = batches.start(lines, [machine], '--away-limit=0', *NO_GPU)
    batch.until('started: batch.sh.2')
    wait_until(lambda: machine.wrapper('batch.sh.1') and machine.wrapper('batch.sh.2'), 'both')
    wrapper, runner = machine.wrapper('batch.sh.1'), machine.runner()
    assert rig.cmdline(wrapper) == rig.cmdline(runner)      # so their command lines do not differ
    assert rig.is_sshd(rig.parent_and_state(runner)[0])
    assert rig.parent_and_state(wrapper)[0] == runner
    assert wrapper != machine.wrapper('batch.sh.2')
    machine.kill_wrapper('batch.sh.1')
    assert machine.job_processes('batch.sh.1') and machine.runner() == runner
    machine.kill_runner()
    assert machine.runner() is None
    assert machine.wrapper('batch.sh.2') and machine.job_processes('batch.sh.2')
    batch.process.kill()
    batch.end()


# ---- What is left of a host ----

def test_nothing_is_left_of_a_host(host):
    with pytest.raises(KeyError), host_rig.Host('gone', disk={}) as machine:
        pid, _ = start_job(machine)
        machine.unplug()
        left = host_rig.leftovers()
        assert any(line.startswith(f'interface {machine.link.name} ') for line in left)
        assert any(line.startswith(f'{machine.disk.root} ') for line in left)
        raise KeyError
    assert rig.ends(pid, timeout_s=0)
    for line in rig.leftovers() + host_rig.leftovers():
        assert str(machine.folder) not in line and machine.link.name not in line
        assert str(machine.disk.root) not in line


def test_a_host_that_does_not_boot_leaves_nothing(host, monkeypatch):
    before = rig.leftovers() + host_rig.leftovers()
    monkeypatch.setattr(host_rig, 'INIT', 'echo no such disk >&2; exit 1')
    with pytest.raises(RuntimeError, match='does not boot:\nno such disk'):
        host()
    # Meanwhile processes of earlier tests may end.
    assert not set(rig.leftovers() + host_rig.leftovers()) - set(before)


def test_hosts_end_with_the_tests_even_if_these_are_killed(host, tmp_path):
    script = f'''
        import sys
        sys.path.insert(0, {str(Path(host_rig.__file__).parent)!r})
        import hosts
        with hosts.Host('lost') as machine:
            print(machine.folder, machine.link.name, machine.init, flush=True)
            sys.stdin.read()
    '''
    with subprocess.Popen([sys.executable, '-c', textwrap.dedent(script)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True,
                          env={**os.environ, 'RIG_FOLDER': str(tmp_path)}) as tests:
        _folder, interface, pid1 = tests.stdout.readline().split()
        assert Path('/sys/class/net', interface).exists()
        tests.kill()
    assert rig.ends(int(pid1))
    wait_until(lambda: not Path('/sys/class/net', interface).exists(), 'the interface is gone')


def test_why_there_are_no_hosts(monkeypatch):
    why_not = host_rig.why_not.__wrapped__
    monkeypatch.setitem(rig.HOST_PACKAGES, 'some-package', 'no-such-program')
    if os.getuid() == 0:
        assert why_not() == 'hosts need more Debian packages: apt-get install some-package'
    monkeypatch.setattr(os, 'getuid', lambda: 1000)
    assert why_not() == 'hosts with a network of their own need root'
