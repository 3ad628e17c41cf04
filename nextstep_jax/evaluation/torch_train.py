"""The training step of NextStep-1 in plain PyTorch, to check ours against and to time beside it.

The decoder is transformers' Qwen2; projectors, flow head and both losses (arXiv 2508.10711, eq 2
and Table 6) are written in PyTorch's own layers under the published names, so that our parameters
load through the map that published checkpoints go through. Mixed precision is autocast over
float32 weights, rematerialisation is gradient checkpointing of every layer, the optimizer the
fused AdamW. As one would write it in PyTorch, logits and flow are taken at the weighted positions
alone, however many a row has.

Needs the extra [parity]. Axes: rows, length; count = weighted image positions of the batch; draws
= times and noises of each; token = values of an image token.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from nextstep_jax.interop.tensor_map import leaves_of, nextstep_slots, to_published
from nextstep_jax.models.config import FlowHeadConfig, NextStepConfig
from nextstep_jax.training.optimizer import OptimizerConfig
from nextstep_jax.training.pretrain import LossConfig

# What transformers calls its kernels. The last two need the documents of all rows as one row.
TORCH_ATTENTION = ("sdpa", "eager", "flex_attention", "flash_attention_2")

Draws = tuple[Float[np.ndarray, "draws count"], Float[np.ndarray, "draws count token"]]
"""Times and noises of the weighted image positions, row by row."""


def check_supported(config: NextStepConfig, optimizer: OptimizerConfig, attention: str) -> None:
    """Looks for the libraries, and for what PyTorch's side does not have.

    Raises:
        ValueError: PyTorch or transformers is not installed, or something is not supported.
    """
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        hint = "pip install nextstep_jax[parity]"
        raise ValueError(f"PyTorch and transformers are needed ({error}): {hint}") from error
    decoder = config.decoder
    if attention not in TORCH_ATTENTION:
        raise ValueError(f"torch_attention={attention!r}; choose from {list(TORCH_ATTENTION)}")
    if not decoder.qkv_bias or decoder.out_bias or decoder.mlp_bias:
        raise ValueError("Qwen2 has biases on queries, keys and values, and no others")
    supported = {"name": "adamw", "schedule": "constant", "first_moment_dtype": "float32"}
    supported |= {"rate_factors": (), "frozen": ()}
    for name, value in supported.items():
        if getattr(optimizer, name) != value:
            raise ValueError(f"beside PyTorch optimizer.{name} must be {value!r}")


def published_tensors(params: Any) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Parameters, stacked or not, as host arrays under their published names."""
    leaves = {path: np.asarray(leaf) for path, leaf in leaves_of(params).items()}
    return {
        slot.name: to_published(
            leaves[slot.path] if slot.layer is None else leaves[slot.path][slot.layer], slot.layout
        )
        for slot in nextstep_slots(params)
    }


