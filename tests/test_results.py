"""The folder job_results: no file in it is ever replaced, and its journal loses no event."""
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ssh_scheduler
from ssh_scheduler import ResultsError, ResultStore


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path / 'job_results')


@pytest.fixture
def store(folder):
    with_lock = ResultStore(folder).open()
    yield with_lock
    with_lock.close()


def claim(store, name='job', attempt=1, command='true'):
    store.journal.write(event='claimed', job=name, attempt=attempt, machine='ben@lab1:22',
                        gpus=None, command=command)


def commit(store, name, *came):
    store.commit(name, *came)
    store.journal.write(event='collected', job=name, kept=())


def set_aside(store, name, *came):
    store.journal.write(event='cancelled', job=name, kept=())
    store.set_aside(name, *came)


def test_results_appear_under_their_names(store, folder, tmp_path):
    came = tmp_path / 'came'
    (came / 'deep').mkdir(parents=True)
    (came / 'deep' / 'model').write_bytes(b'42')
    err = tmp_path / 'err'
    err.write_bytes(b'warned\n')
    claim(store)
    commit(store, 'job', {'out': b'said\n', 'err': str(err)}, str(came), True)
    assert open(f'{folder}/job.out').read() == 'said\n'
    assert open(f'{folder}/job.err').read() == 'warned\n'
    assert open(f'{folder}/job/deep/model').read() == '42'
    assert not came.exists() and not err.exists()
    assert store.journal.record('job')['state'] == 'collected'


@pytest.mark.parametrize('end', ['', '.out', '.err'])
@pytest.mark.parametrize('kind', ['file', 'folder', 'dangling link'])
def test_what_exists_is_seen_and_stays(store, folder, end, kind):
    path = f'{folder}/job{end}'
    if kind == 'file':
        open(path, 'w').write('mine')
    elif kind == 'folder':
        os.mkdir(path)
    else:
        os.symlink('nowhere', path)
    before = os.lstat(path)
    assert store.exists('job')
    claim(store)
    with pytest.raises((ResultsError, OSError)):
        commit(store, 'job', {'out': b'new', 'err': b'new'}, None, True)
    after = os.lstat(path)
    assert (before.st_ino, before.st_size, before.st_mode) == (
        after.st_ino, after.st_size, after.st_mode)


@pytest.mark.parametrize('content', [b'new', None])
def test_a_stream_that_something_else_made_stays(store, folder, tmp_path, content):
    claim(store)
    with open(f'{folder}/job.out', 'w') as file:
        file.write('mine')
    assert not store.grow('job', 'out', b'half')
    if content is None:
        (tmp_path / 'came').write_bytes(b'new')
        content = str(tmp_path / 'came')
    with pytest.raises((ResultsError, FileExistsError)):
        commit(store, 'job', {'out': content}, None, False)
    set_aside(store, 'job')
    assert open(f'{folder}/job.out').read() == 'mine'


def test_a_dangling_link_in_the_place_of_a_folder_stays(store, folder, tmp_path):
    claim(store)
    os.symlink('nowhere', f'{folder}/job')
    (tmp_path / 'came').mkdir()
    with pytest.raises(ResultsError, match='another program made .*job while job ran'):
        commit(store, 'job', {}, str(tmp_path / 'came'), True)
    assert os.readlink(f'{folder}/job') == 'nowhere' and (tmp_path / 'came').exists()


@pytest.mark.parametrize('ours', [True, False])
def test_a_commit_that_was_cut_off_is_known_by_its_folder(folder, tmp_path, ours):
    first = ResultStore(folder).open()
    claim(first)
    first.journal.write(event='ended', job='job', exit_code=0, wall_s=1.0)
    (tmp_path / 'came').mkdir()
    commit(first, 'job', {'out': b'', 'err': b''}, str(tmp_path / 'came'), True)
    first.close()
    journal = f'{folder}/.ssh_scheduler/journal'
    with open(journal) as file:
        lines = file.readlines()
    with open(journal, 'w') as file:
        file.writelines(lines[:-1])
    if not ours:
        os.rename(f'{folder}/job', tmp_path / 'ours')
        os.mkdir(f'{folder}/job')
    second = ResultStore(folder).open()
    assert second.exists('job')
    assert second.journal.record('job')['state'] == ('collected' if ours else 'ended')
    key = second.journal.key('job', 1)
    assert second.journal.remains('ben@lab1:22') == ([key] if ours else [], [])
    second.close()


