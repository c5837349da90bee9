"""Mutants: named bugs, each a small change of the source, and the tests that must notice them.

    python tests/mutants.py                         all of them, one after the other, and the table
    python tests/mutants.py --only clip --jobs 2    those with "clip" in their name, two at a time
    python tests/mutants.py --curves FOLDER         trains six of them, draws curves without names

What it teaches: a test is worth what it notices. Bugs of this kind are easily made, and most of
them raise nothing: the run continues, the curves look plausible, the model learns less or something
else. This program applies each mutant to a copy of the repository and runs the tests that the
mutant names there; one of them must fail. Before that, all these tests run on an unchanged copy,
where they must pass: otherwise "a test failed" would mean nothing.

If a mutant's old text does not occur exactly once, an error names the mutant, so that this list
cannot drift away from the code. tests/test_mutants.py checks that in every run of the tests and
mutates nothing.

mutants.md makes assignments of the list. Left out: mutants made by a program (flipped signs
everywhere).
"""

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECONDS = 300           # for one mutant's tests; a mutant that hangs is reported, not counted


@dataclass(frozen=True)
class Mutant:
    """One bug, and the tests that must notice it."""
    name: str
    says: str                   # what a student would say that the bug is
    file: str                   # from the repository's root
    old: str                    # is in the file exactly once
    new: str                    # replaces it
    tests: tuple[str, ...]      # "test_x.py::test_y"; one of them must fail


class MutantError(ValueError):
    """A mutant that cannot be made; the message names it."""


# --- the list, in the order of the lesson ---------------------------------------------------------

