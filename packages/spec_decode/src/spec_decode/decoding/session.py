"""Opening of targets and drafters, encoding of prompts, and streaming of text, for all commands."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kd_common.errors import UserError
from kd_common.hub.language_models import EMBEDDED, load_config, model_ends, note_unapplied
from kd_common.hub.vocabulary import shared_vocabulary
from kd_common.registry import subclasses
from kd_common.run.messages import check_device
from kd_common.text import ChatEncoder, Message, Row
from spec_decode.decoding.decoder import SpeculativeDecoder
from spec_decode.decoding.inputs import check_length
from spec_decode.decoding.sampling import Sampling, row_seeds
from spec_decode.decoding.statistics import Generation
from spec_decode.decoding.stopping import check_stop_strings
from spec_decode.drafters import Drafter, DynamicTree, load_drafter
from spec_decode.drafters.draft_model import PretrainedDraft
from spec_decode.drafters.files import CONFIG, check_target_sizes, holds_language_model, read_config
from spec_decode.drafters.prompt_lookup import WithLookup
from spec_decode.models import CausalLM
from spec_decode.models.target import TargetSpec


def parse_tree(text: str) -> tuple[int, ...] | DynamicTree | str | None:
    """Return the tree from the command line: `auto`, `chain`, candidates per level, or `dynamic:DEPTH,TOP_K,NODES`.

    Raises:
        UserError: For anything else.
    """
    if text in ("auto", "chain"):
        return text if text == "auto" else None
    kind, _, numbers = text.rpartition(":")
    try:
        values = tuple(map(int, numbers.split(",")))
    except ValueError:
        values = ()
    if kind == "" and values:
        return values
    if kind == "dynamic" and len(values) == 3:
        return DynamicTree(*values)
    raise UserError(f"tree must be auto, chain, a list such as 4,2,1, or dynamic:DEPTH,TOP_K,NODES, got {text!r}")


def build_decoder(
    target: CausalLM, drafter: Drafter | None, tree: tuple[int, ...] | DynamicTree | str | None, **settings: Any
) -> SpeculativeDecoder:
    """Return the decoder with a tree that `parse_tree` returned; `auto` measures this machine.

    Args:
        target: Target.
        drafter: Drafter for it; None decodes plainly.
        tree: The tree.
        **settings: Settings of `SpeculativeDecoder`.
    """
    if isinstance(tree, str):
        return SpeculativeDecoder.tuned(target, drafter, **settings)
    return SpeculativeDecoder(target, drafter, tree=tree, **settings)


LOOKUP = "+lookup"


def drafter_folder(name: str) -> Path:
    """Return the folder of a drafter's files; its name may end in `+lookup`."""
    return Path(name.removesuffix(LOOKUP))


def check_drafter(name: str) -> None:
    """Raise for a drafter that `find_drafter` would not find, before anything is loaded for it.

    Raises:
        UserError: For a name whose drafter must be trained, a lookup without a drafter, damaged settings, or another
            program's drafter, or if it is neither a name nor a drafter's folder.
    """
    if name == "none" + LOOKUP:
        raise UserError(f"drafter {name!r}: there is no tree to add a branch to; use PromptLookup")
    name = name.removesuffix(LOOKUP)
    if kind := subclasses(Drafter).get(name):
        if not kind.standalone:
            raise UserError(f"drafter {name!r} has to be trained; give the folder that `spec_decode.fit` wrote")
    elif name != "none" and not holds_language_model(Path(name)):
        read_config(Path(name))


def check_settings(
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_strings: Sequence[str] = (),
) -> None:
    """Raise for settings that `SpeculativeDecoder.generate` rejects, before anything is loaded.

    Raises:
        UserError: If a setting is out of range; the message names it.
    """
    check_length(max_new_tokens)
    Sampling(temperature, top_k, top_p)
    row_seeds(seed, 1)
    check_stop_strings(stop_strings)


def find_drafter(name: str, target: CausalLM, tokenizer: Any = None) -> Drafter | None:
    """Return the drafter from a folder that `fit` wrote, by a name that needs no weights, or None for `none`.

    The folder of a language model, such as a student of `llm_kd.fit`, drafts as it is. `NAME+lookup` adds the branch of
    prompt lookup to the tree of any drafter.

    Args:
        name: Drafter.
        target: Target it is to draft for.
        tokenizer: The target's, which a language model must share; without it only the sizes of the heads are compared.

    Raises:
        UserError: As in `check_drafter`, and for a drafter of another target or a language model of another
            tokenizer, or if it is neither a name nor a drafter's folder.
    """
    check_drafter(name)
    if name == "none":
        return None
    inner = name.removesuffix(LOOKUP)
    drafter = _load(inner, target, tokenizer)
    return drafter if inner == name else WithLookup(drafter)


