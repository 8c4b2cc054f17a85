"""The life of a job: the table LIFE, streams and the journal; and flows that wait for children."""
import collections
import contextlib
import fcntl
import gc
import json
import os
import shutil
import sys
import tempfile
import termios
import time
import weakref

import pytest
import rig
from batching import wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import ssh_scheduler as s
from ssh_scheduler import LIFE

ANY = settings(deadline=None, derandomize=True, max_examples=500)
WALKS = settings(deadline=None, derandomize=True, max_examples=150, stateful_step_count=50)


F_GETPIPE_SZ = 1032         # fcntl has the name since Python 3.10


# ---- Stream ----

CONTENT = bytes(range(1, 51))
PIECES = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 25), st.booleans()), max_size=12)


class Watched:
    """A Stream, the bytes that it stored and showed, and a model: `here`, `kept` and `lags`."""

    def __init__(self, stores, shows):
        self.stores, self.shows = stores, shows
        self.stored = self.shown = b''
        self.here = self.kept = 0
        self.lags = False               # something was shown that could not be stored
        self.works = True
        self.stream = s.Stream(self.store if stores else None, self.show if shows else None)

    def store(self, data):
        assert data
        self.stored += data if self.works else b''
        return self.works

    def show(self, data):
        self.shown += data

    def bring(self, content, offset, length, works):
        data, self.works = content[offset:offset + length], works
        if offset <= self.here < offset + len(data):
            stored = works and not self.lags
            if stored or self.shows or not self.stores:
                self.here = offset + len(data)
            if self.stores and stored:
                self.kept = self.here
            self.lags = self.stores and self.shows and not stored
        self.stream.bring(offset, data)
        self.check(content)

    def check(self, content):
        assert (self.stream.here, self.stream.stored) == (self.here, not self.lags)
        assert self.stored == content[:self.kept]
        assert self.shown == (content[:self.here] if self.shows else b'')


@ANY
@given(stores=st.booleans(), shows=st.booleans(), size=st.integers(0, 50), before=PIECES,
       after=PIECES, comes_with_end=st.booleans(), cut=st.integers(0, 50))
def test_each_byte_of_a_stream_is_taken_once_whoever_brings_it(stores, shows, size, before, after,
                                                               comes_with_end, cut):
    content, watched = CONTENT[:size], Watched(stores, shows)
    stream = watched.stream
    assert stream.shown == shows
    for piece in before:
        watched.bring(content, *piece)
        assert not stream.whole                 # more may come
    stream.complete(content if comes_with_end else None, size)
    if comes_with_end and shows:
        watched.here = size
    watched.check(content)
    assert stream.whole == (comes_with_end or watched.here == size)
    for piece in after if shows else ():        # a follower is behind
        watched.bring(content, *piece)
        assert stream.whole == (comes_with_end or watched.here == size)
    rest = content[watched.here:]
    stream.show_rest([rest[:cut], rest[cut:]])
    assert watched.shown == (content if shows else b'')
    assert stream.here == (size if shows else watched.here)


@ANY
@given(first=st.integers(0, 50), sizes=st.lists(st.integers(1, 9), min_size=10, max_size=10),
       turns=st.lists(st.booleans(), min_size=20, max_size=20), shows=st.booleans())
def test_a_look_and_a_follower_bring_all_of_a_stream(first, sizes, turns, shows):
    """The look and the follower each continue from their own place; together they leave no gap."""
    watched, at = Watched(True, shows), {True: 0, False: 0}
    sizes = iter(sizes * 2)
    for turn in turns:
        if not turn and at[False] == 0:
            at[False] = min(first, watched.here)        # the follower starts
        size = next(sizes)
        watched.bring(CONTENT, at[turn], size, True)
        at[turn] += size
    while watched.here < len(CONTENT):
        watched.bring(CONTENT, watched.here, 7, True)
    assert watched.stored == CONTENT and watched.shown == (CONTENT if shows else b'')


# ---- The table ----

def ways(starts, closed=()):
    """Return {state: the shortest way to it from one of the starts}, avoiding closed states."""
    found = {start: (start,) for start in starts}
    todo = collections.deque(starts)
    while todo:
        state = todo.popleft()
        for then in LIFE[state].then:
            if then not in found and then not in closed:
                found[then] = (*found[state], then)
                todo.append(then)
    return found


