"""Which waiting job starts where, and when: the Scheduler against a plain version of its rules.

The last tests run the whole Run of a batch, with fake machines that the test controls.
"""
import collections
import heapq
import shutil
import tempfile
import threading
import types
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_reporter import Lab

import ssh_scheduler as s
from ssh_scheduler import Allocation, Capacity, Gpu, MachineResources

ANY = settings(deadline=None, derandomize=True, max_examples=60)
WALKS = settings(deadline=None, derandomize=True, max_examples=35, stateful_step_count=40)

KINDS = (
    Allocation(1, 1000, gpus=0), Allocation(0.5, 100, gpus=0), Allocation(8, 1000, gpus=0),
    Allocation(1, 9000, gpus=0), Allocation(1, 100, reserve=True, gpus=0), Allocation(1, 100),
    Allocation(1, 100, gpus=2), Allocation(0.2, 100, gpu_utilization=0.3, reserve_gpu=False))
CARDS = (Gpu(0, 16000), Gpu(1, 16000, others=1))
ROOMS = (
    Capacity(8, 16000, total_cores=8), Capacity(16, 64000, total_cores=16),
    Capacity(0.5, 16000, total_cores=8), Capacity(8, 900, total_cores=8),
    Capacity(8, 16000, CARDS, 8), Capacity(8, 16000, CARDS[:1], 8),
    Capacity(8, 16000, total_cores=8, max_jobs=2), Capacity(8, 16000, total_cores=8, reserved=True),
    Capacity(8, 16000, (Gpu(0, 16000, batch_jobs=1), Gpu(1, 16000)), 8, batch_jobs=1))


def job_of(line, allocation):
    return s.Job(f'job{line}', 'true', line, allocation, s.Forwards())


# ---- The Scheduler, in any order of events ----

class AnyDay(RuleBasedStateMachine):
    """Jobs arrive and end, machines join, change and leave.

    The test keeps its own copy of the placements: the books of each machine, and the queues.
    """

    def __init__(self):
        super().__init__()
        self.scheduler = s.Scheduler()
        self.books = {}                     # machine -> MachineResources, as they should be
        self.running = {}                   # job -> (machine, Placement, Placement in the books)
        self.waiting = collections.defaultdict(list)        # Allocation -> jobs
        self.begun, self.lines = set(), 0
        self.hold, self.there_before = None, set()          # jobs that ran when it began

    @initialize(rooms=st.lists(st.sampled_from(ROOMS), min_size=1, max_size=3),
                jobs=st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 40)), max_size=6))
    def open(self, rooms, jobs):
        for place, capacity in enumerate(rooms):
            self.add_machine(place, capacity)
        for kind, count in jobs:
            self.submit(kind, count)
        self.choose()

    def add_machine(self, place, capacity):
        machine = f'm{place}'
        self.scheduler.add_machine(machine, place, capacity)
        self.books[machine] = MachineResources(capacity)

    @rule(kind=st.sampled_from(KINDS), count=st.integers(1, 30))
    def submit(self, kind, count):
        for _ in range(count):
            self.lines += 1
            job = job_of(self.lines, kind)
            self.scheduler.add(job)
            self.waiting[kind].append(job)

    @rule(place=st.integers(0, 4), capacity=st.sampled_from(ROOMS))
    def machine_comes(self, place, capacity):
        if f'm{place}' not in self.books:
            self.add_machine(place, capacity)

    @precondition(lambda self: self.books)
    @rule(data=st.data())
    def machine_goes(self, data):
        machine = data.draw(st.sampled_from(sorted(self.books)))
        self.scheduler.remove_machine(machine)
        del self.books[machine]
        for job, (where, *_) in tuple(self.running.items()):
            if where == machine:
                del self.running[job]

    @precondition(lambda self: self.books)
    @rule(data=st.data(), capacity=st.sampled_from(ROOMS))
    def machine_changes(self, data, capacity):
        machine = data.draw(st.sampled_from(sorted(self.books)))
        self.scheduler.update(machine, capacity)
        self.books[machine].update(capacity)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), again=st.booleans())
    def job_ends(self, data, again):
        job = self.end(data.draw(st.integers(0, 99)))
        if again:                           # as if the machine could not start it
            self.scheduler.add(job, first=True)
            self.waiting[job.allocation].append(job)
            self.waiting[job.allocation].sort(key=lambda job: job.line)
            self.begun.remove(job)

    def end(self, number):
        job = sorted(self.running, key=lambda job: job.line)[number % len(self.running)]
        machine, placement, booked = self.running.pop(job)
        self.scheduler.give_back(machine, placement)
        self.books[machine].deallocate(booked)
        return job

    @precondition(lambda self: self.running)
    @rule(data=st.data(), count=st.integers(2, 40))
    def many_jobs_end(self, data, count):
        for _ in range(min(count, len(self.running))):
            self.end(data.draw(st.integers(0, 99)))
            self.choose()

    @rule()
    def choose(self):
        free = self.scheduler._hold is None         # without a hold, each choice is the best
        self.hold = self.scheduler._hold
        for job, machine, placement in self.scheduler.choose():
            kind = job.allocation
            if free:
                assert self.naively_next() == (job, machine)
            assert self.waiting[kind].pop(0) is job
            assert job not in self.begun
            self.begun.add(job)
            booked = self.books[machine].allocate(kind)     # raises if there is no room
            assert booked.gpus == placement.gpus and placement.allocation == kind
            self.running[job] = (machine, placement, booked)
            if self.scheduler._hold is not self.hold:
                self.hold, self.there_before = self.scheduler._hold, set(self.running.values())
            free = free and self.hold is None
        self.check_that_nothing_idles()

    def naively_next(self):
        """Return the first line that fits anywhere, and the machine with the best score for it."""
        for job in sorted((queue[0] for queue in self.waiting.values() if queue),
                          key=lambda job: job.line):
            scores = {machine: own.score(job.allocation) for machine, own in self.books.items()}
            best = max(scores.values(), default=s.NO_ROOM)
            if best > s.NO_ROOM:
                return job, min(machine for machine, score in scores.items() if score == best)
        return None

    def check_that_nothing_idles(self):
        hold = self.scheduler._hold
        for kind, queue in self.waiting.items():
            for machine, own in self.books.items() if queue else ():
                if own.short_of(kind):
                    continue
                # The job would delay the one for which this machine is held.
                assert hold and machine == hold.machine and kind != hold.allocation
                assert hold.after.short_of(kind)
        if hold:
            assert self.waiting[hold.allocation], 'held for nobody'
            beside = [where for where in self.running.values()
                      if where[0] == hold.machine and where not in self.there_before]
            assert hold.after.jobs == 1 + len(beside)
            assert hold.after.available == self.books[hold.machine].available

    @invariant()
    def nothing_is_lost(self):
        assert self.scheduler.waits == sum(map(len, self.waiting.values()))
        kinds = self.scheduler.kinds()
        assert {kind: list(queue) for kind, queue in kinds.items()} == {
            kind: queue for kind, queue in self.waiting.items() if queue}
        firsts = [queue[0].line for queue in kinds.values()]
        assert firsts == sorted(firsts)
        assert {machine: own.jobs for machine, own in self.scheduler.resources.items()} == {
            machine: sum(where == machine for where, *_ in self.running.values())
            for machine in self.books}
        assert list(self.scheduler.resources) == sorted(self.books)     # in the user's order


