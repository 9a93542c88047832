"""Tiny random models of all supported families; the smoke tier, and which tests run beside which."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads starve each other on small machines

import re
import signal

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background, and its children, would ignore it

# A test or file -> the parameters, as a pattern: seconds in all, and every part of the package is touched.
SMOKE = {
    "test_generate.py::TestEqualsDynamicCache::test_one_prompt": r"\[llama-",
    "test_systems.py::test_a_tenth_runs_within_its_budget": r"\[llama-(.*-ssd|instattention-emulated)\]",
    "test_streamed.py::TestEqualsFull::test_padded_batch_and_a_second_turn": r"\[llama-(flexgen|dualblade)\]",
    "test_hie.py::test_int4_too": "",
    "test_attention.py::test_equals_attention_at_once": "",
    "test_native.py::test_scores": r"\[",
    "test_native.py::test_selection": "",
    "test_native.py::test_attention_over_scattered_records": "-2-4-64-",
    "test_drive.py::test_logs_read_back_to_the_bit": "dtype1-4 KiB",
    "test_drive.py::test_a_file_that_ends_early_says_where": "",
    "test_checksums.py::test_any_flipped_bit_is_found_with_its_place": "",
    "test_computational.py::test_scores_are_exact_at_the_extremes": "",
    "test_pool.py": "",
    "test_timeline.py": "",
    "test_planner.py": "",
    "test_session.py::test_answers_are_those_of_a_fresh_prefill": r"\[None-topk\]",
    "test_modelled.py::test_a_step_solved_by_hand": "",
    "test_replay.py::test_a_run_is_replayed_with_all_its_bytes": r"\[(topk|leoam)\]",
    "test_longbench_metrics.py::test_classification": "",
    "test_workbench.py": "",
    "test_cli.py::test_help_names_every_command": "",
    "test_cli.py::test_unknown_system": "",
    "test_docs.py::test_links_lead_somewhere": "",
    "test_project.py": "",
}
# Each test of these files runs wherever there is room; every other file stays in one process, in its order.
SPREAD = ("test_docs.py", "test_generate.py", "test_gpu.py", "test_notebooks.py", "test_streamed.py", "test_systems.py")
# Files that measure time, memory, threads or open files of the machine: one after the other.
ALONE = ("test_concurrency.py", "test_computational.py", "test_faults.py", "test_memory.py", "test_speed.py")


def pytest_ignore_collect(collection_path, config):
    """The smoke tier imports its own files only: the others' imports would take as long as its tests."""
    files = {part.partition("::")[0] for part in SMOKE}
    if config.option.markexpr == "smoke" and collection_path.suffix == ".py" and collection_path.name not in files:
        return True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        file, name = item.path.name, item.nodeid.rpartition("/")[2]
        if name.startswith("test_generate.py::test_every_policy_runs_at_a_tenth[") and "llama" not in name:
            item.add_marker("slow")  # a policy sees no family: one is enough every day
        slow = any(item.iter_markers("slow"))
        if not slow and any(name.startswith(part) and re.search(own, name) for part, own in SMOKE.items()):
            item.add_marker("smoke")
        if file in ALONE:
            item.add_marker(pytest.mark.xdist_group("alone"))
        elif file not in SPREAD:
            item.add_marker(pytest.mark.xdist_group(file))


SHAPE = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)

FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen2-mixed": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=24, max_window_layers=2)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
    "mistral-sliding": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=24)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=97,
            hidden_size=96,
            ffn_dim=96,
            word_embed_proj_dim=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
    ),
}


def seeded(make):
    """A model with seeded random weights of a scale that avoids ties in greedy decoding."""
    torch.manual_seed(7)
    model = make().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.fixture(scope="session")
def models():
    """Maps a family name to its model, built once and cached."""
    made = {}

    def get(name: str):
        if name not in made:
            made[name] = seeded(FAMILIES[name])
        return made[name]

    return get


@pytest.fixture
def prompt():
    torch.manual_seed(11)
    return torch.randint(2, 97, (1, 150))
