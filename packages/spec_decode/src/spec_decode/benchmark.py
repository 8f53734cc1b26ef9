"""``python -m spec_decode.benchmark``: drafters against plain decoding on the same runner, in one table and one JSON.

Every prompt set and temperature is a block in which all decoders take turns on each prompt; finished blocks are kept
when a run is interrupted.
"""

from kd_common.run.early import answer_early

if __name__ == "__main__":
    answer_early("spec_decode.benchmark")  # before the imports below, which take seconds

import hashlib
import json
import os
import platform
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from rich.console import Console
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from kd_common.files import read_json, write_atomically
from kd_common.hub.language_models import load_causal_lm, model_ends, model_source, note_unapplied
from kd_common.run.errors import run_command
from kd_common.run.memory import peak_bytes
from kd_common.run.messages import CommandParser, check_device, check_folder
from kd_common.text import Row
from spec_decode.data.corpus import encode_prompts
from spec_decode.data.prompts import packaged_prompts, read_prompts
from spec_decode.decoding.autotune import measure_passes
from spec_decode.decoding.cost import speedup
from spec_decode.decoding.decoder import SpeculativeDecoder
from spec_decode.decoding.measure import Measurement, first_divergence, measure
from spec_decode.decoding.sampling import Sampling, Stream, gumbel_noise, row_seeds
from spec_decode.decoding.session import (
    build_decoder,
    check_drafter,
    check_settings,
    drafter_folder,
    find_drafter,
    find_target,
    parse_tree,
)
from spec_decode.drafters.base import tree_slots
from spec_decode.drafters.files import CONFIG
from spec_decode.models import CausalLM
from spec_decode.viz.tables import print_tables

PLAIN = "plain"


def margin(target: CausalLM, text: Sequence[int], sampling: Sampling, seed: int) -> float:
    """Gap between the two largest of log p + noise (of the logits at temperature 0) behind a text.

    Where two ways of computing the same logits choose different tokens, this is what rounding had to bridge.
    """
    logits = target.logits(target(torch.tensor([text], device=target.device)).final[:, -1]).double()
    if sampling.temperature:
        ids = torch.arange(target.vocab_size, device=target.device)
        position = torch.tensor([len(text)], device=target.device)
        seeds = row_seeds(seed, 1).to(target.device)
        logits = sampling.log_probs(logits) + gumbel_noise(seeds, position, ids, Stream.TARGET)
    best = logits[0].topk(2).values
    return float(best[0] - best[1])


def lossless(
    found: Measurement,
    plain: Measurement,
    target: CausalLM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seed: int,
) -> dict[str, Any]:
    """How many texts equal those of plain decoding; for each that does not, where and by what margin."""
    differing = [
        {"prompt": i, "token": at, "margin": margin(target, [*prompts[i], *plain.texts[i][:at]], sampling, seed)}
        for i, at in enumerate(first_divergence(found.texts, plain.texts))
        if at is not None
    ]
    return {"equal": len(found.texts) - len(differing), "of": len(found.texts), "differing": differing}


def needed_memory(decoder: SpeculativeDecoder, prompt: Sequence[int], **settings: Any) -> dict[str, float]:
    """MiB that a decoder needs beside the target's weights: its drafter's own, and at the peak of one generation.

    Args:
        decoder: The decoder.
        prompt: Prompt as token ids.
        **settings: Of `SpeculativeDecoder.generate`.
    """
    target = [*decoder.target.parameters(), *decoder.target.buffers()]
    drafter = [] if decoder.drafter is None else decoder.drafter.weights()
    shared, own = _sizes(target), _sizes(drafter)
    peak = peak_bytes(lambda: decoder.generate([prompt], **settings), [*target, *drafter], decoder.target.device)
    drafter_bytes = sum(size for place, size in own.items() if place not in shared)
    return {"drafter_mib": drafter_bytes / 2**20, "decoding_mib": peak / 2**20}


def _sizes(tensors: Sequence[Tensor]) -> dict[int, int]:
    """Bytes by place; tensors that share memory count once. Packed weights have no address."""
    plain = [t.untyped_storage() for t in tensors if t.layout == torch.strided]
    packed = {id(t): t.numel() * t.element_size() for t in tensors if t.layout != torch.strided}
    return {storage.data_ptr(): storage.nbytes() for storage in plain} | packed