TestAnyDay = AnyDay.TestCase
TestAnyDay.settings = WALKS


# ---- Clusters, in any order of events ----

AFTER_S = 30.0
QUEUES = (Capacity(0, 0, queue=s.Queue('Slurm', 3)), Capacity(0, 0, queue=s.Queue('Slurm', 40)),
          Capacity(0, 0, queue=s.Queue('Slurm', 12, ((8000, 'small'),), (('1 9000 0 0', 'no'),))))
QUEUED_KINDS = (*KINDS[:5], Allocation(1, 100, gpu_memory_mb=4000),
                Allocation(1, 100, gpu_memory_mb=12000))


class Books:
    """The test's own record of the jobs given to a queue."""

    def __init__(self, now):
        self.jobs, self.begun = {}, set()           # job -> its Placement
        self.starts, self.sizes = [], [(now, 0)]    # when jobs began; (when, how many there were)
        self.full_until = 0.0

    def note_size(self, now):
        self.sizes.append((now, len(self.jobs)))

    def growth(self, now):
        """Return by how much the queue is longer than GROWTH_S ago."""
        before = [size for when, size in self.sizes if when <= now - s.GROWTH_S]
        return len(self.jobs) - (before[-1] if before else 0)

    def joined(self, now):
        """Return how many jobs joined the queue within the last GROWTH_S."""
        return sum(size > before for (_, before), (when, size) in zip(self.sizes, self.sizes[1:])
                   if when > now - s.GROWTH_S)

    def has_room(self, now):
        """Tell whether one more job may join."""
        lately = sum(when >= now - s.LATELY_S for when in self.starts)
        return (now >= self.full_until and self.growth(now) < s.GROWTH
                and self.joined(now) < s.MOST_JOIN
                and len(self.jobs) - len(self.begun) < s.SPARE_PENDING + lately)