def test_the_table_names_its_own_states_and_each_can_be_reached():
    named = {state for row in LIFE.values() for state in row.then}
    groups = (s.UNSEEN, s.ALIVE, s.UNCOLLECTED, s.ARRIVING, s.HOLDING, s.AWAITED, s.FORGOTTEN)
    assert named | {state for group in groups for state in group} <= LIFE.keys()
    # An earlier run leaves incomplete results.
    assert ways(['waiting', 'incomplete']).keys() == LIFE.keys()
    for row in (*(row.then for row in LIFE.values()), *groups):
        assert len(set(row)) == len(row)


def test_no_state_comes_twice():
    """`queued` is the exception: the reason why a job is queued may change."""
    for state, row in LIFE.items():
        then = set(row.then) - ({'queued'} if state == 'queued' else set())
        assert state not in ways(then), state


def test_nothing_follows_what_the_journal_has_not_claimed():
    """A job may run only after its claim is in the journal."""
    assert ways(['waiting'], closed=['claimed']).keys() == {'waiting', 'placed', 'returned'}
    assert not any(LIFE[state].written for state in ('waiting', 'placed', 'returned'))
    assert [state for state in LIFE if LIFE[state].written == 'claimed'] == ['claimed']


def test_results_are_collected_once_and_only_of_what_has_ended():
    assert {state for state, row in LIFE.items() if 'collected' in row.then} == {
        'ended', 'incomplete'}
    assert [state for state in LIFE if LIFE[state].written == 'collected'] == ['collected']
    assert not LIFE['collected'].then and 'cancelled' not in LIFE['ended'].then


def test_room_is_held_from_placing_to_the_end_and_never_again():
    assert set(s.HOLDING) == {'placed', 'claimed', 'queued', 'running', 'stopping'}
    assert set(s.ALIVE) == set(s.HOLDING) - {'placed'} and set(s.UNSEEN) < set(s.ALIVE)
    for state, row in LIFE.items():
        assert row.holds == (state in s.HOLDING)
        if not row.holds and state != 'waiting':
            assert not any(LIFE[then].holds for then in row.then), state


def test_what_is_over_is_not_awaited_and_only_what_a_person_is_told_of_is_kept_in_memory():
    over = {state for state, row in LIFE.items() if not row.then}
    assert not over & set(s.AWAITED) and not set(s.FORGOTTEN) & {*s.AWAITED, 'waiting'}
    assert over - set(s.FORGOTTEN) == {
        state for state, row in LIFE.items() if row.written == 'cancelled'}


def test_the_next_run_knows_of_all_that_is_over():
    """Else the run would ask for the job again.  `returned` and `unfetched` write no event."""
    over = {state for state, row in LIFE.items() if not row.then or state in s.FORGOTTEN}
    assert {state for state in over if not LIFE[state].written} == {'returned', 'unfetched'}


@pytest.fixture
def journal(tmp_path):
    journal = s.Journal(str(tmp_path / 'journal'))
    journal.open()
    yield journal
    journal.close()


CLAIM = {'attempt': 1, 'machine': 'lab1', 'gpus': None, 'command': 'true'}
FACTS = {'claimed': CLAIM, 'ended': {'exit_code': 3, 'wall_s': 1.5}, 'collected': {'kept': ()},
         'cancelled': {'kept': ()}, 'queued': {'number': '7', 'why': 'no room now', 'start': None}}


def test_the_journal_understands_the_words_of_the_table(journal):
    words = {row.written for row in LIFE.values()} - {''}
    assert words == {'claimed', 'queued', 'ended', 'collected', 'lost', 'cancelled', 'stopping'}
    for word in words:
        journal.write(event='claimed', job=word, **CLAIM)
        if word != 'claimed':
            journal.write(event=word, job=word, **FACTS.get(word, {}))
        again = s.Journal(journal.path)
        again.peek()
        for known in (journal, again):
            # A job that is being stopped may still run.
            assert known.record(word)['state'] == (
                'claimed' if word in ('stopping', 'queued') else word)
            assert known.record(word).get('queued') == (
                ['7', 'no room now', None] if word == 'queued' else None)
            assert bool(known.record(word).get('stopping')) == (word == 'stopping')
            assert known.is_begun(word) == (word in ('claimed', 'queued', 'ended', 'stopping'))
            assert known.record(word).get('exit_code') == (3 if word == 'ended' else None)
            collected, others = known.remains('lab1')
            assert (known.key(word, 1) in collected) == (word == 'collected')
            assert (known.key(word, 1) in others) == (word in ('lost', 'cancelled'))


