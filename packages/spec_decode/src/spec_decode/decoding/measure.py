"""Benchmark of drafters on real prompts: tokens per second against plain decoding on the same runner."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kd_common.run.memory import peak_bytes
from spec_decode.decoding.decoder import SpeculativeDecoder
from spec_decode.decoding.sampling import Sampling, Stream, gumbel_noise, row_seeds
from spec_decode.decoding.statistics import PHASES, Generation
from spec_decode.models import CausalLM


@dataclass
class Measurement:
    """Sums over prompts for one decoder.

    Attributes:
        tokens: New tokens after the prefill's.
        passes: Target passes, counted per row.
        seconds: Seconds spent after the prefill.
        phases: Seconds of each phase.
        tested: Passes that met candidates at each level.
        matched: Passes in which one was accepted.
        pass_sizes: Target passes by their number of nodes.
        texts: New tokens of every prompt.
    """

    tokens: int = 0
    passes: int = 0
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    tested: list[int] = field(default_factory=list)
    matched: list[int] = field(default_factory=list)
    pass_sizes: Counter[int] = field(default_factory=Counter)
    texts: list[list[int]] = field(default_factory=list)

    def add(self, out: Generation) -> None:
        """Count one generation."""
        self.tokens += sum(map(sum, out.acceptance_lengths))
        self.passes += sum(map(len, out.acceptance_lengths))
        self.seconds += out.timings["total"] - out.timings["prefill"]
        for phase in PHASES:
            self.phases[phase] += out.timings[phase]
        for total, counts in ((self.tested, out.tested), (self.matched, out.matched)):
            total.extend([0] * (len(counts) - len(total)))
            for level, count in enumerate(counts):
                total[level] += count
        self.pass_sizes.update(out.pass_sizes)
        self.texts += out.new_tokens

    @property
    def tokens_per_second(self) -> float:
        """Throughput of decoding, prefill excluded."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def speedup_over(self, plain: "Measurement") -> float | None:
        """Return the speed-up over plain decoding; None where the prefill's token ended all texts."""
        return self.tokens_per_second / plain.tokens_per_second if plain.tokens_per_second else None

    @property
    def end_to_end(self) -> float:
        """Return all new tokens per second, the prefill and its token included."""
        seconds = self.seconds + self.phases["prefill"]
        return sum(map(len, self.texts)) / seconds if seconds else 0.0

    @property
    def tau(self) -> float:
        """Return the tokens per target pass and row: accepted + 1."""
        return self.tokens / self.passes if self.passes else 1.0

    @property
    def acceptance(self) -> list[float]:
        """Acceptance of every level that was reached."""
        return [m / t for m, t in zip(self.matched, self.tested, strict=True) if t]


def first_divergence(texts: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> list[int | None]:
    """Return the index of the first token in which each text differs from the expected one; None if they agree."""
    found: list[int | None] = []
    for text, wanted in zip(texts, expected, strict=True):
        shared = min(len(text), len(wanted))
        at = next((i for i in range(shared) if text[i] != wanted[i]), shared)
        found.append(None if at == len(text) == len(wanted) else at)
    return found


def measure(
    decoders: dict[str, SpeculativeDecoder],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
    batch_size: int = 1,
    on_batch: Callable[[], None] | None = None,
) -> dict[str, Measurement]:
    """Run several decoders on the same prompts, one after the other on each batch of them.

    Taking turns spreads a slow moment of the machine over all decoders. The first batch is run once before, unmeasured.

    Args:
        decoders: Decoders by name.
        prompts: Prompts as token ids.
        max_new_tokens: Tokens per prompt.
        temperature: See `Sampling`.
        seed: Seed of the draws; the same for every decoder.
        stop_tokens: Tokens that end a row.
        batch_size: Prompts at once.
        on_batch: Called after every batch.
    """
    found = {name: Measurement() for name in decoders}
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "stop_tokens": stop_tokens}
    for decoder in decoders.values():
        decoder.generate(prompts[:batch_size], **settings)  # type: ignore[arg-type]
    for start in range(0, len(prompts), batch_size):
        for name, decoder in decoders.items():
            found[name].add(decoder.generate(prompts[start : start + batch_size], **settings))  # type: ignore[arg-type]
        if on_batch is not None:
            on_batch()
    return found


def margin(target: CausalLM, text: Sequence[int], sampling: Sampling, seed: int) -> float:
    """Return the gap between the two largest of log p + noise (of the logits at temperature 0) behind a text.

    This is the rounding error that made two computations of the same logits choose different tokens.
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
    """Report how many texts equal plain decoding, and for each other text the first difference and its margin."""
    differing = [
        {"prompt": i, "token": at, "margin": margin(target, [*prompts[i], *plain.texts[i][:at]], sampling, seed)}
        for i, at in enumerate(first_divergence(found.texts, plain.texts))
        if at is not None
    ]
    return {"equal": len(found.texts) - len(differing), "of": len(found.texts), "differing": differing}


def needed_memory(decoder: SpeculativeDecoder, prompt: Sequence[int], **settings: Any) -> dict[str, float]:
    """Return the MiB that a decoder needs in addition to the target's weights.

    The first number is the drafter's own weights, the second the peak of one generation.

    Args:
        decoder: The decoder.
        prompt: Prompt as token ids.
        **settings: Arguments of `SpeculativeDecoder.generate`.
    """
    target = [*decoder.target.parameters(), *decoder.target.buffers()]
    drafter = [] if decoder.drafter is None else decoder.drafter.weights()
    shared, sizes = _sizes(target), _sizes(drafter)
    peak = peak_bytes(lambda: decoder.generate([prompt], **settings), [*target, *drafter], decoder.target.device)
    drafter_bytes = sum(size for place, size in sizes.items() if place not in shared)
    return {"drafter_mib": drafter_bytes / 2**20, "decoding_mib": peak / 2**20}


def _sizes(tensors: Sequence[Tensor]) -> dict[int, int]:
    """Return the bytes by place; tensors that share memory count once. Packed weights have no address."""
    plain = [t.untyped_storage() for t in tensors if t.layout == torch.strided]
    packed = {id(t): t.numel() * t.element_size() for t in tensors if t.layout != torch.strided}
    return {storage.data_ptr(): storage.nbytes() for storage in plain} | packed
