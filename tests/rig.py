"""Real machines for the tests: each is one sshd on loopback, in one temporary folder.

A Machine has its own host key, port, client key, log, home folder, login shell and PATH, so that
the program under test meets the real OpenSSH and rsync.  It needs no root: an ordinary user gets
machines that log in as that user.

Three tricks make one computer look like several:

* libnss_wrapper, preloaded into sshd only, answers its getpwnam() from a passwd file of the rig.
  So every machine has its own home and login shell, and /etc stays unchanged.
* SetEnv in sshd_config names the machine in the environment of everything that runs on it, so that
  the rig finds its processes, whoever started them and however often they forked.
* PidFile is a FIFO: sshd opens it once it listens, so that the rig can wait without polling.

`python3 rig.py --missing` lists the missing Debian packages.  For root it includes those of
hosts.py, where a machine also has its own network, those of clusters.py, and on Debian a browser.
"""
import atexit
import collections
import contextlib
import functools
import json
import os
import pwd
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

SAFETY_NET_S = 30       # timeout for events that normally come at once; never a measurement

BASH_COMPLETION = '/usr/share/bash-completion/bash_completion'

# package: one of its files, by its path, or below one of SYSTEM_FOLDERS or LIBRARY_PATTERNS
DEBIAN_PACKAGES = {
    'openssh-server': 'sshd', 'openssh-client': 'ssh', 'rsync': 'rsync', 'procps': 'ps',
    'bash': 'bash', 'dash': 'dash', 'zsh': 'zsh', 'fish': 'fish', 'tcsh': 'tcsh',
    'shellcheck': 'shellcheck', 'libnss-wrapper': 'libnss_wrapper.so',
    'bash-completion': BASH_COMPLETION,
}
SYSTEM_FOLDERS = ('/usr/local/sbin', '/usr/local/bin', '/usr/sbin', '/usr/bin', '/sbin', '/bin')
# hosts.py needs these, too, as root only: without them its tests are skipped.
HOST_PACKAGES = {'iproute2': 'ip', 'nftables': 'nft', 'util-linux': 'unshare', 'mount': 'mount',
                 'faketime': 'faketime'}
# test_report_page.py needs this, too; without it its tests are skipped.
BROWSER_PACKAGES = {'chromium': 'chromium'}
# clusters.py needs these, too; without them its tests are skipped.
SLURM_PACKAGES = {'slurmctld': 'slurmctld', 'slurmd': 'slurmd', 'slurm-client': 'sbatch',
                  'munge': 'munged'}
ACCOUNTING_PACKAGES = {'slurmdbd': 'slurmdbd', 'mariadb-server': 'mariadbd'}
LIBRARY_PATTERNS = ('lib*/libnss_wrapper.so', 'lib*/*/libnss_wrapper.so')


# ---- What the rig needs ----

def program(name):
    """Return the path of a system program, or None.

    PATH often lacks /usr/sbin, and may begin with stubs.
    """
    return shutil.which(name, path=os.pathsep.join(SYSTEM_FOLDERS))


def nss_wrapper():
    """Return the path of the library, or None."""
    found = [path for pattern in LIBRARY_PATTERNS for path in Path('/usr').glob(pattern)]
    return str(found[0]) if found else None


def missing_tools(packages=DEBIAN_PACKAGES):
    """Return the missing ones of these Debian packages, without which no Machine can start."""
    def is_there(file):
        if file.startswith('/'):
            return os.path.exists(file)
        return nss_wrapper() if file.endswith('.so') else program(file)
    return [package for package, file in packages.items() if not is_there(file)]


def is_debian():
    """Tell whether this is Debian: the chromium of Ubuntu needs snapd."""
    with contextlib.suppress(OSError), open('/etc/os-release') as file:
        return 'ID=debian\n' in file.readlines()
    return False


def missing_extras():
    """Return the missing Debian packages without which some tests are skipped; [] without root."""
    if os.getuid() != 0:
        return []
    return missing_tools({**HOST_PACKAGES, **SLURM_PACKAGES, **ACCOUNTING_PACKAGES,
                          **(BROWSER_PACKAGES if is_debian() else {})})


