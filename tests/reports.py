"""Made-up folders job_results, as batches on many machines leave them: for test_report_page.py.

The times are those of one made-up clock, which begins at BEGIN.
"""
import heapq
import json
import math
import random
from pathlib import Path

BEGIN = 1795770000.0            # seconds since 1970
RATES = ('0.0003', '0.001', '0.003', '0.01', '0.03')
FILES, OTHER_FILES = 'a3f9c1d27b55e001', 'b7e2200000000000'
OUT_OF_MEMORY = '''Traceback (most recent call last):
  File "train.py", line 88, in <module>
    step()
torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.
'''
EXPLODED = '''Traceback (most recent call last):
  File "train.py", line 88, in <module>
    main()
ValueError: loss is 496.8 at epoch 4: choose a smaller --lr
'''


class Folder:
    """A job_results that grows job by job; `close` writes its journal and its samples."""

    def __init__(self, path='job_results'):
        self.path = Path(path)
        self.inner = self.path / '.ssh_scheduler'
        self.inner.mkdir(parents=True)
        self.events, self.samples = [], []

    def event(self, event, time_s, **facts):
        self.events.append({'event': event, **facts, 'time': round(time_s, 3)})

    def begin(self, batch='grid.sh'):
        self.events.append({'event': 'journal', 'identity': '6e81765f', 'version': 2})
        self.event('begun', BEGIN, batch=batch)
        return self

    def machine(self, name, gpus=0, time_s=BEGIN + 1):
        self.event('machine', time_s, machine=name, facts={
            'kernel': '6.1.0-21-amd64', 'cores': 16, 'memory_mb': 64000, 'driver': '570.124',
            'python': '3.11.2', 'gpus': [{'index': index, 'model': 'NVIDIA H200',
                                          'memory_mb': 143771} for index in range(gpus)]})

    def claim(self, name, command, time_s, machine='lab1:22', gpus=None, attempt=1, **facts):
        self.event('claimed', time_s, **{
            'job': name, 'attempt': attempt, 'machine': machine, 'gpus': gpus, 'command': command,
            'where': f'{machine.partition(":")[0]}.yaml', 'batch': 'grid.sh', 'files': FILES,
            **facts})

    def end(self, name, time_s, wall_s, exit_code=0, **facts):
        self.event('ended', time_s, job=name, exit_code=exit_code, wall_s=round(wall_s, 2), **facts)
        self.event('collected', time_s, job=name, kept=[])

    def streams(self, name, out='', err=''):
        (self.path / name).mkdir()
        self.stream(name, 'out', out)
        self.stream(name, 'err', err)

    def stream(self, name, end, text):
        data = text if isinstance(text, bytes) else text.encode()
        (self.path / f'{name}.{end}').write_bytes(data)

    def job(self, name, command, time_s=BEGIN + 1, wall_s=60.0, out='', err='', exit_code=0,
            **claim):
        """Add a job that ran on one machine from begin to end."""
        self.claim(name, command, time_s, **claim)
        self.streams(name, out, err)
        self.end(name, time_s + wall_s, wall_s, exit_code)
        return self

    def seen(self, machine, time_s, busy_cores, used_memory_mb, gpus=()):
        self.samples.append({
            'machine': machine, 'time': round(time_s, 1), 'busy_cores': round(busy_cores, 2),
            'cores': 16, 'used_memory_mb': used_memory_mb, 'memory_mb': 64000, 'gpus': list(gpus)})

    def sent(self, digest, **record):
        folder = self.inner / 'sent' / digest
        folder.mkdir(parents=True)
        (folder / 'record.json').write_text(json.dumps(
            {'version': 1, 'time': BEGIN, 'files': 12, 'bytes': 34567, **record}))
        (folder / 'files.json').write_text(json.dumps({'train.py': ['100644', 9, 1, digest]}))
        (folder / 'diff.patch').write_text('--- a\n')

    def close(self):
        in_order = sorted(self.events, key=lambda event: event.get('time', 0))
        (self.inner / 'journal').write_text(lines_of(in_order))
        if self.samples:
            (self.inner / 'seen').write_text(lines_of(self.samples))
        return self


def lines_of(objects):
    return ''.join(json.dumps(one) + '\n' for one in objects)


# ---- A sweep: 5 learning rates, 2 models, 3 seeds ----

MACHINES = {'lab1': 2, 'lab2': 2, 'lab3': 1, 'lab4': 0}         # name: number of GPUs


def outcome(number, rate, model):
    """Return (exit code, epochs, stderr): large models explode at the largest rate."""
    if (rate, model) == ('0.03', 'large'):
        return 1, 4, EXPLODED
    return (1, 9, OUT_OF_MEMORY) if number == 11 else (0, 40, '')


def training(rng, rate, model, exit_code, epochs):
    """Return the output of a job: the best rate is 0.003, and the large model is better."""
    best = 0.35 + 0.25 * abs(math.log10(float(rate) / 0.003)) + 0.06 * (model == 'small')
    lines = []
    for epoch in range(epochs):
        loss = best + (2.3 - best) * math.exp(-epoch / 5) + rng.gauss(0, 0.01)
        if (rate, model) == ('0.03', 'large'):
            loss = 2.3 * 6 ** epoch
        lines.append(f'epoch {epoch}: train_loss {loss:.4f}, val_acc {1 - min(loss / 3, 1):.4f}')
    if exit_code == 0:
        lines.append(f'test_loss: {best + rng.gauss(0, 0.02):.4f}')
    return '\n'.join(lines) + '\n'


