"""Clusters for the tests: a real Slurm, and a login node that is one sshd on loopback.

A Cluster has the daemons that tests/slurm_rig starts (a controller, nodes, munge), and one or more
logins, each of which is a rig.Machine.  All of them see the same disk, as on real clusters.

    login node: sshd -> sbatch --> slurmctld --> slurmd of n1 -> job       the rig
    (rig.Machine)                            \\-> slurmd of n2 -> job

libnss_wrapper is also preloaded into the logins' sessions and into Slurm.  So all of them know the
account by the same number, name and home.  A job has the environment of its login.

A keeper, a process that reads from a pipe of the tests, removes a cluster when the pipe closes.  So
nothing stays if the tests are killed.
"""
import contextlib
import functools
import os
import pwd
import re
import shlex
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import rig
from rig import SAFETY_NET_S, Machine, program

SLURM_RIG = Path(__file__).with_name('slurm_rig')
PAUSE_S = 0.05          # before each list that a test requests
STARTS_IN_S = 60        # also when many start at the same time, some with accounting

# Requests of the nodes to the controller, as opposed to those from a login.
NODES_ASK = re.compile(r'MESSAGE_\w+|REQUEST_COMPLETE_\w+|REQUEST_STEP_COMPLETE|REQUEST_PING')
# Lines that the controller also writes when there is no job.
EACH_SECOND = re.compile(r'scheduler for full queue|backfill|node_did_resp|Tree head|ping agent|'
                         r'_PING|time limits and checkpoints|old job records')
LISTING_ASKS = Counter(REQUEST_JOB_INFO=1, REQUEST_PARTITION_INFO=1)

RUNNING = []            # clusters between enter and exit: conftest shows their logs on a failure


# ---- What clusters need ----

@functools.cache
def why_not(accounting=False):
    """Return the reason why Clusters are impossible here, or None."""
    packages = {**rig.SLURM_PACKAGES, **(rig.ACCOUNTING_PACKAGES if accounting else {})}
    missing = rig.missing_tools(packages)
    return (f'tests of Slurm need more Debian packages: apt-get install {" ".join(missing)}'
            if missing else None)


def leftovers():
    """Return sentences about leftover processes; rig.leftovers() has the others.

    The environment of a process may be empty, so look at its open files and its current folder.
    """
    def places(pid):
        with contextlib.suppress(OSError):
            yield os.readlink(f'/proc/{pid}/cwd')
            for name in os.listdir(f'/proc/{pid}/fd'):
                yield os.readlink(f'/proc/{pid}/fd/{name}')

    def is_ours(path):
        return any(Path(path).is_relative_to(folder) for folder in FOLDERS)

    return [f'process {pid} still uses a cluster: {rig.cmdline(pid)}' for pid in rig.pids()
            if pid != os.getpid() and any(map(is_ours, places(pid)))]


FOLDERS = []            # of all clusters that were made, for leftovers()


def clean_environment():
    """Return the environment without variables that a job of Slurm or its user has set."""
    return {name: value for name, value in os.environ.items()
            if not name.startswith(('SLURM_', 'SBATCH_', 'SQUEUE_', 'SACCT_', 'SCANCEL_'))}


# ---- Stand-ins: what a real Slurm does not do on demand ----
#
# Each is the bash text of a program that precedes the real one of the same name in PATH: see
# Cluster.wrap.  $REAL is the path of the real one; $0.* are paths for its own files.

# The site prints its own lines before and after the id, on both streams.
BANNERS = r'''
echo '==== 4711 jobs wait. Next maintenance: 2026-12-24 ===='
echo "sbatch: info: your project has used 80 % of its hours" >&2
"$REAL" "$@"
status=$?
echo '==== Questions: 555-0100 ===='
exit "$status"
'''

TIMED_OUT = ('sbatch: error: Batch job submission failed: '
             'Socket timed out on send/recv operation')

# The controller accepts the job, but the answer is lost.
ACCEPTED_TIMED_OUT = f'''
"$REAL" "$@" >/dev/null
echo {shlex.quote(TIMED_OUT)} >&2
exit 1
'''

