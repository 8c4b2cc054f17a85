"""Faults of machines and networks, each named by its number in the matrix of the notes."""
from collections import Counter

from batching import NO_GPU, assert_clean, result, wrote

SOON = 'ssh_options: {ServerAliveInterval: 1, ServerAliveCountMax: 2}'


def test_a_restarted_sshd_is_found_again(batches, lab, ledger, gate):
    """Contact is lost and comes back while the batch runs: its job is gone on with."""
    machine = lab()
    batch = batches.start([f'echo 1 >>{ledger}; {gate.wait("a")}; echo end', 'echo two'],
                          [machine], '--reserve', *NO_GPU)
    wrote(ledger, '1')
    machine.stop()
    machine.start()
    gate.open('a')
    done = batch.end()
    assert done.returncode == 0, done.stderr
    assert 'lost contact (1 job goes on there)' in done.stderr
    assert 'in contact again (1 job there)' in done.stderr
    assert (result('batch.sh.1'), result('batch.sh.2')) == (b'end\n', b'two\n')
    assert Counter(ledger.read_text().split()) == Counter('1')
    assert_clean(machine)