MUTANTS = [
    # the parser
    Mutant("words_around_the_tags_are_strict",
           "the format reward is judged on the tags, not on the whole turn",
           "tools.py",
           'frame = think_start == len("<think>") and end + len(f"</{kind}>") == len(turn)',
           "frame = True",
           ("test_tools.py::test_text_around_the_tags_is_run_but_earns_no_format_reward",)),
    Mutant("strict_without_a_thought", "the format reward is paid without <think>", "tools.py",
           'if "think" not in spans:\n        return False',
           'if "think" not in spans:\n        return True',
           ("test_tools.py::test_text_around_the_tags_is_run_but_earns_no_format_reward",)),
    Mutant("two_actions_in_one_turn", "a turn may hold two actions; the first one is carried out",
           "tools.py",
           'if name != "think" and any(other != "think" for other in spans):', "if False:",
           ("test_tools.py::test_a_malformed_turn_says_why",)),
    Mutant("fence_left_in_the_program", "the ``` around the program is run with it", "tools.py",
           "        body = body[fence.end():end if end >= 0 else None]\n", "        pass\n",
           ("test_tools.py::test_programs_with_and_without_a_fence",)),
    # the sandbox
    Mutant("no_time_limit", "a program may run for ever", "extras/jail.py",
           "        elif left <= 0:\n", "        elif False:\n",
           ("test_tools.py::test_time_is_limited",)),
    Mutant("no_memory_limit", "a program may take all memory", "extras/jail.py",
           '"AS": used + (jail.memory_mb << 20)}', '"AS": resource.RLIM_INFINITY}',
           ("test_tools.py::test_the_second_lines_of_defence_are_up",)),
    Mutant("environment_passed_on",
           "programs see the trainer's environment variables, keys included", "extras/worker.py",
           "env=environment, pass_fds", "env=os.environ | environment, pass_fds",
           ("test_tools.py::test_nothing_of_the_trainer_is_inherited",)),
    Mutant("link_followed", "a link to any file is read as the program's picture", "extras/jail.py",
           "os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK", "os.O_RDONLY | os.O_NONBLOCK",
           ("test_tools.py::test_the_output_must_be_an_ordinary_file",)),
    Mutant("decoded_by_the_trainer", "the picture is decoded where the model is, not in the jail",
           "extras/worker.py",
           "    if file.read(len(start)) != start:\n",
           "    with suppress(Exception):\n"
           "        import io\n"
           '        return Image.open(io.BytesIO(file.read())).convert("RGB"), None\n'
           "    if file.read(len(start)) != start:\n",
           ("test_tools.py::test_a_program_that_says_itself_that_it_is_done_has_ended_itself",)),
    Mutant("any_size_is_decoded", "a picture of any size is decoded", "extras/jail.py",
           "if image.width * image.height > PIXELS or max(image.size) > SIDE:", "if False:",
           ("test_tools.py::test_a_hostile_image_is_an_error",)),
    Mutant("equal_programs_lose_their_place",
           "equal programs run once, and the results lose their order", "extras/worker.py",
           "return [done[job] for job in work]", "return [done[job] for job in unique]",
           ("test_tools.py::test_map_keeps_the_order_and_runs_equal_jobs_once",)),
    # search
    Mutant("replay_ignores_k", "a search for 4 passages gets the 2 of an earlier one",
           "extras/search.py", "WHERE query = ? AND k = ? ", "WHERE query = ? AND ? > 0 ",
           ("test_search.py::test_a_record_answers_what_was_asked_before",)),
    Mutant("passages_not_ranked", "passages come in the order of the file", "extras/search.py",
           'yield any_of(words), "ORDER BY rank"', 'yield any_of(words), ""',
           ("test_search.py::test_a_corpus_ranks_by_bm25",)),
    # data
    Mutant("test_numbers_in_training", "the held-out numbers are trained on", "data/mini.py",
           'return shuffled[20:] if split == "train" else shuffled[:20]',
           'return shuffled if split == "train" else shuffled[:20]',
           ("test_mini.py::test_held_out_texts_are_never_trained_on",)),
    Mutant("rotation90_the_other_way", "rotation90 is drawn clockwise, unlike MAT's",
           "data/mini.py",
           "return image.transpose(Image.Transpose.ROTATE_90)",
           "return image.transpose(Image.Transpose.ROTATE_270)",
           ("test_mini.py::test_rotation90_is_undone_clockwise",)),
    Mutant("crop_question_shows_the_crop", "a crop question is shown the region, not the picture",
           "data/mat.py",
           '"ori_image_path" if problems[0] == "crop" else "processed_image_path"',
           '"processed_image_path"',
           ("test_mat.py::test_a_crop_question_shows_the_whole_picture",)),
    Mutant("questions_of_one_image_mixed", "two questions about one image are joined to one",
           "data/mat.py",
           '''Path(step.image).stem), " ".join(step.question.split())''',
           '''Path(step.image).stem), ""''',
           ("test_mat.py::test_steps_may_come_in_any_order_and_two_questions_may_share_an_image",)),
    # rewards
    Mutant("official_f1_counts_repeats",
           "the paper's F1 shares sets of words; here repeated words count", "rewards.py",
           "return harmonic(len(set(p) & set(g)), len(p), len(g))",
           "return harmonic((Counter(p) & Counter(g)).total(), len(p), len(g))",
           ("test_rewards.py::test_the_published_f1_counts_distinct_tokens_over_full_lengths",)),
    Mutant("repaired_f1_on_sets", "the repaired F1 counts a repeated word once", "rewards.py",
           "return harmonic((Counter(p) & Counter(g)).total(), len(p), len(g)), float(p == g)",
           "return harmonic(len(set(p) & set(g)), len(p), len(g)), float(p == g)",
           ("test_rewards.py::test_the_published_f1_counts_distinct_tokens_over_full_lengths",
            "test_rewards.py::test_scores_stay_in_their_range_and_an_exact_match_is_worth_most")),
    Mutant("em_without_normalising", "exact match compares the texts as they stand", "rewards.py",
           "return float(normalize(prediction, chinese) == normalize(gold, chinese))",
           "return float(prediction == gold)",
           ("test_rewards.py::test_official_scores_equal_the_slow_version",)),
    Mutant("only_the_first_gold", "only the first of several right answers counts", "rewards.py",
           "golds = [golds] if isinstance(golds, str) else golds",
           "golds = [golds] if isinstance(golds, str) else golds[:1]",
           ("test_rewards.py::test_the_best_gold_counts_and_no_answer_is_zero",)),
    Mutant("any_answer_is_paid", "an answer is paid whether it is right or not", "rewards.py",
           'accuracy = em if scoring.answer_metric == "em" else best_f1',
           "accuracy = float(episode.answer is not None)",
           ("test_rewards.py::test_the_parts_by_hand",)),
    Mutant("format_of_the_last_turn", "the format reward looks at the last turn alone",
           "rewards.py",
           "strict = sum(turn.action.strict for turn in turns) / max(1, len(episode.turns))",
           "strict = float(bool(turns) and turns[-1].action.strict)",
           ("test_rewards.py::test_the_parts_by_hand",)),
    Mutant("guessing_on_is_paid", "any of the diagnoses may be right, not only the first",
           "rewards.py",
           'if turn.action.kind == "problem"), None)',
           'if turn.action.kind == "problem"\n'
           '                       and set(turn.action.value) == set(sample.problems)), None)',
           ("test_rewards.py::test_only_the_first_diagnosis_counts_so_guessing_on_earns_nothing",)),
    Mutant("labels_in_order", "the problem labels must come in the gold's order", "rewards.py",
           "if set(stated) == set(gold):", "if tuple(stated) == tuple(gold):",
           ("test_rewards.py::test_a_perfect_episode_earns_one_for_each_part",)),
    Mutant("no_similarity_threshold",
           "a query that has little to do with the gold one is paid, too", "rewards.py",
           "sum(value for value in values if value >= SIMILARITY_THRESHOLD)", "sum(values)",
           ("test_search.py::test_the_worth_of_queries",)),
    Mutant("lists_are_paid", "an answer that names many candidates earns its share of F1",
           "rewards.py",
           "if p == g or len(set(p) & set(g)) > LIST * len(p):", "if True:",
           ("test_battery.py::test_no_attack_earns_more_than_honest_failure",)),
    # ids, positions, probabilities
    Mutant("control_words_in_questions",
           "a question that spells <|im_end|> ends the user's message", "policy.py",
           "add_special_tokens=False, split_special_tokens=True).input_ids",
           "add_special_tokens=False).input_ids",
           ("test_policy.py::test_special_ids_in_plain_text_stay_text",)),
    Mutant("special_ids_not_barred",
           "the model may write image placeholders and role markers", "policy.py",
           "barred[list(tokenizer.added_tokens_decoder)] = True", "pass",
           ("test_policy.py::test_barred_ids_have_no_probability",)),
    Mutant("text_after_an_image_too_near",
           "the text after an image goes on one position after its first", "policy.py",
           "p, i = p + max(height, width), i + height * width", "p, i = p + 1, i + height * width",
           ("test_policy.py::test_positions_of_a_hand_made_example",)),
    Mutant("temperature_ignored", "the temperature is not applied at all", "policy.py",
           "torch.log_softmax(logits / temperature, dim=-1)", "torch.log_softmax(logits, dim=-1)",
           ("test_policy.py::test_temperature_divides_the_logits",)),
    # the rollout
    Mutant("observations_in_the_loss",
           "what the tools said is trained on as if the model had written it", "rollout.py",
           "self.mask += [mask] * len(ids)", "self.mask += [1 if self.turns else mask] * len(ids)",
           ("test_rollout.py::test_the_mask_marks_what_was_sampled_and_the_end_of_turn",)),
    Mutant("end_of_turn_masked", "to end a turn is not trained", "rollout.py",
           "    episode.append(ids, mask=1, logp=logp)\n",
           "    episode.append(ids[:-1], mask=1, logp=logp[:-1])\n"
           "    episode.append(ids[-1:], mask=0)\n",
           ("test_rollout.py::test_the_mask_marks_what_was_sampled_and_the_end_of_turn",)),
    Mutant("positions_restart", "after each observation the positions start at 0 again",
           "extras/engine.py",
           "policy.positions(episode.ids, episode.images)[:, start:]\n"
           "                     for episode, start in zip(episodes, known)]",
           "policy.positions(piece, row) for piece, row in zip(pieces, images)]",
           ("test_rollout.py::test_sampled_and_scored_log_probs_agree",)),
    Mutant("last_id_not_in_the_cache",
           "the cache is thought to hold the end-of-turn token already, so it never gets it",
           "extras/engine.py",
           "zip(self.order, self.length.tolist())", "zip(self.order, (self.length + 1).tolist())",
           ("test_rollout.py::test_sampled_and_scored_log_probs_agree",)),
    Mutant("rows_swapped_in_the_group_repeat",
           "a group's episodes continue from another sample's cache", "extras/engine.py",
           "[place for place in range(self.count) for _ in range(times)]",
           "[place for _ in range(times) for place in range(self.count)]",
           ("test_rollout.py::test_sampled_and_scored_log_probs_agree",)),
    Mutant("old_slots_are_seen", "each row of the cache is seen as far as the longest one reaches",
           "extras/engine.py",
           "<= slots[..., None])[:, None]",
           "<= slots.amax(0).expand_as(slots)[..., None])[:, None]",
           ("test_rollout.py::test_sampled_and_scored_log_probs_agree",)),
    Mutant("log_prob_before_temperature", "sampled at the temperature, recorded at 1", "rollout.py",
           "return ids, log_probs.gather(1, ids[:, None])[:, 0]",
           "at_one = torch.log_softmax(log_probs * (temperature or 1.0), 1)\n"
           "    return ids, at_one.gather(1, ids[:, None])[:, 0]",
           ("test_rollout.py::test_samples_follow_the_distribution",)),
    Mutant("programs_get_the_first_image",
           "a second program works on the sample's image, not on the repaired one",
           "rollout.py", "views = [e.view for e in", "views = [e.sample.open_image() for e in",
           ("test_rollout.py::test_a_second_program_works_on_the_first_ones_image",)),
    Mutant("answers_of_cut_turns_count", "an answer counts although its turn was cut off",
           "rollout.py",
           'last and last.finished and last.action.kind == "answer"',
           'last and last.action.kind == "answer"',
           ("test_rollout.py::test_every_way_to_end",)),
    # advantages and loss
    Mutant("biased_deviation", "the deviation is divided by G, not by G - 1", "grpo.py",
           "groups.std(dim=1, keepdim=True) + 1e-4",
           "groups.std(dim=1, keepdim=True, correction=0) + 1e-4",
           ("test_grpo.py::test_advantages_by_hand",)),
    Mutant("advantages_over_the_batch",
           "rewards are compared with the batch's mean, not with their group's", "grpo.py",
           "groups - groups.mean(dim=1, keepdim=True)", "groups - groups.mean()",
           ("test_grpo.py::test_advantages_belong_to_their_own_group",)),
    Mutant("zero_variance_divided_by_zero",
           "a group of equal rewards is divided by its deviation, zero", "grpo.py",
           "centred = centred / (groups.std(dim=1, keepdim=True) + 1e-4)",
           "return (centred / groups.std(dim=1, keepdim=True)).view(-1)",
           ("test_grpo.py::test_a_flat_group_teaches_nothing",)),
    Mutant("clip_dropped", "the ratio is not clipped", "grpo.py",
           "return torch.minimum(unclipped, bounded), bounded < unclipped",
           "return unclipped, bounded < unclipped",
           ("test_grpo.py::test_clipping_stops_the_gradient_where_it_should",)),
    Mutant("larger_of_the_two", "the larger of clipped and unclipped is taken, not the smaller",
           "grpo.py",
           "return torch.minimum(unclipped, bounded), bounded < unclipped",
           "return torch.maximum(unclipped, bounded), bounded < unclipped",
           ("test_grpo.py::test_clipping_stops_the_gradient_where_it_should",)),
    Mutant("wrong_sign", "what was good is made less likely", "grpo.py",
           "per_token = -(gain - beta * kl)", "per_token = gain + beta * kl",
           ("test_grpo.py::test_at_the_first_step_the_loss_is_zero_and_its_gradient_is_not",)),
    Mutant("divergence_is_rewarded", "the KL term pushes away from the reference", "grpo.py",
           "per_token = -(gain - beta * kl)", "per_token = -(gain + beta * kl)",
           ("test_grpo.py::test_loss_and_gradient_equal_the_slow_version",)),
    Mutant("kl_turned_round", "KL(reference || policy) in place of KL(policy || reference)",
           "grpo.py",
           "d = (logp_ref - logp).masked_fill", "d = (logp - logp_ref).masked_fill",
           ("test_grpo.py::test_k3_estimates_kl_of_policy_from_reference",)),
    Mutant("k1_for_k3", "the KL term is the plain log-ratio: right on average, its gradient is not",
           "grpo.py",
           "return d.exp() - d - 1", "return -d",
           ("test_grpo.py::test_k3_estimates_kl_of_policy_from_reference",)),
    Mutant("mask_forgotten", "padding and prompt count in the loss", "grpo.py",
           "mask = mask.to(logp.dtype)", "mask = torch.ones_like(logp)",
           ("test_grpo.py::test_what_stands_off_the_mask_never_counts",)),
    Mutant("mean_over_rows_for_tokens", "dapo averages over each sequence first, as grpo does",
           "grpo.py",
           "    if loss_type in TOKEN_MEANS:\n"
           "        return per_token.sum() / mask.sum().clamp(min=1)\n", "",
           ("test_grpo.py::test_loss_and_gradient_equal_the_slow_version",)),
    Mutant("micro_batches_weigh_alike",
           "the gradient is averaged over rows where the loss averages over tokens",
           "grpo.py",
           "(loss * weight).backward()", "(loss * len(part) / len(episodes)).backward()",
           ("test_grpo.py::test_micro_batches_change_nothing",)),
    # the update
    Mutant("off_by_one", "each token is scored by its own hidden state, not by the one before it",
           "rollout.py",
           "rows * ids.shape[1] + columns - 1 ", "rows * ids.shape[1] + columns ",
           ("test_rollout.py::test_sampled_and_scored_log_probs_agree",)),
    Mutant("branches_see_each_other", "in a packed tree an episode sees those packed before it",
           "extras/tree.py",
           "return ((seen == 0) | (seen == sees)).tril()[:, None]",
           "return ((seen == 0) | (seen <= sees)).tril()[:, None]",
           ("test_tree.py::test_log_probs_and_gradients_are_those_of_rows",)),
    Mutant("ratio_always_one",
           "the old log-probs are taken at the update, so that nothing is ever clipped", "grpo.py",
           "logp, batch.logp_old, ref, advantages", "logp, logp.detach(), ref, advantages",
           ("test_grpo.py::test_inner_epochs_move_ratio_and_clip_and_leave_the_reference_alone",)),
    Mutant("temperature_in_one_place", "sampled at the temperature, trained at 1", "grpo.py",
           "logp, entropy = episode_logp(policy, batch, config.temperature)",
           "logp, entropy = episode_logp(policy, batch)",
           ("test_grpo.py::test_the_update_scores_at_the_temperature_of_sampling",)),
    Mutant("reference_is_updated", "the reference is the policy itself", "grpo.py",
           "model = copy.deepcopy(policy.model).requires_grad_(False)", "model = policy.model",
           ("test_grpo.py::test_inner_epochs_move_ratio_and_clip_and_leave_the_reference_alone",)),
    Mutant("adapters_in_the_reference",
           "with LoRA the reference has the adapters on, so that the KL is always 0",
           "grpo.py", "with reference.without_adapters():", "with torch.no_grad():",
           ("test_lora.py::test_the_reference_is_the_model_without_adapters",)),
    Mutant("masters_are_rounded",
           "the float32 master weights are rounded to bfloat16 after each step",
           "extras/weights.py",
           "weight.copy_(master) ", "weight.copy_(master); master.copy_(weight) ",
           ("test_lora.py::test_at_the_papers_learning_rate_bfloat16_rounds_every_update_away",)),
    Mutant("advantages_of_other_episodes", "a minibatch's episodes get the advantages of others",
           "grpo.py",
           "[episodes[i] for i in part], advantages[part],",
           "[episodes[i] for i in part], advantages[:len(part)],",
           ("test_grpo.py::test_minibatches_share_the_gradient_of_the_whole",)),
    Mutant("gradient_not_cleared", "each minibatch's gradient is added to the one before",
           "grpo.py",
           "            optimizer.adamw.zero_grad(set_to_none=True)\n", "            pass\n",
           ("test_grpo.py::test_minibatches_share_the_gradient_of_the_whole",)),
    Mutant("gradient_not_clipped", "--max-grad-norm does nothing", "grpo.py",
           "clip_grad_norm_(self.weights, self.max_norm)",
           'clip_grad_norm_(self.weights, float("inf"))',
           ("test_grpo.py::test_a_long_gradient_is_scaled_down_and_recorded_as_it_was",)),
    Mutant("nan_is_trained_on", "an update whose gradient is not finite is carried out", "grpo.py",
           'if not math.isfinite(norm + stats["loss"]):', "if False:",
           ("test_grpo.py::test_a_gradient_that_is_not_finite_is_skipped_and_counted",)),
    # the program
    Mutant("rate_never_falls", "the learning rate stays where the warm-up left it", "arft.py",
           'warm * (1 - step / config.steps if config.lr_schedule == "linear" else 1.0)', "warm",
           ("test_arft.py::test_the_learning_rate_by_hand",)),
    Mutant("rate_ten_times_too_high", "the learning rate is ten times what was asked for",
           "arft.py",
           "set_lr(learning_rate(config, step))", "set_lr(10 * learning_rate(config, step))",
           ("test_arft.py::test_training_changes_the_weights_and_evaluation_does_not",)),
    Mutant("trained_tower_is_not_asked_again",
           "with --vision trained the features of the step's start are kept, so that no gradient "
           "reaches the tower", "arft.py",
           "        policy.keep_features = True ", "    policy.keep_features = True ",
           ("test_grpo.py::test_a_frozen_tower_sees_each_image_once_a_step",)),
    Mutant("greedy_evaluation_samples", "the greedy evaluation is sampled, too", "arft.py",
           "limits = replace(config, temperature=evaluation.temperature)", "limits = config",
           ("test_arft.py::test_evaluation_is_greedy_and_sampled_at_temperature_one",)),
    Mutant("zero_variance_groups_kept",
           "groups that teach nothing dilute the update although they are to be dropped", "grpo.py",
           'if settings.zero_variance == "keep":', 'if settings.zero_variance != "keep":',
           ("test_grpo.py::test_groups_of_equal_rewards_are_dropped_or_kept",)),
    Mutant("windows_in_one_row", "all windows of one size see one another", "extras/attention.py",
           "[list(one) for one in rows]", "[[place for one in rows for place in one]]",
           ("test_attention.py::test_a_window_sees_itself_alone",)),
    Mutant("resume_forgets_the_generator", "a resumed run samples other episodes",
           "extras/resume.py",
           'generator.set_state(states["generator"])', "pass",
           ("test_resume.py::test_kill_9_in_the_middle_of_a_step",)),
    Mutant("resume_forgets_the_place_in_the_data", "a resumed run begins the data anew",
           "extras/record.py", "enumerate(batches)", "enumerate(batches, first)",
           ("test_resume.py::test_kill_9_in_the_middle_of_a_step",)),
    Mutant("resume_forgets_the_optimiser", "a resumed run has AdamW without its past",
           "extras/resume.py",
           'optimizer.adamw.load_state_dict(state["optimizer"])', "pass",
           ("test_resume.py::test_kill_9_in_the_middle_of_a_step",)),
]