def test_what_an_earlier_run_began_is_no_result_and_is_replaced(folder):
    first = ResultStore(folder).open()
    claim(first)
    first.grow('job', 'out', b'first half')
    first.close()
    second = ResultStore(folder).open()
    assert second.journal.record('job')['state'] == 'claimed' and not second.exists('job')
    assert second.grow('job', 'out', b'whole')
    assert open(f'{folder}/job.out').read() == 'whole'
    commit(second, 'job', {'out': b'whole one', 'err': b''}, None, False)
    assert open(f'{folder}/job.out').read() == 'whole one' and second.exists('job')
    second.close()
    third = ResultStore(folder).open()
    assert third.exists('job') and third.journal.record('job')['state'] == 'collected'
    third.close()


def test_a_stream_that_grew_is_replaced_by_the_whole_one(store, folder):
    claim(store)
    assert store.grow('job', 'out', b'first ')
    assert store.grow('job', 'out', b'second')
    assert open(f'{folder}/job.out').read() == 'first second'
    commit(store, 'job', {'out': b'first second third', 'err': b''}, None, False)
    assert open(f'{folder}/job.out').read() == 'first second third'
    assert not os.path.lexists(f'{folder}/job')


def test_the_second_is_told_who_holds_it(store, folder):
    with pytest.raises(ResultsError, match=f'in use by another run .process {os.getpid()} on '):
        ResultStore(folder).open()


def test_a_file_in_its_place_is_one_sentence(tmp_path):
    (tmp_path / 'job_results').write_text('mine')
    with pytest.raises(ResultsError, match='cannot be used'):
        ResultStore(str(tmp_path / 'job_results')).open()
    assert (tmp_path / 'job_results').read_text() == 'mine'


def test_where_nothing_was_claimed_nothing_is_left(folder):
    ResultStore(folder).open().close()
    assert not os.path.exists(folder)
    os.mkdir(folder)
    open(f'{folder}/notes', 'w').close()
    ResultStore(folder).open().close()
    assert os.listdir(folder) == ['notes']


def test_a_journal_torn_at_any_byte_forgets_no_whole_line(folder):
    with_all = ResultStore(folder).open()
    claim(with_all, 'a', 1, 'echo "ä"')
    with_all.journal.write(event='ended', job='a', exit_code=3, wall_s=1.5)
    claim(with_all, 'b', 2)
    with_all.journal.write(event='lost', job='b')
    with_all.close()
    path = f'{folder}/.ssh_scheduler/journal'
    whole = open(path, 'rb').read()
    for length in range(len(whole) + 1):
        with open(path, 'wb') as file:
            file.write(whole[:length])
        store = ResultStore(folder)
        store.journal.open()
        expected = {}
        for line in whole[:length].split(b'\n')[:-1]:
            event = json.loads(line)
            if 'job' in event:
                expected[event['job']] = event['event']
        assert {name: job['state'] for name, job in store.journal.jobs.items()} == expected
        claim(store, 'later')           # the new line is not glued to a torn one
        store.close()
        again = ResultStore(folder).peek().journal
        assert again.record('later')['state'] == 'claimed'
        assert all(again.record(name)['state'] == state for name, state in expected.items())


@pytest.mark.parametrize('line', [
    'this is no JSON', '5', 'null', '[]', '"claimed"', '{}', '{"event": "ended"}',
    '{"event": "lost", "job": "job"} {}', '{"event": "lost", "job": "job"},',
    '{"event": "ended", "job": "nobody"}', '{"event": "claimed", "job": "x"}', '', '\xff',
    '{"event": "claimed", "job": ["x"], "command": "", "machine": "", "attempt": 1}'])
def test_a_journal_that_lies_is_refused_with_its_line(folder, line):
    store = ResultStore(folder).open()
    claim(store)
    store.close()
    with open(f'{folder}/.ssh_scheduler/journal', 'a', encoding='latin-1') as file:
        file.write(f'{line}\n' + '{"event": "lost", "job": "job"}\n')
    with pytest.raises(ResultsError, match='journal, line 3 cannot be read'):
        ResultStore(folder).open()


def test_what_an_interrupted_job_wrote_is_set_aside(store, folder):
    claim(store)
    store.grow('job', 'out', b'half')
    set_aside(store, 'job')
    assert not store.exists('job')
    aside = os.listdir(f'{folder}/.ssh_scheduler/cancelled')
    assert len(aside) == 1 and aside[0].startswith('job.') and aside[0].endswith('.out')


def test_streams_that_were_fetched_are_as_readable_as_others(store, folder, tmp_path):
    for name, put in (('job', commit), ('cancelled', set_aside)):
        claim(store, name)
        came = tmp_path / name
        came.write_bytes(b'long')
        came.chmod(0o600)
        put(store, name, {'out': b'short', 'err': str(came)}, None, *[False] * (name == 'job'))
    paths = [f'{folder}/job', *{path[:-4] for path in map(str, (
        tmp_path / 'job_results/.ssh_scheduler/cancelled').iterdir())}]
    for path in paths:
        assert os.stat(f'{path}.err').st_mode == os.stat(f'{path}.out').st_mode


