"""Plans that make sampling cheaper: laid out before the run, carried out within a context, gone without a trace.

accelerate          puts plans on a diffusers pipeline, a denoiser or a network
DeepCache           U-Nets: the deep part runs every N-th step
FasterDiffusion     U-Nets and transformers: the encoder runs at key steps, decoders in between in one batch
RAS                 transformers: a part of the tokens runs in each step
tune                chooses settings for a deviation that one accepts
"""

from pagoda.acceleration.accelerate import Run, accelerate
from pagoda.acceleration.accounting import Ledger
from pagoda.acceleration.deepcache import DeepCache, center_power, center_power_official
from pagoda.acceleration.faster_diffusion import FasterDiffusion, keys_by_change
from pagoda.acceleration.plan import KINDS, Layout, Plan, PlannedStep, lay_out
from pagoda.acceleration.ras import RAS, longest_streak, select_tokens, token_scores
from pagoda.acceleration.saving import load_plans, plan_from_dict, plan_to_dict, save_plans
from pagoda.acceleration.tuning import Candidate, Tuned, candidates_for, pipeline_sampler, relative_l2, tune

__all__ = [
    "KINDS",
    "RAS",
    "Candidate",
    "DeepCache",
    "FasterDiffusion",
    "Layout",
    "Ledger",
    "Plan",
    "PlannedStep",
    "Run",
    "Tuned",
    "accelerate",
    "candidates_for",
    "center_power",
    "center_power_official",
    "keys_by_change",
    "lay_out",
    "load_plans",
    "longest_streak",
    "pipeline_sampler",
    "plan_from_dict",
    "plan_to_dict",
    "relative_l2",
    "save_plans",
    "select_tokens",
    "token_scores",
    "tune",
]
