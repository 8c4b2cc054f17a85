"""Machines that are separate computers, as far as the kernel can make them, for fault tests.

A Host is a rig.Machine with its own network, processes, mounts, /tmp, /dev/shm, name, boot id and
uptime.  It can suffer the faults of whole computers: a cut cable, no answers, a power failure and
a new boot, a full disk.  It needs root, and Linux.

    this computer:  rigN 198.18.x.y/30 <--veth--> eth0 :the host's network, held open by one fd
                    unshare -> pid 1 (INIT, a bash that starts what we tell it) -> sshd -> jobs

A host depends on this process: a descriptor keeps its network, and its pid 1 reads from a pipe.  So
if the tests are killed, only folders are left.  No packet goes to other computers: a host's only
route leads to this computer, and RFC 2544 reserves the addresses for such tests.
"""
import contextlib
import errno
import functools
import ipaddress
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import rig
from rig import (
    SAFETY_NET_S,
    Machine,
    cmdline,
    ends,
    is_sshd,
    parent_and_state,
    pids,
    program,
    read_proc,
    wait_readable,
)

ADDRESSES = ipaddress.ip_network('198.18.0.0/15')
PORT = 2222             # no other sshd is in the host's network
YOUNG_S = 10            # the uptime of a host after its boot
DROP = 'counter drop'
NAMESPACES = ('--mount', '--pid', '--uts', '--ipc', '--time')

INTERFACES = []         # (name, index) of all interfaces that were made, for leftovers()
MOUNTS = []             # the mount points of all tmpfs that were mounted


# ---- What hosts need ----

@functools.cache
def why_not():
    """Return the reason why Hosts are impossible here, or None."""
    if os.getuid() != 0:
        return 'hosts with a network of their own need root'
    missing = rig.missing_tools(rig.HOST_PACKAGES)
    if missing:
        return f'hosts need more Debian packages: apt-get install {" ".join(missing)}'
    script = f'{program("mount")} -t tmpfs tmpfs /tmp && {program("nft")} list ruleset'
    tried = subprocess.run(['unshare', '--net', *NAMESPACES, '--fork', '--mount-proc', 'sh', '-c',
                            script], capture_output=True, text=True)
    return f'no namespaces for hosts here: {tried.stderr.strip()}' if tried.returncode else None


def faketime():
    """Return the path of the library that shifts the clock of processes that preload it."""
    return str(next(Path('/usr/lib').glob('*/faketime/libfaketime.so.1')))


def leftovers():
    """Return sentences about leftover interfaces and mounts; rig.leftovers() has the others."""
    def index(name):
        with contextlib.suppress(OSError):
            return Path(f'/sys/class/net/{name}/ifindex').read_text().strip()

    mounted = Path('/proc/self/mounts').read_text()
    return [*(f'interface {name} is still there' for name, number in INTERFACES
              if index(name) == number),
            *(f'{path} is still mounted' for path in MOUNTS if f' {path} ' in mounted)]


def command(*argv, text=None):
    """Run a system program, which must succeed; return its output."""
    done = subprocess.run([program(argv[0]), *map(str, argv[1:])], input=text,
                          capture_output=True, text=True, timeout=SAFETY_NET_S)
    if done.returncode:
        raise OSError(f'{" ".join(map(str, argv))}: {done.stderr.strip()}\n{text or ""}')
    return done.stdout


# ---- Link: a network and the cable to it ----

