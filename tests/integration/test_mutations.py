"""Seeded mistakes in the core formulas: for every one of them the named test must fail.

A package's source is copied, one piece of its text is replaced, and pytest runs the named test on the copy. A mutation
that survives means that a formula is not tested; one whose text is no longer found wants to be written anew.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
FOLDERS = {"kd_common": "common", "vision_kd": "vision_kd", "llm_kd": "llm_kd", "spec_decode": "spec_decode"}

# A process that has imported what takes long, but none of the packages; pytest runs in a fork of it for every copy,
# in a second or two instead of ten.
FORKS = """
import json, os, sys
import _hypothesis_pytestplugin, hypothesis.strategies, lightning.pytorch, pytest, torch, transformers, xdist

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.path.insert(0, job["folder"])
        try:
            code = int(pytest.main(job["args"]))
        except BaseException as error:
            print(repr(error))
            code = 98
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

# Loaded by that pytest: an installed package that won over the copy would make the check void.
GUARD = """
import sys
from pathlib import Path

def pytest_sessionfinish(session):
    for name in MODULES:
        module = sys.modules.get(name)
        if module is None or not Path(module.__file__).is_relative_to(Path(__file__).parent):
            print(f"{name} was not imported from the copy: {module}")
            session.exitstatus = 99
"""


