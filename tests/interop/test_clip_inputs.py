import json

import jax.numpy as jnp
import numpy as np
import pytest

from nextstep_jax.interop.clip_inputs import ClipPreprocessing, ClipTokenizer, read_preprocessing
from nextstep_jax.models.clip import ClipConfig, TowerConfig
from tests import tiny_clip
from tests.recorded import record_clip
from tests.recorded.record_perceptual import summary_of

RECORD = json.loads(record_clip.PATH.read_text())
SIDE = tiny_clip.IMAGE_SIZE


def config_of(end_id=tiny_clip.END_ID, vocab_size=tiny_clip.END_ID + 1, image_size=SIDE):
    tower = TowerConfig(8, 8, 1, 2)
    size = {"image_size": image_size, "patch_size": image_size}
    length = {"vocab_size": vocab_size, "context_length": tiny_clip.CONTEXT}
    return ClipConfig(tower, tower, 8, **size, **length, end_id=end_id)


def write(folder, name, values):
    path = folder / name
    path.write_text(json.dumps(values))
    return path


@pytest.fixture
def tokenizer_path(tmp_path):
    return write(tmp_path, "tokenizer.json", tiny_clip.tokenizer_definition())


@pytest.mark.parametrize("number", range(len(RECORD["pixels"])))
def test_pixels_of_the_original(number):
    record = RECORD["pixels"][number]
    (pixels,) = tiny_clip.images_of(number, tuple(record["size"]), count=1)
    preprocessing = ClipPreprocessing(SIDE, SIDE)
    fitted = preprocessing.fit(pixels)
    assert fitted.shape == (SIDE, SIDE, 3)
    assert fitted.dtype == np.uint8
    found = summary_of(preprocessing.normalize(jnp.asarray(fitted[None])))
    for key in ("mean", "rms", "values"):
        np.testing.assert_allclose(found[key], record[key], atol=1e-6)


def test_margins():
    """Of a ramp that is not resized; an odd margin is longer behind."""
    pixels = np.broadcast_to(np.arange(9, dtype=np.uint8)[None, :, None], (4, 9, 3))
    fitted = ClipPreprocessing(4, 4).fit(pixels)
    np.testing.assert_array_equal(fitted[0, :, 0], [2, 3, 4, 5])
    fitted = ClipPreprocessing(4, 2).fit(pixels.transpose(1, 0, 2))
    np.testing.assert_array_equal(fitted[:, 0, 0], [3, 4])
    assert fitted.shape == (2, 2, 3)


def test_read_preprocessing(tmp_path):
    assert read_preprocessing(tmp_path, config_of()) == ClipPreprocessing(SIDE, SIDE)
    sizes = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    other = {"image_mean": [0.5, 0.5, 0.25], "image_std": [1, 0.5, 0.25], "resample": 3}
    expected = ClipPreprocessing(40, 32, (0.5, 0.5, 0.25), (1.0, 0.5, 0.25))
    write(tmp_path, "processor_config.json", {"image_processor": {**sizes, **other}})
    assert read_preprocessing(tmp_path, config_of()) == expected
    # The file of its own comes first, and older ones have plain numbers.
    write(tmp_path, "preprocessor_config.json", {"size": 36, "crop_size": 32, "do_resize": True})
    assert read_preprocessing(tmp_path, config_of()) == ClipPreprocessing(36, 32)
    write(tmp_path, "preprocessor_config.json", {})
    assert read_preprocessing(tmp_path, config_of(image_size=224)) == ClipPreprocessing()


def test_faults_of_preprocessing_are_all_listed(tmp_path):
    values = {
        "do_center_crop": False,
        "resample": 2,
        "rescale_factor": 1.0,
        "size": {"height": 32, "width": 32},
        "crop_size": {"height": 30, "width": 32},
        "image_mean": [0.5, 0.5],
    }
    path = write(tmp_path, "preprocessor_config.json", values)
    with pytest.raises(ValueError) as caught:
        read_preprocessing(tmp_path, config_of())
    for words in (
        str(path),
        "do_center_crop=False is not supported, only True",
        "resample=2 is not supported, only 3",
        "rescale_factor=1.0 is not supported, only 1/255",
        "size={'height': 32, 'width': 32} must be given as shortest_edge",
        "crop_size={'height': 30, 'width': 32} must be a square",
        "crop_size=30 is not the model's image_size=32",
        "image_mean=[0.5, 0.5] must be three finite numbers",
    ):
        assert words in str(caught.value)
    write(tmp_path, "preprocessor_config.json", {"size": 30, "crop_size": 32})
    with pytest.raises(ValueError, match="crop=32 must be at most resize=30"):
        read_preprocessing(tmp_path, config_of())


def test_ids_of_the_original(tokenizer_path):
    tokenizer = ClipTokenizer(tokenizer_path, config_of())
    ids = tokenizer.encode(record_clip.TEXTS)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, RECORD["token_ids"])
    # The last text is cut off, and still ends.
    assert ids[-1, -1] == tokenizer.end_id == tiny_clip.END_ID
    assert tokenizer.end_id not in ids[-1, :-1]


def test_no_text_ends_itself(tokenizer_path):
    tokenizer = ClipTokenizer(tokenizer_path, config_of())
    (ids,) = tokenizer.encode(["a<|endoftext|>"])
    assert list(ids).index(tokenizer.end_id) > 3
    assert list(ids[1:]).count(tokenizer.start_id) == 0


def test_faults_of_tokenizers(tmp_path, tokenizer_path):
    with pytest.raises(FileNotFoundError, match=r"none.json is not there"):
        ClipTokenizer(tmp_path / "none.json", config_of())
    broken = write(tmp_path, "broken.json", {"model": 3})
    with pytest.raises(ValueError, match=r"broken.json is not a tokenizer.json"):
        ClipTokenizer(broken, config_of())
    bare = write(
        tmp_path, "bare.json", {**tiny_clip.tokenizer_definition(), "post_processor": None}
    )
    with pytest.raises(ValueError, match=r"an empty text has the ids \[\], expected start and end"):
        ClipTokenizer(bare, config_of())
    end = tiny_clip.END_ID
    for config, words in (
        (config_of(vocab_size=end), f"ids up to {end}, the model a vocabulary of {end}"),
        (config_of(end_id=5), f"its end token is {end}, the model's 5"),
    ):
        with pytest.raises(ValueError, match=words):
            ClipTokenizer(tokenizer_path, config)
    definition = tiny_clip.tokenizer_definition()
    definition["model"]["vocab"]["extra"] = end + 1
    extended = write(tmp_path, "extended.json", definition)
    words = f"its end token {end} is not its largest id, {end + 1}"
    with pytest.raises(ValueError, match=words):
        ClipTokenizer(extended, config_of(end_id=None, vocab_size=end + 2))
    ClipTokenizer(extended, config_of(vocab_size=end + 2))
