"""Run in AutoRound's environment, without caliport: round, then build for ONNX Runtime.

    python -P auto_round_worker.py CHECKPOINT TEXT WORK OUT TOKENS

TEXT is JSON Lines with ``text``, whole conversations. AutoRound's head and embedding stay floats in
what it writes; the model builder rounds them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOW, BATCH = 256, 4
STEPS = 50  # of each layer; AutoRound's "light" recipe, its default is 200


def main() -> None:
    """See above."""
    checkpoint, text, work, out, tokens = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    lines = Path(text).read_text(encoding="utf-8").splitlines()
    whole = "\n".join(json.loads(line)["text"] for line in lines)
    ids = tokenizer(whole, add_special_tokens=False).input_ids[: int(tokens)]
    windows = [torch.tensor([ids[i : i + WINDOW]]) for i in range(0, len(ids) - WINDOW + 1, WINDOW)]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    rounding = AutoRound(
        model,
        scheme="W4A16",
        tokenizer=tokenizer,
        device_map="cpu",
        dataset=windows,
        nsamples=len(windows),
        seqlen=WINDOW,
        batch_size=BATCH,
        iters=STEPS,
        group_size=32,
        sym=True,
    )
    rounded = f"{work}/rounded"
    rounding.quantize_and_save(rounded, format="auto_gptq")
    command = [sys.executable, "-P", "-m", "onnxruntime_genai.models.builder", "-i", rounded]
    command += ["-o", out, "-p", "int4", "-e", "cpu", "-c", f"{work}/cache"]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
