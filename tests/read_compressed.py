"""That compressed outputs are the dense one, for the Python packages that read them.

    pip install torch 'transformers<5' compressed-tensors==0.14.0.1
    python tests/read_compressed.py DENSE COMPRESSED…

DENSE and COMPRESSED are outputs of `barber prune` with one recipe and each `output.format`. Every
tensor that compressed-tensors makes of a compressed one must have the bits of the dense one, and the
model, loaded as its card says, must give the same logits. 0.14.0.1 is the last version with these
layouts; tests/fixtures/compressed-tensors.safetensors has what it writes, for the tests in Rust.
"""

import json
import sys
from pathlib import Path

import torch
from compressed_tensors import ModelCompressor
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM


def stored(directory):
    files = sorted(Path(directory).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def compressor(directory):
    config = json.loads((Path(directory) / "config.json").read_text())
    return ModelCompressor.from_compression_config(config["quantization_config"])


def loaded(directory):
    """The model, loaded as the card of a sparse-bitmask checkpoint says."""
    config = AutoConfig.from_pretrained(directory)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype).eval()
    compressor(directory).decompress(directory, model)
    model.tie_weights()
    return model


def main(dense, *others):
    weights = stored(dense)
    plain = AutoModelForCausalLM.from_pretrained(dense, dtype="auto").eval()
    ids = torch.arange(64)[None] * 31 % plain.config.vocab_size
    with torch.no_grad():
        expected = plain(ids).logits
    for other in others:
        found = dict(compressor(other).sparsity_compressor.decompress(other))
        assert found.keys() == weights.keys(), found.keys() ^ weights.keys()
        for name, tensor in weights.items():
            same = found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
            assert same and torch.equal(bits(found[name]), bits(tensor)), name
        ways = {"decompressed": loaded}
        if compressor(other).sparsity_config.format == "sparse-24-bitmask":
            ways["from_pretrained"] = lambda path: AutoModelForCausalLM.from_pretrained(
                path, dtype="auto"
            )
        for way, load in ways.items():
            with torch.no_grad():
                logits = load(other).eval()(ids).logits
            assert torch.equal(logits, expected), f"{other}, {way}: other logits"
        print(f"{other}: {len(weights)} tensors and the logits ({', '.join(ways)}) are the dense ones")


main(*sys.argv[1:])
