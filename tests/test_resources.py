"""The free resources of a machine, and the facts that a probe found."""
import collections
import itertools
import math
import re
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import ssh_scheduler
from ssh_scheduler import Allocation, Capacity, DoesNotFit, Gpu, Machine, MachineResources

ANY = settings(deadline=None, derandomize=True, max_examples=150)
NO_GPU = Allocation(1, 1000, gpus=0)


# ---- MachineResources: any sequence ----

# Fractions: sums of whole numbers would not show the effects of rounding.
CORES = st.integers(1, 12_000).map(lambda number: number / 1000) | st.floats(0.001, 4)
SHARES = st.integers(1, 1000).map(lambda number: number / 1000) | st.floats(0.001, 0.4)
ROUNDING = 0.0006               # of one job: the use is counted in thousandths
ALLOCATIONS = st.builds(
    Allocation, cores=CORES, memory_mb=st.integers(0, 6000), reserve=st.integers(0, 9).map(
        lambda number: number == 0), gpus=st.sampled_from([0, 0, 1, 1, 1, 2]),
    gpu_memory_mb=st.integers(0, 9000), gpu_utilization=SHARES, reserve_gpu=st.booleans())
GPUS = st.lists(st.builds(
    Gpu, index=st.integers(0, 7), memory_mb=st.integers(0, 16000),
    utilization=st.integers(0, 100).map(lambda percent: percent / 100)),
    max_size=4, unique_by=lambda gpu: gpu.index).map(tuple)
CAPACITIES = st.builds(
    Capacity, cores=st.integers(0, 16_000).map(lambda number: number / 1000),
    memory_mb=st.integers(0, 20000), gpus=GPUS, total_cores=st.sampled_from([0, 2, 16, 32]),
    max_jobs=st.none() | st.integers(1, 4), gpu_trouble=st.just(''),
    lost_gpus=st.just(''))
# A step: an allocation to take, or the number of a placement to give back.
STEPS = st.lists(ALLOCATIONS | st.integers(0, 9), max_size=16)


def walk(resources, steps):
    """Take and give back allocations; yield the placements in use after each step."""
    out = []
    for step in steps:
        if isinstance(step, int):
            if out:
                resources.deallocate(out.pop(step % len(out)))
        else:
            score = resources.score(step)
            try:
                placement = resources.allocate(step)
            except DoesNotFit as error:
                assert score == -math.inf and str(error).startswith(
                    ('the machine has ', 'the machine already has ')) or (
                    str(error) == 'the machine is in use, and the job reserves the machine')
            else:
                assert math.isfinite(score)
                assert placement.allocation == step
                out.append(placement)
        yield out


def last(placements):
    """Return the placements in use after the last step."""
    return [*itertools.chain.from_iterable(collections.deque(placements, 1))]


def scores(resources):
    """Return a value that tells two states apart: the scores of all kinds of allocations."""
    sizes = itertools.product((0.001, 1, 3.5), (0, 1500), (False, True))
    kinds = [Allocation(cores, mb, reserve, gpus, 700, use, own) for cores, mb, reserve in sizes
             for gpus, use, own in ((0, 1, True), (1, .1, False), (1, .7, False), (1, 1, True),
                                    (2, .3, False))]
    return [resources.score(kind) for kind in kinds]


@ANY
@given(capacity=CAPACITIES, steps=STEPS)
def test_no_sequence_promises_more_than_there_is(capacity, steps):
    resources = MachineResources(capacity)
    for out in walk(resources, steps):
        assert resources.jobs == len(out)
        assert capacity.max_jobs is None or len(out) <= capacity.max_jobs
        assert sum(p.allocation.memory_mb for p in out) <= capacity.memory_mb
        if any(p.allocation.reserve for p in out):
            assert len(out) == 1
        cores = sum(p.allocation.cores for p in out)
        limit = capacity.cores * 1.5 + ROUNDING * (len(out) + 1)
        if len(out) == 1:           # one job may always run, on all processors
            limit = max(limit, capacity.cores, capacity.total_cores)
        assert cores <= limit
        free = {gpu.index: gpu for gpu in capacity.gpus}
        for placement in out:
            assert len(set(placement.gpus)) == placement.allocation.gpus
            assert list(placement.gpus) == sorted(placement.gpus)
        for index in {index for p in out for index in p.gpus}:
            there = [p.allocation for p in out if index in p.gpus]
            assert sum(a.gpu_memory_mb for a in there) <= free[index].memory_mb
            assert sum(a.gpu_utilization for a in there) <= (
                (1 - free[index].utilization) * 1.2 + ROUNDING * (len(there) + 1))
            assert len(there) == 1 or not any(a.reserve_gpu for a in there)


@ANY
@given(capacity=CAPACITIES, steps=STEPS)
def test_what_was_taken_is_given_back_to_the_last_bit(capacity, steps):
    resources = MachineResources(capacity)
    out = last(walk(resources, steps))
    for placement in out:
        resources.deallocate(placement)
    assert resources.jobs == 0
    assert scores(resources) == scores(MachineResources(capacity))
    assert (resources._cores, resources._memory_mb, resources._reserved) == (0, 0, 0)
    assert all((use.jobs, use.memory_mb, use.time, use.reserved) == (0, 0, 0, 0)
               for use in resources._gpus.values())


@ANY
@given(capacity=CAPACITIES, steps=STEPS, data=st.data())
def test_a_score_is_of_what_is_out_and_not_of_how_it_came(capacity, steps, data):
    resources = MachineResources(capacity._replace(gpus=()))
    steps = [step if isinstance(step, int) else step._replace(gpus=0) for step in steps]
    out = last(walk(resources, steps))
    again = MachineResources(capacity._replace(gpus=()))
    try:
        for placement in data.draw(st.permutations(out)):
            again.allocate(placement.allocation)
    except DoesNotFit:      # the job that may always run was first before, not now
        assume(False)
    assert scores(again) == scores(resources)


@ANY
@given(capacity=CAPACITIES, steps=STEPS)
def test_a_score_with_gpus_is_of_what_is_out(capacity, steps):
    """A job that was placed and given back leaves the scores as they were."""
    resources = MachineResources(capacity)
    for out in walk(resources, steps):
        before = scores(resources)
        try:
            detour = resources.allocate(Allocation(0.3, 10, gpus=1, gpu_memory_mb=1,
                                                   gpu_utilization=0.1, reserve_gpu=False))
        except DoesNotFit:
            continue
        if out:
            assert scores(resources) != before or not math.isfinite(max(before))
        resources.deallocate(detour)
        assert scores(resources) == before


@ANY
@given(capacity=CAPACITIES, order=st.randoms(use_true_random=False), allocation=ALLOCATIONS)
def test_the_order_of_gpus_in_the_capacity_does_not_matter(capacity, order, allocation):
    gpus = list(capacity.gpus)
    order.shuffle(gpus)
    one, two = MachineResources(capacity), MachineResources(capacity._replace(gpus=tuple(gpus)))
    assert one.score(allocation) == two.score(allocation)
    if math.isfinite(one.score(allocation)):
        assert one.allocate(allocation) == two.allocate(allocation)


# ---- MachineResources: any sequence, while the machine changes ----

# Others use the machine, too.  No machine mixes cards with and without memory of their own.
def machines_of(unified):
    gpus = st.lists(st.builds(
        Gpu, index=st.integers(0, 5), memory_mb=st.integers(0, 9000), others=st.sampled_from(
            [0, 0, 0, 1]), utilization=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
        batch_jobs=st.sampled_from([0, 0, 0, 1]), reserved=st.integers(0, 5).map(
            lambda number: number == 0), exclusive=st.integers(0, 3).map(
            lambda number: number == 0), unified=st.just(unified)),
        max_size=4, unique_by=lambda gpu: gpu.index).map(tuple)
    return st.builds(
        Capacity, cores=st.integers(0, 8000).map(lambda number: number / 1000),
        memory_mb=st.integers(0, 12000), gpus=gpus, total_cores=st.sampled_from([2, 8]),
        max_jobs=st.none() | st.integers(0, 5), batch_jobs=st.sampled_from([0, 0, 1]),
        reserved=st.integers(0, 7).map(lambda number: number == 0))


SHORT = st.builds(
    Allocation, cores=st.sampled_from([0.1, 0.5, 1, 2, 4]), memory_mb=st.integers(0, 3000),
    reserve=st.integers(0, 9).map(lambda number: number == 0),
    gpus=st.sampled_from([0, 1, 1, 2, 3]), gpu_memory_mb=st.integers(0, 3000),
    gpu_utilization=st.sampled_from([0.1, 0.3, 0.75]), reserve_gpu=st.booleans())
