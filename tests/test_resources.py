"""What a machine has left, and what a probe found of it."""
import collections
import itertools
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import ssh_scheduler
from ssh_scheduler import Allocation, Capacity, DoesNotFit, Gpu, Machine, MachineResources

ANY = settings(deadline=None, derandomize=True, max_examples=150)
NO_GPU = Allocation(1, 1000, gpus=0)


# ---- MachineResources: any sequence ----

# Not whole numbers, since sums of those could not show what rounding does.
CORES = st.integers(1, 12_000).map(lambda number: number / 1000) | st.floats(0.001, 4)
SHARES = st.integers(1, 1000).map(lambda number: number / 1000) | st.floats(0.001, 0.4)
ROUNDING = 0.0006               # of one job: what is in use is counted in thousandths
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
    max_jobs=st.none() | st.integers(1, 4), gpu_trouble=st.just(''))
# What is tried: an allocation to take, or the number of a placement to give back.
STEPS = st.lists(ALLOCATIONS | st.integers(0, 9), max_size=16)


def walk(resources, steps):
    """Take and give back; yield the placements that are out after each step."""
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
                assert score == -math.inf and str(error).startswith('the machine has ') or (
                    str(error) == 'the machine is in use, and was to be reserved')
            else:
                assert math.isfinite(score)
                assert placement.allocation == step
                out.append(placement)
        yield out


def last(placements):
    """Return what is out in the end."""
    return [*itertools.chain.from_iterable(collections.deque(placements, 1))]


def scores(resources):
    """Return what tells two states apart: the scores of all kinds of allocations."""
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
        if len(out) == 1:           # one job always may run, on the processors that there are
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
    assert all(use == [0, 0, 0, 0] for use in resources._gpus.values())


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
    except DoesNotFit:      # the one job for which there is always room came first, the other time
        assume(False)
    assert scores(again) == scores(resources)


@ANY
@given(capacity=CAPACITIES, steps=STEPS)
def test_a_score_with_gpus_is_of_what_is_out(capacity, steps):
    """The same placements on the same GPUs, some of them after a detour."""
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
    assert fits(free(cores=2.0, total_cores=0), cores=2)        # how many there are is not known
    assert not fits(free(cores=0.0, memory_mb=10), memory_mb=11)    # of memory there is no excess


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
    tiny = shared._replace(gpu_utilization=0.01)        # the second goes where none of ours is
    assert [resources.allocate(tiny).gpus for _ in range(3)] == [(1,), (0,), (1,)]


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
     'the machine has too little GPU (GPU 0 has 500 MB and 100% of its time free; '
     'GPU 2 has 9000 MB and 20% of its time free)'),
    (Capacity(4, 8000, max_jobs=0, total_cores=4), Allocation(gpus=0),
     'the machine has its 0 jobs'),
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
])
def test_an_allocation_in_words(allocation, expected):
    assert ssh_scheduler.describe(allocation) == expected


# ---- parse_probe ----

LAB = Machine('lab1', 'lab1')
FACTS = [('ticks', '5/100'), ('cores', '8'), ('load', '0.40'), ('MemTotal', '16384000'),
         ('MemAvailable', '8192000')]
SMI = [('nvidia_smi', '0'),
       ('gpu', '1, GPU-aa-bb, 24576, 20000, 7, NVIDIA GeForce RTX 3090, boxed'),
       ('gpu', '0, GPU-cc-dd, 24576, 24000, 0, NVIDIA A100-SXM4-80GB')]


def probe(*facts, machine=LAB, base=FACTS):
    """Return the Capacity of these facts on top of an ordinary machine's."""
    names = {key for key, _ in facts}
    return ssh_scheduler.parse_probe([f for f in base if f[0] not in names] + list(facts), machine)


def test_an_ordinary_machine():
    assert probe(*SMI) == Capacity(
        cores=7.6, memory_mb=8000, total_cores=8.0, total_memory_mb=16000, gpus=(
            Gpu(0, 24000, 0.0, 24576, 'GPU-cc-dd', 'NVIDIA A100-SXM4-80GB'),
            Gpu(1, 20000, 0.07, 24576, 'GPU-aa-bb', 'NVIDIA GeForce RTX 3090, boxed')))


