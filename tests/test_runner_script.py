"""The remote runner by itself: a local bash at the end of two pipes, and no Python.

Jobs that must not end yet read from a FIFO, which the test opens when they may continue.  So the
order of events is certain, and nothing waits by sleeping.
"""
import collections
import contextlib
import io
import os
import re
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
import rig
from batching import wait_until

import ssh_scheduler as s

SCRIPTS = {'loader': s.REMOTE_LOADER, 'runner': s.REMOTE_RUNNER, 'unpack': s.REMOTE_UNPACK,
           'pack': s.REMOTE_PACK, 'bootstrap': s.BOOTSTRAP, 'follow': s.REMOTE_FOLLOW,
           'feed': s.REMOTE_FEED,
           'slurm': s.runner_for('slurm'),
           'visit': s.visit_for(''), 'visit of a cluster': s.visit_for('slurm')}
TOKEN = 'a-token'
as_root = pytest.mark.skipif(os.getuid() != 0, reason='only root can mount a small file system')


# ---- The text itself ----

# shellcheck takes 10 s for each long script.  `visit of a cluster` contains `slurm` and `visit`.
@pytest.mark.parametrize('name', sorted(SCRIPTS.keys() - {'slurm', 'visit'}))
def test_shellcheck_finds_nothing(name):
    # A function of an engine replaces one above it, which is then never called.
    expected = ['-e', 'SC2317,SC1091'] if name == 'visit of a cluster' else []
    found = subprocess.run([rig.program('shellcheck'), '-s', 'bash', *expected, '-'],
                           input=SCRIPTS[name], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, '')


@pytest.mark.parametrize('name', SCRIPTS)
def test_bash_can_parse_it(name):
    assert not subprocess.run(['bash', '-n'], input=SCRIPTS[name], text=True).returncode


@pytest.mark.parametrize('name', SCRIPTS)
def test_it_can_cross_the_channel(name):
    assert '\0' not in SCRIPTS[name] and SCRIPTS[name].isascii()


def page(begin, end):
    """Return {first word: rest} of the entries of a table on the page that opens the section."""
    source = Path(s.__file__).read_text()
    table = source.split(f'\n# {begin}', 1)[1].split(f'\n# {end}', 1)[0]
    entries = re.split(r'\n#   (?! )', table)[1:]
    return dict(entry.replace('\n#', ' ').partition(' ')[::2] for entry in entries)


def code(engine=''):
    """Return the runner of a cluster, or by default of any machine, without its comments."""
    return re.sub(r'(^| )# .*$', '', s.runner_for(engine), flags=re.M)


def test_the_page_has_each_request():
    verbs = page('Requests.', 'Events.').keys()
    assert verbs == set(re.findall(r'^do_(\w+)\(\) {', code('slurm'), re.M))
    assert verbs == set(re.findall(r"\bsend\(\s*'(\w+)'", Path(s.__file__).read_text()))


def test_the_page_has_each_event():
    said = set(re.findall(r'\b(?:say|say_text) "?([a-z_]+)', code('slurm'))) - {'bulk'}
    said |= set(re.findall(r"(?:printf '|event=)([a-z]+)(?:\\t|\$)", code('slurm')))
    assert page('Events.', 'A list').keys() == said
    assert said - {'data'} | {'back', 'growth', 'others'} == s.EVENTS.keys()     # the kinds of data
    answers = [entry.partition('->')[2] for entry in page('Requests.', 'Events.').values()]
    assert said >= {word for answer in answers for word in re.findall(r'\w+', answer)
                    if word not in ('and', 'as', 'adopt')}


def test_the_page_has_each_word_of_a_record():
    words = re.search(r"other='(revoked.*)'", s.REMOTE_RUNNER)[1]
    assert page('The record', 'Requests.').keys() == {
        *re.findall(r'\b[a-z]{4,}', words), 'damaged'}


def test_the_page_has_each_file():
    """It lists the files beside the file of a job, and those in the folder `more` beside it."""
    source = Path(s.__file__).read_text()
    table = source.split('\n# The files of a job', 1)[1].split('\n# What a worker has', 1)[0]
    beside = ' '.join(re.findall(r'^#   (\.\S+(?: \.\S+)*)', table, re.M))
    assert set(re.findall(r'\.([a-z]+)', beside)) == set(
        re.findall(r'(?<!\$prefix\.)\$(?:file|key|1)\.([a-z]+)', code())) - {'functions'}
    inside = ', '.join(re.findall(r'^#     ([a-z]+(?:, [a-z]+)?) ', table, re.M))
    assert set(inside.split(', ')) == {
        *re.findall(r'\.more/([a-z]+)', code()), *re.findall(r'\$more/([a-z]+)', code()),
        *re.findall(r'\$\{0%/\*\}/([a-z]+)', code())} - {'script'}       # of jobs on a cluster


# ---- The channel, as the client has it ----

class Channel:
    """A remote runner under a local bash, with its requests and its events."""

    def __init__(self, env, *, bash='bash', project=None, owner='', client='1.0.1',
                 workdir='', setup='', gpus=False, variables=(), functions='', gpu_limit_s=20):
        project = project or os.path.basename(env['HOME'])      # of this test alone
        self.folder = os.path.join(env['HOME'], '.ssh_scheduler', project)
        self.events = []                    # all so far, as lists of text, except the account
        self.account = None
        self._reader = s.EventReader(TOKEN)
        self.process = subprocess.Popen(
            [bash, *s.BOOTSTRAP_BASH[1:], s.BOOTSTRAP], env=env, cwd=env['HOME'],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True)
        limit = 'GPU_LIMIT_S={} '
        assert limit.format(20) in s.REMOTE_RUNNER
        script = (functions + s.REMOTE_RUNNER.replace(
            limit.format(20), limit.format(gpu_limit_s))).encode()
        self.write(s.nul_ended(s.REMOTE_LOADER, len(script)) + script + s.nul_ended(
            TOKEN, workdir, project, owner or f'owner-{id(self)}', client, setup,
            int(gpus), len(variables), *variables))

    def write(self, data):
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def send(self, verb, *fields):
        self.write(s.request(verb, *fields))

    def start(self, name, command, stage='', gpus='-', need='0 0 0', mode='', back='none',
              paths=()):
        self.send('start', f'{name}.1', stage, gpus, need, mode, '', command, back, *paths)

    def watch(self, *names):
        self.send('watch', *(word for name in names
                                         for word in (f'{name}.1', s.BEYOND, s.BEYOND)))

    def stage(self, number, files, links=()):
        """Send files, {'copy/path': text}, and freeze them."""
        data = tar_of(files)
        self.write(s.request('unpack', number, len(data)) + data)
        self.send('freeze', number, *links)
        self.until('staged', number)

    def ready(self):
        """Wait until the runner has probed, so its login shell has finished."""
        self.send('probe')
        return self.until('ready')

    def until(self, *fields):
        """Read up to the next event that begins with these fields; return its other fields."""
        fields = list(fields)
        while True:
            for place, event in enumerate(self.events):
                if event[:len(fields)] == fields:
                    del self.events[place]
                    return event[len(fields):]
            assert self._read(), f'no {fields}, only {self.events}'

    def ended(self, name, adopted=False):
        """Read up to the end of a job; return its exit status, streams, and list of files to fetch.

        adopted: another runner started the job, so this one reports its end only after a look
        """
        while adopted and ['ended', f'{name}.1'] not in [event[:2] for event in self.events]:
            self.watch(name)
            if rig.wait_readable(self.process.stdout, timeout_s=0.1):
                assert self._read(), f'it ended, and said only {self.events}'
        status, _time, _cpu, out, err, *back = self.until('ended', f'{name}.1')
        if back and back != ['@']:      # its folder comes first
            assert re.fullmatch(r'w' + s.FOLDER.pattern, back.pop(0))
        return int(status), out, err, back

    def rest(self):
        """Read to the end of the stream; return the events that the test has not taken."""
        while self._read():
            pass
        return self.events

    def _read(self):
        assert rig.wait_readable(self.process.stdout), f'it is silent after {self.events}'
        data = os.read(self.process.stdout.fileno(), 2**16)
        for event in self._reader.feed(data):
            fields = [text(field) for field in event]
            if fields[0] == 'account':      # always the first event
                assert self.account is None
                self.account = fields[1]
            else:
                self.events.append(fields)
        return bool(data)

    def close(self):
        """Close the runner's stdin, and wait for the end of its output and of the runner."""
        self.process.stdin.close()
        rest = self.rest()
        assert self.process.wait(rig.SAFETY_NET_S) == 0
        return rest

    def finish(self):
        """Make the runner tidy up, and wait for its end."""
        self.send('finish', '')
        self.until('finished')
        return self.close()

    def path(self, name, what='', *below):
        """Return the path of the file of a job, of one beside it such as `out`, or below `work`."""
        if what == 'work':
            return os.path.join(self.folder, 'jobs', self._lines(name)[-1].split()[-1], *below)
        return os.path.join(self.folder, 'jobs', f'{name}.1{what and "."}{what}', *below)

    def _lines(self, name):
        return Path(self.path(name)).read_text(errors='surrogateescape').splitlines()

    def record(self, name):
        """Return the words of the record of a job, without its folder and its running time."""
        line = self._lines(name)[-1]
        assert line[0] == '#' and len(line) == 127
        words = [word for word in line[1:].split()
                 if word != 'left' and not s.FOLDER.fullmatch(word)]
        return words[:2] if words[:1] == ['ended'] else words

    def write_record(self, name, record, command='true'):
        with open(self.path(name), 'w') as file:
            file.write(f'{command}\n#{record:126}\n')


def text(field):
    return field.decode('utf-8', 'surrogateescape')