STORIES = st.booleans().flatmap(lambda unified: st.tuples(
    machines_of(unified), st.lists(st.one_of(
        SHORT, SHORT, SHORT, st.integers(0, 9), machines_of(unified),
        st.tuples(SHORT, st.sets(st.integers(0, 5), max_size=2).map(sorted).map(tuple))),
        max_size=14)))


def fitting_gpus(capacity, out, wanted):
    """Return {index: Gpu} of the GPUs that can take a part of the job, by the plain rules."""
    fitting = {}
    for gpu in capacity.gpus:
        there = [p.allocation for p in out if gpu.index in p.gpus]
        left_mb = gpu.memory_mb - sum(a.gpu_memory_mb for a in there)
        time = round((1 - gpu.utilization) * 1200) - sum(
            round(1000 * a.gpu_utilization) for a in there)
        company = len(there) + gpu.batch_jobs
        if not (gpu.reserved or any(a.reserve_gpu for a in there)
                or company and wanted.reserve_gpu
                or gpu.exclusive and (company or gpu.others)
                or wanted.gpu_memory_mb > left_mb
                or round(1000 * wanted.gpu_utilization) > time):
            fitting[gpu.index] = gpu
    return fitting


def has_room(capacity, out, wanted):
    """Tell whether the job fits beside those placements, by the plain rules."""
    shared = [gpu.index for gpu in capacity.gpus if gpu.unified]
    taken_mb = sum(p.allocation.memory_mb + p.allocation.gpu_memory_mb * sum(
        index in shared for index in p.gpus) for p in out)
    wanted_mb = wanted.memory_mb + (wanted.gpus * wanted.gpu_memory_mb if shared else 0)
    cores = sum(round(1000 * p.allocation.cores) for p in out) + round(1000 * wanted.cores)
    return not (
        (capacity.max_jobs is not None and len(out) >= capacity.max_jobs)
        or capacity.reserved or any(p.allocation.reserve for p in out)
        or wanted.reserve and (out or capacity.batch_jobs)
        or taken_mb + wanted_mb > capacity.memory_mb
        or wanted.cores > max(capacity.total_cores, capacity.cores)
        or out and cores > round(1500 * capacity.cores)
        or len(fitting_gpus(capacity, out, wanted)) < wanted.gpus)


@settings(ANY, max_examples=200)
@given(story=STORIES)
def test_a_job_is_taken_if_and_only_if_the_rules_allow_it(story):
    """The rules hold after any jobs were taken, adopted or given back, and the machine changed."""
    capacity, steps = story
    resources, out = MachineResources(capacity), []
    for step in steps:
        if isinstance(step, int):
            if out:
                resources.deallocate(out.pop(step % len(out)))
        elif isinstance(step, Capacity):
            capacity = step
            resources.update(capacity)
        elif not isinstance(step, Allocation):
            out.append(resources.take(*step))          # forced: it runs there already
            assert out[-1].gpus == step[1]
        else:
            room = has_room(capacity, out, step)
            fitting = fitting_gpus(capacity, out, step)
            assert (resources.short_of(step) == '') is room
            assert (resources.why_not(step) == '') is room
            assert math.isfinite(resources.score(step)) is room
            assert resources.holder(step) or room
            if not room:
                with pytest.raises(DoesNotFit):
                    resources.allocate(step)
                assert resources.jobs == len(out)
                continue
            placement = resources.allocate(step)
            assert placement.allocation == step
            assert list(placement.gpus) == sorted(set(placement.gpus) & set(fitting))
            assert len(placement.gpus) == step.gpus
            with_others = sum(fitting[index].others > 0 for index in placement.gpus)
            free_ones = sum(not gpu.others for gpu in fitting.values())
            assert with_others == max(step.gpus - free_ones, 0)     # only if no free GPU is left
            out.append(placement)
        assert resources.jobs == len(out) == len({p.number for p in out})
    for placement in out:
        resources.deallocate(placement)
    assert (resources._cores, resources._memory_mb, resources._reserved, resources.jobs) == (0,) * 4
    assert all((use.jobs, use.memory_mb, use.time, use.reserved) == (0, 0, 0, 0)
               for use in resources._gpus.values())
    assert scores(resources) == scores(MachineResources(capacity))


# ---- MachineResources: single rules ----

def free(cores=4.0, memory_mb=8000, gpus=(), total_cores=4.0, **more):
    return MachineResources(Capacity(cores, memory_mb, tuple(gpus), total_cores, **more))


def fits(resources, **allocation):
    """Allocate, and tell whether that was possible."""
    try:
        resources.allocate(Allocation(**{'cores': 0.1, 'memory_mb': 0, 'gpus': 0, **allocation}))
    except DoesNotFit:
        return False
    return True


def test_memory_is_given_to_the_last_megabyte_and_not_beyond():
    resources = free()
    assert fits(resources, memory_mb=7999) and fits(resources, memory_mb=1)
    assert not fits(resources, memory_mb=1) and fits(resources, memory_mb=0)
    assert not fits(free(), memory_mb=8001)


def test_cores_may_be_promised_one_and_a_half_times():
    assert ssh_scheduler.CORES_OVERLOAD == 1.5
    resources = free()
    assert fits(resources, cores=4) and fits(resources, cores=2)
    assert not fits(resources, cores=0.001)
    resources = free()
    assert [fits(resources, cores=0.1) for _ in range(61)] == [True] * 60 + [False]


def test_thousandths_are_the_nearest():
    assert [ssh_scheduler.thousandths(value) for value in (1.001, 0.29, 8.2, 0.0004)] == [
        1001, 290, 8200, 0]


def test_a_busy_machine_still_takes_one_job_as_large_as_it_is():
    for cores in (0.0, 0.3):
        resources = free(cores=cores)
        assert not fits(resources, cores=4.001)
        assert fits(resources, cores=4)
        assert not fits(resources, cores=0.001)
    assert fits(free(cores=2.0, total_cores=0), cores=2)        # the number of cores is unknown
    assert not fits(free(cores=0.0, memory_mb=10), memory_mb=11)    # memory is never overbooked


def test_a_reserved_machine_has_one_job():
    resources = free()
    assert fits(resources, reserve=True) and not fits(resources)
    resources = free()
    assert fits(resources) and not fits(resources, reserve=True)
    placement = resources.allocate(NO_GPU)
    resources.deallocate(placement)
    assert not fits(resources, reserve=True)


def test_a_reserved_machine_is_free_again():
    resources = free()
    resources.deallocate(resources.allocate(Allocation(gpus=0, reserve=True)))
    assert fits(resources) and fits(resources)


def test_a_reserved_gpu_has_one_job():
    resources = free(gpus=[Gpu(0, 9000), Gpu(1, 9000)], cores=8.0)
    shared = {'gpus': 1, 'gpu_utilization': 0.1, 'reserve_gpu': False}
    assert fits(resources, **{**shared, 'reserve_gpu': True})
    assert fits(resources, **shared) and fits(resources, **shared)
    assert not fits(resources, **{**shared, 'reserve_gpu': True})
    assert fits(resources)
    resources = free(gpus=[Gpu(0, 9000)])
    reserved = resources.allocate(Allocation(0.1, 0, gpus=1, gpu_utilization=0.1))
    assert not fits(resources, **shared)
    resources.deallocate(reserved)
    assert fits(resources, **shared) and fits(resources, **shared)
    assert not fits(resources, **{**shared, 'reserve_gpu': True})


def test_the_memory_of_a_gpu_is_given_to_the_last_megabyte():
    shared = {'gpus': 1, 'gpu_utilization': 0.1, 'reserve_gpu': False}
    resources = free(gpus=[Gpu(3, 1000)])
    assert fits(resources, gpu_memory_mb=999, **shared)
    assert not fits(resources, gpu_memory_mb=2, **shared)
    assert fits(resources, gpu_memory_mb=1, **shared)
    assert not fits(resources, gpu_memory_mb=1, **shared)


def test_the_time_of_a_gpu_may_be_promised_one_and_a_fifth_times():
    assert ssh_scheduler.GPU_OVERLOAD == 1.2
    shared = {'gpus': 1, 'gpu_memory_mb': 0, 'reserve_gpu': False}
    resources = free(gpus=[Gpu(0, 1000)])
    assert [fits(resources, gpu_utilization=0.1, **shared) for _ in range(13)] == (
        [True] * 12 + [False])
    resources = free(gpus=[Gpu(0, 1000, 0.5)])      # half of its time is used by others
    assert not fits(resources, gpu_utilization=0.601, **shared)
    assert fits(resources, gpu_utilization=0.6, **shared)
    assert not fits(resources, gpu_utilization=0.001, **shared)