# ---- Lives: the moves of the table, and all others ----

def attempt_of(name='job', machine='lab1', key=None, record=None):
    return s.Attempt(s.Job(name, 'true', 1, None, None), machine, key or f'{name}.1-0',
                     record or dict(CLAIM, machine=machine))


class Notes:
    """A fake Journal: it keeps the written events, or refuses them if not `works`."""

    def __init__(self):
        self.events, self.works = [], True

    def write(self, **event):
        if not self.works:
            raise s.ResultsError('the disk is full')
        self.events.append(event)


@pytest.mark.parametrize('before', LIFE)
def test_moves_that_the_table_has_are_told_and_all_others_change_nothing(before):
    for state in LIFE:
        notes, told = Notes(), []
        lives = s.Lives(notes, lambda *what, told=told, notes=notes: told.append(
            (*what, what[0].state, what[0].why, [*notes.events])))
        attempt = attempt_of()
        lives.restore(attempt, before)
        attempt.why = 'before'
        word = LIFE[state].written
        notes.works = not word
        if state not in LIFE[before].then or word:
            error = s.ResultsError if state in LIFE[before].then else AssertionError
            with pytest.raises(error, match='disk is full' if error is s.ResultsError else
                               rf'job\.1-0: {before} -> {state} \[this is a bug\]'):
                lives.move(attempt, state, 'why', fact=1)
            assert (attempt.state, attempt.why, told, notes.events) == (before, 'before', [], [])
            assert lives.all_of(*LIFE) == lives.of('lab1', before) == [attempt]
        if state not in LIFE[before].then:
            continue
        notes.works = True
        lives.move(attempt, state, 'why', fact=1)
        how = {'how': state} if word == 'lost' else {}
        events = [{'event': word, 'job': 'job', **how, 'fact': 1}] if word else []
        assert told == [(attempt, before, state, 'why', events)]
        assert (attempt.state, notes.events) == (state, events)
        assert lives.all_of(*LIFE) == lives.of('lab1', state) == (
            [] if state in s.FORGOTTEN else [attempt])


def test_a_reason_is_that_of_the_last_move():
    lives, attempt = s.Lives(Notes(), lambda *_: None), attempt_of()
    lives.restore(attempt, 'claimed')
    lives.move(attempt, 'refused', 'no bash')
    assert attempt.why == 'no bash'
    lives.move(attempt, 'cancelled')
    assert attempt.why == ''


@pytest.mark.parametrize('state', s.FORGOTTEN)
def test_what_is_over_takes_no_memory(state):
    lives = s.Lives(Notes(), lambda *_: None)
    attempt = attempt_of()
    start, *way = ways(['waiting', 'incomplete'])[state]
    if start != 'waiting':
        lives.restore(attempt, start)
    for then in way:
        lives.move(attempt, then)
    gone = weakref.ref(attempt)
    del attempt
    gc.collect()
    assert gone() is None


# ---- Lives and the Journal, in any order of moves ----

NAMES, MACHINES = ('a', 'b', 'c'), ('lab1', 'lab2')
KEPT = ((), ('x',), True)


class Brittle(s.Journal):
    """A journal whose disk is full at times."""

    full = False

    def write(self, **event):
        if self.full:
            raise s.ResultsError('the disk is full')
        super().write(**event)


def plain(jobs):
    """Return the records as a file has them, without the time and the mark `resumed`."""
    return {name: {key: value for key, value in record.items() if key not in ('time', 'resumed')}
            for name, record in json.loads(json.dumps(jobs, default=dict)).items()}


