"""llmtune: plan, fine-tune, resume, merge and export large language models on DeepSpeed."""

__version__ = "0.2.0"