def test_the_roomiest_gpu_comes_first():
    shared = Allocation(0.1, 0, gpus=1, gpu_utilization=0.2, reserve_gpu=False)
    resources = free(gpus=[Gpu(0, 5000, 0.1), Gpu(1, 4000), Gpu(2, 9000), Gpu(3, 9000)], cores=8.0)
    assert [resources.allocate(shared).gpus for _ in range(5)] == [(2,), (3,), (1,), (0,), (2,)]
    assert free(gpus=[Gpu(0, 5000), Gpu(5, 9000), Gpu(2, 8000)]).allocate(
        shared._replace(gpus=2)).gpus == (2, 5)
    resources = free(gpus=[Gpu(0, 9000, 0.3), Gpu(1, 9000)])
    tiny = shared._replace(gpu_utilization=0.01)        # the second job gets the GPU without jobs
    assert [resources.allocate(tiny).gpus for _ in range(3)] == [(1,), (0,), (1,)]


def test_what_an_earlier_run_started_is_taken_whether_it_fits_or_not():
    resources = free(gpus=[Gpu(0, 9000)])
    first = resources.allocate(Allocation())
    second = resources.take(Allocation(9, 9000), (0, 7))           # GPU 7 is gone
    assert (second.gpus, second.allocation, resources.jobs) == ((0, 7), Allocation(9, 9000), 2)
    assert not fits(resources)
    resources.deallocate(first)
    assert not fits(resources) and not fits(resources, gpus=1, reserve_gpu=False)
    resources.deallocate(second)
    assert fits(resources, gpus=1, cores=4, memory_mb=8000)


def test_what_is_taken_stays_taken_when_the_machine_changes():
    resources = free(gpus=[Gpu(0, 9000), Gpu(1, 9000)])
    placement = resources.allocate(Allocation(4, 6000))
    resources.update(Capacity(1.0, 1000, (Gpu(1, 500),), 4.0))
    assert not fits(resources)
    resources.update(Capacity(8.0, 8001, (Gpu(0, 9000), Gpu(1, 500)), 8.0))
    assert not fits(resources, memory_mb=2002) and not fits(resources, gpus=1, gpu_memory_mb=501)
    assert fits(resources, memory_mb=2001, gpus=1, gpu_memory_mb=500)
    resources.deallocate(placement)
    assert fits(resources, memory_mb=6000, gpus=1, gpu_memory_mb=9000)


def test_an_exclusive_card_has_one_job_and_none_beside_others():
    shared = {'gpus': 1, 'gpu_utilization': 0.1, 'reserve_gpu': False}
    resources = free(gpus=[Gpu(0, 9000, exclusive=True)])
    assert fits(resources, **shared) and not fits(resources, **shared)
    assert not fits(free(gpus=[Gpu(0, 9000, exclusive=True, others=1)]), **shared)
    assert not fits(free(gpus=[Gpu(0, 9000, exclusive=True, batch_jobs=1)]), **shared)
    assert fits(free(gpus=[Gpu(0, 9000, others=1)]), **shared)


def test_the_memory_of_a_unified_card_is_the_machines():
    def spark():
        return free(memory_mb=8000, gpus=[Gpu(0, 8000, unified=True)])

    gpu = {'gpus': 1, 'gpu_utilization': 0.1, 'reserve_gpu': False}
    resources = spark()
    assert not fits(resources, memory_mb=2000, gpu_memory_mb=6001, **gpu)
    assert fits(resources, memory_mb=2000, gpu_memory_mb=5000, **gpu)
    assert not fits(resources, memory_mb=1001)
    assert resources.why_not(Allocation(0.1, 1001, gpus=0)) == 'has 1000 MB of memory free'
    assert fits(resources, memory_mb=1000) and not fits(resources, memory_mb=1)
    resources = spark()
    assert fits(resources, memory_mb=7000)
    assert not fits(resources, gpu_memory_mb=1001, **gpu)
    assert fits(resources, gpu_memory_mb=1000, **gpu)


def test_what_other_batches_claim_keeps_ours_away():
    shared = {'gpus': 1, 'gpu_utilization': 0.1, 'reserve_gpu': False}
    assert not fits(free(reserved=True, batch_jobs=1))
    assert not fits(free(batch_jobs=1), reserve=True) and fits(free(batch_jobs=1))
    assert not fits(free(gpus=[Gpu(0, 9000, batch_jobs=1, reserved=True)]), **shared)
    assert fits(free(gpus=[Gpu(0, 9000, batch_jobs=1)]), **shared)
    assert not fits(free(gpus=[Gpu(0, 9000, batch_jobs=1)]), gpus=1)


def test_a_card_that_others_use_is_the_last_choice_of_all():
    one = Allocation(0.1, 0, gpus=1, gpu_utilization=0.1, reserve_gpu=False)
    resources = free(gpus=[Gpu(0, 90000, others=1), Gpu(1, 1000), Gpu(2, 900)])
    assert resources.allocate(one._replace(gpu_memory_mb=800)).gpus == (1,)
    assert resources.allocate(one._replace(gpu_memory_mb=800, gpus=2)).gpus == (0, 2)
    crowded, bare = free(gpus=[Gpu(0, 9000, others=1)], cores=64.0, memory_mb=10**6), free()
    full = free(gpus=[Gpu(0, 9000)], cores=0.1, memory_mb=2000)
    assert full.score(Allocation(0.1)) > crowded.score(Allocation(0.1)) > -math.inf
    assert bare.score(Allocation(0.1)) == -math.inf


MINE = Allocation(0.1, 100, gpus=1, gpu_utilization=0.1)


@pytest.mark.parametrize(('resources', 'ours', 'wanted', 'expected'), [
    (free(gpus=[Gpu(0, 9000)]), [MINE], Allocation(), 'has 1 in use by this batch'),
    (free(gpus=[Gpu(0, 9000), Gpu(1, 500, 0.0, 9000), Gpu(2, 9000, 0.9), Gpu(3, 9000, others=1),
                Gpu(4, 9000, batch_jobs=1)]), [MINE], Allocation(gpus=5),
     'has 4 in use by others, 1 by this batch'),
    (free(gpus=[Gpu(0, 500, 0.0, 9000)]), [], Allocation(), 'has 1 in use by others'),
    (free(gpus=[Gpu(0, 9000)]), [], Allocation(gpus=2), 'has 1 GPU'),
    (free(), [], Allocation(), 'has no GPU'),
    (free(gpu_trouble='has no nvidia-smi, so no GPU is known'), [NO_GPU], Allocation(),
     'has no nvidia-smi, so no GPU is known'),
    (free(gpus=[Gpu(0, 500, 0.0, 500)]), [], Allocation(),
     'has no such GPU free (GPU 0 has 500 MB and 100% of its time free)'),
    (free(reserved=True), [], NO_GPU, 'is in use by another batch'),
    (free(batch_jobs=1), [], NO_GPU._replace(reserve=True), 'is in use by another batch'),
    (free(), [NO_GPU, NO_GPU], NO_GPU._replace(reserve=True), 'runs 2 jobs of this batch'),
    (free(max_jobs=1), [NO_GPU], NO_GPU, 'runs 1 job of this batch'),
    (free(), [NO_GPU], NO_GPU._replace(memory_mb=7001),
     'has 7000 MB of memory free, runs 1 job of this batch'),
    (free(), [], NO_GPU._replace(memory_mb=8001), 'has 8000 MB of memory free'),
    (free(), [NO_GPU], NO_GPU._replace(cores=5.5),
     'has 3.0 of 4 cores free, runs 1 job of this batch'),
    (free(), [], NO_GPU, ''),
])
def test_who_holds_what_a_job_waits_for_is_said(resources, ours, wanted, expected):
    placements = [resources.allocate(allocation) for allocation in ours]
    try:
        assert resources.holder(wanted) == expected
    finally:
        for placement in placements:        # the parameters are used again
            resources.deallocate(placement)


def test_max_jobs_is_a_limit_of_its_own():
    resources = free(max_jobs=2)
    first = resources.allocate(NO_GPU)
    assert fits(resources) and not fits(resources)
    resources.deallocate(first)
    assert fits(resources) and not fits(resources)


