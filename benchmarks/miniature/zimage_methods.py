"""The methods that the experiment compares on the miniature Z-Image-Turbo."""

from dataclasses import replace

from benchmarks.miniature.methods import BASE, RECIPES, TEACHER, USUAL_EPSILON, variant, with_rate


# Chosen from `LEARNING_RATE_GRID`; the report has what each of them gave.
LEARNING_RATES = (1e-3, 1e-2, 1e-3, 1e-3, 1e-3, 1e-3)
LEARNING_RATE_GRID = (3e-4, 1e-3, 3e-3, 1e-2)
SFT, SFT_PRIOR, DOPSD, DOPSD_ONE, DOPSD_PRIOR, DOPSD_BOTH = (
    with_rate(recipe, USUAL_EPSILON, rate) for recipe, rate in zip(RECIPES, LEARNING_RATES, strict=True)
)
# As good by the grid's criterion, which leaves out edges and wrong words.
DOPSD_BOTH_FAST = variant("D-OPSD, one state + prior, at 3e-3", DOPSD_BOTH, learning_rate=3e-3)
FIRST_TABLE = (BASE, TEACHER, SFT, SFT_PRIOR, DOPSD, DOPSD_ONE, DOPSD_PRIOR, DOPSD_BOTH, DOPSD_BOTH_FAST)
QUICK_TABLE = (BASE, TEACHER, SFT, DOPSD, DOPSD_BOTH)
# The student walks 4 steps by default, and is used at 8.
ROLLOUT_TABLE = (
    DOPSD,
    variant("D-OPSD, 8-step rollout, 4 of its states", DOPSD, num_rollout_steps=8),
    variant("D-OPSD, 8-step rollout, all states", DOPSD, num_rollout_steps=8, num_trained_states=8),
    DOPSD_BOTH,
    variant("D-OPSD, one state + prior, 8-step rollout", DOPSD_BOTH, num_rollout_steps=8),
)
TEXT_ENCODER_ROPE = {"vlm_rope": "text_encoder"}
ROPE_TABLE = (
    TEACHER,
    replace(TEACHER, name="teacher, the text encoder's RoPE", flags=TEXT_ENCODER_ROPE),
    DOPSD,
    variant("D-OPSD, the text encoder's RoPE", DOPSD, **TEXT_ENCODER_ROPE),
    DOPSD_BOTH,
    variant("D-OPSD, one state + prior, the text encoder's RoPE", DOPSD_BOTH, **TEXT_ENCODER_ROPE),
)
