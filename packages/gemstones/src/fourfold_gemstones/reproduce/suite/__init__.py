"""A suite of our own: how it is trained, what laws say of it, and the claims that it can test."""