# Those whose curves differ with the embedded checkpoint.
CURVES = ("wrong_sign", "reference_is_updated", "fence_left_in_the_program", "any_answer_is_paid",
          "rate_ten_times_too_high", "advantages_of_other_episodes")


# --- one mutant -----------------------------------------------------------------------------------


def changed(mutant: Mutant, root: Path = ROOT) -> str:
    """The text of the mutant's file with its bug.

    Raises MutantError if the old text is not there exactly once.
    """
    text = (root / mutant.file).read_text(encoding="utf-8")
    if (count := text.count(mutant.old)) != 1:
        raise MutantError(f"mutant {mutant.name}: its old text stands {count} times in "
                          f"{mutant.file}, not once. The code has changed, so change `old` in "
                          f"tests/mutants.py:\n{mutant.old}")
    return text.replace(mutant.old, mutant.new)


def copy_of(root: Path, folder: Path) -> Path:
    """Copies the repository's files, without what git ignores, into `folder`; MAT-mini as a link.
    """
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                            cwd=root, capture_output=True, text=True)
    names = listed.stdout.rstrip("\0").split("\0")
    if listed.returncode or names == [""]:      # this is no checkout of git
        names = [str(path.relative_to(root)) for path in root.rglob("*")
                 if not {"runs", "cache", "__pycache__"} & {*path.relative_to(root).parts}]
    for name in names:
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, folder / name)
    if (root / "data" / "cache").is_dir():
        (folder / "data" / "cache").symlink_to(root / "data" / "cache")
    return folder