def tar_of(files):
    """Return a tar archive of these files, {path: text}, as bytes."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode='w', format=tarfile.PAX_FORMAT) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.mode, member.mtime, member.size = 0o644, 1.5e9, len(content.encode())
            tar.addfile(member, io.BytesIO(content.encode()))
    return data.getvalue()


@pytest.fixture
def env(client_env, client_home):
    return {**client_env, 'HOME': str(client_home), 'SHELL': '/bin/bash', 'LC_ALL': 'C.UTF-8'}


@pytest.fixture
def channel(env):
    """Make channels: channel(setup='...'); they are closed when the test ends."""
    with contextlib.ExitStack() as stack:
        def make(**settings):
            made = Channel(settings.pop('env', env), **settings)
            stack.callback(made.process.wait, rig.SAFETY_NET_S)
            stack.callback(made.process.stdout.close)
            stack.callback(made.process.stdin.close)
            return made

        yield make


@pytest.fixture
def runner(channel):
    return channel()


class Gate:
    """A FIFO at which jobs `wait`; `open` blocks until one is there, and lets it continue."""

    def __init__(self, path):
        self.path = path
        os.mkfifo(path)
        self.wait = f'read -r _ <"{path}"'

    def open(self):
        with open(self.path, 'w') as fifo:      # blocks until somebody reads
            fifo.write('go\n')


@pytest.fixture
def gate(tmp_path):
    return Gate(tmp_path / 'gate')


def test_a_copy_of_the_worker_is_not_taken_for_the_job(gate):
    functions = s.visit_for('').removesuffix(s.REMOTE_VISIT_CALL)
    script = functions + r'''
(read -r _ <"$1"; OF_JOB=1 exec sleep 1000) &
has_begun "$!" "$$" && echo early
echo go >"$1"
until [[ $(<"/proc/$!/comm") == sleep ]]; do :; done
has_begun "$!" "$$" && echo begun
kill "$!"
'''
    done = subprocess.run(['bash', '-c', script, 'bash', str(gate.path)], capture_output=True,
                          text=True, timeout=rig.SAFETY_NET_S)
    assert done.stdout == 'begun\n', done


# ---- Facts about the machine ----

def test_a_probe_tells_what_is_here_and_then_ready(channel):
    runner = channel()
    home, rsync = runner.ready()
    assert home == runner.folder and rsync == str(int(bool(rig.program('rsync'))))
    facts = [tuple(event[1:]) for event in runner.events if event[0] == 'probe']
    assert {key for key, _ in facts} >= {'ticks', 'cores', 'load', 'MemTotal', 'MemAvailable'}
    capacity = s.parse_probe(facts, s.Machine('here'))
    assert capacity.memory_mb > 0 and 0 < capacity.total_cores <= os.cpu_count()
    assert capacity.gpu_trouble == 'was not asked for its GPUs'


@pytest.mark.parametrize('script, trouble, indices', [
    (rig.NVIDIA_SMI, '', [0, 1]),
    ('#!/bin/sh\necho NVML: Driver mismatch\nexit 18\n',
     'has an nvidia-smi that fails with status 18: NVML: Driver mismatch', []),
    (None, 'has no nvidia-smi, so no GPU is known', [])])
def test_a_probe_asks_for_the_gpus(channel, env, tmp_path, script, trouble, indices):
    if script:
        (tmp_path / 'bin').mkdir()
        (tmp_path / 'bin/nvidia-smi').write_text(script)
        (tmp_path / 'bin/nvidia-smi').chmod(0o755)
    rows = [rig.GPU_COLUMNS, rig.gpu_row(0), rig.gpu_row(1)]
    (tmp_path / 'gpus.table').write_text(''.join(';'.join(row) + '\n' for row in rows))
    path = f'{tmp_path}/bin:{rig.farm(tmp_path / "links")}'
    runner = channel(env={**env, 'PATH': path}, gpus=True)
    runner.ready()
    capacity = s.parse_probe([tuple(event[1:]) for event in runner.events], s.Machine('here'))
    assert capacity.gpu_trouble == trouble
    assert [gpu.index for gpu in capacity.gpus] == indices


@pytest.fixture
def computer(env, tmp_path):
    """Return computer(path, text), which writes into the /proc and /sys of computer.env."""
    root = tmp_path / 'computer'

    def put(path, text):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    put('proc/stat', 'cpu  10 0 10 80 0 0 0 0 0 0\ncpu0 10 0 10 80 0 0 0 0 0 0\n')
    put('proc/loadavg', '0.00 0.00 0.00 1/100 1\n')
    put('proc/meminfo', 'MemTotal: 8192000 kB\nMemAvailable: 4096000 kB\n')
    put('proc/sys/kernel/random/boot_id', 'boot\n')
    put.env = {**env, 'SSH_SCHEDULER_PROC': str(root / 'proc'), 'SSH_SCHEDULER_SYS': f'{root}/sys'}
    return put


def facts_of(runner):
    """Read to the end of the probe; return its facts, as parse_probe takes them."""
    runner.ready()
    return [tuple(event[1:]) for event in runner.events if event[0] == 'probe']


MB = 2**20


@pytest.mark.parametrize('layout, cores, memory_mb', [
    ('version 2', 1.5, 300), ('version 2 in a container', 1.5, 300), ('version 1', 0.5, 200),
    ('version 1 in a container', 0.5, 200), ('both', 0.5, 300), ('no limit', 4, 4000)])
def test_a_probe_knows_the_limits_of_control_groups(channel, computer, layout, cores, memory_mb):
    computer('proc/stat', ''.join(f'cpu{n} 1 0 1 1 0 0 0 0 0 0\n' for n in ('  ', *'0123')))
    two, one = 'sys/fs/cgroup', 'sys/fs/cgroup'
    path = '/user.slice/a b/job'
    if layout == 'both':
        two += '/unified'
    where = '' if 'container' in layout else '/user.slice/a b'
    if 'version 2' in layout or layout == 'both':
        computer('proc/self/cgroup', f'0::{path}\n')
        computer(f'{two}{where}/memory.max', f'{1000 * MB}\n')
        computer(f'{two}{where}/memory.current', f'{900 * MB}\n')
        computer(f'{two}{where}/memory.stat', f'anon 5\ninactive_file {200 * MB}\n')
        computer(f'{two}{path}/memory.max', 'max\n')
    if 'version 2' in layout:
        computer(f'{two}{where}/cpu.max', '150000 100000\n')
        computer(f'{two}{path}/cpu.max', 'max 100000\n')
    if 'version 1' in layout or layout == 'both':
        groups = f'5:memory:{path}\n4:cpu,cpuacct:{path}\n3:pids:{path}\n'
        computer('proc/self/cgroup', groups + (f'0::{path}\n' if layout == 'both' else ''))
        computer(f'{one}/cpu,cpuacct{where}/cpu.cfs_quota_us', '50000\n')
        computer(f'{one}/cpu,cpuacct{where}/cpu.cfs_period_us', '100000\n')
        computer(f'{one}/cpu,cpuacct{path}/cpu.cfs_quota_us', '-1\n')
    if 'version 1' in layout:
        computer(f'{one}/memory{where}/memory.limit_in_bytes', f'{500 * MB}\n')
        computer(f'{one}/memory{where}/memory.usage_in_bytes', f'{400 * MB}\n')
        computer(f'{one}/memory{where}/memory.stat',
                 f'inactive_file 1\ntotal_inactive_file {100 * MB}\n')
        computer(f'{one}/memory{path}/memory.limit_in_bytes', '9223372036854771712\n')
        computer(f'{one}/memory{path}/memory.usage_in_bytes', '1000\n')
    facts = facts_of(channel(env=computer.env))
    capacity = s.parse_probe(facts, s.Machine('here'))
    assert (capacity.total_cores, capacity.memory_mb) == (cores, memory_mb), facts


@as_root
def test_a_probe_knows_a_real_limit(channel, env):
    group = f'/sys/fs/cgroup/memory/rig-{os.getpid()}'
    if not os.path.exists('/sys/fs/cgroup/memory/memory.limit_in_bytes'):
        pytest.skip('there are no control groups of version 1 here')
    os.mkdir(group)
    try:
        with open(f'{group}/memory.limit_in_bytes', 'w') as file:
            file.write(str(300 * MB))
        runner = channel(env=env)
        with open(f'{group}/cgroup.procs', 'w') as file:
            file.write(str(runner.process.pid))
        # Earlier forks are outside the group, but the runner itself makes the probe.
        capacity = s.parse_probe(facts_of(runner), s.Machine('here'))
        assert 200 < capacity.memory_mb <= 300
        assert capacity.total_memory_mb == 300
        runner.finish()
    finally:
        rig.ends(runner.process.pid)
        for pid in open(f'{group}/cgroup.procs').read().split():
            rig.ends(int(pid))
        os.rmdir(group)


def test_gpus_of_other_makers_are_said_to_be_there(channel, computer, tmp_path):
    bus = 'sys/devices/pci0000:00'
    cards = {'card0': ('0000:00:02.0', '0x8086'), 'card1': ('0000:03:00.0', '0x1002'),
             'card2': ('0000:04:00.0', '0x1002'), 'card3': ('0000:05:00.0', '0x1a03')}
    for card, (slot, vendor) in cards.items():
        computer(f'{bus}/{slot}/vendor', vendor + '\n')
        folder = tmp_path / f'computer/sys/class/drm/{card}'
        folder.mkdir(parents=True)
        (folder / 'device').symlink_to(tmp_path / f'computer/{bus}/{slot}')
    path = rig.farm(tmp_path / 'links', leave_out=('nvidia-smi',))
    facts = facts_of(channel(env={**computer.env, 'PATH': str(path)}, gpus=True))
    assert s.parse_probe(facts, s.Machine('here')).gpu_trouble == (
        'has 2 GPUs of AMD, which cannot be scheduled yet, and no nvidia-smi')


# ---- Looking again, and claims ----

def measured(runner, number=1):
    """Make the runner measure again; return the facts, as parse_probe takes them."""
    runner.events.clear()
    runner.send('measure', number)
    cost = runner.until('measured', str(number))
    assert int(cost[0]) >= 0
    return [tuple(event[1:]) for event in runner.events if event[0] == 'probe']


@pytest.fixture
def shared(env):
    return Path(env['SSH_SCHEDULER_SHARED'])


def claims_in(shared):
    return sorted(path for path in shared.glob('ssh_scheduler.*/*') if path.read_text())


NEED = '1500 300 0 0:1000:750:1'


def test_a_job_claims_what_it_needs_until_it_ends(runner, gate, shared):
    runner.ready()
    runner.start('job', f'{gate.wait}', need=NEED)
    runner.until('started', 'job.1')
    with open(gate.path, 'w') as fifo:
        (claim,) = claims_in(shared)
        assert claim.stat().st_mode & 0o777 == 0o644
        assert claim.parent.stat().st_mode & 0o777 == 0o755
        needs, key = claim.read_text().splitlines()
        pid, _start, _boot, *need = needs.split()
        assert (pid, ' '.join(need)) == (runner.record('job')[1], NEED)
        assert key == 'job.1 0'         # and the ticks that its worker had used before
        found = s.read_needs(measured(runner))
        assert [(c.key, c.cores, c.memory_mb, c.gpus) for c in found] == [
            ('job.1', 1.5, 300, {0: (1000, 0.75, True)})]
        fifo.write('go\n')
    assert runner.ended('job')[0] == 0
    assert claims_in(shared) == [] and s.read_needs(measured(runner, 2)) == []
    runner.send('clean', 'job.1')
    runner.finish()
    assert not [*shared.glob('ssh_scheduler.*')]


def test_what_a_job_uses_is_measured_with_all_its_descendants(runner, gate):
    runner.ready()
    hold = 'python3 -c "b = bytearray(60_000_000); input()"'
    spin = 'python3 -c "import time; all(iter(lambda: time.process_time() < 0.3, False))"'
    runner.start('job', f'({spin}; echo spun; setsid {hold} <{gate.path}) | cat', need=NEED)
    runner.until('started', 'job.1')
    with open(gate.path, 'w') as fifo:
        deadline = time.monotonic() + rig.SAFETY_NET_S
        number = 0
        while True:
            number += 1
            (claim,) = s.read_needs(measured(runner, number))
            if claim.used_mb > 60 and claim.ticks >= 15:
                break
            assert time.monotonic() < deadline, claim
        assert claim.used_mb < 200
        runner.send('watch', 'job.1', 0, 0)
        assert int(runner.until('used', 'job.1')[0]) > 60_000
        fifo.write('\n')
    status, _wall, cpu, *_ = runner.until('ended', 'job.1')
    assert int(status) == 0 and int(cpu) >= 15


def test_a_start_beyond_the_limits_is_held_if_another_batch_is_there(channel, gate, tmp_path):
    one, two = channel(project='one'), channel(project='two')
    for runner in (one, two):
        runner.ready()
        runner.send('limits', 12000, 500, '0:16000:1200')
    one.start('job', gate.wait, need=NEED)
    one.until('started', 'job.1')
    with open(gate.path, 'w') as fifo:
        for name, need in (('memory', '1000 201 0'), ('gpu', '1000 10 0 0:10:10:0'),
                           ('alone', '1000 10 1')):
            two.start(name, 'true', need=need)
            assert two.until('held', f'{name}.1') == []
            assert not os.path.exists(two.path(name))
        # Busy processors alone do not keep a batch off a machine, but limit it to one job.
        last = Gate(tmp_path / 'last')
        two.start('first', last.wait, need='11000 200 0 1:10:10:1')
        two.until('started', 'first.1')
        with open(last.path, 'w') as other:
            two.start('second', 'true', need='1000 0 0')
            two.until('held', 'second.1')
            other.write('go\n')
        assert two.ended('first')[0] == 0
        fifo.write('go\n')
    assert one.ended('job')[0] == 0
    two.start('second', 'true', need='1000 201 0 0:10:10:0')
    assert two.ended('second')[0] == 0


def test_without_limits_nothing_is_held(channel, gate):
    one, two = channel(project='one'), channel(project='two')
    one.start('job', gate.wait, need='1000 400 1')
    one.until('started', 'job.1')
    with open(gate.path, 'w') as fifo:
        two.start('job', 'true', need='1000 400 1')
        assert two.ended('job')[0] == 0
        fifo.write('go\n')
    assert one.ended('job')[0] == 0


def test_of_two_that_start_at_once_never_both_do(channel, gate):
    """Each writes its claim before it reads the other's, so at least one sees the other."""
    runners = [channel(project='one'), channel(project='two')]
    for runner in runners:
        runner.ready()
        runner.send('limits', 12000, 500, '0:16000:1200')
    with open(os.open(gate.path, os.O_RDWR), 'wb', buffering=0) as fifo:
        for turn in range(40):
            for runner in runners:
                runner.start(f'job{turn}', f'read -rn 1 <"{gate.path}"',
                             need='1000 10 0 0:10:10:1')
            said = [first_word(runner, f'job{turn}.1') for runner in runners]
            fifo.write(b'.' * said.count('started'))
            for runner, word in zip(runners, said):
                assert word == 'held' or runner.ended(f'job{turn}')[0] == 0
            assert said in (['held', 'held'], ['held', 'started'], ['started', 'held'])


def first_word(runner, key):
    """Return the first event about a job, without its fields; drop all events so far."""
    while not (words := [word for word, *fields in runner.events if key in fields]):
        assert runner._read()
    runner.events.clear()
    return words[0]


def garble(claim, text):
    claim.write_text(text + '\n')
    claim.chmod(0o644)


@pytest.mark.parametrize('text', [
    '', 'x', '1', '1 2', '-1 1 1 1000 100 0', '1 1 boot 1000 100 2', '$(touch x) 1 1 1 1 0',
    '{me} 08 09 0', '{me} 1 1 0 0:1:1', '{me} 99999999999 1 0', '{gone} 1 boot 1000 400 1',
    '{me} 1000 400 1 a[$(touch x)]:1:1:1', '\0' * 200, '{me} ' + '1' * 100000])
def test_a_claim_that_makes_no_sense_claims_nothing(channel, env, shared, text):
    (shared / 'ssh_scheduler.12345').mkdir()
    stat = open('/proc/self/stat').read().rpartition(')')[2].split()
    me = f'{os.getpid()} {stat[19]} {open("/proc/sys/kernel/random/boot_id").read().strip()}'
    file = shared / 'ssh_scheduler.12345/other.job.1'
    garble(file, text.format(me=me, gone='999999999') if '{' in text else text)
    runner = channel()
    runner.ready()
    runner.send('limits', 12000, 500)
    runner.start('job', 'true', need='1000 400 1')
    assert runner.ended('job')[0] == 0
    assert s.read_needs(measured(runner)) == []
    # the same claim, well formed, counts
    garble(file, f'{me} 1000 400 1')
    runner.start('again', 'true', need='1000 400 1')
    runner.until('held', 'again.1')
    assert not os.path.exists(f'{env["HOME"]}/x')


@pytest.mark.skipif(os.getuid() != 0, reason='only root can make files of another user')
@pytest.mark.parametrize('uid, user', [(65534, 'nobody'), (54321, '54321')])
def test_whose_claim_it_is_is_told(runner, shared, uid, user):
    stat = open('/proc/self/stat').read().rpartition(')')[2].split()
    boot = open('/proc/sys/kernel/random/boot_id').read().strip()
    for owner in (uid, os.getuid()):
        folder = shared / f'ssh_scheduler.{owner}'
        folder.mkdir(exist_ok=True)
        garble(folder / 'other.work.1.1', f'{os.getpid()} {stat[19]} {boot} 1000 400 0')
        os.chown(folder, owner, owner)
    runner.ready()
    needs = s.read_needs(measured(runner))
    assert sorted((need.key, need.user) for need in needs) == [('', ''), ('', user)]


