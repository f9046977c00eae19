"""Run in Olive's environment, without caliport: its GPTQ, then its model builder.

    python -P olive_worker.py CHECKPOINT TEXT WORK OUT TOKENS

TEXT is JSON Lines with ``text``, whole conversations. GPTQ rounds the head too; the embedding,
which it leaves out, is rounded to nearest.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

WINDOW = 256


def main() -> None:
    """See above."""
    checkpoint, text, work, out, tokens = sys.argv[1:]
    whole = {"bits": 4, "group_size": 32, "sym": True}
    settings = {
        "input_model": {"type": "HfModel", "model_path": checkpoint},
        "data_configs": [
            {
                "name": "text",
                "type": "HuggingfaceContainer",
                "load_dataset_config": {"data_name": "json", "data_files": text, "split": "train"},
                "pre_process_data_config": {
                    "model_name": checkpoint,
                    "task": "text-generation",
                    "text_cols": ["text"],
                    "strategy": "join",
                    "joiner": "",
                    "add_special_tokens": False,
                    "max_seq_len": WINDOW,
                    "max_samples": int(tokens) // WINDOW,
                },
                "dataloader_config": {"batch_size": 1},
            }
        ],
        "passes": {
            "gptq": {"type": "Gptq", **whole, "lm_head": True, "data_config": "text"},
            "rtn": {"type": "Rtn", **whole, "embeds": True},
            "builder": {"type": "ModelBuilder", "precision": "int4", "int4_block_size": 32},
        },
        "output_dir": f"{work}/olive",
        "cache_dir": f"{work}/cache",
        "no_artifacts": True,
    }
    path = Path(work) / "olive.json"
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    subprocess.run([sys.executable, "-P", "-m", "olive", "run", "--config", str(path)], check=True)
    found = sorted(Path(work, "olive").rglob("genai_config.json"))
    if not found:
        sys.exit(f"{work}/olive: Olive has written no genai_config.json")
    shutil.copytree(found[0].parent, out)


if __name__ == "__main__":
    main()
