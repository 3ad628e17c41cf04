"""Records what transformers' CLIP computes with random weights, for the tests of ours.

Needs torch, torchvision and transformers, none of which the tests need; from the root:

    python -m tests.recorded.record_clip

writes `clip.json` beside itself. The weights, images, texts and the vocabulary are those of
`tests.tiny_clip`; the towers run in float64.
"""

import importlib.metadata
import json
import pathlib

import numpy as np

from tests import tiny_clip
from tests.recorded.record_perceptual import digest_of, summary_of

PATH = pathlib.Path(__file__).with_name("clip.json")

TEXTS = (
    "",
    "A red cat",
    "  The   blue\tSQUARE is on\nthe circle's left -- 10 of 100!",
    "Déjà vu: 猫 and naïve café, it'll do",
    "the red circle is the blue square on the red cat and so on and so on",
)
SIZES = ((48, 80), (33, 32), (32, 32), (17, 90), (250, 199))
# Width, inner width, layers and heads of the vision tower, of the text tower; embedding, patch.
PUBLISHED = {
    "B/32": ((768, 3072, 12, 12), (512, 2048, 12, 8), 512, 32),
    "B/16": ((768, 3072, 12, 12), (512, 2048, 12, 8), 512, 16),
    "L/14": ((1024, 4096, 24, 16), (768, 3072, 12, 12), 768, 14),
}


def published_config(name: str) -> dict:
    """The config.json of a published size, as far as it says anything."""
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vision, text, embed, patch = PUBLISHED[name]
    vision = {**dict(zip(keys, vision, strict=True)), "image_size": 224, "patch_size": patch}
    text = {**dict(zip(keys, text, strict=True)), "vocab_size": 49408}
    text["max_position_embeddings"] = 77
    return {
        "model_type": "clip",
        "projection_dim": embed,
        "text_config": text,
        "vision_config": vision,
    }


def live_clip(variant: str):
    """transformers' CLIP with our weights, float32."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    values = tiny_clip.config_of(variant)
    model = CLIPModel._from_config(CLIPConfig(**values), attn_implementation="sdpa")
    state = {name: torch.from_numpy(v) for name, v in tiny_clip.tensors_of(variant).items()}
    found = model.load_state_dict(state, strict=False)
    assert found.missing_keys == ["logit_scale"] and not found.unexpected_keys, found
    return model.eval()


def live_embeddings(model, images: np.ndarray, token_ids: np.ndarray):
    """Both towers, the images channels last."""
    import torch

    pixels = torch.from_numpy(images).to(model.dtype).permute(0, 3, 1, 2)
    with torch.no_grad():
        vision = model.vision_model(pixel_values=pixels).pooler_output
        text = model.text_model(input_ids=torch.from_numpy(token_ids).long()).pooler_output
        return model.visual_projection(vision), model.text_projection(text)


def live_tokenizer():
    """transformers' tokenizer with our vocabulary."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab=tiny_clip.vocabulary(), merges=tiny_clip.merges())


def live_ids(tokenizer, texts) -> np.ndarray:
    """Cut off and padded."""
    options = {"padding": "max_length", "truncation": True, "max_length": tiny_clip.CONTEXT}
    return np.array(tokenizer(list(texts), **options)["input_ids"])


def live_pixels(images: np.ndarray, side: int) -> np.ndarray:
    """The Pillow form of transformers' preprocessing, channels last."""
    from transformers.models.clip import image_processing_pil_clip

    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    processor = image_processing_pil_clip.CLIPImageProcessorPil(**sizes)
    pixels = processor(list(images), return_tensors="np")["pixel_values"]
    return np.moveaxis(pixels, 1, -1)


def digest_of_live(name: str) -> str:
    """The digest of names and shapes in a published size."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        state = CLIPModel(CLIPConfig(**published_config(name))).state_dict()
    return digest_of({n: tuple(v.shape) for n, v in state.items() if n != "logit_scale"})


def main() -> None:
    """Records everything."""
    record = {
        "made_with": {
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "tokenizers", "pillow", "numpy")
        },
        "published": {name: digest_of_live(name) for name in PUBLISHED},
        "towers": {},
        "token_ids": live_ids(live_tokenizer(), TEXTS).tolist(),
        "pixels": [],
    }
    for variant in tiny_clip.VOCAB_SIZES:
        model = live_clip(variant)
        state = {n: tuple(v.shape) for n, v in model.state_dict().items() if n != "logit_scale"}
        images = tiny_clip.normalized_of(1, (tiny_clip.IMAGE_SIZE,) * 2)
        both = live_embeddings(model.double(), images, tiny_clip.token_ids_of(variant))
        embeddings = dict(zip(("images", "texts"), (one.tolist() for one in both), strict=True))
        record["towers"][variant] = {"digest": digest_of(state), **embeddings}
    for number, size in enumerate(SIZES):
        pixels = live_pixels(tiny_clip.images_of(number, size, count=1), tiny_clip.IMAGE_SIZE)
        record["pixels"].append({"size": size, **summary_of(pixels)})
    PATH.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
