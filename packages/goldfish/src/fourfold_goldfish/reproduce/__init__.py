"""The reproduction of Hans et al. 2024 and of AxoNN's study: recipes, claims, measures, experiment, figures."""
