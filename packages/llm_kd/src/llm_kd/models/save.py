"""Students as folders that plain transformers loads."""

import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from kd_common.errors import UserError
from kd_common.files import finish_replacing, replace_folder, staging_paths
from kd_common.hub.language_models import quiet
from llm_kd.models.backbone import Backbone


def save_student(student: Backbone, tokenizer: Any, folder: Path) -> None:
    """Save student and tokenizer with `save_pretrained`; the folder is replaced only when all is written.

    Args:
        student: The student; adapters are merged in what is saved.
        tokenizer: Its tokenizer.
        folder: Folder to write.

    Raises:
        OSError: If it cannot be written; what was there before is unchanged.
    """
    finish_replacing(folder)
    partial, _ = staging_paths(folder)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with quiet():
            student.merged().save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    except (OSError, SafetensorError) as error:  # the latter is what safetensors makes of a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{folder} cannot be written ({error}); what was there before is unchanged") from error
    replace_folder(folder)