class AnyQueue(RuleBasedStateMachine):
    """Jobs arrive, begin and end, machines and clusters join, fill up and leave, and time passes.

    The test sets the clock.
    """

    def __init__(self):
        super().__init__()
        self.now, self.lines = 1000.0, 0
        self.scheduler = s.Scheduler(AFTER_S, lambda: self.now)
        self.machines = {}                  # name -> Capacity, without clusters
        self.there = {}                     # job -> (machine, Placement) on these
        self.queues, self.books = {}, {}    # name -> Capacity; name -> Books
        self.waiting = {}                   # job -> when it began to wait

    @initialize(rooms=st.lists(st.sampled_from(ROOMS), max_size=2),
                queues=st.lists(st.sampled_from(QUEUES), min_size=1, max_size=2),
                kind=st.sampled_from(QUEUED_KINDS), count=st.integers(0, 40))
    def open(self, rooms, queues, kind, count):
        for place, capacity in enumerate(rooms):
            self.machine_comes(place, capacity)
        for place, capacity in enumerate(queues):
            self.cluster_comes(place, capacity)
        self.submit(kind, count)
        self.choose()

    @rule(place=st.integers(0, 2), capacity=st.sampled_from(ROOMS))
    def machine_comes(self, place, capacity):
        if f'm{place}' not in self.machines:
            self.machines[f'm{place}'] = capacity
            self.add(f'm{place}', place, capacity)

    @rule(place=st.integers(0, 1), capacity=st.sampled_from(QUEUES))
    def cluster_comes(self, place, capacity):
        if f'c{place}' not in self.queues:
            self.queues[f'c{place}'], self.books[f'c{place}'] = capacity, Books(self.now)
            self.add(f'c{place}', 10 + place, capacity)

    def add(self, name, place, capacity):
        self.scheduler.add_machine(name, place, capacity)
        if name in self.books:
            self.scheduler.resources[name]._clock = lambda: self.now

    @rule(place=st.integers(0, 4), again=st.booleans())
    def one_goes(self, place, again):
        """A machine leaves: its jobs are lost, and wait again or are given up."""
        names = sorted({*self.machines, *self.queues})
        name = names[place % len(names)] if names else None
        if name:
            self.scheduler.remove_machine(name)
            lost = [*(self.books.pop(name).jobs if name in self.books else ()),
                    *(job for job, (where, _) in self.there.items() if where == name)]
            self.machines.pop(name, None), self.queues.pop(name, None)
            for job in lost:
                self.there.pop(job, None)
                if again:
                    self.wait_again(job)

    @rule(kind=st.sampled_from(QUEUED_KINDS), count=st.integers(1, 30))
    def submit(self, kind, count):
        for _ in range(count):
            self.lines += 1
            job = job_of(self.lines, kind)
            self.scheduler.add(job)
            self.waiting[job] = self.now

    def wait_again(self, job):
        """Queue a job again, ahead of its kind; it has waited as long as any of those behind it."""
        self.scheduler.add(job, first=True)
        self.waiting[job] = min([self.now, *(
            since for other, since in self.waiting.items()
            if other.allocation == job.allocation and other.line > job.line)])

    @rule(seconds=st.sampled_from((0.1, 1.0, s.GROWTH_S, 20.0, AFTER_S, 250.0, s.LATELY_S + 1)))
    def time_passes(self, seconds):
        self.now += seconds
        self.choose()

    @rule(number=st.integers(0, 99), count=st.integers(1, 12))
    def jobs_begin(self, number, count):
        for name, books in self.books.items():
            for job in [job for job in books.jobs if job not in books.begun][:count]:
                for _ in range(1 + number % 2):         # the report may come twice
                    self.scheduler.began(name, books.jobs[job])
                books.begun.add(job)
                books.starts.append(self.now)

    @rule(kind=st.sampled_from(QUEUED_KINDS), times=st.integers(2, 4))
    def jobs_begin_at_once(self, kind, times):
        """Let many jobs begin, so more may join, up to the limit of growth of a queue."""
        self.submit(kind, 30)
        for _ in range(times):
            self.jobs_begin(0, 40)
            self.choose()

    @precondition(lambda self: self.there or any(books.jobs for books in self.books.values()))
    @rule(number=st.integers(0, 99), count=st.integers(1, 12), again=st.booleans())
    def jobs_end(self, number, count, again):
        """End some jobs.  Jobs that a queue has not begun may leave, too: they were taken back."""
        jobs = [*self.there, *(job for books in self.books.values() for job in books.jobs)]
        jobs = sorted(jobs, key=lambda job: job.line)[number % len(jobs):][:count]
        for job in jobs:
            self.end(job)
            if again:
                self.wait_again(job)
        self.choose()

    def end(self, job):
        if job in self.there:
            self.scheduler.give_back(*self.there.pop(job))
        for name, books in self.books.items():
            if job in books.jobs:
                self.scheduler.give_back(name, books.jobs.pop(job))
                books.begun.discard(job)
                books.full_until = 0.0
                books.note_size(self.now)

    @rule(number=st.integers(0, 1))
    def a_cluster_is_full(self, number):
        """The cluster did not accept the last job."""
        for name, books in [*self.books.items()][number:]:
            job = next((job for job in reversed(books.jobs) if job not in books.begun), None)
            if job:
                self.end(job)
                self.scheduler.note_full(name)
                books.full_until = self.now + s.FULL_S
                self.wait_again(job)
        self.choose()

    @precondition(lambda self: self.queues)
    @rule(number=st.integers(0, 1), capacity=st.sampled_from(QUEUES))
    def a_cluster_refuses_others(self, number, capacity):
        name = [*self.queues][number % len(self.queues)]
        self.queues[name] = capacity
        self.scheduler.update(name, capacity)

    @rule()
    def choose(self):
        for job, name, placement in self.scheduler.choose():
            since = self.waiting.pop(job)
            if name in self.machines:
                self.there[job] = name, placement
                continue
            books = self.books[name]
            assert len(books.jobs) < self.queues[name].queue.max_jobs
            assert books.has_room(self.now)
            assert not self.refuses(name, job.allocation)
            assert not self.machine_with_room(job.allocation)
            assert self.is_due(job, since)
            books.jobs[job] = placement
            books.note_size(self.now)
        for job, since in self.waiting.items():
            assert not self.is_due(job, since) or not self.cluster_with_room(job.allocation)

    def refuses(self, name, kind):
        queue = self.queues[name].queue
        return any(s.cluster_need(kind, queue.gpu_types) == need for need, _ in queue.refusals) or (
            kind.gpus and queue.gpu_types and kind.gpu_memory_mb > queue.gpu_types[-1][0])

    def machine_with_room(self, kind):
        return any(not self.scheduler.resources[name].short_of(kind)
                   and not self.scheduler.keeps_from(name, kind) for name in self.machines)

    def cluster_with_room(self, kind):
        return any(books.has_room(self.now) and not self.refuses(name, kind)
                   and len(books.jobs) < self.queues[name].queue.max_jobs
                   for name, books in self.books.items())

    def is_due(self, job, since):
        """Tell whether the job has waited long enough, or fits no machine even when idle."""
        return self.now >= since + AFTER_S or all(
            MachineResources(s.idle(capacity)).short_of(job.allocation)
            for capacity in self.machines.values())

    @invariant()
    def the_books_balance(self):
        assert {name: own.jobs for name, own in self.scheduler.resources.items()} == {
            **{name: sum(where == name for where, _ in self.there.values())
               for name in self.machines},
            **{name: len(books.jobs) for name, books in self.books.items()}}
        assert self.scheduler.waits == len(self.waiting) == len(self.scheduler._since)
        assert self.scheduler.clusters == sorted(self.queues)

    def teardown(self):
        for job in [*self.there, *(job for books in self.books.values() for job in books.jobs)]:
            self.end(job)
        assert not any(own.jobs for own in self.scheduler.resources.values())


