import dataclasses
import json
import pickle
import subprocess
import sys

import pytest

from nextstep_jax.data import text_tokenizer as tt
from tests import published_tokenizer as published

TEXTS = ["a red circle above a blue square", "two green stars", "ein grüner Kreis", "3 + 4 = 7"]


@pytest.fixture(scope="module")
def trained():
    return tt.train_bpe(TEXTS * 5, 300)


def test_special_tokens_come_first_in_the_published_order(trained):
    expected = {
        "<|endoftext|>": 0,
        "[PAD]": 1,
        "<|image_area|>": 2,
        "<|begin_of_image|>": 3,
        "<|end_of_image|>": 4,
        "<|image_placeholder|>": 5,
    }
    spelled = [trained.decode([i], skip_special_tokens=False) for i in range(6)]
    assert dict(zip(spelled, range(6), strict=True)) == expected
    assert (trained.eos_id, trained.pad_id, trained.image_area_id) == (0, 1, 2)
    assert (trained.boi_id, trained.eoi_id, trained.image_placeholder_id) == (3, 4, 5)


def test_bytes_have_the_ids_after_the_special_tokens(tokenizer):
    # The byte alphabet of byte-level BPE, sorted, begins with the printable ASCII from "!".
    assert tokenizer.encode("!a4*") == [10, 10 + 97 - 33, 10 + 52 - 33, 10 + 42 - 33]
    assert tokenizer.vocab_size == 266
    assert len(tokenizer.encode("é")) == 2  # Two bytes in UTF-8.


def test_the_first_merge_is_the_most_frequent_pair():
    # Pairs by frequency: x y in all five words, a x in three.
    tokenizer = tt.train_bpe(["xy"] * 2 + ["axy"] * 3, 268)
    merges = json.loads(tokenizer._definition)["model"]["merges"]
    assert merges == [["x", "y"], ["a", "xy"]]
    assert tokenizer.encode("axy xy")[0] == 267
    assert tokenizer.encode("axyxy") == [267, 266]


@pytest.mark.parametrize(
    "text", ["", "a red circle", "  two  spaces\n", "grün, 圆形, 🟦", "\x00\x7f", "4*4"]
)
def test_text_comes_back(trained, text):
    assert trained.decode(trained.encode(text)) == text


@pytest.mark.parametrize("name", tt.SPECIAL_TOKENS)
def test_special_strings_in_text_are_ordinary_text(trained, name):
    text = f"draw {name} and {name}{name}"
    ids = trained.encode(text)
    assert min(ids) >= len(tt.SPECIAL_TOKENS)
    assert trained.decode(ids) == text


def test_special_strings_stay_text_when_the_file_does_not_mark_them(trained, tmp_path):
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    fields = json.loads(path.read_text())
    for token in fields["added_tokens"]:
        token["special"] = False
    path.write_text(json.dumps(fields))
    loaded = tt.TextTokenizer.from_file(path)
    assert loaded.encode("<|image_area|>") == trained.encode("<|image_area|>")
    assert loaded.image_area_id not in loaded.encode("<|image_area|>")


def test_decode_writes_or_skips_special_tokens(trained):
    ids = [*trained.encode("a star"), trained.eoi_id, trained.eos_id]
    assert trained.decode(ids) == "a star<|end_of_image|><|endoftext|>"
    assert trained.decode(ids, skip_special_tokens=True) == "a star"


def test_training_depends_on_the_texts_alone(trained):
    again = tt.train_bpe(iter(TEXTS[::-1] * 5), 300)
    assert again.fingerprint == trained.fingerprint
    assert tt.train_bpe(TEXTS * 5, 299).fingerprint != trained.fingerprint
    assert trained.vocab_size == 300


def test_file_and_pickle_keep_everything(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    for copy in (
        tt.TextTokenizer.from_file(tmp_path / "tokenizer.json"),
        pickle.loads(pickle.dumps(trained)),
    ):
        assert copy.fingerprint == trained.fingerprint
        assert copy.encode("a blue [PAD] circle") == trained.encode("a blue [PAD] circle")
        assert copy.pad_id not in copy.encode("[PAD]")


def test_bad_files_are_named(trained, tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the tokenizer .*none\.json"):
        tt.TextTokenizer.from_file(tmp_path / "none.json")
    path = tmp_path / "bad.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json: not the content of a tokenizer\.json"):
        tt.TextTokenizer.from_file(path)
    fields = json.loads(trained._definition)
    fields["added_tokens"] = [t for t in fields["added_tokens"] if t["id"] not in (1, 3)]
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"lacks the special tokens \[PAD\], <\|begin_of_image"):
        tt.TextTokenizer.from_file(path)


def test_check_lists_every_difference(tokenizer, model_config):
    tokenizer.check(model_config)
    other = dataclasses.replace(
        model_config,
        eos_id=7,
        boi_id=8,
        decoder=dataclasses.replace(model_config.decoder, vocab_size=200),
    )
    with pytest.raises(ValueError) as error:
        tokenizer.check(other)
    message = str(error.value)
    assert "eos_id: the tokenizer has 0 (<|endoftext|>), the model config 7" in message
    assert "boi_id: the tokenizer has 3" in message
    assert "vocab_size: the tokenizer has 266, the model config only 200" in message
    assert "pad_id" not in message


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size=265 must be at least 266"):
        tt.train_bpe(TEXTS, 265)


