"""Compute elementwise operations of a model in fewer kernels, each compared with the plain one."""