TestAnyQueue = AnyQueue.TestCase
TestAnyQueue.settings = WALKS


def joined(own, kind=KINDS[0]):
    """Add as many jobs to a queue as it allows; return their Placements."""
    placements = []
    while not own.short_of(kind):
        placements.append(own.allocate(kind))
    return placements


def test_a_queue_grows_no_faster_than_its_controller_likes():
    now = [0.0]
    own = s.ClusterResources(Capacity(0, 0, queue=s.Queue('Slurm', 99)), lambda: now[0])
    waiting = joined(own)
    assert (len(waiting), own.short_of(KINDS[0])) == (s.SPARE_PENDING, 'starts')
    for placement in waiting:
        own.began(placement)
        own.began(placement)                        # the report may come twice
    more = joined(own)
    assert (own.jobs, own.short_of(KINDS[0])) == (s.GROWTH, 'time')
    own.deallocate(more.pop())
    assert len(joined(own)) == 1                    # in the place of the one that left
    now[0] = s.GROWTH_S - 0.1
    assert not joined(own)
    now[0] = s.GROWTH_S
    assert len(joined(own)) == s.SPARE_PENDING      # five more than have begun
    now[0] = 2 * s.LATELY_S
    for placement in waiting:
        own.deallocate(placement)
    assert own.short_of(KINDS[0]) == 'starts'       # no job has begun lately