def test_a_folder_of_claims_that_somebody_else_made_is_not_used(channel, shared, tmp_path, gate):
    (tmp_path / 'elsewhere').mkdir()
    (shared / f'ssh_scheduler.{os.getuid()}').symlink_to(tmp_path / 'elsewhere')
    runner = channel()
    runner.start('job', gate.wait, need=NEED)
    runner.until('started', 'job.1')
    with open(gate.path, 'w') as fifo:
        assert not [*(tmp_path / 'elsewhere').iterdir()]
        fifo.write('go\n')
    assert runner.ended('job')[0] == 0
    runner.finish()


def test_a_folder_of_claims_that_changes_hands_is_not_used_any_more(runner, shared, tmp_path):
    runner.ready()
    folder = shared / f'ssh_scheduler.{os.getuid()}'
    folder.rmdir()                          # as another batch of this account does when it ends
    precious = tmp_path / 'precious'
    precious.write_text('mine')
    (tmp_path / 'trap').mkdir()
    (tmp_path / f'trap/{os.path.basename(runner.folder)}.job.1').symlink_to(precious)
    folder.symlink_to(tmp_path / 'trap')
    runner.start('job', 'true', need=NEED)
    assert runner.ended('job')[0] == 0
    runner.finish()
    assert precious.read_text() == 'mine'


def test_a_fifo_among_the_claims_holds_nobody_up(runner, shared):
    (shared / 'ssh_scheduler.12345').mkdir()
    os.mkfifo(shared / 'ssh_scheduler.12345/other.job.1')
    (shared / 'ssh_scheduler.12345/other.job.2').symlink_to('/dev/zero')
    runner.ready()
    runner.send('limits', 12000, 500)
    runner.start('job', 'true', need=NEED)
    assert runner.ended('job')[0] == 0
    assert s.read_needs(measured(runner)) == []
    runner.finish()


def smi(tmp_path, text):
    """Return a PATH with an nvidia-smi of this text."""
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin/nvidia-smi').write_text(text)
    (tmp_path / 'bin/nvidia-smi').chmod(0o755)
    return f'{tmp_path}/bin:{rig.farm(tmp_path / "links")}'


def test_an_nvidia_smi_that_hangs_is_ended_with_the_batch(channel, env, tmp_path):
    path = smi(tmp_path, f'#!/bin/bash\n[ -e {tmp_path}/hang ] || exit 9\n'
                         f'echo $$ >{tmp_path}/hang; exec sleep 1000\n')
    runner = channel(env={**env, 'PATH': path}, gpus=True)
    runner.ready()
    (tmp_path / 'hang').touch()
    runner.send('measure', 1)
    deadline = time.monotonic() + rig.SAFETY_NET_S
    while not (tmp_path / 'hang').read_text().endswith('\n'):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    runner.finish()
    assert rig.ends(int((tmp_path / 'hang').read_text()))


def test_a_login_that_is_slow_does_not_take_the_gpus_away(channel, env, tmp_path):
    path = smi(tmp_path, rig.NVIDIA_SMI)
    rows = [rig.GPU_COLUMNS, rig.gpu_row(0)]
    (tmp_path / 'gpus.table').write_text(''.join(';'.join(row) + '\n' for row in rows))
    shell = tmp_path / 'bin/slow'
    shell.write_text('#!/bin/bash\nexec sleep 1000\n')
    shell.chmod(0o755)
    runner = channel(env={**env, 'PATH': path, 'SHELL': str(shell)}, gpus=True, gpu_limit_s=6)
    assert len(s.parse_probe(facts_of(runner), s.Machine('here')).gpus) == 1
    for pid in rig.knowing(env['HOME']):
        if rig.cmdline(pid) == 'sleep 1000':
            rig.kill(pid, lambda pid: True)
    runner.finish()


def test_without_tar_or_find_it_says_so(channel, env, tmp_path):
    programs = rig.farm(tmp_path / 'bin', leave_out=('tar', 'find', 'rsync'))
    runner = channel(env={**env, 'PATH': str(programs)})
    runner.send('probe')
    assert runner.until('broken') == ['these programs are missing: find tar']


@as_root
def test_a_place_that_cannot_be_written_is_said(channel, tmp_path):
    (tmp_path / 'file').write_text('')
    runner = channel(workdir=f'{tmp_path}/file')
    assert runner.until('broken')[0].startswith('cannot write there: mkdir: ')
    assert runner.close() == []


def test_unknown_requests_are_said(runner):
    runner.send('dance')
    assert runner.until('broken') == ['unknown request: dance']


