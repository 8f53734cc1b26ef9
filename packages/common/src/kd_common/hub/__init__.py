"""Loading of complete language models from folders and the Hub.

The modules need the extra `kd-common[hub]`.
"""

from kd_common.hub.language_models import ModelNotFoundError, load_causal_lm, load_config, load_tokenizer, model_ends
from kd_common.hub.vocabulary import shared_vocabulary
from kd_common.hub.weight_files import ModelFilesError

__all__ = [
    "ModelFilesError",
    "ModelNotFoundError",
    "load_causal_lm",
    "load_config",
    "load_tokenizer",
    "model_ends",
    "shared_vocabulary",
]