def test_jobs_that_end_at_once_make_room_for_as_many_but_not_for_hundreds():
    now = [0.0]
    own = s.ClusterResources(Capacity(0, 0, queue=s.Queue('Slurm', 999)), lambda: now[0])
    there = []
    for _ in range(20):
        there += joined(own)
        for placement in there:
            own.began(placement)
        now[0] += s.GROWTH_S
    ended, there[:] = len(there), []
    assert ended > 2 * s.MOST_JOIN
    for placement in [*own._placements.values()]:
        own.deallocate(placement)
    assert len(joined(own)) == s.MOST_JOIN
    assert own.short_of(KINDS[0]) == 'time'


def test_short_jobs_fill_a_queue_up_to_its_limit():
    """At each look all that was in the queue has ended, and the queue still becomes longer."""
    now, most = [0.0], []
    own = s.ClusterResources(Capacity(0, 0, queue=s.Queue('Slurm', 20)), lambda: now[0])
    for _ in range(12):
        there = joined(own)
        most.append(len(there))
        now[0] += 2.5
        for placement in there:
            own.began(placement)
            own.deallocate(placement)
    assert most[0] == s.SPARE_PENDING and most[-1] == 20


def test_a_queue_that_took_no_more_is_asked_again_when_a_job_ends_or_after_a_while():
    now = [0.0]
    own = s.ClusterResources(QUEUES[0], lambda: now[0])
    own.deallocate(own.allocate(KINDS[0]))          # the job that the queue refused
    own.note_full()
    assert own.short_of(KINDS[0]) == 'full' and 'takes no more' in own.why_not(KINDS[0])
    now[0] = s.FULL_S
    first = own.allocate(KINDS[0])
    own.note_full()
    assert own.short_of(KINDS[0]) == 'full'
    own.deallocate(first)
    assert own.short_of(KINDS[0]) == ''


def test_a_machine_with_room_comes_before_a_cluster_however_long_a_job_has_waited():
    now = [0.0]
    scheduler = s.Scheduler(AFTER_S, lambda: now[0])
    scheduler.add_machine('c', 0, QUEUES[0])
    scheduler.add_machine('m', 1, Capacity(1, 9000, total_cores=1, max_jobs=1))
    for line in (1, 2):
        scheduler.add(job_of(line, KINDS[0]))
    [(_, machine, placement)] = scheduler.choose()
    now[0] = 2 * AFTER_S
    scheduler.give_back(machine, placement)
    assert [(job.line, where) for job, where, _ in scheduler.choose()] == [(2, 'm')]


def test_what_comes_back_holds_up_none_that_has_waited_for_long():
    now = [0.0]
    scheduler = s.Scheduler(AFTER_S, lambda: now[0])
    scheduler.add_machine('m', 0, Capacity(1, 9000, total_cores=1, max_jobs=1))
    scheduler.add_machine('c', 1, QUEUES[0])
    for line in (1, 2):
        scheduler.add(job_of(line, KINDS[0]))
    assert [machine for _, machine, _ in scheduler.choose()] == ['m']
    now[0] = AFTER_S - 1
    scheduler.add(job_of(0, KINDS[0]), first=True)
    assert not [*scheduler.choose()]
    now[0] = AFTER_S
    assert [job.line for job, *_ in scheduler.choose()] == [0, 2]


# ---- Fairness ----

class Clock:
    """Jobs of given lengths on machines of a Scheduler; a small job is always waiting."""

    def __init__(self, rooms, small, lengths):
        self.scheduler, self.now = s.Scheduler(), 0
        for place, capacity in enumerate(rooms):
            self.scheduler.add_machine(place, place, capacity)
        self.small, self.lengths, self.lines = small, lengths, 0
        self.ends, self.starts = [], []         # heap of running jobs; (when, line) of each start

    def add(self, allocation):
        self.lines += 1
        self.scheduler.add(job_of(self.lines, allocation))
        return self.lines

    def step(self):
        """Start all jobs that can start, then move to the next end."""
        while self.scheduler.waits < 30:
            self.add(self.small)
        for job, machine, placement in self.scheduler.choose():
            self.starts.append((self.now, job.line))
            length = self.lengths[job.line % len(self.lengths)]
            heapq.heappush(self.ends, (self.now + length, job.line, machine, placement))
        self.now = self.ends[0][0]
        while self.ends and self.ends[0][0] == self.now:
            _, _, machine, placement = heapq.heappop(self.ends)
            self.scheduler.give_back(machine, placement)


BIG = (Allocation(8, 1000, gpus=0), Allocation(1, 14000, gpus=0), Allocation(1, 1, True, gpus=0),
       Allocation(1, 1, gpus=2))
FULL = Capacity(8, 16000, (Gpu(0, 9000), Gpu(1, 9000)), 8)
SMALL = (Allocation(1, 4000, gpus=0), Allocation(4, 500, gpus=0),
         Allocation(1, 4000, gpus=1, gpu_utilization=0.5, reserve_gpu=False), Allocation(0.3, 4000))