class Link:
    """A network namespace, a veth pair from it to this computer, and the faults of this link."""

    def __init__(self):
        self._network = new_network()
        try:
            self._connect()
        except BaseException:
            os.close(self._network)
            raise
        self.mend()

    def _connect(self):
        path = f'/proc/{os.getpid()}/fd/{self._network}'
        while True:             # other processes of pytest may have taken the name
            number = random.randrange(ADDRESSES.num_addresses // 4)
            self.name = f'rig{number}'
            try:
                command('ip', 'link', 'add', self.name, 'type', 'veth', 'peer', 'name', 'eth0',
                        'netns', path)
                break
            except OSError as error:
                if 'File exists' not in str(error):
                    raise
        INTERFACES.append((self.name, Path(f'/sys/class/net/{self.name}/ifindex').read_text()
                           .strip()))
        here, self.address = (str(ADDRESSES[4 * number + n]) for n in (1, 2))
        up = 'link set {0} addrgenmode none\naddr add {1}/30 dev {0}\nlink set {0} up\n'
        command('ip', '-batch', '-', text=up.format(self.name, here))
        self.command('ip', '-batch', '-', text='link set lo up\n' + up.format('eth0', self.address))

    def close(self):
        """Remove the link at once; the kernel alone would do so later."""
        command('ip', 'link', 'del', self.name)
        os.close(self._network)

    def entered(self):
        """Return the words to put before a command to run it in the host's network."""
        return [program('nsenter'), f'--net=/proc/{os.getpid()}/fd/{self._network}', '--']

    def command(self, name, *argv, text=None):
        return command(*self.entered(), program(name), *argv, text=text)

    def filter(self, incoming='', outgoing=''):
        """Replace the nft rules in the host's network with these."""
        def chain(hook, rules):
            return (f'chain {hook} {{ type filter hook {hook} priority 0;\n'
                    f'meta oifname lo accept\nmeta iifname lo accept\n{rules}\n}}\n')

        self.command('nft', '-f', '-', text=(
            'table inet faults\ndelete table inet faults\n'     # at first there is no table
            f'table inet faults {{\n{chain("input", incoming)}{chain("output", outgoing)}}}\n'))

    def filtered(self):
        """Return the number of packets that matched the rules since they were set."""
        rules = self.command('nft', 'list', 'table', 'inet', 'faults')
        return sum(map(int, re.findall(r'counter packets (\d+)', rules)))

    def shape(self, bytes_per_s):
        """Limit the rate in each direction."""
        tbf = (f'root tbf rate {8 * bytes_per_s}bit burst 4000 limit 60000').split()
        command('tc', 'qdisc', 'replace', 'dev', self.name, *tbf)
        self.command('tc', 'qdisc', 'replace', 'dev', 'eth0', *tbf)
        self._shaped = True

    def plug(self, state):
        """Set the host's eth0 'up' or 'down'; this computer keeps its route to the host."""
        self.command('ip', 'link', 'set', 'eth0', state)

    def mend(self):
        """End all faults."""
        self.filter()
        if getattr(self, '_shaped', False):
            command('tc', 'qdisc', 'del', 'dev', self.name, 'root')
            self.command('tc', 'qdisc', 'del', 'dev', 'eth0', 'root')
            self._shaped = False
        self.plug('up')

    def forget_connections(self):
        """Destroy the host's TCP sockets; each sends a reset to the other side, if it can."""
        self.command('ss', '--kill', '--tcp')


def new_network():
    """Return a descriptor that keeps a new network namespace."""
    with subprocess.Popen(['unshare', '--net', 'sh', '-c', 'echo; read -r _'],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        return os.open(f'/proc/{holder.pid}/ns/net', os.O_RDONLY)


# ---- Disk: a small file system ----

class Disk:
    """A small tmpfs, which tests can fill; a context manager.

    `root` is its mount point: the existing folder `at`, or a new one.  Tests use `folder`.
    """

    def __init__(self, size=1 << 20, inodes=1000, at=None):
        self.size, self.inodes, self._at = size, inodes, at

    def __enter__(self):
        self.root = Path(self._at or rig.temporary_folder('disk', mode=0o755))
        MOUNTS.append(self.root)
        command('mount', '-t', 'tmpfs', '-o',
                f'size={self.size},nr_inodes={self.inodes},mode=0755', 'tmpfs', self.root)
        self.folder = self.root if self._at else self.root / 'here'
        self.folder.mkdir(exist_ok=True)
        self._ballast, self._files = self.root / '.ballast', self.root / '.files'
        return self

    def __exit__(self, *_exception):
        command('umount', '--lazy', self.root)      # a process may still be in this folder
        if not self._at:
            rig.remove(self.root)

    def fill(self, leave=0):
        """Leave at most this many bytes free, in whole pages."""
        self.free()
        while not self._takes_all_but(leave):
            pass                        # another process took some pages meanwhile

    def _takes_all_but(self, leave):
        room = os.statvfs(self.root)
        pages = room.f_bavail - leave // room.f_frsize
        with open(self._ballast, 'wb') as file:
            try:
                os.posix_fallocate(file.fileno(), 0, pages * room.f_frsize)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                return False
        return True

    def fill_inodes(self, leave=0):
        """Leave this many inodes free."""
        self.free()
        self._files.mkdir()
        for number in range(os.statvfs(self.root).f_favail - leave):
            (self._files / str(number)).touch()

    def free(self):
        """Remove the files of fill() and fill_inodes()."""
        with contextlib.suppress(FileNotFoundError):
            self._ballast.unlink()
        shutil.rmtree(self._files, ignore_errors=True)

    def read_only(self, yes=True):
        """Make the disk read-only; the kernel refuses while a process has a file open to write."""
        command('mount', '-o', f'remount,{"ro" if yes else "rw"}', self.root)


# ---- Host ----

INIT = r'''
# Pid 1 of a host, on the host.  $1: its folder, $2: its name, $3: its home, $4: the mount mode of
# /tmp; the rest: folders of this computer to show, although they lie in /tmp or /dev/shm.
set -e
folder=$1 name=$2 home=$3 tmp=$4
shift 4
hostname "$name"
mount --bind "$folder/proc/sys/kernel/random/boot_id" /proc/sys/kernel/random/boot_id
places=()
for place; do
    exec {fd}<"$place"
    places+=("$fd")
done
mount --bind "$folder/shared" /dev/shm
[ "$tmp" = absent ] || mount --bind "$folder/tmp" /tmp      # this hides the folder in /tmp
for place; do
    fd=${places[0]}
    places=("${places[@]:1}")
    mkdir -p "$place"
    mount --no-canonicalize --rbind "/proc/self/fd/$fd" "$place"    # its path is hidden now
    exec {fd}<&-
done
mount --bind "$home" "$home"
if [ "$tmp" = absent ]; then            # make a root with everything of this one except /tmp
    mount -t tmpfs tmpfs /mnt
    for place in /*; do
        if [ -L "$place" ]; then
            cp -P "$place" /mnt
        elif [ -d "$place" ] && [ "$place" != /tmp ] && [ "$place" != /mnt ]; then
            mkdir "/mnt$place"
            mount --rbind "$place" "/mnt$place"
        fi
    done
    cd /mnt
    pivot_root . .
    umount --lazy .
else
    mount -o "remount,bind,$tmp" /tmp
fi
cd /
echo up
# Each request is two lines: a pid for the process, or nothing, and a command; the answer is its
# pid.  Like every init, this bash also reaps processes that lost their parents.
set +e
while read -r pid && IFS= read -r line; do
    [ -z "$pid" ] || echo "$((pid - 1))" >/proc/sys/kernel/ns_last_pid
    eval "exec $line" &
    echo "$!"
done
'''


class Daemon:
    """A process that the host's pid 1 started, with the methods of Popen that Machine uses."""

    def __init__(self, pid):
        self.pid = pid
        self._handle = os.pidfd_open(pid)

    def send_signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def wait(self, timeout_s=SAFETY_NET_S):
        if not wait_readable(self._handle, timeout_s=timeout_s):
            raise TimeoutError(f'process {self.pid} does not end: {cmdline(self.pid)}')
        os.close(self._handle)


class Host(Machine):
    """A separate computer, with the settings of Machine, and

    disk        {'size': bytes, 'inodes': number}: its home is on a file system of this size
    tmp         the mount mode of its /tmp: 'ro', 'noexec'; or 'absent': it has no /tmp, and
                RIG_FOLDER must lie elsewhere
    sees        folders of this computer in /tmp that it shares, such as those of gates
    clock       '+1d': the error of the clock in its sessions

    Its home outlives a power cut; /tmp, /dev/shm and the processes do not.  `init` is the
    pid that its pid 1 has on this computer; `link` and `disk` offer more faults.
    """

    def __init__(self, name='host1', *, disk=None, tmp='rw', sees=(), clock=None, **settings):
        super().__init__(name, **settings)
        if self.beside:
            raise ValueError('a Host is a computer, not an account on one')
        if clock:
            self.env = {'LD_PRELOAD': faketime(), 'FAKETIME': clock,
                        'FAKETIME_DONT_FAKE_MONOTONIC': '1', **self.env}
        self.tmp, self.sees, self._disk_settings = tmp, sees, disk
        self.link = self.disk = self._power = self.init = None
        self._belongings = contextlib.ExitStack()

    def __exit__(self, *exception):
        with self._belongings:
            super().__exit__(*exception)

    # -- its parts

    def _prepare(self):
        self.link = Link()
        self._belongings.callback(self.link.close)
        self.address, self.port = self.link.address, PORT
        if self._disk_settings is not None:
            self.disk = self._belongings.enter_context(Disk(**self._disk_settings))
            self.home = self.disk.root / 'home'
        self.own_tmp = self.folder / 'tmp'
        self.own_tmp.mkdir()
        self.own_tmp.chmod(0o1777)
        super()._prepare()

    def _environment(self):
        known = super()._environment()
        del known['SSH_SCHEDULER_SHARED']       # a Host has a real /dev/shm of its own
        return known

    def _boot(self):
        """Start pid 1 in new namespaces."""
        self.set_boot_id()
        with open('/proc/uptime') as file:
            age_s = int(float(file.read().split()[0]))
        programs = [folder for folder in self.path.split(os.pathsep)
                    if folder.startswith(('/tmp/', '/dev/shm/'))]
        seen = [self.folder, *(folder for folder in (self.home, *self.sees, *programs)
                               if self.folder not in Path(folder).parents)]
        argv = [*self.link.entered(), program('unshare'), *NAMESPACES,
                f'--boottime=-{max(age_s - YOUNG_S, 0)}', '--fork', '--kill-child', '--mount-proc',
                program('bash'), self.folder / 'init', self.folder, self.name, self.home, self.tmp,
                *seen]
        (self.folder / 'init').write_text(INIT)
        with open(self.log, 'ab') as log:
            self._power = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                          stderr=log, start_new_session=True)
        if self._answer() != 'up':
            raise RuntimeError(f'{self.name} does not boot:\n{self.log.read_text()}')
        self.init, = children(self._power.pid)
        self._namespace = os.readlink(f'/proc/{self.init}/ns/pid')

    def _answer(self):
        pipe = self._power.stdout
        return pipe.readline().decode().strip() if wait_readable(pipe.fileno()) else None

    def spawn(self, line, pid=None):
        """Let pid 1 start a shell command in the background; return its pid on the host.

        pid: the pid that the command should get; the kernel gives it this one if it is free.
        """
        self._power.stdin.write(f'{pid or ""}\n{line}\n'.encode())
        self._power.stdin.flush()
        return int(self._answer())

    def enter(self, *argv):
        """Run a command on the host as root, without its sshd and network; return its output."""
        return command('nsenter', f'--target={self.init}', '--mount', '--pid', '--uts', '--ipc',
                       '--', *argv)

    def _launch(self, _log):
        env = {name: value for name, value in self._sshd_env().items()
               if name == 'LD_PRELOAD' or name.startswith('NSS_WRAPPER_')}
        words = ['setsid', 'env', *(f'{name}={value}' for name, value in env.items()),
                 *self._sshd_argv(), '-D', '-e']
        line = ' '.join(shlex.quote(str(word)) for word in words)
        log = shlex.quote(str(self.log))
        try:
            return Daemon(self.pid_here(self.spawn(f'{line} </dev/null >>{log} 2>&1')))
        except (LookupError, ProcessLookupError):
            raise RuntimeError(f'sshd of {self.name} ended:\n{self.log.read_text()}') from None

    # -- its life

    def start(self):
        """Power the host on if it is off; start sshd, and return when it listens."""
        if self._power is None:
            self._boot()
            self.link.plug('up')
        if self.sshd is None:
            super().start()

    power_on = start

    def power_off(self):
        """Cut the power: connections are not closed, and /tmp and /dev/shm are empty afterwards."""
        if self._power is None:
            return
        self.link.plug('down')
        self.link.forget_connections()      # the network, with its sockets, outlives the host
        handle = os.pidfd_open(self.init) if self.init else None
        self._power.kill()
        if handle is not None:
            if not wait_readable(handle):   # pid 1 ends last
                raise TimeoutError(f'{self.name} runs on without power')
            os.close(handle)
        self._power.stdin.close()
        self._power.stdout.close()
        self._power.wait()
        if self.sshd:
            self.sshd.wait()
        self._power = self.init = self.sshd = None
        for folder in (self.own_tmp, self.shared):
            for path in folder.iterdir():
                if path.is_dir() and not path.is_symlink():
                    rig.remove(path)
                else:
                    path.unlink()

    def reboot(self):
        """Cut the power, and boot with another boot id."""
        self.power_off()
        self.power_on()

    # -- its network

    def cut(self):
        """Drop all packets in both directions, as if a router had died."""
        self.link.filter(DROP, DROP)

    def drop_requests(self):
        """Drop the packets to the host."""
        self.link.filter(DROP, '')

    def drop_replies(self):
        """Drop the packets from the host, acknowledgements included."""
        self.link.filter('', DROP)

    def reject(self):
        """Answer each TCP packet with a reset: connections break, and no new one starts."""
        self.link.filter('meta l4proto tcp counter reject with tcp reset', '')

    def lossy(self, one_in=5):
        """Drop one packet in `one_in`, in each direction.

        Count the packets instead of choosing at random: random choice drops the same packet five
        times in some runs, and no connection survives that.
        """
        rule = f'numgen inc mod {one_in} == 0 {DROP}'
        self.link.filter(rule, rule)

    def slow(self, bytes_per_s=20_000):
        """Limit the rate in each direction; can be combined with lossy()."""
        self.link.shape(bytes_per_s)

    def unplug(self):
        """Unplug the cable: after some seconds, clients get 'No route to host'."""
        self.link.plug('down')

    def restore(self):
        """Repair the network.  Of the faults above, only slow() can be combined with another."""
        self.link.mend()

    def reset_connections(self):
        """Break all connections, once, with a reset."""
        self.link.forget_connections()

    # -- its sshd: freeze(), thaw() and stop() are Machine's

    def freeze_listener(self):
        """Stop the listening sshd with SIGSTOP: no new logins, but connections work."""
        self.sshd.send_signal(signal.SIGSTOP)

    def freeze_sessions(self):
        """Stop the sshds of all connections with SIGSTOP; new logins work."""
        for pid in self._connections():
            os.kill(pid, signal.SIGSTOP)

    def kill_sessions(self):
        """Kill the sshds of all connections; return their number."""
        connections = self._connections()
        for pid in connections:
            rig.kill(pid, is_sshd)
        return len(connections)

    def stop_listener(self):
        """Stop the listener, like `systemctl stop ssh`; connections stay.  start() starts it."""
        self.sshd.terminate()
        self.sshd.send_signal(signal.SIGCONT)
        self.sshd.wait()
        self.sshd = None

    def _connections(self):
        """Return the pids of all live sshds but the listener, also those of a stopped listener."""
        return [pid for pid in self._pids() if is_sshd(pid) and parent_and_state(pid)[1] not in 'ZX'
                and not (self.sshd and pid == self.sshd.pid)]

    # -- its processes.  Pids are this computer's; pids "there" are the host's

    def _runs_here(self, pid):
        """Tell whether a process is the host's, even without an environment; not pid 1 or sshd."""
        return self._is_of_it(pid) and pid != self.init and not is_sshd(pid)

    def _is_of_it(self, pid):
        with contextlib.suppress(OSError):
            return (self.init is not None and       # a zombie is in no namespace
                    os.readlink(f'/proc/{pid}/ns/pid') == self._namespace)
        return False

    def _pids(self):
        return [pid for pid in pids() if self._is_of_it(pid)]

    def pid_here(self, there):
        """Return this computer's pid of the host's process `there`."""
        for pid in self._pids():
            if pid_there(pid) == there:
                return pid
        raise LookupError(f'{self.name} has no process {there}')

    def pid_there(self, pid):
        return pid_there(pid)

    def reuse_pid(self, there, line='sleep 1000'):
        """Start a command on the host with this pid, which must be free."""
        for _ in range(100):            # a process of the host that forks just then gets the pid
            got = self.spawn(f'{line} </dev/null >/dev/null 2>&1', pid=there)
            if got == there:
                return
            rig.kill(self.pid_here(got), self._is_of_it)
        raise OSError(f'{self.name} has given pid {got} instead of {there}')

    def runner(self):
        """Return the pid of the runner, the bash that reads the channel, or None.

        Its children have the same command line.  Only the runner has its own pid in the name of
        its folder run.NAME.PID.RANDOM.
        """
        for pid, _words in self.processes():
            mine = f'/run.{self.name}.{pid_there(pid)}.'
            if any(mine in path and path.endswith('/events') for path in open_files(pid)):
                return pid

    def kill_runner(self):
        """SIGKILL the runner alone."""
        self._kill_one(self.runner(), 'runner')

    def job_processes(self, job):
        """Return the pids of the job's own processes."""
        mark = os.fsencode(f'SSH_SCHEDULER_JOB={job}')
        return [pid for pid, _words in self.processes()
                if mark in read_proc(pid, 'environ').split(b'\0')]

    def wrapper(self, job):
        """Return the pid of the bash that waits for the job and records its end, or None."""
        ours = self.job_processes(job)
        above = {parent_and_state(pid)[0] for pid in ours} - {*ours, self.init}
        return next((pid for pid in above if self._runs_here(pid)), None)

    def kill_wrapper(self, job):
        """SIGKILL the wrapper alone: the job keeps running."""
        self._kill_one(self.wrapper(job), f'wrapper of {job}')

    def _kill_one(self, pid, what):
        if pid is None:
            raise LookupError(f'{self.name} has no {what}')
        rig.kill(pid, self._runs_here)
        assert ends(pid)

    # -- its disk

    def fill_disk(self, leave=0):
        """Leave this many bytes on the disk of its home (see `disk`)."""
        self.disk.fill(leave)

    def fill_inodes(self, leave=0):
        self.disk.fill_inodes(leave)

    def free_disk(self):
        self.disk.free()

    def read_only_home(self, yes=True):
        """Make its home read-only on the host; refused while a process has a file open to write."""
        self.enter('mount', '-o', f'remount,bind,{"ro" if yes else "rw"}', self.home)


def children(pid):
    return list(map(int, read_proc(pid, f'task/{pid}/children').split()))


def pid_there(pid):
    """Return the pid of a process in its own namespace."""
    for line in read_proc(pid, 'status').splitlines():
        if line.startswith(b'NSpid:'):
            return int(line.split()[-1])


def open_files(pid):
    with contextlib.suppress(OSError):
        for name in os.listdir(f'/proc/{pid}/fd'):
            with contextlib.suppress(OSError):
                yield os.readlink(f'/proc/{pid}/fd/{name}')
