"""execute_batch --check and execute_to --init: each thing that can be wrong has its sentence."""
import rig


def test_a_good_machine(lab, run_cli, project):
    machine = lab(gpus=rig.fake_gpus(2))
    done = run_cli('execute_batch', '--check', '--machines', machine.yaml())
    print(done.stdout, done.stderr)
    assert 0