@ANY
@given(rooms=st.lists(st.just(FULL), min_size=1, max_size=3), big=st.sampled_from(BIG),
       small=st.sampled_from(SMALL), lengths=st.lists(st.integers(1, 30), min_size=1, max_size=9))
def test_an_endless_stream_of_small_jobs_does_not_hold_up_a_big_one(rooms, big, small, lengths):
    """A job passed PATIENCE times waits only for the jobs that then run on one machine."""
    clock = Clock(rooms, small, lengths)
    for _ in range(5):
        clock.step()
    line, came = clock.add(big), clock.now
    passed_at = None
    while line not in {started for _, started in clock.starts}:
        clock.step()
        passed = [when for when, started in clock.starts if started > line]
        if len(passed) >= s.PATIENCE:
            passed_at = passed[s.PATIENCE - 1]
            assert clock.now <= passed_at + 2 * max(lengths), 'passed for ever'
    began = next(when for when, started in clock.starts if started == line)
    assert came <= began <= (came if passed_at is None else passed_at) + max(lengths) or (
        passed_at is None)


@ANY
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=9))
def test_a_job_that_needs_all_of_the_only_machine_is_passed_patience_times(lengths):
    clock = Clock([FULL], Allocation(1, 100, gpus=0), lengths)
    clock.step()
    line = clock.add(Allocation(1, 100, True, gpus=0))
    while line not in {started for _, started in clock.starts}:
        clock.step()
    assert sum(started > line for _, started in clock.starts[:[
        started for _, started in clock.starts].index(line)]) <= s.PATIENCE


def test_beside_a_job_that_is_waited_for_only_what_does_not_delay_it_starts():
    scheduler = s.Scheduler()
    scheduler.add_machine('m', 0, Capacity(8, 16000, total_cores=8))
    tiny, half, big = (Allocation(cores, 10, gpus=0) for cores in (0.5, 6, 8))
    scheduler.add(job_of(1, half))
    [(_, _, first)] = scheduler.choose()
    scheduler.add(job_of(2, big))
    for line in range(3, 103):              # they pass it, one by one
        scheduler.add(job_of(line, half._replace(cores=5)))
    running, passed = collections.deque(), 0
    while passed < s.PATIENCE:
        for _, _, placement in scheduler.choose():
            running.append(placement)
            passed += 1
        if passed < s.PATIENCE:
            scheduler.give_back('m', running.popleft())
    scheduler.give_back('m', first)
    assert list(scheduler.choose()) == []                   # 5 cores fit, but would delay job 2
    for line in range(200, 220):
        scheduler.add(job_of(line, tiny))
    beside = list(scheduler.choose())
    assert [job.line for job, *_ in beside] == list(range(200, 208))    # 4 of 12 cores: 8 are held
    for placement in running:
        scheduler.give_back('m', placement)
    assert [job.line for job, *_ in scheduler.choose()] == [2]


def test_a_held_machine_is_known_by_its_name():
    """The machine left and joined again: its name is equal, but a new object.  Found by AnyDay."""
    day, (small, tiny, *_) = AnyDay(), KINDS
    day.open([], [])
    day.submit(small, 1)
    day.machine_comes(2, ROOMS[0])
    day.machine_goes(types.SimpleNamespace(draw=lambda _: 'm2'))
    for kind, count in (small, 24), (KINDS[4], 1), (tiny, 21):
        day.submit(kind, count)
    day.machine_comes(2, ROOMS[0])
    day.choose()
    day.end(0)
    day.machine_comes(0, ROOMS[1])
    day.choose()


def test_what_was_kept_back_starts_as_soon_as_it_is_in_nobodys_way():
    """Of two jobs that wait for machines, the first gets one elsewhere."""
    scheduler = s.Scheduler()
    big, small = Allocation(8, 10, True, gpus=0), Allocation(1, 20, gpus=0)
    scheduler.add_machine('m', 0, Capacity(8, 16000, total_cores=8))
    scheduler.add(job_of(1, small))
    [(again, _, first)] = scheduler.choose()
    scheduler.add(job_of(2, big))
    for line in range(3, 100):
        scheduler.add(job_of(line, small))
    placements = []
    while len(placements) < s.PATIENCE:
        for _, _, placement in scheduler.choose():
            placements.append(placement)
            break                                           # one at a time
        if len(placements) < s.PATIENCE:
            scheduler.give_back('m', placements[-1])
    scheduler.give_back('m', first)
    scheduler.add(again, first=True)
    assert list(scheduler.choose()) == []
    scheduler.add_machine('n', 1, Capacity(8, 15, total_cores=8))       # too small for the others
    started = [(job.line, machine) for job, machine, _ in scheduler.choose()]
    assert started == [(2, 'n'), *((line, 'm') for line in (1, *range(23, 33)))]


