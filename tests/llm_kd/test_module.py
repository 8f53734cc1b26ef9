"""The training module against plain loops: normalisation, schedules, states, refusals."""

import copy
import math

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F

from kd_common.run.errors import NonFiniteLossError
from kd_common.sampling import SamplingParams
from kd_common.schedules import CosineDecay
from llm_kd.data.batch import collate
from llm_kd.data.example import Example
from llm_kd.data.loader import TextLoader
from llm_kd.models import LoRASpec, StudentSpec, TeacherSpec, load_teacher
from llm_kd.objectives.fkl import ForwardKL
from llm_kd.objectives.rkl import ReverseKL
from llm_kd.objectives.taid import TAID
from llm_kd.selection.adakd import AdaKD
from llm_kd.selection.speck import SpecK
from llm_kd.selection.topk import TopK
from llm_kd.selection.uniform import Uniform
from llm_kd.teacher import OnlineTeacher
from llm_kd.training.distillation import DistillationModule
from llm_kd.training.rollout import AdaptiveReplay, OnPolicy, Rollout

STEPS = 3


def sequences(count=24, seed=3):
    """Sequences of unequal length with unequally many supervised tokens, so that a mean of means would differ."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(count):
        prompt, answer = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((2, 6), (1, 9)))
        tokens = torch.randint(0, 256, (prompt + answer,), generator=generator).tolist()
        examples.append(Example(tokens, [False] * prompt + [True] * answer, prompt))
    return examples


@pytest.fixture
def folder(save_model):
    return save_model()


def module(folder, teacher=None, **settings):
    # float64: Adam divides by the gradient's size, so in float32 rounding alone moves a parameter without gradient.
    student = StudentSpec(layers=2, dtype="float64")
    settings = {"student": student, "objective": ForwardKL(), "selector": Uniform(), **settings}
    spec = TeacherSpec(folder, dtype=settings["student"].dtype)
    made = DistillationModule(spec, learning_rate=1e-2, **settings)
    made.attach_teacher(teacher or OnlineTeacher(load_teacher(spec)))
    return made


def fit(model, batch_size=8, accumulate=1, examples=None, epochs=1, **settings):
    examples = sequences() if examples is None else examples
    loader = TextLoader(examples, batch_size, pad_id=257, shuffle=True, seed=5)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )
    validation = TextLoader(examples[:5], 2, pad_id=257, shuffle=False)
    trainer.fit(model, loader, validation)
    return trainer


def parameters(model):
    return {name: p.detach().clone() for name, p in model.student_with_head.named_parameters()}


def dense_log_probs(backbone, batch):
    logits = backbone.model(batch.input_ids, position_ids=batch.position_ids).logits
    return logits[batch.predict].log_softmax(-1)


def plain_loop(model, steps=STEPS, batch_size=8, clip=None):
    """The same training written out: dense logits, one mean over all tokens of an update, AdamW, cosine."""
    student, teacher = copy.deepcopy(model.student_with_head.student), model.teacher.backbone
    groups = [[p for p in student.parameters() if p.ndim > 1], [p for p in student.parameters() if p.ndim <= 1]]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": model.weight_decay}, {"params": groups[1], "weight_decay": 0.0}],
        lr=model.learning_rate,
        betas=(0.9, 0.95),
    )
    losses = []
    for step, batch in enumerate(TextLoader(sequences(), batch_size, pad_id=257, shuffle=True, seed=5)):
        log_q = (
            student.model(batch.input_ids, position_ids=batch.position_ids)
            .logits[batch.predict][:, :258]
            .log_softmax(-1)
        )
        with torch.no_grad():
            log_p = (
                teacher.model(batch.input_ids, position_ids=batch.position_ids)
                .logits[batch.predict][:, :258]
                .log_softmax(-1)
            )
        loss = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(student.parameters(), clip)
        for group in optimizer.param_groups:
            group["lr"] = model.learning_rate * CosineDecay()(step / steps, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return student, losses


@pytest.mark.parametrize("clip", [None, 0.05])
def test_training_equals_a_plain_loop(folder, clip):
    model = module(folder, weight_decay=0.1)
    expected, losses = plain_loop(model, clip=clip)
    fit(model, gradient_clip_val=clip)
    assert model.history[-1]["train_loss"] > 0
    for (name, found), wanted in zip(
        model.student_with_head.student.named_parameters(), expected.parameters(), strict=True
    ):
        # Updates are of the size 1e-2; the models' norms compute in float32 whatever the weights are.
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert losses[0] != pytest.approx(losses[-1])


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 2), (2, 4), (1, 8)])
@pytest.mark.parametrize("normalize", ["valid", "selected"])
def test_accumulation_does_not_change_the_update(folder, batch_size, accumulate, normalize):
    results = []
    for size, micro in ((8, 1), (batch_size, accumulate)):
        model = module(folder, selector=TopK(k=60, beta=0.1), normalize=normalize, objective=ReverseKL())
        # One order of the rows whatever the batch size: the loader of one process cuts it into batches.
        trainer = fit(model, size, micro, gradient_clip_val=0.5)
        assert trainer.global_step == STEPS
        results.append((parameters(model), model.history[-1]))
    for name, found in results[1][0].items():
        torch.testing.assert_close(found, results[0][0][name], rtol=1e-9, atol=1e-9)
    for name in ("train_loss", "train_tar", "kl", "nll", "tar"):
        assert results[1][1][name] == pytest.approx(results[0][1][name], rel=1e-9), name


def test_a_shorter_last_window_is_normalised_by_its_own_tokens(folder):
    whole, split = module(folder), module(folder)
    fit(whole, 6, 4, sequences()[:18])  # one update over three micro-batches, where four were announced
    fit(split, 18, 1, sequences()[:18])
    assert whole.global_step == split.global_step == 1
    for name, found in parameters(whole).items():
        torch.testing.assert_close(found, parameters(split)[name], rtol=1e-9, atol=1e-9)


def test_validation_means_against_dense_logits(folder):
    model = module(folder, selector=TopK(k=3))
    fit(model)
    batch = collate([[example] for example in sequences()[:5]], 257)
    with torch.no_grad():
        log_q, log_p = (
            backbone.model(batch.input_ids).logits[batch.predict].double().log_softmax(-1)
            for backbone in (model.student_with_head.student, model.teacher.backbone)
        )
    labels = batch.labels[batch.predict][:, None]
    found = model.history[-1]
    assert found["nll"] == pytest.approx(-float(log_q.gather(-1, labels).mean()), rel=1e-5)
    assert found["teacher_nll"] == pytest.approx(-float(log_p.gather(-1, labels).mean()), rel=1e-5)
    assert found["kl"] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-4)
    assert found["agreement"] == pytest.approx(float((log_q.argmax(-1) == log_p.argmax(-1)).double().mean()))
    accepted = (log_p.topk(5).indices == log_q.argmax(-1)[:, None]).any(-1)
    assert found["tar"] == pytest.approx(float(accepted.double().mean()))


def test_taid_advances_once_per_update_and_never_in_validation(folder):
    model = module(folder, objective=TAID())
    calls = []
    on_step = model.student_with_head.head.on_step
    model.student_with_head.head.on_step = lambda *args: (calls.append(args[1:3]), on_step(*args))
    fit(model, 4, 2)
    assert calls == [(1, STEPS), (2, STEPS), (3, STEPS)]
    assert model.student_with_head.head.objective.t == 1.0


@pytest.mark.parametrize("normalize", ["valid", "selected"])
def test_adakd_follows_the_mean_loss_of_the_selected_tokens(folder, normalize):
    model = module(folder, selector=AdaKD(warmup=0.0, ema=0.5), normalize=normalize)
    losses = []
    on_step = model.student_with_head.head.on_step
    model.student_with_head.head.on_step = lambda *args: (losses.append(args[3]), on_step(*args))
    fit(model, 4, 2)
    assert len(losses) == STEPS
    assert model.student_with_head.head.selector.mean_loss == pytest.approx(
        0.25 * losses[0] + 0.25 * losses[1] + 0.5 * losses[2]
    )
    if normalize == "selected":
        assert model.history[-1]["train_loss"] == pytest.approx(sum(losses) / STEPS, rel=0.2)


@pytest.mark.parametrize("masked", ["all", "first update"])
def test_batches_without_a_supervised_token(folder, masked):
    blank = [Example([1, 2, 3], [False] * 3, 1)] * 24
    model = module(folder)
    before = parameters(model)
    fit(model, 8, examples=blank if masked == "all" else blank[:8] + sequences()[8:])
    moved = any(not torch.equal(before[name], found) for name, found in parameters(model).items())
    assert moved == (masked != "all")
    assert all(found.isfinite().all() for found in parameters(model).values())


def test_a_loss_that_is_no_number_stops_before_the_update(folder):
    model = module(folder)
    model.teacher.backbone.model.model.norm.weight.data[0] = float("nan")
    before = parameters(model)
    with pytest.raises(NonFiniteLossError, match=r"loss of update 1 is nan"):
        fit(model)
    for name, found in parameters(model).items():
        assert torch.equal(found, before[name])


def test_on_policy_trains_on_what_the_student_wrote(folder):
    written = []
    model = module(folder, rollout=OnPolicy(sampling=SamplingParams(max_new_tokens=5)), objective=ReverseKL())
    respond = model._respond
    model._respond = lambda batch, index: written.append((batch, respond(batch, index))) or written[-1][1]
    fit(model)
    assert len(written) == STEPS
    for given, own in written:
        assert len(own.prompts) == len(given.prompts)
        assert own.prompts == given.prompts
        assert not set(own.keys) & set(given.keys)
        assert 0 < int(own.predict.sum()) <= 5 * len(own.prompts)


def test_on_policy_draws_do_not_depend_on_the_global_state(folder):
    states = []
    for noise in (0, 1):
        model = module(folder, rollout=OnPolicy(0.5, SamplingParams(max_new_tokens=4)), selector=SpecK())
        torch.manual_seed(noise)
        fit(model)
        states.append(parameters(model))
    for name, found in states[1].items():
        assert torch.equal(found, states[0][name])


def test_replay_keeps_and_reuses_responses(folder):
    rollout = AdaptiveReplay(capacity=16, step=1.0, tolerance=-math.inf, sampling=SamplingParams(max_new_tokens=4))
    model = module(folder, rollout=rollout)
    fit(model, epochs=4)
    assert rollout.threshold == 1.0
    assert len(rollout.memory) == 16


class Recorder(Rollout):
    """Asks for the student's answers and for replayed ones in turn, and notes what it is given."""

    sampling = SamplingParams(max_new_tokens=3)

    def __init__(self):
        self.seeds, self.draws, self.progress, self.replays, self.followed = [], [], [], [], []

    def choose(self, draw, progress):
        self.seeds.append(torch.initial_seed())
        self.draws.append(draw)
        self.progress.append(progress)
        return "generate" if len(self.draws) % 2 else "replay"

    def keep(self, examples):
        self.written = examples

    def replay(self, count, rng):
        self.replays.append(rng.random())
        return self.written

    def on_validation(self, loss):
        self.followed.append(loss)