class AnyLife(RuleBasedStateMachine):
    """Attempts begin, move as LIFE allows, and the next run takes them up.

    The model notes the state of each attempt, and what the journal must know.
    """

    def __init__(self):
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.path = os.path.join(self.folder, 'journal')
        self.known = {}                 # job name -> (its last event, key, machine, kept)
        self.remains = collections.defaultdict(dict)    # machine -> {key: word}
        self.told = []
        self.open()

    def open(self):
        """Begin a run."""
        self.journal = Brittle(self.path)
        self.journal.open()
        self.lives = s.Lives(self.journal, self.changed)
        self.latest = {}                # job name -> its last Attempt
        self.places = {}                # Attempt -> (machine, state), in the order of their arrival
        for name, record in self.journal.jobs.items():
            state = ('claimed' if record['state'] in ('claimed', 'ended') else
                     'incomplete' if record['state'] == 'collected' and
                     record.get('kept') not in (None, True, []) else '')
            if state:
                attempt = attempt_of(name, record['machine'], record['key'], record)
                self.latest[name] = attempt
                self.lives.restore(attempt, state)
                self.places[attempt] = attempt.machine, state

    def changed(self, attempt, before):
        """Check a change: Lives must already answer with the new state."""
        state, word = attempt.state, LIFE[attempt.state].written
        if word:
            with open(self.path) as file:
                last = json.loads(file.readlines()[-1])
            assert (last['event'], last['job']) == (word, attempt.name)
            record = self.journal.record(attempt.name)
            assert record[word] if word in ('stopping', 'queued') else record['state'] == word
        assert (attempt in self.lives.of(attempt.machine, state)) == (state not in s.FORGOTTEN)
        assert before == state or attempt not in self.lives.of(attempt.machine, before)
        self.told.append((attempt, before))

    # Rules

    @rule(name=st.sampled_from(NAMES), machine=st.sampled_from(MACHINES))
    def a_job_begins(self, name, machine):
        former = self.latest.get(name)
        if not former or former.state not in ('waiting', *s.AWAITED):
            self.begin(name, machine)

    @rule(name=st.sampled_from(NAMES), machine=st.sampled_from(MACHINES), number=st.integers(0, 7),
          kept=st.sampled_from(KEPT), why=st.sampled_from(['', 'gone']))
    def it_moves(self, name, machine, number, kept, why):
        attempt = self.latest.get(name)
        if not attempt or not LIFE[attempt.state].then:
            attempt = self.begin(name, machine)
        then = LIFE[attempt.state].then
        self.move(attempt, then[number % len(then)], number, kept, why)

    @rule(name=st.sampled_from(NAMES), machine=st.sampled_from(MACHINES), steps=st.integers(1, 6),
          kept=st.sampled_from(KEPT))
    def it_goes_on_as_most_jobs_do(self, name, machine, steps, kept):
        attempt = self.latest.get(name)
        if not attempt or not LIFE[attempt.state].then:
            attempt = self.begin(name, machine)
        for _ in range(steps):
            if attempt.state in self.USUAL:
                self.move(attempt, self.USUAL[attempt.state], 0, kept, '')

    USUAL = {'waiting': 'placed', 'placed': 'claimed', 'claimed': 'running', 'running': 'ended',
             'ended': 'collected', 'incomplete': 'collected'}

    def begin(self, name, machine):
        number = self.journal.record(name).get('attempt', 0) + 1
        record = dict(CLAIM, attempt=number, machine=machine, own=f'of {number}')
        self.latest[name] = attempt_of(name, machine, self.journal.key(name, number), record)
        return self.latest[name]

    def move(self, attempt, state, number, kept, why):
        before, word = attempt.state, LIFE[state].written
        facts = {'claimed': attempt.record, 'ended': {'exit_code': number},
                 'collected': {'kept': kept}, 'cancelled': {'kept': kept},
                 'queued': FACTS['queued']}.get(word, {})
        self.lives.move(attempt, state, why, **facts)
        assert (attempt.state, attempt.why) == (state, why)
        assert self.told.pop() == (attempt, before) and not self.told
        self.places.pop(attempt, None)
        if state not in s.FORGOTTEN:
            self.places[attempt] = attempt.machine, state
        if word:
            self.notes(word, attempt, facts.get('kept', ()))
        assert word != 'ended' or self.journal.record(attempt.name)['exit_code'] == number

    @rule(name=st.sampled_from(NAMES), state=st.sampled_from(sorted(LIFE)), full=st.booleans())
    def it_cannot_move(self, name, state, full):
        attempt = self.latest.get(name)
        may = attempt and state in LIFE[attempt.state].then
        if not attempt or may and not (full and LIFE[state].written):
            return
        before, size = (attempt.state, attempt.why, attempt.machine), os.path.getsize(self.path)
        records = plain(self.journal.jobs)
        self.journal.full = full
        with pytest.raises(s.ResultsError if may else AssertionError):
            self.lives.move(attempt, state, 'why', **FACTS.get(LIFE[state].written, {}))
        self.journal.full = False
        assert (attempt.state, attempt.why, attempt.machine) == before and not self.told
        assert (plain(self.journal.jobs), os.path.getsize(self.path)) == (records, size)

    @rule(name=st.sampled_from(NAMES))
    def it_is_found_by_another_name(self, name):
        attempt = self.latest.get(name)
        if attempt in self.places:
            machine, state = self.places.pop(attempt)
            other = MACHINES[1 - MACHINES.index(machine)]
            self.lives.rebind(attempt, other)
            self.places[attempt] = other, state
            assert attempt.machine == other and not self.told

    @rule(name=st.sampled_from(NAMES), kept=st.sampled_from(KEPT))
    def its_folder_is_about_to_appear(self, name, kept):
        attempt = self.latest.get(name)
        while attempt and attempt.state in self.USUAL and attempt.state != 'ended':
            self.move(attempt, self.USUAL[attempt.state], 0, kept, '')
        if attempt and attempt.state == 'ended':
            self.journal.write(event='committing', job=name, inode=7, kept=kept)
            self.known[name] = (*self.known[name][:3], kept)

    @rule(machine=st.sampled_from(MACHINES))
    def a_machine_is_tidied(self, machine):
        size = os.path.getsize(self.path)
        self.journal.tidied(machine)
        assert (os.path.getsize(self.path) > size) == bool(self.remains.pop(machine, None))

    @rule()
    def the_next_run_goes_on(self):
        former, looked = self.journal, s.Journal(self.path)
        looked.peek()
        former.close()
        self.open()
        for journal in (looked, self.journal):
            assert plain(journal.jobs) == plain(former.jobs)
            assert all(record['resumed'] == (record['state'] != 'collected')
                       for record in journal.jobs.values())
            if former.jobs:
                assert journal.identity == former.identity
            for machine in MACHINES:
                assert journal.remains(machine) == former.remains(machine)
        with open(self.path) as file:
            events = [json.loads(line)['event'] for line in file]
        assert events.count('journal') == bool(events) and events[:1] in ([], ['journal'])

    def notes(self, word, attempt, kept):
        """Note what the journal must record: the event, and useless folders on the machine."""
        if word == 'claimed':
            _, key, machine, before = self.known.get(attempt.name, ('', '', '', ()))
            if before:
                self.remains[machine][key] = 'collected'
            self.known[attempt.name] = word, attempt.key, attempt.record['machine'], ()
        if word in ('claimed', 'queued', 'stopping'):
            return
        _, key, machine, _ = self.known[attempt.name]
        self.known[attempt.name] = word, key, machine, kept
        if word != 'ended' and not kept:
            self.remains[machine][key] = word

    # Invariants

    def here(self, machine, *states):
        return [attempt for state in states for attempt, place in self.places.items()
                if place == (machine, state)]

    @invariant()
    def questions_have_the_answers_of_the_model(self):
        groups = [(state,) for state in LIFE] + [s.ALIVE, s.AWAITED, ('ended', 'claimed'), ()]
        for states in groups:
            everywhere = self.lives.all_of(*states)
            assert len(everywhere) == len(set(everywhere))
            assert set(everywhere) == {a for a, place in self.places.items() if place[1] in states}
            for machine in MACHINES:
                here = self.here(machine, *states)
                assert self.lives.of(machine, *states) == here
                assert self.lives.any_of(machine, *states) == bool(here)
                for attempt in self.latest.values():
                    assert self.lives.get(machine, attempt.key, *states) is (
                        attempt if attempt in here else None)

    @invariant()
    def the_journal_knows_what_was_written(self):
        assert self.journal.jobs.keys() == self.known.keys()
        for name, (word, key, machine, kept) in self.known.items():
            record = self.journal.record(name)
            assert (record['state'], record['key'], record['machine'], record.get('kept') or ()
                    ) == (word, key, machine, [*kept] if isinstance(record.get('kept'), list) and
                          kept else kept)
            assert self.journal.is_begun(name) == (word in ('claimed', 'ended'))
            assert record['own'] == f'of {record["attempt"]}'
        for machine in MACHINES:
            remains = self.remains[machine]
            assert self.journal.remains(machine) == (
                [key for key, word in remains.items() if word == 'collected'],
                [key for key, word in remains.items() if word != 'collected'])

    def teardown(self):
        try:
            self.the_next_run_goes_on()
        finally:
            self.journal.close()
            shutil.rmtree(self.folder)