# ---- The cost of a placement ----

def calls_of_score(machines, waiting, rounds):
    """Return how often score() was called: in the first filling, and per placement after that."""
    scheduler, calls, room = s.Scheduler(), collections.Counter(), Capacity(8, 16000, CARDS, 8)

    def counted(own):
        score = own.score

        def count(allocation):
            calls['score'] += 1
            return score(allocation)
        return count

    for place in range(machines):
        scheduler.add_machine(place, place, room._replace(memory_mb=16000 + place))
        own = scheduler.resources[place]
        own.score = counted(own)
    kinds = [Allocation(1, 1000 + number, gpus=number % 2) for number in range(10)]
    for line in range(waiting):
        scheduler.add(job_of(line, kinds[line % 10]))
    running = collections.deque((machine, placement) for _, machine, placement
                                in scheduler.choose())
    filling, calls['score'], placed = calls['score'] / len(running), 0, 0
    for _ in range(rounds):
        scheduler.give_back(*running.popleft())
        for _, machine, placement in scheduler.choose():
            running.append((machine, placement))
            placed += 1
    assert placed > rounds / 2
    return filling, calls['score'] / placed


def test_a_placement_costs_the_same_however_many_jobs_wait():
    _, few = calls_of_score(10, 500, 200)
    _, many = calls_of_score(10, 5000, 200)
    assert many <= few * 1.1


def test_a_placement_costs_hardly_more_among_many_machines():
    """Each kind of job scores each machine once, and again only those whose scores have changed."""
    few_at_first, few = calls_of_score(10, 2000, 200)
    many_at_first, many = calls_of_score(160, 4000, 200)
    assert many <= few + 10 and many_at_first <= few_at_first + 10
    assert many <= 25                       # ten kinds, each with the scores that changed


# ---- The Run of a batch, with any answers of its machines ----

WORDS = ('--num-cpus=4', '--num-cpus=0.5', '--memory-required=3000', '--memory-required=500',
         '--reserve')
WHOLE = Capacity(8, 4000, total_cores=8, total_memory_mb=4000)
LEFT = (WHOLE, WHOLE._replace(cores=0.5), WHOLE._replace(memory_mb=600), WHOLE._replace(
    reserved=True, batch_jobs=1), WHOLE._replace(max_jobs=1))


