"""The reproduction of both papers: recipes, claims, measures, experiment, figures."""