def recorded(folder, seed=0):
    """A run of 2 epochs of 6 batches, an update for every batch."""
    model = module(folder, rollout=Recorder(), seed=seed)
    sampled = []
    generate = model.student_with_head.generate
    model.student_with_head.generate = lambda *args, **settings: (
        sampled.append(settings["seed"]) or generate(*args, **settings)
    )
    fit(model, batch_size=4, epochs=2)
    return model, sampled


def test_every_batch_of_every_epoch_draws_anew(folder):
    model, sampled = recorded(folder)
    rollout = model.rollout
    drawn = {"model": rollout.seeds, "rollout": rollout.draws, "replay": rollout.replays, "sampling": sampled}
    for name, values in drawn.items():
        assert len(values) == len(set(values)) == (12 if name in ("model", "rollout") else 6), name
    assert all(0 <= draw < 1 for draw in rollout.draws)
    other, other_sampled = recorded(folder, seed=1)
    assert not set(rollout.draws) & set(other.rollout.draws)
    assert not set(sampled) & set(other_sampled)


def test_the_rollout_is_told_how_far_training_is_and_the_kl(folder):
    model, _ = recorded(folder)
    assert model.rollout.progress == pytest.approx([step / 12 for step in range(12)])
    assert model.rollout.followed == [epoch["kl"] for epoch in model.history]
    assert all(epoch["kl"] != pytest.approx(epoch["nll"], rel=0.01) for epoch in model.history)