def warm() -> None:
    """Imports what takes long and is not of this repository.

    A process that is forked from this one then has it already.
    """
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.dont_write_bytecode = True      # two versions of a file within a second may look the same
    import pytest                                                           # noqa: F401
    import torch
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration   # noqa: F401
    # One thread, whatever a test's program asks for: on a busy machine two wait for each other,
    # spinning. (OMP_THREAD_LIMIT is no way to say so: torch then counts on threads that it does not
    # get, and its sums are wrong.)
    torch.set_num_threads(1)
    torch.set_num_threads = lambda threads: None


def attempt(mutant: Mutant | None, tests) -> tuple[str, str]:
    """Runs tests on a copy with the bug, or without any.

    Returns "passed" | "killed" | "error", and the first test that failed or what went wrong. Call
    it in a process of its own, because it imports the copy's modules.
    """
    with tempfile.TemporaryDirectory(prefix="mutants-") as home:
        copy = copy_of(ROOT, Path(home))
        if mutant:
            (copy / mutant.file).write_text(changed(mutant), encoding="utf-8")
        return run_tests(copy, tests, SECONDS if mutant else 10 * SECONDS)


def run_tests(copy: Path, tests, seconds: float) -> tuple[str, str]:
    """Runs tests in this process, on the copy. Returns what `attempt` returns."""
    import pytest
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT / "tests"]
    os.chdir(copy)
    signal.signal(signal.SIGALRM, signal.default_int_handler)       # pytest ends as at Ctrl-C
    signal.alarm(int(seconds))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = pytest.main(["-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider",
                            *(f"tests/{test}" for test in tests)])
    failed = re.search(r"^FAILED tests/(\S+?\.py::\w+)", said.getvalue(), re.MULTILINE)
    if code == 0 and " passed" in said.getvalue():
        return "passed", ""
    if code == 1 and failed:
        return "killed", failed[1]
    if code == 2:
        return "error", f"a file cannot be imported, or no end within {seconds} s"
    return "error", " ".join(said.getvalue().split())[-300:]    # no tests, an error in a fixture