@pytest.mark.parametrize(('capacity', 'allocation', 'expected'), [
    (Capacity(4, 8000, total_cores=4), Allocation(memory_mb=9000, gpus=0),
     'the machine has 8000 MB of memory free'),
    (Capacity(1.25, 8000, total_cores=4), Allocation(5, gpus=0),
     'the machine has 1.2 of 4 cores free'),
    (Capacity(4, 8000, total_cores=4), Allocation(), 'the machine has no GPU'),
    (Capacity(4, 8000, total_cores=4, gpu_trouble='has no nvidia-smi, so no GPU is known'),
     Allocation(), 'the machine has no nvidia-smi, so no GPU is known'),
    (Capacity(4, 8000, (Gpu(0, 500), Gpu(2, 9000, 0.8)), 4), Allocation(),
     'the machine has no such GPU free (GPU 0 has 500 MB and 100% of its time free; '
     'GPU 2 has 9000 MB and 20% of its time free)'),
    (Capacity(4, 8000, (Gpu(0, 500), Gpu(2, 9000)), 4), Allocation(gpus=2),
     'the machine has 1 such GPU free (GPU 0 has 500 MB and 100% of its time free; '
     'GPU 2 has 9000 MB and 100% of its time free)'),
    (Capacity(4, 8000, (Gpu(0, 8000, unified=True),), 4), Allocation(gpu_memory_mb=7000),
     'the machine has too little memory for the job and its GPU'),
    (Capacity(4, 8000, max_jobs=0, total_cores=4), Allocation(gpus=0),
     'the machine already has 0 jobs, its limit'),
    (Capacity(4, 8000, total_cores=4, reserved=True), NO_GPU,
     'the machine is in use, and the job reserves the machine'),
    (Capacity(4, 8000, (Gpu(0, 9000),), 4), Allocation(gpus=2), 'the machine has 1 GPU'),
])
def test_what_does_not_fit_is_said_with_the_numbers(capacity, allocation, expected):
    with pytest.raises(DoesNotFit) as caught:
        MachineResources(capacity).allocate(allocation)
    assert str(caught.value) == expected


def test_a_placement_is_given_back_once_and_only_here():
    resources = free()
    placement = resources.allocate(NO_GPU)
    with pytest.raises(ValueError, match='is not allocated here'):
        resources.deallocate(placement._replace(allocation=NO_GPU._replace(memory_mb=1)))
    assert resources.jobs == 1
    resources.deallocate(placement)
    with pytest.raises(ValueError, match='is not allocated here'):
        resources.deallocate(placement)
    assert resources.jobs == 0
    assert scores(resources) == scores(free())


def test_a_score_prefers_the_machine_that_keeps_more_of_what_gets_scarce():
    small, large = free(cores=4.0, memory_mb=8000), free(cores=8.0, memory_mb=16000)
    assert large.score(NO_GPU) > small.score(NO_GPU)
    assert free(memory_mb=16000).score(NO_GPU) >= small.score(NO_GPU)
    before = large.score(NO_GPU)
    large.allocate(NO_GPU)
    assert large.score(NO_GPU) < before
    one = free(gpus=[Gpu(0, 9000)], cores=64.0, memory_mb=10**6, total_cores=64)
    two = free(gpus=[Gpu(0, 9000), Gpu(1, 9000)], cores=64.0, memory_mb=10**6, total_cores=64)
    assert two.score(Allocation()) > one.score(Allocation())
    two.allocate(Allocation())
    assert two.score(Allocation()) == one.score(Allocation())


def test_a_machine_with_gpus_is_kept_for_those_who_need_one():
    without, busy = free(), free(gpus=[Gpu(0, 9000)], cores=400.0, memory_mb=10**6)
    without.allocate(NO_GPU)
    without.allocate(NO_GPU)
    assert without.score(NO_GPU) > busy.score(NO_GPU) > -math.inf


@pytest.mark.parametrize(('allocation', 'gpus', 'visible'), [
    (Allocation(), (0, 3), '0,3'), (Allocation(gpus=0), (), None),
    (Allocation(reserve=True), (0,), None)])
def test_what_cuda_sees(allocation, gpus, visible):
    assert ssh_scheduler.Placement(1, allocation, gpus).visible_gpus == visible


@pytest.mark.parametrize(('allocation', 'expected'), [
    (Allocation(), '1 core and 2000 MB of memory and a GPU of its own with 1000 MB and 75% of its '
                   'time free'),
    (Allocation(0.5, 10, True, 0), '0.5 cores and 10 MB of memory on a machine of its own'),
    (Allocation(8, 10, reserve_gpu=False, gpu_utilization=0.5),
     '8 cores and 10 MB of memory and a share of a GPU with 1000 MB and 50% of its time free'),
    (Allocation(1, 10, gpus=2, reserve_gpu=False),
     '1 core and 10 MB of memory and a share of 2 GPUs, each with 1000 MB and 75% of its time '
     'free'),
])
def test_an_allocation_in_words(allocation, expected):
    assert ssh_scheduler.describe(allocation) == expected


@pytest.mark.parametrize(('shorts', 'expected'), [
    ({'memory'}, '2048 MB (2 GB) of memory (--memory-required)'),
    ({'cores'}, '0.5 cores (--num-cpus)'),
    ({'machine'}, 'a machine of its own (--reserve)'),
    ({'gpu'}, 'a GPU of its own with 1000 MB'),
    ({'gpu', 'memory'}, '0.5 cores and 2048 MB (2 GB) of memory and a GPU of its own with 1000 MB '
                        'and 75% of its time free on a machine of its own'),
])
def test_only_what_is_short_is_named(shorts, expected):
    assert ssh_scheduler.needs_in_words(Allocation(0.5, 2048, True), shorts) == expected


# ---- parse_probe ----

LAB = Machine('lab1', 'lab1')
FACTS = [('ticks_before', '0/0'), ('ticks', '5/100'), ('cores', '8'), ('load', '0.40'),
         ('MemTotal', '16384000'), ('MemAvailable', '8192000')]
SMI = [('nvidia_smi', '0'),
       ('gpu', '1, GPU-aa-bb, 24576, 20000, 7, Default, [N/A], NVIDIA GeForce RTX 3090, boxed'),
       ('gpu', '0, GPU-cc-dd, 24576, 24000, 0, Default, Disabled, NVIDIA A100-SXM4-80GB')]
OLD_SMI = [('nvidia_smi', 'old'),
           ('gpu', '0, GPU-cc-dd, 12196, 11000, 3, NVIDIA TITAN Xp, boxed')]


def probe(*facts, machine=LAB, base=FACTS, **more):
    """Return the Capacity of these facts on top of an ordinary machine's."""
    names = {key for key, _ in facts}
    return ssh_scheduler.parse_probe(
        [f for f in base if f[0] not in names] + list(facts), machine, **more)


def card(line, status='0', machine=LAB):
    """Return (the only Gpu, '') of nvidia-smi's line, or (None, why there is none)."""
    capacity = probe(('nvidia_smi', status), ('gpu', line), machine=machine)
    return (*capacity.gpus, None)[0], capacity.gpu_trouble


def test_an_ordinary_machine():
    assert probe(*SMI) == Capacity(
        cores=7.6, memory_mb=8000, total_cores=8.0, total_memory_mb=16000, gpus=(
            Gpu(0, 24000, 0.0, 24576, 'GPU-cc-dd', 'NVIDIA A100-SXM4-80GB'),
            Gpu(1, 20000, 0.07, 24576, 'GPU-aa-bb', 'NVIDIA GeForce RTX 3090, boxed',
                hidden=True)),
        limits=(11400, 8000, '1:20000:1116', '0:24000:1200'))


def test_the_end_of_a_line_may_be_that_of_another_system():
    with_cr = [(key, line + '\r') if key == 'gpu' else (key, line) for key, line in SMI]
    assert probe(*with_cr) == probe(*SMI)


@pytest.mark.parametrize(('facts', 'cores'), [
    ([('load', '3.5'), ('ticks', '50/100')], 4.5),      # the lower of the two counts
    ([('load', '6.0'), ('ticks', '25/100')], 6.0),
    ([('load', '6.0'), ('ticks_before', '100/1000'), ('ticks', '125/1100')], 6.0),
    ([('load', '6.0'), ('ticks_before', '100/1000'), ('ticks', '103/1003')], 2.0),  # too few ticks
    ([('load', '99'), ('ticks', '100/100')], 0.0),
    ([('load', 'x'), ('ticks', '25/100')], 6.0),
    ([('load', '9.0x'), ('ticks', '25/100')], 6.0),
    ([('load', 'x'), ('ticks', 'x')], 8.0),
    ([('load', '1.0'), ('ticks', '0/0')], 7.0),
    ([('load', '1.0'), ('ticks', 'x')], 7.0),
    ([('load', '1.0'), ('ticks', '200/100')], 7.0),
    ([('load', '1.0'), ('ticks_before', '500/9000'), ('ticks', '100/2000')], 7.0),
    ([('load', '0'), ('cgroup_cores', '150000/100000')], 1.5),
    ([('load', '7.5'), ('ticks', '95/100'), ('cgroup_cores', '150000/100000')], 0.5),
    ([('load', '0'), ('cgroup_cores', '400000/100000'), ('cgroup_cores', '200000/100000'),
      ('cgroup_cores', '300000/100000')], 2.0),
    ([('load', '0'), ('cgroup_cores', 'max/100000')], 0.0),
    ([('load', '0'), ('cgroup_cores', '100000/0')], 8.0),
    ([('load', '0'), ('cgroup_cores', '1600000/100000')], 8.0),
    ([('cores', 'x')], 0.0),
])
def test_the_free_cores(facts, cores):
    assert probe(*facts).cores == pytest.approx(cores)


