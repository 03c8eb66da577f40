"""Answers from code models: transformers on this machine or a server, in ParEval's file format, resumable."""