@pytest.mark.parametrize("normalize", ["valid", "selected"])
def test_what_follows_an_update_is_its_own_mean(folder, normalize):
    """Loss, acceptance and the selected tokens' loss against sums of the heads' outputs."""
    model = module(folder, selector=TopK(k=20, beta=0.1), normalize=normalize, objective=ReverseKL())
    outputs, told, shown = [], [], []
    model.student_with_head.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    on_step = model.student_with_head.head.on_step
    model.student_with_head.head.on_step = lambda *args: (told.append(args), on_step(*args))
    log_dict = model.log_dict
    model.log_dict = lambda values, **more: (shown.append(values), log_dict(values, **more))
    fit(model, 4, 2, epochs=2)
    outputs = [output for output in outputs if output.loss_sum.requires_grad]

    def means(outputs):
        loss, accepted, weights = (
            sum(value(output).item() for output in outputs)
            for value in (lambda o: o.loss_sum, lambda o: o.accepted_sum, lambda o: o.weights.sum())
        )
        tokens = sum(output.num_tokens for output in outputs)
        return loss / (tokens if normalize == "valid" else weights), accepted / tokens, loss / weights

    updates = [means(outputs[start : start + 2]) for start in range(0, 12, 2)]
    tars = [values["tar"] for values in shown if "tar" in values]
    for (loss, tar, selected), (told_loss, _, _, told_selected), rate in zip(updates, told, tars, strict=True):
        assert (told_loss, told_selected, rate) == pytest.approx((loss, selected, tar))
        assert normalize == "selected" or tar == 1 or selected > 1.01 * loss
    assert min(tars) < 0.9
    for epoch, of_epoch in zip(model.history, (outputs[:6], outputs[6:]), strict=True):
        loss, tar, _ = means(of_epoch)
        assert (epoch["train_loss"], epoch["train_tar"]) == pytest.approx((loss, tar))