TestAnyLife = AnyLife.TestCase
TestAnyLife.settings = WALKS


# ---- Flows ----

class Lab:
    """Flows of real children; the test sets the time of their timers."""

    def __init__(self):
        self.now = 0.0
        self.processes = s.Processes(clock=lambda: self.now)
        self.flows = s.Flows(self.processes)
        self.seen, self.children = [], []

    def child(self, script):
        """Start a child and return its Process."""
        child = self.processes.start(['sh', '-c', script], s.ignore, None)
        self.children.append(child)
        return child

    def awaited(self, step):
        """Return what a flow yields for a step: a script to run, or a time."""
        return self.child(step) if isinstance(step, str) else step

    def flow(self, name, *steps):
        """Note the result of each step, then the end of the flow, which follows its child's end."""
        awaited = None
        try:
            for step in steps:
                awaited = self.awaited(step)
                self.seen.append((name, (yield awaited)))
        finally:
            assert awaited not in self.children or awaited.popen.poll() is not None
            self.seen.append((name, 'finally'))

    def wait(self, count, passes_s=0):
        """Wait for this number of notes; passes_s: the seconds that pass at each look."""
        until = time.monotonic() + rig.SAFETY_NET_S
        while len(self.seen) < count:
            assert time.monotonic() < until, self.seen
            self.now += passes_s
            self.processes.wait(0.05)
        assert len(self.seen) == count

    def pass_by(self, seconds):
        """Let time pass, and due timers fire."""
        self.now += seconds
        self.processes.wait(0)

    def assert_all_is_over(self):
        """Assert that no child lives, and that no flow gets anything more."""
        assert all(child.popen.poll() is not None for child in self.children)
        seen = [*self.seen]
        self.pass_by(1000)
        self.pass_by(1000)
        assert self.seen == seen