class AnyBatch(RuleBasedStateMachine):
    """The Run has its own thread; this one waits until the Run waits, so only one of them runs."""

    @initialize(words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=12),
                machines=st.integers(1, 3))
    def begin(self, words, machines):
        self.folder = tempfile.mkdtemp()
        self.results = s.ResultStore(str(Path(self.folder) / 'job_results')).open()
        text = ''.join(f'execute_remote --job-name job{number:02} --no-gpu-required {word} true\n'
                       for number, word in enumerate(words))
        self.lab = Lab(self.results, dict.fromkeys([f'm{n}' for n in range(machines)], WHOLE), text,
                       ['--no-gpu-required', '--memory-required=10'], live=True)
        self.outcomes = {}                          # name -> exit code, 'lost' or 'not collected'
        self.sent_back = collections.Counter()      # name -> how often it was held or refused
        self.lost = collections.Counter()           # name -> how often its machine lost it
        self.status = self.error = None
        self.batchs_turn, self.ours = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        self.await_our_turn()

    def run(self):
        try:
            self.status = self.lab.run(self.turns())
        except BaseException as error:          # such as pytest.fail's: the test's thread raises it
            self.error = error
        self.ours.release()

    def turns(self):
        while True:
            self.ours.release()
            self.batchs_turn.acquire()
            yield

    def await_our_turn(self):
        assert self.ours.acquire(timeout=30), 'the batch neither waits nor ends'
        if self.error:
            raise self.error

    def go_on(self):
        self.batchs_turn.release()
        self.await_our_turn()
        if not self.over:
            self.check_while_it_waits()

    @property
    def over(self):
        return self.status is not None

    def check_while_it_waits(self):
        running = [attempt.name for attempt in self.lab.running]
        assert len(running) == len(set(running)) and not set(running) & self.outcomes.keys()
        scheduler = self.lab.batch.scheduler
        for worker, own in scheduler.resources.items():
            assert own.jobs == len(worker.attempts)
            for kind in scheduler.kinds():
                assert own.short_of(kind) or scheduler.keeps_from(worker, kind)

    def some(self, number):
        """Return a running attempt."""
        return self.lab.running[number % len(self.lab.running)]

    def move(self, attempt, state, why=''):
        self.lab.batch.lives.move(attempt, state, why)

    runs = precondition(lambda self: not self.over and self.lab.running)
    numbers = st.integers(0, 99)

    @runs
    @rule(number=numbers, exit_code=st.sampled_from([0, 0, 0, 1, 255]), started=st.booleans())
    def a_job_ends(self, number, exit_code, started):
        if started:
            self.lab.started()
        name = self.some(number).name
        self.lab.end(name, exit_code)
        self.outcomes[name] = exit_code
        self.go_on()

    @runs
    @rule(number=numbers)
    def another_batch_was_first(self, number):
        attempt = self.some(number)
        self.sent_back[attempt.name] += 1
        self.move(attempt, 'held')
        begun = len(attempt.machine.history)
        self.go_on()
        assert len(attempt.machine.history) == begun    # it was not probed again

    @runs
    @rule(number=numbers, often=st.integers(0, 3))
    def a_machine_cannot_start_it(self, number, often):
        if often:
            return                                  # rarely: the machine then gets no more jobs
        attempt = self.some(number)
        self.sent_back[attempt.name] += 1
        self.move(attempt, 'refused', 'its disk is full')
        begun = len(attempt.machine.history)
        self.go_on()
        assert len(attempt.machine.history) == begun

    @runs
    @rule(number=numbers)
    def a_job_is_lost(self, number):
        attempt = self.some(number)
        self.lost[attempt.name] += 1
        if self.lost[attempt.name] > 1:             # --retries is 1 by default
            self.outcomes[attempt.name] = 'lost'
        self.move(attempt, 'lost', 'the machine was started anew')
        self.go_on()

    @precondition(lambda self: not self.over)
    @rule(number=numbers, capacity=st.sampled_from(LEFT))
    def a_machine_has_more_or_less(self, number, capacity):
        worker = self.lab.workers[number % len(self.lab.workers)]
        if worker.state == 'ready':
            worker.capacity = capacity
            worker.become('ready')
            self.go_on()

    @precondition(lambda self: not self.over)
    @rule(number=numbers, often=st.integers(0, 4))
    def a_machine_fails(self, number, often):
        worker = self.lab.workers[number % len(self.lab.workers)]
        if not often and worker.state == 'ready':
            self.outcomes.update({attempt.name: 'not collected' for attempt in worker.attempts})
            worker.become('failed', 'the connection broke')
            self.go_on()

    @precondition(lambda self: self.over)
    @rule()
    def nothing_more_happens(self):
        assert not self.thread.is_alive() or self.thread.join(30) is None

    def teardown(self):
        if not hasattr(self, 'thread'):
            return
        try:
            idle = 0
            while not self.over:                    # others leave, and the running jobs succeed
                assert idle < 3, f'it waits for nothing: {self.lab.out.getvalue()}'
                for worker in self.lab.workers:
                    if worker.state == 'ready':
                        worker.capacity = WHOLE
                        worker.become('ready')
                for worker in self.lab.workers:         # their rest is over
                    self.lab.batch.fleet.bring_back(worker)
                idle = 0 if self.lab.running else idle + 1
                if self.lab.running:
                    self.a_job_ends(0, 0, True)
                else:
                    self.go_on()
            self.check_the_end()
        finally:
            self.results.close()
            shutil.rmtree(self.folder)

    def check_the_end(self):
        lab = self.lab
        begun = collections.Counter(name for worker in lab.workers for name in worker.history)
        names = [job.name for job in lab.jobs]
        assert lab.running == []
        assert all(own.jobs == 0 for own in lab.batch.scheduler.resources.values())
        for name in names:                          # each job ran once, or is reported
            assert begun[name] == ((name in self.outcomes) + self.sent_back[name]
                                   + min(self.lost[name], 1))
        ends = collections.Counter(
            'finished' if end == 0 else 'not collected' if end == 'not collected' else 'failed'
            for end in self.outcomes.values())
        counts = [f'{ends["finished"]} finished', f'{ends["failed"]} failed']
        left = len(names) - len(self.outcomes)
        counts += [f'{left} not started'] if left else []
        counts += [f'{ends["not collected"]} not collected'] if ends['not collected'] else []
        assert f'done: {s.count_of(len(names), "job")}: {", ".join(counts)}, ' in lab.out.getvalue()
        assert left == 0 or not lab.batch.scheduler.resources
        assert self.status == (0 if ends['finished'] == len(names) else 1)
        for name, end in self.outcomes.items():
            if isinstance(end, int):
                word = 'failed' if end else 'finished'
                assert lab.out.getvalue().count(f'{word}: {name}; ') == 1


TestAnyBatch = AnyBatch.TestCase
TestAnyBatch.settings = settings(WALKS, max_examples=30, stateful_step_count=30)