@pytest.mark.parametrize(('facts', 'memory_mb', 'total_memory_mb'), [
    ([('MemAvailable', '1024')], 1, 16000),
    ([('MemAvailable', '1023')], 0, 16000),
    ([('MemAvailable', 'x')], 0, 16000),
    ([('MemAvailable', '99999999')], 16000, 16000),
    ([('MemTotal', 'x')], 0, 0),
    ([('cgroup_memory', str(2**30))], 1024, 16000),
    ([('cgroup_memory', f'{2**30}/{2**32}')], 1024, 4096),
    ([('cgroup_memory', f'{2**30}/{2**32}'), ('cgroup_memory', f'{2**29}/{2**33}')], 512, 4096),
    ([('cgroup_memory', f'{2**40}/{2**42}')], 8000, 16000),
    ([('cgroup_memory', f'0/{2**32}')], 0, 4096),
    ([('cgroup_memory', f'{2**31}/{2**30}')], 1024, 1024),
    ([('cgroup_memory', '-5')], 0, 16000),
])
def test_the_free_memory(facts, memory_mb, total_memory_mb):
    capacity = probe(*facts)
    assert (capacity.memory_mb, capacity.total_memory_mb) == (memory_mb, total_memory_mb)
    assert capacity.limits[1] == memory_mb


@pytest.mark.parametrize(('facts', 'trouble'), [
    ([], 'was not asked for its GPUs'),
    ([('nvidia_smi', 'absent')], 'has no nvidia-smi, so no GPU is known'),
    ([('nvidia_smi', 'absent'), ('other_gpus', 'AMD')],
     'has 1 GPU of AMD, which cannot be scheduled yet, and no nvidia-smi'),
    ([('nvidia_smi', 'absent'), ('other_gpus', 'AMD Intel AMD')],
     'has 2 GPUs of AMD and 1 GPU of Intel, which cannot be scheduled yet, and no nvidia-smi'),
    ([('nvidia_smi', 'absent'), ('other_gpus', '\x1b[31m AMDX')],
     'has no nvidia-smi, so no GPU is known'),
    ([('nvidia_smi', 'timeout')], 'has an nvidia-smi that does not answer'),
    ([('nvidia_smi', '9'), ('gpu_error', 'NVIDIA-SMI has failed\x1b[m')],
     'has an nvidia-smi that fails with status 9: NVIDIA-SMI has failed\\x1b[m'),
    ([('nvidia_smi', '9'), ('gpu', SMI[1][1])], 'has an nvidia-smi that fails with status 9: '),
    ([('nvidia_smi', '6'), ('gpu_error', 'No devices were found')],
     'has an nvidia-smi, but no GPU'),
    ([('nvidia_smi', '\x1b[31m' + 'x' * 50)],
     'has an nvidia-smi that fails with status \\x1b[31m' + 'x' * 12 + ': '),
    ([('nvidia_smi', '0')], 'has an nvidia-smi, but no GPU'),
    ([('nvidia_smi', '14')], 'has an nvidia-smi, but no GPU'),
    ([('nvidia_smi', 'old')], 'has an nvidia-smi, but no GPU'),
    ([('nvidia_smi', '0'), ('gpu', 'No devices were found')], 'has an nvidia-smi, but no GPU'),
    ([('nvidia_smi', '0'), ('gpu', 'garbage')],
     'has GPUs of which nvidia-smi reports nothing that can be read'),
    ([OLD_SMI[0], SMI[1]], ''),             # the extra words belong to the name
    ([('nvidia_smi', '0'), OLD_SMI[1]],
     'has GPUs of which nvidia-smi reports nothing that can be read'),
    ([('nvidia_smi', '0'), ('gpu', '0, GPU-a, 9000, 8000, 0, Prohibited, Disabled, A'),
      ('gpu', '1, GPU-b, 9000, 8000, [N/A], Default, Enabled, B')],
     'has GPU 0 in compute mode Prohibited; has GPU 1 divided into parts (MIG), which cannot be '
     'scheduled yet'),
])
def test_why_there_is_no_gpu(facts, trouble):
    capacity = probe(*facts)
    assert capacity.gpu_trouble == trouble
    assert bool(capacity.gpus) == (not trouble)


@pytest.mark.parametrize('line', [
    '0, GPU-a, 24576, [N/A], 0, {}, name', '0, GPU-a, 24576, 100, [N/A], {}, name',
    '0, GPU-a, [Not Supported], 100, 0, {}, name', '0, GPU-a, 24576, 100, ERR!, {}, name',
    '0, GPU-a, ERR!, ERR!, ERR!, {}, name', '0, GPU-a, ERR!, ERR!, 0, {}, name',
    '0, GPU-a, [Unknown Error], [Unknown Error], 0, {}, name',
    '0, GPU-a, [N/A], [N/A], [N/A], {}, name',
    '0, GPU-a, 24576, 100, [Unknown Error], {}, name', ', GPU-a, 24576, 100, 0, {}, name',
    '0, GPU-a, 24576, 100, 0', '0, GPU-a, 24576, -100, 0, {}, name',
    '0, GPU-a, 24576, 100, 101, {}, name', '0, GPU-a, 24576, 24577, 0, {}, name',
    '٠, GPU-a, 24576, 100, 0, {}, name', '0, GPU-a, 24576, 1e3, 0, {}, name',
    '0, GPU-a, 24576 MiB, 100 MiB, 0 %, {}, name', '', '-1, GPU-a, 24576, 100, 0, {}, name',
    '1, GPU-again, 24576, 24576, 0, {}, name', f'0, GPU-a, 24576, 100, {"9" * 5000}, {{}}, name',
    '1000, GPU-a, 24576, 100, 0, {}, name'])
def test_a_gpu_of_which_something_is_unknown_is_not_there(line):
    line = line.format('Default, Disabled')
    known = probe(*SMI[:2], ('gpu', line))
    assert [gpu.index for gpu in known.gpus] == [1]
    assert known.gpu_trouble == '' and known.gpus[0].uuid == 'GPU-aa-bb'
    assert [limit.split(':')[0] for limit in known.limits[2:]] == ['1']


@pytest.mark.parametrize('status', ['0', '14'])
def test_a_warning_of_nvidia_smi_does_not_take_the_cards_away(status):
    gpu, trouble = card('0, GPU-a, 9000, 8000, 5, Default, [N/A], A, B', status)
    assert (gpu, trouble) == (Gpu(0, 8000, 0.05, 9000, 'GPU-a', 'A, B', hidden=True), '')


LOST = 'Unable to determine the device handle for GPU0000:02:00.0: GPU is lost.  Reboot it'


@pytest.mark.parametrize(('status', 'line', 'why'), [
    ('15', LOST, 'has lost GPU0000:02:00.0 (nvidia-smi: GPU is lost.  Reboot it)'),
    ('15', LOST.replace('GPU0', 'GPU 0').replace('is lost', '\x1b[m'),
     'has lost GPU 0000:02:00.0 (nvidia-smi: GPU \\x1b[m.  Reboot it)'),
    ('15', '2, GPU-x, [GPU is lost], [GPU is lost], [GPU is lost], [N/A], [N/A], A100',
     'has lost GPU 2 (nvidia-smi: [GPU is lost])'),
    ('0', '2, GPU-x, 9000, 8000, 0, Default, Enabled, A100',
     'has GPU 2 divided into parts (MIG), which cannot be scheduled yet'),
    ('0', '2, GPU-x, 9000, 8000, 0, Prohibited, Disabled, A100',
     'has GPU 2 in compute mode Prohibited'),
])
def test_one_of_several_cards_that_cannot_be_used_is_named(status, line, why):
    facts = [('nvidia_smi', status), *SMI[1:], ('gpu', line)]
    capacity = probe(*facts)
    assert ([gpu.index for gpu in capacity.gpus], capacity.gpu_trouble) == ([0, 1], '')
    assert capacity.lost_gpus == why
    assert MachineResources(capacity).why_not(Allocation(1, 10, gpus=3)) == f'{why} and has 2 GPUs'
    assert probe(*facts, machine=LAB._replace(gpus=(1, 0))).lost_gpus == ''
    alone = probe(('nvidia_smi', status), ('gpu', line))
    assert (alone.gpus, alone.gpu_trouble, alone.lost_gpus) == ((), why, '')


def test_an_old_nvidia_smi_tells_no_modes():
    assert card(OLD_SMI[1][1], 'old') == (
        Gpu(0, 11000, 0.03, 12196, 'GPU-cc-dd', 'NVIDIA TITAN Xp, boxed', hidden=True), '')


