"""The paper's study, reproduced: recipes, claims, the experiment and its figures."""
