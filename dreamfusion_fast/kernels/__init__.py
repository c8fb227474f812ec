"""Triton kernels, one module a subject; each is called by the module that holds its twin."""
