"""Prompts: the grammar of GenEval-style requests, the files that hold them, and the program that makes them."""
