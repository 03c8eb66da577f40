"""The reproduction: the paper's measurements analysed again, a suite of our own, claims and figures."""