def _load(name: str, target: CausalLM, tokenizer: Any) -> Drafter:
    if kind := subclasses(Drafter).get(name):
        return kind()
    if holds_language_model(Path(name)):
        dtype = str(target.dtype).removeprefix("torch.")
        spec = TargetSpec(name, dtype)
        model = spec.load().to(target.device)
        if tokenizer is None:
            return PretrainedDraft(target, model)
        tokenizers = (tokenizer, spec.tokenizer())
        shared = shared_vocabulary(*tokenizers, target, model, roles=("target", "draft model"))
        return PretrainedDraft(target, model, shared)
    return load_drafter(Path(name), target)


def find_target(drafter: str, target: str | None, dtype: str) -> tuple[TargetSpec, str | None]:
    """Return the target a drafter is for, with the feature layers and the chat template it was trained with.

    Args:
        drafter: See `find_drafter`.
        target: Name of the target; None means the one the drafter was trained for, else the embedded model.
        dtype: Precision of the target's weights.

    Raises:
        UserError: If the target's sizes differ from the drafter's training target.
    """
    folder = drafter_folder(drafter)
    if not (folder / CONFIG).is_file():
        return TargetSpec(target or EMBEDDED, dtype), None
    trained = read_config(folder)
    name = target or trained.get("target", EMBEDDED)
    check_target_sizes(folder, trained, load_config(name), name)
    return TargetSpec(name, dtype, tuple(trained["feature_layers"])), trained.get("chat_template")


@dataclass
class Session:
    """A target, its tokenizer, and a decoder for both.

    Args:
        target: Step runner.
        tokenizer: Transformers tokenizer.
        decoder: Decoder of the target.
        stops: Tokens that end an answer.
    """

    target: CausalLM
    tokenizer: Any
    decoder: SpeculativeDecoder
    stops: tuple[int, ...]

    @classmethod
    def open(
        cls,
        drafter: str,
        target: str | None,
        *,
        dtype: str,
        device: str,
        tree: str,
        rejection: bool = False,
        min_confidence: float = 0.0,
        compile: bool = False,
    ) -> "Session":
        """Load target, tokenizer and drafter and build the decoder.

        Args:
            drafter: See `find_drafter`.
            target: Name of the target; None means the one the drafter was trained for, else the embedded model.
            dtype: Precision of the target's weights.
            device: Where to run.
            tree: See `parse_tree`.
            rejection: See `SpeculativeDecoder`.
            min_confidence: See `SpeculativeDecoder`.
            compile: See `SpeculativeDecoder`.
        """
        check_device(device)
        check_drafter(drafter)
        shape, (spec, template) = parse_tree(tree), find_target(drafter, target, dtype)
        note_unapplied(spec.name)
        model, tokenizer = spec.load().to(device), spec.tokenizer()
        tokenizer.chat_template = template or tokenizer.chat_template
        decoder = build_decoder(
            model,
            find_drafter(drafter, model, tokenizer),
            shape,
            rejection=rejection,
            min_confidence=min_confidence,
            compile=compile,
            tokenizer=tokenizer,
        )
        return cls(model, tokenizer, decoder, model_ends(spec.name, tokenizer))

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Return the tokens of a conversation that the model is to answer.

        Raises:
            EncodingError: If the chat template rejects it.
        """
        turns = tuple(Message(message["role"], message["content"]) for message in messages)
        return self.encoder.prompt(Row(turns, "the conversation"))

    @cached_property
    def encoder(self) -> ChatEncoder:
        """Return the encoder that turns conversations into tokens."""
        return ChatEncoder(self.tokenizer)

    def summary(self, out: Generation) -> str:
        """Return the tokens per second and tau of a generation."""
        tokens = sum(map(len, out.new_tokens))
        return (
            f"{tokens} tokens, {out.tokens_per_second:.1f} tokens/s, tau {out.tau:.2f} (accepted + 1 per target pass), "
            f"prefill {out.timings['prefill']:.2f} s"
        )


@dataclass
class TextStream:
    """Converter of tokens into pieces of text; a character is held back until all its bytes are there.

    Args:
        tokenizer: Transformers tokenizer.
    """

    tokenizer: Any
    _tokens: list[int] = field(default_factory=list)
    _shown: int = 0  # number of tokens whose text has been returned
    _context: int = 0  # first token decoded together with new ones, which decides on spaces between words

    def push(self, token: int) -> str:
        """Return the text that this token completes; empty while a character is incomplete."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._context : self._shown])
        text = self._decode(self._tokens[self._context :])
        if text.endswith("\ufffd") or len(text) <= len(before):
            return ""
        self._context, self._shown = self._shown, len(self._tokens)
        return text[len(before) :]

    def rest(self) -> str:
        """Return the text that is still held back at the end, such as a character cut in the middle."""
        before = self._decode(self._tokens[self._context : self._shown])
        text = self._decode(self._tokens[self._context :])
        self._context = self._shown = len(self._tokens)
        return text[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)