@pytest.fixture
def lab():
    lab = Lab()
    yield lab
    lab.flows.close()
    lab.processes.close()


@pytest.mark.parametrize('script, status, text', [
    ('exit 0', 0, ''), ('exit 3', 3, ''), ('echo said', 0, ''), ('kill -9 $$', -9, ''),
    ('echo one >&2; echo two >&2; exit 1', 1, 'one\ntwo\n'), (r'printf "a\377" >&2', 0, 'a\ufffd')])
def test_a_flow_is_sent_the_end_of_its_child(lab, script, status, text):
    lab.flows.start(lab.flow('a', script))
    assert lab.seen == []
    lab.wait(2)
    assert lab.seen == [('a', s.End(status, text)), ('a', 'finally')]
    assert not lab.seen[0][1].full
    lab.assert_all_is_over()


def test_a_flow_goes_on_when_its_time_has_come(lab):
    lab.flows.start(lab.flow('a', 5, 0, 0.5))
    for seconds, seen in [(4.5, 0), (0.25, 0), (0.25, 1), (0, 2), (0.25, 2), (0.25, 4)]:
        lab.pass_by(seconds)
        assert len(lab.seen) == seen
    assert lab.seen == [('a', None)] * 3 + [('a', 'finally')]


def test_flows_that_wait_beside_each_other_are_each_sent_their_own(lab):
    for number in range(5):
        lab.flows.start(lab.flow(number, f'exit {number}', number, f'exit {number + 5}'))
    lab.wait(20, passes_s=0.5)
    for number in range(5):
        assert [what for who, what in lab.seen if who == number] == [
            s.End(number, ''), None, s.End(number + 5, ''), 'finally']
    lab.assert_all_is_over()


