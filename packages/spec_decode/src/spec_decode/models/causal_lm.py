"""Step runner for Llama-, Mistral-, Qwen2- and Qwen3-style language models of transformers.

It shares the weights of the transformers model, keeps a static cache with a length per row, and takes draft trees as
parent arrays. It exposes the low, middle and high features that drafters read. Plain decoding runs on it as well, so
that a speed-up is never due to the runner. Shapes: B rows, n nodes, h hidden size, V vocabulary.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from kd_common.errors import UserError
from spec_decode.decoding.tree import DraftTree
from spec_decode.models.cache import DecodingPass, KVCache
from spec_decode.models.layers import Attend, DecoderLayer, LayerShape, RMSNorm, Rotation, causal_attention, rotation
from spec_decode.models.packed import PackedLinear, pack_linears, packable

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # the others change their frequencies with the length

_PART = 1 << 22  # weights that are rounded and hashed at once


@dataclass(eq=False)  # not frozen, since Lightning's precision plugins replace the fields of a batch
class States:
    """Outputs of a pass at every node.

    Args:
        features: Inputs of the layers `feature_layers`, concatenated, shape (B, n, 3h): pre-norm hidden states.
        final: Normalised output of the last layer, shape (B, n, h); `CausalLM.logits` of it are the logits.
    """

    features: Tensor
    final: Tensor

    def gather(self, nodes: Tensor) -> "States":
        """Return the states of the given nodes, int64 of shape (B, m)."""
        index = nodes.unsqueeze(-1)
        return States(*(x.gather(1, index.expand(-1, -1, x.shape[-1])) for x in (self.features, self.final)))


def default_feature_layers(layers: int) -> tuple[int, int, int]:
    """Return EAGLE-3's low, middle and high layer, 2, L // 2 and L - 3; their *inputs* are the features.

    Shallow models, as in tests, get the nearest layers that exist; index L is the output of the last layer.
    """
    return min(2, layers), layers // 2, max(layers - 3, layers // 2)


class CausalLM(nn.Module):
    """Frozen language model in evaluation mode; build it with `from_transformers`.

    Args:
        shape: Sizes of a layer.
        layers: Number of layers L.
        vocab_size: V.
        frequencies: Rotary frequencies, float32 of shape (d / 2,).
        rope_scale: Factor on the rotary cosines and sines.
        context: Largest number of tokens of a row.
        windowed: Whether each layer sees a sliding window only.
        window: Size of that window; None without one.
        feature_layers: Three indices in [0, L]; index i is the input of layer i, L the output of the last layer.

    Raises:
        UserError: If the feature layers do not exist.
    """

    frequencies: Tensor

    def __init__(
        self,
        shape: LayerShape,
        layers: int,
        vocab_size: int,
        frequencies: Tensor,
        *,
        rope_scale: float = 1.0,
        context: int = 2048,
        windowed: Sequence[bool] = (),
        window: int | None = None,
        feature_layers: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.vocab_size, self.context = shape, vocab_size, context
        self.rope_scale, self.window = rope_scale, window
        self.windowed = tuple(windowed) or (False,) * layers
        self.feature_layers = feature_layers or default_feature_layers(layers)
        if not all(0 <= i <= layers for i in self.feature_layers):
            raise UserError(f"feature_layers must lie in [0, {layers}], got {self.feature_layers}")
        self.embed_tokens = nn.Embedding(vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(layers))
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, vocab_size, bias=False)
        self._compiled: list[Callable[..., States]] = []
        self._fingerprints: dict[tuple[torch.dtype, Any], str] = {}
        self._sharded = False
        self._packed_head: list[PackedLinear] = []  # in a list, so that it is no submodule: only lm_head is saved
        self.register_buffer("frequencies", frequencies.float(), persistent=False)

    @classmethod
    def from_transformers(cls, model: Any, feature_layers: tuple[int, int, int] | None = None) -> "CausalLM":
        """Return a runner that shares the weights of a transformers causal language model.

        Args:
            model: Model of one of the `SUPPORTED` types.
            feature_layers: Layers whose inputs are the features; None means EAGLE-3's.

        Raises:
            UserError: For another type of model, or a rotary embedding that depends on the length.
        """
        config = model.config
        if config.model_type not in SUPPORTED:
            raise UserError(f"model type {config.model_type!r} is not supported; supported: {', '.join(SUPPORTED)}")
        rotary = model.model.rotary_emb
        if rotary.rope_type not in _STATIC_ROPE:
            raise UserError(f"rope type {rotary.rope_type!r} is not supported; supported: {', '.join(_STATIC_ROPE)}")
        first = dict(model.model.layers[0].named_parameters())
        shape = LayerShape(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            norm_eps=config.rms_norm_eps,
            activation=config.hidden_act,
            qkv_bias="self_attn.q_proj.bias" in first,
            out_bias="self_attn.o_proj.bias" in first,
            mlp_bias="mlp.up_proj.bias" in first,
            qk_norm="self_attn.q_norm.weight" in first,
        )
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
        with torch.device("meta"):
            runner = cls(
                shape,
                config.num_hidden_layers,
                config.vocab_size,
                rotary.inv_freq,
                rope_scale=rotary.attention_scaling,
                context=config.max_position_embeddings,
                windowed=[window is not None and kind == "sliding_attention" for kind in kinds],
                window=window,
                feature_layers=feature_layers,
            )
        weights = {name.removeprefix("model."): value for name, value in model.state_dict().items()}
        runner.load_state_dict(weights, strict=True, assign=True)
        if runner.lm_head.weight.data_ptr() == runner.embed_tokens.weight.data_ptr():
            runner.lm_head.weight = runner.embed_tokens.weight  # one parameter, or moving it would make two of it
        runner.frequencies = rotary.inv_freq.detach().float().clone()
        return runner.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Return the model's device."""
        return self.lm_head.weight.device

    @property
    def packed(self) -> bool:
        """Return whether `pack` has changed anything."""
        return bool(self._packed_head)

    @property
    def dtype(self) -> torch.dtype:
        """Type of its weights."""
        return self.lm_head.weight.dtype

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """Empty cache for `batch` rows of `capacity` slots."""
        shape = self.shape
        return KVCache(
            len(self.layers), batch, capacity, shape.kv_heads, shape.head_dim, dtype=self.dtype, device=self.device
        )

    def rotation(self, positions: Tensor) -> Rotation:
        """Return the rotary cosines and sines at positions of shape (B, n)."""
        return rotation(positions, self.frequencies, self.rope_scale, self.dtype)

    def _run(self, tokens: Tensor, positions: Tensor, attends: Sequence[Attend]) -> States:
        x, by = self.embed_tokens(tokens), self.rotation(positions)
        inputs = []
        for layer, attend in zip(self.layers, attends, strict=True):
            inputs.append(x)
            x = layer(x, by, attend)
        inputs.append(x)
        return States(torch.cat([inputs[i] for i in self.feature_layers], dim=-1), self.norm(x))

    @torch.no_grad()
    def step(self, tokens: Tensor, cache: KVCache, parents: Tensor | None = None) -> States:
        """Return the states of new nodes behind the committed tokens.

        The cache holds them until the next pass or commit.

        Args:
            tokens: int64 of shape (B, n); -1 (absent nodes, padding) is allowed and its states mean nothing.
            cache: Cache of B rows.
            parents: Parent array of shape (B, n); None for a run of consecutive tokens.
        """
        settings = {"groups": self.shape.heads // self.shape.kv_heads, "window": self.window}
        if parents is None:
            this = DecodingPass.run(cache, tokens.shape[1], **settings)
        else:
            this = DecodingPass.tree(cache, parents, **settings)
        attends = [this.attend(i, windowed=w) for i, w in enumerate(self.windowed)]
        run = self._compiled[0] if self._compiled else self._run
        return run(tokens.clamp(min=0), this.positions, attends)

    def extend(self, tokens: Tensor, counts: Tensor, cache: KVCache) -> States:
        """Append runs of tokens and commit them.

        Args:
            tokens: int64 of shape (B, n), padded behind each row's count.
            counts: Tokens per row, int64 of shape (B,), in [0, n].
            cache: Cache of B rows.
        """
        states = self.step(tokens, cache)
        cache.lengths = cache.lengths + counts
        return states

    def prefill(self, tokens: Tensor, counts: Tensor, cache: KVCache, chunk: int = 512) -> States:
        """Return `extend` for long runs, a chunk at a time to bound the size of the mask; same arguments and result."""
        parts = [
            self.extend(part, (counts - start).clamp(0, part.shape[1]), cache)
            for start, part in ((s, tokens[:, s : s + chunk]) for s in range(0, tokens.shape[1], chunk))
        ]
        return States(torch.cat([p.features for p in parts], 1), torch.cat([p.final for p in parts], 1))

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> States:
        """Return the states of whole right-padded sequences, int64 of shape (B, n), without a cache."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        attends = [causal_attention(self.window if w else None) for w in self.windowed]
        return self._run(tokens, positions, attends)

    def pack(self) -> None:
        """Convert frozen bfloat16 weights on a CPU to the layout of its matrix kernels; see `models.packed`.

        After `compile_steps` it does nothing, because the compiler converts them itself.
        """
        if self._compiled:
            return
        pack_linears(self.layers)
        if not self._packed_head and packable(self.lm_head.weight):  # the plain one is the embedding's, too
            self._packed_head.append(PackedLinear(self.lm_head.weight))

    def compile_steps(self) -> None:
        """Let Inductor compile the passes over a cache: with frozen weights on a CPU, as CUDA graphs on a GPU.

        The first pass of every number of nodes then takes seconds to minutes.

        Raises:
            RuntimeError: After `pack`, whose layout the compiler does not know.
        """
        if self.packed:
            raise RuntimeError("this target's weights are packed already; load it anew to compile its passes")
        if not self._compiled:
            how: dict[str, Any] = (
                {"options": {"freezing": True}} if self.device.type == "cpu" else {"mode": "reduce-overhead"}
            )
            self._compiled.append(torch.compile(self._run, **how))

    def shard(self, device: torch.device) -> None:
        """Spread the layers over all processes with FSDP2; each layer is gathered while it runs.

        Embeddings and head, which drafters read, stay whole in every process. From then on all processes must run the
        same passes. Layers reach the device as shards, so that no device holds the whole target.

        Args:
            device: Device of this process.

        Raises:
            RuntimeError: After `pack` or `compile_steps`, or if no process group has been set up.
        """
        if self.packed or self._compiled:
            raise RuntimeError("packed or compiled layers cannot be sharded; load the target anew")
        if not dist.is_initialized():
            raise RuntimeError("sharding a target needs several processes; set trainer.devices or trainer.num_nodes")
        # They read whole weights.
        self._fingerprints = {(dtype, None): self.fingerprint(dtype) for dtype in (torch.bfloat16, self.dtype)}
        self._sharded = True
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for layer in self.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        self.to(device)

    def logits(self, final: Tensor) -> Tensor:
        """Return the logits of shape (..., V) at final states of shape (..., h)."""
        return self._packed_head[0](final) if self._packed_head else self.lm_head(final)

    def tree_logits(self, tree: DraftTree, cache: KVCache) -> tuple[Tensor, States]:
        """Return the logits of shape (B, n, V) and states at every node of a draft tree behind the committed tokens."""
        states = self.step(tree.tokens, cache, tree.parents)
        return self.logits(states.final), states

    def fingerprint(self, dtype: torch.dtype = torch.bfloat16) -> str:
        """Return the digest of all that the states depend on, every weight included; a second per one or two gigabytes.

        Args:
            dtype: Precision that the weights are rounded to first. In bfloat16 they are the same however they were
                loaded; caches take `self.dtype`, which rounds nothing.
        """
        state = self.state_dict()
        stamp = None if self._sharded else tuple((value.data_ptr(), value._version) for value in state.values())
        if (dtype, stamp) not in self._fingerprints:
            rope = (self.frequencies.to(dtype).tolist(), self.rope_scale, self.windowed, self.window)
            sizes = (self.shape, self.vocab_size, len(self.layers), self.feature_layers)
            digest = hashlib.sha256(repr((dtype, sizes, rope)).encode())
            for name, value in sorted(state.items()):
                digest.update(f"{name} {tuple(value.shape)}".encode())
                for part in value.detach().flatten().split(_PART):
                    digest.update(part.to(dtype).cpu().view(torch.uint8).numpy().data)
            self._fingerprints[dtype, stamp] = digest.hexdigest()[:16]
        return self._fingerprints[dtype, stamp]