def test_a_channel_that_ends_in_its_greeting_leaves_nothing(env):
    process = subprocess.Popen([*s.BOOTSTRAP_BASH, s.BOOTSTRAP], env=env, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    script = s.REMOTE_RUNNER.encode()
    head = s.nul_ended(s.REMOTE_LOADER, len(script)) + script + s.nul_ended(TOKEN, '', 'project')
    assert process.communicate(head, rig.SAFETY_NET_S) == (b'', None)
    assert not os.path.exists(os.path.join(env['HOME'], '.ssh_scheduler'))


# ---- The environment of jobs ----

def test_jobs_have_the_environment_of_an_interactive_login(channel, env, client_home):
    (client_home / '.bash_profile').write_text('export FROM_PROFILE=1; . ~/.bashrc\n')
    (client_home / '.bashrc').write_text(
        'case $- in *i*) ;; *) return ;; esac\nexport FROM_RC="a  b\n c"; greet() { echo hi $1; }\n'
        'local_only=1; echo noise; echo more >&2\n')
    runner = channel(setup='export FROM_SETUP=$FROM_PROFILE$1', variables=['FROM_FILE=x=y'])
    runner.ready()
    runner.start('job', 'echo "$FROM_PROFILE,$FROM_RC,$FROM_FILE,$FROM_SETUP,$local_only"; '
                 'greet u; echo $SSH_SCHEDULER_JOB,$PYTHONUNBUFFERED,${CUDA_VISIBLE_DEVICES-unset}')
    status, out, err, _back = runner.ended('job')
    assert (status, err) == (0, '=')
    assert out == '=1,a  b\n c,x=y,1export FROM_SETUP=$FROM_PROFILE$1,\nhi u\njob,1,unset\n'


def test_setup_that_fails_is_said(channel):
    runner = channel(setup='echo because >&2; exit 3')
    runner.send('probe')
    assert runner.until('broken') == ['setup failed (3): because']


def test_gpus_of_a_job(runner):
    runner.start('job', 'echo $CUDA_VISIBLE_DEVICES $CUDA_DEVICE_ORDER', gpus='2,3')
    assert runner.ended('job')[1] == '=2,3 PCI_BUS_ID\n'


# ---- Files ----

def test_each_job_has_its_own_copy_of_what_was_sent(runner):
    runner.stage('one', {'copy/a b': 'text\n', 'copy/folder/x': 'x', 'link/data/big': 'big\n'},
                 links=['data'])
    for name in ('first', 'second'):
        runner.start(name, 'cat "a b" data/big; echo changed >"a b"; ls -A; test -L data',
                     stage='one', back='changed')
    for name in ('first', 'second'):
        assert runner.ended(name) == (0, '=text\nbig\na b\ndata\nfolder\n', '=', ['+./a b'])
    runner.start('late', 'cat "a b"', stage='one')
    assert runner.ended('late')[1] == '=text\n'


def test_what_cannot_be_unpacked_is_said(runner):
    runner.write(s.request('unpack', 'one', 600) + b'no tar' * 100)
    assert 'tar' in runner.until('stage_failed', 'one')[0]
    runner.start('job', 'echo it goes on')
    assert runner.ended('job')[1] == '=it goes on\n'


def test_a_stage_that_is_gone_fails_the_job_and_says_why(runner):
    runner.start('job', 'echo never', stage='none')
    status, out, err, _back = runner.ended('job')
    assert (status, out) == (125, '=')
    assert 'the files of the job could not be copied into its folder' in err


def test_what_a_job_made_or_changed_is_told(runner):
    runner.stage('one', {'copy/kept': 'k', 'copy/grown': 'g', 'copy/touched': 't',
                         'copy/gone': 'x', 'copy/folder/kept': 'k'})
    runner.start('job', "echo >>grown; touch touched; rm gone; mkdir -p new/deep; "
                 "echo >$'new/tab\\t newline\\n back\\\\slash \\xff'; ln -s nowhere folder/link; "
                 "mkfifo pipe; echo >.hidden", stage='one', back='changed')
    status, _out, err, back = runner.ended('job')
    assert (status, err) == (0, '=')
    assert sorted(back) == ['+./.hidden', '+./folder/link', '+./grown', '+./new', '+./new/deep',
                            '+./new/tab\t newline\n back\\slash \udcff', '+./touched', '?./pipe']


def test_named_paths_come_whole_and_missing_ones_are_told(runner):
    runner.stage('one', {'copy/folder/sent': 's', 'copy/-x': 'x'})
    runner.start('job', 'echo >folder/made', stage='one', back='paths',
                 paths=['folder', 'no\nsuch', '-x'])
    assert sorted(runner.ended('job')[3]) == ['!no\nsuch', '+./-x', '+./folder',
                                              '+./folder/made', '+./folder/sent']


def test_a_pattern_names_what_the_job_has_inside_its_folder(runner):
    runner.stage('one', {'copy/sent.csv': 's', 'link/big/x.csv': 'x'}, links=['big'])
    runner.start('job', "mkdir -p res/deep .hid; echo >res/a.csv; echo >res/deep/b.csv; "
                 "echo >$'new\\nline \\xff.csv'; echo >.csv; echo >.hid/c.csv; mkdir out.csv; "
                 "echo >out.csv/d; ln -s / up; ln -s res in; echo >'[ab]'; echo >a; echo >-x.csv",
                 stage='one', back='paths',
                 paths=['*.csv', 're?/*.csv', '*/*.csv', '[ab]', '.h*/*', '.*/x', 'up/et[c]',
                        '*.non', 'big/*', r'\[a*'])
    assert sorted(runner.ended('job')[3]) == [
        '!*.non', '!.*/x', '!big/*', '!up/et[c]', *(f'+./{path}' for path in (
            '-x.csv', '.hid/c.csv', '[ab]', '[ab]', 'new\nline \udcff.csv', 'out.csv', 'out.csv/d',
            'res/a.csv', 'res/a.csv', 'sent.csv'))]


def test_a_pattern_of_many_files_names_them_all(runner):
    runner.start('job', 'touch f{1..2500}', back='paths', paths=['f*'])
    assert runner.ended('job')[3] == ['@']
    runner.send('list', 'job.1')
    listed = runner.until('data', 'back', 'job.1')[0].split('\0')
    assert {*listed} >= {f'+./f{number}' for number in range(1, 2501)} and len(listed) == 2502


def test_all_is_brought_back_with_a_dot(runner):
    runner.stage('one', {'copy/folder/sent': 's'})
    runner.start('job', 'echo >made', stage='one', back='paths', paths=['.'])
    assert sorted(runner.ended('job')[3]) == ['+./folder', '+./folder/sent', '+./made']


def test_what_is_shut_is_opened_and_its_mode_is_told(runner):
    runner.stage('one', {'copy/kept/sent': 's'})
    runner.start('job', 'mkdir -p shut/in; echo >shut/in/x; chmod 300 shut/in; chmod 0 shut; '
                 'echo >kept/new; chmod 0 kept', stage='one', back='changed')
    assert sorted(runner.ended('job')[3]) == [
        '+./kept/new', '+./shut', '+./shut/in', '+./shut/in/x', 'm0 ./kept', 'm0 ./shut',
        'm300 ./shut/in']


def test_what_could_not_be_fetched_is_listed_again(runner):
    runner.start('job', 'mkdir a; echo >a/b; echo >c', back='changed')
    runner.ended('job')
    runner.send('again', 'job.1', 'a', 'no\nsuch')
    listed = runner.until('data', 'back', 'job.1')[0].split('\0')
    folder = runner.path('job', 'work')
    assert sorted(listed) == ['', '!no\nsuch', '+./a', '+./a/b', f'w{os.path.basename(folder)}']
    runner.send('again', 'job.1', '[ac]')                          # a name, not a pattern
    assert runner.until('data', 'back', 'job.1')[0].split('\0')[1:] == ['![ac]', '']
    shutil.rmtree(folder)
    runner.send('again', 'job.1', 'a')
    assert runner.until('data', 'back', 'job.1') == ['!a\0']       # gone with the folder


def test_many_paths_are_asked_for_with_list(runner):
    runner.start('job', 'touch {1..500}', back='changed')
    assert runner.ended('job')[3] == ['@']
    runner.send('list', 'job.1')
    listed = runner.until('data', 'back', 'job.1')[0].split('\0')
    assert listed.pop(0) == f'w{os.path.basename(runner.path("job", "work"))}'
    assert sorted(listed) == sorted(['', *(f'+./{number}' for number in range(1, 501))])


def test_a_list_that_nobody_could_read_is_not_sent(runner):
    runner.start('job', 'touch {1..500}', back='changed')
    assert runner.ended('job')[3] == ['@']
    os.truncate(runner.path('job', 'back'), 61_000_000)
    runner.send('list', 'job.1')
    assert runner.until('unlistable', 'job.1') == []


# ---- How jobs end ----

@pytest.mark.parametrize('command, status', [
    ('true', 0), ('false', 1), ('exit 42', 42), ('exit 255', 255), ('no-such-program', 127),
    ('kill -9 $$', 137), ('kill -TERM $$', 143), ('kill 0; read -r <>/dev/zero', 143), ('(', 2),
    ('set -e; false; echo no', 1), ('exec sh -c "exit 7"', 7)])
def test_the_exit_status_is_told_and_recorded(runner, command, status):
    runner.start('job', command)
    assert runner.ended('job')[0] == status
    assert runner.record('job') == ['ended', str(status)]


@pytest.mark.parametrize('command, out', [
    ('true', '='),
    (r"printf 'a\tb\n\\n \\\\'", '=a\tb\n\\n \\\\'),
    (r"printf '\001\033[31m\377'", '=\x01\x1b[31m\udcff'),
    ('printf %600s', '=' + 600 * ' '),
    ('printf %601s', '@601'),
    (r"printf 'a\0b'", '@3')])
def test_short_streams_come_with_the_end(runner, command, out):
    runner.start('job', f'{command}; {command} >&2')
    assert runner.ended('job') == (0, *((out, out) if len(command) > 1 else ()), [])


def test_the_command_arrives_byte_for_byte(runner):
    value = bytes(range(1, 256))
    command = b"printf %s '" + value.replace(b"'", b"'\\''") + b"' >bytes"
    runner.start('job', command)
    assert runner.ended('job') == (0, '=', '=', [])
    with open(runner.path('job', 'work', 'bytes'), 'rb') as file:
        assert file.read() == value
    with open(runner.path('job'), 'rb') as file:
        assert file.read().rpartition(b'#')[0] == command + b'\n'


def test_a_job_has_an_empty_stdin(runner):
    runner.start('job', 'cat; readlink /proc/self/fd/0')
    assert runner.ended('job')[1] == '=/dev/null\n'


@pytest.mark.parametrize('fields', [
    ('start', 'b.1', '', '-', '0 0 0', '', '', 'echo b', 'paths', 'b'),
    ('folder', 'jobs/b.1/x'), ('clean', 'a.1'), ('adopt', 'b.1')], ids=lambda fields: fields[0])
def test_a_request_that_is_cut_off_is_not_acted_on(channel, fields):
    whole = s.request(*fields)
    for length in range(0, len(whole), 2):
        runner = channel(project=f'cut{length}')
        runner.start('a', 'echo a')
        runner.write(whole[:length])
        rest = runner.close()
        assert [event for event in rest if 'b.1' in event] == []
        assert {name for name in os.listdir(os.path.join(runner.folder, 'jobs'))
                if not name.startswith('work')} >= {'a.1'}


def test_started_comes_before_ended_for_the_quickest(runner):
    names = [f'job{number}' for number in range(200)]
    for name in names:
        runner.start(name, 'true')
    started = set()
    for name in names:
        runner.ended(name)
    seen = runner.events
    runner.events = []
    for event in seen:
        assert event[0] == 'started'
        started |= set(event[1:])
    assert started == {f'{name}.1' for name in names}


def test_order_of_started_and_ended_in_the_stream(channel):
    runner = channel()
    order = []
    feed = runner._reader.feed

    def noting(data):
        for event in feed(data):
            order.append([text(field) for field in event])
            yield event

    runner._reader.feed = noting
    for number in range(100):
        runner.start(f'job{number}', 'true')
    for number in range(100):
        runner.ended(f'job{number}')
    running = set()
    for word, *fields in order:
        if word == 'started':
            running |= set(fields)
        else:
            assert (word, fields[0] in running) == ('ended', True) or word == 'account'


def test_events_of_many_jobs_do_not_mix(runner):
    """The longest possible events: two streams that escaping doubles, and 1,000 bytes of paths."""
    output = '\n' * 600
    names = 'x' * 120
    for number in range(100):
        runner.start(f'job{number}', f'printf %600s | tr " " "\\n" | tee /dev/stderr; '
                     f'touch {names}{{1..7}}', back='changed')
    for number in range(100):
        status, out, err, back = runner.ended(f'job{number}')
        assert (status, out, err) == (0, f'={output}', f'={output}')
        assert sorted(back) == [f'+./{names}{index}' for index in range(1, 8)]
    assert {event[0] for event in runner.events} <= {'started'}


def test_nothing_of_the_channel_is_open_in_a_job(runner, gate):
    runner.start('job', f'sleep 1000 & {gate.wait}; kill $!; exec ls -l /proc/self/fd')
    runner.until('started', 'job.1')
    ours = {os.readlink(f'/proc/{os.getpid()}/fd/{pipe.fileno()}')
            for pipe in (runner.process.stdin, runner.process.stdout)}
    gate_fd = os.open(gate.path, os.O_WRONLY)   # blocks until the job reads
    members = group_members(group_of(runner, 'job'))
    holders = [pid for pid in members if ours & open_files(pid)]
    os.write(gate_fd, b'go\n')
    os.close(gate_fd)
    status, out, _err, _back = runner.ended('job')
    files = [line.partition(' -> ')[2] for line in out.splitlines() if ' -> ' in line]
    assert (status, holders) == (0, [])
    folder = runner.path('job', 'work').rpartition('.')[0]
    assert sorted(files[:4]) == ['/dev/null', runner.path('job', 'err'),
                                 runner.path('job', 'out'), f'{folder}.alive']
    assert len(files) == 5      # and the folder that ls itself has open


def parent_and_group(pid):
    return rig.read_proc(pid, 'stat').rpartition(b')')[2].split()[1:3]


def group_of(runner, name):
    """Return the process group of a running job: its bash leads the group, under the worker."""
    worker, leaders = runner.record(name)[1].encode(), []

    def is_there():
        leaders[:] = (pid for pid in rig.pids()
                      if parent_and_group(pid) == [worker, str(pid).encode()])
        return leaders

    wait_until(is_there, 'its beginning')
    return str(leaders[0])


def group_members(group):
    return [pid for pid in rig.pids() if parent_and_group(pid)[1:] == [group.encode()]]


def open_files(pid):
    found = set()
    for fd in os.listdir(f'/proc/{pid}/fd'):
        with contextlib.suppress(OSError):
            found.add(os.readlink(f'/proc/{pid}/fd/{fd}'))
    return found


def test_a_daemon_that_a_job_leaves_does_not_hold_up_its_end(runner, gate):
    runner.start('job', f'({gate.wait}; exec true) & echo left')
    assert runner.ended('job')[:2] == (0, '=left\n')
    runner.send('finish', '')
    runner.until('finished')
    runner.close()
    gate.open()


# ---- One job after the other, in one worker ----

def one_by_one(runner, *commands, **options):
    """Run the commands one after the other; return their outputs, without the = in front."""
    outputs = []
    for number, command in enumerate(commands):
        name = f'job{number}.{len(runner.events)}'
        runner.start(name, command, **options)
        status, out, err, back = runner.ended(name)
        assert (status, err) == (0, '='), (command, status, err)
        outputs.append(out[1:])
    return outputs


SURROUNDINGS = r'''echo $PWD; ls -lA --full-time; stat -c "%a" .; cat ./* 2>/dev/null
umask; ulimit -a; nice; ps -o tty=,sid= -p $$; trap; shopt; set -o
ls /proc/$$/fd; readlink /proc/$$/fd/0
env | grep -v "^SSH_SCHEDULER_\(ID\|JOB\)="
cat /proc/self/oom_score_adj; grep ^Sig[BI] /proc/self/status; echo $PPID'''.replace('\n', '; ')
FILES = {'copy/a': 'a', 'copy/sub/b': 'b'}


@pytest.mark.parametrize('stage', ['', 'one'])
def test_a_job_cannot_notice_that_its_worker_ran_another_one(runner, stage, tmp_path):
    if stage:
        runner.stage(stage, FILES)
    one_by_one(runner, *[f'{{ {SURROUNDINGS}; }} >{tmp_path}/${{SSH_SCHEDULER_JOB%.*}}'] * 4,
               stage=stage)
    first, *others = [(tmp_path / f'job{number}').read_text() for number in range(4)]
    assert len(first) > 2000
    for other in others:            # one worker and one folder
        assert other.splitlines() == first.splitlines()


@pytest.mark.parametrize('change', [
    'chmod g+w a', 'chmod o-r sub', 'chmod 755 .', 'echo x >a; touch -r sub/b a', 'rm a',
    'touch new; rm new', 'touch sub/new; rm sub/new', 'ln a other; rm other', 'mv a b; mv b a',
    'rm -r "$PWD"', 'rm -r "$PWD"; mkdir -p "$PWD"', 'cp -p a c; mv c a', 'chmod 000 sub'])
@pytest.mark.parametrize('before', [0, 3])
def test_what_a_job_changes_in_its_copy_is_not_there_for_the_next(runner, change, before):
    runner.stage('one', FILES)
    show = 'stat -c "%n %a %h %s %y" . * */*; cat a sub/b'
    *_, undisturbed = one_by_one(runner, *[show] * (before + 1), stage='one')
    _, after, later = one_by_one(runner, change, show, show, stage='one', back='none')
    assert after == later == undisturbed


@pytest.mark.parametrize('change', [
    'chmod 755 .', 'touch x', 'mkdir -p a/b; chmod 0 a', 'rmdir "$PWD"'])
def test_an_empty_folder_is_empty_again_for_the_next(runner, change):
    show = 'stat -c "%a" .; ls -A'
    assert one_by_one(runner, show, show, change, show, change, show)[-1] == '700\n'


@pytest.mark.parametrize('leave', [
    'setsid sleep 1000 >/dev/null 2>&1 & pid=$!', 'sleep 1000 >/dev/null & pid=$!',
    'renice -n 7 -p $PPID >/dev/null; pid=', 'env -i sleep 1000 >/dev/null 2>&1 & pid=$!'])
def test_a_worker_retires_where_a_job_left_something_behind(runner, leave):
    first, second = one_by_one(runner, f'{leave}; echo $PPID $pid', 'echo $PPID; nice')
    worker, *left = map(int, first.split())
    for pid in left:
        os.kill(pid, 9)
    assert int(second.split()[0]) != worker and second.split()[1] == str(os.nice(0))


def test_more_jobs_run_at_once_than_a_login_may_have_files_open(channel, gate, tmp_path):
    """The runner has a file open for each job, and jobs keep the limit of the login."""
    limited = tmp_path / 'limited-bash'
    limited.write_text('#!/bin/bash\nulimit -Sn 40\nexec bash "$@"\n')
    limited.chmod(0o755)
    runner = channel(bash=str(limited))
    names = [f'job{number}' for number in range(60)]
    with open(os.open(gate.path, os.O_RDWR), 'wb', buffering=0) as fifo:
        for name in names:
            runner.start(name, f'ulimit -Sn; read -rn 1 <"{gate.path}"')
        for name in names:
            wait_until(lambda name=name: os.path.exists(runner.path(name, 'out')), name)
        fifo.write(b'.' * len(names))
        for name in names:
            assert runner.ended(name)[:2] == (0, '=40\n')


def test_what_stays_in_the_group_of_a_job_is_not_hit_when_a_later_one_is_cancelled(
        runner, tmp_path):
    """The process has closed all its files, so only its process group shows its job."""
    close = 'for f in /proc/self/fd/*; do f=${f##*/}; ((f < 3)) || eval "exec $f>&-"; done'
    runner.start('first', f'bash -c \'{close}; echo $$ >{tmp_path}/pid; exec env -i sleep 1000\' '
                 f'>/dev/null 2>&1 </dev/null & until [[ -s {tmp_path}/pid ]]; do :; done')
    assert runner.ended('first')[0] == 0
    pid = int((tmp_path / 'pid').read_text())
    try:
        runner.start('second', 'exec sleep 1000')
        runner.until('started', 'second.1')
        runner.send('cancel', 5, 'second.1')
        assert runner.ended('second')[0] == 143
        runner.until('cancelled', '')
        assert not rig.ends(pid, timeout_s=0)
    finally:
        os.kill(pid, 9)


def test_a_cancel_of_what_has_ended_does_not_reach_the_next_job_of_its_worker(runner, gate):
    runner.start('first', 'echo $PPID')
    worker = runner.ended('first')[1]
    runner.start('second', f'env -i sleep 1000 & {gate.wait}; echo $PPID; kill $!')
    runner.until('started', 'second.1')
    with open(gate.path, 'w') as fifo:          # the job waits
        runner.send('cancel', 5, 'first.1')
        runner.until('cancelled', '')
        fifo.write('go\n')
    assert runner.ended('second') == (0, worker, '=', [])


def test_a_job_that_stops_itself_has_not_ended(runner):
    runner.start('job', 'kill -STOP $$; exit 3')
    runner.until('started', 'job.1')
    group = group_of(runner, 'job')
    wait_until(lambda: b') T ' in rig.read_proc(int(group), 'stat'), 'its stop')
    runner.start('other', 'true')
    runner.ended('other')
    assert runner.record('job')[0] == 'starting'
    os.kill(int(group), 18)
    assert runner.ended('job')[0] == 3


def test_signals_to_the_worker_do_not_change_what_a_job_ends_with(runner):
    for number, code in enumerate((0, 3, 129, 143, 127)):
        runner.start(f'job{number}', f'kill -TERM $PPID; kill -HUP $PPID; kill -PIPE $PPID; '
                     f'sleep 0.1; exit {code}')
        assert runner.ended(f'job{number}')[0] == code


def test_signals_to_the_worker_at_the_moment_when_its_job_ends(runner):
    """60 jobs, since bash loses the status of a child in about one of twenty such moments."""
    for number in range(60):
        runner.start(f'job{number}', 'for signal in TERM HUP INT; do kill -$signal $PPID & done; '
                     'kill -KILL $$')
    for number in range(60):
        assert runner.ended(f'job{number}')[0] == 137


def test_a_worker_that_is_killed_before_its_job_begins_leaves_it_to_be_placed_again(channel):
    runner = channel()
    runner.stage('one', FILES)
    runner.start('job', 'true', stage='one')
    runner.ended('job')
    runner.write_record('job', 'starting 1 1 0 work.1.1.1.1')
    os.remove(runner.path('job', 'out'))
    boot = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    runner.write_record('job', f'starting {os.getpid()} 1 {boot} work.1.1.1.1')
    runner.close()
    again = channel()
    again.send('adopt', 'job.1')
    again.until('lost', 'job.1')


def test_jobs_of_a_version_that_made_folders_are_left_alone(channel, env):
    folder = Path(env['HOME'], '.ssh_scheduler', 'older')
    (folder / 'jobs/job.1-0/work').mkdir(parents=True)
    os.mkfifo(folder / 'jobs/job.1-0/alive')
    runner = channel(project='older')
    why, = runner.until('broken')
    assert why.startswith('jobs of an older ssh-scheduler are there') and folder.exists()


# ---- Watching and cancelling jobs ----

def test_watch_tells_what_was_added_to_streams(runner, gate, tmp_path):
    # Two gates: with one, a job that is still there would also read the line for its second wait.
    last = Gate(tmp_path / 'last gate')
    runner.start('job', f'printf abc; printf de >&2; {gate.wait}; printf f; {last.wait}')
    runner.until('started', 'job.1')
    with open(gate.path, 'w') as fifo:          # the job has written, and waits
        runner.send('watch', 'job.1', 0, 0)
        assert runner.until('data', 'growth', 'job.1', 'out') == ['0', 'abc']
        assert runner.until('data', 'growth', 'job.1', 'err') == ['0', 'de']
        fifo.write('go\n')
    with open(last.path, 'w') as fifo:          # the job has written more
        runner.send('watch', 'job.1', 1, 2)
        assert runner.until('data', 'growth', 'job.1') == ['out', '1', 'bcf']
        fifo.write('go\n')
    assert runner.ended('job')[:3] == (0, '=abcf', '=de')
    runner.finish()
    assert not [event for event in runner.events if event[0] == 'data']


def test_where_tells_the_folders_of_jobs(runner, gate):
    runner.start('job', f'touch here; {gate.wait}')
    runner.until('started', 'job.1')
    with open(gate.path, 'w') as fifo:
        runner.send('where', 'none.1', 'job.1')
        key, folder = runner.until('place')     # none.1 has no place
        assert key == 'job.1'
        assert os.path.exists(os.path.join(runner.folder, 'jobs', folder, 'here'))
        fifo.write('go\n')
    assert runner.ended('job')[0] == 0


def test_cancel_ends_the_whole_group(runner, gate):
    runner.start('job', f'sleep 1000 & echo $!; {gate.wait}')
    runner.until('started', 'job.1')
    with open(gate.path, 'w'):
        members = group_members(group_of(runner, 'job'))
        runner.send('cancel', 20, 'job.1')
        assert runner.ended('job')[0] == 143
    assert len(members) >= 2 and all(map(rig.ends, members))


def test_cancel_kills_what_ignores_to_be_ended(runner, gate):
    runner.start('job', f"trap '' TERM; (trap '' TERM; sleep 1000) & {gate.wait}; sleep 1000")
    runner.until('started', 'job.1')
    with open(gate.path, 'w'):
        members = group_members(group_of(runner, 'job'))
    runner.send('cancel', 0, 'job.1')
    status, _out, err, _back = runner.ended('job')
    assert (status, runner.record('job')) == (137, ['ended', '137'])
    assert 'the job did not stop after SIGTERM, and was killed' in err
    assert all(map(rig.ends, members))


def test_cancel_spares_the_next_job_of_the_same_worker(runner, gate, tmp_path):
    """The worker begins that job while the runner still looks for processes of the other one."""
    runner.start('job', f"trap 'sleep 0.15; exit 1' TERM; echo $PPID >{tmp_path}/worker; "
                 'while :; do sleep 0.01; done')
    wait_until((tmp_path / 'worker').exists, 'the job')
    runner.send('cancel', 20, 'job.1')
    assert runner.ended('job')[0] == 1
    runner.start('next', f'echo $PPID >{tmp_path}/next; echo $$ >{tmp_path}/pid; {gate.wait}; '
                 'exit 3')
    runner.until('cancelled', '')
    pid = tmp_path / 'pid'
    wait_until(lambda: pid.exists() and pid.read_text(), 'the next job')
    os.kill(int(pid.read_text()), 0)
    gate.open()
    assert runner.ended('next')[0] == 3
    assert (tmp_path / 'worker').read_text() == (tmp_path / 'next').read_text()


def test_what_waits_is_told_to_end_before_what_it_waits_for(channel, tmp_path):
    """The runner has a `kill` that notes its arguments."""
    begun, told = tmp_path / 'begun', tmp_path / 'told'
    runner = channel(functions=f'kill() {{ echo "$@" >>{told}; builtin kill "$@"; }}\n')
    (tmp_path / 'deep').write_text(         # each begins in a later tick of the clock
        f'sleep 0.02; echo $$ >>{begun}; (($1 == 8)) || bash $0 $(($1 + 1)); sleep 1000; :')
    runner.start('job', f'bash {tmp_path}/deep 1')
    limit = time.monotonic() + rig.SAFETY_NET_S
    while not begun.exists() or begun.read_text().count('\n') < 8:
        assert time.monotonic() < limit
        time.sleep(0.01)
    runner.send('cancel', 20, 'job.1')
    runner.until('cancelled', '')
    order = begun.read_text().split()
    terms, = (line.split() for line in told.read_text().splitlines() if line.startswith('-TERM '))
    assert [pid for pid in terms if pid in order] == order
    assert all(rig.ends(int(pid)) for pid in order)


def test_cancel_of_a_job_that_ended_or_never_was_touches_nothing(runner):
    runner.start('job', 'true')
    runner.ended('job')
    runner.send('cancel', 5, 'job.1')
    runner.send('cancel', 5, 'unknown.1')
    runner.finish()
    assert {event[0] for event in runner.events} <= {'started', 'cancelled', 'parted'}


@pytest.mark.parametrize('record', [
    'starting 1 1 a work.1.1', 'starting -1 1 a work.1.1', 'starting 0 0 a work.1.1', '',
    'starting {pid} 1 b-0 work.1.1', 'ended'])
def test_cancel_kills_only_what_the_record_proves(runner, gate, record):
    bystander = subprocess.Popen(['sleep', '1000'], start_new_session=True)
    try:
        runner.start('job', 'true')
        runner.ended('job')
        runner.write_record('job', record.format(pid=bystander.pid))
        runner.send('cancel', 0, 'job.1')
        runner.start('next', 'true')
        runner.ended('next')
        runner.finish()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_job_that_is_killed_with_its_group_is_noticed_by_watch(runner):
    runner.start('job', 'kill -9 $PPID 0')
    runner.until('started', 'job.1')
    runner.start('witness', 'true')
    runner.ended('witness')
    while True:                         # a watch is answered before the next job's end
        runner.send('watch', 'job.1', 0, 0)
        runner.start(f'witness{len(runner.events)}', 'true')
        runner.ended(f'witness{len(runner.events)}')
        ended = [event for event in runner.events if event[:2] == ['ended', 'job.1']]
        if ended:
            break
    assert ended[0][2] == '137' and 'killed with its whole process group' in ended[0][6]


def test_a_job_is_not_lost_whose_start_comes_together_with_a_watch(runner):
    """A slow network brings requests together, and files behind them slowly."""
    data = tar_of({'copy/data': 'data'})
    runner.write(s.request('start', 'job.1', '', '-', '0 0 0', '', '', 'echo ran', 'none')
                 + s.request('watch', 'job.1', 0, 0)
                 + s.request('unpack', 'one', len(data)) + data[:-1])
    while not (said := [event for event in runner.events if event[1:2] == ['job.1']]):
        assert runner._read()
    assert said[0] == ['started', 'job.1']          # its end may have come with this
    runner.write(data[-1:])
    assert runner.ended('job')[:2] == (0, '=ran\n')


def test_two_that_find_a_killed_job_say_the_same(channel, monkeypatch):
    slow = s.REMOTE_RUNNER.replace('\nrecord_killed() {',
                                   '\nrecord_killed() { mkdir -- "$run/first" || sleep 1;')
    assert slow != s.REMOTE_RUNNER
    monkeypatch.setattr(s, 'REMOTE_RUNNER', slow)
    runner = channel()
    runner.start('job', 'echo "$PPID $$ " >made; kill -9 $PPID 0', back='changed')
    runner.until('started', 'job.1')
    made = Path(runner.path('job', 'work', 'made'))
    wait_until(lambda: made.exists() and made.read_text().endswith('\n'), 'the job')
    assert all(rig.ends(int(pid)) for pid in made.read_text().split())
    runner.send('adopt', 'job.1')
    runner.send('adopt', 'job.1')
    one, other = (runner.until('ended', 'job.1') for _ in range(2))
    assert one == other and one[0] == '137'
    assert one[-2:] == [f'w{os.path.basename(runner.path("job", "work"))}', '+./made']
    assert Path(runner.path('job', 'err')).read_text().count('killed with its whole') == 1


# ---- One command: its input, its terminal, its end ----

@contextlib.contextmanager
def script(text, env, *fields):
    """Run a script of the program beside the runner, as over its own session."""
    with subprocess.Popen([*s.BOOTSTRAP_BASH, s.BOOTSTRAP], env=env, bufsize=0,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stdin.write(bytes(s.nul_ended(text, *fields)))
        try:
            yield process
        finally:
            process.stdin.close()
            process.wait(rig.SAFETY_NET_S)


def read_until(pipe, end):
    said = b''
    while not said.endswith(end):
        assert rig.wait_readable(pipe), said
        data = os.read(pipe.fileno(), 2**16)
        assert data, said
        said += data
    return said


def test_enter_makes_it_ready_without_looking(runner):
    runner.send('enter')
    home, rsync = runner.until('ready')
    assert home == runner.folder
    assert not [event for event in runner.events if event[0] == 'probe'
                and event[1] in ('MemTotal', 'cores', 'load', 'gpu')]
    runner.start('job', 'exit 3')
    assert runner.ended('job')[0] == 3
    runner.finish()


def test_follow_shows_streams_as_they_grow_and_from_any_byte(runner, env, gate):
    runner.start('job', rf'printf "a\0b"; printf err >&2; {gate.wait}; printf c')
    runner.until('started', 'job.1')
    with open(gate.path, 'w') as fifo:
        with script(s.REMOTE_FOLLOW, env, TOKEN, runner.path('job'), 1, 2) as follower:
            head = f'\n{TOKEN}\n'.encode()
            assert read_until(follower.stdout, b'b') == head + b'\0b'
            assert read_until(follower.stderr, b'r') == head + b'r'
            fifo.write('go\n')
            fifo.flush()
            assert read_until(follower.stdout, b'c') == b'c'
            runner.ended('job')
            follower.stdin.close()
            assert not follower.wait(rig.SAFETY_NET_S) and follower.stdout.read() == b''


def test_after_finish_nothing_is_tidied_twice(channel, env, tmp_path):
    """The runner also does not look for old folders of others if no other folder exists."""
    called = tmp_path / 'called'
    (tmp_path / 'bin').mkdir()
    for name in ('rmdir', 'find'):
        (tmp_path / 'bin' / name).write_text(
            f'#!/bin/sh\necho {name} >>{called}\nexec {rig.program(name)} "$@"\n')
        (tmp_path / 'bin' / name).chmod(0o755)
    runner = channel(env={**env, 'PATH': f'{tmp_path}/bin:{env["PATH"]}'})
    runner.send('enter')
    runner.until('ready')
    runner.finish()
    assert called.read_text().split() == ['rmdir']


def test_what_is_there_already_is_brought_in_large_blocks(env, tmp_path):
    """cat sends the existing output, since tail reads 8 KB at a time; tail sends the rest."""
    much = os.urandom(300_000)
    (tmp_path / 'job.out').write_bytes(much)
    (tmp_path / 'job.err').write_text('')
    head = f'\n{TOKEN}\n'.encode()
    for known in (0, 7):
        with script(s.REMOTE_FOLLOW, env, TOKEN, tmp_path / 'job', known, 0) as follower:
            assert read_until(follower.stdout, much[-9:]) == head + much[known:]

            def froms():
                return {word for pid in rig.knowing(env['HOME'])
                        for word in rig.cmdline(pid).split() if word.startswith('+')}

            wait_until(lambda: len(froms()) == 2, 'both have become what they are')
            assert froms() == {'+1', f'+{known + 1 if known else 300_001}'}
            with open(tmp_path / 'job.out', 'ab') as out:
                out.write(b'more')
            assert read_until(follower.stdout, b'more') == b'more'
        (tmp_path / 'job.out').write_bytes(much)


def test_a_follower_waits_for_the_streams_of_a_job_whose_files_are_copied(env, tmp_path):
    with script(s.REMOTE_FOLLOW, env, TOKEN, tmp_path / 'job', 0, 0) as follower:
        read_until(follower.stdout, f'\n{TOKEN}\n'.encode())
        (tmp_path / 'job.err').write_text('')
        (tmp_path / 'job.out').write_text('x')
        assert read_until(follower.stdout, b'x') == b'x'
    with script(s.REMOTE_FOLLOW, env, TOKEN, tmp_path / 'none', 0, 0) as follower:
        read_until(follower.stdout, f'\n{TOKEN}\n'.encode())
        follower.stdin.close()
        follower.wait(rig.SAFETY_NET_S)


def test_a_follower_ends_with_its_session(runner, env, gate):
    runner.start('job', f'echo one; {gate.wait}')
    runner.until('started', 'job.1')
    with script(s.REMOTE_FOLLOW, env, TOKEN, runner.path('job'), 0, 0) as follower:
        read_until(follower.stdout, b'one\n')
        def tails():
            return [pid for pid in rig.knowing(env['HOME'])
                    if rig.cmdline(pid).startswith('tail ')]

        wait_until(lambda: len(tails()) == 2, 'both have become what they are')
        found = tails()
        follower.stdin.close()
        assert all(map(rig.ends, found))
    gate.open()
    runner.ended('job')


def test_input_comes_from_what_is_fed_and_ends_when_it_is_said(runner, env):
    runner.start('job', 'while read -r line; do echo "<$line>"; done; echo end', mode='stdin')
    runner.until('started', 'job.1')
    for line in (b'one\n', b'two\n'):       # from two sessions: no end between them
        with script(s.REMOTE_FEED, env, runner.path('job')) as feeder:
            feeder.stdin.write(line)
    runner.send('eof', 'job.1')
    assert runner.ended('job')[:2] == (0, '=<one>\n<two>\nend\n')
    runner.send('eof', 'job.1')             # too late, and for an unknown job
    runner.send('eof', 'other.1')
    runner.finish()


def test_input_that_comes_while_its_fifo_is_made_is_not_lost(channel, env, tmp_path):
    """The feeder finds the FIFO at the worst moment, and has sent all before the job reads."""
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin/mkfifo').write_text(f'#!/bin/bash\n{rig.program("mkfifo")} "$@"\n'
                                         '[[ ${!#} != */in* ]] || sleep 0.3\n')
    (tmp_path / 'bin/mkfifo').chmod(0o755)
    runner = channel(env={**env, 'PATH': f'{tmp_path}/bin:{env["PATH"]}'})
    runner.start('job', 'wc -c', mode='stdin')
    runner.until('started', 'job.1')
    with script(s.REMOTE_FEED, env, runner.path('job')) as feeder:
        feeder.stdin.write(b'x' * 60000)
        feeder.stdin.close()
        assert feeder.wait(rig.SAFETY_NET_S) == 0
        runner.send('eof', 'job.1')
    assert runner.ended('job')[:2] == (0, '=60000\n')


def test_what_feeds_a_job_that_ended_ends_too(runner, env, gate):
    runner.start('job', 'head -c 1', mode='stdin')
    runner.until('started', 'job.1')
    with script(s.REMOTE_FEED, env, runner.path('job')) as feeder:
        feeder.stdin.write(b'xyz')
        assert runner.ended('job')[:2] == (0, '=x')
        with contextlib.suppress(BrokenPipeError):
            for _ in range(100):
                feeder.stdin.write(bytes(65536))
        assert feeder.wait(rig.SAFETY_NET_S)
    with script(s.REMOTE_FEED, env, runner.path('never')) as feeder:
        assert feeder.wait(rig.SAFETY_NET_S) == 1


@pytest.mark.parametrize('command, status', [
    ('[ -t 0 ] && [ -t 1 ] && exit 5', 5), ('exit 0', 0), ('kill -INT $$', 130)])
def test_a_job_with_a_terminal_records_its_end(runner, env, command, status):
    runner.start('job', command + '; echo "$SSH_SCHEDULER_JOB" >ran', mode='tty')
    runner.until('started', 'job.1')
    ours, theirs = os.openpty()
    try:
        done = subprocess.run(['bash', runner.path('job', 'more', 'tty')], stdin=theirs,
                              stdout=theirs, stderr=theirs, env=env, timeout=rig.SAFETY_NET_S,
                              start_new_session=True)
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode in (0, status)
    assert runner.ended('job')[0] == status


def test_a_terminal_that_is_cut_off_ends_its_job(runner, env, tmp_path):
    """Other tests cover earlier moments."""
    runner.start('job', f'trap "" HUP; echo >{tmp_path}/begun; sleep 1000', mode='tty')
    runner.until('started', 'job.1')
    with subprocess.Popen(['bash', runner.path('job', 'more', 'tty')], env=env,
                          stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                          start_new_session=True) as session:
        wait_until((tmp_path / 'begun').exists, 'the job')
        os.killpg(session.pid, 9)
    assert runner.ended('job')[0] == 129


def test_adopt_tells_what_became_of_a_job(channel, gate):
    first = channel()
    first.start('job', f'{gate.wait}; echo out; exit 4')
    first.until('started', 'job.1')
    with open(gate.path, 'w') as fifo:
        first.close()
        second = channel()
        second.send('adopt', 'job.1')
        second.until('started', 'job.1')
        fifo.write('go\n')
    assert second.ended('job', adopted=True)[:2] == (4, '=out\n')
    third = channel()
    third.send('adopt', 'job.1')
    assert third.ended('job')[:2] == (4, '=out\n')
    assert third.events == []
    third.send('adopt', 'job.2')            # another attempt
    third.until('absent', 'job.2')


@pytest.fixture
def nameless(env, computer):
    """The environment of a computer that has no boot id, such as where /proc/sys is masked."""
    (Path(computer.env['SSH_SCHEDULER_PROC']) / 'sys/kernel/random/boot_id').unlink()
    return computer.env


def test_without_a_boot_id_jobs_are_known_too(channel, nameless, gate):
    first = channel(env=nameless, owner='batch')
    first.start('job', f'{gate.wait}; echo out', need=NEED)
    first.start('long', 'sleep 1000')
    first.until('started', 'job.1')
    with open(gate.path, 'w') as fifo:
        second = channel(env=nameless, owner='batch')
        second.send('adopt', 'job.1', 'long.1')
        second.until('started', 'job.1')
        second.until('started', 'long.1')
        assert first.process.wait(rig.SAFETY_NET_S) == -9       # killed: its owner has a new runner
        assert [c.key for c in s.read_needs(measured(second))] == ['job.1', 'long.1']
        second.send('cancel', 5, 'long.1')
        second.until('cancelled', '')
        assert second.ended('long', adopted=True)[0] == 143
        fifo.write('go\n')
    assert second.ended('job', adopted=True)[:2] == (0, '=out\n')


@pytest.mark.parametrize('began_s, event', [
    (10**9, ['lost', 'job.1', 'the machine was restarted']),
    (0, ['ended'])], ids=['restarted', 'killed'])
def test_without_a_boot_id_a_restart_is_told_by_what_began_later_than_now(
        channel, nameless, began_s, event):
    runner = channel(env=nameless)
    runner.start('job', 'sleep 1000')
    runner.until('started', 'job.1')
    pid, start, boot = runner.record('job')[1:]
    group, folder = group_of(runner, 'job'), os.path.basename(runner.path('job', 'work'))
    os.kill(int(pid), 9)
    os.killpg(int(group), 9)
    runner.write_record('job', f'starting {pid} {int(start) + 100 * began_s} {boot} {folder}')
    runner.close()
    runner = channel(env=nameless)
    runner.send('adopt', 'job.1')
    if event[0] == 'ended':             # its processes may still be exiting
        assert runner.ended('job', adopted=True)[0] == 137
    else:
        runner.until(*event)


def test_what_is_adopted_and_runs_needs_no_process_of_ours(channel, env, gate, tmp_path):
    """The runner checks each adopted job once; after that, one look serves all of them."""
    names = [f'job{number}' for number in range(5)]
    first, begun = channel(), tmp_path / 'begun'
    with open(os.open(gate.path, os.O_RDWR), 'wb', buffering=0) as fifo:
        for name in names:
            first.start(name, f'echo >>{begun}; read -rn 1 <"{gate.path}"')
            first.until('started', f'{name}.1')
        first.close()
        wait_until(lambda: begun.exists() and begun.read_text() == '\n' * 5, 'their processes')
        jobs = set(rig.knowing(env['HOME']))
        second = channel()
        second.ready()
        before = set(rig.knowing(env['HOME'])) - jobs
        second.send('adopt', *(f'{name}.1' for name in names))
        for name in names:
            second.until('started', f'{name}.1')
        wait_until(lambda: set(rig.knowing(env['HOME'])) - jobs <= before, 'the end of the others')
        second.watch(*names)
        fifo.write(b'.' * len(names))
        for name in names:
            assert second.ended(name, adopted=True)[0] == 0
    assert {event[0] for event in second.close()} <= {'probe', 'used', 'started', 'ended', 'parted'}


def test_a_look_at_what_began_here_leaves_its_end_to_be_told_once(runner, tmp_path):
    """After the record and before the event, the runner looks for processes that the job left."""
    runner.start('job', f'setsid sleep 1000 >/dev/null 2>&1 & echo $! >{tmp_path}/pid')
    runner.until('started', 'job.1')
    wait_until(lambda: runner.record('job')[:1] == ['ended'], 'the record')
    runner.watch('job')
    assert runner.until('left', 'job.1') and runner.ended('job')[0] == 0
    runner.watch('job')
    os.kill(int((tmp_path / 'pid').read_text()), 9)
    assert not [event for event in runner.close() if event[0] in ('ended', 'lost')]


@pytest.mark.parametrize('how', ['its record is damaged', 'its file is gone',
                                 'it was killed with its group'])
def test_a_look_tells_what_became_of_an_adopted_job_without_an_end(channel, gate, how):
    first = channel()
    first.start('job', f'{gate.wait}')
    first.until('started', 'job.1')
    with open(gate.path, 'w'):
        first.close()
        second = channel()
        second.send('adopt', 'job.1')
        second.until('started', 'job.1')
        _, worker, *_ = second.record('job')
        if how == 'it was killed with its group':
            group = group_of(second, 'job')
            os.kill(int(worker), 9)
            os.killpg(int(group), 9)
            assert second.ended('job', adopted=True)[0] == 137
        else:
            second.write_record('job', 'nonsense')
            if how == 'its file is gone':
                os.remove(second.path('job'))
            second.watch('job')
            (why,) = second.until('lost', 'job.1')
            assert why == 'the job ended without an exit code'
    assert rig.ends(int(worker))


def test_what_never_began_is_told_again(channel):
    """The first answer may have been lost with the connection."""
    for _ in range(2):
        runner = channel()
        runner.send('adopt', 'job.1')
        runner.until('absent', 'job.1')
        runner.close()


def test_what_was_to_be_adopted_and_was_not_there_never_starts(channel, tmp_path):
    first = channel()
    first.send('adopt', 'job.1', 'other.1')
    assert sorted(first.until('absent')[0] for _ in range(2)) == ['job.1', 'other.1']
    first.start('job', f'touch {tmp_path}/ran')
    first.start('after', 'true')
    assert first.ended('after')[0] == 0
    first.until('absent', 'job.1')          # each request gets this answer
    assert not (tmp_path / 'ran').exists() and first.events == [['started', 'after.1']]
    first.send('revoke', 2, 'job.1', 'other.1')
    first.send('clean', 'after.1')
    first.finish()
    assert not os.path.exists(first.folder)


def test_a_runner_ends_the_one_before_of_the_same_owner(channel, gate):
    first, other = channel(owner='batch'), channel(owner='another')
    first.start('job', f'{gate.wait}; echo out')
    first.until('started', 'job.1')
    second = channel(owner='batch')
    second.send('adopt', 'job.1')
    second.until('started', 'job.1')
    assert first.process.wait(rig.SAFETY_NET_S) == -9
    gate.open()
    assert second.ended('job', adopted=True)[:2] == (0, '=out\n')
    second.send('clean', 'job.1')
    second.finish()
    other.finish()


def test_a_runner_spares_those_of_other_machines_of_its_client(channel):
    first, second = channel(owner='batch', client='1.0.1'), channel(owner='batch', client='1.1.1')
    for runner in (first, second):
        runner.ready()
    assert first.account == second.account and f' {os.getuid()} ' in first.account
    again = channel(owner='batch', client='1.0.2')          # the contact was lost
    again.ready()
    assert first.process.wait(rig.SAFETY_NET_S) == -9
    second.send('ping', 1)
    second.until('pong')
    later = channel(owner='batch', client='2.0.1')          # the next run of the batch
    later.ready()
    assert [runner.process.wait(rig.SAFETY_NET_S) for runner in (second, again)] == [-9, -9]
    later.finish()


def test_another_folder_is_another_account(channel):
    first, second = channel(), channel(workdir='~/elsewhere')
    for runner in (first, second):
        runner.ready()
        runner.finish()
    assert first.account != second.account


# What was started in the background has become `sleep`.
IS_SLEEP = 'until [[ $(</proc/$!/comm) == sleep ]]; do :; done'


def test_what_outlives_its_job_is_told_with_its_name(runner):
    runner.start('job', f'setsid sleep 1000 >/dev/null 2>&1 & {IS_SLEEP}; echo $!')
    (text,) = runner.until('left', 'job.1')
    status, out, _, _ = runner.ended('job')
    pid = int(out[1:])
    try:
        assert (status, text) == (0, f'sleep ({pid})')
    finally:
        rig.kill(pid, lambda pid: rig.cmdline(pid) == 'sleep 1000')
    runner.start('none', '(true) & wait')
    runner.ended('none')
    assert not [event for event in runner.events if event[0] == 'left']


def test_many_that_outlive_their_job_are_counted(runner, env):
    runner.start('job', f'for n in {{1..8}}; do setsid sleep 1000 & {IS_SLEEP}; done')
    (text,) = runner.until('left', 'job.1')
    runner.ended('job')
    assert text.count('sleep (') == 5 and text.endswith(' and 3 more')
    runner.send('cancel', 5, 'job.1')    # they belong to the job, though it has ended
    runner.until('cancelled')
    assert not [pid for pid in rig.knowing(env['HOME']) if rig.cmdline(pid) == 'sleep 1000']


def test_cancel_of_many_ends_all_they_started(runner, tmp_path):
    ledger = tmp_path / 'ledger'
    ledger.touch()
    commands = [f'echo $BASHPID >>{ledger}; sleep 1000',
                f'setsid bash -c "echo \\$\\$ >>{ledger}; sleep 1000; :" & wait',
                f'env -i setsid /bin/bash -c "echo \\$\\$ >>{ledger}; sleep 1000; :" & wait',
                f'(setsid bash -c "(echo \\$BASHPID >>{ledger}; exec sleep 1000) &" &); sleep 1000']
    for number, command in enumerate(commands):
        runner.start(f'job{number}', command)
    runner.start('other', 'read -r _ <../hold; exit 6')
    limit = time.monotonic() + rig.SAFETY_NET_S
    while len(ledger.read_text().split()) < 4:
        assert time.monotonic() < limit
        time.sleep(0.01)
    runner.send('cancel', 5, *(f'job{number}.1' for number in range(4)))
    runner.until('cancelled', '')
    assert all(rig.ends(int(pid)) for pid in ledger.read_text().split())
    for number in range(4):
        runner.ended(f'job{number}')            # its worker records and reports that by itself
        assert runner.record(f'job{number}')[0] == 'ended'


def test_what_is_tied_ends_with_the_channel(channel, gate, tmp_path):
    runner = channel()
    runner.send('tie')
    runner.start('job', f'echo $$ >{tmp_path}/pid; setsid sleep 1000 & echo $! >{tmp_path}/other; '
                 f'{gate.wait}')
    runner.until('started', 'job.1')
    with open(gate.path, 'w'):              # the job waits
        runner.close()
    for name in ('pid', 'other'):
        assert rig.ends(int((tmp_path / name).read_text()))
    assert not os.path.exists(runner.folder)


# ---- Cleaning up ----

def test_lists_may_be_longer_than_what_a_program_takes(channel):
    """The limit is 2 MB of arguments, which is about 25,000 names of jobs."""
    many = [f'{"x" * 200}.{n}' for n in range(8_000)]
    runner = channel()
    runner.ready()
    runner.start('done', 'true')
    runner.start('long', 'exec sleep 1000')
    assert runner.ended('done')[0] == 0
    runner.send('clean', *many, 'done.1')
    runner.send('cancel', 5, *many, 'long.1')
    assert runner.ended('long')[0] == 143
    runner.until('cancelled', '')
    runner.send('clean', 'long.1')
    runner.send('finish', '', *many)
    runner.until('finished')
    home = Path(runner.folder)
    runner.close()
    assert not home.exists(), list(home.iterdir())


def test_clean_removes_job_folders_even_read_only_ones(runner):
    for name in ('one', 'two', 'kept'):
        runner.start(name, 'mkdir -p a/b; touch a/b/c; chmod 500 a/b a', back='changed')
        runner.ended(name)
    folder = runner.path('kept', 'work')
    runner.send('clean', 'one.1', 'two.1')
    runner.send('finish', '')
    runner.until('finished')
    jobs = Path(runner.folder, 'jobs')
    assert {path.name for path in jobs.iterdir()} == {
        'kept.1', 'kept.1.out', 'kept.1.err', 'kept.1.back', os.path.basename(folder)}


def test_finish_leaves_nothing(runner):
    runner.stage('one', {'copy/file': 'x'})
    runner.start('job', 'true', stage='one')
    runner.ended('job')
    runner.send('clean', 'job.1')
    runner.send('finish', '', 'one')
    runner.until('finished')
    runner.close()
    assert not os.path.exists(runner.folder)


def test_finish_can_keep_a_stage_as_the_cache(channel):
    for number in ('one', 'two'):
        runner = channel()
        runner.stage(number, {f'copy/{number}': 'x', 'link/data': 'y'}, links=['data'])
        runner.send('finish', number, number)
        runner.until('finished')
        runner.close()
        assert os.listdir(runner.folder) == ['cache']
        assert f'{number}' in os.listdir(os.path.join(runner.folder, 'cache', 'copy'))


def test_finish_leaves_the_files_of_another_run(channel, gate):
    first, second = channel(), channel()
    first.stage('one', {'copy/file': 'text\n'})
    first.start('job', f'{gate.wait}; cat file', stage='one')
    first.until('started', 'job.1')
    second.stage('two', {'copy/file': 'other\n'})
    second.send('finish', '', 'two')
    second.until('finished')
    second.close()
    gate.open()
    assert first.ended('job')[:2] == (0, '=text\n')


def test_of_two_runs_that_end_at_once_the_last_one_tidies(channel, env, gate, tmp_path):
    """The first has checked which runs are there, and then the second one ends."""
    (tmp_path / 'bin').mkdir()
    script = tmp_path / 'bin/rm'
    script.write_text(f'#!/bin/bash\n{gate.wait}; exec {rig.program("rm")} "$@"\n')
    script.chmod(0o755)
    first, second = channel(env={**env, 'PATH': f'{tmp_path}/bin:{env["PATH"]}'}), channel()
    for runner in (first, second):
        runner.stage('same', {'copy/file': 'text\n'})
    (Path(first.folder) / 'jobs').mkdir(exist_ok=True)
    first.send('finish', '')
    with open(gate.path, 'w') as fifo:          # opens when the first is about to remove
        second.send('finish', '')
        second.until('finished')
        second.close()
        fifo.write('go\n')
    first.until('finished')
    first.close()
    assert not os.path.exists(first.folder), os.listdir(first.folder)


def test_a_run_that_starts_while_another_one_tidies_loses_nothing(channel, env, gate, tmp_path):
    """The first has seen that it is alone; then the second one comes, and starts a job."""
    (tmp_path / 'bin').mkdir()
    script = tmp_path / 'bin/rm'
    script.write_text(f'#!/bin/bash\n{gate.wait}; exec {rig.program("rm")} "$@"\n')
    script.chmod(0o755)
    first = channel(env={**env, 'PATH': f'{tmp_path}/bin:{env["PATH"]}'})
    first.stage('one', {'copy/file': 'old\n'})
    first.send('finish', '')
    job = Gate(tmp_path / 'job.gate')
    with open(gate.path, 'w') as fifo:
        second = channel()
        second.stage('two', {'copy/file': 'text\n'})
        second.start('job', f'{job.wait}; cat file', stage='two')
        second.until('started', 'job.1')
        fifo.write('go\n')
    first.until('finished')
    first.close()
    assert not (Path(second.folder) / 'stage/one').exists()
    assert (Path(second.folder) / 'jobs/job.1').exists()
    job.open()
    assert second.ended('job')[:2] == (0, '=text\n')


def test_a_run_that_is_being_removed_keeps_nothing(channel, gate):
    """The runner waits a second for that; here its `sleep` ends when the other folder is gone."""
    runner = channel(functions=f'sleep() {{ {gate.wait}; }}\n')
    runner.stage('one', {'copy/file': 'x'})
    other = Path(runner.folder) / 'run.login2.1.1'
    other.mkdir()
    runner.send('finish', '')
    with open(gate.path, 'w') as fifo:          # it looks for others
        other.rmdir()
        fifo.write('go\n')
    runner.until('finished')
    runner.close()
    assert not os.path.exists(runner.folder), os.listdir(runner.folder)


@pytest.mark.parametrize(('told', 'is_left'), [
    ('leaves', False), ('123 456 a-boot-id', True), ('', True)])
def test_a_run_of_another_login_node_keeps_what_is_shared_until_it_leaves(runner, told, is_left):
    runner.stage('one', {'copy/file': 'x'})
    other = Path(runner.folder) / 'run.login2.1.1'
    other.mkdir()
    (other / 'self').write_text(f'{told}\n')
    runner.send('finish', '')
    runner.until('finished')
    runner.close()
    left = {*os.listdir(runner.folder)} - {'jobs'}
    assert left == ({other.name, 'stage'} if is_left else {other.name})


def test_a_file_that_is_written_late_leaves_no_folder(runner):
    runner.ready()
    (folder,) = Path(runner.folder).glob('run.*')
    runner.send('finish', '')
    runner.until('finished')
    folder.mkdir(parents=True)
    (folder / 'late').write_text('')
    runner.close()
    assert not folder.exists()


# ---- When the channel ends, and another one comes ----

def ending(runner):
    runner.process.stdin.close()


def killed(runner):
    runner.process.kill()


@pytest.mark.parametrize('cut', [ending, killed])
def test_a_job_runs_on_without_the_channel(runner, gate, cut, env):
    runner.ready()
    runner.start('job', f'echo before; {gate.wait}; echo after; exit 3')
    runner.until('started', 'job.1')
    with open(gate.path, 'w') as fifo:
        worker = int(runner.record('job')[1])
        job = group_members(group_of(runner, 'job'))
        cut(runner)
        runner.process.wait(rig.SAFETY_NET_S)
        assert cut is killed or {event[0] for event in runner.rest()} <= {'probe', 'parted'}
        others = set(rig.knowing(env['HOME'])) - {worker, *job}
        assert all(rig.ends(pid) for pid in others)
        fifo.write('go\n')
    assert rig.ends(worker)
    assert runner.record('job') == ['ended', '3']
    with open(runner.path('job', 'out')) as out:
        assert out.read() == 'before\nafter\n'


def test_the_speaker_of_a_killed_runner_ends_with_the_channel(runner, env):
    runner.ready()
    runner.process.kill()
    runner.process.wait(rig.SAFETY_NET_S)
    runner.process.stdin.close()
    runner.process.stdout.close()
    assert all(rig.ends(pid) for pid in rig.knowing(env['HOME']))


def test_another_channel_adopts_a_running_job(channel, gate, tmp_path):
    ledger = tmp_path / 'ledger'
    command = f'echo ran >>{ledger}; {gate.wait}; exit 4'
    first = channel()
    first.start('job', command)
    first.until('started', 'job.1')
    with open(gate.path, 'w') as fifo:
        first.close()
        second = channel()
        second.start('job', command)
        second.until('started', 'job.1')
        fifo.write('go\n')
    assert second.ended('job', adopted=True)[0] == 4
    assert ledger.read_text() == 'ran\n'


def test_a_job_runs_though_the_channel_ends_before_its_worker_looks(channel, monkeypatch, tmp_path):
    slow = s.REMOTE_RUNNER.replace('\nwork() {', '\nwork() { sleep 1;')
    assert slow != s.REMOTE_RUNNER
    monkeypatch.setattr(s, 'REMOTE_RUNNER', slow)
    first = channel()
    first.start('job', f'echo ran >{tmp_path}/ledger; exit 4')
    first.until('started', 'job.1')
    first.close()
    assert channel().ended('job', adopted=True)[0] == 4
    assert (tmp_path / 'ledger').read_text() == 'ran\n'


def test_another_channel_is_told_of_a_job_that_ended_meanwhile(channel, gate, tmp_path):
    ledger = tmp_path / 'ledger'
    command = f'echo ran >>{ledger}; {gate.wait}; echo made >result; echo out'
    first = channel()
    first.start('job', command, back='changed')
    first.until('started', 'job.1')
    with open(gate.path, 'w') as fifo:
        worker = int(first.record('job')[1])
        first.close()
        fifo.write('go\n')
    assert rig.ends(worker)
    second = channel()
    second.start('job', command, back='changed')
    assert second.ended('job') == (0, '=out\n', '=', ['+./result'])
    assert second.events == []
    assert ledger.read_text() == 'ran\n'


@pytest.mark.parametrize('record, event', [
    ('starting', 'lost'), ('starting 1 1 x work.1', 'lost'), ('', 'lost'),
    ('starting {pid} {start} other-boot work.1', 'lost'),
    ('starting {pid} 1 {boot} work.1', 'ended')])
def test_a_job_without_a_process_and_without_an_end_is_lost_or_was_killed(runner, record, event):
    runner.ready()
    if event == 'ended':            # a stream shows that the job had begun
        Path(runner.path('job', 'out')).touch()
    with open('/proc/sys/kernel/random/boot_id') as file:
        boot = file.read().strip()
    start = rig.read_proc(os.getpid(), 'stat').rpartition(b')')[2].split()[19].decode()
    runner.write_record('job', record.format(pid=os.getpid(), start=start, boot=boot))
    runner.start('job', 'true')
    told = runner.until(event, 'job.1')
    assert 'ended without an exit code' in told[0] if event == 'lost' else told[0] == '137'


def test_runners_that_race_start_each_job_once(channel, tmp_path):
    ledger = tmp_path / 'ledger'
    runners = [channel() for _ in range(3)]
    names = [f'job{number}' for number in range(30)]
    for name in names:
        for runner in runners:
            runner.start(name, f'echo {name} >>{ledger}')
    for runner in runners:
        for name in names:
            assert runner.ended(name, adopted=True)[0] == 0
    counts = collections.Counter(ledger.read_text().split())
    assert counts == dict.fromkeys(names, 1)


def test_a_start_request_that_comes_twice_starts_once(runner, tmp_path):
    for _ in range(2):
        runner.start('job', f'echo ran >>{tmp_path}/ledger')
    assert runner.ended('job')[0] == 0
    assert (tmp_path / 'ledger').read_text() == 'ran\n'


# ---- A full disk ----

@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB."""
    folder = tmp_path / 'small'
    folder.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=256k', 'none', folder], check=True)
    yield folder
    subprocess.run(['umount', '--lazy', folder], check=True)


@as_root
@pytest.mark.parametrize('status', [0, 5])
def test_the_exit_status_survives_a_full_disk(channel, small_disk, status):
    runner = channel(workdir=str(small_disk))
    command = f'cat /dev/zero >full; exit {status}'
    runner.start('job', command)
    assert runner.ended('job')[0] == status
    next(small_disk.glob('*/jobs/work*/full')).unlink()
    runner.close()
    again = channel(workdir=str(small_disk))
    again.start('job', command)
    assert again.ended('job')[0] == status
    again.finish()


def test_a_start_meets_a_job_with_another_command(channel):
    """The user may restore an older journal.  Neither job may be taken for the other."""
    runner = channel()
    runner.start('job', 'exit 3')
    assert runner.ended('job')[0] == 3
    runner.start('job', 'echo never')
    assert 'with another command' in runner.until('refused', 'job.1')[0]
    runner.start('job', 'exit 3')
    assert runner.ended('job')[0] == 3
    runner.finish()


@as_root
def test_a_job_that_cannot_be_stored_is_refused(channel, small_disk):
    runner = channel(workdir=str(small_disk))
    runner.ready()
    with contextlib.suppress(OSError), open(small_disk / 'full', 'wb', buffering=0) as file:
        while True:
            file.write(bytes(4096))
    runner.start('job', 'echo never')
    assert 'No space left on device' in runner.until('refused', 'job.1')[0]
    os.unlink(small_disk / 'full')
    runner.finish()


# ---- The copies through tar ----

def run_script(script, data, env):
    done = subprocess.run([*s.BOOTSTRAP_BASH, s.BOOTSTRAP], env=env, capture_output=True,
                          input=bytes(s.nul_ended(script)) + data, timeout=rig.SAFETY_NET_S)
    return done.stdout


def test_unpack_confirms_what_it_did(env, tmp_path):
    data = tar_of({'a b': 'text', 'folder/x': 'y'})
    head = bytes(s.nul_ended(TOKEN, tmp_path / 'new/folder'))
    assert run_script(s.REMOTE_UNPACK, head + data, env) == f'\n{TOKEN} 0\n'.encode()
    assert (tmp_path / 'new/folder/a b').read_text() == 'text'
    assert run_script(s.REMOTE_UNPACK, head + b'no tar' * 200, env) == f'\n{TOKEN} 2\n'.encode()


def test_pack_gives_exactly_the_named_paths(env, tmp_path):
    for name in ('-x', 'new\nline', 'folder/in'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    head = bytes(s.nul_ended(TOKEN, tmp_path))
    paths = b'./-x\0./new\nline\0./folder\0'
    _, mark, data = run_script(s.REMOTE_PACK, head + paths, env).partition(f'\n{TOKEN}\n'.encode())
    assert mark
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [member.name for member in tar] == ['./-x', './new\nline', './folder']


# ---- The environment does not affect the runner ----

# Each name in the runner and each variable of bash.  Left out are those that describe the session
# or the job, which no job may get from another, and those that a login shell itself needs.
NAMES = sorted(
    {*re.findall(r'[A-Za-z_]\w*', s.REMOTE_RUNNER),
     *subprocess.run(['bash', '-c', 'compgen -v'], capture_output=True, text=True).stdout.split()}
    - {'_', 'BASH', 'PATH', 'HOME', 'SHELL', 'PWD', 'OLDPWD', 'SHLVL', 'BASH_ENV', 'SHELLOPTS',
       'BASHOPTS', 'CUDA_VISIBLE_DEVICES', 'SSH_CLIENT', 'SSH_CONNECTION'}
    - {'EPOCHREALTIME', 'EPOCHSECONDS', 'SRANDOM', 'RANDOM', 'BASH_EXECUTION_STRING', 'REPLY',
       'COLUMNS', 'LINES'}
    - {name for name in re.findall(r'\w+', s.REMOTE_RUNNER) if name.startswith('SSH_SCHEDULER_')})
ODD_NAMES = ['with-dash', 'with.dot', '1digit', '-i', 'with blank', '%', 'ä']
SHOW = 'exec /usr/bin/env -0'


def shown(data):
    """Return the variables that SHOW has printed, without those of this job."""
    ours = ('SSH_SCHEDULER_', 'PWD=', 'OLDPWD=', 'SHLVL=', '_=', 'PYTHONUNBUFFERED=', 'BASH_ENV=')
    return sorted(entry for entry in data.split('\0') if entry and not entry.startswith(ours))


@pytest.mark.parametrize('way', ['the process', 'the login', 'setup', 'env'])
def test_no_name_in_the_environment_is_special(channel, env, tmp_path, way):
    """A job has the environment of a bash that is started by a shell with these variables."""
    if way == 'the process':        # sshd's, or on localhost the calling shell's
        extra = dict.fromkeys([*NAMES, *ODD_NAMES], '1')
    else:                           # a shell cannot set the others
        extra = dict.fromkeys(set(NAMES) - {'UID', 'EUID', 'PPID', 'BASH_VERSINFO'}, '1')
    exports = ''.join(f'export {name}=1\n' for name in extra)
    settings = {}
    script = tmp_path / 'script'
    script.write_text(f'{SHOW}\n')
    if way == 'the process':
        env = {**env, **extra}
    elif way == 'the login':
        Path(env['HOME'], '.bash_profile').write_text(exports)
    elif way == 'setup':
        settings['setup'] = exports
    else:
        settings['variables'] = [f'{name}=1' for name in extra]
    runner = channel(env=env, **settings)
    runner.ready()
    runner.start('job', f'{SHOW} >seen', gpus='1')
    status, out, err, _ = runner.ended('job')
    assert (status, out) == (0, '='), err
    seen = shown(Path(runner.path('job', 'work', 'seen')).read_text())
    more = exports if way == 'setup' else ''
    words = [f'{name}=1' for name in extra] if way == 'env' else []
    wanted = subprocess.run(['bash', '-ilc', f'{more} exec /usr/bin/env "$@" bash {script}', '',
                             *words], env=env, stdin=subprocess.DEVNULL, capture_output=True)
    wanted = set(shown(wanted.stdout.decode()))
    gpu = {'CUDA_VISIBLE_DEVICES=1', 'CUDA_DEVICE_ORDER=PCI_BUS_ID'}
    wanted = {entry for entry in wanted if not entry.startswith('CUDA_')} | gpu
    assert set(seen) ^ wanted == set()
    assert os.path.exists(runner.folder) and not os.path.exists('1')


def test_an_array_of_the_runner_is_no_name_either(channel, env):
    """An array such as `sent` could not be exported as a scalar."""
    runner = channel(env={**env, **dict.fromkeys(['sent', 'linked', 'modes', 'names', 'fields',
                                                  'environment', 'dropped', 'by_env'], 'mine')})
    runner.ready()
    runner.start('job', 'echo $sent $linked $modes $names $fields $environment $dropped $by_env')
    assert runner.ended('job')[1] == '=' + ' '.join(['mine'] * 8) + '\n'


BENDING = {
    'functions': {f'BASH_FUNC_{name}%%': '() { echo bent; return 1; }' for name in (
        'read', 'printf', 'eval', 'unset', 'local', 'kill', 'wait', 'trap', 'cd', 'umask', 'set',
        'main', 'say', 'tell', 'escape', 'find', 'tar', 'head', 'mkdir', 'rm', 'cat', 'mv')},
    'BASH_ENV': {'BASH_ENV': '{home}/bash_env'},
    'options': {'SHELLOPTS': 'braceexpand:errexit:nounset:noglob:noclobber:pipefail'},
    'posix': {'POSIXLY_CORRECT': '1', '_POSIX2_VERSION': '199209'},
    'globs': {'GLOBIGNORE': '*', 'CDPATH': '/tmp:/', 'EXECIGNORE': '/*/rm'},
    'nesting': {'FUNCNEST': '1'},
    'numbers': {'UID': '12345', 'EUID': '12345', 'RANDOM': '1', 'SECONDS': '-100000'},
    'tar': {'TAR_OPTIONS': '--exclude=*', 'TAPE': '/dev/null'},
    'grep': {'GREP_OPTIONS': '-v'},
    'locale': {'LC_ALL': 'no_SUCH.locale', 'LANG': 'no_SUCH.locale', 'LC_NUMERIC': 'de_DE'},
    'formats': {'QUOTING_STYLE': 'c', 'TIME_STYLE': '+x', 'BLOCK_SIZE': '1G'},
}


@pytest.mark.parametrize('what', BENDING)
def test_what_bash_and_programs_heed_does_not_bend_the_runner(channel, env, shared, what):
    home = env['HOME']
    Path(home, 'bash_env').write_text(
        'readonly dir=/ home=/ run=/ TMOUT=1 2>/dev/null; say() { echo bent; }; set -f\n')
    bent = {name: value.format(home=home) if what == 'BASH_ENV' else value
            for name, value in BENDING[what].items()}
    runner = channel(env={**env, **bent})
    runner.ready()
    runner.stage('one', {'copy/b c/file': 'text\n', 'copy/x': ''})
    runner.start('job', "/bin/cat 'b c/file'; echo >new; exit 3", stage='one', back='changed',
                 need=NEED)
    status, out, _, back = runner.ended('job')
    assert (status, out, sorted(back)) == (3, '=text\n', ['+./new'])
    runner.start('long', 'sleep 1000', need=NEED)
    runner.until('started', 'long.1')
    assert [path.parent.name for path in claims_in(shared)] == [f'ssh_scheduler.{os.getuid()}']
    runner.send('cancel', 5, 'long.1')
    runner.until('cancelled', '')
    runner.send('clean', 'job.1', 'long.1')
    runner.send('finish', '', 'one')
    runner.until('finished')
    runner.close()
    assert not os.path.exists(runner.folder) or os.listdir(runner.folder) == []


def test_a_runner_that_is_not_spoken_to_does_not_mind_tmout(channel, env):
    """bash's read gives up after TMOUT seconds."""
    runner = channel(env={**env, 'TMOUT': '1'})
    runner.ready()
    runner.start('job', 'sleep 1.5; echo "$TMOUT"')
    assert runner.ended('job')[1] == '=1\n'
    runner.start('again', 'true')
    assert runner.ended('again')[0] == 0


def test_tar_is_told_nothing_by_the_environment(env, tmp_path):
    """The scripts that unpack and pack files beside the channel run tar."""
    env = {**env, 'TAR_OPTIONS': '--exclude=*', 'TMOUT': '1'}
    data = tar_of({'folder/file': 'text\n'})
    run_script(s.REMOTE_UNPACK, bytes(s.nul_ended(TOKEN, tmp_path)) + data, env)
    assert (tmp_path / 'folder/file').read_text() == 'text\n'
    got = run_script(s.REMOTE_PACK, bytes(s.nul_ended(TOKEN, tmp_path)) + b'./folder/file\0', env)
    assert b'text\n' in got


def test_options_of_bash_that_a_login_exports_hold_in_jobs(channel, env):
    Path(env['HOME'], '.bash_profile').write_text('set -o pipefail; export SHELLOPTS\n')
    runner = channel()
    runner.ready()
    runner.start('job', 'false | true; echo $? $-')
    status, out, _, _ = runner.ended('job')
    assert (status, out.split()[0]) == (0, '=1')
    assert not set(out.split()[1]) & set('miH')         # but the job is no interactive shell


def test_what_a_login_takes_out_of_the_environment_is_not_in_that_of_a_job(channel, env):
    Path(env['HOME'], '.bash_profile').write_text('unset GONE dir\n')
    runner = channel(env={**env, 'GONE': '1', 'dir': '/data'})
    runner.ready()
    runner.start('job', 'echo "${GONE-unset} ${dir-unset}"')
    assert runner.ended('job')[1] == '=unset unset\n'


def test_an_exported_function_reaches_the_programs_of_a_job(channel, env):
    Path(env['HOME'], '.bash_profile').write_text(
        'module() { echo "module $1"; }; here() { echo here; }; export -f module\n')
    runner = channel()
    runner.ready()
    runner.start('job', 'here; bash -c "module load; here" 2>/dev/null; true')
    assert runner.ended('job')[1] == '=here\nmodule load\n'


# ---- Older bashes ----

OLD_BASHES = [path for path in map(shutil.which, (
    'bash-4.2', 'bash-4.4', 'bash4.2', 'bash4.4', 'bash-5.0', 'bash-5.1')) if path]


@pytest.mark.skipif(not OLD_BASHES, reason='there is no older bash here, such as bash-4.2 in PATH')
@pytest.mark.parametrize('bash', OLD_BASHES)
def test_older_bashes_run_jobs(channel, bash):
    runner = channel(bash=bash)
    runner.ready()
    runner.stage('one', {'copy/file': 'text\n'})
    runner.start('job', 'cat file; echo >new; exit 3', stage='one', back='changed')
    assert runner.ended('job') == (3, '=text\n', '=', ['+./new'])
    runner.send('clean', 'job.1')
    runner.send('finish', '', 'one')
    runner.until('finished')
    assert os.listdir(runner.folder) == []


def test_what_was_sent_is_forgotten_after_two_weeks(channel, env):
    root = Path(env['HOME'], '.ssh_scheduler')
    for name, days, inner in [
            ('old-0123456789ab', 15, 'cache/copy'), ('new-0123456789ab', 13, 'cache/copy'),
            ('with-0123456789ab', 99, 'jobs/job.1'), ('theirs-0123456789ab', 99, 'results'),
            ('theirs-202611221234', 99, 'cache/data'), ('named-so', 99, 'cache/copy')]:
        (root / name / 'cache').mkdir(parents=True)
        (root / name / inner).mkdir(parents=True, exist_ok=True)
        then = time.time() - days * 86400
        os.utime(root / name, (then, then))
    runner = channel()
    runner.ready()
    runner.finish()
    runner.process.wait(rig.SAFETY_NET_S)
    assert sorted(path.name for path in root.iterdir()) == [
        'named-so', 'new-0123456789ab', 'theirs-0123456789ab', 'theirs-202611221234',
        'with-0123456789ab']
