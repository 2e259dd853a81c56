import pytest

from personalize_jax.world.captions import asked
from personalize_jax.world.exact_metrics import subject_scores
from tests.world.test_reading import SIZES, coloured

TRUTH = {name: 0 for name in SIZES if name not in ("context", "accessory")} | {"body_colour": 3}


def test_what_a_prompt_changes_counts_for_the_prompt_and_not_against_the_subject():
    changed, unchanged = "a red [V] dog", "a [V] dog"
    red = asked(changed)["body_colour"]
    own, other = subject_scores(coloured([3, red]), TRUTH, [unchanged, unchanged])
    assert (own["body colour"], other["body colour"]) == pytest.approx((1, 0)) and "property" not in own
    kept, followed = subject_scores(coloured([3, red]), TRUTH, [changed, changed])
    assert (kept["property"], followed["property"]) == pytest.approx((0, 1))
    assert "body colour" not in kept | followed and kept["accent colour"] == 1