@pytest.mark.parametrize(('facts', 'cores'), [
    ([('load', '3.5'), ('ticks', '50/100')], 4.5),      # the lower of what the two say is used
    ([('load', '6.0'), ('ticks', '25/100')], 6.0),
    ([('load', '99'), ('ticks', '100/100')], 0.0),
    ([('load', 'x'), ('ticks', '25/100')], 6.0),
    ([('load', '9.0x'), ('ticks', '25/100')], 6.0),
    ([('load', 'x'), ('ticks', 'x')], 8.0),
    ([('load', '1.0'), ('ticks', '0/0')], 7.0),
    ([('load', '1.0'), ('ticks', 'x')], 7.0),
    ([('load', '1.0'), ('ticks', '200/100')], 7.0),
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


@pytest.mark.parametrize(('facts', 'memory_mb'), [
    ([('MemAvailable', '1024')], 1),
    ([('MemAvailable', '1023')], 0),
    ([('MemAvailable', 'x')], 0),
    ([('MemAvailable', '99999999')], 16000),
    ([('cgroup_memory', str(2**30))], 1024),
    ([('cgroup_memory', str(2**30)), ('cgroup_memory', str(2**40))], 1024),
    ([('cgroup_memory', str(2**40))], 8000),
    ([('cgroup_memory', '-5')], 0),
])
def test_the_free_memory(facts, memory_mb):
    assert probe(*facts).memory_mb == memory_mb


@pytest.mark.parametrize(('facts', 'trouble'), [
    ([], 'was not asked for its GPUs'),
    ([('nvidia_smi', 'absent')], 'has no nvidia-smi, so no GPU is known'),
    ([('nvidia_smi', 'timeout')], 'has an nvidia-smi that does not answer'),
    ([('nvidia_smi', '9'), ('gpu_error', 'NVIDIA-SMI has failed\x1b[m')],
     'has an nvidia-smi that fails with status 9: NVIDIA-SMI has failed\\x1b[m'),
    ([('nvidia_smi', '9'), ('gpu', SMI[1][1])], 'has an nvidia-smi that fails with status 9: '),
    ([('nvidia_smi', '\x1b[31m' + 'x' * 50)],
     'has an nvidia-smi that fails with status \\x1b[31m' + 'x' * 12 + ': '),
    ([('nvidia_smi', '0')], 'has no GPU'),
    ([('nvidia_smi', '0'), ('gpu', 'No devices were found')],
     'has GPUs whose free memory or use nvidia-smi does not tell'),
])
def test_why_there_is_no_gpu(facts, trouble):
    capacity = probe(*facts)
    assert (capacity.gpus, capacity.gpu_trouble) == ((), trouble)


@pytest.mark.parametrize('line', [
    '0, GPU-a, 24576, [N/A], 0, name', '0, GPU-a, 24576, 100, [N/A], name',
    '0, GPU-a, [Not Supported], 100, 0, name', '0, GPU-a, 24576, 100, ERR!, name',
    '0, GPU-a, 24576, 100, [Unknown Error], name', ', GPU-a, 24576, 100, 0, name',
    '0, GPU-a, 24576, 100, 0', '0, GPU-a, 24576, -100, 0, name', '0, GPU-a, 24576, 100, 101, name',
    '0, GPU-a, 24576, 24577, 0, name', '٠, GPU-a, 24576, 100, 0, name',
    '0, GPU-a, 24576, 1e3, 0, name', '0, GPU-a, 24576 MiB, 100 MiB, 0 %, name', '',
    '1, GPU-again, 24576, 24576, 0, name', f'0, GPU-a, 24576, 100, {"9" * 5000}, name'])
def test_a_gpu_of_which_something_is_unknown_is_not_there(line):
    assert [gpu.index for gpu in probe(*SMI[:2], ('gpu', line)).gpus] == [1]
    known = probe(*SMI[:2], ('gpu', line))
    assert known.gpu_trouble == '' and known.gpus[0].uuid == 'GPU-aa-bb'


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


# ---- Any facts ----

NUMBERS = st.one_of(
    st.integers(0, 10**20).map(str), st.integers(0, 120).map(str), st.just('9' * 5000),
    st.floats().map(str), st.text('0123456789٣²Ⅷ.-+ e_', max_size=6), st.sampled_from(
        ['', '0', '-1', '[N/A]', '[Not Supported]', 'ERR!', 'N/A', '1e9', '0x10', '1_000', 'nan']))
LINES = st.tuples(NUMBERS, st.text(max_size=5), NUMBERS, NUMBERS, NUMBERS,
                  st.text(max_size=5)).map(', '.join)
ROWS = st.tuples(st.integers(0, 9), st.just('GPU-x'), st.integers(0, 90000), st.integers(0, 90000),
                 st.integers(0, 110), st.just('A100')).map(lambda row: ', '.join(map(str, row)))
MUTATED = st.tuples(ROWS, st.integers(0, 40), st.text(max_size=3)).map(
    lambda parts: parts[0][:parts[1]] + parts[2] + parts[0][parts[1] + len(parts[2]):])
PAIRS = st.tuples(NUMBERS, NUMBERS).map('/'.join) | NUMBERS
FACT = st.one_of(
    st.tuples(st.sampled_from(['cores', 'load', 'MemTotal', 'MemAvailable', 'cgroup_memory']),
              NUMBERS),
    st.tuples(st.sampled_from(['ticks', 'cgroup_cores']), PAIRS),
    st.tuples(st.just('gpu'), LINES | ROWS | MUTATED),
    st.tuples(st.just('nvidia_smi'), st.sampled_from(['0', '0', '0', '1', 'absent', 'timeout'])),
    st.tuples(st.just('gpu_error'), st.text(max_size=8)),
    st.tuples(st.text(max_size=8), st.text(max_size=8)))


def number_in(text):
    """Return the number that a text plainly is, else 0."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0


@settings(ANY, max_examples=300)
@given(facts=st.lists(FACT, max_size=14), ordinary=st.booleans(),
       gpus=st.none() | st.lists(st.integers(0, 9)).map(tuple))
def test_any_facts_are_a_capacity_and_never_more_than_there_is(facts, ordinary, gpus):
    facts = [*FACTS, *SMI, *facts] if ordinary else facts
    capacity = ssh_scheduler.parse_probe(facts, LAB._replace(gpus=gpus))
    said = dict(facts)
    assert 0 <= capacity.cores <= capacity.total_cores <= number_in(said.get('cores', ''))
    assert 0 <= capacity.memory_mb <= capacity.total_memory_mb
    assert capacity.memory_mb * 1024 <= number_in(said.get('MemAvailable', ''))
    assert capacity.total_memory_mb * 1024 <= number_in(said.get('MemTotal', ''))
    assert all(math.isfinite(number) for number in capacity[:2])
    indices = [gpu.index for gpu in capacity.gpus]
    assert indices == sorted(set(indices)) and (gpus is None or set(indices) <= set(gpus))
    lines = [text for key, text in facts if key == 'gpu']
    for gpu in capacity.gpus:
        assert 0 <= gpu.memory_mb <= gpu.total_memory_mb and 0 <= gpu.utilization <= 1
        assert isinstance(gpu.memory_mb, int) and len(gpu.name) <= 80 and len(gpu.uuid) <= 60
        assert any(str(gpu.memory_mb) in line for line in lines)
    assert bool(capacity.gpu_trouble) == (not capacity.gpus)
    assert capacity.gpu_trouble.isprintable() and len(capacity.gpu_trouble) < 300
    resources = MachineResources(capacity)
    assert resources.score(Allocation(gpus=0)) <= 1
    assert resources.score(Allocation()) <= 1
