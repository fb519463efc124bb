"""From images to features to scores."""

from utils.metrics.distances import (
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    moments,
    precision_recall,
)

__all__ = ["density_coverage", "frechet_distance", "inception_score", "kernel_distance", "moments", "precision_recall"]
