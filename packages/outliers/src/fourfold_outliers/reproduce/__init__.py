"""The reproduction of the paper: recipes, the experiment, claims, measures, figures and tables."""
