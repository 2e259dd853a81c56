import numpy as np
import pytest
import sentencepiece
from transformers import CLIPTokenizer, T5Tokenizer

from personalize_jax.formats.caption_cleaning import clean_caption
from personalize_jax.formats.tokenizer import Tokenizer
from personalize_jax.models.text_encoder import PAD_ID
from personalize_jax.runtime.errors import UserError
from tests import public_tokenizers, tiny, tiny_public


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


def test_what_the_text_encoder_does_not_read_is_named_once_a_text(tokenizer, caplog):
    fits, longer = "dog dog dog dog dog dog dog", "a dog in the snow beside a teapot on the beach"
    assert len(tokenizer.encode(fits)) == tokenizer.text_length == 7
    for _ in range(2):
        rows = tokenizer([fits, longer])
    [record] = caplog.records
    read, left_out = tokenizer.encode(longer)[:7], tokenizer.encode(longer)[7:]
    assert rows[1].tolist() == [*read, tokenizer.backend.eos_token_id]
    sentence = (
        f'The text encoder reads 7 tokens of a text, and of "{longer}" it leaves out "{tokenizer.decode(left_out)}";'
    )
    assert record.getMessage().startswith(sentence)


@pytest.mark.parametrize("make", [tiny_public.t5_tokenizer, tiny_public.clip_tokenizer])
def test_rows_are_those_of_transformers_where_they_are_cut(make):
    """With the token that opens CLIP's rows and without."""
    tokenizer = Tokenizer(make(), 77, None)
    texts = ["a dog", "", "dog " * (tokenizer.text_length - 1), "dog " * tokenizer.text_length, "dog teapot " * 50]
    np.testing.assert_array_equal(tokenizer(texts), of_transformers(make(), texts))
    assert tokenizer.encode("a photo of a dog") == make()("a photo of a dog", add_special_tokens=False)["input_ids"]


PHRASES = ["", "a photo of", "an orange", "a", "dog", "with the Eiffel Tower in the background", "unspeakably"]


@pytest.mark.parametrize("make", [tiny.tokenizer, tiny_public.t5_tokenizer, tiny_public.clip_tokenizer])
@pytest.mark.parametrize("max_length", [200, 9])
def test_texts_of_phrases_are_encoded_as_the_texts(make, max_length, caplog):
    """Padded or cut, opened by a token or not, and warned of alike."""
    backend = make().backend if make is tiny.tokenizer else make()
    tokenizer = Tokenizer(backend, max_length, None)
    rows = np.random.default_rng(0).integers(0, len(PHRASES), (200, 5))
    rows[0] = 0
    texts = [" ".join(PHRASES[i] for i in row if PHRASES[i]) for row in rows]
    tokens = tokenizer.encode_phrases(PHRASES, rows)
    warned = {record.getMessage() for record in caplog.records}
    assert bool(warned) == (max_length == 9)
    np.testing.assert_array_equal(tokens, tokenizer(texts))
    assert tokens.dtype == np.int32 and tokenizer.encode_phrases(PHRASES, rows[:0]).shape == (0, max_length)


def test_vocabularies_are_told_apart_by_their_tokens(tokenizer, tmp_path):
    clip, t5 = (Tokenizer(make(), 77, None) for make in (tiny_public.clip_tokenizer, tiny_public.t5_tokenizer))
    assert len({tokenizer.fingerprint, clip.fingerprint, t5.fingerprint}) == 3
    of_transformers(clip.backend, ["a dog"])  # leaves settings in the backend, which change no token
    assert Tokenizer(clip.backend, 20, None, str.upper).fingerprint == clip.fingerprint
    clip.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).fingerprint == clip.fingerprint


def test_padding_is_what_the_text_encoder_masks(tokenizer):
    assert tokenizer.backend.pad_token_id == PAD_ID


def test_ordinary_text_survives(tokenizer):
    for text in tiny.CAPTIONS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & tokenizer.special_ids


def test_without_recorded_counts_no_token_has_been_processed(tokenizer):
    assert tokenizer.counts.shape == (tokenizer.size,) and not tokenizer.counts.any()


# --- public vocabularies ---

TEXTS = [
    "",
    " ",
    "a photo of a sks dog",
    "A Photo  of\ta\nDOG!",
    "don't we'll they're it's",
    "1024x768, 3.14 and ½",
    "café naïve Ünïcödé ﬁne ß",
    "狗 собака كلب 😀 \u200b \u00a0",
    "</s> <pad> <extra_id_7> <|endoftext|> <|startoftext|> <unk>",
    "dog! dog !dog !!",
    "[V] #hash @nick _under_score_ (x) {y} \\ / ``''",
    "a red teapot " * 40,
    "supercalifragilisticexpialidocious" * 10,
]
FOLDERS = {
    "t5": (T5Tokenizer, public_tokenizers.t5_folder),
    "clip": (CLIPTokenizer, public_tokenizers.clip_folder),
    "clip_2": (CLIPTokenizer, lambda folder: public_tokenizers.clip_folder(folder, pad="!")),
}
PHOTO = {
    "t5": [3, 9, 1202, 13, 3, 9, 3, 7, 157, 7, 1782],
    "clip": [320, 1125, 539, 320, 48136, 1929],
    "clip_2": [320, 1125, 539, 320, 48136, 1929],
}