def chosen(part: str) -> list[Mutant]:
    """The mutants that have `part` in their name or change the file `part`."""
    found = [mutant for mutant in MUTANTS if part in mutant.name or part == mutant.file]
    if not found:
        raise MutantError(f"--only {part}: no mutant has this in its name or changes this file. "
                          f"There are {', '.join(mutant.name for mutant in MUTANTS)}")
    return found


def hunt(mutants: list[Mutant], jobs: int) -> int:
    """Runs the unchanged copy, then every mutant, and prints the table.

    Returns 0 if all were killed, else 1.
    """
    tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    for mutant in mutants:
        changed(mutant)
    warm()
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        how, what = pool.apply(attempt, (None, tests))
        print(f"{len(tests)} tests on the code as it is: {how} {what}", flush=True)
        if how != "passed":
            return 1
        alive = 0
        for mutant, result in [(mutant, pool.apply_async(attempt, (mutant, mutant.tests)))
                               for mutant in mutants]:
            how, what = result.get()
            alive += how != "killed"
            verdict = {"killed": what, "passed": "SURVIVED", "error": f"ERROR: {what}"}[how]
            print(f"{mutant.name:38} {verdict}", flush=True)
    print(f"{len(mutants)} mutants, {len(mutants) - alive} killed")
    return 1 if alive else 0


