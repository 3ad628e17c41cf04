"""Our CLIP beside transformers' with the same random weights, texts and images.

Errors are largest difference over largest value. Measured here: towers below 5e-7 in float32,
pixels below 3e-7, ids equal.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextstep_jax.interop import clip_weights
from nextstep_jax.interop.clip_inputs import ClipPreprocessing, ClipTokenizer, read_preprocessing
from nextstep_jax.interop.clip_weights import open_clip, read_clip
from nextstep_jax.models.clip import Clip, cosine
from tests import tiny_clip
from tests.parity import bridge
from tests.recorded import record_clip
from tests.recorded.record_perceptual import digest_of

pytestmark = pytest.mark.parity

BOUND = 2e-6


@pytest.fixture(scope="module", params=tiny_clip.VOCAB_SIZES)
def saved(request, torch, tmp_path_factory):
    """A live CLIP, and the folder that transformers saves of it, its tokenizer and processor."""
    from transformers.models.clip import image_processing_pil_clip

    folder = tmp_path_factory.mktemp(request.param)
    live = record_clip.live_clip(request.param)
    live.save_pretrained(folder)
    record_clip.live_tokenizer().save_pretrained(folder)
    side = tiny_clip.IMAGE_SIZE
    sizes = {"size": {"shortest_edge": side + 5}, "crop_size": {"height": side, "width": side}}
    image_processing_pil_clip.CLIPImageProcessorPil(**sizes).save_pretrained(folder)
    return request.param, live, folder


def embed(folder, images, token_ids):
    config, params = read_clip(folder)
    inputs = jnp.asarray(images), jnp.asarray(token_ids)
    return jax.jit(Clip(config).apply)({"params": params}, *inputs)


def test_towers(saved):
    variant, live, folder = saved
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["hidden_act"] == config["vision_config"]["hidden_act"]
    assert (config["text_config"]["hidden_act"] == "quick_gelu") == (variant == "first")
    images = tiny_clip.normalized_of(5, (tiny_clip.IMAGE_SIZE,) * 2)
    token_ids = tiny_clip.token_ids_of(variant)
    ours = embed(folder, images, token_ids)
    theirs = record_clip.live_embeddings(live, images, token_ids)
    for name, a, b in zip(("images", "texts"), ours, theirs, strict=True):
        bridge.check(f"{variant}: {name}", a, b, BOUND)


def test_from_pixels_and_words(saved, torch):
    """All of it, as a scorer uses it: the cosine that transformers scales to its logits."""
    from transformers.models.clip import image_processing_pil_clip

    variant, live, folder = saved
    config, _ = open_clip(folder)
    texts = record_clip.TEXTS[1:4]
    images = list(tiny_clip.images_of(6, (70, 45)))
    preprocessing = read_preprocessing(folder, config)
    assert preprocessing == ClipPreprocessing(tiny_clip.IMAGE_SIZE + 5, tiny_clip.IMAGE_SIZE)
    fitted = jnp.asarray(np.stack([preprocessing.fit(pixels) for pixels in images]))
    token_ids = ClipTokenizer(folder / "tokenizer.json", config).encode(texts)
    ours = cosine(*embed(folder, preprocessing.normalize(fitted), token_ids))
    processor = image_processing_pil_clip.CLIPImageProcessorPil.from_pretrained(folder)
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    ids = torch.from_numpy(record_clip.live_ids(record_clip.live_tokenizer(), texts))
    with torch.no_grad():
        out = live(pixel_values=pixels, input_ids=ids)
        logits = torch.diagonal(out.logits_per_image) / live.logit_scale.exp()
    bridge.check(f"{variant}: cosines", ours, logits, BOUND)


def test_token_ids(saved):
    """A saved tokenizer, and a hand-written one in the published form."""
    _, _, folder = saved
    config, _ = open_clip(folder)
    plain = folder / "plain.json"
    plain.write_text(json.dumps(tiny_clip.tokenizer_definition()))
    rng = np.random.default_rng([8])
    letters = list("abc redbluecatsquarethe 0129 .,!?'-éß猫 \t\n")
    texts = [*record_clip.TEXTS, "It'll do, we've 100% 'quoted'", "ＦＵＬＬ width e\u0301"]
    texts += ["".join(rng.choice(letters, 30)) for _ in range(50)]
    theirs = record_clip.live_ids(record_clip.live_tokenizer(), texts)
    for path in (folder / "tokenizer.json", plain):
        np.testing.assert_array_equal(ClipTokenizer(path, config).encode(texts), theirs)


@pytest.mark.parametrize("size", [(224, 224), (300, 500), (511, 257), (100, 64), (64, 1000)])
def test_pixels(torch, size):
    """At the published size."""
    images = tiny_clip.images_of(9, size, count=2)
    preprocessing = ClipPreprocessing()
    fitted = jnp.asarray(np.stack([preprocessing.fit(pixels) for pixels in images]))
    theirs = record_clip.live_pixels(images, 224)
    bridge.check(f"pixels of {size}", preprocessing.normalize(fitted), theirs, 1e-6)


@pytest.mark.parametrize("name", record_clip.PUBLISHED)
def test_names_of_the_published_sizes(torch, tmp_path, name):
    from transformers import CLIPConfig

    CLIPConfig(**record_clip.published_config(name)).save_pretrained(tmp_path)
    config = clip_weights.read_clip_config(tmp_path)
    slots = clip_weights.clip_slots(clip_weights._abstract(config))
    ours = digest_of({slot.name: slot.shape for slot in slots})
    assert ours == record_clip.digest_of_live(name)
