"""`python -m spec_decode.benchmark`: drafters against plain decoding on the same runner, in one table and one JSON.

Every prompt set and temperature is a block in which all decoders take turns on each prompt; finished blocks are kept
when a run is interrupted.
"""

from kd_common.run.early import answer_early

if __name__ == "__main__":
    answer_early("spec_decode.benchmark")  # before the imports below, which take seconds

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from rich.console import Console
from tqdm import tqdm

from kd_common.checks import at_least
from kd_common.errors import UserError
from kd_common.files import read_json, write_atomically
from kd_common.hub.language_models import model_ends, model_source, note_unapplied
from kd_common.run.environment import environment
from kd_common.run.errors import run_command
from kd_common.run.messages import CommandParser, check_device, check_folder
from kd_common.text import Row
from spec_decode.data.corpus import encode_prompts
from spec_decode.data.prompts import packaged_prompts, read_prompts
from spec_decode.decoding.autotune import measure_passes
from spec_decode.decoding.cost import speedup
from spec_decode.decoding.decoder import SpeculativeDecoder
from spec_decode.decoding.measure import Measurement, lossless, measure, needed_memory
from spec_decode.decoding.peers import transformers_peers
from spec_decode.decoding.sampling import Sampling
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


@dataclass(frozen=True)
class Settings:
    """All that the numbers of a benchmark depend on.

    Args:
        target: Fingerprint of the target.
        dtype: Precision of its weights.
        drafters: Digest of every drafter's files; empty for one without.
        tree: Tree of the drafters that have none of their own.
        min_confidence: See `SpeculativeDecoder`.
        prompts: Encoded prompts of every set.
        stop_tokens: Tokens that end a text.
        max_new_tokens: Tokens per prompt.
        batch_size: Prompts at once.
        seed: Seed of the draws.
        peers: Whether transformers' own `generate` takes part.
        assistant: Source of the model that assists it.
        compile: Whether the target's passes are compiled.
        device: Where it runs.
        environment: Hardware and versions.
    """

    target: str
    dtype: str
    drafters: dict[str, str]
    tree: str
    min_confidence: float
    prompts: dict[str, list[list[int]]]
    stop_tokens: tuple[int, ...]
    max_new_tokens: int
    batch_size: int
    seed: int
    peers: bool
    assistant: str | None
    compile: bool
    device: str
    environment: dict[str, Any]

    @property
    def key(self) -> str:
        """Return the digest that tells the results of one benchmark from those of another."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]

    def generation(self, temperature: float) -> dict[str, Any]:
        """Return the settings of `SpeculativeDecoder.generate`."""
        names = ("max_new_tokens", "seed", "stop_tokens")
        return {name: getattr(self, name) for name in names} | {"temperature": temperature}


def rows_of_block(
    found: dict[str, Measurement],
    decoders: dict[str, SpeculativeDecoder],
    passes: dict[int, float],
    verdicts: dict[str, dict[str, Any]],
    memory: dict[str, dict[str, float]],
    block: dict[str, Any],
) -> list[dict[str, Any]]:
    """Return a row for each decoder, with its measurement and the prediction of the cost model."""
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
    """Read the results of an earlier benchmark.

    Raises:
        UserError: If it is damaged.
    """
    remedy = "choose another output folder, or delete that file to measure again"
    content = read_json(path, remedy)
    if not isinstance(content.get("key"), str) or not isinstance(content.get("rows"), list):
        raise UserError(f"{path} is damaged: it holds no key and rows; {remedy}")
    if content.get("crc32") != checksum(content["rows"]):
        raise UserError(f"{path} is damaged or was changed: the checksum of its rows is wrong; {remedy}")
    return content


def checksum(rows: Sequence[dict[str, Any]]) -> int:
    """Checksum of results as JSON."""
    return zlib.crc32(json.dumps(rows).encode())


def content_digest(folder: Path) -> str:
    """Return the digest of the files in a drafter's folder; empty for a drafter without one."""
    digest = hashlib.sha256()
    paths = sorted(path for path in folder.glob("*") if path.is_file())
    for path in paths:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if paths else ""


