"""What the existing package offers, row by row of the feature tables of `PEER.md`, and the tests that show it here.

A row without a test elsewhere has one in this file. Left out are the rows of what this package answers with one clear
line: `pipe`, `backend=`, `tracer_cls=`, `remote=`, vLLM and `CONFIG.APP` (test_peer_defects.py has these answers).
"""

import ast
import copy
import pathlib
import pickle

import pytest
import torch
from torch import nn

import nnsight
from nnsight import errors
from nnsight.core import accelerator

HERE = pathlib.Path(__file__).parent

SHOWN_BY = {
    "1.3 Meta build": "test_the_first_run_loads_the_weights "
    "test_an_envoy_from_before_the_weights_is_the_same_afterwards",
    "1.3 Dispatch": "test_dispatch_loads_once",
    "1.3 Scan": "test_a_scan_loads_no_weights test_a_scan_shows_what_a_trace_shows_but_for_the_values",
    "1.3 Placement": "test_to_and_cpu_move_the_module_and_return_the_envoy test_ids_come_from_any_device",
    "1.4 trace": "test_random_blocks_equal_plain_torch_hooks test_a_module_of_the_model_has_rows_too",
    "1.4 a body of `pass`": "test_a_block_that_asks_for_nothing_runs_the_model_once",
    "1.4 no-trace call": "test_a_plain_call_is_told_apart_from_a_with "
    "test_3_1_08_generate_with_trace_false_is_a_plain_call",
    "1.4 generate": "test_generate_in_a_with_is_a_trace_and_alone_a_call",
    "1.4 any method as trace": "test_another_method_or_a_function_is_traced_by_fn",
    "1.4 result": "test_the_result_is_the_return_value_and_can_be_assigned test_a_result_is_written_for_one_row",
    "1.4 stop": "test_break_and_stop_in_the_middle test_stop_in_one_leaves_the_others_right",
    "1.4 tracer attributes": "test_a_tracer_has_its_attributes_and_is_used_once",
    "1.5 invoke": "test_each_invoke_has_the_rows_that_it_gave test_the_model_runs_once_on_all_of_them",
    "1.5 empty invoke": "test_an_invoke_without_a_prompt_sees_the_whole_batch",
    "1.5 trace-level params": "test_options_of_the_trace_hold_for_all",
    "1.5 barrier": "test_a_barrier_has_each_wait_for_the_others_in_rounds",
    "1.5 cross-invoke variables": "test_a_name_of_one_is_used_in_the_other_in_both_orders",
    "1.5 row scoping rule": "test_values_that_a_mixture_of_experts_flattens_are_each_prompts_own",
    "1.5 custom batching": "test_a_class_that_says_how_invokes_are_put_together_is_refused_rather_than_ignored",
    "1.6 output": "test_random_blocks_equal_plain_torch_hooks test_what_was_written_is_what_is_read",
    "1.6 inputs": "test_inputs_are_what_the_caller_gave_positions_and_keywords",
    "1.6 input": "test_the_input_is_the_first_positional_one_or_the_first_keyword_and_is_replaced_alone",
    "1.6 order": "test_a_value_that_is_past test_at_a_modules_output_its_input_is_still_known",
    "1.6 skip": "test_skip_runs_nothing_beneath_and_may_depend_on_the_input "
    "test_a_module_that_all_rows_skip_is_left_out",
    "1.6 ad-hoc call": "test_calling_a_module_in_a_block_runs_its_forward_and_no_tap "
    "test_3_1_21_inner_values_of_a_hooked_call_are_read_in_the_same_block",
    "1.6 attach module": "test_a_plain_attribute_is_the_envoy_s_own_and_a_module_the_module_s_too",
    "1.6 save": "test_variables_are_objects_of_their_own_and_save_returns_its_object",
    "1.6 save builtins": "test_save_is_there_on_builtin_types_and_returns_its_object",
    "1.7 iter": "test_the_loop_goes_through_the_steps_it_is_asked_for",
    "1.7 all": "test_all_and_a_bare_iter_are_all_steps",
    "1.7 with-form": "test_a_with_over_steps_runs_its_body_in_each_as_a_loop_does",
    "1.7 model.iter": "test_the_steps_that_a_module_is_asked_for_are_those_of_the_generation",
    "1.7 streamer": "test_what_the_streamer_would_have_had_is_what_the_next_step_is_called_with",
    "1.8 modules": "test_modules_are_given_by_path_envoy_pattern_class_and_function",
    "1.8 device, dtype, detach": "test_kept_values_are_detached_cast_and_moved_as_asked",
    "1.8 include_output, include_inputs": "test_a_cache_keeps_what_plain_hooks_keep_bit_for_bit",
    "1.8 non_blocking": "test_copies_that_are_under_way_are_waited_for_once_when_a_cache_is_read",
    "1.8 at any moment, several": "test_a_cache_can_be_made_at_any_moment_and_there_can_be_several",
    "1.8 post-intervention": "test_a_value_is_kept_as_the_block_left_it",
    "1.8 narrowed": "test_a_cache_in_an_invoke_keeps_its_own_rows test_a_rows_cache_keeps_the_rows_part_alone",
    "1.8 CacheView": "test_one_value_is_had_by_path_attribute_index_and_envoy test_a_repr_is_a_short_table",
    "1.8 visits": "test_output_is_of_one_type_however_often_a_module_is_called",
    "1.8 picklable": "test_a_cache_survives_pickling_saving_and_copying_without_the_model",
    "1.9 backward block": "test_gradients_equal_those_of_hooks test_an_assigned_gradient_flows_on_as_a_hook_returns_it",
    "1.9 plain backward": "test_a_plain_backward_in_the_block_is_torchs",
    "1.9 in session / after trace": "test_outside_of_any_trace "
    "test_gradients_are_had_in_a_session_and_behind_the_trace",
    "1.10 edit": "test_an_edit_equals_a_plain_hook_in_a_trace_and_in_a_plain_call",
    "1.10 inplace": "test_an_edit_in_place_stays_on_the_model_until_it_is_cleared",
    "1.10 as (tracer, edited)": "test_the_three_forms_are_one",
    "1.10 a child's": "test_an_edit_of_a_sub_module_takes_part_in_a_trace_of_its_parent",
    "1.10 stacking": "test_edits_stack_in_the_order_of_their_writing",
    "1.10 never reached": "test_a_module_that_never_runs_is_named_once_and_breaks_nothing",
    "1.10 every step": "test_an_edit_runs_for_every_token test_steps_are_chosen",
    "1.10 save": "test_save_is_there_when_an_edit_is_written",
    "1.11 op access": "test_each_operation_is_what_a_hand_edited_forward_has",
    "1.11 listing": "test_operations_are_named_and_listed_as_they_are_executed "
    "test_printing_shows_the_source_with_the_names_beside_it",
    "1.11 nested": "test_what_a_call_calls_has_a_source_of_its_own",
    "1.11 decorators": "test_decorators_closures_super_and_private_names_stay_what_they_are",
    "1.11 cost": "test_a_sourced_module_compiles_afterwards_and_runs_eagerly_meanwhile",
    "1.14 index, name, slice": "test_iterating_gives_the_children_and_a_slice_a_list",
    "1.14 out of range": "test_a_bad_index",
    "1.14 len, bool": "test_only_a_container_has_a_length_and_everything_is_true",
    "1.14 path": "test_the_path_of_a_module_leads_to_it",
    "1.14 parent, root": "test_parent_and_root_lead_up_the_tree",
    "1.14 get": "test_get_leads_to_modules_and_in_a_trace_to_their_values",
    "1.14 modules": "test_modules_come_as_torch_s_do_and_are_chosen_by_a_function",
    "1.14 unknown attributes": "test_a_misspelt_module test_attributes_of_the_module_are_had_as_they_are",
    "1.14 repr": "test_a_tree_is_printed_as_torch_prints_it_with_equal_layers_on_one_line",
    "1.14 names of ours": "test_a_child_with_a_name_of_ours_is_had_by_index_and_as_e_name",
    "1.14 copies": "test_a_model_is_copied_and_pickled_after_a_trace",
    "1.15 rename": "test_a_renamed_module_is_the_same_by_both_names test_keys_are_names_paths_stars_and_classes",
    "1.15 envoys": "test_keys_are_classes_ends_of_paths_stars_and_further_names",
    "1.15 eproperty": "test_a_derived_value_is_read_written_and_changed_in_place",
    "1.15 eproperty.provide": "test_nothing_is_provided_to_an_eproperty_and_that_is_said",
    "1.16 session": "test_a_session_changes_nothing",
    "1.18 CONFIG": "test_a_setting_that_is_misspelt_is_never_set",
}