class TorchTrainer:
    """Model, optimizer and one batch in PyTorch."""

    def __init__(
        self,
        config: NextStepConfig,
        params: Any,
        batch: Mapping[str, Any],
        *,
        loss: LossConfig,
        optimizer: OptimizerConfig,
        dtype: str = "float32",
        checkpointing: bool = False,
        attention: str = "sdpa",
        device: str = "cpu",
    ):
        """Copies parameters and batch to the device.

        Args:
            config: Shapes; the decoder must be one that Qwen2 can express.
            params: Our parameters, unboxed.
            batch: The arrays of packed rows with latents (`data.schema.Batch`) that every step
                trains on.
            loss: Weights of the losses.
            optimizer: AdamW at a constant rate after its warm-up, nothing frozen.
            dtype: "float32", or "bfloat16" for autocast over float32 weights.
            checkpointing: Whether every decoder layer is computed again in the backward pass.
            attention: One of `TORCH_ATTENTION`.
            device: As PyTorch names it.

        Raises:
            ValueError: The libraries are missing, or a configuration that PyTorch's side does not
                have.
        """
        check_supported(config, optimizer, attention)
        import torch

        self._config, self._loss, self._optimizer_config = config, loss, optimizer
        self._device, self._attention = torch.device(device), attention
        self._autocast = functools.partial(
            torch.autocast, self._device.type, torch.bfloat16, enabled=dtype == "bfloat16"
        )
        self._dtype = getattr(torch, dtype)
        with self._device:
            self._net = _network(config, attention)
        language = self._net["language"].train()
        if checkpointing:
            _checkpointing(language)({"use_reentrant": False})
        ours = ("image_", "lm_head")
        state = {
            name if name.startswith(ours) else f"language.{name}": torch.tensor(values)
            for name, values in published_tensors(params).items()
        }
        self._net.load_state_dict(state)
        parameters = list(self._net.parameters())
        # The same leaves as `optimizer.decay_mask`: kernels and the embedding.
        groups = [
            {"params": [p for p in parameters if p.ndim == 2]},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(
            groups,
            lr=optimizer.learning_rate,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        self._batch = self._prepare({name: np.asarray(value) for name, value in batch.items()})
        self._steps = 0

    @property
    def num_parameters(self) -> int:
        """Values of all parameters."""
        return sum(p.numel() for p in self._net.parameters())

    def step(self, draws: Draws | None = None) -> dict[str, float]:
        """One update; waits for the device.

        Args:
            draws: The times and noises of the flow loss; drawn by PyTorch if None.

        Returns:
            loss, text_loss, image_loss and the gradient's norm before clipping.
        """
        import torch

        config = self._optimizer_config
        rate = config.learning_rate * min(1.0, (self._steps + 1) / max(config.warmup_steps, 1))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad()
        with self._autocast():
            text, image = self._losses(self._draws(draws))
        loss = self._loss.text_weight * text + self._loss.image_weight * image
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._net.parameters(), config.clip_norm)
        self._optimizer.step()
        self._steps += 1
        values = {"loss": loss, "text_loss": text, "image_loss": image, "grad_norm": norm}
        # Reading a value waits for the device.
        return {name: float(value.detach()) for name, value in values.items()}

    def memory_bytes(self) -> int | None:
        """The most that PyTorch has held on a GPU so far; None on a CPU."""
        import torch

        if self._device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self._device)

    def _prepare(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Tensors, and the indices that a step would otherwise have to wait for."""
        import torch

        ids, segments = batch["token_ids"].astype(np.int64), batch["segment_ids"]
        rows, length = ids.shape
        # A prediction of what stands at a position is made one before it.
        text = np.nonzero(batch["text_weights"][:, 1:])
        image = np.nonzero(batch["image_weights"])
        # Padding goes on counting: nobody reads it, and each zero would begin a document.
        positions = np.where(segments == 0, np.arange(length), batch["positions"])
        arrays = {
            "ids": ids,
            "latents": batch["latents"],
            "is_image": (ids == self._config.image_placeholder_id)[..., None],
            "text_at": text[0] * length + text[1],
            "targets": ids[:, 1:][text],
            "text_weights": batch["text_weights"][:, 1:][text],
            "before": image[0] * length + np.maximum(image[1] - 1, 0),
            "tokens": batch["latents"][image],
            "image_weights": batch["image_weights"][image],
            "positions": positions.astype(np.int64),
        }
        if self._attention == "sdpa":
            causal = np.tri(length, dtype=bool)
            arrays["mask"] = (causal & (segments[:, :, None] == segments[:, None]))[:, None]
        else:
            # Documents are told apart by positions that start again, in one long row.
            arrays["positions"] = arrays["positions"].reshape(1, -1)
        return {name: torch.tensor(value, device=self._device) for name, value in arrays.items()}

    def _draws(self, draws: Draws | None) -> tuple[Any, Any]:
        import torch

        if draws is not None:
            return tuple(torch.tensor(np.asarray(part), device=self._device) for part in draws)
        tokens = self._batch["tokens"]
        num_draws = self._config.flow_head.draws_per_token
        times = torch.randn(num_draws, len(tokens), device=self._device).sigmoid()
        return times, torch.randn(num_draws, *tokens.shape, device=self._device)

    def _losses(self, draws: tuple[Any, Any]) -> tuple[Any, Any]:
        """Mean cross-entropy and mean flow-matching error of the batch, float32."""
        from torch.nn import functional

        net, batch, language = self._net, self._batch, self._net["language"]
        image = net["image_in_projector"](batch["latents"])
        x = language.embed_tokens(batch["ids"])
        x = image.to(self._dtype).where(batch["is_image"], x.to(self._dtype))
        if "mask" not in batch:
            x = x.flatten(0, 1)[None]
        more = {"attention_mask": batch.get("mask"), "position_ids": batch["positions"]}
        hidden = language(inputs_embeds=x, use_cache=False, **more).last_hidden_state.flatten(0, 1)

        tied = self._config.decoder.tie_embeddings
        head = language.embed_tokens if tied else net["lm_head"]
        logits = functional.linear(hidden[batch["text_at"]], head.weight).float()
        entropy = functional.cross_entropy(logits, batch["targets"], reduction="none")

        times, noise = draws
        tokens = batch["tokens"]
        noisy = times[..., None] * tokens + (1 - times[..., None]) * noise
        condition = net["image_out_projector"](hidden[batch["before"]])
        velocity = _velocity(
            net["image_head"]["net"],
            self._config.flow_head,
            noisy,
            times.to(self._dtype),
            condition,
        )
        error = (velocity.float() - (tokens - noise)).square().mean(dim=(0, -1))
        pairs = ((entropy, batch["text_weights"]), (error, batch["image_weights"]))
        return tuple((weights * values).sum() / weights.sum() for values, weights in pairs)


def _checkpointing(language: Any) -> Callable[[dict[str, Any]], None]:
    """The method that switches it on, which newer versions of transformers call by another name."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    return next(getattr(language, name) for name in names if hasattr(language, name))


def _network(config: NextStepConfig, attention: str) -> Any:
    """All modules, under the published names but for "language." before the decoder's."""
    from torch import nn
    from transformers import Qwen2Config, Qwen2Model

    d = config.decoder
    language = Qwen2Config(
        vocab_size=d.vocab_size,
        hidden_size=d.embed_dim,
        intermediate_size=d.mlp_dim,
        num_hidden_layers=d.num_layers,
        num_attention_heads=d.num_heads,
        num_key_value_heads=d.num_kv_heads,
        head_dim=d.head_dim,
        rope_theta=d.rope_theta,
        rms_norm_eps=d.rms_norm_eps,
        attn_implementation=attention,
    )
    net = {
        "language": Qwen2Model(language),
        "image_in_projector": nn.Linear(config.token_dim, d.embed_dim),
        "image_out_projector": nn.Linear(d.embed_dim, d.embed_dim),
        "image_head": nn.ModuleDict({"net": _flow_head(config.flow_head, config)}),
    }
    if not d.tie_embeddings:
        net["lm_head"] = nn.Linear(d.embed_dim, d.vocab_size, bias=False)
    return nn.ModuleDict(net)


def _flow_head(c: FlowHeadConfig, config: NextStepConfig) -> Any:
    from torch import nn

    width, hidden = c.width, int(c.width * c.mlp_ratio)

    def modulation(parts):
        return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))

    def mlp(inputs, inside):
        return nn.Sequential(nn.Linear(inputs, inside), nn.SiLU(), nn.Linear(inside, width))

    def block():
        parts = {"in_ln": nn.LayerNorm(width, c.norm_eps), "mlp": mlp(width, hidden)}
        return nn.ModuleDict({**parts, "adaLN_modulation": modulation(3)})

    last = {"adaLN_modulation": modulation(2), "linear": nn.Linear(width, config.token_dim)}
    return nn.ModuleDict(
        {
            "time_embed": nn.ModuleDict({"mlp": mlp(c.frequency_dim, width)}),
            "cond_embed": nn.Linear(config.decoder.embed_dim, width),
            "input_proj": nn.Linear(config.token_dim, width),
            "res_blocks": nn.ModuleList([block() for _ in range(c.num_layers)]),
            "final_layer": nn.ModuleDict(last),
        }
    )


def _velocity(net: Any, c: FlowHeadConfig, x: Any, times: Any, condition: Any) -> Any:
    """The flow head at noisy tokens x (draws, count, token) under conditions (count, embed)."""
    import torch
    from torch.nn import functional

    half = c.frequency_dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=x.device) / half
    angle = times.float()[..., None] * c.max_period**-exponent
    sinusoid = torch.cat([angle.cos(), angle.sin()], dim=-1)
    y = net["time_embed"]["mlp"](sinusoid) + net["cond_embed"](condition)
    h = net["input_proj"](x)
    for block in net["res_blocks"]:
        shift, scale, gate = block["adaLN_modulation"](y).chunk(3, dim=-1)
        h = h + gate * block["mlp"](block["in_ln"](h) * (1 + scale) + shift)
    last = net["final_layer"]
    shift, scale = last["adaLN_modulation"](y).chunk(2, dim=-1)
    h = functional.layer_norm(h, (c.width,), eps=c.norm_eps)
    return last["linear"](h * (1 + scale) + shift)