@pytest.mark.parametrize(('modes', 'exclusive', 'trouble'), [
    ('Default, Disabled', False, ''), ('Default, [N/A]', False, ''), ('[N/A], [N/A]', False, ''),
    ('Exclusive_Process, Disabled', True, ''),
    ('Prohibited, Disabled', None, 'has GPU 0 in compute mode Prohibited'),
    ('Default, Enabled', None,
     'has GPU 0 divided into parts (MIG), which cannot be scheduled yet')])
def test_the_modes_of_a_card(modes, exclusive, trouble):
    gpu, why = card(f'0, GPU-a, 9000, 8000, 5, {modes}, A')
    assert (gpu.exclusive if gpu else None, why) == (exclusive, trouble)


NO_NUMBERS = '0, GPU-a, [N/A], [N/A], {}, Default, Disabled, NVIDIA GB10'
VOUCH = ('has GPU 0, whose free memory or use nvidia-smi does not report; '
         'to use it nevertheless, write "gpus: [0]" in the machine file')
LISTED = LAB._replace(gpus=(0,))


@pytest.mark.parametrize(('line', 'machine', 'expected'), [
    (NO_NUMBERS.format(3), LAB, (8000, 0.03, True)),
    (NO_NUMBERS.format('[N/A]'), LISTED, (8000, 0.0, True)),
    (NO_NUMBERS.format('[Not Supported]').replace('[N/A]', '[Not Supported]'), LISTED,
     (8000, 0.0, True)),
    ('0, GPU-a, 9000, 7000, [N/A], Default, Disabled, A', LISTED, (7000, 0.0, False)),
    (NO_NUMBERS.format('[N/A]'), LAB, VOUCH),
    ('0, GPU-a, 9000, 7000, [N/A], Default, Disabled, A', LAB, VOUCH)])
def test_what_nvidia_smi_does_not_tell_the_machines_file_may_vouch_for(line, machine, expected):
    gpu, trouble = card(line, machine=machine)
    found = (gpu.memory_mb, gpu.utilization, gpu.unified) if gpu else trouble
    assert found == expected


@pytest.mark.parametrize('memory', ['ERR!, ERR!', '[Unknown Error], [Unknown Error]', '9000, [N/A]',
                                    '[N/A], 9000', 'ERR!, 9000'])
def test_a_broken_card_is_not_vouched_for(memory):
    """It does not count as unified.  It does not count as working, though the file lists it."""
    gpu, trouble = card(f'0, GPU-a, {memory}, 0, Default, Disabled, A', machine=LISTED)
    assert gpu is None and 'GPU 0' in trouble
    assert 'nevertheless' not in trouble         # the file lists the GPU already


def test_a_unified_card_has_what_the_machine_has_left():
    capacity = probe(('nvidia_smi', '0'), ('gpu', NO_NUMBERS.format(0)),
                     claim(memory_mb=3000, key='-'))
    assert (capacity.memory_mb, capacity.gpus[0].memory_mb) == (5000, 5000)


def test_the_file_of_a_machine_chooses_its_gpus():
    def chosen(*indices):
        capacity = probe(*SMI, machine=LAB._replace(gpus=indices))
        return [gpu.index for gpu in capacity.gpus], capacity.gpu_trouble

    assert chosen(1) == ([1], '')
    assert chosen(0, 1, 2) == ([0, 1], '')
    assert chosen(5) == chosen() == ([], 'has none of the GPUs that its file lists')
    capacity = probe(('nvidia_smi', 'absent'), machine=LAB._replace(gpus=(0,)))
    assert capacity.gpu_trouble == 'has no nvidia-smi, so no GPU is known'


def test_max_jobs_goes_along():
    assert probe(machine=LAB._replace(max_jobs=3)).max_jobs == 3


# ---- Use of a machine: claims and processes ----

def claim(used_mb=0, ticks=0, key='job.1', cores=1000, memory_mb=1000, reserve=0, gpus=''):
    """Return the fact of a claim; cores in thousandths, gpus as INDEX:MB:THOUSANDTHS:ALONE."""
    return 'claim', f'{used_mb * 1024} {ticks} {key} {cores} {memory_mb} {reserve} {gpus}'.strip()


OURS = {'job.1', 'two.1'}
QUIET = [f for f in FACTS if f[0] not in ('load', 'ticks')] + [('load', '0'), ('ticks', '0/100')]


def test_memory_that_our_jobs_took_is_ours_and_memory_promised_to_others_is_gone():
    def free_mb(*claims):
        return probe(*claims, ours=OURS).memory_mb

    assert free_mb(claim(0), claim(0, key='two.1')) == 8000     # MachineResources counts these
    assert free_mb(claim(600), claim(500, key='two.1')) == 9100
    assert free_mb(claim(5000)) == 9000             # the 4000 above its claim are in use
    assert free_mb(claim(0, key='-')) == 7000       # promised, and not yet used
    assert free_mb(claim(400, key='-')) == 7400
    assert free_mb(claim(1000, key='-')) == 8000    # all of it used: counted once
    assert free_mb(claim(3000, key='-')) == 8000
    assert free_mb(claim(0, key='-', memory_mb=9000)) == 0
    assert free_mb(claim(0, key='other.7')) == 7000             # another batch of this project


def test_claims_of_others_are_told_and_ours_are_not():
    def told(*claims):
        capacity = probe(*claims, ours=OURS)
        return capacity.batch_jobs, capacity.reserved

    assert told() == told(claim(), claim(key='two.1', reserve=1)) == (0, False)
    assert told(claim(), claim(key='-'), claim(key='x.1')) == (2, False)
    assert told(claim(), claim(key='-', reserve=1)) == (1, True)


def test_cores_that_others_claim_leave_less_of_the_overload():
    def capacity(*claims):
        return probe(*claims, base=QUIET, ours=OURS)

    assert capacity(claim()).cores == 8
    one = capacity(claim(key='-', cores=3000))
    assert one.cores == 6 and one.limits[0] == 12000    # all batches together have the same limit
    resources = MachineResources(one)
    assert [fits(resources) for _ in range(91)] == [True] * 90 + [False]    # 9 of 12
    assert capacity(claim(key='-', cores=90000)).cores == 0


def test_the_load_of_claimed_jobs_is_not_others_load():
    def cores(load, busy, *claims):
        return probe(('load', load), ('ticks', f'{busy}/100'), *claims, ours=OURS).cores

    assert cores('4', 50) == 4
    assert cores('4', 50, claim(cores=3000)) == 7
    assert cores('4', 50, claim(cores=3000), claim(key='two.1', cores=3000)) == 8
    assert cores('4', 50, claim(key='-', cores=3000)) == 5      # 7 left by load, less 2 claimed


def test_between_two_probes_our_jobs_processor_time_is_not_others_load():
    before = ssh_scheduler.read_sample(
        [('ticks', '1000/10000'), claim(ticks=300), claim(ticks=40, key='-')])
    assert (before.busy, before.total, before.ticks) == (1000, 10000, {'job.1': 300, '': 40})

    def cores(busy, *claims, ended_ticks=0):
        return probe(('load', '7.9'), ('ticks', f'{1000 + busy}/10800'), *claims, ours=OURS,
                     before=before, ended_ticks=ended_ticks).cores

    assert cores(0) == 8                                # the load of the last minute does not count
    assert cores(400) == 4
    assert cores(400, claim(ticks=300)) == 4            # the job slept
    assert cores(400, claim(ticks=600)) == 7            # 300 of the 400 are the job's
    assert cores(400, claim(ticks=700)) == 8
    assert cores(400, claim(ticks=600), ended_ticks=100) == 8
    assert cores(400, claim(ticks=100, key='two.1'), ended_ticks=100) == 6      # a new job
    assert cores(400, claim(ticks=9000)) == 8
    assert cores(800) == 0 and cores(9000) == 0
    assert cores(400, claim(ticks=240, key='-', cores=0)) == 6  # the jobs of another batch used it
    assert cores(-10) == 8                              # the machine was restarted


def test_too_short_a_time_between_two_probes_is_not_believed():
    before = ssh_scheduler.read_sample([('ticks', '1000/10000')])
    quiet = [fact for fact in FACTS if fact[0] != 'ticks_before']       # as in later probes
    assert probe(('load', '2'), ('ticks', '1003/10003'), base=quiet, before=before).cores == 6
    assert probe(('load', '2'), ('ticks', '1004/10004'), base=quiet, before=before).cores == 0


TWO_CARDS = [('nvidia_smi', '0'), *(
    ('gpu', f'{index}, GPU-{index}, 10000, {{{index}}}, {{{index + 2}}}, Default, Disabled, A')
    for index in range(2))]


def cards(free_0, free_1, use_0, use_1, *facts, before=None):
    """Return the two cards of 10,000 MB with this much free (MB) and in use (percent)."""
    smi = [(key, line.format(free_0, free_1, use_0, use_1)) for key, line in TWO_CARDS]
    return probe(*smi, *facts, ours=OURS, before=before).gpus