def test_a_cancelled_job_may_run_again_in_another_run(folder):
    store = ResultStore(folder).open()
    claim(store)
    set_aside(store, 'job')
    store.close()
    again = ResultStore(folder).open()
    assert again.journal.record('job')['state'] == 'cancelled' and not again.exists('job')
    again.close()


@contextlib.contextmanager
def no_file_beyond(size):
    """Make the system write files only up to this size, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_line_of_which_only_a_part_was_written_is_taken_back(store, folder):
    claim(store, 'a')
    size = os.path.getsize(f'{folder}/.ssh_scheduler/journal')
    with no_file_beyond(size + 7), pytest.raises(ResultsError, match='No space left on device'):
        claim(store, 'b')
    assert os.path.getsize(f'{folder}/.ssh_scheduler/journal') == size
    claim(store, 'c')
    store.close()
    again = ResultStore(folder).open()
    assert set(again.journal.jobs) == {'a', 'c'}
    again.close()


def test_a_stream_of_which_only_a_part_was_written_is_an_error(store):
    claim(store)
    with no_file_beyond(4000), pytest.raises(OSError):
        commit(store, 'job', {'out': b'x' * 5000}, None, False)
    assert store.journal.record('job')['state'] == 'claimed'


def test_a_full_disk_under_the_journal_is_one_sentence(store, monkeypatch):
    journal = store.journal
    os.close(journal._fd)
    journal._fd = os.open('/dev/full', os.O_WRONLY)
    monkeypatch.setattr(journal, 'check', lambda: None)     # check() would notice the other file
    with pytest.raises(ResultsError, match='cannot be written: No space left on device'):
        claim(store)
    assert journal.jobs == {}               # as a new reader finds it


def test_what_could_not_be_noted_has_not_happened(store, monkeypatch):
    """Else a folder on a machine would be removed although the journal expects results in it."""
    claim(store)
    real, journal = store.journal._fd, store.journal
    store.journal._fd = os.open('/dev/full', os.O_WRONLY)
    monkeypatch.setattr(journal, 'check', lambda: None)
    with pytest.raises(ResultsError):
        journal.write(event='collected', job='job', kept=())
    os.close(journal._fd)
    journal._fd = real
    assert journal.record('job')['state'] == 'claimed'
    assert journal.remains('ben@lab1:22') == ([], [])


def test_an_incoming_folder_is_private_and_can_be_discarded(store):
    incoming = store.incoming()
    assert os.stat(incoming).st_mode & 0o777 == 0o700
    os.mkdir(f'{incoming}/locked')
    open(f'{incoming}/locked/file', 'w').close()
    os.chmod(f'{incoming}/locked', 0o500)
    store.discard(incoming)
    assert not os.path.exists(incoming)


def test_what_was_on_its_way_when_a_run_was_killed_is_removed(store, folder):
    os.mkdir(f'{store.incoming()}/half')
    open(f'{store.incoming()}.tar', 'w').close()
    claim(store)
    store.close()
    ResultStore(folder).open().close()
    assert sorted(os.listdir(f'{folder}/.ssh_scheduler')) == ['journal', 'lock']


def test_importing_made_nothing_here():
    assert ssh_scheduler.ResultStore('x').journal.jobs == {}
    assert not os.path.exists('x')


# ---- Many jobs ----

def test_a_job_that_was_collected_costs_little_memory(store, folder):
    """A batch of 50,000 lines has as many such jobs, and they take most of its client's memory."""
    count = 2000
    for number in range(count):
        name = f'batch.sh.{number}'
        store.journal.write(
            event='claimed', job=name, attempt=1, machine='ben@lab1:22', gpus='0', own='',
            command=f'./train --seed={number}', where='lab1.yaml', backwards=None,
            batch='batch.sh', files='5ce449d2aab8f64e')
        store.journal.write(event='ended', job=name, exit_code=0, wall_s=1.0, cpu_s=0.5)
        store.journal.write(event='committing', job=name, inode=10**6 + number, kept=[])
        store.journal.write(event='collected', job=name, kept=[])
    store.journal.write(event='tidied', machine='ben@lab1:22')
    tracemalloc.start()
    try:
        reader = ResultStore(folder).peek()
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(reader.journal.jobs) == count
    assert taken / count < 550          # bytes; a dict takes 1,800