# --- six curves without names ---------------------------------------------------------------------

PANELS = {      # name of a row: its value from a step's line of metrics, and the top of its axis
    "reward": (lambda m: m["reward_mean"], 3.0), "EM": (lambda m: m["em"], 1.0),
    "KL": (lambda m: m["kl"] or 0.0, None),
    "entropy": (lambda m: m["entropy"] or 0.0, None),
    "tool failures": (lambda m: m["tool_failures"] / max(1, m["tool_calls"]), 1.0)}
WIDE, HIGH, LEFT, TOP = 150, 84, 76, 40     # one panel; the margins of the picture, pixels


def panel_order() -> list[str]:
    """The mutants of panels A to F, in an order that the list above does not give away."""
    return sorted(CURVES, key=lambda name: hashlib.sha1(name.encode()).hexdigest())


def train_curves(folder: Path, steps: int, more: list[str]) -> None:
    """One short run of the sound code and of each mutant. Skips runs that are finished."""
    for name in ("sound", *panel_order()):
        if (folder / name / "summary.json").exists():
            continue
        with tempfile.TemporaryDirectory(prefix="mutants-") as home:
            copy = copy_of(ROOT, Path(home) / "copy")
            if name != "sound":
                mutant, = (mutant for mutant in MUTANTS if mutant.name == name)
                (copy / mutant.file).write_text(changed(mutant, copy), encoding="utf-8")
            command = [sys.executable, "arft.py", "--task", "mat-coding", "--steps", str(steps),
                       "--samples-per-step", "4", "--eval-samples", "20", *more,
                       "--out", str((folder / name).resolve())]
            print(f"{name}: {' '.join(command[1:])}", flush=True)
            subprocess.run(command, cwd=copy, check=True)


