"""Every family of models that is known to train, tiny: against plain PyTorch, or refused with the
reason.
"""
