"""--sync-back fetches the files of running jobs repeatedly; real sshds, rsyncs and jobs."""
import contextlib
import json
import os
import re
import signal
import stat
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import rig
from batching import NO_GPU, RESULTS, argv_of, assert_clean, tree_of, wait_until, wrote
from terminals import Terminal
from test_faults_data import ATTACKS, PROGRAM, canary, sends, spy, trusting  # noqa: F401

import ssh_scheduler as s

SYNC = ('--sync-back', 'runs', '--every=1', '--copy-forwards', *NO_GPU)


as_root = pytest.mark.skipif(os.getuid() != 0, reason='only root has machines of another uid')


@pytest.fixture(params=['ssh', 'localhost'])
def machine(request):
    return request.getfixturevalue('lab1') if request.param == 'ssh' else 'localhost'


def partial(job, *below):
    return RESULTS.joinpath(f'{job}.partial', *below)


def text_of(path):
    """Return the text of a file, '' if it does not exist."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return path.read_text()
    return ''


def shows(path, text):
    wait_until(lambda: text_of(path) == text, f'{path}: {text!r}, but {text_of(path)!r}')


def warning(batch):
    """Return the next line on stderr."""
    assert rig.wait_readable(batch.process.stderr.fileno()), 'no warning came'
    return batch.process.stderr.readline()


def nothing_left():
    assert not [*RESULTS.glob('*.partial')] and not (RESULTS / '.ssh_scheduler/partial').exists()


def fetches(machine):
    """Make a machine note each rsync that fetches; return the file with the arguments."""
    log = machine.folder / 'fetches'
    log.touch()
    machine._script('rsync', f'#!/bin/bash\n[[ " $* " != *" --sender "* ]] || echo "$*" >>{log}\n'
                    f'exec {rig.program("rsync")} "$@"\n')
    return log


# ---- Files that are fetched ----

def test_files_appear_and_grow_and_are_replaced_by_the_results(batches, machine, gate):
    batch = batches.start([f'mkdir -p runs/a; echo one >runs/a/log; echo no >other; '
                           f'{gate.wait("grow")}; echo two >>runs/a/log; ln -s a runs/b; '
                           f'{gate.wait("end")}; echo three >>runs/a/log'], [machine], *SYNC)
    log = partial('batch.sh.1', 'runs/a/log')
    shows(log, 'one\n')
    assert not partial('batch.sh.1', 'other').exists()
    assert stat.S_IMODE(partial('batch.sh.1').stat().st_mode) == s.new_folder_mode()
    with open(log) as reader:           # as TensorBoard keeps it open
        assert reader.read() == 'one\n'
        gate.open('grow')
        wait_until(lambda: os.fstat(reader.fileno()).st_size == 8, 'that the open file grows')
        assert reader.read() == 'two\n'
    wait_until(partial('batch.sh.1', 'runs/b').is_symlink, 'the link')
    assert os.readlink(partial('batch.sh.1', 'runs/b')) == 'a'
    wait_until(lambda: os.listdir('job_results/.ssh_scheduler/partial') == ['names'],
               'that nothing is there twice')
    gate.open('end')
    done = batch.end()
    assert (done.returncode, done.stderr) == (0, ''), done
    assert (RESULTS / 'batch.sh.1/runs/a/log').read_text() == 'one\ntwo\nthree\n'
    assert (RESULTS / 'batch.sh.1/other').read_text() == 'no\n'
    nothing_left()


def test_what_a_job_removes_goes_here_too(batches, lab1, gate):
    batch = batches.start([
        f'mkdir -p runs/old runs/kind; echo x >runs/old/log; echo x >runs/a; {gate.wait("go")}; '
        f'rm -r runs/old runs/kind; echo y >runs/kind; rm runs/a; mkdir runs/a; echo z >runs/a/b; '
        f'{gate.wait("end")}'], [lab1], *SYNC)
    shows(partial('batch.sh.1', 'runs/old/log'), 'x\n')
    gate.open('go')
    shows(partial('batch.sh.1', 'runs/kind'), 'y\n')
    shows(partial('batch.sh.1', 'runs/a/b'), 'z\n')
    assert sorted(tree_of(partial('batch.sh.1'))) == [
        b'runs', b'runs/a', b'runs/a/b', b'runs/kind']
    gate.open('end')
    assert batch.end().returncode == 0
    nothing_left()


def test_one_rsync_for_all_jobs_of_a_machine_over_its_login(batches, lab, gate, outside, ledger):
    """Once all jobs run, one more rsync fetches all that they wrote since the last one."""
    machine, free, one_more = lab(), outside / 'free', outside / 'one more'
    free.touch()
    machine._script('rsync', f"""#!/bin/bash
