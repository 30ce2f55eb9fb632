#!/usr/bin/env python3
"""Record what transformers computes for the small random checkpoints of tests/architectures.rs.

    pip install torch transformers safetensors numpy
    LONGSIGHT_WRITE_ARCHITECTURES=/tmp/architectures cargo test --test architectures
    python3 tools/record_architectures.py /tmp/architectures

Writes tests/data/architectures.safetensors: for each checkpoint the float32 logits [positions, vocabulary] at the
positions that text.json names (last recorded with torch 2.15.0, transformers 5.23.0). Takes a few seconds.

MiniCPM's own code is not part of transformers. Its scaled residual stream is that of Granite, which is: the same
names of tensors, three scales under other names, and queries scaled by 1 / sqrt(head dimension).
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from transformers import AutoConfig, GraniteConfig, AutoModelForCausalLM


def config_of(folder):
    says = json.loads((folder / "config.json").read_text())
    says = {key: value for key, value in says.items() if value is not None}
    if says["model_type"] != "minicpm":
        return AutoConfig.for_model(**says)
    says.pop("model_type")
    hidden, layers = says["hidden_size"], says["num_hidden_layers"]
    return GraniteConfig(
        embedding_multiplier=says.pop("scale_emb"),
        residual_multiplier=says.pop("scale_depth") / layers**0.5,
        logits_scaling=hidden / says.pop("dim_model_base"),
        attention_multiplier=says["head_dim"] ** -0.5,
        **says,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the test wrote the checkpoints")
    args = parser.parse_args()
    text = json.loads((args.folder / "text.json").read_text())
    ids, positions = torch.tensor([text["ids"]]), text["positions"]
    recorded = {}
    for folder in sorted(p for p in args.folder.iterdir() if p.is_dir()):
        model = AutoModelForCausalLM.from_config(config_of(folder), attn_implementation="eager", dtype=torch.float32)
        missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        assert not unexpected and all(name == "lm_head.weight" for name in missing), (missing, unexpected)
        model.tie_weights()
        model.eval()
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, positions].numpy()
        recorded[folder.name] = np.ascontiguousarray(logits, dtype=np.float32)
        print(f"{folder.name}: {type(model).__name__}, logits from {logits.min():.2f} to {logits.max():.2f}")
    target = Path(__file__).parent.parent / "tests/data/architectures.safetensors"
    save_file(recorded, target)
    print(f"wrote {target.name}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
