"""Aurora-M's curriculum (Nakamura et al. 2024): continual pretraining, replay, and forgetting that is measured."""
