"""The cases of bad input and of faults that a run must meet, and the tests that prove each.

A case is met when the exit code says who can mend it, one line names flag, file or row and the remedy, and nothing that
was there is lost. One that no test proves says why.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

FEW_RANKS = "one process trains; several GPUs (--enable_fsdp) are refused as not supported"

CASES: dict[int, tuple[str, str]] = {
    # Bad input: exit code 2, nothing written.
    1: ("an unknown flag", """
        test_command: test_wrong_flags_are_told_in_under_a_second_without_torch_and_nothing_is_written
        test_command: test_a_run_is_entered_only_once_every_flag_is_accepted"""),
    2: ("a value of the wrong kind or out of range", """
        config/test_loading: test_numbers_keep_their_kind test_every_problem_is_told_at_once"""),
    3: ("text that looks like a number stays text", """
        config/test_loading: test_text_is_taken_as_typed test_a_folder_keeps_its_name
        test_command: test_words_become_flags_as_typed test_data_are_created_by_a_process"""),
    4: ("a config with a typo, a key twice, a tag, an alias bomb, a secret", """
        run/test_refusals: test_a_config_that_cannot_be_meant
        config/test_loading: test_a_bad_file_is_told_with_its_line"""),
    5: ("a model folder that is none", "run/test_bad_input: test_a_broken_model_folder_is_told_before_the_model_loads"),
    6: ("weights cut short", "run/test_bad_input: test_a_broken_model_folder_is_told_before_the_model_loads"),
    7: ("a tensor too few, too many, of another shape", """
        run/test_bad_input: test_weights_that_are_not_those_of_the_config_are_told"""),
    8: ("weights that are no numbers", """
        run/test_bad_input: test_weights_that_are_not_those_of_the_config_are_told"""),
    9: ("only pickles", "run/test_refusals: test_a_pickle_is_never_opened"),
    10: ("code of a model folder's own", """
        run/test_refusals: test_code_of_a_model_folder_waits_for_the_flag_and_asks_nobody
        run/test_secrets: test_code_from_the_hub_needs_a_pinned_revision"""),
    11: ("a config.json that names a kernel to fetch", """
        run/test_bad_input: test_an_attention_that_a_config_names_is_not_fetched"""),
    12: ("tokenizer and model that do not fit, no padding, no chat template", """
        run/test_bad_input: test_a_broken_model_folder_is_told_before_the_model_loads
        models/test_loading: test_padding_gets_a_token_that_is_not_the_end
        data/test_templates: test_a_template_whose_control_tokens_are_missing_is_refused_before_any_row"""),
    13: ("a CSV file with a broken row", """
        data/test_files: test_a_fault_is_one_line_that_says_where
        run/test_refusals: test_data_that_cannot_be_read"""),
    14: ("a file that is not UTF-8", """
        data/test_files: test_a_fault_is_one_line_that_says_where test_the_iconv_hint_mends_the_file
        run/test_refusals: test_data_that_cannot_be_read"""),
    15: ("001, 1.10, NA and None reach the model as they are", """
        data/test_files: test_values_of_a_csv_file_stay_the_text_they_are
        custom_datasets/test_chat: test_every_format_and_layout_gives_the_same_samples"""),
    16: ("a JSON lines file with a broken row", """
        data/test_files: test_a_fault_is_one_line_that_says_where
        run/test_refusals: test_data_that_cannot_be_read"""),
    17: ("an empty prompt or answer", """
        data/test_rows: test_rows_with_a_blank_column_are_left_out_and_counted
        custom_datasets/test_samples: test_a_blank_answer_is_named_by_file_and_line
        run/test_refusals: test_data_that_cannot_be_read
        run/test_infer: test_a_prompt_that_is_none_is_told_before_the_model_loads"""),
    18: ("a sample too long, its answer cut off", """
        data/test_samples: test_a_row_that_cannot_train_is_refused_by_its_number
        data/test_samples: test_truncate_keeps_the_beginning_and_says_what_lost_its_answer"""),
    19: ("every label masked", """
        run/test_refusals: test_a_plug_in_without_samples
        training/test_loop: test_batches_without_a_supervised_token_are_told"""),
    20: ("a context longer than the model's positions", """
        run/test_bad_input: test_samples_longer_than_the_models_positions"""),
    21: ("control tokens spelt out in a user's text", """
        data/test_templates: test_no_text_becomes_a_control_token
        test_prompts: test_a_control_token_spelt_out_in_text_stays_text
        data/test_conversations: test_what_turns_spell_out_is_found"""),
    22: ("fewer samples than a batch, an empty split, splits that share rows", """
        data/test_loaders: test_fewer_samples_than_a_batch_are_a_batch
        run/test_refusals: test_a_plug_in_without_samples
        data/test_health: test_the_trainer_is_told_of_shared_and_repeated_rows"""),
    23: ("a plug-in that is missing, broken or returns something else", """
        test_plugins: test_a_missing_file_is_told_with_the_folders_and_its_likes
        test_plugins: test_what_is_no_python_file_is_refused test_a_private_name_is_refused
        test_plugins: test_a_missing_function_is_told_with_its_likes_and_without_private_ones
        test_plugins: test_a_syntax_error_is_told_with_its_line
        test_plugins: test_an_import_error_is_told_with_the_authors_line_and_the_file_can_be_mended
        test_plugins: test_an_attribute_error_inside_is_no_missing_function
        run/test_refusals: test_a_plug_in_without_samples"""),
    24: ("a plug-in from elsewhere, or edited before going on", """
        config/test_places: test_elsewhere_is_told_with_file_and_line test_a_link_that_leads_elsewhere_is_elsewhere
        test_plugins: test_a_reference_is_split_behind_the_file
        run/test_resuming: test_an_edited_plugin_is_told"""),
    25: ("an output folder that holds other things", """
        run/test_output: test_a_place_that_holds_something_else_is_refused_and_left_alone
        run/test_output: test_a_new_place_is_checked_and_not_yet_made test_a_folder_that_the_run_reads_is_not_written_to
        run/test_output: test_a_run_that_cannot_be_done_loses_nothing_of_the_one_it_would_replace"""),
    26: ("an output folder in use", """
        run/test_faults: test_a_lock_frees_itself_when_its_process_is_killed
        run/test_faults: test_a_signal_to_the_whole_group_saves_though_there_are_workers_and_a_second_run_is_kept_out
        """),
    27: ("a disk too small", """
        run/test_faults: test_a_disk_too_small_for_a_checkpoint_is_told_before_the_training"""),
    28: ("an adapter of another base", """
        run/test_bad_input: test_an_adapter_of_another_base_is_told
        run/test_bad_input: test_another_base_may_be_allowed_if_its_shapes_fit
        models/test_identity: test_what_makes_another_model test_what_does_not_make_another_model"""),
    29: ("an adapter that is broken, or stands where a model should", """
        run/test_refusals: test_an_adapter_that_is_not_what_it_says test_an_adapter_is_no_model
        run/test_bad_input: test_a_broken_adapter_folder_is_told_before_the_model_loads"""),
    30: ("a merge into a quantized base, or beyond what its type holds", """
        run/test_refusals: test_nothing_is_merged_into_a_quantized_base
        run/test_merge: test_weights_that_the_type_cannot_hold_are_refused
        run/test_merge: test_a_type_that_changes_the_answers_is_refused
        run/test_merge: test_the_merged_model_answers_the_same_and_plain_transformers_loads_it"""),
    31: ("a GGUF file that is broken or none", """
        models/test_gguf: test_a_file_cut_short_is_told test_garbage_is_told
        models/test_gguf: test_a_wrong_name_is_told_with_its_neighbours
        run/test_refusals: test_a_gguf_file_that_is_none"""),
    32: ("choices that cannot work, here or at all", """
        config/test_loading: test_choices_that_cannot_work_are_refused
        run/test_bad_input: test_what_cannot_be_done_here_is_told_before_the_model_loads"""),
    33: ("going on with other settings or data", """
        run/test_resuming: test_changes_are_listed_and_refused
        run/test_resuming: test_another_cut_of_the_same_step_goes_on_with_the_same_samples"""),
    # Faults: what was saved stays, and the run goes on as if nothing had been.
    34: ("the newest checkpoint spoiled", "run/test_resuming: test_a_broken_checkpoint_is_skipped_with_the_reason"),
    35: ("all checkpoints spoiled", "run/test_resuming: test_where_no_checkpoint_is_whole_nothing_is_touched"),
    36: ("leftovers and strangers' files", "run/test_resuming: test_a_broken_checkpoint_is_skipped_with_the_reason"),
    37: ("killed at any write", """
        run/test_resuming: test_killed_at_some_writes_and_resumed_a_run_is_equal_to_the_bit
        run/test_soak: test_every_write_point"""),
    38: ("a disk that is full, broken, read-only or limited", """
        run/test_faults: test_a_disk_that_is_full_at_some_writes_loses_nothing
        run/test_faults: test_a_disk_that_fails_from_some_write_on_loses_nothing
        run/test_faults: test_metrics_that_cannot_be_written_are_one_line"""),
    39: ("a loss that is no number, once and three times", """
        run/test_faults: test_a_loss_that_is_not_a_number_is_skipped_and_its_rows_are_told
        run/test_faults: test_three_in_a_row_end_the_run_with_a_checkpoint_and_a_black_box"""),
    40: ("an infinite gradient under loss scaling", """
        training/test_updater: test_loss_scaling_skips_until_its_scale_fits"""),
    41: ("a spike of the loss", """
        training/test_loop: test_a_spike_is_told_and_left_out_where_that_is_asked
        training/test_updater: test_what_a_run_has_learned_of_itself_goes_on_with_it"""),
    42: ("out of memory", """
        training/test_loop: test_out_of_memory_is_met_by_smaller_batches_and_the_same_update
        training/test_updater: test_what_a_run_has_learned_of_itself_goes_on_with_it
        run/test_bad_input: test_the_end_of_the_memory_is_one_line"""),
    43: ("a signal, wherever the run is", """
        run/test_faults: test_a_signal_while_loading_stops_at_once_with_nothing_to_save
        run/test_faults: test_ctrl_c_while_loading_stops_at_once
        run/test_faults: test_a_signal_while_saving_ends_the_run_behind_a_whole_checkpoint
        run/test_stopping: test_a_signal_ends_the_run_after_the_step_at_hand
        run/test_stopping: test_a_signal_during_a_validation_ends_the_run_behind_it
        run/test_stopping: test_a_signal_at_the_very_end_finds_a_run_that_is_done
        run/test_stopping: test_a_second_ctrl_c_stops_at_once test_sigterm_to_the_real_command
        run/test_resuming: test_stopped_by_a_signal_and_resumed_it_is_equal_to_the_bit"""),
    44: ("a signal to the data workers too", """
        run/test_faults: test_a_signal_to_the_whole_group_saves_though_there_are_workers_and_a_second_run_is_kept_out
        data/test_loaders: test_a_worker_leaves_signals_to_the_trainer"""),
    45: ("several ranks: signals", FEW_RANKS),
    46: ("several ranks: one fails", FEW_RANKS),
    47: ("several ranks: one hangs", FEW_RANKS),
    48: ("several ranks: one has no disk", FEW_RANKS),
    49: ("several ranks become fewer, and more", FEW_RANKS),
    50: ("a hostile checkpoint", """
        run/test_resuming: test_a_hostile_checkpoint_runs_nothing
        run/test_verify: test_a_manifest_cannot_point_outside test_a_link_is_not_followed
        run/test_verify: test_every_change_is_found"""),
    51: ("secrets of the environment", """
        run/test_secrets: test_no_secret_of_the_environment_is_written_or_shown
        run/test_secrets: test_no_command_shows_a_secret_of_the_environment
        run/test_secrets: test_a_secret_in_a_setting_is_hidden_in_what_a_checkpoint_keeps"""),
    52: ("what a model writes acts on no reader", """
        reports/test_comparison: test_what_a_model_wrote_reads_as_it_stands_and_does_nothing
        reports/test_comparison: test_the_report_escapes_what_everyone_wrote
        reports/test_tokens: test_what_a_token_holds_acts_on_nothing
        reports/test_format: test_printable_takes_what_acts_on_a_terminal_and_no_more"""),
    53: ("a server's doors", "there is no server"),
    54: ("the same command twice, another seed, more threads", """
        run/test_finetune: test_the_same_command_gives_the_same_run_and_another_seed_another
        run/test_finetune: test_batches_side_by_side_leave_the_curve_equal_and_are_told
        run/test_preparing: test_a_deterministic_run_is_the_same_run_and_the_next_one_is_free_again"""),
}  # fmt: skip


def proofs(text: str) -> list[tuple[str, str]]:
    """Returns (file, test) of what stands behind a case; none where that is a reason."""
    found, file = [], ""
    for word in text.split() if ": test_" in text else []:
        if word.endswith(":"):
            file = f"{word[:-1]}.py"
        else:
            found.append((file, word))
    return found


@cache
def held_by(file: str) -> set[str]:
    """Returns the names of the tests that a file holds."""
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_case_is_there_with_its_tests_or_a_reason() -> None:
    assert list(CASES) == list(range(1, 55))
    unproven = [number for number, (_, text) in CASES.items() if not proofs(text)]
    assert unproven == [45, 46, 47, 48, 49, 53]


@pytest.mark.parametrize("number", CASES)
def test_the_held_by_a_case_are_tests(number: int) -> None:
    for file, name in proofs(CASES[number][1]):
        assert name in held_by(file), f"case {number}: {file} has no {name}"
