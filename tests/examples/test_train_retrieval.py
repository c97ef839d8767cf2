"""The training script from the command line to a folder that loads, at toy size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TOY = (
    "--layers 1 --hidden-size 32 --intermediate-size 32 --heads 2 --kv-heads 1 --head-dim 16 --stages 128,256 "
    "--tokens-per-step 512 --steps 4 --eval-lengths 256,400 --eval-samples 2 --device cpu"
)


@pytest.mark.parametrize("seed", [3])
def test_writes_a_model_that_loads(tmp_path: Path, seed: int) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    out = tmp_path / "toy"
    script = ROOT / "examples" / "train_retrieval.py"
    done = subprocess.run(
        [sys.executable, str(script), *TOY.split(), "--seed", str(seed), "--out", str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "trained 4 steps" in done.stdout

    result = json.loads((out / "result.json").read_text())
    assert (result["recipe"]["seed"], result["steps"], result["recipe"]["stages"]) == (seed, 4, [128, 256])
    assert set(result["accuracy"]) == {"dense", "local_sink"}
    assert set(result["accuracy"]["dense"]["stream"]) == {"256", "400"}
    card = (out / "README.md").read_text()
    assert card.startswith("# toy\n")
    assert f"--seconds 90 --steps 4 --seed {seed}" in card

    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="sdpa")
    assert sum(p.numel() for p in model.parameters()) == result["parameters"]

    # The exported model computes what was trained.
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from tiny_llama import LAYER_NAMES, ModelConfig, TinyLlama
    finally:
        sys.path.pop(0)
    ours = TinyLlama(ModelConfig(**result["model"]), torch.float32)
    stored = model.state_dict()
    with torch.no_grad():
        ours.embedding.copy_(stored["model.embed_tokens.weight"])
        ours.norm.copy_(stored["model.norm.weight"])
        ours.head.copy_(stored["lm_head.weight"])
        for name, hf in LAYER_NAMES.items():
            getattr(ours, name)[0].copy_(stored[f"model.layers.0.{hf}.weight"])
        tokens = torch.randint(0, 256, (2, 70))
        torch.testing.assert_close(ours(tokens), model(tokens).logits, rtol=1e-4, atol=1e-4)
