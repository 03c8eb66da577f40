"""The distributed runtime of fourfold, and the reproduction of AxoNN (SC'24)."""
