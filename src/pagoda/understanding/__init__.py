"""Understanding: what a frozen diffusion model has learned. Probes read it, predict from it, and leave no trace.

levels, taps            features of named parts at any noise level; `feature_table` streams those of a whole set
heads, search           what can be read off them, and where best
diffusion_classifier    the condition that denoises best; `elimination` drops the others early
jacobian                singular triplets, numerical rank and dimension of a denoiser, by products with vectors only
directions              what the Jacobian moves most, inside a mask; edits along it
low_rank_mixture        data on a union of subspaces with the exact denoiser; `low_rank_denoiser` is trained on such data
subspaces               the reference solver of subspace clustering, and how subspaces are compared
"""

from pagoda.understanding.calibration import calibration_error, fit_temperature
from pagoda.understanding.candidates import Candidates
from pagoda.understanding.denoising_errors import DenoisingErrors, ErrorConfig, level_weights
from pagoda.understanding.diffusion_classifier import Classification, DiffusionClassifier
from pagoda.understanding.directions import Directions, edit_images, find_directions, from_level, to_level
from pagoda.understanding.elimination import AtRisk, Elimination, Full, KeepBest, count_calls
from pagoda.understanding.feature_table import Features, FeatureTable, read_features
from pagoda.understanding.heads import (
    AttentionHead,
    Head,
    HeadConfig,
    KNNHead,
    LinearHead,
    check_spec,
    fit_logistic,
    load_head,
)
from pagoda.understanding.jacobian import DenoiserJacobian, RankEstimate, RankProfile, Triplets, rank_profile
from pagoda.understanding.levels import (
    LevelGrid,
    check_sigmas,
    log_snr_of_sigma,
    nested_strata,
    noise_range,
    sigma_of_log_snr,
)
from pagoda.understanding.low_rank_denoiser import LowRankConfig, LowRankDenoiser, train_low_rank
from pagoda.understanding.low_rank_mixture import LowRankMixture
from pagoda.understanding.pictures import draw_curves, draw_heat_map
from pagoda.understanding.search import DEFAULT_SIGMAS, SearchResult, middle_taps, search, search_table
from pagoda.understanding.subspaces import (
    Clustering,
    assign,
    clustering_accuracy,
    k_subspaces,
    projector_distance,
    subspace_error,
)
from pagoda.understanding.taps import FeatureSpec, TapInfo, Taps, check_features, describe_taps, reading

__all__ = [
    "DEFAULT_SIGMAS",
    "AtRisk",
    "AttentionHead",
    "Candidates",
    "Classification",
    "Clustering",
    "DenoiserJacobian",
    "DenoisingErrors",
    "DiffusionClassifier",
    "Directions",
    "Elimination",
    "ErrorConfig",
    "FeatureSpec",
    "FeatureTable",
    "Features",
    "Full",
    "Head",
    "HeadConfig",
    "KNNHead",
    "KeepBest",
    "LevelGrid",
    "LinearHead",
    "LowRankConfig",
    "LowRankDenoiser",
    "LowRankMixture",
    "RankEstimate",
    "RankProfile",
    "SearchResult",
    "TapInfo",
    "Taps",
    "Triplets",
    "assign",
    "calibration_error",
    "check_features",
    "check_sigmas",
    "check_spec",
    "clustering_accuracy",
    "count_calls",
    "describe_taps",
    "draw_curves",
    "draw_heat_map",
    "edit_images",
    "find_directions",
    "fit_logistic",
    "fit_temperature",
    "from_level",
    "k_subspaces",
    "level_weights",
    "load_head",
    "log_snr_of_sigma",
    "middle_taps",
    "nested_strata",
    "noise_range",
    "projector_distance",
    "rank_profile",
    "read_features",
    "reading",
    "search",
    "search_table",
    "sigma_of_log_snr",
    "subspace_error",
    "to_level",
    "train_low_rank",
]