def transformers_peers(
    name: str,
    dtype: str,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    stops: Sequence[int],
    assistant: str | None = None,
    device: str = "cpu",
) -> dict[str, float]:
    """Tokens per second from prompt to end of transformers' `generate`: alone, with prompt lookup, assisted."""

    def loaded(name: str) -> Any:
        model: Any = load_causal_lm(name, dtype)
        model.generation_config = GenerationConfig()  # the law of the other decoders, without penalties of its own
        return model.to(device)

    model = loaded(name)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": temperature > 0,
        "eos_token_id": list(stops) or None,
        "pad_token_id": 0,
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
    }
    speeds = {}
    ways: dict[str, dict[str, Any]] = {
        "transformers": {},
        "transformers prompt lookup": {"prompt_lookup_num_tokens": 4},
    }
    if assistant is not None:
        ways["transformers assisted"] = {"assistant_model": loaded(assistant)}
    for label, extra in ways.items():
        tokens, seconds = 0, 0.0
        for index, prompt in enumerate([prompts[0], *prompts]):
            ids = torch.tensor([prompt], device=device)
            torch.manual_seed(index)
            start = time.perf_counter()
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings, **extra)
            if out.is_cuda:
                torch.cuda.synchronize()
            if index:  # the first is a warm-up
                tokens, seconds = tokens + out.shape[1] - ids.shape[1], seconds + time.perf_counter() - start
        speeds[label] = tokens / seconds
    return speeds


def rows_of_block(
    found: dict[str, Measurement],
    decoders: dict[str, SpeculativeDecoder],
    passes: dict[int, float],
    verdicts: dict[str, dict[str, Any]],
    memory: dict[str, dict[str, float]],
    block: dict[str, Any],
) -> list[dict[str, Any]]:
    """One row per decoder: what was measured, and beside it the cost model."""
    plain, rows = found[PLAIN], []
    for name, result in found.items():
        tree = decoders[name].tree
        phases = result.phases
        model = None
        if tree and result.passes and block["batch_size"] == 1:  # T(n) was measured on one row
            drafting = result.phases["draft"] / result.passes
            verifying = sum(passes[n] * times for n, times in result.pass_sizes.items()) / result.passes
            model = speedup(result.tau, passes[1], drafting, verifying)
        gain = result.speedup_over(plain)
        rows.append(
            {
                **block,
                "drafter": name,
                "tree": list(tree) if isinstance(tree, tuple) else vars(tree),
                "tokens": result.tokens,
                "tokens_per_second": result.tokens_per_second,
                "end_to_end": result.end_to_end,
                "speedup": gain,
                "tau": result.tau,
                "acceptance": result.acceptance,
                "pass_sizes": [list(pair) for pair in sorted(result.pass_sizes.items())],
                "seconds": phases | {"overhead": result.seconds + phases["prefill"] - sum(phases.values())},
                "cost_model": model,
                "share_of_cost_model": gain / model if gain and model else None,
                "lossless": verdicts.get(name),
                **memory[name],
            }
        )
    return rows


def read_results(path: Path) -> dict[str, Any]:
    """What an earlier benchmark wrote.

    Raises:
        ValueError: If it is damaged.
    """
    remedy = "choose another output folder, or delete that file to measure again"
    content = read_json(path, remedy)
    if not isinstance(content.get("key"), str) or not isinstance(content.get("rows"), list):
        raise ValueError(f"{path} is damaged: it holds no key and rows; {remedy}")
    if content.get("crc32") != checksum(content["rows"]):
        raise ValueError(f"{path} is damaged or was changed: the checksum of its rows is wrong; {remedy}")
    return content


def checksum(rows: Sequence[dict[str, Any]]) -> int:
    """Checksum of results as JSON."""
    return zlib.crc32(json.dumps(rows).encode())


def content_digest(folder: Path) -> str:
    """Digest of the files in a drafter's folder; empty for a drafter without one."""
    digest = hashlib.sha256()
    paths = sorted(path for path in folder.glob("*") if path.is_file())
    for path in paths:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if paths else ""


