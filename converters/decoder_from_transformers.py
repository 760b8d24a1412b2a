"""Facts and weights of a Llama-class decoder from the files of a Hugging Face repository: `config.json` and safetensors.

Fields as in https://huggingface.co/docs/transformers/model_doc/llama; what is not implemented is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from converters.decoder import HEAD_MULTIPLE, MAX_HEADS, MAX_LAYERS, MAX_WIDTH, Decoder, check_decoder
from converters.decoder_source import Matrix
from converters.errors import ConversionError, unsupported
from converters.json_object import JsonObject, read_json_object
from converters.quantised_blocks import Float
from converters.safetensors_file import StoredTensor, read_safetensors, read_shards

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What the fields are where a config.json leaves them out.
QWEN3_HEAD_DIM = 128
MISTRAL_WINDOW = 4096

_LAYER = re.compile(r"^model\.layers\.(\d{1,4})\.([a-z_.]+)\.(weight|bias)$")
LAYER_PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OTHERS = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}


@dataclass(frozen=True)
class TransformersSource:
    """Safetensors under the names of a DecoderSource; rows of q and k as published."""

    path: Path
    tensors: dict[str, StoredTensor]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def format(self, name: str) -> str:
        return self._tensor(name).kind

    def float32(self, name: str) -> Float:
        return self._tensor(name).float32()

    def matrix(self, name: str) -> Matrix:
        return self._tensor(name).numbers()

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise ConversionError(f"{self.path.name} has no tensor {name!r}; it is not a complete model of its architecture")
        return self.tensors[name]


def decoder_from_transformers(files: Mapping[str, Path], context_tokens: int | None = None) -> tuple[TransformersSource, Decoder]:
    """`files`: fetched files by their published names. Raises ConversionError, OSError."""
    config = read_json_object(_file(files, "config.json"), "config.json")
    decoder = _decoder(config, context_tokens)
    stored = read_shards(files[INDEX], files) if INDEX in files else read_safetensors(_file(files, WEIGHTS), WEIGHTS)
    # Frequencies that old files carry follow from config.json.
    tensors = {weight_name(name): tensor for name, tensor in stored.items() if not name.endswith(".rotary_emb.inv_freq")}
    if decoder.tied_head:
        tensors.pop("output.weight", None)
    source = TransformersSource(Path(INDEX if INDEX in files else WEIGHTS), tensors)
    decoder = replace(decoder, vocabulary=source.shape("token_embd.weight")[0])
    check_decoder(source, decoder)
    return source, decoder


def weight_name(name: str) -> str:
    """What a weight is called in a DecoderSource; a name without a place there stays as it is."""
    match = _LAYER.match(name)
    if match is None or match[2] not in LAYER_PARTS:
        return _OTHERS.get(name, name)
    return f"blk.{int(match[1])}.{LAYER_PARTS[match[2]]}.{match[3]}"


def _decoder(config: JsonObject, context_tokens: int | None) -> Decoder:
    kind = config.text("model_type")
    if kind not in MODEL_TYPES:
        raise unsupported(f"model type {kind!r} is not converted here; supported are {', '.join(MODEL_TYPES)}")

    def fact(name: str, limit: int, default: int | None = None) -> int:
        value = config.integer(name, default)
        if not 1 <= value <= limit:
            raise ConversionError(f"config.json: {name} is {value}, outside 1..{limit}; the file is damaged")
        return value

    heads, hidden = fact("num_attention_heads", MAX_HEADS), fact("hidden_size", MAX_WIDTH)
    own_context = fact("max_position_embeddings", 1 << 24)
    head_dim = fact("head_dim", MAX_WIDTH, QWEN3_HEAD_DIM if kind == "qwen3" else max(hidden // heads, 1))
    # Since transformers 5 one table holds what two fields held.
    rope = config.object("rope_parameters") if "rope_parameters" in config else config.object("rope_scaling")
    decoder = Decoder(
        architecture=kind,
        layers=fact("num_hidden_layers", MAX_LAYERS),
        heads=heads,
        kv_heads=fact("num_key_value_heads", MAX_HEADS, heads),
        head_dim=head_dim,
        hidden=hidden,
        feed_forward=fact("intermediate_size", MAX_WIDTH),
        vocabulary=fact("vocab_size", MAX_WIDTH),
        context_tokens=min(own_context, context_tokens or own_context),
        rms_epsilon=config.number("rms_norm_eps", 1e-6),
        rope_base=rope.number("rope_theta", config.number("rope_theta", 10000.0)),
        rope_factors=np.ones(max(head_dim // 2, 1), np.float32),
        tied_head=config.flag("tie_word_embeddings", False),
        normalises_heads=kind == "qwen3",
        has_interleaved_rows=False,
    )
    if not (decoder.rope_base > 1 and decoder.rms_epsilon > 0):
        raise ConversionError(f"config.json: rope_theta {decoder.rope_base} or rms_norm_eps {decoder.rms_epsilon} cannot be; it is damaged")
    _refuse_unknown_parts(config, rope, decoder)
    return replace(decoder, rope_factors=_rope_factors(rope, decoder))


def _refuse_unknown_parts(config: JsonObject, rope: JsonObject, decoder: Decoder) -> None:
    slides = config.flag("use_sliding_window", decoder.architecture == "mistral")
    window = config.integer("sliding_window", 0 if "sliding_window" in config.values else MISTRAL_WINDOW) if slides else 0
    partial = config.number("partial_rotary_factor", rope.number("partial_rotary_factor", 1.0))
    for is_unsupported, reason in (
        (decoder.head_dim % HEAD_MULTIPLE, f"head dimension {decoder.head_dim} is not a multiple of {HEAD_MULTIPLE}"),
        (config.text("hidden_act", "silu") != "silu", f"activation {config.values.get('hidden_act')!r}; only silu is implemented"),
        ("quantization_config" in config, "weights that are quantised already (quantization_config); use the original ones, or a GGUF"),
        (partial != 1.0, "partial RoPE is not implemented"),
        (
            0 < window < decoder.context_tokens,
            f"a sliding window of {window} tokens is not implemented; build with context_tokens={window} at most",
        ),
    ):
        if is_unsupported:
            raise unsupported(f"config.json: {reason}")


def _rope_factors(rope: JsonObject, decoder: Decoder) -> Float:
    """What RoPE's frequencies are divided by, float32 [head_dim / 2]."""
    kind = rope.text("rope_type", rope.text("type", "default"))
    ones = np.ones(decoder.head_dim // 2)
    if kind == "default":
        return ones.astype(np.float32)
    factor = rope.number("factor", 1.0)
    if kind == "linear":
        factors = factor * ones
    elif kind == "llama3":
        # https://github.com/meta-llama/llama-models: long waves are stretched, short ones kept, those between blended.
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        original = rope.integer("original_max_position_embeddings")
        if not 0 < low < high:
            raise ConversionError(f"config.json: low_freq_factor {low} and high_freq_factor {high} cannot be; it is damaged")
        waves = 2 * np.pi * decoder.rope_base ** (np.arange(0, decoder.head_dim, 2) / decoder.head_dim)
        smooth = np.clip((original / waves - low) / (high - low), 0, 1)
        factors = 1 / ((1 - smooth) / factor + smooth)
    else:
        raise unsupported(f"RoPE scaling {kind!r} is not implemented; use a model with none, linear or Llama-3 frequency factors")
    if not factor > 0:
        raise ConversionError(f"config.json: RoPE's factor is {factor}; it is damaged")
    return factors.astype(np.float32)


def _file(files: Mapping[str, Path], name: str) -> Path:
    if name not in files:
        raise ConversionError(f"{name} is not among the model's files ({', '.join(sorted(files))}); add it to the manifest's [files]")
    return files[name]