def test_each_row_of_the_tables_has_tests():
    there = {
        node.name
        for path in HERE.rglob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    missing = {row: set(names.split()) - there for row, names in SHOWN_BY.items() if set(names.split()) - there}
    assert not missing
    sections = {row.partition(" ")[0] for row in SHOWN_BY}
    assert sections == {f"1.{n}" for n in (*range(3, 12), 14, 15, 16, 18)}


# Rows that have their test here


def test_a_tracer_has_its_attributes_and_is_used_once(mlp, x):
    tracer = mlp.trace(x)
    with tracer:
        assert list(tracer.iter[:]) == list(tracer.all()) == [0]
        cache = tracer.cache("layers.0")
        result = tracer.result
    assert torch.equal(result, mlp._module(x))
    assert len(cache["layers.0"]) == 1
    with pytest.raises(errors.BlockError, match="used once"), tracer:
        pass
    with mlp.trace() as tracer:
        barrier, values = tracer.barrier(2), []
        with tracer.invoke(x):
            values.append(mlp.layers[0].output)
            barrier()
        with tracer.invoke(x):
            barrier()
            mlp.layers[1].output = values[0]


def test_the_input_is_the_first_positional_one_or_the_first_keyword_and_is_replaced_alone(x):
    class Adds(nn.Module):
        def forward(self, a, *, b):
            return a + b

    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.adds, self.linear = Adds(), nn.Linear(4, 4)

        def forward(self, x):
            return self.adds(x, b=2 * x) + self.linear(input=x)

    model = nnsight.NNsight(Calls())
    with model.trace(x):
        first, keyword = model.adds.input, model.linear.input
        out = model.output
    assert first is x
    assert keyword is x
    with model.trace(x):
        model.adds.input = x * 0
        model.linear.input = x * 0
        changed = model.output
    torch.testing.assert_close(out, 3 * x + model._module.linear(x))
    assert torch.equal(changed, 2 * x + model._module.linear(x * 0))


def test_save_is_there_on_builtin_types_and_returns_its_object(mlp, x):
    with mlp.trace(x):
        for thing in ([], {}, (), 3, 0.5, "text", {1}, True, mlp.layers[0].output):
            assert thing.save() is thing
            assert nnsight.save(thing) is thing
        assert nnsight.save(None) is None


def test_copies_that_are_under_way_are_waited_for_once_when_a_cache_is_read(mlp, x, monkeypatch):
    waits = []
    monkeypatch.setattr(accelerator, "KIND", "meta")  # pretended: what is copied there is under way
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: waits.append(device.type))
    with mlp.trace(x) as tracer:
        at_once = tracer.cache("layers.0", device="meta")
        late = tracer.cache(["layers.0", "layers.1"], device="meta", non_blocking=True)
        mlp.layers[1].output
        assert at_once["layers.0"].output.is_meta
        assert waits == []
    assert late["layers.1"].output.is_meta
    assert waits == ["meta"]
    assert late["layers.0"].output.is_meta
    assert pickle.loads(pickle.dumps(late))["layers.0"].output.is_meta
    assert waits == ["meta"]