def load_prompts(files: Mapping[str, str], tokenizer: Any, count: int, longest: int) -> dict[str, list[list[int]]]:
    """Encoded prompts of every set, the first ones; without files the last packaged prompts, as `fit` trains on others.

    Args:
        files: JSONL files by the name of the set.
        tokenizer: transformers tokenizer.
        count: Prompts per set.
        longest: Longer prompts are left out.
    """
    read = {name: read_prompts(Path(path)) for name, path in files.items()}
    texts: Mapping[str, Sequence[str | Row]] = read or {"packaged": packaged_prompts()[::-1]}
    return {name: encode_prompts(tokenizer, text[:count], longest=longest) for name, text in texts.items()}


def load_decoders(
    entries: Mapping[str, tuple[str, Any]], target: CausalLM, tokenizer: Any, *, min_confidence: float, compile: bool
) -> dict[str, SpeculativeDecoder]:
    """Plain decoding and a decoder per drafter.

    Args:
        entries: Name and tree of every drafter.
        target: The target.
        tokenizer: Its tokenizer.
        min_confidence: See `SpeculativeDecoder`; left out for drafters without probabilities.
        compile: See `SpeculativeDecoder`.
    """
    decoders = {PLAIN: SpeculativeDecoder(target, compile=compile)}
    for entry, (name, tree) in entries.items():
        drafter = find_drafter(name, target, tokenizer)
        confidence = min_confidence if drafter is not None and drafter.capabilities.confident else 0.0
        decoders[entry] = build_decoder(target, drafter, tree, min_confidence=confidence)
    return decoders


def measure_block(
    settings: Settings,
    decoders: dict[str, SpeculativeDecoder],
    name: str,
    sampling: Sampling,
    on_batch: Callable[[], None],
) -> list[dict[str, Any]]:
    """Measure all decoders on one set of prompts at one temperature; return a row for each.

    Args:
        settings: What is measured.
        decoders: Decoders by name.
        name: Name of the set.
        sampling: The target's processors.
        on_batch: Called after every batch.
    """
    target, prompts = decoders[PLAIN].target, settings.prompts[name]
    how = settings.generation(sampling.temperature)
    largest = max(tree_slots(decoder.tree) for decoder in decoders.values())
    passes = measure_passes(target, [1, *range(8, largest + 1, 8)])
    found = measure(decoders, prompts, **how, batch_size=settings.batch_size, on_batch=on_batch)
    memory = {n: needed_memory(decoder, prompts[0], **how) for n, decoder in decoders.items()}
    plain = found[PLAIN]
    verdicts = {n: lossless(m, plain, target, prompts, sampling, settings.seed) for n, m in found.items() if n != PLAIN}
    block = {
        "set": name,
        "temperature": sampling.temperature,
        "batch_size": settings.batch_size,
        "pass_seconds": {str(size): seconds for size, seconds in passes.items()},
    }
    return rows_of_block(found, decoders, passes, verdicts, memory, block)


def compare_transformers(rows: list[dict[str, Any]], settings: Settings, target: str, assistant: str | None) -> None:
    """Add transformers' own runs to the rows of a block, and to each row its speed relative to them.

    Args:
        rows: Rows of the block.
        settings: What is measured.
        target: Name of the target.
        assistant: Name of the model that assists it.
    """
    block = {key: rows[0][key] for key in ("set", "temperature", "batch_size", "pass_seconds")}
    speeds = transformers_peers(
        target,
        settings.dtype,
        settings.prompts[block["set"]],
        max_new_tokens=settings.max_new_tokens,
        temperature=block["temperature"],
        stops=settings.stop_tokens,
        assistant=assistant,
        device=settings.device,
    )
    for row in rows:
        row["speedup_over_transformers"] = row["end_to_end"] / speeds["transformers"]
    rows += [{**block, "drafter": peer, "end_to_end": speed} for peer, speed in speeds.items()]


