"""All experiments, in the order of the report, and all passes, in the order they run."""

from __future__ import annotations

from ..beyond import (
    b1_token_flow,
    b2_replacement,
    b3_layers_heads,
    b4_outliers,
    b5_test_time_registers,
    b6_rollout,
    b7_open_questions,
    sensitivity,
)
from ..core import labelled
from ..core.controls import Controls
from ..core.experiment import Experiment
from ..core.passes import Clean, Pass
from ..paper import (
    a1_attention_mass,
    a2_top_register,
    a3_update_cka,
    a4_one_shot,
    a5_patch_cosine,
    a6_gram_split,
    a7_norms,
    a8_depth_cosine,
    a9_skip_cka,
)

MODULES = (
    a1_attention_mass,
    a2_top_register,
    a3_update_cka,
    a4_one_shot,
    a5_patch_cosine,
    a6_gram_split,
    a7_norms,
    a8_depth_cosine,
    a9_skip_cka,
    b1_token_flow,
    b2_replacement,
    b3_layers_heads,
    b4_outliers,
    b5_test_time_registers,
    b6_rollout,
    b7_open_questions,
)
SENSITIVITY: Experiment = sensitivity.EXPERIMENT
EXPERIMENTS: dict[str, Experiment] = {module.EXPERIMENT.id: module.EXPERIMENT for module in MODULES}
HELP: dict[str, str] = {module.EXPERIMENT.id: module.__doc__ or "" for module in MODULES}
PASSES: list[Pass] = [Clean(), Controls(), labelled.PASS, b5_test_time_registers.PASS]