# The request is lost.
LOST_TIMED_OUT = f'''
cat >/dev/null
echo {shlex.quote(TIMED_OUT)} >&2
exit 1
'''

# The program is killed: after the controller accepts the job, but before the answer; or at once.
ACCEPTED_KILLED = '"$REAL" "$@" >/dev/null\nkill -KILL "$$"\n'
LOST_KILLED = 'kill -KILL "$$"\n'

# Slurm has two jobs: the first request also arrived, although sbatch took it for lost.  The script
# comes from the standard input.
ACCEPTED_TWICE = r'''
cat >"$0.script.$$"
"$REAL" "$@" <"$0.script.$$" >/dev/null
"$REAL" "$@" <"$0.script.$$"
status=$?
rm -f "$0.script.$$"
exit "$status"
'''

# The program does nothing and prints nothing: a scancel without effect; a squeue or a sacct that
# does not know the jobs yet.
NOTHING = 'exit 0\n'

# The program fails as if the controller were away; Cluster.halt really stops the controller.
AWAY = '''
echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2
exit 1
'''

# The program repeats its first answer to the same request.
LAGS = r'''
kept=$0.$(printf '%s\0' "$@" | cksum | cut -d ' ' -f 1)
if ! [ -e "$kept" ]; then
    "$REAL" "$@" >"$kept.$$" || exit
    mv "$kept.$$" "$kept"
fi
exec cat "$kept"
'''

# The program holds its answer, or its request, until Cluster.release.
ANSWER_HELD = r'''
"$REAL" "$@" >"$0.said.$$"
status=$?
touch "$0.held"
until [ -e "$0.go" ]; do sleep 0.02; done
cat "$0.said.$$"
exit "$status"
'''
QUESTION_HELD = r'''
touch "$0.held"
until [ -e "$0.go" ]; do sleep 0.02; done
exec "$REAL" "$@"
'''

# sacct fails like this if the site keeps no accounts.
NO_ACCOUNTS = "echo 'Slurm accounting storage is disabled' >&2\nexit 1\n"


def once(script):
    """Return a stand-in that runs `script` in the first call, and the real program later."""
    return f'mkdir "$0.first" 2>/dev/null || exec "$REAL" "$@"\n{script}'


def says_id(number):
    """Return an sbatch that submits its job but prints another id, as if ids were reused."""
    return f'"$REAL" "$@" >/dev/null || exit\necho {int(number)}\n'


def renamed(number, name):
    """Return a squeue that shows job `number` with another name, as if its id had been reused.

    The format of squeue must have the id first and the name last, with | between the fields.
    """
    script = f's/^({int(number)}[|].*[|])[^|]*$/\\1{name}/'
    return f'"$REAL" "$@" | sed -E {shlex.quote(script)}\nexit "${{PIPESTATUS[0]}}"\n'


STAND_IN = r'''#!/bin/bash
REAL={real}
printf '%s\n' "${{*@Q}}" >>"$0.calls"
{script}
'''


# ---- Login: one sshd, with the home that all share ----

class Login(Machine):
    """A login node of a cluster; a context manager.  As root, its name is also its host name."""

    def __init__(self, cluster, name, env=None, **settings):
        super().__init__(name, path_extra=(cluster.stand_ins,), uid=cluster.uid,
                         env={**cluster.environment, **(env or {})}, **settings)
        self.cluster = cluster

    def _prepare(self):
        self.home = self.cluster.home
        self.cluster.keep(self.folder)
        super()._prepare()

    def _sshd_argv(self):
        argv = super()._sshd_argv()
        if os.getuid() == 0 and self.cluster.apart:
            # All nodes must know the login node's name: they call srun back by this name.
            hosts = self.cluster.folder / 'slurm/hosts'
            with hosts.open('a') as file:
                file.write(f'127.0.0.1 {self.name}\n')
            script = 'mount --bind "$1" /etc/hosts && hostname "$0" && shift && exec "$@"'
            argv = [program('unshare'), '--uts', '--mount', program('sh'), '-c', script, self.name,
                    str(hosts), *argv]
        return argv

    def _runs_here(self, pid):
        """Tell whether a process runs on this login node; jobs have its environment, too."""
        on_node = b'\0SLURMD_NODENAME=' in b'\0' + rig.read_proc(pid, 'environ')
        return not on_node and super()._runs_here(pid)

    def yaml(self, **extra):
        """Write the machine's file as a user of the cluster would, and return its path."""
        return super().yaml(**{'engine': 'slurm', 'workdir': str(self.cluster.workdir),
                               'env': {'SLURM_CONF': str(self.cluster.conf)}, **extra})


