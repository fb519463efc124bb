"""From images to features to scores."""

from utils.metrics.distances import frechet_distance, inception_score, moments, precision_recall

__all__ = ["frechet_distance", "inception_score", "moments", "precision_recall"]
