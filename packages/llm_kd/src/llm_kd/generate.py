"""`python -m llm_kd.generate --model FOLDER --prompt "..."`: a model's answer, printed while it is written.

The prompt becomes a user's turn of the tokenizer's chat template, or of the instruction layout that students without a
template are trained on.
"""

from kd_common.run.early import answer_early

if __name__ == "__main__":
    answer_early("llm_kd.generate")  # before the imports below, which take seconds

import dataclasses
import sys

from transformers import TextStreamer

from kd_common.errors import UserError
from kd_common.hub.language_models import load_causal_lm, load_config, load_tokenizer, note_unapplied
from kd_common.run.errors import run_command
from kd_common.run.messages import CommandParser, check_device, default_device
from kd_common.sampling import SamplingParams
from kd_common.terminal import printable
from llm_kd.data import Encoder, Message, Row
from llm_kd.evaluation.answers import display_text
from llm_kd.models import shared_vocabulary
from llm_kd.models.generation import generate


class PrintedAnswer(TextStreamer):
    """Prints the answer while it is written, its control characters spelled out."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print what is complete."""
        super().on_finalized_text(printable(text), stream_end)


def parser() -> CommandParser:
    """Command line of this module."""
    parser = CommandParser(prog="python -m llm_kd.generate", description=__doc__, allow_abbrev=False)
    parser.example = '--model runs/smollm2/run_0/student_last --prompt "What is a fox?"'
    parser.add_argument("--model", type=str, required=True, help="Saved student, or any other folder or name.")
    parser.add_argument("--prompt", type=str, required=True, help="What to answer; - reads it from standard input.")
    parser.add_argument("--system", type=str | None, default=None, help="System turn before the prompt.")
    parser.add_class_arguments(SamplingParams)
    parser.set_defaults(max_new_tokens=256)
    parser.add_argument("--seed", type=int, default=0, help="Seed of the drawing.")
    parser.add_argument("--dtype", type=str, default="float32", help="Precision of the weights.")
    parser.add_argument("--attention", type=str, default="sdpa", help="Attention of transformers; Gemma 2 needs eager.")
    parser.add_argument("--device", type=str | None, default=None, help="Device; by default a GPU if there is one.")
    return parser


def main(args: list[str] | None = None) -> str:
    """Print the answer as it is written, and return it without the white space around it.

    An answer without text is described on the standard error.

    Raises:
        ModelNotFoundError: If there is no such model.
        UserError: If the prompt is empty or too long, or a setting is out of its range.
    """
    settings = parser().parse_args(args)
    settings.device = settings.device or default_device()
    check_device(settings.device)
    prompt = (sys.stdin.read() if settings.prompt == "-" else settings.prompt).strip()
    if not prompt:
        raise UserError("the prompt is empty; give --prompt TEXT, or --prompt - and the text on standard input")
    tokenizer = load_tokenizer(settings.model)
    encoder = Encoder(tokenizer, settings.system)
    note_unapplied(settings.model)
    config = load_config(settings.model)
    vocab_size = shared_vocabulary(tokenizer, tokenizer, config, config, roles=("model", "model"))
    model = load_causal_lm(settings.model, settings.dtype, attention=settings.attention).to(settings.device)
    sampling = SamplingParams(**{field.name: settings[field.name] for field in dataclasses.fields(SamplingParams)})
    [tokens] = generate(
        model,
        [encoder.prompt(Row((Message("user", prompt),), "--prompt"))],
        sampling,
        eos_ids=encoder.eos_ids,
        pad_id=tokenizer.pad_token_id,
        seed=settings.seed,
        batch_size=1,
        vocab_size=vocab_size,
        streamer=PrintedAnswer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    text = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
    if not text:
        print(printable(display_text(text, str(tokenizer.decode(tokens)))), file=sys.stderr)
    return text


if __name__ == "__main__":
    run_command(main)