# ---- Cluster ----

class Listed(NamedTuple):
    """A job in the list of squeue."""
    id: int
    state: str                  # PENDING, RUNNING, ...
    reason: str                 # None, Resources, ...
    node: str                   # '' while it is pending
    name: str


# $1: slurm_rig, $2: the folder of a cluster.  The keeper reads the names of the logins' folders.
# When the pipe closes, it kills the processes that mention a folder, and removes all folders.
KEEPER = r'''
trap '' INT TERM HUP QUIT
folders=("$2")
while IFS= read -r folder; do folders+=("$folder"); done
"$1" stop "$2/slurm"
for folder in "${folders[@]}"; do
    # An sshd has the folder in its arguments only: it overwrites its environment.
    for pid in $(grep -lF "$folder/" /proc/[1-9]*/cmdline /proc/[1-9]*/environ | cut -d / -f 3); do
        kill -KILL "$pid"
    done
    chmod -R u+rwX "$folder"
    rm -rf -- "$folder"
done 2>/dev/null
'''


class Cluster:
    """A Slurm of its own, with a login node; a context manager.

    nodes, cpus, gpus, memory   the number of nodes, and the resources of each; memory in MB
    conf            lines of slurm.conf instead of the rig's; {folder} in them is `folder`
    accounting      sacct knows the jobs (the cluster starts in 2 s instead of 0.2 s)
    slow            keep Slurm's default intervals, of half a minute and more
    uid             log in as this unprivileged user (only root can)
    login_settings  more settings of the login node, see rig.Machine

    `login` is the login node, `workdir` a folder that the nodes share.  `folder` has everything.
    """

    def __init__(self, nodes=2, *, cpus=4, gpus=2, memory=4000, conf=(), accounting=False,
                 slow=False, uid=None, **login_settings):
        self.sizes = {'nodes': nodes, 'cpus': cpus, 'gpus': gpus, 'memory': memory}
        self.lines, self.accounting, self.slow = conf, accounting, slow
        self.uid, self.login_settings = uid, login_settings
        self._belongings = contextlib.ExitStack()

    def __enter__(self):
        self.folder = rig.temporary_folder('slurm', mode=0o755)
        FOLDERS.append(self.folder)
        self.home, self.workdir = self.folder / 'home', self.folder / 'work'
        self.stand_ins, self.conf = self.folder / 'bin', self.folder / 'slurm/slurm.conf'
        with contextlib.ExitStack() as made:
            made.callback(self._hand_over())
            self._prepare()
            self._rig('start', *self._options(), timeout_s=STARTS_IN_S)
            self._log_before = len(self.log())
            self._listings = 0
            self.login = made.enter_context(Login(self, 'login1', **self.login_settings))
            RUNNING.append(self)
            made.callback(RUNNING.remove, self)
            self._belongings = made.pop_all()
        return self

    def __exit__(self, *_exception):
        self._belongings.close()

    # -- its parts

    def _hand_over(self):
        """Start the keeper; return a function that lets it remove everything, and waits."""
        self._keeper = subprocess.Popen(['bash', '-c', KEEPER, 'keeper', SLURM_RIG, self.folder],
                                        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL, start_new_session=True)

        def close():
            self._keeper.stdin.close()
            self._keeper.wait(SAFETY_NET_S)

        return close

    def keep(self, folder):
        """Let the keeper remove one more folder, with the processes that mention it."""
        self._keeper.stdin.write(os.fsencode(f'{folder}\n'))
        self._keeper.stdin.flush()

    def _prepare(self):
        for folder in (self.home, self.workdir, self.stand_ins):
            folder.mkdir()
        self.stand_ins.chmod(0o777)     # stand-ins write files as the account of the login
        uid = os.getuid() if self.uid is None else self.uid
        gid = os.getgid() if uid == os.getuid() else uid
        if uid != os.getuid():
            os.chown(self.workdir, uid, gid)
        shell = self.login_settings.get('shell', '/bin/bash')
        # Of two entries with the same number, the first one gives the name.
        (self.folder / 'passwd').write_text(''.join(':'.join(map(str, entry)) + '\n' for entry in (
            (Machine.user, '*', uid, gid, '', self.home, shell), *pwd.getpwall())))
        (self.folder / 'group').write_text(
            f'{Machine.user}:x:{gid}:\n' + Path('/etc/group').read_text())
        self.environment = {
            'SLURM_CONF': str(self.conf), 'LD_PRELOAD': rig.nss_wrapper(),
            'NSS_WRAPPER_PASSWD': str(self.folder / 'passwd'),
            'NSS_WRAPPER_GROUP': str(self.folder / 'group')}

    def _options(self):
        yield from (word for name, value in self.sizes.items() for word in (f'--{name}', value))
        for line in ('SlurmctldDebug=debug2', *self.lines):
            yield from ('--conf', line.format(folder=self.folder))
        if self.accounting:
            yield '--accounting'
        if self.slow:
            yield '--slow'

    def _rig(self, verb, *words, timeout_s=SAFETY_NET_S):
        done = subprocess.run([SLURM_RIG, verb, self.folder / 'slurm', *map(str, words)],
                              env={**clean_environment(), **self.environment},
                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, text=True, timeout=timeout_s)
        if done.returncode:
            raise RuntimeError(f'slurm_rig {verb} {" ".join(map(str, words))} failed: '
                               f'{done.stderr.strip()}')

    @property
    def apart(self):
        """Tell whether nodes have their own processes, mounts and host name here."""
        return (self.folder / 'slurm/apart').exists()

    def another_login(self, name='login2', **settings):
        """Return another login node, with the same home: a context manager."""
        return Login(self, name, **settings)

    # -- its life

    def crash(self, node):
        """Kill the node as a power cut does; Slurm notices in 15 to 18 s, or see lose()."""
        self._rig('crash', node)

    def part(self, node):
        """Kill only the node's daemon: its jobs keep running, unseen by Slurm."""
        self._rig('part', node)

    def boot(self, node):
        """Start the node's daemon after crash() or part(); Slurm notices within a second."""
        self._rig('boot', node)

    def lose(self, node):
        """Let Slurm give up a node at once: its jobs become NODE_FAIL."""
        self.scontrol('update', f'nodename={node}', 'state=down', 'reason=lost')

    def hide(self, node, path=None):
        """Replace the folder `path` (workdir) on this node by an empty, read-only one until show().

        Only root can do this, if nodes are `apart`.  After a crash, the node has the folder again.
        """
        self._rig('hide', node, path or self.workdir)

    def show(self, node, path=None):
        self._rig('show', node, path or self.workdir)

    def freeze(self, daemon='slurmctld'):
        """Stop the controller with SIGSTOP: it serves requests only after thaw().

        Other daemons: 'slurmdbd', so that sacct does not answer; 'munged'.
        """
        self._rig('freeze', daemon)

    def thaw(self, daemon='slurmctld'):
        self._rig('thaw', daemon)

    def halt(self):
        """Stop the controller: clients cannot connect."""
        self._rig('halt')

    def resume(self):
        """Start the controller again, with the jobs that it knew.  For 5 s it starts no new job."""
        self._rig('resume')

    # -- what an administrator can ask

    def command(self, name, *words, text=None):
        """Run a program of Slurm here, which must succeed; return its output."""
        done = subprocess.run([program(name), *map(str, words)], input=text, text=True,
                              env={**clean_environment(), **self.environment},
                              capture_output=True, timeout=SAFETY_NET_S)
        if done.returncode:
            raise RuntimeError(f'{name} {" ".join(map(str, words))}: {done.stderr.strip()}')
        return done.stdout

    def squeue(self):
        """Return all jobs that Slurm lists, also ended ones, in the order of their ids.

        Tests call this until the list is as they want it.  Each call starts a process, so pause.
        """
        time.sleep(PAUSE_S)
        self._listings += 1
        text = self.command('squeue', '--noheader', '--states=all', '--array', '--sort=i',
                            '--format=%i|%T|%r|%N|%j')
        rows = [line.split('|', 4) for line in text.splitlines()]
        return [Listed(int(number), *others) for number, *others in rows]

    def job(self, number):
        """Return the output of `scontrol show job`, as {'JobState': ..., 'Reason': ...}."""
        return self._record('job', number)

    def node(self, name):
        """Return the output of `scontrol show node`, as {'State': 'IDLE', ...}."""
        return self._record('node', name)

    def _record(self, kind, name):
        words = shlex.split(self.scontrol('show', kind, name, '--oneliner').replace("'", ''))
        return dict(word.split('=', 1) for word in words if '=' in word)

    def scontrol(self, *words):
        return self.command('scontrol', *words)

    def sbatch(self, *options, script='true'):
        """Submit bash text as this process's user, discarding its output; return the id."""
        said = self.command('sbatch', '--parsable', '--chdir=/', '--output=/dev/null', *options,
                            text=f'#!/bin/bash\n{script}\n')
        return int(said.partition(';')[0])

    def log(self):
        """Return the log of the controller until now."""
        return (self.folder / 'slurm/log/slurmctld').read_text(errors='replace')

    def events(self):
        """Return the lines of log() without those that the controller repeats each second."""
        return '\n'.join(line for line in self.log().splitlines() if not EACH_SECOND.search(line))

    def records(self):
        """Return the jobs that Slurm lists, and the end of each small file in the workdir."""
        told = [str(job) for job in self.squeue()]
        for path in sorted(self.workdir.rglob('*')):
            with contextlib.suppress(OSError):
                if path.is_file() and 'lib' not in path.parts and path.stat().st_size < 2000:
                    told.append(f'{path.relative_to(self.workdir)}: '
                                f'{path.read_text(errors="replace")[-400:].rstrip()}')
        return '\n'.join(told)

    def rpcs(self):
        """Count the requests to the controller, as Counter(REQUEST_SUBMIT_BATCH_JOB=2, ...).

        Requests of the nodes and of squeue() above do not count; those of other methods do.
        """
        asked = Counter(re.findall(r'Processing RPC: (\w+)', self.log()[self._log_before:]))
        for kind, count in LISTING_ASKS.items():
            asked[kind] -= count * self._listings
        return Counter({kind: count for kind, count in asked.items()
                        if count > 0 and not NODES_ASK.fullmatch(kind)})

    # -- the login node

    def yaml(self, **more):
        """Write the machine file of the login; more: engine_options, max_jobs, gpu_types, ..."""
        return self.login.yaml(**more)

    def wrap(self, name, script):
        """Put a stand-in (a text as above) before the real program in PATH, in all logins."""
        self.unwrap(name)
        rig.put(self.stand_ins / name,
                STAND_IN.format(real=shlex.quote(program(name)), script=script), 0o755)

    def unwrap(self, name):
        """Remove a stand-in, with the files that it wrote."""
        for path in self.stand_ins.glob(f'{name}*'):
            if path.name == name or path.name.startswith(f'{name}.'):
                path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)

    def calls(self, name):
        """Return the arguments of each call of a stand-in, as [['--parsable', ...], ...]."""
        path = self.stand_ins / f'{name}.calls'
        return list(map(shlex.split, path.read_text().splitlines())) if path.exists() else []

    def is_held(self, name):
        """Tell whether a call waits for release(): see ANSWER_HELD, QUESTION_HELD."""
        return (self.stand_ins / f'{name}.held').exists()

    def release(self, name):
        """Let this call and all later ones continue."""
        (self.stand_ins / f'{name}.go').touch()
