"""Random models of each family, saved by transformers itself and computed by torch: the graph says the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.causal_model import model_from_transformers
from converters.decoder_graph import Form
from converters.decoder_session import DecoderSession
from converters.onnx_from_causal_model import onnx_from_causal_model
from converters.onnxruntime_operators import OnnxRuntimeForm
from converters.standard_operators import StandardForm
from tests.converters.tiny_transformers import files_of, write_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Importing these libraries, and the models themselves, warn of things that are not ours.
pytestmark = pytest.mark.filterwarnings("ignore")
VOCABULARY = 288
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama with stretched waves": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama with linear scaling": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "llama in bfloat16": ("Llama", {"dtype": "bfloat16"}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
}


def silent(fraction: float, message: str) -> None:
    del fraction, message


@pytest.mark.parametrize("form", [OnnxRuntimeForm(), StandardForm("float32")], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_torch(tmp_path: Path, family: str, form: Form) -> None:
    name, changes = FAMILIES[family]
    torch.manual_seed(0)
    network = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES, **changes)).eval()
    if changes.get("dtype") == "bfloat16":
        network = network.to(torch.bfloat16)
    for parameter, values in network.named_parameters():
        if "norm" in parameter or parameter.endswith("bias"):
            torch.nn.init.uniform_(values, 0.5, 1.5)
    folder = tmp_path / "source"
    files = write_model(folder)
    for written in ("model.safetensors", "config.json"):
        files[written].unlink()
    network.save_pretrained(folder)
    model = model_from_transformers(files_of(folder))
    engine = tmp_path / "engine"
    engine.mkdir()
    onnx_from_causal_model(model, engine, form, silent)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, 100)
    with torch.no_grad():
        # Read again: the frequencies of a network that was rounded itself are rounded too.
        expected = type(network).from_pretrained(folder, dtype=torch.float32)(torch.from_numpy(tokens)[None]).logits[0].numpy()
    session = DecoderSession(engine, model.decoder, capacity=128)
    found = [session.step([tokens[:90].tolist()], [0], 90)[0]]
    found += [session.step([[int(token)]], [90 + place])[0] for place, token in enumerate(tokens[90:])]
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