class Mutation(NamedTuple):
    """A mistake: in the file of a package, ``old`` becomes ``new``, and the test must fail."""

    name: str
    file: str
    old: str
    new: str
    test: str

    @property
    def module(self):
        return self.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MUTATIONS = [
    # --- kd_common ---
    Mutation(
        "forward and reverse KL swapped",
        "kd_common/functional/divergences.py",
        "return kl_from_log_probs(log_p, log_q)",
        "return kl_from_log_probs(log_q, log_p)",
        "common/test_divergences.py::test_kl_matches_torch",
    ),
    Mutation(
        "temperature missing in the teacher",
        "kd_common/functional/logits.py",
        "scaled(teacher_logits, temperature)",
        "scaled(teacher_logits, 1.0)",
        "common/test_decoupled.py::test_matches_brute_force",
    ),
    Mutation(
        "one class fewer in the top-k mask",
        "kd_common/functional/logits.py",
        "tied.cumsum(dim=-1) <= places_left",
        "tied.cumsum(dim=-1) < places_left",
        "common/test_decoupled.py::test_topk_mask_on_batches_of_any_shape",
    ),
    Mutation(
        "the target takes a place in the top-k mask",
        "kd_common/functional/decoupled.py",
        "topk_mask(teacher_logits.masked_fill(is_target, -math.inf), k, eligible=~is_target)",
        "topk_mask(teacher_logits, k) & ~is_target",
        "common/test_decoupled.py::test_topk_mask_on_batches_of_any_shape",
    ),
    Mutation(
        "the target survives in NCKD under a mask",
        "kd_common/functional/decoupled.py",
        "removed = is_target | ~class_mask",
        "removed = ~class_mask",
        "common/test_decoupled.py::test_target_in_the_mask_does_not_count_and_tckd_is_never_masked",
    ),
    Mutation(
        "the hard phase counted from the start of training",
        "kd_common/schedules.py",
        "(progress - transition_end) / (full - transition_end)",
        "progress / full",
        "common/test_schedules.py::test_topk_schedule_phases",
    ),
    Mutation(
        "GSNR without the correction of the variance",
        "kd_common/gsnr.py",
        "1 - 1 / moments.count",
        "1.0",
        "common/test_gsnr.py::test_all_samples",
    ),
    Mutation(
        "DeepKD's momenta swapped",
        "kd_common/optim/deepkd.py",
        """"target": base_momentum - deltas["target"],
        "nontarget": base_momentum + deltas["nontarget"],""",
        """"target": base_momentum + deltas["target"],
        "nontarget": base_momentum - deltas["nontarget"],""",
        "common/test_deepkd_presets.py::test_momenta",
    ),
    Mutation(
        "the weight decay reads the parameters at the other end of the step",
        "kd_common/optim/sgd.py",
        '(b == decay_bucket) == settings["decay_last"]',
        '(b == decay_bucket) != settings["decay_last"]',
        "common/test_optim_sgd.py::test_straight_line_recursion",
    ),
    Mutation(
        "AdamW without bias correction of the first moment",
        "kd_common/optim/adamw.py",
        "-lr / (1 - beta1**step)",
        "-lr + 0 * step",
        "common/test_optim_adamw.py::test_straight_line_recursion_with_own_bias_corrections",
    ),
    Mutation(
        "component gradients summed over the batch",
        "kd_common/grads.py",
        "torch.autograd.grad(value.mean(), outputs",
        "torch.autograd.grad(value.sum(), outputs",
        "common/test_grads.py::test_components_match_separate_backward_passes",
    ),
    Mutation(
        "clipping by the components' own factor",
        "kd_common/grads.py",
        "norm = _norm(sum_gradients(list(components.values())))",
        "norm = _norm([g for gradients in components.values() for g in gradients])",
        "common/test_grads.py::test_clipping_equals_clipping_the_sum",
    ),
    # --- vision_kd ---
    Mutation(
        "T^2 missing",
        "vision_kd/methods/base.py",
        "return temperature**2 * tckd, temperature**2 * nckd",
        "return tckd, nckd",
        "vision_kd/test_methods.py::test_kd_components_add_up_to_the_classical_loss_of_every_sample",
    ),
    Mutation(
        "KD without the factor 1 - p_target",
        "vision_kd/methods/base.py",
        "return tckd, others.sum(-1) * nckd",
        "return tckd, nckd",
        "vision_kd/test_methods.py::test_kd_components_add_up_to_the_classical_loss_of_every_sample",
    ),
    Mutation(
        "alpha and beta of DKD swapped",
        "vision_kd/methods/dkd.py",
        """"target": ramp * self.alpha * tckd,
            "nontarget": ramp * self.beta * nckd,""",
        """"target": ramp * self.beta * tckd,
            "nontarget": ramp * self.alpha * nckd,""",
        "vision_kd/test_methods.py::test_components_are_those_of_the_reference",
    ),
    Mutation(
        "MLKD distils what the teacher is sure of",
        "vision_kd/methods/mlkd.py",
        "(values <= values.quantile(0.5))",
        "(values >= values.quantile(0.5))",
        "vision_kd/test_methods.py::test_components_are_those_of_the_reference",
    ),
    Mutation(
        "CRLD's thresholds swapped",
        "vision_kd/methods/crld.py",
        'self.cross_weight * confident(teacher["strong"], self.strong_threshold)',
        'self.cross_weight * confident(teacher["strong"], self.weak_threshold)',
        "vision_kd/test_methods.py::test_components_are_those_of_the_reference",
    ),
    Mutation(
        "DOT's task momentum on the wrong side",
        "vision_kd/policies/dot.py",
        '"task": momentum - self.delta, WEIGHT_DECAY',
        '"task": momentum + self.delta, WEIGHT_DECAY',
        "vision_kd/test_policies.py::test_two_steps_of_dot_by_hand",
    ),
    Mutation(
        "classes of the detection teacher in its own order",
        "vision_kd/detection/step.py",
        "logits[:, list(class_indices)]",
        "logits[:, : len(class_indices)]",
        "vision_kd/detection/test_detection_step.py::test_outputs_of_unused_categories_take_no_part",
    ),
    Mutation(
        "ReviewKD's pooled levels weigh alike",
        "vision_kd/detection/review.py",
        "weight /= 2",
        "weight /= 1",
        "vision_kd/detection/test_detection_review.py::test_pyramid_distance_against_a_loop",
    ),
    Mutation(
        "a cutout in black",
        "vision_kd/data/augment.py",
        "CUTOUT_GREY = 127",
        "CUTOUT_GREY = 0",
        "vision_kd/test_augment.py::test_cutout_covers_the_square_around_a_uniform_centre",
    ),
    Mutation(
        "images lie as they are stored",
        "vision_kd/data/image_files.py",
        "upright = _turn(image)",
        "upright = None",
        "vision_kd/test_image_files.py::test_an_image_stands_upright_by_its_exif_orientation",
    ),
    Mutation(
        "16 bits cut off at 255",
        "vision_kd/data/image_files.py",
        "rgb = _eight_bits(image)",
        "rgb = image",
        "vision_kd/test_image_files.py::test_greys_of_16_bits_keep_their_upper_8",
    ),
    Mutation(
        "transparent parts in their hidden colour",
        "vision_kd/data/image_files.py",
        "if rgb.has_transparency_data:",
        "if False:",
        "vision_kd/test_image_files.py::test_transparent_parts_are_shown_on_white",
    ),
    Mutation(
        "regression targets doubled",
        "vision_kd/detection/detector.py",
        "fastrcnn_loss(class_logits.detach(), deltas, labels, regression)",
        "fastrcnn_loss(class_logits.detach(), deltas, labels, [2 * target for target in regression])",
        "vision_kd/detection/test_detection_step.py::test_box_losses_are_those_of_torchvision",
    ),
    Mutation(
        "the samples of the ROI head drawn as those of the RPN",
        "vision_kd/detection/detector.py",
        'heads.fg_bg_sampler.seeds = [target["seed"] + 1 for target in targets]',
        'heads.fg_bg_sampler.seeds = [target["seed"] for target in targets]',
        "vision_kd/detection/test_detection_step.py::test_box_losses_are_those_of_torchvision",
    ),
    Mutation(
        "detections of the ranks unsorted",
        "vision_kd/detection/evaluation.py",
        "rows[rows[:, 0].argsort(stable=True)], sorted(seen)",
        "rows, sorted(seen)",
        "vision_kd/detection/test_detection_entries.py::"
        "test_detections_of_the_ranks_come_once_and_in_the_order_of_the_images",
    ),
    Mutation(
        "detections of the ranks gathered twice",
        "vision_kd/detection/evaluation.py",
        "*self._rows]).to(device)).cpu()",
        "*self._rows]).to(device)).cpu()\n        rows = gather_rows(rows)",
        "vision_kd/detection/test_detection_entries.py::"
        "test_detections_of_the_ranks_come_once_and_in_the_order_of_the_images",
    ),
    Mutation(
        "ids of images in float32",
        "vision_kd/detection/evaluation.py",
        'target["image_id"], dtype=torch.float64)',
        'target["image_id"], dtype=torch.float32)',
        "vision_kd/detection/test_detection_entries.py::test_any_whole_ids_score_as_pycocotools_scores_them",
    ),
    Mutation(
        "ids of categories in float32",
        "vision_kd/detection/evaluation.py",
        "for name in class_names)], dtype=torch.float64)",
        "for name in class_names)], dtype=torch.float32)",
        "vision_kd/detection/test_detection_entries.py::test_any_whole_ids_score_as_pycocotools_scores_them",
    ),
    Mutation(
        "the category of id 0 taken for none",
        "vision_kd/detection/evaluation.py",
        "rows[self._known[labels]]",
        "rows[rows[:, -1] > 0]",
        "vision_kd/detection/test_detection_entries.py::test_any_whole_ids_score_as_pycocotools_scores_them",
    ),
    Mutation(
        "every rank with the seeds of the first",
        "vision_kd/data/loader.py",
        "seeds[:, self.rank :: self.num_replicas]",
        "seeds[:, :: self.num_replicas]",
        "vision_kd/detection/test_detection_data.py::test_ranks_share_the_batches_of_one_process",
    ),
    # --- runs: places in an epoch, settings of the trainer, processes ---
    Mutation(
        "full rate at step 0 of a warm-up",
        "kd_common/run/training.py",
        "return self.lr_schedule(0.0, float(max(1, self.trainer.max_epochs or 1)))",
        "return 1.0",
        "common/test_training.py::test_the_first_update_follows_the_schedule_too",
    ),
    *(
        Mutation(
            f"{what} left out of the seed of a step",
            "kd_common/run/training.py",
            "step_seed(self.seed, self.current_epoch, batch_idx, self.global_rank)",
            f"step_seed({left})",
            "common/test_training.py::test_draws_of_a_step_depend_on_seed_epoch_batch_and_rank",
        )
        for what, left in {
            "epoch": "self.seed, batch_idx, self.global_rank",
            "batch": "self.seed, self.current_epoch, self.global_rank",
            "rank": "self.seed, self.current_epoch, batch_idx",
        }.items()
    ),
    Mutation(
        "validation that was due forgotten on resuming",
        "kd_common/run/training.py",
        "unfinished = inside and pending",
        "unfinished = False",
        "common/test_training.py::test_resumed_from_any_hook_equals_undisturbed[validation inside-False]",
    ),
    Mutation(
        "unfinished gradients left out of a checkpoint",
        "kd_common/run/training.py",
        "if self.automatic_optimization and self._in_window():",
        "if False:",
        "common/test_training.py::test_resumed_from_any_hook_equals_undisturbed[accumulated-False]",
    ),
    Mutation(
        "the last student not validated",
        "kd_common/run/training.py",
        "and not module.validated:",
        "and False:",
        "common/test_training.py::test_resumed_from_any_hook_equals_undisturbed[every second epoch-False]",
    ),
    Mutation(
        "a non-finite loss looked for at logging steps only",
        "vision_kd/training/component_training.py",
        "not self.is_logging_step() and not self.trainer.is_last_batch:",
        "not self.is_logging_step():",
        "vision_kd/test_module.py::test_a_non_finite_loss_between_logging_steps_is_noticed_at_the_end_of_the_epoch",
    ),
    Mutation(
        "average without buffers",
        "vision_kd/training/component_training.py",
        "use_buffers=True",
        "use_buffers=False",
        "vision_kd/test_module.py::test_the_average_takes_the_statistics_along",
    ),
    *(
        Mutation(name, "vision_kd/training/component_training.py", old, new, f"vision_kd/test_module.py::{test}")
        for name, old, new in (
            ("gradients of the ranks apart", "gradients = all_reduce_mean(gradients)", "pass"),
            ("BatchNorm of the ranks apart", "average_batchnorm_buffers(self.student)", "pass"),
            ("metrics of one rank", "prog_bar=name == self.metric, sync_dist=True", "sync_dist=False"),
        )
        for test in ["test_ranks_share_gradients_statistics_and_what_they_log"]
    ),
    # --- llm_kd ---
    Mutation(
        "the tail of a stored teacher compared with all of the student",
        "llm_kd/head/rows.py",
        "log_rest = rest.logsumexp(dim=-1, keepdim=True)",
        "log_rest = z.logsumexp(dim=-1, keepdim=True)",
        "llm_kd/test_head_truncated.py::test_tail_is_one_category",
    ),
    Mutation(
        "the tail's gradient not shared among its tokens",
        "llm_kd/head/rows.py",
        "rest.sub_(log_rest).exp_().mul_(tail)",
        "rest.sub_(log_rest).exp_().sign_().mul_(tail)",
        "llm_kd/test_head_truncated.py::test_tail_is_one_category",
    ),
    Mutation(
        "labels not shifted",
        "llm_kd/data/batch.py",
        "labels=input_ids.roll(-1, dims=1).where",
        "labels=input_ids.where",
        "llm_kd/data/test_batch.py::test_every_field_of_a_packed_batch",
    ),
    Mutation(
        "hidden states one position late",
        "llm_kd/data/batch.py",
        "predict = torch.nn.functional.pad(supervised[:, 1:], (0, 1))",
        "predict = supervised",
        "llm_kd/data/test_batch.py::test_every_field_of_a_packed_batch",
    ),
    Mutation(
        "beta of the token weights forgotten",
        "llm_kd/selection/acceptance.py",
        "return beta + (1 - beta) * accepted",
        "return accepted",
        "llm_kd/test_selection.py::test_weights",
    ),
    Mutation(
        "TV in place of TV^k",
        "llm_kd/selection/acceptance.py",
        "k * torch.log1p(-overlap)",
        "torch.log1p(-overlap)",
        "llm_kd/test_selection.py::test_speck_probability_is_one_minus_tv_to_the_k",
    ),
    Mutation(
        "top-k accepts rank k + 1",
        "llm_kd/selection/acceptance.py",
        "return preceding < k",
        "return preceding <= k",
        "llm_kd/test_selection.py::test_topk_is_the_stable_rank_of_the_proposal",
    ),
    Mutation(
        "normalised by the selected tokens in place of the valid ones",
        "llm_kd/head/kd_head.py",
        'weights.sum() if self.normalize == "selected" else torch.full_like(loss_sum, len(weights))',
        "weights.sum()",
        "llm_kd/test_head.py::test_normalisation_scale_and_beta",
    ),
    Mutation(
        "T in place of T^2 in the head",
        "llm_kd/head/kd_head.py",
        "weights[chunk] * tau**2",
        "weights[chunk] * tau",
        "llm_kd/test_head.py::test_normalisation_scale_and_beta",
    ),
    Mutation(
        "AdaKD softens hard tokens",
        "llm_kd/selection/adakd.py",
        "torch.exp(-self.c * torch.tanh",
        "torch.exp(self.c * torch.tanh",
        "llm_kd/test_selectors.py::test_adakd_keeps_the_hardest_tokens_with_their_temperature",
    ),
    Mutation(
        "the update normalised by one micro-batch",
        "kd_common/run/token_updates.py",
        "factor = self.accumulated * world_size()",
        "factor = world_size()",
        "llm_kd/test_module.py::test_accumulation_does_not_change_the_update",
    ),
    Mutation(
        "the epoch left out of a step's seed",
        "llm_kd/training/distillation.py",
        "(self.seed, self.current_epoch, *parts)",
        "(self.seed, *parts)",
        "llm_kd/test_module.py::test_every_batch_of_every_epoch_draws_anew",
    ),
    Mutation(
        "the run's seed left out of a step's",
        "llm_kd/training/distillation.py",
        "(self.seed, self.current_epoch, *parts)",
        "(self.current_epoch, *parts)",
        "llm_kd/test_module.py::test_every_batch_of_every_epoch_draws_anew",
    ),
    Mutation(
        "the batch left out of a step's seed",
        "llm_kd/training/distillation.py",
        'self._seed("model", batch_idx, self.global_rank)',
        'self._seed("model", self.global_rank)',
        "llm_kd/test_module.py::test_every_batch_of_every_epoch_draws_anew",
    ),
    Mutation(
        "the batch left out of the seed of answers",
        "llm_kd/training/distillation.py",
        'self._seed("sampling", batch_idx, self.global_rank)',
        'self._seed("sampling", self.global_rank)',
        "llm_kd/test_module.py::test_every_batch_of_every_epoch_draws_anew",
    ),
    Mutation(
        "the batch left out of the seed of replays",
        "llm_kd/training/distillation.py",
        'self._seed("replay", batch_idx, self.global_rank)',
        'self._seed("replay", self.global_rank)',
        "llm_kd/test_module.py::test_every_batch_of_every_epoch_draws_anew",
    ),
    Mutation(
        "one draw of the rollout for the whole run",
        "llm_kd/training/distillation.py",
        'random.Random(self._seed("rollout", batch_idx))',
        "random.Random(self.seed)",
        "llm_kd/test_module.py::test_every_batch_of_every_epoch_draws_anew",
    ),
    Mutation(
        "training never progresses for the rollout",
        "llm_kd/training/distillation.py",
        "progress = self.global_step / self.total_steps",
        "progress = 0.0",
        "llm_kd/test_module.py::test_the_rollout_is_told_how_far_training_is_and_the_kl",
    ),
    Mutation(
        "the rollout follows the likelihood",
        "llm_kd/training/distillation.py",
        'self.rollout.on_validation(values["kl"])',
        'self.rollout.on_validation(values["nll"])',
        "llm_kd/test_module.py::test_the_rollout_is_told_how_far_training_is_and_the_kl",
    ),
    Mutation(
        "the selector follows the mean over all tokens",
        "llm_kd/training/distillation.py",
        'selected = sums["loss"] / (sums["weights"] or 1.0)',
        "selected = loss",
        "llm_kd/test_module.py::test_what_follows_an_update_is_its_own_mean",
    ),
    Mutation(
        "acceptance divided by the weights",
        "llm_kd/training/distillation.py",
        'sums["accepted"] / (sums["tokens"] or 1.0)',
        'sums["accepted"] / (sums["denominator"] or 1.0)',
        "llm_kd/test_module.py::test_what_follows_an_update_is_its_own_mean",
    ),
    Mutation(
        "sums since the last validation go on",
        "kd_common/run/token_updates.py",
        "trained, self._since_validation = self._since_validation, dict.fromkeys(self.sums, 0.0)",
        "trained = self._since_validation",
        "llm_kd/test_module.py::test_what_follows_an_update_is_its_own_mean",
    ),
    Mutation(
        "answers do not end where the template ends them",
        "llm_kd/training/distillation.py",
        "response_ends(self.student_with_head.student.causal_lm, self._teachers_ends)",
        "response_ends(self.student_with_head.student.causal_lm, [])",
        "llm_kd/test_module.py::test_an_end_that_only_the_template_knows_is_an_end",
    ),
    Mutation(
        "a resumed cache forgets what it holds",
        "llm_kd/teacher/writer.py",
        "self._stored = set(existing.keys())",
        "self._stored = set()",
        "llm_kd/test_teacher_cache.py::test_a_new_writer_knows_what_is_stored",
    ),
    Mutation(
        "lists of layers keep their first entries",
        "llm_kd/models/prune.py",
        "return [value[i] for i in kept] if",
        "return list(value[: len(kept)]) if",
        "llm_kd/test_architectures.py::test_lists_of_layers",
    ),
    Mutation(
        "ends of generation_config.json are not asked for",
        "llm_kd/models/generation.py",
        "model.config.get_text_config(), model.generation_config)",
        "model.config.get_text_config())",
        "llm_kd/test_generation.py::test_ends_of_the_models_own_settings_are_those_of_transformers",
    ),
    # --- spec_decode ---
    Mutation(
        "a token accepted below another parent",
        "spec_decode/decoding/verify.py",
        "(tree.parents[rows] == node[rows].unsqueeze(1)) & (tree.tokens[rows] == drawn.unsqueeze(1))",
        "(tree.parents[rows] >= 0) & (tree.tokens[rows] == drawn.unsqueeze(1))",
        "spec_decode/test_verify_exact.py::test_path_acceptance_and_tested_levels",
    ),
    Mutation(
        "the next token read at the parent",
        "spec_decode/decoding/verify.py",
        "sampling.draw(logits[rows, nodes], seeds",
        "sampling.draw(logits[rows, tree.parents[rows, nodes].clamp(min=0)], seeds",
        "spec_decode/test_verify_exact.py::test_path_acceptance_and_tested_levels",
    ),
    Mutation(
        "the residual distribution not renormalised",
        "spec_decode/decoding/verify.py",
        "left / mass, p)",
        "left, p)",
        "spec_decode/test_verify_exact.py::test_package_rejection_has_the_target_distribution",
    ),
    Mutation(
        "rejected candidates stay in the draft distribution",
        "spec_decode/decoding/verify.py",
        "rest = q.scatter(1, x, 0.0)",
        "rest = q",
        "spec_decode/test_verify_exact.py::test_package_rejection_has_the_target_distribution",
    ),
    Mutation(
        "the noise of the position before",
        "spec_decode/decoding/verify.py",
        "sampling.draw(logits[rows, nodes], seeds[rows], root_positions[rows] + depth + 1)",
        "sampling.draw(logits[rows, nodes], seeds[rows], root_positions[rows] + depth)",
        "spec_decode/test_verify_exact.py::test_matching_reproduces_plain_decoding_token_for_token",
    ),
    Mutation(
        "candidates drawn with the target's noise",
        "spec_decode/decoding/proposals.py",
        "root_positions, ids, Stream.DRAFT)",
        "root_positions, ids, Stream.TARGET)",
        "spec_decode/test_verify_exact.py::test_rejection_of_one_level_end_to_end",
    ),
    Mutation(
        "drafters supervised one token too early",
        "spec_decode/training/losses.py",
        "answer[:, 2 + level :].nonzero(as_tuple=True)\n    at = position + 2 + level",
        "answer[:, 1 + level :].nonzero(as_tuple=True)\n    at = position + 1 + level",
        "spec_decode/test_losses.py::test_level_batch_supervises_answers_within_the_sequence",
    ),
    Mutation(
        "the gradient of the rejected mass without its normaliser",
        "spec_decode/training/losses.py",
        "q * short.sum(-1, keepdim=True) - short",
        "-short",
        "spec_decode/test_losses.py::test_rejected_mass_in_float64",
    ),
    Mutation(
        "a batch's guard told the tokens of all rows",
        "spec_decode/decoding/state.py",
        "float(self.counts.sum() / (self.counts > 0).sum())",
        "float(self.counts.sum())",
        "spec_decode/test_autotune.py::test_the_guard_of_a_batch_counts_tokens_per_unfinished_row",
    ),
    Mutation(
        "a guard that drafts on when nothing is saved",
        "spec_decode/decoding/speed_monitor.py",
        "self._drafting = self._saved > 0",
        "self._drafting = True",
        "spec_decode/test_autotune.py",
    ),
    Mutation(
        "positions missed in a pause left among the padding",
        "spec_decode/decoding/state.py",
        "(tokens >= 0).long().argsort(dim=1, descending=True, stable=True)",
        "(tokens >= 0).long().argsort(dim=1, descending=False, stable=True)",
        "spec_decode/test_autotune.py::test_a_draft_after_a_pause_has_read_what_it_missed",
    ),
    Mutation(
        "the target's distribution read one position late",
        "spec_decode/training/drafter_module.py",
        "before = wanted.reached[known] - 1",
        "before = wanted.reached[known]",
        "spec_decode/test_losses.py::test_every_level_is_compared_with_the_targets_distribution_of_the_token_it_predicts",
    ),
    Mutation(
        "the levels' weights reversed",
        "spec_decode/training/drafter_module.py",
        "level_weights(len(losses), self.level_decay)",
        "level_weights(len(losses), self.level_decay)[::-1]",
        "spec_decode/test_losses.py::test_an_update_weighs_the_levels_and_is_divided_by_the_tokens_of_the_first",
    ),
    Mutation(
        "teacher forcing with the token before",
        "spec_decode/drafters/fast_eagle.py",
        "self._cascade(states.features[:, :-1], tokens[:, 1:]",
        "self._cascade(states.features[:, :-1], tokens[:, :-1]",
        "spec_decode/test_drafters.py::test_drafts_are_the_best_tokens_of_the_teacher_forced_pass",
    ),
    Mutation(
        "positions of tree nodes one too large",
        "spec_decode/models/cache.py",
        "return cls(cache, seen.sum(-1) - 1, seen",
        "return cls(cache, seen.sum(-1), seen",
        "spec_decode/test_models.py::test_tree_step_equals_each_path_on_its_own",
    ),
    Mutation(
        "a committed node one slot too far",
        "spec_decode/models/cache.py",
        "start + path[rows, levels], start + levels",
        "start + path[rows, levels], start + levels + 1",
        "spec_decode/test_models.py::test_cache_after_commit_equals_a_fresh_prefill",
    ),
    Mutation(
        "nodes see their siblings",
        "spec_decode/decoding/tree.py",
        "links = (links @ links).clamp(max=1.0)",
        "links = (links @ links + links @ links.mT).clamp(max=1.0)",
        "spec_decode/test_tree.py::test_mask_depths_paths_and_positions_match_climbing",
    ),
    Mutation(
        "leaves lead on in the cost model",
        "spec_decode/decoding/cost.py",
        "reached *= row[0]",
        "reached *= sum(row[:width])",
        "spec_decode/test_cost.py::test_expected_tokens_equal_enumeration_of_outcomes",
    ),
    Mutation(
        "a plain pass right behind a draft is timed",
        "spec_decode/decoding/speed_monitor.py",
        """        self._warm = False
        cost =""",
        "        cost =",
        "spec_decode/test_autotune.py::test_a_slow_plain_pass_behind_a_draft_does_not_make_drafting_look_cheap",
    ),
    Mutation(
        "plain times of an earlier generation trusted",
        "spec_decode/decoding/speed_monitor.py",
        "        self._plain.clear()\n",
        "",
        "spec_decode/test_autotune.py::test_every_generation_times_plain_passes_before_it_drafts",
    ),
    Mutation(
        "one plain pass of a probe left out",
        "spec_decode/decoding/speed_monitor.py",
        "self._passes % self.interval > 1",
        "self._passes % self.interval > 0",
        "spec_decode/test_autotune.py::test_two_passes_in_a_row_of_so_many_are_plain",
    ),
    Mutation(
        "finished rows count as tested",
        "spec_decode/decoding/statistics.py",
        "(levels & active).sum(0)",
        "levels.sum(0)",
        "spec_decode/test_decoder.py::test_stop_tokens_inside_accepted_runs_and_rows_that_end_at_different_steps",
    ),
    Mutation(
        "no room for what a row missed in a pause",
        "spec_decode/decoding/decoder.py",
        "missed = max(limits) if monitor is not None and batch > 1 else 0",
        "missed = 0",
        "spec_decode/test_autotune.py::test_what_one_row_missed_fits_behind_another_that_is_full",
    ),
    Mutation(
        "a frontier's own slots in front of its ancestors'",
        "spec_decode/drafters/dynamic.py",
        "torch.cat([above, visible], dim=-1)",
        "torch.cat([visible, above], dim=-1)",
        "spec_decode/test_drafters.py::test_a_frontiers_node_sees_its_ancestors_and_itself",
    ),
    Mutation(
        "dynamic trees ranked without the target's noise",
        "spec_decode/drafters/dynamic.py",
        "            seeds=context.seeds.repeat_interleave(nodes),",
        "            seeds=context.seeds.repeat_interleave(nodes) * 0,",
        "spec_decode/test_drafters.py::test_a_dynamic_tree_holds_what_the_target_draws_where_the_drafter_is_the_target",
    ),
    Mutation(
        "the noise of a dynamic tree's first level at all of them",
        "spec_decode/drafters/dynamic.py",
        "(context.root_positions + level).repeat_interleave(nodes)",
        "context.root_positions.repeat_interleave(nodes)",
        "spec_decode/test_drafters.py::test_a_dynamic_tree_holds_what_the_target_draws_where_the_drafter_is_the_target",
    ),
    Mutation(
        "padding of a draft model's head drafted",
        "spec_decode/drafters/draft_model.py",
        "counts))[..., : self.shared]",
        "counts))",
        "spec_decode/test_drafters.py::test_a_draft_model_whose_head_is_padded_otherwise",
    ),
    Mutation(
        "one weight in two left out of the fingerprint",
        "spec_decode/models/causal_lm.py",
        "value.detach().flatten().split(_PART)",
        "value.detach().flatten()[::2].split(_PART)",
        "spec_decode/test_models.py::test_every_weight_counts_in_the_fingerprint",
    ),
    Mutation(
        "top-p drops the token that reaches it",
        "spec_decode/decoding/sampling.py",
        "(probs.cumsum(-1) - probs < top_p).sum(-1, keepdim=True)",
        "(probs.cumsum(-1) < top_p).sum(-1, keepdim=True).clamp(min=1)",
        "spec_decode/test_sampling.py::test_top_p_equals_sorting_in_plain_python",
    ),
]