def sweep(path='job_results'):
    """Make the sweep.  lab4 gets no job; lab3 gets two, and loses the first attempt of one."""
    folder, rng = Folder(path).begin(), random.Random(1)
    for name, gpus in MACHINES.items():
        folder.machine(f'{name}:22', gpus)
    free = {(name, gpu): BEGIN + 3 + rng.random() for name, gpus in MACHINES.items()
            for gpu in range(gpus)}
    busy, on_lab3 = [], 0
    settings = [(rate, model, seed) for rate in RATES for model in ('small', 'large')
                for seed in (1, 2, 3)]
    for number, (rate, model, seed) in enumerate(settings, 1):
        slot = min((one for one in free if one[0] != 'lab3' or on_lab3 < 2), key=free.get)
        on_lab3 += slot[0] == 'lab3'
        name, time_s = f'grid.sh.{number}', free[slot]
        claim = {'command': f'python3 train.py --lr {rate} --model {model} --seed {seed} '
                            '--epochs 40', 'machine': f'{slot[0]}:22', 'gpus': str(slot[1]),
                 'files': FILES if number < 27 else OTHER_FILES, 'variables': ['WANDB_API_KEY'],
                 'asked': {'memory_mb': 8000, 'cores': 2.0, 'gpus': 1, 'gpu_memory_mb': 24000}}
        if slot[0] == 'lab3' and on_lab3 == 2:
            folder.claim(name, time_s=time_s, **claim)
            folder.event('lost', time_s + 100, job=name)
            time_s, claim['attempt'] = time_s + 130, 2
        exit_code, epochs, err = outcome(number, rate, model)
        wall_s = (260 if model == 'small' else 420) * (0.9 + 0.2 * rng.random()) * epochs / 40
        folder.claim(name, time_s=time_s, **claim)
        folder.streams(name, training(rng, rate, model, exit_code, epochs), err)
        folder.end(name, time_s + wall_s, wall_s, exit_code,
                   cpu_s=round(wall_s * (1.1 + 0.5 * rng.random()), 1),
                   peak_memory_mb=2400 + 50 * number,
                   peak_gpu_memory_mb=9000 * (1 + (model == 'large')) + 20 * number)
        busy.append((slot, time_s, time_s + wall_s))
        free[slot] = time_s + wall_s + 4
    watch(folder, busy, rng)
    folder.sent(FILES, commit='4c8f1d0e' * 5, branch='main', changed=['train.py'], untracked=[])
    folder.sent(OTHER_FILES, commit='4c8f1d0e' * 5, branch='main', changed=['train.py', 'model.py'],
                untracked=['notes.txt'])
    return folder.close()


def watch(folder, busy, rng):
    """Add samples of the machines, with a gap for lab2."""
    for step in range(int((max(end for _, _, end in busy) - BEGIN) / 8)):
        time_s = BEGIN + 8 * step
        for name, gpus in MACHINES.items():
            if name == 'lab2' and 60 < step < 90:
                continue
            running = {slot[1] for slot, begin, end in busy
                       if slot[0] == name and begin <= time_s <= end}
            folder.seen(f'{name}:22', time_s, 0.2 + 1.4 * len(running) + rng.random() / 3,
                        6000 + 4000 * len(running), [
                [gpu, 12000 if gpu in running else 400, 143771,
                 round(0.7 + 0.25 * rng.random(), 2) if gpu in running else 0.0]
                for gpu in range(gpus)])


# ---- 10,000 jobs ----

def many_jobs(path='job_results', count=10_000, machines=25, gpus=8):
    """Make this many jobs of a random search, each with 20 lines of output."""
    folder, rng = Folder(path).begin('big.sh'), random.Random(2)
    free = [(BEGIN + rng.random() * 5, f'gpu{machine:02}', gpu)
            for machine in range(machines) for gpu in range(gpus)]
    heapq.heapify(free)
    for number in range(1, count + 1):
        time_s, machine, gpu = heapq.heappop(free)
        name, rate = f'big.sh.{number}', 10 ** rng.uniform(-4, -1)
        best = 0.3 + abs(math.log10(rate) + 2.5) * 0.2 + rng.gauss(0, 0.03)
        fails, wall_s = rng.random() < 0.03, rng.lognormvariate(5, 0.5)
        out = ''.join(f'2026-11-27 12:00:{epoch:02} INFO epoch={epoch} '
                      f'loss={best + 2 * math.exp(-epoch / 4):.4f}\n' for epoch in range(20))
        folder.claim(name, f'python3 train.py --lr {rate:.2e} --depth {rng.choice((2, 4, 8))} '
                     f'--optimizer {rng.choice(("adam", "sgd"))} --seed {number % 10} '
                     '--data /data/sets/imagenet-1k --epochs 20', time_s, machine, str(gpu),
                     batch='big.sh', asked={'memory_mb': 4000, 'gpus': 1, 'gpu_memory_mb': 8000})
        folder.stream(name, 'out', out + f'val_loss: {best:.5f}\n')    # skip empty files: faster
        if fails:
            folder.stream(name, 'err', EXPLODED)
        folder.end(name, time_s + wall_s, wall_s, int(fails), cpu_s=round(wall_s * 1.3, 2),
                   peak_memory_mb=rng.randint(900, 3900),
                   peak_gpu_memory_mb=rng.randint(2000, 7900))
        heapq.heappush(free, (time_s + wall_s + 1, machine, gpu))
    end = max(time_s for time_s, _, _ in free)
    for step in range(300):
        for machine in range(machines):
            folder.seen(f'gpu{machine:02}', BEGIN + step * (end - BEGIN) / 300, rng.uniform(2, 12),
                        rng.randint(9000, 40000), [
                [gpu, rng.randint(3000, 9000), 80000, round(rng.random(), 2)]
                for gpu in range(gpus)])
    return folder.close()
