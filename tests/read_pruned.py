"""That pruned checkpoints load in transformers, and predict there what they predict in Barber.

    pip install torch transformers
    python tests/read_pruned.py BARBER [NAME...]

BARBER is the program. Each checkpoint of tests/fixtures/logits and stacked, or those of these names, is
pruned by half: its weights, and each kind of structure that its family can lose. transformers must find
all tensors of the result and the perplexity that `barber eval` gives; where weights are pruned, tensors
other than the decoder layers' matrices, and kept weights, must have the bits that they had. Those of a
quantised checkpoint are what `barber convert` writes, which must load, too.
"""

import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

FIXTURES = Path(__file__).parent / "fixtures"
# Tensors of decoder layers with several dimensions that are no pruned matrices, and other models.
FIXED = (".gate.weight", ".router.weight", ".router.layer.weight", ".shared_expert_gate.weight", "_bias")
OTHERS = ("vision_tower", "multi_modal_projector")
# A token is its number.
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "model": {"type": "WordLevel", "vocab": {str(i): i for i in range(96)}, "unk_token": "0"},
}


def stored(checkpoint):
    files = sorted(checkpoint.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def predicted(out, ids):
    """The perplexity that transformers gives of a checkpoint."""
    config = json.loads((out / "config.json").read_text())
    auto = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    model, loading = auto.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    problems = {key: names for key, names in loading.items() if names}
    assert not problems, problems
    with torch.no_grad():
        logits = model.eval()(ids, use_cache=False).logits[:, :-1].flatten(0, 1).double()
    return math.exp(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))


def agree(barber, out, text, ids):
    """The perplexity of a checkpoint, which must be the same in both."""
    arguments = ["--text", text, "--sequence-length", "16", "--json"]
    found = subprocess.run([barber, "eval", out, *arguments], check=True, capture_output=True)
    found = json.loads(found.stdout)["perplexity"][0]["perplexity"]
    expected = predicted(out, ids)
    assert abs(found / expected - 1) < 1e-5, (found, expected)
    return found


def check(barber, fixture, dir):
    name = f"{fixture.parent.name}/{fixture.name}"
    dense, out, text, recipe = (dir / of for of in ("dense", "out", "text.txt", "recipe.toml"))
    shutil.copytree(fixture, dense)
    (dense / "expected.safetensors").unlink(missing_ok=True)
    (dense / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    ids = torch.randint(0, 96, (4, 16), generator=torch.manual_seed(0))
    text.write_text(" ".join(map(str, ids.flatten().tolist())))
    recipe.write_text(
        """
        model.path = "dense"
        calibration = { source = "text.txt", samples = 4, sequence_length = 16 }
        mask.init = "wanda"
        sparsity.ratio = 0.5
        output.path = "out"
        """
    )
    subprocess.run([barber, "prune", recipe, "-q"], check=True, stdout=subprocess.DEVNULL)
    if "quantization_config" in json.loads((dense / "config.json").read_text()):
        arguments = [dense, "--format", "dense", "--output", dir / "converted"]
        subprocess.run([barber, "convert", *arguments], check=True, stdout=subprocess.DEVNULL)
        dense = dir / "converted"
        agree(barber, dense, text, ids)
    zeros, weights = 0, 0
    before, after = stored(dense), stored(out)
    assert before.keys() == after.keys(), before.keys() ^ after.keys()
    for of, tensor in before.items():
        kept = after[of]
        # A matrix, or one of each expert.
        is_matrix = ".layers." in of and tensor.dim() > 1 and not of.endswith(FIXED)
        if is_matrix and not of.startswith(OTHERS):
            zeros += (kept == 0).sum().item()
            weights += kept.numel()
            kept = torch.where(kept == 0, tensor, kept)
        assert kept.dtype == tensor.dtype and torch.equal(kept, tensor), of
    assert abs(zeros / weights - 0.5) < 0.01, (zeros, weights)
    found = agree(barber, out, text, ids)
    print(f"{name}: perplexity {found:.6f}, {zeros} zeros of {weights}", flush=True)
    kinds = [(structure, "", 0.5) for structure in ["channels", "heads", "layers", "experts"]]
    # A token of some mixtures has half of the experts.
    kinds += [("experts", "", 0.34)]
    kinds += [(structure, "compensate", 0.5) for structure in ["channels", "heads"]]
    for structure, stage, ratio in kinds:
        out = dir / f"{structure}{stage}{ratio}"
        sets = [f"sparsity.structure={structure}", f"output.path={out}", f"sparsity.ratio={ratio}"]
        sets += [f"refine=[{{ use = '{stage}' }}]"] if stage else []
        sets = [argument for set in sets for argument in ("--set", set)]
        run = subprocess.run([barber, "prune", recipe, "-q", *sets], capture_output=True, text=True)
        reasons = ["sparsity.structure", "nothing would be removed", "have more experts", "no biases"]
        if run.returncode == 2 and any(reason in run.stderr for reason in reasons):
            print(f"{name}: it cannot lose {ratio} of its {structure} {stage}", flush=True)
            continue
        assert run.returncode == 0, run.stderr
        found = agree(barber, out, text, ids)
        print(f"{name}: perplexity {found:.6f} without {ratio} of its {structure} {stage}", flush=True)


for fixture in sorted(FIXTURES.glob("logits/*")) + sorted(FIXTURES.glob("stacked/*")):
    if not sys.argv[2:] or fixture.name in sys.argv[2:]:
        with tempfile.TemporaryDirectory() as dir:
            check(sys.argv[1], fixture, Path(dir))
