import pytest

from tests import kill_resume, processes


def start(arguments, files):
    return processes.start(processes.run_module, kill_resume.COMMAND, arguments, files)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, 20])
def test_killed_at_random_moments_and_resumed_it_is_the_uninterrupted_run_bit_for_bit(
    pretrained, photos, tmp_path, kills
):
    arguments = [f"--config=tests/tiny_world.py:{pretrained}", f"--images={photos}", "--class_noun=dog"]
    killed = kill_resume.survive(arguments, tmp_path, kills, seed=0, start=start)
    assert killed.total() == kills and len(killed) > 1