def test_a_flow_within_a_flow_returns_what_it_found(lab):
    def inner(script):
        end = yield lab.child(script)
        yield 1
        return end.status

    def outer():
        first = yield from inner('exit 4')
        second = yield from inner('exit 5')
        lab.seen.append((first, second))

    lab.flows.start(outer())
    lab.wait(1, passes_s=0.5)
    assert lab.seen == [(4, 5)]


def test_a_flow_that_is_over_takes_no_memory(lab):
    flow = lab.flow('a', 'exit 0', 1)
    gone = weakref.ref(flow)
    lab.flows.start(flow)
    del flow
    lab.wait(3, passes_s=1)
    lab.children.clear()
    gc.collect()
    assert gone() is None


def test_closing_ends_the_children_and_cleans_up(lab):
    def nested():
        try:
            yield from lab.flow('inner', 'exit 7', 'exec sleep 1000')
        finally:
            lab.seen.append(('outer', 'finally'))

    lab.flows.start(lab.flow('child', 'sleep 1000 & exec sleep 1000'))
    lab.flows.start(lab.flow('time', 500))
    lab.flows.start(nested())
    lab.flows.start(lab.flow('over'))
    lab.wait(2)
    assert lab.seen == [('over', 'finally'), ('inner', s.End(7, ''))]
    lab.seen.clear()
    lab.flows.close()
    assert sorted(lab.seen) == [(name, 'finally') for name in ('child', 'inner', 'outer', 'time')]
    lab.assert_all_is_over()
    assert len(lab.children) == 3
    lab.flows.close()
    assert len(lab.seen) == 4


def test_other_flows_and_children_go_on(lab):
    others, ended = s.Flows(lab.processes), []
    others.start(lab.flow('other', 'read x', 5))
    lab.processes.start(['sh', '-c', 'exit 2'], s.ignore, lambda *what: ended.append(what))
    lab.flows.start(lab.flow('ours', 'exec sleep 1000'))
    lab.flows.close()
    lab.wait(2)                         # `read` met the end of its input
    lab.pass_by(5)
    lab.wait(4)
    assert lab.seen == [('ours', 'finally'), ('other', s.End(1, '')), ('other', None),
                        ('other', 'finally')]
    while not ended:
        lab.processes.wait(0.05)
    assert ended == [(2, b'')]


@pytest.mark.parametrize('first', [None, 'exit 3', 1])          # awaited before the close
@pytest.mark.parametrize('after', [None, 'exec sleep 1000', 1])
@pytest.mark.parametrize('is_nested', [False, True])
def test_a_flow_may_close_its_own_flows(lab, first, after, is_nested):
    """A copy does so if its contact is lost; the flow continues until it waits or returns."""
    def closing():
        try:
            if first is not None:
                yield lab.awaited(first)
            lab.flows.close()
            lab.seen.append('closed')
            if after is not None:
                yield lab.awaited(after)
                lab.seen.append('it went on')
        finally:
            assert all(child.popen.poll() is not None for child in lab.children)
            lab.seen.append('finally')

    def nested():
        yield from closing()

    lab.flows.start(lab.flow('beside', 'exec sleep 1000'))
    lab.flows.start(nested() if is_nested else closing())
    lab.now += 1
    lab.wait(3)
    assert lab.seen == [('beside', 'finally'), 'closed', 'finally']
    lab.assert_all_is_over()


def test_a_flow_that_is_closed_may_close_its_flows_as_it_cleans_up(lab):
    def closing():
        try:
            yield lab.child('exec sleep 1000')
        finally:
            lab.flows.close()
            lab.seen.append('finally')

    lab.flows.start(closing())
    lab.flows.start(lab.flow('a', 'exec sleep 1000'))
    lab.flows.start(closing())
    lab.flows.close()
    assert lab.seen == ['finally', ('a', 'finally'), 'finally']
    lab.assert_all_is_over()


