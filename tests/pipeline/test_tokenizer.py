import numpy as np
import pytest

from personalize_jax.models.text_encoder import PAD_ID
from tests import tiny


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def test_rows_end_with_end_of_sequence_and_padding(tokenizer):
    rows = tokenizer(["a dog", "", "a red teapot on the beach with a city in the background"])
    end = tokenizer.backend.eos_token_id
    assert rows.shape == (3, 8) and rows.dtype == np.int32
    for row, text in zip(rows[:2], ["a dog", ""], strict=True):
        ids = tokenizer.encode(text)
        assert row.tolist() == [*ids, end] + [PAD_ID] * (7 - len(ids))
    assert rows[2, -1] == end  # cut, and closed all the same
    assert PAD_ID not in rows[2]


def test_padding_is_what_the_text_encoder_masks(tokenizer):
    assert tokenizer.backend.pad_token_id == PAD_ID


def test_ordinary_text_survives(tokenizer):
    for text in tiny.CAPTIONS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & tokenizer.special_ids


def test_without_recorded_counts_no_token_has_been_processed(tokenizer):
    assert tokenizer.counts.shape == (tokenizer.size,) and not tokenizer.counts.any()
