"""From records to verdicts: claims, experiments, figures, pages and the command line."""