def test_gradients_are_had_in_a_session_and_behind_the_trace(mlp, x):
    with mlp.session():
        with mlp.trace(x):
            hidden = mlp.layers[1].output
            loss = mlp.output.sum()
        with nnsight.backward(loss):
            inside = hidden.grad
    with mlp.trace(x):
        hidden = mlp.layers[1].output
        loss = mlp.output.sum()
    with nnsight.backward(loss):
        behind = hidden.grad
    assert torch.equal(inside, behind)


def test_get_leads_to_modules_and_in_a_trace_to_their_values(mlp, x):
    assert mlp.get("layers.1.up") is mlp.layers[1].up
    assert mlp.layers.get("1.up") is mlp.layers[1].up
    with mlp.trace(x):
        value = mlp.get("layers.1.up.output")
        assert value is mlp.layers[1].up.output


def test_attributes_of_the_module_are_had_as_they_are(mlp):
    assert mlp.layers[1].up.weight is mlp._module.layers[1].up.weight
    assert mlp.layers[1].up.in_features == 4
    assert mlp.layers[1].norm.extra_repr() == mlp._module.layers[1].norm.extra_repr()


def test_a_tree_is_printed_as_torch_prints_it_with_equal_layers_on_one_line(mlp):
    assert "(0-2): 3 x Layer(" in repr(mlp)
    assert "(up): Linear(in_features=4, out_features=4, bias=True)" in repr(mlp)


def test_a_model_is_copied_and_pickled_after_a_trace(mlp, x):
    with mlp.trace(x):
        plain = mlp.output
    for one in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
        with one.trace(x):
            one.layers[1].output[:] = 0
            assert not torch.equal(one.output, plain)
        assert torch.equal(mlp(x), plain)


def test_nothing_is_provided_to_an_eproperty_and_that_is_said(x):
    class Halves(nnsight.Envoy):
        @nnsight.eproperty
        def halves(self, value):
            return value.chunk(2, -1)

    model = nnsight.NNsight(nn.Sequential(nn.Linear(4, 4)), envoys={nn.Linear: Halves})
    with pytest.raises(errors.InputError, match=r"Nothing is provided here: `halves`.*(?s:.)*envoy\.halves = value"):
        Halves.halves.provide(model[0], x)