def test_a_flow_that_cannot_clean_up_keeps_no_other_from_it(lab):
    def failing():
        try:
            yield lab.child('exec sleep 1000')
        finally:
            raise ZeroDivisionError

    for flow in (lab.flow('a', 'exec sleep 1000'), failing(), lab.flow('b', 'exec sleep 1000')):
        lab.flows.start(flow)
    with pytest.raises(ZeroDivisionError):
        lab.flows.close()
    assert sorted(lab.seen) == [('a', 'finally'), ('b', 'finally')]
    lab.assert_all_is_over()


def test_a_flow_that_fails_takes_no_other_with_it(lab):
    def failing():
        yield 1
        raise ZeroDivisionError

    lab.flows.start(failing())
    lab.flows.start(lab.flow('a', 1, 'exec sleep 1000'))
    with pytest.raises(ZeroDivisionError):
        lab.pass_by(1)
    lab.pass_by(0)
    assert lab.seen == [('a', None)]
    lab.flows.close()
    assert lab.seen == [('a', None), ('a', 'finally')]
    lab.assert_all_is_over()


STEPS = st.lists(st.sampled_from(['exit 0', 'exit 1', 'exec sleep 1000', 0, 1, 2]), max_size=3)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(STEPS, max_size=4), st.integers(0, 6))
def test_whenever_flows_are_closed_each_has_cleaned_up_once(plans, turns):
    lab = Lab()
    with contextlib.closing(lab.processes):
        for number, steps in enumerate(plans):
            lab.flows.start(lab.flow(number, *steps))
        for _ in range(turns):
            lab.now += 0.5
            lab.processes.wait(0.01)
        lab.flows.close()
        for number, steps in enumerate(plans):
            *found, last = [what for who, what in lab.seen if who == number]
            assert last == 'finally' and len(found) <= len(steps)
            for step, what in zip(steps, found):
                assert step != 'exec sleep 1000'
                assert what == (s.End(int(step[-1]), '') if isinstance(step, str) else None)
        lab.assert_all_is_over()


def test_a_child_that_a_callback_has_ended_is_not_read():
    """Both children have written something before the first callback."""
    processes, children = s.Processes(), {}
    heard = []

    def end_other(me, other):
        def hear(data):
            heard.append(me)
            processes.end(children[other])
        return hear

    try:
        for me, other in (('a', 'b'), ('b', 'a')):
            children[me] = processes.start(['bash', '-c', 'echo; exec sleep 1000'],
                                           end_other(me, other), pytest.fail, keep_stdin=True)
        for child in children.values():
            assert rig.wait_readable(child.popen.stdout.fileno())
        while not heard:
            processes.wait()
        assert len(heard) == 1
    finally:
        processes.close()


@pytest.mark.skipif(not s.LINUX, reason='only Linux has such pipes')
def test_a_pipe_that_was_full_holds_more():
    processes, came = s.Processes(), bytearray()

    def held(request):
        return int.from_bytes(fcntl.ioctl(stdout, request, bytes(4)), sys.byteorder)

    try:
        child = processes.start(['bash', '-c', 'head -c 70000 /dev/zero; read'], came.extend,
                                lambda *_: pytest.fail('it waits'), keep_stdin=True)
        stdout = child.popen.stdout.fileno()
        assert fcntl.fcntl(stdout, F_GETPIPE_SZ) == s.PIPE_BYTES
        wait_until(lambda: held(termios.FIONREAD) == s.PIPE_BYTES, 'its pipe is full')
        while len(came) < 70000:
            processes.wait()
        assert fcntl.fcntl(stdout, F_GETPIPE_SZ) == s.WIDE_PIPE_BYTES
    finally:
        processes.close()


def test_rsync_compares_with_the_newest_stages():
    former = []
    for number in range(1, 7):
        stages = s.Stages(None, None, former)
        stage = s.Stage(f'contact{number}', s.Forwards(), (s.Tree((), ()), s.Tree((), ())))
        stage.id = f'contact{number}'           # as if it had files
        stages._stages[number] = stage
        former = stages.all
    assert [stage.id for stage in former] == [f'contact{number}' for number in range(1, 7)]
