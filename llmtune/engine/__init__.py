"""DeepSpeed, driven: process groups, the training module, the optimizer's state by parameter
name.
"""