@pytest.mark.parametrize("image_tokens_special", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
def test_a_file_laid_out_as_published(image_tokens_special, normalized, tmp_path):
    """Vocabulary, Qwen's 22 tokens, then those of images, marked special or not."""
    fields = json.loads(published.build(image_tokens_special=image_tokens_special))
    for token in fields["added_tokens"]:
        token["normalized"] = normalized and not token["special"]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(fields))
    tokenizer = tt.TextTokenizer.from_file(path)
    # The published distances: 22 ids from the end of text to the padding, and so on.
    names = ("eos", "pad", "image_area", "boi", "eoi", "image_placeholder")
    ids = [getattr(tokenizer, f"{name}_id") for name in names]
    assert [i - 400 for i in ids] == [
        i - 151_643 for i in (151_643, 151_665, 151_666, 151_667, 151_668, 151_669)
    ]
    assert tokenizer.vocab_size == 400 + 33
    assert tokenizer.decode(range(400, 433)) == "".join(published.ALL_TOKENS)
    for name in (*tt.SPECIAL_TOKENS, *tt.RESERVED_TOKENS):
        assert name in published.ALL_TOKENS
        text = f"draw {name}, {name}{name}"
        ids = tokenizer.encode(text)
        assert max(ids) < 400 and tokenizer.decode(ids) == text
    for text in (published.TEXT, "l'été \r\n  ½ 圆形 🟦"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_pre_tokenizer_of_the_published_layout():
    tokenizer = tt.TextTokenizer(published.build())
    spelled = [tokenizer.decode([i]) for i in tokenizer.encode("circle's 32*32")]
    assert spelled[-6:] == [" ", "3", "2", "*", "3", "2"]  # Digits never merge.
    assert "'s" in spelled
    # NFC: a letter and its accent are the accented letter.
    assert tokenizer.encode("e\u0301te\u0301") == tokenizer.encode("été")


def test_check_against_the_ids_of_a_published_layout(model_config):
    tokenizer = tt.TextTokenizer(published.build())
    fields = {field: getattr(tokenizer, field) for field in tt.CONFIG_FIELDS}
    config = dataclasses.replace(model_config, **fields)
    tokenizer.check(config)
    with pytest.raises(ValueError, match=r"boi_id: the tokenizer has 424 .*, the model config 425"):
        tokenizer.check(dataclasses.replace(config, boi_id=425))


def plain_qwen(ids):
    """A tokenizer without image tokens, whose added tokens have these ids."""
    fields = json.loads(published.build(added=()))
    fields["added_tokens"] = [
        {"id": i, "content": name, "special": True, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for name, i in ids.items()
    ]
    return json.dumps(fields)


def test_extension_of_qwen_gives_the_published_ids():
    ids = dict(zip(published.QWEN_TOKENS, range(151_643, 151_665), strict=True))
    definition, fields = tt.extend_for_images(plain_qwen(ids))
    assert fields == {
        "eos_id": 151_643,
        "pad_id": 151_665,
        "image_area_id": 151_666,
        "boi_id": 151_667,
        "eoi_id": 151_668,
        "image_placeholder_id": 151_669,
    }
    added = {token["content"]: token["id"] for token in json.loads(definition)["added_tokens"]}
    new = (*published.IMAGE_TOKENS, *published.THOUGHT_TOKENS)
    assert added == ids | dict(zip(new, range(151_665, 151_674), strict=True))
    tokenizer = tt.TextTokenizer(definition)
    assert tokenizer.vocab_size == 151_674
    assert tokenizer.decode([151_643, 151_667, 151_673]) == (
        "<|endoftext|><|begin_of_image|><|end_of_thinking|>"
    )
    # Text is as before, and never one of the new tokens.
    before = tt.TextTokenizer(published.build())
    for text in (published.TEXT, "[PAD]<|begin_of_image|>"):
        assert tokenizer.encode(text) == before.encode(text)


def test_extension_leaves_what_exists():
    original = published.build(added=(*published.QWEN_TOKENS, "<|begin_of_image|>"))
    definition, fields = tt.extend_for_images(original)
    assert fields["eos_id"] == 400 and fields["boi_id"] == 422
    assert fields["pad_id"] == 423 and fields["eoi_id"] == 425
    assert tt.TextTokenizer(definition).vocab_size == 422 + 9
    assert tt.extend_for_images(definition) == (definition, fields)
    with pytest.raises(ValueError, match=r"the tokenizer has no <\|endoftext\|>"):
        tt.extend_for_images(published.build(added=()))
    with pytest.raises(ValueError, match=r"not the content of a tokenizer\.json"):
        tt.extend_for_images("{}")


def test_added_tokens_may_leave_gaps_but_not_share_ids():
    """The ids of the file hold where the library would count on from the vocabulary."""
    definition, _ = tt.extend_for_images(plain_qwen({"<|endoftext|>": 1000}))
    tokenizer = tt.TextTokenizer(definition)
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1000, 1001, 1010)
    assert tokenizer.decode([*tokenizer.encode("a star"), 1001]) == "a star[PAD]"
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.decode([1003]) == "<|begin_of_image|>"
    fields = json.loads(definition)
    fields["added_tokens"][1]["id"] = 7
    with pytest.raises(ValueError, match=r"the ids of \[PAD\] belong to other tokens as well"):
        tt.TextTokenizer(json.dumps(fields))


def test_the_script_writes_the_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    subprocess.run([sys.executable, published.__file__, path], check=True, timeout=60)
    assert path.read_text(encoding="utf-8") == published.build()
