"""Evaluation: features first, then metrics as pure float64 functions of features; every score with its provenance."""

from pagoda.evaluation.cifar_resnet import CIFARResNet, CIFARResNetFeatures
from pagoda.evaluation.classifier import ClassifierConfig, ClassifierFeatures, SmallClassifier, train_classifier
from pagoda.evaluation.evaluate import ScoreReport, extract_features, image_batches, score_frechet, split_real
from pagoda.evaluation.extractors import FeatureExtractor, check_images, hash_weights, resize_images
from pagoda.evaluation.frechet import FeatureMoments, class_balanced, frechet_bias, frechet_distance
from pagoda.evaluation.pixels import Contrast, contrast, psnr, sharpness

__all__ = [
    "CIFARResNet",
    "CIFARResNetFeatures",
    "ClassifierConfig",
    "ClassifierFeatures",
    "Contrast",
    "FeatureExtractor",
    "FeatureMoments",
    "ScoreReport",
    "SmallClassifier",
    "check_images",
    "class_balanced",
    "contrast",
    "extract_features",
    "frechet_bias",
    "frechet_distance",
    "hash_weights",
    "image_batches",
    "psnr",
    "resize_images",
    "score_frechet",
    "sharpness",
    "split_real",
    "train_classifier",
]
