"""Each technique beside the controls that its paper leaves open: is it the idea that helps, or anything in its place?"""

from __future__ import annotations

from benchmarks.harness import Arm, PassLine, benchmark
from benchmarks.technique_runs import arm, ratio

ARMS = {
    "plain": [],
    "repa": ["repa"],
    "repa, random encoder": [{"repa": {"encoders": ["random"]}}],
    "repa, shuffled targets": [{"repa": {"targets": "shuffled"}}],
    "dtr": ["dtr"],
    "dtr, random masks": [{"dtr": {"scheme": "random"}}],
    "dtr, one mask for all": [{"dtr": {"scheme": "constant"}}],
    "switch_dit": ["switch_dit"],
    "switch_dit, no prior": [{"switch_dit": {"prior_weight": 0.0}}],
    "switch_dit, all experts on": [{"switch_dit": {"top_k": 3, "prior_weight": 0.0}}],
    "dit_moe": ["dit_moe"],
    "dit_moe, active experts only": [{"dit_moe": {"num_experts": 2, "top_k": 2}}],
    "dit_moe, no balance": [{"dit_moe": {"balance_weight": 0.0}}],
    "cep": ["cep"],
    "cep, gaussian": [{"cep": {"kind": "gaussian"}}],
    "ddae_plus": ["ddae_plus"],
    "ddae_plus, detached": [{"ddae_plus": {"source": "detached"}}],
    "ddae_plus, constant": [{"ddae_plus": {"source": "constant"}}],
    "ddae_plus, contrastive": [{"ddae_plus": {"contrastive": 0.3}}],
}
GUIDED = ("plain", "cep", "cep, gaussian")
"""Judged at several guidance weights too: a perturbed condition moves the best one."""
WRONG = {"5 % wrong labels": 0.05, "20 % wrong labels": 0.2}


def below(name: str, control: str) -> object:
    """Median ratio of distances of a technique and of its control."""
    return ratio(name, below=control)


@benchmark(
    "technique_controls",
    question="Does each technique do better than the controls that have its cost but not its idea?",
    passes=[
        PassLine("repa at most its random encoder's distance", below("repa", "repa, random encoder"), at_most=1.0),
        PassLine(
            "repa at most its distance with shuffled targets", below("repa", "repa, shuffled targets"), at_most=1.0
        ),
        PassLine(
            "shuffled targets at least the plain run's distance", below("repa, shuffled targets", "plain"), at_least=1.0
        ),
        PassLine(
            "cep at most the plain run's, each at its best guidance weight",
            ratio("cep", "best_distance"),
            at_most=1.0,
        ),
        PassLine("dtr at most random masks'", below("dtr", "dtr, random masks"), at_most=1.0),
        PassLine("dtr at most one mask for all", below("dtr", "dtr, one mask for all"), at_most=1.0),
        PassLine("switch_dit at most without its prior", below("switch_dit", "switch_dit, no prior"), at_most=1.0),
        PassLine(
            "switch_dit at most with all experts on", below("switch_dit", "switch_dit, all experts on"), at_most=1.0
        ),
        PassLine("switch_dit at most dtr", below("switch_dit", "dtr"), at_most=1.0),
        PassLine(
            "dit_moe at most its active experts alone", below("dit_moe", "dit_moe, active experts only"), at_most=1.0
        ),
        PassLine("20 % wrong labels at least 5 %", below("20 % wrong labels", "5 % wrong labels"), at_least=1.0),
        PassLine("ddae_plus at most fed from a constant", below("ddae_plus", "ddae_plus, constant"), at_most=1.0),
        PassLine(
            "ddae_plus with contrastive loss at most 1.05 x without",
            below("ddae_plus, contrastive", "ddae_plus"),
            at_most=1.05,
        ),
    ],
)
def technique_controls(budget: float) -> dict[str, Arm]:
    """The runs of `techniques`, and their controls."""
    arms = {name: arm(list(entries), budget=budget, guided=name in GUIDED) for name, entries in ARMS.items()}
    return arms | {name: arm([], budget=budget, teach__wrong_labels=share) for name, share in WRONG.items()}
