"""transformers' own tests of ViTMAE, as they are, run on maefast.hf.

They run where TRANSFORMERS_TESTS is the folder `tests` of its repository.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "transformers.md"
SUITE = Path("models", "vit_mae", "test_modeling_vit_mae.py")

# Of transformers 5.23; a name stands for all parameters of a test.
NOT_APPLICABLE = {
    "test_cannot_load_with_meta_device_context_manager": "maefast can load in this context",
    "test_eager_matches_sdpa_inference": "the cases with `attention_mask`, which MAE does not use",
    "test_gradient_checkpointing_enable_disable": "looks for transformers' `GradientCheckpointingLayer`",
    "test_initialization": "wants `initializer_range`; maefast initialises as the official model",
    "test_model_weights_reload_no_missing_tied_weights": "a file without any weights of the model is refused",
    "test_retain_grad_hidden_states_attentions": "attention weights are computed separately from the fused attention",
    "test_sdpa_can_dispatch_non_composite_models": 'wants `_attn_implementation == "sdpa"`; maefast chooses its own',
    "test_training_gradient_checkpointing": "looks for transformers' `GradientCheckpointingLayer`",
    "test_training_gradient_checkpointing_use_reentrant_false": "the same",
    "test_training_gradient_checkpointing_use_reentrant_true": "the same",
}


def test_the_page_lists_what_does_not_apply():
    rows = dict(re.findall(r"^\| `(test_\w+)` \| (.+) \|$", PAGE.read_text(), flags=re.MULTILINE))
    assert rows == NOT_APPLICABLE


@pytest.mark.skipif("TRANSFORMERS_TESTS" not in os.environ, reason="TRANSFORMERS_TESTS must be the folder tests of transformers")
def test_the_suite():
    pytest.importorskip("transformers", reason="transformers is not installed")
    tests = Path(os.environ["TRANSFORMERS_TESTS"]).resolve()
    options = ["-q", "-rA", "-p", "plugin", "-p", "no:cacheprovider", "-k", "not export"]
    command = [sys.executable, "-m", "pytest", str(tests / SUITE), *options]
    path = os.pathsep.join([str(HERE / "transformers_suite"), str(tests.parent)])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "1000"}
    done = subprocess.run(command, cwd=tests.parent, env=environment, capture_output=True, text=True, check=False)
    outcomes = re.findall(r"^(PASSED|FAILED|SUBFAILED\S*|ERROR) (?:\S*::)?(\w+)", done.stdout, flags=re.MULTILINE)
    parameters = r"_\d+_(fp16|bf16|fp32)\w*$"
    bad = {re.sub(parameters, "", name) for outcome, name in outcomes if outcome != "PASSED"}
    good = {name for outcome, name in outcomes if outcome == "PASSED"}
    assert bad == NOT_APPLICABLE.keys(), done.stdout[-4000:]
    assert {"test_model", "test_for_pretraining", "test_save_load", "test_training", "test_attention_outputs"} <= good
