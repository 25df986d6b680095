"""That README's code for fine-tuning in PyTorch keeps the zeros, and nothing else.

    pip install torch transformers numpy
    python tests/keep_zeros.py BARBER

BARBER is the program. It prunes the quickstart's model with masks, README's code loads the result, and
the optimizer takes a few steps: the same weights must be zero as before, and the other weights of the
pruned matrices must have moved. Without README's hook zeros would be lost, which is checked, too.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
STEPS = 5


def readme(dir):
    """The command and the code of README's section, with paths from `dir`."""
    text = (ROOT / "README.md").read_text()
    section = text.split("## Fine-tuning that keeps the zeros")[1].split("\n## ")[0]
    (command,) = re.findall(r"```sh,run\nbarber (.*?)```", section, re.DOTALL)
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    command = command.replace("recipes/", f"{ROOT}/recipes/").split()
    return command, code.replace('"out/', f'"{dir}/out/')


def trained(code):
    """The names that README's code defines, after a few steps of its optimizer."""
    names = {}
    torch.manual_seed(0)
    exec(code, names)
    model, optimizer = names["model"], names["optimizer"]
    ids = torch.randint(0, model.config.vocab_size, (4, 32))
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return names


def main(barber):
    with tempfile.TemporaryDirectory() as dir:
        command, code = readme(dir)
        command = [Path(barber).resolve(), *command, "-q"]
        subprocess.run(command, cwd=dir, check=True, stdout=subprocess.DEVNULL)
        before = load_file(f"{dir}/out/masked/model.safetensors")
        names = trained(code)
        hook = "optimizer.register_step_post_hook(keep_zeros)"
        assert hook in code
        without = trained(code.replace(hook, ""))
    zeros, weights, moved, lost = 0, 0, 0, 0
    for name in names["pruned"]:
        after = names["weights"][name].detach()
        pruned = before[name] == 0
        assert torch.equal(after == 0, pruned), f"{name}: other weights are zero than before"
        zeros += pruned.sum().item()
        weights += pruned.numel()
        moved += (after != before[name].float())[~pruned].sum().item()
        lost += (without["weights"][name][pruned] != 0).sum().item()
    assert zeros * 2 == weights, (zeros, weights)
    assert moved > 0.999 * (weights - zeros), (moved, weights - zeros)
    assert lost > 0.999 * zeros, (lost, zeros)
    print(
        f"{len(names['pruned'])} matrices, {STEPS} steps: {zeros} of {weights} weights are zero as before, "
        f"{moved} of {weights - zeros} others moved; without the hook {lost} zeros are lost"
    )


main(*sys.argv[1:])