def test_facts_of_a_claim_that_nobody_asks_for_are_no_error(store):
    store.journal.write(event='claimed', job='job', attempt=1, machine='m', command='true',
                        items=1, get=2)
    record = store.journal.record('job')
    assert 'where' not in record and record.get('where', 'x') == 'x'
    assert dict(record) == {'attempt': 1, 'machine': 'm', 'command': 'true', 'state': 'claimed',
                            'key': record['key'], 'time': record['time'], 'resumed': None}
    with pytest.raises(KeyError):
        record['where']


NAMES = ('a', 'a.out', 'a.err', 'a.out.out', 'b')
ENDS = ('', '.out', '.err')


@settings(deadline=None, derandomize=True, max_examples=200)
@given(here=st.sets(st.tuples(st.sampled_from(NAMES), st.sampled_from(ENDS))),
       states=st.fixed_dictionaries({name: st.sampled_from(
           [None, 'claimed', 'ended', 'collected', 'lost', 'cancelled']) for name in NAMES}))
def test_one_look_finds_what_is_there(here, states):
    with tempfile.TemporaryDirectory() as folder:
        for number, path in enumerate({f'{folder}/{name}{end}' for name, end in here}):
            os.symlink('nowhere', path) if number % 2 else open(path, 'x').close()
        store = ResultStore(folder).open()
        for name, state in states.items():
            if state:
                claim(store, name)
            if state not in (None, 'claimed'):
                store.journal.write(event=state, job=name, exit_code=0, kept=())
        before = [(store.exists(name), store.is_done(name), store.remnants(name)) for name in NAMES]
        store.present.look()
        after = [(store.exists(name), store.is_done(name), store.remnants(name)) for name in NAMES]
        assert after == before
        for name in NAMES:
            assert store.is_done(name) == (states[name] == 'collected' and any(
                os.path.lexists(f'{folder}/{name}{end}') for end in ENDS))
        store.close()


def test_the_results_of_many_jobs_are_found_with_one_look(store, folder, monkeypatch):
    for number in range(100):
        claim(store, f'batch.sh.{number}', command=f'echo {number}')
        commit(store, f'batch.sh.{number}', {'out': b'', 'err': b''}, None, True)
    jobs = [ssh_scheduler.Job(f'batch.sh.{number}', f'echo {number}', number, None, None)
            for number in range(100)]
    monkeypatch.setattr(os.path, 'lexists', None)
    monkeypatch.setattr(os, 'lstat', None)
    lines = ssh_scheduler.match_lines(jobs, 'batch.sh', store)
    assert len(lines.done) == 100 and lines.usual == {}
    assert not any(store.remnants(job.name) for job in lines.done)


def test_a_job_that_is_claimed_anew_is_looked_for_anew(store, folder):
    claim(store)
    commit(store, 'job', {'out': b'', 'err': b''}, None, False)
    store.present.look()
    for end in ('.out', '.err'):
        os.unlink(f'{folder}/job{end}')
    assert store.exists('job')              # as the last look found it
    claim(store, 'job', 2)
    commit(store, 'job', {'out': b'', 'err': b''}, None, False)
    assert store.exists('job')
    os.unlink(f'{folder}/job.out')
    assert store.remnants('job') == [f'{folder}/job.err']


# ---- Generated names ----

TAKER = """
import os, sys
import ssh_scheduler as s
os.read(0, 1)                           # until all are here
for _ in range(20):
    print(s.take_name('name'))
"""


def test_no_two_clients_take_the_same_name(tmp_path):
    """Eight processes at once, each of which begins when the same pipe closes."""
    root = os.path.dirname(ssh_scheduler.__file__)
    ready, go = os.pipe()
    clients = [subprocess.Popen([sys.executable, '-c', TAKER], stdin=ready, cwd=tmp_path, text=True,
                                stdout=subprocess.PIPE, env={**os.environ, 'PYTHONPATH': root})
               for _ in range(8)]
    os.close(ready)
    os.close(go)
    names = [name for client in clients for name in client.communicate(timeout=60)[0].split()]
    assert sorted(names, key=lambda name: (len(name), name)) == [
        'name', *(f'name-{number}' for number in range(2, 161))]


@pytest.mark.parametrize('there', ['job_results', 'job_results/.ssh_scheduler',
                                   'job_results/.ssh_scheduler/commands'])
def test_a_file_in_the_way_of_a_name_is_a_sentence(tmp_path, monkeypatch, there):
    monkeypatch.chdir(tmp_path)
    os.makedirs(os.path.dirname(there) or '.', exist_ok=True)
    open(there, 'w').close()
    with pytest.raises(ResultsError, match='^job_results, where results go, cannot be used: '):
        ssh_scheduler.take_name('name')