@pytest.fixture(scope="module")
def run_on_copy(tmp_path_factory):
    """Exit code and output of pytest with the packages of a folder in front of the installed ones."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    settings = {
        "OMP_NUM_THREADS": "1",
        # A mutant's failures are not to be tried again.
        "HYPOTHESIS_STORAGE_DIRECTORY": str(tmp_path_factory.mktemp("hypothesis")),
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    forks = subprocess.Popen([sys.executable, "-c", FORKS], cwd=ROOT, env=inherited | settings, **pipes)

    def run(folder, modules, tests):
        (folder / "mutation_guard.py").write_text(f"MODULES = {sorted(modules)}\n{GUARD}")
        log = folder / "log"
        options = ["-x", "-q", "-n", "0", "-m", "", "-p", "no:cacheprovider", "-p", "no:nbmake", "-p", "mutation_guard"]
        options += ["-W", "ignore:Module already imported so cannot be rewritten"]  # pytest's plugins
        job = {"folder": str(folder), "log": str(log), "args": [*options, *(f"tests/{test}" for test in tests)]}
        forks.stdin.write(json.dumps(job) + "\n")
        forks.stdin.flush()
        return int(forks.stdout.readline()), log.read_text()

    with forks:
        yield run
        forks.stdin.close()


def copy_of(package, folder):
    shutil.copytree(ROOT / "packages" / FOLDERS[package] / "src" / package, folder / package)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_seeded_mistake_is_noticed(mutation, tmp_path, run_on_copy):
    copy_of(mutation.file.partition("/")[0], tmp_path)
    file = tmp_path / mutation.file
    text = file.read_text()
    assert text.count(mutation.old) == 1, f"{mutation.file} does not hold this text exactly once:\n{mutation.old}"
    file.write_text(text.replace(mutation.old, mutation.new))
    code, output = run_on_copy(tmp_path, [mutation.module], [mutation.test])
    assert code == 1, output  # 0: it survived; 2 to 5: nothing was tested; 99: the copy was not
    assert "1 failed" in output, output


def test_without_a_mistake_the_same_tests_pass(tmp_path, run_on_copy):
    for package in FOLDERS:
        copy_of(package, tmp_path)
    code, output = run_on_copy(tmp_path, {m.module for m in MUTATIONS}, list(dict.fromkeys(m.test for m in MUTATIONS)))
    assert code == 0, output