def smooth(values: list[float], width: int = 3) -> list[float]:
    """The median of the `width` steps around each step: the KL of a single step may be ten times
    its neighbours'."""
    half = width // 2
    return [statistics.median(values[max(0, i - half):i + half + 1]) for i in range(len(values))]


def curve(values: list[float], top: float, left: float, y: float, colour: str, width: float) -> str:
    """One polyline in the panel whose upper left corner is (left, y).

    What is above the axis is drawn at its top.
    """
    across = WIDE / max(1, len(values) - 1)
    points = " ".join(f"{left + across * i:.1f},{y + HIGH * (1 - min(value / top, 1)):.1f}"
                      for i, value in enumerate(values))
    return f'<polyline fill="none" stroke="{colour}" stroke-width="{width}" points="{points}"/>'


def draw_curves(folder: Path) -> str:
    """SVG: a column for each mutant, A to F, a row for each number. Grey is the sound code on the
    same samples."""
    runs = {name: [json.loads(line)
                   for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
            for name in ("sound", *panel_order())}
    shapes = []
    for row, (title, (value, top)) in enumerate(PANELS.items()):
        lines = {name: smooth([value(step) for step in run]) for name, run in runs.items()}
        # One run that explodes must not flatten the others: the axis ends at three times the
        # largest value of the sound run.
        top = top or max(3 * max(lines["sound"]), 1e-6)
        y = TOP + row * (HIGH + 22)
        shapes.append(f'<text x="8" y="{y + HIGH / 2}">{title}</text>')
        for column, name in enumerate(panel_order()):
            left = LEFT + column * (WIDE + 14)
            shapes += [f'<rect x="{left}" y="{y}" width="{WIDE}" height="{HIGH}" fill="none" '
                       f'stroke="#ccc"/>',
                       curve(lines["sound"], top, left, y, "#999", 1),
                       curve(lines[name], top, left, y, "#d55e00", 2)]
            if row == 0:
                shapes.append(f'<text x="{left + WIDE / 2}" y="{TOP - 14}" text-anchor="middle" '
                              f'font-size="16">{"ABCDEF"[column]}</text>')
        shapes += [f'<text x="{LEFT - 4}" y="{y + 9}" text-anchor="end" font-size="10">'
                   f'{top:.3g}</text>',
                   f'<text x="{LEFT - 4}" y="{y + HIGH}" text-anchor="end" font-size="10">0</text>']
    width, height = LEFT + len(CURVES) * (WIDE + 14), TOP + len(PANELS) * (HIGH + 22) + 12
    shapes.append(f'<text x="{LEFT}" y="{height - 10}">{len(runs["sound"])} training steps; grey: '
                  "the code without a bug; medians of three steps</text>")
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            'font-family="sans-serif" font-size="12" fill="#333">'
            f'<rect width="{width}" height="{height}" fill="white"/>{"".join(shapes)}</svg>\n')


def main(arguments: list[str]) -> int:
    """Reads the options and carries them out. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="",
                        help="only mutants with this in their name, or of this file")
    parser.add_argument("--jobs", type=int, default=1,
                        help="mutants that run side by side, with one thread each")
    parser.add_argument("--curves", type=Path,
                        help="train six mutants into this folder and draw curves.svg there")
    parser.add_argument("--steps", type=int, default=25,
                        help="training steps of each of these runs")
    options, more = parser.parse_known_args(arguments)
    if more and not options.curves:
        parser.error(f"unknown: {' '.join(more)} (only --curves takes options of arft.py)")
    try:
        if options.curves:
            train_curves(options.curves, options.steps, more)
            (options.curves / "curves.svg").write_text(draw_curves(options.curves))
            print(options.curves / "curves.svg")
            return 0
        return hunt(chosen(options.only), options.jobs)
    except MutantError as error:
        print(f"mutants.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
