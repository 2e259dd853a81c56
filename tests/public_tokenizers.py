"""Folders as public checkpoints hold their tokenizers, made from the vocabularies beside the repository.

Where these are missing, `made_t5` and `tests.tiny_public` stand in for them.
"""

import gzip
import itertools
import json
import random
import string
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2
from tokenizers import pre_tokenizers
from transformers import T5Tokenizer

VOCABULARIES = Path(__file__).parents[1] / ".." / "shared" / "tokenizers"
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
CLIP_MERGES = 48_894


def skip_without(file: Path) -> Path:
    if not file.exists():
        pytest.skip(f"{file.name}, a published vocabulary, is not in {file.parent.name} beside the repository")
    return file


def made_t5(size: int = 12_000) -> T5Tokenizer:
    """As many tokens as the paper's rule needs: random letters, two to five at the beginning of a word, and words."""
    rng = random.Random(0)
    three = ["".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=3)]
    others = ["".join(rng.choices(string.ascii_lowercase, k=k)) for k in (2, 4, 5) for _ in range(2_000)]
    texts = list(dict.fromkeys(["dog", *rng.sample(three + others, size)]))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), ("▁a", -5.0)]
    pieces += [("▁" + text, -6.0 - 10 * i / size) for i, text in enumerate(texts)]
    pieces += [(letter, -18.0) for letter in string.ascii_lowercase + string.digits]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=77)


def t5_folder(folder: Path) -> Path:
    """As in IF's pipelines: `spiece.model`."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(skip_without(VOCABULARIES / "t5_sentencepiece.model").read_bytes())
    # This copy has a <s> and sentinels of its own, which the T5 of the checkpoints has not.
    kept = [piece for piece in model.pieces if piece.piece != "<s>" and "<extra_id_" not in piece.piece]
    del model.pieces[:]
    model.pieces.extend(kept)
    model.trainer_spec.bos_id, model.trainer_spec.unk_id = -1, 2
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.SerializeToString())
    config = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    sentinels = [f"<extra_id_{i}>" for i in range(100)]
    config |= {"extra_ids": 100, "additional_special_tokens": sentinels, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def clip_folder(folder: Path, pad: str = EOS) -> Path:
    """As in Stable Diffusion's pipelines: `vocab.json` and `merges.txt`; version 2 pads with "!"."""
    with gzip.open(skip_without(VOCABULARIES / "clip_bpe_merges.txt.gz"), "rt", encoding="utf-8") as file:
        merges = file.read().splitlines()[1 : CLIP_MERGES + 1]
    # The printable bytes stand for themselves and come first.
    characters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (ord(c) > 255, ord(c)))
    tokens = [*characters, *(c + "</w>" for c in characters), *(m.replace(" ", "") for m in merges), BOS, EOS]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    for name, token in {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS}.items():
        config[name] = {"__type": "AddedToken", "content": token, "lstrip": False, "normalized": True, "rstrip": False}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": pad}))
    return folder