def process(index, used_mb, user='ann', key=''):
    return 'gpu_process', f'GPU-{index} {used_mb} {user} {key}'


def test_who_else_is_on_a_card_is_told():
    one, two = cards(9000, 9000, 0, 0, process(0, 500, 'ann'), process(0, 300, 'bob'),
                     process(0, '[N/A]', 'ann'), process(0, 200, 'me', 'job.1'))
    assert (one.others, one.users, one.memory_mb) == (3, ('ann', 'bob'), 9000)
    assert (two.others, two.users) == (0, ())
    (one, _) = cards(9000, 9000, 0, 0, process(0, '[Not Supported]', '?'),
                     process(0, 100, 'me', 'other'), process(0, 100, 'me', 'x.1'))
    assert (one.others, one.users) == (3, ('?', 'me'))


@pytest.mark.parametrize(('free_mb', 'use', 'listed', 'hidden'), [
    (9800, 0, (), False),                       # the driver itself uses some
    (9800, 0, ('500',), False), (2000, 0, ('500', '7000'), False),
    (9800, 0, ('[N/A]',), True), (9000, 0, ('500', '[N/A]'), True),     # as in WSL
    (8000, 0, (), True), (9800, 5, (), True)])  # as in a container, whose processes are not named
def test_what_processes_use_of_a_card_is_not_always_told(free_mb, use, listed, hidden):
    listed = [process(0, used_mb, 'me', 'job.1') for used_mb in listed]
    one, two = cards(free_mb, 10000, use, 0, *listed)
    assert (one.hidden, two.hidden) == (hidden, False)
    before = ssh_scheduler.read_sample([(key, line.format(9900, 10000, 0, 0))
                                        for key, line in TWO_CARDS])
    (one, _) = cards(9700, 10000, 0, 0, before=before)
    assert one.hidden


def test_memory_of_a_card_that_our_jobs_took_is_ours():
    claims = [claim(gpus='0:3000:750:1'), claim(key='two.1', gpus='1:500:200:0')]
    one, two = cards(8000, 9900, 60, 10, *claims, process(0, 2000, 'me', 'job.1'),
                     process(1, 100, 'me', 'two.1'))
    assert (one.memory_mb, two.memory_mb) == (10000, 10000)
    assert (one.utilization, two.utilization) == (0, 0)
    assert (one.reserved, one.batch_jobs, one.others) == (False, 0, 0)
    (one, _) = cards(4000, 9900, 90, 10, *claims, process(0, 5000, 'me', 'job.1'),
                     process(0, 1000, 'ann'))
    assert one.memory_mb == 7000                # its job took more than it asked for
    assert one.utilization == pytest.approx(0.15)
    assert (one.others, one.users) == (1, ('ann',))


def test_memory_of_a_card_that_others_claim_is_gone_and_counted_once():
    theirs = claim(key='-', gpus='0:3000:300:0')
    (one, two) = cards(10000, 10000, 0, 0, theirs)
    assert (one.memory_mb, one.batch_jobs, one.reserved) == (7000, 1, False)
    assert one.utilization == pytest.approx(0.25)           # 0.3 of 1.2
    assert (two.memory_mb, two.batch_jobs, two.utilization) == (10000, 0, 0)
    (one, _) = cards(8000, 10000, 30, 0, theirs, process(0, 2000, 'ann', 'other'))
    assert (one.memory_mb, one.others) == (7000, 1)
    assert one.utilization == pytest.approx(0.25)
    (one, _) = cards(5000, 10000, 0, 0, theirs, process(0, 5000, 'ann', 'other'))
    assert one.memory_mb == 5000
    (one, _) = cards(10000, 10000, 0, 0, claim(key='-', gpus='0:3000:300:1'))
    assert one.reserved


def test_memory_is_not_given_twice_where_several_others_claim_a_card():
    """It is unknown which process of the others belongs to which claim."""
    theirs = [claim(key='-', gpus='0:4000:100:0')] * 2
    (one, _) = cards(3000, 10000, 0, 0, *theirs, process(0, 4000, 'ann', 'other'),
                     process(0, 3000, 'bob'))
    assert one.memory_mb == 0           # the others may still use 4000, and 3000 are left
    (one, _) = cards(2000, 10000, 0, 0, *theirs, process(0, 8000, 'ann', 'other'))
    assert one.memory_mb == 2000


def test_where_no_process_is_listed_what_went_since_we_came_is_ours():
    """A container does not see the processes of its cards."""
    first = [(key, line.format(9000, 6000, 0, 0)) for key, line in TWO_CARDS]
    before = ssh_scheduler.read_sample(first)
    assert before.gpu_free_mb == {0: 9000, 1: 6000}
    mine = claim(gpus='0:3000:750:0')
    (one, two) = cards(7000, 5000, 0, 0, mine, before=before)
    assert (one.memory_mb, two.memory_mb) == (9000, 5000)
    (one, _) = cards(4000, 6000, 0, 0, mine, before=before)
    assert one.memory_mb == 7000                # but not more than it asked for
    (one, _) = cards(9500, 6000, 0, 0, mine, before=before)
    assert one.memory_mb == 9500
    (one, _) = cards(7000, 6000, 0, 0, mine)    # this is the first probe
    assert one.memory_mb == 7000
    later = ssh_scheduler.read_sample([], before.gpu_free_mb)
    assert later.gpu_free_mb == {0: 9000, 1: 6000}


@pytest.mark.parametrize('text', [
    '', 'x', '1 2 job.1', '1 2 job.1 1000 100 2', '1 2 job.1 -1 100 0', '1 2  1000 100 0',
    '1 2 job.1 1000 100 0 0:1', '1 2 job.1 1000 100 0 0:1:1:2x', '٣ 2 job.1 1000 100 0',
    f'{"9" * 16} 2 job.1 1000 100 0', '1 2 job.1 1000 9999999999 0', '1 2 job.1 1000 100 0 ',
    '1 2 job.1 1000 100 0\n'])
def test_what_is_no_claim_claims_nothing(text):
    assert ssh_scheduler.read_needs([('claim', text), ('other', '1 2 job.1 1000 100 0')]) == []


def test_a_claim_is_read():
    assert ssh_scheduler.read_needs([claim(5, 70, 'a.b.2', 1500, 300, 1, '0:10:750:1 12:0:5:0'),
                                     claim(key='-'), claim(key='-ann')]) == [
        ssh_scheduler.Need('a.b.2', '', 1.5, 300, True,
                           {0: (10, 0.75, True), 12: (0, 0.005, False)}, 5, 70),
        ssh_scheduler.Need('', '', 1.0, 1000, False, {}, 0, 0),
        ssh_scheduler.Need('', 'ann', 1.0, 1000, False, {}, 0, 0)]


def test_whose_jobs_run_is_told():
    capacity = probe(claim(), claim(key='-'), claim(key='-ann'), claim(key='x.1'),
                     claim(key='-ann'), ours=OURS)
    assert (capacity.batch_jobs, capacity.batch_users) == (4, ('', '', 'ann', 'ann'))


# ---- Any facts ----

NUMBERS = st.one_of(
    st.integers(0, 10**20).map(str), st.integers(0, 120).map(str), st.just('9' * 5000),
    st.floats().map(str), st.text('0123456789٣²Ⅷ.-+ e_', max_size=6), st.sampled_from(
        ['', '0', '-1', '[N/A]', '[Not Supported]', 'ERR!', 'N/A', '1e9', '0x10', '1_000', 'nan']))
SMALL = st.integers(0, 20000).map(str)
MODES = st.sampled_from(['Default', 'Exclusive_Process', 'Prohibited', '[N/A]', 'Enabled', '', 'x'])
LINES = st.tuples(NUMBERS, st.text(max_size=5), NUMBERS, NUMBERS, NUMBERS, MODES, MODES,
                  st.text(max_size=5)).map(', '.join)
ROWS = st.tuples(st.integers(0, 9).map(str), st.just('GPU-x'), SMALL, SMALL,
                 st.integers(0, 110).map(str), MODES, MODES, st.just('A100')).map(', '.join)
PAIRS = st.tuples(NUMBERS, NUMBERS).map('/'.join) | NUMBERS
PARTS = st.lists(st.tuples(st.integers(0, 9).map(str), SMALL, st.integers(0, 2000).map(str),
                           st.sampled_from('01')).map(':'.join), max_size=3)
CLAIMS = st.tuples(SMALL, NUMBERS, st.sampled_from(['job.1', 'two.1', '-', '-ann', 'x']), SMALL,
                   SMALL, st.sampled_from('01'), PARTS.map(' '.join)).map(' '.join).map(str.strip)
