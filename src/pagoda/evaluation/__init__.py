"""Evaluation: features first, then metrics as pure float64 functions of features; every score with its provenance."""

from pagoda.evaluation.cifar_resnet import CIFARResNet, CIFARResNetFeatures
from pagoda.evaluation.classifier import ClassifierConfig, ClassifierFeatures, SmallClassifier, train_classifier
from pagoda.evaluation.collect import Features, Team, collect_features, extract_features, image_batches
from pagoda.evaluation.evaluate import score_features, score_images, split_real
from pagoda.evaluation.extractors import (
    ClassifyingExtractor,
    FeatureExtractor,
    StackFeatures,
    check_images,
    hash_weights,
    resize_images,
)
from pagoda.evaluation.extrapolation import Extrapolation, extrapolate_frechet
from pagoda.evaluation.frechet import FeatureMoments, class_balanced, frechet_bias, frechet_distance
from pagoda.evaluation.inception import InceptionFeatures
from pagoda.evaluation.inception_score import InceptionScore, inception_score
from pagoda.evaluation.intervals import half_sample_error, interval, mean_error
from pagoda.evaluation.kernel import KernelDistance, kernel_distance, kernel_distance_subsets
from pagoda.evaluation.measures import METRICS, ScoreOptions, metric_name
from pagoda.evaluation.neighbours import (
    Memorisation,
    NeighbourScores,
    memorisation,
    nearest_neighbours,
    neighbour_scores,
)
from pagoda.evaluation.pairs import PAIR_METRICS, PairMeasure, pair_measure, score_reconstructions, score_texts
from pagoda.evaluation.pixels import Contrast, contrast, psnr, psnr_values, sharpness, ssim, ssim_values
from pagoda.evaluation.references import ReferenceFacts, load_stats, save_stats
from pagoda.evaluation.registry import EXTRACTORS, Place, open_extractor
from pagoda.evaluation.scores import Score, check_comparable, load_scores, score_table
from pagoda.evaluation.text import clip_scores, directional_similarity, retrieval_accuracy
from pagoda.evaluation.transformers import CLIPFeatures, DINOv2Features
from pagoda.networks import LPIPS, load_published

__all__ = [
    "EXTRACTORS",
    "LPIPS",
    "METRICS",
    "PAIR_METRICS",
    "CIFARResNet",
    "CIFARResNetFeatures",
    "CLIPFeatures",
    "ClassifierConfig",
    "ClassifierFeatures",
    "ClassifyingExtractor",
    "Contrast",
    "DINOv2Features",
    "Extrapolation",
    "FeatureExtractor",
    "FeatureMoments",
    "Features",
    "InceptionFeatures",
    "InceptionScore",
    "KernelDistance",
    "Memorisation",
    "NeighbourScores",
    "PairMeasure",
    "Place",
    "ReferenceFacts",
    "Score",
    "ScoreOptions",
    "SmallClassifier",
    "StackFeatures",
    "Team",
    "check_comparable",
    "check_images",
    "class_balanced",
    "clip_scores",
    "collect_features",
    "contrast",
    "directional_similarity",
    "extract_features",
    "extrapolate_frechet",
    "frechet_bias",
    "frechet_distance",
    "half_sample_error",
    "hash_weights",
    "image_batches",
    "inception_score",
    "interval",
    "kernel_distance",
    "kernel_distance_subsets",
    "load_published",
    "load_scores",
    "load_stats",
    "mean_error",
    "memorisation",
    "metric_name",
    "nearest_neighbours",
    "neighbour_scores",
    "open_extractor",
    "pair_measure",
    "psnr",
    "psnr_values",
    "resize_images",
    "retrieval_accuracy",
    "save_stats",
    "score_features",
    "score_images",
    "score_reconstructions",
    "score_table",
    "score_texts",
    "sharpness",
    "split_real",
    "ssim",
    "ssim_values",
    "train_classifier",
]
