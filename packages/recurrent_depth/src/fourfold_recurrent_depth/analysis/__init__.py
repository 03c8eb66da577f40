"""Looking at a model from outside: where its states go, and what a pass costs."""