USERS = st.tuples(st.sampled_from(['GPU-x', 'GPU-aa-bb']), NUMBERS | SMALL, st.text(max_size=4),
                  st.sampled_from(['', 'job.1', 'other'])).map(' '.join)
FACT = st.one_of(
    st.tuples(st.sampled_from(['cores', 'load', 'MemTotal', 'MemAvailable']), NUMBERS),
    st.tuples(st.sampled_from(['ticks', 'ticks_before', 'cgroup_cores', 'cgroup_memory']), PAIRS),
    st.tuples(st.just('gpu'), LINES | ROWS), st.tuples(st.just('claim'), CLAIMS),
    st.tuples(st.just('gpu_process'), USERS),
    st.tuples(st.just('nvidia_smi'), st.sampled_from(
        ['0', '0', '0', '14', 'old', '1', 'absent', 'timeout'])),
    st.tuples(st.sampled_from(['gpu_error', 'other_gpus']), st.text(max_size=8)),
    st.tuples(st.text(max_size=8), st.text(max_size=8)))


def number_in(text):
    """Return the text as a number, or 0 if it is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0


def check_a_capacity(facts, machine, ours, before, ended_ticks):
    """Check that the Capacity of these facts is never more than there is, and never nonsense."""
    capacity = ssh_scheduler.parse_probe(facts, machine, ours, before, ended_ticks)
    said = dict(facts)
    assert 0 <= capacity.cores <= capacity.total_cores <= float(number_in(said.get('cores', '')))
    assert 0 <= capacity.memory_mb <= capacity.total_memory_mb
    assert capacity.total_memory_mb * 1024 <= number_in(said.get('MemTotal', ''))
    claims = ssh_scheduler.read_needs(facts)
    mine = [one for one in claims if one.key in ours]
    taken_kb = 1024 * sum(min(one.used_mb, one.memory_mb) for one in mine)
    assert capacity.memory_mb * 1024 <= number_in(said.get('MemAvailable', '')) + taken_kb
    assert capacity.batch_jobs == len(claims) - len(mine)
    indices = [gpu.index for gpu in capacity.gpus]
    assert indices == sorted(set(indices))
    assert machine.gpus is None or set(indices) <= set(machine.gpus)
    for gpu in capacity.gpus:
        assert 0 <= gpu.memory_mb <= gpu.total_memory_mb and 0 <= gpu.utilization <= 1
        assert isinstance(gpu.memory_mb, int) and len(gpu.name) <= 80 and len(gpu.uuid) <= 60
        assert gpu.others == 0 or gpu.users
        assert not gpu.unified or gpu.memory_mb <= capacity.memory_mb
    assert bool(capacity.gpu_trouble) == (not capacity.gpus)
    assert capacity.gpu_trouble.isprintable()
    # The runner uses these in bash arithmetic: COUNT, then CORES MB GPU:MB:THOUSANDTHS...
    words = [str(word) for word in capacity.limits]
    assert all(re.fullmatch(r'0|[1-9][0-9]*', word) for word in words[:2])
    assert all(re.fullmatch(r'(0|[1-9][0-9]{0,2}):(0|[1-9][0-9]*):(0|[1-9][0-9]*)', word)
               for word in words[2:])
    resources = MachineResources(capacity)
    assert resources.score(Allocation(gpus=0)) <= 1 and resources.score(Allocation()) <= 1
    assert isinstance(resources.holder(Allocation()), str)


SAMPLES = st.none() | st.lists(FACT, max_size=6).map(ssh_scheduler.read_sample)
OWNERS = st.sampled_from([frozenset(), frozenset(['job.1']), frozenset(['job.1', 'two.1'])])
MACHINES = st.builds(LAB._replace, gpus=st.none() | st.lists(st.integers(0, 9)).map(tuple),
                     max_jobs=st.none() | st.integers(0, 3))


@settings(ANY, max_examples=400)
@given(facts=st.lists(FACT, max_size=14), base=st.sampled_from([[], [*FACTS, *SMI],
                                                                [*FACTS, *OLD_SMI]]),
       machine=MACHINES, ours=OWNERS, before=SAMPLES, ended_ticks=st.integers(0, 10**9))
def test_any_facts_are_a_capacity_and_never_more_than_there_is(
        facts, base, machine, ours, before, ended_ticks):
    check_a_capacity([*base, *facts], machine, ours, before, ended_ticks)


def recorded(path):
    """Return the facts of a fixture: `KEY TEXT` lines, as a machine printed them."""
    return [tuple(line.split(' ', 1)) if ' ' in line else (line, '')
            for line in path.read_text().splitlines() if line and line[0] != '#']


PROBES = sorted(Path(__file__).with_name('fixtures').glob('*.probe'))
CUTS = st.tuples(st.integers(0, 2000), st.integers(0, 20), st.binary(max_size=6))


@settings(ANY, max_examples=400)
@given(path=st.sampled_from(PROBES), cuts=st.lists(CUTS, max_size=5), end=st.integers(0, 4000),
       order=st.none() | st.randoms(use_true_random=False), machine=MACHINES, ours=OWNERS,
       again=st.booleans())
def test_recorded_facts_with_bytes_cut_and_changed_are_a_capacity(
        path, cuts, end, order, machine, ours, again):
    whole = recorded(path)
    data = b'\n'.join(b' '.join(word.encode() for word in fact) for fact in whole)
    for place, length, instead in cuts:
        place %= len(data) + 1
        data = data[:place] + instead + data[place + length:]
    lines = data[:end if end % 2 else None].decode('utf-8', 'replace').split('\n')
    if order:
        order.shuffle(lines)
    facts = [line.partition(' ')[::2] for line in lines]
    check_a_capacity(facts, machine, ours, ssh_scheduler.read_sample(whole) if again else None, 0)


@settings(ANY, max_examples=100)
@given(st.lists(st.tuples(st.sampled_from(
    ['ticks', 'cores', 'load', 'MemTotal', 'MemAvailable', 'cgroup_memory', 'cgroup_cores', 'claim',
     'nvidia_smi', 'gpu', 'gpu_process']), st.binary(max_size=60)), max_size=12))
def test_any_bytes_are_a_capacity(facts):
    check_a_capacity([(key, text.decode('utf-8', 'replace')) for key, text in facts], LAB, (), None,
                     0)


@pytest.mark.parametrize(('name', 'expected'), [
    ('cpu_only', (31.5, 61000, [], 'has no nvidia-smi, so no GPU is known')),
    ('amd', (15.8, 30000, [],
             'has 1 GPU of AMD, which cannot be scheduled yet, and no nvidia-smi')),
    ('four_cards', (170 / 3, 396000, [(0, 48000, 0, ()), (1, 3000, 1, ('ann',)),
                                      (2, 25000, 1, ('ann',)), (3, 47500, 2, ('bob', '?'))], '')),
    ('h200', (15.92, 128333, [(0, 143156, 0, ())], '')),
    ('h200_shared', (14.0, 119887, [(0, 128136, 3, ('root',))], '')),
    ('gb10', (19.0, 110000, [(0, 110000, 0, ())], '')),
    ('mig', (120.0, 900000, [(1, 81000, 0, ())], '')),
    ('old_driver', (7.0, 28000, [(0, 11000, 0, ())], '')),
    ('container', (1.5, 6000, [(0, 40000, 0, ())], '')),
    ('container_v1', (4.0, 7000, [], 'has an nvidia-smi that fails with status 9: NVIDIA-SMI has '
                      "failed because it couldn't communicate with the NVIDIA driver.")),
])
def test_what_machines_said_is_understood(name, expected):
    path = Path(__file__).with_name('fixtures') / f'{name}.probe'
    capacity = ssh_scheduler.parse_probe(recorded(path), LAB, OURS)
    gpus = [(gpu.index, gpu.memory_mb, gpu.others, gpu.users) for gpu in capacity.gpus]
    assert (capacity.cores, capacity.memory_mb, gpus, capacity.gpu_trouble) == (
        pytest.approx(expected[0]), *expected[1:])


def test_jobs_of_this_batch_on_a_shared_gpu_are_counted_once():
    facts = recorded(Path(__file__).with_name('fixtures') / 'h200_shared.probe')
    ours = {claim.key for claim in ssh_scheduler.read_needs(facts)}
    capacity = ssh_scheduler.parse_probe(facts, LAB, ours)
    (gpu,) = capacity.gpus
    assert (gpu.memory_mb, gpu.utilization) == (129306 + 3 * 4610, 0)
    assert (gpu.others, gpu.batch_jobs) == (0, 0)
    assert ssh_scheduler.gpu_memory(facts) == dict.fromkeys(ours, 4610) and len(ours) == 3


def test_each_recording_is_looked_at():
    marks = test_what_machines_said_is_understood.pytestmark[0].args[1]
    assert {path.stem for path in PROBES} == {name for name, _ in marks}