def test_an_end_that_only_the_template_knows_is_an_end(save_model, tokenizer):
    """ChatML closes a turn with another token than the tokenizer's and the configuration's end of text."""
    folder = save_model(vocab=259, eos_token_id=258)
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"eos_token": "<|endoftext|>"})
    other.save_pretrained(folder)
    model = module(folder, rollout=OnPolicy(sampling=SamplingParams(max_new_tokens=5)))
    assert model.eos_ids == [257, 258]
    assert model.student_with_head.student.causal_lm.generation_config.eos_token_id == [257, 258]
    backbone = model.student_with_head.student.causal_lm
    with torch.no_grad():
        backbone.model.norm.weight.fill_(1.0)
        backbone.lm_head.weight.zero_()
        backbone.model.embed_tokens.weight.fill_(1.0)
        for layer in backbone.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        backbone.lm_head.weight[257] = 50.0
    backbone.generation_config.eos_token_id = None
    assert [example.input_ids for example in model._write([[65, 66]], seed=0)] == [[65, 66, 257]]


def test_adapters_move_and_the_base_does_not(folder):
    model = module(folder, student=StudentSpec(lora=LoRASpec(rank=2), dtype="float64"))
    before = parameters(model)
    fit(model)
    for name, found in parameters(model).items():
        assert torch.equal(found, before[name]) == ("lora_" not in name), name


def test_gradient_checkpointing_changes_nothing(folder):
    states = []
    for checkpointing in (False, True):
        model = module(folder, gradient_checkpointing=checkpointing)
        layers = [
            layer for layer in model.student_with_head.student.layers if getattr(layer, "gradient_checkpointing", False)
        ]
        assert len(layers) == (2 if checkpointing else 0)
        fit(model)
        states.append(parameters(model))
    for name, found in states[1].items():
        torch.testing.assert_close(found, states[0][name])


def test_bf16_trains(folder):
    model = module(folder, student=StudentSpec(layers=2))
    fit(model, precision="bf16-mixed", epochs=3)
    losses = [epoch["kl"] for epoch in model.history]
    assert losses[-1] < losses[0]
    assert next(model.student_with_head.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"learning_rate": 0.0}, "model.learning_rate must be > 0"),
        ({"weight_decay": -1.0}, "model.weight_decay must be >= 0"),
        ({"loss_temperature": 0.0}, "loss_temperature must be > 0"),
        ({"student": StudentSpec(layers=9)}, r"student.layers must lie in \[1, 3\]"),
    ],
)
def test_settings_out_of_range(folder, settings, match):
    settings = {"student": StudentSpec(), "learning_rate": 1e-2, **settings}
    with pytest.raises(ValueError, match=match):
        DistillationModule(TeacherSpec(folder), **settings)


def test_a_stored_teacher_cannot_follow_the_student(folder):
    with pytest.raises(ValueError, match=r"model\.rollout OnPolicy writes new ones"):
        DistillationModule(TeacherSpec(folder, cache="anywhere"), StudentSpec(), rollout=OnPolicy())


def test_without_a_teacher(folder):
    model = DistillationModule(TeacherSpec(folder), StudentSpec())
    with pytest.raises(ValueError, match="no teacher is attached"):
        fit(model)


def test_states_are_restored_without_the_state_dict(folder):
    """Lightning restores tensors alone under FSDP2."""
    model = module(folder, objective=TAID(), selector=SpecK(), rollout=AdaptiveReplay())
    fit(model)
    checkpoint = {}
    model.on_save_checkpoint(checkpoint)
    other = module(folder, objective=TAID(), selector=SpecK(), rollout=AdaptiveReplay())
    other.on_load_checkpoint(checkpoint)
    assert other.student_with_head.head.objective.t == model.student_with_head.head.objective.t == 1.0
    assert other.student_with_head.head.selector.batches == STEPS
    assert other.history == model.history


def test_the_runs_seed_is_spec_ks(folder):
    assert module(folder, selector=SpecK(), seed=7).student_with_head.head.selector.seed == 7
    assert module(folder, selector=SpecK(seed=3), seed=7).student_with_head.head.selector.seed == 3


@pytest.mark.parametrize("spec", [TeacherSpec, StudentSpec])
def test_flash_attention_is_refused(spec):
    with pytest.raises(ValueError, match=r"attention flash_attention_2: rows come without an attention mask"):
        spec(attention="flash_attention_2")