def finished_rows(path: Path, key: str) -> list[dict[str, Any]]:
    """Read the finished rows of a benchmark with the same key; rename the file of another one after its key.

    Raises:
        UserError: If the file is damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        return []
    saved = read_results(path)
    if saved["key"] == key:
        rows: list[dict[str, Any]] = saved["rows"]
        return rows
    path.rename(path.with_name(f"results-{saved['key']}.json"))
    return []


def write_results(path: Path, settings: Settings, rows: list[dict[str, Any]]) -> None:
    """Write all rows there are so far."""
    content = {"key": settings.key, "environment": settings.environment, "rows": rows, "crc32": checksum(rows)}
    write_atomically(path, json.dumps(content, indent=1))


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
        drafters: Folders of trained drafters, or names such as `PromptLookup`; plain decoding is always there.
            `+lookup` adds the branch of prompt lookup, and a tree of its own may follow behind an `@`, as in
            `"RUN/drafter_best+lookup@4,2,1"` (a comma needs the quotes).
        target: Target by folder or name; by default that of the first trained drafter, else the embedded one.
        prompts: JSONL files by a name for the set; the last packaged prompts by default.
        count: Prompts per set, the first ones.
        temperatures: Temperatures; 0 and 1 by default.
        tree: `auto`, `chain`, candidates per level such as `4,2,1`, or `dynamic:DEPTH,TOP_K,NODES`, for
            drafters without one.
        min_confidence: See `SpeculativeDecoder`; drafters without probabilities keep all their nodes.
        max_new_tokens: Tokens per prompt.
        longest_prompt: Longer prompts are left out.
        batch_size: Prompts decoded at once, plainly and by every drafter; transformers' own run at 1 only.
        seed: Seed of the draws.
        peers: Also run transformers' own `generate`, alone and with prompt lookup.
        assistant: A smaller model of the same tokenizer, by folder or name, for transformers' assisted generation.
        compile: Compile the target's passes, plain ones and those over trees; see `SpeculativeDecoder`.
        dtype: Precision of the target's weights; `auto` is the one this machine is fastest in.
        device: Where to run.
        output: Folder for `results.json`; finished blocks of the same settings in it are not run again,
            those of other settings, or of another machine, are kept in a file of their own.
    """
    check_device(device)
    at_least("count", count, 1)
    samplings = [Sampling(temperature) for temperature in temperatures or (0.0, 1.0)]
    check_settings(max_new_tokens=max_new_tokens, temperature=samplings[0].temperature, seed=seed)
    entries = {entry: (name, parse_tree(own or tree)) for entry in drafters for name, _, own in [entry.partition("@")]}
    for name, _ in entries.values():
        check_drafter(name)
    check_folder("--output", output)
    trained = next((name for name, _ in entries.values() if (drafter_folder(name) / CONFIG).is_file()), "none")
    spec, template = find_target(trained, target, dtype)
    note_unapplied(spec.name)
    model, tokenizer = spec.load().to(device), spec.tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    sets = load_prompts(prompts or {}, tokenizer, count, longest_prompt)
    decoders = load_decoders(entries, model, tokenizer, min_confidence=min_confidence, compile=compile)
    settings = Settings(
        target=model.fingerprint(model.dtype),
        dtype=str(model.dtype).removeprefix("torch."),
        drafters={entry: content_digest(drafter_folder(name)) for entry, (name, _) in entries.items()},
        tree=tree,
        min_confidence=min_confidence,
        prompts=sets,
        stop_tokens=model_ends(spec.name, tokenizer),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        peers=peers,
        assistant=assistant and model_source(assistant),
        compile=compile,
        device=device,
        environment=environment(),
    )
    path = Path(output) / "results.json"
    rows = finished_rows(path, settings.key)
    finished = {(row["set"], row["temperature"]) for row in rows}
    blocks = [(n, s) for n in sets for s in samplings if (n, s.temperature) not in finished]
    with tqdm(total=sum(len(sets[n]) for n, _ in blocks), unit="prompt") as bar:
        for name, sampling in blocks:
            block = measure_block(settings, decoders, name, sampling, on_batch=bar.update)
            if peers and batch_size == 1:
                compare_transformers(block, settings, spec.name, assistant)
            rows += block
            write_results(path, settings, rows)
    print_tables(rows, Console())
    print(f"written to {path}")
    return rows


if __name__ == "__main__":
    run_command(lambda: auto_cli(benchmark, as_positional=False, parser_class=CommandParser))