@pytest.fixture(scope="module", params=FOLDERS)
def public(request, tmp_path_factory):
    """Its name, its folder, and the class that reads it."""
    backend_class, make = FOLDERS[request.param]
    return request.param, make(tmp_path_factory.mktemp("public") / request.param), backend_class


PUBLISHED_ROWS = {"CLIP": 49_408, "T5": 32_128}


def test_published_text_encoders_have_a_row_for_every_token(public):
    name, folder, _ = public
    rows = PUBLISHED_ROWS[next(kind for kind in PUBLISHED_ROWS if kind.lower() in name.lower())]
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.check_rows(rows)
    with pytest.raises(UserError, match=f"with id {tokenizer.size - 1}, and the text encoder's table has 30000 rows"):
        tokenizer.check_rows(30_000)


def of_transformers(backend, texts):
    return np.array(backend(texts, padding="max_length", truncation=True, max_length=77)["input_ids"])


def test_public_tokens_are_those_of_transformers(public):
    name, folder, backend_class = public
    tokenizer = Tokenizer.from_folder(folder)
    rows = tokenizer(TEXTS)
    assert rows.shape == (len(TEXTS), 77) and rows.dtype == np.int32
    np.testing.assert_array_equal(rows, of_transformers(backend_class.from_pretrained(str(folder)), TEXTS))
    assert tokenizer.encode("a photo of a sks dog") == PHOTO[name]
    assert tokenizer.decode(PHOTO[name]) == "a photo of a sks dog"
    assert tokenizer.counts is None and tokenizer.is_t5 == (name == "t5")
    assert rows[0, -1] == (49407 if name == "clip" else 0)


def test_t5_agrees_with_sentencepiece(tmp_path):
    folder = public_tokenizers.t5_folder(tmp_path)
    tokenizer = Tokenizer.from_folder(folder)
    reference = sentencepiece.SentencePieceProcessor(str(folder / "spiece.model"))
    for text in [*tiny.CAPTIONS, *TEXTS[:7]]:
        assert tokenizer.encode(text) == reference.encode(text)


@pytest.mark.parametrize("only", ["tokenizer.json", "older files"])
def test_public_tokenizers_are_saved_for_others_to_read(public, tmp_path, only):
    name, folder, backend_class = public
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer(TEXTS)
    tokenizer.save(tmp_path)
    for file in tmp_path.iterdir():
        if file.name != "tokenizer_config.json" and (file.name == "tokenizer.json") != (only == "tokenizer.json"):
            file.unlink()
    again = Tokenizer.from_folder(tmp_path)
    np.testing.assert_array_equal(again(TEXTS), tokenizer(TEXTS))
    np.testing.assert_array_equal(of_transformers(backend_class.from_pretrained(tmp_path), TEXTS), tokenizer(TEXTS))
    again.save(tmp_path)  # where it came from
    np.testing.assert_array_equal(Tokenizer.from_folder(tmp_path)(TEXTS), tokenizer(TEXTS))


def test_padding_and_truncation_of_a_file_are_not_applied_twice(public, tmp_path):
    _, folder, _ = public
    tokenizer = Tokenizer.from_folder(folder)
    of_transformers(tokenizer.backend, TEXTS)  # leaves its settings in what is saved
    tokenizer.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert again.encode("a dog") == Tokenizer.from_folder(folder).encode("a dog")
    np.testing.assert_array_equal(again(TEXTS), of_transformers(tokenizer.backend, TEXTS))


def test_texts_are_cleaned_wherever_they_are_encoded(public):
    _, folder, _ = public
    plain, cleaning = Tokenizer.from_folder(folder), Tokenizer.from_folder(folder, clean=clean_caption)
    text = "<b>A dog</b> at dogs.com, 1024x768"
    assert cleaning.encode(text) == plain.encode(clean_caption(text)) != plain.encode(text)
    np.testing.assert_array_equal(cleaning([text]), plain([clean_caption(text)]))


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "tokenizer_config.json cannot be read"),
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json cannot be read"),
        ({"tokenizer_config.json": "{}"}, "tokenizer_config.json cannot be read"),
        (
            {"tokenizer_config.json": '{"tokenizer_class": "BertTokenizer"}'},
            "holds a BertTokenizer; give the folder of",
        ),
        ({"tokenizer_config.json": '{"tokenizer_class": "T5TokenizerFast"}'}, "add tokenizer.json, or spiece.model"),
        (
            {"tokenizer_config.json": '{"tokenizer_class": "CLIPTokenizer"}', "vocab.json": "{}"},
            "add tokenizer.json, or vocab.json and merges.txt",
        ),
        ({"tokenizer_config.json": '{"tokenizer_class": "T5Tokenizer"}', "tokenizer.json": "{"}, "cannot be read"),
        ({"tokenizer_config.json": '{"tokenizer_class": "T5Tokenizer"}', "spiece.model": "no"}, "cannot be read"),
    ],
)
def test_folders_that_hold_no_tokenizer_are_refused(tmp_path, files, sentence):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=sentence):
        Tokenizer.from_folder(tmp_path)


def test_a_place_that_cannot_be_written_is_named(tokenizer, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to .*file"):
        tokenizer.save(tmp_path / "file")
