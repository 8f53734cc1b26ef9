"""SHA-256 digests of what the commands compute, to show that a change of the code changes no result.

``python tests/digests.py write FILE`` runs shortened commands on one thread and writes a digest per run.
``python tests/digests.py compare FILE`` runs them again and names every run whose digest differs.
Processors and library versions change digests, so both runs need the same machine and environment.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
DRAFTERS = ["fast_eagle", "eagle3", "medusa", "draft_model"]
SPEC = [
    "--trainer.max_epochs=1",
    "--data.limit=24",
    "--data.val_prompts=4",
    "--data.sampling.max_new_tokens=24",
    "--model.target.dtype=float32",
    "--measure_prompts=0",
]
LLM = ["--trainer.max_epochs=1", "--data.limit_train=16", "--data.limit_val=8", "--data.sampling.max_new_tokens=16"]
RUNS = {
    "vision_kd": ["vision_kd.fit", "--trainer.max_epochs=2", "--model.teacher.epochs=2"],
    "detection": ["vision_kd.fit", "--config=detection/demo", "--trainer.max_epochs=1", "--model.teacher.epochs=1"],
    "llm_kd": ["llm_kd.fit", *LLM],
    **{f"drafter {name}": ["spec_decode.fit", f"--config=drafters/{name}", *SPEC] for name in DRAFTERS},
}
DECODED = [
    {"tree": "chain", "seed": 0},
    {"tree": "4,2"},
    {"tree": "4,2", "temperature": 1.0, "seed": 1},
    {"tree": "4,2", "temperature": 0.7, "top_p": 0.9, "rejection": True},
]
PROMPT = "Name three colours of the rainbow, then name them again in the opposite order."
DECODE = """
import json, sys
from spec_decode.generate import generate
drafter, settings, prompt = json.loads(sys.argv[1])
for keywords in settings:
    found = generate(prompt, drafter=drafter, max_new_tokens=32, dtype="float32", **keywords)
    print("TOKENS", json.dumps(found.sequences.tolist()))
"""


def digest_of_weights(run: Path) -> str:
    """Digest of the values of the last exported weights of a run, whatever their names and order."""
    values: list[Tensor] = []
    for file in sorted(run.glob("*_last*/*.safetensors")):
        values += load_file(file).values()
    for file in sorted(run.glob("*_last.pt")):
        values += torch.load(file, weights_only=True)["model"].values()
    if not values:
        raise SystemExit(f"{run}: holds no exported weights")
    found = sorted(hashlib.sha256(value.contiguous().view(-1).numpy().tobytes()).hexdigest() for value in values)
    return hashlib.sha256("".join(found).encode()).hexdigest()


def python(*arguments: str) -> str:
    """Run Python on one thread and return what it prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arguments} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def digests() -> dict[str, str]:
    """Digest of every run and of the tokens of every decoding, by name."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KD_CACHE"] = f"{folder}/cache"
        for name, (module, *arguments) in RUNS.items():
            run = Path(folder, name.replace(" ", "_"))
            python("-m", module, *arguments, *QUIET, f"--run_dir={run}")
            found[name] = digest_of_weights(run)
            print(name, found[name], flush=True)
        drafters = {name: f"{folder}/drafter_{name}/drafter_last" for name in DRAFTERS} | {"lookup": "PromptLookup"}
        for name, drafter in drafters.items():
            # Prompt lookup has one candidate a level and draws none.
            plain = {"tree": "chain", "rejection": False}
            decoded = [settings | (plain if name == "lookup" else {}) for settings in DECODED]
            printed = python("-c", DECODE, json.dumps([drafter, decoded, PROMPT])).splitlines()
            tokens = [line for line in printed if line.startswith("TOKENS")]
            for settings, line in zip(decoded, tokens, strict=True):
                found[f"tokens {name} {settings}"] = hashlib.sha256(line.encode()).hexdigest()
            print(f"tokens {name}", *tokens, sep="\n", flush=True)
    return found


def main(action: str, file: str) -> None:
    """Write the digests, or compare them with those of a file."""
    if action == "write":
        Path(file).write_text(json.dumps(digests(), indent=1) + "\n")
        return
    before, now = json.loads(Path(file).read_text()), digests()
    different = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if different:
        raise SystemExit("other results: " + "; ".join(different))
    print(f"{len(now)} digests are the same")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("write", "compare"):
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
