"""The reproduction of the paper: recipes, measurements, claims, figures."""
