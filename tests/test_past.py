"""--what describes a past job, --reproduce runs it again; and the files kept for both."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import rig
from batching import NO_GPU, RESULTS, Batches, constants, result, wait_until, with_constants

import combine_folders
import ssh_scheduler as s

INNER = RESULTS / '.ssh_scheduler'
SENT = INNER / 'sent'
ROOT = Path(__file__).parent.parent


@pytest.fixture
def batches(run_cli, start_cli, project, lab1):
    """Batches on a localhost with room for a few jobs, even while tests take all processors."""
    return Batches(run_cli, start_cli, env={'SSH_SCHEDULER_PROC': str(lab1.proc)})


@pytest.fixture
def run(batches):
    """Run lines on localhost."""
    return lambda *lines, options=(), **more: batches.run(
        lines, ['localhost'], *NO_GPU, '--num-cpus=0.1', *options, **more)


@pytest.fixture
def ask(run_cli, lab1):
    """Run execute_batch with these words."""
    return lambda *words, **more: run_cli(
        'execute_batch', *words, env={'SSH_SCHEDULER_PROC': str(lab1.proc)}, **more)


@pytest.fixture
def git(project):
    """Run git in the project, which is a checkout with one commit."""
    env = {**os.environ, 'GIT_CONFIG_GLOBAL': os.devnull, 'GIT_CONFIG_SYSTEM': os.devnull}

    def call(*words, cwd=project):
        return subprocess.run(['git', '-c', 'user.name=a', '-c', 'user.email=a@b', *words], cwd=cwd,
                              env=env, check=True, capture_output=True, text=True).stdout

    call('init', '-q', '-b', 'main')
    return call


def journal(part=''):
    return [json.loads(line) for line in (INNER / part / 'journal').read_text().splitlines()]


def claims(part=''):
    return {event['job']: event for event in journal(part) if event['event'] == 'claimed'}


def digest_of(job):
    return claims()[job]['files']


def record(job='batch.sh.1'):
    return json.loads((SENT / digest_of(job) / 'record.json').read_text())


def tree(folder):
    """Return {path: bytes, or the target of a link} below a folder."""
    found = {}
    for path in Path(folder).rglob('*'):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = os.readlink(path)
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def heads(done):
    """Return {head: text} of the output of --what; lines without a head continue it."""
    assert (done.returncode, done.stderr) == (0, ''), done
    found, head = {}, ''
    for line in done.stdout.splitlines():
        head = line[:12].strip(': ') or head
        found.setdefault(head, []).append(line[12:])
    return found


# ---- Files that are kept ----

def test_a_checkout_leaves_its_commit_and_what_differs(run, git, project, tmp_path):
    (project / 'train.py').write_text('one\n')
    (project / 'raw').write_bytes(bytes(range(256)))
    (project / 'gone.py').write_text('deleted later\n')
    (project / 'secret.env').write_text('TOKEN=abcdef\n')
    (project / 'odd \n"\udcff*').write_text('odd\n')
    git('add', '-A')
    git('commit', '-qm', 'first')
    head = git('rev-parse', 'HEAD').strip()
    (project / 'train.py').write_text('two\n')
    (project / 'raw').write_bytes(bytes(range(256))[::-1])
    (project / 'odd \n"\udcff*').write_text('odder\n')
    (project / 'secret.env').write_text('TOKEN=ghijkl\n')
    (project / 'gone.py').unlink()
    (project / 'new.py').write_text('new\n')
    (project / 'new.log').write_text('abcdef ghijkl\n')
    (project / 'link').symlink_to('train.py')
    run('cat train.py', options=['--exclude', '*.env', '*.log'])
    found = record()
    assert (found['commit'], found['branch'], found['version']) == (head, 'main', 1)
    assert found['changed'] == sorted(['train.py', 'raw', 'odd \n"\udcff*'])
    assert found['untracked'] == ['batch.sh', 'link', 'new.py'] and found['untracked_files'] == 3
    assert (found['files'], found['kept']) == (6, 6)
    folder = SENT / digest_of('batch.sh.1')
    assert tree(folder / 'files') == {
        'train.py': b'two\n', 'raw': bytes(range(256))[::-1], 'odd \n"\udcff*': b'odder\n',
        'new.py': b'new\n', 'link': 'train.py', 'batch.sh': b'cat train.py\n'}
    # The commit with the patch has the files that were sent.
    git('clone', '-q', str(project), str(tmp_path / 'then'))
    git('apply', str((folder / 'diff.patch').absolute()), cwd=tmp_path / 'then')
    for name in found['changed']:
        assert (tmp_path / 'then' / name).read_bytes() == (project / name).read_bytes()
    said = subprocess.run(['grep', '-rlE', 'TOKEN|abcdef|ghijkl|secret|deleted', str(SENT)],
                          capture_output=True, text=True, check=False)
    assert said.stdout == ''


def test_a_folder_of_a_checkout_and_one_without_a_commit(run, ask, git, project, monkeypatch):
    (project / 'below').mkdir()
    monkeypatch.chdir(project / 'below')
    Path('a').write_text('1')
    run('cat a')
    assert 'commit' not in record()
    git('add', '-A', ':!below/job_results')
    git('commit', '-qm', 'first')
    Path('a').write_text('2')
    (project / 'beside').write_text('not sent')
    assert run('cat a', 'cat a a').returncode == 0
    assert record('batch.sh.2')['changed'] == ['a', 'batch.sh']
    assert 'beside' not in (SENT / digest_of('batch.sh.2') / 'diff.patch').read_text()
    shutil.rmtree(project / '.git')
    assert heads(ask('--what', 'batch.sh.2'))['changed'][0].startswith('a, batch.sh: ')


@pytest.fixture
def false_git(tmp_path, monkeypatch):
    """Have the program find a git that runs these lines of sh first; $git is the real one."""
    def put(lines):
        folder = tmp_path / 'false'
        folder.mkdir()
        (folder / 'git').write_text(f'#!/bin/sh\ngit={shutil.which("git")}\n{lines}\n')
        (folder / 'git').chmod(0o755)
        return {'PATH': f'{folder}:{os.environ["PATH"]}'}
    return put


def test_the_patch_is_that_of_what_was_sent_or_there_is_none(run, git, project, tmp_path):
    (project / 'a').write_text('one\n')
    (project / 'b').write_text(''.join(f'{n}\n' for n in range(20)))
    git('add', '-A')
    git('commit', '-qm', 'first')
    (project / 'b').write_text((project / 'b').read_text().replace('9', 'nine'))
    git('rm', '-q', '--cached', 'a')                # the file is sent nevertheless
    git('config', 'diff.context', '0')              # git apply refuses such a patch
    git('config', 'diff.noprefix', 'true')
    run('cat a')
    assert (record()['changed'], record()['untracked']) == (['b'], ['a', 'batch.sh'])
    git('clone', '-q', str(project), str(tmp_path / 'then'))
    git('apply', str((SENT / digest_of('batch.sh.1') / 'diff.patch').absolute()),
        cwd=tmp_path / 'then')
    for name in 'ab':
        assert (tmp_path / 'then' / name).read_bytes() == (project / name).read_bytes()
    git('reset', '-q')
    git('update-index', '--assume-unchanged', 'a')
    (project / 'a').write_text('two\n')
    run('cat a', 'cat b')
    assert record('batch.sh.2')['changed'] == ['a', 'b']
    assert not (SENT / digest_of('batch.sh.2') / 'diff.patch').exists()


def test_nothing_is_noted_of_a_git_that_fails(run, git, project):
    (project / '.gitattributes').write_text('a filter=x\n')
    (project / 'a').write_text('one\n')
    git('add', '-A')
    git('commit', '-qm', 'first')
    git('config', 'filter.x.clean', 'false')
    git('config', 'filter.x.required', 'true')
    (project / 'a').write_text('two\n')
    assert run('cat a').returncode == 0
    assert 'commit' not in record() and 'changed' not in record()


def test_a_file_that_is_edited_before_git_looks(batches, git, project, false_git):
    (project / 'a').write_text('one\n')
    (project / 'b').write_text('one\n')
    git('add', '-A')
    git('commit', '-qm', 'first')
    (project / 'a').write_text('two\n')
    (project / 'b').write_text('two\n')
    env = false_git('case "$*" in *rev-parse*) echo one >a;; esac; exec "$git" "$@"')
    batches.run(['cat a'], ['localhost'], *NO_GPU, env=env)
    assert result('batch.sh.1') == b'two\n'
    assert record()['changed'] == ['a', 'b']
    assert not (SENT / digest_of('batch.sh.1') / 'diff.patch').exists()


def test_differences_that_are_too_large_are_not_read(batches, git, project, false_git):
    (project / 'a').write_text('one\n')
    git('add', '-A')
    git('commit', '-qm', 'first')
    (project / 'a').write_text('two\n')
    env = false_git('case "$*" in *--binary*) exec yes;; esac; exec "$git" "$@"')
    batches.run(['cat a'], ['localhost'], *NO_GPU, '--keep-files=1', env=env)
    assert record()['changed'] == ['a']
    assert not (SENT / digest_of('batch.sh.1') / 'diff.patch').exists()


def test_a_git_that_hangs_does_not_hold_up_the_end(git, project, false_git, client_env):
    (project / 'batch.sh').write_text('true\n')
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name('crash.py'), 'execute_batch', 'batch.sh',
         *NO_GPU, '--machines', 'localhost'], check=False, capture_output=True, timeout=20,
        env={**client_env, **false_git('exec sleep 1000'),
             'CRASH_SETTINGS': json.dumps({'LAST_GIT_S': 0.1})})
    assert done.returncode == 0 and 'commit' not in record(), done


def test_contents_are_kept_once_and_up_to_a_limit(run, project):
    (project / 'small').write_bytes(b's' * 1000)
    (project / 'twin').write_bytes(b's' * 1000)
    (project / 'large').write_bytes(os.urandom(3_000_000))
    (project / 'data').write_bytes(bytes(10))
    run('true', options=['--keep-files', '1', '--link-forwards', 'data'])
    found = record()
    assert (found['files'], found['kept'], found['linked']) == (5, 3, ['data'])
    assert sorted(tree(SENT / digest_of('batch.sh.1') / 'files')) == ['batch.sh', 'small', 'twin']
    assert len(os.listdir(SENT / 'store')) == 2
    files = json.loads((SENT / digest_of('batch.sh.1') / 'files.json').read_text())
    assert files['data'] == [0o644, 10, (project / 'data').stat().st_mtime_ns, '']
    assert files['large'][3] == s.content_digest((project / 'large').read_bytes())
    run('true', 'false', options=['--keep-files', '4', '--link-forwards', 'data'])
    assert sorted(tree(SENT / digest_of('batch.sh.2') / 'files')) == [
        'batch.sh', 'large', 'small', 'twin']
    assert sum(path.stat().st_size for path in (SENT / 'store').iterdir()) < 4 * 2**20
    run('true', 'false', 'exit 2', options=['--keep-files', '0', '--link-forwards', 'data'])
    assert record('batch.sh.3')['kept'] == 0
    assert not (SENT / digest_of('batch.sh.3') / 'files').exists()


def test_a_copy_is_for_no_more_people_than_the_file(run, project):
    (project / 'a').write_text('a')
    (project / 'b').write_text('b')
    (project / 'b').chmod(0o600)
    (project / 'shut').mkdir(0o750)
    (project / 'shut/c').write_text('c')
    run('true', options=['--exclude', 'b'])
    run('true', 'true')
    modes = {path.read_bytes(): path.stat().st_mode & 0o777 for path in (SENT / 'store').iterdir()}
    assert (modes[b'a'], modes[b'b'], modes[b'c']) == (0o444, 0o400, 0o440)
    assert [(SENT / digest_of(f'batch.sh.{n}')).stat().st_mode & 0o777 for n in (1, 2)] == [
        0o750, 0o700]


@pytest.fixture
def clients(project):
    """Return the Sent of two clients that keep the files that they send, and a Manifest."""
    (project / 'a').write_text('a')
    manifest = s.Manifest.of(s.scan_tree(['.'], ()), s.scan_tree((), ()))
    one, two = (s.Sent(str(INNER)) for _ in range(2))
    one.limit_bytes = two.limit_bytes = 1000
    return one, two, manifest


def test_what_another_client_has_a_job_with_stays(clients):
    one, two, manifest = clients
    for _ in one.keeping(manifest):
        pass
    two.claim(manifest)
    one.close()
    assert two.get(manifest.digest) and s.Sent(str(INNER)).get(manifest.digest)
    assert two.content(manifest.files['a'][3]) == b'a'
    one.claim(manifest)                             # it shares the other client's set
    two.close()
    assert sorted(os.listdir(SENT)) == sorted(['store', manifest.digest])


def test_a_set_that_waits_for_long_is_there_in_the_end(clients):
    one, _, manifest = clients
    for _ in one.keeping(manifest):
        pass
    (new,) = SENT.glob('new-*')
    shutil.rmtree(new)                              # as another client does after an hour
    one.claim(manifest)
    assert s.Sent(str(INNER)).record(manifest.digest)['kept'] == 1


def test_copies_leave_room_for_results(clients, monkeypatch):
    one, _, manifest = clients
    monkeypatch.setattr(s, 'SPARE_BYTES', 2**62)
    one.claim(manifest)
    assert s.Sent(str(INNER)).record(manifest.digest)['kept'] == 0


def test_a_set_gets_its_copies_once_there_is_room(clients, monkeypatch):
    one, two, manifest = clients
    with monkeypatch.context() as full:
        full.setattr(s, 'SPARE_BYTES', 2**62)
        one.claim(manifest)
        one.note(manifest.digest, commit='c')
    two.claim(manifest)
    found = s.Sent(str(INNER)).record(manifest.digest)
    assert (found['kept'], found['commit']) == (1, 'c')
    assert tree(SENT / manifest.digest / 'files') == {'a': b'a'}


def test_what_never_began_leaves_nothing(run, batches, project, lab1):
    (project / 'a').write_text('a')
    done = batches.run(['true'], [lab1], '--num-gpus=99')
    assert done.returncode == 2 and not RESULTS.exists(), done
    run('true')
    before = tree(SENT)
    (project / 'a').write_text('b')
    done = batches.run(['true', 'true'], [lab1], '--num-gpus=99')
    assert done.returncode == 2 and tree(SENT) == before, done


def test_the_files_are_those_that_were_sent_though_a_job_waits(batches, project, lab, gate):
    machine = lab()
    (project / 'code').write_text('then')
    batch = batches.start([f'{gate.wait("a")}; cat code', 'cat code'], [machine], *NO_GPU,
                          '--reserve')
    batch.until('started: ')
    (project / 'code').write_text('now!')
    gate.open('a')
    assert batch.end().returncode == 0
    for job in ('batch.sh.1', 'batch.sh.2'):
        assert result(job) == b'then'
        assert (SENT / digest_of(job) / 'files/code').read_text() == 'then'


def test_a_manifest_has_what_the_archive_has(project, monkeypatch):
    """Also if a file changes right before the client reads it for the archive."""
    (project / 'a').write_text('then')
    real = s.read_file

    def read(path):
        if (project / 'a').read_text() == 'then':
            (project / 'a').write_text('later')
        return real(path)

    monkeypatch.setattr(s, 'read_file', read)
    files, forwards = s.Files(), s.Forwards()
    data = files.small_archive(forwards)
    assert b'later' in data
    assert files.manifest(forwards).files['a'][3] == s.content_digest(b'later')


def test_a_manifest_has_what_the_archive_has_of_a_file_that_changes_all_the_time(project,
                                                                                 monkeypatch):
    (project / 'a').write_text('0')
    real = s.Manifest.of

    def of(*trees):
        manifest = real(*trees)
        text = (project / 'a').read_text()
        (project / 'a').write_text(f'{text}{len(text)}')        # another size, too
        return manifest

    monkeypatch.setattr(s.Manifest, 'of', of)
    files, forwards = s.Files(), s.Forwards()
    data = files.small_archive(forwards)
    sent = next(text for text in (b'0123', b'012', b'01', b'0') if text + bytes(500) in data)
    assert files.manifest(forwards).files['a'][3] == s.content_digest(sent)


def test_a_client_that_is_killed_while_it_keeps_files(batches, run, project, client_env):
    for number in range(200):
        (project / f'f{number}').write_text(str(number))
    words = ['execute_batch', 'batch.sh', *NO_GPU, '--machines', 'localhost']
    (project / 'batch.sh').write_text('cat f7\n')
    cut = subprocess.run(
        [sys.executable, Path(__file__).with_name('crash.py'), *words], check=False,
        env={**client_env, 'CRASH_WHEN': 'before rename .*/sent/new-'}, capture_output=True)
    assert cut.returncode == -signal.SIGKILL, cut
    assert run('cat f7').returncode == 0 and result('batch.sh.1') == b'7'
    assert record()['kept'] == 201
    left = [name for name in os.listdir(SENT) if name.startswith('new-')]
    for name in left:                   # as if they were old
        os.utime(SENT / name, (0, 0))
    (SENT / 'store/part.new-1').write_text('half')
    os.utime(SENT / 'store/part.new-1', (0, 0))
    (project / 'f7').write_text('8')
    run('cat f7', 'cat f7 f8')
    assert sorted(os.listdir(SENT)) == sorted(
        ['store', digest_of('batch.sh.1'), digest_of('batch.sh.2')])
    assert not (SENT / 'store/part.new-1').exists()


def test_a_disk_that_cannot_take_the_copies_stops_no_job(run, project):
    (project / 'a').write_text('a')
    INNER.mkdir(parents=True)
    SENT.mkdir()
    (SENT / 'store').write_text('no folder')
    done = run('cat a')
    assert done.returncode != 0 and f'{SENT} cannot be written: ' in done.stderr
    (SENT / 'store').unlink()
    assert run('cat a').returncode == 0


# ---- Content of the journal ----

KEYS = re.compile(r'`([a-z_]+)`')


def test_the_journal_is_as_the_docs_have_it(run, batches, ask, lab1, gate):
    """Each event and key of a journal is documented, and each documented event occurs."""
    text = (ROOT / 'docs/results.md').read_text().partition('## The journal')[2]
    text = text.partition('\n## ')[0]
    documented = {word: set(KEYS.findall(keys)) | {'event', 'time'}
                  for words, keys in re.findall(r'^\| (`.*?) \| (`.*?) \|', text, re.M)
                  for word in KEYS.findall(words)}
    version = int(re.search(r'is (\d+);', text)[1])
    seen = set()
    batches.run(['exit 3', 'echo >a', 'execute_remote --num-gpus=1 true'],
                ['localhost', lab1], *NO_GPU)
    ask('batch.sh', '--rerun-failed', '--machines', 'localhost', *NO_GPU)
    batch = batches.start(None, ['localhost'], *NO_GPU, '--rerun', '1', '2')
    batch.end()
    batch = batches.start([f'{gate.wait("x")}', 'true'], [lab1], *NO_GPU)
    name = batch.until('started: ').split()[1].rstrip(';')
    assert ask('batch.sh', '--cancel', name).returncode == 0
    batch.end()
    for event in journal():
        word = event['event']
        assert set(event) <= documented[word], event
        seen.add(word)
    assert journal()[0] == {
        'event': 'journal', 'identity': journal()[0]['identity'], 'version': version,
        'project': s.project_name(), 'node': os.uname().nodename,
        'folder': os.path.realpath('.'),
        'inode': os.stat('job_results/.ssh_scheduler/journal').st_ino}
    assert seen >= {'journal', 'begun', 'machine', 'claimed', 'ended', 'committing', 'collected',
                    'renamed', 'stopping', 'cancelled', 'answered', 'tidied'}
    at_clusters = {'queued', 'running'}         # tests/test_slurm.py sees these
    assert documented.keys() == seen | {'lost', 'cancelling', 'unwanted', 'wanted'} | at_clusters


def kernel(machine, text):
    """Make the machine report this kernel instead of the real one."""
    (machine.proc / 'sys/kernel').mkdir(parents=True, exist_ok=True)
    (machine.proc / 'sys/kernel/osrelease').write_text(f'{text}\n')


@with_constants
def test_a_machine_has_its_facts(batches, lab):
    machine, patient = lab(gpus=rig.fake_gpus(2)), constants(FACTS_S=30.0)
    (machine.proc / 'driver/nvidia').mkdir(parents=True)
    (machine.proc / 'driver/nvidia/version').write_text(
        'NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 03:51:05 UTC 2025\n')
    kernel(machine, '6.1.0-rig')
    batches.run(['true', 'true'], [machine], env=patient)
    batches.run(['true', 'true', 'exit 1'], [machine])
    first, event = [event for event in journal() if event['event'] == 'machine']
    assert {**first['facts'], 'python': event['facts']['python']} == event['facts']
    assert first['time'] == event['time']
    python = machine.run('python3 -V').stdout
    facts = dict(event['facts'])
    assert facts.pop('python') == python.split()[1]
    assert (facts.pop('kernel'), facts.pop('driver')) == ('6.1.0-rig', '570.86.15')
    assert [gpu['index'] for gpu in facts['gpus']] == [0, 1] and facts['gpus'][0]['model']
    assert facts['cores'] > 0 and facts['memory_mb'] > 0
    began = {job: claim['time'] for job, claim in claims().items()}
    assert event['time'] <= min(began.values()) + 0.001
    (machine.proc / 'driver/nvidia/version').write_text('NVRM version: module  580.1  x\n')
    batches.run(['true', 'true', 'exit 1', 'exit 0'], [machine])
    assert [event['facts']['driver'] for event in journal() if event['event'] == 'machine'] == [
        '570.86.15', '570.86.15', '580.1']


def test_variables_are_known_by_name_only(batches, ask, lab):
    machine = lab().yaml(env={'API_KEY': 'geheim', 'A': 'b'})
    batches.run(['echo $API_KEY'], [machine], *NO_GPU)
    assert result('batch.sh.1') == b'geheim\n'
    assert claims()['batch.sh.1']['variables'] == ['A', 'API_KEY']
    assert heads(ask('--what', 'batch.sh.1'))['variables'] == ['A, API_KEY']
    said = subprocess.run(['grep', '-rl', 'geheim', str(INNER)], capture_output=True, text=True,
                          check=False)
    assert said.stdout == ''


def test_what_is_in_use_is_seen(batches, lab):
    machine = lab(gpus=rig.fake_gpus(2))
    batches.run(['true'], [machine])
    sample, *_ = [json.loads(line) for line in (INNER / 'seen').read_text().splitlines()]
    assert sample['machine'] == claims()['batch.sh.1']['machine']
    assert abs(sample['time'] - time.time()) < 60
    assert 0 <= sample['busy_cores'] <= sample['cores'] * 1000
    assert 0 < sample['used_memory_mb'] < sample['memory_mb']
    assert [gpu[0] for gpu in sample['gpus']] == [0, 1]
    assert all(0 <= gpu[1] <= gpu[2] and 0 <= gpu[3] <= 1 for gpu in sample['gpus'])


def test_samples_are_few_however_long_it_takes(tmp_path, monkeypatch):
    store, now = s.ResultStore(str(tmp_path)).open(), [0.0]
    monkeypatch.setattr(s.time, 'monotonic', lambda: now[0])
    seen = s.Seen(str(tmp_path), store.journal)
    store.journal.write(event='tidied', machine='m')
    for second in range(0, 7 * 86400, 2):
        now[0] = float(second)
        seen.add('m', {})
    count = len((tmp_path / 'seen').read_text().splitlines())
    assert 500 < count < 1000, count
    store.close()


def test_nothing_is_seen_before_a_job_is_claimed(tmp_path):
    store = s.ResultStore(str(tmp_path / 'r')).open()
    store.seen.add('m', {})
    store.close()
    assert not (tmp_path / 'r').exists()


# ---- --what ----

@with_constants
def test_what_a_job_was(batches, ask, project, lab):
    (project / 'train.sh').write_text('echo loss: $1\n')
    machine = lab(gpus=rig.fake_gpus(1))
    kernel(machine, '6.1.0-rig')
    batches.run(['bash train.sh 1', 'exit 3'], [machine], '--memory-required=100',
                env=constants(FACTS_S=30.0))
    found = heads(ask('batch.sh', '--what', '1'))
    assert found == heads(ask('--what', 'batch.sh.1')) == heads(ask('batch.sh', '--what', '.1'))
    model = next(event for event in journal() if event['event'] == 'machine'
                 )['facts']['gpus'][0]['model']
    assert found['command'] == ['bash train.sh 1']
    assert re.fullmatch(r'finished, exit code 0, after \d+s', found['outcome'][0])
    assert re.fullmatch(r'(20..-..-.. )?..:.., ended (20..-..-.. )?..:..', found['started'][0])
    assert found['machine'][0] == f'{machine.yaml()}, GPU 0 ({model})'
    assert re.match(r'Linux 6.1.0-rig, Python 3', found['machine'][1])
    assert found['asked for'] == ['1 core and 100 MB of memory and a GPU of its own with 1000 MB '
                                  'and 75% of its time free']
    assert found['files'] == [f'2 files, 37 bytes, 2 of them kept in {SENT}/'
                              f'{digest_of("batch.sh.1")}/files']
    assert 'commit' not in found
    assert found['since then'] == ['no file changed: execute_batch --reproduce batch.sh.1']
    with open(project / 'batch.sh', 'a') as lines:
        lines.write('echo one more\n')
    assert heads(ask('--what', 'batch.sh.1'))['since then'] == found['since then']
    (project / 'train.sh').write_text('echo loss: 0\n')
    assert heads(ask('--what', 'batch.sh.1'))['since then'] == [
        'train.sh changed: execute_batch --reproduce batch.sh.1']
    (outcome,) = heads(ask('--what', 'batch.sh.2'))['outcome']
    assert re.fullmatch(r'exit code 3, after \d+s', outcome)


def test_each_end_has_its_words():
    ended = {'exit_code': 0, 'wall_s': 5}
    for state, event, text in (
            ('claimed', {}, 'runs, as far as is known here'),
            ('ended', ended, 'finished, exit code 0, after 5s; its results are not fetched'),
            ('collected', ended, 'finished, exit code 0, after 5s'),
            ('stopping', {}, 'was told to stop, and may still run'),
            ('cancelled', {}, 'was cancelled'), ('lost', {}, 'its machine lost the job')):
        assert dict(s.what_became(s.Past('a', {}, event, state, {})))['outcome'] == text


def test_a_job_of_a_cluster_may_end_before_it_begins():
    killed = {'exit_code': 143, 'wall_s': 0.0}
    past = s.Past('a', {'time': 60.0, 'where': 'c.yaml'}, killed, 'collected', {})
    waits = past.in_queue({'event': 'queued', 'number': '7', 'time': 61.0})
    for event, outcome, head, place in (
            (None, 'exit code 143, before it began', 'queued', 'c.yaml, number 7 in its queue'),
            ({'number': '7', 'node': 'n1'}, 'exit code 143, after 0s', 'started',
             'c.yaml, node n1, number 7 in its queue'),
            ({}, 'exit code 143, after 0s', 'started', 'c.yaml, number 7 in its queue')):
        then = waits if event is None else waits.in_queue(
            {'event': 'running', 'time': 90.0, **event})
        found = dict(s.what_became(then))
        assert found['outcome'] == outcome and head in found, found
        assert dict(s.where_it_ran(then))['machine'] == place


def test_the_journal_may_hear_late_of_an_end():
    ended = {'exit_code': 0, 'wall_s': 5.0, 'time': 900.0}
    for wall_s, at in (5.0, 65.0), (None, 900.0), (2000.0, 900.0):
        past = s.Past('a', {'time': 60.0}, {**ended, 'wall_s': wall_s}, 'collected', {})
        assert past.ended_at == at


def test_what_other_jobs_were(batches, run, run_cli, ask, gate, project):
    run_cli('execute_remote', '--machine=localhost', '--job-name=alone', 'echo hi')
    assert heads(ask('--what', 'alone'))['command'] == ['echo hi']
    run('exit 3')
    ask('batch.sh', '--rerun-failed', '--machines', 'localhost', *NO_GPU)
    assert heads(ask('--what', 'batch.sh.1~1'))['outcome'][0].startswith('exit code 3')
    assert heads(ask('batch.sh', '--what', '1'))['command'] == ['exit 3']
    batch = batches.start(['exit 3', gate.wait('a')], ['localhost'], *NO_GPU)
    batch.until('started: batch.sh.2')
    assert heads(ask('--what', 'batch.sh.2'))['outcome'] == ['runs, as far as is known here']
    gate.open('a')
    batch.end()
    for word in ('batch.sh.7', '../x', 'a\nb', '~', '7'):
        done = ask('--what', word)
        assert done.returncode == 2 and 'execute_batch: no job ' in done.stderr, done
        assert 'Traceback' not in done.stderr
    assert ask('--what', '.2').stdout == ask('--what', 'batch.sh.2').stdout
    (project / 'other.sh').write_text('true\n')
    ask('other.sh', '--machines', 'localhost', *NO_GPU)
    for word in ('2', '.2'):
        assert (f'no job {word} has started in this folder (did you mean batch.sh.2?). The jobs of '
                'a batch: execute_batch <batch> --status') in ask('--what', word).stderr
    assert heads(ask('--what', 'batch.sh.1'))['attempt'] == [
        '2, counted from the first start of the job']
    assert ask('batch.sh', '--what', '1', '--status').returncode == 2
    (INNER / 'sent').rename(INNER / 'elsewhere')
    assert heads(ask('--what', 'batch.sh.2'))['files'] == ['not recorded']


def test_a_record_that_is_damaged(run, ask):
    run('true')
    path = SENT / digest_of('batch.sh.1') / 'record.json'
    for text in ('', '[]', '{"commit": "x"}', '{"files": "a", "bytes": [], "kept": 1}'):
        path.write_text(text)
        assert heads(ask('--what', 'batch.sh.1'))['files'] == ['not recorded']


# ---- --reproduce ----

def lines_of(done):
    return [line for line in done.stdout.splitlines() if 'the same' in line]


def test_a_job_once_more_with_the_files_of_then(run, ask, project):
    (project / 'sub').mkdir()
    (project / 'sub/train.sh').write_text('echo $1; ls -l x empty; stat -c %Y x; cat link\n')
    (project / 'x').write_text('then')
    (project / 'x').chmod(0o750)
    os.utime(project / 'x', (1000, 1000))
    (project / 'link').symlink_to('x')
    (project / 'empty').mkdir()
    run('bash sub/train.sh a | tee made')
    then = result('batch.sh.1')
    assert b'rwxr-x---' in then and b'\n1000\nthen' in then
    (project / 'sub/train.sh').write_text('echo other\n')
    (project / 'x').unlink()
    (project / 'link').unlink()
    (project / 'batch.sh').unlink()
    (project / 'empty').rmdir()
    done = ask('batch.sh', '--reproduce', '1', '--machines', 'localhost')
    assert done.returncode == 0, done
    assert lines_of(done) == ['the same: all files, and all that is known of the machine',
                              'the same: stdout']
    assert 'finished: batch.sh.1-again; bash sub/train.sh a | tee made\n' in done.stdout
    # The job asked for no GPU and a tenth of a core.
    assert int(re.search("^machine limits:  {'localhost': ([0-9]+)}$", done.stdout, re.M)[1]) > 0
    assert result('batch.sh.1-again') == then == (RESULTS / 'batch.sh.1-again/made').read_bytes()
    assert sorted(os.listdir(RESULTS / 'batch.sh.1-again')) == ['made']
    (claim,) = claims('commands/batch.sh.1-again').values()
    assert (claim['files'], claim['reproduces']) == (digest_of('batch.sh.1'), 'batch.sh.1')
    assert heads(ask('--what', 'batch.sh.1-again'))['reproduces'] == ['batch.sh.1']
    assert not [name for name in os.listdir(INNER) if name.startswith('reproduce')]
    # Reproduce the job again, and also reproduce its reproduction.
    assert ask('--reproduce', 'batch.sh.1').returncode == 0
    assert ask('--reproduce', 'batch.sh.1-again').returncode == 0
    assert result('batch.sh.1-again-2') == result('batch.sh.1-again-again') == then


def test_no_commit_of_today_is_noted_of_what_was_sent_once(run, ask, git, project):
    (project / 'a').write_text('then')
    shutil.move(project / '.git', project.parent / 'aside')
    run('cat a')
    shutil.move(project.parent / 'aside', project / '.git')
    (project / 'a').write_text('now!')
    git('add', '-A')
    git('commit', '-qm', 'later')
    assert lines_of(ask('--reproduce', 'batch.sh.1'))[-1] == 'the same: stdout'
    assert 'commit' not in record()


def test_filters_have_no_say_in_what_was_sent_once(run, ask, project):
    (project / 'data').mkdir()
    (project / 'data/x').write_text('then')
    (project / '.rsync-filter').write_text('- data\n')
    run("execute_remote --copy-forwards=data/x --copy-forwards=.rsync-filter -- 'cat data/x'")
    assert result('batch.sh.1') == b'then'
    assert lines_of(ask('--reproduce', 'batch.sh.1')) == [
        'the same: all files, and all that is known of the machine', 'the same: stdout']


def test_files_that_were_sent_otherwise_are_told(project):
    (project / 'a').write_text('a')
    sent, pasts = s.Sent(str(INNER)), []
    for text in 'ab':
        (project / 'a').write_text(text)
        manifest = s.Manifest.of(s.scan_tree(['.'], ()), s.scan_tree((), ()))
        sent.claim(manifest)
        pasts.append(s.Past('x', {'files': manifest.digest}, {}, 'collected', {}))
    assert [*s.other_files(*pasts, sent)] == ['files: a']
    assert [*s.other_files(pasts[0], pasts[0], sent)] == []


def test_input_that_was_not_kept_is_told(run_cli, ask, project):
    run_cli('execute_remote', '--machine=localhost', '--stdin', '--job-name=in', 'cat',
            stdin='then')
    assert result('in') == b'then'
    assert lines_of(ask('--reproduce', 'in'))[0] == (
        'not the same: the standard input, which was not kept: the job gets none')


def test_what_cannot_be_the_same_is_said(batches, ask, project, lab):
    old, new = (lab(name=name, gpus=rig.fake_gpus(1)) for name in ('old', 'new'))
    (project / 'data').mkdir()
    (project / 'data/set').write_text('1')
    (project / 'big').write_bytes(bytes(2_000_000))
    (project / 'other').write_bytes(bytes(2_000_001))
    (project / 'lost').write_bytes(bytes(2_000_002))
    line = 'cat data/set; stat -c %s big other lost; true'
    batches.run([line], [old.yaml(env={'KEY': 'x'})], '--link-forwards', 'data', '--keep-files',
                '1', '--memory-required', '100')
    (project / 'data/set').write_text('2')
    (project / 'other').write_bytes(b'o' + bytes(1_999_999))
    (project / 'lost').unlink()
    done = ask('--reproduce', 'batch.sh.1', '--machines', new.yaml())
    said = lines_of(done)
    assert said[0] == ('not the same: data/set, other changed since, and no copy was kept: the '
                       'job gets the current files')
    assert said[1] == 'not the same: lost is gone, and no copy was kept: the job does not get it'
    assert 'not the same: variables none (then KEY)' in said
    assert said[-1] == ('not the same: stdout: diff job_results/batch.sh.1.out '
                        'job_results/batch.sh.1-again.out')
    assert result('batch.sh.1-again') == b'22000000\n2000000\n'


def test_another_gpu_is_told():
    def past(model, driver, gpus='0'):
        return s.Past('a', {'gpus': gpus}, {}, 'ended', {
            'gpus': [{'index': 0, 'model': model}], 'driver': driver, 'python': '3.11.2'})

    assert list(s.unlike_then(past('A100', '1'), past('A100', '1'))) == []
    assert list(s.unlike_then(past('A100', '1'), past('H200', '2'))) == [
        'GPU H200 (then A100)', 'driver of GPUs 2 (then 1)']
    unknown = s.Past('a', {}, {}, 'ended', {})
    assert list(s.unlike_then(unknown, past('A100', '1'))) == []


def test_what_is_beyond_the_store_comes_out_of_git(run, ask, git, project):
    (project / '.gitattributes').write_text('lines eol=crlf\n')
    (project / 'large').write_bytes(b'then' * 500_000)
    (project / 'lines').write_bytes(b'then\r\n' * 300_000)
    git('add', '-A')
    git('commit', '-qm', 'first')
    git('init', '-q', str(project.parent / 'other'))
    run('head -c 4 large; head -c 6 lines', options=['--keep-files', '1'],
        env={'GIT_DIR': str(project.parent / 'other/.git')})
    (project / 'large').write_bytes(b'now!' * 500_000)
    (project / 'lines').write_bytes(b'now!\r\n' * 300_000)
    git('commit', '-qam', 'second')
    done = ask('--reproduce', 'batch.sh.1')
    assert lines_of(done)[-1] == 'the same: stdout' and 'not the same' not in done.stdout, done
    assert result('batch.sh.1-again') == b'thenthen\r\n'


def test_a_store_that_somebody_changed_is_not_believed(run, ask, project):
    (project / 'a').write_text('then')
    run('cat a')
    (project / 'a').write_text('now!')
    for path in (SENT / 'store').iterdir():
        path.chmod(0o644)
        path.write_text('forged')
    done = ask('--reproduce', 'batch.sh.1')
    assert 'not the same: a changed since, and no copy was kept' in done.stdout.replace(
        'a and batch.sh', 'a')
    assert result('batch.sh.1-again') == b'now!'


def test_a_path_that_leads_out_is_not_written(run, ask, project, tmp_path):
    (project / 'a').write_text('then')
    run('cat a')
    path = SENT / digest_of('batch.sh.1') / 'files.json'
    files = json.loads(path.read_text())
    for bad in ('../../../../../out', f'{tmp_path}/out', '.git/hooks/x', 'job_results/x'):
        path.write_text(json.dumps({**files, bad: files['a']}))
        done = ask('--reproduce', 'batch.sh.1')
        assert done.returncode == 2 and 'had are not recorded' in done.stderr, done
    assert not (tmp_path / 'out').exists() and not (RESULTS / 'x').exists()


def test_the_same_command_continues_what_was_cut_off(batches, run, ask, project, lab, gate,
                                                     start_cli, ledger):
    machine = lab()
    (project / 'code').write_text(f'echo x >>{ledger}; {gate.wait("a")}; echo then')
    command = ['bash code']
    batch = batches.start(command, [machine], *NO_GPU)
    batch.until('started: ')
    gate.open('a')
    assert batch.end().returncode == 0
    (project / 'code').write_text('echo now')
    again = start_cli('execute_batch', '--reproduce', 'batch.sh.1')
    wait_until(lambda: ledger.read_text() == 'x\nx\n', 'that the job runs again')
    os.killpg(again.pid, signal.SIGKILL)
    again.wait()
    assert [name for name in os.listdir(INNER) if name.startswith('reproduce')]
    following = start_cli('execute_batch', '--reproduce', 'batch.sh.1')
    gate.open('a')
    said, complaint = following.communicate(timeout=60)
    assert following.returncode == 0, (said, complaint)
    assert result('batch.sh.1-again') == b'then\n' and ledger.read_text() == 'x\nx\n'
    assert not [name for name in os.listdir(INNER) if name.startswith('reproduce')]
    assert Counter(os.listdir(INNER / 'commands')) == {'batch.sh.1-again': 1}


def test_a_job_of_that_name_that_another_command_began_is_left_alone(run, run_cli, ask, project,
                                                                     start_cli, gate, ledger):
    (project / 'a').write_text('then')
    run('cat a')
    words = ('execute_remote', '--machine=localhost', '--job-name=batch.sh.1-again',
             f'echo x >>{ledger}; {gate.wait("a")}; echo other')
    other = start_cli(*words)
    wait_until(lambda: ledger.read_text(), 'that the other job runs')
    os.killpg(other.pid, signal.SIGKILL)
    other.wait()
    done = ask('--reproduce', 'batch.sh.1')
    assert lines_of(done)[-1] == 'the same: stdout', done
    assert heads(ask('--what', 'batch.sh.1-again-2'))['reproduces'] == ['batch.sh.1']
    gate.open('a')
    following = run_cli(*words)
    assert following.stdout == 'other\n' and ledger.read_text() == 'x\n'


def test_what_cannot_be_reproduced(run, ask, project):
    run('true')
    for words, why in ((['--copy-forwards', 'a'], '--copy-forwards cannot be given with'),
                       (['--joblog', 'x'], '--joblog cannot be given with --reproduce: it is'),
                       (['--dry-run'], 'give one of them')):
        done = ask('--reproduce', 'batch.sh.1', *words)
        assert done.returncode == 2 and why in done.stderr, done
    shutil.rmtree(SENT)
    done = ask('--reproduce', 'batch.sh.1')
    assert done.returncode == 2 and 'are not recorded, so it cannot be reproduced' in done.stderr


# ---- results_table, combine_folders ----

def test_a_table_tells_of_different_files_and_leaves_out_what_is_reproduced(run, ask, project):
    def table(*words):
        done = subprocess.run([sys.executable, ROOT / 'results_table.py', '--json', *words],
                              capture_output=True, text=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines()], done.stderr

    (project / 'code').write_text('echo loss: 1')
    run('bash code a')
    run('bash code a', 'bash code b')               # the batch file has changed
    rows, said = table()
    assert len(rows) == 2 and 'files' not in rows[0] and 'different' not in said
    (project / 'code').write_text('echo loss: 2')
    run('bash code a', 'bash code b', 'bash code c')
    ask('--reproduce', 'batch.sh.1')
    rows, said = table()
    assert [row['loss'] for row in rows] == [1, 1, 2]
    assert len({row['files'] for row in rows}) == 2 == len({row['files'] for row in rows[:2]}) + 1
    assert 'results of 2 different sets of files are mixed: 2 jobs ran with' in said
    (project / 'table.csv').write_text('a,b')
    run('bash code a', 'bash code b', 'bash code c', 'bash code d')
    rows, said = table('job_results/batch.sh.[34]')         # the pattern arrives as it is typed
    assert [row['job'] for row in rows] == ['batch.sh.3', 'batch.sh.4']
    assert '1 job ran without table.csv, which other jobs had' in said
    assert 'different sets' in table('job_results/batch.sh')[1]
    rows, _ = table('--earlier')
    assert [row['job'] for row in rows] == ['batch.sh.1', 'batch.sh.1-again', 'batch.sh.2',
                                            'batch.sh.3', 'batch.sh.4']


def test_results_of_different_files_are_told_when_they_are_combined(run, project):
    def combine(*sources):
        return subprocess.run([sys.executable, ROOT / 'combine_folders.py', *sources],
                              capture_output=True, text=True, check=True).stderr

    (project / 'code').write_text('1')
    run('echo 1 >a')
    run('echo 1 >a', 'echo 2 >b')                   # the batch file has changed
    assert combine('../one', *RESULTS.glob('batch.sh.?')) == ''
    (project / 'table.csv').write_text('a,b')
    run('echo 1 >a', 'echo 2 >b', 'echo 3 >c')
    assert combine('../more', *sorted(RESULTS.glob('batch.sh.?'))) == (
        'note: 2 jobs ran without table.csv, which other jobs had\n')
    (project / 'code').write_text('2')
    (project / 'table.csv').unlink()
    run('echo 1 >a', 'echo 2 >b', 'echo 3 >c', 'echo 4 >d')
    said = combine('../two', *sorted(RESULTS.glob('batch.sh.?')))
    assert said == ('note: these results were made with 3 different sets of files, for example '
                    'batch.sh.1 and batch.sh.3. What each had: execute_batch --what batch.sh.1\n')
    shutil.rmtree(SENT)
    assert '4 different sets' in combine('../three', *sorted(RESULTS.glob('batch.sh.?')))


def test_a_list_of_files_is_read_once_for_all_jobs(tmp_path, monkeypatch):
    inner, calls = tmp_path / 'job_results/.ssh_scheduler', []
    inner.mkdir(parents=True)
    (inner / 'journal').write_text(''.join(json.dumps(
        {'event': 'claimed', 'job': f'b.{n}', 'files': f'd{n // 50}', 'batch': 'b'}) + '\n'
        for n in range(100)))
    real = combine_folders.what_they_had
    monkeypatch.setattr(combine_folders, 'what_they_had',
                        lambda *words: calls.append(words) or real(*words))
    said = combine_folders.mixed_files([str(inner.parent / f'b.{n}') for n in range(100)])
    assert said.startswith('these results were made with 2 different sets of files, for example ')
    assert len(calls) == 2
