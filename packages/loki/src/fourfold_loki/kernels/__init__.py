"""Fast twins of ranking, selecting and attending, for decoding one token; tested against `attention.py`."""
