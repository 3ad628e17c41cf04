"""A tiny CLIP in the files that transformers writes, all of it drawn from names and shapes.

Two variants: the first release's (quick_gelu, the end token marked 2 in the config and read as the
largest id) and a later one's (gelu, the end token by its id, ids above it).
"""

import json
import zlib

import numpy as np
from safetensors.numpy import save_file
from tokenizers import pre_tokenizers

MERGES = (
    *("r e", "re d</w>", "b l", "bl u", "blu e</w>", "t h", "th e</w>", "c a", "ca t</w>"),
    *("s q", "u a", "r e</w>", "sq ua", "squa re</w>", "o n</w>", "i n", "in g</w>", "1 0"),
    *("c i", "r c", "l e</w>", "ci rc", "circ le</w>", "' s</w>", "' t</w>"),
)
START, END = "<|startoftext|>", "<|endoftext|>"
CONTEXT, IMAGE_SIZE, PATCH_SIZE, EMBED_DIM = 12, 32, 8, 16


def merges():
    return [tuple(merge.split(" ")) for merge in MERGES]


def vocabulary():
    """Bytes, bytes that end a word, merges, start and end: the order of the published one."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*bytes_, *(f"{b}</w>" for b in bytes_), *map("".join, merges()), START, END]
    return {token: number for number, token in enumerate(tokens)}


END_ID = len(vocabulary()) - 1
VOCAB_SIZES = {"first": END_ID + 1, "later": END_ID + 9}


def config_of(variant):
    """The content of config.json."""
    first = variant == "first"
    both = {"hidden_act": "quick_gelu" if first else "gelu"}
    both |= {"layer_norm_eps": 1e-5 if first else 1e-2}
    text = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": CONTEXT}
    text |= {"vocab_size": VOCAB_SIZES[variant], "eos_token_id": 2 if first else END_ID}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    return {
        "model_type": "clip",
        "projection_dim": EMBED_DIM,
        "text_config": {**both, **text},
        "vision_config": {**both, **vision},
    }


def shapes_of(values):
    """The tensors of a `CLIPModel` without what is not used, by name."""
    text, vision = values["text_config"], values["vision_config"]
    width, embed = vision["hidden_size"], values["projection_dim"]
    positions = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    shapes = {
        "visual_projection.weight": (embed, width),
        "text_projection.weight": (embed, text["hidden_size"]),
        "vision_model.embeddings.class_embedding": (width,),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, *[vision["patch_size"]] * 2),
        "vision_model.embeddings.position_embedding.weight": (positions, width),
    }
    for part in ("token", "position"):
        count = text["vocab_size" if part == "token" else "max_position_embeddings"]
        name = f"text_model.embeddings.{part}_embedding.weight"
        shapes[name] = (count, text["hidden_size"])
    norms = {
        "vision_model.pre_layrnorm": width,
        "vision_model.post_layernorm": width,
        "text_model.final_layer_norm": text["hidden_size"],
    }
    for tower, section in (("vision_model", vision), ("text_model", text)):
        width, inner = section["hidden_size"], section["intermediate_size"]
        for number in range(section["num_hidden_layers"]):
            layer = f"{tower}.encoder.layers.{number}"
            norms |= {f"{layer}.layer_norm1": width, f"{layer}.layer_norm2": width}
            linear = {f"self_attn.{p}_proj": (width, width) for p in ("k", "v", "q", "out")}
            linear |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
            for name, shape in linear.items():
                shapes[f"{layer}.{name}.weight"], shapes[f"{layer}.{name}.bias"] = shape, shape[:1]
    for name, size in norms.items():
        shapes |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    return shapes


def tensor_of(name, shape):
    """A weight by its name: nothing is near one or zero where it could be left out unseen."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), len(shape)])
    values = rng.standard_normal(shape, np.float32)
    if name.endswith("bias"):
        values = values / 2
    elif "norm" in name:
        values = np.sign(values) * np.exp(0.7 * np.abs(values) - 0.5)
    elif "embedding" not in name or "patch" in name:
        values = values / np.sqrt(np.prod(shape[1:]))
    return values.astype(np.float32)


def tensors_of(variant):
    return {name: tensor_of(name, shape) for name, shape in shapes_of(config_of(variant)).items()}


def images_of(seed, size, count=3):
    """uint8 images (count, height, width, 3): waves under noise."""
    rng = np.random.default_rng([70, seed])
    y, x = np.mgrid[: size[0], : size[1]]
    waves = np.sin(rng.uniform(0.1, 0.6, (count, 1, 1, 3)) * (x + 2 * y)[None, ..., None])
    images = 128 + 90 * waves + 20 * rng.standard_normal((count, *size, 3))
    return np.clip(images, 0, 255).astype(np.uint8)


def normalized_of(seed, size, count=3):
    """What a tower is given: float32 images of about one deviation."""
    return (images_of(seed, size, count).astype(np.float32) - 128) / 64


def token_ids_of(variant):
    """Rows whose end stands early, late and last; anything may follow it."""
    rng = np.random.default_rng([71])
    above = VOCAB_SIZES[variant]
    ids = rng.integers(0, END_ID - 1, (3, CONTEXT))
    ids[:, 0] = END_ID - 1
    for row, end in enumerate((4, 8, CONTEXT - 1)):
        if above > END_ID + 1:
            ids[row, end + 1 :] = rng.integers(END_ID, above, CONTEXT - end - 1)
        ids[row, end] = END_ID
    return ids.astype(np.int32)


def tokenizer_definition():
    """A tokenizer.json as it is published with CLIP, but for the vocabulary."""
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    plain = {name: False for name in ("single_word", "lstrip", "rstrip")}
    ids = vocabulary()
    special = [
        {"id": ids[name], "content": name, **plain, "normalized": name == START, "special": True}
        for name in (START, END)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Removed", "invert": True}
    spaces = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
    ends = {"sep": [END, ids[END]], "cls": [START, ids[START]]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "NFC"}, spaces, {"type": "Lowercase"}],
        },
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            **{"type": "RobertaProcessing", **ends},
            **{"trim_offsets": False, "add_prefix_space": False},
        },
        "decoder": byte_level,
        "model": {
            **{"type": "BPE", "dropout": None, "unk_token": END, "fuse_unk": False},
            **{"continuing_subword_prefix": "", "end_of_word_suffix": "</w>"},
            **{"vocab": ids, "merges": [" ".join(pair) for pair in merges()]},
        },
    }


def write_folder(folder, variant, tensors=None, config=None):
    """A folder as a user has it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or config_of(variant)))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_definition()))
    sizes = {"size": {"shortest_edge": IMAGE_SIZE}}
    sizes |= {"crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes))
    tensors = tensors_of(variant) if tensors is None else tensors
    scale = {"logit_scale": np.array(2.6592, np.float32)}
    save_file({**tensors, **scale}, folder / "model.safetensors")
    return folder