# ---- Temporary folders, and what is left of them ----

FOLDERS = []            # all temporary folders, for leftovers()


def temporary_folder(name, mode=0o700):
    """Make a folder with a short path: that of a Unix socket must fit into 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix=f'rig-{name}-', dir=os.environ.get('RIG_FOLDER', '/tmp')))
    folder.chmod(mode)
    FOLDERS.append(folder)
    return folder


def remove(folder):
    """Remove a folder, even if a job has removed permissions in it."""
    subprocess.run(['chmod', '-R', 'u+rwX', folder], stderr=subprocess.DEVNULL)
    shutil.rmtree(folder)


def leftovers():
    """Return sentences about leftover temporary folders and the processes that mention them."""
    return [*(f'folder {folder} is still there' for folder in FOLDERS if folder.exists()),
            *(f'process {pid} is still alive: {cmdline(pid)}' for pid in knowing(*FOLDERS))]


# ---- Processes ----

def pids():
    return [int(name) for name in os.listdir('/proc') if name.isdigit()]


def read_proc(pid, name):
    """Return /proc/PID/NAME as bytes; b'' if the process is gone, a zombie, or not readable."""
    try:
        with open(f'/proc/{pid}/{name}', 'rb') as file:
            return file.read()
    except OSError:
        return b''


def cmdline(pid):
    words = read_proc(pid, 'cmdline').rstrip(b'\0').split(b'\0')
    return b' '.join(words).decode(errors='replace')


def knowing(*folders):
    """Return the pids of processes with one of `folders` in their arguments or environment."""
    marks = [os.fsencode(folder) for folder in folders]

    def knows(pid):
        words = read_proc(pid, 'cmdline') + b'\0' + read_proc(pid, 'environ')
        return any(mark in words for mark in marks)

    return [pid for pid in pids() if pid != os.getpid() and knows(pid)]


def parent_and_state(pid):
    """Return (parent's pid, state letter); (0, 'X') if the process is gone."""
    fields = read_proc(pid, 'stat').rpartition(b')')[2].split()
    return (int(fields[1]), fields[0].decode()) if fields else (0, 'X')


def is_sshd(pid):
    """Tell whether a process is sshd, or sshd-session or sshd-auth of OpenSSH 9.8 and later."""
    return read_proc(pid, 'comm').startswith(b'sshd')


def kill(pid, is_ours):
    """SIGKILL a process and wait for its end, if is_ours(pid).

    The open pidfd keeps another process with the same pid from being killed.
    """
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if is_ours(pid):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            if not wait_readable(handle):
                raise TimeoutError(f'process {pid} survives SIGKILL: {cmdline(pid)}')
    except ProcessLookupError:
        pass
    finally:
        os.close(handle)


def ends(pid, timeout_s=SAFETY_NET_S):
    """Wait for the end of any process, not only of a child; return False after the timeout."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(wait_readable(handle, timeout_s=timeout_s))
    finally:
        os.close(handle)


def wait_readable(*fds, timeout_s=SAFETY_NET_S):
    """Wait; return those of `fds` that are readable, as a pidfd is when its process has ended."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _event in poll.poll(timeout_s * 1000)]


# ---- PATH as a folder of links ----

def farm(folder, leave_out=('rsync', 'nvidia-smi'), only=None):
    """Fill `folder` with links to the programs of this computer, and return it.

    A machine with this folder as its PATH lacks the real rsync or nvidia-smi, although they lie in
    /usr/bin with all other programs.  If there is no python3, link the one that runs the tests.
    """
    programs = {}
    for directory in SYSTEM_FOLDERS:
        if os.path.isdir(directory):
            for entry in os.scandir(directory):
                programs.setdefault(entry.name, entry.path)
    programs.setdefault('python3', os.path.realpath(sys.executable))
    names = set(programs) - set(leave_out) if only is None else set(only)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        os.symlink(programs[name], folder / name)
    return folder


@functools.cache
def shared_farm(leave_out, only):
    """Return a farm, made once per session: a thousand links can take more than half a second."""
    folder = temporary_folder('farm', mode=0o755)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return farm(folder / 'bin', leave_out, only)


def system_path(leave_out, only):
    """Return the folders of a PATH to the programs of this computer; a farm only if necessary."""
    if only is not None or any(map(program, leave_out)):
        return (shared_farm(leave_out, only),)
    return SYSTEM_FOLDERS if program('python3') else (*SYSTEM_FOLDERS,
                                                      shared_farm((), ('python3',)))


def remove_shared_farms():
    for folder in FOLDERS:
        if folder.name.startswith('rig-farm-'):
            shutil.rmtree(folder, ignore_errors=True)
    shared_farm.cache_clear()


# ---- The fake nvidia-smi ----

NVIDIA_SMI = r'''#!/bin/bash
# Stands in for nvidia-smi: answers a query from ../gpus.table, or with a recorded ../gpus.txt.
# The processes on the GPUs are the live ones of ../gpus.apps, lines "uuid, pid, MB".
folder=${0%/*}/..
for word; do
    case $word in
        --query-gpu=*) query=${word#*=} ;;
        --query-compute-apps=gpu_uuid,pid,used_memory) apps=yes ;;
        --format=*) format=${word#*=} ;;
        *) echo "the fake nvidia-smi does not know: $word"; exit 2 ;;
    esac
done
if [ "$format" != csv,noheader,nounits ]; then
    echo 'the fake nvidia-smi knows --format=csv,noheader,nounits only'
    exit 2
fi
if [ "$apps" ]; then
    while IFS=', ' read -r uuid pid used; do
        [ -d "/proc/$pid" ] && echo "$uuid, $pid, $used"
    done <"$folder/gpus.apps"
    exit 0
fi
if [ -e "$folder/gpus.txt" ]; then
    exec cat "$folder/gpus.txt"
fi

{
    IFS=';' read -ra names
    declare -A place
    for i in "${!names[@]}"; do
        place[${names[i]}]=$i
    done
    for name in ${query//,/ }; do
        if [ -z "${place[$name]}" ]; then
            echo "Field \"$name\" is not a valid field to query."
            exit 2
        fi
    done
    while IFS=';' read -ra values; do
        line=
        for name in ${query//,/ }; do
            line+=", ${values[${place[$name]}]}"
        done
        echo "${line#, }"
        found=yes
    done
} <"$folder/gpus.table"
if [ -z "$found" ]; then
    echo 'No devices were found'
    exit 6
fi
'''

GPU_COLUMNS = ('index', 'uuid', 'pci.bus_id', 'name', 'memory.total', 'memory.used', 'memory.free',
               'utilization.gpu', 'mig.mode.current', 'compute_mode')


def fake_gpus(count, memory_mb=16000, **other):
    """Return `count` idle GPUs, as Machine(gpus=...) takes them."""
    return [{'index': i, 'memory_total_mb': memory_mb, **other} for i in range(count)]


def put(path, text, mode=0o644):
    """Replace a file by rename: a reader sees the old text or the new one."""
    new = path.with_name(path.name + '.new')
    new.write_text(text)
    new.chmod(mode)
    new.replace(path)


def gpu_row(index=0, memory_total_mb=16000, memory_free_mb=None, utilization=0, **columns):
    """Return a GPU as nvidia-smi's columns; `columns` sets any of them: 'compute_mode', ..."""
    free_mb = memory_total_mb if memory_free_mb is None else memory_free_mb
    row = {
        'index': index, 'uuid': f'GPU-00000000-0000-0000-0000-{index:012d}',
        'pci.bus_id': f'00000000:{index + 1:02X}:00.0', 'name': 'NVIDIA Rig 16GB',
        'memory.total': memory_total_mb, 'memory.free': free_mb,
        'memory.used': memory_total_mb - free_mb, 'utilization.gpu': utilization,
        'mig.mode.current': '[N/A]', 'compute_mode': 'Default', **columns,
    }
    return [str(row[column]) for column in GPU_COLUMNS]


# ---- The witness of a job ----

# Each note is one write to each file, so that notes of simultaneous jobs are never mixed.
NOTED = r'''#!/bin/bash
# Runs a command for a job, and notes its start and its end: see ledgers.py.  Like a good program,
# it fails if it cannot write.
try=${SSH_SCHEDULER_ID##*.}             # PROJECT.NAME.ATTEMPT-IDENTITY
note() {
    local text="$SSH_SCHEDULER_JOB ${try%-*} $1"
    echo "$text" >>"$RIG_LEDGER" && echo "$text" && echo "$text" >>ran
}
note start || exit 74
(eval "$1")
status=$?
note end || ((status)) || status=74
exit "$status"
'''


# ---- Machine ----

# KexAlgorithms: OpenSSH's default, sntrup761, costs 60 ms more of processor time in every login.
SSHD_CONFIG = '''\
{options}
ListenAddress {address}
Port {port}
HostKey {folder}/host_key
PidFile {folder}/listening
AuthorizedKeysFile {folder}/client_key.pub
SetEnv {environment}
KexAlgorithms curve25519-sha256
LogLevel VERBOSE
UsePAM no
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
PrintLastLog no
PrintMotd no
Subsystem sftp internal-sftp
'''

# Debian's /etc/profile replaces PATH in a login shell of the Bourne family, so the machine's
# .profile restores it.  The rest is the .profile that Debian gives a new user.
PROFILE = '''\
PATH='{path}'
if [ -n "$BASH_VERSION" ] && [ -f ~/.bashrc ]; then . ~/.bashrc; fi
'''

RUNNING = []            # machines between enter and exit: conftest shows their logs on a failure


# Processes that run tests at the same time take ports with different remainders.
PORT_STEP = 16
PORT_REMAINDER = int(os.environ.get('PYTEST_XDIST_WORKER', 'gw0').removeprefix('gw')) % PORT_STEP
PORTS = 10000, 20000
RECENT_PORTS = collections.deque(maxlen=300)


def free_port():
    """Return a free port below the range from which the kernel takes clients' ports.

    So the port is still free when a stopped machine starts again.  No other machine of the tests
    gets it meanwhile, and no Slurm: slurm_rig takes ports above these.
    """
    while True:
        port = random.randrange(*PORTS) // PORT_STEP * PORT_STEP + PORT_REMAINDER
        if port in RECENT_PORTS:
            continue
        RECENT_PORTS.append(port)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(('127.0.0.1', port))
                return port
            except OSError:
                continue


class Machine:
    """A machine: one sshd on loopback with its own files and settings; a context manager.

    shell           the login shell
    startup         {'.bashrc': text, '.config/fish/config.fish': text}: files below its home
    gpus            None: no nvidia-smi.  A list of dicts (see gpu_row) or recorded text: a fake one
    nvidia_smi      text of a script instead of the fake one, for example one that fails or hangs
    tools           names of the only programs in PATH
    leave_out       names of programs that are not in PATH
    path_extra      folders in PATH, after its own and before the programs
    uid             log in as this unprivileged user (only root can)
    sshd_options    first lines of sshd_config: sshd takes the first value of an option
    env             more environment of every session
    cores, busy_cores, memory_mb    the values in its /proc and nproc; memory_mb is the free memory
    beside          another Machine on the same computer, of which this one is another account
    """

    user = 'ben'
    address = '127.0.0.1'

    def __init__(self, name='lab1', *, shell='/bin/bash', startup=None, gpus=None,
                 nvidia_smi=None, tools=None, leave_out=(), path_extra=(), uid=None,
                 sshd_options='', env=None, cores=8, memory_mb=16000, busy_cores=0.0,
                 beside=None):
        if uid is not None and os.getuid() != 0:
            raise PermissionError('only root can start a machine for another uid')
        self.name = name
        self.shell = shell
        self.startup = startup or {}
        self.gpus = gpus
        self.nvidia_smi = nvidia_smi
        self.tools = tools and (*tools,)
        self.leave_out = (*leave_out, 'nvidia-smi')
        self.path_extra = path_extra
        self.uid = os.getuid() if uid is None else uid
        self.sshd_options = sshd_options
        self.env = env or {}
        self.beside = beside
        self.load = {'cores': cores, 'memory_mb': memory_mb, 'busy_cores': busy_cores}
        self.sshd = None

    def __enter__(self):
        self.folder = temporary_folder(self.name, mode=0o755)
        self.home = self.folder / 'home'
        self.bin = self.folder / 'bin'
        self.proc = self.beside.proc if self.beside else self.folder / 'proc'
        self.shared = self.beside.shared if self.beside else self.folder / 'shared'
        self.log = self.folder / 'sshd.log'
        self.ledger = self.folder / 'ledger'    # see ledgers.py; outlives a power cut
        self.key = self.folder / 'client_key'
        self.known_hosts = self.folder / 'known_hosts'
        self.port = free_port()
        try:
            self._prepare()
            self.start()
        except BaseException:
            self.__exit__()
            raise
        RUNNING.append(self)
        return self

    def __exit__(self, *_exception):
        """Kill everything that runs on this machine, and remove its folder."""
        if self in RUNNING:
            RUNNING.remove(self)
        try:
            self.power_off()
        finally:
            remove(self.folder)

    # -- its parts

    def _prepare(self):
        for folder in (self.home, self.bin):
            folder.mkdir(exist_ok=True)
        self.ledger.touch()
        self.ledger.chmod(0o666)
        if not self.beside:
            self.shared.mkdir()
            self.shared.chmod(0o1777)
            (self.proc / 'sys/kernel/random').mkdir(parents=True)
            self.set_boot_id()
        self.path = os.pathsep.join(map(str, (
            self.bin, *self.path_extra, *system_path(self.leave_out, self.tools))))
        for name, text in {'.profile': PROFILE.format(path=self.path), **self.startup}.items():
            file = self.home / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        self._script('noted', NOTED)
        self.set_load(**self.load)
        self.set_gpus(self.gpus, self.nvidia_smi)
        for key in (self.folder / 'host_key', self.key):
            subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-C', self.name,
                            '-f', key], check=True)
        host_key = (self.folder / 'host_key.pub').read_text()
        self.known_hosts.write_text(f'[{self.address}]:{self.port} {host_key}')
        self._write_accounts()
        self._write_sshd_config()

    def _write_accounts(self):
        """Write the passwd and group files that sshd sees: for ben, and sshd's own user."""
        gid = os.getgid() if self.uid == os.getuid() else self.uid
        users = [f'{self.user}:*:{self.uid}:{gid}::{self.home}:{self.shell}']
        if os.getuid() == 0:
            users.append(':'.join(map(str, pwd.getpwnam('sshd'))))
            Path('/run/sshd').mkdir(mode=0o755, exist_ok=True)  # an sshd of root needs this path
        if self.uid != os.getuid():
            for path in (self.home, *self.home.rglob('*')):
                os.chown(path, self.uid, gid)
        (self.folder / 'passwd').write_text('\n'.join(users) + '\n')
        (self.folder / 'group').write_text(f'{self.user}:x:{gid}:\n')

    def _environment(self):
        """Return the environment of every session, without `env`."""
        return {'PATH': self.path, 'RIG_MACHINE': self.folder, 'RIG_LEDGER': self.ledger,
                'SSH_SCHEDULER_PROC': self.proc, 'SSH_SCHEDULER_SHARED': self.shared,
                'SSH_SCHEDULER_SYS': self.folder / 'sys'}

    def _write_sshd_config(self):
        quoted = ' '.join('"{}={}"'.format(name, re.sub(r'(["\\])', r'\\\1', str(value)))
                          for name, value in {**self._environment(), **self.env}.items())
        (self.folder / 'sshd_config').write_text(SSHD_CONFIG.format(
            options=self.sshd_options, address=self.address, port=self.port, folder=self.folder,
            environment=quoted))
        check = subprocess.run([*self._sshd_argv(), '-t'], env=self._sshd_env(),
                               capture_output=True, text=True)
        if check.returncode:
            raise ValueError(f'sshd refuses its configuration: {check.stderr}')

    def _sshd_argv(self):
        return [program('sshd'), '-f', self.folder / 'sshd_config']    # sshd wants a full path

    def _sshd_env(self):
        return {**os.environ, 'LD_PRELOAD': nss_wrapper(),
                'NSS_WRAPPER_PASSWD': str(self.folder / 'passwd'),
                'NSS_WRAPPER_GROUP': str(self.folder / 'group')}

    @property
    def account(self):
        """The name of the machine in the program's journal."""
        return f'{self.user}@{self.address}:{self.port}'

    # -- its faked resources

    def set_load(self, cores=8, busy_cores=0.0, memory_mb=16000):
        """Write the machine's /proc.  It never changes, so only loadavg shows the busy cores.

        The cgroup and `df` are not faked: they are this computer's.
        """
        core = '4000 0 2000 900000 100 0 0 0 0 0'
        lines = [f'cpu  {core}', *(f'cpu{i} {core}' for i in range(cores)), 'procs_running 1']
        put(self.proc / 'stat', '\n'.join(lines) + '\n')
        free_kb = memory_mb * 1024
        put(self.proc / 'meminfo',
            f'MemTotal:       {2 * free_kb} kB\nMemFree:        {free_kb // 2} kB\n'
            f'MemAvailable:   {free_kb} kB\nSwapTotal:      0 kB\nSwapFree:       0 kB\n')
        busy = f'{busy_cores:.2f}'
        put(self.proc / 'loadavg', f'{busy} {busy} {busy} 1/100 12345\n')
        self._script('nproc', f'#!/bin/bash\necho {cores}\n')

    def set_boot_id(self):
        """Set a new boot id, as after a reboot."""
        (self.proc / 'sys/kernel/random/boot_id').write_text(f'{uuid.uuid4()}\n')

    def set_gpus(self, gpus, nvidia_smi=None):
        """Give it other GPUs, a recorded answer, another script, or (None) no nvidia-smi."""
        if isinstance(gpus, str):
            put(self.folder / 'gpus.txt', gpus)
        elif (self.folder / 'gpus.txt').exists():
            (self.folder / 'gpus.txt').unlink()
        (self.folder / 'gpus.apps').touch()
        (self.folder / 'gpus.apps').chmod(0o666)
        if not isinstance(gpus, str):
            rows = [GPU_COLUMNS, *(gpu_row(**gpu) for gpu in gpus or ())]
            put(self.folder / 'gpus.table', ''.join(';'.join(row) + '\n' for row in rows))
        if nvidia_smi is not None or gpus is not None:
            self._script('nvidia-smi', nvidia_smi or NVIDIA_SMI)
        elif (self.bin / 'nvidia-smi').exists():
            (self.bin / 'nvidia-smi').unlink()

    def _script(self, name, text):
        put(self.bin / name, text, 0o755)

    def hold_fetches(self, until):
        """Let each rsync that fetches from it wait until the file `until` exists.

        A file with this name and `.awaited` shows that an rsync waits.
        """
        self._hold_copies(until, '==')

    def hold_sends(self, until):
        """Let each rsync that sends files to it wait in the same way."""
        self._hold_copies(until, '!=')

    def _hold_copies(self, until, sign):
        self._script('rsync', f'''#!/bin/bash
if [[ " $* " {sign} *" --sender "* ]]; then
    until [ -e {until} ]; do touch {until}.awaited; sleep 0.02; done
fi
exec {program('rsync')} "$@"
''')

    # -- its life

    def start(self):
        """Start sshd, and return when it listens."""
        fifo = self.folder / 'listening'
        os.mkfifo(fifo)
        listening = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        with open(self.log, 'ab') as log:
            self.sshd = self._launch(log)
        ended = os.pidfd_open(self.sshd.pid)
        try:
            if listening not in wait_readable(listening, ended):
                raise RuntimeError(f'sshd of {self.name} did not start:\n{self.log.read_text()}')
        finally:
            os.close(listening)
            os.close(ended)
            fifo.unlink()

    def _launch(self, log):
        return subprocess.Popen([*self._sshd_argv(), '-D', '-e'], env=self._sshd_env(),
                                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                start_new_session=True)

    def stop(self):
        """Kill sshd and its connections; everything else on the machine keeps running."""
        if self.sshd is None:
            return
        for pid in self.freeze()[1:]:       # else sshd would accept more connections now
            kill(pid, is_sshd)
        self.sshd.terminate()
        self.sshd.send_signal(signal.SIGCONT)
        self.sshd.wait(SAFETY_NET_S)
        self.sshd = None

    def power_off(self):
        """Stop it and kill everything that runs on it."""
        self.stop()
        self.kill_processes()

    def kill_processes(self):
        """Kill everything that runs on it; some processes may end meanwhile by themselves."""
        left = self.processes()
        while left:
            for pid, _cmdline in left:
                kill(pid, self._runs_here)
            left = self.processes()

    def freeze(self):
        """Stop sshd and its connections with SIGSTOP: they stay open and answer nothing.

        Return their pids, that of sshd first.
        """
        while True:                         # until one look finds no process that still runs
            found = (self.sshd.pid, *self._connections())
            running = [pid for pid in found if parent_and_state(pid)[1] not in 'TZX']
            if not running:
                return found
            for pid in running:
                with contextlib.suppress(ProcessLookupError):       # a connection that has ended
                    os.kill(pid, signal.SIGSTOP)

    def thaw(self):
        for pid in (self.sshd.pid, *self._connections()):
            with contextlib.suppress(ProcessLookupError):       # a session that ends just now
                os.kill(pid, signal.SIGCONT)

    def _connections(self):
        """Return the pids of the live sshd processes below the one that listens.

        They overwrite their environment (with their titles), so only the process tree shows them.
        """
        parents = {pid: parent_and_state(pid) for pid in pids()}
        found = [self.sshd.pid]
        for above in found:
            found += [pid for pid, (parent, state) in parents.items() if parent == above
                      and state not in 'ZX' and is_sshd(pid)]
        return found[1:]

    # -- to observe it

    def yaml(self, **extra):
        """Write the machine's file as a user would, and return its path.  None omits a key."""
        fields = {'username': self.user, 'ip': self.address, 'port': self.port,
                  'ssh_key_path': str(self.key),
                  'ssh_options': {'UserKnownHostsFile': str(self.known_hosts)}, **extra}
        path = self.folder / f'{self.name}.yaml'
        new = path.with_suffix('.new')          # replaced, since a client may read it meanwhile
        new.write_text(''.join(f'{key}: {json.dumps(value)}\n'       # each JSON value is YAML
                               for key, value in fields.items() if value is not None))
        return new.replace(path)

    def ssh_argv(self, *options):
        """Return the argv of a plain ssh to it, without configuration; add the remote command."""
        return ['ssh', '-F', 'none', '-p', str(self.port), '-i', str(self.key),
                '-o', 'BatchMode=yes', '-o', 'IdentitiesOnly=yes', '-o', 'LogLevel=ERROR',
                '-o', f'UserKnownHostsFile={self.known_hosts}',
                '-o', 'StrictHostKeyChecking=yes', *options, f'{self.user}@{self.address}']

    def run(self, text, stdin='', timeout_s=SAFETY_NET_S):
        """Run text in the login shell with a new login (which logins() counts, too)."""
        return subprocess.run([*self.ssh_argv(), text], input=stdin, timeout=timeout_s,
                              capture_output=True, text=True)

    def logins(self):
        """Return the number of logins since the machine was made."""
        return self.log.read_text(errors='replace').count('Accepted publickey for ')

    def processes(self):
        """Return (pid, command line) of each process on it except sshd."""
        return [(pid, cmdline(pid)) for pid in pids() if self._runs_here(pid)]

    def _runs_here(self, pid):
        mark = os.fsencode(f'RIG_MACHINE={self.folder}')
        return mark in read_proc(pid, 'environ').split(b'\0')   # a zombie's is empty


if __name__ == '__main__':
    if sys.argv[1:] != ['--missing']:
        sys.exit(__doc__)
    missing = missing_tools() + missing_extras()
    print(*missing, sep='\n', end='\n' if missing else '')
    sys.exit(bool(missing))
