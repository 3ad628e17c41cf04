"""Records what the original perceptual networks compute, for the tests of ours.

Needs torch, torchvision, lpips and pytorch-fid, none of which the tests need:

    python tests/recorded/record_perceptual.py

writes `perceptual.json` beside itself. Weights and images are random, as `random_tensor` and
`random_images` make them out of names and shapes, here and in the tests.
"""

import hashlib
import json
import pathlib
import re
import zlib

import numpy as np

PATH = pathlib.Path(__file__).with_name("perceptual.json")

LPIPS_SIZES = {"vgg": [(64, 64), (21, 16)], "alex": [(64, 64), (31, 37)]}
# Of 16 seeds those where, at the second size, no input of a ReLU is nearer to zero than 2e-5 (vgg)
# and 5e-4 (alex) of its layer's deviation. Where rounding closes one, torch's own gradients in
# float32 and float64 differ by 1e-2.
OTHERS_SEED = {"vgg": 22, "alex": 31}
INCEPTION_SIZE = (48, 80)
BLOCKS = ("Mixed_5d", "Mixed_6e", "Mixed_7b", "Mixed_7c")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
RESIZES = [(48, 80), (320, 413)]


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight by its published name, so scaled that signals keep their size through the layers."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), len(shape)])
    values = rng.standard_normal(shape, np.float32)
    if len(shape) == 2 or (len(shape) == 4 and not name.startswith("lin")):
        return values * np.float32(np.sqrt(2 / np.prod(shape[1:])))
    if name.startswith("lin"):
        return np.abs(values)
    if name.endswith("running_var"):
        return np.exp(values / 5)
    return values / 10 + np.float32(name.endswith("bn.weight"))


def random_images(seed: int, size: tuple[int, int], count: int = 2) -> np.ndarray:
    """Images (count, height, width, 3) in [-1, 1]: waves under noise."""
    rng = np.random.default_rng([7, seed])
    y, x = np.mgrid[: size[0], : size[1]]
    waves = np.sin(rng.uniform(0, 0.4, (count, 1, 1, 3)) * (x + 2 * y)[None, ..., None])
    images = 0.7 * waves + 0.3 * rng.standard_normal((count, *size, 3))
    return np.clip(images, -1, 1).astype(np.float32)


def digest_of(shapes: dict[str, tuple[int, ...]]) -> str:
    """A digest of names and shapes."""
    lines = sorted(f"{name} {tuple(shape)}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def summary_of(values: np.ndarray) -> dict:
    """Mean, root of the mean square, and 16 values spread over an array."""
    flat = np.asarray(values, np.float64).reshape(-1)
    picked = flat[np.linspace(0, flat.size - 1, 16).astype(int)]
    return {
        "mean": float(flat.mean()),
        "rms": float(np.sqrt(np.square(flat).mean())),
        "values": picked.tolist(),
    }


def _fill(module) -> str:
    """Gives a module its random weights, in float64; returns the digest of what it needs."""
    import torch

    unused = ("fc.", "AuxLogits.", "lins.", "scaling_layer.")
    shapes = {
        name: tuple(value.shape)
        for name, value in module.state_dict().items()
        if not name.startswith(unused) and not name.endswith("num_batches_tracked")
    }
    # lpips numbers the layers as torchvision does, inside its slices.
    plain = {name: re.sub(r"^net\.slice\d", "features", name) for name in shapes}
    state = {n: torch.from_numpy(random_tensor(plain[n], shapes[n])) for n in shapes}
    module.load_state_dict(state, strict=False)
    module.double().eval()
    return digest_of(shapes)


def _nchw(images: np.ndarray):
    import torch

    return torch.from_numpy(images).double().permute(0, 3, 1, 2).contiguous()


def _nhwc(tensor) -> np.ndarray:
    return tensor.detach().permute(0, 2, 3, 1).numpy()


def _record_lpips(network: str) -> dict:
    import lpips

    model = lpips.LPIPS(pretrained=False, net=network, pnet_rand=True, verbose=False)
    record = {"digest": _fill(model), "sizes": []}
    for size in LPIPS_SIZES[network]:
        images = _nchw(random_images(1, size))
        others = _nchw(random_images(OTHERS_SEED[network], size)).requires_grad_()
        distance, layers = model(images, others, retPerLayer=True)
        distance.sum().backward()
        features = model.net(model.scaling_layer(images))
        record["sizes"].append(
            {
                "size": size,
                "distance": distance.flatten().tolist(),
                "layers": [layer.flatten().tolist() for layer in layers],
                "gradient": summary_of(_nhwc(others.grad)),
                "features": [summary_of(_nhwc(feature)) for feature in features],
            }
        )
    return record


def _record_inception(variant: str) -> dict:
    import torch
    import torch.nn.functional as F
    import torchvision
    from pytorch_fid import inception

    unit = (_nchw(random_images(3, INCEPTION_SIZE)) + 1) / 2
    options = {"num_classes": 1008, "aux_logits": False} if variant == "fid" else {}
    network = torchvision.models.inception_v3(**options, transform_input=True, init_weights=False)
    digest = _fill(network)
    if variant == "fid":
        # Built anew out of the blocks of the original, which would fetch its weights here.
        inception.load_state_dict_from_url = lambda *args, **more: network.state_dict()
        run = inception.InceptionV3().double().eval()
        (*_, block_2, block_3), inputs = run.blocks, unit
        named = {"Mixed_5d": block_2[2], "Mixed_6e": block_2[7]}
        named |= {"Mixed_7b": block_3[1], "Mixed_7c": block_3[2]}
    else:
        network.fc, run = torch.nn.Identity(), network
        named = {name: getattr(network, name) for name in BLOCKS}
        mean, deviation = torch.tensor(IMAGENET, dtype=torch.float64)[..., None, None]
        unit = F.interpolate(unit, (299, 299), mode="bilinear", align_corners=False)
        inputs = (unit - mean) / deviation
    caught = {}
    for name, module in named.items():
        module.register_forward_hook(lambda m, i, out, name=name: caught.update({name: out}))
    with torch.no_grad():
        features = run(inputs)
    features = features[0] if variant == "fid" else features
    record = {"digest": digest, "features": summary_of(features.flatten(1).numpy())}
    return record | {"blocks": {name: summary_of(_nhwc(caught[name])) for name in BLOCKS}}


def main() -> None:
    """Records everything."""
    import importlib.metadata

    import torch.nn.functional as F

    libraries = ("torch", "torchvision", "lpips", "pytorch-fid", "numpy")
    record = {
        "made_with": {name: importlib.metadata.version(name) for name in libraries},
        "random": summary_of(random_tensor("features.0.weight", (64, 3, 3, 3))),
        "lpips": {network: _record_lpips(network) for network in LPIPS_SIZES},
        "inception": {variant: _record_inception(variant) for variant in ("fid", "torchvision")},
        "resize": [],
    }
    for size in RESIZES:
        images = _nchw(random_images(4, size))
        resized = F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False)
        record["resize"].append({"size": size, **summary_of(_nhwc(resized))})
    PATH.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