def benchmark(
    drafters: list[str],
    target: str | None = None,
    prompts: dict[str, str] | None = None,
    count: int = 8,
    temperatures: list[float] | None = None,
    tree: str = "chain",
    min_confidence: float = 0.0,
    max_new_tokens: int = 128,
    longest_prompt: int = 512,
    batch_size: int = 1,
    seed: int = 0,
    peers: bool = True,
    assistant: str | None = None,
    compile: bool = False,
    dtype: str = "auto",
    device: str = "cpu",
    output: str = "runs/benchmark",
) -> list[dict[str, Any]]:
    """Measure drafters.

    Args:
        drafters: Folders of trained drafters, or names such as ``prompt_lookup``; plain decoding is always there.
            ``+lookup`` adds the branch of prompt lookup, and a tree of its own may follow behind an ``@``, as in
            ``"RUN/drafter_best+lookup@4,2,1"`` (a comma needs the quotes).
        target: Target by folder or name; by default that of the first trained drafter, else the embedded one.
        prompts: JSONL files by a name for the set; the last packaged prompts by default.
        count: Prompts per set, the first ones.
        temperatures: Temperatures; 0 and 1 by default.
        tree: ``auto``, ``chain``, widths such as ``4,2,1``, or ``dynamic:DEPTH,TOP_K,NODES``, for drafters without one.
        min_confidence: See `SpeculativeDecoder`; drafters without probabilities keep all their nodes.
        max_new_tokens: Tokens per prompt.
        longest_prompt: Longer prompts are left out.
        batch_size: Prompts decoded at once, plainly and by every drafter; transformers' own run at 1 only.
        seed: Seed of the draws.
        peers: Also run transformers' own `generate`, alone and with prompt lookup.
        assistant: A smaller model of the same tokenizer, by folder or name, for transformers' assisted generation.
        compile: Compile the target's passes, plain ones and those over trees; see `SpeculativeDecoder`.
        dtype: Precision of the target's weights; ``auto`` is the one this machine is fastest in.
        device: Where to run.
        output: Folder for ``results.json``; finished blocks of the same settings in it are not run again,
            those of other settings, or of another machine, are kept in a file of their own.
    """
    check_device(device)
    if count < 1:
        raise ValueError(f"count must be >= 1, got {count}")
    laws = [Sampling(temperature) for temperature in temperatures or (0.0, 1.0)]
    check_settings(max_new_tokens=max_new_tokens, temperature=laws[0].temperature, seed=seed)
    entries = {entry: (name, parse_tree(own or tree)) for entry in drafters for name, _, own in [entry.partition("@")]}
    for name, _ in entries.values():
        check_drafter(name)
    check_folder("--output", output)
    trained = next((name for name, _ in entries.values() if (drafter_folder(name) / CONFIG).is_file()), "none")
    spec, template = find_target(trained, target, dtype)
    note_unapplied(spec.name)
    model, tokenizer = spec.load().to(device), spec.tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    stops = model_ends(spec.name, tokenizer)
    files = {n: read_prompts(Path(p)) for n, p in (prompts or {}).items()}
    # `fit` trains on the first ones of the packaged prompts.
    texts: Mapping[str, Sequence[str | Row]] = files or {"packaged": packaged_prompts()[::-1]}
    sets = {n: encode_prompts(tokenizer, t[:count], longest=longest_prompt) for n, t in texts.items()}
    decoders = {PLAIN: SpeculativeDecoder(model, compile=compile)}
    for entry, (name, shape) in entries.items():
        drafter = find_drafter(name, model, tokenizer)
        confidence = min_confidence if drafter is not None and drafter.capabilities.confident else 0.0
        decoders[entry] = build_decoder(model, drafter, shape, min_confidence=confidence)
    largest = max(tree_slots(decoder.tree) for decoder in decoders.values())

    settings = [
        model.fingerprint(model.dtype),
        str(model.dtype),
        {entry: content_digest(drafter_folder(name)) for entry, (name, _) in entries.items()},
        tree,
        min_confidence,
        count,
        max_new_tokens,
        longest_prompt,
        batch_size,
        seed,
        sets,
        stops,
        peers,
        assistant and model_source(assistant),
        compile,
        device,
        environment(),
    ]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    path = Path(output) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = read_results(path) if path.is_file() else {}
    if saved and saved["key"] != key:
        path.rename(path.with_name(f"results-{saved['key']}.json"))
    rows: list[dict[str, Any]] = saved["rows"] if saved.get("key") == key else []
    finished = {(row["set"], row["temperature"]) for row in rows}
    blocks = [(n, law) for n in sets for law in laws if (n, law.temperature) not in finished]
    with tqdm(total=sum(len(sets[n]) for n, _ in blocks), unit="prompt") as bar:
        for name, sampling in blocks:
            temperature = sampling.temperature
            how: dict[str, Any] = {
                "max_new_tokens": max_new_tokens,
                "temperature": temperature,
                "seed": seed,
                "stop_tokens": stops,
            }
            passes = measure_passes(model, [1, *range(8, largest + 1, 8)])
            found = measure(decoders, sets[name], **how, batch_size=batch_size, on_batch=bar.update)
            memory = {n: needed_memory(d, sets[name][0], **how) for n, d in decoders.items()}
            verdicts = {
                n: lossless(m, found[PLAIN], model, sets[name], sampling, seed) for n, m in found.items() if n != PLAIN
            }
            times = {str(size): seconds for size, seconds in passes.items()}
            block = {"set": name, "temperature": temperature, "batch_size": batch_size, "pass_seconds": times}
            rows += rows_of_block(found, decoders, passes, verdicts, memory, block)
            if peers and batch_size == 1:
                speeds = transformers_peers(
                    spec.name,
                    str(model.dtype).removeprefix("torch."),
                    sets[name],
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    stops=stops,
                    assistant=assistant,
                    device=device,
                )
                for row in rows:
                    if (row["set"], row["temperature"]) == (name, temperature):
                        row["speedup_over_transformers"] = row["end_to_end"] / speeds["transformers"]
                rows += [{**block, "drafter": peer, "end_to_end": speed} for peer, speed in speeds.items()]
            content = {"key": key, "environment": environment(), "rows": rows, "crc32": checksum(rows)}
            write_atomically(path, json.dumps(content, indent=1))
    print_tables(rows, Console())
    print(f"written to {path}")
    return rows


def environment() -> dict[str, Any]:
    """Hardware and versions the numbers belong to."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"device": device, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}


if __name__ == "__main__":
    run_command(lambda: auto_cli(benchmark, as_positional=False, parser_class=CommandParser))