if [[ " $* " == *" --sender "* ]]; then
    until [ -e {free} ] || rmdir '{one_more}' 2>/dev/null; do sleep 0.02; done
fi
exec {rig.program("rsync")} "$@"
""")
    line = (f'mkdir runs; echo one >runs/log; {gate.wait("more")}; echo two >>runs/log; '
            f'echo said >>{ledger}; {gate.wait("end")}')
    batch = batches.start([line] * 3, [machine], *SYNC)
    logs = [partial(f'batch.sh.{number}', 'runs/log') for number in (1, 2, 3)]
    for log in logs:
        shows(log, 'one\n')
    free.unlink()
    for _ in logs:
        gate.open('more')
    wrote(ledger, *['said'] * 3)
    one_more.mkdir()
    for log in logs:
        shows(log, 'one\ntwo\n')
    assert machine.logins() == 1
    free.touch()
    for _ in logs:
        gate.open('end')
    assert batch.end().returncode == 0
    nothing_left()


def test_files_with_odd_names(batches, lab1, gate):
    line = ("mkdir runs; printf x >\"$(printf 'runs/a\\n\\t\"\\047\\\\*?\\303\\251')\"; "
            f'{gate.wait("end")}')
    batch = batches.start([line], [lab1], *SYNC)
    shows(partial('batch.sh.1', 'runs/a\n\t"\'\\*?é'), 'x')
    gate.open('end')
    assert batch.end().returncode == 0
    nothing_left()


@as_root
def test_what_a_job_has_shut(batches, lab, gate):
    """The owner may not write the file on the machine, and yet the copy here grows."""
    machine = lab(uid=12345)
    batch = batches.start([f'mkdir runs; umask 0377; echo x >runs/log; chmod 500 runs; '
                           f'{gate.wait("go")}; chmod 700 runs; chmod 600 runs/log; '
                           f'echo y >>runs/log; chmod 400 runs/log; {gate.wait("end")}'],
                          [machine], *SYNC)
    log = partial('batch.sh.1', 'runs/log')
    shows(log, 'x\n')
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert stat.S_IMODE(log.parent.stat().st_mode) == 0o700
    gate.open('go')
    shows(log, 'x\ny\n')
    gate.open('end')
    assert batch.end().returncode == 0
    nothing_left()


def test_files_that_were_sent_are_not_among_them_unless_named(batches, project, lab1, gate):
    Path('sent').write_text('sent\n')
    batch = batches.start([f'mkdir runs; echo x >runs/log; {gate.wait("end")}'], [lab1],
                          '--sync-back', 'runs', 'sent', 'none', '--every=1', *NO_GPU)
    shows(partial('batch.sh.1', 'runs/log'), 'x\n')
    shows(partial('batch.sh.1', 'sent'), 'sent\n')
    gate.open('end')
    assert batch.end().returncode == 0


# ---- When the copies are removed ----

def test_of_a_job_that_fails_and_one_that_is_cancelled(batches, lab1, gate):
    lines = [f'mkdir runs; echo x >runs/log; {gate.wait(name)}; exit 3'
             for name in ('end', 'never')]
    batch = batches.start(lines, [lab1], *SYNC)
    shows(partial('batch.sh.1', 'runs/log'), 'x\n')
    shows(partial('batch.sh.2', 'runs/log'), 'x\n')
    gate.open('end')
    batch.until('failed: batch.sh.1;')
    wait_until((RESULTS / 'batch.sh.1').exists, 'its results')
    assert partial('batch.sh.2').exists()
    batch.process.send_signal(signal.SIGINT)
    assert batch.end().returncode == 130
    nothing_left()
    (aside,) = RESULTS.glob('.ssh_scheduler/cancelled/batch.sh.2.*/runs/log')
    assert aside.read_text() == 'x\n'
    assert_clean(lab1)


@pytest.mark.parametrize('syncs', [True, False])
def test_after_a_client_was_killed(batches, lab1, gate, syncs):
    """The next run removes the files of the last one, and with --sync-back fetches new ones."""
    batch = batches.start([f'mkdir runs; echo x >runs/log; {gate.wait("end")}'], [lab1], *SYNC)
    log = partial('batch.sh.1', 'runs/log')
    shows(log, 'x\n')
    inode = log.stat().st_ino
    batch.process.kill()
    batch.end()
    assert log.exists()
    again = batches.start(None, [lab1], *(SYNC if syncs else SYNC[3:]))
    again.until('running: batch.sh.1;')
    if syncs:
        wait_until(lambda: text_of(log) and log.stat().st_ino != inode, 'the files of this run')
    else:
        assert not partial('batch.sh.1').exists()
    gate.open('end')
    assert again.end().returncode == 0
    nothing_left()
    assert (RESULTS / 'batch.sh.1/runs/log').read_text() == 'x\n'


def test_a_job_that_is_lost_begins_anew(batches, lab, gate, outside):
    machine = lab()
    batch = batches.start([f'mkdir runs; [ -e {outside}/later ] && echo y >runs/log || '
                           f'echo x >runs/first; {gate.wait("end")}'], [machine], *SYNC)
    shows(partial('batch.sh.1', 'runs/first'), 'x\n')
    (outside / 'later').touch()
    machine.power_off()
    machine.set_boot_id()
    machine.start()
    shows(partial('batch.sh.1', 'runs/log'), 'y\n')
    assert not partial('batch.sh.1', 'runs/first').exists()
    gate.open('end')
    assert batch.end().returncode == 0
    nothing_left()


def test_contact_that_is_lost_and_found(batches, lab, gate):
    machine = lab()
    batch = batches.start([f'mkdir runs; echo x >runs/log; {gate.wait("go")}; echo y >>runs/log; '
                           f'{gate.wait("end")}'], [machine], *SYNC)
    log = partial('batch.sh.1', 'runs/log')
    shows(log, 'x\n')
    machine.stop()
    gate.open('go')
    machine.start()
    shows(log, 'x\ny\n')
    gate.open('end')
    assert batch.end().returncode == 0
    nothing_left()


# ---- --sync-back delays nothing ----

def slow_fetches(machine, awaited):
    """Make each rsync of --sync-back on a machine hang; `awaited` appears when one does."""
    machine._script('rsync', f"""#!/bin/bash
