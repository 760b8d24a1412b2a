"""Other runtimes on the same weights: transformers, llama.cpp and onnxruntime-genai."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.timing import Prompt, Room, Timing
from converters.decoder import Decoder as Facts
from converters.decoder_from_gguf import decoder_from_gguf
from converters.gguf import GgufFile, read_gguf


class Transformers:
    """LlamaForCausalLM in float32 with the dequantised weights of the GGUF; a bare loop around it, which is faster than `generate`."""

    def __init__(self, room: Room) -> None:
        import torch

        torch.set_num_threads(room.threads)
        self._torch = torch
        self._model = llama(read_gguf(room.path))

    def prefill(self, prompt: Prompt) -> Timing:
        began_s = time.perf_counter()
        self._step([prompt], None)
        return Timing(len(prompt), time.perf_counter() - began_s)

    def decode(self, prompts: Sequence[Prompt], steps: int) -> Timing:
        chosen, cache = self._step(prompts, None)
        first = [chosen[0]]
        began_s = time.perf_counter()
        for _ in range(steps):
            chosen, cache = self._step([[token] for token in chosen], cache)
            first.append(chosen[0])
        return Timing(steps * len(prompts), time.perf_counter() - began_s, tuple(first[:steps]))

    def _step(self, tokens: Sequence[Prompt], cache: Any) -> tuple[list[int], Any]:
        with self._torch.inference_mode():
            answer = self._model(input_ids=self._torch.tensor(tokens), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return answer.logits[:, -1].argmax(-1).tolist(), answer.past_key_values


class LlamaCpp:
    """llama.cpp through llama-cpp-python's plain bindings: one llama_decode per step, each sequence with a cache of its own."""

    def __init__(self, room: Room) -> None:
        import llama_cpp

        self._c = llama_cpp
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silent, None)
        llama_cpp.llama_backend_init()
        described = llama_cpp.llama_model_default_params()
        described.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(str(room.path).encode(), described)
        wanted = llama_cpp.llama_context_default_params()
        wanted.n_ctx, wanted.n_seq_max = room.context_tokens * room.slots, room.slots
        wanted.n_threads = wanted.n_threads_batch = room.threads
        self._context = llama_cpp.llama_init_from_model(model, wanted)
        self._batch = llama_cpp.llama_batch_init(max(room.context_tokens, room.slots), 0, 1)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def prefill(self, prompt: Prompt) -> Timing:
        self._clear()
        began_s = time.perf_counter()
        self._step({0: prompt}, 0)
        return Timing(len(prompt), time.perf_counter() - began_s)

    def decode(self, prompts: Sequence[Prompt], steps: int) -> Timing:
        self._clear()
        chosen = [self._step({index: prompt}, 0)[0] for index, prompt in enumerate(prompts)]
        first = [chosen[0]]
        began_s = time.perf_counter()
        for step in range(steps):
            chosen = self._step({index: [token] for index, token in enumerate(chosen)}, len(prompts[0]) + step)
            first.append(chosen[0])
        return Timing(steps * len(prompts), time.perf_counter() - began_s, tuple(first[:steps]))

    def _clear(self) -> None:
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)

    def _step(self, tokens: dict[int, Prompt], start: int) -> list[int]:
        """The likeliest next token of each sequence."""
        batch, last = self._batch, []
        batch.n_tokens = 0
        for sequence, pieces in tokens.items():
            for offset, token in enumerate(pieces):
                index = batch.n_tokens
                batch.token[index], batch.pos[index] = token, start + offset
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
                batch.logits[index] = offset == len(pieces) - 1
                batch.n_tokens += 1
            last.append(batch.n_tokens - 1)
        if self._c.llama_decode(self._context, batch) != 0:
            raise RuntimeError(f"llama_decode refused {batch.n_tokens} tokens")
        rows = (self._c.llama_get_logits_ith(self._context, index) for index in last)
        return [int(np.ctypeslib.as_array(row, (self._vocabulary,)).argmax()) for row in rows]


class OnnxRuntimeGenai:
    """onnxruntime-genai on what its own builder makes of the dequantised weights in 4 bits, which are other weights than the file's."""

    def __init__(self, room: Room) -> None:
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        config = onnxruntime_genai.Config(str(room.path))
        config.clear_providers()
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": room.threads}}}}))
        self._model = onnxruntime_genai.Model(config)

    def prefill(self, prompt: Prompt) -> Timing:
        generator = self._generator([prompt], 1)
        began_s = time.perf_counter()
        generator.append_tokens(np.array([prompt], np.int32))
        generator.generate_next_token()
        return Timing(len(prompt), time.perf_counter() - began_s)

    def decode(self, prompts: Sequence[Prompt], steps: int) -> Timing:
        generator = self._generator(prompts, steps + 1)
        generator.append_tokens(np.array(prompts, np.int32))
        generator.generate_next_token()
        first = [int(generator.get_next_tokens()[0])]
        began_s = time.perf_counter()
        for _ in range(steps):
            generator.generate_next_token()
            first.append(int(generator.get_next_tokens()[0]))
        return Timing(steps * len(prompts), time.perf_counter() - began_s, tuple(first[:steps]))

    def _generator(self, prompts: Sequence[Prompt], steps: int) -> Any:
        parameters = self._genai.GeneratorParams(self._model)
        length = len(prompts[0]) + steps
        parameters.set_search_options(batch_size=len(prompts), max_length=length, min_length=length, do_sample=False)
        return self._genai.Generator(self._model, parameters)


def llama(gguf: GgufFile) -> Any:
    """A LlamaForCausalLM in float32 with the weights of a `llama` GGUF."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    facts = decoder_from_gguf(gguf)
    config = LlamaConfig(
        vocab_size=facts.vocabulary,
        hidden_size=facts.hidden,
        intermediate_size=facts.feed_forward,
        num_hidden_layers=facts.layers,
        num_attention_heads=facts.heads,
        num_key_value_heads=facts.kv_heads,
        head_dim=facts.head_dim,
        max_position_embeddings=facts.context_tokens,
        rms_norm_eps=facts.rms_epsilon,
        rope_theta=facts.rope_base,
        tie_word_embeddings=facts.tied_head,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {name: torch.from_numpy(weight) for name, weight in _published(gguf, facts).items()}
    model = model.to_empty(device="cpu")
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its tables are no weights: to_empty left them unset
    return model.eval().requires_grad_(False)


def _published(gguf: GgufFile, facts: Facts) -> dict[str, Any]:
    """The tensors under the names and in the row order of the published model; llama.cpp interleaves the two RoPE halves of a head."""
    parts = {
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    weights = {"model.embed_tokens.weight": gguf.float32("token_embd.weight"), "model.norm.weight": gguf.float32("output_norm.weight")}
    if not facts.tied_head:
        weights["lm_head.weight"] = gguf.float32("output.weight")
    for layer in range(facts.layers):
        for stored, published in parts.items():
            weight = gguf.float32(f"blk.{layer}.{stored}.weight")
            if stored in ("attn_q", "attn_k") and facts.has_interleaved_rows:
                heads = facts.heads if stored == "attn_q" else facts.kv_heads
                weight = weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
            weights[f"model.layers.{layer}.{published}.weight"] = np.ascontiguousarray(weight)
    return weights
