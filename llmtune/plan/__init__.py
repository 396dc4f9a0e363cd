"""The frozen plan: hardware, model shape, batches, memory, the placement, and DeepSpeed's
dictionary.
"""