if [[ " $* " == *" --sender "* && " $* " == *" --delete"* ]]; then
    touch {awaited}
    sleep 1000
fi
exec {rig.program('rsync')} "$@"
""")


def rsyncs(client_home):
    """Return the pids of the rsyncs of --sync-back that run here."""
    return [pid for pid in rig.knowing(client_home)
            if re.match(r'rsync .* --inplace ', rig.cmdline(pid))]


def test_results_do_not_wait_for_it(batches, lab, gate, outside, client_home):
    machine, awaited = lab(), outside / 'awaited'
    slow_fetches(machine, awaited)
    batch = batches.start([f'mkdir runs; echo x >runs/log; {gate.wait("end")}',
                           f'mkdir runs; echo x >runs/log; {gate.wait("other")}'],
                          [machine], *SYNC)
    wait_until(awaited.exists, 'an rsync that hangs')
    hanging = rsyncs(client_home)
    gate.open('end')
    assert hanging and all(rig.ends(pid) for pid in hanging)  # else the limit is 600 s
    wait_until((RESULTS / 'batch.sh.1/runs/log').exists, 'the results')
    gate.open('other')
    done = batch.end()
    assert (done.returncode, done.stderr) == (0, '')
    nothing_left()


def test_none_begins_while_results_are_on_their_way(batches, lab, gate, outside, client_home):
    machine, go = lab(), outside / 'go'
    batch = batches.start([f'mkdir runs; echo x >runs/log; {gate.wait(name)}'
                           for name in ('end', 'other')], [machine], *SYNC)
    shows(partial('batch.sh.2', 'runs/log'), 'x\n')
    log = outside / 'log'
    machine._script('rsync', f'''#!/bin/bash
if [[ " $* " == *" --delete"* ]]; then
    echo sync >>{log}
elif [[ " $* " == *" --sender "* ]]; then
    touch {go}.awaited
    until [ -e {go} ]; do sleep 0.02; done
fi
exec {rig.program('rsync')} "$@"
''')
    wait_until(log.exists, 'one by this script')
    gate.open('end')
    wait_until(Path(f'{go}.awaited').exists, 'the results')
    wait_until(lambda: not rsyncs(client_home), 'the end of one that began before')
    wait_until(lambda: not any(' --delete' in words for _, words in machine.processes()),
               'its end there')
    count, until = len(log.read_text()), time.monotonic() + 2
    wait_until(lambda: time.monotonic() > until, 'two intervals')
    assert len(log.read_text()) == count and not (RESULTS / 'batch.sh.1').exists()
    go.touch()
    wait_until((RESULTS / 'batch.sh.1').exists, 'the results')
    wait_until(lambda: len(log.read_text()) > count, 'the next one')
    gate.open('other')
    assert batch.end().returncode == 0
    nothing_left()


def test_to_leave_the_jobs_does_not_wait_for_it(
        batches, scheduler, client_env, client_home, lab, gate, outside):
    machine, awaited = lab(), outside / 'awaited'
    line = f'mkdir runs; echo x >runs/log; {gate.wait("end")}'
    at = Terminal([sys.executable, scheduler, *argv_of([line], [machine], SYNC)], env=client_env)
    try:
        at.until(lambda _: text_of(partial('batch.sh.1', 'runs/log')) == 'x\n')    # it was fetched
        slow_fetches(machine, awaited)
        at.until(lambda _: awaited.exists())
        hanging, began = rsyncs(client_home), time.monotonic()
        at.press('\x03')
        at.until(lambda text: 'detach' in text)
        at.press('d')
        assert at.end() == 130
        assert hanging and time.monotonic() - began < 25        # FAREWELL_S is 30
    finally:
        at.close()
    assert partial('batch.sh.1', 'runs/log').read_text() == 'x\n'      # for the user to look at
    machine._script('rsync', f'#!/bin/bash\nexec {rig.program("rsync")} "$@"\n')
    gate.open('end')
    assert batches.run(None, [machine], *SYNC).returncode == 0
    nothing_left()


def test_a_machine_without_rsync(batches, lab, gate):
    machine = lab(leave_out=('rsync',))
    batch = batches.start([f'mkdir runs; echo x >runs/log; {gate.wait("end")}'], [machine], *SYNC)
    assert warning(batch) == (
        f'WARNING: {machine.yaml()}: rsync cannot be used with it, so --sync-back fetches nothing '
        'while its jobs run\n')
    until = time.monotonic() + 1.5
    wait_until(lambda: time.monotonic() > until, 'an interval, in which nothing more is said')
    gate.open('end')
    done = batch.end()
    assert (done.returncode, done.stderr) == (0, '')
    assert (RESULTS / 'batch.sh.1/runs/log').read_text() == 'x\n'
    nothing_left()


def test_an_sshd_that_allows_one_session(batches, lab, gate):
    machine = lab(sshd_options='MaxSessions 1')
    batch = batches.start([f'mkdir runs; echo x >runs/log; {gate.wait("end")}'], [machine], *SYNC)
    shows(partial('batch.sh.1', 'runs/log'), 'x\n')
    gate.open('end')
    done = batch.end()
    assert (done.returncode, done.stderr) == (0, '')
    nothing_left()


@pytest.mark.parametrize('scheduler', [PROGRAM], ids=['few'])
def test_more_files_than_can_be_looked_at(batches, lab, gate):
    machine = lab()
    log = fetches(machine)
    batch = batches.start([f'mkdir runs; touch runs/{{1..150}}; {gate.wait("end")}'], [machine],
                          *SYNC, env={'CRASH_SETTINGS': json.dumps({'MOST_PARTS': 100})})
    assert warning(batch) == (
        f'WARNING: {machine.yaml()}: the paths of --sync-back have more than 100 files there, so '
        'no more of them is fetched while jobs run\n')
    count, until = len(log.read_text().splitlines()), time.monotonic() + 2
    wait_until(lambda: time.monotonic() > until, 'two intervals')
    assert len(log.read_text().splitlines()) == count
    gate.open('end')
    done = batch.end()
    assert (done.returncode, done.stderr) == (0, '')
    assert len(os.listdir(RESULTS / 'batch.sh.1/runs')) == 150
    nothing_left()


def test_a_disk_that_is_nearly_full(batches, disk, project, lab1, gate):
    with contextlib.suppress(FileExistsError):
        RESULTS.mkdir()
    with disk(size=64 << 20, at=RESULTS):
        batch = batches.start([f'mkdir runs; echo x >runs/log; {gate.wait("end")}'], [lab1], *SYNC)
        assert warning(batch) == (
            'WARNING: less than 1.0 GB are free here, which results may need: --sync-back fetches '
            'nothing\n')
        gate.open('end')
        done = batch.end()
        assert (done.returncode, done.stderr) == (0, '')
        nothing_left()


@pytest.mark.parametrize('scheduler', [PROGRAM], ids=['small'])
def test_a_disk_that_fills_while_files_come(batches, disk, project, lab, gate):
    machine = lab()
    machine._script('rsync', '#!/bin/bash\n[[ " $* " == *" --delete"* ]] && set -- "${@:1:2}" '
                    f'--bwlimit=20m "${{@:3}}"\nexec {rig.program("rsync")} "$@"\n')
    RESULTS.mkdir()
    with disk(size=400 << 20, at=RESULTS):
        # The whole file would take 15 s.
        batch = batches.start([f'mkdir runs; truncate -s 300000000 runs/log; '
                               f'{gate.wait("end")}; rm -r runs'], [machine], *SYNC,
                              env={'CRASH_SETTINGS': json.dumps({'SPARE_BYTES': 360_000_000})})
        assert warning(batch) == (
            'WARNING: less than 360.0 MB are free here, which results may need: --sync-back '
            'fetches nothing\n')
        wait_until(lambda: not [*RESULTS.glob('.ssh_scheduler/partial/from.*')], 'its end')
        assert 0 < partial('batch.sh.1', 'runs/log').stat().st_size < 300_000_000
        gate.open('end')
        done = batch.end()
        assert (done.returncode, done.stderr) == (0, '')
        nothing_left()


# ---- Attacks ----

def test_links_that_lead_out_and_what_is_no_file(batches, lab1, gate):
    batch = batches.start([         # all of it gets the name that is fetched at once
        f'mkdir -p new/in; ln -s /etc/passwd new/out; ln -s ../../../x new/in/up; ln -s .. '
        f'new/in/here; mkfifo new/fifo; echo x >new/log; chmod 7755 new/log; mv new runs; '
        f'{gate.wait("end")}; rm -r runs'], [lab1], *SYNC)
    wait_until(lambda: sorted(tree_of(partial('batch.sh.1'))) == [
        b'runs', b'runs/in', b'runs/in/here', b'runs/log'], 'what may come')
    assert partial('batch.sh.1', 'runs/log').read_text() == 'x\n'
    assert stat.S_IMODE(partial('batch.sh.1', 'runs/log').stat().st_mode) == 0o755
    gate.open('end')
    done = batch.end()
    assert done.returncode == 0
    assert re.fullmatch(
        r'WARNING: batch\.sh\.1: runs/(out|in/up), runs/(out|in/up) from '
        f'{re.escape(str(lab1.yaml()))} leads out of its folder, and was left out\n',
        done.stderr), done.stderr


def test_a_link_in_the_place_of_what_is_asked_for(batches, lab1, gate):
    batch = batches.start([f'ln -s /etc runs; {gate.wait("go")}; rm runs; mkdir runs; '
                           f'echo x >runs/log; {gate.wait("end")}'], [lab1], *SYNC)
    assert warning(batch) == (
        f'WARNING: batch.sh.1: runs from {lab1.yaml()} leads out of its folder, and was left '
        'out\n')
    gate.open('go')
    shows(partial('batch.sh.1', 'runs/log'), 'x\n')
    gate.open('end')
    assert batch.end().returncode == 0


@pytest.mark.parametrize('attack', ATTACKS)
def test_a_hostile_rsync(batches, lab, canary, gate, tmp_path, attack):     # noqa: F811
    """It sends files that the client, which trusts it, did not ask for, while the job runs."""
    machine, told = lab(), tmp_path / 'told'
    entries = json.loads(json.dumps(ATTACKS[attack][0]).replace('{canary}', str(canary)))
    sends(entries)(machine)
    script = (machine.bin / 'rsync').read_text().replace('exec ', f'echo >>{told}\n', 1)
    machine._script('rsync', f'{script}\n')
    batch = batches.start([gate.wait('end')], [machine], '--sync-back', 'made', *SYNC[2:],
                          '--copy-backwards', env=trusting(tmp_path))
    wait_until(lambda: len(text_of(told)) >= 2, 'two fetches')
    came = tree_of(partial('batch.sh.1'))
    assert [(path, what[0], what[-1]) for path, what in came.items()] == [
        (b'made', 'file', b'evil\n')] * (attack == 'not asked for')
    gate.open('end')
    done = batch.end()
    assert done.returncode == 0 and 'Traceback' not in done.stderr and done.stderr, done.stderr
    assert all(line.startswith(f'WARNING: {machine.yaml()}: ') or ' from ' in line
               for line in done.stderr.splitlines()), done.stderr
    assert re.search('[^\x20-\x7e\n]', done.stderr) is None
    nothing_left()


def test_an_rsync_with_a_hole_is_confined(batches, lab1, canary, gate, tmp_path):  # noqa: F811
    if s.confine(str(tmp_path)) is None:
        pytest.skip('this kernel has no Landlock')
    env = spy(tmp_path / 'holed', 'rsync', f'echo evil >{canary}/evil && exit 0\nexec "$real" "$@"')
    batch = batches.start([f'mkdir runs; echo x >runs/log; {gate.wait("end")}'], [lab1], *SYNC,
                          env=env)
    shows(partial('batch.sh.1', 'runs/log'), 'x\n')
    gate.open('end')
    assert batch.end().returncode == 0


def test_what_has_that_name_and_is_not_ours(batches, lab1, gate):
    partial('batch.sh.1').mkdir(parents=True)
    partial('batch.sh.1', 'mine').write_text('mine\n')
    batch = batches.start([f'mkdir runs; echo x >runs/log; {gate.wait("end")}'], [lab1], *SYNC)
    assert warning(batch) == (
        'WARNING: job_results/batch.sh.1.partial is not of this run: move it away, so that '
        '--sync-back can show batch.sh.1\n')
    gate.open('end')
    assert batch.end().returncode == 0
    assert sorted(tree_of(partial('batch.sh.1'))) == [b'mine']


# ---- The parts ----

def test_partials_remove_only_what_they_made(project):
    RESULTS.mkdir()
    partials = s.Partials('job_results', 'job_results/.ssh_scheduler')
    assert partials.open('a') == partials.open('a') == 'job_results/a.partial'
    partial('a').rename('moved')                # and the user makes a new one
    partial('a').mkdir()
    assert partials.open('a') is None
    partials.remove('a')
    assert partial('a').is_dir() and Path('moved').is_dir()
    partial('a').rmdir()
    assert partials.open('a') == 'job_results/a.partial'
    partials.open('b')
    s.Partials('job_results', 'job_results/.ssh_scheduler').clear()
    assert not [*RESULTS.glob('*.partial')] and not (RESULTS / '.ssh_scheduler/partial').exists()


def test_partials_of_running_jobs_stay_when_the_client_ends(project):
    RESULTS.mkdir()
    partials = s.Partials('job_results', 'job_results/.ssh_scheduler')
    partials.open('a')
    partials.close()
    assert partial('a').is_dir() and partials.open('a')
    partials.remove('a')
    partials.close()
    assert os.listdir('job_results/.ssh_scheduler') == []


class Asked:
    """A Worker whose other job ends while the machine is asked where its jobs run."""

    def __init__(self):
        self.arriving, self.contact, self.lives = False, self, self
        self.jobs = SimpleNamespace(folders={})

    def send(self, *_):
        self.arriving = True

    def of(self, *_):
        return [SimpleNamespace(key='b.sh.1')]

    def any_of(self, *_):
        return self.arriving


def test_results_that_come_while_a_machine_is_asked_go_first(monkeypatch):
    worker, fetched, sync = Asked(), [], s.SyncBack(('runs',), 1, None, None)
    monkeypatch.setattr(sync, '_fetch', lambda worker: fetched.append(worker) or ())
    flow = sync._serve(worker)
    assert (next(flow), next(flow), fetched) == (s.TICK_S, s.TICK_S, [])
    worker.arriving = False
    assert ([*flow], fetched) == ([], [worker])


def test_mirror_shows_the_same_files(tmp_path):
    source, target = tmp_path / 'source', tmp_path / 'target'
    (source / 'a').mkdir(parents=True)
    (source / 'a/file').write_text('x')
    (source / 'a/link').symlink_to('file')
    (source / 'a').chmod(0o750)
    target.mkdir()
    s.mirror(str(source), str(target))
    assert tree_of(source) == tree_of(target)
    assert os.path.samefile(source / 'a/file', target / 'a/file')
    (target / 'a/mine').write_text('x')
    (target / 'a/link').unlink()
    (target / 'a/link').symlink_to('/etc/passwd')
    (tmp_path / 'canary').mkdir()
    (tmp_path / 'canary/file').write_text('alive')
    (source / 'b').mkdir()
    (source / 'b/file').write_text('y')
    (target / 'b').symlink_to(tmp_path / 'canary')
    s.mirror(str(source), str(target))
    assert tree_of(source) == tree_of(target)
    assert (tmp_path / 'canary/file').read_text() == 'alive'


def test_mirror_copies_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError
    monkeypatch.setattr(os, 'link', refuse)
    source, target = tmp_path / 'source', tmp_path / 'target'
    source.mkdir()
    target.mkdir()
    (source / 'file').write_text('x')
    (source / 'link').symlink_to('/nowhere')
    s.mirror(str(source), str(target))
    (source / 'file').write_text('xy')
    s.mirror(str(source), str(target))
    assert (target / 'file').read_text() == 'xy' and os.readlink(target / 'link') == '/nowhere'


@pytest.mark.parametrize('words, said', [
    (['--every=5'], '--every can only be given with --sync-back.'),
    (['--sync-back'], '--sync-back needs a path.'),
    (['--sync-back=..'], 'this lies outside the current folder'),
    (['--sync-back=a', '--every=0'], '--every must be a time of at least 1')])
def test_options_that_are_wrong(batches, project, words, said):
    done = batches.run(['true'], ['localhost'], *NO_GPU, *words)
    assert done.returncode == 2 and said in done.stderr.splitlines()[0], done.stderr
