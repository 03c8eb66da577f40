"""The reproduction: recipes, claims, measures, experiment, figures."""
